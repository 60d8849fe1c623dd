import functools
import json
import os

# The tests run as on a machine without a GPU: here it is hidden from them, and from the
# processes that they start, before anything imports torch. tests/device/ alone runs on a
# GPU, where TEST_DEVICE=cuda says so. What is changed is remembered for test_device.py,
# by the first process: pytest-xdist starts others, which find it changed already.
WITHOUT_GPU = {
    "CUDA_VISIBLE_DEVICES": "-1",  # a number that no GPU has
    "HIP_VISIBLE_DEVICES": "-1",
    "TRITON_INTERPRET": "1",
}
if os.environ.get("TEST_DEVICE", "cpu") == "cpu" and "BEFORE_TESTS" not in os.environ:
    before = {name: os.environ.get(name) for name in WITHOUT_GPU}
    os.environ.update(WITHOUT_GPU, BEFORE_TESTS=json.dumps(before))

import pytest  # noqa: E402
import torch  # noqa: E402
from compiler import Compiler  # noqa: E402

from lib.measure import gpu_code  # noqa: E402

# For a process with Triton of its own. Doctests are looked for everywhere else.
collect_ignore = ["fake_gpu.py"]

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
