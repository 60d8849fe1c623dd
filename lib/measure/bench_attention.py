"""Chapter 5: how fast does attention of a decode step read its keys, and from where?

One new query per request reads all keys and values of its request, each once. If memory
is what it waits for, a step takes as long as a copy of as many bytes. Measured, for one
layer and random keys, is how near each way comes to that: over one dense piece
(contiguous), over a dense piece that is copied together from blocks first (gather), and
over shuffled blocks where they lie (in place). On a GPU torch's own attention over one
dense piece is there too (torch).

All ways are charged the same bytes, those that have to move at least: what a way moves
beside them, as gather does, makes it slower and not busier. `make bench` prints the
table.

Read lib/paged_attention.py and lib/paged_attention_triton.py before.
"""

import contextlib
import functools
import itertools
import math
import statistics
import time
import traceback
from collections.abc import Callable

import torch
import torch.nn.functional as F
from tqdm import tqdm

from lib import (
    has_gpu_for_kernels,
    interpreter,
    kv_cache,
    paged_attention,
    paged_attention_triton,
    paged_kv_cache,
)
from lib.config import ModelConfig

SIZES = {  # by device type: a GPU gets the heads of Llama 3 8B
    "cpu": {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64},
    "cuda": {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128},
}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # several times what a cache holds
MATMUL_ROWS = {"cpu": 1024, "cuda": 8192}
MAX_KV_BYTES = 2**28  # without a GPU
IMPLEMENTATIONS = {
    "cpu": {
        "contiguous": "attend_cached",
        "gather": "attend_paged",
        "in place": "torch twin",
    },
    "cuda": {
        "contiguous": "Triton kernel, blocks in order",
        "torch": "scaled_dot_product_attention",
        "gather": "index, then scaled_dot_product_attention",
        "in place": "Triton kernel",
    },
}
# What reading in place should reach on a GPU. Of the copy's bandwidth, by batch size (of
# so many requests and more), for contexts from GOAL_FROM tokens on:
GOALS_OF_COPY, GOAL_FROM = {1: 0.70, 8: 0.85}, 16384
GOAL_OF_DENSE = 0.95  # of the bandwidth of each way over one dense piece
DENSE = ("contiguous", "torch")
HOST_CONTEXTS = [128, 4096]  # tokens: short, for there the GPU may wait for the host
HOST_CALLS = 200  # in a row, fewer than a GPU lets wait before the host has to
GRAPH_CALLS, GRAPH_REPLAYS = 32, 20
CHECKED_LENS = [0, 1, 15, 16, 17, 300, 5000]  # tokens of the requests of `check_kernel`
# What rounding explains: the length of the difference by the length of the result.
CHECK_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def can_compile_kernels() -> bool:
    """Whether kernels run here as they are meant to, on a GPU and not interpreted."""
    is_there = has_gpu_for_kernels() and interpreter.HAS_TRITON
    return is_there and not interpreter.IS_INTERPRETED


def check_device(device: torch.device | str):
    """Raise ValueError for a device that says nothing of the kernel, or is not there."""
    if str(device) not in SIZES:
        raise ValueError(f"device: expected {' or '.join(SIZES)}, got {device}")
    if str(device) == "cuda" and not can_compile_kernels():
        raise ValueError(
            "device: expected cpu (without a GPU, with one of NVIDIA's before compute "
            "capability 8.0, without Triton, or with TRITON_INTERPRET=1 kernels are not "
            f"compiled), got {device}"
        )


def copy_bandwidth(device: torch.device | str) -> float:
    """Bytes per second that a copy of one large tensor reads and writes, median."""
    scratch = _scratch(device)
    return scratch.nbytes / cold_seconds(lambda: scratch[0].copy_(scratch[1]), device)


def matmul_flops_per_s(device: torch.device | str, dtype: torch.dtype) -> float:
    """FLOPs per second in the product of two large square matrices, median."""
    num_rows = MATMUL_ROWS[torch.device(device).type]
    x = torch.randn(num_rows, num_rows, device=device).to(dtype)
    return 2 * num_rows**3 / cold_seconds(lambda: x @ x, device)


def cold_seconds(
    step: Callable[[], torch.Tensor], device: torch.device | str, repeats: int = 5
) -> float:
    """Median seconds of a step that finds its tensors in memory, and not in a cache."""
    return statistics.median(_take_turns({"": step}, repeats, _scratch(device))[""])


