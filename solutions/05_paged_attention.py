# %% [markdown]
# # 5. Paged attention: read the blocks where they lie
#
# Chapter 4 copies a request's blocks into one piece before attention reads
# them. In this chapter attention reads them where they lie. That takes three
# things: a softmax that can work on a few keys at a time, a look-up in the
# block table, and a mask where the text ends. Together they make one
# **kernel** of about forty lines. A kernel is a program for a GPU. Ours is
# written in Triton, the language in which `torch.compile` writes its own.
#
# You need no GPU. Without one the kernel is **interpreted**: Python runs it
# line by line, slowly. We also compile it, for GPUs that are not there, and
# read what they would run.
#
# **You need:** chapters 3 and 4, and 230 minutes, in two sittings or three.
# Triton is for Linux (on Windows: WSL). Elsewhere this page runs as well, with
# the kernel's twin in torch, and the kernels' checks say what they need.
#
# **You will be able to**
#
# - compute attention over keys that come in pieces, and merge partial results,
# - write a Triton kernel: load a row, mask a tail, gather by a table, multiply,
# - say why several query heads belong in one program, and why a long text
#   needs several programs,
# - say what a program is made of (warps, registers, shared memory), and read
#   from what the compiler made whether its loads run ahead of its products,
# - turn a kernel for one new token into one for a whole prompt,
# - predict the bytes that attention moves, and what they mean on a roofline.

# %%
import functools
import json
import math
import re
from collections import Counter
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
from lib import paged_kv_cache_triton as copies
from lib.block_manager import BlockManager
from lib.config import LLAMA3_8B, ModelConfig
from lib.course.check import check
from lib.model import attend_fused
from lib.paged_attention import (
    paged_decode_gather, paged_decode_online, paged_prefill_gather,
)
from lib.interpreter import HAS_TRITON, IS_INTERPRETED, tl, triton
from lib.paged_attention_triton import LOG2_E
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
# Here is one layer's attention in one step of decoding, for eight requests of
# 2,048 tokens, on this machine. *Contiguous* reads dense pieces. *Gather*
# copies the blocks into dense pieces first.

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
# With a gather, a block is read, its copy is written, and the copy is read:
# three times the traffic. Where attention waits for memory, it can take three
# times as long. On a GPU memory is the limit here; we come to why. On a CPU the
# factor changes from run to run, for much of the time goes into torch's calls,
# and some into getting memory for the copy.
#
# How long would it take on a GPU? We take the shape of Llama 3 8B, the same
# eight requests, and the memory bandwidth that NVIDIA publishes for its A100
# (80 GB, SXM). In place, all of it has to come from memory. With a gather, a
# part of the copy may stay in the GPU's cache:

# %%
A100_BYTES_PER_S = 2039e9  # published, not measured here
cache_bytes = 8 * kv_cache.kv_cache_bytes(LLAMA3_8B, 2048, bytes_per_number=2)
for name, times in (("in place", 1), ("gather", 3)):
    num_bytes = times * cache_bytes
    print(f"{name:8} {num_bytes / 1e9:.1f} GB of traffic per step, ", end="")
    print(f"{1000 * num_bytes / A100_BYTES_PER_S:.1f} ms if all is to memory")

# %% [markdown]
# ## Six tokens in two tiles, by hand
#
# What stands in the way is the softmax. A weight is exp(score) divided by the
# sum over *all* keys. And so that no exp becomes infinite, the largest of *all*
# scores is subtracted first. If we see only a few keys at a time, a **tile**,
# we know neither the sum nor the maximum.
#
# So we keep three running results: the largest score so far (`row_max`), the
# sum of all exp(score - row_max) so far (`row_sum`), and the sum of the values
# under these weights (`acc`). When a tile brings a larger score, everything
# that was summed up before is too large by a factor of exp(new - old). So we
# multiply it by exp(old - new), and go on. At the end we divide, once.
#
# Six scores and six values, in a tile of four and a tile of two:

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
# **online softmax**. It stores the scores of one tile, never those of all keys.
# One more number is useful: **logsumexp**, the logarithm of the sum of all
# exp(score), which is `row_max + log(row_sum)`. It says how much weight there
# was in all.
#
# ### Exercise 5.1 · `attend_online` ★★ (20 minutes)
#
# Write attention for one token. You get its queries, already divided by √D, and
# keys and values that come tile by tile. You can go through the tiles only
# once, and may keep only one of them at a time. The scores are given: as in
# chapter 3, query heads that read the same keys are the rows of one matrix.

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
# Without tiles `row_sum` is 0. Divide by `row_sum.clamp(min=...)`, with a tiny
# number such as `torch.finfo(q.dtype).tiny`: acc is 0 then, and so is out. At
# the end out goes back to q's dtype: `.to(q.dtype)`.
#
# </details>

# %% [markdown]
# `paged_decode_online` is a loop over requests. It hands your function one
# block after the other as a tile: views of the pool, no copies. So this is
# attention that reads blocks where they lie, in torch. Here are three requests,
# with the gather and without. The peak is what is alive at one time, beside
# what was there before:

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
# The results agree, up to rounding. The gather's peak is a copy of the longest
# request's keys and values, and its scores. In place there are one block's
# scores, two running numbers per head, and a running row of D numbers. But look
# at what it does: a loop in Python, with a dozen small operations for every
# sixteen tokens. We want all of it in one go, on the machine that has the
# bandwidth.
#
# ## A kernel is a few lines that run many times
#
# A GPU runs the same **program** many times at once. Every copy gets the same
# arguments. It asks which copy it is, and works out its share from that. And
# instead of tensors it gets addresses: a **pointer** to the first number of
# each. Where the others lie, it has to compute. In Triton:
#
# - `tl.program_id(0)`: which program am I?
# - `tl.arange(0, TILE)`: the numbers 0 to TILE - 1, all at once. TILE must be a
#   power of two, and known when the kernel is compiled: a `tl.constexpr`.
# - `pointer + offsets`: as many addresses as there are offsets. We give names
#   that end in `_at` to offsets: how many numbers past the pointer.
# - `tl.load(pointer + offsets, mask=..., other=0.0)`: the numbers at these
#   addresses. Where the mask is False nothing is touched, and `other` comes
#   back. Without `other` anything may come back.
# - `tl.store(pointer + offsets, numbers, mask=...)`: the way back.
# - `x.to(tl.int64)`: x in 64 bits. A program's id has 32 bits, and so has the
#   product of two such numbers. Past 2^31 - 1 it overflows, and an offset into
#   a large pool may be larger.
#
# A kernel is a function under `@triton.jit`. `kernel[(N,)](...)` launches N
# programs, with ids 0 to N - 1. With two or three numbers, `kernel[(B,
# G)](...)`, there is one for each pair or triple, and `tl.program_id(1)` is its
# second number. The library does this in a **launcher**: a function that checks
# its tensors, makes room for the results and launches.
#
# ### Exercise 5.2 · `load_row_kernel` ★ (15 minutes)
#
# Program n copies row n of x into row n of out, which is a power of two wide,
# and fills the rest with zeros. Two rows of x lie `x_stride` numbers apart,
# which may be more than `num_cols`. What lies between them belongs to somebody
# else, and must not be read.

