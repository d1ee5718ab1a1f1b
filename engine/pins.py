"""Sessions' KV blocks: for how long they are kept between two turns, and whose yield first."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from tailserve.engine.blocks import BlockPool
from tailserve.engine.config import EngineConfig
from tailserve.engine.cost import StepTimes
from tailserve.engine.host_tier import HostTier
from tailserve.engine.sequence import Sequence

MOST_DELETED = 100_000
"""Deleted sessions that are remembered as such: longer than their blocks can have stayed in the cache."""
EXPIRE_S = 1.0
"""How often what has been kept for long enough is looked for."""
FIRST_GAP_S = 30.0
"""Seconds between two turns, before any have been seen."""
PATIENCE = 4.0
"""Of the usual time between its turns, for how long a session is kept."""
WORTH_S = 0.05
"""What it takes to compute a session's tokens again, from which on it is kept for all of that time; for less of it below."""


class Session:
    """What is kept of one conversation."""

    __slots__ = ("ended_s", "gap_s", "hashes", "public", "until_s")

    def __init__(self, gap_s: float) -> None:
        self.hashes: tuple[bytes, ...] = ()
        """Of its own blocks, the first of the conversation first."""
        self.public: tuple[bytes, ...] = ()
        """Of the public blocks before them: nobody's own, but without them it is not found in the second tier."""
        self.ended_s = 0.0
        """When its last answer did."""
        self.until_s = 0.0
        """For how long it is pinned."""
        self.gap_s = gap_s
        """Seconds between its turns, a running mean."""


Name = tuple[str, str]
"""Tenant and session id."""


