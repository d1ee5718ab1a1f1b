import pytest
from fakes import make_request

from tailserve.deployments.generation import Choice
from tailserve.deployments.text import Detokenizer, StopStrings
from tailserve.engine.stopping import Stop, check_stop
from tailserve.engine.types import FinishReason, SamplingParams, TokenChunk, TokenLogprob


def params(**fields: object) -> SamplingParams:
    return make_request([1], eos_token_ids=(2,), stop_token_ids=(7,), **fields).sampling


def test_the_models_own_end_has_no_detail_and_a_stop_token_names_itself() -> None:
    assert check_stop(2, 1, 10, params(), 64) == Stop(FinishReason.STOP)
    assert check_stop(7, 1, 10, params(), 64) == Stop(FinishReason.STOP, 7)
    assert check_stop(3, 1, 10, params(), 64) is None


def test_lengths() -> None:
    assert check_stop(3, 8, 10, params(), 64) == Stop(FinishReason.LENGTH)
    assert check_stop(3, 1, 64, params(), 64) == Stop(FinishReason.LENGTH)


def test_an_end_at_the_last_allowed_token_is_an_end() -> None:
    assert check_stop(2, 8, 64, params(), 64) == Stop(FinishReason.STOP)


def test_stop_tokens_wait_for_min_tokens() -> None:
    assert check_stop(2, 3, 10, params(min_tokens=4), 64) is None
    assert check_stop(2, 4, 10, params(min_tokens=4), 64) == Stop(FinishReason.STOP)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (4,), (1, 3), (3, 1)])
def test_an_answer_ends_with_the_same_token_however_many_come_at_once(sizes: tuple[int, ...]) -> None:
    """A draft brings several; those behind a stop string are neither counted nor told."""
    text = Detokenizer(lambda ids, **_: "".join(chr(97 + token) for token in ids))
    choice, tokens = Choice(0, make_request([1], max_tokens=9), text, StopStrings(["c"])), [0, 2, 1, 1]
    pieces = []
    for size in sizes:
        part, tokens = tokens[:size], tokens[size:]
        logprobs = tuple(TokenLogprob(token, -1.0) for token in part)
        pieces.append(choice.take(TokenChunk("a", tuple(part), logprobs)))
        if choice.finished:
            break
    told = [(piece.text, len(piece.logprobs)) for piece in pieces if piece is not None]
    assert (choice.num_tokens, choice.ended) == (2, FinishReason.STOP)
    assert ("".join(text for text, _ in told), sum(count for _, count in told)) == ("a", 2)
