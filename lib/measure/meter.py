"""The meter: what did this call cost, in bytes, FLOPs and calls?

    cost = measure(lambda: model(token_ids, positions, attend))
    cost.peak_bytes, cost.flops["attention"], cost.calls["Block"]
    measure_traffic(lambda: paged_decode(...)).read_bytes

Under every line of torch code runs a stream of small operations. A `TorchDispatchMode`
sees each one with its inputs and outputs, and that is all a meter needs: memory is the
outputs' storages while they live, FLOPs follow from the shapes. On the CPU everything
but seconds is exact and the same on every run. On a GPU memory is the peak of torch's
own allocator, on several the sum of their peaks. What a Triton kernel loads and stores is
counted where it is interpreted.

What it does not see: scratch space inside one operation (`resident_bytes` does, less
exactly), memory that numpy or Python hold, and operations of other threads.
"""

import contextlib
import math
import os
import platform
import statistics
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import psutil  # comes with Jupyter
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Cost:
    """What one call cost, beyond what was there before it."""

    value: Any = field(compare=False)  # what the call returned
    peak_bytes: int  # most bytes alive at one time
    saved_bytes: int  # most bytes that autograd held for the backward pass at one time
    flops: Counter  # "attention" and "projection"; one multiply-add is two FLOPs
    calls: Counter  # of torch modules, by class name
    timeline: list[int]  # bytes alive after each operation, and after the call
    # What autograd held, in the order it was first saved: the operation that made it, its
    # shape, and the bytes of its storage.
    saved: list[tuple[str, tuple[int, ...], int]]


def measure(function: Callable[[], Any]) -> Cost:
    """Run `function()` once under the meter.

    Bytes count only storages made during the call: parameters, inputs and gradients
    allocated earlier are free. Of a measurement inside another, only the inner one sees
    what autograd saves.
    """
    meter, gpu_bytes_before = _Meter(), Counter()
    if torch.cuda.is_initialized():  # else nothing is there yet
        for gpu in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(gpu)
            gpu_bytes_before[gpu] = torch.cuda.memory_allocated(gpu)
    calls = Counter()
    hook = register_module_forward_pre_hook(
        lambda module, _: calls.update([type(module).__name__])
    )
    try:
        with meter, saved_tensors_hooks(meter.hold, _Held.give_back):
            value = function()
    finally:
        hook.remove()
    meter.timeline.append(meter.live_bytes)
    peak_bytes = max(meter.timeline)
    if meter.gpus:
        peak_bytes = sum(
            torch.cuda.max_memory_allocated(gpu) - gpu_bytes_before[gpu]
            for gpu in meter.gpus
        )
    return Cost(
        value,
        peak_bytes,
        meter.peak_held_bytes,
        meter.flops,
        calls,
        meter.timeline,
        meter.saved,
    )


def median_seconds(function: Callable[[], Any], repeats: int = 5) -> float:
    """Median wall-clock time of `repeats` runs, after one that is not counted."""
    return medians_in_turns({"": function}, repeats)[""]


