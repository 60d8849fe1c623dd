"""Tokenizers of real models: small ones, beside what transformers makes of them."""

import json
import os
import sys
import unicodedata
from pathlib import Path

import pytest
import small_tokenizers as small
import torch
from helpers import random_model

from lib import text, tokenizer, weights
from lib.tokenizer import ByteTokenizer, TextStream, load_tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = [
    "",
    "Call me Ishmael. Some years ago, never mind how long precisely",
    " two  spaces   three\n\n\nnew\tlines \r\n x\n ",
    "don't WE'LL they'Re I'm, sir!!  ...(what?)",
    "1 22 333 4444  55555\n6,000.50 x2y  7",
    "naïve café, and in two characters: cafe\u0301 ½ ² ③",
    "😀 👨‍👩‍👧‍👦🇩🇪 漢字かな交じり文 한국어 مرحبا",
    "def f(x):\n    return x**2  # \t squared\n\n\tpass",
    "<|user|>Hi<|end|>\n<|begin|> <|end|><think> thinking</think> <|endof|>",
    "\u00a0\u2009x\u3000\ufeff\u200b y",
]
MESSAGES = [
    [{"role": "user", "content": "Who is Ishmael? "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?\n<b>'é😀'</b>"},
        {"role": "assistant", "content": "4<|end|>"},
        {"role": "user", "content": "Why?"},
    ],
]


@pytest.fixture(scope="module")
def model():
    return random_model(vocab_size=small.num_tokens())


@pytest.fixture
def config(model):
    return model.config


def theirs_of(folder, **settings):
    return transformers.AutoTokenizer.from_pretrained(folder, **settings)


def words(made, string):
    """The tokens of a text, as they are spelled in the vocabulary."""
    return [small.vocabulary()[0][i] for i in made.encode(string).tolist()]


@pytest.mark.parametrize("begins", [False, True])
def test_a_folder_gives_the_tokens_of_transformers(tmp_path, config, begins):
    folder = small.write_folder(tmp_path, begins)
    ours, theirs = load_tokenizer(folder, config), theirs_of(folder)
    for string in TEXTS:
        token_ids = ours.encode(string)
        assert token_ids.dtype == torch.int64
        assert token_ids.tolist() == theirs(string).input_ids, string
        begin = "<|begin|>" if begins else ""
        assert ours.decode(token_ids) == begin + string
        assert ours.decode(token_ids.tolist()) == begin + string


def test_texts_are_never_cut_off_or_filled_up(tmp_path, config):
    folder = small.write_folder(tmp_path)
    made = small.made()
    made.enable_truncation(3)
    made.enable_padding(length=8)
    made.save(str(folder / "tokenizer.json"))
    ours = load_tokenizer(folder, config)
    assert ours.decode(ours.encode(TEXTS[1])) == TEXTS[1]
    assert len(ours.encode("x")) == 1


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "gpt-2", "default"])
def test_a_gguf_file_gives_the_tokens_of_the_models_that_it_names(tmp_path, model, pre):
    path = small.write_gguf(tmp_path / "a.gguf", model, pre=pre, add_bos_token=False)
    theirs = theirs_of(tmp_path, gguf_file="a.gguf")
    normal = str
    if pre == "smollm":  # what transformers leaves out
        theirs.backend_tokenizer.pre_tokenizer = small.made().pre_tokenizer
    if pre == "qwen2":  # that too
        normal = lambda string: unicodedata.normalize("NFC", string)  # noqa: E731
    ours = load_tokenizer(path, model.config)
    for string in TEXTS:
        token_ids = ours.encode(string).tolist()
        assert token_ids == theirs(normal(string)).input_ids, string
        assert ours.decode(token_ids) == normal(string)


def test_a_gguf_file_and_a_folder_of_one_tokenizer_are_the_same(tmp_path, model):
    folder = small.write_folder(tmp_path / "folder", begins=True)
    path = small.write_gguf(tmp_path / "a.gguf", model, add_bos_token=True)
    made = [load_tokenizer(each, model.config) for each in (folder, path, tmp_path)]
    for string in TEXTS:
        assert len({tuple(each.encode(string).tolist()) for each in made}) == 1
    for messages in MESSAGES:
        assert len({tuple(each.chat(messages).tolist()) for each in made}) == 1
    assert [each.stop_ids for each in made] == [{small.END}] * 3


