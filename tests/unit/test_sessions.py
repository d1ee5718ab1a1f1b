import pytest

from tailserve.engine.sessions import sharing_scope


def test_strangers_share_nothing() -> None:
    assert sharing_scope() is None


def test_the_narrowest_name_decides() -> None:
    session = sharing_scope(session_id="a", prompt_cache_key="b", user="c")
    assert session == sharing_scope(session_id="a", user="other")
    assert sharing_scope(prompt_cache_key="b", user="c") == sharing_scope(prompt_cache_key="b")
    assert sharing_scope(tenant="t") is not None


@pytest.mark.parametrize(
    "other", [{"user": "a"}, {"session_id": "b"}, {"session_id": "a", "tenant": "t"}, {"session_id": "a", "cache_salt": "x"}]
)
def test_different_names_are_different_scopes(other: dict[str, str]) -> None:
    assert sharing_scope(session_id="a") != sharing_scope(**other)


@pytest.mark.parametrize("name", ["session_id", "prompt_cache_key", "user"])
def test_an_empty_name_is_not_everybodys(name: str) -> None:
    assert sharing_scope(**{name: ""}) is None
