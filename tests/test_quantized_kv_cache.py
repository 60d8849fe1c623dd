import math
import re

import pytest
import torch
from helpers import assert_close, begun, in_steps, run_steps
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import kv_cache, paged_attention, quantized_kv_cache
from lib.config import TINY, ModelConfig
from lib.kv_cache import ContiguousKVCache
from lib.measure.meter import measure
from lib.paged_kv_cache import PagedKVCache
from lib.quantized_kv_cache import (
    BITS,
    QuantizedFormat,
    dequantize,
    from_rows,
    quantize,
    to_rows,
)

DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16


def unpacked(codes, bits):
    """The numbers in rows of bytes, first in the lowest bits; with Python's integers."""
    rows = codes.flatten(0, -2).tolist()
    numbers = [
        [byte >> shift & 2**bits - 1 for byte in row for shift in range(0, 8, bits)]
        for row in rows
    ]
    return torch.tensor(numbers).view(*codes.shape[:-1], -1)


@pytest.mark.parametrize("bits", BITS)
def test_a_code_counts_the_steps_from_the_smallest_number_to_the_nearest(bits):
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    codes, scale, zero = quantize(x, bits)
    assert codes.dtype == torch.uint8 and codes.shape == (3, 5, 16 * bits // 8)
    assert scale.shape == zero.shape == (3, 5, 1) and scale.dtype == zero.dtype == x.dtype
    assert torch.equal(zero, x.amin(-1, keepdim=True))
    assert_close(zero + (2**bits - 1) * scale, x.amax(-1, keepdim=True))
    distances = zero.unsqueeze(-1) + torch.arange(2**bits) * scale.unsqueeze(-1)
    nearest = (x.unsqueeze(-1) - distances).abs().argmin(-1)
    assert torch.equal(unpacked(codes, bits), nearest)
    got = dequantize(codes, scale, zero, bits)
    assert got.dtype == x.dtype
    assert_close(got, in_steps(x, bits))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("bits", BITS)
def test_the_codes_of_the_ends_are_the_first_and_the_last(bits, dtype):
    x = (torch.randn(200, 8) * 10 ** torch.linspace(-2, 3, 200)[:, None]).to(dtype)
    numbers = unpacked(quantize(x, bits)[0], bits)
    ends = numbers.gather(1, torch.stack([x.argmin(1), x.argmax(1)], 1))
    assert torch.equal(ends, torch.tensor([0, 2**bits - 1]).expand(200, 2))


@st.composite
def vectors(draw):
    """Eight numbers of any size, of any distance from 0, in a dtype."""
    dtype = draw(st.sampled_from(DTYPES))
    info = torch.finfo(dtype)
    exponent = math.log2(info.max) - 3
    low = math.log2(info.smallest_normal) - 12  # of subnormals too
    offset, spread = (2 ** draw(st.floats(low, exponent)) for _ in range(2))
    offset *= draw(st.sampled_from([0, 0, 1, -1]))
    units = draw(st.lists(st.floats(-1, 1), min_size=8, max_size=8))
    x = [offset + spread * unit for unit in units]
    return torch.tensor(x, dtype=torch.float64).to(dtype)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(x=vectors(), bits=st.sampled_from(BITS))
def test_no_number_is_off_by_more_than_half_a_step_and_rounding(x, bits):
    codes, scale, zero = quantize(x, bits)
    got = dequantize(codes, scale, zero, bits)
    info, exact = torch.finfo(x.dtype), x.double()
    error = (got.double() - exact).abs().max().item()
    span = (exact.max() - exact.min()).item()
    rounding = info.eps * (3 * span + exact.abs().max().item())
    # A scale is a whole number of the smallest numbers that there are.
    rounding += 2**bits * info.smallest_normal * info.eps
    limit = scale.item() / 2 + rounding
    assert error <= limit, f"expected at most {limit}, got {error}"


def test_a_scale_that_was_rounded_down_makes_no_code_too_large():
    x = (torch.arange(8) * 54 * 2.0**-24).half()  # 378 of the smallest number
    codes, scale, zero = quantize(x, 8)
    assert scale.item() == 2**-24
    assert codes.tolist() == [0, 54, 108, 162, 216, 255, 255, 255]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [0.0, -3.5, 1024.0, 6e-8])
