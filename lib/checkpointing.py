"""Chapter 2: keep less, compute it again.

Training keeps every activation of every block until the backward pass has used it:
memory grows with N·L. `checkpoint` keeps only what goes into a piece of the network,
and computes the inside again when the backward pass gets there. Cutting L blocks into
√L segments then needs memory for √L edges and the inside of one segment.

    Training Deep Nets with Sublinear Memory Cost, https://arxiv.org/abs/1604.06174

The promise: the same gradients for every parameter, dropout included; to the bit in a
chain of checkpoints, where each x and each parameter is used in one of them and nowhere
else. (What is used twice has its gradients added up in another order: the same up to
rounding.) `checkpoint_selective` computes again only what costs no matrix product. Read
lib/model.py before.
"""

import contextlib
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from lib.model import Attend, Block


class Checkpoint(torch.autograd.Function):
    """`run(x)` as one step of the graph that remembers x and nothing inside."""

    @staticmethod
    def forward(ctx, run, x, _):
        ctx.run = run
        ctx.random_state = get_random_state(x)
        ctx.save_for_backward(x)
        return run(x)  # inside a Function autograd is off: nothing in here is saved

    @staticmethod
    @once_differentiable  # there is no gradient of the gradient
    def backward(ctx, grad_out):
        (x,) = ctx.saved_tensors
        # A fresh leaf: the graph built below ends here, not in the blocks before.
        x = x.detach().requires_grad_(ctx.needs_input_grad[1])
        # Dropout must drop what it dropped before.
        with torch.enable_grad(), use_random_state(x, ctx.random_state):
            out = ctx.run(x)
        if out.requires_grad:  # adds to each parameter's .grad at once, holds none back
            torch.autograd.backward(out, grad_out)
        return None, x.grad, None


def checkpoint(
    run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """`run(x)`, keeping nothing of its inside: the backward pass runs it again.

    Gradients are those of `run(x)`: for x, and for every parameter that `run` uses, in
    its `.grad`. Dropout repeats itself, since the random state of torch (of the CPU, or
    of x's GPU) is put back, and so does autocast. All else that `run` depends on has to
    be in the backward pass as it was: weights, variables, training mode, generators of
    its own.
    Returns what `run` returns, one tensor. `Repeatable` says what is refused.
    """
    if not torch.is_grad_enabled():  # nothing is kept, and nothing will be run again
        return run(x)
    run = Repeatable(run, x)
    # Autograd runs a backward only where an input wants a gradient. If x wants none (it
    # came from data, or from a frozen layer), the parameters inside still do: an empty
    # tensor that wants one stands in for them.
    out = Checkpoint.apply(run, x, torch.empty(0, requires_grad=True))
    return out if run.wants_gradient else out.detach()


class Repeatable:
    """`run`, under the same autocast whenever it is called.

    What the second call, in the backward pass, would get wrong is refused where the first
    can see it. Raises ValueError where x is on no CPU or CUDA device, where `run` changes
    x, which has to be there unchanged then, and where it uses a tensor that other
    operations made and that wants a gradient: only x and parameters may want one, for a
    second backward through the same graph is not to be had. TypeError where `run` returns
    anything but one tensor. RuntimeError under `torch.autograd.grad`, which does not see
    the parameters inside: call `.backward()`.
    """

    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor):
        device = x.device.type
        if device not in ("cpu", "cuda"):
            raise ValueError(
                f"checkpoint: expected x on a CPU or a CUDA device, whose random numbers "
                f"can be drawn again, got {device}"
            )
        self.run, self.wants_gradient = run, x.requires_grad
        self.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
            # What it casts in the first call belongs to no graph: not for later use.
            "cache_enabled": False,
        }

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():  # the second call
            _refuse_autograd_grad()
            with torch.autocast(**self.autocast):
                return self.run(x)
        x, version = x.detach(), x._version
        with torch.autocast(**self.autocast), _Watch(self):
            out = self.run(x)
        if not isinstance(out, torch.Tensor):
            raise TypeError(
                f"checkpoint: expected run to return a tensor, got {type(out).__name__}"
            )
        if x._version != version:
            raise ValueError(
                "checkpoint: expected run to leave x as it is, got x changed"
            )
        return out.detach()  # autograd marks what it gets, and this may be somebody's


