"""Chapter 5: the copies of a paged cache as Triton kernels, and their launchers.

The first kernels of the chapter: load a row, look up a block and copy a token. And what
a cache in blocks copies besides, each as the function of lib/paged_kv_cache.py of the
same name: new keys and values to their slots, blocks for copy on write, and a request's
blocks into one dense piece. All heads of a token lie together, so a token is one row.

Read lib/interpreter.py and lib/paged_kv_cache.py before.
"""

import math

import torch

from lib.config import check_count
from lib.interpreter import (
    check_interpreter,
    check_no_gradient,
    on_its_device,
    tl,
    triton,
)


@triton.jit
def load_row_kernel(
    x_ptr,  # (N, num_cols)
    out_ptr,  # (N, TILE)
    x_stride,  # numbers from one row of x to the next
    num_cols,
    TILE: tl.constexpr,  # a power of two of at least num_cols
):
    # locate: one program per row; int64, for row times stride may pass 2^31
    row, col = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)

    # load what is there, zeros behind it
    x = tl.load(x_ptr + row * x_stride + col, mask=col < num_cols, other=0.0)

    # store all of it
    tl.store(out_ptr + row * TILE + col, x)


@triton.jit
def write_kv_kernel(
    new_ptr,  # (N, G, D)
    cache_ptr,  # (num_blocks, block_size, G, D)
    slots_ptr,  # (N,) int64
    num_numbers,  # G · D
    TILE: tl.constexpr,  # numbers, a power of two of at least G · D
):
    # One program per token: all heads of a token lie together.
    n, i = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    slot = tl.load(slots_ptr + n)
    row = tl.load(new_ptr + n * num_numbers + i, mask=i < num_numbers)
    tl.store(cache_ptr + slot * num_numbers + i, row, mask=i < num_numbers)


@triton.jit
def copy_blocks_kernel(
    cache_ptr,  # (num_blocks, block_size, G, D)
    sources_ptr,  # (num_copies,) int64
    targets_ptr,  # (num_copies,) int64
    num_numbers,  # block_size · G · D
    TILE: tl.constexpr,  # numbers
):
    copy, tile = tl.program_id(0), tl.program_id(1)
    i = tile * TILE + tl.arange(0, TILE)
    source = tl.load(sources_ptr + copy) * num_numbers
    target = tl.load(targets_ptr + copy) * num_numbers
    block = tl.load(cache_ptr + source + i, mask=i < num_numbers)
    tl.store(cache_ptr + target + i, block, mask=i < num_numbers)


