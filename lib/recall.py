"""Chapters 7 to 9: texts that nobody can complete without remembering, and small models
that have learned to.

The model of chapter 1 predicts a book, and hardly looks further back than a line: what a
cache forgets does not hurt it. So here are texts made of numbers in which a key is told
together with what belongs to it, and is asked for later: it can only be answered out of
the cache. Three kinds:

    pairs     k v k v k v | k v k v k v         each key is asked for again
    updates   k v k v k v | k w k w | k w k w k v         some got another value since
    notes     . k v v v v . . k v v v v . | k v v v v k v v v v      among filler

And passages of the book, for models of the same size with the same memories.

A model of two layers learns either in minutes, on one processor, if it begins with short
texts: `train` makes them longer in three stages. (Tried with texts of full length from
the beginning: after as many steps 10% of pairs and 7% of notes were right.)

    python -m lib.recall             # all weights of data/recall
    python -m lib.recall notes_g2    # those of one

Most attend by softmax to all earlier tokens. Some have never had more than a memory of
lib/state.py per layer, and are to be asked through the same: a recipe knows which.

Multi-query associative recall: https://arxiv.org/abs/2312.04927. Read lib/training.py
and lib/state.py before.
"""

import argparse
import json
import shlex
import string
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from lib.config import ModelConfig, check_count
from lib.measure.meter import machine_facts
from lib.measure.quality import Examples, answers, measure_quality, passages
from lib.model import Attend, Transformer, attend_fused, load_model, save_model
from lib.state import Delta, Linear, Memory, Window, attend_by, check_memories
from lib.text import DATA
from lib.training import TrainingConfig, adamw, learning_rate

WEIGHTS = DATA / "recall"
RESULTS = DATA / "results" / "recall.json"

VOCAB_SIZE = 128
# Of pairs: ids of keys, then of values.
NUM_PAIR_KEYS = 64
# Of notes: ids of keys, then of values, then of filler.
NUM_NOTE_KEYS, NUM_NOTE_VALUES = 32, 64
VALUES_PER_NOTE = 4
NOTES_ASKED = 4  # at the end of a text, or all, if it has fewer


def draw_pairs(
    batch_size: int, num_pairs: int, generator: torch.Generator | None = None
) -> Examples:
    """Keys with their values, then all keys again in another order, each with its value,
    which is to be predicted: (B, 4 · num_pairs). Raises ValueError for more pairs than
    there are keys.

    >>> examples = draw_pairs(1, num_pairs=2, generator=torch.Generator().manual_seed(0))
    >>> examples.token_ids
    tensor([[ 12, 119,  35,  92,  12, 119,  35,  92]])
    >>> examples.is_answer.int().tolist()
    [[0, 0, 0, 0, 0, 1, 0, 1]]
    """
    check_count("batch_size", batch_size)
    if check_count("num_pairs", num_pairs) > NUM_PAIR_KEYS:
        raise ValueError(f"num_pairs: expected 1 to {NUM_PAIR_KEYS}, got {num_pairs}")
    keys = _distinct(batch_size, NUM_PAIR_KEYS, num_pairs, generator)  # (B, P)
    values = torch.randint(
        NUM_PAIR_KEYS, VOCAB_SIZE, keys.shape, generator=generator
    )  # (B, P)
    told = torch.stack([keys, values], -1)  # (B, P, 2)
    order = _distinct(batch_size, num_pairs, num_pairs, generator)  # (B, P)
    asked = told.gather(1, order.unsqueeze(-1).expand(-1, -1, 2))  # (B, P, 2)
    return _examples(told.flatten(1), asked)


