"""Requests that come and go: each one's text must be the one that it has alone.

The oracle for greedy texts is `generate_recompute`, in float64. Sampled ones are compared
with those of an engine that serves one request and nobody else.
"""

import contextlib
import functools
import itertools
import math
import random
from collections import deque
from dataclasses import dataclass, field

import pytest
import torch
from helpers import Interrupt, attentive_model, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from lib import block_manager, engine, kv_cache, paged_kv_cache, prefix_cache
from lib.engine import (
    Engine,
    Load,
    finish_reason,
    latencies,
    preempt,
    schedule,
    tokens_that_fit,
)
from lib.generate import generate_recompute
from lib.kv_cache import ContiguousKVCache
from lib.model import attend_fused
from lib.paged_kv_cache import PagedKVCache
from lib.prefix_cache import PrefixKVCache
from lib.sampling import next_token_probs

V = 32
BAD_ID = V - 1  # its embedding is NaN: whoever has it has no numbers


@functools.cache
def small_model():
    return attentive_model(BAD_ID, vocab_size=V, num_heads=2, num_kv_heads=1)


@functools.cache
def recomputed(prompt_ids, num_new_tokens):
    """The greedy answer, by recompute."""
    prompt = torch.tensor(prompt_ids)
    text = generate_recompute(small_model(), prompt, num_new_tokens, temperature=0)
    return text[len(prompt_ids) :].tolist()


def greedy_answer(prompt_ids, max_new_tokens, stop_ids):
    """What an engine must answer, and why it ends."""
    if BAD_ID in prompt_ids:
        return [], "error"
    answer = recomputed(tuple(prompt_ids), max_new_tokens)
    for i, token_id in enumerate(answer):
        if token_id in stop_ids:
            return answer[: i + 1], "stop"
    return answer, "length"


@dataclass
class Ask:
    """A request that somebody will make, and when."""

    prompt_ids: list[int]
    max_new_tokens: int
    arrives: int = 0  # before this step
    n: int = 1
    stop_ids: tuple[int, ...] = ()
    cancelled: dict[int, int] = field(default_factory=dict)  # i-th answer: before step
    sampling: dict = field(default_factory=lambda: {"temperature": 0})


def some_ids(rng, num_tokens):
    return [rng.randrange(BAD_ID) for _ in range(num_tokens)]


def assert_right(request, prompt_ids, is_live=False):
    """A greedy request that has ended, or (is_live) is on its way."""
    stop_ids = request.stop_ids
    expected, reason = greedy_answer(prompt_ids, request.max_new_tokens, stop_ids)
    got = request.new_ids
    assert request.token_ids[: request.prompt_len] == list(prompt_ids)
    if is_live:
        assert request.finish_reason is None
        assert got == expected[: len(got)] and len(got) < max(len(expected), 1)
    elif request.finish_reason == "cancelled":
        assert got == expected[: len(got)] and len(got) < max(len(expected), 1)
    else:
        assert got == expected
        assert request.finish_reason.split(":")[0] == reason


def check(eng):
    """Whatever must hold between two calls, in the engine and in the pool."""
    eng.check_integrity()
    cache = eng.cache
    if isinstance(cache, PagedKVCache):
        cache.manager.check_integrity()
        assert list(cache.manager.block_tables) == cache.request_ids
        assert list(cache.manager.seq_lens.values()) == cache.seq_lens.tolist()
        cache._check_manager()
    if isinstance(cache, PrefixKVCache):
        cache.check_integrity()
    cached = dict(zip(cache.request_ids, cache.seq_lens.tolist()))
    for request in eng.running:
        assert cached[request.request_id] < len(request.token_ids)
    for request in eng.requests.values():
        assert request.finish_reason is None
        assert request.parent is None or request.parent in eng.requests.values()
    assert not torch.cat([cache.k_cache, cache.v_cache]).isinf().any()


def assert_empty(eng):
    check(eng)
    assert not eng.requests and not eng.running and not eng.waiting
    assert eng.cache.num_free_blocks == eng.cache.num_blocks
    assert eng.cache.used_bytes == 0


def check_step(eng, step, before):
    """What a step says that it did, beside the tokens that each request had before."""
    assert sum(step.counts.values()) <= eng.token_budget
    assert all(count > 0 for count in step.counts.values())
    assert step.num_waiting == len(eng.waiting)
    assert step.num_free_blocks == eng.cache.num_free_blocks
    assert list(step.seconds) == ["schedule", "forward", "sample", "finish"]
    assert min(step.seconds.values()) >= 0
    for request_id, token_id in step.next_ids.items():
        request, num_tokens = before[request_id]
        assert len(request.token_ids) == num_tokens + 1
        assert request.token_ids[-1] == token_id
    for request_id, (request, num_tokens) in before.items():
        assert (len(request.token_ids) > num_tokens) == (request_id in step.next_ids)
        assert request.finish_reason == step.finished.get(request_id)
    assert step.counts or not before, "nobody came further"
    if not isinstance(eng.cache, PrefixKVCache):  # which may find what it had
        assert not set(step.preempted) & set(step.counts)


def serve(eng, asks, max_steps=3000):
    """Make these requests when their time has come, until all are served. Gives the
    requests of each ask, and the steps."""
    made, steps, last = {}, [], max(ask.arrives for ask in asks)
    cancels = {
        (i, j): at for i, ask in enumerate(asks) for j, at in ask.cancelled.items()
    }
    for now in range(max_steps):
        for i, ask in enumerate(asks):
            if ask.arrives == now:
                got = eng.add(
                    ask.prompt_ids,
                    ask.max_new_tokens,
                    n=ask.n,
                    stop_ids=ask.stop_ids,
                    request_id=f"ask {i}",
                    **ask.sampling,
                )
                made[i] = got if ask.n > 1 else [got]
        for (i, j), at in cancels.items():
            if at == now and made[i][j].request_id in eng.requests:
                eng.cancel(made[i][j].request_id)
                check(eng)
                assert made[i][j].finish_reason == "cancelled"
        if now >= last and not eng.requests:
            return [made[i] for i in range(len(asks))], steps
        before = {i: (r, len(r.token_ids)) for i, r in eng.requests.items()}
        steps.append(eng.step())
        check(eng)
        check_step(eng, steps[-1], before)
    raise AssertionError(f"expected an end within {max_steps} steps, got {eng.requests}")


