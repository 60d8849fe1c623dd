import codecs
import io
import math
import re
import unicodedata

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

from answers import right, wrong
from lib import sampling
from lib.generate import check_generation
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
    if token_ids.dim() != 1:
        raise ValueError("rows of texts")
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


@wrong("decode", says="an id that is no byte")
def from_signed_bytes(token_ids):
    data = token_ids.numpy().astype(np.uint8).view(np.int8).tobytes()
    return codecs.decode(data, "utf-8", "replace")


@wrong("decode", says="no line end is translated")
def through_a_text_file(token_ids):
    file = io.TextIOWrapper(io.BytesIO(bytes(token_ids.tolist())), "utf-8", "replace")
    return file.read()


@wrong("decode", says="no line end is translated")
def without_carriage_returns(token_ids):
    return from_signed_bytes(token_ids).replace("\r\n", "\n")


@wrong("decode", says="no line end is translated")
def line_by_line(token_ids):
    return "\n".join(from_signed_bytes(token_ids).splitlines())


@wrong("decode", says="White space at its ends belongs to the text")
def without_white_space(token_ids):
    return from_signed_bytes(token_ids).strip()


@wrong("decode", says="White space at its ends belongs to the text")
def without_white_space_before(token_ids):
    return from_signed_bytes(token_ids).lstrip()


@wrong("decode", says="White space at its ends belongs to the text")
def without_white_space_behind(token_ids):
    return from_signed_bytes(token_ids).rstrip()


@wrong("decode")
def words_alone(token_ids):
    return " ".join(from_signed_bytes(token_ids).split())


@wrong("decode", says="A zero byte is a character too")
def without_zeros(token_ids):
    return from_signed_bytes(token_ids).replace("\0", "")


@wrong("decode", says="A zero byte is a character too")
def up_to_a_zero(token_ids):
    return from_signed_bytes(token_ids).partition("\0")[0]


@wrong("decode", says="A zero byte is a character too")
def zeros_at_the_end_cut(token_ids):
    data = token_ids.numpy().astype(np.uint8)
    return np.array([data.tobytes()])[0].decode("utf-8", "replace")


@wrong("decode", says="utf-8-sig")
def without_a_byte_order_mark(token_ids):
    return bytes(token_ids.tolist()).decode("utf-8-sig", errors="replace")


@wrong("decode", says="not vanish")
def lone_continuation_bytes_dropped(token_ids):
    data = bytes(token_ids.tolist())
    is_tail = lambda byte: 0x80 <= byte < 0xC0  # noqa: E731
    kept = [b for i, b in enumerate(data) if i or not is_tail(b)]
    return bytes(kept).decode("utf-8", errors="replace")


@wrong("decode")
def surrogates(token_ids):
    return bytes(token_ids.tolist()).decode("utf-8", errors="surrogateescape")


@wrong("decode")
def backslashes(token_ids):
    return bytes(token_ids.tolist()).decode("utf-8", errors="backslashreplace")


@wrong("decode")
def question_marks(token_ids):
    return from_signed_bytes(token_ids).replace("\ufffd", "?")


@wrong("decode")
def one_mark_for_many(token_ids):
    return re.sub("\ufffd+", "\ufffd", from_signed_bytes(token_ids))


@wrong("decode")
def in_a_signed_byte(token_ids):
    return bytes(token_ids.numpy().astype(np.int8).tolist()).decode("utf-8", "replace")


@wrong("decode")
def latin_1_where_utf_8_fails(token_ids):
    data = bytes(token_ids.tolist())
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


@wrong("decode")
def a_mark_for_each_broken_byte(token_ids):
    data, text = bytes(token_ids.tolist()), ""
    while data:
        for size in (1, 2, 3, 4):
            try:
                text, data = text + data[:size].decode("utf-8"), data[size:]
                break
            except UnicodeDecodeError:
                pass
        else:
            text, data = text + "\ufffd", data[1:]
    return text


@wrong("decode")
def seven_bits(token_ids):
    return bytes((token_ids & 127).tolist()).decode("utf-8", "replace")


@wrong("decode", says="not normalized")
def composed(token_ids):
    return unicodedata.normalize("NFC", from_signed_bytes(token_ids))


@wrong("decode", says="not normalized")
def taken_apart(token_ids):
    return unicodedata.normalize("NFD", from_signed_bytes(token_ids))


@wrong("decode", says="not normalized")
def composed_of_what_looks_alike(token_ids):
    return unicodedata.normalize("NFKC", from_signed_bytes(token_ids))


@wrong("decode")
def printable(token_ids):
    return "".join(c for c in from_signed_bytes(token_ids) if c.isprintable())


@wrong("decode")
def no_wide_characters(token_ids):
    text = from_signed_bytes(token_ids)
    return "".join(c if ord(c) < 2**16 else "\ufffd" for c in text)


@wrong("decode")
def surrogate_halves_pass(token_ids):
    data = bytes(token_ids.tolist())
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace")


@wrong("decode", says="an id that is no byte")
def ids_modulo_256(token_ids):
    return bytes(i % 256 for i in token_ids.tolist()).decode("utf-8", errors="replace")


