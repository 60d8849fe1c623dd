# %% [markdown]
# # 1. Generation: recompute everything
#
# A language model gives probabilities for *one* next token. To write a page it
# is asked again for every token, and each time it reads all of the text so far
# from the start. In this chapter we build that loop, read *Moby-Dick* with it,
# and measure what it costs: **each token costs more than the last**.
#
# **You need:** Python, tensors in torch (shapes, `@`, `softmax`), and 45
# minutes. No GPU.
#
# **You will be able to**
#
# - turn text into tokens and back, and not crash on half a character,
# - compute causal attention by hand, on six tokens,
# - turn logits into probabilities with temperature, top-k and top-p,
# - write the generation loop, and predict its FLOPs exactly,
# - say why attention need not store its scores, and measure what that saves.

# %%
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown

from lib import config, generate, meter, model, plotting, table, text
from lib.course import show_source

plotting.use_course_style()
torch.set_num_threads(1)  # a model this small is rarely faster on two

# %% [markdown]
# ## Every token costs more than the last
#
# The course comes with a small model that has read *Moby-Dick*: a decoder built
# like Llama, trained on one core of one processor. Here it is.

# %%
lm = model.load_model()
print(f"{sum(p.numel() for p in lm.parameters()):,} parameters")
lm.config

# %% [markdown]
# We give it the beginning of a sentence and ask for 200 more tokens. A token is
# one byte of text.

# %%
prompt = "The whale rose slowly from the"
prompt_ids = text.encode(prompt)
story_ids = generate.generate_recompute(
    lm,
    prompt_ids,
    200,
    temperature=0.7,
    top_p=0.95,
    generator=torch.Generator().manual_seed(1851),
)
print(text.decode(story_ids))

# %% [markdown]
# It has learned to spell, to punctuate, and to sound like Melville, and it has
# little idea what it is saying. For this course that is enough: whether the
# *machinery* is right can be seen to the last digit.
#
# Now the machinery's price. How long does the model take for **one** more
# token, when the text is 32 tokens long, 64, and so on up to 512? We take the
# median of 15 runs each.

# %%
book_ids = text.encode(text.load_book())


@torch.no_grad()
def one_step(num_tokens):
    token_ids = book_ids[:num_tokens]
    return lm(token_ids, torch.arange(num_tokens), model.attend_fused)

# %%
lengths = [32, 64, 128, 256, 512]
milliseconds = [
    1000 * meter.median_seconds(lambda: one_step(length), repeats=15)
    for length in lengths
]

# %%
ratio = milliseconds[-1] / milliseconds[0]
plotting.plot_measured(
    {"one step": (lengths, milliseconds)},
    xlabel="text so far (tokens)",
    ylabel="time for one more token (ms)",
    title=f"Token 512 takes {ratio:.0f} times as long as token 32",
);

# %% [markdown]
# *A line that rises with the length of the text: the time for one more token.*
#
# Your curve has your machine's numbers on it, but it rises on every machine.
# One more byte of text is one more byte of text, wherever it stands. Why should
# the 512th cost more than the 32nd? To answer that we need to know what the
# model does with the text, so we follow six tokens through it by hand.

# %% [markdown]
# ## A token is a byte
#
# Models read numbers. Large ones use a vocabulary of some hundred thousand
# pieces of words; ours has 256 entries, the values of a byte. Text becomes
# tokens by its UTF-8 encoding, and nothing needs to be trained for that.

# %%
token_ids = text.encode("whales")
token_ids

# %%
text.decode(token_ids)

# %% [markdown]
# One thing can go wrong. Not every character is one byte: Melville's dash is
# three. A model that writes bytes may stop in the middle.

# %%
dash = text.encode("—")
dash, text.decode(dash), text.decode(dash[:2])

# %% [markdown]
# `decode` puts the mark � where the bytes are no character. It must not crash:
# generation is a loop, and an error at step 400 would lose the other 399.

# %%
show_source(text.decode)