def one_layer(num_heads: int, num_kv_heads: int, head_dim: int) -> ModelConfig:
    """A config for attention alone; ValueError for heads that do not fit each other."""
    return ModelConfig(
        vocab_size=1,
        num_layers=1,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        d_model=num_heads * head_dim,
        d_ff=1,
        max_seq_len=1,
    )


def attention_ways(
    config: ModelConfig,
    batch_size: int,
    context: int,
    block_size: int,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    uses_kernels: bool | None = None,
) -> dict[str, Callable[[], torch.Tensor]]:
    """By name, a function that attends once, for its outputs (B, H, D).

    All ways are over the same random queries, keys and values: `batch_size` requests of
    `context` tokens, once in dense pieces (B, S, G, D) and once in a pool of shuffled
    blocks. uses_kernels: as on a GPU, with Triton kernels and torch's fused attention;
    None: on a GPU only.
    """
    B, H, G, D = batch_size, config.num_heads, config.num_kv_heads, config.head_dim
    M = math.ceil(context / block_size)
    generator = torch.Generator(device).manual_seed(0)
    like = {"generator": generator, "dtype": dtype, "device": device}
    q = torch.randn(B, H, D, **like)
    dense = [torch.randn(B, M * block_size, G, D, **like) for _ in range(2)]

    order = torch.randperm(B * M, generator=generator, device=device)
    pool = [x.view(B * M, block_size, G, D)[order] for x in dense]
    block_tables = order.argsort().view(B, M)  # where each block has gone
    seq_lens = torch.full((B,), context, device=device)
    if uses_kernels is None:
        uses_kernels = torch.device(device).type == "cuda"
    make = _kernel_ways if uses_kernels else _twin_ways
    return make(q, dense, pool, block_tables, seq_lens)


class WrongResultError(RuntimeError):
    """A kernel gave something else than the plain way: its times would say nothing."""


def check_kernel(
    config: ModelConfig,
    block_size: int,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
):
    """Raise WrongResultError unless the kernel gives what gathering gives in fp32.

    Requests of CHECKED_LENS tokens, shuffled blocks; NaN where no token is, and blocks
    that are not there at the end of tables.
    """
    H, G, D, B = config.num_heads, config.num_kv_heads, config.head_dim, len(CHECKED_LENS)
    M = math.ceil(max(CHECKED_LENS) / block_size)
    generator = torch.Generator(device).manual_seed(0)
    like = {"generator": generator, "dtype": dtype, "device": device}
    q = torch.randn(B, H, D, **like)
    texts = torch.randn(2, B, M, block_size, G, D, **like)  # keys and values, in order
    seq_lens = torch.tensor(CHECKED_LENS, dtype=torch.int32, device=device)
    position = torch.arange(M * block_size, device=device).view(M, block_size)
    is_dead = position >= seq_lens.view(B, 1, 1)
    texts.masked_fill_(is_dead[..., None, None], math.nan)
    block_tables = torch.randperm(B * M, generator=generator, device=device).view(B, M)
    pool = torch.empty(2, B * M, block_size, G, D, dtype=dtype, device=device)
    pool[:, block_tables.flatten()] = texts.flatten(1, 2)
    block_tables.masked_fill_(is_dead[:, :, 0], -1)

    paged = (*pool, block_tables.int(), seq_lens)
    out, logsumexp = paged_attention_triton.paged_decode(q, *paged)
    fp32 = (x.float() for x in (q, *pool))
    expected, expected_logsumexp = paged_attention.paged_decode_gather(*fp32, *paged[2:])
    sizes = expected.norm(dim=(1, 2)).clamp(min=1e-9)  # without keys it is 0
    off = (out.float() - expected).norm(dim=(1, 2)) / sizes
    off_logsumexp = (logsumexp - expected_logsumexp).abs()
    is_same = logsumexp == expected_logsumexp  # -inf, whose difference is NaN
    off_logsumexp = off_logsumexp.masked_fill(is_same, 0).amax(dim=1)
    tolerance = CHECK_TOLERANCES[dtype]
    for name, values in (("out", off), ("logsumexp", off_logsumexp)):
        for seq_len, value in zip(CHECKED_LENS, values.tolist()):
            if not value <= tolerance:  # NaN is off too
                raise WrongResultError(
                    f"the kernel is wrong on {device}, in {dtype}, for a request of "
                    f"{seq_len} tokens: expected {name} at most {tolerance} off what "
                    f"gathering gives, got {value:.3g}"
                )


