"""Random calls of both kinds of cache, beside a dictionary of whole texts.

What a request has is kept twice: in the cache, and as its queries, keys and values in
plain tensors. Each step's attention must equal `attend_causal` over the whole text, and
places that nobody has written hold NaN, so that whoever reads them shows it. So it is for
other formats than the plain one, over what these leave of keys and values.
"""

import copy

import pytest
import torch
from helpers import as_kept, assert_close, random_format
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from lib.block_manager import OutOfBlocksError
from lib.config import ModelConfig
from lib.kv_cache import PLAIN, CacheFullError, ContiguousKVCache
from lib.model import attend_causal
from lib.paged_kv_cache import PagedKVCache
from lib.quantized_kv_cache import QuantizedFormat

CONFIG = ModelConfig(8, 2, num_heads=2, num_kv_heads=1, d_model=8, d_ff=8, max_seq_len=64)
LAYERS = range(CONFIG.num_layers)
BATCH_SIZE, MAX_SEQ_LEN = 2, 9  # of the contiguous cache
NUM_SLOTS = 36  # of the pool, in all
# And the bytes of a token: 2 layers, D = 4, numbers of 8 bytes.
PLAIN_ONLY = [(PLAIN, 2 * (4 + 4) * 8)]
SMALLER = [
    (QuantizedFormat(4, 2), 2 * (2 + 1 + 2 * 2 * 8)),  # no row fills whole numbers
    (random_format(CONFIG, 2, 3), 2 * (2 + 3) * 8),
]

row_numbers = st.integers(0, 5)
counts = st.lists(st.sampled_from([0, 1, 1, 1, 2, 5]), min_size=6, max_size=6)
ones = st.just([1] * 6)  # a decode step
last_layers = st.sampled_from([-1, *LAYERS])
errors = st.sampled_from([KeyboardInterrupt, RuntimeError, GeneratorExit])


