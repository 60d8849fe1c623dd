"""Chapter 1: what its exercises are tried on."""

import math
import unicodedata

import numpy as np

from lib.course.exercises import Case, Exercise
from lib.course.shipped import reference


def decode_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    texts = {
        "plain letters": b"whale",
        "a dash of three bytes": "sea — ship".encode(),
        "a dash cut in half": "sea —".encode()[:-1],
        "a lone byte that continues nothing": b"\xa0",
        "no tokens at all": b"",
        "a character of four bytes": "a \U0001f40b".encode(),
        "half of a pair of surrogates": b"\xed\xa0\xbd",
        "line ends of three systems": b"ship\r\nsea\rwhale\n",
        "white space at both ends": b" \t sea\n ",
        "zero bytes": b"\0sea\0ship\0\0",
        "a byte order mark": "\ufeffsea".encode(),
        "characters that look alike": "caf\u00e9 cafe\u0301 \ufb01\u00a0!".encode(),
        "each byte once": bytes(range(256)),
        "random bytes": rng.integers(0, 256, size=40, dtype=np.uint8).tobytes(),
    }
    cases = [Case(name, {"token_ids": list(text)}) for name, text in texts.items()]
    refused = {
        "an id that is no byte": [119, 256],
        "a negative id": [119, -1],
        "a batch of two texts": [[115, 101, 97], [115, 104, 121]],
        "a batch of one text": [[115, 101, 97]],
    }
    return cases + [Case(name, {"token_ids": ids}) for name, ids in refused.items()]


def decode_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    if expected["text"] == "ValueError":
        if isinstance(inputs["token_ids"][0], list):
            return "Rows of a batch are texts of their own: keep the given lines"
        return "Raise ValueError for an id that is no byte, 0 to 255"
    data, text = bytes(inputs["token_ids"]), expected["text"]
    alone = "".join(bytes([b]).decode("utf-8", "replace") for b in data)
    unix_lines = text.replace("\r\n", "\n")
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC", "NFKD")]
    has_wide = any(c > "\x7f" and c != "\ufffd" for c in text)  # of several bytes
    wrong = {
        "Bytes that are no character must leave the mark \ufffd, not vanish": [
            data.decode("utf-8", errors="ignore")
        ],
        "A byte is not a character: UTF-8 puts several bytes into one": (
            [data.decode("latin-1")] if has_wide else []
        ),
        "Decode all bytes together: a character may have several": (
            [alone] if has_wide else []
        ),
        "Byte 13 is a character as any other: no line end is translated": [
            unix_lines,
            unix_lines.replace("\r", "\n"),
            "\n".join(text.splitlines()),
        ],
        "White space at its ends belongs to the text": [
            text.strip(),
            text.lstrip(),
            text.rstrip(),
        ],
        "A zero byte is a character too": [
            text.replace("\0", ""),
            text.partition("\0")[0],
            text.rstrip("\0"),
            text.strip("\0"),
        ],
        "A byte order mark is a character too: decode as utf-8, not utf-8-sig": [
            text.removeprefix("\ufeff")
        ],
        "A character stays as it was written, not normalized": forms,
    }
    return _reproduced({words: got["text"] in texts for words, texts in wrong.items()})


def _reproduced(wrong: dict[str, bool]) -> str | None:
    """The words for the one way to be wrong that gives what was got. Of several nobody
    can tell which it was."""
    found = [words for words, is_it in wrong.items() if is_it]
    return found[0] if len(found) == 1 else None


def attend_causal_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, shape, (H, G, D), dtype in (
        ("one token", (1,), (1, 1, 2), "float64"),
        ("two tokens, one head", (2,), (1, 1, 3), "float64"),
        ("six tokens, three heads", (6,), (3, 3, 4), "float64"),
        ("four query heads on two KV heads", (5,), (4, 2, 4), "float64"),
        ("a batch of two", (2, 4), (2, 1, 6), "float64"),
        ("two leading dimensions", (2, 3, 5), (2, 2, 4), "float64"),
        ("a query of zeros, whose scores are 0", (4,), (1, 1, 2), "float64"),
        ("single precision", (6,), (2, 1, 4), "float32"),
        ("scores of the past far below 0", (3,), (2, 2, 4), "float64"),
        ("96 tokens", (96,), (4, 2, 8), "float64"),
    ):
        q, k, v = (rng.normal(size=(*shape, heads, D)) for heads in (H, G, G))
        if name.startswith("scores"):
            _lower_the_past(q, k, v)
        if name.startswith("a query of zeros"):
            q[1:] = 0
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        cases.append(Case(name, {"q": q, "k": k, "v": v}, _attend_limits(q)))
    return cases


