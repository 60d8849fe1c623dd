"""What chapter 10 measures, on a small random model."""

import json
import re
import sys
from dataclasses import replace

import pytest
import small_tokenizers as small
import torch
from helpers import assert_close, random_model

from lib import text
from lib.config import ModelConfig
from lib.kv_cache import kv_cache_bytes
from lib.measure import real_model
from lib.measure.bench_serving import llama
from lib.measure.quality import Quality, measure_quality
from lib.model import attend_causal
from lib.pruning import Snap
from lib.tokenizer import ByteTokenizer
from lib.weights import open_checkpoint

pytest.importorskip("transformers")


class Chatty:
    """Bytes as tokens, and a template of its own."""

    def encode(self, string):
        return text.encode(string)

    def decode(self, token_ids):
        return text.decode(token_ids)

    def chat(self, messages):
        return text.encode("".join(m["role"] + ": " + m["content"] for m in messages))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(real_model, "CONTEXTS", (16, 32))
    monkeypatch.setattr(real_model, "BATCHES", (1, 3))
    monkeypatch.setattr(real_model, "SYSTEM", "You answer in one word. " * 3)


@pytest.fixture(scope="module")
def subject():
    model = random_model(num_layers=3, max_seq_len=1024)
    book_ids = text.encode(text.load_book()[:40_000])
    return real_model.Subject(model, Chatty(), book_ids, seq_len=64)


def test_bytes_are_as_predicted(subject):
    found = real_model.measure_bytes(subject)
    config = subject.config
    assert found["per_token"] == kv_cache_bytes(config, 1)
    assert found["logits_per_token"] == 4 * config.vocab_size
    assert found["weights"] == 4 * found["parameters"]
    for seen in found["seen"]:
        T = seen["num_tokens"]
        assert seen["cache"] == T * found["per_token"]
        assert seen["reserved"] >= seen["cache"] + found["per_token"]
        assert seen["prefill_peak"] >= T * found["logits_per_token"]
    first, second = found["seen"]
    assert second["prefill_peak"] > 3 * first["prefill_peak"]
    assert second["chunks_peak"] < second["prefill_peak"] / 4


def test_all_ways_to_write_agree(subject):
    found = real_model.measure_text(subject, "Call me")
    assert found["same"] == [True] * 3
    assert found["num_tokens"] == 47 and found["text"].startswith("Call me")


def test_work_of_a_step_grows_with_recompute_alone(subject):
    rows = real_model.measure_speed(subject)
    flops = {(row["name"], row["context"]): row["flops"] for row in rows}
    assert flops["recompute", 32] > 2 * flops["recompute", 16]
    for name in ("contiguous", "paged"):
        assert flops[name, 32] < 1.2 * flops[name, 16] < flops["recompute", 16] / 8
    assert all(row["seconds"] > 0 for row in rows)


def test_each_step_of_a_batch_is_over_one_token_of_each_text(subject, monkeypatch):
    asked, forward = set(), real_model.generate.forward_cached

    def noting(model, cache, token_ids, query_lens):
        if query_lens.max() == 1:
            asked.add((len(token_ids), len(cache.request_ids)))
        return forward(model, cache, token_ids, query_lens)

    monkeypatch.setattr(real_model.generate, "forward_cached", noting)
    rows = real_model.measure_batch(subject, context=32)
    assert asked == {(1, 1), (3, 3)}
    per_token = kv_cache_bytes(subject.config, 1)
    assert [row["kv_bytes"] for row in rows] == [32 * per_token, 3 * 32 * per_token]


@pytest.mark.parametrize("task", real_model.TASKS)
def test_the_second_half_is_asked_for(subject, task):
    first, second = real_model._texts(subject, task)
    half = subject.seq_len // 2
    for examples in (first, second):
        ids, is_answer = examples.token_ids, examples.is_answer
        assert not is_answer[:, :half].any() and is_answer[:, half + 1 :].all()
        is_again = torch.equal(ids[:, :half], ids[:, half:])
        assert is_again == (task == "again")
        assert bool(is_answer[:, half].all()) == (task == "book")
    assert not torch.equal(first.token_ids, second.token_ids)
    others = real_model._texts(subject, task, seed=1)[0]
    assert not torch.equal(first.token_ids, others.token_ids)


def test_keys_and_values_as_they_are_lose_nothing(subject):
    plain = real_model.measure_bits(subject)[0]
    for task in real_model.TASKS:
        draws = real_model._texts(subject, task)
        expected = measure_quality(subject.model, draws, attend=attend_causal)
        assert Quality(**plain[task]).mean_nats == pytest.approx(
            expected.mean_nats, abs=1e-4
        )


