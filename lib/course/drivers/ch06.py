"""Chapter 6: run an answer, give plain data."""

import builtins
import contextlib
import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lib.config import ModelConfig
from lib.course.drivers.ch01 import as_number
from lib.engine import Load, Request
from lib.kv_cache import ContiguousKVCache, KVCache
from lib.paged_kv_cache import PagedKVCache


def schedule(
    answer: Callable,
    running: list[list[int]],
    waiting: list[list[int]],
    num_free_blocks: int,
    token_budget: int,
    block_size: int,
    watermark_blocks: int,
) -> dict:
    """Who waits comes from a generator, as the engine gives it, that counts."""
    loads, taken = [Load(*load) for load in running], []
    given = [watermark_blocks] if watermark_blocks else []  # 0 is the default
    counts = answer(
        loads, _counted(waiting, taken), num_free_blocks, token_budget, block_size, *given
    )
    return {
        "counts": _as_numbers(counts),
        "running_is_as_before": loads == [Load(*load) for load in running],
        "taken_from_waiting": len(taken),
    }


def _counted(loads: list[list[int]], taken: list) -> Iterator[Load]:
    for load in loads:
        taken.append(load)
        yield Load(*load)


def _as_numbers(value: Any) -> list | str:
    if not isinstance(value, (list, tuple)):
        return f"a {type(value).__name__}, not a list"
    return [as_number(number) for number in value]


def finish_reason(
    answer: Callable,
    new_ids: list[int],
    max_new_tokens: int,
    stop_ids: list[int],
    is_a_set: bool,
) -> dict:
    given = [frozenset(stop_ids) if is_a_set else stop_ids] if stop_ids else []
    reason = answer(new_ids, max_new_tokens, *given)
    if reason is None or type(reason) is str:
        return {"reason": reason}
    return {"reason": f"a {type(reason).__name__}, neither None nor a string"}


def latencies(answer: Callable, arrived: float, times: list[float]) -> dict:
    seconds = answer(arrived, times)
    if not isinstance(seconds, dict):
        return {"first": f"a {type(seconds).__name__}, not a dict"}
    return {str(name): as_number(value) for name, value in seconds.items()}


def tokens_that_fit(
    answer: Callable,
    memory_bytes: float,
    weight_bytes: float,
    bytes_per_token: float,
    share: float | None,
) -> dict:
    """share: None where it is left to the default."""
    given = [] if share is None else [share]
    return {
        "tokens": as_number(answer(memory_bytes, weight_bytes, bytes_per_token, *given))
    }


def preempt(
    answer: Callable,
    running: list[list],
    waiting: list[list],
    forks: list[list],
    num_blocks: int,
    block_size: int,
    is_contiguous: bool,
    num_calls: int,
) -> dict:
    """running, waiting: id, prompt, answer so far. Of those that run the last token is
    not in the cache yet. forks: [parent, child], both of them running: their blocks are
    the same."""
    requests = [_request(number, *row) for number, row in enumerate([*running, *waiting])]
    runs, waits = requests[: len(running)], deque(requests[len(running) :])
    kind = ContiguousKVCache if is_contiguous else PagedKVCache
    cache = kind(ModelConfig(8, 1, 1, 1, 2, 2, 64), num_blocks, block_size)
    _fill(cache, runs, dict(map(reversed, forks)))
    before, out = _snapshot(requests), {}
    for number in range(1, num_calls + 1):
        gave = answer(runs, waits, cache)
        out[f"after call {number}:"] = {
            "gave": _describe(gave, requests),
            "running": _ids(runs, requests),
            "waiting": _ids(waits, requests),
            "tokens": {
                f"request {request_id!r} in the cache": seq_len
                for request_id, seq_len in zip(cache.request_ids, cache.seq_lens.tolist())
                if request_id is not None
            },
            "requests_in_the_cache": sum(r is not None for r in cache.request_ids),
            "free_blocks": cache.num_free_blocks,
            "pool": _integrity(cache),
            "requests": _changes(before, _snapshot(requests)),
        }
    return out


def _request(number: int, request_id: Any, prompt: list, new_ids: list) -> Request:
    token_ids = [*prompt, *new_ids]
    settings = 9, 1.0, None, 1.0, 0, frozenset({7})
    return Request(request_id, token_ids, len(prompt), *settings, number=number)


def _fill(cache: KVCache, requests: list[Request], parents: dict):
    """Begin the requests, with all of their tokens but the last in the cache. A child has
    the blocks of its parent, and goes on from there."""
    for request in requests:
        if request.request_id not in parents:
            cache.begin(request.request_id, request.token_ids)
    _step(cache, requests)
    for child, parent in parents.items():
        cache.fork(parent, child)
    if parents:
        _step(cache, requests)


def _step(cache: KVCache, requests: list[Request]):
    """All tokens that are missing, but the last."""
    num_tokens = {r.request_id: len(r.token_ids) - 1 for r in requests}
    wanted = [num_tokens.get(request_id, 0) for request_id in cache.request_ids]
    query_lens = torch.tensor(wanted) - cache.seq_lens
    with cache.extend(query_lens) as attend:
        attend(0, *torch.zeros(3, int(query_lens.sum()), 1, 2))


