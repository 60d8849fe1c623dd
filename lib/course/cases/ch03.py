"""Chapter 3: what its exercises are tried on."""

import itertools
import math
from collections.abc import Iterator

import numpy as np

from lib.course.cases.ch01 import ENDS, FEW_ENDS, _behind, _lower_the_past, _reproduced
from lib.course.compare import TOLERANCES
from lib.course.exercises import Case, Exercise
from lib.course.shipped import reference


def kv_cache_bytes_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    # First one byte, then eight: so that the default of four stands alone.
    for name, L, H, G, D, num_tokens, bytes_per_number in (
        (
            "one layer, one head of 6 numbers, one token, one byte per number",
            1,
            1,
            1,
            6,
            1,
            1,
        ),
        ("eight bytes per number", 1, 1, 1, 6, 1, 8),
        ("four bytes per number, which is the default", 1, 1, 1, 6, 1, 4),
        ("five tokens", 1, 1, 1, 6, 5, 4),
        ("three layers", 3, 1, 1, 10, 1, 4),
        ("two bytes per number", 1, 1, 1, 6, 1, 2),
        ("three heads", 1, 3, 3, 10, 1, 4),
        ("four query heads that share one KV head", 1, 4, 1, 10, 1, 4),
        ("six query heads on three KV heads", 1, 6, 3, 10, 1, 4),
        ("no tokens", 2, 4, 2, 8, 0, 4),
        ("Llama 3 8B, one token", 32, 32, 8, 128, 1, 2),
        ("Llama 3 70B, five million tokens and one", 80, 64, 8, 128, 5_000_001, 2),
    ):
        cases.append(_bytes_case(name, L, H, G, D, num_tokens, bytes_per_number))
    L, G, group_size, half, num_tokens = (int(n) for n in rng.integers(2, 9, size=5))
    shape = L, G * group_size, G, 2 * half, num_tokens
    cases.append(_bytes_case("a random shape", *shape, 8))
    return cases


def _bytes_case(name: str, L, H, G, D, num_tokens, bytes_per_number) -> Case:
    sizes = {"vocab_size": 256, "d_ff": 7, "max_seq_len": 9}
    heads = {"num_layers": L, "num_heads": H, "num_kv_heads": G, "d_model": H * D}
    counts = {"num_tokens": num_tokens, "bytes_per_number": bytes_per_number}
    return Case(name, {"config": {**sizes, **heads}, **counts})


