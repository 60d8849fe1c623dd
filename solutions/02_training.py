# %% [markdown]
# # 2. Training: keep everything, or compute it again
#
# Generation throws away what it computed, and has to compute it again. Training
# is the opposite: it keeps *everything* until the backward pass has used it,
# and with a small model, or a large batch, that is most of what fills the
# memory. In this chapter we train a model, account for every byte of a training
# step, and then write **activation checkpointing**, which throws most of what
# is kept away on purpose: less memory for more work.
#
# **You need:** chapter 1, or attention and the generation loop from elsewhere;
# what `loss.backward()` does; and 190 minutes. No GPU.
#
# **You will be able to**
#
# - write the loss of a language model, and train one,
# - predict what a training step holds at its peak, to the byte,
# - train on a large batch in small parts, with the same gradients,
# - write `checkpoint` from scratch, with the same gradients to the bit,
# - choose the number of segments, and fit a model into a budget,
# - recompute only what is cheap: nearly half of what a block keeps, for no
#   product,
# - say where √L comes from, and when it is not worth having.
#
# **How it works.** As in chapter 1, `check(...)` below each exercise tells you
# in one line what is wrong, and puts what passes into the library's place. What
# you skip the library stands in for: use it by its module, as in
# `training.next_token_loss`.

# %%
import copy
import inspect
import json
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.utils.checkpoint
from IPython.display import Markdown
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from lib import checkpointing, config, generate, text, training
from lib.checkpointing import (
    Repeatable,
    get_random_state,
    guarded,
    run_blocks,
    segments_peak_bytes,
    use_random_state,
)
from lib.config import MOBY, ModelConfig
from lib.course.check import check
from lib.figures import drawing, plotting
from lib.measure import meter, table
from lib.model import Attend, Transformer, attend_fused

plotting.use_course_style()
torch.set_num_threads(1)  # steadier timings
torch.manual_seed(0);

# %% [markdown]
# ## A training step holds many times what the model weighs
#
# Here is the model of chapter 1 once more, new and untrained. We take one step
# of its training on a **batch** of 4 passages of 256 tokens: a forward pass,
# the loss, and a backward pass, which finds a gradient for each weight. We make
# room for the gradients beforehand, so the meter counts neither weights nor
# gradients, but what the step needs beside them at its peak.

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
    loss = training.next_token_loss(lm(batch, positions, attend_fused), batch)
    loss.backward()


step_cost = meter.measure(step)
print(f"weights {weights:,} bytes, ", end="")
print(f"peak of one step {step_cost.peak_bytes:,} bytes")

# %% [markdown]
# The memory over time, operation by operation:

# %% alt="Memory alive, in bytes, over the operations of one step: a mountain. It climbs in four steps to a peak near the middle, and comes down in four steps, jagged ones."
plotting.plot_timelines(
    {"one step": step_cost.timeline},
    title="Memory climbs through the forward pass, and falls again backward",
);

# %% [markdown]
# *A mountain: it climbs in four steps, one per layer, and comes down again
# while the backward pass uses up what was kept.*
#
# We build this step from its parts, the loss and the loop. Then we take the
# mountain apart, until we can name each of its bytes.

# %% [markdown]
# ## The loss: how surprised was the model?
#
# Softmax turns a row of logits into a probability for each possible next token.
# The loss of one prediction is minus the logarithm of the probability that the
# right token got, and its unit is the **nat**: 0 if the model was sure and
# right, log 256 = 5.545 if it held all 256 bytes equally probable, and more if
# it was wrong. Row t speaks about token t + 1, so six tokens make five
# predictions:

# %%
whales = text.encode("whales")
for t in range(6):
    target = repr(chr(whales[t + 1])) if t < 5 else "nothing that is there"
    read = text.decode(whales[: t + 1])
    print(f"row {t} has read {read!r}: predicts {target}")

# %% [markdown]
# ### Exercise 2.1 · `next_token_loss` ★ (10 minutes)
#
# The mean loss of all predictions of a batch. The lines that refuse a batch
# with nothing to predict are given.

# %% exercise="next_token_loss" given="1"
from lib.training import next_token_loss

# %%
check(next_token_loss)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `logits[:, :-1]` are the rows that predict something, and `token_ids[:, 1:]`
# is what they should have said.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `cross_entropy` takes logits (predictions, V) and targets (predictions,):
# `flatten(0, 1)` and `flatten()`. It does the softmax itself, without overflow.
#
# </details>

# %% [markdown]
# An untrained model should have no idea, and it has none. (It is a little above
# 5.545, for its random guesses are not all equal, and mostly wrong.)

# %%
with torch.no_grad():
    logits = lm(batch, positions, attend_fused)
training.next_token_loss(logits, batch).item()

# %% [markdown]
# ## The loop, and half a minute of training
#
# Take a random batch, compute its loss, go backward, move each weight a little
# against its gradient, forget the gradients; repeat. That is the whole of
# training, and this is how the library does it:

# %%
def show_source(function):
    source = inspect.cleandoc("\n" + inspect.getsource(function))
    return Markdown(f"```python\n{source}\n```")


show_source(training.Trainer.step)

# %% [markdown]
# Some of it is not on our list. `accumulate_gradients` is the forward
# and the backward pass; it comes back below. `clip_grad_norm_` shortens the
# gradient where it is too long: if all gradients together, taken as one vector,
# are longer than 1, they are scaled down to that length, so that one odd batch
# cannot throw the model off. And the optimizer, **AdamW**, does not take the
# gradient as it comes. For each weight it keeps two running means, of the
# gradient and of its square, and moves the weight by the first over the root of
# the second: weights whose gradients are small move as much as others. (The W
# stands for weight decay: each step also shrinks the matrices a little.)
#
# The loop at the top sets how far a weight moves, the **learning rate**, which
# changes on the way. It warms up, since the running means know nothing at
# first, and then falls along half a cosine, so that the last steps are small.