@wrong("decode", says="an id that is no byte")
def ids_cut_to_eight_bits(token_ids):
    data = token_ids.to(torch.uint8).tolist()
    return bytes(data).decode("utf-8", errors="replace")


@wrong("decode", says="texts of their own")
def rows_joined(token_ids):
    return bytes(token_ids.flatten().tolist()).decode("utf-8", errors="replace")


@wrong("decode", says="characters that look alike")
def no_break_space_as_a_space(token_ids):
    return incremental(token_ids).replace("\xa0", " ")


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


@right("attend_causal")
def with_a_large_number_for_infinity(layer, q, k, v):
    return attend(q, k, v, fill=-1e9)


@right("attend_causal")
def with_a_large_number_added(layer, q, k, v):
    return attend(q, k, v, add=-1e9)


def attend(q, k, v, scale=None, hide=None, repeat=None, fill=-math.inf, add=None):
    T, H, D = q.shape[-3:]
    repeat = repeat or (lambda x: x.repeat_interleave(H // x.shape[-2], dim=-2))
    k, v = repeat(k), repeat(v)
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * (D**-0.5 if scale is None else scale)
    hidden = torch.ones(T, T).triu(1).bool() if hide is None else hide(T)
    if add is not None:
        return ((scores + add * hidden).softmax(-1) @ v).transpose(-3, -2)
    return (scores.masked_fill(hidden, fill).softmax(-1) @ v).transpose(-3, -2)


@wrong("attend_causal", says="set the future's scores to -∞")
def hidden_by_minus_100(layer, q, k, v):
    return attend(q, k, v, fill=-100.0)


@wrong("attend_causal", says="set the future's scores to -∞")
def hidden_by_minus_1000(layer, q, k, v):
    return attend(q, k, v, fill=-1e3)


@wrong("attend_causal", says="set the future's scores to -∞")
def lowered_by_100(layer, q, k, v):
    return attend(q, k, v, add=-100.0)


@wrong("attend_causal", says="set the future's scores to -∞")
def lowered_by_1000(layer, q, k, v):
    return attend(q, k, v, add=-1e3)


@wrong("attend_causal", says="expected float32, got float64")
def always_in_double_precision(layer, q, k, v):
    return attend(q.double(), k.double(), v.double())


@wrong("attend_causal")
def always_in_single_precision(layer, q, k, v):
    return attend(q.float(), k.float(), v.float()).to(q.dtype)


@wrong("attend_causal", says="T x T scores will do")
def all_pairs_of_a_head(layer, q, k, v):
    T, H, D = q.shape[-3:]
    group_size, outs = H // k.shape[-2], []
    for h in range(H):
        keys, values = k[..., h // group_size, :], v[..., h // group_size, :]
        scores = (q[..., h, :].unsqueeze(-2) * keys.unsqueeze(-3)).sum(-1) / D**0.5
        hidden = torch.ones(T, T).triu(1).bool()
        outs.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ values)
    return torch.stack(outs, dim=-2)


@wrong("attend_causal", says="not implemented for 'Long', in `scores = ")
def softmax_of_integers(layer, q, k, v):
    scores = (q.transpose(-3, -2) @ k.transpose(-3, -2).mT).long().softmax(-1)
    return (scores @ v.transpose(-3, -2)).transpose(-3, -2)


@wrong("attend_causal", says="a tensor of bfloat16")
def in_half_precision(layer, q, k, v):
    return attend(q, k, v).bfloat16()


@wrong("attend_causal")
def a_batch_as_one_text(layer, q, k, v):
    flat = [x.reshape(-1, *x.shape[-2:]) for x in (q, k, v)]
    return attend(*flat).view(q.shape)


@wrong("attend_causal")
def first_sequence_masked_only(layer, q, k, v):
    if q.dim() == 3:
        return attend(q, k, v)
    out = attend(q, k, v, hide=lambda T: torch.zeros(T, T).bool())
    out[0] = attend(q[0], k[0], v[0])
    return out


@wrong("attend_causal")
def mask_of_the_first_dimension(layer, q, k, v):
    def hide(T):
        hidden = torch.ones(q.shape[0], q.shape[0]).triu(1).bool()
        return torch.nn.functional.pad(hidden, (0, T, 0, T))[:T, :T]

    return attend(q, k, v, hide=hide)


@wrong("attend_causal", says="not allowed here")
def fused_by_another_name(layer, q, k, v):
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    return sdpa(q, k, v, is_causal=True, enable_gqa=True).transpose(-3, -2)


@wrong("attend_causal", says="not allowed here")
def the_librarys_fused(layer, q, k, v):
    return attend_fused(layer, q, k, v)


@wrong("attend_causal", says="not allowed here")
def flexible(layer, q, k, v):
    q, k, v = (x.reshape(-1, *x.shape[-3:]).transpose(1, 2) for x in (q, k, v))
    causal = lambda score, b, h, t, s: torch.where(t >= s, score, -math.inf)  # noqa: E731
    out = flex_attention(q, k, v, score_mod=causal, enable_gqa=True)
    return out.transpose(1, 2)


@wrong("attend_causal", says="The future is not masked")
def no_mask(layer, q, k, v):
    return attend(q, k, v, hide=lambda T: torch.zeros(T, T).bool())


@wrong("attend_causal", says="does it see itself?")
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


@wrong("attend_causal", says="a query of zeros")
def masked_where_a_score_is_zero(layer, q, k, v):
    H = q.shape[-2]
    k, v = (x.repeat_interleave(H // x.shape[-2], dim=-2) for x in (k, v))
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).tril()
    scores = scores.masked_fill(scores == 0, -math.inf)
    return (scores.softmax(-1) @ v).transpose(-3, -2)


# next_token_probs


@right("next_token_probs")
def through_ranks(logits, temperature=1.0, top_k=None, top_p=1.0):
    sampling.check_sampling(temperature, top_k, top_p)
    logits = sampling.subtract_largest(logits)
    if temperature == 0:
        return greedy(logits)
    logits = logits / temperature
    mine, others = logits.unsqueeze(-1), logits.unsqueeze(-2)
    is_smaller_id = torch.ones(logits.shape[-1:] * 2, dtype=torch.bool).tril(-1)
    is_before = (others > mine) | (others == mine) & is_smaller_id
    is_kept = is_before.sum(-1) < (top_k or logits.shape[-1])
    probs = logits.masked_fill(~is_kept, -math.inf).softmax(-1)
    if top_p < 1:
        mass_before = (is_before * probs.unsqueeze(-2)).sum(-1)
        probs = probs * (mass_before < top_p)
    return probs / probs.sum(-1, keepdim=True)


def through_masks(logits, temperature=1.0, top_k=None, top_p=1.0, keeps=("k", "p")):
    """With all ties at the borders of top_k and of top_p, or at one of them."""
    if temperature == 0:
        return greedy(logits)
    values, order = (logits / temperature).sort(dim=-1, descending=True, stable=True)
    is_kept = torch.ones_like(values, dtype=torch.bool)
    if top_k is not None and top_k < values.shape[-1]:
        is_kept[..., top_k:] = False
        if "k" in keeps:
            is_kept = values >= values[..., top_k - 1 : top_k]
    probs = values.masked_fill(~is_kept, -math.inf).softmax(-1)
    if top_p < 1:
        before = F.pad(probs.cumsum(-1)[..., :-1], (1, 0))
        least = probs.masked_fill(before >= top_p, 1).amin(-1, keepdim=True)
        is_kept = probs >= least if "p" in keeps else before < top_p
        probs = probs * is_kept
    probs = probs / probs.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, order, probs)


@wrong("next_token_probs", says="the smaller id")
def ties_kept_at_top_k(logits, temperature=1.0, top_k=None, top_p=1.0):
    return through_masks(logits, temperature, top_k, top_p, keeps="k")


@wrong("next_token_probs", says="the smaller id")
def ties_kept_at_top_p(logits, temperature=1.0, top_k=None, top_p=1.0):
    return through_masks(logits, temperature, top_k, top_p, keeps="p")


@wrong("next_token_probs", says="the smaller id")
def ties_kept(logits, temperature=1.0, top_k=None, top_p=1.0):
    return through_masks(logits, temperature, top_k, top_p)


@wrong("next_token_probs", says="the smaller id")
def larger_ids_first(logits, temperature=1.0, top_k=None, top_p=1.0):
    if temperature == 0:
        return greedy(logits)
    values, order = (logits / temperature).sort(dim=-1, stable=True)
    values, order = values.flip(-1), order.flip(-1)
    probs = values[..., :top_k].softmax(-1)
    probs = probs * (F.pad(probs.cumsum(-1)[..., :-1], (1, 0)) < top_p)
    probs = probs / probs.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, order[..., :top_k], probs)


@right("next_token_probs")
def one_row_at_a_time(logits, temperature=1.0, top_k=None, top_p=1.0):
    sampling.check_sampling(temperature, top_k, top_p)
    logits, rows = sampling.subtract_largest(logits), []
    for row in logits.reshape(-1, logits.shape[-1]):
        if temperature == 0:
            probs = torch.zeros_like(row)
            probs[row.argmax()] = 1
        else:
            values, order = (row / temperature).sort(descending=True, stable=True)
            values[top_k or len(values) :] = -math.inf
            ranked = values.softmax(0)
            total, num_kept = 0.0, 0
            while (total < top_p or top_p == 1) and num_kept < len(ranked):
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


@wrong("next_token_probs", says="with exactly top_p it is enough")
def one_more_than_reaches_top_p(logits, temperature=1.0, top_k=None, top_p=1.0):
    if temperature == 0:
        return greedy(logits)
    keep = lambda probs: ~(probs.cumsum(-1) - probs > top_p)  # noqa: E731
    return rank_and_cut(logits, temperature, top_k, top_p, keep)


@wrong("next_token_probs", says="with exactly top_p it is enough")
def shifted_by_one(logits, temperature=1.0, top_k=None, top_p=1.0):
    if temperature == 0:
        return greedy(logits)
    keep = lambda probs: ~F.pad((probs.cumsum(-1) > top_p)[..., :-1], (1, 0))  # noqa: E731
    return rank_and_cut(logits, temperature, top_k, top_p, keep)


@wrong("next_token_probs", says="Keep the token that reaches top_p too")
def without_the_last_but_at_least_one(logits, temperature=1.0, top_k=None, top_p=1.0):
    if temperature == 0:
        return greedy(logits)
    is_first = torch.arange(logits.shape[-1])[:top_k] == 0
    keep = lambda probs: (probs.cumsum(-1) <= top_p + 1e-9) | is_first  # noqa: E731
    return rank_and_cut(logits, temperature, top_k, top_p, keep)


@wrong("next_token_probs", says="each row")
def one_largest_logit_for_all_rows(logits, temperature=1.0, top_k=None, top_p=1.0):
    if temperature == 0:
        probs = torch.zeros_like(logits)
        probs.view(-1)[logits.argmax()] = 1
        return probs
    return through_ranks(logits, temperature, top_k, top_p)


@wrong("next_token_probs")
def rows_share_a_threshold(logits, temperature=1.0, top_k=None, top_p=1.0):
    if temperature == 0:
        return (logits == logits.max()).to(logits.dtype)
    return through_ranks(logits, temperature, top_k, top_p)


@wrong("next_token_probs")
def one_row_only(logits, temperature=1.0, top_k=None, top_p=1.0):
    probs = through_ranks(logits, temperature, top_k, top_p)
    if logits.dim() > 1 and temperature == 0:
        probs = F.one_hot(logits[0].argmax(-1), logits.shape[-1]).expand_as(logits)
    return probs.to(logits.dtype)


@wrong("next_token_probs", says="more than the top_k largest")
def top_k_forgotten(logits, temperature=1.0, top_k=None, top_p=1.0):
    return through_ranks(logits, temperature, None, top_p)


@wrong("next_token_probs", says="more than what reaches top_p")
def top_p_forgotten(logits, temperature=1.0, top_k=None, top_p=1.0):
    return through_ranks(logits, temperature, top_k)


@wrong("next_token_probs", says="Divide the logits by the temperature")
def temperature_forgotten(logits, temperature=1.0, top_k=None, top_p=1.0):
    if temperature == 0:
        return greedy(logits)
    return through_ranks(logits, 1.0, top_k, top_p)


@wrong("next_token_probs", says="Temperature 0 puts everything on the largest")
def as_if_0_were_1(logits, temperature=1.0, top_k=None, top_p=1.0):
    return through_ranks(logits, temperature or 1.0, top_k, top_p)


@wrong("next_token_probs")
def one_too_many_of_top_k(logits, temperature=1.0, top_k=None, top_p=1.0):
    return through_ranks(logits, temperature, top_k and top_k + 1, top_p)


@wrong("next_token_probs")
def one_too_few_of_top_k(logits, temperature=1.0, top_k=None, top_p=1.0):
    return through_ranks(logits, temperature, top_k and max(top_k - 1, 1), top_p)


@wrong("next_token_probs")
def cube_of_the_logits(logits, temperature=1.0, top_k=None, top_p=1.0):
    return through_ranks(logits**3 if temperature > 0.5 else logits, temperature or 1)


@wrong("next_token_probs")
def top_k_off_by_one_beside_top_p(logits, temperature=1.0, top_k=None, top_p=1.0):
    if top_k and top_p < 1:
        top_k += 1
    return through_ranks(logits, temperature, top_k, top_p)


@wrong("next_token_probs")
def temperature_squared(logits, temperature=1.0, top_k=None, top_p=1.0):
    return through_ranks(logits, temperature**2, top_k, top_p)


@wrong("next_token_probs")
def nothing_kept_is_not_divided(logits, temperature=1.0, top_k=None, top_p=1.0):
    return through_ranks(logits, temperature, top_k, top_p).softmax(-1)


@wrong("next_token_probs", says="expected float32, got float64")
def always_in_double(logits, temperature=1.0, top_k=None, top_p=1.0):
    return through_ranks(logits.double(), temperature, top_k, top_p)


@wrong("next_token_probs", says="Divide the logits by the temperature")
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


@wrong("next_token_probs", says="top_k first")
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
    return through_ranks(logits, temperature, top_k, top_p)


@wrong("next_token_probs", says="order of the vocabulary")
def left_in_rank_order(logits, temperature=1.0, top_k=None, top_p=1.0):
    if temperature == 0:
        return greedy(logits)
    return (logits / temperature).sort(dim=-1, descending=True).values.softmax(-1)


@wrong("next_token_probs", says="exp overflows")
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


@wrong("next_token_probs", says="every token is kept")
def a_rounded_sum_ends_the_text(logits, temperature=1.0, top_k=None, top_p=1.0):
    if temperature == 0:
        return greedy(logits)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    probs = values[..., :top_k].softmax(-1)
    before = F.pad(probs.cumsum(-1)[..., :-1], (1, 0))
    probs = probs.masked_fill(before >= top_p, 0.0)
    probs = probs / probs.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, order[..., :top_k], probs)


