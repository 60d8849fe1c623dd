"""The torch twins against torch's own attention, and the kernels against the twins."""

import math

import pytest
import torch

from lib import paged_kv_cache
from lib.paged_attention import attend_online, paged_decode_gather, paged_decode_online

NOWHERE = 2147480000  # a block id behind the end of a table
EPSILON = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}

# (lengths, heads, D, block_size)
CASES = [
    ([1], (1, 1), 16, 1),
    ([15, 16, 17], (4, 4), 64, 16),
    ([0, 5], (8, 2), 64, 8),
    ([54, 97, 512], (8, 2), 80, 16),
    ([523, 37], (5, 1), 64, 32),
    ([132, 18, 463], (6, 3), 128, 256),
    ([1027], (4, 4), 64, 16),
    ([70, 3, 1, 64, 65], (32, 8), 80, 1),
    ([33, 128], (8, 2), 256, 16),
]
LONG_CASES = [
    ([523, 37, 2011], (8, 2), 128, 16),
    ([1328, 18, 463], (32, 8), 64, 32),
    ([1025, 1027], (5, 1), 80, 8),
    ([54, 97, 512, 2048], (6, 3), 256, 256),
    ([1, 15, 16, 17, 0] * 2 + [33, 65], (4, 4), 64, 1),
]


def nightly(cases):
    return [pytest.param(case, marks=pytest.mark.nightly) for case in cases]


def paged(case, dtype=torch.float64, seed=0):
    """Inputs of paged_decode: shuffled tables, tails that exist nowhere, NaN if dead."""
    lens, (H, G), D, block_size = case
    torch.manual_seed(seed)
    counts = [math.ceil(seq_len / block_size) for seq_len in lens]
    num_blocks = sum(counts) + 3
    pool = torch.full((2, num_blocks, block_size, G, D), torch.nan, dtype=dtype)
    block_tables = torch.full((len(lens), max(counts) + 1), NOWHERE, dtype=torch.int32)
    block_ids = torch.randperm(num_blocks, dtype=torch.int32)
    for row, count, seq_len in zip(block_tables, counts, lens):
        row[:count], block_ids = block_ids[:count], block_ids[count:]
        for i, block_id in enumerate(row[:count].tolist()):
            filled = min(block_size, seq_len - i * block_size)
            pool[:, block_id, :filled] = torch.randn(2, filled, G, D).to(dtype)
    q = torch.randn(len(lens), H, D).to(dtype)
    return q, *pool, block_tables, torch.tensor(lens, dtype=torch.int32)


def in_float64(inputs):
    q, k_cache, v_cache, *index = inputs
    return paged_decode_gather(q.double(), k_cache.double(), v_cache.double(), *index)


def assert_near(got, expected, dtype):
    """Within what rounding of inputs, weights and result explains."""
    for one, other in zip(got, expected):
        assert one.shape == other.shape
        is_finite = other.isfinite()
        assert torch.equal(one.isfinite(), is_finite), "NaN, or an infinity, came through"
        error = (one.double() - other)[is_finite].abs()
        limit = 3 * EPSILON[dtype] * (1 + other[is_finite].abs()) + 1e-5
        assert (error <= limit).all(), f"expected at most {limit}, got {error.max()}"


