"""Answers that another engine began."""

from __future__ import annotations

import pytest
from fakes import FakeExecutor, TimedExecutor, engine_config, expected_answer, make_request, run_to_end
from local import Models
from msgspec.structs import replace

from tailserve.engine.engine import Engine
from tailserve.engine.types import FinishReason


@pytest.mark.parametrize("count", [0, 1, 5, 7])
def test_an_answer_goes_on_behind_what_there_is_of_it(count: int) -> None:
    prompt, answer = [3, 1, 4, 1, 5], expected_answer([3, 1, 4, 1, 5], 8)
    engine = Engine(config := engine_config(), FakeExecutor(config))
    engine.add(make_request(prompt, id="r", max_tokens=8, carried=tuple(answer[:count])))
    answers = run_to_end(engine)
    assert answers.tokens["r"] == answer[count:]
    assert answers.ends["r"].finish_reason is FinishReason.LENGTH
    engine.check_integrity()


def test_no_more_of_the_prompt_is_cached_than_there_is() -> None:
    engine = Engine(config := engine_config(), FakeExecutor(config))
    prompt, answer = [3, 1, 4, 1, 5], expected_answer([3, 1, 4, 1, 5], 20)
    for name, carried in ("first", None), ("again", tuple(answer[:15])):
        engine.add(make_request(prompt, id=name, max_tokens=20, scope="s", carried=carried))
        answers = run_to_end(engine)
    assert answers.ends["again"].usage.cached_tokens == 5


@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_sampling_and_penalties_go_on_as_if_nothing_had_happened(tiny_llama: str, draft: str) -> None:
    models = Models(tiny_llama, num_blocks=100, block_size=8)
    fields = {
        "temperature": 0.9,
        "seed": 11,
        "frequency_penalty": 0.7,
        "repetition_penalty": 1.2,
        "min_tokens": 9,
        "top_p": 0.9,
    }
    request = make_request([5, 6, 7, 5, 6, 7, 5, 6], id="r", max_tokens=24, **fields)
    engine = models.engine()
    engine.add(request)
    whole = run_to_end(engine).tokens["r"]
    for count in (0, 3, 23):
        engine = models.engine(draft)
        engine.add(replace(request, carried=tuple(whole[:count])))
        assert run_to_end(engine).tokens["r"] == whole[count:]


def test_a_carried_request_is_not_late_for_the_time_that_its_first_instance_had() -> None:
    config = engine_config()
    executor = TimedExecutor(config, 0.01, 0.001)
    engine = Engine(config, executor, clock=lambda: executor.now)
    # A minute old: what is hopeless goes behind what is not.
    engine.add(make_request([1] * 20, id="carried", slo_class="critical", max_tokens=4, age_s=60.0, carried=(1, 2)))
    engine.add(make_request([2] * 20, id="new", slo_class="critical", max_tokens=4))
    order: list[str] = []
    while engine.has_work:
        order += [chunk.request_id for chunk in engine.step()]
    assert order[0] == "carried"
