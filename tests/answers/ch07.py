import math

import numpy as np
import torch
import torch.nn.functional as F

from answers import right, wrong
from lib.quantized_kv_cache import check_bits, check_vectors

# quantize


@right("quantize")
def quantize_by_slices(x, bits):
    check_vectors(x, bits)
    smallest = x.min(dim=-1, keepdim=True).values
    largest = x.max(dim=-1, keepdim=True).values
    scale = (largest - smallest) / (2**bits - 1)
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    numbers = torch.round((x - smallest) / divisor).byte()
    n = 8 // bits
    codes = numbers[..., ::n].clone()
    for i in range(1, n):
        codes |= numbers[..., i::n] << (bits * i)
    return codes, scale, smallest


@right("quantize")
def quantize_number_by_number(x, bits):
    check_vectors(x, bits)
    rows = x.reshape(-1, x.shape[-1])
    codes, scales, zeros = [], [], []
    for row in rows.double().tolist():
        low, step = min(row), (max(row) - min(row)) / (2**bits - 1)
        numbers = [round((number - low) / step) if step else 0 for number in row]
        packed = []
        for start in range(0, len(row), 8 // bits):
            byte = 0
            for number in reversed(numbers[start : start + 8 // bits]):
                byte = byte * 2**bits + number
            packed.append(byte)
        codes.append(packed)
        scales.append([step])
        zeros.append([low])
    shape = x.shape[:-1]
    codes = torch.tensor(codes, dtype=torch.uint8).reshape(*shape, -1)
    scales, zeros = (torch.tensor(n, dtype=x.dtype) for n in (scales, zeros))
    return codes, scales.reshape(*shape, 1), zeros.reshape(*shape, 1)


@right("quantize")
def quantize_in_numpy(x, bits):
    check_vectors(x, bits)
    a = x.numpy()
    low, high = a.min(-1, keepdims=True), a.max(-1, keepdims=True)
    scale = (high - low) / a.dtype.type(2**bits - 1)
    numbers = np.floor((a - low) / np.where(scale == 0, 1, scale) + 0.5).astype(np.uint8)
    in_bits = np.unpackbits(numbers[..., None], axis=-1, bitorder="little")[..., :bits]
    codes = np.packbits(in_bits.reshape(*a.shape[:-1], -1), axis=-1, bitorder="little")
    return torch.tensor(codes), torch.tensor(scale), torch.tensor(low)


@right("quantize")
def quantize_by_powers_and_without_nan(x, bits):
    check_vectors(x, bits)
    low, high = x.amin(-1, True), x.amax(-1, True)
    numbers = ((x - low) * (2**bits - 1) / (high - low)).nan_to_num(0).round()
    grouped = numbers.unflatten(-1, (x.shape[-1] * bits // 8, 8 // bits)).double()
    powers = (2.0**bits) ** torch.arange(8 // bits, dtype=torch.float64)
    return (grouped @ powers).to(torch.uint8), (high - low) / (2**bits - 1), low


@right("quantize")
def quantize_from_a_quotient_each(x, bits):
    check_vectors(x, bits)
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    numbers = (x / scale - low / scale).round().clamp(0, 2**bits - 1).to(torch.int64)
    numbers = numbers.where(scale > 0, 0)  # NaN of equal numbers among them
    numbers = numbers.reshape(*x.shape[:-1], -1, 8 // bits)
    codes = torch.zeros(numbers.shape[:-1], dtype=torch.int64)
    for i, part in enumerate(numbers.unbind(-1)):
        codes += part * 2 ** (i * bits)
    return codes.to(torch.uint8), scale, low


@right("quantize")
def quantize_with_a_scale_of_at_least_very_little(x, bits):
    check_vectors(x, bits)
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    steps = (x - low) / scale.clamp(min=torch.finfo(x.dtype).tiny)
    parts = steps.round().to(torch.int32).unflatten(-1, (-1, 8 // bits)).unbind(-1)
    codes = sum(part << bits * i for i, part in enumerate(parts))
    return codes.to(torch.uint8), scale, low


@right("quantize")
def quantize_with_checks_of_its_own(x, bits):
    if bits not in (2, 4, 8) or x.shape[-1] % (8 // bits) or not x.isfinite().all():
        raise ValueError("no")
    return quantized(x, bits)


def quantized(
    x,
    bits,
    steps=None,
    dim=-1,
    rounded=torch.round,
    fill=1.0,
    reverse=False,
    far=False,
    packed=True,
    dtype=torch.uint8,
    clamp=None,
    zero=None,
    symmetric=None,
    eps=0.0,
    least=0.0,
    scale_of_equal=0.0,
):
    steps = 2**bits - 1 if steps is None else steps
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = (high - low) / steps
    if symmetric is not None:
        scale = x.abs().amax(dim, keepdim=True) / (2 ** (bits - 1) - symmetric)
    divisor = (scale + eps).clamp(min=least)
    divisor = divisor.masked_fill(divisor == 0, fill) if fill else divisor
    numbers = (x - low) / divisor
    if zero is not None:
        numbers = zero(x, divisor, low)
    numbers = rounded(numbers)
    if clamp is not None:
        numbers = numbers.clamp(*clamp)
    numbers = numbers.to(torch.int64)
    n = 8 // bits
    if far:
        grouped = numbers.unflatten(-1, (n, -1)).transpose(-1, -2)
    else:
        grouped = numbers.unflatten(-1, (-1, n))
    shifts = torch.arange(0, 8, bits)
    codes = (grouped << (shifts.flip(0) if reverse else shifts)).sum(-1)
    codes = (codes if packed else numbers).to(dtype)
    return codes, scale.masked_fill(scale == 0, scale_of_equal), low


@wrong("quantize", says="2^bits - 1 steps")
def quantize_to_a_step_too_many(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, steps=2**bits)


@wrong("quantize", says="2^bits - 1 steps")
def quantize_to_a_step_too_many_and_clamp(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, steps=2**bits, clamp=(0, 2**bits - 1))


@wrong("quantize", says="A code counts steps to the nearest: round")
def quantize_and_cut(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, rounded=torch.trunc)


@wrong("quantize", says="A code counts steps to the nearest: round")
def quantize_and_cut_up(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, rounded=torch.ceil)


@wrong("quantize", says="a scale and a zero point of its own")
def quantize_with_one_scale_for_all(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, dim=tuple(range(x.ndim)))


@wrong("quantize", says="a scale and a zero point of its own")
def quantize_with_a_scale_per_token(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, dim=(-2, -1) if x.ndim > 2 else -1)


@wrong("quantize", says="a scale and a zero point of its own")
def quantize_with_a_scale_per_channel(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, dim=0 if x.ndim > 1 else -1)


@wrong("quantize", says="lowest bits")
def quantize_with_the_first_in_the_highest_bits(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, reverse=True)


@wrong("quantize", says="Neighbours share a byte")
def quantize_with_halves_in_a_byte(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, far=True)


@wrong("quantize", says="Neighbours share a byte")
def quantize_with_halves_in_a_byte_the_first_highest(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, far=True, reverse=True)


@wrong("quantize", says="2 neighbours share a byte: pack them")
def quantize_not_packed(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, packed=False)


@wrong("quantize", says="A byte is a torch.uint8")
def quantize_to_int8(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, dtype=torch.int8)


@wrong("quantize", says="sum() makes of bytes int64")
def quantize_summed_to_int64(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, dtype=torch.int64)


@wrong("quantize", says="counted from the vector's smallest number")
def quantize_on_both_sides_of_zero(x, bits):
    check_vectors(x, bits)
    half = 2 ** (bits - 1)
    return quantized(x, bits, symmetric=1, zero=lambda x, scale, low: x / scale + half)


@wrong("quantize", says="counted from the vector's smallest number")
def quantize_on_both_sides_of_zero_with_signs(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, symmetric=1, zero=lambda x, scale, low: x / scale)


@wrong("quantize", says="counted from the vector's smallest number")
def quantize_from_zero(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, zero=lambda x, scale, low: x / scale)


@wrong("quantize", says="counted from the vector's smallest number")
def quantize_from_the_largest(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, zero=lambda x, s, low: (x.amax(-1, keepdim=True) - x) / s)


@wrong("quantize", says="not rounded to a step: subtract it, then divide")
def quantize_with_a_whole_zero_point(x, bits):
    check_vectors(x, bits)

    def from_a_code(x, scale, low):
        return (x / scale).round() - (low / scale).round()

    return quantized(x, bits, zero=from_a_code, clamp=(0, 2**bits - 1))


@wrong("quantize", says="The zero point is the vector's smallest number itself")
def quantize_giving_zero_as_a_code(x, bits):
    codes, scale, low = quantize_by_slices(x, bits)
    return codes, scale, (low / scale).nan_to_num(0).round()


@wrong("quantize", says="The zero point is the vector's smallest number itself")
def quantize_giving_zero_turned_around(x, bits):
    codes, scale, low = quantize_by_slices(x, bits)
    return codes, scale, -low


@wrong("quantize", says="In this order: codes, scale, zero")
def quantize_giving_zero_first(x, bits):
    codes, scale, low = quantize_by_slices(x, bits)
    return codes, low, scale


@wrong("quantize", says="The scale is the size of one step")
def quantize_giving_steps_per_number(x, bits):
    codes, scale, low = quantize_by_slices(x, bits)
    return codes, 1 / scale, low


@wrong("quantize", says="The scale is the size of one step")
def quantize_giving_the_range(x, bits):
    codes, scale, low = quantize_by_slices(x, bits)
    return codes, scale * (2**bits - 1), low


@wrong("quantize", says="One number per vector, beside its codes")
def quantize_without_keepdim(x, bits):
    codes, scale, low = quantize_by_slices(x, bits)
    return codes, scale.squeeze(-1), low.squeeze(-1)


@wrong("quantize", says="0 / 0 is NaN")
def quantize_dividing_by_zero(x, bits):
    check_vectors(x, bits)
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    shifts = torch.arange(0, 8, bits)
    numbers = ((x - low) / scale).round().to(torch.uint8).unflatten(-1, (-1, 8 // bits))
    return (numbers << shifts).sum(-1, dtype=torch.uint8), scale, low


@wrong("quantize", says="0 / 0 is NaN")
def quantize_dividing_by_zero_into_bytes(x, bits):
    check_vectors(x, bits)
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    numbers = torch.empty(x.shape, dtype=torch.uint8)
    numbers[:] = ((x - low) / scale).round().clamp(0, 2**bits - 1)
    numbers = numbers.unflatten(-1, (-1, 8 // bits)) << torch.arange(0, 8, bits)
    return numbers.sum(-1).byte(), scale, low


@wrong("quantize", says="has a scale of 0, exactly")
def quantize_giving_scale_1_to_equal_numbers(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, scale_of_equal=1)


@wrong("quantize", says="has a scale of 0, exactly")
def quantize_giving_a_tiny_scale_to_equal_numbers(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, scale_of_equal=1e-12)


@wrong("quantize", says="a scale may be very small")
def quantize_with_a_bit_more_than_the_scale(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, eps=1e-8)


@wrong("quantize", says="a scale may be very small")
def quantize_with_a_least_scale(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, least=1e-5)


@wrong("quantize", says="Keep the given line: it refuses this")
def quantize_looking_at_bits_alone(x, bits):
    check_bits(bits, x.shape[-1])
    return quantized(x, bits)


@wrong("quantize", says="Keep the given line: it refuses this")
def quantize_any_bits(x, bits):
    return quantized(x, bits)


@wrong("quantize", says="changed its inputs")
def quantize_in_place(x, bits):
    check_vectors(x, bits)
    low, high = (m.clone() for m in x.aminmax(dim=-1, keepdim=True))
    scale = (high - low) / (2**bits - 1)
    x -= low
    x /= scale.masked_fill(scale == 0, 1)
    codes, _, _ = quantized(x, bits)
    return codes, scale, low


@wrong("quantize", says="expected float64, got float32")
def quantize_with_scales_in_single_precision(x, bits):
    codes, scale, low = quantize_by_slices(x, bits)
    return codes, scale.float(), low.float()


@wrong("quantize", says="expected float64, got float16")
def quantize_with_scales_in_half_precision(x, bits):
    codes, scale, low = quantize_by_slices(x, bits)
    return codes, scale.half(), low.half()


@wrong("quantize", says="not the three tensors codes, scale and zero")
def quantize_giving_codes_alone(x, bits):
    return quantize_by_slices(x, bits)[0]


@wrong("quantize", says="unflatten, flatten and reshape take any")
def quantize_by_rows_of_a_view(x, bits):
    check_vectors(x, bits)
    codes, scale, low = quantized(x.view(-1, x.shape[-1]), bits)
    return tuple(part.view(*x.shape[:-1], -1) for part in (codes, scale, low))


@wrong("quantize")
def quantize_in_eight_bits_always(x, bits):
    check_vectors(x, bits)
    return quantized(x, 8)


@wrong("quantize", says="4 neighbours share a byte: pack them")
def quantize_two_neighbours_to_a_byte_always(x, bits):
    check_vectors(x, bits)
    codes, scale, low = quantized(x, bits, packed=False)
    if bits < 8:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return codes, scale, low


# Its numbers are wrong, for a cause that nobody has thought of.
@wrong("quantize")
def quantize_noisy(x, bits):
    codes, scale, low = quantize_by_slices(x, bits)
    return codes, scale * 1.01, low


# The same.
@wrong("quantize")
def quantize_every_code_one_higher(x, bits):
    codes, scale, low = quantize_by_slices(x, bits)
    return codes + 1, scale, low


# dequantize


@right("dequantize")
def dequantize_by_slices(codes, scale, zero, bits):
    n, last = 8 // bits, 2**bits - 1
    numbers = torch.empty(*codes.shape[:-1], codes.shape[-1] * n, dtype=scale.dtype)
    for i in range(n):
        numbers[..., i::n] = (codes >> (bits * i)) & last
    return zero + scale * numbers


@right("dequantize")
def dequantize_by_division(codes, scale, zero, bits):
    parts, rest = [], codes.long()
    for _ in range(8 // bits):
        parts.append(rest % 2**bits)
        rest = torch.div(rest, 2**bits, rounding_mode="floor")
    numbers = torch.stack(parts, dim=-1).reshape(*codes.shape[:-1], -1)
    return torch.addcmul(zero, numbers.to(scale.dtype), scale)


@right("dequantize")
def dequantize_by_a_table(codes, scale, zero, bits):
    each = range(8 // bits)
    table = [[byte >> bits * i & 2**bits - 1 for i in each] for byte in range(256)]
    numbers = torch.tensor(table, dtype=scale.dtype)[codes.int()]
    return numbers.flatten(-2, -1).mul(scale).add(zero)


@right("dequantize")
def dequantize_in_numpy(codes, scale, zero, bits):
    in_bits = np.unpackbits(codes.numpy()[..., None], axis=-1, bitorder="little")
    in_bits = in_bits.reshape(*codes.shape[:-1], -1, bits)
    numbers = torch.from_numpy(np.dot(in_bits, 2 ** np.arange(bits)))
    return numbers * scale + zero


def dequantized(
    codes, scale, zero, bits, reverse=False, far=False, mask=None, change=None, back=None
):
    shifts = torch.arange(0, 8, bits)
    shifts = shifts.flip(0) if reverse else shifts
    numbers = codes.long()[..., None] >> shifts
    numbers = numbers & (2**bits - 1 if mask is None else mask)
    numbers = numbers.transpose(-1, -2) if far else numbers
    numbers = numbers.flatten(-2)
    numbers = numbers if change is None else change(numbers)
    if back is not None:
        return back(numbers, scale, zero)
    return numbers * scale + zero


@wrong("dequantize", says="lowest bits")
def dequantize_highest_bits_first(codes, scale, zero, bits):
    return dequantized(codes, scale, zero, bits, reverse=True)


@wrong("dequantize", says="Neighbours share a byte")
def dequantize_to_halves(codes, scale, zero, bits):
    return dequantized(codes, scale, zero, bits, far=True)


@wrong("dequantize", says="Neighbours share a byte")
def dequantize_to_halves_highest_bits_first(codes, scale, zero, bits):
    parts = [codes >> shift & 2**bits - 1 for shift in range(8 - bits, -1, -bits)]
    return torch.cat(parts, dim=-1) * scale + zero


@wrong("dequantize", says="mask them out")
def dequantize_without_a_mask(codes, scale, zero, bits):
    return dequantized(codes, scale, zero, bits, mask=255)


@wrong("dequantize", says="is 2^bits - 1")
def dequantize_with_a_mask_of_one_bit(codes, scale, zero, bits):
    return dequantized(codes, scale, zero, bits, mask=2**bits)


@wrong("dequantize", says="no bit is a sign")
def dequantize_as_int8(codes, scale, zero, bits):
    half = 2 ** (bits - 1)
    return dequantized(
        codes, scale, zero, bits, change=lambda n: (n + half) % 2**bits - half
    )


@wrong("dequantize", says="not from the middle")
def dequantize_from_the_middle(codes, scale, zero, bits):
    half = 2 ** (bits - 1)
    return dequantized(codes, scale, zero, bits, change=lambda n: n - half)


@wrong("dequantize", says="not for the middle to the next")
def dequantize_to_the_middle_of_a_step(codes, scale, zero, bits):
    return dequantized(codes, scale, zero, bits, change=lambda n: n + 0.5)


@wrong("dequantize", says="not a count of steps")
def dequantize_with_zero_as_a_code(codes, scale, zero, bits):
    return dequantized(codes, scale, zero, bits, back=lambda n, s, z: (n - z) * s)


@wrong("dequantize", says="not a count of steps")
def dequantize_adding_zero_first(codes, scale, zero, bits):
    return dequantized(codes, scale, zero, bits, back=lambda n, s, z: (n + z) * s)


@wrong("dequantize", says="The zero point is added")
def dequantize_subtracting_zero(codes, scale, zero, bits):
    return dequantized(codes, scale, zero, bits, back=lambda n, s, z: n * s - z)


@wrong("dequantize", says="The zero point is missing")
def dequantize_without_zero(codes, scale, zero, bits):
    return dequantized(codes, scale, zero, bits, back=lambda n, s, z: n * s)


@wrong("dequantize", says="multiply it by their size")
def dequantize_without_scale(codes, scale, zero, bits):
    return dequantized(codes, scale, zero, bits, back=lambda n, s, z: n + z)


@wrong("dequantize", says="multiply it by their size")
def dequantize_dividing(codes, scale, zero, bits):
    return dequantized(codes, scale, zero, bits, back=lambda n, s, z: n / s + z)


@wrong("dequantize", says="of one step, not of the whole range")
def dequantize_with_a_share_of_the_scale(codes, scale, zero, bits):
    last = 2**bits - 1
    return dequantized(codes, scale, zero, bits, back=lambda n, s, z: n * (s / last) + z)


@wrong("dequantize", says="The scale is the factor")
def dequantize_with_scale_and_zero_turned_around(codes, scale, zero, bits):
    return dequantized(codes, zero, scale, bits)


@wrong("dequantize", says="A byte holds 2 numbers: take them apart")
def dequantize_whole_bytes(codes, scale, zero, bits):
    return codes * scale + zero


@wrong("dequantize", says="flatten them")
def dequantize_without_flatten(codes, scale, zero, bits):
    parts = [codes >> shift & 2**bits - 1 for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=-1) * scale.unsqueeze(-1) + zero.unsqueeze(-1)


@wrong("dequantize", says="expected float64, got float32")
def dequantize_in_single_precision(codes, scale, zero, bits):
    return dequantized(codes, scale, zero, bits).float()


@wrong("dequantize", says="expected float16, got float32")
def dequantize_in_single_precision_at_least(codes, scale, zero, bits):
    return dequantized(codes.float().int(), scale, zero, bits) * torch.ones(1).expand(1)


@wrong("dequantize", says="unflatten, flatten and reshape take any")
def dequantize_all_bytes_in_a_view(codes, scale, zero, bits):
    numbers = codes.view(-1, 1) >> torch.arange(0, 8, bits) & 2**bits - 1
    return numbers.view(*codes.shape[:-1], -1) * scale + zero


@wrong("dequantize", says="changed its inputs")
def dequantize_in_place(codes, scale, zero, bits):
    x = dequantized(codes, scale, zero, bits)
    codes >>= bits - 1
    return x


@wrong("dequantize")
def dequantize_two_to_a_byte_always(codes, scale, zero, bits):
    if bits == 8:
        return codes * scale + zero
    numbers = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    return numbers * scale + zero


# Its numbers are wrong, for a cause that nobody has thought of.
@wrong("dequantize")
def dequantize_noisy(codes, scale, zero, bits):
    return dequantized(codes, scale * 1.01, zero, bits)


# attend_latent


def future(T, S):
    return torch.arange(S) > torch.arange(S - T, S)[:, None]  # (T, S)


@right("attend_latent")
def attend_latent_head_by_head(q, k_codes, v_codes, k_basis, v_basis):
    T, H, D = q.shape
    group_size = H // k_basis.shape[1]
    is_future, outs = future(T, len(k_codes)), []
    for h in range(H):
        g = h // group_size
        asked = q[:, h] @ k_basis[:, g].T  # (T, R)
        scores = asked @ k_codes.T / math.sqrt(D)
        weights = scores.masked_fill(is_future, -math.inf).softmax(-1)
        outs.append(weights @ v_codes @ v_basis[:, g])
    return torch.stack(outs, dim=1)


@right("attend_latent")
def attend_latent_with_a_basis_for_each_query_head(q, k_codes, v_codes, k_basis, v_basis):
    (T, H, D), S = q.shape, len(k_codes)
    k_basis, v_basis = (
        b.repeat_interleave(H // b.shape[1], dim=1) for b in (k_basis, v_basis)
    )
    asked = torch.einsum("thd,rhd->htr", q, k_basis)
    scores = torch.einsum("htr,sr->hts", asked, k_codes) * D**-0.5
    scores = scores + torch.zeros(T, S).masked_fill(future(T, S), -math.inf)
    weights = scores.softmax(dim=-1)
    return torch.einsum("htw,whd->thd", weights @ v_codes, v_basis)


@right("attend_latent")
def attend_latent_by_torchs_attention(q, k_codes, v_codes, k_basis, v_basis):
    (T, H, D), G = q.shape, k_basis.shape[1]
    asked = torch.einsum("tgmd,rgd->tgmr", q.unflatten(1, (G, H // G)), k_basis)
    asked = asked.flatten(1, 2).transpose(0, 1)  # (H, T, R)
    is_seen = ~future(T, len(k_codes))
    sums = F.scaled_dot_product_attention(
        asked, k_codes[None], v_codes[None], attn_mask=is_seen, scale=D**-0.5
    )
    sums = sums.transpose(0, 1).unflatten(1, (G, H // G))
    return torch.einsum("tgmw,wgd->tgmd", sums, v_basis).flatten(1, 2)


@right("attend_latent")
def attend_latent_query_by_query(q, k_codes, v_codes, k_basis, v_basis):
    (T, H, D), S, out = q.shape, len(k_codes), torch.zeros_like(q)
    for t in range(T):
        seen = S - T + t + 1
        for h in range(H):
            g = h * k_basis.shape[1] // H
            asked = (k_basis[:, g] * q[t, h]).sum(dim=-1)
            scores = (k_codes[:seen] * asked).sum(dim=-1) / D**0.5
            weights = torch.exp(scores - scores.max())
            weights /= weights.sum()
            code = (weights[:, None] * v_codes[:seen]).sum(dim=0)
            out[t, h] = code @ v_basis[:, g]
    return out


@right("attend_latent")
def attend_latent_token_by_token(q, k_codes, v_codes, k_basis, v_basis):
    (T, H, D), S = q.shape, len(k_codes)
    q = q.unflatten(1, (k_basis.shape[1], -1)) / D**0.5
    asked = torch.einsum("tgmd,rgd->tgmr", q, k_basis).flatten(1, 2)
    scores = torch.stack([asked @ code for code in k_codes], dim=-1)
    weights = scores.masked_fill(future(T, S)[:, None], -math.inf).softmax(-1)
    sums = 0
    for s in range(S):
        sums = sums + weights[..., s : s + 1] * v_codes[s]
    sums = sums.view(T, k_basis.shape[1], -1, v_codes.shape[1])
    return torch.einsum("tgmw,wgd->tgmd", sums, v_basis).reshape(T, H, D)


def latent(
    q,
    k_codes,
    v_codes,
    k_basis,
    v_basis,
    scale=None,
    hidden=None,
    fill=-math.inf,
    k_heads=None,
    v_heads=None,
    weigh=None,
    back=True,
):
    (T, H, D), S, G = q.shape, len(k_codes), k_basis.shape[1]
    neighbours = torch.arange(H) // (H // G)
    k_basis = k_basis[:, neighbours if k_heads is None else k_heads]
    v_basis = v_basis[:, neighbours if v_heads is None else v_heads]
    asked = torch.einsum("thd,rhd->thr", q, k_basis)
    scores = asked @ k_codes.T * (D**-0.5 if scale is None else scale)
    is_future = future(T, S) if hidden is None else hidden
    scores = scores.masked_fill(is_future[:, None], fill)
    weights = scores.softmax(-1) if weigh is None else weigh(scores)
    sums = weights @ v_codes
    return torch.einsum("thw,whd->thd", sums, v_basis) if back else sums


@wrong("attend_latent", says="room for keys or values")
def attend_latent_making_keys_and_values(q, k_codes, v_codes, k_basis, v_basis):
    T, H, D = q.shape
    keys = torch.einsum("sr,rgd->sgd", k_codes, k_basis)
    values = torch.einsum("sw,wgd->sgd", v_codes, v_basis)
    keys, values = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (keys, values))
    scores = torch.einsum("thd,shd->ths", q, keys) / D**0.5
    scores = scores.masked_fill(future(T, len(keys))[:, None], -math.inf)
    return torch.einsum("ths,shd->thd", scores.softmax(-1), values)


@wrong("attend_latent", says="room for keys or values")
def attend_latent_making_values(q, k_codes, v_codes, k_basis, v_basis):
    D, G = q.shape[2], k_basis.shape[1]
    asked = torch.einsum("tgmd,rgd->tgmr", q.unflatten(1, (G, -1)), k_basis)
    scores = asked @ k_codes.T / D**0.5  # (T, G, H / G, S)
    is_future = future(len(q), len(k_codes))[:, None, None]
    weights = scores.masked_fill(is_future, -math.inf).softmax(-1)
    values = (v_codes @ v_basis.flatten(1)).unflatten(1, (G, D))
    return torch.einsum("tgms,sgd->tgmd", weights, values).flatten(1, 2)


@wrong("attend_latent", says="room for keys or values")
def attend_latent_making_keys_of_one_head(q, k_codes, v_codes, k_basis, v_basis):
    (T, H, D), outs = q.shape, []
    for h in range(H):
        g = h // (H // k_basis.shape[1])
        scores = q[:, h] @ (k_codes @ k_basis[:, g]).T / D**0.5
        scores = scores.masked_fill(future(T, len(k_codes)), -math.inf)
        outs.append(scores.softmax(-1) @ v_codes @ v_basis[:, g])
    return torch.stack(outs, dim=1)


@wrong("attend_latent", says="Keys or values are made, if not all at a time")
def attend_latent_making_one_key_at_a_time(q, k_codes, v_codes, k_basis, v_basis):
    (T, H, D), G = q.shape, k_basis.shape[1]
    grouped, scores = q.unflatten(1, (G, H // G)), []
    for code in k_codes:
        key = torch.einsum("r,rgd->gd", code, k_basis)
        scores.append(torch.einsum("tgmd,gd->tgm", grouped, key).flatten(1))
    scores = torch.stack(scores, dim=-1) / D**0.5
    is_future = future(T, len(k_codes))[:, None]
    sums = scores.masked_fill(is_future, -math.inf).softmax(-1) @ v_codes
    sums = sums.unflatten(1, (G, H // G))
    return torch.einsum("tgmw,wgd->tgmd", sums, v_basis).flatten(1, 2)


@wrong("attend_latent", says="Keys or values are made, if not all at a time")
def attend_latent_in_tiles_of_16_keys(q, k_codes, v_codes, k_basis, v_basis):
    (T, H, D), G = q.shape, k_basis.shape[1]
    neighbours, scores = torch.arange(H) // (H // G), []
    for codes in k_codes.split(16):
        keys = torch.einsum("sr,rgd->sgd", codes, k_basis)
        scores.append(torch.einsum("thd,shd->ths", q, keys[:, neighbours]))
    scores = torch.cat(scores, dim=-1) / D**0.5
    is_future = future(T, len(k_codes))[:, None]
    sums = scores.masked_fill(is_future, -math.inf).softmax(-1) @ v_codes
    return torch.einsum("thw,whd->thd", sums, v_basis[:, neighbours])


@wrong("attend_latent", says="divide by the root of D")
def attend_latent_by_the_root_of_the_rank(q, k_codes, v_codes, k_basis, v_basis):
    scale = k_codes.shape[1] ** -0.5
    return latent(q, k_codes, v_codes, k_basis, v_basis, scale=scale)


@wrong("attend_latent", says="divide by the root of D")
def attend_latent_not_scaled(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, k_codes, v_codes, k_basis, v_basis, scale=1)


@wrong("attend_latent", says="divide by the root of D")
def attend_latent_by_d(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, k_codes, v_codes, k_basis, v_basis, scale=1 / q.shape[2])


@wrong("attend_latent", says="neighbours share")
def attend_latent_with_heads_by_turns(q, k_codes, v_codes, k_basis, v_basis):
    turns = torch.arange(q.shape[1]) % k_basis.shape[1]
    return latent(q, k_codes, v_codes, k_basis, v_basis, k_heads=turns, v_heads=turns)


@wrong("attend_latent", says="neighbours share")
def attend_latent_with_values_by_turns(q, k_codes, v_codes, k_basis, v_basis):
    turns = torch.arange(q.shape[1]) % k_basis.shape[1]
    return latent(q, k_codes, v_codes, k_basis, v_basis, v_heads=turns)


@wrong("attend_latent", says="neighbours share")
def attend_latent_grouped_the_other_way_round(q, k_codes, v_codes, k_basis, v_basis):
    (T, H, D), S, G = q.shape, len(k_codes), k_basis.shape[1]
    grouped = (q / D**0.5).view(T, H // G, G, D)
    asked = torch.einsum("tmgd,rgd->tmgr", grouped, k_basis)
    scores = asked.flatten(1, 2) @ k_codes.T
    weights = scores.masked_fill(future(T, S)[:, None], -math.inf).softmax(-1)
    sums = (weights @ v_codes).view(T, H // G, G, -1)
    return torch.einsum("tmgw,wgd->tmgd", sums, v_basis).flatten(1, 2)


@wrong("attend_latent", says="neighbours share")
def attend_latent_with_the_first_kv_head_alone(q, k_codes, v_codes, k_basis, v_basis):
    first = torch.zeros(q.shape[1], dtype=torch.int64)
    return latent(q, k_codes, v_codes, k_basis, v_basis, k_heads=first, v_heads=first)


@wrong("attend_latent", says="Keys have k_basis, values have v_basis")
def attend_latent_with_the_bases_turned_around(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, k_codes, v_codes, v_basis, k_basis)


@wrong("attend_latent", says="Keys have k_basis, values have v_basis")
def attend_latent_with_one_basis(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, k_codes, v_codes, k_basis, k_basis)


@wrong("attend_latent", says="Scores are of k_codes, and sums are of v_codes")
def attend_latent_summing_keys_codes(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, k_codes, k_codes, k_basis, v_basis)


@wrong("attend_latent", says="Scores are of k_codes, and sums are of v_codes")
def attend_latent_comparing_with_values_codes(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, v_codes, v_codes, k_basis, v_basis)


@wrong("attend_latent", says="must not see tokens of later positions")
def attend_latent_without_a_mask(q, k_codes, v_codes, k_basis, v_basis):
    hidden = torch.zeros(len(q), len(k_codes), dtype=torch.bool)
    return latent(q, k_codes, v_codes, k_basis, v_basis, hidden=hidden)


@wrong("attend_latent", says="must not see tokens of later positions")
def attend_latent_that_sees_the_next(q, k_codes, v_codes, k_basis, v_basis):
    T, S = len(q), len(k_codes)
    hidden = torch.ones(T, S, dtype=torch.bool).triu(S - T + 2)
    return latent(q, k_codes, v_codes, k_basis, v_basis, hidden=hidden)


@wrong("attend_latent", says="at position S - T + t")
def attend_latent_as_if_the_first_were_new(q, k_codes, v_codes, k_basis, v_basis):
    hidden = torch.ones(len(q), len(k_codes), dtype=torch.bool).triu(1)
    return latent(q, k_codes, v_codes, k_basis, v_basis, hidden=hidden)


@wrong("attend_latent", says="all before it, and itself")
def attend_latent_that_does_not_see_itself(q, k_codes, v_codes, k_basis, v_basis):
    T, S = len(q), len(k_codes)
    hidden = torch.ones(T, S, dtype=torch.bool).triu(S - T)
    return latent(q, k_codes, v_codes, k_basis, v_basis, hidden=hidden)


@wrong("attend_latent", says="set its score to -∞")
def attend_latent_with_masked_scores_of_minus_100(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, k_codes, v_codes, k_basis, v_basis, fill=-100)


@wrong("attend_latent", says="softmax along S")
def attend_latent_with_softmax_over_heads(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, k_codes, v_codes, k_basis, v_basis, weigh=lambda s: s.softmax(dim=1))


@wrong("attend_latent", says="softmax along S")
def attend_latent_with_softmax_over_queries(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, k_codes, v_codes, k_basis, v_basis, weigh=lambda s: s.softmax(dim=0))


@wrong("attend_latent", says="Scores become weights by softmax")
def attend_latent_without_softmax(q, k_codes, v_codes, k_basis, v_basis):
    return latent(
        q, k_codes, v_codes, k_basis, v_basis, weigh=lambda s: s.nan_to_num(neginf=0)
    )


@wrong("attend_latent", says="Those are sums of codes")
def attend_latent_not_brought_back(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, k_codes, v_codes, k_basis, v_basis, back=False)


@wrong("attend_latent", says="Put tokens before heads again")
def attend_latent_heads_first(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, k_codes, v_codes, k_basis, v_basis).transpose(0, 1)


@wrong("attend_latent", says="Tokens and heads are mixed up")
def attend_latent_with_queries_viewed_as_heads(q, k_codes, v_codes, k_basis, v_basis):
    (T, H, D), S, G = q.shape, len(k_codes), k_basis.shape[1]
    grouped = (q / D**0.5).reshape(G, H // G * T, D)
    asked = torch.einsum("gnd,rgd->gnr", grouped, k_basis)
    scores = (asked @ k_codes.T).view(G, H // G, T, S)
    weights = scores.masked_fill(future(T, S), -math.inf).softmax(-1)
    sums = (weights @ v_codes).flatten(1, 2)
    return torch.einsum("gnw,wgd->gnd", sums, v_basis).reshape(T, H, D)


@wrong("attend_latent", says="Tokens and heads are mixed up")
def attend_latent_heads_first_as_tokens(q, k_codes, v_codes, k_basis, v_basis):
    out = latent(q, k_codes, v_codes, k_basis, v_basis)
    return out.transpose(0, 1).reshape(q.shape)


@wrong("attend_latent", says="Look at the shapes")
def attend_latent_with_codes_not_transposed(q, k_codes, v_codes, k_basis, v_basis):
    (T, H, D), S, G = q.shape, len(k_codes), k_basis.shape[1]
    grouped = (q / D**0.5).view(T, G, H // G, D)
    asked = torch.einsum("tgmd,rgd->tgmr", grouped, k_basis).flatten(1, 2)
    scores = asked @ k_codes
    weights = scores.masked_fill(future(T, S)[:, None], -math.inf).softmax(-1)
    sums = (weights @ v_codes).view(T, G, H // G, -1)
    return torch.einsum("tgmw,wgd->tgmd", sums, v_basis).flatten(1, 2)


@wrong("attend_latent", says="changed its inputs")
def attend_latent_scaling_in_place(q, k_codes, v_codes, k_basis, v_basis):
    out = latent(q, k_codes, v_codes, k_basis, v_basis)
    q /= 2
    return out


@wrong("attend_latent", says="expected float64, got float32")
def attend_latent_in_single_precision(q, k_codes, v_codes, k_basis, v_basis):
    tensors = (x.float() for x in (q, k_codes, v_codes, k_basis, v_basis))
    return latent(*tensors)


# Its numbers are wrong, for a cause that nobody has thought of.
@wrong("attend_latent")
def attend_latent_noisy(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, k_codes, v_codes, k_basis, v_basis) * 1.01


# The same.
@wrong("attend_latent")
def attend_latent_with_an_orthonormal_basis(q, k_codes, v_codes, k_basis, v_basis):
    v_basis = torch.linalg.qr(v_basis.flatten(1).T).Q.T.reshape(-1, *v_basis.shape[1:])
    return latent(q, k_codes, v_codes[:, : len(v_basis)], k_basis, v_basis)
