import contextlib
import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers import TOLERANCES

from lib import interpreter, paged_attention, paged_attention_triton
from lib.measure import bench_attention

HEADS = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 16}
SMALL = {"device": "cpu", "dtype": torch.float32, "repeats": 2}
ODD = (bench_attention.one_layer(**HEADS), 3, 33, 8)  # a last block with one token
needs_triton = pytest.mark.skipif(
    not interpreter.HAS_TRITON, reason="kernels need Triton"
)


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    monkeypatch.setattr(bench_attention, "COPY_BYTES", {"cpu": 2**12, "cuda": 2**30})


class Progress:
    num_updates = 0

    def update(self):
        self.num_updates += 1


def ways_agree(ways, tolerance):
    outs = {name: way() for name, way in ways.items()}
    for out in outs.values():
        assert out.shape == (3, 8, 16) and out.abs().max() > 0.1
        expected = outs["contiguous"]
        torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    return outs


def test_all_ways_give_the_same():
    ways = bench_attention.attention_ways(*ODD, device="cpu", dtype=torch.float32)
    assert list(ways) == ["contiguous", "gather", "in place"]
    ways_agree(ways, TOLERANCES[torch.float32])


@needs_triton
def test_all_ways_of_a_gpu_give_what_their_twins_give():
    like = {"device": "cpu", "dtype": torch.float32}
    outs = []
    for uses_kernels in (False, True):
        ways = bench_attention.attention_ways(*ODD, **like, uses_kernels=uses_kernels)
        outs.append(ways_agree(ways, TOLERANCES[torch.float32]))
    assert list(outs[1]) == ["contiguous", "torch", "gather", "in place"]
    torch.testing.assert_close(outs[0]["in place"], outs[1]["in place"])


def check_small_kernel(monkeypatch):
    monkeypatch.setattr(bench_attention, "CHECKED_LENS", [0, 1, 7, 8, 9, 70])
    config = bench_attention.one_layer(**HEADS)
    bench_attention.check_kernel(config, 8, device="cpu", dtype=torch.float32)


@needs_triton
def test_a_right_kernel_passes_its_check(monkeypatch):
    check_small_kernel(monkeypatch)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda out, logsumexp: (out + 1e-3, logsumexp), "0 tokens: expected out"),
        (lambda out, logsumexp: (out * torch.nan, logsumexp), "0 tokens: expected out"),
        (lambda out, logsumexp: (0.99 * out, logsumexp), "1 tokens: .* got 0.01"),
        (lambda out, logsumexp: (out, logsumexp + 1), "1 tokens: expected logsumexp"),
        (
            lambda out, logsumexp: (out, logsumexp.nan_to_num(neginf=-9.0)),
            "0 tokens: expected logsumexp at most 0.0001 off .*, got inf",
        ),
    ],
)
def test_a_wrong_kernel_is_refused(monkeypatch, wrong, message):
    decode = paged_attention.paged_decode_gather
    monkeypatch.setattr(
        paged_attention_triton, "paged_decode", lambda *args: wrong(*decode(*args))
    )
    with pytest.raises(bench_attention.WrongResultError, match=message):
        check_small_kernel(monkeypatch)


def test_a_kernel_that_reads_behind_a_text_is_refused(monkeypatch):
    def reads_one_more(q, k_cache, v_cache, block_tables, seq_lens):
        lens = seq_lens + (seq_lens % 8 > 0)
        return paged_attention.paged_decode_gather(
            q, k_cache, v_cache, block_tables, lens
        )

    monkeypatch.setattr(paged_attention_triton, "paged_decode", reads_one_more)
    with pytest.raises(bench_attention.WrongResultError, match="1 tokens: .* got nan"):
        check_small_kernel(monkeypatch)


