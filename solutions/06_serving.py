# %% [markdown]
# # 6. Serving: who gets the pool next?
#
# Chapter 4 put about five times as many requests into the same memory. But so
# far nobody was served: all requests of a batch came together, and the batch
# ended with its longest text. Real requests come when they like and end when
# they like. So at every step somebody has to decide who takes part, who begins,
# and who has to go when the pool is full. That is a scheduler, and some twenty
# lines of it make the difference between a cache and a server. You write them
# here, and then watch what they do: who was in the batch when, how long
# somebody waited, and what was computed twice. At the end, requests that begin
# alike find each other's blocks again, without having been told.
#
# **You need:** chapter 4, and 150 minutes. No GPU.
#
# **You will be able to**
#
# - write the schedule of a serving engine: decodes, pieces of prompts, a budget
#   of tokens and of blocks,
# - explain why static batches waste steps, and predict how many,
# - say what preemption costs and what a watermark saves,
# - tell the time to the first token from the time between tokens, and trade one
#   for the other,
# - replay, in a model, the PagedAttention paper's curve of latency over request
#   rate,
# - find the beginning of a prompt in blocks that others have computed.

# %%
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
import hashlib
import statistics
import struct

import torch

from lib import engine, generate, model, prefix_cache, simulation, text
from lib.figures import drawing, plotting
from lib.measure import meter
from lib.course.check import check
from lib.engine import Engine, Load, Request
from lib.kv_cache import ContiguousKVCache, KVCache
from lib.paged_kv_cache import PagedKVCache
from lib.prefix_cache import PrefixKVCache
from lib.simulation import Paging, Reserving

plotting.use_course_style()
torch.set_num_threads(1)  # steadier timings

# %% [markdown]
# ## A batch lasts as long as its longest text
#
# Sixteen requests wait for our model. Each is a passage of the book that is to
# be continued, some by a few tokens, some by many; the lengths are drawn, as in
# chapter 4. We serve them in batches of four, the way chapter 3 did: a batch
# begins with one step over four prompts, then goes on by one token of each, and
# the next batch begins when all four are done.

# %%
lm = model.load_model()
book_ids = text.encode(text.load_book())
lengths = simulation.draw_requests(16, 40, 40, seed=4)
prompts = [
    book_ids[5000 * i : 5000 * i + request.prompt_len]
    for i, request in enumerate(lengths)
]
output_lens = [request.output_len for request in lengths]
print("tokens of each answer:", output_lens)

# %%
num_steps = simulation.static_steps(output_lens, batch_size=4)
print(f"{num_steps} steps, {sum(output_lens)} tokens: ", end="")
print(f"{sum(output_lens) / num_steps:.1f} tokens per step, of 4 possible")

# %% [markdown]
# Most steps run with empty places, since those who are done wait for the
# longest. And a request that comes while a batch is running waits for all of
# it. Both end if the batch is put together anew **at every step**. This is
# called *continuous batching*, or iteration-level scheduling (Orca, 2022).
# Chapters 3 to 5 have prepared it: a step takes any number of new tokens for
# each request, and a cache that begins and frees requests one by one.
#
# ## Two requests, blocks of two, on paper
#
# Two requests come together: a with the prompt `w h a`, b with `l e s`. Each
# wants three tokens more, its 1st, 2nd and 3rd. The pool has four blocks of two
# places, and a step computes at most four tokens, its **token budget**. Who
# began first comes first:
#
# | step | a | b | free blocks |
# |---|---|---|---|
# | 1 | computes `w h a`, draws 1st | computes `l` | 1 |
# | 2 | computes 1st, draws 2nd | computes `e s`, draws 1st | 0 |
# | 3 | computes 2nd, draws 3rd: done | is sent back | 4 |
# | 4 | | computes `l e s` and 1st, draws 2nd | 2 |
# | 5 | | computes 2nd, draws 3rd: done | 4 |
#
# 1. The budget is used up by a's prompt and one token of b's: that one comes in
#    pieces.
# 2. Now a has filled its two blocks, and b has one place left.
# 3. For its next token a needs a third block. None is free, and b began last:
#    it is sent back. It now knows four tokens and needs two blocks to begin
#    again, of which one is free. Then a is done.
# 4. Nothing that b has drawn is lost, but it is computed again.
# 5. The last token of an answer never enters the cache.
#
# Free blocks are counted after the step. Nothing else happens in an engine. A
# step is
#
# 1. **make room**: while those who decode need more blocks than are free, send
#    back whoever began last;
# 2. **schedule**: how many new tokens of each request?
# 3. one **forward call** over all these tokens, ragged, as in chapter 3;
# 4. **draw** a token for each request that is computed to its end;
# 5. **finish** those that are done, and give their blocks back.
#
# ## The schedule
#
# The schedule sees plain numbers. Of each request it gets a `Load`: how many
# tokens it knows, prompt and answer so far; how many of these are in the cache;
# and how many blocks it has. What a request misses is the difference of the
# first two. A request that misses exactly one token *decodes*: as a rule that
# is the token that was drawn last.
#
# The rules, each with its reason:
#
# - **Decodes first**, in order of arrival. Somebody is reading along.
# - **Then running prompts**, in order of arrival: as many tokens as the budget
#   and the free blocks allow, which may be none. A prompt may take several
#   steps.
# - **Then those who wait**, in order. The first one begins if there is a token
#   left in the budget, and if blocks for *all* that it knows are free. (If it
#   were let in for its first piece only, it could get stuck halfway, with
#   blocks that those who decode will soon need; then it is sent back, and its
#   pieces were computed for nothing.) If it may not begin, nobody behind it
#   may: otherwise long requests could wait for ever.
# - `watermark_blocks` stay free when somebody begins, so that those who decode
#   can grow, as in chapter 4. While nobody runs, and nobody has begun in this
#   step, nobody needs them.
#
# `num_blocks` of a `Load` are blocks that the request has for itself. A last
# block that others share is not among them, since who writes there needs a copy
# (chapter 4). So a request may have less room than it has tokens; it gets 0
# then.
#
# %%
Load(num_tokens=9, num_cached=8, num_blocks=2)  # decodes

