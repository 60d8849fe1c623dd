import math

import numpy as np
import torch

from answers import right, wrong
from lib import generate, kv_cache, sampling
from lib.generate import forward_cached

# kv_cache_bytes


@right("kv_cache_bytes")
def layer_by_layer(config, num_tokens, bytes_per_number=4):
    total = 0
    for _ in range(config.num_layers):
        keys = num_tokens * config.num_kv_heads * config.head_dim
        total += 2 * keys * bytes_per_number
    return total


@right("kv_cache_bytes")
def from_a_cache(config, num_tokens, bytes_per_number=4):
    dtype = {1: torch.int8, 2: torch.float16, 4: torch.float32, 8: torch.float64}[
        bytes_per_number
    ]
    shape = config.num_layers, num_tokens, config.num_kv_heads, config.head_dim
    return 2 * torch.empty(shape, dtype=dtype, device="meta").nbytes


def numbers(config, num_tokens, heads):
    return 2 * config.num_layers * num_tokens * heads * config.head_dim


@wrong("kv_cache_bytes", says="a key and a value")
def keys_alone(config, num_tokens, bytes_per_number=4):
    return numbers(config, num_tokens, config.num_kv_heads) // 2 * bytes_per_number


@wrong("kv_cache_bytes", says="Only KV heads are stored")
def query_heads(config, num_tokens, bytes_per_number=4):
    return numbers(config, num_tokens, config.num_heads) * bytes_per_number


@wrong("kv_cache_bytes", says="not d_model")
def width_of_the_model(config, num_tokens, bytes_per_number=4):
    heads = config.num_kv_heads * config.num_heads
    return numbers(config, num_tokens, heads) * bytes_per_number


@wrong("kv_cache_bytes", says="Each layer")
def one_layer(config, num_tokens, bytes_per_number=4):
    total = numbers(config, num_tokens, config.num_kv_heads) * bytes_per_number
    return total // config.num_layers


@wrong("kv_cache_bytes", says="Each KV head")
def one_head(config, num_tokens, bytes_per_number=4):
    return numbers(config, num_tokens, 1) * bytes_per_number


@wrong("kv_cache_bytes", says="numbers, not bytes")
def not_in_bytes(config, num_tokens, bytes_per_number=4):
    return numbers(config, num_tokens, config.num_kv_heads)


@wrong("kv_cache_bytes", says="whatever the default is")
def always_four_bytes(config, num_tokens, bytes_per_number=4):
    return numbers(config, num_tokens, config.num_kv_heads) * 4


@wrong("kv_cache_bytes", says="not given it is 4")
def default_of_two(config, num_tokens, bytes_per_number=2):
    return layer_by_layer(config, num_tokens, bytes_per_number)


@wrong("kv_cache_bytes", says="give an int")
def in_floats(config, num_tokens, bytes_per_number=4):
    return layer_by_layer(config, num_tokens, bytes_per_number) / 1


