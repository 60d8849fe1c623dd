import math
from dataclasses import replace

import pytest
import torch
from helpers import assert_close, begun, random_format, random_model, run_steps
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.config import TINY, ModelConfig
from lib.generate import forward_cached, generate_cached, generate_recompute
from lib.kv_cache import PLAIN, ContiguousKVCache
from lib.latent_kv_cache import (
    LatentFormat,
    attend_latent,
    factorize,
    latent_format,
    rank_for,
    record_kv,
)
from lib.measure.meter import measure
from lib.model import attend_causal
from lib.paged_kv_cache import PagedKVCache


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    # Whole numbers: their squares are exact, so that shares of just enough are too.
    values=st.lists(st.integers(0, 30), min_size=1, max_size=9).filter(any),
    share=st.sampled_from([0.25, 0.5, 0.75, 1.0]) | st.floats(1e-6, 1),
)
def test_the_rank_is_the_smallest_that_keeps_enough(values, share):
    values = sorted(values, reverse=True)
    got = rank_for(torch.tensor(values, dtype=torch.float64), share)
    total = sum(value**2 for value in values)
    enough = [
        rank
        for rank in range(1, len(values) + 1)
        if sum(value**2 for value in values[:rank]) >= share * total
    ]
    assert got == enough[0], f"expected {enough[0]}, got {got}"
    assert type(got) is int


@pytest.mark.parametrize("share", [0, -0.5, 1.001, math.nan, 2])
def test_a_share_of_nothing_or_more_than_all_is_refused(share):
    with pytest.raises(ValueError, match="share: expected above 0, at most 1, got"):
        rank_for(torch.ones(3), share)


