"""Fair shares of tenants among requests of equal priority."""

from __future__ import annotations

from collections import Counter

OUTPUT_WEIGHT = 2
"""What a generated token counts, against one of a prompt."""
FIRST_GUESS = 128.0
"""Output tokens of an answer before any has ended."""


class FairShares:
    """Tags by which requests of equal priority stand in line, so that tenants with requests waiting get the same service.

    Start-time fair queueing (Goyal, Vin and Cheng 1996) over what tokens cost, as the virtual token counter has it (Sheng
    et al., OSDI 2024): a tenant's request begins where its last one ends, or now, and lasts as long as its tokens. How many
    an answer will have is guessed, and set right when it ends. With one tenant the order is that of arrival.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._ends: dict[str, float] = {}
        self._last: dict[str, float] = {}
        """Tenant to the last tag it got."""
        self._open: Counter[str] = Counter()
        """Tenant to its requests that have not ended."""
        self._usual = FIRST_GUESS

    def enter(self, tenant: str, num_prompt: int, max_output: int) -> tuple[float, float]:
        """A request's tag, and what it is charged."""
        charge = num_prompt + OUTPUT_WEIGHT * min(self._usual, max_output)
        # Where an answer turned out short its tenant's next begins earlier, but not before one that waits.
        tag = max(self._now, self._ends.get(tenant, 0.0), self._last.get(tenant, 0.0))
        self._ends[tenant], self._last[tenant] = tag + charge, tag
        self._open[tenant] += 1
        return tag, charge

    def start(self, tag: float) -> None:
        """The request with this tag runs; may be said again."""
        self._now = max(self._now, tag)

    def end(self, tenant: str, charge: float, num_prompt: int, num_output: int) -> None:
        """A request ends, with so many tokens computed."""
        self._usual += 0.05 * (num_output - self._usual)
        end = self._ends.pop(tenant, self._now) + num_prompt + OUTPUT_WEIGHT * num_output - charge
        if end > self._now:
            self._ends[tenant] = end
        self._open[tenant] -= 1
        if not self._open[tenant]:
            del self._open[tenant], self._last[tenant]
