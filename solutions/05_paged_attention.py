# %% [markdown]
# # 5. Paged attention: read the blocks where they lie
#
# Chapter 4 copies a request's blocks into one piece before it reads them. Here
# attention reads them where they lie. It takes three things: a softmax that
# sees a few keys at a time, a look-up in the block table, and a mask where the
# text ends. Together they are one **kernel** of some forty lines, a program for
# a GPU, in Triton, the language in which `torch.compile` writes its own.
#
# You need no GPU. Without one the kernel is **interpreted**, slowly, line by
# line, and we also compile it, for GPUs that are not there, and look at what
# they would run.
#
# **You need:** chapters 3 and 4, and 180 minutes. Triton is for Linux (on
# Windows: WSL). Elsewhere this page runs as well, with the kernel's twin in
# torch, and the kernels' checks say what they need.
#
# **You will be able to**
#
# - compute attention over keys that come in pieces, and merge partial results,
# - write a Triton kernel: load a row, mask a tail, gather by a table, multiply,
# - say why several query heads belong into one program, and why long texts need
#   several programs,
# - read what a compiler made of it: registers, shared memory, tensor cores,
# - predict the bytes that attention moves, and what they mean on a roofline.

# %%
import functools
import json
import math
import re
from collections.abc import Iterable

import torch
from IPython.display import Markdown

from lib import (
    generate, kv_cache, model, paged_attention, paged_kv_cache, text,
    training,
)
from lib.figures import drawing, plotting
from lib.measure import bench_attention, columns, gpu_code, meter, table
from lib import paged_attention_triton as kernels
from lib.block_manager import BlockManager
from lib.config import LLAMA3_8B, ModelConfig
from lib.course.check import check
from lib.model import attend_fused
from lib.paged_attention import paged_decode_gather, paged_decode_online
from lib.paged_attention_triton import LOG2_E, tl, triton
from lib.paged_kv_cache import PagedKVCache

plotting.use_course_style()
torch.set_num_threads(1)  # steadier timings
torch.manual_seed(0)
device = "cuda" if bench_attention.can_compile_kernels() else "cpu"

# %% [markdown]
# (`triton` and `tl`, its language, come by way of our module, which has a
# stand-in for them where there is no Triton. Elsewhere you write
# `import triton` and `import triton.language as tl`.)
#
# ## Moved three times to be read once
#
# One layer's attention in one step of decoding, for eight requests of 2,048
# tokens, on this machine. *Contiguous* reads dense pieces, *gather* copies the
# blocks into dense pieces first.

# %%
rows = bench_attention.bench_attention(
    [2048], [8], device=device, dtype=bench_attention.DTYPES[device], repeats=5
)
seconds = {row["name"]: row["median_seconds"] for row in rows}
for name in ("contiguous", "gather"):
    print(f"{name:10} {1000 * seconds[name]:6.2f} ms")
ratio = seconds["gather"] / seconds["contiguous"]
print(f"with a gather it takes {ratio:.1f} times as long")

# %% [markdown]
# A block is read, its copy is written, the copy is read: three times the
# traffic. Where attention waits for memory, as on a GPU it should (we come to
# why), it can take three times as long. Here it is less; how much less depends
# on where the memory for the copy comes from. The shape of Llama 3 8B, the same
# eight requests, with the memory bandwidth that NVIDIA publishes for its A100
# (80 GB, SXM):

# %%
A100_BYTES_PER_S = 2039e9  # published, not measured here
cache_bytes = 8 * kv_cache.kv_cache_bytes(LLAMA3_8B, 2048, bytes_per_number=2)
for name, times in (("in place", 1), ("gather", 3)):
    least_ms = 1000 * times * cache_bytes / A100_BYTES_PER_S
    print(f"{name:8} {times * cache_bytes / 1e9:.1f} GB, ", end="")
    print(f"{least_ms:.1f} ms at least")

# %% [markdown]
# ## Six tokens in two tiles, by hand
#
# What stands in the way is the softmax. A weight is exp(score) divided by the
# sum over *all* keys, and so that no exp becomes infinite, the largest of *all*
# scores is subtracted first. Who sees only a few keys at a time, a **tile**,
# knows neither.
#
# So we keep three running numbers: the largest score so far (`row_max`), the
# sum of all exp(score - row_max) so far (`row_sum`), and the sum of the values
# under these weights (`acc`). When a tile brings a larger score, what was
# summed up before was too large by exp(new - old): multiply it by
# exp(old - new), and go on. At the end divide, once.
#
# Six scores and six values, a tile of four and a tile of two:

# %%
scores = torch.tensor([1.0, 3.0, 2.0, 0.0, 5.0, 1.0])
values = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0, 60.0])
row_max, row_sum, acc = torch.tensor([-math.inf, 0.0, 0.0])
for tile in (slice(0, 4), slice(4, 6)):
    new_max = torch.maximum(row_max, scores[tile].max())
    rescale = torch.exp(row_max - new_max)
    weights = torch.exp(scores[tile] - new_max)
    row_sum = row_sum * rescale + weights.sum()
    acc = acc * rescale + weights @ values[tile]
    row_max = new_max
    print(f"rescaled by {rescale:.3f}: row_max {row_max:.0f}, ", end="")
    print(f"row_sum {row_sum:.3f}, acc {acc:.2f}")
print(f"{acc / row_sum:.4f}, by softmax {scores.softmax(0) @ values:.4f}")