# %% alt="A line: the learning rate over training steps 0 to 500. It climbs straight to 0.003 at step 100, then falls along half a cosine, slowly at first and at the end, to 0 at step 500."
small = ModelConfig(
    vocab_size=256, num_layers=2, num_heads=4, num_kv_heads=2,
    d_model=96, d_ff=256, max_seq_len=128,
)
settings = training.TrainingConfig(num_steps=500, batch_size=8, seq_len=128)
steps = list(range(0, settings.num_steps + 1, 10))
rates = [training.learning_rate(n, settings) for n in steps]
ax = plotting.plot_measured(
    {"": (steps, rates)},
    xlabel="training step",
    ylabel="learning rate",
    title="Warm up for 100 steps, then fall along half a cosine",
)
ax.set_xticks(range(0, 501, 100));

# %% [markdown]
# *A straight line up to 0.003 at step 100, and half a wave down to 0 at 500.*
#
# We give the loop a small model and half a minute.

# %%
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
for _ in tqdm(range(settings.num_steps), file=sys.stdout, mininterval=3):
    trainer.step()
seconds = time.perf_counter() - start

# %% alt="Training loss, in nats per byte, over 500 training steps: a jagged line that falls fast, then slowly; what is above 3 is cut off. At its end, close to it, a single point: the loss on text from the end of the book."
some_ids = held_out_ids[:20_000]
held_out = training.held_out_loss(trainer.model, some_ids, seq_len=128)
curve = {
    "train_nats_per_byte": trainer.losses,
    "held_out_nats_per_byte": [[settings.num_steps, held_out]],
    "seconds": seconds,
}
plotting.plot_loss_curve(curve);

# %% [markdown]
# *The loss falls fast, then slowly. The point is the loss on text from the end
# of the book, which the model has not seen.*

# %%
print("before:", repr(before))
print("after: ", repr(sample()))

# %% [markdown]
# It has found out about letters, spaces and the length of words. The model that
# the course ships was trained by the same loop, for longer, by `python -m
# lib.training`. Its curve:

# %% alt="Loss of the shipped model, in nats per byte, over 5,000 training steps: training, and with markers held out. Both fall fast, then slowly, and from step 250 on nearly together; from about step 1,500 on held out flattens above training, and the gap grows."
result = json.loads((text.DATA / "results" / "training.json").read_text())
plotting.plot_loss_curve(result);

# %% [markdown]
# *Training and held-out loss of the shipped model; what is above 3 is cut off.
# In training a tenth of what each layer adds is set to zero at random. That is
# called **dropout**, and keeps the model from learning the book by heart.*

# %% [markdown]
# ## What autograd keeps
#
# Now for the mountain. To find gradients, the backward pass needs numbers of
# the forward pass. The gradient of `x * w` with respect to w is x, so x must
# still be there; for `exp(x)` it is the result that is needed; for `x + y`
# nothing is. While the forward pass runs, **autograd** writes down which
# operation follows which, the **graph**, and each operation *saves* in it what
# its own backward step needs. The meter lists what was saved, and which
# operation *made* it:

# %%
x = torch.randn(4, requires_grad=True)
for name, function in {
    "exp(x)": lambda: x.exp(),
    "exp(x) + 1": lambda: x.exp() + 1,
    "sin(x + 1)": lambda: (x + 1).sin(),
    "(x + 1) + 2": lambda: (x + 1) + 2,
}.items():
    print(f"{name:12} saves {meter.measure(function).saved}")

# %% [markdown]
# The third line is the one to look at. `+` saves nothing; but the sum is saved,
# since `sin` needs it. So a row of the list names who made a tensor; the reason
# why it is kept may be that operation (`exp`) or the one after it (`sin`). (x
# itself is needed too, but it was there before, so the meter does not count
# it.)
#
# Here is what one block of our model saves, for 1 passage of 256 tokens,
# without dropout: the bytes, the shape, and the operation that made it.

# %%
x = torch.randn(1, 256, lm.config.d_model, requires_grad=True)
without_dropout = ModelConfig(**{**vars(MOBY), "dropout": 0.0})
plain_lm = Transformer(without_dropout)
block_cost = meter.measure(
    lambda: plain_lm.blocks[0](x, torch.arange(256), attend_fused)
)
for made_by, shape, num_bytes in block_cost.saved:
    print(f"{num_bytes:8,}  {str(shape):20} {made_by.lstrip('_')}")

# %% [markdown]
# Read it from the top, with the block of chapter 1 beside it.
#
# - A norm saves three things: one number per token (`rsqrt`, one over the root
#   of the mean square), its input times that (`mul`), and its output (`mul`),
#   which the three projections after it need.
# - RoPE saves the cosines and sines of its angles, once for queries and once
#   for keys. They depend on the position alone, so all passages of a batch
#   share them.
# - Attention saves its keys, queries (`cat`, as RoPE made them) and values
#   (`mm`), its output, and one number per head and token, with which it can
#   compute the scores again.
# - The residual sum (`add`) is kept for the second norm, which saves three
#   things like the first.
# - The MLP saves four: gate (`mm`), for the gradient of silu; up (`mm`) and
#   silu(gate), for the gradient of their product; and the product (`mul`),
#   which the last matrix needs.
#
# Weights are not in the list, since they were there before. Neither is the
# block's own input; but that is kept too, and we count it as the block's. (All
# of this is on a CPU. On a GPU torch has a norm that saves one vector less.)

