"""Chapter 5: run an answer, give plain data.

Kernels are launched by the library, which finds the answer in its own kernel's place.
Memory that nobody has written holds NaN meanwhile, so that what a kernel forgets to store
shows. They are interpreted, also where there is a GPU (check.py sees to that), so that
what they load and store is counted.
"""

import contextlib
import functools
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from lib import paged_attention_triton
from lib.config import ModelConfig
from lib.course.drivers.ch01 import as_array
from lib.course.drivers.ch03 import as_number
from lib.measure.meter import Traffic, measure, measure_traffic

# MAP_SHARED, MAP_ANONYMOUS and MAP_NORESERVE of Linux, where the kernels run: not
# counted against a limit on the data of a process.
PROMISED = 0x1 | 0x20 | 0x4000


def attend_online(answer: Callable, q: np.ndarray, tiles: list) -> dict:
    tensors = [[torch.from_numpy(x) for x in tile] for tile in tiles]
    cost = measure(lambda: answer(torch.from_numpy(q), (tuple(tile) for tile in tensors)))
    return {**_out_and_logsumexp(cost.value), "peak_bytes": cost.peak_bytes}


def merge_splits(answer: Callable, outs: np.ndarray, logsumexps: np.ndarray) -> dict:
    return _out_and_logsumexp(
        answer(torch.from_numpy(outs), torch.from_numpy(logsumexps))
    )


def bytes_moved(
    answer: Callable,
    config: dict,
    seq_lens: np.ndarray,
    bytes_per_number: int,
    is_gathered: bool,
) -> dict:
    given = [bytes_per_number] if bytes_per_number != 4 else []  # 4 is the default
    options = {"is_gathered": True} if is_gathered else {}
    lens = torch.from_numpy(seq_lens)
    return {"bytes": as_number(answer(ModelConfig(**config), lens, *given, **options))}


def load_row_kernel(answer: Any, x: np.ndarray, num_cols: int) -> dict:
    """Rows of which `num_cols` numbers count: what follows them belongs to others."""
    rows = torch.from_numpy(x)[:, :num_cols]
    with launched("load_row_kernel", answer):
        moved = measure_traffic(lambda: paged_attention_triton.pad_rows(rows))
    return {"rows": as_array(moved.value), **_bytes(moved)}


def gather_kernel(
    answer: Any, cache: np.ndarray, block_table: np.ndarray, seq_len: int
) -> dict:
    pool = torch.from_numpy(cache)
    args = pool, pool, torch.from_numpy(block_table), seq_len
    with launched("gather_kernel", answer):
        moved = measure_traffic(lambda: paged_attention_triton.gather_kv(*args))
    return {"k": as_array(moved.value[0]), **_bytes(moved)}


def paged_decode_kernel(
    answer: Any,
    q: np.ndarray,
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    block_tables: np.ndarray,
    seq_lens: np.ndarray,
    num_splits: int,
    scale: float | None,
    is_far: bool,
) -> dict:
    """is_far: move the blocks 2^31 numbers away from the pool's first."""
    inputs = q, k_cache, v_cache, block_tables, seq_lens
    args = [torch.from_numpy(x) for x in inputs]
    if is_far:
        args[1:4] = _move_away(*args[1:4])
    decode = functools.partial(
        paged_attention_triton.paged_decode, *args, num_splits=num_splits, scale=scale
    )
    with launched("paged_decode_kernel", answer):
        moved = measure_traffic(decode)
    out, logsumexp = moved.value
    return {
        "out": as_array(out),
        "logsumexp": as_array(logsumexp),
        **_bytes(moved),
        "index_bytes_read": moved.index_bytes,
    }


def _move_away(
    k_cache: torch.Tensor, v_cache: torch.Tensor, block_tables: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same blocks, 2^20 numbers apart and behind 2^31 others, which nobody touches:
    of memory that is only promised they take a few pages."""
    spread = 2**20
    first, num_numbers = 2**31 // spread, k_cache[0].numel()
    size = (first + len(k_cache)) * spread
    memory = mmap.mmap(-1, size * k_cache.itemsize, flags=PROMISED)
    flat = torch.frombuffer(memory, dtype=k_cache.dtype)
    moved = []
    for start, cache in ((0, k_cache), (num_numbers, v_cache)):
        shape = (first + len(cache), *cache.shape[1:])
        stride = (spread, *cache.contiguous().stride()[1:])
        far = flat.as_strided(shape, stride, start)
        far[first:] = cache
        moved.append(far)
    tables = torch.where(block_tables < len(k_cache), block_tables + first, block_tables)
    return moved[0], moved[1], tables


def _bytes(moved: Traffic) -> dict:
    return {"bytes_read": moved.read_bytes, "bytes_written": moved.written_bytes}


@contextlib.contextmanager
def launched(name: str, kernel: Any) -> Iterator[None]:
    """While inside, the library launches `kernel`, and new memory holds NaN."""
    kept = getattr(paged_attention_triton, name)
    was = torch.are_deterministic_algorithms_enabled()
    was_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    paged_attention_triton.check_interpreter()  # now, lest it be counted
    setattr(paged_attention_triton, name, kernel)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        yield
    finally:
        setattr(paged_attention_triton, name, kept)
        torch.use_deterministic_algorithms(was, warn_only=was_warning)


def _out_and_logsumexp(value: Any) -> dict:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return {"out": f"a {type(value).__name__}, not the two tensors out and logsumexp"}
    return {"out": as_array(value[0]), "logsumexp": as_array(value[1])}
