"""Chapter 4: many requests, one pool of memory, and how much of it holds tokens.

No model runs here. Requests wait in a queue, begin in that order as soon as the manager
has room, grow by one token a step, and end. What differs is the manager: `Reserving`
takes all that a request may need at once and in one piece, as chapter 3's cache does;
`Paging` takes a block at a time, through lib/block_manager.py. This replays figure 2 of
the PagedAttention paper (https://arxiv.org/abs/2309.06180).
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lib.block_manager import BlockManager, OutOfBlocksError

MAX_LEN = 1024  # tokens of a prompt, and of an answer


@dataclass(frozen=True)
class Request:
    prompt_len: int
    output_len: int  # which nobody knows before it ends

    def __post_init__(self):
        if min(self.prompt_len, self.output_len) < 1:
            raise ValueError(f"expected lengths of at least 1 token, got {self}")

    @property
    def num_tokens(self) -> int:
        return self.prompt_len + self.output_len


@dataclass(frozen=True)
class Usage:
    """What a pool was used for, as shares of it: means over the steps of a simulation."""

    tokens: float  # slots that hold a token
    later: float  # held by a request that will fill them
    never: float  # held by a request that will not: internal fragmentation
    free: float  # held by nobody, yet too few, or too scattered, for the next request
    in_flight: float  # requests at one time
    finished: int  # requests
    preempted: int  # requests sent back to the queue, each time they were


def draw_requests(
    num_requests: int, mean_prompt_len: float, mean_output_len: float, seed: int = 0
) -> list[Request]:
    """Requests with log-normal lengths, σ = 1, of these means before they are cut at
    MAX_LEN tokens."""
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

    def begin(self, request_id: int, request: Request, num_tokens: int) -> bool:
        """Whether there is room for a request, which then has it."""
        size, start = self.reserve(request), 0
        pieces = sorted(self.pieces.values(), key=lambda piece: piece.start)
        for piece in [*pieces, range(self.num_slots, self.num_slots)]:
            if piece.start - start >= size:
                self.pieces[request_id] = range(start, start + size)
                return True
            start = piece.stop
        return False

    def grow(self, request_id: int) -> bool:
        """Whether there is room for one more token of a request: it has been reserved."""
        return True

    def end(self, request_id: int):
        del self.pieces[request_id]

    def num_held(self, request_id: int) -> int:
        """Slots that a request keeps from others."""
        return len(self.pieces[request_id])


class BuddyReserving(Reserving):
    """The same with pieces of 2^k slots that begin at a multiple of their size.

    The classic allocator (Knuth, The Art of Computer Programming, 2.5), and the one that
    the paper assumes for the systems it compares with (section 6.1).
    """

    def begin(self, request_id: int, request: Request, num_tokens: int) -> bool:
        size = 2 ** math.ceil(math.log2(self.reserve(request)))
        for start in range(0, self.num_slots - size + 1, size):
            piece = range(start, start + size)
            if all(
                p.stop <= start or p.start >= piece.stop for p in self.pieces.values()
            ):
                self.pieces[request_id] = piece
                return True
        return False


class Paging:
    """The same in blocks."""

    def __init__(self, num_slots: int, block_size: int):
        self.manager = BlockManager(num_slots // block_size, block_size)
        self.num_slots = self.manager.num_blocks * block_size

    def begin(self, request_id: int, request: Request, num_tokens: int) -> bool:
        try:
            self.manager.allocate(request_id, num_tokens)
        except OutOfBlocksError:
            return False
        return True

    def grow(self, request_id: int) -> bool:
        try:
            self.manager.append(request_id)
        except OutOfBlocksError:
            return False
        return True

    def end(self, request_id: int):
        self.manager.free(request_id)

    def num_held(self, request_id: int) -> int:
        return len(self.manager.block_tables[request_id]) * self.manager.block_size


def simulate(
    manager: Reserving | Paging, requests: list[Request], num_steps: int, warm_up: int
) -> Usage:
    """Run requests through a new manager's pool for num_steps steps after warm_up others.

    A prompt enters in one step. A request that cannot grow sends away the one that began
    last, which goes back to the head of the queue and later begins again with all its
    tokens (preemption by recomputing, section 4.5 of the paper). Raises ValueError when
    the queue runs empty, for then the pool would not be full, or when a request is too
    large for the pool, or finds no room in it.
    """
    if num_steps < 1 or warm_up < 0:
        raise ValueError(
            f"expected at least 1 step after at least 0, got {num_steps} after {warm_up}"
        )
    longest = max(request.num_tokens for request in requests)
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
    totals = {"tokens": 0, "later": 0, "never": 0, "in_flight": 0}
    num_finished = num_preempted = 0
    for step in range(warm_up + num_steps):
        while waiting and manager.begin(*waiting[0]):
            request_id, request, num_tokens = waiting.popleft()
            running[request_id] = request, num_tokens
        if not waiting or not running:
            why = "every request began" if running else "a request finds no room"
            raise ValueError(f"expected a full pool at each step, got {why} at {step}")

        if step >= warm_up:
            for request_id, (request, num_tokens) in running.items():
                held = manager.num_held(request_id)
                totals["tokens"] += num_tokens
                totals["later"] += min(held, request.num_tokens) - num_tokens
                totals["never"] += max(held - request.num_tokens, 0)
            totals["in_flight"] += len(running)

        for request_id in list(running):
            while request_id in running and not manager.grow(request_id):
                last_id, (last, num_tokens) = running.popitem()
                manager.end(last_id)
                waiting.appendleft((last_id, last, num_tokens))
                num_preempted += step >= warm_up
            if request_id not in running:
                continue
            request, num_tokens = running[request_id]
            running[request_id] = request, num_tokens + 1
            if num_tokens + 1 == request.num_tokens:
                manager.end(request_id)
                del running[request_id]
                num_finished += step >= warm_up
    in_flight = totals.pop("in_flight") / num_steps
    shares = {kind: n / num_steps / manager.num_slots for kind, n in totals.items()}
    return Usage(
        **shares,
        free=1 - sum(shares.values()),
        in_flight=in_flight,
        finished=num_finished,
        preempted=num_preempted,
    )
