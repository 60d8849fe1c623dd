"""What becomes of the book's model with one KV head, and what training on mends.

    python -m lib.measure.pooling    # some minutes; writes data/results/pooling.json

Ainslie and others (https://arxiv.org/abs/2305.13245) train a pooled model on for 5% of
the steps that made it. So does this, and measures what held-out passages cost meanwhile.
"""

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict

import torch
from tqdm import tqdm

from lib.kv_heads import with_kv_heads
from lib.measure.meter import machine_facts
from lib.measure.quality import measure_quality, passages
from lib.model import load_model
from lib.text import DATA, encode, load_book, split_book
from lib.training import Trainer, TrainingConfig

RESULTS = DATA / "results" / "pooling.json"


def main():
    """Pool the model of data/ to one KV head, train it on for a twentieth of the steps
    that made it, and write down what it costs to predict held-out passages meanwhile."""
    argparse.ArgumentParser(
        prog="python -m lib.measure.pooling", description=main.__doc__
    ).parse_args()
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
        "command": shlex.join(["python", "-m", "lib.measure.pooling", *sys.argv[1:]]),
        "machine": machine_facts(),
        "model": asdict(model.config),
        "training": asdict(config),
        "seconds": round(time.perf_counter() - start),
        "nats_per_byte_unpooled": before.nats,
        "step_and_nats_per_byte": [[round(x, 4) for x in row] for row in found],
    }
    RESULTS.write_text(json.dumps(result) + "\n", encoding="utf-8")
    for step, *nats in found:
        print(f"{step:4} steps: {' '.join(f'{x:.3f}' for x in nats)} nats per byte")


if __name__ == "__main__":
    main()
