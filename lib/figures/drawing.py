"""Drawings of structures, from the live object, so that none can disagree with the code.

As in plotting.py, solid is written now, and hatched grey is wasted or computed again.
A light tint was written before, white is free. Each function returns what it drew on.
"""

import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from lib.block_manager import BlockManager
from lib.config import ModelConfig, check_count
from lib.engine import Step
from lib.figures.plotting import NEW, SENT_BACK, WASTED
from lib.kv_cache import ContiguousKVCache
from lib.model import Transformer, attend_fused

CACHED = {"facecolor": "#B9D8EC", "edgecolor": "white"}
QUERY = {"facecolor": "#E69F00", "edgecolor": "white"}
KEY = {"facecolor": NEW, "edgecolor": "white"}
VALUE = {"facecolor": "#009E73", "edgecolor": "white"}
FREE = {"facecolor": "white", "edgecolor": "#8C8C8C"}
SHARED = {"facecolor": "#F5E6B8", "edgecolor": "#B8860B", "hatch": "\\\\"}
WAITING = {"color": "#8C8C8C", "linewidth": 2.4, "solid_capstyle": "butt"}
WANTED = "#D55E00"  # of a text, what an answer needs
# A token in a pruned cache: what is kept is dark, in print without colours too.
KEPT = {
    "kept": {"facecolor": NEW},
    "thrown out": {"facecolor": "#EDEDED"},
    "needed for the answer: kept": {"facecolor": WANTED},
    "needed for the answer: thrown out": {"facecolor": "#FAE0CC"},
}
FILLER = "·"
# Of requests, in the order of their arrival; each is named beside its colour.
REQUESTS = ["#9FC9E3", "#F2C48D", "#A8D8B9", "#DDB9D9", "#F0E29A", "#C8C8C8"]


def draw_attention(
    weights: torch.Tensor, tokens: Sequence[str], *, title: str, ax: Axes | None = None
) -> Axes:
    """Attention weights (T, T) of one head: a row for a query, a column for a key."""
    ax = ax or plt.subplots(figsize=(5.2, 4.6))[1]
    T = len(tokens)
    tint = LinearSegmentedColormap.from_list("tint", ["white", NEW])
    ax.imshow(weights.tolist(), cmap=tint, vmin=0, vmax=1)
    for t in range(T):
        for s in range(T):
            if s > t:
                ax.add_patch(Rectangle((s - 0.5, t - 0.5), 1, 1, **WASTED))
            else:
                colour = "white" if weights[t, s] > 0.55 else "black"
                ax.text(
                    s, t, f"{weights[t, s]:.2f}", ha="center", va="center", color=colour
                )
    ax.set_xticks(range(T), tokens, fontfamily="monospace")
    ax.set_yticks(range(T), tokens, fontfamily="monospace")
    ax.grid(False)
    ax.set(
        xlabel="key token (hatched: the future, masked)",
        ylabel="query token",
        title=title,
    )
    return ax