# %% [markdown]
# ### Exercise 6.1 · `schedule` ★★★ (40 minutes)
#
# Return a list: a count for each running request, in the order in which they
# came (0 for one that gets none), then one for each that begins, at least 1.
# `waiting` may be long, and may be an iterator: look at no more requests than
# you have to. Two paragraphs are missing: one loop for those who run, one for
# those who wait.

# %% exercise="schedule" given="1 2"
from lib.engine import schedule

# %%
check(schedule)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `sorted(range(len(running)), key=…)` goes through the running requests with
# those first for which the key is `False`, and keeps the order otherwise. With
# its own blocks and all that are free, a request has room for
# `(load.num_blocks + free) * block_size` tokens; `num_cached` of them are there
# already. When it gets `count` tokens, `free` falls by the blocks that these
# take beyond those that it has.
#
# </details>
# <details><summary>Hint 2</summary>
#
# For each `load` in `waiting`, `needed = num_blocks(load.num_tokens) -
# load.num_blocks`. Stop (`break`) when the budget is 0, or `needed` and the
# watermark together are more than `free`. The watermark counts only if `counts`
# has somebody in it. Otherwise append a count, and subtract from the budget and
# from `free`.
#
# </details>

# %% [markdown]
# The first step of our table: nothing runs, two requests of three tokens wait.

# %%
a, b = Load(3, 0, 0), Load(3, 0, 0)
engine.schedule([], [a, b], num_free_blocks=4, token_budget=4, block_size=2)

# %% [markdown]
# And the second: a misses the token it drew, and has two blocks; b misses the
# rest of its prompt, and has one.

# %%
a, b = Load(4, 3, 2), Load(3, 1, 1)
engine.schedule([a, b], [], num_free_blocks=1, token_budget=4, block_size=2)

# %% [markdown]
# ### Exercise 6.2 · `finish_reason` ★ (5 minutes)
#
# A request ends with one of its stop tokens, or with its last allowed token.
# Say why: `"stop"`, `"length"`, or `None` if it goes on. If both are true, the
# text has come to its own end: `"stop"`.

# %% exercise="finish_reason"
from lib.engine import finish_reason

# %%
check(finish_reason)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Only the last of `new_ids` can be the stop token: with an earlier one the
# answer would have ended earlier.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `new_ids[-1] in stop_ids`, and `len(new_ids) >= max_new_tokens`.
#
# </details>

# %% [markdown]
# ### Exercise 6.3 · `preempt` ★★ (10 minutes)
#
# Those who decode need more blocks than are free. Send back the request that
# began last. It keeps all its tokens, those that it has drawn too: when it
# begins again, they are its prompt. (They are in the request; you need do
# nothing for that.) It goes to the *head* of the queue, since everybody there
# came later. And its blocks go back to the pool.

# %% exercise="preempt"
from lib.engine import preempt

