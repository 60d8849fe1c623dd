import datetime
import json
import re
from types import SimpleNamespace

import pytest
import small_tokenizers as small
import torch
from helpers import random_model

from lib import paged_attention, text
from lib.course import ROOT
from lib.kv_cache import kv_cache_bytes
from lib.measure import bench, bench_attention, bench_serving
from lib.model import attend_fused, load_model
from lib.state import Delta, attend_by


@pytest.fixture(autouse=True)
def the_same_number_of_threads_after():
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def run(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["bench", *args])
    monkeypatch.setattr(bench_attention, "COPY_BYTES", {"cpu": 2**12})
    monkeypatch.setattr(bench_attention, "MATMUL_ROWS", {"cpu": 10})
    monkeypatch.setattr(bench_serving, "SIZES", SERVING_SIZES)
    trace = {"num_requests": 3, "prompt_lens": (2, 9), "answer_lens": (1, 6)}
    monkeypatch.setattr(bench_serving, "TRACE", trace)
    monkeypatch.setattr(bench_serving, "Transformers", is_not_installed)
    return bench.main()


def is_not_installed(*args, **settings):
    raise ModuleNotFoundError("No module named 'transformers'")


SERVING_SIZES = {"num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "d_model": 32}
SERVING_SIZES |= {"d_ff": 40}


FAST = ["--batch-size", "2", "--context", "30", "--steps", "2", "--block-size", "8"]
FAST += [
    "--attention-contexts",
    "9",
    "17",
    "25",
    "--attention-batches",
    "1",
    "--device",
    "cpu",
    "--serving-rounds",
    "2",
    "--serving-vocab",
    "50",
    "60",
]


def test_each_way_to_decode_is_timed_and_written_down(tmp_path, monkeypatch, capfd):
    path, threads = tmp_path / "bench.json", []
    # Not two in earnest: beside other work they wait for each other, for seconds.
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    assert run(monkeypatch, *FAST, "--threads", "2", "--json", str(path)) == 0
    out, err = capfd.readouterr()
    assert err == "" and "2 thread(s)" in out
    result = json.loads(path.read_text())
    assert result["machine"]["torch_threads"] == 2 and "--steps 2" in result["command"]
    assert {"gpu", "cuda"} <= result["machine"].keys()
    date = datetime.datetime.fromisoformat(result["date"])
    assert date.utcoffset() == datetime.timedelta(0)
    names = [row["name"] for row in result["results"]]
    assert names == ["recompute", "contiguous", "paged", "state"]
    speed = {row["name"]: row["tokens_per_s"] for row in result["results"]}
    paged, state = (speed[name] / speed["contiguous"] for name in ("paged", "state"))
    assert f"paged writes {paged:.2f} of contiguous, state {state:.2f}\n" in out
    for row in result["results"]:
        assert row["tokens_per_s"] == pytest.approx(2 / row["median_seconds"])
        assert (row["batch_size"], row["context"], row["steps"]) == (2, 30, 2)


def test_attention_alone_is_timed_and_written_down(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(bench_attention, "MAX_KV_BYTES", 2 * 24 * 2 * 64 * 4)
    copies = iter([5e9])  # measured once
    monkeypatch.setattr(bench_attention, "copy_bandwidth", lambda device: next(copies))
    monkeypatch.setattr(bench_attention, "matmul_flops_per_s", lambda device, dtype: 7e12)
    path = tmp_path / "bench.json"
    run(monkeypatch, *FAST, "--json", str(path))
    result, out = json.loads(path.read_text()), capfd.readouterr()[0]
    triton = getattr(bench.interpreter.triton, "__version__", None)
    assert result["machine"]["triton"] == triton
    attention = result["attention"]
    rows = attention.pop("rows")
    contexts = [9, 9, 9, 17, 17, 17]  # 17 tokens are 3 blocks of 8, 25 are 4
    assert [row["context"] for row in rows] == contexts
    assert "skipped 1 of 3" in out
    assert "moves 5.0 GB/s" in out and "makes 7.00 TFLOP/s" in out
    assert attention == {
        "device": "cpu",
        "dtype": "float32",
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 64,
        "block_size": 8,
        "repeats": 5,
        "copy_gb_per_s": 5.0,
        "matmul_tflops_per_s": 7.0,
        "goals": [],
        "host_rows": [],
        "errors": [],
    }
    for row in rows:
        assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / 5)
    assert "\n".join(bench_attention.table_lines(rows)) in out
    assert "goal" not in out and "needs a GPU" in out


def test_serving_is_timed_and_written_down_for_each_vocabulary(
    tmp_path, monkeypatch, capfd
):
    path = tmp_path / "bench.json"
    assert run(monkeypatch, *FAST, "--json", str(path)) == 0
    out, serving = capfd.readouterr()[0], json.loads(path.read_text())["serving"]
    assert [result["vocab_size"] for result in serving] == [50, 60]
    for result in serving:
        names = [row["name"] for row in result["rows"]]
        assert names == ["engine", "batches of 4", "batches of 16"]
        assert result["rounds"] == len(result["rows"][0]["seconds"]) == 2
        assert SERVING_SIZES.items() <= result.items() and result["block_size"] == 8
        assert result["num_requests"] == 3
        assert "\n".join(bench_serving.table_lines(result)) in out
        assert f"vocabulary {result['vocab_size']}, float32" in out
    assert out.count("not measured: No module named 'transformers'") == 2
    assert out.count("medians of 2 rounds") == 2


def test_what_failed_is_reported_and_the_rest_is_written_down(
    tmp_path, monkeypatch, capfd
):
    def fails(*args):
        raise ValueError("expected less, got 9\nmore about it")

    monkeypatch.setattr(paged_attention, "paged_decode_online", fails)
    monkeypatch.setattr(bench_attention, "MAX_KV_BYTES", 2 * 24 * 2 * 64 * 4)
    path = tmp_path / "bench.json"
    assert run(monkeypatch, *FAST, "--json", str(path)) == 1
    out, attention = capfd.readouterr()[0], json.loads(path.read_text())["attention"]
    names = [(row["name"], row["context"]) for row in attention["rows"]]
    assert names == [(name, S) for S in (9, 17) for name in ("contiguous", "gather")]
    failed = [(row["name"], row["context"]) for row in attention["errors"]]
    assert failed == [("in place", 9), ("in place", 17)]
    assert "skipped 1 of 3" in out and "more about it" not in out
    assert "batch 1, context 17, in place: ValueError: expected less, got 9" in out


def test_nothing_is_timed_where_the_kernel_is_wrong(monkeypatch, capfd):
    def is_wrong(config, block_size, *, device, dtype):
        assert (config.num_heads, block_size, device) == (32, 16, "cuda")
        raise bench_attention.WrongResultError("the kernel is wrong")

    monkeypatch.setattr(bench_attention, "check_kernel", is_wrong)
    monkeypatch.setattr(bench_attention, "check_device", lambda device: None)
    monkeypatch.setattr(bench, "bench_decoding", None)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "--device", "cuda")
    assert stopped.value.code == "nothing was timed: the kernel is wrong"


