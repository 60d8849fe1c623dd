import functools
import os

import pytest
import torch
from compiler import Compiler

from lib.measure import gpu_code

# Small models: more threads are slower, and far slower beside other work.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of what tests start


@pytest.fixture(autouse=True)
def the_same_random_numbers_in_any_order():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def warm_compiler():
    """In the place of a process for each kernel; what it has compiled it knows."""
    compiler = Compiler()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_code, "_compile_in_child", functools.cache(compiler))
        yield
    compiler.close()


@pytest.fixture(scope="module")
def no_hurry():
    """Seconds that the grader gives a call, by exercise; a minute for all that are not
    named, so that nothing hangs on how busy the machine is."""
    from lib.course.grading import grader  # here: it is not for Windows

    seconds, tried_on = {}, grader.tried_on

    def unhurried(name, seed):
        return tried_on(name, seed)[0], seconds.get(name, 60)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grader, "tried_on", unhurried)
        yield seconds