def medians_in_turns(
    functions: Mapping[str, Callable[[], Any]], repeats: int = 5
) -> dict[str, float]:
    """`median_seconds` of each, by name. They take turns, so that whatever else the
    machine does meets all of them alike."""
    seconds = {name: [] for name in functions}
    for _ in range(1 + repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def resident_bytes(function: Callable[[], Any]) -> int:
    """How much more memory the process had at the peak of a call than before it.

    As the operating system sees it, looked at every millisecond: scratch space inside an
    operation counts too. Not exact: memory comes in pages, what is there for less than a
    millisecond may go unseen, and whatever else this process does is counted.
    """
    process, is_over = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch():
        nonlocal peak
        while not is_over.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        function()
    finally:
        is_over.set()
        watcher.join()
    return peak - before


@dataclass(frozen=True)
class Traffic:
    """What interpreted kernels moved, under their masks: each load and store counts."""

    value: Any = field(compare=False)  # what the call returned
    read_bytes: int  # of floating-point numbers
    written_bytes: int
    index_bytes: int  # integers read: block tables, lengths, slots


def measure_traffic(function: Callable[[], Any]) -> Traffic:
    """Call `function`, and count what the kernels that it launches load and store.

    Atomics do not count. Where a mask keeps a number out and no `other` is given, a GPU
    may give anything; here it gives NaN, so that it shows. Raises RuntimeError where
    kernels are not interpreted: a GPU tells nobody.
    """
    try:
        import triton.language as tl  # here, for it is not everywhere
    except ModuleNotFoundError:
        tl = None
    if tl is None or os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("traffic: expected interpreted kernels, TRITON_INTERPRET=1")

    load, store, counts = tl.load, tl.store, Counter()

    def count(kind: str, pointer, mask):
        if mask is None or isinstance(mask, (bool, tl.constexpr)):
            is_all = mask is None or bool(mask)
            num_numbers = is_all * math.prod(int(size) for size in pointer.shape)
        else:
            pointer, mask = tl.broadcast(pointer, mask)
            num_numbers = int(tl.sum(mask.to(tl.int32)))
        number = pointer.dtype.scalar.element_ty
        kind = kind if number.is_floating() else f"{kind} index"
        counts[kind] += num_numbers * number.primitive_bitwidth // 8

    def counted_load(pointer, mask=None, other=None, *args, _semantic=None, **kwargs):
        count("read", pointer, mask)
        is_float = pointer.dtype.scalar.element_ty.is_floating()
        if mask is not None and other is None and is_float:
            other = float("nan")
        return load(pointer, mask, other, *args, _semantic=_semantic, **kwargs)

    def counted_store(pointer, value, mask=None, *args, _semantic=None, **kwargs):
        count("written", pointer, mask)
        return store(pointer, value, mask, *args, _semantic=_semantic, **kwargs)

    tl.load, tl.store = (
        tl.core.builtin(counted) for counted in (counted_load, counted_store)
    )
    try:
        value = function()
    finally:
        tl.load, tl.store = load, store
    return Traffic(value, counts["read"], counts["written"], counts["read index"])


def last_level_cache_bytes() -> int | None:
    """Of the processor's largest cache; None where the system is silent (not Linux)."""
    units, sizes = {"K": 2**10, "M": 2**20}, []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            size = path.read_text(encoding="utf-8").strip()  # 32768K
            sizes.append(int(size[:-1]) * units[size[-1]])
    return max(sizes, default=None)


def machine_facts() -> dict:
    """Where a measurement was made: plain values for a results json."""
    return {
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                line.split(":")[1].strip()
                for line in file
                if line.startswith("model name")
            )
    except (OSError, StopIteration):  # not Linux, or a processor that gives no name
        return platform.processor() or platform.machine()


class _Meter(TorchDispatchMode):
    """Keeps the number of bytes alive by hearing of every storage's birth and death."""

    def __init__(self):
        super().__init__()
        self.storages = {}  # address -> weak reference; forgets a storage when it dies
        self.sizes = {}  # address -> its bytes when last seen, and those that count
        self.new = {}  # address -> the operation that made it during the call
        self.live_bytes = 0
        self.timeline = []
        self.flops = Counter()
        self.holders = Counter()  # address -> how many times autograd holds it
        self.held_bytes = self.peak_held_bytes = 0
        self.saved = []
        self.gpus = set()  # by number, those on which something was made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():
            # Here an operation made of others comes whole: take it apart, as autograd
            # does everywhere else.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        # An output may share its storage with an input (a view, an in-place update):
        # meet the inputs first.
        if (
            func is not torch.ops.aten.lift_fresh.default
        ):  # torch.tensor(...) shows its new data as an input
            for tensor in _tensors((*args, *kwargs.values())):
                self._meet(tensor.untyped_storage())
        out = func(*args, **kwargs)
        for tensor in _tensors((out,)):
            self._meet(tensor.untyped_storage(), made_by=func.__name__.split(".")[0])
            if tensor.is_cuda:
                self.gpus.add(tensor.device.index)
        self.flops.update(_count_flops(func, args, out))
        self.timeline.append(self.live_bytes)
        return out

    def _meet(self, storage: torch.UntypedStorage, made_by: str | None = None):
        address = storage._cdata  # of the storage object: stays when the data moves
        num_bytes = 0 if storage.device.type == "meta" else storage.nbytes()
        if address not in self.storages:
            self.storages[address] = weakref.ref(storage, lambda _: self._forget(address))
            self.sizes[address] = (0 if made_by else num_bytes), 0
            if made_by:
                self.new[address] = made_by
        before, counted = self.sizes[address]
        if num_bytes != before:  # it is new, or `resize_` or `out=` let it grow
            self.sizes[address] = num_bytes, counted + num_bytes - before
            self.live_bytes += num_bytes - before

    def _forget(self, address: int):
        del self.storages[address]
        self.new.pop(address, None)
        self.live_bytes -= self.sizes.pop(address)[1]

    def hold(self, tensor: torch.Tensor) -> "_Held":
        return _Held(self, tensor)


class _Held:
    """A tensor in autograd's hands; its storage counts once, however often it is held."""

    def __init__(self, meter: _Meter, tensor: torch.Tensor):
        self.meter = meter
        self.tensor = tensor.detach()  # an output that held itself would never be freed
        self.version = tensor._version
        self.storage = tensor.untyped_storage()
        address, num_bytes = self.storage._cdata, self.storage.nbytes()
        self.is_counted = address in meter.new
        if self.is_counted:
            meter.holders[address] += 1
            if meter.holders[address] == 1:
                meter.saved.append((meter.new[address], tuple(tensor.shape), num_bytes))
                meter.held_bytes += num_bytes
                meter.peak_held_bytes = max(meter.peak_held_bytes, meter.held_bytes)

    def give_back(self) -> torch.Tensor:
        if self.tensor._version != self.version:  # torch's own check, which hooks replace
            raise RuntimeError(
                f"a tensor saved for the backward pass, {tuple(self.tensor.shape)}, has "
                f"been modified by an inplace operation"
            )
        return self.tensor

    def __del__(self):
        if self.is_counted:
            self.meter.holders[self.storage._cdata] -= 1
            if self.meter.holders[self.storage._cdata] == 0:
                self.meter.held_bytes -= self.storage.nbytes()


def _tensors(values: Iterable) -> Iterator[torch.Tensor]:
    """Those among the arguments of an operation, or in what it returns."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _count_flops(func, args: tuple, out: Any) -> dict[str, int]:
    """FLOPs of one operation, by kind.

    Only matrix products count, and in full: a causal mask saves nothing here.

    Products of plain matrices are projections: one weight for all tokens. Batched
    products are attention: each sequence and head brings its own matrices. (`einsum` and
    products with vectors do not fit this rule; the model has none.) The fused
    kernels do two such products forward, and five backward, since they compute the
    scores again rather than store them.
    """
    name = func._schema.name.removeprefix("aten::")
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        left = args[1] if "add" in name else args[0]
        return {
            "attention" if "bmm" in name else "projection": 2
            * out.numel()
            * left.shape[-1]
        }
    if name.startswith("_scaled_dot_product"):
        is_backward = "backward" in name
        # (B, H, T, D) and (B, G, S, D)
        q, k = args[1:3] if is_backward else args[0:2]
        return {"attention": (5 if is_backward else 2) * 2 * q.numel() * k.shape[-2]}
    return {}
