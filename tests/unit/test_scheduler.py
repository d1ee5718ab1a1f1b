import pytest
from fakes import Answers, FakeExecutor, InlineDrafter, engine_config, expected_answer, make_request, run_to_end

from tailserve.engine.engine import Engine
from tailserve.engine.errors import ExecutorLostError, InvalidRequestError
from tailserve.engine.types import FinishReason, StepResult


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_engine(drafter: InlineDrafter | None = None, **config: object) -> tuple[Engine, FakeExecutor, Clock]:
    settings = engine_config(**config)
    executor, clock = FakeExecutor(settings), Clock()
    return Engine(settings, executor, drafter, clock=clock), executor, clock


def test_a_long_prompt_runs_in_chunks_and_answers_as_a_whole_one() -> None:
    engine, executor, _ = make_engine(max_num_batched_tokens=10)
    prompt = list(range(1, 38))
    request = make_request(prompt)
    engine.add(request)
    answers = run_to_end(engine)
    assert [batch.lengths for batch in executor.batches[:4]] == [[10], [10], [10], [7]]
    assert answers.tokens[request.id] == expected_answer(prompt, 8)


def test_a_request_joins_while_others_run_and_generating_ones_never_wait_for_its_prompt() -> None:
    engine, executor, _ = make_engine(max_num_batched_tokens=8)
    first = make_request([1, 2, 3], max_tokens=12)
    engine.add(first)
    engine.step()
    engine.add(make_request(list(range(20)), max_tokens=2))
    answers = Answers()
    for _ in range(3):
        answers.take(engine.step())
        assert len(answers.tokens[first.id]) == len(executor.batches) - 1
        assert sum(executor.batches[-1].lengths) <= 8
    run_to_end(engine, answers)


def test_a_critical_request_goes_first_in_line() -> None:
    engine, executor, _ = make_engine(max_num_seqs=1)
    engine.add(make_request([1], max_tokens=1))
    late = make_request([2, 3], max_tokens=1, slo_class="critical")
    engine.add(late)
    assert [chunk.request_id for chunk in engine.step()] == [late.id]


def test_a_critical_request_takes_a_slot_and_the_displaced_one_completes() -> None:
    engine, _, _ = make_engine(max_num_seqs=2)
    normal = [make_request([n, n + 1], max_tokens=20) for n in range(2)]
    for request in normal:
        engine.add(request)
    answers = Answers()
    for _ in range(3):
        answers.take(engine.step())
    critical = make_request([9, 9, 9], max_tokens=3, slo_class="critical")
    engine.add(critical)
    answers.take(engine.step())
    assert len(answers.tokens[critical.id]) == 1, "no first token in the step after its arrival"
    assert engine.stats.preemptions == 1
    run_to_end(engine, answers)
    for request in normal:
        assert answers.tokens[request.id] == expected_answer(request.prompt_token_ids, 20)


def test_requests_of_one_class_do_not_displace_each_other() -> None:
    engine, _, _ = make_engine(max_num_seqs=1)
    for n in range(3):
        engine.add(make_request([n], max_tokens=5))
    run_to_end(engine)
    assert engine.stats.preemptions == 0


def test_out_of_blocks_the_latest_yields_and_resumes_from_the_cache() -> None:
    engine, _, _ = make_engine(num_blocks=16, max_num_seqs=2)
    requests = [make_request([n] * 20, max_tokens=30) for n in (1, 2)]
    for request in requests:
        engine.add(request)
    answers = run_to_end(engine)
    assert engine.stats.preemptions > 0
    assert engine.stats.prefix_cache_hits > 0, "the displaced sequence recomputed what the cache still had"
    for request in requests:
        assert answers.tokens[request.id] == expected_answer(request.prompt_token_ids, 30)
    engine.check_integrity()


def test_a_second_turn_reuses_the_first_and_a_stranger_does_not() -> None:
    engine, _, _ = make_engine()
    prompt = list(range(13))
    first = make_request(prompt, scope="s", max_tokens=4)
    engine.add(first)
    turn = prompt + run_to_end(engine).tokens[first.id] + [5, 6]
    for scope, cached in (("s", 16), ("other", 0), (None, 0)):
        again = make_request(turn, scope=scope, max_tokens=4)
        engine.add(again)
        answers = run_to_end(engine)
        assert answers.tokens[again.id] == expected_answer(turn, 4)
        assert answers.ends[again.id].usage.cached_tokens == cached


