import copy
import math

import numpy as np
import pytest
import torch
from helpers import assert_close, begun, filled, random_model

from lib import paged_kv_cache
from lib.block_manager import BlockManager, OutOfBlocksError
from lib.config import TINY
from lib.generate import forward_cached, generate_cached, generate_recompute
from lib.kv_cache import (
    ContiguousKVCache,
    attend_cached,
    decode_mask,
    kv_cache_bytes,
)
from lib.measure.meter import measure
from lib.model import attend_fused
from lib.paged_kv_cache import (
    PagedKVCache,
    attend_decode_paged,
    attend_paged,
    gather_kv,
    paged_utilization,
    slot_mapping,
    write_kv,
)

BLOCK_SIZES = [1, 2, 3, 7, 8, 16, 32, 100, 256]


def poisoned_cache(model, batch_size, num_blocks, block_size):
    """Whoever reads what was not written gets NaN."""
    cache = PagedKVCache(model.config, num_blocks, block_size, dtype=torch.float64)
    begun(cache, batch_size)
    cache.k_cache.fill_(torch.nan)
    cache.v_cache.fill_(torch.nan)
    return cache


def poison_free_blocks(cache):
    for tensor in (cache.k_cache, cache.v_cache):
        tensor[:, cache.manager.free_block_ids] = torch.nan


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_greedy_texts_equal_recompute_at_every_block_size(block_size):
    model = random_model(block_size, dtype=torch.float64)
    lens = (block_size % 50 + 1, 1, 16, 33)
    prompts = [torch.randint(256, (n,)) for n in lens]
    num_blocks = sum(math.ceil((n + 19) / block_size) for n in lens)
    cache = poisoned_cache(model, 4, num_blocks, block_size)
    got = generate_cached(model, prompts, 20, cache, temperature=0)
    for prompt_ids, text in zip(prompts, got):
        expected = generate_recompute(model, prompt_ids, 20, temperature=0)
        assert torch.equal(text, expected)
    cache.manager.check_integrity()
    assert cache.manager.free_block_ids == [], "exactly as many blocks as were needed"