def bench_attention(
    contexts: list[int],
    batch_sizes: list[int],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    block_size: int = 16,
    repeats: int,
    progress: tqdm | None = None,
    max_bytes: int | None = None,
    copy_bytes_per_s: float | None = None,
    errors: list[dict] | None = None,
) -> list[dict]:
    """A row for each batch size, context and way: its median seconds, and GB/s.

    device: "cpu" or "cuda". Heads that are None are those of SIZES. GB/s are those of
    `paged_attention.bytes_moved` for one layer without a gather, whatever the way does.
    share_of_copy is their share of copy_bytes_per_s, measured first if None.

    Left out is what has more than max_bytes of keys and values; None: a quarter of what
    a GPU has free (they are there up to three times), MAX_KV_BYTES elsewhere.

    errors: a list that takes what goes wrong, a row for each way and case, in the place
    of raising it. A way that failed has no row in what is returned.

    The ways take turns, each `repeats` times after one that does not count. Before each
    a large copy and a long read drive its keys out of the caches, as other layers' keys
    do in a model. A GPU is still busy with them while Python launches what follows, so
    its clock holds the kernels and the gaps between them, and not the wait for the first
    one. Elsewhere what torch spends on each call is in the figures too.
    """
    check_device(device)
    heads = (num_heads, num_kv_heads, head_dim)
    defaults = SIZES[str(device)].values()
    config = one_layer(*(d if size is None else size for size, d in zip(heads, defaults)))
    if copy_bytes_per_s is None:
        copy_bytes_per_s = copy_bandwidth(device)

    scratch, rows = _scratch(device), []
    for batch_size, context in itertools.product(batch_sizes, contexts):
        note = functools.partial(_noted, errors, batch_size, context)
        with note("all ways"):
            num_tokens = batch_size * math.ceil(context / block_size) * block_size
            kv_bytes = kv_cache.kv_cache_bytes(config, num_tokens, dtype.itemsize)
            if kv_bytes <= (_max_kv_bytes(device) if max_bytes is None else max_bytes):
                sizes = (config, batch_size, context, block_size)
                ways = attention_ways(*sizes, device=device, dtype=dtype)
                seconds = _take_turns(ways, repeats, scratch, note)
                del ways  # and its keys, before the next are made
                num_bytes = paged_attention.bytes_moved(
                    config, torch.full((batch_size,), context), dtype.itemsize
                )
                for name, values in seconds.items():
                    median_seconds = statistics.median(values)
                    bytes_per_s = num_bytes / median_seconds
                    row = {
                        "name": name,
                        "implementation": IMPLEMENTATIONS[str(device)][name],
                        "batch_size": batch_size,
                        "context": context,
                        "median_seconds": median_seconds,
                        "gb_per_s": bytes_per_s / 1e9,
                        "share_of_copy": bytes_per_s / copy_bytes_per_s,
                    }
                    rows.append(row)
        if progress is not None:
            progress.update()
    return rows


def bench_host(
    config: ModelConfig,
    batch_sizes: list[int],
    block_size: int,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    progress: tqdm | None = None,
    errors: list[dict] | None = None,
) -> list[dict]:
    """A row for each batch size and context of HOST_CONTEXTS: `call_times` of the kernel
    in place. errors: as in `bench_attention`."""
    rows = []
    for batch_size, context in itertools.product(batch_sizes, HOST_CONTEXTS):
        with _noted(errors, batch_size, context, "host"):
            sizes = (config, batch_size, context, block_size)
            ways = attention_ways(*sizes, device=device, dtype=dtype, uses_kernels=True)
            times = call_times(ways["in place"])
            rows.append({"batch_size": batch_size, "context": context, **times})
        if progress is not None:
            progress.update()
    return rows


