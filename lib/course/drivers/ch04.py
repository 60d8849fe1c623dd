"""Chapter 4: run an answer, give plain data.

The methods of BlockManager are tried by scripts: a list of calls on a new manager that
has the answer in the method's place. After each call the state is written down, with
blocks numbered in the order in which the tables name them: which one is taken is free.
"""

from collections.abc import Callable

import numpy as np
import torch

from lib.block_manager import BlockManager, OutOfBlocksError
from lib.course.drivers.ch01 import as_array, as_number
from lib.measure.meter import measure

CHECK_INTEGRITY = BlockManager.check_integrity  # whatever an answer makes of it


def slot_mapping(
    answer: Callable,
    block_tables: np.ndarray,
    seq_lens: np.ndarray,
    query_lens: np.ndarray,
    block_size: int,
) -> dict:
    lens = [torch.from_numpy(x) for x in (seq_lens, query_lens)]
    return {"slots": as_array(answer(torch.from_numpy(block_tables), *lens, block_size))}


def allocate(answer: Callable, **script) -> dict:
    return _run_script("allocate", answer, **script)


def append(answer: Callable, **script) -> dict:
    return _run_script("append", answer, **script)


def free(answer: Callable, **script) -> dict:
    return _run_script("free", answer, **script)


def fork(answer: Callable, **script) -> dict:
    return _run_script("fork", answer, **script)


def copy_on_write(answer: Callable, **script) -> dict:
    return _run_script("copy_on_write", answer, **script)


def gather_kv(
    answer: Callable,
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    block_table: np.ndarray,
    seq_len: int,
) -> dict:
    tensors = k_pool, v_pool, _ = [
        torch.from_numpy(x) for x in (k_cache, v_cache, block_table)
    ]
    cost = measure(lambda: answer(*tensors, seq_len))
    if not isinstance(cost.value, (tuple, list)) or len(cost.value) != 2:
        return {"k": f"a {type(cost.value).__name__}, not the two tensors k and v"}
    k, v = cost.value
    return {
        "k": as_array(k),
        "v": as_array(v),
        "shares_memory_with_the_pool": any(
            isinstance(x, torch.Tensor) and x.numel() > 0 and _is_of(x, pool)
            for x in (k, v)
            for pool in (k_pool, v_pool)
        ),
        "peak_bytes": cost.peak_bytes,
    }


def _is_of(tensor: torch.Tensor, pool: torch.Tensor) -> bool:
    """Whether it lies in the pool, as a view of torch's or of numpy's."""
    begin = pool.untyped_storage().data_ptr()
    return begin <= tensor.data_ptr() < begin + pool.untyped_storage().nbytes()


def paged_utilization(answer: Callable, seq_lens: np.ndarray, block_size: int) -> dict:
    share = answer(torch.from_numpy(seq_lens), block_size)
    return {"utilization": as_number(share)}


class Counted(list):
    """A list whose entries are known by their index: what looks through it raises."""

    advice = "ref_count is looked up by block id: never search it, copy it or sort it"

    def _refuse(self, *args, **kwargs):
        raise TypeError(self.advice)

    append = extend = insert = pop = remove = index = count = sort = reverse = _refuse
    copy = clear = __contains__ = __iter__ = __reversed__ = __delitem__ = _refuse
    __add__ = __iadd__ = __mul__ = __imul__ = _refuse

    def __getitem__(self, index):
        return self._refuse() if isinstance(index, slice) else super().__getitem__(index)

    def __setitem__(self, index, value):
        if isinstance(index, slice):
            self._refuse()
        super().__setitem__(index, value)


class Stack(list):
    """A list of which only the end is used: what takes longer the longer it is raises."""

    def _refuse(self, *args, **kwargs):
        raise TypeError(
            "the free list is a stack: take from its end, put back there, never search it"
        )

    insert = remove = index = count = sort = reverse = __contains__ = _refuse
    copy = clear = __iter__ = __add__ = __mul__ = __imul__ = _refuse

    def pop(self, *args):
        is_last = args in ((), (-1,), (len(self) - 1,))
        return super().pop() if is_last else self._refuse()

    def _check_end(self, index):
        """Refuse what is not the end, and what is all of it, whatever it holds."""
        places = range(len(self))[index]
        if isinstance(places, int):
            return
        is_all = index.start is None and index.stop is None
        if is_all or len(places) and max(places) != len(self) - 1:
            self._refuse()

    def __getitem__(self, index):
        self._check_end(index)
        return super().__getitem__(index)

    def __setitem__(self, index, value):
        self._check_end(index)
        super().__setitem__(index, value)

    def __delitem__(self, index):
        self._check_end(index)
        if isinstance(index, int) and index not in (-1, len(self) - 1):
            self._refuse()
        super().__delitem__(index)