@pytest.mark.parametrize("shape", [(40, 6), (5, 12), (7, 7)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_no_matrix_of_this_rank_is_nearer(shape, rank):
    x = torch.randn(shape, dtype=torch.float64)
    codes, basis = factorize(x, rank)
    assert codes.shape == (shape[0], rank) and basis.shape == (rank, shape[1])
    assert_close(basis @ basis.T, torch.eye(rank, dtype=torch.float64))
    assert_close(x @ basis.T, codes)
    error = (x - codes @ basis).norm()
    rest = torch.linalg.svdvals(x)[rank:]
    assert_close(error, rest.square().sum().sqrt())  # Eckart and Young
    for _ in range(20):
        other = torch.linalg.qr(torch.randn(shape[1], rank, dtype=x.dtype)).Q
        assert error <= (x - x @ other @ other.T).norm() + 1e-12


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_a_factorization_of_full_rank_keeps_all(shape):
    x = torch.randn(shape, dtype=torch.float64)
    codes, basis = factorize(x, 6)
    assert_close(codes @ basis, x)


@pytest.mark.parametrize("rank", [0, -1, True, 1.5, "2", None, 7])
def test_ranks_that_a_matrix_cannot_have_are_refused(rank):
    words = "rank: expected (an integer of at least 1|1 to 6), got"
    for shape in ((9, 6), (6, 9)):
        with pytest.raises(ValueError, match=words):
            factorize(torch.randn(shape), rank)
    keys = torch.randn(2, 9, 3, 2)
    for ranks in ((rank, 2), (2, rank)):
        with pytest.raises(ValueError, match=words):
            latent_format(keys, keys, *ranks)


@pytest.mark.parametrize("T, S", [(1, 1), (1, 9), (4, 4), (3, 7), (7, 8)])
@pytest.mark.parametrize("H, G, D", [(4, 4, 6), (4, 2, 6), (3, 1, 4), (6, 2, 2)])
@pytest.mark.parametrize("R, W", [(1, 3), (4, 2), (2, 4)])
def test_attention_over_codes_is_that_over_the_keys_they_stand_for(T, S, H, G, D, R, W):
    q, k_codes, v_codes, k_basis, v_basis = (
        torch.randn(shape, dtype=torch.float64)  # no basis need be orthonormal
        for shape in ((T, H, D), (S, R), (S, W), (R, G, D), (W, G, D))
    )
    got = attend_latent(q, k_codes, v_codes, k_basis, v_basis)
    k, v = (
        torch.einsum("sr,rgd->sgd", codes, basis)
        for codes, basis in ((k_codes, k_basis), (v_codes, v_basis))
    )
    before = torch.zeros(S - T, H, D, dtype=torch.float64)
    expected = attend_causal(0, torch.cat([before, q]), k, v)[S - T :]
    assert_close(got, expected)


def test_no_key_and_no_value_is_made():
    S, T, H, G, D, R, W = 2048, 1, 4, 4, 64, 8, 4
    shapes = (T, H, D), (S, R), (S, W), (R, G, D), (W, G, D)
    inputs = [torch.randn(shape) for shape in shapes]
    cost = measure(lambda: attend_latent(*inputs))
    scores_bytes, keys_bytes = S * T * H * 4, S * G * D * 4
    assert cost.peak_bytes < 4 * scores_bytes < keys_bytes / 8


def test_half_precision_does_not_overflow_in_the_scores_of_codes():
    q, codes = torch.full((1, 1, 128), 30.0).half(), torch.full((2, 1), 30.0).half()
    basis = torch.ones(1, 1, 128).half()
    out = attend_latent(q, codes, torch.tensor([[1.0], [3.0]]).half(), basis, basis)
    assert torch.equal(out, torch.full_like(out, 2.0))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("ranks", [(1, 5), (8, 3), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_is_that_over_what_the_bases_leave(dtype, ranks, heads):
    config = ModelConfig(8, 3, *heads, heads[0] * 8, 8, 64)
    format = random_format(config, *ranks)  # in float64
    assert format.ranks == ranks
    plain = begun(ContiguousKVCache(config, 3, 12, dtype=dtype), 3)
    expected = run_steps(plain, kept=format)
    contiguous = ContiguousKVCache(config, 3, 12, dtype=dtype, format=format)
    got = run_steps(begun(contiguous, 3))
    for one, other in zip(got, expected):
        assert one.dtype == dtype
        assert_close(one, other)
    paged = PagedKVCache(config, 12, 4, dtype=dtype, format=format)
    for one, other in zip(run_steps(begun(paged, 3)), got):
        assert_close(one, other)


@pytest.mark.parametrize("num_heads, num_kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_full_rank_changes_nothing(num_heads, num_kv_heads):
    model = random_model(
        dtype=torch.float64, num_heads=num_heads, num_kv_heads=num_kv_heads
    )
    width = num_kv_heads * 8
    keys, values = record_kv(model, torch.randint(256, (3, 20)))
    format = latent_format(keys, values, width, width)
    settings = {"dtype": torch.float64, "format": format}
    prompts = [torch.randint(256, (n,)) for n in (5, 1, 13)]
    for cache in (
        ContiguousKVCache(model.config, 3, 24, **settings),
        PagedKVCache(model.config, 20, 4, **settings),
    ):
        plain = begun(ContiguousKVCache(model.config, 3, 24, dtype=torch.float64), 3)
        begun(cache, 3)
        for counts in ([5, 1, 7], [0, 0, 6], [1, 1, 1]):
            ids, lens = torch.randint(256, (sum(counts),)), torch.tensor(counts)
            got = forward_cached(model, cache, ids, lens)
            torch.testing.assert_close(
                got, forward_cached(model, plain, ids, lens), rtol=0, atol=1e-10
            )
        for request_id in range(3):
            cache.free(request_id)
        texts = generate_cached(model, prompts, 10, begun(cache, 3), temperature=0)
        for prompt_ids, text in zip(prompts, texts):
            expected = generate_recompute(model, prompt_ids, 10, temperature=0)
            assert torch.equal(text, expected)


def test_recorded_are_the_keys_and_values_that_a_cache_holds():
    model = random_model(dtype=torch.float64, num_layers=3)
    token_ids = torch.randint(256, (2, 7))
    cache = begun(ContiguousKVCache(model.config, 2, 7, dtype=torch.float64), 2)
    forward_cached(model, cache, token_ids.flatten(), torch.tensor([7, 7]))
    keys, values = record_kv(model, token_ids)
    assert_close(keys, cache.k_cache.flatten(1, 2))  # (L, B * T, G, D)
    assert_close(values, cache.v_cache.flatten(1, 2))
    assert not keys.requires_grad and not values.requires_grad


@pytest.mark.parametrize("shape", [(7,), (), (2, 1, 7)])
def test_keys_and_values_of_texts_that_are_no_batch_are_refused(shape):
    with pytest.raises(ValueError, match=r"token_ids: expected \(B, T\), got \("):
        record_kv(random_model(), torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_has_bases_too(dtype):
    model = random_model(dtype=dtype)
    width = model.config.num_kv_heads * model.config.head_dim
    format = latent_format(*record_kv(model, torch.arange(40)[None]), width, width)
    logits = []
    for kept in (format, PLAIN):
        cache = ContiguousKVCache(model.config, 1, 9, dtype=dtype, format=kept)
        ids, lens = torch.arange(9), torch.tensor([9])
        logits.append(forward_cached(model, begun(cache, 1), ids, lens).float())
    torch.testing.assert_close(*logits, rtol=0.05, atol=0.05)


def test_each_layer_has_the_bases_of_its_own_keys_and_of_its_own_values():
    keys, values = torch.randn(2, 3, 20, 2, 4, dtype=torch.float64)
    format = latent_format(keys, values, 3, 5)
    assert format.k_bases.shape == (3, 3, 2, 4) and format.v_bases.shape == (3, 5, 2, 4)
    for layer in range(3):
        for bases, seen, rank in (
            (format.k_bases, keys, 3),
            (format.v_bases, values, 5),
        ):
            flat, basis = seen[layer].flatten(1), bases[layer].flatten(1)
            error = (flat - flat @ basis.T @ basis).norm()
            rest = torch.linalg.svdvals(flat)[rank:]
            assert_close(error, rest.square().sum().sqrt())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [(1, 1), (6, 10), (16, 3)])
def test_bytes_are_those_of_the_storage(ranks, dtype):
    format = random_format(TINY, *ranks)
    per_token = format.bytes_per_token(TINY, dtype.itemsize)
    assert per_token == 2 * sum(ranks) * dtype.itemsize
    contiguous = ContiguousKVCache(TINY, 2, 5, dtype=dtype, format=format)
    paged = PagedKVCache(TINY, 5, 2, dtype=dtype, format=format)
    for cache in (contiguous, paged):
        run_steps(begun(cache, 2), [[3, 1]])
        assert cache.used_bytes == 4 * per_token
        num_places = 10 if cache is contiguous else 3 * 2
        assert cache.reserved_bytes == num_places * per_token
        run_steps(cache, [[2, 4]] if cache is contiguous else [[1, 5]])
        storage = cache.k_cache.nbytes + cache.v_cache.nbytes
        assert cache.used_bytes == cache.reserved_bytes == storage == 10 * per_token
        assert cache.dtype == cache.k_cache.dtype == dtype


@pytest.mark.parametrize(
    "k_shape, v_shape",
    [
        ((2, 3, 4), (2, 3, 4)),
        ((2, 3, 4), (2, 3, 4, 5)),
        ((2, 3, 4, 5), (2, 3, 4)),
        ((2, 3, 4, 5), (2, 3, 4, 5, 1)),
        ((2, 3, 4, 5, 1), (2, 3, 4, 5, 1)),
        ((2, 3, 4, 5), (3, 3, 4, 5)),
        ((2, 3, 4, 5), (2, 3, 5, 4)),
        ((5,), (5,)),
    ],
)
def test_bases_that_do_not_fit_each_other_are_refused(k_shape, v_shape):
    with pytest.raises(ValueError, match=r"bases: expected \(L, R, G, D\) and .*, got"):
        LatentFormat(torch.zeros(k_shape), torch.zeros(v_shape))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_layers": 3}, "expected 3 layers, 2 KV heads of 8 numbers, got 2, 2 of 8"),
        ({"num_kv_heads": 4}, "expected 2 layers, 4 KV heads of 8 numbers, got 2, 2"),
        ({"num_heads": 2}, "expected 2 layers, 2 KV heads of 16 numbers, got 2, 2 of 8"),
    ],
)
def test_bases_of_another_model_are_refused(changes, words):
    config, format = replace(TINY, **changes), random_format(TINY, 2, 3)
    for make in (
        lambda: ContiguousKVCache(config, 1, 4, format=format),
        lambda: PagedKVCache(config, 4, format=format),
    ):
        with pytest.raises(ValueError, match=f"bases of another model: {words}"):
            make()