def serve_rightly(eng, asks):
    made, steps = serve(eng, asks)
    for requests, ask in zip(made, asks):
        assert len(requests) == ask.n
        for request in requests:
            assert_right(request, ask.prompt_ids)
    assert_empty(eng)
    return steps


KINDS = [
    ("paged", 1),
    ("paged", 3),
    ("paged", 4),
    ("paged", 16),
    ("contiguous", 4),
    ("prefix", 4),
]


def make_cache(kind, size, fused=False, num_tokens=96):
    """A pool of num_tokens in blocks of `size`, or so many rows of all tokens."""
    more = {"dtype": torch.float64, "fused_decode": fused}
    config = small_model().config
    if kind in ("paged", "prefix"):
        pool = PagedKVCache if kind == "paged" else PrefixKVCache
        return pool(config, num_tokens // size, size, **more)
    return ContiguousKVCache(config, size, config.max_seq_len - 1, **more)


def traffic(seed, num_asks=12, cancels=True, longest=30):
    rng = random.Random(seed)
    asks, arrives = [], 0
    for _ in range(num_asks):
        arrives += rng.choice([0, 0, 1, 5])
        ask = Ask(
            some_ids(rng, rng.choice([1, 2, 4, 8, rng.randint(1, longest)])),
            rng.choice([1, 2, rng.randint(1, longest)]),
            arrives,
            n=rng.choice([1, 1, 1, 2, 4]),
            stop_ids=tuple(rng.sample(range(V), rng.choice([0, 0, 1, 4]))),
        )
        if cancels and rng.random() < 0.3:
            ask.cancelled = {rng.randrange(ask.n): arrives + rng.randint(0, 8)}
        asks.append(ask)
    return asks


def test_the_oracle_can_tell_texts_apart():
    rng = random.Random(0)
    answers = [recomputed(tuple(some_ids(rng, 5)), 20) for _ in range(20)]
    assert len({tuple(answer[10:]) for answer in answers}) == 20
    assert sum(len(set(answer)) for answer in answers) > 20 * 5


# Equality.


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind, size", KINDS)
def test_greedy_texts_are_those_of_each_request_alone(kind, size, fused):
    preempted, pieces, forks, finished = 0, 0, 0, set()
    for seed, budget, watermark in [(0, 256, 0.0), (1, 7, 0.0), (2, 16, 0.4)]:
        asks = traffic(seed)
        cache = make_cache(kind, size, fused, num_tokens=64)
        eng = Engine(small_model(), cache, token_budget=budget, watermark=watermark)
        for step in serve_rightly(eng, asks):
            preempted += len(step.preempted)
            asked = step.next_ids.keys() | step.finished.keys()
            pieces += len(step.counts.keys() - asked)
            forks += len(asked - step.counts.keys())
            finished |= set(step.finished.values())
    assert pieces and finished == {"length", "stop"}
    assert bool(preempted) == bool(forks) == (kind != "contiguous")


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 1000])
def test_prompts_in_pieces_of_any_size_give_the_same_texts(budget):
    rng = random.Random(budget)
    asks = [Ask(some_ids(rng, n), 6, n=2) for n in (1, 7, 8, 9, 24)]
    eng = Engine(small_model(), make_cache("paged", 4), token_budget=budget)
    serve_rightly(eng, asks)


@pytest.mark.parametrize("prompt_len", range(1, 10))
@pytest.mark.parametrize("num_tokens", [12, 16, 100])
def test_forks_share_a_prompt_and_copy_only_what_they_write(prompt_len, num_tokens):
    rng = random.Random(prompt_len)
    cache = make_cache("paged", 4, num_tokens=num_tokens)
    eng = Engine(small_model(), cache)
    prompt_ids = some_ids(rng, prompt_len)
    requests = eng.add(prompt_ids, 4, n=4, temperature=0, request_id="a")
    assert [r.request_id for r in requests] == [("a", i) for i in range(4)]
    step = eng.step()
    assert step.counts == {("a", 0): prompt_len}, "one computes the prompt"
    assert list(step.next_ids) == [("a", i) for i in range(4)], "and all draw"
    assert cache.num_blocks - cache.num_free_blocks == math.ceil(prompt_len / 4)
    step = eng.step()
    check(eng)
    if num_tokens == 100:
        assert len(step.counts) == 4 and not step.preempted
        full, rest = divmod(prompt_len, 4)
        assert cache.num_blocks - cache.num_free_blocks == full + 4, (full, rest)
    eng.run()
    for request in requests:
        assert_right(request, prompt_ids)
    assert_empty(eng)


def test_a_step_gives_each_fork_its_own_seed():
    eng = Engine(small_model(), make_cache("paged", 4))
    first = eng.add([1, 2, 3], 12, n=5, seed=7)
    eng.run()
    assert len({tuple(r.new_ids) for r in first}) == 5
    for i, request in enumerate(first):
        alone = eng.add([1, 2, 3], 12, seed=7 + i)
        eng.run()
        assert alone.new_ids == request.new_ids
        assert alone.seed == request.seed == 7 + i


SAMPLING = [
    {"temperature": 1.0},
    {"temperature": 0.5, "top_k": 5},
    {"temperature": 2.0, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 9, "top_p": 0.9},
    {"temperature": 0},
]


def sampled_asks(seed):
    asks = traffic(seed, num_asks=9, cancels=False, longest=20)
    for i, ask in enumerate(asks):
        ask.arrives, ask.max_new_tokens = i // 4, ask.max_new_tokens + 6
        ask.sampling = {**SAMPLING[i % len(SAMPLING)], "seed": i}
    return asks


@functools.cache
def sampled_alone(seed):
    texts = []
    for ask in sampled_asks(seed):
        ask.arrives, answers = 0, []
        for i in range(ask.n):
            one = Ask(**{**vars(ask), "n": 1})
            one.sampling = {**ask.sampling, "seed": ask.sampling["seed"] + i}
            ((request,),), _ = serve(Engine(small_model(), make_cache("paged", 4)), [one])
            answers.append(request.token_ids)
        texts.append(answers)
    return texts


@pytest.mark.parametrize("kind, size", KINDS)
@pytest.mark.parametrize("budget", [3, 256])
def test_a_sampled_text_does_not_depend_on_company_budget_or_preemption(
    kind, size, budget
):
    cache = make_cache(kind, size, num_tokens=40)
    made, steps = serve(
        Engine(small_model(), cache, token_budget=budget), sampled_asks(0)
    )
    assert [[r.token_ids for r in requests] for requests in made] == sampled_alone(0)
    if kind == "paged" and budget == 256:
        assert sum(len(step.preempted) for step in steps) > 0


def test_a_sampled_text_is_the_same_after_steps_that_failed():
    rng = random.Random(0)
    eng = Engine(small_model(), make_cache("paged", 4, num_tokens=48), token_budget=9)
    asks = sampled_asks(0)
    made = [
        eng.add(ask.prompt_ids, ask.max_new_tokens, n=ask.n, stop_ids=ask.stop_ids,
                **ask.sampling)
        for ask in asks
    ]  # fmt: skip
    while eng.requests:
        if rng.random() < 0.5:
            with (
                Interrupt(rng.randrange(250), OWN),
                contextlib.suppress(KeyboardInterrupt),
            ):
                eng.step()
            check(eng)
        else:
            eng.step()
    made = [each if isinstance(each, list) else [each] for each in made]
    assert [[r.token_ids for r in requests] for requests in made] == sampled_alone(0)


def test_what_is_drawn_is_distributed_as_the_model_says():
    """Seeds in a row, as users and `n` take them, must not be drawn alike."""
    model, num_requests = small_model(), 500
    eng = Engine(model, make_cache("paged", 4, num_tokens=4000), token_budget=4000)
    requests = eng.add([3, 1, 4], 2, n=num_requests, seed=0, top_k=6, temperature=2.0)
    eng.run()
    with torch.no_grad():
        logits = model(torch.tensor([3, 1, 4]), torch.arange(3), attend_fused)[-1]
    probs = next_token_probs(logits, 2.0, top_k=6)
    counts = torch.bincount(torch.tensor([r.new_ids[0] for r in requests]), minlength=V)
    kept = probs > 0
    assert counts[~kept].sum() == 0
    expected = probs[kept] * num_requests
    chi_square = ((counts[kept] - expected) ** 2 / expected).sum().item()
    assert chi_square < 20.5, "5 degrees of freedom: above it in 1 of 1,000"
    # The first token says nothing about the second one's draw.
    pairs = {tuple(r.new_ids) for r in requests}
    assert len(pairs) > 2 * int(kept.sum())


# Hostile schedules.


