"""Chapter 4: the same cache in blocks.

Keys and values live in a pool of blocks that all requests share. Beside chapter 3's
cache one thing has changed, the index: token p of a request lies in slot

    block_table[p // block_size] * block_size + p % block_size

To attend, a request's blocks are gathered into one dense piece, which chapter 3's
attention reads. That copy is what chapter 5 does without; until then it is the plain twin
that the kernel has to equal.

Invariant: what a slot holds enters a result only of a request that has its block in its
table, and as many tokens. What lies elsewhere in the pool never does.

Read lib/kv_cache.py and lib/block_manager.py before.
"""

import math
from collections.abc import Callable

import torch

from lib import kv_cache
from lib.block_manager import BlockManager, OutOfBlocksError
from lib.config import ModelConfig
from lib.kv_cache import check_query_lens, new_positions
from lib.model import Attend


def slot_mapping(
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_lens: torch.Tensor,
    block_size: int,
) -> torch.Tensor:
    """The slot of the pool for each of a step's new tokens, request after request.

    block_tables: int64 (B, M), block ids in the order of the text; behind a request's
    last block its row holds anything. seq_lens: tokens of each request after the step,
    query_lens: the new ones; int64 (B,). Slot s is place s % block_size of block
    s // block_size. Returns (N,).

    >>> block_tables = torch.tensor([[7, 2], [4, -1]])
    >>> slot_mapping(block_tables, torch.tensor([6, 3]), torch.tensor([3, 1]), 4)
    tensor([31,  8,  9, 18])
    """
    B = len(seq_lens)
    requests = torch.arange(B, device=seq_lens.device).repeat_interleave(query_lens)
    positions = new_positions(seq_lens, query_lens)  # (N,)
    block_ids = block_tables[requests, positions // block_size]  # (N,)
    return block_ids * block_size + positions % block_size  # (N,)


def write_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
):
    """Write k, v (N, G, D) into the slots (N,) of one layer's pool, in place.

    k_cache, v_cache (num_blocks, block_size, G, D).
    """
    k_cache.view(-1, *k_cache.shape[2:])[slots] = k
    v_cache.view(-1, *v_cache.shape[2:])[slots] = v


