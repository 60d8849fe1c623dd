"""The capstone of chapter 9: a memory of one's own, held to what any memory promises.

`try_memory` looks whether it is one, and then trains a model with it, as those of
lib/recall.py were trained, and says how much it recalls. Any subclass of
`lib.state.Memory` can be tried: chapter 9 says what to try.

A memory is what its `attend` gives to be kept, and nothing else: each call goes to a copy
of the object, with copies of the tensors, while another text is read in turns with it.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lib import recall
from lib.config import check_count
from lib.measure.quality import Quality, measure_quality
from lib.model import Transformer
from lib.state import Memory, StateCache

MOST_BYTES = 8192  # of a layer, for a text of any length: a state of PAIRS
MOST_TOKENS = recall.PAIRS.model.max_seq_len  # no text is longer
PREFIXES = 1, 12, 128  # tokens of the beginnings that are read at once too
# Tokens of each step: of a text that is written, mostly, and of one that is a prompt.
STEPS = (
    [1] * 48 + [2, 64, 5, 513, *[1] * 8, MOST_TOKENS - 648, *[1] * 8],
    [MOST_TOKENS],
)
# Between a text in steps and at once, of numbers of about 1: room for 16 bits.
TOLERANCE = 0.1
NUM_PAIRS = 8, 16, 32

Heads = Sequence[torch.Tensor]  # q (..., T, H, D), k and v (..., T, G, D)
Kept = tuple[torch.Tensor, ...]


def try_memory(memory: Memory, num_steps: int | None = None, seed: int = 0) -> str:
    """What `memory` comes to, in words: its bytes, and the share of 8, 16 and 32 pairs
    that a model recalls which was trained with it for `num_steps` steps; None for as many
    as those of lib/recall.py (about a minute), 0 for no training.

    Raises ValueError where it is no `Memory`, keeps more than MOST_BYTES, gives something
    else step by step than at once, answers from what it was not given to keep or from
    later tokens, changes what it was given, or cannot be trained.
    """
    if num_steps is None:
        num_steps = recall.PAIRS.num_steps
    check_count("num_steps", num_steps, at_least=0)
    num_bytes = check_memory(memory)
    words = f"{num_bytes:,} bytes per layer; step by step as at once"
    if num_steps == 0:
        return words
    recipe = replace(recall.PAIRS, memories=(recall.NEAR, memory), num_steps=num_steps)
    model, _ = recall.train_recipe(recipe, seed)
    shares = [recalled(model, recipe, num_pairs).accuracy for num_pairs in NUM_PAIRS]
    found = ", ".join(f"{share:.0%} of {P}" for P, share in zip(NUM_PAIRS, shares))
    return f"{words}; recalls {found} pairs"


def recalled(model: Transformer, recipe: recall.Recipe, num_pairs: int) -> Quality:
    """Of three draws of 32 texts that no training has seen. A cache of the recipe's
    memories is told in one step and asked in the next: what is recalled was kept."""
    draws = [
        recall.draw_pairs(32, num_pairs, torch.Generator().manual_seed(2**31 + draw))
        for draw in range(3)
    ]
    return measure_quality(
        model,
        draws,
        make_cache=lambda config, B, T: StateCache(config, B, recipe.memories),
        step_lens=[2 * num_pairs] * 2,
    )


def check_memory(memory: Memory) -> int:
    """The bytes that it keeps, at most; ValueError as of `try_memory`."""
    if not isinstance(memory, Memory):
        raise ValueError(f"memory: expected a Memory, as Delta(), got {memory!r}")
    texts = [_random_heads(MOST_TOKENS, seed) for seed in (0, 1)]
    with torch.no_grad():
        at_once = [_attend_all(memory, text) for text in texts]
        _check_beginnings(memory, texts, at_once)
        most = 0
        for lens in STEPS:
            outs, num_bytes = _read_in_turns(memory, texts, lens)
            most = max(most, num_bytes)
            same = "the same from attend_all and from attend, step by step"
            for out, expected in zip(outs, at_once):
                _check_same(out, expected, f"{same}, from what attend has kept alone")
    _check_gradients(memory, texts)
    return most


def _check_beginnings(
    memory: Memory, texts: Sequence[Heads], at_once: Sequence[torch.Tensor]
):
    """At once, of each text alone and of both side by side."""
    for T in PREFIXES:
        heads = [x[:T] for x in texts[0]]
        same = f"the same of {_tokens(T)} and of a text that begins so"
        _check_same(_attend_all(memory, heads), at_once[0][:T], f"{same}, at once")
        both = [torch.stack([x[:T] for x in pair]) for pair in zip(*texts)]
        expected = torch.stack([out[:T] for out in at_once])
        same = "the same of texts side by side (2, T, H, D) and of each alone"
        _check_same(_attend_all(memory, both), expected, f"{same}, at once")


def _read_in_turns(
    memory: Memory, texts: Sequence[Heads], lens: Sequence[int]
) -> tuple[list[torch.Tensor], int]:
    """What texts hear that are read step by step, each (T, H, D), and the bytes that were
    kept of one, at most."""
    kept = [_empty(memory) for _ in texts]
    outs, most = [[] for _ in texts], max(map(_num_bytes, kept))
    for step, new in enumerate(zip(*(_in_steps(text, lens) for text in texts))):
        for text, heads in enumerate(new):
            out, now = _attend(memory, kept[text], heads)
            outs[text].append(out)
            most = max(most, _num_bytes(now))
            if most > MOST_BYTES:
                is_part = sum(x.nbytes for x in now) < sum(_storages(now).values())
                hint = ": a part of a tensor keeps all of it, unless you clone it"
                raise ValueError(
                    f"memory: expected at most {MOST_BYTES:,} bytes per layer, got "
                    f"{most:,} after {_tokens(sum(lens[: step + 1]))}{hint * is_part}"
                )
            kept[text] = tuple(x.clone() for x in now)
    return [torch.cat(out) for out in outs], most


def _check_gradients(memory: Memory, texts: Sequence[Heads]):
    both = [torch.stack([x[:12] for x in pair]) for pair in zip(*texts)]
    leaves = [x.requires_grad_() for x in both]
    with torch.enable_grad():
        loss = _attend_all(memory, [x.clone() for x in leaves]).square().sum()
        grads = [None] * 3
        if loss.requires_grad:
            try:
                grads = torch.autograd.grad(loss, leaves, allow_unused=True)
            except RuntimeError as error:
                raise ValueError(
                    f"memory: expected gradients, got RuntimeError: {error}"
                ) from error
    for name, grad in zip("qkv", grads):
        if grad is None or not grad.isfinite().all():
            got = "none" if grad is None else "some that are not finite"
            raise ValueError(f"memory: expected gradients of {name}, got {got}")


# One call of a method, and what it may do.


def _call(memory: Memory, method: str, *args: Any) -> Any:
    """Of a copy of the memory, so that it cannot keep anything beside what it gives."""
    try:
        return getattr(copy.deepcopy(memory), method)(*args)
    except Exception as error:
        if "is yours to write" in str(error):  # of a release, where it is not there yet
            raise
        shapes = [tuple(x.shape) for x in args[-3:] if isinstance(x, torch.Tensor)]
        given = f" with q {shapes[0]}" if shapes else ""
        raise ValueError(
            f"memory: expected {method} to run{given}, got "
            f"{type(error).__name__}: {error}"
        ) from error


def _empty(memory: Memory) -> Kept:
    kept = _call(memory, "empty", recall.PAIRS.model, torch.float32, "cpu")
    _check_kept("empty", kept)
    return kept


def _attend(memory: Memory, kept: Kept, heads: Heads) -> tuple[torch.Tensor, Kept]:
    before = [x.clone() for x in (*kept, *heads)]
    found = _call(memory, "attend", kept, *heads)
    if not isinstance(found, tuple) or len(found) != 2:
        got = f"{len(found)} things" if isinstance(found, tuple) else _kind(found)
        raise ValueError(f"memory: expected out and what is kept from attend, got {got}")
    out, now = found
    _check_kept("attend", now)
    _check_unchanged("attend", before, (*kept, *heads))
    _check_out("attend", out, heads[0])
    if _storages([out]).keys() & _storages(now).keys():
        raise ValueError(
            "memory: expected out in memory of its own, got a part of what is kept: "
            "clone it"
        )
    return out, now


def _attend_all(memory: Memory, heads: Heads) -> torch.Tensor:
    before = [x.detach().clone() for x in heads]
    out = _call(memory, "attend_all", *heads)
    _check_unchanged("attend_all", before, heads)
    _check_out("attend_all", out, heads[0])
    return out


def _check_kept(method: str, kept: Any):
    """A tuple of tensors, and nothing that could hide in one."""
    if not isinstance(kept, tuple):
        got = _kind(kept)
        raise ValueError(f"memory: expected {method} to keep a tuple, got {got}")
    for x in kept:
        if type(x) is not torch.Tensor or x.layout != torch.strided:
            layout = f" ({x.layout})" if type(x) is torch.Tensor else ""
            raise ValueError(
                f"memory: expected {method} to keep plain tensors, got {_kind(x)} among "
                f"them{layout}"
            )


def _check_unchanged(method: str, before: Heads, after: Heads):
    """NaN is as it was where it was NaN."""
    for one, two in zip(before, after):
        is_same = one.shape == two.shape and ((one == two) | (one != one)).all()
        if not is_same:
            raise ValueError(
                f"memory: expected {method} to leave the tensors that it is given as "
                "they were, it changed one in place: make a new one"
            )


def _check_out(method: str, out: Any, q: torch.Tensor):
    expected = f"{q.dtype} {tuple(q.shape)}"
    if not isinstance(out, torch.Tensor):
        got = _kind(out)
    elif out.shape != q.shape or out.dtype != q.dtype:
        got = f"{out.dtype} {tuple(out.shape)}"
    elif not out.isfinite().all():
        expected, got = "finite numbers", "some that are not"
    else:
        return
    raise ValueError(f"memory: expected {expected} from {method}, got {got}")


def _tokens(num_tokens: int) -> str:
    return f"{num_tokens:,} token{'s' if num_tokens > 1 else ''}"


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _check_same(got: torch.Tensor, expected: torch.Tensor, same: str):
    off = (got - expected).abs()  # (..., T, H, D)
    if off.max() > TOLERANCE:
        by_token = off.amax(dim=(-2, -1)).view(-1, off.shape[-3]).amax(dim=0)  # (T,)
        where = int(by_token.argmax())
        raise ValueError(
            f"memory: expected {same}; they differ by {off.max():.2g}, most at token "
            f"{where}"
        )


def _storages(tensors: Heads) -> dict[int, int]:
    """The bytes of each piece of memory in which tensors lie, by its address."""
    storages = [x.untyped_storage() for x in tensors]
    return {one.data_ptr(): one.nbytes() for one in storages if one.nbytes()}


def _num_bytes(kept: Kept) -> int:
    """With all of the memory in which they lie: a part of a tensor holds the whole. Of a
    tensor without numbers its shape counts: it could be one."""
    of_shapes = sum(8 * x.dim() for x in kept if x.numel() == 0)
    return of_shapes + sum(_storages(kept).values())


def _random_heads(num_tokens: int, seed: int) -> list[torch.Tensor]:
    """q (T, H, D), k and v (T, G, D) of the model that is trained."""
    config, generator = recall.PAIRS.model, torch.Generator().manual_seed(seed)
    return [
        torch.randn(num_tokens, heads, config.head_dim, generator=generator)
        for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    ]


def _in_steps(heads: Heads, lens: Sequence[int]):
    return zip(*(x.split(lens) for x in heads))
