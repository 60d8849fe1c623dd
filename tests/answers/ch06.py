import copy
import itertools
import math
import statistics
from collections import deque

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


@wrong("schedule")
def schedule_fractions(*args):
    return [float(count) for count in plan(*args)]


@wrong("schedule", says="missing 1 required positional argument")
def schedule_without_a_default(running, waiting, free, budget, size, watermark):
    return plan(running, waiting, free, budget, size, watermark)


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


@wrong("preempt", says="in_the_cache")
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
