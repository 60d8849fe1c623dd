"""The torch twins against torch's own attention, and the kernels against the twins."""

import itertools
import math
import mmap
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    NOWHERE,
    assert_near,
    begun,
    in_float64,
    paged,
    prefilled,
    random_model,
)

from lib import generate, paged_kv_cache
from lib.config import TINY, ModelConfig
from lib.course.drivers.ch05 import PROMISED
from lib.engine import Engine
from lib.model import Transformer, attend_fused
from lib.paged_attention import (
    attend_online,
    bytes_moved,
    merge_splits,
    paged_decode_gather,
    paged_decode_online,
    paged_prefill_gather,
)
from lib.paged_kv_cache import PagedKVCache

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
from lib import interpreter, paged_attention, paged_attention_triton as kernels
from lib import paged_kv_cache_triton as copies
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
    lambda: copies.pad_rows(q[0]),
    lambda: copies.gather_kv(*pool, index[0][0], 5),
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
from lib import (  # noqa: E402
    interpreter,
    paged_attention_triton,
    paged_kv_cache_triton,
)
from lib.measure.meter import measure_traffic  # noqa: E402
from lib.paged_attention_triton import paged_decode, paged_prefill  # noqa: E402

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
    assert_near(paged_decode(*inputs, split_tokens=128), inputs)


@pytest.mark.parametrize("split_tokens", [32, 64, 100, 448])
@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[5]], ids=str)
def test_splits_of_any_length_give_the_same(case, split_tokens):
    inputs = paged(case, torch.float32)
    assert_near(paged_decode(*inputs, split_tokens=split_tokens), inputs)


def test_a_long_text_beside_short_ones_is_shared_out_and_they_are_not():
    (H, G), D = (2, 1), 16
    inputs = paged(([1024, 1, 64, 65], (H, G), D, 16), torch.float32)
    whole = measure_traffic(lambda: paged_decode(*inputs, split_tokens=2048))
    shared = measure_traffic(lambda: paged_decode(*inputs, split_tokens=64))
    num_programs = 16 + 1 + 1 + 2  # with keys; the others load a length and end
    parts = num_programs * H * (D + 1) * 4
    queries = (num_programs - 4) * H * D * 4  # loaded again by each
    assert shared.read_bytes - whole.read_bytes == queries + parts
    assert shared.written_bytes - whole.written_bytes == parts


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