# %% exercise="load_row_kernel" given="locate"
from lib.paged_kv_cache_triton import load_row_kernel

# %%
check(load_row_kernel)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The row begins at offset `row * x_stride`. Its numbers are at `+ col`, which
# makes TILE offsets of one.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `mask=col < num_cols` and `other=0.0` when loading. No mask when storing: the
# zeros are to be stored too.
#
# </details>

# %% [markdown]
# The check runs your kernel in the interpreter and counts what it loads and
# stores. Then it compiles it for a GPU, since the interpreter is not strict: it
# takes things that no GPU could run. (This takes a few seconds, in which
# nothing is printed.) To look inside a kernel that does not pass, launch it
# yourself: interpreted, it may `print` what it has. The stub's `raise` has to
# go when your lines are there.
#
# As always, what passes takes the library's place. `copies.pad_rows`, the
# launcher, launches your kernel now. Three rows of five numbers, cut out of
# rows of seven:

# %%
if HAS_TRITON:
    wide = torch.arange(21.0, device=device).view(3, 7)
    print(copies.pad_rows(wide[:, :5]))

# %% [markdown]
# ## Look up the block
#
# ### Exercise 5.3 · `gather_kernel` ★★ (15 minutes)
#
# Program p copies the token at position p, with all its heads, out of the pool
# into row p of out. You know where it lies: block
# `block_table[p // block_size]`, place `p % block_size`. The ids in the table
# are numbers in memory, so they are loaded like any others. The copy is given;
# it needs `slot`.

# %% exercise="gather_kernel" given="locate copy"
from lib.paged_kv_cache_triton import gather_kernel

# %%
check(gather_kernel)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `tl.load(block_table_ptr + position // block_size)` is one number, the id.
# Make it as wide as `position` is: `.to(tl.int64)`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `slot` numbers all places of the pool, as in chapter 4: the id times
# `block_size`, plus the place in the block.
#
# </details>

# %%
def count(function):
    """What its kernels moved; None where they are not interpreted."""
    is_known = HAS_TRITON and IS_INTERPRETED
    return meter.measure_traffic(function) if is_known else None


q, k_cache, v_cache, tables, lens = random_pool([40], H=1, G=2, D=16)
if HAS_TRITON:
    moved = count(lambda: copies.gather_kv(k_cache, v_cache, tables[0], 40))
    dense = copies.gather_kv(k_cache, v_cache, tables[0], 40)
    twin = paged_kv_cache.gather_kv(k_cache, v_cache, tables[0], 40)
    print("the same as in torch:", all(map(torch.equal, dense, twin)))
    if moved:
        print(f"{moved.read_bytes:,} bytes of keys and values read, ", end="")
        print(f"{moved.written_bytes:,} written, ", end="")
        print(f"{moved.index_bytes} of ids")

# %% [markdown]
# That is the copy of chapter 4 as a kernel. (The ids are read twice, for keys
# and for values, and have 8 bytes each here.) Now we do without the copy.
#
# ## One program for all heads that read the same keys
#
# Which work belongs in one program? A request and a KV head. All query heads
# that read this KV head go into the same program: it loads each key once, for
# all of them, and their scores are *one* product of two matrices, queries
# (rows) by keys (columns). GPUs have units for such products, **tensor cores**,
# and `tl.dot` uses them. They multiply 16 rows at a time, and the sides of a
# tile are powers of two. So the `GROUP_SIZE` query heads are padded to `ROWS`
# rows, the `HEAD_DIM` numbers to `COLS` columns, and masks keep out what is not
# there.
#
# Two dimensions of offsets are a column plus a row: `[:, None]` makes a column
# of addresses, `[None, :]` a row, and their sum is the whole matrix. Here are
# 16 queries and 32 keys:

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
if HAS_TRITON:
    scores_kernel[(1,)](q, k, scores, row_max, ROWS=16, COLS=64, TILE=32)
    error = (row_max - (q @ k.T)[:, :30].amax(dim=1)).abs().max()
    print(f"the largest scores, off by {error:.0e}")

# %% [markdown]
# (The last two keys are masked, as they would be at the end of a text. By
# default `tl.dot` multiplies fp32 in less than full precision;
# `input_precision="ieee"` asks for all of it.)
#
# A program goes through its keys in tiles of `TILE` tokens. That has nothing to
# do with the size of a block, for the block is looked up for each token. A long
# text may also be shared among several programs, each with its own part of the
# keys. We come to that below; here is a picture of it.

# %% alt="Above, the seven blocks of request b in order: 2, 3, 0, 7, 8, 9 and 10, the last half full. Program 0 reads the first four, as tiles 0 and 1; program 1 the other three, as tiles 2 and 3. Below, the pool of 14, where lines lead to the same blocks; all others are blank."
manager = BlockManager(num_blocks=14, block_size=4)
for name, num_tokens in (("a", 5), ("b", 7), ("c", 9)):
    manager.allocate(name, num_tokens)
manager.free("a")
for name, num_tokens in (("b", 1), ("c", 6), ("b", 18)):
    manager.append(name, num_tokens)
drawing.draw_reads(
    manager, "b", tile=8, split_tokens=16,
    title="Two programs share the keys of one request",
);

# %% [markdown]
# *Request b, 26 tokens, 16 of them for program 0. Each program looks its blocks
# up in the table, and reads them where they lie. The other blocks of the pool
# are c's, or free.*
#
# ### Exercise 5.4 · `paged_decode_kernel` ★★★ (40 minutes)
#
# This is `attend_online` once more, with the look-up of `gather_kernel` and the
# mask of `load_row_kernel`. Four steps are yours:
#
# - **look up**: the `block_id` (int64) and the `place` in it (int64 too), for a
#   whole tile of positions at once. Row b of the table begins at offset `b *
#   table_stride_b`. After the last token the table holds anything, so load
#   under `mask=is_token`.
# - **gather**: `k` and `v`, (TILE, COLS) each. `k_at` and `v_at` are offsets,
#   one for each token. With `[:, None]` they become a column, and
#   `col[None, :]` is the row. Load under the mask `is_there`, with
#   `other=0.0`. A place where no token is may hold anything, NaN too, and a
#   weight of 0 does not save you: 0 times NaN is NaN.
# - **score**: as in `scores_kernel`, (ROWS, TILE), times `scale_log2_e`. Scores
#   of tokens that are not there are -inf.
# - **rescale**: as in `attend_online`, with `tl.maximum`, `tl.max(..., axis=1)`
#   and `tl.sum(..., axis=1)`. The weighted values are a `tl.dot` too, and it
#   wants `input_precision="ieee"` like the first.
#
# Two things are new. First, a GPU has an instruction for 2 to the power of x,
# and none for e to the power of x. So the scores come multiplied by log2(e),
# `tl.exp2` takes the place of exp, and the last step turns `logsumexp` back.
# Second, `tl.dot` wants both sides in one dtype. Your weights are fp32, and
# the values may be bf16: cast the weights, with `weights.to(v.dtype)`. (Casting
# the values instead gives right numbers and a bad kernel: they would take twice
# the room, and tensor cores do not multiply fp32.)
#
# The rest is given. The launcher, `paged_decode`, starts a program for each
# request, KV head and part of the keys: `kernel[(B, G, num_splits)]`. `start`
# and `end` bound this program's part. `tl.full` and `tl.zeros` make tiles,
# `tl.cdiv` divides and rounds up. `UPCAST` makes fp32 of what is loaded, for
# the interpreter, which computes bf16 wrongly. (It is on for fp32 too, where it
# changes nothing.) Queries, caches and tables come with strides, since their
# rows may lie apart; the numbers of one row lie together.
#
# The check takes 10 to 20 seconds, in which nothing is printed.

