"""Chapter 5: what its exercises are tried on."""

import functools
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lib.course.cases.ch01 import _reproduced
from lib.course.compare import difference
from lib.course.exercises import Case, Exercise
from lib.course.shipped import reference
from lib.measure import gpu_code

NOWHERE = 2147480000  # a block id that stands behind the end of a table: never to be read
TILE = 64  # tokens that an interpreted attention kernel takes at a time
ROWS = 128  # tokens times heads of an interpreted paged_prefill_kernel's tile of queries
# In the code for bf16: a product of matrices in fp32 takes a thousand, all else some 30.
MOST_MULTIPLY_ADDS = 250
LOG2_E, LN_2 = math.log2(math.e), math.log(2)


def attend_online_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, sizes, (H, G, D) in (
        ("one tile of one token", [1], (1, 1, 2)),
        ("one tile of three tokens", [3], (1, 1, 2)),
        ("two tiles, of two tokens and of one", [2, 1], (1, 1, 2)),
        ("the largest score in the first tile", [2, 3], (1, 1, 2)),
        ("the largest score in the last tile", [2, 3], (1, 1, 2)),
        ("two heads", [2, 1], (2, 2, 2)),
        ("four query heads on two KV heads", [3, 2, 1], (4, 2, 3)),
        ("a score of a thousand, of which exp is infinite", [2, 2], (1, 1, 2)),
        ("scores that fall by a thousand", [2, 2], (1, 1, 2)),
        ("scores far below zero, and in another head far above", [2, 3], (2, 1, 2)),
        ("a score of 0", [1], (1, 1, 2)),
        ("no tiles", [], (2, 1, 3)),
        ("tiles without keys before others", [0, 2, 0, 1], (2, 1, 3)),
        ("two tiles without keys", [0, 0], (2, 1, 3)),
        ("half precision, a score of 8 and 59 of 0", [1] * 60, (1, 1, 2)),
        ("single precision", [3, 2], (2, 1, 4)),
        ("a random number of tiles", rng.integers(1, 9, size=5).tolist(), (6, 3, 4)),
        ("50 tiles of 20 tokens", [20] * 50, (8, 2, 16)),
    ):
        dtype = {"half": np.float16, "sing": np.float32}.get(name[:4], np.float64)
        q = rng.normal(size=(H, D))
        tiles = [[rng.normal(size=(S, G, D)) for _ in "kv"] for S in sizes]
        if "largest" in name:
            tiles["last" in name and -1][0][0] = 4 * q
        if "thousand" in name:
            q = 40 * np.sign(q)
            tiles["fall" not in name][0][0] = q
        if "far below" in name:
            q = np.array([[-100.0], [100.0]]) + 0 * q
            tiles = [[1000 + 0.01 * k, v] for k, v in tiles]
        if "score of 0" in name:
            tiles[0][0][:] = 0
        if "half" in name:  # each exp(-8) is too small to be added to 1
            q[:], tiles = 2, [[0 * k, 0 * v] for k, v in tiles]
            tiles[0][0][:], tiles[0][1][:] = 2, 1
        inputs = {
            "q": q.astype(dtype),
            "tiles": [[x.astype(dtype) for x in tile] for tile in tiles],
        }
        # One tile and the one before, copies for each query head, and scores; not all.
        tile_bytes = 8 * max(sizes, default=0) * (2 * G * D + 2 * H * D + 4 * H)
        limits = {"peak_bytes": 2 * tile_bytes + 8 * 8 * H * D + 2048}
        cases.append(Case(name, inputs, limits))
    return cases


def attend_online_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    out, logsumexp, ours = got["out"], got.get("logsumexp"), expected["out"]
    if not isinstance(out, np.ndarray) or not isinstance(logsumexp, np.ndarray):
        return None
    if out.shape != ours.shape or logsumexp.shape != expected["logsumexp"].shape:
        return f"out is (H, D), logsumexp (H,); yours: {out.shape}, {logsumexp.shape}"
    if got.get("dtypes") != expected.get("dtypes"):
        return "out is in q's dtype, and logsumexp in that of the sums, float32 at least"
    q = inputs["q"].astype(np.float64)
    tiles = [tile for tile in inputs["tiles"] if len(tile[0]) > 0]
    if np.isnan(out).any() and len(tiles) < len(inputs["tiles"]):
        return EMPTY_TILE
    if np.isnan(out).any() and not tiles:
        return "Without keys the sum is 0: divide by something else then, for an out of 0"
    if not tiles:
        return None
    is_right = not difference(ours, out)
    if is_right and not difference(expected["logsumexp"], logsumexp):
        return "Keep three running numbers a head, not the tiles, or copies of them"
    if "dtypes" in got and np.allclose(out, tiles[0][1], atol=2e-3):
        return "What is small is lost in sums of half precision: sum up in float32"
    if np.abs(q).min() == 100 and (out[0] == 0).all() and np.allclose(out[1], ours[1]):
        return (
            "A head's largest score may be far below 0, or below another head's: begin "
            "with -inf, and keep one for each head"
        )
    if (out == 0).all() and np.allclose(expected["logsumexp"], 0):
        return "A logsumexp of 0 is the logarithm of 1: without keys it is -inf"
    right = ours, expected["logsumexp"]
    for words, slip in ONLINE_SLIPS.items():
        wrong = _online(q, tiles, slip)
        # The first: whoever has one of those behind it has failed a case before this one.
        if _are_close((out, logsumexp), wrong) and not _are_close(right, wrong):
            return words
    if np.isnan(out).any() or np.isinf(logsumexp).any():
        return None
    every = [np.concatenate(both) for both in zip(*tiles)]
    if is_right:
        return _why_other_logsumexp(q, every[0], right[1], logsumexp)
    parts = [_attention(q, *tile) for tile in tiles]
    by_turns = np.arange(len(q)) % every[0].shape[1]
    sums = [np.exp(part[1])[:, None] for part in parts]
    with np.errstate(all="ignore"):
        variants = (
            ("q is scaled already", _attention(q / len(q[0]) ** 0.5, *every)[0]),
            ("That is the last tile's result alone", parts[-1][0]),
            ("That is the first tile's alone: return behind the loop", parts[0][0]),
            (
                "Tiles do not weigh the same: add up weighted values and weights, divide "
                "at the end",
                np.mean([part[0] for part in parts], axis=0),
            ),
            (
                "Query head h reads KV head h // (H / G): neighbours share",
                _attention(q, *every, by_turns)[0],
            ),
            (
                "What has been summed up is divided once, at the end",
                sum(s * part[0] for s, part in zip(sums, parts)),
            ),
            ("exp, not exp2: nothing was multiplied", _attention(q * LN_2, *every)[0]),
        )
    return _reproduced({words: _are_close(out, other) for words, other in variants})


def _are_close(one, other) -> bool:
    """Of arrays, or of pairs of them."""
    pairs = zip(one, other) if isinstance(one, tuple) else [(one, other)]
    return all(np.allclose(*pair, equal_nan=True) for pair in pairs)


def _why_other_logsumexp(
    q: np.ndarray, k: np.ndarray, right: np.ndarray, logsumexp: np.ndarray
) -> str | None:
    """Of an answer whose out is right. q (H, D), k (S, G, D)."""
    kv_heads = np.arange(len(q)) // (len(q) // k.shape[1])
    largest = np.einsum("hd,shd->hs", q, k[:, kv_heads]).max(axis=1)
    wrong = {
        "logsumexp is the largest score plus the logarithm of the sum": [
            largest,
            right - largest,
        ],
        "q is scaled already": [_attention(q / len(q[0]) ** 0.5, k, k)[1]],
        "The logarithm is the natural one": [
            right / LN_2,
            largest + (right - largest) / LN_2,
        ],
    }
    return _reproduced(
        {words: any(_are_close(logsumexp, o) for o in w) for words, w in wrong.items()}
    )


EMPTY_TILE = "A tile may have no keys, and so no largest score: pass over it"
ONLINE_SHAPES = (
    "Look at the shapes: row_max, new_max and row_sum are (H, 1), weights (H, S), in the "
    "product (G, H / G, S), values there (G, S, D), and acc (H, D)"
)
ONLINE_ERRORS = {
    "non-zero size": EMPTY_TILE,
    "Boolean value of Tensor": "Python's max and if look at one number: torch.maximum "
    "takes the larger of each two",
    "return_types.max": "max over a dimension gives values, and where they are: amax "
    "gives the values alone",
    "converted to Python scalars": "Functions of math take one number: tensors have "
    ".exp() and .log()",
    "first two dimensions of batch2": ONLINE_SHAPES,
    "must match the size of tensor": ONLINE_SHAPES,
}
RESCALE = (
    "When the largest score grows, the sum and acc so far were made with the old one: "
    "rescale both by exp(old - new)"
)
# What may go wrong in a running softmax: words -> how `_online` has to go wrong.
ONLINE_SLIPS = {
    "All is NaN from the first tile on, as by rescaling the wrong way round: exp(old - "
    "new) it has to be": "new - old",
    "row_max has to follow: after each tile it is new_max": "row_max stays",
    "The largest score so far is the larger of row_max and the tile's: row_max never "
    "falls": "the tile's maximum",
    "Subtract the largest score before exp, or it is infinite": "no maximum",
    "The weights are exp(score - new_max): row_max is still the old one": "old maximum",
    "At the end acc is divided by row_sum": "not divided",
    "acc is divided once, at the end, not in each tile": "divided in each tile",
    "acc is rescaled, row_sum is not. " + RESCALE: "sum not rescaled",
    "row_sum is rescaled, acc is not. " + RESCALE: "acc not rescaled",
    RESCALE: "neither rescaled",
}


