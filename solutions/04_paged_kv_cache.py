# %% [markdown]
# # 4. The paged KV cache: blocks, tables, sharing
#
# A contiguous cache reserves a row for the longest text there may be, and most
# of the row stays empty. Operating systems had this problem with programs, and
# solved it sixty years ago: cut memory into pages of one size, give a program
# the pages it needs, wherever they lie, and keep a table of them. Here we do
# the same with keys and values. The attention is the same, the text is the
# same, and nearly all of the memory holds tokens. And since a table is a list
# of numbers, two requests can share what they have in common.
#
# **You need:** chapter 3, and 130 minutes. No GPU.
#
# **You will be able to**
#
# - write a block manager: allocate, append, free, in constant time per block,
# - find a token's slot through a block table, and gather a request's keys,
# - predict how much of a paged cache holds tokens, and choose a block size,
# - replay the paper's figure of how memory is used, and say what it leaves out,
# - share a prompt between requests, and copy a block only when it is written.

# %%
import copy
import math
from collections.abc import Hashable

import torch
from IPython.display import Markdown

from lib import (
    block_manager, generate, kv_cache, model, paged_kv_cache, simulation,
    text,
)
from lib.figures import drawing, plotting
from lib.measure import bench, meter, table
from lib.block_manager import BlockManager, OutOfBlocksError, check_num_tokens
from lib.course.check import check
from lib.generate import forward_cached
from lib.kv_cache import ContiguousKVCache, new_positions
from lib.paged_kv_cache import PagedKVCache
from lib.simulation import BuddyReserving, Paging, Reserving

plotting.use_course_style()
torch.set_num_threads(1)  # steadier timings

# %% [markdown]
# ## Four fifths of the memory hold nothing
#
# In chapter 3 we looked at one batch, at one instant. Let us look at a server.
# Requests wait in a queue, and begin as soon as there is room; each step writes
# one token for every request in flight; whoever is done leaves. The lengths are
# drawn at random (log-normal, σ = 1) with the means that the PagedAttention
# paper gives for ShareGPT, a collection of chats: 161 tokens of prompt and 338
# of answer. Then both are cut at 1,024, so that nobody needs more than 2,048,
# and that is what is reserved. The pool has room for 16,384 tokens.

# %%
POOL = 16384
chats = simulation.draw_requests(8000, 161.3, 338.0)
for request in chats[:3]:
    print(request)
mean_prompt = sum(r.prompt_len for r in chats) / len(chats)
mean_output = sum(r.output_len for r in chats) / len(chats)
print(f"means after the cut: {mean_prompt:.0f} and {mean_output:.0f} tokens")

# %% [markdown]
# We let the server warm up for 1,500 steps, and look at the next 3,000.

# %%
maximum = simulation.simulate(
    Reserving(POOL, simulation.reserve_maximum),
    chats, num_steps=3000, warm_up=1500,
)
print(f"{maximum.tokens:.1%} of the pool holds tokens, ", end="")
print(f"{maximum.in_flight:.0f} requests are in flight")

# %% [markdown]
# The paper measured 20.4% for such a system. (With so few requests in flight
# the number moves by some percent from one draw of lengths to another.)
#
# ## Blocks, on six tokens by hand
#
# Our six tokens again, `w h a l e s`, and a **pool** of memory cut into blocks
# of four places each, a place for one token's key and value. Eight blocks here,
# numbered 0 to 7. The request needs two. It is given blocks 7 and 2, since they
# happened to be free; and that list, [7, 2], is its **block table**.
#
# Where is the fifth token, `e`, at position 4? Block 4 // 4 = 1 of the text,
# which is block 2 of the pool, at place 4 % 4 = 0. Counting all places of the
# pool through, that is **slot** 2 · 4 + 0 = 8.

