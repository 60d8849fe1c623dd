"""Chapter 3: keep keys and values instead of computing them again.

A token's key and value depend on it and on what came before, never on what comes after.
So each is computed once, written into a cache, and read at every later step: this
replaces `generate_recompute`'s pass over the whole text by one over the new tokens.

A step may bring any number of new tokens for each request of a batch: all of a prompt
(prefill), one (decode), or none. They come flat, request after request, N in all, so that
nothing is padded. Invariant: after a step, request b has its `seq_lens[b]` keys at
`k_cache[:, b, :seq_lens[b]]`, and what lies behind them never changes a result.

Read lib/model.py, for the seam `attend`, and lib/generate.py before.
"""

import abc
import contextlib
import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lib.config import ModelConfig, check_count
from lib.model import Attend


class CacheFullError(Exception):
    """A request would outgrow what was reserved for it, or there is no row for it."""


class KVCache(abc.ABC):
    """The keys and values of some requests, and what every cache promises about them.

    Requests come with `begin` and go with `free`; between them, `extend` takes steps:

        with cache.extend(query_lens) as attend:
            logits = model(token_ids, positions, attend)

    Row b of `seq_lens`, `query_lens` and a step's tokens is that of `request_ids[b]`.

    Two promises. What no step has written never changes a result: calls that would lead
    attention there raise. And a step counts when its `with` block ends, or not at all: an
    error inside it, or the interrupt of a notebook, leaves the cache as it was. The same
    holds for `begin`, `fork` and `free`: wherever they are stopped, a request is there
    with all that it has, or nothing of it is.

    A kind of cache says how by `_begin_row`, `_free_row`, `_open_step` and `_take_back`,
    and how it hands out memory by `block_size`, `num_blocks` and what counts blocks.
    """

    config: ModelConfig  # of the model whose keys and values it takes
    dtype: torch.dtype  # of these keys and values
    block_size: int  # tokens that are reserved together
    num_blocks: int  # of so many tokens, for all requests
    capacity: int  # tokens that one request can have
    can_fork = False  # whether it has `fork`
    k_cache: torch.Tensor | None = None  # the keys of all requests, where it has a pool
    request_ids: list[Hashable | None]  # by row; None where no request has begun
    reserved_bytes: int  # that nobody else can use
    used_bytes: int  # of them, those that hold a token
    _seq_lens: torch.Tensor
    _open: object | None = None  # the step under way

    @property
    def seq_lens(self) -> torch.Tensor:
        """int64 (B,), the tokens that each request has in the cache: a copy."""
        return self._seq_lens.clone()

    @property
    def device(self) -> torch.device:
        """Of keys, values and `seq_lens`."""
        return self._seq_lens.device

    def __copy__(self) -> "KVCache":
        """As `copy.deepcopy`: two caches that share their tensors would write to both."""
        return copy.deepcopy(self)

    def begin(self, request_id: Hashable, token_ids: Sequence[int] = ()):
        """A new request, without tokens, in a row of its own.

        token_ids: its text, as far as it is known, for a cache that finds beginnings of
        texts again (lib/prefix_cache.py). Raises ValueError if it has begun already, or
        what says that there is no row.
        """
        self._check_ready("begin")
        self._check_new(request_id)
        try:
            self._begin_row(request_id, token_ids)
        except BaseException:
            self._drop(request_id)
            raise

    def free(self, request_id: Hashable):
        """The request is over: what it held is free.

        Raises ValueError for one that never began, or was freed before. Where anything
        else stops it on the way, the request is over all the same.
        """
        self._check_ready("free")
        row = self._row(request_id)
        try:
            self._free_row(row)
        except BaseException:
            self._drop(request_id)
            raise

    def find(self, token_ids: Sequence[int]) -> tuple[int, int]:
        """Of a text: how many of its tokens are there already, for whoever begins with
        it, and how many blocks of these some request has."""
        return 0, 0

    @property
    @abc.abstractmethod
    def num_free_blocks(self) -> int:
        """That a request could get."""

    @abc.abstractmethod
    def num_blocks_of(self, request_id: Hashable) -> int:
        """Blocks that a request has for itself, to read and to write on."""

    @abc.abstractmethod
    def blocks_needed(self, num_new_tokens: Mapping[Hashable, int]) -> int:
        """Free blocks that a step over so many tokens of each request takes, exactly."""

    @abc.abstractmethod
    def check_room(self, query_lens: torch.Tensor):
        """Raise unless query_lens[b] more tokens of each request fit."""

    @contextlib.contextmanager
    def extend(self, query_lens: torch.Tensor) -> Iterator[Attend]:
        """A step over the next tokens: query_lens[b] of request b, int64 (B,).

        Gives the `attend` that writes and reads them: q (N, H, D) and k, v (N, G, D),
        N = query_lens.sum(). No gradient goes through it. Raises as check_room does,
        before anything changes.
        """
        self._check_ready("extend")
        self.check_room(query_lens)
        before, marks = self._seq_lens, self._mark()
        query_lens = query_lens.clone()  # whatever the caller does with it meanwhile
        num_tokens = int(query_lens.sum())
        kv_shape = num_tokens, self.config.num_kv_heads, self.config.head_dim
        step, layers = object(), set()

        def attend(layer, q, k, v):
            if self._open is not step:
                raise RuntimeError(
                    "attend: expected inside of its own step, got after it"
                )
            check_new_kv(q, k, v, kv_shape, self.dtype)
            with torch.no_grad():  # what is kept would keep its graph
                out = attend_rows(layer, q, k, v)
            layers.add(layer)
            return out

        try:
            self._open = step
            attend_rows = self._open_step(query_lens)
            yield attend
            if layers != set(range(self.config.num_layers)):
                raise RuntimeError(
                    f"extend: expected attention in layers 0 to "
                    f"{self.config.num_layers - 1}, got {sorted(layers)}"
                )
            # In one line: an interrupt comes before it or after it.
            self._seq_lens, self._open = before + query_lens, None
        except BaseException:
            self._take_back(marks)
            self._open = None
            raise

    def _check_ready(self, method: str):
        if self._open is not None:
            raise RuntimeError(
                f"{method}: expected between two steps, got inside of one (or after one "
                f"that could not be taken back: then make a new cache)"
            )
        is_inference = self.k_cache is not None and self.k_cache.is_inference()
        if is_inference and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{method}: expected under torch.inference_mode(), in which this cache "
                f"was made, got outside of it"
            )

    def _check_new(self, request_id: Hashable):
        if request_id is None or request_id in self.request_ids:
            raise ValueError(
                f"request {request_id!r}: expected one that is not None and not live "
                f"({self._live()})"
            )

    def _row(self, request_id: Hashable) -> int:
        if request_id not in self._live():
            raise ValueError(
                f"request {request_id!r}: expected one of {self._live()}, "
                f"got one that has not begun or was freed"
            )
        return self.request_ids.index(request_id)

    def _live(self) -> list[Hashable]:
        return [r for r in self.request_ids if r is not None]

    @abc.abstractmethod
    def _begin_row(self, request_id: Hashable, token_ids: Sequence[int]):
        """Give it a row."""

    @abc.abstractmethod
    def _free_row(self, row: int):
        """Take it back, with what it held. `_drop` calls it again where it was stopped,
        if the request is still in a row."""

    def _drop(self, request_id: Hashable):
        """Leave nothing of it, wherever `begin`, `fork` or `free` was stopped."""
        if request_id in self.request_ids:
            self._free_row(self._row(request_id))

    def _mark(self) -> Any:
        """What `_take_back` has to know of the time before a step."""
        return None

    @abc.abstractmethod
    def _open_step(self, query_lens: torch.Tensor) -> Attend:
        """Make room for the new tokens; attention that writes and reads them."""

    @abc.abstractmethod
    def _take_back(self, marks: Any):
        """Undo `_open_step`, however far it came; seq_lens are those from before."""


