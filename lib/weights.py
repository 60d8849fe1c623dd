"""Real weights: a model that others trained becomes this course's Transformer.

    model = load_checkpoint("SmolLM2-135M-Instruct")    # a folder, or a file.gguf

Llama 2, 3, 3.1 and 3.2, TinyLlama, SmolLM2, Mistral, Qwen2.5 and Qwen3 are one design:
what tells them apart are the last fields of lib/config.py. A checkpoint is a folder in
the layout of Hugging Face (config.json, and safetensors, in one file or in shards), or
one GGUF file, as llama.cpp has them (https://github.com/ggml-org/ggml/blob/master/docs/
gguf.md), whose numbers may be quantized: they are taken apart again, into the dtype asked
for.

What the Transformer does not compute, it must not seem to compute. So a setting that it
has no field for raises `UnsupportedError` with the setting's name, and so does a tensor
that it has no place for. Tensors are read one after the other, so that the model is
never in memory twice.

Needs `pip install -e '.[models]'`. Read lib/config.py and lib/model.py before.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil  # comes with Jupyter
import torch
from tqdm import tqdm

from lib.config import ModelConfig, RopeScaling, check_count
from lib.model import Transformer, scale_frequencies

FAMILIES = {  # by model_type of config.json: the class it must be written for
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Settings of a config.json that change nothing of what a model computes, beside those
# whose name begins with "_". Any other that has no field in ModelConfig is refused, where
# it is neither null nor false nor zero.
HARMLESS = {
    *("architectures", "model_type", "transformers_version", "dtype", "torch_dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"),
    *("use_cache", "initializer_range", "attention_dropout", "hidden_dropout"),
    *("pretraining_tp", "auto_map", "is_llama_config", "transformers.js_config"),
    *("id2label", "label2id", "problem_type", "return_dict", "tokenizer_class"),
    *("task_specific_params", "unsloth_version", "unsloth_fixed", "use_bfloat16"),
    # Of drawing tokens, as old configs have them.
    *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping"),
    *("num_beams", "num_beam_groups", "num_return_sequences", "diversity_penalty"),
    *("temperature", "top_k", "top_p", "typical_p", "length_penalty"),
    *("repetition_penalty", "no_repeat_ngram_size"),
}
FLOATS = torch.float64, torch.float32, torch.float16, torch.bfloat16
# What GGUF files of Llama 3.1 and later were made with: they hold only what comes of it.
LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_seq_len": 8192,
}
# Of Mistral 0.1: llama.cpp does not write its window down, but this is its shape.
MISTRAL_01 = {
    "d_model": 4096,
    "d_ff": 14336,
    "num_kv_heads": 8,
    "max_seq_len": 32768,
    "rope_theta": 10000.0,
}
INSTALL = "pip install -e '.[models]', in the folder of the course, installs it"


class UnsupportedError(ValueError):
    """A model that this course's Transformer would compute wrongly."""


