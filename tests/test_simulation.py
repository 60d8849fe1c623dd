import dataclasses
import math
import random
from collections import Counter

import pytest
import torch
from helpers import random_model

from lib.block_manager import OutOfBlocksError
from lib.engine import Engine, Step, latencies
from lib.paged_kv_cache import PagedKVCache
from lib.simulation import (
    BuddyReserving,
    Paging,
    Request,
    Reserving,
    StepSeconds,
    draw_arrivals,
    draw_requests,
    predict_steps,
    reserve_maximum,
    reserve_oracle,
    reserve_power_of_two,
    serve,
    simulate,
    static_steps,
)

SHAREGPT, ALPACA = (161.3, 338.0), (19.3, 58.5)
POOL = 16384


def run(manager, lens=SHAREGPT, num_steps=600, warm_up=900):
    return simulate(manager, draw_requests(4000, *lens), num_steps, warm_up)


def test_pages_of_sixteen_hold_at_least_96_percent_tokens():
    usage = run(Paging(POOL, 16))
    assert usage.tokens >= 0.96
    assert usage.internal < 0.005 and usage.external < 0.03


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
        Paging(POOL, 16, watermark=0.05),
    ],
)
def test_each_slot_is_counted_once(manager):
    usage = run(manager, num_steps=50, warm_up=50)
    shares = usage.tokens, usage.reservation, usage.internal, usage.external
    assert sum(shares) == pytest.approx(1) and min(shares) >= -1e-9
    if isinstance(manager, Paging):
        manager.manager.check_integrity()


def test_an_oracle_wastes_nothing_inside_its_pieces():
    for kind in (Reserving, BuddyReserving):
        usage = run(kind(POOL, reserve_oracle), num_steps=50, warm_up=50)
        assert usage.internal == 0


def test_steps_are_counted_by_hand():
    # A pool of 8: three requests of 2 + 2 tokens. Two begin; each grows twice, then ends.
    requests = [Request(2, 2)] * 3
    usage = simulate(Reserving(8, reserve_oracle), requests, num_steps=2, warm_up=0)
    assert (usage.tokens, usage.reservation) == ((4 + 6) / 16, (4 + 2) / 16)
    assert (usage.in_flight, usage.finished, usage.preempted) == (2, 2, 0)
    assert (usage.written, usage.recomputed) == (4 + 2 + 2, 0)


def test_what_a_buddy_is_rounded_up_by_is_external():
    # Two pieces of four slots, of which three were asked for.
    requests = [Request(1, 2)] * 3
    usage = simulate(BuddyReserving(8, reserve_oracle), requests, 2, warm_up=0)
    assert (usage.tokens, usage.reservation) == ((2 + 4) / 16, (4 + 2) / 16)
    assert (usage.internal, usage.external) == (0, (2 + 2) / 16)
    # Reserved for an answer of four tokens, of which three come; five slots take eight.
    requests = [Request(1, 3)] * 2
    usage = simulate(BuddyReserving(8, reserve_power_of_two), requests, 1, warm_up=0)
    assert (usage.tokens, usage.reservation) == (1 / 8, 3 / 8)
    assert (usage.internal, usage.external) == (1 / 8, 3 / 8)


def test_the_paper_s_pool_has_room_for_seven_requests_of_the_maximum():
    # 12 GiB, at 800 KiB per token. Figure 2 has 8.9% for this part, and figure 13 has 7
    # requests.
    usage = run(BuddyReserving(15728, reserve_maximum), num_steps=50, warm_up=0)
    assert usage.in_flight == 7 and usage.external == pytest.approx(0.089, abs=0.001)


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
    assert manager.num_reserved(0) == 3, "one of the four was not asked for"
    assert not manager.begin(2, Request(4, 4), 4)
    assert manager.begin(3, Request(2, 2), 2)


