"""Chapter 8: keep the keys and values of some tokens, and throw out the others.

A policy gives each token of a layer a score, per KV head, from the attention that it has
received so far. After each step a layer keeps its `budget` of tokens with the highest
scores: what comes with a prompt is cut once, and then one token comes in and one goes
out. So the cache stops growing, whatever the length of the text.

    Recent         the first few and the last      https://arxiv.org/abs/2309.17453
    HeavyHitters   what all queries looked at      https://arxiv.org/abs/2306.14048
    Snap           what the last queries look at   https://arxiv.org/abs/2404.14469

How many tokens each layer may keep is another question: `pyramid_budgets` is one answer
from a paper (https://arxiv.org/abs/2406.02069), `spread_budgets` one from measurement.

Keys stay as they were rotated, and positions go on counting the whole text: a distance is
what it always was, though what lay between may be gone. Query heads that read one KV head
keep the same tokens: keys that are repeated before they are pruned save nothing.

Invariant: a layer keeps its tokens in the order of the text, the newest `window` of them
always, and from `budget` tokens on exactly `budget` per KV head.

Read lib/kv_cache.py before.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from lib.config import ModelConfig, check_count
from lib.kv_cache import KVCacheByLayer


def keep_recent(seq_len: int, budget: int, num_sinks: int = 4) -> torch.Tensor:
    """Which tokens to keep: the first `num_sinks`, and the last ones.

    A query that looks for nothing has weights that sum to 1 all the same. Large models
    put them on a text's first tokens, which are called sinks: without these the model
    breaks down. From StreamingLLM, https://arxiv.org/abs/2309.17453. Returns int64 (n,),
    places in the order of the text: all, if there are no more than `budget`. Raises
    ValueError unless the budget is larger than num_sinks.

    >>> keep_recent(seq_len=9, budget=5, num_sinks=2)
    tensor([0, 1, 6, 7, 8])
    """
    check_count("num_sinks", num_sinks, at_least=0)
    check_count("budget", budget, at_least=num_sinks + 1)

    if seq_len <= budget:
        return torch.arange(seq_len)
    first_recent = seq_len - (budget - num_sinks)
    return torch.cat([torch.arange(num_sinks), torch.arange(first_recent, seq_len)])


def attention_received(weights: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """How much attention each token has received: summed over the queries, and averaged
    over the query heads that read one KV head.

    weights (H, T, S): of T queries over S tokens. Returns (G, S), G = num_kv_heads. With
    every query of the text it is the score of H2O, https://arxiv.org/abs/2306.14048.

    >>> weights = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0]]])
    >>> attention_received(weights, num_kv_heads=1)
    tensor([[1.2500, 0.7500]])
    """
    by_group = weights.unflatten(0, (num_kv_heads, -1))  # (G, H / G, T, S)
    return by_group.sum(dim=2).mean(dim=1)  # (G, S)


def snap_scores(
    weights: torch.Tensor, num_kv_heads: int, window: int = 8, width: int = 5
) -> torch.Tensor:
    """What the last `window` queries of a text look at, before these.

    weights (H, T, S): of the newest T of S tokens. The attention that each of the first
    S - window tokens receives from the last `window` queries; then each score is replaced
    by the mean over `width` neighbours, itself in the middle (zeros where there are
    none): what is needed seldom stands alone. From SnapKV,
    https://arxiv.org/abs/2404.14469. Returns (G, S - window), or (G, 0) for a text no
    longer than the window. Raises ValueError for an even width, and a window below 1.

    >>> weights = torch.tensor([[[0.0, 0.6, 0.0, 0.0, 0.4]]])  # the last query of five
    >>> snap_scores(weights, num_kv_heads=1, window=1, width=3)
    tensor([[0.2000, 0.2000, 0.2000, 0.0000]])
    """
    check_count("window", window)
    if check_count("width", width) % 2 == 0:
        raise ValueError(f"width: expected an odd number, got {width}")

    num_before = max(weights.shape[-1] - window, 0)
    seen = attention_received(weights[:, -window:], num_kv_heads)[:, :num_before]
    if num_before == 0:
        return seen
    return F.avg_pool1d(seen, width, stride=1, padding=width // 2)  # (G, S - window)


def evict_tokens(
    k: torch.Tensor, v: torch.Tensor, scores: torch.Tensor, budget: int, window: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of one layer's keys and values, those of the `budget` tokens worth keeping.

    k, v (S, G, D), in the order of the text; scores (G, S). The newest `window` tokens
    stay, and of those before them the ones with the highest scores, for each KV head its
    own; of equal ones the earlier. A budget below the window keeps the newest `budget`.
    Returns k, v (n, G, D), n = min(budget, S), as they
    were, in the order of the text and in memory of their own, and the places where they
    were, int64 (G, n).

    >>> k = torch.arange(5.0).view(5, 1, 1)
    >>> scores = torch.tensor([[0.1, 0.9, 0.3, 0.0, 0.0]])
    >>> k_kept, v_kept, kept = evict_tokens(k, -k, scores, budget=3, window=1)
    >>> k_kept.flatten(), kept
    (tensor([1., 2., 4.]), tensor([[1, 2, 4]]))
    """
    S, G, D = k.shape
    budget = min(budget, S)
    num_before = S - min(window, budget)
    best = scores[:, :num_before].argsort(dim=-1, descending=True, stable=True)
    best = best[:, : budget - (S - num_before)].sort(dim=-1).values
    newest = torch.arange(num_before, S, device=k.device).expand(G, -1)
    kept = torch.cat([best, newest], dim=-1)  # (G, n)
    index = kept.T.unsqueeze(-1).expand(-1, -1, D)  # (n, G, D)
    return k.gather(0, index), v.gather(0, index), kept


