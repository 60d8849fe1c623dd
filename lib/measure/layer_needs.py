"""Which layer cannot do without its tokens: notes, with one layer's cache cut at a time.

    python -m lib.measure.layer_needs    # minutes; writes data/results/layer_needs.json

The models of lib/recall.py with two and with four layers, each trained from several
seeds: with four layers it is not the same layer in all of them.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

import torch
from tqdm import tqdm

from lib import recall
from lib.measure.meter import machine_facts
from lib.measure.quality import Examples, Quality, measure_quality
from lib.model import Transformer
from lib.pruning import Policy, PrunedKVCache, Snap
from lib.recall import draw_task, train_recipe
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
    is cut when the key that is asked for has been read, or else just before it. An
    answer's first value does not count: where the question is known, it is said in the
    step that reads all of the text.
    """
    T = draws[0].token_ids.shape[1]
    prompt_len = T - recall.VALUES_PER_NOTE - (not knows_question)
    is_later = torch.arange(T) > T - recall.VALUES_PER_NOTE  # (T,)
    later = [
        replace(examples, is_answer=examples.is_answer & is_later) for examples in draws
    ]
    return measure_quality(
        model,
        later,
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
    """Measure each model of notes with the cache of one layer cut at a time, and write
    down how many of its answers stay right."""
    argparse.ArgumentParser(
        prog="python -m lib.measure.layer_needs", description=main.__doc__
    ).parse_args()
    torch.set_num_threads(1)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    draws = [recall.first_question(draw_task("notes", 64, g)) for g in generators]
    start, found = time.perf_counter(), {}
    bar = tqdm([(name, s) for name in NAMES for s in range(SEEDS)], file=sys.stdout)
    for name, seed in bar:
        bar.set_description(f"{name}, seed {seed}")
        if seed == 0:
            model = recall.load(name)
        else:
            model, _ = train_recipe(recall.RECIPES[name], seed)
        whole = recall_when_cut(model, draws, model.config.max_seq_len)
        run = {"seed": seed, "whole": whole.accuracies}
        for budget in BUDGETS:
            run[f"cut to {budget}"] = [
                quality.accuracies for quality in cut_alone(model, draws, budget)
            ]
        found.setdefault(name, []).append(run)
    facts = {
        "command": shlex.join(["python", "-m", "lib.measure.layer_needs", *sys.argv[1:]]),
        "machine": machine_facts(),
        "seconds": round(time.perf_counter() - start),
    }
    RESULTS.write_text(json.dumps(facts | found) + "\n", encoding="utf-8")
    for name, runs in found.items():
        for run in runs:
            shares = [f"{mean(layer):.0%}" for layer in run["cut to 8"]]
            print(f"{name}, seed {run['seed']}: {' '.join(shares)}")


if __name__ == "__main__":
    main()
