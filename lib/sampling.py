"""Chapter 1: from logits to one token.

Which token to write is decided here and nowhere else: recompute, a cache or a paged cache
give the same logits, and call these functions.
"""

import torch
import torch.nn.functional as F


def next_token_probs(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> torch.Tensor:
    """Probabilities of the next token.

    logits (..., V). In this order: divide by `temperature`; keep the `top_k` largest;
    of what is left, keep the smallest set of most probable tokens whose probabilities
    sum to at least `top_p` (nucleus sampling, https://arxiv.org/abs/1904.09751). What
    is not kept has probability 0, the rest sums to 1. Temperature 0 is greedy:
    probability 1 for the largest logit. Of equal logits the one with the smaller id
    goes first. Returns (..., V), in float32 where the logits have less. Raises ValueError
    for settings without a meaning, and (not on a GPU, where looking would mean waiting)
    for logits that give no probabilities: NaN, infinity, or nothing but -infinity.

    >>> logits = torch.tensor([0.5, 0.3, 0.2]).log()
    >>> next_token_probs(logits, top_p=0.6)  # 0.5 alone is too little
    tensor([0.6250, 0.3750, 0.0000])
    """
    check_sampling(temperature, top_k, top_p)
    logits = subtract_largest(logits)  # (..., V): no exponential overflows

    if temperature == 0:
        largest = logits.argmax(dim=-1, keepdim=True)  # (..., 1)
        return torch.zeros_like(logits).scatter(-1, largest, 1.0)  # (..., V)
    logits = logits / max(temperature, torch.finfo(logits.dtype).tiny)
    ranked, token_ids = logits.sort(dim=-1, descending=True, stable=True)  # (..., V)
    probs = ranked[..., :top_k].softmax(dim=-1)  # (..., min(top_k, V))
    if top_p < 1:  # at 1 nothing is left out, whatever the rounding of the sum
        # A token is left out when those more probable than it reach top_p already.
        mass_before = F.pad(probs.cumsum(dim=-1)[..., :-1], (1, 0))
        probs = probs.masked_fill(mass_before >= top_p, 0.0)
    probs = probs / probs.sum(dim=-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, token_ids[..., :top_k], probs)  # (..., V)


def sample(probs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw one token from each distribution: probs (..., V) -> token ids (...)."""
    token_ids = torch.multinomial(
        probs.reshape(-1, probs.shape[-1]), num_samples=1, generator=generator
    )
    return token_ids.view(probs.shape[:-1])  # (...)


def subtract_largest(logits: torch.Tensor) -> torch.Tensor:
    """Logits (..., V) of which each row's largest is 0: the same probabilities.

    In float32 where they have less. Raises ValueError as `next_token_probs` says.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (..., V)
    largest = logits.amax(dim=-1, keepdim=True)  # (..., 1), NaN where a row has one
    if not logits.is_cuda and not largest.isfinite().all():
        raise ValueError(
            f"logits: expected numbers, or -inf beside some number, got a row whose "
            f"largest is {largest[~largest.isfinite()][0].item()}"
        )
    return logits - largest  # (..., V)


def check_sampling(temperature: float, top_k: int | None, top_p: float):
    """Raise ValueError for a setting that has no meaning."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(
            f"temperature: expected a number of at least 0 (0 is greedy), "
            f"got {temperature}"
        )
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(
            f"top_k: expected an integer of at least 1, or None for all, got {top_k!r}"
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
