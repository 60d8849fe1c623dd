# %% [markdown]
# # 4. The paged KV cache: blocks, tables, sharing
#
# A contiguous cache reserves a row for the longest text there may be, and most
# of the row stays empty. Operating systems had the same problem with programs,
# and solved it sixty years ago: cut memory into pages of one size, give each
# program the pages it needs, wherever they lie, and keep a table of them. Here
# we do this with keys and values. The attention stays the same, the text stays
# the same, and nearly all of the memory holds tokens. And since a table is just
# a list of numbers, two requests can share what they have in common.
#
# **You need:** chapter 3, and 140 minutes. No GPU.
#
# **You will be able to**
#
# - write a block manager: allocate, append, free, in constant time per block,
# - find a token's slot through a block table, and gather a request's keys,
# - predict how much of a paged cache holds tokens, and choose a block size,
# - reproduce the PagedAttention paper's figure of how memory is used, name its
#   parts, and explain a cost that it does not show: recomputing requests that
#   were sent back,
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
# ## Four fifths of the memory holds nothing
#
# In chapter 3 we looked at one batch at one moment. Now let us look at a
# server. Requests wait in a queue, and begin as soon as there is room: a prompt
# enters in one step. Each step writes one token for every request in flight,
# and whoever is done leaves. The lengths are drawn at random (log-normal, σ =
# 1), with the means that the PagedAttention paper gives for ShareGPT, a
# collection of chats: 161 tokens of prompt and 338 of answer. A longer prompt
# or answer than 1,024 tokens is shortened to that. So nobody needs more than
# 2,048 tokens, and that is what is reserved for each request.
#
# How much memory does the server have? The paper serves a model of 13 billion
# parameters on a GPU of 40 GB. Beside weights and activations, 12 GiB are left
# for keys and values. A token takes 800 KiB: two vectors of 5,120 numbers in
# each of 40 layers, two bytes per number.

# %%
POOL = 12 * 2**30 // (2 * 5120 * 40 * 2)
print(f"room for {POOL:,} tokens")
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
# The paper measured 20.4% for such a system. (With so few requests in flight,
# the number moves by up to five points from one draw of lengths to the next.)
#
# ## Blocks, on six tokens by hand
#
# Here are our six tokens again, `w h a l e s`, and a **pool** of memory that is
# cut into blocks of four places. A place holds one token's key and value. There
# are eight blocks, numbered 0 to 7. The request needs two of them and gets
# blocks 7 and 2, which happened to be free. That list, [7, 2], is its **block
# table**.
#
# Where is the fifth token, `e`, at position 4? It is in block 4 // 4 = 1 of the
# text, which is block 2 of the pool, at place 4 % 4 = 0. If we number all
# places of the pool one after the other, this is **slot** 2 · 4 + 0 = 8.

