"""Chapter 5: paged attention as Triton kernels, and their launchers.

One program of `paged_decode_kernel` serves one request, one KV head with all the query
heads that read it, and one share (split) of its keys. It looks up the block of every
token in the table and reads keys and values where they lie, a tile at a time, with the
running sums of `paged_attention.attend_online`. So each byte of the cache is read once,
whatever the number of query heads, and nothing is copied.

`paged_prefill_kernel` does the same for a tile of many new tokens, each of which sees the
keys before it. Where there is no Triton the launchers warn once that a torch twin
computes in the kernel's place.

FlashAttention: https://arxiv.org/abs/2205.14135. Splits, as in Flash-Decoding:
https://crfm.stanford.edu/2023/10/12/flashdecoding.html.

Read lib/interpreter.py and lib/paged_attention.py before.
"""

import functools
import math
from typing import Any

import torch

from lib import paged_attention
from lib.config import check_count
from lib.interpreter import (
    HAS_TRITON,
    IS_INTERPRETED,
    check_interpreter,
    check_no_gradient,
    on_its_device,
    tl,
    triton,
    warn_of_twin,
)

LOG2_E = tl.constexpr(math.log2(math.e))


MIN_DOT = 16  # rows and columns that tensor cores multiply at least
# What a program can hold, found by compiling: with more of it an A100 has too little
# shared memory, or many numbers find no register.
MAX_COLS = 512  # of q, k and v, that is D rounded up
MAX_NUMBERS = {  # of its queries, ROWS · COLS
    torch.float32: 2**13,
    torch.float16: 2**14,
    torch.bfloat16: 2**14,
}
TILE_NUMBERS = {torch.float32: 2**11, torch.float16: 2**13, torch.bfloat16: 2**13}
PREFILL_ROWS = {torch.float32: 32, torch.float16: 128, torch.bfloat16: 128}  # D <= 128
MERGED_SPLITS = 16  # at a time
MIN_SPLIT_TOKENS, MAX_SPLIT_TOKENS, MIN_TOKENS_IN_ROUNDS = 128, 4096, 1024
SHARED_BYTES = 73 * 1024  # of a program that decodes with two buffers of 64 tokens
MAX_SPLITS = 65535  # that a GPU takes as the third of a launch's sizes
PLATFORM = "hip" if torch.version.hip else "cuda"


@triton.jit(do_not_specialize=["split_tokens", "table_stride_b"])
def paged_decode_kernel(
    q_ptr,  # (B, H, D)
    k_cache_ptr,  # (num_blocks, block_size, G, D)
    v_cache_ptr,  # (num_blocks, block_size, G, D)
    block_tables_ptr,  # (B, M)
    seq_lens_ptr,  # (B,)
    out_ptr,  # (B, H, num_splits, D)
    logsumexp_ptr,  # (B, H, num_splits)
    scale_log2_e,  # what scores are multiplied by, so that exp2 can take the place of exp
    split_tokens,  # keys of a program
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
    BLOCK_SIZE: tl.constexpr,  # tokens
    ROWS: tl.constexpr,  # GROUP_SIZE, rounded up to what tensor cores take
    COLS: tl.constexpr,  # D, rounded up to a power of two
    TILE: tl.constexpr,  # tokens
    UPCAST: tl.constexpr,  # to fp32 right after a load
):
    # locate: which request, which heads, and which split of the keys
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    split, num_splits = tl.program_id(2), tl.num_programs(2)
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    is_head, is_col = row < GROUP_SIZE, col < HEAD_DIM
    h = g * GROUP_SIZE + row
    seq_len = tl.load(seq_lens_ptr + b)
    start = split * split_tokens
    end = tl.minimum(start + split_tokens, seq_len)
    if (split > 0) & (start >= seq_len):  # without keys: nobody reads what it would store
        return

    # load the queries of all heads of the group, once
    q_at = b * q_stride_b + h[:, None] * q_stride_h + col[None, :]
    q = tl.load(q_ptr + q_at, mask=is_head[:, None] & is_col[None, :], other=0.0)
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
        table_at = b * table_stride_b + position // BLOCK_SIZE
        block_id = tl.load(block_tables_ptr + table_at, mask=is_token, other=0)
        block_id = block_id.to(tl.int64)
        place = (position % BLOCK_SIZE).to(tl.int64)

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
    divisor = tl.where(row_sum == 0, 1.0, row_sum)
    logsumexp = (row_max + tl.log2(divisor)) / LOG2_E
    out = (acc / divisor[:, None]).to(out_ptr.dtype.element_ty)
    at = (b * tl.num_programs(1) * GROUP_SIZE + h) * num_splits + split
    tl.store(logsumexp_ptr + at, logsumexp, mask=is_head)
    out_at = at[:, None] * HEAD_DIM + col[None, :]
    tl.store(out_ptr + out_at, out, mask=is_head[:, None] & is_col[None, :])


