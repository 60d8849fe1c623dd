# %% [markdown]
# # 9. A state instead of a cache: a memory that does not grow
#
# Every cache so far keeps tokens: all of them, in fewer bytes each, or a chosen
# few. This chapter keeps none. It leaves one thing out of attention, the
# softmax, and then all that was read fits into one matrix per head, whose size
# never changes. That is where attention meets the state-space models: Mamba,
# RetNet and their relatives. We shall write such a memory in three forms that
# compute the same, find out how much it can hold, and see why the best models
# of this kind keep a little attention beside it. At the end, all memories of
# this course stand in one table and one plot.
#
# **You need:** chapters 1 and 3; for the closing pages, all others. 170
# minutes. No GPU.
#
# **You will be able to**
#
# - turn attention without a softmax into a state that is updated token by
#   token, and back,
# - read a state-space model's h ← a h + b x, y = c h term by term in it,
# - compute it step by step, in parallel and in chunks, and say what each costs,
# - say from which length on a cache is larger than a state,
# - measure how many facts a state holds, and repair it with the delta rule,
# - say where Mamba, RetNet, GLA, DeltaNet and RWKV stand in this picture, and
#   why a window beside a state is worth so much.

# %%
import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from IPython.display import Markdown

from lib import generate, kv_cache, recall, state, text
from lib.config import LLAMA3_8B, ModelConfig, check_count
from lib.figures import plotting
from lib.kv_cache import ContiguousKVCache, KVFormat
from lib.latent_kv_cache import latent_format, record_kv
from lib.measure import bench_state, meter, table
from lib.measure.quality import Examples, measure_quality, passages
from lib.model import Transformer
from lib.pruning import HeavyHitters, PrunedKVCache, Recent, Snap
from lib.quantized_kv_cache import QuantizedFormat, dequantize, quantize
from lib.course import capstone
from lib.course.check import check
from lib.state import Delta, Linear, StateCache, Window

plotting.use_course_style()
torch.set_num_threads(1)  # steadier timings

# %% [markdown]
# ## A text of any length, in 16 MiB
#
# The cache of Llama 3 8B takes 128 KiB per token, in 16 bits. If each of its KV
# heads had a state instead, a matrix of 128 by 128 numbers in 32 bits, it would
# take this much:

# %%
D, G, L = LLAMA3_8B.head_dim, LLAMA3_8B.num_kv_heads, LLAMA3_8B.num_layers
state_mib = L * G * D * D * 4 / 2**20
for num_tokens in (128, 1_000, 8_192, 131_072):
    num_bytes = kv_cache.kv_cache_bytes(LLAMA3_8B, num_tokens, 2)
    print(f"{num_tokens:7,} tokens: cache {num_bytes / 2**20:8,.0f} MiB, "
          f"state {state_mib:.0f} MiB")

# %% [markdown]
# So a state is as large as a cache of 128 tokens, and smaller than any longer
# one. It cannot know as much. What can it know?
#
# ## Leave the softmax out
#
# Attention gives the query of token t a mean of the values before it, weighted
# by the softmax of q · k. Leave the softmax out, and the weights are the
# products themselves:
#
#     out_t = (q_t · k_1) v_1 + (q_t · k_2) v_2 + ... + (q_t · k_t) v_t
#
# Now (q · k) v is the same as (v kᵀ) q: v kᵀ is a matrix, each number of v
# times each number of k, and a matrix times q is a vector. In every term the
# same q_t stands at the right. Take it out of the sum:
#
#     out_t = (v_1 k_1ᵀ + v_2 k_2ᵀ + ... + v_t k_tᵀ) q_t = S_t q_t
#
# The sum S_t needs no query to be computed, and the next one is S_t and one
# term more. So S is all that must be kept. With the softmax this does not work:
# exp(q · k) is no product of something of q and something of k, so all keys
# must be there when the query comes.
#
# By hand, with keys and values of two numbers. Three tokens are read:
#
# | | k | v | v kᵀ | S then |
# |---|---|---|---|---|
# | 1 | (1, 0) | (3, 4) | 3 0 / 4 0 | 3 0 / 4 0 |
# | 2 | (0, 1) | (5, 6) | 0 5 / 0 6 | 3 5 / 4 6 |
# | 3 | (1, 0) | (1, 1) | 1 0 / 1 0 | 4 5 / 5 6 |
#
# (A slash begins the second row of a matrix.) Asked with q = (0, 1), S answers
# (5, 6), the value that was told with this key: the state is a memory that can
# be asked. Asked with (1, 0), it answers (4, 5): the *sum* of the two values
# told with this key. And (0.6, 0.8), which was never told, gets some of each.
#
# ### Exercise 9.1 · `linear_step` ★★ (20 minutes)
#
# One token. The state (G, D, D) first decays: each head's matrix is multiplied
# by a number of its own, `decay` (G,), from above 0 to 1; 1 forgets nothing.
# Then it takes in v kᵀ, so that row i of the state makes number i of the
# output. Then it answers the queries q (H, D), the token's own value included.
# As in chapter 3, query head h reads KV head `h // (H / G)`. Return out (H, D)
# and the new state; leave the old one as it is.

# %% exercise="linear_step"
from lib.state import linear_step

# %%
check(linear_step)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `v.unsqueeze(-1) * k.unsqueeze(-2)` has shape (G, D, D). Which of its two last
# dimensions belongs to v? To multiply a state by its head's decay, give the
# decay two more dimensions.
#
# </details>
# <details><summary>Hint 2</summary>
#
# For the answers, bring q to (G, H / G, D) with `unflatten(0, (G, -1))`. Then
# `torch.einsum("gij,ghj->ghi", state, q)`, and flatten the first two dimensions
# again.
#
# </details>

# %%
tokens = torch.tensor([
    [[1.0, 0.0], [3.0, 4.0]],
    [[0.0, 1.0], [5.0, 6.0]],
    [[1.0, 0.0], [1.0, 1.0]],
])  # of each token k and v
for gamma in (1.0, 0.5):
    S = torch.zeros(1, 2, 2)
    for k, v in tokens.unsqueeze(2):
        out, S = state.linear_step(S, k, k, v, torch.tensor([gamma]))
    print(f"decay {gamma}: asked with the last key: {out[0].tolist()}")