def test_abort_frees_at_once() -> None:
    engine, _, _ = make_engine()
    request = make_request([1, 2, 3])
    engine.add(request)
    engine.step()
    chunk = engine.abort(request.id)
    assert chunk is not None
    assert chunk.finish_reason is FinishReason.ABORT
    assert engine.scheduler.residency.pool.num_free == 32
    assert engine.abort(request.id) is None
    run_to_end(engine)
    engine.check_integrity()


def test_a_request_past_its_deadline_ends_with_what_it_has() -> None:
    engine, _, clock = make_engine()
    request = make_request([1, 2, 3], max_tokens=50, timeout_s=1.0, age_s=0.4)
    engine.add(request)
    answers = Answers()
    answers.take(engine.step())
    clock.now = 0.7
    answers.take(engine.step())
    end = answers.ends[request.id]
    assert (end.finish_reason, end.stop_reason) == (FinishReason.LENGTH, "deadline")
    assert answers.tokens[request.id] == expected_answer([1, 2, 3], 1)


@pytest.mark.parametrize("oracle", [True, False])
def test_drafts_change_nothing_but_the_number_of_steps(oracle: bool) -> None:
    plain, plain_executor, _ = make_engine()
    drafted, executor, _ = make_engine(InlineDrafter(oracle=oracle))
    prompts = [[3, 1, 4, 1, 5], [2, 7] * 6, [1]]
    requests = [make_request(prompt, max_tokens=25) for prompt in prompts]
    for engine in (plain, drafted):
        for request in requests:
            engine.add(request)
    assert run_to_end(drafted).tokens == run_to_end(plain).tokens
    drafted.check_integrity()
    if oracle:
        assert len(executor.batches) < len(plain_executor.batches) / 2
        assert drafted.stats.accepted_draft_tokens == drafted.stats.draft_tokens


def test_drafts_never_take_a_request_past_its_limits() -> None:
    engine, executor, _ = make_engine(InlineDrafter(oracle=True))
    request = make_request([1, 2, 3], max_tokens=6)
    engine.add(request)
    answers = run_to_end(engine)
    assert len(answers.tokens[request.id]) == 6
    assert answers.ends[request.id].usage.rejected_draft_tokens == 0
    long = make_request([1] * 60, max_tokens=50)
    engine.add(long)
    answers = run_to_end(engine)
    assert len(answers.tokens[long.id]) == 4, "64 tokens of context, 60 of prompt"


def test_a_class_without_speculation_gets_no_drafts() -> None:
    from fakes import CRITICAL, NORMAL
    from msgspec.structs import replace

    engine, executor, _ = make_engine(InlineDrafter(oracle=True), classes=(CRITICAL, replace(NORMAL, speculation="off")))
    engine.add(make_request([1, 2, 3]))
    run_to_end(engine)
    assert not any(batch.drafts for batch in executor.batches)


def test_a_lost_executor_costs_no_token() -> None:
    engine, executor, _ = make_engine(InlineDrafter())
    requests = [make_request([n, 5, 6, 7, 8], max_tokens=20) for n in range(6)]
    for request in requests:
        engine.add(request)
    answers = Answers()
    for _ in range(5):
        answers.take(engine.step())
    executor.fail_next = 1
    run_to_end(engine, answers)
    assert executor.restarts == 1
    for request in requests:
        assert answers.tokens[request.id] == expected_answer(request.prompt_token_ids, 20)
    engine.check_integrity()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"slo_class": "gold"}, "unknown SLO class 'gold'"),
        ({"prompt": [1] * 64}, "64 tokens; the context holds 64"),
        ({"prompt": []}, "0 tokens"),
    ],
)
def test_what_can_never_run_is_refused(fields: dict[str, object], match: str) -> None:
    engine, _, _ = make_engine()
    with pytest.raises(InvalidRequestError, match=match):
        engine.add(make_request(fields.pop("prompt", [1]), **fields))  # type: ignore[arg-type]


