# %% [markdown]
# # 1. Generation: recompute everything
#
# A language model does one thing: given a text, it says how probable each
# possible next token is. To write a page it is asked again for every token, and
# each time it reads all of the text so far from the start. In this chapter we
# build that loop, write in the manner of *Moby-Dick* with it, and measure what
# it costs: **each token costs more than the one before**.
#
# **You need:** Python, tensors in torch (shapes, `@`, `softmax`), and 110
# minutes. No GPU.
#
# **You will be able to**
#
# - turn text into tokens and back, and not crash on half a character,
# - compute causal attention by hand, and in a dozen lines,
# - read a Llama-style model of thirty lines, and name its parts,
# - turn logits into probabilities with temperature, top-k and top-p,
# - write the generation loop, and predict its FLOPs exactly,
# - say why attention need not store its scores, and measure what that saves.
#
# **How it works.** Five cells ask you to write a function. Below each of them
# stands `check(...)`, which tells you in one line what is wrong. Once it says
# *passed*, your function takes the library's place, and the rest of the page
# runs on your code. If you skip one, the page runs on the library's, which it
# always calls through its module, as in `text.decode(...)`. (If somebody grades
# your notebook: an answer takes along the imports, helpers and tables of this
# notebook that it needs. It cannot take a file beside it, or other processes.)

# %%
import math

import torch
import torch.nn.functional as F
from IPython.display import Markdown

from lib import config, generate, model, sampling, text
from lib.config import ModelConfig
from lib.course.check import check
from lib.figures import drawing, plotting
from lib.generate import check_generation
from lib.measure import meter, table
from lib.model import Attend, Transformer, attend_fused
from lib.sampling import check_sampling, subtract_largest

plotting.use_course_style()
torch.set_num_threads(1)  # steadier timings

# %% [markdown]
# ## Every token costs more than the last
#
# The course comes with a small language model that has read *Moby-Dick*. Its
# weights are 1.67 million numbers, and it takes texts of up to 512 tokens. How
# it is built comes further down; at first we only use it.

# %%
lm = model.load_model()
print(f"{sum(p.numel() for p in lm.parameters()):,} parameters")

# %% [markdown]
# We give it the beginning of a sentence, the **prompt**, and ask for 200 more
# tokens. A token is one byte of text here.

# %%
prompt = "The whale rose slowly from the"
prompt_ids = text.encode(prompt)
dice = torch.Generator().manual_seed(1851)
story_ids = generate.generate_recompute(
    lm, prompt_ids, 200, temperature=0.7, top_p=0.95, generator=dice
)
print(text.decode(story_ids))

# %% [markdown]
# It sounds a little like Melville, and it has little idea what it is saying.
#
# Now for the price. How long does **one** more token take when the text is 32
# tokens long, or 64, and so on up to 512? A call of the model takes three
# things: the tokens, their positions in the text, and a way to attend, which is
# explained below.

# %%
book_ids = text.encode(text.load_book())


@torch.no_grad()
def one_step(num_tokens):
    token_ids = book_ids[:num_tokens]
    return lm(token_ids, torch.arange(num_tokens), attend_fused)


# %%
lengths = [32, 64, 128, 256, 512]
milliseconds = [
    1000 * meter.median_seconds(lambda: one_step(length), repeats=15)
    for length in lengths
]

# %% alt="A line over the length of the text so far, from 32 to 512 tokens: the time for one more token, in milliseconds. It is several times as long at the end as at the beginning."
ratio = milliseconds[-1] / milliseconds[0]
plotting.plot_measured(
    {"": (lengths, milliseconds)},
    xlabel="text so far (tokens)",
    ylabel="time for one more token (ms)",
    title=f"A step on 512 tokens takes {ratio:.0f} times as long as on 32",
);

# %% [markdown]
# *The longer the text, the longer the next token takes.* What does twice the
# text cost?

# %%
for i in range(1, 5):
    times = milliseconds[i] / milliseconds[i - 1]
    print(f"{lengths[i - 1]:3} to {lengths[i]} tokens: ", end="")
    print(f"{times:.2f} times as long")

# %% [markdown]
# These numbers are your machine's. On a short text, twice the tokens take less
# than twice the time: every call has a price of its own, whatever the length.
# The longer the text, the less that price counts.
#
# But why should a step depend on the length at all? We ask for one new byte,
# after 512 as after 32. To find out we follow six tokens through the model by
# hand.

