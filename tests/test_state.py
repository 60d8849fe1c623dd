"""A state of fixed size against plain loops: three forms of each rule, what each layer
remembers of a text, and that a cache of it gives what training has seen."""

import functools
import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, attentive_model, begun, random_ids

from lib.config import TINY, ModelConfig
from lib.generate import forward_cached, generate_cached
from lib.kv_cache import kv_cache_bytes
from lib.measure import quality
from lib.measure.meter import measure
from lib.model import attend_causal
from lib.state import (
    Delta,
    Linear,
    StateCache,
    Window,
    attend_by,
    decay_mask,
    delta_chunked,
    delta_parallel,
    delta_step,
    linear_chunked,
    linear_parallel,
    linear_step,
    state_bytes,
)

V, D = 32, 4
RULES = "linear", "delta"
MEMORIES = {
    "sum": Linear(),
    "decay": Linear(0.8),
    "delta": Delta(),
    "window": Window(4),
    "window of one": Window(1),
}
BY_LAYER = {
    **MEMORIES,
    "window, then delta": [Window(4), Delta()],
    "decay, then sum": [Linear(0.7), Linear()],
    "delta, then window": (Delta(), Window(3)),
}
both_rules = pytest.mark.parametrize("rule", RULES)
every_memory = pytest.mark.parametrize("name", MEMORIES)
a_few_heads = pytest.mark.parametrize("H, G", [(4, 4), (6, 2), (3, 1)])


def drawn(T, H=6, G=2, lead=(), dtype=torch.float64):
    """q (..., T, H, D) and k, v (..., T, G, D); keys of length 1."""
    q, k, v = (torch.randn(*lead, T, n, D, dtype=torch.float64) for n in (H, G, G))
    return [x.to(dtype) for x in (q, F.normalize(k, dim=-1), v)]


def decays(G):
    """Of each head another, 1 among them."""
    return torch.tensor([1.0, 0.9, 0.5, 0.99][:G], dtype=torch.float64)


