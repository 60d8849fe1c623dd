"""Chapter 4: what its exercises are tried on."""

import math
import re
from collections.abc import Callable, Iterator

import numpy as np

from lib.course.cases.ch01 import _reproduced
from lib.course.exercises import Case, Exercise
from lib.course.shipped import reference

NOWHERE = 2147480000  # a block id that stands behind the end of a table: never to be read
IN_BITS = "Any block_size may come: bits count in it only where it is a power of two"


def slot_mapping_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, seq_lens, query_lens, block_size in (
        ("one request, its first token", [1], [1], 4),
        ("the first token of a second block", [5], [1], 4),
        ("the last place of a block", [8], [1], 4),
        ("blocks of one token", [3], [3], 1),
        ("three blocks of three tokens", [9], [9], 3),
        ("a prompt over three blocks", [9], [9], 4),
        ("two requests of different lengths", [3, 7], [1, 1], 4),
        ("a prompt beside a request that goes on", [5, 18], [5, 1], 4),
        ("several new tokens each, over a block's edge", [9, 17, 3], [3, 2, 1], 8),
        ("a request that rests", [2, 6, 11], [1, 0, 2], 4),
        ("two requests, blocks of six tokens", [20, 13], [15, 2], 6),
        ("block ids so large that slots need 64 bits", [3, 40], [3, 1], 16),
        ("random lengths", *_random_lens(rng), 16),
    ):
        block_tables = _block_tables(rng, seq_lens, block_size)
        if "64 bits" in name:
            block_tables[(block_tables > 0) & (block_tables < NOWHERE)] += 1_234_567_890
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
    """Shuffled blocks; rows as wide as the widest needs, and two entries more. Behind a
    request's last block stands NOWHERE, then -1."""
    num_used = [math.ceil(seq_len / block_size) for seq_len in seq_lens]
    # None is a place too, and no two are neighbours.
    block_ids = 100 + 7 * rng.permutation(2 * sum(num_used) + 2)
    block_tables = np.full((len(seq_lens), max(num_used) + 2), -1)
    for row, count in zip(block_tables, num_used):
        row[:count], block_ids = block_ids[:count], block_ids[count:]
        row[count] = NOWHERE
    return block_tables


def slot_mapping_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    ours, theirs = expected["slots"], got["slots"]
    if not isinstance(theirs, np.ndarray) or theirs.shape != ours.shape:
        return "One slot for each new token, request after request"
    size = inputs["block_size"]
    blocks, positions = theirs // size, _positions(inputs, 0 * inputs["seq_lens"])
    is_block, is_place = blocks == ours // size, theirs % size == ours % size
    with np.errstate(all="ignore"):
        in_32_bits = ours.astype(np.int32)
    wrong = {
        "That is the block: its slots begin at block_id * block_size": ours // size,
        "Add the place in the block, position % block_size": ours // size * size,
        "Add position % block_size, not the position": ours + positions // size * size,
        "The new tokens are a request's last ones: seq_lens counts them too": _slots(
            inputs, inputs["seq_lens"] - inputs["query_lens"]
        ),
        "That is one too far: positions and places count from 0": ours + 1,
        "Slots are int64, and so is all that they are computed from": in_32_bits,
    }
    found = {
        words: np.array_equal(theirs, other) and not np.array_equal(other, ours)
        for words, other in wrong.items()
    }
    found[IN_BITS] = any(
        np.array_equal(theirs, other) and not np.array_equal(other, ours)
        for other in _slots_in_bits(inputs)
    )
    if any(found.values()):
        return _reproduced(found)
    if ((blocks == NOWHERE) | (blocks == -1) & is_place).any():
        return "That reads behind the end of a table, where no block stands"
    if is_block.all():
        return "The block is right: the place in it is position % block_size"
    if is_place.all() and size > 1:
        return "The block is the table's entry at position // block_size, in its own row"
    return None


def _positions(inputs: dict, shifts: np.ndarray) -> np.ndarray:
    """Positions in their texts, of tokens so many places before the new ones."""
    ends = inputs["seq_lens"] - shifts
    ranges = [np.arange(end - n, end) for end, n in zip(ends, inputs["query_lens"])]
    return np.concatenate(ranges)