# %%
block_table, block_size = [7, 2], 4
for position, letter in enumerate("whales"):
    block_id = block_table[position // block_size]
    slot = block_id * block_size + position % block_size
    print(f"{letter}: position {position} is slot {slot} in block {block_id}")

# %% [markdown]
# What is wasted is the rest of the last block, two places. Never more than
# `block_size - 1`, and nothing is reserved for what may come.
#
# ## The manager: who has which block
#
# Who hands out blocks need not know a thing about keys and values. The
# `BlockManager` moves numbers:
#
# - `free_block_ids`, a list used as a stack,
# - `block_tables`, a list of block ids for each live request,
# - `seq_lens`, how many tokens each has,
# - `ref_count`, for each block, in how many tables it stands. For now 0 or 1.
#
# You write its methods, as functions whose first argument is `self`. When one
# passes, it becomes the class's. Two rules hold for all of them:
#
# - **All or nothing.** A method that raises an error leaves everything as it
#   was.
# - **Constant time per block.** Take from the end of the free list, put back at
#   its end, and never search it. (That of ten blocks begins as [9, …, 1, 0], so
#   block 0 is the first to go.)
#
# `self.take_block()` is given: it takes a free block and sets its `ref_count`
# to 1. `self.check_live(request_id)` raises the error for an unknown request.
#
# ### Exercise 4.1 · `BlockManager.allocate` ★★ (15 minutes)
#
# Begin a request with blocks for its first `num_tokens` tokens: its prompt. The
# checks are given. How many blocks does it need? If fewer are free, raise
# `OutOfBlocksError(needed, free)`.

# %% exercise="allocate" given="1"
allocate = BlockManager.allocate

# %%
check(allocate)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `math.ceil(num_tokens / self.block_size)`: zero tokens need no block, and four
# tokens in blocks of four need one.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Compare with `len(self.free_block_ids)` first. Then fill in
# `self.block_tables[request_id]`, a list, and `self.seq_lens[request_id]`.
#
# </details>

# %% [markdown]
# We write down what we do with a manager, and after each call keep a copy of
# it.

# %%
manager = block_manager.BlockManager(num_blocks=10, block_size=4)
history = []


def call(method, *args):
    getattr(manager, method)(*args)
    words = f"{method}({', '.join(map(repr, args))})"
    history.append((words, copy.deepcopy(manager)))


call("allocate", "a", 6)
call("allocate", "b", 9)
drawing.draw_blocks(manager, title="Two requests, five blocks");

# %% [markdown]
# *Above, the blocks in the order of each text; a number is the id of a block.
# Below, the pool: what is tinted holds a token. Request a has two places left
# in its last block, b has three.*
#
# ### Exercise 4.2 · `BlockManager.append` ★★ (15 minutes)
#
# A request goes on by `num_tokens`, in decode by one. The last block is filled
# first, and a new one is taken when it is full, not before. If fewer are free
# than `needed`, raise the same error as in `allocate`.
#
# The step named *Others* is for a last block that two requests share: it takes
# a block for a copy, which `blocks_needed` counts too. Nothing is shared yet;
# we come back to it below. (`blocks_needed` takes a dictionary, so that it can
# count for a whole batch.)

# %% exercise="append" given="1 Others"
append = BlockManager.append

# %%
check(append)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# After the error and the given step: add to `self.seq_lens[request_id]`. Then
# blocks, as long as the table is too short for that many tokens.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `while len(block_table) * self.block_size < self.seq_lens[request_id]:`
#
# </details>

# %%
call("append", "a", 3)  # two fill its last block, one needs a new one
[len(table) for table in manager.block_tables.values()]

# %% [markdown]
# ### Exercise 4.3 · `BlockManager.free` ★ (10 minutes)
#
# A request has ended. In each of its blocks one user less; a block that nobody
# uses any more is free. Forget its table and its length.

# %% exercise="free" given="1"
free = BlockManager.free

# %%
check(free)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `self.block_tables.pop(request_id)` gives the table and forgets it.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Count down `self.ref_count[block_id]`, and only when it is 0 put the block
# back on the free list.
#
# </details>

# %%
call("free", "b")
call("allocate", "c", 5)
call("append", "a", 4)
drawing.draw_history(history, title="What b gave back, c and a have now");

# %% [markdown]
# *Six calls, one a row. The blocks of a lie where there was room.* And `a` is
# read in the right order all the same:

# %%
manager.block_tables

# %% [markdown]
# ## The pool: one index changes
#
# Now keys and values. The pool of a layer is a tensor (num_blocks, block_size,
# G, D). Chapter 3 wrote the key of a new token to row *request*, place
# *position*. Here it goes to a slot, and everything else stays.
#
# ### Exercise 4.4 · `slot_mapping` ★★ (15 minutes)
#
# The slots of a step's new tokens, N in all, request after request. The block
# tables come as one tensor (B, M), as wide as the longest; behind the end of a
# shorter one stands garbage.

# %% exercise="slot_mapping"
from lib.paged_kv_cache import slot_mapping

# %%
check(slot_mapping)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `new_positions(seq_lens, query_lens)`, from chapter 3, gives each new token's
# position in its text, (N,). Which row of `block_tables` is its own, you know
# from `append_kv`: `repeat_interleave` repeats each request's number as often
# as it has new tokens.
#
# </details>
# <details><summary>Hint 2</summary>
#
# With those as `requests`, (N,), `block_tables[requests, positions //
# block_size]` looks up all N blocks at once.
#
# </details>

# %%
tables = torch.tensor([[7, 2]])
paged_kv_cache.slot_mapping(tables, torch.tensor([6]), torch.tensor([6]), 4)

# %% [markdown]
# The same six slots as by hand. Writing is one line for keys and one for
# values, `k_cache.view(-1, G, D)[slots] = k`: the pool is still the same
# memory, seen as one row of slots. For reading we take the plainest way
# there is: copy a request's blocks into one dense piece, in the order of its
# text, and hand it to chapter 3's attention.
#
# ### Exercise 4.5 · `gather_kv` ★★ (15 minutes)
#
# Keys and values of one request, (S, G, D) each; S may be 0. Copy its blocks,
# not the pool. The last block may be filled in part, and behind the table's end
# stands garbage, ids that do not exist.

# %% exercise="gather_kv"
from lib.paged_kv_cache import gather_kv

# %%
check(gather_kv)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `k_cache.index_select(0, block_ids)` copies blocks in the order of the ids:
# (number of blocks, block_size, G, D).
#
# </details>
# <details><summary>Hint 2</summary>
#
# `.flatten(0, 1)` makes one dimension of blocks and places, and `[:seq_len]`
# drops what is behind the last token.
#
# </details>

# %% [markdown]
# ## It computes the same thing
#
# `PagedKVCache` puts the two together: a pool for each layer, one manager. It
# has the methods of chapter 3's cache, so the same `generate_cached` runs on
# it. We write texts with blocks of several sizes, from 1 to 256, and compare
# with recompute, in double precision.

# %%
def begin_all(cache, prompts):
    for request_id in range(len(prompts)):
        cache.begin(request_id)


double_lm = model.load_model().double()
book_ids = text.encode(text.load_book())
prompts = [book_ids[1000:1000 + n] for n in (1, 15, 16, 17, 40)]
expected = [
    generate.generate_recompute(double_lm, ids, 30, temperature=0)
    for ids in prompts
]

# %%
for size in [1, 2, 7, 16, 64, 256]:
    num_blocks = sum(math.ceil((len(ids) + 29) / size) for ids in prompts)
    cache = PagedKVCache(
        double_lm.config, num_blocks, size, dtype=torch.float64
    )
    begin_all(cache, prompts)
    texts = generate.generate_cached(
        double_lm, prompts, 30, cache, temperature=0
    )
    is_same = all(torch.equal(a, b) for a, b in zip(texts, expected))
    print(f"blocks of {size:3}: {num_blocks:3} of them, same texts: {is_same}")

# %% [markdown]
# Each pool had exactly as many blocks as needed. (The last token of a text is
# never in the cache, hence the 29.) With one block less the cache says so
# before the first token is written: `generate_cached` knows how many will come,
# and asks for all of them.

# %%
small = PagedKVCache(
    double_lm.config, num_blocks=15, block_size=16, dtype=torch.float64
)
begin_all(small, prompts)
try:
    generate.generate_cached(double_lm, prompts, 30, small)
except OutOfBlocksError as error:
    print(f"OutOfBlocksError: {error}")

# %% [markdown]
# ## Predict what is wasted
#
# ### Exercise 4.6 · `paged_utilization` ★ (5 minutes)
#
# Of all places in the blocks that are in use, which share holds a token? (No
# block is shared here.)

# %% exercise="paged_utilization"
from lib.paged_kv_cache import paged_utilization

# %%
check(paged_utilization)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Each request has `math.ceil(seq_len / block_size)` blocks: round up for each,
# then add.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `seq_lens.tolist()` gives numbers that `math.ceil` takes.
#
# </details>

# %% [markdown]
# The eight passages of chapter 3, with 64 tokens more for each, in blocks of
# 16:

# %%
lm = model.load_model()
passages = [p for p in text.load_book().split("\n\n") if 20 < len(p) < 440]
prompts = [text.encode(passage) for passage in passages[10:90:10]]
batch = PagedKVCache(lm.config, num_blocks=256, block_size=16)
begin_all(batch, prompts)
generate.generate_cached(lm, prompts, 64, batch, temperature=0.7)
predicted = paged_kv_cache.paged_utilization(batch.seq_lens, 16)
measured = batch.used_bytes / batch.reserved_bytes
contiguous = kv_cache.kv_utilization(batch.seq_lens, 512)
print(f"paged {measured:.1%}, predicted {predicted:.1%}; ", end="")
print(f"contiguous {contiguous:.1%}")

# %%
sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256]
shares = [
    100 * paged_kv_cache.paged_utilization(batch.seq_lens, size)
    for size in sizes
]
plotting.plot_measured(
    {"": (sizes, shares)},
    xlabel="block size (tokens)",
    ylabel="places that hold a token (%)",
    title=f"Blocks of 16 waste {100 - shares[4]:.0f}%, "
    f"blocks of 256 waste {100 - shares[-1]:.0f}%",
    log_x=True,
);