def test_who_cannot_grow_sends_away_the_last_and_all_tokens_come_back():
    # Two blocks of two tokens, and each request wants both: the second has to wait.
    manager = Paging(4, 2)
    usage = simulate(manager, [Request(2, 2)] * 5, num_steps=6, warm_up=0)
    assert usage.finished == 3, "two steps each, as if they had come one by one"
    assert usage.in_flight == (2 + 1) / 2 and usage.preempted == 3
    # Who is sent away has nothing but a prompt. It is computed again all the same.
    assert (usage.written, usage.recomputed) == (4 * 2 + 6, 2 * 2)
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


def test_tokens_are_computed_again_in_the_step_in_which_a_request_begins_again():
    # The same three blocks: 2 goes in the second step, and comes back in the third.
    requests = [Request(1, 2), Request(1, 3), Request(1, 4), Request(1, 1)]
    events = [
        (usage.written, usage.recomputed, usage.preempted, usage.finished)
        for usage in (simulate(Paging(6, 2), requests, 1, warm_up=i) for i in range(3))
    ]
    assert events == [(3 + 3, 0, 0, 0), (2, 0, 1, 1), (2, 2, 0, 1)]


def counting(kind):
    """A manager of this kind that counts the tokens for which it finds room: all of them,
    and of each request those that it had when it had most."""

    class Counting(kind):
        def __init__(self, *args):
            super().__init__(*args)
            self.num_entered, self.num_tokens, self.most = 0, {}, {}

        def begin(self, request_id, request, num_tokens):
            has_room = super().begin(request_id, request, num_tokens)
            if has_room:
                self.num_tokens[request_id] = 0
                self.enter(request_id, num_tokens)
            return has_room

        def grow(self, request_id):
            has_room = super().grow(request_id)
            if has_room:
                self.enter(request_id, 1)
            return has_room

        def enter(self, request_id, num_new):
            self.num_entered += num_new
            self.num_tokens[request_id] += num_new
            most = max(self.most.get(request_id, 0), self.num_tokens[request_id])
            self.most[request_id] = most

    return Counting


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "kind, args",
    [
        (Reserving, (4096, reserve_power_of_two)),
        (BuddyReserving, (4096, reserve_oracle)),
        (Paging, (4096, 16)),
        (Paging, (4096, 7, 0.05)),
    ],
)
def test_each_token_that_enters_is_written_or_computed_again(kind, args, seed):
    manager = counting(kind)(*args)
    requests = draw_requests(2000, *ALPACA, seed=seed)
    usage = simulate(manager, requests, num_steps=300, warm_up=0)
    assert usage.written + usage.recomputed == manager.num_entered
    assert (usage.recomputed > 0) == (usage.preempted > 0) == (kind is Paging)
    assert usage.written == sum(manager.most.values())


def test_steps_add_up():
    requests = draw_requests(2000, *ALPACA)
    first, then, both = (
        simulate(Paging(4096, 16), requests, num_steps, warm_up)
        for num_steps, warm_up in ((100, 0), (200, 100), (300, 0))
    )
    assert then.recomputed > 0
    for name in ("finished", "preempted", "written", "recomputed"):
        parts = getattr(first, name) + getattr(then, name)
        assert parts == getattr(both, name), name
    for name in ("tokens", "reservation", "internal", "external", "in_flight"):
        mean = (getattr(first, name) + 2 * getattr(then, name)) / 3
        assert mean == pytest.approx(getattr(both, name)), name


def test_without_a_watermark_the_manager_alone_says_who_may_begin():
    class Alone(Paging):
        def begin(self, request_id, request, num_tokens):
            try:
                self.manager.allocate(request_id, num_tokens)
            except OutOfBlocksError:
                return False
            return True

    assert run(Paging(POOL, 16, watermark=0)) == run(Alone(POOL, 16))


