import random
from pathlib import Path

import pytest
from edge import write_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from tailserve.deployments.openai import CompletionBody
from tailserve.deployments.responses import ResponseFormat, TextPosition
from tailserve.deployments.text import Detokenizer, StopStrings, TextModel
from tailserve.engine.errors import ConfigError, InvalidRequestError
from tailserve.engine.types import TokenLogprob


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return TextModel(write_tokenizer(tmp_path_factory.mktemp("text")))


def test_characters_are_never_split(text: TextModel) -> None:
    original = "naïve – 漢字 🙂👩‍👩‍👧 end"
    tokens = text.encode(original, add_special_tokens=False)
    source = random.Random(1)
    for _ in range(50):
        detokenizer, pieces, rest = Detokenizer(text.decode), [], list(tokens)
        while rest:
            size = source.randint(1, 4)
            pieces.append(detokenizer.push(rest[:size], final=len(rest) <= size))
            del rest[:size]
        assert "".join(pieces) == original
        assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_are_shown_in_the_end(text: TextModel) -> None:
    tokens = text.encode("é", add_special_tokens=False)
    detokenizer = Detokenizer(text.decode)
    assert detokenizer.push(tokens[:1]) == ""
    assert detokenizer.push([], final=True) == "\ufffd"
    detokenizer = Detokenizer(text.decode)
    assert "".join(detokenizer.push(tokens[:1]) for _ in range(20)).startswith("\ufffd")


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.randoms())
def test_stop_strings_are_found_wherever_the_pieces_end(text: str, stops: list[str], source: random.Random) -> None:
    checker, shown, found, rest = StopStrings(stops), "", None, text
    while found is None:
        size = source.randint(1, 3)
        piece, found = checker.push(rest[:size], final=len(rest) <= size)
        shown += piece
        rest = rest[size:]
        if not rest:
            break
    complete = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if not complete:
        assert (shown, found) == (text, None)
    else:
        _, begin, first = min(complete)
        assert (shown, found) == (text[:begin], first)


def test_broken_bytes_do_not_take_the_next_character_along(text: TextModel) -> None:
    alphabet = text.tokenizer.get_vocab()
    emoji = text.encode("\N{GRINNING FACE}ok", add_special_tokens=False)
    lone = [alphabet["ÿ"]]  # the byte 0xff
    detokenizer = Detokenizer(text.decode)
    pieces = [detokenizer.push([token]) for token in lone + emoji] + [detokenizer.push([], final=True)]
    assert "".join(pieces) == text.decode(lone + emoji) == "\ufffd\N{GRINNING FACE}ok"


def test_a_possible_stop_string_is_held_back() -> None:
    checker = StopStrings(["END"])
    assert checker.push("the E") == ("the ", None)
    assert checker.push("N") == ("", None)
    assert checker.push("ough") == ("ENough", None)
    assert checker.push("EN", final=True) == ("EN", None)


def test_token_bytes(text: TextModel) -> None:
    tokens = text.encode("é ", add_special_tokens=False)
    assert b"".join(text.token_bytes(token) for token in tokens) == "é ".encode()
    assert text.token_bytes(tokens[0]) == "é".encode()[:1]


def test_offsets_count_characters_once_they_are_whole() -> None:
    position = TextPosition()
    assert [position.advance(token) for token in (b"a", *(bytes([b]) for b in "\N{GRINNING FACE}".encode()), b"b")] == [
        0,
        1,
        1,
        1,
        1,
        2,
    ]


def test_templates_are_rendered_and_may_refuse(text: TextModel) -> None:
    assert text.render_chat([{"role": "user", "content": "hi"}]) == "<user>hi<assistant>"
    with pytest.raises(InvalidRequestError, match="system must be first"):
        text.render_chat([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}])


def test_templates_for_training_render_too(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path)
    template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{% if tools %}T{% endif %}"
    )
    (directory / "chat_template.jinja").write_text(template)
    assert TextModel(directory).render_chat([{"role": "user", "content": "hi"}]) == "hi"


def test_a_directory_without_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="save_pretrained"):
        TextModel(tmp_path)


def test_a_completion_keeps_the_space_in_front_of_its_first_word() -> None:
    """Decoders of SentencePiece's kind take the space off the first token of a text; these are in the middle of one."""
    tokenizer = Tokenizer(models.BPE(vocab={"\u2581is": 0, "\u2581Paris": 1, "Paris": 2}, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    detokenizer = Detokenizer(tokenizer.decode, [0])
    assert [detokenizer.push([1]), detokenizer.push([1]), detokenizer.push([2], final=True)] == [" Paris", " Paris", "Paris"]
    assert detokenizer.token_ids == [1, 1, 2]
    assert Detokenizer(tokenizer.decode).push([1], final=True) == "Paris"


def test_half_a_character_in_front_takes_nothing_along(text: TextModel) -> None:
    tokens = text.encode("éa", add_special_tokens=False)
    assert Detokenizer(text.decode, tokens[:1]).push(tokens[2:], final=True) == "a"


def test_parts_of_characters_are_told_apart(text: TextModel) -> None:
    first, second = text.encode("é", add_special_tokens=False)
    form = ResponseFormat("cmpl", "tiny", CompletionBody(prompt="a", logprobs=2), text)
    told = form.logprobs([TokenLogprob(first, -0.1, ((first, -0.1), (second, -3.0)))], TextPosition())
    assert told is not None
    assert told["top_logprobs"] == [{"bytes:\\xc3": -0.1, "bytes:\\xa9": -3.0}]
    assert told["tokens"] == ["bytes:\\xc3"]