@reference
def _slots(inputs: dict, shifts: np.ndarray) -> np.ndarray:
    """The slots of these."""
    size, positions = inputs["block_size"], _positions(inputs, shifts)
    requests = np.repeat(np.arange(len(shifts)), inputs["query_lens"])
    block_ids = inputs["block_tables"][requests, positions // size]
    return block_ids * size + positions % size


@reference
def _slots_in_bits(inputs: dict) -> Iterator[np.ndarray]:
    """The slots as bits give them, which are right where block_size is a power of two."""
    size, positions = inputs["block_size"], _positions(inputs, 0 * inputs["seq_lens"])
    requests = np.repeat(np.arange(len(inputs["seq_lens"])), inputs["query_lens"])
    bits, last = size.bit_length() - 1, inputs["block_tables"].shape[1] - 1
    for places in (positions % size, positions & size - 1):
        for blocks in (positions // size, positions >> bits):
            block_ids = inputs["block_tables"][requests, np.minimum(blocks, last)]
            for starts in (block_ids * size, block_ids << bits):
                yield starts + places
                yield starts | places


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
        _script("no tokens yet", 4, 2, ("allocate", "a", 0), ("allocate", "a", 1)),
        _script("two requests", 4, 2, ("allocate", "a", 3), ("allocate", "b", 2)),
        _script(
            "the whole pool, and what needs no block",
            *(3, 4),
            *(("allocate", "a", 12), ("allocate", "b", 0)),
        ),
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
        _script("one token more than a large block", 3, 256, ("allocate", "a", 257)),
        _script("many blocks", 40, 2, ("allocate", "a", 61)),
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
            *(("allocate", "a", 3), ("append", "a", 4), ("append", "a", 2)),
            *(("append", "a", 1), ("append", "a", 0), ("append", "a", 1)),
        ),
        _script("an unknown request", 4, 2, ("append", "a", 1)),
        _script("an unknown request, and no tokens", 4, 2, ("append", "a", 0)),
        _script("many tokens", 40, 2, ("allocate", "a", 3), ("append", "a", 61)),
        _script(
            "one token more than a large block",
            *(3, 256, ("allocate", "a", 255), ("append", "a", 2)),
        ),
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
            "nothing to write into a shared last block, and no block is free",
            *(2, 2),
            *(("allocate", "a", 3), ("fork", "a", "b"), ("append", "b", 0)),
        ),
        _script(
            "a shared last block with room, and over its edge",
            *(6, 2),
            *(("allocate", "a", 3), ("fork", "a", "b"), ("append", "b", 2)),
        ),
        _script(
            "a block with three users, and one is free",
            *(3, 2),
            *(("allocate", "a", 3), ("fork", "a", "b"), ("fork", "a", "c")),
            ("append", "b", 1),
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
        _script(
            "no blocks yet",
            *(6, 2),
            *(("allocate", "a", 0), ("fork", "a", "b"), ("fork", "a", "b")),
        ),
        _script("the child goes on", 6, 2, *shared, ("append", "b", 3)),
        _script("the parent goes on", 6, 2, *shared, ("append", "a", 3)),
        _script("three of them", 6, 2, *shared, ("fork", "b", "c"), ("append", "c", 1)),
        _script(
            "the parent ends first", 6, 2, *shared, ("free", "a"), ("append", "b", 1)
        ),
        _script("no free block is needed", 2, 2, *shared),
        _script(
            "blocks that are in another order than in the pool",
            *(6, 2),
            *(("allocate", "a", 2), ("allocate", "b", 2), ("free", "a")),
            *(("append", "b", 2), ("append", "b", 2), ("fork", "b", "c")),
        ),
        _script("an unknown parent", 6, 2, ("allocate", "a", 3), ("fork", "c", "b")),
        _script("a child that ended", 6, 2, *shared, ("free", "b"), ("fork", "a", "b")),
        _script(
            "a live child",
            *(6, 2),
            *(("allocate", "a", 3), ("allocate", "b", 2), ("fork", "a", "b")),
        ),
        _script("itself", 6, 2, ("allocate", "a", 3), ("fork", "a", "a")),
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
        _script(
            "its only user, and no block is free",
            *(2, 2),
            *(("allocate", "a", 3), ("copy_on_write", "a")),
        ),
        _script("an unknown request", 4, 2, *shared, ("copy_on_write", "c")),
        _script("one that ended", 4, 2, *shared, ("free", "b"), ("copy_on_write", "b")),
        _script("no block yet", 4, 2, ("allocate", "a", 0), ("copy_on_write", "a")),
        _script("the other has ended", 2, 2, *shared, ("free", "a"), ("append", "b")),
        _random_script(seed),
    ]


