"""Chapter 5: what a GPU would run, read on a machine that has none.

    python -m lib.measure.gpu_code --gpu sm_90 --dtype bfloat16

Triton's wheel brings the compilers of NVIDIA and AMD. So the kernels of
lib/paged_attention_triton.py can be compiled for a GPU that is not there, and the result
be looked at: registers, spills, shared memory, tensor cores. A process that interprets
kernels cannot compile them: `compile_kernel` asks a child process.
"""

import argparse
import contextlib
import functools
import importlib.util
import inspect
import json
import linecache
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lib import interpreter, paged_attention_triton

GPUS = ("sm_80", "sm_90", "sm_100", "gfx942")  # A100, H100, B200, MI300
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
BLOCK_SIZE = 16  # tokens


# Of the file that is compiled: what a notebook's first cell has for all.
PREAMBLE = """
import math
import torch
import triton
import triton.language as tl

"""


@dataclass(frozen=True)
class GpuCode:
    """One kernel, compiled."""

    gpu: str
    registers: int  # of a thread
    spilled_bytes: int  # of a thread: what found no register and goes through memory
    shared_bytes: int  # of a program
    tensor_core_instructions: list[str]  # their names, each once
    num_buffers: int  # tiles of one kind, as of keys, that shared memory holds at a time
    loop_waits: list[int]  # copies that may be under way still where a loop waits for one
    assembly: str


class CompileError(Exception):
    """The compiler's words, with the line of the kernel."""


def compile_kernel(
    kernel: Any,
    types: list[str],
    constants: dict[str, int | bool],
    gpu: str,
    options: dict[str, int] | None = None,
) -> GpuCode:
    """`kernel`, compiled for `gpu` in a child process.

    kernel: a function under @triton.jit, which may call others. types: of the arguments
    that are no constants, in their order, as Triton writes them: "*bf16" a pointer,
    "fp32", "i32"; ":16" behind it promises a multiple of 16, as a launch would find.
    gpu: one of GPUS. options: num_warps and num_stages, where they are not Triton's own.
    Raises CompileError, or ValueError for another GPU.

    num_buffers and loop_waits are read from the compiler's words for NVIDIA: 0 and none
    where no loop copies ahead, and for AMD.
    """
    _check_known("gpu", gpu, GPUS)
    for name in options or {}:
        _check_known("options", name, ("num_warps", "num_stages"))
    _check_triton()
    job = {
        "source": source_of(kernel),
        "name": kernel.fn.__name__,
        "types": types,
        "constants": constants,
        "gpu": gpu,
        "options": options or {},
    }
    try:
        child = _compile_in_child(json.dumps(job))
    except subprocess.TimeoutExpired as error:
        raise CompileError(f"it takes longer than {error.timeout} seconds") from None
    if child.returncode != 0:
        ended = f"the compiler ended with status {child.returncode}, without a word"
        raise CompileError(child.stderr.strip() or ended)
    return GpuCode(**json.loads(child.stdout))


def compile_decode(
    gpu: str,
    dtype: str = "bfloat16",
    *,
    head_dim: int = 128,
    group_size: int = 4,
    num_splits: int = 8,
    num_stages: int | None = None,
    kernel: Any = None,
) -> GpuCode:
    """`paged_decode_kernel`, or another in its place, compiled as it would be launched.

    dtype: of q and the caches. num_stages: another number of them. Raises as
    `compile_kernel`, and ValueError where the launcher would.
    """
    out = "*fp32:16" if num_splits > 1 else None
    return _compile_attention(
        kernel or paged_attention_triton.paged_decode_kernel,
        paged_attention_triton.decode_constants,
        (group_size, head_dim, BLOCK_SIZE),
        *(gpu, dtype, out, num_stages),
    )


def compile_prefill(
    gpu: str,
    dtype: str = "bfloat16",
    *,
    head_dim: int = 128,
    group_size: int = 4,
    num_stages: int | None = None,
    kernel: Any = None,
) -> GpuCode:
    """`paged_prefill_kernel`, or another in its place, as `compile_decode`."""
    return _compile_attention(
        kernel or paged_attention_triton.paged_prefill_kernel,
        paged_attention_triton.prefill_constants,
        (group_size, head_dim, BLOCK_SIZE, 1),
        *(gpu, dtype, None, num_stages),
    )