@pytest.mark.parametrize(
    "pre, expected",
    [
        ("smollm", ["ĠĠ", "1", "2", "3", "4", "Ġ", "5"]),
        ("llama-bpe", ["Ġ", "Ġ", "123", "4", "Ġ", "5"]),
        ("qwen2", ["Ġ", "Ġ", "1", "2", "3", "4", "Ġ", "5"]),
        ("gpt-2", ["Ġ", "Ġ1", "23", "4", "Ġ", "5"]),
    ],
)
def test_digits_make_words_as_the_models_learned_them(tmp_path, model, pre, expected):
    merges = ("Ġ", "Ġ"), ("2", "3"), ("Ġ", "1"), ("1", "23")
    facts = {**small.learned_too(*merges), "add_bos_token": False}
    path = small.write_gguf(tmp_path / "a.gguf", model, pre=pre, **facts)
    token_ids = load_tokenizer(path, model.config).encode("  1234 5").tolist()
    assert [facts["tokens"][i] for i in token_ids] == expected


@pytest.mark.parametrize("pre, is_whole", [("llama-bpe", True), ("qwen2", False)])
def test_in_llama_3_a_word_that_is_a_token_stays_whole(tmp_path, model, pre, is_whole):
    facts = small.learned_too(("Ġz", "qx"))  # nothing leads to qx
    facts["merges"].pop()
    path = small.write_gguf(
        tmp_path / "a.gguf", model, pre=pre, add_bos_token=False, **facts
    )
    token_ids = load_tokenizer(path, model.config).encode(" zqx").tolist()
    assert ([facts["tokens"][i] for i in token_ids] == ["Ġzqx"]) == is_whole


@pytest.mark.parametrize(
    "pre, facts, begins",
    [
        ("smollm", {}, False),
        ("llama-bpe", {}, True),
        ("llama-bpe", {"add_bos_token": False}, False),
        ("gpt-2", {"add_bos_token": True}, True),
    ],
)
def test_a_text_begins_as_the_gguf_file_says_or_else_its_models(
    tmp_path, model, pre, facts, begins
):
    path = small.write_gguf(tmp_path / "a.gguf", model, pre=pre, **facts)
    ours = load_tokenizer(path, model.config)
    assert (ours.encode("x")[0] == small.BEGIN) == begins
    assert small.BEGIN not in ours.chat(MESSAGES[0])


def test_a_tokenizer_json_beside_a_gguf_file_comes_first(tmp_path, model):
    facts = {"model": "llama", "pre": "default", "eos_token_id": small.USER}
    path = small.write_gguf(tmp_path / "a.gguf", model, **facts)
    with pytest.raises(weights.UnsupportedError, match="put the model's tokenizer.json"):
        load_tokenizer(path, model.config)
    small.write_folder(tmp_path, begins=True)
    ours = load_tokenizer(path, model.config)
    assert words(ours, "whale 12") == [
        "<|begin|>",
        *words(small_gguf(tmp_path, model), "whale 12"),
    ]
    assert ours.stop_ids == {small.USER} and ours.special["bos_token"] == "<|begin|>"
    assert len(ours.chat(MESSAGES[0])) > 3


def small_gguf(tmp_path, model):
    folder = tmp_path / "usual"
    folder.mkdir(exist_ok=True)
    return load_tokenizer(small.write_gguf(folder / "a.gguf", model), model.config)


# What models' templates use, each in a line or two.
TEMPLATES = {
    "as most": small.CHATML,
    "white space around blocks": "{%- for m in messages %}\n"
    "  {% if m.role == 'user' -%}\n"
    "  {{ m.content }}\n  {%- endif %}\n{% endfor %}\n\n",
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}"
    "{% endfor %}{{ unk_token }}",
    "today": "{{ strftime_now('%Y %B %d') }} {{ messages | length }}",
    "no tools": "{% if not tools is defined %}a{% elif tools is none %}b{% endif %}"
    "{{ documents }}",
    "loop controls": "{% for m in messages %}{{ m.content }}{% if loop.index > 0 %}"
    "{% break %}{% endif %}{% endfor %}",
    "as json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", MESSAGES)
