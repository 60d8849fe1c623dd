# %% [markdown]
# # 7. A smaller cache: fewer bytes per token
#
# Paging stopped the cache from wasting memory. What is left is memory that
# tokens really use, and there is a lot of it. A token's keys and values are a
# product of three numbers: how many heads, how many numbers per head, how many
# bits per number. This chapter makes each of them smaller, and asks every time
# what it costs: how much worse does the model predict? Fewer bytes are easy.
# Fewer bytes that nobody misses are the craft.
#
# **You need:** chapters 3 and 4, and of chapter 5 the online softmax. 180
# minutes. No GPU.
#
# **You will be able to**
#
# - say how many bytes a token takes in any of these caches, to the byte,
# - turn a model with many KV heads into one with few, and train it back to
#   health,
# - keep keys and values in 8, 4 or 2 bits, and say what keys need that values
#   do not,
# - factorize keys and values into short codes, and compute attention on the
#   codes themselves,
# - explain why rotated positions stand in the way of that, and what DeepSeek
#   does about it,
# - tell from one plot which method to use for how many bytes.

# %%
from dataclasses import replace
import json

import torch

from lib import generate, kv_cache, kv_heads, latent_kv_cache, model
from lib import quantized_kv_cache, recall, text
from lib.config import LLAMA3_8B, ModelConfig, check_count
from lib.figures import drawing, plotting
from lib.kv_cache import ContiguousKVCache
from lib.kv_heads import check_divides
from lib.latent_kv_cache import latent_format, record_kv
from lib.measure import meter, pooling
from lib.measure.quality import Quality, measure_quality, passages
from lib.model import attend_fused, rotate
from lib.paged_kv_cache import PagedKVCache
from lib.quantized_kv_cache import QuantizedFormat, check_vectors
from lib.course.check import check
from lib.training import TrainingConfig

plotting.use_course_style()
torch.set_num_threads(1)  # steadier timings

# %% [markdown]
# ## A cache as large as the model
#
# Llama 3 8B has 32 layers. In each of them a token keeps keys and values of 8
# heads of 128 numbers, in 16 bits each:

# %%
llama_bytes = kv_cache.kv_cache_bytes(LLAMA3_8B, 1, bytes_per_number=2)
print(f"{llama_bytes:,} bytes per token")
print(f"{16e6 / llama_bytes:.0f} thousand tokens take as much as its weights")

# %% [markdown]
# Its weights take 16 GB, once, for everybody. Fifteen texts of 8,192 tokens
# take as much again. And a GPU that decodes reads all of it, at every step
# (chapter 5). So fewer bytes per token are more requests at a time, and a
# faster step for each.
#
# There are three ways to get there, and they are the three parts of this
# chapter:
#
# - **Fewer heads.** Several query heads read the same keys and values. Our
#   model does so already: 6 query heads read 2 KV heads.
# - **Fewer bits.** A number is kept in 8, 4 or 2 bits instead of 32, as one of
#   256, 16 or 4 steps between the smallest and the largest of its vector. The
#   size of a step and the smallest number, called **scale** and **zero
#   point**, are kept with each vector.
# - **Fewer numbers.** The keys of all heads of a layer are replaced by one
#   short vector, their **code**, from which they can be made again, or nearly
#   so. Values get a code of their own. The length of a code is its **rank**.
#
# ### Exercise 7.1 · `bytes_per_token` ★ (10 minutes)
#
# Count the bytes of a token in all layers, exactly. Without `bits` and `ranks`
# it is what `kv_cache_bytes` gave in chapter 3. With `bits`, a pair for keys
# and values, each vector of D numbers is packed into bytes and has its scale
# and its zero point beside it, `bytes_per_number` bytes each. With `ranks`, a
# pair too, a layer has one code for keys and one for values, whatever the
# number of heads.

# %% exercise="bytes_per_token"
from lib.kv_heads import bytes_per_token

# %%
check(bytes_per_token)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Count for one layer first: how many vectors does a token have there, and how
# many bytes is each? With `bits` keys and values may differ, so add two terms.
#
# </details>
# <details><summary>Hint 2</summary>
#
# A quantized vector has `D * b // 8 + 2 * bytes_per_number` bytes, and there
# are `num_kv_heads` of them for keys and as many for values.
#
# </details>

# %% [markdown]
# What would Llama's cache cost otherwise, beside one with a KV head for each
# query head?

# %%
many, single = (replace(LLAMA3_8B, num_kv_heads=G) for G in (32, 1))
for name, num_bytes in {
    "a KV head per query head": kv_heads.bytes_per_token(many, 2),
    "8 KV heads, as it is": kv_heads.bytes_per_token(LLAMA3_8B, 2),
    "1 KV head": kv_heads.bytes_per_token(single, 2),
    "8 KV heads, 8 bits": kv_heads.bytes_per_token(LLAMA3_8B, 2, bits=(8, 8)),
    "8 KV heads, 4 bits": kv_heads.bytes_per_token(LLAMA3_8B, 2, bits=(4, 4)),
    "codes of 256 numbers": kv_heads.bytes_per_token(
        LLAMA3_8B, 2, ranks=(256, 256)
    ),
}.items():
    print(f"{name:24} {num_bytes:7,} bytes, 1 / {524288 / num_bytes:4.1f}")

# %% [markdown]
# ## How to see what is lost
#
# Bytes are counted; quality has to be measured. Our model of the book is not
# enough for that. It predicts the next byte from the last few words, and what
# a cache forgets beyond them hardly hurts it. So we use two models, and ask
# each what it can do:
#
# - **The book**: nats per byte on passages that no model was trained on
#   (chapter 2).
# - **Notes**: a text that nobody can complete without remembering. Some keys
#   are told with four values each, among filler. At the end up to four of the
#   keys come again, and their values are to be predicted. We count the share
#   that the model gets right. A model of two layers learns that in a few
#   minutes, and some such models lie in data/recall.
#
# Here is a short text, with three notes. Keys are letters, values numbers, and
# filler is dots:

# %%
one = recall.draw_notes(1, 3, 12, torch.Generator().manual_seed(1))
print(recall.spell_notes(one.token_ids[0]))
print("asked for:", recall.spell_notes(one.token_ids[one.is_answer]))

# %% [markdown]
# `measure_quality` runs texts through a model and asks it for some of their
# tokens: here for 24 passages of 256 bytes, and for 192 texts of eight notes in
# 64 tokens of filler. They come in three draws, so that we see how much the
# result depends on the draw. First without any loss:

