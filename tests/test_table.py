import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib.measure import columns, table
from lib.measure.columns import COLUMNS, Growth
from lib.measure.meter import Cost, measure
from lib.measure.table import (
    SIZES,
    SMALL_SIZES,
    Cell,
    Sweep,
    fit,
    growth_exponent,
    render,
)


def made_up_sweep(column: str) -> Sweep:
    """Costs that follow theory exactly, beside a constant."""
    theory = COLUMNS[column].theory
    costs = {}
    for size in SIZES["N"] + SIZES["L"]:
        kv_bytes = {
            name: theory[f"KV bytes {name}"](*size) if f"KV bytes {name}" in theory else 0
            for name in ("reserved", "used")
        }
        costs[size] = Cost(
            value=SimpleNamespace(
                reserved_bytes=kv_bytes["reserved"], used_bytes=kv_bytes["used"]
            ),
            peak_bytes=7000 + 100 * theory["peak memory"](*size),
            saved_bytes=0,
            flops=Counter(
                attention=500 + theory["attention FLOPs"](*size),
                projection=90 + theory["projection FLOPs"](*size),
            ),
            calls=Counter(
                Embedding=int(theory["forward calls"](*size)),
                Block=int(theory["block calls"](*size)),
            ),
            timeline=[],
            saved=[],
        )
    factors = {
        q: float(g.factor) for q, g in theory.items() if g.factor != 1 and "FLOPs" in q
    }
    return Sweep(
        column,
        costs,
        factors,
        works=dict.fromkeys(factors, 4 / 3),
        seconds=0.5,
        sizes=SIZES,
    )


@pytest.mark.parametrize("column", COLUMNS)
def test_costs_that_follow_theory_are_nowhere_out(column):
    cells = fit(made_up_sweep(column))
    assert [cell for cell in cells if cell.is_out] == []
    assert "✗" not in render(cells)


@pytest.mark.parametrize(
    "spoil, quantity, axis",
    [
        (
            lambda costs: costs[256, 4].flops.update(attention=10**7),
            "attention FLOPs",
            "N",
        ),
        (
            lambda costs: costs[16, 64].flops.update(projection=10**6),
            "projection FLOPs",
            "L",
        ),
        (
            lambda costs: costs[64, 4].calls.update(Embedding=1),
            "forward calls",
            "count",
        ),
        (lambda costs: costs[16, 16].calls.subtract(Block=1), "block calls", "count"),
        (
            lambda costs: object.__setattr__(costs[16, 64], "peak_bytes", 1),
            "peak memory",
            "L",
        ),
    ],
)
def test_a_cost_off_theory_is_out_and_marked(spoil, quantity, axis):
    sweep = made_up_sweep("recompute")
    spoil(sweep.costs)
    out = [cell for cell in fit(sweep) if cell.is_out]
    assert {(cell.quantity, cell.axis) for cell in out} == {(quantity, axis)}
    assert "✗" in render(fit(sweep))


def test_a_factor_must_be_exact_and_an_exponent_within_a_tenth():
    assert Cell("x", "attention FLOPs", "factor", 2, 2.001).is_out
    assert not Cell("x", "attention FLOPs", "factor", 2, 2.0).is_out
    assert Cell("x", "peak memory", "N", 1, 1.11).is_out
    assert not Cell("x", "peak memory", "N", 1, 1.09).is_out
    assert Cell("x", "peak memory", "L", 0, 0.01).is_out  # theory 0 means equal bytes
    assert Cell("x", "peak memory", "N", 1, math.nan).is_out
    assert not Cell("x", "seconds", "seconds", None, 3.2).is_out


def test_exponents_ignore_what_does_not_grow():
    for p in (0.5, 1, 2, 3):
        values = [1000 + 3 * x**p for x in (4, 16, 64)]
        assert growth_exponent(values, ratio=4) == pytest.approx(p)
    assert growth_exponent([5, 5, 5], ratio=2) == 0
    assert math.isnan(growth_exponent([5, 4, 6], ratio=2))
    assert math.isnan(growth_exponent([5, 6, 6], ratio=2))
    assert math.isnan(growth_exponent([5, 6, 4], ratio=2))


def test_checkpointing_is_a_third_more_work_than_training():
    sizes = {"N": [(8, 4), (16, 4), (32, 4)], "L": [(8, 1), (8, 4), (8, 16)]}
    sweep = table.sweep("checkpointed", sizes=sizes)
    assert sweep.works["projection FLOPs"] == pytest.approx(4 / 3, rel=1e-12)
    assert sweep.works["attention FLOPs"] == pytest.approx(9 / 7, rel=1e-12)
    assert sweep.factors == {"attention FLOPs": 2, "projection FLOPs": 2}


def test_the_paged_column_has_exactly_the_blocks_it_needs():
    cache = columns.paged(num_tokens=33, num_layers=1)()
    assert cache.manager.free_block_ids == [] and cache.manager.num_blocks == 3
    assert cache.seq_lens.tolist() == [33]