@wrong("next_token_probs", says="the one with the smaller id counts as the more")
def sorted_in_any_order(logits, temperature=1.0, top_k=None, top_p=1.0):
    sampling.check_sampling(temperature, top_k, top_p)
    logits = sampling.subtract_largest(logits)
    if temperature == 0:
        return greedy(logits)
    values, order = (logits / temperature).sort(dim=-1, descending=True)
    probs = values[..., :top_k].softmax(-1)
    if top_p < 1:
        before = F.pad(probs.cumsum(-1)[..., :-1], (1, 0))
        probs = probs.masked_fill(before >= top_p, 0.0)
    probs = probs / probs.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, order[..., :top_k], probs)


@wrong("next_token_probs", says="top_p=0.8005")
def a_little_less_than_top_p(logits, temperature=1.0, top_k=None, top_p=1.0):
    top_p = top_p - 1e-3 if top_p < 1 else top_p
    return through_ranks(logits, temperature, top_k, max(top_p, 1e-9))


@wrong("next_token_probs", says="Keep the given lines")
def settings_unchecked(logits, temperature=1.0, top_k=None, top_p=1.0):
    if temperature < 0:
        temperature = -temperature
    return through_ranks(logits, temperature, top_k, top_p)


@wrong("next_token_probs", says="temperature 0.1")
def greedy_where_it_is_cold(logits, temperature=1.0, top_k=None, top_p=1.0):
    temperature = 0 if 0 < temperature < 0.3 else temperature
    return through_ranks(logits, temperature, top_k, top_p)


