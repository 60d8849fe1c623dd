from dataclasses import replace

import pytest
import torch
from helpers import assert_close, random_model

from lib.config import LLAMA3_8B, MOBY, TINY
from lib.kv_cache import kv_cache_bytes
from lib.kv_heads import bytes_per_token, pool_kv_heads, with_kv_heads
from lib.model import attend_causal


@pytest.mark.parametrize("config", [TINY, MOBY, LLAMA3_8B])
@pytest.mark.parametrize("bytes_per_number", [2, 4, 8])
def test_a_tokens_bytes_are_those_of_its_vectors(config, bytes_per_number):
    L, G, D = config.num_layers, config.num_kv_heads, config.head_dim
    plain = bytes_per_token(config, bytes_per_number)
    assert plain == kv_cache_bytes(config, 1, bytes_per_number)
    for k_bits, v_bits in ((8, 4), (2, 8), (2, 2)):
        got = bytes_per_token(config, bytes_per_number, bits=(k_bits, v_bits))
        in_bits = L * G * (D * (k_bits + v_bits) + 4 * 8 * bytes_per_number)
        assert got == in_bits / 8, f"expected {in_bits / 8}, got {got}"
    got = bytes_per_token(config, bytes_per_number, ranks=(3, 10))
    assert got == 13 * L * bytes_per_number
    whole = bytes_per_token(config, bytes_per_number, ranks=(G * D, G * D))
    assert whole == plain
    assert bytes_per_token(config) == bytes_per_token(config, 4)


def test_heads_of_one_group_become_their_mean():
    weight = torch.randn(4 * 6, 5, dtype=torch.float64)  # G = 4, D = 6
    heads = weight.view(4, 6, 5)
    expected = torch.cat([(heads[0] + heads[1]) / 2, (heads[2] + heads[3]) / 2])
    assert_close(pool_kv_heads(weight, 6, 2), expected)
    assert_close(pool_kv_heads(weight, 6, 1), heads.mean(0))
    assert torch.equal(pool_kv_heads(weight, 6, 4), weight)
    in_two = pool_kv_heads(pool_kv_heads(weight, 6, 2), 6, 1)
    assert_close(in_two, pool_kv_heads(weight, 6, 1))


@pytest.mark.parametrize("num_kv_heads", [3, 8, 0, -1, True, 1.0, "2"])
def test_heads_that_cannot_be_pooled_are_refused(num_kv_heads):
    words = "num_kv_heads: expected (a divisor of 4|an integer of at least 1).*, got"
    model = random_model(num_kv_heads=4)
    with pytest.raises(ValueError, match=words):
        pool_kv_heads(torch.zeros(32, 32), 8, num_kv_heads)
    with pytest.raises(ValueError, match=words):
        with_kv_heads(model, num_kv_heads)


def pooled_attention(num_kv_heads):
    """Attention over means of neighbouring heads, as `attend`."""

    def attend(layer, q, k, v):
        kv = (x.unflatten(-2, (num_kv_heads, -1)).mean(-2) for x in (k, v))
        return attend_causal(layer, q, *kv)

    return attend


@pytest.mark.parametrize("before, after", [(4, 2), (4, 1), (2, 1), (6, 2), (6, 3)])
def test_a_pooled_model_attends_to_means_of_keys_and_values(before, after):
    model = random_model(
        dtype=torch.float64,
        num_heads=12 if before == 6 else 4,
        d_model=48,
        num_kv_heads=before,
    )
    token_ids, positions = torch.randint(256, (2, 9)), torch.arange(9)
    pooled = with_kv_heads(model, after)
    got = pooled(token_ids, positions, attend_causal)
    expected = model(token_ids, positions, pooled_attention(after))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)
    other = model(token_ids, positions, attend_causal)
    assert (got - other).abs().max() > 0.01, "the control: pooling changes something"


def test_pooling_to_as_many_heads_is_a_copy():
    model = random_model()
    same = with_kv_heads(model, 2)
    for (name, one), (other_name, other) in zip(
        model.state_dict().items(), same.state_dict().items(), strict=True
    ):
        assert name == other_name and torch.equal(one, other)
    assert same.config == model.config


def test_pooling_twice_is_pooling_once():
    model = random_model(dtype=torch.float64, num_kv_heads=4)
    twice, once = with_kv_heads(with_kv_heads(model, 2), 1), with_kv_heads(model, 1)
    for one, other in zip(twice.parameters(), once.parameters(), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_the_weights_are_not_those_of_the_model(num_kv_heads):
    model = random_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    pooled = with_kv_heads(model, num_kv_heads)
    with torch.no_grad():
        for parameter in pooled.parameters():
            assert parameter.requires_grad and parameter.is_leaf
            parameter.add_(1)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert model.config.num_kv_heads == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_training", [True, False])
def test_mode_dtype_and_all_other_sizes_are_kept(is_training, dtype):
    model = random_model(dtype=dtype, dropout=0.1).train(is_training)
    pooled = with_kv_heads(model, 1)
    assert pooled.training == is_training and model.training == is_training
    assert all(module.training == is_training for module in pooled.modules())
    assert {parameter.dtype for parameter in pooled.parameters()} == {dtype}
    assert pooled.config == replace(model.config, num_kv_heads=1)
    assert [m.layer for m in (block.attention for block in pooled.blocks)] == [0, 1]


def test_a_pooled_model_learns():
    model = with_kv_heads(random_model(), 1)
    ids = torch.randint(256, (1, 5))
    model(ids, torch.arange(5), attend_causal).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_biases_are_pooled_as_the_rows_that_they_belong_to():
    model = random_model(qkv_bias=True)
    for block in model.blocks:
        for projection in (block.attention.k_proj, block.attention.v_proj):
            torch.nn.init.normal_(projection.bias)
    pooled = with_kv_heads(model, 1)
    for before, after in zip(model.blocks, pooled.blocks):
        bias = before.attention.k_proj.bias.view(2, -1).mean(dim=0)
        assert torch.equal(after.attention.k_proj.bias, bias)
        assert torch.equal(after.attention.q_proj.bias, before.attention.q_proj.bias)
