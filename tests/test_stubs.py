import pytest

from lib.course.stubs import answer, bound_names, free_names, stub, withheld

MODULE = '''import torch


class Stack:
    """Not a method."""

    @staticmethod
    def size(items):
        return len(items)

    def push(self, item: int) -> int:
        """Put an item on top; how many there are.

        >>> Stack().push(3)
        1
        """
        # locate the top
        top = len(self.items)

        # store
        self.items.append(item)
        self.top = top
        return top + 1


@torch.no_grad()
def kernel(x, TILE):
    # load
    tile = x[:TILE]

    # score: not a line of code
    score = helper(tile)
    return score


def rounded(n, size):
    """A function inside, and so a line between it and this."""

    def up(n):
        return -(-n // size)

    # double
    return 2 * up(n)


def total(rows):
    total = 0
    for row in rows:

        # add up
        row = sum(row)
        total += row

    return total
'''

PUSH_STUB = '''def push(self, item: int) -> int:
    """Put an item on top; how many there are.

    >>> Stack().push(3)
    1
    """
    # locate the top
    top = len(self.items)

    # store
    ...  # about 3 lines

    raise NotImplementedError'''

KERNEL_STUB = """@torch.no_grad()
def kernel(x, TILE):
    # about 3 lines
    raise NotImplementedError"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "stack_of_test_stubs.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "stack_of_test_stubs"


def test_a_method_comes_as_a_function_with_the_steps_that_are_given(module):
    assert stub(module, ["Stack.push"], ["locate"]) == PUSH_STUB
    whole = answer(module, ["Stack.push"])
    assert whole.startswith("def push(self, item: int)") and "return top + 1" in whole
    assert stub(module, ["Stack.push"], ["1"]) == PUSH_STUB  # by number too


def test_decorators_stay_and_a_body_without_given_steps_is_counted(module):
    assert stub(module, ["kernel"], []) == KERNEL_STUB


def test_a_step_inside_a_loop_is_left_out_at_its_depth(module):
    assert (
        stub(module, ["total"], ["1", "3"])
        == """def total(rows):
    total = 0
    for row in rows:

        # add up
        ...  # about 2 lines

        raise NotImplementedError

    return total"""
    )


def test_a_function_inside_stays_inside(module):
    expected = MODULE[MODULE.index("def rounded") : MODULE.index("    return 2")]
    expected += "    ...  # about 1 line\n\n    raise NotImplementedError"
    blank = stub(module, ["rounded"], ["1"])
    assert blank == expected.replace('this."""\n\n', 'this."""\n')
    compile(blank, "blank", "exec")


def test_of_a_class_each_method_is_left_out_but_those_given(module):
    text = stub(module, ["Stack"], ["size"])
    assert "return len(items)" in text and "self.items.append" not in text
    compile(text, "stub", "exec")


def test_an_unknown_name_is_told(module):
    with pytest.raises(LookupError, match="expected Stack.pop in stack_of_test_stubs.py"):
        answer(module, ["Stack.pop"])


def test_names_that_a_cell_needs_and_names_that_it_binds():
    imports = "import a\nfrom b import c as d\n"
    source = imports + "def f(x: T = d, *, y=z) -> len:\n    return g(x, a)"
    assert free_names(source) == {"T", "z", "g"}
    assert bound_names(source) == {"a", "d", "f"}


def test_the_source_is_read_from_the_file_not_from_what_took_its_place(monkeypatch):
    monkeypatch.setattr("lib.text.decode", lambda token_ids: "replaced")
    assert "errors=" in answer("lib.text", ["decode"])


def test_a_withheld_answer_says_so_before_a_given_paragraph_needs_what_is_left_out():
    text = (
        "def middle(x):\n"
        '    """Doc."""\n'
        "    y = x + 1\n\n"
        "    z = 2 * y\n\n"
        "    w = z - 1\n\n"
        "    return w\n"
    )
    blank = withheld(text, ["middle"], ["1", "3"], "middle is yours")
    names = {}
    exec(blank, names)
    with pytest.raises(NotImplementedError, match="middle is yours"):
        names["middle"](1)
    assert "w = z - 1" in blank and "2 * y" not in blank and "return" not in blank
