"""The prefix cache beside a plain one that computes everything, and what it promises.

Texts are of few letters, so that they often begin alike. Blocks that hold nothing are NaN
wherever that is allowed, so that whoever reads them shows it.
"""

import contextlib
import copy
import hashlib
import itertools
import random
import struct
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import Interrupt, assert_close, random_model
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from lib import block_manager, kv_cache, paged_kv_cache, prefix_cache
from lib.block_manager import OutOfBlocksError
from lib.generate import forward_cached, generate_cached, generate_recompute
from lib.paged_kv_cache import PagedKVCache
from lib.prefix_cache import PrefixKVCache, block_hashes, evict, find_prefix

MODEL = random_model(
    dtype=torch.float64,
    vocab_size=5,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    d_model=8,
    d_ff=8,
    max_seq_len=64,
)
LETTERS = range(MODEL.config.vocab_size)


def prefix_kv_cache(num_blocks, block_size, **changes):
    return PrefixKVCache(
        MODEL.config, num_blocks, block_size, dtype=torch.float64, **changes
    )


def extend(cache, new):
    """A step over these tokens, by request; logits after each, by request."""
    rows = [new.get(request_id, []) for request_id in cache.request_ids]
    lens = [len(row) for row in rows]
    if not any(lens):
        return {request_id: torch.empty(0) for request_id in cache.request_ids}
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    logits = forward_cached(MODEL, cache, ids, torch.tensor(lens, dtype=torch.int64))
    return dict(zip(cache.request_ids, logits.split(lens)))


def compute(cache, request_id, token_ids):
    """Begin and do all that is left of a text in one step; how much was found."""
    cache.begin(request_id, token_ids)
    num_found = int(cache.seq_lens[cache.request_ids.index(request_id)])
    extend(cache, {request_id: token_ids[num_found:]})
    return num_found


def kv_of(text):
    """Keys and values of a text, computed at once: (2, L, len(text), G, D)."""
    if text not in KV:
        cache = PagedKVCache(MODEL.config, 1, len(text), dtype=torch.float64)
        cache.begin(0)
        extend(cache, {0: list(text)})
        KV[text] = torch.stack([cache.k_cache[:, 0], cache.v_cache[:, 0]])
    return KV[text]


KV = {}
MODULES = prefix_cache, block_manager, paged_kv_cache, kv_cache


def check_names(cache, names_given):
    """Whatever can be found holds the keys and values of its whole text."""
    size, names = cache.block_size, cache.manager.names
    for block_id in names.block_of_hash.values():
        name = names.name_of_block[block_id]
        text, previous = name.token_ids, name.previous
        while previous:
            text = names_given[previous].token_ids + text
            previous = names_given[previous].previous
        got = torch.stack([cache.k_cache[:, block_id], cache.v_cache[:, block_id]])
        assert_close(got, kv_of(text)[:, :, -size:])


def note_names(patch):
    """A dictionary that gets every name that is given from now on, by its number."""
    given, give = {}, prefix_cache.BlockNames.give

    def noting(*args):
        name = give(*args)
        given[name.number] = name
        return name

    patch.setattr(prefix_cache.BlockNames, "give", noting)
    return given


def by_depth(token_ids, block_size, previous=b""):
    """Hashes that collide wherever blocks stand at the same place of their texts."""
    first = int.from_bytes(previous, "big") + 1
    count = len(token_ids) // block_size
    return [(first + i).to_bytes(2, "big") for i in range(count)]


def by_tokens(token_ids, block_size, previous=b""):
    """Hashes that know a block's own tokens only: no chain."""
    blocks = len(token_ids) // block_size
    return [
        bytes(token_ids[i * block_size : (i + 1) * block_size]) for i in range(blocks)
    ]