@dataclass(frozen=True)
class Checkpoint:
    """What a folder or file says of its model; the weights are still on the disk."""

    path: Path
    config: ModelConfig
    # Tokens that a query sees, itself among them, in every layer; None where it sees all.
    window: int | None
    # Name in lib/model.py and tensor, as it was stored, one after the other.
    tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]]

    def load(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        past_window: bool = False,
    ) -> Transformer:
        """The model, ready to generate, its weights in `dtype` on `device`.

        Of a model with a window max_seq_len is the window: so far every `attend` is right
        for it. past_window: it is as long as the model's own, and then the caller has to
        hand over an attend, or a cache, with this window (`Window` of lib/state.py).

        Raises MemoryError before anything is read where there is too little; ValueError
        that names the tensor that is missing, there twice, misshapen, or not of plain and
        finite numbers, or the file that cannot be read; UnsupportedError for a tensor
        that the model has no place for.
        """
        config = self.config
        if self.window and not past_window:
            config = replace(config, max_seq_len=min(config.max_seq_len, self.window))
        if dtype not in FLOATS:
            raise ValueError(f"dtype: expected one of {FLOATS}, got {dtype}")
        with torch.device("meta"):  # names and shapes, and no memory
            model = Transformer(config)
        check_memory(self.path, model, dtype, torch.device(device))
        model.load_state_dict(self._read(model, dtype, device), assign=True)
        if config.tied_embeddings:
            model.unembed[1].weight = model.embed.weight
        return model.eval()

    def _read(
        self, model: Transformer, dtype: torch.dtype, device: torch.device | str
    ) -> dict[str, torch.Tensor]:
        expected, weights = model.state_dict(), {}
        total = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        limit = torch.finfo(dtype).max
        with (
            readable(self.path),
            tqdm(
                desc=f"loading {self.path.name}",
                total=total,
                unit="B",
                unit_scale=True,
                leave=False,
                disable=None,  # where nobody watches
            ) as progress,
        ):
            for name, tensor in self.tensors():
                if name not in expected:
                    raise UnsupportedError(
                        f"{self.path}: expected tensors of {len(model.blocks)} layers "
                        f"as in lib/model.py, got {name}, which it has no place for"
                    )
                shape = tuple(expected[name].shape)
                if tuple(tensor.shape) != shape or tensor.dtype not in FLOATS:
                    raise ValueError(
                        f"{self.path}: {name}: expected {shape} of floats, "
                        f"got {tuple(tensor.shape)} of {tensor.dtype}"
                    )
                if name in weights:
                    raise ValueError(f"{self.path}: expected one {name}, got two")
                low, high = (x.item() for x in tensor.aminmax())
                if not -limit <= low <= high <= limit:
                    raise ValueError(
                        f"{self.path}: {name}: expected finite numbers in {dtype}, got "
                        f"{low} to {high}"
                    )
                weights[name] = tensor.to(device, dtype)
                progress.update(weights[name].nbytes)
        if model.config.tied_embeddings:
            embed = weights.get("embed.weight")
            other = weights.pop("unembed.1.weight", embed)
            if embed is not None:
                if not torch.equal(embed, other):
                    raise ValueError(
                        f"{self.path}: expected one matrix for embedding and "
                        f"unembedding, as the config says, got two that differ"
                    )
                weights["unembed.1.weight"] = embed
        missing = [name for name in expected if name not in weights]
        if missing:
            raise ValueError(
                f"{self.path}: expected {len(expected)} tensors, got "
                f"{len(weights)}: {missing[0]} is missing"
            )
        return weights


def load_checkpoint(path: str | Path, **settings: Any) -> Transformer:
    """The model in a folder or GGUF file. settings, and what is raised: as
    `open_checkpoint` and `Checkpoint.load` say."""
    return open_checkpoint(path).load(**settings)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """What is at `path`: a folder with config.json and safetensors, a GGUF file, or a
    folder with one.

    Raises FileNotFoundError where there is none of these, or a shard is missing;
    ValueError where the config cannot be read; UnsupportedError that names what of it
    the Transformer does not compute; ModuleNotFoundError that says how to install what
    reads such files.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: expected a folder with config.json and safetensors, or a GGUF "
            f"file, found nothing"
        )
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(
                f"{path}: expected a folder, or a file whose name ends with .gguf"
            )
        return _open_gguf(path)
    if (path / "config.json").exists():
        return _open_folder(path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _open_gguf(ggufs[0])
    got = [file.name for file in ggufs] or sorted(file.name for file in path.iterdir())
    raise FileNotFoundError(
        f"{path}: expected config.json, or one GGUF file, got {got[:8] or 'nothing'}"
    )


def check_memory(
    path: Path, model: Transformer, dtype: torch.dtype, device: torch.device
):
    """MemoryError unless the weights of `model`, and the largest of them once more, as it
    was stored or in 32 bits, fit into what is free."""
    sizes = [p.numel() for p in model.parameters()]
    needed = sum(sizes) * dtype.itemsize + max(sizes) * max(dtype.itemsize, 4)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = psutil.virtual_memory().available
    if needed > free:
        raise MemoryError(
            f"{path}: expected {needed / 1e9:.1f} GB free on {device} for weights in "
            f"{dtype}, got {free / 1e9:.1f} GB"
        )


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say which file a library could not read; what is said in our words stays."""
    try:
        yield
    except (ValueError, FileNotFoundError, ModuleNotFoundError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"{path}: expected a whole file, got one that cannot be read: "
            f"{type(error).__name__}: {error}"
        ) from error


def _open_folder(path: Path) -> Checkpoint:
    facts = read_json(path / "config.json")
    with readable(path / "config.json"):
        config, window = config_of_folder(facts, path / "config.json")
    files = _weight_files(path)

    def tensors():
        try:
            from safetensors import safe_open
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{path}: expected the package safetensors to read it: {INSTALL}"
            ) from error
        for file in files:
            with readable(file), safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118  it is no dict
                    # Old checkpoints carry the frequencies, which follow from the config.
                    if not name.endswith("rotary_emb.inv_freq"):
                        yield our_name(name), stored.get_tensor(name)

    return Checkpoint(path, config, window, tensors)


