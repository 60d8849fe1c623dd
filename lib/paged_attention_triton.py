"""Chapter 5: paged attention as Triton kernels, and their launchers.

One program of `paged_decode_kernel` serves one request, one KV head with all the query
heads that read it, and one share (split) of its keys. It looks up the block of every
token in the table and reads keys and values where they lie, a tile at a time, with the
running sums of `paged_attention.attend_online`. So each byte of the cache is read once,
whatever the number of query heads, and nothing is copied.

On a GPU the kernels are compiled; without one they are interpreted, slowly, line by line
(lib/__init__.py decides). Where there is no Triton, as it is for Linux, they can be read
only, and `paged_decode` warns once that the torch twin computes in their place.

FlashAttention: https://arxiv.org/abs/2205.14135. Splits, as in Flash-Decoding:
https://crfm.stanford.edu/2023/10/12/flashdecoding.html.

Read lib/paged_attention.py before.
"""

import functools
import math
import os
import warnings
from types import SimpleNamespace

import torch

from lib import paged_attention

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # what it takes to read kernels without it
    triton = SimpleNamespace(jit=lambda kernel: kernel)
    tl = SimpleNamespace(constexpr=lambda value: value)

HAS_TRITON = hasattr(triton, "compile")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2_E = tl.constexpr(math.log2(math.e))
# Tokens that a program reads at a time (block_size is another matter): with more of fp32
# the registers of some GPUs do not suffice.
TILES = {"float32": 16, "float16": 64, "bfloat16": 64}
MIN_DOT = 16  # rows that tensor cores multiply at a time


@triton.jit
def load_row_kernel(
    x_ptr,  # (N, num_cols)
    out_ptr,  # (N, TILE)
    x_stride,  # numbers from one row of x to the next
    num_cols,
    TILE: tl.constexpr,  # a power of two of at least num_cols
):
    # locate: one program a row
    row, col = tl.program_id(0), tl.arange(0, TILE)

    # load what is there, zeros behind it
    x_at = x_ptr + row * x_stride + col
    x = tl.load(x_at, mask=col < num_cols, other=0.0)

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
    # One program a token: all heads of a token lie together.
    n, i = tl.program_id(0), tl.arange(0, TILE)
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
    # locate: one program a token
    position, i = tl.program_id(0), tl.arange(0, TILE)

    # look up its block; int64, for id times size may pass 2^31
    block_id = tl.load(block_table_ptr + position // block_size).to(tl.int64)
    slot = block_id * block_size + position % block_size

    # copy all heads of the token, which lie together
    row = tl.load(cache_ptr + slot * num_numbers + i, mask=i < num_numbers)
    tl.store(out_ptr + position * num_numbers + i, row, mask=i < num_numbers)


@triton.jit
def paged_decode_kernel(
    q_ptr,  # (B, H, D)
    k_cache_ptr,  # (num_blocks, block_size, G, D)
    v_cache_ptr,  # (num_blocks, block_size, G, D)
    block_tables_ptr,  # (B, M)
    seq_lens_ptr,  # (B,)
    out_ptr,  # (B, H, NUM_SPLITS, D)
    logsumexp_ptr,  # (B, H, NUM_SPLITS)
    scale_log2_e,  # what scores are multiplied by, so that exp2 can take the place of exp
    block_size,  # tokens
    q_stride_b,
    q_stride_h,
    k_stride_block,
    k_stride_place,
    k_stride_g,
    v_stride_block,
    v_stride_place,
    v_stride_g,
    table_stride_b,
    GROUP_SIZE: tl.constexpr,  # query heads that read one KV head
    HEAD_DIM: tl.constexpr,  # D
    ROWS: tl.constexpr,  # GROUP_SIZE, rounded up to what tensor cores take
    COLS: tl.constexpr,  # D, rounded up to a power of two
    TILE: tl.constexpr,  # tokens
    NUM_SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,  # to fp32 right after a load
):
    # locate: which request, which heads, and which share of the keys
    b, g, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    is_head, is_col = row < GROUP_SIZE, col < HEAD_DIM
    h = g * GROUP_SIZE + row
    seq_len = tl.load(seq_lens_ptr + b)
    tiles_per_split = tl.cdiv(tl.cdiv(seq_len, TILE), NUM_SPLITS)
    start = split * tiles_per_split * TILE
    end = tl.minimum(start + tiles_per_split * TILE, seq_len)

    # load the queries of all heads of the group, once
    q_at = q_ptr + b * q_stride_b + h[:, None] * q_stride_h + col[None, :]
    q = tl.load(q_at, mask=is_head[:, None] & is_col[None, :], other=0.0)
    q = q.to(tl.float32) if UPCAST else q

    # begin with nothing
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, COLS], tl.float32)

    # tile by tile: the positions of its tokens
    for tile_start in range(start, end, TILE):
        position = tile_start + tl.arange(0, TILE)
        is_token = position < end
        is_there = is_token[:, None] & is_col[None, :]

        # look up the block of each token; int64, for id times stride may pass 2^31
        table_at = block_tables_ptr + b * table_stride_b + position // block_size
        block_id = tl.load(table_at, mask=is_token, other=0).to(tl.int64)
        place = position % block_size

        # address: where the keys and values of these tokens begin
        k_at = block_id * k_stride_block + place * k_stride_place + g * k_stride_g
        v_at = block_id * v_stride_block + place * v_stride_place + g * v_stride_g

        # gather them, masked: what is dead may be NaN
        k = tl.load(k_cache_ptr + k_at[:, None] + col[None, :], mask=is_there, other=0.0)
        v = tl.load(v_cache_ptr + v_at[:, None] + col[None, :], mask=is_there, other=0.0)

        # upcast where the dtype needs it
        k, v = (k.to(tl.float32), v.to(tl.float32)) if UPCAST else (k, v)

        # score all heads of the group at once
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2_e
        scores = tl.where(is_token[None, :], scores, float("-inf"))

        # rescale what was summed up under another maximum, and add
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        rescale = tl.exp2(row_max - new_max)
        weights = tl.exp2(scores - new_max[:, None])
        row_sum = row_sum * rescale + tl.sum(weights, axis=1)
        weighted = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        acc = acc * rescale[:, None] + weighted
        row_max = new_max

    # store the result, or this split's part of it
    divisor = tl.where(row_sum > 0, row_sum, 1.0)
    logsumexp = (row_max + tl.log2(divisor)) / LOG2_E
    out = (acc / divisor[:, None]).to(out_ptr.dtype.element_ty)
    at = (b * tl.num_programs(1) * GROUP_SIZE + h) * NUM_SPLITS + split
    tl.store(logsumexp_ptr + at, logsumexp, mask=is_head)
    out_at = out_ptr + at[:, None] * HEAD_DIM + col[None, :]
    tl.store(out_at, out, mask=is_head[:, None] & is_col[None, :])


