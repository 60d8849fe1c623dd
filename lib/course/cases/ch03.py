"""Chapter 3: what its exercises are tried on."""

import numpy as np

from lib.course.exercises import Case, Exercise


def kv_cache_bytes_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, L, H, G, D, num_tokens, bytes_per_number in (
        ("one layer, one head of 2 numbers, one token", 1, 1, 1, 2, 1, 4),
        ("five tokens", 1, 1, 1, 2, 5, 4),
        ("three layers", 3, 1, 1, 2, 1, 4),
        ("two bytes a number", 1, 1, 1, 2, 1, 2),
        ("three heads", 1, 3, 3, 2, 1, 4),
        ("four query heads that share one KV head", 1, 4, 1, 2, 1, 4),
        ("six query heads on three KV heads", 1, 6, 3, 2, 1, 4),
        ("no tokens", 2, 4, 2, 8, 0, 4),
        ("Llama 3 8B, one token", 32, 32, 8, 128, 1, 2),
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
    group_size = config["num_heads"] // config["num_kv_heads"]
    for wrong, words in (
        (ours // 2, "A token has a key and a value, of 4 bytes a number by default"),
        (
            ours * group_size,
            "Only KV heads are stored, of head_dim numbers: several query heads read one",
        ),
        (ours * config["num_heads"], "A key has head_dim numbers, not d_model"),
        (ours // config["num_layers"], "Each layer has keys and values of its own"),
        (ours // config["num_kv_heads"], "Each KV head has a key and a value"),
        (ours // inputs["bytes_per_number"], "That counts numbers, not bytes"),
        (
            4 * ours // inputs["bytes_per_number"],
            "A number has bytes_per_number bytes, whatever the default is",
        ),
        (ours // max(inputs["num_tokens"], 1), "That is one token's"),
    ):
        if theirs == wrong:
            return words
    return None


def append_kv_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, seq_lens, query_lens, S, (G, D) in (
        ("one request, its first token", [1], [1], 3, (1, 1)),
        ("one request, its third token", [3], [1], 4, (1, 2)),
        ("a prompt of three tokens", [3], [3], 5, (2, 2)),
        ("two requests of different lengths, a token each", [2, 4], [1, 1], 5, (1, 2)),
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
    def is_as(k, v, starts) -> bool:
        k_cache, v_cache = _written(inputs, k, v, starts)
        return _is_same(got["k_cache"], k_cache) and _is_same(got["v_cache"], v_cache)

    k, v = inputs["k"], inputs["v"]
    seq_lens, query_lens = (np.array(inputs[n]) for n in ("seq_lens", "query_lens"))
    if _is_same(got["k_cache"], inputs["k_cache"]):
        return "Nothing was written: change k_cache and v_cache in place"
    if is_as(k, k, seq_lens - query_lens) or is_as(v, k, seq_lens - query_lens):
        return "Keys go to k_cache, values to v_cache"
    if is_as(k, v, 0 * seq_lens):
        return "Write behind the tokens that are there: from seq_lens - query_lens on"
    if is_as(k, v, seq_lens) or is_as(k, v, seq_lens - query_lens + 1):
        return "seq_lens counts the new tokens too: begin at seq_lens - query_lens"
    if is_as(k, v, seq_lens - 1):
        return "A request may bring several tokens: begin at seq_lens - query_lens"
    if got["peak_bytes"] > _append_limit(k):
        return "That copies the cache: write k and v into it where they belong"
    if all(
        _is_same(np.isnan(got[name]), np.isnan(expected[name]))
        for name in ("k_cache", "v_cache")
    ):
        return (
            "The places are right, the tokens are others': in k they lie one behind "
            + ("the other, request after request")
        )
    return "Each request has a row and a length of its own"


def _written(inputs: dict, k, v, starts) -> tuple[np.ndarray, np.ndarray]:
    """The caches with each request's new tokens from its entry of `starts` on."""
    caches = inputs["k_cache"].copy(), inputs["v_cache"].copy()
    first = 0
    for b, query_len in enumerate(inputs["query_lens"]):
        for cache, new in zip(caches, (k, v)):
            row = cache[b, starts[b] : starts[b] + query_len]
            row[:] = new[first : first + len(row)]
        first += query_len
    return caches


def _is_same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and np.array_equal(one, other, equal_nan=True)


def attend_cached_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, seq_lens, query_lens, S, (H, G, D) in (
        ("one token, all alone", [1], [1], 3, (1, 1, 2)),
        ("one query over three keys", [3], [1], 4, (1, 1, 3)),
        ("a prompt: three queries, three keys", [3], [3], 5, (1, 1, 3)),
        ("two queries over five keys", [5], [2], 6, (1, 1, 3)),
        ("two heads", [4], [1], 5, (2, 2, 3)),
        ("four query heads on two KV heads", [4], [2], 6, (4, 2, 4)),
        ("two requests of different lengths", [5, 2], [1, 1], 6, (1, 1, 3)),
        ("a prompt beside two that go on", [3, 7, 4], [3, 1, 2], 8, (4, 2, 4)),
        ("a request that rests", [2, 3, 0, 4], [1, 0, 0, 2], 5, (2, 1, 3)),
        ("500 keys, 16 query heads on two KV heads", [500], [1], 512, (16, 2, 16)),
        ("single precision", [4], [2], 5, (2, 1, 4)),
    ):
        dtype = np.float32 if name == "single precision" else np.float64
        caches = []
        for _ in "kv":
            cache = rng.normal(size=(len(seq_lens), S, G, D))
            for b, seq_len in enumerate(seq_lens):
                cache[b, seq_len:] = np.nan  # what nobody may read is poison
            caches.append(cache)
        q = rng.normal(size=(sum(query_lens), H, D)).astype(dtype)
        scores_bytes = 8 * len(seq_lens) * max(query_lens) * H * S
        inputs = {
            "q": q,
            "k_cache": caches[0].astype(dtype),
            "v_cache": caches[1].astype(dtype),
            "seq_lens": np.array(seq_lens),
            "query_lens": np.array(query_lens),
        }
        # Room for one copy of what is cached, padded scores, and trifles: not for a copy
        # of keys and values for each query head.
        limit = 3 * caches[0].nbytes + 6 * scores_bytes + 8 * q.nbytes + 4096
        cases.append(Case(name, inputs, {"peak_bytes": limit}))
    return cases


def attend_cached_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    out = got["out"]
    if not isinstance(out, np.ndarray) or out.shape != inputs["q"].shape:
        return "out has the shape of q, tokens first"
    if np.isnan(out).any():
        return "Something behind a request's seq_lens[b] keys was read, or 0 / 0 computed"
    if np.allclose(out, expected["out"]):
        return "Copy no key for each query head: give heads that share one its queries"
    variants = {
        "A query must not see keys of later positions": {"is_causal": False},
        "Query t of T is at position S - T + t: it sees all before it": {"is_late": True},
        "Divide the scores by the root of D": {"scale": 1.0},
        "Query head h reads KV head h // (H / G): neighbours share": {"is_tiled": True},
        "Each request reads its own row of the cache": {"row": 0},
    }
    for words, variant in variants.items():
        with np.errstate(all="ignore"):
            if np.allclose(out, _attend(inputs, **variant)):
                return words
    if inputs["q"].shape[1] > 1:
        return (
            "Tokens and heads may be mixed up: what is flattened on the way in is "
            "unflattened in the same order on the way out"
        )
    return None


def _attend(
    inputs: dict, is_causal=True, is_late=False, scale=None, is_tiled=False, row=None
):
    """Attention over a cache with one thing wrong, for naming what may be wrong."""
    q, k_cache, v_cache = inputs["q"], inputs["k_cache"], inputs["v_cache"]
    H, D = q.shape[1:]
    group_size = H // k_cache.shape[2]
    outs, start = [], 0
    for b, (S, T) in enumerate(zip(inputs["seq_lens"], inputs["query_lens"])):
        k, v = (cache[b if row is None else row, :S] for cache in (k_cache, v_cache))
        if is_tiled:
            k, v = (np.concatenate([x] * group_size, axis=1) for x in (k, v))
        else:
            k, v = (np.repeat(x, group_size, axis=1) for x in (k, v))
        scores = np.einsum("thd,shd->hts", q[start : start + T], k)
        scores = scores * (D**-0.5 if scale is None else scale)
        last_seen = np.arange(T) + (0 if is_late else S - T)
        hidden = np.arange(S) > last_seen[:, None]
        if is_causal:
            scores = np.where(hidden, -np.inf, scores)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-1e9))
        weights = weights / weights.sum(axis=-1, keepdims=True)
        outs.append(np.einsum("hts,shd->thd", weights, v))
        start += T
    return np.concatenate(outs)


def generate_cached_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    greedy = {"temperature": 0}
    cases = []
    for name, cached, prompt_lens, num_new_tokens, settings in (
        ("one token after three, greedy", [0], [3], 1, greedy),
        ("two tokens after three, greedy", [0], [3], 2, greedy),
        ("no new tokens", [0], [3], 0, greedy),
        ("two prompts of one length", [0, 0], [4, 4], 5, greedy),
        ("three prompts of different lengths", [0, 0, 0], [5, 1, 9], 6, greedy),
        ("tokens drawn at random", [0, 0], [4, 2], 8, {"temperature": 1.5}),
        ("top_k and top_p", [0], [2], 8, {"temperature": 2.0, "top_k": 40, "top_p": 0.8}),
        ("a cache with tokens in it", [7, 3], [2, 3], 4, greedy),
        ("too little room: refused before anything is written", [0], [5], 9, greedy),
        ("a text that fills the model", [0], [40], 24, greedy),
    ):
        inputs = {
            "model_seed": int(rng.integers(1000)),
            "cached": cached,
            "room": 12 if "too little room" in name else 64,
            "prompts": [rng.integers(0, 256, size=n).tolist() for n in prompt_lens],
            "num_new_tokens": num_new_tokens,
            "settings": settings,
            "draw_seed": int(rng.integers(1000)),
        }
        limits = {"kept_for_a_backward_pass_bytes": 0}
        cases.append(Case(name, inputs, limits, draws=settings is not greedy))
    return cases


def generate_cached_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    ours, theirs = expected["texts"], got["texts"]
    if ours == ["CacheFullError"]:
        return (
            "Keep the given lines: they refuse what does not fit, before the first step"
        )
    num_new_tokens = inputs["num_new_tokens"]
    if any(isinstance(text, str) for text in theirs):
        return None
    if num_new_tokens and [text[-num_new_tokens:] for text in ours] == theirs:
        return "Return the prompts too, with the new tokens behind them"
    if got["projected_tokens"] > expected["projected_tokens"] and theirs == ours:
        too_many = got["projected_tokens"] - expected["projected_tokens"]
        if too_many == len(ours):
            return (
                "The last token need not go through the model: nobody asks what follows"
            )
        return "The cache has the earlier tokens: hand over the new ones alone"
    if (
        theirs == ours
        and num_new_tokens
        and got["tokens_in_the_cache"] == inputs["cached"]
    ):
        return "Nothing is in the cache: let forward_cached write to it"
    if theirs == ours and got["forward_calls"] > expected["forward_calls"]:
        return "All requests go in one call: token after token, query_lens of each"
    if got["kept_for_a_backward_pass_bytes"] > 0:
        return "Generate under torch.no_grad(): nobody will call backward"
    if [len(text) for text in theirs] != [len(text) for text in ours]:
        return "Append exactly num_new_tokens to each prompt"
    if theirs != ours and inputs["settings"]["temperature"] != 0:
        return "Draw with sampling.sample from next_token_probs, all settings passed on"
    if not got["prompts_are_as_before"]:
        return "The list of prompts is the caller's: begin with a copy, list(prompts)"
    if theirs != ours:
        return "Of each request take the last row of its logits: where do its rows end?"
    return None


def kv_utilization_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, seq_lens, max_seq_len in (
        ("one request, half full", [4], 8),
        ("two requests", [1, 3], 8),
        ("a full cache", [8, 8, 8], 8),
        ("a request that has not begun", [0, 3, 6], 12),
        ("random lengths", rng.integers(1, 500, size=9).tolist(), 512),
    ):
        inputs = {"seq_lens": np.array(seq_lens), "max_seq_len": max_seq_len}
        cases.append(Case(name, inputs))
    return cases


def kv_utilization_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    seq_lens, reserved = np.array(inputs["seq_lens"]), inputs["max_seq_len"]
    theirs = got["utilization"]
    for wrong, words in (
        (seq_lens.sum() / reserved, "max_seq_len tokens are reserved for each request"),
        (1 - expected["utilization"], "That is the share that holds nothing"),
        (100 * expected["utilization"], "A share is between 0 and 1"),
        (seq_lens.max() / reserved, "All requests count, not only the longest"),
        (
            seq_lens.mean() / seq_lens.max(),
            "max_seq_len is reserved, however long the longest is",
        ),
        (0, "A share is a fraction: divide by /, not by //"),
    ):
        if theirs == wrong:
            return words
    if seq_lens.all() or theirs != seq_lens[seq_lens > 0].mean() / reserved:
        return None
    return "Room for a request that has not begun is reserved too"


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
                "After the prompts each request brings one new token: query_lens of 1"
            ),
        },
    ),
    Exercise(
        "lib.kv_cache.kv_utilization", 1, kv_utilization_cases, kv_utilization_explain
    ),
]
