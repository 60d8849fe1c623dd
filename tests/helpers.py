"""What several tests share: tolerances, small models, and a pool to attend over."""

import math
import os
import random
import sys
from collections.abc import Callable, Collection, Hashable
from types import FrameType, ModuleType

import pytest
import torch

from lib.config import ModelConfig
from lib.kv_cache import PLAIN, KVCache, KVCacheByLayer, KVFormat
from lib.latent_kv_cache import LatentFormat
from lib.model import Transformer
from lib.paged_attention import paged_decode_gather
from lib.quantized_kv_cache import QuantizedFormat

# Largest difference that rounding explains, by dtype: absolute, for values of about 1.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}

only_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="asks what Linux alone has: /proc, its sandboxes"
)
needs_interrupts = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="no process can be sent an interrupt here"
)

NOWHERE = 2147480000  # a block id behind the end of a table


def assert_close(got: torch.Tensor, expected: torch.Tensor):
    """Same shape, and equal up to the rounding of the coarser of the two dtypes."""
    assert got.shape == expected.shape, (
        f"expected {tuple(expected.shape)}, got {tuple(got.shape)}"
    )
    tolerance = max(TOLERANCES[got.dtype], TOLERANCES[expected.dtype])
    difference = (
        (got.double() - expected.double()).abs().max().item() if got.numel() else 0.0
    )
    assert difference <= tolerance, (
        f"expected at most {tolerance} apart, got {difference}"
    )


class Interrupt:
    """KeyboardInterrupt at a line that the code of some modules runs, its number `when`
    from 0. One that comes at the end of `with torch.no_grad()` leaves gradients off: they
    are put back.

    where: the name and number of that line, None as long as it was not reached.
    """

    def __init__(self, when: int, modules: Collection[ModuleType]):
        self.lines_left, self.where = when, None
        self.files = {module.__file__ for module in modules}

    def __enter__(self) -> "Interrupt":
        self.before, self.has_grad = sys.gettrace(), torch.is_grad_enabled()
        sys.settrace(self.enter_function)
        return self

    def enter_function(self, frame: FrameType, event: str, arg: object):
        return self.at_line if frame.f_code.co_filename in self.files else None

    def at_line(self, frame: FrameType, event: str, arg: object):
        if event == "line" and self.where is None:
            self.lines_left -= 1
            if self.lines_left < 0:
                self.where = f"{frame.f_code.co_name}, line {frame.f_lineno}"
                raise KeyboardInterrupt
        return self.at_line

    def __exit__(self, *_):
        sys.settrace(self.before)
        torch.set_grad_enabled(self.has_grad)


def begun(cache: KVCache, batch_size: int) -> KVCache:
    """The cache, in which requests 0 to batch_size - 1 have begun."""
    for request_id in range(batch_size):
        cache.begin(request_id)
    return cache


def random_ids(rng: random.Random, num_tokens: int, vocab_size: int) -> torch.Tensor:
    """int64 (num_tokens,), below vocab_size."""
    return torch.tensor([rng.randrange(vocab_size) for _ in range(num_tokens)]).long()


def random_heads(
    config: ModelConfig, rng: random.Random, num_tokens: int
) -> list[list[torch.Tensor]]:
    """q (N, H, D) and k, v (N, G, D) for each layer, in float64; q is so large that
    attention chooses."""
    generator = torch.Generator().manual_seed(rng.randrange(10**9))
    sizes = (config.num_heads, 4), (config.num_kv_heads, 1), (config.num_kv_heads, 1)
    return [
        [
            size
            * torch.randn(
                num_tokens, n, config.head_dim, generator=generator, dtype=torch.float64
            )
            for n, size in sizes
        ]
        for _ in range(config.num_layers)
    ]


def take(
    cache: KVCache,
    counts: list[int],
    heads: list[list[torch.Tensor]],
    after_layer: Callable[[int], None] = lambda layer: None,
) -> list[torch.Tensor]:
    """A step through all layers, over heads of each: what attention gives in each."""
    outs = []
    with cache.extend(torch.tensor(counts)) as attend:
        for layer, x in enumerate(heads):
            outs.append(attend(layer, *x))
            after_layer(layer)
    return outs