# %% [markdown]
# With decay 0.5, what was told two tokens ago counts a quarter, so the answer
# is (1 + 3 / 4, 1 + 4 / 4). The newest value counts most.
#
# ## A state-space model, term by term
#
# A **state-space model** has a state h, which takes in an input x and gives an
# output y at each step:
#
#     h ← a h + b x        y = c h
#
# It comes from control theory, where h may be the position and the speed of a
# thing and x the force on it. Set it beside what you have written:
#
# | state-space model | here | is |
# |---|---|---|
# | h | S | the state, a D × D matrix per head |
# | a | γ | how much of it is left after a token |
# | x | v | what the token tells |
# | b | k | where in the state it is written |
# | c | q | where it is read |
# | y | out | the answer |
#
# Row i of the state is a state-space model of its own: its input is the one
# number v_i, its state has D numbers, and all rows share b, c and a. In the
# older models, such as S4, a, b and c are constants, the same for each token,
# so that what is written where cannot depend on what was read. Here b and c
# depend on the token, since keys and queries are computed from it. In Mamba (Gu
# and Dao, 2023) all three depend on it; that is why its authors call it
# *selective*.
#
# ### Exercise 9.2 · `decay_mask` ★★ (15 minutes)
#
# Of what token s has written, γ^(t - s) is left at token t. Make a table of
# this for all t and s below T, for each head: (G, T, T), row t, column s. Token
# t has not seen the tokens after it, so there stands 0. T may be several
# thousand, and no number of the result may be infinite or NaN.

# %% exercise="decay_mask"
from lib.state import decay_mask

# %%
check(decay_mask)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `t = torch.arange(T)` and `t.unsqueeze(-1) - t` has all distances. Which of
# them are of tokens that are still to come?
#
# </details>
# <details><summary>Hint 2</summary>
#
# A negative power of 0.5 grows beyond all numbers. Raise to
# `distance.clamp(min=0)` and multiply by `distance >= 0`. Give the decay two
# more dimensions before.
#
# </details>

# %%
state.decay_mask(torch.tensor([1.0, 0.5]), 4)

# %% [markdown]
# With γ = 1 that is the causal mask of chapter 1, with ones instead of minus
# infinities. So there must be a way to compute all outputs at once, as training
# does:
#
# ### Exercise 9.3 · `linear_parallel` ★★ (20 minutes)
#
# The outputs of `linear_step` for all tokens of a text, from an empty state,
# without a loop over tokens: out = (Q Kᵀ ∘ M) V, where M is the mask, and ∘
# multiplies number by number. No softmax, and no division. q (..., T, H, D);
# k and v (..., T, G, D), where `...` may be any batch dimensions, or none.
# Return (..., T, H, D).

# %% exercise="linear_parallel"
from lib.state import linear_parallel

