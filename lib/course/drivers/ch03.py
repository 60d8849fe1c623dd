"""Chapter 3: run an answer, give plain data."""

from collections.abc import Callable
from numbers import Integral, Real

import numpy as np
import torch

from lib.config import ModelConfig
from lib.course.drivers.ch01 import as_array, as_list, random_model
from lib.generate import forward_cached
from lib.kv_cache import CacheFullError, ContiguousKVCache
from lib.measure.meter import measure


def kv_cache_bytes(
    answer: Callable, config: dict, num_tokens: int, bytes_per_number: int
) -> dict:
    counts = [num_tokens, bytes_per_number]
    if bytes_per_number == 4:  # is the default
        counts = counts[:1]
    return {"bytes": as_number(answer(ModelConfig(**config), *counts))}


def append_kv(
    answer: Callable,
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    seq_lens: np.ndarray,
    query_lens: np.ndarray,
) -> dict:
    caches = [torch.from_numpy(cache.copy()) for cache in (k_cache, v_cache)]
    new = [torch.from_numpy(x) for x in (k, v)]
    lens = [torch.from_numpy(x) for x in (seq_lens, query_lens)]
    cost = measure(lambda: answer(*caches, *new, *lens))
    return {
        "k_cache": as_array(caches[0]),
        "v_cache": as_array(caches[1]),
        "peak_bytes": cost.peak_bytes,
    }


def attend_cached(
    answer: Callable,
    q: np.ndarray,
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    seq_lens: np.ndarray,
    query_lens: np.ndarray,
) -> dict:
    tensors = [torch.from_numpy(x) for x in (q, k_cache, v_cache)]
    lens = [torch.from_numpy(x) for x in (seq_lens, query_lens)]
    cost = measure(lambda: answer(*tensors, *lens))
    return {"out": as_array(cost.value), "peak_bytes": cost.peak_bytes}


def generate_cached(
    answer: Callable,
    model_seed: int,
    cached: list[int],
    room: int,
    prompts: list[list[int]],
    num_new_tokens: int,
    settings: dict,
    draw_seed: int,
) -> dict:
    """cached: how many tokens each request has in the cache before. room: for each."""
    model = random_model(model_seed)
    cache = ContiguousKVCache(model.config, len(prompts), room, dtype=torch.float64)
    for request_id in range(len(prompts)):
        cache.begin(request_id)
    for tensor in (cache.k_cache, cache.v_cache):  # whoever reads further gets NaN
        tensor.fill_(torch.nan)
    query_lens = torch.tensor(cached, dtype=torch.int64)
    generator = torch.Generator().manual_seed(draw_seed)
    token_ids = torch.randint(256, (sum(cached),), generator=generator)
    if len(token_ids):
        forward_cached(model, cache, token_ids, query_lens)
    num_projected = []
    model.blocks[0].attention.q_proj.register_forward_pre_hook(
        lambda _, args: num_projected.append(args[0].numel() // args[0].shape[-1])
    )
    given = [torch.tensor(prompt_ids, dtype=torch.int64) for prompt_ids in prompts]
    run = lambda: answer(  # noqa: E731
        model,
        given,
        num_new_tokens,
        cache,
        generator=torch.Generator().manual_seed(draw_seed),
        **settings,
    )
    try:
        cost = measure(run)
    except CacheFullError:
        return {
            "texts": ["CacheFullError"],
            "tokens_in_the_cache": cache.seq_lens.tolist(),
            "kept_for_a_backward_pass_bytes": 0,
        }
    texts = cost.value
    if not isinstance(texts, (list, tuple)):
        texts = [texts]
    return {
        "texts": [as_list(token_ids) for token_ids in texts],
        "forward_calls": cost.calls["Embedding"],
        "projected_tokens": sum(num_projected),
        "tokens_in_the_cache": cache.seq_lens.tolist(),
        "prompts_are_as_before": [ids.tolist() for ids in given] == prompts,
        "kept_for_a_backward_pass_bytes": cost.saved_bytes,
    }


def kv_utilization(answer: Callable, seq_lens: np.ndarray, max_seq_len: int) -> dict:
    share = answer(torch.from_numpy(seq_lens), max_seq_len)
    return {"utilization": as_number(share)}


def as_number(value) -> float | int | str:
    """A number, or a tensor that holds one; what is neither as a word about it."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else f"a {type(value).__name__}"
