"""Chapter 6: how many tokens per second do requests get that come together?

A trace of requests, with prompts and answers of many lengths, is served by the engine,
in static batches that each last as long as their longest answer, and by transformers'
own continuous batching with the same weights (`pip install transformers`; where it is
not, its row says so). All write greedily, and their answers are compared. Tokens count
if somebody asked for them: what a static batch writes beyond an answer is its loss.

They take turns, round by round, so that whatever else the machine does meets all of them
about alike; figures are medians. Making a cache counts, but not that transformers starts
its thread and makes its pages, once. `make bench` prints the table.

Read lib/engine.py before.
"""

import contextlib
import importlib.metadata
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from lib import generate
from lib.config import ModelConfig
from lib.engine import PARTS, Engine, Step
from lib.kv_cache import ContiguousKVCache
from lib.model import Transformer
from lib.paged_kv_cache import PagedKVCache
from lib.weights import our_name

SIZES = {"num_layers": 4, "num_heads": 8, "num_kv_heads": 2, "d_model": 256, "d_ff": 688}
TRACE = {"num_requests": 16, "prompt_lens": (10, 128), "answer_lens": (16, 128)}
BATCH_SIZES = [4, 16]  # of static batches
SECONDS_WITHOUT_NEWS = 120  # from transformers, after which it is given up
# For `Transformers`: the fastest of seven that were tried once, on one processor, with
# pages of 16 to 256 tokens, budgets of 256 to 2,048, and both kinds of attention.
TRANSFORMERS = {"attention": "sdpa", "block_size": 32, "token_budget": 256}


class Asked(NamedTuple):
    """One request of a trace."""

    prompt_ids: list[int]
    max_new_tokens: int


class Served(NamedTuple):
    """A trace, served once."""

    seconds: float
    answers: list[list[int]]  # of each request, without its prompt
    steps: Sequence[Step] = ()  # of the engine


def make_trace(
    vocab_size: int,
    *,
    num_requests: int,
    prompt_lens: tuple[int, int],
    answer_lens: tuple[int, int],
    seed: int = 0,
) -> list[Asked]:
    """Requests with random prompts; lengths are uniform from the first to the last.

    >>> make_trace(9, num_requests=1, prompt_lens=(1, 3), answer_lens=(2, 5))
    [Asked(prompt_ids=[0, 4], max_new_tokens=5)]
    """
    rng, trace = random.Random(seed), []
    for _ in range(num_requests):
        prompt_len, answer_len = rng.randint(*prompt_lens), rng.randint(*answer_lens)
        prompt_ids = [rng.randrange(vocab_size) for _ in range(prompt_len)]
        trace.append(Asked(prompt_ids, answer_len))
    return trace


def random_model(vocab_size: int, max_seq_len: int) -> Transformer:
    """A model of SIZES. Its weights are random, and larger than those that a training
    starts with: so its answers go on in many ways, and a wrong key shows in them."""
    config = ModelConfig(vocab_size=vocab_size, max_seq_len=max_seq_len, **SIZES)
    # In a fork, so that nobody's later numbers depend on whether this was called.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = Transformer(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