def draw_updates(
    batch_size: int,
    num_pairs: int,
    num_updates: int,
    generator: torch.Generator | None = None,
) -> Examples:
    """As `draw_pairs`, but before the keys are asked for some of them are told once more,
    with another value, which is the right one from then on: (B, 4 · num_pairs + 2 ·
    num_updates). Raises ValueError for more updates than pairs too.

    >>> examples = draw_updates(1, 2, num_updates=1)
    >>> examples.token_ids.shape  # k v k v, k w, and both keys again
    torch.Size([1, 10])
    """
    told, asked = draw_pairs(batch_size, num_pairs, generator).token_ids.chunk(2, dim=1)
    if check_count("num_updates", num_updates, at_least=0) > num_pairs:
        raise ValueError(
            f"num_updates: expected at most num_pairs = {num_pairs}, got {num_updates}"
        )
    asked = asked.unflatten(1, (-1, 2))  # (B, P, 2)
    which = _distinct(batch_size, num_pairs, num_updates, generator)  # (B, U)
    index = which.unsqueeze(-1).expand(-1, -1, 2)  # (B, U, 2)
    again = asked.gather(1, index)  # (B, U, 2)
    # Any value but the first: 1 to 63 further on, in a circle.
    num_values = VOCAB_SIZE - NUM_PAIR_KEYS
    further = torch.randint(1, num_values, which.shape, generator=generator)  # (B, U)
    values = again[..., 1] - NUM_PAIR_KEYS + further  # (B, U)
    again[..., 1] = values % num_values + NUM_PAIR_KEYS
    asked = asked.scatter(1, index, again)
    return _examples(torch.cat([told, again.flatten(1)], dim=1), asked)


def draw_notes(
    batch_size: int,
    num_notes: int,
    num_filler: int,
    generator: torch.Generator | None = None,
) -> Examples:
    """Notes, a key and 4 values each, at random places among num_filler tokens of
    filler; then up to 4 of the keys again, each with its values, which are to be
    predicted: (B, 5 · num_notes + num_filler + 5 · min(num_notes, 4)). Raises ValueError
    for more notes than there are keys.
    """
    check_count("batch_size", batch_size)
    check_count("num_filler", num_filler, at_least=0)
    if check_count("num_notes", num_notes) > NUM_NOTE_KEYS:
        raise ValueError(f"num_notes: expected 1 to {NUM_NOTE_KEYS}, got {num_notes}")
    keys = _distinct(batch_size, NUM_NOTE_KEYS, num_notes, generator)  # (B, P)
    first_filler = NUM_NOTE_KEYS + NUM_NOTE_VALUES
    values = torch.randint(
        NUM_NOTE_KEYS,
        first_filler,
        (*keys.shape, VALUES_PER_NOTE),
        generator=generator,
    )  # (B, P, 4)
    notes = torch.cat([keys.unsqueeze(-1), values], -1)  # (B, P, 5)

    # Before each note some of the filler: sorted random numbers of tokens.
    gaps = torch.randint(num_filler + 1, keys.shape, generator=generator)  # (B, P)
    starts = gaps.sort().values + torch.arange(num_notes) * notes.shape[-1]  # (B, P)
    places = starts.unsqueeze(-1) + torch.arange(notes.shape[-1])  # (B, P, 5)
    told_len = num_notes * notes.shape[-1] + num_filler
    told = torch.randint(
        first_filler, VOCAB_SIZE, (batch_size, told_len), generator=generator
    )  # (B, told_len)
    told.scatter_(1, places.flatten(1), notes.flatten(1))

    num_asked = min(num_notes, NOTES_ASKED)
    order = _distinct(batch_size, num_notes, num_asked, generator)  # (B, asked)
    index = order.unsqueeze(-1).expand(-1, -1, notes.shape[-1])
    return _examples(told, notes.gather(1, index))


def first_question(examples: Examples) -> Examples:
    """Notes up to the end of the first answer: the other questions are left out.

    >>> examples = draw_notes(1, num_notes=2, num_filler=3)  # 13 tokens, 2 questions of 5
    >>> first_question(examples).token_ids.shape
    torch.Size([1, 18])
    """
    first_answer = int(examples.is_answer[0].int().argmax())
    stop = first_answer + VALUES_PER_NOTE
    return Examples(examples.token_ids[:, :stop], examples.is_answer[:, :stop])


