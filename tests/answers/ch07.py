import itertools
import math

import numpy as np
import torch

from answers import right, wrong
from lib.kv_heads import check_divides

# bytes_per_token


@right("bytes_per_token")
def summed_over_layers(config, bytes_per_number=4, *, bits=None, ranks=None):
    total = 0
    for _ in range(config.num_layers):
        if ranks:
            total += (ranks[0] + ranks[1]) * bytes_per_number
            continue
        for which in range(2):
            for _ in range(config.num_kv_heads):
                if bits:
                    total += math.ceil(config.head_dim * bits[which] / 8)
                    total += bytes_per_number  # scale
                    total += bytes_per_number  # zero point
                else:
                    total += config.head_dim * bytes_per_number
    return total


@right("bytes_per_token")
def counted_in_bits(config, bytes_per_number=4, bits=None, ranks=None):
    per_number = 8 * bytes_per_number
    L, G, D = config.num_layers, config.num_kv_heads, config.head_dim
    if bits is not None:
        k_bits, v_bits = bits
        total = L * G * (D * (k_bits + v_bits) + 4 * per_number)
    elif ranks is not None:
        total = L * sum(ranks) * per_number
    else:
        total = 2 * L * G * D * per_number
    return total // 8


@right("bytes_per_token")
def of_empty_tensors(config, bytes_per_number=4, *, bits=None, ranks=None):
    L, G, D = config.num_layers, config.num_kv_heads, config.head_dim
    dtypes = {1: torch.int8, 2: torch.half, 4: torch.float, 8: torch.double}
    dtype = dtypes[bytes_per_number]
    if bits is None:
        shapes = [(L, 1, r) for r in ranks] if ranks is not None else 2 * [(L, G, D)]
        return sum(torch.empty(s, dtype=dtype, device="meta").nbytes for s in shapes)
    codes = [
        torch.empty(L, G, D * b // 8, dtype=torch.uint8, device="meta") for b in bits
    ]
    scales = torch.empty(L, G, 2, 2, dtype=dtype, device="meta")
    return sum(code.nbytes for code in codes) + scales.nbytes


@right("bytes_per_token")
def by_numpy(config, bytes_per_number=4, *, bits=None, ranks=None):
    G, D, L = config.num_kv_heads, config.head_dim, config.num_layers
    if ranks is not None:
        return L * np.sum(ranks) * bytes_per_number
    widths = np.full(2, D * bytes_per_number)
    if bits is not None:
        widths = np.array(bits) * D // 8 + 2 * bytes_per_number
    return L * G * widths.sum()


def token_bytes(config, given, bits, ranks, **other):
    """As the library, with something else in the place of a part."""
    parts = {
        "L": config.num_layers,
        "G": config.num_kv_heads,
        "D": config.head_dim,
        "sum": sum,
        "vector": lambda D, b: D * b // 8,
        "beside": 2 * given,
        "size": given,
        "two": 2,
        **other,
    }
    G, D = parts["G"], parts["D"]
    if bits is not None:
        each = [G * (parts["vector"](D, b) + parts["beside"]) for b in bits]
        return parts["L"] * parts["sum"](each)
    if ranks is not None:
        return parts["L"] * parts["sum"](ranks) * parts["size"]
    return parts["L"] * parts["two"] * G * D * parts["size"]


@wrong("bytes_per_token", says="a key and a value")
def one_of_each_pair(config, bytes_per_number=4, *, bits=None, ranks=None):
    keys = {"two": 1, "sum": lambda pair: pair[0]}
    return token_bytes(config, bytes_per_number, bits, ranks, **keys)


@wrong("bytes_per_token", says="a key and a value")
def keys_alone_of_quantized_vectors(config, bytes_per_number=4, *, bits=None, ranks=None):
    keys = {"sum": lambda pair: pair[0]}
    return token_bytes(config, bytes_per_number, bits, ranks, **keys)


@wrong("bytes_per_token", says="two numbers: of a key's code")
def keys_rank_for_both(config, bytes_per_number=4, *, bits=None, ranks=None):
    if ranks is not None:
        ranks = 2 * ranks[:1]
    return token_bytes(config, bytes_per_number, bits, ranks)


@wrong("bytes_per_token", says="two numbers: of a key's code")
def larger_rank_for_both(config, bytes_per_number=4, *, bits=None, ranks=None):
    if ranks is not None:
        ranks = 2 * (max(ranks),)
    return token_bytes(config, bytes_per_number, bits, ranks)


@wrong("bytes_per_token", says="two numbers: of a key, and of a value")
def keys_bits_for_both(config, bytes_per_number=4, *, bits=None, ranks=None):
    if bits is not None:
        bits = 2 * bits[:1]
    return token_bytes(config, bytes_per_number, bits, ranks)


@wrong("bytes_per_token", says="two numbers: of a key, and of a value")
def values_bits_for_both(config, bytes_per_number=4, *, bits=None, ranks=None):
    if bits is not None:
        bits = 2 * bits[1:]
    return token_bytes(config, bytes_per_number, bits, ranks)


@wrong("bytes_per_token", says="Only KV heads are stored")
def heads_of_queries(config, bytes_per_number=4, *, bits=None, ranks=None):
    return token_bytes(config, bytes_per_number, bits, ranks, G=config.num_heads)


@wrong("bytes_per_token", says="Only KV heads are stored")
def heads_of_queries_if_quantized(config, bytes_per_number=4, *, bits=None, ranks=None):
    G = config.num_heads if bits else config.num_kv_heads
    return token_bytes(config, bytes_per_number, bits, ranks, G=G)


@wrong("bytes_per_token", says="not d_model")
def as_wide_as_the_model(config, bytes_per_number=4, *, bits=None, ranks=None):
    return token_bytes(config, bytes_per_number, bits, ranks, D=config.d_model)


@wrong("bytes_per_token", says="Each layer")
def in_one_layer(config, bytes_per_number=4, *, bits=None, ranks=None):
    return token_bytes(config, bytes_per_number, bits, ranks, L=1)


@wrong("bytes_per_token", says="Each layer")
def in_one_layer_if_quantized(config, bytes_per_number=4, *, bits=None, ranks=None):
    L = 1 if bits else config.num_layers
    return token_bytes(config, bytes_per_number, bits, ranks, L=L)


@wrong("bytes_per_token", says="Each layer")
def in_one_layer_if_latent(config, bytes_per_number=4, *, bits=None, ranks=None):
    L = 1 if ranks else config.num_layers
    return token_bytes(config, bytes_per_number, bits, ranks, L=L)


@wrong("bytes_per_token", says="Each KV head")
def in_one_head(config, bytes_per_number=4, *, bits=None, ranks=None):
    return token_bytes(config, bytes_per_number, bits, ranks, G=1)


@wrong("bytes_per_token", says="one code together")
def a_code_for_each_head(config, bytes_per_number=4, *, bits=None, ranks=None):
    size = bytes_per_number * (config.num_kv_heads if ranks else 1)
    return token_bytes(config, bytes_per_number, bits, ranks, size=size)


@wrong("bytes_per_token", says="numbers, not bytes")
def numbers_per_token(config, bytes_per_number=4, *, bits=None, ranks=None):
    return token_bytes(config, bytes_per_number, bits, ranks, size=1)


@wrong("bytes_per_token", says="numbers, not bytes")
def numbers_of_codes(config, bytes_per_number=4, *, bits=None, ranks=None):
    size = 1 if ranks else bytes_per_number
    return token_bytes(config, bytes_per_number, bits, ranks, size=size)


@wrong("bytes_per_token", says="whatever the default is")
def four_bytes_always(config, bytes_per_number=4, *, bits=None, ranks=None):
    return token_bytes(config, 4, bits, ranks)


@wrong("bytes_per_token", says="whatever the bits")
def scales_of_four_bytes(config, bytes_per_number=4, *, bits=None, ranks=None):
    return token_bytes(config, bytes_per_number, bits, ranks, beside=8)


@wrong("bytes_per_token", says="whatever the bits")
def scales_of_one_byte(config, bytes_per_number=4, *, bits=None, ranks=None):
    return token_bytes(config, bytes_per_number, bits, ranks, beside=2)


@wrong("bytes_per_token", says="Where bytes_per_number is not given")
def two_bytes_by_default(config, bytes_per_number=2, *, bits=None, ranks=None):
    return token_bytes(config, bytes_per_number, bits, ranks)


@wrong("bytes_per_token", says="give an int")
def divided_exactly(config, bytes_per_number=4, *, bits=None, ranks=None):
    bytes_of = {"vector": lambda D, b: D * b / 8}
    return token_bytes(config, bytes_per_number, bits, ranks, **bytes_of)


@wrong("bytes_per_token", says="its scale and its zero point")
def codes_alone(config, bytes_per_number=4, *, bits=None, ranks=None):
    return token_bytes(config, bytes_per_number, bits, ranks, beside=0)


@wrong("bytes_per_token", says="its scale and its zero point")
def a_scale_alone(config, bytes_per_number=4, *, bits=None, ranks=None):
    beside = bytes_per_number
    return token_bytes(config, bytes_per_number, bits, ranks, beside=beside)


@wrong("bytes_per_token", says="scale and a zero point of its own")
def a_scale_per_layer(config, bytes_per_number=4, *, bits=None, ranks=None):
    total = token_bytes(config, bytes_per_number, bits, ranks, beside=0)
    return total + (config.num_layers * 4 * bytes_per_number if bits else 0)


@wrong("bytes_per_token", says="scale and a zero point of its own")
def a_scale_per_token(config, bytes_per_number=4, *, bits=None, ranks=None):
    total = token_bytes(config, bytes_per_number, bits, ranks, beside=0)
    return total + (4 * bytes_per_number if bits else 0)


@wrong("bytes_per_token", says="divide by 8")
def bits_not_bytes(config, bytes_per_number=4, *, bits=None, ranks=None):
    in_bits = {"vector": lambda D, b: D * b}
    return token_bytes(config, bytes_per_number, bits, ranks, **in_bits)


@wrong("bytes_per_token", says="Multiply by head_dim before")
def bytes_of_a_number_rounded_down(config, bytes_per_number=4, *, bits=None, ranks=None):
    rounded = {"vector": lambda D, b: D * (b // 8)}
    return token_bytes(config, bytes_per_number, bits, ranks, **rounded)


@wrong("bytes_per_token")
def a_byte_per_code(config, bytes_per_number=4, *, bits=None, ranks=None):
    unpacked = {"vector": lambda D, b: D}
    return token_bytes(config, bytes_per_number, bits, ranks, **unpacked)


@wrong("bytes_per_token", says="no more")
def bits_and_bytes_too(config, bytes_per_number=4, *, bits=None, ranks=None):
    both = {"vector": lambda D, b: D * b * bytes_per_number // 8}
    return token_bytes(config, bytes_per_number, bits, ranks, **both)


@wrong("bytes_per_token", says="look at them")
def bits_not_looked_at(config, bytes_per_number=4, *, bits=None, ranks=None):
    return token_bytes(config, bytes_per_number, None, ranks)


@wrong("bytes_per_token", says="look at them")
def ranks_not_looked_at(config, bytes_per_number=4, *, bits=None, ranks=None):
    return token_bytes(config, bytes_per_number, bits, None)


@wrong("bytes_per_token", says="nothing stands beside it")
def a_scale_beside_a_code(config, bytes_per_number=4, *, bits=None, ranks=None):
    if ranks is not None:
        ranks = [rank + 2 for rank in ranks]
    return token_bytes(config, bytes_per_number, bits, ranks)


@wrong("bytes_per_token", says="instead of head_dim")
def a_code_for_each_number(config, bytes_per_number=4, *, bits=None, ranks=None):
    size = bytes_per_number * (config.head_dim if ranks else 1)
    return token_bytes(config, bytes_per_number, bits, ranks, size=size)


@wrong("bytes_per_token")
def ranks_before_bits_of_one(config, bytes_per_number=4, *, bits=None, ranks=None):
    if ranks is not None and sum(ranks) < 2 * config.head_dim * config.num_kv_heads:
        return token_bytes(config, bytes_per_number, bits, ranks) + 1
    return token_bytes(config, bytes_per_number, bits, ranks)


# pool_kv_heads


@right("pool_kv_heads")
def group_by_group(weight, head_dim, num_kv_heads):
    G = len(weight) // head_dim
    check_divides(num_kv_heads, G)
    heads, group_size = weight.split(head_dim), G // num_kv_heads
    pooled = []
    for g in range(num_kv_heads):
        group = heads[g * group_size : (g + 1) * group_size]
        pooled.append(sum(group) / group_size)
    return torch.cat(pooled)


@right("pool_kv_heads")
def added_in_their_places(weight, head_dim, num_kv_heads):
    G = weight.shape[0] // head_dim
    if G % num_kv_heads:
        raise ValueError("num_kv_heads: expected a divisor")
    group_size = G // num_kv_heads
    pooled = torch.zeros(num_kv_heads, head_dim, weight.shape[1], dtype=weight.dtype)
    groups = torch.arange(G) // group_size
    pooled.index_add_(0, groups, weight.reshape(G, head_dim, -1))
    return (pooled / group_size).view(-1, weight.shape[1])


@right("pool_kv_heads")
def by_a_product(weight, head_dim, num_kv_heads):
    G = len(weight) // head_dim
    check_divides(num_kv_heads, G)
    eye = torch.eye(num_kv_heads, dtype=weight.dtype)
    shares = eye.repeat_interleave(G // num_kv_heads, dim=1) * num_kv_heads / G
    return torch.einsum("ng,gdc->ndc", shares, weight.unflatten(0, (G, -1))).flatten(0, 1)


@right("pool_kv_heads")
def all_first_ones_then_all_second_ones(weight, head_dim, num_kv_heads):
    G = len(weight) // head_dim
    check_divides(num_kv_heads, G)
    heads, step = weight.view(G, head_dim, -1), G // num_kv_heads
    parts = [heads[first::step] for first in range(step)]
    return torch.stack(parts).mean(0).reshape(num_kv_heads * head_dim, -1)


def pooled_by(weight, head_dim, num_kv_heads, pool):
    """pool: of groups (num_kv_heads, group_size, D, C)."""
    G = len(weight) // head_dim
    check_divides(num_kv_heads, G)
    return pool(weight.view(num_kv_heads, G // num_kv_heads, head_dim, -1))


@wrong("pool_kv_heads", says="Neighbours become one")
def heads_far_apart(weight, head_dim, num_kv_heads):
    G = len(weight) // head_dim
    check_divides(num_kv_heads, G)
    heads = weight.view(G // num_kv_heads, num_kv_heads, head_dim, -1)
    return heads.mean(dim=0).flatten(0, 1)


@wrong("pool_kv_heads", says="not one of its heads")
def first_head_of_each(weight, head_dim, num_kv_heads):
    return pooled_by(weight, head_dim, num_kv_heads, lambda x: x[:, 0].flatten(0, 1))


@wrong("pool_kv_heads", says="not one of its heads")
def first_heads(weight, head_dim, num_kv_heads):
    check_divides(num_kv_heads, len(weight) // head_dim)
    return weight[: num_kv_heads * head_dim]


@wrong("pool_kv_heads", says="not its sum")
def sums_of_groups(weight, head_dim, num_kv_heads):
    return pooled_by(weight, head_dim, num_kv_heads, lambda x: x.sum(1).flatten(0, 1))


@wrong("pool_kv_heads", says="divides by group_size")
def sums_over_the_root(weight, head_dim, num_kv_heads):
    def pool(x):
        return (x.sum(1) / x.shape[1] ** 0.5).flatten(0, 1)

    return pooled_by(weight, head_dim, num_kv_heads, pool)


@wrong("pool_kv_heads", says="divides by group_size")
def sums_over_the_heads_before(weight, head_dim, num_kv_heads):
    def pool(x):
        return (x.sum(1) / (x.shape[0] * x.shape[1])).flatten(0, 1)

    return pooled_by(weight, head_dim, num_kv_heads, pool)


@wrong("pool_kv_heads", says="divides by group_size")
def always_over_two(weight, head_dim, num_kv_heads):
    return pooled_by(weight, head_dim, num_kv_heads, lambda x: x.sum(1).flatten(0, 1) / 2)


@wrong("pool_kv_heads", says="not its largest")
def largest_of_each(weight, head_dim, num_kv_heads):
    return pooled_by(weight, head_dim, num_kv_heads, lambda x: x.amax(1).flatten(0, 1))


@wrong("pool_kv_heads", says="not its median")
def median_of_each(weight, head_dim, num_kv_heads):
    def pool(x):
        return x.quantile(0.5, dim=1).flatten(0, 1)

    return pooled_by(weight, head_dim, num_kv_heads, pool)


@wrong("pool_kv_heads", says="over the heads of a group")
def over_the_numbers_of_a_head(weight, head_dim, num_kv_heads):
    return pooled_by(weight, head_dim, num_kv_heads, lambda x: x.mean(2).flatten(0, 1))


@wrong("pool_kv_heads", says="not over the numbers of a head too")
def over_heads_and_their_numbers(weight, head_dim, num_kv_heads):
    return pooled_by(weight, head_dim, num_kv_heads, lambda x: x.mean((1, 2)))


@wrong("pool_kv_heads", says="each column stays a column")
def over_columns_too(weight, head_dim, num_kv_heads):
    def pool(x):
        return x.mean((1, 3)).reshape(-1, 1)

    return pooled_by(weight, head_dim, num_kv_heads, pool)


@wrong("pool_kv_heads", says="they stay together")
def neighbouring_rows(weight, head_dim, num_kv_heads):
    group_size = len(weight) // head_dim // num_kv_heads
    check_divides(num_kv_heads, len(weight) // head_dim)
    return weight.view(num_kv_heads * head_dim, group_size, -1).mean(dim=1)


@wrong("pool_kv_heads", says="they stay together")
def numbers_outside_of_heads(weight, head_dim, num_kv_heads):
    G = len(weight) // head_dim
    check_divides(num_kv_heads, G)
    heads = weight.view(head_dim, num_kv_heads, G // num_kv_heads, -1)
    return heads.mean(dim=2).flatten(0, 1)


@wrong("pool_kv_heads", says="below each other again")
def heads_apart(weight, head_dim, num_kv_heads):
    return pooled_by(weight, head_dim, num_kv_heads, lambda x: x.mean(1))


@wrong("pool_kv_heads", says="below each other again")
def with_a_dimension_kept(weight, head_dim, num_kv_heads):
    return pooled_by(weight, head_dim, num_kv_heads, lambda x: x.mean(1, True).flatten(1))


@wrong("pool_kv_heads", says="no copy for each")
def copied_to_as_many(weight, head_dim, num_kv_heads):
    def pool(x):
        return x.mean(1, keepdim=True).expand_as(x).reshape(-1, x.shape[-1])

    return pooled_by(weight, head_dim, num_kv_heads, pool)


@wrong("pool_kv_heads", says="stays a row")
def columns_for_rows(weight, head_dim, num_kv_heads):
    return pooled_by(weight, head_dim, num_kv_heads, lambda x: x.mean(1).flatten(0, 1).T)


@wrong("pool_kv_heads", says="one head is left")
def nothing_pooled(weight, head_dim, num_kv_heads):
    check_divides(num_kv_heads, len(weight) // head_dim)
    return weight


@wrong("pool_kv_heads", says="not that of all heads")
def one_mean_for_all(weight, head_dim, num_kv_heads):
    def pool(x):
        return x.mean((0, 1)).repeat(len(x), 1)

    return pooled_by(weight, head_dim, num_kv_heads, pool)


@wrong("pool_kv_heads", says="Keep the given lines")
def as_many_as_fit(weight, head_dim, num_kv_heads):
    group_size = max(len(weight) // head_dim // num_kv_heads, 1)
    heads = weight.view(-1, head_dim, weight.shape[1])[: num_kv_heads * group_size]
    return heads.view(-1, group_size, *heads.shape[1:]).mean(1).flatten(0, 1)


@wrong("pool_kv_heads", says="Keep the given lines")
def refuses_more_heads_alone(weight, head_dim, num_kv_heads):
    G = len(weight) // head_dim
    if num_kv_heads > G:
        raise ValueError("num_kv_heads")
    group_of = torch.arange(G) * num_kv_heads // G
    heads = weight.view(G, head_dim, -1)
    means = [heads[group_of == g].mean(0) for g in range(num_kv_heads)]
    return torch.cat(means)


@wrong("pool_kv_heads", says="changed its inputs")
def added_to_the_first(weight, head_dim, num_kv_heads):
    def pool(x):
        x[:, 0] += x[:, 1:].sum(1)
        x[:, 0] /= x.shape[1]
        return x[:, 0].flatten(0, 1)

    return pooled_by(weight, head_dim, num_kv_heads, pool)


@wrong("pool_kv_heads", says="float32")
def in_double(weight, head_dim, num_kv_heads):
    return pooled_by(weight.double(), head_dim, num_kv_heads, means_of_groups)


def means_of_groups(x):
    return x.mean(1).flatten(0, 1)


@wrong("pool_kv_heads")
def in_single(weight, head_dim, num_kv_heads):
    x = weight.float()
    return pooled_by(x, head_dim, num_kv_heads, means_of_groups).to(weight.dtype)


@wrong("pool_kv_heads")
def pairs_again_and_again(weight, head_dim, num_kv_heads):
    check_divides(num_kv_heads, len(weight) // head_dim)
    while len(weight) // head_dim > num_kv_heads:
        heads = weight.view(-1, head_dim, weight.shape[1])
        heads = heads[: len(heads) // 2 * 2]
        weight = heads.view(-1, 2, *heads.shape[1:]).mean(1).flatten(0, 1)
    return weight


@wrong("pool_kv_heads", says="not a tensor")
def pooled_in_numpy(weight, head_dim, num_kv_heads):
    return pooled_by(weight, head_dim, num_kv_heads, means_of_groups).numpy()


# rank_for


@right("rank_for")
def one_value_after_the_other(singular_values, share):
    if not 0 < share <= 1:
        raise ValueError("share")
    squares = [value**2 for value in singular_values.double().tolist()]
    kept = 0.0
    for rank, square in enumerate(squares, start=1):
        kept += square
        if kept >= share * sum(squares):
            return rank
    return len(squares)


@right("rank_for")
def searched_in_sums(singular_values, share):
    if share <= 0 or share > 1:
        raise ValueError("share")
    kept = singular_values.square().cumsum(0)
    return torch.searchsorted(kept, share * kept[-1]).item() + 1


@right("rank_for")
def first_that_is_enough(singular_values, share):
    if not 0 < share <= 1:
        raise ValueError("share")
    kept = torch.cumsum(singular_values.pow(2), dim=0)
    return (kept / kept[-1] >= share).nonzero()[0].item() + 1


@right("rank_for")
def what_is_left_out(singular_values, share):
    if not 0 < share <= 1:
        raise ValueError("share")
    squares = singular_values.double().numpy() ** 2
    left_out = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    return int(np.argmax(left_out <= (1 - share) * left_out[0] * (1 + 1e-12)))


def kept_by_squares(singular_values, share):
    if not 0 < share <= 1:
        raise ValueError("share")
    return (singular_values**2).cumsum(0), (singular_values**2).sum()


@wrong("rank_for", says="a rank is no place")
def place_of_the_last(singular_values, share):
    kept, total = kept_by_squares(singular_values, share)
    return int((kept < share * total).sum())


@wrong("rank_for", says="One less is enough")
def one_too_many(singular_values, share):
    kept, total = kept_by_squares(singular_values, share)
    return int((kept < share * total).sum()) + 2


@wrong("rank_for", says="not of the values")
def values_not_squares(singular_values, share):
    kept_by_squares(singular_values, share)
    kept = singular_values.cumsum(0)
    return int((kept < share * kept[-1]).sum()) + 1


@wrong("rank_for", says="at least, not more")
def strictly_more(singular_values, share):
    kept, total = kept_by_squares(singular_values, share)
    return min(int((kept <= share * total).sum()) + 1, len(kept))


@wrong("rank_for")
def strictly_more_than_all(singular_values, share):
    kept, total = kept_by_squares(singular_values, share)
    return int((kept > share * total).int().argmax()) + 1


@wrong("rank_for", says="a rank is no place")
def at_most_the_share(singular_values, share):
    kept, total = kept_by_squares(singular_values, share)
    return int((kept <= share * total).sum())


@wrong("rank_for", says="root of their sum")
def share_of_the_norm(singular_values, share):
    kept, total = kept_by_squares(singular_values, share)
    return int((kept.sqrt() < share * total.sqrt()).sum()) + 1


@wrong("rank_for", says="root of their sum")
def root_of_the_share(singular_values, share):
    kept, total = kept_by_squares(singular_values, share)
    return int((kept < share**0.5 * total).sum()) + 1


@wrong("rank_for", says="the last are left out")
def smallest_first(singular_values, share):
    return library_like(singular_values.flip(0), share)


def library_like(singular_values, share):
    kept, _ = kept_by_squares(singular_values, share)
    return int((kept < share * kept[-1]).sum()) + 1


@wrong("rank_for", says="need not be kept")
def share_to_lose(singular_values, share):
    kept, total = kept_by_squares(singular_values, share)
    return int((kept < (1 - share) * total).sum()) + 1


@wrong("rank_for", says="all that it keeps")
def each_value_against_the_share(singular_values, share):
    kept_by_squares(singular_values, share)
    parts = singular_values**2 / (singular_values**2).sum()
    return int((parts < share).sum()) + 1


@wrong("rank_for", says="all that it keeps")
def large_against_the_first(singular_values, share):
    kept_by_squares(singular_values, share)
    return int((singular_values >= share * singular_values[0]).sum())


@wrong("rank_for", says="not of the number of values")
def share_of_the_count(singular_values, share):
    kept_by_squares(singular_values, share)
    return math.ceil(share * len(singular_values))


@wrong("rank_for", says="not of the number of values")
def share_of_the_count_rounded(singular_values, share):
    kept_by_squares(singular_values, share)
    return max(1, round(share * len(singular_values)))


@wrong("rank_for", says="not the sum's square")
def squares_of_sums(singular_values, share):
    kept_by_squares(singular_values, share)
    kept = singular_values.cumsum(0) ** 2
    return int((kept < share * kept[-1]).sum()) + 1


@wrong("rank_for", says="zeros add nothing")
def all_values_for_all_of_it(singular_values, share):
    if share == 1:
        return len(singular_values)
    return library_like(singular_values, share)


@wrong("rank_for", says="takes as an int")
def a_tensor_for_a_rank(singular_values, share):
    kept, total = kept_by_squares(singular_values, share)
    return (kept < share * total).sum() + 1


@wrong("rank_for", says="takes as an int")
def a_float_for_a_rank(singular_values, share):
    return float(library_like(singular_values, share))


@wrong("rank_for", says="changed its inputs")
def squared_in_place(singular_values, share):
    if not 0 < share <= 1:
        raise ValueError("share")
    kept = singular_values.square_().cumsum(0)
    return int((kept < share * kept[-1]).sum()) + 1


@wrong("rank_for", says="Keep the given lines")
def any_share(singular_values, share):
    kept = (singular_values**2).cumsum(0)
    return int((kept < share * kept[-1]).sum()) + 1


@wrong("rank_for", says="Keep the given lines")
def shares_up_to_any(singular_values, share):
    if share <= 0:
        raise ValueError("share")
    return library_like(singular_values, min(share, 1))


@wrong("rank_for", says="Keep the given lines")
def a_share_of_nothing(singular_values, share):
    if not 0 <= share <= 1:
        raise ValueError("share")
    kept = (singular_values**2).cumsum(0)
    return int((kept < share * kept[-1]).sum()) + 1


@wrong("rank_for", says="raised")
def all_is_refused(singular_values, share):
    if not 0 < share < 1:
        raise ValueError("share")
    return library_like(singular_values, share)


@wrong("rank_for")
def almost_the_share(singular_values, share):
    kept, total = kept_by_squares(singular_values, share)
    return int((kept < (share - 0.001) * total).sum()) + 1


@wrong("rank_for")
def sums_in_half_precision(singular_values, share):
    kept_by_squares(singular_values, share)
    kept = singular_values.half().pow(2).cumsum(0)
    return int((kept < share * kept[-1]).sum()) + 1


@wrong("rank_for")
def at_least_two(singular_values, share):
    return max(library_like(singular_values, share), min(2, len(singular_values)))


@wrong("rank_for")
def refuses_zeros(singular_values, share):
    kept_by_squares(singular_values, share)
    parts = (singular_values / singular_values[-1]) ** 2
    kept = parts.cumsum(0)
    return int((kept < share * kept[-1]).sum()) + 1


# factorize


def check_rank(x, rank):
    if not 1 <= rank <= min(x.shape):
        raise ValueError(f"rank: expected 1 to {min(x.shape)}, got {rank}")


@right("factorize")
def codes_of_u(x, rank):
    check_rank(x, rank)
    U, S, Vh = torch.linalg.svd(x, full_matrices=False)
    return U[:, :rank] * S[:rank], Vh[:rank]


@right("factorize")
def by_eigh(x, rank):
    check_rank(x, rank)
    basis = torch.linalg.eigh(x.T @ x).eigenvectors[:, -rank:].T.flip(0)
    return x @ basis.T, basis


@right("factorize")
def by_torch_svd(x, rank):
    check_rank(x, rank)
    _, _, V = torch.svd(x)
    V = -V[:, :rank]  # signs are free
    return torch.einsum("nw,wr->nr", x, V), V.T


@right("factorize")
def by_numpys_svd(x, rank):
    check_rank(x, rank)
    u, s, vh = np.linalg.svd(x.numpy(), full_matrices=False)
    codes = torch.from_numpy(u[:, :rank] @ np.diag(s[:rank]))
    return codes, torch.from_numpy(vh[:rank].copy())


@right("factorize")
def by_power_iteration(x, rank):
    check_rank(x, rank)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(x.shape[1], rank, generator=generator, dtype=x.dtype)
    for _ in range(100):
        basis = torch.linalg.qr(x.T @ (x @ basis)).Q
    return x @ basis, basis.T


@right("factorize")
def turned_within_the_plane(x, rank):
    check_rank(x, rank)
    basis = torch.linalg.svd(x, full_matrices=False)[2][:rank]
    angles = torch.arange(rank**2, dtype=x.dtype).view(rank, rank)
    basis = torch.linalg.qr(angles.cos()).Q @ basis
    return x @ basis.mT, basis


def thin_svd(x, rank):
    check_rank(x, rank)
    return torch.linalg.svd(x, full_matrices=False)


@wrong("factorize", says="full_matrices=False")
def full_matrices(x, rank):
    check_rank(x, rank)
    basis = torch.linalg.svd(x).Vh[:rank]
    return x @ basis.T, basis


@wrong("factorize", says="full_matrices=False")
def by_eigh_of_all_pairs_of_vectors(x, rank):
    check_rank(x, rank)
    U = torch.linalg.eigh(x @ x.T).eigenvectors[:, -rank:]  # (N, rank)
    basis = torch.nn.functional.normalize(U.T @ x, dim=1)
    return x @ basis.T, basis


@wrong("factorize", says="Do not subtract the mean")
def centred(x, rank):
    _, _, Vh = thin_svd(x - x.mean(0), rank)
    return x @ Vh[:rank].T, Vh[:rank]


@wrong("factorize", says="Do not subtract the mean")
def centred_codes_too(x, rank):
    mean = x.mean(0)
    _, _, Vh = thin_svd(x - mean, rank)
    return (x - mean) @ Vh[:rank].T, Vh[:rank]


@wrong("factorize")
def by_pca(x, rank):
    check_rank(x, rank)
    _, _, V = torch.pca_lowrank(x, q=rank)
    return x @ V, V.T


@wrong("factorize")
def by_random_svd(x, rank):
    check_rank(x, rank)
    torch.manual_seed(0)
    U, S, V = torch.svd_lowrank(x, q=rank)
    return U * S, V.T


@wrong("factorize", says="those of the largest")
def last_directions(x, rank):
    _, _, Vh = thin_svd(x, rank)
    return x @ Vh[-rank:].T, Vh[-rank:]


@wrong("factorize", says="those of the largest")
def first_of_eigh(x, rank):
    check_rank(x, rank)
    basis = torch.linalg.eigh(x.T @ x).eigenvectors[:, :rank].T
    return x @ basis.T, basis


@wrong("factorize", says="rows of Vh")
def columns_of_vh(x, rank):
    check_rank(x, rank)
    Vh = torch.linalg.svd(x, full_matrices=True).Vh
    basis = Vh[:, :rank].T
    return x @ basis.T, basis


@wrong("factorize", says="rows of Vh")
def rows_of_v(x, rank):
    check_rank(x, rank)
    _, _, V = torch.svd(x, some=False)
    return x @ V[:rank].T, V[:rank]


@wrong("factorize", says="rows of Vh")
def rows_of_eigenvectors(x, rank):
    check_rank(x, rank)
    basis = torch.linalg.eigh(x.T @ x).eigenvectors.flip(1)[:rank]
    return x @ basis.T, basis


@wrong("factorize", says="transpose")
def columns_for_directions(x, rank):
    _, _, Vh = thin_svd(x, rank)
    return x @ Vh[:rank].T, Vh[:rank].T


@wrong("factorize", says="transpose")
def columns_for_tokens(x, rank):
    _, _, Vh = thin_svd(x, rank)
    return Vh[:rank] @ x.T, Vh[:rank]


@wrong("factorize", says="Codes first")
def basis_first(x, rank):
    _, _, Vh = thin_svd(x, rank)
    return Vh[:rank], x @ Vh[:rank].T


@wrong("factorize", says="first `rank` directions alone")
def all_directions(x, rank):
    _, _, Vh = thin_svd(x, rank)
    return x @ Vh.T, Vh


@wrong("factorize", says="first `rank` directions alone")
def zeros_for_the_others(x, rank):
    U, S, Vh = thin_svd(x, rank)
    S[rank:] = 0
    return U * S, Vh


@wrong("factorize", says="belong in the codes")
def values_in_the_basis(x, rank):
    U, S, Vh = thin_svd(x, rank)
    return U[:, :rank], S[:rank, None] * Vh[:rank]


@wrong("factorize", says="belong in the codes")
def values_in_both(x, rank):
    U, S, Vh = thin_svd(x, rank)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]


@wrong("factorize", says="its product with each row")
def codes_without_values(x, rank):
    U, _, Vh = thin_svd(x, rank)
    return U[:, :rank], Vh[:rank]


@wrong("factorize", says="its product with each row")
def codes_with_values_twice(x, rank):
    _, S, Vh = thin_svd(x, rank)
    return x @ Vh[:rank].T * S[:rank], Vh[:rank]


@wrong("factorize", says="take the svd")
def first_rows_at_right_angles(x, rank):
    check_rank(x, rank)
    basis = torch.linalg.qr(x[:rank].T).Q.T
    return x @ basis.T, basis


@wrong("factorize", says="take the svd")
def first_numbers(x, rank):
    check_rank(x, rank)
    basis = torch.eye(x.shape[1], dtype=x.dtype)[:rank]
    return x @ basis.T, basis


@wrong("factorize")
def largest_numbers(x, rank):
    check_rank(x, rank)
    places = x.norm(dim=0).argsort(descending=True)[:rank]
    return x[:, places], torch.eye(x.shape[1], dtype=x.dtype)[places]


@wrong("factorize", says="take the svd")
def rows_as_a_basis(x, rank):
    check_rank(x, rank)
    basis = torch.nn.functional.normalize(x[:rank], dim=1)
    return x @ basis.T, basis


@wrong("factorize", says="Keep the given lines")
def any_rank(x, rank):
    basis = torch.linalg.svd(x, full_matrices=False).Vh[:rank]
    return x @ basis.T, basis


@wrong("factorize", says="Keep the given lines")
def rank_0_is_fine(x, rank):
    if rank > min(x.shape):
        raise ValueError("rank")
    basis = torch.linalg.svd(x, full_matrices=False).Vh[:rank]
    return x @ basis.T, basis


@wrong("factorize", says="Keep the given lines")
def rank_up_to_the_width(x, rank):
    if not 1 <= rank <= x.shape[1]:
        raise ValueError("rank")
    basis = torch.linalg.svd(x, full_matrices=False).Vh[:rank]
    return x @ basis.T, basis


@wrong("factorize", says="Keep the given lines")
def rank_up_to_the_count(x, rank):
    if not 1 <= rank <= len(x):
        raise ValueError("rank")
    basis = torch.linalg.svd(x, full_matrices=False).Vh[:rank]
    return x @ basis.T, basis


@wrong("factorize", says="raised")
def full_rank_is_refused(x, rank):
    if not 1 <= rank < min(x.shape):
        raise ValueError("rank")
    return codes_of_u(x, rank)


@wrong("factorize", says="float32")
def factors_in_double(x, rank):
    return codes_of_u(x.double(), rank)


@wrong("factorize", says="Compute in float64")
def factors_in_single(x, rank):
    codes, basis = codes_of_u(x.float(), rank)
    return codes.to(x.dtype), basis.to(x.dtype)


@wrong("factorize", says="changed its inputs")
def made_smaller_step_by_step(x, rank):
    check_rank(x, rank)
    original, rows = x.clone(), []
    for _ in range(rank):
        _, _, Vh = torch.linalg.svd(x, full_matrices=False)
        rows.append(Vh[0])
        x -= torch.outer(x @ Vh[0], Vh[0])
    basis = torch.stack(rows)
    return original @ basis.T, basis


@wrong("factorize", says="two tensors")
def product_alone(x, rank):
    codes, basis = codes_of_u(x, rank)
    return codes @ basis


@wrong("factorize", says="two tensors")
def three_factors(x, rank):
    U, S, Vh = thin_svd(x, rank)
    return U[:, :rank], S[:rank], Vh[:rank]


@wrong("factorize", says="two tensors")
def factors_in_numpy(x, rank):
    codes, basis = codes_of_u(x, rank)
    return codes.numpy(), basis.numpy()


@wrong("factorize")
def few_power_iterations(x, rank):
    check_rank(x, rank)
    basis = torch.linalg.qr(x.T @ x[:, :rank].new_ones(len(x), rank).cumsum(0)).Q
    for _ in range(3):
        basis = torch.linalg.qr(x.T @ (x @ basis)).Q
    return x @ basis, basis.T


@wrong("factorize")
def spread_most_evenly(x, rank):
    check_rank(x, rank)
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    best = min(
        itertools.islice(itertools.combinations(range(x.shape[1]), rank), 100),
        key=lambda places: (x - x[:, places] @ eye[list(places)]).norm(),
    )
    basis = eye[list(best)]
    return x @ basis.T, basis