# %% [markdown]
# ## Attention, on six tokens by hand
#
# Inside the model each token becomes a vector. Most of the work treats every
# token alone: a matrix times the token's vector, the same matrix for all. One
# operation lets tokens see each other, and that is **attention**. Each token
# brings three vectors:
#
# - a **query**: what am I looking for?
# - a **key**: what can be found at me?
# - a **value**: what do I hand over if I am found?
#
# Here are six tokens with vectors of two numbers each, small enough to check by
# hand.

# %%
tokens = list("whales")
q = torch.tensor([[1, 0], [0, 1], [1, 1], [2, 0], [0, 2], [1, 2.0]])
k = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 2], [2, 1], [1, 0.0]])
v = torch.tensor([[1, 0], [0, 1], [2, 0], [0, 2], [3, 3], [1, 1.0]])

# %% [markdown]
# Take the third token, `a`. Its query is (1, 1). The **score** of a key is the
# dot product with the query, divided by √2, the root of the number of entries,
# which keeps scores from growing with the size of the vectors. Only tokens that
# are already there may be asked: `w`, `h` and `a` itself.

# %%
scores_of_a = torch.stack([q[2] @ k[s] for s in range(3)]) / math.sqrt(2)
scores_of_a

# %% [markdown]
# `softmax` turns scores into weights that sum to 1. The output for `a` is the
# values' average under these weights.

# %%
weights_of_a = scores_of_a.exp() / scores_of_a.exp().sum()
weights_of_a, weights_of_a @ v[:3]

# %% [markdown]
# All six at once are four lines. The mask sets the future's scores to -∞, so
# its weights become 0: a model that could see the next token while it learns to
# predict it would learn to copy.

# %%
scores = q @ k.T / math.sqrt(2)  # (6, 6)
t = torch.arange(6)
is_future = t > t[:, None]  # (6, 6): the key's column is after the query's row
weights = scores.masked_fill(is_future, -math.inf).softmax(dim=-1)

# %%
plotting.draw_attention(
    weights, tokens, title="Each token averages over itself and the past"
);

# %% [markdown]
# *A triangle of weights: row `a` has three numbers, those we computed by hand;
# the last row has six.*
#
# The library's `attend_causal` does this for any number of heads: H sets of
# queries, each with its own weights. (In our model 6 query heads share 2 heads
# of keys and values, three to one. Chapter 3 will be glad of that.) The letters
# in the comments are the same all through the course: T tokens, H query heads,
# G key/value heads, D numbers per head.

# %%
show_source(model.attend_causal)

# %%
out = model.attend_causal(0, q[:, None], k[:, None], v[:, None])  # one head
torch.allclose(out[:, 0], weights @ v)

# %% [markdown]
# ## What was computed once is computed again
#
# Look at the triangle once more. Row `a` uses `w`, `h`, `a` and nothing that
# comes later. So when a seventh token arrives, the first six rows stay as they
# are. That holds for the whole model, since every other operation treats
# tokens one by one. We check it on the real one: the logits for 100 tokens of
# the book, once read alone and once as the beginning of 101.

# %%
difference = one_step(101)[:100] - one_step(100)
print(f"largest difference: {difference.abs().max():.1e}")

# %% [markdown]
# None, or a trifle of rounding: a processor may add up a sum of another length
# in another order. Every step of generation computes these rows again, and gets
# what it had.
#
# Here is the picture for a prompt of 8 tokens and 16 new ones. Each row is a
# step of the loop, each square a token that goes through the model.

# %%
plotting.draw_recompute(prompt_len=8, num_new_tokens=16);

# %% [markdown]
# *A staircase, nearly all of it hatched: what is computed again. One solid
# square a row is new.*

# %% [markdown]
# ## From logits to a token
#
# The model's output is a row of 256 numbers for each token, the **logits**. The
# last row speaks about the next token. `softmax` makes probabilities of them.

# %%
logits = one_step(len(prompt_ids))[-1]  # of the book's first tokens
print(text.decode(book_ids[: len(prompt_ids)]))
plotting.plot_next_token(
    logits.softmax(dim=-1), title="The model's guesses for the next byte"
);