def test_equal_numbers_come_back_as_they_were(number, dtype):
    x = torch.full((2, 4), number).to(dtype)
    codes, scale, zero = quantize(x, 2)
    assert not codes.any() and not scale.any()
    assert torch.equal(dequantize(codes, scale, zero, 2), x)


@pytest.mark.parametrize("bits", BITS)
def test_what_came_back_has_the_same_codes_again(bits):
    codes, *scale_and_zero = quantize(torch.randn(50, 16, dtype=torch.float64), bits)
    again, *_ = quantize(dequantize(codes, *scale_and_zero, bits), bits)
    assert torch.equal(again, codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(8,), (1, 1, 4), (5, 1, 8), (0, 2, 8), (3, 2, 12)])
def test_rows_bring_back_what_codes_bring_back(shape, bits, dtype):
    x = torch.randn(shape).to(dtype)
    rows = to_rows(x, bits)
    num_bytes = shape[-1] * bits // 8 + 2 * dtype.itemsize
    assert rows.dtype == torch.uint8 and rows.shape == (*shape[:-1], num_bytes)
    expected = dequantize(*quantize(x, bits), bits)
    assert torch.equal(from_rows(rows, bits, dtype), expected)
    # One vector, wherever its row begins.
    for i in range(shape[0] if len(shape) > 1 else 0):
        assert torch.equal(from_rows(rows[i : i + 1], bits, dtype), expected[i : i + 1])
        assert torch.equal(from_rows(rows[i, 0], bits, dtype), expected[i, 0])


def test_vectors_need_not_lie_in_one_piece():
    x = torch.randn(8, 3, 6).permute(2, 1, 0)
    assert torch.equal(to_rows(x, 4), to_rows(x.contiguous(), 4))
    rows = to_rows(x, 4).transpose(0, 1)
    expected = from_rows(rows.contiguous(), 4, x.dtype)
    assert torch.equal(from_rows(rows, 4, x.dtype), expected)


@pytest.mark.parametrize("bits", [3, 1, 0, -8, 16, True, "8", 8.0, None, (8, 4)])
def test_bits_that_do_not_fill_a_byte_are_refused(bits):
    for call in (
        lambda: quantize(torch.zeros(8), bits),
        lambda: QuantizedFormat(bits),
        lambda: QuantizedFormat(8, "4" if bits is None else bits),
    ):
        with pytest.raises(ValueError, match=r"bits: expected one of \(8, 4, 2\), got"):
            call()


@pytest.mark.parametrize("bits, D, multiple", [(4, 3, 2), (2, 6, 4), (2, 1, 4)])
def test_vectors_that_do_not_fill_their_bytes_are_refused(bits, D, multiple):
    words = f"vectors of {D} numbers: expected a multiple of {multiple}"
    with pytest.raises(ValueError, match=words):
        quantize(torch.zeros(2, D), bits)


def test_a_model_whose_vectors_do_not_fill_their_bytes_is_refused():
    config = ModelConfig(8, 1, 2, 1, d_model=12, d_ff=8, max_seq_len=8)  # D = 6
    for format in (QuantizedFormat(2), QuantizedFormat(8, 2), QuantizedFormat(2, 8)):
        with pytest.raises(ValueError, match="vectors of 6 numbers: expected"):
            ContiguousKVCache(config, 1, 4, format=format)
        with pytest.raises(ValueError, match="vectors of 6 numbers: expected"):
            PagedKVCache(config, 4, format=format)
    ContiguousKVCache(config, 1, 4, format=QuantizedFormat(4, 8))


