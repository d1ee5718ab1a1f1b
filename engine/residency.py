"""Which sequences hold a row and KV blocks, which wait for them, and who yields to whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from tailserve.engine import line
from tailserve.engine.blocks import BlockPool
from tailserve.engine.config import EngineConfig
from tailserve.engine.host_tier import HostTier
from tailserve.engine.sequence import Key, Sequence
from tailserve.engine.stats import EngineStats
from tailserve.engine.types import RowJoin


class Residency:
    """Two lines, running and waiting, both in order of their keys, over one block pool.

    A running sequence has a row at the verifier and blocks; a waiting one has neither. Slots and blocks are taken from
    lower classes for higher ones, and from those whose first token is late anyway for those that can be in time; else only
    an earlier sequence that already runs takes blocks from a later one. So victims are the least urgent, and of these who
    came last.
    """

    def __init__(self, config: EngineConfig, stats: EngineStats) -> None:
        self.config = config
        self.stats = stats
        self.host = HostTier(config.num_host_blocks)
        self.pool = BlockPool(
            config.num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching, host=self.host
        )
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.num_waiting: Counter[tuple[str, str]] = Counter()
        """Class and tenant to sequences that wait."""
        self.queued: Counter[tuple[str, str]] = Counter()
        """Class and tenant to those of them that have not started yet."""
        self.started: Counter[str] = Counter()
        """Class to sequences that have."""
        self.joins: list[RowJoin] = []
        self.leaves: list[int] = []
        self._next_row = 0

    def enter(self, seq: Sequence) -> None:
        """Puts a new sequence in line."""
        self._line_up(seq)
        self.queued[seq.group] += 1

    def remove(self, seq: Sequence) -> None:
        """Takes a sequence out of its line; its blocks are free on return."""
        self._release_kept(seq)
        if seq.row is not None:
            self._leave(seq)
            return
        self._step_out(seq)
        if seq.num_cached is None:
            _decrement(self.queued, seq)

    def _line_up(self, seq: Sequence) -> None:
        line.enter(self.waiting, seq)
        self.num_waiting[seq.group] += 1

    def _step_out(self, seq: Sequence) -> None:
        line.leave(self.waiting, seq)
        _decrement(self.num_waiting, seq)

    def move(self, seq: Sequence, key: Key) -> None:
        """Gives a sequence another place in its line."""
        mine = self.waiting if seq.row is None else self.running
        line.leave(mine, seq)
        seq.key = key
        line.enter(mine, seq)

    def preempt(self, seq: Sequence) -> None:
        """Takes a running sequence's row and blocks. It keeps its tokens, its place in line, and what there is room for in
        the second tier."""
        self.stats.preemptions += 1
        seq.num_preemptions += 1
        seq.paused = True
        # It may not have come to load all that is kept for it since the last time.
        before, seq.num_kept = seq.num_kept, max(seq.num_kept, seq.num_registered)
        self.host.keep(seq.hashes[: seq.num_kept])
        self.host.release(seq.hashes[:before])
        self._leave(seq)
        self._line_up(seq)

    def evacuate(self) -> None:
        """Rows and KV are lost: every running sequence goes back in line, to be computed again."""
        while self.running:
            self.preempt(self.running[-1])
        self.joins.clear()
        self.leaves.clear()
        self.pool.forget()
        self.host.forget()

    def yield_slots(self, caps: Mapping[str, int]) -> None:
        """Running sequences give their slots to waiting ones that outrank them, as far as those may start: `caps` has how
        many of each class may run.

        Those that end with the steps under way are left alone: their slots are free before others could be made so.
        """
        if not self.waiting:
            return
        staying = [seq for seq in self.running if seq.num_pending]
        free = self.config.max_num_seqs - len(staying)
        running = Counter(seq.slo.name for seq in staying)
        classes = self.config.classes
        place = 0
        while place < len(self.waiting):
            seq = self.waiting[place]
            level = seq.key.level
            full = running[seq.slo.name] >= caps[seq.slo.name] and not seq.promoted
            if full and all(running[slo.name] >= caps[slo.name] for slo in classes if slo.priority == level):
                # Of those behind it there may be thousands.
                place = line.begin_of_level(self.waiting, level + 1)
                continue
            place += 1
            if full:
                continue
            if free == 0:
                if not staying or not _outranks(seq, staying[-1]):
                    break
                victim = staying.pop()
                running[victim.slo.name] -= 1
                self.preempt(victim)
                free = 1
            free -= 1
            running[seq.slo.name] += 1

    def admit(self, seq: Sequence) -> bool:
        """Gives a waiting sequence a row, the cached part of its tokens, and its place among the running.

        False when there is no slot for it, or no room for its tokens that lower classes could yield.
        """
        if len(self.running) >= self.config.max_num_seqs:
            return False
        size = self.config.block_size
        hashes = self._hashes(seq)
        cached = self.pool.match(hashes)
        # One token more than it has now, so that a sequence does not start only to be displaced.
        total = len(seq.token_ids) // size + 1
        yieldable = sum(len(other.block_ids) + other.num_reserved for other in self.running if _outranks(seq, other))
        if self.pool.count_needed(total, cached) > self.pool.num_free + yieldable:
            return False  # nobody is displaced in vain
        while self.pool.count_needed(total, cached) > self.pool.num_free:
            if not self.running or not _outranks(seq, self.running[-1]):
                return False
            self.preempt(self.running[-1])
            cached = self.pool.match(hashes)
        self._step_out(seq)
        # What is in the second tier is loaded as fast as the steps have time for it.
        here = cached[: cached.index(None)] if None in cached else cached
        seq.num_found = len(cached) * size
        seq.block_ids = [block for block in here if block is not None]
        self.pool.acquire(seq.block_ids)
        self._reserve(seq, self.pool.count_needed(len(cached) - len(here), cached[len(here) :]))
        seq.row, self._next_row = self._next_row, self._next_row + 1
        line.enter(self.running, seq)
        self.stats.prefix_cache_queries += len(seq.token_ids)
        if len(here) == len(cached):
            self._release_kept(seq)
        if seq.num_cached is None:
            seq.num_cached = seq.num_found
            _decrement(self.queued, seq)
            self.started[seq.slo.name] += 1
            self.stats.prompt_tokens += seq.prompt_len
        self._note_found(seq, len(seq.block_ids))
        self.join(seq)
        return True

    def load(self, seq: Sequence, most: int, new_blocks: dict[int, list[int]]) -> bool:
        """Fills up to `most` further blocks of a sequence from the second tier. Whether there are more to be filled."""
        assert seq.row is not None
        if seq.num_scheduled >= seq.num_found:
            return False
        hashes = self._hashes(seq)[seq.num_registered :]
        self._reserve(seq, 0)
        blocks, loaded, rest = self.pool.fill(hashes, most)
        # What others held and gave back was not reserved.
        self._reserve(seq, min(self.pool.count_needed(len(rest), rest), self.pool.num_free))
        self.stats.host_cache_hits += loaded * self.config.block_size
        if blocks:
            seq.block_ids += blocks
            new_blocks.setdefault(seq.row, []).extend(blocks)
            self._note_found(seq, len(blocks))
        if not rest:
            seq.num_found = seq.num_scheduled
            seq.num_cached = min(seq.num_cached or 0, seq.num_found)
            self._release_kept(seq)
        return bool(rest)

    def _reserve(self, seq: Sequence, count: int) -> None:
        self.pool.num_reserved += count - seq.num_reserved
        seq.num_reserved = count

    def _note_found(self, seq: Sequence, count: int) -> None:
        """The next `count` blocks of a sequence hold what they shall."""
        seq.num_registered += count
        seq.num_computed = seq.num_scheduled = seq.num_registered * self.config.block_size
        self.stats.prefix_cache_hits += count * self.config.block_size

    def _release_kept(self, seq: Sequence) -> None:
        self.host.release(seq.hashes[: seq.num_kept])
        seq.num_kept = 0

    def count_cached(self, seq: Sequence) -> int:
        """A sequence's tokens that are in the prefix cache now, or in the second tier."""
        return len(self.pool.match(self._hashes(seq))) * self.config.block_size

    def _hashes(self, seq: Sequence) -> list[bytes]:
        size = self.config.block_size
        # At least one token is computed: its logits are needed.
        return seq.block_hashes((len(seq.token_ids) - 1) // size, size) if self.config.enable_prefix_caching else []

    def join(self, seq: Sequence) -> None:
        """Tells the verifier all there is to know of a row, be it new or not."""
        assert seq.row is not None
        tokens, blocks = list(seq.token_ids), list(seq.block_ids)
        self.joins.append(RowJoin(seq.row, tokens, seq.prompt_len, blocks, seq.request.sampling, seq.request.traceparent))

    def extend(self, seq: Sequence, num_tokens: int, new_blocks: dict[int, list[int]]) -> bool:
        """Makes room for `num_tokens` tokens; the least urgent give theirs. False if that was `seq` itself."""
        while (need := self._missing(seq, num_tokens)) > self.pool.num_free:
            victim = self.running[-1]
            self.preempt(victim)
            if victim is seq:
                return False
        self._grow(seq, need, new_blocks)
        return True

    def room(self, seq: Sequence) -> int:
        """Tokens that may still be made for a sequence."""
        return min(seq.request.sampling.max_tokens - seq.num_output, self.config.max_model_len - len(seq.token_ids))

    def extend_if_free(self, seq: Sequence, wanted: int, new_blocks: dict[int, list[int]]) -> int:
        """Room for up to `wanted` tokens behind those known, at nobody's cost. Returns how many fit."""
        known = len(seq.token_ids)
        room = (len(seq.block_ids) + self.pool.num_free) * self.config.block_size - known
        fits = max(min(wanted, room), 0)
        self._grow(seq, self._missing(seq, known + fits), new_blocks)
        return fits

    def register(self, seq: Sequence) -> None:
        """Offers blocks that are full of verified tokens to the prefix cache."""
        full = min(seq.num_computed, len(seq.token_ids)) // self.config.block_size
        if self.config.enable_prefix_caching and full > seq.num_registered:
            hashes = seq.block_hashes(full, self.config.block_size)
            for index in range(seq.num_registered, full):
                self.pool.register(seq.block_ids[index], hashes[index])
            seq.num_registered = full

    def check_integrity(self) -> None:
        """Blocks, rows and lines agree. AssertionError names what does not. O(blocks)."""
        reserved = sum(seq.num_reserved for seq in self.running)
        self.pool.check_integrity((seq.block_ids for seq in self.running), reserved)
        assert len(self.running) <= self.config.max_num_seqs, "more sequences run than there are slots"
        for name, some in (("running", self.running), ("waiting", self.waiting)):
            assert some == sorted(some, key=line.place_in_line), f"{name} sequences are out of order"
        waiting = Counter(seq.group for seq in self.waiting)
        queued = Counter(seq.group for seq in self.waiting if seq.num_cached is None)
        assert (self.num_waiting, self.queued) == (waiting, queued), f"{self.num_waiting}, {self.queued} by count in line"
        for seq in self.running:
            assert seq.row is not None, "a running sequence has no row"
            assert 0 <= seq.num_computed < len(seq.token_ids), "a sequence is computed past its last token"
            assert seq.num_computed <= seq.num_scheduled, "a sequence is scheduled behind what is computed"
            assert len(seq.block_ids) * self.config.block_size >= seq.num_computed, "computed tokens have no block"
        assert all(seq.row is None and not seq.block_ids for seq in self.waiting), "a waiting sequence holds something"

    def _missing(self, seq: Sequence, num_tokens: int) -> int:
        return max(0, -(-num_tokens // self.config.block_size) - len(seq.block_ids))

    def _grow(self, seq: Sequence, count: int, new_blocks: dict[int, list[int]]) -> None:
        if count > 0:
            assert seq.row is not None
            taken = self.pool.allocate(count)
            seq.block_ids += taken
            new_blocks.setdefault(seq.row, []).extend(taken)

    def _leave(self, seq: Sequence) -> None:
        assert seq.row is not None
        line.leave(self.running, seq)
        self.leaves.append(seq.row)
        # The verifier takes leaves in first: a row that came and went in between would stay.
        self.joins = [join for join in self.joins if join.row != seq.row]
        self.pool.release(seq.block_ids)
        seq.block_ids = []
        self._reserve(seq, 0)
        seq.row = seq.token_s = None
        seq.num_computed = seq.num_scheduled = seq.num_sampling = seq.num_registered = 0


def _decrement(counts: Counter[tuple[str, str]], seq: Sequence) -> None:
    counts[seq.group] -= 1
    if not counts[seq.group]:
        del counts[seq.group]


def _outranks(seq: Sequence, other: Sequence) -> bool:
    return seq.key[:2] < other.key[:2]
