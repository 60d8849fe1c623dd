import math

import pytest
import torch
import torch.utils.checkpoint
from helpers import assert_close, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.checkpointing import (
    blocks_to_keep,
    checkpoint,
    checkpoint_recursive,
    checkpoint_segments,
    checkpoint_selective,
    keep_last_blocks,
    run_blocks,
    run_blocks_selective,
    segments_peak_bytes,
)
from lib.config import ModelConfig
from lib.measure.meter import measure
from lib.model import Transformer, attend_causal, attend_fused
from lib.training import training_bytes

POSITIONS = torch.arange(16)


def in_segments(num_segments):
    return lambda *args: checkpoint_segments(*args, num_segments)


def torch_checkpoint(blocks, x, positions, attend):
    """The oracle: one block per segment, by torch's own."""
    for block in blocks:
        x = torch.utils.checkpoint.checkpoint(
            block, x, positions, attend, use_reentrant=False
        )
    return x


def gradients(model, run, attend=attend_fused, x=None):
    """Loss, gradient of x and of every parameter of the blocks, with the dropout of one
    seed.
    """
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    if x is None:
        x = torch.randn(2, 16, model.config.d_model, requires_grad=True)
    x.grad = None
    torch.manual_seed(2)
    loss = run(model.blocks, x, POSITIONS, attend).square().sum()
    loss.backward()
    rng_after = torch.get_rng_state()
    return [
        loss.detach(),
        x.grad,
        *(p.grad for p in model.blocks.parameters()),
        rng_after,
    ]


WAYS = {
    "one segment": in_segments(1),
    "two segments": in_segments(2),
    "three segments of five blocks": in_segments(3),
    "one block per segment": in_segments(5),
    "recursive": checkpoint_recursive,
    "torch's own": torch_checkpoint,
}


@pytest.mark.parametrize("attend", [attend_causal, attend_fused])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_equal_to_the_bit_and_none_is_missing(way, attend):
    model = random_model(num_layers=5, dropout=0.3).train()
    expected = gradients(model, run_blocks, attend)
    got = gradients(model, WAYS[way], attend)
    assert len(got) == 3 + len(list(model.blocks.parameters()))
    for i, (a, b) in enumerate(zip(got, expected)):
        assert a is not None and torch.equal(a, b), f"tensor {i} of {len(got)} differs"


@pytest.mark.parametrize("way", WAYS)
def test_parameters_get_their_gradient_when_the_input_wants_none(way):
    model = random_model(num_layers=5, dropout=0.3).train()
    x = torch.randn(2, 16, 32)
    expected = gradients(model, run_blocks, x=x)
    got = gradients(model, WAYS[way], x=x)
    assert got[1] is None
    for a, b in zip(got[2:], expected[2:]):
        assert a is not None and torch.equal(a, b)


def test_frozen_parameters_stay_without_a_gradient():
    model = random_model(num_layers=2)
    model.blocks[0].requires_grad_(False)
    expected = gradients(model, run_blocks)
    got = gradients(model, in_segments(2))
    for a, b in zip(got, expected):
        assert (a is None and b is None) or torch.equal(a, b)
    model.requires_grad_(False)
    assert torch.equal(
        gradients(model, in_segments(2))[1], gradients(model, run_blocks)[1]
    )


def test_gradients_add_to_those_already_there():
    model = random_model(num_layers=2)
    x = torch.randn(1, 16, 32)
    for _ in range(2):
        checkpoint_segments(model.blocks, x, POSITIONS, attend_fused, 2).sum().backward()
    twice = [p.grad.clone() for p in model.blocks.parameters()]
    model.zero_grad(set_to_none=True)
    for _ in range(2):
        run_blocks(model.blocks, x, POSITIONS, attend_fused).sum().backward()
    for got, parameter in zip(twice, model.blocks.parameters()):
        assert torch.equal(got, parameter.grad)


def test_nothing_is_kept_where_no_gradient_is_wanted():
    model = random_model()
    with torch.no_grad():
        out = checkpoint_segments(
            model.blocks, torch.randn(1, 16, 32), POSITIONS, attend_fused, 1
        )
    assert out.grad_fn is None


