import pytest
import torch
from helpers import random_model

from lib.generate import (
    attention_flops,
    generate_recompute,
    projection_flops,
)
from lib.measure.meter import measure
from lib.model import attend_causal, attend_fused


def test_generation_appends_the_most_probable_token_each_time():
    model = random_model(dtype=torch.float64)
    token_ids = torch.tensor([7, 1, 200])
    got = generate_recompute(model, token_ids, 12, temperature=0)
    for _ in range(12):
        logits = model(token_ids, torch.arange(len(token_ids)), attend_causal)
        token_ids = torch.cat([token_ids, logits[-1].argmax().view(1)])
    assert torch.equal(got, token_ids)
    assert len(set(got[3:].tolist())) > 2, "a model that repeats one token tests nothing"


def test_attention_is_left_to_whom_it_was_given():
    model, layers = random_model(), []

    def attend(layer, q, k, v):
        layers.append((layer, q.shape[-3]))
        return attend_fused(layer, q, k, v)

    generate_recompute(model, torch.tensor([1, 2]), 2, attend=attend)
    assert layers == [(0, 2), (1, 2), (0, 3), (1, 3)]


def test_a_model_in_training_mode_is_refused_since_dropout_would_speak_too():
    model = random_model(dropout=0.1).train()
    with pytest.raises(ValueError, match="expected eval mode"):
        generate_recompute(model, torch.tensor([1]), 1)
    generate_recompute(random_model().train(), torch.tensor([1]), 1)  # has no dropout


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
        (
            torch.tensor([1]),
            -1,
            "num_new_tokens: expected an integer of at least 0, got -1",
        ),
        (
            torch.zeros(100, dtype=torch.int64),
            29,
            "max_seq_len = 128 tokens, got 100 .* 29 new",
        ),
        (torch.tensor([300]), 1, r"token_ids: expected values in \[0, 256\), got 300"),
        (torch.tensor([300]), 0, r"token_ids: expected values in \[0, 256\), got 300"),
        (torch.tensor([1.0]), 0, "token_ids: expected int64"),
        (torch.zeros(0, 3).long(), 0, "prompt_ids: expected at least one token"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(
    prompt_ids, num_new_tokens, message
):
    with pytest.raises(ValueError, match=message):
        generate_recompute(random_model(), prompt_ids, num_new_tokens)


def test_settings_without_a_meaning_are_refused_before_anything_is_computed():
    with pytest.raises(ValueError, match="temperature: expected a number of at least 0"):
        generate_recompute(random_model(), torch.tensor([1]), 0, temperature=-1)


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


def test_nothing_is_kept_for_a_backward_pass():
    model = random_model()
    cost = measure(lambda: generate_recompute(model, torch.tensor([1, 2]), 3))
    assert cost.saved_bytes == 0