# %% exercise="paged_decode_kernel" given="1 2 3 4 6 8 11"
from lib.paged_attention_triton import paged_decode_kernel

# %%
check(paged_decode_kernel)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The id of each token's block: `tl.load(block_tables_ptr + b * table_stride_b +
# position // BLOCK_SIZE, mask=is_token, other=0)`. The keys:
# `tl.load(k_cache_ptr + k_at[:, None] + col[None, :], mask=is_there,
# other=0.0)`. The scores end with `tl.where(is_token[None, :], scores,
# float("-inf"))`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `tl.max(scores, axis=1)` and `tl.sum(weights, axis=1)` are (ROWS,). With
# `[:, None]` they become a column beside (ROWS, TILE) or (ROWS, COLS). The
# second product: `tl.dot(weights.to(v.dtype), v, input_precision="ieee")`.
#
# </details>

# %% [markdown]
# ## It computes the same thing
#
# Your kernel against the gather of chapter 4, in blocks of many sizes, with
# lengths that end anywhere:

# %%
for block_size in (1, 8, 16, 100):
    inputs = random_pool([130, 1, 64], H=4, G=2, D=20, block_size=block_size)
    got, expected = kernels.paged_decode(*inputs), paged_decode_gather(*inputs)
    error = (got[0] - expected[0]).abs().max()
    print(f"blocks of {block_size:3}: off by {error:.0e}")

# %% [markdown]
# ## One long text, and nobody to help
#
# One program for each request and KV head: a single request to Llama 3 8B makes
# eight programs per layer. An A100 can run programs on 108 **multiprocessors**
# (its parts that carry out programs), an H100 (SXM, the one for servers) on
# 132. A hundred of them would watch eight read a long text.
#
# So the keys are shared out. Each program takes `split_tokens` keys, one
# **split**, and the next program takes the next ones. A text of 10,000 tokens
# in splits of 512 keeps 20 programs busy per KV head, and a short text beside
# it keeps one busy. (The launcher starts as many programs for each request as
# the longest could need. Those that find no keys end after one look at the
# length.) You may set the length of a split, `paged_decode(...,
# split_tokens=512)`. Otherwise the launcher chooses one between 128 and 4,096
# tokens, such that each multiprocessor has about two programs. More would not
# always help: an H100 runs three of ours at a time on each, 396 in all. Of 512
# programs the last 116 wait for a second round, in which most of the GPU has
# nothing to do.
#
# What each program has in the end is attention over its own split, divided by
# its own sum. How do these become one?
#
# ### Exercise 5.5 · `merge_splits` ★★★ (20 minutes)
#
# You get P partial results of each head, `outs`, and the `logsumexps` of their
# splits. Return out and logsumexp over all keys. A split may be without keys:
# then you get an out of 0 and a logsumexp of -inf.

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
# again. Three splits of unequal size, of one request, and all keys at once:

# %%
q, k_cache, v_cache, tables, _ = random_pool([90], H=4, G=2, D=16)
k, v = paged_kv_cache.gather_kv(k_cache, v_cache, tables[0], 90)
splits = [(k[a:b], v[a:b]) for a, b in ((0, 50), (50, 60), (60, 90))]
parts = [paged_attention.attend_online(q[0], [split]) for split in splits]
outs, logsumexps = (torch.stack(x, dim=1)[None] for x in zip(*parts))
merged, _ = paged_attention.merge_splits(outs, logsumexps)
whole, _ = paged_attention.attend_online(q[0], [(k, v)])
print(f"{len(parts)} parts, merged: off by {(merged - whole).abs().max():.0e}")

# %% [markdown]
# Your kernel does its part already. Look at its first lines, `start` and `end`,
# and at its last ones, which write to the place of its split. A second kernel
# merges, as your function does. It reads the lengths, so it skips splits
# without keys, into which nobody has written. And it need not check whether the
# first kernel is done. Both are launched on one **stream**, a queue whose
# kernels the GPU runs in order.

# %%
inputs = random_pool([200, 1, 70], H=4, G=2, D=16)
expected = paged_decode_gather(*inputs)[0]
for split_tokens in (256, 128, 64):
    got, _ = kernels.paged_decode(*inputs, split_tokens=split_tokens)
    error = (got - expected).abs().max()
    print(f"{split_tokens:3} keys per program: off by {error:.0e}")

# %% [markdown]
# ## What a program is made of
#
# So far a program was a few lines that run many times. What does a GPU make of
# them? These are the words, with the numbers of NVIDIA's A100 and H100:
#
# - A **multiprocessor** (NVIDIA says streaming multiprocessor, SM) carries out
#   several programs at a time. An A100 has 108 of them, an H100 has 132.
# - A program is carried out by **threads**. 32 threads make a **warp**, and all
#   threads of a warp carry out the same instruction at the same time. Our
#   program has four warps (`num_warps=4`), so 128 threads. A tile of 64 keys by
#   128 numbers is spread over them, 64 numbers for each. Of a single number,
#   such as `seq_len`, every thread has a copy. Which thread has which part of a
#   tile is Triton's choice, and nothing in the language shows it. Where a line
#   needs the numbers of several threads, as `tl.max(..., axis=1)` does, the
#   compiler writes the exchange.
# - What a thread has lies in its **registers**, of 32 bits each. A thread has
#   255 at most, and a multiprocessor has 65,536 for all. `acc`, 16 by 128
#   numbers in fp32, takes 16 of each thread. What does not fit into registers
#   is **spilled** to memory, and that is slow.
# - **Shared memory** is on the multiprocessor, and all threads of a program see
#   it: 164 KB on an A100, 228 KB on an H100. Triton uses it for what threads
#   exchange, and for tiles that are loaded ahead of time.
#
# Triton brings the compilers of NVIDIA and AMD. So your kernel can be compiled
# here, for the heads of Llama 3 8B, in bf16:

# %%
codes = {}
if HAS_TRITON:
    gpus = {"A100": "sm_80", "H100": "sm_90"}
    for name, gpu in gpus.items():
        code = codes[name] = gpu_code.compile_decode(gpu)
        print(f"{name} {code.registers} registers per thread, ", end="")
        print(f"{code.spilled_bytes} bytes spilled, ", end="")
        print(f"{code.shared_bytes:,} bytes of shared memory")

# %% [markdown]
# Nothing is spilled, if yours is written as the library's. How many programs
# fit on one multiprocessor at once? Whatever runs out first decides: registers,
# which are handed out in eights, or shared memory, of which each program takes
# 1 KB more than it asks for. (Their warps, as a share of the 64 that a
# multiprocessor could hold, are called its **occupancy**.)