def _refuse_autograd_grad():
    if not torch.autograd._is_checkpoint_valid():
        raise RuntimeError(
            "checkpoint: expected `.backward()`, got torch.autograd.grad, or inputs"
        )


class _Watch(TorchFunctionMode):
    """Sees what each call of torch inside is given, and which of it wants a gradient."""

    def __init__(self, repeatable: Repeatable):
        super().__init__()
        self.repeatable = repeatable

    def __torch_function__(self, func, types, args=(), kwargs=None):
        for value in [*args, *(kwargs or {}).values()]:
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(tensor, torch.Tensor):
                    self._judge(tensor)
        return func(*args, **(kwargs or {}))

    def _judge(self, tensor: torch.Tensor):
        if tensor.grad_fn is not None:
            raise ValueError(
                f"checkpoint: expected run to use x and parameters, got a tensor "
                f"{tuple(tensor.shape)} from {tensor.grad_fn.name()} as well"
            )
        self.repeatable.wants_gradient |= tensor.requires_grad


def run_blocks(
    blocks: Sequence[nn.Module],
    x: torch.Tensor,
    positions: torch.Tensor,
    attend: Attend,
) -> torch.Tensor:
    """x (..., T, C) through all `blocks`, keeping everything, as Transformer does."""
    for block in blocks:
        x = block(x, positions, attend)
    return x


def checkpoint_segments(
    blocks: Sequence[nn.Module],
    x: torch.Tensor,
    positions: torch.Tensor,
    attend: Attend,
    num_segments: int,
) -> torch.Tensor:
    """`run_blocks`, keeping x at the edges of `num_segments` nearly equal segments.

    Raises ValueError unless 1 <= num_segments <= len(blocks).
    """
    num_blocks = len(blocks)
    if not 1 <= num_segments <= num_blocks:
        raise ValueError(
            f"num_segments: expected 1 to {num_blocks}, the number of blocks, "
            f"got {num_segments}"
        )
    edges = [segment * num_blocks // num_segments for segment in range(num_segments + 1)]
    for start, end in zip(edges, edges[1:]):
        segment = blocks[start:end]
        x = checkpoint(
            lambda x, segment=segment: run_blocks(segment, x, positions, attend), x
        )
    return x


def checkpoint_recursive(
    blocks: Sequence[nn.Module],
    x: torch.Tensor,
    positions: torch.Tensor,
    attend: Attend,
) -> torch.Tensor:
    """`run_blocks` in memory O(log L), for O(L log L) block calls.

    Halve: checkpoint the first half, go into the second. The backward pass comes out of
    the second half, runs the first again, and that run halves in turn. Kept at any time
    are one edge and its gradient for each halving, and the inside of one block: the
    last, where the backward pass begins, so that it need not be run again.
    """
    if len(blocks) <= 1:
        return run_blocks(blocks, x, positions, attend)
    middle = len(blocks) // 2
    first, second = blocks[:middle], blocks[middle:]
    x = checkpoint(lambda x: checkpoint_recursive(first, x, positions, attend), x)
    return checkpoint_recursive(second, x, positions, attend)


def keep_last_blocks(
    blocks: Sequence[nn.Module],
    x: torch.Tensor,
    positions: torch.Tensor,
    attend: Attend,
    num_kept: int,
) -> torch.Tensor:
    """`run_blocks` with every block checkpointed but the last `num_kept`.

    The last, since the backward pass begins there: by the time it runs an earlier block
    again, their insides are free. Raises ValueError unless 0 <= num_kept <= len(blocks).
    """
    if not 0 <= num_kept <= len(blocks):
        raise ValueError(
            f"num_kept: expected 0 to {len(blocks)}, the number of blocks, got {num_kept}"
        )
    num_checkpointed = len(blocks) - num_kept
    if num_checkpointed:
        first = blocks[:num_checkpointed]
        x = checkpoint_segments(first, x, positions, attend, num_checkpointed)
    return run_blocks(blocks[num_checkpointed:], x, positions, attend)


class SelectiveCheckpoint(torch.autograd.Function):
    """Products of `run(*inputs)` with matrices, as one step that keeps the inputs."""

    @staticmethod
    def forward(ctx, run, num_inputs, *inputs_and_weights):
        ctx.run, ctx.num_inputs = run, num_inputs
        ctx.save_for_backward(*inputs_and_weights)
        made = run(*inputs_and_weights[:num_inputs])
        return tuple(made @ weight.T for weight in inputs_and_weights[num_inputs:])

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads_out):
        inputs = [x.detach() for x in ctx.saved_tensors[: ctx.num_inputs]]
        weights = ctx.saved_tensors[ctx.num_inputs :]
        with torch.enable_grad():
            made = ctx.run(*(x.requires_grad_() for x in inputs))
        rows = made.detach().flatten(0, -2)  # (tokens, in)
        weight_grads = [grad.flatten(0, -2).T @ rows for grad in grads_out]
        grad_made = sum(grad @ weight for grad, weight in zip(grads_out, weights))
        torch.autograd.backward(made, grad_made)
        return None, None, *(x.grad for x in inputs), *weight_grads


