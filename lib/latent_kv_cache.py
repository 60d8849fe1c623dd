"""Chapter 7: fewer numbers per token, all KV heads together: low rank.

The keys of a layer, as they occur, lie near a plane of fewer dimensions than they have
numbers. A basis of that plane is found once, and of each key only its coordinates there
are kept, its code. Attention needs no keys for it: instead of turning every code back
into a key, it turns each query into the codes' coordinates, once, and compares it with
codes. All query heads then read the same codes, as in multi-query attention.

It is the cache of multi-head latent attention (DeepSeek-V2,
https://arxiv.org/abs/2405.04434, section 2.1), made after training, of keys that are
rotated already: RoPE must not come between a code and what reads it.

Read lib/kv_cache.py, for `KVFormat`, before.
"""

from collections.abc import Sequence

import torch

from lib import kv_cache, kv_heads
from lib.config import ModelConfig, check_count
from lib.kv_cache import KVFormat
from lib.model import Transformer, attend_fused


def rank_for(singular_values: torch.Tensor, share: float) -> int:
    """The smallest rank that keeps at least this share of a matrix.

    singular_values (W,), largest first. With rank r, the sum of the first r squares is
    kept of the sum of all squares. share: above 0, at most 1; ValueError for another.

    >>> rank_for(torch.tensor([4.0, 2.0, 2.0, 1.0]), share=0.8)  # 16, 20, 24, 25 of 25
    2
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: expected above 0, at most 1, got {share}")

    kept = (singular_values**2).cumsum(dim=0)  # (W,)
    return int((kept < share * kept[-1]).sum()) + 1


def factorize(x: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two thin matrices whose product is nearest to x among all of this rank.

    x (N, W), a vector per token. Returns codes (N, rank) and a basis (rank, W) of rows
    that are orthonormal: codes @ basis is near x, and the code of any vector is its
    product with each row of the basis. Raises ValueError unless 1 <= rank <= min(N, W).

    >>> x = torch.tensor([[3.0, 4.0], [6.0, 8.0]])  # all multiples of (0.6, 0.8)
    >>> codes, basis = factorize(x, rank=1)
    >>> (codes @ basis).round(decimals=4)
    tensor([[3., 4.],
            [6., 8.]])
    """
    if check_count("rank", rank) > min(x.shape):
        raise ValueError(f"rank: expected 1 to {min(x.shape)}, got {rank}")

    basis = torch.linalg.svd(x, full_matrices=False).Vh[:rank]  # (rank, W)
    return x @ basis.T, basis


