import math

import torch
import torch.nn.functional as F

from answers import right, wrong
from lib import state as library
from lib.config import check_count

# linear_step


def read(state, q):
    """state (G, D, D), q (H, D)."""
    each = state.repeat_interleave(len(q) // len(state), dim=0)
    return (each @ q.unsqueeze(-1)).squeeze(-1)


@right("linear_step")
def step_by_repeated_heads(state, q, k, v, decay):
    new = decay.view(-1, 1, 1) * state + torch.einsum("gi,gj->gij", v, k)
    return read(new, q), new


@right("linear_step")
def step_head_by_head(state, q, k, v, decay):
    size = len(q) // len(k)
    states = [decay[g] * state[g] + torch.outer(v[g], k[g]) for g in range(len(k))]
    outs = [states[h // size] @ q[h] for h in range(len(q))]
    return torch.stack(outs), torch.stack(states)


@right("linear_step")
def step_by_matrix_products(state, q, k, v, decay):
    G, D = k.shape
    new = (state.clone() * decay[:, None, None]).baddbmm(v[:, :, None], k[:, None, :])
    return (q.reshape(G, -1, D) @ new.mT).reshape(-1, D), new


@right("linear_step")
def step_changing_a_copy(state, q, k, v, decay):
    state = state.clone()
    state.mul_(decay[:, None, None]).add_(v[:, :, None] * k[:, None, :])
    heads = torch.arange(len(q)) // (len(q) // len(k))
    return (state[heads] * q[:, None, :]).sum(dim=-1), state


@right("linear_step")
def step_as_a_list(state, q, k, v, decay):
    return [*step_by_repeated_heads(state, q, k, v, decay)]


def stepped(state, q, k, v, decay):
    new = decay[:, None, None] * state + v[:, :, None] * k[:, None, :]
    return read(new, q), new


@wrong("linear_step", says="The decay is missing")
def step_without_decay(state, q, k, v, decay):
    return stepped(state, q, k, v, torch.ones_like(decay))


@wrong("linear_step", says="has not faded yet")
def step_decaying_what_is_new_too(state, q, k, v, decay):
    new = decay[:, None, None] * (state + v[:, :, None] * k[:, None, :])
    return read(new, q), new


@wrong("linear_step", says="has not faded yet")
def step_decaying_what_is_new_alone(state, q, k, v, decay):
    new = state + decay[:, None, None] * v[:, :, None] * k[:, None, :]
    return read(new, q), new


@wrong("linear_step", says="not k_t v_tᵀ")
def step_with_a_transposed_product(state, q, k, v, decay):
    return stepped(state, q, v, k, decay)


@wrong("linear_step", says="not k_t v_tᵀ")
def step_with_a_transposed_state(state, q, k, v, decay):
    out, new = stepped(state.mT, q, k, v, decay)
    return out, new.mT


@wrong("linear_step", says="a sum over the state's columns")
def step_reading_columns(state, q, k, v, decay):
    _, new = stepped(state, q, k, v, decay)
    return read(new.mT, q), new


@wrong("linear_step", says="Write first, then read")
def step_reading_first(state, q, k, v, decay):
    return read(state, q), stepped(state, q, k, v, decay)[1]


@wrong("linear_step", says="Write first, then read")
def step_reading_before_it_writes(state, q, k, v, decay):
    return read(decay[:, None, None] * state, q), stepped(state, q, k, v, decay)[1]


@wrong("linear_step", says="neighbours share")
def step_with_heads_in_turns(state, q, k, v, decay):
    _, new = stepped(state, q, k, v, decay)
    each = new.repeat(len(q) // len(k), 1, 1)
    return (each @ q.unsqueeze(-1)).squeeze(-1), new


@wrong("linear_step", says="in the order of q")
def step_with_heads_permuted(state, q, k, v, decay):
    _, new = stepped(state, q, k, v, decay)
    grouped = q.unflatten(0, (len(k), -1))
    return torch.einsum("gij,ghj->hgi", new, grouped).flatten(0, 1), new


@wrong("linear_step", says="nothing in place")
def step_in_place(state, q, k, v, decay):
    state *= decay[:, None, None]
    state += v[:, :, None] * k[:, None, :]
    return read(state, q), state


@wrong("linear_step", says="In this order")
def step_with_the_state_first(state, q, k, v, decay):
    return stepped(state, q, k, v, decay)[::-1]


@wrong("linear_step", says="a decay of its own")
def step_with_decays_swapped(state, q, k, v, decay):
    return stepped(state, q, k, v, decay.flip(0))


@wrong("linear_step", says="a decay of its own")
def step_with_the_first_decay(state, q, k, v, decay):
    return stepped(state, q, k, v, decay[:1])


@wrong("linear_step")
def step_with_decay_over_columns(state, q, k, v, decay):
    new = decay * state + v[:, :, None] * k[:, None, :]
    return read(new, q), new


@wrong("linear_step", says="for all numbers of state[g]")
def step_with_decay_over_columns_where_it_fits(state, q, k, v, decay):
    fits = len(decay) == state.shape[-1]
    new = (decay if fits else decay[:, None, None]) * state
    new = new + v[:, :, None] * k[:, None, :]
    return read(new, q), new


@wrong("linear_step", says="no root of D")
def step_divided_by_the_root(state, q, k, v, decay):
    out, new = stepped(state, q, k, v, decay)
    return out / q.shape[-1] ** 0.5, new


@wrong("linear_step", says="D times D of them")
def step_without_an_outer_product(state, q, k, v, decay):
    new = decay[:, None, None] * state + (v * k).unsqueeze(-1)
    return read(new, q), new


@wrong("linear_step", says="not times 1 - γ")
def step_as_a_mean(state, q, k, v, decay):
    return stepped(state, q, k, (1 - decay[:, None]) * v, decay)


@wrong("linear_step", says="γ of the old state is left")
def step_with_what_is_lost(state, q, k, v, decay):
    return stepped(state, q, k, v, 1 - decay)


@wrong("linear_step")
def step_by_the_delta_rule(state, q, k, v, decay):
    return library.delta_step(state, q, k, v)


@wrong("linear_step", says="has not faded yet")
def step_that_decays_at_its_end(state, q, k, v, decay):
    new = state + v[:, :, None] * k[:, None, :]
    return read(new, q), decay[:, None, None] * new


@wrong("linear_step")
def step_summing_over_heads(state, q, k, v, decay):
    _, new = stepped(state, q, k, v, decay)
    return torch.einsum("gij,hj->hi", new, q), new


@right("linear_step")
def step_answering_without_the_new_state(state, q, k, v, decay):
    size = len(q) // len(k)
    keys, values, left = (x.repeat_interleave(size, 0) for x in (k, v, decay))
    out = read(state, q) * left[:, None] + (q * keys).sum(-1, keepdim=True) * values
    return out, stepped(state, q, k, v, decay)[1]


@wrong("linear_step", says="float64")
def step_in_single_precision(state, q, k, v, decay):
    return stepped(*(x.float() for x in (state, q, k, v, decay)))


@wrong("linear_step", says="takes the token in too")
def step_that_forgets_to_write(state, q, k, v, decay):
    new = decay[:, None, None] * state
    return read(new, q), new


@wrong("linear_step", says="does not take its place")
def step_with_the_token_alone(state, q, k, v, decay):
    return stepped(0 * state, q, k, v, decay)


@wrong("linear_step", says="not from what is new")
def step_reading_the_token_alone(state, q, k, v, decay):
    new = v[:, :, None] * k[:, None, :]
    return read(new, q), stepped(state, q, k, v, decay)[1]


@wrong("linear_step", says="not the two tensors")
def step_without_the_state(state, q, k, v, decay):
    return stepped(state, q, k, v, decay)[0]


@wrong("linear_step", says="shape")
def step_of_kv_heads(state, q, k, v, decay):
    out, new = stepped(state, q, k, v, decay)
    return out.unflatten(0, (len(k), -1)).mean(1), new


@wrong("linear_step", says="neighbours share")
def step_with_heads_unflattened_the_other_way(state, q, k, v, decay):
    _, new = stepped(state, q, k, v, decay)
    grouped = q.unflatten(0, (-1, len(k)))
    return torch.einsum("gij,hgj->ghi", new, grouped).flatten(0, 1), new


@wrong("linear_step")
def step_noisy(state, q, k, v, decay):
    out, new = stepped(state, q, k, v, decay)
    return 1.01 * out, new + 0.01


@wrong("linear_step")
def step_with_noise_in_the_answer(state, q, k, v, decay):
    out, new = stepped(state, q, k, v, decay)
    return out + 0.01, new


# delta_step


def difference(state, k, v):
    return v - (state @ k.unsqueeze(-1)).squeeze(-1)


@right("delta_step")
def delta_by_erasing_first(state, q, k, v):
    eye = torch.eye(k.shape[-1], dtype=k.dtype)
    new = state @ (eye - k[:, :, None] * k[:, None, :]) + v[:, :, None] * k[:, None, :]
    return read(new, q), new


@right("delta_step")
def delta_head_by_head(state, q, k, v):
    new = state.clone()
    for g in range(len(k)):
        new[g] += torch.outer(v[g] - state[g] @ k[g], k[g])
    heads = [h * len(k) // len(q) for h in range(len(q))]
    return torch.stack([new[g] @ one for g, one in zip(heads, q)]), new


@right("delta_step")
def delta_by_einsum(state, q, k, v):
    said = torch.einsum("gij,gj->gi", state, k)
    new = state + torch.einsum("gi,gj->gij", v - said, k)
    grouped = q.unflatten(0, (len(k), -1))
    return torch.einsum("gij,ghj->ghi", new, grouped).reshape(q.shape), new


@right("delta_step")
def delta_by_two_writes(state, q, k, v):
    said = (state * k[:, None, :]).sum(-1)
    erased = state - said[..., None] * k[:, None]
    new = torch.baddbmm(erased, v[..., None], k[:, None])
    return read(new, q), new


@right("delta_step")
def delta_by_a_step_of_gradient_descent(state, q, k, v):
    net = state.detach().clone().requires_grad_()
    loss = difference(net, k, v).square().sum() / 2
    new = state - torch.autograd.grad(loss, net)[0]
    return read(new, q), new


@wrong("delta_step")
def delta_at_half_the_rate(state, q, k, v):
    new = state + difference(state, k, v)[:, :, None] * k[:, None, :] / 2
    return read(new, q), new


@wrong("delta_step")
def delta_number_by_number(state, q, k, v):
    new = state + (v[:, :, None] - state) * k[:, None, :]
    return read(new, q), new


@wrong("delta_step")
def delta_that_writes_twice(state, q, k, v):
    _, new = delta_by_einsum(state, q, k, v)
    return stepped(new, q, k, v, torch.ones_like(k[:, 0]))


@wrong("delta_step", says="not written again")
def delta_without_erasing(state, q, k, v):
    return stepped(state, q, k, v, torch.ones_like(k[:, 0]))


@wrong("delta_step", says="not their sum")
def delta_of_the_sum(state, q, k, v):
    new = state + (2 * v - difference(state, k, v))[:, :, None] * k[:, None, :]
    return read(new, q), new


@wrong("delta_step", says="minus what was said")
def delta_the_other_way_round(state, q, k, v):
    new = state - difference(state, k, v)[:, :, None] * k[:, None, :]
    return read(new, q), new


@wrong("delta_step", says="number i is row i times k")
def delta_saying_columns(state, q, k, v):
    new = state + difference(state.mT, k, v)[:, :, None] * k[:, None, :]
    return read(new, q), new


@wrong("delta_step", says="v_t is written, and stays")
def delta_that_erases_alone(state, q, k, v):
    new = state + difference(state, k, 0 * v)[:, :, None] * k[:, None, :]
    return read(new, q), new


@right("delta_step")
def delta_by_writing_first(state, q, k, v):
    new = state + v[:, :, None] * k[:, None, :]
    new = new + difference(new, k, v)[:, :, None] * k[:, None, :]
    return read(new, q), new


@wrong("delta_step", says="v_t is written, and stays")
def delta_of_the_new_state(state, q, k, v):
    new = state + v[:, :, None] * k[:, None, :]
    new = new + difference(new, k, 0 * v)[:, :, None] * k[:, None, :]
    return read(new, q), new


@wrong("delta_step", says="not k_t v_tᵀ")
def delta_with_a_transposed_product(state, q, k, v):
    new = state + k[:, :, None] * difference(state, k, v)[:, None, :]
    return read(new, q), new


@wrong("delta_step", says="not k_t v_tᵀ")
def delta_with_a_transposed_state(state, q, k, v):
    new = state.mT + difference(state.mT, k, v)[:, :, None] * k[:, None, :]
    return read(new, q), new.mT


@wrong("delta_step", says="does not take its place")
def delta_alone(state, q, k, v):
    new = difference(state, k, v)[:, :, None] * k[:, None, :]
    return read(new, q), new


@wrong("delta_step", says="not all that is in it")
def delta_that_forgets_all(state, q, k, v):
    new = v[:, :, None] * k[:, None, :]
    return read(new, q), new


@wrong("delta_step", says="q_t only asks")
def delta_said_by_the_query(state, q, k, v):
    asks = q.unflatten(0, (len(k), -1))[:, 0]
    new = state + difference(state, asks, v)[:, :, None] * k[:, None, :]
    return read(new, q), new


@wrong("delta_step", says="Write first, then read")
def delta_reading_first(state, q, k, v):
    new = state + difference(state, k, v)[:, :, None] * k[:, None, :]
    return read(state, q), new


@wrong("delta_step", says="nothing in place")
def delta_in_place(state, q, k, v):
    state += difference(state, k, v)[:, :, None] * k[:, None, :]
    return read(state, q), state


@wrong("delta_step", says="neighbours share")
def delta_with_heads_in_turns(state, q, k, v):
    new = state + difference(state, k, v)[:, :, None] * k[:, None, :]
    each = new.repeat(len(q) // len(k), 1, 1)
    return (each @ q.unsqueeze(-1)).squeeze(-1), new


@wrong("delta_step", says="asked for its own key")
def delta_asking_the_first_head(state, q, k, v):
    said = k @ state[0].T
    new = state + (v - said)[:, :, None] * k[:, None, :]
    return read(new, q), new


@wrong("delta_step", says="a sum over the state's columns")
def delta_reading_columns(state, q, k, v):
    new = state + difference(state, k, v)[:, :, None] * k[:, None, :]
    return read(new.mT, q), new


@wrong("delta_step")
def delta_noisy(state, q, k, v):
    out, new = delta_by_einsum(state, q, k, v)
    return 1.01 * out, new + 0.01


# decay_mask


@right("decay_mask")
def mask_by_tril(decay, T):
    t = torch.arange(T)
    age = (t[:, None] - t).clamp(min=0)
    return torch.tril(decay.view(-1, 1, 1).pow(age))


@right("decay_mask")
def mask_by_where(decay, T):
    t = torch.arange(T)
    age = t[:, None] - t[None, :]
    return torch.where(age >= 0, decay[:, None, None] ** age.abs(), 0)


@right("decay_mask")
def mask_by_logarithms(decay, T):
    t = torch.arange(T, dtype=decay.dtype)
    age = (t[:, None] - t).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -1)
    mask = torch.exp(age * decay.log()[:, None, None])
    return mask.masked_fill(age < 0, 0)


@right("decay_mask")
def mask_row_by_row(decay, T):
    mask = decay.new_zeros(len(decay), T, T)
    for t in range(T):
        mask[:, t, :t] = mask[:, t - 1, :t] * decay[:, None]
        mask[:, t, t] = 1
    return mask


@right("decay_mask")
def mask_with_infinite_exponents(decay, T):
    age = torch.arange(T)[:, None] - torch.arange(T)
    exponents = age.to(decay.dtype).masked_fill(age < 0, math.inf)
    mask = [
        torch.where(age < 0, torch.zeros_like(exponents), one**exponents) for one in decay
    ]
    return torch.stack(mask)


@right("decay_mask")
def mask_diagonal_by_diagonal(decay, T):
    mask = decay.new_zeros(len(decay), T, T)
    for age in range(T):
        mask.diagonal(-age, 1, 2)[:] = (decay**age)[:, None]
    return mask


@right("decay_mask")
def mask_from_a_vector_of_powers(decay, T):
    powers = torch.cat([decay[:, None] ** torch.arange(T), torch.zeros(len(decay), 1)], 1)
    age = torch.arange(T)[:, None] - torch.arange(T)
    return powers.to(decay.dtype)[:, age.masked_fill(age < 0, T)]


@right("decay_mask")
def mask_by_running_products(decay, T):
    factors = torch.where(ages(T) > 0, decay[:, None, None], 1)
    return factors.cumprod(dim=1).tril()


@wrong("decay_mask")
def mask_whose_rows_sum_to_one(decay, T):
    mask = mask_by_tril(decay, T)
    return mask / mask.sum(-1, keepdim=True)


@wrong("decay_mask")
def mask_that_fades_by_the_same_amount(decay, T):
    lost = (1 - decay)[:, None, None] * ages(T)
    return (1 - lost).clamp(min=0).tril()


@wrong("decay_mask")
def mask_that_ends_after_eight_tokens(decay, T):
    return mask_by_tril(decay, T).triu(-8)


def ages(T):
    t = torch.arange(T)
    return t[:, None] - t


@wrong("decay_mask", says="s <= t")
def mask_without_causality(decay, T):
    return decay[:, None, None] ** ages(T).clamp(min=0)


@wrong("decay_mask", says="s <= t")
def mask_on_both_sides(decay, T):
    return decay[:, None, None] ** ages(T).abs()


@wrong("decay_mask", says="s <= t")
def mask_with_negative_powers(decay, T):
    return decay[:, None, None] ** ages(T)


@wrong("decay_mask", says="∞ times 0")
def mask_with_negative_powers_times_zero(decay, T):
    return decay[:, None, None] ** ages(T) * (ages(T) >= 0)


@wrong("decay_mask", says="0 / 0")
def mask_as_a_quotient(decay, T):
    powers = decay[:, None] ** torch.arange(T)
    return (powers[:, :, None] / powers[:, None, :]).tril()


@wrong("decay_mask", says="0 / 0")
def mask_as_a_product_with_an_inverse(decay, T):
    t = torch.arange(T)
    product = (decay[:, None] ** t)[:, :, None] * (decay[:, None] ** -t)[:, None, :]
    return torch.where(ages(T) >= 0, product, 0)


@wrong("decay_mask", says="has not faded yet")
def mask_one_too_old(decay, T):
    return decay[:, None, None] ** (ages(T).clamp(min=0) + 1) * (ages(T) >= 0)


@wrong("decay_mask", says="has not faded yet")
def mask_without_itself(decay, T):
    return decay[:, None, None] ** ages(T).clamp(min=0) * (ages(T) > 0)


@wrong("decay_mask", says="Row t is of the token that looks")
def mask_transposed(decay, T):
    return (decay[:, None, None] ** ages(T).clamp(min=0) * (ages(T) >= 0)).mT


@wrong("decay_mask", says="faded as many times")
def mask_of_ones(decay, T):
    return torch.ones(len(decay), T, T, dtype=decay.dtype).tril()


@wrong("decay_mask", says="faded as many times")
def mask_that_fades_once(decay, T):
    return decay[:, None, None] * (ages(T) > 0) + torch.eye(T, dtype=decay.dtype)


@wrong("decay_mask", says="faded as many times")
def mask_by_position(decay, T):
    return (decay[:, None, None] ** torch.arange(T)[:, None]).expand(-1, T, T).tril()


@wrong("decay_mask", says="not -∞")
def mask_for_a_softmax(decay, T):
    mask = decay[:, None, None] ** ages(T).clamp(min=0)
    return mask.masked_fill(ages(T) < 0, -torch.inf)


@wrong("decay_mask", says="by its own decay")
def mask_with_heads_swapped(decay, T):
    return mask_by_tril(decay.flip(0), T)


@wrong("decay_mask", says="by its own decay")
def mask_for_all_heads(decay, T):
    return mask_by_tril(decay[:1], T).expand(len(decay), -1, -1)


@wrong("decay_mask", says="(G, T, T)")
def mask_without_heads(decay, T):
    return mask_by_tril(decay, T)[0]


@wrong("decay_mask", says="float64")
def mask_in_single_precision(decay, T):
    return mask_by_tril(decay.float(), T)


@wrong("decay_mask", says="float32")
def mask_in_double_precision(decay, T):
    return mask_by_tril(decay.double(), T)


@wrong("decay_mask")
def mask_noisy(decay, T):
    return mask_by_tril(decay, T) + 0.01


@wrong("decay_mask")
def mask_of_the_logarithm_in_half(decay, T):
    logs = (ages(T).clamp(min=0) * decay[:, None, None].log()).half().to(decay.dtype)
    return logs.exp().tril()


# linear_parallel


@right("linear_parallel")
def parallel_by_einsum(q, k, v, decay):
    G = k.shape[-2]
    grouped = q.unflatten(-2, (G, -1))
    scores = torch.einsum("...tghd,...sgd->...ghts", grouped, k)
    scores = scores * mask_by_tril(decay, q.shape[-3])[:, None]
    return torch.einsum("...ghts,...sgd->...tghd", scores, v).flatten(-3, -2)


@right("linear_parallel")
def parallel_by_repeated_heads(q, k, v, decay):
    size = q.shape[-2] // k.shape[-2]
    k, v = (x.repeat_interleave(size, dim=-2) for x in (k, v))
    mask = mask_by_tril(decay.repeat_interleave(size), q.shape[-3])
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    return ((q @ k.mT * mask) @ v).transpose(-3, -2)


@right("linear_parallel")
def parallel_head_by_head(q, k, v, decay):
    H, G = q.shape[-2], k.shape[-2]
    mask, outs = library.decay_mask(decay, q.shape[-3]), []
    for h in range(H):
        g = h // (H // G)
        scores = q[..., h, :] @ k[..., g, :].transpose(-1, -2)
        outs.append(scores * mask[g] @ v[..., g, :])
    return torch.stack(outs, dim=-2)


@right("linear_parallel")
def parallel_text_by_text(q, k, v, decay):
    if q.dim() > 3:
        if not len(q):
            return q
        return torch.stack([parallel_text_by_text(*x, decay) for x in zip(q, k, v)])
    size = q.shape[1] // k.shape[1]
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(size, 1))
    scores = scores * library.decay_mask(decay, len(q)).repeat_interleave(size, 0)
    return torch.einsum("hts,shd->thd", scores, v.repeat_interleave(size, 1))


@right("linear_parallel")
def parallel_by_queries_of_a_group_in_a_row(q, k, v, decay):
    *batch, T, H, D = q.shape
    G = k.shape[-2]
    rows = q.reshape(*batch, T, G, H // G, D).movedim(-3, -4)  # (..., G, T, H / G, D)
    rows = rows.reshape(*batch, G, T * (H // G), D)
    k, v = k.transpose(-3, -2), v.transpose(-3, -2)
    mask = library.decay_mask(decay, T).repeat_interleave(H // G, dim=1)
    out = (rows @ k.mT * mask) @ v
    return out.reshape(*batch, G, T, H // G, D).movedim(-4, -3).reshape(q.shape)


def parallel(q, k, v, mask, heads=None, weigh=lambda scores, mask: scores * mask):
    """mask (G, T, T), or of each query head. heads: the KV head of each query head."""
    H, G = q.shape[-2], k.shape[-2]
    heads = torch.arange(H) // (H // G) if heads is None else heads
    mask = mask[heads] if len(mask) == G else mask
    scores = torch.einsum("...thd,...shd->...hts", q, k[..., heads, :])
    return torch.einsum("...hts,...shd->...thd", weigh(scores, mask), v[..., heads, :])


@wrong("linear_parallel", says="must not see later ones")
def parallel_without_causality(q, k, v, decay):
    return parallel(q, k, v, mask_without_causality(decay, q.shape[-3]))


@wrong("linear_parallel", says="must not see later ones")
def parallel_without_a_mask(q, k, v, decay):
    return parallel(q, k, v, mask_of_ones(decay, q.shape[-3]) * 0 + 1)


@wrong("linear_parallel", says="must not see later ones")
def parallel_with_a_transposed_mask(q, k, v, decay):
    return parallel(q, k, v, mask_by_tril(decay, q.shape[-3]).mT)


@wrong("linear_parallel", says="has faded t - s times")
def parallel_without_decay(q, k, v, decay):
    return parallel(q, k, v, mask_of_ones(decay, q.shape[-3]))


@wrong("linear_parallel", says="has not faded yet")
def parallel_one_too_old(q, k, v, decay):
    return parallel(q, k, v, mask_one_too_old(decay, q.shape[-3]))


@wrong("linear_parallel", says="has not faded yet")
def parallel_without_itself(q, k, v, decay):
    return parallel(q, k, v, mask_without_itself(decay, q.shape[-3]))


def softmax_of(scores, mask):
    return scores.masked_fill(mask == 0, -torch.inf).softmax(-1) * mask


@wrong("linear_parallel", says="no softmax")
def parallel_with_a_softmax(q, k, v, decay):
    mask = mask_by_tril(decay, q.shape[-3])
    return parallel(q, k, v, mask, weigh=softmax_of)


@wrong("linear_parallel", says="no softmax")
def parallel_with_a_softmax_of_scaled_scores(q, k, v, decay):
    mask = mask_by_tril(decay, q.shape[-3])
    return parallel(q / q.shape[-1] ** 0.5, k, v, mask, weigh=softmax_of)


@wrong("linear_parallel", says="no root of D")
def parallel_divided_by_the_root(q, k, v, decay):
    return parallel(q / q.shape[-1] ** 0.5, k, v, mask_by_tril(decay, q.shape[-3]))


@wrong("linear_parallel", says="not divided by their sum")
def parallel_as_a_mean(q, k, v, decay):
    mask = mask_by_tril(decay, q.shape[-3])
    return parallel(
        q, k, v, mask, weigh=lambda s, m: s * m / (s * m).sum(-1, keepdim=True)
    )


@wrong("linear_parallel", says="neighbours share")
def parallel_with_heads_in_turns(q, k, v, decay):
    mask = mask_by_tril(decay, q.shape[-3])
    return parallel(q, k, v, mask, heads=torch.arange(q.shape[-2]) % k.shape[-2])


@wrong("linear_parallel", says="neighbours share")
def parallel_with_repeat(q, k, v, decay):
    size = q.shape[-2] // k.shape[-2]
    k, v = (torch.cat([x] * size, dim=-2) for x in (k, v))
    mask = mask_by_tril(decay, q.shape[-3]).repeat_interleave(size, 0)
    return parallel(q, k, v, mask)


@wrong("linear_parallel", says="the mask of its KV head")
def parallel_with_masks_in_turns(q, k, v, decay):
    size = q.shape[-2] // k.shape[-2]
    return parallel(q, k, v, mask_by_tril(decay, q.shape[-3]).repeat(size, 1, 1))


@wrong("linear_parallel", says="the mask of its KV head")
def parallel_with_decays_swapped(q, k, v, decay):
    return parallel(q, k, v, mask_by_tril(decay.flip(0), q.shape[-3]))


@wrong("linear_parallel")
def parallel_with_a_mask_of_one_dimension_too_few(q, k, v, decay):
    G = k.shape[-2]
    scores = torch.einsum("...tghd,...sgd->...ghts", q.unflatten(-2, (G, -1)), k)
    scores = scores * library.decay_mask(decay, q.shape[-3])
    return torch.einsum("...ghts,...sgd->...tghd", scores, v).flatten(-3, -2)


@wrong("linear_parallel", says="neighbours share")
def parallel_unflattened_the_other_way(q, k, v, decay):
    grouped = q.unflatten(-2, (-1, k.shape[-2]))  # (..., T, H / G, G, D)
    scores = torch.einsum("...thgd,...sgd->...ghts", grouped, k)
    scores = scores * library.decay_mask(decay, q.shape[-3])[:, None]
    return torch.einsum("...ghts,...sgd->...tghd", scores, v).flatten(-3, -2)


@wrong("linear_parallel", says="in the order of q")
def parallel_flattened_the_other_way(q, k, v, decay):
    grouped = q.unflatten(-2, (k.shape[-2], -1))
    scores = torch.einsum("...tghd,...sgd->...ghts", grouped, k)
    scores = scores * library.decay_mask(decay, q.shape[-3])[:, None]
    return torch.einsum("...ghts,...sgd->...thgd", scores, v).flatten(-3, -2)


@wrong("linear_parallel", says="those below 0 count too")
def parallel_of_scores_above_zero(q, k, v, decay):
    mask = mask_by_tril(decay, q.shape[-3])
    return parallel(q, k, v, mask, weigh=lambda s, m: s.relu() * m)


@wrong("linear_parallel", says="by transpose")
def parallel_reshaped_at_the_end(q, k, v, decay):
    return parallel_by_einsum(q, k, v, decay).transpose(-3, -2).reshape(q.shape)


def reshaped(q, k, v, decay):
    """(..., H, T, D)"""
    *lead, T, H, D = q.shape
    size = H // k.shape[-2]
    k, v = (x.repeat_interleave(size, dim=-2) for x in (k, v))
    q, k, v = (x.reshape(*lead, H, T, D) for x in (q, k, v))
    return (q @ k.mT * mask_by_tril(decay, T).repeat_interleave(size, 0)) @ v


@wrong("linear_parallel", says="by transpose")
def parallel_reshaped(q, k, v, decay):
    return reshaped(q, k, v, decay).reshape(q.shape)


@wrong("linear_parallel", says="by transpose")
def parallel_reshaped_at_the_beginning(q, k, v, decay):
    return reshaped(q, k, v, decay).transpose(-3, -2)


@wrong("linear_parallel")
def parallel_with_a_product_of_matrices(q, k, v, decay):
    mask = mask_by_tril(decay, q.shape[-3])
    return parallel(q, k, v, mask, weigh=lambda s, m: s @ m)


@wrong("linear_parallel")
def parallel_of_the_first_text(q, k, v, decay):
    out = parallel_by_einsum(q, k, v, decay)
    return out[:1].expand_as(out) if q.dim() > 3 else out


@wrong("linear_parallel", says="gradients are not")
def parallel_with_detached_values(q, k, v, decay):
    return parallel_by_einsum(q, k, v.detach(), decay)


@wrong("linear_parallel")
def parallel_noisy(q, k, v, decay):
    return 1.01 * parallel_by_einsum(q, k, v, decay) + 0.01


@wrong("linear_parallel", says="weigh v")
def parallel_with_keys_for_values(q, k, v, decay):
    return parallel(q, k, k, mask_by_tril(decay, q.shape[-3]))


@wrong("linear_parallel", says="Put tokens before heads again")
def parallel_with_heads_first(q, k, v, decay):
    return parallel_by_einsum(q, k, v, decay).transpose(-3, -2)


@wrong("linear_parallel", says="gradients are not")
def parallel_detached(q, k, v, decay):
    return parallel_by_einsum(q.detach(), k.detach(), v.detach(), decay)


@wrong("linear_parallel", says="gradients are not")
def parallel_with_detached_scores(q, k, v, decay):
    mask = mask_by_tril(decay, q.shape[-3])
    return parallel(q, k, v, mask, weigh=lambda s, m: s.detach() * m)


@wrong("linear_parallel", says="gradients are not")
def parallel_without_gradients(q, k, v, decay):
    with torch.no_grad():
        return parallel_by_einsum(q, k, v, decay)


@wrong("linear_parallel", says="That goes token by token")
def parallel_in_steps(q, k, v, decay):
    if q.dim() > 3:
        texts = [parallel_in_steps(*x, decay) for x in zip(q, k, v)]
        return torch.stack(texts)
    state = q.new_zeros(k.shape[1], k.shape[2], k.shape[2])
    outs = [q[:0]]
    for t in range(len(q)):
        out, state = stepped(state, q[t], k[t], v[t], decay)
        outs.append(out[None])
    return torch.cat(outs)


@right("linear_parallel")
def parallel_row_by_row(q, k, v, decay):
    """By a mask that is made row by row too."""
    mask, outs = mask_row_by_row(decay, q.shape[-3]), [q[..., :0, :, :]]
    heads = torch.arange(q.shape[-2]) // (q.shape[-2] // k.shape[-2])
    for t in range(q.shape[-3]):
        scores = (q[..., t : t + 1, :, :] * k[..., heads, :]).sum(dim=-1)
        scores = scores * mask[heads, t].T
        outs.append((scores[..., None] * v[..., heads, :]).sum(-3, keepdim=True))
    return torch.cat(outs, dim=-3)


@wrong("linear_parallel")
def parallel_of_one_text_alone(q, k, v, decay):
    size = q.shape[1] // k.shape[1]
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(size, 1))
    scores = scores * mask_by_tril(decay, len(q)).repeat_interleave(size, 0)
    return torch.einsum("hts,shd->thd", scores, v.repeat_interleave(size, 1))


@wrong("linear_parallel", says="0 / 0")
def parallel_by_a_quotient(q, k, v, decay):
    return parallel(q, k, v, mask_as_a_quotient(decay, q.shape[-3]))


@wrong("linear_parallel", says="flatten and reshape take any")
def parallel_with_view(q, k, v, decay):
    *batch, T, H, D = q.shape
    G = k.shape[-2]
    if batch:
        return torch.stack([parallel_with_view(*x, decay) for x in zip(q, k, v)])
    scores = torch.einsum("tghd,sgd->ghts", q.view(T, G, H // G, D), k)
    scores = scores * library.decay_mask(decay, T)[:, None]
    out = scores @ v.view(T, G * D).view(T, G, 1, D).permute(1, 2, 0, 3)
    return out.permute(2, 0, 1, 3).reshape(T, H, D)


@wrong("linear_parallel", says="it changed its inputs")
def parallel_that_scales_keys_in_place(q, k, v, decay):
    out = parallel_by_einsum(q, k, v, decay)
    k *= 0.5
    return out


# linear_chunked


def pieces(chunk_size, *tensors):
    return zip(*(x.split(chunk_size) for x in tensors))


@right("linear_chunked")
def chunked_by_repeated_heads(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    size, outs = q.shape[1] // k.shape[1], [q[:0]]
    for first in range(0, len(q), chunk_size):
        q_c, k_c, v_c = (x[first : first + chunk_size] for x in (q, k, v))
        n = len(q_c)
        each, fade = (x.repeat_interleave(size, 0) for x in (state, decay))
        t = torch.arange(1, n + 1)[:, None]
        across = torch.einsum("hij,thj->thi", each, q_c) * (fade**t)[..., None]
        outs.append(library.linear_parallel(q_c, k_c, v_c, decay) + across)
        weighed = k_c * (decay ** (n - t))[..., None]
        told = torch.einsum("tgi,tgj->gij", v_c, weighed)
        state = state * (decay**n)[:, None, None] + told
    return torch.cat(outs), state


@right("linear_chunked")
def chunked_by_matrix_products(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    (T, H, D), G = q.shape, k.shape[1]
    outs = []
    for first in range(0, T, chunk_size):
        last = min(first + chunk_size, T)
        n = last - first
        q_c = q[first:last].reshape(n, G, H // G, D).permute(1, 2, 0, 3)
        k_c, v_c = (x[first:last].transpose(0, 1) for x in (k, v))  # (G, n, D)
        powers = decay[:, None] ** torch.arange(n + 1)  # (G, n + 1)
        mask = library.decay_mask(decay, n)[:, None]
        within = (q_c @ k_c.mT[:, None] * mask) @ v_c[:, None]
        across = (q_c @ state.mT[:, None]) * powers[:, None, 1:, None]
        outs.append((within + across).permute(2, 0, 1, 3).reshape(n, H, D))
        left = powers[:, :n].flip(1)[..., None]
        state = powers[:, n, None, None] * state + (v_c * left).mT @ k_c
    return torch.cat(outs) if outs else torch.zeros_like(q), state


@right("linear_chunked")
def chunked_head_by_head(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    out, states = torch.zeros_like(q), []
    size = q.shape[1] // k.shape[1]
    for g in range(k.shape[1]):
        one = state[g]
        for first in range(0, len(q), chunk_size):
            here = slice(first, first + chunk_size)
            n = len(q[here])
            mask = library.decay_mask(decay[g : g + 1], n)[0]
            t = torch.arange(1, n + 1)
            for h in range(g * size, (g + 1) * size):
                scores = q[here, h] @ k[here, g].T * mask
                across = q[here, h] @ one.T * (decay[g] ** t)[:, None]
                out[here, h] = scores @ v[here, g] + across
            left = mask[-1][:, None]
            one = decay[g] ** n * one + (v[here, g] * left).T @ k[here, g]
        states.append(one)
    return out, torch.stack(states)


@right("linear_chunked")
def chunked_all_chunks_at_once(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    T, G, n = len(q), k.shape[1], chunk_size
    padding = -T % n
    q_c, k_c, v_c = (
        F.pad(x, (0, 0, 0, 0, 0, padding)).unflatten(0, (-1, n)) if T else x[None]
        for x in (q, k, v)
    )
    if not T:
        return q.clone(), state.clone()
    within = library.linear_parallel(q_c, k_c, v_c, decay)
    t = torch.arange(1, n + 1)
    left = decay ** (n - t[:, None])
    told = torch.einsum("ctgi,ctgj->cgij", v_c * left[..., None], k_c)
    states = [state]
    for one in told[:-1]:
        states.append((decay**n)[:, None, None] * states[-1] + one)
    rest = T - (len(told) - 1) * n
    left = decay ** (rest - t[:rest, None])
    last = torch.einsum("tgi,tgj->gij", v_c[-1, :rest] * left[..., None], k_c[-1, :rest])
    new = (decay**rest)[:, None, None] * states[-1] + last
    grouped = q_c.unflatten(2, (G, -1)) * (decay ** t[:, None])[..., None, None]
    across = torch.einsum("cgij,ctghj->ctghi", torch.stack(states), grouped)
    out = within + across.flatten(3, 4).reshape(within.shape)
    return out.flatten(0, 1)[:T], new


@right("linear_chunked")
def chunked_by_outer_products(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    outs = [q[:0]]
    for q_c, k_c, v_c in pieces(chunk_size, q, k, v):
        n = len(q_c)
        outer = v_c[..., :, None] * k_c[..., None, :]  # (n, G, D, D)
        left = decay ** torch.arange(n - 1, -1, -1)[:, None]
        fade = (decay ** torch.arange(1, n + 1)[:, None]).repeat_interleave(
            q.shape[1] // k.shape[1], dim=1
        )
        said = read_all(state, q_c) * fade[..., None]
        outs.append(said + library.linear_parallel(q_c, k_c, v_c, decay))
        state = decay[:, None, None] ** n * state + (outer * left[..., None, None]).sum(0)
    return torch.cat(outs), state


def read_all(state, q):
    each = state.repeat_interleave(q.shape[1] // len(state), dim=0)
    return torch.einsum("hij,thj->thi", each, q)


def chunked(state, q, k, v, decay, chunk_size, **parts):
    """As the library, with other powers: of what is left of the state at token t, of
    token t at the end, and of the state at the end."""
    check_count("chunk_size", chunk_size)
    before = parts.get("before", lambda t, n: t)
    after = parts.get("after", lambda t, n: n - t)
    over = parts.get("over", lambda n: n)
    outs, size = [q[:0]], q.shape[1] // k.shape[1]
    for q_c, k_c, v_c in pieces(chunk_size, q, k, v):
        n = len(q_c)
        t = torch.arange(1, n + 1)[:, None]
        fade = (decay ** before(t, n)).repeat_interleave(size, dim=1)
        left = decay ** after(t, n)
        told = torch.einsum("tgi,tgj->gij", v_c * left[..., None], k_c)
        new = (decay ** over(n))[:, None, None] * state + told
        within = library.linear_parallel(q_c, k_c, v_c, parts.get("within", decay))
        seen = new if parts.get("reads_new") else state
        across = read_all(seen, q_c) * fade[..., None]
        outs.append(
            parts.get("a", 1) * within + parts.get("b", 1) * across
            if "join" not in parts
            else parts["join"](within, across)
        )
        state = new
    return torch.cat(outs), state


@right("linear_chunked")
def chunked_by_a_mask_row_by_row(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    outs, size = [q[:0]], q.shape[1] // k.shape[1]
    for q_c, k_c, v_c in pieces(chunk_size, q, k, v):
        mask = mask_row_by_row(decay, len(q_c) + 1)  # row t, column 0: of the state
        k_r, v_r = (x.repeat_interleave(size, dim=1) for x in (k_c, v_c))
        scores = torch.einsum("thd,shd->hts", q_c, k_r)
        scores = scores * mask[:, 1:, 1:].repeat_interleave(size, dim=0)
        across = read_all(state, q_c)
        across = across * mask[:, 1:, 0].T.repeat_interleave(size, dim=1)[..., None]
        outs.append(torch.einsum("hts,shd->thd", scores, v_r) + across)
        left = mask[:, -1]
        told = torch.einsum("gt,tgi,tgj->gij", left[:, 1:], v_c, k_c)
        state = left[:, 0, None, None] * state + told
    return torch.cat(outs), state


@right("linear_chunked")
def chunked_with_rows_of_scores(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    outs, size = [q[:0]], q.shape[1] // k.shape[1]
    heads = torch.arange(q.shape[1]) // size
    for q_c, k_c, v_c in pieces(chunk_size, q, k, v):
        out, new = chunked(state, q_c, k_c, v_c, decay, chunk_size, a=0)
        mask = library.decay_mask(decay, len(q_c))[heads]
        for t in range(len(q_c)):
            scores = (q_c[t] * k_c[: t + 1, heads]).sum(-1) * mask[:, t, : t + 1].T
            row = (scores[..., None] * v_c[: t + 1, heads]).sum(0)
            outs.append((out[t] + row)[None])
        state = new
    return torch.cat(outs), state


@wrong("linear_chunked", says="add what it says to each query")
def chunked_without_the_past(state, q, k, v, decay, chunk_size=64):
    return chunked(state, q, k, v, decay, chunk_size, b=0)


@wrong("linear_chunked", says="add linear_parallel of the chunk")
def chunked_without_the_chunk(state, q, k, v, decay, chunk_size=64):
    return chunked(state, q, k, v, decay, chunk_size, a=0)


@wrong("linear_chunked", says="When token t of a chunk asks")
def chunked_reading_what_has_not_faded(state, q, k, v, decay, chunk_size=64):
    return chunked(state, q, k, v, decay, chunk_size, before=lambda t, n: 0 * t)


@wrong("linear_chunked", says="When token t of a chunk asks")
def chunked_reading_one_too_young(state, q, k, v, decay, chunk_size=64):
    return chunked(state, q, k, v, decay, chunk_size, before=lambda t, n: t - 1)


@wrong("linear_chunked", says="When token t of a chunk asks")
def chunked_reading_as_at_the_end(state, q, k, v, decay, chunk_size=64):
    return chunked(state, q, k, v, decay, chunk_size, before=lambda t, n: 0 * t + n)


@wrong("linear_chunked", says="fades n - t times until its end")
def chunked_telling_what_has_not_faded(state, q, k, v, decay, chunk_size=64):
    return chunked(state, q, k, v, decay, chunk_size, after=lambda t, n: 0 * t)


@wrong("linear_chunked", says="fades n - t times until its end")
def chunked_telling_one_too_old(state, q, k, v, decay, chunk_size=64):
    return chunked(state, q, k, v, decay, chunk_size, after=lambda t, n: n - t + 1)


@wrong("linear_chunked", says="fades n - t times until its end")
def chunked_telling_the_other_way_round(state, q, k, v, decay, chunk_size=64):
    return chunked(state, q, k, v, decay, chunk_size, after=lambda t, n: t - 1)


@wrong("linear_chunked", says="the state before it fades n times")
def chunked_with_a_state_that_stays(state, q, k, v, decay, chunk_size=64):
    return chunked(state, q, k, v, decay, chunk_size, over=lambda n: 0)


@wrong("linear_chunked", says="the state before it fades n times")
def chunked_with_a_state_that_fades_once(state, q, k, v, decay, chunk_size=64):
    return chunked(state, q, k, v, decay, chunk_size, over=lambda n: 1)


@wrong("linear_chunked", says="it has n tokens, not chunk_size")
def chunked_with_chunks_always_full(state, q, k, v, decay, chunk_size=64):
    return chunked(state, q, k, v, decay, chunk_size, over=lambda n: chunk_size)


@wrong("linear_chunked", says="Within a chunk what was told fades too")
def chunked_without_decay_within(state, q, k, v, decay, chunk_size=64):
    return chunked(state, q, k, v, decay, chunk_size, within=torch.ones_like(decay))


@wrong("linear_chunked", says="would count twice")
def chunked_reading_the_new_state(state, q, k, v, decay, chunk_size=64):
    return chunked(state, q, k, v, decay, chunk_size, reads_new=True)


@wrong("linear_chunked", says="not k_t v_tᵀ")
def chunked_with_a_transposed_product(state, q, k, v, decay, chunk_size=64):
    _, new = chunked(state, q, v, k, decay, chunk_size)
    return chunked(state, q, k, v, decay, chunk_size)[0], new


@wrong("linear_chunked", says="The last chunk counts too")
def chunked_without_the_last(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    full = len(q) // chunk_size * chunk_size or len(q)
    return chunked(state, q[:full], k[:full], v[:full], decay, chunk_size)


@wrong("linear_chunked", says="from chunk to chunk")
def chunked_each_from_the_first_state(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    outs, new = [q[:0]], state
    for x in pieces(chunk_size, q, k, v):
        out, new = chunked(state, *x, decay, chunk_size)
        outs.append(out)
    return torch.cat(outs), new


@wrong("linear_chunked", says="is not left out")
def chunked_dropping_the_old_state(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    outs = [q[:0]]
    for x in pieces(chunk_size, q, k, v):
        out, _ = chunked(state, *x, decay, chunk_size)
        _, state = chunked(0 * state, *x, decay, chunk_size)
        outs.append(out)
    return torch.cat(outs), state


@wrong("linear_chunked", says="is not left out")
def chunked_from_an_empty_state(state, q, k, v, decay, chunk_size=64):
    return chunked(torch.zeros_like(state), q, k, v, decay, chunk_size)


@right("linear_chunked")
def chunked_the_first_and_then_the_others(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    parts = pieces(chunk_size, q, k, v)
    outs = [q[:0]]
    for x in parts:
        mask = library.decay_mask(decay, len(x[0]) + 1)  # the state as a token before
        before, after, left = mask[:, 1:, 0], mask[:, -1, 1:], mask[:, -1, 0]
        across = read_all(state, x[0]).unflatten(1, (len(decay), -1))
        across = across * before.T[..., None, None]
        outs.append(library.linear_parallel(*x, decay) + across.flatten(1, 2))
        told = torch.einsum("gt,tgi,tgj->gij", after, x[2], x[1])
        state = left[:, None, None] * state + told
    return torch.cat(outs), state


@wrong("linear_chunked", says="gradients are not")
def chunked_detached_between_chunks(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    outs = [q[:0]]
    for x in pieces(chunk_size, q, k, v):
        out, state = chunked(state, *x, decay, chunk_size)
        outs.append(out)
        state = state.detach()
    return torch.cat(outs), state


@wrong("linear_chunked", says="more than chunk_size tokens")
def chunked_into_as_many_as_a_chunk_has(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    outs = [q[:0]]
    for x in zip(*(x.chunk(chunk_size) for x in (q, k, v))):
        out, state = chunked(state, *x, decay, max(len(x[0]), 1))
        outs.append(out)
    return torch.cat(outs), state


@wrong("linear_chunked")
def chunked_fading_from_the_start_of_the_text(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    outs, seen = [q[:0]], 0
    for x in pieces(chunk_size, q, k, v):
        n = len(x[0])
        outs.append(
            chunked(state, *x, decay, chunk_size, before=lambda t, n, s=seen: t + s)[0]
        )
        state = chunked(state, *x, decay, chunk_size)[1]
        seen += n
    return torch.cat(outs), state


@wrong("linear_chunked")
def chunked_that_overlap(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    outs = [q[:0]]
    for i in range(0, len(q), chunk_size):
        x = [one[i : i + chunk_size] for one in (q, k, v)]
        outs.append(chunked(state, *x, decay, chunk_size)[0])
        x = [one[i : i + chunk_size + 1] for one in (q, k, v)]
        state = chunked(state, *x, decay, chunk_size + 1)[1]
    return torch.cat(outs), state


@wrong("linear_chunked", says="raised ValueError")
def chunked_without_an_empty_beginning(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    outs = []
    for i in range(0, len(q), chunk_size):
        x = [one[i : i + chunk_size] for one in (q, k, v)]
        out, state = chunked(state, *x, decay, chunk_size)
        outs.append(out)
    return torch.cat(outs), state


@wrong("linear_chunked", says="nothing in place")
def chunked_in_place(state, q, k, v, decay, chunk_size=64):
    out, new = chunked(state, q, k, v, decay, chunk_size)
    with torch.no_grad():
        state.copy_(new)
    return out, state


@right("linear_chunked")
def chunked_changing_a_copy(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    state, outs = state.clone(), [q[:0]]
    for x in pieces(chunk_size, q, k, v):
        out, new = chunked(state, *x, decay, chunk_size)
        outs.append(out)
        state.copy_(new)
    return torch.cat(outs), state


@wrong("linear_chunked", says="make a new one instead of changing it in place")
def chunked_changing_a_copy_that_gradients_need(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    state, outs = state.clone(), [q[:0]]
    for q_c, k_c, v_c in pieces(chunk_size, q, k, v):
        t = torch.arange(1, len(q_c) + 1)[:, None]
        fade = (decay**t)[..., None, None]
        grouped = q_c.unflatten(1, (k.shape[1], -1)) * fade
        across = torch.einsum("gij,tghj->tghi", state, grouped).flatten(1, 2)
        outs.append(library.linear_parallel(q_c, k_c, v_c, decay) + across)
        state.copy_(chunked(state, q_c, k_c, v_c, decay, chunk_size)[1])
    return torch.cat(outs), state


@wrong("linear_chunked", says="0 / 0")
def chunked_by_a_quotient(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    outs = [q[:0]]
    for q_c, k_c, v_c in pieces(chunk_size, q, k, v):
        n = len(q_c)
        powers = decay ** torch.arange(1, n + 1)[:, None]
        left = decay**n / powers
        told = torch.einsum("tgi,tgj->gij", v_c * left[..., None], k_c)
        outs.append(chunked(state, q_c, k_c, v_c, decay, chunk_size)[0])
        state = (decay**n)[:, None, None] * state + told
    return torch.cat(outs), state


@wrong("linear_chunked", says="read and write it once per chunk")
def chunked_token_by_token(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    outs = [q[:0]]
    for t in range(len(q)):
        out, state = library.linear_step(state, q[t], k[t], v[t], decay)
        outs.append(out[None])
    return torch.cat(outs), state


@wrong("linear_chunked", says="read and write it once per chunk")
def chunked_with_steps_within(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    outs = [q[:0]]
    for q_c, k_c, v_c in pieces(chunk_size, q, k, v):
        states = []
        for k_t, v_t in zip(k_c, v_c):
            state = decay[:, None, None] * state + v_t[..., None] * k_t[:, None]
            states.append(state)
        if states:
            each = torch.stack(states)
            grouped = q_c.unflatten(1, (k.shape[1], -1))
            outs.append(torch.einsum("tgij,tghj->tghi", each, grouped).flatten(1, 2))
    return torch.cat(outs), state


@wrong("linear_chunked", says="T² of them")
def chunked_all_at_once(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    return chunked(state, q, k, v, decay, max(len(q), 1))


@wrong("linear_chunked", says="that is in the state")
def chunked_reading_the_whole_past(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    outs = [q[:0]]
    T, size = len(q), q.shape[1] // k.shape[1]
    for first in range(0, T, chunk_size):
        last = min(first + chunk_size, T)
        s, t = torch.arange(last), torch.arange(first, last)[:, None]
        mask = decay[:, None, None] ** (t - s).clamp(min=0) * (t >= s)
        mask = mask.repeat_interleave(size, 0)
        keys, values = (x[:last].repeat_interleave(size, 1) for x in (k, v))
        scores = torch.einsum("thd,shd->hts", q[first:last], keys) * mask
        fade = (decay ** (t + 1)).repeat_interleave(size, 1)[..., None]
        said = read_all(state, q[first:last]) * fade
        outs.append(torch.einsum("hts,shd->thd", scores, values) + said)
    left = decay ** torch.arange(T - 1, -1, -1)[:, None]
    told = torch.einsum("tgi,tgj->gij", v * left[..., None], k)
    return torch.cat(outs), (decay**T)[:, None, None] * state + told


@wrong("linear_chunked", says="more than chunk_size tokens")
def chunked_always_by_64(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    return chunked(state, q, k, v, decay, 64)


@wrong("linear_chunked", says="Keep the given lines")
def chunked_without_the_check(state, q, k, v, decay, chunk_size=64):
    return chunked(state, q, k, v, decay, max(chunk_size, 1))


@wrong("linear_chunked", says="gradients are not")
def chunked_with_a_detached_state(state, q, k, v, decay, chunk_size=64):
    return chunked(state.detach(), q, k, v, decay, chunk_size)


@wrong("linear_chunked", says="gradients are not")
def chunked_without_gradients(state, q, k, v, decay, chunk_size=64):
    with torch.no_grad():
        return chunked(state, q, k, v, decay, chunk_size)


@wrong("linear_chunked", says="neighbours share")
def chunked_with_heads_in_turns(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    outs, G = [q[:0]], k.shape[1]
    heads = torch.arange(q.shape[1])
    for q_c, k_c, v_c in pieces(chunk_size, q, k, v):
        t = torch.arange(1, len(q_c) + 1)[:, None]
        fade = decay[heads // (len(heads) // G)] ** t
        across = torch.einsum("hij,thj->thi", state[heads % G], q_c) * fade[..., None]
        outs.append(library.linear_parallel(q_c, k_c, v_c, decay) + across)
        state = chunked(state, q_c, k_c, v_c, decay, chunk_size)[1]
    return torch.cat(outs), state


@wrong("linear_chunked", says="a decay of its own")
def chunked_with_decays_in_turns(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    outs, G = [q[:0]], k.shape[1]
    for q_c, k_c, v_c in pieces(chunk_size, q, k, v):
        t = torch.arange(1, len(q_c) + 1)[:, None]
        fade = decay[torch.arange(q.shape[1]) % G] ** t
        across = read_all(state, q_c) * fade[..., None]
        outs.append(library.linear_parallel(q_c, k_c, v_c, decay) + across)
        state = chunked(state, q_c, k_c, v_c, decay, chunk_size)[1]
    return torch.cat(outs), state


@wrong("linear_chunked", says="In this order")
def chunked_with_the_state_first(state, q, k, v, decay, chunk_size=64):
    return chunked(state, q, k, v, decay, chunk_size)[::-1]


@wrong("linear_chunked", says="takes in what its tokens write")
def chunked_with_the_old_state(state, q, k, v, decay, chunk_size=64):
    return chunked(state, q, k, v, decay, chunk_size)[0], state


@wrong("linear_chunked", says="a sum over the state's columns")
def chunked_reading_columns(state, q, k, v, decay, chunk_size=64):
    check_count("chunk_size", chunk_size)
    outs, size = [q[:0]], q.shape[1] // k.shape[1]
    for q_c, k_c, v_c in pieces(chunk_size, q, k, v):
        t = torch.arange(1, len(q_c) + 1)[:, None]
        fade = (decay**t).repeat_interleave(size, dim=1)
        across = read_all(state.mT, q_c) * fade[..., None]
        outs.append(library.linear_parallel(q_c, k_c, v_c, decay) + across)
        state = chunked(state, q_c, k_c, v_c, decay, chunk_size)[1]
    return torch.cat(outs), state


@wrong("linear_chunked")
def chunked_noisy(state, q, k, v, decay, chunk_size=64):
    out, new = chunked(state, q, k, v, decay, chunk_size)
    return 1.01 * out, new + 0.01


@wrong("linear_chunked")
def chunked_with_noise_in_the_answer(state, q, k, v, decay, chunk_size=64):
    out, new = chunked(state, q, k, v, decay, chunk_size)
    return out + 0.01, new


# state_bytes


@right("state_bytes")
def bytes_of_an_empty_state(config, bytes_per_number=4):
    shape = config.num_layers, config.num_kv_heads, config.head_dim, config.head_dim
    return torch.empty(shape, device="meta").numel() * bytes_per_number


@right("state_bytes")
def bytes_layer_by_layer(config, bytes_per_number=4):
    D = config.d_model // config.num_heads
    return sum(config.num_kv_heads * D * D for _ in range(config.num_layers)) * int(
        bytes_per_number
    )


@right("state_bytes")
def bytes_of_half_a_head_of_tokens(config, bytes_per_number=4):
    per_token = 2 * config.num_kv_heads * config.head_dim * bytes_per_number
    return config.num_layers * per_token * (config.head_dim // 2)


def as_bytes(config, bytes_per_number, heads=None, width=None, factor=1):
    heads = config.num_kv_heads if heads is None else heads
    width = config.head_dim**2 if width is None else width
    return factor * config.num_layers * heads * width * bytes_per_number


@wrong("state_bytes", says="several query heads read one")
def bytes_of_query_heads(config, bytes_per_number=4):
    return as_bytes(config, bytes_per_number, heads=config.num_heads)


@wrong("state_bytes", says="no number of tokens counts")
def bytes_times_tokens(config, bytes_per_number=4):
    return as_bytes(config, bytes_per_number, factor=config.max_seq_len)


@wrong("state_bytes", says="no number of tokens counts")
def bytes_of_a_cache(config, bytes_per_number=4):
    numbers = 2 * config.head_dim * config.max_seq_len
    return as_bytes(config, bytes_per_number, width=numbers)


@wrong("state_bytes", says="Each layer")
def bytes_of_one_layer(config, bytes_per_number=4):
    return as_bytes(config, bytes_per_number) // config.num_layers


@wrong("state_bytes", says="Each KV head")
def bytes_of_one_head(config, bytes_per_number=4):
    return as_bytes(config, bytes_per_number, heads=1)


@wrong("state_bytes", says="numbers, not bytes")
def bytes_as_numbers(config, bytes_per_number=4):
    return as_bytes(config, 1)


@wrong("state_bytes", says="whatever the default is")
def bytes_always_four(config, bytes_per_number=4):
    return as_bytes(config, 4)


@wrong("state_bytes", says="is not given it is 4")
def bytes_with_a_default_of_two(config, bytes_per_number=2):
    return as_bytes(config, bytes_per_number)


@wrong("state_bytes", says="D rows of D numbers")
def bytes_of_a_vector(config, bytes_per_number=4):
    return as_bytes(config, bytes_per_number, width=config.head_dim)


@wrong("state_bytes", says="one matrix, not two")
def bytes_of_keys_and_values(config, bytes_per_number=4):
    return as_bytes(config, bytes_per_number, factor=2)


@wrong("state_bytes", says="not d_model")
def bytes_of_d_model(config, bytes_per_number=4):
    width = config.d_model**2
    return as_bytes(config, bytes_per_number, heads=1, width=width)


@wrong("state_bytes", says="give an int")
def bytes_as_a_float(config, bytes_per_number=4):
    return float(as_bytes(config, bytes_per_number))
