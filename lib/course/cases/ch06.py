"""Chapter 6: what its exercises are tried on."""

import math
import statistics

import numpy as np

from lib.course.cases.ch01 import _reproduced
from lib.course.exercises import Case, Exercise
from lib.course.shipped import reference

IN_FULL = "A block that is filled in part is taken in full: round up"


def schedule_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = [
        _step("one decode, with room in its last block", [[6, 5, 2]], [], 0),
        _step("a decode that needs a block", [[9, 8, 2]], [], 1),
        _step("a prompt", [[7, 0, 0]], [], 2),
        _step("a prompt that has begun", [[30, 8, 2]], [], 9, budget=40),
        _step("a prompt longer than the budget", [[30, 0, 0]], [], 9),
        _step("a prompt, and too few blocks", [[13, 3, 1]], [], 1, budget=20),
        _step("a prompt in a large block of its own", [[9, 0, 1]], [], 0, 20, size=32),
        _step("two prompts, and blocks for both", [[8, 0, 0], [7, 0, 0]], [], 4, 20),
        _step(
            "two prompts, and blocks for the first", [[7, 0, 0], [20, 0, 0]], [], 2, 40
        ),
        _step("a decode, and no free block", [[9, 8, 2]], [], 0),
        _step(
            "blocks of one token, of which one is free",
            *([[5, 4, 4], [8, 7, 7]], []),
            1,
            size=1,
        ),
        _step("two decodes, and one free block", [[9, 8, 2], [13, 12, 3]], [], 1),
        _step("two decodes, of which one has room", [[9, 8, 2], [6, 5, 2]], [], 0),
        _step(
            "a last block that others use too, and one free block",
            *([[10, 9, 2], [9, 8, 2]], [], 1),
        ),
        _step("a last block that others use too, and none is free", [[10, 9, 2]], [], 0),
        _step(
            "more decodes than the budget",
            *([[6, 5, 2], [7, 6, 2], [8, 7, 2]], [], 3),
            budget=2,
        ),
        _step("a prompt before a decode", [[30, 0, 0], [6, 5, 2]], [], 9),
        _step(
            "a prompt and a decode that need a block, of which one is free",
            *([[8, 0, 0], [9, 8, 2]], [], 1),
        ),
        _step(
            "a short rest of a prompt before a decode",
            *([[8, 5, 2], [6, 5, 2]], [], 2),
            budget=2,
        ),
        _step(
            "one that others share blocks with, and a prompt with room",
            *([[10, 9, 2], [10, 9, 2], [20, 9, 3]], [], 1),
        ),
        _step(
            "blocks of its own, more than it fills", [[6, 5, 4], [20, 8, 2]], [], 0, 20
        ),
        _step("two prompts", [[40, 4, 1], [20, 0, 0]], [], 20, budget=50),
        _step("nobody", [], [], 4),
        _step("one that waits", [], [[7, 0, 0]], 4),
        _step("one that waits, and no block", [], [[12, 0, 0]], 0, budget=4),
        _step("blocks for a part of who waits", [], [[12, 0, 0]], 2, budget=4),
        _step("blocks for all of who waits but one token", [], [[9, 0, 0]], 2, 20),
        _step("blocks for exactly all of who waits", [], [[7, 0, 0]], 2),
        _step("one that waits, longer than the budget", [], [[30, 0, 0]], 9),
        _step("one that decodes, and one that waits", [[6, 5, 2]], [[5, 0, 0]], 3),
        _step("two that wait", [], [[5, 0, 0], [6, 0, 0]], 5, budget=20),
        _step(
            "two that wait, and blocks for one", [], [[5, 0, 0], [6, 0, 0]], 3, budget=20
        ),
        _step(
            "two that wait, and the first is too long",
            *([], [[20, 0, 0], [3, 0, 0]], 3),
            budget=40,
        ),
        _step("a budget that decodes use up", [[6, 5, 2], [7, 6, 2]], [[3, 0, 0]], 4, 2),
        _step("a budget that ends with the first", [], [[8, 0, 0], [3, 0, 0]], 9),
        _step("the last free block is taken by a decode", [[9, 8, 2]], [[4, 0, 0]], 1),
        _step("free blocks that a prompt takes", [[12, 4, 1]], [[8, 0, 0]], 3, budget=40),
        _step(
            "prompts with room in their blocks",
            *([[7, 5, 2], [11, 9, 3]], [[8, 0, 0], [7, 0, 0], [7, 0, 0]], 7, 30),
        ),
        _step(
            "a decode without room before the last of the budget",
            *([[9, 8, 2], [6, 5, 2], [7, 6, 2]], [], 0),
            budget=2,
        ),
        _step(
            "requests with a large block each",
            *([[9, 0, 1], [12, 11, 1]], [[40, 0, 0], [20, 0, 0]], 1, 100),
            size=64,
        ),
        _step("one that waits, the beginning in use by others", [], [[14, 8, 2]], 3, 20),
        _step(
            "two that wait, one beginning in free blocks",
            *([], [[16, 8, 0], [12, 0, 0]], 3, 20),
        ),
        _step("the beginning in free blocks, and enough", [], [[14, 8, 0]], 4, 20),
        _step("half of the beginning in use by others", [], [[14, 8, 1]], 3, 20),
        _step("a watermark", [[6, 5, 2]], [[8, 0, 0], [7, 0, 0]], 3, 20, watermark=2),
        _step(
            "a watermark that is kept", [[9, 8, 2]], [[7, 0, 0]] * 3, 9, 30, watermark=2
        ),
        _step("a watermark, and a decode", [[9, 8, 2]], [], 1, watermark=2),
        _step("a watermark, and nothing runs", [], [[8, 0, 0]], 3, watermark=2),
        _step(
            "a watermark, and a prompt runs",
            *([[7, 4, 1]], [[8, 0, 0], [8, 0, 0]], 3, 20),
            watermark=2,
        ),
        _step(
            "a watermark, and the first begins",
            *([], [[8, 0, 0]] * 3, 5, 30),
            watermark=2,
        ),
        _step("blocks of one token", [[5, 4, 4], [9, 3, 3]], [[7, 2, 1]], 13, 40, size=1),
        _step(
            "twelve decodes and twenty short prompts that wait",
            [[5 + i, 4 + i, -(-(4 + i) // 4)] for i in range(12)],
            [[1 + i % 4, 0, 0] for i in range(20)],
            *(30, 70),
        ),
        _step(
            "three decodes, two prompts, and three that wait",
            *([[9, 8, 2], [40, 16, 4], [6, 5, 2], [23, 21, 6], [5, 4, 1]],),
            *([[30, 8, 2], [11, 0, 0], [50, 0, 0]], 17, 40),
            watermark=1,
        ),
    ]
    lens = rng.integers(1, 60, size=300)
    queue = [[9, 0, 0], [14, 0, 0], [5, 0, 0], [7, 0, 0], *_new(lens)]
    cases.append(_step("a queue of 304", [], queue, 10, budget=64, most=4))
    queue = [[6, 0, 0], [9, 0, 0], *_new(lens)]
    cases.append(_step("a queue of 302, and a small budget", [], queue, 99, most=3))
    return [*cases, *(_random_step(rng, number) for number in (1, 2, 3))]


def _step(
    name: str,
    running: list,
    waiting: list,
    num_free_blocks: int,
    budget: int = 8,
    size: int = 4,
    watermark: int = 0,
    most: int | None = None,
) -> Case:
    """most: how many of those that wait may be looked at."""
    inputs = {
        "running": running,
        "waiting": waiting,
        "num_free_blocks": num_free_blocks,
        "token_budget": budget,
        "block_size": size,
        "watermark_blocks": watermark,
    }
    most = len(waiting) if most is None else most
    return Case(name, inputs, {"taken_from_waiting": most})


def _new(lens: np.ndarray) -> list[list[int]]:
    """Requests with so many tokens, of which nothing is in the cache."""
    return [[int(num_tokens), 0, 0] for num_tokens in lens]


def _random_step(rng, number: int) -> Case:
    """Decodes and prompts, some that wait, and of all of them more than there is room."""
    size = int(rng.integers(3, 17))
    running, waiting = [], []
    for _ in range(8):
        num_cached = int(rng.integers(1, 90))
        missing = 1 if rng.random() < 0.6 else int(rng.integers(2, 40))
        num_blocks = math.ceil(num_cached / size)
        if num_cached % size and rng.random() < 0.2:
            num_blocks -= 1  # the last one, which others use too
        running.append([num_cached + missing, num_cached, num_blocks])
    for _ in range(6):
        num_tokens = int(rng.integers(1, 50))
        num_found = int(rng.integers(0, (num_tokens - 1) // size + 1))  # blocks
        in_use = int(rng.integers(0, num_found + 1))
        waiting.append([num_tokens, num_found * size, in_use])
    free, budget = (int(rng.integers(low, high)) for low, high in ((4, 40), (60, 200)))
    name = f"eight that run and six that wait, random ({number})"
    return _step(name, running, waiting, free, budget, size, int(rng.integers(0, 4)))


DECODES_FIRST = "Decodes first: whoever misses one token comes before running prompts"
BUDGET = "All requests together have token_budget new tokens at most"
TAKEN = "Blocks that a request takes in this step are free for nobody else"
OWN = "num_blocks are there already: they are not taken from the free ones"
FOUND = (
    "Whoever begins needs blocks for all of its num_tokens, less num_blocks: what is "
    "found in the cache may lie in free blocks, and takes them"
)
FOR_ALL = "Who waits begins only if blocks for all that it knows are free"
ENOUGH = "Exactly enough free blocks, beside the watermark, are enough"
PIECES = "As much as the budget and the free blocks allow: a prompt may enter in pieces"
NO_COUNT = "Who waits and does not begin has no count, not even 0"
KEEPS = "While something runs, or has begun in this step, watermark_blocks stay free"
SLIPS = {  # of `_scheduled`, and what to say of each
    "in order of arrival": DECODES_FIRST,
    "prompts first": DECODES_FIRST,
    "no budget": BUDGET,
    "no budget for decodes": BUDGET,
    "no budget for prompts": BUDGET,
    "a budget for each": BUDGET,
    "below 0": "Without room a request gets 0: num_blocks may be too few for num_cached, "
    "where others use the last block too",
    "no blocks": "No more new tokens than its own blocks and the free ones have room for",
    "nothing is taken": TAKEN,
    "taken by decodes alone": TAKEN,
    "taken by prompts alone": TAKEN,
    "a block for each piece": "Its last block may have room: blocks for num_cached + "
    "its new tokens, less num_blocks, are taken",
    "free blocks alone": OWN,
    "own blocks are those in the cache": OWN,
    "all or nothing": PIECES,
    "all or nothing of who waits": PIECES,
    "not cut": BUDGET,
    "all tokens": "What is in the cache is not computed again: "
    "num_tokens - num_cached are missing",
    "own order": "The counts stand in the order of `running`, not in that of the work",
    "stops": "Who finds no room gets 0, and those behind it go on",
    "no zeros": "A count for each that runs: 0 where it gets none",
    "blocks of the piece": FOR_ALL,
    "no blocks for who waits": FOR_ALL,
    "rounded down": IN_FULL,
    "one more": "A block is needed when those before it are full, not before",
    "strictly fewer": ENOUGH,
    "nothing found in use": FOUND,
    "found is had": FOUND,
    "found is left out": FOUND,
    "with no token": NO_COUNT,
    "zeros": NO_COUNT,
    "one begins": "Who waits begins if it can, then the second, and so on",
    "nobody begins beside others": "Who waits begins beside those that run",
    "overtaking": "Nobody overtakes: where one cannot begin, those behind it wait too",
    "no watermark": KEEPS,
    "watermark where some ran": KEEPS,
    "watermark for decodes": KEEPS,
    "watermark always": "While nothing runs, the watermark does not count",
    "watermark for all": "The watermark is for those that decode: they may use it",
    "watermark is not enough": ENOUGH,
}


def schedule_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    ours, theirs = expected["counts"], got["counts"]
    found = {}
    for slip, words in SLIPS.items():
        if slip == "free blocks alone" and len(inputs["running"]) > 1:
            continue  # whoever does that has failed where one is alone
        other = _scheduled(inputs, slip)
        is_it = other == theirs and other != ours
        found[words] = found.get(words, False) or is_it
    if theirs != ours:
        return _reproduced(found)
    if any(isinstance(count, float) for count in theirs):
        return "Tokens are counted: give ints"
    if not got["running_is_as_before"]:
        return "The list `running` is the engine's: copy it to change it"
    return "Take from `waiting` while requests begin, no more: each costs a search"


@reference
def _scheduled(inputs: dict, slip: str) -> list[int]:
    """The counts that come of a slip, one of SLIPS."""
    size, watermark = inputs["block_size"], inputs["watermark_blocks"]
    running, waiting = inputs["running"], inputs["waiting"]
    free, budget = inputs["num_free_blocks"], inputs["token_budget"]

    def in_blocks(num_tokens: int) -> int:
        if slip == "rounded down":
            return num_tokens // size
        return num_tokens // size + 1 if slip == "one more" else -(-num_tokens // size)

    def is_prompt(i: int) -> bool:
        num_tokens, num_cached, _ = running[i]
        return num_tokens - num_cached > 1

    order = list(range(len(running)))
    if slip != "in order of arrival":
        order.sort(key=is_prompt, reverse=slip == "prompts first")
    counts, keep = [0] * len(running), watermark if slip == "watermark for all" else 0
    for i in order:
        num_tokens, num_cached, has = running[i]
        if slip == "own blocks are those in the cache":
            has = -(-num_cached // size)
        missing = num_tokens if slip == "all tokens" else num_tokens - num_cached
        own = 0 if slip == "free blocks alone" else has * size - num_cached
        room = math.inf if slip == "no blocks" else own + max(free - keep, 0) * size
        left = math.inf if slip == "no budget" else budget
        if slip == f"no budget for {'prompts' if is_prompt(i) else 'decodes'}":
            left = math.inf
        count = min(missing, left, room)
        if slip != "below 0":
            count = max(count, 0)
        if slip == "all or nothing" and count < missing:
            count = 0
        if slip == "stops" and count == 0:
            break
        counts[i] = count
        if slip != "a budget for each" and left == budget:
            budget -= count
        taken = max(in_blocks(num_cached + count) - has, 0)
        if count == 0:
            taken = 0
        elif slip == "a block for each piece":
            taken = -(-count // size)
        alone = f"taken by {'prompts' if is_prompt(i) else 'decodes'} alone"
        is_counted = alone == slip or not slip.startswith("taken by")
        if is_counted and slip != "nothing is taken":
            free -= taken
    if slip == "own order":
        counts = [counts[i] for i in order]
    if slip == "no zeros":
        counts = [count for count in counts if count]
    begun: list[int] = []
    for num_tokens, num_cached, has in waiting:
        missing = num_tokens if slip == "all tokens" else num_tokens - num_cached
        if slip == "no budget" or slip == "not cut" and budget > 0:
            count = missing
        else:
            count = min(missing, budget)
        last = num_cached + count if slip == "blocks of the piece" else num_tokens
        needed = in_blocks(last) - has
        if slip == "nothing found in use":
            needed = in_blocks(num_tokens)
        elif slip == "found is had":
            needed = in_blocks(num_tokens) - num_cached // size
        elif slip == "found is left out":
            needed = in_blocks(num_tokens - num_cached)
        elif slip == "no blocks for who waits":
            needed = -math.inf
        stays = watermark if running or begun or slip == "watermark always" else 0
        if slip == "no watermark":
            stays = 0
        elif slip == "watermark where some ran":
            stays = watermark if running else 0
        elif slip == "watermark for decodes":
            stays = watermark if not all(map(is_prompt, range(len(running)))) else 0
        is_short = needed + stays > free
        if slip == "strictly fewer" or slip == "watermark is not enough" and stays:
            is_short = needed + stays >= free
        if slip == "with no token" and budget == 0 and not is_short:
            begun.append(0)
            free -= needed
            continue
        none = running if slip == "nobody begins beside others" else False
        none = none or slip == "one begins" and begun
        is_whole = slip != "all or nothing of who waits" or count == missing
        if budget <= 0 or is_short or none or not is_whole:
            if slip == "overtaking" and budget > 0:
                continue
            break
        begun.append(count)
        budget -= count
        if slip not in ("nothing is taken", "no blocks for who waits"):
            free -= needed
    if slip == "zeros":
        begun += [0] * (len(waiting) - len(begun))
    return counts + begun


def finish_reason_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, new_ids, max_new_tokens, stop_ids, is_a_set in (
        ("a first token", [5], 3, [], True),
        ("the only token that was asked for", [5], 1, [], True),
        ("two of three tokens", [5, 2], 3, [], True),
        ("three of three tokens", [5, 2, 9], 3, [], True),
        ("a token that ends it", [5, 2], 3, [2], True),
        ("a token that ends it, and is the last", [5, 2], 2, [2], True),
        ("a first token that ends it", [2], 3, [2], True),
        ("a token that does not end it", [5, 3], 4, [2], True),
        ("the last token, and none that ends it", [5, 3], 2, [2], True),
        ("one that would have ended it, before", [2, 5], 3, [2], True),
        ("one that would have ended it before, and the last", [2, 5], 2, [2], True),
        ("the only token, which ends it too", [2], 1, [2], True),
        ("equal tokens, two of three", [5, 5], 3, [], True),
        ("equal tokens, three of three", [5, 5, 5], 3, [], True),
        *(
            (f"token {token_id}, and nothing that ends it", [5, token_id], 3, [], True)
            for token_id in (0, 1, 3, 10, 50_256)
        ),
        ("a token 256 above one that ends it", [5, 258], 3, [2], True),
        ("token 0 ends it", [5, 0], 3, [0], True),
        ("token 0 does not", [5, 0], 3, [2], True),
        ("several that end it", [5, 9], 7, [2, 9, 4], True),
        ("a list of several", [5, 9], 7, [9, 2], False),
        ("a list, and the second of it", [5, 2], 7, [9, 2], False),
        ("an id whose digits another has too", [5, 25], 7, [256, 1257], True),
        ("a large id that ends it", [5, 50_256], 7, [50_256], True),
    ):
        cases.append(_end_case(name, new_ids, max_new_tokens, stop_ids, is_a_set))
    ids = 1000 + rng.permutation(9000)
    new_ids, stop_ids = ids[:20].tolist(), ids[19:25].tolist()
    others = ids[25:30].tolist()
    cases += [
        _end_case("twenty random ids, the last ends it", new_ids, 30, stop_ids, True),
        _end_case("twenty random ids of thirty", new_ids, 30, others, True),
        _end_case("twenty random ids of twenty", new_ids, 20, others, True),
    ]
    return cases


def _end_case(name, new_ids, max_new_tokens, stop_ids, is_a_set) -> Case:
    inputs = {"new_ids": new_ids, "max_new_tokens": max_new_tokens}
    return Case(name, {**inputs, "stop_ids": stop_ids, "is_a_set": is_a_set})


def finish_reason_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    new_ids, most = inputs["new_ids"], inputs["max_new_tokens"]
    ours, theirs = expected["reason"], got["reason"]
    others = set(new_ids[:-1]) & set(inputs["stop_ids"])
    if ours == "stop" and theirs == "length":
        return '"stop" comes before "length": that token is among stop_ids'
    if ours == "stop" and theirs is None:
        return "The last of new_ids is among stop_ids: it ends the answer"
    if ours == "length" and theirs is None:
        return "With its max_new_tokens-th token an answer ends"
    if theirs == "stop" and others:
        return "The last of new_ids alone may end it: the others did not"
    if ours is None and theirs == "length" and len(new_ids) == most - 1:
        return "It is not over before it has max_new_tokens tokens"
    return None


def latencies_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    times = (1e4 + rng.random() + rng.uniform(0.01, 0.9, size=40).cumsum()).tolist()
    cases = []
    for name, arrived, at in (
        ("one token", 1.0, [3.5]),
        ("two tokens", 1.0, [3.0, 3.5]),
        ("three tokens", 1.0, [3.0, 3.25, 6.0]),
        ("an arrival at 0", 0.0, [0.5, 0.75, 2.0, 2.5]),
        ("tokens that come at once", 2.0, [6.0, 6.0, 6.0, 6.0]),
        ("milliseconds", 0.25, [0.2625, 0.2675, 0.2785]),
        ("a long wait for the second of five", 4.0, [5.0, 25.0, 25.5, 26.5, 27.0]),
        ("forty random times", times[0] - rng.uniform(0.5, 4), times),
    ):
        cases.append(Case(name, {"arrived": float(arrived), "times": at}))
    return cases


def latencies_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    arrived, times = inputs["arrived"], inputs["times"]
    wrong = next(n for n in expected if not _is_close(expected[n], got.get(n)))
    theirs, found = got.get(wrong), {}
    if theirs != theirs:  # NaN
        return "One token has no gap: `between` is 0" if len(times) == 1 else None
    for words, other in _other_latencies(arrived, times)[wrong]:
        is_it = _is_close(theirs, other) and not _is_close(expected[wrong], other)
        found[words] = found.get(words, False) or is_it
    return _reproduced(found)


def _is_close(one, other) -> bool:
    numbers = type(one) in (int, float) and type(other) in (int, float)
    return numbers and math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)


@reference
def _other_latencies(arrived: float, times: list) -> dict[str, list]:
    """What comes of each slip."""
    num_tokens, first, last = len(times), times[0], times[-1]
    gaps = np.diff(times).tolist() or [0.0]
    waits = [time - arrived for time in times]
    per_gap = max(num_tokens - 1, 1)
    since = "Times are of a clock: subtract the arrival"
    mean = "The mean of all gaps between tokens, of which there are len(times) - 1"
    each = "From the arrival to the last token, over the number of tokens"
    in_ms = "In seconds, as the times are"
    return {
        "first": [
            (since, first),
            ("The first token is times[0]", last - arrived),
            (in_ms, 1e3 * (first - arrived)),
            ("The token's time less the arrival", arrived - first),
        ],
        "between": [
            (mean, (last - first) / num_tokens),
            (mean, statistics.median(gaps)),
            (mean, max(gaps)),
            (mean, gaps[-1]),
            (mean, gaps[0]),
            ("From the first token on: the wait for it is `first`", waits[-1] / per_gap),
            (
                "From the first token on: the wait for it is `first`",
                waits[-1] / num_tokens,
            ),
            ("From the first token to the last, for each gap", last - first),
            (in_ms, 1e3 * (last - first) / per_gap),
        ],
        "normalized": [
            (each, waits[-1] / per_gap),
            (each, waits[-1]),
            (each, (last - first) / num_tokens),
            (each, (last - first) / per_gap),
            (each, statistics.fmean(waits)),
            (each, last / num_tokens),
            ("Seconds for each token, not tokens in each second", num_tokens / waits[-1]),
            (in_ms, 1e3 * waits[-1] / num_tokens),
        ],
    }


def tokens_that_fit_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    memory, weights = (float(n) for n in rng.integers(40_000, 90_000, size=2))
    cases = []
    for name, memory_bytes, weight_bytes, bytes_per_token, share in (
        ("three quarters of 1,024 bytes", 1024, 320, 8, 0.75),
        ("half of 1,024 bytes, no weights", 1024, 0, 8, 0.5),
        ("all of the memory", 1024, 256, 8, 1.0),
        ("a token that fits in part", 1024, 256, 24, 0.5),
        ("a token that almost fits", 1024, 257, 16, 0.5),
        ("a share that is not given", 100_007, 40_000, 1000, None),
        ("weights that take all of it", 1024, 512, 8, 0.5),
        ("weights that do not fit", 1024, 800, 8, 0.5),
        ("weights that do not fit by far", 1024, 9000, 8, 0.9),
        ("weights that fit, but for the share", 1024, 1000, 8, 0.75),
        ("Llama 3 8B on 80 GB", 80e9, 16e9, 131_072, None),
        ("more than 32 bits count", 2**42 + 2**12, 2**40, 128, 0.75),
        ("random sizes", memory + 50_000.25, weights / 3, 101, 0.8),
    ):
        inputs = {
            "memory_bytes": float(memory_bytes),
            "weight_bytes": float(weight_bytes),
            "bytes_per_token": bytes_per_token,
            "share": share,
        }
        cases.append(Case(name, inputs))
    return cases


def tokens_that_fit_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    ours, theirs = expected["tokens"], got["tokens"]
    if isinstance(theirs, float) and theirs == ours:
        return "Tokens are counted: give an int"
    if isinstance(theirs, str):
        return None
    if theirs < 0:
        return "Where the weights do not fit, no token does: 0"
    found = {}
    for words, other in _other_fits(**inputs):
        is_it = theirs == other and other != ours
        found[words] = found.get(words, False) or is_it
    return _reproduced(found)


@reference
def _other_fits(memory_bytes, weight_bytes, bytes_per_token, share) -> list:
    """What comes of each slip."""
    part = "A token that fits in part does not fit: round down"
    both = "The share is that of weights and pool together: share * memory_bytes"
    left, default = 0.9 if share is None else share, {}
    if share is None:
        words = "Where it is not given the share is 0.9"
        others = (0.5, 0.7, 0.75, 0.8, 0.85, 0.95, 1.0)
        default = dict.fromkeys(others, words)
    tokens = (left * memory_bytes - weight_bytes) / bytes_per_token
    rest = max(memory_bytes - weight_bytes, 0)
    used = memory_bytes - weight_bytes / left
    found = [
        (part, math.ceil(tokens)),
        (part, round(tokens)),
        (part, tokens),
        (both, left * rest // bytes_per_token),
        (both, (left * memory_bytes - left * weight_bytes) // bytes_per_token),
        (both, (memory_bytes - left * weight_bytes) // bytes_per_token),
        (both, used // bytes_per_token),
        ("The share counts: the rest is for other things", rest // bytes_per_token),
        ("The weights are there too", left * memory_bytes // bytes_per_token),
        ("Tokens, not bytes: divide by bytes_per_token", left * memory_bytes),
        (
            "Tokens, not bytes: divide by bytes_per_token",
            left * memory_bytes - weight_bytes,
        ),
        ("The share is what may be used", (1 - left) * memory_bytes // bytes_per_token),
    ]
    for other, words in default.items():
        fits = (other * memory_bytes - weight_bytes) // bytes_per_token
        found.append((words, fits))
    return found


def preempt_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)

    def request(request_id, num_prompt: int, num_new: int) -> list:
        ids = rng.integers(0, 8, size=num_prompt + num_new).tolist()
        return [request_id, ids[:num_prompt], ids[num_prompt:]]

    a, b, c, d, e = (
        request("a", 4, 3),
        request("b", 2, 1),
        request("c", 7, 2),
        request("d", 1, 4),
        request("e", 3, 0),
    )
    f = ["f", [*c[1], *c[2], 3], [5, 1]]  # begins as c, and goes on
    cases = [
        _sent_back("one, and nobody waits", [b], []),
        _sent_back("one of two, and nobody waits", [b, a], []),
        _sent_back("one of two, and two wait", [a, b], [["x", [1], []], d]),
        _sent_back("the last is longer than the others", [b, d, c], [e]),
        _sent_back("the first is the longest", [c, d, b], [e]),
        _sent_back("two, one after the other", [c, d, a], [e, b], num_calls=2),
        _sent_back("all, one after the other", [a, b, c], [e], num_calls=3),
        _sent_back("blocks that another uses too", [a, c, f], [b], forks=[["c", "f"]]),
        _sent_back("request ids that are numbers", [[0, [1, 2], [3]], [7, [4], []]], []),
        _sent_back(
            "request 0, and three wait",
            *([[4, [1], [3, 5]], [0, [4, 4, 1], [2]]], [[9, [6], []], [3, [2], []], d]),
        ),
        _sent_back("a prompt of which nothing is computed", [a, ["x", [6], []]], [b, c]),
        _sent_back("a cache in one piece", [a, c, b], [d], is_contiguous=True),
        _sent_back(
            "a cache in one piece, two", [a, b, c], [d], is_contiguous=True, num_calls=2
        ),
    ]
    running = [request(f"r{i}", *rng.integers(1, 9, size=2).tolist()) for i in range(6)]
    waiting = [request(f"w{i}", int(rng.integers(1, 9)), 0) for i in range(4)]
    cases.append(_sent_back("six that run and four that wait", running, waiting))
    cases.append(_sent_back("the same, four times", running, waiting, num_calls=4))
    return cases


def _sent_back(
    name: str,
    running: list,
    waiting: list,
    forks: list = (),
    is_contiguous: bool = False,
    num_calls: int = 1,
) -> Case:
    inputs = {
        "running": running,
        "waiting": waiting,
        "forks": list(forks),
        "num_blocks": 8 if is_contiguous else 60,
        "block_size": 24 if is_contiguous else 2,
        "is_contiguous": is_contiguous,
        "num_calls": num_calls,
    }
    return Case(name, inputs)


def preempt_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    call = next(call for call in expected if got.get(call) != expected[call])
    number = list(expected).index(call)
    ours, theirs = expected[call], got[call]
    ids = [request_id for request_id, *_ in inputs["running"]]
    last, before = ids[len(ids) - 1 - number], ids[: len(ids) - number]
    runs, waits = theirs["running"], theirs["waiting"]
    if runs == before and len(before) > 0:
        if theirs["gave"] == ours["gave"] and last in waits:
            return "Take it out of the list `running` itself"
        if waits == ours["waiting"][1:]:
            return "Nobody was sent back"
        return None
    if set(before) - set(runs) != {last}:
        begun = "The last of `running` began last: that one goes back"
        return begun if len(runs) == len(before) - 1 else None
    if waits != ours["waiting"]:
        return _about_the_queue(last, waits, ours["waiting"])
    if theirs["requests_in_the_cache"] > ours["requests_in_the_cache"]:
        num_tokens = {row[0]: len(row[1]) + len(row[2]) for row in inputs["running"]}
        if (
            theirs["tokens"].get(f"request {last!r} in the cache")
            == 0
            < num_tokens[last] - 1
        ):
            return "It begins again when it has its turn, not now"
        return "Its blocks go back to the pool: free it in the cache"
    if theirs["requests_in_the_cache"] < ours["requests_in_the_cache"]:
        return "The others stay in the cache, with all that they have"
    if theirs["requests"] != ours["requests"]:
        return "It goes back as it is, with all its tokens: nothing of it changes"
    if theirs["gave"] != ours["gave"]:
        return "Return the request itself"
    return None


def _about_the_queue(last, waits: list, ours: list) -> str | None:
    if last not in waits:
        copied = f"a copy of request {last!r}"
        if copied in waits:
            return "The request itself goes back, no copy of it"
        return "It waits again: at the head of the queue" if waits == ours[1:] else None
    if waits == [*ours[1:], last]:
        return "At the head of the queue: it came before all that wait"
    return None


def block_hashes_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    beginning = rng.integers(0, 128_000, size=12).tolist()
    other = rng.integers(0, 128_000, size=12).tolist()
    lens = rng.integers(4, 30, size=6)
    texts = [rng.integers(0, 3, size=n).tolist() for n in lens]
    many = rng.integers(0, 128_000, size=3000).tolist()
    return [
        _texts("one full block", 2, [5, 6]),
        _texts("a block that is not full", 4, [5, 6, 7]),
        _texts("two full blocks and a token", 2, [5, 6, 7, 8, 9]),
        _texts("no tokens", 2, []),
        _texts("blocks of one token", 1, [5, 6, 7]),
        _texts("a block longer than the text", 16, [5, 6, 7]),
        _texts("two equal texts", 2, [5, 6, 7, 8], [5, 6, 7, 8]),
        _texts("an equal block behind another", 2, [5, 6, 7, 8], [0, 0, 7, 8]),
        _texts("equal blocks in one text", 2, [7, 8, 7, 8, 7, 8]),
        _texts("zeros", 2, [0, 0, 0, 0, 0, 0]),
        _texts("a zero and another token", 2, [0, 5], [0, 7], [5, 0]),
        _texts(
            "texts that differ in their first block",
            2,
            *([*x] for x in ([1, 1, 2, 2, 3, 3, 4, 4], [9, 9, 2, 2, 3, 3, 4, 4])),
        ),
        _texts("blocks that change places", 2, [5, 6, 7, 8], [7, 8, 5, 6]),
        _texts("tokens that change places", 2, [5, 6], [6, 5]),
        _texts("tokens within a block", 4, [5, 1, 2, 6], [5, 3, 2, 6], [5, 1, 4, 6]),
        _texts("tokens of the same sum", 2, [3, 4], [2, 5], [1, 6]),
        _texts("tokens of the same digits", 2, [1, 23], [12, 3]),
        _texts(
            "texts that end differently", 2, [5, 6, 7], [5, 6, 8], [5, 6], [5, 6, 7, 9]
        ),
        _texts("a token and 256 more", 2, [5, 6], [261, 6], [5 + 65_536, 6]),
        _texts(
            "large ids, one apart", 1, [2048], [2049], [100_000], [100_001], [100_256]
        ),
        _texts(
            "small numbers beside large ones",
            2,
            [1, 0],
            *([0, base] for base in (31, 33, 37, 131, 256, 257, 1000, 50_257, 65_536)),
        ),
        _texts(
            "a text that goes on", 2, [5, 6], [7, 8], [5, 6, 7, 8], behind={1: [0, 0]}
        ),
        _texts(
            "a text that goes on behind two blocks",
            *(3, beginning[:6], beginning[6:], beginning),
            behind={1: [0, 1]},
        ),
        _texts(
            "two texts that go on in the same way",
            *(3, beginning[:6], other[:3], beginning[6:], beginning[6:]),
            behind={2: [0, 1], 3: [1, 0]},
        ),
        _texts(
            "tokens of three kinds",
            *(2, *texts, texts[0][2:], texts[1][:4]),
            behind={6: [0, 0]},
        ),
        _texts("260 texts that end alike", 1, *([i, 7] for i in range(260))),
        _texts("a long text", 2, many, many[:400] + many[:200]),
    ]


def _texts(
    name: str, block_size: int, *texts: list[int], behind: dict[int, list] | None = None
) -> Case:
    """behind: of a text that goes on with another the block before it, [text, block]."""
    calls = [[list(text), (behind or {}).get(i)] for i, text in enumerate(texts)]
    return Case(name, {"block_size": block_size, "calls": calls})


CHAIN = "Over its tokens and the hash before it: a block is found by all of its text"
ORDER = "Over each token, in its place: other tokens, or another order, are another block"
GOES_ON = (
    "A text that goes on has the hashes of the whole text: each over its block and the "
)
GOES_ON += "hash before it, and over nothing else"
FULL = "A hash for each full block, and no other"
HASHED = {  # slips of `_numbered`, and what to say of each
    "no chain": CHAIN,
    "the block before alone": CHAIN,
    "places": CHAIN,
    "sets of blocks": CHAIN,
    "blocks that cancel": CHAIN,
    "the first block alone": CHAIN,
    "sets of tokens": ORDER,
    "sums": ORDER,
    "digits": "Keep tokens apart: 1, 23 is not 12, 3",
    "bytes": "A token is not a byte: ids need more bits",
    "16 bits": "Ids need more than 16 bits",
    "part": FULL,
    "one fewer": FULL,
    "one token fewer": FULL,
    "lengths": "A block's hash does not depend on what comes after it",
    "ends": "A block's hash does not depend on what comes after it",
    "no previous": GOES_ON,
}


def block_hashes_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    found = {}
    goes_on = any(behind for _, behind in inputs["calls"])
    is_zero = not any(any(token_ids) for token_ids, _ in inputs["calls"])
    is_long = sum(len(token_ids) for token_ids, _ in inputs["calls"]) > 300
    for slip, words in HASHED.items():
        if is_zero or is_long or goes_on and words != GOES_ON:
            continue  # whoever does that has failed before
        other = _numbered(inputs, slip)
        is_it = other == got.get("numbered") and other != expected["numbered"]
        found[words] = found.get(words, False) or is_it
    if got["hashes"] != expected["hashes"]:
        is_long = got["hashes"].startswith("of ")
        return "A hash is short, however long the text is" if is_long else None
    if got["numbered"] != expected["numbered"]:
        return _reproduced(found)
    if got["in_another_call"] != expected["in_another_call"]:
        return "The same text has the same hashes, whenever it comes"
    return "hash() of texts and bytes, and id(), differ from process to process"


@reference
def _numbered(inputs: dict, slip: str) -> list[list[int]]:
    """Which blocks have the same hash, where there is a slip, one of HASHED."""
    size, numbers = inputs["block_size"], {}  # what a block is known by -> its number
    out: list[list[int]] = []
    for token_ids, behind in inputs["calls"]:
        before = -1
        if behind is not None and slip != "no previous":
            before = dict(enumerate(out[behind[0]])).get(behind[1], -1)
        end = len(token_ids) // size * size
        if slip == "part":
            end = len(token_ids)
        elif slip == "one fewer":
            end -= size
        elif slip == "one token fewer":
            end = (len(token_ids) - 1) // size * size
        found, blocks = [], []
        for first in range(0, end, size):
            block = tuple(token_ids[first : first + size])
            blocks.append(block)
            tokens = {
                "sets of tokens": tuple(sorted(block)),
                "sums": sum(block),
                "digits": "".join(map(str, block)),
                "bytes": tuple(token_id % 256 for token_id in block),
                "16 bits": tuple(token_id % 65_536 for token_id in block),
            }.get(slip, block)
            key = {
                "no chain": block,
                "the block before alone": tuple(blocks[-2:]),
                "places": (len(found), block),
                "sets of blocks": tuple(sorted(blocks)),
                "blocks that cancel": tuple(
                    b for b in sorted(set(blocks)) if blocks.count(b) % 2
                ),
                "the first block alone": (blocks[0], block),
                "lengths": (before, len(token_ids), block),
                "ends": (before, tuple(token_ids), block),
            }.get(slip, (before, tokens))
            before = numbers.setdefault(key, len(numbers))
            found.append(before)
        out.append(found)
    return out


def find_prefix_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    abc = ["a", "b", "c"]
    cases = [
        _search("one block of one", ["a"], {"a": 4}, 3, 2),
        _search("two blocks of three", abc, {"a": 4, "b": 9}, 7, 2),
        _search("nothing", abc, {}, 7, 2),
        _search("no full block", [], {"a": 4}, 1, 2),
        _search("others' blocks alone", abc, {"x": 4, "y": 9}, 7, 2),
        _search(
            "all full blocks, and a token behind", abc, {"a": 4, "b": 9, "c": 2}, 7, 2
        ),
        _search("all of a text", ["a", "b"], {"a": 4, "b": 9}, 4, 2),
        _search("all of a text of one block", ["a"], {"a": 4}, 2, 2),
        _search("all of a text but the last block", abc, {"a": 4, "b": 9}, 6, 2),
        _search(
            "all of a text, blocks of one token", abc, {"a": 4, "b": 9, "c": 2}, 3, 1
        ),
        _search("a full block and three tokens", ["a"], {"a": 4}, 7, 4),
        _search("the first is missing", abc, {"b": 9, "c": 1}, 7, 2),
        _search("the second is missing", abc, {"a": 4, "c": 1}, 7, 2),
        _search("the first is block 0", abc, {"a": 0, "b": 9, "c": 3}, 7, 2),
        _search("the second is block 0", abc, {"a": 4, "b": 0, "c": 3}, 7, 2),
        _search("blocks in another order", abc, {"c": 1, "x": 7, "b": 2, "a": 3}, 8, 2),
        _search(
            "two gaps",
            *([*"abcdefg"], {"a": 5, "b": 3, "d": 8, "e": 1, "f": 2, "g": 0}, 15, 2),
        ),
    ]
    size, num_blocks = int(rng.integers(3, 20)), 40
    names = [f"h{number}" for number in rng.permutation(1000)[: num_blocks + 30]]
    ids = rng.permutation(500).tolist()
    text = names[:num_blocks]
    gap = int(rng.integers(22, 36))
    for name, missing, rest in (
        ("forty blocks, of which one is missing", [text[gap]], 1),
        ("forty blocks, and all are there", [], size - 1),
        ("forty blocks, and nothing behind", [], 0),
    ):
        known = dict(zip(rng.permutation(names).tolist(), ids))
        known = {h: i for h, i in known.items() if h not in missing}
        cases.append(_search(name, text, known, num_blocks * size + rest, size))
    return cases


def _search(
    name: str, hashes: list, block_of_hash: dict, num_tokens: int, block_size: int
) -> Case:
    inputs = {"hashes": hashes, "block_of_hash": block_of_hash}
    return Case(name, {**inputs, "num_tokens": num_tokens, "block_size": block_size})


ONE_LEFT = (
    "One token is left to compute: a text that is there to its end gets a block less"
)
LESS = "Only a text that is there to its end gets one block less"
GAP = "Behind a block that is missing nothing counts: what it holds is another beginning"
FOUND_BLOCKS = {  # slips of `_found`, and what to say of each
    "all": ONE_LEFT,
    "one less": LESS,
    "one less of all": LESS,
    "gaps": GAP,
    "longest run": GAP,
    "no block 0": "Block 0 is a block: ask whether a hash is there, not for a true value",
    "turned around": "In the order of the text",
    "sorted": "In the order of the text",
    "in the order of the dict": "In the order of the text",
}


def find_prefix_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    ours, theirs, found = expected["block_ids"], got["block_ids"], {}
    for slip, words in FOUND_BLOCKS.items():
        other = _found(inputs, slip)
        is_it = other == theirs and other != ours
        found[words] = found.get(words, False) or is_it
    return _reproduced(found)


@reference
def _found(inputs: dict, slip: str) -> list[int]:
    """The blocks that come of a slip, one of FOUND_BLOCKS."""
    hashes, known, size = inputs["hashes"], inputs["block_of_hash"], inputs["block_size"]
    most = (inputs["num_tokens"] - 1) // size
    if slip in ("all", "one less", "one less of all"):
        most = len(hashes)
    found, run, longest = [], [], []
    for block_hash in hashes[:most]:
        block_id = known.get(block_hash)
        is_there = block_id is not None and not (slip == "no block 0" and block_id == 0)
        run = [*run, block_id] if is_there else []
        longest = max(longest, run, key=len)
        if is_there:
            found.append(block_id)
        elif slip not in ("gaps", "longest run"):
            break
    if slip == "longest run":
        return longest
    if slip == "one less" or slip == "one less of all" and len(found) == len(hashes):
        return found[:-1]
    if slip == "in the order of the dict":
        return [block_id for block_id in known.values() if block_id in found]
    turned = {"turned around": found[::-1], "sorted": sorted(found)}
    return turned.get(slip, found)


def evict_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, idle in (
        ("one block", [[4, 1, 0]]),
        ("two of different times", [[4, 2, 0], [7, 1, 0]]),
        ("two of different times, the older comes first", [[7, 1, 0], [4, 2, 0]]),
        ("two of one text", [[4, 3, 0], [2, 3, 1]]),
        ("two of one text, the deeper comes first", [[2, 3, 5], [4, 3, 4]]),
        ("a later one that is deeper", [[9, 1, 0], [3, 2, 6], [5, 2, 5]]),
        ("an older one that is deeper", [[6, 4, 1], [3, 2, 6], [5, 2, 5], [8, 4, 0]]),
        (
            "a deepest one with the smallest id",
            [[5, 7, 0], [1, 7, 2], [3, 7, 1], [9, 8, 4]],
        ),
        ("block 0 is the one", [[2, 5, 1], [0, 5, 3], [7, 5, 2], [4, 6, 9]]),
        ("block 0, of time 0", [[3, 1, 2], [0, 0, 0], [8, 1, 4]]),
        ("the last of the dict", [[3, 5, 9], [1, 4, 0], [8, 4, 1], [6, 4, 3]]),
        ("the middle of the dict", [[3, 5, 9], [6, 4, 3], [8, 4, 1], [1, 9, 0]]),
        (
            "times and depths of the same sum",
            [[3, 5, 1], [6, 4, 2], [8, 1, 5], [1, 1, 4]],
        ),
        ("a later one that is very deep", [[3, 5, 1], [6, 6, 100_000], [2, 5, 0]]),
        ("a time of two digits", [[3, 10, 1], [6, 9, 2], [8, 9, 11], [2, 100, 30]]),
    ):
        cases.append(Case(name, {"idle": idle}))
    for number, size in enumerate((16, 40), start=1):
        ids = rng.permutation(1000)[:size].tolist()
        texts = [[t, d] for t in range(20, 30) for d in range(3, 9)]
        chosen = rng.permutation(len(texts))[:size].tolist()
        # Of the oldest text three blocks, of which the deepest is neither first nor last.
        oldest = [[3, 4], [3, 7], [3, 5]]
        places = [
            int(rng.integers(size // 2)),
            size - 1 - int(rng.integers(1, 5)),
            size - 1,
        ]
        idle = [[b, *texts[i]] for b, i in zip(ids, chosen)]
        for place, values in zip(places, oldest):
            idle[place][1:] = values
        cases.append(Case(f"{size} random blocks ({number})", {"idle": idle}))
    return cases


def evict_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    values = {block_id: tuple(row) for block_id, *row in inputs["idle"]}
    ours, theirs = expected["block_id"], got["block_id"]
    if theirs == ours:
        return "Only say which one goes: whoever asks takes it away"
    if theirs not in values:
        return None if isinstance(theirs, str) else "No idle block has that number"
    if values[theirs][0] > values[ours][0]:
        return f"The one not used for longest goes, and block {theirs} was used later"
    return f"Of those with the same last_used the deepest goes: {theirs} is less deep"


EXERCISES = [
    Exercise(
        "lib.engine.schedule",
        3,
        schedule_cases,
        schedule_explain,
        errors={
            "'generator'": "`waiting` has no length and no places: go through it with "
            "`for`, as far as requests begin"
        },
    ),
    Exercise("lib.engine.finish_reason", 1, finish_reason_cases, finish_reason_explain),
    Exercise("lib.engine.preempt", 2, preempt_cases, preempt_explain),
    Exercise("lib.engine.latencies", 1, latencies_cases, latencies_explain),
    Exercise(
        "lib.engine.tokens_that_fit", 1, tokens_that_fit_cases, tokens_that_fit_explain
    ),
    Exercise(
        "lib.prefix_cache.block_hashes", 2, block_hashes_cases, block_hashes_explain
    ),
    Exercise("lib.prefix_cache.find_prefix", 2, find_prefix_cases, find_prefix_explain),
    Exercise("lib.prefix_cache.evict", 2, evict_cases, evict_explain),
]
