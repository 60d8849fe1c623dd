"""What has to hold on a GPU too. On a CPU, where kernels are interpreted, it holds first.

TEST_DEVICE=cuda python -m pytest tests/device     on this machine's GPU
"""

import pytest
import torch
from helpers import NOWHERE, assert_near, begun, paged, prefilled, random_model

from lib import generate, paged_kv_cache
from lib.checkpointing import checkpoint_recursive, run_blocks
from lib.measure import bench_attention
from lib.measure.meter import measure
from lib.model import attend_causal
from lib.paged_attention import paged_prefill_gather
from lib.paged_kv_cache import PagedKVCache

pytest.importorskip("triton", reason="the kernels need Triton")
from lib import paged_kv_cache_triton  # noqa: E402
from lib.paged_attention_triton import paged_decode, paged_prefill  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LENS = [0, 1, 64, 65, 1027]
SHAPES = [  # (H, G), D, block_size; interpreted, the first few are enough for a day
    ((8, 2), 64, 16),
    ((5, 1), 80, 1),
    *(
        pytest.param(shape, marks=pytest.mark.nightly)
        for shape in (((6, 3), 128, 256), ((4, 4), 256, 8), ((32, 8), 128, 16))
    ),
]


@pytest.mark.parametrize("split_tokens", [None, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_is_the_oracle(device, shape, dtype, split_tokens):
    inputs = paged((LENS, *shape), dtype, device=device)
    assert_near(paged_decode(*inputs, split_tokens=split_tokens), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prompts_in_place_are_the_oracle(device, shape, dtype):
    inputs = prefilled(([37, 0, 300, 65, 9], [37, 0, 170, 1, 4], *shape), dtype, device)
    assert_near(paged_prefill(*inputs), inputs, paged_prefill_gather)


def test_a_captured_step_reads_the_lengths_that_there_are_when_it_is_replayed(device):
    if device.type == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    inputs = paged(([700, 300], (8, 2), 64, 16), torch.float16, device=device)
    *rest, seq_lens = inputs
    with torch.cuda.device(device):
        paged_decode(*inputs), torch.cuda.synchronize()  # compiled before it is captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = paged_decode(*inputs)
        for lens in ([700, 300], [513, 0], [1, 299]):
            seq_lens.copy_(torch.tensor(lens))
            graph.replay()
            torch.cuda.synchronize()
            assert_near(got, (*rest, seq_lens))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_and_values_are_written_copied_and_gathered_as_by_the_twins(device, dtype):
    def ids(*values):
        return torch.tensor(values, device=device)

    caches = torch.randn(2, 7, 4, 3, 5).to(device, dtype)
    k, v = torch.randn(2, 6, 3, 5).to(device, dtype)
    expected, slots = caches.clone(), ids(27, 0, 5, 4, 13, 20)
    paged_kv_cache_triton.write_kv(*caches, k, v, slots)
    paged_kv_cache.write_kv(*expected, k, v, slots)
    assert torch.equal(caches, expected)

    paged_kv_cache_triton.copy_blocks(caches[0], ids(2, 5), ids(6, 0))
    expected[0, [6, 0]] = expected[0, [2, 5]]
    assert torch.equal(caches, expected)

    for seq_len in (0, 1, 4, 11):
        request = ids(5, 1, 3, NOWHERE), seq_len
        got = paged_kv_cache_triton.gather_kv(*caches, *request)
        wanted = paged_kv_cache.gather_kv(*caches, *request)
        assert all(torch.equal(one, other) for one, other in zip(got, wanted))


def test_generation_through_the_kernel_is_generation_by_recompute(device):
    model = random_model().to(device)
    prompts = [torch.randint(256, (n,)).to(device) for n in (1, 16, 7)]
    in_place = {"decode": paged_decode, "prefill": paged_prefill}
    cache = PagedKVCache(model.config, 9, 8, device=device, **in_place)
    texts = generate.generate_cached(model, prompts, 12, begun(cache, 3), temperature=0)
    for token_ids, prompt_ids in zip(texts, prompts):
        expected = generate.generate_recompute(model, prompt_ids, 12, temperature=0)
        assert torch.equal(token_ids, expected)


def test_recomputed_blocks_draw_the_same_dropout_again(device):
    model = random_model(num_layers=3, dropout=0.3).train().to(device)
    positions, x = torch.arange(16, device=device), torch.randn(2, 16, 32).to(device)

    def gradients(run):
        model.zero_grad()
        torch.manual_seed(2)  # of every device
        run(model.blocks, x, positions, attend_causal).square().sum().backward()
        behind = torch.rand(3, device=device)
        return [behind, *(parameter.grad for parameter in model.blocks.parameters())]

    for got, expected in zip(gradients(checkpoint_recursive), gradients(run_blocks)):
        # Other dropout is wrong by far more; a GPU may add in another order.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_meter_sees_the_peak_of_the_device_that_is_used(device):
    kept = torch.zeros(2**20, device=device)
    cost = measure(lambda: torch.zeros(2**18, device=device).exp())
    assert cost.peak_bytes == 2 * 2**20
    assert measure(lambda: kept.add_(1)).peak_bytes == 0
    on_cpu = measure(lambda: torch.zeros(100) + 1)
    assert on_cpu.peak_bytes == 800, "exact, as without a GPU"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_ways_to_attend_give_the_same(device, dtype):
    config = bench_attention.one_layer(num_heads=8, num_kv_heads=2, head_dim=16)
    ways = bench_attention.attention_ways(
        *(config, 3, 33, 8), device=device, dtype=dtype, uses_kernels=True
    )
    outs = {name: way() for name, way in ways.items()}
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2
    for out in outs.values():
        torch.testing.assert_close(out, outs["in place"], atol=tolerance, rtol=tolerance)


def test_every_way_of_this_kind_of_device_is_timed(device, monkeypatch):
    monkeypatch.setattr(bench_attention, "COPY_BYTES", {"cpu": 2**12, "cuda": 2**30})
    kind = device.type
    rows = bench_attention.bench_attention(
        [33], [3], device=kind, dtype=bench_attention.DTYPES[kind], repeats=2
    )
    names = {row["name"]: row["implementation"] for row in rows}
    assert names == bench_attention.IMPLEMENTATIONS[kind]
    assert all(row["share_of_copy"] > 0 for row in rows)


def test_launches_are_timed_and_a_graph_gives_what_they_give(device):
    if device != torch.device("cuda:0"):
        pytest.skip("the bench measures the first GPU")
    config = bench_attention.one_layer(num_heads=8, num_kv_heads=2, head_dim=64)
    like = {"device": "cuda", "dtype": torch.bfloat16}
    rows = bench_attention.bench_host(config, [1, 3], 16, **like)
    assert len(rows) == 4
    assert all(0 < row["host_us"] <= row["done_us"] and row["graph_us"] for row in rows)