def by_loops(rule, state, q, k, v, decay):
    """out (T, H, D) and the state after it, number by number."""
    (T, H, _), G = q.shape, k.shape[1]
    S, q, k, v, decay = (x.tolist() for x in (state, q, k, v, decay))
    outs = []
    for t in range(T):
        for g, i in itertools.product(range(G), range(D)):
            said = sum(S[g][i][j] * k[t][g][j] for j in range(D))
            keep, new = (decay[g], v[t][g][i])
            if rule == "delta":
                keep, new = 1, v[t][g][i] - said
            for j in range(D):
                S[g][i][j] = keep * S[g][i][j] + new * k[t][g][j]
        for h, i in itertools.product(range(H), range(D)):
            row = S[h * G // H][i]
            outs.append(sum(x * y for x, y in zip(row, q[t][h])))
    out = torch.tensor(outs, dtype=torch.float64).view(T, H, D)
    return out, torch.tensor(S, dtype=torch.float64)


def by_steps(rule, state, q, k, v, decay):
    outs = [q[:0]]
    for new in zip(q, k, v):
        if rule == "linear":
            out, state = linear_step(state, *new, decay)
        else:
            out, state = delta_step(state, *new)
        outs.append(out.unsqueeze(0))
    return torch.cat(outs), state


def in_chunks(rule, state, q, k, v, decay, chunk_size=64):
    if rule == "linear":
        return linear_chunked(state, q, k, v, decay, chunk_size)
    return delta_chunked(state, q, k, v, chunk_size)


def at_once(rule, q, k, v, decay):
    return (
        linear_parallel(q, k, v, decay) if rule == "linear" else delta_parallel(q, k, v)
    )


def assert_same(got, expected, tolerance=1e-10):
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


# Three forms of one thing.


@both_rules
@a_few_heads
@pytest.mark.parametrize("T", [0, 1, 2, 13])
def test_steps_and_chunks_are_what_plain_loops_compute(T, H, G, rule):
    text, start = [*drawn(T, H, G), decays(G)], torch.randn(G, D, D, dtype=torch.float64)
    before = start.clone()
    for state in (start, torch.zeros_like(start)):
        expected = by_loops(rule, state, *text)
        assert_same(by_steps(rule, state, *text), expected)
        for chunk_size in {1, 5, 12, max(T, 1), 99}:
            assert_same(in_chunks(rule, state, *text, chunk_size), expected)
    assert_same([at_once(rule, *text)], expected[:1])
    assert torch.equal(start, before), "expected the old state as it was"


@both_rules
@a_few_heads
@pytest.mark.parametrize("lead", [(2,), (2, 1, 3)])
def test_texts_side_by_side_are_as_each_alone(lead, H, G, rule):
    q, k, v = drawn(7, H, G, lead)
    got = at_once(rule, q, k, v, decays(G))
    assert got.shape == q.shape
    nothing = torch.zeros(G, D, D, dtype=torch.float64)
    for index in itertools.product(*map(range, lead)):
        text = [x[index] for x in (q, k, v)]
        assert_same([got[index]], by_loops(rule, nothing, *text, decays(G))[:1])


@both_rules
def test_the_state_after_chunks_is_where_the_text_goes_on(rule):
    text, state = drawn(23), torch.randn(2, D, D, dtype=torch.float64)
    expected, end = by_loops(rule, state, *text, decays(2))
    outs = []
    for part in zip(*(x.split([9, 0, 1, 13]) for x in text)):
        out, state = in_chunks(rule, state, *part, decays(2), 4)
        outs.append(out)
    assert_same([torch.cat(outs), state], [expected, end])


def gradients(form, inputs, weights):
    inputs = [x.clone().requires_grad_() for x in inputs]
    outs = form(*inputs)
    loss = sum((out * weight).sum() for out, weight in zip(outs, weights))
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


@both_rules
def test_gradients_are_equal_in_all_forms(rule):
    text = [*drawn(11), decays(2)]
    state = torch.randn(2, D, D, dtype=torch.float64)
    weights = torch.randn_like(text[0]), torch.randn_like(state)
    expected = gradients(functools.partial(by_steps, rule), [state, *text], weights)
    for chunk_size in (1, 4, 11, 99):
        form = functools.partial(in_chunks, rule, chunk_size=chunk_size)
        assert_same(gradients(form, [state, *text], weights), expected)
    nothing = torch.zeros_like(state)
    expected = gradients(lambda *x: by_steps(rule, nothing, *x)[:1], text, weights)
    assert_same(gradients(lambda *x: [at_once(rule, *x)], text, weights), expected)


@both_rules
def test_the_gradient_of_chunks_is_that_of_small_differences(rule):
    inputs = [torch.randn(1, D, D, dtype=torch.float64), *drawn(5, 2, 1)]
    inputs.append(torch.tensor([0.7], dtype=torch.float64))
    if rule == "delta":
        inputs.pop()
    form = functools.partial(linear_chunked if rule == "linear" else delta_chunked)
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(functools.partial(form, chunk_size=2), inputs)


# Long texts.


def keys_of(kind, T):
    """k (T, 1, D), each of length 1."""
    k = F.normalize(torch.randn(T, 1, D, dtype=torch.float64), dim=-1)
    signs = torch.randint(2, (T, 1, 1)) * 2 - 1
    if kind == "equal":
        k = k[:1].expand(T, -1, -1)
    if kind == "opposite":
        k = k[:1] * signs
    if kind == "a few, of both signs":
        k = k[torch.randint(3, (T,))] * signs
    return k


@pytest.mark.parametrize(
    "rule, decay, kind",
    [
        ("linear", 1.0, "random"),
        ("linear", 0.97, "random"),
        ("linear", 0.5, "random"),
        ("delta", 1.0, "random"),
        ("delta", 1.0, "equal"),
        ("delta", 1.0, "opposite"),
        ("delta", 1.0, "a few, of both signs"),
    ],
)
def test_4096_tokens_in_32_bits_stay_near_those_in_64(rule, decay, kind):
    T = 4096
    q, _, v = drawn(T, 1, 1)
    text = [q, keys_of(kind, T), v, torch.tensor([decay], dtype=torch.float64)]
    nothing = torch.zeros(1, D, D, dtype=torch.float64)
    expected, end = by_steps(rule, nothing, *text)
    text, nothing = [x.float() for x in text], nothing.float()
    for name, (out, *state) in {
        "steps": by_steps(rule, nothing, *text),
        "chunks": in_chunks(rule, nothing, *text),
        "at once": (at_once(rule, *text),),
    }.items():
        for got, exact in zip([out, *state], [expected, end]):
            error = (got.double() - exact).abs().max() / exact.abs().max()
            assert error < 2e-4, f"{name}: expected less than 2e-4 apart, got {error}"


def test_what_is_left_of_a_token_is_a_product_of_decays():
    decay, T = torch.tensor([0.5, 0.93, 1.0], dtype=torch.float64), 9
    mask = decay_mask(decay, T)
    assert mask.shape == (3, T, T) and mask.dtype == torch.float64
    for g, t, s in itertools.product(range(3), range(T), range(T)):
        expected = math.prod([decay[g].item()] * (t - s)) if s <= t else 0
        assert mask[g, t, s].item() == pytest.approx(expected, rel=1e-12)
    assert decay_mask(decay, 0).shape == (3, 0, 0)


def test_below_the_diagonal_the_mask_is_a_column_times_a_row():
    """It is semiseparable (Mamba-2, section 3): why one number per state dimension is
    enough to carry all of the past."""
    mask = decay_mask(torch.tensor([0.8], dtype=torch.float64), 12)[0]
    for cut in range(1, 12):
        block = mask[cut:, :cut]
        assert torch.linalg.matrix_rank(block) == 1
        assert_close(block, block[:, -1:] * block[:1] / block[0, -1])


@pytest.mark.parametrize("decay", [0.5, 0.97, 1.0])
def test_the_mask_of_a_long_text_has_numbers_everywhere(decay):
    T = 4096
    mask = decay_mask(torch.tensor([decay]), T)[0]
    assert mask.isfinite().all()
    powers = decay ** torch.arange(T, dtype=torch.float64)
    assert (mask[-1].double() - powers.flip(0)).abs().max() < 1e-5
    assert mask[0].count_nonzero() == 1


# What the delta rule is for.


def say(state, k, v, rule="delta"):
    k, v = (torch.tensor([x], dtype=torch.float64) for x in (k, v))
    one = torch.ones(1, dtype=torch.float64)
    return by_steps(rule, state, k[None], k[None], v[None], one)


def test_a_key_that_is_told_twice_has_its_new_value():
    state = torch.zeros(1, 2, 2, dtype=torch.float64)
    first, second = ([0.6, 0.8], [1.0, 2.0]), ([-0.8, 0.6], [5.0, 7.0])
    for k, v in (first, second):
        _, state = say(state, k, v)
    out, state = say(state, first[0], [3.0, 4.0])
    assert out.flatten().tolist() == pytest.approx([3, 4])
    other = state[0] @ torch.tensor(second[0], dtype=torch.float64)
    assert other.tolist() == pytest.approx(second[1]), "expected the other as it was"
    summed = torch.zeros(1, 2, 2, dtype=torch.float64)
    for k, v in (first, second, (first[0], [3.0, 4.0])):
        out, summed = say(summed, k, v, "linear")
    assert out.flatten().tolist() == pytest.approx([1 + 3, 2 + 4])


def test_over_orthogonal_keys_delta_is_the_sum():
    q, _, v = drawn(D, 4, 2)
    k = torch.eye(D, dtype=torch.float64).unsqueeze(1).expand(-1, 2, -1)
    ones, nothing = torch.ones(2).double(), torch.zeros(2, D, D).double()
    assert_same(
        delta_chunked(nothing, q, k, v, 3), linear_chunked(nothing, q, k, v, ones, 3)
    )


def test_over_keys_that_come_again_the_state_of_delta_does_not_grow():
    T = 1000
    basis = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q
    k = basis[torch.arange(T) % D].unsqueeze(1)
    v = F.normalize(torch.randn(T, 1, D, dtype=torch.float64), dim=-1)
    nothing, one = torch.zeros(1, D, D).double(), torch.ones(1).double()
    _, state = delta_chunked(nothing, k, k, v)
    assert_close((state[0] @ basis.T).T, v[-D:, 0])  # of each key the last value
    assert state.norm().item() == pytest.approx(D**0.5)
    _, summed = linear_chunked(nothing, k, k, v, one)
    assert summed.norm() > 4 * state.norm(), "the control: a sum grows"


# What a layer remembers.


def in_pieces(memory, pieces, q, k, v):
    H, G = q.shape[1], k.shape[1]
    config = ModelConfig(8, 1, H, G, d_model=H * D, d_ff=8, max_seq_len=64)
    kept, outs = memory.empty(config, q.dtype, "cpu"), []
    for part in zip(*(x.split(pieces) for x in (q, k, v))):
        out, kept = memory.attend(kept, *part)
        outs.append(out)
    return torch.cat(outs), kept


@every_memory
@a_few_heads
@pytest.mark.parametrize("pieces", [[21], [1] * 21, [2, 0, 5, 1, 13], [3, 3, 3, 12]])
def test_pieces_of_any_length_are_the_whole_text(pieces, H, G, name):
    memory, (q, k, v) = MEMORIES[name], drawn(21, H, G)
    k = 3 * k  # its length is the memory's business
    expected = memory.attend_all(q, k, v)
    assert_same([in_pieces(memory, pieces, q, k, v)[0]], [expected])
    texts = [torch.stack([x, x + 1]).unsqueeze(1) for x in (q, k, v)]  # (2, 1, T, ...)
    got = memory.attend_all(*texts)
    assert got.shape == texts[0].shape
    assert_same([got[0, 0]], [expected])
    assert_same([got[1, 0]], [memory.attend_all(q + 1, k + 1, v + 1)])


@pytest.mark.parametrize("name", ["sum", "decay", "delta"])
def test_what_comes_of_a_state_is_the_rule_over_keys_of_length_one(name):
    memory, (q, k, v) = MEMORIES[name], drawn(17)
    decay = torch.full((2,), getattr(memory, "decay", 1.0), dtype=torch.float64)
    lengths = [x.square().sum(-1, keepdim=True).sqrt() for x in (q, k)]
    rule = "delta" if name == "delta" else "linear"
    nothing = torch.zeros(2, D, D, dtype=torch.float64)
    text = q / lengths[0], k / lengths[1], v
    expected, state = by_loops(rule, nothing, *text, decay)
    if rule == "linear":
        mean_square = expected.square().mean(-1, keepdim=True)
        expected = expected / (mean_square + 1e-5).sqrt()
    assert_same([memory.attend_all(q, 5 * k, v)], [expected])
    out, (kept,) = in_pieces(memory, [4, 13], q, 5 * k, v)
    assert_same([out, kept], [expected, state])


@pytest.mark.parametrize("size", [1, 2, 5, 30, 99])
def test_a_window_is_attention_under_a_mask(size):
    q, k, v = drawn(30)
    t = torch.arange(30)
    distance = t.unsqueeze(-1) - t
    expected = F.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)),
        attn_mask=(distance >= 0) & (distance < size),
        enable_gqa=True,
    ).transpose(0, 1)
    assert_same([Window(size).attend_all(q, k, v)], [expected])
    if size >= 30:
        assert_same([expected], [attend_causal(0, q, k, v)])


