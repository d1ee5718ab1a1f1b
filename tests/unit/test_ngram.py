from msgspec.structs import replace

from tailserve.engine.speculation.drafter import DraftRow, DraftWork
from tailserve.engine.speculation.ngram import NgramDrafter


def propose(drafter: NgramDrafter, row: DraftRow, num_tokens: int = 3) -> list[int]:
    result = drafter.run(DraftWork(0, 0, [replace(row, num_tokens=num_tokens)], []))
    return result.drafts[row.row].token_ids if row.row in result.drafts else []


def test_what_followed_the_last_occurrence_is_proposed() -> None:
    assert propose(NgramDrafter(), DraftRow(1, 0, [5, 6, 7, 8, 1, 5, 6], 3)) == [7, 8, 1]
    assert propose(NgramDrafter(), DraftRow(1, 0, [5, 6, 7, 5, 6, 9, 5, 6], 3)) == [9, 5, 6]


def test_a_longer_match_wins() -> None:
    assert propose(NgramDrafter(), DraftRow(1, 0, [1, 2, 3, 8, 9, 2, 3, 7, 1, 2, 3], 3)) == [8, 9, 2]


def test_nothing_is_proposed_without_a_match() -> None:
    assert propose(NgramDrafter(), DraftRow(1, 0, [1, 2, 3], 3)) == []
    assert propose(NgramDrafter(), DraftRow(1, 0, [1], 3)) == []


def test_rows_grow_by_deltas_and_drop_what_no_longer_holds() -> None:
    drafter = NgramDrafter()
    assert propose(drafter, DraftRow(1, 0, [1, 2, 3, 4], 3)) == []
    assert propose(drafter, DraftRow(1, 4, [1, 2], 3)) == [3, 4, 1]
    assert propose(drafter, DraftRow(1, 2, [9, 1, 2], 3)) == [9, 1, 2]


def test_rows_that_leave_are_forgotten() -> None:
    drafter = NgramDrafter()
    propose(drafter, DraftRow(1, 0, [1, 2, 3, 1, 2], 3))
    drafter.run(DraftWork(1, 1, [], [1]))
    assert propose(drafter, DraftRow(1, 0, [1, 2], 3)) == []
