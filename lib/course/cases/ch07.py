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


@reference
def _other_bytes(inputs: dict) -> list:
    """What comes of each slip: words and bytes."""
    config, size = inputs["config"], inputs["bytes_per_number"]
    L, H, G = (config[name] for name in ("num_layers", "num_heads", "num_kv_heads"))
    D, bits, ranks = config["d_model"] // H, inputs["bits"], inputs["ranks"]
    layers = "Each layer has keys and values of its own"
    both = "A token has a key and a value"
    query = "Only KV heads are stored: several query heads read one"
    width = "A key has head_dim numbers in each KV head, not d_model"
    numbers = "That counts numbers, not bytes"
    given = "A number has bytes_per_number bytes, whatever the default is"
    default = "Where bytes_per_number is not given it is 4"
    heads = "Each KV head has a key and a value"
    if bits is not None:
        first, second = bits
        packed = [D * b // 8 for b in bits]  # bytes of a vector
        beside = (
            "Beside each vector, key or value, are two numbers: its scale and its zero "
            "point"
        )
        each = "Each KV head's key and value has a scale and a zero point of its own"
        as_bits = "8 bits are a byte: divide by 8"
        scales = (
            "Scale and zero point are as they are, whatever the bits: bytes_per_number "
            "bytes each"
        )
        own = "bits has two numbers: of a key, and of a value"
        all_bits = "Multiply by head_dim before you divide by 8: // cuts off"
        replaced = "A number has `bits` bits, and bytes_per_number no more"
        right = G * sum(n + 2 * size for n in packed)
        one_width = []
        if first == second:  # with others 8 bits for both would give the same
            cut = L * G * sum(D * (b // 8) + 2 * size for b in bits)
            one_width = [(all_bits, cut)]
        return [
            (beside, L * G * sum(packed)),
            (beside, L * G * sum(n + size for n in packed)),
            *(
                (each if G > 1 else beside, L * G * sum(packed) + number * size)
                for number in (4, 2, 4 * L, 2 * L, 2 * G * L)
                if number != 4 * G * L
            ),
            (as_bits, L * G * sum(8 * n + 2 * size for n in packed)),
            (as_bits, L * G * sum(8 * n + 2 * 8 * size for n in packed)),
            (scales, L * G * sum(n + 2 for n in packed)),
            (scales, L * G * sum(n + 8 for n in packed) if size != 4 else None),
            (own, L * 2 * G * (packed[0] + 2 * size) if first != second else None),
            (own, L * 2 * G * (packed[1] + 2 * size) if first != second else None),
            *one_width,
            (replaced, L * G * sum(n * size + 2 * size for n in packed)),
            (replaced, L * G * sum(8 * n * size + 2 * size for n in packed)),
            (scales, L * G * sum((D + 2) * b // 8 for b in bits)),
            (scales, L * G * sum((D + 2 * size) * b // 8 for b in bits)),
            (layers, right),
            (both, L * G * (packed[0] + 2 * size)),
            (both, L * G * (packed[1] + 2 * size)),
            (query, L * right // G * H),
            (heads, L * right // G),
            (width, L * G * sum(H * n + 2 * size for n in packed)),
            ("`bits` are those of the cache: look at them", L * 2 * G * D * size),
        ]
    if ranks is not None:
        one_code = "All KV heads of a layer have one code together, however many they are"
        own = "ranks has two numbers: of a key's code, and of a value's"
        no_scale = "A code is numbers as they are: nothing stands beside it"
        instead = "A code of so many numbers is there instead of head_dim numbers"
        right = sum(ranks) * size
        return [
            (one_code, L * G * right),
            (one_code, L * H * right),
            (own, L * 2 * ranks[0] * size),
            (own, L * 2 * ranks[1] * size),
            (no_scale, L * (right + 4 * size)),
            (instead, L * D * right),
            (instead, L * G * D * right),
            (layers, right),
            (both, L * ranks[0] * size),
            (both, L * ranks[1] * size),
            ("Each has a code of its own: add the two", L * math.prod(ranks) * size),
            ("The sum is that of both: a key's code and a value's", 2 * L * right),
            (numbers, L * sum(ranks)),
            (given, L * sum(ranks) * 4),
            ("`ranks` are those of the cache: look at them", L * 2 * G * D * size),
        ]
    plain = [
        (layers, 2 * G * D * size),
        (both, L * G * D * size),
        (query, L * 2 * H * D * size),
        (heads, L * 2 * D * size),
        (numbers, L * 2 * G * D),
        (given, L * 2 * G * D * 4),
    ]
    if H == G:  # whoever takes d_model for head_dim has failed where H is G
        plain.append((width, L * 2 * G * H * D * size))
    if size == 4 and L == H == 1:  # without the argument, and nothing else
        plain = [(default, 2 * D * other) for other in (1, 2, 8)]
    return plain


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
        return _why_another_shape(inputs, right, theirs)
    found = {}
    for words, other in _other_pools(**inputs):
        is_it = _is_near(theirs, other) and not _is_near(other, right)
        found[words] = found.get(words, False) or is_it
    return _reproduced(found)


def _why_another_shape(inputs: dict, right: np.ndarray, theirs: np.ndarray) -> str | None:
    D, num_kv_heads = inputs["head_dim"], inputs["num_kv_heads"]
    (num_rows, C), G = inputs["weight"].shape, len(inputs["weight"]) // D
    if theirs.ndim == 2 and _is_near(theirs.T, right):
        return "A row makes a number of a key: it stays a row"
    if theirs.size == right.size and _is_near(theirs.ravel(), right.ravel()):
        return "Lay the heads below each other again: (num_kv_heads · D, C)"
    copies = right.reshape(num_kv_heads, D, C).repeat(G // num_kv_heads, axis=0)
    if _is_near(theirs.reshape(-1), copies.reshape(-1)):
        return "One head for each group: no copy for each that went into it"
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
    neighbours = "Neighbours become one: with two to a group heads 0 and 1, then 2 and 3"
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
    """A random one at which neither a slip nor rounding finds what is right by chance:
    on the way there are several ranks, and none is near."""
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
        return "A rank is a count, which factorize takes as an int of Python"
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
        return int((parts.cumsum() < least_share * parts.sum() - 1e-12).sum()) + 1

    rank = least(squares)
    kept = squares.cumsum() / squares.sum()
    singles = squares / squares.sum()
    count = "The value with which the share is reached counts too: a rank is no place"
    root = "The share is of squares, not of the root of their sum"
    first = "A rank is enough if all that it keeps, the first values together, is"
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
        ("That keeps what need not be kept, and no more", least(squares, 1 - share)),
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
                "Rows of the basis have length 1 and are at right angles: the "
                "singular values belong in the codes"
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
        return "Rows of the basis are at right angles too"
    if inputs["x"].shape[0] >= len(lengths) > 0:
        return "Rows of the basis must have length 1, and are at right angles"
    return None


@reference
def _other_planes(x: np.ndarray, rank: int) -> list:
    """What comes of each slip: words, and basis.T @ basis, the projection on the plane of
    the basis."""
    (N, W), mean = x.shape, x.mean(axis=0)
    U, _, Vh = np.linalg.svd(x, full_matrices=False)
    smallest = "The directions to keep are those of the largest singular values"
    first = "The nearest plane is none of x's own rows, nor of its columns: take the svd"
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


EXERCISES = [
    Exercise(
        "lib.kv_heads.bytes_per_token", 1, bytes_per_token_cases, bytes_per_token_explain
    ),
    Exercise("lib.kv_heads.pool_kv_heads", 2, pool_kv_heads_cases, pool_kv_heads_explain),
    Exercise("lib.latent_kv_cache.rank_for", 1, rank_for_cases, rank_for_explain),
    Exercise("lib.latent_kv_cache.factorize", 2, factorize_cases, factorize_explain),
]