# %% [markdown]
# ## A token is a byte
#
# Models compute with numbers, so text has to become numbers first. The pieces
# it is cut into are its **tokens**, and the list of all possible pieces is the
# **vocabulary**. Ours has 256 entries, the values of a byte: text becomes
# tokens by its UTF-8 encoding, and nothing has to be trained for that.

# %%
text.encode("whales")

# %% [markdown]
# Large models use a vocabulary of tens or hundreds of thousands of pieces of
# words, found by a **tokenizer** that was trained on much text. Then a token
# stands for about four letters of English, and a text has a quarter of the
# tokens. What that saves is time and memory that grow with the number of
# tokens, T, and T is the subject of this course. What it costs is memory that
# grows with the size of the vocabulary, V: two matrices have one row for each
# entry. For Llama 3 8B that is

# %%
llama = config.LLAMA3_8B
with torch.device("meta"):  # shapes without memory
    num_weights = sum(p.numel() for p in Transformer(llama).parameters())
of_vocabulary = 2 * llama.vocab_size * llama.d_model
print(f"V = {llama.vocab_size:,}: {of_vocabulary * 2 / 1e9:.1f} GB ", end="")
print(f"of its {num_weights * 2 / 1e9:.1f} GB of weights, at 2 bytes each")

# %% [markdown]
# With bytes one thing can go wrong on the way back. Not every character is one
# byte: Melville's dash is three. A model that writes bytes may stop in the
# middle of a character, or write bytes that are no text at all.

# %%
dash = text.encode("—")
dash

# %% [markdown]
# ### Exercise 1.1 · `decode` ★ (5 minutes)
#
# Turn token ids back into text. Bytes that form no character become the mark �
# (U+FFFD), as Python's own decoder does it: a broken byte must not hide the
# rest. An id that is no byte, 0 to 255, is a ValueError. The lines that refuse
# a batch are given.

# %% exercise="decode" given="1"
from lib.text import decode

# %%
check(decode)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `bytes(...)` takes a list of numbers from 0 to 255, and `tensor.tolist()`
# gives one.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `bytes.decode` has a parameter that says what to do with errors:
# `"…".encode()[:2].decode("utf-8", errors=...)`.
#
# </details>

# %%
text.decode(dash), text.decode(dash[:2]), text.decode(text.encode("whales"))

# %% [markdown]
# ## Attention, on six tokens by hand
#
# Inside the model each token becomes a **vector**, a list of numbers. Most of
# the work treats every token alone: a matrix times its vector, the same matrix
# for all tokens. One operation lets tokens see each other, and that is
# **attention**. Each token makes three vectors from its own, with three learned
# matrices:
#
# - a **query**: what am I looking for?
# - a **key**: what do I offer to those who look?
# - a **value**: what do I hand over if I am found?
#
# Here are six tokens whose queries, keys and values have two numbers each,
# small enough to check by hand.

# %%
tokens = list("whales")
q = torch.tensor([[1, 0], [0, 1], [1, 1], [2, 0], [0, 2], [1, 2.0]])
k = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 2], [2, 1], [1, 0.0]])
v = torch.tensor([[1, 0], [0, 1], [2, 0], [0, 2], [3, 3], [1, 1.0]])

# %% [markdown]
# Take the third token, `a`. Its query is (1, 1). The **score** of a key is its
# dot product with the query, divided by √2. (2 is the number of entries. If we
# did not divide, longer vectors would have larger scores.) A token may only ask
# those that are already there, here `w`, `h` and `a` itself.

# %%
scores_of_a = torch.stack([q[2] @ k[s] for s in range(3)]) / math.sqrt(2)
scores_of_a

# %% [markdown]
# `softmax` turns scores into weights that sum to 1: it raises e to the power of
# each score, and divides by the sum. The output for `a` is the average of the
# values under these weights.

# %%
weights_of_a = scores_of_a.exp() / scores_of_a.exp().sum()
weights_of_a, weights_of_a @ v[:3]

# %% [markdown]
# All six tokens at once take four lines. The **causal mask** sets the scores of
# the future to -∞, so that their weights become 0. A model that could see the
# next token while it learns to predict it would learn to copy.

# %%
scores = q @ k.T / math.sqrt(2)  # (6, 6)
t = torch.arange(6)
is_future = t > t[:, None]  # (6, 6): the key's column after the query's row
weights = scores.masked_fill(is_future, -math.inf).softmax(dim=-1)

# %% alt="A table of weights: the query tokens w, h, a, l, e, s downwards, the key tokens w, h, a, l, e, s to the right. There are weights on the diagonal and in the triangle below it; row a has 0.25, 0.25 and 0.50. All cells above the diagonal, the future, are hatched."
drawing.draw_attention(
    weights, tokens, title="Each token averages over itself and the past"
);

