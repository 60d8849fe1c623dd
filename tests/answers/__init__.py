"""Answers to every exercise, as students write them.

`right`: written differently from the library's, and must pass. `wrong`: a misconception
each, and must fail; `says` is what the check must tell the student about it.
"""

from collections import defaultdict

RIGHT, WRONG = defaultdict(list), defaultdict(list)


def right(exercise: str):
    def keep(answer):
        RIGHT[exercise].append(answer)
        return answer

    return keep


def wrong(exercise: str, says: str = ""):
    def keep(answer):
        WRONG[exercise].append((answer, says))
        return answer

    return keep
