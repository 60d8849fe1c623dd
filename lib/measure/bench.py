"""How fast does a model write on this machine, with each kind of cache, and served?

    python -m lib.measure.bench                  # prints tokens per second
    python -m lib.measure.bench --json data/results/bench.json
    python -m lib.measure.bench --short          # on a machine that is paid by the minute
    python -m lib.measure.bench --model FOLDER   # how fast a real model writes

All caches hold the same passages of the book; a state has taken them in. Their decode
steps take turns, so that whatever else the machine does meets all of them alike; figures
are medians. The model runs on the processor. With --model it is one that others trained
(lib/weights.py), on --device, and that table is all, since the others are about shapes
and not about weights. A second table is of attention alone, on a
GPU where there is one, with what a GPU should reach and what the host takes per call:
bench_attention.py. A third is of requests that are served together, beside transformers:
bench_serving.py.
"""

import argparse
import datetime
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from lib import generate, interpreter, kv_heads, text, weights
from lib.kv_cache import ContiguousKVCache
from lib.measure import bench_attention, bench_serving
from lib.measure.meter import machine_facts
from lib.model import Transformer, attend_fused, load_model
from lib.paged_attention_triton import fastest_settings
from lib.paged_kv_cache import PagedKVCache
from lib.state import Delta, StateCache
from lib.tokenizer import load_tokenizer

CHUNK = 256  # tokens of each prompt that are read at a time
BATCHES = [1, 8, 64]  # requests of attention alone
SERVING_VOCAB = [1024]
# What --short makes shorter: of decoding, tokens of a request and steps; of attention
# alone, tokens of a request, and repeats by device; of serving, rounds.
FULL = {
    "context": 1024,
    "steps": 40,
    "attention_contexts": [128, 512, 1024, 4096, 16384, 65536],
    "attention_repeats": {"cpu": 5, "cuda": 30},
    "serving_rounds": 5,
}
SHORT = {
    "context": 256,
    "steps": 10,
    "attention_contexts": [512, 4096, 16384],
    "attention_repeats": {"cpu": 2, "cuda": 10},
    "serving_rounds": 2,
}
# What a help can say before anything has run: on an H200 all cases took 20 seconds.
GPU_SECONDS_PER_CASE, GPU_SECONDS_TO_START = 2, 20


def book_model(room: int) -> tuple[Transformer, torch.Tensor]:
    """The course's own model, for texts of `room` tokens, and the book in its tokens."""
    model = load_model()
    if room > model.config.max_seq_len:  # RoPE goes on; what it says then is not asked
        longer = Transformer(replace(model.config, max_seq_len=room))
        longer.load_state_dict(model.state_dict())
        model = longer.eval()
    return model, text.encode(text.load_book())


def real_model(args: argparse.Namespace) -> tuple[Transformer, torch.Tensor]:
    """The model that --model names, and the book in its tokens. Raises as lib/weights.py
    and lib/tokenizer.py do, and ValueError for a text longer than the model takes."""
    found = weights.open_checkpoint(args.model)
    tokenizer = load_tokenizer(found.path, found.config)
    dtype = getattr(torch, args.dtype)
    model = found.load(dtype=dtype, device=args.device)
    if args.context + args.steps + 1 > model.config.max_seq_len:
        raise ValueError(
            f"context: expected at most {model.config.max_seq_len} tokens, context and "
            f"steps together, and one more to warm up, got {args.context} + {args.steps}"
        )
    book_ids = tokenizer.encode(text.load_book())
    if args.batch_size * args.context > len(book_ids):
        raise ValueError(
            f"batch_size: expected at most {len(book_ids) // args.context}, since the "
            f"book has {len(book_ids):,} tokens, got {args.batch_size}"
        )
    return model, book_ids.to(args.device)