def _compile_attention(
    kernel: Any,
    constants_of: Callable,
    sizes: tuple[int, ...],
    gpu: str,
    dtype: str,
    out: str | None,
    num_stages: int | None,
) -> GpuCode:
    _check_known("gpu", gpu, GPUS)
    _check_known("dtype", dtype, DTYPES)
    _check_triton()
    constants = constants_of(*sizes, getattr(torch, dtype), is_interpreted=False)
    platform = "cuda" if gpu.startswith("sm_") else "hip"
    options = paged_attention_triton.launch_options(constants["ROWS"], platform)
    if num_stages is not None:
        options["num_stages"] = num_stages
    types, number = {}, f"*{DTYPES[dtype]}:16"
    stride = "i32:16" if constants["HEAD_DIM"] % 16 == 0 else "i32"
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name in ("q_ptr", "k_cache_ptr", "v_cache_ptr"):
            types[name] = number
        elif name == "out_ptr":
            types[name] = out or number
        elif name == "logsumexp_ptr":
            types[name] = "*fp32:16"
        elif name.endswith("_ptr"):  # tables and lengths
            types[name] = "*i32:16"
        elif name == "scale_log2_e":
            types[name] = "fp32"
        elif name in ("table_stride_b", "split_tokens", "num_requests"):
            types[name] = "i32"  # not specialized
        else:
            types[name] = stride
    return compile_kernel(kernel, list(types.values()), constants, gpu, options)


def edited(kernel: Any, paragraphs: dict[str, str]) -> Any:
    """A kernel with paragraphs of its body replaced: a new one, to be compiled.

    paragraphs: text by the first word of the comment that a paragraph begins with, such
    as "look" for "# look up the block ...". Raises ValueError where there is none.
    """
    source = textwrap.dedent(inspect.getsource(kernel.fn)).replace("):\n", "):\n\n", 1)
    parts = source.split("\n\n")
    for word, text in paragraphs.items():
        found = [
            i for i, part in enumerate(parts) if part.lstrip().startswith(f"# {word}")
        ]
        if len(found) != 1:
            raise ValueError(
                f"{kernel.fn.__name__}: expected one paragraph under a comment "
                f"`# {word}`, found {len(found)}"
            )
        parts[found[0]] = text.strip("\n")
    source = "\n\n".join(parts)
    name = f"<{kernel.fn.__name__}, edited {hash(source)}>"
    linecache.cache[name] = len(source), None, source.splitlines(True), name
    names = dict(kernel.fn.__globals__)
    exec(compile(source, name, "exec"), names)
    return names[kernel.fn.__name__]


def _check_known(name: str, value: str, known: Any):
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def _check_triton():
    if not interpreter.HAS_TRITON:
        raise CompileError("expected Triton, which is for Linux")


def source_of(kernel: Any) -> str:
    """A file of its own for a kernel: its source, behind that of the constants and
    kernels that it uses."""
    found = {}

    def visit(kernel: Any):
        name = kernel.fn.__name__
        found[name] = ""  # lest a kernel that names itself be visited for ever
        for used in kernel.fn.__code__.co_names:
            value = kernel.fn.__globals__.get(used)
            if hasattr(value, "arg_names"):
                if value.fn.__name__ not in found:
                    visit(value)
                if value.fn.__name__ != used:
                    found[used] = f"{used} = {value.fn.__name__}"
            elif type(value).__name__ == "constexpr":
                number = value.value
                words = (
                    f"float('{number}')" if isinstance(number, float) else repr(number)
                )
                found[used] = f"{used} = tl.constexpr({words})"
            elif isinstance(value, (int, float)):  # Triton says that it takes none such
                found[used] = f"{used} = 0"
        source = textwrap.dedent(inspect.getsource(kernel.fn))
        at = re.search(r"^def ", source, re.MULTILINE).start()  # behind its decorators
        del found[name]  # and now behind all that it uses
        found[name] = "@triton.jit\n" + source[at:]

    visit(kernel)
    return PREAMBLE + "\n\n\n".join(found.values())


@functools.cache  # the same job is asked for again and again
def _compile_in_child(job: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "from lib.measure import gpu_code; gpu_code._compile_stdin()",
        ],
        input=job,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONWARNINGS": "ignore"},
        timeout=120,
    )


def _compile_stdin():
    """In the child: a job comes as JSON, a GpuCode goes as JSON."""
    job = json.loads(sys.stdin.read())
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a kernel prints meanwhile
            code = _compile_here(**job)
        print(json.dumps(asdict(code)))
    except Exception as error:
        sys.exit(str(error))