@triton.jit
def merge_splits_kernel(
    outs_ptr,  # (B, H, NUM_SPLITS, D)
    logsumexps_ptr,  # (B, H, NUM_SPLITS)
    out_ptr,  # (B, H, D)
    logsumexp_ptr,  # (B, H)
    HEAD_DIM: tl.constexpr,
    COLS: tl.constexpr,  # D, rounded up to a power of two
    NUM_SPLITS: tl.constexpr,  # a power of two
):
    # load the parts of one head of one request
    at = tl.program_id(0)
    split, col = tl.arange(0, NUM_SPLITS), tl.arange(0, COLS)
    is_col = col < HEAD_DIM
    logsumexps = tl.load(logsumexps_ptr + at * NUM_SPLITS + split)
    outs_at = outs_ptr + (at * NUM_SPLITS + split)[:, None] * HEAD_DIM + col[None, :]
    outs = tl.load(outs_at, mask=is_col[None, :], other=0.0)

    # weigh each part by its share of the sum; of a request without keys all is -inf
    largest = tl.max(logsumexps, axis=0)
    weights = tl.exp(logsumexps - tl.where(largest > float("-inf"), largest, 0.0))
    total = tl.sum(weights, axis=0)
    divisor = tl.where(total > 0, total, 1.0)

    # store
    out = tl.sum(outs * weights[:, None], axis=0) / divisor
    tl.store(out_ptr + at * HEAD_DIM + col, out.to(out_ptr.dtype.element_ty), mask=is_col)
    tl.store(logsumexp_ptr + at, largest + tl.log(divisor))