# %%
check(preempt)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `cache.free(request.request_id)` gives the blocks back. The cache forgets the
# request's tokens, the request does not: they are in `request.token_ids`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `running.pop()` takes the last of a list; `waiting.appendleft(…)` puts it at
# the head of a deque.
#
# </details>

# %% [markdown]
# ## The engine
#
# `Engine` in lib/engine.py is the five lines above. Whichever of your three
# functions have passed stand in it. `add` puts a request at the end of the
# queue and returns a `Request`, in which its text will appear. `step` makes one
# step and says what it did. Let us play the table from above:

# %%
def step_line(number, step):
    print(f"step {number}: computed {step.counts}, ", end="")
    print(f"sent back {step.preempted}, ended {step.finished}, ", end="")
    print(f"{step.num_free_blocks} blocks free")


pool = PagedKVCache(lm.config, num_blocks=4, block_size=2)
serving = Engine(lm, pool, token_budget=4)
for name, prompt in (("a", "wha"), ("b", "les")):
    serving.add(text.encode(prompt), 3, request_id=name, temperature=0)
for number, step in enumerate(serving.run(), start=1):
    step_line(number, step)

# %% [markdown]
# Five steps, as on paper.
#
# ### A text that comes as it is written
#
# `stream` is a request whose tokens you get one by one, as soon as they are
# there. Others may be served meanwhile: when you ask for a token that is not
# there yet, the engine makes steps for everybody until it is.

# %%
pool = PagedKVCache(lm.config, num_blocks=64, block_size=16, fused_decode=True)
serving = Engine(lm, pool)
other = serving.add(text.encode("The sea "), 30, temperature=0.7, seed=1)
print("Call me ", end="")
for token_id in serving.stream(
    text.encode("Call me "), 60, temperature=0.7, seed=0
):
    print(text.decode(torch.tensor([token_id])), end="", flush=True)
print(f"\nmeanwhile: {text.decode(torch.tensor(other.token_ids))!r}")

# %% [markdown]
# ## It computes the same thing
#
# Who is in the batch must not change what anybody reads. We serve twelve
# requests from a pool that is much too small for them, with a budget that cuts
# most prompts into pieces. In double precision each text has to be the one that
# its prompt gives alone.

# %%
double_lm = model.load_model().double()


def serve(cache, num_new_tokens, lm=lm, **settings):
    """The requests and steps of an engine that is given all prompts at once."""
    serving = Engine(lm, cache, **settings)
    requests = [
        serving.add(prompt, count, temperature=0)
        for prompt, count in zip(prompts, num_new_tokens)
    ]
    return requests, serving.run()


small = PagedKVCache(lm.config, 24, block_size=8, dtype=torch.float64)
requests, steps = serve(small, [24] * 12, lm=double_lm, token_budget=16)
alone = [
    generate.generate_recompute(
        double_lm, prompt, 24, temperature=0
    )
    for prompt in prompts[:12]
]
num_sent_back = sum(len(step.preempted) for step in steps)
is_same = all(r.token_ids == a.tolist() for r, a in zip(requests, alone))
print(f"{len(steps)} steps, {num_sent_back} times one was sent back; ", end="")
print(f"same texts: {is_same}")

# %% [markdown]
# ## Who was in the batch when
#
# Back to the sixteen requests. A batch above had four places; here a pool of 28
# blocks of 16 decides how many run at a time. What is gained by filling places
# at once, and what by having more of them? With four places (a pool of four
# blocks, each as long as the longest text) we see the first alone.

# %%
pool = PagedKVCache(lm.config, 28, block_size=16, fused_decode=True)
requests, steps = serve(pool, output_lens, token_budget=64)
sent_back = sum(len(step.preempted) for step in steps)
four_places = simulation.predict_steps(
    lengths, num_blocks=4, block_size=512, token_budget=512
)
print(f"static batches of four {num_steps} steps, ", end="")
print(f"four places, filled at once, {len(four_places)}; ", end="")
print(f"the pool {len(steps)}, with {sent_back} sent back")

# %% [markdown]
# (The longest answer has 111 tokens, so fewer steps are impossible. How
# `predict_steps` knows steps that nobody has made, we shall see below.)

# %% alt="A row for each of sixteen requests over 111 steps: a short prompt (blue), then decode (orange). Request 0 takes all steps. Request 10 is sent back once and 11 twice (crosses); they wait (grey lines) and are computed again (hatched). Requests 12 to 15 begin only after that."
drawing.draw_gantt(
    steps, title=f"Sixteen requests in {len(steps)} steps"
);

