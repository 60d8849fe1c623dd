import copy

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from helpers import filled
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from lib import checkpointing, training
from lib.block_manager import BlockManager
from lib.config import TINY
from lib.figures import drawing, plotting
from lib.kv_cache import ContiguousKVCache
from lib.simulation import Usage

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


def test_a_pool_is_divided_into_what_it_was_used_for():
    usage = Usage(0.5, 0.2, 0.2, 0.1, in_flight=3, finished=1, preempted=0)
    ax = plotting.plot_usage({"us": usage}, published={"us": 48.0}, title="")
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([50, 20, 20, 10])
    assert texts(ax) == ["50.0%"]
    assert ax.lines[0].get_xdata()[0] == 48.0