@wrong("next_token_probs", says="This leaves more than the top_k largest")
def top_k_of_one_forgotten(logits, temperature=1.0, top_k=None, top_p=1.0):
    return through_ranks(logits, temperature, None if top_k == 1 else top_k, top_p)


@wrong("next_token_probs", says="expected float32, got float16")
def as_half_as_the_logits(logits, temperature=1.0, top_k=None, top_p=1.0):
    return through_ranks(logits, temperature, top_k, top_p).to(logits.dtype)


@wrong("next_token_probs", says="the first one counts")
def nearly_zero_for_zero(logits, temperature=1.0, top_k=None, top_p=1.0):
    return through_ranks(logits, temperature or 1e-5, top_k, top_p)


# generate_recompute


def pick(logits, temperature, top_k, top_p, generator):
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
    check_generation(model, prompt_ids, num_new_tokens)
    sampling.check_sampling(temperature, top_k, top_p)
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
    check_generation(model, prompt_ids, num_new_tokens)
    check_settings(settings)
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


@right("generate_recompute")
@torch.inference_mode()
def with_names_and_without_dice_where_greedy(
    model, prompt_ids, num_new_tokens, *, temperature, generator=None, **settings
):
    attend = settings.pop("attend")
    if not 0 < prompt_ids.shape[-1] <= model.config.max_seq_len - num_new_tokens:
        raise ValueError("too short or too long")
    if num_new_tokens < 0 or temperature < 0:
        raise ValueError("too few, or too cold")
    if model.training and model.config.dropout:
        raise ValueError("too random")
    token_ids = prompt_ids.clone()
    for end in range(token_ids.shape[-1], token_ids.shape[-1] + num_new_tokens):
        positions = torch.arange(end)
        logits = model(token_ids=token_ids, positions=positions, attend=attend)
        logits = logits[..., -1, :]
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            probs = sampling.next_token_probs(logits, temperature, **settings)
            new = torch.multinomial(probs, 1, generator=generator)
        token_ids = torch.cat((token_ids, new), dim=-1)
    return token_ids


