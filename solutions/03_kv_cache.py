# %% [markdown]
# # 3. The KV cache: keep what does not change
#
# To write one more byte, chapter 1 runs the whole text through the model, and
# computes again what it had computed a step before. Here we keep it. What must
# be kept is a key and a value for each token, in each layer; what it buys is a
# step whose work no longer grows with the text, but for attention. Then comes
# the bill: memory that is **reserved** for tokens that may never come.
#
# **You need:** chapter 1, whose model, letters and `attend` we use, and 125
# minutes. No GPU.
#
# **You will be able to**
#
# - say what a KV cache holds, and how many bytes that is for any model,
# - write a cache for requests of different lengths, and attention over it,
# - write the loop: prefill, then decode, each token through the model once,
# - say why prefill is bound by arithmetic and decoding by memory bandwidth, and
#   see it on your own machine,
# - measure what part of a cache holds tokens.

# %%
import inspect
import math
from collections.abc import Sequence

import torch
from IPython.display import Markdown

from lib import generate, kv_cache, model, sampling, text
from lib.figures import drawing, plotting
from lib.measure import meter, table
from lib.config import LLAMA3_8B, ModelConfig
from lib.course.check import check
from lib.generate import check_cached_generation, forward_cached
from lib.kv_cache import ContiguousKVCache, KVCache, new_positions
from lib.model import Transformer, attend_fused

plotting.use_course_style()
torch.set_num_threads(1)  # steadier timings
torch.manual_seed(0);

# %% [markdown]
# ## Most of what a step computes, it had before
#
# The model of chapter 1 again, a prompt of 30 bytes, and 200 new ones. A small
# hook counts the tokens that go through the first layer's query matrix, that
# is, through the model.

# %%
lm = model.load_model()
book_ids = text.encode(text.load_book())
prompt_ids = text.encode("The whale rose slowly from the")
num_projected = []
lm.blocks[0].attention.q_proj.register_forward_pre_hook(
    lambda module, args: num_projected.append(args[0][..., 0].numel())
)
generate.generate_recompute(lm, prompt_ids, 200)
print(f"{sum(num_projected):,} tokens through the model, to write 200")

# %% [markdown]
# The text had 229 tokens when the last one was asked for. Each had to go
# through the model once, or so one should think.

# %%
needed = len(prompt_ids) + 200 - 1
print(f"{sum(num_projected) / needed:.0f} times as many as there were")

# %% [markdown]
# ## What must be kept, on six tokens by hand
#
# Here are the six tokens of chapter 1 with their queries, keys and values. A
# token sees itself and those before it. We compute all six rows at once, as
# recompute does, and then the row of the last token alone.

# %%
q = torch.tensor([[1, 0], [0, 1], [1, 1], [2, 0], [0, 2], [1, 2.0]])  # whales
k = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 2], [2, 1], [1, 0.0]])
v = torch.tensor([[1, 0], [0, 1], [2, 0], [0, 2], [3, 3], [1, 1.0]])

t = torch.arange(6)
scores = (q @ k.T / math.sqrt(2)).masked_fill(t > t[:, None], -math.inf)
all_rows = scores.softmax(dim=-1) @ v

# %%
scores_of_s = q[5] @ k.T / math.sqrt(2)  # one query, six keys: six scores
row_of_s = scores_of_s.softmax(dim=-1) @ v
all_rows[5], row_of_s

# %% [markdown]
# The last row needs *one* query, its own, but *all* keys and values. Nobody
# will ask for the queries of `w h a l e` again. So keys and values are kept and
# queries are not, and neither is anything else: what is left of a layer treats
# each token alone.
#
# Keeping is allowed only if keys and values never change. They do not. A key is
# its token's vector times a matrix, and that vector was made by the layers
# below, where the causal mask let the token see nothing but what came before
# it. Whatever is written later, it stays as it is. Here are the keys of the
# last layer for 100 tokens, read alone and as the beginning of 101. We catch
# them at the seam, where the model hands them to `attend`.

