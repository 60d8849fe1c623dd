"""Chapter 9: what its exercises are tried on."""

import math
from collections.abc import Callable, Iterator

import numpy as np

from lib.course.cases.ch01 import _reproduced
from lib.course.cases.ch03 import _is_near
from lib.course.cases.ch08 import KEEP_THE_CHECK, _which
from lib.course.exercises import Case, Exercise
from lib.course.shipped import reference

# (H, G, D) of one step, the smallest first. Names tell how decays are drawn.
SIZES = (
    ("one number, and an empty state", (1, 1, 1)),
    ("one number", (1, 1, 1)),
    ("one head of three numbers, and an empty state", (1, 1, 3)),
    ("one head of three numbers", (1, 1, 3)),
    ("two heads", (2, 2, 3)),
    ("three query heads on one KV head", (3, 1, 2)),
    ("four query heads on two KV heads", (4, 2, 3)),
    ("six query heads on three KV heads", (6, 3, 2)),
    ("six query heads on two KV heads", (6, 2, 3)),
    ("as many query heads, KV heads and numbers", (4, 4, 4)),
    ("as many KV heads as numbers in a head", (6, 3, 3)),
    ("single precision", (4, 2, 3)),
    ("32 query heads on 8 KV heads", (32, 8, 12)),
)


def _sizes(rng) -> Iterator[tuple[str, tuple[int, int, int]]]:
    yield from SIZES
    G, group_size, D = (int(n) for n in rng.integers(2, 5, size=3))
    yield "random sizes", (G * group_size, G, D)


def _token(rng, name: str, H: int, G: int, D: int) -> dict:
    """A state and a token that comes to it."""
    state = rng.normal(size=(G, D, D))
    if "empty state" in name:
        state[:] = 0
    q, k, v = (rng.normal(size=(heads, D)) for heads in (H, G, G))
    arrays = {"state": state, "q": q, "k": k, "v": v}
    return _in_precision(name, arrays)


def _in_precision(name: str, arrays: dict) -> dict:
    dtype = np.float32 if name.startswith("single precision") else np.float64
    return {key: array.astype(dtype) for key, array in arrays.items()}


def _decays(rng, G: int) -> np.ndarray:
    """Between 0.3 and 0.9, no two close to each other."""
    return rng.permutation(np.linspace(0.35, 0.85, G) + rng.uniform(-0.04, 0.04, G))


def _turns(H: int, G: int) -> np.ndarray:
    """For each query head the KV head that it would read if they took turns."""
    return np.arange(H) % G


def _neighbours(H: int, G: int) -> np.ndarray:
    return np.arange(H) // (H // G)


def _by_turns(H: int, size: int) -> np.ndarray:
    """The order of heads in which a matrix with rows of `size` is read by columns."""
    return np.arange(H).reshape(-1, size).T.ravel()


def _asked(state: np.ndarray, q: np.ndarray, heads: np.ndarray) -> np.ndarray:
    """What a state (G, D, D) answers to q (..., H, D), of which head h reads KV head
    heads[h]."""
    return np.einsum("hij,...hj->...hi", state[heads], q)


def _outer(v: np.ndarray, k: np.ndarray) -> np.ndarray:
    """v, k (G, D) -> (G, D, D), of which row i has number i of v."""
    return v[:, :, None] * k[:, None, :]


ROWS = "Row i of the state makes number i of the output: v_t k_tᵀ, not k_t v_tᵀ"
READ_ROWS = (
    "Number i of the output is row i of the state times q: a sum over the state's columns"
)
PAIRING = "Query head h reads KV head h // (H / G): neighbours share"
NO_SCALE = "There is no softmax here, and no root of D: out is S q"
WRITE_FIRST = "Write first, then read: a token sees itself too"
ITSELF_ALONE = "The answer is read from the whole new state, not from what is new in it"
CALLERS = (
    "The state that came in is its owner's, who may need it again: make a new one, and "
    "change nothing in place"
)
BY_K = "The query is what asks: read with q, write with k"
ORDER = "In this order: out, and the new state"
HEAD_ORDER = (
    "Heads of out stand in the order of q: those that read one KV head are neighbours"
)


