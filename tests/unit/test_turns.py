"""Ids of what was said before."""

from tailserve.deployments.turns import BRANCHES, Turns


def test_a_history_is_found_by_its_text() -> None:
    turns = Turns()
    turns.keep("a", "hello", [1, 2])
    turns.keep("a", "hello there", [1, 2, 3])
    assert turns.find("a", "hello there, you") == ("hello there", (1, 2, 3))
    assert turns.find("a", "hell") == ("", ())
    assert turns.find("b", "hello there, you") == ("", ())
    assert turns.find(None, "hello there, you") == ("", ())


def test_an_answer_may_be_taken_again() -> None:
    turns = Turns()
    for number in range(BRANCHES + 1):
        turns.keep("a", f"hello {number}", [1, number])
    assert turns.find("a", "hello 4!") == ("hello 4", (1, 4))
    assert turns.find("a", "hello 0!") == ("", ())


def test_the_least_recently_continued_goes_first() -> None:
    turns = Turns(max_tokens=6)
    turns.keep("a", "one", [1, 2])
    turns.keep("b", "two", [1, 2])
    turns.keep("a", "one more", [1, 2, 3])
    turns.keep("c", "three", [1, 2])
    assert turns.find("b", "two")[1] == ()
    assert turns.find("a", "one more")[1] == (1, 2, 3)
    turns.drop("a")
    turns.drop("a")
    turns.keep("d", "four", [1, 2, 3, 4])
    assert turns.find("c", "three")[1] == (1, 2)