# %% [markdown]
# *The smaller the block, the less is wasted.* Why not blocks of one, then? Each
# block is an entry in a table that attention has to look up, and of small
# blocks, so the paper (section 7.2), a GPU reads too little at a time. It found
# 16 to 128 best for chats, 16 and 32 for shorter requests, and took 16.
#
# ## What the pool of a server holds
#
# Now the server of the beginning, with four ways to manage its memory. Three
# reserve in one piece: the maximum; the answer's length rounded up to a power
# of two, as if that much were known; and the exact length, as if an oracle had
# told. The fourth takes blocks, from your manager. What the pool is used for:
#
# - *tokens*: places that hold a token,
# - *later*: held by a request, which will fill them,
# - *never*: held by a request, which will not,
# - *free*: held by nobody, but too few or too scattered for the next request.
#
# Blocks promise nothing. When the pool is full and a request needs one more,
# the request that began last is sent back to the queue: it is **preempted**,
# its blocks are free, and when it begins again its keys have to be computed
# again.

# %%
reserves = {
    "maximum": simulation.reserve_maximum,
    "power of two": simulation.reserve_power_of_two,
    "oracle": simulation.reserve_oracle,
}
managers = {
    name: Reserving(POOL, reserve) for name, reserve in reserves.items()
}
managers |= {f"blocks of {size}": Paging(POOL, size) for size in (16, 64, 256)}
usages = {
    name: simulation.simulate(manager, chats, num_steps=3000, warm_up=1500)
    for name, manager in managers.items()
}

