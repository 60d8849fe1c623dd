"""Chapter 8: run an answer, give plain data."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lib.course.drivers.ch01 import as_array, as_number, refusal


def keep_recent(
    answer: Callable, seq_len: int, budget: int, num_sinks: int | None
) -> dict:
    """num_sinks: None where it is left to the default."""
    try:
        kept = answer(seq_len, budget, **_given(num_sinks=num_sinks))
    except ValueError as error:
        return refusal(error, "keep_recent", answer)
    return {"raised": "nothing", "kept": as_array(kept)}


def attention_received(answer: Callable, weights: np.ndarray, num_kv_heads: int) -> dict:
    """The answer gets a part of a larger tensor, as from snap_scores: not every view of
    it can be had."""
    part = F.pad(torch.from_numpy(weights), (0, 0, 1, 0))[:, 1:]  # (H, T, S)
    received = as_array(answer(part, num_kv_heads))
    weights[:] = part.numpy()  # who changes that has changed the inputs
    return {"received": received}


def snap_scores(
    answer: Callable,
    weights: np.ndarray,
    num_kv_heads: int,
    window: int | None,
    width: int | None,
) -> dict:
    """window, width: None where they are left to their defaults."""
    options = _given(window=window, width=width)
    try:
        scores = answer(torch.from_numpy(weights), num_kv_heads, **options)
    except ValueError as error:
        return refusal(error, "snap_scores", answer)
    return {"raised": "nothing", "scores": as_array(scores)}


def evict_tokens(
    answer: Callable,
    k: np.ndarray,
    v: np.ndarray,
    scores: np.ndarray,
    budget: int,
    window: int,
) -> dict:
    """bytes_held: of the memory in which keys and values lie, all of which stays as long
    as they do."""
    tensors = [torch.from_numpy(x) for x in (k, v, scores)]
    found = answer(*tensors, budget, window)
    if not isinstance(found, (tuple, list)) or len(found) != 3:
        return {"kept": f"a {type(found).__name__}, not the three tensors k, v, kept"}
    k_kept, v_kept, kept = found
    return {
        "kept": as_array(kept),
        "k": as_array(k_kept),
        "v": as_array(v_kept),
        "in_memory_of_their_own": not _storages(k_kept, v_kept) & _storages(*tensors),
        "bytes_held": sum(num_bytes for _, num_bytes in _storages(k_kept, v_kept)),
    }


def _storages(*values: Any) -> set[tuple[int, int]]:
    """Where the memory of tensors lies: addresses, and bytes."""
    tensors = [x for x in values if isinstance(x, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {(storage.data_ptr(), storage.nbytes()) for storage in storages}


def pyramid_budgets(
    answer: Callable,
    mean_budget: int,
    num_layers: int,
    window: int | None,
    beta: int | None,
) -> dict:
    """window, beta: None where they are left to their defaults."""
    options = _given(window=window, beta=beta)
    try:
        budgets = answer(mean_budget, num_layers, **options)
    except ValueError as error:
        return refusal(error, "pyramid_budgets", answer)
    return {"raised": "nothing", "budgets": _as_numbers(budgets)}


def spread_budgets(
    answer: Callable, needs: np.ndarray, mean_budget: int, window: int | None
) -> dict:
    """The answer gets needs as a list. window: None where it is left to the default."""
    given = needs.tolist()
    try:
        budgets = answer(given, mean_budget, **_given(window=window))
    except ValueError as error:
        return refusal(error, "spread_budgets", answer)
    return {
        "raised": "nothing",
        "budgets": _as_numbers(budgets),
        "needs_are_as_before": given == needs.tolist(),
    }


def blocks_freed(answer: Callable, is_kept: np.ndarray, block_size: int) -> dict:
    try:
        found = answer(torch.from_numpy(is_kept), block_size)
    except ValueError as error:
        return refusal(error, "blocks_freed", answer)
    pair = _as_numbers(found)
    if len(pair) != 2:
        words = f"a {type(found).__name__}, not two numbers"
        return {"raised": "nothing", "in_place": words}
    in_place, moved_together = pair
    return {"raised": "nothing", "in_place": in_place, "moved_together": moved_together}


def _given(**options: int | None) -> dict[str, int]:
    return {name: value for name, value in options.items() if value is not None}


def _as_numbers(value: Any) -> list | str:
    if not isinstance(value, (list, tuple)):
        return f"a {type(value).__name__}, not a list"
    return [as_number(number) for number in value]
