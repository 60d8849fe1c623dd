"""How fast does the trained model write, with each kind of cache, on this machine?

    python -m lib.bench                          # prints tokens per second
    python -m lib.bench --json data/results/bench.json

All caches hold the same passages of the book. Their decode steps take turns, so that
whatever else the machine does meets all of them alike; figures are medians.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from lib import generate, text
from lib.kv_cache import ContiguousKVCache
from lib.meter import machine_facts
from lib.model import Transformer, attend_fused, load_model
from lib.paged_kv_cache import PagedKVCache


def decode_steps(
    batch_size: int, context: int, num_steps: int, block_size: int
) -> dict[str, Callable[[], torch.Tensor]]:
    """By name, a function that runs one more step, at most num_steps, for its logits.

    Each step is over one new token of each of `batch_size` requests that had `context`
    tokens before the first. Recompute always runs over `context` tokens.
    """
    model, room = load_model(), context + num_steps
    if room > model.config.max_seq_len:  # RoPE goes on; what it says then is not asked
        longer = Transformer(replace(model.config, max_seq_len=room))
        longer.load_state_dict(model.state_dict())
        model = longer.eval()
    book_ids = text.encode(text.load_book())
    prompts = book_ids[: batch_size * context].view(batch_size, context)
    num_blocks = batch_size * -(-room // block_size)
    caches = {
        "contiguous": ContiguousKVCache(model.config, batch_size, room),
        "paged": PagedKVCache(model.config, batch_size, num_blocks, block_size),
    }
    prompt_lens, ones = (torch.full((batch_size,), n) for n in (context, 1))
    for cache in caches.values():
        generate.forward_cached(model, cache, prompts.flatten(), prompt_lens)

    def recompute():
        with torch.no_grad():
            return model(prompts, torch.arange(context), attend_fused)

    steps = {"recompute": recompute}
    for name, cache in caches.items():
        steps[name] = lambda cache=cache: generate.forward_cached(
            model, cache, prompts[:, 0], ones
        )
    return steps


def bench(
    batch_size: int,
    context: int,
    num_steps: int,
    block_size: int = 16,
    progress: tqdm | None = None,
) -> list[dict]:
    """Seconds of each step by name, medians, and the tokens per second they make."""
    steps = decode_steps(batch_size, context, num_steps + 1, block_size)
    seconds = {name: [] for name in steps}
    for i in range(num_steps + 1):
        for name, step in steps.items():
            if name == "recompute" and i > 3:
                continue
            start = time.perf_counter()
            step()
            if i > 0:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
        if progress is not None:
            progress.update()
    sizes = {"batch_size": batch_size, "context": context, "block_size": block_size}
    return [
        {
            "name": name,
            **sizes,
            "steps": len(values),
            "median_seconds": statistics.median(values),
            "tokens_per_s": batch_size / statistics.median(values),
        }
        for name, values in seconds.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lib.bench",
        description="Tokens per second of decoding on this machine.",
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024, help="tokens of a request")
    parser.add_argument("--steps", type=int, default=40, help="timed, of each cache")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write all figures there"
    )
    args = parser.parse_args()
    for name in ("batch_size", "context", "steps", "block_size", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"{name}: expected at least 1, got {getattr(args, name)}")
    torch.set_num_threads(args.threads)

    with tqdm(
        total=args.steps + 1, file=sys.stdout, leave=False, disable=None
    ) as progress:
        results = bench(
            args.batch_size, args.context, args.steps, args.block_size, progress
        )
    facts = machine_facts()
    print(
        f"decoding, batch {args.batch_size}, context {args.context}; "
        f"{facts['processor']}, {facts['torch_threads']} thread(s), "
        f"torch {facts['torch']}; medians"
    )
    for result in results:
        print(
            f"{result['name']:12} {1000 * result['median_seconds']:9.1f} ms a step "
            f"{result['tokens_per_s']:9.1f} tokens/s"
        )
    speed = {result["name"]: result["tokens_per_s"] for result in results}
    print(f"paged writes {speed['paged'] / speed['contiguous']:.2f} of contiguous")
    if args.json:
        command = shlex.join(["python", "-m", "lib.bench", *sys.argv[1:]])
        result = {"command": command, "machine": facts, "results": results}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
