import datetime
import json

import pytest
import torch

from lib import state
from lib.course import ROOT
from lib.measure import bench_attention, bench_state

H, G, D, B = 4, 2, 8, bench_state.BATCH_SIZE
SIZES = {"num_heads": H, "num_kv_heads": G, "head_dim": D}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Sizes of which all can be counted; as many threads after as before."""
    monkeypatch.setattr(bench_attention, "COPY_BYTES", {"cpu": 2**12})
    for name, value in {
        "SIZES": SIZES,
        "CONTEXTS": [3, 5],
        "PROMPTS": [4, 9],
        "CHUNK_SIZES": [2, 4],
    }.items():
        there = getattr(bench_state, name)
        monkeypatch.setattr(bench_state, name, {**there, "cpu": value})
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def known(way: object) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """The tensors that a way attends over, by the names that they have there."""
    cells = (cell.cell_contents for cell in way.__closure__)
    return dict(zip(way.__code__.co_freevars, cells))


def softmax_of(q, k, v):
    """One query (D,) over keys and values (S, D), in plain code."""
    weights = torch.tensor([float(q @ key) / D**0.5 for key in k]).softmax(0)
    return sum(weight * value for weight, value in zip(weights, v))


def test_a_step_over_a_cache_is_softmax_attention_of_each_request():
    torch.manual_seed(1)
    ways = bench_state.step_ways(5, "cpu")
    assert list(ways) == ["cache", "linear", "delta"]
    out, has = ways["cache"](), known(ways["cache"])
    assert has["k_cache"].shape == has["v_cache"].shape == (B, G, 5, D)
    assert out.shape == (B, H, 1, D)
    for b in range(B):
        for h in range(H):
            kv = (has[name][b, h // 2] for name in ("k_cache", "v_cache"))
            expected = softmax_of(has["q"][b, h, 0], *kv)
            torch.testing.assert_close(out[b, h, 0], expected)


@pytest.mark.parametrize("name", ["linear", "delta"])
def test_a_step_from_a_state_is_that_of_each_request(name):
    torch.manual_seed(1)
    way = bench_state.step_ways(5, "cpu")[name]
    out, has = way(), known(way)
    assert out.shape == (B * H, D) and out.dtype == torch.float32
    assert torch.equal(way(), out), "expected another call to begin with the same state"
    torch.testing.assert_close(has["k"].norm(dim=-1), torch.ones(B * G))
    for b in range(B):
        of_kv, of_q = slice(b * G, (b + 1) * G), slice(b * H, (b + 1) * H)
        S, q = has["S"][of_kv], has["asked"][of_q]
        k, v = has["k"][of_kv], has["v"][of_kv]
        if name == "linear":
            assert torch.equal(has["decay"], torch.ones(B * G))
            expected, _ = state.linear_step(S, q, k, v, torch.ones(G))
        else:
            expected, _ = state.delta_step(S, q, k, v)
        torch.testing.assert_close(out[of_q], expected)


def test_a_step_from_a_state_does_not_depend_on_the_context():
    for name in ("linear", "delta"):
        short, long = (known(bench_state.step_ways(n, "cpu")[name]) for n in (3, 50))
        assert short["S"].shape == long["S"].shape == (B * G, D, D)


def test_a_prompt_by_softmax_attends_to_what_came_before():
    torch.manual_seed(1)
    way = bench_state.prompt_ways(9, "cpu")["softmax"]
    out, (q, k, v) = way(), known(way)["dense"]
    assert out.shape == q.shape == (1, H, 9, D) and k.shape == v.shape == (1, G, 9, D)
    for h in range(H):
        for t in range(9):
            kv = (x[0, h // 2, : t + 1] for x in (k, v))
            torch.testing.assert_close(out[0, h, t], softmax_of(q[0, h, t], *kv))


def test_a_prompt_in_chunks_is_the_state_step_by_step(monkeypatch):
    torch.manual_seed(1)
    ways = bench_state.prompt_ways(9, "cpu")
    assert list(ways) == ["softmax", "chunks of 2", "chunks of 4"]
    chunked, sizes = state.linear_chunked, []

    def noting(S, q, k, v, decay, chunk_size):
        sizes.append(chunk_size)
        return chunked(S, q, k, v, decay, chunk_size)

    monkeypatch.setattr(state, "linear_chunked", noting)
    for name in ("chunks of 2", "chunks of 4"):
        out, has = ways[name](), known(ways[name])
        S, ones = torch.zeros(G, D, D), torch.ones(G)
        assert torch.equal(has["S"], S) and torch.equal(has["decay"], ones)
        assert out.shape == (9, H, D)
        for x, heads in ((has["q"], H), (has["k"], G)):
            torch.testing.assert_close(x.norm(dim=-1), torch.ones(9, heads))
        for t in range(9):
            q, k, v = (has[name][t] for name in ("q", "k", "v"))
            expected, S = state.linear_step(S, q, k, v, ones)
            torch.testing.assert_close(out[t], expected)
    assert sizes == [2, 4]


def test_rows_are_microseconds_by_way_of_each_size(monkeypatch):
    calls, times = [], iter(range(1, 100))

    def timed(attend, device, repeats):
        calls.append((attend().requires_grad, torch.is_grad_enabled(), device, repeats))
        return next(times) / 1e6 + 4e-8

    monkeypatch.setattr(bench_state, "cold_seconds", timed)
    assert bench_state.bench_state("cpu", repeats=3) == {
        "step": [
            {"tokens": 3, "cache": 1.0, "linear": 2.0, "delta": 3.0},
            {"tokens": 5, "cache": 4.0, "linear": 5.0, "delta": 6.0},
        ],
        "prompt": [
            {"tokens": 4, "softmax": 7.0, "chunks of 2": 8.0, "chunks of 4": 9.0},
            {"tokens": 9, "softmax": 10.0, "chunks of 2": 11.0, "chunks of 4": 12.0},
        ],
    }
    assert calls == [(False, False, "cpu", 3)] * 12


def run(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["bench_state", *args])
    bench_state.main()


def test_the_command_prints_and_writes_what_was_measured(tmp_path, monkeypatch, capfd):
    path = tmp_path / "state.json"
    run(monkeypatch, "--json", str(path))
    out, err = capfd.readouterr()
    result, lines = json.loads(path.read_text()), out.split("\n")
    assert err == "" and torch.get_num_threads() == 1
    expected = f"python -m lib.measure.bench_state --json {path}"
    assert result["command"] == expected and result["device"] == "cpu"
    date = datetime.datetime.fromisoformat(result["date"])
    assert date.utcoffset() == datetime.timedelta(0)
    assert result["machine"]["torch_threads"] == 1 and "gpu" in result["machine"]
    found = result["microseconds"]
    assert {name: [row["tokens"] for row in rows] for name, rows in found.items()} == {
        "step": [3, 5],
        "prompt": [4, 9],
    }
    words = [line.split() for line in lines if line]
    expected = []
    for name, rows in found.items():
        expected.append([name, *" ".join(rows[0]).split()])
        expected += [[f"{value:,}" for value in row.values()] for row in rows]
        assert all(value > 0 for row in rows for value in row.values())
    assert words == expected


def test_without_json_nothing_is_written(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "--device", "cpu")
    assert "delta" in capfd.readouterr().out and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args, message",
    [
        ("--device tpu", "device: expected cpu or cuda, got tpu"),
        ("--device cuda:0", "device: expected cpu or cuda, got cuda:0"),
        ("--device cuda", "device: expected cpu, torch finds no GPU here, got cuda"),
        ("--json no/such/folder/x.json", "expected a folder that is there, got no/such"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_timed(
    monkeypatch, capfd, args, message
):
    monkeypatch.setattr(bench_state, "bench_state", None)
    with pytest.raises(SystemExit):
        run(monkeypatch, *args.split())
    assert message in capfd.readouterr().err


def test_nothing_is_timed_on_no_device_or_no_times():
    for args, message in (
        (("tpu",), "device: expected cpu or cuda, got tpu"),
        (("cuda",), "device: expected cpu, torch finds no GPU"),
        (("cpu", 0), "repeats: expected an integer of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            bench_state.bench_state(*args)


def test_a_gpu_is_taken_where_there_is_one_and_one_thread(monkeypatch, capfd):
    devices = []

    def noting(device):
        devices.append(device)
        return {"step": [{"tokens": 512, "cache": 1234.5}]}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_state, "bench_state", noting)
    torch.set_num_threads(2)
    run(monkeypatch)
    assert devices == ["cuda"] and "1,234.5" in capfd.readouterr().out
    assert torch.get_num_threads() == 1


def test_what_was_measured_on_a_gpu_is_what_would_be_measured_now(monkeypatch):
    result = json.loads((ROOT / "data/results/state_gpu.json").read_text())
    assert result["device"] == "cuda" and result["machine"]["gpu"] == "NVIDIA H200"
    for name in ("CONTEXTS", "PROMPTS", "CHUNK_SIZES"):
        there = getattr(bench_state, name)
        monkeypatch.setitem(there, "cpu", there["cuda"])
    ways = {
        "step": (bench_state.step_ways(1, "cpu"), bench_state.CONTEXTS["cuda"]),
        "prompt": (bench_state.prompt_ways(1, "cpu"), bench_state.PROMPTS["cuda"]),
    }
    found = result["microseconds"]
    assert found.keys() == ways.keys()
    for name, (by_name, sizes) in ways.items():
        assert [row["tokens"] for row in found[name]] == sizes
        for row in found[name]:
            assert list(row) == ["tokens", *by_name]
            assert all(value > 0 for value in row.values())
