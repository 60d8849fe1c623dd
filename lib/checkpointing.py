"""Chapter 2: keep less, compute it again.

Training keeps every activation of every block until the backward pass has used it:
memory grows with N·L. `checkpoint` keeps only what goes into a piece of the network,
and computes the inside again when the backward pass gets there. Cutting L blocks into
√L segments then needs memory for √L edges and the inside of one segment.

    Training Deep Nets with Sublinear Memory Cost, https://arxiv.org/abs/1604.06174

The promise: the same gradients, to the bit, for every parameter, dropout included. Read
lib/model.py before.
"""

import contextlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from lib.model import Attend


class Checkpoint(torch.autograd.Function):
    """`run(x)` as one step of the graph that remembers x and nothing inside."""

    @staticmethod
    def forward(ctx, run, x, _):
        ctx.run = run
        ctx.random_state = get_random_state(x)
        ctx.save_for_backward(x)
        return run(x)  # inside a Function autograd is off: nothing in here is saved

    @staticmethod
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

    Gradients are those of `run(x)`, to the bit: for x, and for every parameter that
    `run` uses, in its `.grad`. Call `.backward()`, then: `torch.autograd.grad` does not
    see what happens in here. Dropout repeats itself, since the random state (of the
    CPU, or of x's GPU) is put back; autocast is not. Returns what `run` returns, one
    tensor.
    """
    # Autograd runs a backward only where an input wants a gradient. If x wants none (it
    # came from data, or from a frozen layer), the parameters inside still do: an empty
    # tensor that wants one stands in for them.
    return Checkpoint.apply(run, x, torch.empty(0, requires_grad=True))


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
    again, their insides are free.
    """
    num_checkpointed = len(blocks) - num_kept
    if num_checkpointed:
        first = blocks[:num_checkpointed]
        x = checkpoint_segments(first, x, positions, attend, num_checkpointed)
    return run_blocks(blocks[num_checkpointed:], x, positions, attend)


def segments_peak_bytes(
    num_layers: int, num_segments: int, edge_bytes: int, block_bytes: int
) -> int:
    """What `checkpoint_segments` has to hold: an edge a segment, and one inside.

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
    num_layers: int, edge_bytes: int, block_bytes: int, budget_bytes: int
) -> int:
    """The most blocks that `keep_last_blocks` may keep within `budget_bytes`.

    Each block costs its edge if it is checkpointed and its inside if it is kept. Keeping
    one costs nothing extra: the backward pass needs room for one inside anyway. Raises
    ValueError where even that does not fit.

    >>> blocks_to_keep(8, edge_bytes=1, block_bytes=10, budget_bytes=40)  # 5 + 3 * 10
    3
    """
    smallest = (num_layers - 1) * edge_bytes + block_bytes
    if budget_bytes < smallest:
        raise ValueError(
            f"budget_bytes: expected at least {smallest}, got {budget_bytes}"
        )

    num_kept = 1 + (budget_bytes - smallest) // (block_bytes - edge_bytes)
    return min(num_kept, num_layers)


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