def _first_wrong(expected: dict, got: dict) -> tuple[str, dict, dict, dict]:
    """The call, and what is expected before it, expected after it, and got."""
    before = {"tables": "none"}
    for call in expected:
        if got[call] != expected[call]:
            return call, before, expected[call], got[call]
        before = expected[call]
    raise LookupError("expected a difference, found none")


def script_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    call, before, ours, theirs = _first_wrong(expected, got)
    method, caller = re.search(r"(\w+)\('(\w+)'", call).groups()
    if "Error" in ours["gave"]:
        return _about_refusals(ours, theirs)
    if theirs["gave"] == "ValueError":
        return None
    if "Error" in theirs["gave"]:
        return "There were enough free blocks for that"
    if method == "fork" and theirs["free_blocks"] < ours["free_blocks"]:
        return "A fork takes no block from the free list"
    if theirs["gave"].endswith("does not have in its place)"):
        return "The table's last entry is still the source: put the target there"
    if theirs["gave"].startswith("(the one in its place"):
        return "The source comes first, then the target"
    if ours["gave"] == "None" and theirs["gave"].startswith("(its old"):
        return (
            "There is nothing to copy: nobody else uses it, or nothing is written into it"
        )
    if theirs["tables"] != ours["tables"]:
        names = re.findall(r"'(\w+)'", call)
        return _about_tables(method, names, before, ours, theirs, inputs["block_size"])
    if theirs["tokens"] != ours["tokens"]:
        is_default = call.endswith(f"append('{caller}'):")
        default = "Where no number is given it is one token"
        words = "seq_lens has the tokens of each live request"
        are_others = sorted(theirs["tokens"]) != sorted(ours["tokens"])
        return default if is_default else words if are_others else None
    if theirs["ref_counts"] != ours["ref_counts"]:
        return "ref_count says in how many tables a block stands"
    if theirs["free_blocks"] < ours["free_blocks"]:
        return "A block that no table has is free"
    if theirs["free_blocks"] > ours["free_blocks"]:
        return "A block that some table has is not free"
    if theirs["gave"] != ours["gave"]:
        return "Return (source, target) where a block was copied, else None"
    return None


def _about_refusals(ours: dict, theirs: dict) -> str:
    if theirs["gave"] == ours["gave"]:
        return (
            "It was refused, but something had changed before: check first, then change"
        )
    if ours["gave"] == "ValueError":
        return "Raise ValueError here: the given lines do, keep them"
    if theirs["gave"].startswith("OutOfBlocksError"):
        needed = (re.search(r"needed=(\d+)", x["gave"])[1] for x in (ours, theirs))
        if len({*needed}) > 1:
            return "needed is the number of blocks that this call takes, all of them"
        return "free is the number of blocks that are free before any is taken"
    return "Fewer blocks are free than it needs: raise OutOfBlocksError(needed, free)"


def _about_tables(
    method: str,
    names: list[str],
    before: dict,
    ours: dict,
    theirs: dict,
    block_size: int,
) -> str | None:
    """names: the request that the call is about, and of a fork the child."""
    caller, child = names[0], names[-1]
    old, wanted, got = (_blocks(state["tables"]) for state in (before, ours, theirs))
    if method == "free":
        is_there = "A request that has ended has no table"
        return is_there if caller in got else "The other requests keep their tables"
    differs = [r for r in wanted if len(wanted[r]) != len(got.get(r, []))]
    if method == "fork":
        others, of_parent = got.get(child, []), got.get(caller, [])
        in_order = "The child's table names the parent's blocks in the same order"
        is_turned = others != of_parent and sorted(others) == sorted(of_parent)
        return in_order if is_turned else None
    if caller not in got:
        return None
    if any(r != caller and r in got and got[r] == got[caller] for r in differs):
        return "A table belongs to one request: the child's is a copy of the list"
    surplus = len(got[caller]) - len(wanted[caller])
    is_copied = ours["gave"].startswith("(its old")
    if differs == [caller] and surplus > 0:
        if method == "copy_on_write":
            return "The new block takes the place of the table's last entry"
        if is_copied and surplus == 1:
            return "needed counts the copy too: grow until the table is long enough"
        return "A block is taken when the others are full, not before"
    if differs == [caller] and surplus < 0:
        tokens = dict(row.split(": ") for row in ours["tokens"].split(", "))
        is_cut = len(got[caller]) == int(tokens[caller]) // block_size
        words = "Tokens without a place: the table has too few blocks"
        cut = "Tokens without a place: the last block may be filled in part"
        return cut if is_cut else words
    place = len(old.get(caller, [])) - 1
    others = {block for r in got if r != caller for block in got[r]}
    if is_copied and not differs and got[caller][place] in others:
        if theirs["gave"] == "None":
            return (
                "Others use the last block too: a free one takes its place in this table"
            )
        if theirs["gave"] == ours["gave"]:
            return "The others keep the old block: change this request's table alone"
    return None