@pytest.mark.parametrize("num_tokens, num_layers", [(8, 1), (16, 3), (40, 2)])
def test_the_work_of_chunks_is_that_counted_by_hand(num_tokens, num_layers):
    H, G, D, n, num_chunks = 4, 2, 16, 8, num_tokens // 8
    scores = values = 2 * H * n * n * D
    asked = 2 * H * n * D * D  # of the state
    told = 2 * G * n * D * D
    # A product's backward pass is two products. But nobody asks for the gradient of the
    # first state, which is zero, or of what the last chunk tells: no chunk reads that.
    flops = 3 * num_chunks * (scores + values + asked + told) - asked - 2 * told
    cost = measure(columns.chunked(num_tokens, num_layers))
    assert cost.flops["attention"] == num_layers * flops
    assert cost.calls["Block"] == num_layers and cost.calls["Embedding"] == 1
    plain = measure(columns.training(num_tokens, num_layers))
    assert cost.flops["projection"] == plain.flops["projection"]


def test_the_chunked_column_attends_as_its_state_does(monkeypatch):
    kept = []
    monkeypatch.setattr(columns, "_training_step", lambda *args: kept.extend(args))
    columns.chunked(20, 3)
    *sizes, run, attend = kept
    assert sizes == [20, 3] and run is columns.checkpointing.run_blocks
    q, k, v = (torch.randn(1, 20, n, 16, dtype=torch.float64) for n in (4, 2, 2))
    out, state = attend(1, q, k, v), torch.zeros(2, 16, 16, dtype=torch.float64)
    assert out.shape == (1, 20, 4, 16)
    for t in range(20):
        state = 0.97 * state + v[0, t].unsqueeze(-1) * k[0, t].unsqueeze(-2)
        expected = torch.cat([q[0, t, 2 * g : 2 * g + 2] @ state[g].T for g in range(2)])
        torch.testing.assert_close(out[0, t], expected)


def test_training_in_chunks_gives_every_weight_a_gradient(monkeypatch):
    models, make = [], columns.random_model
    monkeypatch.setattr(
        columns, "random_model", lambda L: models.append(make(L)) or models[-1]
    )
    columns.chunked(24, 2)()
    (model,) = models
    for name, parameter in model.blocks.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_growth_reads_as_one_would_write_it():
    assert str(Growth(1, 0.5)) == "N √L" and str(Growth(2, 1, factor=2)) == "2 N² L"
    assert Growth(2, 0.5, factor=2)(3, 16) == 72


def test_the_readme_quotes_the_theory_of_the_columns():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for quantity in table.QUANTITIES:
        if quantity != "block calls":
            theory = [str(c.theory.get(quantity, "")) for c in COLUMNS.values()]
            assert f"| {quantity} | {' | '.join(theory)} |" in readme


@pytest.mark.parametrize(
    "sizes",
    [SMALL_SIZES, pytest.param(SIZES, marks=pytest.mark.nightly)],
    ids=["small", "large"],
)
def test_the_command_measures_every_column_and_agrees_with_theory(
    tmp_path, monkeypatch, capfd, sizes
):
    for axis in sizes:
        monkeypatch.setitem(table.SIZES, axis, sizes[axis])
    paths = ["--json", f"{tmp_path}/table.json", "--figure", f"{tmp_path}/table.png"]
    monkeypatch.setattr("sys.argv", ["table", *paths])
    assert table.main() == 0
    assert (tmp_path / "table.png").stat().st_size > 5000
    out, err = capfd.readouterr()
    assert err == ""
    assert "| N √L " in out and "| 2 N² L " in out and "| N³ L " in out and "✗" not in out
    result = json.loads((tmp_path / "table.json").read_text())
    assert result["machine"]["torch"]
    assert {cell["column"] for cell in result["cells"]} == set(COLUMNS)
    for cell in result["cells"]:
        assert set(cell) == {"column", "quantity", "axis", "theory", "measured"}


def test_the_command_exits_with_an_error_where_a_cell_is_out(monkeypatch, capfd):
    wrong = columns.Column(
        columns.training, {**COLUMNS["training"].theory, "peak memory": Growth(2, 1)}
    )
    monkeypatch.setitem(COLUMNS, "training", wrong)
    monkeypatch.setattr("sys.argv", ["table", "--columns", "training"])
    assert table.main() == 1
    assert (
        "out: training, peak memory (N): theory 2, measured 1.0" in capfd.readouterr().out
    )


def test_an_unknown_column_is_named_with_those_there_are(monkeypatch, capfd):
    monkeypatch.setattr("sys.argv", ["table", "--columns", "magic"])
    with pytest.raises(SystemExit):
        table.main()
    assert "invalid choice: 'magic'" in capfd.readouterr().err
