"""Fair shares of tenants among requests of equal priority."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

OUTPUT_WEIGHT = 2
"""What a generated token counts, against one of a prompt."""
FIRST_GUESS = 128.0
"""Output tokens of an answer before any has ended."""
BURST = 0.125
"""Of `max_num_seqs`, how many requests of the usual size a tenant may be ahead of its turn."""
RECENT = 0.05
"""Of the newest request in the running means."""


class Turn(NamedTuple):
    """A request's turn among those of equal priority."""

    tag: float
    """Lower is earlier; in tokens served."""
    charge: float
    """Tokens that its tenant was charged for it beforehand."""
    over: bool
    """Its tenant had more than a burst before it: it goes behind others, and its place in the batch goes to them."""


class FairShares:
    """Turns, such that tenants with requests waiting get the same service, and one that sends little hardly notices one that
    sends too much.

    Start-time fair queueing (Goyal, Vin and Cheng 1996) over what tokens cost, as the virtual token counter has it (Sheng
    et al., OSDI 2024): a tenant's request begins where its last one ends, or now, and lasts as long as its tokens. How many
    an answer will have is guessed, and set right when it ends. With one tenant the order is that of arrival.

    Equal shares alone are not enough for one that sends little but all at once: its burst would get no more of the batch
    than what comes day and night. So who is further ahead of its turn than a burst is `over`, until that has been served.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._burst = BURST * max_num_seqs
        self._now = 0.0
        self._ends: dict[str, float] = {}
        self._last: dict[str, float] = {}
        """Tenant to the last tag it got."""
        self._open: Counter[str] = Counter()
        """Tenant to its requests that have not ended."""
        self._over: Counter[str] = Counter()
        """The same, those that are over only."""
        self._usual_output = FIRST_GUESS
        self._usual_charge: float | None = None

    def enter(self, tenant: str, num_prompt: int, max_output: int) -> Turn:
        """A request comes."""
        charge = num_prompt + OUTPUT_WEIGHT * min(self._usual_output, max_output)
        usual = charge if self._usual_charge is None else self._usual_charge
        self._usual_charge = usual + RECENT * (charge - usual)
        # Where an answer turned out short its tenant's next begins earlier, but not before one that waits.
        tag = max(self._now, self._ends.get(tenant, 0.0), self._last.get(tenant, 0.0))
        self._ends[tenant], self._last[tenant] = tag + charge, tag
        self._open[tenant] += 1
        # A tenant's own requests stay in order: none is let off while one before it is not.
        over = tenant in self._over or tag - self._now >= self._burst * self._usual_charge
        if over:
            self._over[tenant] += 1
        return Turn(tag, charge, over)

    def start(self, tag: float) -> None:
        """The request with this tag runs; may be said again."""
        self._now = max(self._now, tag)

    def end(self, tenant: str, turn: Turn, num_prompt: int, num_output: int) -> None:
        """A request ends, with so many tokens computed."""
        self._usual_output += RECENT * (num_output - self._usual_output)
        end = self._ends.pop(tenant, self._now) + num_prompt + OUTPUT_WEIGHT * num_output - turn.charge
        if end > self._now:
            self._ends[tenant] = end
        _count_down(self._open, tenant)
        if tenant not in self._open:
            del self._last[tenant]
        if turn.over:
            _count_down(self._over, tenant)


def _count_down(counts: Counter[str], tenant: str) -> None:
    counts[tenant] -= 1
    if not counts[tenant]:
        del counts[tenant]