def gather_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_len: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one request, in one dense piece, in the order of its text.

    k_cache, v_cache: one layer's pool (num_blocks, block_size, G, D). block_table: int64
    (M,); behind the request's last block it holds anything, also ids that do not exist.
    Returns k, v (S, G, D), S = seq_len.

    >>> k_cache = torch.arange(6.0).view(3, 2, 1, 1)  # three blocks of two tokens
    >>> k, v = gather_kv(k_cache, -k_cache, torch.tensor([2, 0, 99]), seq_len=3)
    >>> k.flatten(), v.flatten()
    (tensor([4., 5., 0.]), tensor([-4., -5., -0.]))
    """
    num_used = math.ceil(seq_len / k_cache.shape[1])
    used = block_table[:num_used]
    k, v = (cache.index_select(0, used).flatten(0, 1) for cache in (k_cache, v_cache))
    return k[:seq_len], v[:seq_len]  # (S, G, D)


def attend_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_lens: torch.Tensor,
) -> torch.Tensor:
    """`kv_cache.attend_cached` over a pool: gather each request, then attend.

    q (N, H, D); k_cache, v_cache (num_blocks, block_size, G, D), the new tokens written
    already; block_tables int64 (B, M); seq_lens, query_lens int64 (B,). Holds the dense
    piece of one request at a time. Returns (N, H, D).
    """
    outs = []
    for b, q_b in enumerate(q.split(query_lens.tolist())):
        k, v = gather_kv(k_cache, v_cache, block_tables[b], int(seq_lens[b]))  # (S, G, D)
        lens = seq_lens[b : b + 1], query_lens[b : b + 1]
        outs.append(kv_cache.attend_cached(q_b, k[None], v[None], *lens))
    return torch.cat(outs)  # (N, H, D)


def paged_utilization(seq_lens: torch.Tensor, block_size: int) -> float:
    """The share of the blocks in use that holds a token, if no block is shared.

    seq_lens: int64 (B,), the tokens of each request, one of which has some.

    >>> paged_utilization(torch.tensor([1, 5]), block_size=4)  # 6 tokens in 1 + 2 blocks
    0.5
    """
    num_blocks = sum(math.ceil(seq_len / block_size) for seq_len in seq_lens.tolist())
    return seq_lens.sum().item() / (num_blocks * block_size)


class PagedKVCache:
    """A pool of `num_blocks` blocks, and the manager that hands them out.

    k_cache, v_cache (L, num_blocks, block_size, G, D).
    Requests 0 to batch_size - 1 are there from the start, empty. Others come, fork and go
    through `manager`; a step is over all that live, in the order of their arrival.

    decode: for steps that bring one token a request, attention that reads the blocks
    where they lie, with the arguments of chapter 5's `paged_decode`. None gathers always.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        num_blocks: int,
        block_size: int = 16,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        decode: Callable | None = None,
    ):
        if batch_size < 0:
            raise ValueError(f"batch_size: expected at least 0, got {batch_size}")
        self.manager = BlockManager(num_blocks, block_size)
        for request_id in range(batch_size):
            self.manager.allocate(request_id, 0)
        shape = (
            config.num_layers,
            num_blocks,
            block_size,
            config.num_kv_heads,
            config.head_dim,
        )
        self.config = config
        self.decode = decode
        self.k_cache = torch.zeros(shape, dtype=dtype, device=device)
        self.v_cache = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def seq_lens(self) -> torch.Tensor:
        """Tokens of each live request, int64 (B,)."""
        lens = list(self.manager.seq_lens.values())
        return torch.tensor(lens, dtype=torch.int64, device=self.k_cache.device)  # (B,)

    @property
    def block_tables(self) -> torch.Tensor:
        """Block ids of each live request, int64 (B, M); -1 behind a request's last."""
        tables = list(self.manager.block_tables.values())
        M = max((len(table) for table in tables), default=0)
        padded = [table + [-1] * (M - len(table)) for table in tables]
        padded = torch.tensor(padded, dtype=torch.int64, device=self.k_cache.device)
        return padded.view(len(tables), M)  # (B, M)

    @property
    def reserved_bytes(self) -> int:
        """Of the blocks in use; the rest of the pool is anybody's."""
        manager = self.manager
        num_used = manager.num_blocks - len(manager.free_block_ids)
        return self._token_bytes(num_used * manager.block_size)

    @property
    def used_bytes(self) -> int:
        """Of the tokens in those blocks."""
        return self._token_bytes(self.manager.num_filled_slots())

    def check_room(self, query_lens: torch.Tensor):
        """OutOfBlocksError if all that are free are not enough for all of these."""
        manager = self.manager
        check_query_lens(query_lens, self.seq_lens)
        needed = manager.blocks_needed(
            dict(zip(manager.block_tables, query_lens.tolist()))
        )
        if needed > len(manager.free_block_ids):
            raise OutOfBlocksError(needed, len(manager.free_block_ids))

    def extend(self, query_lens: torch.Tensor) -> Attend:
        """As `KVCache.extend`: takes blocks, copies the shared ones it is to write."""
        self.check_room(query_lens)
        for request_id, num_tokens in zip(
            list(self.manager.block_tables), query_lens.tolist()
        ):
            copied = self.manager.append(request_id, num_tokens)
            if copied:
                source, target = copied
                self.k_cache[:, target] = self.k_cache[:, source]
                self.v_cache[:, target] = self.v_cache[:, source]
        block_tables, seq_lens = self.block_tables, self.seq_lens
        slots = slot_mapping(block_tables, seq_lens, query_lens, self.manager.block_size)
        is_decode = self.decode is not None and set(query_lens.tolist()) == {1}
        index = block_tables.int(), seq_lens.int()

        def attend(layer, q, k, v):
            layer_kv = self.k_cache[layer], self.v_cache[layer]
            write_kv(*layer_kv, k, v, slots)
            if is_decode:
                return self.decode(q, *layer_kv, *index)[0]  # (N, H, D), N = B
            return attend_paged(q, *layer_kv, block_tables, seq_lens, query_lens)

        return attend

    def _token_bytes(self, num_tokens: int) -> int:
        return kv_cache.kv_cache_bytes(self.config, num_tokens, self.k_cache.itemsize)
