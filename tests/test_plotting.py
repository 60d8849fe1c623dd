import copy
import itertools

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers import filled
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from lib import checkpointing, generate, recall, training
from lib.block_manager import BlockManager
from lib.config import TINY
from lib.engine import Step
from lib.figures import drawing, plotting
from lib.kv_cache import ContiguousKVCache
from lib.measure.quality import Quality
from lib.pruning import HeavyHitters, PrunedKVCache
from lib.simulation import Request, Usage, predict_steps

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def course_style():
    with plt.rc_context():
        plotting.use_course_style()
        yield
    plt.close("all")


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_bars_are_those_of_the_most_probable_bytes_and_of_all_others():
    probs = torch.zeros(256)
    probs[ord("a")], probs[226], probs[ord(" ")], probs[9] = 0.4, 0.3, 0.2, 0.1
    ax = plotting.plot_next_token(probs, title="", num_tokens=3)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["'a'", "'\\xe2'", "' '", "other 253"]
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_the_staircase_has_a_square_for_each_token_that_a_step_computes():
    ax = drawing.draw_generation(prompt_len=3, num_new_tokens=4)
    squares = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    assert len(squares) == 3 + 4 + 5 + 6
    hatched = [square for square in squares if square.get_hatch()]
    assert len(hatched) == 3 + 4 + 5
    assert ax.get_title(loc="left").startswith("12 of 18 tokens")


def test_lines_are_named_at_their_ends_and_the_names_do_not_overlap():
    series = {"one": ([1, 2], [5, 10.0]), "two": ([1, 2], [5, 10.1])}
    ax = plotting.plot_measured(series, xlabel="x", ylabel="y", title="t")
    assert sorted(texts(ax)) == ["one", "two"]
    ax.figure.draw_without_rendering()
    low, high = sorted(text.get_window_extent().y0 for text in ax.texts)
    assert high - low >= 10


def test_attention_weights_are_written_below_the_diagonal_only():
    weights = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    ax = drawing.draw_attention(weights, ["a", "b"], title="")
    assert texts(ax) == ["1.00", "0.25", "0.75"]


def test_timelines_name_their_peaks():
    ax = plotting.plot_timelines({"all": [0, 3_000_000, 1]}, title="")
    assert ax.get_legend().get_texts()[0].get_text() == "all: peak 3.0 MB"


def test_bars_of_training_bytes_stack_up_to_the_sum():
    kinds = {"weights": 1, "gradients": 2, "optimizer": 4, "activations": 8}
    ax = plotting.plot_training_bytes({"small": kinds}, title="")
    assert max(bar.get_y() + bar.get_height() for bar in ax.patches) == 15


def test_bars_may_go_on_with_what_a_step_holds_beside():
    kinds = {
        **training.training_bytes(TINY, 2, 128),
        **training.step_bytes(TINY, 2, 128),
    }
    ax = plotting.plot_training_bytes({"two": kinds}, title="")
    assert sum(bar.get_height() for bar in ax.patches) == sum(kinds.values())
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sorted(labels) == sorted(kinds)


@pytest.mark.parametrize(
    "run, forward_calls, waiting",
    [
        (checkpointing.run_blocks, 8, {1, 2, 3, 4, 5, 6}),
        (lambda *args: checkpointing.checkpoint_segments(*args, 4), 16, {2, 4, 6}),
        (checkpointing.checkpoint_recursive, 8 + 4 * 3, {4, 6}),
    ],
    ids=["keep all", "segments", "recursive"],
)
def test_a_schedule_shows_when_each_block_ran_and_which_edges_waited(
    run, forward_calls, waiting
):
    events, edges = drawing._observe(run, 8)
    kinds = [kind for _, kind in events]
    assert len(kinds) - kinds.count("backward") == forward_calls
    for kind in ("forward, inside kept", "backward"):  # once each, the last block first
        assert [block for block, k in events if k == kind].count(8) == 1
    backward = [block for block, kind in events if kind == "backward"]
    assert backward == [8, 7, 6, 5, 4, 3, 2, 1]
    # of the forward pass, which ends with the eighth event
    assert {block for block, start, _ in edges if start <= 8} >= waiting
    ax = drawing.draw_schedule(run, 8, title="")
    assert len([p for p in ax.patches if isinstance(p, Rectangle)]) == len(events)