# %% [markdown]
# ### Exercise 2.2 · `training_bytes` ★★ (25 minutes)
#
# Predict what training holds, by kind, for any model:
#
# - weights: look at `[(n, p.shape) for n, p in lm.named_parameters()]`;
# - gradients, which are as large;
# - the optimizer: AdamW's two running means, one float each per weight;
# - activations: the list above and the input, of all layers.
#
# The letters are those of `config`: L = num_layers, C = d_model, H = num_heads,
# G = num_kv_heads, D = C/H, F = d_ff, V = vocab_size. A float has 4 bytes.
# Dropout's masks are not asked for: they come below.

# %% exercise="training_bytes"
from lib.training import training_bytes

# %%
check(training_bytes)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Weights: a block has q and o, C × (H·D) each; k and v, C × (G·D) each; three
# matrices of C × F; and two norms of C. Outside are embedding and unembedding,
# V × C each, and one last norm.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Activations: write the letters beside each row of the list. How many of its
# rows are C numbers per token, how many G·D, how many F? How many have one
# number per token, and how many H? Which rows are the same for a batch of 1 and
# of 10? Do not forget the input.
#
# </details>

# %%
blocks_cost = meter.measure(
    lambda: run_blocks(
        plain_lm.blocks, plain_lm.embed(batch), positions, attend_fused
    )
)
predicted = training.training_bytes(without_dropout, 4, 256)
print(f"activations: {blocks_cost.saved_bytes:,} bytes measured, ", end="")
print(f"{predicted['activations']:,} predicted")

# %% [markdown]
# Equal to the byte.

# %% [markdown]
# ## The whole account
#
# The mountain on top of the page is higher than that: it also has what lies
# outside of the blocks, and its model has dropout. What is missing?
#
# - **Dropout masks.** Dropout has to remember, for the backward pass, which
#   numbers it set to zero. A mask is one float per number (on a GPU one byte),
#   and each block has two.
# - **The last norm**, with its input: three more vectors and a number per
#   token.
# - **Logits and loss.** The logits are V numbers per token. The loss copies
#   them, since the last row of each passage has to be left out, and computes
#   their log-softmax, which it saves. It also copies the targets, 8 bytes each,
#   and makes two single floats: the loss, and the number of its terms. At that
#   moment all of it is there.
#
# After that the backward pass begins to give back what was kept, so in our
# model this is the peak. `training.step_bytes` adds it up:

# %%
account = training.step_bytes(MOBY, 4, 256)
for kind, num_bytes in account.items():
    print(f"{num_bytes:12,}  {kind}")
print(f"{sum(account.values()):12,}  predicted in all")
print(f"{step_cost.peak_bytes:12,}  measured, on top of the page")

# %% [markdown]
# Every byte of the mountain has a name. (In a model with a small vocabulary and
# a wide MLP the peak comes later, in the last block's MLP, and is higher:
# gradients weigh more there than the loss does here.)
#
# And a whole training run? Here are two steps of the loop, from nothing: the
# model itself is made under the meter, too.

# %%
def two_steps():
    loop = training.TrainingConfig(batch_size=4, seq_len=256)
    trainer = training.Trainer(Transformer(MOBY), train_ids, loop)
    for _ in range(2):
        trainer.step()


run_cost = meter.measure(two_steps)
kinds = training.training_bytes(MOBY, 4, 256)
in_all = {
    "weights": kinds["weights"],
    "optimizer": kinds["optimizer"],
    "at the peak of a step": sum(account.values()),
    "AdamW's step counters": 4 * len(list(lm.parameters())),
    "token ids and positions": 8 * (4 * 256 + 256),
}
for kind, num_bytes in in_all.items():
    print(f"{num_bytes:12,}  {kind}")
print(f"{sum(in_all.values()):12,}  predicted in all")
print(f"{run_cost.peak_bytes:12,}  measured")

# %% alt="Memory alive, in bytes, over the operations of two steps from nothing: two mountains, each with a level stretch behind it. The first stands on the weights. The second stands on a higher level, weights and optimizer, and has the higher peak."
plotting.plot_timelines(
    {"two steps from nothing": run_cost.timeline},
    title="Weights at the bottom, and from the first update on the optimizer",
);

# %% [markdown]
# *Two mountains. The first stands on the weights; the second also on the
# optimizer's running means, which the first update makes.*
#
# One kind is missing from the account: the gradients. They are there, 6.7 MB of
# them, but not at the peak. The loop forgets them after each update, so that
# their memory is free while the next forward pass climbs, and the backward pass
# makes them anew while it gives activations back. They are part of the highest
# point only with a small batch, where the mountain is low.
#
# Now that the account is right, we may believe it for sizes that are tedious to
# measure:

# %% alt="Three stacked bars, bytes of memory with batches of 2, 4 and 16. Weights and optimizer, at the bottom, are as thick in each. Activations are the largest part of each bar and grow with the batch, as do the bands above them: dropout masks, last norm, logits and loss."
def at_the_peak(B):
    kinds = training.training_bytes(MOBY, B, 256)
    lasting = {kind: kinds[kind] for kind in ("weights", "optimizer")}
    return {**lasting, **training.step_bytes(MOBY, B, 256)}


sizes = {f"batch of {B}": at_the_peak(B) for B in (2, 4, 16)}
largest = sizes["batch of 16"]
fixed = largest["weights"] + largest["optimizer"]
share = 1 - fixed / sum(largest.values())
plotting.plot_training_bytes(
    sizes,
    title=f"With 16 passages, {share:.0%} grow with the batch",
);

# %% [markdown]
# *Weights and optimizer stay what they are. Activations, masks, norm and logits
# grow with every passage of 256 tokens. Gradients are not in the bars, for they
# are not there at the peak.*
#
# ### Half the bytes per number
#
# Large models are trained in **mixed precision**. The passes run in bfloat16,
# which has 2 bytes per number, and the optimizer works on float32 copies of the
# weights, the **masters**, since small updates would be lost in bfloat16.
# (`torch.autocast` is another way: the weights stay in float32, and are cast
# for each product.) What does that save?

