"""Who has a place in the batch where tenants ask for more places than there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from tailserve.engine.fairness import FairShares
from tailserve.engine.residency import Residency
from tailserve.engine.sequence import Sequence


class Places:
    """The tenant that is deepest in debt starts nothing while others wait that are not, and gives up places for as many of
    theirs: so what it sends too much costs them little. Between tenants that all ask for too much nothing changes hands."""

    def __init__(self, residency: Residency, shares: Mapping[str, FairShares]) -> None:
        """`shares` by class."""
        self._residency = residency
        self._shares = shares
        self._held: set[tuple[str, str]] = set()
        """Class and tenant of those that start nothing in this step."""
        self._vacant: Counter[str] = Counter()
        """Class to places given up that nobody has taken yet, whatever becomes of the cap meanwhile."""

    def may_start(self, seq: Sequence, num_running: int, cap: int) -> bool:
        """Whether there is a place for it, where so many of its class run and `cap` may."""
        if seq.promoted:
            return True
        return (seq.slo.name, seq.request.tenant) not in self._held and (num_running < cap or self._vacant[seq.slo.name] > 0)

    def note_start(self, seq: Sequence) -> None:
        """It has started."""
        self._vacant[seq.slo.name] = max(self._vacant[seq.slo.name] - 1, 0)

    def review(self, caps: Mapping[str, int]) -> None:
        """To be called before each step. `caps` has how many of each class may run."""
        self._held.clear()
        residency = self._residency
        asked = {name: Counter[str]() for name in caps}
        for (name, tenant), count in residency.queued.items():
            asked[name][tenant] = count
        mine = {name: Counter[str]() for name in caps}
        for seq in residency.running:
            mine[seq.slo.name][seq.request.tenant] += 1
        free = residency.config.max_num_seqs - len(residency.running)
        for name, cap in caps.items():
            running = mine[name].total()
            vacant = min(max(cap - running, 0), free)
            if vacant >= asked[name].total() or not self._share(name, mine[name], asked[name], vacant):
                del self._vacant[name]

    def _share(self, name: str, mine: Counter[str], asked: Counter[str], vacant: int) -> bool:
        """Whether somebody waits that need not."""
        shares = self._shares[name]
        giver = min({*mine, *asked}, key=shares.credit)
        takers = sum(count for tenant, count in asked.items() if shares.credit(tenant) >= -shares.burst)
        if not takers or shares.credit(giver) > -2 * shares.burst:
            return False
        self._held.add((name, giver))
        theirs = [seq for seq in self._residency.running if (seq.slo.name, seq.request.tenant) == (name, giver)]
        # Those that are about to end do so before others could begin.
        theirs = [seq for seq in theirs if seq.num_pending and not seq.promoted]
        # What is computed again in the least time comes first.
        theirs.sort(key=lambda seq: seq.num_computed)
        for seq in theirs[: max(takers - max(vacant, self._vacant[name]), 0)]:
            self._residency.preempt(seq)
            self._vacant[name] += 1
        return True