@pytest.mark.parametrize(
    "numbers, dtype, words",
    [
        ([1.0, math.nan], torch.float32, "from nan to nan"),
        ([1.0, math.inf], torch.float32, "from 0.0 to inf"),
        ([-math.inf, -math.inf], torch.float32, "from -inf to -inf"),
        ([3e38, -3e38], torch.float32, "from -3.0"),
        ([6e4, -6e4], torch.float16, "from -60000.0 to 60000.0"),
    ],
)
def test_vectors_without_a_finite_range_are_refused(numbers, dtype, words):
    x = torch.zeros(2, 3, 8, dtype=dtype)
    x[1, 0, 4:6] = torch.tensor(numbers, dtype=dtype)
    words = f"expected a finite range in each, got 8 numbers {words}"
    if -math.inf in numbers:
        x[1, 0] = -math.inf
    with pytest.raises(ValueError, match=words):
        quantize(x, 8)


@pytest.mark.parametrize(
    "x",
    [torch.tensor([1, 2]), torch.tensor([True]), torch.tensor(1.0), torch.zeros(3, 0)],
)
def test_what_is_no_vector_of_floats_is_refused(x):
    words = re.escape(f"expected floats (..., D), got {x.dtype} {tuple(x.shape)}")
    with pytest.raises(ValueError, match=words):
        quantize(x, 8)


