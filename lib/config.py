"""The shape of a model: one frozen dataclass, and three shapes with names, one of which
is only for computing what it would take.

Read this first. Whatever runs a model takes its sizes from a `ModelConfig`, and a file of
weights carries the config it was trained with, so that weights and code cannot disagree
in silence.
"""

import math
from dataclasses import dataclass
from numbers import Integral


def check_count(name: str, value: int, at_least: int = 1) -> int:
    """The value as an int of Python; ValueError unless it is an integer (of numpy, too,
    but not True) of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < at_least:
        raise ValueError(
            f"{name}: expected an integer of at least {at_least}, got {value!r}"
        )
    return int(value)


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 reads texts longer than those it was trained on: see
    `lib.model.scale_frequencies`. Raises ValueError unless all are numbers that make
    sense."""

    factor: float  # slow pairs turn so many times slower
    low_freq_factor: float  # turns in a text of the training, up to which a pair is slow
    high_freq_factor: float  # and from which it is fast, and stays as it is
    original_max_seq_len: int  # tokens of a text of the training

    def __post_init__(self):
        check_count("original_max_seq_len", self.original_max_seq_len)
        numbers = self.factor, self.low_freq_factor, self.high_freq_factor
        if not all(type(x) in (int, float) and 0 < x < math.inf for x in numbers):
            raise ValueError(f"rope_scaling: expected numbers above 0, got {self}")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"rope_scaling: expected low_freq_factor below high_freq_factor, "
                f"got {self}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a Llama-style decoder. Raises ValueError where they do not fit.

    The fields behind `dropout` are for models that others trained: lib/weights.py.
    """

    vocab_size: int  # V
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # G, divides H
    d_model: int  # C
    d_ff: int  # F, the width inside the MLP
    max_seq_len: int  # tokens, prompt and generated together
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    dropout: float = 0.0  # probability; acts in training only
    d_head: int | None = None  # D, where it is not C / H
    qkv_bias: bool = False  # queries, keys and values have biases (Qwen2)
    qk_norm: bool = False  # queries and keys are normed, head by head (Qwen3)
    tied_embeddings: bool = False  # `embed` and `unembed` share one matrix
    rope_scaling: RopeScaling | None = None

    def __post_init__(self):
        for name in (
            "vocab_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "d_model",
            "d_ff",
            "max_seq_len",
            *([] if self.d_head is None else ["d_head"]),
        ):
            value = getattr(self, name)
            if type(value) is not int or value < 1:  # True is an int too
                raise ValueError(
                    f"{name}: expected an integer of at least 1, got {value!r}"
                )
        if self.d_head is None and self.d_model % self.num_heads:
            raise ValueError(
                f"d_model: expected a multiple of num_heads = {self.num_heads}, "
                f"got {self.d_model}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim: expected an even number (RoPE turns pairs), "
                f"got {self.head_dim}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads = {self.num_heads}, "
                f"got {self.num_kv_heads}"
            )
        for name, is_fine, expected in (
            ("rope_theta", lambda x: 0 < x < math.inf, "a number above 0"),
            ("norm_eps", lambda x: 0 <= x < math.inf, "a number of at least 0"),
            ("dropout", lambda x: 0 <= x < 1, "a probability in [0, 1)"),
        ):
            value = getattr(self, name)
            if type(value) not in (int, float) or not is_fine(value):
                raise ValueError(f"{name}: expected {expected}, got {value!r}")
        for name in ("qkv_bias", "qk_norm", "tied_embeddings"):
            value = getattr(self, name)
            if type(value) is not bool:
                raise ValueError(f"{name}: expected True or False, got {value!r}")
        if isinstance(self.rope_scaling, dict):  # from a file, by dataclasses.asdict
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise ValueError(
                f"rope_scaling: expected RopeScaling or None, got {self.rope_scaling!r}"
            )

    @property
    def head_dim(self) -> int:  # D
        return self.d_head or self.d_model // self.num_heads


# Small enough to work by hand and to test in milliseconds.
TINY = ModelConfig(
    vocab_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    d_model=32,
    d_ff=64,
    max_seq_len=128,
)

# The shape of the weights in data/: 1.67 M parameters that have read Moby-Dick.
MOBY = ModelConfig(
    vocab_size=256,
    num_layers=4,
    num_heads=6,
    num_kv_heads=2,
    d_model=192,
    d_ff=512,
    max_seq_len=512,
    dropout=0.1,
)

# The shape of Llama 3 8B (https://arxiv.org/abs/2407.21783), to reckon with; its weights
# would take 16 GB.
LLAMA3_8B = ModelConfig(
    vocab_size=128256,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    d_model=4096,
    d_ff=14336,
    max_seq_len=8192,
    rope_theta=500000.0,
)
