"""Every shape comment at the end of a library line is true: run the code and compare.

`x = ...  # (B, T, C)` is checked after the line has run, `return ...  # (T,)` on the way
out. Letters have fixed sizes here, all different; a letter that is not fixed means what a
variable of that name says, or else one size within one call of a function, and within one
round of its loop.
"""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import begun

import lib
from lib import (
    checkpointing,
    generate,
    kv_heads,
    latent_kv_cache,
    paged_attention,
    pruning,
    recall,
    sampling,
    state,
    text,
    weights,
)
from lib.config import ModelConfig
from lib.engine import Engine
from lib.kv_cache import ContiguousKVCache
from lib.measure import layer_needs, quality, real_model
from lib.model import Transformer, attend_causal, attend_fused
from lib.paged_kv_cache import PagedKVCache
from lib.quantized_kv_cache import QuantizedFormat
from lib.tokenizer import ByteTokenizer
from lib.training import Trainer, TrainingConfig

FOLDER = Path(lib.__file__).parent
FOLDERS = FOLDER, FOLDER / "measure", FOLDER / "figures"
SIZES = {"B": 3, "H": 6, "G": 2, "D": 10, "C": 60, "F": 22, "V": 29, "heads": None}
CONFIG = ModelConfig(29, 4, 6, 2, d_model=60, d_ff=22, max_seq_len=40, dropout=0.1)
SHAPE = r"\(((?:\.\.\.|[A-Z\d]|n[ ,]|min\(|heads)[^#]*?)\)"
COMMENT = re.compile(
    rf"#\s*{SHAPE}(?:, {SHAPE})?(?:$|[,:;. ])"
)  # a second one: of a pair


def shape_comments() -> dict[tuple[str, int], tuple[list[str], list[str] | None]]:
    """(file, last line of a statement) -> the shape, or those of a pair, and the names
    they are claimed for.

    Names are None for a return.
    """
    found = {}
    for path in sorted(path for folder in FOLDERS for path in folder.glob("*.py")):
        lines = path.read_text(encoding="utf-8").split("\n")
        for node in ast.walk(ast.parse("\n".join(lines))):
            if not isinstance(node, (ast.Assign, ast.Return)):
                continue
            comment = COMMENT.search(lines[node.end_lineno - 1])
            if not comment:
                continue
            names = None
            if isinstance(node, ast.Assign):
                targets = node.targets[0]
                elements = targets.elts if isinstance(targets, ast.Tuple) else [targets]
                names = [e.id for e in elements if isinstance(e, ast.Name)]
            claims = [claim for claim in comment.groups() if claim]
            found[str(path), node.lineno] = (claims, names)
    return found


def matches(claim: str, shape: tuple[int, ...], letters: dict[str, int]) -> bool:
    """Whether `claim`, as "..., T, D/2", fits; new letters are bound to what they met."""
    if claim == "...":
        return True
    terms = re.split(r",\s*(?![^()]*\))", claim.rstrip(","))
    if terms[0] == "...":
        terms = terms[1:]
        shape = shape[len(shape) - len(terms) :]
    if len(terms) != len(shape):
        return False
    for term, size in zip(terms, shape):
        known = {k: v for k, v in {**SIZES, **letters}.items() if v is not None}
        try:
            value = eval(term.replace("/", "//"), {"min": min}, known)
        except NameError:
            letters[term] = value = size  # a letter met for the first time
        if value != size:
            return False
    return True


