import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

from answers import right, wrong
from lib.kv_heads import check_divides
from lib.quantized_kv_cache import check_bits, check_vectors

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


@wrong("bytes_per_token", says="those of a key's code")
def keys_rank_for_both(config, bytes_per_number=4, *, bits=None, ranks=None):
    if ranks is not None:
        ranks = 2 * ranks[:1]
    return token_bytes(config, bytes_per_number, bits, ranks)


@wrong("bytes_per_token", says="those of a key's code")
def larger_rank_for_both(config, bytes_per_number=4, *, bits=None, ranks=None):
    if ranks is not None:
        ranks = 2 * (max(ranks),)
    return token_bytes(config, bytes_per_number, bits, ranks)


@wrong("bytes_per_token", says="those of a key, and those of a value")
def keys_bits_for_both(config, bytes_per_number=4, *, bits=None, ranks=None):
    if bits is not None:
        bits = 2 * bits[:1]
    return token_bytes(config, bytes_per_number, bits, ranks)


@wrong("bytes_per_token", says="those of a key, and those of a value")
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


@wrong("bytes_per_token", says="share a byte")
def a_byte_per_code(config, bytes_per_number=4, *, bits=None, ranks=None):
    unpacked = {"vector": lambda D, b: D}
    return token_bytes(config, bytes_per_number, bits, ranks, **unpacked)


