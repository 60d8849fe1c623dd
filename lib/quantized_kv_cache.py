"""Chapter 7: fewer bits per number.

A key or a value is D numbers between its smallest and its largest. Of each only which of
2^bits equal steps it is nearest to is kept, in 8, 4 or 2 bits; beside them, once per
vector, the size of a step and the smallest number. Chapters 3 and 4 keep where a token
lies, and need not change: a vector becomes a row of bytes, and these are written,
gathered, shared and copied as numbers were.

To attend, a decode step reads the bytes tile by tile: of a text of any length, keys and
values are there in full for two tiles at most, the one that was read and the next.

KIVI: https://arxiv.org/abs/2402.02750. Read lib/kv_cache.py, for `KVFormat`, and
`attend_online` in lib/paged_attention.py before.
"""

from collections.abc import Iterator, Sequence

import torch

from lib import kv_cache, kv_heads, paged_attention
from lib.config import ModelConfig
from lib.kv_cache import KVFormat

BITS = 8, 4, 2  # that can be packed into bytes
TILE = 128  # tokens that a decode step turns back into numbers at a time


def quantize(
    x: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors with `bits` bits per number, each with a scale and a zero point of its own.

    x (..., D). The zero point is the vector's smallest number, the scale a step such that
    2^bits - 1 steps lead to its largest, and a code counts the steps to the nearest. 8 /
    bits neighbours share a byte, the first of them in its lowest bits. Returns codes,
    uint8 (..., D · bits / 8), and scale and zero (..., 1) in x's dtype. A vector of equal
    numbers has scale 0 and codes 0. Raises ValueError for bits that are not 8, 4 or 2, a
    D that does not fill whole bytes, and a vector whose range is not a finite number.

    >>> codes, scale, zero = quantize(torch.tensor([1.0, 1.5, 8.0, 8.5]), bits=4)
    >>> scale, zero  # the codes are 0, 1, 14, 15
    (tensor([0.5000]), tensor([1.]))
    >>> codes  # 0 + 16 · 1 and 14 + 16 · 15
    tensor([ 16, 254], dtype=torch.uint8)
    """
    check_vectors(x, bits)

    # how many steps of which size
    low, high = x.aminmax(dim=-1, keepdim=True)  # (..., 1)
    scale = (high - low) / (2**bits - 1)  # (..., 1)
    steps = (x - low) / scale.masked_fill(scale == 0, 1)  # (..., D)

    # pack
    shifts = torch.arange(0, 8, bits, device=x.device)  # (8 / bits,)
    steps = steps.round().clamp(max=2**bits - 1)  # more, if the scale was rounded down
    in_bytes = steps.to(torch.uint8).unflatten(-1, (-1, 8 // bits))
    codes = (in_bytes << shifts).sum(dim=-1, dtype=torch.uint8)  # (..., D * bits / 8)
    return codes, scale, low


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> torch.Tensor:
    """The vectors that `quantize` has made codes of, each number off by half a step at
    most: (..., D), in the dtype of scale and zero.

    >>> codes = torch.tensor([16, 254], dtype=torch.uint8)
    >>> dequantize(codes, torch.tensor([0.5]), torch.tensor([1.0]), bits=4)
    tensor([1.0000, 1.5000, 8.0000, 8.5000])
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    numbers = (codes.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return numbers.flatten(-2) * scale + zero  # (..., D)


class QuantizedFormat(KVFormat):
    """A key in k_bits bits per number and a value in v_bits, as a row of bytes each:
    codes, scale, zero point. k_cache (L, ..., G, D · k_bits / 8 + 2 numbers), uint8."""

    def __init__(self, k_bits: int, v_bits: int | None = None):
        """v_bits: as k_bits if None. Raises ValueError for others than 8, 4 and 2."""
        self.bits = k_bits, k_bits if v_bits is None else v_bits
        for bits in self.bits:
            check_bits(bits)

    def check_config(self, config: ModelConfig):
        for bits in self.bits:
            check_bits(bits, config.head_dim)

    def empty(
        self,
        config: ModelConfig,
        places: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        heads = config.num_layers, *places, config.num_kv_heads
        widths = [config.head_dim * bits // 8 + 2 * dtype.itemsize for bits in self.bits]
        k_cache, v_cache = (
            torch.zeros(*heads, width, dtype=torch.uint8, device=device)
            for width in widths
        )
        return k_cache, v_cache

    def bytes_per_token(self, config: ModelConfig, bytes_per_number: int) -> int:
        return kv_heads.bytes_per_token(config, bytes_per_number, bits=self.bits)

    def encode(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k_rows, v_rows = (to_rows(x, b) for x, b in zip((k, v), self.bits))
        return k_rows, v_rows  # uint8 (N, G, bytes) each

    def holds_numbers(
        self, k_cache: torch.Tensor, v_cache: torch.Tensor, dtype: torch.dtype
    ) -> bool:
        k, v = (from_rows(x, b, dtype) for x, b in zip((k_cache, v_cache), self.bits))
        return bool(k.isfinite().all() and v.isfinite().all())

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        seq_lens: torch.Tensor,
        query_lens: torch.Tensor,
    ) -> torch.Tensor:
        """A request with one new token reads tile by tile, one with more as a whole."""

        def attend_one(q, k_rows, v_rows):
            T, S, D = len(q), len(k_rows), q.shape[-1]
            if T == 1:
                tiles = self._tiles(k_rows, v_rows, q.dtype, TILE)
                out, _ = paged_attention.attend_online(q[0] / D**0.5, tiles)
                return out[None]  # (1, H, D)
            k, v = next(self._tiles(k_rows, v_rows, q.dtype, S))
            lens = torch.tensor([S]), torch.tensor([T])
            return kv_cache.attend_cached(q, k[None], v[None], *lens)

        rows = k_cache, v_cache
        return kv_cache.attend_each(attend_one, q, *rows, seq_lens, query_lens)

    def _tiles(
        self,
        k_rows: torch.Tensor,
        v_rows: torch.Tensor,
        dtype: torch.dtype,
        tile: int,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values (tile, G, D), one tile after the other; the last is shorter."""
        for start in range(0, len(k_rows), tile):
            k, v = (
                from_rows(rows[start : start + tile], bits, dtype)
                for rows, bits in zip((k_rows, v_rows), self.bits)
            )
            yield k, v


def to_rows(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x (..., D), quantized, with scale and zero point behind: uint8 (..., bytes).

    A vector that `quantize` refuses comes back as NaN: in a cache it spoils its own
    request, and no other.
    """
    is_refused = ~has_finite_range(x)  # (..., 1)
    codes, scale, zero = quantize(x.masked_fill(is_refused, 0), bits)
    scale = scale.masked_fill(is_refused, torch.nan)
    scale_and_zero = torch.cat([scale, zero], dim=-1)  # (..., 2)
    return torch.cat([codes, scale_and_zero.view(torch.uint8)], dim=-1)


def from_rows(rows: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """What `to_rows` made rows of, for x in this dtype: (..., D)."""
    num_codes = rows.shape[-1] - 2 * dtype.itemsize
    # A copy of their own: where a row's codes end need not be a place for such numbers.
    in_bytes = rows[..., num_codes:].clone(memory_format=torch.contiguous_format)
    scale_and_zero = in_bytes.view(dtype)  # (..., 2)
    return dequantize(rows[..., :num_codes], *scale_and_zero.split(1, dim=-1), bits)


def check_vectors(x: torch.Tensor, bits: int):
    """Raise ValueError unless `quantize` can take these: looks at every number."""
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"vectors to quantize: expected floats (..., D), got {x.dtype} "
            f"{tuple(x.shape)}"
        )
    check_bits(bits, x.shape[-1])
    is_refused = ~has_finite_range(x).squeeze(-1)  # (...,)
    if is_refused.any():
        low, high = x[is_refused][0].aminmax()
        raise ValueError(
            f"vectors to quantize: expected a finite range in each, got {x.shape[-1]} "
            f"numbers from {low} to {high}"
        )


def has_finite_range(x: torch.Tensor) -> torch.Tensor:
    """Of vectors (..., D), whether the difference of any two numbers is finite: bool
    (..., 1)."""
    low, high = x.aminmax(dim=-1, keepdim=True)  # (..., 1)
    return (high - low).isfinite()


def check_bits(bits: int, head_dim: int = 8):
    """Raise ValueError unless vectors of head_dim numbers can be packed in such bits."""
    if type(bits) is not int or bits not in BITS:  # 8.0 is in it
        raise ValueError(f"bits: expected one of {BITS}, got {bits!r}")
    if head_dim * bits % 8:
        raise ValueError(
            f"vectors of {head_dim} numbers: expected a multiple of {8 // bits}, so that "
            f"{bits} bits of each fill whole bytes"
        )
