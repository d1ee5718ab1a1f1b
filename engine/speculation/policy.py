"""How much to draft and to verify, by what it costs and what it brings.

The rule is vLLM's adaptive verification and TurboSpec's goodput (Liu et al., arXiv 2406.14066): over the whole batch, take
the draft tokens that are likeliest to be reached and accepted while expected tokens per second grow. Whether to draft at all
follows from measured tokens per second: speculation must never make anything slower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from tailserve.engine.cost import StepTimes

WEIGHT = 0.1
"""Of the newest step in the running means."""
TRIAL = 8
"""Steps with drafts before it is judged whether they pay; half of them where many sequences each tell something."""
MANY = 16
FIRST_REST, LONGEST_REST = 128, 1024
"""Steps without drafts after that, twice as many each time."""
FEW = 3
"""With so few sequences each new one gets a trial of its own."""


class _Record:
    """Experience with about so many sequences."""

    def __init__(self) -> None:
        self.tokens = self.seconds = 0.0
        """Running means of a step with drafts."""
        self.seen = self.tried = 0
        """Steps of the trial that only generated, and all of them."""
        self.rests_until = 0
        self.failed = False
        """It rests because a trial said so, not because there was nothing to judge by."""
        self.next_rest = FIRST_REST
        self.draft_s = 0.0
        """For a whole draft."""
        self.first_s = self.token_s = 0.0
        """For the first token of all sequences, and for each one more."""

    @property
    def rate(self) -> float | None:
        """Tokens per second with drafts."""
        return self.tokens / self.seconds if self.seconds else None

    def begin_trial(self) -> None:
        self.tokens = self.seconds = 0.0
        self.seen = self.tried = 0


class DraftPolicy:
    """One instance's decisions. Sequences are counted in powers of two: close numbers behave alike."""

    def __init__(self, times: StepTimes) -> None:
        self._times = times
        self._records: dict[int, _Record] = defaultdict(_Record)
        self._num_steps = 0
        self._gap_s = 0.0005
        """Between two steps without drafts."""

    def pays(self, num_sequences: int) -> bool:
        """Whether to draft for a batch of this size now. Where it does not for fewer sequences it does not for more: what
        each further token costs grows with them."""
        size = num_sequences.bit_length()
        return all(
            record.rests_until <= self._num_steps
            for other, record in self._records.items()
            if other == size or (FEW.bit_length() < other < size and record.failed)
        )

    def least(self, num_sequences: int) -> float:
        """The survival below which one more draft token brings less than the time it takes is worth."""
        record = self._records[num_sequences.bit_length()]
        now, longer = self._times.predict(num_sequences), self._times.predict(2 * num_sequences)
        if now is None or longer is None or record.rate is None:
            return 0.1
        return min(max(record.rate * (longer - now + record.token_s) / num_sequences, 0.05), 0.9)

    def choose(
        self, num_sequences: int, num_tokens: int, survivals: Mapping[int, Sequence[Sequence[float]]]
    ) -> dict[int, list[int]]:
        """Row to how many tokens of each of its drafts to verify, beside `num_tokens` that make a token for each sequence.

        `survivals`: for each row, those of its first draft's tokens and of each branch's. A row's drafts begin differently,
        so what they bring adds up; a branch costs a token more than it has.
        """
        step = self._times.predict(num_tokens)
        if step is None:
            return {row: [len(chances) for chances in drafts] for row, drafts in survivals.items()}
        counts = {row: [0] * len(drafts) for row, drafts in survivals.items()}
        drafting = self._records[num_sequences.bit_length()].draft_s
        offers = sorted(
            (
                (min(chance, chances[0] / 2) if branch else chance, -place, row, branch, chance)
                for row, drafts in survivals.items()
                for branch, chances in enumerate(drafts)
                for place, chance in enumerate(chances)
            ),
            reverse=True,
        )
        best_rate, best = num_sequences / (step + drafting), 0
        expected, added = float(num_sequences), 0
        for count, (_, place, _, branch, chance) in enumerate(offers, 1):
            expected += chance
            added += 2 if branch and place == 0 else 1
            rate = expected / ((self._times.predict(num_tokens + added) or step) + drafting)
            if rate > best_rate:
                best_rate, best = rate, count
        for _, _, row, branch, _ in offers[:best]:
            counts[row][branch] += 1
        return counts

    def note_draft(self, num_sequences: int, longest: int, seconds: float) -> None:
        """A draft of at most `longest` tokens for each sequence took so long."""
        record = self._records[num_sequences.bit_length()]
        record.draft_s = _mean(record.draft_s, seconds)
        if longest <= 1:
            record.first_s = _mean(record.first_s, seconds)
        else:
            further = seconds - (record.first_s or seconds / longest)
            record.token_s = _mean(record.token_s, max(further, 0.0) / (longest - 1))

    def note_arrival(self, num_sequences: int) -> None:
        """A sequence begins to generate: it need not be like those before it."""
        if num_sequences <= FEW:
            record = self._records[num_sequences.bit_length()]
            record.rests_until = 0
            record.begin_trial()

    def note_mixed_step(self, num_sequences: int, *, drafted: bool) -> None:
        """A step that also read prompts: it says nothing of what drafts bring, but trials shall not go on for it."""
        self._num_steps += 1
        if drafted:
            record = self._records[num_sequences.bit_length()]
            record.tried += 1
            self._judge(num_sequences, record)

    def note_step(self, num_sequences: int, num_tokens: int, elapsed_s: float, step_s: float, *, drafted: bool) -> None:
        """A step that only generates made `num_tokens`, `elapsed_s` after the one before it; the verifier took `step_s`."""
        self._num_steps += 1
        if not drafted:
            # A pause says nothing, and while drafting pays no step would put it right.
            self._gap_s += WEIGHT * (min(max(elapsed_s - step_s, 0.0), step_s) - self._gap_s)
            return
        record = self._records[num_sequences.bit_length()]
        record.seen += 1
        record.tried += 1
        weight = max(WEIGHT, 1 / record.seen)
        record.tokens += weight * (num_tokens - record.tokens)
        record.seconds += weight * (elapsed_s - record.seconds)
        self._judge(num_sequences, record)

    def _judge(self, num_sequences: int, record: _Record) -> None:
        step = self._times.predict(num_sequences)
        trial = TRIAL if num_sequences < MANY else TRIAL // 2
        if step is None or (record.seen < trial and record.tried < 2 * trial):
            return
        if record.rate is None:
            record.begin_trial()
            record.rests_until, record.failed = self._num_steps + FIRST_REST, False
        elif record.rate < num_sequences / (step + self._gap_s):
            record.begin_trial()
            record.failed = True
            if num_sequences <= FEW:
                # What a lone answer has been like says little of what it will be, and little is lost by asking.
                record.rests_until = self._num_steps + TRIAL
            else:
                record.rests_until = self._num_steps + record.next_rest
                record.next_rest = min(2 * record.next_rest, LONGEST_REST)
        elif record.seen > 4 * TRIAL:
            record.next_rest = FIRST_REST


def _mean(mean: float, value: float) -> float:
    """A running mean that begins with its first value."""
    return mean + WEIGHT * (value - mean) if mean else value
