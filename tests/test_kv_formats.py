"""What holds of every format that keys and values can have in a cache, and of the engine
over them: who is there, in which pieces, and what was sent back changes no text."""

import copy
import functools
import math

import pytest
import torch
from helpers import (
    as_kept,
    assert_close,
    attentive_model,
    begun,
    filled,
    random_format,
    random_model,
    run_steps,
)

from lib.config import TINY
from lib.engine import Engine
from lib.generate import forward_cached, generate_cached, prefill_in_chunks
from lib.kv_cache import PLAIN, ContiguousKVCache, KVFormat, check_format
from lib.paged_attention import paged_decode_online, paged_prefill_gather
from lib.paged_kv_cache import PagedKVCache
from lib.prefix_cache import PrefixKVCache
from lib.quantized_kv_cache import QuantizedFormat

V = 32
BAD_ID = V - 1  # its embedding is NaN


@functools.cache
def model():
    return attentive_model(BAD_ID, vocab_size=V, num_heads=4, num_kv_heads=2)


@functools.cache
def formats():
    return {
        "8 bits": QuantizedFormat(8),
        "4 and 2 bits": QuantizedFormat(4, 2),
        "latent": random_format(model().config, 5, 3),
        "full rank": random_format(model().config, 8, 8),
    }


NAMES = ["8 bits", "4 and 2 bits", "latent", "full rank"]
CACHES = {
    "contiguous": lambda f, **s: ContiguousKVCache(
        model().config, 3, 40, dtype=torch.float64, format=f, **s
    ),
    "paged": lambda f, **s: PagedKVCache(
        model().config, 40, 4, dtype=torch.float64, format=f, **s
    ),
    "prefix": lambda f, **s: PrefixKVCache(
        model().config, 40, 4, dtype=torch.float64, format=f, **s
    ),
}
every_format = pytest.mark.parametrize("name", NAMES)
every_cache = pytest.mark.parametrize("kind", CACHES)


def alone(name, prompt_ids, num_new_tokens):
    """The greedy text of one request, whole and by itself."""
    settings = {"dtype": torch.float64, "format": formats()[name]}
    cache = begun(ContiguousKVCache(model().config, 1, 40, **settings), 1)
    prompt = torch.tensor(prompt_ids)
    (text,) = generate_cached(model(), [prompt], num_new_tokens, cache, temperature=0)
    return text.tolist()


def test_the_formats_write_other_texts():
    prompt_ids = list(range(1, 12))
    texts = [alone(name, prompt_ids, 12) for name in NAMES]
    assert len({tuple(text) for text in texts}) >= 3, f"expected other texts, got {texts}"


@every_format
@pytest.mark.parametrize("places", [(3,), (2, 5)])
def test_a_token_has_its_bytes_in_all_layers_and_a_format_begins_with_zeros(places, name):
    format, config = formats()[name], model().config
    caches = format.empty(config, places, torch.float32, "cpu")
    num_tokens = math.prod(places)
    per_token = format.bytes_per_token(config, 4)
    assert sum(cache.nbytes for cache in caches) == num_tokens * per_token
    for cache in caches:
        assert cache.shape[:-2] == (config.num_layers, *places) and not cache.any()
        assert cache.is_contiguous()


@every_cache
@every_format
@pytest.mark.parametrize("chunk_size", [1, 4, 5])
def test_a_prefill_in_pieces_is_that_of_the_whole(chunk_size, name, kind):
    prompts = [torch.randint(BAD_ID, (n,)) for n in (11, 1, 6)]
    last, ones = torch.tensor([3, 4, 5]), torch.ones(3, dtype=torch.int64)
    logits = []
    for size in (chunk_size, 99):
        cache = begun(CACHES[kind](formats()[name]), 3)
        prefill_in_chunks(model(), prompts, cache, size)
        assert cache.seq_lens.tolist() == [11, 1, 6]
        logits.append(forward_cached(model(), cache, last, ones))
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)


