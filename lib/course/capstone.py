"""The capstone of chapter 9: a memory of one's own, held to what any memory promises.

`try_memory` looks whether it is one, and then trains a model with it, as those of
lib/recall.py were trained, and says how much it recalls. Any subclass of
`lib.state.Memory` can be tried: chapter 9 says what to try.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from lib import recall
from lib.config import check_count
from lib.measure.quality import Quality, measure_quality
from lib.model import Transformer
from lib.state import Memory

MOST_BYTES = 8192  # of a layer, for a text of any length: a state of PAIRS
TEXT_LENS = 1, 64, 1000  # tokens after which they are counted
TOLERANCE = 1e-3  # between a text in steps and at once, of numbers of about 1
NUM_PAIRS = 8, 16, 32


def try_memory(memory: Memory, num_steps: int | None = None, seed: int = 0) -> str:
    """What `memory` comes to, in words: its bytes, and the share of 8, 16 and 32 pairs
    that a model recalls which was trained with it for `num_steps` steps; None for as many
    as those of lib/recall.py (about a minute), 0 for no training.

    Raises ValueError where it is no `Memory`, keeps more than MOST_BYTES, gives something
    else step by step than at once, answers from what it was not given to keep, or cannot
    be trained.
    """
    recipe = replace(recall.PAIRS, memories=(recall.NEAR, memory))
    if num_steps is None:
        num_steps = recipe.num_steps
    check_count("num_steps", num_steps, at_least=0)
    num_bytes = check_memory(memory)
    words = f"{num_bytes:,} bytes per layer; step by step as at once"
    if num_steps == 0:
        return words
    recipe = replace(recipe, num_steps=num_steps)
    model, _ = recall.train_recipe(recipe, seed)
    shares = [recalled(model, recipe, num_pairs).accuracy for num_pairs in NUM_PAIRS]
    found = ", ".join(f"{share:.0%} of {P}" for P, share in zip(NUM_PAIRS, shares))
    return f"{words}; recalls {found} pairs"


def recalled(model: Transformer, recipe: recall.Recipe, num_pairs: int) -> Quality:
    """Of three draws of 32 texts that no training has seen."""
    draws = [
        recall.draw_pairs(32, num_pairs, torch.Generator().manual_seed(2**31 + draw))
        for draw in range(3)
    ]
    return measure_quality(model, draws, attend=recipe.attend)


def check_memory(memory: Memory) -> int:
    """The bytes that it keeps, at most; ValueError as of `try_memory`."""
    longest = max(TEXT_LENS)
    one, other = (_random_heads(longest, seed) for seed in (0, 1))
    with torch.no_grad():
        at_once = memory.attend_all(*one)
        _check_shape("attend_all", at_once, one[0].shape)
        # Step by step, while another text comes in between.
        first, second = 48, longest - 48
        lens = [1] * first + [second // 2, second - second // 2]
        kept, kept_of_other = (_empty(memory) for _ in range(2))
        outs, most, num_seen = [], _num_bytes(kept), 0
        for mine, others in zip(_in_steps(one, lens), _in_steps(other, lens)):
            out, kept = memory.attend(kept, *mine)
            _, kept_of_other = memory.attend(kept_of_other, *others)
            _check_shape("attend", out, mine[0].shape)
            outs.append(out)
            num_seen += len(out)
            most = max(most, _num_bytes(kept))
            if most > MOST_BYTES:
                raise ValueError(
                    f"memory: expected at most {MOST_BYTES:,} bytes per layer, got "
                    f"{most:,} after {num_seen} tokens"
                )
    off = (torch.cat(outs) - at_once).abs()
    if not off.max() <= TOLERANCE:  # NaN is more
        where = int(off.nan_to_num(torch.inf).amax(dim=(1, 2)).argmax())
        raise ValueError(
            "memory: expected the same from attend_all and from attend, step by step, "
            f"while another text is read; they differ by {off.max():.2g}, most at token "
            f"{where}"
        )
    _check_gradients(memory)
    return most


def _check_gradients(memory: Memory):
    heads = [x.unsqueeze(0).requires_grad_() for x in _random_heads(12, seed=2)]
    out = memory.attend_all(*heads)
    _check_shape("attend_all of texts (1, T, H, D)", out, heads[0].shape)
    out.square().sum().backward()
    for name, x in zip("qkv", heads):
        if x.grad is None or not x.grad.isfinite().all():
            got = "none" if x.grad is None else "some that are not finite"
            raise ValueError(f"memory: expected gradients of {name}, got {got}")


def _empty(memory: Memory) -> tuple[torch.Tensor, ...]:
    return memory.empty(recall.PAIRS.model, torch.float32, "cpu")


def _num_bytes(kept: Sequence[torch.Tensor]) -> int:
    """With all of the memory in which they lie: a part of a tensor holds the whole."""
    if not all(isinstance(x, torch.Tensor) for x in kept):
        raise ValueError(f"memory: expected to keep tensors, got {kept!r}")
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in kept}
    return sum(storage.nbytes() for storage in storages.values())


def _check_shape(name: str, out: torch.Tensor, shape: torch.Size):
    if not isinstance(out, torch.Tensor) or out.shape != shape:
        got = tuple(out.shape) if isinstance(out, torch.Tensor) else out
        raise ValueError(f"memory: expected {tuple(shape)} from {name}, got {got}")


def _random_heads(num_tokens: int, seed: int) -> list[torch.Tensor]:
    """q (T, H, D), k and v (T, G, D) of the model that is trained."""
    config, generator = recall.PAIRS.model, torch.Generator().manual_seed(seed)
    return [
        torch.randn(num_tokens, heads, config.head_dim, generator=generator)
        for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    ]


def _in_steps(heads: Sequence[torch.Tensor], lens: Sequence[int]):
    return zip(*(x.split(lens) for x in heads))