def kv_cache_bytes(
    config: ModelConfig, num_tokens: int, bytes_per_number: int = 4
) -> int:
    """Bytes of the keys and values of `num_tokens` tokens, in all layers.

    >>> from lib.config import TINY  # 2 layers, 2 KV heads of head_dim 8
    >>> kv_cache_bytes(TINY, num_tokens=3)  # per token 2 · 2 · 2 vectors of 8
    768
    """
    numbers_per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return num_tokens * numbers_per_token * bytes_per_number


def new_positions(seq_lens: torch.Tensor, query_lens: torch.Tensor) -> torch.Tensor:
    """The positions of a step's new tokens, each counted in its own request.

    seq_lens: tokens of each request after the step, query_lens: the new ones among them;
    both int64 (B,). Returns (N,).

    >>> new_positions(torch.tensor([3, 5]), torch.tensor([3, 1]))
    tensor([0, 1, 2, 4])
    """
    first_rows = query_lens.cumsum(0) - query_lens  # (B,)
    shifts = (seq_lens - query_lens - first_rows).repeat_interleave(query_lens)  # (N,)
    return shifts + torch.arange(len(shifts), device=shifts.device)  # (N,)


def append_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lens: torch.Tensor,
    query_lens: torch.Tensor,
):
    """Write the keys and values of a step's new tokens into one layer's cache, in place.

    k_cache, v_cache (B, S, G, D); k, v (N, G, D), request after request. seq_lens: tokens
    of each request after the step, query_lens: the new ones; both int64 (B,). Request b's
    new tokens go to its last query_lens[b] places: from seq_lens[b] - query_lens[b] on.

    >>> k_cache, v_cache = torch.zeros(2, 4, 1, 1), torch.zeros(2, 4, 1, 1)
    >>> k = torch.tensor([7.0, 8.0, 9.0]).view(3, 1, 1)  # one for request 0, two for 1
    >>> append_kv(k_cache, v_cache, k, k, torch.tensor([3, 2]), torch.tensor([1, 2]))
    >>> k_cache.view(2, 4)
    tensor([[0., 0., 7., 0.],
            [8., 9., 0., 0.]])
    """
    B = len(seq_lens)
    requests = torch.arange(B, device=k.device).repeat_interleave(query_lens)  # (N,)
    positions = new_positions(seq_lens, query_lens)  # (N,)
    assert len(k) == len(positions), f"expected {len(positions)} keys, got {len(k)}"
    k_cache[requests, positions] = k
    v_cache[requests, positions] = v