def test_fewer_bits_and_heads_take_fewer_bytes(subject):
    sizes = [row["book"]["bytes_per_token"] for row in real_model.measure_bits(subject)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    heads = real_model.measure_heads(subject)
    assert [row["num_kv_heads"] for row in heads] == [2, 1]
    assert heads[1]["book"]["bytes_per_token"] == sizes[0] / 2
    assert heads[1]["book"]["nats"] != heads[0]["book"]["nats"]


def test_all_numbers_of_keys_and_values_lose_nothing_rotated_or_not(subject, monkeypatch):
    monkeypatch.setattr(real_model, "RANK_SHARES", (1.0, 1.0, 0.5))
    rows = real_model.measure_rank(subject)
    plain = real_model.measure_bits(subject)[0]
    width = rows[0]["width"]
    whole = [row for row in rows if tuple(row["ranks"]) == (width, width)]
    assert {row["is_rotated"] for row in whole} == {True, False}
    half = [row for row in rows if row not in whole]
    for task in real_model.TASKS:
        for row in whole:
            assert row[task]["nats"] == pytest.approx(plain[task]["nats"], abs=1e-4)
            assert row[task]["bytes_per_token"] == plain[task]["bytes_per_token"]
        for row in half:
            assert row[task]["nats"] != pytest.approx(plain[task]["nats"], abs=1e-4)
    sizes = {(row["ranks"], row["is_rotated"]): row["book"] for row in half}
    rotated, unrotated = (sizes[(width // 2, width), is_it] for is_it in (True, False))
    assert rotated["bytes_per_token"] == unrotated["bytes_per_token"]


def test_the_share_of_the_first_token_is_that_of_its_weights():
    model = random_model(num_layers=2)
    for block in model.blocks:
        block.attention.q_proj.weight.data.zero_()  # equal weights: 1 / (t + 1)
    shares = real_model.attention_to_first(model, torch.arange(8))
    expected = sum(1 / (t + 1) for t in range(4, 8)) / 4
    assert_close(torch.tensor(shares), torch.tensor([expected] * 2))


def test_one_layer_at_a_time_is_cut(subject):
    found = real_model.measure_layers(subject)
    assert (found["alone"], found["read"]) == (8, 32)
    whole = subject.config.max_seq_len
    for task in real_model.TASKS:
        draws = real_model._texts(subject, task)
        for layer, nats in enumerate(found[task]["cut"]):
            budgets = [8 if i == layer else whole for i in range(3)]
            expected = real_model._pruned(subject, draws, budgets, Snap()).mean_nats
            assert nats == expected != found[task]["whole"]
        none, *_, all_kept = found[task]["together"]
        assert (none["count"], all_kept["count"]) == (0, 3)
        all_cut = real_model._pruned(subject, draws, 8, Snap()).mean_nats
        assert Quality(none["nats"], none["accuracies"], 0).mean_nats == all_cut
        assert sum(all_kept["nats"]) / 2 == found[task]["whole"]


def test_budgets_are_of_one_size_and_begin_with_all_tokens(subject, monkeypatch):
    asked = []

    def noting(subject, draws, budgets, policy):
        asked.append([budgets] * 3 if isinstance(budgets, int) else list(budgets))
        return Quality((1.0,), (0.5,), 1.0)

    subject = replace(subject, seq_len=128)
    layers = real_model.measure_layers(subject)
    monkeypatch.setattr(real_model, "_pruned", noting)
    rows = real_model.measure_budgets(subject, layers)
    assert len(rows) == len(asked) == 2 * (1 + 8 * len(real_model.SHARES))
    for row, budgets in zip(rows, asked):
        if row["name"] == "all tokens":
            assert row["budget"] == 64 and min(budgets) >= 128
        else:
            assert sum(budgets) == 3 * row["budget"], row
        if row["name"].startswith("snap, by what is lost"):
            assert min(budgets) >= int(row["name"].split()[-1]) and max(budgets) <= 64
    shapes = {row["name"]: b for row, b in zip(rows, asked) if row["budget"] == 48}
    assert shapes["snap, pyramid"] == shapes["snap, pyramid upside down"][::-1]
    assert shapes["snap, pyramid"][0] > shapes["snap, pyramid"][-1]


def test_budgets_by_loss_are_whole_and_within_their_limits():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        L, least = (int(torch.randint(1, 9, (), generator=generator)) for _ in "Ll")
        most = least + int(torch.randint(0, 50, (), generator=generator))
        mean = int(torch.randint(least, most + 1, (), generator=generator))
        lost = (torch.rand(L, generator=generator) - 0.5).clamp(min=0) ** 3
        budgets = real_model.budgets_by_loss(lost.tolist(), mean, least, most)
        assert sum(budgets) == mean * L and least <= min(budgets) <= max(budgets) <= most
        for i in range(L):
            for j in range(L):
                assert lost[i] <= lost[j] or budgets[i] >= budgets[j] - 1


def test_a_shared_beginning_is_computed_once(subject):
    rows = real_model.measure_prefix(subject)
    alone, shared = (
        [row for row in rows if row["name"] == name] for name in ("paged", "prefix")
    )
    assert [row["num_computed"] for row in alone] == [row["prompt_len"] for row in alone]
    first, *rest = shared
    assert first["num_computed"] == first["prompt_len"]
    assert all(row["num_computed"] < row["prompt_len"] / 2 for row in rest)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = random_model(vocab_size=small.num_tokens(), max_seq_len=1024)
    llama(model, "eager").save_pretrained(folder)
    return small.write_folder(folder)


def test_a_model_that_is_there_is_measured_once(folder, monkeypatch):
    real, calls = real_model.open_model(folder, seq_len=64), []
    parts = {
        "layers": lambda subject: calls.append("layers") or {"of": subject.seq_len},
        "budgets": lambda subject, layers: calls.append("budgets") or layers,
    }
    monkeypatch.setattr(real_model, "MEASUREMENTS", parts)
    assert real.measure("budgets") == real.measure("budgets") == {"of": 64}
    assert calls == ["layers", "budgets"]
    assert f"{folder.name} in float32, measured here" in real.about


@pytest.mark.parametrize("nothing", [None, ""])
@pytest.mark.parametrize("path", [real_model.RESULTS, real_model.GPU_RESULTS])
def test_what_was_recorded_is_whole_and_says_where(path, nothing):
    real = real_model.Recorded(path)
    assert "; not on this machine" in real.about and "here" not in real.about
    assert list(real.found) == list(real_model.MEASUREMENTS)
    assert all(real.measure("text")["same"]) or "bfloat16" in real.about
    assert real_model.open_model(nothing).name == real.name


def test_the_command_writes_down_each_part(folder, tmp_path, monkeypatch, capsys):
    path = tmp_path / "found.json"
    arguments = [str(folder), "--json", str(path), "--parts", "text", "prefix"]
    monkeypatch.setattr(sys, "argv", ["real_model", *arguments])
    num_threads = torch.get_num_threads()
    try:
        real_model.main()
    finally:
        torch.set_num_threads(num_threads)
    assert "prefix" in capsys.readouterr().out
    recorded = real_model.Recorded(path)
    assert list(recorded.found) == ["text", "prefix"]
    written = json.loads(path.read_text())
    assert ModelConfig(**written["config"]) == open_checkpoint(folder).config
    assert written["seconds"].keys() == recorded.found.keys()


@pytest.mark.parametrize(
    "settings", [{}, {"qkv_bias": True}, {"qk_norm": True, "tied_embeddings": True}]
)
def test_figures_of_a_part_are_plain_values(subject, settings):
    if settings:
        model = random_model(max_seq_len=1024, d_head=12, **settings)
        # bytes have no template for chats
        subject = replace(subject, model=model, tokenizer=ByteTokenizer())
    for part, measure in real_model.MEASUREMENTS.items():
        if part not in ("budgets", "layers"):  # they take longest
            json.dumps(measure(subject))


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["/nope"], "expected a folder .*, found nothing"),
        (["--parts", "foo"], "invalid choice: 'foo'"),
        (["--dtype", "foo"], "invalid choice: 'foo'"),
        (["--json", "/nope/x.json"], "json: expected a folder that is there"),
        (["--seq-len", "9"], "seq_len: expected an integer of at least 64"),
        (["--seq-len", "5000"], "expected a model of texts of 5000 tokens"),
        (["--threads", "0"], "threads: expected an integer of at least 1"),
    ],
)
def test_odd_input_ends_in_a_sentence(folder, arguments, says, monkeypatch, capsys):
    if arguments[0].startswith("--"):
        arguments = [str(folder), *arguments]
    monkeypatch.setattr(sys, "argv", ["real_model", *arguments])
    num_threads = torch.get_num_threads()
    with pytest.raises(SystemExit, match="2"):
        real_model.main()
    torch.set_num_threads(num_threads)
    said = capsys.readouterr().err
    assert re.search(says, said) and "Traceback" not in said


def test_a_path_may_begin_in_the_folder_of_the_course(folder, monkeypatch, capsys):
    monkeypatch.setattr(real_model, "DATA", folder.parent / "data")
    real = real_model.open_model(folder.name)
    assert real.name == folder.name
    assert capsys.readouterr().out.startswith(f"loading {folder.name} ...\n")
    with pytest.raises(FileNotFoundError, match="nowhere: expected a folder"):
        real_model.open_model("nowhere")