# %% [markdown]
# *Bars for the eight most probable next bytes.*
#
# How to choose? Always taking the largest (**greedy**) tends to go round in
# circles. Drawing from all 256 now and then draws nonsense: each unlikely byte
# is unlikely, but there are many of them. Three settings lie between:
#
# - **temperature**: divide the logits first. Below 1 the likely become
#   likelier; 0 stands for greedy.
# - **top-k**: keep the k most probable.
# - **top-p**: keep the fewest that together reach probability p.

# %%
show_source(generate.next_token_probs)

# %% [markdown]
# What the three settings leave of the same logits:

# %%
settings = [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}]
for setting in settings:
    probs = generate.next_token_probs(logits, **setting)
    name = ", ".join(f"{k}={v}" for k, v in setting.items()) or "as they are"
    print(f"{name:16} {int((probs > 0).sum()):3} bytes left, ", end="")
    print(f"the most probable has {probs.max():.2f}")

# %% [markdown]
# And what they do to the text. Greedy first, then the model's own
# probabilities, then what we used above.

# %%
for setting in [{"temperature": 0}, {}, {"temperature": 0.7, "top_p": 0.95}]:
    sample_ids = generate.generate_recompute(
        lm,
        prompt_ids,
        120,
        generator=torch.Generator().manual_seed(0),
        **setting,
    )
    print(setting, "\n   ", repr(text.decode(sample_ids)), "\n")

# %% [markdown]
# ## The loop
#
# Everything is in place: encode, then for each new token one call of the model
# with all of the text, one draw, one token appended.

# %%
show_source(generate.generate_recompute)

# %% [markdown]
# `attend` is a parameter: where keys and values live, and how attention reads
# them, is not the model's business. Today there are two ways to attend. Both
# compute the same function, so they must write the same text. We compare them
# in double precision, where rounding cannot tip a choice.

# %%
double_lm = model.load_model().double()
stories = [
    generate.generate_recompute(
        double_lm, prompt_ids, 60, temperature=0, attend=attend
    )
    for attend in (model.attend_causal, model.attend_fused)
]
torch.equal(*stories)

# %% [markdown]
# ## Predict the work, then measure it
#
# A **FLOP** is one addition or multiplication. A product of an (m × k) and a
# (k × n) matrix takes 2·m·k·n of them. With T tokens in the text, a step makes
#
# - for **attention**, in each layer and head: T·T scores of D products each,
#   then T·T weights times D values: 4·T²·D;
# - for the **projections**, the matrices that each token meets alone: 2 for
#   each weight and token.
#
# To write N tokens, sum over T = 1 … N. The sum of T² grows like N³, and the
# sum of T like N².

# %%
show_source(generate.attention_flops)

# %% [markdown]
# That is a prediction. The **meter** counts what really happens: `measure` runs
# a function and sees every operation torch performs on the way.

# %%
first_id = book_ids[:1]
cost = meter.measure(lambda: generate.generate_recompute(lm, first_id, 64))
predictions = {
    "attention": generate.attention_flops(lm.config, 1, 64),
    "projection": generate.projection_flops(lm.config, 1, 64),
}
for kind, predicted in predictions.items():
    print(f"{kind:10} {cost.flops[kind]:13,} FLOPs, predicted {predicted:13,}")

# %% [markdown]
# Equal to the last digit. Now for several lengths, attention alone:

# %%
Ns = [32, 64, 128, 256]
costs = [
    meter.measure(lambda: generate.generate_recompute(lm, first_id, N))
    for N in Ns
]
measured = [cost.flops["attention"] for cost in costs]
predicted = [generate.attention_flops(lm.config, 1, N) for N in Ns]
measured == predicted

# %%
plotting.plot_measured(
    {"measured": (Ns, measured)},
    predicted={"": (Ns, predicted)},
    xlabel="tokens generated, N",
    ylabel="FLOPs in attention",
    title="The attention of a whole text grows like N³",
    log=True,
);

# %% [markdown]
# *Measured points on a dashed line of predictions, both axes doubling: N³.*
#
# Twice the text should cost 2³ = 8 times as much. It does, nearly: the sum of
# T² is N³/3 + N²/2 + N/6, and the smaller terms still show at 128.