def _weight_files(path: Path) -> list[Path]:
    """The files of weights in a folder, in order; FileNotFoundError where one is not
    there. Beside one file with all of them an index counts for nothing, as for
    transformers."""
    index = path / "model.safetensors.index.json"
    files = [path / "model.safetensors"]
    if index.exists() and not files[0].exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: expected a 'weight_map', got none")
        with readable(index):
            files = [path / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        got = sorted(file.name for file in path.iterdir() if file.name != "config.json")
        raise FileNotFoundError(
            f"{path}: expected {', '.join(missing)}, got {got[:8] or 'nothing'}"
        )
    return files


def read_json(path: Path) -> dict:
    """What is in a file; ValueError where that is no JSON, or no object."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path}: expected an object, got {type(facts).__name__}")
    return facts


def our_name(name: str) -> str:
    """Of a weight in the layout of Hugging Face, the name in lib/model.py.

    >>> our_name("model.layers.0.self_attn.q_proj.weight")
    'blocks.0.attention.q_proj.weight'
    """
    if name == "model.norm.weight":
        return "unembed.0.weight"
    return (
        name.removeprefix("model.")
        .replace("embed_tokens", "embed")
        .replace("layers", "blocks")
        .replace("self_attn", "attention")
        .replace("post_attention_layernorm", "mlp_norm")
        .replace("input_layernorm", "attention_norm")
        .replace("lm_head", "unembed.1")
    )


def config_of_folder(facts: dict, path: Path) -> tuple[ModelConfig, int | None]:
    """Our config, and the window, from what a config.json says. What it does not say is
    what transformers takes for it."""
    facts = dict(facts)
    family = facts.get("model_type")
    written_for = facts.get("architectures") or [FAMILIES.get(family)]
    if family not in FAMILIES or written_for != [FAMILIES[family]]:
        raise UnsupportedError(
            f"{path}: expected a model_type among {', '.join(FAMILIES)}, for causal "
            f"language modelling, got {family!r}, {written_for}"
        )

    def take(name: str, *default: Any) -> Any:
        value = facts.pop(name, None)
        if value is None and not default:
            raise ValueError(f"{path}: expected {name!r}, got none")
        return default[0] if value is None else value

    if (act := take("hidden_act", "silu")) != "silu":
        raise UnsupportedError(f"{path}: hidden_act: expected 'silu', got {act!r}")
    if (is_causal := take("is_causal", True)) is not True:
        raise UnsupportedError(f"{path}: is_causal: expected True, got {is_causal!r}")
    num_heads = take("num_attention_heads")
    theta, scaling = _rope(facts, path)
    window = _window(facts, family, path)
    # The others always have this, or would have a bias behind attention too.
    if family == "qwen2":
        facts.pop("attention_bias", None)
    settings = {
        "vocab_size": take("vocab_size"),
        "num_layers": take("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": take(
            "num_key_value_heads", *([num_heads] if family == "llama" else [])
        ),
        "d_model": take("hidden_size"),
        "d_ff": take("intermediate_size"),
        "max_seq_len": take("max_position_embeddings"),
        "rope_theta": theta,
        "norm_eps": take("rms_norm_eps"),
        "d_head": take("head_dim", *([] if family == "qwen3" else [None])),
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
        "tied_embeddings": take("tie_word_embeddings", False),
        "rope_scaling": scaling,
    }
    others = {
        name: value
        for name, value in facts.items()
        if name not in HARMLESS and not name.startswith("_")
    }
    return _made(settings, window, others, path)


def _made(
    settings: dict[str, Any], window: int | None, others: dict[str, Any], path: Path
) -> tuple[ModelConfig, int | None]:
    """The config, and the window. others: what else was said of the model, by name, and
    may be said only of what it does not have."""
    for name, value in others.items():
        if value:
            raise UnsupportedError(
                f"{path}: {name}: expected none, for lib/model.py does not compute it, "
                f"got {value!r}. If it changes nothing of what the model computes, "
                f"delete it there"
            )
    try:
        if window is not None:
            check_count("sliding_window", window)
        return ModelConfig(**settings), window
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _rope(facts: dict, path: Path) -> tuple[float, dict[str, float] | None]:
    """Theta, and the fields of scaling. Until version 4 of transformers theta stood
    beside rope_scaling, since version 5 it stands with it, in rope_parameters."""
    before, since = (
        facts.pop(name, None) or {} for name in ("rope_scaling", "rope_parameters")
    )
    if before and since:
        raise UnsupportedError(
            f"{path}: expected rope_scaling or rope_parameters, got both"
        )
    given = {"rope_theta": facts.pop("rope_theta", None), **before, **since}
    theta = given.pop("rope_theta")
    theta = 10000.0 if theta is None else theta
    legacy, kind = given.pop("type", "default"), given.pop("rope_type", None)
    kind = kind or legacy
    if kind == "default" and not given:
        return theta, None
    names = "factor", "low_freq_factor", "high_freq_factor"
    long_name = "original_max_position_embeddings"
    if kind != "llama3" or set(given) != {*names, long_name}:
        raise UnsupportedError(
            f"{path}: rope_scaling: expected 'default', or 'llama3' with {names} and "
            f"{long_name}, got {kind!r} with {given}"
        )
    return theta, {"original_max_seq_len": given.pop(long_name), **given}


def _window(facts: dict, family: str, path: Path) -> int | None:
    """Tokens that each query sees. Mistral has one unless it says null; Qwen has none
    unless it says that it uses it, and then not in all layers."""
    window = facts.pop("sliding_window", 4096 if family == "mistral" else None)
    if family == "mistral":
        return window
    used, _ = facts.pop("use_sliding_window", False), facts.pop("max_window_layers", None)
    kinds = set(facts.pop("layer_types", None) or []) - {"full_attention"}
    if used or kinds or (window and family == "llama"):
        raise UnsupportedError(
            f"{path}: expected attention to all tokens in every layer, got "
            f"sliding_window = {window}, layer_types {sorted(kinds)}"
        )
    return None


GGUF_NAMES = {  # of a weight of a layer: blk.0.attn_q.weight
    "attn_norm": "attention_norm",
    "attn_q": "attention.q_proj",
    "attn_k": "attention.k_proj",
    "attn_v": "attention.v_proj",
    "attn_output": "attention.o_proj",
    "attn_q_norm": "attention.q_norm",
    "attn_k_norm": "attention.k_norm",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_OUTER = {"token_embd": "embed", "output_norm": "unembed.0", "output": "unembed.1"}


def open_gguf(path: Path) -> Any:
    """The reader of package gguf; raises as `open_checkpoint` does."""
    about = path.stat()
    return _gguf_reader(path, about.st_mtime_ns, about.st_size)


@functools.lru_cache(maxsize=1)  # it takes seconds, and the tokenizer wants it too
def _gguf_reader(path: Path, changed_at: int, num_bytes: int) -> Any:
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path}: expected the package gguf to read it: {INSTALL}"
        ) from error
    with readable(path):
        try:
            return gguf.GGUFReader(path)
        except ValueError as error:  # of numpy, and of gguf
            raise ValueError(
                f"{path}: expected a whole GGUF file, got {error}"
            ) from error


def gguf_facts(reader: Any) -> dict[str, Any]:
    """What a file says beside its tensors, by name; long lists are not read."""
    return {
        name: field.contents()
        for name, field in reader.fields.items()
        if len(field.data) <= 1 or not name.startswith("tokenizer.")
    }


def _open_gguf(path: Path) -> Checkpoint:
    reader = open_gguf(path)
    facts = gguf_facts(reader)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    with readable(path):
        config, window = config_of_gguf(facts, stored, path)
    is_llama = facts["general.architecture"] == "llama"

    def tensors():
        from gguf.quants import dequantize

        for name, tensor in stored.items():
            if name == "rope_freqs.weight":  # in the config
                continue
            try:
                numbers = dequantize(tensor.data, tensor.tensor_type)
            except (NotImplementedError, ValueError) as error:
                raise UnsupportedError(
                    f"{path}: {name}: expected numbers of a kind that package gguf "
                    f"takes apart, got {tensor.tensor_type.name}: {error}"
                ) from error
            if not numbers.flags.writeable:  # they are still in the file
                numbers = numbers.copy()
            weight = torch.from_numpy(numbers)
            if is_llama and name.endswith(("attn_q.weight", "attn_k.weight")):
                weight = pairs_to_halves(weight, config.head_dim)
            yield gguf_name(name), weight

    return Checkpoint(path, config, window, tensors)


def gguf_name(name: str) -> str:
    """Of a tensor in a GGUF file, the name in lib/model.py.

    >>> gguf_name("blk.3.ffn_up.weight"), gguf_name("output_norm.weight")
    ('blocks.3.mlp.up_proj.weight', 'unembed.0.weight')
    """
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in GGUF_NAMES:
        return f"blocks.{parts[1]}.{GGUF_NAMES[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in GGUF_OUTER:
        return f"{GGUF_OUTER[parts[0]]}.{parts[1]}"
    return name


def pairs_to_halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of each head in the order of our RoPE, from that of llama.cpp's for Llama.

    It turns neighbours, (0, 1), (2, 3), ... against each other; ours, and that of the
    checkpoints it converts, the halves: (0, D/2), (1, D/2 + 1), ...
    weight: (heads · D, C).

    >>> pairs_to_halves(torch.tensor([[0.0], [2.0], [1.0], [3.0]]), head_dim=4).flatten()
    tensor([0., 1., 2., 3.])
    """
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))  # (heads, D/2, 2, C)
    return pairs.transpose(1, 2).flatten(0, 2)


