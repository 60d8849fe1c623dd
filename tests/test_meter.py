import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import random_model
from torch._subclasses.fake_tensor import FakeTensorMode

from lib.interpreter import tl, triton
from lib.measure.meter import (
    machine_facts,
    measure,
    measure_traffic,
    median_seconds,
    medians_in_turns,
    resident_bytes,
)
from lib.model import attend_causal, attend_fused
from lib.training import next_token_loss


def test_peak_is_what_lives_at_one_time():
    def work():
        a = torch.zeros(1000)  # 4,000 bytes
        b = a + 1  # 8,000 alive
        del a
        c = b * 2  # 8,000 again
        return c[:10]  # a view: its storage is all of c

    cost = measure(work)
    assert cost.peak_bytes == 8000
    assert (
        cost.timeline[-1] == 4000
        and cost.timeline[0] == 4000
        and max(cost.timeline) == 8000
    )
    assert cost.value.shape == (10,)


def test_what_was_there_before_is_free():
    x, weight = torch.zeros(100, 100), torch.nn.Parameter(torch.zeros(100, 100))
    assert measure(lambda: x.T[:5].view(5, 100)).peak_bytes == 0
    assert measure(lambda: x.add_(1)).peak_bytes == 0
    assert (
        measure(lambda: (weight.detach(), x.unsqueeze(0).expand(3, -1, -1))).peak_bytes
        == 0
    )
    assert measure(lambda: x @ weight).peak_bytes == 40_000


def test_new_data_counts_however_it_is_made():
    assert measure(lambda: torch.tensor([1.0, 2.0, 3.0])).peak_bytes == 12
    assert measure(lambda: torch.arange(5)).peak_bytes == 40
    assert measure(lambda: torch.zeros(4, dtype=torch.bool)).peak_bytes == 4
    assert measure(lambda: None).peak_bytes == 0


def test_saved_bytes_are_what_autograd_holds():
    x = torch.zeros(100, requires_grad=True)
    assert (
        measure(lambda: x * x).saved_bytes == 0
    )  # saves x twice, and x was there before
    assert measure(lambda: x + 1).saved_bytes == 0  # saves nothing
    assert measure(lambda: x.exp()).saved_bytes == 400  # saves its output
    assert measure(lambda: x.exp().exp()).saved_bytes == 800
    assert measure(lambda: (y := x.exp()) * y).saved_bytes == 400  # thrice, one storage
    assert measure(lambda: x.detach().exp()).saved_bytes == 0
    with torch.no_grad():
        assert measure(lambda: x.exp()).saved_bytes == 0


def test_what_is_saved_is_listed_by_the_operation_that_made_it():
    x = torch.zeros(4, 5, requires_grad=True)
    cost = measure(lambda: (x.exp() * 2).sin())
    assert cost.saved == [("exp", (4, 5), 80), ("mul", (4, 5), 80)]


def test_saved_bytes_are_given_back_by_the_backward_pass():
    x = torch.zeros(100, requires_grad=True)

    def two_steps():
        for _ in range(2):
            x.exp().sum().backward()

    assert measure(two_steps).saved_bytes == 400


def test_flops_of_products_are_counted_by_kind():
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    assert measure(lambda: a @ b).flops == {"projection": 2 * 3 * 5 * 7}
    assert measure(lambda: F.linear(a, b.T, torch.zeros(7))).flops == {
        "projection": 2 * 3 * 5 * 7
    }
    batched = measure(lambda: torch.zeros(2, 4, 3, 5) @ torch.zeros(2, 4, 5, 7))
    assert batched.flops == {"attention": 2 * 8 * 3 * 5 * 7}
    assert measure(lambda: torch.zeros(9) * 2).flops == {}


@pytest.mark.parametrize("G", [1, 2, 4])
def test_flops_of_fused_attention_are_two_products_forward_and_five_backward(G):
    B, T, H, D = 2, 6, 4, 8
    q, k, v = (torch.randn(B, T, heads, D, requires_grad=True) for heads in (H, G, G))
    product = 2 * B * H * T * T * D
    assert measure(lambda: attend_fused(0, q, k, v)).flops == {"attention": 2 * product}
    assert measure(lambda: attend_causal(0, q, k, v)).flops == {"attention": 2 * product}
    both = measure(lambda: attend_fused(0, q, k, v).sum().backward())
    assert both.flops == {"attention": 7 * product}
    both = measure(lambda: attend_causal(0, q, k, v).sum().backward())
    assert both.flops == {"attention": 6 * product}


