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

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
import torch.nn.functional as F

from lib import kv_cache
from lib.block_manager import BlockManager, Mark, OutOfBlocksError
from lib.config import ModelConfig
from lib.kv_cache import (
    PLAIN,
    KVCache,
    KVFormat,
    check_format,
    check_query_lens,
    new_positions,
    split_decodes,
)
from lib.model import Attend

# That `attend_decode_paged` copies at one time. Tried with 8 requests of 1,024 tokens:
# 2**22 and 2**23 were faster than 2**20 and 2**21, on one processor.
GATHER_BYTES = 2**22


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

    k_cache, v_cache (num_blocks, block_size, G, D). Raises IndexError on a CPU for a slot
    that does not exist, before anything is written: on a GPU looking would mean waiting.
    """
    num_slots = k_cache.shape[0] * k_cache.shape[1]
    if not slots.is_cuda and len(slots) > 0:
        first, last = (int(bound) for bound in slots.aminmax())
        if first < 0 or last >= num_slots:
            raise IndexError(
                f"slots: expected 0 to {num_slots - 1}, got {first} to {last}"
            )
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
    attend: Callable | None = None,
) -> torch.Tensor:
    """`kv_cache.attend_cached` over a pool: gather each request, then attend.

    q (N, H, D); k_cache, v_cache (num_blocks, block_size, G, D), the new tokens written
    already; block_tables int64 (B, M); seq_lens, query_lens int64 (B,), best on the CPU,
    where looking at them costs no wait. attend: with arguments and result of
    `attend_cached`, which is called if it is None. Holds the dense piece of one request
    at a time. Returns (N, H, D).
    """
    attend = attend or kv_cache.attend_cached
    lens, counts = seq_lens.tolist(), query_lens.tolist()
    outs = [q[:0]]
    for b, (q_b, block_table) in enumerate(zip(q.split(counts), block_tables)):
        if counts[b] == 0:  # it rests
            continue
        k, v = gather_kv(k_cache, v_cache, block_table, lens[b])  # (S, G, D) each
        S, T = seq_lens[b : b + 1], query_lens[b : b + 1]  # (1,) each
        outs.append(attend(q_b, k[None], v[None], S, T))
    return torch.cat(outs)  # (N, H, D)


def attend_decode_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """`kv_cache.attend_decode` over a pool: gather some requests, attend, and go on.

    q (B, H, D), one new token of each request; k_cache, v_cache (num_blocks, block_size,
    G, D); block_tables int64 (B, M) of blocks that exist, after a request's last any of
    its own; mask bool (B, 1, 1, M · block_size), as of `decode_mask`. As many requests
    are gathered together as GATHER_BYTES hold, and one at least. Returns (B, H, D).
    """
    bytes_per_request = 2 * block_tables.shape[1] * k_cache[0].nbytes
    at_once = max(GATHER_BYTES // bytes_per_request, 1)

    def dense(cache, ids):
        blocks = cache.index_select(0, ids.flatten())
        return blocks.view(len(ids), -1, *cache.shape[2:])  # (B, S, G, D)

    if len(q) <= at_once:
        kv = dense(k_cache, block_tables), dense(v_cache, block_tables)
        return kv_cache.attend_decode(q, *kv, mask)
    outs = []
    for some in zip(*(x.split(at_once) for x in (q, block_tables, mask))):
        q_some, ids, mask_some = some
        kv = dense(k_cache, ids), dense(v_cache, ids)
        outs.append(kv_cache.attend_decode(q_some, *kv, mask_some))
        del kv  # before the next are copied
    return torch.cat(outs)


def paged_utilization(seq_lens: torch.Tensor, block_size: int) -> float:
    """The share of the blocks in use that holds a token, if no block is shared.

    seq_lens: int64 (B,), the tokens of each request, one of which has some.

    >>> paged_utilization(torch.tensor([1, 5]), block_size=4)  # 6 tokens in 1 + 2 blocks
    0.5
    """
    num_blocks = sum(math.ceil(seq_len / block_size) for seq_len in seq_lens.tolist())
    return seq_lens.sum().item() / (num_blocks * block_size)


class PagedKVCache(KVCache):
    """A pool of `num_blocks` blocks, and the manager that hands them out.

    k_cache, v_cache (L, num_blocks, block_size, G, D). Rows are the live requests, in the
    order of their arrival; when one is freed, those behind it move up.

    fused_decode: whether all requests that bring one token in a step are gathered for one
    call of torch's fused attention, `attend_decode_paged`, instead of one by one.
    decode, prefill: attention that reads the blocks where they lie, with arguments and
    results of chapter 5's `paged_decode`, for steps in which every request brings one
    token, and `paged_prefill`, for all others. Where one is missing its steps gather.
    format: what keys and values become in memory; without those three, if it is not the
    plain one.
    """

    can_fork = True

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int = 16,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        fused_decode: bool = False,
        decode: Callable | None = None,
        prefill: Callable | None = None,
        format: KVFormat = PLAIN,
    ):
        self.manager = BlockManager(num_blocks, block_size)
        check_format(
            format, config, fused_decode=fused_decode, decode=decode, prefill=prefill
        )
        self.config, self.dtype, self.format = config, dtype, format
        self.fused_decode, self.decode, self.prefill = fused_decode, decode, prefill
        places = num_blocks, block_size
        self.k_cache, self.v_cache = format.empty(config, places, dtype, device)
        self.request_ids = []
        self._seq_lens = torch.zeros(0, dtype=torch.int64, device=device)
        # Kept between steps, so that a step writes down what it changed and no more.
        self._tables = torch.zeros(0, 1, dtype=torch.int64, device=device)
        self._marks: dict[Hashable, Mark] = {}

    @property
    def block_tables(self) -> torch.Tensor:
        """Block ids of each live request, int64 (B, M), -1 behind a request's last: a
        copy."""
        return self._used_tables().clone()

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

    @property
    def block_size(self) -> int:
        return self.manager.block_size

    @property
    def num_blocks(self) -> int:
        return self.manager.num_blocks

    @property
    def capacity(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def num_free_blocks(self) -> int:
        return len(self.manager.free_block_ids)

    def num_blocks_of(self, request_id: Hashable) -> int:
        """Those of its table, without the last if it has room that others use too."""
        manager = self.manager
        manager.check_live(request_id)
        block_table = manager.block_tables[request_id]
        has_room = manager.seq_lens[request_id] % manager.block_size > 0
        is_shared = has_room and manager.ref_count[block_table[-1]] > 1
        return len(block_table) - is_shared

    def blocks_needed(self, num_new_tokens: Mapping[Hashable, int]) -> int:
        return self.manager.blocks_needed(num_new_tokens)

    def fork(
        self, parent_id: Hashable, child_id: Hashable, token_ids: Sequence[int] = ()
    ):
        """Begin a request with the tokens of a live one, in the same blocks.

        token_ids: as in `begin`. Raises ValueError if the parent is not live, or the
        child is.
        """
        self._check_ready("fork")
        row = self._row(parent_id)
        self._check_new(child_id)
        self._check_manager()
        try:
            self.manager.fork(parent_id, child_id)
            self._add_row(child_id, self._seq_lens[row], token_ids)
        except BaseException:
            self._drop(child_id)
            raise

    def check_room(self, query_lens: torch.Tensor):
        """OutOfBlocksError if all that are free are not enough for all of these."""
        manager = self.manager
        check_query_lens(query_lens, self.seq_lens)
        self._check_manager()
        needed = manager.blocks_needed(dict(zip(self.request_ids, query_lens.tolist())))
        if needed > len(manager.free_block_ids):
            raise OutOfBlocksError(needed, len(manager.free_block_ids))

    def _check_new(self, request_id: Hashable):
        super()._check_new(request_id)
        if request_id in self.manager.block_tables:
            raise ValueError(
                f"request {request_id!r}: expected one that is new to the manager too, "
                f"got one that it has for somebody else"
            )

    def _begin_row(self, request_id: Hashable, token_ids: Sequence[int]):
        self.manager.allocate(request_id, 0)
        self._add_row(request_id, self._seq_lens.new_zeros(()), token_ids)

    def _free_row(self, row: int):
        request_id = self.request_ids[row]
        if request_id in self.manager.block_tables:
            self.manager.free(request_id)
        rest = [b for b in range(len(self.request_ids)) if b != row]
        request_ids = [self.request_ids[b] for b in rest]
        # In one line: an interrupt comes before it or after it.
        self.request_ids, self._marks, self._tables, self._seq_lens = (
            request_ids,
            {request_id: self._marks[request_id] for request_id in request_ids},
            self._tables[rest],
            self._seq_lens[rest],
        )

    def _drop(self, request_id: Hashable):
        # By what every manager has, whoever wrote its `allocate`, `fork` and `free`.
        self.manager.block_tables.pop(request_id, None)
        self.manager.seq_lens.pop(request_id, None)
        self.manager.take_back({})
        super()._drop(request_id)

    def _mark(self) -> dict[Hashable, Mark]:
        return dict(self._marks)

    def _open_step(self, query_lens: torch.Tensor) -> Attend:
        counts = query_lens.tolist()
        for row, num_tokens in enumerate(counts):
            if num_tokens > 0:
                self._append(row, num_tokens)

        seq_lens = self._seq_lens + query_lens
        block_tables = self._used_tables()
        slots = slot_mapping(block_tables, seq_lens, query_lens, self.manager.block_size)
        is_decode = set(counts) == {1}
        in_place, index = self.prefill, [block_tables, seq_lens, query_lens]
        if is_decode and self.decode is not None:
            in_place, index = self.decode, index[:2]
        if in_place is not None:
            index = [x.int() for x in index]
        elif self.fused_decode and (step := split_decodes(query_lens)) is not None:
            tables = block_tables[step.rows]
            own = tables[:, :1]  # takes the place of -1; the mask hides it
            tables = torch.where(tables < 0, own, tables)
            num_places = tables.shape[1] * self.manager.block_size
            mask = kv_cache.decode_mask(seq_lens[step.rows], num_places)
        else:
            step = None
        # Once per step, not per layer: on a GPU each look at a number is a wait.
        if in_place is None and (step is None or step.is_theirs is not None):
            other_lens = query_lens if step is None else step.other_lens
            lens_on_cpu = seq_lens.cpu(), other_lens.cpu()

        def attend(layer, q, k, v):
            layer_kv = self.k_cache[layer], self.v_cache[layer]
            write_kv(*layer_kv, *self.format.encode(layer, k, v), slots)
            if in_place is not None:
                return in_place(q, *layer_kv, *index)[0]  # (N, H, D)
            if step is None:
                attend_dense = functools.partial(self.format.attend, layer)
                return attend_paged(
                    q, *layer_kv, block_tables, *lens_on_cpu, attend_dense
                )
            return step.attend(
                q,
                lambda q: attend_decode_paged(q, *layer_kv, tables, mask),
                lambda q: attend_paged(q, *layer_kv, block_tables, *lens_on_cpu),
            )

        return attend

    def _append(self, row: int, num_tokens: int):
        """Blocks for more tokens of a request; a shared one that they enter is copied."""
        request_id = self.request_ids[row]
        copied = self.manager.append(request_id, num_tokens)
        before = self._marks[request_id]
        self._marks[request_id] = mark = self.manager.mark(request_id)
        if mark.last_block_id == before.last_block_id:
            return
        self._write_row(row, max(before.num_blocks - 1, 0))
        self._clear(mark.last_block_id, 0)
        if copied:
            source, target = copied
            num_filled = before.seq_len % self.manager.block_size
            for cache in (self.k_cache, self.v_cache):
                cache[:, target, :num_filled] = cache[:, source, :num_filled]

    def _take_back(self, marks: dict[Hashable, Mark]):
        self.manager.take_back(marks)
        self._marks = marks  # if the manager's are others, the next step finds it
        for row in range(len(self.request_ids)):
            self._tables[row] = -1
            self._write_row(row, 0)
        for mark in marks.values():
            num_filled = mark.seq_len % self.manager.block_size
            if num_filled:
                self._clear(mark.last_block_id, num_filled)

    def _clear(self, block_id: int, start: int):
        """Zeros from place `start` on: what a mask hides must be a number too."""
        for cache in (self.k_cache, self.v_cache):
            cache[:, block_id, start:] = 0

    def _add_row(
        self, request_id: Hashable, seq_len: torch.Tensor, token_ids: Sequence[int]
    ):
        # In one line, as in `_free_row`.
        self.request_ids, self._marks, self._tables, self._seq_lens = (
            [*self.request_ids, request_id],
            {**self._marks, request_id: self.manager.mark(request_id)},
            F.pad(self._tables, (0, 0, 0, 1), value=-1),
            torch.cat([self._seq_lens, seq_len.view(1)]),
        )
        self._write_row(len(self.request_ids) - 1, 0)

    def _write_row(self, row: int, start: int):
        """Copy a request's table into the tensor, from its entry `start` on."""
        block_table = self.manager.block_tables[self.request_ids[row]]
        missing = len(block_table) - self._tables.shape[1]
        if missing > 0:  # at least twice as wide, so that it happens seldom
            more = max(missing, self._tables.shape[1])
            self._tables = F.pad(self._tables, (0, more), value=-1)
        new_ids = torch.tensor(block_table[start:], dtype=torch.int64)
        self._tables[row, start : len(block_table)] = new_ids.to(self._tables.device)

    def _used_tables(self) -> torch.Tensor:
        """Of the tables that are kept, as many columns as the longest request needs."""
        M = max((mark.num_blocks for mark in self._marks.values()), default=0)
        return self._tables[:, :M]

    def _check_manager(self):
        """Raise RuntimeError where the manager was called behind the cache's back."""
        manager = self.manager
        for request_id, mark in self._marks.items():
            if (
                manager.block_tables.get(request_id) is not mark.block_table
                or manager.mark(request_id) != mark
            ):
                raise RuntimeError(
                    f"request {request_id!r}: expected its blocks as the cache's last "
                    f"step left them, got them changed in the manager: begin, fork and "
                    f"free requests by the cache's own methods"
                )

    def _token_bytes(self, num_tokens: int) -> int:
        itemsize = self.dtype.itemsize
        return num_tokens * self.format.bytes_per_token(self.config, itemsize)
