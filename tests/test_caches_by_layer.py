"""What caches of which each layer keeps something of its own have in common, whatever it
is: the tokens of a budget, a window, a state. Nobody is disturbed by others, by errors or
by interrupts, and what is kept takes the memory that the cache says it takes."""

import contextlib
import copy
import functools
import itertools
import random

import pytest
import torch
from helpers import (
    Interrupt,
    attentive_model,
    begun,
    contents,
    of_request,
    random_heads,
    random_ids,
    random_model,
    take,
)

from lib import kv_cache, pruning, state
from lib.config import ModelConfig
from lib.engine import Engine
from lib.generate import forward_cached, generate_cached, prefill_in_chunks
from lib.kv_cache import CacheFullError
from lib.measure.meter import measure
from lib.pruning import HeavyHitters, PrunedKVCache, Recent, Snap
from lib.state import Delta, Linear, StateCache, Window

V = 32
CONFIG = ModelConfig(
    8, 2, num_heads=4, num_kv_heads=2, d_model=16, d_ff=8, max_seq_len=64
)
LAYERS = range(CONFIG.num_layers)
MODULES = kv_cache, pruning, state
heads_for = functools.partial(random_heads, CONFIG)
# What a cache takes beside the config and the number of rows.
PRUNED = {
    "recent": ((5, 8), Recent(2)),
    "heavy hitters": ((5, 8), HeavyHitters(3)),
    "snap": ((5, 8), Snap(3, 3)),
    "snap with room for all": (64, Snap(3, 3)),
}
STATES = {
    "sum": Linear(),
    "decay": Linear(0.8),
    "delta": Delta(),
    "window": Window(4),
    "window, then delta": [Window(3), Delta()],
}
KINDS = [*PRUNED, *STATES]
# One of each way to keep something.
FEW_KINDS = ["snap", "decay", "window, then delta"]
every_kind = pytest.mark.parametrize("kind", KINDS)
few_kinds = pytest.mark.parametrize("kind", FEW_KINDS)


def made(kind, batch_size, config=CONFIG, dtype=torch.float64):
    if kind in PRUNED:
        return PrunedKVCache(config, batch_size, *PRUNED[kind], dtype=dtype)
    return StateCache(config, batch_size, STATES[kind], dtype=dtype)


@functools.cache
def model():
    return attentive_model(V - 1, vocab_size=V, num_heads=4, num_kv_heads=2)


def for_model(kind, batch_size=1):
    return begun(made(kind, batch_size, model().config), batch_size)


def prompts_of(*lens, seed=0):
    rng = random.Random(seed)
    return [random_ids(rng, n, V - 1) for n in lens]


def mid_text(kind):
    """Requests of 7 and 1 tokens, in a cache of three rows."""
    cache = begun(made(kind, 3), 2)
    take(cache, [7, 1, 0], heads_for(random.Random(5), 8))
    return cache


CALLS = {
    "a step": lambda cache: take(cache, [2, 1, 0], heads_for(random.Random(1), 3)),
    "begin": lambda cache: cache.begin("new"),
    "free": lambda cache: cache.free(0),
}


# A step, or nothing of it.


@few_kinds
@pytest.mark.parametrize("call", CALLS)
def test_an_interrupt_at_any_line_leaves_all_or_nothing(call, kind):
    start, done = mid_text(kind), mid_text(kind)
    CALLS[call](done)
    ends = {"a step": [start], "begin": [start, done], "free": [start, done]}[call]
    ends = [contents(end) for end in ends]
    for when in itertools.count():
        cache = copy.deepcopy(start)
        with (
            contextlib.suppress(KeyboardInterrupt),
            Interrupt(when, MODULES) as interrupt,
        ):
            CALLS[call](cache)
        if interrupt.where is None:
            assert contents(cache) == contents(done)
            break
        assert contents(cache) in ends, interrupt.where
        counts = [int(request_id is not None) for request_id in cache.request_ids]
        take(cache, counts, heads_for(random.Random(2), sum(counts)))
    assert when > {"a step": 100, "begin": 9, "free": 9}[call]


@every_kind
def test_an_error_after_any_layer_leaves_nothing(kind):
    for last in LAYERS:
        cache = mid_text(kind)
        before, kept = contents(cache), list(cache._kept)
        with pytest.raises(KeyboardInterrupt):
            take(cache, [3, 0, 0], heads_for(random.Random(1), 3), stop_after(last))
        assert contents(cache) == before
        assert all(one is two for one, two in zip(cache._kept, kept))


