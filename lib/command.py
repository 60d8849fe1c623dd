"""A text from the command line, by any of the course's ways to write one.

    python -m lib.generate "Call me Ishmael"
    python -m lib.generate --model FOLDER --cache paged --chat "Who is Ishmael?"

The text comes as it is written; behind it a line says what it took. Without --model it is
the course's own model that writes, whose tokens are bytes.

Read lib/engine.py, lib/weights.py and lib/tokenizer.py before.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lib import generate, sampling, state, weights
from lib.config import ModelConfig, check_count
from lib.engine import Engine, generator_at
from lib.kv_cache import ContiguousKVCache, KVCache
from lib.model import Transformer, attend_fused, load_model
from lib.paged_attention_triton import fastest_settings
from lib.paged_kv_cache import PagedKVCache
from lib.quantized_kv_cache import QuantizedFormat
from lib.text import print_any_letter
from lib.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer


def main() -> int:
    print_any_letter()
    try:
        return _write(_parse_args())
    except BrokenPipeError:  # whoever reads has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ModuleNotFoundError, MemoryError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first token was asked for
        return 130


def _parse_args() -> argparse.Namespace:
    """Raises ValueError for a value out of range, and for options that do not go
    together."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.generate",
        description="Write what comes after a prompt, and say what it took.",
    )
    parser.error = lambda message: parser.exit(2, f"{message}\n")
    add, caches = parser.add_argument, ("recompute", "contiguous", "paged", "window")
    dtypes = "float32", "bfloat16", "float16"
    add("prompt", type=_text)
    add("--model", type=Path, help="folder or GGUF file; the course's own if left out")
    add("--cache", choices=caches, default="paged", help="default %(default)s")
    add("--bits", type=int, choices=(8, 4, 2), help="per key and value; all if left out")
    add("--block-size", type=int, help="tokens in a block of the paged cache; 16")
    add("--max-new-tokens", type=int, default=100, help="default %(default)s")
    add("--temperature", type=float, default=0.0, help="default %(default)s: greedy")
    add("--top-k", type=int, help="draw from the most probable; all if left out")
    add("--top-p", type=float, default=1.0, help="of so much probability; %(default)s")
    add("--seed", type=int, default=0, help="default %(default)s")
    add("--chat", action="store_true", help="the prompt is a message to the model")
    add("--system", type=_text, metavar="TEXT", help="how it is to answer")
    add("--dtype", choices=dtypes, default=dtypes[0], help="default %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default %(default)s")
    add("--threads", type=int, help="of the CPU; as many as torch takes if left out")
    args = parser.parse_args()
    for name, fits, expected in (
        ("bits", args.cache in ("contiguous", "paged"), "--cache contiguous or paged"),
        ("block_size", args.cache == "paged", "--cache paged"),
        ("system", args.chat, "--chat"),
    ):
        if getattr(args, name) is not None and not fits:
            raise ValueError(f"{name}: expected with {expected}, got it without")
    for name in ("max_new_tokens", "block_size", "threads"):
        if getattr(args, name) is not None:
            check_count(name, getattr(args, name))
    if args.threads is not None and args.threads > (os.cpu_count() or 1):
        raise ValueError(
            f"threads: expected at most {os.cpu_count()}, as there are cores"
        )
    check_count("seed", args.seed, at_least=0)
    sampling.check_sampling(args.temperature, args.top_k, args.top_p)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a GPU that torch can use, got none")
    return args


def _text(argument: str) -> str:
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(
            "expected text, got bytes that are none"
        ) from error
    return argument


