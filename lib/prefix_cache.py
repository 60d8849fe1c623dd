"""Chapter 6: find the beginning of a text that somebody has computed before.

Many prompts begin alike: the same instructions, the same document, the same talk up to
the last answer. A full block's keys and values depend on its tokens and on all before
them, so a hash over both is a name by which the next request finds it. A block that
nobody uses any more keeps its name and its content while it lies idle, until the pool
has nothing else to hand out. This replaces the free list of lib/block_manager.py.

Invariant: a block with a name is full, computed, and never written to; it is idle, or
stands in `ref_count` tables. An idle block counts as free.

This is automatic prefix caching, after vLLM's
(https://docs.vllm.ai/en/latest/design/prefix_caching/); unlike there, a block is found
only after the step that fills it, and tokens are compared too. RadixAttention in SGLang
(https://arxiv.org/abs/2312.07104) keeps a tree of texts instead of hashes. Read
lib/block_manager.py and lib/paged_kv_cache.py before.
"""

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from lib.block_manager import BlockManager
from lib.config import ModelConfig
from lib.paged_kv_cache import PagedKVCache

# `evict` chooses among so many of the blocks that have been idle longest. All others were
# used after them, so it would choose the same of all; but this takes the same time in any
# pool.
EVICT_AMONG = 16


def block_hashes(
    token_ids: Sequence[int], block_size: int, previous: bytes = b""
) -> list[bytes]:
    """A hash for each full block of a text: over its tokens and the hash before it.

    So two blocks have the same hash if their texts are equal from the beginning on.
    previous: the hash of what comes before token_ids, if they go on with a text. Equal in
    every process, which Python's own `hash` is not for texts and bytes.

    >>> first, second = block_hashes([5, 6, 7, 8, 9], block_size=2)  # 9 fills no block
    >>> block_hashes([5, 6, 1, 1], 2)[0] == first  # the same beginning
    True
    >>> block_hashes([0, 0, 7, 8], 2)[1] == second  # the same tokens behind others
    False
    >>> block_hashes([7, 8], 2, previous=first) == [second]
    True
    """
    hashes = []
    for end in range(block_size, len(token_ids) + 1, block_size):
        block = token_ids[end - block_size : end]
        as_bytes = struct.pack(f"<{block_size}q", *block)  # int64 each
        previous = hashlib.sha256(previous + as_bytes).digest()
        hashes.append(previous)
    return hashes