def stop_after(last):
    def after_layer(layer):
        if layer == last:
            raise KeyboardInterrupt

    return after_layer


def stopped_step(call, rng, cache, counts, heads):
    """A step that an error or an interrupt stops, and where: None if it came to its end
    before."""
    if call == "error":
        with contextlib.suppress(KeyboardInterrupt):
            take(cache, counts, heads, stop_after(rng.choice(LAYERS)))
        return "an error after a layer"
    with (
        contextlib.suppress(KeyboardInterrupt),
        Interrupt(rng.randrange(120), MODULES) as interrupt,
    ):
        take(cache, counts, heads)
    return interrupt.where


@every_kind
@pytest.mark.parametrize("seed", range(2))
def test_random_operations_disturb_nobody_else(seed, kind):
    rng, number, num_stopped = random.Random(seed), 0, 0
    cache, alone = made(kind, 3), {}
    for _ in range(50):
        call = rng.choice(["begin", "free", "step", "step", "step", "error", "interrupt"])
        before = contents(cache)
        if call == "begin":
            number += 1
            if None not in cache.request_ids:
                with pytest.raises(CacheFullError, match="expected a free row"):
                    cache.begin(number)
                assert contents(cache) == before
                continue
            cache.begin(number)
            alone[number] = made(kind, 1)
            alone[number].begin(number)
        elif call == "free" and alone:
            request_id = rng.choice(list(alone))
            cache.free(request_id)
            del alone[request_id]
        elif call not in ("begin", "free"):
            counts = [
                0 if r is None else rng.choice([0, 1, 1, 3, 9]) for r in cache.request_ids
            ]
            heads = heads_for(rng, sum(counts))
            if any(n + m > 64 for n, m in zip(counts, cache.seq_lens.tolist())):
                with pytest.raises(CacheFullError, match="expected at most 64 tokens"):
                    take(cache, counts, heads)
                assert contents(cache) == before
                continue
            if call != "step":
                stopped = copy.deepcopy(cache)
                where = stopped_step(call, rng, stopped, counts, heads)
                if where is not None:
                    num_stopped, cache = num_stopped + 1, stopped
                    assert contents(cache) == before, where
            outs = [out.split(counts) for out in take(cache, counts, heads)]
            parts = [[x.split(counts) for x in layer] for layer in heads]
            for row, (request_id, count) in enumerate(zip(cache.request_ids, counts)):
                if count:
                    own = [[x[row] for x in layer] for layer in parts]
                    for layer, out in enumerate(take(alone[request_id], [count], own)):
                        assert torch.equal(outs[layer][row], out)
        for request_id, one in alone.items():
            assert of_request(cache, request_id) == of_request(one, request_id)
        assert cache.used_bytes == sum(one.used_bytes for one in alone.values())
        assert cache.reserved_bytes == cache.used_bytes
        assert cache.num_free_blocks == 3 - len(alone)
    assert num_stopped > 3


@every_kind
def test_a_layer_that_is_run_twice_in_a_step_counts_once(kind):
    once, twice = mid_text(kind), mid_text(kind)
    heads = heads_for(random.Random(3), 4)
    expected = take(once, [3, 1, 0], heads)
    with twice.extend(torch.tensor([3, 1, 0])) as attend:
        for layer, x in enumerate(heads):
            for _ in range(2):
                assert torch.equal(attend(layer, *x), expected[layer])
    assert contents(twice) == contents(once)


@every_kind
def test_who_rests_is_not_touched(kind):
    cache = mid_text(kind)
    before = list(cache._kept)
    take(cache, [2, 0, 0], heads_for(random.Random(0), 2))
    assert [kept is old for kept, old in zip(cache._kept, before)] == [False, True, True]


@every_kind
def test_what_is_free_takes_no_bytes_and_who_begins_there_finds_nothing(kind):
    cache, fresh = mid_text(kind), begun(made(kind, 1), 1)
    cache.free(0)
    cache.free(1)
    assert cache.used_bytes == 0 and cache.num_free_blocks == 3
    assert cache.seq_lens.tolist() == [0, 0, 0]
    nothing = of_request(fresh, 0)
    assert contents(cache)[-1] == [nothing] * 3, "expected memory given back at once"
    cache.begin("new")
    assert of_request(cache, "new") == nothing
    heads = heads_for(random.Random(6), 5)
    got, expected = take(cache, [5, 0, 0], heads), take(fresh, [5], heads)
    for one, two in zip(got, expected):
        assert torch.equal(one, two), "expected what an empty cache gives"