# %% [markdown]
# (The first tile rescales by exp(-inf) = 0 what is 0 anyway.) This is the
# **online softmax**, and with it no more than one tile's scores need be stored.
# One number more is useful: **logsumexp**, the logarithm of the sum of all
# exp(score), which is `row_max + log(row_sum)`. It says how much weight there
# was in all.
#
# ### Exercise 5.1 · `attend_online` ★★ (20 minutes)
#
# Attention for one token: its queries, already divided by √D, over keys and
# values that come tile by tile. The tiles come once, and you may keep no more
# than one. Scores are given; as in chapter 3, query heads that read the same
# keys are the rows of one matrix.

# %% exercise="attend_online" given="1 tile"
from lib.paged_attention import attend_online

# %%
check(attend_online)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Six lines as above, with `torch.maximum(row_max, scores.amax(dim=-1,
# keepdim=True))` for the new maximum, (H, 1). The weighted values: bring the
# weights into the shape (G, H/G, S), multiply by `v.transpose(0, 1)`, and
# `flatten(0, 1)` to (H, D).
#
# </details>
# <details><summary>Hint 2</summary>
#
# Without tiles `row_sum` is 0. Divide by `row_sum.clamp(min=...)`, with the
# smallest number of the dtype, `torch.finfo(q.dtype).tiny`: acc is 0 then, and
# so is out.
#
# </details>

# %% [markdown]
# A block is a tile. So this is attention that reads blocks where they lie, in
# torch: for each request `paged_decode_online` hands you views of its blocks.
# Three requests, with the gather and without. The peak is what is alive at one
# time, beside what was there before:

# %%
def random_pool(seq_lens, H, G, D, block_size=16, dtype=torch.float32):
    """Queries, shuffled blocks, tables and lengths: what paged_decode takes."""
    counts = [math.ceil(seq_len / block_size) for seq_len in seq_lens]
    pool = torch.randn(2, sum(counts), block_size, G, D).to(device, dtype)
    tables = torch.zeros(len(seq_lens), max(counts), dtype=torch.int32)
    block_ids = torch.randperm(sum(counts), dtype=torch.int32).split(counts)
    for row, ids in zip(tables, block_ids):
        row[:len(ids)] = ids
    q = torch.randn(len(seq_lens), H, D).to(device, dtype)
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    return q, *pool, tables.to(device), lens


inputs = random_pool([700, 37, 1300], H=8, G=2, D=64)
expected = paged_decode_gather(*inputs)
for decode in (paged_decode_gather, paged_decode_online):
    cost = meter.measure(lambda: decode(*inputs))
    error = (cost.value[0] - expected[0]).abs().max()
    print(f"{decode.__name__:20} {cost.peak_bytes:9,} bytes, ", end="")
    print(f"off by {error:.0e}")

# %% [markdown]
# The same numbers. The gather's peak is the longest request, copied for each
# query head; in place there is a block's scores, and three running numbers. But
# look at what it does: a loop in Python, a dozen small operations for sixteen
# tokens. We want all of it in one go, on the machine that has the bandwidth.
#
# ## A kernel is a few lines that run many times
#
# A GPU runs the same **program** many times at once. All are given
# the same arguments; a program asks which one it is, and works out its share
# from that. And it is given no tensors but addresses, **pointers** to a first
# number; where the rest lies, it computes. A pointer plus `tl.arange` is that
# many addresses at once. In Triton:
#
# - `tl.program_id(0)`: which program am I?
# - `tl.arange(0, TILE)`: the numbers 0 to TILE - 1, at once. TILE must be a
#   power of two, and known when the kernel is compiled: `tl.constexpr`.
# - `tl.load(pointer + offsets, mask=..., other=0.0)`: the numbers at these
#   places. Where the mask is False nothing is touched, and `other` comes back;
#   without `other`, anything may.
# - `tl.store(pointer + offsets, numbers, mask=...)`: the way back.
#
# `kernel[(N,)](...)` launches N programs, with ids 0 to N - 1.
#
# ### Exercise 5.2 · `load_row_kernel` ★ (15 minutes)
#
# Program n copies row n of x into row n of out, which is a power of two wide,
# and fills it up with zeros. Two rows of x lie `x_stride` numbers apart, which
# may be more than `num_cols`: what lies between them is somebody else's, and
# not to be read.

# %% exercise="load_row_kernel" given="locate"
from lib.paged_attention_triton import load_row_kernel

# %%
check(load_row_kernel)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The row begins at `x_ptr + row * x_stride`. Its numbers are at `+ col`, which
# makes TILE addresses of one.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `mask=col < num_cols` and `other=0.0` when loading. When storing, no mask:
# the zeros are to be stored too.
#
# </details>

# %% [markdown]
# The check runs a kernel without a GPU, counts what it loads, and then compiles
# it for one. (The interpreter is not strict: it takes things that no GPU could
# run.) As always, what passes takes the library's place: `kernels.pad_rows`
# launches your kernel now. Three rows of five, cut out of rows of seven:

# %%
if kernels.HAS_TRITON:
    wide = torch.arange(21.0, device=device).view(3, 7)
    print(kernels.pad_rows(wide[:, :5]))

# %% [markdown]
# ## Look up the block
#
# ### Exercise 5.3 · `gather_kernel` ★★ (15 minutes)
#
# Program p copies the token at position p, all its heads, out of the pool into
# its row of out. You know where it lies: block `block_table[p // block_size]`,
# place `p % block_size`. The table's ids are numbers in memory, so they are
# loaded like any others. The copy is given; it needs `slot`.

