"""Chapter 9: run an answer, give plain data."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lib.config import ModelConfig
from lib.course.drivers.ch01 import as_array, as_number, refusal
from lib.course.drivers.ch07 import _Made

# One token


def linear_step(
    answer: Callable,
    state: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    decay: np.ndarray,
) -> dict:
    return _step(answer, state, q, k, v, decay)


def delta_step(
    answer: Callable, state: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray
) -> dict:
    return _step(answer, state, q, k, v)


def _step(answer: Callable, state: np.ndarray, *others: np.ndarray) -> dict:
    given = torch.tensor(state)
    found = answer(given, *(torch.from_numpy(x) for x in others))
    return {**_out_and_state(found), "state_is_as_before": _is_as(state, given)}


def _is_as(array: np.ndarray, tensor: torch.Tensor) -> bool:
    return torch.equal(torch.from_numpy(array), tensor.detach())


def _out_and_state(value: Any) -> dict:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return {"state": f"a {type(value).__name__}, not the two tensors out and state"}
    out, state = map(as_array, value)
    return {"state": state, "out": out}


# Whole texts


def decay_mask(answer: Callable, decay: np.ndarray, T: int) -> dict:
    return {"mask": as_array(answer(torch.from_numpy(decay), T))}


def linear_parallel(
    answer: Callable,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    decay: np.ndarray,
    grad_out: np.ndarray | None,
) -> dict:
    """grad_out: where it is not None, gradients are asked for, of the sum of its products
    with out."""
    text = _Text({"q": q, "k": k, "v": v}, is_trained=grad_out is not None)
    with _MadeSquares(q.shape[-1]) as made:
        out = answer(*text.given, torch.from_numpy(decay))
    text.give_back()
    found = {"out": as_array(out), "state_sized_tensors": made.num_squares}
    if grad_out is not None:
        found["gradients"] = text.gradients([(out, grad_out)])
    return found


def linear_chunked(
    answer: Callable,
    state: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    decay: np.ndarray,
    chunk_size: int | None,
    grad_out: np.ndarray | None,
    grad_state: np.ndarray | None,
) -> dict:
    """chunk_size: None where it is left to the default. grad_out, grad_state: where they
    are not None, gradients are asked for, of the sum of their products with out and the
    new state."""
    arrays = {"state": state.copy(), "q": q, "k": k, "v": v}
    text = _Text(arrays, is_trained=grad_out is not None)
    options = {} if chunk_size is None else {"chunk_size": chunk_size}
    try:
        with _MadeSquares(state.shape[-1]) as made:
            value = answer(*text.given, torch.from_numpy(decay), **options)
    except ValueError as error:
        return refusal(error, "linear_chunked", answer)
    text.give_back()
    found = {
        "raised": "nothing",
        **_out_and_state(value),
        "state_is_as_before": np.array_equal(arrays["state"], state),
        "largest_tensor_bytes": made.largest,
        "state_sized_tensors": made.num_squares,
        "bytes_made": made.num_bytes,
    }
    if grad_out is not None and "out" in found:
        found["gradients"] = text.gradients(zip(value, (grad_out, grad_state)))
    return found


class _Text:
    """Tensors for an answer: copies of arrays, of which v has heads first in memory, as
    what the delta rule writes. is_trained: whether they ask for gradients."""

    def __init__(self, arrays: dict[str, np.ndarray], is_trained: bool):
        self.arrays = arrays
        self.leaves = {name: torch.tensor(array) for name, array in arrays.items()}
        v = self.leaves["v"].transpose(-3, -2).contiguous()
        self.leaves["v"] = v.transpose(-3, -2)
        for leaf in self.leaves.values():
            leaf.requires_grad_(is_trained)
        # Where they can be changed in place, which a leaf forbids.
        self.given = [leaf.clone() for leaf in self.leaves.values()]

    def give_back(self):
        """Who has changed a tensor has changed its array."""
        for array, tensor in zip(self.arrays.values(), self.given):
            array[...] = tensor.detach().numpy()

    def gradients(self, pairs) -> dict:
        """Of the sum of products of tensors and arrays, by name."""
        leaves = self.leaves
        products = [
            (tensor * torch.from_numpy(array)).sum()
            for tensor, array in pairs
            if isinstance(tensor, torch.Tensor)
            and tensor.requires_grad
            and tensor.shape == array.shape
        ]
        if not products:
            return dict.fromkeys(leaves, "none")
        grads = torch.autograd.grad(sum(products), [*leaves.values()], allow_unused=True)
        return {
            name: "none" if grad is None else as_array(grad)
            for name, grad in zip(leaves, grads)
        }


class _MadeSquares(_Made):
    """Counts the matrices of D times D numbers too that operations make."""

    def __init__(self, D: int):
        super().__init__()
        self.D, self.num_squares = D, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        shape = tuple(getattr(out, "shape", ()))
        is_square = shape[-2:] == (self.D, self.D)
        self.num_squares += is_square and math.prod(shape) == self.D**2
        return out


# Bytes


def state_bytes(answer: Callable, config: dict, bytes_per_number: int) -> dict:
    counts = [bytes_per_number] if bytes_per_number != 4 else []  # 4 is the default
    return {"bytes": as_number(answer(ModelConfig(**config), *counts))}