def check_settings(settings):
    defaults = {"temperature": 1.0, "top_k": None, "top_p": 1.0}
    sampling.check_sampling(*(settings.get(name, defaults[name]) for name in defaults))


def loop(model, prompt_ids, num_new_tokens, settings, step, start=0, choose=pick):
    check_generation(model, prompt_ids, num_new_tokens)
    check_settings(settings)
    return unchecked_loop(
        model, prompt_ids, num_new_tokens, settings, step, start, choose
    )


def unchecked_loop(
    model, prompt_ids, num_new_tokens, settings, step, start=0, choose=pick
):
    settings = {"temperature": 1.0, "top_k": None, "top_p": 1.0, **settings}
    token_ids = prompt_ids
    with torch.no_grad():
        for _ in range(start, num_new_tokens):
            logits = step(token_ids)
            token_ids = torch.cat((token_ids, choose(logits, **settings)[..., None]), -1)
    return token_ids


def rightly(model, attend):
    """One step as it should be."""

    def step(token_ids):
        return model(token_ids, torch.arange(token_ids.shape[-1]), attend)[..., -1, :]

    return step


def until(is_end, model, prompt_ids, num_new_tokens, attend, **settings):
    check_generation(model, prompt_ids, num_new_tokens)
    check_settings(settings)
    token_ids, step = prompt_ids, rightly(model, attend)
    settings = {"temperature": 1.0, "top_k": None, "top_p": 1.0, **settings}
    with torch.no_grad():
        for _ in range(num_new_tokens):
            new = pick(step(token_ids), **settings)
            token_ids = torch.cat((token_ids, new[..., None]), -1)
            if is_end(new):
                break
    return token_ids


@wrong("generate_recompute", says="exactly num_new_tokens")
def ends_with_byte_0(*args, **settings):
    return until(lambda new: new.dim() == 0 and new == 0, *args, **settings)


