"""Chapter 7: what its exercises are tried on."""

import numpy as np

from lib.course.cases.ch01 import _reproduced
from lib.course.cases.ch03 import _is_near
from lib.course.exercises import Case, Exercise
from lib.course.shipped import reference

# quantize

NAN = 173  # as an integer, in lib/course/drivers/ch07.py


def quantize_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, bits, shape in (
        ("three numbers, 8 bits", 8, (3,)),
        ("six numbers, 8 bits", 8, (6,)),
        ("a first number that is the largest", 8, (3,)),
        ("numbers below 0, 8 bits", 8, (6,)),
        ("numbers far from 0", 8, (8,)),
        ("numbers of very small size", 8, (6,)),
        ("one number far from all others", 8, (9,)),
        ("a single number", 8, (1,)),
        ("a vector of equal numbers", 8, (5,)),
        ("four numbers, 4 bits", 4, (4,)),
        ("ten numbers, 4 bits", 4, (10,)),
        ("a vector of zeros, 4 bits", 4, (4,)),
        ("four numbers, 2 bits", 2, (4,)),
        ("twelve numbers, 2 bits", 2, (12,)),
        ("two vectors, one of them a hundred times larger", 8, (2, 6)),
        ("a vector of equal numbers between two others", 4, (3, 6)),
        ("three tokens, two heads", 4, (3, 2, 8)),
        ("as many tokens as heads and numbers", 2, (4, 4, 4)),
        ("three leading dimensions", 2, (2, 3, 2, 8)),
        ("single precision", 8, (3, 2, 16)),
        ("half precision, 4 bits", 4, (2, 2, 8)),
        ("neighbours that do not lie side by side in memory", 4, (2, 3, 8)),
        ("random sizes", 8, tuple(rng.integers(2, 9, size=3).tolist())),
        ("3 bits", 3, (8,)),
        ("six numbers, 2 bits", 2, (6,)),
        ("an infinite number", 8, (2, 4)),
        ("a NaN in the second vector", 4, (2, 4)),
        ("4 bits, 20 tokens, three heads", 4, (20, 3, 16)),
    ):
        x = _between_steps(rng, shape, bits)
        if name.startswith("a first"):
            x = -np.sort(-x)
        if "below 0" in name:
            x -= x.max() + rng.uniform(0.1, 1)
        if "far from 0" in name:
            x += 1e4 * rng.uniform(1, 2)
        if "very small" in name:
            x *= 1e-7
        if "far from all others" in name:
            x = _with_an_outlier(rng, x.size)
        if "equal" in name:
            x[1 if x.ndim > 1 else ...] = rng.normal()
        if "zeros" in name:
            x[:] = 0
        if "hundred" in name:
            x[0] *= 100
        if "infinite" in name:
            x[0, 2] = -np.inf
        if "NaN" in name:
            x[1, 3] = np.nan
        dtype = {"half": np.float16, "sing": np.float32}.get(name[:4], np.float64)
        inputs = {"x": x.astype(dtype), "bits": bits}
        if "side by side" in name:
            inputs["is_turned"] = True
        cases.append(Case(name, inputs))
    return cases


def _between_steps(rng, shape: tuple[int, ...], bits: int) -> np.ndarray:
    """Random vectors of which no number is nearly as near to one step as to another, so
    that no rounding decides.

    Some lie below their nearest step, some above, some farther from it than others. So it
    shows who cuts where we round, and who rounds the zero point: that is a quarter of a
    step away from where the steps from 0 would be.
    """
    (*leading, D), last = shape, 2**bits - 1
    near, far = rng.uniform(0.1, 0.2, shape), rng.uniform(0.3, 0.4, shape)
    kinds = np.choose(np.arange(D) % 4, [far, -near, -far, near])
    places = rng.integers(1, last, size=shape) + kinds
    places[..., -1:], places[..., :1] = last, 0  # a single number has one step
    places = rng.permuted(np.roll(places, -1, axis=-1), axis=-1)
    scale = rng.uniform(1, 4, (*leading, 1)) / last
    quarter = rng.choice([-1, 1], size=scale.shape) * rng.uniform(0.22, 0.28, scale.shape)
    steps_to_low = np.round(rng.normal(size=scale.shape) / scale) + quarter
    return scale * (steps_to_low + places)


