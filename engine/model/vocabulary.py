"""Drafts from a model of another vocabulary: what both know is drafted, everything else is spelt out.

Token-level intersection (TLI) of Timor et al. (arXiv 2502.05202): lossless, since a draft may come from anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tailserve.engine.errors import ConfigError

_SPACES = ("Ġ", "▁")
"""What stands for a blank in byte-level and in SentencePiece vocabularies."""
_ENOUGH = 100
"""Tokens in common below which the two cannot be meant for each other."""


class VocabularyMap:
    """From the verifier's tokens to the draft's, and back where that is one to one."""

    def __init__(self, verifier: Mapping[str, int], draft: Mapping[str, int], spell: Callable[[int], Sequence[int]]) -> None:
        """`verifier`, `draft`: token to id; `spell`: the draft's tokens for the text of a verifier's token."""
        names = {_plain(token): number for token, number in draft.items()}
        self._to_draft = {number: names[plain] for token, number in verifier.items() if (plain := _plain(token)) in names}
        pairs = sorted((own, theirs) for theirs, own in self._to_draft.items())
        self.own = [own for own, _ in pairs]
        """The draft's ids of the tokens that both know; a draft chooses among these."""
        self.names = [theirs for _, theirs in pairs]
        """The verifier's ids of the same."""
        self._spell = spell
        self._spelt: dict[int, list[int]] = {}

    def to_draft(self, token_ids: Sequence[int]) -> list[int]:
        """The verifier's tokens in the draft's vocabulary; one that it lacks becomes the tokens of its text."""
        result: list[int] = []
        for token_id in token_ids:
            own = self._to_draft.get(token_id)
            if own is not None:
                result.append(own)
                continue
            if token_id not in self._spelt:
                self._spelt[token_id] = list(self._spell(token_id))
            result += self._spelt[token_id]
        return result


def map_vocabularies(verifier: Any, draft: Any) -> VocabularyMap | None:
    """Between two of transformers' tokenizers; None if their vocabularies are one. ConfigError if they share little."""
    theirs, own = verifier.get_vocab(), draft.get_vocab()
    if theirs == own:
        return None

    def spell(token_id: int) -> list[int]:
        ids: list[int] = draft(verifier.decode([token_id]), add_special_tokens=False)["input_ids"]
        return ids

    mapped = VocabularyMap(theirs, own, spell)
    if len(mapped.own) < _ENOUGH:
        raise ConfigError(
            f"the draft's vocabulary has {len(mapped.own)} tokens in common with the verifier's, too few to draft with: use "
            "a draft of the same family, or ngram",
            param="draft_model",
        )
    return mapped


def _plain(token: str) -> str:
    for sign in _SPACES:
        token = token.replace(sign, " ")
    return token