@pytest.mark.parametrize("prompt_len", [15, 16, 17, 32])
def test_prompts_that_end_at_a_blocks_edge(prompt_len):
    model = random_model(prompt_len, dtype=torch.float64)
    prompt_ids = torch.randint(256, (prompt_len,))
    cache = poisoned_cache(model, 1, 4, 16)
    (got,) = generate_cached(model, [prompt_ids], 17, cache, temperature=0)
    expected = generate_recompute(model, prompt_ids, 17, temperature=0)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("num_heads, num_kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_attention_over_the_pool_is_that_over_rows(num_heads, num_kv_heads):
    model = random_model(
        dtype=torch.float64, num_heads=num_heads, num_kv_heads=num_kv_heads
    )
    contiguous = begun(ContiguousKVCache(model.config, 3, 40, dtype=torch.float64), 3)
    paged = poisoned_cache(model, 3, 30, 4)
    for lens in ([5, 0, 9], [1, 7, 3], [4, 1, 1]):
        ids, lens = torch.randint(256, (sum(lens),)), torch.tensor(lens)
        logits = [
            forward_cached(model, cache, ids, lens) for cache in (contiguous, paged)
        ]
        assert_close(*logits)


def shared_prompt(model, prompt_ids, num_samples, num_blocks=40, block_size=4):
    """A cache in which all requests share the blocks of one prompt but its last token."""
    cache = poisoned_cache(model, 1, num_blocks, block_size)
    num_cached = len(prompt_ids) - 1
    if num_cached:
        forward_cached(model, cache, prompt_ids[:-1], torch.tensor([num_cached]))
    for child_id in range(1, num_samples):
        cache.fork(0, child_id)
    return cache


@pytest.mark.parametrize("prompt_len", [1, 4, 5, 6, 9])
def test_samples_of_one_prompt_share_it_and_write_what_each_would_alone(prompt_len):
    model = random_model(prompt_len, dtype=torch.float64)
    prompt_ids = torch.randint(256, (prompt_len,))
    cache = shared_prompt(model, prompt_ids, num_samples=3)
    firsts = [prompt_ids[-1:], torch.tensor([7]), torch.tensor([201])]
    got = generate_cached(model, firsts, 9, cache, temperature=0)
    for first, text in zip(firsts, got):
        alone = torch.cat([prompt_ids[:-1], first])
        expected = generate_recompute(model, alone, 9, temperature=0)
        assert torch.equal(text, expected[prompt_len - 1 :])
    cache.manager.check_integrity()


def test_a_shared_prompt_takes_its_blocks_once():
    model = random_model(dtype=torch.float64)
    cache = shared_prompt(model, torch.randint(256, (18,)), num_samples=5)
    assert cache.reserved_bytes == kv_cache_bytes(model.config, 20, 8)  # 17 in 5 blocks
    assert cache.used_bytes == kv_cache_bytes(model.config, 17, 8)
    generate_cached(model, [torch.tensor([1])] * 5, 1, cache)
    # Each has a copy of the last block, and the other four are shared.
    assert cache.manager.ref_count.count(5) == 4
    assert cache.reserved_bytes == kv_cache_bytes(model.config, 4 * (4 + 5), 8)
    assert cache.used_bytes == kv_cache_bytes(model.config, 16 + 5 * 2, 8)


def test_blocks_that_were_freed_never_show_the_keys_of_who_had_them():
    model = random_model(dtype=torch.float64)
    cache = poisoned_cache(model, 2, 8, 4)
    prompts = [torch.randint(256, (13,)), torch.randint(256, (9,))]
    texts = generate_cached(model, prompts, 4, cache, temperature=0)
    cache.free(0)
    cache.begin("newcomer")
    newcomer = torch.randint(256, (11,))
    ids = torch.cat([texts[1][-1:], newcomer])  # the second goes on beside the third
    logits = forward_cached(model, cache, ids, torch.tensor([1, 11]))
    assert_close(logits[1:], model(newcomer, torch.arange(11), attend_fused))
    assert_close(logits[:1], model(texts[1], torch.arange(13), attend_fused)[-1:])


def test_a_parent_that_ends_leaves_its_children_their_blocks():
    model = random_model(dtype=torch.float64)
    prompt_ids = torch.randint(256, (10,))
    cache = shared_prompt(model, prompt_ids, num_samples=2, num_blocks=12)
    cache.free(0)
    poison_free_blocks(cache)
    (got,) = generate_cached(model, [prompt_ids[-1:]], 12, cache, temperature=0)
    expected = generate_recompute(model, prompt_ids, 12, temperature=0)
    assert torch.equal(got, expected[9:])


def state(cache):
    manager = cache.manager
    tables = {r: list(t) for r, t in manager.block_tables.items()}
    counts = list(manager.ref_count), list(manager.free_block_ids)
    return tables, dict(manager.seq_lens), counts


def test_too_small_a_pool_is_refused_before_the_first_token():
    model = random_model()
    cache = begun(PagedKVCache(model.config, num_blocks=5, block_size=4), 2)
    before, keys = state(cache), cache.k_cache.clone()
    prompts = [torch.zeros(n, dtype=torch.int64) for n in (6, 3)]
    with pytest.raises(OutOfBlocksError, match="at most 5 blocks.*got 7") as caught:
        generate_cached(model, prompts, 8, cache)  # 13 and 10 tokens: 4 + 3 blocks
    assert (caught.value.needed, caught.value.free) == (7, 5)
    assert state(cache) == before and torch.equal(cache.k_cache, keys)


def test_a_step_for_which_one_block_is_missing_changes_nothing():
    model = random_model()
    cache = begun(PagedKVCache(model.config, num_blocks=4, block_size=2), 3)
    ids, lens = torch.zeros(6, dtype=torch.int64), torch.tensor([2, 2, 2])
    forward_cached(model, cache, ids, lens)
    before, keys = state(cache), cache.k_cache.clone()
    with pytest.raises(OutOfBlocksError):  # the first two could be served
        forward_cached(model, cache, ids[:3], torch.tensor([1, 1, 1]))
    assert state(cache) == before and torch.equal(cache.k_cache, keys)
    forward_cached(model, cache, ids[:1], torch.tensor([0, 0, 1]))


@pytest.mark.parametrize(
    "token_ids, query_lens, words",
    [
        ([1, 2], [1, 2], "the sum of query_lens"),
        ([1, 2], [2], r"expected int64 \(2,\)"),
        ([1, 256], [1, 1], "token_ids: expected values"),
    ],
)
def test_lengths_and_tokens_that_do_not_fit_the_batch_are_refused(
    token_ids, query_lens, words
):
    model = random_model()
    cache = begun(PagedKVCache(model.config, 4, 4), 2)
    before = state(cache)
    with pytest.raises(ValueError, match=words):
        forward_cached(model, cache, torch.tensor(token_ids), torch.tensor(query_lens))
    assert state(cache) == before


@pytest.mark.parametrize("num_blocks, block_size", [(4, 0), (0, 4), (4, -1)])
def test_a_pool_of_nothing_is_refused(num_blocks, block_size):
    with pytest.raises(ValueError, match="expected an integer of at least 1"):
        PagedKVCache(TINY, num_blocks, block_size)


def test_tables_are_padded_with_ids_that_do_not_exist():
    cache = PagedKVCache(TINY, num_blocks=9)
    assert cache.block_tables.shape == (0, 0) and cache.manager.block_size == 16
    filled(cache, {"a": 40, "b": 3})
    assert cache.block_tables.tolist() == [[0, 1, 2], [3, -1, -1]]


def test_a_pool_that_is_not_in_one_piece_is_refused():
    pool = torch.zeros(4, 2, 3, 5).transpose(0, 1)
    with pytest.raises(RuntimeError, match="view"):
        write_kv(pool, pool, torch.ones(1, 3, 5), torch.ones(1, 3, 5), torch.tensor([2]))


def test_room_is_asked_for_with_one_count_a_request():
    cache = begun(PagedKVCache(TINY, 4), 2)
    with pytest.raises(ValueError, match="one entry per request"):
        cache.check_room(torch.tensor([1]))


def test_the_pool_takes_the_bytes_that_were_predicted():
    cost = measure(lambda: PagedKVCache(TINY, 5, 8))
    assert cost.peak_bytes == kv_cache_bytes(TINY, 40)
    assert cost.value.reserved_bytes == cost.value.used_bytes == 0


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_utilization_is_that_of_the_live_manager(block_size):
    cache = PagedKVCache(TINY, 400, block_size)
    filled(cache, {"a": 1, "b": block_size, "c": block_size + 1, "d": 37})
    share = cache.used_bytes / cache.reserved_bytes
    assert paged_utilization(cache.seq_lens, block_size) == pytest.approx(share)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_what_is_written_by_slots_is_gathered_in_order(block_size):
    S, G, D = 45, 2, 3
    num_blocks = math.ceil(S / block_size) + 2
    pool = torch.full((2, num_blocks, block_size, G, D), torch.nan)
    k, v = torch.randn(2, S, G, D)
    block_table = torch.randperm(num_blocks)[: math.ceil(S / block_size)]
    block_table = torch.cat([block_table, torch.tensor([2147480000])])
    seq_lens, query_lens = torch.tensor([S]), torch.tensor([S])
    slots = slot_mapping(block_table[None], seq_lens, query_lens, block_size)
    assert len(set(slots.tolist())) == S
    write_kv(*pool, k, v, slots)
    got = gather_kv(*pool, block_table, S)
    assert torch.equal(got[0], k) and torch.equal(got[1], v)


def test_one_request_is_gathered_at_a_time():
    config = TINY
    q = torch.randn(6, config.num_heads, config.head_dim)
    pool = torch.randn(2, 60, 16, config.num_kv_heads, config.head_dim)
    block_tables = torch.randperm(60).view(6, 10)
    lens = torch.full((6,), 160), torch.ones(6, dtype=torch.int64)
    cost = measure(lambda: attend_paged(q, *pool, block_tables, *lens))
    one_request = 2 * 160 * config.num_kv_heads * config.head_dim * 4
    assert one_request < cost.peak_bytes < 3 * one_request  # half of all six
    dense = [x[block_tables].flatten(1, 2) for x in pool]
    assert_close(cost.value, attend_cached(q, *dense, *lens))


def family(model):
    """Requests "a" of 3 tokens, its children "b" and "c", and "d" of 3; blocks of 2."""
    cache = PagedKVCache(model.config, 16, 2, dtype=torch.float64)
    cache.begin("a")
    cache.k_cache.fill_(torch.nan)
    cache.v_cache.fill_(torch.nan)
    forward_cached(model, cache, torch.tensor([5, 6, 7]), torch.tensor([3]))
    cache.fork("a", "b")
    cache.fork("a", "c")
    cache.begin("d")
    forward_cached(model, cache, torch.tensor([8, 9, 1]), torch.tensor([0, 0, 0, 3]))
    return cache


def decoded(model, cache):
    """The logits of a step by one token each, by request."""
    ids = torch.tensor([ord(request_id) for request_id in cache.request_ids])
    poison_free_blocks(cache)
    logits = forward_cached(model, cache, ids, torch.ones_like(ids))
    return dict(zip(cache.request_ids, logits))


def free_and_allocate(manager, request_id, num_tokens):
    manager.free(request_id)
    manager.allocate(request_id, num_tokens)


def free_and_fork(manager, parent_id, child_id):
    manager.free(child_id)
    manager.fork(parent_id, child_id)


FOUL = {  # calls of the manager that change a request of the cache, and which
    "append in a block": ("d", lambda m: m.append("d")),
    "append with a copy": ("a", lambda m: m.append("a")),
    "append blocks": ("d", lambda m: m.append("d", 5)),
    "free": ("a", lambda m: m.free("a")),
    "free the last": ("d", lambda m: m.free("d")),
    "free and allocate": ("d", lambda m: free_and_allocate(m, "d", 3)),
    "free and allocate less": ("a", lambda m: free_and_allocate(m, "a", 1)),
    "free and fork": ("b", lambda m: free_and_fork(m, "a", "b")),
    "free and fork from another": ("b", lambda m: free_and_fork(m, "d", "b")),
    "copy on write": ("b", lambda m: m.copy_on_write("b")),
}
FAIR = {  # that change none
    "allocate": lambda m: m.allocate("x", 5),
    "fork": lambda m: m.fork("a", "x"),
    "fork and copy": lambda m: (m.fork("a", "x"), m.append("x")),
    "fork the only user": lambda m: m.fork("d", "x"),
    "append nothing": lambda m: m.append("a", 0),
    "copy what is not shared": lambda m: m.copy_on_write("d"),
    "allocate and free": lambda m: (m.allocate("x", 7), m.free("x")),
    "fork and free": lambda m: (m.fork("a", "x"), m.free("x")),
}


@pytest.mark.parametrize("changed, call", FOUL.values(), ids=FOUL)
def test_a_step_refuses_requests_that_the_manager_has_changed(changed, call):
    model = random_model(dtype=torch.float64)
    cache = family(model)
    expected = decoded(model, copy.deepcopy(cache))
    call(cache.manager)
    poison_free_blocks(cache)
    before, keys, zeros = state(cache), cache.k_cache.clone(), torch.zeros(4).long()
    lens, tables = cache.seq_lens.tolist(), cache.block_tables.tolist()
    for refused in (
        lambda: forward_cached(
            model, cache, torch.tensor([1]), torch.tensor([0, 1, 0, 0])
        ),
        lambda: forward_cached(model, cache, torch.arange(4), torch.ones(4).long()),
        lambda: cache.extend(zeros).__enter__(),
        lambda: cache.check_room(zeros),
        lambda: cache.fork("d", "e"),
    ):
        with pytest.raises(RuntimeError, match="begin, fork and free requests by the"):
            refused()
    assert state(cache) == before and cache.request_ids == ["a", "b", "c", "d"]
    assert torch.equal(cache.k_cache.nan_to_num(7.5), keys.nan_to_num(7.5))
    assert (cache.seq_lens.tolist(), cache.block_tables.tolist()) == (lens, tables)

    cache.free(changed)  # the others go on
    cache.manager.check_integrity()
    got = decoded(model, cache)
    assert list(got) == cache.request_ids == [r for r in "abcd" if r != changed]
    for request_id, logits in got.items():
        assert_close(logits, expected[request_id])


@pytest.mark.parametrize("call", FAIR.values(), ids=FAIR)
def test_what_the_manager_does_for_others_changes_nothing(call):
    model = random_model(dtype=torch.float64)
    cache = family(model)
    expected = decoded(model, copy.deepcopy(cache))
    call(cache.manager)
    others = cache.manager.block_tables.get("x", [])
    got = decoded(model, cache)
    for request_id in "abcd":
        assert torch.equal(got[request_id], expected[request_id])
    assert cache.manager.block_tables.get("x", []) == others
    cache.manager.check_integrity()


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("name", [name for name in FOUL if name != "copy on write"])
def test_what_the_manager_changes_inside_of_a_step_is_found_by_the_next(name, is_whole):
    model = random_model(dtype=torch.float64)
    cache = family(model)
    ones = torch.ones(4, dtype=torch.int64)
    try:
        with cache.extend(ones) as attend:
            FOUL[name][1](cache.manager)
            if is_whole:
                model(torch.arange(4), cache.seq_lens, attend)
    except (RuntimeError, KeyError, IndexError):
        pass
    if name.startswith("append") and not is_whole:  # that is taken back with the step
        cache.manager.check_integrity()
        assert_close(decoded(model, cache)["d"], decoded(model, family(model))["d"])
        return
    with pytest.raises(RuntimeError, match="by the cache's own methods|make a new cache"):
        decoded(model, cache)


@pytest.mark.parametrize("error", [OutOfBlocksError(1, 0), KeyboardInterrupt()])
@pytest.mark.parametrize("is_before", [True, False])
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [3, 2, 1, 4], [1, 0, 2, 5]])
def test_an_error_in_the_middle_of_a_steps_appends_leaves_none_of_them(
    counts, number, is_before, error
):
    model = random_model(dtype=torch.float64)
    cache = family(model)
    ids, query_lens = torch.arange(sum(counts)), torch.tensor(counts)
    expected = forward_cached(model, copy.deepcopy(cache), ids, query_lens)
    before, tables = state(cache), cache.block_tables.tolist()
    calls, append = [], cache.manager.append

    def failing(*args):
        calls.append(args)
        if is_before and len(calls) == number + 1:
            raise error
        copied = append(*args)
        if len(calls) == number + 1:
            raise error
        return copied

    if number >= sum(n > 0 for n in counts):
        return
    cache.manager.append = failing
    with pytest.raises(type(error)):
        forward_cached(model, cache, ids, query_lens)
    cache.manager.append = append
    assert state(cache) == before and cache.block_tables.tolist() == tables
    poison_free_blocks(cache)
    assert torch.equal(forward_cached(model, cache, ids, query_lens), expected)


