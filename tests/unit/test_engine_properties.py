"""Random schedules of everything that can happen to an engine; whatever the order, nothing is lost and nothing leaks."""

from __future__ import annotations

from itertools import cycle

from fakes import Answers, FakeExecutor, InlineDrafter, engine_config, expected_answer, make_request, run_to_end
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tailserve.engine.engine import Engine
from tailserve.engine.types import FinishReason

# Few distinct beginnings and round lengths, so that prefixes are shared.
_prompts = st.builds(lambda seed, length: [(seed * n) % 6 for n in range(length)], st.integers(1, 2), st.integers(1, 40))
_add = st.tuples(
    st.just("add"),
    _prompts,
    st.integers(1, 20),
    st.sampled_from(["critical", "normal"]),
    st.sampled_from([None, "a", "b"]),
    st.sampled_from([None, "s", "t"]),
    st.sampled_from([None, None, 3.0, 12.0]),
)
_other = st.tuples(
    st.sampled_from(
        ["step", "step", "step", "abort", "wait", "delete", "crash", "carry", "draft dies", "draft returns", "mute"]
    )
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    actions=st.lists(st.one_of(_add, _other), min_size=10, max_size=80),
    drafts=st.booleans(),
    caching=st.booleans(),
    num_blocks=st.integers(16, 40),
    num_host_blocks=st.sampled_from([0, 3, 20]),
    move_s=st.sampled_from([0.0, 0.02]),
    moods=st.lists(st.booleans(), max_size=8),
)
def test_any_schedule(  # type: ignore[no-untyped-def]
    actions: list[tuple],  # type: ignore[type-arg]
    drafts: bool,
    caching: bool,
    num_blocks: int,
    num_host_blocks: int,
    move_s: float,
    moods: list[bool],
) -> None:
    """`moods`: whether drafting pays, one question after the other; without any, a class asks for three tokens."""
    config = engine_config(
        num_blocks=num_blocks,
        num_host_blocks=num_host_blocks,
        session_ttl_s=10.0,
        enable_prefix_caching=caching,
        max_num_batched_tokens=16,
        draft_branches=3,
    )
    if moods:
        classes = tuple(replace(slo, speculation="auto") for slo in config.classes)
        config = replace(config, classes=classes)
    now = 0.0
    executor, drafter = FakeExecutor(config), InlineDrafter()
    executor.move_s = move_s

    def clock() -> float:
        nonlocal now
        now += 0.001
        return now

    engine = Engine(config, executor, drafter if drafts else None, clock=clock)
    if moods:
        answer = cycle(moods)
        engine._policy.pays = lambda num_sequences: next(answer)  # type: ignore[method-assign]
    answers, requests = Answers(), {}
    said: dict[str, list[int]] = {}
    for action in actions:
        match action[0]:
            case "add":
                _, prompt, max_tokens, slo_class, scope, session_id, timeout_s = action
                # Who goes on in a session repeats what was said in it.
                prompt = (said.get(session_id, []) + prompt)[-50:] if session_id else prompt
                request = make_request(
                    prompt,
                    max_tokens=max_tokens,
                    slo_class=slo_class,
                    scope=session_id or scope,
                    session_id=session_id,
                    timeout_s=timeout_s,
                )
                if session_id:
                    said[session_id] = prompt
                requests[request.id] = request
                engine.add(request)
            case "step":
                answers.take(engine.step())
            case "abort" if requests:
                chunk = engine.abort(list(requests)[len(requests) // 2])
                answers.take([chunk] if chunk else [])
            case "carry" if requests:
                # As if another instance had made what there is.
                request_id = list(requests)[len(requests) // 2]
                if engine.abort(request_id) is not None:
                    request = requests.pop(request_id)
                    tokens = answers.tokens.pop(request_id, [])
                    carried = replace(request, id=f"{request_id}~", carried=(*(request.carried or ()), *tokens))
                    requests[carried.id] = carried
                    engine.add(carried)
            case "wait":
                now += 2.0
            case "delete":
                engine.drop_session("", "s")
                said.pop("s", None)
            case "crash":
                executor.fail_next = 1
            case "draft dies":
                drafter.dead = True
            case "draft returns":
                drafter.restart()
            case "mute":
                drafter.mute = not drafter.mute
        engine.check_integrity()
    run_to_end(engine, answers)
    engine.check_integrity()
    assert executor.num_rows == 0, "the verifier keeps rows of sequences that ended"
    assert engine.gauges().kv_cache_usage == 0.0
    assert answers.ends.keys() == requests.keys()
    for request_id, end in answers.ends.items():
        request = requests[request_id]
        tokens = [*(request.carried or ()), *answers.tokens.get(request_id, [])]
        assert tokens == expected_answer(request.prompt_token_ids, len(tokens))
        if end.finish_reason is FinishReason.LENGTH and end.stop_reason is None:
            assert len(tokens) == min(request.sampling.max_tokens, 64 - len(request.prompt_token_ids))