def _blocks(tables: str) -> dict[str, list[str]]:
    """Of each request: "a: 0 1, b: 2" -> {"a": ["0", "1"], "b": ["2"]}."""
    rows = (row.split(": ") for row in tables.split(", ") if row != "none")
    return {name: re.findall(r"\d+", blocks) for name, blocks in rows}


def gather_kv_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, seq_len, block_size, num_blocks, (G, D) in (
        ("one token", 1, 2, 3, (1, 1)),
        ("a full block", 2, 2, 3, (1, 1)),
        ("two blocks, the second half full", 3, 2, 4, (1, 2)),
        ("blocks of one token", 5, 1, 9, (2, 2)),
        ("three blocks of three tokens", 9, 3, 6, (1, 2)),
        ("a pool that is full of others' numbers", 5, 6, 3, (1, 2)),
        ("one block that is larger than the text", 5, 256, 2, (2, 2)),
        ("no tokens", 0, 2, 3, (1, 2)),
        ("a request in a large pool", 90, 16, 100, (2, 8)),
        ("a table much wider than the text", 20, 8, 12, (2, 4)),
        ("single precision", 3, 2, 4, (1, 2)),
        ("a random length", int(rng.integers(20, 70)), 8, 12, (2, 4)),
    ):
        garbage = 9.0 if "numbers" in name else np.nan
        caches = [np.full((num_blocks, block_size, G, D), garbage) for _ in "kv"]
        num_used = math.ceil(seq_len / block_size)
        block_ids = 1 + rng.permutation(num_blocks - 1)[:num_used]
        block_ids[1:2] = 0  # so that the order of the pool is another one
        for i, block_id in enumerate(block_ids):
            filled = min(block_size, seq_len - i * block_size)
            for cache in caches:
                cache[block_id, :filled] = rng.normal(size=(filled, G, D))
        # Behind the last block: ids of no block, and of blocks that are others'.
        behind = [NOWHERE, -1, *range(num_blocks)][: 2 if "wider" not in name else None]
        behind *= 9 if "wider" in name else 1
        block_table = np.concatenate([block_ids, behind]).astype(np.int64)
        dtype = np.float32 if name == "single precision" else np.float64
        inputs = {
            "k_cache": caches[0].astype(dtype),
            "v_cache": caches[1].astype(dtype),
            "block_table": block_table,
            "seq_len": seq_len,
        }
        # Each key and value once, or twice; not the pool.
        request_bytes = 2 * 8 * num_used * block_size * G * D
        limits = {"peak_bytes": 2 * request_bytes + 8 * 4 * seq_len + 4096}
        cases.append(Case(name, inputs, limits))
    return cases


def gather_kv_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    k, v, ours = got["k"], got["v"], expected["k"]
    if not isinstance(k, np.ndarray) or not isinstance(v, np.ndarray):
        return None
    k_cache, block_table = inputs["k_cache"], inputs["block_table"]
    size, seq_len = k_cache.shape[1], inputs["seq_len"]
    used = block_table[: math.ceil(seq_len / size)]
    if len(used) and _is_same(k, k_cache[used]):
        return "Blocks and places become one dimension of tokens: (S, G, D)"
    whole = k_cache[used].reshape(-1, *ours.shape[1:])
    if seq_len % size and _is_same(k, whole):
        return "The last block may be filled in part: keep seq_len tokens"
    if k.shape != ours.shape:
        return None
    if any(
        not np.array_equal(other, ours) and _is_same(k, other)
        for other in _gathered_in_bits(inputs)
    ):
        return IN_BITS
    if np.isnan(k).any():
        return "That reads a block, or a place, that is not this request's"
    if np.array_equal(k, ours):
        if not np.array_equal(v, expected["v"]):
            words = "Values come from v_cache, by the same table"
            return words if np.array_equal(v, ours) else None
        if got["shares_memory_with_the_pool"]:
            return "That is a view, which changes with the pool: copy the blocks"
        num_copied = got["peak_bytes"] // k_cache[0].nbytes  # blocks of one cache
        if len(k_cache) < len(block_table) <= num_copied:
            return "Read the table up to this request's last block, and no further"
        if num_copied >= len(k_cache):
            return "Copy this request's blocks, not the pool"
        return None
    tokens = [min(size, seq_len - i * size) for i in range(len(used))]
    in_the_pools_order = [k_cache[used[i], : tokens[i]] for i in np.argsort(used)]
    if np.array_equal(k, np.concatenate(in_the_pools_order)):
        return "Blocks in the order of the table: the text's, not the pool's"
    return None