@pytest.mark.parametrize("slots", [[0, -1], [3, 8], [10**6], [-8, 0]])
def test_slots_that_do_not_exist_are_refused_before_anything_is_written(slots):
    pool = torch.zeros(2, 4, 2, 1, 3)
    kv = torch.ones(len(slots), 1, 3)
    with pytest.raises(IndexError, match="slots: expected 0 to 7, got"):
        write_kv(*pool, kv, kv, torch.tensor(slots))
    assert not pool.any()
    write_kv(*pool, kv, kv, torch.arange(8)[-len(slots) :])
    write_kv(*pool, kv[:0], kv[:0], torch.zeros(0, dtype=torch.int64))
    assert pool.count_nonzero() == 2 * len(slots) * 3


def test_the_manager_takes_what_counts_tokens_and_nothing_else():
    manager = BlockManager(8, 4)
    manager.allocate("a", np.int64(3))
    manager.append("a", np.int64(2))
    assert manager.seq_lens == {"a": 5} and manager.block_tables == {"a": [0, 1]}
    before = copy.deepcopy(vars(manager))
    for count in (True, np.True_, 1.0, -1, np.int64(-1), "1", None, torch.tensor(1)):
        with pytest.raises(
            ValueError, match="num_tokens: expected an integer of at least"
        ):
            manager.allocate("b", count)
        with pytest.raises(
            ValueError, match="num_tokens: expected an integer of at least"
        ):
            manager.append("a", count)
    for call in (manager.append, manager.allocate):
        with pytest.raises(OutOfBlocksError, match="at most 6 blocks") as caught:
            call("a" if call == manager.append else "b", 10**400)
        assert caught.value.needed > 10**399
    with pytest.raises(OutOfBlocksError, match="at most 6 blocks"):
        manager.append("a", np.int64(2**63 - 1))
    assert vars(manager) == before


