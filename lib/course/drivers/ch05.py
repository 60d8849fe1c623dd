"""Chapter 5: run an answer, give plain data.

Kernels are launched by the library, which finds the answer in its own kernel's place.
Memory that nobody has written holds NaN meanwhile, so that what a kernel forgets to store
shows. They are interpreted, also where there is a GPU (check.py sees to that), so that
what they load and store is counted.
"""

import contextlib
import functools
import math
import mmap
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch

from lib import interpreter, paged_attention_triton, paged_kv_cache_triton
from lib.config import ModelConfig
from lib.course.drivers.ch01 import as_array, as_number
from lib.measure.meter import Traffic, measure, measure_traffic

# MAP_SHARED, MAP_ANONYMOUS and MAP_NORESERVE of Linux, where the kernels run: not
# counted against a limit on the data of a process.
PROMISED = 0x1 | 0x20 | 0x4000


def attend_online(answer: Callable, q: np.ndarray, tiles: list) -> dict:
    """Tiles are made as they are asked for, so that those which are kept count."""
    made = (tuple(torch.from_numpy(x).clone() for x in tile) for tile in tiles)
    cost = measure(lambda: answer(torch.from_numpy(q), made))
    got = _out_and_logsumexp(cost.value)
    if q.dtype == np.float16:  # out and logsumexp differ in theirs
        dtypes = [str(getattr(x, "dtype", type(x).__name__)) for x in got.values()]
        got = {"dtypes": dtypes, **got}
    return {**got, "peak_bytes": cost.peak_bytes}


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


def load_row_kernel(
    answer: Any, x: np.ndarray, num_cols: int, is_far: bool = False
) -> dict:
    """Rows of which `num_cols` numbers count: what follows them belongs to others.
    is_far: lay them 2^30 numbers apart."""
    rows = torch.from_numpy(x)
    if is_far:
        apart = _promised((len(x), 2**30), rows.dtype)
        apart[:, : x.shape[1]] = rows
        rows = apart
    rows = rows[:, :num_cols]
    with launched(paged_kv_cache_triton, "load_row_kernel", answer):
        moved = measure_traffic(lambda: paged_kv_cache_triton.pad_rows(rows))
    return {"rows": as_array(moved.value), **_bytes(moved)}


def gather_kernel(
    answer: Any,
    cache: np.ndarray,
    block_table: np.ndarray,
    seq_len: int,
    is_far: bool = False,
) -> dict:
    """is_far: move the blocks 2^31 numbers away from the pool's first."""
    pool, table = torch.from_numpy(cache), torch.from_numpy(block_table)
    if is_far:
        first = 2**31 // pool[0].numel()
        far = _promised((first + len(pool), *pool.shape[1:]), pool.dtype)
        far[first:] = pool
        pool, table = far, _renumbered(table, len(pool), first)
    with launched(paged_kv_cache_triton, "gather_kernel", answer):
        moved = measure_traffic(
            lambda: paged_kv_cache_triton.gather_kv(pool, pool, table, seq_len)
        )
    return {"k": as_array(moved.value[0]), **_bytes(moved)}


def paged_decode_kernel(
    answer: Any,
    q: np.ndarray,
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    block_tables: np.ndarray,
    seq_lens: np.ndarray,
    split_tokens: int | None,
    scale: float | None,
    far: str | None,
) -> dict:
    """far: what of the pool to move far away, "blocks" or "places"."""
    inputs = q, k_cache, v_cache, block_tables, seq_lens
    args = [torch.from_numpy(x) for x in inputs]
    if far:
        args[1:4] = _move_away(*args[1:4], far)
    decode = functools.partial(
        paged_attention_triton.paged_decode, *args, split_tokens=split_tokens, scale=scale
    )
    return _attend("paged_decode_kernel", answer, decode)


def paged_prefill_kernel(
    answer: Any,
    q: np.ndarray,
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    block_tables: np.ndarray,
    seq_lens: np.ndarray,
    query_lens: np.ndarray,
    scale: float | None,
    far: str | None,
) -> dict:
    """far: move "blocks" far away, or lay the "heads" of queries 2^30 numbers apart."""
    inputs = q, k_cache, v_cache, block_tables, seq_lens, query_lens
    args = [torch.from_numpy(x) for x in inputs]
    if far == "heads":
        apart = _promised((q.shape[1], 2**30), args[0].dtype)
        N, H, D = q.shape
        args[0] = apart[:, : N * D].view(H, N, D).transpose(0, 1).copy_(args[0])
    elif far:
        args[1:4] = _move_away(*args[1:4], far)
    prefill = functools.partial(paged_attention_triton.paged_prefill, *args, scale=scale)
    return _attend("paged_prefill_kernel", answer, prefill)


def _attend(name: str, answer: Any, attend: Callable[[], tuple]) -> dict:
    """What `attend()` gives and moves, with the answer as the kernel of that name."""
    with launched(paged_attention_triton, name, answer):
        moved = measure_traffic(attend)
    out, logsumexp = moved.value
    return {
        "out": as_array(out),
        "logsumexp": as_array(logsumexp),
        **_bytes(moved),
        "index_bytes_read": moved.index_bytes,
    }


def _move_away(
    k_cache: torch.Tensor, v_cache: torch.Tensor, block_tables: torch.Tensor, far: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same pool, in memory that is only promised, of which it takes a few pages.

    far: "blocks" 2^20 numbers apart, behind 2^31 numbers that nobody touches, or the
    "places" of each block 2^30 numbers apart.
    """
    num_blocks, block_size, G, D = k_cache.shape
    if far == "blocks":
        first, of_block, of_place = 2**11, 2**20, G * D
    else:
        first, of_block, of_place = 0, G * D, 2**30
    shape = first + num_blocks, block_size, G, D
    num_numbers = max(shape[0] * of_block, block_size * of_place)
    flat, moved = _promised((num_numbers,), k_cache.dtype), []
    for start, cache in ((0, k_cache), (k_cache.numel(), v_cache)):
        moved.append(flat.as_strided(shape, (of_block, of_place, D, 1), start))
        moved[-1][first:] = cache
    return moved[0], moved[1], _renumbered(block_tables, num_blocks, first)


def _promised(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros, for which memory is only promised: what nobody touches takes none."""
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=PROMISED)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _renumbered(tables: torch.Tensor, num_blocks: int, first: int) -> torch.Tensor:
    """Block ids of a pool that begins with block `first`; those of no block stay."""
    return torch.where(tables < num_blocks, tables + first, tables)


def _bytes(moved: Traffic) -> dict:
    return {"bytes_read": moved.read_bytes, "bytes_written": moved.written_bytes}


@contextlib.contextmanager
def launched(module: ModuleType, name: str, kernel: Any) -> Iterator[None]:
    """While inside, `module` launches `kernel`, and new memory holds NaN."""
    kept = getattr(module, name)
    was = torch.are_deterministic_algorithms_enabled()
    was_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    interpreter.check_interpreter()  # now, lest it be counted
    setattr(module, name, kernel)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        yield
    finally:
        setattr(module, name, kept)
        torch.use_deterministic_algorithms(was, warn_only=was_warning)


def _out_and_logsumexp(value: Any) -> dict:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return {"out": f"a {type(value).__name__}, not the two tensors out and logsumexp"}
    return {"out": as_array(value[0]), "logsumexp": as_array(value[1])}