# %% [markdown]
# *A row is a request. Blue: pieces of its prompt; orange: a token of its answer
# at each step; hatched: computed again, after it was sent back (cross) and had
# waited (grey line). Request 10 is sent back once and 11 twice; 12 to 15 have
# not begun by then, and wait for both.*

# %% alt="Two plots over 111 steps. Above, blocks in use: they climb in a few steps to all 28, where three crosses mark requests sent back; later they are fewer, under ten at the end. Below, requests: those in the batch climb to 12 and fall in steps to 1; those that wait fall, rise again as some are sent back, and fall to 0."
peak = 28 - min(step.num_free_blocks for step in steps)
plotting.plot_pool(
    steps, num_blocks=28,
    title=f"Up to {peak} of 28 blocks are in use at one time",
);

# %% [markdown]
# ### Predict, then measure
#
# This engine never looks at what a token *is*, unless it is a stop token. So if
# the lengths are known, the schedule can be computed without a model.
# `simulation.predict_steps` does that: the same `schedule` and the same rule
# for sending back, on numbers alone.

# %%
predicted = simulation.predict_steps(
    lengths, num_blocks=28, block_size=16, token_budget=64
)
same = [step.counts for step in predicted] == [step.counts for step in steps]
print(f"{len(predicted)} steps predicted, {len(steps)} made; ", end="")
print(f"each with the same tokens: {same}")

# %% [markdown]
# ### In seconds
#
# Fewer steps are not the same as less time: a step over many tokens takes
# longer. Here are three ways on this machine, with the same sixteen requests:
# batches of four one after the other, the engine with four places (a contiguous
# cache of four rows), and the engine with a pool for all.

# %%
def static_batches():
    """Batches of four, each until its longest answer is there."""
    for i in range(0, 16, 4):
        cache = PagedKVCache(lm.config, 64, block_size=16, fused_decode=True)
        for request_id in range(4):
            cache.begin(request_id)
        longest = max(output_lens[i : i + 4])
        generate.generate_cached(
            lm, prompts[i : i + 4], longest, cache, temperature=0
        )


def four_rows():
    serve(ContiguousKVCache(lm.config, 4, 256, fused_decode=True), output_lens)


def one_pool():
    pool = PagedKVCache(lm.config, 64, block_size=16, fused_decode=True)
    serve(pool, output_lens, token_budget=64)


seconds = meter.medians_in_turns(
    {
        "batches of four": static_batches,
        "engine, four rows": four_rows,
        "engine, a pool": one_pool,
    },
    repeats=3,
)
for name, median in seconds.items():
    print(f"{name:17} {sum(output_lens) / median:5.0f} tokens per second")

# %% [markdown]
# ## What somebody waits for
#
# Tokens per second are the operator's number. Whoever asks sees two others: the
# **time to the first token**, and the **time between tokens** after it. The
# paper has a third that combines them: the time from arrival to the last token,
# divided by the number of tokens, called *normalized latency*.
#
# ### Exercise 6.4 · `latencies` ★ (5 minutes)
#
# `times` are the seconds at which a request's tokens came, one at least. An
# answer of one token has no time between tokens: return 0 for it.

# %% exercise="latencies"
from lib.engine import latencies

# %%
check(latencies)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Between n tokens there are n - 1 gaps. Their mean needs only the first time
# and the last.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `max(len(times) - 1, 1)` keeps you from dividing by zero, and the difference
# above it is 0 then.
#
# </details>

# %% [markdown]
# ### A long prompt: whole, or in pieces?
#
# Four people are reading along when somebody else sends a prompt of 400 tokens.
# With a large budget it enters in one step, and that step is long: all four
# wait for it. With a small budget it enters in pieces, beside the decodes.

# %%
def token_times(steps):
    """The seconds at which each request's tokens came, from step 1 on."""
    now, times = 0.0, {}
    for step in steps:
        now += sum(step.seconds.values())
        for request_id in step.next_ids:
            times.setdefault(request_id, []).append(now)
    return times


def read_along(token_budget):
    """The steps of four readers, and of a newcomer who comes after 20 steps."""
    pool = PagedKVCache(lm.config, 64, block_size=16, fused_decode=True)
    serving = Engine(lm, pool, token_budget=token_budget)
    for i in range(4):
        prompt = book_ids[1000 * i : 1000 * i + 16]
        serving.add(prompt, 80, request_id=i, temperature=0)
    steps = [serving.step() for _ in range(20)]
    serving.add(book_ids[9000:9400], 10, request_id="new", temperature=0)
    return steps + serving.run()


