"""Chapter 9: a state of fixed size instead of a cache that grows.

Leave the softmax out of attention, and the sum over all earlier tokens

    out_t = sum over s <= t of (q_t · k_s) v_s = (sum of v_s k_sᵀ) q_t = S_t q_t

needs no keys and values any more, but the matrix S_t alone, D times D numbers per KV
head, whatever the length of the text:

    linear   S_t = γ S_{t-1} + v_t k_tᵀ                     with decay γ, or 1 for none
    delta    S_t = S_{t-1} + (v_t - S_{t-1} k_t) k_tᵀ       writes what is not there yet

Each is here in three forms that compute the same. Step by step: what a cache does.
Parallel: masked attention without a softmax, for training; N² work. In chunks: parallel
within a chunk, a state between chunks; N work, and what a prompt goes through.

As a state-space model, h_t = a h_{t-1} + b x_t, y_t = c h_t: h is S, a is γ, b is k_t, x
is v_t, c is q_t. Linear attention: https://arxiv.org/abs/2006.16236; decay: RetNet,
https://arxiv.org/abs/2307.08621; chunks and the duality: Mamba-2,
https://arxiv.org/abs/2405.21060; delta rule: https://arxiv.org/abs/2102.11174, and in
chunks: https://arxiv.org/abs/2406.06484.

Shapes: q (T, H, D); k, v (T, G, D), where query head h reads KV head h // (H / G); a
state (G, D, D), of which row i makes number i of the output.

Read lib/kv_cache.py before.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
import torch.nn.functional as F

from lib.config import ModelConfig, check_count
from lib.kv_cache import KVCacheByLayer
from lib.model import Attend


def linear_step(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: the state decays, takes the token in, and answers its query.

    state (G, D, D); q (H, D); k, v (G, D); decay (G,), of each KV head, above 0 and at
    most 1. Returns out (H, D) and the new state, in memory of its own.

    >>> state, one = torch.zeros(1, 2, 2), torch.ones(1)
    >>> k, v = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    >>> linear_step(state, k, k, v, one)[0]  # asked for what was told
    tensor([[3., 4.]])
    """
    state = decay[:, None, None] * state + v.unsqueeze(-1) * k.unsqueeze(-2)
    grouped = q.unflatten(0, (len(state), -1))  # (G, H / G, D)
    return torch.einsum("gij,ghj->ghi", state, grouped).flatten(0, 1), state