def _read_slips(inputs: dict, state: np.ndarray, before: list) -> list:
    """What comes of out, by slips in reading the right state. before: the states that may
    be read too early."""
    old, q, k = inputs["state"], inputs["q"], inputs["k"]
    (H, D), G = q.shape, len(k)
    heads = _neighbours(H, G)
    right = _asked(state, q, heads)
    slips = [
        (READ_ROWS, _asked(state.swapaxes(1, 2), q, heads)),
        (PAIRING, _asked(state, q, _turns(H, G))),
        (PAIRING, _asked(state, q, 0 * heads)),
        (HEAD_ORDER, right[_by_turns(H, H // G)]),
        (PAIRING, _asked(state, q, _turns(H, G))[_by_turns(H, G)]),
        (NO_SCALE, right * D**-0.5),
        (NO_SCALE, right / D),
        (ITSELF_ALONE, _asked(state - before[-1], q, heads)),
        (ITSELF_ALONE, _asked(state - old, q, heads)),
        *((WRITE_FIRST, _asked(other, q, heads)) for other in before),
    ]
    if H == G:
        slips.append((BY_K, _asked(state, k, heads)))
    return slips


def _step_explain(slips: Callable) -> Callable:
    """What to say of one step whose slips `slips` gives: those of the state, those of
    out."""

    def explain(inputs: dict, expected: dict, got: dict) -> str | None:
        state, out = got["state"], got.get("out")
        if not isinstance(state, np.ndarray) or not isinstance(out, np.ndarray):
            return None
        of_state, of_out = slips(**inputs)
        if _are_in_other_order(expected, got):
            return ORDER
        if not _is_like(state, expected["state"]):
            return _which(state, expected["state"], of_state)
        if not _is_like(out, expected["out"]):
            return _which(out, expected["out"], of_out)
        return CALLERS

    return explain


def _is_like(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and _is_near(one, other)


def _are_in_other_order(expected: dict, got: dict) -> bool:
    right = expected["state"], expected["out"]
    return all(map(_is_near, (got["out"], got["state"]), right))


# linear_step


def linear_step_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, (H, G, D) in _sizes(rng):
        decays = [("", _decays(rng, G))]
        if name in ("one number", "one head of three numbers", "two heads"):
            decays.append((", and no decay", np.ones(G)))
        for words, decay in decays:
            inputs = _token(rng, name, H, G, D)
            inputs["decay"] = decay.astype(inputs["q"].dtype)
            cases.append(Case(name + words, inputs))
    return cases


DECAY_MISSING = "The decay is missing: what was there before becomes γ times as much"
OWN_ENTRY = "What fades is the old state: what is new has not faded yet"
OF_EACH_HEAD = "Each KV head has a decay of its own: decay[g] is for state[g]"
ALL_OF_IT = "decay[g] is for all numbers of state[g]: decay[:, None, None]"
ADDS = "The token is added to the old state, it does not take its place"
WRITES = "The new state takes the token in too: add v_t k_tᵀ"
AS_IT_IS = "What is new is added as it is, not times 1 - γ"
IS_LEFT = "γ of the old state is left, not 1 - γ of it"
KEY_WRITES = "What is written is v_t at k_t: q_t only asks"
PRODUCTS = "v_t k_tᵀ has a product of each number of v with each of k: D times D of them"


@reference
def _linear_slips(state, q, k, v, decay) -> tuple[list, list]:
    """What comes of each slip of linear_step, of the state and of out: words and
    numbers."""
    inputs = {"state": state, "q": q, "k": k}
    (H, D), G = q.shape, len(k)
    fade, new = decay[:, None, None], _outer(v, k)
    right = fade * state + new
    of_state = [
        (DECAY_MISSING, state + new),
        (OWN_ENTRY, fade * (state + new)),
        (OWN_ENTRY, state + fade * new),
        (ROWS, fade * state + new.swapaxes(1, 2)),
        (ROWS, right.swapaxes(1, 2)),
        (ADDS, new),
        (WRITES, fade * state),
        (WRITES, state),
        (IS_LEFT, (1 - fade) * state + new),
        (AS_IT_IS, fade * state + (1 - fade) * new),
        (PRODUCTS, fade * state + (v * k)[:, :, None]),
        (PRODUCTS, fade * state + (v * k)[:, None, :]),
        (PRODUCTS, fade * state + (v * k).sum(axis=1)[:, None, None]),
        (PRODUCTS, fade * state + np.eye(D) * (v * k)[:, None, :]),
        (OF_EACH_HEAD, fade[::-1] * state + new),
        (OF_EACH_HEAD, fade[0] * state + new),
        (OF_EACH_HEAD, fade.mean() * state + new),
    ]
    if G == D and G > 1:
        of_state += [
            (ALL_OF_IT, decay * state + new),
            (ALL_OF_IT, decay[:, None] * state + new),
        ]
    if H == G:
        of_state.append((KEY_WRITES, fade * state + _outer(v, q)))
    return of_state, _read_slips(inputs, right, [state, fade * state])


linear_step_explain = _step_explain(lambda **inputs: _linear_slips(**inputs))


# delta_step


def delta_step_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, (H, G, D) in _sizes(rng):
        if name == "one number, and an empty state":  # in which slips give the same
            continue
        inputs = _token(rng, name, H, G, D)
        inputs["k"] /= np.linalg.norm(inputs["k"], axis=-1, keepdims=True)
        if name == "one number":  # of 1, whose square and sign tell nothing
            inputs["k"][:] = 1
        cases.append(Case(name, inputs))
        if name == "one head of three numbers, and an empty state":
            old, new = (np.array(rng.normal(size=(1, 3))) for _ in range(2))
            told = {**inputs, "state": _outer(old, inputs["k"]), "v": new}
            cases.append(Case("a key that was told before", told))
    return cases


TAKES_OUT = (
    "What the state says of the key already is not written again: v_t - S k_t, not v_t"
)
MINUS = "Write what is missing: v_t - S k_t, not their sum"
DIFFERENCE = "Write v_t - S k_t: what is new, minus what was said"
SAID_ROWS = (
    "What the state says of k is S k: number i is row i times k, a sum over columns"
)
SAID_BY_K = "What the state says of this key is S k_t: q_t only asks"
NOT_ERASED_ALONE = (
    "What is taken out is what the old state said of the key: v_t is written, and stays"
)
DELTA_ADDS = "The difference is added to the old state, it does not take its place"
AT_THE_KEY = "Only what the state says of this key is replaced, not all that is in it"
OWN_STATE = "Each KV head is asked for its own key: S[g] k[g]"


@reference
def _delta_slips(state, q, k, v) -> tuple[list, list]:
    """As _linear_slips, of delta_step."""
    inputs = {"state": state, "q": q, "k": k}
    H, G = len(q), len(k)
    itself = np.arange(G)

    def told(said: np.ndarray, sign: int = -1) -> np.ndarray:
        return state + _outer(v + sign * said, k)

    said = _asked(state, k, itself)
    said_by_columns = _asked(state.swapaxes(1, 2), k, itself)
    right = told(said)
    new = _outer(v, k)
    of_state = [
        (TAKES_OUT, state + new),
        (MINUS, told(said, 1)),
        (DIFFERENCE, state + _outer(said - v, k)),
        (SAID_ROWS, told(said_by_columns)),
        (NOT_ERASED_ALONE, state - _outer(said, k)),
        (DELTA_ADDS, _outer(v - said, k)),
        (AT_THE_KEY, new),
        (WRITES, state),
        (ROWS, state + _outer(k, v - said)),
        (ROWS, state + _outer(k, v - said_by_columns)),
        (ROWS, right.swapaxes(1, 2)),
        (OWN_STATE, told(said[::-1])),
        (OWN_STATE, told(said[:1])),
        (OWN_STATE, told(_asked(state[:1], k, 0 * itself))),
        (OWN_STATE, told(_asked(state[::-1], k, itself))),
        (PRODUCTS, state + ((v - said) * k)[:, :, None]),
        (PRODUCTS, state + ((v - said) * k)[:, None, :]),
        (PRODUCTS, state + ((v - said) * k).sum(axis=1)[:, None, None]),
    ]
    if H == G:
        of_state += [
            (SAID_BY_K, told(_asked(state, q, itself))),
            (KEY_WRITES, state + _outer(v - said, q)),
        ]
    return of_state, _read_slips(inputs, right, [state])


delta_step_explain = _step_explain(lambda **inputs: _delta_slips(**inputs))


# decay_mask


def decay_mask_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, decay, T in (
        ("one token", [0.5], 1),
        ("two tokens, and no decay", [1.0], 2),
        ("two tokens", [0.25], 2),
        ("four tokens, and no decay", [1.0], 4),
        ("four tokens", [0.75], 4),
        ("two heads that fade alike", [0.5, 0.5], 3),
        ("two heads", [0.9, 0.4], 3),
        ("as many heads as tokens", [0.3, 0.8, 1.0], 3),
        ("no token", [0.5, 0.75], 0),
        ("single precision", [0.5, 0.75], 5),
        ("random decays", _decays(rng, 3).tolist(), int(rng.integers(5, 9))),
        ("single precision, and 180 tokens", [0.5], 180),
        ("a decay so strong that γ^40 is 0", [1e-9], 80),
    ):
        dtype = np.float32 if name.startswith("single precision") else np.float64
        cases.append(Case(name, {"decay": np.array(decay, dtype=dtype), "T": T}))
    return cases


POWERS = (
    "γ^t / γ^s is 0 / 0 where a text is long: take powers of the distance t - s instead"
)
NEGATIVE = (
    "Far above the diagonal γ^(t - s) is ∞, and ∞ times 0 is no number: no power of less "
    "than 0"
)
LATER = "What comes later has 0: token t sees tokens s <= t"
ITS_OWN = "What token t wrote itself has not faded yet: γ^0 = 1 on the diagonal"
ROW_T = "Row t is of the token that looks, column s of the one that it looks at"
BY_DISTANCE = "What lies t - s tokens back has faded as many times: γ^(t - s)"
NO_INFINITY = "What is not seen has 0, not -∞: no softmax comes after this"
EACH_MASK = "Each KV head has a mask of its own, by its own decay: (G, T, T)"


def decay_mask_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    mask, right = got["mask"], expected["mask"]
    if not isinstance(mask, np.ndarray):
        return None
    if mask.shape != right.shape:
        return EACH_MASK if mask.shape[-2:] == right.shape[-2:] else None
    is_broken, T = ~np.isfinite(mask), inputs["T"]
    if is_broken.any() and not np.isneginf(mask).any():
        return _why_broken(inputs["decay"], T, is_broken, mask, right)
    if T <= 8:
        return _which(mask, right, _other_masks(**inputs))
    return None


def _why_broken(decay, T: int, is_broken, mask, right) -> str | None:
    """Of a mask with numbers that are none."""
    is_seen = np.tri(T, dtype=bool)
    if not (is_broken & is_seen).any():
        return NEGATIVE if _is_near(mask[:, is_seen], right[:, is_seen]) else None
    with np.errstate(all="ignore"):
        tiny = np.finfo(decay.dtype).tiny
        is_lost = decay[:, None] ** np.arange(T) < tiny * 1e3  # (G, T)
    return POWERS if not (is_broken & is_seen & ~is_lost[:, None, :]).any() else None


@reference
def _other_masks(decay: np.ndarray, T: int) -> list:
    """What comes of each slip: words, and a mask."""
    fade, G = decay[:, None, None], len(decay)
    t = np.arange(T)
    distance = t[:, None] - t  # (T, T)
    is_seen = distance >= 0
    age = np.maximum(distance, 0)
    right = fade**age * is_seen
    with np.errstate(all="ignore"):
        hidden = np.where(is_seen, right, -np.inf)
    found = [
        (LATER, fade**age),
        (LATER, fade ** np.abs(distance)),
        (LATER, fade ** distance.astype(decay.dtype)),
        (LATER, np.ones((G, T, T)) * fade**0),
        (ITS_OWN, fade ** (age + 1) * is_seen),
        (ITS_OWN, right * (distance > 0)),
        (ITS_OWN, fade ** np.maximum(distance - 1, 0) * (distance > 0)),
        (ROW_T, right.swapaxes(1, 2)),
        (BY_DISTANCE, is_seen * fade**0),
        (BY_DISTANCE, np.where(distance == 0, 1, fade * is_seen)),
        (BY_DISTANCE, fade * is_seen),
        (BY_DISTANCE, fade ** np.maximum(distance - 1, 0) * is_seen),
        (BY_DISTANCE, fade ** t[:, None] * is_seen),
        (BY_DISTANCE, fade**t * is_seen),
        (BY_DISTANCE, fade ** (T - 1 - t[:, None]) * is_seen),
        (BY_DISTANCE, fade ** (2 * age) * is_seen),
        (BY_DISTANCE, fade * age * is_seen),
        (NO_INFINITY, hidden),
        (NO_INFINITY, np.where(is_seen, np.log(fade) * age, -np.inf)),
        (EACH_MASK, right[::-1]),
        (EACH_MASK, np.broadcast_to(right[:1], right.shape)),
        (EACH_MASK, np.broadcast_to(right[-1:], right.shape)),
        (EACH_MASK, np.broadcast_to(right.mean(axis=0), right.shape)),
    ]
    if T == 1:  # where many of them are the same
        found = [row for row in found if row[0] == ITS_OWN]
    return [(words, np.array(other, dtype=decay.dtype)) for words, other in found]


# linear_parallel


def linear_parallel_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, shape, (H, G, D) in (
        ("one token, one number", (1,), (1, 1, 1)),
        ("two tokens, one number, and no decay", (2,), (1, 1, 1)),
        ("two tokens, one number", (2,), (1, 1, 1)),
        ("four tokens of three numbers, and no decay", (4,), (1, 1, 3)),
        ("four tokens of three numbers", (4,), (1, 1, 3)),
        ("two heads", (3,), (2, 2, 2)),
        ("three query heads on one KV head", (3,), (3, 1, 2)),
        ("four query heads on two KV heads, and no decay", (5,), (4, 2, 3)),
        ("four query heads on two KV heads", (5,), (4, 2, 3)),
        ("six query heads on three KV heads", (4,), (6, 3, 2)),
        ("as many tokens as heads and numbers", (4,), (4, 4, 4)),
        ("two texts", (2, 4), (4, 2, 3)),
        ("as many texts as KV heads and tokens", (3, 3), (6, 3, 3)),
        ("two leading dimensions", (2, 3, 4), (2, 1, 3)),
        ("no token", (0,), (4, 2, 3)),
        ("no token in two texts", (2, 0), (4, 2, 3)),
        ("single precision", (2, 6), (4, 2, 3)),
        ("random sizes", *_random_text(rng)),
        ("two texts, to be trained with", (2, 5), (4, 2, 3)),
        ("a decay of 1 / 1,024, and 200 tokens", (200,), (1, 1, 4)),
        ("256 tokens", (256,), (1, 1, 4)),
    ):
        inputs = _in_precision(name, _text(rng, name, shape, (H, G, D)))
        if D == 1:  # who makes 0 of a score below 0 sees the first token
            for key in "qk":
                inputs[key][0] = abs(inputs[key][0])
        grad_out = rng.normal(size=(*shape, H, D)) if "trained" in name else None
        most = {"state_sized_tensors": 20 if name == "256 tokens" else math.inf}
        cases.append(Case(name, {**inputs, "grad_out": grad_out}, most))
    return cases


def _random_text(rng) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    B, T, G, group_size, D = (int(n) for n in rng.integers(2, 4, size=5))
    return (B, T + 2), (G * group_size, G, D)


def _text(rng, name: str, shape: tuple[int, ...], sizes: tuple[int, int, int]) -> dict:
    H, G, D = sizes
    q, k, v = (rng.normal(size=(*shape, heads, D)) for heads in (H, G, G))
    decay = np.ones(G) if "no decay" in name else _decays(rng, G)
    if "1,024" in name:  # of which a power is exact, until it is 0
        decay[:] = 2**-10
    return {"q": q, "k": k, "v": v, "decay": decay}


SEE_LATER = "A token must not see later ones: its answer is of tokens s <= t alone"
NO_SOFTMAX = "Scores are weights as they are: no softmax, and not divided by their sum"
BELOW_0 = "Scores are weights as they are: those below 0 count too"
NO_ROOT = "Scores are q · k as they are: no root of D"
FADED = "What token s wrote has faded t - s times when token t asks: γ^(t - s)"
SEES_ITSELF = "A token sees itself too, and what it wrote has not faded yet: γ^0"
OTHER_DECAYS = "Each query head takes the mask of its KV head: decay[h // (H / G)]"
RESHAPED = (
    "Tokens and heads change places by transpose: reshape leaves numbers in the order in "
    "which they lie in memory, and mixes them up"
)
MIXED = "Put tokens before heads again: out has the shape of q"
TURNED = "Scores are of q with k, and weigh v"
ONCE = "The mask is for scores, once: it is not for values too"
HAVE_GRADIENTS = (
    "Numbers are right, gradients are not: compute with the tensors that you were given, "
    "without detach, .data, no_grad or numbers of Python"
)
AT_ONCE = (
    "That goes token by token: compare all queries with all keys at once, and multiply "
    "by the mask"
)


def linear_parallel_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    out, right = got["out"], expected["out"]
    if not isinstance(out, np.ndarray):
        return None
    if out.shape != right.shape:
        swapped = right.swapaxes(-2, -3)
        return MIXED if out.shape == swapped.shape and _is_near(out, swapped) else None
    if not _is_near(out, right) and len(out) >= 200:
        return POWERS if _is_lost(inputs["decay"], out, out) else None
    if not _is_near(out, right):
        return _which(out, right, _parallel_slips(inputs))
    if "gradients" in expected:
        return HAVE_GRADIENTS
    return AT_ONCE


def _is_lost(decay: np.ndarray, out: np.ndarray, *found: np.ndarray) -> bool:
    """Of one head: whether there is NaN, and in out only where γ^t is 0."""
    is_broken = np.isnan(out).any(axis=(1, 2))
    is_late = decay ** np.arange(len(out)) < np.finfo(decay.dtype).tiny * 1e3
    return any(np.isnan(x).any() for x in found) and not (is_broken & ~is_late).any()


@reference
def _parallel_slips(inputs: dict) -> list:
    """What comes of each slip of linear_parallel: words, and out."""
    decay, T = inputs["decay"], inputs["q"].shape[-3]
    (H, D), G = inputs["q"].shape[-2:], len(decay)
    t = np.arange(T)
    distance = t[:, None] - t
    age, is_seen = np.maximum(distance, 0), distance >= 0

    def power(exponent: np.ndarray, fade: np.ndarray = decay) -> np.ndarray:
        return fade[:, None, None] ** exponent

    right, turns = power(age) * is_seen, _turns(H, G)
    all_seen = np.ones((G, T, T))
    found = [
        (SEE_LATER, {"mask": power(age)}),
        (SEE_LATER, {"mask": power(abs(distance))}),
        (SEE_LATER, {"mask": all_seen}),
        (SEE_LATER, {"mask": right.swapaxes(1, 2)}),
        (FADED, {"mask": all_seen * is_seen}),
        (FADED, {"mask": power(np.maximum(distance - 1, 0)) * is_seen}),
        (FADED, {"mask": power(age) ** 2 * is_seen}),
        (SEES_ITSELF, {"mask": power(age + 1) * is_seen}),
        (SEES_ITSELF, {"mask": right * (distance > 0)}),
        (SEES_ITSELF, {"mask": power(age - 1) * (distance > 0)}),
        (NO_SOFTMAX, {"mask": right, "weigh": "softmax"}),
        (NO_SOFTMAX, {"mask": right, "weigh": "softmax", "scale": D**-0.5}),
        (NO_SOFTMAX, {"mask": right, "weigh": "softmax of what is seen"}),
        (
            NO_SOFTMAX,
            {"mask": right, "weigh": "softmax of what is seen", "scale": D**-0.5},
        ),
        (NO_SOFTMAX, {"mask": right, "weigh": "shares"}),
        (NO_SOFTMAX, {"mask": right / np.maximum(right.sum(-1, keepdims=True), 1e-9)}),
        (NO_SOFTMAX, {"mask": right / (t[:, None] + 1)}),
        (BELOW_0, {"mask": right, "weigh": "relu"}),
        (NO_ROOT, {"mask": right, "scale": D**-0.5}),
        (NO_ROOT, {"mask": right, "scale": 1 / D}),
        (PAIRING, {"mask": right, "keys": turns, "values": turns, "decays": turns}),
        (PAIRING, {"mask": right, "keys": turns, "values": turns}),
        (PAIRING, {"mask": right, "keys": turns}),
        (PAIRING, {"mask": right, "values": turns}),
        (PAIRING, {"mask": right, "keys": 0 * turns, "values": 0 * turns}),
        (OTHER_DECAYS, {"mask": right, "decays": turns}),
        (OTHER_DECAYS, {"mask": right, "decays": 0 * turns}),
        (OTHER_DECAYS, {"mask": right[::-1]}),
        (TURNED, {"mask": right, "k": inputs["v"], "v": inputs["k"]}),
        (TURNED, {"mask": right, "v": inputs["k"]}),
    ]
    if H == G:
        keys = inputs["k"]
        found.append((TURNED, {"mask": right, "q": keys, "k": inputs["q"]}))
    outs = [(words, _parallel(**{**inputs, **changes})) for words, changes in found]
    in_turns = {"keys": turns, "values": turns, "decays": turns}
    for words, changes, size in ((HEAD_ORDER, {}, H // G), (PAIRING, in_turns, G)):
        out = _parallel(**{**inputs, "mask": right, **changes})
        outs.append((words, out[..., _by_turns(H, size), :]))
    outs += [(RESHAPED, out) for out in _reshaped({**inputs, "mask": right})]
    return [(words, out.astype(decay.dtype)) for words, out in outs]


@reference
def _reshaped(inputs: dict) -> list[np.ndarray]:
    """Where heads are brought before tokens by reshape: at the end, at the beginning, and
    at both."""
    (*lead, T, H, D), G = inputs["q"].shape, inputs["k"].shape[-2]
    own = _neighbours(H, G)
    of_heads = {"q": inputs["q"], **{key: inputs[key][..., own, :] for key in "kv"}}
    mixed = {
        key: x.reshape(*lead, H, T, D).swapaxes(-3, -2) for key, x in of_heads.items()
    }
    out = _parallel(**inputs)
    out_of_mixed = _parallel(**{**inputs, **mixed, "decays": own})
    at_end = [x.swapaxes(-3, -2).reshape(*lead, T, H, D) for x in (out, out_of_mixed)]
    return [*at_end, out_of_mixed]


@reference
def _parallel(
    q, k, v, mask, weigh=None, scale=1.0, keys=None, values=None, decays=None, **_
) -> np.ndarray:
    """Masked attention. keys, values, decays: for each query head the KV head whose they
    are."""
    own = _neighbours(q.shape[-2], k.shape[-2])
    keys, values, decays = (own if x is None else x for x in (keys, values, decays))
    scores = scale * np.einsum("...thd,...shd->...hts", q, k[..., keys, :])
    mask = mask[decays]
    weights = scores * mask
    if weigh == "softmax":
        weights = np.exp(weights)
    elif weigh == "softmax of what is seen":
        weights = np.exp(scores) * (mask > 0)
    elif weigh == "relu":
        weights = np.maximum(weights, 0)
    if weigh not in (None, "relu"):
        sums = weights.sum(axis=-1, keepdims=True)
        weights = weights / np.where(sums == 0, 1, sums)
    if weigh == "softmax of what is seen":
        weights = weights * mask
    return np.einsum("...hts,...shd->...thd", weights, v[..., values, :])


# linear_chunked


def linear_chunked_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, T, (H, G, D), chunk_size in (
        ("one token, one number, and an empty state", 1, (1, 1, 1), 4),
        ("one token, one number", 1, (1, 1, 1), 4),
        ("three tokens in one chunk, an empty state, and no decay", 3, (1, 1, 2), 3),
        ("three tokens in one chunk, and an empty state", 3, (1, 1, 2), 3),
        ("three tokens in one chunk, and no decay", 3, (1, 1, 2), 3),
        ("three tokens in one chunk", 3, (1, 1, 2), 3),
        ("three tokens, fewer than a chunk", 3, (1, 1, 2), 5),
        ("two chunks of one token, and no decay", 2, (1, 1, 2), 1),
        ("two chunks of two tokens, and no decay", 4, (1, 1, 2), 2),
        ("two chunks of two tokens", 4, (1, 1, 2), 2),
        ("three chunks of two tokens", 6, (1, 1, 2), 2),
        ("five chunks of one token", 5, (1, 1, 2), 1),
        ("two chunks of three tokens, and one of two", 8, (1, 1, 2), 3),
        ("two heads", 4, (2, 2, 2), 2),
        ("three query heads on one KV head", 5, (3, 1, 2), 2),
        ("four query heads on two KV heads", 7, (4, 2, 3), 3),
        ("six query heads on three KV heads", 5, (6, 3, 2), 2),
        ("as many tokens in a chunk as heads and numbers", 8, (4, 4, 4), 4),
        ("no token", 0, (4, 2, 3), 2),
        ("chunks of 64, which is the default", 70, (2, 1, 2), None),
        ("chunks of 0 tokens", 4, (2, 1, 2), 0),
        ("chunks of less than no tokens", 4, (2, 1, 2), -1),
        ("no token, and chunks of 0", 0, (2, 1, 2), 0),
        ("single precision", 9, (4, 2, 3), 4),
        ("random sizes", *_random_chunks(rng)),
        ("seven tokens, to be trained with", 7, (4, 2, 3), 3),
        ("200 tokens in chunks of two", 200, (1, 1, 2), 2),
        ("a decay of 1 / 1,024, and 130 tokens in one chunk", 130, (1, 1, 2), 130),
        ("1,280 tokens in chunks of 64", 1280, (1, 1, 3), 64),
    ):
        text = _text(rng, name, (T,), (H, G, D))
        state = rng.normal(size=(G, D, D)) * ("empty state" not in name)
        inputs = _in_precision(name, {"state": state, **text})
        grads = {"grad_out": None, "grad_state": None}
        if "trained" in name:
            grads = {
                "grad_out": rng.normal(size=(T, H, D)),
                "grad_state": rng.normal(size=(G, D, D)),
            }
        inputs |= {"chunk_size": chunk_size, **grads}
        cases.append(Case(name, inputs, _chunked_limits(inputs)))
    return cases


def _random_chunks(rng) -> tuple[int, tuple[int, int, int], int]:
    T, G, group_size, D, chunk_size = (int(n) for n in rng.integers(2, 4, size=5))
    return T + 7, (G * group_size, G, D), chunk_size + 1


def _chunked_limits(inputs: dict) -> dict[str, float]:
    """Room for the scores of all chunks at once, and for what each token writes, where
    there are enough of them to tell: not for scores of all tokens with all. A state may
    be made a few times for each chunk, not for each token."""
    (T, H, D), G = inputs["q"].shape, len(inputs["decay"])
    n, size = inputs["chunk_size"] or 64, inputs["q"].itemsize
    numbers = max(T * H * n, T * H * D, T * G * D * D, n * n * H)
    num_chunks = -(-T // max(n, 1))
    is_long = T > 1000
    return {
        "largest_tensor_bytes": 2 * size * numbers if T >= 200 else math.inf,
        "state_sized_tensors": 20 * num_chunks if is_long else math.inf,
        "bytes_made": 24 * size * numbers if is_long else math.inf,
    }


BEFORE = (
    "When token t of a chunk asks, t = 1, 2, ..., the state before the chunk has faded t "
    "times: γ^t"
)
AFTER = "Token t of a chunk of n, t = 1, 2, ..., fades n - t times until its end"
OVER_A_CHUNK = "Over a chunk of n tokens the state before it fades n times: γ^n"
LAST_CHUNK = "The last chunk may be shorter: it has n tokens, not chunk_size"
LAST_COUNTS = "The last chunk counts too, though it is not full"
ACROSS = "What came before the chunk is in the state: add what it says to each query"
WITHIN = "The tokens of a chunk see each other too: add linear_parallel of the chunk"
WITHIN_FADES = "Within a chunk what was told fades too, by each head's own decay"
CARRY = "The state goes on from chunk to chunk: the next one reads what this one leaves"
START = "What is in the state that came in goes on: it fades, and is not left out"
READ_OLD = (
    "A chunk reads the state before it: in the new one its own tokens would count twice"
)
IS_TOLD = "After each chunk the state takes in what its tokens write"
PER_HEAD = "Each KV head has a decay of its own: decay[g] is for state[g]"
ALL_PAIRS = (
    "That compares all tokens with all, T² of them: within a chunk compare its tokens, "
    "and let the state say what came before"
)
MORE_THAN_A_CHUNK = "That compares more than chunk_size tokens at once"
PREFIX = (
    "Work grows with T² where each chunk reads again what came before: that is in the "
    "state"
)
TOKEN_BY_TOKEN = (
    "That makes a state for each token: read and write it once per chunk, with matrix "
    "products over the chunk's tokens"
)


def linear_chunked_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    if expected["raised"] != "nothing":
        return KEEP_THE_CHECK
    state, out = got["state"], got.get("out")
    if not isinstance(state, np.ndarray) or not isinstance(out, np.ndarray):
        return None
    if _are_in_other_order(expected, got):
        return ORDER
    if _is_lost_in_chunks(inputs, state, out):
        return POWERS
    is_short = len(inputs["q"]) <= 16
    of_state, of_out = _chunked_slips(inputs) if is_short else ([], [])
    if not _is_like(state, expected["state"]):
        return _which(state, expected["state"], of_state)
    if out.shape != expected["out"].shape:
        return LAST_COUNTS if _is_beginning(out, expected["out"]) else None
    if not _is_like(out, expected["out"]):
        return _which(out, expected["out"], of_out)
    if not got["state_is_as_before"]:
        return CALLERS
    if "gradients" in expected:
        return HAVE_GRADIENTS
    return _why_so_much(inputs, got)


def _is_lost_in_chunks(inputs: dict, state: np.ndarray, out: np.ndarray) -> bool:
    """As _is_lost, of a text in one chunk."""
    T, decay = len(out), inputs["decay"]
    is_one_chunk = (inputs["chunk_size"] or 64) >= T > 100 and len(decay) == 1
    return is_one_chunk and _is_lost(decay, out, out, state)


def _is_beginning(out: np.ndarray, right: np.ndarray) -> bool:
    return 0 < len(out) < len(right) and _is_near(out, right[: len(out)])


def _why_so_much(inputs: dict, got: dict) -> str | None:
    """Of an answer that is right, but for what it makes."""
    limits, T = _chunked_limits(inputs), len(inputs["q"])
    if got["largest_tensor_bytes"] > limits["largest_tensor_bytes"]:
        num_pairs = got["largest_tensor_bytes"] / got["out"].itemsize
        return ALL_PAIRS if num_pairs >= T * T else MORE_THAN_A_CHUNK
    if got["state_sized_tensors"] > limits["state_sized_tensors"]:
        return TOKEN_BY_TOKEN
    return PREFIX


@reference
def _chunked_slips(inputs: dict) -> tuple[list, list]:
    """What comes of each slip of linear_chunked, of the state and of out: words and
    numbers."""
    (T, H, _), G = inputs["q"].shape, len(inputs["decay"])
    n = inputs["chunk_size"] or 64
    own, turns = _neighbours(H, G), _turns(H, G)
    last = (T // n) * n
    of_state = [
        (AFTER, {"after": "0"}),
        (AFTER, {"after": "n - t + 1"}),
        (AFTER, {"after": "n - t - 1"}),
        (AFTER, {"after": "t"}),
        (AFTER, {"after": "t - 1"}),
        (OVER_A_CHUNK, {"over": "0"}),
        (OVER_A_CHUNK, {"over": "1"}),
        (OVER_A_CHUNK, {"over": "n - 1"}),
        (OVER_A_CHUNK, {"over": "n + 1"}),
        (ROWS, {"is_turned": True}),
        (START, {"is_from_nothing": True}),
        (IS_TOLD, {"is_told": False}),
        (PER_HEAD, {"fade": inputs["decay"][::-1]}),
        (PER_HEAD, {"fade": 0 * inputs["decay"] + inputs["decay"][0]}),
    ]
    if n < T:
        of_state += [
            (CARRY, {"is_carried": False}),
            (CARRY, {"is_carried": False, "is_from_nothing": True}),
        ]
    if T % n and n > 1:
        of_state += [
            (LAST_CHUNK, {"over": "size"}),
            (LAST_CHUNK, {"after": "size - t"}),
            (LAST_CHUNK, {"after": "size - t", "over": "size"}),
        ]
        if last:
            of_state.append((LAST_COUNTS, {"end": last}))
    of_out = [
        (BEFORE, {"before": "0"}),
        (BEFORE, {"before": "t - 1"}),
        (BEFORE, {"before": "t + 1"}),
        (BEFORE, {"before": "1"}),
        (BEFORE, {"before": "n"}),
        (BEFORE, {"before": "n - t"}),
        (BEFORE, {"before": "n - t + 1"}),
        (ACROSS, {"is_across": False}),
        (WITHIN, {"is_within": False}),
        (WITHIN_FADES, {"within": 0 * inputs["decay"] + 1}),
        (WITHIN_FADES, {"within": inputs["decay"][::-1]}),
        (READ_OLD, {"is_new_read": True}),
        (READ_OLD, {"is_new_read": True, "before": "0"}),
        (READ_OLD, {"is_new_read": True, "is_within": False}),
        (READ_ROWS, {"is_read_turned": True}),
        (PAIRING, {"heads": turns}),
        (PAIRING, {"heads": 0 * own}),
        (PER_HEAD, {"of_before": inputs["decay"][turns]}),
        (PER_HEAD, {"of_before": inputs["decay"][::-1][own]}),
        (PER_HEAD, {"of_before": inputs["decay"][0 * own]}),
    ]
    if n < T:
        of_out.append((CARRY, {"is_first_read": True}))
    if not T:
        of_state, of_out = [], []
    states = [(words, _chunked(inputs, **changes)[1]) for words, changes in of_state]
    return states, [(words, _chunked(inputs, **changes)[0]) for words, changes in of_out]


@reference
def _chunked(
    inputs: dict,
    before="t",
    after="n - t",
    over="n",
    fade: np.ndarray | None = None,
    within: np.ndarray | None = None,
    of_before: np.ndarray | None = None,
    heads: np.ndarray | None = None,
    end: int | None = None,
    is_turned=False,
    is_read_turned=False,
    is_from_nothing=False,
    is_carried=True,
    is_told=True,
    is_across=True,
    is_within=True,
    is_new_read=False,
    is_first_read=False,
) -> tuple[np.ndarray, np.ndarray]:
    """Chunk by chunk, with one thing wrong. before, after, over: how many times the state
    has faded when a token asks, a token until the end of its chunk, and the state over a
    chunk. fade, within, of_before: the decays of the state, within a chunk, and of each
    query head in reading."""
    state, q, k, v, decay = (inputs[name] for name in ("state", "q", "k", "v", "decay"))
    size, (T, H, _), G = inputs["chunk_size"] or 64, q.shape, len(decay)
    own = _neighbours(H, G)
    fade = decay if fade is None else fade
    within = decay if within is None else within
    of_before = decay[own] if of_before is None else of_before
    heads = own if heads is None else heads
    state = first_state = 0 * state if is_from_nothing else state
    outs = [q[:0]]
    for first in range(0, T if end is None else end, size):
        q_c, k_c, v_c = (x[first : first + size] for x in (q, k, v))
        n = len(q_c)
        age = np.arange(1, n + 1)
        distance = np.maximum(age[:, None] - age, 0)
        mask = within[:, None, None] ** distance * np.tri(n)
        times = {
            "0": 0 * age,
            "1": 0 * age + 1,
            "n": 0 * age + n,
            "n - 1": 0 * age + n - 1,
            "n + 1": 0 * age + n + 1,
            "size": 0 * age + size,
            "t": age,
            "t - 1": age - 1,
            "t + 1": age + 1,
            "n - t": n - age,
            "n - t + 1": n - age + 1,
            "n - t - 1": np.maximum(n - age - 1, 0),
            "size - t": size - age,
        }
        left = fade ** times[after][:, None]  # (n, G)
        told = np.einsum("tgi,tgj->gij", v_c * left[:, :, None], k_c) * is_told
        told = told.swapaxes(1, 2) if is_turned else told
        new = (fade ** times[over][0])[:, None, None] * state + told
        read = new if is_new_read else first_state if is_first_read else state
        read = read.swapaxes(1, 2) if is_read_turned else read
        faded = of_before ** times[before][:, None]  # (n, H)
        across = _asked(read, q_c * faded[:, :, None], heads) * is_across
        outs.append(_parallel(q_c, k_c, v_c, mask) * is_within + across)
        state = new if is_carried or first + size >= T else first_state
    return np.concatenate(outs).astype(q.dtype), state.astype(q.dtype)


# state_bytes


def state_bytes_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, L, H, G, D, bytes_per_number in (
        ("one layer, one head of 6 numbers, one byte per number", 1, 1, 1, 6, 1),
        ("eight bytes per number", 1, 1, 1, 6, 8),
        ("four bytes per number, which is the default", 1, 1, 1, 6, 4),
        ("two bytes per number", 1, 1, 1, 6, 2),
        ("seven layers", 7, 1, 1, 10, 4),
        ("three heads", 1, 3, 3, 10, 4),
        ("four query heads that share one KV head", 1, 4, 1, 10, 4),
        ("six query heads on three KV heads", 1, 6, 3, 10, 4),
        ("Llama 3 8B", 32, 32, 8, 128, 2),
        (
            "a random shape",
            *_random_config(rng),
            8,
        ),
    ):
        sizes = {"vocab_size": 256, "d_ff": 7, "max_seq_len": 9}
        heads = {"num_layers": L, "num_heads": H, "num_kv_heads": G, "d_model": H * D}
        inputs = {"config": {**sizes, **heads}, "bytes_per_number": bytes_per_number}
        cases.append(Case(name, inputs))
    return cases


def _random_config(rng) -> tuple[int, int, int, int]:
    L, G, group_size, half = (int(n) for n in rng.integers(2, 9, size=4))
    return L, G * group_size, G, 2 * half


def state_bytes_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    ours, theirs, config = expected["bytes"], got["bytes"], inputs["config"]
    if isinstance(theirs, float):
        return "Bytes are counted: give an int"
    if not isinstance(theirs, int):
        return None
    L, H, G = (config[name] for name in ("num_layers", "num_heads", "num_kv_heads"))
    D, size = config["d_model"] // H, inputs["bytes_per_number"]
    numbers = ours // size
    wrong = {
        "A state takes the place of keys and values: it is one matrix, not two": [
            2 * ours
        ],
        "A state has D rows of D numbers": [ours // D, 2 * ours // D],
        "It is the same for a text of any length: no number of tokens counts": [
            ours * config["max_seq_len"],
            ours // D * config["max_seq_len"],
            2 * ours // D * config["max_seq_len"],
        ],
        "Each layer has a state of its own": [ours // L],
        "Each KV head has a state of its own": [ours // G] * (H > 1),
        "Only KV heads have a state: several query heads read one": [ours // G * H],
        "A row has head_dim numbers, not d_model": [ours * H * H, ours * H] * (H == G),
        "That counts numbers, not bytes": [numbers],
        "A number has bytes_per_number bytes, whatever the default is": [4 * numbers],
        "A layer keeps a state, which takes the token in: it has no other memory": [
            ours + 2 * ours // D
        ],
    }
    if L == H == 1 and size == 4:
        wrong = {
            "Where bytes_per_number is not given it is 4": [
                other * numbers for other in (1, 2, 8)
            ]
        }
    return _reproduced(
        {words: theirs in others and theirs != ours for words, others in wrong.items()}
    )


EXERCISES = [
    Exercise("lib.state.linear_step", 2, linear_step_cases, linear_step_explain),
    Exercise("lib.state.decay_mask", 2, decay_mask_cases, decay_mask_explain),
    Exercise(
        "lib.state.linear_parallel",
        2,
        linear_parallel_cases,
        linear_parallel_explain,
        errors={
            "because the unspecified dimension size -1": "Where there are no tokens -1 "
            "can be anything: say H // G, or unflatten the heads alone",
            "view size is not compatible": "A tensor need not lie in memory in the order "
            "of its shape: unflatten, flatten and reshape take any",
            "modified by an inplace operation": "Gradients need what was there before: "
            "make a new tensor instead",
        },
    ),
    Exercise(
        "lib.state.linear_chunked",
        3,
        linear_chunked_cases,
        linear_chunked_explain,
        errors={
            "because the unspecified dimension size -1": "Where there are no tokens -1 "
            "can be anything: say H // G, or unflatten the heads alone",
            "modified by an inplace operation": "Gradients need the state as it was: "
            "make a new one instead of changing it in place",
            "view size is not compatible": "A tensor need not lie in memory in the order "
            "of its shape: unflatten, flatten and reshape take any",
        },
    ),
    Exercise("lib.state.delta_step", 2, delta_step_cases, delta_step_explain),
    Exercise("lib.state.state_bytes", 1, state_bytes_cases, state_bytes_explain),
]
