"""Real weights: random checkpoints of every family, beside transformers."""

import copy

import pytest
import torch

from lib import state, weights
from lib.model import attend_fused

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
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
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **settings})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # biases and norms too, and not almost nothing
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
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
    assert expected.std() > 0.5
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
