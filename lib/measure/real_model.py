"""Chapter 10: where the memory of a real model goes, and what each idea of the course
does to it.

    python -m lib.measure.real_model FOLDER --json data/results/real_model.json

Each function of MEASUREMENTS makes the figures of one part of the chapter, as plain
values. The chapter calls them with a model of the reader's, through `Live`; without one
it shows what they gave elsewhere, through `Recorded`.

How well a model does is asked in two ways. Of `book`, a passage of Moby-Dick, it reads
the first half and then predicts the second. Of `again`, tokens drawn at random from the
book in the first half, the second half is the first once more: what it does not find in
its cache it cannot know.
"""

import argparse
import datetime
import json
import shlex
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lib import (
    generate,
    kv_cache,
    kv_heads,
    paged_attention_triton,
    pruning,
    text,
    weights,
)
from lib.config import ModelConfig, check_count
from lib.engine import Engine
from lib.kv_cache import PLAIN, ContiguousKVCache, KVCache, KVFormat
from lib.latent_kv_cache import latent_format, record_kv
from lib.measure.meter import (
    machine_facts,
    measure,
    median_seconds,
    medians_in_turns,
)
from lib.measure.quality import Examples, Quality, measure_quality
from lib.model import Transformer, attend_fused, rotate
from lib.paged_kv_cache import PagedKVCache
from lib.prefix_cache import PrefixKVCache
from lib.pruning import HeavyHitters, PrunedKVCache, Recent, Snap
from lib.quantized_kv_cache import QuantizedFormat
from lib.text import DATA
from lib.tokenizer import Tokenizer, load_tokenizer

RESULTS = DATA / "results" / "real_model.json"
GPU_RESULTS = DATA / "results" / "real_model_gpu.json"

CONTEXTS = 64, 128, 256, 512, 1024  # tokens that a step looks back at
BATCHES = 1, 2, 4, 8, 16
BITS = (8, 8), (4, 4), (4, 2), (2, 2)  # of keys and of values
TASKS = "book", "again"
RANK_SHARES = 1.0, 0.75, 0.5, 0.25  # of the G * D numbers of a layer's keys
SEQ_LEN = 128  # of the texts that quality is measured on
SHARES = 0.25, 0.5, 0.75  # of the first half of a text, that a pruned cache keeps
SYSTEM = (
    "You are a careful assistant to the crew of a whaling ship. You answer questions "
    "about the ship, the sea and the whales, in one or two plain sentences. You never "
    "invent a fact: where you do not know an answer you say so. You call the captain "
    "Ahab and the first mate Starbuck. You give distances in nautical miles, depths in "
    "fathoms, weights in barrels of oil, and times of the day in bells of the watch. You "
    "do not talk about other ships, nor about the owners of this one. If somebody asks "
    "for the white whale, you say when and where it was seen last, and by whom, and "
    "nothing else. You end each answer with the watch in which it was given."
)
QUESTIONS = (
    "Where was the white whale seen last?",
    "How many barrels of oil are below deck?",
    "Who stands the next watch?",
)


@dataclass(frozen=True)
class Subject:
    """A model, and what it is asked with."""

    model: Transformer
    tokenizer: Tokenizer
    book_ids: torch.Tensor  # int64 (T,), the book in the tokens of the model
    seq_len: int = SEQ_LEN  # of the texts that quality is measured on

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed.weight.dtype

    @property
    def settings(self) -> dict[str, Any]:
        """Of a cache for its keys and values."""
        return {"dtype": self.dtype, "device": self.device}

    def cache(self, batch_size: int, room: int, format: KVFormat = PLAIN) -> KVCache:
        """A contiguous one, with all of its requests begun."""
        fast = {"fused_decode": format is PLAIN, "format": format}
        cache = ContiguousKVCache(self.config, batch_size, room, **self.settings, **fast)
        for request_id in range(batch_size):
            cache.begin(request_id)
        return cache

    def paged(self, num_blocks: int, kind: type = PagedKVCache) -> PagedKVCache:
        """A pool of blocks of 16 tokens, read in place where kernels are compiled."""
        fastest = paged_attention_triton.fastest_settings(self.device)
        return kind(self.config, num_blocks, 16, **self.settings, **fastest)

    def prompt(self, num_tokens: int, start: int = 20_000) -> torch.Tensor:
        """The next tokens of the book: (num_tokens,)."""
        return self.book_ids[start : start + num_tokens]

    def lens(self, *counts: int) -> torch.Tensor:
        return torch.tensor(counts, device=self.device)