# %%
@torch.no_grad()
def keys_of_layer(layer, num_tokens):
    caught = {}

    def attend(layer, q, k, v):
        caught[layer] = k
        return attend_fused(layer, q, k, v)

    lm(book_ids[:num_tokens], torch.arange(num_tokens), attend)
    return caught[layer]  # (T, G, D)


# %%
difference = keys_of_layer(3, 101)[:100] - keys_of_layer(3, 100)
print(f"largest difference: {difference.abs().max():.1e}")

# %% [markdown]
# None, or a trifle of rounding. (Keys are rotated by their position before they
# get here. A position does not change either.)
#
# So this is the plan, in the picture of chapter 1: the first step reads the
# prompt, which is called **prefill**. Each step after it, **decode**, runs one
# token through the model, and finds the keys and values of the others in a
# **KV cache**.

# %%
drawing.draw_generation(prompt_len=8, num_new_tokens=16, is_cached=True);

# %% [markdown]
# *The first row is prefill; in each row after it, decode, one square is dark,
# and the light ones are read. (The 16th new token is never handed over, so
# there are 8 + 15.)*
#
# ## What it takes to keep them
#
# ### Exercise 3.1 · `kv_cache_bytes` ★ (5 minutes)
#
# The bytes of the keys and values of `num_tokens` tokens. `config` has
# `num_layers`, L; `num_heads`, H; `num_kv_heads`, G; and `head_dim`, D, the
# numbers of one key. Which of the two kinds of heads is stored?

# %% exercise="kv_cache_bytes"
from lib.kv_cache import kv_cache_bytes

# %%
check(kv_cache_bytes)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# One layer, one KV head, one token: a key of D numbers and a value of D
# numbers.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Our model has six query heads and two KV heads. Three query heads read one
# key, and it is stored once.
#
# </details>

# %%
print(f"our model: {kv_cache.kv_cache_bytes(lm.config, 1):,} bytes a token")
llama = kv_cache.kv_cache_bytes(LLAMA3_8B, 1, bytes_per_number=2)
print(f"Llama 3 8B: {llama:,} bytes a token, that is {llama // 1024} KiB")
print(f"with 8,192 tokens: {llama * 8192 / 2**30:.0f} GiB for one text")

# %% [markdown]
# The weights of Llama 3 8B take 16 GB, at two bytes each; fifteen such texts
# take as much again.
# (It has 8 KV heads for 32 query heads. Had each query head a key of its own,
# it would be four times that.)
#
# ## Requests of different lengths, and nothing padded
#
# Serving has many texts under way at once; each is a **request**. One begins
# and brings a prompt of 40 tokens, while another brings one token, its 300th.
# We put the new tokens of a step behind each other, N in all, and keep two
# small tensors beside them:
#
# - `query_lens`, how many new tokens each request brings (they have queries),
# - `seq_lens`, how many tokens each has after the step, the new ones included.
#
# Three requests: the first begins with three tokens, the second rests, the
# third has four tokens and brings a fifth.

# %%
query_lens = torch.tensor([3, 0, 1])
seq_lens = torch.tensor([3, 2, 5])
kv_cache.new_positions(seq_lens, query_lens)

# %% [markdown]
# Four new tokens, at positions 0, 1, 2 of the first request and 4 of the third.
# `new_positions` is given, since the model needs it for its rotations; you may
# use it too.
#
# The cache of one layer is a tensor (B, S, G, D): B requests, room for S tokens
# of each, G KV heads, D numbers. Another one holds the values. The `layer` that
# `attend` is told says which layer's to take.
#
# ### Exercise 3.2 · `append_kv` ★★ (15 minutes)
#
# Write the new keys and values of a step where they belong, in place. Nothing
# else of the cache may change, and it must not be copied. (Where nothing was
# written yet the check has put NaN.)