def call_times(step: Callable[[], torch.Tensor]) -> dict[str, float]:
    """Microseconds per call of a step on a GPU, of many calls in a row.

    host_us: until Python has launched it. done_us: until the GPU is done, for which
    nobody waits between the calls. graph_us: until the GPU is done with it as one of
    GRAPH_CALLS in a CUDA graph, which is launched as a whole. Raises WrongResultError if
    the graph gives something else.
    """
    # As torch demands before a capture: calls on a side stream, the first of which
    # compiles. https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            expected = step()
    torch.cuda.current_stream().wait_stream(side)
    step()  # and once where it is timed: each stream has its own memory
    launched, done = _seconds_in_a_row(step, HOST_CALLS)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(GRAPH_CALLS):
            out = step()
    out.zero_()  # a capture computes nothing: what is there afterwards is a replay's
    graph.replay()
    if not torch.allclose(out, expected, rtol=0.01, atol=1e-5):
        raise WrongResultError("in a CUDA graph the step gives something else than alone")
    graph_done = _seconds_in_a_row(graph.replay, GRAPH_REPLAYS)[1]
    return {
        "host_us": 1e6 * launched / HOST_CALLS,
        "done_us": 1e6 * done / HOST_CALLS,
        "graph_us": 1e6 * graph_done / (GRAPH_REPLAYS * GRAPH_CALLS),
    }


def by_case(rows: list[dict]) -> dict[tuple[int, int], dict[str, dict]]:
    """Rows of `bench_attention` by (batch size, context), and there by name."""
    cases = {}
    for row in rows:
        cases.setdefault((row["batch_size"], row["context"]), {})[row["name"]] = row
    return cases


