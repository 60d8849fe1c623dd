"""Which layer cannot do without its tokens: notes, with one layer's cache cut at a time.

    python -m lib.measure.layer_needs    # minutes; writes data/results/layer_needs.json

The models of lib/recall.py with two and with four layers, each trained from several
seeds: the answer is another for each.
"""

import json
import shlex
import sys
import time
from collections.abc import Sequence

import torch
from tqdm import tqdm

from lib import recall
from lib.measure.meter import machine_facts
from lib.measure.quality import Examples, Quality, measure_quality
from lib.model import Transformer
from lib.pruning import Policy, PrunedKVCache, Snap
from lib.text import DATA

RESULTS = DATA / "results" / "layer_needs.json"
NAMES = "notes_g2", "notes_l4"
SEEDS = 3
BUDGETS = 8, 24
SNAP = Snap()


def recall_when_cut(
    model: Transformer,
    draws: Sequence[Examples],
    budgets: Sequence[int] | int,
    policy: Policy = SNAP,
    knows_question: bool = True,
) -> Quality:
    """How much of the first answers is right when a text of notes is cut to `budgets`.

    Each text ends with its first question and answer (`recall.first_question`). The cache
    is cut when the key that is asked for has been read, or else just before it.
    """
    T = draws[0].token_ids.shape[1]
    prompt_len = T - recall.VALUES_PER_NOTE - (not knows_question)
    return measure_quality(
        model,
        draws,
        make_cache=lambda config, B, _: PrunedKVCache(config, B, budgets, policy),
        step_lens=[prompt_len, T - prompt_len],
    )


def cut_alone(
    model: Transformer, draws: Sequence[Examples], budget: int
) -> list[Quality]:
    """`recall_when_cut` for each layer, where it has `budget` and the others keep all."""
    L, whole = model.config.num_layers, model.config.max_seq_len
    return [
        recall_when_cut(model, draws, [budget if i == layer else whole for i in range(L)])
        for layer in range(L)
    ]


def main():
    torch.set_num_threads(1)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    draws = [recall.first_question(recall.draw_task("notes", 64, g)) for g in generators]
    start, found = time.perf_counter(), {}
    runs = [(name, seed) for name in NAMES for seed in range(SEEDS)]
    for name, seed in tqdm(runs, file=sys.stdout):
        if seed == 0:
            model = recall.load(name)
        else:
            model, _ = recall.train_recipe(recall.RECIPES[name], seed)
        whole = [model.config.max_seq_len] * model.config.num_layers
        result = {
            "seed": seed,
            "whole": recall_when_cut(model, draws, whole).accuracies,
        }
        for budget in BUDGETS:
            found_alone = cut_alone(model, draws, budget)
            result[f"cut to {budget}"] = [quality.accuracies for quality in found_alone]
        found.setdefault(name, []).append(result)
        print(name, result)
    facts = {
        "command": shlex.join(["python", "-m", "lib.measure.layer_needs", *sys.argv[1:]]),
        "machine": machine_facts(),
        "seconds": round(time.perf_counter() - start),
    }
    RESULTS.write_text(json.dumps(facts | found) + "\n")


if __name__ == "__main__":
    main()
