"""Chapter 6: requests come when they like and end when they like.

A static batch lasts as long as its longest text, and whoever comes meanwhile waits. The
engine decides anew at every step who takes part (Orca, OSDI 2022): whoever is done makes
room at once, and a prompt enters in pieces beside requests that decode (Sarathi-Serve,
https://arxiv.org/abs/2403.02310). If the pool runs dry, the request that began last is
sent back, and computed again later (https://arxiv.org/abs/2309.06180, section 4.5).

Invariant: what a request knows, its prompt and its answer so far, is in `token_ids`; how
much of that is computed is in the cache, and nowhere else. So an engine that was stopped
at any line of this file or its cache's, by an error or an interrupt, finds its way back:
`Engine._settle`. And who else is there changes nothing but rounding: each token is drawn
with a seed of its own.

Read lib/generate.py and lib/paged_kv_cache.py before.
"""

import itertools
import random
import time
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import NamedTuple

import torch

from lib import generate, kv_cache, sampling
from lib.config import check_count
from lib.kv_cache import KVCache
from lib.model import Transformer


class Load(NamedTuple):
    """One request in plain numbers, for `schedule`."""

    num_tokens: int  # of its prompt and its answer so far
    num_cached: int  # of these, in the cache
    # That it can fill without taking a free one. Not among them: a last block that others
    # use too (who writes needs a copy), and what lies in the cache and nobody uses.
    num_blocks: int


