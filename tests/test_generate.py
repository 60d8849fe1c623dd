import pytest
import torch
from helpers import assert_close, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.generate import (
    attention_flops,
    generate_recompute,
    next_token_probs,
    projection_flops,
    sample,
)
from lib.meter import measure
from lib.model import attend_causal, attend_fused


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


def test_a_tiny_temperature_overflows_nothing():
    assert next_token_probs(torch.tensor([1.0, 2.0]), 1e-6).tolist() == [0.0, 1.0]


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
        ({"top_k": 0}, "top_k: expected at least 1"),
        ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\], got 0.0"),
        ({"top_p": 1.01}, "got 1.01"),
    ],
)
def test_settings_without_a_meaning_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        next_token_probs(torch.zeros(4), **setting)
    with pytest.raises(ValueError, match=message):  # before anything is computed
        generate_recompute(random_model(), torch.tensor([1]), 0, **setting)


def test_the_draw_follows_the_probabilities():
    probs = torch.tensor([0.0, 0.25, 0.75]).expand(4000, 3)
    token_ids = sample(probs, torch.Generator().manual_seed(0))
    assert token_ids.shape == (4000,)
    counts = token_ids.bincount(minlength=3)
    assert counts[0] == 0 and abs(counts[1] - 1000) < 150
    assert sample(torch.tensor([0.0, 1.0])).shape == ()


def test_generation_appends_the_most_probable_token_each_time():
    model = random_model(dtype=torch.float64)
    token_ids = torch.tensor([7, 1, 200])
    got = generate_recompute(model, token_ids, 12, temperature=0)
    for _ in range(12):
        logits = model(token_ids, torch.arange(len(token_ids)), attend_causal)
        token_ids = torch.cat([token_ids, logits[-1].argmax().view(1)])
    assert torch.equal(got, token_ids)
    assert len(set(got[3:].tolist())) > 2, "a model that repeats one token tests nothing"


@pytest.mark.parametrize("seed", range(3))
def test_both_ways_to_attend_write_the_same_text(seed):
    model = random_model(seed, dtype=torch.float64)
    stories = [
        generate_recompute(
            model,
            torch.tensor([3, 5]),
            30,
            generator=torch.Generator().manual_seed(1),
            attend=a,
        )
        for a in (attend_causal, attend_fused)
    ]
    assert torch.equal(*stories)


def test_a_batch_of_prompts_generates_what_each_would_alone():
    model = random_model(dtype=torch.float64)
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6]])
    got = generate_recompute(model, prompts, 8, temperature=0)
    assert got.shape == (2, 11)
    for i in range(2):
        assert torch.equal(
            got[i], generate_recompute(model, prompts[i], 8, temperature=0)
        )


def test_the_same_seed_gives_the_same_text_and_the_prompt_stays():
    model, prompt_ids = random_model(), torch.tensor([9, 8, 7])
    first, again, other = (
        generate_recompute(
            model, prompt_ids, 20, generator=torch.Generator().manual_seed(s)
        )
        for s in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first[:3].tolist() == prompt_ids.tolist() == [9, 8, 7]


def test_no_new_tokens_is_the_prompt():
    assert generate_recompute(random_model(), torch.tensor([9, 8]), 0).tolist() == [
        9,
        8,
    ]


@pytest.mark.parametrize(
    "prompt_ids, num_new_tokens, message",
    [
        (
            torch.tensor([], dtype=torch.int64),
            3,
            "prompt_ids: expected at least one token",
        ),
        (torch.tensor([1]), -1, "num_new_tokens: expected at least 0, got -1"),
        (
            torch.zeros(100, dtype=torch.int64),
            29,
            "max_seq_len = 128 tokens, got 100 .* 29 new",
        ),
        (torch.tensor([300]), 1, r"token_ids: expected values in \[0, 256\), got 300"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(
    prompt_ids, num_new_tokens, message
):
    with pytest.raises(ValueError, match=message):
        generate_recompute(random_model(), prompt_ids, num_new_tokens)


def test_text_may_fill_the_model_to_the_last_token():
    prompt_ids = torch.zeros(120, dtype=torch.int64)
    assert len(generate_recompute(random_model(), prompt_ids, 8)) == 128


@pytest.mark.parametrize("attend", [attend_causal, attend_fused])
@pytest.mark.parametrize("prompt_len, num_new_tokens", [(1, 1), (1, 9), (5, 4)])
@pytest.mark.parametrize(
    "sizes", [{}, {"num_layers": 3, "num_heads": 8, "num_kv_heads": 1}]
)
def test_work_is_predicted_to_the_last_flop(attend, prompt_len, num_new_tokens, sizes):
    model, prompt_ids = (
        random_model(**sizes),
        torch.zeros(prompt_len, dtype=torch.int64),
    )
    cost = measure(
        lambda: generate_recompute(model, prompt_ids, num_new_tokens, attend=attend)
    )
    predicted = attention_flops(model.config, prompt_len, num_new_tokens)
    assert cost.flops["attention"] == predicted
    predicted = projection_flops(model.config, prompt_len, num_new_tokens)
    assert cost.flops["projection"] == predicted
    assert cost.calls["Embedding"] == num_new_tokens
