# %% [markdown]
# # 3. The KV cache: keep what does not change
#
# To write one more byte, chapter 1 runs the whole text through the model. Most
# of what it computes there it had computed one step earlier. In this chapter we
# keep it instead: the keys and values of each token, in every layer. In return,
# a step's work stops growing with the text, except in attention. Then comes the
# bill: memory that is **reserved** for tokens that may never come.
#
# **You need:** chapter 1, whose model, letters and `attend` we use, and 140
# minutes. No GPU.
#
# **You will be able to**
#
# - say what a KV cache holds, how many bytes that is for any model, and how
#   many texts fit on a GPU,
# - write a cache for requests of different lengths, and attention over it,
# - write the loop: prefill, then decode, each token through the model once,
# - read a long prompt in chunks, so that memory grows like N and not like N²,
# - say why arithmetic limits prefill and memory bandwidth limits decoding,
#   measure how close your machine comes to each limit, and say what a batch
#   shares and what it does not,
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
from lib.kv_cache import (
    ContiguousKVCache, KVCache, attend_decode, new_positions,
)
from lib.model import Transformer, attend_fused

plotting.use_course_style()
torch.set_num_threads(1)  # steadier timings
torch.manual_seed(0);

# %% [markdown]
# ## Most of what a step computes, it had before
#
# Here is the model of chapter 1 again, with a prompt of 30 bytes, and 200 bytes
# to write. A hook, a small function that torch calls before a module runs,
# counts the tokens that go through the query matrix of the first layer: all the
# tokens that go through the model.

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
# When the last token was asked for, the text had 229 tokens. Each of them has
# to go through the model at least once.

# %%
needed = len(prompt_ids) + 200 - 1
print(f"{sum(num_projected) / needed:.0f} times as many as the text had")

# %% [markdown]
# ## What must be kept, on six tokens by hand
#
# Here are the six tokens of chapter 1 with their queries, keys and values. Each
# token sees itself and those before it. First we compute all six rows at once,
# as recompute does, and then only the row of the last token.

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
# will ask for the queries of `w h a l e` again, so they need not be kept. Keys
# and values must be kept, and nothing else: the rest of a layer, its norms and
# its MLP, treats each token by itself.
#
# Keeping them is correct only if they never change, and they do not. A key is
# its token's vector times a matrix. That vector was made by the layers below,
# where the causal mask let the token see only what came before it. So whatever
# is written later, the key stays as it is. Let us look: here are the keys of
# the last layer for 100 tokens, computed once for these tokens alone and once
# for the first 100 of 101. We catch them at the seam, where the model hands
# them to `attend`.

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
# They are equal, up to rounding. (Keys are rotated by their position before
# they get here, and a token's position does not change either.)
#
# That gives a plan. The first step reads the whole prompt; it is called
# **prefill**. Each step after it is called **decode**: one token goes through
# the model, and the keys and values of all earlier tokens are read from a **KV
# cache**.

# %% alt="A grid: steps 1 to 16 downwards, positions 0 to 22 of the text to the right. Step 1 computes 8 tokens, dark squares. Each row below is one square longer: only its last square is dark, computed for the first time; all others are light, their keys and values read from the cache."
drawing.draw_generation(prompt_len=8, num_new_tokens=16, is_cached=True);

# %% [markdown]
# *Each row is a step. The first is prefill. In each row after it, one square is
# dark: the token that goes through the model. The light ones are read from the
# cache. (The 16th new token never goes through the model, since nobody asks
# what follows it. So there are 8 + 15.)*
#
# ## What it takes to keep them
#
# ### Exercise 3.1 · `kv_cache_bytes` ★ (5 minutes)
#
# Return the bytes of the keys and values of `num_tokens` tokens in all layers.
# `config` has `num_layers`, L; `num_heads`, H; `num_kv_heads`, G; and
# `head_dim`, D, the size of one key. Which of the two kinds of heads is stored?

# %% exercise="kv_cache_bytes"
from lib.kv_cache import kv_cache_bytes

# %%
check(kv_cache_bytes)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# One token has, in one layer and one KV head, a key of D numbers and a value of
# D numbers.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Our model has six query heads and two KV heads. Three query heads read the
# same key, and it is stored once.
#
# </details>

# %%
print(f"our model: {kv_cache.kv_cache_bytes(lm.config, 1):,} bytes per token")
llama = kv_cache.kv_cache_bytes(LLAMA3_8B, 1, bytes_per_number=2)
print(f"Llama 3 8B: {llama:,} bytes per token, which is {llama // 1024} KiB")
print(f"8,192 tokens: {llama * 8192 / 2**30:.0f} GiB for a single text")