@pytest.mark.parametrize("split_tokens", [0, -64, True, 1.5])
def test_a_split_without_keys_is_refused(split_tokens):
    inputs = paged(CASES[0], torch.float32)
    with pytest.raises(ValueError, match="split_tokens: expected an integer of at least"):
        paged_decode(*inputs, split_tokens=split_tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_and_values_are_written_copied_and_gathered_as_by_the_twins(dtype):
    torch.manual_seed(0)
    caches = torch.randn(2, 7, 4, 3, 5).to(dtype)
    k, v = torch.randn(2, 6, 3, 5).to(dtype)
    slots = torch.randperm(28)[:6]
    expected = caches.clone()
    paged_kv_cache.write_kv(*expected, k, v, slots)
    paged_kv_cache_triton.write_kv(*caches, k, v, slots)
    assert torch.equal(caches, expected)

    paged_kv_cache_triton.copy_blocks(
        caches[0], torch.tensor([2, 5]), torch.tensor([6, 0])
    )
    expected[0, [6, 0]] = expected[0, [2, 5]]
    assert torch.equal(caches, expected)

    everywhere = torch.stack([slots, slots + 28], dim=1)  # not in one piece
    paged_kv_cache_triton.write_kv(*caches, 2 * k, 2 * v, everywhere[:, 0])
    paged_kv_cache.write_kv(*expected, 2 * k, 2 * v, slots)
    assert torch.equal(caches, expected)

    for seq_len in (0, 1, 4, 11):
        block_table = torch.tensor([[5, 1, 3, NOWHERE], [0, 0, 0, 0]]).t().contiguous()
        block_table = block_table.t()[0]
        got = paged_kv_cache_triton.gather_kv(*caches, block_table, seq_len)
        wanted = paged_kv_cache.gather_kv(*caches, block_table, seq_len)
        assert all(torch.equal(one, other) for one, other in zip(got, wanted))


def test_writes_that_do_not_fit_are_refused():
    cache, rows, slots = torch.zeros(3, 2, 1, 4), torch.zeros(2, 1, 4), torch.arange(2)
    with pytest.raises(ValueError, match=r"k, v: expected \(2, 1, 4\) of torch.float32"):
        paged_kv_cache_triton.write_kv(cache, cache, rows.half(), rows, slots)
    with pytest.raises(ValueError, match="as many sources as targets, got 2 and 1"):
        paged_kv_cache_triton.copy_blocks(cache, slots, slots[:1])
    with pytest.raises(ValueError, match="cache: expected contiguous"):
        paged_kv_cache_triton.gather_kv(cache.transpose(0, 1), cache, slots, 2)
    with pytest.raises(
        ValueError, match="slots: expected a row of torch.int64 on cpu, got"
    ):
        paged_kv_cache_triton.write_kv(cache, cache, rows, rows, slots.int())
    with pytest.raises(ValueError, match="cache: expected shape .*2, 1, 4.*2, 1, 2"):
        paged_kv_cache_triton.write_kv(cache, cache[..., :2], rows, rows, slots)
    with pytest.raises(ValueError, match=r"slots: expected 0 to 5, got \[0, 6\]"):
        paged_kv_cache_triton.write_kv(cache, cache, rows, rows, slots * 6)
    with pytest.raises(ValueError, match=r"targets: expected 0 to 2, got \[-1, 0\]"):
        paged_kv_cache_triton.copy_blocks(cache, slots, slots - 1)
    with pytest.raises(ValueError, match=r"block_table: expected 0 to 2, got \[0, 3\]"):
        paged_kv_cache_triton.gather_kv(cache, cache, slots * 3, 3)
    with pytest.raises(ValueError, match="seq_len: expected 0 to 4 tokens, .* got 5"):
        paged_kv_cache_triton.gather_kv(cache, cache, slots, 5)
    with pytest.raises(ValueError, match="seq_len: expected an integer of at least 0"):
        paged_kv_cache_triton.gather_kv(cache, cache, slots, 2.0)
    with pytest.raises(ValueError, match="block_table: expected a row of torch.int64"):
        paged_kv_cache_triton.gather_kv(cache, cache, slots.float(), 2)
    with pytest.raises(ValueError, match=r"sources: expected a row .* got \(1, 2\)"):
        paged_kv_cache_triton.copy_blocks(cache, slots[None], slots[None])
    with pytest.raises(ValueError, match="x: expected at least one column"):
        paged_kv_cache_triton.pad_rows(cache[0, :, 0, :0])


@pytest.mark.parametrize("decode", [paged_decode, *TWINS])
def test_no_requests_give_no_rows(decode):
    q, k_cache, v_cache, block_tables, seq_lens = paged(CASES[1], torch.float32)
    out, logsumexp = decode(q[:0], k_cache, v_cache, block_tables[:0], seq_lens[:0])
    assert out.shape == (0, 4, 64) and logsumexp.shape == (0, 4)


@pytest.mark.parametrize("split_tokens", [None, 16])
def test_the_kernel_uses_another_scale(split_tokens):
    inputs = paged(CASES[1], torch.float32)
    got = paged_decode(*inputs, scale=0.5 * 64**-0.5, split_tokens=split_tokens)
    assert_near(got, (inputs[0] * 0.5, *inputs[1:]))


@pytest.mark.parametrize(
    "num_programs, max_seq_len, split_tokens",
    [
        (1, 100, 128),  # too short to be shared
        (8, 0, 128),
        (8, 2048, 128),
        (8, 16384, 512),  # 256 programs, about two for each of 132 multiprocessors
        (64, 4096, 1024),  # four splits of the same length
        (64, 16384, 4096),
        (256, 4096, 4096),  # enough programs without
        (136, 16384, 2112),  # 17 requests: not 4,096, which would be two rounds of 396
        (512, 1024, 4096),  # two rounds too, but shorter programs have to be merged
        (8, 131072, 4096),
        (512, 131072, 4096),  # rounds enough, and one of the texts may be long
    ],
)
def test_texts_are_split_for_many_processors(
    monkeypatch, num_programs, max_seq_len, split_tokens
):
    h100 = SimpleNamespace(
        multi_processor_count=132, shared_memory_per_multiprocessor=228 * 1024
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h100)
    choose, gpu = paged_attention_triton.choose_split_tokens, torch.device("cuda")
    assert choose(num_programs, max_seq_len, gpu) == split_tokens
    assert choose(num_programs, max_seq_len, torch.device("cpu")) == max(1, max_seq_len)


def test_a_broken_interpreter_is_named(monkeypatch):
    interpreter.check_interpreter.cache_clear()
    monkeypatch.setattr(interpreter, "_canary_kernel", {(1,): print})
    with pytest.raises(
        RuntimeError, match=r"interpreter does not work here: expected \[6, 256\], got"
    ):
        interpreter.check_interpreter()
    monkeypatch.undo()
    interpreter.check_interpreter()


def run_python(code, **env):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **env}
    env = {name: value for name, value in env.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env
    )