# %%
SHARED = {"A100": 164 * 1024, "H100": 228 * 1024}  # bytes per multiprocessor


def programs_at_once(name, code, num_threads=4 * 32):
    """By registers, and by shared memory."""
    registers = math.ceil(code.registers / 8) * 8 * num_threads
    return 65536 // registers, SHARED[name] // (code.shared_bytes + 1024)


for name, code in codes.items():
    by_registers, by_shared = programs_at_once(name, code)
    print(f"{name}: {by_registers} programs by registers, ", end="")
    print(f"{by_shared} by shared memory")

# %% [markdown]
# Does a program wait at each load? No. A warp asks for the numbers and goes on,
# until an instruction needs one of them. If it has not come yet, the warp
# waits, and the multiprocessor lets another warp go on. So memory is busy as
# long as enough bytes are **in flight**, asked for and not there yet. How many
# is enough? As many as memory delivers in the time that one load takes,
# bandwidth times latency. (The latency is our assumption. NVIDIA publishes
# none, and it grows when memory is busy.)

# %%
H100_BYTES_PER_S, LATENCY_S = 3350e9, 0.8e-6  # published; assumed
needed_bytes = H100_BYTES_PER_S * LATENCY_S / 132  # per multiprocessor
tile_bytes = 2 * 64 * 128 * 2  # keys and values, 64 tokens, D = 128, bf16
print(f"in flight for each multiprocessor: {needed_bytes:,.0f} bytes")
print(f"a tile of keys and values: {tile_bytes:,} bytes")

# %% [markdown]
# So one tile per multiprocessor is enough (at D = 128), if it is in flight *all
# the time*: also while another one is being multiplied. Other programs on the
# same multiprocessor help, for one may load while another multiplies. A program
# can also help itself. In our loop a tile is needed right after it is asked
# for. If the loop asks for the *next* tile before it multiplies this one, the
# load is in flight meanwhile. That is called **software pipelining**. The next
# tile needs a place to go to, a second **buffer** in shared memory. The
# compiler writes all of it, and how far it works ahead is a number that the
# launcher gives it, `num_stages`: over how many rounds of the loop the work on
# one tile is spread. The first rounds load, the last one multiplies. It is not
# the number of buffers, as we will see.
#
# Compile your kernel with 1, 2, 3, 5 and 7 stages. Look at how many tiles of
# keys shared memory holds at a time (buffers), and at how many `tl.load`s of a
# whole tile may be in flight still when the loop waits. (With one stage nothing
# is loaded ahead. Shared memory is needed all the same: tiles pass through it
# on their way into a `tl.dot`.) Before you run the cell: if two stages give one
# buffer, how many do three give?

# %%
for num_stages in (1, 2, 3, 5, 7) if HAS_TRITON else ():
    code = gpu_code.compile_decode("sm_90", num_stages=num_stages)
    left = min(code.loop_waits, default="no load runs ahead")
    print(f"num_stages={num_stages}: buffers {code.num_buffers}, ", end="")
    print(f"{code.shared_bytes:7,} bytes, ", end="")
    print(f"{min(programs_at_once('H100', code))} programs; in flight: {left}")

# %% [markdown]
# Three stages give one buffer like two, and 256 bytes more. These are 64 block
# ids of 4 bytes, and they are the reason. A key's address is known only when
# its block's id has come, so there are two loads, one behind the other. With
# two stages the ids are loaded on the spot, and with three they get a buffer of
# their own. From then on a buffer more for the keys and values costs two
# stages: one for them, and one for the ids.
#
# With one buffer the loop waits until *no* load is in flight before it
# multiplies: the next tile is asked for when this one has been read out of the
# buffer. With five stages a whole tile may still be in flight: three loads, of
# ids, keys and values. That is what the library launches with. It has its
# price: with so much shared memory fewer programs fit on a multiprocessor, and
# those would have helped as well. Which of the two wins can only be measured,
# on a GPU.
#
# There is another way, in the kernel: look up the *next* tile's blocks at the
# end of this one. Then the ids are there when the keys are asked for, and no
# load waits for another. It moves one line, and needs a few more for the first
# tile:

# %%
look_up_ahead = {
    "tile": """
    # tile by tile; the first one's blocks are looked up here
    position = start + tl.arange(0, TILE)
    next_at = b * table_stride_b + position // BLOCK_SIZE
    next_id = tl.load(block_tables_ptr + next_at, mask=position < end, other=0)
    for tile_start in range(start, end, TILE):
        position = tile_start + tl.arange(0, TILE)
        is_token = position < end
        is_there = is_token[:, None] & is_col[None, :]
""",
    "look": """
        # use what was looked up a tile ago, and look up for the next one
        block_id = next_id.to(tl.int64)
        place = (position % BLOCK_SIZE).to(tl.int64)
        after = position + TILE
        next_at = b * table_stride_b + after // BLOCK_SIZE
        next_id = tl.load(block_tables_ptr + next_at, mask=after < end, other=0)
""",
}
if HAS_TRITON:
    try:
        ahead = gpu_code.edited(kernels.paged_decode_kernel, look_up_ahead)
        code = gpu_code.compile_decode("sm_90", num_stages=3, kernel=ahead)
    except (ValueError, gpu_code.CompileError) as error:
        print(f"your kernel is made otherwise: {error}")
    else:
        print(f"num_stages=3: buffers {code.num_buffers}, ", end="")
        print(f"{code.shared_bytes:7,} bytes, ", end="")
        print(f"in flight: {min(code.loop_waits, default=0)}")

# %% [markdown]
# Two buffers from three stages, in about as much shared memory. (Only keys and
# values are counted as in flight here. The ids wait in registers.) We keep the
# kernel that is easier to read.
#
# Next, why do rows that a table scatters over the pool cost no bandwidth?
# Memory is read in pieces of 32 bytes. A key of 128 numbers in bf16 has 256
# bytes, which is eight whole pieces, wherever it lies. One instruction loads 16
# bytes for each thread, two whole keys for a warp. (Loads that fall together
# into whole pieces are called **coalesced**.)
#
# But the compiler writes such loads only where it knows that each begins at a
# multiple of 16 bytes, which are 8 numbers in bf16. At a launch Triton notes
# which strides are multiples of 16 numbers. It does not note multiples of 8. At
# D = 72 every row begins at a multiple of 8 numbers, but nobody says so. Here
# are the loads of three kernels: D = 128; D = 72; and D = 72 with that promise,
# `tl.multiple_of(k_at, 8)`, in the given step **address**, which computes
# `k_at` and `v_at`. A promise is believed, not checked. (`LDG` loads into
# registers, `LDGSTS` from memory to shared memory; `.128` is 16 bytes.)

# %%
promise = {
    "address": """
        # address: where the keys and values of these tokens begin
        k_at = block_id * k_stride_block + place * k_stride_place
        v_at = block_id * v_stride_block + place * v_stride_place
        k_at = tl.multiple_of(k_at + g * k_stride_g, 8)
        v_at = tl.multiple_of(v_at + g * v_stride_g, 8)
"""
}