def test_a_steps_message_does_not_grow_with_the_context() -> None:
    import msgspec

    engine, executor, _ = make_engine(max_model_len=2048, num_blocks=1024, max_num_batched_tokens=2048)
    sizes = []
    for length in (16, 1600):
        engine.add(make_request([1] * length, max_tokens=12))
        run_to_end(engine)
        # A step in mid-answer that needs no block.
        quiet = [batch for batch in executor.batches[-9:] if batch.rows and not batch.new_blocks and not batch.joins]
        sizes.append(min(len(msgspec.msgpack.encode(batch)) for batch in quiet))
    assert abs(sizes[1] - sizes[0]) <= 8


def test_an_executor_that_is_lost_again_and_again_ends_its_requests_instead_of_going_on_for_ever() -> None:
    engine, executor, _ = make_engine()
    request = make_request([1, 2, 3])
    engine.add(request)
    executor.fail_next = 100
    answers = run_to_end(engine, max_steps=10)
    assert answers.ends[request.id].finish_reason is FinishReason.ERROR
    assert "3 times while this ran" in (answers.ends[request.id].error or "")
    executor.fail_next = 0
    after = make_request([1, 2, 3])
    engine.add(after)
    assert run_to_end(engine).tokens[after.id] == expected_answer([1, 2, 3], 8)


def test_an_executor_that_dies_while_idle_is_restarted_before_the_next_request() -> None:
    engine, executor, _ = make_engine()
    for restarts in range(1, 3):
        executor.lost = True
        assert engine.executor_lost
        assert engine.step() == []
        assert executor.restarts == restarts
    # Neither is a later request's fault.
    request = make_request([1, 2, 3])
    engine.add(request)
    executor.fail_next = 1
    assert run_to_end(engine).tokens[request.id] == expected_answer([1, 2, 3], 8)


def test_an_executor_that_cannot_be_restarted_is_said_to_be_broken() -> None:
    engine, executor, _ = make_engine()

    def restart() -> None:
        raise ExecutorLostError("no GPU left")

    executor.restart = restart  # type: ignore[method-assign]
    request = make_request([1])
    engine.add(request)
    executor.fail_next = 1
    assert run_to_end(engine).ends[request.id].error == "no GPU left"
    assert engine.broken


def test_a_draft_does_not_take_the_block_that_somebody_needs() -> None:
    engine, executor, _ = make_engine(InlineDrafter(oracle=True), num_blocks=16, max_num_seqs=2, max_num_batched_tokens=64)
    # After their prompts 15 of 16 blocks are held. The first's draft could use the last one, the second's next token must.
    engine.add(make_request([1] * 31, max_tokens=20))
    engine.add(make_request([2] * 28, max_tokens=20))
    engine.step()
    engine.step()
    assert len(executor.batches[-1].rows) == 2
    assert engine.stats.preemptions == 0


def test_nobody_is_displaced_in_vain() -> None:
    engine, _, _ = make_engine(num_blocks=16, max_num_seqs=3)
    engine.add(make_request([1] * 30, max_tokens=30, slo_class="critical"))
    engine.add(make_request([2] * 8, max_tokens=4))
    engine.step()
    engine.add(make_request([3] * 40, max_tokens=4, slo_class="critical"))
    engine.step()
    assert engine.stats.preemptions == 0


def test_drafts_behind_a_stop_token_do_not_count_as_accepted() -> None:
    engine, _, _ = make_engine(InlineDrafter(oracle=True))
    answer = expected_answer([3, 1, 4, 1], 4)
    assert answer[2] not in answer[:2]
    request = make_request([3, 1, 4, 1], max_tokens=20, stop_token_ids=(answer[2],))
    engine.add(request)
    answers = run_to_end(engine)
    assert answers.tokens[request.id] == answer[:3]
    assert answers.ends[request.id].usage.accepted_draft_tokens == 2


