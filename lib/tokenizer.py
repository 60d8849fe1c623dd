"""Text in tokens of a model that others trained, and back; and in chapter 1's bytes.

    checkpoint = open_checkpoint("SmolLM2-135M-Instruct")    # of lib/weights.py
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.config)

A token of such a model stands for some bytes, mostly for a word with the space before it.
Which, and how a text is cut into them, tokenizer.json says, which package tokenizers
reads. A GGUF file says less: a vocabulary, merges, and the name of a way to cut text into
words (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Of these a byte-level
BPE is built; how a name's models do the rest is written here.

A token may end in the middle of a character: `TextStream` waits for the other half.

Needs `pip install -e '.[models]'`, but for `ByteTokenizer`. Read lib/text.py and
lib/weights.py before.
"""

import functools
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lib import text, weights
from lib.config import ModelConfig

SPECIAL = "bos_token", "eos_token", "unk_token", "pad_token"  # a template may name them
PRE = "smollm", "llama-bpe", "qwen2", "gpt-2", "default"  # values of tokenizer.ggml.pre
# Words of Llama 3 and of Qwen, which differ in how many digits are a word.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = {"llama-bpe": "{1,3}", "qwen2": ""}
CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type: found whole, before words


class TextStream:
    """Text of tokens that come one after the other."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self.decode = decode
        # The tokens that were shown last, since the first of a text may be a case of its
        # own; those that may go on; and how many of their characters were shown.
        self.last, self.held, self.num_shown = [], [], 0

    def step(self, token_id: int) -> str:
        """What is complete with this token and was not before: not half a character."""
        self.held.append(token_id)
        now = self.decode(self.last + self.held)
        complete = now.rstrip("\N{REPLACEMENT CHARACTER}")
        new = complete[self.num_shown :]
        self.num_shown += len(new)
        if complete == now:
            self.last, self.held = self.held, []
            self.num_shown = len(self.decode(self.last))
        return new


@dataclass(frozen=True)
class Tokenizer:
    """Text in tokens and back, as a model was trained."""

    path: Path  # where it comes from
    tokenizer: Any  # of package tokenizers
    stop_ids: frozenset[int]  # tokens that end an answer
    template: str | None  # from messages to text, in jinja
    special: dict[str, str]  # those of SPECIAL that it has, as they are spelled

    def encode(self, text: str) -> torch.Tensor:
        """int64 (T,), with the token that begins every text, for a model that has one."""
        return torch.tensor(self.tokenizer.encode(text).ids, dtype=torch.int64)

    def decode(self, token_ids: Sequence[int] | torch.Tensor) -> str:
        """The text of token ids (T,), special tokens as they are spelled; what is no
        character becomes U+FFFD."""
        ids = torch.as_tensor(token_ids).tolist()
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def stream(self) -> TextStream:
        return TextStream(self.decode)

    def chat(self, messages: Sequence[dict[str, str]]) -> torch.Tensor:
        """Messages and the beginning of an answer, as the model was trained to read them:
        int64 (T,).

        messages: each with "role", as "user", and "content". Raises ValueError where
        there is no template, or where it refuses these messages.
        """
        if self.template is None:
            raise ValueError(f"{self.path}: expected a chat template, got none")
        environment = _environment(self.path)
        settings = {"tools": None, "documents": None, "add_generation_prompt": True}
        try:
            rendered = environment.from_string(self.template).render(
                messages=list(messages), **settings, **self.special
            )
        except Exception as error:  # a template may do anything
            raise ValueError(
                f"{self.path}: expected messages that the chat template takes, got "
                f"{type(error).__name__}: {error}"
            ) from error
        ids = self.tokenizer.encode(rendered, add_special_tokens=False).ids
        return torch.tensor(ids, dtype=torch.int64)


class ByteTokenizer:
    """The same for the course's own models, whose tokens are bytes."""

    stop_ids: frozenset[int] = frozenset()

    def encode(self, string: str) -> torch.Tensor:
        return text.encode(string)

    def decode(self, token_ids: Sequence[int] | torch.Tensor) -> str:
        return text.decode(torch.as_tensor(token_ids))

    def stream(self) -> TextStream:
        return TextStream(self.decode)

    def chat(self, messages: Sequence[dict[str, str]]) -> torch.Tensor:
        raise ValueError(
            "expected a model with a chat template, got one that reads bytes"
        )


