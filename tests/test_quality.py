import math

import pytest
import torch
from helpers import random_format, random_model

from lib.kv_cache import ContiguousKVCache, kv_cache_bytes
from lib.measure import quality
from lib.measure.quality import Examples, Quality, answers, measure_quality, passages
from lib.model import attend_causal
from lib.paged_kv_cache import PagedKVCache
from lib.pruning import PrunedKVCache, Recent
from lib.quantized_kv_cache import QuantizedFormat
from lib.text import encode, load_book, split_book
from lib.training import next_token_loss


def random_draws(num_draws=3, shape=(3, 12)):
    draws = []
    for seed in range(num_draws):
        generator = torch.Generator().manual_seed(seed)
        token_ids = torch.randint(256, shape, generator=generator)
        is_answer = torch.rand(shape, generator=generator) < 0.4
        is_answer[:, 0] = False
        draws.append(Examples(token_ids, is_answer))
    return draws


def all_asked(draws):
    asked = []
    for examples in draws:
        is_answer = torch.ones_like(examples.is_answer)
        is_answer[:, 0] = False
        asked.append(Examples(examples.token_ids, is_answer))
    return asked


def test_nats_of_whole_passages_are_the_loss_of_training():
    model, draws = random_model(dtype=torch.float64), all_asked(random_draws())
    got = measure_quality(model, draws)
    for nats, examples in zip(got.nats, draws, strict=True):
        logits = model(examples.token_ids, torch.arange(12), attend_causal)
        expected = next_token_loss(logits, examples.token_ids).item()
        assert nats == pytest.approx(expected, rel=1e-12)


def test_only_what_is_asked_for_counts():
    model, draws = random_model(dtype=torch.float64), random_draws()
    got = measure_quality(model, draws)
    for nats, accuracy, examples in zip(got.nats, got.accuracies, draws):
        logits = model(examples.token_ids, torch.arange(12), attend_causal)
        logs, hits = [], []
        for b, t in examples.is_answer.nonzero().tolist():
            right = examples.token_ids[b, t]
            logs.append(-logits[b, t - 1].softmax(0)[right].log().item())
            hits.append(int(logits[b, t - 1].argmax() == right))
        assert nats == pytest.approx(sum(logs) / len(logs), rel=1e-12)
        assert accuracy == pytest.approx(sum(hits) / len(hits))


def test_a_model_that_knows_what_comes_is_always_right():
    model = random_model(dtype=torch.float64)
    token_ids = torch.randint(256, (2, 9))
    with torch.no_grad():
        for _ in range(9):  # each token is the one that the model finds most likely
            logits = model(token_ids, torch.arange(9), attend_causal)
            token_ids = torch.cat([token_ids[:, :1], logits[:, :-1].argmax(-1)], 1)
    draws = all_asked([Examples(token_ids, torch.ones(2, 9, dtype=torch.bool))])
    assert measure_quality(model, draws).accuracies == (1.0,)
    draws = all_asked([Examples((token_ids + 1) % 256, draws[0].is_answer)])
    assert measure_quality(model, draws).accuracy < 0.5


PLAIN_CACHES = {
    "contiguous": lambda config, B, T: ContiguousKVCache(
        config, B, T, dtype=torch.float64
    ),
    "fused": lambda config, B, T: ContiguousKVCache(
        config, B, T, dtype=torch.float64, fused_decode=True
    ),
    "paged": lambda config, B, T: PagedKVCache(
        config, B * math.ceil(T / 5), 5, dtype=torch.float64
    ),
}


@pytest.mark.parametrize("kind", PLAIN_CACHES)
def test_a_plain_cache_is_worth_as_much_as_none(kind):
    model, draws = random_model(dtype=torch.float64), random_draws()
    plain = measure_quality(model, draws)
    got = measure_quality(model, draws, make_cache=PLAIN_CACHES[kind])
    assert got.nats == pytest.approx(plain.nats, rel=1e-10)
    assert got.accuracies == plain.accuracies
    assert got.bytes_per_token == plain.bytes_per_token
    assert plain.bytes_per_token == kv_cache_bytes(model.config, 1, 8)


