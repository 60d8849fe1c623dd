"""The table the course is about, measured: how memory and work grow with tokens N and with layers
L.

    python -m lib.table                                # prints it; exits 1 where a cell is out
    python -m lib.table --columns recompute --json recompute.json

Each column is one way to run the model. It is run under the meter at three lengths and three
depths, each r times the one before, and the exponent of a quantity f is

    log_r((f(r²x) - f(rx)) / (f(rx) - f(x)))

Differences, since whatever does not grow cancels in them. Two conditions let theory show on a small
model: fused attention (stored scores alone are N² bytes), and for the training columns the blocks
alone, with the sum of their output as the loss: unembedding and cross entropy do not depend on L
and are the same in both.

A new way to run the model is one entry of COLUMNS.
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

from lib import checkpointing, generate
from lib.config import ModelConfig
from lib.meter import Cost, machine_facts, measure, median_seconds
from lib.model import Transformer, attend_fused

TOLERANCE = 0.1  # of an exponent
ALONG_N = [(64, 4), (128, 4), (256, 4)]  # (N, L)
ALONG_L = [(32, 4), (32, 16), (32, 64)]  # perfect squares, so that √L segments come out even

QUANTITIES = {
    "peak memory": lambda cost: cost.peak_bytes,
    "attention FLOPs": lambda cost: cost.flops["attention"],
    "projection FLOPs": lambda cost: cost.flops["projection"],
    "forward calls": lambda cost: cost.calls["Embedding"],
    "block calls": lambda cost: cost.calls["Block"],
}
COUNTS = ("forward calls", "block calls")  # exact at every size; the others grow with an exponent


def model_of(num_layers: int) -> Transformer:
    """A random model, d_model 64: what it says does not matter here, what it costs does."""
    torch.manual_seed(0)
    return Transformer(ModelConfig(256, num_layers, 4, 2, d_model=64, d_ff=192, max_seq_len=512))


def training(num_tokens: int, num_layers: int) -> Callable[[], None]:
    return _training_step(num_tokens, num_layers, checkpointing.run_blocks)


def checkpointed(num_tokens: int, num_layers: int) -> Callable[[], None]:
    def sqrt_segments(blocks, x, positions, attend):
        return checkpointing.checkpoint_segments(
            blocks, x, positions, attend, math.isqrt(len(blocks))
        )

    return _training_step(num_tokens, num_layers, sqrt_segments)


def recompute(num_tokens: int, num_layers: int) -> Callable[[], None]:
    model = model_of(num_layers).eval()
    prompt_ids = torch.zeros(1, dtype=torch.int64)
    return lambda: generate.generate_recompute(model, prompt_ids, num_tokens, temperature=0)


def _training_step(num_tokens: int, num_layers: int, run: Callable) -> Callable[[], None]:
    model = model_of(num_layers)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(
            parameter
        )  # before the meter starts: the same in every column
    token_ids, positions = torch.zeros(1, num_tokens, dtype=torch.int64), torch.arange(num_tokens)
    return lambda: (
        run(model.blocks, model.embed(token_ids), positions, attend_fused).sum().backward()
    )


@dataclass(frozen=True)
class Growth:
    """factor · N^a · L^b, as theory has it. A factor counts forward passes: checkpointing makes one
    more."""

    N: float
    L: float
    factor: int = 1

    def __call__(self, num_tokens: int, num_layers: int) -> float:
        return self.factor * num_tokens**self.N * num_layers**self.L

    def __str__(self) -> str:
        """
        >>> str(Growth(2, 0.5, factor=2)), str(Growth(0, 0))
        ('2 N² √L', '1')
        """
        powers = {0: "", 0.5: "√{}", 1: "{}", 2: "{}²", 3: "{}³"}
        terms = [powers[self.N].format("N"), powers[self.L].format("L")]
        terms = [str(self.factor)] * (self.factor != 1) + [term for term in terms if term]
        return " ".join(terms) or "1"


@dataclass(frozen=True)
class Column:
    setup: Callable[[int, int], Callable[[], None]]  # (N, L) -> the call to measure
    theory: dict[str, Growth]  # by quantity


COLUMNS = {
    "training": Column(
        training,
        {
            "peak memory": Growth(1, 1),
            "attention FLOPs": Growth(2, 1),
            "projection FLOPs": Growth(1, 1),
            "forward calls": Growth(0, 0),
            "block calls": Growth(0, 1),
        },
    ),
    "checkpointed": Column(
        checkpointed,
        {
            "peak memory": Growth(1, 0.5),
            "attention FLOPs": Growth(2, 1, factor=2),
            "projection FLOPs": Growth(1, 1, factor=2),
            "forward calls": Growth(0, 0),
            "block calls": Growth(0, 1, factor=2),
        },
    ),
    "recompute": Column(
        recompute,
        {
            "peak memory": Growth(1, 0),
            "attention FLOPs": Growth(3, 1),
            "projection FLOPs": Growth(2, 1),
            "forward calls": Growth(1, 0),
            "block calls": Growth(1, 1),
        },
    ),
}


@dataclass(frozen=True)
class Sweep:
    """One column, measured."""

    column: str
    costs: dict[tuple[int, int], Cost]  # by (N, L)
    factors: dict[
        str, float
    ]  # FLOPs in forward passes, less those of plain training: 1 + (f - plain) / forward
    seconds: float  # median, at the most tokens and the fewest layers


@dataclass(frozen=True)
class Cell:
    """One number of the table beside its theory. `axis`: "N" or "L", an exponent; "factor";
    "count"; "seconds"."""

    column: str
    quantity: str
    axis: str
    theory: float | None  # None where theory says nothing
    measured: float

    @property
    def is_out(self) -> bool:
        if self.theory is None:
            return False
        # To stay the same, bytes have to be the same bytes; a count and a factor are exact.
        tolerance = TOLERANCE if self.axis in ("N", "L") and self.theory != 0 else 0
        return not abs(self.measured - self.theory) <= tolerance  # so that NaN is out


def sweep(column: str, progress: tqdm | None = None) -> Sweep:
    """Run one column under the meter at every size."""
    setup, theory = COLUMNS[column].setup, COLUMNS[column].theory
    costs = {}
    for N, L in ALONG_N + ALONG_L:
        costs[N, L] = measure(setup(N, L))
        if progress is not None:
            progress.set_postfix_str(f"{column}, {N} tokens, {L} layers")
            progress.update()
    N, L = ALONG_N[-1]
    factors = {}
    if any(growth.factor != 1 for growth in theory.values()):
        plain, forward = measure(training(N, L)), measure(_forward(N, L))
        for quantity in ("attention FLOPs", "projection FLOPs"):
            ours, without, unit = (
                QUANTITIES[quantity](cost) for cost in (costs[N, L], plain, forward)
            )
            factors[quantity] = 1 + (ours - without) / unit
    return Sweep(column, costs, factors, median_seconds(setup(N, L), repeats=3))


def fit(sweep: Sweep) -> list[Cell]:
    """The cells of one column: an exponent an axis, a factor where there is one, a count a size,
    seconds."""
    cells = []
    for quantity, growth in COLUMNS[sweep.column].theory.items():
        values = {size: QUANTITIES[quantity](cost) for size, cost in sweep.costs.items()}
        if quantity in COUNTS:
            for size, value in values.items():
                cells.append(Cell(sweep.column, quantity, "count", growth(*size), value))
            continue
        exponent_N = growth_exponent(
            [values[size] for size in ALONG_N], ratio=ALONG_N[1][0] // ALONG_N[0][0]
        )
        exponent_L = growth_exponent(
            [values[size] for size in ALONG_L], ratio=ALONG_L[1][1] // ALONG_L[0][1]
        )
        cells.append(Cell(sweep.column, quantity, "N", growth.N, exponent_N))
        cells.append(Cell(sweep.column, quantity, "L", growth.L, exponent_L))
        if quantity in sweep.factors:
            cells.append(
                Cell(sweep.column, quantity, "factor", growth.factor, sweep.factors[quantity])
            )
    return cells + [Cell(sweep.column, "seconds", "seconds", None, sweep.seconds)]


def growth_exponent(values: list[float], ratio: int) -> float:
    """The p for which values f(x), f(rx), f(r²x) grow like x^p beside a constant. NaN where they
    fall.

    >>> growth_exponent([5 + 1, 5 + 4, 5 + 16], ratio=2)  # 5 + x² at 1, 2, 4
    2.0
    """
    first, second = values[1] - values[0], values[2] - values[1]
    if first == second == 0:
        return 0.0
    return math.log(second / first, ratio) if first > 0 and second > 0 else math.nan


def render(cells: list[Cell]) -> str:
    """The cells as a Markdown table that also reads well in a terminal; a cell that is out carries
    an ✗."""
    columns = list(dict.fromkeys(cell.column for cell in cells))
    rows = [["", *columns]]
    for quantity in QUANTITIES:
        theory = [str(COLUMNS[column].theory[quantity]) for column in columns]
        where = " at N={}, L={}".format(*ALONG_L[-1]) if quantity in COUNTS else ""
        mine = [
            [cell for cell in cells if (cell.column, cell.quantity) == (column, quantity)]
            for column in columns
        ]
        rows.append([f"{quantity}: theory", *theory])
        rows.append([f"measured{where}", *map(_render_measured, mine)])
    seconds = [
        next(cell.measured for cell in cells if (cell.column, cell.axis) == (c, "seconds"))
        for c in columns
    ]
    rows.append(
        ["seconds at N={}, L={}".format(*ALONG_N[-1]), *(f"{value:.3f}" for value in seconds)]
    )

    widths = [max(len(row[i]) for row in rows) for i in range(len(columns) + 1)]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |"
        for row in rows
    ]
    return "\n".join(
        [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
    )


def _render_measured(cells: list[Cell]) -> str:
    by_axis = {
        cell.axis: cell.measured for cell in cells
    }  # of several counts the last, at the most layers
    if "count" in by_axis:
        text = f"{by_axis['count']}"
    else:
        factor = f"{by_axis['factor']:.2f} " if "factor" in by_axis else ""
        text = f"{factor}N^{by_axis['N']:.2f} L^{by_axis['L']:.2f}"
    return text + " ✗" * any(cell.is_out for cell in cells)


def _forward(num_tokens: int, num_layers: int) -> Callable[[], None]:
    model, positions = model_of(num_layers), torch.arange(num_tokens)
    token_ids = torch.zeros(1, num_tokens, dtype=torch.int64)
    return lambda: checkpointing.run_blocks(
        model.blocks, model.embed(token_ids), positions, attend_fused
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lib.table", description="Measure the table on this machine."
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        choices=COLUMNS,
        default=list(COLUMNS),
        metavar="COLUMN",
        help=f"some of: {', '.join(COLUMNS)} (default: all)",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every cell there too")
    args = parser.parse_args()
    torch.set_num_threads(1)  # faster than two for a model this small

    with tqdm(
        total=len(ALONG_N + ALONG_L) * len(args.columns), file=sys.stdout, leave=False, disable=None
    ) as progress:
        cells = [cell for column in args.columns for cell in fit(sweep(column, progress))]
    print(render(cells))
    if args.json:
        command = shlex.join(["python", "-m", "lib.table", *sys.argv[1:]])
        result = {
            "command": command,
            "machine": machine_facts(),
            "cells": [asdict(cell) for cell in cells],
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    out = [cell for cell in cells if cell.is_out]
    for cell in out:
        print(
            f"out: {cell.column}, {cell.quantity} ({cell.axis}): "
            f"theory {cell.theory}, measured {cell.measured}"
        )
    if not out:
        print(f"every exponent is within {TOLERANCE} of theory, every count and factor exact")
    return 1 if out else 0


if __name__ == "__main__":
    sys.exit(main())