def test_with_a_cache_each_token_is_computed_once():
    ax = drawing.draw_generation(prompt_len=3, num_new_tokens=4, is_cached=True)
    assert ax.get_title(loc="left").startswith("6 tokens go through the model")
    new = [p for p in ax.patches if p.get_facecolor() == to_rgba(plotting.NEW)]
    assert len(new) == 6 and len(ax.patches) == 3 + 4 + 5 + 6


def test_a_contiguous_cache_is_drawn_as_it_is():
    cache = filled(ContiguousKVCache(TINY, 3, 20), {"a": 5, "b": 0, "c": 20})
    ax = drawing.draw_contiguous(cache, title="")
    assert [bar.get_width() for bar in ax.patches] == [5, 0, 20, 15, 20, 0]


def forked():
    manager = BlockManager(6, 4)
    manager.allocate("a", 6)
    manager.fork("a", "b")
    manager.append("b")
    return manager


def test_tables_pool_free_list_and_counts_are_read_from_the_live_manager():
    above, below = drawing.draw_blocks(forked(), title="").axes
    assert texts(above) == ["0", "1", "0", "2"]
    assert texts(below)[:6] == ["a+b", "a", "b", "", "", ""]
    assert texts(below)[6:] == ["2", "1", "1", "0", "0", "0"]
    assert below.get_xlabel().endswith("the next one first: 3, 4, 5")
    shared = [patch for patch in above.patches if patch.get_hatch()]
    assert len(shared) == 2, "block 0, in both tables"


def test_a_history_is_a_pool_a_row():
    manager = forked()
    history = [("fork", copy.deepcopy(manager))]
    manager.free("a")
    history.append(("free", manager))
    ax = drawing.draw_history(history, title="")
    assert texts(ax) == ["a+b", "a", "b", "", "", "", "b", "", "b", "", "", ""]
    colour_of_b = {
        patch.get_facecolor()
        for patch in ax.patches
        if patch.get_x() == pytest.approx(2 - 0.45) and patch.get_width() < 0.8
    }
    assert len(colour_of_b) == 1, "a request keeps its colour when others go"


def usage(*shares):
    counts = {"finished": 1, "preempted": 0, "written": 9, "recomputed": 0}
    return Usage(*shares, in_flight=3, **counts)


def bars(ax):
    return [(round(bar.get_x(), 9), round(bar.get_width(), 9)) for bar in ax.patches]


def test_a_pool_is_divided_into_what_it_was_used_for():
    ax = plotting.plot_usage({"us": usage(0.5, 0.25, 0.2, 0.05)}, title="")
    assert bars(ax) == [(0, 50), (50, 25), (75, 20), (95, 5)]
    assert texts(ax) == ["50.0%"]
    labels = [text.get_text().split()[0] for text in ax.get_legend().get_texts()]
    assert labels == ["tokens", "reservation", "internal", "external"]
    looks = {(p.get_facecolor(), p.get_hatch()) for p in ax.patches}
    assert len(looks) == 4 and len({look[1] for look in looks}) == 3, (
        "only the first and the last part, blue and white, have no hatch"
    )


