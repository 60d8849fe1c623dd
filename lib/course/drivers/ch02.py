"""Chapter 2: run an answer, give plain data."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lib.checkpointing import run_blocks
from lib.config import ModelConfig
from lib.course.drivers.ch01 import as_array, as_number, refusal
from lib.measure.meter import measure
from lib.model import Transformer, attend_fused


def next_token_loss(answer: Callable, logits: np.ndarray, token_ids: np.ndarray) -> dict:
    logits = torch.from_numpy(logits).requires_grad_()
    try:
        loss = answer(logits, torch.from_numpy(token_ids))
    except ValueError:
        return {"loss": "ValueError", "gradient": "none"}
    if isinstance(loss, torch.Tensor) and loss.requires_grad and loss.dim() == 0:
        loss.backward()
    return {"loss": as_array(loss), "gradient": as_array(logits.grad)}


def training_bytes(answer: Callable, config: dict, batch_size: int, seq_len: int) -> dict:
    got = answer(ModelConfig(**config), batch_size, seq_len)
    if not isinstance(got, dict):
        return {"weights": f"a {type(got).__name__}, not a dict"}
    return {kind: as_number(num_bytes) for kind, num_bytes in got.items()}


def accumulate_gradients(
    answer: Callable,
    seed: int,
    token_ids: list,
    num_parts: int,
    has_gradients: bool,
) -> dict:
    config = ModelConfig(32, 1, 2, 1, d_model=16, d_ff=24, max_seq_len=6)
    model = with_weights(Transformer(config), seed)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if has_gradients else None
    batch = torch.tensor(token_ids)
    try:
        cost = measure(lambda: answer(model, batch, num_parts))
    except ValueError as error:
        gradients = [plain_gradient(parameter) for parameter in model.parameters()]
        refused = refusal(error, "accumulate_gradients", answer)
        return {**refused, "gradients": gradients}
    loss = cost.value
    as_before = with_weights(Transformer(config), seed)
    parts = torch.tensor(token_ids).tensor_split(num_parts)
    return {
        "raised": "nothing",
        "loss if each part counted the same": _mean_of_means(as_before, parts),
        "loss": loss if isinstance(loss, float) else f"a {type(loss).__name__}",
        "gradients": [plain_gradient(parameter) for parameter in model.parameters()],
        "weights_are_as_before": all(map(torch.equal, weights, model.parameters())),
        "model_is_in_training_mode_as_before": model.training,
        "bytes_kept_for_the_backward_pass": cost.saved_bytes,
        "forward_calls": cost.calls["Embedding"],
    }


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

    def run(blocks, x, positions, attend):
        for start in range(0, num_layers, size):
            segment = blocks[start : start + size]
            x = answer(
                lambda x, segment=segment: run_blocks(segment, x, positions, attend), x
            )
        return x

    outputs, again = _step(run, seed, num_layers, dropout, input_wants_gradient)
    return {**outputs, "first gradient if the loss were a sum": again()}


def checkpoint_recursive(
    answer: Callable, seed: int, num_layers: int, dropout: float
) -> dict:
    return _step(answer, seed, num_layers, dropout, input_wants_gradient=True)[0]


def best_num_segments(
    answer: Callable, num_layers: int, edge_bytes: int, block_bytes: int
) -> dict:
    return {"segments": as_number(answer(num_layers, edge_bytes, block_bytes))}


def blocks_to_keep(
    answer: Callable,
    num_layers: int,
    edge_bytes: int,
    block_bytes: int,
    working_bytes: int,
    budget_bytes: int,
) -> dict:
    sizes = num_layers, edge_bytes, block_bytes, working_bytes, budget_bytes
    try:
        return {"kept": as_number(answer(*sizes))}
    except ValueError:
        return {"kept": "ValueError"}


def checkpoint_selective(
    answer: Callable, kind: str, inputs: list, weights: list, gain: np.ndarray
) -> dict:
    gain = torch.from_numpy(gain).requires_grad_()
    runs = {
        "square": lambda x: x.square(),
        "gate": lambda gate, up: torch.sigmoid(gate) * gate * up,
        "norm": lambda x: gain * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt(),
    }
    num_calls = 0

    def run(*args):
        nonlocal num_calls
        num_calls += 1
        return runs[kind](*args)

    inputs = [torch.from_numpy(x).requires_grad_() for x in inputs]
    weights = [torch.from_numpy(weight).requires_grad_() for weight in weights]
    # As inside a model: what others made, and what is kept anyway.
    made = [x * 1.0 for x in inputs]
    forward = measure(lambda: answer(run, made, weights))
    outs = forward.value
    is_tuple = isinstance(outs, (tuple, list))
    is_fine = is_tuple and all(isinstance(out, torch.Tensor) for out in outs)
    out_bytes = sum(out.nbytes for out in outs) if is_fine else 0
    loss = sum(out.square().sum() for out in outs) if is_fine else None
    backward = measure(loss.backward if is_fine else lambda: None)
    return {
        "outs": [as_array(out) for out in outs] if is_tuple else as_array(outs),
        "gradients of inputs": [plain_gradient(x) for x in inputs],
        "gradients of weights": [plain_gradient(weight) for weight in weights],
        "gradient of the gain": plain_gradient(gain),
        "bytes_saved_beside_inputs_and_weights": forward.saved_bytes,
        "bytes_held_beside_inputs_and_weights": forward.timeline[-1] - out_bytes,
        "flops_of_products": (forward.flops + backward.flops).total(),
        "times_run_was_called": num_calls,
    }


class Block(nn.Module):
    """In the place of the model's: as many things that may go wrong, dropout, positions
    and `attend`, but less inside, so that an edge too many shows in few blocks."""

    SIZE = 32

    def __init__(self, layer: int, dropout: float):
        super().__init__()
        self.layer, self.dropout = layer, nn.Dropout(dropout)
        self.proj = nn.Linear(self.SIZE, self.SIZE, bias=False)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, attend: Callable
    ) -> torch.Tensor:
        q = self.proj(x).unsqueeze(-2)  # (B, T, 1, C): one head
        k = q * positions.to(x.dtype).cos().view(-1, 1, 1)
        return x + self.dropout(attend(self.layer, q, k, q).squeeze(-2))


def with_weights(model: nn.Module, seed: int) -> nn.Module:
    """In float64, with weights that numpy draws: torch rounds its own otherwise on other
    machines."""
    rng = np.random.default_rng(seed)
    for parameter in model.double().parameters():
        if parameter.dim() == 2:
            parameter.data = torch.from_numpy(rng.normal(0, 0.16, parameter.shape))
    return model


@torch.no_grad()
def _mean_of_means(model: Transformer, parts: Sequence[torch.Tensor]) -> float:
    """Of the losses of the parts: to be computed when the answer has ended, which could
    look for it."""
    means = [
        cross_entropy(
            model(part, torch.arange(part.shape[1]), attend_fused)[:, :-1].flatten(0, 1),
            part[:, 1:].flatten(),
        )
        for part in parts
        if len(part) > 0
    ]
    return sum(means).item() / len(parts)


def plain_gradient(tensor: torch.Tensor) -> np.ndarray | str:
    return "none" if tensor.grad is None else as_array(tensor.grad)


def _step(
    run: Callable, seed: int, num_layers: int, dropout: float, input_wants_gradient: bool
) -> tuple[dict, Callable]:
    """Forward and backward over random blocks in float64: gradients, and what it cost.

    The second is the same with a sum for a loss, and gives the first gradient.
    """
    blocks = nn.ModuleList(Block(layer, dropout) for layer in range(num_layers))
    with_weights(blocks, seed).train()
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 8, Block.SIZE)))
    x.requires_grad_(input_wants_gradient)
    positions, layers, seen = 2 * torch.arange(8), [], []
    hook = blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[1]))

    def attend(layer, q, k, v):
        layers.append(layer)
        return 0.5 * attend_fused(layer, q, k, v)

    def begin():
        torch.manual_seed(seed)
        torch.rand(())  # whoever sets the seed anew goes back to before this
        return run(blocks, x, positions, attend)

    forward = measure(begin)
    hook.remove()
    layers_forward = list(layers)
    out = forward.value
    out_bytes = out.nbytes if isinstance(out, torch.Tensor) else 0
    loss = forward.value.square().sum()
    backward = measure(loss.backward)
    next_random_number = torch.rand(()).item()
    gradients = [plain_gradient(p) for p in blocks.parameters()]
    gradient_of_x = plain_gradient(x)

    def again():
        blocks.zero_grad()
        x.grad = None
        begin().sum().backward()
        return plain_gradient(next(blocks.parameters()))

    outputs = {
        "layers that attended, forward": layers_forward,
        "positions of the first block": seen[0].tolist() if seen else "none",
        "out": as_array(forward.value),
        "gradient of x": gradient_of_x,
        "gradients": gradients,
        "next random number": next_random_number,
        "block_calls": forward.calls["Block"] + backward.calls["Block"],
        "bytes_saved_by_the_forward_pass": forward.saved_bytes,
        "bytes_held_after_the_forward_pass": forward.timeline[-1] - out_bytes,
        "bytes_saved_by_the_backward_pass": backward.saved_bytes,
    }
    return outputs, again
