import json

import pytest
import torch
from helpers import random_model

from lib import recall
from lib.measure import layer_needs
from lib.measure.layer_needs import cut_alone, recall_when_cut
from lib.pruning import Recent, Snap


def draws_of_notes(num_draws=1):
    generators = [torch.Generator().manual_seed(seed) for seed in range(num_draws)]
    return [recall.first_question(recall.draw_notes(2, 3, 4, g)) for g in generators]


def test_the_first_question_is_the_end_of_the_text():
    examples = recall.draw_notes(3, 5, 7, torch.Generator().manual_seed(0))
    first = recall.first_question(examples)
    told = 5 * 5 + 7
    assert torch.equal(first.token_ids, examples.token_ids[:, : told + 5])
    assert first.is_answer.nonzero()[:, 1].unique().tolist() == [
        told + i for i in (1, 2, 3, 4)
    ]
    again = recall.first_question(first)
    assert torch.equal(again.token_ids, first.token_ids)


@pytest.mark.parametrize("knows_question, prompt_len", [(True, 20), (False, 19)])
def test_the_cache_is_cut_once_before_or_after_the_question(
    monkeypatch, knows_question, prompt_len
):
    cuts = []

    class Watched(Recent):
        def __call__(self, weights, scores, budget):
            cuts.append((weights.shape[1], budget))
            return super().__call__(weights, scores, budget)

    model, draws = random_model(), draws_of_notes()
    assert draws[0].token_ids.shape == (2, 24)
    recall_when_cut(model, draws, [6, 9], Watched(), knows_question)
    L, B = model.config.num_layers, 2
    expected = [
        (num_tokens, budget)
        for num_tokens in (prompt_len, 24 - prompt_len)
        for budget in (6, 9)[:L]
        for _ in range(B)
    ]
    assert cuts == expected


def test_alone_is_one_layer_with_the_budget_and_the_others_whole(monkeypatch):
    model, given = random_model(), []
    whole = model.config.max_seq_len
    monkeypatch.setattr(
        layer_needs,
        "recall_when_cut",
        lambda model, draws, budgets: given.append(budgets),
    )
    cut_alone(model, [], 8)
    assert given == [[8, whole], [whole, 8]]


def test_the_command_trains_all_but_the_first_and_writes_what_it_found(
    monkeypatch, tmp_path, capfd
):
    num_threads = torch.get_num_threads()
    trained = []

    def train_recipe(recipe, seed):
        trained.append((recipe, seed))
        return recall.load("notes_g2"), {}

    path = tmp_path / "layer_needs.json"
    draw = lambda task, n, g: recall.draw_task(task, 2, g)  # noqa: E731
    monkeypatch.setattr(layer_needs, "RESULTS", path)
    monkeypatch.setattr(layer_needs, "NAMES", ("notes_g2",))
    monkeypatch.setattr(layer_needs, "SEEDS", 2)
    monkeypatch.setattr(layer_needs, "draw_task", draw)
    monkeypatch.setattr(layer_needs, "train_recipe", train_recipe)
    monkeypatch.setattr("sys.argv", ["lib/measure/layer_needs.py"])
    try:
        layer_needs.main()
    finally:
        torch.set_num_threads(num_threads)
    assert trained == [(recall.RECIPES["notes_g2"], 1)]
    result = json.loads(path.read_text())
    assert result["command"] == "python -m lib.measure.layer_needs"
    first, second = result["notes_g2"]
    assert (first["seed"], second["seed"]) == (0, 1)
    assert {key: first[key] for key in first if key != "seed"} == {
        key: second[key] for key in second if key != "seed"
    }
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    draws = [recall.first_question(draw("notes", 64, g)) for g in generators]
    model = recall.load("notes_g2")
    for layer, budgets in enumerate([[24, 1024], [1024, 24]]):
        expected = recall_when_cut(model, draws, budgets, Snap()).accuracies
        assert first["cut to 24"][layer] == pytest.approx(expected)
    assert first["whole"] == pytest.approx(recall_when_cut(model, draws, 1024).accuracies)
    captured = capfd.readouterr()
    assert "notes_g2, seed 1" in captured.out and captured.err == ""


def test_what_was_found_is_what_is_measured_here():
    found = json.loads(layer_needs.RESULTS.read_text())
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    draws = [recall.first_question(recall.draw_task("notes", 64, g)) for g in generators]
    for name in layer_needs.NAMES:
        assert [run["seed"] for run in found[name]] == list(range(layer_needs.SEEDS))
        here = [quality.accuracies for quality in cut_alone(recall.load(name), draws, 8)]
        for layer, accuracies in enumerate(here):
            # A score next to another may fall on the other side on another machine.
            assert found[name][0]["cut to 8"][layer] == pytest.approx(
                accuracies, abs=0.02
            )
