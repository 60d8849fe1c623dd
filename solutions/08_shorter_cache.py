# %% [markdown]
# # 8. A shorter cache: which tokens will be asked for?
#
# A cache in few bytes per token still grows with each token. A text of a
# million tokens needs a million keys in every layer, and most of them are
# hardly ever looked at again. This chapter throws tokens out: the cache gets a
# **budget**, and when it is full, one token goes for each that comes. Then
# memory no longer depends on the length of the text. But nobody knows which
# tokens will be asked for. Each method of this chapter is a bet, and we shall
# see when it is lost.
#
# **You need:** chapters 3 and 4, and of chapter 7 the notes and how they are
# measured. 180 minutes. No GPU.
#
# **You will be able to**
#
# - choose the tokens to keep in three ways: by their place, by the attention
#   they have received, and by what the last queries look at,
# - throw out the others, for each KV head its own, without rotating a key
#   again,
# - say why grouped heads save nothing if keys are repeated before they are
#   pruned,
# - find out which layer of a model needs its tokens, and which rules for that
#   to distrust,
# - count what a cache in blocks gets back of a pruned text,
# - show that memory no longer grows, and say what it costs.

# %%
from collections import Counter
import json

import torch
import torch.nn.functional as F
from IPython.display import Markdown

from lib import generate, kv_cache, model, pruning, recall, text
from lib.block_manager import BlockManager
from lib.config import LLAMA3_8B, check_count
from lib.figures import drawing, plotting
from lib.kv_cache import ContiguousKVCache
from lib.measure import layer_needs, table
from lib.measure.layer_needs import cut_alone, recall_when_cut
from lib.measure.quality import Examples, measure_quality, passages
from lib.pruning import HeavyHitters, PrunedKVCache, Recent, Snap
from lib.course.check import check

plotting.use_course_style()
torch.set_num_threads(1)  # steadier timings

# %% [markdown]
# ## Most of it is never looked at
#
# We take the models of chapter 7: one has read the book, two others answer
# questions about notes, with two and with four layers. The last queries of a
# text look back over all of it. How many tokens does it take to hold 90% of
# what a query looks at? `attend_with_weights` is plain attention that also
# gives its weights (H, T, S):

# %%
def seeded(seed):
    return torch.Generator().manual_seed(seed)


def weights_by_layer(lm, token_ids):
    """Attention weights (H, T, T) of one text in each layer."""
    found = []

    def attend(layer, q, k, v):
        out, weights = pruning.attend_with_weights(q, k, v)
        found.append(weights)
        return out

    with torch.no_grad():
        lm(token_ids, torch.arange(len(token_ids)), attend)
    return found


book_lm = model.load_model()
book = [passages(4, 256, seeded(seed)) for seed in range(3)]
notes_lms = {
    "two layers": recall.load("notes_g2"),
    "four layers": recall.load("notes_l4"),
}
notes = [
    recall.first_question(recall.draw_task("notes", 32, seeded(seed)))
    for seed in range(3)
]
told = notes[0].token_ids[:, :-4]  # up to the key that is asked for


def spreads(lm, token_ids):
    """Of each layer the tokens that hold 90% of a query's attention: the mean
    over the last 8 queries of some texts (B, T)."""
    texts = [weights_by_layer(lm, ids) for ids in token_ids]
    return [
        sum(pruning.attention_spread(w[:, -8:]) for w in layer) / len(texts)
        for layer in zip(*texts)
    ]


for name, lm, token_ids in (
    ("book", book_lm, book[0].token_ids),
    *((f"notes, {name}", lm, told) for name, lm in notes_lms.items()),
):
    numbers = " ".join(f"{spread:5.1f}" for spread in spreads(lm, token_ids))
    print(f"{name:18} of {token_ids.shape[1]} tokens, by layer: {numbers}")

# %% [markdown]
# Three of these ten layers look around widely. In the other seven an eighth of
# the text, or less, is nine tenths of what is looked at. Which tokens are
# these?
#
# ## Six tokens by hand
#
# Here are the weights of one head in one layer, when a model has read `w h a l
# e s`. Row by row: what each query looks at.
#
# | query | w | h | a | l | e | s |
# |---|---|---|---|---|---|---|
# | w | 1 | | | | | |
# | h | .6 | .4 | | | | |
# | a | .2 | .7 | .1 | | | |
# | l | .1 | .6 | .2 | .1 | | |
# | e | .1 | .5 | .1 | .1 | .2 | |
# | s | .2 | .1 | 0 | .5 | .1 | .1 |
# | **received** | 2.2 | 2.3 | .4 | .7 | .3 | .1 |
#
# Our budget is three tokens. Three ways to spend it:
#
# - **By place**: the newest are needed most. Keep `l e s`; or the first token
#   and the two newest, `w e s`.
# - **By attention received**: what many queries looked at will be looked at
#   again. The columns' sums say `h` and `w`; and the newest, `s`, stays in any
#   case, since nobody has had time to look at it.
# - **By the last queries**: only what is looked at *now* counts. The last row
#   says `l` and `w`, and `s` stays.
#
# All three are right sometimes. Let us write them.