# %%
plotting.plot_usage(
    usages,
    title=f"With blocks of 16, {usages['blocks of 16'].tokens:.1%} of the pool "
    "holds tokens",
);

# %% [markdown]
# *Even an oracle fills only half of the pool: it reserves in the first step
# what a request needs in its last (dotted), and its pieces leave gaps between
# them (white).*
#
# ### Beside the paper's bars
#
# The paper's figure 2 has 20.4% for the maximum, 26.8% for the power of two,
# 38.2% for the oracle, and 96.3% for blocks of 16. Ours come close at both
# ends, but not in the middle. One difference is known. We put a piece into the
# first gap that is wide enough. The paper assumes, for the systems it compares
# with, a **buddy allocator**: every piece has 2^k places and begins at a
# multiple of its size, so 500 tokens take 512 places. We can do that too:

# %%
paper = {"maximum": 20.4, "power of two": 26.8, "oracle": 38.2}
buddies = {
    name: simulation.simulate(
        BuddyReserving(POOL, reserve), chats, num_steps=3000, warm_up=1500
    )
    for name, reserve in reserves.items()
}
for name, buddy in buddies.items():
    print(f"{name:12} first gap {usages[name].tokens:.1%}, ", end="")
    print(f"buddies {buddy.tokens:.1%}, paper {paper[name]}%")