def print_loads(name, D, kernel):
    code = gpu_code.compile_decode("sm_80", head_dim=D, kernel=kernel)
    loads = Counter(re.findall(r"\b(?:LDGSTS|LDG)\.\S+", code.assembly))
    wide = sum(n for load, n in loads.items() if load.endswith(".128"))
    narrow = sum(n for load, n in loads.items() if load.endswith(".U16"))
    print(f"{name:16} {wide:3} loads of 16 bytes, {narrow:3} of 2, ", end="")
    print(f"buffers {code.num_buffers}, {code.spilled_bytes:,} bytes spilled")


if HAS_TRITON:
    print_loads("D = 128", 128, kernels.paged_decode_kernel)
    print_loads("D = 72", 72, kernels.paged_decode_kernel)
    try:
        promised = gpu_code.edited(kernels.paged_decode_kernel, promise)
        print_loads("D = 72, promised", 72, promised)
    except (ValueError, gpu_code.CompileError) as error:
        print(f"your kernel is made otherwise: {error}")

# %% [markdown]
# Without the promise the compiler loads number by number, cannot load ahead,
# and makes a mess of the rest: thousands of bytes per thread go through memory.
# With it everything is back, but for the queries, about which we promised
# nothing: four narrow loads in the place of a wide one.
#
# And this is a piece of what the A100 would run, around the first matrix
# product. `HMMA` is the tensor cores' instruction, carried out by a warp as a
# whole: a product of 16 by 16 and 16 by 8 numbers in bf16, summed up in fp32.
# The scores of a tile take 64 of them, the weighted values another 64, which is
# 32 for each of the four warps. `LDSM` brings numbers from shared memory into
# registers, R36 and others; RZ is a zero, `NOP` does nothing.

# %%
if codes:
    assembly = codes["A100"].assembly
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", assembly)
    products = [i for i, line in enumerate(instructions) if "HMMA" in line]
    print(f"{len(instructions):,} instructions, ", end="")
    print(f"{len(products)} of them HMMA")
    print(*instructions[products[0] - 3:products[0] + 4], sep="\n")

# %% [markdown]
# Sixteen rows are multiplied although only four are heads. That costs nothing
# that matters: the tensor cores wait for memory anyway, as the roofline below
# shows.
#
# When is a kernel compiled anew? For each set of constants (here: the heads per
# KV head, D, the block size) and of dtypes; and when a number or an address
# stops, or begins, to be a multiple of 16, or a number becomes 1. It takes
# seconds, so nothing that grows with the text may be among them. The width of
# the block table (`table_stride_b`) and the length of a split (`split_tokens`)
# are handed over as plain numbers, about which the compiler assumes nothing:
# `do_not_specialize`. One surprise remains. The first text that is long enough
# to be split compiles the kernel once more, because parts are stored in fp32,
# and compiles the kernel that merges them.
#
# ## Predict the bytes
#
# ### Exercise 5.6 · `bytes_moved` ★★ (15 minutes)
#
# What must attention move in one step, in one layer? Assume no splits, so that
# no partial results are written and read back. Predict it, exactly, for reading
# in place and for gathering first.

# %% exercise="bytes_moved"
from lib.paged_attention import bytes_moved

# %%
check(bytes_moved)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Of queries and outputs there are B · H · D numbers each. Of keys and values
# there are G · D numbers per token each.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `is_gathered` makes keys and values three times as many. `int(seq_lens.sum())`
# counts the tokens.
#
# </details>

# %% [markdown]
# Now the prediction meets a count: load by load and store by store, in the
# interpreter. Gathering is `gather_kernel`, and then the same kernel over the
# dense copy. That moves what it moves in place, so we add the two counts.

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
    copy = count(lambda: copies.gather_kv(*inputs[1:3], inputs[3][0], n))
    logsumexp_bytes = in_place.value[1].nbytes  # was not predicted
    moved = in_place.read_bytes + in_place.written_bytes - logsumexp_bytes
    gathered = moved + copy.read_bytes + copy.written_bytes
    counted["in place"].append(moved)
    counted["gather"].append(gathered)
    print(f"{n:3} tokens: {moved:6,} and {gathered:6,} bytes, ", end="")
    print(f"and {in_place.index_bytes} of ids and lengths")
for name, numbers in counted.items() if is_counted else []:
    print(f"{name} as predicted: {numbers == predicted[name][1]}")
if not is_counted:
    print("not counted here: nobody interprets the kernels on this machine")

# %% alt="Bytes moved in one step and one layer over the tokens in the cache, from 8 to 64. Two straight lines of markers, both on their dashed predictions: gather rises three times as steeply as in place."
plotting.plot_measured(
    {name: (contexts, y) for name, y in counted.items() if y} or predicted,
    predicted={f"{name}: predicted": xy for name, xy in predicted.items()},
    xlabel="tokens in the cache",
    ylabel="bytes moved in one step, one layer",
    title="Gathering moves up to three times as many bytes",
);

# %% [markdown]
# *Markers: counted. Dashed: predicted.* What is not in the prediction is small:
# an id of 4 bytes for each token and KV head, beside 2 · D numbers, the
# lengths, and one logsumexp per head.
#
# ## Where that puts it: the roofline
#
# A machine has a limit of bytes per second, and one of FLOPs per second. With
# few FLOPs per byte the first is reached first, and the speed grows with the
# FLOPs per byte: a slope. With many it is the second: a flat roof. The two meet
# at a corner. So we plot FLOPs per second over **FLOPs per byte moved**.
# Attention in decode computes 4 · H · D FLOPs per key (two products, a
# multiplication and an addition each), and moves 2 · G · D numbers. That is 2 ·
# H / G FLOPs per number, whatever the length of the text:

# %%
def flops_per_byte(config, bytes_per_number, num_keys=8192):
    flops = 4 * num_keys * config.num_heads * config.head_dim
    keys = torch.tensor([num_keys])
    moved = paged_attention.bytes_moved(config, keys, bytes_per_number)
    return flops / moved


print(f"Llama 3 8B in bf16: {flops_per_byte(LLAMA3_8B, 2):.1f} FLOPs per byte")

# %% [markdown]
# (These are the useful ones. Your kernel multiplies 16 rows for the 4 heads of
# a group, four times as many.)
#
# Now this machine. Its bandwidth comes from a copy and its roof from a large
# product, both measured. The points are attention in decode, contiguous, as
# timed at the beginning of this page (in fp32 on a CPU, so with half as
# many FLOPs per byte); and the product of one weight matrix with 1, 8, 64 and
# 512 tokens, which is the other half of a step. Dashed are two GPUs, as NVIDIA
# publishes them.

