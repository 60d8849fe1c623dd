"""Chapters 1 and 3: generate text, first by recomputing everything, then with a cache.

A language model gives probabilities for one next token. To write N of them, ask N
times, each time with all the text so far. That is the whole of `generate_recompute`,
and also what is wrong with it: step t does the work of all steps before it again.
`generate_cached` asks as often, but hands over only the tokens that are new; the rest is
in a cache, of whatever kind (lib/kv_cache.py, lib/paged_kv_cache.py).

    python -m lib.generate "Call me Ishmael"
    python -m lib.generate --model FOLDER --chat --cache contiguous "Who is Ishmael?"

writes with either way, and says what it took (lib/command.py); --model is one that
others trained (lib/weights.py).

Read lib/model.py and lib/sampling.py before.
"""

import sys
from collections.abc import Sequence

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


if __name__ == "__main__":
    from lib import command  # which imports this file

    sys.exit(command.main())