@every_kind
def test_a_copy_goes_its_own_way(kind):
    for make_copy in (copy.copy, copy.deepcopy):
        cache = mid_text(kind)
        before, other = contents(cache), make_copy(cache)
        assert contents(other) == before
        CALLS["a step"](other)
        other.free(1)
        assert contents(cache) == before != contents(other)
        other = make_copy(cache)
        for x in itertools.chain(*other._kept[0]):
            x.zero_()
        assert contents(cache) == before, "expected tensors of its own"


@every_kind
def test_a_cache_of_inference_mode_and_one_outside_see_the_same(kind):
    heads = [heads_for(random.Random(i), 4) for i in range(3)]
    with torch.inference_mode():
        cache = begun(made(kind, 2), 2)
        take(cache, [3, 1], heads[0])
    other = begun(made(kind, 2), 2)
    take(other, [3, 1], heads[0])
    for x in heads[1:]:
        for got, expected in zip(*(take(c, [1, 3], x) for c in (cache, other))):
            assert torch.equal(got, expected)
    assert contents(cache) == contents(other)


@every_kind
def test_no_gradient_keeps_what_was_before(kind):
    cache = begun(made(kind, 1), 1)
    for i in range(2):
        heads = heads_for(random.Random(i), 3)
        heads = [[x.requires_grad_() for x in layer] for layer in heads]
        for out in take(cache, [3], heads):
            assert not out.requires_grad
    for x in itertools.chain(*cache._kept[0]):
        assert not x.requires_grad and x.grad_fn is None


@every_kind
def test_a_request_without_numbers_spoils_nobody_else(kind):
    cache, other = (begun(made(kind, 2), 2) for _ in range(2))
    for i in range(4):
        heads = heads_for(random.Random(i), 8)
        bad = [[x.clone() for x in layer] for layer in heads]
        if i == 1:
            for x in bad[0]:
                x[4:] = torch.nan
        got, expected = (take(c, [4, 4], x) for c, x in ((cache, bad), (other, heads)))
        for one, two in zip(got, expected):
            assert torch.equal(one[:4], two[:4])
    assert of_request(cache, 0) == of_request(other, 0)
    cache.free(1)
    cache.begin("next")
    assert all(out.isfinite().all() for out in take(cache, [4, 4], heads))


@every_kind
def test_rows_without_a_request_and_texts_above_the_models_are_refused(kind):
    cache = mid_text(kind)
    before = contents(cache)
    with pytest.raises(ValueError, match="expected 0 in row 2, where no request has"):
        take(cache, [0, 0, 1], heads_for(random.Random(0), 1))
    with pytest.raises(CacheFullError, match="request 0: expected at most 64 .* got 65"):
        take(cache, [58, 0, 0], heads_for(random.Random(0), 58))
    assert contents(cache) == before
    take(cache, [57, 0, 0], heads_for(random.Random(0), 57))


# Whoever uses caches.


def assert_same_kept(cache, row, one):
    """Numbers up to rounding, positions exactly."""
    for got, expected in zip(cache._kept[row], one._kept[0], strict=True):
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@every_kind
def test_a_request_writes_alone_what_it_writes_among_others(kind):
    prompts = prompts_of(13, 1, 2, 22)
    cache = for_model(kind, 4)
    texts = generate_cached(model(), prompts, 20, cache, temperature=0)
    for text_id, (prompt, text) in enumerate(zip(prompts, texts)):
        one = for_model(kind)
        (expected,) = generate_cached(model(), [prompt], 20, one, temperature=0)
        assert text.tolist() == expected.tolist()
        assert_same_kept(cache, text_id, one)


@every_kind
@pytest.mark.parametrize("chunk_size", [1, 4, 99])
def test_a_prefill_in_chunks_is_one_step_for_each_chunk(chunk_size, kind):
    prompts = prompts_of(14, 1, 9)
    cache = for_model(kind, 3)
    prefill_in_chunks(model(), prompts, cache, chunk_size)
    (last,), ones = prompts_of(3, seed=1), torch.ones(3, dtype=torch.int64)
    got = forward_cached(model(), cache, last, ones)
    assert cache.seq_lens.tolist() == [15, 2, 10]
    for b, prompt in enumerate(prompts):
        one = for_model(kind)
        for chunk in prompt.split(chunk_size):
            forward_cached(model(), one, chunk, torch.tensor([len(chunk)]))
        expected = forward_cached(model(), one, last[b : b + 1], ones[:1])
        torch.testing.assert_close(got[b : b + 1], expected, rtol=1e-9, atol=1e-9)
        assert_same_kept(cache, b, one)