budgets = [404, 104, 29]
runs = {budget: [] for budget in budgets}
for _ in range(3):  # in turns; each run takes the same steps
    for budget in budgets:
        runs[budget].append(read_along(budget))
for of_budget in runs.values():
    largest = max(sum(step.counts.values()) for step in of_budget[0])
    all_times = [token_times(steps) for steps in of_budget]
    waits, firsts = [], []
    num_pieces = sum("new" in step.counts for step in of_budget[0]) - 9
    for steps, times in zip(of_budget, all_times):
        arrived = sum(sum(step.seconds.values()) for step in steps[:20])
        firsts.append(engine.latencies(arrived, times["new"])["first"])
        waits.append(max(b - a for a, b in zip(times[0], times[0][1:])))
    print(f"largest step {largest:3} tokens: a reader waits ", end="")
    print(f"{1000 * min(waits):4.0f} ms at most, the newcomer ", end="")
    print(f"{1000 * min(firsts):4.0f} ms, {num_pieces} steps")

# %% [markdown]
# (The fastest of three runs.) In pieces, the longest wait of those who read is
# a fraction of what it was; very small pieces gain little more, since every
# step takes some time whatever it computes. For that they cost more: the
# newcomer needs more steps until the first token, and all in all everything
# takes longer. This is *chunked prefill* (SARATHI, 2023, and Sarathi-Serve,
# 2024). Between too large a budget and too small a one there is a choice of who
# waits.
#
# ## When the pool runs dry
#
# Whoever is sent back is computed again. Chapter 4 counted that in a simulation
# with steps of its own; here it is with the engine's schedule, for lengths
# drawn as there, and a pool of 400 blocks:

# %%
chats = simulation.draw_requests(150, 161.3, 338.0)
for watermark in (0, 0.02, 0.05, 0.2):
    predicted = simulation.predict_steps(
        chats, 400, 16, token_budget=512, watermark=watermark
    )
    computed = sum(sum(step.counts.values()) for step in predicted)
    needed = sum(r.num_tokens - 1 for r in chats)
    sent_back = sum(len(step.preempted) for step in predicted)
    print(f"watermark {watermark:3.0%}: {sent_back:3} sent back, ", end="")
    print(f"{computed / needed - 1:5.1%} computed again, ", end="")
    print(f"{len(predicted)} steps")

# %% [markdown]
# (The last token of an answer is never computed, hence the `- 1`.) This pool is
# small for such requests, and so many are sent back. A watermark saves most of
# what is computed again. It hardly changes the number of steps, until it is so
# large that requests wait outside for room that nobody uses: it makes steps
# shorter, not fewer.
#
# ## How large is the pool?
#
# ### Exercise 6.5 · `tokens_that_fit` ★ (5 minutes)
#
# A server loads the weights, keeps some memory for activations and for whatever
# else there is, and gives the rest to the pool. Servers have an option for the
# share of a GPU's memory that they may use. (In vLLM it is called
# `gpu_memory_utilization`, long 0.9 by default, now 0.92.) Here this share is
# for weights and pool together.

# %% exercise="tokens_that_fit"
from lib.engine import tokens_that_fit

# %%
check(tokens_that_fit)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Bytes for the pool: `share * memory_bytes - weight_bytes`. Tokens come whole.
#
# </details>
# <details><summary>Hint 2</summary>
#
# If the weights alone are too large, that number is negative: then no token
# fits.
#
# </details>

# %% [markdown]
# Two models with 16 bits per number, on 80 GB. Llama 2 13B has 40 layers with
# 40 KV heads of 128 numbers; Llama 3 8B has 32 layers with 8.

# %%
for name, weight_bytes, bytes_per_token in (
    ("Llama 2 13B", 26e9, 2 * 40 * 40 * 128 * 2),
    ("Llama 3 8B", 16e9, 2 * 32 * 8 * 128 * 2),
):
    tokens = engine.tokens_that_fit(80e9, weight_bytes, bytes_per_token)
    print(f"{name}: {bytes_per_token:7,} bytes per token, ", end="")
    print(f"{tokens:7,} tokens, {tokens // 500:3} requests of 500")