# %% [markdown]
# *Row `a` has the three weights that we computed by hand, and no weight on what
# comes after it.* Try row `l` yourself: its query is (2, 0).
#
# A token may look for several things at a time, say for the verb and for the
# last name. So attention runs several times side by side. Each run is a
# **head**: it has matrices of its own. In our model every token has a vector of
# C = 192 numbers and H = 6 query heads, and each head makes a query of D = 32
# numbers; 6 · 32 = 192. To save memory there are only G = 2 heads of keys and
# values: query heads 0 to 2 read the first of them, and 3 to 5 the second. This
# is called **grouped-query attention**.
#
# ### Exercise 1.2 · `attend_causal` ★★ (15 minutes)
#
# Write attention for any number of heads. The code that gives every query head
# its keys and values is there already. The letters in the comments hold all
# through the course: T tokens, H query heads, G key/value heads, D numbers per
# head; `...` stands for any dimensions in front. `layer` says which layer is
# asking: not needed here, chapter 3 uses it. Torch's own attention is not
# allowed, and neither is a tensor of T × T × D numbers. (The library divides
# the queries by √D before it multiplies, so that large scores do not overflow
# in half precision. Here either order will do, and nobody has to subtract the
# largest score before `exp`.)

# %% exercise="attend_causal" given="1"
from lib.model import attend_causal

# %%
check(attend_causal)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# With tokens and heads exchanged, `k.transpose(-2, -1)` is (..., H, D, T), and
# `@` makes all scores, (..., H, T, T), in one product. Then come the four lines
# from above.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The result of weights `@ v` is (..., H, T, D). The caller wants tokens before
# heads: `transpose(-3, -2)`.
#
# </details>

# %%
out = model.attend_causal(0, q[:, None], k[:, None], v[:, None])  # one head
torch.allclose(out[:, 0], weights @ v)

# %% [markdown]
# ## The model, in thirty lines
#
# Attention is the heart; here is the rest. We write the model out once, with
# the weights of `lm`, and see that it computes the same.
#
# A token's id picks its row of the **embedding**, a matrix of V rows. That is
# the token's vector, C numbers. From then on nothing replaces it: every part of
# the model reads it, computes something, and *adds* that to it. The sum that
# runs through the model is called the **residual stream**. Since parts keep
# adding, each one first scales what it reads to a common size. Llama does this
# by **RMSNorm**: divide by the root of the mean square, and multiply each entry
# by a learned number, its gain.

# %%
def rms_norm(x, norm):  # x (T, C)
    mean_square = x.square().mean(dim=-1, keepdim=True)  # (T, 1)
    return x / (mean_square + norm.eps).sqrt() * norm.weight


# %% [markdown]
# Among the tokens that it may see, attention as we wrote it knows no order: it
# would give `whales` and `hwales` the same average in row `l`. So queries and
# keys are rotated before they meet, by an angle that grows with the position.
# What a query and a key then say to each other depends on how far apart they
# are. This is **RoPE**, rotary position embedding. The numbers of a head form
# pairs, the first half with the second, and each pair turns at a speed of its
# own.

# %%
def rope(x, positions, theta=10_000):  # x (T, heads, D), positions (T,)
    D = x.shape[-1]
    speeds = 1 / theta ** (torch.arange(0, D, 2) / D)  # (D/2,)
    angles = positions[:, None, None] * speeds  # (T, 1, D/2)
    cos, sin = angles.cos(), angles.sin()
    a, b = x.chunk(2, dim=-1)  # (T, heads, D/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


# %% [markdown]
# Around `attend` stand four **projections**, matrices that each token meets
# alone: three make queries, keys and values of the residual stream, and the
# last one, o, mixes what the heads found and brings it back to C numbers.

# %%
def attention(x, positions, attend, part):  # x (T, C)
    q = part.q_proj(x).view(len(x), 6, 32)  # (T, H, D)
    k = part.k_proj(x).view(len(x), 2, 32)  # (T, G, D)
    v = part.v_proj(x).view(len(x), 2, 32)  # (T, G, D)
    q, k = rope(q, positions), rope(k, positions)
    out = attend(part.layer, q, k, v)  # (T, H, D)
    return part.o_proj(out.flatten(1))  # (T, C)