@pytest.mark.parametrize("case", CASES + nightly(LONG_CASES), ids=str)
def test_the_oracle_is_torchs_own_attention(case):
    q, k_cache, v_cache, block_tables, seq_lens = paged(case)
    out, logsumexp = paged_decode_gather(q, k_cache, v_cache, block_tables, seq_lens)
    group_size, block_size = q.shape[1] // k_cache.shape[2], k_cache.shape[1]
    for b, seq_len in enumerate(seq_lens.tolist()):
        if seq_len == 0:
            assert (out[b] == 0).all() and (logsumexp[b] == -math.inf).all()
            continue
        slots = [
            (int(block_tables[b, p // block_size]), p % block_size)
            for p in range(seq_len)
        ]
        k, v = (
            torch.stack([cache[slot] for slot in slots], dim=1).repeat_interleave(
                group_size, dim=0
            )
            for cache in (k_cache, v_cache)
        )
        expected = torch.nn.functional.scaled_dot_product_attention(
            q[b, :, None], k, v
        ).squeeze(1)
        torch.testing.assert_close(out[b], expected)
        scores = (k @ q[b, :, :, None]).squeeze(-1) / q.shape[-1] ** 0.5
        torch.testing.assert_close(logsumexp[b], scores.logsumexp(-1))


@pytest.mark.parametrize("case", CASES + nightly(LONG_CASES), ids=str)
def test_block_by_block_is_the_same(case):
    inputs = paged(case)
    for got, expected in zip(paged_decode_online(*inputs), paged_decode_gather(*inputs)):
        torch.testing.assert_close(got, expected)


def test_scores_that_exp_could_not_take_are_no_trouble_online():
    q, k, v = torch.full((1, 4), 30.0), torch.full((8, 1, 4), 30.0), torch.randn(8, 1, 4)
    out, logsumexp = attend_online(q, [(k[:3], v[:3]), (k[3:], v[3:])])
    torch.testing.assert_close(out, v.mean(0))
    torch.testing.assert_close(logsumexp, torch.tensor([3600 + math.log(8)]))


def test_another_scale_is_used():
    inputs = paged(CASES[1])
    half = inputs[0] * 0.5, *inputs[1:]
    for decode in (paged_decode_gather, paged_decode_online):
        got = decode(*inputs, scale=0.5 * 64**-0.5)
        for one, other in zip(got, decode(*half)):
            torch.testing.assert_close(one, other)


pytest.importorskip("triton", reason="the kernels need Triton")
from lib import paged_attention_triton  # noqa: E402
from lib.paged_attention_triton import paged_decode  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + nightly(LONG_CASES), ids=str)
def test_the_kernel_is_the_oracle(case, dtype):
    inputs = paged(case, dtype)
    assert_near(paged_decode(*inputs, check_ids=True), in_float64(inputs), dtype)


@pytest.mark.parametrize("num_splits", [2, 4, 8, 16])
@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[5]], ids=str)
def test_any_number_of_splits_gives_the_same(case, num_splits):
    inputs = paged(case, torch.float32)
    got = paged_decode(*inputs, num_splits=num_splits)
    assert_near(got, in_float64(inputs), torch.float32)


@pytest.mark.parametrize("block_size", [1, 16])
def test_the_block_size_does_not_show(block_size):
    q, k_cache, v_cache, block_tables, seq_lens = paged(([40, 17], (4, 2), 32, 16))
    if block_size == 1:
        places = torch.arange(16, dtype=torch.int32)
        is_block = block_tables < NOWHERE
        ids = torch.where(is_block, block_tables, 0).unsqueeze(-1) * 16 + places
        block_tables = ids.flatten(1)
        k_cache, v_cache = (x.flatten(0, 1).unsqueeze(1) for x in (k_cache, v_cache))
    inputs = q.float(), k_cache.float(), v_cache.float(), block_tables, seq_lens
    expected = in_float64(paged(([40, 17], (4, 2), 32, 16)))
    assert_near(paged_decode(*inputs), expected, torch.float32)


def test_requests_may_share_blocks():
    q, k_cache, v_cache, block_tables, seq_lens = paged(CASES[1], torch.float32)
    block_tables[2, 0] = block_tables[0, 0]
    seq_lens[2] = 7
    inputs = q, k_cache, v_cache, block_tables, seq_lens
    assert_near(paged_decode(*inputs), in_float64(inputs), torch.float32)


def test_tensors_that_are_not_in_one_piece_are_read_right():
    q, k_cache, v_cache, block_tables, seq_lens = paged(CASES[1], torch.float32)
    expected = in_float64((q, k_cache, v_cache, block_tables, seq_lens))
    strided = (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k_cache.transpose(1, 2).contiguous().transpose(1, 2),
        v_cache.transpose(2, 3).contiguous().transpose(2, 3),
        block_tables.t().contiguous().t(),
        torch.stack([seq_lens, seq_lens], dim=1)[:, 0],
    )
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert_near(paged_decode(*strided), expected, torch.float32)


def change(index, change_one):
    def apply(inputs):
        inputs = list(inputs)
        inputs[index] = change_one(inputs[index])
        return inputs

    return apply


