import functools
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="compiling needs Triton")
from lib import paged_attention_triton  # noqa: E402
from lib.interpreter import tl, triton  # noqa: E402
from lib.measure import gpu_code  # noqa: E402
from lib.measure.gpu_code import compile_decode, compile_prefill  # noqa: E402

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
    check_tensor_cores(code, gpu, instruction)


@pytest.mark.parametrize(
    "gpu, dtype, instruction",
    [
        ("sm_80", "bfloat16", "HMMA"),
        ("sm_90", "bfloat16", "HGMMA"),
        ("gfx942", "bfloat16", "v_mfma"),
        pytest.param("sm_80", "float32", None, marks=pytest.mark.nightly),
        pytest.param("sm_90", "float16", "HGMMA", marks=pytest.mark.nightly),
        pytest.param("sm_100", "bfloat16", "MMA", marks=pytest.mark.nightly),
    ],
)
def test_the_kernel_for_prompts_compiles_without_spills_too(gpu, dtype, instruction):
    code = compile_prefill(gpu, dtype)
    assert code.spilled_bytes == 0 and code.shared_bytes <= 163 * 1024  # an A100's
    check_tensor_cores(code, gpu, instruction)


@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_prompts_of_other_heads_fit_a_gpu_of_99_kilobytes(head_dim):
    """As an RTX of the 30, 40 and 50 series has; they multiply as sm_80 does."""
    code = compile_prefill("sm_80", head_dim=head_dim)
    assert code.spilled_bytes <= 8 and code.shared_bytes <= 99 * 1024


def check_tensor_cores(code, gpu, instruction):
    names = code.tensor_core_instructions
    # fp32 is multiplied in full precision, which NVIDIA's tensor cores do not have.
    if instruction:
        assert any(instruction in name for name in names), names
    elif gpu.startswith("sm_"):
        assert names == []


@pytest.mark.parametrize("compile_one", [compile_decode, compile_prefill])
@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_the_next_tiles_are_on_their_way_while_one_is_multiplied(gpu, compile_one):
    """Two buffers for keys and two for values, and no wait for all that was asked for."""
    code = compile_one(gpu, "bfloat16")
    assert code.num_buffers >= 2
    assert code.loop_waits and min(code.loop_waits) > 0
    # The machine code has the same: a loop may not wait with a count of 0 at its top.
    counts = [int(n, 16) for n in re.findall(r"DEPBAR\.LE SB0, (0x\w+)", code.assembly)]
    assert len(counts) > 1 and all(count > 0 for count in counts[:-1])  # 0 at the end


def test_with_fewer_stages_each_load_is_waited_for():
    """What chapter 5 lets the reader find."""
    for num_stages, num_buffers, waits in ((1, 0, []), (3, 1, [0]), (7, 3, [6])):
        code = compile_decode("sm_90", num_stages=num_stages)
        assert (code.num_buffers, code.loop_waits) == (num_buffers, waits)


@pytest.mark.parametrize(
    "head_dim, group_size", [(80, 1), (64, 8), (256, 4), (512, 16), (128, 128)]
)
def test_other_shapes_compile_too(head_dim, group_size):
    code = compile_decode("sm_90", head_dim=head_dim, group_size=group_size)
    assert code.spilled_bytes == 0 and code.num_buffers >= 2


PROMISED = {
    "address": """
        # address: where the keys and values of these tokens begin, at multiples of 8
        k_at = block_id * k_stride_block + place * k_stride_place + g * k_stride_g
        v_at = block_id * v_stride_block + place * v_stride_place + g * v_stride_g
        k_at, v_at = tl.multiple_of(k_at, 8), tl.multiple_of(v_at, 8)
"""
}


def test_keys_of_which_nobody_says_that_they_are_aligned_cost_a_great_deal():
    """72 numbers in bf16 are 9 times 16 bytes; Triton does not see it."""
    kernel = gpu_code.edited(paged_attention_triton.paged_decode_kernel, PROMISED)
    unseen, promised = (
        compile_decode("sm_80", head_dim=72, kernel=k) for k in (None, kernel)
    )
    assert unseen.spilled_bytes > 1000 and unseen.num_buffers == 0
    assert promised.spilled_bytes == 0 and promised.num_buffers == 2


def test_a_text_may_grow_and_no_kernel_is_compiled_again():
    said = fake_gpu()
    # Decoding once with results of the queries' dtype, once with parts in fp32; prompts
    # once more for a batch of 300, beyond the 256 requests that there is room for.
    assert sorted(said["compiled"]) == [
        *("merge_splits_kernel", "paged_decode_kernel"),
        *("paged_decode_kernel", "paged_prefill_kernel", "paged_prefill_kernel"),
    ]
    grids = [tuple(grid) for grid in said["launches"]]
    assert grids[0] == (1, 8, 1) and (1, 8, 32) in grids  # 65,536 tokens, 2,048 each


def test_a_gpu_with_less_shared_memory_says_what_it_has():
    words = "expected fewer numbers per head than 512 .* has 49152 of shared memory"
    assert re.search(words, fake_gpu()["refused"])