@every_kind
@pytest.mark.parametrize("token_budget", [5, 64])
def test_an_engine_writes_what_each_request_writes_in_the_same_pieces(token_budget, kind):
    cache = made(kind, 3, model().config)
    engine = Engine(model(), cache, token_budget=token_budget)
    prompts = [prompt.tolist() for prompt in prompts_of(13, 1, 20, 6, 9)]
    requests = [
        engine.add(ids, 15, temperature=0, request_id=i) for i, ids in enumerate(prompts)
    ]
    steps = []
    while engine.requests:
        steps.append(engine.step())
        engine.check_integrity()
    assert cache.used_bytes == 0 and cache.num_free_blocks == 3
    for prompt_ids, request in zip(prompts, requests):
        one, text = for_model(kind), list(prompt_ids)
        for count in (step.counts.get(request.request_id) for step in steps):
            if count:
                start = int(one.seq_lens)
                ids = torch.tensor(text[start : start + count])
                logits = forward_cached(model(), one, ids, torch.tensor([count]))
                if start + count == len(text):
                    text.append(int(logits[-1].argmax()))
        assert request.token_ids == text and request.finish_reason == "length"


# Those in which pieces do not matter, up to rounding.
@pytest.mark.parametrize("kind", ["snap with room for all", *STATES])
def test_an_interrupted_engine_loses_no_request(kind):
    """What was computed may be computed again, in other pieces."""
    rng, prompts = random.Random(9), prompts_of(9, 1, 14)
    expected = [
        generate_cached(model(), [ids], 8, for_model(kind), temperature=0)[0].tolist()
        for ids in prompts
    ]
    engine = Engine(model(), made(kind, 2, model().config), token_budget=6)
    requests = [engine.add(ids.tolist(), 8, temperature=0) for ids in prompts]
    for _ in range(12):
        with (
            contextlib.suppress(KeyboardInterrupt),
            Interrupt(rng.randrange(400), MODULES),
        ):
            engine.step()
        engine.check_integrity()
    engine.run()
    assert [request.token_ids for request in requests] == expected


# Memory.


@every_kind
def test_what_is_kept_holds_no_more_storage_than_it_needs(kind):
    cache = begun(made(kind, 2), 2)
    for counts in ([30, 3], [1, 1], [9, 0]):
        take(cache, counts, heads_for(random.Random(0), sum(counts)))
        storages = {}
        for x in itertools.chain(*itertools.chain(*cache._kept)):
            storage = x.untyped_storage()
            assert storage.nbytes() == x.nbytes, f"{storage.nbytes()} for {x.nbytes}"
            storages[storage.data_ptr()] = storage.nbytes()
        assert sum(storages.values()) == cache.used_bytes, "expected none of them shared"


@pytest.mark.parametrize("kind", ["heavy hitters", "snap", "decay", "window, then delta"])
def test_memory_is_the_same_to_the_byte_after_40_and_200_tokens(kind):
    small = random_model(num_layers=2, d_model=16, d_ff=16, max_seq_len=256)
    one = torch.ones(1, dtype=torch.int64)

    def write(num_tokens):
        cache = begun(made(kind, 1, small.config, torch.float32), 1)
        ids = torch.zeros(1, dtype=torch.int64)
        for _ in range(num_tokens):
            ids = forward_cached(small, cache, ids, one).argmax(-1)
        return cache

    costs = [measure(lambda n=n: write(n)) for n in (40, 200)]
    peaks = [cost.peak_bytes for cost in costs]
    assert peaks[0] == peaks[1], f"expected the same, got {peaks}"
    used = [cost.value.used_bytes for cost in costs]
    assert used[0] == used[1] > 0
    left, lengths = [cost.timeline[-1] for cost in costs], 8  # one int64
    nothing = sum(x.nbytes for x in itertools.chain(*costs[0].value._nothing))
    expected = used[0] + lengths + nothing
    assert left == [expected] * 2, f"expected {expected} bytes to stay, got {left}"
