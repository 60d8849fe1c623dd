import copy

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from lib.block_manager import BlockManager, OutOfBlocksError


def state(manager):
    return copy.deepcopy(vars(manager))


class ManagerAgainstDictionary(RuleBasedStateMachine):
    """Random operations, with the texts of all requests in a plain dictionary beside.

    Each token that is written is a new number. What a block holds is written down by
    block id, as a pool would: at any time, a request's blocks must give its text.
    """

    requests = Bundle("requests")

    @initialize(num_blocks=st.integers(1, 9), block_size=st.integers(1, 4))
    def begin(self, num_blocks, block_size):
        self.manager = BlockManager(num_blocks, block_size)
        self.texts = {}
        self.pool = {}  # (block id, place) -> token
        self.num_written = self.num_requests = 0

    def blocks_wanted(self, num_tokens):
        return -(-num_tokens // self.manager.block_size)

    def write(self, request_id, num_tokens):
        manager, text = self.manager, self.texts[request_id]
        for _ in range(num_tokens):
            block_id = manager.block_tables[request_id][len(text) // manager.block_size]
            self.num_written += 1
            self.pool[block_id, len(text) % manager.block_size] = self.num_written
            text.append(self.num_written)

    def new_id(self):
        self.num_requests += 1
        return self.num_requests

    @rule(target=requests, num_tokens=st.integers(0, 9))
    def allocate(self, num_tokens):
        request_id, before = self.new_id(), state(self.manager)
        try:
            self.manager.allocate(request_id, num_tokens)
        except OutOfBlocksError as error:
            assert error.needed == self.blocks_wanted(num_tokens) > error.free
            assert state(self.manager) == before
        else:
            self.texts[request_id] = []
            self.write(request_id, num_tokens)
        return request_id  # refused or not: a later rule may ask for it

    @rule(request_id=requests, num_tokens=st.integers(0, 9))
    def append(self, request_id, num_tokens):
        manager, before = self.manager, state(self.manager)
        if request_id not in self.texts:
            with pytest.raises(ValueError, match="expected a live one"):
                manager.append(request_id, num_tokens)
            assert state(manager) == before
            return
        needed = manager.blocks_needed({request_id: num_tokens})
        try:
            copied = manager.append(request_id, num_tokens)
        except OutOfBlocksError as error:
            assert (error.needed, error.free) == (needed, len(before["free_block_ids"]))
            assert needed > error.free and state(manager) == before
            return
        assert len(before["free_block_ids"]) - len(manager.free_block_ids) == needed
        if copied:
            source, target = copied
            for place in range(manager.block_size):
                if (source, place) in self.pool:
                    self.pool[target, place] = self.pool[source, place]
        self.write(request_id, num_tokens)

    @rule(target=requests, parent_id=requests)
    def fork(self, parent_id):
        child_id, before = self.new_id(), state(self.manager)
        if parent_id in self.texts:
            self.manager.fork(parent_id, child_id)
            self.texts[child_id] = list(self.texts[parent_id])
        else:
            with pytest.raises(ValueError, match="expected a live one"):
                self.manager.fork(parent_id, child_id)
            assert state(self.manager) == before
        return child_id

    @rule(request_id=consumes(requests), is_twice=st.booleans())
    def free(self, request_id, is_twice):
        if request_id in self.texts:
            self.manager.free(request_id)
            del self.texts[request_id]
            if not is_twice:
                return
        before = state(self.manager)
        with pytest.raises(ValueError, match="unknown or was freed"):
            self.manager.free(request_id)
        assert state(self.manager) == before

    @invariant()
    def integrity(self):
        if hasattr(self, "manager"):
            self.manager.check_integrity()

    @invariant()
    def each_request_reads_its_own_text(self):
        for request_id, text in getattr(self, "texts", {}).items():
            size = self.manager.block_size
            table = self.manager.block_tables[request_id]
            got = [self.pool[table[p // size], p % size] for p in range(len(text))]
            assert got == text
            assert self.manager.seq_lens[request_id] == len(text)
            assert len(table) == self.blocks_wanted(len(text))

    @invariant()
    def filled_slots_are_those_that_hold_a_token(self):
        if hasattr(self, "manager"):
            size, slots = self.manager.block_size, set()
            for request_id, text in self.texts.items():
                table = self.manager.block_tables[request_id]
                slots |= {(table[p // size], p % size) for p in range(len(text))}
            assert self.manager.num_filled_slots() == len(slots)


ManagerAgainstDictionary.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True
)
TestManagerAgainstDictionary = ManagerAgainstDictionary.TestCase


def test_an_edge_is_crossed_when_the_block_is_full_and_not_before():
    manager = BlockManager(num_blocks=9, block_size=4)
    manager.allocate("a", 0)
    num_blocks = []
    for _ in range(9):
        manager.append("a")
        num_blocks.append(len(manager.block_tables["a"]))
    assert num_blocks == [1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_nothing_to_write_is_nothing_to_copy():
    manager = BlockManager(num_blocks=4, block_size=4)
    manager.allocate("a", 3)
    manager.fork("a", "b")
    assert manager.append("b", 0) is None
    assert manager.block_tables == {"a": [0], "b": [0]}


def test_a_copy_needs_a_free_block():
    manager = BlockManager(num_blocks=1, block_size=4)
    manager.allocate("a", 3)
    manager.fork("a", "b")
    before = state(manager)
    with pytest.raises(OutOfBlocksError, match="at most 0 blocks.* got 1"):
        manager.copy_on_write("b")
    assert state(manager) == before


def test_what_all_of_a_batch_need_is_counted_exactly():
    manager = BlockManager(num_blocks=8, block_size=4)
    manager.allocate("a", 6)
    manager.fork("a", "b")
    manager.fork("a", "c")
    for writers, needed in ((["a"], 1), (["a", "b"], 2), (["a", "b", "c"], 2)):
        assert manager.blocks_needed(dict.fromkeys(writers, 1)) == needed
    assert manager.blocks_needed({"a": 3, "b": 0}) == 2  # a copy, and a new one
    copies = [manager.append(request_id) for request_id in "abc"]
    assert [copied is not None for copied in copies] == [True, True, False]
    manager.check_integrity()


def test_blocks_are_taken_in_constant_time_from_a_list_that_is_never_searched():
    class NoSearching(list):
        def index(self, *args):
            raise AssertionError("searched")

        remove = __contains__ = insert = index

    manager = BlockManager(num_blocks=50, block_size=2)
    manager.free_block_ids = NoSearching(manager.free_block_ids)
    manager.allocate("a", 20)
    manager.append("a", 5)
    manager.fork("a", "b")
    manager.append("b")
    manager.free("a")
    manager.free("b")
    manager.check_integrity()


@pytest.mark.parametrize(
    "num_blocks, block_size, words",
    [
        (4, 0, "block_size: expected an integer of at least 1, got 0"),
        (0, 4, "num_blocks: expected an integer of at least 1, got 0"),
        (4, 2.0, "block_size"),
    ],
)
def test_a_pool_of_nothing_is_refused(num_blocks, block_size, words):
    with pytest.raises(ValueError, match=words):
        BlockManager(num_blocks, block_size)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m: m.allocate("a", 1), "expected a new one"),
        (lambda m: m.allocate("b", -1), "expected an integer of at least 0, got -1"),
        (lambda m: m.append("a", 1.5), "expected an integer"),
        (lambda m: m.append("x"), r"expected a live one \('a', 'empty'\)"),
        (lambda m: m.fork("x", "b"), "expected a live one"),
        (lambda m: m.fork("a", "a"), "expected a new one"),
        (lambda m: m.free("x"), "unknown or was freed"),
        (lambda m: m.copy_on_write("x"), "unknown or was freed"),
        (lambda m: m.copy_on_write("empty"), "expected a block, got none yet"),
        (lambda m: m.blocks_needed({"x": 1}), "unknown or was freed"),
    ],
)
def test_bad_calls_are_refused_and_change_nothing(call, words):
    manager = BlockManager(4, 2)
    manager.allocate("a", 3)
    manager.allocate("empty", 0)
    before = state(manager)
    with pytest.raises(ValueError, match=words):
        call(manager)
    assert state(manager) == before


def shared_last_block_written_without_a_copy(manager):
    manager.seq_lens["b"] += 1


def one_block_for_two(manager):
    manager.block_tables["c"] = [0]
    manager.seq_lens["c"] = 1


def freed_too_early(manager):
    manager.free_block_ids.append(0)


def lost(manager):
    manager.free_block_ids.pop()


def freed_twice(manager):
    manager.free_block_ids.append(manager.free_block_ids[-1])


def short_table(manager):
    manager.seq_lens["a"] = manager.seq_lens["b"] = 5


def unknown_block(manager):
    manager.free_block_ids.append(77)


def count_too_high(manager):
    manager.ref_count[0] += 1


def another_place_in_the_text(manager):
    manager.allocate("c", 4)
    manager.block_tables["c"].reverse()
    manager.block_tables["d"], manager.seq_lens["d"] = [3, 2][::-1], 4
    for block_id in (2, 3):
        manager.ref_count[block_id] += 1


def forgotten_length(manager):
    del manager.seq_lens["a"]


@pytest.mark.parametrize(
    "spoil",
    [
        shared_last_block_written_without_a_copy,
        one_block_for_two,
        freed_too_early,
        lost,
        freed_twice,
        short_table,
        unknown_block,
        count_too_high,
        forgotten_length,
        another_place_in_the_text,
    ],
)
def test_integrity_sees_what_is_broken(spoil):
    manager = BlockManager(6, 2)
    manager.allocate("a", 3)
    manager.fork("a", "b")
    manager.check_integrity()
    spoil(manager)
    with pytest.raises(AssertionError):
        manager.check_integrity()


@pytest.mark.parametrize("sizes", [(True, 4), (4, True), (4, 2.0), (0, 4)])
def test_sizes_of_a_pool_are_integers(sizes):
    with pytest.raises(ValueError, match="expected an integer of at least 1"):
        BlockManager(*sizes)


def test_integers_of_numpy_are_integers():
    manager = BlockManager(np.int64(90), np.uint8(4))
    manager.allocate("a", np.uint8(250))
    manager.append("a", np.uint8(10))
    assert manager.seq_lens == {"a": 260} and len(manager.block_tables["a"]) == 65
    manager.check_integrity()


def test_a_length_without_a_request_is_found():
    manager = BlockManager(4, 2)
    manager.seq_lens["gone"] = 3
    with pytest.raises(AssertionError, match="seq_lens: expected .* got .'gone'."):
        manager.check_integrity()
