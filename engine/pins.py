"""Sessions' KV blocks: for how long they are kept between two turns, and whose yield first."""

from __future__ import annotations

from collections import Counter, OrderedDict

from tailserve.engine.blocks import BlockPool
from tailserve.engine.config import EngineConfig
from tailserve.engine.cost import StepTimes
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

    __slots__ = ("ended_s", "gap_s", "hashes", "until_s")

    def __init__(self, gap_s: float) -> None:
        self.hashes: tuple[bytes, ...] = ()
        """Of its pinned blocks, the first of the conversation first."""
        self.ended_s = 0.0
        self.until_s = 0.0
        self.gap_s = gap_s
        """Seconds between its turns, a running mean."""


class Pins:
    """Pins the blocks of a session when one of its answers ends.

    For how long follows from what computing them again would cost and from the time that passed between its turns, or
    between those of others as long as there was one only (cf. CachedAttention, Gao et al., USENIX ATC 2024). No tenant's
    sessions pin more than its share of the pool: where they would, those whose last answers ended first yield. The same
    order holds where the pool needs blocks, so that pins delay nobody.
    """

    def __init__(self, config: EngineConfig, pool: BlockPool, times: StepTimes) -> None:
        self._config = config
        self._pool = pool
        self._times = times
        self._sessions: OrderedDict[tuple[str, str], Session] = OrderedDict()
        """Tenant and session id to what is kept, by the ends of their last answers."""
        self._pinned: Counter[str] = Counter()
        """Tenant to blocks."""
        self._epochs: dict[tuple[str, str], int] = {}
        self._gap_s = FIRST_GAP_S
        self._expired_s = float("-inf")

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def num_blocks(self) -> int:
        """Pinned blocks; those that two sessions share count twice."""
        return self._pinned.total()

    def begin(self, seq: Sequence, now: float) -> None:
        """A turn begins, perhaps a session's first."""
        session = self._sessions.get(_name(seq))
        if session is not None and session.ended_s:
            gap = max(now - session.ended_s, 0.0)
            session.gap_s += 0.5 * (gap - session.gap_s)
            self._gap_s += 0.1 * (gap - self._gap_s)

    def end(self, seq: Sequence) -> None:
        """A turn's answer has ended with its last step; its blocks are still held."""
        name, now = _name(seq), seq.moved_s
        if not name[1] or seq.epoch != self.epoch(*name):
            return  # no session, or one that was deleted meanwhile
        session = self._sessions.pop(name, None) or Session(self._gap_s)
        # What is public is nobody's own.
        hashes = tuple(seq.hashes[seq.request.num_public // self._config.block_size : seq.num_registered])
        # One of several turns at once that ended early takes nothing from the others.
        if len(hashes) >= len(session.hashes) or hashes != session.hashes[: len(hashes)]:
            self._pin(name[0], session, hashes)
        cost_s = self._times.predict(len(seq.token_ids), unsampled=len(seq.token_ids), excess=0) or WORTH_S
        session.ended_s = now
        session.until_s = now + min(PATIENCE * session.gap_s * min(cost_s / WORTH_S, 1.0), self._config.session_ttl_s)
        self._sessions[name] = session
        self._keep_to_share(name[0])

    def expire(self, now: float) -> None:
        """Unpins what has been kept for long enough; may be called in every step."""
        if now < self._expired_s + EXPIRE_S:
            return
        self._expired_s = now
        for name in [name for name, session in self._sessions.items() if session.until_s <= now]:
            self._unpin(name)

    def drop(self, tenant: str, session_id: str) -> int:
        """Forgets a session and what its blocks hold, at once, also of turns that still run. Returns how many blocks were
        kept of it."""
        name = tenant, session_id
        self._epochs[name] = self._epochs.pop(name, 0) + 1
        if len(self._epochs) > MOST_DELETED:
            del self._epochs[next(iter(self._epochs))]
        session = self._sessions.get(name)
        if session is None:
            return 0
        self._unpin(name)
        return self._pool.drop(session.hashes)

    def epoch(self, tenant: str, session_id: str) -> int:
        """How often a session was deleted: blocks from before are not found any more."""
        return self._epochs.get((tenant, session_id), 0)

    def check_integrity(self) -> None:
        """AssertionError where pins and sessions disagree."""
        counted = Counter(content for session in self._sessions.values() for content in session.hashes)
        assert counted == self._pool.pins, "pinned content and sessions disagree"
        pinned: Counter[str] = Counter()
        for (tenant, _), session in self._sessions.items():
            pinned[tenant] += len(session.hashes)
        assert +pinned == +self._pinned, f"{pinned} pinned, {self._pinned} counted"

    def _pin(self, tenant: str, session: Session, hashes: tuple[bytes, ...]) -> None:
        self._pool.pin(hashes)
        self._pool.unpin(session.hashes)
        self._pinned[tenant] += len(hashes) - len(session.hashes)
        session.hashes = hashes

    def _unpin(self, name: tuple[str, str]) -> None:
        session = self._sessions.pop(name)
        # The last of a prefix first: it is the first to be evicted.
        self._pool.unpin(reversed(session.hashes))
        self._pinned[name[0]] -= len(session.hashes)

    def _keep_to_share(self, tenant: str) -> None:
        tenants = sum(count > 0 for count in self._pinned.values())
        share = int(self._config.session_share * self._config.num_blocks) // max(tenants, 1)
        while self._pinned[tenant] > share:
            self._unpin(next(name for name in self._sessions if name[0] == tenant))


def _name(seq: Sequence) -> tuple[str, str]:
    return seq.request.tenant, seq.request.session_id or ""
