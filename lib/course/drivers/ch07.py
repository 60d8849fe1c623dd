"""Chapter 7: run an answer, give plain data."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


# quantize, dequantize


def quantize(answer: Callable, x: np.ndarray, bits: int, is_turned: bool = False) -> dict:
    """is_turned: let the first dimension of x be the last in memory."""
    given = torch.from_numpy(x)
    if is_turned:
        given = given.movedim(0, -1).contiguous().movedim(-1, 0)
    try:
        with _NoIntegerForNaN():
            found = answer(given, bits)
    except NotImplementedError:  # of a stub
        raise
    except (ValueError, RuntimeError) as error:
        return refusal(error, "quantize", answer)
    if not isinstance(found, (tuple, list)) or len(found) != 3:
        words = f"a {type(found).__name__}, not the three tensors codes, scale and zero"
        return {"raised": "nothing", "codes": words}
    codes, scale, zero = map(as_array, found)
    return {
        "raised": "nothing",
        "codes": codes,
        "scale": scale,
        "zero": zero,
        "vectors_of_scale_0": int(np.sum(scale == 0)),
        "x_is_as_before": torch.equal(given.nan_to_num(), torch.tensor(x).nan_to_num()),
    }


class _NoIntegerForNaN(TorchDispatchMode):
    """While inside, a NaN that is made an integer becomes 173. C++ leaves open what it
    becomes: whoever gets the right number on one machine has been lucky."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        args, kwargs = list(args), kwargs or {}
        aten = torch.ops.aten
        if func is aten._to_copy.default and kwargs.get("dtype"):
            dtype, source = kwargs["dtype"], 0
        elif func is aten.copy_.default:
            dtype, source = args[0].dtype, 1
        else:
            return func(*args, **kwargs)
        if not dtype.is_floating_point and args[source].is_floating_point():
            args[source] = args[source].nan_to_num(nan=173.0)
        return func(*args, **kwargs)


def dequantize(
    answer: Callable,
    codes: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    bits: int,
    num_behind: int = 0,
) -> dict:
    """num_behind: how many bytes of each row are no codes, but what lies behind them."""
    num_codes = codes.shape[-1] - num_behind
    given = torch.from_numpy(codes)[..., :num_codes]
    x = answer(given, torch.from_numpy(scale), torch.from_numpy(zero), bits)
    return {"x": as_array(x)}


# attend_latent


def attend_latent(
    answer: Callable,
    q: np.ndarray,
    k_codes: np.ndarray,
    v_codes: np.ndarray,
    k_basis: np.ndarray,
    v_basis: np.ndarray,
) -> dict:
    tensors = [torch.from_numpy(x) for x in (q, k_codes, v_codes, k_basis, v_basis)]
    made = _Made()

    def attend() -> Any:
        with made:
            return answer(*tensors)

    cost = measure(attend)
    return {
        "out": as_array(cost.value),
        "peak_bytes": cost.peak_bytes,
        "largest_tensor_bytes": made.largest,
        "bytes_made": made.num_bytes,
    }


class _Made(TorchDispatchMode):
    """Counts the bytes of all that operations make, also of what is gone long since, and
    finds the largest."""

    def __init__(self):
        super().__init__()
        self.num_bytes = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        known = {id_ for id_, _ in _storages((args, kwargs))}
        sizes = [n for id_, n in {*_storages(out)} if id_ not in known]
        self.num_bytes += sum(sizes)
        self.largest = max([self.largest, *sizes])
        return out


def _storages(values: Any) -> list[tuple[int, int]]:
    """Of the tensors among values: what tells a storage from others, and its bytes."""
    tensors = [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return [(storage._cdata, storage.nbytes()) for storage in storages]