def decode_steps(
    batch_size: int,
    context: int,
    num_steps: int,
    block_size: int,
    real: tuple[Transformer, torch.Tensor] | None = None,
) -> dict[str, Callable[[], torch.Tensor]]:
    """By name, a function that runs one more step, at most num_steps, for its logits.

    Each step is over one new token of each of `batch_size` requests that had `context`
    tokens before the first. Recompute always runs over `context` tokens. The model was
    not trained with a state: its text would be nonsense, its time is not. real: another
    model, and the book in its tokens; then without a state.
    """
    room = context + num_steps
    model, book_ids = real or book_model(room)
    dtype, device = model.embed.weight.dtype, model.embed.weight.device
    there = {"dtype": dtype, "device": device}
    prompts = book_ids[: batch_size * context].view(batch_size, context)
    num_blocks = batch_size * -(-room // block_size)
    caches = {
        "contiguous": ContiguousKVCache(
            model.config, batch_size, room, fused_decode=True, **there
        ),
        "paged": PagedKVCache(
            model.config, num_blocks, block_size, **there, **fastest_settings(device)
        ),
    }
    if real is None:
        caches["state"] = StateCache(model.config, batch_size, Delta())
    ones = torch.ones(batch_size, dtype=torch.int64, device=device)
    for cache in caches.values():
        for request_id in range(batch_size):
            cache.begin(request_id)
        generate.prefill_in_chunks(model, list(prompts), cache, CHUNK)
    positions = torch.arange(context, device=device)

    @torch.no_grad()
    def recompute():
        return model(prompts, positions, attend_fused)[:, -1]

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
    real: tuple[Transformer, torch.Tensor] | None = None,
) -> list[dict]:
    """Seconds of each step by name, medians, and the tokens per second they make."""
    steps = decode_steps(batch_size, context, num_steps + 1, block_size, real)
    seconds = {name: [] for name in steps}
    for i in range(num_steps + 1):
        for name, step in steps.items():
            if name == "recompute" and i > 3:
                continue
            start = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
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


def bench_decoding(args: argparse.Namespace, facts: dict) -> list[dict]:
    """Run `bench` and print what it says."""
    real = None
    if args.model:
        print(f"loading {args.model.name} ...", flush=True)
        real = real_model(args)
        print(f"reading {args.batch_size} texts, then decoding ...", flush=True)
    with tqdm(
        total=args.steps + 1, file=sys.stdout, leave=False, disable=None
    ) as progress:
        results = bench(
            args.batch_size, args.context, args.steps, args.block_size, progress, real
        )
    where = f"{facts['processor']}, {facts['torch_threads']} thread(s)"
    if real is not None:
        config, itemsize = real[0].config, real[0].embed.weight.itemsize
        num_bytes = sum(p.nbytes for p in real[0].parameters())
        where = facts["gpu"] if args.device == "cuda" else where
        per_token = kv_heads.bytes_per_token(config, itemsize)
        all_bytes = per_token * args.context * args.batch_size
        print(
            f"{args.model.name}: weights {num_bytes / 1e6:,.0f} MB in {args.dtype}, keys "
            f"and values {per_token:,} bytes per token, {all_bytes / 1e6:,.0f} MB here"
        )
    print(
        f"decoding, batch {args.batch_size}, context {args.context}; "
        f"{where}, torch {facts['torch']}; medians"
    )
    for result in results:
        print(
            f"{result['name']:12} {1000 * result['median_seconds']:9.1f} ms per step "
            f"{result['tokens_per_s']:9.1f} tokens/s"
        )
    speed = {result["name"]: result["tokens_per_s"] for result in results}
    said = f"paged writes {speed['paged'] / speed['contiguous']:.2f} of contiguous"
    if "state" in speed:
        said += f", state {speed['state'] / speed['contiguous']:.2f}"
    print(said)
    return results