def spied_tables(monkeypatch, module, name, uses_kernels):
    """The block tables that `module.name` was called with, way after way."""
    tables, function = [], getattr(module, name)

    def spy(q, k_cache, v_cache, block_tables, seq_lens):
        tables.append(block_tables.flatten().tolist())
        assert seq_lens.tolist() == [33, 33, 33]
        return function(q, k_cache, v_cache, block_tables, seq_lens)

    monkeypatch.setattr(module, name, spy)
    ways = bench_attention.attention_ways(
        *ODD, device="cpu", dtype=torch.float32, uses_kernels=uses_kernels
    )
    for way in ways.values():
        way()
    return tables


def test_blocks_lie_in_another_order_than_the_text(monkeypatch):
    (table,) = spied_tables(monkeypatch, paged_attention, "paged_decode_online", False)
    assert sorted(table) == list(range(15)) and table != sorted(table)


@needs_triton
def test_the_contiguous_kernel_reads_blocks_in_order(monkeypatch):
    name = "paged_decode"
    contiguous, in_place = spied_tables(monkeypatch, paged_attention_triton, name, True)
    assert contiguous == list(range(15)) and in_place != contiguous
    assert sorted(in_place) == contiguous


def test_rows_say_how_many_bytes_per_second_and_how_near_to_a_copy():
    progress = Progress()
    rows = bench_attention.bench_attention(
        [5, 33], [1, 3], **SMALL, **HEADS, progress=progress, copy_bytes_per_s=2e9
    )
    assert progress.num_updates == 4
    cases = [(row["batch_size"], row["context"], row["name"]) for row in rows]
    names = ["contiguous", "gather", "in place"]
    assert cases == [(B, S, name) for B in (1, 3) for S in (5, 33) for name in names]
    implementations = ["attend_cached", "attend_paged", "torch twin"]
    assert [row["implementation"] for row in rows[:3]] == implementations
    for row in rows:
        assert list(row)[-3:] == ["median_seconds", "gb_per_s", "share_of_copy"]
        B, S = row["batch_size"], row["context"]
        num_bytes = 4 * (2 * B * 8 * 16 + 2 * B * S * 2 * 16)  # q, out, k, v
        num_gb = row["gb_per_s"] * row["median_seconds"]
        assert num_gb == pytest.approx(num_bytes / 1e9)
        assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / 2)


def test_rows_hold_the_median_of_their_own_way(monkeypatch):
    seconds = {
        "contiguous": [1.0, 2.0, 9.0],
        "gather": [9.0, 4.0, 3.0],
        "in place": [7.0],
    }
    monkeypatch.setattr(bench_attention, "_take_turns", lambda *args: seconds)
    rows = bench_attention.bench_attention([5], [1], **SMALL, copy_bytes_per_s=1.0)
    medians = [(row["name"], row["median_seconds"]) for row in rows]
    assert medians == [("contiguous", 2), ("gather", 4), ("in place", 7)]


def test_heads_not_given_are_those_of_the_device():
    for given, heads in (({}, (8, 2, 64)), ({"head_dim": 32}, (8, 2, 32))):
        row = bench_attention.bench_attention([5], [1], **SMALL, **given)[0]
        H, G, D = heads
        num_gb = 4 * (2 * H * D + 2 * 5 * G * D) / 1e9
        assert row["gb_per_s"] * row["median_seconds"] == pytest.approx(num_gb)


def test_the_copy_is_measured_where_nobody_did(monkeypatch):
    monkeypatch.setattr(bench_attention, "copy_bandwidth", lambda device: 4e9)
    row = bench_attention.bench_attention([5], [1], **SMALL)[0]
    assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / 4)


def test_what_does_not_fit_is_left_out():
    num_bytes = 2 * 3 * 40 * 2 * 16 * 4  # keys and values of 3 requests of 5 full blocks
    for max_bytes, batch_sizes in ((num_bytes, [1, 3]), (num_bytes - 1, [1])):
        progress = Progress()
        rows = bench_attention.bench_attention(
            [33],
            [1, 3],
            **SMALL,
            **HEADS,
            block_size=8,
            max_bytes=max_bytes,
            progress=progress,
        )
        assert [B for B, _ in bench_attention.by_case(rows)] == batch_sizes
        assert progress.num_updates == 2
    assert bench_attention.bench_attention([2**40], [1], **SMALL) == []


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 16 GiB")


def test_a_way_that_fails_is_noted_and_the_others_are_measured(monkeypatch):
    decode = paged_attention.paged_decode_online

    def fails_for_two(q, *args):
        return out_of_memory() if len(q) == 2 else decode(q, *args)

    monkeypatch.setattr(paged_attention, "paged_decode_online", fails_for_two)
    errors, progress = [], Progress()
    rows = bench_attention.bench_attention(
        [5], [1, 2, 3], **SMALL, **HEADS, errors=errors, progress=progress
    )
    cases = bench_attention.by_case(rows)
    assert {B: list(ways) for (B, _), ways in cases.items()} == {
        1: ["contiguous", "gather", "in place"],
        2: ["contiguous", "gather"],
        3: ["contiguous", "gather", "in place"],
    }
    assert progress.num_updates == 3
    (error,) = errors
    assert "in fails_for_two" in error.pop("traceback")
    message = "OutOfMemoryError: CUDA out of memory.\nTried to allocate 16 GiB"
    where = {"name": "in place", "batch_size": 2, "context": 5}
    assert error == {**where, "error": message}
    assert bench_attention.error_lines(errors) == [
        "batch 2, context 5, in place: OutOfMemoryError: CUDA out of memory."
    ]


def test_a_way_that_fails_late_loses_its_own_row_only():
    turns, noted = iter(range(9)), []

    def fails_late():
        if next(turns) == 2:
            out_of_memory()

    note = functools.partial(bench_attention._noted, noted, 1, 5)
    steps = {"late": fails_late, "other": lambda: None}
    seconds = bench_attention._take_turns(steps, 4, torch.ones(2, 4), note)
    assert {name: len(values) for name, values in seconds.items()} == {"other": 4}
    assert [error["name"] for error in noted] == ["late"] and next(turns) == 3


def test_a_case_whose_keys_cannot_be_made_is_noted(monkeypatch):
    make, errors, progress = bench_attention.attention_ways, [], Progress()

    def fails_for_33(config, batch_size, context, *args, **kwargs):
        fails = context == 33
        return (out_of_memory if fails else make)(
            config, batch_size, context, *args, **kwargs
        )

    monkeypatch.setattr(bench_attention, "attention_ways", fails_for_33)
    rows = bench_attention.bench_attention(
        [33, 5], [1], **SMALL, **HEADS, errors=errors, progress=progress
    )
    assert [row["context"] for row in rows] == [5, 5, 5] and progress.num_updates == 2
    assert [(row["name"], row["context"]) for row in errors] == [("all ways", 33)]


def test_errors_that_nobody_collects_are_raised(monkeypatch):
    monkeypatch.setattr(paged_attention, "paged_decode_online", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        bench_attention.bench_attention([5], [1], **SMALL, **HEADS)


def test_a_gpu_takes_a_quarter_of_what_is_free(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda _: calls.append("ask") or (8, 9)
    )
    assert bench_attention._max_kv_bytes("cuda") == 2
    assert calls == ["empty", "ask"]
    assert bench_attention._max_kv_bytes("cpu") == 256 * 2**20


def test_a_copy_counts_what_it_reads_and_writes(monkeypatch):
    take_turns, seconds = bench_attention._take_turns, [1.0, 2.0, 9.0]

    def two_seconds(steps, repeats, scratch):
        take_turns(steps, 1, scratch)
        return dict.fromkeys(steps, seconds)

    monkeypatch.setattr(bench_attention, "_take_turns", two_seconds)
    monkeypatch.setattr(bench_attention, "MATMUL_ROWS", {"cpu": 10})
    assert bench_attention.copy_bandwidth("cpu") == 2 * 2**12 / 2
    assert bench_attention.matmul_flops_per_s("cpu", torch.float32) == 2 * 10**3 / 2


def test_ways_take_turns_and_the_first_round_does_not_count():
    rounds = []
    steps = {name: lambda name=name: rounds.append(name) for name in "abc"}
    seconds = bench_attention._take_turns(steps, 2, torch.ones(2, 4))
    assert "".join(rounds) == "abcabcabc"
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys(
        "abc", 2
    )


class Scratch:
    """Stands in for a tensor, on a GPU."""

    is_cuda = True

    def __init__(self, calls):
        self.calls = calls

    def __getitem__(self, i):
        return self

    def copy_(self, _):
        self.calls.append("copy")

    def sum(self):
        self.calls.append("read")


def test_a_gpu_measures_itself_after_a_copy_and_a_read(monkeypatch):
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append(self)

        def synchronize(self):
            calls.append("wait")

        def elapsed_time(self, end):
            assert calls == ["copy", "read", self, "step", end, "wait"]
            return 1500.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    step = lambda: calls.append("step")  # noqa: E731
    assert bench_attention._seconds(step, Scratch(calls)) == 1.5


class FakeGPU:
    """Stands in for torch.cuda: a clock that calls, replays and waits move on.

    Calls that are launched take no time on it before somebody waits: `late` seconds.
    """

    def __init__(self, monkeypatch):
        self.events, self.now, self.late, self.captured = [], 0.0, 0.0, None
        self.streams = ["main"]
        monkeypatch.setattr(torch.cuda, "Stream", lambda: self.stream("side"))
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda: self.stream(self.streams[-1])
        )
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        monkeypatch.setattr(bench_attention.time, "perf_counter", lambda: self.now)

    def stream(self, name):
        def wait(other):
            self.events.append(f"{name} waits for {other.name}")

        return SimpleNamespace(name=name, wait_stream=wait)

    @contextlib.contextmanager
    def on(self, stream):
        self.streams.append(stream.name)
        yield
        self.streams.pop()

    @contextlib.contextmanager
    def capture(self, graph, stream):
        assert graph is self
        self.captured = []
        with self.on(stream):
            yield
        self.events.append(f"captured {len(self.captured)}")
        self.captured, self.graph = None, self.captured

    def step(self):
        out = torch.full((3,), 5.0)
        if self.captured is not None:  # computes nothing, and finds an old result there
            self.captured.append(out)
            return out
        self.events.append(f"call on {self.streams[-1]}")
        self.now, self.late = self.now + 2e-6, self.late + 3e-6
        return out

    def replay(self):
        self.events.append("replay")
        self.now, self.late = self.now + 1e-6, self.late + 31e-6
        for out in self.graph:
            out.fill_(5)

    def synchronize(self):
        self.events.append("synchronize")
        self.now, self.late = self.now + self.late, 0.0