def test_blocks_of_a_watermark_are_for_growing_not_for_beginning():
    manager = Paging(16, 2, watermark=0.25)  # two of eight blocks
    request = Request(8, 9)
    assert manager.begin(0, request, 8), "four blocks, four are left"
    assert not manager.begin(1, request, 5), "three blocks would leave one"
    assert manager.begin(2, request, 4), "two blocks leave two"
    assert not manager.begin(3, request, 1)
    assert [manager.grow(0) for _ in range(5)] == [True] * 4 + [False]
    assert Paging(20, 2, watermark=0.19).watermark_blocks == 1, "rounded down"


def test_the_higher_the_watermark_the_fewer_tokens_are_computed_again():
    usages = [run(Paging(POOL, 16, watermark)) for watermark in (0, 0.01, 0.02, 0.05)]
    for name in ("recomputed", "preempted", "tokens"):
        values = [getattr(usage, name) for usage in usages]
        assert values == sorted(values, reverse=True), name
    assert usages[-1].recomputed < 0.2 * usages[0].recomputed


def test_a_watermark_that_is_none_or_that_lets_nobody_begin_is_refused():
    for watermark in (-0.1, 1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"expected a share .* got {watermark}"):
            Paging(64, 16, watermark)
    assert Paging(64, 16, 0.5).begin(0, Request(32, 1), 32), "two, and two stay free"
    why = "at least 5 blocks, of which 2 stay free when 33 tokens begin, got 4"
    with pytest.raises(ValueError, match=why):
        simulate(Paging(64, 16, 0.5), [Request(33, 1)] * 2, num_steps=1, warm_up=0)


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
    with pytest.raises(
        ValueError, match="output_len: expected an integer of at least 1, got 0"
    ):
        Request(1, 0)
    with pytest.raises(ValueError, match="at most 64 tokens.*got one of 65"):
        simulate(Paging(64, 16), [Request(64, 1)] * 2, num_steps=1, warm_up=0)
    with pytest.raises(ValueError, match="at least 1 step after at least 0, got 1 after"):
        simulate(Paging(64, 16), [Request(1, 1)] * 2, num_steps=1, warm_up=-1)
    with pytest.raises(ValueError, match="every request began"):
        simulate(Paging(64, 16), [], num_steps=1, warm_up=0)
    with pytest.raises(ValueError, match="expected at least 1 step"):
        simulate(Paging(64, 16), [Request(1, 1)] * 2, num_steps=0, warm_up=0)
    with pytest.raises(ValueError, match="a request finds no room at 0"):
        simulate(Reserving(64, reserve_maximum), [Request(1, 1)] * 2, 1, warm_up=0)


@pytest.mark.parametrize("lens", [(20, 9.5), (math.nan, 3), (True, 2), (3, 0)])
def test_a_request_has_whole_tokens(lens):
    with pytest.raises(ValueError, match="expected an integer of at least 1"):
        Request(*lens)


@pytest.mark.parametrize("make", [Reserving, BuddyReserving])
def test_each_simulation_needs_a_manager_of_its_own(make):
    manager, requests = make(4096, reserve_oracle), draw_requests(400, 100, 100)
    simulate(manager, requests, 20, warm_up=0)
    with pytest.raises(ValueError, match="expected a new one"):
        simulate(manager, requests, 20, warm_up=0)


def test_less_than_a_request_will_need_is_no_reserve():
    with pytest.raises(ValueError, match="reserve: expected room for .*got 10 slots"):
        simulate(Reserving(64, lambda request: 10), [Request(9, 2)] * 9, 1, warm_up=0)


def test_sizes_that_make_no_pool_are_refused():
    with pytest.raises(ValueError, match="num_slots: expected room for a block of 16"):
        Paging(8, 16)
    with pytest.raises(ValueError, match="block_size: expected an integer"):
        Paging(8, 0)
    with pytest.raises(ValueError, match="expected means above 0, got 0 and 1"):
        draw_requests(3, 0, 1)


@pytest.mark.parametrize("output_len, slots", [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8)])
def test_a_power_of_two_is_its_own(output_len, slots):
    assert reserve_power_of_two(Request(7, output_len)) == 7 + slots


