"""Chapter 5: attention that reads the blocks where they lie, in torch.

Decoding: one new query of each request, over all of its keys in the pool. These are the
plain twins of the kernel in lib/paged_attention_triton.py, with the same arguments and
the same two results, out and logsumexp: first gather, then attend, as in chapter 4; and
tile by tile with an online softmax (https://arxiv.org/abs/1805.02867), which never has
more than one block's scores.

The logsumexp of a query's scores is the logarithm of what its weights were divided by.
Results over parts of the keys can be merged if each brings its own: `merge_splits`.

Read lib/paged_kv_cache.py before.
"""

import math
from collections.abc import Iterable

import torch

from lib import paged_kv_cache
from lib.config import ModelConfig


def paged_decode_gather(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather each request's keys and values, then attend: the oracle.

    q (B, H, D); k_cache, v_cache (num_blocks, block_size, G, D); block_tables (B, M),
    anything behind a request's last block; seq_lens (B,), both of integers. Scores are
    multiplied by `scale`, 1 / √D if None. Returns out (B, H, D), in q's dtype, and
    logsumexp (B, H), in float32 at least, of the scaled scores, natural; for a request
    without keys 0 and -inf.
    """
    each_one = torch.ones_like(seq_lens)
    pool = k_cache, v_cache
    return paged_prefill_gather(q, *pool, block_tables, seq_lens, each_one, scale=scale)


def paged_prefill_gather(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_lens: torch.Tensor,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for any number of new tokens, each of which sees what comes before it.

    q (N, H, D), request after request, query_lens (B,) of each; seq_lens (B,) with the
    new tokens among them, whose keys and values are in the pool already. Returns out
    (N, H, D) and logsumexp (N, H), in dtypes as above.
    """
    (_, H, D), G = q.shape, k_cache.shape[2]
    sum_dtype = torch.promote_types(q.dtype, torch.float32)
    outs, logsumexps = [q[:0]], [q.new_empty(0, H, dtype=sum_dtype)]
    # Scaled before the product: unscaled scores may be too large for half precision.
    queries, lens = (q * _scale(scale, q)).split(query_lens.tolist()), seq_lens.tolist()
    for q_b, block_table, S in zip(queries, block_tables, lens):
        k, v = paged_kv_cache.gather_kv(k_cache, v_cache, block_table, S)  # (S, G, D)
        T, num_rows = len(q_b), H // G * len(q_b)  # of one KV head, a matrix of so many
        grouped = q_b.view(T, G, H // G, D).permute(1, 2, 0, 3)  # (G, H / G, T, D)
        scores = grouped.reshape(G, num_rows, D) @ k.permute(1, 2, 0)
        is_future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
        scores = scores.view(H, T, S).masked_fill(is_future, -math.inf)  # (H, T, S)
        weights = scores.softmax(dim=-1).view(G, num_rows, S)
        out = (weights @ v.transpose(0, 1)).view(H, T, D)
        outs.append(out.transpose(0, 1))
        logsumexps.append(scores.to(sum_dtype).logsumexp(dim=-1).T)
    return torch.cat(outs), torch.cat(logsumexps)


def attend_online(
    q: torch.Tensor, tiles: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one token over keys and values that come in pieces.

    q (H, D), scaled already; tiles: pairs k, v (S, G, D), each with an S of its own,
    which may be 0. Holds one tile's scores at a time, and three running numbers per query
    head: the largest score so far, the sum of all exp(score - largest), and the values'
    sum under these weights. Sums, and what goes into them, are float32 where q has fewer
    bits. Returns out (H, D), in q's dtype, and logsumexp (H,), in that of the sums.
    Without keys out is 0 and logsumexp is -inf.

    >>> one, two = torch.ones(1, 1, 1), torch.full((2, 1, 1), 2.0)
    >>> attend_online(torch.zeros(1, 1), [(one, one), (two, 4 * two)])  # equal weights
    (tensor([[5.6667]]), tensor([1.0986]))
    """
    H, D = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)  # of sums: half is too coarse
    row_max = q.new_full((H, 1), -math.inf, dtype=dtype)
    row_sum = q.new_zeros(H, 1, dtype=dtype)
    acc = q.new_zeros(H, D, dtype=dtype)

    # tile by tile: scores of all heads
    for k, v in tiles:
        if len(k) == 0:  # none of its scores is the largest
            continue
        k, v, G = k.to(dtype), v.to(dtype), k.shape[1]
        grouped = q.view(G, H // G, D).to(dtype)
        scores = (grouped @ k.permute(1, 2, 0)).flatten(0, 1)  # (H, S)

        # rescale what was summed up under another maximum, and add
        new_max = torch.maximum(row_max, scores.amax(dim=-1, keepdim=True))  # (H, 1)
        rescale = (row_max - new_max).exp()  # (H, 1)
        weights = (scores - new_max).exp()  # (H, S)
        row_sum = row_sum * rescale + weights.sum(dim=-1, keepdim=True)  # (H, 1)
        weighted = weights.view(G, H // G, -1) @ v.transpose(0, 1)
        acc = acc * rescale + weighted.flatten(0, 1)  # (H, D)
        row_max = new_max

    # divide, once
    out = (acc / row_sum.clamp(min=torch.finfo(q.dtype).tiny)).to(q.dtype)  # (H, D)
    return out, (row_max + row_sum.log()).squeeze(-1)  # out (H, D), logsumexp (H,)


def paged_decode_online(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, block by block and without a copy: what the kernel does."""
    block_size = k_cache.shape[1]

    def blocks(block_table: torch.Tensor, seq_len: int):
        for i in range(math.ceil(seq_len / block_size)):
            block_id, filled = block_table[i], min(block_size, seq_len - i * block_size)
            yield k_cache[block_id, :filled], v_cache[block_id, :filled]

    out, logsumexp = _empty_results(q)
    for b, (block_table, seq_len) in enumerate(zip(block_tables, seq_lens.tolist())):
        scaled = q[b] * _scale(scale, q)
        out[b], logsumexp[b] = attend_online(scaled, blocks(block_table, seq_len))
    return out, logsumexp


def merge_splits(
    outs: torch.Tensor, logsumexps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all keys, from attention over each of P parts of them.

    outs (B, H, P, D), logsumexps (B, H, P): for a part without keys 0 and -inf. Returns
    out (B, H, D) and logsumexp (B, H), 0 and -inf where no part has keys.

    >>> outs = torch.tensor([5.0, 9.0]).view(1, 1, 2, 1)  # the means of 3 values and of 1
    >>> merge_splits(outs, torch.tensor([3.0, 1.0]).log().view(1, 1, 2))
    (tensor([[[6.]]]), tensor([[1.3863]]))
    """
    logsumexp = logsumexps.logsumexp(dim=-1)  # (B, H)
    is_empty = logsumexp == -math.inf
    weights = logsumexps.softmax(dim=-1).masked_fill(is_empty.unsqueeze(-1), 0)
    out = (weights.unsqueeze(-2) @ outs).squeeze(-2)  # (B, H, D)
    return out, logsumexp


def bytes_moved(
    config: ModelConfig,
    seq_lens: torch.Tensor,
    bytes_per_number: int = 4,
    *,
    is_gathered: bool = False,
) -> int:
    """Bytes that attention of one decode step reads and writes, in one layer.

    seq_lens: int64 (B,), the keys of each request. Read: a query per request and query
    head, and each key and value once. Written: the outputs. With is_gathered keys and
    values are copied into dense pieces first: read, written, and read again. (Block
    tables, lengths and logsumexp do not count.)

    >>> config = ModelConfig(256, 1, 4, 2, d_model=32, d_ff=4, max_seq_len=8)  # D = 8
    >>> bytes_moved(config, torch.tensor([3, 5]))  # 2·2·4·8 + 2·8·2·8 numbers
    1536
    """
    B, num_keys = len(seq_lens), int(seq_lens.sum())
    queries_and_outs = 2 * B * config.num_heads * config.head_dim
    keys_and_values = 2 * num_keys * config.num_kv_heads * config.head_dim
    times = 3 if is_gathered else 1
    return (queries_and_outs + times * keys_and_values) * bytes_per_number


def _empty_results(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for out (B, H, D), in q's dtype, and logsumexp (B, H), in float32 at least."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=dtype)


def _scale(scale: float | None, q: torch.Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale
