"""Chapter 7: what its exercises are tried on."""

import math

import numpy as np

from lib.course.cases.ch01 import _reproduced
from lib.course.cases.ch03 import _is_near
from lib.course.exercises import Case, Exercise
from lib.course.shipped import reference

KEEP_THE_CHECK = "Keep the given lines: they refuse this"

# Heads: bytes_per_token, pool_kv_heads


def bytes_per_token_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    one = 1, 1, 1, 6  # layer, query head, KV head; numbers of it
    # First one byte, then eight: so that the default of four stands alone.
    for name, shape, bytes_per_number, bits, ranks in (
        ("one layer, one head of 6 numbers, one byte per number", one, 1, None, None),
        ("eight bytes per number", one, 8, None, None),
        ("four bytes per number, which is the default", one, 4, None, None),
        ("three layers", (3, 1, 1, 10), 4, None, None),
        ("three heads", (1, 3, 3, 10), 4, None, None),
        ("four query heads that share one KV head", (1, 4, 1, 10), 2, None, None),
        ("six query heads on three KV heads", (1, 6, 3, 10), 4, None, None),
        ("8 bits, in one head of 6 numbers", one, 4, [8, 8], None),
        ("4 bits, in one head of 6 numbers", one, 4, [4, 4], None),
        ("2 bits, and scales of two bytes", (1, 1, 1, 20), 2, [2, 2], None),
        ("8 bits per number of a key, 4 of a value", (1, 1, 1, 14), 4, [8, 4], None),
        ("2 bits per number of a key, 8 of a value", (1, 1, 1, 12), 2, [2, 8], None),
        ("bits, and three heads", (1, 3, 3, 10), 4, [8, 4], None),
        ("bits, and six query heads on two KV heads", (1, 6, 2, 14), 4, [4, 8], None),
        ("bits, and three layers", (3, 1, 1, 10), 4, [4, 8], None),
        ("bits, and scales of eight bytes", (1, 5, 5, 20), 8, [4, 2], None),
        ("codes of 3 numbers", (1, 1, 1, 10), 4, None, [3, 3]),
        ("codes of 5 numbers", (1, 1, 1, 22), 4, None, [5, 5]),
        ("codes of 3 and of 8 numbers", (1, 1, 1, 22), 4, None, [3, 8]),
        ("codes of 9 and of 4 numbers", (1, 1, 1, 22), 4, None, [9, 4]),
        ("codes, and three KV heads", (1, 3, 3, 10), 4, None, [3, 8]),
        ("codes, and four query heads on one KV head", (1, 4, 1, 10), 4, None, [3, 8]),
        ("codes, and three layers", (3, 1, 1, 22), 4, None, [7, 2]),
        ("codes of numbers of two bytes", (1, 3, 3, 10), 2, None, [7, 2]),
        ("Llama 3 8B", (32, 32, 8, 128), 2, None, None),
        ("Llama 3 8B in 4 and 2 bits", (32, 32, 8, 128), 2, [4, 2], None),
        ("Llama 3 8B with codes of 256 and 512", (32, 32, 8, 128), 2, None, [256, 512]),
    ):
        cases.append(_token_case(name, *shape, bytes_per_number, bits, ranks))
    for name, bits, ranks in (
        ("a random shape", None, None),
        ("a random shape in bits", rng.permutation([8, 4, 2])[:2].tolist(), None),
        ("a random shape with codes", None, rng.integers(2, 40, size=2).tolist()),
    ):
        L, G, group_size, quarter = (int(n) for n in rng.integers(2, 9, size=4))
        shape = L, G * group_size, G, 4 * quarter
        cases.append(_token_case(name, *shape, 8, bits, ranks))
    return cases


def _token_case(name: str, L, H, G, D, bytes_per_number, bits, ranks) -> Case:
    sizes = {"vocab_size": 256, "d_ff": 7, "max_seq_len": 9}
    heads = {"num_layers": L, "num_heads": H, "num_kv_heads": G, "d_model": H * D}
    pairs = {"bits": bits, "ranks": ranks}
    config = {**sizes, **heads}
    return Case(name, {"config": config, "bytes_per_number": bytes_per_number, **pairs})


def bytes_per_token_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    ours, theirs = expected["bytes"], got["bytes"]
    if isinstance(theirs, float):
        return "Bytes are counted: give an int"
    found = {}
    for words, other in _other_bytes(inputs):
        is_it = theirs == other and other != ours
        found[words] = found.get(words, False) or is_it
    return _reproduced(found)


LAYERS = "Each layer has keys and values of its own"
BOTH = "A token has a key and a value"
QUERY = "Only KV heads are stored: several query heads read one"
HEADS = "Each KV head has a key and a value"
WIDTH = "A key has head_dim numbers in each KV head, not d_model"
NUMBERS = "That counts numbers, not bytes"
GIVEN = "A number has bytes_per_number bytes, whatever the default is"


@reference
def _other_bytes(inputs: dict) -> list:
    """What comes of each slip: words and bytes."""
    config, size = inputs["config"], inputs["bytes_per_number"]
    names = "num_layers", "num_heads", "num_kv_heads", "d_model"
    L, H, G, C = (config[name] for name in names)
    if inputs["bits"] is not None:
        return _other_bytes_in_bits(L, H, G, C // H, size, inputs["bits"])
    if inputs["ranks"] is not None:
        return _other_bytes_of_codes(L, H, G, C // H, size, inputs["ranks"])
    D = C // H
    if size == 4 and L == H == 1:  # without the argument, and nothing else
        default = "Where bytes_per_number is not given it is 4"
        return [(default, 2 * D * other) for other in (1, 2, 8)]
    return [
        (LAYERS, 2 * G * D * size),
        (BOTH, L * G * D * size),
        (QUERY, L * 2 * H * D * size),
        (HEADS, L * 2 * D * size),
        (NUMBERS, L * 2 * G * D),
        (GIVEN, L * 2 * G * D * 4),
        # Whoever takes d_model for head_dim has failed where H is G.
        (WIDTH, L * 2 * G * C * size if H == G else None),
    ]


@reference
def _other_bytes_in_bits(L: int, H: int, G: int, D: int, size: int, bits: list) -> list:
    beside = (
        "Beside each vector, key or value, are two numbers: its scale and its zero point"
    )
    each = "Each KV head's key and value has a scale and a zero point of its own"
    scales = (
        "Scale and zero point are as they are, whatever the bits: bytes_per_number bytes "
        "each"
    )
    own = "`bits` are two numbers: those of a key, and those of a value"
    as_bits = "8 bits are a byte: divide by 8"
    shared = "Codes are packed: 8 / bits of them share a byte"
    cut = "Multiply by head_dim before you divide by 8: 4 // 8 is 0"
    instead = "A number has so many bits in place of bytes_per_number bytes, not beside"
    unused = "With `bits` each vector is packed: a number takes so many of them"
    packed = [D * b // 8 for b in bits]  # bytes of a vector
    right = [G * (n + 2 * size) for n in packed]
    found = [
        (beside, L * G * sum(packed)),
        (beside, L * G * sum(n + size for n in packed)),
        *(
            (each if G > 1 else beside, L * G * sum(packed) + number * size)
            for number in (4, 2, 4 * L, 2 * L, 2 * G * L)
            if number != 4 * G * L
        ),
        (scales, L * G * sum(n + 2 for n in packed)),
        (scales, L * G * sum(n + 8 for n in packed) if size != 4 else None),
        (scales, L * G * sum((D + 2) * b // 8 for b in bits)),
        (scales, L * G * sum((D + 2 * size) * b // 8 for b in bits)),
        (as_bits, L * G * sum(8 * n + 2 * size for n in packed)),
        (as_bits, L * G * sum(8 * n + 2 * 8 * size for n in packed)),
        (instead, L * G * sum(n * size + 2 * size for n in packed)),
        (instead, L * G * sum(8 * n * size + 2 * size for n in packed)),
        (unused, L * 2 * G * D * size),
        (LAYERS, sum(right)),
        (BOTH, L * right[0]),
        (BOTH, L * right[1]),
        (QUERY, L * sum(right) // G * H),
        (HEADS, L * sum(right) // G),
    ]
    if bits[0] != bits[1]:
        found += [(own, L * 2 * one) for one in right]
    else:  # with others 8 bits for both would give the same
        found.append((cut, L * G * sum(D * (b // 8) + 2 * size for b in bits)))
        found.append((shared, L * 2 * G * (D + 2 * size)))
    return found


@reference
def _other_bytes_of_codes(L: int, H: int, G: int, D: int, size: int, ranks: list) -> list:
    one_code = "All KV heads of a layer have one code together, however many they are"
    own = "`ranks` are two numbers: those of a key's code, and those of a value's"
    no_scale = "A code is numbers as they are: nothing stands beside it"
    instead = "A code of so many numbers is there instead of head_dim numbers"
    unused = "With `ranks` a key is a code: it takes so many numbers"
    right = sum(ranks) * size
    return [
        (one_code, L * G * right),
        (one_code, L * H * right),
        (own, L * 2 * ranks[0] * size),
        (own, L * 2 * ranks[1] * size),
        (no_scale, L * (right + 4 * size)),
        (instead, L * D * right),
        (instead, L * G * D * right),
        (unused, L * 2 * G * D * size),
        (LAYERS, right),
        (BOTH, L * ranks[0] * size),
        (BOTH, L * ranks[1] * size),
        ("A key has a code and a value has one: add them", L * math.prod(ranks) * size),
        ("sum(ranks) has both codes, a key's and a value's", 2 * L * right),
        (NUMBERS, L * sum(ranks)),
        (GIVEN, L * sum(ranks) * 4),
    ]


def pool_kv_heads_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, num_heads, head_dim, num_columns, num_kv_heads in (
        ("two heads of one number that become one", 2, 1, 2, 1),
        ("four heads of one number that become two", 4, 1, 2, 2),
        ("two heads of three numbers that become one", 2, 3, 2, 1),
        ("three heads of one number that become one", 3, 1, 2, 1),
        ("six heads that become two", 6, 2, 3, 2),
        ("six heads that become three", 6, 2, 3, 3),
        ("as many heads as before", 3, 2, 3, 3),
        ("one head that stays one", 1, 4, 2, 1),
        ("eight heads that become one", 8, 4, 5, 1),
        ("twelve heads of five numbers that become four", 12, 5, 7, 4),
        ("four heads that are to become three", 4, 2, 3, 3),
        ("two heads that are to become four", 2, 4, 3, 4),
        ("single precision", 6, 4, 5, 2),
        ("a larger matrix", 32, 16, 96, 8),
    ):
        dtype = np.float32 if name == "single precision" else np.float64
        weight = rng.normal(size=(num_heads * head_dim, num_columns)).astype(dtype)
        weight[:, 0].sort()  # so that neither the first head nor the last has all that
        weight[::-1, 1].sort()  # is largest
        heads = {"head_dim": head_dim, "num_kv_heads": num_kv_heads}
        cases.append(Case(name, {"weight": weight, **heads}))
    return cases


def pool_kv_heads_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    if expected["raised"] != "nothing":
        return KEEP_THE_CHECK
    right, theirs = expected["weight"], got["weight"]
    if not isinstance(theirs, np.ndarray):
        return None
    if theirs.shape != right.shape:
        return _why_no_pooled_shape(inputs, right, theirs)
    found = {}
    for words, other in _other_pools(**inputs):
        is_it = _is_near(theirs, other) and not _is_near(other, right)
        found[words] = found.get(words, False) or is_it
    return _reproduced(found)


def _why_no_pooled_shape(
    inputs: dict, right: np.ndarray, theirs: np.ndarray
) -> str | None:
    D, num_kv_heads = inputs["head_dim"], inputs["num_kv_heads"]
    (num_rows, C), G = inputs["weight"].shape, len(inputs["weight"]) // D
    if theirs.ndim == 2 and _is_near(theirs.T, right):
        return "Rows stay rows: each makes one number of a key"
    if theirs.size == right.size and _is_near(theirs.ravel(), right.ravel()):
        return "Lay the heads below each other again: (num_kv_heads · D, C)"
    copies = right.reshape(num_kv_heads, D, C).repeat(G // num_kv_heads, axis=0)
    if _is_near(theirs.reshape(-1), copies.reshape(-1)):
        return "One head per group: no copy for each head that went into it"
    if theirs.shape[:1] == (num_rows,) and theirs.size == num_rows * C:
        return "Of each group one head is left: the mean is over the heads of a group"
    if theirs.size == num_kv_heads * C and D > 1:
        return "The mean is over the heads of a group, not over the numbers of a head too"
    if theirs.size == G * C and D > 1:
        return "The mean is over the heads of a group, not over the numbers of a head"
    if theirs.size == num_kv_heads * D:
        return "The mean is over the heads of a group: each column stays a column"
    return None


@reference
def _other_pools(weight: np.ndarray, head_dim: int, num_kv_heads: int) -> list:
    """What comes of each slip: words and matrices of the right shape."""
    D, (num_rows, C) = head_dim, weight.shape
    G = num_rows // D
    group_size = G // num_kv_heads
    groups = weight.reshape(num_kv_heads, group_size, D, C)
    means = groups.mean(axis=1)
    neighbours = "Neighbours become one: in groups of two, heads 0 and 1, then 2 and 3"
    numbers = "A head is head_dim rows one after the other: they stay together"
    mean, same_mean = "The mean of a group, not its sum", "A mean divides by group_size"
    one = "The mean of a group, not one of its heads"
    strided = weight.reshape(group_size, num_kv_heads, D, C)
    rows = weight.reshape(num_kv_heads, D, group_size, C)
    of_strided_rows = weight.reshape(group_size, D, num_kv_heads, C)
    found = [
        (neighbours, strided.mean(axis=0)),
        (neighbours, strided[0]),
        (numbers, rows.mean(axis=2)),
        (numbers, of_strided_rows.mean(axis=0).transpose(1, 0, 2)),
        (numbers, weight.reshape(group_size, -1, C).mean(axis=0)),
        (numbers, weight.reshape(-1, group_size, C).mean(axis=1)),
        (numbers, weight.reshape(D, num_kv_heads, group_size, C).mean(axis=2)),
        (
            numbers,
            weight.reshape(D, num_kv_heads, group_size, C).mean(2).swapaxes(0, 1),
        ),
        (mean, groups.sum(axis=1)),
        (same_mean, groups.sum(axis=1) / G),
        (same_mean, groups.sum(axis=1) / group_size**0.5),
        (same_mean, groups.sum(axis=1) / 2),
        (one, groups[:, 0]),
        (one, groups[:, -1]),
        (one, weight[: num_kv_heads * D]),
        (one, weight[-num_kv_heads * D :]),
        ("The mean of a group, not its largest", groups.max(axis=1)),
        ("The mean of a group, not its median", np.median(groups, axis=1)),
        (
            "Each group has a mean of its own, not that of all heads",
            np.broadcast_to(groups.mean(axis=(0, 1)), means.shape),
        ),
    ]
    if num_kv_heads == 1:  # with one group there are no others
        found = [row for row in found if row[0] != neighbours]
    else:
        found.append((same_mean, groups.sum(axis=1) / num_kv_heads))
    if D == 1:
        found = [row for row in found if row[0] != numbers]
    shape = num_kv_heads * D, C
    return [(words, matrix.reshape(shape)) for words, matrix in found]


# Rank: rank_for, factorize


def rank_for_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    # Where shares are met exactly, squares and their sums are without rounding.
    for name, values, share in (
        ("a single value", [5.0], 0.5),
        # Of these each slip gives another rank, in one of the three.
        ("values that go down slowly", [15.0, 12.0, 11.0, 11.0, 6.0, 6.0, 6.0], 0.7),
        ("two large values", [14.0, 13.0, 4.0, 4.0, 3.0, 2.0, 1.0, 1.0], 0.75),
        ("one large value", [11.0, 2.0, 2.0, 2.0, 2.0], 0.85),
        ("eight equal values, and half of them", [2.0] * 8, 0.5),
        ("eight equal values, and a little more than half", [2.0] * 8, 0.5001),
        ("a share that is met exactly", [6.0, 4.0, 3.0, 1.0, 1.0, 1.0], 0.8125),
        ("a share of one hundredth", [6.0, 5.0, 4.0], 0.01),
        ("all of it", [7.0, 3.0, 2.0, 1.0], 1.0),
        ("all of it, and zeros at the end", [7.0, 3.0, 2.0, 0.0, 0.0], 1.0),
        ("most of it, and zeros at the end", [7.0, 3.0, 2.0, 0.0, 0.0], 0.9),
        ("one large value before many small ones", [100.0, *[2.0] * 30], 0.99),
        ("very small values", [3e-4, 2e-4, 1.5e-4, 1e-4, 0.5e-4], 0.85),
        ("very large values", [9e6, 8e6, 5e6, 2e6, 1e6], 0.85),
        ("a share of 0", [3.0, 2.0, 1.0], 0.0),
        ("a share above 1", [3.0, 2.0, 1.0], 1.25),
        ("a share below 0", [3.0, 2.0, 1.0], -0.5),
    ):
        cases.append(_rank_case(name, np.array(values), share))
    for name, num_values, dtype in (
        ("seven random values", 7, np.float64),
        ("twenty random values", 20, np.float64),
        ("single precision", 30, np.float32),
        ("300 random values", 300, np.float32),
    ):
        decay = np.exp(-3 * np.arange(num_values) / num_values)
        values = np.sort(rng.uniform(0.5, 1.5, num_values) * decay)[::-1].copy()
        cases.append(_rank_case(name, values.astype(dtype), _share(rng, values)))
    return cases


def _rank_case(name: str, values: np.ndarray, share: float) -> Case:
    return Case(name, {"singular_values": values, "share": share})


def _share(rng, values: np.ndarray) -> float:
    """A random one that no rank meets so nearly that rounding would count."""
    kept = (values**2).cumsum() / (values**2).sum()
    while True:
        share = round(float(rng.uniform(0.7, 0.97)), 4)
        if np.abs(kept - share).min() > 2e-4:
            return share


def rank_for_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    if expected["raised"] != "nothing":
        return KEEP_THE_CHECK
    ours, theirs = expected["rank"], got["rank"]
    if isinstance(theirs, (str, float)):
        return "A rank is a count, which `factorize` takes as an int: give one"
    found = {}
    for words, other in _other_ranks(**inputs):
        found[words] = found.get(words, False) or (theirs == other and other != ours)
    return _reproduced(found)


@reference
def _other_ranks(singular_values: np.ndarray, share: float) -> list:
    """What comes of each slip: words and a rank."""
    values, W = singular_values.astype(np.float64), len(singular_values)
    squares = values**2

    def least(parts: np.ndarray, least_share: float = share) -> int:
        return int((parts.cumsum() < least_share * parts.sum() * (1 - 1e-12)).sum()) + 1

    rank = least(squares)
    kept = squares.cumsum() / squares.sum()
    singles = squares / squares.sum()
    count = "The value with which the share is reached counts too: a rank is no index"
    root = "The share is of squares, not of the root of their sum"
    first = "Add up squares from the first on: no value alone is compared with the share"
    number = "The share is of what is kept, not of the number of values"
    found = [
        (count, rank - 1),
        ("What is kept is the sum of squares, not of the values", least(values)),
        (
            "Exactly the share is enough: at least, not more",
            int((kept <= share).sum()) + 1,
        ),
        (root, least(squares, share**2)),
        (root, least(squares, share**0.5)),
        (
            "The share is of what is kept, not of what is left out",
            least(squares, 1 - share),
        ),
        (
            "Square each value, then sum: not the sum's square",
            least(np.diff(values.cumsum() ** 2, prepend=0)),
        ),
    ]
    if W == 1:  # whoever has one more has failed here
        found.append(("One less is enough: the smallest rank is asked for", rank + 1))
    elif share < 1:
        smallest = "Keep the first values, the largest: the last are left out"
        found.append((smallest, least(squares[::-1])))
        found += [(number, f(share * W)) for f in (int, math.ceil, round)]
        for parts, least_part in ((singles, share), (values, share * values[0])):
            num_large = int((parts >= least_part).sum())
            found += [(first, num_large), (first, W - num_large + 1)]
    elif rank < W:
        found.append(("The smallest rank: zeros add nothing to what is kept", W))
    return found


def factorize_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    # From one singular value to the next it goes down by a third or more where the rank
    # cuts, so that what is nearest is sharp.
    for name, N, W, rank, values in (
        ("five vectors of three numbers, rank 1", 5, 3, 1, [3.0, 1.5, 0.5]),
        ("two vectors of three numbers, rank 1", 2, 3, 1, [3.0, 1.0]),
        ("two vectors of two numbers, on a line", 2, 2, 1, [5.0]),
        ("four vectors of four numbers, rank 1", 4, 4, 1, [4.0, 2.0, 1.0, 0.5]),
        ("four vectors of four numbers, rank 2", 4, 4, 2, [6.0, 4.0, 2.0, 0.5]),
        ("a single vector", 1, 5, 1, [4.0]),
        ("vectors of one number", 4, 1, 1, [4.0]),
        ("many vectors of few numbers", 40, 6, 3, [9, 7, 5, 2, 1.5, 1]),
        ("few vectors of many numbers", 5, 30, 2, [9, 7, 3, 2, 1]),
        ("vectors in a plane, rank 2", 8, 6, 2, [5.0, 3.0]),
        ("four vectors of four numbers, rank 4", 4, 4, 4, [6.0, 4.0, 2.0, 1.0]),
        ("as large a rank as there are numbers", 9, 4, 4, [6.0, 4.0, 2.0, 1.0]),
        ("as large a rank as there are vectors", 3, 7, 3, [6.0, 4.0, 2.0]),
        ("vectors that lie far from 0", 12, 5, 2, [4.0, 2.5, 1.0, 0.5, 0.2]),
        ("rank 0", 5, 4, 0, [6.0, 4.0, 2.0, 1.0]),
        ("a larger rank than there are numbers", 7, 4, 5, [6.0, 4.0, 2.0, 1.0]),
        ("a larger rank than there are vectors", 3, 6, 4, [6.0, 4.0, 2.0]),
        ("single precision", 20, 8, 3, [8, 6, 4, 0.8, 0.6, 0.4, 0.3, 0.2]),
        ("values that go down slowly", 60, 40, 7, _slow(40, 7)),
        ("1,500 vectors of 12 numbers", 1500, 12, 4, _slow(12, 4)),
    ):
        is_far = "far from 0" in name
        x = _matrix(rng, N, W, np.array(values, dtype=np.float64), is_far)
        if name == "single precision":
            x = x.astype(np.float32)
        inputs = {"x": x, "rank": rank}
        cases.append(Case(name, inputs, {"peak_bytes": _thin_limit(x)}))
    return cases


def _slow(num_values: int, rank: int) -> np.ndarray:
    """Twentieths less each, and a third less behind the rank."""
    values = 20 * 0.95 ** np.arange(num_values)
    values[rank:] *= 0.7
    return values


def _matrix(rng, N: int, W: int, values: np.ndarray, is_far: bool) -> np.ndarray:
    """A random matrix (N, W) with about these singular values. is_far: all vectors have
    much in common."""
    values = values * rng.uniform(0.97, 1.03, size=len(values))
    shapes = (N, len(values)), (W, len(values))
    left, right = (rng.normal(size=shape) for shape in shapes)
    if is_far:
        left[:, 0] = 1
    left, right = (np.linalg.qr(matrix)[0] for matrix in (left, right))
    return left * values @ right.T


def _thin_limit(x: np.ndarray) -> int:
    """Room for copies of x and for matrices (W, W), of all numbers with all: not for a
    matrix (N, N), of all vectors with all."""
    return 12 * x.nbytes + 12 * x.itemsize * x.shape[1] ** 2 + 16384


CENTRED = "Do not subtract the mean: the product is to be near x itself"
TURNED = "Directions are the rows of Vh, or the columns of V: not the rows of V, nor of U"


def factorize_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    if expected["raised"] != "nothing":
        return KEEP_THE_CHECK
    names = "codes", "basis"
    if any(got.get(name) != expected[name] for name in names):
        return _why_other_matrices(inputs, *(got.get(name, "") for name in names))
    products = "codes @ basis", "basis @ basis.T", "basis.T @ basis"
    is_right = {name: _is_near(got[name], expected[name]) for name in products}
    if all(is_right.values()):
        return (
            "That takes the memory of a matrix (N, N), of all vectors with all: if it is "
            "svd's, ask for full_matrices=False"
        )
    if not is_right["basis @ basis.T"]:
        if is_right["codes @ basis"]:
            return (
                "Rows of the basis have length 1 and are at right angles to each other: "
                "the singular values belong in the codes"
            )
        return _why_not_orthonormal(inputs, got)
    if is_right["basis.T @ basis"]:
        mean = inputs["x"].mean(axis=0) @ expected["basis.T @ basis"]
        if _is_near(got["codes @ basis"] + mean, expected["codes @ basis"]):
            return CENTRED
        return (
            "The code of a vector is its product with each row of the basis: x @ basis.T"
        )
    found = {}
    plane = got["basis.T @ basis"]
    for words, other in _other_planes(**inputs):
        is_it = _is_near(plane, other)
        if words == TURNED:  # whoever mixes these up mixes up signs, which are free
            is_it = _is_near(np.abs(plane), np.abs(other))
        found[words] = found.get(words, False) or is_it
    return _reproduced(found)


def _why_other_matrices(inputs: dict, codes: str, basis: str) -> str | None:
    """Of shapes and dtypes, in words as of the driver."""
    (N, W), rank, dtype = inputs["x"].shape, inputs["rank"], inputs["x"].dtype
    shapes = [text.partition(" of shape ")[2] for text in (codes, basis)]
    right = [f"{(N, rank)}", f"{(rank, W)}"]
    if not shapes[0] or not shapes[1]:
        return "Return two tensors: codes, basis"
    if shapes == right:
        return f"Codes and basis are {dtype}, as x is"
    if shapes == right[::-1]:
        return "Codes first, then the basis"
    full = [f"{(N, min(N, W))}", f"{(min(N, W), W)}", f"{(N, N)}", f"{(W, W)}"]
    if rank < min(N, W) and shapes[0] in full and shapes[1] in full:
        return "Keep the first `rank` directions alone, of codes and basis"
    if shapes == [right[0], f"{(W, rank)}"]:
        return "A direction is a row of the basis, a column of V: transpose it"
    if shapes == [f"{(rank, N)}", right[1]]:
        return "A token's code is a row of the codes: transpose them"
    return None


def _why_not_orthonormal(inputs: dict, got: dict) -> str | None:
    products = got["basis @ basis.T"]
    if np.allclose(products, np.eye(len(products)), atol=1e-4):
        return f"Compute in {inputs['x'].dtype}, as x is"
    lengths = np.diag(products)
    if _is_near(lengths, np.ones_like(lengths)):
        return "Rows of the basis are at right angles to each other too"
    if inputs["x"].shape[0] >= len(lengths) > 0:
        return "Rows of the basis have length 1 and are at right angles to each other"
    return None


@reference
def _other_planes(x: np.ndarray, rank: int) -> list:
    """What comes of each slip: words, and basis.T @ basis, the projection on the plane of
    the basis."""
    (N, W), mean = x.shape, x.mean(axis=0)
    U, _, Vh = np.linalg.svd(x, full_matrices=False)
    smallest = "The directions to keep are those of the largest singular values"
    first = "Rows or columns of x span no nearest plane: take its singular vectors"
    bases = [
        (smallest, Vh[-rank:]),
        (CENTRED, np.linalg.svd(x - mean, full_matrices=False)[2][:rank]),
        (first, np.linalg.qr(x[:rank].T)[0].T),
        (first, np.eye(W)[:rank]),
        (first, np.eye(W)[np.argsort(-np.linalg.norm(x, axis=0))[:rank]]),
    ]
    if len(Vh) == W:
        bases += [(TURNED, Vh.T[:rank]), (TURNED, Vh.T[:rank, ::-1])]
    if N == W:
        bases += [(TURNED, U.T[:rank]), (TURNED, U[:rank])]
    return [(words, basis.T @ basis) for words, basis in bases]


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
        ("numbers almost halfway between two steps", 8, (3, 24)),
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
        # So many that it shows who is slow: the page quantizes many more.
        ("4 bits, 1,000 tokens, three heads", 4, (1000, 3, 16)),
    ):
        x = _between_steps(rng, shape, bits, 0.49 if "halfway" in name else 0.4)
        if name.startswith("a first"):
            x = -np.sort(-x)
        if "below 0" in name:
            x -= x.max() + rng.uniform(0.1, 1)
        if "far from 0" in name:
            x += 1e4 * rng.uniform(1, 2)
        if "very small" in name:
            x *= 255e-8 * rng.uniform(0.8, 0.9) / (x.max() - x.min())
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


def _between_steps(rng, shape: tuple[int, ...], bits: int, farthest: float) -> np.ndarray:
    """Random vectors of which no number is as near to one step as to another: each is
    `farthest` of a step away from its own at most, so that no rounding decides.

    Some lie below their step, some above, some far from it. So it shows who cuts where we
    round, and who rounds the zero point: that is a quarter of a step away from where
    steps that are counted from 0 would lie. Neighbours differ, so that their order shows.
    """
    (*leading, D), last = shape, 2**bits - 1
    near, far = rng.uniform(0.1, 0.2, shape), rng.uniform(farthest - 0.1, farthest, shape)
    kinds = np.choose(np.arange(D) % 4, [far, -near, -far, near])
    steps = np.broadcast_to(np.arange(1, last), (*leading, last - 1))
    steps = rng.permuted(steps, axis=-1)[..., np.arange(D) % (last - 1)]
    places = steps + kinds
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
    larger = _codes_of_larger_scales(x, bits, scale) if scale.max() < 1e-8 else []
    if any(np.array_equal(theirs, other) for other in larger):
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
    return _reproduced(
        {
            words: any(all(map(_is_near, theirs, other)) for other in others)
            for words, others in _other_numbers(x, bits, scale, zero).items()
        }
    )


@reference
def _other_numbers(x: np.ndarray, bits: int, scale: np.ndarray, zero: np.ndarray) -> dict:
    """What to say -> wrong pairs of scale and zero point."""
    low, high = (f(x, axis=-1, keepdims=True) for f in (np.min, np.max))
    with np.errstate(all="ignore"):
        zeros = [-low, high, (low + high) / 2, 0 * low, low / scale, -low / scale]
        zeros += [np.round(low / scale), np.round(-low / scale)]
        return {
            STEPS: [[(high - low) / 2**bits, zero]],
            "In this order: codes, scale, zero": [[zero, scale]],
            "The scale is the size of one step": [[1 / scale, zero], [high - low, zero]],
            "The zero point is the vector's smallest number itself": [
                [scale, other] for other in zeros
            ],
        }


@reference
def _codes_of_larger_scales(x: np.ndarray, bits: int, scale: np.ndarray) -> list:
    """As of whoever adds a small number to each scale, or takes that for the least."""
    steps = x - x.min(axis=-1, keepdims=True)
    return [
        _pack(np.round(steps / larger), bits)
        for small in (*(10.0**-n for n in range(1, 13)), np.finfo(np.float32).eps)
        for larger in (scale + small, np.maximum(scale, small))
    ]


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
        if name.startswith("one byte"):  # that would have a sign, and is not the middle
            codes[:] = rng.integers(129, 255)
        if name.startswith("two bytes"):  # other numbers in all of their parts
            codes[:] = _bytes_without_a_twin(rng)
        if "255" in name:
            codes[:] = 255
        if "every byte" in name:
            codes = rng.permutation(256).astype(np.uint8)
        of_each = *shape[:-1], 1
        scale = rng.uniform(0.1, 2, size=of_each)
        zero = rng.normal(size=of_each) - 2
        if "scale of 0" in name:
            scale[:] = 0
        if "half" in name:  # all is exact, in whatever order it is computed
            scale, zero = np.ceil(8 * scale) / 8, np.ceil(8 * zero) / 8
        inputs = {
            "codes": codes,
            "scale": scale.astype(dtype),
            "zero": zero.astype(dtype),
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
        ("scores far above 0", (3, 3), (2, 2, 4), (3, 2)),
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
            _set_scores(q, k_codes, k_basis)
            k_codes[:-1, 0] = -60
            v_codes[1:] *= 1e200  # so large that a weight of exp(-400) shows
        if "far above" in name:  # exp of them is more than a number can be
            _set_scores(q, k_codes, k_basis)
            k_codes[:, 0] += 90
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


def _set_scores(q, k_codes, k_basis):
    """Let scores, for D = 4, be near 10 times the first number of a key's code."""
    q /= 10
    q[..., 0] += 20
    k_codes /= 10
    k_basis[0] = 0
    k_basis[0, :, 0] = 1


def _latent_limits(inputs: dict) -> dict[str, float]:
    """Room for some copies of the codes, of scores, and of a basis for each query: not,
    in a text long enough to tell, for a key of one head for each token. No tensor is
    larger than one of these. And all that is made one after the other is less than the
    keys, or values, of all heads."""
    (T, H, D), (S, R) = inputs["q"].shape, inputs["k_codes"].shape
    W, size = inputs["v_codes"].shape[1], inputs["q"].itemsize
    codes, scores, bases = S * (R + W), S * T * H, T * (R + W) * H * D
    of_queries = T * H * (R + W + D)
    at_once = 2 * codes + 6 * scores + 2 * bases + 8 * of_queries
    in_all = 4 * codes + (12 + 2 * (R + W)) * scores + 6 * bases + 24 * of_queries
    largest = max(S * max(R, W, T * H), T * H * D * max(R, W))
    return {
        "peak_bytes": size * at_once + 4096,
        "largest_tensor_bytes": size * largest + 1024,
        "bytes_made": size * in_all + 16384,
    }


def attend_latent_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    out, right = got["out"], expected["out"]
    if not isinstance(out, np.ndarray):
        return None
    with np.errstate(all="ignore"):
        sums = _latent(inputs, is_back=False)
        if out.shape != right.shape:
            return _why_no_output(sums, right, out)
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


def _why_no_output(sums, right: np.ndarray, out: np.ndarray) -> str | None:
    if _is_near(out, sums):
        return GO_BACK
    if _is_near(out.swapaxes(0, 1), right):
        return "Put tokens before heads again: out has the shape of q"
    return None


def _why_so_many_bytes(inputs: dict, got: dict) -> str | None:
    """Of an answer whose out is right."""
    (S, R), (_, G, D) = inputs["k_codes"].shape, inputs["v_basis"].shape
    W, size = inputs["v_codes"].shape[1], got["out"].itemsize
    absorb = (
        "turn each query into the codes' coordinates, and compare that with codes; sum "
        "up codes, and go through v_basis once per query"
    )
    if got["largest_tensor_bytes"] >= S * D * size:
        return f"That is room for keys or values of D numbers per token: {absorb}"
    if got["bytes_made"] >= S * G * D * size:
        return f"Keys or values are made, if not all at a time: {absorb}"
    if got["largest_tensor_bytes"] >= 2 * S * max(R, W) * size:
        return "All heads read the same codes, as they are: no copies"
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
        "lib.kv_heads.bytes_per_token", 1, bytes_per_token_cases, bytes_per_token_explain
    ),
    Exercise("lib.kv_heads.pool_kv_heads", 2, pool_kv_heads_cases, pool_kv_heads_explain),
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
            "ZeroDivisionError": "A uint8 does not hold 256: it becomes 0, and nothing "
            "can be divided by that. Keep the lowest bits by & instead",
            "view size is not compatible": "A tensor need not lie in memory in the order "
            "of its shape: unflatten, flatten and reshape take any",
        },
    ),
    Exercise("lib.latent_kv_cache.rank_for", 1, rank_for_cases, rank_for_explain),
    Exercise(
        "lib.latent_kv_cache.factorize",
        2,
        factorize_cases,
        factorize_explain,
        errors={
            "shapes cannot be multiplied": "x is (N, W), and the basis (rank, W): for "
            "codes multiply x by the basis transposed"
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