def engine_steps(requests, num_blocks, block_size, *, arrivals, seed=0, **settings):
    """What `predict_steps` predicts, taken by a real engine with prompts at random."""
    model = random_model(dtype=torch.float64)
    cache = PagedKVCache(model.config, num_blocks, block_size, dtype=torch.float64)
    engine, steps = Engine(model, cache, **settings), []
    generator = torch.Generator().manual_seed(seed)
    coming = list(enumerate(requests))
    while coming or engine.requests:
        while coming and arrivals[coming[0][0]] <= len(steps):
            request_id, request = coming.pop(0)
            prompt = torch.randint(256, (request.prompt_len,), generator=generator)
            engine.add(prompt, request.output_len, temperature=0, request_id=request_id)
        steps.append(engine.step())
        engine.check_integrity()
    return steps


def in_numbers(steps):
    """Steps without what only a model and a clock can say."""
    return [
        dataclasses.replace(step, next_ids=dict.fromkeys(step.next_ids, 0), seconds={})
        for step in steps
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_engine_takes_the_steps_that_were_predicted(seed):
    draw = random.Random(seed)
    requests = [
        Request(draw.randint(1, 30), draw.randint(1, 12))
        for _ in range(draw.randint(1, 12))
    ]
    block_size = draw.choice([1, 3, 4, 16])
    longest = max(request.num_tokens - 1 for request in requests)
    num_blocks = -(-longest // block_size) + draw.choice([0, 1, 3, 60])
    settings = {
        "token_budget": draw.choice([1, 2, 5, 16, 256]),
        "watermark": draw.choice([0.0, 0.1, 0.5]),
        "arrivals": sorted(draw.choice([0, 3, 40]) for _ in requests),
    }
    args = requests, num_blocks, block_size
    predicted = predict_steps(*args, **settings)
    taken = in_numbers(engine_steps(*args, seed=seed, **settings))
    for i, (step, expected) in enumerate(zip(predicted, taken, strict=True)):
        assert step == expected, f"step {i}: expected {expected}, got {step}"


def test_requests_sent_back_and_steps_of_nobody_are_predicted_too():
    args, arrivals = ([Request(4, 5), Request(4, 5), Request(2, 1)], 4, 3), [0, 0, 20]
    steps = predict_steps(*args, arrivals=arrivals)
    assert [step.preempted for step in steps if step.preempted] == [[1]]
    assert sum(not step.counts for step in steps) > 3
    assert len(steps) == 21 and steps[-1].finished == {2: "length"}
    assert steps == in_numbers(engine_steps(*args, arrivals=arrivals))


def test_blocks_of_a_watermark_are_whole_ones_in_the_prediction_too():
    args, settings = ([Request(8, 3), Request(10, 3)], 10, 2), {"watermark": 0.19}
    steps = predict_steps(*args, **settings)
    assert steps[0].counts == {0: 8, 1: 10}, "four blocks, five, and one stays free"
    assert 1 not in predict_steps(*args, watermark=0.2)[0].counts
    assert steps == in_numbers(engine_steps(*args, arrivals=[0, 0], **settings))


def test_static_batches_and_continuous_ones_of_four_as_the_engine_takes_them():
    lens = [3, 9, 2, 1, 7, 7, 1, 2, 12, 1, 1, 1, 4, 2, 3, 6]
    requests, starts = [Request(5, output_len) for output_len in lens], []
    for i in range(0, 16, 4):
        starts += [static_steps(lens[:i], 4)] * 4
    static, continuous = (
        engine_steps(requests, 4, 16, arrivals=arrivals)
        for arrivals in (starts, [0] * 16)
    )
    assert len(static) == static_steps(lens, 4) == 9 + 7 + 12 + 6
    # Each block is as wide as a request may grow: four of them are four places.
    assert len(continuous) == len(predict_steps(requests, 4, 16)) == 18
    assert static_steps(lens, 16) == max(lens) and static_steps(lens, 1) == sum(lens)
    assert static_steps([], 4) == 0


def step_sizes(steps: list[Step]) -> list[tuple[int, int]]:
    """Of each step, the tokens that it computes, and those that the same requests have in
    the cache before it."""
    sizes, cached = [], Counter()
    for step in steps:
        for request_id in step.preempted:
            del cached[request_id]
        num_cached = sum(cached[request_id] for request_id in step.counts)
        sizes.append((sum(step.counts.values()), num_cached))
        cached.update(step.counts)
        for request_id in step.finished:
            del cached[request_id]
    return sizes


def test_the_sizes_of_steps_are_those_that_the_cache_sees(monkeypatch):
    seen, extend = [], PagedKVCache.extend

    def watched(cache, query_lens):
        num_cached = cache.seq_lens[query_lens > 0].sum()
        seen.append((int(query_lens.sum()), int(num_cached)))
        return extend(cache, query_lens)

    monkeypatch.setattr(PagedKVCache, "extend", watched)
    requests = [Request(5, 6), Request(9, 9), Request(7, 8), Request(12, 3)]
    steps = engine_steps(requests, 5, 4, arrivals=[0, 0, 2, 30], token_budget=6)
    assert any(step.preempted for step in steps)
    assert [size for size in step_sizes(steps) if size != (0, 0)] == seen
    again = "an id is free again when its request has ended"
    assert step_sizes([*steps, *steps]) == 2 * step_sizes(steps), again


def test_requests_come_at_the_rate_that_was_asked_for():
    arrivals = draw_arrivals(20000, 4.0)
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] / 20000 == pytest.approx(1 / 4, rel=0.03)
    gaps = [b - a for a, b in zip(arrivals, arrivals[1:])]
    assert sum(gap > 0.25 for gap in gaps) / len(gaps) == pytest.approx(1 / math.e, 0.05)
    assert draw_arrivals(9, 8.0) == pytest.approx([t / 2 for t in draw_arrivals(9, 4.0)])
    assert draw_arrivals(9, 4.0, seed=1) != draw_arrivals(9, 4.0)
    for rate in (0, -1, math.nan):
        with pytest.raises(ValueError, match=f"expected above 0, got {rate}"):
            draw_arrivals(3, rate)


def test_seconds_of_requests_that_are_served_are_counted_by_hand():
    # A step takes a second, and a tenth for each token that it computes.
    seconds = StepSeconds(1.0, 0.1, 0.0)
    requests, arrivals = [Request(4, 2), Request(3, 2), Request(9, 1)], [5.0, 5.1, 50.0]
    served = serve(Paging(64, 4), requests, arrivals, seconds)
    # 0 begins at once, with 4 tokens. 1 comes meanwhile, and its 3 beside a decode. Then
    # 1 decodes alone.
    times = [(5, 6.4, 7.8), (5.1, 7.8, 8.9), (50, 51.9, 51.9)]
    for request, one, (arrived, first, last) in zip(requests, served, times):
        assert one.request == request
        assert (one.arrived, one.first, one.last) == pytest.approx((arrived, first, last))
    assert served[0].normalized == pytest.approx((7.8 - 5) / 2)
    times = [served[0].first, served[0].last]
    assert served[0].normalized == latencies(5.0, times)["normalized"]


def test_steps_of_a_server_are_those_of_the_engine_whose_prompts_enter_at_once():
    requests, seen = draw_requests(60, *ALPACA), []

    def step_seconds(num_new_tokens, num_cached_tokens):
        seen.append((num_new_tokens, num_cached_tokens))
        return 1.0

    served = serve(Paging(4096, 16), requests, [0.0] * 60, step_seconds)
    predicted = predict_steps(requests, 256, 16, token_budget=10**6)
    assert seen == step_sizes(predicted) and max(predicted[0].counts.values()) > 50
    ends = {i: t for t, step in enumerate(predicted, 1) for i in step.finished}
    assert [one.last for one in served] == [ends[i] for i in range(60)]


def test_a_server_that_sends_requests_back_computes_them_again():
    seen = []

    def step_seconds(*sizes):
        seen.append(sizes)
        return 1.0

    # Four blocks of three. Both need a third block in the same step: 1 goes, with the
    # three tokens that it has drawn, and begins when 0 is done.
    # 2 waits for all of that.
    requests = [Request(4, 5), Request(4, 5), Request(4, 1)]
    served = serve(Paging(12, 3), requests, [0, 0, 0], step_seconds)
    assert seen == [(8, 0), (2, 8), (2, 10), (1, 6), (1, 7), (7, 0), (1, 7), (4, 0)]
    assert [one.last for one in served] == [5, 7, 8]
    assert [one.first for one in served] == [1, 1, 8], "the first token came before"


def test_the_better_a_manager_fits_the_more_requests_per_second_it_takes():
    requests = draw_requests(150, *SHAREGPT)
    arrivals = draw_arrivals(150, 3.0)
    waits = []
    for manager in (
        Reserving(POOL, reserve_maximum),
        Reserving(POOL, reserve_power_of_two),
        Reserving(POOL, reserve_oracle),
        Paging(POOL, 16, watermark=0.01),
    ):
        served = serve(manager, requests, arrivals, StepSeconds(0.017, 8e-5, 5e-7))
        waits.append(sum(one.normalized for one in served) / len(served))
        assert all(one.arrived < one.first <= one.last for one in served)
    assert waits == sorted(waits, reverse=True) and waits[0] > 5 * waits[-1]


def test_requests_that_cannot_be_predicted_or_served_are_refused():
    with pytest.raises(ValueError, match="at most 8 tokens, .* got one of 9 . the last"):
        predict_steps([Request(5, 5)], 2, 4)
    assert predict_steps([Request(5, 4)], 2, 4)[-1].finished == {0: "length"}
    with pytest.raises(ValueError, match="arrivals: expected 2 steps in order"):
        predict_steps([Request(1, 1)] * 2, 2, 4, arrivals=[1, 0])
    with pytest.raises(ValueError, match="token_budget"):
        predict_steps([Request(1, 1)], 2, 4, token_budget=0)
    with pytest.raises(ValueError, match="batch_size"):
        static_steps([1], 0)
    seconds = StepSeconds(1, 0, 0)
    with pytest.raises(ValueError, match="at most 8 tokens.*got one of 10"):
        serve(Paging(8, 4), [Request(5, 5)], [0], seconds)
    with pytest.raises(ValueError, match="arrivals: expected 1 times in order"):
        serve(Paging(8, 4), [Request(5, 1)], [], seconds)
    with pytest.raises(ValueError, match="expected room for .* in an empty pool"):
        serve(Reserving(64, reserve_maximum), [Request(5, 1)], [0], seconds)
    assert serve(Paging(8, 4), [], [], seconds) == []
    assert predict_steps([], 2, 4) == []


def test_the_steps_that_chapter_6_tells_are_those_of_its_requests():
    requests = draw_requests(16, 40, 40, seed=4)
    output_lens = [request.output_len for request in requests]
    assert static_steps(output_lens, 4) == 268 and max(output_lens) == 111
    assert len(predict_steps(requests, 4, 512, token_budget=512)) == 168
    steps = predict_steps(requests, 28, 16, token_budget=64)
    assert len(steps) == 111
    assert [i for step in steps for i in step.preempted] == [11, 10, 11]
    begins = {}
    for number, step in enumerate(steps):
        for request_id in step.counts:
            begins.setdefault(request_id, number)
    last = max(i for i, step in enumerate(steps) if step.preempted)
    assert {i for i, number in begins.items() if number > last} == {12, 13, 14, 15}