def _describe(gave: Any, requests: list[Request]) -> Any:
    """What came back: a request by its id, all else in words."""
    for request in requests:
        if gave is request:
            return request.request_id
    if isinstance(gave, Request):
        return f"a copy of request {gave.request_id!r}"
    return "None" if gave is None else f"a {type(gave).__name__}, not a request"


def _ids(requests: Any, known: list[Request]) -> list:
    return [_describe(request, known) for request in requests]


def _integrity(cache: KVCache) -> str:
    """What the pool says of itself, and the cache of the pool."""
    if isinstance(cache, ContiguousKVCache):
        return "ok"
    try:
        cache.manager.check_integrity()
    except AssertionError as error:
        return str(error)
    try:  # a step over nothing
        cache.check_room(torch.zeros(len(cache.request_ids), dtype=torch.int64))
    except (RuntimeError, ValueError):
        return "its blocks were taken behind the cache's back: cache.free gives them back"
    return "ok"


def _snapshot(requests: list[Request]) -> list[dict]:
    """What is known of each, by field."""
    names = [field.name for field in dataclasses.fields(Request)]
    return [copy.deepcopy({n: getattr(r, n) for n in names}) for r in requests]


def _changes(before: list[dict], after: list[dict]) -> str:
    """What of which request is not what it was."""
    for was, now in zip(before, after):
        for name, value in was.items():
            if now[name] != value:
                words = f"{now[name]!r} in the place of {value!r}"
                return f"request {was['request_id']!r} has another {name}: {words}"
    return "as they were"


def block_hashes(answer: Callable, block_size: int, calls: list[list]) -> dict:
    """calls: [token_ids, behind], where behind is None, or [i, j]: the tokens go on
    behind block j of call i.

    Any hash will do. So they are numbered, in the order in which they come first: what
    counts is which are equal. hash and id give other numbers in another process; the last
    round is what would come of that.
    """
    first = _hashes(answer, block_size, calls)
    numbers: dict = {}
    out = []
    for hashes in first:
        if isinstance(hashes, str):
            return {"hashes": hashes}
        out.append([numbers.setdefault(each, len(numbers)) for each in hashes])
    with _another_process():
        there = _hashes(answer, block_size, calls)
    return {
        "hashes": "of 64 bytes at most",
        "numbered": out,
        "in_another_call": _same(first, _hashes(answer, block_size, calls)),
        "in_another_process": _same(first, there),
    }


def _same(hashes: list, others: list) -> str:
    return "the same" if hashes == others else "others"


def _hashes(answer: Callable, block_size: int, calls: list[list]) -> list:
    """What comes of each call: a list of hashes, or what is none in words."""
    out: list = []
    for token_ids, behind in calls:
        given = [] if behind is None else [out[behind[0]][behind[1]]]
        hashes = answer(token_ids, block_size, *given)
        if not isinstance(hashes, (list, tuple)):
            return [f"a {type(hashes).__name__}, not a list"]
        odd = [words for words in map(_odd_hash, hashes) if words]
        if odd:
            return odd[:1]
        out.append(list(hashes))
    return out


def _odd_hash(value: Any) -> str | None:
    """What is wrong with a hash, of whatever kind, in words."""
    if type(value) is bytes:
        num_bytes = len(value)
    elif type(value) is str:  # of hexadecimal digits, say
        num_bytes = len(value) // 2
    elif type(value) is int:
        num_bytes = value.bit_length() // 8
    else:
        return f"a {type(value).__name__}, which is no hash"
    return f"of {num_bytes} bytes" if num_bytes > 64 else None


@contextlib.contextmanager
def _another_process() -> Iterator[None]:
    """While inside, hash and id give what they would in another process: of texts and
    bytes, and of an object, other numbers."""

    def has_text(value: Any) -> bool:
        if isinstance(value, (tuple, frozenset)):
            return any(map(has_text, value))
        return isinstance(value, (str, bytes)) and len(value) > 0

    kept = builtins.hash, builtins.id
    builtins.hash = lambda value: kept[0](value) + has_text(value)
    builtins.id = lambda value: kept[1](value) + 1
    try:
        yield
    finally:
        builtins.hash, builtins.id = kept


def find_prefix(
    answer: Callable,
    hashes: list[str],
    block_of_hash: dict[str, int],
    num_tokens: int,
    block_size: int,
) -> dict:
    return {
        "block_ids": _as_numbers(answer(hashes, block_of_hash, num_tokens, block_size))
    }


def evict(answer: Callable, idle: list[list[int]]) -> dict:
    """idle: [block id, last_used, depth] of each."""
    blocks = {block_id: (last_used, depth) for block_id, last_used, depth in idle}
    block_id = as_number(answer(blocks))
    is_as_before = [[b, *values] for b, values in blocks.items()] == idle
    return {"block_id": block_id, "idle_is_as_before": is_as_before}
