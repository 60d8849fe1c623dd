import pytest

from lib.simulation import (
    BuddyReserving,
    Paging,
    Request,
    Reserving,
    draw_requests,
    reserve_maximum,
    reserve_oracle,
    reserve_power_of_two,
    simulate,
)

SHAREGPT, ALPACA = (161.3, 338.0), (19.3, 58.5)
POOL = 16384


def run(manager, lens=SHAREGPT, num_steps=600, warm_up=900):
    return simulate(manager, draw_requests(4000, *lens), num_steps, warm_up)


def test_pages_of_sixteen_hold_at_least_96_percent_tokens():
    usage = run(Paging(POOL, 16))
    assert usage.tokens >= 0.96
    assert usage.never < 0.005 and usage.free < 0.03


def test_short_requests_lose_more_in_their_last_block():
    assert run(Paging(POOL, 16), ALPACA, 300, 300).tokens < 0.96
    assert run(Paging(POOL, 1), ALPACA, 300, 300).tokens > 0.99


def test_the_less_is_known_the_less_holds_tokens():
    reserves = (reserve_maximum, reserve_power_of_two, reserve_oracle)
    shares = [run(Reserving(POOL, reserve)).tokens for reserve in reserves]
    assert shares == sorted(shares) and shares[-1] < 0.7
    for reserve, share in zip(reserves, shares):
        assert run(BuddyReserving(POOL, reserve)).tokens <= share


@pytest.mark.parametrize(
    "manager",
    [
        Reserving(POOL, reserve_maximum),
        Reserving(POOL, reserve_oracle),
        BuddyReserving(POOL, reserve_power_of_two),
        Paging(POOL, 16),
        Paging(POOL, 256),
    ],
)
def test_each_slot_is_counted_once(manager):
    usage = run(manager, num_steps=50, warm_up=50)
    shares = usage.tokens, usage.later, usage.never, usage.free
    assert sum(shares) == pytest.approx(1) and min(shares) >= -1e-9
    if isinstance(manager, Paging):
        manager.manager.check_integrity()


def test_an_oracle_wastes_nothing_inside_its_pieces():
    usage = run(Reserving(POOL, reserve_oracle), num_steps=50, warm_up=50)
    assert usage.never == 0


def test_steps_are_counted_by_hand():
    # A pool of 8: three requests of 2 + 2 tokens. Two begin; each grows twice, then ends.
    requests = [Request(2, 2)] * 3
    usage = simulate(Reserving(8, reserve_oracle), requests, num_steps=2, warm_up=0)
    assert (usage.tokens, usage.later) == ((4 + 6) / 16, (4 + 2) / 16)
    assert (usage.in_flight, usage.finished, usage.preempted) == (2, 2, 0)


def test_pieces_never_overlap_and_a_gap_is_used_again():
    manager = Reserving(10, lambda request: request.num_tokens)
    request = Request(2, 2)
    assert manager.begin(0, request, 2) and manager.begin(1, request, 2)
    assert not manager.begin(2, request, 2), "two slots are left, but four are wanted"
    manager.end(0)
    assert manager.begin(3, request, 2)
    assert manager.pieces == {1: range(4, 8), 3: range(4)}


def test_buddies_begin_at_multiples_of_their_size():
    manager = BuddyReserving(16, lambda request: request.num_tokens)
    assert manager.begin(0, Request(1, 2), 1) and manager.begin(1, Request(4, 4), 4)
    assert manager.pieces == {0: range(4), 1: range(8, 16)}
    assert manager.num_held(0) == 4
    assert not manager.begin(2, Request(4, 4), 4)
    assert manager.begin(3, Request(2, 2), 2)


def test_who_cannot_grow_sends_away_the_last_and_all_tokens_come_back():
    # Two blocks of two tokens, and each request wants both: the second has to wait.
    manager = Paging(4, 2)
    usage = simulate(manager, [Request(2, 2)] * 5, num_steps=6, warm_up=0)
    assert usage.finished == 3, "two steps each, as if they had come one by one"
    assert usage.in_flight == (2 + 1) / 2 and usage.preempted == 3
    manager.manager.check_integrity()


def test_who_is_sent_away_is_the_last_and_comes_back_first_with_all_its_tokens():
    seen = []

    class Watched(Paging):
        def begin(self, request_id, request, num_tokens):
            has_room = super().begin(request_id, request, num_tokens)
            if has_room:
                seen.append(f"{request_id} begins with {num_tokens}")
            return has_room

        def end(self, request_id):
            seen.append(f"{request_id} goes")
            super().end(request_id)

    # Three blocks of two. At first each of three has one block and one token, after a
    # step two, and all blocks are full. Then 0 wants a block, and 2 goes, the last. 0 has
    # three tokens, and ends; 1 grows into what it left. 2 comes back, before 3.
    requests = [Request(1, 2), Request(1, 3), Request(1, 4), Request(1, 1), Request(1, 1)]
    with pytest.raises(ValueError, match="every request began"):
        simulate(Watched(6, 2), requests, num_steps=50, warm_up=0)
    assert seen[:7] == [
        *("0 begins with 1", "1 begins with 1", "2 begins with 1"),
        *("2 goes", "0 goes", "2 begins with 2", "1 goes"),
    ]


def test_what_ends_while_the_server_warms_up_is_not_counted():
    requests = [Request(1, 2)] * 9
    usage = simulate(Reserving(6, reserve_oracle), requests, num_steps=2, warm_up=2)
    assert usage.finished == 2 and usage.in_flight == 2


def test_slots_that_make_no_block_are_none():
    assert Paging(10, 4).num_slots == 8


def test_lengths_have_the_means_that_were_asked_for_before_they_are_cut():
    requests = draw_requests(20000, *ALPACA)
    for lens, mean in zip(
        ([r.prompt_len for r in requests], [r.output_len for r in requests]), ALPACA
    ):
        assert sum(lens) / len(lens) == pytest.approx(mean, rel=0.05)
        assert min(lens) >= 1 and max(lens) <= 1024
    assert draw_requests(5, 9, 9, seed=1) == draw_requests(5, 9, 9, seed=1)
    assert draw_requests(5, 9, 9, seed=1) != draw_requests(5, 9, 9, seed=2)


def test_an_idle_pool_and_a_request_that_is_too_large_are_refused():
    with pytest.raises(ValueError, match="every request began"):
        simulate(Paging(64, 16), [Request(1, 1)], num_steps=1, warm_up=0)
    with pytest.raises(ValueError, match="at most 64 tokens.*got one of 66"):
        simulate(Paging(64, 16), [Request(65, 1)] * 2, num_steps=1, warm_up=0)
    with pytest.raises(ValueError, match="at least 1 token"):
        Request(1, 0)
    with pytest.raises(ValueError, match="expected at least 1 step"):
        simulate(Paging(64, 16), [Request(1, 1)] * 2, num_steps=0, warm_up=0)
    with pytest.raises(ValueError, match="a request finds no room at 0"):
        simulate(Reserving(64, reserve_maximum), [Request(1, 1)] * 2, 1, warm_up=0)
