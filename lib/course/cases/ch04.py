"""Chapter 4: what its exercises are tried on."""

import math
import re
from collections import Counter
from collections.abc import Callable

import numpy as np

from lib.course.exercises import Case, Exercise

NOWHERE = 2147480000  # a block id that stands behind the end of a table: never to be read


def slot_mapping_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, seq_lens, query_lens, block_size in (
        ("one request, its first token", [1], [1], 4),
        ("the first token of a second block", [5], [1], 4),
        ("the last place of a block", [8], [1], 4),
        ("blocks of one token", [3], [3], 1),
        ("a prompt over three blocks", [9], [9], 4),
        ("two requests of different lengths", [3, 7], [1, 1], 4),
        ("a prompt beside a request that goes on", [5, 18], [5, 1], 4),
        ("several new tokens each, over a block's edge", [9, 17, 3], [3, 2, 1], 8),
        ("a request that rests", [2, 6, 11], [1, 0, 2], 4),
        ("random lengths", *_random_lens(rng), 16),
    ):
        block_tables = _block_tables(rng, seq_lens, block_size)
        inputs = {
            "block_tables": block_tables,
            "seq_lens": np.array(seq_lens),
            "query_lens": np.array(query_lens),
            "block_size": block_size,
        }
        cases.append(Case(name, inputs))
    return cases


def _random_lens(rng) -> tuple[list[int], list[int]]:
    query_lens = rng.integers(0, 20, size=5)
    seq_lens = query_lens + rng.integers(1, 90, size=5)
    return seq_lens.tolist(), query_lens.tolist()


def _block_tables(rng, seq_lens: list[int], block_size: int) -> np.ndarray:
    """Shuffled blocks; rows as wide as the widest needs, and one place more."""
    num_used = [math.ceil(seq_len / block_size) for seq_len in seq_lens]
    block_ids = 100 + rng.permutation(2 * sum(num_used) + 2)  # none is a place too
    block_tables = np.full((len(seq_lens), max(num_used) + 1), NOWHERE)
    for row, count in zip(block_tables, num_used):
        row[:count], block_ids = block_ids[:count], block_ids[count:]
    return block_tables


