import json

import pytest
import torch

from lib import bench


@pytest.fixture(autouse=True)
def the_same_number_of_threads_after():
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def run(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["bench", *args])
    return bench.main()


def test_each_way_to_decode_is_timed_and_written_down(tmp_path, monkeypatch, capfd):
    sizes = ["--batch-size", "2", "--context", "30", "--steps", "2", "--block-size", "8"]
    path = tmp_path / "bench.json"
    assert run(monkeypatch, *sizes, "--threads", "2", "--json", str(path)) == 0
    out, err = capfd.readouterr()
    assert err == "" and "2 thread(s)" in out
    result = json.loads(path.read_text())
    assert result["machine"]["torch_threads"] == 2 and "--steps 2" in result["command"]
    names = [row["name"] for row in result["results"]]
    assert names == ["recompute", "contiguous", "paged"]
    speed = {row["name"]: row["tokens_per_s"] for row in result["results"]}
    assert f"paged writes {speed['paged'] / speed['contiguous']:.2f} of" in out
    for row in result["results"]:
        assert row["tokens_per_s"] == pytest.approx(2 / row["median_seconds"])
        assert (row["batch_size"], row["context"], row["steps"]) == (2, 30, 2)


def test_texts_may_be_longer_than_the_model_was_trained_on():
    steps = bench.decode_steps(batch_size=1, context=520, num_steps=2, block_size=16)
    for step in steps.values():
        step()


def test_the_steps_of_both_caches_give_the_same_logits():
    steps = bench.decode_steps(batch_size=3, context=20, num_steps=3, block_size=8)
    for _ in range(3):
        logits = [steps[name]() for name in ("contiguous", "paged")]
        torch.testing.assert_close(*logits)


def test_sizes_without_meaning_are_refused(monkeypatch, capfd):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--block-size", "0")
    assert "block_size: expected at least 1, got 0" in capfd.readouterr().err