# %%
bytes_per_weight = {
    "float32": {"weights": 4, "gradients": 4, "optimizer": 8},
    "mixed": {"weights": 2, "masters": 4, "gradients": 2, "optimizer": 8},
}
for name, kinds in bytes_per_weight.items():
    print(f"{name:8} {sum(kinds.values())} bytes per weight: {kinds}")

half_lm = copy.deepcopy(plain_lm).bfloat16()
half_cost = meter.measure(
    lambda: run_blocks(
        half_lm.blocks, half_lm.embed(batch), positions, attend_fused
    )
)
share = half_cost.saved_bytes / blocks_cost.saved_bytes
print(f"activations: {half_cost.saved_bytes:,} bytes, {share:.0%} of float32's")

# %% [markdown]
# It saves nothing on the side of the weights. Activations shrink, but not to
# half: torch's RMSNorm computes in float32 on a CPU, and keeps its input and
# one more vector in that precision.
#
# For a large model we can only compute what it would take. Llama 3 8B, one
# passage of 8,192 tokens, if all blocks keep their activations and every number
# of them is a bfloat16; and the logits, which the loss wants in float32:

# %%
llama = config.LLAMA3_8B
kinds = training.training_bytes(llama, 1, 8192)
gigabytes = {
    "weights, masters, gradients, optimizer": 16 * kinds["weights"] / 4,
    "activations of all blocks": kinds["activations"] / 2,
    "logits, once, in float32": 4 * 8192 * llama.vocab_size,
}
for name, num_bytes in gigabytes.items():
    print(f"{num_bytes / 1e9:6.1f} GB  {name}")

# %% [markdown]
# An H100 has 80 GB of memory. The first line has to be spread over several of
# them; the second is what the rest of this chapter is about.

# %% [markdown]
# ## A large batch in small parts
#
# The cheapest cure first. Training wants large batches, since the mean over
# many passages is a better gradient. But the gradient of a mean is the mean of
# the gradients, and `.backward()` *adds* to the gradients that are there. So a
# batch can go through the model in parts, one after the other: forward,
# backward, forward, backward. Only one part's activations are in memory at a
# time, and the gradients add up to those of the whole batch. This is called
# **gradient accumulation**.
#
# ### Exercise 2.3 · `accumulate_gradients` ★★ (15 minutes)
#
# Add the gradient of `training.next_token_loss` of the whole batch to each
# parameter's `.grad`, part by part, and return the loss as a number. Parts may
# differ in size: 7 passages in 3 parts are 3, 2 and 2, for example. You may
# call the model `num_parts` times at most, and keep only one part's activations
# in memory.

# %% exercise="accumulate_gradients" given="1"
from lib.training import accumulate_gradients

# %%
check(accumulate_gradients)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `batch.tensor_split(num_parts)` cuts a batch into nearly equal parts. The loss
# of a part is a mean over that part alone. What does it count for in the mean
# over the whole batch?
#
# </details>
# <details><summary>Hint 2</summary>
#
# Multiply each part's loss by `len(part) / B` before you go backward. Go
# backward inside the loop: after that the part's graph is gone.
#
# </details>

# %%
large = text.random_batch(train_ids, batch_size=8, seq_len=256)
for parameter in plain_lm.parameters():
    parameter.grad = torch.zeros_like(parameter)
gradients_of = {}
for num_parts in (1, 2, 4, 8):
    plain_lm.zero_grad(set_to_none=False)
    cost = meter.measure(
        lambda: training.accumulate_gradients(plain_lm, large, num_parts)
    )
    gradients_of[num_parts] = [p.grad.clone() for p in plain_lm.parameters()]
    pairs = zip(gradients_of[num_parts], gradients_of[1])
    difference = max((a - b).abs().max().item() for a, b in pairs)
    print(f"{num_parts} parts: peak {cost.peak_bytes / 1e6:5.1f} MB, ", end="")
    print(f"{cost.flops.total() / 1e9:.2f} GFLOPs, gradients ", end="")
    print(f"{difference:.0e} apart")

# %% [markdown]
# Half the memory, a quarter, an eighth, for the same work, and gradients that
# are equal up to rounding. Whoever runs out of memory should try this first. It
# ends at one passage per part: then a single passage has to fit.

# %% [markdown]
# ## Throw it away, and compute it again
#
# What if a block kept nothing but its input? When the backward pass gets there,
# it runs the block a second time from that input, keeps the inside now, uses
# it, and throws it away before it turns to the block before. Then the inside of
# *one* block is in memory at a time. The price is a second forward pass.
#
# For that we have to tell autograd how a gradient is to be found. An operation
# whose backward step we write ourselves is a **`torch.autograd.Function`**, a
# class of two functions. Here is one that squares its input:

# %%
class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad_out):
        (x,) = ctx.saved_tensors
        return 2 * x * grad_out


x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
out = Square.apply(x)
out.backward(torch.tensor([1.0, 1.0, 10.0]))
x.grad