def delta_step(
    state: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: the state takes in what it does not say of this key yet, and answers.

    state (G, D, D); q (H, D); k, v (G, D), each k of length 1. A key that was told
    before gets its new value instead of the sum of both. Returns out (H, D) and the new
    state.

    >>> state, k = torch.zeros(1, 2, 2), torch.tensor([[1.0, 0.0]])
    >>> _, state = delta_step(state, k, k, torch.tensor([[3.0, 4.0]]))
    >>> delta_step(state, k, k, torch.tensor([[5.0, 6.0]]))[0]
    tensor([[5., 6.]])
    """
    said = torch.einsum("gij,gj->gi", state, k)  # (G, D)
    return linear_step(state, q, k, v - said, k.new_ones(len(state)))


def decay_mask(decay: torch.Tensor, T: int) -> torch.Tensor:
    """What is left at token t of what was written at token s: γ^(t - s), and 0 for what
    comes later. decay (G,) -> (G, T, T).

    >>> decay_mask(torch.tensor([0.5]), 3)
    tensor([[[1.0000, 0.0000, 0.0000],
             [0.5000, 1.0000, 0.0000],
             [0.2500, 0.5000, 1.0000]]])
    """
    t = torch.arange(T, device=decay.device)
    distance = t.unsqueeze(-1) - t  # (T, T)
    # Powers of the distance: γ^t / γ^s would be 0 / 0 where a text is long.
    return (decay[:, None, None] ** distance.clamp(min=0)) * (distance >= 0)


def state_bytes(config: ModelConfig, bytes_per_number: int = 4) -> int:
    """Bytes of the states of all layers and KV heads, for a text of any length.

    A cache of keys and values takes 2 · D numbers per token and KV head, a state D · D:
    as much as D / 2 tokens.

    >>> from lib.config import TINY  # 2 layers, 2 KV heads of head_dim 8
    >>> state_bytes(TINY)  # 2 · 2 · 8 · 8 numbers
    1024
    """
    numbers_per_layer = config.num_kv_heads * config.head_dim**2
    return config.num_layers * numbers_per_layer * bytes_per_number


def linear_parallel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor
) -> torch.Tensor:
    """`linear_step` over a whole text from an empty state, at once: masked attention
    without a softmax.

    q (..., T, H, D); k, v (..., T, G, D); decay (G,). Returns (..., T, H, D). Holds T · T
    scores per head.

    >>> k, v = torch.eye(2).view(2, 1, 2), torch.tensor([3.0, 5.0]).view(2, 1, 1)
    >>> q = torch.ones(2, 1, 2)  # asks for both keys at once
    >>> linear_parallel(q, k, v.expand(-1, -1, 2), torch.ones(1))[:, 0, 0]
    tensor([3., 8.])
    """
    group_size = q.shape[-2] // k.shape[-2]
    mask = decay_mask(decay, q.shape[-3]).repeat_interleave(group_size, dim=0)
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    k, v = (x.repeat_interleave(group_size, dim=-3) for x in (k, v))  # (..., H, T, D)
    scores = q @ k.transpose(-1, -2) * mask  # (..., H, T, T)
    return (scores @ v).transpose(-3, -2)


def delta_parallel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`delta_step` over a whole text from an empty state, at once.

    What token t writes is u_t = v_t - S_{t-1} k_t = v_t - sum over s < t of (k_s · k_t)
    u_s: T equations with a triangular matrix. Solved, the state is the sum of u_t k_tᵀ.
    Shapes and result as of `linear_parallel`; each k of length 1.
    """
    return linear_parallel(q, k, _written(k, v), k.new_ones(k.shape[-2]))


def _written(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What each token writes by the delta rule into an empty state: k, v (..., T, G, D)
    -> (..., T, G, D)."""
    k, v = k.transpose(-3, -2), v.transpose(-3, -2)  # (..., G, T, D)
    overlap = (k @ k.transpose(-1, -2)).tril(-1)  # (..., G, T, T)
    ones = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device)
    u = torch.linalg.solve_triangular(ones + overlap, v, upper=False, unitriangular=True)
    return u.transpose(-3, -2)


def linear_chunked(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear_step` over T tokens, chunk by chunk: parallel within a chunk, and between
    chunks the state. Work grows with T, not T².

    state (G, D, D); q (T, H, D); k, v (T, G, D); decay (G,). T may be 0. Returns out (T,
    H, D) and the state after them. Raises ValueError for a chunk_size below 1.
    """
    check_count("chunk_size", chunk_size)
    outs = [q[:0]]

    for q_c, k_c, v_c in zip(*(x.split(chunk_size) for x in (q, k, v))):
        n = len(q_c)
        age = torch.arange(1, n + 1, device=q.device)
        before = decay ** age.unsqueeze(-1)  # (n, G): what is left of the state then
        after = decay ** (n - age).unsqueeze(-1)  # (n, G): of each token, at the end
        within = linear_parallel(q_c, k_c, v_c, decay)  # (n, H, D)
        grouped = q_c.unflatten(1, (len(decay), -1)) * before[..., None, None]
        across = torch.einsum("gij,tghj->tghi", state, grouped)  # (n, G, H / G, D)
        outs.append(within + across.flatten(1, 2))
        told = torch.einsum("tgi,tgj->gij", v_c * after.unsqueeze(-1), k_c)
        state = (decay**n)[:, None, None] * state + told
    return torch.cat(outs), state


def delta_chunked(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`delta_step` over T tokens, chunk by chunk; arguments and result as of
    `linear_chunked`. Within a chunk, a token writes what neither the state before the
    chunk nor the tokens before it in the chunk say of its key."""
    check_count("chunk_size", chunk_size)
    outs, ones = [q[:0]], k.new_ones(k.shape[1])
    for q_c, k_c, v_c in zip(*(x.split(chunk_size) for x in (q, k, v))):
        said = torch.einsum("gij,tgj->tgi", state, k_c)  # (n, G, D)
        u = _written(k_c, v_c - said)  # (n, G, D)
        out, state = linear_chunked(state, q_c, k_c, u, ones, chunk_size)
        outs.append(out)
    return torch.cat(outs), state


class Memory(abc.ABC):
    """What one layer keeps of a text instead of all its keys and values."""

    @abc.abstractmethod
    def empty(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str
    ) -> tuple[torch.Tensor, ...]:
        """Of a text without tokens."""

    @abc.abstractmethod
    def attend(
        self,
        kept: tuple[torch.Tensor, ...],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """New tokens, q (T, H, D) and k, v (T, G, D): out (T, H, D), and what is kept
        then."""

    @abc.abstractmethod
    def attend_all(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """The same over whole texts, for training: q (..., T, H, D), k, v (..., T, G, D)
        -> (..., T, H, D)."""


@dataclass(frozen=True)
class Linear(Memory):
    """The sum of what was told, which fades by `decay` per token. Keys and queries have
    length 1. What a head answers is divided by the root of the mean of its squares: the
    sum of many values would grow with the text."""

    decay: float = 1.0

    def __post_init__(self):
        is_number = isinstance(self.decay, Real) and not isinstance(self.decay, bool)
        if not is_number or not 0 < self.decay <= 1:
            raise ValueError(
                f"decay: expected a number above 0 and at most 1, got {self.decay!r}"
            )
        # As torch takes it: not a fraction, nor a number of numpy.
        object.__setattr__(self, "decay", float(self.decay))

    def empty(self, config, dtype, device):
        return (_empty_state(config, dtype, device),)

    def attend(self, kept, q, k, v):
        dtype, (q, k, v) = q.dtype, for_state(q, k, v)
        out, state = linear_chunked(*kept, q, k, v, self._decays(k))
        return _normalized(out).to(dtype), (state,)

    def attend_all(self, q, k, v):
        dtype, (q, k, v) = q.dtype, for_state(q, k, v)
        out = linear_parallel(q, k, v, self._decays(k))
        return _normalized(out).to(dtype)

    def _decays(self, k: torch.Tensor) -> torch.Tensor:
        return k.new_full((k.shape[-2],), self.decay)


@dataclass(frozen=True)
class Delta(Memory):
    """The delta rule; keys and queries have length 1."""

    def empty(self, config, dtype, device):
        return (_empty_state(config, dtype, device),)

    def attend(self, kept, q, k, v):
        out, state = delta_chunked(*kept, *for_state(q, k, v))
        return out.to(q.dtype), (state,)

    def attend_all(self, q, k, v):
        return delta_parallel(*for_state(q, k, v)).to(q.dtype)


@dataclass(frozen=True)
class Window(Memory):
    """Softmax attention to the newest `size` tokens, a token itself among them."""

    size: int

    def __post_init__(self):
        object.__setattr__(self, "size", check_count("size", self.size))

    def empty(self, config, dtype, device):
        shape = 0, config.num_kv_heads, config.head_dim
        none = torch.zeros(shape, dtype=dtype, device=device)
        return none, none

    def attend(self, kept, q, k, v):
        k, v = (torch.cat([old, new]) for old, new in zip(kept, (k, v)))
        out = self._attend(q, k, v)
        first = max(len(k) - (self.size - 1), 0)
        return out, (k[first:].clone(), v[first:].clone())  # no view of all of them

    def attend_all(self, q, k, v):
        T, S = q.shape[-3], k.shape[-3]
        assert S == T, f"expected {T} keys, one per query, got {S}"
        return self._attend(q, k, v)

    def _attend(self, q, k, v):
        T, S = q.shape[-3], k.shape[-3]
        t = torch.arange(S - T, S, device=q.device).unsqueeze(-1)  # (T, 1)
        s = torch.arange(S, device=q.device)  # (S,)
        is_seen = (s <= t) & (s > t - self.size)  # (T, S)
        group_size = q.shape[-2] // k.shape[-2]
        k, v = (x.repeat_interleave(group_size, dim=-2) for x in (k, v))
        q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=is_seen)
        return out.transpose(-3, -2)


def _empty_state(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    G, D = config.num_kv_heads, config.head_dim
    # A sum over a whole text: where it is large, 16 bits lose small terms.
    dtype = torch.promote_types(dtype, torch.float32)
    return torch.zeros(G, D, D, dtype=dtype, device=device)


def for_state(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v in the dtype of a state, each vector of q and k with length 1, or 0."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v


def _normalized(out: torch.Tensor) -> torch.Tensor:
    """out (..., D), each vector divided by the root of the mean of its squares."""
    return F.rms_norm(out, out.shape[-1:], eps=1e-5)


def attend_by(memories: Sequence[Memory] | Memory) -> Attend:
    """Attention over whole texts, by a memory for each layer, or one for all: what to
    train a model with that is to write from a `StateCache`.

    ValueError for what is no memory at once, and for a layer without one when it asks.
    """
    if isinstance(memories, Memory):
        return lambda layer, q, k, v: memories.attend_all(q, k, v)
    by_layer = check_memories(memories)

    def attend(layer, q, k, v):
        if layer >= len(by_layer):
            raise ValueError(
                f"memories: expected one for layer {layer}, got {len(by_layer)}"
            )
        return by_layer[layer].attend_all(q, k, v)

    return attend


class StateCache(KVCacheByLayer):
    """Of each of B requests what a `Memory` per layer keeps, however long the text.

    memories: one for each layer, or one for all. Takes back, frees and counts as every
    cache; there is room for any text of the model, whose positions go on. States have 32
    bits per number at least. A step writes what is kept beside what was there: while it
    runs there are two of each. Raises ValueError unless there is a memory for each layer.
    """

    limit = "the model's max_seq_len"

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        memories: Sequence[Memory] | Memory,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        batch_size = check_count("batch_size", batch_size)
        self.config, self.dtype = config, dtype
        self.memories = check_memories(memories, config.num_layers)
        nothing = [memory.empty(config, dtype, device) for memory in self.memories]
        self._make_rows(batch_size, config.max_seq_len, device, nothing)

    def _attend_row(self, layer, kept, seq_len, q, k, v):
        return self.memories[layer].attend(kept, q, k, v)


def check_memories(
    memories: Sequence[Memory] | Memory, num_layers: int | None = None
) -> tuple[Memory, ...]:
    """One memory for each layer, of as many layers as there are where num_layers is not
    given; ValueError where there are more or fewer, or other things."""
    if isinstance(memories, Memory) and num_layers is not None:
        memories = [memories] * num_layers
    is_several = isinstance(memories, Sequence)
    if not is_several or not all(isinstance(memory, Memory) for memory in memories):
        raise ValueError(
            f"memories: expected one for each layer, as [Window(4), Delta()], "
            f"got {memories!r}"
        )
    if num_layers is not None and len(memories) != num_layers:
        raise ValueError(
            f"memories: expected {num_layers}, one for each layer, got {len(memories)}: "
            f"{list(memories)}"
        )
    return tuple(memories)
