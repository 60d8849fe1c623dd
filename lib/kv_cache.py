"""Chapter 3: keep keys and values instead of computing them again.

A token's key and value depend on it and on what came before, never on what comes after.
So each is computed once, written into a cache, and read at every later step: this
replaces `generate_recompute`'s pass over the whole text by one over the new tokens.

A step may bring any number of new tokens for each request of a batch: all of a prompt
(prefill), one (decode), or none. They come flat, request after request, N in all, so that
nothing is padded. Invariant: after a step, request b has its `seq_lens[b]` keys at
`k_cache[:, b, :seq_lens[b]]`, and what lies behind them is never read.

Read lib/model.py, for the seam `attend`, and lib/generate.py before.
"""

from typing import Protocol

import torch

from lib.config import ModelConfig
from lib.model import Attend


class CacheFullError(Exception):
    """A request would outgrow what was reserved for it."""

    def __init__(self, request: int, needed: int, reserved: int):
        super().__init__(
            f"request {request}: expected at most {reserved} tokens, as many as were "
            f"reserved, got {needed}"
        )


class KVCache(Protocol):
    """What generation needs of a cache of B requests.

    A step that is interrupted, by a key or by an error inside the model, spoils it: the
    new tokens are counted, and their keys may be missing.
    """

    config: ModelConfig  # of the model whose keys and values it takes
    k_cache: torch.Tensor
    seq_lens: torch.Tensor  # int64 (B,), the tokens that each request has in the cache
    reserved_bytes: int  # that nobody else can use
    used_bytes: int  # of them, those that hold a token

    def check_room(self, query_lens: torch.Tensor):
        """Raise unless query_lens[b] more tokens of each request fit."""

    def extend(self, query_lens: torch.Tensor) -> Attend:
        """Make room for the next tokens, int64 (B,); attention for a step over them.

        What it returns takes q (N, H, D) and k, v (N, G, D), N = query_lens.sum(). Raises
        as check_room does, and then nothing has changed.
        """


def kv_cache_bytes(
    config: ModelConfig, num_tokens: int, bytes_per_number: int = 4
) -> int:
    """Bytes of the keys and values of `num_tokens` tokens, in all layers.

    >>> from lib.config import TINY  # 2 layers, 2 KV heads of head_dim 8
    >>> kv_cache_bytes(TINY, num_tokens=3)  # 2 · 2 keys and values a token, of 8 numbers
    768
    """
    numbers_per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return num_tokens * numbers_per_token * bytes_per_number


def new_positions(seq_lens: torch.Tensor, query_lens: torch.Tensor) -> torch.Tensor:
    """The positions of a step's new tokens, each counted in its own request.

    seq_lens: tokens of each request after the step, query_lens: the new ones among them;
    both int64 (B,). Returns (N,).

    >>> new_positions(torch.tensor([3, 5]), torch.tensor([3, 1]))
    tensor([0, 1, 2, 4])
    """
    first_rows = query_lens.cumsum(0) - query_lens  # (B,)
    shifts = (seq_lens - query_lens - first_rows).repeat_interleave(query_lens)  # (N,)
    return shifts + torch.arange(len(shifts), device=shifts.device)  # (N,)


def append_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor,
    query_lens: torch.Tensor,
):
    """Write the keys and values of a step's new tokens into one layer's cache, in place.

    k_cache, v_cache (B, S, G, D); k, v (N, G, D), request after request. seq_lens: tokens
    of each request after the step, query_lens: the new ones; both int64 (B,). Request b's
    new tokens go to its last query_lens[b] places: from seq_lens[b] - query_lens[b] on.

    >>> k_cache, v_cache = torch.zeros(2, 4, 1, 1), torch.zeros(2, 4, 1, 1)
    >>> k = torch.tensor([7.0, 8.0, 9.0]).view(3, 1, 1)  # one for request 0, two for 1
    >>> append_kv(k_cache, v_cache, k, k, torch.tensor([3, 2]), torch.tensor([1, 2]))
    >>> k_cache.view(2, 4)
    tensor([[0., 0., 7., 0.],
            [8., 9., 0., 0.]])
    """
    B = len(seq_lens)
    requests = torch.arange(B, device=k.device).repeat_interleave(query_lens)  # (N,)
    positions = new_positions(seq_lens, query_lens)  # (N,)
    assert len(k) == len(positions), f"expected {len(positions)} keys, got {len(k)}"
    k_cache[requests, positions] = k
    v_cache[requests, positions] = v