@pytest.mark.parametrize("size", [1, 4, 99])
@pytest.mark.parametrize("pieces", [[1] * 9, [9], [2, 0, 7]])
def test_a_window_keeps_what_the_next_token_will_see(pieces, size):
    q, k, v = drawn(9)
    first = max(9 - (size - 1), 0)
    for kept, new in zip(in_pieces(Window(size), pieces, q, k, v)[1], (k, v)):
        assert kept.tolist() == new[first:].tolist()
        assert kept.untyped_storage().nbytes() == kept.nbytes, "expected no view"


@every_memory
def test_keys_of_zeros_give_numbers_in_any_dtype(name):
    memory, (q, k, v) = MEMORIES[name], drawn(9)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for text in ((q, 0 * k, v), (0 * q, k, v), (q, k, 0 * v)):
            text = [x.to(dtype) for x in text]
            for out in (memory.attend_all(*text), in_pieces(memory, [4, 5], *text)[0]):
                assert out.isfinite().all(), f"expected numbers in {dtype}, got {out}"
                assert out.dtype == dtype


@pytest.mark.parametrize("name", ["sum", "decay", "delta"])
def test_a_state_goes_on_growing_in_a_model_of_16_bits(name):
    """In bfloat16 256 + 1 is 256: a sum must have more bits than its keys."""
    T, memory = 600, MEMORIES[name]
    k = torch.zeros(T, 1, D, dtype=torch.bfloat16)
    k[:, 0, 0] = 1
    _, (state,) = in_pieces(memory, [1] * T, k, k, k)
    told = {"sum": T, "decay": 1 / (1 - 0.8), "delta": 1}[name]
    assert state[0, 0, 0].item() == pytest.approx(told, rel=1e-5)


