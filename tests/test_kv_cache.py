import contextlib
import copy
import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
from helpers import Interrupt, assert_close, begun, filled, random_model

from lib import block_manager, kv_cache, paged_kv_cache, prefix_cache
from lib.block_manager import OutOfBlocksError
from lib.config import LLAMA3_8B, TINY
from lib.generate import (
    forward_cached,
    generate_cached,
    generate_recompute,
    prefill_in_chunks,
)
from lib.kv_cache import (
    CacheFullError,
    ContiguousKVCache,
    attend_cached,
    attend_decode,
    decode_mask,
    kv_cache_bytes,
    kv_utilization,
    new_positions,
)
from lib.measure.meter import measure
from lib.model import Transformer, attend_fused
from lib.paged_kv_cache import PagedKVCache
from lib.prefix_cache import PrefixKVCache


def poisoned_cache(model, batch_size, max_seq_len):
    """Whoever reads what was not written gets NaN."""
    cache = ContiguousKVCache(model.config, batch_size, max_seq_len, dtype=torch.float64)
    begun(cache, batch_size)
    cache.k_cache.fill_(torch.nan)
    cache.v_cache.fill_(torch.nan)
    return cache


@pytest.mark.parametrize("prompt_len", range(1, 20))
def test_greedy_text_equals_recompute_at_every_length(prompt_len):
    model = random_model(prompt_len, dtype=torch.float64)
    prompt_ids = torch.randint(256, (prompt_len,))
    expected = generate_recompute(model, prompt_ids, 20, temperature=0)
    cache = poisoned_cache(model, 1, prompt_len + 19)
    (got,) = generate_cached(model, [prompt_ids], 20, cache, temperature=0)
    assert torch.equal(got, expected)
    assert cache.seq_lens.tolist() == [prompt_len + 19]


