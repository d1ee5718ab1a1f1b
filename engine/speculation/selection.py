"""Which of the proposed tokens a step verifies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as List

from tailserve.engine.options import MAX_BRANCHES
from tailserve.engine.residency import Residency
from tailserve.engine.scheduled import Scheduled
from tailserve.engine.slo import next_due
from tailserve.engine.speculation.acceptance import Acceptance
from tailserve.engine.speculation.drafter import Draft
from tailserve.engine.speculation.policy import DraftPolicy
from tailserve.engine.stats import EngineStats

REST = "rest"


class DraftSelection:
    """The policy applied to drafts as they come, and what became of them learnt."""

    def __init__(self, policy: DraftPolicy, stats: EngineStats) -> None:
        self.policy = policy
        self._stats = stats
        self._acceptance = Acceptance()
        self._rests: dict[int, Draft] = {}
        """Row to what lay behind its last wrong token: it often fits behind the right one, too."""

    def add(
        self,
        work: List[Scheduled],
        drafts: Mapping[int, Draft],
        count_spare: Callable[[], int],
        residency: Residency,
        new_blocks: dict[int, list[int]],
    ) -> None:
        """Adds to a step those of the drafts (by row) that still apply and pay, as far as it takes nothing from anybody:
        `count_spare()` tokens, of which those furthest behind get theirs first, and blocks that are free."""
        rests, self._rests = self._rests, {}
        drafts = rests | {row: draft for row, draft in drafts.items() if draft.token_ids}
        offers = {}
        for entry in work:
            if entry.samples and entry.row in drafts and (fitting := _fitting(entry, drafts[entry.row])):
                offers[entry.row] = (entry, fitting)
        if not offers:
            return
        counts = self._choose(offers, sum(entry.samples for entry in work), sum(entry.length for entry in work))
        branches, spare = MAX_BRANCHES, count_spare()
        for row, (entry, fitting) in sorted(offers.items(), key=lambda offer: next_due(offer[1][0].seq)):
            # The verifier adds a token of its own behind those that hold.
            may = residency.room(entry.seq) - 1
            room = residency.extend_if_free(entry.seq, min(max(counts[row]), spare, may), new_blocks)
            for draft, wanted in zip(fitting, counts[row], strict=True):
                beside = bool(entry.drafts)
                # A branch begins with the token before it, once more.
                count = min(wanted, room, spare - beside)
                if count > 0 and branches >= beside:
                    entry.drafts.append(draft.token_ids[:count])
                    entry.proposed.append(draft)
                    branches -= beside
                    spare -= count + beside

    def _choose(
        self, offers: Mapping[int, tuple[Scheduled, List[Draft]]], num_sequences: int, num_tokens: int
    ) -> dict[int, list[int]]:
        """Row to how many tokens of each of its drafts to verify, in a step of `num_tokens` for `num_sequences`.

        A class with a fixed number gets it; for the others the policy chooses. A draft that was drawn by chance is taken as
        it is: it ended where a further token was not worth its time (`DraftRow.least`), whichever that would have been. To
        choose among tokens by what they turned out to be would change what answers are likely.
        """
        fixed, survivals = {}, {}
        for row, (entry, fitting) in offers.items():
            if entry.seq.slo.speculation == "auto" and not fitting[0].candidates:
                survivals[row] = [self._acceptance.survivals(draft, entry.seq.draft_record) for draft in fitting]
            else:
                fixed[row] = [len(draft.token_ids) for draft in fitting]
        return fixed | self.policy.choose(num_sequences, num_tokens + sum(map(sum, fixed.values())), survivals)

    def survivals(self, work: List[Scheduled]) -> dict[int, tuple[list[int], list[float]]]:
        """Each row that samples, the tokens of its first draft, and for each of these the chance that it and those before
        it hold."""
        found: dict[int, tuple[list[int], list[float]]] = {}
        for entry in work:
            if entry.samples and not entry.drafts:
                found[entry.row] = ([], [])
            elif entry.samples:
                tokens = entry.drafts[0]
                chances = self._acceptance.survivals(entry.proposed[0], entry.seq.draft_record)
                found[entry.row] = (tokens, chances[: len(tokens)])
        return found

    def observe(self, entry: Scheduled, token_ids: List[int]) -> None:
        """What a step made of an entry: draft tokens that held, and one of the verifier's own."""
        seq = entry.seq
        self._stats.drafts += any(entry.drafts)
        for draft, tokens in zip(entry.proposed, entry.drafts, strict=True):
            held = _num_equal(tokens, token_ids[:-1])
            seq.num_drafted += len(tokens)
            self._stats.draft_tokens += len(tokens)
            self._acceptance.observe(draft, len(tokens), held, seq.draft_record)
            for counts, count in ((self._stats.drafted_by_kind, len(tokens)), (self._stats.accepted_by_kind, held)):
                counts[draft.kind] = counts.get(draft.kind, 0) + count
            rest = draft.token_ids[held + 1 :]
            if rest and held == len(token_ids) - 1 and seq.row is not None:
                found = Draft(draft.base_len + held + 1, rest, draft.confidences[held + 1 :], kind=REST)
                # Of several that end here the first is the best.
                self._rests.setdefault(seq.row, found)


def _fitting(entry: Scheduled, draft: Draft) -> list[Draft]:
    """A draft and those beside it, if they go on from where the sequence is and no step under way will move that."""
    seq = entry.seq
    if draft.base_len != len(seq.token_ids) or seq.num_sampling:
        return []
    return [draft, *(draft.others if entry.length == 1 and not draft.candidates else [])]


def _num_equal(some: List[int], others: List[int]) -> int:
    """Tokens before the first that differ."""
    pairs = enumerate(zip(some, others, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(some), len(others)))
