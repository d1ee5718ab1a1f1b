"""Deadlines: when a class's targets ask for a sequence's next token, and what can no longer be on time.

Slack is the deadline, minus now, minus what is left to compute, as in Niyama (arXiv 2503.22562): what can no longer meet its
deadline goes behind what can.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as List

from tailserve.engine.cost import StepTimes
from tailserve.engine.sequence import Sequence
from tailserve.engine.types import SloClass

AIM = 0.6
"""Of a class's time to first token, what is aimed at: who comes in a burst has the rest of it."""
BANKED_TOKENS = 2
"""Tokens that a sequence may be ahead of its pace; what it makes beyond them earns it no slack."""
OWED_TOKENS = 4
"""Tokens that one of a guarded class may be behind: a longer stall, by a restart of the verifier, say, is not made good at
everybody's cost."""
HEADWAY = 0.2
"""Of the shortest time to first token, what a step may take at most: whoever arrives while it runs waits for its end."""
READING_SHARE = 0.75
"""Of a step, what prompts in a hurry may take at most from sequences that generate."""
LATE_SHARE = 0.35
"""The same for prompts whose first token is late anyway, and for answers that are to be read again."""


def next_due_after(seq: Sequence, num_tokens: int, now: float, *, guarded: bool) -> float:
    """When the token behind `num_tokens` new ones is due. The first token starts the clock: time per output token counts
    from there. `guarded`: others wait for it, but not for more than `OWED_TOKENS`."""
    pace = seq.aimed_s
    if seq.due_s is None:
        return now + num_tokens * pace
    due = seq.due_s + num_tokens * pace
    if guarded:
        due = max(due, now - OWED_TOKENS * pace)
    return min(due, now + (1 + BANKED_TOKENS) * pace)


def next_due(seq: Sequence) -> float:
    """When the next token of a sequence is due, those of the steps under way taken as made in time."""
    due = seq.first_due_s if seq.due_s is None else seq.due_s
    return due + seq.num_sampling * seq.aimed_s


def reading_s(seq: Sequence, times: StepTimes) -> float:
    """Seconds to read what is left of a sequence's tokens, with nothing beside it; 0 before anything is known."""
    left = max(len(seq.token_ids) - max(seq.num_found, seq.num_scheduled), 1)
    return times.predict(left, unsampled=left - 1, excess=0) or 0.0


def hopeless(seq: Sequence, now: float, times: StepTimes) -> bool:
    """Whether a sequence without a first token cannot have it in time any more."""
    return now + reading_s(seq, times) > seq.first_due_s


def hurry(prompts: Iterable[Sequence], now: float, times: StepTimes) -> float:
    """The share of the time from now on that prompts need, read in this order, to have their first tokens in time.

    Those that cannot have it any more, or have it, ask for no more than `LATE_SHARE`.
    """
    work = share = 0.0
    for seq in prompts:
        if seq.due_s is not None:
            # It has begun its answer and lost its place, or the draft has begun it.
            share = max(share, LATE_SHARE)
            continue
        needed = reading_s(seq, times)
        left = seq.first_due_s - now
        if seq.key.late or needed > left:
            share = max(share, LATE_SHARE)
            continue
        work += needed
        if needed:
            share = max(share, work / max(left - (1 - AIM) * seq.slo.ttft_s, needed))
    return min(share, READING_SHARE)


def guarded_classes(classes: List[SloClass]) -> frozenset[str]:
    """The classes for whose sequences steps are kept short: all but the least urgent, which takes what is left; none if all
    are equally urgent."""
    least = max(slo.priority for slo in classes)
    return frozenset(slo.name for slo in classes if slo.priority < least)


def longest_step(classes: List[SloClass]) -> float:
    """Seconds that no step should take longer, whatever runs."""
    return HEADWAY * min(slo.ttft_s for slo in classes)