def all_the_same(token_ids, block_size, previous=b""):
    return [b""] * (len(token_ids) // block_size)


HASHES = [block_hashes, by_depth, by_tokens, all_the_same]
row_numbers = st.integers(0, 5)
texts = st.tuples(st.integers(0, 2), st.integers(0, 12), st.integers(0, 3))
counts = st.lists(st.sampled_from([0, 1, 1, 2, 3, 9]), min_size=6, max_size=6)


class PrefixAgainstPlain(RuleBasedStateMachine):
    """Each request also lives in a plain cache, which has computed all of its text."""

    @initialize(
        block_size=st.sampled_from([1, 2, 3, 4]),
        num_blocks=st.integers(5, 14),
        fused=st.booleans(),
        hashes=st.sampled_from([block_hashes, *HASHES]),
        seed=st.integers(0, 99),
        choices=st.lists(texts, min_size=1, max_size=3),
    )
    def make(self, block_size, num_blocks, fused, hashes, seed, choices):
        self.patch = pytest.MonkeyPatch()
        self.names_given = note_names(self.patch)
        self.patch.setattr(prefix_cache, "block_hashes", hashes)
        self.cache = prefix_kv_cache(num_blocks, block_size, fused_decode=fused)
        self.plain = PagedKVCache(MODEL.config, 200, block_size, dtype=torch.float64)
        self.random = random.Random(seed)
        self.documents = [self.random.choices(LETTERS, k=12) for _ in range(2)]
        self.documents.append(self.documents[0][:6] + self.documents[1][6:])
        self.texts = {}  # request -> the list that the cache was given
        self.num_done = {}  # tokens that are in the cache
        self.num_requests = 0
        for choice in choices:
            self.begin(choice, True, False)

    def teardown(self):
        if hasattr(self, "patch"):
            self.patch.undo()

    def new_id(self):
        self.num_requests += 1
        return f"r{self.num_requests}"

    def state(self):
        cache = self.cache
        tables = copy.deepcopy(cache.manager.block_tables)
        counts = list(cache.manager.ref_count), cache.num_free_blocks
        return list(cache.request_ids), cache.seq_lens.tolist(), tables, counts

    def text(self, choice):
        document, length, num_more = choice
        more = self.random.choices(LETTERS, k=num_more)
        return self.documents[document][:length] + more or [0]

    # Rules.

    @precondition(lambda self: len(self.texts) < 6)
    @rule(choice=texts, is_known=st.integers(0, 9), can_find=st.booleans())
    def begin(self, choice, is_known, can_find):
        text = self.text(choice)
        self.begin_with(text, text if is_known else [], can_find)

    @precondition(lambda self: 0 < len(self.texts) < 6)
    @rule(choices=st.lists(texts, min_size=1, max_size=3))
    def visit(self, choices):
        """Some come one by one, compute their text, and go: it lies idle."""
        for choice in choices:
            text = self.text(choice)
            self.begin_with(text, text, True)
            start = list(self.num_done.values())[-1]
            self.take({list(self.texts)[-1]: text[start:]})
            self.free(len(self.texts) - 1)

    def begin_with(self, text, known, can_find):
        request_id, before = self.new_id(), self.cache.num_free_blocks
        if can_find:
            num_found, num_in_use = self.cache.find(known)
        self.cache.begin(request_id, known)
        num_done = int(self.cache.seq_lens[-1])
        num_blocks = num_done // self.cache.block_size
        assert num_done % self.cache.block_size == 0 and num_done <= max(len(text) - 1, 0)
        assert len(self.cache.manager.block_tables[request_id]) == num_blocks
        assert self.cache.num_blocks_of(request_id) == num_blocks
        if can_find:
            assert num_found == num_done
            assert self.cache.num_free_blocks == before - (num_blocks - num_in_use)
        self.plain.begin(request_id)
        extend(self.plain, {request_id: text[:num_done]})
        self.texts[request_id], self.num_done[request_id] = text, num_done

    @precondition(lambda self: len(self.texts) > 1)
    @rule(row=row_numbers)
    def free(self, row):
        request_id = list(self.texts)[row % len(self.texts)]
        self.cache.free(request_id)
        self.plain.free(request_id)
        del self.texts[request_id], self.num_done[request_id]
        with pytest.raises(ValueError, match="has not begun or was freed"):
            self.cache.free(request_id)

    @precondition(lambda self: self.texts)
    @rule(row=row_numbers)
    def preempt(self, row):
        """It ends, and begins again with all its tokens."""
        text = list(self.texts.values())[row % len(self.texts)]
        self.free(row)
        self.begin_with(text, text, True)

    @precondition(lambda self: 0 < len(self.texts) < 6)
    @rule(row=row_numbers, has_list=st.booleans())
    def fork(self, row, has_list):
        parent_id, child_id = list(self.texts)[row % len(self.texts)], self.new_id()
        num_done = self.num_done[parent_id]
        text = self.texts[parent_id][:num_done]
        self.cache.fork(parent_id, child_id, *([text] if has_list else []))
        self.plain.fork(parent_id, child_id)
        self.texts[child_id], self.num_done[child_id] = text, num_done

    def new_tokens(self, counts):
        """What each request gets: the next of its text, or of the same few documents, so
        that two write the same. Behind its end as many as are sampled: one."""
        new = {}
        for (request_id, text), count in zip(self.texts.items(), counts):
            start = self.num_done[request_id]
            if start == len(text) and count:
                follow = self.random.choice(self.documents)
                text.append(follow[start] if start < 12 else 0)
            if start + count < MODEL.config.max_seq_len:
                new[request_id] = text[start : start + count]
        return new

    @precondition(lambda self: self.texts)
    @rule(counts=counts)
    def step(self, counts):
        self.take(self.new_tokens(counts))

    @precondition(lambda self: self.texts)
    @rule(num_steps=st.integers(1, 4))
    def decode(self, num_steps):
        for _ in range(num_steps):
            self.take(self.new_tokens([1] * 6))

    def take(self, new):
        lens = {request_id: len(tokens) for request_id, tokens in new.items()}
        needed, before = self.cache.blocks_needed(lens), self.state()
        if needed > self.cache.num_free_blocks:
            with pytest.raises(OutOfBlocksError):
                extend(self.cache, new)
            assert self.state() == before
            return
        self.poison()
        num_free = self.cache.num_free_blocks
        got, expected = extend(self.cache, new), extend(self.plain, new)
        assert self.cache.num_free_blocks == num_free - needed
        for request_id, count in lens.items():
            assert_close(got[request_id], expected[request_id])
            self.num_done[request_id] += count

    def poison(self):
        """NaN wherever nothing is: in blocks without a name, and behind each text."""
        cache, size = self.cache, self.cache.block_size
        for pool in (cache.k_cache, cache.v_cache):
            pool[:, cache.manager.free_block_ids.empty] = torch.nan
            for request_id, table in cache.manager.block_tables.items():
                if table and not cache.fused_decode:  # it masks: numbers, the cache says
                    filled = self.num_done[request_id] - (len(table) - 1) * size
                    pool[:, table[-1], filled:] = torch.nan

    @precondition(lambda self: self.texts)
    @rule(counts=counts, last=st.integers(-1, 1), choice=texts)
    def interrupt(self, counts, last, choice):
        """A step that is not finished; meanwhile nothing can begin, or gets a name."""
        cache, new = self.cache, self.new_tokens(counts)
        lens = [len(new.get(request_id, [])) for request_id in cache.request_ids]
        needed = cache.blocks_needed(dict(zip(cache.request_ids, lens)))
        if needed > cache.num_free_blocks:
            return
        text, before = self.text(choice), self.state()
        self.poison()
        cache.find([])  # after this, all that is computed has a name
        names = set(self.names_given)
        heads = MODEL.config.num_heads, *[MODEL.config.num_kv_heads] * 2
        noise = [
            torch.full((sum(lens), n, MODEL.config.head_dim), 7.5).double() for n in heads
        ]
        with (
            pytest.raises(KeyboardInterrupt),
            cache.extend(torch.tensor(lens)) as attend,
        ):
            for layer in range(last + 1):
                attend(layer, *noise)
            cache.find(text)
            one = cache.request_ids[0]
            for call in (
                lambda: cache.begin("new", text),
                lambda: cache.fork(one, "new"),
                lambda: cache.free(one),
            ):
                with pytest.raises(RuntimeError, match="expected between two steps"):
                    call()
            raise KeyboardInterrupt
        assert self.state() == before and set(self.names_given) == names

    @precondition(lambda self: self.texts)
    @rule()
    def go_on_with_a_copy(self):
        """Of whom the lists of tokens do not grow with the requests any more."""
        self.cache = copy.copy(self.cache)

    # At any time.

    @invariant()
    def what_is_found_is_what_was_computed(self):
        if hasattr(self, "cache"):
            self.cache.check_integrity()
            check_names(self.cache, self.names_given)

    @invariant()
    def lengths_are_those_of_the_dictionary(self):
        if hasattr(self, "cache"):
            assert self.cache.request_ids == list(self.texts)
            assert self.cache.seq_lens.tolist() == list(self.num_done.values())
            tables = [self.cache.manager.block_tables[r] for r in self.texts]
            got = [[b for b in row if b >= 0] for row in self.cache.block_tables.tolist()]
            assert got == tables

    @invariant()
    def idle_blocks_lie_in_the_order_in_which_they_go(self):
        if hasattr(self, "cache"):
            free = self.cache.manager.free_block_ids
            in_order, left = [], dict(free.idle)
            while left:
                in_order.append(evict(left))
                del left[in_order[-1]]
            assert list(free.idle) == in_order
            assert list(free) == in_order[::-1] + free.empty == free[:]
            assert self.cache.num_free_blocks == len(free) == len(list(free))
            assert self.cache.num_idle_blocks == len(free.idle)


def case_of(**changes):
    """The machine's test, in a class of its own, with these settings."""
    case = type("PrefixAgainstPlain", (PrefixAgainstPlain,), {}).TestCase
    case.settings = settings(deadline=None, **changes)
    return case


TestPrefix = case_of(max_examples=60, stateful_step_count=25, derandomize=True)
TestPrefixNightly = pytest.mark.nightly(
    case_of(max_examples=250, stateful_step_count=40, print_blob=True)
)


# Hashes.


def test_a_hash_is_that_of_the_hash_before_and_the_tokens():
    first = hashlib.sha256(struct.pack("<2q", 3, 300)).digest()
    second = hashlib.sha256(first + struct.pack("<2q", 2**40, 0)).digest()
    assert block_hashes([3, 300, 2**40, 0, 9], 2) == [first, second]
    # Written down: the same in every process, on every machine.
    assert first.hex().startswith("f78b1cf4889cc46a")


def test_hashes_are_equal_where_texts_are_from_their_beginning_on():
    blocks = {}  # hash -> text up to its end
    for text in itertools.product(range(2), repeat=6):
        for i, block_hash in enumerate(block_hashes(text, 2)):
            assert blocks.setdefault(block_hash, text[: 2 * i + 2]) == text[: 2 * i + 2]
    assert len(blocks) == 4 + 16 + 64
    assert len(set(blocks.values())) == len(blocks)


@pytest.mark.parametrize("block_size", [1, 2, 3, 7])
def test_only_full_blocks_have_a_hash_and_a_text_can_be_hashed_in_pieces(block_size):
    text = random.Random(0).choices(range(1000), k=23)
    hashes = block_hashes(text, block_size)
    for length in range(24):
        assert block_hashes(text[:length], block_size) == hashes[: length // block_size]
    for k in range(1, len(hashes)):
        rest = block_hashes(text[k * block_size :], block_size, hashes[k - 1])
        assert rest == hashes[k:]
    assert block_hashes(torch.tensor(text), block_size) == hashes


# What is found.


@pytest.mark.parametrize("num_tokens", range(1, 10))
def test_one_token_at_least_is_left_to_compute(num_tokens):
    hashes = ["a", "b", "c", "d"][: num_tokens // 2]
    found = find_prefix(hashes, {"a": 7, "b": 5, "c": 6, "d": 1}, num_tokens, 2)
    assert found == [7, 5, 6, 1][: (num_tokens - 1) // 2]


def test_nothing_is_found_behind_a_block_that_is_not_there():
    assert find_prefix("abcd", {"a": 0, "b": 3, "d": 1}, 9, 2) == [0, 3]
    assert find_prefix("abcd", {"b": 3, "d": 1}, 9, 2) == []
    assert find_prefix([], {"b": 3}, 0, 2) == []


@pytest.mark.parametrize("length", range(1, 14))
def test_a_text_that_is_there_to_its_end_still_computes_its_last_token(length):
    text = random.Random(1).choices(LETTERS, k=13)
    cache = prefix_kv_cache(20, 3)
    compute(cache, "a", text)
    assert cache.find(text[:length]) == ((length - 1) // 3 * 3, (length - 1) // 3)
    cache.begin("b", text[:length])
    start = int(cache.seq_lens[1])
    assert start == (length - 1) // 3 * 3
    got = extend(cache, {"b": text[start:length]})["b"][-1]
    plain = PagedKVCache(MODEL.config, 20, 3, dtype=torch.float64)
    plain.begin("b")
    assert_close(got, extend(plain, {"b": text[:length]})["b"][-1])
    cache.check_integrity()


def test_answers_are_found_again_as_far_as_they_are_in_the_cache():
    cache, prompt = prefix_kv_cache(30, 4), random.Random(2).choices(LETTERS, k=9)
    text = list(prompt)
    compute(cache, "talk", text)
    for token in (1, 2, 3, 4, 0, 1, 2, 3):
        text.append(token)
        assert cache.find([*text, 0])[0] == (len(text) - 1) // 4 * 4
        extend(cache, {"talk": [token]})
    text.append(4)  # sampled, and never computed
    cache.free("talk")
    assert len(text) == 18 and cache.find(text + [0, 0, 0]) == (16, 0)
    assert cache.num_idle_blocks == 4 and cache.num_free_blocks == 30


def test_greedy_texts_equal_recompute_when_their_beginnings_were_found():
    cache, numbers = prefix_kv_cache(60, 4), random.Random(3)
    system = numbers.choices(LETTERS, k=14)
    num_found = []
    for request_id in range(6):
        prompt = system + numbers.choices(LETTERS, k=request_id)
        cache.begin(request_id, prompt)
        start = int(cache.seq_lens[0])
        num_found.append(start)
        rest = torch.tensor(prompt[start:])
        (got,) = generate_cached(MODEL, [rest], 9, cache, temperature=0)
        expected = generate_recompute(MODEL, torch.tensor(prompt), 9, temperature=0)
        assert torch.equal(got, expected[start:])
        cache.free(request_id)
    assert num_found[0] == 0 and min(num_found[1:]) == 12


def test_blocks_of_an_open_step_are_not_found_and_those_of_a_failed_one_neither():
    cache, text = prefix_kv_cache(9, 2), [1, 2, 3, 4, 0]
    cache.begin("a", text)
    with pytest.raises(KeyboardInterrupt), cache.extend(torch.tensor([5])) as attend:
        MODEL(torch.tensor(text), torch.arange(5), attend)
        assert cache.find(text) == (0, 0)
        raise KeyboardInterrupt
    assert cache.find(text) == (0, 0)
    extend(cache, {"a": text})
    assert cache.find(text) == (4, 2)


def test_of_two_who_compute_the_same_the_first_has_the_name():
    cache, text = prefix_kv_cache(9, 2), [1, 2, 3, 4, 0]
    cache.begin("a", list(text))
    cache.begin("b", list(text))
    extend(cache, {"a": text, "b": text})
    tables = copy.deepcopy(cache.manager.block_tables)
    assert len({*tables["a"], *tables["b"]}) == 6, "each has its own"
    assert cache.find(text) == (4, 2)
    cache.free("b")
    assert cache.num_idle_blocks == 0 and cache.num_free_blocks == 6
    cache.free("a")
    assert set(cache.manager.free_block_ids.idle) == set(tables["a"][:2])
    cache.check_integrity()


def test_a_text_whose_beginning_was_evicted_is_found_again_when_it_is_computed_again():
    cache, text = prefix_kv_cache(9, 2), [1, 2, 3, 4, 0, 1, 2]
    cache.begin("a", text)
    cache.begin("b", text)
    extend(cache, {"a": text[:2], "b": text[:2]})
    extend(cache, {"b": text[2:]})
    cache.free("a")  # of the first block it has the one with the name
    compute(cache, "c", [4] * 10)
    assert cache.find(text) == (0, 0), "b still has it, under no name"
    cache.check_integrity()
    cache.free("c")
    compute(cache, "d", text)
    assert cache.find(text) == (6, 3), "d's, although b's of the same hash are older"
    cache.free("b")
    cache.free("d")
    assert cache.find(text) == (6, 0)
    cache.check_integrity()


@pytest.mark.parametrize("hashes", HASHES[1:])
def test_whose_hashes_collide_never_reads_what_another_wrote(monkeypatch, hashes):
    monkeypatch.setattr(prefix_cache, "block_hashes", hashes)
    names_given, cache = note_names(monkeypatch), prefix_kv_cache(40, 2)
    plain = PagedKVCache(MODEL.config, 400, 2, dtype=torch.float64)
    num_found = 0
    texts = [t for n in (3, 5) for t in itertools.product(range(2), repeat=n)]
    for number, text in enumerate(texts, 1):
        for request_id in (number, -number):  # twice: the second finds the first's
            text = list(text)
            cache.begin(request_id, text)
            plain.begin(request_id)
            start = int(cache.seq_lens[-1])
            num_found += start
            got = extend(cache, {request_id: text[start:]})[request_id]
            assert_close(got, extend(plain, {request_id: text})[request_id][start:])
        cache.free(number)
        cache.free(-number)
        cache.check_integrity()
        check_names(cache, names_given)
    assert num_found > 0, "expected some to find the right ones"


def test_names_outlive_another_hash_function(monkeypatch):
    """As when a reader's takes the place of the library's, and a cache lives on."""
    cache, text = prefix_kv_cache(9, 2), [1, 2, 3, 4, 0]
    compute(cache, "a", text)
    assert cache.find(text) == (4, 2)
    monkeypatch.setattr(prefix_cache, "block_hashes", by_tokens)
    assert cache.find(text) == (0, 0)
    cache.fork("a", "b", list(text))  # whose text is looked at from its beginning
    assert cache.find(text) == (4, 2)
    cache.check_integrity()


def test_a_text_of_any_kind_of_numbers_is_remembered_in_ints_of_python():
    cache, text = prefix_kv_cache(9, 2), [1, 2, 3, 4, 0]
    ids = torch.tensor(text)
    cache.begin("a", ids)
    extend(cache, {"a": text})
    assert cache.find(ids) == (4, 2)
    cache.check_integrity()
    ids.zero_()
    assert cache.find(text) == cache.find(np.array(text)) == (4, 2)
    for name in cache.manager.names.name_of_block.values():
        assert all(type(token_id) is int for token_id in name.token_ids)


# Who goes.


def test_who_was_not_used_for_longest_goes_and_the_end_of_a_text_before_its_head():
    assert evict({4: (3, 0), 2: (1, 0), 9: (1, 2), 1: (1, 1), 3: (2, 7)}) == 9
    assert evict({4: (3, 0)}) == 4
    idle = {block_id: (block_id % 5, block_id // 5) for block_id in range(35)}
    order = []
    for _ in range(35):
        order.append(evict(idle))
        del idle[order[-1]]
    assert order == sorted(range(35), key=lambda b: (b % 5, -(b // 5)))


def test_evicted_are_the_longest_idle_each_from_its_end():
    """Texts longer than what `evict` is shown at a time, and one that is used again."""
    cache, numbers = prefix_kv_cache(60, 1), random.Random(4)
    texts = [[letter] + numbers.choices(LETTERS, k=19) for letter in (0, 1, 2)]
    for i, text in enumerate(texts):
        compute(cache, i, text)
    for i in (1, 0, 2):
        cache.free(i)
    cache.begin("again", texts[1][:8])  # has 7 of its blocks
    cache.free("again")
    left = [20, 20, 20]
    cache.begin("x")
    for gone in [1] * 13 + [0] * 20 + [2] * 20 + [1] * 7:
        extend(cache, {"x": [3]})
        left[gone] -= 1
        assert [cache.find([*text, 0])[0] for text in texts] == left
    cache.check_integrity()
    assert left == [0, 0, 0]


def test_an_evicted_block_is_not_found_before_it_is_written():
    cache = prefix_kv_cache(3, 2)
    compute(cache, "a", [1, 2, 3, 4, 0])
    cache.free("a")
    cache.begin("b", [0] * 6)
    with pytest.raises(KeyboardInterrupt), cache.extend(torch.tensor([6])):
        assert cache.find([1, 2, 3, 4, 0]) == (0, 0)
        raise KeyboardInterrupt
    assert cache.num_free_blocks == 3 and cache.find([1, 2, 3, 4, 0]) == (0, 0)
    cache.check_integrity()


def test_empty_blocks_go_before_idle_ones():
    cache = prefix_kv_cache(6, 2)
    compute(cache, "a", [1, 2, 3, 4, 0])
    cache.free("a")
    compute(cache, "b", [0] * 8)
    assert cache.find([1, 2, 3, 4, 0]) == (4, 0) and cache.num_free_blocks == 2


def test_found_blocks_are_not_evicted_for_the_rest_of_the_same_text():
    cache, text = prefix_kv_cache(4, 2), [1, 2, 3, 4, 0, 1, 2]
    compute(cache, "a", text[:5])
    cache.free("a")
    assert compute(cache, "b", text) == 4
    cache.check_integrity()
    assert cache.num_free_blocks == 0 and cache.find(text) == (6, 3)
    cache.begin("c")
    with pytest.raises(OutOfBlocksError, match="at most 0 blocks"):
        extend(cache, {"c": [1]})


def test_an_answer_that_names_no_idle_block_is_refused(monkeypatch):
    cache = prefix_kv_cache(2, 2)
    compute(cache, "a", [1, 2, 3, 4])
    cache.free("a")
    cache.begin("b", [0, 0, 0])
    monkeypatch.setattr(prefix_cache, "evict", lambda idle: 99)
    with pytest.raises(ValueError, match=r"expected one of the blocks \[1, 0\], got 99"):
        extend(cache, {"b": [0, 0, 0]})
    cache.check_integrity()
    assert cache.find([1, 2, 3, 4, 0]) == (4, 0)
    empty = prefix_kv_cache(1, 2).manager.free_block_ids
    empty.pop()
    with pytest.raises(IndexError):
        empty.pop()


# Forks.


def test_children_share_what_was_found_and_their_own_texts_are_found_again():
    cache, prompt = prefix_kv_cache(30, 4), random.Random(5).choices(LETTERS, k=11)
    compute(cache, "a", list(prompt))
    children = {f"child {i}": prompt + [i] for i in range(3)}
    for child_id, text in children.items():
        cache.fork("a", child_id, text)
    cache.free("a")
    assert cache.num_free_blocks == 27
    for _ in range(5):
        extend(cache, {child_id: text[-1:] for child_id, text in children.items()})
        cache.check_integrity()
        for text in children.values():
            text.append(text[-1])
    assert cache.manager.ref_count.count(3) == 2, "the last block has been copied"
    for child_id in children:
        cache.free(child_id)
    for text in children.values():
        assert cache.find(text) == (16, 0)
    assert cache.num_free_blocks == 30 and cache.num_idle_blocks == 2 + 3 * 2


def test_a_child_whose_text_begins_otherwise_is_refused():
    cache, text = prefix_kv_cache(9, 2), [1, 2, 3]
    compute(cache, "a", text)
    with pytest.raises(ValueError, match=r"as that of request 'a', \(1, 2, 3\), got"):
        cache.fork("a", "b", [1, 2, 4])
    assert cache.request_ids == ["a"]
    cache.fork("a", "b", [1, 2])  # shorter: nothing speaks against it
    with pytest.raises(ValueError, match="has not begun"):
        cache.fork("nobody", "c", [1])
    with pytest.raises(ValueError, match="not live"):
        cache.fork("a", "b")
    cache.check_integrity()


# What must not happen.


def test_nothing_leaks_and_nothing_grows():
    cache, numbers = prefix_kv_cache(11, 2), random.Random(6)
    for i in range(300):
        text = numbers.choices(range(2), k=numbers.randint(1, 9))
        compute(cache, i, text)
        if i % 2:
            cache.free(i)
            cache.free(i - 1)
            cache.check_integrity()
            assert cache.num_free_blocks == 11 and not cache._texts
    names, free = cache.manager.names, cache.manager.free_block_ids
    assert sorted(free) == list(range(11))
    assert len(names.name_of_block) <= 11 and len(free.idle) <= 11
    assert cache.reserved_bytes == cache.used_bytes == 0


def lines_of_a_life(num_blocks):
    """Lines of these modules that one request takes when all other blocks are idle."""
    cache = prefix_kv_cache(num_blocks, 2)
    numbers = random.Random(7)
    while cache.manager.free_block_ids.empty:
        compute(cache, "some", numbers.choices(range(3), k=8))
        cache.free("some")
    assert cache.num_idle_blocks == cache.num_free_blocks > 0
    lines = Counter()

    def trace(frame, event, _):
        name = frame.f_code.co_filename
        if name not in {module.__file__ for module in MODULES}:
            return None
        if event == "line":
            lines[name.rsplit("/", 1)[1]] += 1
        return trace

    text = [4, 3] * 3
    before, _ = sys.gettrace(), sys.settrace(trace)
    try:
        compute(cache, "one", text)
        text.append(0)
        extend(cache, {"one": [0]})
        cache.find([3] * 8)
        cache.free("one")
    finally:
        sys.settrace(before)
    return lines


def test_a_step_costs_the_same_however_many_blocks_are_remembered():
    few, many = lines_of_a_life(40), lines_of_a_life(400)
    assert few == many and few["prefix_cache.py"] > 50


def changed_behind(change):
    cache, text = prefix_kv_cache(9, 2), [1, 2, 3, 4, 0, 1, 2, 3]
    compute(cache, "a", text[:3])
    cache._texts["a"].token_ids = text
    change(cache.manager)
    return cache, text


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.append("a", 4),
        lambda m: (m.free("a"), m.allocate("a", 7)),
        lambda m: (m.free("a"), m.allocate("a", 3), m.append("a", 4)),
        lambda m: (m.free("a"), m.allocate("a", 3), m.block_tables["a"].reverse()),
        lambda m: m.free("a"),
    ],
)
def test_what_the_manager_was_told_behind_the_caches_back_gets_no_name(change):
    cache, text = changed_behind(change)
    assert cache.find(text) == (0, 0)
    cache.free("a")
    assert cache.find(text) == (0, 0) and cache.num_free_blocks == 9
    cache.check_integrity()


def test_the_cache_calls_the_three_functions_of_its_module(monkeypatch):
    calls = Counter()
    for function in (block_hashes, find_prefix, evict):

        def noting(*args, function=function):
            calls[function.__name__] += 1
            return function(*args)

        monkeypatch.setattr(prefix_cache, function.__name__, noting)
    cache = prefix_kv_cache(3, 2)
    compute(cache, "a", [1, 2, 3, 4, 0])
    cache.free("a")
    assert compute(cache, "b", [1, 2, 0, 0, 0]) == 2
    assert all(calls[f.__name__] > 0 for f in (block_hashes, find_prefix, evict)), calls


def under_pressure():
    """One request under way, and all other blocks idle, with three texts."""
    cache = prefix_kv_cache(7, 2)
    compute(cache, "old", [1, 2, 0, 0, 4, 4])
    cache.free("old")
    compute(cache, "a", [1, 2, 3, 4])
    compute(cache, "z", [2] * 5)
    cache.free("z")
    return cache


def life(cache, text):
    """Some is found, evicted, computed, named, shared, and freed."""
    return [
        lambda: cache.find(text),
        lambda: cache.begin("b", text),
        lambda: extend(cache, {"a": [3], "b": text[2:]}),
        lambda: cache.fork("a", "c", [1, 2, 3, 4, 3]),
        lambda: cache.find([*text, 0]),
        lambda: cache.free("a"),
        lambda: cache.free("b"),
    ]


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.nightly)])
def test_an_interrupt_at_any_line_leaves_no_wrong_name_and_no_leak(monkeypatch, every):
    names_given, text = note_names(monkeypatch), [1, 2, 0, 4, 2, 2]
    first, names_before = under_pressure(), dict(names_given)
    for when in itertools.count(step=every):
        names_given.clear()
        names_given.update(names_before)
        cache = copy.copy(first)
        with (
            Interrupt(when, MODULES) as interrupt,
            contextlib.suppress(KeyboardInterrupt),
        ):
            for call in life(cache, text):
                call()
        check_names(cache, names_given)
        cache.check_integrity()
        if interrupt.where is None:
            break
        for request_id in cache.request_ids:
            cache.free(request_id)
        cache.check_integrity()
        assert cache.num_free_blocks == 7, interrupt.where
        compute(cache, "again", text)
        table = cache.manager.block_tables["again"]
        got = torch.stack([cache.k_cache[:, table], cache.v_cache[:, table]])
        assert_close(got.flatten(2, 3), kv_of(tuple(text)))
    assert when > 400


def test_what_is_no_number_is_found_by_nobody():
    model = copy.deepcopy(MODEL)
    with torch.no_grad():
        model.embed.weight[4] = float("nan")
    cache = prefix_kv_cache(8, 4)
    cache.begin("ill", token_ids := [0, 1, 2, 3, 4, 0])
    # 0 · NaN is NaN: a masked one spoils the tokens before it too.
    forward_cached(model, cache, torch.tensor(token_ids), torch.tensor([6]))
    cache.free("ill")
    assert cache.find([0, 1, 2, 3, 3]) == (0, 0) and cache.num_free_blocks == 8
    cache.check_integrity()