def bench_attention_alone(args: argparse.Namespace, facts: dict) -> dict:
    """Run `bench_attention`, print what it says, and return it for the json."""
    device, sizes = args.device, bench_attention.SIZES[args.device]
    dtype = bench_attention.DTYPES[device]
    copy_bytes_per_s = bench_attention.copy_bandwidth(device)
    flops_per_s = bench_attention.matmul_flops_per_s(device, dtype)
    num_cases = len(args.attention_batches) * len(args.attention_contexts)
    num_host_rows = len(args.attention_batches) * len(bench_attention.HOST_CONTEXTS)
    num_rounds = num_cases + (num_host_rows if device == "cuda" else 0)
    errors, host_rows = [], []
    with tqdm(total=num_rounds, file=sys.stdout, leave=False, disable=None) as progress:
        common = {"device": device, "dtype": dtype, "block_size": args.block_size}
        common |= {"progress": progress, "errors": errors}
        rows = bench_attention.bench_attention(
            args.attention_contexts,
            args.attention_batches,
            **sizes,
            repeats=args.attention_repeats[device],
            copy_bytes_per_s=copy_bytes_per_s,
            **common,
        )
        if device == "cuda":
            config = bench_attention.one_layer(**sizes)
            host_rows = bench_attention.bench_host(
                config, args.attention_batches, **common
            )
    result = {
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        **sizes,
        "block_size": args.block_size,
        "repeats": args.attention_repeats[device],
        "copy_gb_per_s": copy_bytes_per_s / 1e9,
        "matmul_tflops_per_s": flops_per_s / 1e12,
        "rows": rows,
        "goals": bench_attention.goals(rows) if device == "cuda" else [],
        "host_rows": host_rows,
        "errors": errors,
    }
    print_attention(result, num_cases, facts)
    return result


def print_attention(result: dict, num_cases: int, facts: dict):
    on_gpu = result["device"] == "cuda"
    where = facts["gpu"] if on_gpu else f"{facts['processor']}, "
    where += "" if on_gpu else f"{facts['torch_threads']} thread(s)"
    print(
        f"\nattention of one layer, one token per request: {result['num_heads']} heads, "
        f"{result['num_kv_heads']} KV heads of {result['head_dim']}, {result['dtype']}, "
        f"blocks of {result['block_size']}\n{where}: a copy moves "
        f"{result['copy_gb_per_s']:.1f} GB/s, a matrix product makes "
        f"{result['matmul_tflops_per_s']:.2f} TFLOP/s; medians; GB/s (% of the copy's)"
    )
    rows = result["rows"]
    print(*bench_attention.table_lines(rows), sep="\n")
    tried = bench_attention.by_case(
        rows + [row for row in result["errors"] if row["name"] != "host"]
    )
    num_skipped = num_cases - len(tried)
    if num_skipped:
        print(f"skipped {num_skipped} of {num_cases}: too many bytes of keys and values")
    if on_gpu:
        print("in place, against its goals:")
        print(*bench_attention.goal_lines(result["goals"]), sep="\n")
        print("one call of the kernel in place, of many in a row, microseconds per call:")
        print(*bench_attention.host_lines(result["host_rows"]), sep="\n")
    else:
        print("in place is the kernel's torch twin: the kernel itself needs a GPU")
    if result["errors"]:
        print("what failed, and has no figures:")
        print(*bench_attention.error_lines(result["errors"]), sep="\n")


def bench_serving_a_trace(args: argparse.Namespace, facts: dict) -> list[dict]:
    """Run `bench_serving` for each vocabulary and print what it says."""
    results = []
    for vocab_size in args.serving_vocab:
        with tqdm(
            total=args.serving_rounds + 1, file=sys.stdout, leave=False, disable=None
        ) as progress:
            result = bench_serving.bench_serving(
                vocab_size,
                args.serving_rounds,
                block_size=args.block_size,
                progress=progress,
            )
        results.append(result)
        print(
            f"\nserving {result['num_requests']} requests, "
            f"{result['num_prompt_tokens']:,} tokens in prompts and "
            f"{result['num_new_tokens']:,} in answers; {result['num_layers']} layers, "
            f"d_model {result['d_model']}, vocabulary {vocab_size:,}, float32\n"
            f"{facts['processor']}, {facts['torch_threads']} thread(s), "
            f"torch {facts['torch']}, transformers {result['transformers']['version']}; "
            f"medians of {args.serving_rounds} rounds"
        )
        print(*bench_serving.table_lines(result), sep="\n")
    return results


