"""Chapter 1: run an answer, give plain data."""

from collections.abc import Callable

import numpy as np
import torch

from lib.config import ModelConfig
from lib.measure.meter import measure
from lib.model import Transformer, attend_fused


def decode(answer: Callable, token_ids: list[int]) -> dict:
    return {"text": answer(torch.tensor(token_ids, dtype=torch.int64))}


def attend_causal(answer: Callable, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> dict:
    q, k, v = (torch.from_numpy(x) for x in (q, k, v))
    cost = measure(lambda: answer(0, q, k, v))
    return {
        "out": as_array(cost.value),
        "peak_bytes": cost.peak_bytes,
        "largest_tensor_bytes": max(np.diff([0, *cost.timeline]).tolist()),
    }


def next_token_probs(answer: Callable, logits: np.ndarray, settings: dict) -> dict:
    return {"probs": as_array(answer(torch.from_numpy(logits), **settings))}


def generate_recompute(
    answer: Callable,
    model_seed: int,
    prompt_ids: list,
    num_new_tokens: int,
    settings: dict,
    draw_seed: int,
) -> dict:
    model, positions, layers = random_model(model_seed), [0], []
    model.register_forward_pre_hook(
        lambda _, args: positions.append(args[1].min().item())
    )

    def attend(layer, q, k, v):
        layers.append(layer)
        return attend_fused(layer, q, k, v)

    run = lambda: answer(  # noqa: E731
        model,
        torch.tensor(prompt_ids, dtype=torch.int64),
        num_new_tokens,
        generator=torch.Generator().manual_seed(draw_seed),
        attend=attend,
        **settings,
    )
    cost = measure(run)
    return {
        "token_ids": as_list(cost.value),
        "forward_calls": cost.calls["Embedding"],
        "calls_of_attend": len(layers),
        "lowest_position": max(positions),
        "kept_for_a_backward_pass_bytes": cost.saved_bytes,
    }


def attention_flops(
    answer: Callable, config: dict, prompt_len: int, num_new_tokens: int
) -> dict:
    return {"flops": answer(ModelConfig(**config), prompt_len, num_new_tokens)}


def random_model(seed: int) -> Transformer:
    """A small model in float64, so that rounding cannot turn one token into another."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(256, 2, 4, 2, d_model=16, d_ff=32, max_seq_len=64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)
    return model.double().eval()


def as_array(value) -> np.ndarray | str:
    """A tensor as plain data; what is no tensor as a word about it."""
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}, not a tensor"
    if value.is_meta:
        return "a tensor on the device meta, which holds no numbers"
    return value.detach().cpu().numpy()


def as_list(value) -> list | str:
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}, not a tensor"
    if value.dtype != torch.int64:
        return f"a tensor of {value.dtype}, not of int64"
    return value.tolist()
