"""Chapter 7: what a token costs in a cache, and fewer heads of keys and values for it.

Several query heads can read the same keys and values: grouped-query attention
(https://arxiv.org/abs/2305.13245), and with a single KV head multi-query attention
(https://arxiv.org/abs/1911.02150). A cache then has G heads of keys and values for H of
queries, and is H / G times smaller. A model that was trained with more of them is made
into one with fewer by taking the mean of those that become one, and is then trained on,
for a small part of the steps that it took to train it.

lib/measure/pooling.py does that to the model of the book. Read lib/model.py and
lib/kv_cache.py before.
"""

from dataclasses import replace

import torch

from lib.config import ModelConfig, check_count
from lib.model import Transformer, load_weights


def bytes_per_token(
    config: ModelConfig,
    bytes_per_number: int = 4,
    *,
    bits: tuple[int, int] | None = None,
    ranks: tuple[int, int] | None = None,
) -> int:
    """Bytes that a token takes in the cache, in all layers, exactly.

    As it is, a token has in each layer a key and a value of D numbers for each of G KV
    heads. bits: of a number of a key and of a value, if they are quantized: each of these
    vectors is then packed, with two numbers beside it, its scale and its zero point.
    ranks: numbers of a key's and of a value's code, if all KV heads of a layer have one
    code together instead. At most one of the two is given.

    >>> from lib.config import TINY  # 2 layers, 2 KV heads of head_dim 8
    >>> bytes_per_token(TINY), bytes_per_token(TINY, bits=(8, 4))
    (256, 112)
    >>> bytes_per_token(TINY, ranks=(6, 10))
    128
    """
    G, D = config.num_kv_heads, config.head_dim
    if bits is not None:  # each vector in bytes, and its scale and zero point
        key_and_value = sum(G * (D * b // 8 + 2 * bytes_per_number) for b in bits)
    elif ranks is not None:
        key_and_value = sum(ranks) * bytes_per_number
    else:
        key_and_value = 2 * G * D * bytes_per_number
    return config.num_layers * key_and_value


def pool_kv_heads(weight: torch.Tensor, head_dim: int, num_kv_heads: int) -> torch.Tensor:
    """The matrix of keys, or of values, with fewer heads: each the mean of neighbours.

    weight: (G · D, C), D = head_dim: rows 0 to D - 1 make the first KV head's numbers.
    G / num_kv_heads neighbours become one head, so that each query head reads the mean of
    a group that contains the head it read before. Returns (num_kv_heads · D,
    C). Raises ValueError unless num_kv_heads divides G. (Ainslie and others, section 2.1)

    >>> weight = torch.tensor([[1.0], [2.0], [3.0], [6.0]])  # C = 1, four heads of one
    >>> pool_kv_heads(weight, head_dim=1, num_kv_heads=2).flatten()
    tensor([1.5000, 4.5000])
    """
    G = len(weight) // head_dim
    check_divides(num_kv_heads, G)

    heads = weight.view(num_kv_heads, G // num_kv_heads, head_dim, -1)
    return heads.mean(dim=1).flatten(0, 1)


def with_kv_heads(model: Transformer, num_kv_heads: int) -> Transformer:
    """A model of its own with fewer KV heads, pooled from those of `model`; all other
    weights are copies. Raises ValueError as `pool_kv_heads` does."""
    check_divides(num_kv_heads, model.config.num_kv_heads)
    weights = dict(model.state_dict())
    for name, weight in weights.items():
        if name.endswith(
            ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias")
        ):
            columns = weight.view(len(weight), -1)  # a bias is a matrix of one column
            pooled = pool_kv_heads(columns, model.config.head_dim, num_kv_heads)
            weights[name] = pooled.view(-1, *weight.shape[1:])
    pooled = Transformer(replace(model.config, num_kv_heads=num_kv_heads))
    load_weights(pooled.to(model.embed.weight), weights)
    return pooled.train(model.training)


def check_divides(num_kv_heads: int, num_heads_before: int):
    """Raise ValueError unless KV heads can be pooled to so many groups of one size."""
    if num_heads_before % check_count("num_kv_heads", num_kv_heads):
        raise ValueError(
            f"num_kv_heads: expected a divisor of {num_heads_before}, the KV heads that "
            f"there are, got {num_kv_heads}"
        )
