"""The torch twins against torch's own attention, and the kernels against the twins."""

import itertools
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import begun

from lib import generate, paged_kv_cache
from lib.config import TINY, ModelConfig
from lib.model import Transformer
from lib.paged_attention import (
    attend_online,
    bytes_moved,
    merge_splits,
    paged_decode_gather,
    paged_decode_online,
)
from lib.paged_kv_cache import PagedKVCache

NOWHERE = 2147480000  # a block id behind the end of a table

TWINS = [paged_decode_gather, paged_decode_online]

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


def assert_near(got, inputs):
    """At most 3 times as far from the result in float64 as torch is in the same dtype."""
    for one, torchs, exact in zip(got, paged_decode_gather(*inputs), in_float64(inputs)):
        assert one.shape == exact.shape
        is_finite = exact.isfinite()
        assert torch.equal(one.isfinite(), is_finite), "NaN, or an infinity, came through"
        error, torchs_error = (
            (x.double() - exact)[is_finite].abs().max() if is_finite.any() else 0
            for x in (one, torchs)
        )
        limit = 3 * torchs_error + 1e-5
        assert error <= limit, f"expected at most {limit}, got {error}"


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_summed_up_in_single(dtype):
    q = torch.full((2, 2), 2.0, dtype=dtype)
    k, v = torch.zeros(2, 600, 1, 2, dtype=dtype)
    k[0], v[0] = (
        2,
        1,
    )  # a weight of 1, and 599 of exp(-8), each too small to be added to 1
    for size in (1, 7, 600):
        out, logsumexp = attend_online(q, zip(k.split(size), v.split(size)))
        assert out.dtype == dtype and logsumexp.dtype == torch.float32
        total = 1 + 599 * math.exp(-8)
        torch.testing.assert_close(out, torch.full_like(out, 1 / total))
        assert logsumexp.tolist() == pytest.approx([8 + math.log(total)] * 2, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_of_half_precision_block_by_block_is_nearer_than_torch(dtype):
    inputs = paged(([512, 37], (8, 2), 64, 16), dtype)
    (out, logsumexp), exact = paged_decode_online(*inputs), in_float64(inputs)
    gathered = paged_decode_gather(*inputs)[0]
    error, torchs_error = ((x - exact[0]).abs().max() for x in (out, gathered))
    assert error < torchs_error
    torch.testing.assert_close(logsumexp.double(), exact[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_tile_without_keys_changes_nothing(at):
    q, k, v = torch.randn(4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    tiles = [(k[:3], v[:3]), (k[3:], v[3:])]
    with_empty = [*tiles[:at], (k[:0], v[:0]), *tiles[at:]]
    for got, expected in zip(attend_online(q, with_empty), attend_online(q, tiles)):
        assert torch.equal(got, expected)
    out, logsumexp = attend_online(q, [(k[:0], v[:0])])
    assert (out == 0).all() and (logsumexp == -math.inf).all()


@pytest.mark.parametrize("decode", TWINS)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_twins_give_out_in_the_dtype_of_q_and_logsumexp_in_single_at_least(decode, dtype):
    out, logsumexp = decode(*paged(CASES[2], dtype))
    assert out.dtype == dtype
    assert logsumexp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_another_scale_is_used():
    inputs = paged(CASES[1])
    half = inputs[0] * 0.5, *inputs[1:]
    for decode in TWINS:
        got = decode(*inputs, scale=0.5 * 64**-0.5)
        for one, other in zip(got, decode(*half)):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[7]], ids=str)
@pytest.mark.parametrize("sizes", [[1, 600], [30, 7, 99, 400], [512]], ids=str)
def test_parts_merge_to_the_whole(case, sizes):
    q, k_cache, v_cache, block_tables, seq_lens = paged(case)
    q = q * q.shape[-1] ** -0.5
    for q_b, block_table, seq_len in zip(q, block_tables, seq_lens.tolist()):
        kv = paged_kv_cache.gather_kv(k_cache, v_cache, block_table, seq_len)
        parts, start = [], 0
        for size in sizes:  # the last ones may be empty
            tile = [x[start : start + size] for x in kv]
            parts.append(attend_online(q_b, [tile]))
            start += size
        outs, logsumexps = (torch.stack(x, dim=1)[None] for x in zip(*parts))
        for got, expected in zip(
            merge_splits(outs, logsumexps), attend_online(q_b, [kv])
        ):
            torch.testing.assert_close(got[0], expected)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_generation_that_reads_in_place_writes_what_recompute_writes(
    num_kv_heads, block_size
):
    torch.manual_seed(0)
    config = ModelConfig(29, 2, 4, num_kv_heads, d_model=32, d_ff=48, max_seq_len=64)
    model = Transformer(config).double().eval()
    prompts = [torch.randint(29, (n,)) for n in (1, 16, 7)]
    cache = begun(
        PagedKVCache(
            config, 120, block_size, dtype=torch.float64, decode=paged_decode_online
        ),
        3,
    )
    texts = generate.generate_cached(model, prompts, 20, cache, temperature=0)
    for token_ids, prompt_ids in zip(texts, prompts):
        expected = generate.generate_recompute(model, prompt_ids, 20, temperature=0)
        assert torch.equal(token_ids, expected)


def test_steps_of_one_token_per_request_read_in_place_and_no_others():
    calls = []

    def decode(q, k_cache, v_cache, block_tables, seq_lens):
        calls.append((len(q), block_tables.dtype, seq_lens.tolist()))
        return paged_decode_online(q, k_cache, v_cache, block_tables, seq_lens)

    torch.manual_seed(0)
    model, ids = Transformer(TINY).eval(), torch.arange(9)
    cache = begun(PagedKVCache(TINY, 8, 4, decode=decode), 2)
    for query_lens in ([3, 1], [1, 0], [1, 1], [0, 2]):
        n = torch.tensor(query_lens)
        generate.forward_cached(model, cache, ids[: n.sum()], n)
    assert calls == [(2, torch.int32, [5, 2])] * TINY.num_layers


# Python as it is where nobody installed Triton.
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import warnings
import torch
from lib import paged_attention, paged_attention_triton as kernels
from lib.measure import gpu_code
q, pool = torch.randn(2, 4, 8), torch.randn(2, 6, 4, 2, 8)
index = torch.arange(6, dtype=torch.int32).view(2, 3), torch.tensor([5, 12]).int()
with warnings.catch_warnings(record=True) as caught:
    kernels.paged_decode(q, *pool, *index)
    got = kernels.paged_decode(q, *pool, *index)
(warning,) = caught  # the second call is silent
assert "no Triton here (it is for Linux): the kernel's torch twin" in str(warning.message)
for one, other in zip(got, paged_attention.paged_decode_online(q, *pool, *index)):
    assert torch.equal(one, other)
for call in (
    lambda: kernels.pad_rows(q[0]),
    lambda: kernels.gather_kv(*pool, index[0][0], 5),
):
    try:
        call()
    except RuntimeError as error:
        assert "expected it installed, which it can be on Linux" in str(error)
    else:
        raise SystemExit("expected an error")
try:
    gpu_code.compile_decode("sm_90")
except gpu_code.CompileError as error:
    assert "expected Triton" in str(error)
else:
    raise SystemExit("expected an error")
"""


def test_without_triton_the_twin_serves_and_says_so():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


pytest.importorskip("triton", reason="the kernels need Triton")
from lib import paged_attention_triton  # noqa: E402
from lib.measure.meter import measure_traffic  # noqa: E402
from lib.paged_attention_triton import paged_decode  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + nightly(LONG_CASES), ids=str)
def test_the_kernel_is_the_oracle(case, dtype):
    inputs = paged(case, dtype)
    assert_near(paged_decode(*inputs), inputs)


# All shapes of a pool, each with one of the batches; 300 of them, three dtypes.
LENGTHS = itertools.cycle(
    [[523, 37, 201], [132, 18, 463, 64, 1], [1027], [54, 97, 512], [1, 15, 16, 17, 0] * 2]
)
SHAPES = itertools.product(
    [(4, 4), (8, 2), (5, 1), (32, 8), (6, 3)], [64, 80, 128, 256], [1, 8, 16, 32, 256]
)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [(next(LENGTHS), *shape) for shape in SHAPES], ids=str)
def test_the_kernel_is_the_oracle_in_every_shape(case, dtype):
    inputs = paged(case, dtype)
    assert_near(paged_decode(*inputs), inputs)
    assert_near(paged_decode(*inputs, num_splits=4), inputs)


@pytest.mark.parametrize("num_splits", [2, 4, 8, 16])
@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[5]], ids=str)
def test_any_number_of_splits_gives_the_same(case, num_splits):
    inputs = paged(case, torch.float32)
    assert_near(paged_decode(*inputs, num_splits=num_splits), inputs)


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
    assert_near(paged_decode(*inputs), inputs)
    expected = in_float64(paged(([40, 17], (4, 2), 32, 16)))
    for one, other in zip(in_float64(inputs), expected):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_requests_may_share_blocks():
    q, k_cache, v_cache, block_tables, seq_lens = paged(CASES[1], torch.float32)
    block_tables[2, 0] = block_tables[0, 0]
    seq_lens[2] = 7
    inputs = q, k_cache, v_cache, block_tables, seq_lens
    assert_near(paged_decode(*inputs), inputs)


def test_tensors_that_are_not_in_one_piece_are_read_right():
    q, k_cache, v_cache, block_tables, seq_lens = paged(CASES[1], torch.float32)
    strided = (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k_cache.transpose(1, 2).contiguous().transpose(1, 2),
        v_cache.transpose(2, 3).contiguous().transpose(2, 3),
        block_tables.t().contiguous().t(),
        torch.stack([seq_lens, seq_lens], dim=1)[:, 0],
    )
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert_near(paged_decode(*strided), strided)


LAST = torch.tensor([1])  # the block that is filled in part


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
        (
            change(3, lambda t: t.index_fill(1, LAST, 7000)),
            "to .* got 7000",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_expected(spoil, words):
    inputs = spoil(paged(([17, 31], (4, 2), 16, 16), torch.float32))
    with pytest.raises(ValueError, match=words):
        paged_decode(*inputs)


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

    everywhere = torch.stack([slots, slots + 28], dim=1)  # not in one piece
    paged_attention_triton.write_kv(*caches, 2 * k, 2 * v, everywhere[:, 0])
    paged_kv_cache.write_kv(*expected, 2 * k, 2 * v, slots)
    assert torch.equal(caches, expected)

    for seq_len in (0, 1, 4, 11):
        block_table = torch.tensor([[5, 1, 3, NOWHERE], [0, 0, 0, 0]]).t().contiguous()
        block_table = block_table.t()[0]
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
    with pytest.raises(ValueError, match="slots: expected torch.int64 on cpu, got"):
        paged_attention_triton.write_kv(cache, cache, rows, rows, slots.int())
    with pytest.raises(ValueError, match="cache: expected shape .*2, 1, 4.*2, 1, 2"):
        paged_attention_triton.write_kv(cache, cache[..., :2], rows, rows, slots)
    with pytest.raises(ValueError, match=r"slots: expected 0 to 5, got \[0, 6\]"):
        paged_attention_triton.write_kv(cache, cache, rows, rows, slots * 6)
    with pytest.raises(ValueError, match=r"targets: expected 0 to 2, got \[-1, 0\]"):
        paged_attention_triton.copy_blocks(cache, slots, slots - 1)
    with pytest.raises(ValueError, match=r"block_table: expected 0 to 2, got \[0, 3\]"):
        paged_attention_triton.gather_kv(cache, cache, slots * 3, 3)
    with pytest.raises(ValueError, match="seq_len: expected 0 to 4 tokens, .* got 5"):
        paged_attention_triton.gather_kv(cache, cache, slots, 5)


@pytest.mark.parametrize("decode", [paged_decode, *TWINS])
def test_no_requests_give_no_rows(decode):
    q, k_cache, v_cache, block_tables, seq_lens = paged(CASES[1], torch.float32)
    out, logsumexp = decode(q[:0], k_cache, v_cache, block_tables[:0], seq_lens[:0])
    assert out.shape == (0, 4, 64) and logsumexp.shape == (0, 4)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_the_kernel_uses_another_scale(num_splits):
    inputs = paged(CASES[1], torch.float32)
    got = paged_decode(*inputs, scale=0.5 * 64**-0.5, num_splits=num_splits)
    assert_near(got, (inputs[0] * 0.5, *inputs[1:]))


@pytest.mark.parametrize(
    "num_programs, max_seq_len, num_splits",
    [
        (1, 100, 1),  # too short to be shared
        (8, 2048, 8),  # 256 tokens each
        (8, 131072, 64),  # 264 programs wanted, for twice 132 processors
        (512, 2048, 1),  # enough programs without
        (512, 131072, 16),  # but one of the texts may be long
    ],
)
def test_texts_are_split_for_many_processors(
    monkeypatch, num_programs, max_seq_len, num_splits
):
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(multi_processor_count=132),
    )
    choose, gpu = paged_attention_triton.choose_num_splits, torch.device("cuda")
    assert choose(num_programs, max_seq_len, gpu) == num_splits
    assert choose(num_programs, max_seq_len, torch.device("cpu")) == 1


def test_a_broken_interpreter_is_named(monkeypatch):
    paged_attention_triton.check_interpreter.cache_clear()
    monkeypatch.setattr(paged_attention_triton, "_double_kernel", {(1,): print})
    with pytest.raises(
        RuntimeError, match="interpreter is broken here .triton 3.*imported before lib"
    ):
        paged_attention_triton.check_interpreter()
    monkeypatch.undo()
    paged_attention_triton.check_interpreter()


def test_rows_are_padded_with_zeros():
    x = torch.randn(5, 12)
    for rows in (x, x[:, :7], x.t()[:, :3], x[:0], x.half()[:, :1]):
        out = paged_attention_triton.pad_rows(rows)
        N, num_cols = rows.shape
        assert out.shape == (N, 2 ** math.ceil(math.log2(num_cols)))
        assert torch.equal(out[:, :num_cols], rows) and (out[:, num_cols:] == 0).all()


@pytest.mark.parametrize("num_splits", [2, 8])
def test_the_kernel_that_merges_is_its_twin(num_splits):
    torch.manual_seed(0)
    outs, logsumexps = torch.randn(2, 3, num_splits, 20), torch.randn(2, 3, num_splits)
    logsumexps[0, 0, 1], logsumexps[1] = -math.inf, -math.inf
    outs[0, 0, 1], outs[1] = 0, 0
    out, logsumexp = torch.empty(2, 3, 20), torch.empty(2, 3)
    paged_attention_triton.merge_splits_kernel[(6,)](
        *(outs, logsumexps, out, logsumexp), HEAD_DIM=20, COLS=32, NUM_SPLITS=num_splits
    )
    for got, expected in zip((out, logsumexp), merge_splits(outs, logsumexps)):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[4]], ids=str)
def test_the_kernel_moves_the_bytes_that_were_predicted(case, dtype):
    lens, (H, G), D, block_size = case
    q, *pool, block_tables, seq_lens = paged(case, dtype)
    config = ModelConfig(29, 1, H, G, d_model=H * D, d_ff=1, max_seq_len=1)
    paged_attention_triton.check_interpreter()
    cost = measure_traffic(lambda: paged_decode(q, *pool, block_tables, seq_lens))
    logsumexp_bytes = cost.value[1].nbytes
    moved = cost.read_bytes + cost.written_bytes - logsumexp_bytes
    assert moved == bytes_moved(config, seq_lens, q.itemsize)
    assert cost.index_bytes == 4 * G * (sum(lens) + len(lens))

    gather = paged_attention_triton.gather_kv
    cost = measure_traffic(
        lambda: [gather(*pool, *request) for request in zip(block_tables, lens)]
    )
    copied = cost.read_bytes + cost.written_bytes
    gathered = bytes_moved(config, seq_lens, q.itemsize, is_gathered=True)
    assert moved + copied == gathered


def test_generation_through_the_kernel_is_generation_by_recompute():
    torch.manual_seed(0)
    model = Transformer(TINY).eval()
    prompts = [torch.randint(TINY.vocab_size, (n,)) for n in (5, 12)]
    cache = begun(PagedKVCache(TINY, 8, 4, decode=paged_decode), 2)
    texts = generate.generate_cached(model, prompts, 5, cache, temperature=0)
    for token_ids, prompt_ids in zip(texts, prompts):
        expected = generate.generate_recompute(model, prompt_ids, 5, temperature=0)
        assert torch.equal(token_ids, expected)


def test_the_oracle_does_not_overflow_on_large_queries_and_keys():
    q = torch.full((1, 1, 64), 40.0, dtype=torch.float16)  # q · k is 102,400
    k_cache = q.view(1, 1, 1, 64).expand(1, 2, 1, 64)
    v_cache = (
        torch.tensor([1.0, 2.0], dtype=torch.float16).view(1, 2, 1, 1).expand_as(k_cache)
    )
    out, logsumexp = paged_decode_gather(
        q, k_cache, v_cache, torch.zeros(1, 1).int(), torch.tensor([2]).int()
    )
    assert (out == 1.5).all() and logsumexp.item() == pytest.approx(12_800, rel=1e-3)
