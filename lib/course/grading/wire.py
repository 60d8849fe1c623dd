"""Plain data over a pipe: numbers, strings, None, lists, dicts, numpy arrays.

A message is a length, a JSON text with a note for each array, and the arrays' bytes.
Nothing that arrives is executed, unpickled, or larger than it may be.
"""

import json
import struct
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

MAX_BYTES = 32 * 2**20  # of a message
MAX_DEPTH = 20
MAX_ITEMS = 200_000  # lists, dicts and what is in them; each takes 50 bytes or more here
MAX_EMPTY = 100_000  # of a dimension of an array that holds no number: it has no bytes
DTYPES = ("bool", "int32", "int64", "uint8", "float16", "float32", "float64")
ARRAY = "__array__"


class WireError(Exception):
    """A message that is none, or that is too large."""


def encode(value: Any) -> bytes:
    """The message for `value`; WireError for what is no plain data, or too large."""
    arrays: list[bytes] = []

    def plain(value: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise WireError(f"expected at most {MAX_DEPTH} levels, got more")
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, np.floating):  # a float64 passes for a float in a notebook
            return float(value)
        if type(value) in (list, tuple):
            return [plain(item, depth + 1) for item in value]
        if type(value) is dict and all(type(key) is str for key in value):
            if ARRAY in value:
                raise WireError(f"expected no key {ARRAY}, got one")
            return {key: plain(item, depth + 1) for key, item in value.items()}
        if type(value) is np.ndarray and str(value.dtype) in DTYPES:
            _check_shape(value.shape)
            arrays.append(np.ascontiguousarray(value).tobytes())
            order = {"strides": list(value.strides)} if value.size else {}
            return {ARRAY: [str(value.dtype), list(value.shape)], **order}
        raise WireError(f"expected plain data, got a {type(value).__name__}")

    try:
        text = json.dumps(plain(value, 0)).encode()
    except (ValueError, RecursionError) as error:
        raise WireError(f"expected plain data, got {error}") from None
    _check_items(text)
    message = struct.pack("<Q", len(text)) + text + b"".join(arrays)
    _check_size(len(message))
    return message


def decode(message: bytes) -> Any:
    """The value of a message; WireError for what `encode` would not have made."""
    try:
        (text_len,) = struct.unpack_from("<Q", message)
        rest = memoryview(message)[8 + text_len :]
        text = message[8 : 8 + text_len]
        _check_items(text)
        tree = json.loads(text)
        value, used = _build(tree, rest, 0, 0)
    except (struct.error, ValueError, TypeError, KeyError, RecursionError) as error:
        raise WireError(f"expected a message, got {type(error).__name__}") from None
    if used != len(rest):
        raise WireError(f"expected {used} bytes of arrays, got {len(rest)}")
    return value


def _build(tree: Any, data: memoryview, used: int, depth: int) -> tuple[Any, int]:
    if depth > MAX_DEPTH:
        raise WireError(f"expected at most {MAX_DEPTH} levels, got more")
    if isinstance(tree, list):
        items = []
        for item in tree:
            built, used = _build(item, data, used, depth + 1)
            items.append(built)
        return items, used
    if isinstance(tree, dict) and ARRAY in tree:
        dtype, shape = tree[ARRAY]
        if dtype not in DTYPES or not all(type(n) is int and n >= 0 for n in shape):
            raise WireError("expected an array, got another dtype or shape")
        _check_shape(shape)
        num_bytes = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
        array = np.frombuffer(data[used : used + num_bytes], dtype).reshape(shape).copy()
        return _with_strides(array, tree.get("strides")), used + num_bytes
    if isinstance(tree, dict):
        items = {}
        for key, item in tree.items():
            items[key], used = _build(item, data, used, depth + 1)
        return items, used
    return tree, used


def _with_strides(array: np.ndarray, strides: list[int] | None) -> np.ndarray:
    """The same numbers, laid out in the same order of dimensions as they were sent."""
    if not strides or list(array.strides) == strides or len(strides) != array.ndim:
        return array
    order = np.argsort([-abs(stride) for stride in strides], kind="stable")
    laid_out = np.ascontiguousarray(array.transpose(order))
    return laid_out.transpose(np.argsort(order))


def framed(message: bytes) -> bytes:
    """As `read` and `take_messages` expect it."""
    return struct.pack("<Q", len(message)) + message


def write(pipe: BinaryIO, message: bytes):
    pipe.write(framed(message))
    pipe.flush()


def read(pipe: BinaryIO) -> bytes:
    """The next message's bytes; EOFError where the other side has gone."""
    header = pipe.read(8)
    if len(header) < 8:
        raise EOFError("the other side has gone")
    (num_bytes,) = struct.unpack("<Q", header)
    _check_size(num_bytes)
    message = pipe.read(num_bytes)
    if len(message) < num_bytes:
        raise EOFError("the other side has gone in the middle of a message")
    return message


def take_messages(data: bytearray) -> Iterator[Any]:
    """The values of the messages that are complete in `data`, which are taken out of it;
    WireError for what `write` would not have written."""
    while len(data) >= 8:
        (num_bytes,) = struct.unpack_from("<Q", data)
        _check_size(num_bytes)
        if len(data) < 8 + num_bytes:
            return
        message = bytes(data[8 : 8 + num_bytes])
        del data[: 8 + num_bytes]
        yield decode(message)


def _check_items(text: bytes):
    """Of a message's text, before what it says is made: a list takes 30 times as much
    memory as its two brackets."""
    text = text.replace(b"\\\\", b"").replace(b'\\"', b"")  # other quotes end a string
    num_items = text.count(b'"') // 4  # of a dict's item both may be strings
    if num_items <= MAX_ITEMS:
        outside = b"".join(text.split(b'"')[::2])
        num_items = sum(map(outside.count, (b"[", b"{", b",")))
    if num_items > MAX_ITEMS:
        raise WireError(f"expected at most {MAX_ITEMS:,} items, got more")


def _check_shape(shape: Iterable[int]):
    if 0 in shape and max(shape) > MAX_EMPTY:
        most = f"{MAX_EMPTY:,} in a dimension of an array without numbers"
        raise WireError(f"expected at most {most}, got {max(shape):,}")


def _check_size(num_bytes: int):
    if num_bytes > MAX_BYTES:
        raise WireError(f"expected at most {MAX_BYTES:,} bytes, got {num_bytes:,}")
