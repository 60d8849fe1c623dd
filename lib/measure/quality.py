"""What a cache costs and what it is worth: bytes per token, and how well a model predicts
with it.

The model reads whole texts through the attention or the cache in question, and is asked
for some of their tokens: all of a passage of the book, or the answers of a text of
lib/recall.py. Two numbers say how well: nats per token asked for, and the share of them
that it finds most likely. Both are given for each draw of texts, so that one sees how
much they depend on the draw.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch.nn.functional import cross_entropy

from lib import generate, kv_cache
from lib.config import ModelConfig, check_count
from lib.kv_cache import KVCache
from lib.model import Attend, Transformer, attend_fused
from lib.text import encode, load_book, random_batch, split_book


@dataclass(frozen=True)
class Examples:
    """Texts of one length, and which of their tokens a model is asked to predict."""

    token_ids: torch.Tensor  # int64 (B, T)
    is_answer: torch.Tensor  # bool (B, T); never a first token

    def to(self, device: torch.device | str) -> "Examples":
        return Examples(self.token_ids.to(device), self.is_answer.to(device))


@dataclass(frozen=True)
class Quality:
    """Of one way to keep keys and values. nats and accuracies: one for each draw."""

    nats: tuple[float, ...]  # per token asked for
    accuracies: tuple[float, ...]  # share of tokens asked for
    bytes_per_token: float

    @property
    def mean_nats(self) -> float:
        return mean(self.nats)

    @property
    def accuracy(self) -> float:
        return mean(self.accuracies)


def measure_quality(
    model: Transformer,
    draws: Sequence[Examples],
    *,
    attend: Attend = attend_fused,
    make_cache: Callable[[ModelConfig, int, int], KVCache] | None = None,
    step_lens: Sequence[int] | None = None,
) -> Quality:
    """How well a model predicts these texts, and what a token of them costs.

    Each draw goes through `attend`, or through a cache: make_cache(config, B, T) gives an
    empty one with room for B texts of T tokens. They come in one step, or in steps of
    step_lens tokens of each text, T in all: what a cache throws out after a step is
    missing only from the next one on. Bytes are those that the cache says it uses in the
    end; without a cache those of the keys and values as they are. Raises ValueError where
    there is no draw, a draw asks for nothing, both attend and make_cache are given, steps
    are given without a cache or are not the whole text, or the model has dropout and is
    in training mode.
    """
    if isinstance(draws, Examples):
        raise ValueError("draws: expected a list of Examples, got one: [examples]")
    if make_cache is not None and attend is not attend_fused:
        raise ValueError("attend: expected without make_cache, whose cache attends")
    if make_cache is None and step_lens is not None:
        raise ValueError("step_lens: expected with make_cache, got them without")
    if step_lens is not None:
        step_lens = list(step_lens)  # for each draw again
    num_answers = [int(examples.is_answer[:, 1:].sum()) for examples in draws]
    if len(draws) == 0 or 0 in num_answers:
        raise ValueError(
            f"draws: expected at least one, each with answers, got {num_answers} answers"
        )
    generate.check_no_dropout(model)
    nats, accuracies = [], []
    num_bytes = kv_cache.kv_cache_bytes(model.config, 1, model.embed.weight.itemsize)
    for examples in draws:
        if make_cache is None:
            token_ids = examples.token_ids
            positions = torch.arange(token_ids.shape[1], device=token_ids.device)
            with torch.no_grad():
                logits = model(token_ids, positions, attend)  # (B, T, V)
        else:
            B, T = examples.token_ids.shape
            cache = make_cache(model.config, B, T)
            for text in range(B):
                cache.begin(text)
            logits = _logits_in_steps(
                model, cache, examples.token_ids, [T] if step_lens is None else step_lens
            )
            num_bytes = cache.used_bytes / (B * T)
        said, right = answers(logits, examples)
        nats.append(cross_entropy(said, right).item())
        accuracies.append((said.argmax(-1) == right).float().mean().item())
    return Quality(tuple(nats), tuple(accuracies), num_bytes)


def _logits_in_steps(
    model: Transformer,
    cache: KVCache,
    token_ids: torch.Tensor,
    step_lens: Sequence[int],
) -> torch.Tensor:
    """token_ids (B, T), a row for each request of an empty cache -> (B, T, V)."""
    B, T = token_ids.shape
    lens = [check_count("step_lens", num_tokens) for num_tokens in step_lens]
    if sum(lens) != T:
        raise ValueError(f"step_lens: expected {T} tokens in all, got {sum(lens)}")
    ones = torch.ones(B, dtype=torch.int64, device=token_ids.device)
    logits = [
        generate.forward_cached(model, cache, new.flatten(), T_new * ones)
        for T_new, new in zip(lens, token_ids.split(lens, dim=1))
    ]
    return torch.cat([some.unflatten(0, (B, -1)) for some in logits], dim=1)  # (B, T, V)


def answers(
    logits: torch.Tensor, examples: Examples
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model said where it was asked, and what was right: logits (answers, V) and
    ids (answers,). logits (B, T, V): [:, t] predicts the token after t."""
    is_asked = examples.is_answer[:, 1:]  # (B, T - 1)
    return logits[:, :-1][is_asked], examples.token_ids[:, 1:][is_asked]


@functools.cache
def _book_parts() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids to train on, and those held out."""
    return split_book(encode(load_book()))


def passages(
    batch_size: int,
    seq_len: int,
    generator: torch.Generator | None = None,
    held_out: bool = True,
) -> Examples:
    """Passages at random places of the book, of the part that no model was trained on, or
    of the other: (B, seq_len); each token but the first is asked for."""
    check_count("batch_size", batch_size)
    check_count("seq_len", seq_len)
    part = _book_parts()[1 if held_out else 0]
    token_ids = random_batch(part, batch_size, seq_len, generator)
    is_answer = torch.ones_like(token_ids, dtype=torch.bool)
    is_answer[:, 0] = False
    return Examples(token_ids, is_answer)