class Watcher:
    """A trace function that compares variables with the comments of lines that ran."""

    def __init__(self):
        self.comments = shape_comments()
        self.seen, self.wrong = set(), []

    def __call__(self, frame, event, arg):
        filename = frame.f_code.co_filename
        if Path(filename).parent not in FOLDERS:  # of the library itself
            return None
        letters, pending, last_line = {}, None, 0

        def local(frame, event, arg):
            nonlocal pending, last_line
            if pending and event in ("line", "return"):
                for name, value in frame.f_locals.items():
                    if len(name) == 1 and name.isupper() and isinstance(value, int):
                        letters[name] = value
                claims, names = self.comments[pending]
                if names is not None:
                    for name in names:
                        self.compare(pending, claims, frame.f_locals.get(name), letters)
                elif event == "return":
                    self.compare(pending, claims, arg, letters)
                pending = None
            if frame.f_lineno < last_line:  # a loop begins again
                letters.clear()
            last_line = frame.f_lineno
            where = (filename, frame.f_lineno)
            if event == "line" and where in self.comments:
                pending = where
            return local

        return local

    def compare(self, where, claims, value, letters):
        if isinstance(value, tuple):
            each = claims if len(claims) == len(value) else claims[:1] * len(value)
            for claim, element in zip(each, value):
                self.compare(where, [claim], element, letters)
        if isinstance(value, torch.Tensor):
            self.seen.add(where)
            if not matches(claims[0], tuple(value.shape), letters):
                self.wrong.append((*where, claims, tuple(value.shape), dict(letters)))


def smaller_formats(model, token_ids):
    keys, values = latent_kv_cache.record_kv(model, token_ids)
    latent_kv_cache.rank_for(torch.linalg.svdvals(keys[0].flatten(1)), 0.9)
    latent = latent_kv_cache.latent_format(keys, values, 3, 5)
    return QuantizedFormat(8, 4), latent


@pytest.fixture(scope="module")
def watcher():
    watcher = Watcher()
    torch.manual_seed(0)
    sys.settrace(watcher)
    try:
        model = Transformer(CONFIG)
        token_ids, positions = torch.randint(29, (3, 7)), torch.arange(7)
        for attend in (attend_causal, attend_fused):
            model(token_ids, positions, attend)
            for run in (
                checkpointing.checkpoint_recursive,
                checkpointing.run_blocks,
                checkpointing.run_blocks_selective,
            ):
                x = model.embed(token_ids)
                run(model.blocks, x, positions, attend).sum().backward()
        generate.generate_recompute(model.eval(), token_ids, 3, top_k=5, top_p=0.9)
        prompts = [token_ids[0, :n] for n in (2, 6, 4)]  # no chunk of one token
        for cache in (
            ContiguousKVCache(CONFIG, 3, 16),
            ContiguousKVCache(CONFIG, 3, 16, fused_decode=True),
            PagedKVCache(CONFIG, 19, 4),
            PagedKVCache(CONFIG, 19, 4, fused_decode=True),
        ):
            begun(cache, 3)
            generate.prefill_in_chunks(model, prompts, cache, 2)
            generate.generate_cached(model, [ids[:1] for ids in prompts], 2, cache)
        for policy in (pruning.HeavyHitters(3), pruning.Snap(4, 3)):
            cache = begun(pruning.PrunedKVCache(CONFIG, 3, [5, 4, 9, 8], policy), 3)
            generate.prefill_in_chunks(model, prompts, cache, 5)
            generate.generate_cached(model, [ids[:1] for ids in prompts], 2, cache)
        for memory in (state.Linear(0.9), state.Delta(), state.Window(4)):
            cache = begun(state.StateCache(CONFIG, 3, memory), 3)
            generate.prefill_in_chunks(model, prompts, cache, 5)
            generate.generate_cached(model, [ids[:1] for ids in prompts], 2, cache)
            model(token_ids, positions, state.attend_by(memory))
        by_step = torch.zeros(2, 10, 10), torch.randn(6, 10), *torch.randn(2, 2, 10)
        state.linear_step(*by_step, torch.ones(2))
        state.delta_step(*by_step)
        serving = Engine(model, ContiguousKVCache(CONFIG, 3, 16), token_budget=5)
        for ids in prompts:
            serving.add(ids, 3)
        serving.run()
        q, pool = torch.randn(3, 6, 10), torch.randn(2, 9, 4, 2, 10)
        for paged_decode in (
            paged_attention.paged_decode_gather,
            paged_attention.paged_decode_online,
        ):
            paged_decode(q, *pool, torch.arange(9).view(3, 3), torch.tensor([9, 1, 12]))
        tables, lens = torch.arange(9).view(3, 3), torch.tensor([9, 1, 12])
        paged_attention.paged_prefill_gather(
            *(torch.randn(7, 6, 10), *pool, tables, lens, torch.tensor([4, 1, 2]))
        )
        paged_attention.merge_splits(torch.randn(3, 6, 4, 10), torch.randn(3, 6, 4))
        in_place = {
            "decode": paged_attention.paged_decode_online,
            "prefill": paged_attention.paged_prefill_gather,
        }
        for format in smaller_formats(
            model, token_ids
        ):  # the comments of a pool are those of the plain one
            cache = begun(ContiguousKVCache(CONFIG, 3, 16, format=format), 3)
            generate.generate_cached(model, prompts, 2, cache)
        drawn = quality.Examples(token_ids, torch.ones(3, 7, dtype=torch.bool))
        make_cache = lambda config, B, T: ContiguousKVCache(config, B, T)  # noqa: E731
        quality.measure_quality(model, [drawn])
        quality.measure_quality(model, [drawn], make_cache=make_cache)
        layer_needs.recall_when_cut(model, [drawn], 4, pruning.Snap(4, 3))
        kv_heads.with_kv_heads(model, 1)
        recall.draw_pairs(3, 5)
        recall.draw_updates(3, 5, 4)
        recall.draw_notes(3, 7, 11)
        cache = PagedKVCache(CONFIG, 9, 4, **in_place)
        begun(cache, 3)
        generate.generate_cached(model, prompts, 2, cache)
        sampling.next_token_probs(torch.randn(3, 29), temperature=0)
        ids = torch.randint(29, (99,))
        text.random_batch(ids, 3, 7)
        weights.pairs_to_halves(torch.randn(20, 60), head_dim=10)
        subject = real_model.Subject(model, ByteTokenizer(), ids, seq_len=14)
        with pytest.MonkeyPatch.context() as patch:
            some = quality.Examples(
                ids[:42].view(3, 14), torch.arange(42).view(3, 14) > 0
            )
            patch.setattr(real_model, "_texts", lambda *_, **settings: [some])
            real_model.measure_rank(subject)
        text.decode(text.encode("whale"))
        Trainer(model, ids, TrainingConfig(batch_size=3, seq_len=7)).step()
    finally:
        sys.settrace(None)
    return watcher