# %% [markdown]
# The smaller model leaves 56 GB for the pool instead of 46, a fifth more, but
# its tokens take less than a sixth of the bytes, mostly since groups of four
# query heads share a KV head. That is the next chapter's subject.
#
# ## The paper's curve
#
# How many requests per second can a server take? The paper's answer is a curve
# (figure 12): normalized latency over the rate at which requests come. With few
# requests, all managers are nearly equal. From some rate on, requests come
# faster than they are served; the queue grows, and latency with it. Where that
# happens depends on how many requests fit into the pool at one time.
#
# We replay it with the four managers of chapter 4, for the model and the pool
# of that chapter: 13 billion parameters on an A100. How long does a step take
# there? A step reads all weights once, computes each new token, and reads the
# keys and values of all tokens before. From the data sheet, 1.555 TB/s and 312
# TFLOP/s, we get an estimate, not a measurement: all at full speed, one after
# the other.

# %%
on_a_gpu = simulation.StepSeconds(
    fixed=26e9 / 1.555e12,
    per_new_token=26e9 / 312e12,
    per_cached_token=2 * 40 * 5120 * 2 / 1.555e12,
)
for batch_size in (1, 7, 30):
    step_ms = 1e3 * on_a_gpu(batch_size, 300 * batch_size)
    print(f"{batch_size:2} requests of 300 tokens: {step_ms:4.1f} ms per step")

# %% [markdown]
# Thirty requests take 1.4 times as long as one: reading the weights is most of
# a step. So whoever has room for more of them serves more.

# %%
POOL = 15_728  # slots, as in chapter 4
chats = simulation.draw_requests(300, 161.3, 338.0)
kinds = {
    "maximum": lambda: Reserving(POOL, simulation.reserve_maximum),
    "power of two": lambda: Reserving(POOL, simulation.reserve_power_of_two),
    "oracle": lambda: Reserving(POOL, simulation.reserve_oracle),
    "blocks of 16": lambda: Paging(POOL, 16, watermark=0.02),
}


def mean_latency(manager, rate):
    """Normalized, in seconds per token, at so many requests per second."""
    arrivals = simulation.draw_arrivals(len(chats), rate)
    served = simulation.serve(manager, chats, arrivals, on_a_gpu)
    return sum(one.normalized for one in served) / len(served)


rates = [0.25, 0.5, 1, 1.5, 2, 3, 4, 6]
curves = {
    name: (rates, [mean_latency(manager(), rate) for rate in rates])
    for name, manager in kinds.items()
}

# %% alt="Normalized latency, in seconds per token on a logarithmic axis, over requests per second, up to 6. Four curves begin as one, low, and bend upwards one after the other: maximum first, then power of two, oracle, and last blocks of 16, the lowest at every rate from there on."
LIMIT = 0.1  # # seconds per token: twice as fast as one reads
sustained = {
    name: max(rate for rate, wait in zip(*curve) if wait < LIMIT)
    for name, curve in curves.items()
}
plotting.plot_latency(
    curves,
    title=f"Below {LIMIT:g} s per token: up to {sustained['maximum']:g}/s "
    f"with rows, {sustained['blocks of 16']:g}/s with blocks",
);

# %% [markdown]
# *In the title: the highest of these rates at which these 300 requests waited
# less than a tenth of a second per token, queue included; "rows" are those for
# the maximum. Where a curve bends, requests come faster than they are served;
# from there on latency depends on how long the rush lasts.*
#
# And on this machine? For that we need no model: here are decode steps of the
# engine, with one request of 300 tokens and with thirty.

# %%
def decode_seconds(batch_size):
    """The median of a step in which so many requests bring one token."""
    pool = PagedKVCache(lm.config, 640, block_size=16, fused_decode=True)
    serving = Engine(lm, pool, token_budget=512)
    for i in range(batch_size):
        serving.add(book_ids[300 * i : 300 * i + 300], 40, temperature=0)
    while serving.waiting or any(not r.new_ids for r in serving.running):
        serving.step()
    steps = [serving.step() for _ in range(9)]
    return statistics.median(sum(s.seconds.values()) for s in steps)


one, thirty = decode_seconds(1), decode_seconds(30)
print(f"{1000 * one:.1f} ms and {1000 * thirty:.1f} ms: thirty take ", end="")
print(f"{thirty / one:.1f} times as long, for thirty times the tokens")