@wrong("generate_recompute", says="exactly num_new_tokens")
def ends_with_byte_3(*args, **settings):
    return until(lambda new: new.dim() == 0 and new == 3, *args, **settings)


@wrong("generate_recompute", says="exactly num_new_tokens")
def ends_with_byte_4(*args, **settings):
    return until(lambda new: new.dim() == 0 and new == 4, *args, **settings)


@wrong("generate_recompute", says="exactly num_new_tokens")
def ends_with_byte_10(*args, **settings):
    return until(lambda new: new.dim() == 0 and new == 10, *args, **settings)


@wrong("generate_recompute", says="exactly num_new_tokens")
def ends_with_byte_13(*args, **settings):
    return until(lambda new: new.dim() == 0 and new == 13, *args, **settings)


@wrong("generate_recompute", says="exactly num_new_tokens")
def ends_with_byte_32(*args, **settings):
    return until(lambda new: new.dim() == 0 and new == 32, *args, **settings)


@wrong("generate_recompute", says="exactly num_new_tokens")
def ends_with_byte_255(*args, **settings):
    return until(lambda new: new.dim() == 0 and new == 255, *args, **settings)


@wrong("generate_recompute", says="exactly num_new_tokens")
def batch_ends_with_all(*args, **settings):
    return until(lambda new: new.dim() and (new == 10).all(), *args, **settings)


@wrong("generate_recompute", says="exactly num_new_tokens")
def batch_ends_with_any(*args, **settings):
    return until(lambda new: new.dim() and (new == 10).any(), *args, **settings)


@wrong("generate_recompute")
def rows_that_end_are_padded(model, prompt_ids, num_new_tokens, *, attend, **settings):
    is_done = torch.zeros(prompt_ids.shape[:-1], dtype=torch.bool)

    def choose(logits, **settings):
        new = pick(logits, **settings).masked_fill(is_done, 0)
        is_done.logical_or_(new == 10)
        return new

    step = rightly(model, attend)
    return loop(model, prompt_ids, num_new_tokens, settings, step, choose=choose)


@wrong("generate_recompute", says="Without a generator")
def dice_of_its_own(
    model, prompt_ids, num_new_tokens, *, attend, generator=None, **settings
):
    settings["generator"] = generator or torch.Generator().manual_seed(0)
    return loop(model, prompt_ids, num_new_tokens, settings, rightly(model, attend))


@wrong("generate_recompute", says="torch's own random state")
def dice_of_torch(model, prompt_ids, num_new_tokens, *, attend, generator, **settings):
    settings["generator"] = None
    return loop(model, prompt_ids, num_new_tokens, settings, rightly(model, attend))


@wrong("generate_recompute", says="torch's own random state")
def torch_seeded(model, prompt_ids, num_new_tokens, *, attend, **settings):
    torch.manual_seed(0)
    return loop(model, prompt_ids, num_new_tokens, settings, rightly(model, attend))


@wrong("generate_recompute", says="torch's own random state")
def torch_seeded_where_nothing_is_drawn(
    model, prompt_ids, num_new_tokens, *, attend, **settings
):
    if settings["temperature"] == 0 and prompt_ids.dim() == 2:
        torch.manual_seed(0)
    return loop(model, prompt_ids, num_new_tokens, settings, rightly(model, attend))


@wrong("generate_recompute")
def torch_seeded_without_a_generator(
    model, prompt_ids, num_new_tokens, *, attend, generator=None, **settings
):
    if generator is None:
        torch.manual_seed(0)
    settings["generator"] = generator
    return loop(model, prompt_ids, num_new_tokens, settings, rightly(model, attend))


@wrong("generate_recompute", says="prompt_ids is the caller's")
def prompt_grown(model, prompt_ids, num_new_tokens, *, attend, **settings):
    step = rightly(model, attend)
    prompt_ids.data = loop(model, prompt_ids, num_new_tokens, settings, step)
    return prompt_ids


@wrong("generate_recompute", says="prompt_ids is the caller's")
def prompt_overwritten(model, prompt_ids, num_new_tokens, *, attend, **settings):
    text = loop(model, prompt_ids, num_new_tokens, settings, rightly(model, attend))
    prompt_ids.copy_(text[..., num_new_tokens:])
    return text


@wrong("generate_recompute", says="Keep the given lines")
def without_checks(model, prompt_ids, num_new_tokens, *, attend, **settings):
    step = rightly(model, attend)
    return unchecked_loop(model, prompt_ids, num_new_tokens, settings, step)


@wrong("generate_recompute", says="Keep the given lines")
def empty_prompt_unchecked(model, prompt_ids, num_new_tokens, *, attend, **settings):
    if prompt_ids.shape[-1] > 0:
        check_generation(model, prompt_ids, num_new_tokens)
    step = rightly(model, attend)
    return unchecked_loop(model, prompt_ids, num_new_tokens, settings, step)


@wrong("generate_recompute", says="Keep the given lines")
def negative_number_unchecked(model, prompt_ids, num_new_tokens, *, attend, **settings):
    check_generation(model, prompt_ids, max(num_new_tokens, 0))
    step = rightly(model, attend)
    return unchecked_loop(model, prompt_ids, num_new_tokens, settings, step)