def _lower_the_past(q: np.ndarray, k: np.ndarray, v: np.ndarray):
    """In head 0: scores near -600 but for the last key's, and values behind the first so
    large that a weight of exp(-400) shows. (exp(-600) is still a number above 0: nobody
    has to subtract the largest score.)"""
    q[:, 0], k[:, 0] = q[:, 0] / 10, k[:, 0] / 10
    q[:, 0, 0] += 20
    k[:-1, 0, 0] -= 60
    v[1:, 0] *= 1e200


def _attend_limits(q: np.ndarray) -> dict[str, float]:
    """Room for several copies of the scores and the inputs: not for T x T x D, of the
    heads together or, in a text long enough to tell, of one."""
    *batch, T, H, D = q.shape
    scores_bytes = q.itemsize * math.prod(batch) * H * T * T
    most = 6 * scores_bytes + 8 * q.nbytes + 4096
    one_head = q.itemsize * T * T * D
    largest = one_head - 1 if T > 50 else most
    return {"peak_bytes": most, "largest_tensor_bytes": largest}


def attend_causal_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    if "out" not in got or not isinstance(got["out"], np.ndarray):
        return None
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    T, D = q.shape[-3], q.shape[-1]
    if got["out"].shape != q.shape:
        if _is_close(np.swapaxes(got["out"], -3, -2), expected["out"]):
            return "Put tokens before heads again: out has the shape of q"
        return None
    if T == 1 and np.isnan(got["out"]).all():
        return "One token, and no weight: does it see itself?"
    if T > 50 and got["largest_tensor_bytes"] >= q.itemsize * T * T * D:
        return "A tensor of T x T x D numbers is too large: T x T scores will do"
    low = "A token of the future has weight 0: set the future's scores to -∞"
    variants = [
        ("The future is not masked", {"is_causal": False}),
        ("A token must see itself", {"diagonal": 0}),
        ("The mask hides the past instead of the future", {"is_turned": True}),
        ("Divide the scores by the root of D", {"scale": 1.0}),
        ("Divide by the root of D, which is not always 2", {"scale": 2**-0.5}),
        ("softmax over the keys, the last dimension", {"softmax_axis": -2}),
        ("Mask before softmax: the weights must sum to 1", {"is_masked_late": True}),
        ("Divide by the root of D, not by D", {"scale": 1 / D}),
        ("Query head h reads KV head h // (H / G): neighbours share", {"is_tiled": True}),
        *((low, {"fill": -number}) for number in (0, 1, 10, 50, 100, 1e3)),
        *((low, {"add": -number}) for number in (1, 10, 50, 100, 1e3)),
    ]
    found: dict[str, bool] = {}
    for words, variant in variants:
        with np.errstate(all="ignore"):
            out = _attend(q, k, v, **variant)
        # What is all NaN, or as good as right, is no sign of anything.
        tells = not np.isnan(out).all() and not _is_close(expected["out"], out)
        is_it = tells and _is_close(got["out"], out)
        found[words] = found.get(words, False) or is_it
    return _reproduced(found)