# %%
block_table, block_size = [7, 2], 4
for position, letter in enumerate("whales"):
    block_id = block_table[position // block_size]
    slot = block_id * block_size + position % block_size
    print(f"{letter}: position {position} is slot {slot} in block {block_id}")

# %% [markdown]
# All that is wasted is the rest of the last block, two places here, and never
# more than `block_size - 1`. Beyond that nothing is reserved for what may come.
#
# ## The manager: who has which block
#
# Whoever hands out blocks need not know anything about keys and values. The
# `BlockManager` moves numbers:
#
# - `free_block_ids`, a list used as a stack,
# - `block_tables`, a list of block ids for each live request,
# - `seq_lens`, how many tokens each of them has,
# - `ref_count`, for each block, in how many tables it stands: 0 or 1 for now.
#
# You write its methods, as functions whose first argument is `self`. When one
# passes its check, it becomes the method of the class. Two rules hold for all
# of them:
#
# - **All or nothing.** A method that raises an error leaves everything as it
#   was.
# - **Constant time per block.** Take from the end of the free list and put back
#   at its end; never search the list. (With ten blocks it begins as
#   [9, …, 1, 0], so block 0 is the first to go.)
#
# `self.take_block()` is given: it takes a free block and sets its `ref_count`
# to 1. `self.check_live(request_id)` raises the error for an unknown request.
#
# ### Exercise 4.1 · `BlockManager.allocate` ★★ (15 minutes)
#
# Begin a request with blocks for its first `num_tokens` tokens. The checks are
# given. How many blocks does it need? If fewer are free, raise
# `OutOfBlocksError(needed, free)`.
#
# (A cache will call this with no tokens: a request begins empty, and its prompt
# comes with the first step. The server further down calls it with the length of
# the prompt.)

# %% exercise="allocate" given="1"
allocate = BlockManager.allocate

# %%
check(allocate)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Round up: `-(-num_tokens // self.block_size)`. Zero tokens need no block, and
# four tokens in blocks of four need one.
#
# </details>
# <details><summary>Hint 2</summary>
#
# First compare with `len(self.free_block_ids)`. Then fill in
# `self.block_tables[request_id]`, a list, and `self.seq_lens[request_id]`.
#
# </details>

# %% [markdown]
# We keep a record of what we do with a manager, with a copy of it after each
# call.

# %% alt="Blocks of four places, tinted where a token is. Above, the tables: a has blocks 0 and 1, the last half full; b has 2, 3 and 4, with one token in the last. Below, the pool of ten: blocks 0 to 4 belong to a and b, with a ref_count of 1, and 5 to 9 are free, with 0."
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
# *Above: the blocks of each request in the order of its text; the number in a
# box is a block's id. Below: the pool; tinted places hold a token. Request a
# has two places left in its last block, b has three.*
#
# ### Exercise 4.2 · `BlockManager.append` ★★ (15 minutes)
#
# A request goes on by `num_tokens` tokens, in decode by one. Its last block is
# filled first; a new block is taken when the last one is full, and not before.
# If fewer blocks are free than `needed`, raise the same error as in `allocate`.
#
# The given lines under the comment *Others may use the last block too* are for
# a last block that two requests share: they take a block for a copy, and
# `needed` counts that block too. Nothing is shared yet; exercise 4.8 comes back
# to it. (`blocks_needed` takes a dictionary, so that it can count for a whole
# batch.)

# %% exercise="append" given="1 Others"
append = BlockManager.append

# %%
check(append)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# After the error and the given step, add to `self.seq_lens[request_id]`. Then
# take blocks as long as the table is too short for that many tokens.
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
# A request has ended. Each of its blocks has one user less; a block that nobody
# uses any more is free. Forget the request's table and its length.

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
# Count down `self.ref_count[block_id]`, and put the block back on the free list
# only when the count is 0.
#
# </details>

# %% alt="The pool of ten blocks after each of six calls, one row per call. Request a takes blocks 0 and 1, b takes 2 to 4, a grows into 5; b is freed; c takes 4 and one place of 3; a fills 5 and grows into 2. Blocks 6 to 9 stay empty."
call("free", "b")
call("allocate", "c", 5)
call("append", "a", 4)
drawing.draw_history(history, title="What b gave back, c and a have now");

# %% [markdown]
# *Six calls, one per row. The blocks of a lie where there was room.* And yet a
# can be read in the right order:

# %%
manager.block_tables

# %% [markdown]
# ## The pool: one index changes
#
# Now for the keys and values. The pool of one layer is a tensor (num_blocks,
# block_size, G, D). In chapter 3, the key of a new token went to row *request*
# and place *position*. Here it goes to a slot, and that is all that changes.
#
# ### Exercise 4.4 · `slot_mapping` ★★ (15 minutes)
#
# Return the slots of a step's new tokens, N in all, request after request. The
# block tables come as one tensor (B, M), as wide as the longest table. After
# the end of a shorter table its row holds garbage.

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
# If `requests` (N,) holds these row numbers, then
# `block_tables[requests, positions // block_size]` looks up all N blocks at
# once.
#
# </details>

# %%
tables = torch.tensor([[7, 2]])
paged_kv_cache.slot_mapping(tables, torch.tensor([6]), torch.tensor([6]), 4)

# %% [markdown]
# These are the six slots that we found by hand. Writing is one line for keys
# and one for values, `k_cache.view(-1, G, D)[slots] = k`: the pool is the same
# memory, seen as one long row of slots. For reading we take the plainest way
# there is. We copy a request's blocks into one dense piece, in the order of its
# text, and hand it to chapter 3's attention.
#
# ### Exercise 4.5 · `gather_kv` ★★ (15 minutes)
#
# Return the keys and the values of one request, (S, G, D) each; S may be 0.
# Copy its blocks, not the pool. The last block may be filled only in part, and
# after the table's end comes garbage: ids that do not exist.

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
# drops what comes after the last token.
#
# </details>

# %% [markdown]
# ## A cache in blocks
#
# `PagedKVCache` puts the two together: a pool for each layer and one manager.
# It has the methods of chapter 3's cache. `begin` allocates, `extend` appends
# and copies, and `free` frees; `request_ids` says who is in which row. The
# block tables are also kept as a tensor, in which a step rewrites only what has
# changed.

# %%
lm = model.load_model()
cache = PagedKVCache(lm.config, num_blocks=10, block_size=4)
cache.begin("whale")
cache.begin("ship")
new_ids = text.encode("whaleship")
forward_cached(lm, cache, new_ids, torch.tensor([5, 4]))
cache.request_ids, cache.seq_lens, cache.block_tables

# %% [markdown]
# Begin and free requests by the cache's own methods, not by those of its
# manager. The manager counts tokens for which there is room, whether or not a
# step has written them. Here it makes room for three more tokens of `ship`, and
# nobody writes them. The next step would attend to whatever lies there, so the
# cache refuses:

# %%
cache.manager.append("ship", 3)
try:
    forward_cached(lm, cache, new_ids[:1], torch.tensor([0, 1]))
except RuntimeError as error:
    print(f"RuntimeError: {error}")

# %% [markdown]
# ## It computes the same thing
#
# The same `generate_cached` runs on the new cache. We write texts with blocks
# of several sizes, from 1 to 256, and compare with recompute, in double
# precision.

# %%
def paged_cache(model, num_requests, num_blocks, block_size, dtype):
    """A cache in which requests 0, 1, … have begun."""
    cache = PagedKVCache(model.config, num_blocks, block_size, dtype=dtype)
    for request_id in range(num_requests):
        cache.begin(request_id)
    return cache


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
    cache = paged_cache(double_lm, 5, num_blocks, size, torch.float64)
    texts = generate.generate_cached(
        double_lm, prompts, 30, cache, temperature=0
    )
    is_same = all(torch.equal(a, b) for a, b in zip(texts, expected))
    print(f"blocks of {size:3}: {num_blocks:3} of them, same texts: {is_same}")

# %% [markdown]
# Each pool had exactly as many blocks as needed. (The last token of a text is
# never in the cache, hence the 29.) With one block less, the cache says so
# before the first token is written: `generate_cached` knows how many tokens
# will come, and asks for the room of all of them.

# %%
small = paged_cache(double_lm, 5, 15, 16, torch.float64)
try:
    generate.generate_cached(double_lm, prompts, 30, small)
except OutOfBlocksError as error:
    print(f"OutOfBlocksError: {error}")

# %% [markdown]
# ## Predict what is wasted
#
# ### Exercise 4.6 · `paged_utilization` ★ (5 minutes)
#
# What fraction of the places in the blocks that are in use holds a token?
# (Assume that no block is shared.)

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
# Here are the eight passages of chapter 3, with 64 more tokens for each, in
# blocks of 16. For a paged cache we count as reserved the blocks that are in
# use; the rest of the pool is anybody's.

# %%
passages = [p for p in text.load_book().split("\n\n") if 20 < len(p) < 440]
prompts = [text.encode(passage) for passage in passages[10:90:10]]
batch = paged_cache(lm, len(prompts), 256, 16, torch.float32)
generate.generate_cached(lm, prompts, 64, batch, temperature=0.7)
predicted = paged_kv_cache.paged_utilization(batch.seq_lens, 16)
measured = batch.used_bytes / batch.reserved_bytes
contiguous = kv_cache.kv_utilization(batch.seq_lens, 512)
print(f"paged {measured:.1%}, predicted {predicted:.1%}; ", end="")
print(f"contiguous {contiguous:.1%}")

# %% alt="A line: places that hold a token, in percent, over block sizes of 1 to 256 tokens, on a logarithmic axis. It falls, slowly from 100% at 1 to 97% at 16, then faster, to 68% at 256."
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
# *The smaller the block, the less is wasted.* Then why not blocks of one? Each
# block costs a look-up in the table, and the paper (section 7.2) found that
# small blocks leave a GPU reading too little at a time. Blocks of 16 to 128
# were best for chats, 16 and 32 for shorter requests, and so vLLM, the paper's
# system, takes 16 by default.
#
# ## What the pool of a server holds
#
# Back to the server from the beginning, now with four ways to manage its
# memory. Three of them reserve in one piece: the maximum; the answer's length
# rounded up to a power of two, as if that much were known; and the exact
# length, as if an oracle had told it. The fourth takes blocks, from your
# manager. The pool is used for four things:
#
# - **tokens**: places that hold a token,
# - **reservation**: set aside for a request, which will fill them,
# - **internal fragmentation**: set aside for a request, which will not,
# - **external fragmentation and others**: the rest. Nobody has it, but it is
#   too little, or too scattered, for the next request.
#
# Paging sets aside at most the rest of a request's last block (reservation if
# the request will still fill it, internal fragmentation if not). So a request
# that has begun may later find the pool full. Then the request that began last
# is sent back to the queue, so that nobody who came earlier has to wait for it:
# it is **preempted**. Its blocks become free, and when it begins again, its
# keys and values have to be computed again.

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

# %% alt="Six bars, shares of the pool. Tokens: under a fifth with the maximum, then more with a power of two, half with an oracle, nearly all with blocks of 16, less with 64 and 256. Internal fragmentation (hatched) is most of the maximum; reservation (dotted) and external fragmentation (white) are the rest of the oracle."
plotting.plot_usage(
    usages,
    title=f"With blocks of 16, {usages['blocks of 16'].tokens:.1%} of the pool "
    "holds tokens",
);

# %% [markdown]
# *Even an oracle fills only about half of the pool. It reserves in the first
# step what a request needs in its last (dotted), and its pieces leave gaps
# between them (white).*
#
# ### Beside the paper's bars
#
# The paper's figure 2 has bars like our first four. Our *maximum* and *blocks
# of 16* come close to it; *power of two* and *oracle* hold far more tokens than
# the paper's, as the list below shows. One difference is known. We put a piece
# into the first gap that is wide enough. The paper assumes, for the systems
# that it compares with, a **buddy allocator**: every piece has 2^k places and
# begins at a multiple of its size, so 500 tokens take 512 places. (We count the
# rounding under *external and others*. So must the paper, whose oracle has no
# internal part.) Here are buddies:

# %%
paper = {  # tokens, reservation, internal, external and others; in percent
    "maximum": (20.4, 13.3, 57.3, 8.9),
    "power of two": (26.8, 17.9, 13.6, 41.6),
    "oracle": (38.2, 25.2, 0, 36.6),
    "blocks of 16": (96.3,),  # it does not print the rest
}
buddies = {
    name: simulation.simulate(
        BuddyReserving(POOL, reserve), chats, num_steps=3000, warm_up=1500
    )
    for name, reserve in reserves.items()
}
for name, buddy in buddies.items():
    print(f"{name:12} first gap {usages[name].tokens:.1%}, ", end="")
    print(f"buddies {buddy.tokens:.1%}, paper {paper[name][0]}%")

# %% alt="Four bars, shares of the pool with buddies, each above a thin bar of the paper's. Maximum, power of two and oracle look like the paper's, part by part: tokens, reservation, internal and external fragmentation. With blocks of 16, tokens fill nearly all, here and there."
of_buddies = {**buddies, "blocks of 16": usages["blocks of 16"]}
parts = ("tokens", "reservation", "internal", "external")
largest_gap = max(
    abs(100 * getattr(of_buddies[name], part) - of_paper)
    for name, of_all in paper.items()
    for part, of_paper in zip(parts, of_all)
)
plotting.plot_usage(
    of_buddies,
    published=paper,
    title=f"Each part is within {math.ceil(largest_gap)} points of the paper's",
);

# %% [markdown]
# *Each thin bar is the paper's.* The white end of the first one is what seven
# rows of 2,048 leave of 15,728 places. Exact agreement would be luck: the paper
# ran real chats, where we drew lengths from a curve. And there is a lesson in
# the list: part of what paging wins in that figure, a better allocator wins
# too. But only part of it: with the first gap, too, the oracle leaves nearly
# half of the pool without tokens.
#
# ### What preemption costs
#
# Sending a request back is not free. All its tokens, the prompt and what it had
# written, go through the model once more. The simulation counts them:

# %%
blocks = usages["blocks of 16"]
print(f"{blocks.preempted} times a request was sent back, and ", end="")
print(f"{blocks.recomputed:,} tokens were computed again,")
print(f"for {blocks.written:,} computed for the first time, ", end="")
print(f"prompts included: {blocks.recomputed / blocks.written:.0%}")
each_time = blocks.recomputed / blocks.preempted
print(f"{each_time:.0f} tokens each time; a prompt has {mean_prompt:.0f}")

# %% [markdown]
# On average little more than the prompt is computed again. So these requests
# had begun only a short time before, when few blocks were left. The cure is to
# keep some blocks free whenever a request *begins*, for those in flight to grow
# into. Such a reserve is called a **watermark**:

# %%
for watermark in (0, 0.02, 0.05):
    usage = simulation.simulate(
        Paging(POOL, 16, watermark), chats, num_steps=3000, warm_up=1500
    )
    print(f"watermark {watermark:3.0%}: ", end="")
    print(f"{usage.tokens:.1%} of the pool holds tokens, ", end="")
    print(f"{usage.preempted:3} sent back, ", end="")
    print(f"{usage.recomputed / usage.written:.0%} computed again")

# %% [markdown]
# A small reserve buys back most of what was computed again, for one to three
# points of the pool.
#
# There is another way: copy the keys and values of a preempted request to the
# CPU's memory, and back when it goes on. This is called *swapping*. The paper
# (section 7.3) found it slower than recomputing with small blocks, which are
# many small transfers, and about as fast with blocks of 16 to 64. Today's vLLM
# recomputes.
#
# ### As throughput
#
# How many requests are in flight at one time? The ratio to the maximum is
# steady from one draw of lengths to the next, so here are four draws of each:

# %%
in_flight = {"maximum": [], "blocks of 16": []}
for seed in range(4):
    requests = simulation.draw_requests(8000, 161.3, 338.0, seed)
    for name, manager in (
        ("maximum", Reserving(POOL, simulation.reserve_maximum)),
        ("blocks of 16", Paging(POOL, 16, watermark=0.02)),
    ):
        usage = simulation.simulate(
            manager, requests, num_steps=3000, warm_up=1500
        )
        in_flight[name].append(usage.in_flight)
ratios = [b / a for a, b in zip(*in_flight.values())]
print("in flight, beside the paper's (figure 13):")
for name, of_paper in (("maximum", 7.0), ("blocks of 16", 30.4)):
    low, high = min(in_flight[name]), max(in_flight[name])
    print(f"  {name:12} {low:.1f} to {high:.1f}, paper {of_paper}")
print(f"  ratio        {min(ratios):.1f} to {max(ratios):.1f}, paper 4.3")

# %% [markdown]
# A request stays for as many steps as its answer has tokens. So with about five
# times as many requests in flight, about five times as many answers are
# finished *per step*. Per second it is less, since a step with more requests
# takes longer: in chapter 3, eight times the requests gave far less than eight
# times the tokens per second. And what is computed again takes a part of it.
# (The paper also measured how many requests per second each system can take
# before they queue up: 2.7 to 8 times as many as with the maximum, over several
# models. That number has both in it, and waiting too.)
#
# ### Where blocks of 16 are large
#
# A request wastes about half a block. The shorter the request, the larger that
# part. Here are the means of Alpaca, a collection of instructions: 19 tokens of
# prompt and 58 of answer. (At any moment the pool holds longer requests than
# these means say, since long ones stay longer.)

# %% alt="Five bars, shares of the pool of short requests, with blocks of 1, 8, 16, 32 and 64. Tokens fill nearly all with blocks of 1, and less the larger the blocks are, three quarters with 64. Reservation (dotted) takes most of the rest; internal fragmentation (hatched) shows with large blocks."
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
# A table is a list of numbers, and nothing forbids two tables to name the same
# block. If somebody asks for four answers to one prompt, the keys of the prompt
# are the same for all four. So they share its blocks, and `ref_count` says in
# how many tables a block stands.
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

# %% alt="Above, the tables of a and b: both have blocks 0, 1 and 2, all hatched, the last half full. Below, the pool of ten: blocks 0 to 2 belong to a+b, with a ref_count of 2; 3 to 9 are free."
manager = block_manager.BlockManager(num_blocks=10, block_size=4)
history = []
call("allocate", "a", 10)
call("fork", "a", "b")
drawing.draw_blocks(manager, title="Two requests share three blocks");

# %% [markdown]
# *Hatched blocks have more than one user.*
#
# Now b writes a token of its own. It belongs at position 10, in the last block,
# at place 2. But that block is shared: if b wrote there, a would find b's token
# in its text. So b first gets a copy of the block, and writes into the copy.
# The other two blocks are full. Nobody will ever write into them again, and
# they stay shared. This is called **copy on write**.
#
# ### Exercise 4.8 · `BlockManager.copy_on_write` ★★★ (15 minutes)
#
# Make a request the only user of its last block, which it is about to write. If
# it is the only user already, there is nothing to do: return `None`. Otherwise
# put a free block in its place. The manager moves only numbers, so return
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
# The source has one user less. `self.take_block()` gives the target and counts
# its first user. The table's last entry changes. But before all that: is there
# a free block?
#
# </details>

# %% alt="Above, the tables: blocks 0 and 1 are in both, hatched. The third block of a is 2, with two tokens; that of b is 3, with three; neither is hatched. Below, the pool of ten: blocks 0 and 1 belong to a+b, with a ref_count of 2, block 2 to a, block 3 to b; 4 to 9 are free."
call("append", "b", 1)
drawing.draw_blocks(manager, title="The write gave b a block of its own");

# %% [markdown]
# *Block 2 belongs to a alone again. Request b has block 3, with a copy of two
# tokens and a third of its own.* Whoever writes last need not copy: now a may
# write into block 2.

# %% alt="The pool after each of eight calls, one row per call; shared blocks are hatched. A fork to b hatches 0 to 2; a write of b takes block 3, one of a takes none; a fork to c hatches 2 again. When a is freed no block becomes free; c grows into 4; when b is freed only block 3 becomes free."
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
# So many rules need a test. `check_integrity` says whether each block is either
# free once or in as many tables as `ref_count` says, and whether all who share
# a block agree on what is in it. Here is what it says when a write forgets the
# copy:

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
# Now with the model. The first 199 tokens of a prompt of 200 go through it
# once. Then the request is forked seven times, and all eight requests bring the
# last token, so that each can draw a first token of its own. (Their eight rows
# of logits are the same at that moment. Computing them once would save seven of
# 207 tokens.) From then on each goes its own way. The 199 tokens fill 12 blocks
# and 7 places of another. So in the first step, seven of the eight requests get
# a copy of that block, by your `copy_on_write`.

# %%
prompt_ids, num_samples = book_ids[5000:5200], 8


def samples(cache, model, prompts, num_new_tokens):
    return generate.generate_cached(
        model, prompts, num_new_tokens, cache,
        temperature=0.8, generator=torch.Generator().manual_seed(0),
    )


def shared_samples(model, num_new_tokens, dtype=torch.float32):
    cache = paged_cache(model, 1, 200, 16, dtype)
    forward_cached(model, cache, prompt_ids[:-1], torch.tensor([199]))
    for child_id in range(1, num_samples):
        cache.fork(0, child_id)
    last_ids = [prompt_ids[-1:]] * num_samples
    return cache, samples(cache, model, last_ids, num_new_tokens)


cache, texts = shared_samples(lm, 60)
for token_ids in texts[:3]:
    print(repr(text.decode(token_ids)))

# %%
alone = paged_cache(lm, num_samples, 200, 16, torch.float32)
samples(alone, lm, [prompt_ids] * num_samples, 60)
print(f"shared {cache.reserved_bytes / 1e6:.2f} MB, ", end="")
print(f"each its own {alone.reserved_bytes / 1e6:.2f} MB: ", end="")
print(f"{1 - cache.reserved_bytes / alone.reserved_bytes:.0%} saved")

# %% [markdown]
# And is it the same text, shared or not? In double precision, with the same
# dice:

# %%
alone = paged_cache(double_lm, num_samples, 200, 16, torch.float64)
own_texts = samples(alone, double_lm, [prompt_ids] * num_samples, 20)
_, texts = shared_samples(double_lm, 20, torch.float64)
all(torch.equal(a[-20:], b[-20:]) for a, b in zip(texts, own_texts))

# %% [markdown]
# How much is saved depends on the length of the answers. Of c blocks per
# request, 12 are the prompt's and are there once instead of eight times.

# %% alt="Memory saved by sharing, in percent, over the tokens of each of eight answers, from 1 to 160. The dashed prediction falls in steps, large ones first, from about 80% to under half. The measured points lie on it."
def saved_percent(n):
    c = math.ceil((199 + n) / 16)
    return 100 * (1 - (12 + 8 * (c - 12)) / (8 * c))


lengths = [1, 10, 20, 40, 80, 160]
saved = []
for n in lengths:
    shared, _ = shared_samples(lm, n)
    own_blocks = num_samples * math.ceil((199 + n) / 16)
    own = kv_cache.kv_cache_bytes(lm.config, own_blocks * 16)
    saved.append(100 * (1 - shared.reserved_bytes / own))
every = range(1, 161)
plotting.plot_measured(
    {"measured": (lengths, saved)},
    predicted={"predicted": (every, [saved_percent(n) for n in every])},
    xlabel="tokens of each answer (the prompt has 200)",
    ylabel="memory saved by sharing (%)",
    title=f"Eight answers of {lengths[-1]} tokens: {saved[-1]:.0f}% saved",
);

# %% [markdown]
# *The longer the answers, the smaller the prompt's part of the memory. The
# prediction falls in steps, since blocks are taken whole.*
#
# Two relatives: in **beam search** the forks come and go at every step, and the
# paper saved 38 to 66% of the blocks by sharing them (section 6.3). With
# **sliding-window attention** (Mistral 7B), a layer reads only its last 4,096
# keys, so a block is free as soon as it lies entirely before the window.
#
# ## What it costs: time
#
# Gathering copies every key and value of every request, in every layer, at
# every step. What does that cost? We time three ways to decode, taking turns,
# with eight requests of 448 tokens each. Both caches leave attention to torch's
# fused attention, as the batch in chapter 3 did. The paged one gathers a few
# requests before each call.

# %%
results = bench.bench(batch_size=8, context=448, num_steps=20)
for result in results:
    speed = f"{result['tokens_per_s']:7.1f} tokens per second"
    print(f"{result['name']:12} {speed}")

# %% [markdown]
# Here the copy costs little. In one layer of our model a token takes 512 bytes,
# 2 · 2 · 32 numbers of four bytes; so a request's copy has 448 · 512 bytes, 229
# kB, and attention reads it right after it was written. With longer texts and
# larger heads the copy costs much on a CPU, too. On a GPU, where decoding waits
# for memory, it would triple the traffic of keys and values: read the blocks,
# write the copy, read the copy. Chapter 5 measures this, and does without the
# copy.
#
# ## The next column of the table

# %%
cells = table.fit(table.sweep("paged"))
Markdown(table.render(cells))

# %% [markdown]
# All orders are those of chapter 3. What differs is the constant of what is
# reserved: 256 instead of 512, the bytes of the tokens that came (here they
# fill their blocks exactly) instead of twice as many. (*Block calls* are calls
# of the model's blocks, its layers. They have nothing to do with blocks of
# memory.)

# %%
check.summary()

# %% [markdown]
# ## What is still wrong
#
# A step reads a block table, and then copies everything that the table points
# to, before it computes anything:

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
# 2. A manager hands out numbers: a free list, tables, and reference counts, in
#    constant time per block, all or nothing.
# 3. Token p lies in block `table[p // block_size]`, at place `p % block_size`;
#    compared with chapter 3, only this index changes.
# 4. With blocks of 16 nearly all of the pool holds tokens, and about five times
#    as many requests are in flight as with rows for the longest; what is sent
#    back is computed again, and a small watermark saves most of that.
# 5. Requests share blocks of equal tokens, and copy one only when they write
#    into it.
#
# ## Do you recall?
#
# 1. A request has 33 tokens, in blocks of 16. How many blocks does it have, and
#    how many places are wasted?
# 2. Its table is [5, 0, 9]. In which slot is position 20?
# 3. Two requests share a block that is full, and one goes on. What is copied?
# 4. Why must `append` count its blocks before it takes the first?
# 5. Why does an oracle that knows every length fill only about half of the
#    pool?
# 6. A server sends requests back all the time. What is wasted, and what helps?
#
# <details><summary>Answers</summary>
#
# 1. Three blocks, 15 places.
# 2. Block 1 of the text is block 0 of the pool, place 4: slot 4.
# 3. Nothing: the next token goes into a new block.
# 4. If the pool ends halfway, the blocks taken would be lost, or the request
#    half grown.
# 5. It reserves at the start what is needed only at the end, and at most
#    moments a part of each answer is not written yet. And its pieces leave
#    gaps.
# 6. Their tokens are computed again. A watermark: let nobody begin into the
#    last few blocks.
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
# - Jiang and others, *Mistral 7B*, 2023,
#   [2310.06825](https://arxiv.org/abs/2310.06825): sliding windows.
# - vLLM, *Optimization and tuning*,
#   [docs.vllm.ai](https://docs.vllm.ai/en/stable/configuration/optimization/):
#   preempted requests are recomputed.