def table_lines(rows: list[dict]) -> list[str]:
    """A line for each batch size and context: GB/s and share of a copy, of each way."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    header = "batch context" + "".join(f"{name:>18}" for name in names)
    lines = [header + "   in place / contiguous"]
    for (batch_size, context), ways in by_case(rows).items():
        line = f"{batch_size:5} {context:7}"
        for name in names:
            cell = "-"  # it failed
            if name in ways:
                share = 100 * ways[name]["share_of_copy"]
                cell = f"{ways[name]['gb_per_s']:9.2f} ({share:4.0f} %)"
            line += f"{cell:>18}"
        has_both = {"in place", "contiguous"} <= ways.keys()
        ratio = f"{_in_place_over(ways, 'contiguous'):.2f}" if has_both else "-"
        lines.append(f"{line} {ratio:>23}")
    return lines


def goals(rows: list[dict]) -> list[dict]:
    """What reading in place should reach on a GPU in each case, and whether it does.

    A row for each batch size, context, and what it is compared with ("of"): the ways over
    one dense piece, and for long texts a copy. share: its bandwidth, divided by theirs.
    """
    judged = []
    for (batch_size, context), ways in by_case(rows).items():
        if "in place" not in ways:
            continue
        shares = {
            name: (_in_place_over(ways, name), GOAL_OF_DENSE)
            for name in DENSE
            if name in ways
        }
        if context >= GOAL_FROM:
            goal = max(goal for size, goal in GOALS_OF_COPY.items() if size <= batch_size)
            shares["a copy"] = ways["in place"]["share_of_copy"], goal
        judged += [
            {
                "batch_size": batch_size,
                "context": context,
                "of": of,
                "share": share,
                "goal": goal,
                "is_met": share >= goal,
            }
            for of, (share, goal) in shares.items()
        ]
    return judged


def goal_lines(judged: list[dict]) -> list[str]:
    """A line for each batch size and context in what `goals` returned."""
    parts = {}
    for row in judged:
        verdict = f"goal {row['goal']:.2f} {'met' if row['is_met'] else 'missed'}"
        part = f"{row['share']:.3f} of {row['of']}, {verdict}"
        parts.setdefault((row["batch_size"], row["context"]), []).append(part)
    return [
        f"batch {batch_size}, context {context}: {'; '.join(of_case)}"
        for (batch_size, context), of_case in parts.items()
    ]


def host_lines(rows: list[dict]) -> list[str]:
    """A line for each row of `bench_host`, under a header."""
    lines = ["batch context      host until done  in a graph"]
    for row in rows:
        where = f"{row['batch_size']:5} {row['context']:7}"
        line = f"{where} {row['host_us']:9.1f} {row['done_us']:10.1f}"
        lines.append(f"{line} {row['graph_us']:11.1f}")
    return lines


def error_lines(errors: list[dict]) -> list[str]:
    """A line for each way that failed: where, and the first line of what it said."""
    return [
        f"batch {row['batch_size']}, context {row['context']}, {row['name']}: "
        + row["error"].splitlines()[0]
        for row in errors
    ]


def _twin_ways(
    q: torch.Tensor,
    dense: list[torch.Tensor],
    pool: list[torch.Tensor],
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
) -> dict[str, Callable[[], torch.Tensor]]:
    ones = torch.ones_like(seq_lens)
    paged = (q, *pool, block_tables, seq_lens)
    return {
        "contiguous": lambda: kv_cache.attend_cached(q, *dense, seq_lens, ones),
        "gather": lambda: paged_kv_cache.attend_paged(*paged, ones),
        "in place": lambda: paged_attention.paged_decode_online(*paged)[0],
    }


def _kernel_ways(
    q: torch.Tensor,
    dense: list[torch.Tensor],
    pool: list[torch.Tensor],
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
) -> dict[str, Callable[[], torch.Tensor]]:
    S, lens, tables = int(seq_lens[0]), seq_lens.int(), block_tables.int()
    # The same kernel over the dense pieces, cut in blocks: the order alone differs.
    in_order = torch.arange(tables.numel(), dtype=torch.int32, device=q.device)
    in_order = in_order.view_as(tables)
    blocks = [x.view_as(cache) for x, cache in zip(dense, pool)]
    decode = paged_attention_triton.paged_decode

    def attend_dense(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x[:, :S].transpose(1, 2) for x in (k, v))
        out = F.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True)
        return out.squeeze(2)

    return {
        "contiguous": lambda: decode(q, *blocks, in_order, lens)[0],
        "torch": lambda: attend_dense(*dense),
        "gather": lambda: attend_dense(*(x[block_tables].flatten(1, 2) for x in pool)),
        "in place": lambda: decode(q, *pool, tables, lens)[0],
    }


def _take_turns(
    steps: dict[str, Callable[[], torch.Tensor]],
    repeats: int,
    scratch: torch.Tensor,
    note: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> dict[str, list[float]]:
    """Seconds of each step, `repeats` of them after one that does not count.

    note: a context for a step's turn, by name; a step whose error it swallows has no
    further turn, and no seconds.
    """
    seconds = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, values in list(seconds.items()):
            del seconds[name]  # and back, if all goes well
            with note(name):
                seconds[name] = [*values, _seconds(steps[name], scratch)]
    # The first warms up, and compiles.
    return {name: values[1:] for name, values in seconds.items()}


@contextlib.contextmanager
def _noted(errors: list[dict] | None, batch_size: int, context: int, name: str):
    """Append what goes wrong inside to `errors`; raise it if that is None."""
    try:
        yield
    except Exception as error:
        if errors is None:
            raise
        errors.append(
            {
                "name": name,
                "batch_size": batch_size,
                "context": context,
                "error": f"{type(error).__name__}: {error}",
                "traceback": "".join(traceback.format_exception(error)),
            }
        )


def _seconds_in_a_row(call: Callable, times: int) -> tuple[float, float]:
    """Of all calls: until the host has launched the last, and until the GPU is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        call()
    launched = time.perf_counter()
    torch.cuda.synchronize()
    return launched - start, time.perf_counter() - start


def _seconds(step: Callable[[], torch.Tensor], scratch: torch.Tensor) -> float:
    """Of one step whose tensors are in no cache.

    A copy inside `scratch` has driven them out. What it wrote is still in the cache and
    would go to memory while the step is timed, so a long read drives that out before.
    """
    scratch[0].copy_(scratch[1])
    scratch[1].sum()
    if scratch.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000  # it says milliseconds
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _scratch(device: torch.device | str) -> torch.Tensor:
    """Two large rows to copy between. Ones: untouched zeros may all be one page."""
    num_bytes = COPY_BYTES[torch.device(device).type]
    return torch.ones(2, num_bytes // 4, dtype=torch.float32, device=device)


def _max_kv_bytes(device: torch.device | str) -> int:
    if torch.device(device).type != "cuda":
        return MAX_KV_BYTES
    torch.cuda.empty_cache()  # what torch keeps for later is free for us
    return torch.cuda.mem_get_info(device)[0] // 4


def _in_place_over(ways: dict[str, dict], name: str) -> float:
    return ways["in place"]["gb_per_s"] / ways[name]["gb_per_s"]