def _is_close(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and np.allclose(one, other, equal_nan=True)


def _are_other_ties(logits: np.ndarray, right: np.ndarray, probs: np.ndarray) -> bool:
    """Whether as many tokens are kept, with the same logits, but not the same ones."""
    if logits.ndim != 1 or (probs > 0).sum() != (right > 0).sum():
        return False
    kept, wanted = np.sort(logits[probs > 0]), np.sort(logits[right > 0])
    return np.array_equal(kept, wanted) and ((probs > 0) != (right > 0)).any()


@reference
def _attend(
    q,
    k,
    v,
    is_causal=True,
    diagonal=1,
    is_turned=False,
    scale=None,
    is_tiled=False,
    softmax_axis=-1,
    is_masked_late=False,
    fill=-np.inf,
    add=None,
):
    """Attention with one thing wrong, for naming what may be wrong."""
    T, H, D = q.shape[-3:]
    group_size = H // k.shape[-2]
    if is_tiled:
        k, v = (np.concatenate([x] * group_size, axis=-2) for x in (k, v))
    else:
        k, v = (np.repeat(x, group_size, axis=-2) for x in (k, v))
    q, k, v = (np.swapaxes(x, -3, -2) for x in (q, k, v))
    scores = q @ np.swapaxes(k, -1, -2) * (D**-0.5 if scale is None else scale)
    hidden = np.triu(np.ones((T, T), dtype=bool), diagonal)
    hidden = hidden.T if is_turned else hidden
    if is_causal and not is_masked_late:
        scores = np.where(hidden, fill if add is None else scores + add, scores)
    weights = np.exp(scores - scores.max(axis=softmax_axis, keepdims=True))
    weights = weights / weights.sum(axis=softmax_axis, keepdims=True)
    if is_masked_late:
        weights = np.where(hidden, 0, weights)
    return np.swapaxes(weights @ v, -3, -2)


def next_token_probs_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    few = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    cases = [
        Case(name, {"logits": few[rng.permutation(4)], "settings": settings})
        for name, settings in (
            ("four tokens and no settings", {}),
            ("temperature 0.5", {"temperature": 0.5}),
            ("temperature 0", {"temperature": 0}),
            ("temperature 0.1", {"temperature": 0.1}),
            ("top_k=1", {"top_k": 1}),
            ("top_k=2", {"top_k": 2}),
            ("top_k larger than the vocabulary", {"top_k": 9}),
            ("top_p=0.7, between 0.5 and 0.5 + 0.3", {"top_p": 0.7}),
            ("top_p=0.8005, a little more than 0.5 + 0.3", {"top_p": 0.8005}),
            ("top_p=0.01, less than the most probable token has", {"top_p": 0.01}),
            ("temperature 2 and top_p=0.6", {"temperature": 2.0, "top_p": 0.6}),
            ("top_k=2 and top_p=0.6", {"top_k": 2, "top_p": 0.6}),
        )
    ]
    tied = {"logits": np.array([1.0, 3.0, 3.0, 2.0]), "settings": {"temperature": 0}}
    cases.append(Case("temperature 0 and two largest logits: the first", tied))
    # Of equal logits those with the smaller ids are kept. All numbers here are exact.
    for name, logits, settings in (
        ("three largest logits and top_k=2", [1, 3, 3, 3], {"top_k": 2}),
        ("four equal logits and top_p=0.5", [0] * 4, {"top_p": 0.5}),
        ("four equal logits and top_p=0.6", [0] * 4, {"top_p": 0.6}),
        ("eight equal logits, top_k=4, top_p=0.5", [2] * 8, {"top_k": 4, "top_p": 0.5}),
    ):
        inputs = {"logits": np.array(logits, dtype=np.float64), "settings": settings}
        cases.append(Case(name, inputs))
    row = few[rng.permutation(4)]
    rows = np.stack([np.roll(row, shift) for shift in range(3)])  # other largest each
    greedy = {"logits": rows, "settings": {"temperature": 0}}
    cases.append(Case("three rows and temperature 0", greedy))
    settings = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
    logits = 2 * rng.normal(size=(3, 2, 50))
    cases.append(Case("a batch of logits", {"logits": logits, "settings": settings}))
    logits = rng.normal(size=5).astype(np.float32) * 1e3
    tiny = {"temperature": 1e-3}
    cases.append(Case("huge logits", {"logits": logits, "settings": tiny}))
    steep = np.linspace(0, -40, 256)[rng.permutation(256)].astype(np.float32)
    cases.append(Case("256 logits and no settings", {"logits": steep, "settings": {}}))
    close = {
        "logits": np.array([1.0, 1.001, 0.999, 0.99]),
        "settings": {"temperature": 0.01},
    }
    cases.append(Case("close logits and temperature 0.01", close))
    half = {"logits": few.astype(np.float16), "settings": {"top_p": 0.9}}
    cases.append(Case("half precision", half))
    for name, row, settings in (
        ("a temperature below 0", few, {"temperature": -1.0}),
        ("top_k=0", few, {"top_k": 0}),
        ("top_p=0", few, {"top_p": 0.0}),
        ("a logit that is NaN", [1.0, np.nan], {}),
        ("logits that are all -infinity", [-np.inf, -np.inf], {"temperature": 0}),
    ):
        cases.append(Case(name, {"logits": np.array(row), "settings": settings}))
    few_values = rng.permutation(np.arange(256.0) % 4)
    settings = {"top_k": 20}
    name = "256 logits of four values and top_k=20"
    cases.append(Case(name, {"logits": few_values, "settings": settings}))
    return cases


def next_token_probs_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    probs, right, settings = got["probs"], expected["probs"], inputs["settings"]
    if isinstance(right, str):
        return "Keep the given lines: they refuse this"
    if not isinstance(probs, np.ndarray) or probs.shape != right.shape:
        return None
    temperature = settings.get("temperature", 1)
    if np.isnan(probs).any():
        return _why_nan(inputs["logits"], temperature, probs)
    sums = probs.sum(axis=-1, keepdims=True)
    if (sums > 0).all() and not np.allclose(sums, 1) and _is_close(probs / sums, right):
        return "What is kept must sum to 1 again"
    if temperature == 0:
        return _why_not_greedy(inputs["logits"], right, probs)
    if not settings and ((probs == 0) & (right > 0)).any():
        return "Without top_k and top_p, or at their defaults, every token is kept"
    if _are_other_ties(inputs["logits"], right, probs):
        return "Of equal logits the one with the smaller id counts as the more probable"
    ranked = np.sort(right, axis=-1)
    orders = [ranked, ranked[..., ::-1]]
    are_different = len(np.unique(right[right > 0].round(9))) > 1
    found = {
        "Put the probabilities back in the order of the vocabulary": are_different
        and any(_is_close(probs, other) for other in orders)
    }
    reach, exact, ties, order, divide = (
        "Keep the token that reaches top_p too: count only the more probable ones",
        "Stop at the token that reaches top_p: with exactly top_p it is enough",
        "Of equal logits the one with the smaller id counts as the more probable",
        "top_k first; top_p counts the probabilities of what that left",
        "Divide the logits by the temperature, before softmax",
    )
    variants = [
        (reach, {"reaching": "left out"}),
        (reach, {"reaching": "left out", "keeps_one": True}),
        (exact, {"reaching": "and one more"}),
        (ties, {"keeps_ties": "k"}),
        (ties, {"keeps_ties": "p"}),
        (ties, {"keeps_ties": "kp"}),
        (ties, {"is_last_first": True}),
        (order, {"is_top_p_first": True}),
        (divide, {"temperature": 1 / temperature}),
        (divide, {"temperature": 1}),
    ]
    # Whoever forgets one setting has failed where it stands alone, and nothing is tied.
    if len(settings) == 1 and len(np.unique(inputs["logits"])) == right.size:
        variants += [
            ("This leaves more than the top_k largest", {"top_k": None}),
            ("This leaves more than what reaches top_p", {"top_p": 1}),
        ]
    for words, variant in variants:
        with np.errstate(all="ignore"):
            other = _probs(inputs["logits"], **{**settings, **variant})
        is_it = _is_close(probs, other) and not _is_close(right, other)
        found[words] = found.get(words, False) or is_it
    return _reproduced(found)


def _why_nan(logits: np.ndarray, temperature: float, probs: np.ndarray) -> str | None:
    if temperature == 0:
        is_all = np.isnan(probs).all()  # as after a softmax over infinities
        return "Temperature 0 divides by zero: take the largest" if is_all else None
    with np.errstate(all="ignore"):
        weights = np.exp(logits / temperature)
        others = weights / weights.sum(axis=-1, keepdims=True)
    is_it = np.isnan(others).any() and np.isnan(probs[np.isnan(others)]).all()
    return "exp overflows: subtract the largest logit before" if is_it else None


def _why_not_greedy(
    logits: np.ndarray, right: np.ndarray, probs: np.ndarray
) -> str | None:
    is_largest = logits == logits.max(axis=-1, keepdims=True)
    all_rows = np.zeros_like(probs)
    all_rows.flat[logits.argmax()] = 1
    is_one_hot = ((probs == 0) | (probs == 1)).all() and (probs.sum(axis=-1) == 1).all()
    is_spread = (probs > 0).sum() > right.sum()
    return _reproduced(
        {
            "Of several largest logits the first one counts": is_largest.sum()
            > right.sum()
            and ((probs > 0) == is_largest).all(),
            "Temperature 0 puts everything on the largest logit": is_spread
            and ((probs > 0) != is_largest).any()
            or is_one_hot
            and not is_largest[probs == 1].any(),
            "Take the largest logit of each row": logits.ndim > 1
            and _is_close(probs, all_rows),
        }
    )


@reference
def _probs(
    logits,
    temperature=1.0,
    top_k=None,
    top_p=1.0,
    reaching="kept",
    keeps_one=False,
    keeps_ties="",
    is_last_first=False,
    is_top_p_first=False,
):
    """The probabilities with one thing wrong, for naming what may be wrong."""
    logits = logits.astype(np.float64) / temperature
    order = np.argsort(-logits, axis=-1, kind="stable")
    if is_last_first:
        order = np.argsort(logits, axis=-1, kind="stable")[..., ::-1]
    ranked, V = np.take_along_axis(logits, order, axis=-1), logits.shape[-1]
    weights = np.exp(ranked - ranked[..., :1])
    k = min(top_k or V, V)
    is_of_top_k = np.broadcast_to(np.arange(V) < k, weights.shape)
    if "k" in keeps_ties:
        is_of_top_k = ranked >= ranked[..., k - 1 : k]
    counted = weights if is_top_p_first else weights * is_of_top_k
    counted = counted / counted.sum(axis=-1, keepdims=True)
    sums = counted.cumsum(axis=-1)
    before = np.concatenate([np.zeros_like(sums[..., :1]), sums[..., :-1]], axis=-1)
    is_of_top_p = {
        "kept": before < top_p,
        "left out": (sums <= top_p + 1e-9) | (keeps_one & (np.arange(V) == 0)),
        "and one more": before <= top_p,
    }[reaching] | (top_p == 1)
    if "p" in keeps_ties:
        last = np.where(is_of_top_p, counted, 1).min(axis=-1, keepdims=True)
        is_of_top_p = counted >= last
    kept = weights * is_of_top_k * is_of_top_p
    probs = np.zeros_like(kept)
    np.put_along_axis(probs, order, kept / kept.sum(axis=-1, keepdims=True), axis=-1)
    return probs


# Bytes that some convention ends a text with.
ENDS = [0, 1, 2, 3, 4, 10, 13, 26, 27, 28, 32, 46, 127, 255]
FEW_ENDS = [0, 3, 4, 10, 255]


def _behind(chain: list[int]) -> list[int | None]:
    """For each byte the one that comes behind it in `chain`, or None."""
    return [dict(zip(chain, chain[1:])).get(byte) for byte in range(256)]


def generate_recompute_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    greedy, dice, cases = {"temperature": 0}, {"temperature": 1.5}, []
    chain, short_chain = (
        [*b"sea", *(int(byte) for byte in rng.permutation(ends)), *b"x"]
        for ends in (ENDS, FEW_ENDS)
    )
    one, alone = {"top_k": 1}, {"has_generator": False}
    for name, shape, num_new_tokens, settings, more in (
        ("one token after one token, greedy", (1,), 1, greedy, {}),
        ("no new tokens", (3,), 0, greedy, {}),
        ("eight tokens, greedy", (5,), 8, greedy, {}),
        ("tokens drawn at random", (4,), 10, dice, {}),
        ("tokens drawn at random, no generator given", (4,), 10, dice, alone),
        ("a low temperature", (2,), 10, {"temperature": 0.2}, {}),
        ("top_k=1 and a high temperature", (4,), 6, {"temperature": 9.0, **one}, {}),
        ("top_p=0.001 alone", (4,), 6, {"temperature": 3.0, "top_p": 0.001}, {}),
        (
            "a low temperature, top_k and top_p",
            *((2,), 10, {"temperature": 0.05, "top_k": 40, "top_p": 0.8}, {}),
        ),
        # One token is left, for one of the two settings.
        (
            "top_k=1 and top_p=0.9",
            *((2,), 6, {"temperature": 9.0, "top_k": 1, "top_p": 0.9}, {}),
        ),
        (
            "top_k=40 and top_p=0.001",
            *((2,), 6, {"temperature": 9.0, "top_k": 40, "top_p": 0.001}, {}),
        ),
        ("a batch of one prompt", (1, 3), 4, greedy, {}),
        ("a batch of two prompts", (2, 3), 6, greedy, {}),
        ("a batch of two prompts, drawn at random", (2, 3), 3, dice, {}),
        ("bytes that may end a text", (3,), len(chain) - 3, greedy, {"chain": chain}),
        ("the same text twice", (2, 3), 6, greedy, {"chain": short_chain}),
        ("an empty prompt", (0,), 0, greedy, {}),
        ("one token more than fits", (40,), 25, greedy, {}),
        ("minus one new token", (3,), -1, greedy, {}),
        ("no new tokens and a temperature below 0", (3,), 0, {"temperature": -1}, {}),
        ("a model that drops out", (3,), 2, greedy, {"training_dropout": 0.1}),
        (
            "a model in training mode, whose dropout is 0",
            *((3,), 2, greedy, {"training_dropout": 0.0}),
        ),
        ("one byte again and again", (3,), 4, greedy, {"chain": [*b"seaa"]}),
        ("a text that fills the model", (40,), 24, greedy, {}),
    ):
        inputs = {
            "model_seed": int(rng.integers(1000)),
            "prompt_ids": rng.integers(0, 256, size=shape).tolist(),
            "num_new_tokens": num_new_tokens,
            "settings": settings,
            "draw_seed": int(rng.integers(1000)),
            "has_generator": True,
            "behind": [],
            "training_dropout": None,
            **more,
        }
        if of_chain := inputs.pop("chain", None):
            inputs["behind"] = _behind(of_chain)
            inputs["prompt_ids"] = np.broadcast_to(list(b"sea"), shape).tolist()
        limits = {"tensors_kept_for_a_backward_pass": 0}
        draws = settings["temperature"] != 0 and settings.get("top_k") != 1
        cases.append(Case(name, inputs, limits, draws))
    return cases


def generate_recompute_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    if expected["raised"] != "nothing":
        return "Keep the given lines: they refuse this before the first step"
    if isinstance(got["token_ids"], str):
        return None
    if not got["prompt_is_as_before"]:
        return "prompt_ids is the caller's: append to a new tensor, as torch.cat does"
    if not got["model_is_in_its_mode_as_before"]:
        return "Leave the model in the mode in which it came"
    if not got["gradients_are_on_as_before"]:
        return "torch.no_grad() ends with its block, set_grad_enabled(False) does not"
    return (
        _why_other_length(inputs, expected, got)
        or _why_other_calls(expected, got)
        or _why_other_dice(expected, got)
    )


def _why_other_length(inputs: dict, expected: dict, got: dict) -> str | None:
    ours, theirs = (np.array(outputs["token_ids"]) for outputs in (expected, got))
    if ours.shape == theirs.shape:
        return None
    T, N = ours.shape[-1], inputs["num_new_tokens"]
    if np.array_equal(theirs, ours[..., T - N :]):
        return "Return the prompt too, with the new tokens behind it"
    # Whoever counts wrongly has failed before, where a model writes what it likes.
    if inputs["behind"] and np.array_equal(theirs, ours[..., : theirs.shape[-1]]):
        return "Append exactly num_new_tokens: no byte ends a text"
    is_length = theirs.shape[:-1] == ours.shape[:-1]
    return "Append exactly num_new_tokens" if is_length else None


def _why_other_calls(expected: dict, got: dict) -> str | None:
    ours, theirs = expected["calls"], got["calls"]
    if got["tensors_kept_for_a_backward_pass"] > 0:
        return "Generate under torch.no_grad(): nobody will call backward"
    if len(theirs) != len(ours):
        return "One call of the model for each new token, no more and no fewer"
    if any(call["num_tokens"] < right["num_tokens"] for call, right in zip(theirs, ours)):
        return "Give the model all of the text in each call"
    if ours and all(call["first_position"] > 0 for call in theirs):
        return "Positions count from 0"
    if theirs != ours:
        return None
    if got["calls_of_attend"] < expected["calls_of_attend"]:
        return "Hand the model the `attend` that you were given"
    if "other_settings" in got:
        return "Hand next_token_probs all three settings: temperature, top_k and top_p"
    return None


def _why_other_dice(expected: dict, got: dict) -> str | None:
    key = "random_state_of_torch_is_as_before"
    if expected[key] and not got[key]:
        return "Draw with the generator, and leave torch's own random state alone"
    if got[key] and not expected[key]:
        return "Without a generator the dice are torch's own: hand None on to sample"
    return None


def attention_flops_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, prompt_len, num_new_tokens, L, H in (
        ("one layer, one head, one token", 1, 1, 1, 1),
        ("one layer, one head, three new tokens", 1, 3, 1, 1),
        ("three layers", 1, 1, 3, 1),
        ("four heads", 1, 1, 1, 4),
        ("a longer prompt", 7, 5, 2, 2),
        ("no new tokens", 5, 0, 2, 2),
        ("27 tokens from one", 1, 27, 2, 2),
        ("12 tokens from two", 2, 12, 2, 2),
        ("more tokens than 16 bits can square", 50_001, 3, 2, 2),
        ("a large model and a long text", 200_001, 5, 79, 61),
        ("a random shape", *(int(n) for n in rng.integers(2, 9, size=4))),
    ):
        is_large = prompt_len > 200_000  # numbers that 32 bits have no room for, nor 53
        head_dim = 106 if is_large else 2 * int(rng.integers(4, 9))
        config = {
            "vocab_size": 256,
            "num_layers": L,
            "num_heads": H,
            "num_kv_heads": 1,
            "d_model": H * head_dim,
            "d_ff": 16,
            "max_seq_len": 64,
        }
        inputs = {"prompt_len": prompt_len, "num_new_tokens": num_new_tokens}
        cases.append(Case(name, {"config": config, **inputs}))
    return cases


@reference
def _other_flops(inputs: dict) -> tuple[int, int, int, list[int]]:
    """Of the halves that are seen, of the last step, of the one after it, and of steps
    from other beginnings."""
    config, first, N = inputs["config"], inputs["prompt_len"], inputs["num_new_tokens"]
    each = 4 * config["d_model"] * config["num_layers"]

    def squares(first: int) -> int:
        return each * sum(T * T for T in range(first, first + N))

    half = each * sum(T * (T + 1) for T in range(first, first + N)) // 2
    others = [squares(first - 1), squares(first + 1), squares(1)]
    return half, each * (first + N - 1) ** 2, each * (first + N) ** 2, others


def attention_flops_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    ours, theirs = expected["flops"], got["flops"]
    if isinstance(theirs, float):
        return "FLOPs are whole numbers: give an int"
    if isinstance(theirs, str) or not ours:
        return None
    config, N = inputs["config"], inputs["num_new_tokens"]
    L, H = config["num_layers"], config["num_heads"]
    half, last, one_late, others = _other_flops(inputs)
    wrong = {
        "Two products (q @ k.T and weights @ v), and two FLOPs per multiply-add": [
            ours // 2
        ],
        "Every layer has attention of its own": [ours // L],
        "Every query head has scores of its own": [ours // H],
        "The masked half is computed too, and counted": [half],
        "That is the last step alone: sum over all of them": [last],
        "Earlier steps have fewer tokens: T differs from step to step": [last * N],
        "T goes from prompt_len to prompt_len + num_new_tokens - 1": [
            *others,
            ours + one_late,
        ],
    }
    return _reproduced(
        {words: theirs in others and theirs != ours for words, others in wrong.items()}
    )


EXERCISES = [
    Exercise("lib.text.decode", 1, decode_cases, decode_explain),
    Exercise(
        "lib.model.attend_causal",
        2,
        attend_causal_cases,
        attend_causal_explain,
        forbidden=(
            "torch.nn.functional.scaled_dot_product_attention",
            "torch.nn.functional.multi_head_attention_forward",
            "torch.nn.attention.flex_attention.flex_attention",
        ),
    ),
    Exercise(
        "lib.sampling.next_token_probs",
        2,
        next_token_probs_cases,
        next_token_probs_explain,
    ),
    Exercise(
        "lib.generate.generate_recompute",
        2,
        generate_recompute_cases,
        generate_recompute_explain,
    ),
    Exercise(
        "lib.generate.attention_flops",
        2,
        attention_flops_cases,
        attention_flops_explain,
    ),
]