def test_the_paper_s_parts_are_below_ours_in_the_same_colours():
    usages = {"us": usage(0.5, 0.25, 0.2, 0.05), "others": usage(0.1, 0.2, 0.3, 0.4)}
    published = {"us": (40, 30, 10, 20), "others": (5,)}
    ax = plotting.plot_usage(usages, published=published, title="")
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["us", "the paper", "others", "the paper"]
    assert texts(ax) == ["50.0%", "40.0%", "10.0%", "5.0%"]
    middles = [p.get_y() + p.get_height() / 2 for p in ax.patches]
    assert middles == pytest.approx(list(ax.get_yticks()) * 4)
    # The patches come part by part, and in each part row by row.
    assert bars(ax)[1::4] == [(0, 40), (40, 30), (70, 10), (80, 20)]
    assert bars(ax)[3::4] == [(0, 5), (5, 0), (5, 0), (5, 0)]
    for i in range(0, 16, 4):
        assert (
            len({(p.get_facecolor(), p.get_hatch()) for p in ax.patches[i : i + 4]}) == 1
        )
    ours, theirs = ax.patches[0], ax.patches[1]
    assert theirs.get_height() < ours.get_height()
    assert theirs.get_y() >= ours.get_y() + ours.get_height(), "they do not overlap"
    assert ax.patches[2].get_y() >= theirs.get_y() + theirs.get_height()


def test_what_was_published_about_something_else_is_refused():
    with pytest.raises(AssertionError, match="expected names among .*us.* got .*them"):
        plotting.plot_usage({"us": usage(1, 0, 0, 0)}, published={"them": (1,)}, title="")


def test_lines_that_meet_at_their_ends_are_named_in_a_legend():
    x = [1, 2, 3]
    series = {name: (x, [y, 2 * y, 10]) for name, y in (("a", 1), ("c", 3), ("b", 2))}
    ax = plotting.plot_measured(series, xlabel="x", ylabel="y", title="t")
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["c", "b", "a"] and not ax.texts
    series["c"] = (x, [3, 6, 20])  # two names may stand one over the other
    ax = plotting.plot_measured(series, xlabel="x", ylabel="y", title="t")
    assert ax.get_legend() is None and len(ax.texts) == 3


def sent_back_once():
    """Two requests in four blocks of three: 1 is sent back before step 4, waits for two
    steps, and computes its prompt and three tokens of its answer again in step 6."""
    steps = predict_steps([Request(4, 5), Request(4, 5)], 4, 3)
    assert [step.preempted for step in steps] == [[], [], [], [1], [], [], []]
    return steps


def bars_of(ax):
    """Left and right end of each bar, its height and its hatch, by row."""
    rows = {}
    for bar in ax.patches:
        row = round(bar.get_y() + bar.get_height() / 2)
        ends = bar.get_x(), bar.get_x() + bar.get_width()
        rows.setdefault(row, []).append((ends, bar.get_height(), bar.get_hatch()))
    return rows


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_a_row_of_the_gantt_chart_is_what_a_request_did():
    ax = drawing.draw_gantt(sent_back_once(), title="")
    decode, prompt = 0.5, 0.8
    assert bars_of(ax) == {
        0: [((0.5, 1.5), prompt, None), ((1.5, 5.5), decode, None)],
        1: [
            ((0.5, 1.5), prompt, None),
            ((1.5, 3.5), decode, None),
            ((5.5, 6.5), prompt, plotting.WASTED["hatch"]),
            ((6.5, 7.5), decode, None),
        ],
    }
    assert ax.get_xlim() == (0.5, 7.5), "steps 1 to 7, as on the page"
    waits, crosses = ax.lines
    assert waits.get_xydata().tolist() == [[3.5, 1], [5.5, 1]]
    assert crosses.get_xydata().tolist() == [[3.5, 1]]
    assert legend(ax) == ["prompt", "decode", "computed again", "waits", "sent back"]


def test_pieces_of_a_prompt_stand_one_by_one_and_who_has_arrived_waits():
    steps = predict_steps([Request(9, 2), Request(1, 2)], 3, 4, token_budget=4)
    ax = drawing.draw_gantt(steps, arrived={0: 1, 1: 2}, title="")
    pieces = [ends for ends, height, _ in bars_of(ax)[0] if height == 0.8]
    assert pieces == [(0.5, 1.5), (1.5, 2.5), (2.5, 3.5)]
    (waits,) = ax.lines
    begins = next(i for i, step in enumerate(steps, start=1) if 1 in step.counts)
    assert waits.get_xydata().tolist() == [[1.5, 1], [begins - 0.5, 1]]
    assert legend(ax) == ["prompt", "decode", "waits"]
    assert not drawing.draw_gantt(steps, title="").lines, "nobody says when they came"