def _with_an_outlier(rng, D: int) -> np.ndarray:
    """One number so large that all others have few steps left."""
    places = rng.permutation(np.append(rng.integers(1, 6, D - 2) + 0.3, [0, 255.0]))
    return rng.normal() + 0.2 * places


HALF_A_BYTE = "The first of the neighbours that share a byte has its lowest bits"
NEIGHBOURS = "Neighbours share a byte, numbers 0 and 1, then 2 and 3, not two far apart"
OF_EACH_VECTOR = "Each vector of D numbers has a scale and a zero point of its own"
STEPS = "From the smallest to the largest lead 2^bits - 1 steps: one less than codes"
NEAREST = "A code counts steps to the nearest: round"
FROM_THE_SMALLEST = "Steps are counted from the vector's smallest number"
ITS_ZERO = (
    "The zero point is the vector's smallest number as it is, not rounded to a step: "
    "subtract it, then divide"
)
# What may go wrong: a slip of `_codes` -> what to say of it.
QUANTIZE_SLIPS = {
    "in reverse": HALF_A_BYTE,
    "far apart": NEIGHBOURS,
    "far apart, in reverse": NEIGHBOURS,
    "2^bits steps": STEPS,
    "2^bits steps, cut": STEPS,
    "cut": NEAREST,
    "cut up": NEAREST,
    "one scale": OF_EACH_VECTOR,
    "over heads": OF_EACH_VECTOR,
    "over tokens": OF_EACH_VECTOR,
    "over all tokens": OF_EACH_VECTOR,
    "both sides of 0": FROM_THE_SMALLEST,
    "both sides of 0, signed": FROM_THE_SMALLEST,
    "both sides of 0, and one more": FROM_THE_SMALLEST,
    "from 0": FROM_THE_SMALLEST,
    "from the middle": FROM_THE_SMALLEST,
    "from the largest": FROM_THE_SMALLEST,
    "a whole zero point": ITS_ZERO,
}
EQUAL = (
    "A vector of equal numbers has a scale of 0, exactly: divide by another number "
    "there, and give 0"
)


def quantize_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    if expected["raised"] != "nothing":
        return "Keep the given line: it refuses this"
    x, bits = inputs["x"], inputs["bits"]
    ours, theirs = expected["codes"], got["codes"]
    if not isinstance(theirs, np.ndarray):
        return None
    if theirs.shape != ours.shape:
        is_long = theirs.ndim == ours.ndim and theirs.size > ours.size
        return f"{8 // bits} neighbours share a byte: pack them" if is_long else None
    if theirs.dtype != np.uint8:
        return (
            "A byte is a torch.uint8, 0 to 255; sum() makes of bytes int64, unless a "
            "dtype is given"
        )
    if np.array_equal(theirs, ours):
        return _why_other_numbers(x, bits, expected, got)
    is_equal = x.min(axis=-1) == x.max(axis=-1)
    if is_equal.any() and np.array_equal(theirs[~is_equal], ours[~is_equal]):
        is_nan = np.array_equal(theirs[is_equal], _pack(NAN + 0 * x[is_equal], bits))
        words = "0 / 0 is NaN, and which integer that becomes nobody can say"
        return f"{words}. {EQUAL}" if is_nan else None
    scale = expected["scale"]
    if scale.max() < 1e-8 and _are_codes_of_a_larger_scale(x, bits, scale, theirs):
        return "Only a scale of 0 needs another divisor: a scale may be very small"
    found: dict[str, bool] = {}
    for slip, words in QUANTIZE_SLIPS.items():
        other = _codes(x, bits, slip)
        is_it = np.array_equal(other, theirs) and not np.array_equal(other, ours)
        if "2^bits" in slip and is_it:
            is_it = _is_near(got["scale"], scale * (2**bits - 1) / 2**bits)
        found[words] = found.get(words, False) or is_it
    is_other = not _is_near(got["scale"], scale)
    for words in (NEAREST, ITS_ZERO) if is_other else ():  # of which the scale is right
        found[words] = False
    return _reproduced(found)