# %% [markdown]
# Both gain from more room in the pool, a GPU more than a processor's core: it
# has more computing power to spare for each byte that it reads.
#
# ## The same beginning, computed once
#
# Many prompts begin alike: a system prompt, a document that several people ask
# about, a conversation that comes back with one more question. In chapter 4, a
# fork shared blocks because somebody said so. Here nobody says so. When a
# request begins, the cache looks for blocks that hold the beginning of its text
# already. For that a block needs a name that says what is in it.
#
# A name made of the block's own tokens is not enough. Keys and values of a
# token depend on everything before it, so the same four tokens behind another
# beginning have other keys. So each full block gets a hash over its tokens
# *and its predecessor's hash*: a chain, in which each name stands for the whole
# text so far.
#
# ### Exercise 6.6 · `block_hashes` ★★ (15 minutes)
#
# Return a hash for each full block. A block that is filled in part gets none:
# more tokens may still come. Python's own `hash` will not do: for bytes and
# strings it differs from process to process. `hashlib.sha256(…).digest()` does
# not, and takes bytes; `struct.pack(f"<{n}q", *numbers)` makes bytes of
# numbers.

# %% exercise="block_hashes"
from lib.prefix_cache import block_hashes

# %%
check(block_hashes)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The full blocks end at `block_size`, 2 · `block_size`, …, as long as that is
# at most `len(token_ids)`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `previous = hashlib.sha256(previous + as_bytes).digest()`, with the bytes of
# the block's tokens. The first block's predecessor is the argument `previous`.
#
# </details>

# %%
one = prefix_cache.block_hashes(list(b"Call me Ishmael."), 4)
other = prefix_cache.block_hashes(list(b"Call us Ishmael."), 4)
[a == b for a, b in zip(one, other)]

# %% [markdown]
# The last two blocks hold the same letters in both texts, `Ishm` and `ael.`.
# Their names differ all the same, since what stands before them differs.
#
# ### Exercise 6.7 · `find_prefix` ★★ (10 minutes)
#
# Return the blocks of the longest beginning that is there. `block_of_hash` says
# which block has which name. One thing more: the model has to be called with at
# least one token, or nobody knows what comes next. So if all of a prompt is
# there, leave out its last block: blocks are found whole, and nobody writes
# into one that others read.

# %% exercise="find_prefix"
from lib.prefix_cache import find_prefix

# %%
check(find_prefix)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A block behind one that is missing cannot be used: stop at the first that is
# not there.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Of `num_tokens` tokens at most `num_tokens - 1` may be found. How many full
# blocks is that?
#
# </details>

# %% [markdown]
# When the last request that used a block ends, the block is free, and still
# holds its keys. It stays where it is, *idle*, and can be found, until somebody
# needs a block and no empty one is left. Then one of the idle ones has to go.
#
# ### Exercise 6.8 · `evict` ★★ (10 minutes)
#
# Which? The one that has not been used for longest: *least recently used*, as
# in many caches. But the blocks of a request that nobody else uses become idle
# at the same moment. Among these the last one of the text goes first. Why not
# the first?

# %% exercise="evict"
from lib.prefix_cache import evict

# %%
check(evict)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Without its beginning, no block of a text can be found. So if the first block
# went, all others would lie there for nothing.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `min(idle, key=…)` with a pair as the key: first the time, then minus the
# depth.
#
# </details>

# %% [markdown]
# ### What it saves
#
# Twelve people ask about the same passage of fifty words. Each prompt is 256
# tokens (letters) of the book, the same for all, and 24 of its own; they come
# one after the other, and each answer has 16 tokens. We count the tokens that
# go through the model, with a plain pool and with one that remembers.

# %%
document = book_ids[20_000:20_256]
questions = [book_ids[1000 * i : 1000 * i + 24] for i in range(1, 13)]


def ask_all(cache, lm=lm):
    serving = Engine(lm, cache)
    answers, computed = [], 0
    for question in questions:
        prompt = torch.cat([document, question])
        answers.append(serving.add(prompt, 16, temperature=0))
        computed += sum(sum(step.counts.values()) for step in serving.run())
    return [answer.new_ids for answer in answers], computed


settings = {"num_blocks": 32, "block_size": 16, "fused_decode": True}
_, plain = ask_all(PagedKVCache(lm.config, **settings))
_, remembering = ask_all(PrefixKVCache(lm.config, **settings))
print(f"{plain:,} tokens computed, {remembering:,} by the cache that ", end="")
print(f"remembers: {1 - remembering / plain:.0%} saved")

# %% [markdown]
# By hand: each request computes 280 tokens of its prompt and 15 of its answer,
# twelve times 295. The 256 tokens of the passage fill 16 blocks, and eleven
# requests find them: 12 · 295 - 11 · 256 = 724. (The pool has 32 blocks, so
# those of earlier questions are evicted. Those of the passage are used again
# and again, and stay.)
#
# And the answers are the same, in double precision:

