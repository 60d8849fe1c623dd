"""tests/device/ once more, on this machine's GPU, in a process that can see it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib import interpreter

NO_GPU = 77  # as no exit status of pytest
ON_GPU = f"""
import sys
import pytest
from lib.measure import bench_attention

if not bench_attention.can_compile_kernels():
    sys.exit({NO_GPU})
sys.exit(pytest.main(["tests/device", "-m", "", "-p", "no:cacheprovider"]))
"""


def environment_before_tests() -> dict[str, str]:
    """That of this process, as it was before conftest.py hid the GPU."""
    before = json.loads(os.environ["BEFORE_TESTS"])
    is_pytests = [name for name in os.environ if name.startswith("PYTEST_")]
    environ = {**os.environ, **before, **dict.fromkeys(is_pytests)}
    return {name: value for name, value in environ.items() if value is not None}


def test_the_tests_see_no_gpu_and_interpret_kernels():
    pytest.importorskip("triton")
    assert not torch.cuda.is_available() and interpreter.IS_INTERPRETED
    hidden = [os.environ[f"{maker}_VISIBLE_DEVICES"] for maker in ("CUDA", "HIP")]
    assert hidden == ["-1", "-1"]


def test_what_holds_here_holds_on_a_gpu():
    result = subprocess.run(
        [sys.executable, "-c", ON_GPU],
        env={**environment_before_tests(), "TEST_DEVICE": "cuda"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    if result.returncode == NO_GPU:
        pytest.skip("no GPU here that kernels are compiled for")
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_environment_before_the_tests_is_found_again(monkeypatch):
    before = {"CUDA_VISIBLE_DEVICES": "3", "TRITON_INTERPRET": None}
    monkeypatch.setenv("BEFORE_TESTS", json.dumps(before))
    environ = environment_before_tests()
    assert environ["CUDA_VISIBLE_DEVICES"] == "3" and "TRITON_INTERPRET" not in environ
    assert environ["BEFORE_TESTS"] and environ["PATH"] == os.environ["PATH"]


# As on a machine with a GPU, as far as what decides about kernels can tell.
WITH_GPU = """
import importlib, sys, torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *device: eval(sys.argv[2])
importlib.import_module(sys.argv[1])
from lib import interpreter
print(interpreter.IS_INTERPRETED)
"""


@pytest.mark.parametrize(
    "module, capability, is_interpreted",
    [
        ("lib.course.check", (9, 0), False),  # in a notebook, whose kernels are compiled
        ("lib.course.check", (7, 5), True),
        ("lib.course.grading.__main__", (9, 0), True),
        ("lib.course.release", (9, 0), True),
    ],
)
def test_kernels_are_interpreted_where_answers_are_tried_and_for_an_old_gpu(
    module, capability, is_interpreted
):
    pytest.importorskip("triton")
    environ = environment_before_tests()
    environ.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, "-c", WITH_GPU, module, str(capability)],
        env=environ,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert result.stdout == f"{is_interpreted}\n", result.stderr