def slot_mapping_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    ours, theirs = expected["slots"], got["slots"]
    if not isinstance(theirs, np.ndarray) or theirs.shape != ours.shape:
        return "One slot for each new token, request after request"
    size, places = inputs["block_size"], ours % inputs["block_size"]
    if (theirs > NOWHERE).any() or (theirs < 0).any():
        return "That reads behind the end of a table: a token has its own request's row"
    if np.array_equal(theirs, ours // size):
        return "That is the block: its slots begin at block_id * block_size"
    if np.array_equal(theirs, ours // size * size):
        return "Add the place in the block, position % block_size"
    if np.array_equal(theirs, _slots_from_zero(inputs)):
        return "The new tokens are a request's last ones: seq_lens counts them too"
    if np.array_equal(theirs, ours + 1):
        return "Positions count from 0: a request's last token is at seq_len - 1"
    if np.array_equal(theirs // size, ours // size) and size > 1:
        return "The place in the block is position % block_size"
    if np.array_equal(theirs % size, places):
        return "The block is the table's entry at position // block_size, in its own row"
    return None


def _slots_from_zero(inputs: dict) -> list[int]:
    """The slots of a request's first tokens, instead of its new ones."""
    size = inputs["block_size"]
    return [
        table[position // size] * size + position % size
        for table, query_len in zip(inputs["block_tables"], inputs["query_lens"])
        for position in range(query_len)
    ]


def _script(name: str, num_blocks: int, block_size: int, *calls: tuple) -> Case:
    listed = [list(call) for call in calls]
    script = {"num_blocks": num_blocks, "block_size": block_size, "calls": listed}
    return Case(name, script)


def _random_script(seed: int, num_calls: int = 40) -> Case:
    """Calls on a small pool, some of which are refused: too many, or for nobody."""
    rng = np.random.default_rng(seed)
    begun, calls = [], []  # begun, if it was not refused, and not freed
    for number in range(num_calls):
        kind = str(rng.choice(["allocate", "append", "append", "append", "fork", "free"]))
        new_id = f"r{number}"
        some_id = str(rng.choice(begun)) if begun and rng.random() < 0.9 else "nobody"
        if kind == "allocate":
            call = [kind, new_id, int(rng.integers(0, 13))]
        elif kind == "append":
            call = [kind, some_id, int(rng.integers(0, 9))]
        else:
            call = [kind, some_id, new_id] if kind == "fork" else [kind, some_id]
        calls.append(call)
        if kind == "free":
            begun = [request_id for request_id in begun if request_id != some_id]
        elif kind != "append":
            begun.append(new_id)
    return _script("forty random calls", 12, 3, *calls)


def allocate_cases(seed: int) -> list[Case]:
    return [
        _script("one token", 4, 2, ("allocate", "a", 1)),
        _script("a prompt that fills its blocks", 4, 2, ("allocate", "a", 4)),
        _script("a prompt of three tokens", 4, 2, ("allocate", "a", 3)),
        _script("no tokens yet", 4, 2, ("allocate", "a", 0)),
        _script("two requests", 4, 2, ("allocate", "a", 3), ("allocate", "b", 2)),
        _script("the whole pool", 3, 4, ("allocate", "a", 12)),
        _script(
            "more than is free",
            *(4, 2),
            *(("allocate", "a", 5), ("allocate", "b", 4), ("allocate", "c", 2)),
        ),
        _script("a live request", 4, 2, ("allocate", "a", 1), ("allocate", "a", 1)),
        _script(
            "blocks that were used before",
            *(3, 2),
            *(("allocate", "a", 4), ("free", "a"), ("allocate", "b", 5)),
        ),
        _script("fewer than no tokens", 4, 2, ("allocate", "a", -1)),
        _random_script(seed),
    ]


def append_cases(seed: int) -> list[Case]:
    return [
        _script("a last block with room", 4, 2, ("allocate", "a", 1), ("append", "a", 1)),
        _script("a full last block", 4, 2, ("allocate", "a", 2), ("append", "a", 1)),
        _script("one token after another", 4, 2, ("allocate", "a", 0), *_ones("a", 7)),
        _script(
            "several tokens over several edges",
            *(8, 3),
            *(("allocate", "a", 2), ("append", "a", 8), ("append", "a", 2)),
        ),
        _script("one token is the default", 4, 2, ("allocate", "a", 2), ("append", "a")),
        _script("no tokens", 4, 2, ("allocate", "a", 3), ("append", "a", 0)),
        _script(
            "two requests in turn",
            *(6, 2),
            *(("allocate", "a", 2), ("allocate", "b", 1)),
            *(("append", "a", 1), ("append", "b", 2), ("append", "a", 2)),
        ),
        _script(
            "more than is free",
            *(3, 2),
            *(("allocate", "a", 3), ("append", "a", 4), ("append", "a", 3)),
        ),
        _script("an unknown request", 4, 2, ("append", "a", 1)),
        _script(
            "a shared last block with room",
            *(4, 2),
            *(("allocate", "a", 3), ("fork", "a", "b"), ("append", "b", 1)),
            ("append", "a", 1),
        ),
        _script(
            "a shared last block with room, and nothing to write",
            *(4, 2),
            *(("allocate", "a", 3), ("fork", "a", "b"), ("append", "b", 0)),
        ),
        _script(
            "a shared last block that is full: nothing to copy",
            *(4, 2),
            *(("allocate", "a", 2), ("fork", "a", "b"), ("append", "b", 1)),
        ),
        _script(
            "no block left for the copy",
            *(2, 2),
            *(("allocate", "a", 3), ("fork", "a", "b"), ("append", "b", 1)),
        ),
        _script(
            "a copy and a new block, but only one is free",
            *(3, 2),
            *(("allocate", "a", 3), ("fork", "a", "b"), ("append", "b", 2)),
            ("append", "b", 1),
        ),
        _script("fewer than no tokens", 4, 2, ("allocate", "a", 3), ("append", "a", -1)),
        _random_script(seed),
    ]


def _ones(request_id: str, count: int) -> list[tuple]:
    return [("append", request_id, 1)] * count


def free_cases(seed: int) -> list[Case]:
    return [
        _script("one request", 4, 2, ("allocate", "a", 3), ("free", "a")),
        _script("one without blocks", 4, 2, ("allocate", "a", 0), ("free", "a")),
        _script(
            "one of two",
            *(4, 2),
            *(("allocate", "a", 3), ("allocate", "b", 2), ("free", "a")),
        ),
        _script(
            "all blocks can be used again",
            *(3, 2),
            *(("allocate", "a", 6), ("free", "a"), ("allocate", "b", 6)),
        ),
        _script(
            "blocks that another still uses",
            *(4, 2),
            *(("allocate", "a", 3), ("fork", "a", "b"), ("free", "a"), ("free", "b")),
        ),
        _script("twice", 4, 2, ("allocate", "a", 3), ("free", "a"), ("free", "a")),
        _script("an unknown request", 4, 2, ("allocate", "a", 3), ("free", "b")),
        _random_script(seed),
    ]


def fork_cases(seed: int) -> list[Case]:
    shared = ("allocate", "a", 3), ("fork", "a", "b")
    return [
        _script("two blocks", 6, 2, *shared),
        _script("no blocks yet", 6, 2, ("allocate", "a", 0), ("fork", "a", "b")),
        _script("the child goes on", 6, 2, *shared, ("append", "b", 3)),
        _script("the parent goes on", 6, 2, *shared, ("append", "a", 3)),
        _script("three of them", 6, 2, *shared, ("fork", "b", "c"), ("append", "c", 1)),
        _script(
            "the parent ends first", 6, 2, *shared, ("free", "a"), ("append", "b", 1)
        ),
        _script("no free block is needed", 2, 2, *shared),
        _script("an unknown parent", 6, 2, ("allocate", "a", 3), ("fork", "c", "b")),
        _script(
            "a live child",
            *(6, 2),
            *(("allocate", "a", 3), ("allocate", "b", 2), ("fork", "a", "b")),
        ),
        _random_script(seed),
    ]


def copy_on_write_cases(seed: int) -> list[Case]:
    shared = ("allocate", "a", 3), ("fork", "a", "b")
    return [
        _script("its only user", 4, 2, ("allocate", "a", 3), ("copy_on_write", "a")),
        _script("two users, the child writes", 4, 2, *shared, ("copy_on_write", "b")),
        _script("two users, the parent writes", 4, 2, *shared, ("copy_on_write", "a")),
        _script("one after the other", 4, 2, *shared, ("append", "b"), ("append", "a")),
        _script(
            "three users",
            *(5, 2),
            *(*shared, ("fork", "a", "c")),
            *(("copy_on_write", "b"), ("copy_on_write", "a"), ("copy_on_write", "c")),
        ),
        _script(
            "a block that is free no more after the copy",
            *(4, 2),
            *(*shared, ("copy_on_write", "b"), ("allocate", "c", 2), ("free", "b")),
        ),
        _script(
            "a full block",
            *(4, 2),
            *(("allocate", "a", 2), ("fork", "a", "b"), ("copy_on_write", "b")),
        ),
        _script("no block is free", 2, 2, *shared, ("copy_on_write", "b")),
        _script("the other has ended", 2, 2, *shared, ("free", "a"), ("append", "b")),
        _random_script(seed),
    ]


def _first_wrong(expected: dict, got: dict) -> tuple[str, dict, dict]:
    return next((k, expected[k], got[k]) for k in expected if got[k] != expected[k])


def script_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    call, ours, theirs = _first_wrong(expected, got)
    method, caller = re.search(r"(\w+)\('(\w+)'", call).groups()
    is_refused = "Error" in ours["gave"]
    if is_refused and theirs["gave"] == ours["gave"]:
        return "It was refused, but something had changed before: count first, then take"
    if is_refused and ours["gave"] == "ValueError":
        return "Raise ValueError, with check_live for an unknown request"
    if is_refused:
        return "Raise OutOfBlocksError(needed, free) before anything is taken"
    if "Error" in theirs["gave"]:
        return "There were enough free blocks for that"
    if method == "fork" and theirs["free_blocks"] != ours["free_blocks"]:
        return "A fork takes no block from the free list"
    if ours["gave"] == "None" and theirs["gave"].startswith("(its old"):
        return "There is nothing to copy: nobody else uses it, or nothing is written"
    if theirs["tables"] != ours["tables"]:
        return _about_tables(method, caller, ours, theirs)
    if theirs["tokens"] != ours["tokens"] and call.endswith(f"append('{caller}'):"):
        return "Where no number is given it is one token"
    if theirs["tokens"] != ours["tokens"]:
        return "seq_lens has the tokens of each live request"
    if theirs["ref_counts"] != ours["ref_counts"]:
        return "ref_count says in how many tables a block stands"
    if theirs["free_blocks"] < ours["free_blocks"]:
        return "A block that no table has is free"
    if theirs["free_blocks"] > ours["free_blocks"]:
        return "A block that some table has is not free"
    if theirs["gave"] != ours["gave"]:
        return "Return (source, target) where a block was copied, else None"
    return None


def _about_tables(method: str, caller: str, ours: dict, theirs: dict) -> str:
    wanted, got = (_num_blocks(state["tables"]) for state in (ours, theirs))
    if method == "free":
        return "A request that has ended has no table, and the others keep theirs"
    differs = [
        request_id for request_id in wanted if wanted[request_id] != got[request_id]
    ]
    if method == "copy_on_write" and differs == [caller]:
        return "The new block takes the place of the table's last entry"
    if any(request_id != caller for request_id in differs):
        return "A table belongs to one request: the child's is a copy of the list"
    if differs and got[caller] > wanted[caller] and ours["gave"].startswith("(its old"):
        return "needed counts the copy too: grow until the table is long enough"
    if differs and got[caller] > wanted[caller]:
        return "A block is taken when the others are full, not before"
    if differs:
        return "Tokens without a place: the last block may be filled in part"
    return "Others use the last block too: a free one takes its place in this table"


def _num_blocks(tables: str) -> Counter:
    """How many blocks each request has: "a: 0 1, b: 2" -> {"a": 2, "b": 1}."""
    rows = (row.split(": ") for row in tables.split(", ") if row != "none")
    return Counter({name: len(re.findall(r"\d+", blocks)) for name, blocks in rows})


def gather_kv_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, seq_len, block_size, num_blocks, (G, D) in (
        ("one token", 1, 2, 3, (1, 1)),
        ("a full block", 2, 2, 3, (1, 1)),
        ("two blocks, the second half full", 3, 2, 4, (1, 2)),
        ("blocks of one token", 5, 1, 9, (2, 2)),
        ("one block that is larger than the text", 5, 256, 2, (2, 2)),
        ("no tokens", 0, 2, 3, (1, 2)),
        ("a request in a large pool", 90, 16, 100, (2, 8)),
        ("a random length", int(rng.integers(20, 70)), 8, 12, (2, 4)),
    ):
        caches = [np.full((num_blocks, block_size, G, D), np.nan) for _ in "kv"]
        num_used = math.ceil(seq_len / block_size)
        block_ids = rng.permutation(num_blocks)[:num_used]
        for i, block_id in enumerate(block_ids):
            filled = min(block_size, seq_len - i * block_size)
            for cache in caches:
                cache[block_id, :filled] = rng.normal(size=(filled, G, D))
        block_table = np.concatenate([block_ids, np.full(2, NOWHERE)]).astype(np.int64)
        inputs = {
            "k_cache": caches[0],
            "v_cache": caches[1],
            "block_table": block_table,
            "seq_len": seq_len,
        }
        # Each key and value once, or twice; not the pool.
        request_bytes = 2 * 8 * num_used * block_size * G * D
        limits = {"peak_bytes": 2 * request_bytes + 8 * 4 * seq_len + 4096}
        cases.append(Case(name, inputs, limits))
    return cases


def gather_kv_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    k, ours = got["k"], expected["k"]
    if not isinstance(k, np.ndarray):
        return None
    if k.ndim == ours.ndim and len(k) > len(ours):
        return "The last block may be filled in part: keep seq_len tokens"
    if k.shape != ours.shape:
        return "Blocks and places become one dimension of tokens: (S, G, D)"
    if np.isnan(k).any():
        return "That reads a block, or a place, that is not this request's"
    if np.array_equal(k, ours) and not np.array_equal(got["v"], expected["v"]):
        return "Values come from v_cache, by the same table"
    if np.array_equal(k, ours):
        return "Copy this request's blocks, not the pool"
    return "Blocks in the order of the table: the text's, not the pool's"


def paged_utilization_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, seq_lens, block_size in (
        ("one request, half a block", [2], 4),
        ("a full block", [4], 4),
        ("one token more than a block", [5], 4),
        ("two requests", [1, 5], 4),
        ("blocks of one token", [3, 7], 1),
        ("a request that has not begun", [0, 5], 4),
        ("random lengths", rng.integers(1, 500, size=9).tolist(), 16),
    ):
        inputs = {"seq_lens": np.array(seq_lens), "block_size": block_size}
        cases.append(Case(name, inputs))
    return cases


def paged_utilization_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    seq_lens, size = np.array(inputs["seq_lens"]), inputs["block_size"]
    theirs, used = got["utilization"], seq_lens.sum()
    for blocks, words in (
        ((seq_lens // size + 1).sum(), "A request that fills its blocks needs no other"),
        ((seq_lens // size).sum(), "A block that is filled in part is taken in full"),
        (math.ceil(used / size), "A block belongs to one request: round up for each"),
    ):
        if blocks and theirs == used / (blocks * size):
            return words
    if theirs == used / -(-seq_lens // size).sum():
        return "A block has block_size places"
    if theirs == 1 - expected["utilization"]:
        return "That is the share that holds nothing"
    if theirs == 100 * expected["utilization"]:
        return "A share is between 0 and 1"
    if theirs == np.mean(seq_lens / np.maximum(-(-seq_lens // size) * size, 1)):
        return "All tokens over all places: long requests weigh more"
    return None


def _method(name: str, points: int, cases: Callable) -> Exercise:
    target = f"lib.block_manager.BlockManager.{name}"
    advice = "Count the blocks first, and raise OutOfBlocksError if too few are free"
    errors = {"pop from empty list": advice}
    return Exercise(target, points, cases, script_explain, errors=errors)


EXERCISES = [
    _method("allocate", 2, allocate_cases),
    _method("append", 2, append_cases),
    _method("free", 1, free_cases),
    Exercise(
        "lib.paged_kv_cache.slot_mapping", 2, slot_mapping_cases, slot_mapping_explain
    ),
    Exercise("lib.paged_kv_cache.gather_kv", 2, gather_kv_cases, gather_kv_explain),
    Exercise(
        "lib.paged_kv_cache.paged_utilization",
        1,
        paged_utilization_cases,
        paged_utilization_explain,
    ),
    _method("fork", 2, fork_cases),
    _method("copy_on_write", 3, copy_on_write_cases),
]
