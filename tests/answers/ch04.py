import math

import torch

from answers import right, wrong
from lib.block_manager import OutOfBlocksError
from lib.kv_cache import new_positions

# allocate


@right("allocate")
def allocate_with_slices(self, request_id, num_tokens):
    if request_id in self.block_tables or num_tokens < 0:
        raise ValueError(request_id)
    needed = (num_tokens + self.block_size - 1) // self.block_size
    free = len(self.free_block_ids)
    if free < needed:
        raise OutOfBlocksError(needed, free)
    taken = self.free_block_ids[free - needed :]
    del self.free_block_ids[free - needed :]
    for block_id in taken:
        self.ref_count[block_id] += 1
    self.block_tables[request_id], self.seq_lens[request_id] = taken, num_tokens


@right("allocate")
def allocate_in_a_loop(self, request_id, num_tokens):
    if self.block_tables.get(request_id) is not None or num_tokens < 0:
        raise ValueError("live, or no number of tokens")
    if num_tokens > len(self.free_block_ids) * self.block_size:
        needed = -(-num_tokens // self.block_size)
        raise OutOfBlocksError(needed, len(self.free_block_ids))
    table = []
    while len(table) * self.block_size < num_tokens:
        table.append(self.take_block())
    self.block_tables[request_id] = table
    self.seq_lens.update({request_id: num_tokens})


@right("allocate")
def allocate_by_hand(self, request_id, num_tokens):
    check_new(self, request_id, num_tokens)
    needed, rest = divmod(num_tokens, self.block_size)
    needed += bool(rest)
    if len(self.free_block_ids) - needed < 0:
        raise OutOfBlocksError(free=len(self.free_block_ids), needed=needed)
    self.seq_lens[request_id] = num_tokens
    table = self.block_tables.setdefault(request_id, [])
    for _ in range(needed):
        table += [self.free_block_ids.pop(-1)]
        self.ref_count[table[-1]] = 1


@right("allocate")
def allocate_by_a_slice_turned_around(self, request_id, num_tokens):
    check_new(self, request_id, num_tokens)
    needed = (num_tokens - 1) // self.block_size + 1
    if needed > len(self.free_block_ids):
        raise OutOfBlocksError(needed, len(self.free_block_ids))
    table = list(self.free_block_ids[: -needed - 1 : -1])
    for block_id in table:
        del self.free_block_ids[-1]
        self.ref_count[block_id] += 1
    self.block_tables[request_id], self.seq_lens[request_id] = table, num_tokens


def check_new(self, request_id, num_tokens):
    if request_id in self.block_tables or num_tokens < 0:
        raise ValueError(f"request {request_id!r}, {num_tokens} tokens")


def begin_with(self, request_id, num_tokens, take):
    check_new(self, request_id, num_tokens)
    needed = math.ceil(num_tokens / self.block_size)
    if needed > len(self.free_block_ids):
        raise OutOfBlocksError(needed, len(self.free_block_ids))
    table = take(needed)
    for block_id in table:
        self.ref_count[block_id] = 1
    self.block_tables[request_id], self.seq_lens[request_id] = table, num_tokens


@wrong("allocate", says="a stack")
def allocate_cutting_the_free_list(self, request_id, num_tokens):
    def take(needed):
        end = len(self.free_block_ids) - needed
        taken, self.free_block_ids = self.free_block_ids[end:], self.free_block_ids[:end]
        return taken

    begin_with(self, request_id, num_tokens, take)


@wrong("allocate", says="a stack")
def allocate_filling_the_list_anew(self, request_id, num_tokens):
    def take(needed):
        taken = [self.free_block_ids[-1 - i] for i in range(needed)]
        self.free_block_ids[:] = [b for b in self.free_block_ids if b not in taken]
        return taken

    begin_with(self, request_id, num_tokens, take)


@wrong("allocate", says="a stack")
def allocate_the_smallest(self, request_id, num_tokens):
    def take(needed):
        taken = sorted(self.free_block_ids)[:needed]
        for block_id in taken:
            self.free_block_ids.remove(block_id)
        return taken

    begin_with(self, request_id, num_tokens, take)


@wrong("allocate", says="looked up by block id")
def allocate_what_has_no_user(self, request_id, num_tokens):
    def take(needed):
        taken = [b for b, count in enumerate(self.ref_count) if count == 0][:needed]
        for _ in taken:
            self.free_block_ids.pop()
        return taken

    begin_with(self, request_id, num_tokens, take)


@wrong("allocate", says="looked up by block id")
def allocate_the_next_without_user(self, request_id, num_tokens):
    def take(needed):
        taken = []
        for _ in range(needed):
            taken.append(self.ref_count.index(0))
            self.ref_count[taken[-1]] = 1
            self.free_block_ids.pop()
        return taken

    begin_with(self, request_id, num_tokens, take)


@wrong("allocate", says="another ref_count")
def allocate_with_new_counts(self, request_id, num_tokens):
    begin_with(
        self, request_id, num_tokens, lambda n: [self.take_block() for _ in range(n)]
    )
    self.ref_count = [self.ref_count[b] for b in range(self.num_blocks)]


@wrong("allocate", says="enough free blocks")
def allocate_nothing_if_none_is_free(self, request_id, num_tokens):
    check_new(self, request_id, num_tokens)
    if not self.free_block_ids:
        raise OutOfBlocksError(math.ceil(num_tokens / self.block_size), 0)
    begin(self, request_id, num_tokens, math.ceil(num_tokens / self.block_size))


@wrong("allocate")
def allocate_some_tokens_or_refuse(self, request_id, num_tokens):
    if num_tokens < 1:
        raise ValueError(num_tokens)
    begin(self, request_id, num_tokens, math.ceil(num_tokens / self.block_size))


@wrong("allocate", says="Raise ValueError here")
def allocate_unless_it_has_a_block(self, request_id, num_tokens):
    if self.block_tables.get(request_id):
        raise ValueError(f"request {request_id!r} is live")
    self.block_tables.pop(request_id, None)
    begin(self, request_id, num_tokens, math.ceil(num_tokens / self.block_size))


@wrong("allocate", says="when the others are full, not before")
def allocate_one_block_at_least(self, request_id, num_tokens):
    begin(self, request_id, num_tokens, max(1, math.ceil(num_tokens / self.block_size)))


@wrong("allocate", says="needed is the number of blocks")
def allocate_counting_what_is_missing(self, request_id, num_tokens):
    check_new(self, request_id, num_tokens)
    needed, free = math.ceil(num_tokens / self.block_size), len(self.free_block_ids)
    if needed > free:
        raise OutOfBlocksError(needed - free, free)
    begin(self, request_id, num_tokens, needed)


@wrong("allocate", says="free before any is taken")
def allocate_looking_after_it_took(self, request_id, num_tokens):
    check_new(self, request_id, num_tokens)
    needed, table = math.ceil(num_tokens / self.block_size), []
    while self.free_block_ids and len(table) < needed:
        table.append(self.take_block())
    if len(table) < needed:
        left = len(self.free_block_ids)
        for block_id in reversed(table):
            self.ref_count[block_id] = 0
            self.free_block_ids.append(block_id)
        raise OutOfBlocksError(needed, left)
    self.block_tables[request_id], self.seq_lens[request_id] = table, num_tokens


@wrong("allocate", says="Fewer blocks are free than it needs")
def allocate_what_is_left(self, request_id, num_tokens):
    check_new(self, request_id, num_tokens)
    needed = math.ceil(num_tokens / self.block_size)
    begin(self, request_id, num_tokens, min(needed, len(self.free_block_ids)))


@wrong("allocate", says="Fewer blocks are free than it needs")
def allocate_with_a_value_error(self, request_id, num_tokens):
    needed = math.ceil(num_tokens / self.block_size)
    if needed > len(self.free_block_ids):
        raise ValueError(f"no room for {needed} blocks")
    begin(self, request_id, num_tokens, needed)


def begin(self, request_id, num_tokens, needed):
    if request_id in self.block_tables or num_tokens < 0:
        raise ValueError(f"request {request_id!r}")
    if needed > len(self.free_block_ids):
        raise OutOfBlocksError(needed, len(self.free_block_ids))
    self.block_tables[request_id] = [self.take_block() for _ in range(needed)]
    self.seq_lens[request_id] = num_tokens


@wrong("allocate", says="when the others are full, not before")
def allocate_one_more(self, request_id, num_tokens):
    begin(self, request_id, num_tokens, num_tokens // self.block_size + 1)


@wrong("allocate", says="Tokens without a place")
def allocate_full_blocks_only(self, request_id, num_tokens):
    begin(self, request_id, num_tokens, num_tokens // self.block_size)


@wrong("allocate", says="some table has is not free")
def allocate_block_zero_for_all(self, request_id, num_tokens):
    if request_id in self.block_tables:
        raise ValueError(request_id)
    needed = math.ceil(num_tokens / self.block_size)
    if needed > len(self.free_block_ids):
        raise OutOfBlocksError(needed, len(self.free_block_ids))
    self.block_tables[request_id] = list(range(needed))
    self.seq_lens[request_id] = num_tokens
    for block_id in range(needed):
        self.ref_count[block_id] += 1


@wrong("allocate", says="something had changed before")
def allocate_until_none_is_left(self, request_id, num_tokens):
    if request_id in self.block_tables:
        raise ValueError(request_id)
    needed, free = math.ceil(num_tokens / self.block_size), len(self.free_block_ids)
    self.block_tables[request_id] = table = []
    self.seq_lens[request_id] = num_tokens
    for _ in range(needed):
        if not self.free_block_ids:
            raise OutOfBlocksError(needed, free)
        table.append(self.take_block())


@wrong("allocate", says="Count the blocks first")
def allocate_without_counting(self, request_id, num_tokens):
    if request_id in self.block_tables:
        raise ValueError(request_id)
    needed = math.ceil(num_tokens / self.block_size)
    self.block_tables[request_id] = [self.take_block() for _ in range(needed)]
    self.seq_lens[request_id] = num_tokens


@wrong("allocate", says="a stack")
def allocate_from_the_front(self, request_id, num_tokens):
    if request_id in self.block_tables:
        raise ValueError(request_id)
    needed = math.ceil(num_tokens / self.block_size)
    if needed > len(self.free_block_ids):
        raise OutOfBlocksError(needed, len(self.free_block_ids))
    table = [self.free_block_ids.pop(0) for _ in range(needed)]
    for block_id in table:
        self.ref_count[block_id] = 1
    self.block_tables[request_id], self.seq_lens[request_id] = table, num_tokens


@wrong("allocate", says="a stack")
def allocate_with_a_new_free_list(self, request_id, num_tokens):
    if request_id in self.block_tables:
        raise ValueError(request_id)
    needed = math.ceil(num_tokens / self.block_size)
    if needed > len(self.free_block_ids):
        raise OutOfBlocksError(needed, len(self.free_block_ids))
    table = self.free_block_ids[:needed]
    self.free_block_ids = self.free_block_ids[needed:]
    for block_id in table:
        self.ref_count[block_id] = 1
    self.block_tables[request_id], self.seq_lens[request_id] = table, num_tokens


@wrong("allocate", says="ref_count")
def allocate_without_ref_count(self, request_id, num_tokens):
    begin(self, request_id, num_tokens, math.ceil(num_tokens / self.block_size))
    for block_id in self.block_tables[request_id]:
        self.ref_count[block_id] = 0


@wrong("allocate", says="Raise ValueError")
def allocate_over_a_live_request(self, request_id, num_tokens):
    self.block_tables.pop(request_id, None)
    begin(self, request_id, num_tokens, math.ceil(num_tokens / self.block_size))


@wrong("allocate", says="Raise ValueError")
def allocate_less_than_nothing(self, request_id, num_tokens):
    if request_id in self.block_tables:
        raise ValueError(request_id)
    needed = math.ceil(num_tokens / self.block_size)
    if needed > len(self.free_block_ids):
        raise OutOfBlocksError(needed, len(self.free_block_ids))
    self.block_tables[request_id] = [self.take_block() for _ in range(needed)]
    self.seq_lens[request_id] = num_tokens


@wrong("allocate", says="enough free blocks")
def allocate_keeping_one_back(self, request_id, num_tokens):
    if request_id in self.block_tables:
        raise ValueError(request_id)
    needed = math.ceil(num_tokens / self.block_size)
    if needed >= len(self.free_block_ids):
        raise OutOfBlocksError(needed, len(self.free_block_ids))
    begin(self, request_id, num_tokens, needed)


@wrong("allocate", says="seq_lens has the tokens")
def allocate_with_rounded_length(self, request_id, num_tokens):
    needed = math.ceil(num_tokens / self.block_size)
    begin(self, request_id, needed * self.block_size, needed)


@wrong("allocate", says="a block table that is a tuple")
def allocate_a_tuple(self, request_id, num_tokens):
    allocate_in_a_loop(self, request_id, num_tokens)
    self.block_tables[request_id] = tuple(self.block_tables[request_id])


@wrong("allocate", says="wrong for many blocks")
def allocate_sixteen_blocks_at_most(self, request_id, num_tokens):
    allocate_in_a_loop(self, request_id, num_tokens)
    block_table = self.block_tables[request_id]
    while len(block_table) > 16:
        block_id = block_table.pop()
        self.ref_count[block_id] = 0
        self.free_block_ids.append(block_id)


@wrong("allocate", says="one token more than a large block")
def allocate_rounded_to_hundredths(self, request_id, num_tokens):
    allocate_in_a_loop(self, request_id, num_tokens)
    needed = math.ceil(round(num_tokens / self.block_size, 2))
    while len(self.block_tables[request_id]) > needed:
        block_id = self.block_tables[request_id].pop()
        self.ref_count[block_id] = 0
        self.free_block_ids.append(block_id)


# append


@right("append")
def append_token_by_token(self, request_id, num_tokens=1):
    self.check_live(request_id)
    if num_tokens < 0:
        raise ValueError(num_tokens)
    needed = self.blocks_needed({request_id: num_tokens})
    if needed > len(self.free_block_ids):
        raise OutOfBlocksError(needed, len(self.free_block_ids))
    copied = None
    for i in range(num_tokens):
        if self.seq_lens[request_id] % self.block_size == 0:
            self.block_tables[request_id].append(self.take_block())
        elif i == 0:
            copied = self.copy_on_write(request_id)
        self.seq_lens[request_id] += 1
    return copied


@right("append")
def append_counting_room(self, request_id, num_tokens=1):
    if request_id not in self.seq_lens or num_tokens < 0:
        raise ValueError("unknown")
    table = self.block_tables[request_id]
    room = len(table) * self.block_size - self.seq_lens[request_id]
    num_new = math.ceil(max(0, num_tokens - room) / self.block_size)
    is_written = room > 0 and num_tokens > 0
    num_copies = int(is_written and self.ref_count[table[-1]] > 1)
    if num_new + num_copies > len(self.free_block_ids):
        raise OutOfBlocksError(num_new + num_copies, len(self.free_block_ids))
    copied = self.copy_on_write(request_id) if is_written else None
    table.extend([self.take_block() for _ in range(num_new)])
    self.seq_lens[request_id] += num_tokens
    return copied


def grow(self, request_id, num_tokens, needed_blocks=None, is_copied=None):
    """append, with one thing to go wrong."""
    self.check_live(request_id)
    if num_tokens < 0:
        raise ValueError(num_tokens)
    needed = self.blocks_needed({request_id: num_tokens})
    if needed > len(self.free_block_ids):
        raise OutOfBlocksError(needed, len(self.free_block_ids))
    copied = None
    has_room = self.seq_lens[request_id] % self.block_size > 0
    if is_copied(has_room, num_tokens) if is_copied else has_room and num_tokens:
        copied = self.copy_on_write(request_id)
    self.seq_lens[request_id] += num_tokens
    table = self.block_tables[request_id]
    wanted = math.ceil(self.seq_lens[request_id] / self.block_size)
    if needed_blocks:
        wanted = needed_blocks(self.seq_lens[request_id], self.block_size)
    while len(table) < wanted:
        table.append(self.take_block())
    return copied


@right("append")
def append_one_at_a_time(self, request_id, num_tokens=1):
    self.check_live(request_id)
    if num_tokens < 0:
        raise ValueError("negative")
    needed, free = self.blocks_needed({request_id: num_tokens}), len(self.free_block_ids)
    if needed > free:
        raise OutOfBlocksError(needed, free)
    table, copied = self.block_tables[request_id], None
    rest = self.seq_lens[request_id] % self.block_size
    if rest and num_tokens and self.ref_count[table[-1]] > 1:
        copied = self.copy_on_write(request_id)
        needed -= 1
    for _ in range(needed):
        table.append(self.take_block())
    self.seq_lens.update({request_id: self.seq_lens[request_id] + num_tokens})
    return copied


@wrong("append", says="enough free blocks")
def append_nothing_if_none_is_free(self, request_id, num_tokens=1):
    self.check_live(request_id)
    if num_tokens >= 0 and not self.free_block_ids:
        raise OutOfBlocksError(self.blocks_needed({request_id: num_tokens}), 0)
    return grow(self, request_id, num_tokens)


@wrong("append", says="when the others are full, not before")
def append_into_new_blocks_alone(self, request_id, num_tokens=1):
    now = len(self.block_tables.get(request_id, []))
    return grow(
        self,
        request_id,
        num_tokens,
        lambda n, size: now + math.ceil(num_tokens / size),
    )


@wrong("append", says="something had changed before")
def append_copying_before_it_counts(self, request_id, num_tokens=1):
    self.check_live(request_id)
    if num_tokens < 0:
        raise ValueError(num_tokens)
    needed, free = self.blocks_needed({request_id: num_tokens}), len(self.free_block_ids)
    copied = None
    if free and num_tokens > 0 and self.seq_lens[request_id] % self.block_size > 0:
        copied = self.copy_on_write(request_id)
    if needed > free:
        raise OutOfBlocksError(needed, free)
    grow(self, request_id, num_tokens)
    return copied


@wrong("append", says="seq_lens has the tokens")
def append_without_counting_tokens(self, request_id, num_tokens=1):
    copied = grow(self, request_id, num_tokens)
    self.seq_lens[request_id] -= num_tokens
    return copied


@wrong("append", says="Raise ValueError here")
def append_less_than_nothing(self, request_id, num_tokens=1):
    self.check_live(request_id)
    if num_tokens < 0:
        return None
    return grow(self, request_id, num_tokens)


@wrong("append", says="needed is the number of blocks")
def append_counting_tokens_for_blocks(self, request_id, num_tokens=1):
    self.check_live(request_id)
    needed, free = self.blocks_needed({request_id: num_tokens}), len(self.free_block_ids)
    if needed > free:
        raise OutOfBlocksError(num_tokens, free)
    return grow(self, request_id, num_tokens)


@wrong("append", says="Where no number is given")
def append_two_by_default(self, request_id, num_tokens=2):
    return grow(self, request_id, num_tokens)


@wrong("append", says="when the others are full, not before")
def append_a_token_early(self, request_id, num_tokens=1):
    return grow(self, request_id, num_tokens, lambda n, size: n // size + 1)


@wrong("append", says="Tokens without a place")
def append_a_token_late(self, request_id, num_tokens=1):
    return grow(self, request_id, num_tokens, lambda n, size: n // size)


@wrong("append")
def append_one_block_at_most(self, request_id, num_tokens=1):
    now = len(self.block_tables.get(request_id, []))
    return grow(
        self, request_id, num_tokens, lambda n, size: min(now + 1, math.ceil(n / size))
    )


@wrong("append", says="Others use the last block too")
def append_into_a_shared_block(self, request_id, num_tokens=1):
    return grow(self, request_id, num_tokens, is_copied=lambda has_room, n: False)


@wrong("append", says="full")
def append_copying_full_blocks(self, request_id, num_tokens=1):
    return grow(
        self,
        request_id,
        num_tokens,
        is_copied=lambda has_room, n: n and self.block_tables[request_id],
    )


@wrong("append", says="needed counts the copy too")
def append_as_many_as_needed(self, request_id, num_tokens=1):
    self.check_live(request_id)
    needed = self.blocks_needed({request_id: num_tokens})
    if needed > len(self.free_block_ids):
        raise OutOfBlocksError(needed, len(self.free_block_ids))
    copied = None
    if num_tokens > 0 and self.seq_lens[request_id] % self.block_size > 0:
        copied = self.copy_on_write(request_id)
    self.seq_lens[request_id] += num_tokens
    for _ in range(needed):
        self.block_tables[request_id].append(self.take_block())
    return copied


@wrong("append")
def append_copying_for_no_tokens(self, request_id, num_tokens=1):
    return grow(self, request_id, num_tokens, is_copied=lambda has_room, n: has_room)


@wrong("append", says="something had changed before")
def append_length_first(self, request_id, num_tokens=1):
    self.check_live(request_id)
    needed = self.blocks_needed({request_id: num_tokens})
    free = len(self.free_block_ids)
    if needed > free:
        self.seq_lens[request_id] += num_tokens
        raise OutOfBlocksError(needed, free)
    return grow(self, request_id, num_tokens)


@wrong("append", says="Return (source, target)")
def append_without_saying_what_was_copied(self, request_id, num_tokens=1):
    grow(self, request_id, num_tokens)


@wrong("append", says="Count the blocks first")
def append_without_counting(self, request_id, num_tokens=1):
    self.check_live(request_id)
    copied = None
    if num_tokens > 0 and self.seq_lens[request_id] % self.block_size > 0:
        copied = self.copy_on_write(request_id)
    self.seq_lens[request_id] += num_tokens
    table = self.block_tables[request_id]
    while len(table) * self.block_size < self.seq_lens[request_id]:
        table.append(self.take_block())
    return copied


@wrong("append")
def append_forgetting_the_copy_in_the_count(self, request_id, num_tokens=1):
    self.check_live(request_id)
    end = self.seq_lens[request_id] + num_tokens
    needed = math.ceil(end / self.block_size) - len(self.block_tables[request_id])
    if needed > len(self.free_block_ids):
        raise OutOfBlocksError(needed, len(self.free_block_ids))
    copied = None
    if self.seq_lens[request_id] % self.block_size and num_tokens:
        copied = self.copy_on_write(request_id)
    self.seq_lens[request_id] = end
    for _ in range(needed):
        self.block_tables[request_id].append(self.take_block())
    return copied


def append_with(self, request_id, num_tokens, num_copies, copies_first=lambda: True):
    """append that counts the copies itself, and may copy after the table grew."""
    self.check_live(request_id)
    if num_tokens < 0:
        raise ValueError(num_tokens)
    table, end = self.block_tables[request_id], self.seq_lens[request_id] + num_tokens
    has_room = self.seq_lens[request_id] % self.block_size > 0
    users = self.ref_count[table[-1]] if table else 1
    needed = math.ceil(end / self.block_size) - len(table)
    needed += num_copies(users) if has_room and users > 1 else 0
    if needed > len(self.free_block_ids):
        raise OutOfBlocksError(needed, len(self.free_block_ids))
    is_written, copied = has_room and num_tokens > 0, None
    if is_written and copies_first():
        copied = self.copy_on_write(request_id)
    while len(table) * self.block_size < end:
        table.append(self.take_block())
    if is_written and not copies_first():
        copied = self.copy_on_write(request_id)
    self.seq_lens[request_id] = end
    return copied


@right("append")
def append_with_one_copy(self, request_id, num_tokens=1):
    return append_with(self, request_id, num_tokens, lambda users: num_tokens > 0)


@wrong("append", says="Others use the last block too")
def append_growing_before_it_copies(self, request_id, num_tokens=1):
    copies = lambda users: num_tokens > 0  # noqa: E731
    return append_with(self, request_id, num_tokens, copies, lambda: False)


@wrong("append", says="Others use the last block too")
def append_copying_only_what_it_stays_in(self, request_id, num_tokens=1):
    rest = self.seq_lens.get(request_id, 0) % self.block_size
    return grow(
        self,
        request_id,
        num_tokens,
        is_copied=lambda has_room, n: has_room and n and rest + n <= self.block_size,
    )


@wrong("append", says="enough free blocks")
def append_counting_a_copy_for_no_tokens(self, request_id, num_tokens=1):
    return append_with(self, request_id, num_tokens, lambda users: 1)


@wrong("append", says="enough free blocks")
def append_counting_a_copy_for_each_user(self, request_id, num_tokens=1):
    copies = lambda users: (users - 1) * (num_tokens > 0)  # noqa: E731
    return append_with(self, request_id, num_tokens, copies)


@wrong("append", says="never go through all requests")
def append_looking_for_other_users(self, request_id, num_tokens=1):
    self.check_live(request_id)
    last = self.block_tables[request_id][-1:]
    others = [r for r in self.block_tables if r != request_id]
    is_shared = any(self.block_tables[r][-1:] == last for r in others)
    return grow(
        self,
        request_id,
        num_tokens,
        is_copied=lambda has_room, n: has_room and n and is_shared,
    )


@wrong("append", says="an unknown request, and no tokens")
def append_nothing_to_nobody(self, request_id, num_tokens=1):
    return append_token_by_token(self, request_id, num_tokens) if num_tokens else None


@wrong("append", says="wrong for many tokens")
def append_sixteen_at_most(self, request_id, num_tokens=1):
    return append_token_by_token(self, request_id, min(num_tokens, 16))


# free


@right("free")
def free_backwards(self, request_id):
    if request_id not in self.block_tables:
        raise ValueError(request_id)
    for block_id in reversed(self.block_tables[request_id]):
        self.ref_count[block_id] = self.ref_count[block_id] - 1
        if not self.ref_count[block_id]:
            self.free_block_ids.append(block_id)
    del self.block_tables[request_id], self.seq_lens[request_id]


@right("free")
def free_with_a_count(self, request_id):
    free_backwards(self, request_id)
    return len(self.free_block_ids)


@right("free")
def free_in_two_passes(self, request_id):
    self.check_live(request_id)
    table = self.block_tables.pop(request_id)
    self.seq_lens.pop(request_id)
    for block_id in table:
        self.ref_count[block_id] -= 1
    self.free_block_ids += [b for b in table if self.ref_count[b] == 0]


@right("free")
def free_by_an_extension(self, request_id):
    self.check_live(request_id)

    def is_left(block_id):
        self.ref_count[block_id] -= 1
        return self.ref_count[block_id] == 0

    self.free_block_ids.extend(filter(is_left, self.block_tables[request_id]))
    del self.block_tables[request_id]
    del self.seq_lens[request_id]


@wrong("free", says="a stack")
def free_into_a_new_list(self, request_id):
    self.check_live(request_id)
    for block_id in self.block_tables.pop(request_id):
        self.ref_count[block_id] -= 1
        if self.ref_count[block_id] == 0:
            self.free_block_ids = self.free_block_ids + [block_id]
    del self.seq_lens[request_id]


@wrong("free", says="another free list")
def free_in_front_of_the_others(self, request_id):
    self.check_live(request_id)
    for block_id in self.block_tables.pop(request_id):
        self.ref_count[block_id] -= 1
        if self.ref_count[block_id] == 0:
            self.free_block_ids = [block_id] + self.free_block_ids
    del self.seq_lens[request_id]


@wrong("free", says="a stack")
def free_and_sort(self, request_id):
    free_backwards(self, request_id)
    self.free_block_ids.sort(reverse=True)


@wrong("free", says="a stack")
def free_at_the_front(self, request_id):
    self.check_live(request_id)
    for block_id in self.block_tables.pop(request_id):
        self.ref_count[block_id] -= 1
        if self.ref_count[block_id] == 0:
            self.free_block_ids.insert(0, block_id)
    del self.seq_lens[request_id]


@wrong("free", says="looked up by block id")
def free_all_without_users(self, request_id):
    self.check_live(request_id)
    for block_id in self.block_tables.pop(request_id):
        self.ref_count[block_id] -= 1
    del self.seq_lens[request_id]
    self.free_block_ids[:] = [b for b, n in enumerate(self.ref_count) if n == 0]


@wrong("free", says="ref_count")
def free_with_a_count_of_zero(self, request_id):
    self.check_live(request_id)
    for block_id in self.block_tables.pop(request_id):
        if self.ref_count[block_id] == 1:
            self.free_block_ids.append(block_id)
        self.ref_count[block_id] = 0
    del self.seq_lens[request_id]


@wrong("free", says="The other requests keep their tables")
def free_all_who_share(self, request_id):
    self.check_live(request_id)
    shared = {b for b in self.block_tables[request_id] if self.ref_count[b] > 1}
    for other in [r for r in self.seq_lens if shared & {*self.block_tables[r]}]:
        free_backwards(self, other)
    if request_id in self.block_tables:
        free_backwards(self, request_id)


@wrong("free", says="some table has is not free")
def free_blocks_of_others(self, request_id):
    self.check_live(request_id)
    for block_id in self.block_tables.pop(request_id):
        self.ref_count[block_id] -= 1
        self.free_block_ids.append(block_id)
    del self.seq_lens[request_id]


@wrong("free", says="a stack")
def free_looking_for_doubles(self, request_id):
    self.check_live(request_id)
    for block_id in self.block_tables.pop(request_id):
        self.ref_count[block_id] -= 1
        if self.ref_count[block_id] == 0 and block_id not in self.free_block_ids:
            self.free_block_ids.append(block_id)
    del self.seq_lens[request_id]


@wrong("free", says="expected its ref_count to be 0")
def free_without_counting_down(self, request_id):
    self.check_live(request_id)
    for block_id in self.block_tables.pop(request_id):
        if self.ref_count[block_id] == 1:
            self.free_block_ids.append(block_id)
    del self.seq_lens[request_id]


@wrong("free", says="A block that no table has is free")
def free_nothing(self, request_id):
    self.check_live(request_id)
    for block_id in self.block_tables.pop(request_id):
        self.ref_count[block_id] -= 1
    del self.seq_lens[request_id]


@wrong("free", says="has no table")
def free_keeping_the_table(self, request_id):
    self.check_live(request_id)
    for block_id in self.block_tables[request_id]:
        self.ref_count[block_id] -= 1
        if self.ref_count[block_id] == 0:
            self.free_block_ids.append(block_id)
    self.block_tables[request_id] = []
    self.seq_lens[request_id] = 0


@wrong("free", says="ValueError")
def free_whatever_comes(self, request_id):
    for block_id in self.block_tables.pop(request_id, []):
        self.ref_count[block_id] -= 1
        if self.ref_count[block_id] == 0:
            self.free_block_ids.append(block_id)
    self.seq_lens.pop(request_id, None)


@wrong("free", says="raised KeyError")
def free_with_a_key_error(self, request_id):
    for block_id in self.block_tables.pop(request_id):
        self.ref_count[block_id] -= 1
        if self.ref_count[block_id] == 0:
            self.free_block_ids.append(block_id)
    del self.seq_lens[request_id]


@wrong("free", says="seq_lens has the tokens")
def free_keeping_the_length(self, request_id):
    self.check_live(request_id)
    for block_id in self.block_tables.pop(request_id):
        self.ref_count[block_id] -= 1
        if self.ref_count[block_id] == 0:
            self.free_block_ids.append(block_id)


@wrong("free")
def free_the_last_block_only(self, request_id):
    self.check_live(request_id)
    for block_id in self.block_tables.pop(request_id)[-1:]:
        self.ref_count[block_id] -= 1
        if self.ref_count[block_id] == 0:
            self.free_block_ids.append(block_id)
    del self.seq_lens[request_id]


@wrong("free", says="never go through all requests")
def free_what_no_table_has(self, request_id):
    self.check_live(request_id)
    for block_id in self.block_tables.pop(request_id):
        self.ref_count[block_id] -= 1
        if not any(block_id in table for table in self.block_tables.values()):
            self.free_block_ids.append(block_id)
    del self.seq_lens[request_id]


@right("free")
def free_with_own_lines(self, request_id):
    if request_id not in self.block_tables.keys():  # noqa: SIM118
        raise ValueError(f"expected one of {self.block_tables!r}, got {request_id!r}")
    for block_id in self.block_tables.get(request_id):
        self.ref_count[block_id] -= 1
        if self.ref_count[block_id] == 0:
            self.free_block_ids.append(block_id)
    for of_each in (self.block_tables, self.seq_lens):
        of_each.pop(request_id, None)


# slot_mapping


@right("slot_mapping")
def slots_in_loops(block_tables, seq_lens, query_lens, block_size):
    slots = []
    for table, S, T in zip(block_tables, seq_lens.tolist(), query_lens.tolist()):
        for p in range(S - T, S):
            slots.append(int(table[p // block_size]) * block_size + p % block_size)
    return torch.tensor(slots, dtype=torch.int64)


@right("slot_mapping")
def slots_of_all_places(block_tables, seq_lens, query_lens, block_size):
    places = block_tables.unsqueeze(-1) * block_size + torch.arange(block_size)
    places = places.flatten(1)  # (B, M * block_size)
    rows = []
    for row, S, T in zip(places, seq_lens.tolist(), query_lens.tolist()):
        rows.append(row[S - T : S])
    return torch.cat(rows)


@right("slot_mapping")
def slots_by_gather(block_tables, seq_lens, query_lens, block_size):
    places = torch.arange(block_tables.shape[1] * block_size)
    slots = block_tables.gather(1, (places // block_size).repeat(len(seq_lens), 1))
    slots = slots * block_size + places % block_size  # (B, M * block_size)
    is_new = places < seq_lens[:, None]
    is_new &= places >= (seq_lens - query_lens)[:, None]
    return slots[is_new]


@right("slot_mapping")
def slots_request_by_request(block_tables, seq_lens, query_lens, block_size):
    out = []
    for b in range(len(seq_lens)):
        p = torch.arange(int(seq_lens[b] - query_lens[b]), int(seq_lens[b]))
        out.append(block_tables[b].index_select(0, p // block_size) * block_size)
        out[-1] += p.remainder(block_size)
    return torch.cat(out)


@wrong("slot_mapping", says="changed its inputs")
def no_negative_ids(block_tables, seq_lens, query_lens, block_size):
    block_tables[block_tables < 0] = 0
    return slots_in_loops(block_tables, seq_lens, query_lens, block_size)


@wrong("slot_mapping", says="changed its inputs")
def ids_clamped_in_place(block_tables, seq_lens, query_lens, block_size):
    block_tables.clamp_(max=2**30)
    return slots_in_loops(block_tables, seq_lens, query_lens, block_size)


@wrong("slot_mapping", says="changed its inputs")
def lengths_before_the_step(block_tables, seq_lens, query_lens, block_size):
    seq_lens -= query_lens
    return slots_in_loops(block_tables, seq_lens + query_lens, query_lens, block_size)


@wrong("slot_mapping", says="so is all that they are computed from")
def slots_in_int32_then_int64(block_tables, seq_lens, query_lens, block_size):
    requests, positions = where(seq_lens, query_lens)
    block_ids = block_tables.int()[requests, positions // block_size]
    return (block_ids * block_size + (positions % block_size).int()).long()


@wrong("slot_mapping")
def slots_in_single_precision(block_tables, seq_lens, query_lens, block_size):
    requests, positions = where(seq_lens, query_lens)
    block_ids = block_tables.float()[requests, positions // block_size]
    return (block_ids * block_size + positions % block_size).long()


@wrong("slot_mapping", says="not the position")
def position_beside_the_block(block_tables, seq_lens, query_lens, block_size):
    requests, positions = where(seq_lens, query_lens)
    return block_tables[requests, positions // block_size] * block_size + positions


@wrong("slot_mapping", says="the place in it is position % block_size")
def places_turned_around(block_tables, seq_lens, query_lens, block_size):
    slots = slots_in_loops(block_tables, seq_lens, query_lens, block_size)
    return slots - 2 * (slots % block_size) + block_size - 1


@wrong("slot_mapping", says="One slot for each new token")
def slots_of_all_tokens(block_tables, seq_lens, query_lens, block_size):
    return slots_in_loops(block_tables, seq_lens, seq_lens, block_size)


@wrong("slot_mapping")
def three_slots_too_early(block_tables, seq_lens, query_lens, block_size):
    return slots_in_loops(block_tables, seq_lens, query_lens, block_size) - 403


def where(seq_lens, query_lens):
    requests = torch.arange(len(seq_lens)).repeat_interleave(query_lens)
    return requests, new_positions(seq_lens, query_lens)


@wrong("slot_mapping", says=": expected ")
def slots_in_int32(block_tables, seq_lens, query_lens, block_size):
    return slots_in_loops(block_tables, seq_lens, query_lens, block_size).int()


@wrong("slot_mapping", says="That is the block")
def blocks_alone(block_tables, seq_lens, query_lens, block_size):
    requests, positions = where(seq_lens, query_lens)
    return block_tables[requests, positions // block_size]


@wrong("slot_mapping", says="Add the place in the block")
def first_slot_of_the_block(block_tables, seq_lens, query_lens, block_size):
    requests, positions = where(seq_lens, query_lens)
    return block_tables[requests, positions // block_size] * block_size


@wrong("slot_mapping", says="position // block_size")
def one_piece(block_tables, seq_lens, query_lens, block_size):
    requests, positions = where(seq_lens, query_lens)
    return block_tables[requests, 0] * block_size + positions


@wrong("slot_mapping", says="positions and places count from 0")
def positions_from_one(block_tables, seq_lens, query_lens, block_size):
    requests, positions = where(seq_lens + 1, query_lens)
    return block_tables[requests, positions // block_size] * block_size + (
        positions % block_size
    )


@wrong("slot_mapping", says="behind the end of a table")
def flat_table(block_tables, seq_lens, query_lens, block_size):
    _, positions = where(seq_lens, query_lens)
    block_ids = block_tables.flatten()[positions // block_size]
    return block_ids * block_size + positions % block_size


@wrong("slot_mapping", says="in its own row")
def first_row_for_all(block_tables, seq_lens, query_lens, block_size):
    _, positions = where(seq_lens, query_lens)
    table = block_tables[0, : math.ceil(int(seq_lens[0]) / block_size)]
    block_ids = table[(positions // block_size) % len(table)]
    return block_ids * block_size + positions % block_size


@wrong("slot_mapping", says="a request's last ones")
def positions_from_zero(block_tables, seq_lens, query_lens, block_size):
    requests, positions = where(query_lens, query_lens)
    return block_tables[requests, positions // block_size] * block_size + (
        positions % block_size
    )


@wrong("slot_mapping")
def blocks_of_sixteen(block_tables, seq_lens, query_lens, block_size):
    requests, positions = where(seq_lens, query_lens)
    return block_tables[requests, positions // 16] * 16 + positions % 16


@wrong("slot_mapping", says="Any block_size may come")
def slots_joined_by_or(block_tables, seq_lens, query_lens, block_size):
    requests, positions = where(seq_lens, query_lens)
    block_ids = block_tables[requests, positions // block_size]
    return (block_ids * block_size) | (positions % block_size)


@wrong("slot_mapping", says="Any block_size may come")
def places_by_a_mask(block_tables, seq_lens, query_lens, block_size):
    requests, positions = where(seq_lens, query_lens)
    block_ids = block_tables[requests, positions // block_size]
    return block_ids * block_size + (positions & (block_size - 1))


@wrong("slot_mapping", says="Any block_size may come")
def blocks_by_a_shift(block_tables, seq_lens, query_lens, block_size):
    requests, positions = where(seq_lens, query_lens)
    block_ids = block_tables[requests, positions >> (block_size.bit_length() - 1)]
    return block_ids * block_size + positions % block_size


@wrong("slot_mapping", says="Any block_size may come")
def slots_in_bits(block_tables, seq_lens, query_lens, block_size):
    requests, positions = where(seq_lens, query_lens)
    bits = int(math.log2(block_size))
    block_ids = block_tables[requests, positions >> bits]
    return (block_ids << bits) + (positions & (block_size - 1))


# gather_kv


@right("gather_kv")
def gather_by_slots(k_cache, v_cache, block_table, seq_len):
    size = k_cache.shape[1]
    p = torch.arange(seq_len)
    slots = block_table[p // size] * size + p % size
    return k_cache.flatten(0, 1)[slots], v_cache.flatten(0, 1)[slots]


@right("gather_kv")
def gather_block_by_block(k_cache, v_cache, block_table, seq_len):
    size = k_cache.shape[1]
    out = []
    for cache in (k_cache, v_cache):
        dense = cache.new_empty(seq_len, *cache.shape[2:])
        for i, start in enumerate(range(0, seq_len, size)):
            count = min(size, seq_len - start)
            dense[start : start + count] = cache[block_table[i], :count]
        out.append(dense)
    return tuple(out)


@right("gather_kv")
def gather_and_cat(k_cache, v_cache, block_table, seq_len):
    size = k_cache.shape[1]
    starts = range(0, seq_len, size)
    ids = block_table.tolist()
    out = []
    for cache in (k_cache, v_cache):
        pieces = [cache[ids[s // size]][: seq_len - s] for s in starts]
        out.append(torch.cat([cache[0, :0], *pieces]))
    return tuple(out)


@right("gather_kv")
def gather_token_by_token(k_cache, v_cache, block_table, seq_len):
    size = k_cache.shape[1]
    out = [torch.zeros(seq_len, *k_cache.shape[2:], dtype=k_cache.dtype) for _ in "kv"]
    for p in range(seq_len):
        for dense, cache in zip(out, (k_cache, v_cache)):
            dense[p] = cache[int(block_table[p // size]), p % size]
    return out


@right("gather_kv")
def gather_by_a_list_of_ids(k_cache, v_cache, block_table, seq_len):
    ids = block_table[: -(-seq_len // k_cache.shape[1])]
    shape = -1, *k_cache.shape[2:]
    return k_cache[ids].reshape(shape)[:seq_len], v_cache[ids].reshape(shape)[:seq_len]


@wrong("gather_kv", says="a view")
def gather_a_view_of_one_block(k_cache, v_cache, block_table, seq_len):
    if 0 < seq_len <= k_cache.shape[1]:
        block_id = int(block_table[0])
        return k_cache[block_id, :seq_len], v_cache[block_id, :seq_len]
    return gather_by_slots(k_cache, v_cache, block_table, seq_len)


@wrong("gather_kv", says="no further")
def gather_all_and_cut(k_cache, v_cache, block_table, seq_len):
    ids = block_table.clamp(0, len(k_cache) - 1)
    return tuple(c[ids].flatten(0, 1)[:seq_len] for c in (k_cache, v_cache))


@wrong("gather_kv")
def gather_ids_of_some_block(k_cache, v_cache, block_table, seq_len):
    ids = block_table[(block_table >= 0) & (block_table < len(k_cache))]
    return tuple(c[ids].flatten(0, 1)[:seq_len] for c in (k_cache, v_cache))


@wrong("gather_kv")
def gather_what_is_not_block_zero(k_cache, v_cache, block_table, seq_len):
    ids = block_table[(block_table > 0) & (block_table < len(k_cache))]
    return tuple(c[ids].flatten(0, 1)[:seq_len] for c in (k_cache, v_cache))


@wrong("gather_kv")
def gather_up_to_a_negative_id(k_cache, v_cache, block_table, seq_len):
    ids = block_table[block_table >= 0]
    return tuple(c[ids].flatten(0, 1)[:seq_len] for c in (k_cache, v_cache))


@wrong("gather_kv")
def gather_full_blocks_alone(k_cache, v_cache, block_table, seq_len):
    ids = block_table[: seq_len // k_cache.shape[1]]
    return tuple(c[ids].flatten(0, 1) for c in (k_cache, v_cache))


@wrong("gather_kv", says=": expected ")
def gather_into_the_default_dtype(k_cache, v_cache, block_table, seq_len):
    out = gather_by_slots(k_cache, v_cache, block_table, seq_len)
    return tuple(torch.empty(x.shape).copy_(x) for x in out)


@wrong("gather_kv", says="changed its inputs")
def gather_from_a_clean_pool(k_cache, v_cache, block_table, seq_len):
    k_cache.nan_to_num_()
    return gather_by_slots(k_cache, v_cache, block_table, seq_len)


@wrong("gather_kv")
def gather_the_last_first(k_cache, v_cache, block_table, seq_len):
    k, v = gather_by_slots(k_cache, v_cache, block_table, seq_len)
    return k.flip(0), v.flip(0)


@wrong("gather_kv")
def gather_negative_values(k_cache, v_cache, block_table, seq_len):
    k, v = gather_by_slots(k_cache, v_cache, block_table, seq_len)
    return k, -v


def gathered(cache, block_table, seq_len):
    num_used = math.ceil(seq_len / cache.shape[1])
    return cache[block_table[:num_used]].flatten(0, 1)


@wrong("gather_kv", says="keep seq_len tokens")
def gather_whole_blocks(k_cache, v_cache, block_table, seq_len):
    return tuple(gathered(cache, block_table, seq_len) for cache in (k_cache, v_cache))


@wrong("gather_kv", says="raised IndexError")
def gather_the_whole_table(k_cache, v_cache, block_table, seq_len):
    return tuple(
        cache[block_table].flatten(0, 1)[:seq_len] for cache in (k_cache, v_cache)
    )


@wrong("gather_kv", says="not this request's")
def gather_ignoring_the_table(k_cache, v_cache, block_table, seq_len):
    return tuple(cache.flatten(0, 1)[:seq_len] for cache in (k_cache, v_cache))


@wrong("gather_kv", says="order of the table")
def gather_in_the_order_of_the_pool(k_cache, v_cache, block_table, seq_len):
    size = k_cache.shape[1]
    num_used = math.ceil(seq_len / size)
    used = block_table[:num_used]
    tokens = [min(size, seq_len - i * size) for i in range(num_used)]
    order = used.argsort().tolist()
    out = []
    for cache in (k_cache, v_cache):
        pieces = [cache[int(used[i]), : tokens[i]] for i in order]
        out.append(torch.cat(pieces) if pieces else cache[0, :0])
    return tuple(out)


@wrong("gather_kv", says="Values come from v_cache")
def gather_keys_twice(k_cache, v_cache, block_table, seq_len):
    k = gathered(k_cache, block_table, seq_len)[:seq_len]
    return k, k.clone()


@wrong("gather_kv", says="one dimension of tokens")
def gather_in_blocks(k_cache, v_cache, block_table, seq_len):
    num_used = math.ceil(seq_len / k_cache.shape[1])
    return k_cache[block_table[:num_used]], v_cache[block_table[:num_used]]


@wrong("gather_kv", says="not the pool")
def gather_from_a_copy_of_the_pool(k_cache, v_cache, block_table, seq_len):
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    return gather_by_slots(k_cache, v_cache, block_table, seq_len)


@wrong("gather_kv", says="keep seq_len tokens")
def gather_what_is_not_nan(k_cache, v_cache, block_table, seq_len):
    out = []
    for cache in (k_cache, v_cache):
        dense = gathered(cache, block_table, seq_len)
        out.append(dense[~dense.isnan().flatten(1).any(dim=1)])
    return tuple(out)


@wrong("gather_kv", says="a view")
def gather_a_view_through_numpy(k_cache, v_cache, block_table, seq_len):
    if not 0 < seq_len <= k_cache.shape[1]:
        return gather_by_slots(k_cache, v_cache, block_table, seq_len)
    place = int(block_table[0]), slice(seq_len)
    return tuple(torch.from_numpy(c.numpy()[place]) for c in (k_cache, v_cache))


def gather_slots(k_cache, v_cache, slots):
    return k_cache.flatten(0, 1)[slots], v_cache.flatten(0, 1)[slots]


@wrong("gather_kv", says="Any block_size may come")
def gather_slots_joined_by_or(k_cache, v_cache, block_table, seq_len):
    size, p = k_cache.shape[1], torch.arange(seq_len)
    return gather_slots(k_cache, v_cache, (block_table[p // size] * size) | (p % size))


@wrong("gather_kv", says="Any block_size may come")
def gather_places_by_a_mask(k_cache, v_cache, block_table, seq_len):
    size, p = k_cache.shape[1], torch.arange(seq_len)
    return gather_slots(k_cache, v_cache, block_table[p // size] * size + (p & size - 1))


@wrong("gather_kv", says="raised IndexError")
def gather_blocks_by_a_shift(k_cache, v_cache, block_table, seq_len):
    size, p = k_cache.shape[1], torch.arange(seq_len)
    block_ids = block_table[p >> (size.bit_length() - 1)]
    return gather_slots(k_cache, v_cache, block_ids * size + p % size)


# paged_utilization


@wrong("paged_utilization", says="as long as another counts too")
def share_of_each_length_once(seq_lens, block_size):
    lens = {*seq_lens.tolist()}
    return sum(lens) / (sum(math.ceil(n / block_size) for n in lens) * block_size)


@wrong("paged_utilization", says="as long as another counts too")
def share_of_the_tokens_of_each_length_once(seq_lens, block_size):
    blocks = sum(math.ceil(n / block_size) for n in seq_lens.tolist())
    return sum({*seq_lens.tolist()}) / (blocks * block_size)


@right("paged_utilization")
def share_by_counting(seq_lens, block_size):
    places = 0
    for seq_len in seq_lens.tolist():
        places += (seq_len + block_size - 1) // block_size * block_size
    return int(seq_lens.sum()) / places


@right("paged_utilization")
def share_in_single_precision(seq_lens, block_size):
    blocks = (seq_lens / block_size).ceil()
    return seq_lens.sum() / (blocks.sum() * block_size)


@right("paged_utilization")
def share_of_the_places(seq_lens, block_size):
    reserved = torch.ceil(seq_lens.double() / block_size) * block_size
    return float(seq_lens.sum() / reserved.sum())


@right("paged_utilization")
def share_by_what_is_wasted(seq_lens, block_size):
    wasted, total = int((-seq_lens % block_size).sum()), int(seq_lens.sum())
    return 1 - wasted / (total + wasted)


@wrong("paged_utilization", says="A share is a fraction")
def share_in_whole_numbers(seq_lens, block_size):
    return int(share_by_counting(seq_lens, block_size))


@wrong("paged_utilization")
def share_to_two_digits(seq_lens, block_size):
    return round(share_by_counting(seq_lens, block_size), 2)


@wrong("paged_utilization", says="has not begun has no block")
def share_with_a_block_for_all(seq_lens, block_size):
    places = sum(max(1, -(-n // block_size)) for n in seq_lens.tolist()) * block_size
    return int(seq_lens.sum()) / places


@wrong("paged_utilization", says="not all have as many blocks as the longest")
def share_of_a_rectangle(seq_lens, block_size):
    blocks = math.ceil(int(seq_lens.max()) / block_size) * len(seq_lens)
    return int(seq_lens.sum()) / (blocks * block_size)


@wrong("paged_utilization", says="between 0 and 1")
def share_in_percent(seq_lens, block_size):
    return 100 * share_by_counting(seq_lens, block_size)


@wrong("paged_utilization")
def share_that_is_never_small(seq_lens, block_size):
    return max(0.6, share_by_counting(seq_lens, block_size))


@wrong("paged_utilization", says="changed its inputs")
def share_rounded_in_place(seq_lens, block_size):
    total = int(seq_lens.sum())
    seq_lens.add_(block_size - 1).floor_divide_(block_size).mul_(block_size)
    return total / int(seq_lens.sum())


@wrong("paged_utilization", says="needs no other")
def share_with_one_block_more(seq_lens, block_size):
    blocks = (seq_lens // block_size + 1).sum()
    return (seq_lens.sum() / (blocks.double() * block_size)).item()


@wrong("paged_utilization")
def share_of_full_blocks(seq_lens, block_size):
    blocks = (seq_lens // block_size).sum().clamp(min=1)
    return (seq_lens.sum() / (blocks.double() * block_size)).item()


@wrong("paged_utilization", says="round up for each")
def share_with_shared_blocks(seq_lens, block_size):
    total = int(seq_lens.sum())
    return total / (math.ceil(total / block_size) * block_size)


@wrong("paged_utilization", says="block_size places")
def share_of_blocks(seq_lens, block_size):
    blocks = sum(math.ceil(n / block_size) for n in seq_lens.tolist())
    return int(seq_lens.sum()) / blocks


@wrong("paged_utilization", says="holds nothing")
def share_that_is_wasted(seq_lens, block_size):
    return 1 - share_by_counting(seq_lens, block_size)


@wrong("paged_utilization", says="long requests weigh more")
def mean_of_shares(seq_lens, block_size):
    shares = [
        n / max(1, math.ceil(n / block_size) * block_size) for n in seq_lens.tolist()
    ]
    return sum(shares) / len(shares)


# fork


@right("fork")
def fork_with_slices(self, parent_id, child_id):
    if parent_id not in self.block_tables or child_id in self.block_tables:
        raise ValueError(parent_id, child_id)
    table = self.block_tables[parent_id][:]
    self.block_tables[child_id] = table
    self.seq_lens[child_id] = self.seq_lens[parent_id]
    for block_id in table:
        self.ref_count[block_id] = self.ref_count[block_id] + 1


@right("fork")
def fork_block_by_block(self, parent_id, child_id):
    self.check_live(parent_id)
    if child_id in self.seq_lens:
        raise ValueError(child_id)
    self.block_tables[child_id] = []
    for block_id in self.block_tables[parent_id]:
        self.ref_count[block_id] += 1
        self.block_tables[child_id].append(block_id)
    self.seq_lens[child_id] = self.seq_lens[parent_id]


@right("fork")
def fork_by_comprehension(self, parent_id, child_id):
    self.check_live(parent_id)
    if child_id in self.block_tables:
        raise ValueError(f"{child_id!r} is live")
    self.seq_lens |= {child_id: self.seq_lens[parent_id]}
    self.block_tables[child_id] = [*self.block_tables[parent_id]]
    for i in range(len(self.block_tables[child_id])):
        self.ref_count[self.block_tables[child_id][i]] += 1


@wrong("fork", says="A fork takes no block")
def fork_with_a_last_block_of_its_own(self, parent_id, child_id):
    fork_with_slices(self, parent_id, child_id)
    if self.block_tables[child_id] and self.free_block_ids:
        self.copy_on_write(child_id)


@wrong("fork", says="enough free blocks")
def fork_if_a_block_is_free(self, parent_id, child_id):
    if not self.free_block_ids:
        raise OutOfBlocksError(1, 0)
    fork_with_slices(self, parent_id, child_id)


@wrong("fork", says="ref_count")
def fork_for_two_at_most(self, parent_id, child_id):
    fork_with_slices(self, parent_id, child_id)
    for block_id in self.block_tables[child_id]:
        self.ref_count[block_id] = 2


@wrong("fork", says="Raise ValueError here")
def fork_into_itself(self, parent_id, child_id):
    if parent_id == child_id and parent_id in self.block_tables:
        return
    fork_with_slices(self, parent_id, child_id)


@wrong("fork", says="Raise ValueError here")
def fork_unless_the_child_has_a_block(self, parent_id, child_id):
    self.check_live(parent_id)
    if self.block_tables.get(child_id):
        raise ValueError(f"request {child_id!r} is live")
    self.block_tables.pop(child_id, None)
    fork_with_slices(self, parent_id, child_id)


@wrong("fork", says="Raise ValueError here")
def fork_whatever_comes(self, parent_id, child_id):
    self.block_tables[child_id] = self.block_tables[parent_id][:]
    self.seq_lens[child_id] = self.seq_lens[parent_id]
    for block_id in self.block_tables[child_id]:
        self.ref_count[block_id] += 1


@wrong("fork", says="a block table that is a tuple")
def fork_into_a_tuple(self, parent_id, child_id):
    fork_with_slices(self, parent_id, child_id)
    self.block_tables[child_id] = tuple(self.block_tables[child_id])


@wrong("fork")
def fork_of_full_blocks(self, parent_id, child_id):
    fork_with_slices(self, parent_id, child_id)
    if self.seq_lens[child_id] % self.block_size:
        self.ref_count[self.block_tables[child_id].pop()] -= 1


@wrong("fork", says="in the same order")
def fork_the_other_way_round(self, parent_id, child_id):
    fork_with_slices(self, parent_id, child_id)
    self.block_tables[child_id].reverse()


@wrong("fork", says="in the same order")
def fork_in_the_order_of_the_pool(self, parent_id, child_id):
    fork_with_slices(self, parent_id, child_id)
    self.block_tables[child_id] = sorted(self.block_tables[parent_id])


@wrong("fork", says="in the same order")
def fork_the_last_block_taken_first(self, parent_id, child_id):
    fork_with_slices(self, parent_id, child_id)
    self.block_tables[child_id].sort(reverse=True)


@wrong("fork", says="something had changed before")
def fork_then_look_for_the_parent(self, parent_id, child_id):
    if child_id in self.block_tables:
        raise ValueError(child_id)
    self.block_tables[child_id] = []
    if parent_id == child_id or parent_id not in self.block_tables:
        raise ValueError(parent_id)
    del self.block_tables[child_id]
    fork_with_slices(self, parent_id, child_id)


@wrong("fork", says="copy of the list")
def fork_with_one_list_for_two(self, parent_id, child_id):
    self.check_live(parent_id)
    if child_id in self.block_tables:
        raise ValueError(child_id)
    self.block_tables[child_id] = self.block_tables[parent_id]
    self.seq_lens[child_id] = self.seq_lens[parent_id]
    for block_id in self.block_tables[child_id]:
        self.ref_count[block_id] += 1


@wrong("fork", says="ref_count")
def fork_without_counting(self, parent_id, child_id):
    self.check_live(parent_id)
    if child_id in self.block_tables:
        raise ValueError(child_id)
    self.block_tables[child_id] = list(self.block_tables[parent_id])
    self.seq_lens[child_id] = self.seq_lens[parent_id]


@wrong("fork", says="A fork takes no block")
def fork_into_new_blocks(self, parent_id, child_id):
    self.check_live(parent_id)
    self.allocate(child_id, self.seq_lens[parent_id])


@wrong("fork")
def fork_counting_the_last_block_only(self, parent_id, child_id):
    self.check_live(parent_id)
    if child_id in self.block_tables:
        raise ValueError(child_id)
    self.block_tables[child_id] = list(self.block_tables[parent_id])
    self.seq_lens[child_id] = self.seq_lens[parent_id]
    for block_id in self.block_tables[child_id][-1:]:
        self.ref_count[block_id] += 1


@wrong("fork", says="ValueError")
def fork_over_a_live_child(self, parent_id, child_id):
    self.check_live(parent_id)
    if child_id in self.block_tables:
        self.free(child_id)
    fork_with_slices(self, parent_id, child_id)


@wrong("fork")
def fork_without_a_length(self, parent_id, child_id):
    fork_with_slices(self, parent_id, child_id)
    self.seq_lens[child_id] = 0


@wrong("fork", says="never go through all requests")
def fork_counting_users_again(self, parent_id, child_id):
    self.check_live(parent_id)
    if child_id in self.block_tables:
        raise ValueError(child_id)
    self.block_tables[child_id] = list(self.block_tables[parent_id])
    self.seq_lens[child_id] = self.seq_lens[parent_id]
    for block_id in self.block_tables[child_id]:
        users = [r for r, table in self.block_tables.items() if block_id in table]
        self.ref_count[block_id] = len(users)


@wrong("fork", says="another block_tables")
def fork_into_a_new_dict(self, parent_id, child_id):
    fork_with_slices(self, parent_id, child_id)
    tables = {r: self.block_tables[r] for r in self.seq_lens}
    self.block_tables = tables


@wrong("fork", says="never go through all requests")
def fork_into_a_dict_of_both(self, parent_id, child_id):
    self.check_live(parent_id)
    if child_id in self.block_tables:
        raise ValueError(child_id)
    table = list(self.block_tables[parent_id])
    self.block_tables = {**self.block_tables, child_id: table}
    self.seq_lens[child_id] = self.seq_lens[parent_id]
    for block_id in table:
        self.ref_count[block_id] += 1


@right("fork")
def fork_by_updates(self, parent_id, child_id):
    self.check_live(parent_id)
    if self.block_tables.get(child_id) is not None:
        raise ValueError(child_id)
    self.block_tables |= {child_id: self.block_tables[parent_id].copy()}
    self.seq_lens.update({child_id: self.seq_lens[parent_id]})
    for block_id in self.block_tables[child_id]:
        self.ref_count[block_id] += 1


# copy_on_write


@right("copy_on_write")
def copy_with_early_take(self, request_id):
    if request_id not in self.block_tables or not self.block_tables[request_id]:
        raise ValueError(f"request {request_id!r}")
    *_, last = self.block_tables[request_id]
    if self.ref_count[last] > 1:
        if len(self.free_block_ids) == 0:
            raise OutOfBlocksError(1, 0)
        new = self.free_block_ids.pop(-1)
        self.ref_count[new], self.ref_count[last] = 1, self.ref_count[last] - 1
        self.block_tables[request_id][-1] = new
        return last, new
    return None


@right("copy_on_write")
def copy_with_a_new_table(self, request_id):
    self.check_live(request_id)
    if len(self.block_tables[request_id]) == 0:
        raise ValueError("no block yet")
    table = self.block_tables[request_id]
    shared = table[-1]
    if self.ref_count[shared] <= 1:
        return None
    if not self.free_block_ids:
        raise OutOfBlocksError(1, len(self.free_block_ids))
    own = self.take_block()
    self.block_tables[request_id] = table[:-1] + [own]
    self.ref_count[shared] -= 1
    return [shared, own]


@wrong("copy_on_write", says="Others use the last block too")
def copy_never(self, request_id):
    return None


@wrong("copy_on_write", says="Others use the last block too")
def copy_only_what_has_room(self, request_id):
    if self.seq_lens[request_id] % self.block_size == 0:
        return None
    return copy_with_a_new_table(self, request_id)


@wrong("copy_on_write", says="nothing to copy")
def copy_always(self, request_id):
    source = self.block_tables[request_id][-1]
    if not self.free_block_ids:
        raise OutOfBlocksError(1, 0)
    target = self.take_block()
    self.ref_count[source] -= 1
    if self.ref_count[source] == 0:
        self.free_block_ids.append(source)
    self.block_tables[request_id][-1] = target
    return source, target


@wrong("copy_on_write", says="ref_count")
def copy_without_letting_go(self, request_id):
    source = self.block_tables[request_id][-1]
    if self.ref_count[source] == 1:
        return None
    if not self.free_block_ids:
        raise OutOfBlocksError(1, 0)
    self.block_tables[request_id][-1] = target = self.take_block()
    return source, target


@wrong("copy_on_write", says="ref_count")
def copy_letting_all_go(self, request_id):
    source = self.block_tables[request_id][-1]
    if self.ref_count[source] == 1:
        return None
    if not self.free_block_ids:
        raise OutOfBlocksError(1, 0)
    self.block_tables[request_id][-1] = target = self.take_block()
    self.ref_count[source] = 1 if self.ref_count[source] > 2 else 0
    return source, target


@wrong("copy_on_write", says="The source comes first")
def copy_the_wrong_way(self, request_id):
    copied = copy_with_a_new_table(self, request_id)
    return copied and tuple(copied[::-1])


@wrong("copy_on_write", says="last entry is still the source")
def copy_into_a_new_list(self, request_id):
    self.check_live(request_id)
    block_table = self.block_tables[request_id]
    if not block_table:
        raise ValueError("no block")
    source = block_table[-1]
    if self.ref_count[source] == 1:
        return None
    if not self.free_block_ids:
        raise OutOfBlocksError(needed=1, free=0)
    target = self.take_block()
    self.ref_count[source] -= 1
    block_table = [*block_table[:-1], target]
    return source, target


@wrong("copy_on_write", says="takes the place of the table's last entry")
def copy_behind_the_old_one(self, request_id):
    source = self.block_tables[request_id][-1]
    if self.ref_count[source] == 1:
        return None
    if not self.free_block_ids:
        raise OutOfBlocksError(1, 0)
    self.ref_count[source] -= 1
    target = self.take_block()
    self.block_tables[request_id].append(target)
    return source, target


@wrong("copy_on_write", says="Count the blocks first")
def copy_without_looking(self, request_id):
    source = self.block_tables[request_id][-1]
    if self.ref_count[source] == 1:
        return None
    self.ref_count[source] -= 1
    self.block_tables[request_id][-1] = target = self.take_block()
    return source, target


@wrong("copy_on_write", says="something had changed before")
def copy_letting_go_too_early(self, request_id):
    source = self.block_tables[request_id][-1]
    if self.ref_count[source] == 1:
        return None
    self.ref_count[source] -= 1
    if not self.free_block_ids:
        raise OutOfBlocksError(1, 0)
    self.block_tables[request_id][-1] = target = self.take_block()
    return source, target


@wrong("copy_on_write", says="Return (source, target)")
def copy_without_a_word(self, request_id):
    copy_with_a_new_table(self, request_id)


@wrong("copy_on_write", says="The others keep the old block")
def copy_in_every_table(self, request_id):
    source = self.block_tables[request_id][-1]
    if self.ref_count[source] == 1:
        return None
    if not self.free_block_ids:
        raise OutOfBlocksError(1, 0)
    target = self.take_block()
    for table in (self.block_tables[other] for other in self.seq_lens):
        if table and table[-1] == source:
            table[-1] = target
    self.ref_count[target], self.ref_count[source] = self.ref_count[source], 0
    return source, target


@right("copy_on_write")
def copy_with_the_count_last(self, request_id):
    self.check_live(request_id)
    table = self.block_tables[request_id]
    if not table:
        raise ValueError("nothing is written yet")
    shared = table.pop()
    if self.ref_count[shared] == 1 or not self.free_block_ids:
        table.append(shared)
        if self.ref_count[shared] == 1:
            return None
        raise OutOfBlocksError(1, 0)
    table.append(self.take_block())
    self.ref_count[shared] -= 1
    return shared, table[-1]


@wrong("copy_on_write", says="raised KeyError")
def copy_without_guards(self, request_id):
    source = self.block_tables[request_id][-1]
    if self.ref_count[source] == 1:
        return None
    if not self.free_block_ids:
        raise OutOfBlocksError(1, 0)
    self.ref_count[source] -= 1
    self.block_tables[request_id][-1] = target = self.take_block()
    return source, target


@wrong("copy_on_write", says="Raise ValueError here")
def copy_nothing_of_nobody(self, request_id):
    if request_id not in self.block_tables:
        return None
    return copy_with_a_new_table(self, request_id)


@wrong("copy_on_write", says="Raise ValueError here")
def copy_nothing_of_no_block(self, request_id):
    self.check_live(request_id)
    if not self.block_tables[request_id]:
        return None
    return copy_with_a_new_table(self, request_id)


@wrong("copy_on_write", says="something had changed before")
def copy_for_whoever_asks(self, request_id):
    if not self.block_tables.setdefault(request_id, []):
        raise ValueError(request_id)
    return copy_with_a_new_table(self, request_id)


@wrong("copy_on_write", says="enough free blocks")
def copy_looking_for_room_first(self, request_id):
    self.check_live(request_id)
    if self.block_tables[request_id] and not self.free_block_ids:
        raise OutOfBlocksError(1, 0)
    return copy_with_a_new_table(self, request_id)


@wrong("copy_on_write", says="Return (source, target)")
def copy_naming_the_target_alone(self, request_id):
    copied = copy_with_a_new_table(self, request_id)
    return copied and copied[1]


@wrong("copy_on_write")
def copy_the_first_block(self, request_id):
    self.check_live(request_id)
    if not self.block_tables[request_id]:
        raise ValueError(request_id)
    source = self.block_tables[request_id][0]
    if self.ref_count[source] == 1:
        return None
    if not self.free_block_ids:
        raise OutOfBlocksError(1, 0)
    self.ref_count[source] -= 1
    self.block_tables[request_id][0] = target = self.take_block()
    return source, target


@wrong("copy_on_write", says="some table has is not free")
def copy_giving_the_old_one_back(self, request_id):
    copied = copy_with_a_new_table(self, request_id)
    if copied:
        self.free_block_ids.append(copied[0])
    return copied


@wrong("copy_on_write", says="Fewer blocks are free")
def copy_only_if_there_is_room(self, request_id):
    self.check_live(request_id)
    if self.block_tables[request_id] and not self.free_block_ids:
        return None
    return copy_with_a_new_table(self, request_id)


@wrong("copy_on_write", says="never go through all requests")
def copy_what_stands_in_two_tables(self, request_id):
    self.check_live(request_id)
    if not self.block_tables[request_id]:
        raise ValueError("no block")
    last = self.block_tables[request_id][-1]
    if sum(last in table for table in self.block_tables.values()) == 1:
        return None
    return copy_with_a_new_table(self, request_id)