def serve_by_engine(
    model: Transformer, trace: Sequence[Asked], block_size: int, token_budget: int
) -> Served:
    """All requests are there before the first step, and the pool has room for all."""
    lens = [len(prompt_ids) + count for prompt_ids, count in trace]
    num_blocks = sum(-(-seq_len // block_size) for seq_len in lens)
    start = time.perf_counter()
    cache = PagedKVCache(model.config, num_blocks, block_size, fused_decode=True)
    engine = Engine(model, cache, token_budget=token_budget)
    requests = [engine.add(*asked, temperature=0) for asked in trace]
    steps = engine.run()
    seconds = time.perf_counter() - start
    return Served(seconds, [request.new_ids for request in requests], steps)


def serve_in_batches(
    model: Transformer, trace: Sequence[Asked], batch_size: int
) -> Served:
    """In the order of the trace; a batch begins when the one before it is done."""
    seconds, answers = 0.0, []
    for first in range(0, len(trace), batch_size):
        batch = trace[first : first + batch_size]
        num_new_tokens = max(count for _, count in batch)
        prompts = [torch.tensor(prompt_ids) for prompt_ids, _ in batch]
        room = max(len(prompt_ids) for prompt_ids in prompts) + num_new_tokens
        start = time.perf_counter()
        cache = ContiguousKVCache(model.config, len(batch), room, fused_decode=True)
        for request_id in range(len(batch)):
            cache.begin(request_id)
        texts = generate.generate_cached(
            model, prompts, num_new_tokens, cache, temperature=0
        )
        seconds += time.perf_counter() - start
        for text, (prompt_ids, count) in zip(texts, batch):
            answers.append(text[len(prompt_ids) :][:count].tolist())
    return Served(seconds, answers)


class Transformers:
    """The continuous batching of transformers, https://github.com/huggingface/transformers,
    with a Llama of this model's weights. `close` ends its thread.

    attention: "sdpa" or "paged|eager", the two that need no GPU. block_size: tokens of a
    page; it has as many blocks as the trace needs, and half of them more, since it admits
    nobody when few are free. token_budget: its max_batch_tokens. It neither shares
    beginnings of texts, since it would find a round's prompts again in the next, nor
    compiles: the engine does neither. Raises ImportError where there is none, and
    whatever an older or a newer one raises that has another interface.
    """

    def __init__(
        self,
        model: Transformer,
        trace: Sequence[Asked],
        *,
        attention: str,
        block_size: int,
        token_budget: int,
    ):
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        lens = [len(prompt_ids) + count for prompt_ids, count in trace]
        num_blocks = sum(-(-seq_len // block_size) for seq_len in lens)
        self.manager = llama(model, attention).init_continuous_batching(
            generation_config=GenerationConfig(
                do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=block_size,
                num_blocks=math.ceil(1.5 * num_blocks),
                max_batch_tokens=token_budget,
                allow_block_sharing=False,
                use_cuda_graph=False,
            ),
        )
        self.manager.start()

    def serve(self, trace: Sequence[Asked]) -> Served:
        """Raises RuntimeError for a request that failed, or if nothing comes any more."""
        start = time.perf_counter()
        for i, (prompt_ids, count) in enumerate(trace):
            self.manager.add_request(prompt_ids, request_id=str(i), max_new_tokens=count)
        answers, last_news = {}, start
        while len(answers) < len(trace):
            result = self.manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(f"request {result.request_id}: {result.error}")
                answers[result.request_id] = list(result.generated_tokens)
                last_news = time.perf_counter()
            elif (
                not self.manager.is_running()
                or time.perf_counter() - last_news > SECONDS_WITHOUT_NEWS
            ):
                raise RuntimeError(
                    f"expected {len(trace)} answers, got {len(answers)}, and no more"
                )
        seconds = time.perf_counter() - start
        return Served(seconds, [answers[str(i)] for i in range(len(trace))])

    def close(self):
        self.manager.stop(block=True, timeout=5, hard_stop=True)
        self.manager.destroy()


def llama(model: Transformer, attention: str) -> nn.Module:
    """transformers' LlamaForCausalLM with the weights of this model. Raises ValueError
    for one with biases, norms of queries and keys, or scaled frequencies."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    if config.qkv_bias or config.qk_norm or config.rope_scaling is not None:
        raise ValueError(f"model: expected one as Llama 3 is, got {config}")
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
            attention_bias=False,
            attn_implementation=attention,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).to(next(model.parameters()))
    weights = model.state_dict()
    made.load_state_dict({name: weights[our_name(name)] for name in made.state_dict()})
    return made.eval()


def bench_serving(
    vocab_size: int,
    rounds: int,
    *,
    block_size: int = 16,
    token_budget: int = 256,
    progress: tqdm | None = None,
) -> dict:
    """What each way takes for the same trace, `rounds` times after one that does not
    count.

    A row for each way has the seconds of each round, their median, the tokens per second
    that it makes, and how many answers are others than the engine's: none, unless two
    logits were so near that rounding decided. "errors" has a row for a way that failed.
    "shares" are the shares of PARTS in the time of the engine's steps.
    """
    trace = make_trace(vocab_size, **TRACE)
    room = max(len(prompt_ids) for prompt_ids, _ in trace)
    room += max(count for _, count in trace)  # static batches write on
    model = random_model(vocab_size, room)
    ways: dict[str, Callable[[], Served]] = {
        "engine": lambda: serve_by_engine(model, trace, block_size, token_budget)
    }
    for size in BATCH_SIZES:
        ways[f"batches of {size}"] = lambda size=size: serve_in_batches(
            model, trace, size
        )
    errors: list[dict] = []
    with contextlib.ExitStack() as stack:
        with _noted(errors, "transformers"):
            server = Transformers(model, trace, **TRANSFORMERS)
            stack.callback(server.close)
            ways["transformers"] = lambda: server.serve(trace)
        served = _take_turns(ways, rounds, errors, progress)
    num_tokens = sum(count for _, count in trace)
    expected = served["engine"][0].answers
    rows = []
    for name, results in served.items():
        seconds = [result.seconds for result in results]
        answers = results[0].answers
        rows.append(
            {
                "name": name,
                "seconds": seconds,
                "median_seconds": statistics.median(seconds),
                "tokens_per_s": num_tokens / statistics.median(seconds),
                "num_different": sum(a != b for a, b in zip(answers, expected)),
            }
        )
    return {
        "vocab_size": vocab_size,
        **SIZES,
        "num_requests": len(trace),
        "num_prompt_tokens": sum(len(prompt_ids) for prompt_ids, _ in trace),
        "num_new_tokens": num_tokens,
        "block_size": block_size,
        "token_budget": token_budget,
        "rounds": rounds,
        "transformers": {"version": transformers_version(), **TRANSFORMERS},
        "rows": rows,
        "num_steps": len(served["engine"][0].steps),
        "shares": shares([step for each in served["engine"] for step in each.steps]),
        "errors": errors,
    }


def shares(steps: Sequence[Step]) -> dict[str, float]:
    """The share of each of PARTS in the seconds of these steps: together they are 1."""
    seconds = {part: sum(step.seconds[part] for step in steps) for part in PARTS}
    return {part: value / sum(seconds.values()) for part, value in seconds.items()}


def transformers_version() -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None


def table_lines(result: dict) -> list[str]:
    """A line for each way: seconds, tokens per second, how often the engine's; then what
    failed, and answers that differ."""
    seconds = {row["name"]: row["seconds"] for row in result["rows"]}
    lines = ["                 seconds  tokens/s   engine / it: median (of rounds)"]
    for row in result["rows"]:
        ratios = [it / own for it, own in zip(row["seconds"], seconds["engine"])]
        lines.append(
            f"{row['name']:14} {row['median_seconds']:9.2f} {row['tokens_per_s']:9.1f}"
            f"   {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    lines += [f"{row['name']:14} {row['error']}" for row in result["errors"]]
    different = [
        f"{row['name']}: {row['num_different']} of {result['num_requests']}"
        for row in result["rows"]
        if row["num_different"]
    ]
    lines.append(
        "answers other than the engine's: " + ", ".join(different)
        if different
        else "all write the same answers"
    )
    parts = ", ".join(f"{p} {100 * share:.1f} %" for p, share in result["shares"].items())
    lines.append(f"the engine's {result['num_steps']} steps: {parts}")
    return lines


def _take_turns(
    ways: dict[str, Callable[[], Served]],
    rounds: int,
    errors: list[dict],
    progress: tqdm | None,
) -> dict[str, list[Served]]:
    """What each way served in each round; nothing of one that failed, and no more turns
    for it."""
    served = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name in list(served):
            with _noted(errors, name):
                result = ways[name]()
                if i > 0:  # the first warms up
                    served[name].append(result)
            if errors and errors[-1]["name"] == name:
                del served[name]
        if progress is not None:
            progress.update()
    return served


@contextlib.contextmanager
def _noted(errors: list[dict], name: str):
    """Append what goes wrong with transformers to `errors`; raise what is our own."""
    try:
        yield
    except ModuleNotFoundError as error:
        if name != "transformers":
            raise
        errors.append({"name": name, "error": f"not measured: {error}"})
    except Exception as error:
        if name != "transformers":
            raise
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        errors.append({"name": name, "error": f"not measured: {words}"})