def training_step(attend=attend_fused):
    model = random_model()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    token_ids = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(0))
    return lambda: next_token_loss(
        model(token_ids, torch.arange(20), attend), token_ids
    ).backward()


def test_backward_projections_are_twice_the_forward_ones():
    step = training_step()
    model, token_ids = random_model(), torch.zeros(3, 20, dtype=torch.int64)
    with torch.no_grad():
        forward = measure(lambda: model(token_ids, torch.arange(20), attend_fused))
    assert measure(step).flops["projection"] == 3 * forward.flops["projection"]


def test_five_runs_measure_the_same():
    first, *others = [measure(training_step()) for _ in range(5)]
    assert all(other == first for other in others)


def test_calls_are_counted_by_class_and_the_hook_is_taken_off_again():
    model, token_ids = random_model(num_layers=3), torch.zeros(4, dtype=torch.int64)
    run = lambda: model(token_ids, torch.arange(4), attend_fused)  # noqa: E731
    calls = measure(run).calls
    assert (calls["Embedding"], calls["Block"], calls["Transformer"]) == (1, 3, 1)
    run()
    assert calls["Block"] == 3
    with pytest.raises(ZeroDivisionError):
        measure(lambda: 1 / 0)
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_nothing_is_written_to_stderr(capfd):
    measure(training_step())
    median_seconds(lambda: None)
    assert capfd.readouterr() == ("", "")


def test_median_seconds_is_the_median_after_a_run_that_does_not_count(monkeypatch):
    durations, now = iter([100.0, 1.0, 50.0, 2.0, 3.0, 60.0]), [0.0]

    def work():
        now[0] += next(durations)

    monkeypatch.setattr("lib.measure.meter.time.perf_counter", lambda: now[0])
    assert median_seconds(work, repeats=5) == 3.0


def test_functions_that_are_timed_together_take_turns(monkeypatch):
    now, order = [0.0], []

    def work(name, seconds):
        order.append(name)
        now[0] += seconds

    monkeypatch.setattr("lib.measure.meter.time.perf_counter", lambda: now[0])
    functions = {"a": lambda: work("a", 1), "b": lambda: work("b", 3)}
    assert medians_in_turns(functions, repeats=2) == {"a": 1, "b": 3}
    assert order == ["a", "b"] * 3


def test_machine_facts_are_plain_values():
    facts = machine_facts()
    assert (
        facts["torch"] == torch.__version__ and facts["cores"] >= 1 and facts["processor"]
    )


ALLOCATOR = """
import sys
import torch
from torch.profiler import ProfilerActivity, profile
sys.path.insert(0, ".")
from test_meter import attend_causal, attend_fused, measure, training_step

def allocator_peak(function):
    with profile(profile_memory=True, activities=[ProfilerActivity.CPU]) as prof:
        function()
    events = prof.profiler.kineto_results.events()
    events = [event for event in events if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak

x = torch.randn(50, 60)
for function in (
    training_step(attend_fused),
    lambda: (x @ x.T).softmax(-1) @ x,
    lambda: [x.sin() for _ in range(4)],
):
    print(measure(function).peak_bytes, allocator_peak(function))
"""