@triton.jit(do_not_specialize=["num_splits", "split_tokens"])
def merge_splits_kernel(
    outs_ptr,  # (B, H, num_splits, D)
    logsumexps_ptr,  # (B, H, num_splits)
    seq_lens_ptr,  # (B,)
    out_ptr,  # (B, H, D)
    logsumexp_ptr,  # (B, H)
    num_splits,
    split_tokens,  # keys of a split
    num_heads,  # H
    HEAD_DIM: tl.constexpr,
    COLS: tl.constexpr,  # D, rounded up to a power of two
    TILE: tl.constexpr,  # splits
):
    # locate: which head of which request, and the splits that have keys
    at = tl.program_id(0).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + at // num_heads)
    num_used = tl.minimum(tl.cdiv(seq_len, split_tokens), num_splits)
    col = tl.arange(0, COLS)
    is_col = col < HEAD_DIM

    # begin with nothing
    largest, total = float("-inf"), 0.0
    acc = tl.zeros([COLS], tl.float32)

    # tile by tile: a softmax over logsumexps, online as that over scores
    for first in range(0, num_used, TILE):
        split = first + tl.arange(0, TILE)
        is_used = split < num_used
        split_at = at * num_splits + split
        outs_at = split_at[:, None] * HEAD_DIM + col[None, :]
        is_there = is_used[:, None] & is_col[None, :]
        logsumexps = tl.load(logsumexps_ptr + split_at, mask=is_used, other=float("-inf"))
        outs = tl.load(outs_ptr + outs_at, mask=is_there, other=0.0)
        new_largest = tl.maximum(largest, tl.max(logsumexps, axis=0))
        rescale = tl.exp(largest - new_largest)
        weights = tl.exp(logsumexps - new_largest)
        total = total * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(outs * weights[:, None], axis=0)
        largest = new_largest

    # store; of a request without keys 0 and -inf
    divisor = tl.where(total == 0, 1.0, total)
    out = (acc / divisor).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at * HEAD_DIM + col, out, mask=is_col)
    tl.store(logsumexp_ptr + at, largest + tl.log(divisor))