def contents(cache: KVCacheByLayer) -> tuple:
    """All that a cache knows, in plain numbers."""
    kept = [[[x.tolist() for x in layer] for layer in row] for row in cache._kept]
    return list(cache.request_ids), cache.seq_lens.tolist(), cache.used_bytes, kept


def of_request(cache: KVCacheByLayer, request_id: Hashable) -> list:
    """What each layer keeps of a request, in plain numbers."""
    return contents(cache)[-1][cache.request_ids.index(request_id)]


def random_format(config: ModelConfig, k_rank: int, v_rank: int) -> LatentFormat:
    """Orthonormal bases in float64, others in each layer and for keys and values."""
    generator = torch.Generator().manual_seed(0)
    heads = config.num_kv_heads, config.head_dim
    bases = []
    for rank in (k_rank, v_rank):
        width = heads[0] * heads[1]
        x = torch.randn(
            config.num_layers, width, width, generator=generator, dtype=torch.float64
        )
        bases.append(torch.linalg.qr(x).Q[:, :rank].unflatten(-1, heads))
    return LatentFormat(*bases)


def as_kept(
    format: KVFormat, layer: int, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is left of keys and values (S, G, D) in this format: an oracle, by other means
    than those of the library."""
    if format is PLAIN:
        return k, v
    if isinstance(format, QuantizedFormat):
        k_bits, v_bits = format.bits
        return in_steps(k, k_bits), in_steps(v, v_bits)
    k_basis, v_basis = (
        bases[layer].flatten(1).to(k) for bases in (format.k_bases, format.v_bases)
    )
    projected = [
        (x.flatten(1) @ (basis.T @ basis)).view(x.shape)
        for x, basis in ((k, k_basis), (v, v_basis))
    ]
    return projected[0], projected[1]


def in_steps(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x (..., D), each vector's numbers moved to the nearest of 2^bits equal steps."""
    low, high = x.min(-1, keepdim=True).values, x.max(-1, keepdim=True).values
    step = (high - low) / (2**bits - 1)
    return torch.where(step > 0, low + step * ((x - low) / step).round(), x)


# Of three requests the new tokens: prefill, in pieces, decodes, and some that rest.
STEPS = [[5, 0, 9], [1, 7, 0], [1, 1, 1], [4, 1, 0]]


def run_steps(
    cache: KVCache, steps: list[list[int]] = STEPS, kept: KVFormat = PLAIN
) -> list[torch.Tensor]:
    """What attention gives in each step and layer over random keys and values, of so many
    new tokens of each request; over what a format leaves of them, if one is given."""
    config, outs = cache.config, []
    generator = torch.Generator().manual_seed(0)
    heads = config.num_heads, config.num_kv_heads, config.num_kv_heads
    for counts in steps:
        with cache.extend(torch.tensor(counts)) as attend:
            for layer in range(config.num_layers):
                q, k, v = (
                    torch.randn(sum(counts), n, config.head_dim, generator=generator)
                    for n in heads
                )
                q, k, v = (x.to(cache.dtype) for x in (q, k, v))
                outs.append(attend(layer, q, *as_kept(kept, layer, k, v)))
    return outs


def filled(cache: KVCache, lens: dict[Hashable, int]) -> KVCache:
    """The cache, in which requests of these lengths have begun; keys and values are 0."""
    for request_id in lens:
        cache.begin(request_id)
    counts = [lens.get(request_id, 0) for request_id in cache.request_ids]
    N, config = sum(counts), cache.config
    q = torch.zeros(N, config.num_heads, config.head_dim, dtype=cache.dtype)
    k = torch.zeros(N, config.num_kv_heads, config.head_dim, dtype=cache.dtype)
    with cache.extend(torch.tensor(counts)) as attend:
        for layer in range(config.num_layers):
            attend(layer, q, k, k)
    return cache


def random_model(
    seed: int = 0, dtype: torch.dtype = torch.float32, **changes
) -> Transformer:
    """A small random model in eval mode; weights large enough for logits that
    differ.
    """
    sizes = {
        "vocab_size": 256,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "d_model": 32,
        "d_ff": 64,
        "max_seq_len": 128,
    }
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model.to(dtype).eval()


def attentive_model(bad_id: int, **sizes) -> Transformer:
    """A random model, in float64, in which what came before decides, and not the last
    token alone: so whoever errs in attention is seen. The embedding of bad_id is NaN: a
    text that has it has no numbers, and no text gets it greedily."""
    model = random_model(
        dtype=torch.float64, d_model=16, d_ff=16, max_seq_len=64, **sizes
    )
    with torch.no_grad():
        for block in model.blocks:
            block.attention.q_proj.weight.mul_(4)
            block.attention.v_proj.weight.mul_(10)
            block.attention.o_proj.weight.mul_(10)
        model.embed.weight[bad_id] = torch.nan
        model.unembed[-1].weight[bad_id] = 0
        # Its logit is 0, and the first one's is that of the others, so that one of these
        # is larger: it is never drawn greedily.
        model.unembed[-1].weight[0] = -model.unembed[-1].weight[1]
    return model


def paged(case, dtype=torch.float64, seed=0, device="cpu"):
    """Inputs of paged_decode: shuffled tables, tails that exist nowhere, NaN if dead.

    case: lengths, (H, G), D, block_size. The same numbers on every device.
    """
    lens, (H, G), D, block_size = case
    torch.manual_seed(seed)
    counts = [math.ceil(seq_len / block_size) for seq_len in lens]
    num_blocks = sum(counts) + 3
    pool = torch.full((2, num_blocks, block_size, G, D), torch.nan, dtype=dtype)
    block_tables = torch.full((len(lens), max(counts) + 1), NOWHERE, dtype=torch.int32)
    block_ids = torch.randperm(num_blocks, dtype=torch.int32)
    for row, count, seq_len in zip(block_tables, counts, lens):
        row[:count], block_ids = block_ids[:count], block_ids[count:]
        for i, block_id in enumerate(row[:count].tolist()):
            filled = min(block_size, seq_len - i * block_size)
            pool[:, block_id, :filled] = torch.randn(2, filled, G, D).to(dtype)
    q = torch.randn(len(lens), H, D).to(dtype)
    inputs = q, *pool, block_tables, torch.tensor(lens, dtype=torch.int32)
    return tuple(x.to(device) for x in inputs)


def prefilled(case, dtype=torch.float64, device="cpu"):
    """Inputs of paged_prefill. case: lengths, new tokens of each, and as of `paged`."""
    lens, query_lens, *shape = case
    q, *rest = paged((lens, *shape), dtype, device=device)
    q = torch.randn(sum(query_lens), *q.shape[1:]).to(device, dtype)
    return q, *rest, torch.tensor(query_lens, dtype=torch.int32, device=device)


def in_float64(inputs, oracle=paged_decode_gather):
    q, k_cache, v_cache, *index = inputs
    return oracle(q.double(), k_cache.double(), v_cache.double(), *index)


def assert_near(got, inputs, oracle=paged_decode_gather):
    """At most 3 times as far from the result in float64 as torch is in the same dtype."""
    for one, torchs, exact in zip(got, oracle(*inputs), in_float64(inputs, oracle)):
        assert one.shape == exact.shape
        is_finite = exact.isfinite()
        assert torch.equal(one.isfinite(), is_finite), "NaN, or an infinity, came through"
        error, torchs_error = (
            (x.double() - exact)[is_finite].abs().max() if is_finite.any() else 0
            for x in (one, torchs)
        )
        limit = 3 * torchs_error + 1e-5
        assert error <= limit, f"expected at most {limit}, got {error}"
