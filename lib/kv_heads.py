"""Chapter 7: what a token costs in a cache, and fewer heads of keys and values for it.

Several query heads can read the same keys and values: grouped-query attention
(https://arxiv.org/abs/2305.13245), and with a single KV head multi-query attention
(https://arxiv.org/abs/1911.02150). A cache then has G heads of keys and values for H of
queries, and is H / G times smaller. A model that was trained with more of them is made
into one with fewer by taking the mean of those that become one, and is then trained on,
for a small part of the steps that it took to train it.

    python -m lib.kv_heads    # the book's model with one KV head, trained on: minutes

Read lib/model.py, lib/training.py and lib/kv_cache.py before.
"""

import json
import shlex
import sys
import time
from dataclasses import asdict, replace

import torch
from tqdm import tqdm

from lib.config import ModelConfig, check_count
from lib.measure.meter import machine_facts
from lib.measure.quality import measure_quality, passages
from lib.model import Transformer, load_model, load_weights
from lib.text import DATA, encode, load_book, split_book
from lib.training import Trainer, TrainingConfig

RESULTS = DATA / "results" / "pooling.json"


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
    weights = {
        name: pool_kv_heads(weight, model.config.head_dim, num_kv_heads)
        if name.endswith(("k_proj.weight", "v_proj.weight"))
        else weight
        for name, weight in model.state_dict().items()
    }
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


def main():
    """Pool the model of data/ to one KV head, train it on for a twentieth of the steps
    that made it, and write down what it costs to predict held-out passages meanwhile."""
    torch.set_num_threads(1)
    config = TrainingConfig(
        num_steps=TrainingConfig.num_steps // 20, learning_rate=1e-3, warmup_steps=20
    )
    draws = [passages(8, 256, torch.Generator().manual_seed(seed)) for seed in range(3)]
    model = with_kv_heads(load_model(), num_kv_heads=1)
    torch.manual_seed(config.seed)
    trainer = Trainer(model, split_book(encode(load_book()))[0], config)
    before = measure_quality(load_model(), draws)
    found = [[0, *measure_quality(model.eval(), draws).nats]]
    start = time.perf_counter()
    for step in tqdm(range(1, config.num_steps + 1), file=sys.stdout):
        trainer.step()
        if step in (10, 25) or step % 50 == 0:
            found.append([step, *measure_quality(model.eval(), draws).nats])
    result = {
        "command": shlex.join(["python", "-m", "lib.kv_heads", *sys.argv[1:]]),
        "machine": machine_facts(),
        "model": asdict(model.config),
        "training": asdict(config),
        "seconds": round(time.perf_counter() - start),
        "nats_per_byte_unpooled": before.nats,
        "step_and_nats_per_byte": [[round(x, 4) for x in row] for row in found],
    }
    RESULTS.write_text(json.dumps(result) + "\n")
    for step, *nats in found:
        print(f"{step:4} steps: {' '.join(f'{x:.3f}' for x in nats)} nats per byte")


if __name__ == "__main__":
    main()