# %% [markdown]
# `ctx`, the context, carries things from `forward` to `backward`. What
# `save_for_backward` puts in, `saved_tensors` gives back, as a tuple; anything
# else can be hung on it, as in `ctx.run = run`. `backward` gets the gradient of
# the loss with respect to the operation's *output*, and returns that with
# respect to each *input*, by the chain rule: here 2x times what came in. (`out`
# is no single number, so `out.backward` has to be told what the gradient of the
# loss with respect to it is.)
#
# In both functions autograd is off (unless somebody asks for the gradient of a
# gradient, which we leave out here): what they compute does not become part of
# any graph. `with torch.enable_grad():` switches it on again. One more word is
# needed: a **leaf** is a tensor at which a graph begins, such as a weight. The
# backward pass ends at leaves, and stores their gradient in `.grad`.
# `x.detach()` is a new leaf with the numbers of x, and `.requires_grad_()` says
# that it wants a gradient.
#
# So much for how; one thing is still needed to make it *exact*. Dropout draws
# random numbers, and the second run has to draw the same ones. Without dropout
# you would never notice.
#
# ### Exercise 2.4 · `checkpoint` ★★★ (30 minutes)
#
# `Checkpoint.forward` is given: autograd is off in there, so `run(x)` keeps
# nothing. Write `Checkpoint.backward`. It gets `grad_out`, the gradient with
# respect to the output of `run(x)`. It takes x from `ctx`, runs `ctx.run` again
# on a new leaf, with autograd on and inside `with use_random_state(x,
# ctx.random_state):`, which replays the dice. From the new output it goes
# backward. It returns one gradient for each input of `forward`, in their order:
# `None` for `run`, x's, and `None` for the empty tensor (a comment in
# `checkpoint` says why it is there). The parameters inside `run` get theirs in
# `.grad`, as ever. Gradients have to be those of a plain run, to the bit, with
# dropout and without. `torch.utils.checkpoint` is not allowed. (`Repeatable`,
# in the library, keeps autocast the same in both runs, and refuses some
# misuses, such as a `run` that uses other tensors of the graph than x.)

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
# `torch.autograd.backward(out, grad_out)` goes backward from `out`, as
# `out.backward(grad_out)` does. It adds to `.grad` of every parameter, and of
# the new leaf x.
#
# </details>

# %% [markdown]
# Now take a deep, narrow model of 16 blocks, and four ways to run them: keep
# all, or cut them into 1, 4 or 16 **segments** and checkpoint each. A step is
# the blocks alone here, with the sum of their output for a loss. First: are the
# gradients the same, with dropout?

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
    blocks, attend = deep_lm.blocks, attend_fused
    run(blocks, x, deep_positions, attend, *args).sum().backward()


# %%
def gradients(run, *args):
    deep_lm.zero_grad(set_to_none=False)
    torch.manual_seed(1)  # the same dropout for all
    deep_step(run, *args)
    return [parameter.grad.clone() for parameter in deep_lm.blocks.parameters()]


def is_equal_to_the_bit(run, *args):
    deep_lm.train()  # with dropout
    pairs = zip(gradients(run, *args), gradients(run_blocks))
    deep_lm.eval()
    return all(torch.equal(a, b) for a, b in pairs)


in_segments = checkpointing.checkpoint_segments
for k in (1, 4, 16):
    is_equal = is_equal_to_the_bit(in_segments, k)
    print(f"{k:2} segments: gradients equal to the bit: {is_equal}")

# %% [markdown]
# And the memory? From here on the deep model runs without dropout, whose masks
# would only blur the picture.

# %% alt="Memory alive, in bytes, over operations. Keep all is one high mountain. With 4 segments a line stays low, then makes four equal hills, far lower than the mountain. With 16 segments it climbs slowly, then makes sixteen hills, lower still. The lines with segments are longer."
keep_all = meter.measure(lambda: deep_step(run_blocks))
four = meter.measure(lambda: deep_step(in_segments, 4))
sixteen = meter.measure(lambda: deep_step(in_segments, 16))
plotting.plot_timelines(
    {
        "keep all": keep_all.timeline,
        "4 segments": four.timeline,
        "16 segments": sixteen.timeline,
    },
    title="The mountain becomes a row of hills, one per segment",
);

# %% [markdown]
# *Keeping all climbs once and falls once. With segments the forward pass climbs
# by one edge per segment, and the backward pass climbs one hill for each
# segment that it computes again. That takes more operations: the lines are
# longer.*

# %% [markdown]
# ## How many segments?
#
# Let b be the bytes of an **edge**, one x between two blocks, and A what a
# block keeps **inside**, its input included. With L blocks in k segments the
# backward pass is at its peak when it has run the last segment again. It holds
# k - 1 inputs of the segments before, the output of this one, and its inside,
# ⌈L/k⌉ blocks of A:
#
# > k·b + ⌈L/k⌉·A
#
# With few segments the inside is large, and with many there are many edges.

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
print([peak - guess for peak, guess in zip(peaks, predicted)], "bytes more")

# %% [markdown]
# The measured peak is the prediction and a constant, the same for every k.
# Where does it come from? The peak comes while the backward pass is in the MLP
# of the last block. There are three gradients of F = 192 numbers per token on
# their way back, of the product, of silu(gate) and of up, while the product
# itself has just been given back. That leaves two. And the loss, a sum, is one
# float, and so is its gradient:

# %%
2 * 4 * 128 * deep.d_ff * 4 + 8

# %% alt="Peak memory of one step, in bytes, over segments, k, from 1 to 16. It falls steeply up to 4 segments, then slowly; at 12 it is a little higher than at 8, and at 16 it is lowest. The dashed prediction, k·b + ⌈L/k⌉·A, runs in parallel just below."
plotting.plot_measured(
    {"measured": (ks, peaks)},
    predicted={"k·b + ⌈L/k⌉·A": (ks, predicted)},
    xlabel="segments, k",
    ylabel="peak memory of one step (bytes)",
    title="16 blocks: one block per segment holds least",
);