def test_attention_that_is_given_is_that_which_is_measured():
    model, draws = random_model(dtype=torch.float64), random_draws()

    def blind(layer, q, k, v):
        return torch.zeros_like(q)

    plain, got = (
        measure_quality(model, draws, attend=attend) for attend in (attend_causal, blind)
    )
    assert plain.nats == pytest.approx(measure_quality(model, draws).nats, rel=1e-10)
    assert all(abs(a - b) > 1e-3 for a, b in zip(plain.nats, got.nats))


def test_attention_beside_a_cache_is_refused():
    with pytest.raises(ValueError, match="attend: expected without make_cache"):
        measure_quality(
            random_model(),
            random_draws(),
            attend=attend_causal,
            make_cache=ContiguousKVCache,
        )


def test_bytes_and_losses_are_those_of_the_cache():
    model, draws = random_model(dtype=torch.float64), random_draws()
    plain = measure_quality(model, draws)
    bytes_of, losses = {}, {}
    for name, format in {
        "8 bits": QuantizedFormat(8),
        "2 bits": QuantizedFormat(2),
        "latent": random_format(model.config, 2, 3),
    }.items():
        make = lambda config, B, T, f=format: ContiguousKVCache(  # noqa: E731
            config, B, T, dtype=torch.float64, format=f
        )
        got = measure_quality(model, draws, make_cache=make)
        bytes_of[name] = got.bytes_per_token
        losses[name] = max(abs(a - b) for a, b in zip(got.nats, plain.nats))
    assert bytes_of == {"8 bits": 2 * 4 * 24, "2 bits": 2 * 4 * 18, "latent": 2 * 5 * 8}
    assert 0 < losses["8 bits"] < losses["2 bits"]
    assert losses["latent"] > 0.01


def test_an_answer_is_predicted_by_the_logits_before_it():
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    is_answer = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 0]]).bool()
    logits = torch.arange(8.0).view(2, 4, 1).expand(2, 4, 9)
    said, right = answers(logits, Examples(ids, is_answer))
    assert said[:, 0].tolist() == [0, 2, 5] and said.shape == (3, 9)
    assert right.tolist() == [2, 4, 7]


def test_the_means_are_those_of_the_draws():
    quality = Quality((1.0, 2.0, 6.0), (0.5, 1.0, 0.0), 8.0)
    assert quality.mean_nats == 3.0 and quality.accuracy == 0.5


def test_no_draws_or_draws_that_ask_for_nothing_are_refused():
    model, draws = random_model(), random_draws()
    silent = Examples(draws[0].token_ids, torch.zeros_like(draws[0].is_answer))
    silent.is_answer[:, 0] = True  # nobody predicts a first token
    for wrong in ([], [silent], [draws[0], silent], [passages(2, 1)]):
        with pytest.raises(ValueError, match="draws: expected at least one, each with"):
            measure_quality(model, wrong)
    with pytest.raises(ValueError, match="draws: expected a list of Examples, got one"):
        measure_quality(model, draws[0])


def test_dropout_is_not_measured():
    model = random_model(dropout=0.5).train()
    with pytest.raises(ValueError, match="model: expected eval mode, got training mode"):
        measure_quality(model, random_draws())
    assert measure_quality(random_model().train(), random_draws()).mean_nats > 0


def test_passages_are_held_out_and_all_but_their_first_tokens_are_asked_for():
    train_ids, held_out_ids = split_book(encode(load_book()))
    examples = passages(5, 40, torch.Generator().manual_seed(3))
    again = passages(5, 40, torch.Generator().manual_seed(3))
    assert torch.equal(examples.token_ids, again.token_ids)
    assert examples.token_ids.shape == (5, 40)
    held_out, train = (bytes(ids.tolist()) for ids in (held_out_ids, train_ids))
    for row in examples.token_ids.tolist():
        assert bytes(row) in held_out and bytes(row) not in train
    assert examples.is_answer.dtype == torch.bool
    assert not examples.is_answer[:, 0].any() and examples.is_answer[:, 1:].all()
    other = passages(5, 40, torch.Generator().manual_seed(4))
    assert not torch.equal(examples.token_ids, other.token_ids)