# %%
plotting.plot_usage(
    {**buddies, "blocks of 16": usages["blocks of 16"]},
    published={**paper, "blocks of 16": 96.3},
    title="With buddies our bars come close to the paper's",
);

# %% [markdown]
# *Diamonds: the paper's shares.* What is left of the difference we did not take
# apart. The first bar moves by some percent from draw to draw, and the paper
# ran real chats, where we drew lengths from a curve. And a lesson: part of what
# paging wins in that figure, a better allocator wins too. Not all of it: even
# the oracle with the better one fills half.
#
# ### As throughput
#
# As long as a step of decoding takes about the same for few requests as for
# many (chapter 3), more requests in flight are more answers in the same time.
# (Their keys have to be read, which takes a part of it back.) What is finished
# in the 3,000 steps, and what it cost in requests sent back:

# %%
for name, usage in usages.items():
    gain = usage.finished / usages["maximum"].finished
    print(f"{name:13} {usage.in_flight:4.1f} in flight, ", end="")
    print(f"{usage.finished} finished ({gain:.1f} times), ", end="")
    print(f"{usage.preempted} sent back")

# %% [markdown]
# ### Where blocks of 16 are large
#
# A request wastes about half a block. The shorter it is, the larger is that
# part. These are the means of Alpaca, a collection of instructions: 19 tokens
# of prompt and 58 of answer.

# %%
short = simulation.draw_requests(8000, 19.3, 58.5)
short_usages = {
    f"blocks of {size}": simulation.simulate(
        Paging(POOL, size), short, num_steps=500, warm_up=400
    )
    for size in (1, 8, 16, 32, 64)
}
plotting.plot_usage(
    short_usages,
    title="Of short requests, blocks of 16 leave "
    f"{1 - short_usages['blocks of 16'].tokens:.0%} of the pool unused",
);

# %% [markdown]
# *Smaller blocks win it back.*
#
# ## Sharing: the same tokens, stored once
#
# A table is a list of numbers. Nothing forbids two tables to name the same
# block. If somebody asks for four answers to one prompt, the prompt's keys are
# the same for all four. So they share its blocks, and `ref_count` says how many
# tables a block stands in.
#
# ### Exercise 4.7 · `BlockManager.fork` ★★ (10 minutes)
#
# Begin a request with the same tokens as another one, in the same blocks. It
# takes no block from the free list.

# %% exercise="fork" given="1"
fork = BlockManager.fork

# %%
check(fork)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Two requests, two lists: what is appended to one table must not appear in the
# other.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Each block of the table now stands in one table more.
#
# </details>

# %%
manager = block_manager.BlockManager(num_blocks=10, block_size=4)
history = []
call("allocate", "a", 10)
call("fork", "a", "b")
drawing.draw_blocks(manager, title="Two requests share three blocks");

# %% [markdown]
# *Hatched blocks have more than one user.*
#
# Now b writes a token, its own. It belongs at position 10, in the last block,
# at place 2. That block is shared: if b wrote there, a would find b's token in
# its text. So b first gets a copy of the block, of its own, and writes into
# that. The other two blocks are full; nobody will write into them ever again,
# and they stay shared. This is **copy on write**.
#
# ### Exercise 4.8 · `BlockManager.copy_on_write` ★★★ (15 minutes)
#
# Make a request the only user of its last block, which it is about to write. If
# it is that already, there is nothing to do: return `None`. Otherwise take a
# free block in its place. The manager moves numbers only, so return
# `(source, target)`, and whoever holds the keys copies them.
#
# `append` calls this, in the step named *Others*, when the last block has room.