def pyramid_budgets(
    mean_budget: int, num_layers: int, window: int = 8, beta: int = 20
) -> list[int]:
    """A budget for each layer: many tokens in the first, few in the last.

    Beside the window, which each layer has, the last layer gets 1 / beta of the mean, and
    the first as much more than the mean as the last gets less; between them it falls in
    equal steps. From PyramidKV, https://arxiv.org/abs/2406.02069, section 4: k_last = m /
    beta, k_first = 2 m - k_last, where m is the mean without the window. The sum is
    mean_budget * num_layers: the first half of the layers is rounded, and each layer of
    the second half gets as much less than the mean as its mirror image gets more.
    Raises ValueError for a mean below the window.

    >>> pyramid_budgets(mean_budget=48, num_layers=4, window=8, beta=4)
    [78, 58, 38, 18]
    """
    check_count("num_layers", num_layers)
    check_count("beta", beta)
    check_count("mean_budget", mean_budget, at_least=check_count("window", window))

    rest = mean_budget - window
    most = rest - rest / beta  # above the mean, in the first layer
    budgets = [mean_budget] * num_layers
    for layer in range(num_layers // 2):
        more = round(most * (1 - 2 * layer / (num_layers - 1)))
        budgets[layer] += more
        budgets[num_layers - 1 - layer] -= more
    return budgets


def spread_budgets(needs: list[float], mean_budget: int, window: int = 8) -> list[int]:
    """A budget for each layer: the window, and of the rest a part as large as its need.

    needs: of each layer one number, not negative, as it was measured: over how many
    tokens its attention is spread (ZigZagKV, https://arxiv.org/abs/2412.09036), or how
    much is lost where this layer alone is cut. The sum is mean_budget * len(needs):
    parts are rounded down, and what is left goes, one by one, to the layers that lost
    most by it, of equal ones the earlier. Raises ValueError where no layer needs any, and
    for a mean below the window.

    >>> spread_budgets([1.0, 0.0, 3.0], mean_budget=10, window=8)  # 6 beside the windows
    [10, 8, 12]
    """
    check_count("mean_budget", mean_budget, at_least=check_count("window", window))
    if min(needs, default=0) < 0 or not 0 < sum(needs) < float("inf"):
        raise ValueError(
            f"needs: expected numbers that are not negative, and one above 0, got {needs}"
        )

    rest = (mean_budget - window) * len(needs)
    parts = [rest * (need / sum(needs)) for need in needs]
    budgets = [window + int(part) for part in parts]
    lost = [part - int(part) for part in parts]
    by_loss = sorted(range(len(needs)), key=lambda layer: -lost[layer])
    for layer in by_loss[: mean_budget * len(needs) - sum(budgets)]:
        budgets[layer] += 1
    return budgets


def blocks_freed(is_kept: torch.Tensor, block_size: int) -> tuple[int, int]:
    """What a cache in blocks gets back of a text that was pruned: blocks freed where the
    tokens lie, and with the kept ones moved together.

    is_kept: bool (L, G, S), which of S tokens each KV head of each layer keeps. A block
    has the keys and values of its tokens for all layers and heads, as in
    lib/paged_kv_cache.py: it is free when none of them keeps a token there. Moved
    together, the tokens of each head lie behind one another, from the first block on; the
    head that keeps most says how many blocks it takes.

    >>> is_kept = torch.tensor([[[1, 0, 0, 0, 0, 0, 1]], [[0, 0, 0, 0, 1, 0, 1]]]) > 0
    >>> blocks_freed(is_kept, block_size=2)  # of 4: tokens 2 and 3; or all but the first
    (1, 3)
    """
    check_count("block_size", block_size)

    S = is_kept.shape[-1]
    num_blocks = -(-S // block_size)
    is_used = F.pad(is_kept.any(dim=0).any(dim=0), (0, num_blocks * block_size - S))
    in_place = num_blocks - int(is_used.view(num_blocks, block_size).any(dim=1).sum())
    most = int(is_kept.sum(dim=-1).max())
    return in_place, num_blocks - -(-most // block_size)


def attend_with_weights(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of the newest T of S tokens, and its weights, which a policy wants
    to see: out (T, H, D) and weights (H, T, S). q (T, H, D); k, v (S, G, D)."""
    (T, H, D), (S, G, _) = q.shape, k.shape
    grouped = (q / D**0.5).view(T, G, H // G, D)
    scores = torch.einsum("tgjd,sgd->gjts", grouped, k)  # (G, H / G, T, S)
    if T > 1:  # the newest token sees them all
        is_future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
        scores.masked_fill_(is_future, float("-inf"))
    weights = scores.softmax(dim=-1)
    out = torch.einsum("gjts,sgd->tgjd", weights, v)
    return out.reshape(T, H, D), weights.flatten(0, 1)


def attention_spread(weights: torch.Tensor, share: float = 0.9) -> float:
    """How many tokens it takes to hold `share` of the attention of a query: the mean over
    all queries and heads of weights (..., S).

    >>> attention_spread(torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]))
    1.5
    """
    if not 0 < share < 1:
        raise ValueError(f"share: expected between 0 and 1, got {share}")
    held = weights.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    return ((held < share).sum(dim=-1) + 1).float().mean().item()


class Policy(Protocol):
    """Says what each token is worth; the cache keeps those that are worth most."""

    window: int  # the newest tokens, which stay whatever they are worth
    least_budget: int  # it cannot choose fewer

    def __call__(
        self, weights: torch.Tensor, scores: torch.Tensor, budget: int
    ) -> torch.Tensor:
        """Scores (G, S) after a step. weights (H, T, S): attention in it of T new queries
        over S tokens; scores (G, S): those from before, 0 for the T that are new."""


@dataclass(frozen=True)
class Recent:
    """The first `num_sinks` tokens and the newest ones."""

    num_sinks: int = 4
    window = 0

    def __post_init__(self):
        check_count("num_sinks", self.num_sinks, at_least=0)

    @property
    def least_budget(self) -> int:
        return self.num_sinks + 1

    def __call__(
        self, weights: torch.Tensor, scores: torch.Tensor, budget: int
    ) -> torch.Tensor:
        kept = keep_recent(scores.shape[-1], budget, self.num_sinks)
        return torch.zeros_like(scores).index_fill(-1, kept.to(scores.device), 1)


@dataclass(frozen=True)
class HeavyHitters:
    """What has received most attention of all queries so far. (The paper keeps as many of
    the newest as heavy hitters; here their number is fixed.)"""

    window: int = 8

    def __post_init__(self):
        check_count("window", self.window, at_least=0)

    @property
    def least_budget(self) -> int:
        return self.window

    def __call__(
        self, weights: torch.Tensor, scores: torch.Tensor, budget: int
    ) -> torch.Tensor:
        return scores + attention_received(weights, len(scores))


@dataclass(frozen=True)
class Snap:
    """What the last `window` queries of a prompt look at, with its neighbours. In later
    steps, when what was kept side by side need not be neighbours, each token by itself.
    """

    window: int = 8
    width: int = 5

    def __post_init__(self):
        check_count("window", self.window)
        if check_count("width", self.width) % 2 == 0:
            raise ValueError(f"width: expected an odd number, got {self.width}")

    @property
    def least_budget(self) -> int:
        return self.window

    def __call__(
        self, weights: torch.Tensor, scores: torch.Tensor, budget: int
    ) -> torch.Tensor:
        T, (G, S) = weights.shape[1], scores.shape
        if S > T or self.window >= S:
            return scores + attention_received(weights[:, -self.window :], G)
        seen = snap_scores(weights, G, self.window, self.width)
        return scores + F.pad(seen, (0, self.window))


class Kept(NamedTuple):
    """The tokens of one request that one layer has, n for each KV head, in the order of
    the text."""

    k: torch.Tensor  # (n, G, D)
    v: torch.Tensor  # (n, G, D)
    scores: torch.Tensor  # (G, n)
    positions: torch.Tensor  # int64 (G, n): where they stood in the text


class PrunedKVCache(KVCacheByLayer):
    """Of each of B requests at most `budgets[layer]` tokens in a layer, whatever comes.

    A step attends to what was kept and to all of its own tokens, and is cut only then:
    one step over a whole prompt gives the same as without pruning, and what it is cut to
    shows from the next step on. `seq_lens` and positions count all tokens, kept or not.

    budgets: of each layer, or one for all. A budget above the text keeps all of it. A
    step writes what it keeps beside what was there (so it can be taken back): while it
    runs there are two of each. Bytes are those of keys, values, scores and positions.
    Raises ValueError unless there is a budget for each layer, at least 1 and the policy's
    `least_budget`.
    """

    limit = "the model's max_seq_len"

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        budgets: Sequence[int] | int,
        policy: Policy,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        batch_size = check_count("batch_size", batch_size)
        if isinstance(policy, type) or not callable(policy):
            raise ValueError(f"policy: expected one, as Recent(), got {policy!r}")
        self.config, self.dtype, self.policy = config, dtype, policy
        self.budgets = check_budgets(budgets, config.num_layers, policy.least_budget)
        G, D = config.num_kv_heads, config.head_dim
        none = torch.zeros(0, G, D, dtype=dtype, device=device)
        # Sums over whole texts, to which 16 bits would soon add nothing more.
        scores_dtype = torch.promote_types(dtype, torch.float32)
        scores = torch.zeros(G, 0, dtype=scores_dtype, device=device)
        nothing = [Kept(none, none, scores, scores.long())] * config.num_layers
        self._make_rows(batch_size, config.max_seq_len, device, nothing)

    def positions(self, request_id: Hashable) -> list[torch.Tensor]:
        """Of each layer, where the tokens that it kept stand in the text: int64 (G, n),
        for each KV head in ascending order."""
        return [layer.positions.clone() for layer in self._kept[self._row(request_id)]]

    def _attend_row(
        self,
        layer: int,
        kept: Kept,
        seq_len: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> tuple[torch.Tensor, Kept]:
        T, G = k.shape[:2]
        k, v = torch.cat([kept.k, k]), torch.cat([kept.v, v])  # (n + T, G, D)
        out, weights = attend_with_weights(q, k, v)
        scores = self.policy(weights, F.pad(kept.scores, (0, T)), self.budgets[layer])
        if scores.shape != (G, len(k)):
            raise ValueError(
                f"policy: expected scores of shape {(G, len(k))}, one per KV head and "
                f"token, got {tuple(scores.shape)}"
            )
        del weights  # H · T · (n + T): the largest of all
        k, v, places = evict_tokens(k, v, scores, self.budgets[layer], self.policy.window)
        new_positions = torch.arange(seq_len, seq_len + T, device=k.device).expand(G, -1)
        positions = torch.cat([kept.positions, new_positions], dim=-1)
        return out, Kept(k, v, scores.gather(1, places), positions.gather(1, places))


def check_budgets(
    budgets: Sequence[int] | int, num_layers: int, least: int
) -> tuple[int, ...]:
    """One budget for each layer, as ints; ValueError where one is missing, or below the
    least that a policy can do with."""
    if not isinstance(budgets, Sequence):
        budgets = [budgets] * num_layers
    if len(budgets) != num_layers:
        raise ValueError(
            f"budgets: expected {num_layers}, one for each layer, got {len(budgets)}: "
            f"{list(budgets)}"
        )
    return tuple(
        check_count(f"budget of layer {layer}", budget, at_least=max(least, 1))
        for layer, budget in enumerate(budgets)
    )
