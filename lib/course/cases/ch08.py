"""Chapter 8: what its exercises are tried on."""

import math

import numpy as np

from lib.course.cases.ch01 import _reproduced
from lib.course.cases.ch03 import _is_near
from lib.course.exercises import Case, Exercise
from lib.course.shipped import reference

KEEP_THE_CHECK = "Keep the given lines: they refuse this"
# What a call leaves to its default, and what that is.
DEFAULTS = {"num_sinks": 4, "window": 8, "width": 5, "beta": 20}


def _which(theirs, right, others: list) -> str | None:
    """Of pairs of words and what comes of a slip, the words for the one that was got."""
    found = {}
    for words, other in others:
        is_it = _is_same(theirs, other) and not _is_same(other, right)
        found[words] = found.get(words, False) or is_it
    return _reproduced(found)


def _is_same(one, other) -> bool:
    if not isinstance(one, np.ndarray) or not isinstance(other, np.ndarray):
        return type(one) is type(other) and one == other
    if one.dtype.kind != "f":
        return np.array_equal(one, other)
    return _is_near(one, other)


def _chosen(inputs: dict, name: str) -> int:
    """What an argument is, where it is left to its default too."""
    return DEFAULTS[name] if inputs[name] is None else inputs[name]


# keep_recent


def keep_recent_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, seq_len, budget, num_sinks in (
        ("nine tokens of which five are kept", 9, 5, 2),
        ("one recent token", 8, 3, 2),
        ("one token more than are kept", 6, 5, 2),
        ("two tokens more than are kept", 8, 6, 3),
        ("no sinks", 6, 2, 0),
        ("no sinks, and a single token that is kept", 6, 1, 0),
        ("as many tokens as may be kept", 5, 5, 2),
        ("fewer tokens than may be kept", 3, 8, 2),
        ("fewer tokens than sinks", 2, 6, 3),
        ("a single token", 1, 3, 1),
        ("no tokens", 0, 3, 1),
        ("four sinks, which is the default", 12, 7, None),
        ("a budget as large as the sinks", 9, 3, 3),
        ("a budget below the sinks", 9, 2, 3),
        ("a budget of 0, and no sinks", 9, 0, 0),
        ("less than no sinks", 9, 4, -1),
        ("a short text, and a budget below the sinks", 2, 3, 4),
        ("a text of 3,000 tokens", 3000, 512, 4),
    ):
        cases.append(_recent_case(name, seq_len, budget, num_sinks))
    num_sinks = int(rng.integers(1, 9))
    budget = num_sinks + int(rng.integers(2, 20))
    seq_len = budget + int(rng.integers(2, 50))
    cases.append(_recent_case("random numbers", seq_len, budget, num_sinks))
    return cases


def _recent_case(name: str, seq_len: int, budget: int, num_sinks: int | None) -> Case:
    counts = {"seq_len": seq_len, "budget": budget, "num_sinks": num_sinks}
    return Case(name, counts)


def keep_recent_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    if expected["raised"] != "nothing":
        return KEEP_THE_CHECK
    right, theirs = expected["kept"], got["kept"]
    others = _other_recent(**inputs)
    if not isinstance(theirs, np.ndarray):
        return None
    if theirs.dtype == bool:
        return "Places, not a mask: the numbers of the tokens that are kept"
    if theirs.shape == right.shape and np.array_equal(np.sort(theirs), right):
        return "In the order of the text"
    if (theirs < 0).any():
        return "A text that fits into the budget is kept as it is: no place is below 0"
    if theirs.ndim == 1 and len({*theirs.tolist()}) < len(theirs):
        return "No token twice: a text that fits into the budget is kept as it is"
    return _which(theirs, right, others)


@reference
def _other_recent(seq_len: int, budget: int, num_sinks: int | None) -> list:
    """What comes of each slip: words and places."""
    S, places = seq_len, np.arange(seq_len)
    sinks = 4 if num_sinks is None else num_sinks
    recent = budget - sinks
    stay = "The first num_sinks tokens stay too: attention needs them"
    within = "Sinks count in the budget: behind them budget - num_sinks are left"
    last = "Behind the sinks come the last tokens of the text, not those that follow"
    newest = "The newest token, seq_len - 1, is kept too"
    exactly = "Of a longer text exactly `budget` tokens are kept"
    fits = "A text that fits into the budget is kept as it is"
    none = "`[-0:]` is all of a list: ask for the first place instead"
    first_place = "The first token is at place 0"
    if budget >= S:
        return [
            (fits, places[max(S - recent, 0) :]),
            (fits, places[:sinks]),
            (fits, places[:0]),
            ("A text has no more places than tokens", np.arange(budget)),
        ]
    found = [
        (stay, places[S - budget :]),
        (stay, places[S - recent :]),
        # As all of a text that is a little longer it would be another's slip too.
        (within, np.append(places[:sinks], places[S - budget :])),
        (last, places[:budget]),
        ("The last tokens are kept too", places[:sinks]),
        (newest, np.append(places[:sinks], np.arange(S - recent - 1, S - 1))),
        (newest, np.append(places[:sinks], np.arange(S - recent, S - 1))),
        (exactly, np.append(places[:sinks], np.arange(S - recent - 1, S))),
        (exactly, np.append(places[:sinks], np.arange(S - recent + 1, S))),
        (exactly, places),
        (first_place, np.append(places[:sinks], np.arange(S - recent, S)) + 1),
    ]
    if sinks == 0:
        found = [row for row in found if row[0] != exactly]
        found.append((none, places))
    if num_sinks is None:  # all else has failed before
        words = "Where num_sinks is not given it is 4"
        return [
            (words, np.append(places[:n], np.arange(S - budget + n, S)))
            for n in (0, 1, 2, 3, 5, 6)
        ]
    return found


# attention_received


def attention_received_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    # First cases in which a slip stands alone.
    for name, (H, T, S), G in (
        ("one head, one query over three tokens", (1, 1, 3), 1),
        ("one head, two queries over four tokens", (1, 2, 4), 1),
        ("three query heads on one KV head, one query", (3, 1, 4), 1),
        ("three query heads on three KV heads, one query", (3, 1, 4), 3),
        ("four query heads on two KV heads, one query", (4, 1, 5), 2),
        ("four query heads on two KV heads, three queries", (4, 3, 5), 2),
        ("six query heads on three KV heads", (6, 2, 5), 3),
        ("six query heads on two KV heads", (6, 4, 7), 2),
        ("a whole prompt: five queries, five tokens", (2, 5, 5), 1),
        ("as many query heads as queries and tokens", (4, 4, 4), 2),
        ("a single token", (4, 1, 1), 2),
        ("single precision", (6, 5, 9), 2),
        ("random sizes", *_random_heads(rng)),
        ("60 queries over 120 tokens", (8, 60, 120), 2),
    ):
        weights = _attention(rng, H, T, S)
        if name == "single precision":
            weights = weights.astype(np.float32)
        cases.append(Case(name, {"weights": weights, "num_kv_heads": G}))
    return cases