# %% [markdown]
# *Measured and predicted peak run in parallel, and are lowest at k = 16. At 12,
# which does not divide 16, the longest segment has two blocks, as at 8.*
#
# Where is the minimum? If we forget the rounding, k·b + (L/k)·A is smallest
# where both parts are equal, at k = √(L·A/b), and there it is 2·√(L·A·b). Four
# times the layers, about twice the best k and twice the best peak: **both grow
# like √L.**
#
# In the deep model √(16·A/b) is 18, but there are only 16 blocks to cut at. As
# long as k is held back like this, each block is a segment of its own and the
# peak is L·b + A. That grows like L, only slowly, since an edge is small.
#
# ### Exercise 2.5 · `best_num_segments` ★★ (10 minutes)
#
# Find the k with the lowest peak, by the formula with its rounding up, exactly.
# Of equally good ones, take the fewest. Given is
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
for L in (4, 16, 64, 256, 1024):
    best = checkpointing.best_num_segments(L, edge_bytes, block_bytes)
    peak = segments_peak_bytes(L, best, edge_bytes, block_bytes)
    every = segments_peak_bytes(L, L, edge_bytes, block_bytes)
    print(f"L = {L:4}: {best:3} segments, {peak / 1e6:5.1f} MB ", end="")
    print(f"(one per block: {every / 1e6:5.1f} MB)")
last = max(
    L
    for L in range(1, 200)
    if checkpointing.best_num_segments(L, edge_bytes, block_bytes) == L
)
print(f"one block per segment is best up to {last} layers")

# %% [markdown]
# From 64 layers on, four times the layers need about twice the memory. Up to
# about twice A/b, here 43 layers, one block per segment is best. (Segments of
# two blocks would save half of the edges, L/2 of them, and cost one more
# inside. That pays once L/2 edges weigh more than one inside.) The table at the
# end uses k = √L, which needs no A and b: its peak, √L·(A + b), also grows like
# √L.

# %% [markdown]
# ## Spend what you have
#
# Recomputing *all* blocks may be more than you need. If the memory has room for
# a few insides, keep those and save the work. Keep the **last** blocks: the
# backward pass begins there, so by the time it has to run an earlier block
# again, their insides are gone. So keeping the last block alone costs nothing:
# room for one inside is needed anyway.
#
# What else needs room? The gradients on their way back, as we saw above. It is
# enough to measure that once, on two blocks, one of them checkpointed. Call it
# W, the working memory.

# %%
keep_last = checkpointing.keep_last_blocks


def two_blocks():
    x = deep_lm.embed(deep_batch)
    blocks, attend = deep_lm.blocks[:2], attend_fused
    keep_last(blocks, x, deep_positions, attend, 1).sum().backward()


working_bytes = meter.measure(two_blocks).peak_bytes - edge_bytes - block_bytes
print(f"W = {working_bytes:,} bytes, ", end="")
print(f"{working_bytes / edge_bytes:.1f} edges")

# %% [markdown]
# (It is one edge more than above: while the checkpointed block is run again,
# the gradient that came out of the block after it is waiting.)
#
# ### Exercise 2.6 · `blocks_to_keep` ★★ (10 minutes)
#
# A checkpointed block costs its edge, and a kept one its inside, which includes
# its own edge (and may be nothing else: then the two are equal). W comes on
# top, once. How many blocks can be kept within the budget? The lines that raise
# `ValueError` if not even one fits are given.

# %% exercise="blocks_to_keep" given="1"
from lib.checkpointing import blocks_to_keep

# %%
check(blocks_to_keep)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# One kept block takes (L - 1)·b + A + W. Each further one adds an inside and
# saves an edge.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Never keep more blocks than there are, and compute with whole numbers: `//`
# rounds down exactly, `/` makes a float. Inside and edge may be equally large.
#
# </details>

# %%
budget = 20_000_000
kept = checkpointing.blocks_to_keep(
    16, edge_bytes, block_bytes, working_bytes, budget
)
for n in (0, 1, kept, kept + 1, 16):
    cost = meter.measure(lambda: deep_step(keep_last, n))
    fits = "fits" if cost.peak_bytes <= budget else "does not fit"
    print(f"keep {n:2} blocks: {cost.peak_bytes:10,} bytes measured, ", end="")
    print(f"{cost.calls['Block']} block calls: {fits}")

# %% [markdown]
# The budget is met by the measured step, and one block more would break it.
# (From two kept blocks on the rule is one edge too careful: at the peak no
# gradient is waiting between blocks.) And the first line shows that keeping no
# block saves nothing: the peak is that of keeping one.

# %% [markdown]
# ## Halve, and halve again
#
# Segments cut once. We can cut again inside each of them, and again: checkpoint
# the first half of the blocks as one piece, go into the second half, and treat
# each half the same way. Here are eight blocks, in the order in which they run:

# %% alt="A schedule: blocks 1 to 8 upwards, time to the right. Forward calls climb from 1 to 8; backward calls come down from 8 to 1, each right after a forward call that keeps the inside. Between them 5, then 1 to 3, then 1 run again, inside thrown away. Lines are edges that wait: after 4, after 6, later after 2."
drawing.draw_schedule(
    checkpointing.checkpoint_recursive,
    num_blocks=8,
    title="Eight blocks, halved three times: 20 forward calls",
);

# %% [markdown]
# *Follow the columns. The first eight are the forward pass: it keeps the edges
# after block 4 and after block 6, and the inside of block 8. The backward pass
# finishes 8. It runs 7 again, from the edge after 6, and finishes it; then it
# runs 5 and 6 again, from the edge after 4, and so on. For the first half it
# runs 1 to 4 again from the input, this time keeping the edge after 2. (The
# lines that begin in columns 13, 20 and 25 are what such a second run gives:
# its result stays until the backward pass is through with the run.)*
#
# At any time there are about two edges for each halving, the one that it keeps
# and a result or gradient that waits, so about 2·log₂ L of them, and the inside
# of one block. The work is L block calls for the forward pass, and L/2 more for
# each halving, since each halving runs its first half once more.
#
# ### Exercise 2.7 · `checkpoint_recursive` ★★★ (20 minutes)
#
# Memory O(log L), in L + (L/2)·log₂ L block calls. The halving ends at one
# block: run it there, and keep its inside. (As a first half it has a checkpoint
# around it already. The check allows L calls more, for answers that checkpoint
# that last block too.) Use `checkpointing.checkpoint`, which is yours if it has
# passed. Torch's own is not allowed.

