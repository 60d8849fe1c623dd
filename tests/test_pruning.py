"""Pruned caches against plain loops: what is kept, and what attention over it gives. That
nobody is disturbed by others, by errors or by interrupts: see test_caches_by_layer.py."""

import functools
import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_close,
    attentive_model,
    begun,
    contents,
    random_heads,
    random_ids,
    take,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.block_manager import BlockManager
from lib.config import ModelConfig
from lib.generate import forward_cached, generate_cached
from lib.kv_cache import ContiguousKVCache
from lib.model import attend_causal
from lib.paged_kv_cache import PagedKVCache
from lib.pruning import (
    HeavyHitters,
    PrunedKVCache,
    Recent,
    Snap,
    attend_with_weights,
    attention_received,
    attention_spread,
    blocks_freed,
    evict_tokens,
    keep_recent,
    pyramid_budgets,
    snap_scores,
    spread_budgets,
)

V = 32
CONFIG = ModelConfig(
    8, 2, num_heads=4, num_kv_heads=2, d_model=16, d_ff=8, max_seq_len=64
)
LAYERS = range(CONFIG.num_layers)
BUDGETS = 5, 8  # of two layers
POLICIES = {
    "recent": Recent(2),
    "recent without sinks": Recent(0),
    "heavy hitters": HeavyHitters(3),
    "heavy hitters without a window": HeavyHitters(0),
    "snap": Snap(3, 3),
    "snap without neighbours": Snap(4, 1),
}
every_policy = pytest.mark.parametrize("name", POLICIES)
a_few_seeds = pytest.mark.parametrize("seed", range(3))
random_heads = functools.partial(random_heads, CONFIG)
random_ids = functools.partial(random_ids, vocab_size=V - 1)


@functools.cache
def model():
    return attentive_model(V - 1, vocab_size=V, num_heads=4, num_kv_heads=2)


def pruned(name, batch_size=1, budgets=BUDGETS, config=CONFIG):
    settings = {"dtype": torch.float64}
    cache = PrunedKVCache(config, batch_size, budgets, POLICIES[name], **settings)
    return begun(cache, batch_size)


def pruned_for_model(name, batch_size=1, budgets=BUDGETS):
    return pruned(name, batch_size, budgets, model().config)


# The whole model, over what is kept.


def masked(masks):
    """Attention of a whole text, masks bool (G, T, T) for each layer."""

    def attend(layer, q, k, v):
        group_size = q.shape[1] // k.shape[1]
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # (H, T, D), (G, T, D)
        k, v, mask = (x.repeat_interleave(group_size, 0) for x in (k, v, masks[layer]))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)

    return attend


def masks_of(counts, kept_after, num_layers, G):
    """Which tokens each query of one request may see: those that were kept after the step
    before its own, and of its own step those up to itself.

    counts: tokens of each step; kept_after: [step][layer], (G, n).
    """
    T = sum(counts)
    masks = [torch.zeros(G, T, T, dtype=torch.bool) for _ in range(num_layers)]
    for layer, head in itertools.product(range(num_layers), range(G)):
        start = 0
        for step, count in enumerate(counts):
            kept = kept_after[step - 1][layer][head].tolist() if step else []
            for query in range(start, start + count):
                for token in [*kept, *range(start, query + 1)]:
                    masks[layer][head, query, token] = True
            start += count
    return masks


@every_policy
@a_few_seeds
@torch.no_grad()
def test_the_model_computes_what_a_mask_for_each_kv_head_gives(seed, name):
    rng, B = random.Random(seed), 3
    steps = [[rng.randrange(1, 20) for _ in range(B)]]
    steps += [[rng.choice([0, 1, 1, 1, 4, 7]) for _ in range(B)] for _ in range(6)]
    cache = pruned_for_model(name, B)
    texts = [random_ids(rng, sum(step[b] for step in steps)) for b in range(B)]
    logits, kept_after, starts = [[] for _ in texts], [], [0] * B
    for step in steps:
        new_ids = [text[i : i + n] for text, i, n in zip(texts, starts, step)]
        out = forward_cached(model(), cache, torch.cat(new_ids), torch.tensor(step))
        for b, part in enumerate(out.split(step)):
            logits[b].append(part)
            starts[b] += step[b]
        kept_after.append([cache.positions(b) for b in range(B)])
    for b, text in enumerate(texts):
        counts = [step[b] for step in steps]
        masks = masks_of(counts, [kept[b] for kept in kept_after], 2, 2)
        expected = model()(text, torch.arange(len(text)), masked(masks))
        torch.testing.assert_close(torch.cat(logits[b]), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_sinks", [0, 2])
@torch.no_grad()
def test_recent_is_a_sliding_window_beside_the_sinks(num_sinks):
    T, budget = 40, 6
    text = random_ids(random.Random(0), T)
    policy, config = Recent(num_sinks), model().config
    cache = begun(PrunedKVCache(config, 1, budget, policy, dtype=torch.float64), 1)
    one = torch.ones(1, dtype=torch.int64)
    got = torch.cat([forward_cached(model(), cache, i, one) for i in text.split(1)])
    query, key = torch.arange(T).view(T, 1), torch.arange(T)
    # The newest that were kept, and itself.
    is_near = query - key <= budget - num_sinks
    mask = ((key < num_sinks) | is_near) & (key <= query)
    expected = model()(text, torch.arange(T), masked([mask.expand(2, T, T)] * 2))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@every_policy
@pytest.mark.parametrize("budgets", [64, 10**6, [40, 99]])
def test_a_budget_above_the_text_is_a_cache_that_keeps_all(budgets, name):
    rng = random.Random(0)
    prompts = [random_ids(rng, n) for n in (11, 1, 7)]
    whole = begun(ContiguousKVCache(model().config, 3, 64, dtype=torch.float64), 3)
    cache = pruned_for_model(name, 3, budgets)
    texts, expected = (
        generate_cached(model(), prompts, 25, c, temperature=0) for c in (cache, whole)
    )
    assert [text.tolist() for text in texts] == [text.tolist() for text in expected]
    for b, text in enumerate(texts):
        for layer, positions in enumerate(cache.positions(b)):
            assert positions.tolist() == [list(range(len(text) - 1))] * 2
            kept, S = cache._kept[b][layer], len(text) - 1
            assert_close(kept.k, whole.k_cache[layer, b, :S])
            assert_close(kept.v, whole.v_cache[layer, b, :S])


@every_policy
def test_one_step_over_a_whole_prompt_sees_all_of_it(name):
    ids = random_ids(random.Random(1), 30)
    cache = pruned_for_model(name)
    got = forward_cached(model(), cache, ids, torch.tensor([30]))
    expected = model()(ids, torch.arange(30), attend_causal)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert [x.shape for x in cache.positions(0)] == [(2, 5), (2, 8)]


# The choice, in plain loops.


def received(q, keys, head):
    """Attention of T new queries over S tokens, from those query heads that read this KV
    head: [query][token], the mean over these heads."""
    T, S = len(q), len(keys)
    by_query = []
    for t in range(T):
        seen, row = S - T + t + 1, [0.0] * S
        for h in (2 * head, 2 * head + 1):
            products = [
                sum(a * b for a, b in zip(q[t][h], key)) / math.sqrt(len(key))
                for key in keys[:seen]
            ]
            shares = [math.exp(x - max(products)) for x in products]
            for token, share in enumerate(shares):
                row[token] += share / sum(shares) / 2
        by_query.append(row)
    return by_query


def added(policy, by_query):
    """What each token's score grows by in a step."""
    T, S = len(by_query), len(by_query[0])
    if isinstance(policy, HeavyHitters):
        return [sum(row[token] for row in by_query) for token in range(S)]
    if S > T or policy.window >= S:  # what lies side by side need not be neighbours
        last = by_query[-policy.window :]
        return [sum(row[token] for row in last) for token in range(S)]
    num_before, around = S - policy.window, policy.width // 2
    seen = [sum(row[i] for row in by_query[-policy.window :]) for i in range(num_before)]
    smooth = [
        sum(seen[j] for j in range(i - around, i + around + 1) if 0 <= j < num_before)
        for i in range(num_before)
    ]
    return [x / policy.width for x in smooth] + [0.0] * policy.window


def choose(policy, tokens, budget):
    """tokens: (position, score, key) in the order of the text; those that stay."""
    if len(tokens) <= budget:
        return tokens
    if isinstance(policy, Recent):
        return tokens[: policy.num_sinks] + tokens[policy.num_sinks - budget :]
    num_before = len(tokens) - policy.window
    by_score = sorted(tokens[:num_before], key=lambda token: -token[1])
    return sorted(by_score[: budget - policy.window]) + tokens[num_before:]


@every_policy
@a_few_seeds
def test_each_head_keeps_what_plain_loops_choose(seed, name):
    rng, policy = random.Random(seed), POLICIES[name]
    counts = [[3, 2, 14][seed], *(rng.choice([1, 1, 3, 6]) for _ in range(7))]
    cache = pruned(name)
    state = {(layer, head): [] for layer in LAYERS for head in range(2)}
    seq_len, differ = 0, False
    for count in counts:
        heads = random_heads(rng, count)
        take(cache, [count], heads)
        for (layer, head), tokens in state.items():
            q, k, _ = (x.tolist() for x in heads[layer])
            tokens = tokens + [(seq_len + i, 0.0, k[i][head]) for i in range(count)]
            if not isinstance(policy, Recent):
                more = added(policy, received(q, [token[2] for token in tokens], head))
                tokens = [(p, s + m, key) for (p, s, key), m in zip(tokens, more)]
            state[layer, head] = choose(policy, tokens, BUDGETS[layer])
            expected = state[layer, head]
            kept = cache._kept[0][layer]
            positions = cache.positions(0)[layer][head].tolist()
            assert positions == [token[0] for token in expected]
            assert kept.k[:, head].tolist() == [token[2] for token in expected]
            if not isinstance(policy, Recent):
                scores = kept.scores[head].tolist()
                assert scores == pytest.approx([token[1] for token in expected])
        seq_len += count
        places = [cache.positions(0)[layer].tolist() for layer in LAYERS]
        differ = differ or any(first != second for first, second in places)
    assert differ != isinstance(policy, Recent), "expected that heads keep other tokens"


def test_of_equal_scores_the_earlier_token_stays():
    k = torch.arange(8.0).view(8, 1, 1).expand(8, 2, 3)
    scores = torch.tensor([[1.0, 1, 1, 1, 1, 1, 9, 9], [0.0, 1, 0, 1, 0, 1, 0, 0]])
    k_kept, v_kept, kept = evict_tokens(k, -k, scores, budget=4, window=2)
    assert kept.tolist() == [[0, 1, 6, 7], [1, 3, 6, 7]]
    assert kept.dtype == torch.int64
    for head in range(2):
        assert k_kept[:, head, 0].tolist() == kept[head].tolist()
    assert torch.equal(v_kept, -k_kept)
    long = torch.zeros(1, 1000)  # a sort that is not stable shows on long texts
    k = torch.arange(1000.0).view(1000, 1, 1)
    assert evict_tokens(k, k, long, 300, 0)[2].tolist() == [list(range(300))]


@pytest.mark.parametrize("budget, window", [(3, 5), (3, 3), (9, 2), (9, 99), (1, 0)])
def test_the_window_goes_before_scores_and_the_budget_before_the_window(budget, window):
    k, scores = torch.randn(6, 2, 3), torch.rand(2, 6)
    k_kept, v_kept, kept = evict_tokens(k, 2 * k, scores, budget, window)
    n = min(budget, 6)
    assert k_kept.shape == v_kept.shape == (n, 2, 3) and kept.shape == (2, n)
    newest = list(range(6))[6 - min(window, n) :]
    for head in range(2):
        assert kept[head].tolist()[n - len(newest) :] == newest
        assert torch.equal(k_kept[:, head], k[kept[head], head])
    assert torch.equal(v_kept, 2 * k_kept)
    if budget == 1:
        assert kept.flatten().tolist() == scores.argmax(dim=-1).tolist()


@pytest.mark.parametrize("seq_len", [0, 1, 4, 5, 6, 30])
@pytest.mark.parametrize("num_sinks", [0, 1, 4])
def test_recent_places_are_the_first_and_the_last(num_sinks, seq_len):
    kept = keep_recent(seq_len, 5, num_sinks)
    places = [
        i for i in range(seq_len) if i < num_sinks or i >= seq_len - (5 - num_sinks)
    ]
    assert kept.tolist() == places and kept.dtype == torch.int64


def test_attention_received_is_a_sum_over_queries_and_a_mean_over_heads():
    weights = torch.rand(6, 5, 7, dtype=torch.float64)
    got = attention_received(weights, 2)
    for g, s in itertools.product(range(2), range(7)):
        heads = range(3 * g, 3 * g + 3)
        expected = sum(weights[h, t, s].item() for h in heads for t in range(5)) / 3
        assert got[g, s].item() == pytest.approx(expected)
    assert got.shape == (2, 7)


@pytest.mark.parametrize("window, width", [(1, 1), (3, 5), (6, 3), (7, 3), (9, 5)])
def test_snap_scores_smooth_over_what_comes_before_the_window(window, width):
    weights = torch.rand(4, 7, 7, dtype=torch.float64)
    got = snap_scores(weights, 2, window, width)
    num_before = max(7 - window, 0)
    assert got.shape == (2, num_before)
    seen = attention_received(weights[:, max(7 - window, 0) :], 2)
    for g, i in itertools.product(range(2), range(num_before)):
        near = range(max(i - width // 2, 0), min(i + width // 2 + 1, num_before))
        expected = sum(seen[g, j].item() for j in near) / width
        assert got[g, i].item() == pytest.approx(expected)


@pytest.mark.parametrize("window", [1, 4, 5, 7, 8])
def test_of_fewer_queries_than_the_window_snap_scores_sum_all(window):
    weights = torch.rand(4, 5, 9, dtype=torch.float64)  # 5 queries over 9 tokens
    expected = torch.zeros(2, 9 - window, dtype=torch.float64)
    for head, query in itertools.product(range(4), range(max(5 - window, 0), 5)):
        expected[head // 2] += weights[head, query, : 9 - window] / 2
    assert_close(snap_scores(weights, 2, window, width=1), expected)


@pytest.mark.parametrize("T, S", [(1, 1), (1, 9), (5, 5), (4, 9)])
def test_attention_and_its_weights_are_those_of_causal_attention(T, S):
    q, k, v = (torch.randn(S, n, 4, dtype=torch.float64) for n in (6, 2, 2))
    out, weights = attend_with_weights(q[S - T :], k, v)
    assert_close(out, attend_causal(0, q, k, v)[S - T :])
    assert weights.shape == (6, T, S)
    assert_close(weights.sum(-1), torch.ones(6, T, dtype=torch.float64))
    assert not weights.triu(S - T + 1).any(), "expected no weight on the future"
    by_head = torch.einsum("hts,shd->thd", weights, v.repeat_interleave(3, dim=1))
    assert_close(out, by_head)


def test_attention_spread_counts_the_largest_weights():
    weights = torch.randn(3, 5, 8, dtype=torch.float64).mul(3).softmax(-1)
    counts = []
    for row in weights.flatten(0, 1).tolist():
        row, n = sorted(row, reverse=True), 0
        while sum(row[:n]) < 0.7:
            n += 1
        counts.append(n)
    expected = sum(counts) / len(counts)
    assert attention_spread(weights, 0.7) == pytest.approx(expected)
    exact = torch.tensor([0.25, 0.5, 0.25])  # two hold 3/4, and it takes no third
    assert attention_spread(exact, 0.75) == 2.0, "expected 2 tokens for exactly the share"
    for share in (0, 1, -0.1, math.nan):
        with pytest.raises(ValueError, match="share: expected between 0 and 1"):
            attention_spread(weights, share)


# Invariants, under whatever comes.


def check_invariants(cache, before, policy):
    """before: request -> its tokens and [layer], (G, n), before the last call."""
    num_bytes = 0
    for request_id, seq_len in zip(cache.request_ids, cache.seq_lens.tolist()):
        row = cache.request_ids.index(request_id)
        if request_id is None:
            continue
        num_before, kept_before = before.get(request_id, (0, [[[], []]] * 2))
        for layer, kept in enumerate(cache._kept[row]):
            n = min(BUDGETS[layer], seq_len)
            num_bytes += n * (2 * 2 * 4 * 8 + 2 * (8 + 8))
            assert kept.k.shape == kept.v.shape == (n, 2, 4)
            assert kept.scores.shape == (2, n) and kept.scores.isfinite().all()
            for head, positions in enumerate(cache.positions(request_id)[layer].tolist()):
                assert len(positions) == n, f"expected {n}, got {positions}"
                assert positions == sorted(set(positions)), f"not ascending: {positions}"
                newest = policy.window
                if isinstance(policy, Recent):
                    newest = BUDGETS[layer] - policy.num_sinks
                stays = {*range(max(seq_len - newest, 0), seq_len)}
                assert stays <= set(positions), f"expected {stays} among {positions}"
                new = range(num_before, seq_len)
                known = {*kept_before[layer][head], *new}
                assert set(positions) <= known, f"{positions}: some came back"
    assert cache.used_bytes == cache.reserved_bytes == num_bytes


@every_policy
@pytest.mark.parametrize("seed", range(4))
def test_random_operations_keep_the_invariants(seed, name):
    rng, policy, number = random.Random(seed), POLICIES[name], 0
    cache = PrunedKVCache(CONFIG, 3, BUDGETS, policy, dtype=torch.float64)
    for _ in range(50):
        live = [r for r in cache.request_ids if r is not None]
        before = {
            r: (n, [x.tolist() for x in cache.positions(r)])
            for r, n in zip(cache.request_ids, cache.seq_lens.tolist())
            if r is not None
        }
        kind = rng.choice(["begin", "free", "step", "step", "step"])
        if kind == "begin" and len(live) < 3:
            number += 1
            cache.begin(number)
        elif kind == "free" and live:
            cache.free(rng.choice(live))
        elif kind == "step":
            counts = [
                0 if r is None or n > 55 else rng.choice([0, 1, 1, 3, 9])
                for r, n in zip(cache.request_ids, cache.seq_lens.tolist())
            ]
            take(cache, counts, random_heads(rng, sum(counts)))
        check_invariants(cache, before, policy)


def mid_text(name="snap"):
    """Requests of 7 and 1 tokens, in a cache of three rows."""
    rng = random.Random(5)
    cache = PrunedKVCache(CONFIG, 3, BUDGETS, POLICIES[name], dtype=torch.float64)
    begun(cache, 2)
    take(cache, [7, 1, 0], random_heads(rng, 8))
    return cache


def test_positions_are_copies_and_those_of_a_live_request():
    cache = mid_text()
    before = contents(cache)
    for positions in cache.positions(0):
        positions.fill_(-1)
    assert contents(cache) == before
    cache.free(0)
    with pytest.raises(ValueError, match="request 0: expected one of"):
        cache.positions(0)
    cache.begin("new")
    assert [x.shape for x in cache.positions("new")] == [(2, 0), (2, 0)]


# Whoever uses caches.


def test_policies_and_budgets_write_other_texts():
    prompt, texts = [random_ids(random.Random(6), 20)], []
    for name, budgets in [*((name, 5) for name in POLICIES), ("snap", 64)]:
        cache = pruned_for_model(name, 1, budgets)
        texts += generate_cached(model(), prompt, 30, cache, temperature=0)
    texts = {tuple(text.tolist()) for text in texts}
    assert len(texts) >= 5, f"expected other texts, got {texts}"


@pytest.mark.parametrize("name", ["heavy hitters", "snap"])
def test_scores_go_on_growing_in_a_cache_of_16_bits(name):
    """In bfloat16 64 + 1/8 is 64: sums must have more bits than keys."""
    cache = PrunedKVCache(CONFIG, 1, 8, POLICIES[name], dtype=torch.bfloat16)
    begun(cache, 1)
    same = [torch.zeros(1, n, 4, dtype=torch.bfloat16) for n in (4, 2, 2)]
    for _ in range(60):
        take(cache, [1], [same] * 2)
    before = cache._kept[0][0].scores + 1000  # as after a long text
    kept = [layer._replace(scores=before) for layer in cache._kept[0]]
    cache._kept[0] = tuple(kept)
    for _ in range(3):
        take(cache, [1], [same] * 2)
    grown = cache._kept[0][0].scores[:, 0] - before[:, 0]
    for got in grown.tolist():  # each step gives 1 / 9 to each of nine tokens
        assert got == pytest.approx(3 / 9, rel=0.02), f"expected {3 / 9}, got {got}"


@pytest.mark.parametrize("give", [lambda s: s[:, 1:], lambda s: s[0], lambda s: s.T])
def test_scores_of_another_shape_are_refused_and_nothing_is_lost(give):
    class Odd(Recent):
        def __call__(self, weights, scores, budget):
            scores = super().__call__(weights, scores, budget)
            return scores if weights.shape[1] > 1 else give(scores)

    cache = PrunedKVCache(CONFIG, 1, 5, Odd(2), dtype=torch.float64)
    begun(cache, 1)
    take(cache, [9], random_heads(random.Random(0), 9))
    before = contents(cache)
    with pytest.raises(ValueError, match=r"policy: expected scores of shape \(2, 6\)"):
        take(cache, [1], random_heads(random.Random(1), 1))
    assert contents(cache) == before
    take(cache, [2], random_heads(random.Random(2), 2))


# What cannot be.


@pytest.mark.parametrize(
    "budgets, policy, words",
    [
        (0, HeavyHitters(0), "budget of layer 0: expected an integer of at least 1"),
        (0, Recent(0), "budget of layer 0: expected an integer of at least 1, got 0"),
        (-1, Snap(), "budget of layer 0: expected an integer of at least 8, got -1"),
        (7, Snap(), "budget of layer 0: expected an integer of at least 8, got 7"),
        ([8, 7], HeavyHitters(), "budget of layer 1: expected an integer of at least 8"),
        (4, Recent(4), "budget of layer 0: expected an integer of at least 5, got 4"),
        (3, Recent(4), "budget of layer 0: expected an integer of at least 5, got 3"),
        ([9], Snap(), r"budgets: expected 2, one for each layer, got 1: \[9\]"),
        ((9, 9, 9), Snap(), r"budgets: expected 2, one for each layer, got 3"),
        ([], Snap(), r"budgets: expected 2, one for each layer, got 0: \[\]"),
        ([9, None], Snap(), "budget of layer 1: expected an integer of .*, got None"),
        (True, HeavyHitters(1), "budget of layer 0: expected an integer .*, got True"),
        (9.0, Snap(), r"budget of layer 0: expected an integer of at least 8, got 9.0"),
        (None, Snap(), "budget of layer 0: expected an integer of at least 8, got None"),
        ("12", Snap(), "budget of layer 0: expected an integer of at least 8, got '1'"),
        (9, Snap, "policy: expected one, as Recent.., got <class 'lib.pruning.Snap'>"),
        (9, None, "policy: expected one, as Recent.., got None"),
    ],
)
def test_budgets_and_policies_that_cannot_be_are_refused(budgets, policy, words):
    with pytest.raises(ValueError, match=words):
        PrunedKVCache(CONFIG, 1, budgets, policy)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Recent(-1), "num_sinks: expected an integer of at least 0, got -1"),
        (lambda: Recent(1.5), "num_sinks: expected an integer of at least 0, got 1.5"),
        (lambda: Recent(True), "num_sinks: expected an integer of at least 0, got True"),
        (lambda: HeavyHitters(-1), "window: expected an integer of at least 0, got -1"),
        (lambda: HeavyHitters(2.0), "window: expected an integer of at least 0, got 2.0"),
        (lambda: Snap(0), "window: expected an integer of at least 1, got 0"),
        (lambda: Snap(window="8"), "window: expected an integer of at least 1, got '8'"),
        (lambda: Snap(width=4), "width: expected an odd number, got 4"),
        (lambda: Snap(width=0), "width: expected an integer of at least 1, got 0"),
        (lambda: Snap(width=-1), "width: expected an integer of at least 1, got -1"),
        (lambda: Snap(width=3.0), "width: expected an integer of at least 1, got 3.0"),
        (
            lambda: PrunedKVCache(CONFIG, 0, 9, Snap()),
            "batch_size: expected an integer of at least 1, got 0",
        ),
        (
            lambda: keep_recent(9, 4, 4),
            "budget: expected an integer of at least 5, got 4",
        ),
        (
            lambda: snap_scores(torch.ones(2, 3, 3), 1, 1, 2),
            "width: expected an odd number, got 2",
        ),
        (
            lambda: snap_scores(torch.ones(2, 3, 3), 1, 0, 3),
            "window: expected an integer of at least 1, got 0",
        ),
        (
            lambda: pyramid_budgets(7, 4, window=8),
            "mean_budget: expected an integer of at least 8, got 7",
        ),
        (
            lambda: pyramid_budgets(9, 0),
            "num_layers: expected an integer of at least 1, got 0",
        ),
        (
            lambda: pyramid_budgets(9, 4, beta=0),
            "beta: expected an integer of at least 1, got 0",
        ),
        (
            lambda: spread_budgets([1.0], 7),
            "mean_budget: expected an integer of at least 8, got 7",
        ),
        *(
            (lambda needs=needs: spread_budgets(needs, 9), "needs: expected numbers that")
            for needs in (
                [],
                [0, 0],
                [2, -1],
                [1, math.nan],
                [math.nan, 1],
                [1, math.inf],
            )
        ),
        (
            lambda: blocks_freed(torch.ones(1, 1, 3, dtype=torch.bool), 0),
            "block_size: expected an integer of at least 1, got 0",
        ),
    ],
)
def test_other_numbers_that_cannot_be_are_refused_at_once(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@every_policy
@pytest.mark.parametrize("lens", [[1, 1], [2, 1], [1, 4]])
def test_prompts_shorter_than_the_window_are_kept_whole(lens, name):
    cache, rng = pruned(name, 2), random.Random(0)
    take(cache, lens, random_heads(rng, sum(lens)))
    for b, n in enumerate(lens):
        assert [x.tolist() for x in cache.positions(b)] == [[list(range(n))] * 2] * 2
    for _ in range(9):
        take(cache, [1, 1], random_heads(rng, 2))
    for b, n in enumerate(lens):
        assert [x.shape for x in cache.positions(b)] == [(2, 5), (2, 8)]
        last = [x[:, -1].tolist() for x in cache.positions(b)]
        if POLICIES[name].window or isinstance(POLICIES[name], Recent):
            assert last == [[n + 8] * 2] * 2


# Budgets, and blocks.


@given(
    rest=st.integers(0, 5000),
    num_layers=st.integers(1, 90),
    window=st.integers(1, 64),
    beta=st.integers(1, 50),
)
@settings(deadline=None, derandomize=True, max_examples=300)
def test_pyramids_are_the_papers_up_to_rounding(rest, num_layers, window, beta):
    mean = window + rest
    budgets = pyramid_budgets(mean, num_layers, window, beta)
    assert sum(budgets) == mean * num_layers and min(budgets) >= window
    assert all(type(budget) is int for budget in budgets)
    assert budgets == sorted(budgets, reverse=True)
    last = Fraction(rest, beta)  # equations of section 4
    first = 2 * rest - last
    for layer, budget in enumerate(budgets):
        share = Fraction(layer, num_layers - 1) if num_layers > 1 else Fraction(1, 2)
        exact = window + first + (last - first) * share
        assert abs(budget - exact) <= Fraction(1, 2) + Fraction(1, 10**6), (
            f"layer {layer}: expected {float(exact)}, got {budget}"
        )


def test_a_pyramid_of_32_layers_has_the_numbers_of_the_formula():
    budgets = pyramid_budgets(128, 32, window=8, beta=20)
    # Without the window 120: in the last layer 6, in the first 234, 228 / 31 less each.
    assert budgets[0] == 242 and budgets[-1] == 14
    assert budgets[1] == 8 + round(234 - 228 / 31) and budgets[30] == 8 + round(
        6 + 228 / 31
    )
    assert pyramid_budgets(128, 3, window=8, beta=1) == [128, 128, 128]
    assert pyramid_budgets(8, 3, window=8) == [8, 8, 8]


def splits(total, num_parts):
    if num_parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for others in splits(total - first, num_parts - 1):
            yield (first, *others)


@given(
    needs=st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any),
    more=st.integers(0, 3),
    window=st.integers(1, 9),
)
@settings(deadline=None, derandomize=True, max_examples=300)
def test_no_other_split_has_a_smaller_largest_deviation(needs, more, window):
    budgets = spread_budgets(needs, window + more, window)
    rest = more * len(needs)
    assert sum(budgets) == (window + more) * len(needs) and min(budgets) >= window
    exact = [Fraction(rest * need, sum(needs)) for need in needs]

    def deviation(parts):
        return max(abs(part - e) for part, e in zip(parts, exact))

    got = deviation([budget - window for budget in budgets])
    best = min(deviation(parts) for parts in splits(rest, len(needs)))
    assert got <= best + Fraction(1, 10**9), f"expected {float(best)}, got {float(got)}"


@given(
    needs=st.lists(st.floats(0, 1e300), min_size=1, max_size=40).filter(any),
    more=st.integers(0, 4000),
    window=st.integers(1, 64),
)
@settings(deadline=None, derandomize=True, max_examples=300)
def test_spread_budgets_keep_the_sum_and_the_window(needs, more, window):
    budgets = spread_budgets(needs, window + more, window)
    assert sum(budgets) == (window + more) * len(needs) and min(budgets) >= window
    total = sum(map(Fraction, needs))
    for need, budget in zip(needs, budgets):
        exact = window + more * len(needs) * Fraction(need) / total
        assert abs(budget - exact) < 1 + 1e-6, f"expected {float(exact)}, got {budget}"


def test_of_equal_layers_the_earlier_get_what_is_left():
    assert spread_budgets([1, 1, 0], 3, window=2) == [4, 3, 2]
    assert spread_budgets([2.5] * 4, 9, window=8) == [9] * 4
    assert spread_budgets([0.0, 5.0], 8, window=8) == [8, 8]


@a_few_seeds
def test_blocks_freed_are_those_that_a_count_over_real_tables_finds(seed):
    rng = random.Random(seed)
    config = ModelConfig(8, 3, 4, 2, d_model=16, d_ff=8, max_seq_len=64)
    for _ in range(20):
        S, block_size = rng.randrange(1, 30), rng.randrange(1, 6)
        share = rng.choice([0.02, 0.1, 0.3, 1.0])
        is_kept = torch.rand(3, 2, S) < share
        cache = begun(PagedKVCache(config, 40, block_size), 1)
        heads = [torch.zeros(S, n, 4) for n in (4, 2, 2)]
        with cache.extend(torch.tensor([S])) as attend:
            for layer in range(3):
                attend(layer, *heads)
        table = cache.manager.block_tables[0]
        used, counts = set(), []
        for layer, head in itertools.product(range(3), range(2)):
            places = [p for p in range(S) if is_kept[layer, head, p]]
            used |= {table[p // block_size] for p in places}
            counts.append(len(places))
        moved = BlockManager(40, block_size)
        moved.allocate("moved", max(counts))
        expected = len(table) - len(used), len(table) - len(moved.block_tables["moved"])
        assert blocks_freed(is_kept, block_size) == expected


def test_blocks_freed_of_what_a_pruned_cache_keeps():
    cache = pruned("recent", 1, 8)
    take(cache, [30], random_heads(random.Random(0), 30))
    is_kept = torch.zeros(2, 2, 30, dtype=torch.bool)
    for layer, positions in enumerate(cache.positions(0)):
        is_kept[layer].scatter_(1, positions, True)
    # Of eight blocks the first, with tokens 0 and 1, and the last two: 24 to 29.
    assert blocks_freed(is_kept, 4) == (5, 6)
    assert blocks_freed(is_kept[..., :0], 4) == (0, 0)