def test_only_what_was_computed_before_is_computed_again():
    steps = [
        Step(counts, next_ids, {}, preempted, 0, 0, {})
        for counts, next_ids, preempted in (
            ({"a": 3}, {}, []),
            ({"a": 3}, {}, ["a"]),
            ({"a": 2}, {"a": 0}, []),
        )
    ]
    rows = drawing._activities(steps, {"b": 2})
    assert rows["a"] == {1: "prompt", 2: "computed again", 3: "prompt"}
    assert rows["b"] == {2: "waits", 3: "waits"}, "it never began"


def test_the_pool_over_time_is_that_of_the_steps():
    steps = sent_back_once()
    above, below = plotting.plot_pool(steps, 4, title="").axes
    (used,) = above.patches
    assert used.get_data().values.tolist() == [4 - step.num_free_blocks for step in steps]
    in_batch, waiting = (patch.get_data().values.tolist() for patch in below.patches)
    assert in_batch == [2, 2, 2, 1, 1, 1, 1] and waiting == [0, 0, 0, 1, 1, 0, 0]
    crosses = above.lines[-1]
    assert crosses.get_xydata().tolist() == [[3.5, 4]]
    assert used.get_data().edges.tolist() == [i + 0.5 for i in range(8)], "from step 1"
    assert legend(below) == ["in the batch", "waiting", "sent back"]
    _, below = plotting.plot_pool(steps[:3], 4, title="").axes
    assert legend(below) == ["in the batch", "waiting"]


def test_latency_curves_are_told_apart_without_colour():
    names = ["maximum", "power of two", "oracle", "blocks of 16"]
    curves = {name: ([1, 2 + i], [0.02, 0.5 / (i + 1)]) for i, name in enumerate(names)}
    ax = plotting.plot_latency(curves, title="")
    assert sorted(texts(ax)) == sorted(names)
    assert len({line.get_marker() for line in ax.lines}) == 4
    assert ax.get_yscale() == "log"


def test_a_method_looks_the_same_in_both_panels_and_shows_all_its_draws():
    def kept(num_bytes, *draws):
        return Quality(draws, (), num_bytes)

    def halves(quality):
        return [x / 2 for x in quality.nats]

    bits = [kept(16, 0.5), kept(8, 1, 3)]  # in any order
    panels = [
        ("lost", "symlog", {"plain": [kept(64, 0)], "bits": bits}, lambda q: q.nats),
        ("half", "linear", {"heads": [kept(32, 4)], "bits": bits[1:]}, halves),
    ]
    figure = plotting.plot_quality(panels, title="")
    left, right = figure.axes
    of_bits = [ax.containers[1] for ax in (left, right)]
    means = [bars.lines[0].get_xydata().tolist() for bars in of_bits]
    assert means == [[[8, 2], [16, 0.5]], [[8, 1]]]
    (spread,) = of_bits[1].lines[2]
    assert spread.get_segments()[0].tolist() == [[8, 0.5], [8, 1.5]]
    looks = [(bars.lines[0].get_marker(), bars.lines[0].get_color()) for bars in of_bits]
    assert looks[0] == looks[1]
    markers = {ax.containers[0].lines[0].get_marker() for ax in (left, right)}
    assert len(markers | {looks[0][0]}) == 3, "plain, heads and bits"
    (named,) = figure.legends
    assert {t.get_text() for t in named.get_texts()} == {"plain", "bits", "heads"}
    low, high = left.get_ylim()
    assert low < 0 and high > 3, "the largest loss is in the picture"


