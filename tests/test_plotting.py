import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.patches import Rectangle

from lib import drawing, plotting

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