def attend_cached(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seq_lens: torch.Tensor,
    query_lens: torch.Tensor,
) -> torch.Tensor:
    """Causal attention of a step's new queries over all keys of their own request.

    q (N, H, D), request after request; k_cache, v_cache (B, S, G, D), the new tokens
    written already; seq_lens, query_lens int64 (B,), as in `append_kv`. Query head h
    reads KV head h // (H / G), where it is stored: no copies. Returns (N, H, D).

    >>> k_cache, v_cache = torch.zeros(1, 4, 1, 1), torch.zeros(1, 4, 1, 1)
    >>> v_cache[0, :3, 0, 0] = torch.tensor([3.0, 6.0, 9.0])  # equal keys: equal weights
    >>> q = torch.ones(2, 1, 1)  # queries at positions 1 and 2
    >>> attend_cached(q, k_cache, v_cache, torch.tensor([3]), torch.tensor([2])).flatten()
    tensor([4.5000, 6.0000])
    """
    H, D = q.shape[1:]
    G = k_cache.shape[-2]
    out = torch.empty_like(q)
    assert (query_lens <= seq_lens).all(), (
        f"expected at most {seq_lens.tolist()} queries, one per key, "
        f"got {query_lens.tolist()}"
    )

    start = 0
    for b, (S, T) in enumerate(zip(seq_lens.tolist(), query_lens.tolist())):
        if T == 0:  # it rests
            continue
        q_b = q[start : start + T]  # (T, H, D)
        k, v = (cache[b, :S].transpose(0, 1) for cache in (k_cache, v_cache))  # (G, S, D)

        # Heads that read the same keys: their queries are the rows of one matrix.
        grouped = (q_b / D**0.5).view(T, G, H // G, D).permute(1, 2, 0, 3)
        scores = grouped.flatten(1, 2) @ k.transpose(1, 2)  # (G, H/G*T, S)
        scores = scores.unflatten(1, (H // G, T))  # (G, H/G, T, S)
        if T > 1:  # the newest token sees them all
            queries_at = torch.arange(S - T, S, device=q.device).unsqueeze(-1)  # (T, 1)
            is_future = torch.arange(S, device=q.device) > queries_at  # (T, S)
            scores = scores.masked_fill(is_future, float("-inf"))
        weights = scores.softmax(dim=-1)  # (G, H/G, T, S)
        out_b = weights.flatten(1, 2) @ v  # (G, H/G*T, D)
        out_b = out_b.unflatten(1, (H // G, T)).permute(2, 0, 1, 3)  # (T, G, H/G, D)
        out[start : start + T] = out_b.flatten(1, 2)

        start += T
    return out  # (N, H, D)


def attend_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attend_cached` for one new token of each request: one masked call, no loop.

    q (B, H, D); k, v (B, S, G, D); mask bool (B, 1, 1, S), as `decode_mask` makes it, or
    None where every place holds a key. What the mask hides must be numbers all the same:
    0 · NaN is NaN. Each request costs what S costs. Returns (B, H, D).
    """
    B, H, D = q.shape
    # Heads that read the same keys are the rows of one matrix, as in `attend_cached`: so
    # torch reads each key once for all of them.
    out = F.scaled_dot_product_attention(
        q.view(B, k.shape[2], -1, D),  # (B, G, H / G, D)
        k.transpose(1, 2),  # (B, G, S, D)
        v.transpose(1, 2),
        attn_mask=mask,
    )
    return out.reshape(B, H, D)


def decode_mask(seq_lens: torch.Tensor, S: int) -> torch.Tensor:
    """Which of S places hold a key of each request, for `attend_decode`: (B, 1, 1, S).

    >>> decode_mask(torch.tensor([1, 3]), 4).view(2, 4).int()
    tensor([[1, 0, 0, 0],
            [1, 1, 1, 0]], dtype=torch.int32)
    """
    places = torch.arange(S, device=seq_lens.device)  # (S,)
    return (places < seq_lens.unsqueeze(-1))[:, None, None]  # (B, 1, 1, S)


@dataclass(frozen=True)
class Decodes:
    """Those requests of a step that bring one token: they can share one call."""

    rows: torch.Tensor | slice  # int64, which requests, or all
    is_theirs: torch.Tensor | None  # bool (N,), which tokens; None for all
    other_lens: torch.Tensor  # query_lens of the others, 0 where these are

    def attend(self, q: torch.Tensor, decode: Callable, others: Callable) -> torch.Tensor:
        """q (N, H, D): theirs through `decode`, the rest through `others`. Returns
        (N, H, D)."""
        if self.is_theirs is None:
            return decode(q)
        out = torch.empty_like(q)
        out[self.is_theirs] = decode(q[self.is_theirs])
        out[~self.is_theirs] = others(q[~self.is_theirs])
        return out


def split_decodes(query_lens: torch.Tensor) -> Decodes | None:
    """Of a step's query_lens, int64 (B,), the requests with one new token; None where
    there is none.

    >>> split_decodes(torch.tensor([1, 3, 0, 1])).is_theirs.int()
    tensor([1, 0, 0, 0, 1], dtype=torch.int32)
    """
    is_decode = query_lens == 1  # (B,)
    other_lens = query_lens.masked_fill(is_decode, 0)
    if not is_decode.any():
        return None
    rows = slice(None) if is_decode.all() else is_decode.nonzero().squeeze(-1)
    is_theirs = is_decode.repeat_interleave(query_lens)
    return Decodes(rows, None if is_theirs.all() else is_theirs, other_lens)


def kv_utilization(seq_lens: torch.Tensor, max_seq_len: int) -> float:
    """The share of a contiguous cache that holds a token, at this instant.

    seq_lens: int64 (B,), the tokens of each request, with max_seq_len reserved for each.

    >>> kv_utilization(torch.tensor([1, 3]), max_seq_len=8)  # 4 of 16
    0.25
    """
    return seq_lens.sum().item() / (len(seq_lens) * max_seq_len)


def attend_each(
    attend: Callable,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seq_lens: torch.Tensor,
    query_lens: torch.Tensor,
) -> torch.Tensor:
    """Attention by `attend`, one request after the other: (N, H, D).

    attend: of q (T, H, D) and what is in k_cache and v_cache (S, ...) of a request with
    new tokens. The rest as in `attend_cached`.
    """
    outs, counts = [q[:0]], query_lens.tolist()
    for b, (q_b, S) in enumerate(zip(q.split(counts), seq_lens.tolist())):
        if len(q_b) > 0:  # else it rests
            outs.append(attend(q_b, k_cache[b, :S], v_cache[b, :S]))
    return torch.cat(outs)  # (N, H, D)


class KVFormat:
    """What keys and values become in memory: they stay as they are.

    A cache says where a token's key and value lie, a format what lies there. Every cache
    takes any format; lib/quantized_kv_cache.py and lib/latent_kv_cache.py have smaller
    ones.
    """

    def check_config(self, config: ModelConfig):
        """Raise ValueError unless it is for such a model."""

    def empty(
        self,
        config: ModelConfig,
        places: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """k_cache and v_cache for so many tokens, all zeros: (L, *places, G, D) each, or
        with other last two dimensions. dtype: of keys and values as the model has them.
        """
        shape = config.num_layers, *places, config.num_kv_heads, config.head_dim
        k_cache, v_cache = (
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)
        )
        return k_cache, v_cache

    def bytes_per_token(self, config: ModelConfig, bytes_per_number: int) -> int:
        """Of a token's keys and values in all layers, as they lie in memory."""
        return kv_cache_bytes(config, 1, bytes_per_number)

    def encode(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v (N, G, D) -> what is written into k_cache and v_cache for them."""
        return k, v

    def holds_numbers(
        self, k_cache: torch.Tensor, v_cache: torch.Tensor, dtype: torch.dtype
    ) -> bool:
        """Whether all that was written, in k and v of this dtype, were finite numbers.

        k_cache, v_cache: any part of them whose last two dimensions are whole.
        """
        return bool(k_cache.isfinite().all() and v_cache.isfinite().all())

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        seq_lens: torch.Tensor,
        query_lens: torch.Tensor,
    ) -> torch.Tensor:
        """`attend_cached` over what was written: k_cache, v_cache (B, S, ...)."""
        return attend_cached(q, k_cache, v_cache, seq_lens, query_lens)


def check_format(format: KVFormat, config: ModelConfig, **fast_paths: object):
    """Raise ValueError unless it is a format for this model. fast_paths: by name, what
    reads keys and values as the plain format keeps them, and may not be there for others.
    """
    if not isinstance(format, KVFormat):
        raise ValueError(f"format: expected a KVFormat, got {type(format).__name__}")
    format.check_config(config)
    for name, wanted in fast_paths.items():
        if wanted and type(format) is not KVFormat:
            raise ValueError(
                f"{name}: expected it with keys and values as they are, "
                f"got it with {type(format).__name__}"
            )


PLAIN = KVFormat()


class KVCacheInRows(KVCache):
    """A cache with B rows: who begins has one for itself, and is the only one there.

    A row keeps its place when others become free. It is one block of `block_size` tokens,
    the most that a request can have.
    """

    limit: str  # why a request can have no more, for an error

    def _make_rows(self, batch_size: int, max_seq_len: int, device: torch.device | str):
        self.block_size, self.num_blocks = max_seq_len, batch_size
        self.request_ids = [None] * batch_size
        self._seq_lens = torch.zeros(batch_size, dtype=torch.int64, device=device)

    @property
    def capacity(self) -> int:
        return self.block_size

    @property
    def num_free_blocks(self) -> int:
        return self.request_ids.count(None)

    def num_blocks_of(self, request_id: Hashable) -> int:
        self._row(request_id)
        return 1

    def blocks_needed(self, num_new_tokens: Mapping[Hashable, int]) -> int:
        return 0

    def check_room(self, query_lens: torch.Tensor):
        """CacheFullError names the first request that query_lens more would overfill.

        ValueError for tokens of a row in which no request has begun.
        """
        check_query_lens(query_lens, self.seq_lens)
        # As ints of Python: a sum of int64 may overflow.
        lens = zip(self._seq_lens.tolist(), query_lens.tolist())
        needed = [seq_len + count for seq_len, count in lens]
        for row, (request_id, count) in enumerate(zip(self.request_ids, needed)):
            if request_id is None and count > 0:
                raise ValueError(
                    f"query_lens: expected 0 in row {row}, where no request has begun, "
                    f"got {count}"
                )
            if count > self.capacity:
                raise CacheFullError(
                    f"request {request_id!r}: expected at most {self.capacity} tokens, "
                    f"{self.limit}, got {count}"
                )

    def _begin_row(self, request_id: Hashable, token_ids: Sequence[int]):
        if None not in self.request_ids:
            raise CacheFullError(
                f"request {request_id!r}: expected a free row, got none: "
                f"{self.request_ids} are there"
            )
        row = self.request_ids.index(None)
        self._empty_row(row)
        self.request_ids[row] = request_id

    def _free_row(self, row: int):
        self._seq_lens = self._seq_lens.clone()  # the caller may hold the old one
        self._seq_lens[row] = 0
        self.request_ids[row] = None

    @abc.abstractmethod
    def _empty_row(self, row: int):
        """Leave nothing of whoever had it."""


class KVCacheByLayer(KVCacheInRows):
    """Rows of which each layer keeps some tensors of its own, made anew at each step.

    They are made beside those that were there, so a step can be taken back: while it runs
    there are two of each. A kind of cache says what a layer keeps of no tokens, in
    `_make_rows`, and what becomes of it, by `_attend_row`.
    """

    _nothing: tuple[tuple[torch.Tensor, ...], ...]  # by layer, of a text without tokens
    _kept: list[tuple[tuple[torch.Tensor, ...], ...]]  # by row and layer

    def _make_rows(
        self,
        batch_size: int,
        max_seq_len: int,
        device: torch.device | str,
        nothing: Sequence[tuple[torch.Tensor, ...]],
    ):
        super()._make_rows(batch_size, max_seq_len, device)
        self._nothing = tuple(nothing)
        self._kept = [self._nothing] * batch_size

    @abc.abstractmethod
    def _attend_row(
        self,
        layer: int,
        kept: tuple[torch.Tensor, ...],
        seq_len: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Attention of a request's new tokens, q (T, H, D) and k, v (T, G, D), behind
        seq_len others: out (T, H, D), and what the layer keeps then."""

    @property
    def reserved_bytes(self) -> int:
        return self.used_bytes

    @property
    def used_bytes(self) -> int:
        rows = zip(self.request_ids, self._kept)
        live = [row for request_id, row in rows if request_id is not None]
        return sum(x.nbytes for row in live for layer in row for x in layer)

    def _free_row(self, row: int):
        self._empty_row(row)
        super()._free_row(row)

    def _empty_row(self, row: int):
        self._kept[row] = self._nothing

    def _mark(self) -> list[tuple[tuple[torch.Tensor, ...], ...]]:
        return list(self._kept)

    def _open_step(self, query_lens: torch.Tensor) -> Attend:
        counts, seq_lens = query_lens.tolist(), self._seq_lens.tolist()
        before = list(self._kept)  # a layer that is run again begins there again

        def attend(layer, q, k, v):
            outs = [q[:0]]
            for row, new in enumerate(zip(*(x.split(counts) for x in (q, k, v)))):
                if counts[row] == 0:  # it rests
                    continue
                out, layer_kept = self._attend_row(
                    layer, before[row][layer], seq_lens[row], *new
                )
                kept = self._kept[row]
                self._kept[row] = (*kept[:layer], layer_kept, *kept[layer + 1 :])
                outs.append(out)
            return torch.cat(outs)  # (N, H, D)

        return attend

    def _take_back(self, marks: list[tuple[tuple[torch.Tensor, ...], ...]]):
        self._kept = marks


class ContiguousKVCache(KVCacheInRows):
    """Room for `max_seq_len` tokens of each of B requests, reserved at once.

    k_cache, v_cache (L, B, S, G, D), S = max_seq_len. B = batch_size rows, without
    requests at first.

    fused_decode: whether all requests that bring one token in a step share one masked
    call of torch's fused attention, `attend_decode`; else `attend_cached` is a loop over
    them. format: what keys and values become in memory.
    """

    limit = "as many as were reserved"

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_seq_len: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        fused_decode: bool = False,
        format: KVFormat = PLAIN,
    ):
        batch_size = check_count("batch_size", batch_size)
        max_seq_len = check_count("max_seq_len", max_seq_len)
        check_format(format, config, fused_decode=fused_decode)
        self.config, self.dtype, self.format = config, dtype, format
        self.fused_decode = fused_decode
        self._make_rows(batch_size, max_seq_len, device)
        places = batch_size, max_seq_len
        self.k_cache, self.v_cache = format.empty(config, places, dtype, device)

    @property
    def reserved_bytes(self) -> int:
        return self.k_cache.nbytes + self.v_cache.nbytes

    @property
    def used_bytes(self) -> int:
        bytes_per_token = self.format.bytes_per_token(self.config, self.dtype.itemsize)
        return int(self.seq_lens.sum()) * bytes_per_token

    def _open_step(self, query_lens: torch.Tensor) -> Attend:
        # The places are there already, and behind the tokens that count.
        seq_lens = self.seq_lens + query_lens
        step = split_decodes(query_lens) if self.fused_decode else None
        if step is not None:
            longest = int(seq_lens[step.rows].max())
            mask = decode_mask(seq_lens[step.rows], longest)

        def attend(layer, q, k, v):
            layer_kv = self.k_cache[layer], self.v_cache[layer]
            append_kv(*layer_kv, *self.format.encode(layer, k, v), seq_lens, query_lens)
            if step is None:
                return self.format.attend(layer, q, *layer_kv, seq_lens, query_lens)
            return step.attend(
                q,
                lambda q: attend_decode(
                    q, *(x[step.rows, :longest] for x in layer_kv), mask
                ),
                lambda q: attend_cached(q, *layer_kv, seq_lens, step.other_lens),
            )

        return attend

    def _take_back(self, marks: None):
        for row, seq_len in enumerate(self.seq_lens.tolist()):
            self._clear(row, seq_len)

    def _empty_row(self, row: int):
        self._clear(row, 0)

    def _clear(self, row: int, start: int):
        """Zeros from `start` on: what a mask hides must be a number all the same."""
        for cache in (self.k_cache, self.v_cache):
            cache[:, row, start:] = 0


def check_new_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_shape: tuple[int, int, int],
    dtype: torch.dtype,
):
    """Raise ValueError unless there is a query, key and value for each new token, in the
    dtype of the cache: a row of bytes would be read as other numbers."""
    shapes = [tuple(x.shape) for x in (q, k, v)]
    if shapes != [(kv_shape[0], *q.shape[1:]), kv_shape, kv_shape]:
        raise ValueError(
            f"attend: expected q of {kv_shape[0]} tokens, as many as the step has, and "
            f"k, v {kv_shape}, got {shapes}"
        )
    dtypes = [x.dtype for x in (q, k, v)]
    if dtypes != [dtype] * 3:
        raise ValueError(f"attend: expected q, k, v in {dtype}, got {dtypes}")


def check_query_lens(query_lens: torch.Tensor, seq_lens: torch.Tensor):
    """Raise ValueError unless there is one count of new tokens for each request."""
    if not isinstance(query_lens, torch.Tensor):
        raise ValueError(
            f"query_lens: expected an int64 tensor ({len(seq_lens)},), "
            f"got a {type(query_lens).__name__}"
        )
    if query_lens.dtype != torch.int64 or query_lens.shape != seq_lens.shape:
        raise ValueError(
            f"query_lens: expected int64 ({len(seq_lens)},), one entry per request, "
            f"got {query_lens.dtype} {tuple(query_lens.shape)}"
        )
    if query_lens.device != seq_lens.device:
        raise ValueError(
            f"query_lens: expected on {seq_lens.device}, as the cache, "
            f"got on {query_lens.device}"
        )
    if (query_lens < 0).any():
        raise ValueError(f"query_lens: expected at least 0, got {query_lens.tolist()}")