def hostile():
    rng = random.Random(6)
    ids = functools.partial(some_ids, rng)
    stops_at_once = []
    for _ in range(12):
        prompt_ids = ids(rng.randint(1, 9))
        stops_at_once.append(Ask(prompt_ids, 9, n=rng.choice([1, 3])))
        stops_at_once[-1].stop_ids = tuple(recomputed(tuple(prompt_ids), 1))
    same = ids(8)
    storm = [Ask(ids(6), 12, arrives=i // 4, n=1 + i % 3) for i in range(24)]
    for i, ask in enumerate(storm):
        ask.cancelled = {j: i // 4 + rng.randint(0, 6) for j in range(ask.n)}
    spared = Ask(ids(5), 20)
    # Asks, tokens of the pool (in blocks of 4), budget.
    return {
        "all long": ([Ask(ids(30), 33) for _ in range(6)], 64, 16),
        "all equal": ([Ask(same, 9) for _ in range(12)], 48, 256),
        "one giant": (
            [Ask(ids(2), 4), Ask(ids(40), 24), *(Ask(ids(3), 5, i) for i in range(8))],
            64,
            12,
        ),
        "bursts": (
            [Ask(ids(rng.randint(1, 9)), 7, 20 * (i // 8)) for i in range(32)], 48, 20
        ),
        "three blocks": (
            [Ask(ids(i % 5 + 1), 8 - i % 3, n=1 + i % 4) for i in range(9)], 12, 256
        ),
        "budget of one": ([Ask(ids(i + 1), 4, i, n=1 + i % 3) for i in range(7)], 32, 1),
        "all stop at once": (stops_at_once, 32, 256),
        "five in a tiny pool": ([Ask(ids(5), 8, n=5), Ask(ids(4), 9, n=5)], 12, 256),
        "storm of cancels": ([*storm, spared], 40, 16),
        "at the blocks' edges": (
            [Ask(ids(n), m, n=1 + n % 3) for n in (4, 8, 12, 16) for m in (1, 4, 5)],
            32,
            8,
        ),
    }  # fmt: skip


HOSTILE = hostile()


@pytest.mark.parametrize("watermark", [0.0, 0.5])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schedules_end_with_every_text_right(name, watermark):
    asks, num_tokens, budget = HOSTILE[name]
    cache = make_cache("paged", 4, fused=True, num_tokens=num_tokens)
    eng = Engine(small_model(), cache, token_budget=budget, watermark=watermark)
    serve_rightly(eng, asks)


# Interrupts and errors.

OWN = (engine,)
CACHES = kv_cache, paged_kv_cache, prefix_cache, block_manager


def drain(eng, max_steps=500):
    """`run`, that fails instead of hanging."""
    for _ in range(max_steps):
        if not eng.requests:
            return
        eng.step()
        check(eng)
    raise AssertionError(f"expected an end within {max_steps} steps, got {eng.requests}")


def scenes():
    """By name: an engine in the middle of its work, and a call that is interrupted."""
    ids = functools.partial(some_ids, random.Random(3))
    long, short, other = ids(14), ids(3), ids(6)

    def forking(kind, size):
        eng = Engine(small_model(), make_cache(kind, size), token_budget=12)
        eng.add(short, 6, temperature=0)
        eng.step()
        eng.add(other, 1, temperature=0)
        eng.add(other, 5, n=3, temperature=0, stop_ids=[5])
        eng.add(long, 4, temperature=0)
        return eng, eng.step

    def behind():
        """A prompt in pieces, behind requests that ask in this step."""
        eng, _ = forking("paged", 4)
        eng.step()
        return eng, eng.step

    def preempting():
        eng = Engine(small_model(), make_cache("paged", 4, num_tokens=24))
        for prompt_ids in (short, short, other):
            eng.add(prompt_ids, 12, temperature=0)
        while len(eng.running) != 2 or eng.cache.num_free_blocks:
            eng.step()
        while eng.cache.blocks_needed({r.request_id: 1 for r in eng.running}) == 0:
            eng.step()
        return eng, eng.step

    def rows():
        """Of a contiguous cache: the one that came last has the first row."""
        eng = Engine(small_model(), make_cache("contiguous", 3), token_budget=12)
        eng.add(short, 1, temperature=0)
        for prompt_ids in (short, long, other):
            eng.add(prompt_ids, 9, n=2, temperature=0)
        for _ in range(4):
            eng.step()
        return eng, eng.step

    def cancelled_parent():
        eng = Engine(small_model(), make_cache("paged", 4), token_budget=8)
        eng.add(long, 5, n=3, temperature=0, request_id="a")
        eng.add(short, 5, temperature=0)
        eng.step()
        return eng, lambda: eng.cancel(("a", 0))

    def cancelled():
        eng, _ = behind()
        return eng, lambda: eng.cancel(eng.running[0].request_id)

    def added():
        eng, _ = behind()
        return eng, lambda: eng.add(other, 3, n=3, temperature=0, request_id="new")

    def served(kind, size, num_tokens):
        """All of it: requests are added, forked, sent back, and end."""
        eng = Engine(small_model(), make_cache(kind, size, num_tokens=num_tokens))
        eng.add(other, 3, temperature=0)
        eng.run()

        def call():
            eng.add(other, 6, n=2, temperature=0, stop_ids=[5])
            eng.add(other, 5, temperature=0)
            eng.run()

        return eng, call

    def streamed():
        eng, _ = forking("paged", 4)
        stream = eng.stream(other, 2, temperature=0)
        next(stream)
        return eng, lambda: list(stream)

    return {
        "a step that forks": functools.partial(forking, "paged", 4),
        "a step with a prompt in pieces": behind,
        "a step that preempts": preempting,
        "a step over rows": rows,
        "cancel, of whom others wait for": cancelled_parent,
        "cancel": cancelled,
        "add": added,
        "stream": streamed,
        "a whole run": functools.partial(served, "paged", 4, 20),
        "a whole run that finds texts": functools.partial(served, "prefix", 4, 20),
        "a whole run over rows": functools.partial(served, "contiguous", 2, None),
    }


SCENES = scenes()
CALLS = [name for name in SCENES if not name.startswith("a whole run")]
IN_THE_CACHE = [name for name in SCENES if name != "add"]  # which asks it for nothing


def interrupted_at_every_line(scene, every, modules=OWN):
    num_lines, is_through = 0, False
    while not is_through:
        eng, call = scene()
        requests = list(eng.requests.values())
        with Interrupt(num_lines, modules) as interrupt:
            try:
                call()
            except KeyboardInterrupt:
                assert interrupt.where
        is_through = interrupt.where is None
        try:
            check(eng)
            requests += [r for r in eng.requests.values() if r not in requests]
            drain(eng)
            for request in requests:
                assert_right(request, request.token_ids[: request.prompt_len])
            assert_empty(eng)
        except Exception as error:
            raise AssertionError(f"after an interrupt in {interrupt.where}") from error
        num_lines += every
    assert num_lines > 15 + every


@pytest.mark.parametrize("name", CALLS)
def test_after_an_interrupt_at_a_line_of_the_engine_all_texts_are_right(name):
    interrupted_at_every_line(SCENES[name], every=7)


@pytest.mark.nightly
@pytest.mark.parametrize("name", CALLS)
def test_after_an_interrupt_at_any_line_of_the_engine_all_texts_are_right(name):
    interrupted_at_every_line(SCENES[name], every=1)


@pytest.mark.parametrize("name", IN_THE_CACHE)
def test_after_an_interrupt_at_a_line_of_the_cache_all_texts_are_right(name):
    interrupted_at_every_line(SCENES[name], every=97, modules=CACHES)


@pytest.mark.nightly
@pytest.mark.parametrize("name", IN_THE_CACHE)
def test_after_an_interrupt_at_any_line_of_the_cache_all_texts_are_right(name):
    interrupted_at_every_line(SCENES[name], every=1, modules=CACHES)


@pytest.mark.parametrize("layer", [0, 1, "unembed"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_step_in_which_the_model_fails_changes_nothing(layer, error):
    eng, _ = SCENES["a step with a prompt in pieces"]()
    cache, requests = eng.cache, list(eng.requests.values())

    def state():
        texts = [list(r.token_ids) for r in requests]
        waiting = [r.request_id for r in eng.waiting]
        cached = dict(zip(cache.request_ids, cache.seq_lens.tolist()))
        return texts, waiting, cached, cache.num_free_blocks

    def fail(module, args):
        raise error("by the test")

    eng._make_room()
    eng._schedule_and_begin()
    before = state()
    model = small_model()
    module = model.unembed if layer == "unembed" else model.blocks[layer]
    with module.register_forward_pre_hook(fail):
        for _ in range(3):
            with pytest.raises(error):
                eng.step()
            check(eng)
            assert state() == before
    drain(eng)
    for request in requests:
        assert_right(request, request.token_ids[: request.prompt_len])
    assert_empty(eng)


def test_logits_without_numbers_end_that_request_alone():
    rng = random.Random(1)
    for kind, size, fused in [
        ("paged", 4, True),
        ("paged", 4, False),
        ("contiguous", 4, True),
    ]:
        eng = Engine(small_model(), make_cache(kind, size, fused), token_budget=9)
        prompts = [some_ids(rng, 6) for _ in range(5)]
        prompts[1][5] = prompts[3][0] = BAD_ID
        asks = [Ask(prompt_ids, 8, n=2) for prompt_ids in prompts]
        steps = serve_rightly(eng, asks)
        finished = {k: v for step in steps for k, v in step.finished.items()}
        for i in range(5):
            for j in range(2):
                reason = finished[f"ask {i}", j]
                assert reason.startswith("error: expected") == (i in (1, 3)), reason


# Streams.


def test_a_stream_gives_each_token_once_and_lets_others_go_on():
    eng = Engine(small_model(), make_cache("paged", 4, num_tokens=24))
    other = eng.add([9, 8], 6, temperature=0)
    prompts = [[1, 2, 3], [4, 5, 6, 7], [8]]
    streams = [eng.stream(prompt_ids, 7, temperature=0) for prompt_ids in prompts]
    assert len(eng.requests) == 1, "a stream begins when somebody asks"
    got = [[] for _ in streams]
    for tokens in itertools.zip_longest(*streams):
        for each, token_id in zip(got, tokens):
            each += [] if token_id is None else [token_id]
        check(eng)
    assert got == [recomputed(tuple(prompt_ids), 7) for prompt_ids in prompts]
    drain(eng)
    assert_right(other, [9, 8])
    assert_empty(eng)


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_a_stream_that_nobody_reads_on_is_cancelled(num_tokens):
    eng = Engine(small_model(), make_cache("paged", 4))
    stream = eng.stream([1, 2, 3], 9, temperature=0, request_id="a")
    for _ in range(num_tokens):
        next(stream)
    assert ("a" in eng.requests) == (num_tokens > 0)
    stream.close()
    assert_empty(eng)


def test_a_stream_that_somebody_else_cancels_ends():
    eng = Engine(small_model(), make_cache("paged", 4))
    stream = eng.stream([1, 2, 3], 9, temperature=0, request_id="a")
    first = next(stream)
    eng.step()
    eng.cancel("a")
    assert [first, *stream] == recomputed((1, 2, 3), 2), "with what was there already"
    assert_empty(eng)


def test_a_stream_that_is_interrupted_after_its_last_token_says_nothing_else():
    """Not that it cannot be cancelled any more."""
    eng, _ = SCENES["stream"]()
    eng.run()
    for when in itertools.count():
        stream = eng.stream([1, 2, 3], 1, temperature=0)
        with Interrupt(when, OWN) as interrupt:
            try:
                assert list(stream) == recomputed((1, 2, 3), 1)
            except KeyboardInterrupt as error:
                assert error.__context__ is None or when < 5
        if interrupt.where is None:
            break
        stream.close()
        drain(eng)
        assert_empty(eng)


# The plain functions.


def schedule_token_by_token(running, waiting, free, budget, block_size, watermark=0):
    """`schedule`, one token at a time."""
    counts, has = [0] * len(running), [load.num_blocks for load in running]
    decodes = [i for i, x in enumerate(running) if x.num_tokens - x.num_cached == 1]
    prompts = [i for i in range(len(running)) if i not in decodes]
    for i in decodes + prompts:
        load = running[i]
        while budget and load.num_cached + counts[i] < load.num_tokens:
            needed = max(
                math.ceil((load.num_cached + counts[i] + 1) / block_size), has[i]
            )
            if needed - has[i] > free:
                break
            free, has[i] = free - (needed - has[i]), needed
            counts[i], budget = counts[i] + 1, budget - 1
    for load in waiting:
        needed = math.ceil(load.num_tokens / block_size) - load.num_blocks
        spare = free - needed - (watermark if counts else 0)
        if not budget or spare < 0:
            break
        free -= needed
        counts.append(min(budget, load.num_tokens - load.num_cached))
        budget -= counts[-1]
    return counts


@st.composite
def loads(draw):
    block_size = draw(st.integers(1, 5))
    running, waiting = [], []
    for _ in range(draw(st.integers(0, 5))):
        num_cached = draw(st.integers(0, 12))
        num_tokens = num_cached + draw(st.sampled_from([1, 1, 2, 7, 12]))
        full = math.ceil(num_cached / block_size)
        is_shared = num_cached % block_size > 0 and draw(st.booleans())
        running.append(Load(num_tokens, num_cached, full - is_shared))
    for _ in range(draw(st.integers(0, 4))):
        num_tokens = draw(st.integers(1, 12))
        shared = draw(st.integers(0, (num_tokens - 1) // block_size))
        in_use = draw(st.integers(0, shared))
        waiting.append(Load(num_tokens, shared * block_size, in_use))
    return running, waiting, block_size


@settings(max_examples=600, deadline=None, derandomize=True)
@given(loads(), st.integers(0, 12), st.integers(1, 20), st.integers(0, 4))
def test_schedule_keeps_its_promises(some, free, budget, watermark):
    running, waiting, size = some
    seen = []

    def looked_at():
        for load in waiting:
            seen.append(load)
            yield load

    counts = schedule(running, looked_at(), free, budget, size, watermark)
    arguments = running, waiting, free, budget, size, watermark
    assert counts == schedule_token_by_token(*arguments)

    begun = counts[len(running) :]
    assert sum(counts) <= budget and min(counts, default=0) >= 0
    assert all(count > 0 for count in begun), "nobody begins without a token"
    assert len(seen) <= len(begun) + 1, "it looks no further than it must"
    taken = 0
    for load, count in zip(running + waiting, counts):
        assert count <= load.num_tokens - load.num_cached
        if count:
            blocks = math.ceil((load.num_cached + count) / size)
            taken += max(blocks - load.num_blocks, 0)
    assert taken <= free
    # Whoever begins leaves the watermark free, for all that it knows.
    if begun and running:
        rest = free
        for load, _ in zip(running + waiting, counts):
            rest -= max(math.ceil(load.num_tokens / size) - load.num_blocks, 0)
        assert rest >= watermark
    # Somebody comes further, if somebody can.
    if not any(counts):
        for load in running:
            blocks = math.ceil((load.num_cached + 1) / size)
            assert blocks - load.num_blocks > free
        if not running and waiting:
            blocks = math.ceil(waiting[0].num_tokens / size)
            assert blocks - waiting[0].num_blocks > free


def test_schedule_by_hand():
    decode, prompt = Load(9, 8, 2), Load(12, 0, 0)
    assert schedule([], [], 4, 8, 4) == []
    assert schedule([prompt, decode], [], 4, 8, 4) == [7, 1], "decodes first"
    assert schedule([decode] * 3, [], 2, 8, 4) == [1, 1, 0]
    assert schedule([decode] * 3, [], 9, 2, 4) == [1, 1, 0]
    assert schedule([], [prompt, Load(1, 0, 0)], 2, 8, 4) == [], "nobody overtakes"
    assert schedule([], [prompt], 3, 8, 4, watermark_blocks=3) == [8]
    assert schedule([Load(8, 7, 2)], [prompt], 3, 8, 4, watermark_blocks=1) == [1]
    assert schedule([], [prompt, prompt], 6, 99, 4, watermark_blocks=1) == [12]
    # A fork that gets no block to copy into does not take another's room.
    fork, roomy = Load(6, 5, 1), Load(6, 5, 2)
    assert schedule([fork, fork, roomy], [], 1, 8, 4) == [1, 0, 1]


def test_finish_reason_looks_at_the_last_token_and_the_length():
    assert finish_reason([5], 2) is None
    assert finish_reason([5, 6], 2) == "length"
    assert finish_reason([5, 6, 7], 2) == "length"
    assert finish_reason([5, 6], 2, [6]) == finish_reason([6], 2, {6, 9}) == "stop"
    assert finish_reason([6, 5], 3, [6]) is None


def test_preempt_sends_back_who_began_last_with_all_its_tokens():
    cache = make_cache("paged", 4)
    eng = Engine(small_model(), cache)
    requests = [eng.add([1, 2, i], 5, temperature=0) for i in range(3)]
    eng.step()
    last, running = eng.running[-1], list(eng.running)
    new = eng.add([7], 5, temperature=0)
    num_free = cache.num_free_blocks
    assert preempt(eng.running, eng.waiting, cache) is last is requests[2]
    assert eng.running == running[:2] and eng.waiting == deque([last, new])
    assert last.request_id not in cache.request_ids and len(last.token_ids) == 4
    assert cache.num_free_blocks == num_free + 1
    drain(eng)
    assert_right(last, [1, 2, 2])


def test_latencies_in_seconds():
    assert latencies(2.0, [5.0]) == {"first": 3.0, "between": 0.0, "normalized": 3.0}
    got = latencies(1.0, [2.0, 2.5, 4.0, 5.0])
    assert got == {"first": 1.0, "between": 1.0, "normalized": 1.0}


def test_tokens_that_fit_in_bytes():
    assert tokens_that_fit(1000, 400, 10, share=1) == 60
    assert tokens_that_fit(1000, 400, 10, share=0.5) == 10
    assert tokens_that_fit(1000, 400, 7, share=1) == 85, "rounded down"
    assert tokens_that_fit(1000, 400, 10) == 50
    assert tokens_that_fit(1000, 2000, 10) == 0
    assert isinstance(tokens_that_fit(1e9, 1e3, 10.0), int)


# Bad input.

LIVE, GONE = "live", "gone"
BAD_ADDS = {
    "longer than the pool": (([1] * 50, 9), {}),
    "longer than the model": (([1] * 60, 5), {}),
    "one token too long for the pool": (([1] * 40, 10), {}),
    "empty": (([], 3), {}),
    "empty tensor": ((torch.zeros(0, dtype=torch.int64), 3), {}),
    "id too large": (([1, V], 3), {}),
    "id below zero": (([1, -1], 3), {}),
    "floats": (([1.0, 2.0], 3), {}),
    "bools": (([True, False], 3), {}),
    "int32": ((torch.tensor([1, 2], dtype=torch.int32), 3), {}),
    "two dimensions": (([[1, 2], [3, 4]], 3), {}),
    "no dimension": ((torch.tensor(5), 3), {}),
    "ragged": (([[1, 2], [3]], 3), {}),
    "no new tokens": (([1], 0), {}),
    "True new tokens": (([1], True), {}),
    "1.5 new tokens": (([1], 1.5), {}),
    "n of 0": (([1], 3), {"n": 0}),
    "n of 1.0": (([1], 3), {"n": 1.0}),
    "n of True": (([1], 3), {"n": True}),
    "id of a live one": (([1], 3), {"request_id": LIVE}),
    "id of a live fork": (([1], 3), {"request_id": "forks", "n": 2}),
    "seed below zero": (([1], 3), {"seed": -1}),
    "seed of 1.5": (([1], 3), {"seed": 1.5}),
    "temperature below zero": (([1], 3), {"temperature": -0.1}),
    "temperature NaN": (([1], 3), {"temperature": math.nan}),
    "top_k of 0": (([1], 3), {"top_k": 0}),
    "top_p of 0": (([1], 3), {"top_p": 0}),
    "top_p above 1": (([1], 3), {"top_p": 1.1}),
    "stop_ids an int": (([1], 3), {"stop_ids": 5}),
    "stop_ids a word": (([1], 3), {"stop_ids": "ab"}),
    "stop_ids floats": (([1], 3), {"stop_ids": [1.0]}),
    "stop_ids of another model": (([1], 3), {"stop_ids": [V]}),
}


def in_the_middle():
    """An engine at work: an id that lives, one that has ended, forks that wait."""
    eng = Engine(small_model(), make_cache("paged", 4, num_tokens=48), token_budget=8)
    eng.add([1], 1, request_id=GONE, temperature=0)
    eng.add([1, 2, 3], 9, request_id=LIVE, temperature=0)
    eng.add(list(range(14)), 5, n=3, request_id="forks", temperature=0)
    eng.step()
    return eng


def assert_refused(eng, call, match="expected .*got"):
    def state():
        requests = {i: list(r.token_ids) for i, r in eng.requests.items()}
        order = [r.number for r in eng.running], [r.number for r in eng.waiting]
        cache = eng.cache
        return requests, order, cache.request_ids, cache.seq_lens.tolist()

    before, requests = state(), list(eng.requests.values())
    with pytest.raises(ValueError, match=match):
        call()
    check(eng)
    assert state() == before
    drain(eng)
    for request in requests:
        assert_right(request, request.token_ids[: request.prompt_len])
    assert_empty(eng)


@pytest.mark.parametrize("name", BAD_ADDS)
def test_what_could_never_be_served_is_refused_and_nothing_changes(name):
    args, more = BAD_ADDS[name]
    eng = in_the_middle()
    assert_refused(eng, lambda: eng.add(*args, **{"temperature": 0, **more}))


@pytest.mark.parametrize("request_id", [GONE, "nobody", None, ("forks", 3)])
def test_only_live_requests_can_be_cancelled(request_id):
    eng = in_the_middle()
    assert_refused(eng, lambda: eng.cancel(request_id))


def test_nobody_is_cancelled_twice():
    eng = in_the_middle()
    eng.cancel(("forks", 1))
    with pytest.raises(ValueError, match="expected one of"):
        eng.cancel(("forks", 1))
    drain(eng)


@pytest.mark.parametrize("more", [{"n": 2}, {"n": 0}, {"seed": -1}])
def test_a_stream_refuses_what_it_cannot_give(more):
    eng = in_the_middle()
    assert_refused(eng, lambda: next(eng.stream([1], 3, **more)))


@pytest.mark.parametrize("more", [
    {"token_budget": 0}, {"token_budget": True}, {"token_budget": 2.5},
    {"watermark": 1.0}, {"watermark": -0.1}, {"watermark": math.nan},
])  # fmt: skip
def test_an_engine_refuses_settings_without_meaning(more):
    with pytest.raises(ValueError, match="expected .*got"):
        Engine(small_model(), make_cache("paged", 4), **more)


def test_an_engine_refuses_a_cache_that_others_use_or_that_is_of_another_model():
    cache = make_cache("paged", 4)
    cache.begin("somebody")
    with pytest.raises(ValueError, match="expected one without requests, got"):
        Engine(small_model(), cache)
    config = random_model(num_layers=3).config
    with pytest.raises(ValueError, match="cache: expected .*got"):
        Engine(small_model(), PagedKVCache(config, 4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="cache: expected .*got"):
        Engine(small_model(), PagedKVCache(small_model().config, 4, 4))
    dropping = random_model(dropout=0.5).train()
    with pytest.raises(ValueError, match="expected eval mode"):
        Engine(dropping, PagedKVCache(dropping.config, 4, 4))


def test_ids_that_the_engine_gives_are_those_of_nobody():
    eng = Engine(small_model(), make_cache("paged", 4))
    for request_id in (3, 4, (8, 1)):
        eng.add([1], 2, request_id=request_id)
    requests = [eng.add([1], 2) for _ in range(3)] + eng.add([1], 2, n=2)
    assert len({r.request_id for r in requests}) == 5 and len(eng.requests) == 8
    drain(eng)


def test_stop_ids_of_any_kind_hold_for_every_answer():
    token_id = recomputed((1, 2, 3), 3)[2]
    kinds = [[token_id], {token_id}, iter([token_id]), torch.tensor([token_id]), range(V)]
    for stop_ids in kinds:
        eng = Engine(small_model(), make_cache("paged", 4))
        requests = eng.add([1, 2, 3], 9, n=3, temperature=0, stop_ids=stop_ids)
        eng.run()
        assert {r.finish_reason for r in requests} == {"stop"}
        assert len({tuple(r.new_ids) for r in requests}) == 1


def test_an_answer_fills_the_pool_to_its_last_place():
    for kind, size, prompt_len in [("paged", 4, 30), ("contiguous", 1, 40)]:
        eng = Engine(small_model(), make_cache(kind, size, num_tokens=48))
        num_new = eng.cache.capacity + 1 - prompt_len
        serve_rightly(eng, [Ask([1] * prompt_len, num_new)])


def test_who_is_cancelled_leaves_its_work_to_those_who_wait_for_it():
    eng = Engine(small_model(), make_cache("paged", 4), token_budget=8)
    first, *others = eng.add(list(range(14)), 5, n=3, request_id="a", temperature=0)
    eng.step()
    eng.cancel(("a", 0))
    check(eng)
    assert eng.cache.seq_lens.tolist() == [8] and eng.running == [others[0]]
    assert eng.step().counts == {("a", 1): 6}, "the rest of the prompt"
    drain(eng)
    assert first.finish_reason == "cancelled"
    for request in others:
        assert_right(request, range(14))


# Random calls.

_rng = random.Random(8)
PROMPTS = [some_ids(_rng, n) for n in (1, 1, 2, 3, 4, 4, 5, 7, 8, 9, 12, 16, 17)]
PROMPTS += [PROMPTS[9][:4] + some_ids(_rng, 5), [*PROMPTS[4], BAD_ID]]


@functools.cache
def answer_alone(prompt, max_new_tokens, stop_ids, sampling):
    """The answer, and why it ends, of prompt number `prompt`: nobody else is there."""
    sampling = dict(sampling)
    if sampling["temperature"] == 0:
        return greedy_answer(PROMPTS[prompt], max_new_tokens, stop_ids)
    eng = Engine(small_model(), make_cache("paged", 4))
    request = eng.add(PROMPTS[prompt], max_new_tokens, stop_ids=stop_ids, **sampling)
    eng.run()
    return request.new_ids, request.finish_reason.split(":")[0]


class EngineAgainstEachAlone(RuleBasedStateMachine):
    """After each call all is in order; at the end all texts are right and none leaks."""

    max_new_tokens = 8

    @initialize(
        kind=st.sampled_from(KINDS),
        fused=st.booleans(),
        budget=st.sampled_from([1, 3, 8, 64]),
        watermark=st.sampled_from([0.0, 0.3]),
        num_tokens=st.sampled_from([24, 32, 96]),
    )
    def make(self, kind, fused, budget, watermark, num_tokens):
        cache = make_cache(*kind, fused, num_tokens=max(num_tokens, kind[1] * 2))
        self.eng = Engine(small_model(), cache, token_budget=budget, watermark=watermark)
        self.known = {}  # request -> arguments of `answer_alone`
        self.streams = []  # (generator, its id, tokens that it gave, arguments)
        self.num_named, self.cancelled = 0, set()

    def settings_of(self, prompt, num_new, stop_id, seed):
        """Greedy where seed is None."""
        num_new = min(num_new, self.eng.cache.capacity + 1 - len(PROMPTS[prompt]))
        sampling = {"temperature": 0}
        if seed is not None:
            sampling = {"temperature": 1.5, "top_k": 9, "seed": seed}
        stop_ids = () if stop_id is None else (stop_id,)
        return prompt, num_new, stop_ids, sampling

    asks = {
        "prompt": st.integers(0, len(PROMPTS) - 1),
        "num_new": st.integers(1, max_new_tokens),
        "stop_id": st.none() | st.integers(0, 4),
        "seed": st.none() | st.integers(0, 2),
    }
    lines = st.integers(0, 60) | st.integers(0, 300)

    @rule(**asks, n=st.sampled_from([1, 1, 2, 4]), when=st.none() | st.integers(0, 80))
    def add(self, prompt, num_new, stop_id, seed, n, when):
        prompt, num_new, stop_ids, sampling = self.settings_of(
            prompt, num_new, stop_id, seed
        )
        if num_new < 1:
            return
        self.num_named += 1
        old = set(self.eng.requests)
        self.maybe_interrupted(
            when,
            lambda: self.eng.add(
                PROMPTS[prompt],
                num_new,
                n=n,
                stop_ids=stop_ids,
                request_id=self.num_named,
                **sampling,
            ),
        )
        new = [r for i, r in self.eng.requests.items() if i not in old]
        assert len(new) in (0, n) and (new or when is not None)
        for i, request in enumerate(new):
            own = {**sampling, "seed": seed + i} if seed is not None else sampling
            self.known[request] = prompt, num_new, stop_ids, tuple(own.items())

    def maybe_interrupted(self, when, call, modules=OWN):
        if when is None:
            call()
            return
        with Interrupt(when, modules), contextlib.suppress(KeyboardInterrupt):
            call()

    @rule(num_steps=st.integers(1, 4))
    def step(self, num_steps):
        for _ in range(num_steps):
            before = {i: (r, len(r.token_ids)) for i, r in self.eng.requests.items()}
            check_step(self.eng, self.eng.step(), before)
            check(self.eng)

    @precondition(lambda self: self.eng.requests)
    @rule(when=lines)
    def interrupted_step(self, when):
        self.maybe_interrupted(when, self.eng.step)

    @precondition(lambda self: self.eng.requests)
    @rule(when=st.integers(0, 1200))
    def step_that_is_interrupted_in_the_cache(self, when):
        self.maybe_interrupted(when, self.eng.step, CACHES)

    @precondition(lambda self: self.eng.requests)
    @rule(layer=st.integers(0, 1), error=st.sampled_from([RuntimeError, ValueError]))
    def step_in_which_the_model_fails(self, layer, error):
        def fail(module, args):
            raise error("by the test")

        block = small_model().blocks[layer]
        with block.register_forward_pre_hook(fail), contextlib.suppress(error):
            self.eng.step()

    @precondition(lambda self: self.eng.requests)
    @rule(number=st.integers(0, 9), when=st.none() | st.integers(0, 60))
    def cancel(self, number, when):
        live = list(self.eng.requests)
        request_id = live[number % len(live)]
        self.cancelled.add(request_id)
        self.maybe_interrupted(when, lambda: self.eng.cancel(request_id))

    @rule()
    def call_wrongly(self):
        with pytest.raises(ValueError, match="expected"):
            self.eng.cancel("nobody")
        with pytest.raises(ValueError, match="expected"):
            self.eng.add([1.5], 3)
        for request_id in self.eng.requests:
            with pytest.raises(ValueError, match="expected"):
                self.eng.add([1], 3, request_id=request_id)

    @precondition(lambda self: len(self.streams) < 3)
    @rule(**asks)
    def stream(self, **asks):
        prompt, num_new, stop_ids, sampling = self.settings_of(**asks)
        if num_new < 1:
            return
        self.num_named += 1
        stream = self.eng.stream(
            *(PROMPTS[prompt], num_new),
            stop_ids=stop_ids,
            request_id=self.num_named,
            **sampling,
        )
        arguments = prompt, num_new, stop_ids, tuple(sampling.items())
        self.streams.append((stream, self.num_named, [], arguments))

    @precondition(lambda self: self.streams)
    @rule(number=st.integers(0, 2), when=st.none() | lines)
    def read(self, number, when):
        one = stream, request_id, got, arguments = self.streams[
            number % len(self.streams)
        ]
        with Interrupt(10**9 if when is None else when, OWN):
            try:
                got.append(next(stream))
                return
            except (StopIteration, KeyboardInterrupt) as end:
                is_whole = isinstance(end, StopIteration)
        self.streams.remove(one)
        expected, _ = answer_alone(*arguments)
        assert got == expected[: len(got)]
        if is_whole and request_id not in self.cancelled:
            assert got == expected

    @precondition(lambda self: self.streams)
    @rule(number=st.integers(0, 2))
    def abandon(self, number):
        stream, _, got, arguments = self.streams.pop(number % len(self.streams))
        stream.close()
        assert got == answer_alone(*arguments)[0][: len(got)]

    @invariant()
    def all_is_in_order(self):
        if hasattr(self, "eng"):
            check(self.eng)

    def teardown(self):
        if not hasattr(self, "eng"):
            return
        for stream, *_ in self.streams:
            stream.close()
        drain(self.eng, max_steps=2000)
        for request, arguments in self.known.items():
            expected, reason = answer_alone(*arguments)
            got, got_reason = request.new_ids, request.finish_reason.split(":")[0]
            if got_reason == "cancelled":
                assert got == expected[: len(got)]
            else:
                assert (got, got_reason) == (expected, reason)
        assert_empty(self.eng)


def case_of(machine, **changes):
    case = type(machine.__name__, (machine,), {}).TestCase
    case.settings = settings(deadline=None, **changes)
    return case


SHORT = {"max_examples": 60, "stateful_step_count": 40, "derandomize": True}
LONG = {"max_examples": 400, "stateful_step_count": 60, "print_blob": True}

TestEngine = case_of(EngineAgainstEachAlone, **SHORT)
TestEngineNightly = pytest.mark.nightly(case_of(EngineAgainstEachAlone, **LONG))


@pytest.mark.nightly
@pytest.mark.parametrize("kind, size", [("paged", 4), ("contiguous", 6)])
def test_ten_thousand_requests(kind, size):
    rng, known = random.Random(10), {}
    cache = make_cache(kind, size, fused=True, num_tokens=160)
    eng = Engine(small_model(), cache, token_budget=48, watermark=0.05)
    while len(known) < 10_000 or eng.requests:
        while len(known) < 10_000 and len(eng.waiting) < 12 and rng.random() < 0.7:
            prompt, num_new, n = (
                rng.randrange(15),
                rng.randint(1, 8),
                rng.choice([1, 1, 3]),
            )
            made = eng.add(PROMPTS[prompt], num_new, n=n, temperature=0)
            for request in made if n > 1 else [made]:
                known[request] = prompt, num_new, (), (("temperature", 0),)
        if eng.requests and rng.random() < 0.05:
            eng.cancel(rng.choice(list(eng.requests)))
        if rng.random() < 0.05:
            with (
                Interrupt(rng.randrange(300), OWN),
                contextlib.suppress(KeyboardInterrupt),
            ):
                eng.step()
        else:
            eng.step()
        check(eng)
    for request, arguments in known.items():
        expected, reason = answer_alone(*arguments)
        if request.finish_reason == "cancelled":
            assert request.new_ids == expected[: len(request.new_ids)]
        else:
            assert request.new_ids == expected
            assert request.finish_reason.split(":")[0] == reason
    assert_empty(eng)