# %% exercise="gather_kernel" given="locate copy"
from lib.paged_attention_triton import gather_kernel

# %%
check(gather_kernel)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `tl.load(block_table_ptr + position // block_size)` is one number. Make it
# `.to(tl.int64)`: id times block size times numbers a token may pass 2^31.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `slot` counts all places of the pool through, as in chapter 4.
#
# </details>

# %%
def count(function):
    """What its kernels moved; None where they are not interpreted."""
    is_known = kernels.HAS_TRITON and kernels.IS_INTERPRETED
    return meter.measure_traffic(function) if is_known else None


q, k_cache, v_cache, tables, lens = random_pool([40], H=1, G=2, D=16)
if kernels.HAS_TRITON:
    moved = count(lambda: kernels.gather_kv(k_cache, v_cache, tables[0], 40))
    dense = kernels.gather_kv(k_cache, v_cache, tables[0], 40)
    twin = paged_kv_cache.gather_kv(k_cache, v_cache, tables[0], 40)
    print("the same as in torch:", all(map(torch.equal, dense, twin)))
    if moved:
        print(f"{moved.read_bytes:,} bytes of keys and values read, ", end="")
        print(f"{moved.written_bytes:,} written, {moved.index_bytes} of ids")

# %% [markdown]
# That is the copy of chapter 4 as a kernel. Now without the copy.
#
# ## One program for all heads that read the same keys
#
# Which work is one program's? A request and a KV head. All the query heads that
# read this KV head belong to the same program: it loads each key once, for all
# of them, and their scores are *one* product of two matrices, queries (rows) by
# keys (columns). GPUs have units for that, **tensor cores**, and `tl.dot` uses
# them. They multiply 16 rows at a time, and a tile's sides are powers of two.
# So the `GROUP_SIZE` query heads are padded to `ROWS`, the `HEAD_DIM` numbers
# to `COLS`, and masks keep out what is not there. Here are 16 queries, 32 keys,
# and what you need for two dimensions: `[:, None]` makes a column of addresses,
# `[None, :]` a row, and their sum is all of them.

# %%
@triton.jit
def scores_kernel(
    q_ptr,  # (ROWS, COLS)
    k_ptr,  # (TILE, COLS)
    scores_ptr,  # (ROWS, TILE)
    row_max_ptr,  # (ROWS,)
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILE: tl.constexpr,
):
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    token = tl.arange(0, TILE)
    q = tl.load(q_ptr + row[:, None] * COLS + col[None, :])
    k = tl.load(k_ptr + token[:, None] * COLS + col[None, :])
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    scores = tl.where(token[None, :] < 30, scores, float("-inf"))
    tl.store(scores_ptr + row[:, None] * TILE + token[None, :], scores)
    tl.store(row_max_ptr + row, tl.max(scores, axis=1))


q, k = torch.randn(16, 64, device=device), torch.randn(32, 64, device=device)
scores, row_max = torch.empty(16, 32).to(q), torch.empty(16).to(q)
if kernels.HAS_TRITON:
    scores_kernel[(1,)](q, k, scores, row_max, ROWS=16, COLS=64, TILE=32)
    error = (row_max - (q @ k.T)[:, :30].amax(dim=1)).abs().max()
    print(f"the largest scores, off by {error:.0e}")

# %% [markdown]
# (The last two keys are masked, as at the end of a text. By default `tl.dot`
# multiplies fp32 in less than full precision; `input_precision="ieee"` asks for
# all of it.)
#
# A program goes through its keys in tiles of `TILE` tokens, which have nothing
# to do with the size of a block: the block is looked up for each token. A text
# may also be shared among several programs, each with some of the tiles. We
# come to that below; a picture of it now.

# %%
manager = BlockManager(num_blocks=14, block_size=4)
for name, num_tokens in (("a", 5), ("b", 7), ("c", 9)):
    manager.allocate(name, num_tokens)
manager.free("a")
for name, num_tokens in (("b", 1), ("c", 6), ("b", 18)):
    manager.append(name, num_tokens)
drawing.draw_reads(
    manager, "b", tile=8, num_splits=2,
    title="Two programs share the keys of one request",
);

# %% [markdown]
# *Request b, 26 tokens. Each program looks its blocks up in the table, and
# reads them where they lie. Block 1 and others are c's, or free.*
#
# ### Exercise 5.4 · `paged_decode_kernel` ★★★ (40 minutes)
#
# It is `attend_online` once more, with the look-up of `gather_kernel` and the
# mask of `load_row_kernel`. Four steps are yours:
#
# - **look up**: the `block_id` (int64) and the `place` in it, for a whole tile
#   of positions at once. Behind the last token the table holds anything:
#   load under `mask=is_token`.
# - **gather**: `k` and `v`, (TILE, COLS) each. `k_at` has an address for each
#   token; with `[:, None]` it becomes a column, and `col[None, :]` a row. The
#   mask is `is_there`. What is dead may be NaN, and a weight of 0 does not save
#   you: 0 times NaN is NaN.
# - **score**: as in `scores_kernel`, (ROWS, TILE), times `scale_log2_e`. Scores
#   of tokens that are not there are -inf.
# - **rescale**: as in `attend_online`, with `tl.maximum`, `tl.max(..., axis=1)`
#   and `tl.sum(..., axis=1)`.
#
# Two things are new. A GPU has an instruction for 2 to the power of x, not for
# e to the power of x. So scores come multiplied by log2(e), and `tl.exp2` takes
# the place of exp; the last step turns `logsumexp` back. And `tl.dot` wants
# both sides of one dtype: weights are fp32, values may not be. (`UPCAST` is
# given: it is on for fp32, and in the interpreter, which computes bf16 wrongly.
# Each tensor comes with its strides, since none has to lie in one piece. And
# `start` and `end` are this program's share of the text.)
#
# The check runs the kernel in the interpreter, counts what it reads, and
# compiles it for a GPU: about half a minute, in which nothing is printed.