def test_the_next_step_is_there_before_the_one_that_runs_has_ended() -> None:
    engine, executor, clock = make_engine()
    executor.seconds = 1.0
    request = make_request([1, 2, 3], max_tokens=6)
    engine.add(request)
    answers = Answers()
    answers.take(engine.step())
    # How long a step takes is known now: the next is not scheduled until that is nearly over.
    late = make_request([4, 5], max_tokens=3)
    for _ in range(2):
        assert engine.step() == []
        assert len(executor.waiting) == 1
        clock.now += 0.4
    engine.add(late)
    clock.now += 0.199
    answers.take(engine.step())
    assert [len(batch.rows) for batch in executor.batches[1:]] == [1, 2]
    while engine.has_work:
        clock.now += 1.0
        answers.take(engine.step())
    assert answers.tokens == {r.id: expected_answer(r.prompt_token_ids, r.sampling.max_tokens) for r in (request, late)}
    assert sum(bool(batch.rows) for batch in executor.batches) == 6, "a step for a sequence that was sure to end"


def test_what_runs_behind_the_end_of_a_sequence_is_dropped() -> None:
    engine, executor, _ = make_engine(enable_prefix_caching=True)
    prompt = [1, 2, 3]
    end = expected_answer(prompt, 5)[-1]
    request = make_request(prompt, max_tokens=20, eos_token_ids=(end,), scope="s")
    engine.add(request)
    answers = run_to_end(engine)
    assert answers.tokens[request.id] == expected_answer(prompt, 20)[: expected_answer(prompt, 20).index(end) + 1]
    engine.check_integrity()
    assert executor.num_rows == 0


def test_prompt_chunks_are_short_while_others_generate() -> None:
    engine, executor, _ = make_engine(max_mixed_tokens=7)
    engine.add(make_request([1, 2, 3], max_tokens=12))
    engine.step()
    long = make_request(list(range(40)), max_tokens=1)
    engine.add(long)
    answers = run_to_end(engine)
    chunks = [batch.lengths[1] for batch in executor.batches if len(batch.lengths) > 1]
    assert chunks[:2] == [6, 6]
    assert sum(chunks) == 40
    assert answers.tokens[long.id] == expected_answer(list(range(40)), 1)
    count = len(executor.batches)
    engine.add(make_request(list(range(1, 40)), max_tokens=1))
    run_to_end(engine)
    assert executor.batches[count].lengths == [32]


def test_a_sequence_that_is_about_to_end_is_not_displaced() -> None:
    engine, executor, clock = make_engine(max_num_seqs=1)
    executor.seconds = 1.0
    normal = make_request([1, 2, 3], max_tokens=3)
    engine.add(normal)
    answers = Answers()
    answers.take(engine.step())
    while len(answers.tokens[normal.id]) < 2:
        answers.take(engine.step())
        clock.now += 0.5
    assert engine.step() == []
    urgent = make_request([4, 5], max_tokens=2, slo_class="critical")
    engine.add(urgent)
    clock.now += 0.999
    while engine.has_work:
        answers.take(engine.step())
        clock.now += 1.0
    assert answers.tokens == {r.id: expected_answer(r.prompt_token_ids, r.sampling.max_tokens) for r in (normal, urgent)}
    assert engine.stats.preemptions == 0


def test_a_request_that_kills_the_verifier_again_and_again_ends_whatever_is_done_between() -> None:
    engine, executor, _ = make_engine(max_num_batched_tokens=8)
    poll, done = executor.poll, [0]

    def killed_at_its_third_chunk(timeout_s: float | None = None) -> StepResult | None:
        if executor.waiting[0].lengths and done[0] == 2:
            done[0] = 0
            raise ExecutorLostError("out of memory")
        done[0] += 1
        return poll(timeout_s)

    executor.poll = killed_at_its_third_chunk  # type: ignore[method-assign]
    request = make_request(list(range(1, 30)))
    engine.add(request)
    answers = run_to_end(engine, max_steps=30)
    assert "3 times while this ran: out of memory" in (answers.ends[request.id].error or "")
    assert executor.restarts == 3


def test_a_request_carried_on_where_the_context_is_shorter_ends_with_what_it_has() -> None:
    engine, _, _ = make_engine()
    request = make_request(list(range(1, 31)), max_tokens=40, carried=tuple(range(34)))
    engine.add(request)
    assert run_to_end(engine).ends[request.id].finish_reason is FinishReason.LENGTH