def test_peak_is_that_of_the_allocator_to_the_byte():
    # In a process of its own: the profiler writes to stderr.
    result = subprocess.run(
        [sys.executable, "-c", ALLOCATOR],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.split("\n")[:-1]
    assert len(lines) == 3
    for line in lines:
        ours, allocator = line.split()
        assert ours == allocator, line


def test_on_gpus_memory_is_the_peak_of_the_allocators_of_those_that_are_used(
    monkeypatch,
):
    allocated, peaks = [100, 20, 3], [100, 20, 3]
    changes = {
        "is_initialized": lambda: True,
        "device_count": lambda: 3,
        "memory_allocated": lambda gpu: allocated[gpu],
        "max_memory_allocated": lambda gpu: peaks[gpu],
        "reset_peak_memory_stats": lambda gpu: peaks.__setitem__(gpu, allocated[gpu]),
    }
    for name, change in changes.items():
        monkeypatch.setattr(torch.cuda, name, change)

    def use(*gpus):
        peaks[:] = [1100, 70, 3]
        for gpu in gpus:
            torch.zeros(5, device=f"cuda:{gpu}")

    with FakeTensorMode():  # tensors on GPUs that are not there
        assert measure(lambda: use(1)).peak_bytes == 50
        assert measure(lambda: use(0, 1, 1)).peak_bytes == 1050
        assert measure(lambda: use(2)).peak_bytes == 0
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
        assert measure(lambda: use(1)).peak_bytes == 70, "all of it is new"
    assert measure(lambda: torch.zeros(5)).peak_bytes == 20, "on the CPU as ever"


def test_traffic_counts_what_masks_let_through_and_shows_what_nobody_filled_in():
    pytest.importorskip("triton")

    @triton.jit
    def kernel(x_ptr, out_ptr, TILE: tl.constexpr):
        i = tl.arange(0, TILE)
        x = tl.load(x_ptr + i, mask=i < 5)  # and what, behind it?
        tl.store(out_ptr + i, x, mask=True)
        tl.store(out_ptr, tl.load(x_ptr), mask=False)

    x, out = torch.arange(8.0), torch.zeros(8)
    load, store = tl.load, tl.store
    traffic = measure_traffic(lambda: kernel[(2,)](x, out, TILE=8))
    assert (traffic.read_bytes, traffic.written_bytes) == (2 * 4 * (5 + 1), 2 * 4 * 8)
    assert torch.equal(out[:5], x[:5]) and out[5:].isnan().all()
    with pytest.raises(ZeroDivisionError):
        measure_traffic(lambda: 1 / 0)
    assert (tl.load, tl.store) == (load, store)


def test_traffic_is_not_guessed_where_a_gpu_runs_the_kernels(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="expected interpreted kernels"):
        measure_traffic(lambda: None)


@pytest.mark.parametrize("attend", [attend_causal, attend_fused])
def test_inference_mode_is_measured_as_no_grad_is(attend):
    model, token_ids = random_model(), torch.zeros(2, 9, dtype=torch.int64)
    costs = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            costs.append(measure(lambda: model(token_ids, torch.arange(9), attend)))
    assert costs[1].flops == costs[0].flops and costs[0].flops["attention"] > 0
    assert costs[1].peak_bytes == costs[0].peak_bytes


def test_a_storage_that_grows_is_seen():
    assert measure(lambda: torch.empty(0).resize_(1000)).peak_bytes == 4000
    old = torch.empty(0)
    assert measure(lambda: [old.resize_(1000)]).timeline == [4000, 4000]
    rows = [torch.zeros(10)] * 3
    assert measure(lambda: torch.cat(rows, out=torch.empty(0))).peak_bytes == 120

    def grow_and_go():
        torch.empty(0).resize_(1000)

    assert measure(grow_and_go).timeline[-1] == 0


def test_resident_memory_sees_scores_that_an_operation_holds():
    q, k, v = (torch.randn(1, 3000, 1, 32) for _ in range(3))
    stored = resident_bytes(lambda: attend_causal(0, q, k, v))
    assert stored > 3000 * 3000 * 4, "one tensor of scores, at least"
    with pytest.raises(ZeroDivisionError):
        resident_bytes(lambda: 1 / 0)


def test_a_saved_tensor_that_was_changed_is_found_as_torch_finds_it():
    def work():
        w = torch.ones(3, requires_grad=True)
        y = w.exp()
        y.add_(1)
        y.sum().backward()

    for run in (work, lambda: measure(work)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            run()


def test_tensors_are_met_in_lists_and_by_name():
    rows, weight = [torch.zeros(100), torch.zeros(100)], torch.zeros(100)
    assert measure(lambda: torch.cat(rows)).peak_bytes == 800
    assert measure(lambda: torch._foreach_add_(rows, 1.0)).peak_bytes == 0
    assert measure(lambda: torch.add(weight, weight, out=weight)).peak_bytes == 0


def test_what_autograd_held_is_freed_with_the_graph():
    x = torch.zeros(1000, requires_grad=True)
    cost = measure(lambda: (x.exp().exp(), None)[1])
    assert cost.timeline[-1] == 0 and cost.saved_bytes == 8000


def test_shapes_without_memory_cost_none():
    assert measure(lambda: torch.ones(5, device="meta") + 1).peak_bytes == 0