def _random_heads(rng) -> tuple[tuple[int, int, int], int]:
    G, group_size, T = (int(n) for n in rng.integers(2, 5, size=3))
    return (G * group_size, T, T + int(rng.integers(1, 9))), G


def _attention(rng, H: int, T: int, S: int) -> np.ndarray:
    """Weights (H, T, S) of the newest T of S tokens: what comes later has 0."""
    weights = np.exp(1.5 * rng.normal(size=(H, T, S)))
    weights *= np.tri(T, S, S - T)
    return weights / weights.sum(axis=-1, keepdims=True)


ONE_PER_KV_HEAD = (
    "One row per KV head, (G, S), not per query head: query heads that read one KV head "
    "keep the same tokens. Where each keeps its own the keys have to be repeated first, "
    "and grouped heads save nothing"
)
NEIGHBOURS = (
    "Neighbours read one KV head: in groups of two, heads 0 and 1, then heads 2 and 3"
)


def attention_received_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    right, theirs = expected["received"], got["received"]
    others = _other_received(**inputs)
    if not isinstance(theirs, np.ndarray):
        return None
    if theirs.shape == right.shape:
        return _which(theirs, right, others)
    (H, T, S), (G, _) = inputs["weights"].shape, right.shape
    if theirs.shape in ((H, S), (S, H)) and H != G:
        return ONE_PER_KV_HEAD
    if theirs.shape == (S, G) and _is_near(theirs.T, right):
        return "A row for each KV head, a column for each token: (G, S)"
    if theirs.shape in ((G, T), (H, T), (T,)):
        return (
            "Sum over the queries, not over the tokens that they look at: all attention "
            "of a query together is 1"
        )
    of_heads = theirs.shape in ((G, H // G, S), (H // G, G, S))
    of_queries = theirs.shape in ((G, T, S), (H, T, S))
    if of_heads and of_queries:
        return "One number per KV head and token: (G, S)"
    if of_heads:
        return "The mean over the query heads of a group leaves one row per KV head"
    if of_queries:
        return "Sum over the queries: one number per token"
    if theirs.shape == (S,):
        return "Each KV head has a row of its own: the mean is over its query heads"
    return None


@reference
def _other_received(weights: np.ndarray, num_kv_heads: int) -> list:
    """What comes of each slip: words, and scores of the right shape."""
    (H, T, S), G = weights.shape, num_kv_heads
    group_size = H // G
    grouped = weights.reshape(G, group_size, T, S)
    seen = grouped.sum(axis=2)  # (G, H / G, S)
    turns = weights.sum(axis=1).reshape(group_size, G, S).swapaxes(0, 1)
    right = seen.mean(axis=1)
    of_all = "A KV head's score is the mean over its own query heads, not over all"
    not_divided = (
        "Attention is summed over the queries: it is not divided by their number"
    )
    mean = "The mean over the query heads of a group, not their sum"
    size = "The mean over a group divides by its size, H / G"
    able = "It is summed over the queries, however many of them can see a token"
    can_see = np.tri(T, S, S - T).sum(axis=0)
    one = "The mean over the query heads of a group, not one of them"
    found = [
        (not_divided, right / T),
        (not_divided, right / right.sum(axis=-1, keepdims=True)),
        (not_divided, right / S),
        (able, right / can_see),
        ("All queries count, not the last one alone", grouped[:, :, -1].mean(axis=1)),
        ("All queries count, not the first one alone", grouped[:, :, 0].mean(axis=1)),
        ("Attention is summed over the queries: not its largest", grouped.max(2).mean(1)),
        (mean, seen.sum(axis=1)),
        ("The mean over the query heads of a group, not the largest", seen.max(axis=1)),
        (one, seen[:, 0]),
        (one, seen[:, -1]),
        (NEIGHBOURS, turns.mean(axis=1)),
        (of_all, np.broadcast_to(right.mean(axis=0), right.shape)),
        (of_all, np.broadcast_to(right.sum(axis=0), right.shape)),
    ]
    if group_size > 1:
        found.append((not_divided, seen.sum(axis=1) / (T * group_size)))
    if G > 1:
        found += [(size, seen.sum(axis=1) / H), (size, seen.sum(axis=1) / G)]
    if T == S:
        alone = "Sum over the queries, not over the tokens that they look at"
        found.append((alone, grouped.sum(axis=3).mean(axis=1)))
    if T == 1:
        found = [row for row in found if row[0] not in (not_divided, able)]
    return found


# snap_scores


def snap_scores_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, (H, T, S), G, window, width in (
        ("one query over five tokens, each on its own", (1, 1, 5), 1, 1, 1),
        ("a window of two, each token on its own", (1, 2, 6), 1, 2, 1),
        ("five queries, of which two are the window", (1, 5, 8), 1, 2, 1),
        ("three neighbours", (1, 1, 7), 1, 1, 3),
        ("five neighbours", (1, 1, 8), 1, 1, 5),
        ("a window of two, three neighbours", (1, 2, 8), 1, 2, 3),
        ("three query heads on one KV head", (3, 2, 7), 1, 2, 5),
        ("four query heads on two KV heads", (4, 2, 7), 2, 2, 3),
        ("six query heads on three KV heads, all queries", (6, 9, 9), 3, 3, 5),
        ("fewer queries than the window", (2, 3, 10), 1, 4, 3),
        ("more neighbours than tokens before the window", (2, 3, 4), 2, 2, 5),
        ("one token before the window", (2, 3, 3), 1, 2, 3),
        ("a text as long as the window", (2, 4, 4), 2, 4, 3),
        ("a text shorter than the window", (4, 3, 3), 2, 5, 3),
        ("a text shorter than the window, in steps", (2, 2, 4), 1, 6, 5),
        ("a window of 8, which is the default", (2, 12, 16), 1, None, 3),
        ("five neighbours, which is the default", (2, 4, 16), 1, 3, None),
        ("two neighbours", (1, 2, 8), 1, 2, 2),
        ("four neighbours, and a text as long as the window", (2, 3, 3), 1, 3, 4),
        ("no neighbour", (1, 2, 8), 1, 2, 0),
        ("single precision", (4, 6, 20), 2, 4, 5),
        ("random sizes", *_random_snap(rng)),
        ("16 queries over 400 tokens", (8, 16, 400), 4, 12, 7),
    ):
        weights = _attention(rng, H, T, S)
        if name == "single precision":
            weights = weights.astype(np.float32)
        options = {"num_kv_heads": G, "window": window, "width": width}
        cases.append(Case(name, {"weights": weights, **options}))
    return cases


def _random_snap(rng) -> tuple[tuple[int, int, int], int, int, int]:
    (H, T, S), G = _random_heads(rng)
    return (H, T, S + 8), G, int(rng.integers(2, 6)), int(rng.choice([3, 5]))


POOL = "Each score is replaced by the mean over `width` neighbours"
MIDDLE = "It stands in the middle of its neighbours: as many before it as behind it"
EDGE = "Where there are no neighbours are zeros, which count: divide by width everywhere"
LAST_QUERIES = "The last `window` queries alone say what is needed"
BEFORE_ALONE = "The window's own tokens need no score, they stay: leave them out"
LEAVE_OUT_FIRST = (
    "Leave out the window's own tokens first, then take the mean of neighbours"
)
SUM_OF_QUERIES = "Attention is summed over the queries of the window: not divided"
# What to say of the slips of `_snapped`, and these.
SNAP_SLIPS = [
    (LAST_QUERIES, {"queries": "all"}),
    (LAST_QUERIES, {"queries": "first"}),
    (LAST_QUERIES, {"queries": "before"}),
    (
        "All of the last `window` queries count, not the last one alone",
        {"queries": "one"},
    ),
    (BEFORE_ALONE, {"leave": "never"}),
    (BEFORE_ALONE, {"leave": "never", "pool": "none"}),
    (LEAVE_OUT_FIRST, {"leave": "after"}),
    (
        "The window are the last tokens: leave those out, not the first",
        {"leave": "front"},
    ),
    (
        "Before the window are S - window tokens, and never less than 0",
        {"leave": "below"},
    ),
    ("One token for each place before the window: S - window", {"leave": "one less"}),
    (POOL, {"pool": "none"}),
    (POOL, {"pool": "across heads"}),
    ("The mean over neighbours, not the largest of them", {"pool": "max"}),
    ("The mean over neighbours, not their sum", {"pool": "sum"}),
    ("The mean over neighbours, not their median", {"pool": "median"}),
    (MIDDLE, {"pool": "behind"}),
    (MIDDLE, {"pool": "ahead"}),
    (
        "Pad with width // 2 zeros on both sides: no token loses its score",
        {"pool": "short"},
    ),
    (EDGE, {"pool": "real"}),
    (EDGE, {"pool": "copied"}),
    (EDGE, {"pool": "mirrored"}),
    (
        "`width` counts the token itself and both sides together",
        {"pool": "twice as wide"},
    ),
    (SUM_OF_QUERIES, {"over": "mean"}),
    ("Attention is summed over the queries: not its largest", {"over": "max"}),
    ("The mean over the query heads of a group, not their sum", {"heads": "sum"}),
    ("The mean over the query heads of a group, not the largest", {"heads": "max"}),
    ("The mean over the query heads of a group, not one of them", {"heads": "first"}),
    ("Each KV head has a row of its own", {"heads": "of all"}),
    (NEIGHBOURS, {"groups": "turns"}),
]


def snap_scores_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    if expected["raised"] != "nothing":
        return KEEP_THE_CHECK
    right, theirs = expected["scores"], got["scores"]
    slips = SNAP_SLIPS
    for name, others in (("window", (4, 7, 16, 32)), ("width", (1, 3, 7, 9, 13))):
        if inputs[name] is None:
            words = f"Where {name} is not given it is {DEFAULTS[name]}"
            slips = [(words, {name: other}) for other in others]
    others = [(words, _snapped(inputs, **slip)) for words, slip in slips]
    if not isinstance(theirs, np.ndarray):
        return None
    (H, _, S), (G, num_before) = inputs["weights"].shape, right.shape
    if theirs.shape in ((H, num_before), (H, S)) and H != G:
        return ONE_PER_KV_HEAD
    if theirs.size == 0 == right.size:
        return "Where no token lies before the window the shape is (G, 0)"
    if theirs.shape == (num_before,):
        return "Each KV head has a row of its own"
    return _which(theirs, right, others)


@reference
def _snapped(
    inputs: dict,
    queries="last",
    leave="first",
    over="sum",
    heads="mean",
    groups="neighbours",
    pool="mean",
    window=None,
    width=None,
) -> np.ndarray:
    """Scores with one thing wrong. leave: when the window's own tokens are left out.
    over: what is made of the queries; heads: of a group's heads; groups: which heads are
    one; pool: what is made of neighbours."""
    weights, G = inputs["weights"], inputs["num_kv_heads"]
    window = window or _chosen(inputs, "window")
    width = width or _chosen(inputs, "width")
    H, _, S = weights.shape
    parts = {
        "all": weights,
        "first": weights[:, :window],
        "before": weights[:, :-window],
        "one": weights[:, -1:],
    }
    seen = parts.get(queries, weights[:, -window:])
    if queries == "before" and seen.shape[1] == 0:
        seen = weights[:, -window:]
    seen = {"mean": np.mean, "max": np.max}.get(over, np.sum)(seen, axis=1)  # (H, S)
    by_group = seen.reshape(G, H // G, S)
    if groups == "turns":
        by_group = seen.reshape(H // G, G, S).swapaxes(0, 1)
    if heads == "first":
        rows = by_group[:, 0]
    else:
        rows = {"sum": np.sum, "max": np.max}.get(heads, np.mean)(by_group, axis=1)
    if heads == "of all":
        rows = np.broadcast_to(rows.mean(axis=0), rows.shape)
    num_before = max(S - window, 0)
    if leave == "never":
        return _pooled(rows, width, pool)
    if leave == "after":
        return _pooled(rows, width, pool)[:, :num_before]
    if leave == "front":
        rows = rows[:, S - num_before :]
    elif leave == "below":
        rows = rows[:, : S - window]
    elif leave == "one less":
        rows = rows[:, : max(num_before - 1, 0)]
    else:
        rows = rows[:, :num_before]
    return _pooled(rows, width, pool)


@reference
def _pooled(rows: np.ndarray, width: int, pool: str) -> np.ndarray:
    """rows (G, n) with another number in each place, made of its neighbours."""
    half, n = width // 2, rows.shape[1]
    if pool == "none" or n == 0:
        return rows
    if pool == "across heads":
        return _pooled(rows.T, width, "mean").T
    if pool == "twice as wide":
        return _pooled(rows, 2 * width + 1, "mean")
    if pool == "short" and n < width:
        return rows[:, :0]
    sides = {"behind": (2 * half, 0), "ahead": (0, 2 * half), "short": (0, 0)}
    mode = {"copied": "edge", "mirrored": "reflect"}.get(pool, "constant")
    padded = np.pad(rows, ((0, 0), sides.get(pool, (half, half))), mode=mode)
    parts = np.lib.stride_tricks.sliding_window_view(padded, width, axis=-1)
    if pool == "real":
        ones = _pooled(np.ones_like(rows), width, "sum")
        return parts.sum(axis=-1) / ones
    kinds = {"max": np.max, "sum": np.sum, "median": np.median}
    return kinds.get(pool, np.mean)(parts, axis=-1).astype(rows.dtype)


# evict_tokens


def evict_tokens_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    # Ranks of the scores, in the order of the text: of the first KV head, of the second.
    for name, ranks, D, budget, window in (
        ("five tokens of which three are kept", ["41320"], 1, 3, 1),
        ("seven tokens of which four are kept", ["3625401"], 2, 4, 2),
        ("newest tokens with the highest scores", ["2143065"], 2, 4, 2),
        ("two KV heads", ["3521640", "1452360"], 2, 4, 1),
        ("two KV heads of three numbers", ["624150", "135420"], 3, 3, 1),
        ("two tokens of one score", ["2442410"], 1, 3, 1),
        ("tokens that nobody looks at", ["5000031"], 2, 4, 1),
        ("scores that are all 0", ["0" * 40], 2, 14, 2),  # sorts of 17 or more may mix
        ("a window of 0", ["4132506"], 1, 3, 0),
        ("a window of 0, and newest tokens with low scores", ["4632510"], 1, 3, 0),
        ("a window as large as the budget", ["3625401"], 2, 3, 3),
        ("a window larger than the budget", ["3625410"], 2, 2, 4),
        ("a window larger than the text", ["2431"], 2, 3, 6),
        ("a budget as large as the text", ["3142", "2413"], 2, 4, 1),
        ("a budget larger than the text", ["3142", "2413"], 2, 9, 2),
        ("a budget and a window larger than the text", ["31", "24"], 2, 9, 5),
        ("a single token", ["1"], 2, 3, 2),
        ("a budget of one", ["13524"], 2, 1, 0),
        (
            "as many tokens as heads and numbers",
            ["1320", "3120", "2310", "1230"],
            4,
            2,
            1,
        ),
    ):
        digits = np.array([[int(rank) for rank in row] for row in ranks], np.float64)
        cases.append(_layer(rng, name, digits, D, budget, window))
    for name, S, G, D, budget, window in (
        ("single precision", 12, 2, 4, 6, 2),
        ("scores up to 100,000", 40, 2, 3, 20, 4),
        ("scores that differ by little", 40, 2, 3, 20, 4),
        ("scores below 0", 12, 2, 3, 6, 2),
        ("random sizes", *_random_layer(rng)),
        ("600 tokens of which 80 are kept", 600, 4, 8, 80, 8),
    ):
        ranks = np.stack([rng.permutation(S) for _ in range(G)]).astype(np.float64)
        case = _layer(rng, name, ranks, D, budget, window)
        scores = case.inputs["scores"]
        if "100,000" in name:
            scores *= 1e5 / scores.max()
            scores[:, -window:] /= 1e4
        elif "little" in name:
            case.inputs["scores"] = 0.5 + 1e-12 * scores
        elif "below" in name:
            scores -= 5
        cases.append(case)
    return cases


def _random_layer(rng) -> tuple[int, int, int, int, int]:
    G, D, window = (int(n) for n in rng.integers(2, 5, size=3))
    budget = window + int(rng.integers(3, 9))
    return budget + int(rng.integers(8, 20)), G, D, budget, window


def _layer(rng, name: str, ranks: np.ndarray, D: int, budget: int, window: int) -> Case:
    """Scores (G, S) of these ranks, of which 0 is no attention at all."""
    dtype = np.float32 if name == "single precision" else np.float64
    G, S = ranks.shape
    k, v = rng.normal(size=(2, S, G, D)).astype(dtype)
    steps = np.append(0, rng.uniform(0.05, 0.2, size=int(ranks.max()) + 1).cumsum())
    scores = steps[ranks.astype(int)].astype(dtype)
    arrays = {"k": k, "v": v, "scores": scores}
    limits = {"bytes_held": 2 * min(budget, S) * G * D * k.itemsize}
    return Case(name, {**arrays, "budget": budget, "window": window}, limits)


OWN_TOKENS = "Each KV head keeps its own tokens: there is one row of scores for each"
WITHIN = "The window counts in the budget: behind it budget - window tokens are left"
PROTECTED = "The newest `window` tokens stay, whatever their scores"
TEXT_ORDER = "In the order of the text, not in that of the scores"
LARGE_WINDOW = "A window larger than the budget keeps the newest `budget` tokens"
# What to say of the slips of `_evicted`.
EVICT_SLIPS = {
    "unprotected": PROTECTED,
    "before alone": PROTECTED,
    "front": PROTECTED,
    "on top": WITHIN,
    "best without a window": WITHIN,
    "one for all, mean": OWN_TOKENS,
    "one for all, largest": OWN_TOKENS,
    "one for all, first": OWN_TOKENS,
    "one for all, last": OWN_TOKENS,
    "later": "Of equal scores the earlier token stays: sort with stable=True",
    "lowest": "The highest scores stay: the lowest go",
    "newest": "Beside the window the scores say which tokens stay",
    "oldest": "Beside the window the scores say which tokens stay",
    "window alone": "Beside the window budget - window more tokens stay",
    "whole window": LARGE_WINDOW,
    "oldest of the window": LARGE_WINDOW,
    "best of the window": LARGE_WINDOW,
    "thrown out": "Keep these places, and throw out the others: not the other way round",
}
ELSE_THAN_WINDOWS = OWN_TOKENS, EVICT_SLIPS["later"], EVICT_SLIPS["lowest"]


def evict_tokens_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    right, theirs = expected["kept"], got["kept"]
    slips = EVICT_SLIPS
    if inputs["window"] == 0:
        slips = {slip: slips[slip] for slip in slips if slips[slip] in ELSE_THAN_WINDOWS}
        words = "With a window of 0 `[-0:]` is everything: count from the front instead"
        slips |= {"oldest": words, "all twice": words}
    if inputs["window"] <= inputs["budget"]:
        slips = {slip: slips[slip] for slip in slips if slips[slip] != LARGE_WINDOW}
    others = [(words, _evicted(inputs, slip)) for slip, words in slips.items()]
    if not isinstance(theirs, np.ndarray):
        return None
    if _is_same(theirs, right):
        return _why_other_vectors(inputs, expected, got)
    if theirs.dtype == bool:
        return "Places, not a mask: the numbers of the tokens that are kept"
    G, n = right.shape
    if theirs.shape == (n, G) and np.array_equal(theirs.T, right):
        return "A row for each KV head: (G, n)"
    if theirs.shape == (n,) and G > 1:
        return OWN_TOKENS
    if theirs.shape == right.shape and np.array_equal(np.sort(theirs), right):
        return TEXT_ORDER
    return _which(theirs, right, others)


def _why_other_vectors(inputs: dict, expected: dict, got: dict) -> str | None:
    """Of an answer that names the right places."""
    kept = expected["kept"]
    is_right = {}
    for name in ("k", "v"):
        right, theirs = expected[name], got.get(name)
        if not isinstance(theirs, np.ndarray):
            return None
        is_right[name] = _is_same(theirs, right)
        if not is_right[name] and name == "v" and is_right["k"]:
            return _why_other_values(inputs, kept, right, theirs)
        if not is_right[name]:
            return _why_not_these(inputs[name], kept, right, theirs)
    return (
        "That is a view: the memory of all tokens stays as long as it does. Copy what is "
        "kept, by gather or clone"
    )


def _why_other_values(
    inputs: dict, kept: np.ndarray, right: np.ndarray, theirs: np.ndarray
) -> str | None:
    n, G, D = right.shape
    keys = inputs["k"][kept.T, np.arange(G)]
    if _is_same(theirs, keys):
        return "Values come from v"
    return _why_not_these(inputs["v"], kept, right, theirs)


def _why_not_these(
    x: np.ndarray, kept: np.ndarray, right: np.ndarray, theirs: np.ndarray
) -> str | None:
    """x (S, G, D): keys or values of all tokens."""
    (_, G, D), n = x.shape, len(right)
    if theirs.shape == (G, n, D) != right.shape:
        return "Tokens come first, as they came in: (n, G, D)"
    if theirs.shape == (G, n, G, D) or theirs.shape == (n, G, G, D):
        return (
            "An index by `kept` alone takes every KV head at each place: gather takes of "
            "each its own"
        )
    if theirs.shape == x.shape != right.shape:
        return "What is thrown out takes no place: n tokens are left"
    if theirs.shape != right.shape:
        return None
    for head in range(G):
        if G > 1 and _is_same(theirs, x[kept[head]]):
            return "Each KV head has its own places: those of one do for no other"
    if _is_same(theirs.swapaxes(0, 1), right) if n == G else False:
        return "Tokens come first, as they came in: (n, G, D)"
    if _are_rows_of(theirs, right):
        return "Keys and values stand in the order of `kept`, that of the text"
    if not _are_rows_of(theirs, x):
        return "Keys and values stay as they were: they are moved, not computed"
    return "Keys and values are those of the places in `kept`"


def _are_rows_of(theirs: np.ndarray, x: np.ndarray) -> bool:
    """Whether each vector of theirs is one of x's, of the same KV head."""
    return all(
        (theirs[:, None, head] == x[None, :, head]).all(axis=-1).any(axis=1).all()
        for head in range(x.shape[1])
    )


@reference
def _evicted(inputs: dict, slip: str) -> np.ndarray:
    """The places that come of a slip, one of EVICT_SLIPS."""
    scores, budget, window = (inputs[name] for name in ("scores", "budget", "window"))
    G, S = scores.shape
    n = min(budget, S)
    window = min(window, S)
    places = np.broadcast_to(np.arange(S), (G, S))
    one = {
        "one for all, mean": scores.mean(axis=0),
        "one for all, largest": scores.max(axis=0),
        "one for all, first": scores[0],
        "one for all, last": scores[-1],
    }
    scores = np.broadcast_to(one.get(slip, scores), (G, S))
    if slip == "whole window":
        return places[:, S - window :]
    inside = min(window, n)  # of the window, in the budget
    num_before = S - inside
    if slip == "oldest of the window":
        return places[:, S - window :][:, :n]
    if slip == "best of the window":
        window_scores = scores[:, S - window :]
        return S - window + _best(window_scores, min(n, window))
    if slip == "newest":
        return places[:, S - n :]
    if slip == "oldest":
        return places[:, :n]
    if slip == "window alone":
        return places[:, num_before:]
    if slip == "all twice":
        return np.concatenate([_best(scores, n), places], axis=1)
    if slip == "unprotected":
        return _best(scores, n)
    if slip == "before alone":
        return _best(scores[:, :num_before], min(n, num_before))
    if slip == "front":
        rest = window + _best(scores[:, window:], n - inside)
        return np.concatenate([places[:, :inside], rest], axis=1)
    num_best = n - inside
    if slip == "on top":
        num_best = min(n, num_before)
    if slip == "best without a window":
        return _best(scores[:, :num_before], num_best)
    before = scores[:, :num_before]
    if slip == "later":
        best = np.sort(num_before - 1 - _best(before[:, ::-1], num_best))
    elif slip == "lowest":
        best = _best(-before, num_best)
    else:
        best = _best(before, num_best)
    kept = np.concatenate([best, places[:, num_before:]], axis=1)
    if slip == "thrown out":
        rows = [np.setdiff1d(np.arange(S), row) for row in kept]
        return np.stack(rows)
    return kept


@reference
def _best(scores: np.ndarray, num: int) -> np.ndarray:
    """Places of the `num` highest of each row, of equal ones the earlier, in order."""
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[:, :num], axis=-1)


# pyramid_budgets


def pyramid_budgets_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    # First numbers that need no rounding, whatever the slip.
    for name, mean_budget, num_layers, window, beta in (
        ("five layers", 60, 5, 10, 5),
        ("two layers", 50, 2, 10, 4),
        ("three layers", 40, 3, 4, 6),
        ("a single layer", 30, 1, 5, 4),
        ("four layers, numbers that are no whole ones", 47, 4, 6, 7),
        ("seven layers, numbers that are no whole ones", 52, 7, 8, 11),
        ("all layers alike", 30, 4, 6, 1),
        ("a mean as large as the window", 8, 4, 8, 5),
        ("a mean one above the window", 9, 6, 8, 7),
        ("a window of 8, which is the default", 64, 5, None, 7),
        ("a beta of 20, which is the default", 96, 4, 12, None),
        ("neither window nor beta", 128, 6, None, None),
        ("a mean below the window", 7, 4, 8, 5),
        ("no layers", 32, 0, 8, 5),
        ("a beta of 0", 32, 4, 8, 0),
        ("a window of 0", 32, 4, 0, 4),
        ("80 layers", 512, 80, 16, 20),
    ):
        cases.append(_pyramid_case(name, mean_budget, num_layers, window, beta))
    while len(cases) < 20:
        window, beta = int(rng.integers(2, 20)), int(rng.integers(2, 30))
        mean_budget, L = window + int(rng.integers(20, 300)), int(rng.integers(4, 40))
        excess = (1 - 1 / beta) * (mean_budget - window)
        ramp = excess * (1 - 2 * np.arange(L) / (L - 1))
        if np.abs(ramp % 1 - 0.5).min() > 1e-3:  # which way a half goes is nobody's
            name = f"{L} layers, random numbers"
            cases.append(_pyramid_case(name, mean_budget, L, window, beta))
    return cases


def _pyramid_case(name, mean_budget, num_layers, window, beta) -> Case:
    counts = {"mean_budget": mean_budget, "num_layers": num_layers}
    return Case(name, {**counts, "window": window, "beta": beta})


BESIDE = "Beside the window: take it off the mean first, and give it to each layer again"
LEFT_FOR_BETA = "The last layer gets 1 / beta of what the mean has beside the window"
STEPS = "From the first layer to the last lead num_layers - 1 equal steps"
SUM_STAYS = (
    "Rounding must not change the sum: what a layer of the first half gets more, rounded "
    "to the nearest, its mirror image gets less"
)
FIRST = "The first layer gets as much more than the mean as the last gets less"
# What to say of the slips of `_pyramid`.
PYRAMID_SLIPS = {
    "reverse": "Many tokens in the first layer, few in the last",
    "window forgotten": BESIDE,
    "window not added": BESIDE,
    "window on top": BESIDE,
    "window added later": BESIDE,
    "at least the window": BESIDE,
    "beta of the mean": LEFT_FOR_BETA,
    "beta forgotten": LEFT_FOR_BETA,
    "window alone": LEFT_FOR_BETA,
    "beta of the first": LEFT_FOR_BETA,
    "beta of twice the mean": LEFT_FOR_BETA,
    "geometric": "It falls in equal steps, not by equal factors",
    "num_layers steps": STEPS,
    "one step more": STEPS,
    "from twice the mean": FIRST,
    "from the mean": FIRST,
    "stairs": "Between the first layer and the last it falls in equal steps",
    "flat": "Many tokens in the first layer, few in the last",
}


def pyramid_budgets_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    if expected["raised"] != "nothing":
        return KEEP_THE_CHECK
    right, theirs = expected["budgets"], got["budgets"]
    others = [
        (words, _pyramid(inputs, slip, rounding))
        for slip, words in PYRAMID_SLIPS.items()
        for rounding in ("round", "cut", "cut up")
    ]
    others += [(SUM_STAYS, _pyramid(inputs, "", how)) for how in ("cut", "cut up")]
    others += [(SUM_STAYS, _pyramid(inputs, "", "cut, mirrored"))]
    for name, numbers in (("window", (1, 4, 16, 32)), ("beta", (2, 4, 5, 8, 10, 16))):
        if inputs[name] is None:  # all else has failed before
            words = f"Where {name} is not given it is {DEFAULTS[name]}"
            given = [{**inputs, name: number} for number in numbers]
            others = [(words, _pyramid(other, "", "round")) for other in given]
    if not isinstance(theirs, list):
        return None
    if any(isinstance(budget, float) for budget in theirs):
        return "A budget counts tokens: give ints"
    if len(theirs) != len(right):
        return "One budget for each layer"
    if len(right) == 1:
        return "A single layer has no other to fall to: it gets the mean"
    if any(budget < 0 for budget in theirs if isinstance(budget, int)):
        return "No budget is below the window"
    return _which(theirs, right, others)


@reference
def _pyramid(inputs: dict, slip: str, rounding: str) -> list[int]:
    """What comes of one of PYRAMID_SLIPS."""
    mean, L = inputs["mean_budget"], inputs["num_layers"]
    window, beta = _chosen(inputs, "window"), _chosen(inputs, "beta")
    rest = mean - window
    most = {
        "window forgotten": mean - mean / beta,
        "window on top": mean - mean / beta,
        "window added later": mean - mean / beta,
        "at least the window": mean - mean / beta,
        "beta of the mean": mean - window - mean / beta,
        "beta forgotten": rest,
        "window alone": mean - window,
        "beta of the first": rest * (beta - 1) / (beta + 1),
        "beta of twice the mean": rest - 2 * rest / beta,
        "flat": 0.0,
    }.get(slip, rest - rest / beta)
    layers = np.arange(L)
    if L > 1:
        shares = 1 - 2 * layers / (L - 1)  # from 1 to -1
    else:
        shares = np.zeros(1)
    if slip == "num_layers steps":
        shares = 1 - 2 * layers / L
    elif slip == "one step more":
        shares = 1 - 2 * (layers + 1) / L
    elif slip == "stairs":
        shares = np.where(layers < L // 2, 1.0, -1.0)
        shares[L // 2 : L - L // 2] = 0
    budgets = mean + most * shares
    if slip == "reverse":
        budgets = budgets[::-1]
    elif slip == "window not added":
        budgets = budgets - window
    elif slip in ("window on top", "window added later"):
        budgets = budgets + window
    elif slip == "at least the window":
        budgets = np.maximum(budgets, window)
    elif slip == "geometric" and L > 1 and rest > 0:
        budgets = window + np.geomspace(2 * rest - rest / beta, rest / beta, L)
    elif slip == "from twice the mean":
        budgets = window + np.linspace(2 * rest, rest / beta, L)
    elif slip == "from the mean":
        budgets = window + np.linspace(rest, rest / beta, L)
    near = np.round(budgets, 9)  # 79.99999999999999 is 80
    if rounding == "cut, mirrored":
        half = [math.floor(budget) for budget in near[: L // 2]]
        middle = [mean] * (L % 2)
        return [*half, *middle, *(2 * mean - budget for budget in half[::-1])]
    round_ = {"cut": math.floor, "cut up": math.ceil}.get(rounding, round)
    return [int(round_(budget)) for budget in near]


# spread_budgets


def spread_budgets_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    nan, inf = math.nan, math.inf
    # First numbers that need no rounding; ties are exact.
    for name, needs, mean_budget, window in (
        ("three layers", [2.0, 5.0, 1.0], 24, 8),
        ("two layers", [3.0, 1.0], 12, 4),
        ("a layer that needs nothing", [1.0, 0.0, 3.0], 18, 10),
        ("a single layer", [0.3], 12, 5),
        ("needs that are alike", [0.25, 0.25, 0.25], 9, 4),
        ("one token that is left over", [0.445, 0.335, 0.42], 10, 6),
        ("two tokens that are left over", [0.225, 0.575, 0.362, 0.838], 11, 6),
        ("three layers that lost little", [3.3, 6.42, 2.28], 10, 6),
        ("three layers that lost much", [3.62, 5.8, 2.58], 10, 6),
        ("a small part that lost more than a large one", [0.43, 2.32, 0.25], 7, 6),
        ("one token that two layers lost half of", [1.0, 2.0, 1.0], 6, 4),
        ("four layers that lost the same", [1.0, 3.0, 5.0, 7.0], 5, 3),
        ("32 layers, of which 16 lost the same", [1.0, 3.0, 2.0, 2.0] * 8, 4, 3),
        ("as much as the window alone", [1.0, 4.0, 2.0], 6, 6),
        ("one token above the window", [0.9, 0.35, 0.06, 0.17, 0.3], 7, 6),
        ("very small needs", [2e-9, 5e-9, 1e-9], 30, 6),
        ("very large needs", [2e9, 3e9, 5.3e9], 30, 6),
        ("a window of 8, which is the default", [3.0, 4.0, 1.0], 16, None),
        ("no layer that needs any", [0.0, 0.0, 0.0], 20, 8),
        ("no layers", [], 20, 8),
        ("a need below 0", [2.0, -1.0, 3.0], 20, 8),
        ("a need of NaN", [2.0, nan, 3.0], 20, 8),
        ("a need of NaN in the first layer", [nan, 1.0, 3.0], 20, 8),
        ("an infinite need", [2.0, 1.0, inf], 20, 8),
        ("a mean below the window", [2.0, 1.0], 7, 8),
        ("a window of 0", [2.0, 1.0], 7, 0),
    ):
        cases.append(_spread_case(name, needs, mean_budget, window))
    while len(cases) < 27:
        L, window = int(rng.integers(4, 33)), int(rng.integers(2, 20))
        mean_budget = window + int(rng.integers(20, 300))
        needs = rng.uniform(0, 5, size=L) ** 2
        parts = (mean_budget - window) * L * needs / needs.sum()
        lost = np.sort(np.append(parts % 1, [0, 1]))
        if np.diff(lost).min() > 5e-4:  # in single precision too it shows who lost more
            name = f"{L} layers, random needs"
            cases.append(_spread_case(name, needs, mean_budget, window))
    return cases


def _spread_case(
    name: str, needs: list[float] | np.ndarray, mean_budget: int, window: int | None
) -> Case:
    needs = np.array(needs, np.float64)
    return Case(name, {"needs": needs, "mean_budget": mean_budget, "window": window})


EACH_WINDOW = (
    "Each layer has the window first: only what is left of all budgets, (mean - window) "
    "per layer, is shared out by need"
)
SUM_OF_PARTS = (
    "The sum is mean_budget · layers: round the parts down, then give out what is left, "
    "one by one"
)
LOST_MOST = "What is left goes to the layers that lost most by rounding"
BY_NEED = "A part is as large as the need: need / sum(needs) of what is shared out"
# What to say of slips of `_spread`: of parts, and of rounding.
SPREAD_SLIPS = {
    "window forgotten": EACH_WINDOW,
    "window on top": EACH_WINDOW,
    "window not added": EACH_WINDOW,
    "at least the window": EACH_WINDOW,
    "one layer's rest": "What is shared out is (mean_budget - window) of each layer, all "
    "layers together",
    "inverse": "Who needs more gets more",
    "equal": BY_NEED,
    "squares": BY_NEED,
    "roots": BY_NEED,
    "softmax": BY_NEED,
    "of the largest": BY_NEED,
    "reverse": "The budgets stand in the order of the layers",
    "sorted": "The budgets stand in the order of the layers",
}
ROUNDING_SLIPS = {
    "down": SUM_OF_PARTS,
    "up": SUM_OF_PARTS,
    "nearest": SUM_OF_PARTS,
    "last": LOST_MOST,
    "first": LOST_MOST,
    "in order": LOST_MOST,
    "from the end": LOST_MOST,
    "largest need": LOST_MOST,
    "most needs": LOST_MOST,
    "least needs": LOST_MOST,
    "least lost": LOST_MOST,
    "nearest, then the last": LOST_MOST,
    "nearest, then the first": LOST_MOST,
    "nearest, then the largest": LOST_MOST,
    "later ties": "Of layers that lost the same the earlier gets it",
}


def spread_budgets_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    if expected["raised"] != "nothing":
        return KEEP_THE_CHECK
    right, theirs = expected["budgets"], got["budgets"]
    # Where nothing is left over the parts show, and else who got it, but for ties.
    parts = [
        (words, _spread(inputs, slip, how))
        for slip, words in SPREAD_SLIPS.items()
        for how in ("", "down", "nearest")
    ]
    of_rounding = {how: _spread(inputs, "", how) for how in ROUNDING_SLIPS}
    others = [(words, of_rounding[how]) for how, words in ROUNDING_SLIPS.items()]
    if of_rounding["down"] == right:
        others = parts
    elif of_rounding["later ties"] != right:
        others = others[-1:]
    if inputs["window"] is None:
        words = "Where window is not given it is 8"
        others = [
            (words, _spread({**inputs, "window": window}, "", ""))
            for window in (1, 2, 4, 10, 16)
        ]
    if not isinstance(theirs, list):
        return None
    if any(isinstance(budget, float) for budget in theirs):
        return "A budget counts tokens: give ints"
    if len(theirs) != len(right):
        return "One budget for each layer"
    if theirs == right:
        return "needs are the caller's: leave them as they are"
    return _which(theirs, right, others)


@reference
def _spread(inputs: dict, slip: str, rounding: str) -> list[int]:
    """What comes of one of SPREAD_SLIPS, or of ROUNDING_SLIPS."""
    needs, mean = inputs["needs"], inputs["mean_budget"]
    L, window = len(needs), _chosen(inputs, "window")
    weights = {
        "inverse": 1 / np.where(needs == 0, np.inf, needs),
        "equal": np.ones(L),
        "squares": needs**2,
        "roots": needs**0.5,
        "softmax": np.exp(needs - needs.max()),
    }.get(slip, needs)
    shares = weights / weights.sum()
    if slip == "of the largest":
        shares = needs / needs.max() / L
    rest = (mean - window) * L
    if slip in ("window forgotten", "window on top", "at least the window"):
        rest = mean * L
    elif slip == "one layer's rest":
        rest = mean - window
    parts = np.round(rest * shares, 9)
    if slip == "reverse":
        parts = parts[::-1]
    elif slip == "sorted":
        parts = np.sort(parts)[::-1]
    counts = _shared_out(parts, needs, rest, rounding)
    if slip == "at least the window":
        return [max(count, window) for count in counts]
    is_without = slip in ("window forgotten", "window not added")
    return [count + (0 if is_without else window) for count in counts]


@reference
def _shared_out(
    parts: np.ndarray, needs: np.ndarray, total: int, rounding: str
) -> list[int]:
    """Parts as whole numbers, whose sum is the total, but for some slips."""
    L = len(parts)
    down = np.floor(parts).astype(int)
    lost = np.round(parts - down, 6)
    near = np.round(parts).astype(int)
    if rounding in ("down", "up", "nearest"):
        up = np.ceil(parts).astype(int)
        return {"down": down, "up": up, "nearest": near}[rounding].tolist()
    counts = near if rounding.startswith("nearest") else down
    left = int(total - counts.sum())
    places = {
        "last": L - 1,
        "first": 0,
        "largest need": int(needs.argmax()),
        "nearest, then the last": L - 1,
        "nearest, then the first": 0,
        "nearest, then the largest": int(needs.argmax()),
    }
    if rounding in places:
        counts[places[rounding]] += left
        return counts.tolist()
    order = {
        "in order": np.arange(L),
        "from the end": np.arange(L)[::-1],
        "most needs": np.argsort(-needs, kind="stable"),
        "least needs": np.argsort(needs, kind="stable"),
        "least lost": np.argsort(lost, kind="stable"),
        "later ties": L - 1 - np.argsort(-lost[::-1], kind="stable"),
    }.get(rounding, np.argsort(-lost, kind="stable"))
    counts[order[: max(left, 0)]] += 1
    return counts.tolist()


# blocks_freed


def blocks_freed_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    # Rows of KV heads, layers apart from each other by a bar: 1 is kept.
    for name, rows, block_size in (
        ("one head, blocks of one token", "101001", 1),
        ("one head, blocks of two", "10000010", 2),
        ("one head, tokens that lie together", "11110000", 2),
        ("a last block that is not full, and kept", "1000011", 3),
        ("a last block that is not full, and free", "11000", 3),
        ("two heads that keep other tokens", "1110001000 1110000010", 2),
        ("two layers that keep other tokens", "1110001000|1110000010", 2),
        ("two heads that keep other numbers of tokens", "111110000000 100000000000", 2),
        ("two layers that keep other numbers of tokens", "100000000000|111110000000", 2),
        ("two layers of two heads", "1000000001 0100000000|0000100001 1000001110", 3),
        ("heads that together keep all", "10101010 01010101", 2),
        ("layers that together keep all", "11110000|00001111", 2),
        ("all tokens are kept", "1111111", 2),
        ("no token is kept", "0000000", 2),
        ("a block longer than the text", "10010", 16),
        ("a block as long as the text", "10010", 5),
        ("a single token", "1", 4),
        ("blocks of 0 tokens", "10010", 0),
        ("blocks of less than no tokens", "10010", -2),
    ):
        layers = [layer.split() for layer in rows.split("|")]
        bits = np.array(
            [[[int(bit) for bit in row] for row in layer] for layer in layers]
        )
        cases.append(Case(name, {"is_kept": bits > 0, "block_size": block_size}))
    for name, L, G, S, block_size in (
        ("random tokens", 3, 2, int(rng.integers(40, 80)), int(rng.integers(3, 6))),
        ("8 layers of 4 heads, 2,000 tokens", 8, 4, 2003, 16),
    ):
        is_kept = rng.random((L, G, S)) < 0.3 / (L * G) * rng.uniform(0.2, 1, (L, G, 1))
        is_kept[..., -2:] = True
        is_kept[L // 2, G // 2, S // 3 : S // 2] = True
        cases.append(Case(name, {"is_kept": is_kept, "block_size": block_size}))
    return cases


def blocks_freed_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    if expected["raised"] != "nothing":
        return KEEP_THE_CHECK
    right = [expected["in_place"], expected["moved_together"]]
    others = _other_freed(**inputs)
    theirs = [got["in_place"], got.get("moved_together")]
    if any(isinstance(number, float) for number in theirs):
        return "Blocks are counted: give ints"
    if theirs == right[::-1]:
        return "In this order: freed where the tokens lie, freed when they are moved"
    if theirs == [others["num_blocks"] - number for number in right]:
        return "Blocks that are freed, not those that are used"
    if theirs[0] == right[0]:
        return _which(theirs[1], right[1], others["moved together"])
    return _which(theirs[0], right[0], others["in place"])


@reference
def _other_freed(is_kept: np.ndarray, block_size: int) -> dict:
    """What comes of each slip, in pairs of words and a number, by where tokens lie."""
    L, G, S = is_kept.shape
    num_blocks = -(-S // block_size)
    padded = np.pad(is_kept, ((0, 0), (0, 0), (0, num_blocks * block_size - S)))
    tokens = padded.reshape(L, G, num_blocks, block_size)
    is_used = tokens.any(axis=3)  # (L, G, num_blocks)
    full = S // block_size
    counts = is_kept.sum(axis=2)  # (L, G)
    most = int(counts.max())
    in_all = (
        "A block has the tokens of all layers and heads: it is free when none of them "
        "keeps one there, not when one of them keeps none"
    )
    once = "A block is one for all layers and heads: it is counted once"
    none_in_it = "A block is free when none of its tokens is kept"
    last = "The last block counts too, though it is not full"
    blocks = "Count blocks, not tokens"
    first = "Every layer and head counts, not one of them alone"
    begun = "Round up what is used: a block that is begun is not free"
    decides = "The head that keeps most says how many blocks are used"
    apart = (
        "Moved together, each head's tokens lie behind one another: which places they "
        "had does not count"
    )
    used_by_layer, used_by_head = is_used.any(axis=1), is_used.any(axis=0)
    union = int(is_kept.any(axis=(0, 1)).sum())

    def freed(number: float) -> int:
        return num_blocks - -(-int(number) // block_size)

    in_place = [
        (in_all, num_blocks - int(is_used.all(axis=(0, 1)).sum())),
        (in_all, num_blocks - int(used_by_layer.all(axis=0).sum())),
        (in_all, num_blocks - int(used_by_head.all(axis=0).sum())),
        (once, int((~is_used).sum())),
        (once, int((~used_by_layer).sum())),
        (once, int((~used_by_head).sum())),
        (none_in_it, num_blocks - int(tokens.any(axis=(0, 1)).all(axis=1).sum())),
        (last, full - int(is_used.any(axis=(0, 1))[:full].sum())),
        (last, full - int(is_used.any(axis=(0, 1)).sum())),
        (blocks, S - union),
        (blocks, (S - union) // block_size),
        (first, num_blocks - int(is_used[0, 0].sum())),
        (first, num_blocks - int(used_by_layer[0].sum())),
        (first, num_blocks - int(used_by_head[0].sum())),
        (first, num_blocks - int(used_by_layer[-1].sum())),
    ]
    moved = [
        (last, (S - most) // block_size),
        (begun, num_blocks - most // block_size),
        (last, full - -(-most // block_size)),
        (decides, freed(math.ceil(counts.mean()))),
        (decides, freed(counts.mean())),
        (decides, freed(round(counts.mean()))),
        (decides, freed(math.ceil(counts.mean(axis=1).max()))),
        (decides, freed(math.ceil(counts.mean(axis=0).max()))),
        (decides, freed(counts.min())),
        (decides, freed(counts[0, 0])),
        (decides, freed(counts[-1, -1])),
        (decides, freed(counts[0].max())),
        (once, freed(counts.sum())),
        (once, freed(counts.sum(axis=1).max())),
        (once, freed(counts.sum(axis=0).max())),
        (once, int((num_blocks - -(-counts // block_size)).sum())),
        (once, L * freed(most)),
        (apart, freed(union)),
        (apart, freed(is_kept.any(axis=1).sum(axis=1).max())),
        (apart, freed(is_kept.any(axis=0).sum(axis=1).max())),
        (blocks, S - most),
    ]
    of_one = none_in_it, last, blocks, begun  # which fail where there is one head

    def alone(others: list) -> list:
        return [row for row in others if (row[0] in of_one) == (L * G == 1)]

    return {
        "num_blocks": num_blocks,
        "in place": alone(in_place),
        "moved together": alone(moved),
    }


EXERCISES = [
    Exercise("lib.pruning.keep_recent", 1, keep_recent_cases, keep_recent_explain),
    Exercise(
        "lib.pruning.attention_received",
        2,
        attention_received_cases,
        attention_received_explain,
    ),
    Exercise(
        "lib.pruning.snap_scores",
        2,
        snap_scores_cases,
        snap_scores_explain,
        errors={
            "optional 0 dim batch size": "Where no token lies before the window there is "
            "nothing to pool: give (G, 0)"
        },
    ),
    Exercise(
        "lib.pruning.evict_tokens",
        3,
        evict_tokens_cases,
        evict_tokens_explain,
        errors={
            "argsort()": "torch takes `stable` where each argument has its name: dim=-1"
        },
    ),
    Exercise(
        "lib.pruning.pyramid_budgets",
        2,
        pyramid_budgets_cases,
        pyramid_budgets_explain,
        errors={
            "division by zero": "A single layer gets the mean: it is divided by none"
        },
    ),
    Exercise(
        "lib.pruning.spread_budgets", 2, spread_budgets_cases, spread_budgets_explain
    ),
    Exercise("lib.pruning.blocks_freed", 2, blocks_freed_cases, blocks_freed_explain),
]