# %% exercise="append_kv"
from lib.kv_cache import append_kv

# %%
check(append_kv)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Token n goes to one row, its request, and one place in it, its position.
# `k_cache[rows, positions] = k` writes all at once, if `rows` and `positions`
# are int64 tensors (N,).
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.arange(3).repeat_interleave(torch.tensor([3, 0, 1]))` is
# `[0, 0, 0, 2]`. A loop over the requests is as good.
#
# </details>

# %%
k_row, v_row = torch.zeros(2, 1, 6, 1, 2)  # one request, room for six, one head
for position in range(6):
    one_token = k[position].view(1, 1, 2), v[position].view(1, 1, 2)
    lens = torch.tensor([position + 1]), torch.tensor([1])
    kv_cache.append_kv(k_row, v_row, *one_token, *lens)
torch.equal(k_row.view(6, 2), k)

# %% [markdown]
# ### Exercise 3.3 · `attend_cached` ★★ (35 minutes)
#
# Attention of the new queries over the cache. For each request: T new queries,
# S keys, and T may be anything from 0 to S. The loop and its slices are given;
# your lines take the place of `...` and `raise`. Two things to take care of:
#
# - **The mask.** Query t of the T is at position S - T + t of its text, and
#   must not see later keys. With T = 1, decode, it sees them all.
# - **No copies for query heads.** H / G query heads read one KV head. Chapter 1
#   copied its keys for each of them. That would make the cache H / G times as
#   large just to be read. Instead treat the queries of these heads as more rows
#   of one matrix: (G, H/G · T, D) times (G, D, S).
#
# Behind its S keys a row of the cache holds garbage: do not read it. Torch's
# own attention is not allowed.

# %% exercise="attend_cached" given="1 2 4"
from lib.kv_cache import attend_cached

# %%
check(attend_cached)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `q_b.view(T, G, H // G, D)` splits the query heads by the KV head they read;
# `.permute(1, 2, 0, 3)` puts that one first; `.flatten(1, 2)` makes rows of the
# rest. On the way back, `unflatten(1, (H // G, T))` undoes `flatten(1, 2)`, and
# `.permute(2, 0, 1, 3).flatten(1, 2)` gives (T, H, D).
#
# </details>
# <details><summary>Hint 2</summary>
#
# The mask is (T, S): `torch.arange(S) > torch.arange(S - T, S).unsqueeze(-1)`.
# It fits scores of shape (G, H/G, T, S).
#
# </details>

# %% [markdown]
# The row of `s` once more, now from the cache:

# %%
lens = torch.tensor([6]), torch.tensor([1])
kv_cache.attend_cached(q[5].view(1, 1, 2), k_row, v_row, *lens), row_of_s

# %% [markdown]
# ## Prefill and decode are one loop
#
# A cache for all layers is a class, since it lives from step to step. It holds
# the two tensors and `seq_lens`, and one method matters: `extend` makes room
# for the next tokens, and returns the `attend` that writes and reads them. The
# model does not change by a line.

# %%
print(inspect.getsource(kv_cache.ContiguousKVCache.extend))

# %% [markdown]
# And one function runs a step: N new tokens go in, N rows of logits come out.
# It looks before it writes: an id outside of the vocabulary, or more tokens
# than there is room for, raises an error, and the cache is as it was.

# %%
print(inspect.getsource(forward_cached))

# %% [markdown]
# ### Exercise 3.4 · `generate_cached` ★★★ (25 minutes)
#
# Write `num_new_tokens` for each prompt. The prompts come as a list of B
# tensors of any lengths; return a list too. In the first step all tokens of all
# prompts are new, in the others there is one for each request. The last row of
# each request speaks about its next token: where are they among the N? Every
# token goes through the model once, and the very last not at all.
#
# The given lines check everything, the room for all steps too. Use
# `forward_cached`, and what chapter 1 made of logits:
# `sampling.next_token_probs(logits, temperature, top_k, top_p)`, (B, V) to
# (B, V), and `sampling.sample(probs, generator)`, which gives B ids.

# %% exercise="generate_cached" given="1"
from lib.generate import generate_cached

# %%
check(generate_cached)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Before the loop: `new_ids = torch.cat(texts)` and `query_lens`, the lengths.
# At the end of each round: `new_ids` are those just drawn, (B,), and
# `query_lens` is B ones.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The rows of request b end where those of request b + 1 begin:
# `query_lens.cumsum(0) - 1` are the last ones.
#
# </details>

# %% [markdown]
# The prompt of the beginning, now with a cache:

# %%
settings = {"temperature": 0.7, "top_p": 0.95}
cache = ContiguousKVCache(lm.config, batch_size=1, max_seq_len=512)
num_projected.clear()
(story_ids,) = generate.generate_cached(
    lm, [prompt_ids], 200, cache,
    generator=torch.Generator().manual_seed(1851), **settings,
)
print(text.decode(story_ids))
print(f"\n{sum(num_projected)} tokens through the model, to write 200")

# %% [markdown]
# ## It computes the same thing
#
# Is that the text that recompute writes? We ask in double precision, where
# rounding does not tip a choice, for prompts of many lengths in one batch, each
# compared with recompute on it alone.

# %%
double_lm = model.load_model().double()
prompts = [book_ids[1000:1000 + n] for n in (1, 2, 3, 5, 8, 13, 21, 34, 55)]
cache = ContiguousKVCache(
    double_lm.config, len(prompts), max_seq_len=100, dtype=torch.float64
)
texts = generate.generate_cached(double_lm, prompts, 40, cache, temperature=0)
[
    torch.equal(
        got, generate.generate_recompute(double_lm, ids, 40, temperature=0)
    )
    for ids, got in zip(prompts, texts)
]

# %% [markdown]
# ## Predict the work, then measure it
#
# A token now goes through the matrices once, 2 FLOPs for each weight, so the
# projections of a text grow like N; those of recompute like N². In attention
# the query at position S - 1 meets S keys, 4·S·D FLOPs in each query head and
# layer; the sum over S = 1 … N is close to N²/2, where recompute had N³/3.

# %%
def cached_attention_flops(config, N):
    pairs = N * (N + 1) // 2
    return 4 * pairs * config.head_dim * config.num_heads * config.num_layers


def measured_flops(N):
    cache = ContiguousKVCache(lm.config, 1, max_seq_len=N)
    run = lambda: generate.generate_cached(lm, [book_ids[:1]], N, cache)
    return meter.measure(run).flops


# %%
Ns = [32, 64, 128, 256]
measured = [measured_flops(N)["attention"] for N in Ns]
predicted = [cached_attention_flops(lm.config, N) for N in Ns]
measured == predicted

# %%
recomputed = [generate.attention_flops(lm.config, 1, N) for N in Ns]
plotting.plot_measured(
    {"with a cache": (Ns, measured)},
    predicted={
        "recompute (chapter 1)": (Ns, recomputed),
        "4·D·H·L·N(N+1)/2": (Ns, predicted),
    },
    xlabel="tokens generated, N",
    ylabel="FLOPs in attention",
    title=f"At {Ns[-1]} tokens a cache saves "
    f"{1 - measured[-1] / recomputed[-1]:.1%} of attention's work",
    log=True,
);

# %% [markdown]
# *Slope 3 above, slope 2 below; the measured points lie on their prediction.*
#
# ## A step hardly grows with the text
#
# That was counting. Now the clock: one more token, when the text has 16 tokens,
# 32, and so on up to 511, for the model has room for 512.

# %%
lengths = [16, 32, 64, 128, 256, 511]


@torch.no_grad()
def recompute_step(num_tokens):
    lm(book_ids[:num_tokens], torch.arange(num_tokens), attend_fused)


def decode_milliseconds(num_tokens):
    cache = ContiguousKVCache(lm.config, 1, max_seq_len=num_tokens + 1)
    forward_cached(lm, cache, book_ids[:num_tokens], torch.tensor([num_tokens]))
    one, cached_lens = torch.tensor([1]), cache.seq_lens

    def step():
        cache.seq_lens = cached_lens  # the same step again
        forward_cached(lm, cache, book_ids[num_tokens : num_tokens + 1], one)

    return 1000 * meter.median_seconds(step, repeats=15)


# %%
recompute_ms = [
    1000 * meter.median_seconds(lambda: recompute_step(n), repeats=9)
    for n in lengths
]
decode_ms = [decode_milliseconds(n) for n in lengths]

# %%
plotting.plot_measured(
    {
        "recompute": (lengths, recompute_ms),
        "with a cache": (lengths, decode_ms),
    },
    xlabel="text so far (tokens)",
    ylabel="time for one more token (ms)",
    title=f"One more after {lengths[-1]} tokens: {recompute_ms[-1]:.0f} ms by "
    f"recompute, {decode_ms[-1]:.1f} ms with a cache",
    log=True,
);

# %% [markdown]
# *Recompute climbs; with a cache the line stays nearly flat.*
#
# ### An honest look: where nothing is gained
#
# Look at the left end. Our model is so small that running 16 tokens through it
# takes hardly longer than running one: most of the time goes into calling
# hundreds of small operations, and a cache adds some of its own.

# %%
for n, a, b in zip(lengths, recompute_ms, decode_ms):
    gain = f"{a / b:4.1f} times as fast" if a > 1.25 * b else "next to nothing"
    print(f"{n:3} tokens: {a:5.1f} ms and {b:5.1f} ms: {gain}")

# %% [markdown]
# ## Prefill is bound by arithmetic, decode by bandwidth
#
# Why should 16 tokens take as long as one? In our model because of its many
# small operations. In a large one for another reason, and it decides how
# language models are served. So here is a larger one: two layers, but 1,024
# wide, with random weights.

# %%
wide = ModelConfig(
    vocab_size=256, num_layers=2, num_heads=16, num_kv_heads=4,
    d_model=1024, d_ff=2816, max_seq_len=1024,
)
wide_lm = Transformer(wide).eval()
weight_bytes = sum(p.nbytes for p in wide_lm.parameters())
weight_bytes -= wide_lm.embed.weight.nbytes
print(f"{weight_bytes / 1e6:.0f} MB of weights")

# %% [markdown]
# That is more than the caches of most processors hold, so a step has to read
# all of it from memory, whatever the number of new tokens, T. (Without `embed`,
# a table in which it looks up T rows.) The meter counts the FLOPs of a step.
# FLOPs divided by the bytes read are the **arithmetic intensity** of the step.

# %%
Ts = [1, 2, 4, 8, 16, 32, 64, 128, 256]


def wide_step(query_lens):
    """A step for as many requests, each of which has 64 tokens already."""
    had = torch.full((len(query_lens),), 64)
    room = 64 + max(query_lens)
    cache = ContiguousKVCache(wide, len(query_lens), max_seq_len=room)
    token_ids = book_ids[: sum(query_lens)]
    query_lens = torch.tensor(query_lens)

    def step():
        cache.seq_lens = had  # the same step again
        forward_cached(wide_lm, cache, token_ids, query_lens)

    return step


flops_of_step = {T: meter.measure(wide_step([T])).flops.total() for T in Ts}
print({T: round(flops_of_step[T] / weight_bytes, 1) for T in Ts})

# %% [markdown]
# One token: half a FLOP a byte, a multiplication and an addition for each
# weight of four bytes. With T tokens, each weight that was fetched is used T
# times. And what can your machine do? Two small experiments: the product of two
# large matrices for FLOPs a second, the sum of a large vector for bytes a
# second.

# %%
square, vector = torch.randn(1024, 1024), torch.randn(16_000_000)
peak_flops = 2 * 1024**3 / meter.median_seconds(lambda: square @ square)
bandwidth = vector.nbytes / meter.median_seconds(lambda: vector.sum())
print(f"{peak_flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s: ", end="")
print(f"{peak_flops / bandwidth:.1f} FLOPs in the time of a byte")

# %% [markdown]
# That quotient divides the two regimes. A step with fewer FLOPs a byte waits
# for memory, and the arithmetic units idle; one with more waits for arithmetic.
# The least that a step can take is the longer of the two times. Measure it, for
# one request that brings T tokens:

# %%
step_ms = [
    1000 * meter.median_seconds(wide_step([T]), repeats=5) for T in Ts
]
bytes_ms = [1000 * weight_bytes / bandwidth] * len(Ts)
flops_ms = [1000 * flops_of_step[T] / peak_flops for T in Ts]

# %%
plotting.plot_measured(
    {"measured": (Ts, step_ms)},
    predicted={
        "read the weights": (Ts, bytes_ms),
        "do the arithmetic": (Ts, flops_ms),
    },
    xlabel="new tokens in one step, T",
    ylabel="time of the step (ms)",
    title=f"{Ts[4]} tokens take {step_ms[4] / step_ms[0]:.1f} times as long "
    f"as one, {Ts[-1]} take {step_ms[-1] / step_ms[0]:.0f} times",
    log=True,
);

# %% [markdown]
# *At the left the step grows little with its tokens; at the right it takes
# twice as long for twice as many. The dashed lines are what reading and
# arithmetic take at the least, and cross where a step has as many FLOPs a byte
# as the machine can do. The measured step lies above both.*
#
# At the right is prefill: the many tokens of a prompt share each weight that is
# read. At the left is decode: one token, all weights, and arithmetic units that
# wait; the more FLOPs a machine can do in the time of a byte, the more of them.
# The cure is to decode *many requests in one step*:

# %%
for B in [1, 2, 4, 8, 16, 32]:
    seconds = meter.median_seconds(wide_step([1] * B), repeats=5)
    print(f"{B:2} requests, a token each: {1000 * seconds:5.1f} ms, ", end="")
    print(f"{B / seconds:5.0f} tokens a second")

# %% [markdown]
# So whoever serves wants as many requests as possible at once. Each brings a
# KV cache. How many fit?

# %% [markdown]
# ## What reserving for the longest costs
#
# Eight requests: eight passages of the book, of different lengths, each to be
# continued. Nobody knows how long a text will become, and a row of the cache
# cannot grow: behind it lies the next. So room is reserved for the longest that
# the model can write, 512 tokens each.

# %%
passages = [p for p in text.load_book().split("\n\n") if 20 < len(p) < 440]
prompts = [text.encode(passage) for passage in passages[10:90:10]]
batch = ContiguousKVCache(lm.config, len(prompts), max_seq_len=512)
texts = generate.generate_cached(lm, prompts, 64, batch, temperature=0.7)
print(text.decode(texts[0]))

# %% [markdown]
# ### Exercise 3.5 · `kv_utilization` ★ (5 minutes)
#
# Which share of what is reserved holds a token, at this instant?

# %% exercise="kv_utilization"
from lib.kv_cache import kv_utilization

# %%
check(kv_utilization)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `max_seq_len` tokens are reserved for each request, also for one that has not
# begun.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `seq_lens.sum().item()` is a number of Python.
#
# </details>

# %%
share = kv_cache.kv_utilization(batch.seq_lens, 512)
drawing.draw_contiguous(
    batch, title=f"{share:.0%} of what is reserved holds a token"
);

# %% [markdown]
# *Blue holds a token. Hatched was reserved, and stayed empty to the end. And
# this is the fullest moment: before, there was even less in it.*

# %%
print(f"reserved {batch.reserved_bytes / 1e6:.2f} MB, ", end="")
print(f"used {batch.used_bytes / 1e6:.2f} MB, a share of {share:.3f}")

# %% [markdown]
# ## The next column of the table
#
# This is generation with a contiguous cache that reserves for twice as many
# tokens as come. It brings two rows of its own, in bytes, exact: 256 for each
# token and layer of this small random model.

# %%
cells = table.fit(table.sweep("contiguous"))
Markdown(table.render(cells))

# %% [markdown]
# Compare with recompute, in chapter 1. There memory grew like N, attention like
# N³·L and projections like N²·L. So memory is the price: every layer keeps its
# own. It buys a power of N in both kinds of work.

# %%
check.summary()

# %% [markdown]
# ## What is still wrong

# %%
print(f"{1 - share:.0%} of the cache holds nothing; without that, ", end="")
print(f"{1 / share:.1f} times as many requests would fit")

# %% [markdown]
# A request should take only what it needs. But a row that grows runs into the
# next one. Chapter 4 cuts memory into small blocks, and lets a request's blocks
# lie anywhere.
#
# ## In five sentences
#
# 1. A new token needs its own query, and the keys and values of all tokens
#    before it, which never change: keep them.
# 2. They take 2·L·G·D numbers a token, and grouped heads are stored once.
# 3. Prefill reads a prompt in one step, decode one token a step; to the model
#    both are new tokens at some positions.
# 4. Prefill uses each weight for many tokens and is bound by arithmetic; decode
#    reads all weights for few, and is bound by bandwidth, so requests are
#    decoded together.
# 5. A contiguous cache reserves for the longest text that may come, and much of
#    it stays empty.
#
# ## Do you recall?
#
# 1. Why are queries not kept?
# 2. A model has 24 layers, 16 query heads, 4 KV heads of 64 numbers, two bytes
#    each. How many bytes a token?
# 3. Of a step, `seq_lens` is `[7, 4]` and `query_lens` is `[2, 4]`. Which
#    positions are new, and which of the logits' rows do you need for the next
#    tokens?
# 4. Why is there no mask to speak of when T is 1?
# 5. A machine can do 100 FLOPs in the time of a byte, and weights have four
#    bytes each. Up to how many requests could a step take as long as for one?
#
# <details><summary>Answers</summary>
#
# 1. A query is asked once, when its token is new. Later tokens bring their own.
# 2. 2 · 24 · 4 · 64 · 2 = 24,576: 24 KiB.
# 3. 5 and 6 of the first request, 0 to 3 of the second; rows 1 and 5.
# 4. The newest token may see all that are there.
# 5. 200: each brings half a FLOP for a byte of the weights. (Less, in truth:
#    the caches are not shared, and each request brings its own bytes to read.)
#
# </details>
#
# ## Sources
#
# - Shazeer, *Fast Transformer Decoding: One Write-Head is All You Need*, 2019,
#   [1911.02150](https://arxiv.org/abs/1911.02150): decoding waits for memory;
#   share keys and values between heads.
# - Ainslie and others, *GQA*, 2023,
#   [2305.13245](https://arxiv.org/abs/2305.13245): groups of heads.
# - Pope and others, *Efficiently Scaling Transformer Inference*, 2022,
#   [2211.05102](https://arxiv.org/abs/2211.05102): prefill and decode of large
#   models, and what bounds them.
# - Williams, Waterman and Patterson, *Roofline*, 2009,
#   [doi.org/10.1145/1498765.1498785](https://doi.org/10.1145/1498765.1498785):
#   arithmetic intensity, and the longer of two times.
# - Llama team, *The Llama 3 Herd of Models*, 2024,
#   [2407.21783](https://arxiv.org/abs/2407.21783): the shape of the 8B model.