def measure_text(subject: Subject, prompt: str = "Call me Ishmael") -> dict:
    """What the model writes, greedily, and whether recomputing and both caches write the
    same."""
    prompt_ids = subject.tokenizer.encode(prompt).to(subject.device)
    num_new, greedy = 40, {"temperature": 0.0}
    texts = [generate.generate_recompute(subject.model, prompt_ids, num_new, **greedy)]
    paged = subject.paged(len(prompt_ids) // 16 + num_new // 16 + 2)
    paged.begin(0)
    for cache in (subject.cache(1, len(prompt_ids) + num_new), paged):
        texts += generate.generate_cached(
            subject.model, [prompt_ids], num_new, cache, **greedy
        )
    return {
        "text": subject.tokenizer.decode(texts[0]),
        "num_tokens": len(texts[0]),
        "same": [torch.equal(text, texts[0]) for text in texts],
    }


def measure_bytes(subject: Subject) -> dict:
    """Bytes of weights and of a token in the cache, predicted; and what is seen with
    prompts of 128 and of 512 tokens."""
    itemsize, one = subject.dtype.itemsize, subject.lens(1)
    # The first products on a GPU take memory that stays.
    generate.forward_cached(subject.model, subject.cache(1, 1), subject.prompt(1), one)
    return {
        "weights": sum(p.nbytes for p in subject.model.parameters()),
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "per_token": kv_heads.bytes_per_token(subject.config, itemsize),
        "logits_per_token": subject.config.vocab_size * itemsize,
        "seen": [_bytes_seen(subject, n) for n in (128, 512)],
    }


def _bytes_seen(subject: Subject, num_tokens: int) -> dict:
    """Of the cache of a prompt; and at the peak of reading it whole, of reading it in
    chunks of 32, and of a step behind it."""
    model, prompt_ids = subject.model, subject.prompt(num_tokens)
    in_pieces = subject.cache(1, num_tokens)
    chunks = measure(
        lambda: generate.prefill_in_chunks(model, [prompt_ids], in_pieces, 32)
    )
    reserving = measure(lambda: subject.cache(1, num_tokens + 1))
    cache, lens = reserving.value, subject.lens(num_tokens)
    whole = measure(lambda: generate.forward_cached(model, cache, prompt_ids, lens))
    used_bytes, one = cache.used_bytes, subject.lens(1)
    decode = measure(lambda: generate.forward_cached(model, cache, prompt_ids[:1], one))
    return {
        "num_tokens": num_tokens,
        "cache": used_bytes,
        "reserved": reserving.peak_bytes,
        "prefill_peak": whole.peak_bytes,
        "chunks_peak": chunks.peak_bytes,
        "decode_peak": decode.peak_bytes,
    }


def measure_speed(subject: Subject) -> list[dict]:
    """Seconds, FLOPs and operations of torch of one more token behind each of CONTEXTS,
    recomputed and with caches; medians of steps that take turns."""
    rows = []
    for context in _progress(CONTEXTS, "contexts"):
        prompt_ids = subject.prompt(context)
        positions = torch.arange(context, device=subject.device)
        caches = {
            "contiguous": subject.cache(1, context + 16),
            "paged": subject.paged(context // 16 + 2),
        }
        caches["paged"].begin(0)
        for cache in caches.values():
            generate.prefill_in_chunks(subject.model, [prompt_ids], cache, 128)

        @torch.no_grad()
        def recompute(prompt_ids=prompt_ids, positions=positions):
            subject.model(prompt_ids, positions, attend_fused)

        steps = {"recompute": recompute}
        for name, cache in caches.items():
            steps[name] = lambda cache=cache, new_ids=prompt_ids[-1:]: (
                generate.forward_cached(subject.model, cache, new_ids, subject.lens(1))
            )
        seconds = medians_in_turns(steps)
        for name, step in steps.items():
            cost = measure(step)
            rows.append(
                {
                    "name": name,
                    "context": context,
                    "seconds": seconds[name],
                    "flops": sum(cost.flops.values()),
                    "operations": len(cost.timeline) - 1,  # of torch
                }
            )
    return rows


def measure_batch(subject: Subject, context: int = 256) -> list[dict]:
    """Seconds of a step over one new token of each of BATCHES texts of `context` tokens.

    Their beginnings are the same blocks of a paged cache; each reads its own way through
    them."""
    cache = subject.paged(context // 16 + 2 * max(BATCHES))
    cache.begin(0)
    generate.prefill_in_chunks(subject.model, [subject.prompt(context)], cache, 128)
    rows, itemsize = [], subject.dtype.itemsize
    for batch_size in BATCHES:
        for request_id in range(len(cache.request_ids), batch_size):
            cache.fork(0, request_id)
        new_ids, ones = subject.prompt(batch_size), subject.lens(*[1] * batch_size)
        seconds = median_seconds(
            lambda new_ids=new_ids, ones=ones: generate.forward_cached(
                subject.model, cache, new_ids, ones
            )
        )
        num_bytes = kv_cache.kv_cache_bytes(
            subject.config, batch_size * context, itemsize
        )
        row = {"batch_size": batch_size, "context": context, "seconds": seconds}
        rows.append({**row, "kv_bytes": num_bytes})
    return rows


def measure_heads(subject: Subject) -> list[dict]:
    """What the model costs and knows with its own KV heads, and with fewer, pooled."""
    config, itemsize = subject.config, subject.dtype.itemsize
    rows, divisors = [], range(config.num_kv_heads, 0, -1)
    for num_kv_heads in [n for n in divisors if config.num_kv_heads % n == 0]:
        pooled = subject
        if num_kv_heads < config.num_kv_heads:
            model = kv_heads.with_kv_heads(subject.model, num_kv_heads)
            pooled = replace(subject, model=model)
        rows.append(
            {
                "num_kv_heads": num_kv_heads,
                "per_token": kv_heads.bytes_per_token(pooled.config, itemsize),
                **_in_cache(pooled, PLAIN),
            }
        )
    return rows


def measure_bits(subject: Subject) -> list[dict]:
    """Quality with keys and values as they are, and in fewer bits: see BITS."""
    rows = [{"name": "as they are", **_in_cache(subject, PLAIN)}]
    for bits in _progress(BITS, "bits"):
        name = f"keys in {bits[0]} bits, values in {bits[1]}"
        rows.append({"name": name, **_in_cache(subject, QuantizedFormat(*bits))})
    return rows


def measure_rank(subject: Subject) -> list[dict]:
    """Quality with keys and values of fewer numbers, in bases of keys and values that
    occur elsewhere in the book; and with keys that are coded before they are rotated."""
    elsewhere = _texts(subject, "book", seed=9)[0].token_ids
    keys, values = record_kv(subject.model, elsewhere)
    width, rows = keys[0, 0].numel(), []
    for rank in _progress([round(share * width) for share in RANK_SHARES], "ranks"):
        for ranks in dict.fromkeys([(rank, rank), (rank, width), (width, rank)]):
            figures = _in_cache(subject, latent_format(keys, values, *ranks))
            rows.append({"ranks": ranks, "is_rotated": True, "width": width, **figures})
    config = subject.config
    rope = config.rope_theta, config.rope_scaling
    places = torch.arange(elsewhere.shape[1], device=subject.device)
    unrotated = rotate(keys, -places.repeat(len(elsewhere)), *rope)
    for rank in _progress([round(x * width) for x in RANK_SHARES[1:]], "before rotation"):
        bases = latent_format(unrotated, values, rank, width).k_bases.flatten(2)

        def attend(layer, q, k, v, bases=bases):
            places = torch.arange(k.shape[-3], device=k.device)
            basis = bases[layer].to(k)  # (R, G * D)
            plain = rotate(k, -places, *rope).flatten(-2)  # (..., T, G * D)
            near = (plain @ basis.T @ basis).view_as(k)
            return attend_fused(layer, q, rotate(near, places, *rope), v)

        row = {"ranks": (rank, width), "is_rotated": False, "width": width}
        for task in TASKS:
            draws = _texts(subject, task)
            row[task] = asdict(measure_quality(subject.model, draws, attend=attend))
            row[task]["bytes_per_token"] *= (rank + width) / (2 * width)
        rows.append(row)
    return rows


def measure_sinks(subject: Subject) -> list[float]:
    """The share of attention that the first token of a text gets, by layer: a mean over
    heads, and over the queries of the second half."""
    token_ids = _texts(subject, "book")[0].token_ids[0]
    return attention_to_first(subject.model, token_ids)


@torch.no_grad()
def attention_to_first(model: Transformer, token_ids: torch.Tensor) -> list[float]:
    """The same for a text (T,) of any model."""
    shares = []

    def attend(layer, q, k, v):
        out, shown = pruning.attend_with_weights(q, k, v)  # shown (H, T, S)
        shares.append(shown[:, len(q) // 2 :, 0].mean().item())
        return out

    model(token_ids, torch.arange(len(token_ids), device=token_ids.device), attend)
    return shares


def measure_layers(subject: Subject) -> dict:
    """Nats per token when one layer keeps a quarter of the first half and all others all
    of it, by layer; and what is left when the layers that lose most keep all, and all
    others that quarter, by how many they are."""
    L, whole = subject.config.num_layers, subject.config.max_seq_len
    alone = subject.seq_len // 8
    found = {"alone": alone, "read": subject.seq_len // 2}
    for task in TASKS:
        draws = _texts(subject, task)
        nothing_cut = _pruned(subject, draws, whole, Snap()).mean_nats
        cut = []
        for layer in _progress(range(L), f"layers, {task}"):
            budgets = [alone if i == layer else whole for i in range(L)]
            cut.append(_pruned(subject, draws, budgets, Snap()).mean_nats)
        by_loss = sorted(range(L), key=lambda layer: -cut[layer])
        together = []
        for count in dict.fromkeys(min(count, L) for count in (0, 1, 2, 4, 8, 16)):
            kept = by_loss[:count]
            budgets = [whole if i in kept else alone for i in range(L)]
            quality = _pruned(subject, draws, budgets, Snap())
            together.append({"count": count, **asdict(quality)})
        found[task] = {"whole": nothing_cut, "cut": cut, "together": together}
    return found


def measure_budgets(subject: Subject, layers: dict) -> list[dict]:
    """Quality when texts are cut to a share of the tokens read, by which policy, and with
    which budgets for the layers. layers: what `measure_layers` found."""
    L, rows = subject.config.num_layers, []
    for task in TASKS:
        draws = _texts(subject, task, seed=5)
        lost = [max(nats - layers[task]["whole"], 0) for nats in layers[task]["cut"]]
        read, alone = layers["read"], layers["alone"]
        whole = subject.config.max_seq_len
        ways = {"all tokens": (read, whole, Snap())}
        for budget in (round(share * read) for share in SHARES):
            pyramid = pruning.pyramid_budgets(budget, L)
            by_loss = [budgets_by_loss(lost, budget, least, read) for least in (8, alone)]
            ways |= {
                f"{name} {budget}": (budget, budgets, policy)
                for name, budgets, policy in (
                    ("newest", budget, Recent(num_sinks=0)),
                    ("sinks and newest", budget, Recent()),
                    ("heavy hitters", budget, HeavyHitters()),
                    ("snap", budget, Snap()),
                    ("snap, pyramid", pyramid, Snap()),
                    ("snap, pyramid upside down", pyramid[::-1], Snap()),
                    ("snap, by what is lost, least 8", by_loss[0], Snap()),
                    (f"snap, by what is lost, least {alone}", by_loss[1], Snap()),
                )
            }
        for name, (budget, budgets, policy) in _progress(ways.items(), f"cut, {task}"):
            quality = _pruned(subject, draws, budgets, policy)
            name = name.removesuffix(f" {budget}")
            row = {"task": task, "name": name, "budget": budget, "budgets": budgets}
            rows.append({**row, **asdict(quality)})
    return rows


def budgets_by_loss(lost: Sequence[float], mean: int, least: int, most: int) -> list[int]:
    """Budgets for layers, `mean` on average: `least` for each, and of the rest a part as
    large as what was lost, but never more than `most`. What nobody can use is shared.

    As `pruning.spread_budgets`, which knows no limit: of a text of 64 tokens it gives a
    layer 700, if that one lost nearly all. Raises ValueError for a mean out of reach.

    >>> budgets_by_loss([9.0, 1.0, 0.0, 0.0], mean=20, least=8, most=40)
    [40, 24, 8, 8]
    """
    if not least <= mean <= most:
        raise ValueError(f"mean: expected {least} to {most}, got {mean}")
    budgets = [float(least)] * len(lost)
    rest = mean * len(lost) - sum(budgets)
    while rest > 0.5:
        is_open = [budget < most for budget in budgets]
        parts = [need * may for need, may in zip(lost, is_open)]
        if sum(parts) == 0:
            parts = [float(may) for may in is_open]
        total = sum(parts)
        for i, part in enumerate(parts):
            budgets[i] = min(budgets[i] + rest * part / total, most)
        rest = mean * len(lost) - sum(budgets)
    whole = [int(budget) for budget in budgets]
    by_fraction = sorted(range(len(lost)), key=lambda i: whole[i] - budgets[i])
    for i in by_fraction[: mean * len(lost) - sum(whole)]:
        whole[i] += 1
    return whole


def measure_prefix(subject: Subject) -> list[dict]:
    """Seconds to the first token of questions behind one system prompt, and how many of
    their tokens were computed: alone in a paged cache, and with a prefix cache."""
    prompts = _prompts(subject.tokenizer)
    room = sum(len(prompt) // 16 + 2 for prompt in prompts)
    rows = []
    for name, kind in (("paged", PagedKVCache), ("prefix", PrefixKVCache)):
        engine = Engine(subject.model, subject.paged(room, kind), token_budget=128)
        for prompt in prompts:
            start, num_computed = time.perf_counter(), 0
            engine.add(prompt, 1, temperature=0.0)
            while engine.requests:
                num_computed += sum(engine.step().counts.values())
            rows.append(
                {
                    "name": name,
                    "prompt_len": len(prompt),
                    "num_computed": num_computed,
                    "seconds": time.perf_counter() - start,
                }
            )
    return rows


MEASUREMENTS: dict[str, Callable] = {
    "text": measure_text,
    "bytes": measure_bytes,
    "speed": measure_speed,
    "batch": measure_batch,
    "heads": measure_heads,
    "bits": measure_bits,
    "rank": measure_rank,
    "sinks": measure_sinks,
    "layers": measure_layers,
    "budgets": measure_budgets,
    "prefix": measure_prefix,
}


class Live:
    """Measures a model, part by part, when it is asked."""

    def __init__(self, path: str | Path, seq_len: int = SEQ_LEN, **settings: Any):
        """settings: of `weights.Checkpoint.load`. Raises as it does, and ValueError for
        a model whose texts are too short for what is measured."""
        checkpoint = weights.open_checkpoint(path)
        needed = max(max(CONTEXTS) + 16, seq_len)
        if checkpoint.config.max_seq_len < needed:
            raise ValueError(
                f"{path}: expected a model of texts of {needed} tokens, got "
                f"{checkpoint.config.max_seq_len}"
            )
        model = checkpoint.load(**settings)
        tokenizer = load_tokenizer(path, checkpoint.config)
        book_ids = tokenizer.encode(text.load_book()[:400_000])
        device = model.embed.weight.device
        self.subject = Subject(model, tokenizer, book_ids.to(device), seq_len)
        self.name, self.config = checkpoint.path.stem, model.config
        self.found: dict[str, Any] = {}
        facts = machine_facts()
        where = facts["gpu"] if device.type == "cuda" else facts["processor"]
        self.about = (
            f"{self.name} in {str(self.subject.dtype).removeprefix('torch.')}, measured "
            f"here: {where}, {facts['torch_threads']} thread(s), torch {facts['torch']}"
        )

    def measure(self, part: str) -> Any:
        """What a part of MEASUREMENTS finds; the second time, what it found the first."""
        if part not in self.found:
            given = [self.measure("layers")] if part == "budgets" else []
            self.found[part] = MEASUREMENTS[part](self.subject, *given)
        return self.found[part]


class Recorded:
    """What `Live` found elsewhere, and says so."""

    def __init__(self, path: Path = RESULTS):
        recorded = json.loads(path.read_text(encoding="utf-8"))
        self.name, self.found = recorded["name"], recorded["found"]
        self.about = (
            f"{recorded['about'].replace('measured here', 'measured')}, "
            f"{recorded['date'][:10]}; not on this machine"
        )

    def measure(self, part: str) -> Any:
        return self.found[part]


def open_model(path: str | Path | None, **settings: Any) -> Live | Recorded:
    """The model at `path`, seen from here or from the folder of the course; or, where
    that is None or empty, what was recorded of one."""
    if not path:
        return Recorded()
    path, from_root = Path(path).expanduser(), DATA.parent / path
    if from_root.exists() and not path.exists():
        path = from_root
    print(f"loading {path.name} ...", flush=True)
    return Live(path, **settings)


def _progress(items: Collection, name: str) -> tqdm:
    """In a notebook too, where minutes pass."""
    return tqdm(items, name, file=sys.stdout, leave=False)


def _texts(subject: Subject, task: str, seed: int = 0) -> list[Examples]:
    """Two draws of two texts of seq_len tokens whose second half is asked for."""
    draws, seq_len, half = [], subject.seq_len, subject.seq_len // 2
    for i in range(2):
        generator = torch.Generator().manual_seed(2 * seed + i)
        if task == "book":
            ids = text.random_batch(subject.book_ids.cpu(), 2, seq_len, generator)
        else:
            ids = text.random_batch(subject.book_ids.cpu(), 2 * half, 1, generator)
            ids = ids.view(2, half).repeat(1, 2)
        is_answer = torch.zeros_like(ids, dtype=torch.bool)
        # Which token comes first the second time nobody can know.
        is_answer[:, half + (task == "again") :] = True
        draws.append(Examples(ids, is_answer).to(subject.device))
    return draws


def _in_cache(subject: Subject, format: KVFormat) -> dict:
    """By task, the `Quality` of a contiguous cache with this format."""

    def make_cache(config, B, T):
        return ContiguousKVCache(config, B, T, **subject.settings, format=format)

    return {
        task: asdict(
            measure_quality(subject.model, _texts(subject, task), make_cache=make_cache)
        )
        for task in TASKS
    }


def _pruned(
    subject: Subject,
    draws: Sequence[Examples],
    budgets: Sequence[int] | int,
    policy: pruning.Policy,
) -> Quality:
    """Texts whose first half is read in one step and then cut; the second half comes in
    one more step, so that nothing of it is lost."""
    return measure_quality(
        subject.model,
        draws,
        make_cache=lambda config, B, _: PrunedKVCache(
            config, B, budgets, policy, **subject.settings
        ),
        step_lens=[subject.seq_len // 2] * 2,
    )


def _prompts(tokenizer: Tokenizer) -> list[torch.Tensor]:
    """QUESTIONS behind SYSTEM, in the model's own template where it has one."""
    prompts, system = [], {"role": "system", "content": SYSTEM}
    for question in QUESTIONS:
        try:
            prompt = tokenizer.chat([system, {"role": "user", "content": question}])
        except ValueError:  # it was not trained to chat, or knows no system prompt
            prompt = tokenizer.encode(f"{SYSTEM}\n\n{question}\n")
        prompts.append(prompt)
    return prompts


def main():
    parser = argparse.ArgumentParser(
        prog="python -m lib.measure.real_model", description=__doc__.splitlines()[0]
    )
    parser.add_argument("model", type=Path, help="a folder, or a GGUF file")
    parser.add_argument("--json", type=Path, default=RESULTS, help=f"({RESULTS})")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    dtypes = "float32", "bfloat16", "float16"
    parser.add_argument("--dtype", choices=dtypes, default=dtypes[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN)
    parser.add_argument(
        "--parts", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS)
    )
    args = parser.parse_args()
    if not args.json.parent.is_dir():
        parser.error(f"json: expected a folder that is there, got {args.json.parent}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("device: expected a GPU that torch can use, got none")
    settings = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    try:
        torch.set_num_threads(check_count("threads", args.threads))
        # Halves and eighths of it are taken, and 4 of these must be 8 tokens at least.
        check_count("seq_len", args.seq_len, at_least=64)
        real = Live(args.model, args.seq_len, **settings)
    except (ValueError, OSError, ModuleNotFoundError, MemoryError) as error:
        parser.error(str(error))
    result = {
        "name": real.name,
        "about": real.about,
        "command": shlex.join(["python", "-m", "lib.measure.real_model", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(
            timespec="seconds"
        ),
        "machine": machine_facts(),
        "config": asdict(real.config),
        "seconds": {},
        "found": real.found,
    }
    for part in args.parts:
        start = time.perf_counter()
        real.measure(part)
        seconds = round(time.perf_counter() - start, 1)
        result["seconds"][part] = seconds
        args.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
        print(f"{part:8} {seconds:7.1f} s", flush=True)


if __name__ == "__main__":
    main()
