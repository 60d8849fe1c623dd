import json
import math

import pytest
import torch
from helpers import assert_close, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import training
from lib.config import MOBY, TINY, ModelConfig
from lib.measure.meter import measure
from lib.model import WEIGHTS, Transformer, attend_fused, load_model
from lib.text import DATA, decode, encode, load_book, split_book
from lib.training import (
    Trainer,
    TrainingConfig,
    accumulate_gradients,
    held_out_loss,
    learning_rate,
    next_token_loss,
    step_bytes,
    training_bytes,
)

SHORT = TrainingConfig(num_steps=6, batch_size=2, seq_len=16, warmup_steps=2)


def test_the_loss_is_minus_the_mean_log_probability_of_each_next_token():
    logits = torch.randn(3, 7, 11, dtype=torch.float64)
    token_ids = torch.randint(11, (3, 7))
    log_probs = []
    for b in range(3):
        for t in range(6):
            log_probs.append(logits[b, t].softmax(0)[token_ids[b, t + 1]].log())
    assert_close(next_token_loss(logits, token_ids), -torch.stack(log_probs).mean())


def test_held_out_loss_predicts_each_token_of_a_text_once():
    model, token_ids = (
        random_model(),
        torch.randint(256, (31,)),
    )  # 3 windows of 11, overlapping
    singles = [
        next_token_loss(logits, window)
        for window in (token_ids[start : start + 11].view(1, 11) for start in (0, 10, 20))
        for logits in [model(window, torch.arange(11), training.attend_fused)]
    ]
    expected = torch.stack(singles).mean().item()
    assert held_out_loss(model, token_ids, seq_len=11, batch_size=2) == pytest.approx(
        expected
    )


def test_the_learning_rate_warms_up_and_falls_to_zero():
    config = TrainingConfig(num_steps=100, warmup_steps=10, learning_rate=0.5)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.05) and max(rates) == rates[9] == rates[10] == 0.5
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0)
    # A cosine: 22 of 90 steps after the warm-up, and half of them.
    assert rates[32] == pytest.approx(0.25 * (1 + math.cos(math.pi * 22 / 90)))
    assert rates[55] == pytest.approx(0.25)
    assert [learning_rate(step, config) for step in (150, 10**6)] == [0, 0]
    # no room for a cosine
    assert learning_rate(100, TrainingConfig(num_steps=100, warmup_steps=100)) == 0
    assert learning_rate(60, TrainingConfig(num_steps=50, warmup_steps=100)) == 0


@pytest.mark.parametrize("shape", [(3, 1), (3, 0), (5,)])
def test_a_loss_of_no_predictions_is_refused(shape):
    with pytest.raises(ValueError, match="with T of at least 2, got"):
        next_token_loss(torch.zeros(*shape, 7), torch.zeros(*shape).long())


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="seq_len: expected 2 to 10.*got 64"):
        held_out_loss(random_model(), torch.arange(10), seq_len=64)
    with pytest.raises(ValueError, match="seq_len: expected 2 to 10.*got 1"):
        held_out_loss(random_model(), torch.arange(10), seq_len=1)


def test_a_saved_state_does_not_change_when_training_goes_on():
    trainer = new_trainer()
    trainer.step()
    state = trainer.state_dict()
    other = new_trainer()
    other.load_state_dict(state)
    trainer.step()
    assert len(state["losses"]) == len(other.losses) == 1
    other.step()
    assert len(state["losses"]) == 1