def _write(args: argparse.Namespace) -> int:
    """The text as it comes, and a line on what it took. Returns the exit code."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model, tokenizer, window = _load(args)
    prompt_ids = _encode_prompt(args, tokenizer)
    limit, prompt_len = model.config.max_seq_len, len(prompt_ids)
    most = f"a text may have {limit}"
    if limit == window:
        most += ", its window, which --cache window runs past"
    if not 1 <= prompt_len < limit:
        raise ValueError(
            f"prompt: expected 1 to {limit - 1} tokens ({most}), got {prompt_len}"
        )
    if args.max_new_tokens > limit - prompt_len:
        args.max_new_tokens = limit - prompt_len
        print(f"({args.max_new_tokens} new tokens at most: {most})")
    held = {"tokens": 0, "used": 0, "reserved": 0}
    if args.cache == "recompute":
        new_ids = _recompute(args, model, prompt_ids, window, tokenizer.stop_ids)
    else:
        cache = _make_cache(args, model.config, prompt_len, window)
        _watch(cache, held)
        new_ids = _serve(args, model, prompt_ids, cache, tokenizer.stop_ids)

    stream, start, times, code = tokenizer.stream(), time.perf_counter(), [], 0
    try:
        with contextlib.closing(new_ids):
            for token_id in new_ids:
                times.append(time.perf_counter())
                if token_id not in tokenizer.stop_ids:
                    print(stream.step(token_id), end="", flush=True)
    except KeyboardInterrupt:
        code = 130
    finally:
        print()
    print(_closing_line(prompt_len, start, times, held))
    return code


def _load(
    args: argparse.Namespace,
) -> tuple[Transformer, Tokenizer | ByteTokenizer, int | None]:
    """Model, tokenizer, and the window of its attention, if it has one."""
    settings = {"dtype": getattr(torch, args.dtype), "device": args.device}
    past_window = args.cache in ("recompute", "window")
    if args.model is None:
        made = load_model().to(**settings), ByteTokenizer(), None
    else:
        found = weights.open_checkpoint(args.model)
        reads = load_tokenizer(found.path, found.config)
        made = found.load(past_window=past_window, **settings), reads, found.window
    if args.cache == "window" and made[-1] is None:
        raise ValueError("cache: expected a model with a window, got one without")
    return made


def _encode_prompt(
    args: argparse.Namespace, tokenizer: Tokenizer | ByteTokenizer
) -> torch.Tensor:
    if not args.chat:
        return tokenizer.encode(args.prompt)
    messages = [("system", args.system), ("user", args.prompt)]
    return tokenizer.chat(
        [{"role": r, "content": c} for r, c in messages if c is not None]
    )


def _recompute(
    args: argparse.Namespace,
    model: Transformer,
    token_ids: torch.Tensor,
    window: int | None,
    stop_ids: frozenset[int],
) -> Iterator[int]:
    """The new tokens, each drawn as the engine would."""
    attend = attend_fused if window is None else state.attend_by(state.Window(window))
    token_ids = token_ids.to(args.device)
    for _ in range(args.max_new_tokens):
        token_ids = generate.generate_recompute(
            *(model, token_ids, 1),
            **_sampling(args),
            generator=generator_at(args.seed, len(token_ids), args.device),
            attend=attend,
        )
        yield (new_id := int(token_ids[-1]))
        if new_id in stop_ids:
            return


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}


def _make_cache(
    args: argparse.Namespace, config: ModelConfig, prompt_len: int, window: int | None
) -> KVCache:
    """Of one request, with room for all that it may have."""
    settings = {"dtype": getattr(torch, args.dtype), "device": args.device}
    if args.cache == "window":
        return state.StateCache(config, 1, state.Window(window), **settings)
    if args.bits is not None:
        settings["format"] = QuantizedFormat(args.bits)
    elif args.cache == "paged":
        settings |= fastest_settings(args.device)
    else:
        settings["fused_decode"] = True
    room = prompt_len + args.max_new_tokens - 1  # the last one never enters the cache
    try:
        if args.cache == "contiguous":
            return ContiguousKVCache(config, 1, room, **settings)
        block_size = args.block_size or 16
        return PagedKVCache(config, -(-room // block_size), block_size, **settings)
    except RuntimeError as error:  # of torch: no memory
        raise MemoryError(f"keys and values of {room} tokens: {error}") from error


def _watch(cache: KVCache, held: dict[str, int]):
    """Write down what the cache holds whenever a request is about to leave it."""
    free = cache.free

    def free_watched(request_id):
        held["tokens"] = int(cache.seq_lens.sum())
        held["used"], held["reserved"] = cache.used_bytes, cache.reserved_bytes
        free(request_id)

    cache.free = free_watched


def _serve(
    args: argparse.Namespace,
    model: Transformer,
    prompt_ids: torch.Tensor,
    cache: KVCache,
    stop_ids: frozenset[int],
) -> Iterator[int]:
    """The new tokens by the engine, which takes a long prompt in chunks."""
    engine = Engine(model, cache)
    request = engine.add(
        *(prompt_ids, args.max_new_tokens),
        **_sampling(args),
        seed=args.seed,
        stop_ids=stop_ids,
    )
    try:
        while request.finish_reason is None:
            yield from engine.step().next_ids.values()
    finally:
        with contextlib.suppress(ValueError):  # it has ended
            engine.cancel(request.request_id)
    if request.finish_reason.startswith("error"):
        raise ValueError(request.finish_reason)


def _closing_line(
    prompt_len: int, start: float, times: Sequence[float], held: dict[str, int]
) -> str:
    """times: when each new token came. held: of the cache, as `_watch` writes it down."""
    first = f"{times[0] - start:.3g} s until the first token" if times else "no token"
    line = f"prompt tokens: {prompt_len}, {first}; new tokens: {len(times)}"
    if len(times) > 1:
        line += f", {(len(times) - 1) / (times[-1] - times[0]):.3g} per second after it"
    line += f"; KV bytes: {held['used']:,} used, {held['reserved']:,} reserved"
    if held["tokens"]:
        line += f", {held['used'] / held['tokens']:,.0f} per token"
    return line