DECODE = """
import torch
from lib import paged_attention_triton as kernels
q, pool = torch.ones(1, 4, 8), torch.ones(2, 1, 4, 2, 8)
index = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
try:
    print(kernels.paged_decode(q, *pool, *index)[0].sum().item())
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("first", ["", "import triton\n", "import torch._dynamo\n"])
@pytest.mark.parametrize("value", [None, "0", "1", "true", "True", "on", ""])
def test_wherever_triton_is_imported_first_kernels_run_or_one_sentence_says_why(
    first, value
):
    result = run_python(
        first + DECODE,
        TRITON_INTERPRET=value,
        CUDA_VISIBLE_DEVICES="",
        ROCR_VISIBLE_DEVICES="",
    )
    assert result.returncode == 0, result.stderr
    interprets = value in ("1", "true", "True", "on") or not first and value is None
    words = "32.0" if interprets else "Triton: expected a GPU, or TRITON_INTERPRET=1"
    assert result.stdout.startswith(words), result.stdout


def test_rows_are_padded_with_zeros():
    x = torch.randn(5, 12)
    for rows in (x, x[:, :7], x.t()[:, :3], x[:0], x.half()[:, :1]):
        out = paged_kv_cache_triton.pad_rows(rows)
        N, num_cols = rows.shape
        assert out.shape == (N, 2 ** math.ceil(math.log2(num_cols)))
        assert torch.equal(out[:, :num_cols], rows) and (out[:, num_cols:] == 0).all()


@pytest.mark.parametrize("num_splits", [1, 2, 21, 40])
def test_the_kernel_that_merges_is_its_twin(num_splits):
    """Splits of 8 keys; the second request has three keys less, the third has none."""
    H, seq_lens = 3, torch.tensor([8 * num_splits, 8 * num_splits - 11, 0])
    seq_lens = seq_lens.clamp(min=0).int()
    outs = torch.full((3, H, num_splits, 20), math.nan)
    logsumexps = torch.full((3, H, num_splits), math.nan)
    expected_outs, expected = outs.nan_to_num(0), logsumexps.nan_to_num(-math.inf)
    expected.fill_(-math.inf)
    for b, seq_len in enumerate(seq_lens.tolist()):
        used = math.ceil(seq_len / 8)
        outs[b, :, :used] = expected_outs[b, :, :used] = torch.randn(H, used, 20)
        logsumexps[b, :, :used] = expected[b, :, :used] = 9 * torch.randn(H, used)
    out, logsumexp = torch.empty(3, H, 20), torch.empty(3, H)
    paged_attention_triton.merge_splits_kernel[(3 * H,)](
        *(outs, logsumexps, seq_lens, out, logsumexp, num_splits, 8, H),
        HEAD_DIM=20, COLS=32, TILE=16,
    )  # fmt: skip
    for got, wanted in zip((out, logsumexp), merge_splits(expected_outs, expected)):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[4]], ids=str)
def test_the_kernel_moves_the_bytes_that_were_predicted(case, dtype):
    lens, (H, G), D, block_size = case
    q, *pool, block_tables, seq_lens = paged(case, dtype)
    config = ModelConfig(29, 1, H, G, d_model=H * D, d_ff=1, max_seq_len=1)
    interpreter.check_interpreter()
    cost = measure_traffic(lambda: paged_decode(q, *pool, block_tables, seq_lens))
    logsumexp_bytes = cost.value[1].nbytes
    moved = cost.read_bytes + cost.written_bytes - logsumexp_bytes
    assert moved == bytes_moved(config, seq_lens, q.itemsize)
    assert cost.index_bytes == 4 * G * (sum(lens) + len(lens))

    gather = paged_kv_cache_triton.gather_kv
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


def test_an_engine_over_the_kernels_gives_each_request_the_text_that_it_has_alone():
    model, calls = random_model(), Counter()

    def counted(kernel):
        def attend(*args):
            calls[kernel] += 1
            return kernel(*args)

        return attend

    cache = PagedKVCache(
        model.config, 7, 4, decode=counted(paged_decode), prefill=counted(paged_prefill)
    )
    eng, requests = Engine(model, cache, token_budget=10), []
    for prompt_len, num_answers in ((3, 1), (6, 2), (9, 1)):
        prompt_ids = torch.randint(model.config.vocab_size, (prompt_len,))
        made = eng.add(prompt_ids, 6, n=num_answers, temperature=0)
        requests += made if num_answers > 1 else [made]
    steps = eng.run()
    num_copies = sum(len(step.next_ids.keys() - step.counts.keys()) for step in steps)
    assert num_copies == 1 and any(step.preempted for step in steps)
    assert min(calls[paged_decode], calls[paged_prefill]) > 4, calls

    for request in requests:
        text, S = torch.tensor(request.token_ids), request.prompt_len
        expected = generate.generate_recompute(model, text[:S], 6, temperature=0)
        assert torch.equal(text, expected), f"expected {expected}, got {text}"
        with torch.no_grad():
            logits = model(text, torch.arange(len(text)), attend_fused)[S - 1 : -1]
        first, second = logits.topk(2).values.T
        assert (first - second).min() > 1e-3, "rounding could have decided"
    cache.manager.check_integrity()
    assert cache.num_free_blocks == cache.num_blocks


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


# (lengths, new tokens of each, heads, D, block_size): whole prompts, prompts behind what
# is cached, pieces, one token, nothing.
PREFILLS = [
    ([37, 21, 80, 33, 70, 9], [37, 5, 48, 1, 30, 0], (4, 2), 32, 16),
    ([300, 64, 65], [300, 64, 1], (8, 2), 80, 8),
    ([1, 2, 0], [1, 2, 0], (5, 1), 64, 32),
    ([45, 129], [44, 128], (40, 1), 16, 1),
    ([130, 7], [129, 7], (6, 3), 128, 256),
]


@pytest.mark.parametrize("case", PREFILLS, ids=str)
def test_the_oracle_of_prefill_is_chapter_4s_attention_and_decode_row_by_row(case):
    q, k_cache, v_cache, block_tables, seq_lens, query_lens = prefilled(case)
    out, logsumexp = paged_prefill_gather(
        q, k_cache, v_cache, block_tables, seq_lens, query_lens
    )
    torch.testing.assert_close(
        out,
        paged_kv_cache.attend_paged(
            *(q, k_cache, v_cache, block_tables.long()),
            seq_lens.long(),
            query_lens.long(),
        ),
    )
    # Each new token, as a request of its own that ends with it.
    rows = torch.arange(len(seq_lens)).repeat_interleave(query_lens)
    positions = paged_kv_cache.new_positions(seq_lens.long(), query_lens.long())
    expected = paged_decode_gather(
        *(q, k_cache, v_cache, block_tables[rows], (positions + 1).int())
    )
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(logsumexp, expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PREFILLS, ids=str)
def test_prefill_in_place_is_the_oracle(case, dtype):
    inputs = prefilled(case, dtype)
    assert_near(paged_prefill(*inputs), inputs, paged_prefill_gather)


def test_prefill_reads_each_key_once_per_tile_of_queries_and_none_of_the_future():
    """129 new tokens of two heads: tiles of 64 queries, which end at 65, 129 and 130."""
    inputs = prefilled(([130], [129], (2, 1), 16, 16), torch.float32)
    cost = measure_traffic(lambda: paged_prefill(*inputs))
    keys = 2 * (65 + 129 + 130) * 16 * 4
    assert cost.read_bytes == keys + inputs[0].nbytes
    assert cost.written_bytes == inputs[0].nbytes + 129 * 2 * 4


def test_prompts_may_share_a_prefix():
    lens, query_lens = [40, 37, 33], [24, 5, 17]
    inputs = list(prefilled((lens, query_lens, (4, 2), 32, 16), torch.float32))
    inputs[3][1:, :1] = inputs[3][0, :1]  # the first 16 tokens of all three
    assert_near(paged_prefill(*inputs), inputs, paged_prefill_gather)


def test_prefill_of_one_token_each_is_decode():
    inputs = paged(CASES[3], torch.float32)
    ones = torch.ones(3, dtype=torch.int32)
    for got, expected in zip(paged_prefill(*inputs, ones), paged_decode(*inputs)):
        torch.testing.assert_close(got, expected)


def test_prefill_of_many_requests_finds_each_ones_tiles():
    lens = [1 + (7 * b) % 5 for b in range(300)]  # more than 256, some without new tokens
    query_lens = [n if n % 2 else 0 for n in lens]
    inputs = prefilled((lens, query_lens, (2, 1), 16, 4), torch.float32)
    assert_near(paged_prefill(*inputs), inputs, paged_prefill_gather)


@pytest.mark.parametrize(
    "query_lens, words",
    [
        ([5, 6], "query_lens: expected 40 in all, as q has rows, got"),
        ([41, -1], "request 0: expected 0 to 17 new tokens of its 17, got 41"),
        ([3, 37], "request 1: expected 0 to 31 new tokens of its 31, got 37"),
        ([40], "one row for each of 1 requests, got 2 and 2"),
    ],
)
def test_new_tokens_that_do_not_fit_are_refused(query_lens, words):
    inputs = list(prefilled(([17, 31], [16, 24], (4, 2), 16, 16), torch.float32))
    inputs[5] = torch.tensor(query_lens, dtype=torch.int32)
    with pytest.raises(ValueError, match=words):
        paged_prefill(*inputs)


def test_sizes_that_no_program_could_hold_are_refused_with_what_fits():
    for constants, sizes in (
        (paged_attention_triton.decode_constants, (1, 576, 16)),
        (paged_attention_triton.decode_constants, (256, 128, 16)),
        (paged_attention_triton.prefill_constants, (1, 576, 16, 1)),
    ):
        with pytest.raises(ValueError, match="expected at most 512 numbers per head"):
            constants(*sizes, torch.bfloat16, is_interpreted=False)


def promised(size, dtype=torch.float32):
    """Zeros in memory that is promised, and not there before it is touched."""
    memory = mmap.mmap(-1, size * dtype.itemsize, flags=PROMISED)
    return torch.frombuffer(memory, dtype=dtype)


@pytest.mark.parametrize("kernel", ["decode", "prefill"])
@pytest.mark.parametrize("far", ["blocks", "places", "heads", "queries", "tables"])
def test_strides_beyond_2_31_numbers_are_no_trouble(kernel, far):
    """Index 2 or 3 times a stride of 2^30, in each dimension in turn."""
    B, H, G, block_size, D, stride = 3, 3, 3, 4, 16, 2**30
    sizes, names = [3, block_size, G], ["blocks", "places", "heads"]
    strides, next_stride = [0, 0, 0], D
    for i in sorted(range(3), key=lambda i: names[i] == far):
        strides[i] = stride if names[i] == far else next_stride
        next_stride *= sizes[i]
    pool = promised(3 * stride + 2**10).as_strided((*sizes, D), (*strides, 1))
    pool.copy_(torch.randn(*sizes, D))
    row = stride if far == "queries" else H * D
    q = promised(2 * row + H * D).as_strided((B, H, D), (row, D, 1))
    q.copy_(torch.randn(B, H, D))
    row = stride if far == "tables" else 2
    tables = promised(2 * row + 2, torch.int32).as_strided((B, 2), (row, 1))
    tables.copy_(torch.tensor([[2, 0], [1, 2], [0, 2]]))
    inputs = (q, pool, pool, tables, torch.tensor([7, 5, 8], dtype=torch.int32))
    if kernel == "decode":
        assert_near(paged_decode(*inputs), inputs)
    else:
        inputs = (*inputs, torch.ones(3, dtype=torch.int32))
        assert_near(paged_prefill(*inputs), inputs, paged_prefill_gather)


def test_prefill_reads_tensors_that_are_not_in_one_piece():
    q, k_cache, v_cache, block_tables, *lens = prefilled(
        ([37, 20], [30, 5], (4, 2), 32, 16), torch.float32
    )
    strided = (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k_cache.transpose(1, 2).contiguous().transpose(1, 2),
        v_cache.transpose(2, 3).contiguous().transpose(2, 3),
        block_tables.t().contiguous().t(),
        *(torch.stack([x, x], dim=1)[:, 0] for x in lens),
    )
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert_near(paged_prefill(*strided), strided, paged_prefill_gather)
    twice = v_cache.unsqueeze(1).repeat(1, 2, 1, 1, 1)[:, 1]  # strides that are not k's
    inputs = (q, k_cache, twice, block_tables, *lens)
    assert_near(paged_prefill(*inputs), inputs, paged_prefill_gather)


def test_no_two_programs_of_a_prefill_write_the_same_row():
    """Where they do it is a race on a GPU, and nothing that shows here. Three heads per
    KV head leave 128 // 3 = 42 queries for a tile."""
    inputs = prefilled(([130, 50], [129, 50], (3, 1), 16, 16), torch.float32)
    cost = measure_traffic(lambda: paged_prefill(*inputs))
    assert cost.written_bytes == 179 * 3 * (16 + 1) * 4
    ends = [1 + min(129, 42 * i) for i in range(1, 5)] + [42, 50]
    assert cost.read_bytes == inputs[0].nbytes + 2 * sum(ends) * 16 * 4