def measured_peak(config, batch_size, seq_len):
    """Of one step, gradients allocated before."""
    model = Transformer(config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batch, positions = torch.zeros(batch_size, seq_len).long(), torch.arange(seq_len)

    def step():
        next_token_loss(model(batch, positions, attend_fused), batch).backward()

    return measure(step).peak_bytes


@pytest.mark.parametrize("batch_size, seq_len", [(1, 256), (2, 128), (4, 64), (3, 200)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_peak_of_a_step_is_predicted_to_the_byte(batch_size, seq_len, dropout):
    config = ModelConfig(**{**vars(MOBY), "dropout": dropout})
    predicted = step_bytes(config, batch_size, seq_len)
    assert measured_peak(config, batch_size, seq_len) == sum(predicted.values())
    assert (predicted["dropout masks"] == 0) == (dropout == 0)


@settings(deadline=None, max_examples=25)
@given(
    L=st.integers(1, 3),
    H=st.sampled_from([1, 2, 4]),
    D=st.sampled_from([2, 8]),
    d_ff=st.integers(1, 200),
    vocab_size=st.integers(2, 300),
    batch_size=st.integers(1, 4),
    seq_len=st.integers(3, 40),  # of two tokens the logits need no copy
)
def test_no_step_holds_less_than_its_account(
    L, H, D, d_ff, vocab_size, batch_size, seq_len
):
    config = ModelConfig(vocab_size, L, H, 1, H * D, d_ff, 40, dropout=0.1)
    predicted = step_bytes(config, batch_size, seq_len)
    assert measured_peak(config, batch_size, seq_len) >= sum(predicted.values())


@pytest.mark.parametrize("num_parts", [1, 4])
def test_all_that_training_holds_is_predicted_to_the_byte(num_parts):
    config = TrainingConfig(batch_size=8, seq_len=128, num_parts=num_parts)
    token_ids = torch.arange(500) % 256

    def train():
        trainer = Trainer(Transformer(MOBY), token_ids, config)
        for _ in range(2):
            trainer.step()
        return len(list(trainer.model.parameters()))

    cost = measure(train)
    kinds = training_bytes(MOBY, 8, 128)
    predicted = kinds["weights"] + kinds["optimizer"] + 4 * cost.value  # step counters
    predicted += sum(step_bytes(MOBY, 8 // num_parts, 128).values())
    predicted += 8 * (8 * 128 + 128)  # token ids and positions
    if num_parts > 1:  # the first part's gradients are there, and its loss
        predicted += kinds["gradients"] + 4
    assert cost.peak_bytes == predicted


@pytest.mark.parametrize("num_parts", [1, 2, 3, 5])
def test_gradients_of_parts_add_up_to_those_of_the_batch(num_parts):
    model, batch = random_model(dtype=torch.float64), torch.randint(256, (5, 12))
    loss = next_token_loss(model(batch, torch.arange(12), attend_fused), batch)
    loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    got = accumulate_gradients(model, batch, num_parts)
    assert got == pytest.approx(loss.item(), rel=1e-12)
    for parameter, gradient in zip(model.parameters(), expected):
        assert_close(parameter.grad, gradient)
    accumulate_gradients(model, batch, num_parts)  # adds to what is there
    assert_close(parameter.grad, 2 * gradient)


def test_parts_hold_the_activations_of_one_at_a_time_for_the_same_work():
    model, batch = random_model(), torch.zeros(8, 64).long()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    whole, parts = (
        measure(lambda n=n: accumulate_gradients(model, batch, n)) for n in (1, 4)
    )
    assert 0.24 < parts.peak_bytes / whole.peak_bytes < 0.27
    assert parts.flops == whole.flops and parts.calls["Embedding"] == 4


@pytest.mark.parametrize("num_parts", [0, 6, -1])
def test_more_parts_than_passages_or_none_are_refused(num_parts):
    with pytest.raises(ValueError, match=f"num_parts: expected 1 to 5.*got {num_parts}"):
        accumulate_gradients(random_model(), torch.zeros(5, 12).long(), num_parts)
    with pytest.raises(ValueError, match=f"num_parts: expected .*got {num_parts}"):
        TrainingConfig(batch_size=5, seq_len=12, num_parts=num_parts)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_parts": True}, "num_parts: expected an integer of at least 1, got True"),
        ({"num_parts": 2.0}, "num_parts: expected an integer of at least 1, got 2.0"),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
        ({"max_grad_norm": -1}, "max_grad_norm: expected a number of at least 0, got -1"),
        ({"learning_rate": math.nan}, "learning_rate: expected a number .*, got nan"),
    ],
)
def test_settings_that_train_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**change)


def test_a_batch_is_cut_into_as_many_parts_as_were_asked_for():
    cost = measure(
        lambda: accumulate_gradients(random_model(), torch.zeros(5, 9).long(), 4)
    )
    assert cost.calls["Embedding"] == 4
    with pytest.raises(ValueError, match="num_parts: .*got True"):
        accumulate_gradients(random_model(), torch.zeros(5, 9).long(), True)


def test_logits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"got \(4, 3, 7\) and \(2, 5\)"):
        next_token_loss(torch.randn(4, 3, 7), torch.zeros(2, 5).long())


def test_passages_may_fill_the_model():
    trainer = Trainer(random_model(), torch.arange(200), TrainingConfig(seq_len=128))
    assert trainer.config.seq_len == trainer.model.config.max_seq_len


def test_a_trainer_takes_the_same_step_in_parts():
    trainers = [
        Trainer(
            random_model(dtype=torch.float64),
            torch.arange(200) % 256,
            TrainingConfig(num_steps=6, batch_size=4, seq_len=16, num_parts=num_parts),
        )
        for num_parts in (1, 4)
    ]
    for trainer in trainers:
        trainer.step()
    assert trainers[0].losses == pytest.approx(trainers[1].losses)
    for one, other in zip(*(trainer.model.parameters() for trainer in trainers)):
        assert_close(one, other)


def test_one_batch_can_be_learned_by_heart():
    token_ids = torch.randint(256, (17,), generator=torch.Generator().manual_seed(0))
    config = TrainingConfig(num_steps=80, batch_size=1, seq_len=17, warmup_steps=5)
    trainer = Trainer(random_model(), token_ids, config)
    losses = [trainer.step() for _ in range(80)]
    assert losses[-1] < 0.1 < losses[0], losses[-1]


def test_gains_are_not_decayed():
    trainer = Trainer(random_model(), torch.zeros(16, dtype=torch.int64), SHORT)
    decay = {
        id(parameter): group["weight_decay"]
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    for parameter in trainer.model.parameters():
        assert decay[id(parameter)] == (0.1 if parameter.dim() == 2 else 0.0)


def new_trainer() -> Trainer:
    model = random_model(dropout=0.3)
    torch.manual_seed(4)  # dropout's
    return Trainer(model, torch.arange(200) % 256, SHORT)


def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(tmp_path):
    whole = new_trainer()
    for _ in range(6):
        whole.step()

    first = new_trainer()
    for _ in range(3):
        first.step()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = Trainer(random_model(seed=9, dropout=0.3), torch.arange(200) % 256, SHORT)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(3):
        second.step()
    assert second.losses == whole.losses
    for got, expected in zip(second.model.parameters(), whole.model.parameters()):
        assert torch.equal(got, expected)


def test_the_state_of_another_run_is_refused():
    other = Trainer(random_model(), torch.arange(200), TrainingConfig(seq_len=16, seed=5))
    with pytest.raises(
        ValueError, match="expected a run of .*'seed': 0.*got .*'seed': 5"
    ):
        new_trainer().load_state_dict(other.state_dict())
    other = Trainer(random_model(dropout=0.2), torch.arange(200), SHORT)
    with pytest.raises(ValueError, match="'dropout': 0.3.*got .*'dropout': 0.2"):
        new_trainer().load_state_dict(other.state_dict())


def test_dropout_is_on_again_after_an_evaluation():
    trainer = new_trainer()
    held_out_loss(trainer.model, torch.arange(32), seq_len=16)
    assert not trainer.model.training
    trainer.step()
    assert trainer.model.training


@pytest.mark.parametrize("seq_len", [129, 512])
def test_passages_the_model_cannot_learn_from_are_refused(seq_len):
    with pytest.raises(ValueError, match=f"seq_len: expected 2 to .*128.*got {seq_len}"):
        Trainer(random_model(), torch.arange(200), TrainingConfig(seq_len=seq_len))


TRAIN, HELD_OUT = "Call me Ishmael. " * 36, "01234567890123456" * 4  # a tenth of all


@pytest.fixture
def small_run(monkeypatch):
    """`train` a tiny model on a short text whose last tenth has letters of its own."""
    monkeypatch.setattr(training, "MOBY", TINY)
    monkeypatch.setattr(training, "load_book", lambda: TRAIN + HELD_OUT)
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    monkeypatch.setattr(training, "EVALUATE_EVERY", 2)
    num_threads = torch.get_num_threads()
    yield lambda folder: training.train(
        SHORT, 1, folder / "weights.pt", folder / "results"
    )
    torch.set_num_threads(num_threads)


def test_the_command_writes_weights_curve_and_picture(small_run, tmp_path, capfd):
    small_run(tmp_path)
    model = load_model(tmp_path / "weights.pt")
    assert model.config == TINY
    result = json.loads((tmp_path / "results" / "training.json").read_text())
    assert [step for step, _ in result["held_out_nats_per_byte"]] == [0, 2, 4, 6]
    assert len(result["train_nats_per_byte"]) == 6
    assert result["machine"]["torch"] == torch.__version__
    assert "lib.training" in result["command"]
    assert (tmp_path / "results" / "training.png").stat().st_size > 5000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results", "weights.pt"]
    assert capfd.readouterr().err == ""

    _, held_out_ids = split_book(encode(TRAIN + HELD_OUT))
    loss = held_out_loss(model, held_out_ids, SHORT.seq_len)
    assert result["held_out_nats_per_byte"][-1][1] == pytest.approx(loss)


def test_the_command_never_trains_on_what_is_held_out(small_run, tmp_path, monkeypatch):
    texts = []
    init = Trainer.__init__

    def watch(self, model, token_ids, config):
        texts.append(decode(token_ids))
        init(self, model, token_ids, config)

    monkeypatch.setattr(Trainer, "__init__", watch)
    small_run(tmp_path)
    assert texts == [TRAIN]


def test_the_command_goes_on_where_it_was_interrupted(small_run, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir(), (tmp_path / "halves").mkdir()
    small_run(tmp_path / "whole")
    step, num_steps = Trainer.step, 0

    def counted_step(self):
        nonlocal num_steps
        if num_steps == 5:
            raise KeyboardInterrupt
        num_steps += 1
        return step(self)

    monkeypatch.setattr(Trainer, "step", counted_step)
    with pytest.raises(KeyboardInterrupt):
        small_run(tmp_path / "halves")
    num_steps = 10  # and count on; the state was saved after step 4
    small_run(tmp_path / "halves")
    assert num_steps == 12, f"expected 2 steps to be left, got {num_steps - 10}"

    whole, halves = (
        json.loads((tmp_path / name / "results" / "training.json").read_text())
        for name in ("whole", "halves")
    )
    for key in ("held_out_nats_per_byte", "train_nats_per_byte"):
        assert halves[key] == whole[key]
    whole, halves = (load_model(tmp_path / n / "weights.pt") for n in ("whole", "halves"))
    for got, expected in zip(halves.parameters(), whole.parameters()):
        assert torch.equal(got, expected)


def test_the_command_line_is_what_train_is_called_with(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(training, "train", lambda *args: calls.append(args))
    paths = f"--out {tmp_path}/w.pt --results {tmp_path}"
    line = f"training --steps 7 --seed 3 --threads 2 {paths}"
    monkeypatch.setattr("sys.argv", line.split())
    training.main()
    config = TrainingConfig(num_steps=7, seed=3)
    assert calls == [(config, 2, tmp_path / "w.pt", tmp_path)]


def test_the_shipped_weights_reach_the_loss_that_their_results_claim():
    result = json.loads((DATA / "results" / "training.json").read_text())
    _, held_out_ids = split_book(encode(load_book()))
    loss = held_out_loss(load_model(WEIGHTS), held_out_ids, result["training"]["seq_len"])
    assert loss == pytest.approx(result["held_out_nats_per_byte"][-1][1], abs=1e-4)
    assert loss <= 1.37, f"expected at most 1.37 nats per byte held out, got {loss}"