def spell_notes(token_ids: torch.Tensor) -> str:
    """A text of notes, (T,), to look at: keys are letters, values numbers, filler dots.

    >>> spell_notes(torch.tensor([0, 32, 33, 34, 35, 96, 31]))
    'A 0 1 2 3 · f'
    """
    letters = string.ascii_letters[26:] + string.ascii_letters[:26]  # capitals first
    names = [*letters[:NUM_NOTE_KEYS], *map(str, range(NUM_NOTE_VALUES))]
    names += ["·"] * (VOCAB_SIZE - len(names))
    return " ".join(names[token_id] for token_id in token_ids.tolist())


def _distinct(
    batch_size: int, num_ids: int, num_drawn: int, generator: torch.Generator | None
) -> torch.Tensor:
    """For each text num_drawn different ids below num_ids, in any order: (B, drawn)."""
    return torch.rand(batch_size, num_ids, generator=generator).argsort(1)[:, :num_drawn]


def _examples(told: torch.Tensor, asked: torch.Tensor) -> Examples:
    """told (B, told_len); asked (B, asked, 1 + values): all but the keys are answers."""
    is_answer = torch.ones_like(asked, dtype=torch.bool)
    is_answer[..., 0] = False
    is_answer = torch.cat(
        [torch.zeros_like(told, dtype=torch.bool), is_answer.flatten(1)], 1
    )
    return Examples(torch.cat([told, asked.flatten(1)], 1), is_answer)


def draw_task(
    task: str,
    batch_size: int,
    generator: torch.Generator | None = None,
    share_done: float | None = None,
) -> Examples:
    """Texts of `task`, "pairs", "updates", "notes" or "book".

    share_done: how much of a training run is over, from 0 to 1: texts are of a random
    size up to a largest, which grows after a quarter and after half of the run. None: all
    of the largest size, 16 pairs, 8 pairs and as many updates, or 8 notes in 64 tokens of
    filler. Passages of the book have 256 bytes, from the part to train on, or None: from
    the other. Raises ValueError for a task that is not known, and another share.
    """
    sizes = {
        "pairs": [(4,), (8,), (16,)],  # pairs
        "updates": [(4, 0), (8, 8), (8, 8)],  # pairs, updates
        "notes": [(3, 8), (5, 32), (8, 64)],  # notes, filler
    }
    if task not in (tasks := [*sizes, "book"]):
        raise ValueError(f"task: expected one of {tasks}, got {task!r}")
    if share_done is not None and not 0 <= share_done <= 1:
        raise ValueError(f"share_done: expected from 0 to 1, got {share_done}")
    if task == "book":
        return passages(batch_size, 256, generator, held_out=share_done is None)
    draw = {"pairs": draw_pairs, "updates": _updates_up_to, "notes": draw_notes}[task]
    if share_done is None:
        return draw(batch_size, *sizes[task][-1], generator)
    stage = (share_done >= 0.25) + (share_done >= 0.5)
    least = (2, 0)  # a single pair asks for nothing but the last value
    size = [
        int(torch.randint(low, high + 1, (), generator=generator))
        for low, high in zip(least, sizes[task][stage])
    ]
    return draw(batch_size, *size, generator)


def _updates_up_to(batch_size, num_pairs, num_updates, generator) -> Examples:
    num_updates = min(num_updates, num_pairs)
    return draw_updates(batch_size, num_pairs, num_updates, generator)


