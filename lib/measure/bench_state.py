"""How long a state takes beside a cache: the attention of one layer alone.

    python -m lib.measure.bench_state                 # prints microseconds
    python -m lib.measure.bench_state --json data/results/state_gpu.json

Two questions. A step: one new token of each of 8 requests, over a cache of its context or
from a state, which does not depend on the context. A prompt: one text, by softmax
attention, and in chunks. The code of the state is that of lib/state.py, as it is: on a
GPU every line of it is a launch or more, while softmax attention is one kernel of torch.
"""

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from lib import state
from lib.config import check_count
from lib.measure.bench_attention import DTYPES, SIZES, cold_seconds
from lib.measure.meter import machine_facts
from lib.text import DATA

RESULTS = DATA / "results" / "state_gpu.json"  # of an H200
BATCH_SIZE = 8
CONTEXTS = {"cpu": [64, 512, 4096], "cuda": [512, 4096, 16384, 65536]}
PROMPTS = {"cpu": [256, 1024], "cuda": [1024, 4096, 16384, 65536]}
CHUNK_SIZES = {"cpu": [64], "cuda": [64, 256, 1024]}


def step_ways(context: int, device: str) -> dict[str, Callable[[], torch.Tensor]]:
    """By name, a function that attends once for BATCH_SIZE new tokens: outputs (B, H, 1,
    D) with softmax over caches of `context` tokens each, (B * H, D) from states of 32
    bits."""
    B, H, G, D, like = _sizes(device)
    q = torch.randn(B, H, 1, D, **like)
    k_cache, v_cache = (torch.randn(B, G, context, D, **like) for _ in range(2))
    # The requests' KV heads side by side, as a layer of B * G of them.
    S = torch.randn(B * G, D, D, device=device)
    asked = torch.randn(B * H, D, device=device)
    k = F.normalize(torch.randn(B * G, D, device=device), dim=-1)
    v, decay = torch.randn(B * G, D, device=device), torch.ones(B * G, device=device)
    return {
        "cache": lambda: F.scaled_dot_product_attention(
            q, k_cache, v_cache, enable_gqa=True
        ),
        "linear": lambda: state.linear_step(S, asked, k, v, decay)[0],
        "delta": lambda: state.delta_step(S, asked, k, v)[0],
    }


def prompt_ways(num_tokens: int, device: str) -> dict[str, Callable[[], torch.Tensor]]:
    """By name, a function that attends over a text of T tokens: outputs (1, H, T, D) with
    softmax, (T, H, D) in chunks of so many tokens, from 32 bits."""
    _, H, G, D, like = _sizes(device)
    dense = [torch.randn(1, n, num_tokens, D, **like) for n in (H, G, G)]
    q, k, v = (torch.randn(num_tokens, n, D, device=device) for n in (H, G, G))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    S, decay = torch.zeros(G, D, D, device=device), torch.ones(G, device=device)
    ways = {
        "softmax": lambda: F.scaled_dot_product_attention(
            *dense, is_causal=True, enable_gqa=True
        )
    }
    for size in CHUNK_SIZES[device]:
        ways[f"chunks of {size}"] = lambda size=size: state.linear_chunked(
            S, q, k, v, decay, size
        )[0]
    return ways


def check_device(device: str):
    """Raise ValueError for a device without sizes, or that is not there."""
    if device not in SIZES:
        raise ValueError(f"device: expected {' or '.join(SIZES)}, got {device}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected cpu, torch finds no GPU here, got cuda")


def _sizes(device: str) -> tuple[int, int, int, int, dict]:
    """B, H, G, D, and how the tensors of a cache are made."""
    heads = SIZES[device]["num_heads"], SIZES[device]["num_kv_heads"]
    like = {"dtype": DTYPES[device], "device": device}
    return BATCH_SIZE, *heads, SIZES[device]["head_dim"], like


def bench_state(device: str, repeats: int = 9) -> dict[str, list[dict]]:
    """Rows of steps, by context, and of prompts, by length: microseconds by name,
    medians. Raises ValueError for a device that is not there."""
    check_device(device)
    check_count("repeats", repeats)
    found = {}
    for name, sizes, ways_of in (
        ("step", CONTEXTS[device], step_ways),
        ("prompt", PROMPTS[device], prompt_ways),
    ):
        found[name] = []
        for num_tokens in sizes:
            with torch.no_grad():
                ways = ways_of(num_tokens, device)
                found[name].append(
                    {"tokens": num_tokens}
                    | {
                        way: round(1e6 * cold_seconds(attend, device, repeats), 1)
                        for way, attend in ways.items()
                    }
                )
    return found


def main():
    parser = argparse.ArgumentParser(
        prog="python -m lib.measure.bench_state",
        description="Microseconds of attention with a state and with a cache.",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (cuda where there is a GPU)",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write them there")
    args = parser.parse_args()
    if args.json and not args.json.parent.is_dir():  # before the minutes, not after
        parser.error(f"json: expected a folder that is there, got {args.json.parent}")
    try:
        check_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    found = bench_state(args.device)
    for name, rows in found.items():
        print(f"\n{name:10}" + "".join(f"{way:>16}" for way in rows[0]))
        for row in rows:
            print(" " * 10 + "".join(f"{value:16,}" for value in row.values()))
    if args.json:
        result = {
            "command": shlex.join(
                ["python", "-m", "lib.measure.bench_state", *sys.argv[1:]]
            ),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(
                "T", "seconds"
            ),
            "machine": machine_facts(),
            "device": args.device,
            "microseconds": found,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
