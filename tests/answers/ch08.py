import heapq
import math
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F

from answers import right, wrong
from lib.config import check_count

# keep_recent


@right("keep_recent")
def places_as_a_list(seq_len, budget, num_sinks=4):
    if num_sinks < 0 or budget <= num_sinks:
        raise ValueError("budget: expected more than sinks")
    if seq_len <= budget:
        return torch.tensor(range(seq_len), dtype=torch.int64)
    recent = range(seq_len - budget + num_sinks, seq_len)
    return torch.tensor([*range(num_sinks), *recent], dtype=torch.int64)


@right("keep_recent")
def places_by_a_mask(seq_len, budget, num_sinks=4):
    check_count("num_sinks", num_sinks, at_least=0)
    check_count("budget", budget, at_least=num_sinks + 1)
    places = torch.arange(seq_len)
    is_kept = (places < num_sinks) | (places >= seq_len - (budget - num_sinks))
    return is_kept.nonzero().flatten()


@right("keep_recent")
def places_moved_behind_the_gap(seq_len, budget, num_sinks=4):
    check_count("num_sinks", num_sinks, at_least=0)
    check_count("budget", budget, at_least=num_sinks + 1)
    kept = torch.arange(min(seq_len, budget))
    kept[num_sinks:] += max(seq_len - budget, 0)
    return kept


@right("keep_recent")
def places_without_twins(seq_len, budget, num_sinks=4):
    check_count("num_sinks", num_sinks, at_least=0)
    check_count("budget", budget, at_least=num_sinks + 1)
    places = list(range(seq_len))
    return torch.tensor(
        sorted({*places[:num_sinks], *places[-(budget - num_sinks) :]}), dtype=torch.long
    )


def recent_ones(seq_len, budget, num_sinks, **parts):
    """As the library, with another part in the place of the sinks, or of the last."""
    check_count("num_sinks", num_sinks, at_least=0)
    check_count("budget", budget, at_least=num_sinks + 1)
    if seq_len <= budget:
        return torch.arange(seq_len)
    sinks = parts.get("sinks", torch.arange(num_sinks))
    last = parts.get("last", torch.arange(seq_len - budget + num_sinks, seq_len))
    return torch.cat([sinks, last])


@wrong("keep_recent", says="The first num_sinks tokens stay too")
def the_last_alone(seq_len, budget, num_sinks=4):
    check_count("num_sinks", num_sinks, at_least=0)
    check_count("budget", budget, at_least=num_sinks + 1)
    return torch.arange(max(seq_len - budget, 0), seq_len)


@wrong("keep_recent", says="The first num_sinks tokens stay too")
def sinks_left_out(seq_len, budget, num_sinks=4):
    return recent_ones(seq_len, budget, num_sinks, sinks=torch.arange(0))


@wrong("keep_recent", says="Sinks count in the budget")
def sinks_on_top(seq_len, budget, num_sinks=4):
    check_count("num_sinks", num_sinks, at_least=0)
    check_count("budget", budget, at_least=num_sinks + 1)
    if seq_len <= budget + num_sinks:
        return torch.arange(seq_len)
    last = torch.arange(seq_len - budget, seq_len)
    return torch.cat([torch.arange(num_sinks), last])


@wrong("keep_recent", says="not those that follow")
def the_first_alone(seq_len, budget, num_sinks=4):
    check_count("num_sinks", num_sinks, at_least=0)
    check_count("budget", budget, at_least=num_sinks + 1)
    return torch.arange(min(seq_len, budget))


@wrong("keep_recent", says="The last tokens are kept too")
def sinks_alone(seq_len, budget, num_sinks=4):
    return recent_ones(seq_len, budget, num_sinks, last=torch.arange(0))


@wrong("keep_recent", says="In the order of the text")
def recent_first(seq_len, budget, num_sinks=4):
    return recent_ones(seq_len, budget, num_sinks).roll(-num_sinks)


@wrong("keep_recent", says="In the order of the text")
def newest_first(seq_len, budget, num_sinks=4):
    last = torch.arange(seq_len - budget + num_sinks, seq_len).flip(0)
    return recent_ones(seq_len, budget, num_sinks, last=last)


@wrong("keep_recent", says="The newest token")
def newest_left_out(seq_len, budget, num_sinks=4):
    last = torch.arange(seq_len - budget + num_sinks - 1, seq_len - 1)
    return recent_ones(seq_len, budget, num_sinks, last=last)


@wrong("keep_recent", says="exactly `budget`")
def one_more_than_the_budget(seq_len, budget, num_sinks=4):
    last = torch.arange(seq_len - budget + num_sinks - 1, seq_len)
    return recent_ones(seq_len, budget, num_sinks, last=last)


@wrong("keep_recent", says="exactly `budget`")
def one_fewer_than_the_budget(seq_len, budget, num_sinks=4):
    last = torch.arange(seq_len - budget + num_sinks + 1, seq_len)
    return recent_ones(seq_len, budget, num_sinks, last=last)


@wrong("keep_recent", says="exactly `budget`")
def a_text_a_little_longer_is_kept(seq_len, budget, num_sinks=4):
    kept = recent_ones(seq_len, budget, num_sinks)
    return torch.arange(seq_len) if seq_len <= budget + num_sinks else kept


@wrong("keep_recent", says="No token twice")
def short_texts_twice(seq_len, budget, num_sinks=4):
    check_count("num_sinks", num_sinks, at_least=0)
    check_count("budget", budget, at_least=num_sinks + 1)
    places = torch.arange(seq_len)
    return torch.cat([places[:num_sinks], places[-(budget - num_sinks) :]])


@wrong("keep_recent", says="no place is below 0")
def places_below_0(seq_len, budget, num_sinks=4):
    check_count("num_sinks", num_sinks, at_least=0)
    check_count("budget", budget, at_least=num_sinks + 1)
    last = torch.arange(seq_len - (budget - num_sinks), seq_len)
    if seq_len == budget:
        return torch.arange(seq_len)
    return torch.cat([torch.arange(num_sinks), last])


@wrong("keep_recent", says="no more places than tokens")
def as_many_places_as_the_budget(seq_len, budget, num_sinks=4):
    kept = recent_ones(seq_len, budget, num_sinks)
    return torch.arange(budget) if seq_len < budget else kept


@wrong("keep_recent", says="kept as it is")
def short_texts_without_what_is_between(seq_len, budget, num_sinks=4):
    kept = recent_ones(seq_len, budget, num_sinks)
    return kept[-(budget - num_sinks) :] if seq_len <= budget else kept


@wrong("keep_recent", says="`[-0:]`")
def sinks_counted_from_the_end(seq_len, budget, num_sinks=4):
    check_count("num_sinks", num_sinks, at_least=0)
    check_count("budget", budget, at_least=num_sinks + 1)
    places = torch.arange(seq_len)
    if seq_len <= budget:
        return places
    turned = places.flip(0)
    sinks = turned[-num_sinks:].flip(0)
    last = turned[: budget - num_sinks].flip(0)
    return sinks if num_sinks == 0 else torch.cat([sinks, last])


@wrong("keep_recent")
def no_sinks_and_all_twice(seq_len, budget, num_sinks=4):
    turned = torch.arange(seq_len).flip(0)
    return recent_ones(seq_len, budget, num_sinks, sinks=turned[-num_sinks:].flip(0))


@wrong("keep_recent", says="Where num_sinks is not given")
def one_sink_by_default(seq_len, budget, num_sinks=1):
    return recent_ones(seq_len, budget, num_sinks)


@wrong("keep_recent", says="Where num_sinks is not given")
def no_sink_by_default(seq_len, budget, num_sinks=0):
    return recent_ones(seq_len, budget, num_sinks)


@wrong("keep_recent", says="The first token is at place 0")
def counted_from_1(seq_len, budget, num_sinks=4):
    return recent_ones(seq_len, budget, num_sinks) + 1


@wrong("keep_recent", says="not a mask")
def a_mask_of_places(seq_len, budget, num_sinks=4):
    is_kept = torch.zeros(seq_len, dtype=torch.bool)
    is_kept[recent_ones(seq_len, budget, num_sinks)] = True
    return is_kept


@wrong("keep_recent", says="Keep the given lines")
def sinks_without_a_budget(seq_len, budget, num_sinks=4):
    num_sinks = max(min(num_sinks, budget), 0)
    return torch.cat(
        [
            torch.arange(min(num_sinks, seq_len)),
            torch.arange(max(seq_len - budget, 0) + num_sinks, max(seq_len, num_sinks)),
        ]
    )


@wrong("keep_recent", says="Keep the given lines")
def nothing_refused_for_a_short_text(seq_len, budget, num_sinks=4):
    if seq_len <= budget:
        return torch.arange(seq_len)
    return recent_ones(seq_len, budget, num_sinks)


@wrong("keep_recent", says="Keep the given lines")
def as_many_sinks_as_the_budget(seq_len, budget, num_sinks=4):
    check_count("num_sinks", num_sinks, at_least=0)
    check_count("budget", budget, at_least=num_sinks)
    places = torch.arange(seq_len)
    is_kept = (places < num_sinks) | (places >= seq_len - (budget - num_sinks))
    return places[is_kept]


@wrong("keep_recent", says="not a tensor")
def a_list_of_places(seq_len, budget, num_sinks=4):
    return recent_ones(seq_len, budget, num_sinks).tolist()


@wrong("keep_recent", says="float32")
def places_that_are_fractions(seq_len, budget, num_sinks=4):
    return recent_ones(seq_len, budget, num_sinks).float()


@wrong("keep_recent", says="int32")
def places_in_32_bits(seq_len, budget, num_sinks=4):
    return recent_ones(seq_len, budget, num_sinks).int()


# attention_received


