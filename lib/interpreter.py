"""Triton, or what stands in for it, and whether kernels are compiled or interpreted.

On a GPU the kernels of chapter 5 are compiled; without one they are interpreted, slowly,
line by line (lib/__init__.py decides). Where there is no Triton, as it is for Linux, they
can be read only. `check_interpreter` says plainly what is wrong where they cannot run.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

try:
    import triton
    import triton.language as tl
    from triton.runtime.errors import OutOfResources
except ModuleNotFoundError:  # what it takes to read kernels without it

    def read_only(kernel: Callable | None = None, **options: Any) -> Callable:
        return kernel or read_only

    triton = SimpleNamespace(jit=read_only)
    tl = SimpleNamespace(constexpr=lambda value: value)
    OutOfResources = ()

HAS_TRITON = hasattr(triton, "compile")


@triton.jit
def _canary_kernel(numbers_ptr, out_ptr, TILE: tl.constexpr):
    """All that the kernels use of Triton and is not an operator."""
    i, total = tl.arange(0, TILE), 0.0
    numbers = tl.load(numbers_ptr + i, mask=i < 3, other=0)
    ones = tl.full([TILE, TILE], 1.0, tl.float32)
    acc = tl.zeros([TILE], tl.float32)
    for start in range(0, tl.load(numbers_ptr), tl.load(numbers_ptr + 1)):
        total += tl.max(numbers, axis=0) - tl.minimum(start, 1)
        total += tl.cumsum(numbers).to(tl.float32).max(axis=0) - 6
        product = tl.dot(ones, tl.trans(ones), input_precision="ieee")
        acc = tl.maximum(acc, tl.sum(product, axis=1))
    total += tl.exp2(tl.log2(1.0)) - tl.exp(tl.log(1.0)) - tl.cdiv(1, TILE)
    tl.store(out_ptr + i, tl.where(i == 0, total, acc), mask=i < 2)


# Triton decides when it decorates, not when it is asked.
IS_INTERPRETED = HAS_TRITON and not isinstance(_canary_kernel, triton.JITFunction)


@contextlib.contextmanager
def on_its_device(x: torch.Tensor) -> Iterator[None]:
    """While inside, kernels are launched where the tensor is, not where most are;
    ValueError where that GPU has less than they need."""
    try:
        with torch.cuda.device_of(x):
            yield
    except OutOfResources as error:
        raise ValueError(
            f"expected fewer numbers per head than {x.shape[-1]} of {x.dtype}, or fewer "
            f"heads per KV head: this GPU has {error.limit} of {error.name}, and the "
            f"kernel takes {error.required}"
        ) from None


def check_no_gradient(*tensors: torch.Tensor):
    """Raise ValueError where a gradient would be lost: the kernels have no backward."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(
            "expected no gradient to be wanted (call it under torch.no_grad), got a "
            "tensor with requires_grad: the kernels have no backward pass"
        )


@functools.cache
def warn_of_twin():
    """Say, once, who computes where there is no Triton."""
    warnings.warn(
        "no Triton here (it is for Linux): the kernel's torch twin computes instead",
        stacklevel=3,
    )


@functools.cache
def check_interpreter():
    """Raise RuntimeError that says plainly what is wrong, if kernels do not run here."""
    if not HAS_TRITON:
        raise RuntimeError("Triton: expected it installed, which it can be on Linux")
    if not IS_INTERPRETED:
        if not torch.cuda.is_available():
            raise RuntimeError(
                "Triton: expected a GPU, or TRITON_INTERPRET=1 before Triton is imported "
                "for the first time: import lib before anything that imports Triton, and "
                "leave TRITON_INTERPRET unset"
            )
        return
    numbers, out = torch.tensor([3, 1, 2], dtype=torch.int32), torch.zeros(2)
    try:
        _canary_kernel[(1,)](numbers, out, TILE=16)
        got = out.tolist()
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
    if got != [6.0, 256.0]:
        raise RuntimeError(
            f"the Triton interpreter does not work here: expected [6, 256], got {got}. "
            f"Either Triton was imported before lib (import lib first, and leave "
            f"TRITON_INTERPRET unset), or triton {triton.__version__} and numpy "
            f"{np.__version__} do not fit: numpy 2.4 needs triton 3.7 or later"
        )