# %% exercise="copy_on_write" given="1"
copy_on_write = BlockManager.copy_on_write

# %%
check(copy_on_write)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `self.ref_count[source] == 1` means: nobody else uses it.
#
# </details>
# <details><summary>Hint 2</summary>
#
# One user less for the source; `self.take_block()` gives the target and counts
# its first user; and the table's last entry changes. But before all that: is
# there a free block?
#
# </details>

# %%
call("append", "b", 1)
drawing.draw_blocks(manager, title="The write gave b a block of its own");

# %% [markdown]
# *Block 2 is a's alone again, and b has block 3, with a copy of two tokens and
# a third.* Whoever writes last need not copy: now a may write into block 2.

# %%
call("append", "a", 1)
call("fork", "a", "c")
call("free", "a")
call("append", "c", 2)
call("free", "b")
drawing.draw_history(
    history, title="Blocks live as long as somebody uses them"
);

# %% [markdown]
# *Row by row: a fork takes nothing; a write into a shared block takes a copy;
# when a ends, its blocks stay with those who share them.*
#
# So many rules need a test. `check_integrity` says whether every block is free
# once, or in as many tables as `ref_count` says, and whether all who share a
# block agree on what it is. Here is what it says if a write forgets the copy:

# %%
broken = block_manager.BlockManager(num_blocks=10, block_size=4)
broken.allocate("a", 10)
broken.fork("a", "b")
broken.seq_lens["b"] += 1  # b writes into the shared block
try:
    broken.check_integrity()
except AssertionError as error:
    print(error)

# %% [markdown]
# ## Eight answers to one prompt
#
# Now with the model. All but the last token of a prompt of 200 go through it
# once. Then there are seven forks, and all eight requests bring the last token:
# each needs its logits, to draw a first token of its own. From there on they go
# their ways.

# %%
prompt_ids, num_samples = book_ids[5000:5200], 8


def shared_samples(num_new_tokens):
    cache = PagedKVCache(lm.config, num_blocks=200, block_size=16)
    cache.begin(0)
    forward_cached(lm, cache, prompt_ids[:-1], torch.tensor([199]))
    for child_id in range(1, num_samples):
        cache.fork(0, child_id)
    texts = generate.generate_cached(
        lm, [prompt_ids[-1:]] * num_samples, num_new_tokens, cache,
        temperature=0.8, generator=torch.Generator().manual_seed(0),
    )
    return cache, texts


cache, texts = shared_samples(60)
for token_ids in texts[:3]:
    print(repr(text.decode(token_ids)))

# %%
alone = PagedKVCache(lm.config, num_blocks=200, block_size=16)
begin_all(alone, range(num_samples))
generate.generate_cached(lm, [prompt_ids] * num_samples, 60, alone)
print(f"shared {cache.reserved_bytes / 1e6:.2f} MB, ", end="")
print(f"each its own {alone.reserved_bytes / 1e6:.2f} MB: ", end="")
print(f"{1 - cache.reserved_bytes / alone.reserved_bytes:.0%} saved")

# %%
lengths = [1, 10, 20, 40, 80, 160]
saved = []
for n in lengths:
    shared, _ = shared_samples(n)
    blocks = num_samples * math.ceil((200 + n - 1) / 16)
    own = kv_cache.kv_cache_bytes(lm.config, blocks * 16)
    saved.append(100 * (1 - shared.reserved_bytes / own))
plotting.plot_measured(
    {"": (lengths, saved)},
    xlabel="tokens of each answer (the prompt has 200)",
    ylabel="memory saved by sharing (%)",
    title=f"Eight answers of {lengths[-1]} tokens: {saved[-1]:.0f}% saved",
);

