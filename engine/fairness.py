"""Fair shares of tenants among requests of equal priority."""

from __future__ import annotations

from collections import Counter, defaultdict

OUTPUT_WEIGHT = 2
"""What a generated token counts, against one of a prompt."""
FIRST_GUESS = 128.0
"""Output tokens of an answer before any has ended."""
RECENT = 0.05
"""Of the newest request in running means."""
BURST = 0.25
"""Of `max_num_seqs`, how many usual requests a tenant may ask for at once and be held to no part."""


class FairShares:
    """Tags by which requests of equal priority stand in line, so that tenants with requests waiting get the same service.

    Start-time fair queueing (Goyal, Vin and Cheng 1996) over what tokens cost, as the virtual token counter has it (Sheng
    et al., OSDI 2024): a tenant's request begins where its last one ends, or now, and lasts as long as its tokens. How many
    an answer will have is guessed, and set right when it ends. With one tenant the order is that of arrival.

    Turns leave out what was before: a burst of one that sends little gets no more than a part equal to that of one that
    sends too much day and night. For that there is credit (see `Places`): what a tenant asks for is taken from it, what
    anybody is served adds an equal part to everybody's. It is a burst at most, and no debt is higher than a burst and what
    the tenant has open.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._burst = BURST * max_num_seqs
        self._now = 0.0
        self._ends: dict[str, float] = {}
        self._last: dict[str, float] = {}
        """Tenant to the last tag it got."""
        self._open: Counter[str] = Counter()
        """Tenant to its requests that have not ended."""
        self._owed: defaultdict[str, float] = defaultdict(float)
        """Tenant to what its open requests were charged."""
        self._credit: dict[str, float] = {}
        """Tenant to its credit; those that are not here have a burst."""
        self._debtors: frozenset[str] | None = None
        """See `debtors`, which each prompt of a step asks for; None where credit has changed since."""
        self._usual = FIRST_GUESS
        self._usual_charge = OUTPUT_WEIGHT * FIRST_GUESS

    def enter(self, tenant: str, num_prompt: int, max_output: int) -> tuple[float, float]:
        """A request's tag, and what it is charged."""
        charge = num_prompt + OUTPUT_WEIGHT * min(self._usual, max_output)
        # Where an answer turned out short its tenant's next begins earlier, but not before one that waits.
        tag = max(self._now, self._ends.get(tenant, 0.0), self._last.get(tenant, 0.0))
        self._ends[tenant], self._last[tenant] = tag + charge, tag
        self._open[tenant] += 1
        self._owed[tenant] += charge
        self._usual_charge += RECENT * (charge - self._usual_charge)
        self._credit[tenant] = self.credit(tenant) - charge
        self._debtors = None
        return tag, charge

    @property
    def num_tenants(self) -> int:
        """Those with requests that have not ended."""
        return len(self._open)

    @property
    def burst(self) -> float:
        """In tokens."""
        return self._burst * self._usual_charge

    def credit(self, tenant: str) -> float:
        """In tokens; less than 0 where it is spent."""
        return self._credit.get(tenant, self.burst)

    @property
    def debtors(self) -> frozenset[str]:
        """Of those with requests that have not ended, who is in debt by more than a burst; nobody if all are."""
        if self._debtors is None:
            found = frozenset(tenant for tenant in self._open if self.credit(tenant) < -self.burst)
            self._debtors = found if len(found) < len(self._open) else frozenset()
        return self._debtors

    def start(self, tag: float) -> None:
        """The request with this tag runs; may be said again."""
        self._now = max(self._now, tag)

    def end(self, tenant: str, charge: float, num_prompt: int, num_output: int) -> None:
        """A request ends, with so many tokens computed."""
        self._debtors = None
        self._usual += RECENT * (num_output - self._usual)
        served = num_prompt + OUTPUT_WEIGHT * num_output
        self._settle(tenant, charge, served)
        end = self._ends.pop(tenant, self._now) + served - charge
        if end > self._now:
            self._ends[tenant] = end
        self._open[tenant] -= 1
        if not self._open[tenant]:
            del self._open[tenant], self._last[tenant]

    def _settle(self, tenant: str, charge: float, served: float) -> None:
        full, part = self.burst, served / len(self._open)
        self._owed[tenant] -= charge
        self._credit[tenant] = self.credit(tenant) + charge - served
        for name in list(self._credit):
            credit = max(self._credit[name] + part, -full - self._owed[name])
            if credit < full or name in self._open:
                self._credit[name] = min(credit, full)
            else:
                del self._credit[name], self._owed[name]