# %%
def seeded(seed):
    return torch.Generator().manual_seed(seed)


book_lm = model.load_model()
book = [passages(8, 256, seeded(seed)) for seed in range(3)]
notes_lm = recall.load("notes_g4")  # four query heads, four KV heads
notes = [recall.draw_task("notes", 64, seeded(seed)) for seed in range(3)]

book_plain = measure_quality(book_lm, book)
notes_plain = measure_quality(notes_lm, notes)
print("book: ", " ".join(f"{x:.3f}" for x in book_plain.nats), "nats per byte")
print("notes:", " ".join(f"{x:.1%}" for x in notes_plain.accuracies), "right")

# %% [markdown]
# Now let us see that the two measure different things. We let each token look
# at the last 16 tokens only, in every layer:

# %%
def last_16(layer, q, k, v):
    T, H = q.shape[-3:-1]
    places = torch.arange(T)
    distance = places[:, None] - places  # (T, T)
    is_seen = (distance >= 0) & (distance < 16)
    k, v = (x.repeat_interleave(H // x.shape[-2], dim=-2) for x in (k, v))
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=is_seen
    )
    return out.transpose(-3, -2)


def share_by_guessing(examples):
    """Right if one always answers with the value that was told most often."""
    is_told = ~examples.is_answer.unsqueeze(-1)  # (B, T, 1)
    told = torch.nn.functional.one_hot(examples.token_ids, 128) * is_told
    told[..., :32] = told[..., 96:] = 0  # neither keys nor filler
    guesses = told.sum(dim=1).argmax(dim=-1, keepdim=True)  # (B, 1)
    is_right = examples.token_ids == guesses
    return is_right[examples.is_answer].float().mean().item()


short_book = measure_quality(book_lm, book, attend=last_16)
short_notes = measure_quality(notes_lm, notes, attend=last_16)
print(f"book:  {book_plain.mean_nats:.2f} nats per byte, "
      f"with the last 16 tokens {short_book.mean_nats:.2f}")
print(f"notes: {notes_plain.accuracy:.0%} right, "
      f"with the last 16 tokens {short_notes.accuracy:.0%}, "
      f"by guessing {share_by_guessing(notes[0]):.0%}")

# %% [markdown]
# The book gets a little worse. Of the notes nothing is left: as much comes of
# guessing, which always answers with the value that the text has told most
# often. Whoever judges a cache by the book alone would say that forgetting
# costs little. (Four layers of 16 tokens reach back 60 tokens, two layers 30.)
#
# ## Fewer heads
#
# In **multi-head attention** each query head has its own keys and values. In
# **multi-query attention** (Shazeer, 2019) all query heads share a single KV
# head: the cache shrinks by the number of heads, and quality suffers. Between
# the two lies **grouped-query attention**, in which groups of query heads share
# one (Ainslie and others, 2023). Llama 3 8B has groups of four, our book model
# has groups of three.

# %% alt="Three drawings, each of six query heads (orange) joined by lines to the KV heads (key blue, value green) that they read. Multi-head: six KV heads, one each. Grouped-query: two, each read by three. Multi-query: one, read by all six."
drawing.draw_head_groups(
    6, [6, 2, 1],
    names=["multi-head", "grouped-query", "multi-query"],
    title="The fewer heads of keys and values, the smaller the cache",
);

# %% [markdown]
# *Six query heads (orange) and the KV heads (key blue, value green) that they
# read: six, two, one.*
#
# A model can be trained that way from the beginning. But the models that people
# had when the idea came up had a KV head for each query head. Ainslie and
# others showed a cheap way over: average the KV heads of each group into one,
# and train on for 5% of the steps. The averaging is done on the matrices that
# make keys and values. If a group of two heads has the weights
#
# | | its row, two columns |
# |---|---|
# | head 0 | 1, 3 |
# | head 1 | 2, 7 |
# | **mean** | 1.5, 5 |
#
# then the pooled head makes, for every token, the mean of the two keys that
# were there before. (RoPE turns both by the same angle, so that it makes no
# difference whether the mean is taken before it or after it.)
#
# ### Exercise 7.2 · `pool_kv_heads` ★★ (15 minutes)
#
# You get the matrix of `k_proj`, or of `v_proj`, of one layer: D rows for each
# KV head, one head after the other. Return a matrix for fewer heads. Which old
# heads become one? Query head h reads KV head `h // (H / G)`, before and after:
# so it has to be neighbours.

# %% exercise="pool_kv_heads" given="1"
from lib.kv_heads import pool_kv_heads

# %%
check(pool_kv_heads)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `view` gives a matrix more dimensions without moving a number: first the
# group, then the head in its group, then the row of that head, then C. Which of
# them is averaged?
#
# </details>
# <details><summary>Hint 2</summary>
#
# `weight.view(num_kv_heads, G // num_kv_heads, head_dim, -1)` and then `mean`
# over dimension 1. Join the first two of the three that are left.
#
# </details>

# %% [markdown]
# `with_kv_heads` pools both matrices of every layer with your function, and
# copies all other weights. We pool the four heads of the notes model into two,
# and into one; and the two of the book model into one.

# %%
pooled = {G: kv_heads.with_kv_heads(notes_lm, G) for G in (2, 1)}
for G, lm in pooled.items():
    print(f"notes, 4 heads pooled into {G}: "
          f"{measure_quality(lm, notes).accuracy:.0%} right")
book_one_head = kv_heads.with_kv_heads(book_lm, 1)
book_pooled = measure_quality(book_one_head, book)
print(f"book, 2 heads pooled into 1: {book_pooled.mean_nats:.2f} nats per byte")

# %% [markdown]
# Ruined: the mean of two keys is a key that no query head has learned to look
# for, and the mean of two values is nothing that the next layer expects. But
# what the model knows is still there, in all other weights and in what the
# heads had in common. The notes model was trained for 3,000 steps. We train on
# for 5% of that, 150 steps, which takes some seconds:

# %% alt="Share of answers that are right over 150 steps of training after pooling. Both lines begin near 0. Pooled into 2 rises at once and is high and flat from step 50 on; pooled into 1 rises only after step 25, and ends lower."
settings = TrainingConfig(
    num_steps=150, batch_size=32, learning_rate=1e-3, warmup_steps=20
)
curves = {}
for G, lm in pooled.items():
    before = measure_quality(lm, notes).accuracy
    curve = recall.train(
        lm, "notes", settings, from_share=0.5, evaluate_every=25
    )
    curves[f"pooled into {G}"] = [(0, before), *curve]

trained_on = {G: measure_quality(lm, notes) for G, lm in pooled.items()}
plotting.plot_measured(
    {name: tuple(zip(*curve)) for name, curve in curves.items()},
    xlabel="steps of training after pooling (150 are 5% of the first training)",
    ylabel="share of answers that are right",
    title="Pooled into two heads, a model comes back sooner than into one",
);

# %% [markdown]
# *The share of right answers to 512 questions, in 128 texts that are the same
# at every step.*
#
# To train the book's model on for 5% of its 5,000 steps takes minutes, so that
# was done beforehand (`python -m lib.measure.pooling`):

# %%
book_runs = json.loads(pooling.RESULTS.read_text())["step_and_nats_per_byte"]
for step, *nats in book_runs:
    print(f"{step:4} steps: {sum(nats) / len(nats):.3f} nats per byte")

# %% [markdown]
# ### A table like theirs
#
# Ainslie and others compare quality and time (their Table 1). We can make the
# same table. Beside the pooled models stand those that were trained from
# scratch with four, two and one KV heads, three times each with other random
# numbers (their training is in data/results/recall.json). Time is the median of
# a decode step for sixteen texts of 960 tokens, where the models take turns.

# %%
def decode_step(lm):
    """A step of one new token for each of 16 texts in a cache."""
    cache = ContiguousKVCache(lm.config, 16, 1024, fused_decode=True)
    for request_id in range(16):
        cache.begin(request_id)
    prompts = torch.zeros(16 * 960, dtype=torch.int64)
    generate.forward_cached(lm, cache, prompts, torch.full((16,), 960))
    ones = torch.ones(16, dtype=torch.int64)
    return lambda: generate.forward_cached(lm, cache, prompts[:16], ones)


scratch = {G: recall.load(f"notes_g{G}") for G in (4, 2, 1)}
seconds = meter.medians_in_turns(
    {f"{G}": decode_step(lm) for G, lm in scratch.items()}, repeats=41
)
runs = json.loads(recall.RESULTS.read_text())
print("KV heads  bytes per token  ms per step  from scratch        pooled")
for G, lm in scratch.items():
    last = [run["accuracy"][-1][1] for run in runs[f"notes_g{G}"]]
    after = f"{trained_on[G].accuracy:.0%}" if G in trained_on else "-"
    print(f"{G:8}  {kv_heads.bytes_per_token(lm.config):15,}  "
          f"{1000 * seconds[f'{G}']:11.2f}  "
          f"{' '.join(f'{share:.1%}' for share in last):18}  {after}")

# %% [markdown]
# | theirs: T5 XXL | KV heads | s per sample | average of 7 tasks |
# |---|---|---|---|
# | multi-head | 64 | 1.51 | 47.2 |
# | grouped-query, pooled, 5% more training | 8 | 0.28 | 47.1 |
# | multi-query, pooled, 5% more training | 1 | 0.24 | 46.6 |
#
# What is alike: fewer heads make a step faster, and after 5% more training
# grouped heads have lost little, a single head more. What differs: in our task
# a model trained *from scratch* with one head is as good as any, so here
# pooling costs more than having few heads does. (Notes need few numbers. Tasks
# like theirs need more.) And their model becomes five times faster, since it
# runs on accelerators that wait for memory. Our step has other things to do
# besides.
#
# ## Fewer bits
#
# Take a vector of four numbers, and two bits for each, that is four codes:
#
# | | | | | |
# |---|---|---|---|---|
# | numbers | -1.0 | 0.2 | 0.7 | 2.0 |
# | steps of 1.0 above -1.0 | 0 | 1.2 | 1.7 | 3 |
# | codes | 0 | 1 | 2 | 3 |
# | back again | -1.0 | 0.0 | 1.0 | 2.0 |
#
# The zero point is the smallest number, -1. Three steps lead to the largest, so
# the scale is (2 - (-1)) / 3 = 1. A code is the number of steps, rounded. What
# comes back is off by half a step at most, and both ends are exact. Four codes
# of two bits fill one byte, the first of them in its lowest bits: 0 + 1 · 4 +
# 2 · 16 + 3 · 64 = 228.
#
# ### Exercise 7.3 · `quantize` ★★ (30 minutes)
#
# Do that for vectors of any shape (..., D), along the last dimension, with 8, 4
# or 2 bits. A vector of equal numbers has scale 0, by which nothing can be
# divided: its codes are 0. Use `torch` for all vectors at once.

# %% exercise="quantize" given="1"
from lib.quantized_kv_cache import quantize

# %%
check(quantize)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `x.aminmax(dim=-1, keepdim=True)` gives the smallest and the largest. With
# `bits` bits there are 2^bits codes, and so one step less. To avoid dividing by
# 0, `scale.masked_fill(scale == 0, 1)`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# To pack, `unflatten(-1, (-1, 8 // bits))` puts the codes that share a byte
# into a dimension of their own. Shift them left by `torch.arange(0, 8, bits)`,
# then sum over that dimension, with `dtype=torch.uint8`. (Nothing overlaps, so
# that a sum is an "or".)
#
# </details>

# %%
codes, scale, zero = quantized_kv_cache.quantize(
    torch.tensor([-1.0, 0.2, 0.7, 2.0]), bits=2
)
codes, scale, zero

# %% [markdown]
# ### Exercise 7.4 · `dequantize` ★ (10 minutes)
#
# And back: unpack the codes, then count the steps from the zero point.

# %% exercise="dequantize"
from lib.quantized_kv_cache import dequantize

# %%
check(dequantize)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Shift each byte right by 0, `bits`, 2 · `bits`, ... and keep the lowest `bits`
# bits of each: `& (2**bits - 1)`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `codes.unsqueeze(-1) >> shifts` makes a dimension of codes that shared a byte;
# `flatten(-2)` joins it with the one before. With shifts in `torch.uint8` all
# stays in single bytes until it is multiplied by the scale.
#
# </details>

# %% [markdown]
# ### A format, not a cache
#
# Which cache should keep these bytes? Any. Where a token lies is the business
# of chapters 3 and 4; *what* lies there is that of a **format**. The plain
# format writes keys and values as they are. `QuantizedFormat` turns each vector
# into a row of bytes before it is written, codes, scale and zero point one
# behind the other, and turns rows into vectors when they are read. Contiguous
# rows, block tables, forks, copy-on-write: none of them looks at what is in a
# row. So the model can write with a quantized cache in blocks, and your two
# functions are what it reads through:

# %%
def write(prompt, num_new_tokens, **cache_settings):
    """The greedy continuation of a prompt, and the cache that it came from."""
    cache = PagedKVCache(book_lm.config, 16, block_size=16, **cache_settings)
    cache.begin("a text")
    (ids,) = generate.generate_cached(
        book_lm, [text.encode(prompt)], num_new_tokens, cache, temperature=0
    )
    return text.decode(ids), cache


for bits in (None, 8, 4, 2):
    settings = {"format": QuantizedFormat(bits)} if bits else {}
    written, cache = write("It was the whale", 60, **settings)
    print(f"{bits or 32:2} bits, {cache.used_bytes:7,} bytes: {written!r}")

# %% [markdown]
# With 8 bits the model writes as well as with 32, with 2 bits it does not. The
# texts are not the same, though: wherever two bytes are nearly as likely, a
# small error chooses the other one, and from there on it is another text. So
# texts do not tell how much is lost. We shall measure that below.
#
# (4 bits per number are more than that, by the way: 32 numbers of a head share
# a scale and a zero point of 32 bits each, so that each number costs 6 bits.)
#
# A decode step must not turn the whole cache back into numbers first: that
# would be the memory it has saved. It goes through the cache tile by tile, 128
# tokens at a time, with the online softmax of chapter 5 (`attend_online`, which
# takes its keys and values in pieces). The meter can tell what either way
# holds, beside the cache, while one query looks at S tokens:

# %%
eight = QuantizedFormat(8)


def tile_by_tile(q, rows):
    S = torch.tensor([rows[0].shape[1]])
    return eight.attend(0, q, *rows, S, torch.tensor([1]))


def all_at_once(q, rows):
    S = torch.tensor([rows[0].shape[1]])
    k, v = (quantized_kv_cache.from_rows(x, 8, q.dtype) for x in rows)
    return kv_cache.attend_cached(q, k, v, S, torch.tensor([1]))


for S in (512, 2048, 8192):
    k, v = torch.randn(2, S, 2, 32, generator=seeded(S))
    rows = [x[None] for x in eight.encode(0, k, v)]  # of one text
    q = torch.randn(1, 6, 32, generator=seeded(0))
    print(f"{S:4} tokens, {sum(x.nbytes for x in rows):7,} bytes: ", end="")
    for way in (tile_by_tile, all_at_once):
        peak_bytes = meter.measure(lambda: way(q, rows)).peak_bytes
        print(f"{way.__name__} {peak_bytes:9,}  ", end="")
    print()

# %% [markdown]
# ### What keys need and values do not
#
# How many bits are enough? We try keys and values apart: one of them in few
# bits, the other in 8.

# %%
def contiguous(format):
    """How `measure_quality` is to make a cache for B texts of T tokens."""
    return lambda config, B, T: ContiguousKVCache(config, B, T, format=format)


def both(format):
    """Quality of the book and of the notes in a cache of this format."""
    make_cache = contiguous(format)
    return (
        measure_quality(book_lm, book, make_cache=make_cache),
        measure_quality(notes_lm, notes, make_cache=make_cache),
    )


pairs = [(8, 8), (4, 8), (2, 8), (8, 4), (8, 2), (4, 4), (4, 2)]
by_bits = {bits: both(QuantizedFormat(*bits)) for bits in pairs}
print("bits of keys, values   book (nats per byte)   notes (right)")
for bits, (of_book, of_notes) in {
    "as they are": (book_plain, notes_plain), **by_bits
}.items():
    print(f"{bits!s:21}  {of_book.mean_nats:20.3f}  {of_notes.accuracy:14.1%}")

# %% [markdown]
# With 8 bits nothing can be seen, with 4 hardly anything. With 2 bits the two
# part: values survive, keys do not. An error in a value passes into the output
# about as large as it is. An error in a key changes a *score*, and with it the
# weights of all tokens. But that is the smaller part of it.
#
# All numbers of a key share one scale, and it is set by the largest of them. If
# some places of a key, its **channels**, are always large, then the steps are
# too coarse for all others. So let other numbers share a scale: not the D
# numbers of one key, but those of one channel in some 32 neighbouring keys.
# That is KIVI's proposal (Liu and others, 2024): keys **per channel**, values
# **per token**. KVQuant (Hooper and others, 2024) goes one step further:
# rotation mixes two channels, by another angle for each token, so quantize keys
# *before* they are rotated. We try all this with your function, without a
# cache: `attend=` takes any attention instead of one.

# %%
def per_token(x):
    quantized = quantized_kv_cache.quantize(x, 2)
    return quantized_kv_cache.dequantize(*quantized, 2)


def per_channel(x):
    """x (B, T, G, D), one scale per channel for 32 tokens, or for all T."""
    size = 32 if x.shape[1] % 32 == 0 else x.shape[1]
    channels = x.unflatten(1, (-1, size)).movedim(2, -1)  # (B, ..., G, D, size)
    return per_token(channels).movedim(-1, 2).flatten(1, 2)


def per_channel_before_rotation(k):
    places, theta = torch.arange(k.shape[1]), book_lm.config.rope_theta
    return rotate(per_channel(rotate(k, -places, theta)), places, theta)


def per_token_without_offset(k):
    """Each channel's mean over all tokens is kept apart, as it is."""
    offset = k.mean(dim=1, keepdim=True)  # (B, 1, G, D)
    return per_token(k - offset) + offset


def untouched(x):
    return x


print("2 bits of                               book   notes")
for name, (k_way, v_way) in {
    "keys, per token": (per_token, untouched),
    "keys, per token, less their mean": (per_token_without_offset, untouched),
    "keys, per channel": (per_channel, untouched),
    "keys, per channel, before rotation": (
        per_channel_before_rotation, untouched
    ),
    "values, per token": (untouched, per_token),
    "values, per channel": (untouched, per_channel),
}.items():
    def attend(layer, q, k, v):
        return attend_fused(layer, q, k_way(k), v_way(v))

    of_book = measure_quality(book_lm, book, attend=attend)
    of_notes = measure_quality(notes_lm, notes, attend=attend)
    print(f"{name:37} {of_book.mean_nats:.3f}  {of_notes.accuracy:5.1%}")

# %% [markdown]
# Per channel and before rotation, keys are as good as values in 2 bits, or
# nearly so; after rotation that helps the book, but not the notes. (To rotate
# back is to rotate by minus the position.) For values it makes no difference
# which numbers share a scale. What is it about the channels of keys?
# `record_kv` collects keys and values as they occur in a model:

# %% alt="The largest number in each of 64 channels, sorted. Keys and values rise slowly and together for most of the way; at the right end the last channels of keys shoot up, to more than twice the largest of values."
keys, values = record_kv(book_lm, book[0].token_ids)  # (L, N, G, D) each
num_channels = keys.shape[2] * keys.shape[3]
largest = {
    name: x.abs().amax(dim=(0, 1)).flatten().sort().values
    for name, x in (("keys", keys), ("values", values))
}
ratio = {name: (x[-1] / x.median()).item() for name, x in largest.items()}
plotting.plot_measured(
    {
        name: (range(1, num_channels + 1), x.tolist())
        for name, x in largest.items()
    },
    xlabel="channels of both heads, sorted",
    ylabel="largest number that occurs, in all layers",
    title=f"Keys: the largest channel is {ratio['keys']:.1f} times the median",
).set_xticks([1, *range(16, num_channels + 1, 16)]);

# %% [markdown]
# *Some channels of keys are much larger than all others; those of values are
# not.* Much of it is the same for all tokens: in the table, keys per token lose
# less when their mean has been subtracted. A zero point per channel takes
# it away, too. But per channel has a price: scale and zero point are
# known only when all 32 keys are there, so KIVI keeps the newest keys as they
# are until there are so many. And keys that were quantized before rotation have
# to be rotated at every step. Our format is per token for both, so that a token
# is written once and never again.
#
# Is it faster? Here it is not. The processor has to unpack what it reads:

# %%
def step_over(format):
    cache = ContiguousKVCache(book_lm.config, 1, 512, format=format)
    cache.begin("a text")
    ids = book[0].token_ids.flatten()
    generate.forward_cached(book_lm, cache, ids[:480], torch.tensor([480]))
    next_id, one = ids[480:481], torch.tensor([1])
    return lambda: generate.forward_cached(book_lm, cache, next_id, one)


seconds = meter.medians_in_turns({
    "32 bits": step_over(kv_cache.PLAIN),
    "8 bits": step_over(QuantizedFormat(8)),
    "4 bits": step_over(QuantizedFormat(4)),
}, repeats=11)
for name, value in seconds.items():
    print(f"{name:7}: {1000 * value:.2f} ms per decode step")

# %% [markdown]
# That is this processor, and torch, which makes each step of unpacking a pass
# of its own. In a kernel on a GPU, the bytes come in, and the numbers are made
# in registers, where nothing has to be written; there a step waits for bytes,
# and there are fewer of them.
#
# ## Fewer numbers
#
# Suppose that the keys of six tokens are these, three numbers each:
#
# | | w | h | a | l | e | s |
# |---|---|---|---|---|---|---|
# | key | 3, 4, 0 | 6, 8, 1 | 0, 0, 2 | 3, 4, 2 | -3, -4, 1 | 0, 0, -1 |
# | code | 5, 0 | 10, 1 | 0, 2 | 5, 2 | -5, 1 | 0, -1 |
#
# They all lie in one plane, through (0.6, 0.8, 0) and (0, 0, 1). These two rows
# are a **basis**: each key is its first number times the first row plus its
# second number times the second. So two numbers per token are enough, the
# **code**, and the basis is kept once for all tokens. As a formula: keys (6, 3)
# are codes (6, 2) @ basis (2, 3), a product of two thin matrices. Such a matrix
# has **rank** 2. (Code is a word for any short form: the integers above were
# codes of single numbers, these are codes of whole vectors. The field calls
# such a vector a **latent**, and so do the names of our functions.)
#
# Real keys do not lie in a plane exactly. But the singular value decomposition,
# SVD, finds the basis of r rows that comes nearest. Its **singular values** say
# how much lies in each direction: of the squares of all numbers together, the
# first r directions hold the first r squared singular values. What do the keys
# of our models look like? We record them as they occur, all KV heads of a layer
# side by side, 64 numbers per token. (The weights say less: a matrix may have
# full rank, while what is put into it never uses all of it.)

# %%
train_ids, _ = text.split_book(text.encode(text.load_book()))
book_seen = record_kv(
    book_lm, text.random_batch(train_ids, 16, 256, seeded(7))
)
notes_seen = record_kv(
    notes_lm, recall.draw_task("notes", 64, seeded(7)).token_ids
)


def spectrum(x):
    """Singular values of one layer's keys or values (N, G, D)."""
    return torch.linalg.svdvals(x.flatten(1))


# %% [markdown]
# ### Exercise 7.5 · `rank_for` ★ (10 minutes)
#
# How many directions are needed to keep a given share? Return the smallest
# rank, a plain int.

# %% exercise="rank_for" given="1"
from lib.latent_kv_cache import rank_for

# %%
check(rank_for)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `(singular_values**2).cumsum(dim=0)`: entry r - 1 is what rank r keeps, and
# the last entry is everything.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Count the ranks that keep too little. The next one is the first that keeps
# enough.
#
# </details>

# %%
for name, (seen_keys, seen_values) in {
    "book": book_seen, "notes": notes_seen
}.items():
    for kind, seen in (("keys", seen_keys), ("values", seen_values)):
        ranks = [latent_kv_cache.rank_for(spectrum(x), 0.99) for x in seen]
        print(f"{name:5} {kind:6}: ranks for 99%, by layer: {ranks} of 64")

# %% [markdown]
# ### Exercise 7.6 · `factorize` ★★ (15 minutes)
#
# Find the basis, and the codes. `torch.linalg.svd(x, full_matrices=False)`
# gives U, S and Vh with x = U @ diag(S) @ Vh, the largest singular value first.
# One of the three holds directions in which vectors like those of x lie, of
# length 1 and perpendicular to each other. The codes have to be such that a
# vector that comes later, and was not in x, gets its code by the same rule.

# %% exercise="factorize" given="1"
from lib.latent_kv_cache import factorize

# %%
check(factorize)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The rows of Vh have as many numbers as a vector has: they are the directions.
# How far does a vector reach in a direction of length 1?
#
# </details>
# <details><summary>Hint 2</summary>
#
# The first `rank` rows of Vh are the basis, and the codes are `x @ basis.T`.
#
# </details>

# %%
whales = torch.tensor([
    [3.0, 4, 0], [6, 8, 1], [0, 0, 2], [3, 4, 2], [-3, -4, 1], [0, 0, -1]
])
codes, basis = latent_kv_cache.factorize(whales, rank=2)
print("basis:\n", basis)
print("largest error:", f"{(codes @ basis - whales).abs().max():.0e}")

# %% [markdown]
# (The basis is another one than ours, turned within the same plane. It serves
# as well.)
#
# ### Attention on the codes
#
# A cache of codes is smaller. But if every step first made all keys again, it
# would do more work than ever, and hold the keys after all. It need not. Take
# the query (1, 2, 3). Its score with the key of h is
#
#     1 · 6 + 2 · 8 + 3 · 1 = 25
#
# Now multiply the query with the rows of the basis instead: (1 · 0.6 + 2 · 0.8,
# 3 · 1) = (2.2, 3). And take that with h's *code*, (10, 1):
#
#     2.2 · 10 + 3 · 1 = 25
#
# The same, since q · (c B) = (q Bᵀ) · c: the basis has moved from the keys to
# the query. The query has **absorbed** it, once, whatever the number of keys.
# The same works for values, from the other side: the weighted mean of values is
# the weighted mean of their codes, times the basis, once.
#
# ### Exercise 7.7 · `attend_latent` ★★★ (40 minutes)
#
# Write attention that never makes a key or a value. A layer's code is for all
# KV heads together, and the basis has for each direction the numbers of each
# head: `k_basis` is (R, G, D), and head g's key is `k_codes[s] @ k_basis[:,
# g]`. Values have codes and a basis of their own, of another rank W. Query head
# h reads KV head h // (H / G), so that the heads of a group absorb the same
# part of the basis. After that, all query heads look at the same codes: it is
# multi-query attention, with longer queries.
#
# Scores are divided by √D as ever. D is the length of the keys that would have
# been there: the scores are the same numbers as before. The mask and the
# softmax are given. Three paragraphs are missing: absorb, score, and the way
# back.

# %% exercise="attend_latent" given="1 4"
from lib.latent_kv_cache import attend_latent

# %%
check(attend_latent)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `grouped = (q / D**0.5).view(T, G, H // G, D)`: the group of KV head g is
# `grouped[:, g]`, (T, H/G, D). Its product with `k_basis[:, g]`, (R, D),
# transposed, gives numbers per direction, R. `torch.einsum` does it for all
# groups: name each dimension by a letter, and sum over the one that is missing
# behind the arrow.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.einsum("tgmd,rgd->tgmr", grouped, k_basis)`. Flatten g and m into H:
# `(T, H, R) @ k_codes.T` are the scores. On the way back, `weights @ v_codes`,
# split H into groups again, and `"tgmw,wgd->tgmd"` with `v_basis`.
#
# </details>

# %% [markdown]
# What does it save? A decode step over 480 tokens of the book, in layer 2: with
# plain keys and values, with codes of 32 numbers from which all keys and values
# are made, and on the codes.

# %%
half = latent_format(*book_seen, 32, 32)
bases = half.k_bases[2], half.v_bases[2]
k_codes, v_codes = (
    x.squeeze(1)
    for x in half.encode(2, book_seen[0][2][:480], book_seen[1][2][:480])
)
q = torch.randn(1, 6, 32, generator=seeded(0))


def make_keys():
    k, v = (
        torch.einsum("sr,rgd->sgd", codes, basis)[None]
        for codes, basis in zip((k_codes, v_codes), bases)
    )
    return kv_cache.attend_cached(
        q, k, v, torch.tensor([480]), torch.tensor([1])
    )


def on_codes():
    return latent_kv_cache.attend_latent(q, k_codes, v_codes, *bases)


def as_they_are():
    k, v = (seen[2][None, :480] for seen in book_seen)
    return kv_cache.attend_cached(
        q, k, v, torch.tensor([480]), torch.tensor([1])
    )


for way in (as_they_are, make_keys, on_codes):
    cost = meter.measure(way)
    print(f"{way.__name__:11}: {cost.flops.total():9,} FLOPs, "
          f"{cost.peak_bytes:7,} bytes at the peak")
print("largest difference:", f"{(make_keys() - on_codes()).abs().max():.0e}")
basis_bytes = half.k_bases.nbytes + half.v_bases.nbytes
print(f"the bases of all layers: {basis_bytes:,} bytes, once for all texts")

# %% [markdown]
# The same numbers, with a tenth of the work that making keys takes, and little
# more than plain attention does. (Codes of 64 numbers, as long as all heads
# together, would take twice as much: each query head compares all of a code.)
#
# `LatentFormat` has a basis for each layer, writes codes, and reads them by
# your function. `latent_format` makes one from recorded keys and values. How
# many numbers do keys need, how many values? In one of the two we keep all 64
# directions.

# %%
def both_ranks(k_rank, v_rank):
    """Quality of the book and of the notes, each in codes of its own."""
    return [
        measure_quality(
            lm, draws,
            make_cache=contiguous(latent_format(*seen, k_rank, v_rank)),
        )
        for lm, draws, seen in (
            (book_lm, book, book_seen), (notes_lm, notes, notes_seen)
        )
    ]


by_rank = {
    which: {
        rank: both_ranks(
            rank if which != "values" else 64, rank if which != "keys" else 64
        )
        for rank in (48, 32, 24, 16)
    }
    for which in ("keys", "values", "keys and values")
}

print("rank   " + "".join(f"{which:>22}" for which in by_rank))
print(f"  64   {book_plain.mean_nats:.3f} nats per byte, "
      f"{notes_plain.accuracy:.1%} of the notes")
for rank in (48, 32, 24, 16):
    cells = [
        f"{of_book.mean_nats:.3f}  {of_notes.accuracy:6.1%}"
        for of_book, of_notes in (by_rank[which][rank] for which in by_rank)
    ]
    print(f"{rank:4}   " + "".join(f"{cell:>22}" for cell in cells))

# %% [markdown]
# The two models disagree. In the notes values give way first: at rank 16 the
# keys have lost next to nothing, and values every tenth answer. In the book
# keys give way first, at rank 32. So there is no rank that is right for keys:
# measure what your model needs. (And do not expect losses to
# add up: keys of rank 16 are so wrong that coding the values too no longer
# hurts.)
#
# ### Why rotation has to stay outside
#
# Why do the keys of the book need so many directions? We look at them before
# they were rotated:

# %%
positions = torch.arange(256)
theta = book_lm.config.rope_theta
before = torch.stack([
    rotate(seen, -positions.repeat(16), theta) for seen in book_seen[0]
])
for name, seen in (("after", book_seen[0]), ("before", before)):
    ranks = [latent_kv_cache.rank_for(spectrum(x), 0.99) for x in seen]
    print(f"keys {name:6} rotation: ranks for 99%, by layer: {ranks} of 64")
    by_mean = [
        (x.mean(0) ** 2).sum() / (x**2).sum(dim=(1, 2)).mean() for x in seen
    ]
    print("  held by their mean:", " ".join(f"{x:.0%}" for x in by_mean))

# %% [markdown]
# RoPE turns any direction that keys use by another angle at every position, and
# so makes many directions of one. (From layer 1 on, most of what is there
# before rotation lies in a single direction, that of the mean, and about half
# of what is there after it. That makes the ranks before rotation look smaller
# still.) So we should code keys *before* they are rotated, and rotate what
# comes back. How good would that be?

# %%
def coded_before_rotation(rank):
    bases = [
        latent_kv_cache.factorize(x.flatten(1), rank)[1] for x in before
    ]

    def attend(layer, q, k, v):
        places = torch.arange(k.shape[-3])
        plain = rotate(k, -places, theta).flatten(-2)  # (B, T, G · D)
        back = (plain @ bases[layer].T @ bases[layer]).view_as(k)
        return attend_fused(layer, q, rotate(back, places, theta), v)

    found = measure_quality(book_lm, book, attend=attend)
    num_bytes = kv_heads.bytes_per_token(book_lm.config, ranks=(rank, 64))
    return replace(found, bytes_per_token=num_bytes)


coded_before = {rank: coded_before_rotation(rank) for rank in (48, 32, 24, 16)}
for rank, of_book in coded_before.items():
    after = by_rank["keys"][rank][0].mean_nats
    print(f"keys of rank {rank}: coded before rotation {of_book.mean_nats:.3f} "
          f"nats per byte, after it {after:.3f}")

# %% [markdown]
# Far better. But look at what attention has become. The score of a query with
# the key of a code c was q · (c B). Now a rotation R stands between them, q ·
# R(c B), and how far it turns depends on how far the two tokens are apart. The
# query has to absorb the rotation too, and there is one for each distance:

# %%
small_q = torch.randn(1, 1, 8, generator=seeded(0))
small_basis = torch.randn(3, 8, generator=seeded(1))
for distance in range(3):
    turned = rotate(small_q, torch.tensor([distance]), theta)[0, 0]
    print(f"distance {distance}: absorbed query {small_basis @ turned}")

# %% [markdown]
# As many absorbed queries as there are keys: that is no better than making the
# keys. (We could make them, tile by tile, and pay in FLOPs. That is a choice,
# and some do.) DeepSeek-V2 found a way around: **split the key in two**. A long
# part comes from the code and is never rotated; it says *what* a token is. A
# short part is rotated, is made from the token directly, and is shared by all
# heads as in multi-query attention; it says *where* the token is. A score is
# the sum of both:
#
# | | what (from the code) | where (rotated) |
# |---|---|---|
# | kept per token | a code of R numbers | one short key for all heads |
# | query | absorbs the basis, once | is rotated, once |
# | score | query's code · token's code | query · key |
#
# With random numbers, for six tokens and four heads:

# %%
T, H, R, D, D_rope = 6, 4, 8, 16, 4
codes = torch.randn(T, R, generator=seeded(0))
basis = torch.randn(R, H, D, generator=seeded(1))
q_what = torch.randn(H, D, generator=seeded(2))
k_where = rotate(
    torch.randn(T, 1, D_rope, generator=seeded(3)), torch.arange(T), theta
)
q_where = rotate(
    torch.randn(1, H, D_rope, generator=seeded(4)), torch.tensor([T - 1]), theta
)[0]

# with keys: each head's own long part, and the short one of all
k_what = torch.einsum("tr,rhd->thd", codes, basis)
k = torch.cat([k_what, k_where.expand(-1, H, -1)], dim=-1)
with_keys = torch.einsum("hd,thd->ht", torch.cat([q_what, q_where], -1), k)

# on codes: the long part of the query absorbs the basis, nothing is rotated
absorbed = torch.einsum("hd,rhd->hr", q_what, basis)
on_codes = absorbed @ codes.T + q_where @ k_where.squeeze(1).T
print(f"largest difference: {(with_keys - on_codes).abs().max():.0e}")
print(f"{R + D_rope} numbers per token; keys have {H * (D + D_rope)}")

# %% [markdown]
# In DeepSeek-V2 values come from the same code as well. A token keeps 512 + 64
# = 576 numbers per layer, for 128 heads of 128, which would be 32,768. That is
# as much as 2.25 KV heads of grouped-query attention. The model was trained
# that way from the beginning. In ours the position is in all of the key; such
# models have been converted by some more training (Ji and others, 2025).
#
# ## One plot
#
# What we have tried, by what it costs and what is lost. For the book we
# subtract what each draw of passages costs without any loss, so that the draws
# can be compared. One more is there for the notes: two KV heads *and* 4 bits,
# since the methods do not exclude each other.

# %% alt="Two plots over bytes per token, on a logarithmic axis. Book, nats lost: fewer bits lose little with the fewest bytes; keys in 2 bits lose most; codes lose more the shorter they are, those of keys most, unless they are made before rotation. Notes, share right: fewer bits and codes of keys stay high; one head, the shortest codes of values and of both, and lowest keys in 2 bits fall off."
bits = [(8, 8), (8, 4), (4, 4), (4, 2)]
two_and_4_bits = measure_quality(
    pooled[2], notes, make_cache=contiguous(QuantizedFormat(4))
)
one_head = Quality(
    nats=tuple(book_runs[-1][1:]),
    accuracies=(),
    bytes_per_token=kv_heads.bytes_per_token(book_one_head.config),
)
methods = {  # of the book, of the notes
    "as it is": ([book_plain], [notes_plain]),
    "fewer heads, trained on": ([one_head], list(trained_on.values())),
    "fewer bits": zip(*(by_bits[pair] for pair in bits)),
    "keys 2 bits, values 8": zip(by_bits[2, 8]),
    "codes of keys": zip(*by_rank["keys"].values()),
    "codes of values": zip(*by_rank["values"].values()),
    "codes of both": zip(*by_rank["keys and values"].values()),
    "two heads, 4 bits": ([], [two_and_4_bits]),
}
of_book, of_notes = zip(*(map(list, pair) for pair in methods.values()))
book_panel = dict(zip(methods, of_book)) | {
    "codes of keys before rotation": list(coded_before.values())
}


def nats_lost(quality):
    return [a - b for a, b in zip(quality.nats, book_plain.nats)]


four = by_bits[4, 4][0]
factor = book_plain.bytes_per_token / four.bytes_per_token
lost = four.mean_nats - book_plain.mean_nats
plotting.plot_quality(
    [
        ("book: nats per byte lost", "symlog", book_panel, nats_lost),
        (
            "notes: share right", "linear",
            dict(zip(methods, of_notes)), lambda quality: quality.accuracies,
        ),
    ],
    title=f"4 bits: {factor:.1f} times fewer bytes, {lost:.3f} nats lost",
);

# %% [markdown]
# *Left, lower is better (below 0.01 the axis is linear, above it logarithmic);
# right, higher is. A mark is the mean of three draws of texts, its line goes
# from the least to the most. On each line, from right to left: bits of keys and
# values 8 and 8, 8 and 4, 4 and 4, 4 and 2; codes of 48, 32, 24 and 16
# numbers.*
#
# Bits come first: 4 bits for each number cost nearly nothing and need no
# training. Keys of 2 bits with one scale per token are too coarse. Two heads
# cost some training, and then little; one head costs more, and for either the
# bits can be reduced as well. Codes, made after training, pay off only where a
# model leaves something to be saved: here in the values of the book and in the
# keys of the notes. All that is for two small models, and from 32 bits per
# number. Large models begin with 16, so that 4 bits and their scales are a
# factor of less than 4.

# %%
check.summary()

# %% [markdown]
# ## What is still wrong
#
# - Every token is still kept, also those that nobody will ever look at again.
#   In a text of notes, 104 tokens come before the first question, and 64 of
#   them are filler. Which ones could go?
# - Our caches keep rotated keys, with one scale per token. What we measured per
#   channel and before rotation, for bits and for ranks, they do not use.
# - Our codes were found after training. DeepSeek's model learned its own.
# - On the CPU all of this saves bytes, not time. A kernel would have to read
#   the bytes as they are.
#
# ## In five sentences
#
# 1. A token's bytes are heads times numbers times bits, and each of these can
#    be made smaller without the others.
# 2. Query heads that share a KV head make the cache smaller by the size of the
#    group; a model with many KV heads is pooled by their mean and trained on.
# 3. A number kept in few bits needs a scale and a zero point, which it shares
#    with others; for keys it matters with which: with those of its channel,
#    before rotation.
# 4. If keys and values are a product of codes and a basis, a query can absorb
#    the basis, and attention runs on the codes: multi-query attention with long
#    heads.
# 5. RoPE between code and query would have to be absorbed too, once per
#    distance; so what is rotated is kept apart, and small.
#
# ## Do you recall?
#
# 1. A model has 32 query heads and 4 KV heads of 64 numbers, and 24 layers. How
#    many bytes does a token take in 16 bits? And with 4 bits and scales?
# 2. Why are neighbouring KV heads pooled, and not the first with the third?
# 3. A vector has the numbers 0, 1, 2, 30. What do 2 bits make of it?
# 4. One number of a value is off by 0.1, and one number of a key is. Which of
#    the two can change all numbers of the output?
# 5. A layer has codes of 128 numbers for keys, and as many for values, and 8 KV
#    heads of 64. How many numbers per token does a decode step read with
#    absorbed queries? What is there besides if it makes the keys and values?
# 6. Why may DeepSeek-V2's long part not be rotated?
#
# <details><summary>Answers</summary>
#
# 1. 24 · 2 · 4 · 64 · 2 = 24,576. With 4 bits 24 · 2 · 4 · (32 + 4) = 6,912.
# 2. Query head h reads KV head h // (H / G). With fewer of them it reads the
#    one that its neighbours read, so that one should be their mean.
# 3. A scale of 10: the codes are 0, 0, 0, 3, so it comes back as 0, 0, 0, 30.
# 4. The key: it changes a score, and so the weights of all tokens. The value
#    moves one number of the output, by 0.1 times its weight.
# 5. 2 · 128 = 256. With keys and values made it reads these too, and then
#    writes and reads 2 · 8 · 64 = 1,024 more.
# 6. The query would have to absorb a rotation by the distance, another one for
#    each key.
#
# </details>
#
# ## Sources
#
# - Shazeer, *Fast Transformer Decoding: One Write-Head is All You Need*, 2019,
#   [1911.02150](https://arxiv.org/abs/1911.02150): multi-query attention.
# - Ainslie and others, *GQA*, 2023,
#   [2305.13245](https://arxiv.org/abs/2305.13245): groups; pooling (section
#   2.1), 5% of the steps, and Table 1.
# - Liu and others, *KIVI*, 2024,
#   [2402.02750](https://arxiv.org/abs/2402.02750): keys per channel, values per
#   token.
# - Hooper and others, *KVQuant*, 2024,
#   [2401.18079](https://arxiv.org/abs/2401.18079): keys per channel, before
#   rotation.
# - DeepSeek-AI, *DeepSeek-V2*, 2024,
#   [2405.04434](https://arxiv.org/abs/2405.04434): multi-head latent attention
#   (section 2.1), and how many numbers it keeps (its Table 1).
# - Ji and others, *MHA2MLA*, 2025,
#   [2502.14837](https://arxiv.org/abs/2502.14837): a trained model converted.
# - Arora and others, *Zoology*, 2023,
#   [2312.04927](https://arxiv.org/abs/2312.04927): why recall is a measure of
#   its own.
# - Llama Team, *The Llama 3 Herd of Models*, 2024,
#   [2407.21783](https://arxiv.org/abs/2407.21783).