# %% [markdown]
# How many such texts fit on a GPU? Take one with 80 GB, of which serving
# systems use about nine tenths. The weights of Llama 3 8B are 8.03 billion
# numbers of two bytes. The rest is for keys and values. (Activations need some
# of it, too, which we do not subtract. So this is an upper bound.)

# %%
left_bytes = 0.9 * 80e9 - 2 * 8.03e9
print(f"{left_bytes / llama:,.0f} tokens fit at most, that is ", end="")
print(f"{left_bytes / llama / 8192:.0f} texts of 8,192 tokens")

# %% [markdown]
# Two choices already went into this number. Llama 3 has 8 KV heads for its 32
# query heads; with one KV head per query head, a quarter as many texts would
# fit. And each number of the cache has two bytes. Stored in one byte (serving
# systems offer `fp8` and `int8` caches), twice as many fit, at some loss of
# precision.
#
# ## Requests of different lengths, and nothing padded
#
# A server writes many texts at the same time. Each of them is a **request**.
# One request has just arrived and brings a prompt of 40 tokens; another is at
# its 300th token and brings only that. We put the new tokens of a step one
# after the other, N in all, and keep two small tensors beside them:
#
# - `query_lens`: how many new tokens each request brings (these have queries),
# - `seq_lens`: how many tokens each request has after the step, with the new
#   ones.
#
# Here are three requests. The first arrives with three tokens, the second
# rests, and the third has four tokens and brings a fifth.

# %%
query_lens = torch.tensor([3, 0, 1])
seq_lens = torch.tensor([3, 2, 5])
kv_cache.new_positions(seq_lens, query_lens)

# %% [markdown]
# There are four new tokens: at positions 0, 1, 2 of the first request and at
# position 4 of the third. The model needs these positions for its rotations, so
# `new_positions` is given. You may use it too.
#
# The cache of one layer is a tensor (B, S, G, D): B requests, room for S tokens
# of each, G KV heads, D numbers. A second tensor holds the values. Each layer
# has its own pair; `attend` is told the layer, and picks.
#
# ### Exercise 3.2 · `append_kv` ★★ (15 minutes)
#
# Write the new keys and values of a step where they belong, in place. Nothing
# else in the cache may change, and the cache must not be copied. (Places that
# nobody has written yet hold NaN in the check.)

# %% exercise="append_kv"
from lib.kv_cache import append_kv

# %%
check(append_kv)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Each new token goes to the row of its request, and in that row to the place
# that is its position. If `rows` and `positions` are int64 tensors (N,), then
# `k_cache[rows, positions] = k` writes all of them at once.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.arange(3).repeat_interleave(torch.tensor([3, 0, 1]))` is
# `[0, 0, 0, 2]`. A loop over the requests is just as good.
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
# Attention of the new queries over the cache. Each request has T new queries,
# and one key per token that it has by now; the given loop calls their number S.
# T may be anything from 0 to S. Your lines go where `...` and `raise` stand.
# Two things need care:
#
# - **The mask.** The T new tokens are the last ones of their text, so query t
#   of them is at position S - T + t. It must not see keys at later positions.
#   When T is 1, as in decode, the query sees all keys, and needs no mask.
# - **No copies for query heads.** H / G query heads read the same KV head.
#   Chapter 1 copied the keys for each of them. Here that would make a copy H /
#   G times as large as the cache, at every step. (So does `@` when it
#   broadcasts keys over query heads.) Instead, treat the queries of these heads
#   as more rows of one matrix: (G, H/G · T, D) times (G, D, S). With H = 4, G =
#   2 and T = 2, each KV head is read by two query heads with two queries each,
#   which makes four rows.
#
# After its S keys a row of the cache holds garbage: do not read it. Torch's own
# attention is not allowed.

# %% exercise="attend_cached" given="1 2 4"
from lib.kv_cache import attend_cached

# %%
check(attend_cached)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `q_b.view(T, G, H // G, D)` sorts the query heads by the KV head that they
# read. `.permute(1, 2, 0, 3)` puts the KV heads first, and `.flatten(1, 2)`
# makes rows of the rest. On the way back, `unflatten(1, (H // G, T))` undoes
# `flatten(1, 2)`, and `.permute(2, 0, 1, 3).flatten(1, 2)` gives (T, H, D).
#
# </details>
# <details><summary>Hint 2</summary>
#
# The mask is (T, S): `torch.arange(S) > torch.arange(S - T, S).unsqueeze(-1)`.
# It fits scores of shape (G, H/G, T, S).
#
# </details>

# %% [markdown]
# Here is the row of `s` once more, now from the cache:

# %%
lens = torch.tensor([6]), torch.tensor([1])
kv_cache.attend_cached(q[5].view(1, 1, 2), k_row, v_row, *lens), row_of_s