def draw_generation(
    prompt_len: int,
    num_new_tokens: int,
    *,
    is_cached: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """The tokens that each step of generation runs through the model.

    By `generate_recompute`; with is_cached by `generate_cached`, which only reads those
    that it has seen.
    """
    ax = ax or plt.subplots(figsize=(7.0, 3.6))[1]
    old_look = CACHED if is_cached else WASTED
    num_new = num_old = 0
    for step in range(num_new_tokens):
        for token in range(prompt_len + step):
            is_new = step == 0 or token == prompt_len + step - 1
            num_new, num_old = num_new + is_new, num_old + (not is_new)
            look = {"facecolor": NEW, "edgecolor": "white"} if is_new else old_look
            ax.add_patch(Rectangle((token - 0.5, step + 0.5), 1, 1, **look))
    if is_cached:
        title = f"{num_new} tokens go through the model, each of them once"
    else:
        title = f"{num_old} of {num_new + num_old} tokens had been computed before"
    ax.set_xlim(-0.5, prompt_len + num_new_tokens - 1.5)
    ax.set_ylim(num_new_tokens + 0.5, 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(False)
    ax.set(xlabel="position of the token in the text", ylabel="step", title=title)
    old = "keys and values read from the cache" if is_cached else "computed again"
    looks = [
        Patch(facecolor=NEW, label="computed, for the first time"),
        Patch(**old_look, label=old),
    ]
    ax.legend(handles=looks, loc="upper right")
    return ax


def draw_contiguous(
    cache: ContiguousKVCache, *, title: str, ax: Axes | None = None
) -> Axes:
    """What is reserved for each request, and what of it holds tokens."""
    seq_lens, reserved = cache.seq_lens.tolist(), cache.k_cache.shape[2]
    ax = ax or plt.subplots(figsize=(7.0, 0.9 + 0.3 * len(seq_lens)))[1]
    rows = range(len(seq_lens))
    ax.barh(rows, seq_lens, height=0.7, color=NEW, label="holds a token")
    left = [reserved - seq_len for seq_len in seq_lens]
    ax.barh(rows, left, left=seq_lens, height=0.7, label="reserved", **WASTED)
    ax.set_yticks(rows, [str(request_id) for request_id in cache.request_ids])
    ax.invert_yaxis()
    ax.grid(False)
    ax.set(xlim=(0, reserved), xlabel="tokens", ylabel="request", title=title)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def draw_blocks(manager: BlockManager, *, title: str) -> Figure:
    """Block tables above, the pool below: which block holds what, and who uses it.

    A block is a box of block_size places; those that hold a token are tinted. The number
    in a box is a block id, and in the pool the number below is its ref_count.
    """
    size, tables = manager.block_size, manager.block_tables
    names = list(tables)
    width = max([manager.num_blocks, *map(len, tables.values())])
    figure, (above, below) = plt.subplots(
        2,
        1,
        figsize=(min(9.0, 1.2 + 0.75 * width), 1.3 + 0.42 * (len(tables) + 2)),
        height_ratios=[max(len(tables), 1), 1.6],
    )
    for row, (request_id, block_table) in enumerate(tables.items()):
        for i, block_id in enumerate(block_table):
            filled = manager.num_tokens_in(request_id, i)
            look = _look(manager, block_id, names)
            _draw_block(above, i, row, size, filled, look, str(block_id))
    above.set_yticks(range(len(tables)), [str(request_id) for request_id in tables])
    above.set_xticks(range(max(map(len, tables.values()), default=0)))
    above.set(xlim=(-0.55, width - 0.45), ylim=(len(tables) - 0.4, -0.6), title=title)
    above.set_xlabel("block of the text", loc="left")
    above.set_ylabel("request")
    _draw_pool(below, manager, 0, names)
    for block_id, count in enumerate(manager.ref_count):
        below.text(block_id, 0.62, str(count), ha="center", va="center", fontsize=8)
    free = ", ".join(map(str, manager.free_block_ids[::-1])) or "none"
    below.set_yticks([0, 0.62], ["pool", "ref_count"])
    below.set_xticks([])
    below.set(xlim=(-0.55, width - 0.45), ylim=(0.85, -0.5))
    below.set_xlabel(f"free blocks, the next one first: {free}")
    for ax in (above, below):
        ax.grid(False)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    return figure


def draw_history(
    history: Sequence[tuple[str, BlockManager]], *, title: str, ax: Axes | None = None
) -> Axes:
    """The pool after each of several steps: (what was done, a copy of the manager)."""
    num_blocks = history[0][1].num_blocks
    names = list(dict.fromkeys(name for _, m in history for name in m.block_tables))
    ax = ax or plt.subplots(figsize=(8.0, 0.8 + 0.4 * len(history)))[1]
    for row, (_, manager) in enumerate(history):
        _draw_pool(ax, manager, row, names)
    ax.set_yticks(range(len(history)), [what for what, _ in history])
    ax.tick_params(axis="y", labelfontfamily="monospace")
    ax.set_xticks(range(num_blocks))
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set(xlim=(-0.55, num_blocks - 0.45), ylim=(len(history) - 0.4, -0.6))
    ax.set(xlabel="block of the pool", title=title)
    return ax


def draw_reads(
    manager: BlockManager,
    request_id: Hashable,
    tile: int,
    split_tokens: int,
    *,
    title: str,
    ax: Axes | None = None,
) -> Axes:
    """What the programs of one KV head read of a request, and by which way.

    Above, the request's blocks in the order of its text, under its tiles of `tile`
    tokens, in the colour of the program that reads them, `split_tokens` each. Below, the
    pool, where the blocks lie.
    """
    size, block_table = manager.block_size, manager.block_tables[request_id]
    seq_len, num_blocks = manager.seq_lens[request_id], manager.num_blocks
    left = (num_blocks - len(block_table)) / 2  # the text in the middle
    ax = ax or plt.subplots(figsize=(min(9.0, 1.2 + 0.62 * num_blocks), 3.2))[1]
    for block_id in range(num_blocks):
        _draw_block(ax, block_id, 2.4, size, 0, FREE, str(block_id))
    for i, block_id in enumerate(block_table):
        filled = manager.num_tokens_in(request_id, i)
        colour = REQUESTS[i * size // split_tokens % len(REQUESTS)]
        look = {"facecolor": colour, "edgecolor": "#8C8C8C"}
        _draw_block(ax, left + i, 0.8, size, filled, look, str(block_id))
        _draw_block(ax, block_id, 2.4, size, filled, look, str(block_id))
        ax.plot([left + i, block_id], [1.15, 2.05], color="#8C8C8C", linewidth=1)
    for width, y, word in (
        (tile, 0.3, "tile"),
        (split_tokens, -0.2, "program"),
    ):
        for i, at in enumerate(range(0, seq_len, width)):
            start, end = (
                left - 0.45 + 0.9 * place / size + 0.1 * (place // size)
                for place in (at, min(at + width, seq_len) - 0.5)
            )
            ax.plot([start + 0.05, end], [y, y], color="black", linewidth=1.5)
            middle = (start + end) / 2
            ax.text(middle, y - 0.08, f"{word} {i}", ha="center", va="bottom", fontsize=8)
    ax.set_yticks([0.8, 2.4], ["its blocks,\nin order", "the pool"])
    ax.set_xticks([])
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set(xlim=(-0.55, num_blocks - 0.45), ylim=(2.8, -0.6), title=title)
    return ax


def draw_head_groups(
    num_heads: int,
    num_kv_heads: Sequence[int],
    *,
    names: Sequence[str],
    title: str,
) -> Figure:
    """Which KV head each of num_heads query heads reads, one panel for each number of KV
    heads. Raises ValueError unless these divide num_heads, and each has a name."""
    if len(names) != len(num_kv_heads):
        raise ValueError(f"names: expected {len(num_kv_heads)}, got {len(names)}")
    for G in num_kv_heads:
        if num_heads % check_count("num_kv_heads", G):
            raise ValueError(f"num_kv_heads: expected divisors of {num_heads}, got {G}")
    figure, (axes,) = plt.subplots(
        1, len(names), figsize=(8.6, 2.4), sharey=True, squeeze=False
    )
    for ax, G, name in zip(axes, num_kv_heads, names):
        group_size = num_heads // G
        for head in range(num_heads):
            g = head // group_size
            middle = g * group_size + (group_size - 1) / 2  # under its query heads
            ax.plot([head, middle], [1.3, 0.7], color="#8C8C8C", linewidth=1)
            ax.add_patch(Rectangle((head - 0.35, 1.3), 0.7, 0.5, **QUERY))
            if head % group_size == 0:
                ax.add_patch(Rectangle((middle - 0.35, 0.35), 0.7, 0.35, **KEY))
                ax.add_patch(Rectangle((middle - 0.35, 0), 0.7, 0.35, **VALUE))
        ax.set(xlim=(-0.6, num_heads - 0.4), ylim=(-0.1, 1.9))
        ax.set_title(f"{name}: {G} KV {'head' if G == 1 else 'heads'}")
        ax.set_axis_off()
    figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    return figure


def draw_kept(
    token_names: Sequence[str],
    panels: Mapping[str, Sequence[torch.Tensor]],
    *,
    title: str,
    wanted: Sequence[int] = (),
) -> Axes:
    """Which tokens of a text are kept: the text, and below it for each panel one row of
    cells per KV head of each layer.

    token_names: S words, "·" for filler; a letter and the words behind it are written
    together. panels: name -> of each layer the places kept, int64 (G, n), as
    `PrunedKVCache.positions` gives them. wanted: the places that an answer needs, orange
    and in a frame. Raises ValueError for a text without tokens, a place outside of it,
    and panels that differ in their number of layers.
    """
    S = check_count("tokens of the text", len(token_names))
    wanted = [int(place) for place in wanted]  # of a tensor too
    _check_kept(S, panels, wanted)
    is_wanted = torch.zeros(S, dtype=torch.bool)
    is_wanted[wanted] = True
    width = min(9.6, 3.6 + 0.25 * S)  # inches
    ax = plt.subplots()[1]
    num_lines = _write_text(ax, token_names, is_wanted, 72 * (width - 1.1) / S)
    names, bottom = {}, 0.0  # of the rows, by their y
    for panel, layers in panels.items():
        ax.text(-0.5, bottom + 1.3, panel, fontsize=9.5, fontweight="bold")
        top = bottom = bottom + 1.7
        for layer, places in enumerate(layers):
            _draw_kept_layer(ax, places, is_wanted, bottom)
            for head in range(len(places)):
                words = f"head {head}" if head else f"layer {layer}, head 0"
                names[bottom + head + 0.5] = words
            bottom += len(places) + 0.3
        bottom -= 0.3
        _frame(ax, is_wanted, top, bottom)
    ax.figure.set_size_inches(width, 0.9 + 0.135 * (bottom + num_lines))
    ax.set_yticks(list(names), list(names.values()), fontsize=7)
    ax.xaxis.set_major_locator(MaxNLocator(12, integer=True, steps=[1, 2, 5, 10]))
    ax.tick_params(axis="x", labelsize=8)
    ax.tick_params(length=0, pad=2)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set(xlim=(-0.7, S - 0.3), ylim=(bottom + 0.2, -num_lines - 0.2), title=title)
    ax.set_xlabel("place in the text", loc="left", fontsize=9)
    handles = [Patch(**look, label=label) for label, look in KEPT.items()]
    ax.figure.legend(
        handles=handles if any(is_wanted) else handles[:2],
        loc="outside lower right",
        ncols=len(handles) if width > 8 else 2,
        fontsize=9,
    )
    return ax


def _check_kept(
    S: int, panels: Mapping[str, Sequence[torch.Tensor]], wanted: Sequence[int]
):
    """ValueError unless all places are in a text of S tokens, and all panels have the
    same number of layers, at least one."""
    num_layers = {panel: len(layers) for panel, layers in panels.items()}
    if len(set(num_layers.values())) != 1 or 0 in num_layers.values():
        raise ValueError(
            "panels: expected one or more, with the same number of layers, got "
            f"{num_layers}"
        )
    places_of = {"wanted": wanted}
    for panel, layers in panels.items():
        for layer, places in enumerate(layers):
            if places.dtype != torch.int64 or places.dim() != 2:
                raise ValueError(
                    f"{panel}, layer {layer}: expected int64 (G, n), got "
                    f"{places.dtype} {tuple(places.shape)}"
                )
            places_of[f"{panel}, layer {layer}"] = places.flatten().tolist()
    for where, places in places_of.items():
        outside = sorted({place for place in places if not 0 <= place < S})
        if outside:
            raise ValueError(f"{where}: expected places from 0 to {S - 1}, got {outside}")


def _write_text(
    ax: Axes, token_names: Sequence[str], is_wanted: torch.Tensor, column_points: float
) -> int:
    """The text above y = 0: a line of dots and bars, and over the bars what they are. A
    word that would touch the one before it is written a line higher. Returns how many
    lines it takes."""
    font_size, ends = 8, []  # where the lines end so far, in columns
    for start, words in _phrases(token_names):
        stop, middle = start + len(words), start + (len(words) - 1) / 2
        look = {"color": WANTED if any(is_wanted[start:stop]) else "black"}
        if words == [FILLER]:
            ax.text(start, -0.5, FILLER, ha="center", va="center", **look, alpha=0.6)
            continue
        # A digit is 0.64 em wide, a space 0.32.
        width = font_size * (0.64 * sum(map(len, words)) + 0.32 * len(words))
        half = width / 2 / column_points
        line = next((i for i, end in enumerate(ends) if end < middle - half), len(ends))
        ends[line : line + 1] = [middle + half]
        ax.plot([start - 0.35, stop - 0.65], [-0.5, -0.5], linewidth=1.5, **look)
        ax.plot([middle, middle], [-0.5, -1 - line], linewidth=0.7, **look)
        first, *others = (word.replace("$", r"\$") for word in words)
        if first.isalpha():
            first = rf"$\mathbf{{{first}}}$"
        look |= {"ha": "center", "va": "center", "fontsize": font_size}
        ax.text(middle, -1.5 - line, " ".join([first, *others]), **look)
    return 1 + len(ends)


def _phrases(token_names: Sequence[str]) -> list[tuple[int, list[str]]]:
    """What is written together, and the place where it begins: filler alone, and other
    words up to the next letters or filler."""
    phrases = []
    for place, word in enumerate(token_names):
        is_first = place == 0 or FILLER in (word, token_names[place - 1])
        if is_first or word.isalpha():
            phrases.append((place, [word]))
        else:
            phrases[-1][1].append(word)
    return phrases


def _draw_kept_layer(ax: Axes, places: torch.Tensor, is_wanted: torch.Tensor, top: float):
    """A row of cells per KV head, from y = top on: places (G, n), is_wanted (S,)."""
    G, S = len(places), len(is_wanted)
    is_kept = torch.zeros(G, S, dtype=torch.bool).scatter(1, places.cpu(), True)
    looks = torch.where(is_kept, 0, 1) + torch.where(is_wanted, 2, 0)
    ax.pcolormesh(
        [place - 0.5 for place in range(S + 1)],
        [top + head for head in range(G + 1)],
        looks.tolist(),
        cmap=ListedColormap([look["facecolor"] for look in KEPT.values()]),
        vmin=0,
        vmax=len(KEPT) - 1,
        edgecolors="white",
        linewidth=0.5,
    )


def _frame(ax: Axes, is_wanted: torch.Tensor, top: float, bottom: float):
    """A frame around each run of wanted columns, from y = top to bottom."""
    edges = F.pad(is_wanted.int(), (1, 1)).diff().nonzero()
    for start, stop in edges.view(-1, 2).tolist():
        look = {"fill": False, "edgecolor": "black", "linewidth": 1.2}
        corner = start - 0.5, top
        ax.add_patch(Rectangle(corner, stop - start, bottom - top, **look))


def draw_gantt(
    steps: Sequence[Step],
    *,
    title: str,
    arrived: Mapping[Hashable, int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Who was in the batch when: a row for a request, a column for a step.

    steps: all that an engine took, or those of `simulation.predict_steps`; the first is
    step 1. arrived: request id -> the first step after its arrival; who is not in it is
    drawn from where it begins. A request that is not in the batch, but will be, waits.
    """
    rows = _activities(steps, arrived or {})
    ax = ax or plt.subplots(figsize=(7.4, min(1.5 + 0.22 * len(rows), 7.0)))[1]
    edge = "white" if len(steps) <= 80 else NEW  # a thin piece would be all edge
    looks = {
        "prompt": {"facecolor": NEW, "edgecolor": edge},
        "decode": {"facecolor": "#E69F00", "edgecolor": "none"},
        "computed again": WASTED,
    }
    for row, cells in enumerate(rows.values()):
        # Pieces of a prompt stand one by one, what else goes on is one bar.
        for kind, group in itertools.groupby(sorted(cells.items()), lambda cell: cell[1]):
            columns = [step for step, _ in group]
            start, stop = columns[0] - 0.5, columns[-1] + 0.5
            if kind == "waits":
                ax.plot([start, stop], [row, row], **WAITING)
                continue
            height = 0.5 if kind == "decode" else 0.8
            width = 1 if kind == "prompt" else stop - start
            for left in columns if kind == "prompt" else columns[:1]:
                corner = left - 0.5, row - height / 2
                ax.add_patch(Rectangle(corner, width, height, **looks[kind]))
    places = list(rows)
    for i, step in enumerate(steps, start=1):
        for request_id in step.preempted:
            ax.plot(i - 0.5, places.index(request_id), **SENT_BACK)
    ax.set_yticks(range(len(rows)), [str(request_id) for request_id in rows])
    ax.set(xlim=(0.5, len(steps) + 0.5), ylim=(len(rows) - 0.5, -0.5))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="step", ylabel="request", title=title)
    seen = {kind for cells in rows.values() for kind in cells.values()}
    handles = [Patch(**look, label=kind) for kind, look in looks.items() if kind in seen]
    if "waits" in seen:
        handles.append(Line2D([], [], **WAITING, label="waits"))
    if any(step.preempted for step in steps):
        handles.append(Line2D([], [], **SENT_BACK, label="sent back"))
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def _activities(
    steps: Sequence[Step], arrived: Mapping[Hashable, int]
) -> dict[Hashable, dict[int, str]]:
    """What each request did in each step, from its arrival to its last token."""
    rows: dict[Hashable, dict[int, str]] = {request_id: {} for request_id in arrived}
    cached, most, decoding = Counter(), Counter(), set()
    for i, step in enumerate(steps, start=1):
        for request_id in step.preempted:
            cached[request_id] = 0
            decoding.discard(request_id)
        for request_id, count in step.counts.items():
            if request_id in decoding:
                kind = "decode"
            elif cached[request_id] < most[request_id]:
                kind = "computed again"
            else:
                kind = "prompt"
            rows.setdefault(request_id, {})[i] = kind
            cached[request_id] += count
            most[request_id] = max(most[request_id], cached[request_id])
        for request_id in step.next_ids:  # forks too, whose prompt another computed
            rows.setdefault(request_id, {})
            decoding.add(request_id)
    for request_id, cells in rows.items():
        start = arrived.get(request_id, min(cells, default=1))
        for i in range(start, max(cells, default=len(steps) + 1)):
            cells.setdefault(i, "waits")
    return rows


def _draw_pool(ax: Axes, manager: BlockManager, row: int, names: Sequence):
    """All blocks in a row, each with the names of the requests that use it."""
    users = {block_id: [] for block_id in range(manager.num_blocks)}
    filled = dict.fromkeys(users, 0)
    for request_id, block_table in manager.block_tables.items():
        for i, block_id in enumerate(block_table):
            users[block_id].append(str(request_id))
            filled[block_id] = manager.num_tokens_in(request_id, i)
    for block_id, who in users.items():
        look = _look(manager, block_id, names)
        words = "+".join(who) if len(who) < 4 else f"{len(who)} of them"
        _draw_block(ax, block_id, row, manager.block_size, filled[block_id], look, words)


def _look(manager: BlockManager, block_id: int, names: Sequence) -> dict:
    """Of a request's block the colour of its place in `names`."""
    if manager.ref_count[block_id] > 1:
        return SHARED
    for request_id, block_table in manager.block_tables.items():
        if block_id in block_table:
            colour = REQUESTS[names.index(request_id) % len(REQUESTS)]
            return {"facecolor": colour, "edgecolor": "#8C8C8C"}
    return FREE


def _draw_block(
    ax: Axes, x: float, y: float, size: int, filled: int, look: dict, words: str
):
    """One block around (x, y): a box of width 0.9, its filled part as `look` says."""
    ax.add_patch(Rectangle((x - 0.45, y - 0.3), 0.9, 0.6, **FREE))
    ax.add_patch(Rectangle((x - 0.45, y - 0.3), 0.9 * filled / size, 0.6, **look))
    for place in range(1, size):
        at = x - 0.45 + 0.9 * place / size
        ax.plot([at, at], [y - 0.3, y + 0.3], color="#8C8C8C", linewidth=0.4)
    ax.text(
        x,
        y,
        words,
        ha="center",
        va="center",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.75}
        if words
        else None,
    )


def draw_schedule(
    run: Callable,
    num_blocks: int = 8,
    *,
    title: str,
    ax: Axes | None = None,
) -> Axes:
    """When each block runs, and which edges wait meanwhile: a step of training, observed.

    run(blocks, x, positions, attend), as `checkpointing.checkpoint_recursive`. Time goes
    to the right, one column for each time that a block runs.
    """
    events, edges = _observe(run, num_blocks)
    ax = ax or plt.subplots(figsize=(7.4, 3.4))[1]
    looks = {
        "forward, inside thrown away": CACHED,
        "forward, inside kept": {"facecolor": NEW, "edgecolor": "white"},
        "backward": {"facecolor": "#E69F00", "edgecolor": "white"},
    }
    for block, start, end in edges:
        (line,) = ax.plot([start, end], [block, block], color="black", linewidth=1.4)
    for time, (block, kind) in enumerate(events):
        ax.add_patch(Rectangle((time, block - 0.9), 1, 0.8, **looks[kind]))
    ax.set_xlim(0, len(events))
    ax.set_ylim(0, num_blocks + 0.3)
    ax.set_yticks([b - 0.5 for b in range(1, num_blocks + 1)], range(1, num_blocks + 1))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(False)
    handles = [Patch(label=kind, **look) for kind, look in looks.items()]
    handles.append(Line2D([], [], color="black", label="an edge that waits"))
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -0.18), ncols=2)
    ax.set(
        xlabel="time (one block, forward or backward, per column)",
        ylabel="block",
        title=title,
    )
    return ax


def _observe(run: Callable, num_blocks: int) -> tuple[list, list]:
    """Events (block, kind), one after the other, and edges (behind block, from, to)."""
    model = Transformer(
        ModelConfig(2, num_blocks, 1, 1, d_model=2, d_ff=2, max_seq_len=2)
    )
    events, edges, births = [], [], {}

    def before(block, args):
        number = block.attention.layer + 1
        kind = "kept" if torch.is_grad_enabled() else "thrown away"
        events.append((number, f"forward, inside {kind}"))

    def after(block, args, out):
        number, now = block.attention.layer + 1, len(events)
        storage = out.untyped_storage()  # a segment gives it back as another tensor
        if storage._cdata not in births:
            births[storage._cdata] = now
            weakref.finalize(storage, ended, number, now, storage._cdata)
        if out.requires_grad:
            out.register_hook(lambda _: events.append((number, "backward")))

    def ended(number, birth, address):
        del births[address]
        if len(events) > birth + 2 and number < num_blocks:  # longer than one block takes
            edges.append((number, birth, len(events)))

    for block in model.blocks:
        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)
    x = torch.randn(1, 2, 2, requires_grad=True)
    run(model.blocks, x, torch.arange(2), attend_fused).sum().backward()
    return events, edges