def test_messages_become_what_transformers_makes_of_them(
    tmp_path, config, name, messages
):
    folder = small.write_folder(tmp_path, begins=True, chat_template=TEMPLATES[name])
    ours, theirs = load_tokenizer(folder, config), theirs_of(folder)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True)
    token_ids = ours.chat(messages)
    assert token_ids.dtype == torch.int64
    assert token_ids.tolist() == expected["input_ids"]


def test_a_template_is_found_where_models_have_it(tmp_path, config):
    def reads(**facts):
        made = load_tokenizer(small.write_folder(tmp_path, **facts), config)
        return made.decode(made.chat(MESSAGES[0]))

    assert reads(chat_template="one") == "one"
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    assert reads(chat_template=named) == "b"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "of json"}')
    assert reads(chat_template="one") == "of json"
    (tmp_path / "chat_template.jinja").write_text("of jinja é", encoding="utf-8")
    assert reads(chat_template="one") == "of jinja é"


def test_special_tokens_may_be_objects(tmp_path, config):
    token = {"content": "<|end|>", "lstrip": False, "special": True}
    facts = {"eos_token": token, "chat_template": "{{ eos_token }}", "bos_token": None}
    ours = load_tokenizer(small.write_folder(tmp_path, **facts), config)
    assert ours.chat([]).tolist() == [small.END]
    assert ours.special == {"eos_token": "<|end|>"} and ours.stop_ids == {small.END}


@pytest.mark.parametrize(
    "generation, model_config, eos, expected",
    [
        (None, None, "<|end|>", {small.END}),
        (None, None, None, set()),
        (None, None, "<|unknown|>", set()),
        ({"eos_token_id": [2, 3]}, None, "<|end|>", {1, 2, 3}),
        ({"eos_token_id": 0}, {"eos_token_id": 2}, None, {0, 2}),
        ({"eos_token_id": None}, {"eos_token_id": [3]}, None, {3}),
    ],
)
def test_an_answer_ends_with_any_token_that_some_file_says(
    tmp_path, config, generation, model_config, eos, expected
):
    folder = small.write_folder(tmp_path, eos_token=eos)
    for name, facts in (("generation_config", generation), ("config", model_config)):
        if facts is not None:
            (folder / f"{name}.json").write_text(json.dumps(facts))
    assert load_tokenizer(folder, config).stop_ids == expected


@pytest.mark.parametrize(
    "facts, expected",
    [
        ({}, {small.END}),
        ({"eot_token_id": small.USER}, {small.END, small.USER}),
        ({"eos_token_id": None}, set()),
    ],
)
def test_a_gguf_file_says_which_tokens_end_an_answer(tmp_path, model, facts, expected):
    path = small.write_gguf(tmp_path / "a.gguf", model, **facts)
    assert load_tokenizer(path, model.config).stop_ids == expected


def check_stream(stream, token_ids, whole, cut_at):
    """Each step gives what is complete; cut_at: bytes of the text up to each token's
    end."""
    shown = ""
    for token_id, cut in zip(token_ids, cut_at):
        shown += stream.step(token_id)
        assert shown == whole.encode()[:cut].decode(errors="ignore")
    assert shown == whole


@pytest.mark.parametrize("whole", ["a😀é", "👨‍👩‍👧x", "漢字 ½", "…"])
def test_a_stream_never_shows_half_a_character_wherever_tokens_cut(whole):
    data = whole.encode()
    cuts = range(1, len(data))
    for first in cuts:
        for second in cuts[first - 1 :]:
            parts = data[:first], data[first:second], data[second:]
            stream = TextStream(
                lambda ids, parts=parts: b"".join(parts[i] for i in ids).decode(
                    errors="replace"
                )
            )
            check_stream(stream, range(3), whole, (first, second, len(data)))