# Bytes.


@pytest.mark.parametrize("memory", [Linear(), Linear(0.9), Delta()])
@pytest.mark.parametrize("config", [TINY, ModelConfig(8, 3, 6, 3, 60, 8, 64)])
def test_a_state_takes_the_bytes_that_were_predicted(config, memory):
    H, G, D = config.num_heads, config.num_kv_heads, config.head_dim
    for dtype, bytes_per_number in (
        (torch.float32, 4),
        (torch.float64, 8),
        (torch.bfloat16, 4),  # a sum has 32 bits at least
    ):
        cache = begun(StateCache(config, 3, memory, dtype=dtype), 2)
        of_each = state_bytes(config, bytes_per_number)
        for counts in ([0, 0, 0], [9, 1, 0], [1, 0, 0]):
            text = [torch.randn(sum(counts), n, D).to(dtype) for n in (H, G, G)]
            with cache.extend(torch.tensor(counts)) as attend:
                for layer in range(config.num_layers):
                    attend(layer, *text)
            assert cache.used_bytes == cache.reserved_bytes == 2 * of_each
        assert of_each == kv_cache_bytes(config, D // 2, bytes_per_number)
        cache.free(0)
        assert cache.used_bytes == of_each


@both_rules
def test_chunks_take_memory_for_the_text_and_not_for_its_square(rule):
    nothing, peaks = torch.zeros(2, D, D, dtype=torch.float64), {}
    for form in ("chunks", "at once"):
        for T in (512, 1024):
            text = [*drawn(T), decays(2)]
            if form == "chunks":
                cost = measure(lambda text=text: in_chunks(rule, nothing, *text, 32))
            else:
                cost = measure(lambda text=text: at_once(rule, *text))
            peaks[form, T] = cost.peak_bytes
    assert peaks["chunks", 1024] < 2.2 * peaks["chunks", 512]
    assert peaks["at once", 1024] > 3.5 * peaks["at once", 512], "the control"


# The whole model.


@functools.cache
def model():
    return attentive_model(V - 1, vocab_size=V, num_heads=4, num_kv_heads=2)


def for_model(name, batch_size):
    memories = BY_LAYER[name]
    cache = StateCache(model().config, batch_size, memories, dtype=torch.float64)
    return begun(cache, batch_size)


@torch.no_grad()
def as_in_training(name, text):
    return model()(text, torch.arange(text.shape[-1]), attend_by(BY_LAYER[name]))


@pytest.mark.parametrize("name", BY_LAYER)
@pytest.mark.parametrize("seed", range(2))
def test_a_cache_gives_in_any_steps_what_training_has_seen(seed, name):
    rng, B = random.Random(seed), 3
    steps = [[rng.choice([0, 1, 1, 1, 4, 7]) for _ in range(B)] for _ in range(9)]
    cache = for_model(name, B)
    texts = [random_ids(rng, sum(step[b] for step in steps), V - 1) for b in range(B)]
    logits, starts = [[] for _ in texts], [0] * B
    for step in steps:
        if sum(step) == 0:
            continue
        new_ids = [text[i : i + n] for text, i, n in zip(texts, starts, step)]
        out = forward_cached(model(), cache, torch.cat(new_ids), torch.tensor(step))
        for b, part in enumerate(out.split(step)):
            logits[b].append(part)
            starts[b] += step[b]
    for text, got in zip(texts, logits):
        if len(text):
            assert_same([torch.cat(got)], [as_in_training(name, text)], 1e-9)


@pytest.mark.parametrize("name", BY_LAYER)
def test_a_cache_writes_what_recomputing_writes(name):
    prompts = [random_ids(random.Random(0), n, V - 1) for n in (5, 1, 12)]
    texts = generate_cached(model(), prompts, 20, for_model(name, 3), temperature=0)
    for prompt, text in zip(prompts, texts):
        ids = prompt
        for _ in range(20):
            ids = torch.cat([ids, as_in_training(name, ids)[-1:].argmax(-1)])
        assert text.tolist() == ids.tolist()


@pytest.mark.parametrize("name", ["decay", "window, then delta"])
def test_quality_through_a_cache_is_that_of_training(name):
    ids = torch.stack([random_ids(random.Random(i), 12, V - 1) for i in range(3)])
    draws = [quality.Examples(ids, torch.ones_like(ids, dtype=torch.bool))]
    expected = quality.measure_quality(model(), draws, attend=attend_by(BY_LAYER[name]))
    for step_lens in (None, [5, 1, 6]):
        got = quality.measure_quality(
            model(),
            draws,
            make_cache=lambda config, B, T: StateCache(
                config, B, BY_LAYER[name], dtype=torch.float64
            ),
            step_lens=step_lens,
        )
        assert got.nats == pytest.approx(expected.nats, rel=1e-9)
        assert got.accuracies == expected.accuracies


def test_a_batch_of_texts_trains_as_each_alone():
    ids = torch.stack([random_ids(random.Random(i), 9, V - 1) for i in range(3)])
    for name in BY_LAYER:
        got = as_in_training(name, ids)
        for text, one in zip(ids, got):
            assert_same([one], [as_in_training(name, text)], 1e-9)


def test_other_memories_are_other_models():
    text = random_ids(random.Random(1), 30, V - 1)
    last = {name: as_in_training(name, text)[-1] for name in BY_LAYER}
    for one, two in itertools.combinations(last, 2):
        assert (last[one] - last[two]).abs().max() > 1e-3, f"{one} is {two}"


# What cannot be.


@pytest.mark.parametrize("decay", [0, 1.5, -0.5, math.nan, math.inf, True, "1"])
def test_what_is_no_decay_is_refused(decay):
    with pytest.raises(ValueError, match="decay: expected a number above 0 and at most"):
        Linear(decay)


@pytest.mark.parametrize("decay", [1, np.float64(0.9), np.int64(1), Fraction(1, 2)])
def test_a_decay_of_any_kind_of_number_is_a_float(decay):
    memory, text = Linear(decay), drawn(5)
    assert type(memory.decay) is float and memory == Linear(float(decay))
    expected = Linear(float(decay)).attend_all(*text)
    assert torch.equal(memory.attend_all(*text), expected)


def test_the_size_of_a_window_is_an_int():
    memory = Window(np.int64(4))
    assert type(memory.size) is int and repr(memory) == "Window(size=4)"


@pytest.mark.parametrize("num_keys", [3, 7])
def test_a_whole_text_has_a_key_for_each_query(num_keys):
    (q, _, _), (_, k, v) = drawn(5), drawn(num_keys)
    words = f"expected 5 keys, one per query, got {num_keys}"
    with pytest.raises(AssertionError, match=words):
        Window(4).attend_all(q, k, v)


@pytest.mark.parametrize("size", [0, -1, 2.0, None, True, "4"])
def test_a_window_that_holds_nothing_is_refused(size):
    with pytest.raises(ValueError, match="size: expected an integer of at least 1, got"):
        Window(size)


@both_rules
@pytest.mark.parametrize("chunk_size", [0, -4, 1.5])
def test_chunks_without_tokens_are_refused(chunk_size, rule):
    text, nothing = [*drawn(3), decays(2)], torch.zeros(2, D, D, dtype=torch.float64)
    with pytest.raises(ValueError, match="chunk_size: expected an integer of at least 1"):
        in_chunks(rule, nothing, *text, chunk_size)


NO_MEMORIES = [None, Linear, Delta, 4, "delta", [Linear, Delta], [Delta(), None], [4, 4]]


@pytest.mark.parametrize("memories", NO_MEMORIES)
def test_what_is_no_memory_is_refused(memories):
    for make in (functools.partial(StateCache, TINY, 1), attend_by):
        with pytest.raises(ValueError, match="memories: expected one for each layer, as"):
            make(memories)


@pytest.mark.parametrize("memories", [[], [Delta()], (Delta(),) * 3])
def test_a_layer_without_a_memory_is_refused(memories):
    words = f"memories: expected 2, one for each layer, got {len(memories)}"
    with pytest.raises(ValueError, match=words):
        StateCache(TINY, 1, memories)
    attend, text = attend_by(memories), drawn(3)
    with pytest.raises(ValueError, match=r"memories: expected one for layer \d, got"):
        attend(len(memories), *text)


def test_a_batch_without_rows_is_refused():
    with pytest.raises(ValueError, match="batch_size: expected an integer of at least 1"):
        StateCache(TINY, 0, Delta())