def test_goals_are_judged_on_a_gpu(capfd):
    like = {"batch_size": 8, "context": 16384, "share_of_copy": 0.9}
    rows = [
        {"name": name, "gb_per_s": 2.0, **like} for name in ("contiguous", "in place")
    ]
    sizes = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "block_size": 16}
    speeds = {"copy_gb_per_s": 3.0, "matmul_tflops_per_s": 4.0}
    judged = bench_attention.goals(rows)
    result = {"device": "cuda", "dtype": "bfloat16", **sizes, **speeds}
    times = {"host_us": 41.0, "done_us": 42.0, "graph_us": 43.0}
    host_rows = [{"batch_size": 8, "context": 128, **times}]
    result |= {"rows": rows, "goals": judged, "host_rows": host_rows, "errors": []}
    bench.print_attention(result, 1, {"gpu": "Some GPU", "processor": "Some processor"})
    out = capfd.readouterr()[0]
    assert "Some GPU: a copy" in out and "Some processor" not in out
    assert "skipped" not in out and "needs a GPU" not in out
    assert bench_attention.goal_lines(judged)[0] in out
    assert bench_attention.host_lines(host_rows)[1] in out


def test_on_a_gpu_the_kernel_is_checked_first_and_the_host_is_timed(
    tmp_path, monkeypatch, capfd
):
    """All that computes is faked: what is tried is the order, and what is written."""
    calls = []
    like = {"batch_size": 8, "context": 16384, "share_of_copy": 0.9}
    row = {"name": "in place", "gb_per_s": 2.0, **like}
    times = {"host_us": 1.0, "done_us": 2.0, "graph_us": 3.0}
    host_row = {"batch_size": 8, "context": 128, **times}
    error = {"name": "host", "batch_size": 1, "context": 4096, "error": "Some error"}

    def fakes(module, **results):
        for name, result in results.items():
            fake = lambda *args, name=name, result=result, **options: (  # noqa: E731
                calls.append((name, SimpleNamespace(args=args, **options))) or result
            )
            monkeypatch.setattr(module, name, fake)

    fakes(bench, bench_decoding=["some rows"])
    fakes(bench_attention, check_device=None, check_kernel=None, copy_bandwidth=3e9)
    fakes(bench_attention, matmul_flops_per_s=4e12, bench_attention=[row])
    fakes(bench_attention, bench_host=[host_row])
    fakes(bench, machine_facts={"gpu": "Some GPU"})
    fakes(bench, bench_serving_a_trace=["some serving"])
    attend_host = bench_attention.bench_host

    def fails_once(*args, errors, **options):
        errors.append(error)
        return attend_host(*args, errors=errors, **options)

    monkeypatch.setattr(bench_attention, "bench_host", fails_once)
    path = tmp_path / "bench.json"
    assert run(monkeypatch, "--device", "cuda", "--short", "--json", str(path)) == 1
    names = ["check_device", "machine_facts", "check_kernel", "bench_decoding"]
    names += ["copy_bandwidth", "matmul_flops_per_s", "bench_attention", "bench_host"]
    names += ["bench_serving_a_trace"]
    assert [name for name, _ in calls] == names
    attend, host = (options for _, options in calls[-3:-1])
    assert attend.args == ([512, 4096, 16384], [1, 8, 64]) and attend.repeats == 10
    assert host.progress is attend.progress and host.progress.total == 9 + 6
    assert host.args[0].num_heads == 32 and host.args[1:] == ([1, 8, 64],)
    result, out = json.loads(path.read_text()), capfd.readouterr()[0]
    attention = result["attention"]
    assert result["machine"]["gpu"] == "Some GPU" and attention["device"] == "cuda"
    assert result["serving"] == ["some serving"]
    assert attention["rows"] == [row] and attention["host_rows"] == [host_row]
    assert attention["goals"] == bench_attention.goals([row])
    assert attention["errors"] == [error] and "context 4096, host: Some error" in out
    assert "skipped 8 of 9" in out