def schedule(
    running: Sequence[Load],
    waiting: Iterable[Load],
    num_free_blocks: int,
    token_budget: int,
    block_size: int,
    watermark_blocks: int = 0,
) -> list[int]:
    """How many new tokens of each request the next step computes.

    running, waiting: in the order of their arrival; waiting may be a generator, of which
    no more are looked at than begin, and one. First come requests that miss one token
    (decodes), then running prompts, each as much of it as the budget and the free blocks
    allow; who finds no room gets 0, and those behind it go on. Then those waiting. The
    first of these begins if the budget has a token left, and if blocks for all that it
    knows are free beside the `watermark_blocks`, which stay free for those that decode
    (while nobody runs, and nobody has begun in this step, none need to). Then the second,
    and so on; nobody overtakes. Returns a count for each that runs, in their order, then
    for each that begins, at least 1.

    >>> decodes, prompt = [Load(9, 8, 2), Load(5, 4, 2)], Load(12, 0, 0)
    >>> schedule(decodes, [prompt], num_free_blocks=4, token_budget=8, block_size=4)
    [1, 1, 6]
    """

    def num_blocks(num_tokens: int) -> int:
        return -(-num_tokens // block_size)  # rounded up

    counts, free = [0] * len(running), num_free_blocks

    # Decodes, each somebody who reads along; then running prompts.
    missing = [load.num_tokens - load.num_cached for load in running]
    for i in sorted(range(len(running)), key=lambda i: missing[i] > 1):
        load = running[i]
        room = (load.num_blocks + free) * block_size - load.num_cached
        counts[i] = max(min(missing[i], token_budget, room), 0)
        if counts[i] > 0:
            token_budget -= counts[i]
            free -= max(num_blocks(load.num_cached + counts[i]) - load.num_blocks, 0)

    # Then whoever waits, in order.
    for load in waiting:
        stay_free = watermark_blocks if counts else 0
        needed = num_blocks(load.num_tokens) - load.num_blocks
        if token_budget == 0 or needed + stay_free > free:
            break
        counts.append(min(load.num_tokens - load.num_cached, token_budget))
        token_budget -= counts[-1]
        free -= needed
    return counts


def finish_reason(
    new_ids: Sequence[int], max_new_tokens: int, stop_ids: Iterable[int] = ()
) -> str | None:
    """Why an answer ends with the last of new_ids: "stop", "length", or None: it goes on.

    "stop" where that one is among stop_ids, be it the last allowed one too. It then
    belongs to the answer.

    >>> finish_reason([5, 2], 2, stop_ids=[2]), finish_reason([2, 5], 3, stop_ids=[2])
    ('stop', None)
    """
    if new_ids[-1] in stop_ids:
        return "stop"
    return "length" if len(new_ids) >= max_new_tokens else None


@dataclass(eq=False)
class Request:
    """What an engine knows of a request, and what whoever asked can read."""

    request_id: Hashable
    token_ids: list[int]  # of the prompt, and of the answer so far
    prompt_len: int
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    seed: int
    stop_ids: frozenset[int]
    number: int  # in the order of arrival
    num_answers: int = 1  # to this prompt, that were asked for together
    finish_reason: str | None = None  # "stop", "length", "cancelled", "error: ..."
    # Of n answers to a prompt one computes it, and the others are forks of that one.
    parent: "Request | None" = field(default=None, repr=False)

    @property
    def new_ids(self) -> list[int]:
        """The answer so far."""
        return self.token_ids[self.prompt_len :]


def preempt(running: list[Request], waiting: deque[Request], cache: KVCache) -> Request:
    """Send the request that began last, the last of `running`, back to the head of the
    queue, and free what it has in the cache. Both lists are changed in place, and nothing
    of the request, which is returned."""
    request = running.pop()
    cache.free(request.request_id)
    waiting.appendleft(request)
    return request


def latencies(arrived: float, times: Sequence[float]) -> dict[str, float]:
    """What somebody waits for whose tokens came at these times; all in seconds.

    first: from the request's arrival to its first token. between: from one token to the
    next, mean, 0 for a single one. normalized: from its arrival to its last token, for
    each token (the measure of https://arxiv.org/abs/2309.06180, section 6.1).

    >>> latencies(1.0, [3.0, 3.5, 4.0])
    {'first': 2.0, 'between': 0.5, 'normalized': 1.0}
    """
    between = (times[-1] - times[0]) / max(len(times) - 1, 1)
    return {
        "first": times[0] - arrived,
        "between": between,
        "normalized": (times[-1] - arrived) / len(times),
    }


def tokens_that_fit(
    memory_bytes: float, weight_bytes: float, bytes_per_token: float, share: float = 0.9
) -> int:
    """Tokens that a pool holds, if weights and pool may have this share of the memory.

    The rest is for activations and whatever else there is. Rounded down; 0 where the
    weights do not fit.

    >>> tokens_that_fit(80e9, 16e9, 131_072)  # Llama 3 8B in 16 bits, on 80 GB
    427246
    """
    return max(int((share * memory_bytes - weight_bytes) // bytes_per_token), 0)


PARTS = ("schedule", "forward", "sample", "finish")  # of a step


@dataclass(frozen=True)
class Step:
    """What a step of the engine did, by request id."""

    counts: dict[Hashable, int]  # tokens that were computed
    next_ids: dict[Hashable, int]  # tokens that were drawn
    finished: dict[Hashable, str]  # with the reason
    preempted: list[Hashable]
    num_waiting: int  # after it
    num_free_blocks: int
    seconds: dict[str, float]  # of each of PARTS


class Engine:
    """Serves requests with one model and one cache, a step after the other.

    The cache is of any kind of lib/kv_cache.py, and the engine's alone. token_budget: new
    tokens that a step computes at most. watermark: the share of all blocks, rounded down
    to whole ones, that stay free when a request begins.

    running, waiting: requests, in the order of their arrival. Whoever asks for a token
    has it from `step`, from `stream`, or from the `Request` that `add` gives; the engine
    forgets a request when it ends.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        *,
        token_budget: int = 256,
        watermark: float = 0.0,
    ):
        generate.check_cache(model, cache)
        generate.check_no_dropout(model)
        if any(request_id is not None for request_id in cache.request_ids):
            raise ValueError(
                f"cache: expected one without requests, got {cache.request_ids}"
            )
        if not 0 <= watermark < 1:
            raise ValueError(
                f"watermark: expected a share of the blocks, at least 0 and below 1, got "
                f"{watermark}"
            )
        self.model, self.cache = model, cache
        self.token_budget = check_count("token_budget", token_budget)
        self.watermark_blocks = int(watermark * cache.num_blocks)
        self.requests: dict[Hashable, Request] = {}  # all that have not ended
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self._numbers = itertools.count()
        self._is_settled = True

    def add(
        self,
        prompt_ids: torch.Tensor | Sequence[int],
        max_new_tokens: int,
        *,
        request_id: Hashable = None,
        n: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_ids: Iterable[int] = (),
    ) -> Request | list[Request]:
        """A new request, at the end of the queue. It takes part from the next step on.

        An answer ends with a token of stop_ids, or with its max_new_tokens-th. Its tokens
        are drawn as `sampling.next_token_probs` says, with `seed`, or one that is drawn
        here. request_id: None for one that nobody has. n: answers to ask for; with more
        than one, of which the i-th has the id (request_id, i) and the seed `seed` + i,
        returns a list. They share the prompt's blocks where the cache can fork. Raises
        ValueError for what could never be served, and then nothing has changed.
        """
        self._settle()
        token_ids = self._check_prompt(prompt_ids, max_new_tokens)
        sampling.check_sampling(temperature, top_k, top_p)
        check_count("n", n)
        stop_ids = self._check_stop_ids(stop_ids)
        seed = random.getrandbits(31) if seed is None else check_count("seed", seed, 0)
        ids = _answer_ids(request_id, n)
        for each in ids:
            if request_id is not None and each in self.requests:
                raise ValueError(
                    f"request {each!r}: expected an id that no live request has, got one "
                    f"of {list(self.requests)}"
                )
        number = next(self._numbers)
        while request_id is None:
            ids = _answer_ids(number, n)
            if self.requests.keys().isdisjoint(ids):
                break
            number = next(self._numbers)
        made: list[Request] = []
        for i, each in enumerate(ids):
            request = Request(
                *(each, list(token_ids), len(token_ids), max_new_tokens, temperature),
                *(top_k, top_p, seed + i, stop_ids),
                number=number if i == 0 else next(self._numbers),
                num_answers=n,
                parent=made[0] if made and self.cache.can_fork else None,
            )
            made.append(request)
        self._is_settled = False
        self.requests.update(zip(ids, made))  # in one line: all of them or none
        self.waiting += [request for request in made if request.parent is None]
        self._is_settled = True
        return made if n > 1 else made[0]

    def cancel(self, request_id: Hashable):
        """The request ends now, with what it has. Raises ValueError unless it is live."""
        self._settle()
        if request_id not in self.requests:
            raise ValueError(
                f"request {request_id!r}: expected one of {list(self.requests)}, got one "
                f"that was never added, or has ended"
            )
        self._is_settled = False
        self.requests[request_id].finish_reason = "cancelled"
        self._settle()  # its blocks, its place, and whoever waited for it

    def step(self) -> Step:
        """Compute and draw what `schedule` says. Does nothing where no request is live.

        An error of the model, or an interrupt, loses no request and none of its tokens:
        who has begun, or was sent back, stays so, and what was computed may be computed
        again. Then the next step goes on.
        """
        self._settle()
        times = [time.perf_counter()]
        self._is_settled = False
        preempted = self._make_room()
        counts = self._schedule_and_begin()
        times.append(time.perf_counter())
        asking, logits = self._forward(counts) if counts else ([], None)
        times.append(time.perf_counter())
        drawn = self._draw(asking, logits) if asking else []
        times.append(time.perf_counter())
        finished = {}
        for request, token_id in drawn:
            request.parent = None
            if isinstance(token_id, str):  # an error, of this request alone
                request.finish_reason = token_id
            else:
                request.token_ids.append(token_id)
                request.finish_reason = finish_reason(
                    request.new_ids, request.max_new_tokens, request.stop_ids
                )
            if request.finish_reason:
                finished[request.request_id] = request.finish_reason
                self._end(request)
        self._is_settled = True
        times.append(time.perf_counter())
        return Step(
            counts,
            {r.request_id: t for r, t in drawn if not isinstance(t, str)},
            finished,
            preempted,
            len(self.waiting),
            self.cache.num_free_blocks,
            {part: end - start for part, start, end in zip(PARTS, times, times[1:])},
        )

    def run(self) -> list[Step]:
        """Steps until no request is live."""
        steps = []
        while self.requests:
            steps.append(self.step())
        return steps

    def stream(
        self, prompt_ids: torch.Tensor | Sequence[int], max_new_tokens: int, **settings
    ) -> Iterator[int]:
        """The tokens of an answer as they come; meanwhile others' come too.

        settings: of `add`. Whoever stops asking cancels the request.
        """
        if settings.get("n", 1) != 1:
            raise ValueError(f"n: expected 1 answer in a stream, got {settings['n']!r}")
        request, num_seen = None, 0
        try:
            request = self.add(prompt_ids, max_new_tokens, **settings)
            while True:
                while num_seen < len(request.new_ids):  # more may come meanwhile
                    yield request.new_ids[num_seen]
                    num_seen += 1
                if request.finish_reason:
                    return
                self.step()
        finally:
            self._settle()  # after an interrupt it may turn out to have ended
            if request is not None and request.finish_reason is None:
                self.cancel(request.request_id)

    def check_integrity(self):
        """Raise AssertionError that names the first thing that is not as it must be."""
        self._settle()
        in_cache = {r for r in self.cache.request_ids if r is not None}
        running = [r.request_id for r in self.running]
        waiting = [r.request_id for r in self.waiting]
        forks = [i for i, r in self.requests.items() if r.parent is not None]
        everyone = running + waiting + forks
        assert set(running) == in_cache and len(running) == len(in_cache), (
            f"running: expected {in_cache}, those in the cache, got {running}"
        )
        assert len(everyone) == len(set(everyone)) == len(self.requests), (
            f"expected each of {list(self.requests)} once, got {everyone}"
        )
        for r in self.requests.values():
            assert r.finish_reason is None and (
                r.parent is None or r.parent.request_id in self.requests
            ), f"request {r.request_id!r}: expected a live one and its parent, got {r}"
        numbers = [r.number for r in (*self.running, *self.waiting)]
        assert numbers == sorted(numbers), f"expected in order of arrival, got {numbers}"
        assert in_cache or self.cache.num_free_blocks == self.cache.num_blocks, (
            f"expected all {self.cache.num_blocks} blocks free, got "
            f"{self.cache.num_free_blocks}"
        )

    def _check_prompt(
        self, prompt_ids: torch.Tensor | Sequence[int], max_new_tokens: int
    ) -> list[int]:
        """The prompt as a list; ValueError where it could never be served."""
        check_count("max_new_tokens", max_new_tokens)
        prompt_ids = torch.as_tensor(prompt_ids).cpu()
        if prompt_ids.dim() != 1:
            raise ValueError(
                f"prompt_ids: expected int64 (T,), got {tuple(prompt_ids.shape)}"
            )
        generate.check_generation(self.model, prompt_ids, max_new_tokens)
        # The last token of an answer never enters the cache.
        num_tokens = len(prompt_ids) + max_new_tokens - 1
        if num_tokens > self.cache.capacity:
            raise ValueError(
                f"expected at most {self.cache.capacity} tokens, as many as the cache "
                f"has room for, got {len(prompt_ids)} in the prompt + {max_new_tokens} "
                f"new, less the last"
            )
        return prompt_ids.tolist()

    def _check_stop_ids(self, stop_ids: Iterable[int]) -> frozenset[int]:
        """As a set; ValueError unless these are tokens."""
        is_tensor, V = isinstance(stop_ids, torch.Tensor), self.model.config.vocab_size
        ids = stop_ids.tolist() if is_tensor else stop_ids
        ids = list(ids) if isinstance(ids, Iterable) else None
        if ids is None or not all(isinstance(i, Integral) and 0 <= i < V for i in ids):
            raise ValueError(
                f"stop_ids: expected some token ids, in [0, {V}), got {stop_ids!r}"
            )
        return frozenset(map(int, ids))

    def _rows(self) -> list[tuple[Hashable, int]]:
        """Of each row of the cache: its request's id, or None, and its tokens there."""
        return list(zip(self.cache.request_ids, self.cache.seq_lens.tolist()))

    def _make_room(self) -> list[Hashable]:
        """Send requests back until all that decode can; their ids."""
        if self.cache.num_free_blocks >= len(self.running):
            return []  # a token takes one block at most
        cached, preempted = dict(self._rows()), []
        decodes = {
            r.request_id: 1
            for r in self.running
            if len(r.token_ids) - cached[r.request_id] == 1
        }
        decodes = dict(itertools.islice(decodes.items(), self.token_budget))
        while self.cache.blocks_needed(decodes) > self.cache.num_free_blocks:
            request = preempt(self.running, self.waiting, self.cache)
            decodes.pop(request.request_id, None)
            preempted.append(request.request_id)
        return preempted

    def _schedule_and_begin(self) -> dict[Hashable, int]:
        """New tokens of each request that takes part in this step."""
        cache, cached = self.cache, dict(self._rows())
        running = [
            Load(
                len(r.token_ids), cached[r.request_id], cache.num_blocks_of(r.request_id)
            )
            for r in self.running
        ]
        waiting = (Load(len(r.token_ids), *cache.find(r.token_ids)) for r in self.waiting)
        counts = schedule(
            running,
            waiting,
            cache.num_free_blocks,
            self.token_budget,
            cache.block_size,
            self.watermark_blocks,
        )
        for _ in counts[len(running) :]:
            request = self.waiting.popleft()
            cache.begin(request.request_id, request.token_ids)
            self.running.append(request)
        by_id = {r.request_id: count for r, count in zip(self.running, counts)}
        return {request_id: count for request_id, count in by_id.items() if count}

    def _forward(self, counts: dict[Hashable, int]) -> tuple[list[Request], torch.Tensor]:
        """Compute these tokens. Gives the requests that know what comes next, and the
        logits of it, (R, V)."""
        new_ids, query_lens, asking, last = [], [], [], []
        for request_id, num_cached in self._rows():
            count = counts.get(request_id, 0)
            query_lens.append(count)
            if count == 0:
                continue
            request, end = self.requests[request_id], num_cached + count
            new_ids += request.token_ids[num_cached:end]
            if end == len(request.token_ids):
                asking.append(request)
                last.append(len(new_ids) - 1)

        cache, device = self.cache, self.cache.device
        token_ids = torch.tensor(new_ids, device=device)  # (N,)
        query_lens = torch.tensor(query_lens, device=device)  # (B,)
        seq_lens = cache.seq_lens + query_lens  # (B,)
        positions = kv_cache.new_positions(seq_lens, query_lens)  # (N,)
        with cache.extend(query_lens) as attend, torch.inference_mode():
            x = self.model.embed(token_ids)  # (N, C)
            for block in self.model.blocks:
                x = block(x, positions, attend)
            logits = self.model.unembed(x[last])  # (R, V): the others are not asked
        return asking, logits

    def _draw(
        self, asking: list[Request], logits: torch.Tensor
    ) -> list[tuple[Request, int | str]]:
        """The next token of each, logits (R, V); in its place what is wrong with them.

        Whoever shares a prompt with one of these is there from now on, and draws too.
        """
        are_numbers = logits.amax(dim=-1).isfinite().tolist()
        greedy_ids = logits.argmax(dim=-1).tolist()
        drawn: list[tuple[Request, int | str]] = []
        for row, first in enumerate(asking):
            for request in (first, *self._fork(first)):
                if not are_numbers[row]:
                    largest = logits[row].amax().item()
                    token_id = f"error: expected numbers for logits, got {largest}"
                elif request.temperature == 0:
                    token_id = greedy_ids[row]
                else:
                    token_id = _sample(request, logits[row])
                drawn.append((request, token_id))
        return drawn

    def _fork(self, request: Request) -> list[Request]:
        """The requests that have waited for this one to compute their prompt."""
        if request.num_answers == 1 or request.new_ids or not self.cache.can_fork:
            return []
        forks = [r for r in self.requests.values() if r.parent is request]
        place = self.running.index(request)
        for fork in forks:
            self.cache.fork(request.request_id, fork.request_id, fork.token_ids)
        self.running[place + 1 : place + 1] = forks
        return forks

    def _end(self, request: Request):
        """It is over: its blocks go back."""
        self.cache.free(request.request_id)
        self.running.remove(request)
        del self.requests[request.request_id]

    def _settle(self):
        """After an error or an interrupt: who is where, from what is in the cache."""
        if self._is_settled:
            return
        for request in list(self.requests.values()):
            if request.new_ids and request.finish_reason is None:
                request.finish_reason = finish_reason(
                    request.new_ids, request.max_new_tokens, request.stop_ids
                )
            if request.finish_reason is not None:
                del self.requests[request.request_id]
        live = sorted(self.requests.values(), key=lambda request: request.number)
        self._inherit(live)
        cached, is_lost = dict(self._rows()), False
        for request_id in cached:
            if request_id is not None and request_id not in self.requests:
                self.cache.free(request_id)
        for request in live:
            # All is computed, and what came of it is lost: it is computed again, and so
            # is what those have who came later, or they would overtake.
            num_cached = cached.get(request.request_id)
            is_lost = is_lost or num_cached == len(request.token_ids)
            if num_cached is not None and is_lost:
                self.cache.free(request.request_id)
        in_cache = set(self.cache.request_ids)
        for request in live:
            # It is there, or too late to share.
            if request.request_id in in_cache or (request.parent or request).new_ids:
                request.parent = None
        self.running = [r for r in live if r.request_id in in_cache]
        self.waiting = deque(
            r for r in live if r.request_id not in in_cache and r.parent is None
        )
        self._is_settled = True

    def _inherit(self, live: list[Request]):
        """Where a request has ended before its prompt was computed, the first of those
        who have waited for it takes over what is there, and the others wait for that."""
        orphans = [r for r in live if r.parent and r.parent.finish_reason is not None]
        heirs = {r.parent: r for r in reversed(orphans)}
        for request in reversed(orphans):  # an heir after the others
            parent, heir = request.parent, heirs[request.parent]
            if request is not heir:
                request.parent = heir
                continue
            in_cache = self.cache.request_ids
            if parent.request_id in in_cache and heir.request_id not in in_cache:
                self.cache.fork(parent.request_id, heir.request_id, heir.token_ids)
            heir.parent = None


def _answer_ids(request_id: Hashable, n: int) -> list[Hashable]:
    """One id for each of n answers to a prompt."""
    return [request_id] if n == 1 else [(request_id, i) for i in range(n)]


def generator_at(
    seed: int, num_tokens: int, device: torch.device | str
) -> torch.Generator:
    """What the token behind so many others of a text is drawn with: it depends on the
    seed and the place alone."""
    generator = torch.Generator(device)
    generator.manual_seed((seed * 1_000_003 + num_tokens) % 2**63)
    return generator


def _sample(request: Request, logits: torch.Tensor) -> int:
    """Its next token: from equal logits the same, whoever else is there and however often
    it is drawn."""
    generator = generator_at(request.seed, len(request.token_ids), logits.device)
    probs = sampling.next_token_probs(
        logits, request.temperature, request.top_k, request.top_p
    )
    return int(sampling.sample(probs, generator))
