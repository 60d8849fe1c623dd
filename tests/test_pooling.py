import functools
import json
from dataclasses import dataclass

import pytest
import torch
from helpers import random_model

from lib.kv_heads import with_kv_heads
from lib.measure import pooling, quality
from lib.model import load_model
from lib.text import encode, load_book, split_book
from lib.training import TrainingConfig


@dataclass(frozen=True)
class Short(TrainingConfig):
    num_steps: int = 240  # of which a twentieth is 12
    batch_size: int = 2
    seq_len: int = 16


def test_the_command_trains_the_pooled_model_and_writes_what_it_found(
    monkeypatch, tmp_path, capfd
):
    num_threads = torch.get_num_threads()
    path = tmp_path / "pooling.json"
    small = lambda n, T, generator: quality.passages(2, 12, generator)  # noqa: E731
    train_ids, _ = split_book(encode(load_book()))
    model = functools.partial(random_model, dropout=0.3)
    trained = []
    step = pooling.Trainer.step

    def noting(self):
        trained.append(self.model.config.num_kv_heads)
        assert self.config.learning_rate == 1e-3
        assert torch.equal(self.token_ids, train_ids)
        return step(self)

    monkeypatch.setattr(pooling, "RESULTS", path)
    monkeypatch.setattr(pooling, "TrainingConfig", Short)
    monkeypatch.setattr(pooling, "load_model", model)
    monkeypatch.setattr(pooling, "passages", small)
    monkeypatch.setattr(pooling.Trainer, "step", noting)
    monkeypatch.setattr("sys.argv", ["lib/measure/pooling.py"])
    try:
        pooling.main()
    finally:
        torch.set_num_threads(num_threads)
    assert trained == [1] * 12
    result = json.loads(path.read_text())
    assert [row[0] for row in result["step_and_nats_per_byte"]] == [0, 10]
    assert len({len(row) for row in result["step_and_nats_per_byte"]}) == 1
    assert result["model"]["num_kv_heads"] == 1
    assert result["training"]["num_steps"] == 12
    assert result["command"] == "python -m lib.measure.pooling"
    draws = [small(8, 256, torch.Generator().manual_seed(seed)) for seed in range(3)]
    unpooled = quality.measure_quality(model(), draws)
    assert result["nats_per_byte_unpooled"] == pytest.approx(unpooled.nats)
    pooled = quality.measure_quality(with_kv_heads(model(), 1), draws)
    assert result["step_and_nats_per_byte"][0][1:] == pytest.approx(pooled.nats, abs=1e-4)
    captured = capfd.readouterr()
    assert "  10 steps:" in captured.out and captured.err == ""


def test_what_was_found_begins_with_what_is_measured_here():
    found = json.loads(pooling.RESULTS.read_text())
    draws = [
        quality.passages(8, 256, torch.Generator().manual_seed(seed)) for seed in range(3)
    ]
    unpooled = quality.measure_quality(load_model(), draws)
    assert found["nats_per_byte_unpooled"] == pytest.approx(unpooled.nats, abs=1e-3)
    pooled = quality.measure_quality(with_kv_heads(load_model(), 1), draws)
    step, *nats = found["step_and_nats_per_byte"][0]
    assert step == 0 and nats == pytest.approx(pooled.nats, abs=1e-3)
    assert found["step_and_nats_per_byte"][-1][0] == TrainingConfig.num_steps // 20