def test_streams_of_both_tokenizers_give_the_text(tmp_path, config):
    for made in (load_tokenizer(small.write_folder(tmp_path), config), ByteTokenizer()):
        for string in TEXTS:
            stream, steps = made.stream(), []
            for token_id in made.encode(string).tolist():
                steps.append(stream.step(token_id))
                assert "\ufffd" not in steps[-1]
            assert "".join(steps) == string


def test_what_is_no_character_is_shown_as_such_and_holds_nothing_back():
    stream = ByteTokenizer().stream()
    assert [stream.step(byte) for byte in b"\xffa\xe2\x80b"] == [
        *("", "\ufffda", "", "", "\ufffdb")
    ]


def test_a_stream_keeps_the_spaces_of_a_tokenizer_that_drops_the_first(tmp_path):
    from tokenizers import Tokenizer, decoders, models

    tokens = ["▁Call", "▁me", *(f"<0x{byte:02X}>" for byte in "é😀".encode())]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    made.decoder = decoders.Sequence(  # as that of Llama 2
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    ours = tokenizer.Tokenizer(tmp_path, made, frozenset(), None, {})
    token_ids, stream = [0, 1, *range(2, 8), *range(2, 8), 1, 0], ours.stream()
    steps = [stream.step(i) for i in token_ids]
    assert steps[:4] == ["Call", " me", "", "é"]
    assert "".join(steps) == ours.decode(token_ids) == "Call meé😀é😀 me Call"


def test_bytes_are_those_of_chapter_1():
    made = ByteTokenizer()
    assert torch.equal(made.encode("é…"), text.encode("é…"))
    assert (
        made.decode(made.encode("é…")) == made.decode([195, 169, *"…".encode()]) == "é…"
    )
    assert made.decode([226]) == "\ufffd" and made.stop_ids == frozenset()
    with pytest.raises(ValueError, match="expected a model with a chat template, got"):
        made.chat(MESSAGES[0])


def test_a_folder_without_a_tokenizer_is_refused(tmp_path, config):
    with pytest.raises(FileNotFoundError, match="expected tokenizer.json, got nothing"):
        load_tokenizer(tmp_path, config)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="json, got .'tokenizer.model'.$"):
        load_tokenizer(tmp_path, config)
    with pytest.raises(FileNotFoundError, match="expected tokenizer.json, got nothing"):
        load_tokenizer(tmp_path / "nowhere", config)


@pytest.mark.parametrize("broken", ["", "{", "[1]", '{"model": {}}', "\x00\x01"])
def test_a_broken_tokenizer_is_refused_with_its_name(tmp_path, config, broken):
    path = small.write_folder(tmp_path) / "tokenizer.json"
    path.write_text(broken)
    with pytest.raises(ValueError) as error:
        load_tokenizer(tmp_path, config)
    assert str(error.value).startswith(f"{path}: expected a whole file, got")


@pytest.mark.parametrize(
    "name, facts",
    [
        ("tokenizer_config.json", {"eos_token": 5}),
        ("tokenizer_config.json", {"eos_token": {"id": 5}}),
        ("tokenizer_config.json", {"chat_template": [5]}),
        ("generation_config.json", {"eos_token_id": "x"}),
        ("generation_config.json", {"eos_token_id": [[1]]}),
        ("generation_config.json", {"eos_token_id": {"a": 1}}),
    ],
)
def test_facts_of_another_kind_are_refused_in_a_sentence(tmp_path, config, name, facts):
    small.write_folder(tmp_path)
    for template in tmp_path.glob("chat_template*"):
        template.unlink()
    (tmp_path / name).write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="expected a whole file, got .*Error"):
        tokenizer.load_tokenizer(tmp_path, config)


def test_a_tokenizer_of_a_larger_model_is_refused(tmp_path, model):
    small.write_folder(tmp_path)
    path = small.write_gguf(tmp_path / "a.gguf", model, eos_token_id=5000)
    V = small.num_tokens()
    smaller = random_model(vocab_size=V - 1).config
    for each, config, largest in ((tmp_path, smaller, V - 1), (path, model.config, 5000)):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(ValueError) as error:
            load_tokenizer(each, config)
        assert f"below vocab_size = {config.vocab_size} of" in str(error.value)
        assert str(error.value).endswith(f"with token {largest}")


