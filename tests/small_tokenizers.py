"""Tokenizers of some hundred tokens, as folders and as GGUF files have them."""

import functools
import json
from pathlib import Path
from typing import Any

from lib.model import Transformer
from lib.text import load_book

SPECIAL = "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"  # ids 0 to 3
BEGIN, END, USER, ASSISTANT = range(4)
THINK = "<think>"  # found whole, and not special
CHATML = (
    "{% for message in messages %}\n"
    "    {% if message.role == 'system' and not loop.first %}\n"
    "        {{ raise_exception('a system message comes first') }}\n"
    "    {% endif %}\n"
    "<|{{ message.role }}|>{{ message.content | trim }}<|end|>\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def vocabulary() -> tuple[list[str], list[list[str]]]:
    """All tokens in order of their ids, and merges, learned from the book."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learned.train_from_iterator([load_book()[:20_000]], trainer)
    model = json.loads(learned.to_str())["model"]
    return [*sorted(model["vocab"], key=model["vocab"].get), THINK], model["merges"]


def learned_too(*merges: tuple[str, str]) -> dict[str, list[str]]:
    """Of a GGUF file, tokens and merges, as if these merges had been learned in place of
    the last ones."""
    tokens, others = [*vocabulary()[0]], vocabulary()[1]
    tokens[-1 - len(merges) : -1] = ["".join(merge) for merge in merges]
    others = [m for m in others if {*m, "".join(m)} <= set(tokens)]
    return {"tokens": tokens, "merges": [" ".join(merge) for merge in [*others, *merges]]}


def num_tokens() -> int:
    return len(vocabulary()[0])


def made(begins: bool = False) -> Any:
    """Of package tokenizers, as a tokenizer.json would be made. begins: each text with
    <|begin|>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    tokens, merges = vocabulary()
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(merge) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    tokenizer.add_tokens([AddedToken(THINK, normalized=False)])
    if begins:
        tokenizer.post_processor = TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", BEGIN)]
        )
    return tokenizer


def write_folder(folder: Path, begins: bool = False, **facts: Any) -> Path:
    """tokenizer.json, and tokenizer_config.json with these facts beside the usual."""
    folder.mkdir(exist_ok=True)
    made(begins).save(str(folder / "tokenizer.json"))
    usual = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHATML}
    usual |= {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    facts = {name: value for name, value in {**usual, **facts}.items() if value}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return folder


def write_gguf(path: Path, model: Transformer, /, **facts: Any) -> Path:
    """A file of llama.cpp's architecture llama, with the weights of a model as they lie.
    facts: of the tokenizer, in place of the usual; None for none."""
    import gguf

    tokens, merges = vocabulary()
    kinds = [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL) - 1) + [4]
    usual = {"model": "gpt2", "pre": "smollm", "bos_token_id": BEGIN, "eos_token_id": END}
    usual |= {"tokens": tokens, "merges": [" ".join(merge) for merge in merges]}
    usual |= {"token_type": kinds, "chat_template": CHATML}
    writer, config = gguf.GGUFWriter(path, "llama"), model.config
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    for name, value in {**usual, **facts}.items():
        key = f"tokenizer.{name}" if name == "chat_template" else f"tokenizer.ggml.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif value is not None:
            writer.add_string(key, value)
    for name, weight in model.state_dict().items():
        writer.add_tensor(_gguf_name(name), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str) -> str:
    """Of a weight in lib/model.py, the name in a GGUF file."""
    from lib.weights import GGUF_NAMES, GGUF_OUTER

    theirs = {ours: name for name, ours in {**GGUF_NAMES, **GGUF_OUTER}.items()}
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith("blocks."):
        return f"{theirs[stem]}.{kind}"
    _, layer, stem = stem.split(".", 2)
    return f"blk.{layer}.{theirs[stem]}.{kind}"
