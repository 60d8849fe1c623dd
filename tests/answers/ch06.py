import copy
import hashlib
import heapq
import itertools
import math
import random
import statistics
import zlib
from collections import deque
from fractions import Fraction

import numpy as np
import torch

from answers import right, wrong
from lib.engine import Load, Request

# schedule


@right("schedule")
def schedule_in_two_passes(
    running, waiting, num_free_blocks, token_budget, block_size, watermark_blocks=0
):
    counts = {}
    for decodes in (True, False):
        for i, (num_tokens, num_cached, num_blocks) in enumerate(running):
            missing = num_tokens - num_cached
            if (missing <= 1) is not decodes:
                continue
            n = 0
            while n < missing and token_budget > 0:  # token by token
                if num_cached + n >= num_blocks * block_size:
                    if num_free_blocks == 0:
                        break
                    num_free_blocks -= 1
                    num_blocks += 1
                n += 1
                token_budget -= 1
            counts[i] = n
    begun = [counts[i] for i in range(len(running))]
    for load in waiting:
        blocks = math.ceil(load.num_tokens / block_size) - load.num_blocks
        reserve = watermark_blocks if begun else 0
        if token_budget < 1 or num_free_blocks - blocks < reserve:
            return begun
        begun.append(min(token_budget, load.num_tokens - load.num_cached))
        token_budget -= begun[-1]
        num_free_blocks -= blocks
    return begun


@right("schedule")
def schedule_with_next(
    running, waiting, num_free_blocks, token_budget, block_size, watermark_blocks=0
):
    decodes = [i for i, r in enumerate(running) if r.num_tokens - r.num_cached == 1]
    prompts = [i for i, r in enumerate(running) if r.num_tokens - r.num_cached != 1]
    out, free = [None] * len(running), num_free_blocks
    for i in decodes + prompts:
        r = running[i]
        room = r.num_blocks * block_size - r.num_cached + free * block_size
        out[i] = n = max(0, min(r.num_tokens - r.num_cached, token_budget, room))
        token_budget -= n
        ends_in = (r.num_cached + n + block_size - 1) // block_size
        free -= max(0, ends_in - r.num_blocks) if n else 0
    queue = iter(waiting)
    while token_budget:
        load = next(queue, None)
        if load is None:
            break
        blocks, rest = divmod(load.num_tokens, block_size)
        blocks += (rest > 0) - load.num_blocks
        if blocks > free - (watermark_blocks if out else 0):
            break
        n = min(load.num_tokens - load.num_cached, token_budget)
        out, token_budget, free = [*out, n], token_budget - n, free - blocks
    return out


@right("schedule")
def schedule_giving_a_tuple_of_numpys_numbers(
    running, waiting, num_free_blocks, token_budget, block_size, watermark_blocks=0
):
    counts = np.zeros(len(running), dtype=np.int64)
    loads = np.array(running, dtype=np.int64).reshape(-1, 3)
    missing = loads[:, 0] - loads[:, 1]
    for i in np.argsort(missing > 1, kind="stable"):
        room = (loads[i, 2] + num_free_blocks) * block_size - loads[i, 1]
        counts[i] = np.clip(missing[i], 0, max(0, min(room, token_budget)))
        token_budget -= counts[i]
        taken = np.ceil((loads[i, 1] + counts[i]) / block_size) - loads[i, 2]
        num_free_blocks -= max(int(taken), 0) * int(counts[i] > 0)
    begun = []
    for load in waiting:
        if len(counts) + len(begun) == 0:
            available = num_free_blocks
        else:
            available = num_free_blocks - watermark_blocks
        needed = math.ceil(load[0] / block_size) - load[2]
        if token_budget <= 0 or needed > available:
            break
        begun.append(min(load[0] - load[1], token_budget))
        token_budget, num_free_blocks = token_budget - begun[-1], num_free_blocks - needed
    return (*counts, *begun)


@right("schedule")
def schedule_keeping_blocks_for_running_prompts(
    running, waiting, num_free_blocks, token_budget, block_size, watermark_blocks=0
):
    counts = [0 for _ in running]
    used = {}
    order = [
        i for i, load in enumerate(running) if load.num_tokens == load.num_cached + 1
    ]
    order += [i for i in range(len(running)) if i not in order]
    for i in order:
        load = running[i]
        available = num_free_blocks - sum(used.values())
        end = min(
            load.num_tokens,
            load.num_cached + token_budget - sum(counts),
            (load.num_blocks + available) * block_size,
        )
        end = max(end, load.num_cached)
        counts[i] = end - load.num_cached
        is_given = counts[i] > 0
        used[i] = is_given * max(math.ceil(end / block_size) - load.num_blocks, 0)
    num_free_blocks -= sum(used.values())
    promised = sum(
        math.ceil(load.num_tokens / block_size)
        - max(math.ceil((load.num_cached + n) / block_size), load.num_blocks)
        for load, n in zip(running, counts)
        if math.ceil(load.num_tokens / block_size) > load.num_blocks
    )
    for load in waiting:
        blocks = math.ceil(load.num_tokens / block_size) - load.num_blocks
        left = num_free_blocks - promised - blocks
        if left < 0 or counts and left < watermark_blocks or sum(counts) >= token_budget:
            break
        counts.append(min(load.num_tokens - load.num_cached, token_budget - sum(counts)))
        num_free_blocks -= blocks
    return counts


@right("schedule")
def schedule_with_takewhile(
    running, waiting, num_free_blocks, token_budget, block_size, watermark_blocks=0
):
    state = {"budget": token_budget, "free": num_free_blocks, "any": bool(running)}

    def up(n):
        return (n - 1) // block_size + 1

    def run(load):
        space = (load.num_blocks + state["free"]) * block_size - load.num_cached
        n = min(load.num_tokens - load.num_cached, state["budget"], space)
        if n <= 0:
            return 0
        state["budget"] -= n
        state["free"] -= max(up(load.num_cached + n) - load.num_blocks, 0)
        return n

    def begin(load):
        needed = up(load.num_tokens) - load.num_blocks
        kept = state["any"] * watermark_blocks
        if state["budget"] == 0 or state["free"] < needed + kept:
            return 0
        n = min(load.num_tokens - load.num_cached, state["budget"])
        state.update(budget=state["budget"] - n, free=state["free"] - needed, any=True)
        return n

    numbered = list(enumerate(running))
    first = {i: run(r) for i, r in numbered if r.num_tokens - r.num_cached == 1}
    then = {i: run(r) for i, r in numbered if i not in first}
    counts = {**first, **then}
    return [counts[i] for i, _ in numbered] + list(
        itertools.takewhile(bool, map(begin, waiting))
    )