@reference
def _gathered_in_bits(inputs: dict) -> Iterator[np.ndarray]:
    """The keys at slots whose place bits give."""
    k_cache, p = inputs["k_cache"], np.arange(inputs["seq_len"])
    size = k_cache.shape[1]
    starts, keys = (
        inputs["block_table"][p // size] * size,
        k_cache.reshape(-1, *k_cache.shape[2:]),
    )
    for slots in (starts | p % size, starts + (p & size - 1), starts | (p & size - 1)):
        yield keys[slots]


def _is_same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and np.array_equal(one, other, equal_nan=True)


def paged_utilization_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    cases = []
    for name, seq_lens, block_size in (
        ("one request, half a block", [2], 4),
        ("one token more than a block", [5], 4),
        ("a full block", [4], 4),
        ("one request, a third of a block", [3], 9),
        ("two requests", [1, 5], 4),
        ("blocks of one token", [5, 7], 1),
        ("a request that has not begun", [0, 5], 4),
        ("two requests of one length, beside another", [2, 2, 6], 4),
        ("random lengths", rng.integers(1, 500, size=9).tolist(), 16),
    ):
        inputs = {"seq_lens": np.array(seq_lens), "block_size": block_size}
        cases.append(Case(name, inputs))
    return cases


@reference
def _other_shares(seq_lens: np.ndarray, size: int, ours: float) -> dict[str, list[float]]:
    """What comes of each slip."""
    used = seq_lens.sum()
    num_blocks = -(-seq_lens // size)
    begun, once = num_blocks > 0, np.unique(seq_lens)
    shares = seq_lens[begun] / (num_blocks[begun] * size)
    return {
        "A request that fills its blocks needs no other": [
            used / ((seq_lens // size + 1).sum() * size)
        ]
        * bool((seq_lens[begun] % size == 0).any()),
        "A block that is filled in part is taken in full": [
            used / (max((seq_lens // size).sum(), 1) * size)
        ],
        "A block belongs to one request: round up for each": [
            used / (math.ceil(used / size) * size)
        ],
        "A request that has not begun has no block": [
            used / (np.maximum(num_blocks, 1).sum() * size)
        ],
        "A block has block_size places": [used / num_blocks.sum()],
        "That is the share that holds nothing": [1 - ours] * (ours < 1),
        "A share is between 0 and 1": [100 * ours],
        "A request that is as long as another counts too": [
            once.sum() / ((-(-once // size)).sum() * size),
            once.sum() / (num_blocks.sum() * size),
        ],
        "All tokens over all places: long requests weigh more": [
            shares.mean(),
            shares.sum() / len(seq_lens),
        ],
        "Requests differ in length: not all have as many blocks as the longest": [
            used / (num_blocks.max() * len(seq_lens) * size)
        ],
    }


def paged_utilization_explain(inputs: dict, expected: dict, got: dict) -> str | None:
    seq_lens, size = np.array(inputs["seq_lens"]), inputs["block_size"]
    ours, theirs = expected["utilization"], got["utilization"]
    if isinstance(theirs, str):
        return None
    if isinstance(theirs, int) and theirs == int(ours):
        return "A share is a fraction: // and int() cut it off"
    wrong = _other_shares(seq_lens, size, ours)
    return _reproduced(
        {
            words: any(math.isclose(theirs, other, rel_tol=1e-6) for other in others)
            and not math.isclose(theirs, ours, rel_tol=1e-6)
            for words, others in wrong.items()
        }
    )


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
