from fakes import make_request

from tailserve.engine.stopping import Stop, check_stop
from tailserve.engine.types import FinishReason, SamplingParams


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