# %% [markdown]
# ## Prefill and decode are one loop
#
# A cache lives from step to step, so it is a class. `ContiguousKVCache` holds
# the two tensors for all layers and `seq_lens`. Requests come with `begin` and
# go with `free`, and `request_ids` says which of them is in which row. (The
# new tokens of a step are in `cache.seq_lens` only when the step has ended.
# Your functions get `cache.seq_lens + query_lens`.)

# %%
cache = ContiguousKVCache(lm.config, batch_size=2, max_seq_len=100)
cache.begin("whale")
cache.begin("ship")
cache.free("whale")
cache.begin("sea")
cache.request_ids, cache.seq_lens

# %% [markdown]
# Besides `begin` and `free` there is `extend`, which takes a step. It checks
# that there is room, and gives the `attend` that writes and reads the new keys
# and values. This is what it calls for that; your two functions are in it.
# (`is_decode` is False unless one asks for it, and comes up further down.) The
# model itself does not change by a line.

# %%
print(inspect.getsource(ContiguousKVCache._open_step))

# %% [markdown]
# `forward_cached` runs one step: N new tokens go in, N rows of logits come out.

# %%
print(inspect.getsource(forward_cached))

# %% [markdown]
# Why the `with`? A step takes a while, and much can happen inside it: an error
# in a layer, or the stop button of this notebook. By then some layers have
# written their new keys, and others have not. So the new tokens count only when
# the block ends without an error. Otherwise the cache stays as it was:

# %%
try:
    with cache.extend(torch.tensor([5, 8])) as attend:
        raise KeyboardInterrupt  # as the stop button does, in the middle
except KeyboardInterrupt:
    print(cache.seq_lens)

# %% [markdown]
# ### Exercise 3.4 · `generate_cached` ★★★ (25 minutes)
#
# Write `num_new_tokens` tokens after each prompt. The prompts come as a list of
# B tensors of any lengths, one for each request of the cache. Return a list of
# B texts. In the first step all tokens of all prompts are new; in the steps
# after it, each request brings one. Of the N rows of logits you need one per
# request: the row of its last token, which speaks about the next one. Where are
# these rows? Every token goes through the model exactly once, except the very
# last one, which never does.
#
# The given lines check everything beforehand, the room for all steps too. Use
# `forward_cached`, and what chapter 1 made of logits:
# `sampling.next_token_probs(logits, temperature, top_k, top_p)` turns (B, V)
# into probabilities (B, V), and `sampling.sample(probs, generator)` draws B
# ids.

# %% exercise="generate_cached" given="1"
from lib.generate import generate_cached

# %%
check(generate_cached)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Before the loop, `new_ids = torch.cat(texts)`, and `query_lens` holds the
# lengths of the prompts. At the end of each round, `new_ids` are the tokens
# just drawn, (B,), and `query_lens` is B ones.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The rows of request b end where those of request b + 1 begin. So their last
# rows are `query_lens.cumsum(0) - 1`.
#
# </details>

# %% [markdown]
# The prompt from the beginning, now with a cache:

# %%
settings = {"temperature": 0.7, "top_p": 0.95}
cache = ContiguousKVCache(lm.config, batch_size=1, max_seq_len=512)
cache.begin("story")
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
# Is this the text that recompute writes? We ask in double precision, where
# rounding does not decide between two tokens. One batch has prompts of many
# lengths, and each text is compared with recompute on its prompt alone.

# %%
double_lm = model.load_model().double()
prompts = [book_ids[1000:1000 + n] for n in (1, 2, 3, 5, 8, 13, 21, 34, 55)]
cache = ContiguousKVCache(
    double_lm.config, len(prompts), max_seq_len=100, dtype=torch.float64
)
for request_id in range(len(prompts)):
    cache.begin(request_id)
texts = generate.generate_cached(double_lm, prompts, 40, cache, temperature=0)
expected = [
    generate.generate_recompute(double_lm, ids, 40, temperature=0)
    for ids in prompts
]
[torch.equal(got, wanted) for got, wanted in zip(texts, expected)]

# %% [markdown]
# ## Predict the work, then measure it
#
# A token now goes through the matrices once, and meets each weight for 2 FLOPs.
# So the projections of a text of N tokens grow like N; those of recompute grow
# like N². In attention, the query at position S - 1 meets S keys, which takes
# 4·S·D FLOPs per query head and layer. Summed over the steps, S = 1 … N, that
# is 4·D · N(N + 1)/2. Recompute meets S² keys in a step, in sum about N³/3.

# %%
def cached_attention_flops(config, N):
    pairs = N * (N + 1) // 2
    return 4 * pairs * config.head_dim * config.num_heads * config.num_layers


def measured_flops(N):
    cache = ContiguousKVCache(lm.config, 1, max_seq_len=N)
    cache.begin("text")
    run = lambda: generate.generate_cached(lm, [book_ids[:1]], N, cache)
    return meter.measure(run).flops


