import codecs
import math

import torch
import torch.nn.functional as F

from answers import right, wrong
from lib.model import attend_fused

# decode


@right("decode")
def one_bytearray(token_ids):
    data = bytearray()
    for token_id in token_ids:
        data.append(int(token_id))
    return str(data, encoding="utf-8", errors="replace")


@right("decode")
def incremental(token_ids):
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pieces = [decoder.decode(bytes([b])) for b in token_ids.numpy().tolist()]
    return "".join(pieces) + decoder.decode(b"", final=True)


@wrong("decode", says="raised UnicodeDecodeError")
def strict(token_ids):
    return bytes(token_ids.tolist()).decode("utf-8")


@wrong("decode", says="not vanish")
def ignoring(token_ids):
    return bytes(token_ids.tolist()).decode("utf-8", errors="ignore")


@wrong("decode", says="A byte is not a character")
def characters(token_ids):
    return "".join(chr(b) for b in token_ids.tolist())


@wrong("decode", says="Decode all bytes together")
def byte_by_byte(token_ids):
    return "".join(bytes([b]).decode("utf-8", "replace") for b in token_ids.tolist())


@wrong("decode")
def bytes_object(token_ids):
    return bytes(token_ids.tolist())


@wrong("decode")
def stripped(token_ids):
    return bytes(token_ids.tolist()).decode("utf-8", errors="replace").rstrip("\ufffd")


# attend_causal