# %%
settings["dtype"] = torch.float64
texts, _ = ask_all(PagedKVCache(lm.config, **settings), double_lm)
found, _ = ask_all(PrefixKVCache(lm.config, **settings), double_lm)
texts == found

# %% [markdown]
# A conversation gains most: each turn comes with all turns before it, answers
# included, and finds all of them but the last few tokens.
#
# A hash can collide: two texts may have the same one, even if nobody has ever
# seen that happen with SHA-256. A reader would then get an answer to somebody
# else's document. So `PrefixKVCache` compares the tokens as well, and a test
# gives all blocks the same hash to see that it does. What even a perfect cache
# tells is *time*: a prompt that is answered faster than others probably begins
# like one before it. On a server that strangers share, this is a leak, and such
# caches should be kept apart for each customer.

# %%
check.summary()

# %% [markdown]
# ## What is still wrong
#
# The pool is now well used, and whoever is done makes room at once. What is
# left is the size of a token. In our small model it is 2 KiB:

# %%
cache = PagedKVCache(lm.config, 1, block_size=16)
cache.k_cache.nbytes * 2 // 16

# %% [markdown]
# Every one of these bytes is read again for every token that is written.
# Chapter 7 asks which of them are needed.
#
# ## In five sentences
#
# 1. A static batch lasts as long as its longest text; an engine decides at
#    every step who takes part.
# 2. A schedule is some twenty lines on plain numbers: decodes first, then
#    pieces of running prompts, then whoever waits, in order, as far as tokens
#    and blocks go.
# 3. If the pool runs dry, the request that began last goes back to the head of
#    the queue with all its tokens, and is computed again; a watermark makes
#    that rarer.
# 4. A long prompt in pieces makes the longest wait of those who read shorter,
#    and all else longer.
# 5. A block whose name is a hash of its text so far is found by everybody who
#    begins alike later, until it is given away.
#
# ## Do you recall?
#
# 1. Four answers of 10, 10, 10 and 100 tokens: how many steps does one batch
#    take, and how many of its places are empty?
# 2. Why does a waiting request begin only if blocks for its whole prompt are
#    free, though it computes a piece at a time?
# 3. Why is the request that began *last* sent back, and why to the *head* of
#    the queue?
# 4. Somebody has computed the first 300 tokens of a prompt of 304, in blocks of
#    16. How many tokens of it go through the model?
# 5. Why is a block's hash made of more than its own tokens?
# 6. Somebody turns the token budget down. Who waits longer, and who less?
#
# <details><summary>Answers</summary>
#
# 1. 100 steps; 270 of 400 places are empty.
# 2. It could get stuck halfway, and be sent back by those who decode: its
#    pieces were computed for nothing.
# 3. Nobody who came earlier should wait for it; and everybody in the queue came
#    later.
# 4. Only full blocks are found: 18 of them, 288 tokens. 16 go through the
#    model.
# 5. Keys and values depend on all tokens before; the same tokens behind another
#    beginning are another block.
# 6. Whoever has sent a long prompt waits longer for the first token. Whoever
#    reads has a shorter longest wait, though not a shorter one on average.
#
# </details>
#
# ## Sources
#
# - Yu and others, *Orca: A Distributed Serving System for Transformer-Based
#   Generative Models*, OSDI 2022,
#   [usenix.org](https://www.usenix.org/conference/osdi22/presentation/yu):
#   scheduling at every iteration.
# - Kwon and others, *Efficient Memory Management for Large Language Model
#   Serving with PagedAttention*, 2023,
#   [2309.06180](https://arxiv.org/abs/2309.06180): preemption (section 4.5),
#   normalized latency (section 6.1), the curve (figure 12).
# - Agrawal and others, *SARATHI: Efficient LLM Inference by Piggybacking
#   Decodes with Chunked Prefills*, 2023,
#   [2308.16369](https://arxiv.org/abs/2308.16369); and *Taming
#   Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve*, 2024,
#   [2403.02310](https://arxiv.org/abs/2403.02310): prompts in pieces.
# - Zheng and others, *SGLang: Efficient Execution of Structured Language Model
#   Programs*, 2023, [2312.07104](https://arxiv.org/abs/2312.07104): prefixes
#   found again, in a tree.
# - vLLM, *Automatic prefix caching*,
#   [docs.vllm.ai](https://docs.vllm.ai/en/latest/design/prefix_caching/):
#   blocks by the hash of their text.
