"""Chapter 1: the model, a Llama-style decoder with one seam.

The model computes queries, keys and values, and hands them to `attend(layer, q, k, v)
-> out`, which the caller passes in. Where keys and values live, and how attention reads
them, is decided there and nowhere else: chapters 3 to 5 bring new kinds of `attend`, and
this file is never edited again.

    q (..., T, H, D)    k, v (..., T, G, D)    out (..., T, H, D)

Leading dimensions are free: (B, T) for a batch, (N,) for a flat ragged one.

RMSNorm: https://arxiv.org/abs/1910.07467. RoPE: https://arxiv.org/abs/2104.09864.
SwiGLU: https://arxiv.org/abs/2002.05202. Grouped-query attention:
https://arxiv.org/abs/2305.13245. Together, as in Llama 3: https://arxiv.org/abs/2407.21783.
"""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from lib.config import ModelConfig, RopeScaling
from lib.text import DATA

WEIGHTS = DATA / "moby_dick.pt"

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Transformer(nn.Module):
    """`embed`, then `blocks`, then `unembed`.

    A call of `embed` is what the course counts as a forward call.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(
            Block(config, layer) for layer in range(config.num_layers)
        )
        self.unembed = nn.Sequential(
            nn.RMSNorm(config.d_model, eps=config.norm_eps),
            nn.Linear(config.d_model, config.vocab_size, bias=False),
        )
        if config.tied_embeddings:
            self.unembed[1].weight = self.embed.weight
        self._init_weights()

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Logits for the token after each token.

        token_ids: int64 (..., T). positions: int64, each token's place in its own
        sequence; (..., T), or (T,) for all alike. Returns (..., T, V). Raises
        ValueError when the shapes differ and, on a CPU, when an id is not in the
        vocabulary or a position is past max_seq_len: on a GPU looking would mean waiting.
        """
        check_token_ids(token_ids, positions, self.config)
        x = self.embed(token_ids)  # (..., T, C)
        for block in self.blocks:
            x = block(x, positions, attend)
        return self.unembed(x)  # (..., T, V)

    def _init_weights(self):
        # Normal(0, 0.02) as in GPT-2; the two matrices that write into the residual
        # stream are smaller, so that the stream's variance does not grow with the
        # number of layers.
        residual_std = 0.02 / (2 * self.config.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=residual_std if is_residual else 0.02)


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """x (..., T, C), positions (..., T) -> (..., T, C)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), positions, attend))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Attention(nn.Module):
    """The projections around `attend`. Has no idea where keys and values are kept."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.rope_theta, self.rope_scaling = config.rope_theta, config.rope_scaling
        q_width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.d_model, q_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_width, config.d_model, bias=False)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
            for _ in "qk"
        )

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (..., T, H, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (..., T, G, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (..., T, G, D)
        q, k = self.place(q, k, positions)
        out = attend(self.layer, q, k, v)  # (..., T, H, D)
        assert out.shape == q.shape, (
            f"attend: expected out {tuple(q.shape)}, got {tuple(out.shape)}"
        )
        return self.o_proj(out.flatten(-2))  # (..., T, C)

    def place(
        self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys, rotated to their positions; first normed, in such a model."""
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        rope = positions, self.rope_theta, self.rope_scaling
        return rotate(q, *rope), rotate(k, *rope)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): an MLP whose hidden units are switched by a gate."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotate(
    x: torch.Tensor,
    positions: torch.Tensor,
    theta: float,
    scaling: RopeScaling | None = None,
) -> torch.Tensor:
    """RoPE: turn each pair (i, i + D/2) of x by an angle that grows with the position.

    x (..., T, heads, D), positions (..., T). Pair i turns by position * theta^(-2i/D)
    radians (RoFormer, section 3.2.2). Pairs are made of halves, as in the Hugging Face
    layout of Llama's weights; Meta's own code pairs neighbours. A key's rotation depends
    on its own position alone, so it can be cached as it is. How far a query and a key are
    turned against each other depends on their distance alone.

    scaling: makes slow pairs slower (`scale_frequencies`).
    """
    D = x.shape[-1]
    # Angles want more digits than half precision has.
    dtype = torch.promote_types(x.dtype, torch.float32)
    exponents = torch.arange(0, D, 2, dtype=dtype, device=x.device) / D  # (D/2,)
    frequencies = 1.0 / theta**exponents  # (D/2,)
    if scaling is not None:
        frequencies = scale_frequencies(frequencies, scaling)
    angles = positions[..., None, None] * frequencies  # (..., T, 1, D/2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)  # (..., T, heads, D/2)
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.cat(turned, dim=-1)  # (..., T, heads, D)


def scale_frequencies(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """RoPE for texts longer than those of the training, as Llama 3.1 does it.

    frequencies: radians per position, (D/2,). A pair that turns less than low_freq_factor
    times in a text of the training turns `factor` times slower, one that turns more than
    high_freq_factor times as before, one between in between.
    """
    turns = frequencies * scaling.original_max_seq_len / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def attend_causal(
    layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """Causal attention, spelled out: each token looks at itself and those before it.

    q (..., T, H, D); k, v (..., T, G, D), where query head h reads KV head h // (H /
    G). Returns (..., T, H, D). Holds all (..., H, T, T) scores at once: memory grows
    with T².

    >>> q = k = torch.zeros(2, 1, 1)  # T = 2, H = D = 1: all scores are equal
    >>> attend_causal(0, q, k, v=torch.tensor([2.0, 4.0]).view(2, 1, 1)).flatten()
    tensor([2., 3.])
    """
    T, H, D = q.shape[-3:]
    assert k.shape[-3] == T, f"expected {T} keys, one per query, got {k.shape[-3]}"
    group_size = H // k.shape[-2]
    k = k.repeat_interleave(group_size, dim=-2)  # (..., T, H, D)
    v = v.repeat_interleave(group_size, dim=-2)  # (..., T, H, D)
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))  # (..., H, T, D)

    # Scaled before the product: unscaled scores may be too large for half precision.
    scores = (q / D**0.5) @ k.transpose(-2, -1)  # (..., H, T, T)
    t = torch.arange(T, device=q.device)
    is_future = t > t.unsqueeze(-1)  # (T, T): the key's column after the query's row
    scores = scores.masked_fill(is_future, float("-inf"))
    out = scores.softmax(dim=-1) @ v  # (..., H, T, D)
    return out.transpose(-3, -2)  # (..., T, H, D)


def attend_fused(
    layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """`attend_causal` by torch's fused kernel, which on a CPU stores no scores: O(T)."""
    T, S = q.shape[-3], k.shape[-3]
    assert S == T, f"expected {T} keys, one per query, got {S}"
    # One leading dimension: with any other number torch takes, without a word, a path
    # that stores the scores. And is_causal: a mask would itself have T x T entries.
    q4, k4, v4 = (x.reshape(-1, *x.shape[-3:]).transpose(1, 2) for x in (q, k, v))
    is_grouped = q.shape[-2] != k.shape[-2]
    out = F.scaled_dot_product_attention(
        q4, k4, v4, is_causal=True, enable_gqa=is_grouped
    )
    return out.transpose(1, 2).reshape(q.shape)  # (..., T, H, D)


def check_token_ids(
    token_ids: torch.Tensor, positions: torch.Tensor, config: ModelConfig
):
    """Raise ValueError unless a model of `config` can take these tokens."""
    if token_ids.dim() < 1 or token_ids.dtype != torch.int64:
        raise ValueError(
            f"token_ids: expected int64 (..., T), "
            f"got {token_ids.dtype} {tuple(token_ids.shape)}"
        )
    if positions.shape not in (token_ids.shape, token_ids.shape[-1:]):
        raise ValueError(
            f"positions: expected {tuple(token_ids.shape)} as token_ids, or "
            f"{tuple(token_ids.shape[-1:])}, got {tuple(positions.shape)}"
        )
    if positions.dtype != torch.int64:
        raise ValueError(f"positions: expected int64, got {positions.dtype}")
    if token_ids.numel() == 0:
        raise ValueError(f"token_ids: expected some, got {tuple(token_ids.shape)}")
    if token_ids.is_cuda:
        return
    for name, ids, limit in (
        ("token_ids", token_ids, config.vocab_size),
        ("positions", positions, config.max_seq_len),
    ):
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= limit:
            raise ValueError(
                f"{name}: expected values in [0, {limit}), got {low} to {high}"
            )


def save_model(model: Transformer, path: Path):
    """Write config and weights to one file, whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save({"config": asdict(model.config), "weights": model.state_dict()}, partial)
    partial.replace(path)


def load_model(path: Path = WEIGHTS) -> Transformer:
    """The model in a file of `save_model`, on the CPU, ready to generate.

    Raises FileNotFoundError, or ValueError that says what is wrong with the file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"weights: expected {path}, found nothing. In data/, "
            f"`git checkout {path.name}` restores those of the course."
        )
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        config, weights = ModelConfig(**saved["config"]), saved["weights"]
    except Exception as error:
        raise ValueError(
            f"{path}: expected a file with 'config' and 'weights', as save_model writes, "
            f"got {type(error).__name__}: {error}"
        ) from error
    model = Transformer(config)
    load_weights(model, weights)
    return model.eval()


def load_weights(model: Transformer, weights: dict[str, torch.Tensor]):
    """Copy `weights` into `model`.

    Raises ValueError naming the first that is missing, unknown or misshapen, or two that
    should be one.
    """
    expected = model.state_dict()
    for name in [*expected, *weights]:
        shapes = [
            tuple(w[name].shape) if name in w else "nothing" for w in (expected, weights)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"weights of another model: {name}: expected {shapes[0]}, got {shapes[1]}"
            )
    if model.config.tied_embeddings and not torch.equal(
        weights["embed.weight"], weights["unembed.1.weight"]
    ):
        raise ValueError(
            "weights of another model: embed.weight and unembed.1.weight: expected one "
            "matrix, got two"
        )
    model.load_state_dict(weights)
