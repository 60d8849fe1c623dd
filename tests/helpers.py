"""What several tests share: tolerances, and small models."""

from collections.abc import Hashable

import torch

from lib.config import ModelConfig
from lib.kv_cache import KVCache
from lib.model import Transformer

# Largest difference that rounding explains, by dtype: absolute, for values of about 1.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def assert_close(got: torch.Tensor, expected: torch.Tensor):
    """Same shape, and equal up to the rounding of the coarser of the two dtypes."""
    assert got.shape == expected.shape, (
        f"expected {tuple(expected.shape)}, got {tuple(got.shape)}"
    )
    tolerance = max(TOLERANCES[got.dtype], TOLERANCES[expected.dtype])
    difference = (
        (got.double() - expected.double()).abs().max().item() if got.numel() else 0.0
    )
    assert difference <= tolerance, (
        f"expected at most {tolerance} apart, got {difference}"
    )


def begun(cache: KVCache, batch_size: int) -> KVCache:
    """The cache, in which requests 0 to batch_size - 1 have begun."""
    for request_id in range(batch_size):
        cache.begin(request_id)
    return cache


def filled(cache: KVCache, lens: dict[Hashable, int]) -> KVCache:
    """The cache, in which requests of these lengths have begun; keys and values are 0."""
    for request_id in lens:
        cache.begin(request_id)
    counts = [lens.get(request_id, 0) for request_id in cache.request_ids]
    N, config = sum(counts), cache.config
    q = cache.k_cache.new_zeros(N, config.num_heads, config.head_dim)
    k = cache.k_cache.new_zeros(N, config.num_kv_heads, config.head_dim)
    with cache.extend(torch.tensor(counts)) as attend:
        for layer in range(config.num_layers):
            attend(layer, q, k, k)
    return cache


def random_model(
    seed: int = 0, dtype: torch.dtype = torch.float32, **changes
) -> Transformer:
    """A small random model in eval mode; weights large enough for logits that
    differ.
    """
    sizes = {
        "vocab_size": 256,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "d_model": 32,
        "d_ff": 64,
        "max_seq_len": 128,
    }
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model.to(dtype).eval()
