"""Which of the proposed tokens a step verifies."""

from __future__ import annotations

from collections.abc import Mapping

from tailserve.engine.sequence import Sequence
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

    def with_rests(self, drafts: Mapping[int, Draft]) -> dict[int, Draft]:
        """The drafts, and rests of earlier ones for rows that have none."""
        rests, self._rests = self._rests, {}
        return rests | dict(drafts)

    def select(self, offers: Mapping[int, tuple[Sequence, Draft]], num_sequences: int, num_tokens: int) -> dict[int, int]:
        """Row to how many tokens of its draft to verify, in a step of `num_tokens` for `num_sequences`.

        A class with a fixed number gets it; for the others the policy chooses.
        """
        fixed = {row: len(draft.token_ids) for row, (seq, draft) in offers.items() if seq.slo.speculation != "auto"}
        survivals = {row: self.survivals(seq, draft) for row, (seq, draft) in offers.items() if row not in fixed}
        return fixed | self.policy.choose(num_sequences, num_tokens + sum(fixed.values()), survivals)

    def survivals(self, seq: Sequence, draft: Draft) -> list[float]:
        """See `Acceptance.survivals`."""
        return self._acceptance.survivals(draft, seq.draft_record)

    def observe(self, seq: Sequence, draft: Draft, offered: int, accepted: int) -> None:
        """The first `offered` tokens of a draft were verified; the first `accepted` held."""
        self._acceptance.observe(draft, offered, accepted, seq.draft_record)
        for counts, count in ((self._stats.drafted_by_kind, offered), (self._stats.accepted_by_kind, accepted)):
            counts[draft.kind] = counts.get(draft.kind, 0) + count
        behind = accepted + 1
        if seq.row is not None and behind < len(draft.token_ids):
            rest = draft.token_ids[behind:]
            self._rests[seq.row] = Draft(draft.base_len + behind, rest, draft.confidences[behind:], kind=REST)
