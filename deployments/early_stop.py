"""Ends answers that have said what they had to say: heuristics over tokens and text, as they come."""

from __future__ import annotations

import math
import re

from tailserve.cluster.early_stop import EarlyStopConfig
from tailserve.deployments.repetition import Repetition

_END = re.compile(r"[.!?。！？][\"'”’)\]*_]*(?=\s)|[。！？]|\n\n")
"""Behind which a sentence, or a paragraph without one, has ended."""
_NO_END = re.compile(r"(?:^|[\s(\"'])(?:[A-Za-z]|\d{1,3}|(?i:mr|mrs|ms|dr|prof|st|no|vs|etc|e\.g|i\.e|cf|fig|al|approx))\.$")
"""What ends with a full stop and is no sentence: initials, numbers of a list, abbreviations."""
_CLOSING = re.compile(
    r"\b(?:in (?:summary|conclusion|short)|to (?:summari[sz]e|conclude|sum up)|overall|i hope (?:this|that)|let me know)\b",
    re.IGNORECASE,
)
_FENCE = "```"
SAID = 0.6
"""Share of a sentence's runs of three words, heard before, from which on it says nothing new."""
PATIENCE = 64
"""Tokens that what goes round in circles may take to end its sentence or line, beyond the length of an exact cycle."""


class EarlyStop:
    """One answer's heuristics. Feed it each token and the text it completed; the text to show comes back, and the reason if
    the answer ends with it: "repetition", "soft_length", "answer_complete" or "closing_repeat"."""

    def __init__(self, config: EarlyStopConfig) -> None:
        self._config = config
        self._repetition = Repetition() if config.repetition else None
        self._text = ""
        self._sentence = 0
        """Where the one being written begins."""
        self._num_tokens = 0
        self._starts: list[int] = []
        """Characters before each token."""
        self._patience: int | None = None
        """Tokens that it may still take to end, since it goes round in circles."""
        self._closed = False
        self._heard: set[tuple[str, ...]] = set()

    def push(self, token_id: int, text: str, end_logprob: float | None = None) -> tuple[str, str | None]:
        """`end_logprob`: that the model would have ended instead of this token."""
        self._num_tokens += 1
        known = len(self._text)
        self._text += text
        if self._repetition is not None and self._goes_in_circles(self._repetition, token_id, known):
            line = self._text.find("\n", known) + 1
            if line or not self._patience:
                return self._text[known : line or None], "repetition"
            self._patience -= 1
        for end in self._sentence_ends(known):
            reason = self._at(end, end_logprob)
            if reason is not None:
                return self._text[known:end], reason
        return text, None

    def _goes_in_circles(self, repetition: Repetition, token_id: int, known: int) -> bool:
        """Whether it does, or has, and is to end where it can: `_patience` says within how many tokens."""
        self._starts.append(known)
        circles = repetition.push(token_id)
        if circles and self._patience is None:
            self._patience = PATIENCE + repetition.cycle
        if repetition.cycle:
            cycle = self._text[self._starts[-repetition.cycle] :]
            if "\n" not in cycle and not _END.search(cycle * 2):
                self._patience = 0  # no end will come
        return self._patience is not None

    def _sentence_ends(self, known: int) -> list[int]:
        """Where sentences ended, as the text behind `known` shows."""
        # A full stop counts once there is something behind it.
        ends = (match.end() for match in _END.finditer(self._text, max(known - 8, 0)))
        return [end for end in ends if end >= known and end > self._sentence and self._is_end(end)]

    def _is_end(self, end: int) -> bool:
        return not _NO_END.search(self._text[max(end - 16, 0) : end])

    def _at(self, end: int, end_logprob: float | None) -> str | None:
        """The reason to stop where a sentence has just ended, if there is one."""
        config, sentence = self._config, self._text[self._sentence : end]
        self._sentence = end
        repeated = self._says_nothing_new(sentence)
        if self._text.count(_FENCE, 0, end) % 2:
            return None
        if self._patience is not None:
            return "repetition"
        if config.closing and self._closed and repeated:
            return "closing_repeat"
        self._closed = self._closed or bool(_CLOSING.search(sentence))
        if config.soft_max_tokens is not None and self._num_tokens > config.soft_max_tokens:
            return "soft_length"
        if config.complete_above is None or end_logprob is None or self._num_tokens <= config.complete_min_tokens:
            return None
        return "answer_complete" if math.exp(end_logprob) >= config.complete_above else None

    def _says_nothing_new(self, sentence: str) -> bool:
        words = re.findall(r"\w+", sentence.lower())
        runs = set(zip(words, words[1:], words[2:], strict=False))
        heard = len(runs & self._heard)
        self._heard |= runs
        return bool(runs) and heard >= SAID * len(runs)
