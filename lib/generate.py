"""Chapter 1: generate text by recomputing everything.

A language model gives probabilities for one next token. To write N of them, ask N
times, each time with all the text so far. That is the whole of `generate_recompute`,
and also what is wrong with it: step t does the work of all steps before it again.
Chapter 3 keeps what can be kept.

Read lib/model.py and lib/sampling.py before.
"""

import torch

from lib import sampling
from lib.config import ModelConfig
from lib.model import Attend, Transformer, attend_fused


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


def check_generation(model: Transformer, prompt_ids: torch.Tensor, num_new_tokens: int):
    """Raise ValueError unless there is a prompt, room for more, and no dropout."""
    prompt_len = prompt_ids.shape[-1] if prompt_ids.dim() else 0
    if prompt_len == 0:
        raise ValueError("prompt_ids: expected at least one token, got none")
    if num_new_tokens < 0:
        raise ValueError(f"num_new_tokens: expected at least 0, got {num_new_tokens}")
    if prompt_len + num_new_tokens > model.config.max_seq_len:
        raise ValueError(
            f"expected at most max_seq_len = {model.config.max_seq_len} tokens, "
            f"got {prompt_len} in the prompt + {num_new_tokens} new"
        )
    if model.training and model.config.dropout > 0:
        raise ValueError("model: expected eval mode, got training mode, with dropout")