# %%
six = torch.tensor([[
    [1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [0.6, 0.4, 0.0, 0.0, 0.0, 0.0],
    [0.2, 0.7, 0.1, 0.0, 0.0, 0.0],
    [0.1, 0.6, 0.2, 0.1, 0.0, 0.0],
    [0.1, 0.5, 0.1, 0.1, 0.2, 0.0],
    [0.2, 0.1, 0.0, 0.5, 0.1, 0.1],
]])  # (H, T, S), one head


def names(places):
    return " ".join("whales"[place] for place in places.tolist())


# %% [markdown]
# ### Exercise 8.1 · `keep_recent` ★ (10 minutes)
#
# Keep the first `num_sinks` tokens and, with what is left of the budget, the
# newest. Return their places in the order of the text. A text that is no longer
# than the budget is kept whole, each token once.

# %% exercise="keep_recent" given="1"
from lib.pruning import keep_recent

# %%
check(keep_recent)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Two ranges, one behind the other. How many of the newest does the budget leave
# room for, and at which place do they begin? When would the ranges overlap?
#
# </details>
# <details><summary>Hint 2</summary>
#
# Of a text longer than the budget, `torch.arange(num_sinks)` and
# `torch.arange(seq_len - (budget - num_sinks), seq_len)`, joined by
# `torch.cat`. Else `torch.arange(seq_len)`.
#
# </details>

# %%
names(pruning.keep_recent(6, budget=3, num_sinks=1))

# %% [markdown]
# Why the first tokens? Softmax makes weights that sum to 1, also where a query
# has nothing to look for. Large models learn to put what is left over on the
# first tokens, which every query can see; they are called **attention sinks**.
# Xiao and others (2023) found that Llama 2 13B, on long texts, has a perplexity
# (e to the power of the nats per token) of 5,158 with the newest 1,024 tokens
# alone, and of 5.40 with the first 4 and the newest 1,020.
#
# Not every model has learned that. What does our model of the book need? We let
# each query see what your function keeps of the tokens before it, and look at
# nats per byte of the second half of each passage:

# %%
def second_half(examples):
    is_answer = examples.is_answer.clone()
    is_answer[:, : is_answer.shape[1] // 2] = False
    return Examples(examples.token_ids, is_answer)


def attend_seen(is_seen):
    """Attention to those keys alone: is_seen (T, T), or (B, 1, T, T)."""

    def attend(layer, q, k, v):
        group_size = q.shape[-2] // k.shape[-2]
        k, v = (x.repeat_interleave(group_size, dim=-2) for x in (k, v))
        q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=is_seen)
        return out.transpose(-3, -2)

    return attend


def seen_of_recent(budget, num_sinks):
    is_seen = torch.zeros(256, 256, dtype=torch.bool)
    for t in range(256):
        is_seen[t, pruning.keep_recent(t + 1, budget, num_sinks)] = True
    return is_seen


halves = [second_half(examples) for examples in book]
whole_book = measure_quality(book_lm, halves)
print(f"all tokens: {whole_book.mean_nats:.3f} nats per byte")
print("budget   newest   first 4 and newest")
for budget in (8, 16, 24, 32, 48, 64, 96):
    row = []
    for num_sinks in (0, 4):
        attend = attend_seen(seen_of_recent(budget, num_sinks))
        row.append(measure_quality(book_lm, halves, attend=attend).mean_nats)
    print(f"{budget:6}   " + "   ".join(f"{nats:.3f}" for nats in row))

# %% [markdown]
# The first tokens of a passage are nothing special to this model. But look down
# the first column: with the newest 32 tokens it predicts *worse* than with 8,
# and with 64 well again. There must be something some 32 to 64 bytes back that
# it counts on. The attention that each kind of byte receives gives it away:

# %%
received = Counter()
for ids in book[0].token_ids:
    weights = weights_by_layer(book_lm, ids)[1]  # layer 1
    shares = weights[:, 128:].mean((0, 1))  # of the second half's queries
    for byte, share in zip(ids.tolist(), shares.tolist()):
        received[chr(byte)] += share / len(book[0].token_ids)
counts = Counter(map(chr, book[0].token_ids.flatten().tolist()))
print("layer 1: of all attention, and of all bytes")
for byte, share in received.most_common(4):
    print(f"{byte!r:5} {share:5.1%} {counts[byte] / counts.total():6.1%}")

# %% [markdown]
# Line breaks: one byte in fifty, and a fifth of the attention. A line of the
# book has some 60 bytes, and where the last one ended says how soon the next
# break is due. How likely does the model think a break is, on average?

# %%
ids = torch.cat([examples.token_ids for examples in book])  # (12, 256)
for seen in (8, 32, 256):
    attend = attend_seen(seen_of_recent(seen, 0))
    with torch.no_grad():
        probs = book_lm(ids, torch.arange(256), attend).softmax(-1)
    expected = probs[:, 128:, ord("\n")].mean()
    print(f"newest {seen:3}: a break with probability {expected:.1%}")

# %% [markdown]
# With the newest 8 it does not know where in a line it is, and guesses about as
# often as breaks occur. With 32 and no break among them it must take the line
# for a long one, and expects a break again and again. We let each query see the
# last line break too, beside the newest tokens:

# %%
def with_last_break(is_seen, token_ids):
    """(T, T) -> (B, 1, T, T): each query sees the last line break too."""
    places = torch.arange(token_ids.shape[1])
    is_break = token_ids == ord("\n")
    last = torch.where(is_break, places, -1).cummax(dim=1).values  # (B, T)
    return (is_seen | (places == last.unsqueeze(-1))).unsqueeze(1)


for budget in (8, 16, 32, 64):
    is_seen = seen_of_recent(budget, 0)
    with_break = [
        measure_quality(
            book_lm,
            [half],
            attend=attend_seen(with_last_break(is_seen, half.token_ids)),
        ).mean_nats
        for half in halves
    ]
    nats = sum(with_break) / len(with_break)
    print(f"newest {budget:2} and the last line break: {nats:.3f}")

# %% [markdown]
# One token more, and with 32 the loss is nearly that of all of them. So a model
# has tokens that it comes back to, and they need not be the first ones. We
# cannot study every model to find out which they are. But attention shows them.
#
# ### Exercise 8.2 · `attention_received` ★★ (15 minutes)
#
# Sum the weights (H, T, S) over the queries. Then take the mean over the query
# heads that read one KV head, for there is only one key to keep or to throw
# out: query head h reads KV head `h // (H / G)`. The result has shape (G, S).

# %% exercise="attention_received"
from lib.pruning import attention_received

# %%
check(attention_received)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `unflatten(0, (num_kv_heads, -1))` splits the first dimension into groups and
# heads of a group. Of the four dimensions you have then, one is summed and one
# averaged.
#
# </details>
# <details><summary>Hint 2</summary>
#
# After `unflatten` the shape is (G, H / G, T, S). `sum(dim=2)` first, then
# `mean(dim=1)`.
#
# </details>

# %%
pruning.attention_received(six, num_kv_heads=1)

# %% [markdown]
# That is the score of H2O (Zhang and others, 2023), whose authors call tokens
# that receive much of it **heavy hitters**. (They give half of the budget to
# the newest tokens; we give those a window of 8.) It adds up from step to step,
# so a cache can keep one number per token and head and need not remember any
# weights.
#
# A token at the beginning has been seen by every query, one at the end by few.
# So old tokens have an advantage that they may not deserve. And what was looked
# at while a text was read need not be what its question is about. SnapKV (Li
# and others, 2024) looks at the last queries only, in the hope that they know
# what is wanted.
#
# ### Exercise 8.3 · `snap_scores` ★★ (25 minutes)
#
# Take the rows of the last `window` queries, and what they give to each token
# *before* the window: S - window of them, for the window stays anyway. Then
# replace each score by the mean over `width` neighbours, with itself in the
# middle, and zeros beyond the ends. Why neighbours? The query that looks
# at one token of a note will be followed by queries that look at the next ones.

# %% exercise="snap_scores" given="1"
from lib.pruning import snap_scores

# %%
check(snap_scores)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# You have a function that sums over queries and averages over a group. Give it
# the rows `weights[:, -window:]`, and cut its result before you look for
# neighbours. If nothing is left (a text no longer than the window), return
# that.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `F.avg_pool1d(scores, width, stride=1, padding=width // 2)`
# takes (G, S - window), and counts zeros beyond the ends as neighbours. It
# refuses a text of length 0.
#
# </details>

# %%
for width in (1, 3):
    print(width, pruning.snap_scores(six, 1, window=1, width=width))

# %% [markdown]
# With neighbours, `a` and `e` are worth as much as `l`, which they stand
# beside.
#
# ### Exercise 8.4 · `evict_tokens` ★★★ (30 minutes)
#
# Now throw out. Of keys and values (S, G, D) of one layer keep the `budget`
# tokens worth most: the newest `window` whatever their scores, and before them
# those with the highest scores, of equal ones the earlier. (A budget below the
# window keeps the newest `budget`.) Each KV head has its own choice. Keep them
# in the order of the text, as they are: a key was rotated by the position of
# its token, and that has not changed.
#
# Return k, v (n, G, D) and the places that were kept, (G, n). The old tensors
# have to become free, so what you return may not be a view of them, nor they
# themselves, even where nothing is thrown out.
#
# `gather` is the tool for choices that differ by column. `x.gather(0, index)`
# has the shape of `index`, and its number in row i, column g is taken from row
# `index[i, g]` of column g:

# %%
x = torch.tensor([[0, 10], [1, 11], [2, 12], [3, 13]])  # (S, G)
x.gather(0, torch.tensor([[0, 1], [2, 3]]))  # rows 0 and 2, rows 1 and 3

# %% exercise="evict_tokens"
from lib.pruning import evict_tokens

# %%
check(evict_tokens)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Three steps: the best places before the window, for each head; these places in
# ascending order, followed by those of the window; keys and values there. What
# if the budget is larger than S, or smaller than the window?
#
# </details>
# <details><summary>Hint 2</summary>
#
# `scores[:, :num_before].argsort(dim=-1, descending=True, stable=True)` ranks
# them, with the earlier of equal ones first. `k.gather(0, index)` wants an
# index of the result's shape (n, G, D): `kept.T.unsqueeze(-1).expand(-1, -1,
# D)`.
#
# </details>

# %%
scores = pruning.attention_received(six, 1)
k = torch.arange(6.0).view(6, 1, 1)
k_kept, _, kept = pruning.evict_tokens(k, k, scores, budget=3, window=1)
print(names(kept[0]), k_kept.flatten())

# %% [markdown]
# ## The cache that forgets
#
# `PrunedKVCache` fills the protocol of chapter 3. In each layer, a step attends
# to what was kept and to all that is new; then a **policy** (`Recent`,
# `HeavyHitters` or `Snap`, which call your functions) updates the scores, and
# `evict_tokens` cuts the layer to its budget. So a prompt is read whole and cut
# once, and from then on one token comes in and one goes out. `seq_lens` goes on
# counting all tokens, since that is where positions come from.
#
# With a budget above the text, nothing may change:

# %%
def write(cache, num_new_tokens=60):
    cache.begin("a text")
    prompt = text.encode("It was the whale")
    (ids,) = generate.generate_cached(
        book_lm, [prompt], num_new_tokens, cache, temperature=0
    )
    return text.decode(ids)


plain = write(ContiguousKVCache(book_lm.config, 1, 512))
assert write(PrunedKVCache(book_lm.config, 1, 512, HeavyHitters())) == plain
print(repr(plain))

# %% [markdown]
# And with a smaller one, memory stops growing. (Bytes are those of keys and
# values, and of a score and a position for each of them.)

# %%
print("bytes in use    whole    48 tokens")
for num_new_tokens in (33, 65, 129, 257):
    caches = (
        ContiguousKVCache(book_lm.config, 1, 512),
        PrunedKVCache(book_lm.config, 1, 48, HeavyHitters()),
    )
    written = [write(cache, num_new_tokens) for cache in caches]
    num_bytes = [cache.used_bytes for cache in caches]
    cells = "".join(f"{n:10,}" for n in num_bytes)
    print(f"{num_new_tokens + 15:3} tokens  {cells}")
print(written[1])

# %% [markdown]
# ### Heads that are repeated first
#
# One thing can be got wrong so that everything works and nothing is saved. With
# grouped heads, several query heads read the same key. Some code repeats keys
# and values until each query head has its own, and prunes then: that of SnapKV
# did, and that of PyramidKV, which builds on it. Each query head can now make
# its own choice, and nothing looks wrong. But there are H keys to keep per
# token of the budget, instead of G. Count vectors, for Llama 3 8B and a text of
# 8,192 tokens:

# %%
H, G = LLAMA3_8B.num_heads, LLAMA3_8B.num_kv_heads
print(f"nothing thrown out:          {8192 * G:6,} keys per layer")
for budget in (4096, 2048, 1024):
    print(
        f"budget of {budget:5,} per KV head: {budget * G:6,}"
        f"     per query head: {budget * H:6,}"
    )

# %% [markdown]
# If keys are repeated first, three quarters of the text have to go before a
# single byte is saved.
#
# ## What was kept
#
# Here is a text of notes, up to the key that is asked for. The policies have
# cut it to 32 of its 105 tokens. Which ones did they keep, in each layer and KV
# head?

# %% alt="A text of 105 tokens, the note asked for in orange; below, what three policies keep, a row per layer and KV head. First 4 and newest: the ends, nothing of that note. Heavy hitters: much of the beginning and of the end, of that note at most four tokens per row. Snap: the newest, and in one row of layer 0 and both of layer 1 that note but for its last value."
four_lm = notes_lms["four layers"]
prompt = told[5]
asked_for = (prompt[:-1] == prompt[-1]).nonzero().item()  # the place of its key


def kept_by(lm, policy, budget, prompt):
    cache = PrunedKVCache(lm.config, 1, budget, policy)
    cache.begin(0)
    generate.forward_cached(lm, cache, prompt, torch.tensor([len(prompt)]))
    return cache.positions(0)


policies = {
    "first 4 and newest": Recent(),
    "heavy hitters": HeavyHitters(),
    "snap": Snap(),
}
share = 32 / len(prompt)
drawing.draw_kept(
    recall.spell_notes(prompt).split(),
    {
        name: kept_by(four_lm, policy, 32, prompt)
        for name, policy in policies.items()
    },
    wanted=range(asked_for, asked_for + 5),
    title=f"{share:.0%} of the text is kept: the note asked for, or others?",
);

# %% [markdown]
# *Above, the text: notes, and dots for filler; its last token asks for the note
# in orange. Below, what each policy keeps of it, a row for each KV head.*
#
# Every policy has the newest tokens. Heavy hitters spend much on the beginning,
# which every query has seen. Snap has found the note that is asked for, but not
# in all layers, and its last value stands too far from what was looked at.
#
# ## Which bet wins
#
# We measure it. `recall_when_cut` gives a model a text of notes up to the key
# that is asked for, cuts the cache, and then lets it answer. We count how many
# of the last three values come out right; the first is predicted in the step
# that reads the text, before anything is cut. There are three draws of 32
# texts.

# %% alt="Two plots, models of two and of four layers: share of answers that are right over tokens kept, from 12 to 48 of 105. All lines rise. Snap is highest; heavy hitters lie between it and first 4 and newest, which is lowest. With four layers and 12 tokens all three are low and close."
budgets = (12, 16, 24, 32, 48)
by_policy = {
    model_name: {
        name: {
            budget: recall_when_cut(lm, notes, budget, policy)
            for budget in budgets
        }
        for name, policy in policies.items()
    }
    for model_name, lm in notes_lms.items()
}
best = by_policy["four layers"]
plotting.plot_bands(
    {
        model_name: {
            name: (budgets, [q.accuracies for q in by_budget.values()])
            for name, by_budget in found.items()
        }
        for model_name, found in by_policy.items()
    },
    xlabel="tokens per layer and KV head, of 105",
    ylabel="share of answers that are right",
    title=(
        f"32 tokens, four layers: snap {best['snap'][32].accuracy:.0%}, "
        f"newest {best['first 4 and newest'][32].accuracy:.0%}"
    ),
    log_x=True,
);

# %% [markdown]
# *A line is the mean of three draws of texts; its band goes from the
# draw with the lowest share to the one with the highest.*
#
# What the last queries look at is the best bet here, for the last of them knows
# the question. The newest tokens have a note or two among them. Heavy hitters
# lie between: what was looked at much while the text was read is often a place
# that a note is read from, but not always the note that is asked for. With all
# 105 tokens the two models get 93% and 100%, as we shall see below.
#
# ### How many neighbours, how many queries
#
# Snap has two numbers to choose. Neighbours first. An answer has four values:
# too few neighbours lose the last of them, too many fill the budget with
# filler.

# %%
widths = (1, 3, 5, 7, 9, 11)
print("neighbours      " + "".join(f"{width:6}" for width in widths))
for name, lm in notes_lms.items():
    for budget in (24, 48):
        shares = [
            recall_when_cut(lm, notes, budget, Snap(width=width)).accuracy
            for width in widths
        ]
        cells = "".join(f"{share:6.0%}" for share in shares)
        print(f"{name + ',':12} {budget} {cells}")

# %% [markdown]
# Seven, here. The key that is asked for looks at one token, and the next three
# queries at the three behind it; with three neighbours on either side all of
# them are kept. How many it takes depends on what one has to remember.
# (SnapKV's code offers the mean and the maximum over neighbours; in its
# authors' runs on long texts it is the maximum of seven.)
#
# And how many queries should have a say? Only the last one knows the question.
# The seven before it have read filler, or other notes:

# %%
windows = (1, 2, 4, 8, 16)
print("queries         " + "".join(f"{window:6}" for window in windows))
for name, lm in notes_lms.items():
    shares = [
        recall_when_cut(lm, notes, 24, Snap(window, width=7)).accuracy
        for window in windows
    ]
    cells = "".join(f"{share:6.0%}" for share in shares)
    print(f"{name + ',':12} 24 {cells}")

# %% [markdown]
# A single query makes the best choice, since our question is a single token.
# (TOVA, by Oren and others, 2024, always asks the newest query alone.)
# Questions of people have more tokens than one, and nobody says where they
# begin, so papers take the last 8 to 64 queries. We stay with 8, which makes
# the task hard enough to see differences, and with seven neighbours.
#
# ### When the question comes later
#
# All this time the question was part of the prompt, so the last queries knew
# what was asked for. Suppose that a document is put into the cache and cut, and
# the question comes afterwards. Then the cache has to bet on which of the eight
# notes that will be:

# %%
snap = policies["snap"] = Snap(width=7)
print("of 24 tokens                     question known   not known")
for model_name, lm in notes_lms.items():
    for name, policy in policies.items():
        known, unknown = (
            recall_when_cut(lm, notes, 24, policy, knows).accuracy
            for knows in (True, False)
        )
        print(f"{model_name:12} {name:20} {known:13.0%} {unknown:11.0%}")

# %% [markdown]
# Of what snap got right, about half is lost. The others lose nothing, since
# they never knew. Whoever reports how well a policy does should say which of
# the two was measured, with the question or without. Feng and others (2024)
# measure both.
#
# ## Which layer needs its tokens?
#
# So far each layer got the same budget. Need it be so? Let us cut one layer
# *alone*, to the 8 tokens of the window, and leave the others whole. We did it
# for the two models, and for four more that were trained in the same way from
# other random numbers (`python -m lib.measure.layer_needs`):

# %%
runs = json.loads(layer_needs.RESULTS.read_text())
print("right, with layer 0, 1, ... alone cut to 8 tokens, and with none")
for name in ("notes_g2", "notes_l4"):
    for run in runs[name]:
        shares = [sum(layer) / len(layer) for layer in run["cut to 8"]]
        cells = " ".join(f"{share:5.0%}" for share in shares)
        whole = sum(run["whole"]) / len(run["whole"])
        print(f"{name}, seed {run['seed']}: {cells:23}  none: {whole:.0%}")

# %% [markdown]
# One layer needs its tokens, and the others need none but the newest! With two
# layers it is the second, in all three models. With four it is the second in
# two of them and the third in one. Without it, what is left is about what
# guessing gets (9%, chapter 7).
#
# PyramidKV (Cai and others, 2024) found in large models that lower layers look
# around widely, while higher ones look at only a few tokens. From this its
# authors conclude that lower layers should get more. They call it a
# **pyramid**: budgets fall in equal steps from the first layer to the last.
#
# ### Exercise 8.5 · `pyramid_budgets` ★★ (20 minutes)
#
# A budget includes the window, which each layer has. Of what the mean budget
# has beside it, m, the last layer gets m / beta and the first 2 m - m / beta;
# the others lie on the line between. Budgets are whole numbers, and their sum
# must be exactly as large as if each layer had the mean. So round (with
# Python's `round`) what the layers of the first half get above the mean, and
# give each layer of the second half as much less as its mirror image got more.
# (With four layers, layer 3 mirrors layer 0, and 2 mirrors 1. A layer in the
# middle gets the mean.)

# %% exercise="pyramid_budgets" given="1"
from lib.pruning import pyramid_budgets

# %%
check(pyramid_budgets)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The first layer gets m - m / beta more than the mean. On the way to the last
# layer that falls in a straight line, to as much less than the mean. What does
# layer l get?
#
# </details>
# <details><summary>Hint 2</summary>
#
# `round(most * (1 - 2 * layer / (num_layers - 1)))` more than the mean, for
# `layer` in `range(num_layers // 2)`; `num_layers - 1 - layer` is the mirror
# image.
#
# </details>

# %%
for beta in (2, 20):
    print(f"beta {beta:2}:", pruning.pyramid_budgets(48, 4, beta=beta))

# %% [markdown]
# A pyramid is a rule. It is also possible to measure, and to give each layer
# what it needs.
#
# ### Exercise 8.6 · `spread_budgets` ★★ (20 minutes)
#
# You get one number per layer, its need, whatever that may be. Each layer has
# its window, and of the rest of all budgets together a part as large as its
# share of the needs. Round the parts down; what is then left of the sum goes,
# one token each, to the layers that lost most by rounding.

# %% exercise="spread_budgets" given="1"
from lib.pruning import spread_budgets

# %%
check(spread_budgets)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The rest is `(mean_budget - window) * len(needs)`. How many tokens are left
# when every part has been rounded down? Fewer than there are layers.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `sorted(range(len(needs)), key=lambda layer: -lost[layer])` has the layers
# that lost most in front, and of equal ones the earlier, since `sorted` keeps
# their order.
#
# </details>

# %% [markdown]
# What is a layer's need? ZigZagKV (Zhong and others, 2024) takes the number of
# tokens over which its attention is spread, as we counted at the beginning.
# Another need is what we just measured: what is lost when this layer alone is
# cut. (We measure both on texts of their own, seed 3, and use them for others.)

# %% alt="Two plots: share of right answers over tokens per layer and KV head, on average. Two layers: by what is lost and pyramid upside down nearly coincide at the top, then by spread, then the same for each; pyramid is far below. Four layers: by what is lost is far above up to 24 tokens, then pyramid, the same for each, pyramid upside down, and by spread lowest."
others = [recall.first_question(recall.draw_task("notes", 32, seeded(3)))]
rules = {}
for name, lm in notes_lms.items():
    L = lm.config.num_layers
    whole = recall_when_cut(lm, others, lm.config.max_seq_len).accuracy
    lost = [max(whole - cut.accuracy, 0) for cut in cut_alone(lm, others, 8)]
    spread = spreads(lm, others[0].token_ids[:, :-4])
    rules[name] = {
        "the same for each": lambda mean, L=L: [mean] * L,
        "pyramid": lambda mean, L=L: pruning.pyramid_budgets(mean, L),
        "pyramid upside down": (
            lambda mean, L=L: pruning.pyramid_budgets(mean, L)[::-1]
        ),
        "by spread of attention": (
            lambda mean, spread=spread: pruning.spread_budgets(spread, mean)
        ),
        "by what is lost": (
            lambda mean, lost=lost: pruning.spread_budgets(lost, mean)
        ),
    }
    print(f"{name}: spread", " ".join(f"{x:.1f}" for x in spread), end="; ")
    print("lost", " ".join(f"{x:.0%}" for x in lost))

by_rule = {
    model_name: {
        rule: {
            mean: recall_when_cut(lm, notes, budgets_of(mean), snap)
            for mean in (12, 16, 24, 32)
        }
        for rule, budgets_of in rules[model_name].items()
    }
    for model_name, lm in notes_lms.items()
}
for model_name, found in by_rule.items():
    for rule, by_mean in found.items():
        budgets_of = rules[model_name][rule]
        print(f"{model_name}, {rule:22} {by_mean[24].accuracy:4.0%} "
              f"with {budgets_of(24)}")
plotting.plot_bands(
    {
        model_name: {
            rule: (list(by_mean), [q.accuracies for q in by_mean.values()])
            for rule, by_mean in found.items()
        }
        for model_name, found in by_rule.items()
    },
    xlabel="tokens per layer and KV head, on average",
    ylabel="share of answers that are right",
    title="Budgets by what is lost win; a pyramid fails with two layers",
    log_x=True,
);

# %% [markdown]
# *As above, always with snap. Left, the two best lines nearly coincide.*
#
# With two layers the pyramid is the wrong way round: the layer that needs its
# tokens is the last, which gets least. With four layers it is the second, and
# the pyramid is better than equal budgets. It could as well have been the
# third.
#
# The spread of attention leads astray with four layers. The layers that look
# around most widely can do without, and the one that looks at fewest tokens, 3
# or 4 at a time, cannot: it looks up a fact, in another place for each query.
# How *many* tokens a query looks at does not say how many must be there to be
# looked at.
#
# What is lost by cutting does say it, since that is what we want to know. Its
# price is a set of questions whose answers are known; it holds for this model
# and questions like these.
#
# ### What the papers found
#
# | | kept | found |
# |---|---|---|
# | H2O, OPT, LLaMA and GPT-NeoX | a fifth | about as good as all |
# | SnapKV, LongBench | 1,024 to 4,096 tokens | comparable, on 16 tasks |
# | PyramidKV, LongBench | 12% | as good as all |
# | PyramidKV, Llama 3 8B, LongBench | 64 per layer | 34.8 points, SnapKV 33.1 |
#
# (LongBench is a collection of tasks with long texts; points are out of 100.)
# Where budgets are large, PyramidKV gains nothing over SnapKV; where they are
# small, a little. What is alike: a small part of the cache is enough if the
# last queries choose it. What differs is the shape: their models have 32 layers
# and many things to look up, ours a single one in a single layer. So our
# numbers say that the shape of budgets matters and has to be measured, and
# nothing about which shape yours will have.
#
# ## One in, one out
#
# Until now a prompt was cut once, and what came after it was short. When a
# model writes on and on, its budget goes to what it has written. The book
# again: 128 bytes of prompt, then the other half of each passage, 8 bytes to a
# step, and after each step the cache is cut.

# %%
def book_in_steps(policy, budget, step_len=8):
    return measure_quality(
        book_lm,
        halves,
        make_cache=lambda config, B, _: PrunedKVCache(
            config, B, budget, policy
        ),
        step_lens=[128] + [step_len] * (128 // step_len),
    )


in_steps = {
    name: {budget: book_in_steps(policy, budget) for budget in (16, 32, 64)}
    for name, policy in ({"newest": Recent(num_sinks=0)} | policies).items()
}
print(f"nats per byte (with all tokens: {whole_book.mean_nats:.3f})")
print(f"{'budget':20}" + "".join(f"{budget:8}" for budget in (16, 32, 64)))
for name, by_budget in in_steps.items():
    cells = "".join(f"{q.mean_nats:8.3f}" for q in by_budget.values())
    print(f"{name:20}{cells}")

# %% [markdown]
# The newest 32 are again worse than 16. Heavy hitters and snap stay close to
# all 256 tokens with an eighth of them, so they must have kept the line breaks.
# Is that still so when the text goes on? Passages of 512 bytes now, 32 tokens,
# and nats per byte of the last 128:

# %%
long_book = []
for seed in range(3):
    examples = passages(4, 512, seeded(seed))
    examples.is_answer[:, :384] = False
    long_book.append(examples)


def has_last_break(policy):
    """How often layer 1 has the last line break, in the last 16 of 48 steps."""
    ids = long_book[0].token_ids[0]
    cache = PrunedKVCache(book_lm.config, 1, 32, policy)
    cache.begin(0)
    found = []
    for new_ids in ids.split([128] + [8] * 48):
        num_new = torch.tensor([len(new_ids)])
        generate.forward_cached(book_lm, cache, new_ids, num_new)
        so_far = ids[: int(cache.seq_lens[0])]
        last = (so_far == ord("\n")).nonzero()[-1]
        found.append((cache.positions(0)[1] == last).any().item())
    return sum(found[-16:]) / 16


whole_long = measure_quality(book_lm, long_book)
print(f"all tokens           {whole_long.mean_nats:.3f}")
for name in ("heavy hitters", "snap"):
    quality = measure_quality(
        book_lm,
        long_book,
        make_cache=lambda config, B, _, name=name: PrunedKVCache(
            config, B, 32, policies[name]
        ),
        step_lens=[128] + [8] * 48,
    )
    share = has_last_break(policies[name])
    print(f"{name:20} {quality.mean_nats:.3f}, has the last break {share:.0%}")

# %% [markdown]
# Heavy hitters and snap still have it. (Snap averages over neighbours only when
# a prompt is cut. Later, what lies side by side in the cache need not be
# neighbours in the text. We tried the mean in every step: it lost the line
# breaks.)
#
# ### A last column for the table
#
# How do memory and work grow now, with tokens N and layers L? We measure a
# cache that keeps 8 tokens beside those of chapters 3 and 4, with your
# functions inside:

# %%
sizes = table.SMALL_SIZES
cells = [
    cell
    for name in ("contiguous", "paged", "pruned")
    for cell in table.fit(table.sweep(name, sizes=sizes))
]
Markdown(table.render(cells, sizes))

# %% [markdown]
# Memory has lost its N. And with it went one N of the attention's work: a query
# meets the 8 keys that were kept, and its own, however long the text.
#
# ## Holes
#
# Does a cache in blocks get its blocks back? In chapter 4 a block has the keys
# and values of 16 tokens, for all layers and heads. It is free only when *no*
# head of *any* layer keeps one of its tokens. Otherwise the tokens have to be
# moved together, which is a copy.
#
# ### Exercise 8.7 · `blocks_freed` ★★ (15 minutes)
#
# You get which of S tokens each KV head of each layer keeps, (L, G, S), and the
# size of a block. Count the blocks that become free where the tokens lie, and
# those that become free when the tokens of each head are moved together, from
# the first block on. (Heads may keep different numbers of tokens. The one that
# keeps most says how many blocks are needed.)

# %% exercise="blocks_freed" given="1"
from lib.pruning import blocks_freed

# %%
check(blocks_freed)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Two counts of blocks that are still used. For the first, a token is in use if
# any head of any layer keeps it. The last block may not be full: pad S up to
# whole blocks.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `is_kept.any(dim=0).any(dim=0)` is (S,); padded with zeros, viewed as
# (num_blocks, block_size) and asked for `any(dim=1)` it says which blocks are
# used. Moved together, they are `-(-most // block_size)` for the largest of
# `is_kept.sum(dim=-1)`.
#
# </details>

# %% [markdown]
# There is a third way: throw out whole blocks. A block is worth what its tokens
# are worth together, to all heads of a layer, so that at least the heads agree.
# The policy below does that with snap's scores. How much comes free of 105
# tokens in 7 blocks, if 40 tokens stay, the window and two blocks, and what is
# left of the notes?

# %%
class SnapBlocks(Snap):
    """Snap's scores, averaged over blocks of 16 tokens and over heads."""

    def __call__(self, weights, scores, budget):
        scores = super().__call__(weights, scores, budget)
        G, S = scores.shape
        if weights.shape[1] < S:  # only a prompt is cut by blocks
            return scores
        blocks = F.pad(scores, (0, -S % 16)).view(G, -1, 16)
        worth = blocks.mean(dim=(0, 2)).repeat_interleave(16)[:S]  # (S,)
        return worth.expand(G, -1)


def freed(lm, policy, budget):
    """Blocks freed in place and by moving: the mean over the texts told."""
    pairs = []
    for prompt in told:
        kept = torch.stack(kept_by(lm, policy, budget, prompt))  # (L, G, n)
        is_kept = torch.zeros(*kept.shape[:2], len(prompt), dtype=torch.bool)
        is_kept.scatter_(2, kept, True)
        pairs.append(pruning.blocks_freed(is_kept, 16))
    return [sum(counts) / len(pairs) for counts in zip(*pairs)]


print("of 7 blocks             free in place   moved   right")
for model_name, lm in notes_lms.items():
    for name, policy in (
        ("by token", snap), ("by block", SnapBlocks()), ("newest", Recent(0))
    ):
        in_place, moved = freed(lm, policy, 40)
        share = recall_when_cut(lm, notes, 40, policy).accuracy
        print(f"{model_name:11}  {name:10} "
              f"{in_place:12.1f} {moved:7.1f} {share:7.0%}")

# %% [markdown]
# By token, hardly a block comes free without moving: nearly every block has a
# token that some head of some layer keeps. By block it is more, though each
# layer chooses its own blocks, and recall suffers. The newest tokens lie
# together, and free most; they are also the worst bet.
#
# How many more requests is that? We fill a pool of 112 blocks with requests of
# 105 tokens, whole or cut to 40 and moved together:

# %%
def requests_that_fit(num_tokens):
    manager = BlockManager(num_blocks=112, block_size=16)
    while len(manager.free_block_ids) >= -(-num_tokens // 16):
        manager.allocate(len(manager.block_tables), num_tokens)
    return len(manager.block_tables)


print(f"{requests_that_fit(105)} requests, {requests_that_fit(40)} when cut")
moved = 2 * kv_cache.kv_cache_bytes(LLAMA3_8B, 40, bytes_per_number=2)
print(f"moved, in Llama 3 8B: {moved / 2**20:.0f} MiB, read and written, once")

# %% [markdown]
# Moving costs a copy per prompt. While decoding, one token leaves and one
# comes: the new one is best put where the old one was.
#
# ## Where pruning helps
#
# What we have measured says it:
#
# - **A long prompt, its question at the end, a short answer.** Snap keeps what
#   the question looks at. That is what it was made for.
# - **A text that goes on.** Heavy hitters keep the few tokens that the model
#   comes back to. (Since positions go on too, the text ends at the model's
#   longest all the same. StreamingLLM counts positions in the cache instead.)
# - **Not several questions about one text**, and not a prompt that many
#   requests share (chapter 6): what the first question does not look at is gone
#   for the second.
#
# And do not judge by the book alone. With 32 tokens heavy hitters cost it 0.02
# nats per byte; of the notes they lose two answers in five, or half.

# %%
check.summary()

# %% [markdown]
# ## What is still wrong
#
# - A token that was thrown out does not come back. A wrong guess gives a wrong
#   answer, and nothing says so.
# - Heavy hitters and snap want to see weights, which fused attention never has
#   in memory (chapter 5). For snap it is enough to compute those of the last
#   queries again; heavy hitters want them all.
# - A prompt is read whole before it is cut. That step has all keys and values
#   of a layer, and all of its weights, T² for each head: more than without
#   pruning.
# - Our cache writes what it keeps beside what was there, so while a step runs
#   there are two of each.
# - Each head has the same budget. Feng and others (2024) let the heads of a
#   layer share one.
# - What is read is what costs time. Quest (Tang and others, 2024) keeps all
#   tokens and *reads* few; then a wrong guess can be made good.
# - The cache keeps some tokens as they are, and forgets the others entirely.
#   Could it keep a little of all of them, in a memory of fixed size?
#
# ## In five sentences
#
# 1. With a budget per layer, one token goes for each that comes, and the
#    cache's memory no longer depends on the length of the text.
# 2. Which tokens go is a bet: on the newest, on those that received much
#    attention, or on those that the last queries look at, with their
#    neighbours.
# 3. Tokens are chosen per KV head, keys stay as they were rotated, and
#    positions go on.
# 4. How many tokens a layer needs is found by cutting it alone; neither its
#    depth nor the spread of its attention says it.
# 5. In blocks, thrown out tokens leave holes, and hardly a block comes free
#    unless what is kept is moved together.
#
# ## Do you recall?
#
# 1. A model has 32 query heads and 4 KV heads. Its keys are repeated before
#    they are pruned to an eighth. How much memory is saved?
# 2. A cache keeps the first 4 tokens and 60 others. The text has 1,000 tokens
#    so far. By which position is the next key rotated, and at which distance
#    does its query see the first token?
# 3. What does `attention_received` say of a token that has just come, and what
#    follows for a policy?
# 4. Why is a score averaged over neighbours? When does it harm?
# 5. A model's layer 5 looks at two tokens, layer 9 at a hundred. Which of them
#    can be cut to 8 tokens?
# 6. 1,000 tokens lie in blocks of 16, and each of 256 heads keeps 100 of them,
#    chosen by itself. About how many blocks become free where they lie?
#
# <details><summary>Answers</summary>
#
# 1. None: 32 keys per token, of which an eighth is kept, are as many as 4.
# 2. By 1,000 (the first has position 0). At distance 1,000, whatever was
#    thrown out between.
# 3. Next to nothing: one query has seen it, its own. So the newest tokens must
#    be kept whatever their score.
# 4. What is needed seldom stands alone: behind the token that is looked at
#    stand those that the next queries will look at. If what is needed does
#    stand alone, its neighbours only use up the budget.
# 5. Nobody can tell from that. Cut each of them alone, and measure.
# 6. Hardly any: a block is free only if all 256 heads have thrown out all 16 of
#    its tokens.
#
# </details>
#
# ## Sources
#
# - Xiao and others, *Efficient Streaming Language Models with Attention Sinks*,
#   2023, [2309.17453](https://arxiv.org/abs/2309.17453): sinks, and Table 1
#   with the perplexities above. (They rotate keys by their place in the cache,
#   so that positions never grow; we do not.)
# - Zhang and others, *H2O: Heavy-Hitter Oracle*, 2023,
#   [2306.14048](https://arxiv.org/abs/2306.14048): attention received. Half of
#   its budget goes to the newest tokens.
# - Li and others, *SnapKV*, 2024,
#   [2404.14469](https://arxiv.org/abs/2404.14469): the last queries, and
#   pooling.
# - Cai and others, *PyramidKV*, 2024,
#   [2406.02069](https://arxiv.org/abs/2406.02069): budgets that fall from layer
#   to layer (section 4).
# - Zhong and others, *ZigZagKV*, 2024,
#   [2412.09036](https://arxiv.org/abs/2412.09036): budgets by what each layer
#   needs to hold its attention.
# - Oren and others, *Transformers are Multi-State RNNs*, 2024,
#   [2401.06104](https://arxiv.org/abs/2401.06104): TOVA.
# - Tang and others, *Quest*, 2024,
#   [2406.10774](https://arxiv.org/abs/2406.10774): keep all, read few.
# - Feng and others, *Ada-KV*, 2024,
#   [2407.11550](https://arxiv.org/abs/2407.11550): budgets per head; and how
#   much is lost when the question is not known.
