"""Several chats at once on an engine, turn by turn."""

from __future__ import annotations

from fakes import Answers, make_request, run_to_end

from tailserve.engine.engine import Engine


def hold_chats(
    engine: Engine, openings: list[list[int]], *, turns: int, answer: int, question: int, vocab: int
) -> list[list[int]]:
    """All tokens of each chat: its opening, and by turns greedy answers of `answer` tokens and questions of `question`.

    Each is a session of its own. The blocks of all are accounted for after each turn.
    """
    chats = [list(tokens) for tokens in openings]
    for turn in range(turns):
        answers = Answers()
        for number, tokens in enumerate(chats):
            name = f"s{number}"
            engine.add(make_request(tokens, id=f"{name}.{turn}", max_tokens=answer, session_id=name, scope=name))
        run_to_end(engine, answers)
        engine.check_integrity()
        for number, tokens in enumerate(chats):
            tokens += answers.tokens[f"s{number}.{turn}"]
            tokens += [(7 * number + 5 * turn + 3 * n) % (vocab - 3) + 3 for n in range(question)]
    return chats