# %% exercise="paged_decode_kernel" given="1 2 3 4 6 8 11"
from lib.paged_attention_triton import paged_decode_kernel

# %%
check(paged_decode_kernel)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `tl.load(block_tables_ptr + b * table_stride_b + position // block_size,
# mask=is_token, other=0)`; and for keys `tl.load(k_cache_ptr + k_at[:, None] +
# col[None, :], mask=is_there, other=0.0)`. Scores: `tl.where(is_token[None, :],
# scores, float("-inf"))`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `tl.max(scores, axis=1)` and `tl.sum(weights, axis=1)` are (ROWS,). With
# `[:, None]` they are a column beside (ROWS, TILE) or (ROWS, COLS). The second
# product: `tl.dot(weights.to(v.dtype), v, input_precision="ieee")`.
#
# </details>

# %% [markdown]
# ## It computes the same thing
#
# Against the gather of chapter 4, in blocks of many sizes, with lengths that
# end anywhere:

# %%
for block_size in (1, 8, 16, 100):
    inputs = random_pool([130, 1, 64], H=4, G=2, D=20, block_size=block_size)
    got, expected = kernels.paged_decode(*inputs), paged_decode_gather(*inputs)
    error = (got[0] - expected[0]).abs().max()
    print(f"blocks of {block_size:3}: off by {error:.0e}")

# %% [markdown]
# And now the whole way: the trained model, chapter 4's cache, and in each step
# of decoding, in each layer, your kernel. (The prompt, many tokens at once, is
# still gathered.) Beside it chapter 1, which computes everything again.

# %%
lm = model.load_model().to(device)
book_ids = text.encode(text.load_book()).to(device)
prompts = [book_ids[start:start + n] for start, n in ((1000, 20), (7000, 33))]
cache = PagedKVCache(
    lm.config, num_blocks=8, device=device, decode=kernels.paged_decode
)
for request_id in range(2):
    cache.begin(request_id)
texts = generate.generate_cached(lm, prompts, 16, cache, temperature=0)
for prompt_ids, token_ids in zip(prompts, texts):
    expected = generate.generate_recompute(lm, prompt_ids, 16, temperature=0)
    new_text = text.decode(token_ids[len(prompt_ids):].cpu())
    is_same = torch.equal(token_ids, expected)
    print(f"{new_text!r}, the same as by recompute: {is_same}")

# %% [markdown]
# ## One long text, and nobody to help
#
# One program for each request and KV head: a single request to Llama 3 8B makes
# eight programs a layer. NVIDIA counts 108 processors in an A100, and 132 in an
# H100 (SXM). A hundred of them would watch eight read a long text. So its keys
# are shared out, and `num_splits` programs each attend to some of them. What
# each has in the end is attention over its own share, divided by its own sum.
# How do these become one?
#
# ### Exercise 5.5 · `merge_splits` ★★★ (20 minutes)
#
# P partial results of each head, `outs`, and the `logsumexps` of their shares.
# Return out and logsumexp over all keys. A share may be empty: out 0 and
# logsumexp -inf.

# %% exercise="merge_splits"
from lib.paged_attention import merge_splits

# %%
check(merge_splits)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A part's out times its sum, exp(logsumexp), is what it was before it was
# divided. Add these up, add the sums up, divide. What does that remind you of?
#
# </details>
# <details><summary>Hint 2</summary>
#
# The parts' weights are the softmax of their logsumexps, and the new logsumexp
# is that of the parts' logsumexps: `.logsumexp(dim=-1)`. Where all parts are
# empty, softmax gives NaN.
#
# </details>

# %% [markdown]
# So attention over parts is merged by attention over the parts: a softmax
# again. Three shares of unequal size, of one request, and all keys at once:

# %%
q, k_cache, v_cache, tables, _ = random_pool([90], H=4, G=2, D=16)
k, v = paged_kv_cache.gather_kv(k_cache, v_cache, tables[0], 90)
shares = [(k[a:b], v[a:b]) for a, b in ((0, 50), (50, 60), (60, 90))]
parts = [paged_attention.attend_online(q[0], [share]) for share in shares]
outs, logsumexps = (torch.stack(x, dim=1)[None] for x in zip(*parts))
merged, _ = paged_attention.merge_splits(outs, logsumexps)
whole, _ = paged_attention.attend_online(q[0], [(k, v)])
print(f"{len(parts)} parts, merged: off by {(merged - whole).abs().max():.0e}")

# %% [markdown]
# Your kernel does its part already: look at its first lines, `start` and `end`,
# and at the last, which write to the place of their share. A second kernel
# merges, like yours.