def _why_other_numbers(x: np.ndarray, bits: int, expected: dict, got: dict) -> str | None:
    """Of an answer whose codes are right."""
    (scale, zero), theirs = (
        [both[name] for name in ("scale", "zero")] for both in (expected, got)
    )
    if not all(isinstance(one, np.ndarray) for one in theirs):
        return None
    if any(one.shape == scale.shape[:-1] for one in theirs):
        return "One number per vector, beside its codes: (..., 1), as keepdim=True keeps"
    if any(one.shape != scale.shape for one in theirs):
        return None
    if got["vectors_of_scale_0"] < expected["vectors_of_scale_0"]:
        return EQUAL
    if not got["x_is_as_before"]:
        return "x is the caller's: leave it as it is"
    low, high = (f(x, axis=-1, keepdims=True) for f in (np.min, np.max))
    with np.errstate(all="ignore"):
        wrong = {
            STEPS: [((high - low) / 2**bits, zero)],
            "In this order: codes, scale, zero": [(zero, scale)],
            "The scale is the size of one step": [(1 / scale, zero), (high - low, zero)],
            "The zero point is the vector's smallest number itself": [
                (scale, other)
                for other in (
                    -low,
                    high,
                    (low + high) / 2,
                    low / scale,
                    -low / scale,
                    np.round(low / scale),
                    np.round(-low / scale),
                    0 * low,
                )
            ],
        }
        return _reproduced(
            {
                words: any(all(map(_is_near, theirs, other)) for other in others)
                for words, others in wrong.items()
            }
        )