@every_cache
@every_format
def test_a_step_in_which_all_rest_changes_nothing(name, kind):
    cache = begun(CACHES[kind](formats()[name]), 3)
    forward_cached(model(), cache, torch.arange(6), torch.tensor([3, 2, 1]))
    seq_lens, k_cache = cache.seq_lens, cache.k_cache.clone()
    with cache.extend(torch.zeros(3, dtype=torch.int64)) as attend:
        for layer in range(2):
            heads = [torch.zeros(0, n, 4, dtype=torch.float64) for n in (4, 2, 2)]
            assert attend(layer, *heads).shape == (0, 4, 4)
    assert torch.equal(cache.seq_lens, seq_lens)
    assert torch.equal(cache.k_cache, k_cache)


@every_format
def test_every_cache_writes_what_a_request_writes_alone(name):
    prompts = [torch.randint(BAD_ID, (n,)) for n in (9, 1, 14)]
    expected = [alone(name, prompt_ids.tolist(), 10) for prompt_ids in prompts]
    for make in CACHES.values():
        cache = begun(make(formats()[name]), 3)
        texts = generate_cached(model(), prompts, 10, cache, temperature=0)
        assert [text.tolist() for text in texts] == expected


@every_format
@pytest.mark.parametrize("kind", ["paged", "prefix"])
def test_forks_share_what_is_there_and_go_their_own_way(kind, name):
    cache = CACHES[kind](formats()[name])
    cache.begin("parent")
    prompt_ids = [5, 6, 7, 8, 9, 10]
    forward_cached(model(), cache, torch.tensor(prompt_ids), torch.tensor([6]))
    before = cache.reserved_bytes
    for child in ("a", "b"):
        cache.fork("parent", child)
    assert cache.reserved_bytes == before
    firsts = [torch.tensor([i]) for i in (1, 2, 3)]
    texts = generate_cached(model(), firsts, 8, cache, temperature=0)
    for first, text in zip(firsts, texts):
        expected = alone(name, [*prompt_ids, *first.tolist()], 8)
        assert text.tolist() == expected[6:]
    cache.manager.check_integrity()


@every_format
@pytest.mark.parametrize("kind", ["paged", "prefix"])
@pytest.mark.parametrize("token_budget", [5, 64])
def test_an_engine_writes_what_each_request_writes_alone(token_budget, kind, name):
    make = PagedKVCache if kind == "paged" else PrefixKVCache
    settings = {"dtype": torch.float64, "format": formats()[name]}
    cache = make(model().config, 14, 4, **settings)
    engine = Engine(model(), cache, token_budget=token_budget)
    document = [7, 3, 9, 1, 12, 5, 30, 2]  # two blocks that some have in common
    prompts = [[*document, 4], [11], [*document, 8, 6, 13], [17, 2, 29, 2], document]
    requests, preempted = [], []
    for prompt_ids, n in zip(prompts, (1, 1, 3, 1, 1)):
        added = engine.add(prompt_ids, 12, temperature=0, n=n)
        requests += [(prompt_ids, r) for r in (added if n > 1 else [added])]
        preempted += engine.step().preempted
    found = cache.find([*document, 0])[0]
    for step in engine.run():
        preempted += step.preempted
    for prompt_ids, request in requests:
        assert request.token_ids == alone(name, prompt_ids, 12)
    assert preempted, "expected that some are sent back, or the pool is too large"
    assert found == (8 if kind == "prefix" else 0)
    engine.check_integrity()
    assert cache.num_free_blocks == 14 and cache.used_bytes == 0
    cache.manager.check_integrity()


def test_blocks_that_are_found_again_hold_the_codes_of_their_text():
    cache = CACHES["prefix"](formats()["4 and 2 bits"])
    prompt_ids = [7, 3, 9, 1, 12, 5, 30, 2, 4]
    cache.begin("first", prompt_ids)
    ids = torch.tensor(prompt_ids)
    expected = forward_cached(model(), cache, ids, torch.tensor([9]))
    cache.free("first")
    cache.begin("second", prompt_ids)
    assert cache.seq_lens.tolist() == [8]
    got = forward_cached(model(), cache, ids[8:], torch.tensor([1]))
    torch.testing.assert_close(got, expected[8:], rtol=1e-9, atol=1e-9)


