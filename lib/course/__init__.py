"""How the course is taught: everything that is not taught itself."""

import inspect
from collections.abc import Callable

from IPython.display import Code


def show_source(function: Callable) -> Code:
    """The source of a function, in colours: chapters show code, and paste none."""
    return Code(inspect.getsource(function), language="python")