# %% [markdown]
# The other part is the **MLP**. It widens each token's vector to F = 512
# numbers twice, as a *gate* and as *up*, multiplies the two entry by entry, and
# narrows the product back, *down*. The gate goes through
# `silu(x) = x · sigmoid(x)` first, which is near 0 for negative numbers, so it
# decides which of the 512 entries get through. This kind of MLP is called
# **SwiGLU**.
#
# A **block**, or layer, makes two additions to the residual stream, attention's
# and then the MLP's. Ours has L = 4 of them. After the last one, one more norm
# and one more matrix turn each vector into V = 256 numbers, the **logits**: one
# for each possible next token, the larger the more probable. A model built like
# this is called a **decoder**.

# %%
def mlp(x, part):
    gate, up = part.gate_proj(x), part.up_proj(x)  # (T, F) each
    return part.down_proj(F.silu(gate) * up)  # (T, C)


@torch.no_grad()
def forward(token_ids, positions, attend):
    x = lm.embed.weight[token_ids]  # (T, C)
    for block in lm.blocks:
        normed = rms_norm(x, block.attention_norm)
        x = x + attention(normed, positions, attend, block.attention)
        x = x + mlp(rms_norm(x, block.mlp_norm), block.mlp)
    norm, matrix = lm.unembed
    return rms_norm(x, norm) @ matrix.weight.T  # (T, V)


# %%
ours = forward(book_ids[:100], torch.arange(100), model.attend_causal)
largest = (ours - one_step(100)).abs().max()
print(f"logits {tuple(ours.shape)}, largest difference to lm: {largest:.1e}")

# %% [markdown]
# The same, up to rounding. `lib/model.py` has the model as torch writes it, for
# any sizes, and no later chapter changes it. This works because `attend` is a
# parameter: where keys and values live, and how attention reads them, is not
# the model's business. Later chapters bring others. Today there are two, yours
# and torch's **fused** one, which comes up again below.
#
# ## What was computed once is computed again
#
# Look at the triangle once more. Row `a` uses `w`, `h`, `a` and nothing that
# comes later. So when a seventh token arrives, the first six rows stay as they
# are. All else in the model treats each token alone, so whatever is computed
# from these rows stays as it is too, in every layer. We check it: the logits
# for 100 tokens of the book, once when they are all there is, and once as the
# beginning of 101.

# %%
difference = one_step(101)[:100] - one_step(100)
print(f"largest difference: {difference.abs().max():.1e}")

# %% [markdown]
# There is none, or a trifle of rounding: a processor may add up a longer sum in
# another order. Each step of generation computes these rows again, and gets
# what it had.
#
# Here is the picture for a prompt of 8 tokens and 16 new ones. A row is one
# step of the loop, and a square is one token that goes through the model. (The
# last token has no square: nobody asks what follows it.)

# %% alt="A grid: steps 1 to 16 downwards, positions 0 to 22 of the text to the right. Step 1 computes the 8 tokens of the prompt for the first time. Each row below is one square longer: its last square is new, and all others are hatched, computed again; in all 225 of 248."
drawing.draw_generation(prompt_len=8, num_new_tokens=16);

# %% [markdown]
# *After the first step, one square per row is new. All others are hatched: they
# were computed before.*

# %% [markdown]
# ## From logits to a token
#
# Row t of the logits (we count from 0) speaks about token t + 1. In training,
# where the next token is known, all rows but the last are useful. In generation
# only the last one is, for it speaks about the token that is not there yet.
# `softmax` turns it into probabilities.

# %% alt="Bars, the probabilities of the next byte. The eight most probable bytes stand in order, longest bar first: t, a, i, w, h, o, f, s. A ninth bar, hatched, is for the other 248 bytes together; it is nearly as long as the first."
logits = one_step(30)[-1]
print(text.decode(book_ids[:30]))
plotting.plot_next_token(
    logits.softmax(dim=-1), title="The model's guesses for the next byte"
);

# %% [markdown]
# *The eight most probable bytes, and all others together.*
#
# How do we choose? Taking the largest every time is called **greedy**, and
# tends to go round in circles. Drawing from all 256 now and then draws
# nonsense: each unlikely byte is unlikely, but there are many of them. Three
# settings lie between:
#
# - **temperature**: divide the logits by it first. Below 1 the likely become
#   likelier; 0 stands for greedy.
# - **top-k**: keep the k most probable (all, if there are fewer than k).
# - **top-p**: keep the fewest that together reach probability p, and at least
#   one. This is also called nucleus sampling.
#
# Of equal logits the one with the smaller id goes first, so that top-k keeps
# exactly k.
#
# ### Exercise 1.3 · `next_token_probs` ★★ (15 minutes)
#
# Turn logits into probabilities, in that order. Any number of rows may come at
# once. Given are a check of the settings and a shift: the largest logit of each
# row becomes 0, which changes no probability and keeps `exp` from overflowing.
# The draw itself, `sample`, is in the library.

# %% exercise="next_token_probs" given="1"
from lib.sampling import next_token_probs

# %%
check(next_token_probs)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Sort the logits from largest to smallest (`stable=True` leaves equal ones in
# their order), cut, then put the probabilities back where they belong:
# `torch.zeros_like(logits).scatter(-1, token_ids, probs)`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# With `probs` sorted, `probs.cumsum(-1)` shifted by one place is what the more
# probable tokens have together: `F.pad(sums[..., :-1], (1, 0))`. A token is
# left out if that is already `top_p` or more. At `top_p` = 1 leave out nothing:
# a rounded sum may reach 1 too early.
#
# </details>

# %% [markdown]
# What the settings leave of the logits above:

# %%
settings = [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}]
for setting in settings:
    probs = sampling.next_token_probs(logits, **setting)
    name = ", ".join(f"{k}={v}" for k, v in setting.items()) or "as they are"
    print(f"{name:16} {int((probs > 0).sum()):3} bytes left, ", end="")
    print(f"the most probable has {probs.max():.2f}")

# %% [markdown]
# ## The loop
#
# ### Exercise 1.4 · `generate_recompute` ★★ (15 minutes)
#
# For each new token: call `model(token_ids, positions, attend)` with all of the
# text, at positions 0, 1, 2, …; take the last row of its logits; turn it into
# probabilities by `sampling.next_token_probs`, with the three settings; draw by
# `sampling.sample(probs, generator)`, which gives one id for each row of
# probabilities; append it to the text. That is one call of the model per token,
# and nothing is kept for a backward pass. The lines that check the input are
# given.

# %% exercise="generate_recompute" given="1"
from lib.generate import generate_recompute

# %%
check(generate_recompute)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The logits are (..., T, V). `logits[..., -1, :]` is their last row, whether
# there is one prompt or a batch of them.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.cat([token_ids, next_ids.unsqueeze(-1)], dim=-1)` appends.
#
# </details>

# %% [markdown]
# The same prompt, four ways:

# %%
nucleus = {"temperature": 0.7, "top_p": 0.95}
for setting in [{"temperature": 0}, {}, {"top_k": 5}, nucleus]:
    dice = torch.Generator().manual_seed(0)
    sample_ids = generate.generate_recompute(
        lm, prompt_ids, 100, generator=dice, **setting
    )
    print(setting, "\n   ", repr(text.decode(sample_ids)), "\n")

# %% [markdown]
# Your `attend_causal` and torch's fused attention compute the same function, so
# with either of them the model has to write the same text. We compare in double
# precision, where rounding is very unlikely to tip a choice.

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
# ## A text ends when the model says so
#
# We asked for a number of tokens and got it. In use it is the other way round:
# somebody asks a question, and the answer ends where the model ends it. Models
# that answer are trained to write a **stop token** there, and the loop stops
# when it is drawn. Ours has learned none, so we take one that the book is full
# of, the full stop, and write a few sentences. Recompute keeps nothing between
# its steps, so asking for one token at a time costs the same as asking for all.

# %%
def write_until(stop, most, seed):
    ids, dice = prompt_ids, torch.Generator().manual_seed(seed)
    while len(ids) < len(prompt_ids) + most:
        ids = generate.generate_recompute(
            lm, ids, 1, temperature=0.8, top_p=0.95, generator=dice
        )
        if ids[-1] == stop:
            break
    return ids


sentences = [write_until(ord("."), most=200, seed=seed) for seed in range(6)]
print("new tokens:", [len(ids) - len(prompt_ids) for ids in sentences])
print(text.decode(min(sentences, key=len)))

# %% [markdown]
# One prompt, one model, and lengths that nobody could have told beforehand.
# (200 is where we lose patience.) Here that is only a curiosity. In chapters 3
# and 4 it decides how much memory must be set aside for a text that is still
# being written.
#
# ## Predict the work, then measure it
#
# The product of an (m × r) and an (r × n) matrix has m·n sums of r products,
# and by convention it counts as 2·m·r·n **FLOPs**, floating-point operations:
# one multiplication and one addition for each of m·r·n pairs. Only matrix
# products are counted. With T tokens in the text, a step makes
#
# - for **attention**, in each layer and head: `q @ k.T`, 2·T·T·D, and
#   `weights @ v`, 2·T·T·D;
# - for the **projections**, the matrices that each token meets alone: 2 for
#   each of their weights and each token. (Looking up a token's row of the
#   embedding is no product.)
#
# Attention is counted in full, although nearly half of its scores are masked. A
# clever kernel can skip masked tiles, and torch's does so on texts of more than
# 512 tokens; your function computes them all. We count products by their
# shapes, as is usual, so that a count tells what an algorithm asks for and not
# which kernel ran.
#
# To write N tokens from a prompt of one, sum over T = 1 … N. The sum of T²
# grows like N³, and the sum of T like N².
#
# ### Exercise 1.5 · `attention_flops` ★★ (10 minutes)
#
# Predict attention's FLOPs for a whole generation, by this convention, to the
# last digit: a whole number, of Python's, numpy's or torch's, for a float
# rounds. `config` has `num_layers`, `num_heads` and `head_dim`.

# %% exercise="attention_flops"
from lib.generate import attention_flops

# %%
check(attention_flops)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The first step has `prompt_len` tokens, and each step has one more than the
# one before. How many has the last?
#
# </details>
# <details><summary>Hint 2</summary>
#
# A loop over T is fine. Query heads count, shared keys or not: each has scores
# of its own.
#
# </details>

# %% [markdown]
# The **meter** measures: `measure` runs a function, sees every operation that
# torch performs on the way, and counts the FLOPs of each from its shapes.

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

# %% alt="Log-log plot: FLOPs in attention over the tokens generated, N, from 32 to 256. The measured points lie on the dashed prediction, a straight line of slope 3."
plotting.plot_measured(
    {"measured": (Ns, measured)},
    predicted={"predicted": (Ns, predicted)},
    xlabel="tokens generated, N",
    ylabel="FLOPs in attention",
    title="The attention of a whole text grows like N³",
    log=True,
);

# %% [markdown]
# *Measured points on the prediction. On two logarithmic axes a power N^a is a
# straight line of slope a; here, 3.*
#
# Twice the text should cost 2³ = 8 times as much. The sum of T² is
# N³/3 + N²/2 + N/6, and the smaller terms still show:

# %%
[round(b / a, 2) for a, b in zip(measured, measured[1:])]

# %% [markdown]
# Now we can say more about the first figure. How many FLOPs did each of its
# steps take, and how many per second is that?

# %%
for T, ms in zip(lengths, milliseconds):
    step = generate.attention_flops(lm.config, T, 1)
    step += generate.projection_flops(lm.config, T, 1)
    print(f"T = {T:3}: {step / 1e6:6.0f} million FLOPs ", end="")
    print(f"in {ms:5.1f} ms, {step / ms / 1e6:5.1f} billion per second")

# %% [markdown]
# At 512 tokens there is more than 20 times the work of 32 tokens. If the time
# grows less, the last column says why: on a longer text the machine gets
# through more FLOPs per second, since the fixed price of a call is spread over
# more of them. (If the machine does something else meanwhile, these numbers
# jump.)
#
# ## An honest look: the cube is not there at first
#
# N³ is attention alone. In our model the projections cost more for any text
# that fits into it, up to 512 tokens:

# %%
for N in [32, 512, 4096]:
    work = generate.attention_flops(lm.config, 1, N)
    share = work / (work + generate.projection_flops(lm.config, 1, N))
    print(f"N = {N:4}: {share:6.1%} of the work is attention (predicted)")

# %% [markdown]
# So the slope of the *total* starts near 2 and bends towards 3. For one token,
# attention costs some multiple of T·C, where C is the width of the model, and
# the projections cost some multiple of C². In a narrow model the bend comes
# early enough to be measured.

# %%
narrow = ModelConfig(
    vocab_size=256, num_layers=2, num_heads=2, num_kv_heads=1,
    d_model=16, d_ff=48, max_seq_len=1024,
)
narrow_lm = Transformer(narrow).eval()


def predicted_total(shape, N):
    attention = generate.attention_flops(shape, 1, N)
    return attention + generate.projection_flops(shape, 1, N)


# %%
Ns = [16, 32, 64, 128, 256, 512]
totals = []
for N in Ns:
    run = lambda: generate.generate_recompute(narrow_lm, first_id, N)
    totals.append(meter.measure(run).flops.total())
totals == [predicted_total(narrow, N) for N in Ns]

# %% alt="Log-log plot: FLOPs in all over the tokens generated, N, from 16 to 4,096. Two dashed predictions rise and steepen, from a slope near 2 towards 3: our model above, the narrow model below, which bends sooner. Measured points, up to 512 tokens, lie on the lower one."
far = [16 * 2**i for i in range(9)]  # to 4096: too slow to run, easy to predict
plotting.plot_measured(
    {"measured": (Ns, totals)},
    predicted={
        "narrow model": (far, [predicted_total(narrow, N) for N in far]),
        "our model": (far, [predicted_total(lm.config, N) for N in far]),
    },
    xlabel="tokens generated, N",
    ylabel="FLOPs in all",
    title="Where projections dominate the slope is near 2; it bends to 3",
    log=True,
);

# %% [markdown]
# *Two predictions that steepen, and measured points on the lower one. Their
# slopes:*

# %%
def slope(shape, N):
    return math.log2(predicted_total(shape, 2 * N) / predicted_total(shape, N))


for N in [16, 256, 4096]:
    print(f"N = {N:4}: {slope(narrow, N):.2f} in the narrow model, ", end="")
    print(f"{slope(lm.config, N):.2f} in ours")

# %% [markdown]
# Whoever says that generation by recompute "is cubic" should say from what
# length on. What holds at every length is the picture of squares: a step
# repeats the whole step before it, and adds one row.

# %% [markdown]
# ## Scores need not be stored
#
# Work is one price, memory the other. `attend_causal` holds a score for each
# pair of tokens in each head: H·T² numbers of 4 bytes. While it masks them, or
# takes their softmax, there are two such tensors, 8·H·T² bytes; or three, if
# the function still holds the scores as they were before the mask.
#
# Must all scores be there at once? Take `a` again. Its output is a fraction,
# Σ exp(score) · value over Σ exp(score), and both sums can be run up one key at
# a time. Once a key has been added, nothing of it is needed any more.

# %%
top, bottom = torch.zeros(2), torch.zeros(())
for s in range(3):
    weight = (q[2] @ k[s] / math.sqrt(2)).exp()
    top, bottom = top + weight * v[s], bottom + weight
top / bottom, weights_of_a @ v[:3]

# %% [markdown]
# That is the idea of a **fused kernel**: one operation that goes through the
# keys in tiles, with two running sums for each query (and a running maximum, so
# that `exp` cannot overflow), and never has all scores at once. `attend_fused`
# calls torch's; in chapter 5 we write our own. Here is what a step needs at its
# peak by the meter, which counts the tensors that torch makes (and not the
# weights, which were there before):

# %%
@torch.no_grad()
def peak_bytes(num_tokens, attend):
    token_ids, positions = book_ids[:num_tokens], torch.arange(num_tokens)
    return meter.measure(lambda: lm(token_ids, positions, attend)).peak_bytes


stored = [peak_bytes(T, model.attend_causal) for T in lengths]
fused = [peak_bytes(T, model.attend_fused) for T in lengths]

# %% alt="Log-log plot: bytes of one step's tensors at their peak over the text so far, T, from 32 to 512 tokens. Two lines begin as one. Then stored scores bend upwards, towards the dashed 8·H·T² of slope 2, while fused attention goes on with slope 1."
prediction = [8 * lm.config.num_heads * T**2 for T in lengths]
times = stored[-1] / fused[-1]
plotting.plot_measured(
    {"scores stored": (lengths, stored), "fused": (lengths, fused)},
    predicted={"two tensors, 8·H·T²": (lengths, prediction)},
    xlabel="text so far, T (tokens)",
    ylabel="tensors of one step at their peak (bytes)",
    title=f"At 512 tokens stored scores take {times:.1f} times as much",
    log=True,
);

# %% [markdown]
# *Both begin together, since at short lengths the peak is elsewhere. Then
# stored scores take over, and approach four times as much per doubling; with
# fused attention it is twice as much.*

# %%
for T, a, b in zip(lengths, stored, fused):
    print(f"T = {T:3}: {a / 1e6:6.2f} MB stored, {b / 1e6:5.2f} MB fused")

# %% [markdown]
# One doubt is left. The meter sees the tensors between operations, and not what
# a kernel may use *inside* one. Does the fused kernel hide its scores there?
# The operating system would know, for it counts the memory of the whole
# process. We ask it once, for attention alone, two heads and a long text:

# %%
T, heads = 4096, 2
long = [torch.randn(1, T, heads, 32) for _ in range(3)]
print(f"one tensor of scores: {4 * heads * T**2 / 1e6:.0f} MB")
for name, attend in [
    ("fused", model.attend_fused), ("stored", model.attend_causal)
]:
    attend(0, *[x[:, :64] for x in long])  # whatever the first call loads
    grown = meter.resident_bytes(lambda: attend(0, *long))
    print(f"{name:6}: the process grew by {grown / 1e6:.0f} MB")

# %% [markdown]
# Where scores are stored, the process grows by two or three tensors of them.
# With the fused kernel it hardly grows. (This is no proof: an allocator that
# keeps freed memory for later would hide any growth. But then the second line
# would be small, too.)

# %% [markdown]
# ## The first column of the table
#
# The first four chapters fill one table, column by column, and chapters 8 and 9
# add to it: how do memory and work grow with the number of tokens, N, and of
# layers, L? For generating by
# recompute, with fused attention, theory says: memory N (a layer's results are
# free again when the next one runs), attention N³·L, projections N²·L, and N
# calls of the model, each through L layers. `table.sweep` measures small random
# models at three lengths and three depths, and `table.fit` reads off the
# exponents.

# %%
sweep = table.sweep("recompute")
cells = table.fit(sweep)
Markdown(table.render(cells))

# %% alt="Log-log plot: times as much as at 64 tokens, over the tokens generated, N, up to 256. Three straight lines from one point: peak memory with slope 1, projection FLOPs with slope 2, attention FLOPs with slope 3."
growth = {}
for quantity in ["peak memory", "projection FLOPs", "attention FLOPs"]:
    Ns, values = sweep.along("N", quantity)
    growth[quantity] = Ns, [value / values[0] for value in values]
plotting.plot_measured(
    growth,
    xlabel="tokens generated, N",
    ylabel=f"times as much as at N = {Ns[0]}",
    title="Recompute: memory grows like N, projections N², attention N³",
    log=True,
);

# %% [markdown]
# *Three lines from one point, with slopes 1, 2 and 3.*
#
# Where a measured exponent is a little below theory, the smaller terms are the
# reason. `make table`, in a terminal, prints all columns there are.

# %%
check.summary()

# %% [markdown]
# ## What is still wrong
#
# Take a text of 512 tokens, written from one:

# %%
N = 512
run = sum(range(1, N + 1))
print(f"{run:,} tokens computed to write {N}: {run / N:.1f} for each")

# %% [markdown]
# Attention's rows never change once they are computed, and all that the next
# row needs of earlier tokens are their keys and values. We computed them, and
# threw them away. Chapter 3 keeps them. First, chapter 2 looks at the opposite
# case, training, where *everything* is kept, and asks what happens if some of
# it is thrown away on purpose.
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
# 5. Scores, one for each pair of tokens, can be stored, in memory that grows
#    like T², or used up tile by tile, in memory that grows like T.
#
# ## Do you recall?
#
# 1. Why must `decode` accept bytes that are no text?
# 2. Which row of logits speaks about the next token, and what do the others
#    speak about?
# 3. What does top-p keep if the most probable token alone has probability 0.9
#    and p is 0.5?
# 4. You double the length of a text. By what factor does attention's work in
#    one step grow? And its work in the whole generation?
# 5. The model gets 10 more layers. Which rows of the table change?
#
# <details><summary>Answers</summary>
#
# 1. A character may take several bytes, and generation may stop between them;
#    and a model may write bytes that are no text at all.
# 2. The last row. Each other row t speaks about token t + 1, which is there
#    already: useful in training, thrown away in generation.
# 3. That one token: the fewest that reach p, and never none.
# 4. By 4, and by nearly 8 (a bit less, for the smaller terms).
# 5. Both FLOP rows, the block calls and the seconds grow. Forward calls do not,
#    and neither does peak memory: what a layer computes is free again when the
#    next one runs. (The weights, which the table does not count, do grow.)
#
# </details>
#
# ## Sources
#
# - Vaswani and others, *Attention Is All You Need*, 2017,
#   [1706.03762](https://arxiv.org/abs/1706.03762): attention, section 3.2.1.
# - Touvron and others, *LLaMA*, 2023,
#   [2302.13971](https://arxiv.org/abs/2302.13971): RMSNorm, SwiGLU and RoPE in
#   one decoder, the shape of our model; and Ainslie and others, *GQA*, 2023,
#   [2305.13245](https://arxiv.org/abs/2305.13245): grouped-query attention,
#   which later Llamas have too.
# - Holtzman and others, *The Curious Case of Neural Text Degeneration*, 2019,
#   [1904.09751](https://arxiv.org/abs/1904.09751): why greedy text repeats
#   itself, and top-p.
# - Rabe and Staats, *Self-attention Does Not Need O(n²) Memory*, 2021,
#   [2112.05682](https://arxiv.org/abs/2112.05682), and Dao and others,
#   *FlashAttention*, 2022,
#   [2205.14135](https://arxiv.org/abs/2205.14135): fused attention.
