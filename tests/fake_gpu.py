"""A GPU that compiles and launches, and computes nothing.

Run as a script in a process of its own, which says as JSON what was compiled and launched
while a text grows, and what a GPU with little shared memory is told.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "0"
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from lib import paged_attention_triton as kernels

launches = []  # the grid of each


class Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, x, y, z, *args):
        launches.append((x, y, z))


class Utils:
    shared_bytes = 227 * 1024  # an H100's

    def load_binary(self, name, kernel, shared, device):
        return 0, 0, 0, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": self.shared_bytes}

    def unload_module(self, module):
        pass


class FakeGpu(DriverBase):
    utils, launcher_cls = Utils(), Launcher

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, type_name):
        return type_name

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def inputs(seq_len, head_dim=128, batch_size=1):
    """Of requests to Llama 3 8B, in blocks of 16; nobody looks at the numbers."""
    q = torch.zeros(batch_size, 32, head_dim, dtype=torch.bfloat16)
    cache = torch.zeros(2, 16, 8, head_dim, dtype=torch.bfloat16)
    tables = torch.zeros(batch_size, triton.cdiv(seq_len, 16), dtype=torch.int32)
    return q, cache, cache, tables, torch.full((batch_size,), seq_len, dtype=torch.int32)


def main():
    triton.runtime.driver.set_active(FakeGpu())
    kernels.check_interpreter = lambda: None  # there is no GPU
    compiled = []
    triton.knobs.runtime.jit_post_compile_hook = lambda *, fn, **_: compiled.append(
        fn.name.split(".")[-1]
    )
    ones = torch.ones(1, dtype=torch.int32)
    for seq_len in (
        1,
        2,
        15,
        16,
        17,
        100,
        128,
        129,
        1000,
        1024,
        1025,
        4096,
        16384,
        65536,
    ):
        args = inputs(seq_len)
        split_tokens = min(max(128, triton.next_power_of_2(seq_len) // 32), 2048)
        kernels.paged_decode(*args, split_tokens=split_tokens, check_ids=False)
        kernels.paged_prefill(*args, ones, check_ids=False)
    for batch_size in (2, 3, 16, 17, 300):
        args = inputs(1000, batch_size=batch_size)
        kernels.paged_decode(*args, split_tokens=100 + batch_size, check_ids=False)
        kernels.paged_prefill(*args, ones.expand(batch_size).clone(), check_ids=False)
    said = {"compiled": compiled[:], "launches": launches[:]}

    Utils.shared_bytes = 48 * 1024
    triton.compiler.compiler.max_shared_mem.cache_clear()
    try:
        kernels.paged_decode(*inputs(64, 512), check_ids=False)
    except ValueError as error:
        said["refused"] = str(error)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
