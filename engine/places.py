"""Who has a place in the batch where tenants ask for more places than there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from tailserve.engine.fairness import FairShares
from tailserve.engine.residency import Residency
from tailserve.engine.sequence import Key, Sequence


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
        waits = seq.row is None and not seq.promoted
        return waits and (seq.slo.name, seq.request.tenant) in self._behind, seq.key

    def in_turn(self, waiting: list[Sequence]) -> list[Sequence]:
        """Those that wait in a level, which are in order of their keys."""
        return sorted(waiting, key=self.turn) if self._behind else waiting

    def may_start(self, seq: Sequence, num_running: int, cap: int) -> bool:
        """Whether there is a place for it, where so many of its class run and `cap` may."""
        return seq.promoted or num_running < cap or self._vacant[seq.slo.name] > 0

    def note_start(self, seq: Sequence) -> None:
        """It has started."""
        self._vacant[seq.slo.name] = max(self._vacant[seq.slo.name] - 1, 0)

    def review(self, caps: Mapping[str, int]) -> None:
        """To be called before each step. `caps` has how many of each class may run."""
        self._behind.clear()
        residency = self._residency
        asked = {name: Counter[str]() for name in caps}
        for (name, tenant), count in residency.queued.items():
            asked[name][tenant] = count
        mine = {name: Counter[str]() for name in caps}
        for seq in residency.running:
            mine[seq.slo.name][seq.request.tenant] += 1
        free = residency.config.max_num_seqs - len(residency.running)
        for name, cap in caps.items():
            left = min(max(cap - mine[name].total(), 0), free)
            if left >= asked[name].total():
                del self._vacant[name]
            else:
                self._share(name, mine[name], asked[name], left=left, free=free)

    def _share(self, name: str, mine: Counter[str], asked: Counter[str], *, left: int, free: int) -> None:
        """Of a class with only so many places `left`."""
        shares = self._shares[name]
        takers = sum(count for tenant, count in asked.items() if shares.credit(tenant) >= -shares.burst)
        givers = [tenant for tenant in {*mine, *asked} if shares.credit(tenant) <= -2 * shares.burst]
        if not takers or not givers:
            del self._vacant[name]
            return
        self._behind.update((name, tenant) for tenant in givers)
        self._vacant[name] = min(self._vacant[name], free)
        # Those that are about to end do so before others could begin.
        theirs = [seq for seq in self._residency.running if seq.num_pending and not seq.promoted]
        theirs = [seq for seq in theirs if seq.slo.name == name and seq.request.tenant in givers]
        # Deepest in debt first, and of each what has not yielded before and is computed again in the least time.
        theirs.sort(key=lambda seq: (shares.credit(seq.request.tenant), seq.num_preemptions, seq.num_computed))
        for seq in theirs[: max(takers - max(left, self._vacant[name]), 0)]:
            self._residency.preempt(seq)
            self._vacant[name] += 1
