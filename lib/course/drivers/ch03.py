"""Chapter 3: run an answer, give plain data."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch

from lib import sampling
from lib.config import ModelConfig
from lib.course.drivers.ch01 import (
    DEFAULTS,
    as_array,
    as_list,
    as_number,
    begin_training,
    count_calls,
    kept_for_a_backward_pass,
    next_random_number,
    random_model,
    refusal,
    write_behind,
)
from lib.generate import forward_cached
from lib.kv_cache import CacheFullError, ContiguousKVCache
from lib.measure.meter import measure
from lib.model import Transformer


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
    cached: list[int | None],
    room: int,
    prompts: list[list[int]],
    num_new_tokens: int,
    settings: dict,
    draw_seed: int,
    has_generator: bool,
    behind: list[int | None],
    training_dropout: float | None,
) -> dict:
    """cached: how many tokens each request has in the cache before; None, in the last
    rows, where none has begun. room: for each.
    behind: where it is not empty, for each token the one that the model writes behind it,
    or None. training_dropout: where it is not None, the model comes in training mode,
    with that probability."""
    model = random_model(model_seed)
    if behind:
        write_behind(model, behind)
    cache = ContiguousKVCache(model.config, len(cached), room, dtype=torch.float64)
    for request_id, count in enumerate(cached):
        if count is not None:
            cache.begin(request_id)
    for tensor in (cache.k_cache, cache.v_cache):  # whoever reads further gets NaN
        tensor.fill_(torch.nan)
    if any(cached):
        generator = torch.Generator().manual_seed(draw_seed)
        token_ids = torch.randint(256, (sum(cached),), generator=generator)
        forward_cached(model, cache, token_ids, torch.tensor(cached))
    if training_dropout is not None:
        begin_training(model, training_dropout)
    num_projected, num_calls = [], count_calls(model)
    model.blocks[0].attention.q_proj.register_forward_pre_hook(
        lambda _, args: num_projected.append(args[0].numel() // args[0].shape[-1])
    )
    given = [torch.tensor(prompt_ids, dtype=torch.int64) for prompt_ids in prompts]
    generator = torch.Generator().manual_seed(draw_seed) if has_generator else None
    options = {"generator": generator, **settings}
    torch.manual_seed(draw_seed + 1)
    state = torch.get_rng_state()
    try:
        with (
            torch.enable_grad(),
            _choices_seen(model) as seen,
            kept_for_a_backward_pass() as kept,
        ):
            texts = answer(model, given, num_new_tokens, cache, **options)
            are_gradients_on = torch.is_grad_enabled()
    except (CacheFullError, ValueError) as error:
        refused = refusal(error, "generate_cached", answer)
        return {**refused, "tokens_in_the_cache": cache.seq_lens.tolist()}
    is_torch_as_before = torch.equal(state, torch.get_rng_state())
    if not isinstance(texts, (list, tuple)):
        texts = [texts]
    return {
        "raised": "nothing",
        "texts": [as_list(token_ids) for token_ids in texts],
        "forward_calls": len(num_calls),
        "projected_tokens": sum(num_projected),
        "tokens_in_each_call": num_projected,
        "tokens_in_the_cache": cache.seq_lens.tolist(),
        "prompts_are_as_before": [ids.tolist() for ids in given] == prompts,
        "random_state_of_torch_is_as_before": is_torch_as_before,
        "next_random_number": next_random_number(settings, generator),
        "gradients_are_on_as_before": are_gradients_on,
        "model_is_in_its_mode_as_before": model.training
        == (training_dropout is not None),
        "tensors_kept_for_a_backward_pass": len(kept),
        **_other_choices(seen, settings, [len(ids) for ids in prompts]),
    }


@contextlib.contextmanager
def _choices_seen(model: Transformer) -> Iterator[list]:
    """While inside, what next_token_probs gets is kept: the logits, those that the model
    gave before, and the settings."""
    seen, given = [], []
    original = sampling.next_token_probs

    def next_token_probs(logits, temperature=1.0, top_k=None, top_p=1.0):
        if given:
            copy = logits.detach().clone()
            seen.append((copy, given[-1], [temperature, top_k, top_p]))
        return original(logits, temperature, top_k, top_p)

    hook = model.register_forward_hook(
        lambda _, args, logits: given.append(logits.detach().clone())
    )
    sampling.next_token_probs = next_token_probs
    try:
        yield seen
    finally:
        hook.remove()
        sampling.next_token_probs = original


def _other_choices(seen: list, settings: dict, prompt_lens: list[int]) -> dict:
    """What was chosen wrongly: the settings, or rows of the logits. Empty where nothing
    was, or nobody can tell."""
    found = {}
    asked = [settings.get(name, default) for name, default in DEFAULTS.items()]
    if any(used != asked for *_, used in seen):
        found["other_settings"] = True
    last_rows = {  # by the number of new tokens: of the prompts, or one of each request
        len(prompt_lens): np.arange(len(prompt_lens)),
        sum(prompt_lens): np.cumsum(prompt_lens) - 1,
    }
    for rows, logits, _ in seen:
        right = last_rows.get(len(logits))
        if rows.dim() != 2 or right is None or torch.equal(rows, logits[right]):
            continue
        if all((row == logits).all(dim=-1).any() for row in rows):
            found["other_rows"] = True
    return found


def kv_utilization(answer: Callable, seq_lens: np.ndarray, max_seq_len: int) -> dict:
    share = answer(torch.from_numpy(seq_lens), max_seq_len)
    return {"utilization": as_number(share)}
