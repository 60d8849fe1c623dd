import importlib.metadata
import sys
from collections import deque

import pytest
import torch
from helpers import random_model

from lib.engine import Engine, Step
from lib.measure import bench_serving
from lib.measure.bench_serving import Asked
from lib.paged_kv_cache import PagedKVCache

needs_transformers = pytest.mark.skipif(
    bench_serving.transformers_version() is None, reason="needs transformers"
)
SMALL_TRACE = {"num_requests": 5, "prompt_lens": (2, 9), "answer_lens": (1, 6)}
NAMES = ["engine", "batches of 2", "batches of 5", "transformers"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    sizes = {"num_layers": 2, "d_model": 32, "d_ff": 40}
    monkeypatch.setattr(bench_serving, "SIZES", {**bench_serving.SIZES, **sizes})
    monkeypatch.setattr(bench_serving, "TRACE", SMALL_TRACE)
    monkeypatch.setattr(bench_serving, "BATCH_SIZES", [2, 5])


@pytest.fixture
def no_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)

    def is_missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", is_missing)


class Progress:
    num_updates = 0

    def update(self):
        self.num_updates += 1


def test_a_trace_is_what_was_asked_for_and_the_same_each_time():
    sizes = {"num_requests": 200, "prompt_lens": (3, 7), "answer_lens": (2, 4)}
    trace = bench_serving.make_trace(11, **sizes)
    assert len(trace) == 200
    assert {len(prompt_ids) for prompt_ids, _ in trace} == {3, 4, 5, 6, 7}
    assert {count for _, count in trace} == {2, 3, 4}
    assert {i for prompt_ids, _ in trace for i in prompt_ids} == set(range(11))
    assert trace == bench_serving.make_trace(11, **sizes)
    assert trace != bench_serving.make_trace(11, **sizes, seed=1)


def test_a_model_is_always_the_same_and_nobody_elses_numbers_change():
    torch.manual_seed(5)
    first = bench_serving.random_model(64, 32)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    second = bench_serving.random_model(64, 32)
    for one, other in zip(first.parameters(), second.parameters()):
        assert torch.equal(one, other)


@needs_transformers
def test_all_ways_are_timed_and_write_the_same():
    progress = Progress()
    result = bench_serving.bench_serving(64, 2, block_size=4, progress=progress)
    assert progress.num_updates == 3 and result["errors"] == []
    assert [row["name"] for row in result["rows"]] == NAMES
    trace = bench_serving.make_trace(64, **SMALL_TRACE)
    num_tokens = sum(count for _, count in trace)
    assert result["num_new_tokens"] == num_tokens
    assert result["num_prompt_tokens"] == sum(len(asked.prompt_ids) for asked in trace)
    for row in result["rows"]:
        assert row["num_different"] == 0, row
        assert len(row["seconds"]) == 2
        assert row["tokens_per_s"] == pytest.approx(num_tokens / row["median_seconds"])
    version = importlib.metadata.version("transformers")
    assert result["transformers"]["version"] == version
    assert sum(result["shares"].values()) == pytest.approx(1)
    lines = bench_serving.table_lines(result)
    assert len(lines) == 1 + 4 + 2 and "all write the same answers" in lines


def test_answers_are_as_long_as_was_asked_for_and_go_on_in_many_ways():
    trace = bench_serving.make_trace(64, **SMALL_TRACE)
    model = bench_serving.random_model(64, 32)
    served = bench_serving.serve_by_engine(model, trace, 4, token_budget=8)
    assert [len(answer) for answer in served.answers] == [count for _, count in trace]
    assert len({i for answer in served.answers for i in answer}) > 5
    assert sum(sum(step.counts.values()) for step in served.steps) == sum(
        len(prompt_ids) + count - 1 for prompt_ids, count in trace
    )
    assert max(sum(step.counts.values()) for step in served.steps) == 8


def test_a_batch_lasts_as_long_as_its_longest_answer(monkeypatch):
    calls, forward = [], bench_serving.generate.forward_cached

    def counted(model, cache, token_ids, query_lens):
        calls.append(len(query_lens))
        return forward(model, cache, token_ids, query_lens)

    monkeypatch.setattr(bench_serving.generate, "forward_cached", counted)
    trace = [Asked([1, 2], 3), Asked([3], 5), Asked([4, 5, 6], 2)]
    model = bench_serving.random_model(64, 32)
    served = bench_serving.serve_in_batches(model, trace, 2)
    assert calls == [2] * 5 + [1] * 2
    assert [len(answer) for answer in served.answers] == [3, 5, 2]
    by_engine = bench_serving.serve_by_engine(model, trace, 4, token_budget=64)
    assert served.answers == by_engine.answers


def test_without_transformers_its_row_says_so_and_the_rest_runs(no_transformers):
    result = bench_serving.bench_serving(64, 1, block_size=4)
    assert [row["name"] for row in result["rows"]] == NAMES[:-1]
    assert [row["name"] for row in result["errors"]] == ["transformers"]
    lines = bench_serving.table_lines(result)
    assert any(line.startswith("transformers   not measured: ") for line in lines)
    assert result["transformers"]["version"] is None