# %%
inputs = random_pool([200, 1, 70], H=4, G=2, D=16)
expected = paged_decode_gather(*inputs)[0]
for num_splits in (1, 2, 4):
    got, _ = kernels.paged_decode(*inputs, num_splits=num_splits)
    error = (got - expected).abs().max()
    print(f"{num_splits} programs a text: off by {error:.0e}")

# %% [markdown]
# ## What a GPU would run
#
# Triton brings the compilers, so your kernel can be compiled here, for GPUs
# that are not. For the heads of Llama 3 8B, in bf16: a **register** holds
# 32 bits of one of the program's threads; **shared memory** belongs to all of
# them; what finds no register is **spilled** to memory, and slow.

# %%
codes = {}
if kernels.HAS_TRITON:
    gpus = {"A100": "sm_80", "H100": "sm_90"}
    for name, gpu in gpus.items():
        code = codes[name] = gpu_code.compile_decode(gpu)
        print(f"{name} {code.registers} registers a thread, ", end="")
        print(f"{code.spilled_bytes} bytes spilled, ", end="")
        print(f"{code.shared_bytes:,} bytes of shared memory")

# %% [markdown]
# Nothing is spilled, which is what we look for: a thread of these GPUs
# has 255 registers at most, and the more a program takes, the fewer programs a
# processor holds at once. And this is a piece of it, the machine code for the
# A100 around its first matrix product. `HMMA` is the tensor cores' instruction:
# a product of 16 by 16 and 16 by 8 numbers in bf16, summed up in fp32. `LDSM`
# brings numbers from shared memory into registers, R36 and others; RZ is a
# zero.

# %%
if codes:
    assembly = codes["A100"].assembly
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", assembly)
    products = [i for i, line in enumerate(instructions) if "HMMA" in line]
    print(f"{len(instructions):,} instructions, ", end="")
    print(f"{len(products)} of them HMMA")
    print(*instructions[products[0] - 3:products[0] + 4], sep="\n")

# %% [markdown]
# ## Predict the bytes
#
# ### Exercise 5.6 · `bytes_moved` ★★ (15 minutes)
#
# What must attention move in one step, in one layer, with one program a text?
# Predict it, exactly, for reading in place and for gathering first.

# %% exercise="bytes_moved"
from lib.paged_attention import bytes_moved

# %%
check(bytes_moved)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Of queries and outputs there are B · H · D numbers each. Of keys and values
# there are G · D numbers a token each.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `is_gathered` makes keys and values three times as many. `int(seq_lens.sum())`
# counts the tokens.
#
# </details>

# %% [markdown]
# Predicted, and then counted, load by load and store by store, in the
# interpreter. Gathering is `gather_kernel`, and then `paged_decode_kernel` over
# the dense copy, which is a pool of blocks in order.

# %%
small = ModelConfig(256, 1, 2, 1, d_model=32, d_ff=1, max_seq_len=1)  # D = 16
contexts = [8, 16, 32, 64]
predicted = {
    name: (contexts, [
        paged_attention.bytes_moved(
            small, torch.tensor([n]), is_gathered=name == "gather"
        )
        for n in contexts
    ])
    for name in ("in place", "gather")
}
counted = {"in place": [], "gather": []}
is_counted = count(lambda: None) is not None
for n in contexts if is_counted else []:
    inputs = random_pool([n], H=2, G=1, D=16)
    in_place = count(lambda: kernels.paged_decode(*inputs))
    copy = count(lambda: kernels.gather_kv(*inputs[1:3], inputs[3][0], n))
    logsumexp_bytes = in_place.value[1].nbytes  # was not predicted
    moved = in_place.read_bytes + in_place.written_bytes - logsumexp_bytes
    gathered = moved + copy.read_bytes + copy.written_bytes
    counted["in place"].append(moved)
    counted["gather"].append(gathered)
    print(f"{n:3} tokens: {moved:6,} and {gathered:6,} bytes, ", end="")
    print(f"and {in_place.index_bytes} of ids and lengths")
for name, numbers in counted.items():
    print(f"{name} as predicted: {numbers == predicted[name][1]}")

# %%
plotting.plot_measured(
    {name: (contexts, y) for name, y in counted.items() if y} or predicted,
    predicted={f"{name}: predicted": xy for name, xy in predicted.items()},
    xlabel="tokens in the cache",
    ylabel="bytes moved in one step, one layer",
    title="Gathering moves up to three times as many bytes",
);

# %% [markdown]
# *Markers: counted. Dashed: predicted.* What is not in the prediction is small:
# an id of 4 bytes for each token and KV head, beside 2 · D numbers.
#
# ## Where that puts it: the roofline
#
# A machine can move so many bytes a second, and compute so many FLOPs a second.
# Work that computes little with each byte waits for the one, work that computes
# much for the other. So plot FLOPs a second over **FLOPs for each byte moved**:
# first a slope, then a roof. Attention in decode computes 4 · H · D FLOPs a key
# (two products, a multiplication and an addition each), and moves 2 · G · D
# numbers. That is 2 · H / G FLOPs a number, whatever the text's length:

# %%
def flops_per_byte(config, bytes_per_number, num_keys=8192):
    flops = 4 * num_keys * config.num_heads * config.head_dim
    keys = torch.tensor([num_keys])
    moved = paged_attention.bytes_moved(config, keys, bytes_per_number)
    return flops / moved


print(f"Llama 3 8B in bf16: {flops_per_byte(LLAMA3_8B, 2):.1f} FLOPs a byte")