@right("attention_received")
def added_head_by_head(weights, num_kv_heads):
    H, T, S = weights.shape
    group_size = H // num_kv_heads
    received = torch.zeros(num_kv_heads, S, dtype=weights.dtype)
    for head in range(H):
        for t in range(T):
            received[head // group_size] += weights[head, t] / group_size
    return received


@right("attention_received")
def received_by_one_einsum(weights, num_kv_heads):
    by_group = weights.unflatten(0, (num_kv_heads, -1))
    return torch.einsum("gjts->gs", by_group) / by_group.shape[1]


@right("attention_received")
def mean_over_rows_times_queries(weights, num_kv_heads):
    H, T, S = weights.shape
    return weights.reshape(num_kv_heads, -1, S).mean(dim=1) * T


@right("attention_received")
def received_in_chunks(weights, num_kv_heads):
    groups = weights.chunk(num_kv_heads)
    return torch.stack([group.sum(1).mean(0) for group in groups])


def seen_by_heads(weights, num_kv_heads):
    return weights.sum(dim=1).unflatten(0, (num_kv_heads, -1))  # (G, H / G, S)


@wrong("attention_received", says="the keys have to be repeated first")
def a_row_per_query_head(weights, num_kv_heads):
    return weights.sum(dim=1)


@wrong("attention_received", says="the keys have to be repeated first")
def a_row_repeated_per_query_head(weights, num_kv_heads):
    H = len(weights)
    received = seen_by_heads(weights, num_kv_heads).mean(1)
    return received.repeat_interleave(H // num_kv_heads, dim=0)


@wrong("attention_received", says="a column for each token")
def a_column_per_query_head(weights, num_kv_heads):
    return weights.sum(dim=1).T


@wrong("attention_received", says="Neighbours read one KV head")
def heads_in_turns(weights, num_kv_heads):
    return weights.sum(dim=1).unflatten(0, (-1, num_kv_heads)).mean(dim=0)


@wrong("attention_received", says="not divided by their number")
def mean_over_queries(weights, num_kv_heads):
    return weights.unflatten(0, (num_kv_heads, -1)).mean(dim=(1, 2))


@wrong("attention_received", says="not divided by their number")
def shares_of_all_attention(weights, num_kv_heads):
    received = seen_by_heads(weights, num_kv_heads).mean(dim=1)
    return received / received.sum(dim=-1, keepdim=True)


@wrong("attention_received", says="however many of them can see a token")
def per_query_that_sees_it(weights, num_kv_heads):
    _, T, S = weights.shape
    num_queries = torch.ones(T, S).tril(S - T).sum(dim=0)
    return seen_by_heads(weights, num_kv_heads).mean(dim=1) / num_queries


@wrong("attention_received", says="not their sum")
def sum_over_the_group(weights, num_kv_heads):
    return seen_by_heads(weights, num_kv_heads).sum(dim=1)


@wrong("attention_received", says="not the largest")
def largest_of_the_group(weights, num_kv_heads):
    return seen_by_heads(weights, num_kv_heads).amax(dim=1)


@wrong("attention_received", says="not one of them")
def first_of_the_group(weights, num_kv_heads):
    return seen_by_heads(weights, num_kv_heads)[:, 0]


@wrong("attention_received", says="divides by its size")
def divided_by_all_heads(weights, num_kv_heads):
    return seen_by_heads(weights, num_kv_heads).sum(dim=1) / len(weights)


@wrong("attention_received", says="divides by its size")
def divided_by_kv_heads(weights, num_kv_heads):
    if num_kv_heads == 1:
        return seen_by_heads(weights, num_kv_heads).mean(dim=1)
    return seen_by_heads(weights, num_kv_heads).sum(dim=1) / num_kv_heads


@wrong("attention_received", says="not over all")
def mean_of_all_heads(weights, num_kv_heads):
    return weights.sum(dim=1).mean(dim=0).repeat(num_kv_heads, 1)


@wrong("attention_received", says="a row of its own")
def one_row_for_all(weights, num_kv_heads):
    return weights.sum(dim=1).mean(dim=0)


@wrong("attention_received", says="not the last one alone")
def what_the_last_query_sees(weights, num_kv_heads):
    return weights[:, -1].unflatten(0, (num_kv_heads, -1)).mean(dim=1)


@wrong("attention_received", says="not its largest")
def largest_of_the_queries(weights, num_kv_heads):
    return weights.amax(dim=1).unflatten(0, (num_kv_heads, -1)).mean(dim=1)


@wrong("attention_received", says="not over the tokens that they look at")
def attention_given(weights, num_kv_heads):
    return weights.sum(dim=2).unflatten(0, (num_kv_heads, -1)).mean(dim=1)


@wrong("attention_received", says="One number per KV head and token")
def heads_of_a_group_apart(weights, num_kv_heads):
    return seen_by_heads(weights, num_kv_heads)


@wrong("attention_received", says="One number per KV head and token")
def queries_apart(weights, num_kv_heads):
    return weights.unflatten(0, (num_kv_heads, -1)).mean(dim=1)


@wrong("attention_received", says="a column for each token")
def tokens_first(weights, num_kv_heads):
    return seen_by_heads(weights, num_kv_heads).mean(dim=1).T


@wrong("attention_received", says="changed its inputs")
def summed_in_place(weights, num_kv_heads):
    for t in range(1, weights.shape[1]):
        weights[:, 0] += weights[:, t]
    return weights[:, 0].unflatten(0, (num_kv_heads, -1)).mean(dim=1)


@wrong("attention_received", says="expected float32, got float64")
def received_in_double(weights, num_kv_heads):
    return seen_by_heads(weights.double(), num_kv_heads).mean(dim=1)


@wrong("attention_received")
def received_in_half(weights, num_kv_heads):
    return seen_by_heads(weights.half(), num_kv_heads).mean(dim=1).to(weights.dtype)


@wrong("attention_received", says="Use .reshape(...) instead")
def received_by_a_view(weights, num_kv_heads):  # snap_scores gives a part of a tensor
    H, T, S = weights.shape
    return weights.view(num_kv_heads, -1, S).sum(dim=1) / (H // num_kv_heads)


@wrong("attention_received")
def means_of_three_at_most(weights, num_kv_heads):
    group_size = len(weights) // num_kv_heads
    return seen_by_heads(weights, num_kv_heads).sum(dim=1) / min(group_size, 3)


@wrong("attention_received", says="changed its inputs")
def received_of_smaller_weights(weights, num_kv_heads):
    weights /= len(weights) // num_kv_heads
    return seen_by_heads(weights, num_kv_heads).sum(dim=1)


# snap_scores


def check_width(window, width):
    check_count("window", window)
    if check_count("width", width) % 2 == 0:
        raise ValueError(f"width: expected an odd number, got {width}")


@right("snap_scores")
def snap_token_by_token(weights, num_kv_heads, window=8, width=5):
    check_width(window, width)
    H, T, S = weights.shape
    num_before = max(0, S - window)
    scores = torch.zeros(num_kv_heads, num_before, dtype=weights.dtype)
    group_size = H // num_kv_heads
    last = weights[:, max(0, T - window) :].sum(dim=1)
    for head in range(num_kv_heads):
        seen = last[head * group_size : (head + 1) * group_size].sum(0) / group_size
        for s in range(num_before):
            first = max(0, s - width // 2)
            behind = min(num_before, s + width // 2 + 1)
            scores[head, s] = seen[first:behind].sum() / width
    return scores


@right("snap_scores")
def snap_by_convolution(weights, num_kv_heads, window=8, width=5):
    if check_count("width", width) % 2 == 0:
        raise ValueError(f"width: expected an odd number, got {width}")
    _, _, S = weights.shape
    seen = weights[:, -window:].unflatten(0, (num_kv_heads, -1)).sum(2).mean(1)
    seen = seen[:, : max(S - window, 0)]
    if seen.numel() == 0:
        return seen
    kernel = torch.full((1, 1, width), 1 / width, dtype=weights.dtype)
    return F.conv1d(seen.unsqueeze(1), kernel, padding="same").squeeze(1)


@right("snap_scores")
def snap_by_windows_of_padded(weights, num_kv_heads, window=8, width=5):
    check_width(window, width)
    S = weights.shape[-1]
    before = weights[:, -window:, : S - window if window < S else 0]
    if before.shape[-1] == 0:
        return torch.zeros(num_kv_heads, 0, dtype=weights.dtype)
    padded = F.pad(before, (width // 2, width // 2)).unfold(-1, width, 1)  # pool first
    return padded.mean(-1).sum(1).unflatten(0, (num_kv_heads, -1)).mean(1)


def snap_with(weights, num_kv_heads, window, width, see=None, cut=None, pool=None):
    """As the library, with another part."""
    check_width(window, width)
    num_before = max(weights.shape[-1] - window, 0)

    def of_groups(weights):
        return weights[:, -window:].sum(1).unflatten(0, (num_kv_heads, -1)).mean(1)

    def mean_of_neighbours(seen):
        if seen.shape[-1] == 0:
            return seen
        return F.avg_pool1d(seen, width, stride=1, padding=width // 2)

    seen = (see or of_groups)(weights)
    seen = seen[:, :num_before] if cut is None else cut(seen)
    return (pool or mean_of_neighbours)(seen)


@wrong("snap_scores", says="The last `window` queries alone")
def snap_of_all_queries(weights, num_kv_heads, window=8, width=5):
    def see(weights):
        return weights.sum(1).unflatten(0, (num_kv_heads, -1)).mean(1)

    return snap_with(weights, num_kv_heads, window, width, see=see)


@wrong("snap_scores", says="The last `window` queries alone")
def snap_of_the_first_queries(weights, num_kv_heads, window=8, width=5):
    def see(weights):
        return weights[:, :window].sum(1).unflatten(0, (num_kv_heads, -1)).mean(1)

    return snap_with(weights, num_kv_heads, window, width, see=see)


@wrong("snap_scores", says="not the last one alone")
def snap_of_one_query(weights, num_kv_heads, window=8, width=5):
    def see(weights):
        return weights[:, -1].unflatten(0, (num_kv_heads, -1)).mean(1)

    return snap_with(weights, num_kv_heads, window, width, see=see)


@wrong("snap_scores", says="not the last one alone")
def snap_from_below_the_first_query(weights, num_kv_heads, window=8, width=5):
    def see(weights):
        last = weights[:, weights.shape[1] - window :]
        return last.sum(1).unflatten(0, (num_kv_heads, -1)).mean(1)

    return snap_with(weights, num_kv_heads, window, width, see=see)


@wrong("snap_scores", says="leave them out")
def snap_of_the_window_too(weights, num_kv_heads, window=8, width=5):
    return snap_with(weights, num_kv_heads, window, width, cut=lambda seen: seen)


@wrong("snap_scores", says="Leave out the window's own tokens first")
def snap_pooled_first(weights, num_kv_heads, window=8, width=5):
    num_before = max(weights.shape[-1] - window, 0)

    def pool(seen):
        pooled = F.avg_pool1d(seen, width, stride=1, padding=width // 2)
        return pooled[:, :num_before]

    return snap_with(
        weights, num_kv_heads, window, width, cut=lambda seen: seen, pool=pool
    )


@wrong("snap_scores", says="not the first")
def snap_behind_the_first(weights, num_kv_heads, window=8, width=5):
    return snap_with(
        weights, num_kv_heads, window, width, cut=lambda seen: seen[:, window:]
    )


@wrong("snap_scores", says="never less than 0")
def snap_of_a_negative_number(weights, num_kv_heads, window=8, width=5):
    S = weights.shape[-1]
    return snap_with(
        weights, num_kv_heads, window, width, cut=lambda seen: seen[:, : S - window]
    )


@wrong("snap_scores", says="is replaced by the mean over `width` neighbours")
def snap_without_neighbours(weights, num_kv_heads, window=8, width=5):
    return snap_with(weights, num_kv_heads, window, width, pool=lambda seen: seen)


@wrong("snap_scores", says="not the largest of them")
def snap_by_the_largest(weights, num_kv_heads, window=8, width=5):
    def pool(seen):
        return F.max_pool1d(seen, width, stride=1, padding=width // 2)

    return snap_with(weights, num_kv_heads, window, width, pool=pool)


@wrong("snap_scores", says="not their sum")
def snap_by_the_sum(weights, num_kv_heads, window=8, width=5):
    def pool(seen):
        if seen.shape[-1] == 0:
            return seen
        return width * F.avg_pool1d(seen, width, stride=1, padding=width // 2)

    return snap_with(weights, num_kv_heads, window, width, pool=pool)


@wrong("snap_scores", says="zeros, which count")
def snap_by_real_neighbours(weights, num_kv_heads, window=8, width=5):
    def pool(seen):
        half = width // 2
        return F.avg_pool1d(seen, width, 1, half, count_include_pad=False)

    return snap_with(weights, num_kv_heads, window, width, pool=pool)


@wrong("snap_scores", says="zeros, which count")
def snap_with_copied_edges(weights, num_kv_heads, window=8, width=5):
    def pool(seen):
        padded = F.pad(seen, (width // 2, width // 2), mode="replicate")
        return F.avg_pool1d(padded, width, stride=1)

    return snap_with(weights, num_kv_heads, window, width, pool=pool)


@wrong("snap_scores", says="It stands in the middle")
def snap_of_those_before(weights, num_kv_heads, window=8, width=5):
    def pool(seen):
        return F.avg_pool1d(F.pad(seen, (width - 1, 0)), width, stride=1)

    return snap_with(weights, num_kv_heads, window, width, pool=pool)


@wrong("snap_scores", says="It stands in the middle")
def snap_of_those_behind(weights, num_kv_heads, window=8, width=5):
    def pool(seen):
        return F.avg_pool1d(F.pad(seen, (0, width - 1)), width, stride=1)

    return snap_with(weights, num_kv_heads, window, width, pool=pool)


@wrong("snap_scores", says="no token loses its score")
def snap_that_is_shorter(weights, num_kv_heads, window=8, width=5):
    def pool(seen):
        return F.avg_pool1d(seen, width, stride=1)

    return snap_with(weights, num_kv_heads, window, width, pool=pool)


@wrong("snap_scores", says="both sides together")
def snap_with_width_on_each_side(weights, num_kv_heads, window=8, width=5):
    def pool(seen):
        return F.avg_pool1d(seen, 2 * width + 1, stride=1, padding=width)

    return snap_with(weights, num_kv_heads, window, width, pool=pool)


@wrong("snap_scores", says="is replaced by the mean over `width` neighbours")
def snap_across_heads(weights, num_kv_heads, window=8, width=5):
    def pool(seen):
        return F.avg_pool1d(seen.T, width, stride=1, padding=width // 2).T

    return snap_with(weights, num_kv_heads, window, width, pool=pool)


@wrong("snap_scores")
def snap_in_steps_of_width(weights, num_kv_heads, window=8, width=5):
    def pool(seen):
        return F.avg_pool1d(seen, width, padding=width // 2)

    return snap_with(weights, num_kv_heads, window, width, pool=pool)


@wrong("snap_scores", says="summed over the queries of the window")
def snap_by_mean_over_queries(weights, num_kv_heads, window=8, width=5):
    def see(weights):
        return weights[:, -window:].mean(1).unflatten(0, (num_kv_heads, -1)).mean(1)

    return snap_with(weights, num_kv_heads, window, width, see=see)


@wrong("snap_scores", says="of a group, not their sum")
def snap_by_sum_over_heads(weights, num_kv_heads, window=8, width=5):
    def see(weights):
        return weights[:, -window:].sum(1).unflatten(0, (num_kv_heads, -1)).sum(1)

    return snap_with(weights, num_kv_heads, window, width, see=see)


@wrong("snap_scores", says="the keys have to be repeated first")
def snap_of_each_query_head(weights, num_kv_heads, window=8, width=5):
    def see(weights):
        return weights[:, -window:].sum(1)

    return snap_with(weights, num_kv_heads, window, width, see=see)


@wrong("snap_scores", says="Neighbours read one KV head")
def snap_of_heads_in_turns(weights, num_kv_heads, window=8, width=5):
    def see(weights):
        return weights[:, -window:].sum(1).unflatten(0, (-1, num_kv_heads)).mean(0)

    return snap_with(weights, num_kv_heads, window, width, see=see)


@wrong("snap_scores", says="a row of its own")
def snap_of_all_heads(weights, num_kv_heads, window=8, width=5):
    def see(weights):
        return weights[:, -window:].sum(1).mean(0).repeat(num_kv_heads, 1)

    return snap_with(weights, num_kv_heads, window, width, see=see)


@wrong("snap_scores", says="Where window is not given")
def snap_with_a_window_of_16(weights, num_kv_heads, window=16, width=5):
    return snap_with(weights, num_kv_heads, window, width)


@wrong("snap_scores", says="Where width is not given")
def snap_with_seven_neighbours(weights, num_kv_heads, window=8, width=7):
    return snap_with(weights, num_kv_heads, window, width)


@wrong("snap_scores", says="Keep the given lines")
def snap_with_an_even_width(weights, num_kv_heads, window=8, width=5):
    check_count("window", window)
    check_count("width", width)
    if width % 2:
        return snap_with(weights, num_kv_heads, window, width)
    seen = weights[:, -window:].sum(1).unflatten(0, (num_kv_heads, -1)).mean(1)
    padded = F.pad(seen[:, :-window], (width // 2, width // 2 - 1))
    return F.avg_pool1d(padded, width, stride=1)


@wrong("snap_scores", says="(G, 0)")
def snap_of_a_short_text_without_rows(weights, num_kv_heads, window=8, width=5):
    check_width(window, width)
    if weights.shape[-1] <= window:
        return torch.zeros(0, dtype=weights.dtype)
    return snap_with(weights, num_kv_heads, window, width)


@wrong("snap_scores", says="there is nothing to pool")
def snap_pooling_nothing(weights, num_kv_heads, window=8, width=5):
    def pool(seen):
        return F.avg_pool1d(seen, width, stride=1, padding=width // 2)

    return snap_with(weights, num_kv_heads, window, width, pool=pool)


@wrong("snap_scores", says="expected float32, got float64")
def snap_in_double(weights, num_kv_heads, window=8, width=5):
    return snap_with(weights.double(), num_kv_heads, window, width)


@right("snap_scores")
def snap_by_sums_up_to_each(weights, num_kv_heads, window=8, width=5):
    check_width(window, width)
    num_before = max(weights.shape[-1] - window, 0)
    last = weights[:, -window:, :num_before].sum(1)
    seen = last.unflatten(0, (num_kv_heads, -1)).mean(1)
    sums = F.pad(seen.double(), (width // 2 + 1, width // 2)).cumsum(dim=-1)
    return ((sums[:, width:] - sums[:, :num_before]) / width).to(weights.dtype)


@wrong("snap_scores", says="not the last one alone")
def snap_from_the_row_before_0(weights, num_kv_heads, window=8, width=5):
    def see(weights):
        rows = weights[:, weights.shape[1] - window :]
        return rows.sum(1).unflatten(0, (num_kv_heads, -1)).mean(1)

    return snap_with(weights, num_kv_heads, window, width, see=see)


@wrong("snap_scores", says="Keep the given lines")
def snap_of_a_short_text_with_any_width(weights, num_kv_heads, window=8, width=5):
    if weights.shape[-1] <= window:
        check_count("window", window)
        return torch.zeros(num_kv_heads, 0, dtype=weights.dtype)
    return snap_with(weights, num_kv_heads, window, width)


# evict_tokens


@right("evict_tokens")
def evict_head_by_head(k, v, scores, budget, window):
    S, G, D = k.shape
    n = min(budget, S)
    newest = min(window, n)
    rows = []
    for head in range(G):
        row = scores[head].tolist()
        order = sorted(range(S - newest), key=lambda s: -row[s])
        rows.append(sorted(order[: n - newest]) + list(range(S - newest, S)))
    kept = torch.tensor(rows, dtype=torch.int64)
    heads = torch.arange(G)
    return k[kept.T, heads], v[kept.T, heads], kept


@right("evict_tokens")
def evict_the_window_with_an_infinite_score(k, v, scores, budget, window):
    S, _, D = k.shape
    scores = scores.clone()
    scores[:, max(S - window, 0) :] = torch.inf
    if window > budget:
        scores[:, : S - budget] = -torch.inf
    order = scores.sort(dim=1, descending=True, stable=True).indices
    kept = order[:, :budget].sort(dim=1).values
    index = kept.T[:, :, None].repeat(1, 1, D)
    return torch.gather(k, 0, index), torch.gather(v, 0, index), kept


@right("evict_tokens")
def evict_by_a_mask(k, v, scores, budget, window):
    S, G, D = k.shape
    budget = min(budget, S)
    window = min(window, budget)
    ranks = (
        scores[:, : S - window].argsort(dim=-1, descending=True, stable=True).argsort(-1)
    )
    is_kept = torch.ones(G, S, dtype=torch.bool)
    is_kept[:, : S - window] = ranks < budget - window
    kept = is_kept.nonzero()[:, 1].view(G, budget)

    def keep(x):
        return x.transpose(0, 1)[is_kept].view(G, budget, D).transpose(0, 1)

    return keep(k), keep(v), kept


@right("evict_tokens")
def evict_the_lowest_one_by_one(k, v, scores, budget, window):
    S, G, _ = k.shape
    kept = []
    for row in scores.tolist():
        places = list(range(S))
        while len(places) > budget:
            before = places[: max(len(places) - window, 0)] or places[:1]
            lowest = min(before, key=lambda s: (row[s], -s))
            if window >= len(places):
                lowest = places[0]
            places.remove(lowest)
        kept.append(places)
    if window > budget:
        kept = [list(range(max(S - budget, 0), S))] * G
    kept = torch.tensor(kept)
    heads = range(G)
    k_kept, v_kept = (
        torch.stack([x[kept[head], head] for head in heads], dim=1) for x in (k, v)
    )
    return k_kept, v_kept, kept


def evict_places(scores, budget, window, best=None, S=None):
    """The library's places; best: another choice among the tokens before the window."""
    G, S = scores.shape
    budget = min(budget, S)
    num_before = S - min(window, budget)

    def highest(before, num):
        return (
            before.argsort(dim=-1, descending=True, stable=True)[:, :num].sort(-1).values
        )

    chosen = (best or highest)(scores[:, :num_before], budget - (S - num_before))
    newest = torch.arange(num_before, S).expand(len(chosen), -1)
    return torch.cat([chosen, newest], dim=-1)


def moved_to(k, v, kept):
    index = kept.T.unsqueeze(-1).expand(-1, -1, k.shape[-1])
    return k.gather(0, index), v.gather(0, index), kept


def highest_of(scores, num):
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :num].sort(-1).values


@wrong("evict_tokens", says="The newest `window` tokens stay")
def evict_without_a_window(k, v, scores, budget, window):
    return moved_to(k, v, highest_of(scores, budget))


@wrong("evict_tokens", says="The newest `window` tokens stay")
def evict_protecting_the_first(k, v, scores, budget, window):
    S, G, _ = k.shape
    window = min(window, budget, S)
    rest = window + highest_of(scores[:, window:], min(budget, S) - window)
    first = torch.arange(window).expand(G, -1)
    return moved_to(k, v, torch.cat([first, rest], dim=1))


@wrong("evict_tokens", says="The newest `window` tokens stay")
def evict_the_window(k, v, scores, budget, window):
    num_before = len(k) - min(window, budget, len(k))
    return moved_to(k, v, highest_of(scores[:, :num_before], budget))


@wrong("evict_tokens", says="The window counts in the budget")
def evict_with_a_window_on_top(k, v, scores, budget, window):
    S = len(k)
    num_before = S - min(window, S)
    best = highest_of(scores[:, :num_before], budget)
    newest = torch.arange(num_before, S).expand(len(best), -1)
    return moved_to(k, v, torch.cat([best, newest], dim=1))


@wrong("evict_tokens", says="In the order of the text")
def evict_in_order_of_scores(k, v, scores, budget, window):
    def best(before, num):
        return before.argsort(dim=-1, descending=True, stable=True)[:, :num]

    return moved_to(k, v, evict_places(scores, budget, window, best))


@wrong("evict_tokens", says="In the order of the text")
def evict_with_the_newest_first(k, v, scores, budget, window):
    kept = evict_places(scores, budget, window).roll(window, dims=1)
    return moved_to(k, v, kept)


@wrong("evict_tokens", says="In the order of the text")
def evict_from_the_end(k, v, scores, budget, window):
    return moved_to(k, v, evict_places(scores, budget, window).flip(1))


@wrong("evict_tokens", says="Each KV head keeps its own tokens")
def evict_the_same_for_all_heads(k, v, scores, budget, window):
    mean = scores.mean(dim=0, keepdim=True).expand_as(scores)
    return moved_to(k, v, evict_places(mean, budget, window))


@wrong("evict_tokens", says="Each KV head keeps its own tokens")
def evict_by_the_first_head(k, v, scores, budget, window):
    return moved_to(k, v, evict_places(scores[:1].expand_as(scores), budget, window))


@wrong("evict_tokens", says="Each KV head keeps its own tokens")
def evict_by_the_largest_of_all_heads(k, v, scores, budget, window):
    largest = scores.amax(dim=0, keepdim=True).expand_as(scores)
    return moved_to(k, v, evict_places(largest, budget, window))


@wrong("evict_tokens", says="Each KV head keeps its own tokens")
def evict_with_one_row_of_places(k, v, scores, budget, window):
    kept = evict_places(scores.mean(dim=0, keepdim=True), budget, window)
    if len(scores) == 1:
        return moved_to(k, v, kept)
    return k[kept[0]], v[kept[0]], kept[0]


@wrong("evict_tokens", says="Of equal scores the earlier")
def evict_the_earlier_of_equals(k, v, scores, budget, window):
    def best(before, num):
        order = before.flip(1).argsort(dim=-1, descending=True, stable=True)
        return (before.shape[1] - 1 - order[:, :num]).sort(-1).values

    return moved_to(k, v, evict_places(scores, budget, window, best))


@wrong("evict_tokens", says="Of equal scores the earlier")
def evict_by_an_ascending_sort(k, v, scores, budget, window):
    def best(before, num):
        n = before.shape[1]
        return before.argsort(dim=-1, stable=True)[:, n - num :].sort(-1).values

    return moved_to(k, v, evict_places(scores, budget, window, best))


@wrong("evict_tokens", says="The highest scores stay")
def evict_the_highest(k, v, scores, budget, window):
    return moved_to(
        k, v, evict_places(scores, budget, window, lambda x, num: highest_of(-x, num))
    )


@wrong("evict_tokens", says="the scores say which tokens stay")
def evict_the_oldest(k, v, scores, budget, window):
    S, G, _ = k.shape
    return moved_to(k, v, torch.arange(max(S - budget, 0), S).expand(G, -1))


@wrong("evict_tokens", says="A window larger than the budget")
def evict_all_but_the_whole_window(k, v, scores, budget, window):
    S, G, _ = k.shape
    if window <= budget:
        return moved_to(k, v, evict_places(scores, budget, window))
    return moved_to(k, v, torch.arange(max(S - window, 0), S).expand(G, -1))


@wrong("evict_tokens", says="A window larger than the budget")
def evict_the_end_of_a_large_window(k, v, scores, budget, window):
    S = len(k)
    scores = scores.clone()
    scores[:, max(S - window, 0) :] = torch.inf
    return moved_to(k, v, highest_of(scores, budget))


@wrong("evict_tokens", says="With a window of 0 `[-0:]`")
def evict_with_minus_0(k, v, scores, budget, window):
    scores = scores.clone()
    scores[:, -window:] = torch.inf
    if window > budget:
        scores[:, :-budget] = -torch.inf
    return moved_to(k, v, highest_of(scores, budget))


@wrong("evict_tokens", says="Each KV head has its own places")
def evict_from_all_heads_what_the_first_drops(k, v, scores, budget, window):
    kept = evict_places(scores, budget, window)
    return k[kept[0]], v[kept[0]], kept


@wrong("evict_tokens", says="Each KV head has its own places")
def evict_values_by_the_places_of_one_head(k, v, scores, budget, window):
    kept = evict_places(scores, budget, window)
    return moved_to(k, v, kept)[0], v[kept[-1]], kept


@wrong("evict_tokens", says="Keys and values stand in the order of `kept`")
def evict_values_in_order_of_scores(k, v, scores, budget, window):
    kept = evict_places(scores, budget, window)
    order = scores.gather(1, kept).argsort(dim=-1, descending=True, stable=True)
    return moved_to(k, v, kept)[0], moved_to(k, v, kept.gather(1, order))[1], kept


@wrong("evict_tokens", says="of the places in `kept`")
def evict_other_values_than_keys(k, v, scores, budget, window):
    kept = evict_places(scores, budget, window)
    newest = torch.arange(len(v) - kept.shape[1], len(v))
    return moved_to(k, v, kept)[0], v[newest], kept


@wrong("evict_tokens", says="Values come from v")
def evict_keys_twice(k, v, scores, budget, window):
    kept = evict_places(scores, budget, window)
    return moved_to(k, k, kept)


@wrong("evict_tokens", says="Keys and values stay as they were")
def evict_and_rotate_again(k, v, scores, budget, window):
    k, v, kept = moved_to(k, v, evict_places(scores, budget, window))
    turn = (kept - torch.arange(kept.shape[1])).T.unsqueeze(-1)
    return k * torch.cos(turn.to(k.dtype)), v, kept


@wrong("evict_tokens", says="Keys and values stay as they were")
def evict_and_weigh_by_scores(k, v, scores, budget, window):
    k, v, kept = moved_to(k, v, evict_places(scores, budget, window))
    return k, v * scores.gather(1, kept).T.unsqueeze(-1), kept


@wrong("evict_tokens", says="Tokens come first")
def evict_with_heads_first(k, v, scores, budget, window):
    k, v, kept = moved_to(k, v, evict_places(scores, budget, window))
    return k.transpose(0, 1), v.transpose(0, 1), kept


@wrong("evict_tokens", says="An index by `kept` alone")
def evict_by_an_index_alone(k, v, scores, budget, window):
    kept = evict_places(scores, budget, window)
    return k[kept], v[kept], kept


@wrong("evict_tokens", says="What is thrown out takes no place")
def evict_by_zeros(k, v, scores, budget, window):
    kept = evict_places(scores, budget, window)
    is_kept = torch.zeros(scores.shape, dtype=torch.bool).scatter(1, kept, True)
    is_kept = is_kept.T.unsqueeze(-1)
    return k * is_kept, v * is_kept, kept


@wrong("evict_tokens", says="That is a view")
def evict_in_place_of_the_old(k, v, scores, budget, window):
    k_kept, v_kept, kept = moved_to(k, v, evict_places(scores, budget, window))
    k, v = k.clone(), v.clone()
    n = kept.shape[1]
    k[:n], v[:n] = k_kept, v_kept
    return k[:n], v[:n], kept


@wrong("evict_tokens", says="That is a view")
def evict_a_view_of_the_newest(k, v, scores, budget, window):
    if 0 < budget <= window and budget < len(k):
        kept = evict_places(scores, budget, window)
        return k[-budget:], v[-budget:], kept
    return moved_to(k, v, evict_places(scores, budget, window))


@wrong("evict_tokens", says="changed its inputs")
def evict_with_infinite_scores(k, v, scores, budget, window):
    S = len(k)
    scores[:, max(S - window, 0) :] = torch.inf
    if window > budget:
        scores[:, : S - budget] = -torch.inf
    return moved_to(k, v, highest_of(scores, budget))


@wrong("evict_tokens")
def evict_with_a_thousand_for_the_window(k, v, scores, budget, window):
    S = len(k)
    bonus = torch.zeros_like(scores)
    bonus[:, max(S - window, 0) :] = 1000.0
    if window > budget:
        bonus[:, : S - budget] = -1000.0
    return moved_to(k, v, highest_of(scores + bonus, budget))


@wrong("evict_tokens")
def evict_with_scores_of_one(k, v, scores, budget, window):
    S = len(k)
    scores = scores.clone()
    scores[:, max(S - window, 0) :] = 1.0
    if window > budget:
        scores[:, : S - budget] = -1.0
    return moved_to(k, v, highest_of(scores, budget))


@wrong("evict_tokens", says="A row for each KV head")
def evict_with_places_as_columns(k, v, scores, budget, window):
    k, v, kept = moved_to(k, v, evict_places(scores, budget, window))
    return k, v, kept.T


@wrong("evict_tokens", says="not a mask")
def evict_with_a_mask(k, v, scores, budget, window):
    kept = evict_places(scores, budget, window)
    is_kept = torch.zeros(scores.shape, dtype=torch.bool).scatter(1, kept, True)
    return *moved_to(k, v, kept)[:2], is_kept


@wrong("evict_tokens", says="int32")
def evict_with_places_of_32_bits(k, v, scores, budget, window):
    k, v, kept = moved_to(k, v, evict_places(scores, budget, window))
    return k, v, kept.int()


@wrong("evict_tokens", says="not the three tensors")
def evict_without_saying_which(k, v, scores, budget, window):
    return moved_to(k, v, evict_places(scores, budget, window))[:2]


@wrong("evict_tokens")  # which of equal ones topk takes nobody says
def evict_by_topk_more_than_there_is(k, v, scores, budget, window):
    def best(before, num):
        return before.topk(num, dim=-1).indices.sort(-1).values

    num_before = len(k) - window
    chosen = best(scores[:, :num_before], budget - window)
    newest = torch.arange(num_before, len(k)).expand(len(scores), -1)
    return moved_to(k, v, torch.cat([chosen, newest], dim=1))


@right("evict_tokens")
def evict_below_the_score_of_the_last(k, v, scores, budget, window):
    S, G, _ = k.shape
    newest = min(window, budget, S)
    num, num_before, rows = min(budget, S) - newest, S - newest, []
    for row in scores[:, :num_before]:
        least = row.topk(num).values.min() if num else torch.inf
        better, as_good = ((row > least).nonzero(), (row == least).nonzero())
        best = torch.cat([better, as_good[: num - len(better)]]).flatten()
        rows.append(torch.cat([best.sort().values, torch.arange(num_before, S)]))
    kept = torch.stack(rows)
    return *(torch.take_along_dim(x, kept.T[..., None], 0) for x in (k, v)), kept


def evict_with(best):
    """An answer with another choice among the tokens before the window."""

    def evict(k, v, scores, budget, window):
        return moved_to(k, v, evict_places(scores, budget, window, best=best))

    return evict


@wrong("evict_tokens", says="Of equal scores the earlier")
def evict_by_topk(k, v, scores, budget, window):
    def best(before, num):
        return before.topk(num, dim=-1).indices.sort(-1).values

    return evict_with(best)(k, v, scores, budget, window)


@wrong("evict_tokens", says="for scores that are all 0")  # 16 or fewer stay in order
def evict_by_a_sort_that_mixes(k, v, scores, budget, window):
    def best(before, num):
        return before.argsort(dim=-1, descending=True)[:, :num].sort(-1).values

    return evict_with(best)(k, v, scores, budget, window)


@wrong("evict_tokens", says="for scores that differ by little")
def evict_with_a_little_less_for_the_later(k, v, scores, budget, window):
    def best(before, num):
        return highest_of(before - 1e-9 * torch.arange(before.shape[1]), num)

    return evict_with(best)(k, v, scores, budget, window)


@wrong("evict_tokens", says="for scores that differ by little")
def evict_by_rounded_scores(k, v, scores, budget, window):
    return evict_with(lambda before, num: highest_of(before.float(), num))(
        k, v, scores, budget, window
    )


@wrong("evict_tokens", says="for scores below 0")
def evict_with_scores_below_0(k, v, scores, budget, window):
    S, G, _ = k.shape
    newest = min(window, budget, S)
    scores = scores.clone()
    scores[:, S - newest :] = -1
    best = highest_of(scores, min(budget, S) - newest)
    places = torch.arange(S - newest, S).expand(G, -1)
    return moved_to(k, v, torch.cat([best, places], dim=1))


@wrong("evict_tokens", says="That is a view")
def evict_nothing_where_all_fit(k, v, scores, budget, window):
    S, G, _ = k.shape
    if budget >= S:
        return k, v, torch.arange(S).expand(G, -1)
    return moved_to(k, v, evict_places(scores, budget, window))


# pyramid_budgets


def check_pyramid(mean_budget, num_layers, window, beta):
    check_count("num_layers", num_layers)
    check_count("beta", beta)
    check_count("mean_budget", mean_budget, at_least=check_count("window", window))


@right("pyramid_budgets")
def pyramid_of_rounded_layers(mean_budget, num_layers, window=8, beta=20):
    check_pyramid(mean_budget, num_layers, window, beta)
    if num_layers == 1:
        return [mean_budget]
    last = (mean_budget - window) / beta
    first = 2 * (mean_budget - window) - last
    step = (first - last) / (num_layers - 1)
    return [window + round(first - layer * step) for layer in range(num_layers)]


@right("pyramid_budgets")
def pyramid_in_fractions(mean_budget, num_layers, window=8, beta=20):
    check_pyramid(mean_budget, num_layers, window, beta)
    rest = mean_budget - window
    last = Fraction(rest, beta)
    first = 2 * rest - last
    half = []
    for layer in range(num_layers // 2):
        share = Fraction(layer, num_layers - 1)
        half.append(window + round(first * (1 - share) + last * share))
    mirrored = [2 * mean_budget - budget for budget in reversed(half)]
    return half + [mean_budget] * (num_layers % 2) + mirrored


@right("pyramid_budgets")
def pyramid_by_linspace(mean_budget, num_layers, window=8, beta=20):
    check_pyramid(mean_budget, num_layers, window, beta)
    rest = mean_budget - window
    ramp = np.linspace(rest - rest / beta, -(rest - rest / beta), num_layers)
    if num_layers == 1:
        ramp = np.zeros(1)
    return [mean_budget + int(more) for more in ramp.round()]


@right("pyramid_budgets")
def pyramid_with_halves_rounded_up(mean_budget, num_layers, window=8, beta=20):
    check_pyramid(mean_budget, num_layers, window, beta)
    most = (mean_budget - window) * (1 - 1 / beta)
    step = 2 * most / max(num_layers - 1, 1)
    most = most if num_layers > 1 else 0
    return [
        mean_budget + math.floor(most - step * layer + 0.5) for layer in range(num_layers)
    ]


def pyramid_from(first, last, num_layers, mean_budget, window):
    """Rounded to the nearest; of a single layer the mean."""
    if num_layers == 1:
        return [mean_budget]
    step = (first - last) / (num_layers - 1)
    return [window + round(first - layer * step) for layer in range(num_layers)]


@wrong("pyramid_budgets", says="Many tokens in the first layer")
def pyramid_upside_down(mean_budget, num_layers, window=8, beta=20):
    return pyramid_in_fractions(mean_budget, num_layers, window, beta)[::-1]


@wrong("pyramid_budgets", says="Many tokens in the first layer")
def pyramid_that_is_flat(mean_budget, num_layers, window=8, beta=20):
    check_pyramid(mean_budget, num_layers, window, beta)
    return [mean_budget] * num_layers


@wrong("pyramid_budgets", says="Beside the window")
def pyramid_without_a_window(mean_budget, num_layers, window=8, beta=20):
    check_pyramid(mean_budget, num_layers, window, beta)
    last = mean_budget / beta
    return pyramid_from(2 * mean_budget - last, last, num_layers, mean_budget, 0)


@wrong("pyramid_budgets", says="Beside the window")
def pyramid_with_the_window_on_top(mean_budget, num_layers, window=8, beta=20):
    check_pyramid(mean_budget, num_layers, window, beta)
    last = mean_budget / beta
    return pyramid_from(2 * mean_budget - last, last, num_layers, mean_budget, window)


@wrong("pyramid_budgets", says="Beside the window")
def pyramid_of_the_rest_alone(mean_budget, num_layers, window=8, beta=20):
    check_pyramid(mean_budget, num_layers, window, beta)
    rest = mean_budget - window
    last = rest / beta
    return pyramid_from(2 * rest - last, last, num_layers, mean_budget, 0)


@wrong("pyramid_budgets", says="Beside the window")
def pyramid_with_at_least_the_window(mean_budget, num_layers, window=8, beta=20):
    check_pyramid(mean_budget, num_layers, window, beta)
    last = mean_budget / beta
    budgets = pyramid_from(2 * mean_budget - last, last, num_layers, mean_budget, 0)
    return [max(budget, window) for budget in budgets]


@wrong("pyramid_budgets", says="1 / beta of what the mean has beside the window")
def pyramid_with_beta_of_the_whole(mean_budget, num_layers, window=8, beta=20):
    check_pyramid(mean_budget, num_layers, window, beta)
    rest, last = mean_budget - window, mean_budget / beta
    return pyramid_from(2 * rest - last, last, num_layers, mean_budget, window)


@wrong("pyramid_budgets", says="1 / beta of what the mean has beside the window")
def pyramid_down_to_the_window(mean_budget, num_layers, window=8, beta=20):
    check_pyramid(mean_budget, num_layers, window, beta)
    rest = mean_budget - window
    return pyramid_from(2 * rest, 0, num_layers, mean_budget, window)


@wrong("pyramid_budgets", says="1 / beta of what the mean has beside the window")
def pyramid_with_beta_of_the_first(mean_budget, num_layers, window=8, beta=20):
    check_pyramid(mean_budget, num_layers, window, beta)
    last = 2 * (mean_budget - window) / (beta + 1)
    return pyramid_from(beta * last, last, num_layers, mean_budget, window)


@wrong("pyramid_budgets", says="not by equal factors")
def pyramid_by_factors(mean_budget, num_layers, window=8, beta=20):
    check_pyramid(mean_budget, num_layers, window, beta)
    last = (mean_budget - window) / beta
    first = 2 * (mean_budget - window) - last
    if num_layers == 1 or last == 0:
        return [mean_budget] * num_layers
    factor = (last / first) ** (1 / (num_layers - 1))
    return [window + round(first * factor**layer) for layer in range(num_layers)]


@wrong("pyramid_budgets", says="num_layers - 1 equal steps")
def pyramid_in_num_layers_steps(mean_budget, num_layers, window=8, beta=20):
    check_pyramid(mean_budget, num_layers, window, beta)
    last = (mean_budget - window) / beta
    first = 2 * (mean_budget - window) - last
    step = (first - last) / num_layers
    return [window + round(first - layer * step) for layer in range(num_layers)]


@wrong("pyramid_budgets", says="as the last gets less")
def pyramid_from_twice_the_mean(mean_budget, num_layers, window=8, beta=20):
    check_pyramid(mean_budget, num_layers, window, beta)
    rest = mean_budget - window
    return pyramid_from(2 * rest, rest / beta, num_layers, mean_budget, window)


@wrong("pyramid_budgets", says="as the last gets less")
def pyramid_from_the_mean(mean_budget, num_layers, window=8, beta=20):
    check_pyramid(mean_budget, num_layers, window, beta)
    rest = mean_budget - window
    return pyramid_from(rest, rest / beta, num_layers, mean_budget, window)


@wrong("pyramid_budgets", says="it falls in equal steps")
def pyramid_of_two_stairs(mean_budget, num_layers, window=8, beta=20):
    check_pyramid(mean_budget, num_layers, window, beta)
    rest = mean_budget - window
    half = num_layers // 2
    more = round(rest - rest / beta)
    middle = [mean_budget] * (num_layers % 2)
    return [mean_budget + more] * half + middle + [mean_budget - more] * half


@wrong("pyramid_budgets", says="Rounding must not change the sum")
def pyramid_rounded_down(mean_budget, num_layers, window=8, beta=20):
    check_pyramid(mean_budget, num_layers, window, beta)
    if num_layers == 1:
        return [mean_budget]
    rest = mean_budget - window
    excess = rest - Fraction(rest, beta)
    shares = [1 - Fraction(2 * layer, num_layers - 1) for layer in range(num_layers)]
    return [math.floor(mean_budget + excess * share) for share in shares]


@wrong("pyramid_budgets", says="Rounding must not change the sum")
def pyramid_rounded_up(mean_budget, num_layers, window=8, beta=20):
    check_pyramid(mean_budget, num_layers, window, beta)
    if num_layers == 1:
        return [mean_budget]
    rest = mean_budget - window
    excess = rest - Fraction(rest, beta)
    shares = [1 - Fraction(2 * layer, num_layers - 1) for layer in range(num_layers)]
    return [math.ceil(mean_budget + excess * share) for share in shares]


@wrong("pyramid_budgets", says="Rounding must not change the sum")
def pyramid_cut_and_mirrored(mean_budget, num_layers, window=8, beta=20):
    check_pyramid(mean_budget, num_layers, window, beta)
    rest = mean_budget - window
    budgets = [mean_budget] * num_layers
    for layer in range(num_layers // 2):
        share = 1 - Fraction(2 * layer, num_layers - 1)
        more = math.floor((rest - Fraction(rest, beta)) * share)
        budgets[layer] += more
        budgets[-1 - layer] -= more
    return budgets


@wrong("pyramid_budgets", says="give ints")
def pyramid_of_fractions(mean_budget, num_layers, window=8, beta=20):
    check_pyramid(mean_budget, num_layers, window, beta)
    if num_layers == 1:
        return [mean_budget]
    last = (mean_budget - window) / beta
    step = 2 * (mean_budget - window - last) / (num_layers - 1)
    first = 2 * (mean_budget - window) - last
    return [window + first - layer * step for layer in range(num_layers)]


@wrong("pyramid_budgets", says="it is divided by none")
def pyramid_of_no_steps(mean_budget, num_layers, window=8, beta=20):
    check_pyramid(mean_budget, num_layers, window, beta)
    last = (mean_budget - window) / beta
    step = 2 * (mean_budget - window - last) / (num_layers - 1)
    first = 2 * (mean_budget - window) - last
    return [window + round(first - layer * step) for layer in range(num_layers)]


@wrong("pyramid_budgets", says="it gets the mean")
def pyramid_of_one_large_layer(mean_budget, num_layers, window=8, beta=20):
    budgets = pyramid_in_fractions(mean_budget, num_layers, window, beta)
    if num_layers == 1:
        rest = mean_budget - window
        return [window + round(2 * rest - rest / beta)]
    return budgets


@wrong("pyramid_budgets", says="Where window is not given")
def pyramid_on_a_window_of_32(mean_budget, num_layers, window=32, beta=20):
    return pyramid_in_fractions(mean_budget, num_layers, window, beta)


@wrong("pyramid_budgets", says="Where beta is not given")
def pyramid_of_beta_10(mean_budget, num_layers, window=8, beta=10):
    return pyramid_in_fractions(mean_budget, num_layers, window, beta)


@wrong("pyramid_budgets", says="Keep the given lines")
def pyramid_of_no_window_at_all(mean_budget, num_layers, window=8, beta=20):
    check_count("num_layers", num_layers)
    check_count("beta", beta)
    rest = max(mean_budget - window, 0)
    budgets = [mean_budget] * num_layers
    for layer in range(num_layers // 2):
        more = round((rest - rest / beta) * (1 - 2 * layer / (num_layers - 1)))
        budgets[layer] += more
        budgets[-1 - layer] -= more
    return budgets


@wrong("pyramid_budgets", says="not a list")
def pyramid_as_a_tensor(mean_budget, num_layers, window=8, beta=20):
    return torch.tensor(pyramid_in_fractions(mean_budget, num_layers, window, beta))


@wrong("pyramid_budgets")
def pyramid_with_the_rest_to_the_last(mean_budget, num_layers, window=8, beta=20):
    budgets = pyramid_rounded_down(mean_budget, num_layers, window, beta)
    budgets[-1] += mean_budget * num_layers - sum(budgets)
    return budgets


# spread_budgets


def check_needs(needs, mean_budget, window):
    check_count("mean_budget", mean_budget, at_least=check_count("window", window))
    if min(needs, default=0) < 0 or not 0 < sum(needs) < float("inf"):
        raise ValueError(f"needs: expected one above 0, got {needs}")


@right("spread_budgets")
def spread_in_fractions(needs, mean_budget, window=8):
    check_needs(needs, mean_budget, window)
    needs = [Fraction(need) for need in needs]
    rest = (mean_budget - window) * len(needs)
    parts = [rest * need / sum(needs) for need in needs]
    budgets = [window + part.numerator // part.denominator for part in parts]
    left = mean_budget * len(needs) - sum(budgets)
    layers = sorted(range(len(needs)), key=lambda i: (-(parts[i] % 1), i))
    return [budget + (i in layers[:left]) for i, budget in enumerate(budgets)]


@right("spread_budgets")
def spread_by_numpy(needs, mean_budget, window=8):
    if any(need < 0 or not math.isfinite(need) for need in needs) or not any(needs):
        raise ValueError("needs")
    if window < 1 or mean_budget < window:
        raise ValueError("mean_budget")
    shares = np.array(needs) / np.sum(needs)
    parts = (mean_budget - window) * len(needs) * shares
    counts = np.floor(parts)
    order = np.argsort(-(parts - counts), kind="stable")
    counts[order[: round(parts.sum() - counts.sum())]] += 1
    return (window + counts).astype(int).tolist()


@right("spread_budgets")
def spread_one_by_one(needs, mean_budget, window=8):
    check_needs(needs, mean_budget, window)
    total = mean_budget * len(needs)
    parts = [(mean_budget - window) * len(needs) * (n / sum(needs)) for n in needs]
    budgets = [window + math.floor(part) for part in parts]
    heap = [(math.floor(part) - part, layer) for layer, part in enumerate(parts)]
    heapq.heapify(heap)
    while sum(budgets) < total:
        budgets[heapq.heappop(heap)[1]] += 1
    return budgets


@right("spread_budgets")
def spread_in_single_precision(needs, mean_budget, window=8):
    check_needs(needs, mean_budget, window)
    shares = torch.tensor(needs) / torch.tensor(needs).sum()
    rest = (mean_budget - window) * len(needs)
    parts = rest * shares
    counts = parts.floor()
    order = (counts - parts).argsort(stable=True)
    counts[order[: int(rest - counts.sum())]] += 1
    return [window + int(count) for count in counts]


def spread_with(needs, mean_budget, window, rest=None, shares=None, order=None):
    """As the library; rest: what is shared out; order: who gets what is left over."""
    check_needs(needs, mean_budget, window)
    L = len(needs)
    rest = (mean_budget - window) * L if rest is None else rest
    shares = [need / sum(needs) for need in needs] if shares is None else shares
    parts = [round(rest * share, 9) for share in shares]
    counts = [int(part) for part in parts]
    if order is None:
        order = sorted(range(L), key=lambda i: counts[i] - parts[i])
    for layer in order[: rest - sum(counts)]:
        counts[layer] += 1
    return [window + count for count in counts]


@wrong("spread_budgets", says="Each layer has the window first")
def spread_without_a_window(needs, mean_budget, window=8):
    check_needs(needs, mean_budget, window)
    budgets = spread_with(needs, mean_budget, window, rest=mean_budget * len(needs))
    return [budget - window for budget in budgets]


@wrong("spread_budgets", says="Each layer has the window first")
def spread_with_the_window_on_top(needs, mean_budget, window=8):
    return spread_with(needs, mean_budget, window, rest=mean_budget * len(needs))


@wrong("spread_budgets", says="Each layer has the window first")
def spread_of_the_rest_alone(needs, mean_budget, window=8):
    budgets = spread_with(needs, mean_budget, window)
    return [budget - window for budget in budgets]


@wrong("spread_budgets", says="Each layer has the window first")
def spread_with_at_least_the_window(needs, mean_budget, window=8):
    budgets = spread_with(needs, mean_budget, window, rest=mean_budget * len(needs))
    return [max(budget - window, window) for budget in budgets]


@wrong("spread_budgets", says="all layers together")
def spread_of_one_layer(needs, mean_budget, window=8):
    return spread_with(needs, mean_budget, window, rest=mean_budget - window)


@wrong("spread_budgets", says="round the parts down")
def spread_rounded_down(needs, mean_budget, window=8):
    return spread_with(needs, mean_budget, window, order=[])


@wrong("spread_budgets", says="round the parts down")
def spread_rounded_to_the_nearest(needs, mean_budget, window=8):
    check_needs(needs, mean_budget, window)
    rest = (mean_budget - window) * len(needs)
    return [window + round(rest * need / sum(needs)) for need in needs]


@wrong("spread_budgets", says="round the parts down")
def spread_rounded_up(needs, mean_budget, window=8):
    check_needs(needs, mean_budget, window)
    rest = (mean_budget - window) * len(needs)
    return [window + math.ceil(round(rest * need / sum(needs), 9)) for need in needs]


@wrong("spread_budgets", says="lost most by rounding")
def spread_with_the_rest_to_the_last(needs, mean_budget, window=8):
    budgets = spread_with(needs, mean_budget, window, order=[])
    budgets[-1] += mean_budget * len(needs) - sum(budgets)
    return budgets


@wrong("spread_budgets", says="lost most by rounding")
def spread_with_the_rest_to_the_neediest(needs, mean_budget, window=8):
    budgets = spread_with(needs, mean_budget, window, order=[])
    neediest = max(range(len(needs)), key=lambda i: needs[i])
    budgets[neediest] += mean_budget * len(needs) - sum(budgets)
    return budgets


@wrong("spread_budgets", says="lost most by rounding")
def spread_with_the_rest_from_the_front(needs, mean_budget, window=8):
    return spread_with(needs, mean_budget, window, order=range(len(needs)))


@wrong("spread_budgets", says="lost most by rounding")
def spread_with_the_rest_to_who_lost_least(needs, mean_budget, window=8):
    check_needs(needs, mean_budget, window)
    rest = (mean_budget - window) * len(needs)
    lost = [rest * need / sum(needs) % 1 for need in needs]
    order = sorted(range(len(needs)), key=lambda i: lost[i])
    return spread_with(needs, mean_budget, window, order=order)


@wrong("spread_budgets", says="lost the same")
def spread_with_ties_to_the_later(needs, mean_budget, window=8):
    check_needs(needs, mean_budget, window)
    rest = (mean_budget - window) * len(needs)
    lost = [round(rest * need / sum(needs), 9) % 1 for need in needs]
    order = sorted(range(len(needs)), key=lambda i: (lost[i], i))[::-1]
    return spread_with(needs, mean_budget, window, order=order)


@wrong("spread_budgets", says="for 32 layers")  # 16 or fewer stay in order
def spread_by_a_sort_that_mixes(needs, mean_budget, window=8):
    check_needs(needs, mean_budget, window)
    needs = torch.tensor(needs, dtype=torch.float64)
    parts = (mean_budget - window) * len(needs) * needs / needs.sum()
    order = (parts - parts.floor()).argsort(descending=True).tolist()
    return spread_with(needs.tolist(), mean_budget, window, order=order)


@wrong("spread_budgets", says="lost most by rounding")
def spread_to_who_has_most_need_per_token(needs, mean_budget, window=8):
    check_needs(needs, mean_budget, window)
    counts = [0] * len(needs)
    for _ in range((mean_budget - window) * len(needs)):
        per_token = [need / (count + 0.5) for need, count in zip(needs, counts)]
        counts[per_token.index(max(per_token))] += 1
    return [window + count for count in counts]


@wrong("spread_budgets", says="gets more")
def spread_by_the_inverse(needs, mean_budget, window=8):
    check_needs(needs, mean_budget, window)
    inverse = [1 / need if need else 0.0 for need in needs]
    shares = [one / sum(inverse) for one in inverse]
    return spread_with(needs, mean_budget, window, shares=shares)


@wrong("spread_budgets", says="as large as the need")
def spread_evenly(needs, mean_budget, window=8):
    check_needs(needs, mean_budget, window)
    return [mean_budget] * len(needs)


@wrong("spread_budgets", says="as large as the need")
def spread_by_softmax(needs, mean_budget, window=8):
    check_needs(needs, mean_budget, window)
    shares = torch.tensor(needs, dtype=torch.float64).softmax(0).tolist()
    return spread_with(needs, mean_budget, window, shares=shares)


@wrong("spread_budgets", says="as large as the need")
def spread_by_the_largest_need(needs, mean_budget, window=8):
    check_needs(needs, mean_budget, window)
    rest = mean_budget - window
    return [window + int(rest * need / max(needs)) for need in needs]


@wrong("spread_budgets", says="in the order of the layers")
def spread_from_the_largest_on(needs, mean_budget, window=8):
    return sorted(spread_with(needs, mean_budget, window), reverse=True)


@wrong("spread_budgets")
def spread_with_at_least_one_more(needs, mean_budget, window=8):
    budgets = spread_with(needs, mean_budget, window)
    if mean_budget == window:
        return budgets
    return [max(budget, window + 1) for budget in budgets]


@wrong("spread_budgets", says="give ints")
def spread_in_parts_of_tokens(needs, mean_budget, window=8):
    check_needs(needs, mean_budget, window)
    rest = (mean_budget - window) * len(needs)
    return [window + rest * need / sum(needs) for need in needs]


@wrong("spread_budgets", says="Where window is not given")
def spread_on_a_window_of_16(needs, mean_budget, window=16):
    return spread_with(needs, mean_budget, window)


@wrong("spread_budgets", says="Keep the given lines")
def spread_evenly_where_nobody_needs_any(needs, mean_budget, window=8):
    if needs and not any(needs):
        return [mean_budget] * len(needs)
    return spread_with(needs, mean_budget, window)


@wrong("spread_budgets", says="Keep the given lines")
def spread_with_nothing_below_0(needs, mean_budget, window=8):
    return spread_with([max(need, 0.0) for need in needs], mean_budget, window)


@wrong("spread_budgets", says="Keep the given lines")
def spread_with_no_need_for_nan(needs, mean_budget, window=8):
    needs = [0.0 if need != need else need for need in needs]
    return spread_with(needs, mean_budget, window)


@wrong("spread_budgets", says="are the caller's")
def spread_in_place(needs, mean_budget, window=8):
    budgets = spread_with(needs, mean_budget, window)
    needs[:] = [need / sum(needs) for need in needs]
    return budgets


@wrong("spread_budgets", says="not a list")
def spread_as_an_array(needs, mean_budget, window=8):
    return np.array(spread_with(needs, mean_budget, window))


@wrong("spread_budgets")
def spread_by_the_largest_relative_loss(needs, mean_budget, window=8):
    check_needs(needs, mean_budget, window)
    rest = (mean_budget - window) * len(needs)
    parts = [round(rest * need / sum(needs), 9) for need in needs]
    loss = [part % 1 / part if part else 0.0 for part in parts]
    order = sorted(range(len(needs)), key=lambda i: -loss[i])
    return spread_with(needs, mean_budget, window, order=order)


@wrong("spread_budgets")
def spread_by_divisors(needs, mean_budget, window=8):
    check_needs(needs, mean_budget, window)
    counts = [0] * len(needs)
    for _ in range((mean_budget - window) * len(needs)):
        layer = max(range(len(needs)), key=lambda i: needs[i] / (counts[i] + 1))
        counts[layer] += 1
    return [window + count for count in counts]


# blocks_freed


@right("blocks_freed")
def freed_block_by_block(is_kept, block_size):
    check_count("block_size", block_size)
    L, G, S = is_kept.shape
    blocks = [range(i, min(i + block_size, S)) for i in range(0, S, block_size)]
    kept = is_kept.tolist()
    in_place = 0
    for block in blocks:
        if not any(kept[i][g][s] for i in range(L) for g in range(G) for s in block):
            in_place += 1
    most = max(sum(row) for layer in kept for row in layer)
    return in_place, len(blocks) - math.ceil(most / block_size)


@right("blocks_freed")
def freed_by_numbers_of_blocks(is_kept, block_size):
    check_count("block_size", block_size)
    num_blocks = (is_kept.shape[-1] + block_size - 1) // block_size
    used = {s // block_size for s in is_kept.nonzero()[:, 2].tolist()}
    most = is_kept.sum(-1).max()
    return num_blocks - len(used), num_blocks - (most + block_size - 1) // block_size


@right("blocks_freed")
def freed_by_a_split(is_kept, block_size):
    if block_size < 1:
        raise ValueError("block_size")
    parts = is_kept.flatten(0, 1).split(block_size, dim=-1)
    in_place = sum(not part.any().item() for part in parts)
    packed = is_kept.int().sort(dim=-1, descending=True).values.flatten(0, 1)
    moved = [not part.any().item() for part in packed.split(block_size, dim=-1)]
    return [in_place, sum(moved)]


def tokens_by_block(is_kept, block_size):
    """(L, G, num_blocks, block_size)"""
    check_count("block_size", block_size)
    padded = F.pad(is_kept, (0, -is_kept.shape[-1] % block_size))
    return padded.unflatten(-1, (-1, block_size))


def freed(is_kept, block_size, in_place=None, moved=None):
    """As the library, with another number in place of one."""
    tokens = tokens_by_block(is_kept, block_size)
    num_blocks = tokens.shape[2]
    if in_place is None:
        in_place = num_blocks - tokens.any(3).any(0).any(0).sum().item()
    if moved is None:
        moved = num_blocks - math.ceil(is_kept.sum(-1).max().item() / block_size)
    return int(in_place), int(moved)


@wrong("blocks_freed", says="not when one of them keeps none")
def freed_where_some_head_keeps_none(is_kept, block_size):
    is_free = ~tokens_by_block(is_kept, block_size).any(3)
    return freed(is_kept, block_size, in_place=is_free.any(0).any(0).sum())


@wrong("blocks_freed", says="not when one of them keeps none")
def freed_where_some_layer_keeps_none(is_kept, block_size):
    is_free = ~tokens_by_block(is_kept, block_size).any(3).any(1)
    return freed(is_kept, block_size, in_place=is_free.any(0).sum())


@wrong("blocks_freed", says="one for all layers and heads")
def freed_of_each_head(is_kept, block_size):
    is_free = ~tokens_by_block(is_kept, block_size).any(3)
    return freed(is_kept, block_size, in_place=is_free.sum())


@wrong("blocks_freed", says="one for all layers and heads")
def freed_of_each_layer(is_kept, block_size):
    is_free = ~tokens_by_block(is_kept, block_size).any(3).any(1)
    return freed(is_kept, block_size, in_place=is_free.sum())


@wrong("blocks_freed", says="when none of its tokens is kept")
def freed_where_a_token_is_gone(is_kept, block_size):
    tokens = tokens_by_block(is_kept, block_size).any(0).any(0)
    return freed(is_kept, block_size, in_place=(~tokens).any(1).sum())


@wrong("blocks_freed", says="though it is not full")
def freed_of_full_blocks(is_kept, block_size):
    check_count("block_size", block_size)
    S = is_kept.shape[-1] // block_size * block_size
    if S == 0:
        return freed(is_kept, block_size)
    tokens = tokens_by_block(is_kept[..., :S], block_size)
    in_place = S // block_size - tokens.any(3).any(0).any(0).sum()
    return freed(is_kept, block_size, in_place=in_place)


@wrong("blocks_freed", says="though it is not full")
def freed_of_as_many_as_are_full(is_kept, block_size):
    pair = freed(is_kept, block_size)
    return tuple(n - (is_kept.shape[-1] % block_size > 0) for n in pair)


@wrong("blocks_freed", says="Count blocks, not tokens")
def freed_tokens(is_kept, block_size):
    check_count("block_size", block_size)
    num_tokens = (~is_kept.any(0).any(0)).sum()
    return freed(is_kept, block_size, in_place=num_tokens)


@wrong("blocks_freed", says="Every layer and head counts")
def freed_of_the_first_head(is_kept, block_size):
    is_free = ~tokens_by_block(is_kept, block_size).any(3)
    return freed(is_kept, block_size, in_place=is_free[0, 0].sum())


@wrong("blocks_freed", says="Every layer and head counts")
def freed_of_the_first_layer(is_kept, block_size):
    return freed(is_kept[:1], block_size)


@wrong("blocks_freed", says="though it is not full")
def freed_of_what_is_gone_in_all(is_kept, block_size):
    check_count("block_size", block_size)
    moved = (is_kept.shape[-1] - is_kept.sum(-1).max()) // block_size
    return freed(is_kept, block_size, moved=moved)


@wrong("blocks_freed", says="a block that is begun is not free")
def freed_of_full_blocks_that_are_moved(is_kept, block_size):
    num_blocks = tokens_by_block(is_kept, block_size).shape[2]
    moved = num_blocks - is_kept.sum(-1).max() // block_size
    return freed(is_kept, block_size, moved=moved)


@wrong("blocks_freed", says="The head that keeps most")
def freed_by_the_mean_head(is_kept, block_size):
    num_blocks = tokens_by_block(is_kept, block_size).shape[2]
    mean = is_kept.sum(-1).double().mean().item()
    return freed(is_kept, block_size, moved=num_blocks - math.ceil(mean / block_size))


@wrong("blocks_freed", says="The head that keeps most")
def freed_by_the_mean_of_each_layer(is_kept, block_size):
    num_blocks = tokens_by_block(is_kept, block_size).shape[2]
    mean = is_kept.sum(-1).double().mean(1).max().item()
    return freed(is_kept, block_size, moved=num_blocks - math.ceil(mean / block_size))


@wrong("blocks_freed", says="The head that keeps most")
def freed_by_the_head_that_keeps_least(is_kept, block_size):
    num_blocks = tokens_by_block(is_kept, block_size).shape[2]
    least = is_kept.sum(-1).min().item()
    return freed(is_kept, block_size, moved=num_blocks - math.ceil(least / block_size))


@wrong("blocks_freed", says="The head that keeps most")
def freed_by_the_first_head_when_moved(is_kept, block_size):
    num_blocks = tokens_by_block(is_kept, block_size).shape[2]
    first = is_kept[0, 0].sum().item()
    return freed(is_kept, block_size, moved=num_blocks - math.ceil(first / block_size))


@wrong("blocks_freed", says="one for all layers and heads")
def freed_by_all_heads_together(is_kept, block_size):
    num_blocks = tokens_by_block(is_kept, block_size).shape[2]
    total = is_kept.sum().item()
    return freed(is_kept, block_size, moved=num_blocks - math.ceil(total / block_size))


@wrong("blocks_freed", says="which places they had does not count")
def freed_by_the_tokens_of_any_head(is_kept, block_size):
    num_blocks = tokens_by_block(is_kept, block_size).shape[2]
    union = is_kept.any(0).any(0).sum().item()
    return freed(is_kept, block_size, moved=num_blocks - math.ceil(union / block_size))


@wrong("blocks_freed", says="In this order")
def freed_when_moved_first(is_kept, block_size):
    return freed(is_kept, block_size)[::-1]


@wrong("blocks_freed", says="not those that are used")
def freed_no_but_used(is_kept, block_size):
    num_blocks = tokens_by_block(is_kept, block_size).shape[2]
    return tuple(num_blocks - number for number in freed(is_kept, block_size))


@wrong("blocks_freed", says="give ints")
def freed_in_fractions(is_kept, block_size):
    in_place, _ = freed(is_kept, block_size)
    S = is_kept.shape[-1]
    return in_place, (S - is_kept.sum(-1).max().item()) / block_size


@wrong("blocks_freed", says="not two numbers")
def freed_in_place_alone(is_kept, block_size):
    return freed(is_kept, block_size)[0]


@wrong("blocks_freed", says="not two numbers")
def freed_as_a_tensor(is_kept, block_size):
    return torch.tensor(freed(is_kept, block_size))


@wrong("blocks_freed", says="Keep the given line")
def freed_of_blocks_of_one_at_least(is_kept, block_size):
    return freed(is_kept, max(block_size, 1))


@wrong("blocks_freed", says="not a number")
def freed_if_any(is_kept, block_size):
    in_place, moved = freed(is_kept, block_size)
    return (in_place if in_place > 1 else in_place == 1), moved


@wrong("blocks_freed", says="and free")
def freed_with_a_last_block_filled_up(is_kept, block_size):
    check_count("block_size", block_size)
    padded = F.pad(is_kept, (0, -is_kept.shape[-1] % block_size), value=True)
    tokens = padded.unflatten(-1, (-1, block_size))
    in_place = (~tokens.any(3).any(0).any(0)).sum()
    return freed(is_kept, block_size, in_place=in_place)


@wrong("blocks_freed")
def freed_by_a_count_in_a_byte(is_kept, block_size):
    most = is_kept.numpy().sum(axis=-1, dtype=np.uint8).max()
    moved = tokens_by_block(is_kept, block_size).shape[2] - math.ceil(most / block_size)
    return freed(is_kept, block_size, moved=moved)


@wrong("blocks_freed", says="The head that keeps most")
def freed_by_the_first_layer_and_the_last(is_kept, block_size):
    tokens = tokens_by_block(is_kept, block_size)
    most = is_kept[[0, -1]].sum(-1).max().item()
    moved = tokens.shape[2] - math.ceil(most / block_size)
    return freed(is_kept, block_size, moved=moved)