def _compile_here(
    source: str,
    name: str,
    types: list[str],
    constants: dict[str, int | bool],
    gpu: str,
    options: dict[str, int],
) -> GpuCode:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.py"  # Triton reads the source from its file
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("kernel", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kernel = getattr(module, name)
        names = [arg for arg in kernel.arg_names if arg not in constants]
        if len(names) != len(types):
            raise TypeError(f"expected {len(types)} arguments, got {', '.join(names)}")
        signature = dict.fromkeys(kernel.arg_names, "constexpr")
        signature |= {n: t.removesuffix(":16") for n, t in zip(names, types)}
        aligned = [n for n, t in zip(names, types) if t.endswith(":16")]
        divisible = {
            (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned
        }
        source = ASTSource(kernel, signature, constexprs=constants, attrs=divisible)
        is_nvidia = gpu.startswith("sm_")
        if is_nvidia:
            target = GPUTarget("cuda", int(gpu.removeprefix("sm_")), 32)
        else:
            target = GPUTarget("hip", gpu, 64)
        compiled = triton.compile(source, target=target, options=options)
    facts = {
        "gpu": gpu,
        "shared_bytes": compiled.metadata.shared,
        **_read_loops(compiled.asm["ttgir"]),
    }
    if is_nvidia:
        return _read_cubin(compiled.asm["cubin"], Path(triton.__file__).parent, facts)
    return _read_amdgcn(compiled.asm["amdgcn"], facts)


def _read_loops(ttgir: str) -> dict[str, Any]:
    """From the last of the compiler's texts that has loops still. Where a loop copies
    ahead, its tiles lie in shared memory behind one another, (buffers, rows, cols)."""
    buffers = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", ttgir)
    waits, depth = [], 0
    for line in ttgir.split("\n"):
        is_loop = "scf.for" in line or "scf.while" in line
        depth = depth + 1 if is_loop or depth and line.rstrip().endswith("{") else depth
        if depth and "async_wait" in line:
            waits.append(int(re.search(r"num = (\d+)", line)[1]))
        if depth and line.strip().startswith("}"):
            depth -= 1
    return {
        "num_buffers": min(map(int, buffers), default=0),
        "loop_waits": waits,
    }


def _read_cubin(cubin: bytes, triton_folder: Path, facts: dict) -> GpuCode:
    tools = triton_folder / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def run(*command: str | Path) -> str:
            command = [*command, path]
            result = subprocess.run(command, capture_output=True, encoding="utf-8")
            if result.returncode != 0:
                raise RuntimeError(result.stderr)
            return result.stdout

        usage = run(tools / "cuobjdump", "-res-usage")
        assembly = run(tools / "nvdisasm", "-c")
    return GpuCode(
        **facts,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spilled_bytes=int(re.search(r"STACK:(\d+)", usage)[1]),
        tensor_core_instructions=_names(r"\b([A-Z]+MMA[.\w]*)", assembly),
        assembly=assembly,
    )


def _read_amdgcn(assembly: str, facts: dict) -> GpuCode:
    return GpuCode(
        **facts,
        registers=int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1]),
        spilled_bytes=4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)[1]),
        tensor_core_instructions=_names(r"\b(v_mfma\w*)", assembly),
        assembly=assembly,
    )


def _names(pattern: str, assembly: str) -> list[str]:
    return sorted(set(re.findall(pattern, assembly)))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lib.measure.gpu_code",
        description="Compile the decode kernel for a GPU, and say what came out.",
    )
    parser.add_argument("--gpu", choices=GPUS, default="sm_90")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--group-size", type=int, default=4, help="query heads a KV head")
    parser.add_argument("--num-splits", type=int, default=8)
    args = parser.parse_args()
    try:
        code = compile_decode(
            args.gpu,
            args.dtype,
            head_dim=args.head_dim,
            group_size=args.group_size,
            num_splits=args.num_splits,
        )
    except (ValueError, CompileError) as error:
        sys.exit(str(error))
    print(f"{code.gpu}, {args.dtype}: {code.registers} registers, ", end="")
    print(f"{code.spilled_bytes} bytes spilled, {code.shared_bytes} shared; ", end="")
    print(", ".join(code.tensor_core_instructions) or "no tensor cores")
    return 0


if __name__ == "__main__":
    sys.exit(main())