# %%
check(linear_parallel)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Bring heads before tokens. With `k.repeat_interleave(H // G, dim=-2)` (and so
# for v and the mask) each query head has its own; then `transpose(-3, -2)`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Of q and k (..., H, T, D), `q @ k.transpose(-1, -2)` has the scores (..., H,
# T, T). Multiply by the mask (H, T, T), then `@ v`, and bring the tokens before
# the heads again.
#
# </details>

# %%
def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw_heads(T, H=4, G=2, D=16, seed=0):
    """q (T, H, D), k and v (T, G, D) in float64; queries and keys of length
    1."""
    q, k, v = (
        torch.randn(T, n, D, generator=seeded(seed + n), dtype=torch.float64)
        for n in (H, G, G + H)
    )
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v[:, :G]


def step_by_step(q, k, v, decay):
    S = k.new_zeros(k.shape[1], k.shape[2], k.shape[2])
    outs = []
    for q_t, k_t, v_t in zip(q, k, v):
        out, S = state.linear_step(S, q_t, k_t, v_t, decay)
        outs.append(out)
    return torch.stack(outs), S


decay = torch.tensor([0.97, 1.0], dtype=torch.float64)
q, k, v = draw_heads(200)
stepped, last_state = step_by_step(q, k, v, decay)
difference = stepped - state.linear_parallel(q, k, v, decay)
print(f"200 tokens, step by step and at once: {difference.abs().max():.0e}")

# %% [markdown]
# The same numbers, out of a recurrence and out of a masked product. The authors
# of Mamba-2 (Dao and Gu, 2024) call this **structured state-space duality**: a
# model of this kind is an RNN when it writes, and attention when it is trained.
#
# Why can this product be had without T² work? Cut the lower left part of M ∘ (Q
# Kᵀ) out, the rows from t on and the columns before t: the weights with which
# *all* later tokens read *all* earlier ones. How many independent rows has that
# block?

# %%
weights = (q[:, 0] @ k[:, 0].T) * state.decay_mask(decay[:1], 200)[0]
softmaxed = (
    (4 * q[:, 0] @ k[:, 0].T)
    .masked_fill(weights == 0, float("-inf"))
    .softmax(dim=-1)
)
for t in (50, 100, 150):
    ranks = [
        torch.linalg.matrix_rank(w[t:, :t]).item() for w in (weights, softmaxed)
    ]
    print(f"rows from {t}, columns before: rank {ranks[0]} without softmax, "
          f"{ranks[1]} with it")

# %% [markdown]
# At most D = 16, wherever you cut. A matrix whose blocks below the diagonal all
# have a low rank is called **semiseparable**. Its rank is at most the number of
# columns of the state, for a row of the state has D numbers, and they are all
# that later queries can read of what came before. The softmax destroys that:
# its blocks have the full rank, so no sum of v kᵀ of fixed size can stand for
# the past exactly.
#
# ## In chunks
#
# The product costs T² work, and the loop is slow on any machine that likes
# large matrices. The blocks show a third way, between the two.
#
# ### Exercise 9.4 · `linear_chunked` ★★★ (40 minutes)
#
# Cut the text into chunks of `chunk_size` tokens (the last may be shorter). A
# chunk's outputs have two parts:
#
# - **within**: what its tokens say to each other, which is `linear_parallel`
#   of the chunk;
# - **across**: what the state before the chunk answers. At token i of the
#   chunk, counted from 1, γ^i of it is left.
#
# And after a chunk of n tokens the state is γ^n of what it was, and γ^(n - i)
# of v kᵀ of each of its tokens, summed: once per chunk, in one product, not
# token by token. Begin with the state you are given. Return out (T, H, D) and
# the last state. There are no batch dimensions here; T may be 0. (Inside the
# function `state` is its argument and not the module: call your
# `linear_parallel` by that name alone.) The given lines refuse a chunk_size
# below 1 and begin the list of outputs with an empty one.

# %% exercise="linear_chunked" given="1"
from lib.state import linear_chunked

# %%
check(linear_chunked)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `zip(*(x.split(chunk_size) for x in (q, k, v)))` gives the chunks. Of a chunk
# of n tokens, `age = torch.arange(1, n + 1)`. `decay ** age.unsqueeze(-1)` is
# (n, G): what is left of the state before, at each token. What is left of each
# token at the end of the chunk?
#
# </details>
# <details><summary>Hint 2</summary>
#
# Across: scale the queries by what is left, not the state: q of the chunk as
# (n, G, H / G, D), times (n, G, 1, 1), then
# `torch.einsum("gij,tghj->tghi", state, ...)`. The new term of the state:
# `torch.einsum("tgi,tgj->gij", v_c * after.unsqueeze(-1), k_c)`.
#
# </details>

# %%
S = torch.zeros(2, 16, 16, dtype=torch.float64)
for chunk_size in (1, 7, 64, 1000):
    out, S_after = state.linear_chunked(S, q, k, v, decay, chunk_size)
    off = max((out - stepped).abs().max(), (S_after - last_state).abs().max())
    print(f"chunks of {chunk_size:4}: {off:.0e}")

# %% [markdown]
# One result, three forms. Which form for what? The work of one head with D =
# 64, counted:

# %%
def work(form, T, chunk_size=64):
    q, k, v = (torch.randn(T, 1, 64) for _ in range(3))
    one, S = torch.ones(1), torch.zeros(1, 64, 64)
    forms = {
        "step by step": lambda: step_by_step(q, k, v, one),
        "in chunks of 64": lambda: state.linear_chunked(
            S, q, k, v, one, chunk_size
        ),
        "at once": lambda: state.linear_parallel(q, k, v, one),
    }
    return meter.measure(forms[form])


lengths = (64, 256, 1024)
costs = {
    form: [work(form, T) for T in lengths]
    for form in ("step by step", "in chunks of 64", "at once")
}
print("tokens           " + "".join(f"{T:15,}" for T in lengths))
for form, measured in costs.items():
    flops = "".join(
        f"{sum(cost.flops.values()) / 1e6:9.1f} MFLOP" for cost in measured
    )
    peaks = "".join(f"{cost.peak_bytes / 1e3:12,.0f} KB" for cost in measured)
    print(f"{form:16} {flops}\n{'':16} {peaks}")

# %% [markdown]
# (Products of matrices are counted. A step updates its state number by number,
# which is not counted, and is about as much work again.)
#
# Step by step is little work, but it comes in T small pieces that wait for each
# other, which is slow unless one kernel runs the whole loop, as RWKV's do. At
# once is one large product that grows with T², in work and in memory. In
# chunks, it is more work than in steps, four times as much as counted here; but
# it grows with T, and comes in products large enough for a processor, or for a
# GPU's tensor cores. So a model learns and reads its prompt in chunks, and
# writes step by step.
#
# ## Writing what is not there yet
#
# In the hand example, the key (1, 0) was told twice, and the state answered
# with the sum. Keys also disturb each other if they are merely similar: asked
# for k, the state also gives what was told with k', weighted by k · k'. The
# **delta rule** asks the state first what it already says of the key, and
# writes the difference:
#
#     S ← S + (v - S k) kᵀ
#
# If k has length 1, then S k = v afterwards, whatever it was before. It is the
# rule by which a single linear layer learns: its error is v - S k, and adding
# (v - S k) kᵀ is one step of gradient descent on half the squared error. So the
# state is a small network that learns the text while it is read.
#
# ### Exercise 9.5 · `delta_step` ★★ (20 minutes)
#
# One token by the delta rule, without decay: the state (G, D, D) takes in what
# it does not say of k yet, then it answers the queries. Shapes and result as
# with `linear_step`; k has length 1. Leave the old state as it is.

# %% exercise="delta_step"
from lib.state import delta_step

# %%
check(delta_step)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# What the state says of k is one query per KV head: shape (G, D).
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.einsum("gij,gj->gi", state, k)`. From there on it is `linear_step`
# with another value and no decay.
#
# </details>

# %%
S = torch.zeros(1, 2, 2)
for k, v in tokens.unsqueeze(2):
    out, S = state.delta_step(S, k, k, v)
print(f"asked with the last key, told twice: {out[0].tolist()}")

# %% [markdown]
# The newest value alone, and nothing of the first. This can be computed at once
# and in chunks too. What a token writes, u_t = v_t - S_{t-1} k_t, depends on
# what the tokens before it wrote: u_t = v_t - Σ (k_s · k_t) u_s over s < t.
# These are T equations for T unknown vectors. Their matrix has the products k_s
# · k_t below the diagonal and ones on it, so they can be solved from the first
# to the last, and torch does it in one call (`delta_parallel` in
# `lib/state.py`; Yang and others, 2024). The rest is `linear_parallel` with u
# for v:

# %%
q, k, v = draw_heads(200)
S, stepped = torch.zeros(2, 16, 16, dtype=torch.float64), []
for q_t, k_t, v_t in zip(q, k, v):
    out, S = state.delta_step(S, q_t, k_t, v_t)
    stepped.append(out)
off = torch.stack(stepped) - state.delta_parallel(q, k, v)
print(f"delta rule, step by step and at once: {off.abs().max():.0e}")

# %% [markdown]
# ## How many facts fit into a matrix?
#
# No model and no training: we tell a state of 32 by 32 numbers P random keys of
# length 1, each with a random value, and ask for each of them. The error is the
# length of what is wrong with an answer, squared, over that of the value,
# squared: 0 is perfect, and 1 is as bad as no answer. On the right, all keys
# are told once more with other values, in the same order, and the new ones are
# asked for. (Softmax attention keeps everything, and its keys and queries are
# not shortened to length 1.)

# %% alt="Two plots: error of an answer over pairs told to a state, from 1 to 64. Told once: all rise from 0, softmax least, the sum most. Told twice: the sum is highest and rises steeply; decay 0.97 stays near 1, softmax near a half; the delta rule begins at 0, lowest, and crosses softmax after 16 pairs."
def tell_and_ask(rule, num_pairs, again, seed, D=32):
    """Mean error of P answers."""
    keys, first, new = torch.randn(
        3, num_pairs, 1, D, generator=seeded(seed)
    )  # (P, 1, D) each
    k, v = (torch.cat([keys, keys]), torch.cat([first, new]))
    right = new if again else first
    if not again:
        k, v = keys, first
    if rule == "softmax":
        scores = keys[:, 0] @ k[:, 0].T / D**0.5
        out = scores.softmax(dim=-1) @ v[:, 0]
    else:
        k = F.normalize(k, dim=-1)
        S = torch.zeros(1, D, D)
        if rule == "delta rule":
            _, S = state.delta_chunked(S, k, k, v)
        else:
            decay = torch.tensor([0.97 if rule == "decay 0.97" else 1.0])
            _, S = state.linear_chunked(S, k, k, v, decay)
        out = k[-num_pairs:, 0] @ S[0].T
    wrong = (out - right[:, 0]).square().sum() / right.square().sum()
    return wrong.item()


pairs = (1, 2, 4, 8, 16, 32, 64)
errors = {
    panel: {
        rule: [
            [tell_and_ask(rule, P, again, seed) for seed in range(5)]
            for P in pairs
        ]
        for rule in ("softmax", "sum", "decay 0.97", "delta rule")
    }
    for panel, again in (("each key told once", False), ("told twice", True))
}


def at(panel, rule, num_pairs):
    draws = errors[panel][rule][pairs.index(num_pairs)]
    return sum(draws) / len(draws)


plotting.plot_bands(
    {
        panel: {rule: (pairs, draws) for rule, draws in by_rule.items()}
        for panel, by_rule in errors.items()
    },
    xlabel="pairs told to a 32 × 32 state",
    ylabel="error of an answer",
    title=(
        f"16 keys told twice: error {at('told twice', 'sum', 16):.2f} with the "
        f"sum, {at('told twice', 'delta rule', 16):.2f} with the delta rule"
    ),
    log_x=True,
);

# %%
for panel in errors:
    print(f"{panel:20}" + "".join(f"{P:6}" for P in pairs))
    for rule in errors[panel]:
        cells = "".join(f"{at(panel, rule, P):6.2f}" for P in pairs)
        print(f"{rule:20}{cells}")

# %% [markdown]
# Left: with the sum, each other pair adds 1 / 32 to the error, and with 32
# pairs the answers are as bad as none. The delta rule takes the first pairs
# nearly without error too, but what is written later disturbs what was written
# before. Softmax attention, with keys this long, is better than all of them:
# the right key wins, and the others get little. (It is not perfect, since
# random keys may be similar.) With 64 pairs the fading sum is ahead of the
# delta rule. It has forgotten most of them and says little, where the others
# say much that is wrong.
#
# (A matrix of 32 by 32 could hold 32 pairs exactly, if all were known at once:
# 32 equations for the 32 numbers of each row. Passing over them once does not
# solve these.)
#
# Right: the delta rule replaces, and its error is somewhat larger than on the
# left. The sum answers with both values, which is worse than nothing. With a
# decay of 0.97 most of the old value is still there when the new one comes, and
# part of the new one is gone when it is asked for. And softmax attention says
# the mean of two values: without positions, two equal keys are equal.
#
# ### Exercise 9.6 · `state_bytes` ★ (10 minutes)
#
# The bytes of the states of all layers and KV heads, for one text.

# %% exercise="state_bytes"
from lib.state import state_bytes

# %%
check(state_bytes)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# It does not depend on the number of tokens, nor on the number of query heads.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `num_layers`, `num_kv_heads` and `head_dim` of the config, the last of them
# twice.
#
# </details>

# %% [markdown]
# A cache takes 2 · D numbers per token and KV head, a state D · D. So with as
# many bits for a number, a cache is as large as a state after D / 2 tokens, and
# larger from then on. The number of heads and layers does not matter. Is it so?
# `StateCache` fills the protocol of chapter 3: it is extended by any number of
# tokens, in chunks, and takes back, begins and frees requests like every cache.
# Each layer has a **memory**: `Linear(decay)`, `Delta()`, or `Window(size)`,
# softmax attention to the newest tokens. (`Linear` and `Delta` first bring keys
# and queries to length 1, and `Linear` divides an answer by the root of the
# mean of its squares, for a sum would grow with the text.) Here are a cache and
# a state of the same model, token by token:

# %%
tiny = ModelConfig(
    256, num_layers=3, num_heads=4, num_kv_heads=2, d_model=128, d_ff=64,
    max_seq_len=64,
)
torch.manual_seed(0)
tiny_lm = Transformer(tiny).eval()
caches = ContiguousKVCache(tiny, 1, 64), StateCache(tiny, 1, Linear(0.97))
for cache in caches:
    cache.begin("a text")
predicted = state.state_bytes(tiny)
one = torch.ones(1, dtype=torch.int64)
for num_tokens in range(1, 25):
    for cache in caches:
        generate.forward_cached(tiny_lm, cache, one, one)
    used = [cache.used_bytes for cache in caches]
    if num_tokens in (1, 8, 15, 16, 17, 24):
        print(f"{num_tokens:2} tokens: cache {used[0]:6,}, state {used[1]:6,} "
              f"bytes; predicted {predicted:6,}")
print(f"equal at D / 2 = {tiny.head_dim // 2}")

# %% [markdown]
# (A state is a sum over a whole text, and where a sum is large, 16 bits lose
# small terms. So ours has 32, also beside a cache of 16, and then they are
# equal after D tokens.)
#
# Memory and time, in the table. How do they grow? `chunked` is training of a
# model that has a state instead of softmax attention, in chunks of 8 tokens;
# `state` writes token by token:

# %%
sizes = table.SMALL_SIZES
by_column = {
    name: table.fit(table.sweep(name, sizes=sizes))
    for name in ("chunked", "state")
}
Markdown(table.render(sum(by_column.values(), []), sizes))

# %% [markdown]
# In chapter 2 the attention of training was N² L, and in chapter 3 that of
# writing with a cache. Both are N L now, and the memory of writing has no N
# left at all.
#
# How is it in seconds? On your machine, attention alone, for one new token of
# each of 8 texts and for a whole prompt; and on a GPU, an H200, with the heads
# of Llama 3 8B:

# %%
here = bench_state.bench_state("cpu", repeats=3)
on_gpu = json.loads(bench_state.RESULTS.read_text())
for place, found in ("here", here), ("H200", on_gpu["microseconds"]):
    for kind, rows in found.items():
        names = [name for name in rows[0] if name != "tokens"]
        print(f"{place}, {kind}: microseconds of "
              + ", ".join(names))
        for row in rows:
            numbers = "".join(f"{row[name]:12,.0f}" for name in names)
            print(f"{row['tokens']:9,} tokens {numbers}")

# %% [markdown]
# From a state, a step takes as long after 65,536 tokens as after 512: the state
# is all that it reads. On the GPU, the cache is faster with 512 tokens, and
# some 20 times slower at the end. For a prompt it is less clear. On our
# processor, chunks are ahead with 1,024 tokens already. On the GPU, softmax
# attention is one kernel, which never writes a score to memory, while our
# chunks are a loop in Python, in 32 bits, with two dozen launches for each
# chunk, and write their scores to memory. Up to 16,384 tokens they take 4 to
# 360 times as long, and larger chunks, which do more work, are faster. Only at
# 65,536, with chunks of 1,024, is it about as fast as softmax. What these
# models are trained with are kernels that need few launches for all chunks (the
# library *flash-linear-attention* has them).
#
# ## Models that have learned to live with it
#
# Random keys are one thing, and a model that has learned which keys to make is
# another. Here are models of one size, two layers of two heads of 32 numbers,
# each trained from the beginning with its own memory (`python -m lib.recall`).
# They read up to 16 pairs of a key and a value, and are then asked for each of
# them. In the first layer each sees the newest four tokens (below we ask why);
# in the second it has

# %% alt="Share of answers that are right over pairs in the text, from 2 to 32, on a logarithmic axis. All begin at 1. All tokens stay there, or nearly; sum, decay 0.97 and delta rule fall from 8 pairs on, to less than half at 32; newest 16 falls from 4 pairs on, nearly to 0."
names = {
    "all tokens": "pairs",
    "sum": "pairs_sum",
    "decay 0.97": "pairs_decay",
    "delta rule": "pairs_delta",
    "newest 16": "pairs_window",
}
nums_pairs = (2, 4, 8, 16, 32)


def draws_of(draw, *size, num_texts=32):
    return [draw(num_texts, *size, seeded(seed)) for seed in range(3)]


def asked(name, draws):
    recipe = recall.RECIPES[name]
    return measure_quality(recall.load(name), draws, attend=recipe.attend)


recalled = {
    memory: [
        asked(name, draws_of(recall.draw_pairs, P)) for P in nums_pairs
    ]
    for memory, name in names.items()
}
plotting.plot_bands(
    {
        "of a key told once": {
            memory: (nums_pairs, [q.accuracies for q in found])
            for memory, found in recalled.items()
        }
    },
    xlabel="pairs in the text (trained with up to 16)",
    ylabel="share of answers that are right",
    title=(
        f"16 pairs: a state finds {recalled['sum'][3].accuracy:.0%}, "
        f"as many bytes of a window {recalled['newest 16'][3].accuracy:.0%}"
    ),
    log_x=True,
);

# %%
runs = json.loads(recall.RESULTS.read_text())
print("of 16 pairs, models of three seeds")
for memory, name in names.items():
    shares = " ".join(f"{run['accuracy'][-1][1]:4.0%}" for run in runs[name])
    print(f"{memory:12} {shares}")

# %% [markdown]
# The window keeps 15 tokens for the next one, 7,680 bytes, and the state takes
# 8,192 bytes. But the window has at most the last 8 pairs, exactly, and nothing
# of those before; the state has something of each. With 32 pairs, more than any
# was trained with, all three states lose more than half, the sum least.
#
# The delta rule is not better here than the sum: which of them is ahead depends
# on the seed. No key is told twice in these texts, so there is nothing to
# replace. Let us tell keys again. These models were trained on pairs of which
# some get another value before they are asked for:

# %%
print("8 pairs, of which so many get another value")
print(f"{'':12} {0:6} {4:6} {8:6}     8, three seeds")
for memory in ("all tokens", "sum", "decay 0.97", "delta rule"):
    name = names[memory].replace("pairs", "updates")
    cells = "".join(
        f"{asked(name, draws_of(recall.draw_updates, 8, U)).accuracy:7.0%}"
        for U in (0, 4, 8)
    )
    shares = " ".join(f"{run['accuracy'][-1][1]:4.0%}" for run in runs[name])
    print(f"{memory:12}{cells}     {shares}")

# %% [markdown]
# Now the delta rule is the best state, at each seed. The sum does better than a
# coin that chooses between the old value and the new one: queries and keys are
# rotated by position (chapter 1), so the product of a query with a key can be
# larger where the key is near.
#
# ### What a window beside a state is worth
#
# Why do all these models have a window in their first layer? A state joins the
# value of a token with the key of *the same* token. In our texts the key is one
# token and the value the next. So the first layer has to bring each key to its
# value: at the value's place, it has to look one token back. A window does that
# exactly. A state would have to find the token before among all that it was
# told:

# %%
print("16 pairs, three seeds")
for name in ("pairs_delta", "pairs_delta_twice"):
    shares = " ".join(f"{run['accuracy'][-1][1]:4.0%}" for run in runs[name])
    print(f"{recall.RECIPES[name].memories}: {shares}")

# %% [markdown]
# Without the window the model has not learned to recall. Is that only so with
# texts that we made up? Here are models of the same size that have read the
# book. Five have one kind of memory in both layers. The other three are
# **hybrids**: the newest 16 tokens in the first layer, a state in the second.

# %%
def second_half(examples):
    is_answer = examples.is_answer.clone()
    is_answer[:, : is_answer.shape[1] // 2] = False
    return Examples(examples.token_ids, is_answer)


book = {
    T: [second_half(passages(n, T, seeded(seed))) for seed in range(3)]
    for T, n in ((256, 8), (1024, 2))
}


def book_row(name):
    numbers = [asked(name, book[T]).mean_nats for T in (256, 1024)]
    return "".join(f"{nats:10.3f}" for nats in numbers)


print("nats per byte, second half of")
print(f"{'':30} 256 bytes     1,024")
print(f"{'all tokens, twice':26}{book_row('book')}")
print(f"{'newest 16, twice':26}{book_row('book_window')}")
for memory in ("sum", "decay", "delta"):
    print(f"{memory + ', twice':26}{book_row('book_' + memory)}")
    name = "newest 16, then " + memory
    print(f"{name:26}{book_row('book_window_' + memory)}")
newest = measure_quality(
    recall.load("book"), book[1024], attend=state.attend_by(Window(256))
)
print(f"{'all tokens, asked for 256':26}{'':10}{newest.mean_nats:10.3f}")

# %%
print("share of held-out bytes found, three seeds")
for name in ("book", "book_window", "book_delta", "book_window_delta"):
    shares = " ".join(f"{run['accuracy'][-1][1]:.1%}" for run in runs[name])
    print(f"{name:20} {shares}")

# %% [markdown]
# Three things to see here.
#
# - **The weaker the state, the more a window helps it.** With the plain sum it
#   gains a quarter of a nat per byte, with the delta rule little. What has to
#   be known exactly in language is mostly near; a window has it, and the state
#   need not keep it. But a second window in the state's place is better than
#   the sum and the decay: only the delta rule adds something to a window that
#   another window does not.
# - **The hybrid of window and delta rule is better than attention to all
#   tokens**, with each of three seeds. That says something about models of this
#   size, after so little training, in passages of 256 bytes, and nothing of
#   large ones: there, attention recalls what states cannot.
# - **What forgets goes on.** These models were trained on 256 bytes. At 1,024,
#   attention to all tokens and the sum break down. For attention it is the
#   distances that it has never seen: asked for the newest 256 alone, it is well
#   again (the last line). Windows and decays go on as before, and the delta
#   rule loses a tenth of a nat. So the window alone is best there.
#
# Large models mix too. Based (Arora and others, 2024) has a state with richer
# keys beside windows of 64 tokens; Griffin (De and others, 2024) a window in
# every third layer; Jamba (Lieber and others, 2024) attention to all tokens in
# one layer of eight, and its cache is an eighth as large.
#
# ### It writes
#
# Trained in parallel, asked step by step: the two must agree in a whole model
# too. A prompt in one step, then token by token:

# %%
hybrid = recall.load("book_window_delta")
memories = recall.RECIPES["book_window_delta"].memories
ids = book[256][0].token_ids[0]
with torch.no_grad():
    at_once = hybrid(
        ids, torch.arange(256), recall.RECIPES["book_window_delta"].attend
    )
cache = StateCache(hybrid.config, 1, memories)
cache.begin("passage")
stepped = torch.cat([
    generate.forward_cached(hybrid, cache, new, torch.tensor([len(new)]))
    for new in ids.split([100] + [1] * 156)
])
print(f"logits differ by {(at_once - stepped).abs().max():.0e} at most")

cache = StateCache(hybrid.config, 1, memories)
cache.begin("a text")
(written,) = generate.generate_cached(
    hybrid, [text.encode("It was the whale")], 500, cache, temperature=0.7,
    generator=seeded(1),
)
whole = kv_cache.kv_cache_bytes(hybrid.config, len(written))
print(f"{cache.used_bytes:,} bytes; a cache would have {whole:,}\n")
print(text.decode(written)[-240:])

# %% [markdown]
# It was trained on passages of 256 bytes, and after 500 its text still looks
# like the book.
#
# ## Where the known models stand
#
# Nearly all of them are the line S ← S + v kᵀ, and differ in how the old S
# fades, and in what is written. α and β are computed from the token, γ is a
# constant; diag(γ) multiplies each column of S by a number of its own, and ∘
# number by number:
#
# | | the state becomes | what fades |
# |---|---|---|
# | Linear Transformer, 2020 | S + v φ(k)ᵀ | nothing |
# | DeltaNet, 2021 | S + β (v - S k) kᵀ | what was told with this key |
# | RetNet, 2023 | γ S + v kᵀ | all, at one rate per head |
# | RWKV-5, 2024 | S diag(γ) + v kᵀ | each column at its rate |
# | GLA, 2023 | S diag(α) + v kᵀ | each column, as the token says |
# | Mamba, 2023 | α ∘ S + (β ∘ v) kᵀ | each number, as the token says |
# | Mamba-2, 2024 | α S + β v kᵀ | all, as the token says |
# | Gated DeltaNet, 2024 | α S + β (v - α S k) kᵀ | all, and this key's value |
#
# (RetNet is a retentive network, GLA gated linear attention, and RWKV is named
# after four of its vectors.)
#
# - φ makes all numbers of a key positive (x + 1, or eˣ where x is below 0), and
#   the answer is divided by the sum of the weights. Most of the later ones have
#   neither φ nor this sum, and many normalize the answer, as our `Linear` does.
# - RWKV-4 (2023) has no matrix: in each of its numbers it keeps a weighted mean
#   of values. RWKV-6 (2024) has decays like GLA, and RWKV-7 (2025) a delta
#   rule with a decay for each column.
# - In Mamba each channel of the model is a head of its own, with a state of one
#   row and 16 columns, and all of them share k and q.
#
# What Mamba-2 adds to your `linear_step`, then, is a decay and a strength of
# writing that depend on the token, both computed from one number. That is how
# it forgets on purpose: at the end of a sentence α can be near 0, and then the
# state is empty for the next. In the mask, γ^(t - s) becomes the product of the
# α of all tokens from s + 1 to t; it remains semiseparable, and all three forms
# go on to work. It has more than this, above all a convolution, a weighted sum
# over the last four tokens, which brings neighbours together like our first
# layer's window; and a gate, numbers computed from the token that multiply the
# answer.
#
# `attend(layer, q, k, v)`, the place at which
# this course has changed attention since chapter 1, can carry every line of the
# table whose α and β are constants, and those that compute them from q, k and
# v. What it cannot carry is a projection of its own for α: that is a matrix
# more in each block, and `lib/model.py` has none.

# %%
check.summary()

# %% [markdown]
# ## The whole table
#
# Nine chapters, eight columns. `check.collect` reads your answers from the
# other notebooks of this folder, as they were saved, and puts those that pass
# into the library. So what is measured here is your code. It takes half a
# minute. (Kernels are left out: no column launches one, and trying them takes
# as long again.)

# %%
check.collect(kernels=False)

# %%
for name in table.COLUMNS:
    if name not in by_column:  # two are measured already
        by_column[name] = table.fit(table.sweep(name, sizes=sizes))
trained = ["training", "checkpointed", "chunked"]
written = [name for name in table.COLUMNS if name not in trained]
Markdown("\n\n".join(
    table.render(sum((by_column[name] for name in names), []), sizes)
    for names in (trained, written)
))

# %% [markdown]
# ## All memories in one plot
#
# What is a byte worth? On the left, 16 pairs are told, and each is asked for.
# On the right, the second half of passages of the book. In both, a point is a
# way to remember, with the bytes that one text of this length takes. Caches of
# fewer bits, fewer numbers and fewer tokens (chapters 7 and 8) belong to the
# model with attention to all tokens; the others are models of this chapter.

# %% alt="Two plots over bytes of a text, on a logarithmic axis. Pairs recalled: all tokens, fewer bits and fewer numbers are at the top; newest tokens, heavy hitters and snap fall steeply with the bytes; delta in 8 and 4 bits, furthest left, is high. Book, nats: windows, states and pruned caches are low at the left; fewest bits and numbers are highest."
pairs_text = draws_of(recall.draw_pairs, 16, num_texts=8)
book_text = book[256]
tasks = {"pairs": pairs_text, "book": book_text}
steps = {"pairs": [32] + [2] * 16, "book": [128] + [16] * 8}


def in_contiguous(format):
    return lambda config, B, T: ContiguousKVCache(config, B, T, format=format)


def in_pruned(budget, policy):
    return lambda config, B, T: PrunedKVCache(config, B, budget, policy)


def in_state(name):
    memories = recall.RECIPES[name].memories
    return lambda config, B, T: StateCache(config, B, memories)


@dataclass(frozen=True)
class DeltaInBits(Delta):
    """The delta rule's state, after each step in so many bits per number."""

    bits: int

    def empty(self, config, dtype, device):
        return quantize(*super().empty(config, dtype, device), self.bits)

    def attend(self, kept, q, k, v):
        S = dequantize(*kept, self.bits)
        out, (S,) = super().attend((S,), q, k, v)
        return out, quantize(S, self.bits)


def in_bits(name, bits):
    memories = (recall.RECIPES[name].memories[0], DeltaInBits(bits))
    return lambda config, B, T: StateCache(config, B, memories)


def remembered(task, name, make_cache):
    return measure_quality(
        recall.load(name), tasks[task], make_cache=make_cache,
        step_lens=steps[task],
    )


def by_method(task, budgets, trained):
    """Of each method some `Quality`. trained: models with other memories."""
    seen = record_kv(
        recall.load(task), recall.draw_task(task, 32, seeded(9), 1.0).token_ids
    )
    of_all_tokens = {
        "all tokens": [in_contiguous(KVFormat())],
        "fewer bits": [
            in_contiguous(QuantizedFormat(bits)) for bits in (8, 4, 2)
        ],
        "fewer numbers": [
            in_contiguous(latent_format(*seen, r, r)) for r in (48, 32, 16)
        ],
        "newest tokens": [in_pruned(n, Recent(0)) for n in budgets],
        "heavy hitters": [in_pruned(n, HeavyHitters()) for n in budgets],
        "snap": [in_pruned(n, Snap(width=7)) for n in budgets],
    }
    found = {
        method: [remembered(task, task, make_cache) for make_cache in those]
        for method, those in of_all_tokens.items()
    }
    for method, names in trained.items():
        found[method] = [
            remembered(task, name, in_state(name)) for name in names
        ]
    name = trained["window and delta"][0]
    found["delta in 8 and 4 bits"] = [
        remembered(task, name, in_bits(name, bits)) for bits in (8, 4)
    ]
    return found


worth = {
    "pairs": by_method("pairs", (12, 24, 48), {
        "window, trained": ["pairs_window"],
        "window and sum": ["pairs_sum"],
        "window and delta": ["pairs_delta", "pairs_delta_small"],
    }),
    "book": by_method("book", (16,), {
        "window, trained": ["book_window"],
        "window and sum": ["book_window_sum"],
        "window and delta": ["book_window_delta"],
    }),
}
smallest = worth["pairs"]["fewer bits"][-1]
plotting.plot_quality(
    [
        ("share of 16 pairs recalled", "linear", worth["pairs"],
         lambda quality: quality.accuracies),
        ("nats per byte of the book", "linear", worth["book"],
         lambda quality: quality.nats),
    ],
    text_lens=[64, 256],
    title=(
        f"All tokens in 2 bits recall {smallest.accuracy:.0%}, window and "
        f"state {worth['pairs']['window and delta'][0].accuracy:.0%}"
    ),
);

# %%
for task, T in (("pairs", 64), ("book", 256)):
    print(f"{task}: {'share' if task == 'pairs' else 'nats'} (bytes)")
    for method, those in worth[task].items():
        numbers = (
            (q.accuracy if task == "pairs" else q.mean_nats, q.bytes_per_token)
            for q in those
        )
        print(f"  {method:22}" + ", ".join(
            f"{value:.2f} ({T * size:,.0f})" for value, size in numbers
        ))

# %% [markdown]
# Read it from the left, the small memories first.
#
# - **Pairs.** With 64 tokens, all of them in 2 bits recall more than window and
#   state in 32, in a little less. But a state can be kept in fewer bits too. In
#   4 it recalls as much as in 32, in less than half of the bytes of 2 bits.
#   Pruned to 24 of its 64 tokens, a cache loses a third of the answers or more:
#   all keys are asked for, and nobody knew which would come first. The window,
#   which has the newest pairs only, finds hardly any.
# - **The book.** The other way round: there a window of 16 is as good as
#   everything, and so are pruned caches, while 2 bits and codes of 16 numbers
#   are the worst. Window and delta rule have the lowest loss, in 4 bits too,
#   and nothing takes less.
# - So there is no best memory. What has to be recalled is the question; and a
#   method that was judged by the loss of a language model alone has not been
#   judged at all.
#
# One thing no plot of a text of 64 tokens can show. The caches on it grow with
# each token, those of chapter 7 too. Window, pruned cache and state do not.
# With a text sixteen times as long, 2 bits take sixteen times as much, and the
# state still what it took. Whether it then still knows what it was told is
# another question. Trained with up to 16 pairs, ours recall less than half of
# 32, which says as much of their training as of the state.
#
# ## What is open
#
# - **How much recall does a byte buy, at best?** A state of n bits cannot tell
#   apart more than 2ⁿ texts, and cannot repeat a long one word by word
#   (Jelassi and others, 2024, prove it, and measure it in large models). How
#   near can a rule that is learned come to that bound?
# - **Which layers need all tokens?** Hybrids of today have their few attention
#   layers where somebody tried it and it worked.
# - **States in a server.** Blocks can be shared by requests that begin alike
#   (chapter 6), since each block belongs to a place in the text. A state
#   belongs to a whole text: to go back to its middle, a copy of the state
#   there must have been kept. Which ones should be?
# - **Speculative decoding** lets a small model guess several tokens, checks
#   them at once and takes the wrong ones back. A cache is then cut by some
#   tokens; of a state one needs a copy from before, or has to undo each step.
#
# ## Your turn: build a memory
#
# You have everything it takes to try an idea of your own. The task: **a memory
# of at most 8,192 bytes per layer that recalls more than ours.** It is a class
# with three methods, `empty`, `attend` and `attend_all`, of which you have seen
# three examples; their contracts are in `lib/state.py`, in `Memory`. Begin with
# a copy of `Delta`.
#
# `try_memory` tells you whether it is one. It reads texts of 1,024 tokens, the
# longest that the model takes, and looks at the bytes after every step; whether
# the numbers are the same step by step as at once (within 0.1, which leaves
# room for 16 bits); whether anything is remembered but what was returned to be
# kept; and whether gradients come through. Then it trains a model with it,
# 2,400 steps in one to two minutes, and says how many of 8, 16 and 32 pairs the
# model recalls (`seed=1` trains another one). Fewer steps tell little: see what
# ours had learned after 300. Without training (`num_steps=0`), the memories
# that we have, and what the shipped models recall of such texts, the numbers to
# beat:

# %%
for name in ("sum", "delta rule", "newest 16"):
    recipe, lm = recall.RECIPES[names[name]], recall.load(names[name])
    memory = recipe.memories[1]
    print(f"{memory}: {capstone.try_memory(memory, num_steps=0)}")
    found = ", ".join(
        f"{capstone.recalled(lm, recipe, P).accuracy:.0%} of {P}"
        for P in capstone.NUM_PAIRS
    )
    print(f"  its model recalls {found} pairs")
    early = dict(runs[names[name]][0]["accuracy"])[300]
    print(f"  after 300 steps it recalled {early:.0%} of 16")

# %%
try:
    capstone.try_memory(Window(64), num_steps=0)
except ValueError as error:
    print(error)

# %% [markdown]
# Two things to know. `attend` gets any number of new tokens at once, in chunks
# or one by one; for a first version a loop over them by a step of your own will
# do, and so it will in `attend_all`, if you are patient. And keys arrive as the
# model makes them: `state.for_state` brings them to length 1, as in `Delta`.
#
# Ideas, the shortest first. A decay *and* the delta rule. A write strength β,
# computed from the key. Keys with more numbers than heads have, for instance
# the positive and the negative part of each, side by side: then a state has 32
# by 64 numbers, and has to make do with 16 bits. A window of 8 tokens and a
# smaller state, in the same bytes. A state that does not write filler.
#
# Try each with two or three seeds before you believe it. On the book too:
# `recall.train_recipe(replace(recall.BOOK, memories=(Window(16), memory)),
# seed=0)` gives a model and its accuracies (`replace` is of `dataclasses`), in
# several times as many minutes. And if it forgets, find out *what*: the oldest,
# the similar, or the last?
#
# ### What to read next
#
# - the code of **vLLM**, beginning with its block manager and its scheduler:
#   you know their parts by name;
# - **flash-linear-attention**, where nearly every model of the table above is a
#   kernel that runs in chunks;
# - Arora and others, *Zoology* (2023) and *Based* (2024): which differences
#   between models are differences in recall;
# - Yang and others on DeltaNet and Gated DeltaNet (2024), whose figures you can
#   redraw at your size.

# %% [markdown]
# ## What is still wrong
#
# - Our chunks are a loop in torch. What makes these models fast is a kernel.
# - The decay is a constant, the same for all heads. It should depend on the
#   token, and the model should learn it.
# - `StateCache` computes one request after the other. A state has the same
#   shape for all of them, so a batch would be easy; it would be other code.
# - A step writes the new state beside the old one, so that it can be taken
#   back.
# - All models of this chapter are tiny and were trained for minutes. They show
#   what can happen, not what happens in models of billions of parameters.
#
# ## In five sentences
#
# 1. Without the softmax, all that attention needs of the past is the sum of
#    v kᵀ: a state of D × D numbers per head, for a text of any length.
# 2. Step by step, at once and in chunks it gives the same numbers: one form is
#    for writing, one is easy to see, and one is for training and prompts.
# 3. With a decay it is a state-space model, h ← a h + b x, y = c h, whose mask
#    is a semiseparable matrix.
# 4. Told with random keys, a state of D columns mixes things up long before
#    there are D of them, though a matrix could hold D; the delta rule repairs
#    what was told twice.
# 5. A window does exactly what a state does poorly, for a few tokens; the best
#    of our small models have both.
#
# ## Do you recall?
#
# 1. Why can softmax attention not be computed from a sum over the past?
# 2. A model has 24 layers, 16 query heads, 2 KV heads of 128 numbers. From how
#    many tokens on is its cache, in 16 bits, larger than states in 32?
# 3. The decay is 0.9. How much of what token 10 has written is left at token
#    15, and where does that stand in the mask?
# 4. What does `linear_chunked` compute with a chunk size of 1, and what with
#    one as long as the text?
# 5. A key of length 2 is written by the delta rule. What does the state answer
#    to that key afterwards?
# 6. A server has many requests with the same beginning of 1,000 tokens. What
#    can they share if each has a state?
#
# <details><summary>Answers</summary>
#
# 1. The weight exp(q · k) is no product of something that depends on q and
#    something that depends on k, so the keys cannot be summed before the query
#    is known.
# 2. After D = 128 tokens they are equal: 2 · 128 numbers of 2 bytes per token
#    against 128 · 128 of 4. Layers and heads do not matter.
# 3. 0.9⁵ = 0.59; in row 15, column 10.
# 4. With 1 it goes step by step. With a chunk as long as the text it is
#    `linear_parallel`, and what the first state adds.
# 5. S k before, plus (v - S k) times kᵀk = 4: that is 4 v - 3 S k. It should
#    be v, so the rule needs keys of length 1.
# 6. The state after the 1,000 tokens, which is computed once and copied for
#    each of them; of a shorter beginning, nothing, unless a copy of the state
#    there was kept.
#
# </details>
#
# ## Sources
#
# - Katharopoulos and others, *Transformers are RNNs*, 2020,
#   [2006.16236](https://arxiv.org/abs/2006.16236): linear attention.
# - Schlag and others, *Linear Transformers Are Secretly Fast Weight
#   Programmers*, 2021, [2102.11174](https://arxiv.org/abs/2102.11174): the
#   delta rule in a state, and how many keys it holds.
# - Sun and others, *Retentive Network*, 2023,
#   [2307.08621](https://arxiv.org/abs/2307.08621): a decay per head; three
#   forms.
# - Gu and Dao, *Mamba*, 2023,
#   [2312.00752](https://arxiv.org/abs/2312.00752).
# - Dao and Gu, *Transformers are SSMs*, 2024,
#   [2405.21060](https://arxiv.org/abs/2405.21060): Mamba-2, semiseparable
#   matrices, the duality.
# - Yang and others, *Gated Linear Attention Transformers*, 2023,
#   [2312.06635](https://arxiv.org/abs/2312.06635); *Parallelizing Linear
#   Transformers with the Delta Rule*, 2024,
#   [2406.06484](https://arxiv.org/abs/2406.06484); *Gated Delta Networks*,
#   2024, [2412.06464](https://arxiv.org/abs/2412.06464).
# - Peng and others, *RWKV*, 2023,
#   [2305.13048](https://arxiv.org/abs/2305.13048); *Eagle and Finch*, 2024,
#   [2404.05892](https://arxiv.org/abs/2404.05892): RWKV-5 and 6; *RWKV-7*,
#   2025, [2503.14456](https://arxiv.org/abs/2503.14456).
# - Arora and others, *Zoology*, 2023,
#   [2312.04927](https://arxiv.org/abs/2312.04927): recall of pairs; *Simple
#   linear attention language models* (Based), 2024,
#   [2402.18668](https://arxiv.org/abs/2402.18668).
# - Jelassi and others, *Repeat After Me*, 2024,
#   [2402.01032](https://arxiv.org/abs/2402.01032): what a state of fixed size
#   cannot copy.
# - De and others, *Griffin*, 2024,
#   [2402.19427](https://arxiv.org/abs/2402.19427); Lieber and others, *Jamba*,
#   2024, [2403.19887](https://arxiv.org/abs/2403.19887): hybrids.