@pytest.mark.parametrize("when", ["at once", "in round 1"])
def test_with_another_interface_its_row_says_so_and_the_rest_runs(monkeypatch, when):
    calls = []

    class Other:
        def __init__(self, model, trace, **settings):
            if when == "at once":
                raise TypeError("unexpected keyword\nand more")

        def serve(self, trace):
            if calls.append("serve") or len(calls) == 2:
                raise TypeError("unexpected keyword\nand more")
            return bench_serving.Served(1.0, [[] for _ in trace])

        def close(self):
            calls.append("close")

    monkeypatch.setattr(bench_serving, "Transformers", Other)
    result = bench_serving.bench_serving(64, 3, block_size=4)
    assert calls == ([] if when == "at once" else ["serve", "serve", "close"])
    assert [row["name"] for row in result["rows"]] == NAMES[:-1]
    expected = "transformers   not measured: TypeError: unexpected keyword"
    assert expected in bench_serving.table_lines(result)


def test_what_goes_wrong_with_our_own_is_raised(no_transformers, monkeypatch):
    def fails(*args):
        raise ValueError("our own")

    monkeypatch.setattr(bench_serving, "serve_in_batches", fails)
    with pytest.raises(ValueError, match="our own"):
        bench_serving.bench_serving(64, 1)


@needs_transformers
def test_a_request_that_transformers_refuses_is_named_and_its_thread_ends():
    model = bench_serving.random_model(64, 32)
    trace = [Asked([1, 2, 3], 4)]
    server = bench_serving.Transformers(model, trace, **bench_serving.TRANSFORMERS)
    thread = server.manager._generation_thread
    try:
        assert len(server.serve(trace).answers[0]) == 4
        with pytest.raises(RuntimeError, match="request 0: |got 0"):
            server.serve([Asked([1, 64], 4)])  # 64 is not in the vocabulary
    finally:
        server.close()
    assert not thread.is_alive()


def test_a_table_says_how_often_and_what_differs():
    rows = [
        {"name": name, "seconds": seconds, "median_seconds": seconds[1]}
        | {"tokens_per_s": 30 / seconds[1], "num_different": num_different}
        for name, seconds, num_different in (
            ("engine", [1.0, 2.0, 3.0], 0),
            ("batches of 4", [2.0, 5.0, 6.0], 2),
        )
    ]
    shares = {"schedule": 0.015, "forward": 0.96, "sample": 0.015, "finish": 0.01}
    error = {"name": "transformers", "error": "not measured: no"}
    result = {"rows": rows, "errors": [error], "num_requests": 16, "num_steps": 7}
    assert bench_serving.table_lines(result | {"shares": shares})[1:] == [
        "engine              2.00      15.0   1.00 (1.00 to 1.00)",
        "batches of 4        5.00       6.0   2.00 (2.00 to 2.50)",
        "transformers   not measured: no",
        "answers other than the engine's: batches of 4: 2 of 16",
        "the engine's 7 steps: schedule 1.5 %, forward 96.0 %, sample 1.5 %, "
        "finish 1.0 %",
    ]


def test_shares_are_of_all_steps_together():
    def step(*seconds):
        by_part = dict(zip(bench_serving.PARTS, seconds))
        return Step({}, {}, {}, [], 0, 0, by_part)

    shares = bench_serving.shares([step(1.0, 5.0, 1.0, 1.0), step(0.0, 7.0, 0.0, 1.0)])
    assert list(shares.values()) == [1 / 16, 12 / 16, 1 / 16, 2 / 16]


class Counting(deque):
    """A queue that counts how many of its entries somebody has looked at."""

    num_seen = 0

    def __iter__(self):
        for entry in super().__iter__():
            self.num_seen += 1
            yield entry

    def __getitem__(self, index):
        self.num_seen += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("num_blocks", [4, 8])
def test_a_step_looks_at_as_many_who_wait_however_many_there_are(num_blocks):
    seen = {}
    for num_waiting in (16, 10_000):
        cache = PagedKVCache(random_model().config, num_blocks, block_size=4)
        engine = Engine(random_model(), cache)
        for _ in range(num_waiting):
            engine.add([1, 2, 3], 5, temperature=0, seed=0)
        engine.waiting, finds = Counting(engine.waiting), []
        find = cache.find
        cache.find = lambda token_ids, finds=finds, find=find: (
            finds.append(token_ids) or find(token_ids)
        )
        steps = [engine.step() for _ in range(7)]
        assert engine.waiting.num_seen >= len(finds) > 0
        counts = [sorted(step.counts.values()) for step in steps]
        seen[num_waiting] = engine.waiting.num_seen, len(finds), counts
    assert seen[16] == seen[10_000]
    most_seen = num_blocks + 1  # in a step: those that begin, and one that does not fit
    assert seen[16][0] <= 7 * most_seen