class Tables(dict):
    """A dict whose entries are known by their key: what looks through it raises."""

    def _refuse(self, *args, **kwargs):
        raise TypeError(
            "block_tables is looked up by request: never go through all requests"
        )

    values = items = copy = __reversed__ = __or__ = __ror__ = _refuse

    def __iter__(self):
        yield self._refuse()  # at the first step: for `**` no iterator is another error

    def keys(self):
        return self  # `in` and len() are the same


def _run_script(
    name: str, answer: Callable, num_blocks: int, block_size: int, calls: list[list]
) -> dict:
    methods = {"check_live": _check_live, "copy_on_write": _copy_on_write, name: answer}
    manager = type("BlockManager", (BlockManager,), methods)(num_blocks, block_size)
    manager.free_block_ids = Stack(manager.free_block_ids)
    manager.ref_count = Counted(manager.ref_count)
    manager.block_tables = Tables(manager.block_tables)
    out = {}
    for number, (method, *args) in enumerate(calls, start=1):
        request_id = args[-1] if method == "fork" else args[0]
        before = list(manager.block_tables.get(request_id, []))
        try:
            gave = getattr(manager, method)(*args)
        except OutOfBlocksError as error:
            gave = f"OutOfBlocksError(needed={error.needed}, free={error.free})"
        except ValueError:
            gave = "ValueError"
        else:
            table = manager.block_tables.get(request_id, [])
            returns = method in ("append", "copy_on_write")
            gave = _describe(gave, before, table) if returns else "done"
        words = f"after {number}. {method}({', '.join(map(repr, args))}):"
        out[words] = {"gave": gave, **_state(manager)}
    return out


def _check_live(self: BlockManager, request_id: str):
    """The library's, whose message alone goes through all requests."""
    if request_id not in self.block_tables:
        raise ValueError(f"request {request_id!r}: expected a live one")


def _copy_on_write(self: BlockManager, request_id: str) -> tuple[int, int] | None:
    """The library's. Where that is not written yet `append` can be tried all the same, as
    long as no block has two users: then there is nothing to copy.
    """
    try:
        return BlockManager.copy_on_write(self, request_id)
    except NotImplementedError:
        if max(_plain(self.ref_count)) > 1:
            raise
        return None


def _describe(gave, before: list, block_table: list) -> str:
    """What append or copy_on_write returned, without block ids."""
    if not isinstance(gave, (tuple, list)):
        return "None" if gave is None else f"a {type(gave).__name__}"
    if not all(type(block_id) is int for block_id in gave):
        return "what are no block ids"
    if len(gave) != 2:
        return f"a {type(gave).__name__} of {len(gave)}, not of two blocks"
    last = len(before) - 1
    if last >= 0 and list(gave) == [before[last], block_table[last]]:
        return "(its old last block, the one in its place)"
    if last >= 0 and list(gave) == [block_table[last], before[last]]:
        return "(the one in its place, its old last block)"
    if last >= 0 and gave[0] == before[last] == block_table[-1]:
        return "(its old last block, one that its table does not have in its place)"
    return "two blocks that are not (its old last block, the one in its place)"


def _state(manager: BlockManager) -> dict:
    number = {}  # by block id
    tables, ref_counts = [], []
    block_tables = manager.block_tables
    for request_id, block_table in dict.items(block_tables):
        for block_id in block_table:
            if block_id not in number:
                number[block_id] = len(number)
                ref_counts.append(manager.ref_count[block_id])
        blocks = " ".join(str(number[block_id]) for block_id in block_table)
        tables.append(f"{request_id}: {blocks or 'no blocks'}")
    free_block_ids, ref_count = manager.free_block_ids, manager.ref_count
    manager.free_block_ids, manager.ref_count = map(_plain, (free_block_ids, ref_count))
    manager.block_tables = dict(dict.items(block_tables))
    try:
        CHECK_INTEGRITY(manager)
        integrity = "ok"
    except AssertionError as error:
        integrity = str(error)
    manager.free_block_ids, manager.ref_count = free_block_ids, ref_count
    manager.block_tables = block_tables
    kinds = {type(table) for table in dict.values(block_tables)} - {list}
    if kinds:
        integrity = f"a block table that is a {kinds.pop().__name__}, not a list"
    elif not isinstance(free_block_ids, Stack):
        integrity = "another free list in the place of the old one"
    elif not isinstance(ref_count, Counted):
        integrity = "another ref_count in the place of the old one"
    elif not isinstance(block_tables, Tables):
        integrity = "another block_tables in the place of the old one"
    return {
        "tables": ", ".join(tables) or "none",
        "tokens": ", ".join(f"{r}: {n}" for r, n in manager.seq_lens.items()) or "none",
        "ref_counts": ref_counts,
        "free_blocks": len(manager.free_block_ids),
        "integrity": integrity,
    }


def _plain(numbers: list) -> list:
    """A list that can be looked through."""
    return [list.__getitem__(numbers, i) for i in range(len(numbers))]