# %%
Ns = [32, 64, 128, 256]
measured = [measured_flops(N)["attention"] for N in Ns]
predicted = [cached_attention_flops(lm.config, N) for N in Ns]
measured == predicted

# %% alt="Log-log plot: FLOPs in attention over the tokens generated, N, from 32 to 256. Recompute is a dashed line of slope 3; with a cache the measured points lie far below it, on their dashed prediction of slope 2."
recomputed = [generate.attention_flops(lm.config, 1, N) for N in Ns]
plotting.plot_measured(
    {"with a cache": (Ns, measured)},
    predicted={
        "recompute (chapter 1)": (Ns, recomputed),
        "4·D·H·L·N(N+1)/2": (Ns, predicted),
    },
    xlabel="tokens generated, N",
    ylabel="FLOPs in attention",
    title=f"At {Ns[-1]} tokens, recompute has "
    f"{recomputed[-1] / measured[-1]:.0f} times the attention of a cache",
    log=True,
);

# %% [markdown]
# *Slope 3 above, slope 2 below; the measured points lie on their prediction.*
# To be fair to recompute: its count has the masked half of the scores in it,
# which a good kernel skips. Without that half:

# %%
print(f"{recomputed[-1] / 2 / measured[-1]:.0f} times")

# %% [markdown]
# ## For one text, a step hardly grows with the text
#
# So much for counting. Now the clock: how long does one more token take when
# the text has 16 tokens, 32, and so on up to 480? (Our model has room for 512.)

# %%
lengths = [16, 32, 64, 128, 256, 480]
one = torch.tensor([1])


@torch.no_grad()
def recompute_step(num_tokens):
    lm(book_ids[:num_tokens], torch.arange(num_tokens), attend_fused)


def decode_step(num_tokens):
    cache = ContiguousKVCache(lm.config, 1, max_seq_len=num_tokens + 32)
    cache.begin("text")
    forward_cached(lm, cache, book_ids[:num_tokens], torch.tensor([num_tokens]))
    return lambda: forward_cached(lm, cache, book_ids[:1], one)


# %%
recompute_ms, decode_ms = [], []
for n in lengths:
    steps = {"recompute": lambda: recompute_step(n), "cache": decode_step(n)}
    seconds = meter.medians_in_turns(steps, repeats=15)
    recompute_ms.append(1000 * seconds["recompute"])
    decode_ms.append(1000 * seconds["cache"])

# %% alt="Log-log plot: the time for one more token, in milliseconds, over the text so far, from 16 to 480 tokens. Over short texts the lines run together; then recompute climbs, and the line with a cache stays far below it."
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
# *Recompute climbs; with a cache the line stays nearly flat.* That holds for
# one request and a few hundred tokens. The keys still have to be read, and with
# many long texts that will show below.
#
# ### An honest look: where nothing is gained
#
# Look at the left end. Our model is so small that most of the time goes into
# calling hundreds of small operations, for one token as for sixteen. A cache
# adds some operations of its own, which use up what it saves.

# %%
for n, a, b in zip(lengths, recompute_ms, decode_ms):
    print(f"{n:3} tokens: {a:5.1f} ms and {b:5.1f} ms: ", end="")
    print(f"the cache is {a / b:4.1f} times as fast")

# %% [markdown]
# ## A long prompt, and memory that grows like N²
#
# Chapter 1 was careful not to store attention's scores, since there are T² of
# them. Our `attend_cached` does store them: for T new queries over S keys, a
# number for each pair in each head. In decode T is 1, and that is little. In
# prefill T is the whole prompt. So let us measure the peak memory of prefill,
# the cache itself included:

# %%
def prefill_peak(N, chunk_size):
    cache = ContiguousKVCache(lm.config, 1, max_seq_len=N)
    cache.begin("prompt")
    kv_bytes = cache.reserved_bytes
    run = lambda: generate.prefill_in_chunks(
        lm, [book_ids[:N]], cache, chunk_size
    )
    return kv_bytes + meter.measure(run).peak_bytes


# %%
Ns = [128, 256, 512]
at_once = [prefill_peak(N, chunk_size=N) for N in Ns]
print(f"peak memory grows like N^{table.growth_exponent(at_once, 2):.2f}")

# %% [markdown]
# (As in the table of chapter 1, the exponent comes from differences, in which
# whatever is constant cancels.)
#
# The cure needs nothing new. A step may bring any number of tokens, so a prompt
# may come in several steps: this is **chunked prefill**. A chunk of 64 tokens
# needs at most 64 · N scores per head. Smaller chunks need less memory, but
# more steps, and each step reads all weights again.

# %%
print(inspect.getsource(generate.prefill_in_chunks).split('"""')[2])