@pytest.mark.parametrize(
    "facts, got",
    [
        ({"model": "llama"}, "'llama' with 'smollm'"),
        ({"pre": "tekken"}, "'gpt2' with 'tekken'"),
        ({"pre": None}, "'gpt2' with None"),
        ({"model": None}, "None with 'smollm'"),
    ],
)
def test_a_gguf_file_of_another_kind_is_refused(tmp_path, model, facts, got):
    path = small.write_gguf(tmp_path / "a.gguf", model, **facts)
    with pytest.raises(weights.UnsupportedError) as error:
        load_tokenizer(path, model.config)
    assert f"{path}: expected tokenizer.ggml.model 'gpt2' with" in str(error.value)
    assert f"got {got}: put the model's tokenizer.json beside it" in str(error.value)


@pytest.mark.parametrize(
    "facts",
    [
        {"merges": ["qq zz"]},
        {"merges": None},
        {"token_type": None},
        {"add_bos_token": True, "bos_token_id": None},
        {"add_bos_token": True, "bos_token_id": 5000},
    ],
)
def test_a_gguf_file_without_a_whole_vocabulary_is_refused(tmp_path, model, facts):
    path = small.write_gguf(tmp_path / "a.gguf", model, **facts)
    with pytest.raises(ValueError, match="a.gguf: expected a whole file, got"):
        load_tokenizer(path, model.config)


@pytest.mark.parametrize(
    "template, words",
    [
        (None, "expected a chat template, got none"),
        ([{"name": "tool_use", "template": "a"}], "expected a chat template, got none"),
        ("{{ raise_exception('no such role') }}", "takes, got ValueError: no such role"),
        ("{% if %}", "takes, got TemplateSyntaxError: "),
        ("{{ messages[0].content.x.y }}", "takes, got UndefinedError: "),
        ("{{ messages.append(1) }}", "takes, got SecurityError: "),
        ("{{ ''.__class__.__mro__ }}", "takes, got SecurityError: "),
        ("{{ 1 / 0 }}", "takes, got ZeroDivisionError: "),
    ],
)
def test_a_template_that_is_not_there_or_fails_says_so(tmp_path, config, template, words):
    ours = load_tokenizer(small.write_folder(tmp_path, chat_template=template), config)
    with pytest.raises(ValueError) as error:
        ours.chat(MESSAGES[0])
    assert str(error.value).startswith(f"{tmp_path}: expected ")
    assert words in str(error.value)


@pytest.mark.parametrize("package", ["tokenizers", "jinja2", "gguf"])
def test_a_package_that_is_missing_is_named(tmp_path, model, package, monkeypatch):
    path = small.write_gguf(tmp_path / "a.gguf", model)
    if package == "jinja2":
        monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError) as error:
        load_tokenizer(path, model.config).chat(MESSAGES[0])
    assert str(error.value) == (
        f"{path}: expected the package {package} to read it: {weights.INSTALL}"
    )


@pytest.mark.nightly
@pytest.mark.skipif("MODEL" not in os.environ, reason="needs MODEL, a folder or file")
def test_a_real_model_reads_as_with_transformers():
    checkpoint = weights.open_checkpoint(os.environ["MODEL"])
    path = Path(checkpoint.path)
    ours = load_tokenizer(path, checkpoint.config)
    if path.is_dir():
        theirs = theirs_of(path)
    else:
        theirs = theirs_of(path.parent, gguf_file=path.name)
    book = text.load_book()
    for string in [*TEXTS, *(book[i : i + 500] for i in range(0, 500_000, 5_000))]:
        if path.is_file() and any(char.isnumeric() for char in string):
            continue  # transformers does not cut them as SmolLM does
        token_ids = ours.encode(string)
        assert token_ids.tolist() == theirs(string).input_ids
        stream = ours.stream()
        assert "".join(map(stream.step, token_ids.tolist())) == ours.decode(token_ids)
    for messages in MESSAGES if ours.template else ():
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True)
        assert ours.chat(messages).tolist() == expected["input_ids"]
