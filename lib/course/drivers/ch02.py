"""Chapter 2: run an answer, give plain data."""

from collections.abc import Callable

import numpy as np
import torch

from lib.checkpointing import run_blocks
from lib.config import ModelConfig
from lib.course.drivers.ch01 import as_array
from lib.measure.meter import measure
from lib.model import Transformer, attend_fused


def next_token_loss(answer: Callable, logits: np.ndarray, token_ids: np.ndarray) -> dict:
    logits = torch.from_numpy(logits).requires_grad_()
    loss = answer(logits, torch.from_numpy(token_ids))
    if isinstance(loss, torch.Tensor) and loss.requires_grad and loss.dim() == 0:
        loss.backward()
    return {"loss": as_array(loss), "gradient": as_array(logits.grad)}


def training_bytes(answer: Callable, config: dict, batch_size: int, seq_len: int) -> dict:
    got = answer(ModelConfig(**config), batch_size, seq_len)
    return dict(got) if isinstance(got, dict) else {"weights": str(got)}


def checkpoint(
    answer: Callable,
    seed: int,
    num_layers: int,
    num_segments: int,
    dropout: float,
    input_wants_gradient: bool,
) -> dict:
    """A step over `num_segments` equal segments, each through the answer."""
    size = num_layers // num_segments

    def run(blocks, x, positions):
        for start in range(0, num_layers, size):
            segment = blocks[start : start + size]
            x = answer(
                lambda x, segment=segment: run_blocks(
                    segment, x, positions, attend_fused
                ),
                x,
            )
        return x

    return _step(run, seed, num_layers, dropout, input_wants_gradient)


def checkpoint_recursive(
    answer: Callable, seed: int, num_layers: int, dropout: float
) -> dict:
    def run(blocks, x, positions):
        return answer(blocks, x, positions, attend_fused)

    return _step(run, seed, num_layers, dropout, input_wants_gradient=True)


def best_num_segments(
    answer: Callable, num_layers: int, edge_bytes: int, block_bytes: int
) -> dict:
    return {"segments": answer(num_layers, edge_bytes, block_bytes)}


def blocks_to_keep(
    answer: Callable,
    num_layers: int,
    edge_bytes: int,
    block_bytes: int,
    budget_bytes: int,
) -> dict:
    try:
        return {"kept": answer(num_layers, edge_bytes, block_bytes, budget_bytes)}
    except ValueError:
        return {"kept": "ValueError"}


def _step(
    run: Callable, seed: int, num_layers: int, dropout: float, input_wants_gradient: bool
) -> dict:
    """Forward and backward over random blocks in float64: gradients, and what it cost."""
    rng = np.random.default_rng(seed)  # torch rounds its own otherwise on other machines
    config = ModelConfig(256, num_layers, 2, 1, 16, 24, 16, dropout=dropout)
    blocks = Transformer(config).double().train().blocks
    for parameter in blocks.parameters():
        if parameter.dim() == 2:
            parameter.data = torch.from_numpy(rng.normal(0, 0.16, parameter.shape))
    x = torch.from_numpy(rng.normal(size=(2, 8, 16)))
    x = x.requires_grad_(input_wants_gradient)
    torch.manual_seed(seed)
    torch.rand(())  # whoever sets the seed anew goes back to before this
    positions = torch.arange(8)
    forward = measure(lambda: run(blocks, x, positions))
    loss = forward.value.square().sum()
    backward = measure(loss.backward)
    gradients = [p.grad for p in blocks.parameters()]
    return {
        "out": as_array(forward.value),
        "gradient of x": "none" if x.grad is None else as_array(x.grad),
        "gradients": ["none" if g is None else as_array(g) for g in gradients],
        "next random number": torch.rand(()).item(),
        "block_calls": forward.calls["Block"] + backward.calls["Block"],
        "bytes_saved_by_the_forward_pass": forward.saved_bytes,
        "bytes_saved_by_the_backward_pass": backward.saved_bytes,
    }