def plan(
    running,
    waiting,
    free,
    budget,
    size,
    watermark=0,
    *,
    order=lambda running: sorted(
        range(len(running)), key=lambda i: running[i][0] - running[i][1] != 1
    ),
    count=lambda missing, budget, room: min(missing, budget, room),
    least=0,
    left=lambda load: load.num_tokens - load.num_cached,
    own=lambda load: load.num_blocks,
    ceil=lambda n, size: -(-n // size),
    taken=lambda load, n, size, ceil: ceil(load.num_cached + n, size) - load.num_blocks,
    spend=lambda budget, n, load: budget - n,
    needs=lambda load, size, budget, ceil: ceil(load.num_tokens, size) - load.num_blocks,
    keeps=lambda watermark, running, begun: watermark if running or begun else 0,
    can=lambda needed, keeps, free: needed + keeps <= free,
    first=lambda load, budget: min(load.num_tokens - load.num_cached, budget),
    after=None,
):
    """schedule, with one thing to go wrong."""
    counts = [0] * len(running)
    for i in order(running):
        load = running[i]
        room = (own(load) + free) * size - load.num_cached
        counts[i] = max(count(left(load), budget, room), least)
        budget = spend(budget, counts[i], load)
        free -= max(taken(load, counts[i], size, ceil), 0) if counts[i] else 0
    begun = []
    for load in waiting:
        needed = needs(load, size, budget, ceil)
        if budget <= 0 or not can(needed, keeps(watermark, running, begun), free):
            break
        begun.append(first(load, budget))
        budget, free = budget - begun[-1], free - needed
    return after(counts, begun, running) if after else counts + begun


@wrong("schedule", says="Decodes first")
def schedule_in_order_of_arrival(*args):
    return plan(*args, order=lambda running: range(len(running)))


@wrong("schedule", says="Decodes first")
def schedule_prompts_before_decodes(*args):
    def order(running):
        missing = [load.num_tokens - load.num_cached for load in running]
        return sorted(range(len(running)), key=lambda i: missing[i] == 1)

    return plan(*args, order=order)


@wrong("schedule")
def schedule_longest_first(*args):
    def order(running):
        missing = [load.num_tokens - load.num_cached for load in running]
        return sorted(range(len(running)), key=lambda i: missing[i], reverse=True)

    return plan(*args, order=order)


@wrong("schedule")
def schedule_shortest_first(*args):
    def order(running):
        missing = [load.num_tokens - load.num_cached for load in running]
        return sorted(range(len(running)), key=lambda i: missing[i])

    return plan(*args, order=order)


@wrong("schedule")
def schedule_the_last_decodes_first(*args):
    def order(running):
        missing = [load.num_tokens - load.num_cached for load in running]
        return sorted(range(len(running)), key=lambda i: (missing[i] > 1, -i))

    return plan(*args, order=order)


@wrong("schedule", says="token_budget new tokens at most")
def schedule_without_a_budget(*args):
    return plan(*args, count=lambda missing, budget, room: min(missing, room))


@wrong("schedule", says="token_budget new tokens at most")
def schedule_decodes_outside_of_the_budget(*args):
    def spend(budget, n, load):
        return budget - n if load.num_tokens - load.num_cached > 1 else budget

    def count(missing, budget, room):
        return min(missing, room) if missing == 1 else min(missing, budget, room)

    return plan(*args, spend=spend, count=count)


@wrong("schedule", says="token_budget new tokens at most")
def schedule_a_budget_for_each(*args):
    return plan(*args, spend=lambda budget, n, load: budget)


@wrong("schedule", says="have room for")
def schedule_without_looking_at_blocks(*args):
    return plan(*args, count=lambda missing, budget, room: min(missing, budget))


@wrong("schedule", says="free for nobody else")
def schedule_without_taking_blocks(*args):
    return plan(*args, taken=lambda *_: 0)


@wrong("schedule", says="free for nobody else")
def schedule_counting_blocks_of_decodes_alone(*args):
    def taken(load, n, size, ceil):
        is_decode = load.num_tokens - load.num_cached == 1
        return is_decode * (ceil(load.num_cached + n, size) - load.num_blocks)

    return plan(*args, taken=taken)


@wrong("schedule", says="Its last block may have room")
def schedule_new_blocks_for_each_piece(*args):
    return plan(*args, taken=lambda load, n, size, ceil: ceil(n, size))


@wrong("schedule", says="they are not taken from the free ones")
def schedule_into_free_blocks_alone(*args):
    return plan(*args, own=lambda load: load.num_cached / args[4])


@wrong("schedule", says="they are not taken from the free ones")
def schedule_with_blocks_of_what_is_cached(*args):
    return plan(
        *args,
        own=lambda load: -(-load.num_cached // args[4]),
        taken=lambda load, n, size, ceil: (
            ceil(load.num_cached + n, size) - ceil(load.num_cached, size)
        ),
    )


@wrong("schedule", says="may enter in pieces")
def schedule_whole_prompts(*args):
    return plan(
        *args,
        count=lambda missing, budget, room: missing * (missing <= min(budget, room)),
    )


@wrong("schedule", says="may enter in pieces")
def schedule_whole_prompts_of_those_that_wait(
    running, waiting, free, budget, size, watermark=0
):
    counts = plan(running, [], free, budget, size)
    for load, count in zip(running, counts):
        free -= max(-(-(load.num_cached + count) // size) - load.num_blocks, 0)
    budget -= sum(counts)
    for load in waiting:
        missing = load.num_tokens - load.num_cached
        needed = -(-load.num_tokens // size) - load.num_blocks
        if missing > budget or needed + bool(counts) * watermark > free:
            break
        counts.append(missing)
        budget, free = budget - missing, free - needed
    return counts


@wrong("schedule", says="token_budget new tokens at most")
def schedule_who_waits_with_a_whole_prompt(*args):
    return plan(*args, first=lambda load, budget: load.num_tokens - load.num_cached)


@wrong("schedule", says="is not computed again")
def schedule_all_tokens_of_running_prompts(*args):
    def left(load):
        missing = load.num_tokens - load.num_cached
        return load.num_tokens if missing > 1 else missing

    return plan(*args, left=left)


@wrong("schedule", says="Without room a request gets 0")
def schedule_fewer_than_no_tokens(*args):
    return plan(*args, least=-math.inf)


@wrong("schedule", says="is not computed again")
def schedule_found_tokens_again(*args):
    return plan(*args, first=lambda load, budget: min(load.num_tokens, budget))


@wrong("schedule", says="not in that of the work")
def schedule_in_the_order_of_the_work(*args):
    def after(counts, begun, running):
        missing = [load.num_tokens - load.num_cached for load in running]
        order = sorted(range(len(running)), key=lambda i: missing[i] > 1)
        return [counts[i] for i in order] + begun

    return plan(*args, after=after)


@wrong("schedule", says="those behind it go on")
def schedule_until_one_has_no_room(running, waiting, free, budget, size, watermark=0):
    counts = plan(running, waiting, free, budget, size, watermark)
    decodes = [i for i, r in enumerate(running) if r.num_tokens - r.num_cached == 1]
    is_over = False
    for i in decodes:
        is_over = is_over or counts[i] == 0
        if is_over:
            counts[i] = 0
    return counts


@wrong("schedule", says="0 where it gets none")
def schedule_without_zeros(*args):
    return [count for count in plan(*args) if count]


@wrong("schedule", says="only if blocks for all that it knows are free")
def schedule_blocks_of_the_first_piece(*args):
    def needs(load, size, budget, ceil):
        missing = min(load.num_tokens - load.num_cached, budget)
        return ceil(load.num_cached + missing, size) - load.num_blocks

    return plan(*args, needs=needs)


@wrong("schedule", says="only if blocks for all that it knows are free")
def schedule_who_waits_without_blocks(*args):
    return plan(*args, can=lambda needed, keeps, free: True)


@wrong("schedule", says="round up")
def schedule_full_blocks(*args):
    return plan(*args, ceil=lambda n, size: n // size)


@wrong("schedule", says="not before")
def schedule_one_block_more(*args):
    return plan(*args, ceil=lambda n, size: n // size + 1)


@wrong("schedule", says="Exactly enough")
def schedule_with_a_block_to_spare(*args):
    return plan(*args, can=lambda needed, keeps, free: needed + keeps < free)


@wrong("schedule", says="may lie in free blocks")
def schedule_who_waits_as_if_nothing_were_found(*args):
    return plan(*args, needs=lambda load, size, budget, ceil: ceil(load.num_tokens, size))


@wrong("schedule", says="may lie in free blocks")
def schedule_blocks_of_what_is_missing(*args):
    return plan(
        *args,
        needs=lambda load, size, budget, ceil: ceil(
            load.num_tokens - load.num_cached, size
        ),
    )


@wrong("schedule", says="no count, not even 0")
def schedule_who_waits_with_no_tokens(running, waiting, free, budget, size, watermark=0):
    counts = plan(running, [], free, budget, size)
    for load, count in zip(running, counts):
        free -= max(-(-(load.num_cached + count) // size) - load.num_blocks, 0)
    budget -= sum(counts)
    for load in waiting:
        needed = -(-load.num_tokens // size) - load.num_blocks
        if needed + bool(counts) * watermark > free:
            break
        counts.append(min(load.num_tokens - load.num_cached, budget))
        budget, free = budget - counts[-1], free - needed
    return counts


@wrong("schedule", says="no count, not even 0")
def schedule_a_count_for_all_who_wait(running, waiting, free, budget, size, watermark=0):
    waiting = list(waiting)
    counts = plan(running, waiting, free, budget, size, watermark)
    return counts + [0] * (len(running) + len(waiting) - len(counts))


@wrong("schedule", says="then the second, and so on")
def schedule_one_who_waits(*args):
    return plan(*args, after=lambda counts, begun, running: counts + begun[:1])


@wrong("schedule", says="beside those that run")
def schedule_who_waits_when_all_others_are_done(*args):
    return plan(*args, after=lambda counts, begun, running: counts or begun)


@wrong("schedule", says="Nobody overtakes")
def schedule_whoever_fits(running, waiting, free, budget, size, watermark=0):
    counts = plan(running, [], free, budget, size)
    for load, count in zip(running, counts):
        free -= max(-(-(load.num_cached + count) // size) - load.num_blocks, 0)
    budget -= sum(counts)
    for load in waiting:
        needed = -(-load.num_tokens // size) - load.num_blocks
        if budget and needed + bool(counts) * watermark <= free:
            counts.append(min(load.num_tokens - load.num_cached, budget))
            budget, free = budget - counts[-1], free - needed
    return counts


@wrong("schedule", says="watermark_blocks stay free")
def schedule_without_a_watermark(*args):
    return plan(*args, keeps=lambda *_: 0)


@wrong("schedule", says="While nothing runs")
def schedule_with_a_watermark_at_all_times(*args):
    return plan(*args, keeps=lambda watermark, running, begun: watermark)


@wrong("schedule", says="or has begun in this step")
def schedule_with_a_watermark_for_those_that_ran(*args):
    return plan(
        *args, keeps=lambda watermark, running, begun: watermark if running else 0
    )


@wrong("schedule", says="watermark_blocks stay free")
def schedule_with_a_watermark_for_decodes(*args):
    def keeps(watermark, running, begun):
        return watermark * any(load.num_tokens - load.num_cached == 1 for load in running)

    return plan(*args, keeps=keeps)


@wrong("schedule", says="they may use it")
def schedule_with_a_watermark_for_all(running, waiting, free, budget, size, watermark=0):
    return plan(running, waiting, max(free - watermark, 0), budget, size)


@wrong("schedule", says="beside the watermark, are enough")
def schedule_with_more_than_the_watermark(*args):
    def can(needed, keeps, free):
        return needed + keeps < free if keeps else needed <= free

    return plan(*args, can=can)


@wrong("schedule", says="taken from waiting: expected at most 4, got 304")
def schedule_with_a_list_of_all_who_wait(running, waiting, *others):
    return plan(running, list(waiting), *others)


@wrong("schedule", says="taken from waiting")
def schedule_looking_at_all_who_wait(running, waiting, free, budget, size, watermark=0):
    looked_at = list(waiting)
    return plan(running, [*looked_at], free, budget, size, watermark)


@wrong("schedule", says="has no length and no places")
def schedule_by_index(running, waiting, *others):
    return plan(running, [waiting[i] for i in range(len(waiting))], *others)


@wrong("schedule", says="copy it to change it")
def schedule_sorting_in_place(running, waiting, *others):
    counts = plan(list(running), waiting, *others)
    running.sort(key=lambda load: load.num_tokens - load.num_cached > 1)
    return counts


@wrong("schedule", says="copy it to change it")
def schedule_adding_to_those_that_run(running, waiting, *others):
    counts = plan(list(running), waiting, *others)
    running += [Load(n, 0, 0) for n in counts[len(running) :]]
    return counts


@wrong("schedule", says="a dict, not a list")
def schedule_a_dict(*args):
    return dict(enumerate(plan(*args)))


@wrong("schedule", says="a Tensor, not a list")
def schedule_a_tensor(*args):
    return torch.tensor(plan(*args), dtype=torch.int64)


@wrong("schedule", says="give ints")
def schedule_fractions(*args):
    return [float(count) for count in plan(*args)]


@wrong("schedule", says="missing 1 required positional argument")
def schedule_without_a_default(running, waiting, free, budget, size, watermark):
    return plan(running, waiting, free, budget, size, watermark)


@right("schedule")
def schedule_recursively(
    running, waiting, free, token_budget, block_size, watermark_blocks=0
):
    budget, counts = token_budget, [0] * len(running)
    for i, (t, c, b) in sorted(
        enumerate(running), key=lambda row: row[1][0] - row[1][1] > 1
    ):
        n = max(0, min(t - c, budget, (b + free) * block_size - c))
        if n:
            counts[i], budget = n, budget - n
            free -= max(0, (c + n - 1) // block_size + 1 - b)
    queue = iter(waiting)

    def begin(free, budget, is_alone):
        load = next(queue, None) if budget > 0 else None
        if load is None:
            return []
        needed = (load[0] - 1) // block_size + 1 - load[2]
        if needed > free - (0 if is_alone else watermark_blocks):
            return []
        n = min(load[0] - load[1], budget)
        return [n, *begin(free - needed, budget - n, False)]

    return counts + begin(free, budget, not running)


@wrong("schedule", says="wrong for a short rest of a prompt before a decode")
def schedule_short_rests_as_decodes(*args):
    def order(running):
        missing = [load.num_tokens - load.num_cached for load in running]
        return sorted(range(len(running)), key=lambda i: missing[i] > args[4])

    return plan(*args, order=order)


@wrong("schedule", says="Decodes first")
def schedule_new_prompts_last(*args):
    return plan(
        *args,
        order=lambda running: sorted(
            range(len(running)), key=lambda i: running[i].num_cached == 0
        ),
    )


@wrong("schedule", says="more than it fills")
def schedule_giving_own_blocks_away(running, waiting, free, *others):
    def taken(load, n, size, ceil):
        return ceil(load.num_cached + n, size) - load.num_blocks

    spare = sum(
        max(-taken(load, 0, others[1], lambda n, s: -(-n // s)), 0) for load in running
    )
    return plan(running, waiting, free + spare, *others)


@wrong("schedule", says="wrong for twelve decodes and twenty short prompts")
def schedule_four_who_wait(*args):
    return plan(*args, after=lambda counts, begun, running: counts + begun[:4])


@wrong("schedule", says="wrong for a decode without room")
def schedule_with_a_token_for_each(*args):
    return plan(*args, spend=lambda budget, n, load: budget - max(n, 1))


@wrong("schedule", says="and a prompt with room")
def schedule_copies_that_nobody_writes(running, waiting, free, budget, size, watermark=0):
    counts = [0] * len(running)
    for i in sorted(range(len(running)), key=lambda i: running[i][0] - running[i][1] > 1):
        num_tokens, num_cached, has = running[i]
        room = (has + free) * size - num_cached
        counts[i] = max(min(num_tokens - num_cached, budget, room), 0)
        budget -= counts[i]
        free -= max(-(-(num_cached + counts[i]) // size) - has, 0)
    for load in waiting:
        needed = -(-load.num_tokens // size) - load.num_blocks
        if budget == 0 or needed + bool(counts) * watermark > free:
            break
        counts.append(min(load.num_tokens - load.num_cached, budget))
        budget, free = budget - counts[-1], free - needed
    return counts


@wrong("schedule")
def schedule_whole_blocks_of_who_waits(*args):
    def first(load, budget):
        missing = load.num_tokens - load.num_cached
        return missing if missing <= budget else max(budget // args[4] * args[4], 1)

    return plan(*args, first=first)


# finish_reason


@right("finish_reason")
def reason_by_a_set(new_ids, max_new_tokens, stop_ids=()):
    if {new_ids[-1]} & set(stop_ids):
        return "stop"
    return "length" if len(new_ids) == max_new_tokens else None


@right("finish_reason")
def reason_in_a_loop(new_ids, max_new_tokens, stop_ids=()):
    *_, last = new_ids
    reason = None if max_new_tokens - len(new_ids) > 0 else "length"
    for stop_id in stop_ids:
        if stop_id == last:
            reason = "stop"
    return reason


@right("finish_reason")
def reason_by_a_table(new_ids, max_new_tokens, stop_ids=()):
    is_stop = any(new_ids[len(new_ids) - 1] == s for s in sorted(stop_ids))
    return {(True, True): "stop", (True, False): "stop", (False, True): "length"}.get(
        (is_stop, len(new_ids) >= max_new_tokens)
    )


@wrong("finish_reason", says='"stop" comes before "length"')
def reason_length_first(new_ids, max_new_tokens, stop_ids=()):
    if len(new_ids) >= max_new_tokens:
        return "length"
    return "stop" if new_ids[-1] in stop_ids else None


@wrong("finish_reason", says="The last of new_ids alone")
def reason_of_any(new_ids, max_new_tokens, stop_ids=()):
    if set(new_ids) & set(stop_ids):
        return "stop"
    return "length" if len(new_ids) >= max_new_tokens else None


@wrong("finish_reason", says="With its max_new_tokens-th token")
def reason_one_too_late(new_ids, max_new_tokens, stop_ids=()):
    if new_ids[-1] in stop_ids:
        return "stop"
    return "length" if len(new_ids) > max_new_tokens else None


@wrong("finish_reason", says="not over before")
def reason_one_too_early(new_ids, max_new_tokens, stop_ids=()):
    if new_ids[-1] in stop_ids:
        return "stop"
    return "length" if len(new_ids) + 1 >= max_new_tokens else None


@wrong("finish_reason", says="is among stop_ids: it ends")
def reason_without_stop_ids(new_ids, max_new_tokens, stop_ids=()):
    return "length" if len(new_ids) >= max_new_tokens else None


@wrong("finish_reason", says="is among stop_ids: it ends")
def reason_that_takes_0_for_none(new_ids, max_new_tokens, stop_ids=()):
    if new_ids[-1] and new_ids[-1] in stop_ids:
        return "stop"
    return "length" if len(new_ids) >= max_new_tokens else None


@wrong("finish_reason", says="not subscriptable")
def reason_of_the_first_stop_id(new_ids, max_new_tokens, stop_ids=()):
    if stop_ids and new_ids[-1] == stop_ids[0]:
        return "stop"
    return "length" if len(new_ids) >= max_new_tokens else None


@wrong("finish_reason", says="is among stop_ids: it ends")
def reason_of_some_stop_id(new_ids, max_new_tokens, stop_ids=()):
    if new_ids[-1] in list(stop_ids)[:1]:
        return "stop"
    return "length" if len(new_ids) >= max_new_tokens else None


@wrong("finish_reason", says="is among stop_ids: it ends")
def reason_by_identity(new_ids, max_new_tokens, stop_ids=()):
    if any(new_ids[-1] is stop_id for stop_id in stop_ids):
        return "stop"
    return "length" if len(new_ids) >= max_new_tokens else None


@wrong("finish_reason")
def reason_in_text(new_ids, max_new_tokens, stop_ids=()):
    if str(new_ids[-1]) in str(list(stop_ids)):
        return "stop"
    return "length" if len(new_ids) >= max_new_tokens else None


@wrong("finish_reason", says="a bool, neither None nor a string")
def reason_yes_or_no(new_ids, max_new_tokens, stop_ids=()):
    return new_ids[-1] in stop_ids or len(new_ids) >= max_new_tokens


@wrong("finish_reason", says="changed its inputs")
def reason_popping(new_ids, max_new_tokens, stop_ids=()):
    is_last = len(new_ids) >= max_new_tokens
    if new_ids.pop() in stop_ids:
        return "stop"
    return "length" if is_last else None


@wrong("finish_reason", says="missing 1 required positional argument")
def reason_without_a_default(new_ids, max_new_tokens, stop_ids):
    return reason_in_a_loop(new_ids, max_new_tokens, stop_ids)


@wrong("finish_reason", says="expected None, got ''")
def reason_without_a_word(new_ids, max_new_tokens, stop_ids=()):
    return reason_in_a_loop(new_ids, max_new_tokens, stop_ids) or ""


@wrong("finish_reason", says="expected 'length', got 'LENGTH'")
def reason_in_capitals(new_ids, max_new_tokens, stop_ids=()):
    reason = reason_in_a_loop(new_ids, max_new_tokens, stop_ids)
    return reason and reason.upper()


@right("finish_reason")
def reason_by_match(new_ids, max_new_tokens, stop_ids=()):
    match (new_ids[-1] in tuple(stop_ids), max_new_tokens > len(new_ids)):
        case (True, _):
            return "stop"
        case (_, False):
            return "length"
    return None


@wrong("finish_reason", says="the only token, which ends it too")
def reason_of_a_single_token(new_ids, max_new_tokens, stop_ids=()):
    if max_new_tokens == 1:
        return "length"
    return reason_in_a_loop(new_ids, max_new_tokens, stop_ids)


@wrong("finish_reason", says="equal tokens")
def reason_of_different_tokens(new_ids, max_new_tokens, stop_ids=()):
    return reason_in_a_loop(list(dict.fromkeys(new_ids)), max_new_tokens, stop_ids)


@wrong("finish_reason", says="token 0, and nothing that ends it")
def reason_where_0_ends_all(new_ids, max_new_tokens, stop_ids=(0,)):
    return reason_in_a_loop(new_ids, max_new_tokens, stop_ids)


@wrong("finish_reason", says="token 50256, and nothing that ends it")
def reason_where_the_last_of_gpt_2_ends_all(new_ids, max_new_tokens, stop_ids=(50_256,)):
    return reason_in_a_loop(new_ids, max_new_tokens, stop_ids)


@wrong("finish_reason", says="a token 256 above")
def reason_in_bytes(new_ids, max_new_tokens, stop_ids=()):
    if new_ids[-1] % 256 in {stop_id % 256 for stop_id in stop_ids}:
        return "stop"
    return "length" if len(new_ids) >= max_new_tokens else None


# latencies


@right("latencies")
def latencies_by_differences(arrived, times):
    gaps = [later - earlier for earlier, later in zip(times, times[1:])]
    return {
        "first": times[0] - arrived,
        "between": sum(gaps) / len(gaps) if gaps else 0,
        "normalized": (times[0] - arrived + sum(gaps)) / len(times),
    }


@right("latencies")
def latencies_by_numpy(arrived, times):
    waits = np.asarray(times) - arrived
    between = np.diff(waits).mean() if len(times) > 1 else np.float64(0)
    values = waits[0], between, waits[-1] / len(waits)
    return dict(zip(("first", "between", "normalized"), values))


@right("latencies")
def latencies_by_torch(arrived, times):
    times = torch.tensor([arrived, *times], dtype=torch.float64)
    gaps = times.diff()
    return {
        "normalized": gaps.mean(),
        "between": gaps[1:].sum() / max(len(gaps) - 1, 1),
        "first": gaps[0].item(),
    }


@right("latencies")
def latencies_with_more_than_is_asked(arrived, times):
    first, *rest = times
    last = rest[-1] if rest else first
    return {
        "first": first - arrived,
        "between": statistics.fmean(np.diff(times)) if rest else 0.0,
        "normalized": (last - arrived) / (1 + len(rest)),
        "total": last - arrived,
    }


def waits(arrived, times, **others):
    """latencies, with one thing to go wrong."""
    return {**latencies_by_differences(arrived, times), **others}


@wrong("latencies", says="subtract the arrival")
def latencies_first_at(arrived, times):
    return waits(arrived, times, first=times[0])


@wrong("latencies", says="The first token is times[0]")
def latencies_first_is_the_last(arrived, times):
    return waits(arrived, times, first=times[-1] - arrived)


@wrong("latencies", says="of which there are len(times) - 1")
def latencies_a_gap_for_each_token(arrived, times):
    return waits(arrived, times, between=(times[-1] - times[0]) / len(times))


@wrong("latencies", says="the wait for it is `first`")
def latencies_between_from_the_arrival(arrived, times):
    between = (times[-1] - arrived) / max(len(times) - 1, 1)
    return waits(arrived, times, between=between)


@wrong("latencies", says="the wait for it is `first`")
def latencies_between_with_the_first(arrived, times):
    gaps = np.diff([arrived, *times])
    return waits(arrived, times, between=gaps.mean())


@wrong("latencies", says="The mean of all gaps")
def latencies_the_median_gap(arrived, times):
    gaps = np.diff(times)
    return waits(arrived, times, between=np.median(gaps) if len(gaps) else 0)


@wrong("latencies", says="The mean of all gaps")
def latencies_the_largest_gap(arrived, times):
    return waits(arrived, times, between=max(np.diff(times), default=0))


@wrong("latencies", says="for each gap")
def latencies_between_first_and_last(arrived, times):
    return waits(arrived, times, between=times[-1] - times[0])


@wrong("latencies", says="ZeroDivisionError")
def latencies_of_two_at_least(arrived, times):
    between = (times[-1] - times[0]) / (len(times) - 1)
    return waits(arrived, times, between=between)


@wrong("latencies", says="has no gap")
def latencies_nan_for_one(arrived, times):
    between = float(np.mean(np.diff(times)))
    return waits(arrived, times, between=between)


@wrong("latencies", says="None")
def latencies_none_for_one(arrived, times):
    return waits(arrived, times, **({"between": None} if len(times) == 1 else {}))


@wrong("latencies", says="From the arrival to the last token")
def latencies_normalized_without_the_wait(arrived, times):
    return waits(arrived, times, normalized=(times[-1] - times[0]) / len(times))


@wrong("latencies", says="over the number of tokens")
def latencies_normalized_by_gaps(arrived, times):
    normalized = (times[-1] - arrived) / max(len(times) - 1, 1)
    return waits(arrived, times, normalized=normalized)


@wrong("latencies", says="over the number of tokens")
def latencies_normalized_is_the_mean_wait(arrived, times):
    normalized = sum(t - arrived for t in times) / len(times)
    return waits(arrived, times, normalized=normalized)


@wrong("latencies", says="over the number of tokens")
def latencies_not_normalized(arrived, times):
    return waits(arrived, times, normalized=times[-1] - arrived)


@wrong("latencies", says="not tokens in each second")
def latencies_as_throughput(arrived, times):
    return waits(arrived, times, normalized=len(times) / (times[-1] - arrived))


@wrong("latencies", says="In seconds")
def latencies_in_milliseconds(arrived, times):
    return {k: 1000 * v for k, v in latencies_by_differences(arrived, times).items()}


@wrong("latencies", says="wrong for three tokens")
def latencies_in_hundredths(arrived, times):
    return {k: round(v, 2) for k, v in latencies_by_numpy(arrived, times).items()}


@wrong("latencies", says="wrong for forty random times")
def latencies_in_single_precision(arrived, times):
    times = torch.tensor([arrived, *times], dtype=torch.float32).tolist()
    return latencies_by_differences(times[0], times[1:])


@wrong("latencies", says="a tuple, not a dict")
def latencies_in_a_tuple(arrived, times):
    return tuple(latencies_by_differences(arrived, times).values())


@wrong("latencies", says="expected normalized, got none")
def latencies_of_two_kinds(arrived, times):
    seconds = latencies_by_differences(arrived, times)
    return {name: seconds[name] for name in ("first", "between")}


@wrong("latencies", says="changed its inputs")
def latencies_beginning_with_the_arrival(arrived, times):
    seconds = latencies_by_differences(arrived, times)
    times.insert(0, arrived)
    return seconds


# tokens_that_fit


@right("tokens_that_fit")
def fit_by_floor(memory_bytes, weight_bytes, bytes_per_token, share=0.9):
    left = memory_bytes * share - weight_bytes
    return math.floor(left / bytes_per_token) if left > 0 else 0


@right("tokens_that_fit")
def fit_by_the_loss(memory_bytes, weight_bytes, bytes_per_token, share=0.9):
    free = max(0.0, memory_bytes - weight_bytes - (1 - share) * memory_bytes)
    return int(free / bytes_per_token)


@right("tokens_that_fit")
def fit_by_divmod(memory_bytes, weight_bytes, bytes_per_token, share=0.9):
    tokens, _ = divmod(share * memory_bytes - weight_bytes, bytes_per_token)
    return np.int64(0 if tokens < 0 else tokens)


def fitting(left, bytes_per_token):
    """tokens_that_fit, of what is left."""
    return max(math.floor(left / bytes_per_token), 0)


@wrong("tokens_that_fit", says="together: share * memory_bytes")
def fit_share_of_the_rest(memory_bytes, weight_bytes, bytes_per_token, share=0.9):
    return fitting(share * (memory_bytes - weight_bytes), bytes_per_token)


@wrong("tokens_that_fit", says="The share counts")
def fit_all_of_the_rest(memory_bytes, weight_bytes, bytes_per_token, share=0.9):
    return fitting(memory_bytes - weight_bytes, bytes_per_token)


@wrong("tokens_that_fit", says="The weights are there too")
def fit_without_weights(memory_bytes, weight_bytes, bytes_per_token, share=0.9):
    return fitting(share * memory_bytes, bytes_per_token)


@wrong("tokens_that_fit", says="together: share * memory_bytes")
def fit_a_share_of_the_weights(memory_bytes, weight_bytes, bytes_per_token, share=0.9):
    return fitting(memory_bytes - share * weight_bytes, bytes_per_token)


@wrong("tokens_that_fit", says="round down")
def fit_rounded_up(memory_bytes, weight_bytes, bytes_per_token, share=0.9):
    tokens = (share * memory_bytes - weight_bytes) / bytes_per_token
    return max(math.ceil(tokens), 0)


@wrong("tokens_that_fit", says="round down")
def fit_rounded(memory_bytes, weight_bytes, bytes_per_token, share=0.9):
    tokens = (share * memory_bytes - weight_bytes) / bytes_per_token
    return max(round(tokens), 0)


@wrong("tokens_that_fit", says="no token does: 0")
def fit_fewer_than_none(memory_bytes, weight_bytes, bytes_per_token, share=0.9):
    return int((share * memory_bytes - weight_bytes) // bytes_per_token)


@wrong("tokens_that_fit", says="ValueError")
def fit_or_raise(memory_bytes, weight_bytes, bytes_per_token, share=0.9):
    if share * memory_bytes < weight_bytes:
        raise ValueError("the weights do not fit")
    return fitting(share * memory_bytes - weight_bytes, bytes_per_token)


@wrong("tokens_that_fit", says="give an int")
def fit_a_float(memory_bytes, weight_bytes, bytes_per_token, share=0.9):
    return max((share * memory_bytes - weight_bytes) // bytes_per_token, 0.0)


@wrong("tokens_that_fit", says="give an int")
def fit_a_fraction(memory_bytes, weight_bytes, bytes_per_token, share=0.9):
    return max((share * memory_bytes - weight_bytes) / bytes_per_token, 0)


@wrong("tokens_that_fit", says="the share is 0.9")
def fit_another_default(memory_bytes, weight_bytes, bytes_per_token, share=0.8):
    return fitting(share * memory_bytes - weight_bytes, bytes_per_token)


@wrong("tokens_that_fit", says="wrong for three quarters of")
def fit_always_nine_tenths(memory_bytes, weight_bytes, bytes_per_token, share=0.9):
    return fitting(0.9 * memory_bytes - weight_bytes, bytes_per_token)


@wrong("tokens_that_fit", says="divide by bytes_per_token")
def fit_bytes(memory_bytes, weight_bytes, bytes_per_token, share=0.9):
    return max(int(share * memory_bytes - weight_bytes), 0)


@wrong("tokens_that_fit", says="32 bits")
def fit_in_32_bits(memory_bytes, weight_bytes, bytes_per_token, share=0.9):
    tokens = fitting(share * memory_bytes - weight_bytes, bytes_per_token)
    return np.int64(tokens).astype(np.int32)


@wrong("tokens_that_fit", says="wrong for a token that fits in part")
def fit_full_blocks_of_16(memory_bytes, weight_bytes, bytes_per_token, share=0.9):
    return fitting(share * memory_bytes - weight_bytes, bytes_per_token) // 8 * 8


@wrong("tokens_that_fit", says="weights that do not fit")
def fit_the_amount(memory_bytes, weight_bytes, bytes_per_token, share=0.9):
    return int(abs(share * memory_bytes - weight_bytes) // bytes_per_token)


@right("tokens_that_fit")
def fit_in_fractions(memory_bytes, weight_bytes, bytes_per_token, share=0.9):
    left = Fraction(str(share)) * Fraction(memory_bytes) - Fraction(weight_bytes)
    return max(math.floor(left / Fraction(bytes_per_token)), 0)


@wrong("tokens_that_fit", says="more than 32 bits")
def fit_in_single_precision(memory_bytes, weight_bytes, bytes_per_token, share=0.9):
    left = max(np.float32(share * memory_bytes - weight_bytes), np.float32(0))
    return int(left / np.float32(bytes_per_token))


@wrong("tokens_that_fit", says="wrong for weights that take all")
def fit_one_at_least(memory_bytes, weight_bytes, bytes_per_token, share=0.9):
    return fitting(share * memory_bytes - weight_bytes, bytes_per_token) or 1


@wrong("tokens_that_fit", says="round down")
def fit_less_the_tokens_of_weights(
    memory_bytes, weight_bytes, bytes_per_token, share=0.9
):
    all_tokens = int(share * memory_bytes // bytes_per_token)
    return max(all_tokens - int(weight_bytes // bytes_per_token), 0)


# preempt


@right("preempt")
def preempt_freeing_first(running, waiting, cache):
    last = running[-1]
    cache.free(last.request_id)
    del running[-1]
    waiting.insert(0, last)
    return last


@right("preempt")
def preempt_by_rotation(running, waiting, cache):
    waiting.append(running.pop())
    waiting.rotate(1)
    cache.free(waiting[0].request_id)
    return waiting[0]


@right("preempt")
def preempt_by_slices(running, waiting, cache):
    *others, request = running
    running[:] = others
    waiting.extendleft([request])
    cache.free(request_id=request.request_id)
    return request


@right("preempt")
def preempt_with_a_new_list_of_tokens(running, waiting, cache):
    request = running.pop(len(running) - 1)
    request.token_ids = list(request.token_ids)
    rest = list(waiting)
    waiting.clear()
    waiting += [request, *rest]
    cache.free(request.request_id)
    return request


def send_back(running, waiting, cache, request):
    running.remove(request)
    cache.free(request.request_id)
    waiting.appendleft(request)
    return request


@wrong("preempt", says="began last")
def preempt_who_began_first(running, waiting, cache):
    return send_back(running, waiting, cache, running[0])


@wrong("preempt", says="began last")
def preempt_the_longest(running, waiting, cache):
    longest = max(running, key=lambda request: len(request.token_ids))
    return send_back(running, waiting, cache, longest)


@wrong("preempt", says="began last")
def preempt_the_shortest(running, waiting, cache):
    shortest = min(running, key=lambda request: len(request.token_ids))
    return send_back(running, waiting, cache, shortest)


@wrong("preempt", says="began last")
def preempt_who_has_most_blocks(running, waiting, cache):
    most = max(running, key=lambda request: cache.num_blocks_of(request.request_id))
    return send_back(running, waiting, cache, most)


@wrong("preempt", says="began last")
def preempt_the_shortest_answer(running, waiting, cache):
    shortest = min(running, key=lambda request: (len(request.new_ids), -request.number))
    return send_back(running, waiting, cache, shortest)


@wrong("preempt", says="At the head of the queue: it came")
def preempt_to_the_end_of_the_queue(running, waiting, cache):
    request = running.pop()
    cache.free(request.request_id)
    waiting.append(request)
    return request


@wrong("preempt", says="free it in the cache")
def preempt_keeping_the_blocks(running, waiting, cache):
    request = running.pop()
    waiting.appendleft(request)
    return request


@wrong("preempt", says="waits again")
def preempt_for_good(running, waiting, cache):
    request = running.pop()
    cache.free(request.request_id)
    return request


@wrong("preempt", says="Take it out of the list")
def preempt_leaving_it_there(running, waiting, cache):
    request = running[-1]
    cache.free(request.request_id)
    waiting.appendleft(request)
    return request


@wrong("preempt", says="Take it out of the list")
def preempt_from_another_list(running, waiting, cache):
    request, running = running[-1], running[:-1]
    cache.free(request.request_id)
    waiting.appendleft(request)
    return request


@wrong("preempt", says="waits again")
def preempt_into_another_queue(running, waiting, cache):
    request = running.pop()
    cache.free(request.request_id)
    waiting = deque([request, *waiting])
    return request


@wrong("preempt", says="Return the request itself")
def preempt_without_a_word(running, waiting, cache):
    send_back(running, waiting, cache, running[-1])


@wrong("preempt", says="Return the request itself")
def preempt_returning_its_id(running, waiting, cache):
    return send_back(running, waiting, cache, running[-1]).request_id


@wrong("preempt", says="with all its tokens")
def preempt_forgetting_the_answer(running, waiting, cache):
    request = send_back(running, waiting, cache, running[-1])
    del request.token_ids[request.prompt_len :]
    return request


@wrong("preempt", says="nothing of it changes")
def preempt_with_a_longer_prompt(running, waiting, cache):
    request = send_back(running, waiting, cache, running[-1])
    request.prompt_len = len(request.token_ids)
    return request


@wrong("preempt", says="nothing of it changes")
def preempt_with_a_reason(running, waiting, cache):
    request = send_back(running, waiting, cache, running[-1])
    request.finish_reason = "preempted"
    return request


@wrong("preempt", says="nothing of it changes")
def preempt_with_a_new_number(running, waiting, cache):
    request = send_back(running, waiting, cache, running[-1])
    request.number = 1 + max(other.number for other in (*running, *waiting))
    return request


@wrong("preempt", says="no copy of it")
def preempt_a_copy(running, waiting, cache):
    request = running.pop()
    cache.free(request.request_id)
    waiting.appendleft(copy.deepcopy(request))
    return request


@wrong("preempt", says="no copy of it")
def preempt_a_new_request(running, waiting, cache):
    old = running.pop()
    cache.free(old.request_id)
    settings = old.max_new_tokens, old.temperature, old.top_k, old.top_p, old.seed
    settings += old.stop_ids, old.number
    new = Request(old.request_id, old.token_ids, old.prompt_len, *settings)
    waiting.appendleft(new)
    return new


@wrong("preempt", says="The others stay in the cache")
def preempt_freeing_all(running, waiting, cache):
    for request in running:
        cache.free(request.request_id)
    waiting.appendleft(running.pop())
    return waiting[0]


@wrong("preempt", says="raised ValueError")
def preempt_freeing_a_number(running, waiting, cache):
    request = running.pop()
    cache.free(request.number)
    waiting.appendleft(request)
    return request


@wrong("preempt", says="free it in the cache")
def preempt_freeing_blocks_alone(running, waiting, cache):
    request = running.pop()
    if hasattr(cache, "manager"):
        cache.manager.free(request.request_id)
    else:
        cache.free(request.request_id)
    waiting.appendleft(request)
    return request


@wrong("preempt", says="not now")
def preempt_and_begin_at_once(running, waiting, cache):
    request = send_back(running, waiting, cache, running[-1])
    cache.begin(request.request_id, request.token_ids)
    return request


@wrong("preempt", says="raised AttributeError")
def preempt_in_a_pool_alone(running, waiting, cache):
    request = send_back(running, waiting, cache, running[-1])
    cache.manager.check_integrity()
    return request


@wrong("preempt", says="running: expected")
def preempt_two_at_once(running, waiting, cache):
    request = send_back(running, waiting, cache, running[-1])
    if running:
        send_back(running, waiting, cache, running[-1])
    return request


@wrong("preempt")
def preempt_unless_it_is_alone(running, waiting, cache):
    if len(running) > 1:
        return send_back(running, waiting, cache, running[-1])
    return running[-1]


@wrong("preempt")
def preempt_turning_the_queue_around(running, waiting, cache):
    request = running.pop()
    cache.free(request.request_id)
    waiting.reverse()
    waiting.appendleft(request)
    return request


@wrong("preempt")
def preempt_whoever_shares_blocks_too(running, waiting, cache):
    request = running[-1]
    tables = getattr(getattr(cache, "manager", None), "block_tables", {})
    first = tables.get(request.request_id, [])[:1]
    for other in [r for r in running if tables.get(r.request_id, [])[:1] == first]:
        if first:
            send_back(running, waiting, cache, other)
    return request if first else send_back(running, waiting, cache, request)


@right("preempt")
def preempt_the_last_that_came(running, waiting, cache):
    request = max(running, key=lambda request: request.number)
    waiting.appendleft(request)
    cache.free(request.request_id)
    running.remove(request)
    return request


@wrong("preempt", says="request 0, and three wait")
def preempt_that_takes_0_for_none(running, waiting, cache):
    request = running.pop()
    cache.free(request.request_id or running[0].request_id)
    waiting.appendleft(request)
    return request


@wrong("preempt", says="free it in the cache")
def preempt_freeing_what_has_an_answer(running, waiting, cache):
    request = running.pop()
    if request.new_ids:
        cache.free(request.request_id)
    waiting.appendleft(request)
    return request


@wrong("preempt", says="nothing of it changes")
def preempt_with_fewer_tokens_to_come(running, waiting, cache):
    request = send_back(running, waiting, cache, running[-1])
    request.max_new_tokens -= len(request.new_ids)
    return request


@wrong("preempt")
def preempt_to_the_second_place(running, waiting, cache):
    request = running.pop()
    cache.free(request.request_id)
    waiting.insert(1, request)
    return request


# block_hashes


@right("block_hashes")
def hashes_of_digits(token_ids, block_size, previous=b""):
    hashes = []
    for i in range(len(token_ids) // block_size):
        block = list(token_ids[i * block_size : (i + 1) * block_size])
        text = previous + b"|" + ",".join(str(int(t)) for t in block).encode()
        hashes += [previous := hashlib.md5(text).digest()]
    return hashes


@right("block_hashes")
def hashes_by_updating(token_ids, block_size, previous=b""):
    out = [previous]
    full = token_ids[: len(token_ids) - len(token_ids) % block_size]
    blocks = np.array(full, dtype=np.int64).reshape(-1, block_size)
    for block in blocks:
        state = hashlib.blake2b(out[-1], digest_size=16)
        state.update(block.tobytes())
        out.append(state.digest())
    return out[1:]


@right("block_hashes")
def hashes_in_recursion(token_ids, block_size, previous=b""):
    chain, rest = [], deque(token_ids)
    while len(rest) >= block_size:
        block = [rest.popleft() for _ in range(block_size)]
        as_bytes = b"".join(int(token_id).to_bytes(4, "big") for token_id in block)
        previous = hashlib.sha1(b"block" + previous + as_bytes).digest()
        chain.append(previous)
    return tuple(chain)


@right("block_hashes")
def hashes_as_text(token_ids, block_size, previous=""):
    hashes = []
    for i in range(block_size, len(token_ids) + 1, block_size):
        words = repr((previous, list(token_ids[i - block_size : i])))
        previous = hashlib.sha256(words.encode()).hexdigest()
        hashes.append(previous)
    return hashes


@right("block_hashes")
def hashes_of_pythons_tuples_of_numbers(token_ids, block_size, previous=0):
    hashes = []
    for i in range(0, len(token_ids) - block_size + 1, block_size):
        previous = hash((previous, *token_ids[i : i + block_size]))
        hashes.append(previous)
    return hashes


def chained(
    token_ids,
    block_size,
    previous=b"",
    *,
    end=lambda token_ids, size: len(token_ids) // size * size,
    key=lambda before, block, blocks, i, token_ids: (before, block),
    digest=lambda key: hashlib.sha256(repr(key).encode()).digest(),
):
    """block_hashes, with one thing to go wrong."""
    hashes, blocks = [], []
    for i in range(0, end(token_ids, block_size), block_size):
        blocks.append(list(token_ids[i : i + block_size]))
        previous = digest(key(previous, blocks[-1], blocks, i, token_ids))
        hashes.append(previous)
    return hashes


@wrong("block_hashes", says="found by all of its text")
def hashes_of_each_block_alone(*args):
    return chained(*args, key=lambda before, block, *_: block)


@wrong("block_hashes", says="found by all of its text")
def hashes_of_two_blocks(*args):
    return chained(*args, key=lambda before, block, blocks, *_: blocks[-2:])


@wrong("block_hashes", says="found by all of its text")
def hashes_of_block_and_place(*args):
    return chained(*args, key=lambda before, block, blocks, i, token_ids: (i, block))


@wrong("block_hashes", says="found by all of its text")
def hashes_added_up(token_ids, block_size, previous=b""):
    total, hashes = int.from_bytes(previous, "big"), []
    for each in chained(token_ids, block_size, key=lambda before, block, *_: block):
        total ^= int.from_bytes(each, "big")
        hashes.append(total.to_bytes(32, "big"))
    return hashes


@wrong("block_hashes", says="found by all of its text")
def hashes_with_the_first_block(*args):
    return chained(*args, key=lambda before, block, blocks, *_: (blocks[0], block))


@wrong("block_hashes", says="over nothing else")
def hashes_without_previous(token_ids, block_size, previous=b""):
    return chained(token_ids, block_size)


@wrong("block_hashes", says="over nothing else")
def hashes_of_the_whole_beginning(token_ids, block_size, previous=b""):
    return [
        hashlib.sha256(previous + repr(token_ids[:end]).encode()).digest()
        for end in range(block_size, len(token_ids) + 1, block_size)
    ]


@wrong("block_hashes", says="over nothing else")
def hashes_of_one_state(token_ids, block_size, previous=b""):
    state, hashes = hashlib.sha256(previous), []
    for i in range(0, len(token_ids) // block_size * block_size, block_size):
        state.update(repr(token_ids[i : i + block_size]).encode())
        hashes.append(state.digest())
    return hashes


@wrong("block_hashes", says="A hash for each full block")
def hashes_of_the_rest_too(*args):
    return chained(*args, end=lambda token_ids, size: len(token_ids))


@wrong("block_hashes", says="A hash for each full block")
def hashes_but_the_last(*args):
    return chained(
        *args, end=lambda token_ids, size: len(token_ids) // size * size - size
    )


@wrong("block_hashes", says="A hash for each full block")
def hashes_leaving_one_token(*args):
    return chained(*args, end=lambda token_ids, size: (len(token_ids) - 1) // size * size)


@wrong("block_hashes", says="does not depend on what comes after it")
def hashes_with_the_length(*args):
    return chained(
        *args, key=lambda before, block, blocks, i, ids: (before, block, len(ids))
    )


@wrong("block_hashes", says="in its place")
def hashes_of_sets(*args):
    return chained(*args, key=lambda before, block, *_: (before, sorted(block)))


@wrong("block_hashes", says="in its place")
def hashes_of_sums(*args):
    return chained(*args, key=lambda before, block, *_: (before, sum(block)))


@wrong("block_hashes", says="Keep tokens apart")
def hashes_of_digits_in_a_row(*args):
    return chained(
        *args, key=lambda before, block, *_: (before, "".join(map(str, block)))
    )


@wrong("block_hashes", says="raised ValueError: bytes must be in range")
def hashes_of_bytes(*args):
    return chained(*args, key=lambda before, block, *_: before + bytes(block))


@wrong("block_hashes", says="A token is not a byte")
def hashes_of_low_bytes(*args):
    return chained(
        *args, key=lambda before, block, *_: (before, [t % 256 for t in block])
    )


@wrong("block_hashes", says="more than 16 bits")
def hashes_of_16_bits(*args):
    def key(before, block, *_):
        return before + np.array(block).astype(np.uint16).tobytes()

    return chained(*args, key=key)


@wrong("block_hashes", says="differ from process to process")
def hashes_by_python(*args):
    return chained(*args, digest=lambda key: hash(str(key)))


@wrong("block_hashes", says="differ from process to process")
def hashes_by_python_of_bytes(token_ids, block_size, previous=b""):
    return chained(
        *(token_ids, block_size, previous),
        key=lambda before, block, *_: (before, tuple(block)),
        digest=lambda key: hash(key).to_bytes(8, "big", signed=True),
    )


@wrong("block_hashes")
def hashes_by_identity(*args):
    return chained(*args, key=lambda before, block, *_: (before, id(block)))


@wrong("block_hashes")
def hashes_at_random(*args):
    return chained(*args, digest=lambda key: random.randbytes(16))


known_texts = {}


@wrong("block_hashes", says="wrong for")
def hashes_that_count(*args):
    def digest(key):
        return known_texts.setdefault(repr(key), len(known_texts)) + random.randrange(
            10**9
        )

    return chained(*args, digest=digest)


@wrong("block_hashes")
def hashes_by_a_polynomial(token_ids, block_size, previous=0):
    hashes = []
    for i in range(0, len(token_ids) // block_size * block_size, block_size):
        for token_id in token_ids[i : i + block_size]:
            previous = (previous * 257 + token_id) % (2**61 - 1)
        hashes.append(previous)
    return hashes


@wrong("block_hashes")
def hashes_of_one_byte(*args):
    return chained(
        *args, digest=lambda key: hashlib.sha256(repr(key).encode()).digest()[:1]
    )


@wrong("block_hashes", says="A hash is short")
def hashes_that_are_the_text(token_ids, block_size, previous=b""):
    hashes = []
    for i in range(0, len(token_ids) // block_size * block_size, block_size):
        block = np.array(token_ids[i : i + block_size], dtype=np.int64)
        previous = previous + block.tobytes()
        hashes.append(previous)
    return hashes


@wrong("block_hashes", says="a tuple, which is no hash")
def hashes_that_are_tuples(token_ids, block_size, previous=()):
    hashes = []
    for i in range(0, len(token_ids) // block_size * block_size, block_size):
        previous = (previous, *token_ids[i : i + block_size])
        hashes.append(previous)
    return hashes


@wrong("block_hashes", says="a generator, not a list")
def hashes_one_by_one(token_ids, block_size, previous=b""):
    return (each for each in chained(token_ids, block_size, previous))


@wrong("block_hashes", says="changed its inputs")
def hashes_that_use_the_text_up(token_ids, block_size, previous=b""):
    hashes = chained(token_ids, block_size, previous)
    del token_ids[: len(hashes) * block_size]
    return hashes


@wrong("block_hashes", says="a bytes, not a list")
def hashes_last_alone(token_ids, block_size, previous=b""):
    return (chained(token_ids, block_size, previous) or [previous])[-1]


@wrong("block_hashes")
def hashes_of_differences(*args):
    def key(before, block, *_):
        return before, np.diff(block).tolist()

    return chained(*args, key=key)


@wrong("block_hashes")
def hashes_of_first_and_last(*args):
    return chained(*args, key=lambda before, block, *_: (before, block[0], block[-1]))


@wrong("block_hashes")
def hashes_by_checksum(token_ids, block_size, previous=0):
    hashes = []
    for i in range(0, len(token_ids) // block_size * block_size, block_size):
        previous ^= zlib.crc32(repr(token_ids[i : i + block_size]).encode())
        hashes.append(previous)
    return hashes


@wrong("block_hashes")
def hashes_with_zero_for_nothing(*args):
    return chained(*args, key=lambda before, block, *_: (before, [t for t in block if t]))


@wrong("block_hashes")
def hashes_with_a_byte_of_the_one_before(*args):
    return chained(*args, key=lambda before, block, *_: (before[:1], block))


@wrong("block_hashes", says="wrong for large ids, one apart")
def hashes_of_half_precision(*args):
    def key(before, block, *_):
        return before, np.array(block, dtype=np.float16).tobytes()

    return chained(*args, key=key)


@wrong("block_hashes")
def hashes_of_two_bytes(*args):
    def digest(key):
        return hashlib.sha256(repr(key).encode()).digest()[:2]

    return chained(*args, digest=digest)


@wrong("block_hashes", says="over nothing else")
def hashes_with_previous_in_the_first_alone(token_ids, block_size, previous=b""):
    return chained(
        *(token_ids, block_size, previous),
        key=lambda before, block, blocks, *_: (previous, blocks),
    )


@wrong("block_hashes", says="numbered[0]: expected [0], got [0, 1]")
def hashes_beginning_with_previous(token_ids, block_size, previous=b""):
    return [previous, *chained(token_ids, block_size, previous)]


# find_prefix


@right("find_prefix")
def prefix_by_takewhile(hashes, block_of_hash, num_tokens, block_size):
    found = itertools.takewhile(block_of_hash.__contains__, hashes)
    block_ids = [block_of_hash[block_hash] for block_hash in found]
    if len(block_ids) * block_size >= num_tokens:
        block_ids.pop()
    return block_ids


@right("find_prefix")
def prefix_with_a_counter(hashes, block_of_hash, num_tokens, block_size):
    n = 0
    while (
        n < len(hashes)
        and hashes[n] in block_of_hash
        and (n + 1) * block_size <= num_tokens - 1
    ):
        n += 1
    return [block_of_hash[hashes[i]] for i in range(n)]


@right("find_prefix")
def prefix_with_none(hashes, block_of_hash, num_tokens, block_size):
    block_ids, left = [], num_tokens
    for block_hash in hashes:
        block_id, left = block_of_hash.get(block_hash), left - block_size
        if block_id is None or left <= 0:
            return block_ids
        block_ids.append(block_id)
    return block_ids


@right("find_prefix")
def prefix_by_exception(hashes, block_of_hash, num_tokens, block_size):
    found = ()
    try:
        for number in range(1, len(hashes) + 1):
            if number * block_size == num_tokens:
                break
            found += (np.int64(block_of_hash[hashes[number - 1]]),)
    except KeyError:
        pass
    return found


def search(hashes, block_of_hash):
    """All blocks from the first on, without a gap."""
    found = []
    for block_hash in hashes:
        if block_hash not in block_of_hash:
            break
        found.append(block_of_hash[block_hash])
    return found


@wrong("find_prefix", says="One token is left to compute")
def prefix_of_all(hashes, block_of_hash, num_tokens, block_size):
    return search(hashes, block_of_hash)


@wrong("find_prefix", says="gets one block less")
def prefix_always_one_less(hashes, block_of_hash, num_tokens, block_size):
    return search(hashes, block_of_hash)[:-1]


@wrong("find_prefix", says="gets one block less")
def prefix_one_less_where_all_are_there(hashes, block_of_hash, num_tokens, block_size):
    found = search(hashes, block_of_hash)
    return found[:-1] if len(found) == len(hashes) else found


@wrong("find_prefix", says="Behind a block that is missing")
def prefix_with_gaps(hashes, block_of_hash, num_tokens, block_size):
    hashes = hashes[: (num_tokens - 1) // block_size]
    return [block_of_hash[h] for h in hashes if h in block_of_hash]


@wrong("find_prefix", says="Behind a block that is missing")
def prefix_anywhere(hashes, block_of_hash, num_tokens, block_size):
    hashes = hashes[: (num_tokens - 1) // block_size]
    runs = [search(hashes[i:], block_of_hash) for i in range(len(hashes))]
    return max(runs, key=len, default=[])


@wrong("find_prefix", says="Behind a block that is missing")
def prefix_up_to_the_last(hashes, block_of_hash, num_tokens, block_size):
    hashes = hashes[: (num_tokens - 1) // block_size]
    for n in range(len(hashes), 0, -1):
        if hashes[n - 1] in block_of_hash:
            return [block_of_hash[h] for h in hashes[:n] if h in block_of_hash]
    return []


@wrong("find_prefix", says="Block 0 is a block")
def prefix_without_block_0(hashes, block_of_hash, num_tokens, block_size):
    block_ids = []
    for block_hash in hashes[: (num_tokens - 1) // block_size]:
        block_id = block_of_hash.get(block_hash)
        if not block_id:
            break
        block_ids.append(block_id)
    return block_ids


@wrong("find_prefix", says="raised KeyError")
def prefix_that_must_be_there(hashes, block_of_hash, num_tokens, block_size):
    return [block_of_hash[h] for h in hashes[: (num_tokens - 1) // block_size]]


@wrong("find_prefix", says="In the order of the text")
def prefix_in_the_order_of_the_pool(hashes, block_of_hash, num_tokens, block_size):
    return sorted(search(hashes[: (num_tokens - 1) // block_size], block_of_hash))


@wrong("find_prefix", says="In the order of the text")
def prefix_from_the_end(hashes, block_of_hash, num_tokens, block_size):
    return search(hashes[: (num_tokens - 1) // block_size], block_of_hash)[::-1]


@wrong("find_prefix", says="a str, not a number")
def prefix_of_hashes(hashes, block_of_hash, num_tokens, block_size):
    found = search(hashes[: (num_tokens - 1) // block_size], block_of_hash)
    return hashes[: len(found)]


@wrong("find_prefix", says="a int, not a list")
def prefix_length(hashes, block_of_hash, num_tokens, block_size):
    return len(search(hashes[: (num_tokens - 1) // block_size], block_of_hash))


@wrong("find_prefix", says="changed its inputs")
def prefix_taken_away(hashes, block_of_hash, num_tokens, block_size):
    found = search(hashes[: (num_tokens - 1) // block_size], block_of_hash)
    for block_hash in hashes[: len(found)]:
        del block_of_hash[block_hash]
    return found


@wrong("find_prefix")
def prefix_of_one_block_fewer_than_full(hashes, block_of_hash, num_tokens, block_size):
    return search(hashes[: num_tokens // block_size - 1], block_of_hash)


@wrong("find_prefix", says="wrong for all of a text")
def prefix_none_of_a_whole_text(hashes, block_of_hash, num_tokens, block_size):
    found = search(hashes, block_of_hash)
    return [] if len(found) * block_size == num_tokens else found


@wrong("find_prefix")
def prefix_by_halves(hashes, block_of_hash, num_tokens, block_size):
    low, high = 0, min(len(hashes), (num_tokens - 1) // block_size)
    while low < high:  # all before one that is there are there too
        middle = (low + high + 1) // 2
        if hashes[middle - 1] in block_of_hash:
            low = middle
        else:
            high = middle - 1
    return [block_of_hash[h] for h in hashes[:low] if h in block_of_hash]


@wrong("find_prefix")
def prefix_of_ten_blocks_at_most(hashes, block_of_hash, num_tokens, block_size):
    return search(hashes[: min(10, (num_tokens - 1) // block_size)], block_of_hash)


@wrong("find_prefix")
def prefix_with_a_block_to_compute(hashes, block_of_hash, num_tokens, block_size):
    found = search(hashes, block_of_hash)
    while len(found) * block_size > num_tokens - block_size:
        found.pop()
    return found


# evict


@right("evict")
def evict_by_sorting(idle):
    rows = [
        (last_used, -depth, block_id) for block_id, (last_used, depth) in idle.items()
    ]
    return sorted(rows)[0][2]


@right("evict")
def evict_in_two_steps(idle):
    oldest = min(last_used for last_used, _ in idle.values())
    deepest = max(depth for last_used, depth in idle.values() if last_used == oldest)
    return next(b for b, value in idle.items() if tuple(value) == (oldest, deepest))


@right("evict")
def evict_in_a_loop(idle):
    best = None
    for block_id in idle:
        last_used, depth = idle[block_id]
        is_older = best is None or last_used < idle[best][0]
        if is_older or last_used == idle[best][0] and depth > idle[best][1]:
            best = block_id
    return np.int64(best)


@right("evict")
def evict_by_a_heap(idle):
    heap = [((used, -depth), block_id) for block_id, (used, depth) in idle.items()]
    heapq.heapify(heap)
    return heapq.heappop(heap)[-1]


@right("evict")
def evict_by_two_stable_sorts(idle):
    by_depth = sorted(idle, key=lambda block_id: idle[block_id][1], reverse=True)
    return min(by_depth, key=lambda block_id: idle[block_id][0])


@wrong("evict", says="not used for longest")
def evict_the_latest(idle):
    return max(idle, key=lambda b: (idle[b][0], -idle[b][1]))


@wrong("evict", says="not used for longest")
def evict_the_latest_and_deepest(idle):
    return max(idle, key=lambda b: idle[b])


@wrong("evict", says="the deepest goes")
def evict_the_shallowest(idle):
    return min(idle, key=lambda b: idle[b])


@wrong("evict", says="not used for longest")
def evict_the_deepest_of_all(idle):
    return max(idle, key=lambda b: (idle[b][1], -idle[b][0]))


@wrong("evict")
def evict_whichever_of_the_oldest(idle):
    return min(idle, key=lambda b: idle[b][0])


@wrong("evict", says="not used for longest")
def evict_the_first(idle):
    return next(iter(idle))


@wrong("evict", says="not used for longest")
def evict_the_last(idle):
    return list(idle)[-1]


@wrong("evict")
def evict_the_smallest_id(idle):
    return min(idle)


@wrong("evict", says="a tuple, not a number")
def evict_its_values(idle):
    return min(idle.values(), key=lambda value: (value[0], -value[1]))


@wrong("evict", says="whoever asks takes it away")
def evict_and_take_away(idle):
    block_id = evict_by_sorting(idle)
    del idle[block_id]
    return block_id


@wrong("evict")
def evict_by_difference(idle):
    return min(idle, key=lambda b: idle[b][0] - idle[b][1])


@wrong("evict")
def evict_by_words(idle):
    return min(idle, key=lambda b: (str(idle[b][0]), -idle[b][1]))


@wrong("evict")
def evict_by_weights(idle):
    return min(idle, key=lambda b: 10 * idle[b][0] - idle[b][1])


@wrong("evict")
def evict_that_takes_0_for_none(idle):
    best = None
    for block_id in idle:
        key = idle[block_id][0], -idle[block_id][1]
        if not best or key < (idle[best][0], -idle[best][1]):
            best = block_id
    return best


@wrong("evict", says="block 0, of time 0")
def evict_without_a_time_of_0(idle):
    used = {block_id: value for block_id, value in idle.items() if value[0]}
    return evict_by_sorting(used)


@wrong("evict")
def evict_of_the_first_two(idle):
    return evict_by_sorting(dict(list(idle.items())[:2]))


@wrong("evict")
def evict_from_the_longest_text(idle):
    times = [last_used for last_used, _ in idle.values()]
    return max(idle, key=lambda b: (times.count(idle[b][0]), -idle[b][0], idle[b][1]))


@wrong("evict", says="a list, not a number")
def evict_several(idle):
    return [evict_by_sorting(idle)]