def contents(cache):
    """Whom it has, how much of each, and the bytes of that."""
    facts = [list(cache.request_ids), cache.seq_lens.tolist()]
    facts += [cache.reserved_bytes, cache.used_bytes]
    pools = cache.k_cache, cache.v_cache
    if isinstance(cache, PagedKVCache):
        facts += [cache.block_tables.tolist(), copy.deepcopy(vars(cache.manager))]
        used = [i for i, count in enumerate(cache.manager.ref_count) if count]
        facts += [pool[:, used].tolist() for pool in pools]
    else:
        facts += [pool.tolist() for pool in pools]
    return facts


@every_cache
@pytest.mark.parametrize("counts", [[1, 1, 1], [3, 0, 6]])
@pytest.mark.parametrize("layer, which", [(0, 1), (1, 1), (1, 2)])
@pytest.mark.parametrize("bad_number", [torch.nan, torch.inf])
def test_numbers_that_cannot_be_quantized_spoil_their_own_request_alone(
    bad_number, layer, which, counts, kind
):
    cache = begun(CACHES[kind](QuantizedFormat(4, 2)), 3)
    forward_cached(model(), cache, torch.arange(13), torch.tensor([2, 5, 6]))
    other = copy.deepcopy(cache)
    heads = [torch.randn(sum(counts), n, 4, dtype=torch.float64) for n in (4, 2, 2)]
    bad = [x.clone() for x in heads]
    bad[which][-1, 1, 2] = bad_number
    outs = []
    for one, at_layer in ((cache, bad), (other, heads)):
        with one.extend(torch.tensor(counts)) as attend:
            given = [at_layer if i == layer else heads for i in range(2)]
            outs.append([attend(i, *x) for i, x in enumerate(given)][layer])
    got, expected = outs
    theirs = sum(counts[:2])
    assert torch.equal(got[:theirs], expected[:theirs])
    assert got[-1, 2:].isnan().all(), "the query heads of that KV head"
    ids, ones = torch.arange(3), torch.ones(3, dtype=torch.int64)
    got, expected = (forward_cached(model(), one, ids, ones) for one in (cache, other))
    assert torch.equal(got[:2], expected[:2]) and got[2].isnan().all()


@every_cache
@pytest.mark.parametrize("name", ["8 bits", "latent"])
def test_numbers_of_another_dtype_are_refused(name, kind):
    cache = begun(CACHES[kind](formats()[name]), 1)
    num_rows = len(cache.request_ids)
    lens = torch.tensor([2] + [0] * (num_rows - 1))
    heads = [torch.randn(2, n, 4, dtype=torch.float64) for n in (4, 2, 2)]
    for which in range(3):
        wrong = [x.float() if i == which else x for i, x in enumerate(heads)]
        with (
            pytest.raises(ValueError, match="attend: expected q, k, v in torch.float64"),
            cache.extend(lens) as attend,
        ):
            attend(0, *wrong)
        assert cache.used_bytes == 0 and not cache.k_cache.any()


@pytest.mark.parametrize("kind", [PagedKVCache, PrefixKVCache])
def test_a_request_without_numbers_ends_alone_and_nobody_finds_it(kind):
    settings = {"dtype": torch.float64, "format": QuantizedFormat(8)}
    engine = Engine(model(), kind(model().config, 20, 4, **settings))
    good = engine.add([4, 5, 6], 6, temperature=0)
    engine.step()
    ill = [3, 4, 5, 6, BAD_ID, 4, 5, 6, 7]
    bad = engine.add(ill, 6, temperature=0)
    engine.run()
    assert bad.token_ids == ill and bad.finish_reason not in (None, "stop", "length")
    assert good.token_ids == alone("8 bits", [4, 5, 6], 6)
    assert engine.cache.num_free_blocks == 20
    if kind is PrefixKVCache:  # its first block may be found, and no other
        assert engine.cache.find([*ill, 1])[0] <= 4
    engine.check_integrity()