# %% alt="Log-log plot: peak memory of prefill, in bytes, over the tokens of the prompt, N: 128, 256 and 512. All at once is the upper line, and twice the prompt takes about three times the memory; in chunks of 64, the lower line, less than twice."
in_chunks = [prefill_peak(N, chunk_size=64) for N in Ns]
print(f"in chunks of 64: N^{table.growth_exponent(in_chunks, 2):.2f}")
plotting.plot_measured(
    {"all at once": (Ns, at_once), "in chunks of 64": (Ns, in_chunks)},
    xlabel="tokens of the prompt, N",
    ylabel="peak memory of prefill (bytes)",
    title=f"{Ns[-1]} tokens at once take "
    f"{at_once[-1] / in_chunks[-1]:.1f} times the memory of chunks",
    log=True,
);

# %% [markdown]
# *All at once, twice the prompt takes about three times the memory, on its way
# to four times; in chunks, less than twice.* And the text is the same. The last
# token of the prompt stays out of the chunks: `generate_cached` brings it, and
# asks what follows.

# %%
cache = ContiguousKVCache(double_lm.config, 1, 100, dtype=torch.float64)
cache.begin("prompt")
long_ids = prompts[-1]
generate.prefill_in_chunks(double_lm, [long_ids[:-1]], cache, chunk_size=10)
(got,) = generate.generate_cached(
    double_lm, [long_ids[-1:]], 40, cache, temperature=0
)
torch.equal(got[1:], expected[-1][len(long_ids):])  # what follows the prompt

# %% [markdown]
# ## Prefill is bound by arithmetic, decode by bandwidth
#
# How long does a step take if it brings T tokens instead of one? The answer
# decides how language models are served. Our model is too small to give it, for
# its time goes into calling operations. So here is a larger one: 1,024 wide,
# with random weights, and with so many layers that the weights do not fit into
# the processor's largest cache.