@triton.jit(do_not_specialize=["num_requests", "table_stride_b"])
def paged_prefill_kernel(
    q_ptr,  # (N, H, D), request after request
    k_cache_ptr,  # (num_blocks, block_size, G, D)
    v_cache_ptr,  # (num_blocks, block_size, G, D)
    block_tables_ptr,  # (B, M)
    seq_lens_ptr,  # (B,)
    query_lens_ptr,  # (B,)
    out_ptr,  # (N, H, D)
    logsumexp_ptr,  # (N, H)
    scale_log2_e,
    num_requests,  # B
    q_stride_n,
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
    BLOCK_SIZE: tl.constexpr,  # tokens
    REQUESTS: tl.constexpr,  # a power of two of at least B
    QUERIES: tl.constexpr,  # query tokens of a program, GROUP_SIZE heads of each
    ROWS: tl.constexpr,  # QUERIES · GROUP_SIZE, rounded up to a power of two
    COLS: tl.constexpr,  # D, rounded up to a power of two
    TILE: tl.constexpr,  # key tokens
    UPCAST: tl.constexpr,  # to fp32 right after a load
):
    # locate: programs count the tiles of queries through, request after request, and
    # from the end, since the last tiles of a prompt see the most keys and should not wait
    g, program = tl.program_id(0).to(tl.int64), tl.num_programs(1) - 1 - tl.program_id(1)
    request = tl.arange(0, REQUESTS)
    counts = tl.load(query_lens_ptr + request, mask=request < num_requests, other=0)
    tiles = tl.cdiv(counts, QUERIES)
    b = tl.sum((tl.cumsum(tiles) <= program).to(tl.int32))
    if b >= num_requests:  # more programs than tiles
        return
    first = (program - tl.sum(tl.where(request < b, tiles, 0))) * QUERIES
    query_start = tl.sum(tl.where(request < b, counts, 0))
    query_len, seq_len = tl.load(query_lens_ptr + b), tl.load(seq_lens_ptr + b)
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    is_col = col < HEAD_DIM

    # row: a query token and a head; where the token stands, and where the tile ends
    t, h = first + row // GROUP_SIZE, g * GROUP_SIZE + row % GROUP_SIZE
    is_row = (row < QUERIES * GROUP_SIZE) & (t < query_len)
    query_position = seq_len - query_len + t
    end = seq_len - query_len + tl.minimum(first + QUERIES, query_len)

    # load the queries, once
    n = (query_start + t).to(tl.int64)
    q_at = n[:, None] * q_stride_n + h[:, None] * q_stride_h + col[None, :]
    q = tl.load(q_ptr + q_at, mask=is_row[:, None] & is_col[None, :], other=0.0)
    q = q.to(tl.float32) if UPCAST else q

    # begin with nothing
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, COLS], tl.float32)

    # tile by tile: keys behind the last query of the tile are not even loaded
    for tile_start in range(0, end, TILE):
        position = tile_start + tl.arange(0, TILE)
        is_token = position < end
        is_there = is_token[:, None] & is_col[None, :]

        # look up the blocks, as for decoding
        table_at = b.to(tl.int64) * table_stride_b + position // BLOCK_SIZE
        block_id = tl.load(block_tables_ptr + table_at, mask=is_token, other=0)
        block_id = block_id.to(tl.int64)
        place = (position % BLOCK_SIZE).to(tl.int64)

        # address: where the keys and values of these tokens begin
        k_at = block_id * k_stride_block + place * k_stride_place + g * k_stride_g
        v_at = block_id * v_stride_block + place * v_stride_place + g * v_stride_g

        # gather them, as for decoding
        k = tl.load(k_cache_ptr + k_at[:, None] + col[None, :], mask=is_there, other=0.0)
        v = tl.load(v_cache_ptr + v_at[:, None] + col[None, :], mask=is_there, other=0.0)

        # upcast where the dtype needs it
        k, v = (k.to(tl.float32), v.to(tl.float32)) if UPCAST else (k, v)

        # score: each query sees the keys up to its own position, and no others
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2_e
        is_seen = position[None, :] <= query_position[:, None]
        scores = tl.where(is_seen, scores, float("-inf"))

        # rescale what was summed up, as for decoding
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        rescale = tl.exp2(row_max - new_max)
        weights = tl.exp2(scores - new_max[:, None])
        row_sum = row_sum * rescale + tl.sum(weights, axis=1)
        weighted = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        acc = acc * rescale[:, None] + weighted
        row_max = new_max

    # store: key 0 is seen by every query, so no sum is 0
    at = n * tl.num_programs(0) * GROUP_SIZE + h
    tl.store(logsumexp_ptr + at, (row_max + tl.log2(row_sum)) / LOG2_E, mask=is_row)
    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    out_at = at[:, None] * HEAD_DIM + col[None, :]
    tl.store(out_ptr + out_at, out, mask=is_row[:, None] & is_col[None, :])


def paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float | None = None,
    split_tokens: int | None = None,
    check_ids: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`paged_attention.paged_decode_gather` by the kernels.

    block_tables int32 (B, M), seq_lens int32 (B,). split_tokens: how many keys of a
    request one program takes, before the next one takes over; None chooses. check_ids:
    whether to look if tables and lengths fit the pool, for which a GPU has to be waited
    for; None looks on a CPU only. Raises ValueError for tensors that do not fit each
    other, for more numbers per head, or heads per group, than a program holds, and where
    a gradient is wanted: the kernels have no backward pass.

    Nothing here waits for a GPU, and what is launched depends on shapes alone. So a call
    that is not the first, which compiles, can be captured in a CUDA graph, and replayed
    with other lengths, as long as they fit the width that the table had.
    """
    check_inputs(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        block_tables=block_tables,
        seq_lens=seq_lens,
    )
    if check_ids or (check_ids is None and not q.is_cuda):
        check_block_ids(k_cache, block_tables, seq_lens)
    if split_tokens is not None:
        split_tokens = check_count("split_tokens", split_tokens)
    if not HAS_TRITON:
        warn_of_twin()
        return paged_attention.paged_decode_online(
            q, k_cache, v_cache, block_tables, seq_lens, scale=scale
        )
    check_interpreter()
    (B, H, D), (block_size, G) = q.shape, k_cache.shape[1:3]
    q, k_cache, v_cache, block_tables, seq_lens = (
        x if x.stride(-1) == 1 else x.contiguous()
        for x in (q, k_cache, v_cache, block_tables, seq_lens)
    )
    constants = decode_constants(H // G, D, block_size, q.dtype)
    out = torch.empty(B, H, D, dtype=q.dtype, device=q.device)
    logsumexp = torch.empty(B, H, dtype=torch.float32, device=q.device)
    if B == 0:
        return out, logsumexp
    max_seq_len = block_tables.shape[1] * block_size
    if split_tokens is None:
        split_tokens = choose_split_tokens(B * G, max_seq_len, q.device)
    num_splits = max(1, triton.cdiv(max_seq_len, split_tokens))
    if num_splits > MAX_SPLITS:
        raise ValueError(
            f"split_tokens: expected so many that {max_seq_len} tokens, as the table is "
            f"wide, make at most {MAX_SPLITS} splits, got {split_tokens}"
        )

    if num_splits == 1:  # a part is the whole
        outs, logsumexps = out, logsumexp
    else:
        outs = torch.empty(B, H, num_splits, D, dtype=torch.float32, device=q.device)
        logsumexps = torch.empty(B, H, num_splits, dtype=torch.float32, device=q.device)
    with on_its_device(q):
        paged_decode_kernel[(B, G, num_splits)](
            *(q, k_cache, v_cache, block_tables, seq_lens, outs, logsumexps),
            (D**-0.5 if scale is None else float(scale)) * LOG2_E.value,
            split_tokens,
            *q.stride()[:2],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            block_tables.stride(0),
            **constants,
            **launch_options(constants["ROWS"]),
        )
        if num_splits > 1:
            merge_splits_kernel[(B * H,)](
                *(outs, logsumexps, seq_lens, out, logsumexp),
                *(num_splits, split_tokens, H),
                HEAD_DIM=D,
                COLS=constants["COLS"],
                TILE=MERGED_SPLITS,
            )
    return out, logsumexp


def paged_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_lens: torch.Tensor,
    *,
    scale: float | None = None,
    check_ids: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`paged_attention.paged_prefill_gather` by a kernel: any number of new tokens.

    q (N, H, D), request after request; block_tables int32 (B, M), seq_lens int32 (B,),
    the new tokens among them, query_lens int32 (B,), which add up to N. check_ids, and
    what is raised: as `paged_decode`; with check_ids lengths are looked at too.
    """
    check_inputs(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        block_tables=block_tables,
        seq_lens=seq_lens,
        query_lens=query_lens,
    )
    if check_ids or (check_ids is None and not q.is_cuda):
        check_block_ids(k_cache, block_tables, seq_lens)
        check_new_tokens(query_lens, seq_lens, len(q))
    if not HAS_TRITON:
        warn_of_twin()
        return paged_attention.paged_prefill_gather(
            q, k_cache, v_cache, block_tables, seq_lens, query_lens, scale=scale
        )
    check_interpreter()
    (N, H, D), (block_size, G), B = q.shape, k_cache.shape[1:3], len(seq_lens)
    q, k_cache, v_cache, block_tables, seq_lens, query_lens = (
        x if x.stride(-1) == 1 else x.contiguous()
        for x in (q, k_cache, v_cache, block_tables, seq_lens, query_lens)
    )
    constants = prefill_constants(H // G, D, block_size, B, q.dtype)
    out = torch.empty(N, H, D, dtype=q.dtype, device=q.device)
    logsumexp = torch.empty(N, H, dtype=torch.float32, device=q.device)
    if N == 0:
        return out, logsumexp
    # As many tiles of queries as there can be, however the N are shared out.
    num_tiles = N // constants["QUERIES"] + min(B, N)
    with on_its_device(q):
        paged_prefill_kernel[(G, num_tiles)](
            *(q, k_cache, v_cache, block_tables, seq_lens, query_lens, out, logsumexp),
            (D**-0.5 if scale is None else float(scale)) * LOG2_E.value,
            B,
            *q.stride()[:2],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            block_tables.stride(0),
            **constants,
            **launch_options(constants["ROWS"]),
        )
    return out, logsumexp


def fastest_settings(device: torch.device | str) -> dict[str, Any]:
    """Settings of a `PagedKVCache` with keys and values as they are: the kernels, where
    they are compiled for this device, or else one call of torch's attention for all that
    decode."""
    if torch.device(device).type == "cuda" and HAS_TRITON and not IS_INTERPRETED:
        return {"decode": paged_decode, "prefill": paged_prefill}
    return {"fused_decode": True}


@functools.cache
def decode_constants(
    group_size: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    is_interpreted: bool = IS_INTERPRETED,
) -> dict[str, int | bool]:
    """The constants that `paged_decode_kernel` is compiled with, not to be changed.

    Raises ValueError where a program could not hold its queries, or a tile of keys.
    """
    rows = max(MIN_DOT, triton.next_power_of_2(group_size))
    return {
        "GROUP_SIZE": group_size,
        "ROWS": rows,
        **_tile_constants(rows, head_dim, block_size, dtype, is_interpreted),
    }


@functools.cache
def prefill_constants(
    group_size: int,
    head_dim: int,
    block_size: int,
    batch_size: int,
    dtype: torch.dtype,
    is_interpreted: bool = IS_INTERPRETED,
) -> dict[str, int | bool]:
    """The constants that `paged_prefill_kernel` is compiled with. Raises as
    `decode_constants`."""
    most = 128 if is_interpreted else PREFILL_ROWS[dtype]
    if head_dim > 128 and not is_interpreted:  # for GPUs with 99 KB of shared memory too
        most = most // 4
    rows = max(MIN_DOT, most, triton.next_power_of_2(group_size))
    return {
        "GROUP_SIZE": group_size,
        "ROWS": rows,
        "QUERIES": rows // group_size,
        "REQUESTS": max(256, triton.next_power_of_2(batch_size)),
        **_tile_constants(rows, head_dim, block_size, dtype, is_interpreted),
    }


def _tile_constants(
    rows: int, head_dim: int, block_size: int, dtype: torch.dtype, is_interpreted: bool
) -> dict[str, int | bool]:
    """What both kernels have: sizes of a tile of keys, and whether to upcast it."""
    cols = max(MIN_DOT, triton.next_power_of_2(head_dim))
    if not is_interpreted and (cols > MAX_COLS or rows * cols > MAX_NUMBERS[dtype]):
        raise ValueError(
            f"q, k_cache: expected at most {MAX_COLS} numbers per head, and at most "
            f"{MAX_NUMBERS[dtype]} in the heads of a group, both rounded up to powers of "
            f"two, got {head_dim} and {rows} · {cols}"
        )
    tile = TILE_NUMBERS[dtype] // cols
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "COLS": cols,
        # Interpreted, fewer tiles are faster.
        "TILE": 64 if is_interpreted else max(MIN_DOT, min(64, tile)),
        # The interpreter computes bf16 wrongly.
        "UPCAST": is_interpreted or dtype == torch.float32,
    }


def launch_options(rows: int, platform: str = PLATFORM) -> dict[str, int]:
    """Warps of a program with so many rows, and how far ahead it loads.

    platform: "cuda" or "hip". Of five stages K and V get two buffers each, or three where
    an H100 multiplies by itself (HGMMA), since the look-up of a block and the load behind
    it share them. AMD's compiler counts otherwise, and with more it spills.
    """
    is_large = rows >= 128
    num_stages = 5 if platform == "cuda" else 1 if is_large else 2
    return {"num_warps": 8 if is_large else 4, "num_stages": num_stages}


def choose_split_tokens(num_programs: int, max_seq_len: int, device: torch.device) -> int:
    """Keys of a program: of 128 to 4,096 the most that keep a GPU's multiprocessors busy.

    num_programs: B · G. max_seq_len: what the tables have room for. Reading the longest
    length instead would make the GPU wait. It is a number at run time: the kernels are
    compiled when the first text is shared out, and never again for a longer one.
    """
    if device.type != "cuda":
        return max(1, max_seq_len)
    gpu = torch.cuda.get_device_properties(device)
    at_once = max(1, gpu.shared_memory_per_multiprocessor // SHARED_BYTES)
    return _busiest_split_tokens(
        num_programs, max(1, max_seq_len), gpu.multi_processor_count, at_once
    )


@functools.lru_cache(maxsize=256)
def _busiest_split_tokens(
    num_programs: int, max_seq_len: int, num_sms: int, at_once: int
) -> int:
    """at_once: programs that a multiprocessor runs at a time.

    Programs that fit on the GPU together take as long as the multiprocessor that got the
    most of them. More than that come in rounds, and the last round takes as long as a
    full one: of 512 in rounds of 396 the second leaves most of the GPU idle.
    """
    first_round = at_once * num_sms

    def share_busy(split_tokens: int) -> float:
        """The work there is, of that which the GPU could do in the time."""
        longest = min(split_tokens, max_seq_len)
        programs = num_programs * triton.cdiv(max_seq_len, split_tokens)
        if programs < 1.5 * num_sms and split_tokens > MIN_SPLIT_TOKENS:
            return 0.0  # one program each asks for too few bytes at a time
        if programs > first_round and split_tokens < MIN_TOKENS_IN_ROUNDS:
            return 0.0  # merging would take longer than what waiting costs
        size = num_sms if programs <= first_round else first_round
        could = triton.cdiv(programs, size) * size * longest
        return num_programs * max_seq_len / could

    lengths = range(MAX_SPLIT_TOKENS, MIN_SPLIT_TOKENS - 1, -64)
    shares = {length: share_busy(length) for length in lengths}
    enough = 0.95 * max(shares.values())
    return next(length for length, share in shares.items() if share >= enough)


def check_inputs(**tensors: torch.Tensor):
    """Raise ValueError, with expected and got, unless shapes, dtypes and devices fit.

    tensors: q, k_cache, v_cache, block_tables, seq_lens, and for prefill query_lens.
    """
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name}: expected a tensor, got a {type(x).__name__}")
    check_no_gradient(*tensors.values())
    _check_kinds(tuple((n, x.shape, x.dtype, x.device) for n, x in tensors.items()))


# Layer after layer asks for the same.
@functools.lru_cache(maxsize=256)
def _check_kinds(kinds: tuple[tuple[str, torch.Size, torch.dtype, torch.device], ...]):
    shapes = {name: shape for name, shape, _, _ in kinds}
    (_, _, q_dtype, q_device), *_ = kinds
    num_dims = {"q": 3, "k_cache": 4, "v_cache": 4, "block_tables": 2}  # others 1
    for name, shape, dtype, device in kinds:
        if len(shape) != num_dims.get(name, 1):
            raise ValueError(
                f"{name}: expected {num_dims.get(name, 1)} dimensions, got {tuple(shape)}"
            )
        if device != q_device:
            raise ValueError(f"{name}: expected on {q_device}, as q, got {device}")
        is_index = name in ("block_tables", "seq_lens", "query_lens")
        expected = torch.int32 if is_index else q_dtype
        if dtype != expected:
            raise ValueError(f"{name}: expected {expected}, got {dtype}")
    if q_dtype not in TILE_NUMBERS:
        raise ValueError(f"q: expected float32, float16 or bfloat16, got {q_dtype}")
    (N, H, D), G = shapes["q"], shapes["k_cache"][2]
    if shapes["v_cache"] != shapes["k_cache"]:
        raise ValueError(
            f"v_cache: expected {tuple(shapes['k_cache'])} as k_cache, "
            f"got {tuple(shapes['v_cache'])}"
        )
    for name, shape in (("q", shapes["q"][1:]), ("k_cache", shapes["k_cache"][1:])):
        if 0 in shape:
            raise ValueError(
                f"{name}: expected no size of 0 but the first, got {tuple(shapes[name])}"
            )
    if shapes["k_cache"][3] != D:
        raise ValueError(f"k_cache: expected D = {D} as in q, got {shapes['k_cache'][3]}")
    if H % G:
        raise ValueError(f"k_cache: expected a divisor of {H} query heads, got G = {G}")
    B = shapes["query_lens"][0] if "query_lens" in shapes else N
    num_rows = shapes["block_tables"][0], shapes["seq_lens"][0]
    if num_rows != (B, B):
        raise ValueError(
            f"block_tables, seq_lens: expected one row for each of {B} requests, "
            f"got {num_rows[0]} and {num_rows[1]}"
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


def check_new_tokens(query_lens: torch.Tensor, seq_lens: torch.Tensor, N: int):
    """Raise ValueError unless the new tokens are N in all, and of each request at most
    all of its tokens."""
    counts = query_lens.tolist()
    if sum(counts) != N:
        raise ValueError(f"query_lens: expected {N} in all, as q has rows, got {counts}")
    for b, (query_len, seq_len) in enumerate(zip(counts, seq_lens.tolist())):
        if not 0 <= query_len <= seq_len:
            raise ValueError(
                f"request {b}: expected 0 to {seq_len} new tokens of its {seq_len}, "
                f"got {query_len}"
            )
