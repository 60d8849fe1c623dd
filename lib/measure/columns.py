"""The columns of the table: each way to run the model, and what theory says it costs.

table.py measures them. A chapter that finds a new way to run the model adds one entry to
COLUMNS. Generation begins with one token and writes N more. What makes theory visible
on a small model:

- Attention is fused: stored scores alone would be N² bytes.
- Training runs the blocks alone, and its loss is the sum of their output: unembedding and
  cross entropy do not depend on L and are the same with checkpoints and without.
- Gradients are allocated before the meter starts: they too are the same in every column.
- Nobody knows how long a text will be. The contiguous cache reserves for twice as many
  tokens as come; the paged cache has a pool of as many blocks as it needs.
- With a pruned cache and a state each token goes to the next step and is not kept: the
  8 bytes of its id would be all that grows with N.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

import lib.state
from lib import checkpointing, generate
from lib.config import ModelConfig
from lib.kv_cache import ContiguousKVCache, KVCache
from lib.model import Attend, Transformer, attend_fused
from lib.paged_kv_cache import PagedKVCache
from lib.pruning import HeavyHitters, PrunedKVCache
from lib.state import Linear, StateCache

FIRST_ID = torch.zeros(1, dtype=torch.int64)
BUDGET = 8  # tokens that the pruned cache keeps in each layer: fewer than any N here
CHUNK_SIZE = 8  # tokens: fewer than any N too


@dataclass(frozen=True)
class Growth:
    """factor · N^a · L^b.

    Of FLOPs and calls a factor counts forward passes: checkpointing adds one. (A backward
    pass is worth about two, so a step of training, three, becomes four: a third more
    work.) Of KV memory a factor counts bytes.
    """

    N: float
    L: float
    factor: int = 1

    def __call__(self, num_tokens: int, num_layers: int) -> float:
        return self.factor * num_tokens**self.N * num_layers**self.L

    def __str__(self) -> str:
        """
        >>> str(Growth(2, 0.5, factor=2)), str(Growth(0, 0))
        ('2 N² √L', '1')
        """
        powers = {0: "", 0.5: "√{}", 1: "{}", 2: "{}²", 3: "{}³"}
        factor = "" if self.factor == 1 else str(self.factor)
        terms = [factor, powers[self.N].format("N"), powers[self.L].format("L")]
        return " ".join(term for term in terms if term) or "1"


@dataclass(frozen=True)
class Column:
    # (N, L) -> the call to measure. It returns its KV cache, if it has one.
    setup: Callable[[int, int], Callable[[], KVCache | None]]
    theory: dict[str, Growth]  # by quantity


def random_model(num_layers: int) -> Transformer:
    """d_model 64, random weights: says nothing, but costs what such a model costs."""
    torch.manual_seed(0)
    return Transformer(
        ModelConfig(256, num_layers, 4, 2, d_model=64, d_ff=192, max_seq_len=512)
    )


def training(num_tokens: int, num_layers: int) -> Callable[[], None]:
    return _training_step(num_tokens, num_layers, checkpointing.run_blocks)


def checkpointed(num_tokens: int, num_layers: int) -> Callable[[], None]:
    def run(blocks, x, positions, attend):
        num_segments = math.isqrt(len(blocks))
        return checkpointing.checkpoint_segments(
            blocks, x, positions, attend, num_segments
        )

    return _training_step(num_tokens, num_layers, run)


def chunked(num_tokens: int, num_layers: int) -> Callable[[], None]:
    """Training of a model that has a state instead of softmax attention."""

    def attend(layer, q, k, v):
        (q, k, v), (G, D) = (x.squeeze(0) for x in (q, k, v)), k.shape[-2:]
        decay = k.new_full((G,), 0.97)
        nothing = k.new_zeros(G, D, D)
        out, _ = lib.state.linear_chunked(nothing, q, k, v, decay, CHUNK_SIZE)
        return out.unsqueeze(0)

    return _training_step(num_tokens, num_layers, checkpointing.run_blocks, attend)


def recompute(num_tokens: int, num_layers: int) -> Callable[[], None]:
    model = random_model(num_layers).eval()

    def run():
        generate.generate_recompute(model, FIRST_ID, num_tokens, temperature=0)

    return run


def contiguous(num_tokens: int, num_layers: int) -> Callable[[], KVCache]:
    return _cached(
        num_layers,
        num_tokens,
        lambda config: ContiguousKVCache(
            config, batch_size=1, max_seq_len=2 * num_tokens
        ),
    )


def paged(
    num_tokens: int, num_layers: int, decode: Callable | None = None
) -> Callable[[], KVCache]:
    """decode: as of `PagedKVCache`; None gathers."""
    num_blocks = math.ceil(num_tokens / 16)
    return _cached(
        num_layers,
        num_tokens,
        lambda config: PagedKVCache(
            config, num_blocks=num_blocks, block_size=16, decode=decode
        ),
    )


def pruned(num_tokens: int, num_layers: int) -> Callable[[], KVCache]:
    policy = HeavyHitters(window=4)
    return _streamed(
        num_layers, num_tokens, lambda config: PrunedKVCache(config, 1, BUDGET, policy)
    )


def state(num_tokens: int, num_layers: int) -> Callable[[], KVCache]:
    memory = Linear(decay=0.97)
    return _streamed(num_layers, num_tokens, lambda config: StateCache(config, 1, memory))


def forward(num_tokens: int, num_layers: int) -> Callable:
    """The forward pass of a training step, the unit of a factor: no column of its own."""
    return _blocks_call(num_tokens, random_model(num_layers), checkpointing.run_blocks)


def _cached(num_layers: int, num_tokens: int, make_cache: Callable) -> Callable:
    model = random_model(num_layers).eval()

    def run():
        cache = make_cache(model.config)
        cache.begin(0)
        generate.generate_cached(model, [FIRST_ID], num_tokens, cache, temperature=0)
        return cache

    return run


def _streamed(num_layers: int, num_tokens: int, make_cache: Callable) -> Callable:
    """As `_cached`, but each token is handed on and not kept."""
    model = random_model(num_layers).eval()

    def run():
        cache = make_cache(model.config)
        cache.begin(0)
        ids, one = FIRST_ID, torch.ones(1, dtype=torch.int64)
        for _ in range(num_tokens):
            ids = generate.forward_cached(model, cache, ids, one).argmax(dim=-1)
        return cache

    return run


def _training_step(
    num_tokens: int, num_layers: int, run: Callable, attend: Attend = attend_fused
) -> Callable:
    model = random_model(num_layers)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    call = _blocks_call(num_tokens, model, run, attend)
    return lambda: call().sum().backward()


def _blocks_call(
    num_tokens: int, model: Transformer, run: Callable, attend: Attend = attend_fused
) -> Callable:
    token_ids = torch.zeros(1, num_tokens, dtype=torch.int64)
    positions = torch.arange(num_tokens)
    return lambda: run(model.blocks, model.embed(token_ids), positions, attend)


# Of a token in a layer of random_model: key and value of 2 heads, 16 numbers of 4 bytes.
KV_BYTES = 2 * 2 * 16 * 4
# And what a pruned cache keeps with them: for each head a score, and a position, int64.
PRUNED_BYTES = KV_BYTES + 2 * (4 + 8)
# The state of a layer: 2 heads of 16 times 16 numbers of 4 bytes.
STATE_BYTES = 2 * 16 * 16 * 4


def _fixed_size(bytes_per_layer: int) -> dict[str, Growth]:
    """Of a cache that takes as much memory for any N."""
    return {
        "peak memory": Growth(0, 1),
        "KV bytes reserved": Growth(0, 1, factor=bytes_per_layer),
        "KV bytes used": Growth(0, 1, factor=bytes_per_layer),
        "attention FLOPs": Growth(1, 1),
        "projection FLOPs": Growth(1, 1),
        "forward calls": Growth(1, 0),
        "block calls": Growth(1, 1),
    }


COLUMNS = {
    "training": Column(
        training,
        {
            "peak memory": Growth(1, 1),
            "attention FLOPs": Growth(2, 1),
            "projection FLOPs": Growth(1, 1),
            "forward calls": Growth(0, 0),
            "block calls": Growth(0, 1),
        },
    ),
    "checkpointed": Column(
        checkpointed,
        {
            "peak memory": Growth(1, 0.5),
            "attention FLOPs": Growth(2, 1, factor=2),
            "projection FLOPs": Growth(1, 1, factor=2),
            "forward calls": Growth(0, 0),
            "block calls": Growth(0, 1, factor=2),
        },
    ),
    "chunked": Column(
        chunked,
        {
            "peak memory": Growth(1, 1),
            "attention FLOPs": Growth(1, 1),
            "projection FLOPs": Growth(1, 1),
            "forward calls": Growth(0, 0),
            "block calls": Growth(0, 1),
        },
    ),
    "recompute": Column(
        recompute,
        {
            "peak memory": Growth(1, 0),
            "attention FLOPs": Growth(3, 1),
            "projection FLOPs": Growth(2, 1),
            "forward calls": Growth(1, 0),
            "block calls": Growth(1, 1),
        },
    ),
    "contiguous": Column(
        contiguous,
        {
            "peak memory": Growth(1, 1),
            "KV bytes reserved": Growth(1, 1, factor=2 * KV_BYTES),
            "KV bytes used": Growth(1, 1, factor=KV_BYTES),
            "attention FLOPs": Growth(2, 1),
            "projection FLOPs": Growth(1, 1),
            "forward calls": Growth(1, 0),
            "block calls": Growth(1, 1),
        },
    ),
    "paged": Column(
        paged,
        {
            "peak memory": Growth(1, 1),
            "KV bytes reserved": Growth(1, 1, factor=KV_BYTES),
            "KV bytes used": Growth(1, 1, factor=KV_BYTES),
            "attention FLOPs": Growth(2, 1),
            "projection FLOPs": Growth(1, 1),
            "forward calls": Growth(1, 0),
            "block calls": Growth(1, 1),
        },
    ),
    "pruned": Column(pruned, _fixed_size(BUDGET * PRUNED_BYTES)),
    "state": Column(state, _fixed_size(STATE_BYTES)),
}
