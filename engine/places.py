"""Who has a place in the batch where tenants ask for more places than there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from tailserve.engine.fairness import FairShares
from tailserve.engine.residency import Residency
from tailserve.engine.sequence import Key, Sequence

AT_ONCE = 0.1
"""Of a class's running sequences, how many places may stand empty for others."""


class Places:
    """Tenants that are deep in debt stand behind the others while there are too few places, and give up as many as those
    wait for that are not: so what they send too much costs others little. Where all are in debt nothing changes hands."""

    def __init__(self, residency: Residency, shares: Mapping[str, FairShares]) -> None:
        """`shares` by class."""
        self._residency = residency
        self._shares = shares
        self._behind: set[tuple[str, str]] = set()
        """Class and tenant of those that stand behind the others."""
        self._vacant: Counter[str] = Counter()
        """Class to places given up and not taken yet: they can be whatever becomes of the cap meanwhile."""

    def turn(self, seq: Sequence) -> tuple[bool, Key]:
        """The sort key of those that run or wait to run, within a level."""
        return self._is_behind(seq), seq.key

    def _is_behind(self, seq: Sequence) -> bool:
        return seq.row is None and not seq.promoted and seq.group in self._behind

    def is_in_debt(self, seq: Sequence) -> bool:
        """Whether its tenant is, beside others that are not."""
        return seq.request.tenant in self._shares[seq.slo.name].debtors

    def in_turn(self, waiting: list[Sequence]) -> list[Sequence]:
        """Those that wait in a level, which are in order of their keys."""
        return sorted(waiting, key=self._is_behind) if self._behind else waiting

    def are_left(self, name: str, num_running: int, cap: int) -> bool:
        """Whether a class of which so many run, and `cap` may, has one for another."""
        return num_running < cap or self._vacant[name] > 0

    def note_start(self, seq: Sequence) -> None:
        """It has started."""
        self._vacant[seq.slo.name] = max(self._vacant[seq.slo.name] - 1, 0)

    def review(self, caps: Mapping[str, int]) -> None:
        """To be called before each step. `caps` has how many of each class may run."""
        self._behind.clear()
        residency = self._residency
        several = [name for name in caps if self._shares[name].num_tenants > 1]
        if not several or not residency.waiting:
            self._vacant.clear()
            return
        asked, mine = ({name: Counter[str]() for name in caps} for _ in range(2))
        for (name, tenant), count in residency.num_waiting.items():
            asked[name][tenant] = count
        for seq in residency.running:
            mine[seq.slo.name][seq.request.tenant] += 1
        free = residency.config.max_num_seqs - len(residency.running)
        for name in several:
            left = min(max(caps[name] - mine[name].total(), 0), free)
            if left >= asked[name].total() or not self._share(name, mine[name], asked[name], left, free):
                del self._vacant[name]

    def _share(self, name: str, mine: Counter[str], asked: Counter[str], left: int, free: int) -> bool:
        """Of a class with only so many places `left`; `free` for all. Whether there is who gives and who takes."""
        shares = self._shares[name]
        credit = {tenant: shares.credit(tenant) for tenant in {*mine, *asked}}
        takers = sum(count for tenant, count in asked.items() if credit[tenant] >= -shares.burst)
        givers = {tenant for tenant in credit if credit[tenant] <= -2 * shares.burst}
        if not takers or not givers:
            return False
        self._behind.update((name, tenant) for tenant in shares.debtors)
        self._vacant[name] = min(self._vacant[name], free)
        # Prompts are read one after the other: of more places at once most would stand empty.
        most = max(int(AT_ONCE * mine.total()), 1)
        # Those that are about to end do so before others could begin.
        theirs = [seq for seq in self._residency.running if seq.num_pending and not seq.promoted]
        theirs = [seq for seq in theirs if seq.slo.name == name and seq.request.tenant in givers]
        # Deepest in debt first, and of each what has not yielded before and is computed again in the least time.
        theirs.sort(key=lambda seq: (credit[seq.request.tenant], seq.num_preemptions, seq.num_computed))
        for seq in theirs[: max(min(takers, most) - max(left, self._vacant[name]), 0)]:
            self._residency.preempt(seq)
            self._vacant[name] += 1
        return True
