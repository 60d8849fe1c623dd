import math

import pytest
import torch
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.sampling import next_token_probs, sample


def naive_probs(logits, temperature, top_k, top_p):
    """The definition, token by token: logits (V,)."""
    if temperature == 0:
        return [float(i == int(logits.argmax())) for i in range(len(logits))]
    weights = (logits.double() / temperature).softmax(0).tolist()
    order = sorted(range(len(weights)), key=lambda i: -logits[i].item())[:top_k]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass >= top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


@settings(deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0, 0.3, 1.0, 2.5]),
    st.sampled_from([None, 1, 3, 20, 99]),
    st.sampled_from([0.05, 0.5, 0.9, 1.0]),
)
def test_probabilities_are_those_of_the_definition(seed, temperature, top_k, top_p):
    logits = 3 * torch.randn(
        20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    got = next_token_probs(logits, temperature, top_k, top_p)
    expected = naive_probs(logits, temperature, top_k, top_p)
    assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_probabilities_of_a_batch_are_those_of_its_rows():
    logits = torch.randn(2, 3, 20)
    got = next_token_probs(logits, 0.7, 9, 0.8)
    for i in range(2):
        for j in range(3):
            assert_close(got[i, j], next_token_probs(logits[i, j], 0.7, 9, 0.8))


def test_temperature_zero_is_greedy_whatever_else_is_set():
    logits = torch.tensor([0.1, 2.0, 1.9])
    assert next_token_probs(logits, 0, top_k=2, top_p=0.3).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-6, 1e-30])
def test_a_tiny_temperature_overflows_nothing(dtype, temperature):
    logits = torch.tensor([1.0, 2.0], dtype=dtype)
    assert next_token_probs(logits, temperature).tolist() == [0.0, 1.0]


def test_top_p_of_one_keeps_what_rounding_would_drop():
    logits = torch.cat([torch.tensor([20.0]), torch.zeros(50)])
    assert (next_token_probs(logits, top_p=1.0) > 0).all()


def test_equally_probable_tokens_are_kept_as_many_as_asked_for():
    assert (next_token_probs(torch.zeros(10), top_k=3) > 0).sum() == 3
    assert (next_token_probs(torch.zeros(10), top_p=0.25) > 0).sum() == 3


@pytest.mark.parametrize(
    "setting, message",
    [
        (
            {"temperature": -0.1},
            "temperature: expected a number of at least 0 .*, got -0.1",
        ),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k: expected an integer of at least 1"),
        ({"top_k": 2.5}, "top_k: expected an integer of at least 1, .*got 2.5"),
        ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\], got 0.0"),
        ({"top_p": 1.01}, "got 1.01"),
    ],
)
def test_settings_without_a_meaning_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        next_token_probs(torch.zeros(4), **setting)


def test_the_draw_follows_the_probabilities():
    probs = torch.tensor([0.0, 0.25, 0.75]).expand(4000, 3)
    token_ids = sample(probs, torch.Generator().manual_seed(0))
    assert token_ids.shape == (4000,)
    counts = token_ids.bincount(minlength=3)
    assert counts[0] == 0 and abs(counts[1] - 1000) < 150
    assert sample(torch.tensor([0.0, 1.0])).shape == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.8}])
def test_half_precision_is_computed_in_single(dtype, settings):
    logits = torch.tensor([3.0, 2.5, 1.0, 0.5, -2.0], dtype=dtype)
    got = next_token_probs(logits, 0.7, **settings)
    assert got.dtype == torch.float32
    assert_close(got, next_token_probs(logits.float(), 0.7, **settings))


def test_extremes_of_temperature_and_logits_give_probabilities():
    assert next_token_probs(torch.tensor([1.0, 2.0]), 1e-46).tolist() == [0, 1]
    far_apart = torch.tensor([40_000.0, -40_000.0], dtype=torch.float16)
    hot = next_token_probs(far_apart, 1e4)
    assert hot[1].item() == pytest.approx(1 / (1 + math.exp(8)), rel=1e-5)
    masked = torch.tensor([0.0, -math.inf, 0.0])
    assert next_token_probs(masked).tolist() == [0.5, 0.0, 0.5]


def test_a_sum_that_rounding_leaves_short_of_top_p_keeps_no_token_more():
    logits = torch.tensor([0.5, 0.3, 0.1, 0.1]).log()
    assert (next_token_probs(logits, top_p=0.8) > 0).tolist() == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize(
    "row", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]]
)
def test_logits_that_give_no_probabilities_are_refused(row, temperature):
    logits = torch.tensor([[1.0, 2.0], row])
    with pytest.raises(ValueError, match="logits: expected numbers.*largest is"):
        next_token_probs(logits, temperature)


def test_of_equal_largest_logits_the_first_is_greedy():
    assert next_token_probs(torch.tensor([1.0, 3.0, 3.0]), 0).tolist() == [0, 1, 0]


def test_double_precision_stays_and_large_logits_do_not_overflow():
    logits = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert next_token_probs(logits).dtype == torch.float64
    assert next_token_probs(torch.tensor([3e38, 2e38]), 0.5).tolist() == [1, 0]
    with pytest.raises(ValueError, match="temperature: .*got inf"):
        next_token_probs(logits, math.inf)


def test_the_draw_is_the_generators():
    probs = torch.full((50, 9), 1 / 9)
    first, again = (sample(probs, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again) and len(set(first.tolist())) > 1
