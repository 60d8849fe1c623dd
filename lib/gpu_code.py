"""Chapter 5: what a GPU would run, read on a machine that has none.

    python -m lib.gpu_code --gpu sm_90 --dtype bfloat16

Triton's wheel brings the compilers of NVIDIA and AMD. So the kernels of
lib/paged_attention_triton.py can be compiled for a GPU that is not there, and the result
be looked at: registers, spills, shared memory, tensor cores. A process that interprets
kernels cannot compile them: `compile_decode` asks a child process.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

GPUS = ("sm_80", "sm_90", "sm_100", "gfx942")  # A100, H100, B200, MI300
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class GpuCode:
    """One kernel, compiled."""

    gpu: str
    dtype: str
    num_splits: int
    registers: int  # of a thread
    spilled_bytes: int  # of a thread: what found no register and goes through memory
    shared_bytes: int  # of a program
    tensor_core_instructions: list[str]  # their names, each once
    assembly: str


def compile_decode(
    gpu: str,
    dtype: str = "bfloat16",
    *,
    head_dim: int = 128,
    group_size: int = 4,
    num_splits: int = 8,
) -> GpuCode:
    """`paged_decode_kernel`, compiled for `gpu` in a child process.

    gpu: one of GPUS. dtype: of q and the caches. Raises ValueError for another, and
    RuntimeError with the compiler's words where it fails.
    """
    for name, value, known in (("gpu", gpu, GPUS), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    sizes = {"head_dim": head_dim, "group_size": group_size, "num_splits": num_splits}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    child = subprocess.run(
        [sys.executable, "-m", "lib.gpu_code", "--gpu", gpu, "--dtype", dtype, *options]
        + ["--json"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    if child.returncode != 0:
        raise RuntimeError(f"{gpu}, {dtype}: the kernel does not compile\n{child.stderr}")
    return GpuCode(**json.loads(child.stdout))


def _compile_here(
    gpu: str, dtype: str, head_dim: int, group_size: int, num_splits: int
) -> GpuCode:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lib import paged_attention_triton as kernels

    kernel = kernels.paged_decode_kernel
    constants = kernels.decode_constants(group_size, head_dim, num_splits, dtype)
    signature, divisible = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in ("block_tables_ptr", "seq_lens_ptr"):
            signature[name] = "*i32"
        elif name in ("q_ptr", "k_cache_ptr", "v_cache_ptr", "out_ptr"):
            signature[name] = f"*{DTYPES[dtype]}"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name == "scale_log2_e" else "i32"
        # As a launch would find it: torch aligns memory, and strides are multiples of D.
        if name.endswith("_ptr") or name.startswith(("q_stride", "k_stride", "v_stride")):
            divisible[(i,)] = [["tt.divisibility", 16]]
    is_nvidia = gpu.startswith("sm_")
    if is_nvidia:
        target = GPUTarget("cuda", int(gpu.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", gpu, 64)
    source = ASTSource(kernel, signature, constexprs=constants, attrs=divisible)
    compiled = triton.compile(source, target=target)
    facts = {"gpu": gpu, "dtype": dtype, "num_splits": num_splits}
    facts["shared_bytes"] = compiled.metadata.shared
    if is_nvidia:
        return _read_cubin(compiled.asm["cubin"], Path(triton.__file__).parent, facts)
    return _read_amdgcn(compiled.asm["amdgcn"], facts)


def _read_cubin(cubin: bytes, triton_folder: Path, facts: dict) -> GpuCode:
    tools = triton_folder / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def run(*command: str | Path) -> str:
            result = subprocess.run([*command, path], capture_output=True, text=True)
            if result.returncode != 0:
                raise RuntimeError(result.stderr)
            return result.stdout

        usage = run(tools / "cuobjdump", "-res-usage")
        assembly = run(tools / "nvdisasm", "-c")
    return GpuCode(
        **facts,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spilled_bytes=int(re.search(r"STACK:(\d+)", usage)[1]),
        tensor_core_instructions=_names(r"\b([A-Z]+MMA\.[.\w]+)", assembly),
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
        prog="python -m lib.gpu_code",
        description="Compile the decode kernel for a GPU, and say what came out.",
    )
    parser.add_argument("--gpu", choices=GPUS, default="sm_90")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--group-size", type=int, default=4, help="query heads a KV head")
    parser.add_argument("--num-splits", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="all of it, for a program")
    args = parser.parse_args()
    sizes = args.head_dim, args.group_size, args.num_splits
    if os.environ.get("TRITON_INTERPRET") == "0":
        code = _compile_here(args.gpu, args.dtype, *sizes)
    else:
        names = ("head_dim", "group_size", "num_splits")
        code = compile_decode(args.gpu, args.dtype, **dict(zip(names, sizes)))
    if args.json:
        print(json.dumps(asdict(code)))
        return 0
    print(f"{code.gpu}, {code.dtype}: {code.registers} registers, ", end="")
    print(f"{code.spilled_bytes} bytes spilled, {code.shared_bytes} shared; ", end="")
    print(", ".join(code.tensor_core_instructions) or "no tensor cores")
    return 0


if __name__ == "__main__":
    sys.exit(main())
