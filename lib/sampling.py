"""Chapter 1: from logits to one token.

Which token to write is decided here and nowhere else: recompute, a cache or a paged cache
give the same logits, and call these functions.
"""

import torch


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
    probability 1 for the largest logit. Returns (..., V).

    >>> logits = torch.tensor([0.5, 0.3, 0.2]).log()
    >>> next_token_probs(logits, top_p=0.6)  # 0.5 alone is too little
    tensor([0.6250, 0.3750, 0.0000])
    """
    check_sampling(temperature, top_k, top_p)

    if temperature == 0:
        largest = logits.argmax(dim=-1, keepdim=True)  # (..., 1)
        return torch.zeros_like(logits).scatter(-1, largest, 1.0)  # (..., V)
    logits = logits - logits.amax(dim=-1, keepdim=True)  # so that nothing overflows
    logits = logits / temperature
    ranked, token_ids = logits.sort(dim=-1, descending=True, stable=True)  # (..., V)
    probs = ranked[..., :top_k].softmax(dim=-1)  # (..., min(top_k, V))
    if top_p < 1:  # at 1 nothing is left out, whatever the rounding of the sum
        # A token is left out when those more probable than it reach top_p already.
        mass_before = probs.cumsum(dim=-1) - probs
        probs = probs.masked_fill(mass_before >= top_p, 0.0)
    probs = probs / probs.sum(dim=-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, token_ids[..., :top_k], probs)  # (..., V)


def sample(probs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw one token from each distribution: probs (..., V) -> token ids (...)."""
    token_ids = torch.multinomial(
        probs.reshape(-1, probs.shape[-1]), num_samples=1, generator=generator
    )
    return token_ids.view(probs.shape[:-1])  # (...)


def check_sampling(temperature: float, top_k: int | None, top_p: float):
    """Raise ValueError for a setting that has no meaning."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(
            f"temperature: expected a number of at least 0 (0 is greedy), "
            f"got {temperature}"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, or None for all, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