@functools.cache
def fake_gpu():
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("fake_gpu.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


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


def test_what_finds_no_register_is_counted(monkeypatch):
    assert compile_decode("sm_80", "float32", num_splits=1).spilled_bytes == 0
    monkeypatch.setitem(paged_attention_triton.TILE_NUMBERS, torch.float32, 2**16)
    monkeypatch.setitem(paged_attention_triton.MAX_NUMBERS, torch.float32, 2**16)
    paged_attention_triton.decode_constants.cache_clear()
    large = compile_decode("sm_80", "float32", group_size=128)
    paged_attention_triton.decode_constants.cache_clear()
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
    with pytest.raises(gpu_code.CompileError, match="tl.arange\\(0, ROWS\\)"):
        constants = {
            **paged_attention_triton.decode_constants(4, 128, 16, torch.bfloat16),
            "ROWS": 3.5,
        }
        kernel = paged_attention_triton.paged_decode_kernel
        types = ["*bf16"] * 3 + ["*i32"] * 2 + ["*bf16", "*fp32", "fp32"] + ["i32"] * 10
        gpu_code.compile_kernel(kernel, types, constants, "sm_90")


AHEAD = {
    "tile": """
    # tile by tile; of the first one the blocks are looked up here
    first = start + tl.arange(0, TILE)
    next_at = b * table_stride_b + first // BLOCK_SIZE
    next_id = tl.load(block_tables_ptr + next_at, mask=first < end, other=0)
    for tile_start in range(start, end, TILE):
        position = tile_start + tl.arange(0, TILE)
        is_token = position < end
        is_there = is_token[:, None] & is_col[None, :]
""",
    "look": """
        # use what was looked up a tile ago, and look up the next
        block_id, place = next_id.to(tl.int64), (position % BLOCK_SIZE).to(tl.int64)
        next_at = b * table_stride_b + (position + TILE) // BLOCK_SIZE
        next_id = tl.load(block_tables_ptr + next_at, mask=position + TILE < end, other=0)
""",
}


def test_a_look_up_moved_a_tile_ahead_gives_a_buffer_more_for_the_same_stages():
    kernel = gpu_code.edited(paged_attention_triton.paged_decode_kernel, AHEAD)
    plain, ahead = (
        compile_decode("sm_90", num_stages=3, kernel=k) for k in (None, kernel)
    )
    assert (plain.num_buffers, plain.loop_waits) == (1, [0])
    assert (ahead.num_buffers, ahead.loop_waits) == (2, [2])


def test_a_paragraph_that_is_not_there_cannot_be_replaced():
    kernel = paged_attention_triton.paged_decode_kernel
    with pytest.raises(ValueError, match="under a comment `# sing`, found 0"):
        gpu_code.edited(kernel, {"sing": ""})


def test_what_a_kernel_prints_while_it_is_compiled_does_no_harm(monkeypatch):
    monkeypatch.setattr(gpu_code, "_compile_in_child", in_a_process_of_its_own)
    code = gpu_code.compile_kernel(
        kernel_that_prints, ["*fp32:16"], {"TILE": 32}, "sm_90"
    )
    assert "STG" in code.assembly


@triton.jit
def kernel_that_prints(x_ptr, TILE: tl.constexpr):
    tl.static_print("TILE is", TILE)
    tl.store(x_ptr + tl.arange(0, TILE), 0.0)


def test_a_compiler_that_dies_is_told(monkeypatch):
    dead = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(gpu_code, "_compile_in_child", lambda job: dead)
    with pytest.raises(gpu_code.CompileError, match="ended with status -9"):
        compile_decode("sm_90")


def test_an_option_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="options: expected one of num_warps, num_st"):
        gpu_code.compile_kernel(
            kernel_that_prints, ["*fp32:16"], {"TILE": 32}, "sm_90", {"warps": 4}
        )


@pytest.mark.parametrize("group_size", [40, 64])
def test_prompts_of_many_heads_per_kv_head_compile(group_size):
    code = compile_prefill("sm_80", group_size=group_size)
    assert code.spilled_bytes == 0 and code.shared_bytes <= 163 * 1024
    constants = paged_attention_triton.prefill_constants(
        group_size, 128, 16, 1, torch.bfloat16, is_interpreted=False
    )
    assert constants["QUERIES"] * group_size <= constants["ROWS"]


def test_the_first_paragraph_can_be_replaced_too():
    kernel = gpu_code.edited(kernel_that_sings, {"sing": "    # sing\n    x = 2"})
    other = gpu_code.edited(kernel_that_sings, {"sing": "    # sing\n    x = 3"})
    assert "x = 2" in inspect.getsource(kernel.fn) and kernel is not other
    assert "x = 3" in inspect.getsource(other.fn)
    with pytest.raises(ValueError, match="`# dance`, found 2"):
        gpu_code.edited(kernel_that_sings, {"dance": ""})


@triton.jit
def kernel_that_sings(x_ptr):
    # sing
    x = 1

    # dance
    tl.store(x_ptr, x)

    # dance on
    tl.store(x_ptr, x)


def test_buffers_and_waits_are_read_from_loops_alone():
    text = """
  %0 = ttg.local_alloc : () -> !ttg.memdesc<3x64x128xbf16, #s>
  %1 = ttg.local_alloc : () -> !ttg.memdesc<2x64x128xbf16, #s>
  ttg.async_wait {num = 9 : i32}
  scf.if %c {
  ttg.async_wait {num = 8 : i32}
  }
  %1:3 = scf.for %i = %a to %b step %c iter_args(%x = %y) -> (f32)  : i32 {
    %w = ttg.async_wait %t {num = 2 : i32}
    %r = scf.if %c -> (f32) {
      ttg.async_wait {num = 4 : i32}
    } else {
      ttg.async_wait {num = 5 : i32}
    }
    ttg.async_wait {num = 6 : i32}
  }
  ttg.async_wait {num = 7 : i32}
"""
    assert gpu_code._read_loops(text) == {"num_buffers": 2, "loop_waits": [2, 4, 5, 6]}