def attend_latent(
    q: torch.Tensor,
    k_codes: torch.Tensor,
    v_codes: torch.Tensor,
    k_basis: torch.Tensor,
    v_basis: torch.Tensor,
) -> torch.Tensor:
    """Causal attention of one request's newest tokens, over codes, as they are.

    q (T, H, D), of the last T of S tokens; k_codes (S, R), v_codes (S, W); k_basis (R, G,
    D), v_basis (W, G, D): token s has, for KV head g, the key k_codes[s] @ k_basis[:, g].
    But no key or value is ever made: no tensor with a dimension S has more than S · R, S
    · W or S · T · H numbers. Query head h reads KV head h // (H / G). Returns (T, H, D).

    >>> k_codes, v_codes = torch.zeros(2, 1), torch.tensor([[2.0], [4.0]])  # S = 2
    >>> q, basis = torch.ones(1, 1, 2), torch.tensor([[[1.0, 10.0]]])  # H = G = 1, D = 2
    >>> attend_latent(q, k_codes, v_codes, basis, basis)  # equal weights: code 3
    tensor([[[ 3., 30.]]])
    """
    (T, H, D), S, G = q.shape, len(k_codes), k_basis.shape[1]

    # absorb: what each query finds along each direction of the basis
    grouped = (q / D**0.5).view(T, G, H // G, D)
    q_codes = torch.einsum("tgmd,rgd->tgmr", grouped, k_basis)  # (T, G, H/G, R)

    # score: the same codes for all heads
    scores = q_codes.flatten(1, 2) @ k_codes.T  # (T, H, S)

    # the last T of S tokens ask
    queries_at = torch.arange(S - T, S, device=q.device)[:, None, None]  # (T, 1, 1)
    is_future = torch.arange(S, device=q.device) > queries_at  # (T, 1, S)
    weights = scores.masked_fill(is_future, float("-inf")).softmax(dim=-1)  # (T, H, S)

    # sum up codes, then go back: one product per query, not per token
    out_codes = (weights @ v_codes).view(T, G, H // G, -1)  # (T, G, H/G, W)
    out = torch.einsum("tgmw,wgd->tgmd", out_codes, v_basis)  # (T, G, H/G, D)
    return out.flatten(1, 2)  # (T, H, D)


class LatentFormat(KVFormat):
    """A key as R numbers and a value as W, for all KV heads of a layer together:
    coordinates in a basis that the layer has. k_cache (L, ..., 1, R), v_cache (..., W).
    """

    def __init__(self, k_bases: torch.Tensor, v_bases: torch.Tensor):
        """k_bases (L, R, G, D), v_bases (L, W, G, D): of each layer's `factorize`."""
        shapes = [(*basis.shape[:1], *basis.shape[2:]) for basis in (k_bases, v_bases)]
        if k_bases.dim() != 4 or shapes[0] != shapes[1]:  # layers, KV heads, numbers
            raise ValueError(
                f"bases: expected (L, R, G, D) and (L, W, G, D), got "
                f"{tuple(k_bases.shape)} and {tuple(v_bases.shape)}"
            )
        self.k_bases, self.v_bases = k_bases, v_bases

    @property
    def ranks(self) -> tuple[int, int]:
        return self.k_bases.shape[1], self.v_bases.shape[1]

    def check_config(self, config: ModelConfig):
        expected = config.num_layers, config.num_kv_heads, config.head_dim
        got = self.k_bases.shape[0], *self.k_bases.shape[2:]
        if got != expected:
            raise ValueError(
                f"bases of another model: expected {expected[0]} layers, {expected[1]} "
                f"KV heads of {expected[2]} numbers, got {got[0]}, {got[1]} of {got[2]}"
            )

    def empty(
        self,
        config: ModelConfig,
        places: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k_cache, v_cache = (
            torch.zeros(config.num_layers, *places, 1, rank, dtype=dtype, device=device)
            for rank in self.ranks
        )
        return k_cache, v_cache

    def bytes_per_token(self, config: ModelConfig, bytes_per_number: int) -> int:
        return kv_heads.bytes_per_token(config, bytes_per_number, ranks=self.ranks)

    def encode(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k_codes, v_codes = (
            x.flatten(1) @ bases[layer].flatten(1).T.to(x)
            for x, bases in ((k, self.k_bases), (v, self.v_bases))
        )
        return k_codes.unsqueeze(1), v_codes.unsqueeze(1)  # (N, 1, R), (N, 1, W)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        seq_lens: torch.Tensor,
        query_lens: torch.Tensor,
    ) -> torch.Tensor:
        bases = self.k_bases[layer].to(q), self.v_bases[layer].to(q)

        def attend_one(q, k_codes, v_codes):  # codes (S, 1, R) and (S, 1, W)
            return attend_latent(q, k_codes.squeeze(1), v_codes.squeeze(1), *bases)

        codes = k_cache, v_cache
        return kv_cache.attend_each(attend_one, q, *codes, seq_lens, query_lens)


@torch.no_grad()
def record_kv(
    model: Transformer, token_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys, rotated, and the values that occur in texts (B, T): (L, B · T, G, D)
    each. Raises ValueError for token_ids of another shape."""
    if token_ids.dim() != 2:
        raise ValueError(f"token_ids: expected (B, T), got {tuple(token_ids.shape)}")
    seen = {}

    def attend(layer, q, k, v):
        seen[layer] = k.flatten(0, 1), v.flatten(0, 1)
        return attend_fused(layer, q, k, v)

    model(token_ids, torch.arange(token_ids.shape[1], device=token_ids.device), attend)
    keys, values = zip(*(seen[layer] for layer in range(model.config.num_layers)))
    return torch.stack(keys), torch.stack(values)


def latent_format(
    keys: torch.Tensor, values: torch.Tensor, k_rank: int, v_rank: int
) -> LatentFormat:
    """The bases of this rank for keys and values (L, N, G, D) that occurred, layer by
    layer. A rank of G · D keeps them whole. Raises ValueError as `factorize` does."""
    bases = []
    for seen, rank in ((keys, k_rank), (values, v_rank)):
        heads = seen.shape[2:]
        if seen.dtype.itemsize < 4:  # of 16 bits torch finds no singular vectors
            seen = seen.float()
        layers = [factorize(x.flatten(1), rank)[1] for x in seen]  # (rank, G * D) each
        bases.append(torch.stack(layers).unflatten(-1, heads))  # (L, rank, G, D)
    return LatentFormat(*bases)