def train(
    model: Transformer,
    task: str,
    config: TrainingConfig,
    from_share: float = 0.0,
    evaluate_every: int | None = None,
    attend: Attend = attend_fused,
) -> list[tuple[int, float]]:
    """Train a model on texts of `task`, in place and on the device that it is on; the
    loss is that of the answers.

    config: its num_steps, batch_size, learning_rate and its course, weight_decay,
    max_grad_norm and seed (of the texts) count. from_share: at which part of the stages
    of `draw_task` to begin: 0.5 for a model that has learned the task already. attend:
    the attention to train with, and to ask with. Returns (steps done, accuracy) after
    every `evaluate_every` steps and at the end.
    """
    if evaluate_every is not None:
        check_count("evaluate_every", evaluate_every)
    generator = torch.Generator().manual_seed(config.seed)
    device = model.embed.weight.device
    fixed = draw_task(task, 128, torch.Generator().manual_seed(2**32 - 1)).to(device)
    optimizer = adamw(model, config)

    curve = []
    for step in range(config.num_steps):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        share_done = from_share + (1 - from_share) * step / config.num_steps
        examples = draw_task(task, config.batch_size, generator, share_done).to(device)
        positions = torch.arange(examples.token_ids.shape[1], device=device)
        logits = model(examples.token_ids, positions, attend)
        cross_entropy(*answers(logits, examples)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        num_done = step + 1
        is_due = evaluate_every is not None and num_done % evaluate_every == 0
        if is_due or num_done == config.num_steps:
            quality = measure_quality(model.eval(), [fixed], attend=attend)
            curve.append((num_done, quality.accuracy))
    model.eval()
    return curve


@dataclass(frozen=True)
class Recipe:
    """What a file of data/recall was trained as.

    memories: what each layer keeps of a text; None: all its keys and values. Raises
    ValueError unless there is one for each layer.
    """

    task: str
    model: ModelConfig
    num_steps: int
    learning_rate: float
    memories: tuple[Memory, ...] | None = None

    def __post_init__(self):
        if self.memories is not None:
            check_memories(self.memories, self.model.num_layers)

    @property
    def attend(self) -> Attend:
        """The attention that the model was trained with, for whole texts."""
        return attend_fused if self.memories is None else attend_by(self.memories)

    @property
    def training(self) -> TrainingConfig:
        return TrainingConfig(
            self.num_steps,
            batch_size=32,
            learning_rate=self.learning_rate,
            warmup_steps=50,
        )


SMALL = ModelConfig(
    VOCAB_SIZE,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    d_model=64,
    d_ff=128,
    max_seq_len=1024,
)
PAIRS = Recipe("pairs", replace(SMALL, num_heads=2, num_kv_heads=2), 2400, 1e-3)
PAIRS_SMALL = replace(PAIRS, model=SMALL)  # 4 heads of 16 instead of 2 of 32
UPDATES = replace(PAIRS, task="updates")
BOOK = Recipe("book", replace(PAIRS.model, vocab_size=256), 2400, 3e-3)
# A state adds keys to values of the same token, so the first layer has to bring each key
# to its value. A window does: softmax attention to a token and the three before it.
NEAR = Window(4)
RECIPES = {
    # With 2e-3, two of three seeds never learned their first two pairs.
    "pairs": PAIRS,
    "pairs_sum": replace(PAIRS, memories=(NEAR, Linear())),
    "pairs_decay": replace(PAIRS, memories=(NEAR, Linear(0.97))),
    "pairs_delta": replace(PAIRS, memories=(NEAR, Delta())),
    # Keeps 15 tokens for those to come: as many bytes as a state, within a tenth.
    "pairs_window": replace(PAIRS, memories=(NEAR, Window(16))),
    # Without the window: nothing brings keys to their values.
    "pairs_delta_twice": replace(PAIRS, memories=(Delta(), Delta())),
    "pairs_small": PAIRS_SMALL,
    "pairs_delta_small": replace(PAIRS_SMALL, memories=(NEAR, Delta())),
    "updates": UPDATES,
    "updates_sum": replace(UPDATES, memories=(NEAR, Linear())),
    "updates_decay": replace(UPDATES, memories=(NEAR, Linear(0.97))),
    "updates_delta": replace(UPDATES, memories=(NEAR, Delta())),
    "notes_g4": Recipe("notes", SMALL, 3000, 2e-3),
    "notes_g2": Recipe("notes", replace(SMALL, num_kv_heads=2), 3000, 2e-3),
    "notes_g1": Recipe("notes", replace(SMALL, num_kv_heads=1), 3000, 2e-3),
    "notes_l4": Recipe("notes", replace(SMALL, num_layers=4, num_kv_heads=2), 4000, 2e-3),
    "book": BOOK,
    "book_window": replace(BOOK, memories=(Window(16), Window(16))),
    "book_sum": replace(BOOK, memories=(Linear(), Linear())),
    "book_decay": replace(BOOK, memories=(Linear(0.97), Linear(0.97))),
    "book_delta": replace(BOOK, memories=(Delta(), Delta())),
    "book_window_sum": replace(BOOK, memories=(Window(16), Linear())),
    "book_window_decay": replace(BOOK, memories=(Window(16), Linear(0.97))),
    "book_window_delta": replace(BOOK, memories=(Window(16), Delta())),
}


def load(name: str) -> Transformer:
    """A model of data/recall, by its name in RECIPES. Raises ValueError for another.

    Ask it through what it was trained with: `RECIPES[name].attend`, or a cache of the
    same memories, `StateCache(model.config, B, RECIPES[name].memories)`.
    """
    _check_name(name)
    return load_model(WEIGHTS / f"{name}.pt")


def _check_name(name: str):
    if name not in RECIPES:
        raise ValueError(f"model: expected one of {list(RECIPES)}, got {name!r}")


def main():
    parser = argparse.ArgumentParser(
        prog="python -m lib.recall", description="Train the weights of data/recall."
    )
    parser.add_argument(
        "names", nargs="*", help=f"which: {', '.join(RECIPES)}; default all"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="train each so often; the first is kept"
    )
    parser.add_argument("--device", default="cpu", help="as torch names it: cuda")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder of the weights")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="curves and times: json"
    )
    args = parser.parse_args()
    check_count("seeds", args.seeds)
    for name in args.names:
        _check_name(name)
    torch.set_num_threads(1)
    for folder in (args.out, args.results.parent):  # before the minutes, not after
        folder.mkdir(parents=True, exist_ok=True)
    bar = tqdm(
        [(name, s) for name in args.names or RECIPES for s in range(args.seeds)],
        file=sys.stdout,
    )
    for name, seed in bar:
        bar.set_description(f"{name}, seed {seed}")
        model, result = train_recipe(RECIPES[name], seed, args.device)
        bar.write(f"{name}, seed {seed}: {result['accuracy'][-1][1]:.3f}")
        if seed == 0:
            save_model(model, args.out / f"{name}.pt")
        found = (
            json.loads(args.results.read_text(encoding="utf-8"))
            if args.results.exists()
            else {}
        )
        runs = [r for r in found.get(name, []) if r["seed"] != seed]
        found[name] = sorted([*runs, result], key=lambda r: r["seed"])
        args.results.write_text(json.dumps(found) + "\n", encoding="utf-8")


def train_recipe(
    recipe: Recipe, seed: int, device: torch.device | str = "cpu"
) -> tuple[Transformer, dict]:
    """The model, on the CPU again, and what is kept of its training."""
    torch.manual_seed(seed)
    model = Transformer(recipe.model).to(device)
    config = replace(recipe.training, seed=seed)
    start = time.perf_counter()
    curve = train(model, recipe.task, config, evaluate_every=100, attend=recipe.attend)
    return model.cpu(), {
        "command": shlex.join(["python", "-m", "lib.recall", *sys.argv[1:]]),
        "machine": machine_facts(),
        "device": str(device),
        "seed": seed,
        "model": asdict(recipe.model),
        "memories": recipe.memories and [repr(memory) for memory in recipe.memories],
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "training": asdict(config),
        "seconds": round(time.perf_counter() - start),
        "accuracy": [[step, round(share, 4)] for step, share in curve],
    }


if __name__ == "__main__":
    main()