def test_calls_are_timed_until_launched_until_done_and_in_a_graph(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    times = bench_attention.call_times(gpu.step)
    us = {"host_us": 2, "done_us": 5, "graph_us": 1}  # (1 + 31) per 32 calls
    assert times == {name: pytest.approx(value) for name, value in us.items()}
    assert [
        (event, len(list(same))) for event, same in itertools.groupby(gpu.events)
    ] == [
        ("side waits for main", 1),
        ("call on side", 3),
        ("main waits for side", 1),
        ("call on main", 1),
        ("synchronize", 1),
        ("call on main", 200),
        ("synchronize", 1),
        ("captured 32", 1),
        ("replay", 1),
        ("synchronize", 1),
        ("replay", 20),
        ("synchronize", 1),
    ]


def test_a_graph_that_computes_nothing_is_refused(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    gpu.replay = lambda: None
    with pytest.raises(bench_attention.WrongResultError, match="in a CUDA graph"):
        bench_attention.call_times(gpu.step)


def bench_small_host(**options):
    config = bench_attention.one_layer(**HEADS)
    like = {"device": "cpu", "dtype": torch.float32}
    return bench_attention.bench_host(config, [1, 3], 8, **like, **options)


@needs_triton
def test_the_host_is_timed_over_blocks_in_place(monkeypatch):
    shapes, progress = [], Progress()
    times = {"host_us": 1.0, "done_us": 2.0, "graph_us": 3.0}
    monkeypatch.setattr(bench_attention, "HOST_CONTEXTS", [33, 65])
    monkeypatch.setattr(
        bench_attention, "call_times", lambda step: shapes.append(step().shape) or times
    )
    decode = paged_attention_triton.paged_decode

    def spy(q, k_cache, v_cache, block_tables, seq_lens):
        assert block_tables.flatten().tolist() != list(range(block_tables.numel()))
        shapes.append((len(q), int(seq_lens[0])))
        return decode(q, k_cache, v_cache, block_tables, seq_lens)

    monkeypatch.setattr(paged_attention_triton, "paged_decode", spy)
    rows = bench_small_host(progress=progress)
    cases = [(1, 33), (1, 65), (3, 33), (3, 65)]
    assert rows == [{"batch_size": B, "context": S, **times} for B, S in cases]
    assert shapes[::2] == cases and shapes[1] == (1, 8, 16) and progress.num_updates == 4
    lines = [" ".join(line.split()) for line in bench_attention.host_lines(rows)]
    assert lines[:2] == ["batch context host until done in a graph", "1 33 1.0 2.0 3.0"]


def test_a_capture_that_fails_is_noted(monkeypatch):
    times = iter([{"host_us": 1.0}, None, {"host_us": 3.0}, {"host_us": 4.0}])
    monkeypatch.setattr(
        bench_attention, "call_times", lambda step: next(times) or out_of_memory()
    )
    monkeypatch.setattr(bench_attention, "HOST_CONTEXTS", [33, 65])
    errors, progress = [], Progress()
    rows = bench_small_host(errors=errors, progress=progress)
    assert [row["host_us"] for row in rows] == [1, 3, 4] and progress.num_updates == 4
    (error,) = errors
    assert (error["name"], error["batch_size"], error["context"]) == ("host", 1, 65)


def rows_of(batch_size, context, **gb_per_s):
    """Rows with these GB/s by name, where a copy makes 100."""
    return [
        {
            "name": name.replace("_", " "),
            "batch_size": batch_size,
            "context": context,
            "gb_per_s": value,
            "share_of_copy": value / 100,
        }
        for name, value in gb_per_s.items()
    ]


def test_the_table_has_a_line_for_each_batch_and_context():
    rows = rows_of(1, 128, contiguous=50.0, gather=20.0, in_place=40.0)
    rows += rows_of(64, 65536, contiguous=80.0, gather=30.0, in_place=84.0)
    lines = [" ".join(line.split()) for line in bench_attention.table_lines(rows)]
    assert lines == [
        "batch context contiguous gather in place in place / contiguous",
        "1 128 50.00 ( 50 %) 20.00 ( 20 %) 40.00 ( 40 %) 0.80",
        "64 65536 80.00 ( 80 %) 30.00 ( 30 %) 84.00 ( 84 %) 1.05",
    ]


def test_a_way_that_failed_has_no_cell():
    rows = rows_of(1, 128, contiguous=50.0, torch=60.0, in_place=40.0)
    rows += rows_of(8, 128, in_place=45.0) + rows_of(8, 512, contiguous=55.0)
    lines = [" ".join(line.split()) for line in bench_attention.table_lines(rows)]
    assert lines[1:] == [
        "1 128 50.00 ( 50 %) 60.00 ( 60 %) 40.00 ( 40 %) 0.80",
        "8 128 - - 45.00 ( 45 %) -",
        "8 512 55.00 ( 55 %) - - -",
    ]
    assert len({len(line) for line in bench_attention.table_lines(rows)}) == 1


@pytest.mark.parametrize(
    "batch_size, context, in_place, verdicts",
    [
        (8, 16383, 80.0, ["0.941 of contiguous, goal 0.95 missed"]),
        (8, 16383, 80.75, ["0.950 of contiguous, goal 0.95 met"]),
        (8, 16384, 84.9, ["0.999 of contiguous, goal 0.95 met", "0.849", "missed"]),
        (8, 16384, 85.0, ["1.000 of contiguous", "0.850 of a copy, goal 0.85 met"]),
        (64, 65536, 84.9, ["0.849 of a copy, goal 0.85 missed"]),
        (1, 16384, 70.0, ["0.824 of contiguous", "0.700 of a copy, goal 0.70 met"]),
        (1, 16384, 69.9, ["0.699 of a copy, goal 0.70 missed"]),
    ],
)
def test_goals_are_judged_one_by_one(batch_size, context, in_place, verdicts):
    rows = rows_of(batch_size, context, contiguous=85.0, in_place=in_place)
    judged = bench_attention.goals(rows)
    of = ["contiguous", "a copy"] if context >= 16384 else ["contiguous"]
    assert [row["of"] for row in judged] == of
    assert all(row["is_met"] == (row["share"] >= row["goal"]) for row in judged)
    (line,) = bench_attention.goal_lines(judged)
    assert line.startswith(f"batch {batch_size}, context {context}: ")
    assert all(verdict in line for verdict in verdicts)


def test_torch_sets_a_goal_where_it_is_there():
    rows = rows_of(8, 128, contiguous=80.0, torch=90.0, gather=99.0, in_place=81.0)
    rows += rows_of(8, 512, contiguous=80.0, torch=90.0)  # in place failed
    rows += rows_of(8, 1024, torch=50.0, in_place=51.0)  # contiguous failed
    lines = bench_attention.goal_lines(bench_attention.goals(rows))
    assert lines == [
        "batch 8, context 128: 1.012 of contiguous, goal 0.95 met; "
        "0.900 of torch, goal 0.95 missed",
        "batch 8, context 1024: 1.020 of torch, goal 0.95 met",
    ]


def test_devices_that_time_nothing_are_refused(monkeypatch):
    bench_attention.check_device("cpu")
    with pytest.raises(ValueError, match="expected cpu or cuda, got mps"):
        bench_attention.bench_attention([5], [1], **{**SMALL, "device": "mps"})
    monkeypatch.setattr(interpreter, "IS_INTERPRETED", True)
    with pytest.raises(ValueError, match="expected cpu .*, got cuda"):
        bench_attention.bench_attention([5], [1], **{**SMALL, "device": "cuda"})


@pytest.mark.parametrize(
    "changes, can_compile",
    [
        ({}, True),
        ({"is_available": False}, False),
        ({"HAS_TRITON": False}, False),
        ({"IS_INTERPRETED": True}, False),
        ({"capability": (7, 5)}, False),  # a T4
        ({"capability": (8, 0)}, True),
        ({"capability": (7, 5), "hip": "6.4"}, True),  # of AMD it says something else
    ],
)
def test_kernels_are_compiled_with_triton_and_a_gpu_that_is_new_enough_only(
    monkeypatch, changes, can_compile
):
    machine = {"is_available": True, "capability": (9, 0), "hip": None}
    machine |= {"HAS_TRITON": True, "IS_INTERPRETED": False, **changes}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine["is_available"])
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda: machine["capability"]
    )
    monkeypatch.setattr(torch.version, "hip", machine["hip"])
    for name in ("HAS_TRITON", "IS_INTERPRETED"):
        monkeypatch.setattr(interpreter, name, machine[name])
    assert bench_attention.can_compile_kernels() == can_compile
    if not can_compile:
        with pytest.raises(ValueError, match="before compute capability 8.0.* got cuda"):
            bench_attention.check_device("cuda")