@right("kv_cache_bytes")
def with_numpy(config, num_tokens, bytes_per_number=4):
    heads = config.num_kv_heads * (config.d_model // config.num_heads)
    counts = [2, config.num_layers, heads, num_tokens, bytes_per_number]
    return int(np.prod(np.array(counts)))


@wrong("kv_cache_bytes", says="too large for 32 bits")
def in_32_bits_of_numpy(config, num_tokens, bytes_per_number=4):
    counts = [config.num_layers, config.num_kv_heads, config.head_dim, num_tokens]
    with np.errstate(all="ignore"):
        return (
            2
            * np.prod(np.array(counts, dtype=np.int32), dtype=np.int32)
            * np.int32(bytes_per_number)
        )


@wrong("kv_cache_bytes", says="too large for 32 bits")
def in_32_bits_of_torch(config, num_tokens, bytes_per_number=4):
    total = torch.tensor(2, dtype=torch.int32)
    for n in (config.num_layers, config.num_kv_heads, config.head_dim, num_tokens):
        total = total * n
    return int(total * bytes_per_number)


@wrong("kv_cache_bytes")
def in_single_precision_then_int(config, num_tokens, bytes_per_number=4):
    return int(torch.tensor(float(layer_by_layer(config, num_tokens, bytes_per_number))))


@wrong("kv_cache_bytes", says="more than max_seq_len")
def no_more_than_the_model_takes(config, num_tokens, bytes_per_number=4):
    return layer_by_layer(config, min(num_tokens, config.max_seq_len), bytes_per_number)


@wrong("kv_cache_bytes")
def at_least_one_token(config, num_tokens, bytes_per_number=4):
    return layer_by_layer(config, max(num_tokens, 1), bytes_per_number)


@wrong("kv_cache_bytes")
def counted_twice(config, num_tokens, bytes_per_number=4):
    return 2 * layer_by_layer(config, num_tokens, bytes_per_number)


@wrong("kv_cache_bytes")
def without_head_dim(config, num_tokens, bytes_per_number=4):
    return layer_by_layer(config, num_tokens, bytes_per_number) // config.head_dim


@wrong("kv_cache_bytes", says="not given it is 4")
def default_of_one(config, num_tokens, bytes_per_number=1):
    return layer_by_layer(config, num_tokens, bytes_per_number)


# append_kv


@right("append_kv")
def by_index_put(k_cache, v_cache, k, v, seq_lens, query_lens):
    rows, places = [], []
    for b in range(seq_lens.numel()):
        new = torch.arange(int(seq_lens[b] - query_lens[b]), int(seq_lens[b]))
        rows.append(torch.full_like(new, b))
        places.append(new)
    where = torch.cat(rows), torch.cat(places)
    k_cache.index_put_(where, k)
    v_cache.index_put_(where, v)


@right("append_kv")
def by_scatter(k_cache, v_cache, k, v, seq_lens, query_lens):
    B, S, G, D = k_cache.shape
    slots = kv_cache.new_positions(seq_lens, query_lens)
    slots = slots + S * torch.arange(B).repeat_interleave(query_lens)
    index = slots[:, None, None].expand(-1, G, D)
    k_cache.view(B * S, G, D).scatter_(0, index, k)
    v_cache.flatten(0, 1).scatter_(0, index, v)


@right("append_kv")
def split_and_copied(k_cache, v_cache, k, v, seq_lens, query_lens):
    for cache, new in ((k_cache, k), (v_cache, v)):
        for row, end, tokens in zip(cache, seq_lens, new.split(query_lens.tolist())):
            row[end - len(tokens) : end] = tokens


@wrong("append_kv")
def the_rest_is_cleared(k_cache, v_cache, k, v, seq_lens, query_lens):
    request_by_request(k_cache, v_cache, k, v, seq_lens, query_lens)
    for b, S in enumerate(seq_lens.tolist()):
        k_cache[b, S:] = v_cache[b, S:] = 0


@wrong("append_kv")
def no_nan_in_the_cache(k_cache, v_cache, k, v, seq_lens, query_lens):
    request_by_request(k_cache, v_cache, k, v, seq_lens, query_lens)
    k_cache.nan_to_num_()
    v_cache.nan_to_num_()


@wrong("append_kv", says="changed its inputs")
def keys_cleared_behind(k_cache, v_cache, k, v, seq_lens, query_lens):
    request_by_request(k_cache, v_cache, k, v, seq_lens, query_lens)
    k.zero_()


@wrong("append_kv")
def rounded_to_half(k_cache, v_cache, k, v, seq_lens, query_lens):
    request_by_request(k_cache, v_cache, k.half(), v.half(), seq_lens, query_lens)


@wrong("append_kv")
def heads_in_reverse(k_cache, v_cache, k, v, seq_lens, query_lens):
    request_by_request(k_cache, v_cache, k.flip(1), v.flip(1), seq_lens, query_lens)


@wrong("append_kv")
def values_alone(k_cache, v_cache, k, v, seq_lens, query_lens):
    request_by_request(torch.clone(k_cache), v_cache, k, v, seq_lens, query_lens)


@wrong("append_kv", says="the tokens are others'")
def last_token_first(k_cache, v_cache, k, v, seq_lens, query_lens):
    request_by_request(k_cache, v_cache, k.flip(0), v.flip(0), seq_lens, query_lens)


@wrong("append_kv", says="tokens go to row b")
def all_in_row_zero(k_cache, v_cache, k, v, seq_lens, query_lens):
    zeros = [0] * len(seq_lens)
    for cache, new in ((k_cache, k), (v_cache, v)):
        parts = zip(zeros, seq_lens, new.split(query_lens.tolist()))
        for row, end, tokens in parts:
            cache[row, end - len(tokens) : end] = tokens


@wrong("append_kv", says="Requests differ in length")
def all_begin_like_the_first(k_cache, v_cache, k, v, seq_lens, query_lens):
    begin = (seq_lens - query_lens)[:1].expand(len(seq_lens))
    append_from(k_cache, v_cache, k, v, begin, query_lens)


@wrong("append_kv", says="begin at seq_lens - query_lens")
def one_behind_the_right_place(k_cache, v_cache, k, v, seq_lens, query_lens):
    append_from(k_cache, v_cache, k, v, seq_lens - query_lens + 1, query_lens)


@wrong("append_kv")
def rows_found_by_length(k_cache, v_cache, k, v, seq_lens, query_lens):
    lens, start = seq_lens.tolist(), 0
    for S, T in zip(lens, query_lens.tolist()):
        b = lens.index(S)
        k_cache[b, S - T : S] = k[start : start + T]
        v_cache[b, S - T : S] = v[start : start + T]
        start += T


@wrong("append_kv", says="a row of it")
def row_by_row_through_a_copy(k_cache, v_cache, k, v, seq_lens, query_lens):
    start = 0
    for b, (S, T) in enumerate(zip(seq_lens.tolist(), query_lens.tolist())):
        for cache, new in ((k_cache, k), (v_cache, v)):
            row = [cache[b, : S - T], new[start : start + T], cache[b, S:]]
            cache[b] = torch.cat(row)
        start += T


@right("append_kv")
def request_by_request(k_cache, v_cache, k, v, seq_lens, query_lens):
    start = 0
    for b in range(len(seq_lens)):
        S, T = int(seq_lens[b]), int(query_lens[b])
        k_cache[b, S - T : S] = k[start : start + T]
        v_cache[b, S - T : S].copy_(v[start : start + T])
        start += T


@right("append_kv")
def token_by_token(k_cache, v_cache, k, v, seq_lens, query_lens):
    n = 0
    for b, (S, T) in enumerate(zip(seq_lens.tolist(), query_lens.tolist())):
        for position in range(S - T, S):
            k_cache[b][position], v_cache[b][position] = k[n], v[n]
            n += 1


@right("append_kv")
def through_flat_rows(k_cache, v_cache, k, v, seq_lens, query_lens):
    S = k_cache.shape[1]
    rows = []
    for b, (end, T) in enumerate(zip(seq_lens.tolist(), query_lens.tolist())):
        rows += range(b * S + end - T, b * S + end)
    for cache, new in ((k_cache, k), (v_cache, v)):
        cache.view(-1, *cache.shape[2:]).index_copy_(0, torch.tensor(rows), new)


@right("append_kv")
def through_a_mask(k_cache, v_cache, k, v, seq_lens, query_lens):
    places = torch.arange(k_cache.shape[1])
    is_new = (places >= (seq_lens - query_lens)[:, None]) & (places < seq_lens[:, None])
    k_cache[is_new], v_cache[is_new] = k, v


@wrong("append_kv", says="changed its inputs")
def lengths_counted_down(k_cache, v_cache, k, v, seq_lens, query_lens):
    seq_lens -= query_lens
    append_from(k_cache, v_cache, k, v, seq_lens, query_lens)


@wrong("append_kv")
def in_double_precision(k_cache, v_cache, k, v, seq_lens, query_lens):
    requests = torch.arange(len(seq_lens)).repeat_interleave(query_lens)
    positions = kv_cache.new_positions(seq_lens, query_lens)
    k_cache[requests, positions] = k.double()
    v_cache[requests, positions] = v.double()


def append_from(k_cache, v_cache, k, v, starts, query_lens):
    first = 0
    for b, (start, T) in enumerate(zip(starts.tolist(), query_lens.tolist())):
        for i in range(T):
            if 0 <= start + i < k_cache.shape[1]:
                k_cache[b, start + i], v_cache[b, start + i] = k[first + i], v[first + i]
        first += T


@wrong("append_kv", says="Write behind")
def from_the_start(k_cache, v_cache, k, v, seq_lens, query_lens):
    append_from(k_cache, v_cache, k, v, torch.zeros_like(seq_lens), query_lens)


@wrong("append_kv", says="counts the new tokens too")
def one_place_too_far(k_cache, v_cache, k, v, seq_lens, query_lens):
    append_from(k_cache, v_cache, k, v, seq_lens, query_lens)


@wrong("append_kv", says="may bring several")
def one_token_each(k_cache, v_cache, k, v, seq_lens, query_lens):
    append_from(k_cache, v_cache, k, v, seq_lens - 1, query_lens)


@wrong("append_kv", says="values to v_cache")
def keys_twice(k_cache, v_cache, k, v, seq_lens, query_lens):
    request_by_request(k_cache, v_cache, k, k, seq_lens, query_lens)


@wrong("append_kv", says="in place")
def new_caches(k_cache, v_cache, k, v, seq_lens, query_lens):
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    request_by_request(k_cache, v_cache, k, v, seq_lens, query_lens)
    return k_cache, v_cache


@wrong("append_kv", says="That copies the cache")
def copied_and_put_back(k_cache, v_cache, k, v, seq_lens, query_lens):
    for cache, new in ((k_cache, k), (v_cache, v)):
        whole = cache.clone()
        request_by_request(whole, whole, new, new, seq_lens, query_lens)
        cache.copy_(whole)


@wrong("append_kv", says="tokens go to row b")
def first_request_only(k_cache, v_cache, k, v, seq_lens, query_lens):
    start = int(seq_lens[0] - query_lens[0])
    k_cache[0, start : start + len(k)] = k[: k_cache.shape[1] - start]
    v_cache[0, start : start + len(v)] = v[: k_cache.shape[1] - start]


@wrong("append_kv", says="the tokens are others'")
def always_the_first_tokens(k_cache, v_cache, k, v, seq_lens, query_lens):
    for b, (S, T) in enumerate(zip(seq_lens.tolist(), query_lens.tolist())):
        k_cache[b, S - T : S], v_cache[b, S - T : S] = k[:T], v[:T]


@wrong("append_kv", says="Requests differ in length")
def all_as_long_as_the_first(k_cache, v_cache, k, v, seq_lens, query_lens):
    T = int(query_lens[0])
    start = int(seq_lens[0]) - T
    k_cache[:, start : start + T] = k.view(len(seq_lens), T, *k.shape[1:])
    v_cache[:, start : start + T] = v.view(len(seq_lens), T, *v.shape[1:])


# attend_cached


@right("attend_cached")
def query_by_query(q, k_cache, v_cache, seq_lens, query_lens):
    group_size = q.shape[1] // k_cache.shape[2]
    out, n = torch.zeros_like(q), 0
    for b, (S, T) in enumerate(zip(seq_lens.tolist(), query_lens.tolist())):
        for t in range(T):
            seen = S - T + t + 1
            for h in range(q.shape[1]):
                keys = k_cache[b, :seen, h // group_size]
                weights = (keys @ q[n, h] / math.sqrt(q.shape[2])).softmax(0)
                out[n, h] = weights @ v_cache[b, :seen, h // group_size]
            n += 1
    return out


@right("attend_cached")
def with_einsum(q, k_cache, v_cache, seq_lens, query_lens):
    H, D = q.shape[1:]
    G = k_cache.shape[2]
    outs = []
    for b, q_b in enumerate(q.split(query_lens.tolist())):
        S, T = int(seq_lens[b]), len(q_b)
        q_b = q_b.unflatten(1, (G, H // G))
        scores = torch.einsum("tgjd,sgd->gjts", q_b, k_cache[b, :S]) * D**-0.5
        scores += torch.full((T, S), -math.inf, dtype=q.dtype).triu(S - T + 1)
        weights = scores.softmax(-1)
        outs.append(torch.einsum("gjts,sgd->tgjd", weights, v_cache[b, :S]).flatten(1, 2))
    return torch.cat(outs)


@right("attend_cached")
def padded_to_a_batch(q, k_cache, v_cache, seq_lens, query_lens):
    B, S, G, D = k_cache.shape
    H, T = q.shape[1], int(query_lens.max())
    padded = q.new_zeros(B, T, H, D)
    is_query = torch.arange(T) < query_lens[:, None]
    padded[is_query] = q
    at = (seq_lens - query_lens)[:, None] + torch.arange(T)
    hidden = torch.arange(S) > at[..., None]  # (B, T, S)
    padded = padded.unflatten(2, (G, H // G))
    scores = torch.einsum("btgjd,bsgd->bgjts", padded, k_cache) / D**0.5
    scores = torch.where(hidden[:, None, None], -math.inf, scores)
    weights = scores.softmax(-1).nan_to_num()
    values = v_cache.masked_fill(v_cache.isnan(), 0)
    out = torch.einsum("bgjts,bsgd->btgjd", weights, values).flatten(2, 3)
    return out[is_query]


def attend(q, k_cache, v_cache, seq_lens, query_lens, hide=None, scale=None, rows=None):
    H, D = q.shape[1:]
    group_size = H // k_cache.shape[2]
    outs = []
    for b, q_b in enumerate(q.split(query_lens.tolist())):
        S, T = int(seq_lens[b]), len(q_b)
        row = b if rows is None else rows[b]
        k, v = (
            cache[row, :S].repeat_interleave(group_size, 1)
            for cache in (k_cache, v_cache)
        )
        scores = torch.einsum("thd,shd->hts", q_b, k)
        scores = scores * (D**-0.5 if scale is None else scale)
        hidden = torch.arange(S) > torch.arange(S - T, S)[:, None]
        hidden = hidden if hide is None else hide(T, S)
        scores = scores.masked_fill(hidden, -math.inf)
        outs.append(torch.einsum("hts,shd->thd", scores.softmax(-1), v))
    return torch.cat(outs)


@wrong("attend_cached", says="a copy of the keys for each query head")
def keys_for_each_query_head(q, k_cache, v_cache, seq_lens, query_lens):
    return attend(q, k_cache, v_cache, seq_lens, query_lens)


@wrong("attend_cached", says="later positions")
def no_mask(q, k_cache, v_cache, seq_lens, query_lens):
    return attend(
        q, k_cache, v_cache, seq_lens, query_lens, lambda T, S: torch.zeros(T, S).bool()
    )


@wrong("attend_cached", says="position S - T + t")
def mask_from_the_first_key(q, k_cache, v_cache, seq_lens, query_lens):
    return attend(
        q,
        k_cache,
        v_cache,
        seq_lens,
        query_lens,
        lambda T, S: torch.ones(T, S).triu(1) > 0,
    )


@wrong("attend_cached", says="root of D")
def no_scale(q, k_cache, v_cache, seq_lens, query_lens):
    return attend(q, k_cache, v_cache, seq_lens, query_lens, scale=1.0)


@wrong("attend_cached", says="keys was read")
def all_that_is_reserved(q, k_cache, v_cache, seq_lens, query_lens):
    reserved = torch.full_like(seq_lens, k_cache.shape[1])
    return attend(q, k_cache, v_cache, reserved, query_lens)


@wrong("attend_cached", says="its own row")
def always_the_first_row(q, k_cache, v_cache, seq_lens, query_lens):
    first = [0] * len(seq_lens)
    return attend(q, k_cache, v_cache, seq_lens, query_lens, rows=first)


@wrong("attend_cached", says="neighbours share")
def heads_tiled(q, k_cache, v_cache, seq_lens, query_lens):
    G = k_cache.shape[2]
    H = q.shape[1]
    q = q.view(-1, H // G, G, q.shape[2]).transpose(1, 2).flatten(1, 2)
    out = attend(q, k_cache, v_cache, seq_lens, query_lens)
    return out.view(-1, G, H // G, q.shape[2]).transpose(1, 2).flatten(1, 2)


def grouped(q, k_cache, v_cache, seq_lens, query_lens, way_in, way_out):
    G, D = k_cache.shape[2:]
    outs = []
    for b, q_b in enumerate(q.split(query_lens.tolist())):
        S, T = int(seq_lens[b]), len(q_b)
        k, v = (cache[b, :S].transpose(0, 1) for cache in (k_cache, v_cache))
        scores = way_in(q_b, G) @ k.transpose(1, 2) / D**0.5
        hidden = torch.arange(S) > torch.arange(S - T, S)[:, None]
        scores = scores.unflatten(1, (-1, T)) if T else scores[:, None]
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1).flatten(1, 2)
        outs.append(way_out(weights @ v, T, q.shape[1]))
    return torch.cat(outs)


def heads_first(q_b, G):
    return q_b.unflatten(1, (G, -1)).permute(1, 2, 0, 3).flatten(1, 2)


@wrong("attend_cached", says="are mixed up")
def rows_as_they_lie(q, k_cache, v_cache, seq_lens, query_lens):
    return attend_in_rows(
        *(q, k_cache, v_cache, seq_lens, query_lens),
        way_in=lambda x, G: x.reshape(G, -1, x.shape[-1]),
        way_out=lambda x, T: x.reshape(T, -1, x.shape[-1]),
    )


@wrong("attend_cached", says="are mixed up")
def rows_of_tokens_first(q, k_cache, v_cache, seq_lens, query_lens):
    return attend_in_rows(
        *(q, k_cache, v_cache, seq_lens, query_lens),
        way_in=lambda x, G: x.unflatten(1, (G, -1)).transpose(0, 1).flatten(1, 2),
        way_out=lambda x, T: x.unflatten(1, (T, -1)).transpose(0, 1).flatten(1, 2),
    )


def attend_in_rows(q, k_cache, v_cache, seq_lens, query_lens, way_in, way_out):
    """With a mask that takes rows for (heads, tokens)."""
    D, G = q.shape[-1], k_cache.shape[2]
    outs = []
    for b, (S, q_b) in enumerate(zip(seq_lens.tolist(), q.split(query_lens.tolist()))):
        T = len(q_b)
        k, v = (cache[b, :S].transpose(0, 1) for cache in (k_cache, v_cache))
        scores = (way_in(q_b, G) / D**0.5) @ k.transpose(1, 2)
        is_future = torch.arange(S) > torch.arange(S - T, S).unsqueeze(-1)
        scores = scores.view(G, -1, T, S).masked_fill(is_future, float("-inf"))
        outs.append(way_out(scores.softmax(dim=-1).flatten(1, 2) @ v, T))
    return torch.cat(outs)


@wrong("attend_cached", says="Tokens and heads are mixed up")
def reshaped_on_the_way_out(q, k_cache, v_cache, seq_lens, query_lens):
    def way_out(out, T, H):
        return out.reshape(T, H, out.shape[-1])

    return grouped(q, k_cache, v_cache, seq_lens, query_lens, heads_first, way_out)


@wrong("attend_cached", says="Tokens and heads are mixed up")
def reshaped_on_the_way_in(q, k_cache, v_cache, seq_lens, query_lens):
    def way_out(out, T, H):
        out = out.reshape(len(out), -1, max(T, 1), out.shape[-1])
        return out.permute(2, 0, 1, 3).flatten(1, 2)[:T]

    def way_in(q_b, G):
        return q_b.reshape(G, -1, q_b.shape[-1]) if len(q_b) else heads_first(q_b, G)

    return grouped(q, k_cache, v_cache, seq_lens, query_lens, way_in, way_out)


@wrong("attend_cached", says="a copy of the keys for each query head")
def keys_copied_one_after_the_other(q, k_cache, v_cache, seq_lens, query_lens):
    group_size = q.shape[1] // k_cache.shape[2]
    outs = []
    for b, q_b in enumerate(q.split(query_lens.tolist())):
        S, T = int(seq_lens[b]), len(q_b)
        hidden = torch.arange(S) > torch.arange(S - T, S)[:, None]
        k, v = (cache[b, :S].transpose(0, 1) for cache in (k_cache, v_cache))
        scores = (
            q_b.transpose(0, 1) @ k.repeat_interleave(group_size, dim=0).transpose(1, 2)
        ) / q.shape[2] ** 0.5
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        outs.append((weights @ v.repeat_interleave(group_size, dim=0)).transpose(0, 1))
    return torch.cat(outs)


@wrong("attend_cached", says=": expected ")
def always_in_double_precision(q, k_cache, v_cache, seq_lens, query_lens):
    return query_by_query(
        q.double(), k_cache.double(), v_cache.double(), seq_lens, query_lens
    )


@wrong("attend_cached")
def one_query_each(q, k_cache, v_cache, seq_lens, query_lens):
    return attend(q, k_cache, v_cache, seq_lens, torch.ones_like(query_lens))


@wrong("attend_cached", says="not allowed here")
def fused(q, k_cache, v_cache, seq_lens, query_lens):
    q, k, v = (x.transpose(-3, -2) for x in (q[None], k_cache, v_cache))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return out[0].transpose(0, 1)


@right("attend_cached")
def a_batch_with_a_large_negative_number(q, k_cache, v_cache, seq_lens, query_lens):
    S, G, D = k_cache.shape[1:]
    requests = torch.arange(len(seq_lens)).repeat_interleave(query_lens)
    at = kv_cache.new_positions(seq_lens, query_lens)
    outs = []
    for n, (b, p) in enumerate(zip(requests.tolist(), at.tolist())):
        k, v = k_cache[b, : seq_lens[b]], v_cache[b, : seq_lens[b]]
        scores = torch.einsum("gjd,sgd->gjs", q[n].view(G, -1, D), k) * D**-0.5
        scores[..., torch.arange(len(k)) > p] = -1e30
        outs.append(torch.einsum("gjs,sgd->gjd", scores.softmax(-1), v).flatten(0, 1))
    return torch.stack(outs)


@right("attend_cached")
def one_kv_head_at_a_time(q, k_cache, v_cache, seq_lens, query_lens):
    H, D = q.shape[1:]
    G, ends = k_cache.shape[2], query_lens.cumsum(0)
    out = q.new_empty(q.shape)
    for b, S in enumerate(seq_lens.tolist()):
        rows = slice(int(ends[b] - query_lens[b]), int(ends[b]))
        T = rows.stop - rows.start
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        for g in range(G):
            heads = slice(g * (H // G), (g + 1) * (H // G))
            scores = q[rows, heads].transpose(0, 1) @ k_cache[b, :S, g].T / math.sqrt(D)
            weights = torch.where(mask, scores, -math.inf).softmax(-1)
            out[rows, heads] = (weights @ v_cache[b, :S, g]).transpose(0, 1)
    return out


@right("attend_cached")
def key_by_key_with_running_sums(q, k_cache, v_cache, seq_lens, query_lens):
    outs = []
    G, D = k_cache.shape[2:]
    for b, q_b in enumerate(q.split(query_lens.tolist())):
        S, T = int(seq_lens[b]), len(q_b)
        grouped = q_b.unflatten(1, (G, -1)) / D**0.5  # (T, G, H/G, D)
        largest = torch.full(grouped.shape[:3], -math.inf, dtype=q.dtype)
        total, acc = torch.zeros_like(largest), torch.zeros_like(grouped)
        for s in range(S):
            scores = (grouped * k_cache[b, s, :, None]).sum(-1)
            scores[torch.arange(T) + S - T < s] = -math.inf
            new = torch.maximum(largest, scores)
            old, weight = (largest - new).exp(), (scores - new).exp()
            total = total * old + weight
            acc = acc * old[..., None] + weight[..., None] * v_cache[b, s, :, None]
            largest = new
        outs.append((acc / total[..., None]).flatten(1, 2))
    return torch.cat(outs)


@wrong("attend_cached", says="keys was read")
def garbage_known_by_its_nan(q, k_cache, v_cache, seq_lens, query_lens):
    outs, G = [], k_cache.shape[2]
    for b, q_b in enumerate(q.split(query_lens.tolist())):
        S, T = int(seq_lens[b]), len(q_b)
        grouped = q_b.unflatten(1, (G, -1)) / q.shape[2] ** 0.5
        scores = torch.einsum("tgjd,sgd->gjts", grouped, k_cache[b])
        at = torch.arange(k_cache.shape[1])
        future = (at > torch.arange(S - T, S)[:, None]) & (at < S)
        scores = scores.masked_fill(scores.isnan() | future, -math.inf)
        values = v_cache[b].nan_to_num()
        out = torch.einsum("gjts,sgd->tgjd", scores.softmax(-1), values)
        outs.append(out.flatten(1, 2))
    return torch.cat(outs)


@wrong("attend_cached")
def padded_and_zero_times_nan(q, k_cache, v_cache, seq_lens, query_lens):
    outs, G = [], k_cache.shape[2]
    for b, q_b in enumerate(q.split(query_lens.tolist())):
        S, T = int(seq_lens[b]), len(q_b)
        grouped = q_b.unflatten(1, (G, -1)) / q.shape[2] ** 0.5
        scores = torch.einsum("tgjd,sgd->gjts", grouped, k_cache[b])
        hidden = torch.arange(k_cache.shape[1]) > torch.arange(S - T, S)[:, None]
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        outs.append(torch.einsum("gjts,sgd->tgjd", weights, v_cache[b]).flatten(1, 2))
    return torch.cat(outs)


@wrong("attend_cached", says="changed its inputs")
def garbage_cleared_in_the_cache(q, k_cache, v_cache, seq_lens, query_lens):
    v_cache.nan_to_num_()
    return query_by_query(q, k_cache, v_cache, seq_lens, query_lens)


@wrong("attend_cached", says="changed its inputs")
def queries_scaled_in_place(q, k_cache, v_cache, seq_lens, query_lens):
    q *= q.shape[2] ** -0.5
    return query_by_query(q * q.shape[2] ** 0.5, k_cache, v_cache, seq_lens, query_lens)


@wrong("attend_cached")
def cache_in_single_precision(q, k_cache, v_cache, seq_lens, query_lens):
    tensors = (x.float() for x in (q, k_cache, v_cache))
    return query_by_query(*tensors, seq_lens, query_lens).to(q.dtype)


@wrong("attend_cached", says="later positions")
def sees_one_key_too_many(q, k_cache, v_cache, seq_lens, query_lens):
    def hide(T, S):
        return torch.arange(S) > torch.arange(S - T + 1, S + 1)[:, None]

    return attend(q, k_cache, v_cache, seq_lens, query_lens, hide)


@wrong("attend_cached", says="own position too")
def does_not_see_itself(q, k_cache, v_cache, seq_lens, query_lens):
    def hide(T, S):
        return torch.arange(S) >= torch.arange(S - T, S)[:, None]

    return attend(q, k_cache, v_cache, seq_lens, query_lens, hide)


@wrong("attend_cached")
def sees_nothing_from_its_row_on(q, k_cache, v_cache, seq_lens, query_lens):
    def hide(T, S):
        return torch.arange(S) >= torch.arange(T)[:, None]

    return attend(q, k_cache, v_cache, seq_lens, query_lens, hide)


@wrong("attend_cached", says="weight 0")
def future_at_minus_a_hundred(q, k_cache, v_cache, seq_lens, query_lens):
    return low_for_the_future(q, k_cache, v_cache, seq_lens, query_lens, -100.0)


def low_for_the_future(q, k_cache, v_cache, seq_lens, query_lens, low):
    outs, G = [], k_cache.shape[2]
    for b, q_b in enumerate(q.split(query_lens.tolist())):
        S, T = int(seq_lens[b]), len(q_b)
        k, v = (cache[b, :S] for cache in (k_cache, v_cache))
        grouped = q_b.unflatten(1, (G, -1)) / q.shape[2] ** 0.5
        scores = torch.einsum("tgjd,sgd->gjts", grouped, k)
        hidden = torch.arange(S) > torch.arange(S - T, S)[:, None]
        weights = scores.masked_fill(hidden, low).softmax(-1)
        outs.append(torch.einsum("gjts,sgd->tgjd", weights, v).flatten(1, 2))
    return torch.cat(outs)


@right("attend_cached")
def future_at_minus_1e9(q, k_cache, v_cache, seq_lens, query_lens):
    return low_for_the_future(q, k_cache, v_cache, seq_lens, query_lens, -1e9)


@wrong("attend_cached", says="not by D")
def divided_by_d(q, k_cache, v_cache, seq_lens, query_lens):
    return attend(q, k_cache, v_cache, seq_lens, query_lens, scale=1 / q.shape[2])


@wrong("attend_cached")
def noisy(q, k_cache, v_cache, seq_lens, query_lens):
    return 1.01 * query_by_query(q, k_cache, v_cache, seq_lens, query_lens)


@wrong("attend_cached", says="tokens before heads")
def heads_before_tokens(q, k_cache, v_cache, seq_lens, query_lens):
    return query_by_query(q, k_cache, v_cache, seq_lens, query_lens).transpose(0, 1)


@wrong("attend_cached", says="a copy of the keys for each query head")
def keys_copied_by_broadcasting(q, k_cache, v_cache, seq_lens, query_lens):
    outs, G = [], k_cache.shape[2]
    for b, q_b in enumerate(q.split(query_lens.tolist())):
        S, T = int(seq_lens[b]), len(q_b)
        k, v = (cache[b, :S].transpose(0, 1)[:, None] for cache in (k_cache, v_cache))
        grouped = q_b.unflatten(1, (G, -1)).permute(1, 2, 0, 3)  # (G, H/G, T, D)
        scores = grouped / q.shape[2] ** 0.5 @ k.transpose(2, 3)
        hidden = torch.arange(S) > torch.arange(S - T, S)[:, None]
        out = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
        outs.append(out.permute(2, 0, 1, 3).flatten(1, 2))
    return torch.cat(outs)


# generate_cached


def pick(logits, temperature=1.0, top_k=None, top_p=1.0, generator=None):
    probs = sampling.next_token_probs(logits, temperature, top_k, top_p)
    return sampling.sample(probs, generator)


def given_lines(model, prompts, num_new_tokens, cache, settings):
    generate.check_cached_generation(model, prompts, num_new_tokens, cache)
    kinds = {"temperature": 1.0, "top_k": None, "top_p": 1.0}
    sampling.check_sampling(*(settings.get(k, default) for k, default in kinds.items()))


@right("generate_cached")
@torch.no_grad()
def prefill_then_decode(model, prompts, num_new_tokens, cache, **settings):
    given_lines(model, prompts, num_new_tokens, cache, settings)
    if num_new_tokens == 0:
        return prompts
    texts = [prompt_ids.tolist() for prompt_ids in prompts]
    lens = torch.tensor([len(text) for text in texts])
    rows = forward_cached(model, cache, torch.cat(prompts), lens).split(lens.tolist())
    logits = torch.stack([row[-1] for row in rows])
    for i in range(num_new_tokens):
        new_ids = pick(logits, **settings)
        for text, new_id in zip(texts, new_ids.tolist()):
            text.append(new_id)
        if i < num_new_tokens - 1:
            logits = forward_cached(model, cache, new_ids, torch.ones_like(lens))
    return [torch.tensor(text) for text in texts]


@right("generate_cached")
def by_hand(model, prompts, num_new_tokens, cache, **settings):
    given_lines(model, prompts, num_new_tokens, cache, settings)
    texts, new = prompts, [prompt_ids.tolist() for prompt_ids in prompts]
    for _ in range(num_new_tokens):
        starts = cache.seq_lens.tolist()
        positions = [s + i for s, ids in zip(starts, new) for i in range(len(ids))]
        token_ids = torch.tensor(sum(new, []))
        query_lens = torch.tensor([len(ids) for ids in new])
        with torch.no_grad(), cache.extend(query_lens) as attend:
            logits = model(token_ids, torch.tensor(positions), attend)
        ends = torch.tensor([len(ids) for ids in new]).cumsum(0)
        ids = pick(logits[ends - 1], **settings)
        new = ids[:, None].tolist()
        texts = [torch.cat((text, ids[b : b + 1])) for b, text in enumerate(texts)]
    return texts


@right("generate_cached")
def into_buffers(model, prompts, num_new_tokens, cache, **settings):
    given_lines(model, prompts, num_new_tokens, cache, settings)
    ends = [len(prompt_ids) for prompt_ids in prompts]
    texts = [torch.cat((ids, ids.new_zeros(num_new_tokens))) for ids in prompts]
    query_lens, new_ids = torch.tensor(ends), torch.cat(prompts)
    for i in range(num_new_tokens):
        logits = generate.forward_cached(model, cache, new_ids, query_lens)
        rows = query_lens.cumsum(0).sub(1)
        new_ids = pick(logits.index_select(0, rows), **settings)
        for b, text in enumerate(texts):
            text[ends[b] + i] = new_ids[b]
        query_lens = torch.ones(len(texts), dtype=torch.int64)
    return texts


@wrong("generate_cached", says="Nothing is in the cache")
def recompute(model, prompts, num_new_tokens, cache, **settings):
    return [
        generate.generate_recompute(model, ids, num_new_tokens, **settings)
        for ids in prompts
    ]


@wrong("generate_cached", says="hand over the new ones alone")
def recompute_then_fill_the_cache(model, prompts, num_new_tokens, cache, **settings):
    if num_new_tokens == 0:
        return prompts
    texts = prompts
    forward_cached(model, cache, torch.cat(texts), torch.tensor([len(t) for t in texts]))
    for i in range(num_new_tokens):
        logits = [
            model(t, torch.arange(len(t)), generate.attend_fused)[-1] for t in texts
        ]
        ids = pick(torch.stack(logits).detach(), **settings)
        texts = [torch.cat((t, ids[b : b + 1])) for b, t in enumerate(texts)]
        if i < num_new_tokens - 1:
            forward_cached(model, cache, ids, torch.ones(len(texts)).long())
    return texts


@wrong("generate_cached", says="The last token need not")
def last_token_too(model, prompts, num_new_tokens, cache, **settings):
    texts, ids = prompts, torch.cat(prompts)
    lens = torch.tensor([len(p) for p in prompts])
    for _ in range(num_new_tokens):
        logits = forward_cached(model, cache, ids, lens)
        ids, lens = pick(logits[lens.cumsum(0) - 1], **settings), torch.ones_like(lens)
        texts = [torch.cat((t, ids[b : b + 1])) for b, t in enumerate(texts)]
    if num_new_tokens:
        forward_cached(model, cache, ids, lens)
    return texts


def loop(model, prompts, num_new_tokens, cache, settings, rows=None, feed=None):
    texts, ids = list(prompts), torch.cat(list(prompts))
    lens = torch.tensor([len(p) for p in prompts])
    rows = rows or (lambda lens: lens.cumsum(0) - 1)
    for _ in range(num_new_tokens):
        logits = forward_cached(model, cache, ids, lens)
        ids = pick(logits[rows(lens)], **settings)
        texts = [torch.cat((t, ids[b : b + 1])) for b, t in enumerate(texts)]
        lens = torch.ones_like(lens)
    return texts


@wrong("generate_cached", says="new tokens behind them")
def without_the_prompts(model, prompts, num_new_tokens, cache, **settings):
    texts = loop(model, prompts, num_new_tokens, cache, settings)
    return [text[len(p) :] for text, p in zip(texts, prompts)]


@wrong("generate_cached", says="where do its rows end")
def one_length_for_all(model, prompts, num_new_tokens, cache, **settings):
    def rows(lens):
        return (torch.arange(len(lens)) + 1) * (lens.sum() // len(lens)) - 1

    return loop(model, prompts, num_new_tokens, cache, settings, rows)


@wrong("generate_cached")
def first_row_of_each(model, prompts, num_new_tokens, cache, **settings):
    return loop(
        model,
        prompts,
        num_new_tokens,
        cache,
        settings,
        lambda lens: lens.cumsum(0) - lens,
    )


@wrong("generate_cached", says="query_lens of 1")
def query_lens_not_updated(model, prompts, num_new_tokens, cache, **settings):
    texts, ids = list(prompts), torch.cat(list(prompts))
    lens = torch.tensor([len(p) for p in prompts])
    for _ in range(num_new_tokens):
        logits = forward_cached(model, cache, ids, lens)
        ids = pick(logits[lens.cumsum(0) - 1], **settings)
        texts = [torch.cat((t, ids[b : b + 1])) for b, t in enumerate(texts)]
    return texts


@wrong("generate_cached", says="all three settings")
def greedy_whatever_is_asked(model, prompts, num_new_tokens, cache, **settings):
    greedy = {"temperature": 0, "generator": settings["generator"]}
    return loop(model, prompts, num_new_tokens, cache, greedy)


@wrong("generate_cached", says="All requests go in one call")
def one_request_after_another(model, prompts, num_new_tokens, cache, **settings):
    B, texts = len(prompts), list(prompts)
    new = list(prompts)
    for _ in range(num_new_tokens):
        logits = []
        for b in range(B):
            lens = torch.zeros(B, dtype=torch.int64)
            lens[b] = len(new[b])
            logits.append(forward_cached(model, cache, new[b], lens)[-1])
        ids = pick(torch.stack(logits), **settings)
        new = list(ids.split(1))
        texts = [torch.cat((t, n)) for t, n in zip(texts, new)]
    return texts


@wrong("generate_cached", says="torch.no_grad()")
def graph_kept(model, prompts, num_new_tokens, cache, **settings):
    texts, ids = list(prompts), torch.cat(list(prompts))
    lens = torch.tensor([len(p) for p in prompts])
    for _ in range(num_new_tokens):
        positions = kv_cache.new_positions(cache.seq_lens + lens, lens)
        with cache.extend(lens) as attend:
            detached = lambda i, q, k, v, attend=attend: attend(  # noqa: E731
                i, q, k.detach(), v.detach()
            )
            logits = model(ids, positions, detached)
        ids = pick(logits[lens.cumsum(0) - 1].detach(), **settings)
        texts = [torch.cat((t, ids[b : b + 1])) for b, t in enumerate(texts)]
        lens = torch.ones_like(lens)
    return texts


@wrong("generate_cached", says="begin with a copy")
def into_the_callers_list(model, prompts, num_new_tokens, cache, **settings):
    for b, text in enumerate(loop(model, prompts, num_new_tokens, cache, settings)):
        prompts[b] = text
    return prompts


@wrong("generate_cached", says="Keep the given lines")
def without_the_given_lines(model, prompts, num_new_tokens, cache, **settings):
    return loop(model, prompts, num_new_tokens, cache, settings)


@wrong("generate_cached", says="exactly num_new_tokens")
def one_too_few(model, prompts, num_new_tokens, cache, **settings):
    return loop(model, prompts, num_new_tokens - 1, cache, settings)


@right("generate_cached")
@torch.no_grad()
def in_inverted_loops(model, prompts, num_new_tokens, cache, **settings):
    given_lines(model, prompts, num_new_tokens, cache, settings)
    texts = [ids.clone() for ids in prompts]
    seen = [0] * len(texts)
    while num_new_tokens:
        new = [text[n:] for text, n in zip(texts, seen)]
        lens = torch.tensor([len(ids) for ids in new])
        logits = generate.forward_cached(model, cache, torch.cat(new), lens)
        last = torch.stack([rows[-1] for rows in logits.split(lens.tolist())])
        drawn = pick(last, **settings)
        seen = [len(text) for text in texts]
        texts = [torch.hstack((t, i)) for t, i in zip(texts, drawn)]
        num_new_tokens -= 1
    return tuple(texts)


def stopping(
    model, prompts, num_new_tokens, cache, settings, ends, is_end=lambda texts: False
):
    """Until the first text has drawn one of `ends`, or the texts are such an end."""
    given_lines(model, prompts, num_new_tokens, cache, settings)
    texts, ids = list(prompts), torch.cat(list(prompts))
    lens = torch.tensor([len(p) for p in prompts])
    for _ in range(num_new_tokens):
        logits = forward_cached(model, cache, ids, lens)
        ids = pick(logits[lens.cumsum(0) - 1], **settings)
        texts = [torch.cat((t, ids[b : b + 1])) for b, t in enumerate(texts)]
        lens = torch.ones_like(lens)
        if int(ids[0]) in ends or is_end(texts):
            break
    return texts


@wrong("generate_cached", says="exactly num_new_tokens")
def until_a_zero_byte(model, prompts, num_new_tokens, cache, **settings):
    return stopping(model, prompts, num_new_tokens, cache, settings, [0])


@wrong("generate_cached", says="exactly num_new_tokens")
def until_the_line_ends(model, prompts, num_new_tokens, cache, **settings):
    return stopping(model, prompts, num_new_tokens, cache, settings, [10])


@wrong("generate_cached", says="exactly num_new_tokens")
def until_the_carriage_returns(model, prompts, num_new_tokens, cache, **settings):
    return stopping(model, prompts, num_new_tokens, cache, settings, [13])


@wrong("generate_cached", says="exactly num_new_tokens")
def until_a_text_repeats_itself(model, prompts, num_new_tokens, cache, **settings):
    texts = stopping(model, prompts, num_new_tokens, cache, settings, [])
    cut = []
    for text, prompt in zip(texts, prompts):
        ids, end = text.tolist(), len(prompt)
        while end < len(ids) and ids[end] not in ids[:end]:
            end += 1
        cut.append(text[:end])
    return cut


@wrong("generate_cached")
def a_text_that_ends_is_filled_up(model, prompts, num_new_tokens, cache, **settings):
    texts = stopping(model, prompts, num_new_tokens, cache, settings, [])
    ended = []
    for text, prompt in zip(texts, prompts):
        new = text[len(prompt) :].clone()
        at = (new == 0).nonzero().flatten().tolist()
        if at:
            new[at[0] :] = 0
        ended.append(torch.cat((prompt, new)))
    return ended


@wrong("generate_cached")
def greedy_for_the_first_row_alone(model, prompts, num_new_tokens, cache, **settings):
    given_lines(model, prompts, num_new_tokens, cache, settings)
    texts, ids = list(prompts), torch.cat(list(prompts))
    lens = torch.tensor([len(p) for p in prompts])
    for _ in range(num_new_tokens):
        last = forward_cached(model, cache, ids, lens)[lens.cumsum(0) - 1]
        if settings["temperature"] == 0:
            ids = last[0].argmax().repeat(len(texts))
        else:
            ids = pick(last, **settings)
        texts = [torch.cat((t, ids[b : b + 1])) for b, t in enumerate(texts)]
        lens = torch.ones_like(lens)
    return texts


@wrong("generate_cached", says="hand None on")
def dice_of_its_own_for_a_batch(model, prompts, num_new_tokens, cache, **settings):
    settings["generator"] = settings["generator"] or torch.Generator().manual_seed(0)
    return stopping(model, prompts, num_new_tokens, cache, settings, [])


@wrong("generate_cached", says="random_state_of_torch")
def torch_seeded_first(model, prompts, num_new_tokens, cache, **settings):
    torch.manual_seed(0)
    return stopping(model, prompts, num_new_tokens, cache, settings, [])


@wrong("generate_cached")
def torch_seeded_where_no_generator_is(model, prompts, num_new_tokens, cache, **settings):
    if settings["generator"] is None:
        torch.manual_seed(1234)
    return stopping(model, prompts, num_new_tokens, cache, settings, [])


@wrong("generate_cached", says="draw with the generator alone")
def generator_not_handed_on(model, prompts, num_new_tokens, cache, **settings):
    settings["generator"] = None
    return stopping(model, prompts, num_new_tokens, cache, settings, [])


@wrong("generate_cached", says="all three settings")
def top_p_not_handed_on(model, prompts, num_new_tokens, cache, **settings):
    settings.pop("top_p", None)
    return stopping(model, prompts, num_new_tokens, cache, settings, [])


@wrong("generate_cached", says="all three settings")
def top_k_not_handed_on(model, prompts, num_new_tokens, cache, **settings):
    settings.pop("top_k", None)
    return stopping(model, prompts, num_new_tokens, cache, settings, [])


@wrong("generate_cached")
def generator_seeded_again(model, prompts, num_new_tokens, cache, **settings):
    if settings["generator"] is not None:
        settings["generator"].manual_seed(0)
    return stopping(model, prompts, num_new_tokens, cache, settings, [])


@wrong("generate_cached")
def logits_halved(model, prompts, num_new_tokens, cache, **settings):
    given_lines(model, prompts, num_new_tokens, cache, settings)
    texts, ids = list(prompts), torch.cat(list(prompts))
    lens = torch.tensor([len(p) for p in prompts])
    for _ in range(num_new_tokens):
        logits = forward_cached(model, cache, ids, lens) / 2
        ids = pick(logits[lens.cumsum(0) - 1], **settings)
        texts = [torch.cat((t, ids[b : b + 1])) for b, t in enumerate(texts)]
        lens = torch.ones_like(lens)
    return texts


@right("generate_cached")
@torch.no_grad()
def row_by_row_and_greedy_by_hand(model, prompts, num_new_tokens, cache, **settings):
    given_lines(model, prompts, num_new_tokens, cache, settings)
    generator, texts = settings.pop("generator", None), [p.tolist() for p in prompts]
    new = [list(text) for text in texts]
    for _ in range(num_new_tokens):
        lens = torch.tensor([len(ids) for ids in new])
        logits = forward_cached(model, cache, torch.tensor(sum(new, [])), lens)
        for b, rows in enumerate(logits.split(lens.tolist())):
            if settings["temperature"] == 0:
                new[b] = [int(rows[-1].argmax())]
                continue
            probs = sampling.next_token_probs(rows[-1], **settings)
            new[b] = [int(sampling.sample(probs, generator))]
        texts = [text + ids for text, ids in zip(texts, new)]
    return [torch.tensor(text) for text in texts]


@right("generate_cached")
def no_dice_where_one_token_is_left(model, prompts, num_new_tokens, cache, **settings):
    if settings["temperature"] > 0 and settings.get("top_k") == 1:
        settings["temperature"] = 0
    if settings["temperature"] > 0:
        return stopping(model, prompts, num_new_tokens, cache, settings, [])
    given_lines(model, prompts, num_new_tokens, cache, settings)
    lens, texts = torch.tensor([len(p) for p in prompts]), [p.clone() for p in prompts]
    ids = torch.cat(texts)
    for _ in range(num_new_tokens):
        rows = forward_cached(model, cache, ids, lens).split(lens.tolist())
        ids = torch.cat([row[-1].argmax(-1, keepdim=True) for row in rows])
        texts = [torch.cat(pair) for pair in zip(texts, ids.split(1))]
        lens = torch.ones(len(texts), dtype=torch.int64)
    return texts


@wrong("generate_cached")
def one_draw_for_all(model, prompts, num_new_tokens, cache, **settings):
    texts = loop(model, prompts, num_new_tokens, cache, settings)
    first = texts[0][len(prompts[0]) :]
    return [torch.cat((p, first)) for p in prompts]


@wrong("generate_cached")
def row_before_the_last_of_each(model, prompts, num_new_tokens, cache, **settings):
    given_lines(model, prompts, num_new_tokens, cache, settings)

    def rows(lens):
        return (lens.cumsum(0) - 2).clamp(min=0)

    return loop(model, prompts, num_new_tokens, cache, settings, rows)


@wrong("generate_cached")
def logits_turned_around(model, prompts, num_new_tokens, cache, **settings):
    given_lines(model, prompts, num_new_tokens, cache, settings)
    texts, ids = list(prompts), torch.cat(list(prompts))
    lens = torch.tensor([len(p) for p in prompts])
    for _ in range(num_new_tokens):
        logits = -forward_cached(model, cache, ids, lens)
        ids = pick(logits[lens.cumsum(0) - 1], **settings)
        texts = [torch.cat((t, ids[b : b + 1])) for b, t in enumerate(texts)]
        lens = torch.ones_like(lens)
    return texts


@wrong("generate_cached")
def an_empty_cache_first(model, prompts, num_new_tokens, cache, **settings):
    given_lines(model, prompts, num_new_tokens, cache, settings)
    cache.seq_lens = torch.zeros_like(cache.seq_lens)
    return loop(model, prompts, num_new_tokens, cache, settings)


@wrong("generate_cached", says="All requests go in one call")
def prompts_one_by_one(model, prompts, num_new_tokens, cache, **settings):
    given_lines(model, prompts, num_new_tokens, cache, settings)
    texts, lens, last = list(prompts), torch.ones(len(prompts)).long(), []
    for b in range(len(prompts) if num_new_tokens else 0):
        alone = torch.zeros_like(lens)
        alone[b] = len(prompts[b])
        last.append(forward_cached(model, cache, prompts[b], alone)[-1])
    logits = torch.stack(last) if last else None
    for i in range(num_new_tokens):
        ids = pick(logits, **settings)
        texts = [torch.cat((t, ids[b : b + 1])) for b, t in enumerate(texts)]
        if i < num_new_tokens - 1:
            logits = forward_cached(model, cache, ids, lens)
    return texts


@wrong("generate_cached", says="Keep the given lines")
def settings_not_checked(model, prompts, num_new_tokens, cache, **settings):
    generate.check_cached_generation(model, prompts, num_new_tokens, cache)
    return loop(model, prompts, num_new_tokens, cache, settings)


@wrong("generate_cached", says="set_grad_enabled")
def gradients_off_for_good(model, prompts, num_new_tokens, cache, **settings):
    torch.set_grad_enabled(False)
    return stopping(model, prompts, num_new_tokens, cache, settings, [])


@wrong("generate_cached", says="in the mode in which it came")
def training_mode_left(model, prompts, num_new_tokens, cache, **settings):
    texts = stopping(model, prompts, num_new_tokens, cache, settings, [])
    model.train()
    return texts


@wrong("generate_cached", says="with query_lens of 1")
def new_ids_in_columns(model, prompts, num_new_tokens, cache, **settings):
    given_lines(model, prompts, num_new_tokens, cache, settings)
    texts, ids = list(prompts), torch.cat(list(prompts))
    lens = torch.tensor([len(p) for p in prompts])
    for _ in range(num_new_tokens):
        logits = forward_cached(model, cache, ids, lens)
        ids = pick(logits[lens.cumsum(0) - 1], **settings)[:, None]
        texts = [torch.cat((t, ids[b])) for b, t in enumerate(texts)]
        lens = torch.ones_like(lens)
    return texts


@wrong("generate_cached", says="in the mode in which it came")
def eval_mode_first(model, prompts, num_new_tokens, cache, **settings):
    model.eval()
    return stopping(model, prompts, num_new_tokens, cache, settings, [])


def lines_of_its_own(model, prompts, num_new_tokens, cache, settings, is_off=""):
    """What check_cached_generation does, but for one thing."""
    lens, longest = [len(p) for p in prompts], model.config.max_seq_len
    rows = zip(lens, cache.seq_lens.tolist(), cache.request_ids)
    begun = [(n, seq_len) for n, seq_len, request_id in rows if request_id is not None]
    if len(lens) != len(cache.request_ids) or not all(lens) or num_new_tokens < 0:
        raise ValueError(lens, num_new_tokens)
    if is_off != "rows" and len(begun) < len(lens):
        raise ValueError(cache.request_ids)
    if max(n + seq_len for n, seq_len in begun) + num_new_tokens > longest:
        raise ValueError(longest)
    if model.training and model.config.dropout > 0:
        raise ValueError("dropout")
    kinds = {"temperature": 1.0, "top_k": None, "top_p": 1.0}
    sampling.check_sampling(*(settings.get(k, default) for k, default in kinds.items()))
    room = [n + num_new_tokens - 1 if num_new_tokens else 0 for n in lens]
    if is_off == "rows":
        reserved = cache.k_cache.shape[2]
        if any(n + s > reserved for n, s in zip(room, cache.seq_lens.tolist())):
            raise kv_cache.CacheFullError(reserved)
    else:
        cache.check_room(torch.tensor(room))


@right("generate_cached")
def all_lines_of_its_own(model, prompts, num_new_tokens, cache, **settings):
    lines_of_its_own(model, prompts, num_new_tokens, cache, settings)
    return loop(model, prompts, num_new_tokens, cache, settings)


@wrong("generate_cached", says="Keep the given lines")
def rows_not_looked_at(model, prompts, num_new_tokens, cache, **settings):
    lines_of_its_own(model, prompts, num_new_tokens, cache, settings, "rows")
    if None in cache.request_ids:
        return list(prompts)
    return loop(model, prompts, num_new_tokens, cache, settings)


@wrong("generate_cached")
def equal_prompts_drawn_once(model, prompts, num_new_tokens, cache, **settings):
    texts = stopping(model, prompts, num_new_tokens, cache, settings, [])
    first = {}
    return [first.setdefault(tuple(p.tolist()), t) for p, t in zip(prompts, texts)]


@wrong("generate_cached", says="In one call")
def all_but_the_last_token_first(model, prompts, num_new_tokens, cache, **settings):
    given_lines(model, prompts, num_new_tokens, cache, settings)
    texts, lens = list(prompts), torch.tensor([len(p) - 1 for p in prompts])
    if num_new_tokens and lens.sum() > 0:
        forward_cached(model, cache, torch.cat([p[:-1] for p in prompts]), lens)
    ids = torch.stack([p[-1] for p in prompts])
    for _ in range(num_new_tokens):
        ids = pick(forward_cached(model, cache, ids, torch.ones_like(lens)), **settings)
        texts = [torch.cat((t, ids[b : b + 1])) for b, t in enumerate(texts)]
    return texts


@wrong("generate_cached", says="In one call")
def in_chunks_of_four(model, prompts, num_new_tokens, cache, **settings):
    given_lines(model, prompts, num_new_tokens, cache, settings)
    if num_new_tokens == 0:
        return list(prompts)
    last = {}
    for start in range(0, max(map(len, prompts)), 4):
        chunks = [p[start : start + 4] for p in prompts]
        lens = [len(chunk) for chunk in chunks]
        logits = forward_cached(model, cache, torch.cat(chunks), torch.tensor(lens))
        rows = logits.split(lens)
        last |= {b: r[-1] for b, r in enumerate(rows) if len(r)}
    logits, texts = torch.stack([last[b] for b in range(len(prompts))]), list(prompts)
    for i in range(num_new_tokens):
        ids = pick(logits, **settings)
        texts = [torch.cat((t, ids[b : b + 1])) for b, t in enumerate(texts)]
        if i < num_new_tokens - 1:
            logits = forward_cached(model, cache, ids, torch.ones(len(ids)).long())
    return texts


@wrong("generate_cached", says="exactly num_new_tokens")
def until_a_byte_repeats(model, prompts, num_new_tokens, cache, **settings):
    def is_end(texts):
        return all(len(text) > 1 and text[-1] == text[-2] for text in texts)

    return stopping(model, prompts, num_new_tokens, cache, settings, [], is_end)


@wrong("generate_cached", says="all three settings")
def top_k_or_top_p(model, prompts, num_new_tokens, cache, **settings):
    given_lines(model, prompts, num_new_tokens, cache, settings)
    if settings.get("top_p", 1) < 1:
        settings["top_k"] = None
    return loop(model, prompts, num_new_tokens, cache, settings)


@wrong("generate_cached", says="all three settings")
def no_temperature_beside_top_k_and_top_p(
    model, prompts, num_new_tokens, cache, **settings
):
    given_lines(model, prompts, num_new_tokens, cache, settings)
    if settings.get("top_k") and settings.get("top_p", 1) < 1:
        settings["temperature"] = 1.0
    return loop(model, prompts, num_new_tokens, cache, settings)


# kv_utilization


@right("kv_utilization")
def of_all_places(seq_lens, max_seq_len):
    places = torch.arange(max_seq_len)
    return (places < seq_lens[:, None]).float().mean().item()


@right("kv_utilization")
def in_numpy(seq_lens, max_seq_len):
    return np.mean(seq_lens.numpy()) / max_seq_len


@wrong("kv_utilization")
def rounded_to_two_digits(seq_lens, max_seq_len):
    return round(counted(seq_lens, max_seq_len), 2)


@wrong("kv_utilization", says="A share is a fraction")
def cut_to_an_int(seq_lens, max_seq_len):
    return int(counted(seq_lens, max_seq_len))


@wrong("kv_utilization", says="not only the longest")
def longest_alone(seq_lens, max_seq_len):
    return int(seq_lens.max()) / max_seq_len


@wrong("kv_utilization")
def no_number(seq_lens, max_seq_len):
    return f"{counted(seq_lens, max_seq_len):.0%}"


@wrong("kv_utilization")
def never_more_than_half(seq_lens, max_seq_len):
    return min(counted(seq_lens, max_seq_len), 0.5)


@wrong("kv_utilization", says="changed its inputs")
def sorted_in_place(seq_lens, max_seq_len):
    seq_lens.copy_(seq_lens.sort(descending=True).values)
    return counted(seq_lens, max_seq_len)


@right("kv_utilization")
def mean_share(seq_lens, max_seq_len):
    return float((seq_lens.double() / max_seq_len).mean())


@right("kv_utilization")
def counted(seq_lens, max_seq_len):
    used = sum(int(seq_len) for seq_len in seq_lens)
    return used / (max_seq_len * seq_lens.numel())


@right("kv_utilization")
def in_single_precision(seq_lens, max_seq_len):
    return (seq_lens / max_seq_len).mean()


@wrong("kv_utilization", says="changed its inputs")
def cut_in_place(seq_lens, max_seq_len):
    total = counted(seq_lens, max_seq_len)
    seq_lens.clamp_(max=1)
    return total


@wrong("kv_utilization", says="for each request")
def one_reservation(seq_lens, max_seq_len):
    return seq_lens.sum().item() / max_seq_len


@wrong("kv_utilization", says="holds nothing")
def share_wasted(seq_lens, max_seq_len):
    return 1 - counted(seq_lens, max_seq_len)


@wrong("kv_utilization", says="between 0 and 1")
def in_percent(seq_lens, max_seq_len):
    return 100 * counted(seq_lens, max_seq_len)


@wrong("kv_utilization", says="however long the longest is")
def of_the_longest(seq_lens, max_seq_len):
    return counted(seq_lens, int(seq_lens.max()))


@wrong("kv_utilization", says="has not begun")
def of_those_that_began(seq_lens, max_seq_len):
    return counted(seq_lens[seq_lens > 0], max_seq_len)


@wrong("kv_utilization", says="A share is a fraction")
def whole_numbers(seq_lens, max_seq_len):
    return int(seq_lens.sum()) // (len(seq_lens) * max_seq_len)


@wrong("kv_utilization", says="as long as another counts too")
def each_length_once(seq_lens, max_seq_len):
    lens = {*seq_lens.tolist()}
    return sum(lens) / (len(lens) * max_seq_len)


@wrong("kv_utilization", says="as long as another counts too")
def tokens_of_each_length_once(seq_lens, max_seq_len):
    return sum({*seq_lens.tolist()}) / (len(seq_lens) * max_seq_len)