def test_a_short_bench_is_shorter_and_what_is_asked_for_goes_first(monkeypatch):
    def parsed(*args):
        monkeypatch.setattr("sys.argv", ["bench", *args])
        return vars(bench.parse_args())

    assert bench.FULL.items() <= parsed().items()
    assert bench.SHORT.items() <= parsed("--short").items()
    asked = parsed("--short", "--steps", "7", "--attention-contexts", "9", "8")
    assert asked["steps"] == 7 and asked["attention_contexts"] == [9, 8]
    assert asked["context"] == bench.SHORT["context"]
    assert bench.FULL.keys() == bench.SHORT.keys()
    assert bench.gpu_minutes(bench.SHORT) < 4
    assert max(bench.SHORT["attention_contexts"]) >= bench_attention.GOAL_FROM


def test_the_help_says_how_long_it_takes(monkeypatch, capfd):
    monkeypatch.setattr(bench, "GPU_SECONDS_PER_CASE", 40)
    monkeypatch.setattr(bench, "GPU_SECONDS_TO_START", 60)
    with pytest.raises(SystemExit):
        run(monkeypatch, "--help")
    out = " ".join(capfd.readouterr()[0].split())
    assert "on a GPU an estimated 13 minutes" in out  # 18 cases, and a minute
    assert "on a GPU an estimated 7 minutes" in out  # 9 cases
    assert "(1024; short: 256)" in out