@reference
def _are_codes_of_a_larger_scale(x, bits, scale, codes) -> bool:
    """As of whoever adds a small number to each scale, or takes that for the least."""
    steps = x - x.min(axis=-1, keepdims=True)
    return any(
        np.array_equal(codes, _pack(np.round(steps / larger), bits))
        for small in (1e-9, 1e-8, 1.1920928955078125e-07, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
        for larger in (scale + small, np.maximum(scale, small))
    )


@reference
def _codes(x: np.ndarray, bits: int, slip: str) -> np.ndarray:
    """What comes of x by one of QUANTIZE_SLIPS."""
    last, axes = 2**bits - 1, tuple(range(x.ndim))
    over = {
        "one scale": axes,
        "over heads": axes[-2:],
        "over tokens": axes[:1],
        "over all tokens": axes[:-1],
    }.get(slip, -1)
    x = x.astype(np.float64)
    low, high = x.min(axis=over, keepdims=True), x.max(axis=over, keepdims=True)
    most = np.abs(x).max(axis=-1, keepdims=True)
    with np.errstate(all="ignore"):
        scale = (high - low) / (2**bits if "2^bits" in slip else last)
        if "both sides" in slip:
            scale = most / (2 ** (bits - 1) - ("one more" not in slip))
        scale = np.where(scale == 0, 1, scale)
        steps = (x - low) / scale
        if slip in ("from 0", "both sides of 0, signed"):
            steps = x / scale
        elif "both sides" in slip:
            steps = x / scale + 2 ** (bits - 1)
        elif slip == "from the middle":
            steps = (x - (low + high) / 2) / scale
        elif slip == "from the largest":
            steps = (high - x) / scale
        elif slip == "a whole zero point":
            steps = np.round(x / scale) - np.round(low / scale)
        rounded = {"cut": np.floor, "cut up": np.ceil}.get(slip, np.round)(steps)
    if slip.endswith("steps, cut") or slip == "a whole zero point":
        rounded = np.clip(rounded, 0, last)
    return _pack(rounded, bits, slip)


@reference
def _pack(numbers: np.ndarray, bits: int, slip: str = "") -> np.ndarray:
    """Whole numbers (..., D) as bytes (..., D * bits / 8)."""
    per_byte, numbers = 8 // bits, numbers.astype(np.int64)
    if "far apart" in slip:
        grouped = numbers.reshape(*numbers.shape[:-1], per_byte, -1).swapaxes(-1, -2)
    else:
        grouped = numbers.reshape(*numbers.shape[:-1], -1, per_byte)
    shifts = bits * np.arange(per_byte)
    if "in reverse" in slip:
        shifts = shifts[::-1]
    return ((grouped << shifts).sum(axis=-1) & 255).astype(np.uint8)


# dequantize


def dequantize_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, bits, shape in (
        ("one byte, 8 bits", 8, (1,)),
        ("three bytes, 8 bits", 8, (3,)),
        ("two bytes, 4 bits", 4, (2,)),
        ("two bytes, 2 bits", 2, (2,)),
        ("five bytes, 2 bits", 2, (5,)),
        ("a byte of 255, 4 bits", 4, (1,)),
        ("a scale of 0", 4, (2,)),
        ("two vectors", 8, (2, 3)),
        ("three tokens, two heads", 4, (3, 2, 4)),
        ("as many tokens as heads and bytes", 2, (3, 3, 3)),
        ("three leading dimensions", 2, (2, 3, 2, 2)),
        ("single precision", 8, (3, 2, 16)),
        ("half precision", 4, (2, 2, 4)),
        ("rows of bytes of which not all are codes", 4, (2, 3, 4)),
        ("every byte, 8 bits", 8, (256,)),
        ("every byte, 4 bits", 4, (256,)),
        ("every byte, 2 bits", 2, (256,)),
        ("random sizes", 2, tuple(rng.integers(2, 9, size=3).tolist())),
    ):
        dtype = {"half": np.float16, "sing": np.float32}.get(name[:4], np.float64)
        codes = rng.integers(0, 256, size=shape, dtype=np.uint8)
        if name.startswith("two bytes"):  # other numbers in all of their parts
            codes[:] = _bytes_without_a_twin(rng)
        if "255" in name:
            codes[:] = 255
        if "every byte" in name:
            codes = rng.permutation(256).astype(np.uint8)
        of_each = *shape[:-1], 1
        scale = rng.uniform(0.1, 2, size=of_each)
        if "scale of 0" in name:
            scale[:] = 0
        inputs = {
            "codes": codes,
            "scale": scale.astype(dtype),
            "zero": rng.normal(size=of_each).astype(dtype) - dtype(2),
            "bits": bits,
        }
        if "not all" in name:
            inputs["num_behind"] = 2
        cases.append(Case(name, inputs))
    return cases


def _bytes_without_a_twin(rng) -> list[int]:
    """Two bytes of which all four halves differ, and in each all four quarters."""
    while True:
        pair = rng.choice([0x1B, 0x1E, 0x27, 0x2D, 0x36, 0x39, 0x4B, 0x4E], size=2)
        pair = [int(byte) for byte in pair]
        if len({half for byte in pair for half in (byte & 15, byte >> 4)}) == 4:
            return pair


# What may go wrong: a slip of `_dequantized` -> what to say of it.
DEQUANTIZE_SLIPS = {
    "in reverse": HALF_A_BYTE,
    "far apart": NEIGHBOURS,
    "far apart, in reverse": NEIGHBOURS,
    "all higher bits": "A shift leaves the bits of its neighbours above: mask them out",
    "a mask of one bit": "A mask of `bits` ones is 2^bits - 1",
    "signed": "Codes count from 0 to 2^bits - 1: no bit is a sign",
    "from the middle": "Codes count from the smallest number, not from the middle",
    "half a step more": "A code stands for its step, not for the middle to the next",
    "zero in steps": "Multiply by the scale, then add the zero point: it is a number, "
    "not a count of steps",
    "minus zero in steps": "Multiply by the scale, then add the zero point: it is a "
    "number, not a count of steps",
    "minus zero": "The zero point is added: it is what was subtracted",
    "no zero": "The zero point is missing: it is what was subtracted",
    "no scale": "A code counts steps: multiply it by their size",
    "divided": "A code counts steps: multiply it by their size",
    "a share of the scale": "The scale is the size of one step, not of the whole range",
    "turned around": "The scale is the factor, the zero point is added",
}


def dequantize_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    ours, theirs = expected["x"], got["x"]
    if not isinstance(theirs, np.ndarray):
        return None
    behind = inputs.get("num_behind", 0)
    codes = inputs["codes"][..., : inputs["codes"].shape[-1] - behind]
    if theirs.shape != ours.shape:
        if theirs.shape == codes.shape:
            return f"A byte holds {8 // inputs['bits']} numbers: take them apart"
        is_split = theirs.ndim == ours.ndim + 1 and theirs.size == ours.size
        return "What shared a byte are neighbours: flatten them" if is_split else None
    found: dict[str, bool] = {}
    for slip, words in DEQUANTIZE_SLIPS.items():
        other = _dequantized(
            codes, inputs["scale"], inputs["zero"], inputs["bits"], slip
        ).astype(ours.dtype)
        is_it = _is_near(theirs, other) and not _is_near(other, ours)
        found[words] = found.get(words, False) or is_it
    return _reproduced(found)


@reference
def _dequantized(codes, scale, zero, bits: int, slip: str) -> np.ndarray:
    """The vectors that come of it by one of DEQUANTIZE_SLIPS."""
    shifts, last = np.arange(0, 8, bits), 2**bits - 1
    if "in reverse" in slip:
        shifts = shifts[::-1]
    numbers = codes[..., None].astype(np.int64) >> shifts
    if slip == "a mask of one bit":
        numbers = numbers & 2**bits
    elif slip != "all higher bits":
        numbers = numbers & last
    if "far apart" in slip:
        numbers = numbers.swapaxes(-1, -2)
    numbers = numbers.reshape(*codes.shape[:-1], -1).astype(np.float64)
    scale, zero = scale.astype(np.float64), zero.astype(np.float64)
    if slip == "signed":
        numbers = np.where(numbers > last // 2, numbers - 2**bits, numbers)
    if slip == "from the middle":
        numbers = numbers - 2 ** (bits - 1)
    if slip == "half a step more":
        numbers = numbers + 0.5
    with np.errstate(all="ignore"):
        others = {
            "zero in steps": (numbers + zero) * scale,
            "minus zero in steps": (numbers - zero) * scale,
            "minus zero": numbers * scale - zero,
            "no zero": numbers * scale,
            "no scale": numbers + zero,
            "divided": numbers / scale + zero,
            "a share of the scale": numbers / last * scale + zero,
            "turned around": numbers * zero + scale,
        }
    return others.get(slip, numbers * scale + zero)


# attend_latent


def attend_latent_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, (T, S), (H, G, D), (R, W) in (
        ("one token, all alone", (1, 1), (1, 1, 2), (1, 1)),
        ("one query over three tokens", (1, 3), (1, 1, 3), (2, 2)),
        ("longer codes of values than of keys", (1, 4), (1, 1, 5), (2, 3)),
        ("longer codes of keys than of values", (1, 4), (1, 1, 5), (4, 1)),
        ("codes as long as a key", (1, 4), (1, 1, 3), (3, 3)),
        ("a prompt: three queries, three tokens", (3, 3), (1, 1, 3), (2, 2)),
        ("two queries over five tokens", (2, 5), (1, 1, 3), (2, 1)),
        ("two heads", (1, 4), (2, 2, 3), (4, 3)),
        ("four query heads on two KV heads", (1, 5), (4, 2, 3), (3, 2)),
        ("four query heads on two KV heads, two queries", (2, 6), (4, 2, 3), (3, 4)),
        ("three query heads on one KV head", (3, 4), (3, 1, 4), (2, 3)),
        ("as many queries as heads and tokens", (4, 4), (4, 2, 4), (4, 4)),
        ("codes as long as all KV heads together", (2, 5), (4, 2, 3), (6, 6)),
        ("codes longer than all KV heads together", (1, 5), (2, 2, 2), (5, 6)),
        ("scores of the past far below 0", (3, 3), (2, 2, 4), (3, 2)),
        ("500 tokens, four KV heads of 128 numbers", (1, 500), (4, 4, 128), (3, 2)),
        ("single precision", (2, 5), (4, 2, 4), (3, 2)),
        ("random sizes", *_random_sizes(rng)),
    ):
        dtype = np.float32 if name == "single precision" else np.float64
        q, k_codes, v_codes = (
            rng.normal(size=shape) for shape in ((T, H, D), (S, R), (S, W))
        )
        k_basis, v_basis = (rng.normal(size=(rank, G, D)) for rank in (R, W))
        if "far below" in name:
            _lower_all_but_the_last(q, k_codes, v_codes, k_basis)
        if "500" in name:  # that the scores are not so far apart
            k_basis /= D**0.5
        arrays = {
            "q": q,
            "k_codes": k_codes,
            "v_codes": v_codes,
            "k_basis": k_basis,
            "v_basis": v_basis,
        }
        inputs = {key: array.astype(dtype) for key, array in arrays.items()}
        cases.append(Case(name, inputs, _latent_limits(inputs)))
    return cases


def _random_sizes(rng) -> tuple[tuple[int, ...], ...]:
    T, G, group_size, D, R, W = (int(n) for n in rng.integers(2, 6, size=6))
    S = T + int(rng.integers(1, 9))
    return (T, S), (G * group_size, G, D), (R, W)


def _lower_all_but_the_last(q, k_codes, v_codes, k_basis):
    """Scores near -600 but for the last key's, and values behind the first so large that
    a weight of exp(-400) shows."""
    q /= 10
    q[..., 0] += 20
    k_codes /= 10
    k_codes[:-1, 0] = -60
    k_basis[0] = 0
    k_basis[0, :, 0] = 1
    v_codes[1:] *= 1e200


def _latent_limits(inputs: dict) -> dict[str, float]:
    """Room for some copies of the codes, of scores, and of a basis for each query head:
    not, in a text long enough to tell, for a key of one head for each token. And all that
    is made one after the other is less than the keys, or values, of all heads."""
    (T, H, D), (S, R) = inputs["q"].shape, inputs["k_codes"].shape
    W, size = inputs["v_codes"].shape[1], inputs["q"].itemsize
    codes, scores, bases = S * (R + W), S * T * H, (R + W) * H * D
    of_queries = T * H * (R + W + D)
    at_once = 2 * codes + 6 * scores + 2 * bases + 8 * of_queries
    in_all = 4 * codes + (12 + 2 * (R + W)) * scores + 6 * bases + 24 * of_queries
    return {"peak_bytes": size * at_once + 4096, "bytes_made": size * in_all + 16384}


def attend_latent_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    out, right = got["out"], expected["out"]
    if not isinstance(out, np.ndarray):
        return None
    with np.errstate(all="ignore"):
        if out.shape != right.shape:
            return _why_another_shape(inputs, right, out)
        if _is_near(out, right):
            return _why_so_many_bytes(inputs, got)
        found: dict[str, bool] = {}
        for words, changes in _latent_slips(inputs):
            other = _latent(inputs, **changes)
            is_it = _is_near(out, other) and not _is_near(other, right)
            found[words] = found.get(words, False) or is_it
    is_mixed = out.size > out.shape[-1] and _are_the_same_vectors(out, right)
    found[MIXED] = found[MIXED] or is_mixed
    return _reproduced(found)


def _why_another_shape(inputs, right: np.ndarray, out: np.ndarray) -> str | None:
    H, T = right.shape[1], right.shape[0]
    if _is_near(out, _latent(inputs, is_back=False)):
        return GO_BACK
    if out.shape == (H, T, right.shape[2]) and _is_near(out.swapaxes(0, 1), right):
        return "Put tokens before heads again: out has the shape of q"
    return None


def _why_so_many_bytes(inputs: dict, got: dict) -> str | None:
    """Of an answer whose out is right."""
    (S, _), D, size = inputs["k_codes"].shape, inputs["q"].shape[2], got["out"].itemsize
    G = inputs["k_basis"].shape[1]
    absorb = (
        "turn each query into the codes' coordinates, and compare that with codes; sum "
        "up codes, and go through v_basis once per query"
    )
    if got["peak_bytes"] >= S * D * size:
        return f"That is room for keys or values of D numbers per token: {absorb}"
    if got["bytes_made"] >= S * G * D * size:
        return f"Keys or values are made, if not all at a time: {absorb}"
    return None


GO_BACK = "Those are sums of codes: each goes through its KV head's part of v_basis"
PAIRING = "Query head h reads KV head h // (H / G): neighbours share"
FUTURE = "A query must not see tokens of later positions"
AT = "Query t of T is at position S - T + t: it sees all before it, and itself"
SCALE = "Scores are those of queries and keys of D numbers: divide by the root of D"
BASES = "Keys have k_basis, values have v_basis"
CODES = "Scores are of k_codes, and sums are of v_codes"
MIXED = "Tokens and heads are mixed up: view and flatten in the same order"


def _latent_slips(inputs: dict) -> list[tuple[str, dict]]:
    """What to say -> what to change in `_latent`."""
    (T, H, D), R, W = (
        inputs["q"].shape,
        inputs["k_codes"].shape[1],
        inputs["v_codes"].shape[1],
    )
    slips = [
        (FUTURE, {"is_causal": False}),
        (FUTURE, {"shift": 1}),
        (AT, {"shift": None}),
        (AT, {"shift": -1}),
        *((SCALE, {"scale": s}) for s in (1, 1 / D, R**-0.5, 1 / R, W**-0.5, H**-0.5)),
        (SCALE, {"scale": (H * D) ** -0.5}),
        (SCALE, {"scale": D**0.5}),
        (PAIRING, {"pairs": ("turns", "turns")}),
        (PAIRING, {"pairs": ("turns", "neighbours")}),
        (PAIRING, {"pairs": ("neighbours", "turns")}),
        (PAIRING, {"pairs": ("first", "first")}),
        (PAIRING, {"pairs": ("first", "neighbours")}),
        (PAIRING, {"pairs": ("neighbours", "first")}),
        ("The weights of one query sum to 1 over tokens: softmax along S", {"over": 0}),
        ("The weights of one query sum to 1 over tokens: softmax along S", {"over": 1}),
        ("Scores become weights by softmax", {"over": None}),
        *(
            ("A key of a later position has weight 0: set its score to -∞", {"fill": -x})
            for x in (0, 1, 10, 50, 100, 1e3)
        ),
    ]
    heads_first = inputs["q"].reshape(H, T, D).swapaxes(0, 1)
    slips += [(MIXED, {"q": heads_first, "is_mixed": back}) for back in (False, True)]
    if R == W:
        k_basis, v_basis = inputs["k_basis"], inputs["v_basis"]
        k_codes, v_codes = inputs["k_codes"], inputs["v_codes"]
        both = {"k_basis": v_basis, "v_basis": k_basis}
        slips += [
            (BASES, both),
            (BASES, {"k_basis": v_basis}),
            (BASES, {"v_basis": k_basis}),
            (CODES, {"v_codes": k_codes}),
            (CODES, {"k_codes": v_codes}),
            (CODES, {"k_codes": v_codes, "v_codes": k_codes}),
        ]
    if W == D:
        slips += [(GO_BACK, {"is_back": False})]
    return slips


@reference
def _latent(
    inputs: dict,
    is_causal=True,
    shift=0,
    scale=None,
    pairs=("neighbours", "neighbours"),
    over=2,
    fill=-np.inf,
    is_back=True,
    is_mixed=False,
    **others,
) -> np.ndarray:
    """Attention over codes with one thing wrong. shift: as in `_attend` of chapter 3.
    pairs: of query heads with KV heads, for keys and for values. over: the dimension of
    (T, H, S) in which weights sum to 1. is_mixed: whether heads come
    first in the end. others: other queries, codes or bases."""
    q, k_codes, v_codes, k_basis, v_basis = {**inputs, **others}.values()
    (T, H, D), S, G = q.shape, len(k_codes), k_basis.shape[1]
    heads = {
        "neighbours": np.arange(H) // (H // G),
        "turns": np.arange(H) % G,
        "first": np.zeros(H, dtype=int),
    }
    keys, values = (
        np.einsum("sr,rhd->shd", codes, basis[:, heads[pair]])
        for codes, basis, pair in zip((k_codes, v_codes), (k_basis, v_basis), pairs)
    )
    scores = np.einsum("thd,shd->ths", q, keys) * (D**-0.5 if scale is None else scale)
    last_seen = np.arange(T) + (0 if shift is None else S - T + shift)
    if is_causal:
        is_hidden = np.arange(S) > last_seen[:, None, None]
        scores = np.where(is_hidden, fill, scores)
    if over is None:
        weights = np.where(np.isfinite(scores), scores, 0)
    else:
        weights = np.exp(scores - scores.max(axis=over, keepdims=True))
        weights = weights / weights.sum(axis=over, keepdims=True)
    if not is_back:
        return weights @ v_codes
    out = np.einsum("ths,shd->thd", weights, values)
    return out.swapaxes(0, 1).reshape(T, H, D) if is_mixed else out


def _are_the_same_vectors(out: np.ndarray, right: np.ndarray) -> bool:
    """Those of all tokens and heads, in another order."""
    rows, rights = (x.reshape(-1, x.shape[-1]).round(6) for x in (out, right))
    rows, rights = (x[np.lexsort(x.T)] for x in (rows, rights))
    return np.allclose(rows, rights, atol=1e-5)


LATENT_SHAPES = (
    "Look at the shapes: k_codes (S, R) belong to k_basis (R, G, D), v_codes (S, W) to "
    "v_basis (W, G, D), and of H query heads H / G read one KV head"
)


EXERCISES = [
    Exercise(
        "lib.quantized_kv_cache.quantize",
        2,
        quantize_cases,
        quantize_explain,
        errors={
            "view size is not compatible": "A tensor need not lie in memory in the order "
            "of its shape: unflatten, flatten and reshape take any",
        },
    ),
    Exercise(
        "lib.quantized_kv_cache.dequantize",
        1,
        dequantize_cases,
        dequantize_explain,
        errors={
            "view size is not compatible": "A tensor need not lie in memory in the order "
            "of its shape: unflatten, flatten and reshape take any",
        },
    ),
    Exercise(
        "lib.latent_kv_cache.attend_latent",
        3,
        attend_latent_cases,
        attend_latent_explain,
        errors=dict.fromkeys(
            (
                "einsum()",
                "must match the size",
                "shapes cannot be multiplied",
                "first two dimensions of batch2",
            ),
            LATENT_SHAPES,
        ),
    ),
]
