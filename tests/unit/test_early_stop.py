"""When answers end though the model goes on. Tokens are words here, each with the space or newline before it."""

from __future__ import annotations

import math
import random
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from edge import Edge

from tailserve.cluster.early_stop import EarlyStopConfig
from tailserve.deployments.early_stop import EarlyStop

ESSAY = (
    "Gravity is a force between masses. It holds planets in their orbits, e.g. the Earth around the Sun. Dr. Newton wrote "
    "about it in 1687. The value of g is 9.81 metres per second squared. Einstein described it as a curve of space and time."
)


def run(config: EarlyStopConfig, text: str, ends: dict[int, float] | None = None) -> tuple[str, str | None]:
    """What is shown of a text, and why it ended early. `ends`: at which words the model would have ended, how likely."""
    early, shown, ids = EarlyStop(config), "", {}
    for place, word in enumerate(re.findall(r"\s*\S+", text)):
        token = ids.setdefault(word, len(ids))
        chance = (ends or {}).get(place, 1e-6)
        piece, reason = early.push(token, word, math.log(chance))
        shown += piece
        if reason:
            return shown, reason
    return shown, None


EVERYTHING = EarlyStopConfig(repetition=True, soft_max_tokens=1000, complete_above=0.5, closing=True)


def test_an_ordinary_text_is_left_alone() -> None:
    assert run(EVERYTHING, ESSAY) == (ESSAY, None)


def test_a_list_of_like_items_is_no_repetition() -> None:
    items = "\n".join(f"{n}. The {word} has a colour of its own and a name." for n, word in enumerate("abcdefghijklmnop"))
    assert run(EarlyStopConfig(repetition=True), items) == (items, None)


def test_what_goes_round_in_circles_ends() -> None:
    loop = " It is what it is, they say."
    shown, reason = run(EarlyStopConfig(repetition=True), ESSAY + loop * 50)
    assert reason == "repetition"
    assert shown.endswith(loop)
    assert len(shown) < len(ESSAY) + 7 * len(loop)
    assert run(EarlyStopConfig(), ESSAY + loop * 50)[1] is None


def test_a_word_again_and_again_ends() -> None:
    shown, reason = run(EarlyStopConfig(repetition=True), "Ha" + " ha" * 300)
    assert reason == "repetition"
    assert len(shown.split()) < 50


def test_a_line_again_and_again_ends_with_the_line() -> None:
    shown, reason = run(EarlyStopConfig(repetition=True), "A song\n" + "la la li lu lo\n" * 100)
    assert reason == "repetition"
    assert shown.endswith("lo\n")
    assert len(shown.split()) < 50


def test_a_long_cycle_ends_before_it_has_come_thrice() -> None:
    verse = " ".join(f"word{n}" for n in range(60)) + ". "
    shown, reason = run(EarlyStopConfig(repetition=True), verse * 5)
    assert reason == "repetition"
    assert shown == (verse * 2).rstrip()


def test_nearly_the_same_again_and_again_ends_with_its_sentence() -> None:
    chance = random.Random(0)
    sentences = [f" The {a} of the {b} is the best part of the whole {c} and everybody in the town knows it very well."
                 for a in ("colour", "shape") for b in ("house", "tree") for c in ("street", "garden")]  # fmt: skip
    shown, reason = run(EarlyStopConfig(repetition=True), "".join(chance.choice(sentences) for _ in range(100)))
    assert reason == "repetition"
    assert shown.endswith(".")
    assert len(shown.split()) < 700


def test_beyond_its_soft_length_an_answer_ends_with_its_sentence() -> None:
    shown, reason = run(EarlyStopConfig(soft_max_tokens=9), ESSAY)
    assert (reason, shown) == ("soft_length", ESSAY[: ESSAY.index(" Dr.")])


def test_code_is_not_cut() -> None:
    code = "Here it is:\n```python\nx = 1. \ny = 2\n\nprint(x + y)\n``` That is all. Good luck."
    shown, reason = run(EarlyStopConfig(soft_max_tokens=4), code)
    assert (reason, shown) == ("soft_length", code[: code.index(" Good")])


@pytest.mark.parametrize(("place", "chance", "stops"), [(18, 0.6, True), (18, 0.3, False), (12, 0.9, False)])
def test_a_complete_answer_ends_where_the_model_might_have(place: int, chance: float, stops: bool) -> None:
    """Word 18 is the first behind the second sentence, word 12 stands in its middle."""
    assert ESSAY.split()[18] == "Dr."
    shown, reason = run(EarlyStopConfig(complete_above=0.5, complete_min_tokens=5), ESSAY, {place: chance})
    assert (reason == "answer_complete") == stops
    if stops:
        assert shown == ESSAY[: ESSAY.index(" Dr.")]


def test_a_summary_that_goes_on_with_what_was_said_ends() -> None:
    text = ESSAY + " In summary, gravity matters. Gravity is a force between masses. It holds planets in their orbits."
    shown, reason = run(EarlyStopConfig(closing=True), text)
    assert reason == "closing_repeat"
    assert shown.endswith("between masses.")
    fresh = ESSAY + " In summary, gravity matters. There is a good book on it by Misner and others."
    assert run(EarlyStopConfig(closing=True), fresh) == (fresh, None)


@pytest.fixture(params=[{"repetition": True}])
async def edge(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Edge]:
    classes = [{"name": "normal", "priority": 10, "ttft_s": 5.0, "tpot_s": 0.2, "early_stop": request.param}]
    tiers = {"default": "normal"}
    settings = {"slo_classes": classes, "default_class": "normal", "urgent_class": "normal", "service_tiers": tiers}
    edge = Edge(tmp_path, settings=settings)
    await edge.open()
    yield edge
    await edge.settle()
    await edge.close()


@pytest.mark.parametrize(
    ("fields", "reason"), [({}, "repetition"), ({"early_stop": False}, None), ({"ignore_eos": True}, None)]
)
async def test_through_http(edge: Edge, fields: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fakes.next_token", lambda tokens: 40)
    answer = await edge.http.post("/v1/completions", json={"prompt": "ab", "max_tokens": 100} | fields)
    choice, usage = answer.json()["choices"][0], answer.json()["usage"]
    assert choice.get("stop_reason") == reason
    assert choice["finish_reason"] == ("stop" if reason else "length")
    assert usage["completion_tokens"] == (25 if reason else 100)


@pytest.mark.parametrize("edge", [{"soft_max_tokens": 5}], indirect=True)
async def test_below_min_tokens_nothing_ends_and_nothing_is_lost(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = edge.service._text.encode("So. ", add_special_tokens=False)
    monkeypatch.setattr("fakes.next_token", lambda tokens: pattern[(len(tokens) - 2) % 4])
    answer = await edge.http.post("/v1/completions", json={"prompt": "ab", "max_tokens": 60, "min_tokens": 21})
    choice = answer.json()["choices"][0]
    assert (choice["text"], choice["stop_reason"]) == ("So. " * 5 + "So.", "soft_length")