# %% [markdown]
# ## An honest look: the cube is not there at first
#
# N³ is the attention alone. In a model like ours the projections cost far more,
# for any text that fits into it:

# %%
for N in [32, 512, 4096]:
    attention = generate.attention_flops(lm.config, 1, N)
    share = attention / (attention + generate.projection_flops(lm.config, 1, N))
    print(f"N = {N:4}: {share:6.1%} of the work is attention (predicted)")

# %% [markdown]
# So the slope of the *total* starts at 2 and bends towards 3. In a narrow model
# the bend comes early enough to be measured.

# %%
narrow = config.ModelConfig(
    vocab_size=256, num_layers=2, num_heads=2, num_kv_heads=1,
    d_model=16, d_ff=48, max_seq_len=1024,
)
narrow_lm = model.Transformer(narrow).eval()


def predicted_total(shape, N):
    attention = generate.attention_flops(shape, 1, N)
    return attention + generate.projection_flops(shape, 1, N)

# %%
Ns = [16, 32, 64, 128, 256, 512]
totals = [
    meter.measure(
        lambda: generate.generate_recompute(narrow_lm, first_id, N)
    ).flops.total()
    for N in Ns
]
totals == [predicted_total(narrow, N) for N in Ns]

# %%
far = [16 * 2**i for i in range(9)]  # to 4096: too slow to run, easy to predict
plotting.plot_measured(
    {"narrow model, measured": (Ns, totals)},
    predicted={
        name: (far, [predicted_total(shape, N) for N in far])
        for name, shape in {"narrow": narrow, "ours": lm.config}.items()
    },
    xlabel="tokens generated, N",
    ylabel="FLOPs in all",
    title="The slope begins at 2, where projections dominate, and bends to 3",
    log=True,
);

# %%
def slope(shape, N):
    return math.log2(predicted_total(shape, 2 * N) / predicted_total(shape, N))


for N in [16, 256, 4096]:
    print(f"N = {N:4}: slope {slope(narrow, N):.2f} (narrow), ", end="")
    print(f"{slope(lm.config, N):.2f} (ours)")

# %% [markdown]
# *Two dashed predictions that steepen, and measured points on the lower one.*
#
# Whoever tells you that generation "is cubic" should tell you from what length
# on. What does hold at every length: each step does the work of all steps
# before it again.

# %% [markdown]
# ## Scores need not be stored
#
# Work is one price, memory the other. `attend_causal` holds a score for each
# pair of tokens in each head, at 4 bytes. While it masks them there are two
# such tensors: 8·H·T² bytes. Let us see what a step needs at its peak.

# %%
@torch.no_grad()
def peak_bytes(num_tokens, attend):
    token_ids, positions = book_ids[:num_tokens], torch.arange(num_tokens)
    return meter.measure(lambda: lm(token_ids, positions, attend)).peak_bytes


stored = [peak_bytes(T, model.attend_causal) for T in lengths]
fused = [peak_bytes(T, model.attend_fused) for T in lengths]

# %%
plotting.plot_measured(
    {"scores stored": (lengths, stored), "fused": (lengths, fused)},
    predicted={
        "8·H·T²": (lengths, [8 * lm.config.num_heads * T**2 for T in lengths])
    },
    xlabel="text so far, T (tokens)",
    ylabel="peak memory of one step (bytes)",
    title=f"Storing scores takes {stored[-1] / fused[-1]:.1f} times the memory",
    log=True,
);

# %% [markdown]
# *Stored scores climb towards the dashed 8·H·T², four times as much for twice
# the text; fused attention doubles.*
#
# `attend_fused` computes the same function, by a kernel of torch that works
# through the keys tile by tile, keeps a running maximum and a running sum, and
# never has all scores at once. Its memory grows with T. How that is possible is
# the subject of chapter 5, where we write such a kernel ourselves.