# %% alt="Log-log plot: FLOPs per second over FLOPs for each byte moved. Each machine is a line of slope 1 up to a corner, then flat: dashed H100 and A100, and this machine, on a CPU far below them and with its corner further left. Of the points below its line, W @ 1, attention and W @ 8 are at the left, W @ 512 under the flat part."
dtype = bench_attention.DTYPES[device]
here = bench_attention.one_layer(**bench_attention.SIZES[device])
points = {"attention": (
    flops_per_byte(here, dtype.itemsize, 2048),
    # 8 requests of 2,048 keys, 4 · H · D FLOPs per key
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
    "H100": (H100_BYTES_PER_S, 989e12),  # published: SXM; bf16
}
plotting.plot_roofline(
    roofs, points, published=["A100", "H100"],
    title="Decoding computes little with each byte",
);

# %%
for name, (bytes_per_s, flops_per_s) in roofs.items():
    print(f"{name:12} {bytes_per_s / 1e9:7.1f} GB/s, ", end="")
    print(f"{flops_per_s / 1e12:7.2f} TFLOP/s: needs ", end="")
    print(f"{flops_per_s / bytes_per_s:.0f} FLOPs per byte to be busy")

# %% [markdown]
# These GPUs need 150 FLOPs and more for each byte, and attention in decode has
# four useful ones, or sixteen with the padding. There, memory sets the pace. On
# a CPU the corner is far to the left. A point may lie below the slope: then
# something else than memory sets its pace, such as the many small calls of
# torch that attention is here. A point may even lie above it, for a product
# only reads its matrix, and reading alone can be faster than a copy, which
# writes as well.
#
# Two ways lead up the slope. More requests in a batch share the weights: that
# takes W @ 1 to W @ 64, and it is what paging made room for in chapter 4. But
# requests do not share keys, except those of a common prompt, so a larger batch
# leaves attention where it is. Its way up is a larger group: more query heads
# for each KV head.
#
# ## The prompt, too
#
# The kernel of 5.4 serves only steps in which each request brings one new
# token. A prompt brings many. Until now it was gathered, and a score was stored
# for each pair of a new token and a key. What does a kernel for many tokens
# need?
#
# - A program takes a **tile of queries**: `QUERIES` tokens of one request, each
#   with the `GROUP_SIZE` heads that read the program's KV head. A row of the
#   product is now a token *and* a head.
# - The mask gets a second dimension. A query at position p sees the keys up to
#   position p, so each row has a mask of its own.
# - Keys after the last query of the tile are seen by nobody, and are not even
#   loaded.
#
# Everything else stays. Here is one program by hand: a request of seven tokens,
# of which the last three are new, with two heads per KV head. `#` is a score
# that counts:

# %%
seq_len, query_len, group_size = 7, 3, 2
for row in range(query_len * group_size):
    t, head = row // group_size, row % group_size
    query_position = seq_len - query_len + t
    seen = "".join(".#"[key <= query_position] for key in range(seq_len))
    print(f"row {row}: new token {t}, head {head}: {seen}")

# %% [markdown]
# ### Exercise 5.7 · `paged_prefill_kernel` ★★★ (30 minutes)
#
# Attention for any number of new tokens per request. There is a program for
# each KV head and tile of queries. Which request a tile belongs to is found in
# the kernel and is given: `tiles` has the number of tiles of each request, and
# the program goes to the first request at which their running sum (`tl.cumsum`)
# passes its own number. You get that request, `b`, and `first`, the tile's
# first token, counted among the request's *new* tokens from 0. (Tiles 2, 0 and
# 3 have the running sums 2, 2 and 5. So program 2 belongs to the third request,
# as its first tile. The given code counts programs from the end, so that the
# tiles with the most keys start first; programs that are too many end at once.)
# Two steps are new:
#
# - **row**: what `row` stands for, as above. `t`: its token, counted like
#   `first`. `h`: its query head, of all H; those of KV head g are `g *
#   GROUP_SIZE` and the ones after it. `is_row`: whether there is such a row,
#   for ROWS may be more than `QUERIES * GROUP_SIZE`, and the last tile of a
#   request may have fewer tokens than QUERIES. `query_position`: where the
#   token stands in the text. `end`: one more than the position of the last
#   query of this tile.
# - **score**: as in 5.4, with the mask that each row has for itself.
#
# The steps **look up**, **gather** and **rescale** are those of 5.4, word for
# word: bring your own.
#
# It is checked on whole prompts, on prompts whose beginning is cached already,
# on pieces of prompts, on single tokens, and on requests that bring none. That
# takes 10 to 20 seconds.

# %% exercise="paged_prefill_kernel" given="1 3 4 5 7 9 12"
from lib.paged_attention_triton import paged_prefill_kernel

# %%
check(paged_prefill_kernel)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `t = first + row // GROUP_SIZE`, and `is_row` has two conditions, joined by
# `&`. The new tokens are the last `query_len` of the text's `seq_len`, so the
# first of them has position `seq_len - query_len`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The tile ends after `QUERIES` tokens, or where the request ends:
# `tl.minimum(first + QUERIES, query_len)`. The mask compares a row of key
# positions with a column of query positions: `position[None, :] <=
# query_position[:, None]`.
#
# </details>

# %% [markdown]
# Whole prompts, the rest of a prompt, one new token, none at all, in one
# launch; and what each way keeps in memory for a prompt of N tokens. (A
# kernel's tiles live in registers and shared memory. It asks torch for nothing
# but its results.)

# %%
def random_prompts(seq_lens, query_lens, **sizes):
    """What paged_prefill takes."""
    _, *rest = random_pool(seq_lens, **sizes)
    q = torch.randn(sum(query_lens), sizes["H"], sizes["D"]).to(device)
    return q, *rest, torch.tensor(query_lens, dtype=torch.int32, device=device)


inputs = random_prompts([90, 70, 33, 16], [90, 20, 1, 0], H=4, G=2, D=16)
got, expected = kernels.paged_prefill(*inputs), paged_prefill_gather(*inputs)
error = (got[0] - expected[0]).abs().max()
print(f"four requests, {len(inputs[0])} new tokens: off by {error:.0e}")
for n in (64, 128, 256):
    inputs = random_prompts([n], [n], H=4, G=2, D=16)
    kept = [
        meter.measure(lambda: attend(*inputs)).peak_bytes
        for attend in (paged_prefill_gather, kernels.paged_prefill)
    ]
    print(f"a prompt of {n:3}: gather {kept[0]:9,} bytes, ", end="")
    print(f"in place {kept[1]:6,}")

# %% [markdown]
# Twice the prompt takes up to four times the bytes with a gather, since scores
# are stored for each token by each key. In place it takes twice as many.
# (Without Triton both are the gather.)
#
# And now the whole way: the trained model, chapter 4's cache, and in every
# step, in every layer, one of your two kernels. Nothing is gathered. Beside it
# is chapter 1, which computes everything again.

# %%
lm = model.load_model().to(device)
book_ids = text.encode(text.load_book()).to(device)
prompts = [book_ids[start:start + n] for start, n in ((1000, 20), (7000, 33))]
cache = PagedKVCache(
    lm.config, num_blocks=8, device=device,
    decode=kernels.paged_decode, prefill=kernels.paged_prefill,
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
# ## How fast it is
#
# `make bench` times the whole model with each cache, and attention alone, by
# context and batch. On a GPU it measures the kernel, first whether it is right
# and then how fast it is, beside torch's own attention, with what a launch
# costs. Here is what is in data/results, and the machine that it came from:

# %% alt="Two plots of bandwidth, in percent of a copy's, over the tokens of each of 8 requests, on a logarithmic axis. The first is of a CPU: contiguous is highest, gather lower, and in place flat near 0. The second is of an H200: torch, contiguous and in place rise close together to about 100, and gather stays below a third of that."
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
    for way in result["results"]:  # the whole model; paged: with a gather
        print(f"{way['name']:10} {way['tokens_per_s']:6.1f} tokens/s, ", end="")
        print(f"{way['batch_size']} requests of {way['context']} tokens")
    best = max(series["in place"][1])
    plotting.plot_measured(
        series, log_x=True,
        xlabel=f"tokens of a request ({batch_size} requests)",
        ylabel="bandwidth (% of a copy's)",
        title=f"{where}: in place up to {best:.0f}% of a copy's bandwidth"
        if is_gpu else
        f"{where}: a call per block costs more than a copy",
    )


for path in sorted((text.DATA / "results").glob("bench*.json")):
    plot_bench(path)

# %% [markdown]
# *Every way is credited with the fewest bytes that could do. So the extra
# traffic of a gather shows as lost bandwidth. On a CPU "in place" is a twin in
# torch, the slowest of all; on a GPU it is the kernel.* (*paged*, above the
# figure, is chapter 4's cache, with a gather.)
#
# On a CPU, *in place* is the torch twin, a dozen calls of torch for each
# block of sixteen tokens. Those calls take longer than copying the block, so
# the gather wins there. An interpreted kernel says nothing about the speed of a
# compiled one, so we do not time it. Without a GPU this chapter's win is one of
# bytes, not of seconds.
#
# On a GPU it is one of seconds. An H200 reads the blocks where they lie about
# as fast as one dense piece: eight texts of 16,384 tokens at 97% of a copy's
# bandwidth. (Above 100% is possible, since attention only reads, and a copy
# writes as well.) The gather reaches 30%, for it moves three times as many
# bytes. *Torch* is torch's own attention over a dense piece. Our kernel has 97%
# of its speed there, and three quarters at 512 tokens. And short texts leave
# every way far from a copy's bandwidth: their bytes are moved sooner than a
# kernel has started and come to an end.
#
# ## Where to go from here
#
# Your kernels have what the fast ones have in common. Here is what else their
# authors tune, and where to read on.
#
# - **Settings.** The library's `TILE`, `num_warps` and `num_stages` were chosen
#   by reading machine code. With a GPU one measures: `@triton.autotune` tries a
#   list of settings and keeps the fastest for each value of a key, such as D
#   and the block size. The length of the text must not be in the key, or each
#   new length is tuned anew.
# - **CUDA graphs.** Launching from Python takes tens of microseconds, and for a
#   short text the GPU may need less than that for its part. A graph records all
#   launches of a step once, and the GPU replays them without Python. (One text
#   of 128 tokens, on the H200: 73 microseconds per call, 6 in a graph.) That
#   works if nothing that is launched depends on a number that Python would have
#   to look at. Ours depends on shapes alone; lengths and tables are read in the
#   kernel. But the width of the table is a shape, so a graph needs tables that
#   are as wide as the longest text will be.
# - **Sliding window.** A layer that sees the last W tokens only (Mistral 7B)
#   needs, to decode, one more condition in `is_token`,
#   `position >= seq_len - W`, and a loop that starts there. For a prompt the
#   window is another edge of the mask, and a row may see nothing in its first
#   tiles: then `new_max` is -inf, and has to be guarded.
# - **Soft cap.** Gemma 2 bounds its scores by `cap * tanh(scores / cap)`,
#   before the mask and before the factor log2(e). `tl` has no tanh; it can be
#   made of one exp.
# - **fp8.** Keys and values of one byte per number halve what moves. The kernel
#   needs a cast after the load, `k.to(q.dtype)`, and a scale per head or block;
#   the launcher must let the dtypes differ. (The usual format compiles for an
#   H100, and not for an A100.)
# - **FlashAttention.** Version 2 splits the work among programs by tiles of
#   queries, as 5.7 does. Version 3 is written for the H100: some warps only
#   load, while others multiply.
# - **FlashInfer** takes the block ids of all requests as one long list, and
#   plans before the launch which program gets which part of a ragged batch.
#   **vLLM**, where paged attention comes from, takes tables like ours. Its
#   Triton backend serves prompts and decodes alike, as our `paged_prefill` can.
#
# ## The whole table, with all of your functions in it
#
# Five columns, five chapters. `check.collect` reads your answers from the other
# notebooks of this folder, as they were saved, and tries them. Those that pass
# are in the table; for what you left out the library stands in. The last column
# is read in place, with your `attend_online`. (The sizes are smaller than those
# of `make table`, which takes a minute. At so few tokens a cache saves no
# seconds yet.)

# %%
check.collect()

# %%
in_place = functools.partial(columns.paged, decode=paged_decode_online)
cells = []
for name in ("training", "checkpointed", "recompute", "contiguous", "paged"):
    setup = in_place if name == "paged" else None
    sweep = table.sweep(name, sizes=table.SMALL_SIZES, setup=setup)
    cells += table.fit(sweep)
Markdown(table.render(cells, table.SMALL_SIZES))

# %%
check.summary()

# %% [markdown]
# ## Outlook: how to read fewer bytes
#
# When a GPU decodes, bytes set the pace. So how could there be fewer? Four
# ideas, each put in at `attend`, on a model that was trained for none of them:
#
# - **fewer heads**: one KV head, the mean of both;
# - **fewer numbers**: keys as codes of 32 numbers instead of 64, from which
#   they are made again (as if one knew beforehand which 32 are best);
# - **fewer tokens**: each token sees the last W tokens only;
# - **a state that does not grow**: without the softmax, attention is q @ (Kᵀ
#   V), divided by the sum of its weights. Kᵀ V is a matrix of D by D, however
#   long the text is, and the sum needs D numbers more. So add up each token's k
#   vᵀ and k, and forget the token.
#
# How well does the model still predict text that it never saw?

# %%
lm = lm.cpu()
_, held_out = text.split_book(book_ids.cpu())
batch = next(text.windows(held_out, batch_size=4, seq_len=512))


@torch.no_grad()
def loss(attend):
    logits = lm(batch, torch.arange(512), attend)
    return training.next_token_loss(logits, batch).item()


def one_kv_head(layer, q, k, v):
    k, v = (x.mean(dim=-2, keepdim=True) for x in (k, v))
    return attend_fused(layer, q, k, v)


def coded_keys(layer, q, k, v):
    """A text's keys, in the 32 directions that hold most of them."""
    flat = k.flatten(-2)  # (B, S, G * D)
    basis = torch.linalg.svd(flat, full_matrices=False).Vh[:, :32]
    back = flat @ basis.transpose(1, 2) @ basis
    return attend_fused(layer, q, back.view_as(k), v)


def heads_first(q, k, v):
    """q, k, v (B, H, T, D), each query head with the KV head that it reads."""
    group_size = q.shape[-2] // k.shape[-2]
    k, v = (x.repeat_interleave(group_size, dim=-2) for x in (k, v))
    return (x.transpose(-3, -2) for x in (q, k, v))


def window(W):
    def attend(layer, q, k, v):
        q, k, v = heads_first(q, k, v)
        places = torch.arange(q.shape[-2])
        distance = places[:, None] - places
        is_seen = (distance >= 0) & (distance < W)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=is_seen
        )
        return out.transpose(-3, -2)
    return attend


def linear(layer, q, k, v):
    """elu + 1 of queries and keys, in the place of exp of their product."""
    q, k, v = heads_first(q, k, v)
    q, k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
    weights = (q @ k.transpose(-2, -1)).tril()  # as a state would, all at once
    out = weights @ v / weights.sum(dim=-1, keepdim=True)
    return out.transpose(-3, -2)


# %% alt="Loss, in nats per byte, over bytes kept per layer, on a logarithmic axis. Everything is a dashed level. Last tokens are a line close above it, with a bump where 32 tokens are kept, and on it from 128 tokens on. Coded keys are one point a little above; one KV head and the state are points far above."
G, D = lm.config.num_kv_heads, lm.config.head_dim
token_bytes, state_bytes = 2 * G * D * 4, G * (D * D + D) * 4  # in a layer
sizes = [8, 16, 32, 64, 128, 256, 512]
full_loss, all_bytes = loss(attend_fused), 512 * token_bytes
losses = {
    "last tokens": (
        [W * token_bytes for W in sizes], [loss(window(W)) for W in sizes]
    ),
    "one KV head": ([all_bytes // 2], [loss(one_kv_head)]),
    "coded keys": ([all_bytes * 3 // 4], [loss(coded_keys)]),
    "state": ([state_bytes], [loss(linear)]),
}
plotting.plot_measured(
    losses,
    predicted={"everything": (losses["last tokens"][0], [full_loss] * 7)},
    xlabel="bytes kept per layer, of a text of 512 tokens",
    ylabel="loss (nats per byte)",
    title=f"Trained for everything ({full_loss:.2f}), and given less",
    log_x=True,
);

# %% [markdown]
# *The last tokens are nearly enough, since this model hardly looks further
# back. (The curve does not fall all the way; chapter 8 finds out why.) Coded
# keys cost a little. One KV head, and the state, ruin it.* Ruined is not the
# last word: a model can be trained for either, and then does far better. And a
# model of a book, which does without a long memory, is no judge of what
# forgetting costs. Chapter 7 takes up heads, bits and numbers, chapter 8 which
# tokens may go, and chapter 9 how much can be recalled from a state that does
# not grow.
#
# ## What is still wrong
#
# - `TILE` and `num_stages` were chosen by reading what the compiler made of
#   them, and the length of a split by counting multiprocessors. Where there is
#   a GPU, they should be measured.
# - A prompt after a long cached text has a program for each tile of queries
#   and KV head, and each reads all keys by itself: its keys are not split.
# - The cache makes its tables as wide as the longest text, step by step. A CUDA
#   graph would want them of one width.
# - Each step waits for all requests. A server lets them come and go between
#   steps, and packs prompts beside decodes: that is chapter 6.
#
# ## In five sentences
#
# 1. Softmax can be computed tile by tile, with a running maximum, a running
#    sum, and a rescaling when the maximum grows.
# 2. So attention does not need its keys in one piece: it looks up each token's
#    block, and masks what comes after the last token, in loads and in scores.
# 3. One program serves all query heads of a KV head, so that each key is read
#    once; a long text is shared among programs, whose results are merged by the
#    softmax of their logsumexps.
# 4. A program keeps memory busy if its loads run ahead of its products, into a
#    second buffer, and whether they do can be read from what the compiler made.
# 5. Attention in decode computes 2 · H / G FLOPs with each number it moves, far
#    fewer than a GPU needs to be busy: there, fewer bytes make it faster.
#
# ## Do you recall?
#
# 1. The first tile has a largest score of 7, the second one of 4. By what is
#    `acc` multiplied in between?
# 2. Why is it not enough to give dead tokens a weight of 0?
# 3. Does TILE have to be the block size?
# 4. Two splits have logsumexps 0 and log(4), and outs 10 and 5. What is out
#    over both?
# 5. With three stages our kernel has one buffer for keys. Why not two?
# 6. A prompt of 100 tokens is all new. Which keys does the query at position 40
#    see? How many keys does a program load whose tile of queries ends there?
# 7. A batch twice as large: how many FLOPs per byte does attention have then,
#    and how many does a weight matrix?
#
# <details><summary>Answers</summary>
#
# 1. By exp(7 - 7) = 1: the maximum stays.
# 2. Their values may be NaN, and 0 times NaN is NaN: they must not be loaded.
# 3. No. The block is looked up for each token of a tile.
# 4. 1/5 of 10 and 4/5 of 5: 6.
# 5. The address of a key is known only when its block's id has come. The stages
#    are divided between the two loads.
# 6. Keys 0 to 40, and these 41 are loaded: `is_token` ends where the tile of
#    queries does.
# 7. Attention has as many as before, since each request brings its own keys.
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
#   [2205.14135](https://arxiv.org/abs/2205.14135): tiles, on chip. Dao,
#   *FlashAttention-2*, 2023, [2307.08691](https://arxiv.org/abs/2307.08691).
#   Shah and others, *FlashAttention-3*, 2024,
#   [2407.08608](https://arxiv.org/abs/2407.08608).
# - Ye and others, *FlashInfer*, 2025,
#   [2501.01005](https://arxiv.org/abs/2501.01005).
# - Kwon and others, *PagedAttention*, 2023,
#   [2309.06180](https://arxiv.org/abs/2309.06180): the kernel's idea.
# - Dao and others, *Flash-Decoding for long-context inference*, 2023,
#   [crfm.stanford.edu](https://crfm.stanford.edu/2023/10/12/flashdecoding.html):
#   splits.
# - Tillet and others, *Triton*, 2019,
#   [doi.org/10.1145/3315508.3329973](https://doi.org/10.1145/3315508.3329973).
# - Jiang and others, *Mistral 7B*, 2023,
#   [2310.06825](https://arxiv.org/abs/2310.06825): the sliding window.
# - Gemma Team, *Gemma 2*, 2024,
#   [2408.00118](https://arxiv.org/abs/2408.00118): the soft cap.
# - Williams and others, *Roofline*, 2009,
#   [doi.org/10.1145/1498765.1498785](https://doi.org/10.1145/1498765.1498785).
# - Ainslie and others, *GQA*, 2023,
#   [2305.13245](https://arxiv.org/abs/2305.13245): fewer KV heads.
# - Katharopoulos and others, *Transformers are RNNs*, 2020,
#   [2006.16236](https://arxiv.org/abs/2006.16236): the state, and elu + 1.
# - NVIDIA's data sheets of the A100 (80 GB, SXM: 2,039 GB/s, 312 TFLOP/s in
#   bf16) and the H100 (SXM: 3.35 TB/s, 1,979 TFLOP/s with sparsity, half of it
#   without), and its whitepapers for the number of multiprocessors.
# - NVIDIA's *CUDA C++ Programming Guide* (technical specifications: registers,
#   shared memory, threads, by compute capability; memory is read in pieces of
#   32 bytes) and *PTX ISA* (`ex2`, and the shape of `mma`).
# - PyTorch's documentation of [CUDA
#   graphs](https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs),
#   and Triton's of
#   [triton.autotune](https://triton-lang.org/main/python-api/generated/triton.autotune.html).
# - Triton's own documentation, of
#   [tl.dot](https://triton-lang.org/main/python-api/generated/triton.language.dot.html):
#   what `input_precision` is when nobody says.
