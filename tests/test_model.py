import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, random_model

from lib.config import TINY, ModelConfig
from lib.measure.bench_serving import llama
from lib.model import (
    WEIGHTS,
    Transformer,
    attend_causal,
    attend_fused,
    load_model,
    load_weights,
    rotate,
    save_model,
)

BOTH = pytest.mark.parametrize("attend", [attend_causal, attend_fused])

SLOWER = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_seq_len": 64,
}
# All that models of others have and ours does not.
OF_OTHERS = {
    "d_head": 12,
    "qkv_bias": True,
    "qk_norm": True,
    "tied_embeddings": True,
    "rope_scaling": SLOWER,
}


def naive_attention(q, k, v):
    """One query at a time, one head at a time: q (T, H, D), k and v (T, G, D)."""
    T, H, D = q.shape
    group_size = H // k.shape[1]
    out = torch.empty_like(q)
    for h in range(H):
        for t in range(T):
            scores = (
                torch.stack([q[t, h] @ k[s, h // group_size] for s in range(t + 1)])
                / D**0.5
            )
            out[t, h] = scores.softmax(0) @ v[: t + 1, h // group_size]
    return out


@BOTH
@pytest.mark.parametrize(
    "T, H, G, D", [(1, 1, 1, 2), (7, 4, 2, 6), (17, 6, 1, 5), (16, 3, 3, 8)]
)
def test_attention_is_what_it_is_one_query_at_a_time(attend, T, H, G, D):
    generator = torch.Generator().manual_seed(T)
    q, k, v = (
        torch.randn(T, heads, D, generator=generator, dtype=torch.float64)
        for heads in (H, G, G)
    )
    assert_close(attend(0, q, k, v), naive_attention(q, k, v))


@BOTH
def test_attention_takes_any_leading_dimensions(attend):
    q, k, v = (torch.randn(2, 3, 5, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    out = attend(0, q, k, v)
    for i in range(2):
        for j in range(3):
            assert_close(out[i, j], naive_attention(q[i, j], k[i, j], v[i, j]))


@BOTH
def test_nothing_looks_into_the_future(attend):
    model, token_ids = random_model(dtype=torch.float64), torch.randint(256, (1, 20))
    changed = token_ids.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 256
    before, after = (model(ids, torch.arange(20), attend) for ids in (token_ids, changed))
    assert_close(before[:, :12], after[:, :12])
    assert (before[:, 12:] - after[:, 12:]).abs().amax(-1).min() > 1e-3


def test_the_model_takes_a_batch_or_a_flat_sequence_alike():
    model, token_ids = random_model(), torch.randint(256, (3, 11))
    batch = model(token_ids, torch.arange(11), attend_fused)
    assert batch.shape == (3, 11, 256)
    for i in range(3):
        assert_close(model(token_ids[i], torch.arange(11), attend_fused), batch[i])


def test_logits_are_those_of_a_llama_of_the_same_weights():
    model = random_model(rope_theta=5000.0)
    for weight in model.parameters():
        if weight.dim() == 1:  # norms of one would hide a norm in the wrong place
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    theirs = llama(model, "eager")

    token_ids = torch.randint(256, (2, 50))
    with torch.no_grad():
        expected = theirs(token_ids).logits
        got = model(token_ids, torch.arange(50), attend_causal)
    assert expected.std() > 0.1, "logits too small to tell right from wrong"
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_rotation_depends_on_distance_alone_and_keeps_length():
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64)

    def score(q_position, k_position):
        turned = [
            rotate(x, torch.tensor([p]), 100.0)
            for x, p in ((q, q_position), (k, k_position))
        ]
        return (turned[0] * turned[1]).sum()

    assert_close(score(3, 1), score(103, 101))
    assert (score(3, 1) - score(3, 2)).abs() > 1e-3
    assert_close(rotate(q, torch.tensor([7]), 100.0).norm(), q.norm())
    assert torch.equal(rotate(q, torch.tensor([0]), 100.0), q)


def test_half_precision_rotates_far_positions_as_well_as_near_ones():
    x = torch.randn(1, 1, 8)
    far = torch.tensor([100_000])
    assert_close(rotate(x.bfloat16(), far, 10000.0), rotate(x, far, 10000.0).bfloat16())


@BOTH
def test_half_precision_does_not_overflow_on_large_queries_and_keys(attend):
    q = k = torch.full((3, 1, 64), 40.0, dtype=torch.float16)  # q · k is 102,400
    v = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float16).view(3, 1, 1).expand(3, 1, 64)
    out = attend(0, q, k, v)
    assert_close(out[:, 0, 0].float(), torch.tensor([1.0, 1.5, 2.0]))


def test_frequencies_are_those_of_transformers_to_the_bit():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=128, num_attention_heads=1, rope_theta=500000.0)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor([[40_960]]))
    one = torch.cat([torch.ones(64), torch.zeros(64)]).view(1, 1, 128)
    turned = rotate(one, torch.tensor([40_960]), 500000.0)[0, 0]
    assert torch.equal(turned[:64], cos[0, 0, :64])
    assert torch.equal(turned[64:], sin[0, 0, :64])


@BOTH
def test_more_keys_than_queries_are_refused(attend):
    q, k = torch.zeros(1, 2, 4), torch.zeros(5, 2, 4)
    with pytest.raises(AssertionError, match="expected 1 keys, one per query, got 5"):
        attend(0, q, k, k)


def test_a_new_model_starts_as_gpt_2_does():
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(TINY, num_layers=8, d_model=64, d_ff=128))
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert (weight == 1).all(), name
        else:
            is_residual = "o_proj" in name or "down_proj" in name
            std = 0.02 / 4 if is_residual else 0.02  # 4 = root of twice 8 layers
            assert weight.std().item() == pytest.approx(std, rel=0.1), name


def test_both_branches_of_a_block_have_dropout():
    block = random_model(dropout=0.5).blocks[0].train()
    calls = []
    block.dropout.register_forward_hook(lambda *args: calls.append(args))
    block(torch.randn(1, 3, 32), torch.arange(3), attend_fused)
    assert len(calls) == 2


def test_dropout_acts_in_training_only():
    model, token_ids = random_model(dropout=0.5), torch.randint(256, (1, 9))
    logits = [model(token_ids, torch.arange(9), attend_fused) for _ in range(2)]
    assert torch.equal(*logits)
    model.train()
    logits = [model(token_ids, torch.arange(9), attend_fused) for _ in range(2)]
    assert not torch.equal(*logits)


@pytest.mark.parametrize(
    "token_ids, positions, message",
    [
        (
            torch.tensor([0, 256]),
            torch.arange(2),
            r"token_ids: expected values in \[0, 256\)",
        ),
        (torch.tensor([-1, 5]), torch.arange(2), "got -1 to 5"),
        (torch.tensor([0.0, 1.0]), torch.arange(2), "expected int64"),
        (torch.tensor(3), torch.tensor(0), r"expected int64 \(..., T\)"),
        (
            torch.zeros(2, 5, dtype=torch.int64),
            torch.arange(4),
            r"positions: expected \(2, 5\)",
        ),
        (
            torch.zeros(2, dtype=torch.int64),
            torch.tensor([127, 128]),
            r"positions: .* \[0, 128\)",
        ),
    ],
)
def test_tokens_that_the_model_cannot_take_are_refused(token_ids, positions, message):
    with pytest.raises(ValueError, match=message):
        random_model()(token_ids, positions, attend_fused)


def test_an_attend_that_returns_another_shape_is_named():
    with pytest.raises(
        AssertionError, match=r"attend: expected out \(3, 4, 8\), got \(3, 2, 8\)"
    ):
        random_model()(torch.tensor([1, 2, 3]), torch.arange(3), lambda layer, q, k, v: v)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_heads": 5}, "multiple of num_heads = 5, got 32"),
        ({"num_kv_heads": 3}, "divisor of num_heads = 4, got 3"),
        ({"d_model": 12}, "even number"),
        ({"num_layers": 0}, "num_layers: expected an integer of at least 1, got 0"),
        ({"d_ff": 2.5}, "d_ff: expected an integer"),
        ({"max_seq_len": 0}, "max_seq_len: expected an integer of at least 1, got 0"),
        ({"num_layers": True}, "num_layers: expected an integer .*, got True"),
        ({"dropout": 1.0}, "dropout: expected a probability in .*, got 1.0"),
        ({"dropout": False}, "dropout: expected a probability in .*, got False"),
        ({"norm_eps": -1e-5}, "norm_eps: expected a number of at least 0, got -1e-05"),
        ({"norm_eps": float("nan")}, "norm_eps: .*, got nan"),
        ({"rope_theta": 0}, "rope_theta: expected a number above 0, got 0"),
        ({"rope_theta": "big"}, "rope_theta: .*, got 'big'"),
        ({"d_head": 0}, "d_head: expected an integer of at least 1, got 0"),
        ({"d_head": 7}, "head_dim: expected an even number .*, got 7"),
        ({"qk_norm": 1}, "qk_norm: expected True or False, got 1"),
        ({"tied_embeddings": 1}, "tied_embeddings: expected True or False, got 1"),
        ({"rope_scaling": 8.0}, "rope_scaling: expected RopeScaling or None, got 8.0"),
        ({"rope_scaling": {**SLOWER, "factor": 0}}, "expected numbers above 0"),
        ({"rope_scaling": {**SLOWER, "low_freq_factor": 4}}, "expected low_.* below"),
        (
            {"rope_scaling": {**SLOWER, "original_max_seq_len": 2.5}},
            "original_max_seq_len: expected an integer of at least 1, got 2.5",
        ),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_heads_of_a_width_of_their_own_need_not_divide_the_width_of_the_model():
    config = dataclasses.replace(TINY, num_heads=6, d_head=8)
    assert config.d_model % config.num_heads and config.head_dim == 8


@pytest.mark.parametrize("settings", [{"dropout": 0.25}, OF_OTHERS])
def test_a_saved_model_comes_back_whole(settings, tmp_path):
    model = random_model(**settings)
    save_model(model, tmp_path / "weights.pt")
    loaded = load_model(tmp_path / "weights.pt")
    assert loaded.config == model.config and not loaded.training
    for got, expected in zip(loaded.parameters(), model.parameters()):
        assert torch.equal(got, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]


def test_a_width_of_heads_may_be_any_and_tied_embeddings_are_stored_once():
    config = random_model(**OF_OTHERS).config
    assert config.head_dim == 12 and config.num_heads * 12 != config.d_model
    tied, untied = (random_model(tied_embeddings=tied) for tied in (True, False))
    counts = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert counts[1] - counts[0] == untied.embed.weight.numel()
    assert tied.embed.weight is tied.unembed[1].weight


def test_missing_weights_say_where_they_were_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected .*nowhere.pt, found nothing"):
        load_model(tmp_path / "nowhere.pt")


def test_a_file_that_holds_no_model_is_refused(tmp_path):
    path = tmp_path / "other.pt"
    save_model(random_model(), path)
    whole = path.read_bytes()
    saved = torch.load(path, weights_only=True)
    for spoil in (
        lambda: torch.save({"something": torch.zeros(2)}, path),
        lambda: path.write_bytes(whole[:500]),
        lambda: path.write_text("not at all"),
        lambda: torch.save({**saved, "config": {**saved["config"], "extra": 1}}, path),
    ):
        spoil()
        with pytest.raises(
            ValueError, match="expected a file with 'config' and 'weights'"
        ):
            load_model(path)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda w: w.pop("embed.weight"),
            r"embed.weight: expected \(256, 32\), got nothing",
        ),
        (
            lambda w: w.update(extra=torch.zeros(3)),
            r"extra: expected nothing, got \(3,\)",
        ),
        (
            lambda w: w.update({"blocks.1.mlp.up_proj.weight": torch.zeros(65, 32)}),
            r"blocks.1.mlp.up_proj.weight: expected \(64, 32\), got \(65, 32\)",
        ),
    ],
)
def test_weights_of_another_model_are_named(spoil, message):
    model = random_model()
    weights = dict(model.state_dict())
    spoil(weights)
    with pytest.raises(ValueError, match=message):
        load_weights(model, weights)