# %% [markdown]
# Now this machine: its bandwidth from copying, its roof from a large product,
# both measured. As points: attention in decode, contiguous, as timed at the
# beginning (in fp32 on a processor, so it has half as many FLOPs a byte); and
# the product of one weight matrix with 1, 8, 64 and 512 tokens, which is the
# other half of a step. Dashed are two GPUs, as NVIDIA publishes them.

# %%
dtype = bench_attention.DTYPES[device]
here = bench_attention.one_layer(**bench_attention.SIZES[device])
points = {"attention": (
    flops_per_byte(here, dtype.itemsize, 2048),
    # 8 requests of 2,048 keys, 4 · H · D FLOPs a key
    4 * 8 * 2048 * here.num_heads * here.head_dim / seconds["contiguous"],
)}
W = torch.randn(2048, 2048).to(device, dtype)
for n in (1, 8, 64, 512):
    x = torch.randn(n, 2048).to(device, dtype)
    flops, numbers = 2 * n * W.numel(), W.numel() + 2 * x.numel()
    points[f"W @ {n}"] = (
        flops / numbers / dtype.itemsize,
        flops / bench_attention.cold_seconds(lambda: x @ W, device),
    )
roofs = {
    "this machine": (
        bench_attention.copy_bandwidth(device),
        bench_attention.matmul_flops_per_s(device, dtype),
    ),
    "A100": (A100_BYTES_PER_S, 312e12),  # published: 80 GB, SXM; bf16
    "H100": (3350e9, 989e12),  # published: SXM; bf16
}
plotting.plot_roofline(
    roofs, points, published=["A100", "H100"],
    title="Decoding computes little with each byte",
);

# %%
for name, (bytes_per_s, flops_per_s) in roofs.items():
    print(f"{name:12} {bytes_per_s / 1e9:7.1f} GB/s, ", end="")
    print(f"{flops_per_s / 1e12:7.2f} TFLOP/s: needs ", end="")
    print(f"{flops_per_s / bytes_per_s:.0f} FLOPs a byte to be busy")

# %% [markdown]
# A GPU needs a hundred FLOPs and more for each byte, attention has four: there,
# memory sets the pace. On a processor the corner is far to the left, and our
# attention, many small calls of torch, may lie below the slope: then it is not
# the memory that it waits for.
#
# Two ways lead up the slope. More requests in a batch share the weights: that
# moves W @ 1 to W @ 64, and it is what paging made room for in chapter 4. But
# for a common prompt they do not share keys, so attention stays where it is.
# Its way is a larger group, more query heads for each KV head.
#
# ## How fast it is
#
# `make bench` times the whole model with each cache, and attention alone, by
# context and batch. What is in data/results, and the machine that it came from:

# %%
def plot_bench(path, batch_size=8):
    result = json.loads(path.read_text())
    attention, machine = result["attention"], result["machine"]
    series = {}
    for row in attention["rows"]:
        if row["batch_size"] == batch_size:
            x, y = series.setdefault(row["name"], ([], []))
            x.append(row["context"])
            y.append(100 * row["share_of_copy"])
    is_gpu = attention["device"] == "cuda"
    where = machine["gpu" if is_gpu else "processor"]
    for way in result["results"]:  # the whole model, on the processor
        print(f"{way['name']:10} {way['tokens_per_s']:6.1f} tokens/s, ", end="")
        print(f"{way['batch_size']} requests of {way['context']} tokens")
    plotting.plot_measured(
        series, log_x=True,
        xlabel=f"tokens of a request ({batch_size} requests)",
        ylabel="bandwidth (% of a copy's)",
        title=f"{where}: in place reaches {series['in place'][1][-1]:.0f}% "
        "of a copy's bandwidth",
    )


for path in sorted((text.DATA / "results").glob("bench*.json")):
    plot_bench(path)

# %% [markdown]
# *Each way is charged the same bytes, those that have to move: what gathering
# moves beside them makes it slower, not busier.*
#
# On a processor, in place means the torch twin, block by block, and it loses:
# a dozen calls of torch for sixteen tokens take longer than to copy them. An
# interpreted kernel says nothing about a compiled one, so we do not time it.
# Without a GPU this chapter's win is one of bytes, not of seconds. If you have
# one, `make bench` measures what it makes of them, against its own copies.
#
# ## The whole table, with all of your functions in it
#
# Five columns, five chapters. `check.collect` reads your answers from the other
# notebooks of this folder, as they were saved, and tries them. Those that pass
# are in the table; for what you left out the library stands in. The last column
# is read in place, with your `attend_online`. (The sizes are smaller than those
# of `make table`, which takes a minute; at so few tokens a cache saves no
# seconds yet.)

# %%
check.collect()

# %%
in_place = functools.partial(columns.paged, decode=paged_decode_online)
cells = []
for name in columns.COLUMNS:
    setup = in_place if name == "paged" else None
    sweep = table.sweep(name, sizes=table.SMALL_SIZES, setup=setup)
    cells += table.fit(sweep)
Markdown(table.render(cells, table.SMALL_SIZES))

# %%
check.summary()

# %% [markdown]
# ## Four ways to read fewer bytes
#
# On a GPU, bytes set the pace. So how could there be fewer? Four ideas, each an
# open problem, each with one measurement on our model. To measure what an idea
# costs we put it in at `attend`, and ask how well the model still predicts text
# that it never saw.