@right("attend_causal")
def with_einsum(layer, q, k, v):
    T, H, D = q.shape[-3:]
    k, v = (x.repeat_interleave(H // x.shape[-2], dim=-2) for x in (k, v))
    scores = torch.einsum("...thd,...shd->...hts", q, k) / math.sqrt(D)
    scores = scores + torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
    return torch.einsum("...hts,...shd->...thd", torch.softmax(scores, -1), v)


@right("attend_causal")
def row_by_row(layer, q, k, v):
    T, H, D = q.shape[-3:]
    group_size = H // k.shape[-2]
    out = torch.zeros_like(q)
    for t in range(T):
        for h in range(H):
            keys, values = (x[..., : t + 1, h // group_size, :] for x in (k, v))
            scores = (keys @ q[..., t, h, :].unsqueeze(-1)).squeeze(-1) / D**0.5
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            out[..., t, h, :] = (weights.unsqueeze(-1) * values).sum(-2)
    return out


def attend(q, k, v, scale=None, hide=None, repeat=None):
    T, H, D = q.shape[-3:]
    repeat = repeat or (lambda x: x.repeat_interleave(H // x.shape[-2], dim=-2))
    k, v = repeat(k), repeat(v)
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * (D**-0.5 if scale is None else scale)
    hidden = torch.ones(T, T).triu(1).bool() if hide is None else hide(T)
    return (scores.masked_fill(hidden, -math.inf).softmax(-1) @ v).transpose(-3, -2)


@wrong("attend_causal", says="The future is not masked")
def no_mask(layer, q, k, v):
    return attend(q, k, v, hide=lambda T: torch.zeros(T, T).bool())


@wrong("attend_causal", says="nan")
def not_even_itself(layer, q, k, v):
    return attend(q, k, v, hide=lambda T: torch.ones(T, T).triu(0).bool())


@wrong("attend_causal", says="hides the past")
def mask_turned(layer, q, k, v):
    return attend(q, k, v, hide=lambda T: torch.ones(T, T).tril(-1).bool())


@wrong("attend_causal", says="Divide the scores by the root of D")
def no_scale(layer, q, k, v):
    return attend(q, k, v, scale=1.0)


@wrong("attend_causal", says="not by D")
def scale_without_root(layer, q, k, v):
    return attend(q, k, v, scale=1 / q.shape[-1])


@wrong("attend_causal", says="neighbours share")
def heads_tiled(layer, q, k, v):
    H, G = q.shape[-2], k.shape[-2]
    return attend(q, k, v, repeat=lambda x: torch.cat([x] * (H // G), dim=-2))


@wrong("attend_causal", says="not allowed here")
def fused(layer, q, k, v):
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-3, -2)


@wrong("attend_causal", says="has the shape of q")
def heads_first(layer, q, k, v):
    return attend(q, k, v).transpose(-3, -2)


@wrong("attend_causal", says="not always 2")
def root_of_two(layer, q, k, v):
    return attend(q, k, v, scale=2**-0.5)


@wrong("attend_causal", says="Mask before softmax")
def masked_after_softmax(layer, q, k, v):
    H = q.shape[-2]
    k, v = (x.repeat_interleave(H // x.shape[-2], dim=-2) for x in (k, v))
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights.tril() @ v).transpose(-3, -2)


@wrong("attend_causal")
def one_sequence_only(layer, q, k, v):
    T, H, D = q.shape
    return attend(q, k, v)


@wrong("attend_causal", says="T x T scores will do")
def all_pairs_of_products(layer, q, k, v):
    T, H, D = q.shape[-3:]
    k, v = (x.repeat_interleave(H // x.shape[-2], dim=-2) for x in (k, v))
    scores = (q.unsqueeze(-3) * k.unsqueeze(-4)).sum(-1) / D**0.5  # (..., T, T, H)
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool().unsqueeze(-1), -math.inf)
    return (scores.softmax(-2).unsqueeze(-1) * v.unsqueeze(-4)).sum(-3)


@wrong("attend_causal", says="changed its inputs")
def scaled_in_place(layer, q, k, v):
    q /= q.shape[-1] ** 0.5
    return attend(q, k, v, scale=1.0)


# next_token_probs


@right("next_token_probs")
def through_masks(logits, temperature=1.0, top_k=None, top_p=1.0):
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    probs = logits.softmax(-1)
    if top_p < 1:
        more_probable = probs.unsqueeze(-2) > probs.unsqueeze(-1)
        mass_before = (more_probable * probs.unsqueeze(-2)).sum(-1)
        probs = probs * (mass_before < top_p)
    return probs / probs.sum(-1, keepdim=True)


@right("next_token_probs")
def one_row_at_a_time(logits, temperature=1.0, top_k=None, top_p=1.0):
    rows = []
    for row in logits.reshape(-1, logits.shape[-1]):
        if temperature == 0:
            probs = torch.zeros_like(row)
            probs[row.argmax()] = 1
        else:
            values, order = (row / temperature).sort(descending=True)
            values[top_k or len(values) :] = -math.inf
            ranked = values.softmax(0)
            total, num_kept = 0.0, 0
            while total < top_p and num_kept < len(ranked):
                total += ranked[num_kept].item()
                num_kept += 1
            ranked[num_kept:] = 0
            probs = torch.empty_like(row)
            probs[order] = ranked / ranked.sum()
        rows.append(probs)
    return torch.stack(rows).view(logits.shape)


def rank_and_cut(logits, temperature, top_k, top_p, keep):
    values, order = (logits / temperature).sort(dim=-1, descending=True)
    probs = values[..., :top_k].softmax(-1)
    probs = probs * keep(probs)
    probs = probs / probs.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, order[..., :top_k], probs)


def greedy(logits):
    return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)


@wrong("next_token_probs", says="Keep the token that reaches top_p too")
def without_the_last(logits, temperature=1.0, top_k=None, top_p=1.0):
    if temperature == 0:
        return greedy(logits)
    keep = lambda probs: probs.cumsum(-1) <= top_p + 1e-9  # noqa: E731
    return rank_and_cut(logits, temperature, top_k, top_p, keep)


@wrong("next_token_probs")
def temperature_multiplies(logits, temperature=1.0, top_k=None, top_p=1.0):
    if temperature == 0:
        return greedy(logits)
    keep = lambda probs: probs.cumsum(-1) - probs < top_p  # noqa: E731
    return rank_and_cut(logits, 1 / temperature, top_k, top_p, keep)


@wrong("next_token_probs", says="divides by zero")
def divides_by_zero(logits, temperature=1.0, top_k=None, top_p=1.0):
    keep = lambda probs: probs.cumsum(-1) - probs < top_p  # noqa: E731
    return rank_and_cut(logits, temperature, top_k, top_p, keep)


@wrong("next_token_probs", says="sum to 1 again")
def not_renormalized(logits, temperature=1.0, top_k=None, top_p=1.0):
    if temperature == 0:
        return greedy(logits)
    probs = (logits / temperature).softmax(-1)
    ranked, order = probs.sort(dim=-1, descending=True)
    ranked[..., top_k or ranked.shape[-1] :] = 0
    ranked = ranked * (ranked.cumsum(-1) - ranked < top_p)
    return torch.zeros_like(probs).scatter(-1, order, ranked)


@wrong("next_token_probs")
def top_p_before_top_k(logits, temperature=1.0, top_k=None, top_p=1.0):
    if temperature == 0:
        return greedy(logits)
    ranked, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True)
    ranked = ranked * (ranked.cumsum(-1) - ranked < top_p)
    ranked[..., top_k or ranked.shape[-1] :] = 0
    ranked = ranked / ranked.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, order, ranked)


@wrong("next_token_probs", says="the first")
def all_of_the_largest(logits, temperature=1.0, top_k=None, top_p=1.0):
    if temperature == 0:
        return (logits == logits.amax(-1, keepdim=True)).to(logits.dtype)
    return through_masks(logits, temperature, top_k, top_p)


@wrong("next_token_probs", says="order of the vocabulary")
def left_in_rank_order(logits, temperature=1.0, top_k=None, top_p=1.0):
    if temperature == 0:
        return greedy(logits)
    return (logits / temperature).sort(dim=-1, descending=True).values.softmax(-1)


@wrong("next_token_probs")
def exponentials_overflow(logits, temperature=1.0, top_k=None, top_p=1.0):
    if temperature == 0:
        return greedy(logits)
    weights = (logits / temperature).exp()
    ranked, order = (weights / weights.sum(-1, keepdim=True)).sort(-1, descending=True)
    ranked[..., top_k or ranked.shape[-1] :] = 0
    ranked = ranked / ranked.sum(-1, keepdim=True)
    ranked = ranked * (ranked.cumsum(-1) - ranked < top_p)
    ranked = ranked / ranked.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, order, ranked)


# generate_recompute


def pick(logits, temperature, top_k, top_p, generator):
    from lib import sampling

    probs = sampling.next_token_probs(logits, temperature, top_k, top_p)
    return sampling.sample(probs, generator)


@right("generate_recompute")
@torch.no_grad()
def into_a_buffer(
    model,
    prompt_ids,
    num_new_tokens,
    *,
    temperature=1.0,
    top_k=None,
    top_p=1.0,
    generator=None,
    attend=attend_fused,
):
    T = prompt_ids.shape[-1]
    token_ids = prompt_ids.new_zeros(*prompt_ids.shape[:-1], T + num_new_tokens)
    token_ids[..., :T] = prompt_ids
    for end in range(T, T + num_new_tokens):
        logits = model(token_ids[..., :end], torch.arange(end), attend)
        settings = temperature, top_k, top_p, generator
        token_ids[..., end] = pick(logits[..., -1, :], *settings)
    return token_ids


@right("generate_recompute")
def recursively(model, prompt_ids, num_new_tokens, **settings):
    if num_new_tokens == 0:
        return prompt_ids
    defaults = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "generator": None}
    attend = settings.get("attend", attend_fused)
    with torch.no_grad():
        positions = torch.arange(prompt_ids.shape[-1]).expand(prompt_ids.shape)
        logits = model(prompt_ids, positions, attend).select(-2, -1)
        chosen = {name: settings.get(name, value) for name, value in defaults.items()}
        longer = torch.cat((prompt_ids, pick(logits, **chosen)[..., None]), dim=-1)
    return recursively(model, longer, num_new_tokens - 1, **settings)


def loop(model, prompt_ids, num_new_tokens, settings, step, start=0):
    settings = {"temperature": 1.0, "top_k": None, "top_p": 1.0, **settings}
    token_ids = prompt_ids
    with torch.no_grad():
        for _ in range(start, num_new_tokens):
            logits = step(token_ids)
            token_ids = torch.cat((token_ids, pick(logits, **settings)[..., None]), -1)
    return token_ids


@wrong("generate_recompute")
def attend_ignored(model, prompt_ids, num_new_tokens, *, attend, **settings):
    def step(token_ids):
        positions = torch.arange(token_ids.shape[-1])
        return model(token_ids, positions, attend_fused)[..., -1, :]

    return loop(model, prompt_ids, num_new_tokens, settings, step)


@wrong("generate_recompute", says="Positions count from 0")
def positions_from_one(model, prompt_ids, num_new_tokens, *, attend, **settings):
    def step(token_ids):
        positions = torch.arange(token_ids.shape[-1]) + 1
        return model(token_ids, positions, attend)[..., -1, :]

    return loop(model, prompt_ids, num_new_tokens, settings, step)


@wrong("generate_recompute", says="all of the text")
def last_token_only(model, prompt_ids, num_new_tokens, *, attend, **settings):
    def step(token_ids):
        return model(token_ids[..., -1:], torch.zeros(1).long(), attend)[..., -1, :]

    return loop(model, prompt_ids, num_new_tokens, settings, step)


@wrong("generate_recompute")
def every_position_zero(model, prompt_ids, num_new_tokens, *, attend, **settings):
    def step(token_ids):
        positions = torch.zeros(token_ids.shape[-1]).long()
        return model(token_ids, positions, attend)[..., -1, :]

    return loop(model, prompt_ids, num_new_tokens, settings, step)


@wrong("generate_recompute", says="Return the prompt too")
def new_tokens_alone(model, prompt_ids, num_new_tokens, *, attend, **settings):
    def step(token_ids):
        return model(token_ids, torch.arange(token_ids.shape[-1]), attend)[..., -1, :]

    text = loop(model, prompt_ids, num_new_tokens, settings, step)
    return text[..., prompt_ids.shape[-1] :]


@wrong("generate_recompute", says="exactly num_new_tokens")
def one_too_few(model, prompt_ids, num_new_tokens, *, attend, **settings):
    def step(token_ids):
        return model(token_ids, torch.arange(token_ids.shape[-1]), attend)[..., -1, :]

    return loop(model, prompt_ids, num_new_tokens, settings, step, start=1)


@wrong("generate_recompute")
def always_greedy(model, prompt_ids, num_new_tokens, *, attend, **settings):
    def step(token_ids):
        return model(token_ids, torch.arange(token_ids.shape[-1]), attend)[..., -1, :]

    return loop(
        model, prompt_ids, num_new_tokens, {"temperature": 0, "generator": None}, step
    )


@wrong("generate_recompute", says="One call of the model for each new token")
def two_calls_a_token(model, prompt_ids, num_new_tokens, *, attend, **settings):
    def step(token_ids):
        model(token_ids, torch.arange(token_ids.shape[-1]), attend)
        return model(token_ids, torch.arange(token_ids.shape[-1]), attend)[..., -1, :]

    return loop(model, prompt_ids, num_new_tokens, settings, step)


@wrong("generate_recompute", says="torch.no_grad()")
def graph_kept(
    model, prompt_ids, num_new_tokens, *, temperature=1.0, top_k=None, top_p=1.0, **rest
):
    token_ids = prompt_ids
    for _ in range(num_new_tokens):
        positions = torch.arange(token_ids.shape[-1])
        logits = model(token_ids, positions, rest["attend"])[..., -1, :]
        chosen = pick(logits, temperature, top_k, top_p, rest["generator"])
        token_ids = torch.cat((token_ids, chosen[..., None]), -1)
    return token_ids


@wrong("generate_recompute")
def one_prompt_only(model, prompt_ids, num_new_tokens, *, attend, **settings):
    def step(token_ids):
        return model(token_ids, torch.arange(len(token_ids)), attend)[-1]

    return loop(model, prompt_ids, num_new_tokens, settings, step)


# attention_flops


@right("attention_flops")
def closed_form(config, prompt_len, num_new_tokens):
    def squares(n):  # 1² + 2² + ... + n²
        return n * (n + 1) * (2 * n + 1) // 6

    steps = squares(prompt_len + num_new_tokens - 1) - squares(prompt_len - 1)
    return 4 * config.d_model * config.num_layers * steps


@right("attention_flops")
def layer_by_layer(config, prompt_len, num_new_tokens):
    total = 0
    for _ in range(config.num_layers):
        for _ in range(config.num_heads):
            for T in range(prompt_len, prompt_len + num_new_tokens):
                total += 2 * T * config.head_dim * T + 2 * T * T * config.head_dim
    return total


@wrong("attention_flops", says="two FLOPs a multiply-add")
def multiply_adds(config, prompt_len, num_new_tokens):
    return closed_form(config, prompt_len, num_new_tokens) // 2


@wrong("attention_flops", says="Every layer")
def one_layer(config, prompt_len, num_new_tokens):
    return closed_form(config, prompt_len, num_new_tokens) // config.num_layers


@wrong("attention_flops", says="Every query head")
def one_head(config, prompt_len, num_new_tokens):
    return closed_form(config, prompt_len, num_new_tokens) // config.num_heads


@wrong("attention_flops", says="last step alone")
def last_step(config, prompt_len, num_new_tokens):
    T = prompt_len + num_new_tokens - 1
    return 4 * T * T * config.d_model * config.num_layers * (num_new_tokens > 0)


@wrong("attention_flops")
def all_steps_as_the_last(config, prompt_len, num_new_tokens):
    return last_step(config, prompt_len, num_new_tokens) * num_new_tokens


@wrong("attention_flops", says="The masked half is computed too")
def visible_half(config, prompt_len, num_new_tokens):
    steps = range(prompt_len, prompt_len + num_new_tokens)
    return sum(2 * T * (T + 1) * config.d_model * config.num_layers for T in steps)


@wrong("attention_flops", says="T goes from prompt_len")
def one_step_too_late(config, prompt_len, num_new_tokens):
    return closed_form(config, prompt_len + 1, num_new_tokens)


@wrong("attention_flops", says="whole numbers")
def as_a_float(config, prompt_len, num_new_tokens):
    return float(closed_form(config, prompt_len, num_new_tokens))