@wrong("generate_recompute", says="Keep the given lines")
def length_unchecked(model, prompt_ids, num_new_tokens, *, attend, **settings):
    check_generation(model, prompt_ids, min(num_new_tokens, 0))
    step = rightly(model, attend)
    return unchecked_loop(model, prompt_ids, num_new_tokens, settings, step)


@wrong("generate_recompute", says="Keep the given lines")
def cut_to_what_fits(model, prompt_ids, num_new_tokens, *, attend, **settings):
    room = model.config.max_seq_len - prompt_ids.shape[-1]
    step = rightly(model, attend)
    return loop(model, prompt_ids, min(num_new_tokens, room), settings, step)


@wrong("generate_recompute", says="raised ValueError")
def one_token_too_strict(model, prompt_ids, num_new_tokens, *, attend, **settings):
    check_generation(model, prompt_ids, num_new_tokens + 1)
    return loop(model, prompt_ids, num_new_tokens, settings, rightly(model, attend))


@wrong("generate_recompute")
def one_largest_for_all_rows(model, prompt_ids, num_new_tokens, *, attend, **settings):
    def choose(logits, **settings):
        if settings["temperature"] == 0:
            return (logits.argmax() % logits.shape[-1]).expand(logits.shape[:-1])
        return pick(logits, **settings)

    step = rightly(model, attend)
    return loop(model, prompt_ids, num_new_tokens, settings, step, choose=choose)


@wrong("generate_recompute", says="all three settings")
def temperature_not_handed_on(model, prompt_ids, num_new_tokens, *, attend, **settings):
    settings.pop("temperature", None)
    return loop(model, prompt_ids, num_new_tokens, settings, rightly(model, attend))


@wrong("generate_recompute", says="all three settings")
def top_k_not_handed_on(model, prompt_ids, num_new_tokens, *, attend, **settings):
    settings.pop("top_k", None)
    return loop(model, prompt_ids, num_new_tokens, settings, rightly(model, attend))


@wrong("generate_recompute", says="all three settings")
def top_p_not_handed_on(model, prompt_ids, num_new_tokens, *, attend, **settings):
    settings.pop("top_p", None)
    return loop(model, prompt_ids, num_new_tokens, settings, rightly(model, attend))


@wrong("generate_recompute", says="all three settings")
def settings_of_the_first_token_only(
    model, prompt_ids, num_new_tokens, *, attend, **settings
):
    step, T = rightly(model, attend), min(num_new_tokens, 1)
    text = loop(model, prompt_ids, T, settings, step)
    dice = {"generator": settings["generator"]}
    return loop(model, text, num_new_tokens - T, dice, step)


@wrong("generate_recompute")
def temperature_twice(model, prompt_ids, num_new_tokens, *, attend, **settings):
    def step(token_ids):
        return rightly(model, attend)(token_ids) / (settings["temperature"] or 1)

    return loop(model, prompt_ids, num_new_tokens, settings, step)


@wrong("generate_recompute")
def temperature_in_the_place_of_top_p(
    model, prompt_ids, num_new_tokens, *, attend, temperature=1.0, top_p=1.0, **settings
):
    settings |= {"temperature": top_p, "top_p": temperature}
    return loop(model, prompt_ids, num_new_tokens, settings, rightly(model, attend))


@wrong("generate_recompute", says="set_grad_enabled")
def gradients_left_off(model, prompt_ids, num_new_tokens, *, attend, **settings):
    torch.set_grad_enabled(False)
    return loop(model, prompt_ids, num_new_tokens, settings, rightly(model, attend))


@wrong("generate_recompute")
def row_before_the_last(model, prompt_ids, num_new_tokens, *, attend, **settings):
    def step(token_ids):
        logits = model(token_ids, torch.arange(token_ids.shape[-1]), attend)
        return logits[..., max(token_ids.shape[-1] - 2, 0), :]

    return loop(model, prompt_ids, num_new_tokens, settings, step)


@wrong("generate_recompute", says="all of the text")
def last_eight_tokens(model, prompt_ids, num_new_tokens, *, attend, **settings):
    def step(token_ids):
        return rightly(model, attend)(token_ids[..., -8:])

    return loop(model, prompt_ids, num_new_tokens, settings, step)


@wrong("generate_recompute", says="the device meta")
def shape_alone(model, prompt_ids, num_new_tokens, *, attend, **settings):
    step = rightly(model, attend)
    return loop(model, prompt_ids, num_new_tokens, settings, step).to("meta")


@wrong("generate_recompute")
def batch_as_one_text(model, prompt_ids, num_new_tokens, *, attend, **settings):
    def step(token_ids):
        flat = token_ids.flatten()
        logits = model(flat, torch.arange(len(flat)), attend)
        return logits.view(*token_ids.shape, -1)[..., -1, :]

    return loop(model, prompt_ids, num_new_tokens, settings, step)


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


@wrong("generate_recompute", says="a batch of one prompt")
def through_a_batch_of_one(model, prompt_ids, num_new_tokens, **settings):
    check_generation(model, prompt_ids, num_new_tokens)
    rows = prompt_ids.unsqueeze(0) if prompt_ids.dim() == 1 else prompt_ids
    return into_a_buffer(model, rows, num_new_tokens, **settings).squeeze(0)


