"""Chapter 5: attention that reads the blocks where they lie, in torch.

Decoding: one new query of each request, over all of its keys in the pool. These are the
plain twins of the kernel in lib/paged_attention_triton.py, with the same arguments and
the same two results, out and logsumexp: first gather, then attend, as in chapter 4; and
tile by tile with an online softmax (https://arxiv.org/abs/1805.02867), which never has
more than one block's scores.

The logsumexp of a query's scores is what its weights were divided by; partial results
over parts of the keys can be merged if each brings its own.

Read lib/paged_kv_cache.py before.
"""

import math
from collections.abc import Iterable

import torch

from lib import paged_kv_cache


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
    multiplied by `scale`, 1 / √D if None. Returns out (B, H, D) and logsumexp (B, H), of
    the scaled scores, natural; for a request without keys 0 and -inf.
    """
    outs, logsumexps = [], []
    for q_b, block_table, seq_len in zip(q, block_tables, seq_lens.tolist()):
        k, v = paged_kv_cache.gather_kv(k_cache, v_cache, block_table, seq_len)
        group_size = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group_size, dim=1).transpose(0, 1) for x in (k, v))
        scores = (k @ q_b.unsqueeze(-1)).squeeze(-1) * _scale(scale, q)  # (H, S)
        weights = scores.softmax(dim=-1)  # (H, S)
        outs.append((weights.unsqueeze(-2) @ v).squeeze(-2))
        logsumexps.append(scores.logsumexp(dim=-1))
    return torch.stack(outs), torch.stack(logsumexps)


def attend_online(
    q: torch.Tensor, tiles: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one token over keys and values that come in pieces.

    q (H, D), scaled already; tiles: pairs k, v (S, G, D), S of each its own. Holds one
    tile's scores at a time: three running numbers a query head, the largest score so far,
    the sum of all exp(score - largest), and the values' sum under these weights. Returns
    out (H, D) and logsumexp (H,); without tiles 0 and -inf.

    >>> one, two = torch.ones(1, 1, 1), torch.full((2, 1, 1), 2.0)
    >>> attend_online(torch.zeros(1, 1), [(one, one), (two, 4 * two)])  # equal weights
    (tensor([[5.6667]]), tensor([1.0986]))
    """
    H, D = q.shape
    row_max = q.new_full((H, 1), -math.inf)
    row_sum = q.new_zeros(H, 1)
    acc = q.new_zeros(H, D)

    for k, v in tiles:
        G = k.shape[1]
        grouped = q.view(G, H // G, D)
        scores = (grouped @ k.permute(1, 2, 0)).flatten(0, 1)  # (H, S)
        new_max = torch.maximum(row_max, scores.amax(dim=-1, keepdim=True))  # (H, 1)
        rescale = (row_max - new_max).exp()  # (H, 1)
        weights = (scores - new_max).exp()  # (H, S)
        row_sum = row_sum * rescale + weights.sum(dim=-1, keepdim=True)  # (H, 1)
        weighted = weights.view(G, H // G, -1) @ v.transpose(0, 1)
        acc = acc * rescale + weighted.flatten(0, 1)  # (H, D)
        row_max = new_max

    out = acc / row_sum.clamp(min=torch.finfo(q.dtype).tiny)  # (H, D)
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

    results = [
        attend_online(q_b * _scale(scale, q), blocks(block_table, seq_len))
        for q_b, block_table, seq_len in zip(q, block_tables, seq_lens.tolist())
    ]
    outs, logsumexps = zip(*results)
    return torch.stack(outs), torch.stack(logsumexps)


def _scale(scale: float | None, q: torch.Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale
