# %% [markdown]
# # 2. Training: keep everything, or compute it again
#
# Generation throws away what it computed and has to compute it again. Training
# is the opposite: it keeps *everything* until the backward pass has used it,
# and that, not the weights, fills the memory. In this chapter we train a model,
# account for what its layers keep, to the byte, and then write **activation
# checkpointing**, which throws most of it away on purpose: less memory for more
# work.
#
# **You need:** chapter 1, or attention and the generation loop from elsewhere;
# what `loss.backward()` does; and 135 minutes. No GPU.
#
# **You will be able to**
#
# - write the loss of a language model, and train one,
# - predict what training holds, weights, gradients, optimizer and activations,
#   to the byte,
# - write `checkpoint` from scratch, with the same gradients to the bit,
# - choose the number of segments, and fit a model into a budget,
# - say where √L comes from, and when it is not worth having.

# %%
import json
import sys
import time
from collections.abc import Callable, Sequence

import torch
from IPython.display import Markdown
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from lib import checkpointing, generate, text, training
from lib.figures import plotting
from lib.measure import meter, table
from lib.checkpointing import (
    get_random_state,
    run_blocks,
    segments_peak_bytes,
    use_random_state,
)
from lib.config import MOBY, ModelConfig
from lib.course.check import check
from lib.model import Attend, Transformer, attend_fused

plotting.use_course_style()
torch.set_num_threads(1)  # steadier timings
torch.manual_seed(0);

# %% [markdown]
# ## A training step holds many times what the model weighs
#
# Here is the model of chapter 1 once more, new and untrained, and one step of
# its training on 4 passages of 256 tokens. The meter says what it takes at the
# peak, on top of weights and gradients.

# %%
lm = Transformer(MOBY)
for parameter in lm.parameters():
    parameter.grad = torch.zeros_like(parameter)
weights = sum(p.nbytes for p in lm.parameters())

train_ids, held_out_ids = text.split_book(text.encode(text.load_book()))
batch = text.random_batch(train_ids, batch_size=4, seq_len=256)
positions = torch.arange(256)


# %%
def step():
    logits = lm(batch, positions, attend_fused)
    training.next_token_loss(logits, batch).backward()


cost = meter.measure(step)
print(f"weights {weights / 1e6:.1f} MB, ", end="")
print(f"peak of one step {cost.peak_bytes / 1e6:.1f} MB")

# %% [markdown]
# The memory over time, operation by operation:

# %%
plotting.plot_timelines(
    {"one step": cost.timeline},
    title="Memory climbs through the forward pass, and falls again backward",
);

# %% [markdown]
# *A mountain: a step up for each of the four layers, then down again while the
# backward pass uses up what was kept.*
#
# We build this step from its parts: the loss, the loop, and then the mountain.

# %% [markdown]
# ## The loss: how surprised was the model?
#
# A row of logits, by softmax, gives each possible next token a probability. The
# loss of one prediction is minus the logarithm of the probability that the
# right token got, in **nats**: 0 if the model was sure and right, log 256 = 5.5
# if it had no idea, and more if it was wrong. Row t speaks about token t + 1.
# In six tokens there are five predictions:

# %%
whales = text.encode("whales")
for t in range(6):
    target = repr(chr(whales[t + 1])) if t < 5 else "nothing that is there"
    read = text.decode(whales[: t + 1])
    print(f"row {t} has read {read!r}: predicts {target}")

# %% [markdown]
# ### Exercise 2.1 · `next_token_loss` ★ (10 minutes)
#
# The mean loss of all predictions of a batch.

# %% exercise="next_token_loss"
from lib.training import next_token_loss

# %%
check(next_token_loss)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `logits[:, :-1]` are the rows that predict something, `token_ids[:, 1:]` what
# they should have said.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `cross_entropy` takes logits (predictions, V) and targets (predictions,):
# `flatten(0, 1)` and `flatten()`. It does the softmax itself, without overflow.
#
# </details>

# %% [markdown]
# An untrained model should have no idea, and it has none:

# %%
with torch.no_grad():
    logits = lm(batch, positions, attend_fused)
training.next_token_loss(logits, batch).item()

# %% [markdown]
# ## The loop, and half a minute of training
#
# Take a random batch, compute the loss, go backward, move each weight a little
# against its gradient, forget the gradients; repeat. `training.Trainer` is that
# loop. We give it a small model and half a minute.

# %%
small = ModelConfig(
    vocab_size=256, num_layers=2, num_heads=4, num_kv_heads=2,
    d_model=96, d_ff=256, max_seq_len=128,
)
settings = training.TrainingConfig(num_steps=500, batch_size=8, seq_len=128)
trainer = training.Trainer(Transformer(small), train_ids, settings)


def sample():
    dice = torch.Generator().manual_seed(0)
    ids = generate.generate_recompute(
        trainer.model.eval(), text.encode("The whale "), 90, generator=dice
    )
    return text.decode(ids)


before = sample()

# %%
start = time.perf_counter()
for _ in tqdm(range(settings.num_steps), file=sys.stdout, mininterval=1):
    trainer.step()
seconds = time.perf_counter() - start

# %%
some_ids = held_out_ids[:20_000]
held_out = training.held_out_loss(trainer.model, some_ids, seq_len=128)
curve = {
    "train_nats_per_byte": trainer.losses,
    "held_out_nats_per_byte": [[settings.num_steps, held_out]],
    "seconds": seconds,
}
plotting.plot_loss_curve(curve);

# %% [markdown]
# *The loss falls fast, then slowly; the point is the loss on text from the end
# of the book, which the model has not seen.*

# %%
print("before:", repr(before))
print("after: ", repr(sample()))

# %% [markdown]
# It has found out about letters, spaces and the length of words. The model that
# the course ships was trained by the same loop, for longer: `python -m
# lib.training`. Its curve:

# %%
result = json.loads((text.DATA / "results" / "training.json").read_text())
plotting.plot_loss_curve(result);

# %% [markdown]
# *Training and held-out loss of the shipped model; what is above 3 is cut off.
# In training a tenth of what each layer adds is set to zero at random
# (**dropout**), so that the model does not learn the book by heart.*

# %% [markdown]
# ## What autograd keeps
#
# Now the mountain. To find the gradient of a product `x @ w`, the backward pass
# needs x and w; for `silu(x)` it needs x. So each operation of the forward pass
# **saves** something, and autograd keeps it until the backward pass has been
# there. The meter lists what one block of our model saves, for 1 sequence of
# 256 tokens: the operation that made it, its shape, and its bytes.

# %%
x = torch.randn(1, 256, lm.config.d_model, requires_grad=True)
block = Transformer(ModelConfig(**{**vars(MOBY), "dropout": 0.0})).blocks[0]
block_cost = meter.measure(lambda: block(x, torch.arange(256), attend_fused))
for made_by, shape, num_bytes in block_cost.saved:
    print(f"{num_bytes:8,}  {str(shape):20} {made_by.lstrip('_')}")

# %% [markdown]
# Read it from the top. A norm saves one number a token (`rsqrt`), its input
# times that (`mul`), and its output, which three projections need. RoPE saves
# sines and cosines, for queries and again for keys; these depend on the
# position alone, and all sequences share them. Attention needs q, k and v, its
# output and one number for each head and token. Then the residual sum (`add`),
# the second norm, and the MLP's four: gate, up, silu(gate), and the product.
# Weights are not in the list, since they were there before. Neither is the
# block's own input; but that is kept too, and counts as the block's.

# %% [markdown]
# ### Exercise 2.2 · `training_bytes` ★★ (25 minutes)
#
# Predict what training holds, by kind, for any model. Weights: look at `[(n,
# p.shape) for n, p in lm.named_parameters()]`. Gradients are as large. The
# optimizer, AdamW, keeps two more floats for each: running means of the
# gradient and of its square. Activations: the list above and the input, for all
# layers. The letters are those of `config`: C = d_model, H = num_heads, G =
# num_kv_heads, D = C/H, F = d_ff, V = vocab_size. A float has 4 bytes.

# %% exercise="training_bytes"
from lib.training import training_bytes

# %%
check(training_bytes)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A block has q and o, C × (H·D) each; k and v, C × (G·D) each; three matrices
# of C × F; and two norms of C. Outside are embedding and unembedding, V × C
# each, and one last norm.
#
# </details>
# <details><summary>Hint 2</summary>
#
# In floats, a token keeps in each layer 8 vectors of C (input, two norms twice,
# q, attention's output, the sum), 2 of G·D, 4 of F, and 2 + H single numbers;
# and a *position* keeps 4 of D/2, whatever the batch.
#
# </details>

# %%
without_dropout = ModelConfig(**{**vars(MOBY), "dropout": 0.0})
plain_lm = Transformer(without_dropout)
saved = meter.measure(
    lambda: run_blocks(
        plain_lm.blocks, plain_lm.embed(batch), positions, attend_fused
    )
).saved_bytes
predicted = training.training_bytes(without_dropout, 4, 256)
print(f"activations: {saved:,} bytes measured, ", end="")
print(f"{predicted['activations']:,} predicted")

# %% [markdown]
# Equal to the byte. So we may believe it for sizes that are tedious to measure:

# %%
sizes = {
    f"batch of {B}": training.training_bytes(without_dropout, B, 256)
    for B in (1, 4, 16)
}
share = sizes["batch of 16"]["activations"] / sum(sizes["batch of 16"].values())
plotting.plot_training_bytes(
    sizes,
    title=f"Activations grow with the batch: {share:.0%} of all at 16 passages",
);

# %% [markdown]
# *Weights, gradients and optimizer stay what they are; activations grow with
# every passage of 256 tokens.*

# %% [markdown]
# ## Throw it away, and compute it again
#
# What if a block kept nothing but its input? When the backward pass gets there
# it runs the block a second time, from that input, and now keeps the inside;
# uses it; and throws it away before it turns to the block before. The inside of
# *one* block is in memory at a time. The price is a second forward pass.
#
# Two things make it exact. Dropout draws random numbers, and the second run has
# to draw the same; without dropout you would never notice. And autograd must be
# told that this is how the gradient is to be found: that is what
# `torch.autograd.Function` is for, an operation whose backward we write
# ourselves.
#
# ### Exercise 2.3 · `checkpoint` ★★★ (30 minutes)
#
# `Checkpoint.forward` is given: inside a Function autograd is off, so `run(x)`
# keeps nothing. Write `backward`, where autograd is off too: `(x,) =
# ctx.saved_tensors` gives back what forward saved, `with torch.enable_grad():`
# lets a graph be built, and `with use_random_state(x, state):` replays the
# dice. It gets the gradient of the output, and returns one gradient for each
# input of `forward` (`None` for `run` and for the empty tensor, whose part is
# explained in `checkpoint`). The parameters inside `run` get theirs as ever, in
# `.grad`. Gradients have to be those of a plain run, to the bit, with dropout
# and without. `torch.utils.checkpoint` is not allowed.

# %% exercise="checkpoint" given="forward checkpoint"
from lib.checkpointing import Checkpoint, checkpoint

# %%
check(checkpoint)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Make x a leaf of a new graph, `x.detach()`, that wants a gradient if the old
# one did: `ctx.needs_input_grad[1]`. Run again inside `torch.enable_grad()` and
# `use_random_state(x, ctx.random_state)`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.autograd.backward(out, grad_out)` goes backward from `out`, as if its
# gradient were `grad_out`. It adds to `.grad` of every parameter, and of the
# new leaf x.
#
# </details>

# %% [markdown]
# Now a deep, narrow model, 16 blocks, and four ways to run them: keep all, or
# cut them into 1, 4 or 16 segments and checkpoint each. The step is the blocks
# alone, with the sum of their output for a loss. First: are the gradients the
# same, with dropout?

# %%
deep = ModelConfig(
    vocab_size=256, num_layers=16, num_heads=4, num_kv_heads=2,
    d_model=64, d_ff=192, max_seq_len=128, dropout=0.1,
)
deep_lm = Transformer(deep)
for parameter in deep_lm.parameters():
    parameter.grad = torch.zeros_like(parameter)
deep_batch = text.random_batch(train_ids, batch_size=4, seq_len=128)
deep_positions = torch.arange(128)


def deep_step(run, *args):
    x = deep_lm.embed(deep_batch)
    out = run(deep_lm.blocks, x, deep_positions, attend_fused, *args)
    out.sum().backward()


# %%
def gradients(run, *args):
    deep_lm.zero_grad(set_to_none=False)
    torch.manual_seed(1)  # the same dropout for all
    deep_step(run, *args)
    return [parameter.grad.clone() for parameter in deep_lm.blocks.parameters()]


in_segments = checkpointing.checkpoint_segments
expected = gradients(run_blocks)
for k in (1, 4, 16):
    got = gradients(in_segments, k)
    is_equal = all(torch.equal(a, b) for a, b in zip(got, expected))
    print(f"{k:2} segments: {len(got)} gradients, equal to the bit: {is_equal}")

# %% [markdown]
# And the memory, from here on without dropout, whose masks are kept too:

# %%
deep_lm.eval()
keep_all = meter.measure(lambda: deep_step(run_blocks))
four = meter.measure(lambda: deep_step(in_segments, 4))
sixteen = meter.measure(lambda: deep_step(in_segments, 16))
plotting.plot_timelines(
    {
        "keep all": keep_all.timeline,
        "4 segments": four.timeline,
        "16 segments": sixteen.timeline,
    },
    title="The mountain becomes a row of hills, one a segment",
);

# %% [markdown]
# *Keeping all climbs once and falls once. With segments the forward pass climbs
# by an edge a segment, and the backward pass climbs one hill for each segment
# it computes again. It takes more operations: the lines are longer.*

# %% [markdown]
# ## How many segments?
#
# Let b be the bytes of an **edge**, one x between two blocks, and A what a
# block keeps **inside**, its input included. With L blocks in k segments the
# backward pass holds k edges and the inside of one segment: about
#
# > k·b + (L/k)·A
#
# Few segments: the inside is large. Many: there are many edges. Between is a
# minimum, at k = √(L·A/b), and there it is 2·√(L·A·b): **the best peak grows
# like √L.**

# %%
edge_bytes = 4 * 128 * deep.d_model * 4  # 4 passages, 128 tokens, float32
activations = training.training_bytes(deep, 4, 128)["activations"]
block_bytes = activations // deep.num_layers
print(f"b = {edge_bytes:,} bytes, A = {block_bytes:,} bytes, ", end="")
print(f"A/b = {block_bytes / edge_bytes:.1f}")

# %%
ks = [1, 2, 4, 6, 8, 12, 16]
costs = [meter.measure(lambda: deep_step(in_segments, k)) for k in ks]
peaks = [cost.peak_bytes for cost in costs]
predicted = [segments_peak_bytes(16, k, edge_bytes, block_bytes) for k in ks]
extra = [(peak - guess) / edge_bytes for peak, guess in zip(peaks, predicted)]
print("measured less predicted, in edges:", [round(e, 3) for e in extra])

# %%
plotting.plot_measured(
    {"measured": (ks, peaks)},
    predicted={"k·b + ⌈L/k⌉·A": (ks, predicted)},
    xlabel="segments, k",
    ylabel="peak memory of one step (bytes)",
    title="16 blocks: one block a segment holds least",
);

# %% [markdown]
# *Measured and predicted peak run in parallel, and are lowest at k = 16. At 12,
# which does not divide 16, the longest segment has two blocks, as at 8.*
#
# The formula misses a constant, the same few edges for every k: the output of
# the step, and gradients on their way back. And why is the minimum not at √16 =
# 4? Because a block's inside weighs over twenty edges: √(16·A/b) is more than
# 16, and there are only 16 blocks to cut at. √L is how the best peak grows, not
# the k where it is.
#
# ### Exercise 2.4 · `best_num_segments` ★★ (10 minutes)
#
# The k with the lowest peak, by the formula, exactly: the longest segment has
# L/k blocks *rounded up*. Of equally good ones, the fewest. Given is
# `segments_peak_bytes(num_layers, num_segments, edge_bytes, block_bytes)`.

# %% exercise="best_num_segments"
from lib.checkpointing import best_num_segments

# %%
check(best_num_segments)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# L is small: try every k from 1 to L with `segments_peak_bytes`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `min(..., key=...)` returns the first of equals.
#
# </details>

# %%
for L in (4, 16, 64, 256):
    best = checkpointing.best_num_segments(L, edge_bytes, block_bytes)
    peak = segments_peak_bytes(L, best, edge_bytes, block_bytes)
    every = segments_peak_bytes(L, L, edge_bytes, block_bytes)
    print(f"L = {L:3}: {best:3} segments, {peak / 1e6:5.1f} MB ", end="")
    print(f"(one a block: {every / 1e6:5.1f} MB)")
last = max(
    L
    for L in range(1, 200)
    if checkpointing.best_num_segments(L, edge_bytes, block_bytes) == L
)
print(f"one block a segment is best up to {last} layers")

# %% [markdown]
# For 4 times the layers the best peak takes twice the memory, once L is well
# above A/b; before that, one block a segment wins. (The table at the end uses
# k = √L, which needs no A and b: its peak, √L·(A + b), grows the same way.)

# %% [markdown]
# ## Spend what you have
#
# Recomputing *all* blocks may be more than you need. If the memory has room for
# a few insides, keep those and save the work. Keep the **last** blocks: the
# backward pass begins there, so by the time it has to run an earlier block
# again, their insides are gone. That makes the first kept block free: room for
# one inside is needed anyway.
#
# ### Exercise 2.5 · `blocks_to_keep` ★★ (10 minutes)
#
# A checkpointed block costs its edge, a kept one its inside. (Inside includes
# the block's own edge.) How many can be kept within the budget? `ValueError` if
# not even one inside fits beside the other edges.

# %% exercise="blocks_to_keep" given="1"
from lib.checkpointing import blocks_to_keep

# %%
check(blocks_to_keep)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The smallest budget is (L - 1)·b + A: one kept block. Each further one adds an
# inside and saves an edge.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Round down, and never keep more blocks than there are.
#
# </details>

# %%
budget = 20_000_000
kept = checkpointing.blocks_to_keep(16, edge_bytes, block_bytes, budget)
keep_last = checkpointing.keep_last_blocks
constant = peaks[0] - predicted[0]  # of above
for n in (kept, kept + 1, 16):
    cost = meter.measure(lambda: deep_step(keep_last, n))
    needed = cost.peak_bytes - constant
    print(f"keep {n:2} blocks: {needed:10,} bytes of {budget:,}, ", end="")
    print(f"{cost.calls['Block']} block calls")

# %% [markdown]
# ## Halve, and halve again
#
# Segments cut once. Cut again inside each, and again: checkpoint the first half
# of the blocks, go into the second half, and treat each half the same way. The
# backward pass comes out of the second half, runs the first again, and that run
# halves in turn. What is kept at any time is one edge for each halving, log₂ L
# of them, and the inside of one block. The work is L/2 block calls more for
# each halving.
#
# ### Exercise 2.6 · `checkpoint_recursive` ★★★ (20 minutes)
#
# Memory O(log L), at most 2·L + (L/2)·log₂ L block calls. A single block needs
# no checkpoint: it is the one whose inside is kept. Use
# `checkpointing.checkpoint`, yours if it has passed.

# %% exercise="checkpoint_recursive"
from lib.checkpointing import checkpoint_recursive

# %%
check(checkpoint_recursive)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# One block: run it. More: the first half goes through `checkpoint`, as a
# function of x that calls `checkpoint_recursive` on it.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The second half needs no checkpoint of its own: `return
# checkpoint_recursive(second, x, positions, attend)`.
#
# </details>

# %%
ways = {
    "keep all": run_blocks,
    "√L segments": lambda *args: in_segments(*args, round(len(args[0]) ** 0.5)),
    "recursive": checkpointing.checkpoint_recursive,
}
Ls = [4, 16, 64]
peaks = {name: [] for name in ways}
for L in Ls:
    tall = Transformer(ModelConfig(**{**vars(deep), "num_layers": L}))
    for parameter in tall.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for name, run in ways.items():
        x = torch.randn(1, 64, 64, requires_grad=True)
        step = lambda: run(tall.blocks, x, torch.arange(64), attend_fused)
        cost = meter.measure(lambda: step().sum().backward())
        peaks[name].append(cost.peak_bytes)

# %%
plotting.plot_measured(
    {name: (Ls, values) for name, values in peaks.items()},
    xlabel="layers, L",
    ylabel="peak memory of one step (bytes)",
    title="Keep all grows like L, segments like √L, recursion like log L",
    log=True,
);

# %% [markdown]
# *Three lines: slope 1, slope ½, and one that is nearly flat.*

# %% [markdown]
# ## What it costs
#
# Memory was counted; time is measured, on your machine, median of five steps.

# %%
ways = {
    "keep all": (run_blocks,),
    "4 segments": (in_segments, 4),
    "16 segments": (in_segments, 16),
    "recursive": (checkpointing.checkpoint_recursive,),
}
baseline = None
for name, (run, *args) in ways.items():
    seconds = meter.median_seconds(lambda: deep_step(run, *args))
    cost = meter.measure(lambda: deep_step(run, *args))
    megabytes = cost.peak_bytes / 1e6
    baseline = baseline or (seconds, megabytes)
    print(f"{name:12} {cost.calls['Block']:2} block calls, ", end="")
    print(f"{1000 * seconds:4.0f} ms ({seconds / baseline[0]:.2f} x), ", end="")
    print(f"{megabytes:4.1f} MB ({megabytes / baseline[1]:.2f} x)")

# %% [markdown]
# A backward pass costs about twice a forward pass, so one forward pass more is
# about a third more work; what you see above that is overhead. Recursion saves
# little here: its edges are few, but one inside weighs as much as twenty of
# them. Whether any of this is a bargain depends on what you lack.

# %% [markdown]
# ## Two columns of the table
#
# Training, with fused attention, keeps N·L. With √L segments it keeps N·√L, and
# runs the forward pass twice: that is the factor 2 in front. It is measured in
# FLOPs: the step's, less those of a step without checkpoints, in units of a
# forward pass, plus 1.

# %%
columns = ("training", "checkpointed")
cells = [cell for name in columns for cell in table.fit(table.sweep(name))]
Markdown(table.render(cells))

# %%
check.summary()

# %% [markdown]
# ## What is still wrong
#
# The model that we trained still generates by recompute, and
# throws away keys and values that never change. There the bargain goes the
# other way round: keep a little, and a whole forward pass over the text becomes
# one over a single token. That is chapter 3.
#
# ## In five sentences
#
# 1. The loss compares row t of the logits with token t + 1, and the last row
#    with nothing.
# 2. Training holds weights, gradients, two more floats a weight for AdamW, and
#    the activations that each operation saves for its backward.
# 3. Activations grow with tokens times layers, and soon outweigh the rest.
# 4. A checkpoint keeps the input of a segment and computes its inside again,
#    with the same random numbers: the same gradients for one more forward pass.
# 5. k segments hold k·b + (L/k)·A; its minimum over k grows like √L, and
#    halving again and again like log L.
#
# ## Do you recall?
#
# 1. A batch of 3 passages of 10 tokens: how many predictions is the loss the
#    mean of?
# 2. Which of the four kinds of bytes grow with the batch?
# 3. What goes wrong if the random state is not put back, and when does nobody
#    notice?
# 4. Your blocks have insides of 20 edges. You have 12 layers. How many
#    segments?
# 5. Why does keeping the *last* block cost nothing extra?
#
# <details><summary>Answers</summary>
#
# 1. 27: in each passage the last row predicts nothing.
# 2. Activations alone.
# 3. The second run drops other activations than the first, so the gradients
#    belong to a network that never was; without dropout all is well.
# 4. 12: √(12·20) is more than 12, so one block a segment.
# 5. Room for the inside of one block is needed anyway, when an earlier one is
#    computed again; by then the last one's is free.
#
# </details>
#
# ## Sources
#
# - Chen and others, *Training Deep Nets with Sublinear Memory Cost*, 2016,
#   [1604.06174](https://arxiv.org/abs/1604.06174): segments, √L, recursion.
# - Griewank and Walther, *Algorithm 799: revolve*, 2000,
#   [doi.org/10.1145/347837.347846](https://doi.org/10.1145/347837.347846): the
#   best schedule for a given number of checkpoints.
# - Korthikanti and others, *Reducing Activation Recomputation in Large
#   Transformer Models*, 2022, [2205.05198](https://arxiv.org/abs/2205.05198):
#   activations of a transformer layer, counted, and which to recompute.
# - Loshchilov and Hutter, *Decoupled Weight Decay Regularization*, 2017,
#   [1711.05101](https://arxiv.org/abs/1711.05101): AdamW.
