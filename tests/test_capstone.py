"""What the capstone of chapter 9 lets through, and what it refuses in which words."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lib import recall
from lib.course import capstone
from lib.state import Delta, Linear, Memory, StateCache, Window, linear_step

CONFIG = recall.PAIRS.model


def tried(memory):
    return capstone.try_memory(memory, num_steps=0)


def step_by_step(memory, q, k, v):
    """`attend_all` of a memory that is written as `attend` alone, from an empty one."""
    if q.dim() > 3:
        texts = zip(*(x.flatten(0, -4) for x in (q, k, v)))
        return torch.stack([step_by_step(memory, *text) for text in texts]).view_as(q)
    kept, outs = memory.empty(CONFIG, q.dtype, q.device), []
    for new in zip(q.split(1), k.split(1), v.split(1)):
        out, kept = memory.attend(kept, *new)
        outs.append(out)
    return torch.cat(outs)


# Memories.


class DecayAndDelta(Memory):
    """Gated DeltaNet with a constant decay; token by token."""

    def empty(self, config, dtype, device):
        return Delta().empty(config, dtype, device)

    def attend(self, kept, q, k, v):
        (state,), outs = kept, [q[:0]]
        decay = k.new_full((k.shape[1],), 0.95)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        for q_t, k_t, v_t in zip(q, k, v):
            said = torch.einsum("gij,gj->gi", state, k_t)
            out, state = linear_step(state, q_t, k_t, v_t - 0.95 * said, decay)
            outs.append(out[None])
        return torch.cat(outs), (state,)

    def attend_all(self, q, k, v):
        return step_by_step(self, q, k, v)


class WindowBesideState(Memory):
    """Half of each: a window of 4 tokens, and a state of the first 26 numbers."""

    near, far = Window(4), Delta()

    def empty(self, config, dtype, device):
        return (*self.near.empty(config, dtype, device), torch.zeros(2, 26, 26))

    def attend(self, kept, q, k, v):
        near, (newest, values) = self.near.attend(kept[:2], q, k, v)
        far, (state,) = self.far.attend(kept[2:], *self.narrow(q, k, v))
        return near + F.pad(far, (0, 6)), (newest, values, state)

    def attend_all(self, q, k, v):
        far = self.far.attend_all(*self.narrow(q, k, v))
        return self.near.attend_all(q, k, v) + F.pad(far, (0, 6))

    def narrow(self, *heads):
        return [x[..., :26] for x in heads]


class WideIn16Bits(Memory):
    """Keys of 64 numbers, the positive and the negative part of each; a state of 32 by 64
    in 16 bits, that of the sum with a decay or of the delta rule."""

    def __init__(self, dtype, decay):
        self.dtype, self.decay = dtype, decay

    def empty(self, config, dtype, device):
        return (torch.zeros(2, 32, 64, dtype=self.dtype, device=device),)

    def attend(self, kept, q, k, v):
        (state,), outs = kept, [q[:0]]
        q, k = self.wide(q), self.wide(k)
        decays = k.new_full((k.shape[1],), self.decay or 1.0)
        for q_t, k_t, v_t in zip(q, k, v):
            state = state.to(q.dtype)
            said = 0 if self.decay else torch.einsum("gij,gj->gi", state, k_t)
            out, state = linear_step(state, q_t, k_t, v_t - said, decays)
            state = state.to(self.dtype)
            outs.append(self.answer(out)[None])
        return torch.cat(outs), (state,)

    def attend_all(self, q, k, v):
        """As if there were bits enough."""
        exact = WideIn16Bits(torch.float32, self.decay)
        return step_by_step(exact, q, k, v)

    def answer(self, out):
        return F.rms_norm(out, out.shape[-1:], eps=1e-5) if self.decay else out

    def wide(self, x):
        return F.normalize(torch.cat([x.relu(), (-x).relu()], dim=-1), dim=-1)


class OnlyEveryOther(Memory):
    """A step in which nothing is written keeps what was there: the same tensors."""

    def empty(self, config, dtype, device):
        return torch.zeros(2, 32, device=device), torch.zeros((), dtype=torch.int64)

    def attend(self, kept, q, k, v):
        (mean, count), outs = kept, [q[:0]]
        for v_t in v:
            if int(count) % 2 == 0:
                mean = mean + (v_t - mean) / (1 + count / 2)
            count = count + 1
            outs.append(mean[None].clone())
        return torch.cat(outs) if len(v) else v, (mean, count)

    def attend_all(self, q, k, v):
        shares = torch.arange(v.shape[-3]) % 2 == 0
        weights = shares.to(v.dtype)[:, None, None]
        sums = (v * weights).cumsum(dim=-3)
        return sums / weights.cumsum(dim=0) + 0 * (q + k)


GOOD = {
    "sum": (Linear(), 8192),
    "decay": (Linear(0.97), 8192),
    "delta": (Delta(), 8192),
    "window": (Window(16), 7680),
    "as long as fits": (Window(17), 8192),
    "decay and delta": (DecayAndDelta(), 8192),
    "window and state": (WindowBesideState(), 2 * 3 * 256 + 2 * 26 * 26 * 4),
    "a sum of wide keys in bfloat16": (WideIn16Bits(torch.bfloat16, 0.97), 8192),
    "a sum of wide keys in float16": (WideIn16Bits(torch.float16, 0.97), 8192),
    "delta of wide keys in bfloat16": (WideIn16Bits(torch.bfloat16, None), 8192),
    "a sum without decay in bfloat16": (WideIn16Bits(torch.bfloat16, 1.0), 8192),
    "delta of wide keys in float16": (WideIn16Bits(torch.float16, None), 8192),
    "a mean of every other": (OnlyEveryOther(), 264),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_memory_passes_and_its_bytes_are_told(name):
    memory, num_bytes = GOOD[name]
    words = f"{num_bytes:,} bytes per layer; step by step as at once"
    assert tried(memory) == words


@pytest.mark.parametrize("name", ["decay", "window", "window and state"])
def test_the_bytes_are_those_of_a_cache_of_the_memory(name):
    memory, num_bytes = GOOD[name]
    cache = StateCache(CONFIG, 1, memory)
    cache.begin("a")
    text = [torch.randn(40, 2, 32) for _ in range(3)]
    with cache.extend(torch.tensor([40])) as attend:
        for layer in range(CONFIG.num_layers):
            attend(layer, *text)
    assert cache.used_bytes == CONFIG.num_layers * num_bytes


def test_after_training_it_says_what_is_recalled(monkeypatch):
    monkeypatch.setattr(capstone, "NUM_PAIRS", (1, 2))
    words = capstone.try_memory(Window(4), num_steps=1)
    assert words.startswith("1,536 bytes per layer; step by step as at once; recalls ")
    assert words.endswith("% of 2 pairs")


def test_what_is_recalled_is_what_a_cache_answers():
    """Not what `attend_all` says, which sees the text again."""
    recipe, model = recall.RECIPES["pairs_delta"], recall.load("pairs_delta")
    assert capstone.recalled(model, recipe, 8).accuracy > 0.95
    forgetful = of(attend_all=Delta.attend_all, attend=answers_nothing)()
    recipe = replace(recipe, memories=(recall.NEAR, forgetful))
    assert capstone.recalled(model, recipe, 8).accuracy < 0.1


# What is none.


def of(base=Delta, **methods):
    """A class like `base`, with other methods."""
    return type("Mine", (base,), methods)


def answers_nothing(self, kept, q, k, v):
    return 0 * q, kept


class Everything(Memory):
    """Softmax attention to all tokens. How it keeps them: `pack`, `unpack`."""

    def empty(self, config, dtype, device):
        return self.pack(torch.zeros(0, 2, 32), torch.zeros(0, 2, 32))

    def attend(self, kept, q, k, v):
        k, v = (torch.cat([old, new]) for old, new in zip(self.unpack(kept), (k, v)))
        return Window(10**9)._attend(q, k, v), self.pack(k, v)

    def attend_all(self, q, k, v):
        return Window(10**9).attend_all(q, k, v)

    def pack(self, k, v):
        return k, v

    def unpack(self, kept):
        return kept


class InSelf(Everything):
    def __init__(self):
        self.seen = torch.zeros(0, 2, 32), torch.zeros(0, 2, 32)

    def pack(self, k, v):
        self.seen = k, v
        return (torch.zeros(1),)

    def unpack(self, kept):
        return self.seen


class InItsClass(InSelf):
    seen = torch.zeros(0, 2, 32), torch.zeros(0, 2, 32)

    def __init__(self):
        pass

    def empty(self, config, dtype, device):
        InItsClass.seen = torch.zeros(0, 2, 32), torch.zeros(0, 2, 32)
        return (torch.zeros(1),)

    def pack(self, k, v):
        InItsClass.seen = k, v
        return (torch.zeros(1),)


class OnATensor(InSelf):
    """As an attribute of the tensor that is kept."""

    def pack(self, k, v):
        x = torch.zeros(1)
        x.seen = k, v
        return (x,)

    def unpack(self, kept):
        return kept[0].seen


class ByIdentity(InSelf):
    """In a dictionary of the class, by the tensor that is kept."""

    def pack(self, k, v):
        x = torch.zeros(1)
        Everything.by_tensor = getattr(Everything, "by_tensor", []) + [(x, (k, v))]
        return (x,)

    def unpack(self, kept):
        return next(kv for x, kv in Everything.by_tensor if x is kept[0])


class InShapes(Delta):
    """A number in the shape of a tensor without numbers, of many."""

    def empty(self, config, dtype, device):
        return ()

    def attend(self, kept, q, k, v):
        out, _ = Delta().attend(Delta().empty(CONFIG, q.dtype, "cpu"), q, k, v)
        numbers = [round(x) for x in (1e6 * (k + 9)).flatten().tolist()]
        return out, (*kept, *(torch.zeros(0, n) for n in numbers))

    def attend_all(self, q, k, v):
        return torch.zeros_like(q)


class Late(Window):
    """Keeps all tokens after the first thousand, too."""

    def empty(self, config, dtype, device):
        late, count = torch.zeros(0, 2, 32), torch.zeros((), dtype=torch.int64)
        return (*super().empty(config, dtype, device), late, count)

    def attend(self, kept, q, k, v):
        *newest, late, count = kept
        out, newest = super().attend(newest, q, k, v)
        if count + len(k) > 1000:
            late = torch.cat([late, k[max(1000 - int(count), 0) :]])
        return out, (*newest, late, count + len(k))


class View(Window):
    """A part of all that it was given."""

    def attend(self, kept, q, k, v):
        k, v = (torch.cat([old, new]) for old, new in zip(kept, (k, v)))
        return self._attend(q, k, v), tuple(x[-self.size + 1 :] for x in (k, v))


class OneText(Delta):
    def attend_all(self, q, k, v):
        T, H, D = q.shape
        return super().attend_all(q, k, v)


class ChunksAlone(Delta):
    """Each chunk of a step begins from what was there before the step."""

    def attend(self, kept, q, k, v):
        outs = [
            super(ChunksAlone, self).attend(kept, *(x[t : t + 1] for x in (q, k, v)))
            for t in range(len(q))
        ]
        return torch.cat([out for out, _ in outs]), super().attend(kept, q, k, v)[1]


def changing(self, kept, q, k, v):
    out, (state,) = Delta.attend(self, kept, q, k, v)
    kept[0].copy_(state)
    return out, kept


def changing_the_key(self, kept, q, k, v):
    k /= k.norm(dim=-1, keepdim=True)
    return Delta.attend(self, kept, q, k, v)


def changing_the_key_of_all(self, q, k, v):
    with torch.no_grad():
        k /= k.norm(dim=-1, keepdim=True)
    return Delta.attend_all(self, q, k, v)


def then(change):
    """`attend` of Delta, and something else of what it gives."""

    def attend(self, kept, q, k, v):
        return change(*Delta.attend(self, kept, q, k, v))

    return attend


def then_at_once(change):
    def attend_all(self, q, k, v):
        return change(Delta.attend_all(self, q, k, v))

    return attend_all


def raising(*_):
    raise RuntimeError("not today")


def mixing(self, q, k, v):
    out = Delta.attend_all(self, q, k, v)
    return out.flip(0) if out.dim() > 3 else out


def seeing_all(self, q, k, v):
    return F.scaled_dot_product_attention(
        *(x.transpose(-3, -2) for x in (q, k, v))
    ).transpose(-3, -2)


def short_texts_by_softmax(self, q, k, v):
    memory = Window(10**9) if q.shape[-3] <= 128 else Delta()
    return memory.attend_all(q, k, v)


def texts_side_by_side_by_softmax(self, q, k, v):
    memory = Window(10**9) if q.dim() > 3 else Delta()
    return memory.attend_all(q, k, v)


def state_of_lists(self, config, dtype, device):
    return torch.zeros(2, 32, 32).tolist()


BYTES = "expected at most 8,192 bytes per layer, got "
KEPT = "from what attend has kept alone; they differ by"
BEGIN = "and of a text that begins so, at once; they differ by"
BESIDE = r"of texts side by side \(2, T, H, D\) and of each alone, at once; they differ"
AS_THEY_WERE = "to leave the tensors that it is given as they were, it changed one"
BAD = {
    "a longer window": (Window(18), f"{BYTES}8,704 after 17 tokens$"),
    "everything": (Everything(), f"{BYTES}8,704 after 17 tokens$"),
    "a view of everything": (
        View(16),
        f"{BYTES}8,704 after 50 tokens: a part of a tensor keeps all of it, unless you",
    ),
    "an expanded part of much": (
        of(attend=then(lambda out, kept: (out, (kept[0], torch.zeros(9999)[:1]))))(),
        f"{BYTES}48,188 after 1 token: a part of a tensor keeps all",
    ),
    "a second tensor that grows": (Late(8), f"{BYTES}8,200 after 1,018 tokens$"),
    "shapes of empty tensors": (InShapes(), f"{BYTES}9,216 after 9 tokens$"),
    "self": (InSelf(), KEPT),
    "its class": (InItsClass(), KEPT),
    "an attribute of a tensor": (
        OnATensor(),
        "expected attend to run with q .* got Attribute",
    ),
    "a dictionary by tensor": (
        ByIdentity(),
        "expected attend to run .* got StopIteration",
    ),
    "a list": (
        of(attend=then(lambda out, kept: (out, list(kept))))(),
        "expected attend to keep a tuple, got a list$",
    ),
    "a tensor": (
        of(attend=then(lambda out, kept: (out, kept[0])))(),
        "expected attend to keep a tuple, got a Tensor$",
    ),
    "a nested tuple": (
        of(attend=then(lambda out, kept: (out, (*kept, kept))))(),
        "expected attend to keep plain tensors, got a tuple among them$",
    ),
    "numbers": (
        of(attend=then(lambda out, kept: (out, (*kept, 4))))(),
        "expected attend to keep plain tensors, got an int among them$",
    ),
    "a kind of tensor": (
        of(attend=then(lambda out, kept: (out, (torch.nn.Parameter(kept[0]),))))(),
        "expected attend to keep plain tensors, got a Parameter among",
    ),
    "a sparse tensor": (
        of(attend=then(lambda out, kept: (out, (kept[0].to_sparse(),))))(),
        "expected attend to keep plain tensors, got a Tensor among them .torch.sp",
    ),
    "empty in lists": (of(empty=state_of_lists)(), "expected empty to keep a tuple, got"),
    "empty in a list": (
        of(empty=lambda self, *_: [torch.zeros(2, 32, 32)])(),
        "expected empty to keep a tuple, got a list$",
    ),
    "empty without a tuple": (
        of(empty=lambda self, *_: torch.zeros(2, 32, 32))(),
        "expected empty to keep a tuple, got a Tensor$",
    ),
    "the new state in the old": (
        of(attend=changing)(),
        f"expected attend {AS_THEY_WERE}",
    ),
    "a key changed": (of(attend=changing_the_key)(), f"expected attend {AS_THEY_WERE}"),
    "a key changed at once": (
        of(attend_all=changing_the_key_of_all)(),
        f"expected attend_all {AS_THEY_WERE}",
    ),
    "the future": (of(attend_all=seeing_all)(), f"the same of 1 token {BEGIN}"),
    "softmax in short texts": (
        of(attend_all=short_texts_by_softmax)(),
        f"the same of 1 token {BEGIN}",
    ),
    "softmax in training": (of(attend_all=texts_side_by_side_by_softmax)(), BESIDE),
    "texts mixed up": (of(attend_all=mixing)(), BESIDE),
    "one text alone": (
        OneText(),
        "expected attend_all to run with q \\(2, 1, 2, 32\\), got ValueError: too many",
    ),
    "chunks that are no steps": (ChunksAlone(), KEPT),
    "another rule at once": (
        of(attend_all=lambda self, *text: Linear(0.97).attend_all(*text))(),
        KEPT,
    ),
    "drops numbers at random": (
        of(attend=then(lambda out, kept: (F.dropout(out, 0.2), kept)))(),
        KEPT,
    ),
    "NaN": (
        of(attend=then(lambda out, kept: (out * math.nan, kept)))(),
        "expected finite numbers from attend, got some that are not$",
    ),
    "NaN at once": (
        of(attend_all=then_at_once(lambda out: out / 0))(),
        "expected finite numbers from attend_all, got some that are not$",
    ),
    "a shape": (
        of(attend=then(lambda out, kept: (out.flatten(1), kept)))(),
        r"expected torch.float32 \(1, 2, 32\) from attend, got .* \(1, 64\)$",
    ),
    "a shape at once": (
        of(attend_all=then_at_once(lambda out: out.transpose(-3, -2)))(),
        r"expected torch.float32 \(1024, 2, 32\) from attend_all, got .* \(2, 1024, 32\)",
    ),
    "a dtype": (
        of(attend=then(lambda out, kept: (out.double(), kept)))(),
        r"expected torch.float32 .* from attend, got torch.float64 \(1, 2, 32\)$",
    ),
    "a dtype at once": (
        of(attend_all=then_at_once(lambda out: out.bfloat16()))(),
        "expected torch.float32 .* from attend_all, got torch.bfloat16",
    ),
    "a list of answers": (
        of(attend=then(lambda out, kept: (out.tolist(), kept)))(),
        "expected torch.float32 .* from attend, got a list$",
    ),
    "no answers": (
        of(attend_all=lambda *_: None)(),
        "expected torch.float32 .* from attend_all, got a NoneType$",
    ),
    "out alone": (
        of(attend=then(lambda out, kept: out))(),
        "expected out and what is kept from attend, got a Tensor$",
    ),
    "three things": (
        of(attend=then(lambda out, kept: (out, kept, 0)))(),
        "expected out and what is kept from attend, got 3 things",
    ),
    "out in what is kept": (
        of(attend=then(lambda out, kept: (out, (*kept, out[-4:]))))(),
        "expected out in memory of its own, got a part of what is kept: clone it",
    ),
    "no gradient of k": (
        of(attend_all=lambda self, q, k, v: Delta().attend_all(q, k.detach(), v))(),
        "expected gradients of k, got none$",
    ),
    "no gradients": (
        of(attend_all=then_at_once(torch.Tensor.detach))(),
        "expected gradients of q, got none$",
    ),
    "gradients of what has changed": (
        of(attend_all=then_at_once(lambda out: Squared.apply(out)))(),
        "expected gradients, got RuntimeError: not today",
    ),
    "gradients that are infinite": (
        of(attend_all=then_at_once(lambda out: out + 0 * (0 * out).sqrt()))(),
        "expected gradients of q, got some that are not finite$",
    ),
    "empty raises": (of(empty=raising)(), "expected empty to run, got RuntimeError: not"),
    "attend raises": (
        of(attend=raising)(),
        "expected attend to run with q .* got RuntimeError: not",
    ),
    "attend_all raises": (
        of(attend_all=raising)(),
        r"expected attend_all to run with q \(1024, 2, 32\), got RuntimeError: not today",
    ),
    "none": (None, "expected a Memory, as Delta\\(\\), got None$"),
    "a class": (Delta, "expected a Memory, as Delta\\(\\), got <class"),
    "one for each layer": ([Delta(), Delta()], "expected a Memory, as Delta\\(\\), got"),
}


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return raising()


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_memory_is_refused_in_words(name):
    memory, words = BAD[name]
    with pytest.raises(ValueError, match=f"memory: .*{words}"):
        tried(memory)


def test_an_answer_that_is_not_written_yet_says_so_itself():
    def withheld(*_):
        raise NotImplementedError("linear_parallel is yours to write: chapter 9")

    with pytest.raises(NotImplementedError, match="^linear_parallel is yours to write"):
        tried(of(attend_all=withheld)())


@pytest.mark.parametrize("num_steps", [-1, 1.5, True, "all"])
def test_what_is_no_number_of_steps_is_refused_before_anything_is_tried(num_steps):
    with pytest.raises(ValueError, match="num_steps: expected an integer of at least 0"):
        capstone.try_memory(of(empty=raising)(), num_steps)


def test_the_memory_is_as_it_was():
    memory = InSelf()
    before = memory.seen
    with pytest.raises(ValueError):
        tried(memory)
    assert memory.seen is before