def test_query_heads_are_joined_to_the_kv_head_that_they_read():
    figure = drawing.draw_head_groups(4, [4, 2, 1], names="abc", title="")
    for ax, G in zip(figure.axes, (4, 2, 1)):
        looks = [patch.get_facecolor() for patch in ax.patches]
        keys = [p for p in ax.patches if p.get_facecolor() == to_rgba(plotting.NEW)]
        assert len(looks) == 4 + 2 * G and len(keys) == G
        middles = [p.get_x() + p.get_width() / 2 for p in keys]
        ends = [line.get_xydata().tolist() for line in ax.lines]
        for head, ((x, _), (under, _)) in enumerate(ends):
            assert x == head and under == pytest.approx(middles[head // (4 // G)])


@pytest.mark.parametrize(
    "groups, words",
    [
        ([6, 4], "num_kv_heads: expected divisors of 6, got 4"),
        ([6, 12], "num_kv_heads: expected divisors of 6, got 12"),
        ([6, 0], "num_kv_heads: expected an integer of at least 1, got 0"),
        ([6, 2, 1], "names: expected 3, got 2"),
    ],
)
def test_heads_that_cannot_be_drawn_are_refused(groups, words):
    with pytest.raises(ValueError, match=words):
        drawing.draw_head_groups(6, groups, names=["a", "b"], title="t")


def test_one_panel_can_stand_alone():
    draws = Quality((0.3, -0.1, 2.0), (), 640)
    panel = ("lost", "symlog", {"8 bits": [draws]}, lambda quality: quality.nats)
    figure = plotting.plot_quality([panel], title="")
    (ax,) = figure.axes
    low, high = ax.get_ylim()
    assert low < -0.1 and high > 2.0, f"expected all draws inside, got {low}, {high}"
    figure = drawing.draw_head_groups(6, [2], names=["two"], title="")
    assert len(figure.axes[0].patches) == 6 + 2 * 2


def of_one_and_two_bytes():
    """Two panels of the same two qualities, and what is drawn."""
    qualities = [Quality((0.5, 1.5), (), 2), Quality((3.0,), (), 1)]
    panels = [
        (name, "linear", {"bits": qualities}, lambda quality: quality.nats)
        for name in ("pairs", "book")
    ]
    return panels, [[[1, 3], [2, 1]]] * 2


@pytest.mark.parametrize("text_lens", [None, (64, 2_560), np.array([7, 5])])
def test_what_is_kept_is_of_a_token_or_of_a_text_as_long_as_the_panel_says(text_lens):
    panels, points = of_one_and_two_bytes()
    figure = plotting.plot_quality(panels, title="", text_lens=text_lens)
    lengths = [1, 1] if text_lens is None else [int(T) for T in text_lens]
    for ax, by_token, T in zip(figure.axes, points, lengths):
        drawn = ax.containers[0].lines[0].get_xydata().tolist()
        assert drawn == [[x * T, y] for x, y in by_token]
    names = [ax.get_xlabel() for ax in figure.axes]
    assert (
        names
        == {
            None: ["bytes per token"] * 2,
            64: ["bytes of a text of 64 tokens", "bytes of a text of 2,560 tokens"],
            7: ["bytes of a text of 7 tokens", "bytes of a text of 5 tokens"],
        }[None if text_lens is None else lengths[0]]
    )
    assert [ax.get_ylabel() for ax in figure.axes] == ["pairs", "book"]
    assert [ax.get_xscale() for ax in figure.axes] == ["log", "log"]


@pytest.mark.parametrize(
    "text_lens, words",
    [
        ([], "text_lens: expected 2, one for each panel, got 0"),
        ([64], "text_lens: expected 2, one for each panel, got 1"),
        ([64, 64, 64], "text_lens: expected 2, one for each panel, got 3"),
        ([64, 0], "text_lens: expected an integer of at least 1, got 0"),
        ([64, None], "text_lens: expected an integer of at least 1, got None"),
        ([64.0, 64], "text_lens: expected an integer of at least 1, got 64.0"),
    ],
)
def test_texts_without_a_length_for_each_panel_are_refused(text_lens, words):
    panels, _ = of_one_and_two_bytes()
    with pytest.raises(ValueError, match=words):
        plotting.plot_quality(panels, title="", text_lens=text_lens)
    assert not plt.get_fignums(), "expected no figure left behind"


def looks_of(mesh, num_tokens):
    """Of each cell of a mesh, how it is drawn: one row of names per KV head."""
    names = {to_rgba(look["facecolor"]): name for name, look in drawing.KEPT.items()}
    colors = mesh.to_rgba(mesh.get_array().reshape(-1, num_tokens))
    return [[names[tuple(cell)] for cell in row] for row in colors.tolist()]


def test_a_cell_is_filled_where_a_live_cache_keeps_the_token():
    model = recall.load("notes_g2").eval()
    ids = recall.draw_notes(1, 3, 8, torch.Generator().manual_seed(0)).token_ids[0]
    S = len(ids)
    cache = PrunedKVCache(model.config, 1, [12, 8], HeavyHitters(window=2))
    cache.begin("a")
    generate.forward_cached(model, cache, ids, torch.tensor([S]))
    positions = cache.positions("a")
    assert all(a.tolist() != b.tolist() for a, b in positions), "heads keep the same"
    panels = {"pruned": positions, "all": [torch.arange(S).expand(2, -1)] * 2}
    ax = drawing.draw_kept(recall.spell_notes(ids).split(), panels, title="")
    meshes = ax.collections
    assert len(meshes) == 4, f"expected two panels of two layers, got {len(meshes)}"
    for layer, (mesh, places) in enumerate(zip(meshes, positions)):
        rows = looks_of(mesh, S)
        for head, (row, kept) in enumerate(zip(rows, places.tolist(), strict=True)):
            got = [place for place, look in enumerate(row) if look == "kept"]
            assert got == kept, f"{layer=}, {head=}: expected {kept}, got {got}"
            assert set(row) == {"kept", "thrown out"}, f"nothing is wanted, got {row}"
    assert looks_of(meshes[2], S) == [["kept"] * S] * 2


def test_each_row_is_named_where_it_is_drawn():
    places = [torch.tensor([[0], [1]]), torch.tensor([[1], [0]])]
    ax = drawing.draw_kept(["a", "b"], {"one": places, "two": places}, title="")
    names = [label.get_text() for label in ax.get_yticklabels()]
    expected = ["layer 0, head 0", "head 1", "layer 1, head 0", "head 1"]
    assert names == expected * 2, f"expected {expected} twice, got {names}"
    middles = [
        (top + bottom) / 2
        for mesh in ax.collections
        for top, bottom in itertools.pairwise(mesh.get_coordinates()[:, 0, 1].tolist())
    ]
    assert list(ax.get_yticks()) == pytest.approx(middles)
    assert ax.yaxis_inverted(), "the first layer is on top"
    headings = {text.get_text(): text.get_position()[1] for text in ax.texts}
    assert headings["one"] < middles[0] < middles[3] < headings["two"] < middles[4]


def test_what_is_wanted_has_other_colours_and_a_frame_in_each_panel():
    panels = {name: [torch.tensor([[0, 2]])] * 2 for name in ("one", "two")}
    wanted = torch.tensor([1, 2, 5])
    ax = drawing.draw_kept(list("whales"), panels, title="", wanted=wanted)
    kept, lost = list(drawing.KEPT)[2:]
    expected = ["kept", lost, kept, "thrown out", "thrown out", lost]
    for mesh in ax.collections:
        assert looks_of(mesh, 6) == [expected]
    frames = [(p.get_x(), p.get_width()) for p in ax.patches]
    assert frames == [(0.5, 2), (4.5, 1)] * 2, f"expected two runs twice, got {frames}"
    for i, frame in enumerate(ax.patches):
        first, last = ax.collections[i // 2 * 2], ax.collections[i // 2 * 2 + 1]
        ends = first.get_coordinates()[0, 0, 1], last.get_coordinates()[-1, 0, 1]
        got = frame.get_y(), frame.get_y() + frame.get_height()
        assert got == pytest.approx(ends), "a frame goes over all layers of its panel"
    colours = [text.get_color() for text in ax.texts[:6]]
    is_wanted = [colour == drawing.WANTED for colour in colours]
    assert is_wanted == [False, True, True, False, False, True], f"got {colours}"


def test_the_legend_of_kept_tokens_says_no_more_than_there_is():
    panels = {"one": [torch.tensor([[0]])]}
    for wanted, num_looks in ((), 2), ((1,), 4):
        ax = drawing.draw_kept(["a", "b"], panels, title="", wanted=wanted)
        (named,) = ax.figure.legends
        got = [text.get_text() for text in named.get_texts()]
        assert got == list(drawing.KEPT)[:num_looks], f"{wanted=}: got {got}"


def test_a_letter_is_written_with_the_words_behind_it_over_a_bar_below_all_of_them():
    words = ["·", "A", "5", "17", "B", "3", "·", "4", "$", "6"]
    ax = drawing.draw_kept(words, {"p": [torch.tensor([[0]])]}, title="")
    written = [text.get_text() for text in ax.texts]
    bold = {letter: rf"$\mathbf{{{letter}}}$" for letter in "AB"}
    expected = ["·", f"{bold['A']} 5 17", f"{bold['B']} 3", "·", r"4 \$ 6", "p"]
    assert written == expected, f"expected {expected}, got {written}"
    bars = [line.get_xdata().tolist() for line in ax.lines[::2]]
    ends = [(0.65, 3.35), (3.65, 5.35), (6.65, 9.35)]
    assert bars == [pytest.approx(pair) for pair in ends], f"got {bars}"
    ax.figure.draw_without_rendering()  # a dollar or a letter might not be readable


def test_words_of_a_text_do_not_overlap_and_stay_in_the_figure():
    notes = " ".join(f"{letter} 63 48 50 39" for letter in "SNMCDWQT")
    words = (notes + " ·" * 50 + " W 48 48 48 48 " + notes).split()
    ax = drawing.draw_kept(words, {"p": [torch.arange(2)[None]]}, title="title")
    ax.figure.draw_without_rendering()
    phrases = [t for t in ax.texts if len(t.get_text()) > 1]
    boxes = [text.get_window_extent() for text in phrases]
    assert len(boxes) == 17, f"expected 17 notes, got {len(boxes)}"
    for i, box in enumerate(boxes):
        for other in boxes[:i]:
            is_apart = (
                min(box.x1, other.x1) <= max(box.x0, other.x0)
                or min(box.y1, other.y1) <= max(box.y0, other.y0) + 1  # bearings
            )
            assert is_apart, f"expected boxes that are apart, got {box} and {other}"
    edge = ax.figure.bbox
    for text in ax.texts:
        box = text.get_window_extent()
        assert edge.x0 <= box.x0 and box.x1 <= edge.x1, f"{text} is cut off"
        assert edge.y0 <= box.y0 and box.y1 <= edge.y1, f"{text} is cut off"


ONE_LAYER = [torch.tensor([[0, 1]])]


@pytest.mark.parametrize(
    "token_names, panels, wanted, words",
    [
        ("ab", {"p": [torch.tensor([[0, 2]])]}, (), r"p, layer 0: .*0 to 1, got \[2\]"),
        ("ab", {"p": [torch.tensor([[-1]])]}, (), r"p, layer 0: .*0 to 1, got \[-1\]"),
        ("ab", {"p": ONE_LAYER}, [5, 1], r"wanted: expected .*0 to 1, got \[5\]"),
        ("ab", {"p": ONE_LAYER, "q": ONE_LAYER * 2}, (), r"layers, got .*1, 'q': 2"),
        ("ab", {}, (), r"panels: expected one or more, .* got \{\}"),
        ("ab", {"p": []}, (), r"panels: expected one or more, .* got \{'p': 0\}"),
        ("ab", {"p": [torch.tensor([0, 1])]}, (), r"p, layer 0: .*\(G, n\), got .*\(2,"),
        ("ab", {"p": [torch.ones(1, 2)]}, (), r"p, layer 0: .* int64 .*, got .*float32"),
        ("ab", {"p": [torch.ones(1, 2) > 0]}, (), r"p, layer 0: .* got torch.bool"),
        ("", {"p": ONE_LAYER}, (), "tokens of the text: expected .* 1, got 0"),
    ],
)
def test_places_that_cannot_be_drawn_are_refused(token_names, panels, wanted, words):
    with pytest.raises(ValueError, match=words):
        drawing.draw_kept(list(token_names), panels, title="", wanted=wanted)
    assert not plt.get_fignums(), "expected no figure before all is known to fit"


def test_a_band_goes_from_the_least_draw_to_the_most_around_the_mean():
    lines = {"one": ([8, 32], [[0.1, 0.3, 0.5], [0.9, 0.6]]), "two": ([16], [[0.4]])}
    panels = {"left": lines, "right": {"three": ([8], [[1]]), "one": ([8], [[0, 1]])}}
    figure = plotting.plot_bands(panels, xlabel="x", ylabel="y", title="t", log_x=True)
    left, right = figure.axes
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["left", "right"]
    means = [line.get_xydata().tolist() for line in left.lines]
    assert means == [
        [[8, pytest.approx(0.3)], [32, pytest.approx(0.75)]],
        [[16, 0.4]],
    ]
    corners = {tuple(xy) for xy in left.collections[0].get_paths()[0].vertices.tolist()}
    assert corners == {(8, 0.1), (8, 0.5), (32, 0.6), (32, 0.9)}
    looks = {}
    for ax in figure.axes:
        for line, band in zip(ax.lines, ax.collections, strict=True):
            assert to_rgba(line.get_color(), plotting.BAND["alpha"]) == tuple(
                band.get_facecolor()[0]
            )
        names = [*panels[ax.get_title(loc="left")]]
        for name, line in zip(names, ax.lines, strict=True):
            looks.setdefault(name, set()).add((line.get_marker(), line.get_color()))
    assert all(len(look) == 1 for look in looks.values()), f"one look each, got {looks}"
    assert len({marker for ((marker, _),) in looks.values()}) == 3, f"got {looks}"
    (named,) = figure.legends
    names = [text.get_text() for text in named.get_texts()]
    assert names == ["one", "two", "three", "lowest to highest draw"]
    for ax in (left, right):
        assert ax.get_xscale() == "log" and ax.get_ylim()[0] == 0
        ticks = [label.get_text() for label in right.get_xticklabels()]
        assert ticks == ["8", "16", "32"], f"expected those measured, got {ticks}"


def test_no_panels_are_refused_in_words():
    with pytest.raises(ValueError, match="panels: expected one or more, got none"):
        plotting.plot_bands({}, xlabel="", ylabel="", title="")


@pytest.mark.parametrize("draws", [[[1]], [[1], []], [[1], [1], [1]]])
def test_a_line_that_lacks_draws_is_refused(draws):
    panels = {"notes": {"snap": ([8, 16], draws)}}
    with pytest.raises(ValueError, match=r"notes, snap: .* each of 2 x values, got \["):
        plotting.plot_bands(panels, xlabel="", ylabel="", title="")
    assert not plt.get_fignums(), "expected no figure before all is known to fit"


def test_each_layer_has_a_bar_in_each_row():
    rows = {"book": [0.0, 0.1, -0.1], "again": [2.0, 0.0, 0.5]}
    figure = plotting.plot_layers(rows, xlabel="layer", ylabel="nats", title="A title")
    assert len(figure.axes) == 2
    for ax, (name, values) in zip(figure.axes, rows.items()):
        assert ax.get_title(loc="left") == name
        assert [bar.get_height() for bar in ax.patches] == values
        assert [bar.get_x() + bar.get_width() / 2 for bar in ax.patches] == [0, 1, 2]
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    assert len(plotting.plot_layers({"one": [1.0]}, **LABELS).axes) == 1
    for odd in ({}, {"a": []}, {"a": [1.0], "b": [1.0, 2.0]}):
        with pytest.raises(ValueError, match="expected as many layers in each"):
            plotting.plot_layers(odd, **LABELS)


LABELS = {"xlabel": "x", "ylabel": "y", "title": "t"}