def test_a_request_that_rests_is_not_gathered(monkeypatch):
    model, gathered = random_model(dtype=torch.float64), []
    cache = family(model)

    def counted(k_cache, v_cache, block_table, seq_len):
        gathered.append(seq_len)
        return gather_kv(k_cache, v_cache, block_table, seq_len)

    monkeypatch.setattr("lib.paged_kv_cache.gather_kv", counted)
    forward_cached(model, cache, torch.tensor([1, 2, 3]), torch.tensor([0, 2, 0, 1]))
    assert gathered == [5, 4] * model.config.num_layers


def test_a_step_is_taken_back_where_append_makes_new_lists(monkeypatch):
    append = BlockManager.append

    def with_a_new_list(self, request_id, num_tokens=1):
        self.block_tables[request_id] = list(self.block_tables[request_id])
        return append(self, request_id, num_tokens)

    monkeypatch.setattr(BlockManager, "append", with_a_new_list)
    cache = filled(PagedKVCache(TINY, 9, 4), {"a": 6})
    cache.fork("a", "b")
    before = state(cache)
    with pytest.raises(KeyboardInterrupt), cache.extend(torch.tensor([1, 5])):
        raise KeyboardInterrupt
    assert state(cache) == before
    cache.begin("c")
    cache.check_room(torch.tensor([1, 1, 1]))
    cache.manager.check_integrity()