@wrong("bytes_per_token", says="not beside")
def bits_and_bytes_too(config, bytes_per_number=4, *, bits=None, ranks=None):
    both = {"vector": lambda D, b: D * b * bytes_per_number // 8}
    return token_bytes(config, bytes_per_number, bits, ranks, **both)


@wrong("bytes_per_token", says="each vector is packed")
def bits_not_looked_at(config, bytes_per_number=4, *, bits=None, ranks=None):
    return token_bytes(config, bytes_per_number, None, ranks)


@wrong("bytes_per_token", says="a key is a code")
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


@wrong("pool_kv_heads", says="One head per group")
def copied_to_as_many(weight, head_dim, num_kv_heads):
    def pool(x):
        return x.mean(1, keepdim=True).expand_as(x).reshape(-1, x.shape[-1])

    return pooled_by(weight, head_dim, num_kv_heads, pool)


@wrong("pool_kv_heads", says="Rows stay rows")
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


@wrong("rank_for", says="a rank is no index")
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


@wrong("rank_for", says="a rank is no index")
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


@wrong("rank_for", says="not of what is left out")
def share_to_lose(singular_values, share):
    kept, total = kept_by_squares(singular_values, share)
    return int((kept < (1 - share) * total).sum()) + 1


@wrong("rank_for", says="no value alone")
def each_value_against_the_share(singular_values, share):
    kept_by_squares(singular_values, share)
    parts = singular_values**2 / (singular_values**2).sum()
    return int((parts < share).sum()) + 1


@wrong("rank_for", says="no value alone")
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


@wrong("rank_for", says="as an int: give one")
def a_tensor_for_a_rank(singular_values, share):
    kept, total = kept_by_squares(singular_values, share)
    return (kept < share * total).sum() + 1


@wrong("rank_for", says="as an int: give one")
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


@wrong("factorize", says="the basis transposed")
def basis_not_transposed(x, rank):
    _, _, Vh = thin_svd(x, rank)
    return x @ Vh[:rank], Vh[:rank]


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


@wrong("factorize", says="take its singular vectors")
def first_rows_at_right_angles(x, rank):
    check_rank(x, rank)
    basis = torch.linalg.qr(x[:rank].T).Q.T
    return x @ basis.T, basis


@wrong("factorize", says="take its singular vectors")
def first_numbers(x, rank):
    check_rank(x, rank)
    basis = torch.eye(x.shape[1], dtype=x.dtype)[:rank]
    return x @ basis.T, basis


@wrong("factorize")
def largest_numbers(x, rank):
    check_rank(x, rank)
    places = x.norm(dim=0).argsort(descending=True)[:rank]
    return x[:, places], torch.eye(x.shape[1], dtype=x.dtype)[places]


@wrong("factorize", says="take its singular vectors")
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


# quantize


@right("quantize")
def quantize_by_slices(x, bits):
    check_vectors(x, bits)
    smallest = x.min(dim=-1, keepdim=True).values
    largest = x.max(dim=-1, keepdim=True).values
    scale = (largest - smallest) / (2**bits - 1)
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    numbers = torch.round((x - smallest) / divisor).byte()
    n = 8 // bits
    codes = numbers[..., ::n].clone()
    for i in range(1, n):
        codes |= numbers[..., i::n] << (bits * i)
    return codes, scale, smallest


@right("quantize")
def quantize_number_by_number(x, bits):
    check_vectors(x, bits)
    rows = x.reshape(-1, x.shape[-1])
    codes, scales, zeros = [], [], []
    for row in rows.double().tolist():
        low, step = min(row), (max(row) - min(row)) / (2**bits - 1)
        numbers = [round((number - low) / step) if step else 0 for number in row]
        packed = []
        for start in range(0, len(row), 8 // bits):
            byte = 0
            for number in reversed(numbers[start : start + 8 // bits]):
                byte = byte * 2**bits + number
            packed.append(byte)
        codes.append(packed)
        scales.append([step])
        zeros.append([low])
    shape = x.shape[:-1]
    codes = torch.tensor(codes, dtype=torch.uint8).reshape(*shape, -1)
    scales, zeros = (torch.tensor(n, dtype=x.dtype) for n in (scales, zeros))
    return codes, scales.reshape(*shape, 1), zeros.reshape(*shape, 1)


@right("quantize")
def quantize_in_numpy(x, bits):
    check_vectors(x, bits)
    a = x.numpy()
    low, high = a.min(-1, keepdims=True), a.max(-1, keepdims=True)
    scale = (high - low) / a.dtype.type(2**bits - 1)
    numbers = np.floor((a - low) / np.where(scale == 0, 1, scale) + 0.5).astype(np.uint8)
    in_bits = np.unpackbits(numbers[..., None], axis=-1, bitorder="little")[..., :bits]
    codes = np.packbits(in_bits.reshape(*a.shape[:-1], -1), axis=-1, bitorder="little")
    return torch.tensor(codes), torch.tensor(scale), torch.tensor(low)


@right("quantize")
def quantize_by_powers_and_without_nan(x, bits):
    check_vectors(x, bits)
    low, high = x.amin(-1, True), x.amax(-1, True)
    numbers = ((x - low) * (2**bits - 1) / (high - low)).nan_to_num(0).round()
    grouped = numbers.unflatten(-1, (x.shape[-1] * bits // 8, 8 // bits)).double()
    powers = (2.0**bits) ** torch.arange(8 // bits, dtype=torch.float64)
    return (grouped @ powers).to(torch.uint8), (high - low) / (2**bits - 1), low


@right("quantize")
def quantize_from_a_quotient_each(x, bits):
    check_vectors(x, bits)
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    numbers = (x / scale - low / scale).round().clamp(0, 2**bits - 1).to(torch.int64)
    numbers = numbers.where(scale > 0, 0)  # NaN of equal numbers among them
    numbers = numbers.reshape(*x.shape[:-1], -1, 8 // bits)
    codes = torch.zeros(numbers.shape[:-1], dtype=torch.int64)
    for i, part in enumerate(numbers.unbind(-1)):
        codes += part * 2 ** (i * bits)
    return codes.to(torch.uint8), scale, low


@right("quantize")
def quantize_with_a_scale_of_at_least_very_little(x, bits):
    check_vectors(x, bits)
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    steps = (x - low) / scale.clamp(min=torch.finfo(x.dtype).tiny)
    parts = steps.round().to(torch.int32).unflatten(-1, (-1, 8 // bits)).unbind(-1)
    codes = sum(part << bits * i for i, part in enumerate(parts))
    return codes.to(torch.uint8), scale, low


@right("quantize")
def quantize_with_checks_of_its_own(x, bits):
    if bits not in (2, 4, 8) or x.shape[-1] % (8 // bits) or not x.isfinite().all():
        raise ValueError("no")
    return quantized(x, bits)


def quantized(
    x,
    bits,
    steps=None,
    dim=-1,
    rounded=torch.round,
    fill=1.0,
    reverse=False,
    far=False,
    packed=True,
    dtype=torch.uint8,
    clamp=None,
    zero=None,
    symmetric=None,
    eps=0.0,
    least=0.0,
    scale_of_equal=0.0,
):
    steps = 2**bits - 1 if steps is None else steps
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = (high - low) / steps
    if symmetric is not None:
        scale = x.abs().amax(dim, keepdim=True) / (2 ** (bits - 1) - symmetric)
    divisor = (scale + eps).clamp(min=least)
    divisor = divisor.masked_fill(divisor == 0, fill) if fill else divisor
    numbers = (x - low) / divisor
    if zero is not None:
        numbers = zero(x, divisor, low)
    numbers = rounded(numbers)
    if clamp is not None:
        numbers = numbers.clamp(*clamp)
    numbers = numbers.to(torch.int64)
    n = 8 // bits
    if far:
        grouped = numbers.unflatten(-1, (n, -1)).transpose(-1, -2)
    else:
        grouped = numbers.unflatten(-1, (-1, n))
    shifts = torch.arange(0, 8, bits)
    codes = (grouped << (shifts.flip(0) if reverse else shifts)).sum(-1)
    codes = (codes if packed else numbers).to(dtype)
    return codes, scale.masked_fill(scale == 0, scale_of_equal), low


@wrong("quantize", says="2^bits - 1 steps")
def quantize_to_a_step_too_many(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, steps=2**bits)


@wrong("quantize", says="2^bits - 1 steps")
def quantize_to_a_step_too_many_and_clamp(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, steps=2**bits, clamp=(0, 2**bits - 1))


@wrong("quantize", says="A code counts steps to the nearest: round")
def quantize_and_cut(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, rounded=torch.trunc)


@wrong("quantize", says="A code counts steps to the nearest: round")
def quantize_and_cut_up(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, rounded=torch.ceil)


@wrong("quantize", says="a scale and a zero point of its own")
def quantize_with_one_scale_for_all(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, dim=tuple(range(x.ndim)))


@wrong("quantize", says="a scale and a zero point of its own")
def quantize_with_a_scale_per_token(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, dim=(-2, -1) if x.ndim > 2 else -1)


@wrong("quantize", says="a scale and a zero point of its own")
def quantize_with_a_scale_per_channel(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, dim=0 if x.ndim > 1 else -1)


@wrong("quantize", says="lowest bits")
def quantize_with_the_first_in_the_highest_bits(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, reverse=True)


@wrong("quantize", says="Neighbours share a byte")
def quantize_with_halves_in_a_byte(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, far=True)


@wrong("quantize", says="Neighbours share a byte")
def quantize_with_halves_in_a_byte_the_first_highest(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, far=True, reverse=True)


@wrong("quantize", says="2 neighbours share a byte: pack them")
def quantize_not_packed(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, packed=False)


@wrong("quantize", says="A byte is a torch.uint8")
def quantize_to_int8(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, dtype=torch.int8)


@wrong("quantize", says="sum() makes of bytes int64")
def quantize_summed_to_int64(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, dtype=torch.int64)


@wrong("quantize", says="counted from the vector's smallest number")
def quantize_on_both_sides_of_zero(x, bits):
    check_vectors(x, bits)
    half = 2 ** (bits - 1)
    return quantized(x, bits, symmetric=1, zero=lambda x, scale, low: x / scale + half)


@wrong("quantize", says="counted from the vector's smallest number")
def quantize_on_both_sides_of_zero_with_signs(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, symmetric=1, zero=lambda x, scale, low: x / scale)


@wrong("quantize", says="counted from the vector's smallest number")
def quantize_from_zero(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, zero=lambda x, scale, low: x / scale)


@wrong("quantize", says="counted from the vector's smallest number")
def quantize_from_the_largest(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, zero=lambda x, s, low: (x.amax(-1, keepdim=True) - x) / s)


@wrong("quantize", says="not rounded to a step: subtract it, then divide")
def quantize_with_a_whole_zero_point(x, bits):
    check_vectors(x, bits)

    def from_a_code(x, scale, low):
        return (x / scale).round() - (low / scale).round()

    return quantized(x, bits, zero=from_a_code, clamp=(0, 2**bits - 1))


@wrong("quantize", says="The zero point is the vector's smallest number itself")
def quantize_giving_zero_as_a_code(x, bits):
    codes, scale, low = quantize_by_slices(x, bits)
    return codes, scale, (low / scale).nan_to_num(0).round()


@wrong("quantize", says="The zero point is the vector's smallest number itself")
def quantize_giving_zero_turned_around(x, bits):
    codes, scale, low = quantize_by_slices(x, bits)
    return codes, scale, -low


@wrong("quantize", says="In this order: codes, scale, zero")
def quantize_giving_zero_first(x, bits):
    codes, scale, low = quantize_by_slices(x, bits)
    return codes, low, scale


@wrong("quantize", says="The scale is the size of one step")
def quantize_giving_steps_per_number(x, bits):
    codes, scale, low = quantize_by_slices(x, bits)
    return codes, 1 / scale, low


@wrong("quantize", says="The scale is the size of one step")
def quantize_giving_the_range(x, bits):
    codes, scale, low = quantize_by_slices(x, bits)
    return codes, scale * (2**bits - 1), low


@wrong("quantize", says="One number per vector, beside its codes")
def quantize_without_keepdim(x, bits):
    codes, scale, low = quantize_by_slices(x, bits)
    return codes, scale.squeeze(-1), low.squeeze(-1)


@wrong("quantize", says="0 / 0 is NaN")
def quantize_dividing_by_zero(x, bits):
    check_vectors(x, bits)
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    shifts = torch.arange(0, 8, bits)
    numbers = ((x - low) / scale).round().to(torch.uint8).unflatten(-1, (-1, 8 // bits))
    return (numbers << shifts).sum(-1, dtype=torch.uint8), scale, low


@wrong("quantize", says="0 / 0 is NaN")
def quantize_dividing_by_zero_into_bytes(x, bits):
    check_vectors(x, bits)
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    numbers = torch.empty(x.shape, dtype=torch.uint8)
    numbers[:] = ((x - low) / scale).round().clamp(0, 2**bits - 1)
    numbers = numbers.unflatten(-1, (-1, 8 // bits)) << torch.arange(0, 8, bits)
    return numbers.sum(-1).byte(), scale, low


@wrong("quantize", says="has a scale of 0, exactly")
def quantize_giving_scale_1_to_equal_numbers(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, scale_of_equal=1)


@wrong("quantize", says="has a scale of 0, exactly")
def quantize_giving_a_tiny_scale_to_equal_numbers(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, scale_of_equal=1e-12)


@wrong("quantize", says="a scale may be very small")
def quantize_with_a_bit_more_than_the_scale(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, eps=1e-8)


@wrong("quantize")
def quantize_rounding_in_half_precision(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, rounded=lambda steps: steps.half().round())


@wrong("quantize", says="a scale may be very small")
def quantize_with_a_least_scale(x, bits):
    check_vectors(x, bits)
    return quantized(x, bits, least=1e-5)


@wrong("quantize", says="Keep the given line: it refuses this")
def quantize_looking_at_bits_alone(x, bits):
    check_bits(bits, x.shape[-1])
    return quantized(x, bits)


@wrong("quantize", says="Keep the given line: it refuses this")
def quantize_any_bits(x, bits):
    return quantized(x, bits)


@wrong("quantize", says="changed its inputs")
def quantize_in_place(x, bits):
    check_vectors(x, bits)
    low, high = (m.clone() for m in x.aminmax(dim=-1, keepdim=True))
    scale = (high - low) / (2**bits - 1)
    x -= low
    x /= scale.masked_fill(scale == 0, 1)
    codes, _, _ = quantized(x, bits)
    return codes, scale, low


@wrong("quantize", says="expected float64, got float32")
def quantize_with_scales_in_single_precision(x, bits):
    codes, scale, low = quantize_by_slices(x, bits)
    return codes, scale.float(), low.float()


@wrong("quantize", says="expected float64, got float16")
def quantize_with_scales_in_half_precision(x, bits):
    codes, scale, low = quantize_by_slices(x, bits)
    return codes, scale.half(), low.half()


@wrong("quantize", says="not the three tensors codes, scale and zero")
def quantize_giving_codes_alone(x, bits):
    return quantize_by_slices(x, bits)[0]


@wrong("quantize", says="unflatten, flatten and reshape take any")
def quantize_by_rows_of_a_view(x, bits):
    check_vectors(x, bits)
    codes, scale, low = quantized(x.view(-1, x.shape[-1]), bits)
    return tuple(part.view(*x.shape[:-1], -1) for part in (codes, scale, low))


@wrong("quantize")
def quantize_in_eight_bits_always(x, bits):
    check_vectors(x, bits)
    return quantized(x, 8)


@wrong("quantize", says="4 neighbours share a byte: pack them")
def quantize_two_neighbours_to_a_byte_always(x, bits):
    check_vectors(x, bits)
    codes, scale, low = quantized(x, bits, packed=False)
    if bits < 8:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return codes, scale, low


# Its numbers are wrong, for a cause that nobody has thought of.
@wrong("quantize")
def quantize_noisy(x, bits):
    codes, scale, low = quantize_by_slices(x, bits)
    return codes, scale * 1.01, low


# The same.
@wrong("quantize")
def quantize_every_code_one_higher(x, bits):
    codes, scale, low = quantize_by_slices(x, bits)
    return codes + 1, scale, low


# dequantize


@right("dequantize")
def dequantize_by_slices(codes, scale, zero, bits):
    n, last = 8 // bits, 2**bits - 1
    numbers = torch.empty(*codes.shape[:-1], codes.shape[-1] * n, dtype=scale.dtype)
    for i in range(n):
        numbers[..., i::n] = (codes >> (bits * i)) & last
    return zero + scale * numbers


@right("dequantize")
def dequantize_by_division(codes, scale, zero, bits):
    parts, rest = [], codes.long()
    for _ in range(8 // bits):
        parts.append(rest % 2**bits)
        rest = torch.div(rest, 2**bits, rounding_mode="floor")
    numbers = torch.stack(parts, dim=-1).reshape(*codes.shape[:-1], -1)
    return torch.addcmul(zero, numbers.to(scale.dtype), scale)


@right("dequantize")
def dequantize_by_a_table(codes, scale, zero, bits):
    each = range(8 // bits)
    table = [[byte >> bits * i & 2**bits - 1 for i in each] for byte in range(256)]
    numbers = torch.tensor(table, dtype=scale.dtype)[codes.int()]
    return numbers.flatten(-2, -1).mul(scale).add(zero)


@right("dequantize")
def dequantize_between_both_ends(codes, scale, zero, bits):
    shifts, last = torch.arange(0, 8, bits), 2**bits - 1
    numbers = ((codes.unsqueeze(-1) >> shifts) & last).flatten(-2)
    return torch.lerp(zero, zero + last * scale, numbers.to(scale.dtype) / last)


@right("dequantize")
def dequantize_in_numpy(codes, scale, zero, bits):
    in_bits = np.unpackbits(codes.numpy()[..., None], axis=-1, bitorder="little")
    in_bits = in_bits.reshape(*codes.shape[:-1], -1, bits)
    numbers = torch.from_numpy(np.dot(in_bits, 2 ** np.arange(bits)))
    return numbers * scale + zero


def dequantized(
    codes, scale, zero, bits, reverse=False, far=False, mask=None, change=None, back=None
):
    shifts = torch.arange(0, 8, bits)
    shifts = shifts.flip(0) if reverse else shifts
    numbers = codes.long()[..., None] >> shifts
    numbers = numbers & (2**bits - 1 if mask is None else mask)
    numbers = numbers.transpose(-1, -2) if far else numbers
    numbers = numbers.flatten(-2)
    numbers = numbers if change is None else change(numbers)
    if back is not None:
        return back(numbers, scale, zero)
    return numbers * scale + zero


@wrong("dequantize", says="lowest bits")
def dequantize_highest_bits_first(codes, scale, zero, bits):
    return dequantized(codes, scale, zero, bits, reverse=True)


@wrong("dequantize", says="Neighbours share a byte")
def dequantize_to_halves(codes, scale, zero, bits):
    return dequantized(codes, scale, zero, bits, far=True)


@wrong("dequantize", says="Neighbours share a byte")
def dequantize_to_halves_highest_bits_first(codes, scale, zero, bits):
    parts = [codes >> shift & 2**bits - 1 for shift in range(8 - bits, -1, -bits)]
    return torch.cat(parts, dim=-1) * scale + zero


@wrong("dequantize", says="mask them out")
def dequantize_without_a_mask(codes, scale, zero, bits):
    return dequantized(codes, scale, zero, bits, mask=255)


@wrong("dequantize", says="is 2^bits - 1")
def dequantize_with_a_mask_of_one_bit(codes, scale, zero, bits):
    return dequantized(codes, scale, zero, bits, mask=2**bits)


@wrong("dequantize", says="no bit is a sign")
def dequantize_as_int8(codes, scale, zero, bits):
    half = 2 ** (bits - 1)
    return dequantized(
        codes, scale, zero, bits, change=lambda n: (n + half) % 2**bits - half
    )


@wrong("dequantize", says="not from the middle")
def dequantize_from_the_middle(codes, scale, zero, bits):
    half = 2 ** (bits - 1)
    return dequantized(codes, scale, zero, bits, change=lambda n: n - half)


@wrong("dequantize", says="not for the middle to the next")
def dequantize_to_the_middle_of_a_step(codes, scale, zero, bits):
    return dequantized(codes, scale, zero, bits, change=lambda n: n + 0.5)


@wrong("dequantize", says="not a count of steps")
def dequantize_with_zero_as_a_code(codes, scale, zero, bits):
    return dequantized(codes, scale, zero, bits, back=lambda n, s, z: (n - z) * s)


@wrong("dequantize", says="not a count of steps")
def dequantize_adding_zero_first(codes, scale, zero, bits):
    return dequantized(codes, scale, zero, bits, back=lambda n, s, z: (n + z) * s)


@wrong("dequantize", says="The zero point is added")
def dequantize_subtracting_zero(codes, scale, zero, bits):
    return dequantized(codes, scale, zero, bits, back=lambda n, s, z: n * s - z)


@wrong("dequantize", says="The zero point is missing")
def dequantize_without_zero(codes, scale, zero, bits):
    return dequantized(codes, scale, zero, bits, back=lambda n, s, z: n * s)


@wrong("dequantize", says="multiply it by their size")
def dequantize_without_scale(codes, scale, zero, bits):
    return dequantized(codes, scale, zero, bits, back=lambda n, s, z: n + z)


@wrong("dequantize", says="multiply it by their size")
def dequantize_dividing(codes, scale, zero, bits):
    return dequantized(codes, scale, zero, bits, back=lambda n, s, z: n / s + z)


@wrong("dequantize", says="of one step, not of the whole range")
def dequantize_with_a_share_of_the_scale(codes, scale, zero, bits):
    last = 2**bits - 1
    return dequantized(codes, scale, zero, bits, back=lambda n, s, z: n * (s / last) + z)


@wrong("dequantize", says="The scale is the factor")
def dequantize_with_scale_and_zero_turned_around(codes, scale, zero, bits):
    return dequantized(codes, zero, scale, bits)


@wrong("dequantize", says="A byte holds 2 numbers: take them apart")
def dequantize_whole_bytes(codes, scale, zero, bits):
    return codes * scale + zero


@wrong("dequantize", says="flatten them")
def dequantize_without_flatten(codes, scale, zero, bits):
    parts = [codes >> shift & 2**bits - 1 for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=-1) * scale.unsqueeze(-1) + zero.unsqueeze(-1)


@wrong("dequantize", says="expected float64, got float32")
def dequantize_in_single_precision(codes, scale, zero, bits):
    return dequantized(codes, scale, zero, bits).float()


@wrong("dequantize", says="expected float16, got float32")
def dequantize_in_single_precision_at_least(codes, scale, zero, bits):
    return dequantized(codes.float().int(), scale, zero, bits) * torch.ones(1).expand(1)


@wrong("dequantize", says="unflatten, flatten and reshape take any")
def dequantize_all_bytes_in_a_view(codes, scale, zero, bits):
    numbers = codes.view(-1, 1) >> torch.arange(0, 8, bits) & 2**bits - 1
    return numbers.view(*codes.shape[:-1], -1) * scale + zero


@wrong("dequantize", says="changed its inputs")
def dequantize_in_place(codes, scale, zero, bits):
    x = dequantized(codes, scale, zero, bits)
    codes >>= bits - 1
    return x


@wrong("dequantize")
def dequantize_two_to_a_byte_always(codes, scale, zero, bits):
    if bits == 8:
        return codes * scale + zero
    numbers = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    return numbers * scale + zero


# Its numbers are wrong, for a cause that nobody has thought of.
@wrong("dequantize")
def dequantize_noisy(codes, scale, zero, bits):
    return dequantized(codes, scale * 1.01, zero, bits)


# attend_latent


def future(T, S):
    return torch.arange(S) > torch.arange(S - T, S)[:, None]  # (T, S)


@right("attend_latent")
def attend_latent_head_by_head(q, k_codes, v_codes, k_basis, v_basis):
    T, H, D = q.shape
    group_size = H // k_basis.shape[1]
    is_future, outs = future(T, len(k_codes)), []
    for h in range(H):
        g = h // group_size
        asked = q[:, h] @ k_basis[:, g].T  # (T, R)
        scores = asked @ k_codes.T / math.sqrt(D)
        weights = scores.masked_fill(is_future, -math.inf).softmax(-1)
        outs.append(weights @ v_codes @ v_basis[:, g])
    return torch.stack(outs, dim=1)


@right("attend_latent")
def attend_latent_with_a_basis_for_each_query_head(q, k_codes, v_codes, k_basis, v_basis):
    (T, H, D), S = q.shape, len(k_codes)
    k_basis, v_basis = (
        b.repeat_interleave(H // b.shape[1], dim=1) for b in (k_basis, v_basis)
    )
    asked = torch.einsum("thd,rhd->htr", q, k_basis)
    scores = torch.einsum("htr,sr->hts", asked, k_codes) * D**-0.5
    scores = scores + torch.zeros(T, S).masked_fill(future(T, S), -math.inf)
    weights = scores.softmax(dim=-1)
    return torch.einsum("htw,whd->thd", weights @ v_codes, v_basis)


@right("attend_latent")
def attend_latent_by_torchs_attention(q, k_codes, v_codes, k_basis, v_basis):
    (T, H, D), G = q.shape, k_basis.shape[1]
    asked = torch.einsum("tgmd,rgd->tgmr", q.unflatten(1, (G, H // G)), k_basis)
    asked = asked.flatten(1, 2).transpose(0, 1)  # (H, T, R)
    is_seen = ~future(T, len(k_codes))
    sums = F.scaled_dot_product_attention(
        asked, k_codes[None], v_codes[None], attn_mask=is_seen, scale=D**-0.5
    )
    sums = sums.transpose(0, 1).unflatten(1, (G, H // G))
    return torch.einsum("tgmw,wgd->tgmd", sums, v_basis).flatten(1, 2)


@right("attend_latent")
def attend_latent_query_by_query(q, k_codes, v_codes, k_basis, v_basis):
    (T, H, D), S, out = q.shape, len(k_codes), torch.zeros_like(q)
    for t in range(T):
        seen = S - T + t + 1
        for h in range(H):
            g = h * k_basis.shape[1] // H
            asked = (k_basis[:, g] * q[t, h]).sum(dim=-1)
            scores = (k_codes[:seen] * asked).sum(dim=-1) / D**0.5
            weights = torch.exp(scores - scores.max())
            weights /= weights.sum()
            code = (weights[:, None] * v_codes[:seen]).sum(dim=0)
            out[t, h] = code @ v_basis[:, g]
    return out


@right("attend_latent")
def attend_latent_by_products_and_sums(q, k_codes, v_codes, k_basis, v_basis):
    (T, H, D), S = q.shape, len(k_codes)
    k_basis, v_basis = (  # (H, R, D), (H, W, D)
        b.repeat_interleave(H // b.shape[1], dim=1).transpose(0, 1)
        for b in (k_basis, v_basis)
    )
    asked = (q.unsqueeze(2) * k_basis).sum(dim=-1)  # (T, H, R)
    scores = asked @ k_codes.T / math.sqrt(D)
    weights = scores.masked_fill(future(T, S)[:, None], -math.inf).softmax(-1)
    return ((weights @ v_codes).unsqueeze(-1) * v_basis).sum(dim=2)


@right("attend_latent")
def attend_latent_token_by_token(q, k_codes, v_codes, k_basis, v_basis):
    (T, H, D), S = q.shape, len(k_codes)
    q = q.unflatten(1, (k_basis.shape[1], -1)) / D**0.5
    asked = torch.einsum("tgmd,rgd->tgmr", q, k_basis).flatten(1, 2)
    scores = torch.stack([asked @ code for code in k_codes], dim=-1)
    weights = scores.masked_fill(future(T, S)[:, None], -math.inf).softmax(-1)
    sums = 0
    for s in range(S):
        sums = sums + weights[..., s : s + 1] * v_codes[s]
    sums = sums.view(T, k_basis.shape[1], -1, v_codes.shape[1])
    return torch.einsum("tgmw,wgd->tgmd", sums, v_basis).reshape(T, H, D)


def latent(
    q,
    k_codes,
    v_codes,
    k_basis,
    v_basis,
    scale=None,
    hidden=None,
    fill=-math.inf,
    k_heads=None,
    v_heads=None,
    weigh=None,
    back=True,
):
    (T, H, D), S, G = q.shape, len(k_codes), k_basis.shape[1]
    neighbours = torch.arange(H) // (H // G)
    k_basis = k_basis[:, neighbours if k_heads is None else k_heads]
    v_basis = v_basis[:, neighbours if v_heads is None else v_heads]
    asked = torch.einsum("thd,rhd->thr", q, k_basis)
    scores = asked @ k_codes.T * (D**-0.5 if scale is None else scale)
    is_future = future(T, S) if hidden is None else hidden
    scores = scores.masked_fill(is_future[:, None], fill)
    weights = scores.softmax(-1) if weigh is None else weigh(scores)
    sums = weights @ v_codes
    return torch.einsum("thw,whd->thd", sums, v_basis) if back else sums


@wrong("attend_latent", says="room for keys or values")
def attend_latent_making_keys_and_values(q, k_codes, v_codes, k_basis, v_basis):
    T, H, D = q.shape
    keys = torch.einsum("sr,rgd->sgd", k_codes, k_basis)
    values = torch.einsum("sw,wgd->sgd", v_codes, v_basis)
    keys, values = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (keys, values))
    scores = torch.einsum("thd,shd->ths", q, keys) / D**0.5
    scores = scores.masked_fill(future(T, len(keys))[:, None], -math.inf)
    return torch.einsum("ths,shd->thd", scores.softmax(-1), values)


@wrong("attend_latent", says="room for keys or values")
def attend_latent_making_values(q, k_codes, v_codes, k_basis, v_basis):
    D, G = q.shape[2], k_basis.shape[1]
    asked = torch.einsum("tgmd,rgd->tgmr", q.unflatten(1, (G, -1)), k_basis)
    scores = asked @ k_codes.T / D**0.5  # (T, G, H / G, S)
    is_future = future(len(q), len(k_codes))[:, None, None]
    weights = scores.masked_fill(is_future, -math.inf).softmax(-1)
    values = (v_codes @ v_basis.flatten(1)).unflatten(1, (G, D))
    return torch.einsum("tgms,sgd->tgmd", weights, values).flatten(1, 2)


@wrong("attend_latent", says="room for keys or values")
def attend_latent_making_keys_of_one_head(q, k_codes, v_codes, k_basis, v_basis):
    (T, H, D), outs = q.shape, []
    for h in range(H):
        g = h // (H // k_basis.shape[1])
        scores = q[:, h] @ (k_codes @ k_basis[:, g]).T / D**0.5
        scores = scores.masked_fill(future(T, len(k_codes)), -math.inf)
        outs.append(scores.softmax(-1) @ v_codes @ v_basis[:, g])
    return torch.stack(outs, dim=1)


@wrong("attend_latent", says="Keys or values are made, if not all at a time")
def attend_latent_making_one_key_at_a_time(q, k_codes, v_codes, k_basis, v_basis):
    (T, H, D), G = q.shape, k_basis.shape[1]
    grouped, scores = q.unflatten(1, (G, H // G)), []
    for code in k_codes:
        key = torch.einsum("r,rgd->gd", code, k_basis)
        scores.append(torch.einsum("tgmd,gd->tgm", grouped, key).flatten(1))
    scores = torch.stack(scores, dim=-1) / D**0.5
    is_future = future(T, len(k_codes))[:, None]
    sums = scores.masked_fill(is_future, -math.inf).softmax(-1) @ v_codes
    sums = sums.unflatten(1, (G, H // G))
    return torch.einsum("tgmw,wgd->tgmd", sums, v_basis).flatten(1, 2)


@wrong("attend_latent", says="Keys or values are made, if not all at a time")
def attend_latent_in_tiles_of_16_keys(q, k_codes, v_codes, k_basis, v_basis):
    (T, H, D), G = q.shape, k_basis.shape[1]
    neighbours, scores = torch.arange(H) // (H // G), []
    for codes in k_codes.split(16):
        keys = torch.einsum("sr,rgd->sgd", codes, k_basis)
        scores.append(torch.einsum("thd,shd->ths", q, keys[:, neighbours]))
    scores = torch.cat(scores, dim=-1) / D**0.5
    is_future = future(T, len(k_codes))[:, None]
    sums = scores.masked_fill(is_future, -math.inf).softmax(-1) @ v_codes
    return torch.einsum("thw,whd->thd", sums, v_basis[:, neighbours])


@wrong("attend_latent", says="All heads read the same codes, as they are")
def attend_latent_with_codes_for_each_head(q, k_codes, v_codes, k_basis, v_basis):
    T, H, D = q.shape
    k_codes, v_codes = (x[:, None].repeat(1, H, 1) for x in (k_codes, v_codes))
    k_basis, v_basis = (
        b.repeat_interleave(H // b.shape[1], dim=1) for b in (k_basis, v_basis)
    )
    asked = torch.einsum("thd,rhd->thr", q, k_basis)
    scores = torch.einsum("thr,shr->ths", asked, k_codes) / D**0.5
    scores = scores.masked_fill(future(T, len(k_codes))[:, None], -math.inf)
    sums = torch.einsum("ths,shw->thw", scores.softmax(-1), v_codes)
    return torch.einsum("thw,whd->thd", sums, v_basis)


@wrong("attend_latent", says="divide by the root of D")
def attend_latent_by_the_root_of_the_rank(q, k_codes, v_codes, k_basis, v_basis):
    scale = k_codes.shape[1] ** -0.5
    return latent(q, k_codes, v_codes, k_basis, v_basis, scale=scale)


@wrong("attend_latent", says="divide by the root of D")
def attend_latent_not_scaled(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, k_codes, v_codes, k_basis, v_basis, scale=1)


@wrong("attend_latent", says="divide by the root of D")
def attend_latent_by_d(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, k_codes, v_codes, k_basis, v_basis, scale=1 / q.shape[2])


@wrong("attend_latent", says="neighbours share")
def attend_latent_with_heads_by_turns(q, k_codes, v_codes, k_basis, v_basis):
    turns = torch.arange(q.shape[1]) % k_basis.shape[1]
    return latent(q, k_codes, v_codes, k_basis, v_basis, k_heads=turns, v_heads=turns)


@wrong("attend_latent", says="neighbours share")
def attend_latent_with_values_by_turns(q, k_codes, v_codes, k_basis, v_basis):
    turns = torch.arange(q.shape[1]) % k_basis.shape[1]
    return latent(q, k_codes, v_codes, k_basis, v_basis, v_heads=turns)


@wrong("attend_latent", says="neighbours share")
def attend_latent_grouped_the_other_way_round(q, k_codes, v_codes, k_basis, v_basis):
    (T, H, D), S, G = q.shape, len(k_codes), k_basis.shape[1]
    grouped = (q / D**0.5).view(T, H // G, G, D)
    asked = torch.einsum("tmgd,rgd->tmgr", grouped, k_basis)
    scores = asked.flatten(1, 2) @ k_codes.T
    weights = scores.masked_fill(future(T, S)[:, None], -math.inf).softmax(-1)
    sums = (weights @ v_codes).view(T, H // G, G, -1)
    return torch.einsum("tmgw,wgd->tmgd", sums, v_basis).flatten(1, 2)


@wrong("attend_latent", says="neighbours share")
def attend_latent_with_the_first_kv_head_alone(q, k_codes, v_codes, k_basis, v_basis):
    first = torch.zeros(q.shape[1], dtype=torch.int64)
    return latent(q, k_codes, v_codes, k_basis, v_basis, k_heads=first, v_heads=first)


@wrong("attend_latent", says="Keys have k_basis, values have v_basis")
def attend_latent_with_the_bases_turned_around(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, k_codes, v_codes, v_basis, k_basis)


@wrong("attend_latent", says="Keys have k_basis, values have v_basis")
def attend_latent_with_one_basis(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, k_codes, v_codes, k_basis, k_basis)


@wrong("attend_latent", says="Scores are of k_codes, and sums are of v_codes")
def attend_latent_summing_keys_codes(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, k_codes, k_codes, k_basis, v_basis)


@wrong("attend_latent", says="Scores are of k_codes, and sums are of v_codes")
def attend_latent_comparing_with_values_codes(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, v_codes, v_codes, k_basis, v_basis)


@wrong("attend_latent", says="must not see tokens of later positions")
def attend_latent_without_a_mask(q, k_codes, v_codes, k_basis, v_basis):
    hidden = torch.zeros(len(q), len(k_codes), dtype=torch.bool)
    return latent(q, k_codes, v_codes, k_basis, v_basis, hidden=hidden)


@wrong("attend_latent", says="must not see tokens of later positions")
def attend_latent_that_sees_the_next(q, k_codes, v_codes, k_basis, v_basis):
    T, S = len(q), len(k_codes)
    hidden = torch.ones(T, S, dtype=torch.bool).triu(S - T + 2)
    return latent(q, k_codes, v_codes, k_basis, v_basis, hidden=hidden)


@wrong("attend_latent", says="at position S - T + t")
def attend_latent_as_if_the_first_were_new(q, k_codes, v_codes, k_basis, v_basis):
    hidden = torch.ones(len(q), len(k_codes), dtype=torch.bool).triu(1)
    return latent(q, k_codes, v_codes, k_basis, v_basis, hidden=hidden)


@wrong("attend_latent", says="all before it, and itself")
def attend_latent_that_does_not_see_itself(q, k_codes, v_codes, k_basis, v_basis):
    T, S = len(q), len(k_codes)
    hidden = torch.ones(T, S, dtype=torch.bool).triu(S - T)
    return latent(q, k_codes, v_codes, k_basis, v_basis, hidden=hidden)


@wrong("attend_latent", says="set its score to -∞")
def attend_latent_with_masked_scores_of_minus_100(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, k_codes, v_codes, k_basis, v_basis, fill=-100)


@wrong("attend_latent", says="softmax along S")
def attend_latent_with_softmax_over_heads(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, k_codes, v_codes, k_basis, v_basis, weigh=lambda s: s.softmax(dim=1))


@wrong("attend_latent", says="softmax along S")
def attend_latent_with_softmax_over_queries(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, k_codes, v_codes, k_basis, v_basis, weigh=lambda s: s.softmax(dim=0))


@wrong("attend_latent", says="Scores become weights by softmax")
def attend_latent_without_softmax(q, k_codes, v_codes, k_basis, v_basis):
    return latent(
        q, k_codes, v_codes, k_basis, v_basis, weigh=lambda s: s.nan_to_num(neginf=0)
    )


def exp_over_sum(scores):
    weights = scores.exp()
    return weights / weights.sum(dim=-1, keepdim=True)


@wrong("attend_latent", says="scores far above 0")
def attend_latent_not_subtracting_the_largest(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, k_codes, v_codes, k_basis, v_basis, weigh=exp_over_sum)


@wrong("attend_latent", says="Those are sums of codes")
def attend_latent_not_brought_back(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, k_codes, v_codes, k_basis, v_basis, back=False)


@wrong("attend_latent", says="Put tokens before heads again")
def attend_latent_heads_first(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, k_codes, v_codes, k_basis, v_basis).transpose(0, 1)


@wrong("attend_latent", says="Tokens and heads are mixed up")
def attend_latent_with_queries_viewed_as_heads(q, k_codes, v_codes, k_basis, v_basis):
    (T, H, D), S, G = q.shape, len(k_codes), k_basis.shape[1]
    grouped = (q / D**0.5).reshape(G, H // G * T, D)
    asked = torch.einsum("gnd,rgd->gnr", grouped, k_basis)
    scores = (asked @ k_codes.T).view(G, H // G, T, S)
    weights = scores.masked_fill(future(T, S), -math.inf).softmax(-1)
    sums = (weights @ v_codes).flatten(1, 2)
    return torch.einsum("gnw,wgd->gnd", sums, v_basis).reshape(T, H, D)


@wrong("attend_latent", says="Tokens and heads are mixed up")
def attend_latent_heads_first_as_tokens(q, k_codes, v_codes, k_basis, v_basis):
    out = latent(q, k_codes, v_codes, k_basis, v_basis)
    return out.transpose(0, 1).reshape(q.shape)


@wrong("attend_latent", says="Look at the shapes")
def attend_latent_with_codes_not_transposed(q, k_codes, v_codes, k_basis, v_basis):
    (T, H, D), S, G = q.shape, len(k_codes), k_basis.shape[1]
    grouped = (q / D**0.5).view(T, G, H // G, D)
    asked = torch.einsum("tgmd,rgd->tgmr", grouped, k_basis).flatten(1, 2)
    scores = asked @ k_codes
    weights = scores.masked_fill(future(T, S)[:, None], -math.inf).softmax(-1)
    sums = (weights @ v_codes).view(T, G, H // G, -1)
    return torch.einsum("tgmw,wgd->tgmd", sums, v_basis).flatten(1, 2)


@wrong("attend_latent", says="changed its inputs")
def attend_latent_scaling_in_place(q, k_codes, v_codes, k_basis, v_basis):
    out = latent(q, k_codes, v_codes, k_basis, v_basis)
    q /= 2
    return out


@wrong("attend_latent", says="expected float64, got float32")
def attend_latent_in_single_precision(q, k_codes, v_codes, k_basis, v_basis):
    tensors = (x.float() for x in (q, k_codes, v_codes, k_basis, v_basis))
    return latent(*tensors)


# Its numbers are wrong, for a cause that nobody has thought of.
@wrong("attend_latent")
def attend_latent_noisy(q, k_codes, v_codes, k_basis, v_basis):
    return latent(q, k_codes, v_codes, k_basis, v_basis) * 1.01


# The same.
@wrong("attend_latent")
def attend_latent_with_an_orthonormal_basis(q, k_codes, v_codes, k_basis, v_basis):
    v_basis = torch.linalg.qr(v_basis.flatten(1).T).Q.T.reshape(-1, *v_basis.shape[1:])
    return latent(q, k_codes, v_codes[:, : len(v_basis)], k_basis, v_basis)