def kv_cache_bytes_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    ours, theirs, config = expected["bytes"], got["bytes"], inputs["config"]
    if isinstance(theirs, float):
        return "Bytes are counted: give an int"
    if not isinstance(theirs, int) or not ours:
        return None
    L, H, G = (config[name] for name in ("num_layers", "num_heads", "num_kv_heads"))
    num_tokens, size = inputs["num_tokens"], inputs["bytes_per_number"]
    numbers = ours // size
    in_32_bits = (ours + 2**31) % 2**32 - 2**31
    wrong = {
        "Each token has a key and a value": [ours // 2],
        "Only KV heads are stored, of head_dim numbers: several query heads read one": [
            ours // G * H
        ],
        # Whoever takes d_model for it has failed where H is G.
        "A key has head_dim numbers, not d_model": [ours * H] * (H == G),
        "Each layer has keys and values of its own": [ours // L],
        "Each KV head has a key and a value": [ours // G],
        "That counts numbers, not bytes": [numbers],
        "A number has bytes_per_number bytes, whatever the default is": [4 * numbers],
        "That is one token's": [ours // max(num_tokens, 1)],
        "The count is too large for 32 bits": [in_32_bits, in_32_bits % 2**32],
        "Tokens of several texts may be more than max_seq_len": [
            ours // max(num_tokens, 1) * config["max_seq_len"]
        ],
    }
    if size == 4 and L == H == num_tokens == 1:  # without the argument, and nothing else
        wrong = {
            "Where bytes_per_number is not given it is 4": [
                other * numbers for other in (1, 2, 8)
            ]
        }
    return _reproduced(
        {words: theirs in others and theirs != ours for words, others in wrong.items()}
    )


def append_kv_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, seq_lens, query_lens, S, (G, D) in (
        ("one request, its first token", [1], [1], 3, (1, 1)),
        ("one request, its third token", [3], [1], 4, (1, 2)),
        ("a prompt of three tokens", [3], [3], 5, (2, 2)),
        ("two requests of different lengths, one token each", [2, 4], [1, 1], 5, (1, 2)),
        ("a prompt beside a request that goes on", [3, 6], [3, 1], 7, (1, 2)),
        ("several new tokens each, behind others", [5, 7, 4], [2, 3, 1], 8, (2, 2)),
        ("a request that rests", [2, 3, 4], [1, 0, 2], 5, (1, 2)),
        ("a row that becomes full", [4, 4], [1, 4], 4, (1, 2)),
        ("a large cache", [600, 801], [1, 2], 900, (2, 8)),
        ("single precision", [2, 5], [1, 2], 6, (1, 2)),
    ):
        dtype = np.float32 if name == "single precision" else np.float64
        caches = []
        for _ in "kv":  # what lies behind a request's tokens is poison
            cache = np.full((len(seq_lens), S, G, D), np.nan)
            for b, (seq_len, query_len) in enumerate(zip(seq_lens, query_lens)):
                cache[b, : seq_len - query_len] = rng.normal(
                    size=(seq_len - query_len, G, D)
                )
            caches.append(cache)
        k, v = (rng.normal(size=(sum(query_lens), G, D)).astype(dtype) for _ in "kv")
        inputs = {
            "k_cache": caches[0].astype(dtype),
            "v_cache": caches[1].astype(dtype),
            "k": k,
            "v": v,
            "seq_lens": np.array(seq_lens),
            "query_lens": np.array(query_lens),
        }
        cases.append(Case(name, inputs, {"peak_bytes": _append_limit(k)}))
    return cases


def _append_limit(k: np.ndarray) -> int:
    """Room for the new keys and values several times, and for a mask: not for a cache."""
    return 4 * k.nbytes + 16384


def append_kv_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    k, v = inputs["k"], inputs["v"]
    seq_lens, query_lens = (np.array(inputs[n]) for n in ("seq_lens", "query_lens"))
    begin = seq_lens - query_lens
    names = "k_cache", "v_cache"
    if all(_is_same(got[name], inputs[name]) for name in names):
        return "Nothing was written: change k_cache and v_cache in place"
    if all(_is_same(got[name], expected[name]) for name in names):
        if got["peak_bytes"] < inputs["k_cache"][0].nbytes:
            return None
        return "That copies the cache, or a row of it: write k and v alone"
    swapped, start, far, several, row, same_start, order = (
        "Keys go to k_cache, values to v_cache",
        "Write behind the tokens that are there: from seq_lens - query_lens on",
        "That begins too far behind: seq_lens counts the new tokens too, so begin at "
        "seq_lens - query_lens",
        "A request may bring several tokens: begin at seq_lens - query_lens",
        "Request b's tokens go to row b",
        "Requests differ in length: each begins at its own seq_lens[b] - query_lens[b]",
        "The places are right, the tokens are others': in k they lie one behind the "
        "other, request after request",
    )
    first = np.full_like(begin, begin[0])
    variants = [
        (swapped, {"k": k, "v": k}),
        (swapped, {"k": v, "v": v}),
        (swapped, {"k": v, "v": k}),
        (start, {"starts": 0 * begin}),
        (far, {"starts": seq_lens}),
        (far, {"starts": begin + 1}),
        (several, {"starts": seq_lens - 1}),
        (row, {"rows": 0 * begin}),
        (row, {"rows": 0 * begin, "starts": begin[0] + query_lens.cumsum() - query_lens}),
        (same_start, {"starts": first}),
    ]
    found = {order: _are_other_tokens(inputs, expected, got)}
    for words, variant in variants:
        others = _written(inputs, **{"k": k, "v": v, "starts": begin, **variant})
        is_it = all(_is_same(got[name], other) for name, other in zip(names, others))
        found[words] = found.get(words, False) or is_it
    if found[far] and query_lens.max() == 1:  # so small that several are the same
        return far
    return _reproduced(found)


@reference
def _written(inputs: dict, k, v, starts, rows=None) -> tuple[np.ndarray, np.ndarray]:
    """The caches with each request's new tokens from its entry of `starts` on, in its
    row or that of `rows`."""
    caches = inputs["k_cache"].copy(), inputs["v_cache"].copy()
    first = 0
    for b, query_len in enumerate(inputs["query_lens"]):
        row = b if rows is None else rows[b]
        for cache, new in zip(caches, (k, v)):
            places = cache[row, starts[b] : starts[b] + query_len]
            places[:] = new[first : first + len(places)]
        first += query_len
    return caches


def _are_other_tokens(inputs: dict, expected: dict, got: dict) -> bool:
    """Whether each new place holds the key and the value of some new token, and all else
    is right."""
    k, v = (new.reshape(len(new), -1) for new in (inputs["k"], inputs["v"]))
    k_cache, v_cache = expected["k_cache"].copy(), expected["v_cache"].copy()
    for b, (end, query_len) in enumerate(zip(inputs["seq_lens"], inputs["query_lens"])):
        for place in range(end - query_len, end):
            key, value = (got[n][b, place].ravel() for n in ("k_cache", "v_cache"))
            if not ((k == key).all(axis=1) & (v == value).all(axis=1)).any():
                return False
            k_cache[b, place], v_cache[b, place] = (
                got[n][b, place] for n in ("k_cache", "v_cache")
            )
    return _is_same(got["k_cache"], k_cache) and _is_same(got["v_cache"], v_cache)


def _is_same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and np.array_equal(one, other, equal_nan=True)


def attend_cached_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    # The first rows are full: what is NaN there was not read behind the keys.
    for name, seq_lens, query_lens, S, (H, G, D) in (
        ("one token, all alone", [1], [1], 1, (1, 1, 2)),
        ("one query over three keys", [3], [1], 3, (1, 1, 3)),
        ("a prompt: three queries, three keys", [3], [3], 5, (1, 1, 3)),
        ("two queries over five keys", [5], [2], 6, (1, 1, 3)),
        ("two heads", [4], [1], 5, (2, 2, 3)),
        ("four query heads on two KV heads", [4], [2], 6, (4, 2, 4)),
        ("two requests of different lengths", [5, 2], [1, 1], 6, (1, 1, 3)),
        ("a prompt beside two that go on", [3, 7, 4], [3, 1, 2], 8, (4, 2, 4)),
        ("a request that rests", [2, 3, 0, 4], [1, 0, 0, 2], 5, (2, 1, 3)),
        ("an earlier request's keys behind these", [2, 4], [1, 1], 7, (2, 1, 3)),
        ("scores of the past far below 0", [3], [3], 4, (2, 2, 4)),
        ("500 keys, 16 query heads on two KV heads", [500], [1], 512, (16, 2, 16)),
        ("single precision", [4], [2], 5, (2, 1, 4)),
    ):
        dtype = np.float32 if name == "single precision" else np.float64
        q = rng.normal(size=(sum(query_lens), H, D))
        k_cache, v_cache = rng.normal(size=(2, len(seq_lens), S, G, D))
        if name.startswith("scores"):
            _lower_the_past(q, k_cache[0, :3], v_cache[0, :3])
        for b, seq_len in enumerate(seq_lens):  # what nobody may read is poison
            for cache in (k_cache, v_cache):
                cache[b, seq_len:] = 9.0 if "earlier" in name else np.nan
        scores_bytes = 8 * len(seq_lens) * max(query_lens) * H * S
        inputs = {
            "q": q.astype(dtype),
            "k_cache": k_cache.astype(dtype),
            "v_cache": v_cache.astype(dtype),
            "seq_lens": np.array(seq_lens),
            "query_lens": np.array(query_lens),
        }
        # Room for one copy of what is cached, padded scores, and trifles: not for a copy
        # of keys and values for each query head.
        limit = 3 * k_cache.nbytes + 6 * scores_bytes + 8 * q.nbytes + 4096
        cases.append(Case(name, inputs, {"peak_bytes": limit}))
    return cases


def attend_cached_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    out, right = got["out"], expected["out"]
    if not isinstance(out, np.ndarray):
        return None
    if out.shape != right.shape:
        is_turned = out.ndim == 3 and _is_near(np.swapaxes(out, 0, 1), right)
        words = "Put tokens before heads again: out has the shape of q"
        return words if is_turned else None
    if _is_near(out, right):
        H, D = inputs["q"].shape[1:]
        if got["peak_bytes"] < out.itemsize * inputs["seq_lens"].max() * H * D:
            return None
        return (
            "That takes the memory of a copy of the keys for each query head: let the "
            "queries that read one key be rows of one matrix"
        )
    behind = "Something behind a request's seq_lens[b] keys was read"
    if _is_near(out, np.where(_has_room_behind(inputs), np.nan, right)):
        return behind
    low = "A key of a later position has weight 0: set its score to -∞"
    mixed = (
        "Tokens and heads are mixed up: what is flattened on the way in is unflattened "
        "in the same order on the way out"
    )
    variants = [
        ("A query must not see keys of later positions", {"is_causal": False}),
        ("Query t of T is at position S - T + t: it sees all before it", {"shift": None}),
        ("A query sees the key at its own position too", {"shift": -1}),
        ("A query must not see keys of later positions", {"shift": 1}),
        ("Divide the scores by the root of D", {"scale": 1.0}),
        ("Divide by the root of D, not by D", {"scale": 1 / inputs["q"].shape[2]}),
        ("Query head h reads KV head h // (H / G): neighbours share", {"is_tiled": True}),
        ("Each request reads its own row of the cache", {"row": 0}),
        (behind, {"reads_behind": True}),
        *((low, {"fill": -number}) for number in (0, 1, 10, 50, 100, 1e3)),
    ]
    is_mixed = any(
        _is_near(out, other) and not _is_near(other, right)
        for other in _attend_mixed(inputs)
    )
    found = {mixed: is_mixed or _are_rows_in_another_order(out, right)}
    for words, variant in variants:
        with np.errstate(all="ignore"):
            other = _attend(inputs, **variant)
        is_it = not _is_near(other, right) and _is_near(out, other)
        found[words] = found.get(words, False) or is_it
    return _reproduced(found)


def _is_near(one: np.ndarray, other: np.ndarray) -> bool:
    """As compare.py takes two for the same."""
    tolerance = TOLERANCES[str(one.dtype)]
    return one.shape == other.shape and np.allclose(
        one, other, rtol=tolerance, atol=tolerance, equal_nan=True
    )


def _has_room_behind(inputs: dict) -> np.ndarray:
    """For each query, (N, 1, 1): is its request's row longer than the request?"""
    has_room = inputs["seq_lens"] < inputs["k_cache"].shape[1]
    return np.repeat(has_room, inputs["query_lens"])[:, None, None]


def _are_rows_in_another_order(out: np.ndarray, right: np.ndarray) -> bool:
    """Whether the vectors of all tokens and heads are the right ones, elsewhere."""
    if out.shape[1] == 1 or _is_near(out, right):
        return False
    rows, rights = (x.reshape(-1, x.shape[-1]).round(6) for x in (out, right))
    rows, rights = (x[np.lexsort(x.T)] for x in (rows, rights))
    return np.allclose(rows, rights, atol=1e-5)


@reference
def _attend(
    inputs: dict,
    is_causal=True,
    shift=0,
    scale=None,
    is_tiled=False,
    row=None,
    reads_behind=False,
    fill=-np.inf,
) -> np.ndarray:
    """Attention over a cache with one thing wrong, for naming what may be wrong.

    shift: how many positions further a query sees; None, as if the first key were new.
    """
    q, k_cache, v_cache = inputs["q"], inputs["k_cache"], inputs["v_cache"]
    H, D = q.shape[1:]
    group_size = H // k_cache.shape[2]
    outs, start = [], 0
    for b, (S, T) in enumerate(zip(inputs["seq_lens"], inputs["query_lens"])):
        q_b = q[start : start + T]
        num_keys = k_cache.shape[1] if reads_behind else S
        k, v = (
            cache[b if row is None else row, :num_keys] for cache in (k_cache, v_cache)
        )
        if is_tiled:
            k, v = (np.concatenate([x] * group_size, axis=1) for x in (k, v))
        else:
            k, v = (np.repeat(x, group_size, axis=1) for x in (k, v))
        scores = np.einsum("thd,shd->hts", q_b, k)
        scores = scores * (D**-0.5 if scale is None else scale)
        last_seen = np.arange(T) + (0 if shift is None else S - T + shift)
        keys_at = np.arange(num_keys)
        hidden = (keys_at > last_seen[:, None]) & (keys_at < S)
        if is_causal:
            scores = np.where(hidden, fill, scores)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-1e9))
        weights = weights / weights.sum(axis=-1, keepdims=True)
        outs.append(np.einsum("hts,shd->thd", weights, v))
        start += T
    return np.concatenate(outs)


@reference
def _attend_mixed(inputs: dict) -> Iterator[np.ndarray]:
    """Attention with the rows of a KV head in each wrong order, in and out."""
    q, k_cache, v_cache = inputs["q"], inputs["k_cache"], inputs["v_cache"]
    (H, D), G = q.shape[1:], k_cache.shape[2]
    R = H // G
    ways_in = {  # (T, H, D) -> (G, R·T, D), of which the mask thinks as (G, R, T, D)
        "heads first": lambda x: x.reshape(-1, G, R, D).transpose(1, 2, 0, 3),
        "tokens first": lambda x: x.reshape(-1, G, R, D).transpose(1, 0, 2, 3),
        "as it lies": lambda x: x,
    }
    ways_out = {  # and back
        "heads first": lambda x: x.reshape(G, R, -1, D).transpose(2, 0, 1, 3),
        "tokens first": lambda x: x.reshape(G, -1, R, D).transpose(1, 0, 2, 3),
        "as it lies": lambda x: x,
    }
    for way_in, way_out in itertools.product(ways_in, ways_out):
        outs, start = [], 0
        for b, (S, T) in enumerate(zip(inputs["seq_lens"], inputs["query_lens"])):
            rows = ways_in[way_in](q[start : start + T]).reshape(G, R * T, D)
            k, v = (np.swapaxes(cache[b, :S], 0, 1) for cache in (k_cache, v_cache))
            scores = (rows @ np.swapaxes(k, 1, 2) * D**-0.5).reshape(G, R, T, S)
            hidden = np.arange(S) > np.arange(S - T, S)[:, None]
            weights = np.exp(np.where(hidden, -np.inf, scores))
            weights = weights / weights.sum(axis=-1, keepdims=True)
            out = weights.reshape(G, R * T, S) @ v
            outs.append(ways_out[way_out](out).reshape(T, H, D))
            start += T
        yield np.concatenate(outs)


def generate_cached_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    greedy, dice, one = {"temperature": 0}, {"temperature": 1.5}, {"top_k": 1}
    chain, short_chain = (
        [*b"sea", *(int(byte) for byte in rng.permutation(ends)), *b"x"]
        for ends in (ENDS, FEW_ENDS)
    )
    alone, cases = {"has_generator": False}, []
    for name, cached, prompt_lens, num_new_tokens, settings, more in (
        ("one token after three, greedy", [0], [3], 1, greedy, {}),
        ("two tokens after three, greedy", [0], [3], 2, greedy, {}),
        ("no new tokens", [0], [3], 0, greedy, {}),
        (
            "a model in training mode, whose dropout is 0",
            *([0], [3], 2, greedy, {"training_dropout": 0.0}),
        ),
        ("two prompts of one length", [0, 0], [4, 4], 3, greedy, {}),
        ("three prompts of different lengths", [0, 0, 0], [5, 1, 9], 3, greedy, {}),
        ("tokens drawn at random", [0, 0], [4, 2], 6, dice, {}),
        ("no generator given", [0, 0], [4, 2], 2, dice, alone),
        (
            "one prompt twice, drawn at random",
            [0, 0],
            [3, 3],
            6,
            dice,
            {"is_twice": True},
        ),
        ("a low temperature", [0], [2], 5, {"temperature": 0.2}, {}),
        ("top_k=1 and a high temperature", [0], [4], 4, {"temperature": 9.0, **one}, {}),
        ("top_p=0.001 alone", [0], [4], 4, {"temperature": 3.0, "top_p": 0.001}, {}),
        (
            "a low temperature, top_k and top_p",
            *([0], [2], 10, {"temperature": 0.05, "top_k": 40, "top_p": 0.8}, {}),
        ),
        # One token is left, for one of the two settings.
        (
            "top_k=1 and top_p=0.9",
            *([0], [2], 6, {"temperature": 9.0, "top_k": 1, "top_p": 0.9}, {}),
        ),
        (
            "top_k=40 and top_p=0.001",
            *([0], [2], 6, {"temperature": 9.0, "top_k": 40, "top_p": 0.001}, {}),
        ),
        ("a cache with tokens in it", [7, 3], [2, 3], 3, greedy, {}),
        ("bytes that may end a text", [0], [3], len(chain) - 3, greedy, {"chain": chain}),
        (
            "a text twice, one a step behind, and one that repeats itself",
            *(
                [0] * 4,
                [3, 2, 3, 8],
                len(short_chain) - 3,
                greedy,
                {"chain": short_chain},
            ),
        ),
        ("too little room: refused before anything is written", *_FULL, greedy, {}),
        ("an empty prompt beside another", [0, 0], [3, 0], 2, greedy, {}),
        ("one prompt too many", [0], [3, 2], 2, greedy, {}),
        ("a row in which no request has begun", [0, None], [3, 2], 2, greedy, {}),
        ("a model that drops out", [0], [3], 2, greedy, {"training_dropout": 0.1}),
        ("more tokens than the model takes", [20], [20], 25, greedy, {}),
        ("minus one new token", [4], [3], -1, greedy, {}),
        (
            "no new tokens and a temperature below 0",
            *([4], [3], 0, {"temperature": -1.0}, {}),
        ),
        ("one byte again and again", [0], [3], 4, greedy, {"chain": [*b"seaa"]}),
        ("a text that fills the model", [0], [58], 6, greedy, {}),
    ):
        inputs = {
            "model_seed": int(rng.integers(1000)),
            "cached": cached,
            "room": 12 if "too little room" in name else 64,
            "prompts": [rng.integers(0, 256, size=n).tolist() for n in prompt_lens],
            "num_new_tokens": num_new_tokens,
            "settings": settings,
            "draw_seed": int(rng.integers(1000)),
            "has_generator": True,
            "behind": [],
            "training_dropout": None,
            **more,
        }
        if inputs.pop("is_twice", False):
            inputs["prompts"] = inputs["prompts"][:1] * 2
        if of_chain := inputs.pop("chain", None):
            inputs["behind"] = _behind(of_chain)
            repeated = of_chain[3:] + list(b"sea")
            prompts = (list(b"sea")[:n] if n <= 3 else repeated[-n:] for n in prompt_lens)
            inputs["prompts"] = [*prompts]
        limits = {"tensors_kept_for_a_backward_pass": 0}
        draws = settings["temperature"] > 0 and len({*settings} & {"top_k", "top_p"}) != 1
        cases.append(Case(name, inputs, limits, draws))
    return cases


_FULL = [0], [5], 9  # cached, prompt_lens, num_new_tokens


def generate_cached_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    if expected["raised"] != "nothing":
        return "Keep the given lines: they refuse this before the first step"
    ours, theirs = expected["texts"], got["texts"]
    if any(isinstance(text, str) for text in theirs):
        return None
    if not got["prompts_are_as_before"]:
        return "The list of prompts is the caller's: begin with a copy, list(prompts)"
    if not got["model_is_in_its_mode_as_before"]:
        return "Leave the model in the mode in which it came"
    if not got["gradients_are_on_as_before"]:
        return "torch.no_grad() ends with its block, set_grad_enabled(False) does not"
    if [len(text) for text in theirs] != [len(text) for text in ours]:
        return _why_other_lengths(inputs, ours, theirs)
    if theirs == ours:
        return _why_other_work(inputs, expected, got) or _why_other_dice(expected, got)
    if "other_settings" in got:
        return "Hand next_token_probs all three settings: temperature, top_k and top_p"
    if "other_rows" in got:
        return "Of each request take the last row of its logits: where do its rows end?"
    # Whoever gives all requests one token has failed before, where prompts differ.
    if len(theirs) == 2 and theirs[0] == theirs[1] and ours[0] != ours[1]:
        return "Each request draws tokens of its own, also where two prompts are equal"
    return _why_other_dice(expected, got)


def _why_other_lengths(inputs: dict, ours: list, theirs: list) -> str | None:
    num_new_tokens = inputs["num_new_tokens"]
    if num_new_tokens and [text[-num_new_tokens:] for text in ours] == theirs:
        return "Return the prompts too, with the new tokens behind them"
    if len(theirs) != len(ours):
        return None
    # Whoever counts wrongly has failed before, where a model writes what it likes.
    is_cut = all(text == right[: len(text)] for text, right in zip(theirs, ours))
    if inputs["behind"] and is_cut:
        return "Append exactly num_new_tokens to each prompt: no byte ends a text"
    return "Append exactly num_new_tokens to each prompt"


def _why_other_work(inputs: dict, expected: dict, got: dict) -> str | None:
    """Of an answer whose texts are right."""
    prompt_lens, N = [len(ids) for ids in inputs["prompts"]], inputs["num_new_tokens"]
    B, calls, projected = len(prompt_lens), got["forward_calls"], got["projected_tokens"]
    if N and got["tokens_in_the_cache"] == inputs["cached"]:
        return "Nothing is in the cache: let forward_cached write to it"
    more = projected - expected["projected_tokens"]
    if more == B and calls > expected["forward_calls"]:
        return "The last token need not go through the model: nobody asks what follows"
    if more and projected >= N * sum(prompt_lens) + B * N * (N - 1) // 2:
        return "The cache has the earlier tokens: hand over the new ones alone"
    if not more and calls > expected["forward_calls"]:
        if B > 1 and got["tokens_in_each_call"][:B] == prompt_lens:
            return "All requests go in one call: token after token, query_lens of each"
        return "In one call: in the first step all tokens of all prompts are new"
    if got["tensors_kept_for_a_backward_pass"] > 0:
        return "Generate under torch.no_grad(): nobody will call backward"
    return None


def _why_other_dice(expected: dict, got: dict) -> str | None:
    key = "random_state_of_torch_is_as_before"
    if expected[key] and not got[key]:
        return "Torch's own random state has changed: draw with the generator alone"
    if got[key] and not expected[key]:
        return "Without a generator the dice are torch's own: hand None on to sample"
    return None


def kv_utilization_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, seq_lens, max_seq_len in (
        ("one request, half full", [4], 8),
        ("two requests", [1, 3], 8),
        ("a full cache", [8, 8, 8], 8),
        ("one request, a third full", [3], 9),
        ("a request that has not begun", [0, 3, 6], 12),
        ("two requests of one length, beside another", [2, 5, 5], 8),
        ("random lengths", rng.integers(1, 500, size=9).tolist(), 512),
    ):
        inputs = {"seq_lens": np.array(seq_lens), "max_seq_len": max_seq_len}
        cases.append(Case(name, inputs))
    return cases


def kv_utilization_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    seq_lens, reserved = np.array(inputs["seq_lens"]), inputs["max_seq_len"]
    ours, theirs = expected["utilization"], got["utilization"]
    if isinstance(theirs, str):
        return None
    if isinstance(theirs, int) and theirs == int(ours):
        return "A share is a fraction: // and int() cut it off"
    begun, once = seq_lens[seq_lens > 0], np.unique(seq_lens)
    wrong = {
        "max_seq_len tokens are reserved for each request": [seq_lens.sum() / reserved],
        "That is the share that holds nothing": [1 - ours],
        "A share is between 0 and 1": [100 * ours],
        "All requests count, not only the longest": [seq_lens.max() / reserved],
        "max_seq_len is reserved, however long the longest is": [
            seq_lens.mean() / seq_lens.max()
        ],
        "Room for a request that has not begun is reserved too": [
            begun.mean() / reserved
        ],
        "A request that is as long as another counts too": [
            once.mean() / reserved,
            once.sum() / (len(seq_lens) * reserved),
        ],
    }
    return _reproduced(
        {
            words: any(math.isclose(theirs, other, rel_tol=1e-6) for other in others)
            and not math.isclose(theirs, ours, rel_tol=1e-6)
            for words, others in wrong.items()
        }
    )


EXERCISES = [
    Exercise(
        "lib.kv_cache.kv_cache_bytes", 1, kv_cache_bytes_cases, kv_cache_bytes_explain
    ),
    Exercise("lib.kv_cache.append_kv", 2, append_kv_cases, append_kv_explain),
    Exercise(
        "lib.kv_cache.attend_cached",
        2,
        attend_cached_cases,
        attend_cached_explain,
        forbidden=("torch.nn.functional.scaled_dot_product_attention",),
    ),
    Exercise(
        "lib.generate.generate_cached",
        3,
        generate_cached_cases,
        generate_cached_explain,
        errors={
            "the sum of query_lens": (
                "token_ids is one row of sum(query_lens) ids: those of all prompts "
                "first, then one new id of each request (from one row of logits of "
                "each), with query_lens of 1"
            ),
        },
    ),
    Exercise(
        "lib.kv_cache.kv_utilization", 1, kv_utilization_cases, kv_utilization_explain
    ),
]
