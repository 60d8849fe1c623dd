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
