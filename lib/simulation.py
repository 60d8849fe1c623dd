"""Chapter 4: many requests, one pool of memory, and how much of it holds tokens.

No model runs here. Requests wait in a queue, begin in that order as soon as the manager
has room, grow by one token per step, and end. What differs is the manager: `Reserving`
takes all that a request may need at once and in one piece, as chapter 3's cache does;
`Paging` takes a block at a time, through lib/block_manager.py. This replays figure 2 of
the PagedAttention paper (https://arxiv.org/abs/2309.06180), and divides the pool into the
same four parts.

Chapter 6 asks what the engine will do. `predict_steps` says it step by step, without a
model; `serve` lets requests come at any time, gives each step its seconds, and replays
figure 12.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lib import engine
from lib.block_manager import BlockManager, OutOfBlocksError
from lib.config import check_count

MAX_LEN = 1024  # tokens of a prompt, and of an answer


@dataclass(frozen=True)
class Request:
    prompt_len: int
    output_len: int  # which nobody knows before it ends

    def __post_init__(self):
        check_count("prompt_len", self.prompt_len)
        check_count("output_len", self.output_len)

    @property
    def num_tokens(self) -> int:
        return self.prompt_len + self.output_len


@dataclass(frozen=True)
class Usage:
    """What a pool was used for: four shares of it, means over the steps of a simulation,
    and what happened in these steps."""

    tokens: float  # slots that hold a token
    reservation: float  # set aside for a request, which will fill them
    internal: float  # set aside for a request, which will not: internal fragmentation
    external: float  # the rest, set aside for nobody: external fragmentation and others
    in_flight: float  # requests at one time
    finished: int  # requests
    preempted: int  # requests sent back to the queue, each time they were
    written: int  # tokens computed for the first time
    recomputed: int  # tokens computed again, of requests that had been sent back


def draw_requests(
    num_requests: int, mean_prompt_len: float, mean_output_len: float, seed: int = 0
) -> list[Request]:
    """Requests with log-normal lengths, σ = 1, of these means before they are cut at
    MAX_LEN tokens."""
    if min(mean_prompt_len, mean_output_len) <= 0:
        raise ValueError(
            f"expected means above 0, got {mean_prompt_len} and {mean_output_len}"
        )
    generator = torch.Generator().manual_seed(seed)
    lens = []
    for mean in (mean_prompt_len, mean_output_len):
        # The mean of a log-normal is exp(μ + σ²/2).
        normal = torch.randn(num_requests, generator=generator) + math.log(mean) - 0.5
        lens.append(normal.exp().round().clamp(1, MAX_LEN).int().tolist())
    return [Request(*pair) for pair in zip(*lens)]


def reserve_maximum(request: Request) -> int:
    """Slots for the longest request there may be."""
    return 2 * MAX_LEN


def reserve_power_of_two(request: Request) -> int:
    """Slots for the prompt, and for the answer rounded up to a power of two."""
    return request.prompt_len + 2 ** math.ceil(math.log2(request.output_len))


def reserve_oracle(request: Request) -> int:
    """Slots for exactly what will come, as if that were known."""
    return request.num_tokens


class Reserving:
    """A request gets its slots in one piece: the first gap that is wide enough."""

    def __init__(self, num_slots: int, reserve: Callable[[Request], int]):
        self.num_slots, self.reserve = num_slots, reserve
        self.pieces: dict[int, range] = {}  # by request id
        self.reserved: dict[int, int] = {}  # slots of its piece that were asked for

    def begin(self, request_id: int, request: Request, num_tokens: int) -> bool:
        """Whether there is room for a request, which then has it."""
        if request_id in self.pieces:
            raise ValueError(
                f"request {request_id!r}: expected a new one, got one that has a piece: "
                f"each simulation needs a manager of its own"
            )
        size = self.reserve(request)
        if size < request.num_tokens:
            raise ValueError(f"reserve: expected room for {request}, got {size} slots")
        piece = self.find_piece(size)
        if piece is None:
            return False
        self.pieces[request_id], self.reserved[request_id] = piece, size
        return True

    def find_piece(self, size: int) -> range | None:
        """The slots that a request for `size` of them would get."""
        start = 0
        pieces = sorted(self.pieces.values(), key=lambda piece: piece.start)
        for piece in [*pieces, range(self.num_slots, self.num_slots)]:
            if piece.start - start >= size:
                return range(start, start + size)
            start = piece.stop
        return None

    def grow(self, request_id: int) -> bool:
        """Whether there is room for one more token of a request: it has been reserved."""
        return True

    def end(self, request_id: int):
        del self.pieces[request_id], self.reserved[request_id]

    def num_reserved(self, request_id: int) -> int:
        """Slots that were set aside for a request."""
        return self.reserved[request_id]


class BuddyReserving(Reserving):
    """The same with pieces of 2^k slots that begin at a multiple of their size.

    The classic allocator (Knuth, The Art of Computer Programming, 2.5), and the one that
    the paper assumes for the systems it compares with (section 6.1). What rounding up to
    2^k adds to a piece was not asked for: it counts as external fragmentation and others,
    as it must in the paper, whose oracle has no internal fragmentation.
    """

    def find_piece(self, size: int) -> range | None:
        size = 2 ** math.ceil(math.log2(size))
        for start in range(0, self.num_slots - size + 1, size):
            piece = range(start, start + size)
            if all(
                p.stop <= start or p.start >= piece.stop for p in self.pieces.values()
            ):
                return piece
        return None


class Paging:
    """The same in blocks.

    watermark: the share of all blocks, rounded down to whole ones, that must stay free
    when a request begins, so that those in flight can grow. (vLLM's option of that name:
    0.01 in its first block manager, 0 today.) Whoever could not begin in an empty pool
    either raises ValueError.
    """

    def __init__(self, num_slots: int, block_size: int, watermark: float = 0.0):
        if not 0 <= watermark < 1:
            raise ValueError(
                f"watermark: expected a share of the blocks, at least 0 and below 1, got "
                f"{watermark}"
            )
        if check_count("num_slots", num_slots) < check_count("block_size", block_size):
            raise ValueError(
                f"num_slots: expected room for a block of {block_size}, got {num_slots}"
            )
        self.manager = BlockManager(num_slots // block_size, block_size)
        self.num_slots = self.manager.num_blocks * block_size
        self.watermark_blocks = int(watermark * self.manager.num_blocks)

    def begin(self, request_id: int, request: Request, num_tokens: int) -> bool:
        needed = math.ceil(num_tokens / self.manager.block_size) + self.watermark_blocks
        if needed > self.manager.num_blocks:
            raise ValueError(
                f"expected a pool of at least {needed} blocks, of which "
                f"{self.watermark_blocks} stay free when {num_tokens} tokens begin, got "
                f"{self.manager.num_blocks}"
            )
        if needed > len(self.manager.free_block_ids):
            return False
        self.manager.allocate(request_id, num_tokens)
        return True

    def grow(self, request_id: int) -> bool:
        try:
            self.manager.append(request_id)
        except OutOfBlocksError:
            return False
        return True

    def end(self, request_id: int):
        self.manager.free(request_id)

    def num_reserved(self, request_id: int) -> int:
        return len(self.manager.block_tables[request_id]) * self.manager.block_size


def simulate(
    manager: Reserving | Paging, requests: list[Request], num_steps: int, warm_up: int
) -> Usage:
    """Run requests through a new manager's pool for num_steps steps after warm_up others.

    A prompt enters in one step. A request that cannot grow sends away the one that began
    last, which goes back to the head of the queue and later begins again: all tokens that
    it had are computed once more (preemption by recomputing, section 4.5 of the paper).
    Raises ValueError when the queue runs empty, for then the pool would not be full, or
    when a request is too large for the pool, or finds no room in it.
    """
    if num_steps < 1 or warm_up < 0:
        raise ValueError(
            f"expected at least 1 step after at least 0, got {num_steps} after {warm_up}"
        )
    longest = max((request.num_tokens for request in requests), default=0)
    if longest > manager.num_slots:
        raise ValueError(
            f"expected requests of at most {manager.num_slots} tokens, as the pool has "
            f"slots, got one of {longest}"
        )
    waiting = deque(
        (i, request, request.prompt_len) for i, request in enumerate(requests)
    )
    # Request and tokens so far, by id; who began last stands last.
    running: dict[int, tuple[Request, int]] = {}
    sent_back: set[int] = set()  # ids: when these begin, they begin again
    slots, events, in_flight = Counter(), Counter(), 0
    for step in range(warm_up + num_steps):
        if step == warm_up:
            events.clear()
        while waiting and manager.begin(*waiting[0]):
            request_id, request, num_tokens = waiting.popleft()
            running[request_id] = request, num_tokens
            is_new = request_id not in sent_back
            events["written" if is_new else "recomputed"] += num_tokens
        if not waiting or not running:
            why = "a request finds no room" if waiting else "every request began"
            raise ValueError(f"expected a full pool at each step, got {why} at {step}")

        if step >= warm_up:
            slots.update(count_slots(manager, running))
            in_flight += len(running)

        for request_id in list(running):
            while request_id in running and not manager.grow(request_id):
                last_id, (last, num_tokens) = running.popitem()
                manager.end(last_id)
                waiting.appendleft((last_id, last, num_tokens))
                sent_back.add(last_id)
                events["preempted"] += 1
            if request_id not in running:
                continue
            request, num_tokens = running[request_id]
            running[request_id] = request, num_tokens + 1
            events["written"] += 1
            if num_tokens + 1 == request.num_tokens:
                manager.end(request_id)
                del running[request_id]
                events["finished"] += 1
    shares = {part: n / num_steps / manager.num_slots for part, n in slots.items()}
    return Usage(
        **shares,
        external=1 - sum(shares.values()),
        in_flight=in_flight / num_steps,
        finished=events["finished"],
        preempted=events["preempted"],
        written=events["written"],
        recomputed=events["recomputed"],
    )


def count_slots(
    manager: Reserving | Paging, running: dict[int, tuple[Request, int]]
) -> dict[str, int]:
    """How many slots hold a token, or are set aside, now; by the names of `Usage`."""
    counts = {"tokens": 0, "reservation": 0, "internal": 0}
    for request_id, (request, num_tokens) in running.items():
        reserved = manager.num_reserved(request_id)
        counts["tokens"] += num_tokens
        counts["reservation"] += min(reserved, request.num_tokens) - num_tokens
        counts["internal"] += max(reserved - request.num_tokens, 0)
    return counts


def static_steps(output_lens: Sequence[int], batch_size: int) -> int:
    """Steps that batches of so many answers take, one batch after the other: each lasts
    as long as its longest answer, the first token of which comes with the prompts.

    >>> static_steps([5, 1, 2, 2], batch_size=2)
    7
    """
    check_count("batch_size", batch_size)
    starts = range(0, len(output_lens), batch_size)
    return sum(max(output_lens[start : start + batch_size]) for start in starts)


@dataclass(eq=False)
class Progress:
    """What `predict_steps` knows of a request: no tokens, but how many."""

    request_id: int
    request: Request
    num_tokens: int  # of its prompt and its answer so far


def predict_steps(
    requests: Sequence[Request],
    num_blocks: int,
    block_size: int,
    *,
    token_budget: int = 256,
    watermark: float = 0.0,
    arrivals: Sequence[int] | None = None,
) -> list[engine.Step]:
    """The steps that `engine.Engine` takes for these requests over a paged cache.

    Only numbers are moved. A request's id is its place in `requests`. All are there at
    first, or request i is added before step arrivals[i], which never falls; a step does
    nothing while nobody is there. Each token that is drawn is a 0, and `seconds` is
    empty. Raises ValueError for a request that `Engine.add` refuses.

    >>> steps = predict_steps([Request(6, 2), Request(3, 3)], 4, 4, token_budget=8)
    >>> [step.counts for step in steps]
    [{0: 6, 1: 2}, {0: 1, 1: 1}, {1: 1}, {1: 1}]
    """
    check_count("token_budget", token_budget)
    arrivals = [0] * len(requests) if arrivals is None else list(arrivals)
    if len(arrivals) != len(requests) or arrivals != sorted(arrivals):
        raise ValueError(
            f"arrivals: expected {len(requests)} steps in order, got {arrivals}"
        )
    # The last token of an answer never enters the cache.
    longest = max((request.num_tokens - 1 for request in requests), default=0)
    if longest > num_blocks * block_size:
        raise ValueError(
            f"expected requests of at most {num_blocks * block_size} tokens, as many as "
            f"the pool has room for, got one of {longest} + the last"
        )
    manager = BlockManager(num_blocks, block_size)
    coming = deque(Progress(i, r, r.prompt_len) for i, r in enumerate(requests))
    waiting: deque[Progress] = deque()
    running: list[Progress] = []
    steps: list[engine.Step] = []
    while coming or waiting or running:
        while coming and arrivals[coming[0].request_id] <= len(steps):
            waiting.append(coming.popleft())
        step = _predict_step(
            manager, running, waiting, token_budget, int(watermark * num_blocks)
        )
        steps.append(step)
    return steps


def _predict_step(
    manager: BlockManager,
    running: list[Progress],
    waiting: deque[Progress],
    token_budget: int,
    watermark_blocks: int,
) -> engine.Step:
    """What `engine.Engine.step` does, in the same order."""
    # Send back, until all that decode can.
    cached, tables, preempted = manager.seq_lens, manager.block_tables, []
    decodes = {
        p.request_id: 1 for p in running if p.num_tokens - cached[p.request_id] == 1
    }
    while manager.blocks_needed(decodes) > len(manager.free_block_ids):
        last = engine.preempt(running, waiting, manager)
        decodes.pop(last.request_id, None)
        preempted.append(last.request_id)

    # Schedule and begin.
    loads = [(p.num_tokens, cached[p.request_id]) for p in running]
    num_blocks = [len(tables[p.request_id]) for p in running]
    counts = engine.schedule(
        [engine.Load(*load, blocks) for load, blocks in zip(loads, num_blocks)],
        (engine.Load(p.num_tokens, 0, 0) for p in waiting),
        len(manager.free_block_ids),
        token_budget,
        manager.block_size,
        watermark_blocks,
    )
    for _ in counts[len(running) :]:
        running.append(waiting.popleft())
        manager.allocate(running[-1].request_id, 0)

    # Compute.
    counts = {p.request_id: count for p, count in zip(running, counts) if count}
    for request_id, count in counts.items():
        manager.append(request_id, count)

    # Draw and end.
    drawing = [p for p in running if p.num_tokens == cached[p.request_id]]
    finished = {}
    for p in drawing:
        p.num_tokens += 1
        if p.num_tokens == p.request.num_tokens:
            finished[p.request_id] = "length"
            running.remove(p)
            manager.free(p.request_id)
    return engine.Step(
        counts,
        {p.request_id: 0 for p in drawing},
        finished,
        preempted,
        len(waiting),
        len(manager.free_block_ids),
        seconds={},
    )


class StepSeconds(NamedTuple):
    """What a step takes: so much in any case, for each token that it computes, and for
    each that the same requests have in the cache before it."""

    fixed: float
    per_new_token: float
    per_cached_token: float

    def __call__(self, num_new_tokens: int, num_cached_tokens: int) -> float:
        return (
            self.fixed
            + self.per_new_token * num_new_tokens
            + self.per_cached_token * num_cached_tokens
        )


def draw_arrivals(num_requests: int, requests_per_s: float, seed: int = 0) -> list[float]:
    """Seconds at which requests come, at random and independently of each other (a
    Poisson process) at this rate. With the same seed, the same pattern at each rate."""
    if not requests_per_s > 0:
        raise ValueError(f"requests_per_s: expected above 0, got {requests_per_s}")
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(num_requests, dtype=torch.float64, generator=generator)
    gaps = -torch.log1p(-uniform) / requests_per_s  # exponential
    return gaps.cumsum(0).tolist()


@dataclass(frozen=True)
class Served:
    """When a request came, had its first token, and had its last, in seconds."""

    request: Request
    arrived: float
    first: float
    last: float

    @property
    def normalized(self) -> float:
        """From its arrival to its last token, per token: as of `engine.latencies`."""
        return (self.last - self.arrived) / self.request.output_len


def serve(
    manager: Reserving | Paging,
    requests: Sequence[Request],
    arrivals: Sequence[float],
    step_seconds: Callable[[int, int], float],
) -> list[Served]:
    """Serve requests that come at these seconds, which never fall, from a new manager's
    pool: the experiment of figure 12 of the paper.

    In each step those in flight get a token each, and those begin for whom the manager
    has room, in order, with their whole prompt. It takes step_seconds(tokens that it
    computes, tokens that these requests have in the cache before it), as `StepSeconds`. A
    request that cannot grow sends away the last, as in `simulate`. Raises ValueError for
    a request that is too large for the pool.
    """
    longest = max((request.num_tokens for request in requests), default=0)
    if longest > manager.num_slots:
        raise ValueError(
            f"expected requests of at most {manager.num_slots} tokens, as the pool has "
            f"slots, got one of {longest}"
        )
    if len(arrivals) != len(requests) or list(arrivals) != sorted(arrivals):
        raise ValueError(f"arrivals: expected {len(requests)} times in order")
    coming = deque(enumerate(requests))
    waiting: deque[tuple[int, Request, int]] = deque()
    # Request and tokens so far, by id; who began last stands last.
    running: dict[int, tuple[Request, int]] = {}
    first: dict[int, float] = {}
    served: dict[int, Served] = {}
    now = 0.0
    while coming or waiting or running:
        if not waiting and not running:
            now = max(now, arrivals[coming[0][0]])
        while coming and arrivals[coming[0][0]] <= now:
            request_id, request = coming.popleft()
            waiting.append((request_id, request, request.prompt_len))

        # The newest token of each enters the cache, and gives the next one.
        num_new = num_cached = 0
        for request_id in list(running):
            while request_id in running and not manager.grow(request_id):
                last_id, (last, num_tokens) = running.popitem()
                manager.end(last_id)
                waiting.appendleft((last_id, last, num_tokens))
            if request_id in running:
                num_new += 1
                num_cached += running[request_id][1] - 1
        while waiting and manager.begin(*waiting[0]):
            request_id, request, num_tokens = waiting.popleft()
            running[request_id] = request, num_tokens
            num_new += num_tokens
        if not running:
            raise ValueError(f"expected room for {waiting[0][1]} in an empty pool")

        now += step_seconds(num_new, num_cached)
        for request_id, (request, num_tokens) in list(running.items()):
            running[request_id] = request, num_tokens + 1
            first.setdefault(request_id, now)
            if num_tokens + 1 == request.num_tokens:
                manager.end(request_id)
                del running[request_id]
                served[request_id] = Served(
                    request, arrivals[request_id], first[request_id], now
                )
    return [served[request_id] for request_id in range(len(requests))]