# %%
lm = lm.cpu()
_, held_out = text.split_book(book_ids.cpu())
batch = next(text.windows(held_out, batch_size=4, seq_len=512))


@torch.no_grad()
def loss(attend):
    logits = lm(batch, torch.arange(512), attend)
    return training.next_token_loss(logits, batch).item()


def scores_of(q, k):
    """Scores (B, H, T, S), the future -inf, of all queries over all keys."""
    T, H, D = q.shape[-3:]
    k = k.repeat_interleave(H // k.shape[-2], dim=-2).transpose(-3, -2)
    scores = q.transpose(-3, -2) @ k.transpose(-2, -1) / D**0.5
    return scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)


full_loss = loss(attend_fused)
print(f"as it is: {full_loss:.3f} nats per byte")

# %% [markdown]
# ### Fewer KV heads
#
# Our model has 6 query heads on 2 KV heads. With one each, cache and traffic
# would be three times as large; with one for all, half as large.

# %%
kv_heads = [1, 2, 3, 6]
by_heads = [
    paged_attention.bytes_moved(
        ModelConfig(256, 4, 6, G, d_model=192, d_ff=512, max_seq_len=512),
        torch.tensor([512]),
    )
    for G in kv_heads
]
plotting.plot_measured(
    {"": (kv_heads, by_heads)},
    xlabel="KV heads, of 6 query heads",
    ylabel="bytes in one step, one layer",
    title="Bytes follow the number of KV heads",
);

# %%
def one_kv_head(layer, q, k, v):
    k, v = (x.mean(dim=-2, keepdim=True) for x in (k, v))
    return attend_fused(layer, q, k, v)


print(f"both KV heads averaged to one: {loss(one_kv_head):.3f} nats per byte")

# %% [markdown]
# Averaging the heads of a trained model is where Ainslie and others begin, and
# then they train on, for 5% of the training. Without that, it is ruined. What
# is open: how few heads, or how small a shared code for all of them, a model of
# a given size can do with.
#
# ### Fewer keys
#
# How much of a query's attention falls on few keys? For queries in the second
# half of each window, the keys sorted by weight, and the first k added up:

# %%
mass, spectra = {}, {}


def look(layer, q, k, v):
    weights = scores_of(q, k).softmax(dim=-1)[:, :, 256:]
    ranked = weights.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    mass[layer] = ranked.mean(dim=(0, 1, 2))
    spectra[layer] = torch.linalg.svdvals(k[0].flatten(1))  # of (S, G · D)
    return attend_fused(layer, q, k, v)


loss(look)
top = [1, 2, 4, 8, 16, 32, 64, 128, 256]
plotting.plot_measured(
    {
        f"layer {layer}": (top, [100 * ranked[k - 1].item() for k in top])
        for layer, ranked in mass.items()
    },
    xlabel="keys, the heaviest first",
    ylabel="share of the attention (%)",
    title=f"On 4 keys: layer 3 {mass[3][3]:.0%}, layer 0 {mass[0][3]:.0%}",
    log_x=True,
);

# %% [markdown]
# *All but the first layer look at few keys.* A kernel that knew which could
# read only the blocks that hold them. What is open: to know it without reading
# the keys.
#
# ### Fewer numbers a key
#
# The keys of one text, in one layer, are a matrix (S, G · D), 512 by 64 here.
# If it were of low rank, keys could be stored as short codes. Its singular
# values, squared and added up, say how nearly it is:

# %%
energies = {
    layer: 100 * values.square().cumsum(0) / values.square().sum()
    for layer, values in spectra.items()
}
num_needed = {
    layer: int((energy < 90).sum()) + 1 for layer, energy in energies.items()
}
plotting.plot_measured(
    {
        f"layer {layer}": (range(1, 65), energy.tolist())
        for layer, energy in energies.items()
    },
    xlabel="directions, the strongest first",
    ylabel="share of the keys' squared length (%)",
    title=f"{min(num_needed.values())} to {max(num_needed.values())} of 64 "
    "directions hold 90% of the keys",
).set_xticks([1, 16, 32, 48, 64]);

# %% [markdown]
# *No layer needs all 64, but none is done with a few.* (These are keys after
# the rotation by their position, as the cache holds them.) What is open: to
# compress them so that attention can be computed on the codes.
#
# ### A state that does not grow
#
# Without the softmax, attention is q @ (Kᵀ V), divided by the sum of its
# weights. Kᵀ V is a matrix of D by D, however long the text, and the sum needs
# D numbers more: add each token's k vᵀ and k, and forget the token. Beside it,
# the plainest fixed memory: the last W tokens.

