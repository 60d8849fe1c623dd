"""`python -m lib.generate`: what it writes, what it says, and what it refuses."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import small_tokenizers as small
import torch
from helpers import needs_interrupts, random_model

import lib.command
from lib import engine, generate, kv_cache, tokenizer, weights
from lib.kv_cache import kv_cache_bytes
from lib.measure.bench_serving import llama
from lib.model import Transformer, load_model
from lib.text import decode, encode
from lib.tokenizer import ByteTokenizer

pytest.importorskip("transformers")
pytest.importorskip("gguf")

PROMPT = "Call me Ishmael"
CACHES = {
    "recompute": [],
    "contiguous": [],
    "paged": ["--block-size", "4"],
}


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command: exit code, text, closing line, and what went to stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
        try:
            code = lib.command.main()
        except SystemExit as stopped:
            code = stopped.code
        said = capsys.readouterr()
        written, _, closing = said.out.removesuffix("\n").rpartition("\n")
        return code, written, closing, said.err

    return run


@pytest.fixture(scope="module")
def moby():
    return load_model()


@pytest.fixture(scope="module")
def model():
    return random_model(vocab_size=small.num_tokens())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    """A checkpoint with a tokenizer, in which no token ends an answer."""
    folder = tmp_path_factory.mktemp("model")
    llama(model, "eager").save_pretrained(folder)
    small.write_folder(folder, eos_token=None)
    return folder


@pytest.fixture(scope="module")
def windowed(tmp_path_factory, model):
    """One whose tokens see 24 others, of a model with room for 128."""
    folder = tmp_path_factory.mktemp("windowed")
    llama(model, "eager").save_pretrained(folder)
    facts = json.loads((folder / "config.json").read_text())
    facts["model_type"], facts["architectures"] = "mistral", ["MistralForCausalLM"]
    facts["sliding_window"] = 24
    (folder / "config.json").write_text(json.dumps(facts))
    small.write_folder(folder, eos_token=None)
    return folder


def numbers(closing):
    """Of a closing line, by the words around them."""
    found = re.fullmatch(
        r"prompt tokens: (?P<prompt>\d+), "
        r"(?P<first>[\d.e-]+ s until the first|no) token; "
        r"new tokens: (?P<new>\d+)(, (?P<rate>[\d.e+]+) per second after it)?; "
        r"KV bytes: (?P<used>[\d,]+) used, (?P<reserved>[\d,]+) reserved"
        r"(, (?P<each>[\d,]+) per token)?",
        closing,
    )
    assert found, closing
    facts = {name: value for name, value in found.groupdict().items() if value}
    counts = {"prompt", "new", "used", "reserved", "each"} & facts.keys()
    return {**facts, **{name: int(facts[name].replace(",", "")) for name in counts}}


@pytest.mark.parametrize("cache", CACHES)
def test_each_cache_writes_what_recomputing_writes(command, moby, cache):
    expected = generate.generate_recompute(moby, encode(PROMPT), 20, temperature=0)
    arguments = [PROMPT, "--cache", cache, *CACHES[cache], "--max-new-tokens", 20]
    code, written, closing, errors = command(*arguments)
    assert (code, errors) == (0, "")
    assert PROMPT + written == decode(expected)
    facts = numbers(closing)
    assert (facts["prompt"], facts["new"]) == (15, 20)
    assert float(facts["first"].split()[0]) > 0 and float(facts["rate"]) > 0
    each = kv_cache_bytes(moby.config, 1)
    if cache == "recompute":
        assert (facts["used"], facts["reserved"]) == (0, 0) and "each" not in facts
    else:  # the last token is not kept; 34 tokens are in 9 blocks of 4
        assert (facts["used"], facts["each"]) == (34 * each, each)
        assert facts["reserved"] == (36 if cache == "paged" else 34) * each


def test_with_a_seed_each_cache_draws_the_same_text(command):
    drawn = ["--temperature", 0.9, "--top-k", 20, "--top-p", 0.95, PROMPT]

    def text(*arguments):
        return command(*arguments, *drawn, "--max-new-tokens", 12)[1]

    texts = {cache: text("--cache", cache, "--seed", 7) for cache in CACHES}
    assert len(set(texts.values())) == 1
    assert text() == text("--seed", 0) != texts["paged"]
    assert command(PROMPT, "--max-new-tokens", 12)[1] not in texts.values()


def test_what_is_drawn_from_one_token_is_that_token(command):
    def text(*arguments):
        return command(PROMPT, *arguments, "--max-new-tokens", 12)[1]

    hot = "--temperature", 5
    assert text(*hot, "--top-k", 1) == text(*hot, "--top-p", 1e-3) == text() != text(*hot)


@pytest.mark.parametrize("cache", ["contiguous", "paged"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_fewer_bits_take_fewer_bytes_in_either_cache(command, moby, cache, bits):
    arguments = [PROMPT, "--cache", cache, "--bits", bits, "--max-new-tokens", 3]
    code, _, closing, _ = command(*arguments)
    config = moby.config
    vector = config.head_dim * bits // 8 + 2 * 4  # codes, scale and zero point
    each = 2 * config.num_layers * config.num_kv_heads * vector
    facts = numbers(closing)
    assert code == 0 and (facts["used"], facts["each"]) == (17 * each, each)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_smaller_dtype_takes_half_the_bytes(command, moby, folder, model, dtype):
    settings = ["--dtype", dtype, "--max-new-tokens", 3]
    for made, where in ((moby, []), (model, ["--model", folder])):
        code, _, closing, errors = command(PROMPT, *settings, *where)
        assert code == 0, errors
        assert numbers(closing)["each"] == kv_cache_bytes(made.config, 1, 2)


def test_a_model_of_others_is_asked_in_its_own_tokens(command, folder, model):
    ours = tokenizer.load_tokenizer(folder, model.config)
    prompt_ids = ours.encode(PROMPT)
    expected = generate.generate_recompute(model, prompt_ids, 20, temperature=0)
    arguments = [PROMPT, "--model", folder, "--max-new-tokens", 20]
    code, written, closing, _ = command(*arguments)
    assert code == 0 and numbers(closing)["prompt"] == len(prompt_ids)
    assert written == ours.decode(expected[len(prompt_ids) :]).rstrip("\ufffd")


def test_a_gguf_file_is_a_model_too(command, tmp_path, model):
    path = small.write_gguf(tmp_path / "a.gguf", model, eos_token_id=None)
    for each in (path, tmp_path):
        code, _, closing, errors = command("x", "--model", each, "--max-new-tokens", 9)
        assert code == 0 and not errors, errors
        assert numbers(closing)["new"] == 9


@pytest.mark.parametrize("cache", CACHES)
def test_a_stop_token_ends_the_text_and_is_not_written(
    command, folder, model, tmp_path, cache
):
    ours = tokenizer.load_tokenizer(folder, model.config)
    prompt_ids = ours.encode(PROMPT)
    texts = generate.generate_recompute(model, prompt_ids, 20, temperature=0)
    new_ids = texts[len(prompt_ids) :].tolist()
    place = next(  # of a token that would be seen
        i
        for i in range(4, 20)
        if new_ids[i] not in new_ids[:i] and ours.decode([new_ids[i]]).isascii()
    )
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(folder / name, tmp_path)
    stop = {"eos_token_id": [new_ids[place], small.END]}
    (tmp_path / "generation_config.json").write_text(json.dumps(stop))
    arguments = [PROMPT, "--model", tmp_path, "--cache", cache]
    code, written, closing, _ = command(*arguments)
    assert code == 0 and numbers(closing)["new"] == place + 1
    assert written == ours.decode(new_ids[:place]).rstrip("\ufffd")


def test_a_message_is_put_as_the_models_template_says(command, folder, monkeypatch):
    asked, add = [], engine.Engine.add

    def noting(self, prompt_ids, *rest, **settings):
        asked.append(prompt_ids)
        return add(self, prompt_ids, *rest, **settings)

    monkeypatch.setattr(engine.Engine, "add", noting)
    settings = ["--model", folder, "--chat", "--max-new-tokens", 1]
    command("Who? ", *settings)
    command("Who? ", *settings, "--system", "Be brief.")
    ours = small.made()
    texts = [ours.decode(ids.tolist(), skip_special_tokens=False) for ids in asked]
    assert texts == [
        "<|user|>Who?<|end|>\n<|assistant|>",
        "<|system|>Be brief.<|end|>\n<|user|>Who?<|end|>\n<|assistant|>",
    ]


def test_past_the_window_a_window_goes_on_and_the_others_end(command, windowed, model):
    prompt, settings = "Call me", ["--model", windowed, "--max-new-tokens", 60]
    written = {
        cache: command(prompt, *settings, "--cache", cache)
        for cache in (*CACHES, "window")
    }
    assert [code for code, *_ in written.values()] == [0] * 4
    assert written["window"][1] == written["recompute"][1]
    facts = {cache: numbers(closing) for cache, (_, _, closing, _) in written.items()}
    assert facts["window"]["new"] == facts["recompute"]["new"] == 60
    assert facts["window"]["used"] == 23 * kv_cache_bytes(model.config, 1)
    prompt_len = facts["window"]["prompt"]
    for cache in ("contiguous", "paged"):
        limit, _, text = written[cache][1].partition("\n")
        assert limit == (
            f"({24 - prompt_len} new tokens at most: a text may have 24, its window, "
            f"which --cache window runs past)"
        )
        assert written["window"][1].startswith(text)
        assert facts[cache]["new"] == 24 - prompt_len


def test_a_text_ends_where_the_model_does_and_the_command_says_so(command):
    code, written, closing, _ = command("a" * 510)
    assert code == 0 and numbers(closing)["new"] == 2
    assert written.startswith("(2 new tokens at most: a text may have 512)\n")


@pytest.mark.parametrize("cache", ["contiguous", "paged"])
def test_a_long_prompt_is_read_in_chunks(command, monkeypatch, cache):
    seen, forward = [], torch.nn.Embedding.forward

    def noting(self, token_ids):
        seen.append(token_ids.numel())
        return forward(self, token_ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", noting)
    command("a" * 500, "--cache", cache, "--max-new-tokens", 2)
    assert seen == [256, 244, 1]


def test_text_comes_as_it_is_written_and_never_half_a_character(monkeypatch, folder):
    out = Terminal()
    new_ids = [*small.made().encode("é😀 whales").ids, small.ASSISTANT, 7]
    ids = iter(new_ids)
    monkeypatch.setattr(engine.sampling, "sample", lambda *_: torch.tensor(next(ids)))
    monkeypatch.setattr(sys, "stdout", out)
    arguments = ["--model", str(folder), "--temperature", "1", "--max-new-tokens"]
    monkeypatch.setattr(sys, "argv", ["generate", "x", *arguments, str(len(new_ids))])
    assert lib.command.main() == 0
    assert out.flushed[:2] == ["é", "😀"]
    assert "".join(out.flushed) == "é😀 whales<|assistant|>$"


class Terminal(io.StringIO):
    """What each flush brought."""

    def __init__(self):
        super().__init__()
        self.flushed = []

    def flush(self):
        new = self.getvalue()[len("".join(self.flushed)) :]
        self.flushed += [new] if new else []


WRONG = [  # arguments, and what is said of them
    ([], "the following arguments are required: prompt"),
    (["--model", "/no/such", "x"], "/no/such: expected a folder with config.json and"),
    ([""], "prompt: expected 1 to 511 tokens (a text may have 512), got 0"),
    (["a" * 512], "prompt: expected 1 to 511 tokens (a text may have 512), got 512"),
    (["\udcff"], "argument prompt: expected text, got bytes that are none"),
    (["x", "--cache", "none"], "argument --cache: invalid choice: 'none'"),
    (
        ["x", "--cache", "window"],
        "cache: expected a model with a window, got one without",
    ),
    (["x", "--bits", "3"], "argument --bits: invalid choice: 3"),
    (
        ["x", "--bits", "4", "--cache", "recompute"],
        "bits: expected with --cache contiguous or paged, got it without",
    ),
    (
        ["x", "--block-size", "4", "--cache", "contiguous"],
        "block_size: expected with --cache paged, got it without",
    ),
    (["x", "--block-size", "0"], "block_size: expected an integer of at least 1, got 0"),
    (["x", "--max-new-tokens", "0"], "max_new_tokens: expected an integer of at least 1"),
    (["x", "--max-new-tokens", "y"], "argument --max-new-tokens: invalid int value: 'y'"),
    (["x", "--threads", "0"], "threads: expected an integer of at least 1, got 0"),
    (["x", "--seed", "-1"], "seed: expected an integer of at least 0, got -1"),
    (["x", "--temperature", "-1"], "temperature: expected a number of at least 0"),
    (["x", "--temperature", "nan"], "temperature: expected a number of at least 0"),
    (["x", "--top-k", "0"], "top_k: expected an integer of at least 1, or None"),
    (["x", "--top-p", "0"], "top_p: expected a number in (0, 1], got 0.0"),
    (["x", "--chat"], "expected a model with a chat template, got one that reads bytes"),
    (["x", "--system", "y"], "system: expected with --chat, got it without"),
    (["x", "--device", "cuda"], "device: expected a GPU that torch can use, got none"),
    (["x", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
]


@pytest.mark.parametrize("arguments, message", WRONG)
def test_wrong_input_is_one_sentence(command, arguments, message):
    code, written, closing, errors = command(*arguments)
    assert (code, written, closing) == (2, "", "")
    assert errors.startswith(message) and errors.count("\n") == 1


def test_a_model_that_cannot_be_read_is_one_sentence(command, folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path)
    code, _, _, errors = command("x", "--model", tmp_path)
    assert code == 2 and re.fullmatch(
        r".*: expected tokenizer.json, got \[.*\]\n", errors
    )
    small.write_folder(tmp_path, chat_template=None)
    code, _, _, errors = command("x", "--model", tmp_path, "--chat")
    assert code == 2 and errors == f"{tmp_path}: expected a chat template, got none\n"
    code, _, _, errors = command("", "--model", tmp_path)
    assert code == 2 and errors.startswith("prompt: expected 1 to 127 tokens")
    (tmp_path / "tokenizer.json").write_text("{")
    code, _, _, errors = command("x", "--model", tmp_path)
    assert code == 2 and errors.count("\n") == 1


def test_values_are_looked_at_before_a_model_is_loaded(command, monkeypatch):
    monkeypatch.setattr(weights, "open_checkpoint", pytest.fail)
    for arguments in (["--top-p", 2], ["--bits", 5], ["--seed", -1], ["--system", "x"]):
        assert command("x", "--model", "/somewhere", *arguments)[0] == 2


def test_memory_that_is_not_there_is_one_sentence(command, monkeypatch):
    def zeros(*_, **__):
        raise RuntimeError("not enough memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(kv_cache.torch, "zeros", zeros)
    for cache in ("contiguous", "paged"):
        code, _, _, errors = command("x", "--cache", cache)
        assert code == 2 and errors == (
            "keys and values of 100 tokens: not enough memory: you tried to allocate 9 "
            "bytes\n"
        )


@pytest.mark.parametrize("cache", CACHES)
def test_logits_that_are_no_numbers_are_one_sentence(command, monkeypatch, cache):
    def spoiled():
        model = load_model()
        model.unembed[1].weight.data[5, 5] = torch.nan
        return model

    monkeypatch.setattr(lib.command, "load_model", spoiled)
    code, _, _, errors = command("x", "--cache", cache)
    assert code == 2 and "expected numbers" in errors and errors.count("\n") == 1


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("where", ["in a step", "between two"])
def test_an_interrupt_says_what_was_measured_so_far(
    command, moby, monkeypatch, cache, where
):
    calls, owner, name = [], Transformer, "unembed"
    step = tokenizer.TextStream.step
    if where == "in a step":
        forward = torch.nn.Linear.forward

        def interrupted(self, x):
            if self.out_features == 256:
                calls.append(1)
                if len(calls) == 6:
                    raise KeyboardInterrupt
            return forward(self, x)

        owner, name = torch.nn.Linear, "forward"
    else:

        def interrupted(self, token_id):
            calls.append(1)
            if len(calls) == 6:
                raise KeyboardInterrupt
            return step(self, token_id)

        owner, name = tokenizer.TextStream, "step"
    monkeypatch.setattr(owner, name, interrupted)
    code, written, closing, errors = command(PROMPT, "--cache", cache)
    assert (code, errors, len(written)) == (130, "", 5)
    facts = numbers(closing)
    assert facts["new"] == 5 + (where == "between two")
    if cache != "recompute":
        kept = 15 + 4 + (where == "between two")
        assert facts["used"] == kept * kv_cache_bytes(moby.config, 1)


def test_an_interrupt_before_the_first_token_says_nothing(command, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ByteTokenizer, "encode", interrupted)
    assert command(PROMPT) == (130, "", "", "")
    monkeypatch.undo()


def test_an_interrupt_in_the_first_step_says_that_there_is_no_token(command, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.nn.Embedding, "forward", interrupted)
    code, written, closing, errors = command(PROMPT)
    assert (code, written, errors) == (130, "", "")
    facts = numbers(closing)
    assert (facts["first"], facts["new"], facts["used"]) == ("no", 0, 0)


def run_apart(*arguments, **settings):
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    return subprocess.Popen(
        [sys.executable, "-m", "lib.generate", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        # Whoever was started in the background ignores interrupts, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **settings,
    )


@needs_interrupts
def test_it_runs_as_a_command_and_can_be_interrupted():
    process = run_apart(PROMPT, "--cache", "recompute", "--max-new-tokens", "490")
    first = process.stdout.read(20)  # while it still writes
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    facts = numbers((first + rest).rstrip("\n").rpartition("\n")[-1])
    assert 20 <= facts["new"] < 490