def find_prefix(
    hashes: Sequence[bytes],
    block_of_hash: Mapping[bytes, int],
    num_tokens: int,
    block_size: int,
) -> list[int]:
    """The blocks that are there already for the longest possible beginning of a text.

    hashes: those of the text's full blocks. num_tokens: of the text; one of them at least
    is left to compute, since the next token is sampled from its logits. So a text that is
    there to its end gets one block less.

    >>> find_prefix(["a", "b", "c"], {"a": 4, "b": 9}, num_tokens=7, block_size=2)
    [4, 9]
    >>> find_prefix(["a", "b", "c"], {"b": 9, "c": 1}, num_tokens=7, block_size=2)
    []
    >>> find_prefix(["a", "b"], {"a": 4, "b": 9}, num_tokens=4, block_size=2)
    [4]
    """
    block_ids = []
    for block_hash in hashes[: max(num_tokens - 1, 0) // block_size]:
        if block_hash not in block_of_hash:
            break
        block_ids.append(block_of_hash[block_hash])
    return block_ids


def evict(idle: Mapping[int, tuple[int, int]]) -> int:
    """Which of the blocks that nobody uses is given away next; only says which.

    idle: of one block at least (last_used, depth), by block id: when its last user ended
    (larger is later), and which block of its text it is, from 0. The block that was not
    used for longest goes. Blocks of one request became idle at the same time: of these
    the deepest goes, since without its predecessors a block is never found.

    >>> evict({7: (1, 0), 3: (1, 1), 5: (2, 4)})
    3
    """
    return min(idle, key=lambda block_id: (idle[block_id][0], -idle[block_id][1]))


@dataclass(frozen=True)
class Name:
    """By what a block is found, and what it holds.

    Equal tokens behind the same predecessor are the same text from its beginning on. So
    whoever compares these two never takes a block for another, whatever the hashes do.
    """

    block_hash: bytes
    token_ids: tuple[int, ...]
    depth: int  # which block of its text it is, from 0
    number: int  # given once, from 1 on
    previous: int  # the number of the name before it in the text, 0 for none

    def is_of(self, token_ids: Sequence[int], previous: "Name | None") -> bool:
        """Whether it is that of these tokens, behind the block with that name."""
        number = previous.number if previous else 0
        return self.token_ids == as_ints(token_ids) and self.previous == number


class BlockNames:
    """The names that blocks have now: by hash which block, by block which name."""

    def __init__(self):
        self.block_of_hash: dict[bytes, int] = {}
        self.name_of_block: dict[int, Name] = {}
        self.num_given = 0

    def find(self, token_ids: Sequence[int], block_size: int) -> list[int]:
        """The blocks that hold the beginning of a text, without its last token."""
        hashes = block_hashes(token_ids, block_size)
        num_tokens = len(token_ids)
        found = find_prefix(hashes, self.block_of_hash, num_tokens, block_size)
        previous = None
        for i, block_id in enumerate(found):
            name = self.name_of_block.get(block_id)
            block = token_ids[i * block_size : (i + 1) * block_size]
            if name is None or not name.is_of(block, previous):  # hashes collide
                return found[:i]
            previous = name
        return found

    def give(
        self, block_id: int, token_ids: Sequence[int], previous: Name | None
    ) -> Name:
        """A full block's name, and that of a block that has it already, if there is one.

        An interrupt at any line leaves the block with its name, or without any: the name
        comes before the hash by which it is found, and goes after it.
        """
        before, depth, number = b"", 0, 0
        if previous:
            before, depth = previous.block_hash, previous.depth + 1
            number = previous.number
        (block_hash,) = block_hashes(token_ids, len(token_ids), before)
        other = self.block_of_hash.get(block_hash)
        if other is not None:
            if self.name_of_block[other].is_of(token_ids, previous):
                return self.name_of_block[other]
            self.forget(other)  # of another text, or one whose beginning was evicted
        self.forget(block_id)
        self.num_given += 1
        name = Name(block_hash, as_ints(token_ids), depth, self.num_given, number)
        self.name_of_block[block_id] = name
        self.block_of_hash[block_hash] = block_id
        return name

    def has(self, block_id: int) -> bool:
        """Whether a block can be found."""
        name = self.name_of_block.get(block_id)
        return name is not None and self.block_of_hash.get(name.block_hash) == block_id

    def forget(self, block_id: int):
        """From now on a block is not found: it may be written to."""
        if self.has(block_id):
            del self.block_of_hash[self.name_of_block[block_id].block_hash]
        self.name_of_block.pop(block_id, None)


class FreeBlocks:
    """The free list of a manager that remembers: a stack, as the plain one.

    On top are blocks that hold nothing that can be found; below them those that lie idle,
    and there the next one to be given away comes first.
    """

    def __init__(self, block_ids: Iterable[int], names: BlockNames):
        self.empty = list(block_ids)
        # (last_used, depth), as `evict` has it. In the order in which they became idle.
        self.idle: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self.names = names
        self.clock = 0  # how many requests have ended

    def __len__(self) -> int:
        return len(self.empty) + len(self.idle)

    def __iter__(self) -> Iterator[int]:
        """As a list has them: the next one to be taken comes last."""
        yield from reversed(self.idle)
        yield from self.empty

    def __getitem__(self, index: int | slice) -> int | list[int]:
        """Of a copy: for those who look."""
        return list(self)[index]

    def append(self, block_id: int):
        """Nobody uses it any more. With a name it becomes idle."""
        if self.names.has(block_id):
            depth = self.names.name_of_block[block_id].depth
            self.idle[block_id] = self.clock, depth
        else:
            self.empty.append(block_id)

    def __iadd__(self, block_ids: Iterable[int]) -> "FreeBlocks":
        for block_id in block_ids:
            self.append(block_id)
        return self

    def pop(self) -> int:
        """Take one: an empty one, or else an idle one, which then has no name."""
        if self.empty or not self.idle:
            return self.empty.pop()
        longest_idle = dict(islice(self.idle.items(), EVICT_AMONG))
        block_id = evict(longest_idle)
        if block_id not in longest_idle:
            raise ValueError(
                f"evict: expected one of the blocks {list(longest_idle)}, got {block_id}"
            )
        self.names.forget(block_id)  # first: what is taken is about to be written to
        del self.idle[block_id]
        return block_id


class RememberingBlockManager(BlockManager):
    """A manager that hands blocks with a name to whoever has the same text."""

    def __init__(self, num_blocks: int, block_size: int):
        super().__init__(num_blocks, block_size)
        self.names = BlockNames()
        self.free_block_ids = FreeBlocks(self.free_block_ids, self.names)

    def share(self, request_id: Hashable, block_ids: Sequence[int]):
        """Begin the table of a request that has no tokens yet with these full blocks."""
        for block_id in block_ids:
            self.ref_count[block_id] += 1
            self.block_tables[request_id].append(block_id)
            self.free_block_ids.idle.pop(block_id, None)
        self.seq_lens[request_id] = len(block_ids) * self.block_size

    def free(self, request_id: Hashable):
        """As a plain manager; blocks with a name become idle, the end of a text first."""
        free = self.free_block_ids
        free.clock += 1
        block_table = self.block_tables.get(request_id, [])
        super().free(request_id)
        for block_id in reversed(block_table):
            if block_id in free.idle:
                free.idle.move_to_end(block_id)

    def check_integrity(self):
        """The same, and that names are those of blocks that hold what they say."""
        super().check_integrity()
        names, free = self.names, self.free_block_ids
        for block_hash, block_id in names.block_of_hash.items():
            name = names.name_of_block.get(block_id)
            assert name is not None and name.block_hash == block_hash, (
                f"block {block_id}: expected the hash by which it is found, got {name}"
            )
            assert block_id in free.idle or self.ref_count[block_id] > 0, (
                f"block {block_id}: expected it idle or in use, since it has a name, got "
                f"it empty"
            )
        for request_id, block_table in self.block_tables.items():
            for i, block_id in enumerate(block_table):
                if not names.has(block_id):
                    continue
                name = names.name_of_block[block_id]
                num_tokens = self.num_tokens_in(request_id, i)
                assert (name.depth, len(name.token_ids)) == (i, num_tokens), (
                    f"block {block_id}: expected a name at depth {i}, of {num_tokens} "
                    f"tokens, as request {request_id!r} has it, got {name}"
                )
        times = [last_used for last_used, _ in free.idle.values()]
        assert times == sorted(times), f"idle: expected the oldest first, got {times}"


@dataclass
class Text:
    """The tokens of a request, and how far its blocks have been looked at."""

    token_ids: Sequence[int]  # the caller's own, which grows
    last: Name | None = None  # of the last block that has been looked at

    @property
    def num_blocks(self) -> int:
        """That have been looked at."""
        return self.last.depth + 1 if self.last else 0


class PrefixKVCache(PagedKVCache):
    """A pool whose blocks are found again by the text that they hold.

    `begin` with the tokens of a request, and it has those that were found already: its
    first step brings the rest. Full blocks are remembered after the step that fills them,
    those of answers too, as far as the list that `begin` was given has grown with them;
    tokens that are in the cache must not change there.

    Two requests that compute the same block at the same time have two: one gets the name.
    A step that fails may have cost the names of blocks that it had begun to write to.
    """

    manager: RememberingBlockManager

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int = 16, **settings: Any
    ):
        """settings: the others of `PagedKVCache`."""
        super().__init__(config, num_blocks, block_size, **settings)
        self.manager = RememberingBlockManager(num_blocks, block_size)
        self._texts: dict[Hashable, Text] = {}

    @property
    def num_idle_blocks(self) -> int:
        """Free blocks that hold something that may be found again."""
        return len(self.manager.free_block_ids.idle)

    def find(self, token_ids: Sequence[int]) -> tuple[int, int]:
        """Of a text: how many of its tokens are there already, for whoever begins with
        it, and how many blocks of these some request has now; the others lie idle."""
        self._remember_all()
        block_ids = self.manager.names.find(token_ids, self.block_size)
        num_in_use = sum(self.manager.ref_count[block_id] > 0 for block_id in block_ids)
        return len(block_ids) * self.block_size, num_in_use

    def fork(
        self, parent_id: Hashable, child_id: Hashable, token_ids: Sequence[int] = ()
    ):
        """Begin a request with the tokens of a live one, in the same blocks.

        token_ids: the child's own list, as for `begin`; without it the blocks that it
        fills are not remembered. Raises ValueError if the parent is not live, the child
        is, or the texts differ in tokens that both have.
        """
        parents_ids = self._texts.get(parent_id, Text(())).token_ids
        seq_len = self.manager.seq_lens.get(parent_id, 0)
        num_shared = min(seq_len, len(parents_ids), len(token_ids))
        expected, got = as_ints(parents_ids[:num_shared]), as_ints(token_ids[:num_shared])
        if expected != got:
            raise ValueError(
                f"request {child_id!r}: expected its text to begin as that of request "
                f"{parent_id!r}, {expected}, got {got}"
            )
        super().fork(parent_id, child_id, token_ids)

    def check_integrity(self):
        """Raise AssertionError that names the first thing that is not as it must be."""
        self.manager.check_integrity()
        names = self.manager.names
        for request_id, text in self._texts.items():
            block_table = self.manager.block_tables[request_id]
            for i, block_id in enumerate(block_table):
                start, end = i * self.block_size, (i + 1) * self.block_size
                if not names.has(block_id) or end > len(text.token_ids):
                    continue
                expected = as_ints(text.token_ids[start:end])
                got = names.name_of_block[block_id].token_ids
                assert got == expected, (
                    f"block {block_id}: expected {expected}, which request "
                    f"{request_id!r} has there, got the name of {got}"
                )

    def _begin_row(self, request_id: Hashable, token_ids: Sequence[int]):
        """With what is there of the beginning of its text."""
        super()._begin_row(request_id, token_ids)
        self._remember_all()
        block_ids = self.manager.names.find(token_ids, self.block_size)
        if block_ids:
            last = self.manager.names.name_of_block[block_ids[-1]]
            self._texts[request_id].last = last
        self.manager.share(request_id, block_ids)
        self._marks[request_id] = self.manager.mark(request_id)
        self._seq_lens[-1] = len(block_ids) * self.block_size
        self._write_row(len(self.request_ids) - 1, 0)

    def _add_row(
        self, request_id: Hashable, seq_len: torch.Tensor, token_ids: Sequence[int]
    ):
        super()._add_row(request_id, seq_len, token_ids)
        self._texts[request_id] = Text(token_ids)

    def _free_row(self, row: int):
        request_id = self.request_ids[row]
        self._remember(request_id)
        self._texts.pop(request_id, None)
        super()._free_row(row)

    def _remember_all(self):
        for request_id in self._texts:
            self._remember(request_id)

    def _remember(self, request_id: Hashable):
        """Names for the blocks that a request has filled since it was looked at last.

        Only between steps, when all that its mark counts is computed.
        """
        if self._open is not None:
            return
        text, mark = self._texts.get(request_id), self._marks.get(request_id)
        block_table = self.manager.block_tables.get(request_id)
        if text is None or mark is None or block_table is not mark.block_table:
            return
        if self.manager.mark(request_id) != mark:  # changed behind the cache's back
            return
        num_full = min(mark.seq_len, len(text.token_ids)) // self.block_size
        for i in range(text.num_blocks, num_full):
            if not self._holds_numbers(block_table[i]):  # whoever finds it would have NaN
                return
            block = text.token_ids[i * self.block_size : (i + 1) * self.block_size]
            text.last = self.manager.names.give(block_table[i], block, text.last)

    def _holds_numbers(self, block_id: int) -> bool:
        block = self.k_cache[:, block_id], self.v_cache[:, block_id]
        return self.format.holds_numbers(*block, self.dtype)


def as_ints(token_ids: Sequence[int]) -> tuple[int, ...]:
    """A copy, of ints of Python, whatever kind of numbers these are."""
    return tuple(int(token_id) for token_id in token_ids)