@pytest.mark.parametrize("num_segments", [0, 6, -1])
def test_more_segments_than_blocks_or_none_are_refused(num_segments):
    model = random_model(num_layers=5)
    with pytest.raises(ValueError, match=f"expected 1 to 5, .*got {num_segments}"):
        checkpoint_segments(
            model.blocks, torch.randn(1, 2, 32), POSITIONS[:2], None, num_segments
        )


def step_cost(num_layers, run):
    """The cost of forward and backward over the blocks alone, with gradients allocated
    before.
    """
    model = random_model(num_layers=num_layers)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x = torch.randn(1, 16, 32, requires_grad=True)
    x.grad = torch.zeros_like(x)
    return measure(lambda: run(model.blocks, x, POSITIONS, attend_fused).sum().backward())


EDGE = 16 * 32 * 4  # bytes of one x


@pytest.mark.parametrize("num_layers, num_segments", [(6, 2), (6, 3), (6, 6), (7, 3)])
def test_forward_keeps_the_edges_and_nothing_else(num_layers, num_segments):
    model = random_model(num_layers=num_layers)
    x = torch.randn(1, 16, 32) * 1.0
    x.requires_grad_()
    run = in_segments(num_segments)
    cost = measure(lambda: run(model.blocks, x, POSITIONS, attend_fused))
    assert (
        cost.saved_bytes == (num_segments - 1) * EDGE
    )  # the first edge is x, there before
    plain = measure(lambda: run_blocks(model.blocks, x, POSITIONS, attend_fused))
    assert plain.saved_bytes > num_layers * 10 * EDGE  # the control: all that was inside


@pytest.mark.parametrize("num_segments", [1, 2, 4])
def test_each_block_runs_once_more_and_only_matrix_work_of_a_forward_pass_is_added(
    num_segments,
):
    plain, ours = step_cost(4, run_blocks), step_cost(4, in_segments(num_segments))
    model = random_model(num_layers=4)
    x = torch.randn(1, 16, 32)
    forward = measure(lambda: run_blocks(model.blocks, x, POSITIONS, attend_fused))
    assert ours.calls["Block"] == 2 * plain.calls["Block"] == 8
    for kind in ("attention", "projection"):
        assert ours.flops[kind] - plain.flops[kind] == forward.flops[kind]


def test_memory_of_sqrt_segments_grows_with_the_root_of_the_depth():
    peaks = [step_cost(L, in_segments(math.isqrt(L))).peak_bytes for L in (4, 16, 64)]
    assert peaks[2] - peaks[1] == 2 * (peaks[1] - peaks[0]) > 0
    plain = [step_cost(L, run_blocks).peak_bytes for L in (4, 16, 64)]
    assert plain[2] - plain[1] == 4 * (plain[1] - plain[0]) > 0


def test_memory_of_recursion_grows_by_an_edge_and_its_gradient_a_doubling():
    costs = {L: step_cost(L, checkpoint_recursive) for L in (4, 8, 16, 32)}
    for L in (4, 8, 16):
        assert costs[2 * L].saved_bytes - costs[L].saved_bytes == EDGE
        assert costs[2 * L].peak_bytes - costs[L].peak_bytes == 2 * EDGE
    # Each halving runs its first half once more: L + L/2 · log2(L) block calls.
    for L, cost in costs.items():
        assert cost.calls["Block"] == L + L // 2 * int(math.log2(L))


@pytest.mark.parametrize("num_kept", [0, 1, 2, 5])
def test_keeping_the_last_blocks_saves_running_them_again(num_kept):
    expected = step_cost(5, run_blocks)
    cost = step_cost(5, lambda *args: keep_last_blocks(*args, num_kept))
    assert cost.calls["Block"] == 5 + (5 - num_kept)
    assert cost.peak_bytes <= expected.peak_bytes