def load_tokenizer(path: str | Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of the model at `path`, which is what `open_checkpoint` takes. Of a
    GGUF file it is the tokenizer.json beside it, if there is one.

    Raises FileNotFoundError where there is none; ValueError for one that cannot be read,
    or has a token that the model has not; UnsupportedError for a GGUF file of a kind that
    is not known here; ModuleNotFoundError that says how to install what reads it.
    """
    path = Path(path).expanduser()
    ggufs = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    is_folder = len(ggufs) != 1 or (path / "config.json").exists()
    with weights.readable(path):
        made = _of_folder(path) if is_folder else _of_gguf(ggufs[0])
        largest = max([*made.tokenizer.get_vocab().values(), *made.stop_ids], default=0)
    if largest >= config.vocab_size:
        raise ValueError(
            f"{path}: expected tokens below vocab_size = {config.vocab_size} of the "
            f"model, got a tokenizer with token {largest}"
        )
    return made


def _of_folder(folder: Path) -> Tokenizer:
    tokenizer = _read_tokenizer(folder / "tokenizer.json")
    if tokenizer is None:
        got = sorted(file.name for file in folder.glob("*"))
        raise FileNotFoundError(
            f"{folder}: expected tokenizer.json, got {got[:8] or 'nothing'}"
        )
    facts, *others = (
        weights.read_json(folder / name) if (folder / name).exists() else {}
        for name in ("tokenizer_config.json", "generation_config.json", "config.json")
    )
    # A token is a string, or an object that says how it is found in a text, too.
    special = {name: facts[name] for name in SPECIAL if facts.get(name)}
    special = {n: t["content"] if isinstance(t, dict) else t for n, t in special.items()}
    stop_ids = [tokenizer.token_to_id(special.get("eos_token", ""))]
    for found in (other.get("eos_token_id") for other in others):
        stop_ids += found if isinstance(found, list) else [found]
    stop_ids = frozenset(stop_ids) - {None}
    return Tokenizer(folder, tokenizer, stop_ids, _template(folder, facts), special)


def _template(folder: Path, facts: dict) -> str | None:
    """From a file of its own, or else from tokenizer_config.json, with these facts. Of
    several with names the one that is named default."""
    if (path := folder / "chat_template.jinja").exists():
        return path.read_text(encoding="utf-8")
    if (path := folder / "chat_template.json").exists():
        facts = weights.read_json(path)
    found = facts.get("chat_template")
    if isinstance(found, list):
        found = {each["name"]: each["template"] for each in found}.get("default")
    return found


def _of_gguf(path: Path) -> Tokenizer:
    reader = weights.open_gguf(path)
    facts = {
        name.removeprefix("tokenizer.ggml."): value
        for name, value in weights.gguf_facts(reader).items()
    }
    tokenizer = _read_tokenizer(path.with_name("tokenizer.json"))
    if tokenizer is None:
        tokenizer = _build(reader, facts, path)
    names = "bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id"
    special = {
        name: tokenizer.id_to_token(facts[id_name])
        for name, id_name in zip(SPECIAL, names)
        if id_name in facts
    }
    stop_ids = {facts.get("eos_token_id"), facts.get("eot_token_id")} - {None}
    template = facts.get("tokenizer.chat_template")
    return Tokenizer(path, tokenizer, frozenset(stop_ids), template, special)


def _read_tokenizer(path: Path) -> Any:
    """Of a tokenizer.json, without cutting off or filling up texts; None where there is
    none."""
    if not path.exists():
        return None
    with weights.readable(path):
        tokenizer = _package("tokenizers", path).Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _build(reader: Any, facts: dict[str, Any], path: Path) -> Any:
    """A byte-level BPE from what a GGUF file says; UnsupportedError for another kind."""
    kind, pre = facts.get("model"), facts.get("pre")
    if kind != "gpt2" or pre not in PRE:
        raise weights.UnsupportedError(
            f"{path}: expected tokenizer.ggml.model 'gpt2' with tokenizer.ggml.pre among "
            f"{PRE}, got {kind!r} with {pre!r}: put the model's tokenizer.json beside it"
        )
    of = _package("tokenizers", path)
    with weights.readable(path):
        tokens, merges, kinds = (
            reader.fields[f"tokenizer.ggml.{name}"].contents()
            for name in ("tokens", "merges", "token_type")
        )
        ids = {token: i for i, token in enumerate(tokens)}
        merges = [tuple(merge.split(" ")) for merge in merges]
        is_llama = pre == "llama-bpe"  # a word that is a token stays whole there
        tokenizer = of.Tokenizer(of.models.BPE(ids, merges, ignore_merges=is_llama))
        for token, kind in zip(tokens, kinds):
            if kind in (CONTROL, USER_DEFINED):
                is_special = kind == CONTROL
                added = of.AddedToken(token, normalized=False, special=is_special)
                tokenizer.add_tokens([added])
        if facts.get("add_bos_token", is_llama):
            i = facts["bos_token_id"]
            bos = {"id": "bos", "ids": [i], "tokens": [tokens[i]]}
            tokenizer.post_processor = of.processors.TemplateProcessing(
                single=["bos", "$A"], special_tokens=[bos]
            )
    if pre == "qwen2":
        tokenizer.normalizer = of.normalizers.NFC()
    tokenizer.pre_tokenizer = _cut_words(of, pre)
    tokenizer.decoder = of.decoders.ByteLevel()
    return tokenizer


def _cut_words(of: ModuleType, pre: str) -> Any:
    """How text becomes words, within which bytes are merged."""
    cut = of.pre_tokenizers
    if pre in DIGITS:
        words = of.Regex(WORDS.replace("DIGITS", DIGITS[pre]))
        bytes_of = cut.ByteLevel(add_prefix_space=False, use_regex=False)
        return cut.Sequence([cut.Split(words, "isolated"), bytes_of])
    gpt_2 = cut.ByteLevel(add_prefix_space=False)
    return cut.Sequence([cut.Digits(True), gpt_2]) if pre == "smollm" else gpt_2


def _environment(path: Path) -> Any:
    """In which templates are rendered: with what they may expect, and nothing else."""
    jinja2 = _package("jinja2.sandbox", path)

    def raise_exception(message: str):
        raise ValueError(message)

    environment = jinja2.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    return environment


def _package(name: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path}: expected the package {name.split('.')[0]} to read it: "
            f"{weights.INSTALL}"
        ) from error