def test_every_shape_comment_is_true(watcher):
    assert watcher.wrong == []


def test_every_shape_comment_was_reached(watcher):
    missed = sorted(set(watcher.comments) - watcher.seen)
    assert not missed, missed
    assert len(watcher.seen) >= 20


@pytest.mark.parametrize(
    "claim, shape, is_true",
    [
        ("B, T, C", (3, 7, 60), True),
        ("B, T, C", (3, 60, 7), False),
        ("..., T, heads, D/2", (3, 7, 6, 5), True),
        ("..., T, 1, D/2", (3, 7, 6, 5), False),
        ("..., T + 1", (3, 8), True),
        ("T, T", (7, 8), False),
        ("D/2,", (5,), True),
        ("D/2,", (5, 1), False),
        ("..., min(top_k, V)", (3, 5), True),
    ],
)
def test_a_wrong_comment_would_be_found(claim, shape, is_true):
    assert (
        matches(claim, shape, {"top_k": 5} if "top_k" in claim else {"T": 7}) == is_true
    )


def test_each_of_a_pair_has_its_own_shape():
    claims = [x for x in COMMENT.search("k, v  # (S, R), (S, W)").groups() if x]
    assert claims == ["S, R", "S, W"]
    assert COMMENT.search("k  # (S, R), of a layer").groups() == ("S, R", None)
    pair = torch.zeros(7, 2), torch.zeros(7, 3)
    watcher = Watcher()
    watcher.compare(("a", 1), claims, pair, {})
    watcher.compare(("a", 1), ["7, 2"], (pair[0], pair[0]), {})
    assert watcher.wrong == []
    watcher.compare(("a", 1), claims, pair[::-1], {"R": 2, "W": 3})
    watcher.compare(("a", 1), ["7, 2"], pair, {})
    assert len(watcher.wrong) == 3