@pytest.mark.parametrize("num_heads, num_kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_a_ragged_batch_writes_what_each_request_would_alone(num_heads, num_kv_heads):
    model = random_model(
        dtype=torch.float64, num_heads=num_heads, num_kv_heads=num_kv_heads
    )
    prompts = [torch.randint(256, (n,)) for n in (5, 1, 33, 16)]
    got = generate_cached(model, prompts, 12, poisoned_cache(model, 4, 44), temperature=0)
    for prompt_ids, text in zip(prompts, got):
        expected = generate_recompute(model, prompt_ids, 12, temperature=0)
        assert torch.equal(text, expected)


def test_the_same_dice_write_the_same_text():
    model = random_model(dtype=torch.float64)
    prompt_ids = torch.tensor([3, 1, 4])
    settings = {"temperature": 1.3, "top_k": 50, "top_p": 0.9}
    texts = [
        generate_recompute(
            model, prompt_ids, 30, generator=torch.Generator().manual_seed(5), **settings
        ),
        generate_cached(
            model,
            [prompt_ids],
            30,
            poisoned_cache(model, 1, 33),
            generator=torch.Generator().manual_seed(5),
            **settings,
        )[0],
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize("pieces", [[1] * 12, [12], [5, 1, 6], [3, 0, 4, 5]])
def test_logits_do_not_depend_on_how_the_tokens_are_handed_over(pieces):
    model = random_model(dtype=torch.float64)
    token_ids = torch.randint(256, (2, 12))
    expected = model(token_ids, torch.arange(12), attend_fused)
    cache = poisoned_cache(model, 3, 12)  # the request in the middle rests
    rows = []
    for ids in token_ids.split(pieces, dim=1):
        T = ids.shape[1]
        if T > 0:
            lens = torch.tensor([T, 0, T])
            rows.append(forward_cached(model, cache, ids.flatten(), lens).view(2, T, -1))
    assert_close(torch.cat(rows, dim=1), expected)
    assert cache.seq_lens.tolist() == [12, 0, 12]


def test_requests_of_one_step_may_bring_different_numbers_of_tokens():
    model = random_model(dtype=torch.float64)
    first, second = torch.randint(256, (9,)), torch.randint(256, (6,))
    cache = poisoned_cache(model, 2, 9)
    forward_cached(model, cache, first[:5], torch.tensor([5, 0]))
    ids = torch.cat([first[5:9], second])  # one goes on by four, the other begins
    logits = forward_cached(model, cache, ids, torch.tensor([4, 6]))
    assert_close(logits[:4], model(first, torch.arange(9), attend_fused)[5:])
    assert_close(logits[4:], model(second, torch.arange(6), attend_fused))


def test_a_decode_step_reads_keys_where_they_are():
    model = random_model(num_heads=8, num_kv_heads=2, d_model=64)
    cache = begun(ContiguousKVCache(model.config, 1, 128), 1)
    forward_cached(model, cache, torch.arange(127), torch.tensor([127]))
    q, lens = torch.randn(1, 8, 8), torch.tensor([128])
    layer_kv = cache.k_cache[0], cache.v_cache[0]
    cost = measure(lambda: attend_cached(q, *layer_kv, lens, torch.tensor([1])))
    scores_bytes = 8 * 128 * 4
    assert cost.peak_bytes < 5 * scores_bytes
    copied_for_each_head = 8 * 128 * 8 * 4
    assert cost.peak_bytes < copied_for_each_head, "the control: a copy would be seen"


def test_the_cache_takes_the_bytes_that_were_predicted():
    cost = measure(lambda: ContiguousKVCache(TINY, 3, 50))
    assert cost.value.reserved_bytes == kv_cache_bytes(TINY, 150)
    assert cost.peak_bytes == kv_cache_bytes(TINY, 150) + cost.value.seq_lens.nbytes
    for dtype, bytes_per_number in ((torch.float32, 4), (torch.float64, 8)):
        cache = begun(ContiguousKVCache(TINY, 3, 50, dtype=dtype), 3)
        model = Transformer(TINY).to(dtype).eval()
        lens = torch.tensor([50, 1, 9])
        forward_cached(model, cache, torch.zeros(60, dtype=torch.int64), lens)
        assert cache.used_bytes == kv_cache_bytes(TINY, 60, bytes_per_number)
        assert cache.reserved_bytes == kv_cache_bytes(TINY, 150, bytes_per_number)
        assert kv_utilization(cache.seq_lens, 50) == 60 / 150


def test_a_token_of_llama_3_8b_takes_128_kib():
    assert kv_cache_bytes(LLAMA3_8B, 1, bytes_per_number=2) == 128 * 1024


def test_a_row_that_was_freed_never_shows_the_keys_of_who_had_it():
    model = random_model(dtype=torch.float64)
    cache = begun(ContiguousKVCache(model.config, 2, 30, dtype=torch.float64), 2)
    prompts = [torch.randint(256, (20,)), torch.randint(256, (20,))]
    generate_cached(model, prompts, 5, cache, temperature=0)
    cache.free(0)
    cache.begin("newcomer")
    assert cache.request_ids == ["newcomer", 1]
    newcomer = torch.randint(256, (4,))
    ids = torch.cat([newcomer, prompts[1][:1]])
    logits = forward_cached(model, cache, ids, torch.tensor([4, 1]))
    assert_close(logits[:4], model(newcomer, torch.arange(4), attend_fused))
    assert cache.seq_lens.tolist() == [4, 25]


def state(cache):
    return cache.k_cache.clone(), cache.v_cache.clone(), cache.seq_lens.clone()


@pytest.mark.parametrize(
    "prompt_lens, num_new_tokens, words",
    [
        ([3, 8], 4, "request 1: expected at most 10 tokens"),
        ([11, 1], 1, "request 0: expected at most 10 tokens"),
    ],
)
def test_more_than_was_reserved_is_refused_before_anything_is_written(
    prompt_lens, num_new_tokens, words
):
    model = random_model()
    cache = begun(ContiguousKVCache(model.config, 2, 10), 2)
    before = state(cache)
    prompts = [torch.zeros(n, dtype=torch.int64) for n in prompt_lens]
    with pytest.raises(CacheFullError, match=words):
        generate_cached(model, prompts, num_new_tokens, cache)
    assert all(torch.equal(a, b) for a, b in zip(state(cache), before))


def test_what_just_fits_is_written():
    model = random_model()
    cache = begun(ContiguousKVCache(model.config, 1, 10), 1)
    generate_cached(model, [torch.zeros(7, dtype=torch.int64)], 4, cache)
    assert cache.seq_lens.tolist() == [10]


@pytest.mark.parametrize(
    "token_ids, query_lens, words",
    [
        ([1, 2], [1, 2], "the sum of query_lens"),
        ([1, 2], [2], r"expected int64 \(2,\)"),
        ([1, 2], [3, -1], "expected at least 0"),
        ([1, 256], [1, 1], "token_ids: expected values"),
        ([], [0, 0], "token_ids: expected some"),
    ],
)
def test_lengths_and_tokens_that_do_not_fit_the_batch_are_refused(
    token_ids, query_lens, words
):
    model = random_model()
    cache = begun(ContiguousKVCache(model.config, 2, 10), 2)
    before = state(cache)
    token_ids = torch.tensor(token_ids, dtype=torch.int64)
    with pytest.raises(ValueError, match=words):
        forward_cached(model, cache, token_ids, torch.tensor(query_lens))
    assert all(torch.equal(a, b) for a, b in zip(state(cache), before))


def test_prompts_that_do_not_fit_the_batch_are_refused():
    model = random_model()
    cache = begun(ContiguousKVCache(model.config, 2, 130), 2)
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="prompts: expected 2"):
        generate_cached(model, [one], 1, cache)
    with pytest.raises(ValueError, match="at least one token"):
        generate_cached(model, [one, one[:0]], 1, cache)
    with pytest.raises(ValueError, match=r"expected each an int64 tensor \(T,\)"):
        generate_cached(model, [one, one[None]], 1, cache)
    with pytest.raises(ValueError, match="expected at most max_seq_len = 128"):
        generate_cached(model, [one, one], 128, cache)
    ids = torch.zeros(120, dtype=torch.int64)
    forward_cached(model, cache, ids, torch.tensor([0, 120]))
    with pytest.raises(ValueError, match="120 in the cache"):
        generate_cached(model, [one, one], 8, cache)
    with pytest.raises(ValueError, match="temperature"):
        generate_cached(model, [one, one], 1, cache, temperature=-1)
    assert cache.seq_lens.tolist() == [0, 120]
    with pytest.raises(ValueError, match="prompts: expected 0"):
        generate_cached(model, [], 1, PagedKVCache(model.config, 4))


def test_no_new_tokens_need_no_room():
    model = random_model()
    prompt_ids = torch.arange(20)
    cache = begun(ContiguousKVCache(model.config, 1, 10), 1)
    assert generate_cached(model, [prompt_ids], 0, cache)[0].equal(prompt_ids)


@pytest.mark.parametrize(
    "changes, dtype, words",
    [
        ({}, torch.float64, "in torch.float32 on cpu, as the model, .* in torch.float64"),
        ({"num_layers": 3}, torch.float32, "expected 3 layers.* got 2 layers"),
        ({"num_layers": 1}, torch.float32, "expected 1 layers.* got 2 layers"),
        ({"num_kv_heads": 1}, torch.float32, "expected 2 layers, 1 KV heads"),
        ({"num_heads": 8}, torch.float32, "KV heads of 4 numbers.*KV heads of 8"),
    ],
)
def test_the_cache_of_another_model_is_refused(changes, dtype, words):
    model = random_model(**changes)
    cache = begun(ContiguousKVCache(TINY, 1, 10, dtype=dtype), 1)
    before = state(cache)
    with pytest.raises(ValueError, match=words):
        generate_cached(model, [torch.tensor([1, 2])], 2, cache)
    assert all(torch.equal(a, b) for a, b in zip(state(cache), before))


def test_half_precision_does_not_overflow_in_the_scores():
    q, k = torch.full((1, 1, 128), 30.0).half(), torch.full((1, 2, 1, 128), 30.0).half()
    v = torch.tensor([1.0, 3.0]).half().view(1, 2, 1, 1).expand_as(k)
    out = attend_cached(q, k, v, torch.tensor([2]), torch.tensor([1]))
    assert torch.equal(out, torch.full_like(out, 2.0))


def test_keys_that_are_not_one_a_token_are_refused():
    cache, one = torch.zeros(2, 1, 9, 1, 2), torch.zeros(1, 1, 2)
    with pytest.raises(AssertionError, match="expected 4 keys, got 1"):
        kv_cache.append_kv(*cache, one, one, torch.tensor([4]), torch.tensor([4]))


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_a_cache_of_nothing_is_refused(sizes):
    with pytest.raises(ValueError, match="expected an integer of at least 1, got 0"):
        ContiguousKVCache(TINY, *sizes)


def test_positions_count_in_each_request():
    positions = new_positions(torch.tensor([4, 9, 7, 2]), torch.tensor([1, 3, 0, 2]))
    assert positions.tolist() == [3, 6, 7, 8, 0, 1]
    assert kv_cache.new_positions(torch.tensor([5]), torch.tensor([0])).tolist() == []


def mid_text(kind, model, fused_decode=False):
    """A cache in which requests of 3 and 1 tokens, or four with shared blocks, go on."""
    settings = {"dtype": torch.float64, "fused_decode": fused_decode}
    if kind == "contiguous":
        cache = begun(ContiguousKVCache(model.config, 2, 12, **settings), 2)
    else:
        cache = begun(PagedKVCache(model.config, 16, 2, **settings), 2)
    prompt_ids = torch.tensor([5, 6, 7, 8])
    forward_cached(model, cache, prompt_ids, torch.tensor([3, 1]))
    if kind == "shared":
        cache.fork(0, "child")
        cache.fork(0, "grandchild")
    return cache


def all_of(cache):
    """What a step may change, but for what lies behind the tokens."""
    facts = [list(cache.request_ids), cache.seq_lens.tolist()]
    facts += [cache.reserved_bytes, cache.used_bytes]
    if isinstance(cache, PagedKVCache):
        facts += [cache.block_tables.tolist(), copy.deepcopy(vars(cache.manager))]
    return facts


@functools.cache
def small_model():
    return random_model(dtype=torch.float64, num_layers=1, d_model=8, d_ff=8)


CACHES = kv_cache, paged_kv_cache, block_manager, prefix_cache
KINDS = ["contiguous", "paged", "shared"]
DECODE, PREFILL, RAGGED = [1, 1, 1, 1], [4, 5, 2, 3], [1, 0, 3, 1]


def step(model, cache, counts):
    query_lens = torch.tensor(counts[: len(cache.request_ids)])
    return forward_cached(model, cache, torch.arange(query_lens.sum()), query_lens)


@pytest.mark.parametrize(
    "kind, counts",
    [
        ("contiguous", DECODE),
        ("shared", PREFILL),
        *(
            pytest.param(kind, counts, marks=pytest.mark.nightly)
            for kind in KINDS
            for counts in (DECODE, RAGGED)
        ),
    ],
)
def test_an_interrupt_at_any_line_leaves_the_cache_as_it_was(kind, counts):
    model = random_model(dtype=torch.float64, num_layers=1, d_model=8, d_ff=8)
    start = mid_text(kind, model)
    expected = step(model, copy.deepcopy(start), counts)
    num_lines, is_through = 0, False
    while not is_through:
        cache, interrupt = copy.deepcopy(start), Interrupt(num_lines, CACHES)
        try:
            with interrupt:
                step(model, cache, counts)
            is_through = True
        except KeyboardInterrupt:
            assert all_of(cache) == all_of(start), interrupt.where
            assert_close(step(model, cache, counts), expected)
            num_lines += 1
    assert num_lines > 90


TEXT = [5, 6, 7, 8, 9, 1, 2]
COMING_AND_GOING = {
    "begin": lambda cache: cache.begin("new", TEXT),
    "free": lambda cache: cache.free(1),
    "free a parent": lambda cache: cache.free(0),
    "fork": lambda cache: cache.fork(0, "new", TEXT),
}
IN_BLOCKS = {"paged": PagedKVCache, "prefix": PrefixKVCache}
CALLS = [
    *((kind, name) for kind in IN_BLOCKS for name in COMING_AND_GOING),
    *(("contiguous", name) for name in ("begin", "free")),
]


def crowded(kind, model):
    """Requests 0 and 1, and a child of 0. Of TEXT a prefix cache has two blocks in use
    and an idle one; those of request 1 have no names yet."""
    if kind == "contiguous":
        cache = ContiguousKVCache(model.config, 3, 12, dtype=torch.float64)
    else:
        cache = IN_BLOCKS[kind](model.config, 16, 2, dtype=torch.float64)
    for request_id, token_ids in (("gone", TEXT[:6]), (0, TEXT[:5]), (1, [4, 3, 2, 1])):
        cache.begin(request_id, token_ids)
        row = cache.request_ids.index(request_id)
        query_lens = torch.zeros_like(cache.seq_lens)
        query_lens[row] = len(token_ids) - cache.seq_lens[row]
        new_ids = torch.tensor(token_ids[cache.seq_lens[row] :])
        forward_cached(model, cache, new_ids, query_lens)
        if request_id == "gone":
            cache.free(request_id)
    if cache.can_fork:
        cache.fork(0, "child", TEXT[:6])
    return cache


def asked(model, cache):
    """Logits after three more tokens of each request, by its id."""
    live = [request_id is not None for request_id in cache.request_ids]
    query_lens = 3 * torch.tensor(live).long()
    ids = torch.arange(3).repeat(sum(live))
    logits = forward_cached(model, cache, ids, query_lens).split(query_lens.tolist())
    return dict(zip(cache.request_ids, logits))


def check_sound(cache):
    if isinstance(cache, PagedKVCache):
        cache.manager.check_integrity()
        cache._check_manager()
        assert list(cache.manager.block_tables) == cache.request_ids
    if isinstance(cache, PrefixKVCache):
        cache.check_integrity()
        assert list(cache._texts) == cache.request_ids


def facts(cache):
    return [*all_of(cache)[:5], cache.num_free_blocks]


@functools.cache
def undisturbed(kind, name):
    """A cache before a call, facts of it before and after, and what is asked then."""
    cache = crowded(kind, small_model())
    start, before = copy.deepcopy(cache), facts(cache)
    COMING_AND_GOING[name](cache)
    return start, before, facts(cache), asked(small_model(), cache)


def stopped_rightly(kind, name, stop):
    """Whether `stop`, which makes a call fail on the way, let it through. The cache is
    as it was before or as it will be after, goes on, and leaks nothing."""
    call = COMING_AND_GOING[name]
    start, before, after, expected = undisturbed(kind, name)
    cache = copy.deepcopy(start)
    is_through = stop(cache, call)
    check_sound(cache)
    got = facts(cache)
    assert got in (before, after), f"expected {before} or {after}, got {got}"
    if got == before:
        call(cache)
        got = facts(cache)
        assert got == after, f"expected {after}, got {got}"
    for request_id, logits in asked(small_model(), cache).items():
        assert_close(logits, expected[request_id])
    check_sound(cache)
    for request_id in expected.keys() - {None}:
        cache.free(request_id)
    check_sound(cache)
    num_free = cache.num_free_blocks
    assert num_free == cache.num_blocks, f"expected {cache.num_blocks}, got {num_free}"
    assert cache.used_bytes == 0, f"expected none, got {cache.used_bytes}"
    return is_through


@pytest.mark.parametrize("kind, name", CALLS)
def test_an_interrupt_at_any_line_of_begin_fork_or_free_comes_before_or_after_it(
    kind, name
):
    for when in itertools.count():

        def stop(cache, call, when=when):
            with Interrupt(when, CACHES) as interrupt:
                try:
                    call(cache)
                except KeyboardInterrupt:
                    assert interrupt.where
            return interrupt.where is None

        if stopped_rightly(kind, name, stop):
            break
    assert when > 10


@pytest.mark.parametrize("is_before", [True, False])
@pytest.mark.parametrize(
    "kind, name", [(kind, name) for kind, name in CALLS if kind != "contiguous"]
)
def test_a_manager_that_fails_in_begin_fork_or_free_leaves_a_sound_cache(
    kind, name, is_before
):
    """Its functions may be a reader's own."""

    def stop(cache, call):
        method = {"begin": "allocate", "fork": "fork"}.get(name, "free")
        own = getattr(cache.manager, method)

        def failing(*args):
            if not is_before:
                own(*args)
            raise NotImplementedError("by the test")

        setattr(cache.manager, method, failing)
        with pytest.raises(NotImplementedError, match="by the test"):
            call(cache)
        setattr(cache.manager, method, own)

    stopped_rightly(kind, name, stop)


@pytest.mark.parametrize("kind", IN_BLOCKS)
def test_who_begins_takes_nothing_from_one_of_whom_the_manager_alone_knows(kind):
    cache = crowded(kind, small_model())
    cache.manager.allocate("new", 3)
    before = copy.deepcopy(all_of(cache))
    for name in ("begin", "fork"):
        with pytest.raises(
            ValueError, match="'new': expected one that is new to the mana"
        ):
            COMING_AND_GOING[name](cache)
        got = all_of(cache)
        assert (
            got[:5] == before[:5] and got[5]["block_tables"] == before[5]["block_tables"]
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name, num_rows", [("q", 7), ("k", 1), ("v", 1), ("v", 3)])
def test_a_step_takes_one_query_key_and_value_for_each_of_its_tokens(
    kind, name, num_rows
):
    model = random_model(dtype=torch.float64)
    cache = mid_text(kind, model)
    before, query_lens = all_of(cache), torch.tensor([2] * len(cache.request_ids))
    N = int(query_lens.sum())
    rows = {"q": N, "k": N, "v": N, name: num_rows}
    heads = {"q": 4, "k": 2, "v": 2}
    qkv = [torch.randn(rows[x], heads[x], 8, dtype=torch.float64) for x in "qkv"]
    with (
        pytest.raises(ValueError, match=f"expected q of {N} tokens"),
        cache.extend(query_lens) as attend,
    ):
        attend(0, *qkv)
    qkv = [torch.randn(N, heads[x], 8, dtype=torch.float64) for x in "qkv"]
    with (
        pytest.raises(ValueError, match=f"expected q of {N} tokens"),
        cache.extend(query_lens) as attend,
    ):
        attend(0, qkv[0], qkv[1][:, :1], qkv[2])  # one KV head would fill them all
    assert all_of(cache) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_counts_the_tokens_it_began_with(kind):
    model = random_model(dtype=torch.float64)
    cache = mid_text(kind, model)
    B = len(cache.request_ids)
    query_lens, lens = torch.ones(B, dtype=torch.int64), cache.seq_lens.tolist()
    ids = torch.arange(B)
    with cache.extend(query_lens) as attend:
        query_lens.fill_(3)
        model(ids, cache.seq_lens, attend)
    assert cache.seq_lens.tolist() == [n + 1 for n in lens]


@pytest.mark.parametrize("kind", KINDS)
def test_counts_that_overflow_an_integer_are_refused(kind):
    cache = mid_text(kind, random_model(dtype=torch.float64))
    before = all_of(cache)
    counts = [0, 2**63 - 1] + [0] * (len(cache.request_ids) - 2)
    with pytest.raises((CacheFullError, OutOfBlocksError)):
        cache.check_room(torch.tensor(counts))
    assert all_of(cache) == before


PLACES = [
    "embed",
    "blocks.1.attention_norm",
    "blocks.0.attention.v_proj",
    "blocks.1.attention.o_proj",
    "blocks.0.mlp.gate_proj",
    "blocks.1.mlp.down_proj",
    "unembed.0",
    "unembed.1",
]
FUNCTIONS = {  # of attention: before it writes, and between writing and reading
    "contiguous": ["append_kv", "attend_cached", "attend_decode"],
    "paged": ["write_kv", "attend_paged", "gather_kv", "attend_decode_paged"],
}


@contextlib.contextmanager
def broken(model, kind, place, error):
    """While it lasts, a call of this module or function raises, in its first layer."""

    def fail(*_, **__):
        raise error("broken")

    with pytest.MonkeyPatch.context() as patch:
        if place in PLACES:
            with model.get_submodule(place).register_forward_pre_hook(fail):
                yield
        else:
            module = kv_cache if kind == "contiguous" else paged_kv_cache
            patch.setattr(module, place, fail)
            yield


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("counts", [DECODE, PREFILL, RAGGED])
@pytest.mark.parametrize("fused_decode", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_broke_anywhere_is_taken_again_as_if_nothing_had_been(
    kind, fused_decode, counts, error
):
    model = random_model(dtype=torch.float64)
    cache = mid_text(kind, model, fused_decode)
    expected = step(model, copy.deepcopy(cache), counts)
    before, num_broken = all_of(cache), 0
    functions = FUNCTIONS["contiguous" if kind == "contiguous" else "paged"]
    for place in PLACES + functions:
        again = copy.deepcopy(cache)
        try:
            with broken(model, kind, place, error):
                step(model, again, counts)
        except error:
            num_broken += 1
            assert all_of(again) == before
            assert torch.equal(step(model, again, counts), expected)
    assert num_broken >= len(PLACES) + 2


def row_of(cache, k):
    """A step of one token a row, by hand: keys k, values 1."""
    with cache.extend(torch.ones_like(cache.seq_lens)) as attend:
        for layer in range(cache.config.num_layers):
            q = k.new_zeros(len(k), cache.config.num_heads, k.shape[-1])
            out = attend(layer, q, k, torch.ones_like(k))
    return out


def nan_prefill(cache, counts):
    N, config = sum(counts), cache.config
    k = torch.full((N, config.num_kv_heads, config.head_dim), torch.nan)
    q = torch.zeros(N, config.num_heads, config.head_dim)
    with cache.extend(torch.tensor(counts)) as attend:
        for layer in range(config.num_layers):
            attend(layer, q, k, k)


def test_the_fused_call_never_meets_what_a_step_left_that_was_taken_back():
    cache = begun(ContiguousKVCache(TINY, 2, 9, fused_decode=True), 2)
    k = torch.ones(2, TINY.num_kv_heads, TINY.head_dim)
    row_of(cache, k)
    with pytest.raises(ZeroDivisionError), cache.extend(torch.tensor([5, 6])) as attend:
        nan = k.new_full((11, *k.shape[1:]), torch.nan)
        for layer in range(2):
            attend(layer, nan.repeat(1, 2, 1), nan, nan)
        _ = 1 / 0
    with cache.extend(
        torch.tensor([3, 0])
    ) as attend:  # one is longer, and its mask hides
        for layer in range(2):
            ones = k.new_ones(3, *k.shape[1:])
            attend(layer, ones.repeat(1, 2, 1), ones, ones)
    assert_close(row_of(cache, k), torch.ones(2, TINY.num_heads, TINY.head_dim))


def test_the_fused_call_never_meets_what_an_earlier_request_left_in_the_row():
    cache = begun(ContiguousKVCache(TINY, 2, 9, fused_decode=True), 2)
    nan_prefill(cache, [0, 9])
    cache.free(1)
    cache.begin("newcomer")
    k = torch.ones(2, TINY.num_kv_heads, TINY.head_dim)
    for _ in range(4):
        out = row_of(cache, k)
        assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_attention_is_called_inside_of_a_step(kind):
    model = random_model(dtype=torch.float64)
    cache = mid_text(kind, model)
    before, lens = all_of(cache), torch.zeros_like(cache.seq_lens)
    calls = [
        lambda: cache.begin("new"),
        lambda: cache.free(0),
        lambda: step(model, cache, DECODE),
        lambda: cache.extend(lens).__enter__(),
    ]
    if kind != "contiguous":
        calls.append(lambda: cache.fork(0, "new"))
    for i, call in enumerate(calls):
        with (
            pytest.raises(RuntimeError, match="expected between two steps"),
            cache.extend(lens) as attend,
        ):
            call()
        assert all_of(cache) == before, i
    nothing = torch.zeros(3, 0, 2, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="attend: expected inside of its own step"):
        attend(0, *nothing)
    with (
        pytest.raises(RuntimeError, match="attend: expected inside of its own step"),
        cache.extend(lens),
    ):
        attend(0, *nothing)  # of a step before


@pytest.mark.parametrize("layers", [[], [0], [1], [0, 0], [0, -1]])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_all_layers_does_not_count(kind, layers):
    cache = mid_text(kind, random_model(dtype=torch.float64))
    before, B = all_of(cache), len(cache.request_ids)
    q = torch.zeros(B, 4, 8, dtype=torch.float64)
    with (
        pytest.raises(RuntimeError, match=r"attention in layers 0 to 1, got \["),
        cache.extend(torch.ones(B, dtype=torch.int64)) as attend,
    ):
        for layer in layers:
            attend(layer, q, q[:, :2], q[:, :2])
    assert all_of(cache) == before


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_that_the_caller_holds_stay_as_they_were(kind):
    model = random_model(dtype=torch.float64)
    cache = mid_text(kind, model)
    calls = [
        lambda: step(model, cache, DECODE),
        lambda: cache.free(0),
        lambda: cache.begin("new"),
    ]
    for call in calls:
        held, expected = cache.seq_lens, cache.seq_lens.tolist()
        call()
        assert held.tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_requests_begin_once_and_end_once(kind):
    cache = mid_text(kind, random_model(dtype=torch.float64))
    before = all_of(cache)
    for call, request_id in [(cache.begin, 0), (cache.begin, None), (cache.free, None)]:
        with pytest.raises(ValueError, match=f"request {request_id}: expected one"):
            call(request_id)
        assert all_of(cache) == before
    cache.free(0)
    with pytest.raises(ValueError, match="has not begun or was freed"):
        cache.free(0)


def test_rows_are_for_those_who_have_begun():
    model = random_model(dtype=torch.float64)
    cache = mid_text("contiguous", model)
    with pytest.raises(CacheFullError):
        cache.begin("third")
    cache.free(0)
    before = all_of(cache)
    for counts in ([1, 1], [1, 0]):
        with pytest.raises(ValueError, match="expected 0 in row 0, where no request"):
            step(model, cache, counts)
        assert all_of(cache) == before
    step(model, cache, [0, 1])


# Prefill in chunks.


def empty_cache(kind, config, lens, dtype=torch.float64):
    if kind == "contiguous":
        cache = ContiguousKVCache(config, len(lens), max(lens) + 8, dtype=dtype)
    else:
        num_blocks = sum(n // 4 + 3 for n in lens)
        cache = PagedKVCache(config, num_blocks, 4, dtype=dtype)
    return begun(cache, len(lens))


@pytest.mark.parametrize("chunk_size", range(1, 11))
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_prompts_in_chunks_of_any_size_are_the_same_to_what_follows(kind, chunk_size):
    model = random_model(dtype=torch.float64)
    lens = [9, 1, 4]
    prompts = [torch.randint(256, (n,)) for n in lens]
    caches = [empty_cache(kind, model.config, lens) for _ in range(2)]
    forward_cached(model, caches[0], torch.cat(prompts), torch.tensor(lens))
    prefill_in_chunks(model, prompts, caches[1], chunk_size)
    assert caches[1].seq_lens.tolist() == lens
    assert all_of(caches[1])[:4] == all_of(caches[0])[:4]
    nexts = [torch.tensor([token_id]) for token_id in (3, 50, 200)]
    logits = [
        forward_cached(
            model, copy.deepcopy(cache), torch.cat(nexts), torch.ones(3).long()
        )
        for cache in caches
    ]
    assert_close(*logits)
    texts = [generate_cached(model, nexts, 8, cache, temperature=0) for cache in caches]
    assert all(torch.equal(a, b) for a, b in zip(*texts))


def peak_exponent(kind, chunk_size, lens=(256, 512, 1024)):
    """How the peak grows with the prompt: from these lengths, T to which power."""
    model = random_model(
        num_layers=1, num_heads=4, num_kv_heads=1, d_model=8, d_ff=8, max_seq_len=2048
    )
    peaks = []
    for T in lens:
        cache = empty_cache(kind, model.config, [T], torch.float32)
        prompts = [torch.zeros(T, dtype=torch.int64)]
        cost = measure(
            lambda c=cache, p=prompts: prefill_in_chunks(
                model, p, c, chunk_size or len(p[0])
            )
        )
        peaks.append(cost.peak_bytes)
    steps = [math.log2(b / a) for a, b in zip(peaks, peaks[1:])]
    return sum(steps) / len(steps)


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_the_peak_of_a_prefill_grows_with_the_prompt_and_not_with_its_square(kind):
    assert peak_exponent(kind, 64) == pytest.approx(1, abs=0.1)
    assert peak_exponent(kind, None) > 1.6, "the control: in one step"


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_a_prefill_that_cannot_end_does_not_begin(kind):
    model = random_model(dtype=torch.float64)
    cache = empty_cache(kind, model.config, [8, 8])
    before = all_of(cache)
    ok = torch.arange(9)
    refused = [
        ([ok, torch.zeros(100).long()], 4),  # no room
        ([ok, torch.tensor([1, 2, 3, 4, 300])], 4),  # no such token, in the second chunk
        ([ok], 4),
        ([ok, ok, ok], 4),
        ([], 4),
        ([ok, ok[:0]], 4),
        ([ok, ok[None]], 4),
        ([ok, torch.zeros(129).long()], 4),
        ([ok, ok], 2.5),
        ([ok, ok], None),
    ]
    errors = (ValueError, CacheFullError, OutOfBlocksError)
    for prompts, chunk_size in refused:
        with pytest.raises(errors):
            prefill_in_chunks(model, prompts, cache, chunk_size)
        assert all_of(cache) == before
    for chunk_size in (0, -1):
        with pytest.raises(
            ValueError, match="chunk_size: expected an integer of at least 1, got"
        ):
            prefill_in_chunks(model, [ok[:8], ok[:8]], cache, chunk_size)
    empty = PagedKVCache(model.config, 4) if kind == "paged" else None
    empty = empty or ContiguousKVCache(model.config, 1, 9, dtype=torch.float64)
    with pytest.raises(ValueError, match="expected"):
        prefill_in_chunks(model, [ok], empty, 4)  # nobody has begun


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_a_prefill_that_was_stopped_goes_on_behind_its_last_whole_chunk(kind):
    model = random_model(dtype=torch.float64)
    lens = [9, 5]
    prompts = [torch.randint(256, (n,)) for n in lens]
    cache, calls = empty_cache(kind, model.config, lens), []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with model.unembed.register_forward_pre_hook(fail), pytest.raises(KeyboardInterrupt):
        prefill_in_chunks(model, prompts, cache, 4)
    assert cache.seq_lens.tolist() == [4, 4]
    rest = [prompt_ids[4:] for prompt_ids in prompts]
    texts = generate_cached(model, rest, 6, cache, temperature=0)
    for prompt_ids, text in zip(prompts, texts):
        expected = generate_recompute(model, prompt_ids, 6, temperature=0)
        assert torch.equal(text, expected[4:])


# One call for all.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lens", [[1], [17], [1, 1], [5, 1, 33, 16]])
def test_the_fused_decode_is_the_loop_of_the_plain_one(lens, num_kv_heads, dtype):
    B, S, D = len(lens), max(lens), 8
    q = torch.randn(B, 4, D, dtype=torch.float64)
    k, v = torch.randn(2, B, S, num_kv_heads, D, dtype=torch.float64)
    for row, seq_len in enumerate(lens):  # hidden, but numbers
        k[row, seq_len:], v[row, seq_len:] = 1e3, 1e3
    q, k, v = (x.to(dtype) for x in (q, k, v))
    lens = torch.tensor(lens)
    got = attend_decode(q, k, v, decode_mask(lens, S))
    assert got.dtype == dtype
    args = (x.double() for x in (q, k, v))
    expected = attend_cached(*args, lens, torch.ones_like(lens))
    assert_close(got, expected)


@pytest.mark.parametrize("num_kv_heads", [8, 2])
def test_the_fused_decode_stores_neither_scores_nor_copies_of_keys(num_kv_heads):
    B, H, S, D = 4, 8, 512, 16
    q, lens = torch.randn(B, H, D), torch.tensor([S, 1, 77, 300])
    k, v = torch.randn(2, B, S, num_kv_heads, D)
    scores_bytes = B * H * S * 4
    mask = decode_mask(lens, S)
    cost = measure(lambda: attend_decode(q, k, v, mask))
    assert cost.peak_bytes < scores_bytes / 2
    plain = measure(lambda: attend_cached(q, k, v, lens, torch.ones_like(lens)))
    assert plain.peak_bytes > scores_bytes / B, "the control: one row's would be seen"


def test_more_queries_than_keys_are_refused():
    q, k = torch.zeros(3, 1, 1), torch.zeros(1, 4, 1, 1)
    with pytest.raises(AssertionError, match=r"at most \[2\] queries.* got \[3\]"):
        attend_cached(q, k, k, torch.tensor([2]), torch.tensor([3]))


def both_kinds(**changes):
    config = replace(TINY, **changes)
    return ContiguousKVCache(config, 2, 9), PagedKVCache(config, 9, 4)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("huge", [[2**63 - 1, 2**63 - 1], [2**62, 2**62]])
def test_lengths_whose_sum_overflows_are_refused_before_the_model_runs(kind, huge):
    model, cache = Transformer(TINY).eval(), begun(both_kinds()[kind], 2)
    with pytest.raises((CacheFullError, OutOfBlocksError)):
        forward_cached(model, cache, torch.tensor([1, 2]), torch.tensor(huge))
    assert cache.seq_lens.tolist() == [0, 0]


@pytest.mark.parametrize("kind", [0, 1])
def test_dropout_never_goes_into_a_cache(kind):
    cache = begun(both_kinds(dropout=0.5)[kind], 1)
    model = Transformer(replace(TINY, dropout=0.5)).train()
    lens = torch.tensor([2, 0][: len(cache.request_ids)])
    with pytest.raises(ValueError, match="expected eval mode"):
        forward_cached(model, cache, torch.tensor([1, 2]), lens)


@pytest.mark.parametrize("kind", [0, 1])
def test_what_is_handed_out_is_a_copy(kind):
    cache = filled(both_kinds()[kind], {"a": 5, "b": 2})
    lens = cache.seq_lens
    lens += 1
    assert cache.seq_lens.tolist() == [5, 2]
    if kind == 1:
        cache.block_tables.zero_()
        assert cache.block_tables.tolist() == [[0, 1], [2, -1]]


@pytest.mark.parametrize("kind", [0, 1])
def test_a_step_with_gradients_on_keeps_no_graph(kind):
    cache, model = begun(both_kinds()[kind], 2), Transformer(TINY).eval()
    with cache.extend(torch.tensor([2, 1])) as attend:
        model(torch.tensor([1, 2, 3]), torch.tensor([0, 1, 0]), attend)
    assert not cache.k_cache.requires_grad and not cache.v_cache.requires_grad


@pytest.mark.parametrize("kind", [0, 1])
def test_a_copied_cache_goes_its_own_way(kind):
    cache = filled(both_kinds()[kind], {"a": 3})
    other = copy.copy(cache)
    filled(other, {"b": 4})
    assert [r for r in cache.request_ids if r] == ["a"]
    assert cache.k_cache.data_ptr() != other.k_cache.data_ptr()


def test_a_cache_of_inference_mode_is_used_there():
    with torch.inference_mode():
        caches = [begun(cache, 1) for cache in both_kinds()]
    for cache in caches:
        for call in (
            lambda cache=cache: filled(cache, {"b": 2}),
            lambda cache=cache: cache.extend(
                torch.zeros_like(cache.seq_lens)
            ).__enter__(),
            lambda cache=cache: cache.free(0),
        ):
            with pytest.raises(RuntimeError, match="expected under torch.inference_mode"):
                call()
        with torch.inference_mode():
            filled(cache, {"b": 2})
            cache.free(0)
            assert sum(cache.seq_lens.tolist()) == 2


@pytest.mark.parametrize("kind", [0, 1])
def test_attention_that_failed_does_not_count_as_done(kind):
    cache = begun(both_kinds()[kind], 2)
    good, bad = torch.zeros(2, 2, 8), torch.zeros(2, 2, 8, dtype=torch.int32)
    q, lens = torch.zeros(2, 4, 8), torch.tensor([1, 1])
    with pytest.raises(RuntimeError, match="layers 0 to 1"), cache.extend(lens) as attend:
        attend(0, q, good, good)
        with contextlib.suppress(Exception):
            attend(1, q, bad, bad)  # of another dtype than the pool
    assert cache.seq_lens.tolist() == [0, 0]


def test_a_cache_that_could_not_take_a_step_back_refuses_the_next(monkeypatch):
    cache = begun(ContiguousKVCache(TINY, 1, 9), 1)

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(cache, "_take_back", fail)
    with pytest.raises(MemoryError), cache.extend(torch.tensor([1])):
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="make a new cache"):
        cache.begin("b")


@pytest.mark.parametrize("query_lens", [[1, 1], None, "11"])
def test_new_tokens_are_counted_by_a_tensor(query_lens):
    with pytest.raises(ValueError, match="expected an int64 tensor"):
        begun(ContiguousKVCache(TINY, 2, 9), 2).check_room(query_lens)


def test_new_tokens_are_counted_where_the_cache_is():
    query_lens = torch.ones(2, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="expected on cpu, as the cache, got on meta"):
        begun(ContiguousKVCache(TINY, 2, 9), 2).check_room(query_lens)


def test_prompts_are_tensors_or_rows_of_one():
    model, cache = random_model(), begun(ContiguousKVCache(TINY, 2, 9), 2)
    prompts = torch.arange(6).view(2, 3)
    assert len(generate_cached(random_model(), prompts, 1, cache)) == 2
    with pytest.raises(
        ValueError, match=r"expected each an int64 tensor \(T,\), got list"
    ):
        generate_cached(model, [[1], [2]], 1, cache)
    half = ContiguousKVCache(TINY, 2, 9)
    half.begin("a")
    with pytest.raises(ValueError, match="a request in each row, got .'a', None."):
        generate_cached(model, list(prompts), 0, half)


@pytest.mark.parametrize("sizes", [(2.0, 4), ("3", 4), (True, 4), (2, True)])
def test_sizes_of_a_cache_are_integers(sizes):
    with pytest.raises(ValueError, match="expected an integer of at least 1"):
        ContiguousKVCache(TINY, *sizes)