def checkpoint_selective(
    run: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """`run(*inputs) @ weight.T` for each of `weights`, keeping `inputs` alone.

    inputs (..., tokens, in) as `run` takes them; weights (out, in), as of nn.Linear. The
    gradient of a weight needs what it was multiplied with, so autograd would keep that
    too. Here the backward pass makes it again from `inputs`: worth it where `run` is
    cheap, a norm or a function of single numbers, for no matrix product is done twice.
    Gradients are those of a plain run up to rounding, also for the parameters that `run`
    uses. Where neither an input nor a weight wants one, it is a plain run. Raises
    ValueError under autocast, for inputs of other shapes or of whole numbers, and where
    `run` draws random numbers of torch; RuntimeError under torch.autograd.grad.

    In the spirit of Korthikanti and others, section 5, who recompute attention's scores:
    https://arxiv.org/abs/2205.05198
    """
    if not any(tensor.requires_grad for tensor in [*inputs, *weights]):
        made = run(*inputs)  # nothing to save; what `run` uses may want a gradient
        return tuple(made @ weight.T for weight in weights)
    run = guarded(run, inputs)
    return SelectiveCheckpoint.apply(run, len(inputs), *inputs, *weights)


def guarded(
    run: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """`run`, which raises where `checkpoint_selective` says so."""
    for x in inputs:
        if x.dim() < 2 or not x.is_floating_point():
            raise ValueError(
                f"checkpoint_selective: expected inputs (..., tokens, in) of floats, "
                f"got {x.dtype} {tuple(x.shape)}"
            )
    if torch.is_autocast_enabled(inputs[0].device.type):
        raise ValueError("checkpoint_selective: expected no autocast, got some")

    def run_or_refuse(*args: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():  # the second time
            _refuse_autograd_grad()
            return run(*args)
        state = get_random_state(args[0])
        made = run(*args)
        if not all(map(torch.equal, state, get_random_state(args[0]))):
            raise ValueError("checkpoint_selective: expected no random numbers in run")
        return made

    return run_or_refuse


def run_blocks_selective(
    blocks: Sequence[Block],
    x: torch.Tensor,
    positions: torch.Tensor,
    attend: Attend,
) -> torch.Tensor:
    """`run_blocks`, keeping no norm's output, no silu(gate) and no silu(gate) · up.

    Raises ValueError for projections with biases.
    """
    for block in blocks:
        attention, mlp = block.attention, block.mlp
        if attention.q_proj.bias is not None:
            raise ValueError("blocks: expected projections without biases, got some")
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        heads = checkpoint_selective(
            block.attention_norm, [x], [projection.weight for projection in projections]
        )
        q, k, v = (y.unflatten(-1, (-1, attention.head_dim)) for y in heads)
        q, k = attention.place(q, k, positions)
        out = attend(attention.layer, q, k, v)  # (..., T, H, D)
        x = x + block.dropout(attention.o_proj(out.flatten(-2)))

        gate_and_up = checkpoint_selective(
            block.mlp_norm, [x], [mlp.gate_proj.weight, mlp.up_proj.weight]
        )
        (down,) = checkpoint_selective(
            lambda gate, up: F.silu(gate) * up, gate_and_up, [mlp.down_proj.weight]
        )
        x = x + block.dropout(down)
    return x


def segments_peak_bytes(
    num_layers: int, num_segments: int, edge_bytes: int, block_bytes: int
) -> int:
    """What `checkpoint_segments` has to hold: one edge per segment, and one inside.

    edge_bytes: of one x between blocks. block_bytes: what autograd saves in one block,
    its input included. Where segments are not equal the longest counts.
    """
    longest = math.ceil(num_layers / num_segments)
    return num_segments * edge_bytes + longest * block_bytes


def best_num_segments(num_layers: int, edge_bytes: int, block_bytes: int) -> int:
    """The number of segments with the lowest peak; of several, the fewest.

    Without rounding the minimum of k·b + (L/k)·A is at k = √(L·A/b), and is 2·√(L·A·b).
    Where that k is more than L, each block gets a segment of its own.

    >>> best_num_segments(16, edge_bytes=1, block_bytes=1)
    4
    >>> best_num_segments(16, edge_bytes=1, block_bytes=20)
    16
    """
    return min(
        range(1, num_layers + 1),
        key=lambda k: segments_peak_bytes(num_layers, k, edge_bytes, block_bytes),
    )


def blocks_to_keep(
    num_layers: int,
    edge_bytes: int,
    block_bytes: int,
    working_bytes: int,
    budget_bytes: int,
) -> int:
    """How many blocks `keep_last_blocks` may keep within `budget_bytes`, 1 to L.

    Each block costs its edge if it is checkpointed and its inside if it is kept. On top
    come working_bytes, once: what the backward pass of a checkpointed block needs beside
    the inside, for gradients on their way back. Keeping one block costs nothing extra:
    room for one inside is needed anyway. The budget is never exceeded; with two kept
    blocks or more, the true peak is one edge below what is reckoned here. Raises
    ValueError where not even one fits.

    >>> blocks_to_keep(8, 1, 10, working_bytes=5, budget_bytes=45)  # 5·1 + 3·10 + 5
    3
    """
    smallest = (num_layers - 1) * edge_bytes + block_bytes + working_bytes
    if budget_bytes < smallest:
        raise ValueError(
            f"budget_bytes: expected at least {smallest}, got {budget_bytes}"
        )

    more_bytes = block_bytes - edge_bytes  # of each further block that is kept
    num_kept = range(1, num_layers + 1)
    return max(n for n in num_kept if smallest + (n - 1) * more_bytes <= budget_bytes)


def get_random_state(x: torch.Tensor) -> list[torch.Tensor]:
    """The state of the random numbers that dropout of x draws from."""
    states = [torch.get_rng_state()]
    return states + [torch.cuda.get_rng_state(x.device)] if x.is_cuda else states


@contextlib.contextmanager
def use_random_state(x: torch.Tensor, states: list[torch.Tensor]):
    """Inside, random numbers go on from `states`; afterwards, from where they were."""
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.set_rng_state(states[0])
        if x.is_cuda:
            torch.cuda.set_rng_state(states[1], x.device)
        yield
