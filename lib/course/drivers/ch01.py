"""Chapter 1: run an answer, give plain data."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from numbers import Integral, Real

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks

from lib import sampling
from lib.config import ModelConfig
from lib.course.attempt import words_of
from lib.course.exercises import exercises
from lib.measure.meter import measure
from lib.model import Transformer, attend_fused


def decode(answer: Callable, token_ids: list[int]) -> dict:
    token_ids = torch.tensor(token_ids, dtype=torch.int64)
    refusals = (ValueError, TypeError) if token_ids.dim() > 1 else ValueError
    try:
        return {"text": answer(token_ids)}
    except UnicodeError:  # a ValueError too, but not for an id that is no byte
        raise
    except refusals:
        return {"text": "ValueError"}


def attend_causal(answer: Callable, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> dict:
    q, k, v = (torch.from_numpy(x) for x in (q, k, v))
    cost = measure(lambda: answer(0, q, k, v))
    return {
        "out": as_array(cost.value),
        "peak_bytes": cost.peak_bytes,
        "largest_tensor_bytes": max(np.diff([0, *cost.timeline]).tolist()),
    }


def next_token_probs(answer: Callable, logits: np.ndarray, settings: dict) -> dict:
    try:
        probs = as_array(answer(torch.from_numpy(logits), **settings))
    except ValueError:
        return {"probs": "ValueError", "tokens kept": "ValueError"}
    is_array = isinstance(probs, np.ndarray) and probs.ndim > 0
    kept = (probs > 0).sum(axis=-1).tolist() if is_array else probs
    return {"probs": probs, "tokens kept": kept}


def generate_recompute(
    answer: Callable,
    model_seed: int,
    prompt_ids: list,
    num_new_tokens: int,
    settings: dict,
    draw_seed: int,
    has_generator: bool,
    behind: list[int | None],
    training_dropout: float | None,
) -> dict:
    """behind: where it is not empty, for each token the one that the model writes behind
    it, or None. training_dropout: where it is not None, the model comes in training mode,
    with that probability."""
    model, calls, layers, seen = random_model(model_seed), [], [], []
    if behind:
        write_behind(model, behind)
    if training_dropout is not None:
        begin_training(model, training_dropout)
    num_calls = count_calls(model)
    # The first block sees each call of the model, however it was called.
    model.blocks[0].register_forward_pre_hook(
        lambda _, args: calls.append(_tokens_and_positions(*args))
    )

    def attend(layer, q, k, v):
        layers.append(layer)
        return attend_fused(layer, q, k, v)

    generator = torch.Generator().manual_seed(draw_seed) if has_generator else None
    prompt = torch.tensor(prompt_ids, dtype=torch.int64)
    options = {"generator": generator, "attend": attend, **settings}
    torch.manual_seed(draw_seed + 1)
    state = torch.get_rng_state()
    try:
        with (
            torch.enable_grad(),
            _settings_seen(seen),
            kept_for_a_backward_pass() as kept,
        ):
            token_ids = answer(model, prompt, num_new_tokens, **options)
            are_gradients_on = torch.is_grad_enabled()
    except ValueError as error:
        return refusal(error, "generate_recompute", answer)
    asked = [settings.get(name, default) for name, default in DEFAULTS.items()]
    return {
        "raised": "nothing",
        "token_ids": as_list(token_ids),
        "forward_calls": len(num_calls),
        "calls": calls,
        "calls_of_attend": len(layers),
        "prompt_is_as_before": prompt.tolist() == prompt_ids,
        "random_state_of_torch_is_as_before": torch.equal(state, torch.get_rng_state()),
        "gradients_are_on_as_before": are_gradients_on,
        "model_is_in_its_mode_as_before": model.training
        == (training_dropout is not None),
        "next_random_number": next_random_number(settings, generator),
        "tensors_kept_for_a_backward_pass": len(kept),
        **({} if all(s == asked for s in seen) else {"other_settings": True}),
    }


def attention_flops(
    answer: Callable, config: dict, prompt_len: int, num_new_tokens: int
) -> dict:
    flops = answer(ModelConfig(**config), prompt_len, num_new_tokens)
    return {"flops": as_number(flops)}


ON_META = "a tensor on the device meta, which holds no numbers"
DEFAULTS = {"temperature": 1.0, "top_k": None, "top_p": 1.0}


@contextlib.contextmanager
def _settings_seen(seen: list) -> Iterator[None]:
    """While inside, what next_token_probs gets beside its logits is kept in `seen`."""
    original = sampling.next_token_probs

    def next_token_probs(logits, temperature=1.0, top_k=None, top_p=1.0):
        seen.append([temperature, top_k, top_p])
        return original(logits, temperature, top_k, top_p)

    sampling.next_token_probs = next_token_probs
    try:
        yield
    finally:
        sampling.next_token_probs = original


@contextlib.contextmanager
def kept_for_a_backward_pass() -> Iterator[list]:
    """While inside, the shapes of what autograd keeps are kept too. (The meter sees each
    operation, which takes three times as long.)"""
    shapes = []

    def pack(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield shapes


def count_calls(model: Transformer) -> list:
    """Of the model from now on: as long as there are calls."""
    calls = []
    model.embed.register_forward_pre_hook(lambda *_: calls.append(None))
    return calls


def _tokens_and_positions(x: torch.Tensor, positions: torch.Tensor, attend) -> dict:
    return {
        "num_tokens": x.shape[-2],
        "first_position": positions.min().item(),
        "last_position": positions.max().item(),
    }


def refusal(error: Exception, name: str, answer: Callable) -> dict:
    """What the answer to the exercise of this name has raised, and what it says, which is
    shown where nothing should have been raised, and else not compared."""
    kind = "ValueError" if isinstance(error, ValueError) else type(error).__name__
    return {"raised": kind, "says": words_of(error, exercises()[name], answer)}


def write_behind(model: Transformer, behind: list[int | None]):
    """Let greedy text go from each token to the one behind it: blocks that add nothing,
    and the unembedding that likes the token behind best."""
    tokens = [token for token, following in enumerate(behind) if following is not None]
    with torch.no_grad():
        for block in model.blocks:
            block.attention.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        norm, linear = model.unembed
        linear.weight.zero_()
        following = torch.tensor([behind[token] for token in tokens])
        linear.weight.index_add_(0, following, norm(model.embed.weight[tokens]))


def begin_training(model: Transformer, dropout: float):
    """Into training mode, with that probability of dropout."""
    model.config = dataclasses.replace(model.config, dropout=dropout)
    for block in model.blocks:
        block.dropout.p = dropout
    model.train()


def next_random_number(settings: dict, generator: torch.Generator | None) -> float | None:
    """Of whoever seeds anew, or draws more, another one. None where one token is left:
    whether it is drawn is free."""
    if settings["temperature"] > 0 and {*settings} == {"temperature"}:
        return torch.rand(1, generator=generator).item()
    return None


def random_model(seed: int) -> Transformer:
    """A small model in float64, so that rounding cannot turn one token into another."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(256, 1, 4, 2, d_model=16, d_ff=32, max_seq_len=64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)
    return model.double().eval()


def as_array(value) -> np.ndarray | str:
    """A tensor as plain data; what is no tensor as a word about it."""
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}, not a tensor"
    if value.is_meta:
        return ON_META
    if value.dtype == torch.bfloat16:  # numpy has none
        return "a tensor of bfloat16"
    return value.detach().cpu().numpy()


def as_list(value) -> list | str:
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}, not a tensor"
    if value.is_meta:
        return ON_META
    if value.dtype != torch.int64:
        return f"a tensor of {value.dtype}, not of int64"
    return value.tolist()


def as_number(value) -> float | int | str:
    """A number of Python's, numpy's or torch's; what is none as a word about it."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    return f"a {type(value).__name__}, not a number"