@wrong("generate_recompute", says="the mode in which it came")
def left_in_training_mode(model, prompt_ids, num_new_tokens, **settings):
    text = into_a_buffer(model, prompt_ids, num_new_tokens, **settings)
    model.train()
    return text


@wrong("generate_recompute", says="exactly num_new_tokens")
def until_a_byte_repeats(model, prompt_ids, num_new_tokens, *, attend, **settings):
    seen = [None]

    def is_end(new):
        seen.append(int(new) if new.dim() == 0 else None)
        return new.dim() == 0 and seen[-1] == seen[-2]

    return until(is_end, model, prompt_ids, num_new_tokens, attend, **settings)


@wrong("generate_recompute", says="Keep the given lines")
def settings_unchecked_first(model, prompt_ids, num_new_tokens, *, attend, **settings):
    check_generation(model, prompt_ids, num_new_tokens)
    step = rightly(model, attend)
    return unchecked_loop(model, prompt_ids, num_new_tokens, settings, step)


@wrong("generate_recompute", says="a model that drops out")
def eval_mode_first(model, prompt_ids, num_new_tokens, *, attend, **settings):
    was_training = model.training
    model.eval()
    step = rightly(model, attend)
    token_ids = loop(model, prompt_ids, num_new_tokens, settings, step)
    model.train(was_training)
    return token_ids


@wrong("generate_recompute", says="next_random_number")
def one_draw_too_many(
    model, prompt_ids, num_new_tokens, *, attend, generator=None, **settings
):
    settings["generator"], step = generator, rightly(model, attend)
    token_ids = loop(model, prompt_ids, num_new_tokens, settings, step)
    torch.rand(1, generator=generator)
    return token_ids


@wrong("generate_recompute", says="all three settings")
def top_k_or_top_p(model, prompt_ids, num_new_tokens, *, attend, **settings):
    if settings.get("top_k"):
        settings["top_p"] = 1.0
    step = rightly(model, attend)
    return loop(model, prompt_ids, num_new_tokens, settings, step)


@wrong("generate_recompute", says="all three settings")
def no_temperature_beside_top_k_and_top_p(
    model, prompt_ids, num_new_tokens, *, attend, **settings
):
    if settings.get("top_k") and settings.get("top_p", 1) < 1:
        settings["temperature"] = 1.0
    step = rightly(model, attend)
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


@wrong("attention_flops", says="two FLOPs per multiply-add")
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


@wrong("attention_flops")
def in_32_bits(config, prompt_len, num_new_tokens):
    steps = torch.arange(prompt_len, prompt_len + num_new_tokens, dtype=torch.int32)
    total = (4 * steps * steps * config.d_model * config.num_layers).sum(
        dtype=torch.int32
    )
    return total.item()


@wrong("attention_flops")
def squares_in_32_bits_of_numpy(config, prompt_len, num_new_tokens):
    steps = np.arange(prompt_len, prompt_len + num_new_tokens, dtype=np.int32)
    return 4 * config.d_model * config.num_layers * int((steps * steps).sum())


@wrong("attention_flops")
def rounded_on_the_way(config, prompt_len, num_new_tokens):
    steps = np.arange(prompt_len, prompt_len + num_new_tokens, dtype=np.float64)
    return int((4 * steps**2 * config.d_model * config.num_layers).sum())


@right("attention_flops")
def integer_of_numpy(config, prompt_len, num_new_tokens):
    return np.int64(closed_form(config, prompt_len, num_new_tokens))


@right("attention_flops")
def tensor_without_dimensions(config, prompt_len, num_new_tokens):
    return torch.tensor(closed_form(config, prompt_len, num_new_tokens))


@wrong("attention_flops", says="whole numbers: give an int")
def float_of_numpy(config, prompt_len, num_new_tokens):
    return np.float64(closed_form(config, prompt_len, num_new_tokens))


@wrong("attention_flops", says="a str, not a number")
def with_commas(config, prompt_len, num_new_tokens):
    return f"{closed_form(config, prompt_len, num_new_tokens):,}"


@wrong("attention_flops")
def key_heads_only(config, prompt_len, num_new_tokens):
    flops = one_head(config, prompt_len, num_new_tokens)
    return flops * config.num_kv_heads


@wrong("attention_flops")
def no_more_than_fit(config, prompt_len, num_new_tokens):
    room = max(config.max_seq_len - prompt_len, 0)
    return closed_form(config, prompt_len, min(num_new_tokens, room))


@wrong("attention_flops", says="T goes from prompt_len")
def prompt_not_counted(config, prompt_len, num_new_tokens):
    return closed_form(config, 1, num_new_tokens)


@wrong("attention_flops")
def with_the_projections(config, prompt_len, num_new_tokens):
    return closed_form(config, prompt_len, num_new_tokens) + 2 * config.d_model**2


@wrong("attention_flops", says="tokens from")
def rounded_down_too_early(config, prompt_len, num_new_tokens):
    p, n = prompt_len, num_new_tokens
    squares = int(n * (p * p + p * (n - 1) + (n - 1) * (2 * n - 1) / 6))
    return 4 * config.head_dim * config.num_heads * config.num_layers * squares