# %% [markdown]
# *The longer the answers, the less of the memory is the prompt's. It falls in
# steps, since blocks are taken whole.*
#
# ## What it costs: time
#
# Gathering copies every key and value of every request, in every layer, at
# every step. Decoding in a batch of eight, with 448 tokens each, the ways to do
# it in turns:

# %%
results = bench.bench(batch_size=8, context=448, num_steps=20)
for result in results:
    print(f"{result['name']:12} {result['tokens_per_s']:7.1f} tokens/s")

# %% [markdown]
# On our CPU it costs little. A likely reason: in one layer the copy of one
# request is small, 448 · 256 bytes, so that attention finds it in the
# processor's cache. On a GPU, where decoding waits for memory, it would triple
# the traffic of keys and values: read the blocks, write the copy, read the
# copy. Chapter 5 measures, and does without.
#
# ## The next column of the table

# %%
cells = table.fit(table.sweep("paged"))
Markdown(table.render(cells))

# %% [markdown]
# The same orders as in chapter 3, all of them. What differs is the constant of
# what is reserved, 256 in the place of 512: the bytes of the tokens that came
# (here they fill their blocks exactly), and not of twice as many. For a paged
# cache we count as reserved the blocks that are in use; the rest of the pool is
# anybody's.

# %%
check.summary()

# %% [markdown]
# ## What is still wrong
#
# A block table is read, and then everything it points to is copied before
# anything is computed:

# %%
dense = meter.measure(
    lambda: [
        paged_kv_cache.gather_kv(
            batch.k_cache[0], batch.v_cache[0], table_of_one, int(seq_len)
        )
        for table_of_one, seq_len in zip(batch.block_tables, batch.seq_lens)
    ]
)
copied = sum(k.nbytes + v.nbytes for k, v in dense.value) * lm.config.num_layers
print(f"{copied / 1e6:.1f} MB copied in each step to write 8 tokens")

# %% [markdown]
# Attention can read the blocks where they lie. It needs the table, a mask for
# the last block, and the running sums of chapter 1, so that it can go through
# the keys block by block. That is a kernel, and chapter 5 writes it.
#
# ## In five sentences
#
# 1. Memory is cut into blocks of one size; a request has a table of its blocks,
#    and wastes at most the rest of the last one.
# 2. A manager hands out numbers: a free list, tables, and reference counts,
#    constant time per block, all or nothing.
# 3. Token p lies in block `table[p // block_size]`, at place `p % block_size`;
#    compared with chapter 3, only this index changes.
# 4. With blocks of 16 nearly all of the pool holds tokens, and several times as
#    many requests are in flight as with rows reserved for the longest.
# 5. Requests share blocks of equal tokens, and copy one only when they write
#    into it.
#
# ## Do you recall?
#
# 1. Blocks of 16, a request of 33 tokens: how many blocks, and how many places
#    are wasted?
# 2. Its table is [5, 0, 9]. In which slot is position 20?
# 3. Two requests share a block that is full, and one goes on. What is copied?
# 4. Why must `append` count its blocks before it takes the first?
# 5. Why does an oracle that knows every length fill only half of the pool?
#
# <details><summary>Answers</summary>
#
# 1. Three blocks, 15 places.
# 2. Block 1 of the text is block 0 of the pool, place 4: slot 4.
# 3. Nothing: the next token goes into a new block.
# 4. If the pool ends halfway, the blocks taken would be lost, or the request
#    half grown.
# 5. It reserves at the start what is needed at the end; on average half of an
#    answer is not written yet. And its pieces leave gaps.
#
# </details>
#
# ## Sources
#
# - Kwon and others, *Efficient Memory Management for Large Language Model
#   Serving with PagedAttention*, 2023,
#   [2309.06180](https://arxiv.org/abs/2309.06180): paging, sharing, copy on
#   write; what we replayed is figure 2.
# - Kilburn and others, *One-Level Storage System*, 1962,
#   [doi.org/10.1109/TEC.1962.5219356](https://doi.org/10.1109/TEC.1962.5219356):
#   where paging comes from.
# - Knuth, *The Art of Computer Programming*, volume 1, section 2.5: first fit
#   and buddies.