def test_the_shipped_weights_are_of_the_promised_size():
    model = load_model()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 1e6 <= num_parameters <= 3e6
    assert WEIGHTS.stat().st_size < 10e6
    assert isinstance(model, Transformer) and isinstance(model.config, ModelConfig)


def test_gradients_reach_every_parameter():
    model, token_ids = random_model(), torch.randint(256, (2, 9))
    logits = model(token_ids, torch.arange(9), attend_causal)
    F.cross_entropy(logits.flatten(0, 1), torch.randint(256, (18,))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_norm_without_epsilon_is_allowed_and_every_norm_has_the_models():
    assert dataclasses.replace(TINY, norm_eps=0).norm_eps == 0
    model = Transformer(dataclasses.replace(TINY, norm_eps=0.25))
    norms = [m for m in model.modules() if isinstance(m, torch.nn.RMSNorm)]
    assert [norm.eps for norm in norms] == [0.25] * (2 * TINY.num_layers + 1)


def test_fused_attention_takes_tensors_that_are_not_in_one_piece():
    q, k, v = (torch.randn(4, 2, 6, 8).permute(2, 1, 0, 3) for _ in range(3))
    expected = attend_fused(0, q.contiguous(), k.contiguous(), v.contiguous())
    assert_close(attend_fused(0, q, k, v), expected)


def test_two_matrices_for_tied_embeddings_are_refused():
    model = random_model(tied_embeddings=True)
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    load_weights(model, weights)
    weights["unembed.1.weight"] += 1
    with pytest.raises(ValueError, match="expected one matrix, got two"):
        load_weights(model, weights)
