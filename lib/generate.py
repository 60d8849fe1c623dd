"""Chapters 1 and 3: generate text, first by recomputing everything, then with a cache.

A language model gives probabilities for one next token. To write N of them, ask N
times, each time with all the text so far. That is the whole of `generate_recompute`,
and also what is wrong with it: step t does the work of all steps before it again.
`generate_cached` asks as often, but hands over only the tokens that are new; the rest is
in a cache, of whatever kind (lib/kv_cache.py, lib/paged_kv_cache.py).

    python -m lib.generate "Call me Ishmael"
    python -m lib.generate --model FOLDER --chat --cache contiguous "Who is Ishmael?"

writes with either way, and says what it took; --model is one that others trained
(lib/weights.py).

Read lib/model.py and lib/sampling.py before.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lib import kv_cache, sampling
from lib.config import ModelConfig, check_count
from lib.kv_cache import KVCache
from lib.model import Attend, Transformer, attend_fused, check_token_ids


@torch.no_grad()
def generate_recompute(
    model: Transformer,
    prompt_ids: torch.Tensor,
    num_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    attend: Attend = attend_fused,
) -> torch.Tensor:
    """Prompt and continuation: for each new token, a forward call over all the text.

    prompt_ids (T,), or (B, T) for B prompts of one length. Returns the same with
    num_new_tokens more. Raises ValueError for an empty prompt, or when the text would
    outgrow the model's max_seq_len.
    """
    check_generation(model, prompt_ids, num_new_tokens)
    sampling.check_sampling(temperature, top_k, top_p)

    token_ids = prompt_ids
    for _ in range(num_new_tokens):
        positions = torch.arange(token_ids.shape[-1], device=token_ids.device)
        logits = model(token_ids, positions, attend)[..., -1, :]  # (..., V)
        probs = sampling.next_token_probs(logits, temperature, top_k, top_p)  # (..., V)
        next_ids = sampling.sample(probs, generator)  # (...)
        token_ids = torch.cat([token_ids, next_ids.unsqueeze(-1)], dim=-1)  # (..., T + 1)
    return token_ids


def attention_flops(config: ModelConfig, prompt_len: int, num_new_tokens: int) -> int:
    """FLOPs that `generate_recompute` spends on attention, exactly, for one prompt.

    With T tokens and one query head of one layer, q @ k.T and weights @ v are 2·T·T·D
    FLOPs each: one multiplication and one addition for each of T·T·D pairs, the masked
    future included.

    >>> one_head = ModelConfig(256, 1, 1, 1, d_model=2, d_ff=4, max_seq_len=8)  # D = 2
    >>> attention_flops(one_head, prompt_len=1, num_new_tokens=2)  # T = 1, then T = 2
    40
    """
    total = 0
    for T in range(prompt_len, prompt_len + num_new_tokens):
        total += 4 * T * T * config.head_dim * config.num_heads * config.num_layers
    return total


def projection_flops(config: ModelConfig, prompt_len: int, num_new_tokens: int) -> int:
    """The same for the rest: each token, at each step, meets every weight matrix once."""
    attention = (
        config.d_model * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    )
    mlp = 3 * config.d_model * config.d_ff
    unembed = config.d_model * config.vocab_size
    num_weights = config.num_layers * (attention + mlp) + unembed
    num_tokens = sum(range(prompt_len, prompt_len + num_new_tokens))
    return 2 * num_weights * num_tokens


@torch.no_grad()
def forward_cached(
    model: Transformer, cache: KVCache, token_ids: torch.Tensor, query_lens: torch.Tensor
) -> torch.Tensor:
    """Logits after each new token, which from now on is in the cache.

    token_ids int64 (N,), request after request: query_lens[b] of request b, int64 (B,).
    Returns (N, V). What does not fit, tokens or lengths, raises before anything changes
    (on a GPU ids are not looked at).
    """
    check_cache(model, cache)
    check_no_dropout(model)
    cache.check_room(query_lens)
    N = int(query_lens.sum())
    if token_ids.shape != (N,):
        raise ValueError(
            f"token_ids: expected ({N},), the sum of query_lens, "
            f"got {tuple(token_ids.shape)}"
        )
    positions = kv_cache.new_positions(cache.seq_lens + query_lens, query_lens)  # (N,)
    check_token_ids(token_ids, positions, model.config)
    with cache.extend(query_lens) as attend:
        return model(token_ids, positions, attend)


def prefill_in_chunks(
    model: Transformer,
    prompts: Sequence[torch.Tensor],
    cache: KVCache,
    chunk_size: int,
):
    """Put prompts into the cache, at most `chunk_size` tokens of each in one step.

    prompts: one (T,) for each request of the cache. Attention of a step holds one score
    for each new token and each key of its request: T² for a whole prompt in an empty
    cache, chunk_size · T at most for a chunk of it. Raises as `generate_cached` does,
    before the first step.
    """
    chunk_size = check_count("chunk_size", chunk_size)
    check_cached_generation(model, prompts, 0, cache)
    lens = [len(prompt_ids) for prompt_ids in prompts]
    cache.check_room(torch.tensor(lens, device=cache.seq_lens.device))

    for start in range(0, max(lens), chunk_size):
        chunks = [prompt_ids[start : start + chunk_size] for prompt_ids in prompts]
        new_ids = torch.cat(chunks)  # (N,)
        query_lens = torch.tensor([len(c) for c in chunks], device=new_ids.device)  # (B,)
        forward_cached(model, cache, new_ids, query_lens)


def generate_cached(
    model: Transformer,
    prompts: Sequence[torch.Tensor],
    num_new_tokens: int,
    cache: KVCache,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[torch.Tensor]:
    """Prompts and continuations: each token goes through the model once.

    prompts: one (T,) for each of `cache.request_ids`, of any lengths; a request that has
    tokens in the cache goes on behind them. Returns each with num_new_tokens more. The
    last of them is not in the cache: nobody has asked what follows it. Raises ValueError,
    or what the cache raises if it has not enough room, before the first step. What comes
    later, an interrupt say, leaves the tokens of finished steps in the cache.
    """
    check_cached_generation(model, prompts, num_new_tokens, cache)
    sampling.check_sampling(temperature, top_k, top_p)

    texts = list(prompts)
    new_ids = torch.cat(texts)  # (N,)
    query_lens = torch.tensor([len(p) for p in prompts], device=new_ids.device)  # (B,)
    for _ in range(num_new_tokens):
        logits = forward_cached(model, cache, new_ids, query_lens)  # (N, V)
        logits = logits[query_lens.cumsum(0) - 1]  # (B, V): of each request the last row
        probs = sampling.next_token_probs(logits, temperature, top_k, top_p)  # (B, V)
        new_ids = sampling.sample(probs, generator)  # (B,)
        query_lens = torch.ones_like(query_lens)  # (B,)
        texts = [torch.cat([text, new]) for text, new in zip(texts, new_ids.split(1))]
    return texts


def check_generation(
    model: Transformer, prompt_ids: torch.Tensor, num_new_tokens: int, seq_len: int = 0
):
    """Raise ValueError unless there is a prompt of this model, room, and no dropout.

    seq_len: tokens that came before the prompt.
    """
    prompt_len = prompt_ids.shape[-1] if prompt_ids.dim() else 0
    if prompt_ids.numel() == 0:
        raise ValueError("prompt_ids: expected at least one token, got none")
    check_count("num_new_tokens", num_new_tokens, at_least=0)
    if seq_len + prompt_len + num_new_tokens > model.config.max_seq_len:
        cached = f"{seq_len} in the cache + " if seq_len else ""
        raise ValueError(
            f"expected at most max_seq_len = {model.config.max_seq_len} tokens, "
            f"got {cached}{prompt_len} in the prompt + {num_new_tokens} new"
        )
    check_no_dropout(model)
    positions = torch.arange(prompt_len, device=prompt_ids.device)
    check_token_ids(prompt_ids, positions, model.config)


def check_no_dropout(model: Transformer):
    """Raise ValueError where dropout would change what is computed."""
    if model.training and model.config.dropout > 0:
        raise ValueError("model: expected eval mode, got training mode, with dropout")


def check_cached_generation(
    model: Transformer,
    prompts: Sequence[torch.Tensor],
    num_new_tokens: int,
    cache: KVCache,
):
    """The same for a batch with a cache, which must have room for all that is coming."""
    if None in cache.request_ids:
        raise ValueError(
            f"cache: expected a request in each row, got {cache.request_ids}: begin them"
        )
    if len(prompts) != len(cache.request_ids) or len(prompts) == 0:
        raise ValueError(
            f"prompts: expected {len(cache.request_ids)}, one per request of the cache, "
            f"and at least one, got {len(prompts)}"
        )
    for prompt_ids, seq_len in zip(prompts, cache.seq_lens.tolist()):
        if not isinstance(prompt_ids, torch.Tensor) or prompt_ids.dim() != 1:
            got = getattr(prompt_ids, "shape", type(prompt_ids).__name__)
            raise ValueError(f"prompts: expected each an int64 tensor (T,), got {got}")
        check_generation(model, prompt_ids, num_new_tokens, seq_len)
    if num_new_tokens > 0:
        lens = torch.tensor([len(p) for p in prompts], device=cache.seq_lens.device)
        cache.check_room(lens + num_new_tokens - 1)


def check_cache(model: Transformer, cache: KVCache):
    """Raise ValueError unless the cache takes the keys and values of this model."""

    def facts(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str:
        return (
            f"{config.num_layers} layers, {config.num_kv_heads} KV heads of "
            f"{config.head_dim} numbers in {dtype} on {device}"
        )

    weight = next(model.parameters())
    expected = facts(model.config, weight.dtype, weight.device)
    got = facts(cache.config, cache.dtype, cache.device)
    if got != expected:
        raise ValueError(f"cache: expected {expected}, as the model, got {got}")


# The command. It imports the rest inside: the engine imports this file.


def main() -> int:
    try:
        return _write(_parse_args())
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


def _load(args: argparse.Namespace) -> tuple[Transformer, Any, int | None]:
    """Model, tokenizer, and the window of its attention, if it has one."""
    from lib import model, tokenizer, weights

    settings = {"dtype": getattr(torch, args.dtype), "device": args.device}
    past_window = args.cache in ("recompute", "window")
    if args.model is None:
        made = model.load_model().to(**settings), tokenizer.ByteTokenizer(), None
    else:
        found = weights.open_checkpoint(args.model)
        reads = tokenizer.load_tokenizer(found.path, found.config)
        made = found.load(past_window=past_window, **settings), reads, found.window
    if args.cache == "window" and made[-1] is None:
        raise ValueError("cache: expected a model with a window, got one without")
    return made


def _encode_prompt(args: argparse.Namespace, tokenizer: Any) -> torch.Tensor:
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
    from lib import state

    attend = attend_fused if window is None else state.attend_by(state.Window(window))
    token_ids = token_ids.to(args.device)
    for _ in range(args.max_new_tokens):
        generator = torch.Generator(args.device)
        generator.manual_seed((args.seed * 1_000_003 + len(token_ids)) % 2**63)
        token_ids = generate_recompute(
            *(model, token_ids, 1),
            **_sampling(args),
            generator=generator,
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
    from lib import interpreter, paged_attention_triton, state
    from lib.paged_kv_cache import PagedKVCache
    from lib.quantized_kv_cache import QuantizedFormat

    settings = {"dtype": getattr(torch, args.dtype), "device": args.device}
    if args.cache == "window":
        return state.StateCache(config, 1, state.Window(window), **settings)
    is_compiled = interpreter.HAS_TRITON and not interpreter.IS_INTERPRETED
    if args.bits is not None:
        settings["format"] = QuantizedFormat(args.bits)
    elif args.cache == "paged" and args.device == "cuda" and is_compiled:
        settings["decode"] = paged_attention_triton.paged_decode
        settings["prefill"] = paged_attention_triton.paged_prefill
    else:
        settings["fused_decode"] = True
    room = prompt_len + args.max_new_tokens - 1  # the last one never enters the cache
    try:
        if args.cache == "contiguous":
            return kv_cache.ContiguousKVCache(config, 1, room, **settings)
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
    from lib.engine import Engine

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


if __name__ == "__main__":
    sys.exit(main())