def test_segments_hold_what_their_formula_says_beside_a_constant():
    model = random_model(num_layers=12)
    block_bytes = training_bytes(model.config, 1, 16)["activations"] // 12
    for k in (1, 2, 3, 5, 12):
        predicted = segments_peak_bytes(12, k, EDGE, block_bytes)
        rest = step_cost(12, in_segments(k)).peak_bytes - predicted
        assert 0 < rest < 12 * EDGE, (k, rest / EDGE)


def measured_bytes(model, batch_size, seq_len):
    """Edge, inside and working bytes: what two of its blocks tell of any number."""
    shape = batch_size, seq_len, model.config.d_model
    positions, two = torch.arange(seq_len), [model.blocks[0]] * 2
    x = torch.randn(shape, requires_grad=True)
    inside = measure(lambda: two[0](x, positions, attend_fused)).saved_bytes + x.nbytes

    def step():
        x = torch.randn(shape, requires_grad=True)
        keep_last_blocks(two, x, positions, attend_fused, 1).sum().backward()

    return x.nbytes, inside, measure(step).peak_bytes - x.nbytes - inside


@settings(deadline=None, max_examples=40)
@given(
    num_layers=st.integers(1, 7),
    half_head=st.integers(1, 12),
    num_heads=st.sampled_from([1, 2, 4]),
    d_ff=st.integers(1, 120),
    batch_size=st.integers(1, 3),
    seq_len=st.integers(1, 24),
    dropout=st.sampled_from([0.0, 0.2]),
    spent=st.floats(0, 1.1),
)
def test_a_budget_is_met_by_a_measured_step_whatever_the_model(
    num_layers, half_head, num_heads, d_ff, batch_size, seq_len, dropout, spent
):
    d_model = 2 * half_head * num_heads
    sizes = 29, num_layers, num_heads, 1, d_model, d_ff, 24
    model = Transformer(ModelConfig(*sizes, dropout=dropout))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    edge, inside, working = measured_bytes(model, batch_size, seq_len)
    smallest = (num_layers - 1) * edge + inside + working
    budget = int(smallest + spent * (num_layers - 1) * (inside - edge))
    shape, positions = (batch_size, seq_len, d_model), torch.arange(seq_len)

    def peak(num_kept):
        def step():
            args = torch.randn(shape, requires_grad=True), positions, attend_fused
            keep_last_blocks(model.blocks, *args, num_kept).sum().backward()

        return measure(step).peak_bytes

    num_kept = blocks_to_keep(num_layers, edge, inside, working, budget)
    assert peak(num_kept) <= budget
    if num_kept < num_layers:  # no room was left: a sum's gradient saves us an edge
        assert peak(num_kept + 1) > budget - 2 * edge
    with pytest.raises(ValueError, match=f"expected at least {smallest}, got"):
        blocks_to_keep(num_layers, edge, inside, working, smallest - 1)


def test_blocks_whose_inside_is_their_edge_can_all_be_kept():
    assert blocks_to_keep(8, 1, 1, working_bytes=0, budget_bytes=40) == 8


def test_any_function_of_a_tensor_can_be_checkpointed():
    x = torch.randn(5, requires_grad=True)
    checkpoint(lambda x: x.exp().sin(), x).sum().backward()
    assert_close(x.grad, x.detach().exp().cos() * x.detach().exp())


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_equal_under_autocast_too(way):
    def under_autocast(run):
        def in_bfloat16(*args):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return run(*args)

        return in_bfloat16

    model = random_model(num_layers=5)
    expected = gradients(model, under_autocast(run_blocks))
    got = gradients(model, under_autocast(WAYS[way]))
    plain = gradients(model, run_blocks)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
    assert not torch.equal(plain[1], expected[1]), "the control: autocast does something"


