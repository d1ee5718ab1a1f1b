"""Who a request is from, and whether it may enter: API keys, classes, rate and concurrency of tenants."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Mapping, Sequence

from tailserve.cluster.tenants import TenantConfig, hash_key
from tailserve.engine.errors import AuthenticationError, ForbiddenError, InvalidRequestError, QueueFullError

BURST_S = 10.0
"""How much of its rate a tenant that was quiet may use at once."""
COME_BACK_S = 1.0
"""What a tenant with too many requests under way is told."""


class Tenant:
    """One tenant as one ingress sees it: its share of the limits, and what it has used of them."""

    def __init__(self, config: TenantConfig, num_ingresses: int, clock: Callable[[], float]) -> None:
        self.name = config.name
        self._num_ingresses = num_ingresses
        self._clock = clock
        self.allow(config)
        self._left, self._as_of = self._burst, clock()
        self.num_open = 0

    def allow(self, config: TenantConfig) -> None:
        """What it may from now on; what it has used of it stays."""
        self.classes = config.classes
        self._hashes = [text.encode() for text in config.api_key_hashes]
        self._rate = None if config.requests_per_minute is None else config.requests_per_minute / 60 / self._num_ingresses
        self._most = None
        if config.max_concurrent_requests is not None:
            self._most = max(config.max_concurrent_requests // self._num_ingresses, 1)
        self._burst = max((self._rate or 0.0) * BURST_S, 1.0)

    def has(self, key_hash: bytes) -> bool:
        """Whether a key of this hash is its own. How long that takes tells nothing of how alike they are."""
        return sum(hmac.compare_digest(key_hash, own) for own in self._hashes) > 0

    def enter(self, count: int = 1) -> Callable[[], None]:
        """Counts a request for `count` answers that begins; call what it returns when it ends.

        QueueFullError beyond a limit, InvalidRequestError for more than can ever be.
        """
        most = min(self._most or count, self._burst if self._rate is not None else count)
        if count > most:
            raise InvalidRequestError(f"tenant {self.name!r} may have {int(most)} answers at once, not {count}", param="n")
        if self._most is not None and self.num_open + count > self._most:
            raise QueueFullError(
                f"{self.num_open} requests of tenant {self.name!r} are under way, as many as it may have at once",
                retry_after_s=COME_BACK_S,
                code="concurrency_limit_exceeded",
            )
        if self._rate is not None:
            now = self._clock()
            self._left = min(self._left + self._rate * (now - self._as_of), self._burst)
            self._as_of = now
            if self._left < count:
                raise QueueFullError(
                    f"tenant {self.name!r} may send {60 * self._rate:g} requests a minute here",
                    retry_after_s=(count - self._left) / self._rate,
                    code="rate_limit_exceeded",
                )
            self._left -= count
        self.num_open += count
        return lambda: self._leave(count)

    def _leave(self, count: int) -> None:
        self.num_open -= count

    def choose_class(self, asked: str | None, default: str) -> str:
        """The class of a request that named `asked`, or none. ForbiddenError for one that the tenant may not use."""
        if self.classes is None:
            return asked or default
        if asked is None:
            return default if default in self.classes else self.classes[0]
        if asked not in self.classes:
            raise ForbiddenError(
                f"tenant {self.name!r} may not use class {asked!r}, but {', '.join(self.classes)}", param="slo_class"
            )
        return asked


class Gate:
    """All tenants. Without any configured everybody is the same nameless one, and needs no key."""

    def __init__(
        self, tenants: Sequence[TenantConfig], *, num_ingresses: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._num_ingresses = num_ingresses
        self._clock = clock
        self._tenants: list[Tenant] = []
        self.admit(tenants)
        self._nobody = Tenant(TenantConfig.model_construct(name="", api_key_hashes=()), num_ingresses, clock)

    def admit(self, tenants: Sequence[TenantConfig]) -> None:
        """These from now on. One that was here before, by its name, keeps what it has used; what runs of others goes on."""
        known = {tenant.name: tenant for tenant in self._tenants}
        self._tenants = []
        for config in tenants:
            tenant = known.get(config.name)
            if tenant is None:
                tenant = Tenant(config, self._num_ingresses, self._clock)
            else:
                tenant.allow(config)
            self._tenants.append(tenant)

    @property
    def needs_key(self) -> bool:
        return bool(self._tenants)

    def identify(self, headers: Mapping[str, str]) -> Tenant:
        """The tenant whose key a request carries (`Authorization: Bearer KEY`). AuthenticationError if there is none."""
        if not self._tenants:
            return self._nobody
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not key.strip():
            raise AuthenticationError("give an API key: Authorization: Bearer KEY")
        key_hash = hash_key(key.strip()).encode()
        found = [tenant for tenant in self._tenants if tenant.has(key_hash)]
        if not found:
            raise AuthenticationError("this API key is not known here")
        return found[0]