def test_a_decode_step_makes_as_many_bytes_after_many_tokens_as_after_few():
    peaks = []
    for seq_len in (64, 1024):
        lens = dict.fromkeys(range(8), seq_len)
        cache = filled(PagedKVCache(TINY, 8 * (seq_len // 4 + 1), 4), lens)

        with cache.extend(torch.ones(8).long()) as attend:  # the tables grow here
            q, k = torch.zeros(8, 4, 8), torch.zeros(8, 2, 8)
            for layer in range(2):
                attend(layer, q, k, k)
        step = cache.extend(torch.ones(8).long())
        peaks.append(measure(step.__enter__).peak_bytes)
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("gather_bytes", [1, 3000, 2**21])
def test_the_fused_decode_gathers_some_requests_at_a_time(monkeypatch, gather_bytes):
    monkeypatch.setattr(paged_kv_cache, "GATHER_BYTES", gather_bytes)
    model = random_model(dtype=torch.float64)
    prompts = [torch.randint(256, (n,)) for n in (1, 9, 4, 17, 8)]
    texts = []
    for fused_decode in (False, True):
        cache = PagedKVCache(
            model.config, 40, 4, dtype=torch.float64, fused_decode=fused_decode
        )
        cache.k_cache.fill_(torch.nan)
        cache.v_cache.fill_(torch.nan)
        begun(cache, 5)
        texts.append(generate_cached(model, prompts, 12, cache, temperature=0))
    assert all(torch.equal(one, other) for one, other in zip(*texts))


def test_the_fused_decode_holds_no_more_than_it_may(monkeypatch):
    pool = torch.randn(2, 60, 16, TINY.num_kv_heads, TINY.head_dim)
    q, tables = (
        torch.randn(6, TINY.num_heads, TINY.head_dim),
        torch.arange(60).view(6, 10),
    )
    mask = decode_mask(torch.full((6,), 150), 160)
    one_request = 2 * 160 * TINY.num_kv_heads * TINY.head_dim * 4
    peaks = []
    for at_once in (1, 2, 6):
        monkeypatch.setattr(paged_kv_cache, "GATHER_BYTES", at_once * one_request)
        run = lambda: attend_decode_paged(q, *pool, tables, mask)  # noqa: E731
        peaks.append(measure(run).peak_bytes / one_request)
    assert peaks == pytest.approx([1, 2, 6], rel=0.2)