def test_what_a_second_run_would_get_wrong_is_refused_in_the_first():
    linear, x = torch.nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    made = linear(x)
    with pytest.raises(ValueError, match=r"a tensor \(2, 3\) from AddmmBackward0"):
        checkpoint(lambda x: linear(x) + made, x)
    with pytest.raises(ValueError, match="from AddmmBackward0"):
        checkpoint(lambda x: torch.cat([x, made]), x)
    with pytest.raises(TypeError, match="expected run to return a tensor, got tuple"):
        checkpoint(lambda x: (x, x), x)
    with pytest.raises(ValueError, match="on a CPU or a CUDA device.*got meta"):
        checkpoint(linear, x.detach().to("meta"))
    with pytest.raises(RuntimeError, match="expected `.backward\\(\\)`"):
        torch.autograd.grad(checkpoint(linear, x).sum(), x)
    # x itself may be what others made, and be used twice
    (checkpoint(linear, made) + checkpoint(linear.forward, made)).sum().backward()


def test_a_result_wants_a_gradient_only_where_something_does():
    linear, x = torch.nn.Linear(3, 3), torch.randn(2, 3)
    assert checkpoint(linear, x).requires_grad
    assert not checkpoint(lambda x: 2 * x, x).requires_grad
    assert not checkpoint(linear.requires_grad_(False), x).requires_grad
    assert checkpoint(linear, x.requires_grad_()).requires_grad


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.3}, {"qk_norm": True}])
def test_selective_recomputation_gives_the_gradients_for_no_product_more(settings):
    model = random_model(num_layers=3, dtype=torch.float64, **settings).train()
    x = torch.randn(2, 16, 32, dtype=torch.float64, requires_grad=True)
    expected = gradients(model, run_blocks, x=x)
    expected = [value.clone() for value in expected]
    got = gradients(model, run_blocks_selective, x=x)
    for a, b in zip(got[:-1], expected[:-1]):
        # sums of squares are large: rounding is held against the size of a tensor
        assert (a - b).abs().max() <= 1e-13 * max(1, b.abs().max())
    assert torch.equal(got[-1], expected[-1])


def test_selective_recomputation_refuses_biases():
    model, x = random_model(qkv_bias=True), torch.randn(1, 16, 32)
    with pytest.raises(ValueError, match="expected projections without biases"):
        run_blocks_selective(model.blocks, x, POSITIONS, attend_fused)


def test_selective_recomputation_saves_what_it_says_and_costs_no_flops():
    plain, ours = step_cost(4, run_blocks), step_cost(4, run_blocks_selective)
    assert ours.flops == plain.flops and ours.peak_bytes < 0.7 * plain.peak_bytes
    model, x = random_model(num_layers=4), torch.randn(1, 16, 32, requires_grad=True)
    plain, ours = (
        measure(lambda run=run: run(model.blocks, x, POSITIONS, attend_fused))
        for run in (run_blocks, run_blocks_selective)
    )
    tokens, C, F = 16, 32, 64
    # two norms with two vectors and one float each; silu(gate) and the product
    dropped = 4 * tokens * (4 * C + 2 + 2 * F)
    assert plain.saved_bytes - ours.saved_bytes == 4 * dropped
    assert 0.4 < dropped / (plain.saved_bytes / 4) < 0.6


def test_a_selective_checkpoint_refuses_autocast_and_random_numbers():
    linear, x = torch.nn.Linear(3, 3), torch.randn(2, 3)
    with torch.autocast("cpu"), pytest.raises(ValueError, match="expected no autocast"):
        checkpoint_selective(torch.sin, [x], [linear.weight])
    with pytest.raises(ValueError, match="expected no random numbers in run"):
        checkpoint_selective(torch.nn.functional.dropout, [x], [linear.weight])


def test_what_run_learns_gets_its_gradient_when_nothing_else_wants_one():
    norm, x = torch.nn.RMSNorm(3), torch.randn(2, 3)
    weight = torch.randn(4, 3)
    (out,) = checkpoint_selective(norm, [x], [weight])
    out.sum().backward()
    got, norm.weight.grad = norm.weight.grad, None
    (norm(x) @ weight.T).sum().backward()
    assert_close(got, norm.weight.grad)