def config_of_gguf(
    facts: dict, stored: dict[str, Any], path: Path
) -> tuple[ModelConfig, int | None]:
    """Our config, and the window, from what a GGUF file says. stored: its tensors, by
    their names there."""
    family = facts.get("general.architecture")
    if family not in ("llama", "qwen2", "qwen3"):
        raise UnsupportedError(
            f"{path}: expected the architecture llama, qwen2 or qwen3, got {family!r}"
        )
    facts = {
        name.removeprefix(f"{family}."): value
        for name, value in facts.items()
        if name.startswith((f"{family}.", "split."))
    }

    def take(name: str, *default: Any) -> Any:
        if name not in facts and not default:
            raise ValueError(f"{path}: expected '{family}.{name}', got none")
        return facts.pop(name, *default)

    if (parts := take("split.count", 1)) > 1:
        raise UnsupportedError(
            f"{path}: expected a model in one file, got one in {parts}: merge them with "
            f"llama.cpp's llama-gguf-split"
        )
    if (kind := take("rope.scaling.type", "none")) != "none":
        raise UnsupportedError(f"{path}: rope.scaling: expected none, got {kind!r}")
    if (is_causal := take("attention.causal", True)) is not True:
        raise UnsupportedError(
            f"{path}: attention.causal: expected True, got {is_causal!r}"
        )
    if "token_embd.weight" not in stored:
        raise ValueError(f"{path}: expected a tensor token_embd.weight, got none")
    d_model, num_heads = take("embedding_length"), take("attention.head_count")
    d_head = take("attention.key_length", d_model // num_heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if (other := take(name, d_head)) != d_head:
            raise UnsupportedError(f"{path}: {name}: expected {d_head}, got {other}")
    theta = float(take("rope.freq_base", 10000.0))
    window = take("attention.sliding_window", None) or None
    if window and family != "llama":
        raise UnsupportedError(f"{path}: attention.sliding_window: expected none")
    settings = {
        "vocab_size": int(stored["token_embd.weight"].shape[1]),
        "num_layers": take("block_count"),
        "num_heads": num_heads,
        "num_kv_heads": take("attention.head_count_kv", num_heads),
        "d_model": d_model,
        "d_ff": take("feed_forward_length"),
        "max_seq_len": take("context_length"),
        "rope_theta": theta,
        "norm_eps": float(take("attention.layer_norm_rms_epsilon")),
        "d_head": None if d_head * num_heads == d_model else d_head,
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
        "tied_embeddings": "output.weight" not in stored,
        "rope_scaling": _gguf_scaling(stored, theta, d_head, path),
    }
    if window is None and MISTRAL_01.items() <= settings.items():
        window = 4096
    take("vocab_size", None)
    others = {
        f"{family}.{name}": value
        for name, value in facts.items()
        if not name.startswith(("split.", "rope.scaling.orig"))
    }
    return _made(settings, window, others, path)


def _gguf_scaling(
    stored: dict[str, Any], theta: float, d_head: int, path: Path
) -> RopeScaling | None:
    """A GGUF file keeps by how much each pair is slower, D/2 numbers. Which settings they
    come from is tried: those of Llama 3.1, with the largest of the numbers."""
    if "rope_freqs.weight" not in stored:
        return None
    factors = torch.from_numpy(stored["rope_freqs.weight"].data.copy()).flatten()
    scaling = RopeScaling(factor=factors.max().item(), **LLAMA3_SCALING)
    frequencies = 1.0 / theta ** (torch.arange(0, d_head, 2) / d_head)
    expected = frequencies / scale_frequencies(frequencies, scaling)
    if factors.shape != expected.shape or not torch.allclose(
        factors.float(), expected, rtol=1e-4
    ):
        raise UnsupportedError(
            f"{path}: rope_freqs.weight: expected what Llama 3.1's settings give, "
            f"{LLAMA3_SCALING}, got {factors.tolist()}"
        )
    return scaling