def test_passages_to_train_on_are_of_the_other_part():
    train_ids, held_out_ids = (
        bytes(ids.tolist()) for ids in split_book(encode(load_book()))
    )
    seeded = torch.Generator().manual_seed
    examples = passages(5, 40, seeded(3), held_out=False)
    again = passages(5, 40, seeded(3), held_out=False)
    assert torch.equal(examples.token_ids, again.token_ids)
    for row in examples.token_ids.tolist():
        assert bytes(row) in train_ids and bytes(row) not in held_out_ids
    assert not examples.is_answer[:, 0].any() and examples.is_answer[:, 1:].all()
    default, held_out = passages(5, 40, seeded(3)), passages(5, 40, seeded(3), True)
    assert torch.equal(default.token_ids, held_out.token_ids)


def test_the_book_is_read_once_and_nobody_can_write_in_it(monkeypatch):
    read, load = [], quality.load_book
    monkeypatch.setattr(quality, "load_book", lambda: read.append(1) or load())
    quality._book_parts.cache_clear()
    seeded = torch.Generator().manual_seed
    one = passages(3, 40, seeded(3))
    expected = one.token_ids.clone()
    one.token_ids.zero_()
    assert torch.equal(passages(3, 40, seeded(3)).token_ids, expected)
    passages(3, 40, held_out=False)
    assert read == [1]


def test_examples_are_moved_whole():
    examples = passages(2, 5)
    moved, same = examples.to("meta"), examples.to(torch.device("cpu"))
    assert moved.token_ids.is_meta and moved.is_answer.is_meta
    assert moved.token_ids.shape == (2, 5) and moved.is_answer.dtype == torch.bool
    assert torch.equal(same.token_ids, examples.token_ids)
    assert torch.equal(same.is_answer, examples.is_answer)


def test_texts_are_read_where_they_are():
    """Where nothing else is said, tensors are made on another device here."""
    model, draws = random_model(), random_draws()
    expected = measure_quality(model, draws)
    with torch.device("meta"):
        assert measure_quality(model, draws) == expected


@pytest.mark.parametrize("sizes", [(0, 40), (2, 0), (-1, 40), (2, -3), (2.0, 40)])
def test_passages_of_no_size_are_refused(sizes):
    with pytest.raises(ValueError, match="expected an integer of at least 1"):
        passages(*sizes)


@pytest.mark.parametrize("step_lens", [[12], [5, 7], [1] * 12, iter([3, 1, 8])])
def test_steps_of_a_cache_that_keeps_all_change_nothing(step_lens):
    model, draws = random_model(dtype=torch.float64), random_draws()
    expected = measure_quality(model, draws, attend=attend_causal)
    got = measure_quality(
        model, draws, make_cache=PLAIN_CACHES["contiguous"], step_lens=step_lens
    )
    assert got.nats == pytest.approx(expected.nats, rel=1e-10)
    assert got.accuracies == expected.accuracies


def test_what_a_cache_forgets_is_missing_from_the_next_step_on():
    model, draws = random_model(dtype=torch.float64), random_draws()

    def forgetful(config, B, T):
        return PrunedKVCache(config, B, 2, Recent(0), dtype=torch.float64)

    whole = measure_quality(model, draws, attend=attend_causal)
    at_once = measure_quality(model, draws, make_cache=forgetful)
    assert at_once.nats == pytest.approx(whole.nats, rel=1e-10)
    in_steps = measure_quality(model, draws, make_cache=forgetful, step_lens=[9, 3])
    for nats, expected, examples in zip(in_steps.nats, whole.nats, draws):
        assert examples.is_answer[:, 10:].any() and abs(nats - expected) > 1e-4


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"step_lens": [12]}, "step_lens: expected with make_cache, got them without"),
        ({"step_lens": [5, 6]}, "step_lens: expected 12 tokens in all, got 11"),
        ({"step_lens": []}, "step_lens: expected 12 tokens in all, got 0"),
        ({"step_lens": [12, 0]}, "step_lens: expected an integer of at least 1, got 0"),
    ],
)
def test_steps_that_are_not_the_text_are_refused(settings, message):
    if "without" not in message:
        settings |= {"make_cache": PLAIN_CACHES["contiguous"]}
    with pytest.raises(ValueError, match=message):
        measure_quality(random_model(dtype=torch.float64), random_draws(), **settings)