def test_a_shared_parameter_gets_its_gradient_up_to_rounding():
    w, x = torch.nn.Parameter(torch.randn(6, 6).double()), torch.randn(2, 6).double()

    def loss(step):
        return (step(lambda y: torch.tanh(y @ w), x @ w) @ w).sum()

    loss(checkpoint).backward()
    got, w.grad = w.grad, None
    loss(lambda run, x: run(x)).backward()
    assert_close(got, w.grad)


def test_what_run_returns_but_did_not_make_stays_what_it_was():
    x, buffer = torch.ones(4, requires_grad=True), torch.ones(4)
    weight = torch.nn.Parameter(torch.ones(4))
    checkpoint(lambda x: buffer, x)
    assert not buffer.requires_grad and buffer.grad_fn is None
    checkpoint(lambda x: weight, x).sum().backward()
    assert weight.is_leaf and weight.grad.tolist() == [1, 1, 1, 1]


def test_a_run_that_changes_x_is_refused():
    linear, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    for want in (False, True):
        x = torch.ones(2, 4, requires_grad=want)
        with pytest.raises(ValueError, match="expected run to leave x as it is"):
            checkpoint(lambda x: linear(x.mul_(2)), x)


def test_there_is_no_gradient_of_the_gradient():
    weight, x = torch.nn.Parameter(torch.randn(4, 4)), torch.randn(2, 4)
    for run in (
        lambda x: checkpoint(lambda x: torch.tanh(x @ weight), x),
        lambda x: checkpoint_selective(torch.tanh, [x], [weight])[0],
    ):
        x = x.detach().requires_grad_()
        run(x).sum().backward(create_graph=True)
        with pytest.raises(RuntimeError, match="once_diff|does not require grad"):
            x.grad.square().sum().backward()
        x.grad = None
        with pytest.raises(RuntimeError, match="once_differentiable"):
            run(x).square().sum().backward(create_graph=True)
            x.grad.square().sum().backward()


def test_a_selective_checkpoint_refuses_what_it_cannot_do():
    weight = torch.randn(3, 4, requires_grad=True)
    for x in (torch.randn(4), torch.zeros(2, 4).long()):
        with pytest.raises(ValueError, match="expected inputs .*tokens, in. of floats"):
            checkpoint_selective(lambda x: x, [x], [weight])
    x = torch.randn(2, 4, requires_grad=True)
    (out,) = checkpoint_selective(torch.tanh, [x], [weight])
    with pytest.raises(RuntimeError, match="expected `.backward"):
        torch.autograd.grad(out.sum(), x)


def test_tokens_may_be_what_is_checkpointed():
    embed, ids = torch.nn.Embedding(5, 3), torch.tensor([1, 4])
    checkpoint(embed, ids).sum().backward()
    assert embed.weight.grad.sum(dim=1).tolist() == [0, 3, 0, 0, 3]


def test_other_tensors_of_the_graph_are_seen_however_they_are_handed_over():
    x, made = torch.randn(2, 3), torch.randn(2, 3, requires_grad=True) * 2
    for run in (
        lambda x: torch.add(x, other=made),
        lambda x: torch.stack((x, made)),
        lambda x: torch.where(x > 0, x, made),
    ):
        with pytest.raises(ValueError, match="from MulBackward0"):
            checkpoint(run, x)


def test_autocast_keeps_its_kind_of_half_precision():
    linear, seen = torch.nn.Linear(3, 3), []
    x = torch.randn(2, 3)

    def run(x):
        out = linear(x)
        seen.append(out.dtype)
        return out

    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype):
            out = checkpoint(run, x)
        out.float().sum().backward()
        assert seen[-2:] == [dtype, dtype]


@pytest.mark.parametrize("num_kept", [-1, 6])
def test_more_kept_blocks_than_there_are_are_refused(num_kept):
    model = random_model(num_layers=5)
    args = torch.randn(1, 2, 32), POSITIONS[:2], attend_fused
    with pytest.raises(ValueError, match=f"num_kept: expected 0 to 5.*got {num_kept}"):
        keep_last_blocks(model.blocks, *args, num_kept)
