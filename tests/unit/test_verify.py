import pytest

from tailserve.engine.speculation.verify import verify


@pytest.mark.parametrize(
    ("draft", "sampled", "tokens"),
    [
        ([], [4], [4]),
        ([1, 2, 3], [1, 2, 3, 9], [1, 2, 3, 9]),
        ([1, 2, 3], [1, 7, 3, 9], [1, 7]),
        ([1, 2, 3], [8, 2, 3, 9], [8]),
    ],
)
def test_the_good_prefix_stays_and_the_first_wrong_token_is_replaced(
    draft: list[int], sampled: list[int], tokens: list[int]
) -> None:
    assert verify(draft, sampled) == tokens