# %%
def window(W):
    def attend(layer, q, k, v):
        T, H = q.shape[-3:-1]
        too_old = torch.ones(T, T).tril(-W).bool()
        weights = scores_of(q, k).masked_fill(too_old, -math.inf).softmax(-1)
        v = v.repeat_interleave(H // v.shape[-2], dim=-2).transpose(-3, -2)
        return (weights @ v).transpose(-3, -2)
    return attend


def linear(layer, q, k, v):
    """elu + 1 of queries and keys, in the place of exp of their product."""
    H, G = q.shape[-2], k.shape[-2]
    k, v = (x.repeat_interleave(H // G, dim=-2) for x in (k, v))
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    q, k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
    weights = (q @ k.transpose(-2, -1)).tril()  # as a state would, all at once
    out = weights @ v / weights.sum(dim=-1, keepdim=True)
    return out.transpose(-3, -2)


G, D = lm.config.num_kv_heads, lm.config.head_dim
token_bytes, state_bytes = 2 * G * D * 4, G * (D * D + D) * 4
sizes = [4, 8, 16, 32, 64, 128, 256, 512]
losses = [loss(window(W)) for W in sizes]
linear_loss = loss(linear)
print(f"a state has {state_bytes:,} bytes a layer, as much as ", end="")
print(f"{state_bytes / token_bytes:.1f} tokens in the cache")

# %%
plotting.plot_measured(
    {
        "last tokens": ([W * token_bytes for W in sizes], losses),
        "state": ([state_bytes], [linear_loss]),
    },
    predicted={"everything": (
        [W * token_bytes for W in sizes], [full_loss] * len(sizes)
    )},
    xlabel="bytes kept a layer",
    ylabel="loss (nats per byte)",
    title=f"The last 16 tokens: {losses[2]:.2f}; a state of as many bytes: "
    f"{linear_loss:.2f}",
    log_x=True,
);

# %% [markdown]
# *The model was trained for neither.* With 16 tokens a layer, four layers reach
# back 4 · 15 = 60 bytes, some ten words, and most of what this model can know
# is there. (That the curve does not fall all the way, look at 32 tokens, which
# are 16,384 bytes, warns us: what a model was not trained on it does not do
# smoothly.) The state fails altogether here; models that are trained for one do
# far better. What is open: how much of a long text can be recalled from a state
# that does not grow.
#
# ## What is still wrong
#
# - The prompt is still gathered, and its scores are stored, T by S. A kernel
#   for prefill takes tiles of queries too.
# - Numbers like TILE, and how many programs share a text, were chosen without a
#   GPU at hand. Where there is one, they should be measured.
# - Each step waits for all requests. A server lets them come and go between
#   steps, and packs prompts beside decodes.
#
# ## In five sentences
#
# 1. Softmax can be computed tile by tile, with a running maximum, a running
#    sum, and a rescaling when the maximum grows.
# 2. So attention needs no keys in one piece: it looks up each token's block,
#    and masks what is behind the last token, in loads and in scores.
# 3. One program serves all query heads of a KV head, so that each key is read
#    once, and their scores are one product of matrices.
# 4. A long text is shared among programs, whose results are merged by the
#    softmax of their logsumexps.
# 5. Attention in decode computes 2 · H / G FLOPs with each number it moves, far
#    fewer than a GPU needs to be busy: there, fewer bytes make it faster.
#
# ## Do you recall?
#
# 1. The first tile has a largest score of 7, the second one of 4. By what is
#    `acc` multiplied in between?
# 2. Why is it not enough to give dead tokens a weight of 0?
# 3. Does TILE have to be the block size?
# 4. Two shares have logsumexps 0 and log(4), and outs 10 and 5. What is out
#    over both?
# 5. A batch twice as large: how many FLOPs a byte does attention have then, and
#    how many a weight matrix?
#
# <details><summary>Answers</summary>
#
# 1. By exp(7 - 7) = 1: the maximum stays.
# 2. Their values may be NaN, and 0 times NaN is NaN: they must not be loaded.
# 3. No. The block is looked up for each token of a tile.
# 4. 1/5 of 10 and 4/5 of 5: 6.
# 5. Attention has as many as before, since each request brings its own keys.
#    The matrix has about twice as many, as long as its bytes are most of what
#    moves.
#
# </details>
#
# ## Sources
#
# - Milakov and Gimelshein, *Online normalizer calculation for softmax*, 2018,
#   [1805.02867](https://arxiv.org/abs/1805.02867).
# - Dao and others, *FlashAttention*, 2022,
#   [2205.14135](https://arxiv.org/abs/2205.14135): tiles, on chip.
# - Kwon and others, *PagedAttention*, 2023,
#   [2309.06180](https://arxiv.org/abs/2309.06180): the kernel's idea.
# - Dao and others, *Flash-Decoding for long-context inference*, 2023,
#   [crfm.stanford.edu](https://crfm.stanford.edu/2023/10/12/flashdecoding.html):
#   splits.
# - Tillet and others, *Triton*, 2019,
#   [doi.org/10.1145/3315508.3329973](https://doi.org/10.1145/3315508.3329973).
# - Williams and others, *Roofline*, 2009,
#   [doi.org/10.1145/1498765.1498785](https://doi.org/10.1145/1498765.1498785).
# - Ainslie and others, *GQA*, 2023,
#   [2305.13245](https://arxiv.org/abs/2305.13245): fewer KV heads.
# - Katharopoulos and others, *Transformers are RNNs*, 2020,
#   [2006.16236](https://arxiv.org/abs/2006.16236): the state, and elu + 1.
# - NVIDIA's data sheets of the A100 (80 GB, SXM: 2,039 GB/s, 312 TFLOP/s in
#   bf16) and the H100 (SXM: 3.35 TB/s, 1,979 TFLOP/s with sparsity, half of it
#   without), and its whitepapers for the number of processors.
# - NVIDIA's *CUDA C++ Programming Guide* (technical specifications: 255
#   registers a thread) and *PTX ISA* (`ex2`, and the shape of `mma`).
# - Triton's own documentation, of
#   [tl.dot](https://triton-lang.org/main/python-api/generated/triton.language.dot.html):
#   what `input_precision` is when nobody says.