def model_config(num_heads, num_kv_heads, head_dim=8):
    return ModelConfig(8, 2, num_heads, num_kv_heads, num_heads * head_dim, 8, 64)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("bits", [(8,), (4,), (2,), (8, 4), (2, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_is_that_over_what_quantization_leaves(dtype, bits, heads):
    config, format = model_config(*heads), QuantizedFormat(*bits)
    plain = begun(ContiguousKVCache(config, 3, 12, dtype=dtype), 3)
    expected = run_steps(plain, kept=format)
    contiguous = ContiguousKVCache(config, 3, 12, dtype=dtype, format=format)
    got = run_steps(begun(contiguous, 3))
    for one, other in zip(got, expected):
        assert one.dtype == dtype
        assert_close(one, other)
    paged = PagedKVCache(config, 12, 4, dtype=dtype, format=format)
    for one, other in zip(run_steps(begun(paged, 3)), got):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_of_half_precision_is_near_that_over_what_is_left(dtype):
    config, format = model_config(4, 2), QuantizedFormat(8, 4)
    cache = begun(ContiguousKVCache(config, 3, 12, dtype=dtype, format=format), 3)
    plain = begun(ContiguousKVCache(config, 3, 12), 3)
    for got, expected in zip(run_steps(cache), run_steps(plain)):
        assert got.dtype == dtype
        error = (got.float() - expected).abs().max().item()
        assert error < 0.3, f"expected what 4 bits explain, got {error}"  # a step is 0.2


@pytest.mark.parametrize("tile", [1, 2, 8, 9, 10, 128])
def test_tiles_of_any_size_give_the_same(monkeypatch, tile):
    config, format = model_config(4, 1), QuantizedFormat(4, 2)
    steps = [[8, 1, 9], *[[1, 1, 1]] * 3]  # 9, 10, 11 tokens; 2, 3, 4; 10, 11, 12
    settings = {"dtype": torch.float64, "format": format}
    plain = begun(ContiguousKVCache(config, 3, 12, dtype=torch.float64), 3)
    monkeypatch.setattr(quantized_kv_cache, "TILE", tile)
    sizes = []

    def watched(q, tiles):
        tiles = list(tiles)
        sizes.append([len(k) for k, _ in tiles])
        return attend_online(q, tiles)

    attend_online = paged_attention.attend_online
    monkeypatch.setattr(paged_attention, "attend_online", watched)
    expected = run_steps(plain, steps, kept=format)
    got = run_steps(begun(ContiguousKVCache(config, 3, 12, **settings), 3), steps)
    for one, other in zip(got, expected):
        assert_close(one, other)
    in_a_layer = [[1], [9, 2, 10], [10, 3, 11], [11, 4, 12]]  # one new token each
    lens = [S for step in in_a_layer for S in step * config.num_layers]
    counted = [sum(tiles) for tiles in sizes]
    assert counted == lens, f"expected {lens}, got {counted}"
    for tiles in sizes:
        assert all(n == tile for n in tiles[:-1]) and 0 < tiles[-1] <= tile


def test_the_first_bits_are_those_of_keys_and_the_second_those_of_values():
    assert QuantizedFormat(8, 4).bits == (8, 4) and QuantizedFormat(2).bits == (2, 2)
    cache = ContiguousKVCache(TINY, 3, 5, format=QuantizedFormat(8, 2))
    assert cache.k_cache.shape == (2, 3, 5, 2, 8 + 2 * 4)
    assert cache.v_cache.shape == (2, 3, 5, 2, 2 + 2 * 4)
    x = torch.tensor([[[0.0, 0.2, 0.9, 1.0, 0.0, 0.2, 0.9, 1.0]]]).repeat(1, 2, 1)
    k, v = QuantizedFormat(2, 8).encode(0, x, x)
    assert from_rows(k, 2, x.dtype).flatten()[1].item() == pytest.approx(1 / 3)
    assert from_rows(v, 8, x.dtype).flatten()[1].item() == pytest.approx(0.2)


def test_more_than_one_new_token_is_attended_to_as_a_whole(monkeypatch):
    calls = []
    for module, name in (
        (paged_attention, "attend_online"),
        (kv_cache, "attend_cached"),
    ):
        function = getattr(module, name)

        def noting(*args, function=function, name=name):
            calls.append(name)
            return function(*args)

        monkeypatch.setattr(module, name, noting)
    format = QuantizedFormat(8)
    run_steps(begun(ContiguousKVCache(TINY, 3, 12, format=format), 3), [[2, 1, 0]])
    assert calls == ["attend_cached", "attend_online"] * TINY.num_layers


def test_a_decode_step_holds_two_tiles_at_most():
    config, format = model_config(4, 2, head_dim=32), QuantizedFormat(8, 4)
    tile_bytes = 2 * quantized_kv_cache.TILE * 2 * 32 * 4
    peaks = []
    for S in (384, 1024):
        k_cache, v_cache = (
            cache[0] for cache in format.empty(config, (1, S), torch.float32, "cpu")
        )
        lens = torch.tensor([S]), torch.tensor([1])
        q = torch.zeros(1, 4, 32)
        step = lambda: format.attend(0, q, k_cache, v_cache, *lens)  # noqa: B023, E731
        peaks.append(measure(step).peak_bytes)
    assert peaks[0] == peaks[1], f"expected the same for any text, got {peaks}"
    assert 2 * tile_bytes <= peaks[0] < 3 * tile_bytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [(8,), (8, 4), (2, 8), (2, 2)])
def test_bytes_are_those_of_the_storage(bits, dtype):
    format = QuantizedFormat(*bits)
    per_token = format.bytes_per_token(TINY, dtype.itemsize)
    # 2 layers, 2 KV heads of 8 numbers, each vector with two numbers beside it.
    k_bits, v_bits = bits[0], bits[-1]
    assert per_token == 4 * (8 * (k_bits + v_bits) // 8 + 4 * dtype.itemsize)

    contiguous = ContiguousKVCache(TINY, 2, 5, dtype=dtype, format=format)
    paged = PagedKVCache(TINY, 5, 2, dtype=dtype, format=format)
    for cache in (contiguous, paged):
        run_steps(begun(cache, 2), [[3, 1]])
        assert cache.used_bytes == 4 * per_token
        num_blocks = 10 if cache is contiguous else 3 * 2
        assert cache.reserved_bytes == num_blocks * per_token
        run_steps(cache, [[1, 4], [1, 0] if cache is contiguous else [0, 1]])
        storage = cache.k_cache.nbytes + cache.v_cache.nbytes
        assert cache.used_bytes == cache.reserved_bytes == storage == 10 * per_token
        assert cache.dtype == dtype and cache.k_cache.dtype == torch.uint8