def attend_cached(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seq_lens: torch.Tensor,
    query_lens: torch.Tensor,
) -> torch.Tensor:
    """Causal attention of a step's new queries over all keys of their own request.

    q (N, H, D), request after request; k_cache, v_cache (B, S, G, D), the new tokens
    written already; seq_lens, query_lens int64 (B,), as in `append_kv`. Query head h
    reads KV head h // (H / G), where it is stored: no copies. Returns (N, H, D).

    >>> k_cache, v_cache = torch.zeros(1, 4, 1, 1), torch.zeros(1, 4, 1, 1)
    >>> v_cache[0, :3, 0, 0] = torch.tensor([3.0, 6.0, 9.0])  # equal keys: equal weights
    >>> q = torch.ones(2, 1, 1)  # queries at positions 1 and 2
    >>> attend_cached(q, k_cache, v_cache, torch.tensor([3]), torch.tensor([2])).flatten()
    tensor([4.5000, 6.0000])
    """
    H, D = q.shape[1:]
    G = k_cache.shape[-2]
    out = torch.empty_like(q)

    start = 0
    for b, (S, T) in enumerate(zip(seq_lens.tolist(), query_lens.tolist())):
        q_b = q[start : start + T]  # (T, H, D)
        k, v = (cache[b, :S].transpose(0, 1) for cache in (k_cache, v_cache))  # (G, S, D)

        # Heads that read the same keys: their queries are the rows of one matrix.
        grouped = (q_b / D**0.5).view(T, G, H // G, D).permute(1, 2, 0, 3)
        scores = grouped.flatten(1, 2) @ k.transpose(1, 2)  # (G, H/G*T, S)
        scores = scores.unflatten(1, (H // G, T))  # (G, H/G, T, S)
        queries_at = torch.arange(S - T, S, device=q.device).unsqueeze(-1)  # (T, 1)
        is_future = torch.arange(S, device=q.device) > queries_at  # (T, S)
        weights = scores.masked_fill(is_future, float("-inf")).softmax(dim=-1)
        out_b = weights.flatten(1, 2) @ v  # (G, H/G*T, D)
        out_b = out_b.unflatten(1, (H // G, T)).permute(2, 0, 1, 3)  # (T, G, H/G, D)
        out[start : start + T] = out_b.flatten(1, 2)

        start += T
    return out  # (N, H, D)


def kv_utilization(seq_lens: torch.Tensor, max_seq_len: int) -> float:
    """The share of a contiguous cache that holds a token, at this instant.

    seq_lens: int64 (B,), the tokens of each request, with max_seq_len reserved for each.

    >>> kv_utilization(torch.tensor([1, 3]), max_seq_len=8)  # 4 of 16
    0.25
    """
    return seq_lens.sum().item() / (len(seq_lens) * max_seq_len)


class ContiguousKVCache:
    """Room for `max_seq_len` tokens of each of B requests, reserved at once.

    k_cache, v_cache (L, B, S, G, D), S = max_seq_len.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_seq_len: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        for name, value in (("batch_size", batch_size), ("max_seq_len", max_seq_len)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        shape = (
            config.num_layers,
            batch_size,
            max_seq_len,
            config.num_kv_heads,
            config.head_dim,
        )
        self.config = config
        self.k_cache = torch.zeros(shape, dtype=dtype, device=device)
        self.v_cache = torch.zeros(shape, dtype=dtype, device=device)
        self.seq_lens = torch.zeros(batch_size, dtype=torch.int64, device=device)

    @property
    def reserved_bytes(self) -> int:
        return self.k_cache.nbytes + self.v_cache.nbytes

    @property
    def used_bytes(self) -> int:
        num_tokens = int(self.seq_lens.sum())
        return kv_cache_bytes(self.config, num_tokens, self.k_cache.itemsize)

    def check_room(self, query_lens: torch.Tensor):
        """CacheFullError names the first request that query_lens more would overfill."""
        check_query_lens(query_lens, self.seq_lens)
        reserved = self.k_cache.shape[2]
        for b, needed in enumerate((self.seq_lens + query_lens).tolist()):
            if needed > reserved:
                raise CacheFullError(b, needed, reserved)

    def extend(self, query_lens: torch.Tensor) -> Attend:
        """As `KVCache.extend`: the places are there already, and are only counted."""
        self.check_room(query_lens)
        self.seq_lens = seq_lens = self.seq_lens + query_lens

        def attend(layer, q, k, v):
            layer_kv = self.k_cache[layer], self.v_cache[layer]
            append_kv(*layer_kv, k, v, seq_lens, query_lens)
            return attend_cached(q, *layer_kv, seq_lens, query_lens)

        return attend

    def free(self, request: int):
        """Forget a request: its row is empty, and ready for the next one.

        Raises ValueError for a row that is not there, or that is empty already.
        """
        if not 0 <= request < len(self.seq_lens) or self.seq_lens[request] == 0:
            live = self.seq_lens.nonzero().flatten().tolist()
            raise ValueError(f"request: expected one of {live}, got {request}")
        # The step before may still hold the old one.
        self.seq_lens = self.seq_lens.clone()
        self.seq_lens[request] = 0


def check_query_lens(query_lens: torch.Tensor, seq_lens: torch.Tensor):
    """Raise ValueError unless there is one count of new tokens for each request."""
    if query_lens.dtype != torch.int64 or query_lens.shape != seq_lens.shape:
        raise ValueError(
            f"query_lens: expected int64 ({len(seq_lens)},), one entry a request, "
            f"got {query_lens.dtype} {tuple(query_lens.shape)}"
        )
    if query_lens.device != seq_lens.device:
        raise ValueError(
            f"query_lens: expected on {seq_lens.device}, as the cache, "
            f"got on {query_lens.device}"
        )
    if (query_lens < 0).any():
        raise ValueError(f"query_lens: expected at least 0, got {query_lens.tolist()}")
