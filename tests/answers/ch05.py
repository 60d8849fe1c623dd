import inspect
import math
import re

import torch

from answers import right, wrong
from lib import paged_attention_triton, paged_kv_cache_triton
from lib.course.collect import register
from lib.interpreter import tl, triton
from lib.paged_attention_triton import LOG2_E

STORE = "    tl.store(out_ptr + row * TILE + col, x)\n"

# attend_online


@right("attend_online")
def attend_online_with_repeated_heads(q, tiles):
    H, dtype = len(q), q.dtype
    q = q.float() if dtype != torch.float64 else q
    row_max = torch.full((H,), -math.inf, dtype=q.dtype)
    row_sum, acc = torch.zeros(H, dtype=q.dtype), torch.zeros_like(q)
    for k, v in tiles:
        if k.numel() == 0:
            continue
        k, v = (x.to(q).repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("hd,shd->hs", q, k)
        new_max = torch.max(row_max, scores.max(dim=1).values)
        factor = torch.exp(row_max - new_max)
        weights = torch.exp(scores - new_max[:, None])
        row_sum = factor * row_sum + weights.sum(1)
        acc = factor[:, None] * acc + torch.einsum("hs,shd->hd", weights, v)
        row_max = new_max
    out = torch.where(row_sum[:, None] > 0, acc / row_sum[:, None], 0)
    return out.to(dtype), row_max + torch.log(row_sum)


@right("attend_online")
def attend_online_by_merging(q, tiles):
    dtype, q = q.dtype, q if q.dtype == torch.float64 else q.float()
    out = torch.zeros_like(q)
    total = torch.full((len(q),), -math.inf, dtype=q.dtype)
    for k, v in tiles:
        group_size = len(q) // k.shape[1]
        for h in range(len(q) if len(k) else 0):
            scores = k[:, h // group_size].to(q) @ q[h]
            one = scores.softmax(0) @ v[:, h // group_size].to(q)
            new = torch.logaddexp(total[h], scores.logsumexp(0))
            share = (total[h] - new).exp()
            out[h] = share * out[h] + (1 - share) * one
            total[h] = new
    return out.to(dtype), total


@right("attend_online")
def attend_online_where_a_tile_without_keys_goes_through(q, tiles):
    H, D = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    row_max = torch.full((H, 1), torch.finfo(dtype).min, dtype=dtype)
    row_sum, acc = torch.zeros_like(row_max), torch.zeros(H, D, dtype=dtype)
    for k, v in tiles:
        k, v = (x.to(dtype).repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("hd,shd->hs", q.to(dtype), k)
        new_max = torch.cat([row_max, scores], dim=1).amax(dim=1, keepdim=True)
        rescale, weights = (row_max - new_max).exp(), (scores - new_max).exp()
        row_sum = row_sum * rescale + weights.sum(dim=1, keepdim=True)
        acc = acc * rescale + torch.einsum("hs,shd->hd", weights, v)
        row_max = new_max
    is_empty = row_sum == 0
    out = torch.where(is_empty, 0, acc / row_sum).to(q.dtype)
    return out, (row_max + row_sum.log()).squeeze(1)


def online(
    q,
    tiles,
    rescale_sum=True,
    rescale_acc=True,
    scale=1.0,
    tiled=False,
    best=True,
    add_max=True,
    running=True,
    shared=False,
    begin=-math.inf,
    follow=True,
    divide=True,
    turned=False,
    old=False,
    exp=torch.exp,
    in_half=False,
    cast=True,
    skip=True,
    empty_max=None,
    larger=torch.maximum,
    divide_each=False,
    zero_is_empty=False,
):
    (H, D), dtype = q.shape, q.dtype
    q = q.float() if dtype == torch.float16 and not in_half else q
    row_max = q.new_full((H, 1), begin)
    row_sum, acc = q.new_zeros(H, 1), q.new_zeros(H, D)
    for k, v in tiles:
        if skip and len(k) == 0:
            continue
        k, v, G = k.to(q), v.to(q), k.shape[1]
        heads = torch.arange(H) % G if tiled else torch.arange(H) // (H // G)
        scores = scale * torch.einsum("hd,shd->hs", q, k[:, heads])
        if len(k) == 0 and empty_max is not None:
            tile_max = row_max * 0 + empty_max
        else:
            tile_max = scores.amax(dim=-1, keepdim=True)
        if shared:
            tile_max = tile_max * 0 + tile_max.max()
        new_max = larger(row_max, tile_max) if running else tile_max
        if not best:
            new_max = torch.zeros_like(new_max)
        rescale = exp((row_max - new_max) * (-1 if turned else 1))
        weights = exp(scores - (row_max if old else new_max))
        total = weights.sum(-1, keepdim=True)
        row_sum = (row_sum * rescale if rescale_sum else row_sum) + total
        weighted = torch.einsum("hs,shd->hd", weights, v[:, heads])
        acc = (acc * rescale if rescale_acc else acc) + weighted
        acc = acc / row_sum if divide_each else acc
        row_max = new_max if follow else row_max
    logsumexp = row_sum.log() + (row_max if add_max else 0)
    divisor = row_sum.clamp(min=torch.finfo(q.dtype).tiny) if divide else 1
    out = acc / divisor
    if zero_is_empty:
        out = out.masked_fill(logsumexp == 0, 0)
    if dtype == torch.float16:
        logsumexp = logsumexp.float()
    return (out.to(dtype) if cast else out), logsumexp.squeeze(-1)


@wrong("attend_online", says="rescale both by exp(old - new)")
def attend_online_without_rescaling(q, tiles):
    return online(q, tiles, rescale_sum=False, rescale_acc=False)


@wrong("attend_online", says="acc is not. When the largest score grows")
def attend_online_without_rescaling_acc(q, tiles):
    return online(q, tiles, rescale_acc=False)


@wrong("attend_online", says="row_sum is not. When the largest score grows")
def attend_online_without_rescaling_the_sum(q, tiles):
    return online(q, tiles, rescale_sum=False)


@wrong("attend_online", says="the wrong way round: exp(old - new)")
def attend_online_rescaling_the_wrong_way_round(q, tiles):
    return online(q, tiles, turned=True)


@wrong("attend_online", says="row_max is still the old one")
def attend_online_with_weights_by_the_old_maximum(q, tiles):
    return online(q, tiles, old=True)


@wrong("attend_online", says="exp, not exp2")
def attend_online_with_exp2(q, tiles):
    return online(q, tiles, exp=torch.exp2)


@wrong("attend_online", says="lost in sums of half precision")
def attend_online_summed_in_half_precision(q, tiles):
    return online(q, tiles, in_half=True)


@wrong("attend_online", says="out is in q's dtype")
def attend_online_with_out_in_single_precision(q, tiles):
    return online(q, tiles, cast=False)


@wrong("attend_online", says="A tile may have no keys")
def attend_online_raising_for_a_tile_without_keys(q, tiles):
    return online(q, tiles, skip=False)


@wrong("attend_online", says="A tile may have no keys")
def attend_online_with_nan_for_a_tile_without_keys(q, tiles):
    return online(q, tiles, skip=False, empty_max=-math.inf)


@wrong("attend_online", says="A logsumexp of 0 is the logarithm of 1")
def attend_online_taking_a_sum_of_one_for_empty(q, tiles):
    return online(q, tiles, zero_is_empty=True)


@wrong("attend_online", says="Keep three running numbers")
def attend_online_with_a_list_of_tiles(q, tiles):
    return online(q, list(tiles))


@wrong("attend_online", says="Keep three running numbers")
def attend_online_with_all_keys_kept(q, tiles):
    tiles = ((k, v) for k, v in tiles)
    kept = []
    return online(q, (kept.append(k) or (k, v) for k, v in tiles))


@wrong("attend_online", says="torch.maximum takes the larger of each two")
def attend_online_with_pythons_max(q, tiles):
    return online(q, tiles, larger=max)


@wrong("attend_online", says="amax gives the values alone")
def attend_online_with_the_max_and_where_it_is(q, tiles):
    row_max = q.new_full((len(q), 1), -math.inf)
    for k, _ in tiles:
        row_max = torch.maximum(row_max, (k[:, 0] @ q.T).T.max(-1, keepdim=True))


@wrong("attend_online", says="tensors have .exp()")
def attend_online_with_math(q, tiles):
    return online(q, tiles, exp=lambda x: torch.full_like(x, math.exp(x)))


@wrong("attend_online", says="Look at the shapes")
def attend_online_not_transposed(q, tiles):
    for k, v in tiles:
        G = k.shape[1]
        scores = q.view(G, len(q) // G, -1) @ k.permute(1, 2, 0)
        out = scores.softmax(-1) @ v
    return out.flatten(0, 1), scores.logsumexp(-1).flatten()


@wrong("attend_online", says="not in each tile")
def attend_online_divided_in_each_tile_too(q, tiles):
    return online(q, tiles, divide_each=True)


@wrong("attend_online", says="the first tile's alone")
def attend_online_returning_in_the_loop(q, tiles):
    for tile in tiles:
        return online(q, [tile])
    return online(q, [])


# Its numbers are wrong, for a cause that nobody has thought of.
@wrong("attend_online")
def attend_online_noisy(q, tiles):
    out, logsumexp = online(q, tiles)
    return out * 1.01, logsumexp


@wrong("attend_online", says="q is scaled already")
def attend_online_scaled_twice(q, tiles):
    return online(q, tiles, scale=q.shape[-1] ** -0.5)


@wrong("attend_online", says="neighbours share")
def attend_online_with_heads_by_turns(q, tiles):
    return online(q, tiles, tiled=True)


@wrong("attend_online", says="Subtract the largest score")
def attend_online_without_a_maximum(q, tiles):
    H, D = q.shape
    row_sum, acc = q.new_zeros(H), q.new_zeros(H, D)
    for k, v in tiles:
        k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
        weights = torch.einsum("hd,shd->hs", q, k).exp()
        row_sum += weights.sum(1)
        acc += torch.einsum("hs,shd->hd", weights, v)
    tiny = torch.finfo(q.dtype).tiny
    return acc / row_sum.clamp(min=tiny)[:, None], row_sum.log()


@wrong("attend_online", says="logsumexp is the largest score plus")
def attend_online_with_half_a_logsumexp(q, tiles):
    return online(q, tiles, add_max=False)


@wrong("attend_online", says="an out of 0")
def attend_online_without_tiles_is_nan(q, tiles):
    H, D = q.shape
    row_max = q.new_full((H, 1), -math.inf)
    row_sum, acc = q.new_zeros(H, 1), q.new_zeros(H, D)
    for k, v in tiles:
        k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("hd,shd->hs", q, k)
        new_max = torch.maximum(row_max, scores.amax(dim=-1, keepdim=True))
        weights, rescale = (scores - new_max).exp(), (row_max - new_max).exp()
        row_sum = row_sum * rescale + weights.sum(-1, keepdim=True)
        acc = acc * rescale + torch.einsum("hs,shd->hd", weights, v)
        row_max = new_max
    return acc / row_sum, (row_max + row_sum.log()).squeeze(-1)


@wrong("attend_online", says="Subtract the largest score")
def attend_online_with_a_maximum_of_zero(q, tiles):
    return online(q, tiles, best=False)


@wrong("attend_online", says="row_max never falls")
def attend_online_with_the_tiles_maximum(q, tiles):
    return online(q, tiles, running=False)


@wrong("attend_online", says="keep one for each head")
def attend_online_with_one_maximum_for_all_heads(q, tiles):
    return online(q, tiles, shared=True)


@wrong("attend_online", says="begin with -inf")
def attend_online_beginning_at_zero(q, tiles):
    return online(q, tiles, begin=0.0)


@wrong("attend_online", says="acc is divided by row_sum")
def attend_online_not_divided(q, tiles):
    return online(q, tiles, divide=False)


@wrong("attend_online", says="row_max has to follow")
def attend_online_that_forgets_the_maximum(q, tiles):
    return online(q, tiles, follow=False)


@wrong("attend_online", says="Keep three running numbers")
def attend_online_all_at_once(q, tiles):
    tiles = [tile for tile in tiles if len(tile[0])]
    if not tiles:
        return torch.zeros_like(q), q.new_full((len(q),), -math.inf)
    k, v = (torch.cat(both) for both in zip(*tiles))
    return online(q, [(k, v)])


@wrong("attend_online", says="Tiles do not weigh the same")
def attend_online_mean_of_tiles(q, tiles):
    results = [online(q, [tile]) for tile in tiles]
    if not results:
        return online(q, [])
    outs, logsumexps = zip(*results)
    return torch.stack(outs).mean(0), torch.stack(logsumexps).logsumexp(0)


@wrong("attend_online", says="the last tile's result alone")
def attend_online_last_tile(q, tiles):
    result = online(q, [])
    for tile in tiles:
        result = online(q, [tile])
    return result


@wrong("attend_online", says="begin with -inf")
def attend_online_beginning_at_minus_ten_thousand(q, tiles):
    return online(q, tiles, begin=-1e4)


# load_row_kernel


@right("load_row_kernel")
@triton.jit
def load_row_with_a_where(x_ptr, out_ptr, x_stride, num_cols, TILE: tl.constexpr):
    i = tl.arange(0, TILE)
    n = tl.program_id(axis=0).to(tl.int64)
    numbers = tl.load(x_ptr + x_stride * n + i, mask=i < num_cols)
    numbers = tl.where(i < num_cols, numbers, 0)
    tl.store(out_ptr + n * TILE + i, numbers, mask=i < TILE)


@triton.jit
def row_start(ptr, stride):
    return ptr + tl.program_id(0).to(tl.int64) * stride


@right("load_row_kernel")
@triton.jit
def load_row_with_a_helper(x_ptr, out_ptr, x_stride, num_cols, TILE: tl.constexpr):
    col = tl.arange(0, TILE)
    x = tl.load(row_start(x_ptr, x_stride) + col, num_cols > col, 0.0)
    tl.store(row_start(out_ptr, TILE) + col, x)


@wrong("load_row_kernel", says="those behind the row are 0")
@triton.jit
def load_row_stores_the_row_alone(x_ptr, out_ptr, x_stride, num_cols, TILE: tl.constexpr):
    row, col = tl.program_id(0), tl.arange(0, TILE)
    x = tl.load(x_ptr + row * x_stride + col, mask=col < num_cols, other=0.0)
    tl.store(out_ptr + row * TILE + col, x, mask=col < num_cols)


@wrong("load_row_kernel")
@triton.jit
def load_row_unmasked(x_ptr, out_ptr, x_stride, num_cols, TILE: tl.constexpr):
    row, col = tl.program_id(0), tl.arange(0, TILE)
    tl.store(out_ptr + row * TILE + col, tl.load(x_ptr + row * x_stride + col))


@wrong("load_row_kernel", says="no more: what follows is somebody else's")
@triton.jit
def load_row_and_then_mask(x_ptr, out_ptr, x_stride, num_cols, TILE: tl.constexpr):
    row, col = tl.program_id(0), tl.arange(0, TILE)
    x = tl.load(x_ptr + row * x_stride + col)
    tl.store(out_ptr + row * TILE + col, tl.where(col < num_cols, x, 0.0))


@wrong("load_row_kernel", says="x_stride numbers, not num_cols")
@triton.jit
def load_row_without_the_stride(x_ptr, out_ptr, x_stride, num_cols, TILE: tl.constexpr):
    row, col = tl.program_id(0), tl.arange(0, TILE)
    x = tl.load(x_ptr + row * num_cols + col, mask=col < num_cols, other=0.0)
    tl.store(out_ptr + row * TILE + col, x)


@wrong("load_row_kernel", says="tl.program_id says")
@triton.jit
def load_row_zero(x_ptr, out_ptr, x_stride, num_cols, TILE: tl.constexpr):
    row, col = tl.program_id(0), tl.arange(0, TILE)
    x = tl.load(x_ptr + col, mask=col < num_cols, other=0.0)
    tl.store(out_ptr + row * TILE + col, x)


@wrong("load_row_kernel", says="A program stores its own row")
@triton.jit
def load_row_into_row_zero(x_ptr, out_ptr, x_stride, num_cols, TILE: tl.constexpr):
    row, col = tl.program_id(0), tl.arange(0, TILE)
    x = tl.load(x_ptr + row * x_stride + col, mask=col < num_cols, other=0.0)
    tl.store(out_ptr + col, x)


@wrong("load_row_kernel", says="right, but not for a GPU")
@triton.jit
def load_row_that_does_not_compile(
    x_ptr, out_ptr, x_stride, num_cols, TILE: tl.constexpr
):
    row, col = tl.program_id(0), tl.arange(0, TILE)
    start = 0
    for _ in range(row):
        start += x_stride * 1.0
    at = x_ptr + row.to(tl.int64) * x_stride + col
    x = tl.load(at, mask=col < num_cols, other=0.0 * start)
    tl.store(out_ptr + row * TILE + col, x)


@wrong("load_row_kernel", says="expected a kernel, under @triton.jit")
def load_row_without_jit(x_ptr, out_ptr, x_stride, num_cols, TILE):
    out_ptr[:] = x_ptr


@wrong("load_row_kernel", says="make row int64 first")
@triton.jit
def load_row_in_32_bits(x_ptr, out_ptr, x_stride, num_cols, TILE: tl.constexpr):
    row, col = tl.program_id(0), tl.arange(0, TILE)
    x = tl.load(x_ptr + row * x_stride + col, mask=col < num_cols, other=0.0)
    tl.store(out_ptr + row * TILE + col, x)


@wrong("load_row_kernel", says="make row int64 first")
@triton.jit
def load_row_multiplied_before_int64(
    x_ptr, out_ptr, x_stride, num_cols, TILE: tl.constexpr
):
    row, col = tl.program_id(0), tl.arange(0, TILE)
    start = (row * x_stride).to(tl.int64)
    x = tl.load(x_ptr + start + col, mask=col < num_cols, other=0.0)
    tl.store(out_ptr + row * TILE + col, x)


@wrong("load_row_kernel", says="crashed")
@triton.jit
def load_row_from_nowhere(x_ptr, out_ptr, x_stride, num_cols, TILE: tl.constexpr):
    row, col = tl.program_id(0), tl.arange(0, TILE)
    x = tl.load(x_ptr + 2_000_000_000 + col, mask=col < num_cols, other=0.0)
    tl.store(out_ptr + row * TILE + col, x)


# Its numbers are wrong, for a cause that nobody has thought of.
@wrong("load_row_kernel")
@triton.jit
def load_row_noisy(x_ptr, out_ptr, x_stride, num_cols, TILE: tl.constexpr):
    row, col = tl.program_id(0), tl.arange(0, TILE)
    x = tl.load(x_ptr + row * x_stride + col, mask=col < num_cols, other=0.0)
    tl.store(out_ptr + row * TILE + col, x * 1.01)


# gather_kernel


@right("gather_kernel")
@triton.jit
def gather_in_one_address(
    cache_ptr, block_table_ptr, out_ptr, block_size, num_numbers, TILE: tl.constexpr
):
    p = tl.program_id(0)
    i = tl.arange(0, TILE)
    is_number = i < num_numbers
    block = tl.load(block_table_ptr + p // block_size)
    at = (block * block_size + p % block_size) * num_numbers + i
    row = tl.load(cache_ptr + at, mask=is_number, other=0.0)
    tl.store(out_ptr + p * num_numbers + i, row, mask=is_number)


@right("gather_kernel")
@triton.jit
def gather_in_a_loop(
    cache_ptr, block_table_ptr, out_ptr, block_size, num_numbers, TILE: tl.constexpr
):
    position = tl.program_id(0)
    nth = position // block_size
    block_id = tl.load(block_table_ptr + nth).to(tl.int64)
    source = cache_ptr + block_id * block_size * num_numbers
    source += (position - nth * block_size) * num_numbers
    for start in range(0, num_numbers, 16):
        i = start + tl.arange(0, 16)
        x = tl.load(source + i, mask=i < num_numbers)
        tl.store(out_ptr + position * num_numbers + i, x, mask=i < num_numbers)


@wrong("gather_kernel", says="Look up the block in the table")
@triton.jit
def gather_without_the_table(
    cache_ptr, block_table_ptr, out_ptr, block_size, num_numbers, TILE: tl.constexpr
):
    p, i = tl.program_id(0), tl.arange(0, TILE)
    row = tl.load(cache_ptr + p * num_numbers + i, mask=i < num_numbers)
    tl.store(out_ptr + p * num_numbers + i, row, mask=i < num_numbers)


@wrong("gather_kernel", says="position % block_size")
@triton.jit
def gather_first_places(
    cache_ptr, block_table_ptr, out_ptr, block_size, num_numbers, TILE: tl.constexpr
):
    p, i = tl.program_id(0), tl.arange(0, TILE)
    slot = tl.load(block_table_ptr + p // block_size) * block_size
    row = tl.load(cache_ptr + slot * num_numbers + i, mask=i < num_numbers)
    tl.store(out_ptr + p * num_numbers + i, row, mask=i < num_numbers)


@wrong("gather_kernel")
@triton.jit
def gather_by_position(
    cache_ptr, block_table_ptr, out_ptr, block_size, num_numbers, TILE: tl.constexpr
):
    p, i = tl.program_id(0), tl.arange(0, TILE)
    slot = tl.load(block_table_ptr + p) * block_size + p % block_size
    row = tl.load(cache_ptr + slot * num_numbers + i, mask=i < num_numbers)
    tl.store(out_ptr + p * num_numbers + i, row, mask=i < num_numbers)


@wrong("gather_kernel", says="not this request's")
@triton.jit
def gather_one_number_a_token(
    cache_ptr, block_table_ptr, out_ptr, block_size, num_numbers, TILE: tl.constexpr
):
    p = tl.program_id(0)
    slot = tl.load(block_table_ptr + p // block_size) * block_size + p % block_size
    tl.store(out_ptr + p * num_numbers, tl.load(cache_ptr + slot * num_numbers))


@wrong("gather_kernel", says="keep it int64")
@triton.jit
def gather_in_32_bits(
    cache_ptr, block_table_ptr, out_ptr, block_size, num_numbers, TILE: tl.constexpr
):
    p, i = tl.program_id(0), tl.arange(0, TILE)
    block_id = tl.load(block_table_ptr + p // block_size).to(tl.int32)
    slot = block_id * block_size + p % block_size
    row = tl.load(cache_ptr + slot * num_numbers + i, mask=i < num_numbers)
    tl.store(out_ptr + p * num_numbers + i, row, mask=i < num_numbers)


@wrong("gather_kernel", says="Read each number once")
@triton.jit
def gather_twice(
    cache_ptr, block_table_ptr, out_ptr, block_size, num_numbers, TILE: tl.constexpr
):
    p, i = tl.program_id(0), tl.arange(0, TILE)
    slot = tl.load(block_table_ptr + p // block_size) * block_size + p % block_size
    row = tl.load(cache_ptr + slot * num_numbers + i, mask=i < num_numbers)
    row += 0 * tl.load(cache_ptr + slot * num_numbers + i, mask=i < num_numbers)
    tl.store(out_ptr + p * num_numbers + i, row, mask=i < num_numbers)


@wrong("gather_kernel")
@triton.jit
def gather_noisy(
    cache_ptr, block_table_ptr, out_ptr, block_size, num_numbers, TILE: tl.constexpr
):
    p, i = tl.program_id(0), tl.arange(0, TILE)
    slot = tl.load(block_table_ptr + p // block_size) * block_size + p % block_size
    row = tl.load(cache_ptr + slot * num_numbers + i, mask=i < num_numbers)
    tl.store(out_ptr + p * num_numbers + i, row * 1.01, mask=i < num_numbers)


# paged_decode_kernel


def changed(name, title, *changes):
    """The library's kernel, with some of its text replaced; its title is in its name."""
    is_copy = hasattr(paged_kv_cache_triton, name)
    module = paged_kv_cache_triton if is_copy else paged_attention_triton
    kernel = vars(module)[name]
    source = inspect.getsource(getattr(kernel, "fn", kernel))
    for old, new in changes:
        assert old in source, f"{title}: the kernel has no {old}"
        source = source.replace(old, new)
    new_name = re.sub(r"\W+", "_", f"{name} {title}")
    source = source.replace(f"def {name}(", f"def {new_name}(")
    namespace = dict(vars(module))
    exec(compile(source, register(f"<{name}: {title}>", source), "exec"), namespace)
    return namespace[new_name]


NO_ADDRESS = "begin with a pointer, and add the offsets to it"
X_AT = "x_ptr + row * x_stride + col"
X_LOADED = f"x = tl.load({X_AT}, mask=col < num_cols, other=0.0)"
X_STORED = "tl.store(out_ptr + row * TILE + col, x)"
for title, says, *changes in (
    ("no pointer", NO_ADDRESS, (X_AT, "row * x_stride + col")),
    ("a store without a pointer", NO_ADDRESS, ("out_ptr + row * TILE", "row * TILE")),
    ("not loaded", "tl.load gives the number", (X_LOADED, f"x = {X_AT}")),
    (
        "an index",
        "A pointer is no tensor",
        (X_LOADED, "x = x_ptr[row * x_stride + col]"),
    ),
    ("assigned", "A pointer is no tensor", (X_STORED, "out_ptr[row * TILE + col] = x")),
    ("all of it to one address", "for many numbers", ("row * TILE + col", "row * TILE")),
    (
        "as many as there are columns",
        "a constant, as TILE, is",
        ("tl.arange(0, TILE)", "tl.arange(0, num_cols)"),
    ),
    ("a range", "range one by one", ("tl.arange(0, TILE)", "range(TILE)")),
    (
        "other first",
        "mask, then other",
        ("mask=col < num_cols, other=0.0", "0.0, col < num_cols"),
    ),
    (
        "torch",
        "no torch",
        (X_LOADED, f"x = torch.where(col < num_cols, tl.load({X_AT}), 0)"),
    ),
    (
        "an if",
        "if and Python's max look at one number",
        (X_LOADED, X_LOADED + "\n    if col < num_cols:\n        pass"),
    ),
    (
        "rows of out as those of x",
        "the rows lie TILE numbers apart",
        ("out_ptr + row * TILE", "out_ptr + row * x_stride"),
    ),
    (
        "no mask",
        "no more: what follows is somebody else's",
        (X_LOADED, f"x = tl.load({X_AT})\n    x = tl.where(col < num_cols, x, 0.0)"),
    ),
    ("no other", "what a mask keeps out is `other`", (", other=0.0", "")),
    ("store twice", "Store TILE numbers, once", ("    # store", STORE + "    # store")),
):
    wrong("load_row_kernel", says)(changed("load_row_kernel", title, *changes))

BLOCK_ID = "tl.load(block_table_ptr + position // block_size).to(tl.int64)"
for title, says, *changes in (
    ("not loaded", "tl.load gives the number", (BLOCK_ID, BLOCK_ID[8:].split(")")[0])),
    (
        "a fraction",
        "// divides to one",
        ("position // block_size", "position / block_size"),
    ),
    ("no pointer", NO_ADDRESS, ("block_table_ptr + position", "position")),
    ("torch's dtype", "Triton has dtypes of its own", ("tl.int64", "torch.int64")),
    ("long", "are not torch's", (".to(tl.int64)", ".long()")),
    ("id and place", "begins at slot", ("block_id * block_size +", "block_id +")),
    (
        "position in the block",
        "not position",
        ("block_size + position % block_size", "block_size + position"),
    ),
    ("one place too late", "not this request's", ("position %", "(position + 1) %")),
):
    wrong("gather_kernel", says)(changed("gather_kernel", title, *changes))

NEGATIVE_INF = 'float("-inf")'
for title, says, *changes in (
    (
        "no table",
        "The block of position p",
        (
            "block_id = tl.load(block_tables_ptr + table_at, mask=is_token, other=0)",
            "block_id = (position // BLOCK_SIZE)",
        ),
    ),
    ("no place", "", ("place = (position % BLOCK_SIZE)", "place = (position * 0)")),
    (
        "an unmasked table",
        "under the mask is_token",
        (
            "tl.load(block_tables_ptr + table_at, mask=is_token, other=0)",
            "tl.load(block_tables_ptr + table_at)",
        ),
    ),
    ("table without its stride", "", ("b * table_stride_b + ", "")),
    (
        "k unmasked",
        "under the mask is_there",
        (
            "k_at[:, None] + col[None, :], mask=is_there",
            "k_at[:, None] + col[None, :], mask=is_col[None, :]",
        ),
    ),
    (
        "v unmasked",
        "0 times NaN is NaN",
        (
            "v_at[:, None] + col[None, :], mask=is_there",
            "v_at[:, None] + col[None, :], mask=is_col[None, :]",
        ),
    ),
    (
        "no other for k",
        "got nan",
        (
            "k_at[:, None] + col[None, :], mask=is_there, other=0.0",
            "k_at[:, None] + col[None, :], mask=is_there",
        ),
    ),
    (
        "no other for v",
        "0 times NaN is NaN",
        (
            "v_at[:, None] + col[None, :], mask=is_there, other=0.0",
            "v_at[:, None] + col[None, :], mask=is_there",
        ),
    ),
    (
        "scores unmasked",
        "scores there are -inf",
        ("tl.where(is_token[None, :], scores, " + NEGATIVE_INF + ")", "scores"),
    ),
    (
        "masked scores of -100",
        "masked scores are -inf",
        ("scores, " + NEGATIVE_INF, "scores, -100.0"),
    ),
    (
        "row_max begins at 0",
        "row_max begins with it",
        (
            "tl.full([ROWS], " + NEGATIVE_INF + ", tl.float32)",
            "tl.zeros([ROWS], tl.float32)",
        ),
    ),
    (
        "one maximum for all heads",
        "row_max of its own",
        ("tl.max(scores, axis=1)", "tl.max(scores)"),
    ),
    (
        "no rescale",
        "rescale both",
        ("acc * rescale[:, None]", "acc"),
        ("row_sum * rescale", "row_sum"),
    ),
    ("sum not rescaled", "row_sum is not. ", ("row_sum * rescale", "row_sum")),
    ("acc not rescaled", "acc is not. ", ("acc * rescale[:, None]", "acc")),
    (
        "rescaled the wrong way round",
        "the wrong way round: exp(old - new)",
        ("tl.exp2(row_max - new_max)", "tl.exp2(new_max - row_max)"),
    ),
    (
        "the old maximum",
        "row_max is still the old one",
        ("scores - new_max[:, None]", "scores - row_max[:, None]"),
    ),
    ("row_max stays", "row_max has to follow", ("        row_max = new_max\n", "")),
    (
        "the last maximum",
        "row_max never falls",
        ("tl.maximum(row_max, tl.max(scores, axis=1))", "tl.max(scores, axis=1)"),
    ),
    ("no scale", "multiplied by scale_log2_e", (" * scale_log2_e", "")),
    ("its own scale", "", ("* scale_log2_e", "* 0.25 * 1.4426950408889634")),
    ("exp", "With exp2, not exp", ("tl.exp2(", "tl.exp(")),
    ("one head of keys", "", (" + g * k_stride_g", "")),
    (
        "strides of k for v",
        "their own addresses",
        (
            "v_at = block_id * v_stride_block + place * v_stride_place + g * v_stride_g",
            "v_at = k_at",
        ),
    ),
    ("another logsumexp", "divide by LOG2_E", (" / LOG2_E", "")),
    ("not divided", "acc is divided by row_sum", ("(acc / divisor[:, None])", "acc")),
    (
        "every share reads all",
        "",
        ("start = split * split_tokens", "start = split * 0"),
        ("tl.minimum(start + split_tokens, seq_len)", "seq_len"),
    ),
    ("stores unmasked", "", ("out, mask=is_head[:, None] & is_col[None, :])", "out)")),
    (
        "ids of 32 bits",
        "block_id and place have to be int64",
        ("block_id = block_id.to(tl.int64)", "block_id = block_id.to(tl.int32)"),
    ),
    (
        "places of 32 bits",
        "block_id and place have to be int64",
        ("place = (position % BLOCK_SIZE).to(tl.int64)", "place = position % BLOCK_SIZE"),
    ),
    (
        "scores in half precision",
        "",
        (
            'tl.dot(q, tl.trans(k), input_precision="ieee")',
            "tl.dot(q.to(tl.float16), tl.trans(k).to(tl.float16)).to(tl.float32)",
        ),
    ),
    (
        "values cast to the weights' dtype",
        "cast the weights to the values' dtype, not the values",
        ("tl.dot(weights.to(v.dtype), v,", "tl.dot(weights, v.to(tl.float32),"),
    ),
    (
        "queries and keys cast to fp32",
        "nor queries and keys",
        (
            "tl.dot(q, tl.trans(k),",
            "tl.dot(q.to(tl.float32), tl.trans(k).to(tl.float32),",
        ),
    ),
    ("offsets alone", NO_ADDRESS, ("k_cache_ptr + k_at[:, None]", "k_at[:, None]")),
    (
        "no column",
        "x[:, None] is a column",
        ("k_cache_ptr + k_at[:, None]", "k_cache_ptr + k_at"),
    ),
    ("keys not transposed", "tl.trans(k)", ("tl.trans(k)", "k")),
    (
        "weights not cast",
        "cast weights as the values",
        ("weights.to(v.dtype)", "weights"),
    ),
    (
        "a max of two",
        "reduce one tensor",
        ("tl.max(scores, axis=1)", "tl.max(row_max, 1)"),
    ),
    ("acc rescaled by columns", "rescale[:, None]", ("rescale[:, None]", "rescale")),
    ("values from keys", "Values come from", ("load(v_cache_ptr", "load(k_cache_ptr")),
    (
        "the mask the other way round",
        "",
        ("scores, " + NEGATIVE_INF, NEGATIVE_INF + ", scores"),
    ),
    ("tile_start", "for many numbers", ("+ position // BLOCK", "+ tile_start // BLOCK")),
    (
        "rescaled by exp, weighed by exp2",
        "",
        ("rescale = tl.exp2(", "rescale = tl.exp("),
    ),
    ("noisy", "", ("(acc / divisor[:, None])", "(1.01 * acc / divisor[:, None])")),
    ("fp32 rounded", "fp32 is rounded", (', input_precision="ieee"', "")),
):
    wrong("paged_decode_kernel", says)(changed("paged_decode_kernel", title, *changes))


@right("paged_decode_kernel")
@triton.jit
def decode_with_transposed_keys(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_tables_ptr,
    seq_lens_ptr,
    out_ptr,
    logsumexp_ptr,
    scale_log2_e,
    split_tokens,
    q_stride_b,
    q_stride_h,
    k_stride_block,
    k_stride_place,
    k_stride_g,
    v_stride_block,
    v_stride_place,
    v_stride_g,
    table_stride_b,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    request, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    r, d, t = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, TILE)
    heads = kv_head * GROUP_SIZE + r
    is_real = (r < GROUP_SIZE)[:, None] & (d < HEAD_DIM)[None, :]
    S = tl.load(seq_lens_ptr + request)
    first, last = part * split_tokens, tl.minimum((part + 1) * split_tokens, S)
    if first >= tl.maximum(S, 1):
        return
    q = tl.load(
        q_ptr + request * q_stride_b + heads[:, None] * q_stride_h + d[None, :],
        mask=is_real,
        other=0.0,
    )
    # The scale goes into the queries.
    q = (q.to(tl.float32) * scale_log2_e).to(tl.float32 if UPCAST else q.dtype)
    m = tl.full([ROWS], -1e30, tl.float32)
    s = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for begin in range(first, last, TILE):
        at = begin + t
        ok = at < last
        block = tl.load(
            block_tables_ptr + request * table_stride_b + at // BLOCK_SIZE, ok, 0
        )
        block = block.to(tl.int64)
        inside = (at - at // BLOCK_SIZE * BLOCK_SIZE).to(tl.int64)
        k = tl.load(
            k_cache_ptr
            + (block * k_stride_block + inside * k_stride_place)[None, :]
            + kv_head * k_stride_g
            + d[:, None],
            mask=ok[None, :] & (d < HEAD_DIM)[:, None],
            other=0.0,
        ).to(q.dtype)
        v = tl.load(
            v_cache_ptr
            + (block * v_stride_block + inside * v_stride_place)[:, None]
            + kv_head * v_stride_g
            + d[None, :],
            mask=ok[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        ).to(q.dtype)
        scores = tl.dot(q, k, input_precision="ieee")
        scores += tl.where(ok, 0.0, float("-inf"))[None, :]
        old, m = m, tl.maximum(m, tl.max(scores, 1))
        p = tl.exp2(scores - m[:, None])
        shrink = tl.exp2(old - m)
        acc *= shrink[:, None]
        acc += tl.dot(p.to(q.dtype), v, input_precision="ieee")
        s = s * shrink + tl.sum(p, 1)
    is_empty = s == 0.0
    total = tl.where(is_empty, 1.0, s)
    H, num_parts = tl.num_programs(1) * GROUP_SIZE, tl.num_programs(2)
    where = (request * H + heads) * num_parts + part
    lse = tl.where(is_empty, float("-inf"), m / LOG2_E + tl.log(total))
    tl.store(logsumexp_ptr + where, lse, mask=r < GROUP_SIZE)
    out = acc / total[:, None]
    out_at = out_ptr + where[:, None] * HEAD_DIM + d[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=is_real)


@triton.jit
def look_up(block_tables_ptr, position, is_token, SIZE: tl.constexpr):
    block_id = tl.load(block_tables_ptr + position // SIZE, mask=is_token, other=0)
    return block_id.to(tl.int64), (position % SIZE).to(tl.int64)


@right("paged_decode_kernel")
@triton.jit
def decode_with_a_helper_and_every_third_tile(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_tables_ptr,
    seq_lens_ptr,
    out_ptr,
    logsumexp_ptr,
    scale_log2_e,
    split_tokens,
    q_stride_b,
    q_stride_h,
    k_stride_block,
    k_stride_place,
    k_stride_g,
    v_stride_block,
    v_stride_place,
    v_stride_g,
    table_stride_b,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Splits take turns: tile i belongs to split i % num_used.
    b, g, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    is_head, is_col = row < GROUP_SIZE, col < HEAD_DIM
    h = g * GROUP_SIZE + row
    seq_len = tl.load(seq_lens_ptr + b)
    num_used = tl.maximum(tl.cdiv(seq_len, split_tokens), 1)
    if split >= num_used:
        return
    q_at = q_ptr + b * q_stride_b + h[:, None] * q_stride_h + col[None, :]
    q = tl.load(q_at, mask=is_head[:, None] & is_col[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for tile_start in range(split * TILE, seq_len, num_used * TILE):
        position = tile_start + tl.arange(0, TILE)
        is_token = position < seq_len
        block_id, place = look_up(
            block_tables_ptr + b * table_stride_b, position, is_token, BLOCK_SIZE
        )
        is_there = is_token[:, None] & is_col[None, :]
        k_at = block_id * k_stride_block + place * k_stride_place + g * k_stride_g
        v_at = block_id * v_stride_block + place * v_stride_place + g * v_stride_g
        k = tl.load(k_cache_ptr + k_at[:, None] + col[None, :], mask=is_there, other=0.0)
        scores = tl.dot(q, tl.trans(k).to(q.dtype), input_precision="ieee")
        scores = tl.where(is_token[None, :], scores * scale_log2_e, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_max = new_max
        row_sum = tl.sum(weights, axis=1) + row_sum * rescale
        v = tl.load(v_cache_ptr + v_at[:, None] + col[None, :], mask=is_there, other=0.0)
        v = v.to(q.dtype)
        acc *= rescale[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    divisor = tl.maximum(row_sum, 1e-30)
    at = (b * tl.num_programs(1) * GROUP_SIZE + h) * tl.num_programs(2) + split
    logsumexp = row_max * 0.6931471805599453 + tl.log(divisor)
    tl.store(logsumexp_ptr + at, logsumexp, mask=is_head)
    out = (acc / divisor[:, None]).to(out_ptr.dtype.element_ty)
    out_at = out_ptr + at[:, None] * HEAD_DIM + col[None, :]
    tl.store(out_at, out, mask=is_head[:, None] & is_col[None, :])


# paged_prefill_kernel

TOKEN, HEAD = "first + row // GROUP_SIZE", "g * GROUP_SIZE + row % GROUP_SIZE"
IS_ROW = "(row < QUERIES * GROUP_SIZE) & (t < query_len)"
POSITION = "query_position = seq_len - query_len + t"
END = "tl.minimum(first + QUERIES, query_len)"
WHOLE_END = f"seq_len - query_len + {END}"
SEEN = "position[None, :] <= query_position[:, None]"
for title, says, *changes in (
    (
        "mask from the first key",
        "The new tokens are the last of the text",
        (POSITION, "query_position = t"),
    ),
    (
        "positions in the tile",
        "The new tokens are the last of the text",
        (POSITION, "query_position = row // GROUP_SIZE"),
    ),
    ("mask off by one", "A query sees its own key too", (SEEN, SEEN.replace("<=", "<"))),
    (
        "one position too far",
        "does not see the key behind its own",
        (POSITION, f"{POSITION} + 1"),
    ),
    (
        "no mask",
        "Scores of keys that a query does not see are -inf",
        ('tl.where(is_seen, scores, float("-inf"))', "scores"),
    ),
    ("mask of decoding", "a mask of its own", (SEEN, "is_token[None, :]")),
    (
        "the last position for all",
        "a mask of its own",
        (POSITION, "query_position = seq_len - 1 + 0 * t"),
    ),
    (
        "the mask the other way round",
        "not those behind it",
        (SEEN, SEEN.replace("<=", ">=")),
    ),
    (
        "tokens and heads swapped",
        "heads of a token are neighbours",
        (TOKEN, "first + row % GROUP_SIZE"),
        (HEAD, "g * GROUP_SIZE + row // GROUP_SIZE"),
    ),
    (
        "tokens by turns",
        "heads of a token are neighbours",
        (TOKEN, "first + row % GROUP_SIZE"),
    ),
    (
        "heads in turn",
        "heads of a token are neighbours",
        (HEAD, "g * GROUP_SIZE + row // GROUP_SIZE"),
    ),
    ("t without first", "a tile begins at first", (TOKEN, "row // GROUP_SIZE")),
    (
        "h without g",
        "Of KV head g the query heads are",
        (HEAD, "row % GROUP_SIZE + 0 * g"),
    ),
    (
        "h by turns",
        "Of KV head g the query heads are",
        (HEAD, "g + tl.num_programs(0) * (row % GROUP_SIZE)"),
    ),
    (
        "any row",
        "ROWS may be more than QUERIES * GROUP_SIZE",
        (IS_ROW, "t < query_len"),
    ),
    (
        "any token",
        "a row is there where t < query_len",
        (IS_ROW, "row < QUERIES * GROUP_SIZE"),
    ),
    (
        "rows of decoding",
        "",
        (IS_ROW, "row < GROUP_SIZE"),
    ),
    ("end without the minimum", "ends where the request ends", (END, "first + QUERIES")),
    ("end at seq_len", "seen by nobody", (WHOLE_END, "seq_len")),
    ("end without cached", "a position in the text", (WHOLE_END, END)),
    (
        "end without first",
        "QUERIES tokens behind first",
        (END, END.replace("first + ", "")),
    ),
    (
        "end at the last position",
        "end is one more than the position",
        (END, f"{END} - 1"),
    ),
    ("no scale", "multiplied by scale_log2_e", (" * scale_log2_e", "")),
    ("its own scale", "", ("* scale_log2_e", "* 0.25 * 1.4426950408889634")),
    ("heads of 32 bits", "h has to be int64", (HEAD, f"({HEAD}).to(tl.int32)")),
    (
        "keys not transposed",
        "tl.dot takes (ROWS, COLS) and (COLS, TILE)",
        ("tl.trans(k)", "k"),
    ),
    (
        "a mask of one dimension",
        "x[:, None] is a column",
        (SEEN, "position <= query_position"),
    ),
    (
        "queries and keys cast to fp32",
        "nor queries and keys",
        (
            "tl.dot(q, tl.trans(k),",
            "tl.dot(q.to(tl.float32), tl.trans(k).to(tl.float32),",
        ),
    ),
    (
        "fp32 rounded",
        "fp32 is rounded",
        (
            'scores = tl.dot(q, tl.trans(k), input_precision="ieee")',
            "scores = tl.dot(q, tl.trans(k))",
        ),
    ),
    # Its numbers are wrong, for a cause that nobody has thought of.
    ("noisy", "", ("(acc / row_sum[:, None])", "(1.01 * acc / row_sum[:, None])")),
):
    wrong("paged_prefill_kernel", says)(changed("paged_prefill_kernel", title, *changes))

for title, *changes in (
    (
        "with queries scaled and the future hidden",
        (" * scale_log2_e", ""),
        ("    row_sum = tl", "    q = (q * scale_log2_e).to(q.dtype)\n    row_sum = tl"),
        (SEEN, "position[None, :] > query_position[:, None]"),
        ('is_seen, scores, float("-inf")', 'is_seen, float("-inf"), scores'),
    ),
    (
        "with the last row's position",
        (TOKEN, "first + row // GROUP_SIZE"),
        (IS_ROW, "(row // GROUP_SIZE < QUERIES) & (t < query_len)"),
        (WHOLE_END, "tl.max(tl.where(is_row, query_position, -1), axis=0) + 1"),
    ),
):
    right("paged_prefill_kernel")(changed("paged_prefill_kernel", title, *changes))


@triton.jit
def find_tile(query_lens_ptr, num_requests, program, QUERIES: tl.constexpr):
    # Request after request: which one has the tile, its first row of q, tiles before it.
    b, start, before = 0, 0, 0
    for i in range(num_requests):
        count = tl.load(query_lens_ptr + i)
        is_behind = before + tl.cdiv(count, QUERIES) <= program
        is_behind = is_behind & (b == i)
        b += is_behind.to(tl.int32)
        start += tl.where(is_behind, count, 0)
        before += tl.where(is_behind, tl.cdiv(count, QUERIES), 0)
    return b, start, before


@right("paged_prefill_kernel")
@triton.jit
def prefill_with_a_helper_and_transposed_keys(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_tables_ptr,
    seq_lens_ptr,
    query_lens_ptr,
    out_ptr,
    logsumexp_ptr,
    scale_log2_e,
    num_requests,
    q_stride_n,
    q_stride_h,
    k_stride_block,
    k_stride_place,
    k_stride_g,
    v_stride_block,
    v_stride_place,
    v_stride_g,
    table_stride_b,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    REQUESTS: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    kv_head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, start, before = find_tile(query_lens_ptr, num_requests, tile, QUERIES)
    if b == num_requests:
        return
    row, d, i = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, TILE)
    S, T = tl.load(seq_lens_ptr + b), tl.load(query_lens_ptr + b)
    in_tile = row // GROUP_SIZE
    t = (tile - before) * QUERIES + in_tile
    is_there = in_tile < tl.minimum(T - (tile - before) * QUERIES, QUERIES)
    can_see = tl.where(is_there, S - T + t + 1, 0)  # so many keys
    end = tl.max(can_see, axis=0)
    head = kv_head * GROUP_SIZE + row - in_tile * GROUP_SIZE
    n = (start + t).to(tl.int64)
    is_number = is_there[:, None] & (d < HEAD_DIM)[None, :]
    q_at = q_ptr + (n * q_stride_n + head * q_stride_h)[:, None] + d[None, :]
    q = tl.load(q_at, mask=is_number, other=0.0)
    q = q.to(tl.float32) if UPCAST else q
    m = tl.full([ROWS], -1e30, tl.float32)
    s = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for begin in range(0, end, TILE):
        p = begin + i
        ok = p < end
        at = block_tables_ptr + b * table_stride_b.to(tl.int64) + p // BLOCK_SIZE
        block = tl.load(at, mask=ok, other=0).to(tl.int64)
        place = (p % BLOCK_SIZE).to(tl.int64)
        is_key = ok[None, :] & (d < HEAD_DIM)[:, None]
        k_at = block * k_stride_block + place * k_stride_place + kv_head * k_stride_g
        v_at = block * v_stride_block + place * v_stride_place + kv_head * v_stride_g
        k = tl.load(k_cache_ptr + k_at[None, :] + d[:, None], mask=is_key, other=0.0)
        v = tl.load(v_cache_ptr + v_at[None, :] + d[:, None], mask=is_key, other=0.0)
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale_log2_e
        hidden = tl.where(p[None, :] < can_see[:, None], 0.0, float("-inf"))
        scores += hidden
        old, m = m, tl.maximum(m, tl.max(scores, 1))
        weights = tl.exp2(scores - m[:, None])
        s = s * tl.exp2(old - m) + tl.sum(weights, 1)
        acc = acc * tl.exp2(old - m)[:, None]
        v = tl.trans(v).to(q.dtype)
        acc += tl.dot(weights.to(q.dtype), v, input_precision="ieee")
    at = n * tl.num_programs(0) * GROUP_SIZE + head
    s = tl.where(is_there, s, 1.0)
    tl.store(logsumexp_ptr + at, m / LOG2_E + tl.log(s), mask=is_there)
    out = (acc / s[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at[:, None] * HEAD_DIM + d[None, :], out, mask=is_number)


# merge_splits


@right("merge_splits")
def merge_splits_by_hand(outs, logsumexps):
    largest = logsumexps.max(dim=-1).values
    safe = torch.where(largest == -math.inf, 0, largest)
    weights = torch.exp(logsumexps - safe[..., None])
    total = weights.sum(-1)
    out = (weights[..., None] * outs).sum(-2) / torch.where(total > 0, total, 1)[
        ..., None
    ]
    return out, safe + total.log()


@right("merge_splits")
def merge_splits_one_by_one(outs, logsumexps):
    out = torch.zeros_like(outs[:, :, 0])
    total = torch.full_like(logsumexps[:, :, 0], -math.inf)
    for p in range(outs.shape[2]):
        new = torch.logaddexp(total, logsumexps[:, :, p])
        safe = new.masked_fill(new == -math.inf, 0)
        old_share, share = (x.sub(safe).exp() for x in (total, logsumexps[:, :, p]))
        out = old_share[..., None] * out + share[..., None] * outs[:, :, p]
        total = new
    return out, total


@wrong("merge_splits", says="Parts do not weigh the same")
def merge_splits_by_mean(outs, logsumexps):
    return outs.mean(dim=2), logsumexps.logsumexp(dim=-1)


@wrong("merge_splits", says="subtract the largest logsumexp first")
def merge_splits_without_a_maximum(outs, logsumexps):
    weights = logsumexps.exp()
    total = weights.sum(-1, keepdim=True)
    tiny = torch.finfo(outs.dtype).tiny
    out = (weights.unsqueeze(-2) @ outs).squeeze(-2) / total.clamp(min=tiny)
    return out, total.squeeze(-1).log()


@wrong("merge_splits", says="-inf minus -inf is NaN")
def merge_splits_of_nothing_is_nan(outs, logsumexps):
    weights = logsumexps.softmax(dim=-1)
    return (weights.unsqueeze(-2) @ outs).squeeze(-2), logsumexps.logsumexp(dim=-1)


@wrong("merge_splits", says="a largest logsumexp of its own")
def merge_splits_with_one_maximum(outs, logsumexps):
    weights = (logsumexps - logsumexps.max()).exp()
    total = weights.sum(-1, keepdim=True)
    tiny = torch.finfo(outs.dtype).tiny
    out = (weights.unsqueeze(-2) @ outs).squeeze(-2) / total.clamp(min=tiny)
    return out, total.squeeze(-1).log() + logsumexps.max()


@wrong("merge_splits", says="A part's weight is exp(logsumexp)")
def merge_splits_weighed_by_logsumexp(outs, logsumexps):
    share = logsumexps / logsumexps.sum(-1, keepdim=True)
    return (share.unsqueeze(-2) @ outs).squeeze(-2), logsumexps.logsumexp(dim=-1)


@wrong("merge_splits", says="not the heaviest only")
def merge_splits_takes_the_heaviest(outs, logsumexps):
    at = logsumexps.argmax(dim=-1)[..., None, None].expand(-1, -1, 1, outs.shape[-1])
    return outs.gather(2, at).squeeze(2), logsumexps.logsumexp(dim=-1)


@wrong("merge_splits", says="that of the parts' logsumexps")
def merge_splits_adds_logsumexps(outs, logsumexps):
    weights = logsumexps.softmax(dim=-1).nan_to_num(0)
    return (weights.unsqueeze(-2) @ outs).squeeze(-2), logsumexps.sum(dim=-1)


@wrong("merge_splits", says="if empty it is -inf")
def merge_splits_taking_a_logsumexp_of_zero_for_empty(outs, logsumexps):
    logsumexps = logsumexps.masked_fill(logsumexps == 0, -math.inf)
    weights = logsumexps.softmax(dim=-1).nan_to_num(0)
    return (weights.unsqueeze(-2) @ outs).squeeze(-2), logsumexps.logsumexp(dim=-1)


@wrong("merge_splits", says="if empty it is -inf")
def merge_splits_taking_a_sum_of_one_for_empty(outs, logsumexps):
    logsumexp = logsumexps.logsumexp(dim=-1)
    weights = logsumexps.softmax(dim=-1).nan_to_num(0)
    weights = weights.masked_fill((logsumexp == 0).unsqueeze(-1), 0)
    return (weights.unsqueeze(-2) @ outs).squeeze(-2), logsumexp


@wrong("merge_splits", says="weights are (B, H, 1, P)")
def merge_splits_with_a_column_of_weights(outs, logsumexps):
    weights = logsumexps.softmax(dim=-1)
    return (weights.unsqueeze(-1) @ outs).squeeze(-2), logsumexps.logsumexp(dim=-1)


@wrong("merge_splits", says="subtract the largest logsumexp first")
def merge_splits_with_an_infinite_sum(outs, logsumexps):
    weights = logsumexps.softmax(dim=-1).nan_to_num(0)
    out = (weights.unsqueeze(-2) @ outs).squeeze(-2)
    return out, logsumexps.exp().sum(-1).log()


@wrong("merge_splits", says="exp, not exp2")
def merge_splits_with_exp2(outs, logsumexps):
    weights = (logsumexps * math.log(2)).softmax(dim=-1).nan_to_num(0)
    return (weights.unsqueeze(-2) @ outs).squeeze(-2), logsumexps.logsumexp(dim=-1)


# Its numbers are wrong, for a cause that nobody has thought of.
@wrong("merge_splits")
def merge_splits_noisy(outs, logsumexps):
    weights = logsumexps.softmax(dim=-1).nan_to_num(0) * 1.01
    return (weights.unsqueeze(-2) @ outs).squeeze(-2), logsumexps.logsumexp(dim=-1)


@wrong("merge_splits", says="Divide by the sum")
def merge_splits_not_divided(outs, logsumexps):
    largest = logsumexps.amax(-1, keepdim=True)
    weights = (logsumexps - largest.masked_fill(largest == -math.inf, 0)).exp()
    return (weights.unsqueeze(-2) @ outs).squeeze(-2), logsumexps.logsumexp(dim=-1)


@wrong("merge_splits", says="that of the parts' logsumexps")
def merge_splits_with_the_largest_logsumexp(outs, logsumexps):
    return merge_splits_by_hand(outs, logsumexps)[0], logsumexps.amax(-1)


@wrong("merge_splits", says="a request without keys")
def merge_splits_with_a_very_small_logsumexp(outs, logsumexps):
    return merge_splits_by_hand(outs, logsumexps.clamp(min=-1e4))


@wrong("merge_splits", says="expected shape")
def merge_splits_keeping_a_dimension(outs, logsumexps):
    out, logsumexp = merge_splits_by_hand(outs, logsumexps)
    return out, logsumexp.unsqueeze(-1)


# bytes_moved


@right("bytes_moved")
def bytes_moved_request_by_request(
    config, seq_lens, bytes_per_number=4, *, is_gathered=False
):
    D, total = config.d_model // config.num_heads, 0
    for seq_len in seq_lens.tolist():
        kv = seq_len * config.num_kv_heads * D * 2
        total += kv + 2 * config.num_heads * D
        if is_gathered:
            total += 2 * kv
    return total * bytes_per_number


@right("bytes_moved")
def bytes_moved_as_a_tensor(config, seq_lens, bytes_per_number=4, *, is_gathered=False):
    around = len(seq_lens) * config.d_model * 2
    kv = seq_lens.sum() * config.num_kv_heads * config.head_dim * 2
    return (around + kv * (1 + 2 * is_gathered)) * bytes_per_number


def moved(
    config, seq_lens, number, is_gathered, around=2, heads=None, kv=2, times=3, copies=0
):
    D, num_keys = config.head_dim, int(seq_lens.sum())
    queries = around * len(seq_lens) * config.num_heads * D
    keys = kv * num_keys * (heads or config.num_kv_heads) * D
    extra = copies * queries if is_gathered else 0
    return (queries + extra + (times if is_gathered else 1) * keys) * number


@wrong("bytes_moved", says="outputs written too")
def bytes_moved_keys_only(config, seq_lens, bytes_per_number=4, *, is_gathered=False):
    return moved(config, seq_lens, bytes_per_number, is_gathered, around=0)


@wrong("bytes_moved", says="The outputs are written too")
def bytes_moved_read_only(config, seq_lens, bytes_per_number=4, *, is_gathered=False):
    return moved(config, seq_lens, bytes_per_number, is_gathered, around=1)


@wrong("bytes_moved", says="read its keys once")
def bytes_moved_per_query_head(
    config, seq_lens, bytes_per_number=4, *, is_gathered=False
):
    H = config.num_heads
    return moved(config, seq_lens, bytes_per_number, is_gathered, heads=H)


@wrong("bytes_moved", says="a key and a value")
def bytes_moved_without_values(
    config, seq_lens, bytes_per_number=4, *, is_gathered=False
):
    return moved(config, seq_lens, bytes_per_number, is_gathered, kv=1)


@wrong("bytes_moved", says="read, written, and read again")
def bytes_moved_twice(config, seq_lens, bytes_per_number=4, *, is_gathered=False):
    return moved(config, seq_lens, bytes_per_number, is_gathered, times=2)


@wrong("bytes_moved", says="Queries and outputs are not copied")
def bytes_moved_copies_queries(
    config, seq_lens, bytes_per_number=4, *, is_gathered=False
):
    return moved(config, seq_lens, bytes_per_number, is_gathered, copies=2)


@wrong("bytes_moved", says="One layer is asked for")
def bytes_moved_in_all_layers(config, seq_lens, bytes_per_number=4, *, is_gathered=False):
    one = moved(config, seq_lens, bytes_per_number, is_gathered)
    return one * config.num_layers


@wrong("bytes_moved", says="numbers, not bytes")
def bytes_moved_in_numbers(config, seq_lens, bytes_per_number=4, *, is_gathered=False):
    return moved(config, seq_lens, 1, is_gathered)


@wrong("bytes_moved", says="count in Python's int, or in int64")
def bytes_moved_in_32_bits(config, seq_lens, bytes_per_number=4, *, is_gathered=False):
    one = moved(config, seq_lens, bytes_per_number, is_gathered)
    return torch.tensor(one).to(torch.int32)


@wrong("bytes_moved", says="keys of all requests")
def bytes_moved_of_the_longest(
    config, seq_lens, bytes_per_number=4, *, is_gathered=False
):
    around = moved(config, 0 * seq_lens, bytes_per_number, is_gathered)
    longest = seq_lens.max().view(1)
    without = moved(config, 0 * longest, bytes_per_number, is_gathered)
    return around - without + moved(config, longest, bytes_per_number, is_gathered)


@wrong("bytes_moved", says="lengths of their own")
def bytes_moved_with_padding(config, seq_lens, bytes_per_number=4, *, is_gathered=False):
    padded = seq_lens * 0 + seq_lens.max()
    return moved(config, padded, bytes_per_number, is_gathered)


@wrong("bytes_moved", says="for each request")
def bytes_moved_with_one_query(
    config, seq_lens, bytes_per_number=4, *, is_gathered=False
):
    around = moved(config, 0 * seq_lens, bytes_per_number, is_gathered)
    one = moved(config, seq_lens, bytes_per_number, is_gathered)
    return one - around + around // len(seq_lens)


@wrong("bytes_moved", says="read once, not three times")
def bytes_moved_always_gathered(
    config, seq_lens, bytes_per_number=4, *, is_gathered=False
):
    return moved(config, seq_lens, bytes_per_number, True)


@wrong("bytes_moved", says="bytes_per_number says")
def bytes_moved_of_four(config, seq_lens, bytes_per_number=4, *, is_gathered=False):
    return moved(config, seq_lens, 4, is_gathered)


@wrong("bytes_moved", says="D is config.head_dim")
def bytes_moved_with_d_model(config, seq_lens, bytes_per_number=4, *, is_gathered=False):
    return moved(config, seq_lens, bytes_per_number, is_gathered) * config.num_heads


@wrong("bytes_moved", says="of all requests together")
def bytes_moved_per_request(config, seq_lens, bytes_per_number=4, *, is_gathered=False):
    keys = seq_lens * config.num_kv_heads + config.num_heads
    return 2 * config.head_dim * keys * bytes_per_number


@wrong("bytes_moved")
def bytes_moved_and_the_table(config, seq_lens, bytes_per_number=4, *, is_gathered=False):
    one = moved(config, seq_lens, bytes_per_number, is_gathered)
    return one + 4 * int(seq_lens.sum())


@wrong("bytes_moved", says="give an int")
def bytes_moved_as_a_float(config, seq_lens, bytes_per_number=4, *, is_gathered=False):
    return moved(config, seq_lens, bytes_per_number, is_gathered) / 1


@wrong("bytes_moved", says="has a query and an output too")
def bytes_moved_of_those_with_keys(
    config, seq_lens, bytes_per_number=4, *, is_gathered=False
):
    seq_lens = seq_lens[seq_lens > 0]
    return bytes_moved_request_by_request(
        config, seq_lens, bytes_per_number, is_gathered=is_gathered
    )