class CacheAgainstDictionary(RuleBasedStateMachine):
    kinds: list  # "contiguous", or the pool's block size
    formats = PLAIN_ONLY

    @initialize(
        kind=st.runner().flatmap(lambda self: st.sampled_from(self.kinds)),
        format=st.runner().flatmap(lambda self: st.sampled_from(self.formats)),
        fused=st.booleans(),
        seed=st.integers(0, 99),
        num_requests=st.integers(0, 3),
    )
    def make(self, kind, format, fused, seed, num_requests):
        self.format, self.bytes_per_token = format
        settings = {"dtype": torch.float64, "format": self.format}
        settings["fused_decode"] = fused and self.format is PLAIN
        self.is_paged = kind != "contiguous"
        if self.is_paged:
            self.cache = PagedKVCache(CONFIG, NUM_SLOTS // kind, kind, **settings)
        else:
            self.cache = ContiguousKVCache(CONFIG, BATCH_SIZE, MAX_SEQ_LEN, **settings)
        self.generator = torch.Generator().manual_seed(seed)
        self.texts = {}  # request -> its (q, k, v), each (L, S, heads, D), in arrival
        self.rows = [] if self.is_paged else [None] * BATCH_SIZE
        self.num_requests = 0
        self.stale = []  # an `attend` whose step is over
        for _ in range(num_requests):
            self.begin()

    # What is expected, without the cache.

    def length(self, request_id):
        return self.texts[request_id][0].shape[1] if request_id in self.texts else 0

    def lengths(self):
        return [self.length(request_id) for request_id in self.rows]

    def some(self, num_tokens):
        """Queries, keys and values of new tokens, (L, T, heads, D) each."""
        heads = CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.num_kv_heads
        return [
            torch.randn(
                len(LAYERS),
                num_tokens,
                n,
                CONFIG.head_dim,
                generator=self.generator,
                dtype=torch.float64,
            )
            for n in heads
        ]

    def error_for(self, query_lens):
        """What the cache must raise for these counts of tokens, or None."""
        if not self.is_paged:
            for request_id, seq_len, count in zip(self.rows, self.lengths(), query_lens):
                if request_id is None and count > 0:
                    return ValueError
                if seq_len + count > MAX_SEQ_LEN:
                    return CacheFullError
            return None
        manager = copy.deepcopy(self.cache.manager)
        try:
            for request_id, count in zip(self.rows, query_lens):
                manager.append(request_id, count)
        except OutOfBlocksError:
            return OutOfBlocksError
        return None

    def state(self):
        cache = self.cache
        got = [list(cache.request_ids), cache.seq_lens.tolist()]
        got += [cache.reserved_bytes, cache.used_bytes]
        if self.is_paged:
            manager = vars(cache.manager)
            got += [cache.block_tables.tolist(), copy.deepcopy(manager)]
        return got

    def poison(self, query_lens):
        """NaN wherever this step may not read."""
        cache = self.cache
        pools = cache.k_cache, cache.v_cache
        nan = torch.nan if pools[0].is_floating_point() else 255  # so are eight of these
        if self.is_paged:
            manager, size = cache.manager, cache.manager.block_size
            for pool in pools:
                pool[:, manager.free_block_ids] = nan
                for request_id, table in manager.block_tables.items():
                    # The fused call masks the rest of a block: numbers, the cache says.
                    if table and not cache.fused_decode:
                        filled = self.length(request_id) - (len(table) - 1) * size
                        pool[:, table[-1], filled:] = nan
            return
        # The fused call masks what lies behind the shorter ones: numbers, the cache says.
        is_decode = cache.fused_decode and set(query_lens) == {1}
        longest = max(self.lengths()) + 1
        self.pools_before = [pool.clone() for pool in pools]
        for pool in pools:
            for row, seq_len in enumerate(self.lengths()):
                pool[:, row, longest if is_decode else seq_len :] = nan

    def cure(self):
        """Behind the texts, numbers: as the cache left them before the poison."""
        if self.is_paged:
            return
        pools = self.cache.k_cache, self.cache.v_cache
        for pool, before in zip(pools, self.pools_before):
            for row, (request_id, seq_len) in enumerate(zip(self.rows, self.lengths())):
                if request_id is not None:  # in a row without one, NaN may stay
                    pool[:, row, seq_len:] = before[:, row, seq_len:]

    def query_lens(self, counts):
        """Counts for the rows there are; none where no request has begun."""
        return [0 if r is None else n for r, n in zip(self.rows, counts)]

    def refused(self, errors, call):
        before = self.state()
        with pytest.raises(errors):
            call()
        assert self.state() == before

    # Rules.

    @precondition(lambda self: len(self.texts) < 6)
    @rule()
    def begin(self):
        self.num_requests += 1
        request_id = f"r{self.num_requests}"
        if None not in self.rows and not self.is_paged:
            self.refused(CacheFullError, lambda: self.cache.begin(request_id))
            return
        self.cache.begin(request_id)
        if self.is_paged:
            self.rows.append(request_id)
        else:
            self.rows[self.rows.index(None)] = request_id
        self.texts[request_id] = self.some(0)

    @precondition(lambda self: self.texts)
    @rule(row=row_numbers)
    def free(self, row):
        request_id = list(self.texts)[row % len(self.texts)]
        self.cache.free(request_id)
        del self.texts[request_id]
        if self.is_paged:
            self.rows.remove(request_id)
        else:
            self.rows[self.rows.index(request_id)] = None
        self.refused(ValueError, lambda: self.cache.free(request_id))

    @precondition(lambda self: self.is_paged and self.texts and len(self.texts) < 6)
    @rule(row=row_numbers)
    def fork(self, row):
        size = self.cache.manager.block_size
        half_full = [r for r in self.texts if self.length(r) % size > 0]
        parents = half_full or list(self.texts)  # of whom the next step copies a block
        parent_id = parents[row % len(parents)]
        self.num_requests += 1
        child_id = f"r{self.num_requests}"
        self.cache.fork(parent_id, child_id)
        self.rows.append(child_id)
        self.texts[child_id] = self.texts[parent_id]

    @precondition(lambda self: self.is_paged and self.texts and len(self.texts) < 6)
    @rule(row=row_numbers, counts=counts, last=last_layers)
    def fork_and_write(self, row, counts, last):
        """All who share a block write into it, once in vain."""
        self.fork(row)
        ones = [1] * len(self.rows)
        self.interrupt(ones, last, KeyboardInterrupt)
        self.take([max(count, 1) for count in counts])

    @precondition(lambda self: self.rows)
    @rule(counts=counts)
    def extend(self, counts):
        self.take(counts)

    @precondition(lambda self: self.texts)
    @rule(num_steps=st.integers(1, 3))
    def decode(self, num_steps):
        for _ in range(num_steps):
            self.take([1] * len(self.rows))

    def take(self, counts, after_layer=lambda layer: None):
        query_lens = self.query_lens(counts)
        error = self.error_for(query_lens)
        if error:
            self.refused(error, lambda: self.step(query_lens))
            return
        self.poison(query_lens)
        news = self.step(query_lens, after_layer)
        for request_id, new in zip(self.rows, news):
            if request_id is not None:
                old = self.texts[request_id]
                text = [torch.cat(pair, dim=1) for pair in zip(old, new)]
                self.texts[request_id] = text
        self.cure()

    def step(self, query_lens, after_layer=lambda layer: None):
        """A step through all layers, compared with attention over the whole texts."""
        news = [self.some(count) for count in query_lens]
        flat = [torch.cat(parts, dim=1) for parts in zip(*news)]
        with self.cache.extend(torch.tensor(query_lens)) as attend:
            self.stale = [attend]
            after_layer(-1)
            for layer in LAYERS:
                got = attend(layer, *(x[layer] for x in flat))
                expected = []
                for request_id, new in zip(self.rows, news):
                    old = self.texts.get(request_id) or self.some(0)
                    whole = [torch.cat([a, b], dim=1)[layer] for a, b in zip(old, new)]
                    kept = as_kept(self.format, layer, *whole[1:])
                    out = attend_causal(layer, whole[0], *kept)
                    expected.append(out[len(out) - new[0].shape[1] :])
                assert_close(got, torch.cat(expected))
                assert not got.isnan().any()
                after_layer(layer)
        return news

    @precondition(lambda self: self.rows)
    @rule(counts=counts | ones, last=last_layers, error=errors)
    def interrupt(self, counts, last, error):
        def stop(layer):
            if layer == last:
                raise error()

        self.taken_back(counts, error, stop)

    def taken_back(self, counts, error, after_layer):
        query_lens = self.query_lens(counts)
        if self.error_for(query_lens):
            return
        before = self.state()
        self.poison(query_lens)
        with pytest.raises(error):
            self.step(query_lens, after_layer)
        if not self.is_paged and self.cache.fused_decode:
            for row, (request_id, seq_len) in enumerate(zip(self.rows, self.lengths())):
                behind = self.cache.k_cache[:, row, seq_len:]
                assert request_id is None or behind.isfinite().all()
        self.cure()
        assert self.state() == before

    @precondition(lambda self: self.rows)
    @rule(
        counts=counts | ones,
        last=last_layers,
        is_caught=st.booleans(),
        number=row_numbers,
    )
    def call_inside_of_a_step(self, counts, last, is_caught, number):
        cache, one, zeros = self.cache, self.rows[0], torch.zeros(len(self.rows)).long()
        calls = [
            lambda: cache.extend(zeros).__enter__(),
            lambda: cache.begin("new"),
            lambda: cache.free(one),
            lambda: cache.fork(one, "new") if self.is_paged else cache.begin("new"),
        ]

        def call(layer):
            if layer == last and not is_caught:
                calls[number % len(calls)]()
            for wrong in calls:
                with pytest.raises(RuntimeError, match="expected between two steps"):
                    wrong()

        if is_caught:
            self.take(counts, call)
        else:
            self.taken_back(counts, RuntimeError, call)

    @precondition(lambda self: self.rows)
    @rule(counts=counts | ones, layers=st.sets(st.sampled_from([-1, 0])))
    def leave_layers_out(self, counts, layers):
        query_lens = self.query_lens(counts)
        if self.error_for(query_lens):
            return
        before = self.state()
        self.poison(query_lens)
        with (
            pytest.raises(RuntimeError, match="expected attention in layers 0 to 1"),
            self.cache.extend(torch.tensor(query_lens)) as attend,
        ):
            for layer in layers:
                attend(layer, *(x[layer] for x in self.some(sum(query_lens))))
        self.cure()
        assert self.state() == before

    @precondition(lambda self: self.stale)
    @rule(row=row_numbers)
    def attend_after_the_step(self, row):
        pool = self.cache.k_cache.clone()
        args = [x[0] for x in self.some(row)]
        with pytest.raises(RuntimeError, match="inside of its own step"):
            self.stale[0](0, *args)
        assert torch.equal(self.cache.k_cache.nan_to_num(), pool.nan_to_num())

    @rule(row=row_numbers, number=st.integers(0, 20))
    def call_wrongly(self, row, number):
        cache, B = self.cache, len(self.rows)
        calls = [
            lambda: cache.begin(None),
            lambda: cache.free("nobody"),
            lambda: cache.free(None),
        ]
        if self.texts:
            live = list(self.texts)[row % len(self.texts)]
            calls.append(lambda: cache.begin(live))
        if self.is_paged:
            calls.append(lambda: cache.fork("nobody", "new"))
        if self.is_paged and self.texts:
            calls.append(lambda: cache.fork(live, live))
            calls.append(lambda: cache.fork(live, None))

        zeros = torch.zeros(B, dtype=torch.int64)
        wrong = [torch.zeros(B), zeros.int(), zeros[None], torch.zeros(B + 1).long()]
        if B:
            wrong += [zeros.clone(), zeros.clone(), zeros.clone()]
            for query_lens, count in zip(wrong[-3:], (-1, 1000, 2**63 - 1)):
                query_lens[row % B] = count
        for query_lens in wrong:
            calls.append(lambda lens=query_lens: cache.check_room(lens))
            calls.append(lambda lens=query_lens: cache.extend(lens).__enter__())
        errors = (ValueError, OutOfBlocksError, CacheFullError)
        self.refused(errors, calls[number % len(calls)])

    # At any time.

    @invariant()
    def requests_and_lengths_are_those_of_the_dictionary(self):
        if hasattr(self, "cache"):
            assert self.cache.request_ids == self.rows
            assert self.cache.seq_lens.tolist() == self.lengths()
            assert self.cache.seq_lens.dtype == torch.int64

    @invariant()
    def bytes_are_those_of_the_places(self):
        if not hasattr(self, "cache"):
            return
        cache = self.cache
        if self.is_paged:
            manager = cache.manager
            num_free = len(manager.free_block_ids)
            places = {
                (table[p // manager.block_size], p % manager.block_size)
                for request_id, table in manager.block_tables.items()
                for p in range(self.length(request_id))
            }
            used = {block_id for block_id, _ in places}
            assert num_free + len(used) == manager.num_blocks
            reserved, filled = len(used) * manager.block_size, len(places)
        else:
            reserved, filled = BATCH_SIZE * MAX_SEQ_LEN, sum(self.lengths())
        assert cache.reserved_bytes == reserved * self.bytes_per_token
        assert cache.used_bytes == filled * self.bytes_per_token

    @invariant()
    def the_tensor_of_tables_is_that_of_the_manager(self):
        if not hasattr(self, "cache") or not self.is_paged:
            return
        manager = self.cache.manager
        manager.check_integrity()
        tables = [manager.block_tables[request_id] for request_id in self.rows]
        assert list(manager.block_tables) == self.rows
        M = max(map(len, tables), default=0)
        expected = [table + [-1] * (M - len(table)) for table in tables]
        assert self.cache.block_tables.tolist() == expected
        assert self.cache.block_tables.shape == (len(tables), M)


class ContiguousAgainstDictionary(CacheAgainstDictionary):
    kinds = ["contiguous"]


class PagedAgainstDictionary(CacheAgainstDictionary):
    kinds = [1, 3, 4]


class ContiguousSmaller(ContiguousAgainstDictionary):
    formats = SMALLER


class PagedSmaller(PagedAgainstDictionary):
    formats = SMALLER


def case_of(machine, **changes):
    """Its test, in a class of its own, with these settings."""
    case = type(machine.__name__, (machine,), {}).TestCase
    case.settings = settings(deadline=None, **changes)
    return case


SHORT = {"max_examples": 80, "stateful_step_count": 30, "derandomize": True}
SHORTER = {**SHORT, "max_examples": 30}
LONG = {"max_examples": 125, "stateful_step_count": 40, "print_blob": True}

TestContiguous = case_of(ContiguousAgainstDictionary, **SHORT)
TestPaged = case_of(PagedAgainstDictionary, **SHORT)
TestContiguousSmaller = case_of(ContiguousSmaller, **SHORTER)
TestPagedSmaller = case_of(PagedSmaller, **SHORTER)
TestContiguousNightly = pytest.mark.nightly(case_of(ContiguousAgainstDictionary, **LONG))
TestPagedNightly = pytest.mark.nightly(case_of(PagedAgainstDictionary, **LONG))
TestContiguousSmallerNightly = pytest.mark.nightly(case_of(ContiguousSmaller, **LONG))
TestPagedSmallerNightly = pytest.mark.nightly(case_of(PagedSmaller, **LONG))