def test_texts_may_be_longer_than_the_model_was_trained_on():
    steps = bench.decode_steps(batch_size=1, context=520, num_steps=2, block_size=16)
    for step in steps.values():
        step()


def test_the_steps_of_both_caches_give_the_same_logits():
    steps = bench.decode_steps(batch_size=3, context=20, num_steps=3, block_size=8)
    for _ in range(3):
        logits = [steps[name]() for name in ("contiguous", "paged")]
        torch.testing.assert_close(*logits)


def test_a_state_takes_the_prompts_in_and_each_step_another_token():
    B, context = 2, 20
    step = bench.decode_steps(B, context, num_steps=3, block_size=8)["state"]
    model, ids = load_model(), text.encode(text.load_book())[: B * context]
    prompts = ids.view(B, context)
    for num_steps in range(1, 4):
        # Each step is over the first token of its request once more.
        more = prompts[:, :1].expand(-1, num_steps)
        whole = torch.cat([prompts, more], dim=1)
        positions = torch.arange(whole.shape[1])
        with torch.no_grad():
            expected = model(whole, positions, attend_by(Delta()))[:, -1]
        torch.testing.assert_close(step(), expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "args, message",
    [
        ("--block-size 0", "block_size: expected at least 1, got 0"),
        ("--attention-contexts 5 -1", "attention_contexts: expected at least 1, got -1"),
        ("--attention-batches 0", "attention_batches: expected at least 1, got 0"),
        ("--attention-batches", "expected at least one argument"),
        ("--serving-rounds 0", "serving_rounds: expected at least 1, got 0"),
        ("--serving-vocab 9 0", "serving_vocab: expected at least 1, got 0"),
        ("--device tpu", "device: expected cpu or cuda, got tpu"),
        ("--json no/such/folder/x.json", "expected a folder that is there, got no/such"),
    ],
)
def test_what_has_no_meaning_is_refused(monkeypatch, capfd, args, message):
    with pytest.raises(SystemExit):
        run(monkeypatch, *args.split())
    assert message in capfd.readouterr().err


def test_a_gpu_that_is_not_there_is_refused(monkeypatch, capfd):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--device", "cuda")
    assert "device: expected cpu" in (err := capfd.readouterr().err)
    assert "got cuda" in err


def test_the_pages_say_of_a_gpu_what_was_measured_on_it():
    result = json.loads((ROOT / "data/results/bench_gpu.json").read_text())
    cases = bench_attention.by_case(result["attention"]["rows"])
    ways = cases[8, 16384]
    shares = {name: round(100 * row["share_of_copy"]) for name, row in ways.items()}

    def of_torch(case):
        in_place, dense = (
            cases[case][name]["gb_per_s"] for name in ("in place", "torch")
        )
        return round(100 * in_place / dense)

    short = [of_torch(case) for case in cases if case[1] <= 4096]
    host = {(r["batch_size"], r["context"]): r for r in result["attention"]["host_rows"]}
    readme, chapter = (
        re.sub(r"\s+(# )?", " ", (ROOT / path).read_text(encoding="utf-8"))
        for path in ("README.md", "solutions/05_paged_attention.py")
    )
    assert result["machine"]["gpu"] == "NVIDIA H200"
    for words in (
        f"at {shares['in place']}% of a copy's bandwidth, where a gather reaches "
        f"{shares['gather']}% and torch's own attention, over one dense piece, "
        f"{shares['torch']}%",
        f"it has {min(short)}% to {max(short)}% of the speed of torch's",
    ):
        assert words in readme, words
    for words in (
        f"16,384 tokens at {shares['in place']}% of a copy's bandwidth",
        f"The gather reaches {shares['gather']}%",
        f"Our kernel has {of_torch((8, 16384))}% of its speed there",
        f"{host[1, 128]['host_us']:.0f} microseconds per call, "
        f"{host[1, 128]['graph_us']:.0f} in a graph",
    ):
        assert words in chapter, words
    assert abs(of_torch((8, 512)) - 75) < 3, "three quarters at 512 tokens"