@pytest.mark.parametrize(
    "spoil, words",
    [
        (change(0, lambda q: q[0]), "q: expected 3 dimensions"),
        (change(0, lambda q: q[:, :3]), "expected a divisor of 3 query heads, got G = 2"),
        (change(0, lambda q: q[..., :8]), "expected D = 8 as in q, got 16"),
        (change(0, lambda q: q.half()), "k_cache: expected torch.float16, got"),
        (change(2, lambda v: v[:1]), "v_cache: expected"),
        (change(3, lambda t: t.long()), "block_tables: expected torch.int32"),
        (change(3, lambda t: t[:1]), "one row for each of 2 requests, got 1 and 2"),
        (change(4, lambda n: n.long()), "seq_lens: expected torch.int32"),
        (change(4, lambda n: n[:1]), "one row for each of 2 requests, got 2 and 1"),
        (change(4, lambda n: n + 99), "request 0: expected 0 to 48 tokens"),
        (change(3, lambda t: t + 7000), "request 0: expected blocks 0 to"),
        (change(3, lambda t: t.to("meta")), "block_tables: expected on cpu"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_expected(spoil, words):
    inputs = spoil(paged(([17, 31], (4, 2), 16, 16), torch.float32))
    with pytest.raises(ValueError, match=words):
        paged_decode(*inputs, check_ids=True)


def test_a_number_of_splits_that_cannot_be_merged_is_refused():
    inputs = paged(CASES[0], torch.float32)
    with pytest.raises(ValueError, match="expected a power of two, got 3"):
        paged_decode(*inputs, num_splits=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_and_values_are_written_copied_and_gathered_as_by_the_twins(dtype):
    torch.manual_seed(0)
    caches = torch.randn(2, 7, 4, 3, 5).to(dtype)
    k, v = torch.randn(2, 6, 3, 5).to(dtype)
    slots = torch.randperm(28)[:6]
    expected = caches.clone()
    paged_kv_cache.write_kv(*expected, k, v, slots)
    paged_attention_triton.write_kv(*caches, k, v, slots)
    assert torch.equal(caches, expected)

    paged_attention_triton.copy_blocks(
        caches[0], torch.tensor([2, 5]), torch.tensor([6, 0])
    )
    expected[0, [6, 0]] = expected[0, [2, 5]]
    assert torch.equal(caches, expected)

    for seq_len in (0, 1, 4, 11):
        block_table = torch.tensor([5, 1, 3, NOWHERE])
        got = paged_attention_triton.gather_kv(*caches, block_table, seq_len)
        wanted = paged_kv_cache.gather_kv(*caches, block_table, seq_len)
        assert all(torch.equal(one, other) for one, other in zip(got, wanted))


def test_writes_that_do_not_fit_are_refused():
    cache, rows, slots = torch.zeros(3, 2, 1, 4), torch.zeros(2, 1, 4), torch.arange(2)
    with pytest.raises(ValueError, match=r"k, v: expected \(2, 1, 4\) of torch.float32"):
        paged_attention_triton.write_kv(cache, cache, rows.half(), rows, slots)
    with pytest.raises(ValueError, match="as many sources as targets, got 2 and 1"):
        paged_attention_triton.copy_blocks(cache, slots, slots[:1])
    with pytest.raises(ValueError, match="cache: expected contiguous"):
        paged_attention_triton.gather_kv(cache.transpose(0, 1), cache, slots, 2)


def test_no_requests_give_no_rows():
    q, k_cache, v_cache, block_tables, seq_lens = paged(CASES[1], torch.float32)
    out, logsumexp = paged_decode(q[:0], k_cache, v_cache, block_tables[:0], seq_lens[:0])
    assert out.shape == (0, 4, 64) and logsumexp.shape == (0, 4)


def test_a_broken_interpreter_is_named(monkeypatch):
    paged_attention_triton.check_interpreter.cache_clear()
    monkeypatch.setattr(paged_attention_triton, "_double_kernel", {(1,): print})
    with pytest.raises(
        RuntimeError, match="interpreter is broken here .triton 3.*imported before lib"
    ):
        paged_attention_triton.check_interpreter()
    monkeypatch.undo()
    paged_attention_triton.check_interpreter()
