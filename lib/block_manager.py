"""Chapter 4: who owns which block of the pool.

A KV cache need not be in one piece. Memory is cut into blocks of `block_size` tokens; a
request has a block table, the list of its blocks in the order of its text, and takes a
block when it needs one (PagedAttention, https://arxiv.org/abs/2309.06180, section 4).
This replaces the reservation of chapter 3: what a request wastes is at most the rest of
its last block.

Only numbers are moved here, no keys and no values: lib/paged_kv_cache.py has those.
Invariant: a block is free, or it stands in exactly `ref_count` block tables, at the same
place and filled equally far in each. `check_integrity` says where that is broken.

Allocating, appending and freeing take constant time per block, whatever the pool's size.
"""

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from lib.config import check_count


class OutOfBlocksError(Exception):
    """More blocks were asked for than are free."""

    def __init__(self, needed: int, free: int):
        super().__init__(
            f"expected at most {free} blocks, as many as are free, got {needed}"
        )
        self.needed, self.free = needed, free


@dataclass(frozen=True)
class Mark:
    """Where a request was at some moment: enough to undo what it appended since."""

    block_table: list[int] = field(compare=False)  # the list itself, which goes on
    num_blocks: int
    last_block_id: int | None
    seq_len: int


class BlockManager:
    """The free list, the block tables, and how many tables each block stands in.

    block_tables, seq_lens: of each live request, by its id, in the order of arrival.
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks = check_count("num_blocks", num_blocks)
        self.block_size = check_count("block_size", block_size)
        # A stack: the last one is the next to go, and block 0 the first.
        self.free_block_ids = list(reversed(range(num_blocks)))
        self.ref_count = [0] * num_blocks  # by block id: how many tables it stands in
        self.block_tables: dict[Hashable, list[int]] = {}
        self.seq_lens: dict[Hashable, int] = {}

    def allocate(self, request_id: Hashable, num_tokens: int):
        """Begin a request, with blocks for its first `num_tokens` tokens, and no more.

        Raises ValueError if the request is live already, OutOfBlocksError if fewer blocks
        are free than it needs; then nothing has changed.

        >>> manager = BlockManager(num_blocks=4, block_size=2)
        >>> manager.allocate("a", num_tokens=3)
        >>> manager.block_tables, manager.seq_lens, manager.ref_count
        ({'a': [0, 1]}, {'a': 3}, [1, 1, 0, 0])
        """
        if request_id in self.block_tables:
            raise ValueError(
                f"request {request_id!r}: expected a new one, got a live one"
            )
        num_tokens = check_num_tokens(num_tokens)

        needed = -(-num_tokens // self.block_size)  # rounded up
        if needed > len(self.free_block_ids):
            raise OutOfBlocksError(needed, len(self.free_block_ids))
        self.block_tables[request_id] = [self.take_block() for _ in range(needed)]
        self.seq_lens[request_id] = num_tokens

    def take_block(self) -> int:
        """A free block, from now on in one table."""
        block_id = self.free_block_ids.pop()
        self.ref_count[block_id] = 1
        return block_id

    def append(self, request_id: Hashable, num_tokens: int = 1) -> tuple[int, int] | None:
        """Make room for `num_tokens` more tokens of a live request.

        They fill its last block first; new blocks come behind it. Where that last block
        has room and others use it too, the request gets a copy of it before: then returns
        what `copy_on_write` does, else None. Raises ValueError for an unknown request,
        OutOfBlocksError if too few blocks are free; then nothing has changed.

        >>> manager = BlockManager(num_blocks=4, block_size=2)
        >>> manager.allocate("a", 1)
        >>> manager.append("a"), manager.block_tables["a"]  # fills block 0
        (None, [0])
        >>> manager.append("a"), manager.block_tables["a"]  # needs another
        (None, [0, 1])
        """
        self.check_live(request_id)
        num_tokens = check_num_tokens(num_tokens)
        needed = self.blocks_needed({request_id: num_tokens})

        # Count before anything is taken.
        if needed > len(self.free_block_ids):
            raise OutOfBlocksError(needed, len(self.free_block_ids))

        # Others may use the last block too: what is written there goes into a copy.
        copied = None
        if num_tokens > 0 and self.seq_lens[request_id] % self.block_size > 0:
            copied = self.copy_on_write(request_id)

        # Grow: the last block first, then new ones.
        self.seq_lens[request_id] += num_tokens
        block_table = self.block_tables[request_id]
        while len(block_table) * self.block_size < self.seq_lens[request_id]:
            block_table.append(self.take_block())
        return copied

    def free(self, request_id: Hashable):
        """End a request: each of its blocks is free again, unless others use it.

        Raises ValueError for a request that is unknown, or was freed before.

        >>> manager = BlockManager(num_blocks=4, block_size=2)
        >>> manager.allocate("a", 3)
        >>> manager.free("a")
        >>> len(manager.free_block_ids), manager.block_tables
        (4, {})
        """
        self.check_live(request_id)

        for block_id in self.block_tables.pop(request_id):
            self.ref_count[block_id] -= 1
            if self.ref_count[block_id] == 0:
                self.free_block_ids.append(block_id)
        del self.seq_lens[request_id]

    def fork(self, parent_id: Hashable, child_id: Hashable):
        """Begin a request with the same tokens as a live one, in the same blocks.

        No block is taken. Raises ValueError if the parent is unknown or the child live.

        >>> manager = BlockManager(num_blocks=4, block_size=2)
        >>> manager.allocate("a", 3)
        >>> manager.fork("a", "b")
        >>> manager.block_tables, manager.ref_count
        ({'a': [0, 1], 'b': [0, 1]}, [2, 2, 0, 0])
        """
        self.check_live(parent_id)
        if child_id in self.block_tables:
            raise ValueError(f"request {child_id!r}: expected a new one, got a live one")

        self.block_tables[child_id] = list(self.block_tables[parent_id])
        self.seq_lens[child_id] = self.seq_lens[parent_id]
        for block_id in self.block_tables[child_id]:
            self.ref_count[block_id] += 1

    def copy_on_write(self, request_id: Hashable) -> tuple[int, int] | None:
        """Make a request the only user of its last block, which it is about to write.

        If others use that block, a free one takes its place in this request's table, and
        the caller has to copy what is in it: returns (source, target). If nobody else
        does, returns None. Raises OutOfBlocksError if a block is needed and none is free,
        ValueError if the request is unknown or has no block.

        >>> manager = BlockManager(num_blocks=4, block_size=2)
        >>> manager.allocate("a", 3)
        >>> manager.fork("a", "b")
        >>> manager.copy_on_write("b"), manager.block_tables, manager.ref_count
        ((1, 2), {'a': [0, 1], 'b': [0, 2]}, [2, 1, 1, 0])
        """
        self.check_live(request_id)
        block_table = self.block_tables[request_id]
        if not block_table:
            raise ValueError(f"request {request_id!r}: expected a block, got none yet")

        source = block_table[-1]
        if self.ref_count[source] == 1:
            return None
        if not self.free_block_ids:
            raise OutOfBlocksError(needed=1, free=0)
        target = self.take_block()
        self.ref_count[source] -= 1
        block_table[-1] = target
        return source, target

    def blocks_needed(self, num_new_tokens: Mapping[Hashable, int]) -> int:
        """Free blocks that `append` takes for all of these requests together, exactly."""
        needed, writers = 0, Counter()
        for request_id, num_tokens in num_new_tokens.items():
            self.check_live(request_id)
            block_table, seq_len = (
                self.block_tables[request_id],
                self.seq_lens[request_id],
            )
            end = seq_len + check_num_tokens(num_tokens)
            needed += -(-end // self.block_size) - len(block_table)
            if num_tokens > 0 and seq_len % self.block_size > 0:
                writers[block_table[-1]] += 1
        # Whoever writes into a shared block copies it, but the last one left need not.
        for block_id, num_writers in writers.items():
            needed += min(num_writers, self.ref_count[block_id] - 1)
        return needed

    def mark(self, request_id: Hashable) -> Mark:
        """Where a live request is now, in constant time."""
        table = self.block_tables[request_id]
        last = table[-1] if table else None
        return Mark(table, len(table), last, self.seq_lens[request_id])

    def take_back(self, marks: Mapping[Hashable, Mark]):
        """Undo every `append` since these marks, at whatever line the last was stopped.

        marks: of all requests that have appended, in the order in which they did. The
        free list, too, is as it was. Looks at the whole pool.
        """
        taken = []  # blocks, in the order in which they left the free list
        for request_id, mark in marks.items():
            block_table = self.block_tables[request_id]
            last = mark.num_blocks - 1
            if last >= 0 and block_table[last] != mark.last_block_id:  # a copy
                taken.append(block_table[last])
                block_table[last] = mark.last_block_id
            taken += block_table[last + 1 :]
            del block_table[last + 1 :]
            if block_table == mark.block_table[: last + 1]:  # in another list
                mark.block_table[:] = block_table
                self.block_tables[request_id] = mark.block_table
            self.seq_lens[request_id] = mark.seq_len

        # The last one taken may not have reached its table, and counts may lag behind.
        users = Counter(b for table in self.block_tables.values() for b in table)
        self.ref_count = [users[block_id] for block_id in range(self.num_blocks)]
        known = {*users, *taken, *self.free_block_ids}
        taken += [b for b in range(self.num_blocks) if b not in known]
        self.free_block_ids += reversed(taken)

    def num_filled_slots(self) -> int:
        """Places for a token that hold one; a shared one counts once."""
        filled = {}
        for request_id, block_table in self.block_tables.items():
            for i, block_id in enumerate(block_table):
                filled[block_id] = self.num_tokens_in(request_id, i)
        return sum(filled.values())

    def num_tokens_in(self, request_id: Hashable, i: int) -> int:
        """Tokens of a request in the i-th block of its table."""
        return min(self.seq_lens[request_id] - i * self.block_size, self.block_size)

    def check_live(self, request_id: Hashable):
        """Raise ValueError unless there is such a request now."""
        if request_id not in self.block_tables:
            live = ", ".join(repr(r) for r in self.block_tables) or "none"
            raise ValueError(
                f"request {request_id!r}: expected a live one ({live}), got one that is "
                f"unknown or was freed"
            )

    def check_integrity(self):
        """Raise AssertionError that names the first thing that is not as it must be."""
        users = Counter(b for table in self.block_tables.values() for b in table)
        free = Counter(self.free_block_ids)
        for block_id in range(self.num_blocks):
            assert free[block_id] + (users[block_id] > 0) == 1, (
                f"block {block_id}: expected it free once or in use, got it free "
                f"{free[block_id]} times and in {users[block_id]} tables"
            )
            assert self.ref_count[block_id] == users[block_id], (
                f"block {block_id}: expected its ref_count to be {users[block_id]}, the "
                f"number of tables it stands in, got {self.ref_count[block_id]}"
            )
        unknown = (set(free) | set(users)) - set(range(self.num_blocks))
        assert not unknown, f"expected blocks 0 to {self.num_blocks - 1}, got {unknown}"
        assert self.seq_lens.keys() == self.block_tables.keys(), (
            f"seq_lens: expected {list(self.block_tables)}, got {list(self.seq_lens)}"
        )
        seen = {}  # block id -> (which block of the text, tokens in it)
        for request_id, block_table in self.block_tables.items():
            seq_len = self.seq_lens[request_id]
            needed = -(-seq_len // self.block_size)
            assert len(block_table) == needed, (
                f"request {request_id!r}: expected {needed} blocks for {seq_len} tokens, "
                f"got {len(block_table)}"
            )
            for i, block_id in enumerate(block_table):
                use = i, self.num_tokens_in(request_id, i)
                assert seen.setdefault(block_id, use) == use, (
                    f"block {block_id}: expected all who share it to agree on (block of "
                    f"the text, tokens in it), got {seen[block_id]} and {use}"
                )


def check_num_tokens(num_tokens: int) -> int:
    """The same as an int of Python; ValueError unless it is a number of tokens."""
    return check_count("num_tokens", num_tokens, at_least=0)