def gpu_minutes(sizes: dict) -> int:
    """Minutes, estimated, that FULL or SHORT takes on a GPU."""
    num_cases = len(sizes["attention_contexts"]) * len(BATCHES)
    seconds = GPU_SECONDS_TO_START + num_cases * GPU_SECONDS_PER_CASE
    return math.ceil(seconds / 60)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lib.measure.bench",
        description="Tokens per second of decoding and of serving on this machine, and "
        "bytes per second of attention alone. Takes about two minutes on a processor, "
        f"on a GPU an estimated {gpu_minutes(FULL)} minutes more, with compilation.",
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="a folder or GGUF file: how fast this model writes, and nothing else; "
        "--short, some minutes with a hundred million parameters",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights of --model (%(default)s)",
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help="fewer contexts and repeats: about 45 seconds on a processor, on a GPU an "
        f"estimated {gpu_minutes(SHORT)} minutes more",
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--context",
        type=int,
        help=f"tokens of a request ({FULL['context']}; short: {SHORT['context']})",
    )
    parser.add_argument(
        "--steps",
        type=int,
        help=f"timed, of each cache ({FULL['steps']}; short: {SHORT['steps']})",
    )
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument(
        "--attention-contexts",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help=f"({FULL['attention_contexts']}; short: {SHORT['attention_contexts']})",
    )
    parser.add_argument(
        "--attention-batches",
        type=int,
        nargs="+",
        default=BATCHES,
        metavar="REQUESTS",
        help=f"({BATCHES})",
    )
    parser.add_argument(
        "--serving-rounds",
        type=int,
        help=f"timed, of each way to serve ({FULL['serving_rounds']}; short: "
        f"{SHORT['serving_rounds']})",
    )
    parser.add_argument(
        "--serving-vocab",
        type=int,
        nargs="+",
        default=SERVING_VOCAB,
        metavar="TOKENS",
        help=f"of the model that serves ({SERVING_VOCAB})",
    )
    parser.add_argument(
        "--device",
        default="cuda" if bench_attention.can_compile_kernels() else "cpu",
        help="that attention alone, or --model, runs on: cpu or cuda",
    )
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write all figures there"
    )
    args = parser.parse_args()
    is_short = args.short or args.model is not None
    for name, value in (SHORT if is_short else FULL).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    for name in (
        "batch_size",
        "context",
        "steps",
        "block_size",
        "threads",
        "attention_contexts",
        "attention_batches",
        "serving_rounds",
        "serving_vocab",
    ):
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value < 1:
                parser.error(f"{name}: expected at least 1, got {value}")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"json: expected a folder that is there, got {args.json.parent}")
    try:
        bench_attention.check_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> int:
    text.print_any_letter()
    args = parse_args()
    torch.set_num_threads(args.threads)
    triton_version = getattr(interpreter.triton, "__version__", None)
    facts = {**machine_facts(), "cuda": torch.version.cuda, "triton": triton_version}
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    if args.device == "cuda":  # elsewhere no kernel is timed
        try:
            bench_attention.check_kernel(
                bench_attention.one_layer(**bench_attention.SIZES["cuda"]),
                args.block_size,
                device="cuda",
                dtype=bench_attention.DTYPES["cuda"],
            )
        except bench_attention.WrongResultError as error:
            sys.exit(f"nothing was timed: {error}")
    try:
        results = bench_decoding(args, facts)
    except (ValueError, OSError, ModuleNotFoundError, MemoryError, RuntimeError) as error:
        if args.model is None:
            raise
        sys.exit(f"nothing was timed: {error}")
    attention, serving = {"errors": []}, []
    if args.model is None:
        attention = bench_attention_alone(args, facts)
        serving = bench_serving_a_trace(args, facts)
    if args.json:
        command = shlex.join(["python", "-m", "lib.measure.bench", *sys.argv[1:]])
        result = {
            "command": command,
            "date": date,
            "machine": facts,
            "results": results,
            "attention": attention,
            "serving": serving,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if attention["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