@triton.jit
def gather_kernel(
    cache_ptr,  # (num_blocks, block_size, G, D)
    block_table_ptr,  # (M,)
    out_ptr,  # (S, G, D)
    block_size,  # tokens
    num_numbers,  # G · D
    TILE: tl.constexpr,  # numbers, a power of two of at least G · D
):
    # locate: one program per token
    position, i = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)

    # look up its block: ids are numbers in memory, made as wide as position is
    block_id = tl.load(block_table_ptr + position // block_size).to(tl.int64)
    slot = block_id * block_size + position % block_size

    # copy all heads of the token, which lie together
    row = tl.load(cache_ptr + slot * num_numbers + i, mask=i < num_numbers)
    tl.store(out_ptr + position * num_numbers + i, row, mask=i < num_numbers)


def pad_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows x (N, num_cols), made a power of two wide by zeros at their end."""
    check_interpreter()
    check_no_gradient(x)
    N, num_cols = x.shape
    if num_cols == 0:
        raise ValueError(f"x: expected at least one column, got {tuple(x.shape)}")
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(N, triton.next_power_of_2(num_cols), dtype=x.dtype, device=x.device)
    if N > 0:
        with on_its_device(x):
            load_row_kernel[(N,)](x, out, x.stride(0), num_cols, TILE=out.shape[1])
    return out


def write_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
):
    """`paged_kv_cache.write_kv` by a kernel: k, v (N, G, D) to the slots, int64 (N,).

    Raises ValueError for tensors that do not fit; where slots lie is looked at on a CPU.
    """
    check_interpreter()
    slots = checked_ids("slots", slots, k_cache, k_cache.shape[0] * k_cache.shape[1])
    num_numbers = k_cache.shape[2] * k_cache.shape[3]
    check_no_gradient(k, v)
    for cache, new in ((k_cache, k), (v_cache, v)):
        check_in_one_piece(cache, like=k_cache)
        expected = (len(slots), *cache.shape[2:]), cache.dtype, cache.device
        if (new.shape, new.dtype, new.device) != expected:
            raise ValueError(
                f"k, v: expected {expected[0]} of {cache.dtype} on {cache.device}, "
                f"got {tuple(new.shape)} of {new.dtype} on {new.device}"
            )
    tile = triton.next_power_of_2(num_numbers)
    for cache, new in ((k_cache, k), (v_cache, v)):
        if len(slots) > 0:
            with on_its_device(cache):
                write_kv_kernel[(len(slots),)](
                    new.contiguous(), cache, slots, num_numbers, TILE=tile
                )


def copy_blocks(cache: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor):
    """Copy whole blocks of one layer's keys or values, for copy on write, in place.

    cache (num_blocks, block_size, G, D); sources, targets: block ids, int64
    (num_copies,), none of which stands on both sides. Raises as `write_kv`.
    """
    check_interpreter()
    check_in_one_piece(cache, like=cache)
    sources = checked_ids("sources", sources, cache, len(cache))
    targets = checked_ids("targets", targets, cache, len(cache))
    if sources.shape != targets.shape:
        raise ValueError(
            f"expected as many sources as targets, got {len(sources)} and {len(targets)}"
        )
    num_numbers, tile = cache[0].numel(), 1024
    if len(sources) > 0:
        with on_its_device(cache):
            copy_blocks_kernel[(len(sources), triton.cdiv(num_numbers, tile))](
                cache, sources, targets, num_numbers, TILE=tile
            )


def gather_kv(
    k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor, seq_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`paged_kv_cache.gather_kv` by a kernel: one dense piece, (S, G, D) each.

    Raises as `write_kv`.
    """
    check_interpreter()
    check_no_gradient(k_cache, v_cache)
    seq_len, block_size = check_count("seq_len", seq_len, 0), k_cache.shape[1]
    num_used, room = math.ceil(seq_len / block_size), len(block_table) * block_size
    if seq_len > room:
        raise ValueError(
            f"seq_len: expected 0 to {room} tokens, as its table is wide, got {seq_len}"
        )
    used = block_table[:num_used]
    used = used.to(torch.int64) if used.dtype == torch.int32 else used
    used = checked_ids("block_table", used, k_cache, len(k_cache))
    dense = []
    for cache in (k_cache, v_cache):
        check_in_one_piece(cache, like=k_cache)
        out = torch.empty(
            seq_len, *cache.shape[2:], dtype=cache.dtype, device=cache.device
        )
        num_numbers = cache.shape[2] * cache.shape[3]
        if seq_len > 0:
            with on_its_device(cache):
                gather_kernel[(seq_len,)](
                    *(cache, used, out, block_size, num_numbers),
                    TILE=triton.next_power_of_2(num_numbers),
                )
        dense.append(out)
    return dense[0], dense[1]


def checked_ids(
    name: str, ids: torch.Tensor, cache: torch.Tensor, end: int
) -> torch.Tensor:
    """The ids in one piece; ValueError unless they are int64, beside the cache, and in
    0 to end - 1, at which on a GPU nobody looks."""
    if ids.dtype != torch.int64 or ids.device != cache.device or ids.dim() != 1:
        raise ValueError(
            f"{name}: expected a row of torch.int64 on {cache.device}, got "
            f"{tuple(ids.shape)} of {ids.dtype} on {ids.device}"
        )
    if not ids.is_cuda and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < end:
        raise ValueError(f"{name}: expected 0 to {end - 1}, got {ids.tolist()}")
    return ids.contiguous()


def check_in_one_piece(cache: torch.Tensor, like: torch.Tensor):
    """Raise ValueError for a cache whose blocks do not lie behind each other, or that is
    of another shape, dtype or device than `like`."""
    for what in ("shape", "dtype", "device"):
        expected, got = getattr(like, what), getattr(cache, what)
        if got != expected:
            raise ValueError(f"cache: expected {what} {expected}, got {got}")
    if not cache.is_contiguous():
        raise ValueError(
            f"cache: expected contiguous, got {tuple(cache.shape)} with strides "
            f"{cache.stride()}"
        )