@reference
def _online(
    q: np.ndarray, tiles: list, slip: str, is_kernel: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of q (H, D) over `tiles` by a running softmax with one of ONLINE_SLIPS:
    out (H, D), logsumexp (H,). is_kernel: the last step as paged_decode_kernel has it."""
    H, D = q.shape
    row_max, row_sum, acc = np.full((H, 1), -np.inf), np.zeros((H, 1)), np.zeros((H, D))
    with np.errstate(all="ignore"):
        for k, v in tiles:
            kv_heads = np.arange(H) // (H // k.shape[1])
            scores = np.einsum("hd,shd->hs", q, k[:, kv_heads].astype(np.float64))
            new_max = scores.max(axis=1, keepdims=True)
            if slip != "the tile's maximum":
                new_max = np.maximum(row_max, new_max)
            if slip == "no maximum":
                new_max = np.zeros((H, 1))
            rescale = np.exp((row_max - new_max) * (-1 if slip == "new - old" else 1))
            weights = np.exp(scores - (row_max if slip == "old maximum" else new_max))
            if slip not in ("sum not rescaled", "neither rescaled"):
                row_sum = row_sum * rescale
            if slip not in ("acc not rescaled", "neither rescaled"):
                acc = acc * rescale
            row_sum = row_sum + weights.sum(axis=1, keepdims=True)
            acc = acc + np.einsum("hs,shd->hd", weights, v[:, kv_heads])
            if slip == "divided in each tile":
                acc = acc / row_sum
            row_max = row_max if slip == "row_max stays" else new_max
        divisor = np.where(row_sum == 0, 1, row_sum) if is_kernel else row_sum
        out = acc if slip == "not divided" else acc / divisor
        return out, (row_max + np.log(divisor))[:, 0]


@reference
def _attention(q, k, v, kv_heads=None) -> tuple[np.ndarray, np.ndarray]:
    """q (H, D) over k, v (S, G, D): out (H, D), logsumexp (H,)."""
    H, G = len(q), k.shape[1]
    if kv_heads is None:
        kv_heads = np.arange(H) // (H // G)
    scores = np.einsum("hd,shd->hs", q, k[:, kv_heads])
    largest = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - largest)
    total = weights.sum(axis=1, keepdims=True)
    out = np.einsum("hs,shd->hd", weights / total, v[:, kv_heads])
    return out, (largest + np.log(total))[:, 0]


def merge_splits_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, (B, H, P, D) in (
        ("one part", (1, 1, 1, 2)),
        ("two parts of equal weight", (1, 1, 2, 2)),
        ("two parts, one of three times the weight", (1, 1, 2, 2)),
        ("two heads of three parts", (1, 2, 3, 2)),
        ("one part, a logsumexp of 0", (1, 1, 1, 2)),
        ("two parts, of three keys and of one, all of score 0", (1, 1, 2, 2)),
        ("a part without keys", (1, 2, 3, 2)),
        ("a request without keys", (2, 1, 2, 2)),
        ("a logsumexp of a thousand", (1, 2, 2, 2)),
        ("a head with logsumexps of -1000, beside others", (2, 2, 2, 2)),
        ("single precision", (2, 3, 4, 5)),
        ("random parts", tuple(rng.integers(2, 7, size=4).tolist())),
    ):
        dtype = np.float32 if name == "single precision" else np.float64
        outs, logsumexps = rng.normal(size=(B, H, P, D)), rng.normal(size=(B, H, P))
        if "equal" in name:
            logsumexps[:] = 1.5
        if "three times" in name:
            logsumexps[..., 1] = logsumexps[..., 0] + math.log(3)
        if "of 0" in name:
            logsumexps[..., 0], logsumexps[..., -1] = math.log(3), 0
        if "thousand" in name:
            logsumexps += 1000
        if "-1000" in name:
            logsumexps[0, 1] -= 1000
        if "without" in name:
            empty = np.index_exp[0] if "request" in name else np.index_exp[:, :, 1]
            outs[empty], logsumexps[empty] = 0, -np.inf
        inputs = {"outs": outs.astype(dtype), "logsumexps": logsumexps.astype(dtype)}
        cases.append(Case(name, inputs))
    return cases


PARTS = "In the product weights are (B, H, 1, P), and outs (B, H, P, D)"


def merge_splits_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    outs, logsumexps = inputs["outs"], inputs["logsumexps"]
    out, logsumexp = got["out"], got.get("logsumexp")
    if not isinstance(out, np.ndarray) or not isinstance(logsumexp, np.ndarray):
        return None
    if out.shape != expected["out"].shape:
        return "The parts become one: out is (B, H, D)"
    if logsumexp.shape != expected["logsumexp"].shape:
        return None
    is_small, is_empty = logsumexps.max(axis=-1) < -900, np.isinf(expected["logsumexp"])
    if np.isfinite(logsumexps).all() and is_small.any():
        if not np.nan_to_num(out[is_small]).any():  # all weights have become 0
            return "Each head of each request has a largest logsumexp of its own"
        return None
    if np.array_equal(np.isnan(out).any(axis=-1), is_empty) and is_empty.any():
        return "Where no part has keys all are -inf, and -inf minus -inf is NaN"
    if logsumexps.min() > 900 and (np.isnan(out).all() or np.isinf(logsumexp).all()):
        return "exp of a large number is infinite: subtract the largest logsumexp first"
    if not difference(expected["out"], out):
        others = (f(logsumexps, axis=-1) for f in (np.sum, np.max, np.mean))
        is_other = any(_are_close(logsumexp, other) for other in others)
        words = "The logsumexp of all keys is that of the parts' logsumexps"
        return words if is_other else None
    without = np.where(logsumexps == 0, -np.inf, logsumexps)
    is_gone = (without != logsumexps).any()
    if is_gone and np.allclose(out, np.nan_to_num(_merged(outs, without))):
        return (
            "A logsumexp of 0 is that of one key with a score of 0: if empty it is -inf"
        )
    with np.errstate(all="ignore"):
        weights = np.exp(logsumexps - logsumexps.max(axis=-1, keepdims=True))
        share = logsumexps / logsumexps.sum(axis=-1, keepdims=True)
        variants = (
            ("Parts do not weigh the same: the more keys, the more", outs.mean(axis=-2)),
            (
                "A part's weight is exp(logsumexp), not logsumexp",
                (share[..., None] * outs).sum(axis=-2),
            ),
            ("Divide by the sum of the weights", (weights[..., None] * outs).sum(-2)),
            ("All parts count, not the heaviest only", _heaviest(outs, logsumexps)),
            ("exp, not exp2: logsumexps are natural", _merged(outs, LN_2 * logsumexps)),
        )
    return _reproduced({words: _are_close(out, other) for words, other in variants})


@reference
def _merged(outs: np.ndarray, logsumexps: np.ndarray) -> np.ndarray:
    """Out (B, H, D) of the parts outs (B, H, P, D); NaN where none has keys."""
    with np.errstate(all="ignore"):
        weights = np.exp(logsumexps - logsumexps.max(axis=-1, keepdims=True))
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return (weights[..., None] * outs).sum(axis=-2)


def _heaviest(outs: np.ndarray, logsumexps: np.ndarray) -> np.ndarray:
    at = logsumexps.argmax(axis=-1)[..., None, None]
    return np.take_along_axis(outs, at, axis=-2)[..., 0, :]


def bytes_moved_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, (L, H, G, D), seq_lens, bytes_per_number, is_gathered in (
        ("one head of 2 numbers, three keys", (1, 1, 1, 2), [3], 4, False),
        ("five keys", (1, 1, 1, 2), [5], 4, False),
        ("two bytes a number", (1, 1, 1, 2), [5], 2, False),
        ("three heads", (1, 3, 3, 2), [5], 4, False),
        ("four query heads that share one KV head", (1, 4, 1, 2), [5], 4, False),
        ("three layers", (3, 1, 1, 2), [5], 4, False),
        ("three requests", (1, 2, 1, 2), [6, 3, 2], 4, False),
        ("a request without keys", (1, 2, 1, 2), [5, 0, 3], 4, False),
        ("keys and values gathered first", (1, 2, 1, 2), [6, 3, 2], 4, True),
        ("Llama 3 8B, 8,192 keys", (32, 32, 8, 128), [8192], 2, False),
        ("Llama 3 8B, 64 requests", (32, 32, 8, 128), [32767] * 64, 2, False),
    ):
        cases.append(
            _bytes_case(name, L, H, G, D, seq_lens, bytes_per_number, is_gathered)
        )
    L, G, group_size, half = (int(n) for n in rng.integers(2, 9, size=4))
    shape = L, G * group_size, G, 2 * half
    cases.append(_bytes_case("random", *shape, rng.integers(1, 99, 5).tolist(), 2, True))
    return cases


def _bytes_case(name, L, H, G, D, seq_lens, bytes_per_number, is_gathered) -> Case:
    sizes = {"vocab_size": 256, "d_ff": 7, "max_seq_len": 9}
    heads = {"num_layers": L, "num_heads": H, "num_kv_heads": G, "d_model": H * D}
    inputs = {
        "config": {**sizes, **heads},
        "seq_lens": np.array(seq_lens),
        "bytes_per_number": bytes_per_number,
        "is_gathered": is_gathered,
    }
    return Case(name, inputs)


@reference
def _other_bytes(inputs: dict, ours: int) -> dict[str, int]:
    """What comes of each slip."""
    config = inputs["config"]
    B, S, L = len(inputs["seq_lens"]), int(inputs["seq_lens"].sum()), config["num_layers"]
    H, G = config["num_heads"], config["num_kv_heads"]
    D, number = config["d_model"] // H, inputs["bytes_per_number"]
    times = 3 if inputs["is_gathered"] else 1
    keys = 2 * S * G * D * number
    around = 2 * B * H * D * number
    longest = 2 * int(inputs["seq_lens"].max()) * G * D * number
    variants = (
        (
            "More than 2^31 bytes: count in Python's int, or in int64",
            (ours + 2**31) % 2**32 - 2**31,
        ),
        ("That counts numbers, not bytes", ours // number),
        ("How many bytes a number has, bytes_per_number says", ours // number * 4),
        ("Queries are read and outputs written too", times * keys),
        ("The outputs are written too", times * keys + around // 2),
        ("Each token has a key and a value", times * keys // 2 + around),
        (
            "Query heads that share a KV head read its keys once",
            times * keys * H // G + around,
        ),
        (
            "There is a query and an output for each query head",
            times * keys + 2 * B * G * D * number,
        ),
        ("There is a query and an output for each request", times * keys + around // B),
        ("One layer is asked for", ours * L),
        ("A copy is read, written, and read again: three times", 2 * keys + around),
        ("Gathering copies keys and values", keys + around),
        ("In place keys and values are read once, not three times", 3 * keys + around),
        ("The keys of all requests count", times * longest + around),
        ("Requests have lengths of their own: add them up", times * B * longest + around),
        ("D is config.head_dim, which is d_model / num_heads", ours * H),
        (
            "Queries and outputs are not copied: keys and values are",
            times * (keys + around),
        ),
        (
            "A request without keys has a query and an output too",
            ours - around // B * int((inputs["seq_lens"] == 0).sum()),
        ),
    )
    return dict(variants)


def bytes_moved_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    theirs = got["bytes"]
    if isinstance(theirs, float):
        return "Bytes are counted: give an int"
    if "Tensor" in str(theirs):
        return "One number is asked for, of all requests together"
    if not isinstance(theirs, int):
        return None
    ours = expected["bytes"]
    wrong = _other_bytes(inputs, ours)
    return _reproduced({words: theirs == other != ours for words, other in wrong.items()})


# What overflows where memory is far away, the last case but one or two.
FAR = {
    "load_row_kernel": "row times x_stride may pass 2^31: make row int64 first",
    "gather_kernel": "block_id, or slot, times a size may pass 2^31: keep it int64",
    "paged_decode_kernel": "block_id and place have to be int64 before they are "
    "multiplied",
    "paged_prefill_kernel": "h has to be int64, as g is, before it is multiplied",
}


def load_row_kernel_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, N, num_cols, width in (
        ("one row of four", 1, 4, 4),
        ("three rows of four", 3, 4, 4),
        ("one row of five, in a tile of eight", 1, 5, 5),
        ("two rows of five", 2, 5, 5),
        ("rows of three that lie eight apart", 4, 3, 8),
        ("rows that lie 2^30 numbers apart", 3, 4, 4),
        ("random rows", 5, int(rng.integers(17, 60)), 64),
    ):
        is_far = "2^30" in name
        dtype = np.float16 if is_far else np.float32
        x = np.full((N, width), np.nan, dtype=dtype)
        x[:, :num_cols] = rng.normal(size=(N, num_cols))
        inputs = {"x": x, "num_cols": num_cols} | ({"is_far": True} if is_far else {})
        written = N * 2 ** math.ceil(math.log2(num_cols)) * x.itemsize
        limits = {"bytes_read": N * num_cols * x.itemsize, "bytes_written": written}
        cases.append(Case(name, inputs, limits))
    return cases


def load_row_kernel_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    rows, ours, num_cols = got["rows"], expected["rows"], inputs["num_cols"]
    if np.allclose(rows, ours) and got["bytes_read"] <= expected["bytes_read"]:
        return "Store TILE numbers, once"
    if np.allclose(rows, ours):
        return "Load num_cols numbers, once, and no more: what follows is somebody else's"
    if "is_far" in inputs:
        return FAR["load_row_kernel"] if np.array_equal(rows[:2], ours[:2]) else None
    x = inputs["x"].ravel()
    packed = x[num_cols : 2 * num_cols]
    if len(rows) > 1 and np.array_equal(rows[1, :num_cols], packed, equal_nan=True):
        return "From one row to the next it is x_stride numbers, not num_cols"
    if np.isnan(rows).all() or np.isnan(rows[1:]).all() and len(rows) > 1:
        return "A program stores its own row: TILE numbers from row · TILE on"
    for stride in (num_cols, inputs["x"].shape[1]):
        wrong = np.full(ours.size + 2 * ours.shape[1], np.nan)
        for n, row in enumerate(ours):
            wrong[n * stride : n * stride + len(row)] = row
        if np.array_equal(rows, wrong[: ours.size].reshape(ours.shape), equal_nan=True):
            return "In out the rows lie TILE numbers apart, as it is wide"
    is_row_right = np.array_equal(rows[:, :num_cols], ours[:, :num_cols])
    if is_row_right and np.isnan(rows[:, num_cols:]).any():
        return (
            "All TILE numbers are stored, and those behind the row are 0: what a mask "
            "keeps out is `other`, or anything at all"
        )
    if len(rows) > 1 and np.array_equal(rows[1], ours[0]):
        return "Every program loads row 0: which one is its own, tl.program_id says"
    return None


def gather_kernel_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, seq_len, block_size, (G, D) in (
        ("one token", 1, 2, (1, 4)),
        ("a full block", 2, 2, (1, 4)),
        ("two blocks, the second half full", 3, 2, (1, 4)),
        ("two heads of three numbers", 3, 2, (2, 3)),
        ("blocks of one token", 5, 1, (1, 4)),
        ("a block larger than the text", 5, 256, (2, 4)),
        ("blocks 2^31 numbers away", 5, 2, (1, 4)),
        ("a random length", int(rng.integers(9, 30)), 4, (3, 5)),
    ):
        (cache,), block_tables = _pool(rng, 1, [seq_len], block_size, G, D)
        is_far = "2^31" in name
        others = rng.normal(size=cache.shape)  # where none of this request's tokens is
        cache = np.where(np.isnan(cache), others, cache)
        inputs = {
            "cache": cache.astype(np.float16 if is_far else np.float32),
            "block_table": block_tables[0].astype(np.int64),
            "seq_len": seq_len,
        }
        inputs |= {"is_far": True} if is_far else {}
        of_caches = 2 * seq_len * G * D * inputs["cache"].itemsize  # keys and values
        limits = {"bytes_read": of_caches, "bytes_written": of_caches}
        cases.append(Case(name, inputs, limits))
    return cases


def gather_kernel_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    k, ours, S = got["k"], expected["k"], inputs["seq_len"]
    if k.shape != ours.shape:
        return None
    if np.array_equal(k, ours) and got["bytes_read"] <= expected["bytes_read"]:
        return "Write each number once, under a mask of i < num_numbers"
    if np.array_equal(k, ours):
        return "Read each number once, under a mask of i < num_numbers"
    if "is_far" in inputs:
        return FAR["gather_kernel"]
    flat, block_size = (
        inputs["cache"].reshape(-1, *ours.shape[1:]),
        inputs["cache"].shape[1],
    )
    position = np.arange(S)
    block_ids, place = (
        inputs["block_table"][position // block_size],
        position % block_size,
    )
    for words, slots in (
        ("Look up the block in the table: the pool is not in the text's order", position),
        (
            "A token has a place in its block: position % block_size",
            block_ids * block_size,
        ),
        ("A block begins at slot block_id · block_size", block_ids + place),
        (
            "In its block a token has the place position % block_size, not position",
            block_ids * block_size + position,
        ),
    ):
        is_there = slots < len(flat)  # behind the pool lies anything
        if is_there.any() and np.array_equal(k[is_there], flat[slots[is_there]]):
            return words
    is_read = np.isin(k, inputs["cache"]) | np.isnan(k)  # NaN: nothing was stored there
    if is_read.all() and not np.isin(k, ours).all():
        return "That reads, or leaves, numbers that are not this request's"
    return None


def paged_decode_kernel_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, seq_lens, block_size, (H, G, D), split_tokens in (
        ("a tile of 64 tokens", [64], 4, (1, 1, 16), None),
        ("one token", [1], 4, (1, 1, 16), None),
        ("three tokens in a block of four", [3], 4, (1, 1, 16), None),
        ("two blocks", [7], 4, (1, 1, 16), None),
        ("blocks of one token", [5], 1, (1, 1, 16), None),
        ("100 tokens, two tiles", [100], 16, (1, 1, 16), None),
        ("four query heads on two KV heads", [9], 8, (4, 2, 16), None),
        ("a head of 20 numbers", [9], 8, (2, 1, 20), None),
        ("three requests, one without keys", [6, 0, 33], 8, (2, 1, 16), None),
        ("a pool whose heads come first", [11], 4, (2, 2, 16), None),
        ("half precision", [40], 16, (3, 1, 16), None),
        ("150 tokens, in splits of 100", [150], 16, (2, 1, 16), 100),
        ("splits of 64, three and one", [130, 5], 32, (2, 1, 16), 64),
        ("scores that fall by a thousand", [100], 16, (1, 1, 16), None),
        (
            "scores far below zero, and in another head far above",
            [70],
            16,
            (2, 1, 16),
            None,
        ),
        ("another scale", [9], 8, (2, 1, 16), None),
        ("blocks 2^31 numbers away", [9], 4, (2, 1, 16), None),
        ("places 2^30 numbers apart", [5], 3, (2, 1, 16), None),
        ("random", rng.integers(50, 150, 2).tolist(), 16, (4, 2, 32), None),
    ):
        caches, block_tables = _pool(rng, 2, seq_lens, block_size, G, D)
        if "heads come first" in name:  # in memory: the shape is the same
            caches[0] = np.ascontiguousarray(caches[0].swapaxes(0, 2)).swapaxes(0, 2)
            caches[1] = np.ascontiguousarray(caches[1].swapaxes(1, 2)).swapaxes(1, 2)
        if name == "a tile of 64 tokens":  # nothing is dead: a NaN has been computed
            caches = [np.where(np.isnan(x), rng.normal(size=x.shape), x) for x in caches]
        far = "blocks" if "2^31" in name else "places" if "2^30" in name else None
        dtype = np.float16 if far or name == "half precision" else np.float32
        q = rng.normal(size=(len(seq_lens), H, D))
        if "two" in name and H == 1 or split_tokens:  # the largest score comes last
            last = seq_lens[0] - 1
            caches[0][block_tables[0, last // block_size], last % block_size] = (
                2 * q[0, 0]
            )
        if "thousand" in name:
            first, _ = block_tables[0, : 64 // block_size], q.fill(40)
            caches[0][:] = np.where(np.isnan(caches[0]), np.nan, -6)
            caches[0][first] = 6
        if "far below" in name:
            q = np.array([[-10.0], [10.0]]) + 0 * q
            caches[0] = 2.75 + 0.01 * caches[0]
        inputs = {
            "q": q.astype(dtype),
            "k_cache": caches[0].astype(dtype),
            "v_cache": caches[1].astype(dtype),
            "block_tables": block_tables,
            "seq_lens": np.array(seq_lens, dtype=np.int32),
            "split_tokens": split_tokens,
            "scale": 0.1 if name == "another scale" else None,
            "far": far,
        }
        # Each key and value once; queries for each split; partial results to be merged.
        keys = 2 * sum(seq_lens) * G * D * np.dtype(dtype).itemsize
        used = [
            max(1, math.ceil(n / split_tokens)) if split_tokens else 1 for n in seq_lens
        ]
        queries = sum(used) * H * D * np.dtype(dtype).itemsize
        parts = sum(used) * H * (D + 1) * 4 if split_tokens else 0
        written = len(seq_lens) * H * (D * np.dtype(dtype).itemsize + 4) + parts
        # A block id for each token, not for what would follow; and lengths.
        num_ids = G * sum(seq_lens) + 8 * H * len(seq_lens) * max(used)
        limits = {
            "bytes_read": keys + queries + parts,
            "index_bytes_read": 4 * num_ids,
            "bytes_written": written,
        }
        cases.append(Case(name, inputs, limits))
    return cases


def _pool(rng, num_caches, seq_lens, block_size, G, D) -> tuple[list, np.ndarray]:
    """Shuffled blocks, NaN where no token is, and tables with ids that exist nowhere."""
    counts = [math.ceil(seq_len / block_size) for seq_len in seq_lens]
    num_blocks = sum(counts) + 2
    shape = num_blocks, block_size, G, D
    caches = [np.full(shape, np.nan, dtype=np.float32) for _ in range(num_caches)]
    block_tables = np.full((len(seq_lens), max(counts) + 1), NOWHERE, dtype=np.int32)
    block_ids = rng.permutation(np.arange(1, num_blocks))  # block 0 is nobody's
    for row, count, seq_len in zip(block_tables, counts, seq_lens):
        row[:count], block_ids = block_ids[:count], block_ids[count:]
        for i, block_id in enumerate(row[:count]):
            filled = min(block_size, seq_len - i * block_size)
            for cache in caches:
                cache[block_id, :filled] = rng.normal(size=(filled, G, D))
    return caches, block_tables


def paged_decode_kernel_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    out, logsumexp = got["out"], got["logsumexp"]
    tolerance = 2e-3 if out.dtype == np.float16 else 1e-4
    is_right = np.allclose(out, expected["out"], atol=tolerance)
    is_sum_right = np.allclose(logsumexp, expected["logsumexp"], atol=tolerance)
    if is_right and is_sum_right:
        for key, words in (
            ("bytes_read", "Read each key and value once, and under the mask is_there"),
            (
                "index_bytes_read",
                "The table ends where the tokens end: look up under the mask is_token",
            ),
            ("bytes_written", "Store each result once, and under its mask"),
        ):
            if got[key] > expected[key]:
                return words
        return None
    if inputs["far"]:
        return FAR["paged_decode_kernel"]
    if (
        np.abs(inputs["q"]).min() == 10 and np.abs(out[0, 0]).max() < 1e-6
    ):  # no weight is left
        return (
            "A head's largest score may be far below 0, or below another head's: masked "
            "scores are -inf, and each row has a row_max of its own"
        )
    b = int(inputs["seq_lens"].argmax())
    words = _slip(inputs, b, expected, out[b], logsumexp[b])
    if words:
        return words
    if np.isnan(out).any() and is_sum_right:
        return (
            "A weight of 0 does not help: 0 times NaN is NaN. Load values under the mask "
            "is_there, with other=0.0, from their own addresses"
        )
    if np.isnan(out).any():
        return None
    natural, S = _scale(inputs), int(inputs["seq_lens"][b])
    for words, wrong in (
        (
            "A tile may end behind the last token: scores there are -inf, not 0",
            _decode(inputs, b, num_zeros=-S % TILE),
        ),
        ("Scores are multiplied by scale_log2_e", _decode(inputs, b, 1 / LOG2_E)),
        (
            "The block of position p has the id in the table at p // block_size",
            _decode({**inputs, "block_tables": _in_order(inputs["block_tables"])}, b),
        ),
        (
            "Values come from v_cache_ptr, keys from k_cache_ptr",
            _decode({**inputs, "v_cache": inputs["k_cache"]}, b),
        ),
        (
            "With exp2, not exp: scale_log2_e counts on it",
            _decode(inputs, b, LOG2_E * natural),
        ),
    )[: 2 if is_right else 5]:
        is_same = _is_near(out[b], wrong[0])
        if is_same and (not is_right or _is_near(logsumexp[b], wrong[1])):
            return words
    if is_right:
        has_keys = inputs["seq_lens"] > 0
        others, right = logsumexp[has_keys], expected["logsumexp"][has_keys]
        found = {
            "logsumexp is natural, row_max and log2(row_sum) are not: divide by LOG2_E": (
                _is_near(others, LOG2_E * right)
            ),
            "Without keys logsumexp is -inf: row_max begins with it": _is_near(
                others, right
            )
            and (logsumexp[~has_keys] == 0).all(),
        }
        return _reproduced(found)
    is_head_right = np.isclose(out[b], expected["out"][b], atol=1e-3).all(axis=-1)
    is_grouped = inputs["k_cache"].shape[2] < len(is_head_right)
    if is_grouped and is_head_right[0] and not is_head_right[1]:
        return "Of a group only the first head is right"
    return None


def _in_order(block_tables: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(block_tables.shape[1]), block_tables.shape)


def _slip(
    inputs: dict, b: int, expected: dict, out: np.ndarray, logsumexp: np.ndarray
) -> str | None:
    """The slip in a running softmax that gives request b's out and logsumexp, or None."""
    S = inputs["seq_lens"][b]
    is_right = _is_near(out, expected["out"][b]) and _is_near(
        logsumexp, expected["logsumexp"][b]
    )
    # NaN may also be what was dead and has been loaded; not in the tile that is full.
    if is_right or inputs["split_tokens"] or np.isnan(out).any() and S < TILE:
        return None
    for words, slip in ONLINE_SLIPS.items():
        wrong_out, wrong_sum = _decode(inputs, b, slip=slip)
        if _is_near(out, wrong_out) and _is_near(logsumexp, wrong_sum):
            return words
    wrong_out, wrong_sum = _decode(inputs, b, slip="acc not rescaled")
    is_either = np.isclose(out, wrong_out, atol=1e-4) | np.isclose(
        out, expected["out"][b], atol=1e-4
    )
    if is_either.all() and _is_near(logsumexp, wrong_sum):
        return "acc is rescaled row by row: rescale[:, None]"
    return None


def _is_near(got: np.ndarray, wrong: np.ndarray) -> bool:
    return np.allclose(got, wrong, atol=1e-4, equal_nan=True)


def _scale(inputs: dict) -> float:
    """What scores of attention are multiplied by."""
    scale = inputs["scale"]
    return inputs["q"].shape[-1] ** -0.5 if scale is None else scale


@reference
def _decode(
    inputs: dict,
    b: int,
    scale: float | None = None,
    num_zeros: int = 0,
    slip: str | None = None,
):
    """Request b's out and logsumexp, with another scale, with keys of zeros added, or by
    a running softmax with a slip."""
    S, block_size = int(inputs["seq_lens"][b]), inputs["k_cache"].shape[1]
    used = inputs["block_tables"][b, : math.ceil(S / block_size)]
    q = inputs["q"][b].astype(np.float64) * (_scale(inputs) if scale is None else scale)
    k, v = (
        inputs[name][used].reshape(-1, *inputs[name].shape[2:])[:S].astype(np.float64)
        for name in ("k_cache", "v_cache")
    )
    if slip:
        tiles = [(k[i : i + TILE], v[i : i + TILE]) for i in range(0, S, TILE)]
        return _online(q, tiles, slip, is_kernel=True)
    zeros = np.zeros((num_zeros, *k.shape[1:]))
    with np.errstate(all="ignore"):
        return _attention(q, np.concatenate([k, zeros]), np.concatenate([v, zeros]))


def paged_prefill_kernel_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    random_lens = rng.integers(40, 90, 3)
    random_counts = rng.integers(1, random_lens + 1)
    cases = []
    for name, seq_lens, query_lens, block_size, (H, G, D) in (
        # First: with tiles of two tokens what is no row of the first tile is one of the
        # second, and no wrong row leads out of memory.
        ("one token, and two of another request", [1, 2], [1, 2], 16, (64, 1, 16)),
        ("one new token, nothing cached", [1], [1], 4, (1, 1, 16)),
        ("a prompt of three tokens", [3], [3], 4, (2, 1, 16)),
        ("two new tokens behind five", [7], [2], 4, (1, 1, 16)),
        ("four query heads on two KV heads", [5], [3], 4, (4, 2, 16)),
        ("three tiles of queries, the last in part", [40], [37], 8, (8, 1, 16)),
        ("five query heads per KV head, two tiles", [30], [27], 8, (5, 1, 16)),
        (
            "one request of four brings nothing",
            [9, 9, 6, 33],
            [4, 0, 1, 33],
            8,
            (2, 1, 16),
        ),
        ("two requests that share a block", [10, 12], [2, 4], 8, (2, 1, 16)),
        ("a head of 20 numbers", [9], [5], 8, (2, 1, 20)),
        ("half precision", [40], [40], 16, (3, 1, 16)),
        ("scores that fall by a thousand", [100], [4], 16, (1, 1, 16)),
        ("another scale", [9], [3], 8, (2, 1, 16)),
        ("blocks 2^31 numbers away", [9], [5], 4, (2, 1, 16)),
        ("query heads 2^30 numbers apart", [9], [5], 4, (3, 1, 16)),
        ("random", random_lens.tolist(), random_counts.tolist(), 16, (6, 2, 16)),
    ):
        caches, block_tables = _pool(rng, 2, seq_lens, block_size, G, D)
        if "share" in name:
            block_tables[1, 0] = block_tables[0, 0]
        far = "blocks" if "2^31" in name else "heads" if "2^30" in name else None
        dtype = np.float16 if far or name == "half precision" else np.float32
        q = rng.normal(size=(sum(query_lens), H, D))
        if "thousand" in name:
            first, _ = block_tables[0, : TILE // block_size], q.fill(40)
            caches[0][:] = np.where(np.isnan(caches[0]), np.nan, -6)
            caches[0][first] = 6
        inputs = {
            "q": q.astype(dtype),
            "k_cache": caches[0].astype(dtype),
            "v_cache": caches[1].astype(dtype),
            "block_tables": block_tables,
            "seq_lens": np.array(seq_lens, dtype=np.int32),
            "query_lens": np.array(query_lens, dtype=np.int32),
            "scale": 0.1 if name == "another scale" else None,
            "far": far,
        }
        # Queries once; keys and values once for each tile of queries, up to its last one.
        queries = ROWS // (H // G)  # of a tile
        num_keys = sum(
            seq_len - query_len + min(first + queries, query_len)
            for seq_len, query_len in zip(seq_lens, query_lens)
            for first in range(0, query_len, queries)
        )
        number = np.dtype(dtype).itemsize
        # A block id for each of these keys; lengths, which every program looks through.
        num_programs = len(q) // queries + min(len(seq_lens), len(q))
        num_ids = num_keys + num_programs * (len(seq_lens) + 8)
        limits = {
            "bytes_read": (q.size + 2 * num_keys * G * D) * number,
            "index_bytes_read": 4 * G * num_ids,
            "bytes_written": q.size * number + len(q) * H * 4,
        }
        cases.append(Case(name, inputs, limits))
    return cases


OWN_POSITION = (
    "Each query has a mask of its own: it sees the keys up to its own position, no others"
)
NEIGHBOURS = (
    "The heads of a token are neighbours: row is the tile's token row // GROUP_SIZE, and "
    "the group's head row % GROUP_SIZE"
)
GROUP = "Of KV head g the query heads are g * GROUP_SIZE and those behind it"
# What may go wrong in paged_prefill_kernel: how `_prefill` has to go wrong -> words.
PREFILL_SLIPS = {
    "tokens and heads swapped": NEIGHBOURS,
    "tokens by turns": NEIGHBOURS,
    "heads in turn": NEIGHBOURS,
    "t without first": "t counts in the request, as first does: a tile begins at first",
    "h without g": GROUP,
    "h by turns": GROUP,
    "any row": "ROWS may be more than QUERIES * GROUP_SIZE: what is behind is no row",
    "any token": "A request's last tile may have fewer tokens than QUERIES: a row is "
    "there where t < query_len",
    "from the first key": "The new tokens are the last of the text: the first of them is "
    "at position seq_len - query_len",
    "one key too few": "A query sees its own key too: position <= query_position",
    "one key too many": "A query does not see the key behind its own: position <= "
    "query_position",
    "no mask": "Scores of keys that a query does not see are -inf",
    "the loaded keys": OWN_POSITION,
    "all keys": OWN_POSITION,
    "the other way round": "A query sees the keys before it, and not those behind it",
    "end at seq_len": "Keys behind a tile's last query are seen by nobody: end is one "
    "more than the position of that query",
    "end without minimum": "A request's last tile may have fewer tokens than QUERIES: it "
    "ends where the request ends, and behind that lies anything",
    "end without cached": "end is a position in the text: cached tokens come before the "
    "new ones",
    "end without first": "A tile ends QUERIES tokens behind first, or where the request "
    "ends",
    "end too small": "end is one more than the position of the last query: that sees its "
    "own key",
    "no scale": "Scores are multiplied by scale_log2_e",
}


def paged_prefill_kernel_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    if inputs["far"]:
        return FAR["paged_prefill_kernel"] if inputs["far"] == "heads" else None
    tolerance = 2e-3 if inputs["q"].dtype == np.float16 else 1e-4

    def is_same(wrong: dict, keys: tuple[str, ...]) -> bool:
        return all(
            np.allclose(got[key], wrong[key], atol=tolerance, equal_nan=True)
            for key in keys
        )

    results, moved = ("out", "logsumexp"), ("bytes_read", "bytes_written")
    is_right = is_same(expected, results)
    for slip, words in PREFILL_SLIPS.items():
        wrong = _prefill(inputs, slip)
        # Where the results are right, what was moved has to give the slip away.
        if wrong and is_same(wrong, results + moved if is_right else results):
            return words
    return None


@reference
def _prefill(inputs: dict, slip: str) -> dict | None:
    """What paged_prefill_kernel gives and moves where it is interpreted, with one of
    PREFILL_SLIPS; None where it would look for a block that exists nowhere."""
    q, k_cache, v_cache = (inputs[name] for name in ("q", "k_cache", "v_cache"))
    (N, H, D), (num_blocks, block_size, G) = q.shape, k_cache.shape[:3]
    group_size, number = H // G, q.itemsize
    queries, row = ROWS // group_size, np.arange(ROWS)
    token, head = row // group_size, row % group_size
    if slip in ("tokens and heads swapped", "tokens by turns"):
        token = row % group_size
    if slip in ("tokens and heads swapped", "heads in turn"):
        head = row // group_size
    scale = 1 / LOG2_E if slip == "no scale" else _scale(inputs)
    q = q.reshape(N * H, D).astype(np.float64) * scale
    out, logsumexp = np.full((N * H, D), np.nan), np.full(N * H, np.nan)
    bytes_read = bytes_written = 0
    lens = list(zip(inputs["seq_lens"], inputs["query_lens"]))
    starts = np.cumsum(inputs["query_lens"]) - inputs["query_lens"]
    tiles = [(b, at) for b, (_, T) in enumerate(lens) for at in range(0, T, queries)]
    # In the order in which the interpreter runs the programs: the last one to store wins.
    for g in range(G):
        for b, first in reversed(tiles):
            (S, T), start = lens[b], starts[b]
            t = token if slip == "t without first" else first + token
            h = g * group_size + head
            h = {"h without g": head, "h by turns": g + G * head}.get(slip, h)
            is_row = (row < queries * group_size) | (slip == "any row")
            is_row &= (t < T) | (slip == "any token")
            ends = {
                "end at seq_len": S,
                "end without minimum": S - T + first + queries,
                "end without cached": min(first + queries, T),
                "end without first": S - T + min(queries, T),
                "end too small": S - T + min(first + queries, T) - 1,
            }
            end = int(ends.get(slip, S - T + min(first + queries, T)))
            position = np.arange(math.ceil(end / TILE) * TILE)
            nth, place = position[:end] // block_size, position[:end] % block_size
            if nth.max(initial=0) >= inputs["block_tables"].shape[1]:
                return None
            block_ids = inputs["block_tables"][b, nth]
            if (block_ids >= num_blocks).any():
                return None
            k, v = np.zeros((2, len(position), D))
            k[:end], v[:end] = (x[block_ids, place, g] for x in (k_cache, v_cache))

            query_position = (S - T + t)[:, None]
            masks = {
                "from the first key": position <= t[:, None],
                "one key too few": position < query_position,
                "one key too many": position <= query_position + 1,
                "no mask": position >= 0 * query_position,
                "the loaded keys": position < end + 0 * query_position,
                "all keys": position < S + 0 * query_position,
                "the other way round": position >= query_position,
            }
            is_seen = masks.get(slip, position <= query_position)
            at = (start + t) * H + h
            is_row &= at < N * H  # what is stored behind the end is not seen
            with np.errstate(all="ignore"):
                scores = q[np.where(is_row, at, 0)] @ k.T
                scores = np.where(is_seen, scores, -np.inf)
                largest = scores.max(axis=1, initial=-np.inf)
                # -inf minus -inf is NaN, and so is all that follows.
                is_lost = ~is_seen[:, :TILE].any(axis=1) & (end > 0)
                largest[is_lost] = np.nan
                weights = np.exp(scores - largest[:, None])
                total = weights.sum(axis=1)
                sums = largest + np.log(total)
                outs = weights @ v / total[:, None]
            out[at[is_row]], logsumexp[at[is_row]] = outs[is_row], sums[is_row]
            bytes_read += (is_row.sum() + 2 * end) * D * number
            bytes_written += is_row.sum() * (D * number + 4)
    return {
        "out": out.reshape(N, H, D),
        "logsumexp": logsumexp.reshape(N, H),
        "bytes_read": int(bytes_read),
        "bytes_written": int(bytes_written),
    }


def _compile_error(
    compile_kernel: Callable[[Any], gpu_code.GpuCode], kernel: Any
) -> str | None:
    """What the compiler says, in one line, with the line of the kernel."""
    try:
        compile_kernel(kernel)
    except gpu_code.CompileError as error:
        lines = [line.strip() for line in str(error).strip().split("\n")]
        words = lines[0]
        if "^" in lines:
            at = lines.index("^")
            words = f"in `{lines[at - 1]}`: {' '.join(lines[at + 1 :])}"
        advice = [text for part, text in KERNEL_ERRORS.items() if part in words]
        return ". ".join([words, *advice])
    return None


NO_NUMBER = "A pointer is an address: tl.load gives the number that lies there"
NO_TENSOR = (
    "A pointer is no tensor: tl.load(pointer + offsets), tl.store(pointer + offsets"
)
KERNEL_ERRORS = {  # what Triton says, and the interpreter
    "object is not iterable": f"{NO_TENSOR}, numbers)",
    "0-dimensional arrays": f"{NO_TENSOR}, numbers)",
    "length-1 arrays": f"{NO_TENSOR}, numbers)",  # numpy 2.0
    "cannot cast": NO_NUMBER,
    "> and triton.language.int": NO_NUMBER,
    "> and pointer<": NO_NUMBER,
    "int32 and pointer<": NO_NUMBER,
    "int64 and pointer<": NO_NUMBER,
    "> and triton.language.float": "Offsets are whole numbers: // divides to one",
    "'element_ty'": "That is no address: begin with a pointer, and add the offsets to it",
    "cannot be block type if pointer": "That is one address for many numbers: add the "
    "offsets of all of them, a tl.arange",
    "must be of type tl.constexpr": "What is an argument of the launch is not known when "
    "it is compiled: a constant, as TILE, is",
    "'range' object": "tl.arange gives the numbers of a tile at once, range one by one",
    "'float' object has no attribute 'type'": "After the address comes mask, then other: "
    "name them",
    "invalid combination of arguments": "In a kernel there is tl, and no torch",
    "no attribute 'scalar'": "Triton has dtypes of its own: tl.int64, tl.float32",
    "'tensor' object has no attribute": "Triton's tensors are not torch's: see tl",
    "Boolean value of Tensor": "if and Python's max look at one number, and here are "
    "many: a mask, tl.where, or tl.maximum",
    "make_shape_compatible": "Look at the shapes: x[:, None] is a column, x[None, :] a "
    "row; k and v are (TILE, COLS), scores (ROWS, TILE), acc (ROWS, COLS)",
    "equal reduction dimensions": "tl.dot takes (ROWS, COLS) and (COLS, TILE): k is "
    "transposed, tl.trans(k)",
    "must be same dtype": "tl.dot takes two of one dtype: cast weights as the values are",
    'ValueError("axis': "tl.max and tl.sum reduce one tensor along an axis: tl.maximum "
    "takes the larger of each two",
    "for @": "tl.dot multiplies two matrices, tl.trans transposes one",
}


def _explain_crash(name: str, inputs: dict) -> str | None:
    return FAR[name] if inputs.get("is_far") or inputs.get("far") else None


def _kernel(path: str, points: int, cases, explain, compile_kernel) -> Exercise:
    module, name = path.split(".")
    return Exercise(
        f"lib.{module}.{name}",
        points,
        cases,
        explain,
        errors=KERNEL_ERRORS,
        explain_crash=functools.partial(_explain_crash, name),
        compile_error=functools.partial(_compile_error, compile_kernel),
    )


def _compile_load_row(kernel: Any) -> gpu_code.GpuCode:
    types = ["*fp32:16", "*fp32:16", "i32", "i32"]
    return gpu_code.compile_kernel(kernel, types, {"TILE": 64}, "sm_90")


def _compile_gather(kernel: Any) -> gpu_code.GpuCode:
    types = ["*bf16:16", "*i64:16", "*bf16:16", "i32", "i32"]
    return gpu_code.compile_kernel(kernel, types, {"TILE": 1024}, "sm_90")


def _compile_attention(compile_as: Callable, kernel: Any) -> gpu_code.GpuCode:
    compile_for = functools.partial(compile_as, kernel=kernel)
    with ThreadPoolExecutor() as pool:  # each waits for a process of its own
        jobs = ("sm_80", "sm_90"), ("float32", "bfloat16")
        in_fp32, in_bf16 = pool.map(compile_for, *jobs)
    if in_fp32.tensor_core_instructions:  # which there are for fewer bits only
        raise gpu_code.CompileError('fp32 is rounded: input_precision="ieee"')
    multiply_adds = len(re.findall(r"\bFFMA\b", in_bf16.assembly))
    if multiply_adds > MOST_MULTIPLY_ADDS:
        raise gpu_code.CompileError(
            "of bf16 it multiplies matrices in fp32, past the tensor cores: cast the "
            "weights to the values' dtype, not the values, nor queries and keys, to fp32"
        )
    return in_bf16


EXERCISES = [
    Exercise(
        "lib.paged_attention.attend_online",
        2,
        attend_online_cases,
        attend_online_explain,
        errors=ONLINE_ERRORS,
    ),
    _kernel(
        "paged_kv_cache_triton.load_row_kernel",
        1,
        load_row_kernel_cases,
        load_row_kernel_explain,
        _compile_load_row,
    ),
    _kernel(
        "paged_kv_cache_triton.gather_kernel",
        2,
        gather_kernel_cases,
        gather_kernel_explain,
        _compile_gather,
    ),
    _kernel(
        "paged_attention_triton.paged_decode_kernel",
        3,
        paged_decode_kernel_cases,
        paged_decode_kernel_explain,
        functools.partial(_compile_attention, gpu_code.compile_decode),
    ),
    Exercise(
        "lib.paged_attention.merge_splits",
        3,
        merge_splits_cases,
        merge_splits_explain,
        errors={"first two dimensions of batch2": PARTS, "must match the size": PARTS},
    ),
    Exercise(
        "lib.paged_attention.bytes_moved", 2, bytes_moved_cases, bytes_moved_explain
    ),
    _kernel(
        "paged_attention_triton.paged_prefill_kernel",
        3,
        paged_prefill_kernel_cases,
        paged_prefill_kernel_explain,
        functools.partial(_compile_attention, gpu_code.compile_prefill),
    ),
]