# %%
cache_bytes = meter.last_level_cache_bytes() or 0
num_layers = min(max(7, cache_bytes // 20_000_000), 20)
wide = ModelConfig(
    vocab_size=256, num_layers=num_layers, num_heads=8, num_kv_heads=2,
    d_model=1024, d_ff=2816, max_seq_len=2048,
)
wide_lm = Transformer(wide).eval()
weight_bytes = sum(p.nbytes for p in wide_lm.parameters())
weight_bytes -= wide_lm.embed.weight.nbytes
print(f"{num_layers} layers, {weight_bytes / 1e6:.0f} MB of weights")
known = f"{cache_bytes / 1e6:.0f} MB" if cache_bytes else "not known here"
print(f"the processor's largest cache: {known}")

# %% [markdown]
# So the weights have to be read from memory at every step, whatever the number
# of tokens. (We leave out `embed`, a table of which a step reads T rows.) The
# meter counts the FLOPs of a step. FLOPs divided by the bytes read are the
# **arithmetic intensity** of the step.

# %%
Ts = [1, 2, 4, 8, 16, 32, 64, 128, 256]


def prompt_step(T):
    """A step over a prompt of T tokens, which then leaves again."""
    cache = ContiguousKVCache(wide, 1, max_seq_len=T)

    def step():
        cache.begin("prompt")
        forward_cached(wide_lm, cache, book_ids[:T], torch.tensor([T]))
        cache.free("prompt")

    return step


flops_of_step = {T: meter.measure(prompt_step(T)).flops.total() for T in Ts}
print({T: round(flops_of_step[T] / weight_bytes, 1) for T in Ts})

# %% [markdown]
# One token makes half a FLOP per byte: a multiplication and an addition for
# each weight, which has four bytes. With T tokens, each weight that was fetched
# is used T times. And what can your machine do? Two small experiments tell: the
# product of two large matrices for FLOPs per second, and the sum of a large
# vector for bytes per second.

# %%
def bytes_per_second():
    vector = torch.randn(max(80_000_000, cache_bytes // 2))  # 320 MB or more
    return vector.nbytes / meter.median_seconds(lambda: vector.sum())


square = torch.randn(2048, 2048)
peak_flops = 2 * 2048**3 / meter.median_seconds(lambda: square @ square)
bandwidth = bytes_per_second()
print(f"{peak_flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s: ", end="")
print(f"{peak_flops / bandwidth:.1f} FLOPs in the time of a byte")

# %% [markdown]
# In the time in which a machine reads one byte it can do this many FLOPs. If a
# step has fewer FLOPs per byte, reading takes longer than computing, and the
# arithmetic units sit idle; if it has more, computing takes longer. T tokens
# make T/2 FLOPs per byte, so the two times are equal where T is twice this
# number. On an idle machine a step cannot be faster than the longer of the two.
# Now measure:

# %%
step_ms = [
    1000 * meter.median_seconds(prompt_step(T), repeats=5) for T in Ts
]
bytes_ms = [1000 * weight_bytes / bandwidth] * len(Ts)
flops_ms = [1000 * flops_of_step[T] / peak_flops for T in Ts]
crossing = bytes_ms[0] / flops_ms[0]  # the T at which both take as long

# %% alt="Log-log plot: the time of a step, in milliseconds, over its new tokens, T, from 1 to 256. Two dashed lines cross at a grey vertical one: reading the weights is level, doing the arithmetic has slope 1. The measured line begins with a plateau, bends later, and then climbs along the arithmetic."
ax = plotting.plot_measured(
    {"measured": (Ts, step_ms)},
    predicted={
        "read the weights": (Ts, bytes_ms),
        "do the arithmetic": (Ts, flops_ms),
    },
    xlabel="new tokens in one step, T",
    ylabel="time of the step (ms)",
    title=f"8 tokens take {step_ms[3] / step_ms[1]:.1f} times as long as 2; "
    f"256 take {step_ms[8] / step_ms[5]:.1f} times as long as 32",
    log=True,
)
ax.axvline(crossing, color="grey", linewidth=1)
ax.text(crossing, ax.get_ylim()[0], f" T = {crossing:.0f}", va="bottom");

# %% [markdown]
# *The dashed lines are what reading and arithmetic take at the least, going by
# the two small experiments (which ran at another moment: on a busy machine a
# point may even lie below). They cross at the grey line. An idle machine can
# beat neither, but with few tokens the matrix library stays well above both, so
# the measured line bends later. What does show is the plateau: compare 2 tokens
# with 8, four times the tokens for far less than four times the time. Then
# compare 32 with 256.*
#
# One point is a special case: T = 1. For the product of a matrix with a single
# vector the library has a routine of its own. From two columns on another one
# runs, which is made for many columns and slow for few. How large that jump is
# depends on the library and the machine. Where T = 1 lies well above the line
# for reading, too, this routine sets the pace, and not the memory.

# %%
for T, ms in zip(Ts[:4], step_ms):
    print(f"T = {T}: {ms:5.1f} ms, ", end="")
    print(f"{ms / step_ms[0]:.1f} times as long as T = 1")

# %% [markdown]
# At the right of the figure is prefill: many tokens share each weight that is
# read, and the step comes close to the arithmetic's limit. At the left is
# decode. It reads all weights for one token, while most arithmetic units sit
# idle. The faster a machine computes compared with how fast it reads, the more
# of them sit idle.
#
# ## A loop over requests is not a batch
#
# The cure for decode is to let *many requests* share a step. The projections do
# that already: the N tokens of a step go through each matrix together, whoever
# they belong to. But `attend_cached` loops over the requests, and calls a few
# dozen small operations for each of them, in every layer. How many operations
# does a step have, with 16 requests of our small model?

# %%
num_requests, context = 16, 448
old_ids = book_ids[:num_requests * context]
lens = torch.full((num_requests,), context)
ones = torch.ones_like(lens)


def filled_cache(fused_decode):
    cache = ContiguousKVCache(
        lm.config, num_requests, 512, fused_decode=fused_decode
    )
    for request_id in range(num_requests):
        cache.begin(request_id)
    forward_cached(lm, cache, old_ids, lens)
    return cache


caches = {"a loop": filled_cache(False), "a batch": filled_cache(True)}
steps = {
    name: lambda cache=cache: forward_cached(lm, cache, old_ids[:16], ones)
    for name, cache in caches.items()
}
costs = {name: meter.measure(step) for name, step in steps.items()}
for name, cost in costs.items():
    print(f"{name}: {len(cost.timeline):,} operations in a step")

# %% [markdown]
# The second number is that of a cache with `fused_decode=True`, which calls
# `attend_decode` for all requests that bring one token. It takes their queries
# in one call of torch's fused attention, reads every row up to the longest
# request, and masks what comes after a request's own keys. (In these
# notebooks `fused_decode` is False by default, so that your own `attend_cached`
# runs.)

# %%
print(inspect.getsource(attend_decode))

# %% [markdown]
# It gives the same logits as the loop, up to rounding. And it takes less time
# here, since fewer calls save some milliseconds; what is left is mostly
# arithmetic and reading. (It has a price: each request costs what the
# longest costs. Here all have 448 tokens. With requests of very different
# lengths, or very long ones, the loop may win on a CPU.)

# %%
logits = [cost.value for cost in costs.values()]
print(f"largest difference: {(logits[0] - logits[1]).abs().max():.0e}")
for name, seconds in meter.medians_in_turns(steps, repeats=15).items():
    print(f"{name}: {1000 * seconds:.1f} ms per step, ", end="")
    print(f"{num_requests / seconds:,.0f} tokens per second")

# %% [markdown]
# ### What a batch shares, and what it does not
#
# Back to the wide model. Its weights are read once per step, for all requests
# together. Keys and values are not shared: each request reads its own. With 64
# tokens per request they hardly matter. With 2,048, the keys and values of
# eight requests are about three quarters as many bytes as the weights:

# %%
kv_bytes = kv_cache.kv_cache_bytes(wide, 2048)
print(f"{kv_bytes / 1e6:.0f} MB of keys and values per text of 2,048 tokens")
print(f"{8 * kv_bytes / 1e6:.0f} MB for eight, ", end="")
print(f"{weight_bytes / 1e6:.0f} MB of weights")

# %% [markdown]
# To time a step we need not read a prompt of 2,048 tokens first. `attend` is
# ours to pass in, so this one attends to random keys and values.

# %%
def wide_step(batch_size, context):
    heads = wide.num_kv_heads, wide.head_dim
    shape = wide.num_layers, batch_size, context, *heads
    k_cache, v_cache = torch.randn(shape), torch.randn(shape)
    lens = torch.full((batch_size,), context)

    def attend(layer, q, k, v):
        return attend_decode(q, k_cache[layer], v_cache[layer])

    @torch.no_grad()
    def step():
        wide_lm(book_ids[:batch_size], lens - 1, attend)

    return step


# %%
batch_sizes = [1, 2, 4, 8]
tokens_per_s = {}
for context in (64, 2048):
    tokens_per_s[f"{context:,} tokens per request"] = batch_sizes, [
        B / meter.median_seconds(wide_step(B, context)) for B in batch_sizes
    ]

# %% alt="Tokens per second over the requests in one step, from 1 to 8: a line for 64 tokens per request, and one for 2,048. Both end higher than they begin. Long texts gain less: with eight requests they are far below the short ones."
(_, short), (_, long) = tokens_per_s.values()
plotting.plot_measured(
    tokens_per_s,
    xlabel="requests in one step",
    ylabel="tokens per second",
    title="Eight requests instead of one: tokens per second\n"
    f"times {short[-1] / short[0]:.1f} with short texts, "
    f"times {long[-1] / long[0]:.1f} with long ones",
);

# %% [markdown]
# *Batching helps in both cases, but less with long texts. Attention is the part
# that it cannot share: each request has its own keys and values. (Where little
# is gained from one request to two, that is the other routine again.)* Is it
# the reading that takes so long?

# %%
more_ms = 1000 * (8 / long[-1] - 8 / short[-1])
print(f"eight long texts take {more_ms:.0f} ms more per step; ", end="")
print(f"reading keys and values takes {1000 * 8 * kv_bytes / bandwidth:.0f} ms")

# %% [markdown]
# Reading is the least that it can take; the rest is how the processor's routine
# for attention goes about it.
#
# So whoever serves a model wants as many requests in a step as possible. Each
# of them brings a KV cache. How many fit?
#
# ## What reserving for the longest costs
#
# Eight requests are eight passages of the book, of different lengths, each to
# be continued. Nobody knows how long a text will become, and a row of the cache
# cannot grow, since the next row begins right after it. So each row is as long
# as the longest text that the model can write: 512 tokens. (We let each request
# write 64 tokens; a real one goes on until it writes a stop token, as in
# chapter 1.)

# %%
passages = [p for p in text.load_book().split("\n\n") if 20 < len(p) < 440]
prompts = [text.encode(passage) for passage in passages[10:90:10]]
batch = ContiguousKVCache(lm.config, len(prompts), max_seq_len=512)
for request_id in range(len(prompts)):
    batch.begin(request_id)
texts = generate.generate_cached(lm, prompts, 64, batch, temperature=0.7)
print(text.decode(texts[0]))

# %% [markdown]
# ### Exercise 3.5 · `kv_utilization` ★ (5 minutes)
#
# What fraction of the reserved places holds a token right now?

# %% exercise="kv_utilization"
from lib.kv_cache import kv_utilization

# %%
check(kv_utilization)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `max_seq_len` tokens are reserved for each request, also for one that has none
# yet.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `seq_lens.sum().item()` is a Python number.
#
# </details>

# %% alt="Eight bars, one for each request, all as long as the 512 tokens that are reserved. The blue part, at the left, holds tokens and is of another length in each: the shortest is a sixth of the bar, the longest nine tenths. The rest is hatched, about half of all."
share = kv_cache.kv_utilization(batch.seq_lens, 512)
drawing.draw_contiguous(
    batch, title=f"{share:.0%} of what is reserved holds a token"
);

# %% [markdown]
# *Blue places hold a token. Hatched ones were reserved and stayed empty to the
# end. And this is the fullest moment: at every earlier one, less was used.*

# %%
print(f"reserved {batch.reserved_bytes / 1e6:.2f} MB, ", end="")
print(f"used {batch.used_bytes / 1e6:.2f} MB, a share of {share:.3f}")

# %% [markdown]
# ## The next column of the table
#
# This is generation with a contiguous cache that reserves room for twice as
# many tokens as come. Two rows are new: the bytes that are reserved and used,
# exactly. One token of this small random model takes 256 bytes per layer. The
# prompt is one token, and N tokens are written after it, of which the last is
# not in the cache. For a long prompt the row of peak memory holds if it is read
# in chunks.

# %%
cells = table.fit(table.sweep("contiguous"))
Markdown(table.render(cells))

# %% [markdown]
# Compare this with recompute, in chapter 1. There, memory grew like N,
# attention like N³·L and projections like N²·L. So the price of a cache is
# memory: every layer keeps its own keys and values. In return, both kinds of
# work grow with one power of N less. (*Block calls* are calls of the model's
# blocks, its layers.)

# %%
check.summary()

# %% [markdown]
# ## What is still wrong

# %%
print(f"{1 - share:.0%} of the cache holds nothing; without that, ", end="")
print(f"{1 / share:.1f} times as many requests would fit")

# %% [markdown]
# A request should take only what it needs. But a row that grows runs into the
# next one. Chapter 4 cuts memory into small blocks, and the blocks of a request
# may lie anywhere.
#
# ## In six sentences
#
# 1. A new token needs its own query, and the keys and values of all tokens
#    before it, which never change: keep them.
# 2. They take 2·L·G·D numbers per token; heads that share a KV head share what
#    is stored.
# 3. Prefill brings a whole prompt, decode one token per step; to the model both
#    are new tokens at some positions, so a long prompt may come in chunks.
# 4. Prefill uses each weight for many tokens, so arithmetic sets its limit;
#    decode reads all weights for few tokens, so memory bandwidth does.
# 5. Requests that decode in one step share the weights, but each reads its own
#    keys and values.
# 6. A contiguous cache reserves for the longest text that may come, and much of
#    it stays empty.
#
# ## Do you recall?
#
# 1. Why are queries not kept?
# 2. A model has 24 layers, 16 query heads, and 4 KV heads of 64 numbers, two
#    bytes each. How many bytes per token?
# 3. In one step, `seq_lens` is `[7, 4]` and `query_lens` is `[2, 4]`. Which
#    positions are new, and which rows of the logits do you need for the next
#    tokens?
# 4. Why does a query need no mask when T is 1?
# 5. A machine can do 100 FLOPs in the time of a byte, and weights have four
#    bytes each. Counting only the weights, up to how many requests does a step
#    take no longer than with one?
# 6. A prompt of 10,000 tokens is read in chunks of 500. How many scores does a
#    query head hold at most, and how many if the prompt is read at once?
#
# <details><summary>Answers</summary>
#
# 1. A query is used once, when its token is new. Later tokens bring their own.
# 2. 2 · 24 · 4 · 64 · 2 = 24,576, which is 24 KiB.
# 3. Positions 5 and 6 of the first request, 0 to 3 of the second; rows 1 and 5.
# 4. The newest token may see all tokens that are there.
# 5. Up to 200, if only weights were read: T requests make T/2 FLOPs per byte of
#    weights. (In truth each request reads its own keys and values as well, so
#    the step grows from the second request on, and waits for memory even beyond
#    200.)
# 6. 500 · 10,000 = 5 million, against 100 million.
#
# </details>
#
# ## Sources
#
# - Shazeer, *Fast Transformer Decoding: One Write-Head is All You Need*, 2019,
#   [1911.02150](https://arxiv.org/abs/1911.02150): decoding waits for memory,
#   so heads should share keys and values.
# - Ainslie and others, *GQA*, 2023,
#   [2305.13245](https://arxiv.org/abs/2305.13245): groups of heads.
# - Pope and others, *Efficiently Scaling Transformer Inference*, 2022,
#   [2211.05102](https://arxiv.org/abs/2211.05102): prefill and decode of large
#   models, and what bounds them.
# - Williams, Waterman and Patterson, *Roofline*, 2009,
#   [doi.org/10.1145/1498765.1498785](https://doi.org/10.1145/1498765.1498785):
#   arithmetic intensity, and the longer of two times.
# - Agrawal and others, *SARATHI*, 2023,
#   [2308.16369](https://arxiv.org/abs/2308.16369): prefill in chunks, there so
#   that the decodes of other requests can ride along with a chunk.
# - Llama team, *The Llama 3 Herd of Models*, 2024,
#   [2407.21783](https://arxiv.org/abs/2407.21783): the shape of the 8B model.
# - vLLM, *Engine arguments*,
#   [docs.vllm.ai](https://docs.vllm.ai/en/latest/configuration/engine_args/):
#   what part of a GPU to use, and in which numbers to store the cache.