class Pins:
    """Keeps the blocks of a session when one of its answers ends: pinned on the device at first.

    For how long follows from what computing them again would cost and from the time that passed between its turns, or
    between those of others as long as there was one only (cf. CachedAttention, Gao et al., USENIX ATC 2024). No tenant's
    sessions pin more than its share of the pool: where they would, those whose last answers ended first yield. The same
    order holds where the pool needs blocks, so that pins delay nobody.

    Who yields is kept in the second tier, if there is one, up to the tenant's share of that and for `session_ttl_s` at most.
    """

    def __init__(self, config: EngineConfig, pool: BlockPool, host: HostTier, times: StepTimes) -> None:
        self._config = config
        self._pool = pool
        self._host = host
        self._times = times
        self._pinned: OrderedDict[Name, Session] = OrderedDict()
        """By the ends of their last answers."""
        self._yielded: OrderedDict[Name, Session] = OrderedDict()
        """By when they ceased to be pinned."""
        self._num_pinned: Counter[str] = Counter()
        """Tenant to blocks."""
        self._num_yielded: Counter[str] = Counter()
        self._epochs: dict[Name, int] = {}
        self._gap_s = FIRST_GAP_S
        self._expired_s = float("-inf")

    def __len__(self) -> int:
        return len(self._pinned) + len(self._yielded)

    @property
    def num_blocks(self) -> int:
        """Pinned blocks; those that two sessions share count twice."""
        return self._num_pinned.total()

    def begin(self, seq: Sequence, now: float) -> None:
        """A turn begins, perhaps a session's first."""
        session = self._find(_name(seq))
        if session is not None and session.ended_s:
            gap = max(now - session.ended_s, 0.0)
            session.gap_s += 0.5 * (gap - session.gap_s)
            self._gap_s += 0.1 * (gap - self._gap_s)

    def end(self, seq: Sequence) -> None:
        """A turn's answer has ended with its last step; its blocks are still held."""
        name, now = _name(seq), seq.moved_s
        if not name[1] or seq.epoch != self.epoch(*name):
            return  # no session, or one that was deleted meanwhile
        before = self._find(name)
        session = Session(self._gap_s if before is None else before.gap_s)
        num_public = min(seq.request.num_public // self._config.block_size, seq.num_registered)
        session.public, session.hashes = tuple(seq.hashes[:num_public]), tuple(seq.hashes[num_public : seq.num_registered])
        if before is not None and session.hashes == before.hashes[: len(session.hashes)]:
            # One of several turns at once that ended early takes nothing from the others.
            session.public, session.hashes = before.public, before.hashes
        cost_s = self._times.predict(len(seq.token_ids), unsampled=len(seq.token_ids), excess=0) or WORTH_S
        session.ended_s = now
        session.until_s = now + min(PATIENCE * session.gap_s * min(cost_s / WORTH_S, 1.0), self._config.session_ttl_s)
        self._keep(name, session)
        if before is not None:
            self._forget(name, before)
        self._pinned[name] = session
        self._keep_to_share(name[0])

    def expire(self, now: float) -> None:
        """Lets go of what has been kept for long enough; may be called in every step."""
        if now < self._expired_s + EXPIRE_S:
            return
        self._expired_s = now
        for name in [name for name, session in self._pinned.items() if session.until_s <= now]:
            self._yield(name)
        for name, session in list(self._yielded.items()):
            if session.ended_s + self._config.session_ttl_s <= now:
                self._forget(name, session)

    def drop(self, tenant: str, session_id: str) -> int:
        """Forgets a session and what its blocks hold, at once, also of turns that still run. Returns how many blocks had
        them, in both tiers."""
        name = tenant, session_id
        self._epochs[name] = self._epochs.pop(name, 0) + 1
        if len(self._epochs) > MOST_DELETED:
            del self._epochs[next(iter(self._epochs))]
        session = self._find(name)
        if session is None:
            return 0
        return self._forget(name, session) + self._pool.drop(session.hashes)

    def epoch(self, tenant: str, session_id: str) -> int:
        """How often a session was deleted: blocks from before are not found any more."""
        return self._epochs.get((tenant, session_id), 0)

    def check_integrity(self, displaced: Iterable[bytes]) -> None:
        """AssertionError where pins, tiers and sessions disagree. `displaced`: what is kept for others than sessions."""
        pinned = Counter(content for session in self._pinned.values() for content in session.hashes)
        assert pinned == self._pool.pins, "pinned content and sessions disagree"
        kept = Counter(
            content
            for line in (self._pinned, self._yielded)
            for session in line.values()
            for content in session.public + session.hashes
        )
        self._host.check_integrity(kept + Counter(displaced))
        for line, counted in ((self._pinned, self._num_pinned), (self._yielded, self._num_yielded)):
            blocks: Counter[str] = Counter()
            for (tenant, _), session in line.items():
                blocks[tenant] += len(session.hashes)
            assert +blocks == +counted, f"{blocks} blocks kept, {counted} counted"

    def _find(self, name: Name) -> Session | None:
        return self._pinned.get(name) or self._yielded.get(name)

    def _keep(self, name: Name, session: Session) -> None:
        self._pool.pin(session.hashes)
        self._host.keep(session.public + session.hashes)
        self._num_pinned[name[0]] += len(session.hashes)

    def _yield(self, name: Name) -> None:
        """Its blocks go as others do, but to the second tier."""
        tenant, session = name[0], self._pinned[name]
        if not self._host.num_blocks:
            self._forget(name, session)
            return
        self._unpin(name, session)
        self._yielded[name] = session
        self._num_yielded[tenant] += len(session.hashes)
        share = self._host.num_blocks // max(sum(count > 0 for count in self._num_yielded.values()), 1)
        # Not this one, whatever its part: what there is no room for goes by the host's own order.
        while self._num_yielded[tenant] > share and (first := _first_of(tenant, self._yielded)) != name:
            self._forget(first, self._yielded[first])

    def _unpin(self, name: Name, session: Session) -> None:
        del self._pinned[name]
        # The last of a prefix first: it is the first to be evicted.
        self._pool.unpin(reversed(session.hashes))
        self._num_pinned[name[0]] -= len(session.hashes)

    def _forget(self, name: Name, session: Session) -> int:
        """Returns how many blocks of the second tier are free now."""
        if self._pinned.get(name) is session:
            self._unpin(name, session)
        else:
            del self._yielded[name]
            self._num_yielded[name[0]] -= len(session.hashes)
        return self._host.release(session.public + session.hashes)

    def _keep_to_share(self, tenant: str) -> None:
        tenants = sum(count > 0 for count in self._num_pinned.values())
        share = int(self._config.session_share * self._config.num_blocks) // max(tenants, 1)
        while self._num_pinned[tenant] > share:
            self._yield(_first_of(tenant, self._pinned))


def _name(seq: Sequence) -> Name:
    return seq.request.tenant, seq.request.session_id or ""


def _first_of(tenant: str, sessions: OrderedDict[Name, Session]) -> Name:
    return next(name for name in sessions if name[0] == tenant)