class NobodyLooks(torch.utils._python_dispatch.TorchDispatchMode):
    """Raises where Python asks for a number: a GPU would have to be waited for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_what_is_launched_depends_on_shapes_alone_and_nobody_waits(monkeypatch):
    interpreter.check_interpreter()
    decode = paged(([100, 17], (4, 2), 16, 16), torch.float32)
    prefill = prefilled(([100, 17], [30, 5], (4, 2), 16, 16), torch.float32)
    grids, asked = [], []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **constants: None

    for name in ("paged_decode_kernel", "merge_splits_kernel", "paged_prefill_kernel"):
        monkeypatch.setattr(paged_attention_triton, name, Kernel())
    monkeypatch.setattr(
        paged_attention_triton,
        "choose_split_tokens",
        lambda *args: asked.append(args) or 32,
    )
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    with NobodyLooks():
        paged_decode(*decode, check_ids=False)
        paged_prefill(*prefill, check_ids=False)
    assert asked == [(2 * 2, 8 * 16, torch.device("cpu"))]
    assert grids == [(2, 2, 4), (8,), (2, 35 // 64 + 2)]


def test_prefill_uses_another_scale():
    inputs = prefilled(([40], [30], (4, 2), 16, 16), torch.float32)
    got = paged_prefill(*inputs, scale=np.float32(0.5 * 16**-0.5))
    assert_near(got, (inputs[0] * 0.5, *inputs[1:]), paged_prefill_gather)


@pytest.mark.parametrize("block_id, change", [(-1, 0), (7, 0), (0, -18)])
def test_prefill_and_decode_refuse_blocks_and_lengths_that_are_not_there(
    block_id, change
):
    q, *pool, block_tables, seq_lens = paged(([17, 31], (4, 2), 16, 16), torch.float32)
    assert len(pool[0]) == 7
    index = block_tables.index_fill(1, torch.tensor([0]), block_id), seq_lens + change
    with pytest.raises(ValueError, match="request 0: expected"):
        paged_decode(q, *pool, *index)
    with pytest.raises(ValueError, match="request 0: expected"):
        paged_prefill(q, *pool, *index, torch.ones(2, dtype=torch.int32))


def test_negative_new_tokens_are_refused_behind_right_ones():
    inputs = prefilled(([17, 31, 9], [16, 24, 0], (4, 2), 16, 16), torch.float32)
    query_lens = torch.tensor([17, 31, -8], dtype=torch.int32)
    with pytest.raises(ValueError, match="request 2: expected 0 to 9"):
        paged_prefill(*inputs[:5], query_lens)


@pytest.mark.parametrize("split_tokens", [None, 16])
def test_a_table_without_columns_is_that_of_requests_without_keys(split_tokens):
    q, *pool, block_tables, seq_lens = paged(([3, 4], (4, 2), 16, 4), torch.float32)
    out, logsumexp = paged_decode(
        q, *pool, block_tables[:, :0], seq_lens * 0, split_tokens=split_tokens
    )
    assert (out == 0).all() and (logsumexp == -math.inf).all()


def test_a_block_of_many_numbers_is_copied_whole():
    cache = torch.randn(4, 16, 8, 17)  # 2,176 numbers in a block, 1,024 in a tile
    expected = cache.clone()
    paged_kv_cache_triton.copy_blocks(cache, torch.tensor([0]), torch.tensor([2]))
    expected[2] = expected[0]
    assert torch.equal(cache, expected)


def test_results_do_not_hang_on_the_default_dtype():
    inputs = paged(CASES[3], torch.float32)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = paged_decode(*inputs, split_tokens=64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_near(got, inputs)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_in_a_query_shows_in_both_results():
    q, *rest = paged(CASES[1], torch.float32)
    q[0, 0, 0] = math.nan
    for split_tokens in (None, 8):
        for result in paged_decode(q, *rest, split_tokens=split_tokens):
            assert result[0, 0].isnan().all() and not result[1:].isnan().any()


def test_a_gradient_that_would_be_lost_is_refused():
    q, *rest = paged(CASES[1], torch.float32)
    ones = torch.ones(3, dtype=torch.int32)
    q.requires_grad_()
    for call in (
        lambda: paged_decode(q, *rest),
        lambda: paged_prefill(q, *rest, ones),
        lambda: paged_kv_cache_triton.pad_rows(q[0]),
    ):
        with pytest.raises(ValueError, match="expected no gradient to be wanted"):
            call()
    with torch.no_grad():
        assert_near(paged_decode(q, *rest), (q, *rest))


def test_splits_that_a_gpu_could_not_number_are_refused():
    q, *pool, _, seq_lens = paged(([3], (2, 1), 16, 16), torch.float32)
    wide = torch.zeros(1, 2**13, dtype=torch.int32)
    with pytest.raises(ValueError, match="make at most 65535 splits, got 1"):
        paged_decode(q, *pool, wide, seq_lens, split_tokens=1)


def test_generation_in_place_from_the_prompt_on_is_generation_by_recompute(monkeypatch):
    def never(*args):
        raise AssertionError("expected no gather, got one")

    monkeypatch.setattr(paged_kv_cache, "attend_paged", never)
    model = Transformer(TINY).eval()
    prompts = [torch.randint(TINY.vocab_size, (n,)) for n in (5, 12)]
    cache = begun(PagedKVCache(TINY, 8, 4, decode=paged_decode, prefill=paged_prefill), 2)
    texts = generate.generate_cached(model, prompts, 5, cache, temperature=0)
    for token_ids, prompt_ids in zip(texts, prompts):
        expected = generate.generate_recompute(model, prompt_ids, 5, temperature=0)
        assert torch.equal(token_ids, expected)


def test_the_kernels_are_taken_where_they_are_compiled(monkeypatch):
    from lib import paged_attention_triton as kernels

    in_torch = {"fused_decode": True}
    in_place = {"decode": kernels.paged_decode, "prefill": kernels.paged_prefill}
    for has_triton, is_interpreted, device, expected in (
        (True, False, "cpu", in_torch),
        (True, False, "cuda:1", in_place),
        (True, True, "cuda", in_torch),
        (False, False, "cuda", in_torch),
    ):
        monkeypatch.setattr(kernels, "HAS_TRITON", has_triton)
        monkeypatch.setattr(kernels, "IS_INTERPRETED", is_interpreted)
        assert kernels.fastest_settings(device) == expected
