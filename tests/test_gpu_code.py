import sys

import pytest
import torch

pytest.importorskip("triton", reason="compiling needs Triton")
from lib import paged_attention_triton  # noqa: E402
from lib.measure import gpu_code  # noqa: E402
from lib.measure.gpu_code import compile_decode  # noqa: E402
from lib.paged_attention_triton import tl, triton  # noqa: E402

in_a_process_of_its_own = gpu_code._compile_in_child
FACTOR, LOWEST = tl.constexpr(2.0), tl.constexpr(float("-inf"))
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux"),
    pytest.mark.usefixtures("warm_compiler"),
]


@pytest.mark.parametrize(
    "gpu, dtype, instruction",
    [
        ("sm_80", "float16", "HMMA"),
        ("sm_90", "bfloat16", "HMMA"),
        ("sm_100", "bfloat16", "MMA"),
        ("gfx942", "bfloat16", "v_mfma"),
        ("sm_80", "float32", None),
        pytest.param("sm_80", "bfloat16", "HMMA", marks=pytest.mark.nightly),
        pytest.param("sm_90", "float32", None, marks=pytest.mark.nightly),
        pytest.param("sm_100", "float32", None, marks=pytest.mark.nightly),
        pytest.param("gfx942", "float32", None, marks=pytest.mark.nightly),
    ],
)
@pytest.mark.parametrize("num_splits", [1, 8])
def test_the_kernel_compiles_without_spills_and_uses_tensor_cores(
    gpu, dtype, instruction, num_splits
):
    code = compile_decode(gpu, dtype, num_splits=num_splits)
    assert code.spilled_bytes == 0
    assert 16 <= code.registers <= 255 and 0 < code.shared_bytes <= 99 * 1024
    names = code.tensor_core_instructions
    # fp32 is multiplied in full precision, which NVIDIA's tensor cores do not have.
    if instruction:
        assert any(instruction in name for name in names), names
    elif gpu.startswith("sm_"):
        assert names == []


@pytest.mark.parametrize("head_dim, group_size", [(80, 1), (64, 8), (256, 4)])
def test_other_shapes_compile_too(head_dim, group_size):
    code = compile_decode("sm_90", head_dim=head_dim, group_size=group_size)
    assert code.spilled_bytes == 0


def test_the_command_says_what_came_out(monkeypatch, capfd):
    monkeypatch.setattr(gpu_code, "_compile_in_child", in_a_process_of_its_own)
    monkeypatch.setattr("sys.argv", ["gpu_code", "--gpu", "sm_90"])
    assert gpu_code.main() == 0
    out = capfd.readouterr().out
    assert out.startswith("sm_90, bfloat16: ") and " 0 bytes spilled" in out


@triton.jit
def twice(x):
    return x * FACTOR


double = twice  # the same, by another name


@triton.jit
def kernel_with_a_helper(x_ptr: torch.Tensor, TILE: tl.constexpr):
    i = tl.arange(0, TILE)
    if TILE < 0:
        kernel_with_a_helper(x_ptr, TILE)  # by its own name
    x = tl.where(i < 9, double(tl.load(x_ptr + i)), LOWEST)
    tl.store(x_ptr + i, x)


@triton.jit
def kernel_with_a_python_list(x_ptr, TILE: tl.constexpr):
    tl.store(x_ptr + [0, 1], 0.0)


def test_what_finds_no_register_is_counted():
    constants = paged_attention_triton.decode_constants(4, 128, 1, "float32", False)
    assert gpu_code.compile_decode("sm_80", "float32", num_splits=1).spilled_bytes == 0
    number, index = ["*fp32:16"], ["*i32:16"]
    types = number * 3 + index * 2 + number * 2 + ["fp32", "i32"] + ["i32:16"] * 8
    kernel = paged_attention_triton.paged_decode_kernel
    large = gpu_code.compile_kernel(
        kernel, [*types, "i32"], {**constants, "TILE": 128}, "sm_80"
    )
    assert large.spilled_bytes > 0


def test_larger_heads_need_more_shared_memory():
    shared = [compile_decode("sm_90", head_dim=D).shared_bytes for D in (64, 256)]
    assert shared[0] < shared[1]


def test_any_kernel_compiles_with_the_helpers_and_constants_it_uses():
    code = gpu_code.compile_kernel(
        kernel_with_a_helper, ["*fp32:16"], {"TILE": 32}, "sm_90"
    )
    assert code.tensor_core_instructions == [] and "STG" in code.assembly


@pytest.mark.parametrize("is_warm", [True, False])
def test_what_the_compiler_refuses_is_told_with_its_line(monkeypatch, is_warm):
    if not is_warm:
        monkeypatch.setattr(gpu_code, "_compile_in_child", in_a_process_of_its_own)
    with pytest.raises(gpu_code.CompileError, match=r"tl.store\(x_ptr \+ \[0, 1\]"):
        gpu_code.compile_kernel(
            kernel_with_a_python_list, ["*fp32:16"], {"TILE": 32}, "sm_90"
        )
    with pytest.raises(gpu_code.CompileError, match="expected 2 arguments, got x_ptr"):
        gpu_code.compile_kernel(
            kernel_with_a_helper, ["*fp32", "i32"], {"TILE": 32}, "sm_90"
        )


def test_another_gpu_or_dtype_is_refused():
    with pytest.raises(ValueError, match="gpu: expected one of sm_80, .*, got 'sm_12'"):
        compile_decode("sm_12")
    with pytest.raises(ValueError, match="dtype: expected one of float32"):
        compile_decode("sm_90", "int8")


def test_what_does_not_compile_is_told():
    with pytest.raises(gpu_code.CompileError, match="tiles_per_split = tl.cdiv"):
        compile_decode("sm_90", num_splits=3.5)