REAL = ["--batch-size", "2", "--context", "30", "--steps", "2", "--block-size", "8"]
REAL += ["--device", "cpu"]


@pytest.fixture
def real(tmp_path):
    """The path of a small real model, and the model."""
    pytest.importorskip("transformers")
    model = random_model(vocab_size=small.num_tokens())
    bench_serving.llama(model, "eager").save_pretrained(tmp_path / "real")
    small.write_folder(tmp_path / "real")
    return tmp_path / "real", model


@pytest.mark.parametrize("dtype, itemsize", [("float32", 4), ("bfloat16", 2)])
def test_a_real_model_is_timed_and_nothing_else(
    real, tmp_path, monkeypatch, capsys, dtype, itemsize
):
    path, model = real
    json_path = tmp_path / "real.json"
    arguments = ["--model", str(path), "--dtype", dtype, "--json", str(json_path)]
    assert run(monkeypatch, *arguments, *REAL) == 0
    found = json.loads(json_path.read_text())
    rows = found["results"]
    assert [row["name"] for row in rows] == ["recompute", "contiguous", "paged"]
    assert {(row["batch_size"], row["context"]) for row in rows} == {(2, 30)}
    assert found["serving"] == [] and found["attention"] == {"errors": []}
    each = kv_cache_bytes(model.config, 1, itemsize)
    said = capsys.readouterr().out
    assert said.startswith("loading real ...\n") and f"0 MB in {dtype}" in said
    assert f"keys and values {each:,} bytes per token" in said
    assert f"{found['machine']['torch_threads']} thread(s)" in said
    assert "state" not in said


def test_of_a_real_model_the_steps_are_over_its_own_tokens(real, monkeypatch):
    path, model = real
    settings = {"model": path, "dtype": "float32", "device": "cpu"}
    args = SimpleNamespace(**settings, batch_size=2, context=30, steps=2)
    made, book_ids = bench.real_model(args)
    assert book_ids[:1000].tolist() == small.made().encode(text.load_book()).ids[:1000]
    steps = bench.decode_steps(2, 30, 2, 8, (made, book_ids))
    prompts = book_ids[:60].view(2, 30)
    with torch.no_grad():
        again = torch.cat([prompts, prompts[:, :1]], dim=1)
        expected = model(again, torch.arange(31), attend_fused)[:, -1]
    for name in ("contiguous", "paged"):
        torch.testing.assert_close(steps[name](), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "spoil, more, says",
    [
        (lambda path: (path / "config.json").unlink(), [], "expected config.json, or"),
        (lambda path: (path / "tokenizer.json").unlink(), [], "expected tokenizer.json"),
        (lambda path: None, ["--steps", "99"], r"at most 128 tokens, .* got 30 \+ 99"),
    ],
)
def test_of_a_real_model_that_does_not_do_nothing_is_timed(
    real, monkeypatch, spoil, more, says
):
    path, _ = real
    spoil(path)
    with pytest.raises(SystemExit, match=f"^nothing was timed: .*{says}"):
        run(monkeypatch, "--model", str(path), *REAL, *more)


@pytest.mark.parametrize(
    "option, value, says",
    [
        ("--context", "126", "expected at most 128 tokens, .* got 126 . 2"),
        ("--batch-size", "1000000", "batch_size: expected at most .* got 1000000"),
        ("--block-size", "99999999999999", "nothing was timed: "),
    ],
)
def test_what_a_real_model_cannot_do_is_said(real, option, value, says, monkeypatch):
    settings = ["--device", "cpu", "--context", "30", "--steps", "2", option, value]
    monkeypatch.setattr("sys.argv", ["bench", "--model", str(real[0]), *settings])
    with pytest.raises(SystemExit, match=says):
        bench.main()
