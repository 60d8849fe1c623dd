"""The table the course is about, measured on this machine.

    python -m lib.measure.table              # prints it; exits 1 where a cell is out
    python -m lib.measure.table --columns recompute --json recompute.json

How do memory and work grow with tokens N and layers L? Each column of columns.py runs
under the meter at three lengths and at three depths, each r times the one before, and the
exponent of a quantity f is

    log_r((f(r²x) - f(rx)) / (f(rx) - f(x)))

Differences, since whatever does not grow cancels in them. Calls and the bytes of a cache
are not fitted: they have to be what theory says at every size.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from lib.figures import plotting
from lib.measure import columns
from lib.measure.columns import COLUMNS
from lib.measure.meter import Cost, machine_facts, measure, median_seconds
from lib.text import print_any_letter

TOLERANCE = 0.1  # of an exponent
# Sizes (N, L) along each axis. The depths are squares, so that √L segments come out even.
SIZES = {
    "N": [(64, 4), (128, 4), (256, 4)],
    "L": [(16, 4), (16, 16), (16, 64)],
}
SMALL_SIZES = {  # in a fifth of the time, or less
    "N": [(16, 1), (32, 1), (64, 1)],
    "L": [(16, 1), (16, 4), (16, 16)],
}

QUANTITIES = {
    "peak memory": lambda cost: cost.peak_bytes,
    "KV bytes reserved": lambda cost: cost.value.reserved_bytes,
    "KV bytes used": lambda cost: cost.value.used_bytes,
    "attention FLOPs": lambda cost: cost.flops["attention"],
    "projection FLOPs": lambda cost: cost.flops["projection"],
    "forward calls": lambda cost: cost.calls["Embedding"],
    "block calls": lambda cost: cost.calls["Block"],
}
# Exact at every size; the others are fitted.
COUNTS = ("KV bytes reserved", "KV bytes used", "forward calls", "block calls")
FACTORS = ("attention FLOPs", "projection FLOPs")  # counted in forward passes


@dataclass(frozen=True)
class Sweep:
    """One column, measured."""

    column: str
    costs: dict[tuple[int, int], Cost]  # by (N, L)
    # FLOPs beyond those of plain training, in forward passes: 1 + (f - plain) / forward.
    factors: dict[str, float]  # by quantity
    works: dict[str, float]  # the same FLOPs, f / plain: what the factor costs
    seconds: float  # median, at the last size along N
    sizes: dict[str, list[tuple[int, int]]]

    def along(self, axis: str, quantity: str) -> tuple[list[int], list[float]]:
        """The sizes along "N" or "L", and a quantity there: x and y of a plot."""
        sizes = self.sizes[axis]
        x = [size["NL".index(axis)] for size in sizes]
        return x, [QUANTITIES[quantity](self.costs[size]) for size in sizes]


@dataclass(frozen=True)
class Cell:
    """One number of the table, beside its theory.

    axis: "N" or "L" for an exponent, or "factor", "work", "count", "seconds".
    """

    column: str
    quantity: str
    axis: str
    theory: float | None  # None where theory says nothing
    measured: float

    @property
    def is_out(self) -> bool:
        if self.theory is None:
            return False
        # Not to grow means equal bytes; a count and a factor are exact.
        is_fitted = self.axis in ("N", "L") and self.theory != 0
        tolerance = TOLERANCE if is_fitted else 0
        return not abs(self.measured - self.theory) <= tolerance  # NaN is out


def sweep(
    column: str,
    progress: tqdm | None = None,
    *,
    sizes: dict[str, list[tuple[int, int]]] = SIZES,
    setup: Callable[[int, int], Callable] | None = None,
) -> Sweep:
    """Run one column under the meter, at every size.

    setup: another way to run it than its own, with the same theory.
    """
    setup, theory = setup or COLUMNS[column].setup, COLUMNS[column].theory
    costs = {}
    for N, L in sizes["N"] + sizes["L"]:
        costs[N, L] = measure(setup(N, L))
        if progress is not None:
            progress.set_postfix_str(f"{column}, {N} tokens, {L} layers")
            progress.update()
    N, L = sizes["N"][-1]
    factors, works = {}, {}
    if any(theory[quantity].factor != 1 for quantity in FACTORS):
        plain, forward = (
            measure(run(N, L)) for run in (columns.training, columns.forward)
        )
        for quantity in FACTORS:
            f, f_plain, f_forward = (
                QUANTITIES[quantity](cost) for cost in (costs[N, L], plain, forward)
            )
            factors[quantity] = 1 + (f - f_plain) / f_forward
            works[quantity] = f / f_plain
    seconds = median_seconds(setup(N, L), repeats=3)
    return Sweep(column, costs, factors, works, seconds, sizes)


def fit(sweep: Sweep) -> list[Cell]:
    """A cell for each exponent, each factor and what it costs, each count at each size,
    and seconds."""
    cells = []

    def add(quantity: str, axis: str, theory: float | None, measured: float):
        cells.append(Cell(sweep.column, quantity, axis, theory, measured))

    for quantity, growth in COLUMNS[sweep.column].theory.items():
        if quantity in COUNTS:
            for size, cost in sweep.costs.items():
                add(quantity, "count", growth(*size), QUANTITIES[quantity](cost))
            continue
        for axis, theory in (("N", growth.N), ("L", growth.L)):
            x, y = sweep.along(axis, quantity)
            add(quantity, axis, theory, growth_exponent(y, ratio=x[1] // x[0]))
        if quantity in sweep.factors:
            add(quantity, "factor", growth.factor, sweep.factors[quantity])
            add(quantity, "work", None, sweep.works[quantity])
    add("seconds", "seconds", None, sweep.seconds)
    return cells


def growth_exponent(values: list[float], ratio: int) -> float:
    """The p for which f(x), f(rx), f(r²x) grow like x^p beside a constant.

    0 where both differences are 0; else NaN where one of them is not positive.

    >>> growth_exponent([5 + 1, 5 + 4, 5 + 16], ratio=2)  # 5 + x² at 1, 2, 4
    2.0
    """
    first, second = values[1] - values[0], values[2] - values[1]
    if first == second == 0:
        return 0.0
    return math.log(second / first, ratio) if first > 0 and second > 0 else math.nan


def render(cells: list[Cell], sizes: dict[str, list[tuple[int, int]]] = SIZES) -> str:
    """A Markdown table that reads well in a terminal too; ✗ marks a cell that is out.

    sizes: those of the sweeps.
    """
    names = list(dict.fromkeys(cell.column for cell in cells))
    of = {(name, quantity): [] for name in names for quantity in (*QUANTITIES, "seconds")}
    for cell in cells:
        of[cell.column, cell.quantity].append(cell)

    rows = [["", *names]]
    for quantity in QUANTITIES:
        if not any(of[name, quantity] for name in names):
            continue
        where = " at N={}, L={}".format(*sizes["L"][-1]) if quantity in COUNTS else ""
        theory = [str(COLUMNS[name].theory.get(quantity, "")) for name in names]
        measured = [_render_measured(of[name, quantity]) for name in names]
        rows += [[f"{quantity}: theory", *theory], [f"measured{where}", *measured]]
    seconds = [f"{of[name, 'seconds'][0].measured:.3f}" for name in names]
    rows.append(["seconds at N={}, L={}".format(*sizes["N"][-1]), *seconds])

    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [[text.ljust(width) for text, width in zip(row, widths)] for row in rows]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(row) + " |" for row in padded)


def _render_measured(cells: list[Cell]) -> str:
    if not cells:
        return ""
    by_axis = {cell.axis: cell.measured for cell in cells}  # of several counts, the last
    if "count" in by_axis:
        text = f"{by_axis['count']:,}"
    else:
        factor = f"{by_axis['factor']:.2f} " if "factor" in by_axis else ""
        work = f", {by_axis['work']:.2f} × training" if "work" in by_axis else ""
        text = f"{factor}N^{by_axis['N']:.2f} L^{by_axis['L']:.2f}{work}"
    return text + " ✗" * any(cell.is_out for cell in cells)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lib.measure.table",
        description="Measure the table on this machine.",
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        choices=COLUMNS,
        default=list(COLUMNS),
        metavar="COLUMN",
        help=f"some of: {', '.join(COLUMNS)} (default: all)",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all cells there")
    parser.add_argument(
        "--figure", type=Path, metavar="PATH", help="draw the growth there"
    )
    args = parser.parse_args()
    print_any_letter()  # √
    torch.set_num_threads(1)  # faster than two for a model this small

    num_sizes = len(SIZES["N"] + SIZES["L"]) * len(args.columns)
    with tqdm(total=num_sizes, file=sys.stdout, leave=False, disable=None) as progress:
        sweeps = [sweep(name, progress) for name in args.columns]
    cells = [cell for column in sweeps for cell in fit(column)]
    print(render(cells))
    print("generation: a prompt of one token, and N tokens written")
    if args.json:
        command = shlex.join(["python", "-m", "lib.measure.table", *sys.argv[1:]])
        facts = {"command": command, "machine": machine_facts()}
        result = {**facts, "cells": [asdict(cell) for cell in cells]}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.figure:
        plotting.use_course_style()
        plotting.plot_table(sweeps).savefig(args.figure)
    out = [cell for cell in cells if cell.is_out]
    for cell in out:
        where = f"{cell.column}, {cell.quantity} ({cell.axis})"
        print(f"out: {where}: theory {cell.theory}, measured {cell.measured}")
    if not out:
        print(f"every exponent within {TOLERANCE} of theory; counts and factors exact")
    return 1 if out else 0


if __name__ == "__main__":
    sys.exit(main())