def pad_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows x (N, num_cols), made a power of two wide by zeros at their end."""
    check_interpreter()
    N, num_cols = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(N, triton.next_power_of_2(num_cols), dtype=x.dtype, device=x.device)
    if N > 0:
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
    for cache, new in ((k_cache, k), (v_cache, v)):
        check_in_one_piece(cache, like=k_cache)
        if new.shape != (len(slots), *cache.shape[2:]) or new.dtype != cache.dtype:
            raise ValueError(
                f"k, v: expected {(len(slots), *cache.shape[2:])} of {cache.dtype}, "
                f"got {tuple(new.shape)} of {new.dtype}"
            )
    tile = triton.next_power_of_2(num_numbers)
    for cache, new in ((k_cache, k), (v_cache, v)):
        if len(slots) > 0:
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
    block_size = k_cache.shape[1]
    num_used, room = math.ceil(seq_len / block_size), len(block_table) * block_size
    if not 0 <= seq_len <= room:
        raise ValueError(
            f"seq_len: expected 0 to {room} tokens, as its table is wide, got {seq_len}"
        )
    used = block_table[:num_used].to(torch.int64)
    used = checked_ids("block_table", used, k_cache, len(k_cache))
    dense = []
    for cache in (k_cache, v_cache):
        check_in_one_piece(cache, like=k_cache)
        out = torch.empty(
            seq_len, *cache.shape[2:], dtype=cache.dtype, device=cache.device
        )
        num_numbers = cache.shape[2] * cache.shape[3]
        if seq_len > 0:
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
    if ids.dtype != torch.int64 or ids.device != cache.device:
        raise ValueError(
            f"{name}: expected torch.int64 on {cache.device}, got {ids.dtype} on "
            f"{ids.device}"
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


def paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float | None = None,
    num_splits: int | None = None,
    check_ids: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`paged_attention.paged_decode_gather` by the kernels.

    block_tables int32 (B, M), seq_lens int32 (B,). num_splits: programs that share the
    keys of a request and KV head, a power of two; None chooses. check_ids: whether to
    look if tables and lengths fit the pool, for which a GPU has to be waited for; None
    looks on a CPU only. Raises ValueError for tensors that do not fit each other.
    """
    check_decode_inputs(q, k_cache, v_cache, block_tables, seq_lens)
    if check_ids or (check_ids is None and not q.is_cuda):
        check_block_ids(k_cache, block_tables, seq_lens)
    if num_splits is not None and (num_splits < 1 or num_splits & (num_splits - 1)):
        raise ValueError(f"num_splits: expected a power of two, got {num_splits}")
    if not HAS_TRITON:
        warn_of_twin()
        out, logsumexp = paged_attention.paged_decode_online(
            q, k_cache, v_cache, block_tables, seq_lens, scale=scale
        )
        return out, logsumexp.float()
    check_interpreter()
    B, H, D = q.shape
    block_size, G = k_cache.shape[1:3]
    out = torch.empty(B, H, D, dtype=q.dtype, device=q.device)
    logsumexp = torch.empty(B, H, dtype=torch.float32, device=q.device)
    if B == 0:
        return out, logsumexp
    if num_splits is None:
        num_splits = choose_num_splits(
            B * G, block_tables.shape[1] * block_size, q.device
        )
    q, k_cache, v_cache, block_tables = (
        x if x.stride(-1) == 1 else x.contiguous()
        for x in (q, k_cache, v_cache, block_tables)
    )
    constants = decode_constants(H // G, D, num_splits, str(q.dtype).split(".")[1])

    if num_splits == 1:  # a part is the whole
        outs, logsumexps = out, logsumexp
    else:
        outs = torch.empty(B, H, num_splits, D, dtype=torch.float32, device=q.device)
        logsumexps = torch.empty(B, H, num_splits, device=q.device)
    paged_decode_kernel[(B, G, num_splits)](
        *(q, k_cache, v_cache, block_tables, seq_lens.contiguous(), outs, logsumexps),
        (D**-0.5 if scale is None else scale) * LOG2_E.value,
        block_size,
        *q.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        block_tables.stride(0),
        **constants,
    )
    if num_splits > 1:
        merge_splits_kernel[(B * H,)](
            *(outs, logsumexps, out, logsumexp),
            HEAD_DIM=D,
            COLS=constants["COLS"],
            NUM_SPLITS=num_splits,
        )
    return out, logsumexp


def decode_constants(
    group_size: int,
    head_dim: int,
    num_splits: int,
    dtype: str,
    is_interpreted: bool = IS_INTERPRETED,
) -> dict[str, int | bool]:
    """The constants that `paged_decode_kernel` is compiled with. dtype: "bfloat16"."""
    return {
        "GROUP_SIZE": group_size,
        "HEAD_DIM": head_dim,
        "ROWS": max(MIN_DOT, triton.next_power_of_2(group_size)),
        "COLS": max(MIN_DOT, triton.next_power_of_2(head_dim)),
        "TILE": 64 if is_interpreted else TILES[dtype],  # interpreted, fewer are faster
        "NUM_SPLITS": num_splits,
        # The interpreter computes bf16 wrongly.
        "UPCAST": is_interpreted or dtype == "float32",
    }


def choose_num_splits(num_programs: int, max_seq_len: int, device: torch.device) -> int:
    """Enough programs to fill a GPU twice, of some 256 to 8,192 tokens each, at most 64.

    A long text is split even in a large batch, which would wait for it in the end.
    max_seq_len: what the tables have room for. Reading the longest length instead would
    make the GPU wait.
    """
    if device.type != "cuda":
        return 1
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = triton.next_power_of_2(triton.cdiv(2 * num_sms, num_programs))
    fewest, most = (triton.next_power_of_2(max(1, max_seq_len // n)) for n in (8192, 256))
    return min(max(wanted, fewest), most, 64)


def check_decode_inputs(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
):
    """Raise ValueError, with expected and got, unless shapes, dtypes and devices fit."""
    for name, tensor, num_dims in (
        ("q", q, 3),
        ("k_cache", k_cache, 4),
        ("v_cache", v_cache, 4),
        ("block_tables", block_tables, 2),
        ("seq_lens", seq_lens, 1),
    ):
        if tensor.dim() != num_dims:
            raise ValueError(
                f"{name}: expected {num_dims} dimensions, got {tuple(tensor.shape)}"
            )
        if tensor.device != q.device:
            raise ValueError(f"{name}: expected on {q.device}, as q, got {tensor.device}")
        is_index = name in ("block_tables", "seq_lens")
        dtype = torch.int32 if is_index else q.dtype
        if tensor.dtype != dtype:
            raise ValueError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"q: expected float32, float16 or bfloat16, got {q.dtype}")
    (B, H, D), G = q.shape, k_cache.shape[2]
    if v_cache.shape != k_cache.shape:
        raise ValueError(
            f"v_cache: expected {tuple(k_cache.shape)} as k_cache, "
            f"got {tuple(v_cache.shape)}"
        )
    if k_cache.shape[3] != D:
        raise ValueError(f"k_cache: expected D = {D} as in q, got {k_cache.shape[3]}")
    if G == 0 or H % G:
        raise ValueError(f"k_cache: expected a divisor of {H} query heads, got G = {G}")
    if len(block_tables) != B or len(seq_lens) != B:
        raise ValueError(
            f"block_tables, seq_lens: expected one row for each of {B} requests, "
            f"got {len(block_tables)} and {len(seq_lens)}"
        )


def check_block_ids(
    k_cache: torch.Tensor, block_tables: torch.Tensor, seq_lens: torch.Tensor
):
    """Raise ValueError unless each length fits its table, and each id the pool."""
    num_blocks, block_size = k_cache.shape[:2]
    for b, (block_table, seq_len) in enumerate(
        zip(block_tables.tolist(), seq_lens.tolist())
    ):
        if not 0 <= seq_len <= len(block_table) * block_size:
            raise ValueError(
                f"request {b}: expected 0 to {len(block_table) * block_size} tokens, as "
                f"its table is wide, got {seq_len}"
            )
        for block_id in block_table[: math.ceil(seq_len / block_size)]:
            if not 0 <= block_id < num_blocks:
                raise ValueError(
                    f"request {b}: expected blocks 0 to {num_blocks - 1}, got {block_id}"
                )


@triton.jit
def _double_kernel(x_ptr, out_ptr, n, TILE: tl.constexpr):
    i = tl.arange(0, TILE)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr + i, 2 * x, mask=i < n)


@functools.cache
def warn_of_twin():
    """Say, once, who computes where there is no Triton."""
    warnings.warn(
        "no Triton here (it is for Linux): the kernel's torch twin computes instead",
        stacklevel=3,
    )


@functools.cache
def check_interpreter():
    """Raise RuntimeError that says plainly what is wrong, if kernels do not run here."""
    if not HAS_TRITON:
        raise RuntimeError("Triton: expected it installed, which it can be on Linux")
    if not torch.cuda.is_available() and not IS_INTERPRETED:
        raise RuntimeError(
            "Triton: expected a GPU, or TRITON_INTERPRET=1 before Triton is imported for "
            "the first time; import lib before anything that imports Triton"
        )
    if not IS_INTERPRETED:
        return
    x, out = torch.arange(3.0), torch.zeros(4)
    try:
        _double_kernel[(1,)](x, out, 3, TILE=4)
        got = out.tolist()
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
    if got != [0.0, 2.0, 4.0, 0.0]:
        raise RuntimeError(
            f"the Triton interpreter is broken here (triton {triton.__version__}), or "
            f"Triton was imported before lib: expected [0, 2, 4, 0], got {got}"
        )