# %%
for T, a, b in zip(lengths, stored, fused):
    print(f"T = {T:3}: {a / 1e6:6.2f} MB stored, {b / 1e6:5.2f} MB fused")

# %% [markdown]
# ## The first column of the table
#
# Each chapter adds a column to one table: how do memory and work grow with the
# tokens N and the layers L? Theory says, for generating by recompute: memory N
# (one step's, then it is free again), attention N³·L, projections N²·L, and N
# calls of the model. `table.sweep` measures small random models at three
# lengths and three depths, and `table.fit` reads off the exponents.

# %%
sweep = table.sweep("recompute")
cells = table.fit(sweep)
Markdown(table.render(cells))

# %%
growth = {}
for quantity in ["peak memory", "projection FLOPs", "attention FLOPs"]:
    Ns, values = sweep.along("N", quantity)
    growth[quantity] = Ns, [value / values[0] for value in values]
plotting.plot_measured(
    growth,
    xlabel="tokens generated, N",
    ylabel=f"times as much as at N = {Ns[0]}",
    title="Recompute: memory grows like N, attention like N³",
    log=True,
);

# %% [markdown]
# *Three lines from one point, with slopes 1, 2 and 3.*
#
# The same table for all columns: `make table`, in a terminal.

# %% [markdown]
# ## What is still wrong
#
# To write N tokens the model ran this many through itself, for a text of 512:

# %%
N = 512
run = sum(range(1, N + 1))
print(f"{run:,} tokens computed to write {N}: {run / N:.1f} times each")

# %% [markdown]
# The rows of attention's triangle never change once they are computed, and what
# the next row needs of the tokens before it are their keys and values. They
# were there. We threw them away. Chapter 3 keeps them. First, chapter 2 looks
# at the opposite case, training, where *everything* is kept, and asks what
# happens if we throw some of it away on purpose.
#
# ## In five sentences
#
# 1. A language model gives probabilities for one next token; text comes from a
#    loop around it.
# 2. In causal attention a token sees itself and the past, so what was computed
#    for a token never changes when more text arrives.
# 3. Generating by recompute ignores that: step T runs all T tokens through the
#    model again.
# 4. For N tokens that is N² in the projections and N³ in attention; which of
#    the two you feel depends on the width of the model and the length of the
#    text.
# 5. Scores, one for each pair of tokens, can be stored, at T² memory, or used
#    up tile by tile, at T.
#
# ## Do you recall?
#
# 1. Why must `decode` accept bytes that are no text?
# 2. Which row of logits speaks about the next token, and what do the others
#    speak about?
# 3. What does top-p keep if the most probable token alone has probability 0.9
#    and p is 0.5?
# 4. You double the length of a text. By what does attention's part of one step
#    grow? Its part of the whole generation?
# 5. The model has 10 more layers. Which rows of the table change, and how?
#
# <details><summary>Answers</summary>
#
# 1. A character may take several bytes, and the loop may stop between them.
# 2. The last row. Row t speaks about token t + 1, which is there already:
#    useful in training, thrown away in generation.
# 3. That one token: the fewest that reach p, and never none.
# 4. By 4, and by nearly 8.
# 5. Both FLOP rows and the block calls grow in proportion. Peak memory stays: a
#    layer's activations are free again when the next one runs.
#
# </details>
#
# ## Sources
#
# - Vaswani and others, *Attention Is All You Need*, 2017,
#   [1706.03762](https://arxiv.org/abs/1706.03762): attention, section 3.2.1.
# - Touvron and others, *LLaMA*, 2023,
#   [2302.13971](https://arxiv.org/abs/2302.13971): the shape of our model.
# - Holtzman and others, *The Curious Case of Neural Text Degeneration*, 2019,
#   [1904.09751](https://arxiv.org/abs/1904.09751): why greedy text repeats
#   itself, and top-p.
# - Rabe and Staats, *Self-attention Does Not Need O(n²) Memory*, 2021,
#   [2112.05682](https://arxiv.org/abs/2112.05682), and Dao and others,
#   *FlashAttention*, 2022,
#   [2205.14135](https://arxiv.org/abs/2205.14135): fused attention.