@every_cache
@every_format
def test_a_copied_cache_of_any_format_goes_its_own_way(name, kind):
    cache = begun(CACHES[kind](formats()[name]), 3)
    prompts = [torch.randint(BAD_ID, (n,)) for n in (4, 2, 7)]
    ids, lens = torch.cat(prompts), torch.tensor([4, 2, 7])
    forward_cached(model(), cache, ids, lens)
    other = copy.deepcopy(cache)
    ones = torch.ones(3, dtype=torch.int64)
    expected = forward_cached(model(), other, ids[:3], ones)
    assert cache.seq_lens.tolist() == [4, 2, 7]
    assert other.k_cache.data_ptr() != cache.k_cache.data_ptr()
    assert torch.equal(forward_cached(model(), cache, ids[:3], ones), expected)
    assert other.used_bytes == cache.used_bytes


@every_cache
@every_format
def test_a_cache_of_any_format_may_be_one_of_inference_mode(name, kind):
    with torch.inference_mode():
        cache = begun(CACHES[kind](formats()[name]), 3)
        got = run_steps(cache)
    with pytest.raises(RuntimeError, match="expected under torch.inference_mode"):
        cache.begin("new")
    expected = run_steps(begun(CACHES[kind](formats()[name]), 3))
    for one, other in zip(got, expected):
        assert torch.equal(one, other)


@every_format
@pytest.mark.parametrize(
    "path",
    [
        {"fused_decode": True},
        {"decode": paged_decode_online},
        {"prefill": paged_prefill_gather},
    ],
)
def test_what_reads_plain_numbers_is_refused_for_others(path, name):
    (setting,) = path
    format = formats()[name]
    kinds = CACHES if setting == "fused_decode" else ["paged", "prefix"]
    words = f"{setting}: expected it with keys and values as they are, got it with "
    for kind in kinds:
        with pytest.raises(ValueError, match=words + type(format).__name__):
            CACHES[kind](format, **path)
        CACHES[kind](PLAIN, **path)
        CACHES[kind](KVFormat(), **path)


@every_cache
@pytest.mark.parametrize("wrong", [None, "plain", QuantizedFormat, 8])
def test_what_is_no_format_is_refused(wrong, kind):
    got = type(wrong).__name__
    with pytest.raises(ValueError, match=f"format: expected a KVFormat, got {got}"):
        CACHES[kind](wrong)


def test_a_format_of_ones_own_is_not_the_plain_one():
    class Doubled(KVFormat):
        def encode(self, layer, k, v):
            return k, 2 * v

    with pytest.raises(ValueError, match="fused_decode: .* got it with Doubled"):
        check_format(Doubled(), TINY, fused_decode=True, decode=None)
    check_format(Doubled(), TINY, fused_decode=False, decode=None)
    for make in CACHES.values():
        doubled, plain = (begun(make(f), 3) for f in (Doubled(), PLAIN))
        for one, other in zip(run_steps(doubled), run_steps(plain)):
            assert_close(one, 2 * other)


@every_cache
@every_format
def test_the_cache_of_another_model_is_refused_in_any_format(name, kind):
    cache = begun(CACHES[kind](formats()[name]), 3)
    other = random_model(vocab_size=V)
    words = (
        "cache: expected 2 layers, 2 KV heads of 8 numbers in torch.float32 on cpu, as "
        "the model, got 2 layers, 2 KV heads of 4 numbers in torch.float64 on cpu"
    )
    with pytest.raises(ValueError, match=words):
        forward_cached(other, cache, torch.arange(3), torch.ones(3).long())


@pytest.mark.parametrize("name", ["8 bits", "latent"])
def test_the_helpers_fill_caches_of_any_format(name):
    for make in CACHES.values():
        cache = filled(make(formats()[name]), {"a": 5, "b": 2})
        assert sum(cache.seq_lens.tolist()) == 7


def test_the_oracle_is_one():
    k = torch.tensor([[[0.0, 1.0, 2.0, 9.0]]])
    kept, _ = as_kept(QuantizedFormat(2), 0, k, k)
    assert kept.flatten().tolist() == [0, 0, 3, 9]
