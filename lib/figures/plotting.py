"""Figures of measurements; those of structures are in drawing.py.

A colour means the same thing in every chapter, and never colour alone: what is wasted
or computed again is hatched grey too, a prediction is dashed, a measurement has
markers. Each function returns what it drew on.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lib.config import check_count
from lib.engine import Step
from lib.simulation import Usage

NEW = "#0072B2"  # computed or written now
# Or computed again.
WASTED = {"facecolor": "#DDDDDD", "edgecolor": "#8C8C8C", "hatch": "////"}
# A request, by the engine.
SENT_BACK = {
    "marker": "x",
    "linestyle": "none",
    "color": "black",
    "markeredgewidth": 1.6,
}
PREDICTED = {"color": "black", "linestyle": "--"}
BAND = {"color": "#8C8C8C", "alpha": 0.22, "linewidth": 0}


def use_course_style():
    """Make every figure drawn from here on look like the course's."""
    plt.style.use(Path(__file__).with_name("course.mplstyle"))


def plot_measured(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    predicted: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    log: bool = False,
    log_x: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Lines with markers, each named at its end; predictions dashed and black.

    series and predicted: name -> (x values, y values). Both axes are logarithmic with
    `log`, the x axis alone with `log_x`.
    """
    ax = ax or plt.subplots()[1]
    ends = {}
    if log or log_x:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    else:
        ax.set_xticks(next(iter(series.values()))[0])
    if log:
        values = [value for _, y in series.values() for value in y]
        ax.set_yscale("log")
        is_wide = max(values) > 100 * min(values)
        ax.yaxis.set_major_locator(LogLocator(subs=(1,) if is_wide else (1, 2, 5)))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: quantity(y)))
    for name, (x, y) in (predicted or {}).items():
        (ends[name],) = ax.plot(x, y, **PREDICTED, zorder=3)
    for name, (x, y) in series.items():
        (ends[name],) = ax.plot(x, y, marker="o")
    if not log:
        ax.set_ylim(bottom=0)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    _label_ends(ax, ends)
    return ax


def plot_next_token(
    probs: torch.Tensor, *, title: str, num_tokens: int = 8, ax: Axes | None = None
) -> Axes:
    """Bars for the most probable of the next tokens: probs (V,)."""
    ax = ax or plt.subplots()[1]
    top_probs, token_ids = probs.topk(num_tokens)
    names = [_byte_name(int(token_id)) for token_id in token_ids]
    bars = ax.barh(range(num_tokens), top_probs.tolist(), color=NEW, height=0.7)
    rest = ax.barh(num_tokens, 1 - float(top_probs.sum()), height=0.7, **WASTED)
    ax.set_yticks(range(num_tokens + 1), [*names, f"other {len(probs) - num_tokens}"])
    ax.bar_label(bars, fmt="%.3f", padding=3)
    ax.bar_label(rest, fmt="%.3f", padding=3)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.1)
    ax.set(xlabel="probability", title=title)
    ax.tick_params(axis="y", labelfontfamily="monospace")
    return ax


def plot_timelines(
    timelines: Mapping[str, Sequence[int]], *, title: str, ax: Axes | None = None
) -> Axes:
    """Bytes alive after each operation of a run: name -> `Cost.timeline`."""
    ax = ax or plt.subplots()[1]
    for name, timeline in timelines.items():
        label = f"{name}: peak {max(timeline) / 1e6:.1f} MB"
        ax.plot(timeline, linewidth=1.2, label=label)
    ax.legend(loc="upper right")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: quantity(y)))
    ax.set_ylim(0, 1.12 * max(map(max, timelines.values())))
    ax.set(xlabel="operations so far", ylabel="memory alive (bytes)", title=title)
    return ax


def plot_training_bytes(
    sizes: Mapping[str, Mapping[str, int]], *, title: str, ax: Axes | None = None
) -> Axes:
    """Stacked bars of what training holds: name -> bytes by kind, as of
    `training.training_bytes` and `training.step_bytes`."""
    ax = ax or plt.subplots()[1]
    looks = {
        "weights": {"color": NEW},
        "gradients": {"color": "#56B4E9", "hatch": ".."},
        "optimizer": {"color": "#009E73", "hatch": "\\\\"},
        "activations": {"color": "#E69F00", "hatch": "//"},
        "dropout masks": {"color": "#F0E442", "hatch": "xx"},
        "last norm": {"color": "#CC79A7"},
        "logits and loss": {"color": "#D55E00", "hatch": "oo"},
    }
    kinds = next(iter(sizes.values()))
    looks = {kind: look for kind, look in looks.items() if kind in kinds}
    bottom = [0] * len(sizes)
    for kind, look in looks.items():
        heights = [by_kind[kind] for by_kind in sizes.values()]
        ax.bar(list(sizes), heights, bottom=bottom, label=kind, edgecolor="white", **look)
        bottom = [low + height for low, height in zip(bottom, heights)]
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: quantity(y)))
    ax.grid(axis="x", visible=False)
    ax.set(ylabel="memory (bytes)", title=title)
    ax.legend(reverse=True, loc="upper left")
    return ax


def plot_table(sweeps: Sequence) -> Figure:
    """What measure/table.py measured: memory over layers, attention's work over tokens.

    sweeps: of `table.sweep`, one per column.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    sizes = list(sweeps[0].costs)  # pairs (N, L), first along N, then along L
    plot_measured(
        {sweep.column: sweep.along("L", "peak memory") for sweep in sweeps},
        xlabel=f"layers, L (with {sizes[-1][0]} tokens)",
        ylabel="peak memory (bytes)",
        title="Checkpoints turn L into √L",
        log=True,
        ax=left,
    )
    plot_measured(
        {sweep.column: sweep.along("N", "attention FLOPs") for sweep in sweeps},
        xlabel=f"tokens, N (with {sizes[0][1]} layers)",
        ylabel="FLOPs in attention",
        title="Recomputing turns N² into N³",
        log=True,
        ax=right,
    )
    return figure


def plot_usage(
    usages: Mapping[str, Usage],
    *,
    title: str,
    published: Mapping[str, Sequence[float]] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Stacked bars of what a pool was used for: name -> `simulation.simulate`.

    published: name -> the paper's percentages, in the order of the parts, as many as it
    has. Each is a thin bar below ours.
    """
    looks = {
        "tokens": {"color": NEW},
        "reservation": {"color": "#9FC9E3", "hatch": ".."},
        "internal": WASTED,
        "external": {"facecolor": "white", "edgecolor": "#8C8C8C"},
    }
    long_names = {
        "internal": "internal fragmentation",
        "external": "external fragmentation\nand others",
    }
    published = published or {}
    assert published.keys() <= usages.keys(), (
        f"published: expected names among {list(usages)}, got {list(published)}"
    )
    rows, middle = [], 0.0  # of each bar: name, percentages, middle, height, font size
    for name, usage in usages.items():
        shares = [100 * getattr(usage, part) for part in looks]
        rows.append((name, shares, middle, 0.7, 10.5))
        if name in published:
            middle += 0.58
            rows.append(("the paper", published[name], middle, 0.34, 8.0))
        middle += 1
    names, shares, middles, heights, font_sizes = zip(*rows)

    ax = ax or plt.subplots(figsize=(7.0, 0.9 + 0.42 * middle))[1]
    left = [0.0] * len(rows)
    for i, (part, look) in enumerate(looks.items()):
        widths = [share[i] if i < len(share) else 0 for share in shares]
        label = long_names.get(part, part)
        ax.barh(middles, widths, left=left, height=heights, label=label, **look)
        left = [start + width for start, width in zip(left, widths)]
    for (share, *_), middle, font_size in zip(shares, middles, font_sizes):
        at, colour = (1, "white") if share > 15 else (share + 1, "black")
        look = {"va": "center", "color": colour, "fontsize": font_size}
        ax.text(at, middle, f"{share:.1f}%", **look)
    ax.set_yticks(middles, names)
    for label, font_size in zip(ax.get_yticklabels(), font_sizes):
        label.set_fontsize(font_size)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set(xlim=(0, 100), xlabel="share of the pool (%)", title=title)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def plot_pool(steps: Sequence[Step], num_blocks: int, *, title: str) -> Figure:
    """The pool over the steps of an engine: blocks in use above, requests below.

    steps: an engine's, or those of `simulation.predict_steps`; the first is step 1. A
    cross marks a step that sent requests back.
    """
    figure, (above, below) = plt.subplots(2, 1, figsize=(7.0, 4.4), sharex=True)
    edges = [i + 0.5 for i in range(len(steps) + 1)]
    used = [num_blocks - step.num_free_blocks for step in steps]
    above.stairs(used, edges, fill=True, color="#9FC9E3")
    above.axhline(num_blocks, color="black", linewidth=1)
    sent_back = [i + 0.5 for i, step in enumerate(steps) if step.preempted]
    (crosses,) = above.plot(sent_back, [num_blocks] * len(sent_back), **SENT_BACK)
    above.set(ylim=(0, 1.15 * num_blocks), title=title)
    above.set_ylabel(f"blocks in use, of {num_blocks}")
    in_batch = [len(step.counts) for step in steps]
    look = {"color": NEW, "linewidth": 1.8}
    handles = {"in the batch": below.stairs(in_batch, edges, **look)}
    waiting = [step.num_waiting for step in steps]
    look = {"color": "#D55E00", "linestyle": (0, (3, 1)), "linewidth": 1.8}
    handles["waiting"] = below.stairs(waiting, edges, **look)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.yaxis.set_major_locator(MaxNLocator(integer=True))
    below.set(xlim=(edges[0], edges[-1]), xlabel="step", ylabel="requests")
    below.set_ylim(bottom=0)
    if sent_back:
        handles["sent back"] = crosses
    look = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 3}
    below.legend(handles.values(), handles, **look)
    return figure


def plot_latency(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    ax: Axes | None = None,
) -> Axes:
    """How long a request waits per token, over how many come per second.

    curves: name -> (requests/s, normalized latencies in s per token), means of
    `simulation.Served.normalized`.
    """
    ax = ax or plt.subplots()[1]
    ends = {}
    for (name, (rates, seconds)), marker in zip(curves.items(), itertools.cycle("osD^v")):
        (ends[name],) = ax.plot(rates, seconds, marker=marker, markersize=5)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: quantity(y)))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlim(left=0)
    ax.set(
        xlabel="requests that come per second",
        ylabel="normalized latency (s per token)",
        title=title,
    )
    _label_ends(ax, ends)
    return ax


def plot_quality(
    panels: Sequence[tuple[str, str, Mapping[str, Sequence], Callable]],
    *,
    title: str,
    text_lens: Sequence[int] | None = None,
) -> Figure:
    """Panels side by side: what each way to keep keys and values costs and is worth.

    panels: each a name and a scale for its y axis ("linear", or "symlog", which shows
    small losses beside large ones); by method, each `Quality` of lib/measure/quality.py;
    and what of one is drawn, a number for each draw of texts. The mean is marked, and a
    line goes from the least to the most. A method looks the same in all panels. The x
    axis is logarithmic: bytes per token or, with text_lens, of a text of so many tokens,
    a length for each panel. Raises ValueError for more, fewer or other lengths.
    """
    lens = [None] * len(panels)
    if text_lens is not None:
        lens = [check_count("text_lens", T) for T in text_lens]
    if len(lens) != len(panels):
        raise ValueError(
            f"text_lens: expected {len(panels)}, one for each panel, got {len(lens)}"
        )
    figure, (axes,) = plt.subplots(1, len(panels), figsize=(8.6, 4.4), squeeze=False)
    look_of = _looks(methods for _, _, methods, _ in panels)
    named = {}
    for ax, (ylabel, yscale, methods, draws_of), T in zip(axes, panels, lens):
        lowest, highest = -0.0033, 0.01
        for name, qualities in methods.items():
            if not qualities:
                continue
            by_bytes = sorted(qualities, key=lambda quality: quality.bytes_per_token)
            draws = [draws_of(quality) for quality in by_bytes]
            means, least, most = ([f(x) for x in draws] for f in (mean, min, max))
            lowest, highest = min(lowest, *least), max(highest, *most)
            named[name] = ax.errorbar(
                [quality.bytes_per_token * (T or 1) for quality in by_bytes],
                means,
                [
                    [b - a for a, b in zip(*ends)]
                    for ends in ((least, means), (means, most))
                ],
                linewidth=1.2,
                **look_of[name],
            )
        ax.set_xscale("log", base=2 if T is None else 4)  # of whole texts: wider labels
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        if yscale == "symlog":
            ax.set_yscale("symlog", linthresh=0.01)
            ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            ax.set_ylim(1.5 * lowest, 1.5 * highest)
        xlabel = "bytes per token" if T is None else f"bytes of a text of {T:,} tokens"
        ax.set(xlabel=xlabel, ylabel=ylabel)
    figure.legend(named.values(), named, loc="outside lower center", ncols=3)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    return figure


def plot_bands(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    log_x: bool = False,
) -> Figure:
    """Panels side by side, with the same axes: lines through means of draws, each in a
    band from the lowest draw to the highest.

    panels: name -> name of a line -> (x values, the draws at each of them). A line looks
    the same in all panels. The x axis is logarithmic with `log_x`. Raises ValueError
    where there is no panel, or an x value has no draws.
    """
    if not panels:
        raise ValueError("panels: expected one or more, got none")
    for panel, lines in panels.items():
        for name, (x, draws) in lines.items():
            num_draws = [len(values) for values in draws]
            if len(x) != len(draws) or 0 in num_draws:
                raise ValueError(
                    f"{panel}, {name}: expected draws at each of {len(x)} x values, got "
                    f"{num_draws}"
                )
    figure, (axes,) = plt.subplots(
        1, len(panels), figsize=(8.6, 4.2), sharex=True, sharey=True, squeeze=False
    )
    look_of = _looks(panels.values())
    named, ticks = {}, set()
    for ax, (panel, lines) in zip(axes, panels.items()):
        for name, (x, draws) in lines.items():
            means, least, most = (
                [f(values) for values in draws] for f in (mean, min, max)
            )
            (named[name],) = ax.plot(x, means, **look_of[name])
            ax.fill_between(x, least, most, **BAND | {"color": named[name].get_color()})
            ticks |= set(x)
        ax.set_title(panel, fontsize=10.5, fontweight="normal")
        ax.set(xlabel=xlabel)
    if log_x:
        axes[0].set_xscale("log", base=2)
    axes[0].set_xticks(sorted(ticks), [f"{x:g}" for x in sorted(ticks)])
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel(ylabel)
    named["lowest to highest draw"] = Patch(**BAND)
    ncols = 4 if len(named) <= 4 else 3  # more would not fit the width
    figure.legend(named.values(), named, loc="outside lower center", ncols=ncols)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    return figure


def plot_layers(
    rows: Mapping[str, Sequence[float]], *, xlabel: str, ylabel: str, title: str
) -> Figure:
    """Bars, one for each layer from 0 on, in rows with the same axes: name -> a number
    for each layer. Raises ValueError unless all rows have as many."""
    nums = [len(values) for values in rows.values()]
    if len(set(nums)) != 1 or 0 in nums:
        raise ValueError(f"rows: expected as many layers in each, got {nums}")
    figure, axes = plt.subplots(
        len(rows), 1, figsize=(8.6, 1.2 + 1.7 * len(rows)), sharex=True, sharey=True
    )
    axes = [axes] if len(rows) == 1 else axes
    for ax, (name, values) in zip(axes, rows.items()):
        ax.bar(range(len(values)), values, color=NEW)
        ax.set_title(name, fontsize=10.5, fontweight="normal")
    axes[-1].set(xlabel=xlabel)
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.supylabel(ylabel, fontsize=10)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    return figure


def _looks(panels: Iterable[Iterable[str]]) -> dict[str, dict[str, str]]:
    """A marker and a colour for each name, the same in all panels."""
    names = dict.fromkeys(name for lines in panels for name in lines)
    cycle = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    colors = itertools.cycle(["black", *cycle])
    looks = zip(itertools.cycle("osD^v<>PX*"), colors)
    return {name: {"marker": m, "color": c} for name, (m, c) in zip(names, looks)}


def plot_roofline(
    roofs: Mapping[str, tuple[float, float]],
    points: Mapping[str, tuple[float, float]],
    *,
    title: str,
    published: Sequence[str] = (),
    ax: Axes | None = None,
) -> Axes:
    """What a machine can do with a byte that it moves, and what some work does.

    roofs: name -> (bytes/s, FLOP/s), of which those in `published` are dashed: somebody
    else's. points: name -> (FLOPs per byte moved, FLOP/s).
    """
    ax = ax or plt.subplots(figsize=(7.0, 4.2))[1]
    x = [2.0**i for i in range(-2, 13)]
    ends = {}
    for name, (bytes_per_s, flops_per_s) in roofs.items():
        look = PREDICTED if name in published else {"color": NEW}
        with_corner = sorted([*x, flops_per_s / bytes_per_s])
        y = [min(intensity * bytes_per_s, flops_per_s) for intensity in with_corner]
        (ends[name],) = ax.plot(with_corner, y, **look)
    for name, (intensity, flops_per_s) in points.items():
        ax.plot(intensity, flops_per_s, "o", color="#D55E00")
        look = {"xytext": (6, -10), "textcoords": "offset points", "color": "#D55E00"}
        ax.annotate(name, (intensity, flops_per_s), fontsize=9, **look)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: quantity(y)))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel="FLOPs for each byte moved", ylabel="FLOP/s", title=title)
    _label_ends(ax, ends)
    return ax


def plot_loss_curve(result: dict, *, ax: Axes | None = None) -> Axes:
    """The run that `python -m lib.training` wrote to data/results/training.json."""
    ax = ax or plt.subplots()[1]
    losses = torch.tensor(result["train_nats_per_byte"])
    width = max(1, len(losses) // 100)  # steps averaged to one point
    smooth = losses[: len(losses) // width * width].view(-1, width).mean(dim=1)
    steps = torch.arange(len(smooth)) * width + width / 2
    (train,) = ax.plot(steps, smooth, color="#8C8C8C")
    held_out_steps, held_out = zip(*result["held_out_nats_per_byte"])
    (test,) = ax.plot(held_out_steps, held_out, color=NEW, marker="o", markersize=4)
    ax.set_ylim(top=min(3.0, float(losses.max())))
    _label_ends(ax, {"training": train, "held out": test})
    seconds = result["seconds"]
    took = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
    ax.set(
        xlabel=f"training step ({took} in all)",
        ylabel="loss (nats per byte)",
        title=f"{held_out[-1]:.3f} nats per byte on text it never saw",
    )
    return ax


def quantity(value: float) -> str:
    """A number with a decimal prefix, for axes.

    >>> [quantity(value) for value in (0, 0.25, 1500, 2_000_000, 3e9)]
    ['0', '0.25', '1.5 k', '2 M', '3 G']
    """
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g}"


def _byte_name(token_id: int) -> str:
    """A byte as Python writes it: 'a', or a number where it is no character alone."""
    return repr(chr(token_id)) if token_id < 128 else f"'\\x{token_id:02x}'"


def _label_ends(ax: Axes, lines: Mapping[str, Line2D]):
    """Name each line at its right end, in its colour, names at least a line apart. Where
    three or more come together there, a legend names them from the top to the bottom."""
    ax.autoscale_view()
    ends = {name: line.get_xydata()[-1] for name, line in lines.items()}
    right = max(x for x, _ in ends.values())
    offsets, lowest_free = {}, -math.inf  # in points
    for name in sorted(ends, key=lambda name: ends[name][1]):
        height = ax.transData.transform(ends[name])[1] * 72 / ax.figure.dpi
        shift = max(0.0, lowest_free - height)
        if ends[name][0] < 0.98 * right:
            shift = -12.0  # below the lines that go on
        else:
            lowest_free = height + shift + 12
        offsets[name] = (6, shift)
    if max(shift for _, shift in offsets.values()) > 18:
        from_top = sorted(lines, key=lambda name: -lines[name].get_ydata().mean())
        ax.legend([lines[name] for name in from_top], from_top)
        return
    for name, line in lines.items():
        ax.annotate(
            name,
            ends[name],
            offsets[name],
            textcoords="offset points",
            va="center",
            color=line.get_color(),
        )
