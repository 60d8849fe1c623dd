"""Chapter 7: run an answer, give plain data."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lib.config import ModelConfig
from lib.course.drivers.ch01 import as_array, as_number, refusal
from lib.measure.meter import measure

# Heads: bytes_per_token, pool_kv_heads


def bytes_per_token(
    answer: Callable,
    config: dict,
    bytes_per_number: int,
    bits: list[int] | None,
    ranks: list[int] | None,
) -> dict:
    given = [bytes_per_number] if bytes_per_number != 4 else []  # 4 is the default
    pairs = {"bits": bits, "ranks": ranks}
    options = {name: tuple(pair) for name, pair in pairs.items() if pair is not None}
    return {"bytes": as_number(answer(ModelConfig(**config), *given, **options))}


def pool_kv_heads(
    answer: Callable, weight: np.ndarray, head_dim: int, num_kv_heads: int
) -> dict:
    try:
        pooled = answer(torch.from_numpy(weight), head_dim, num_kv_heads)
    except ValueError as error:
        return refusal(error, "pool_kv_heads", answer)
    return {"raised": "nothing", "weight": as_array(pooled)}


# Rank: rank_for, factorize


def rank_for(answer: Callable, singular_values: np.ndarray, share: float) -> dict:
    try:
        rank = answer(torch.from_numpy(singular_values), share)
    except ValueError as error:
        return refusal(error, "rank_for", answer)
    is_tensor = isinstance(rank, torch.Tensor)  # which `factorize` takes for no rank
    return {"raised": "nothing", "rank": "a tensor" if is_tensor else as_number(rank)}


def factorize(answer: Callable, x: np.ndarray, rank: int) -> dict:
    """Of several pairs of matrices with the same product each is right: directions may
    point the other way. So this gives what is the same for all."""
    try:
        cost = measure(lambda: answer(torch.from_numpy(x), rank))
    except ValueError as error:
        return refusal(error, "factorize", answer)
    found = {"raised": "nothing", "peak_bytes": cost.peak_bytes}
    if not isinstance(cost.value, (tuple, list)) or len(cost.value) != 2:
        return {**found, "codes": f"{_kind(cost.value)}, not codes and a basis"}
    codes, basis = (as_array(matrix) for matrix in cost.value)
    found |= {"codes": _describe(codes), "basis": _describe(basis)}
    if not _are_thin(codes, basis):
        return found
    return {
        **found,
        "codes @ basis": codes @ basis,
        "basis @ basis.T": basis @ basis.T,
        "basis.T @ basis": basis.T @ basis,
    }


def _kind(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"{len(value)} of them"
    return f"a {type(value).__name__}"


def _describe(matrix: np.ndarray | str) -> str:
    if isinstance(matrix, str):
        return matrix
    return f"{matrix.dtype} of shape {matrix.shape}"


def _are_thin(codes: np.ndarray | str, basis: np.ndarray | str) -> bool:
    """Whether there is a product, codes @ basis."""
    return (
        isinstance(codes, np.ndarray)
        and isinstance(basis, np.ndarray)
        and codes.ndim == basis.ndim == 2
        and codes.shape[1] == basis.shape[0]
    )