# %% exercise="checkpoint_recursive"
from lib.checkpointing import checkpoint_recursive

# %%
check(checkpoint_recursive)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# If there is one block, run it. If there are more, the first half goes through
# `checkpoint`, as a function of x that calls `checkpoint_recursive` on it.
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
    tall = Transformer(ModelConfig(**{**vars(deep), "num_layers": L})).eval()
    for parameter in tall.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for name, run in ways.items():
        x = torch.randn(1, 64, 64, requires_grad=True)
        step = lambda: run(tall.blocks, x, torch.arange(64), attend_fused)
        cost = meter.measure(lambda: step().sum().backward())
        peaks[name].append(cost.peak_bytes)

# %% alt="Log-log plot: peak memory of one step, in bytes, over layers, L: 4, 16 and 64. Keep all rises with slope 1, √L segments with slope ½, and recursive, the lowest line, is nearly flat."
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
# ## Recompute only what is cheap
#
# A checkpoint computes everything again, and most of that work is in matrix
# products. But much of the *memory* is not: look once more at the list of what
# a block saves, under *What autograd keeps*. What the norms save, silu(gate),
# and silu(gate)·up need no product to come back: they are made from what is
# kept anyway, number by number, with one mean per token for a norm. Which share
# of a block's bytes are they?

# %%
cheap = [
    num_bytes
    for made_by, shape, num_bytes in block_cost.saved
    if made_by.lstrip("_") in ("rsqrt", "mul", "silu")
]
share = sum(cheap) / (block_cost.saved_bytes + 4 * 256 * MOBY.d_model)
print(f"{share:.0%} of what a block keeps is cheap to make again")

# %% [markdown]
# Why are they kept at all? Because a matrix comes next. Let h be a matrix with
# one row per token. The gradient of M in `y = h @ M.T` is `grad_y.T @ h`, so
# its backward needs h; and the gradient of h is `grad_y @ M`, which needs no h.
# So let a product keep what its input was *made from*, and make the input again
# when the backward pass gets there. This is called **selective recomputation**.
# (Korthikanti and others, who named it, recompute attention's scores, which a
# fused kernel never keeps anyway. Our choice is another one, in their spirit.)
#
# ### Exercise 2.8 · `checkpoint_selective` ★★★ (25 minutes)
#
# The operation computes `h = run(*inputs)` and then `h @ weight.T` for each of
# several weights: one norm feeds the three projections of attention, and
# another feeds gate and up. `SelectiveCheckpoint.forward` is given: it keeps
# inputs and weights, and h is gone. Write `backward`, where one gradient comes
# in for each product. It makes h again, with autograd on, from new leaves;
# finds the gradient of each weight and, as a sum over the products, that of h;
# and goes backward from h to the inputs (what `run` itself learns, a norm's
# gain, gets its gradient on the way). It returns `None` for `run` and
# `num_inputs`, the gradients of the inputs, and those of the weights. No
# product may be computed again. Inputs have one dimension or more before their
# last, as (T, C) or (B, T, C). (`guarded`, in the library, refuses some
# misuses, such as random numbers in `run`.)

# %% exercise="checkpoint_selective" given="forward checkpoint_selective"
from lib.checkpointing import SelectiveCheckpoint, checkpoint_selective

# %%
check(checkpoint_selective)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `ctx.saved_tensors[: ctx.num_inputs]` are the inputs, the rest the weights.
# For the gradient of a weight, tokens of all passages are rows of one matrix:
# `grad.flatten(0, -2).T @ h.flatten(0, -2)` is (out, in), as the weight.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The gradient of h is the sum of `grad @ weight` over the products. Hand it to
# `torch.autograd.backward(h, ...)`; then each leaf has its `.grad`.
#
# </details>

# %% [markdown]
# `run_blocks_selective`, in the library, runs blocks with it, on the deep model
# and here:

# %%
selective = checkpointing.run_blocks_selective
pairs = zip(gradients(selective), gradients(run_blocks))
difference = max((a - b).abs().max() / b.abs().max() for a, b in pairs)
print(f"gradients: at most {difference:.0e} apart, relative to the largest")
some = meter.measure(lambda: deep_step(selective))
for name, cost in {"all kept": keep_all, "selective": some}.items():
    print(f"{name:9} peak {cost.peak_bytes:,} bytes, ", end="")
    print(f"{cost.flops.total():,} FLOPs")
share = 1 - some.peak_bytes / keep_all.peak_bytes
print(f"{share:.0%} less memory")

# %% [markdown]
# No product more than before. The peak falls by less than the share above,
# since the backward pass needs some room to work in.

# %% [markdown]
# ## Torch's own
#
# `torch.utils.checkpoint.checkpoint` is what you would use tomorrow, and by now
# you know what is in it. It comes in two kinds. `use_reentrant=True` is a
# `Function` whose backward goes backward itself, as ours. `use_reentrant=False`
# is newer, and what torch recommends: it replaces every tensor that would be
# saved by a note, and computes the segment again when the first of them is
# asked for. It works with `torch.autograd.grad` too, and its second run stops
# as soon as the last tensor that is needed is there, so that the segment's
# output, an edge, is not made again.

# %%
def by_torch(use_reentrant):
    def run(blocks, x, positions, attend):
        for block in blocks:
            x = torch.utils.checkpoint.checkpoint(
                block, x, positions, attend, use_reentrant=use_reentrant
            )
        return x

    return run


for name, (run, *args) in {
    "ours": (in_segments, 16),
    "torch's, reentrant": (by_torch(True),),
    "torch's, not reentrant": (by_torch(False),),
}.items():
    cost = meter.measure(lambda: deep_step(run, *args))
    print(f"{name:23} peak {cost.peak_bytes:,} bytes, ", end="")
    print(f"{cost.flops.total() / 1e9:.3f} GFLOPs, ", end="")
    print(f"equal with dropout: {is_equal_to_the_bit(run, *args)}")

# %% [markdown]
# ## What it costs
#
# Memory and work are counted. Time is measured, on your machine: the ways take
# turns, and these are medians of five steps each.

# %%
ways = {
    "keep all": (run_blocks,),
    "selective": (selective,),
    "4 segments": (in_segments, 4),
    "16 segments": (in_segments, 16),
    "recursive": (checkpointing.checkpoint_recursive,),
}
seconds = meter.medians_in_turns(
    {
        name: lambda run=run, args=args: deep_step(run, *args)
        for name, (run, *args) in ways.items()
    }
)
for name, (run, *args) in ways.items():
    cost = meter.measure(lambda: deep_step(run, *args))
    work = cost.flops.total() / keep_all.flops.total()
    memory = cost.peak_bytes / keep_all.peak_bytes
    times = seconds[name] / seconds["keep all"]
    print(f"{name:12} {1000 * seconds[name]:4.0f} ms ", end="")
    print(f"({times:.2f} times as long), ", end="")
    print(f"{work:.2f} times the FLOPs, {memory:.2f} of the memory")

# %% [markdown]
# In FLOPs, a backward pass is about two forward passes, since each product has
# two gradients. So plain training is worth three forward passes, and one more
# is a third more work (a little less, since attention's backward is worth more
# than two). Time follows only roughly. In a model as narrow as this one, what
# is no product (norms, silu, rotations, the calls themselves) takes much of the
# time, and is done again too. And the numbers differ from run to run, more so
# if your machine does other things meanwhile. Recursion saves little memory
# here: its edges are few, but one inside weighs as much as twenty of them.
# Whether any of this is a bargain depends on what you lack.

# %% [markdown]
# ## Two columns of the table
#
# Training, with fused attention, keeps N·L. With √L segments it keeps N·√L.
#
# Here N is the number of tokens of a passage. The table writes the work as 2 N²
# L, and the 2 needs a word. It counts *forward passes*: a checkpointed step
# goes through the blocks forward twice. It does not mean twice the work. We
# measure it in FLOPs, as 1 + (checkpointed - plain) / forward. After the
# exponents, each cell below gives the cost, the FLOPs over those of plain
# training: one pass more on top of three, 1.33 times. (For attention it is 9/7,
# about 1.29, since torch's fused backward computes five products, and not
# four.) The row of forward calls counts calls of the model, one for each step;
# the second pass shows in the block calls.

# %%
columns = ("training", "checkpointed")
cells = [cell for name in columns for cell in table.fit(table.sweep(name))]
Markdown(table.render(cells))

# %%
check.summary()

# %% [markdown]
# ## What is still wrong
#
# The model that we trained still generates by recompute, and throws away keys
# and values that never change. There the bargain goes the other way round: keep
# a little, and a whole forward pass over the text becomes one over a single
# token. That is chapter 3.
#
# ## In five sentences
#
# 1. Training holds weights, gradients, two more floats per weight for AdamW,
#    and the activations that operations save for their backward steps, which
#    grow with tokens times layers and outweigh the rest in a small model, or
#    with a large batch.
# 2. A batch can go through the model in parts: the memory of one part, the same
#    work, the same gradients.
# 3. A checkpoint keeps the input of a segment and computes its inside again,
#    with the same random numbers: the same gradients for one more forward pass,
#    a third more work.
# 4. k segments hold k·b + ⌈L/k⌉·A, which at its best grows like √L once there
#    are more than about 2·A/b layers, and like L·b + A before; halving again
#    and again grows like log L.
# 5. Nearly half of what a block keeps can be made again without any matrix
#    product.
#
# ## Do you recall?
#
# 1. A batch of 3 passages of 10 tokens: how many predictions is the loss the
#    mean of?
# 2. An operation `y = x + 1` saves nothing. Why may y be in the list of saved
#    tensors all the same?
# 3. What goes wrong if the random state is not put back, and when does nobody
#    notice?
# 4. Your blocks have insides of 20 edges. You have 12 layers. How many
#    segments?
# 5. Why does keeping the *last* block cost nothing extra?
# 6. A batch of 7 goes through the model in parts of 4 and 3. What must each
#    part's mean loss be multiplied by?
#
# <details><summary>Answers</summary>
#
# 1. 27: in each passage the last row predicts nothing.
# 2. The operation after it may need y: what is saved is made by one operation
#    and kept for the next.
# 3. The second run drops other numbers than the first, so the gradients belong
#    to a network that never was; without dropout all is well.
# 4. 12: √(12·20) is more than 12, so one block per segment.
# 5. Room for the inside of one block is needed anyway, when an earlier one is
#    computed again; by then the last one's is free.
# 6. By 4/7 and 3/7.
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
#   activations of a transformer layer, counted, and selective recomputation.
# - Micikevicius and others, *Mixed Precision Training*, 2017,
#   [1710.03740](https://arxiv.org/abs/1710.03740): masters in float32.
# - Loshchilov and Hutter, *Decoupled Weight Decay Regularization*, 2017,
#   [1711.05101](https://arxiv.org/abs/1711.05101): AdamW.
