import threading
from pathlib import Path

import msgspec
import pytest

from tailserve.deployments.channel import Channel, serve_channel
from tailserve.deployments.sockets import open_sockets


class Question(msgspec.Struct, frozen=True):
    number: int


class Answer(msgspec.Struct, frozen=True):
    number: int


@pytest.mark.parametrize("host", ["", "127.0.0.1"])
def test_questions_are_answered_until_it_is_over(tmp_path: Path, host: str) -> None:
    sockets = open_sockets(tmp_path, host)
    here: Channel[Question, Answer] = Channel(sockets.endpoint("channel"), Answer, bind=True, key=sockets.secret_key)
    over = threading.Event()
    thread = threading.Thread(
        target=serve_channel,
        args=(here.endpoint, Question, lambda question: Answer(question.number + 1)),
        kwargs={"alive": lambda: not over.is_set(), "key": sockets.public_key},
    )
    thread.start()
    assert here.wait_connected(10)
    for number in range(3):
        assert here.send(Question(number))
        assert here.receive(10) == Answer(number + 1)
    assert here.receive(0.0) is None
    over.set()
    thread.join(10)
    assert not thread.is_alive()
    here.close()


def test_a_message_to_nobody_is_refused(tmp_path: Path) -> None:
    channel: Channel[Question, Answer] = Channel(f"ipc://{tmp_path}/alone", Answer, bind=True)
    assert not channel.send(Question(1))
    assert not channel.wait_connected(0.0)
    channel.close()


def test_over_tcp_nobody_comes_in_without_the_key(tmp_path: Path) -> None:
    sockets = open_sockets(tmp_path, "127.0.0.1")
    here: Channel[Question, Answer] = Channel(sockets.endpoint("channel"), Answer, bind=True, key=sockets.secret_key)
    keys = b"", open_sockets(tmp_path, "-").public_key
    strangers = [Channel(here.endpoint, Question, bind=False, key=key) for key in keys]
    assert not here.wait_connected(0.5)
    guest: Channel[Answer, Question] = Channel(here.endpoint, Question, bind=False, key=sockets.public_key)
    assert here.wait_connected(10)
    for channel in (here, guest, *strangers):
        channel.close()


def test_what_is_not_of_the_declared_type_is_not_taken(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/junk"
    here: Channel[Question, Answer] = Channel(endpoint, Answer, bind=True)
    there: Channel[dict[str, str], Question] = Channel(endpoint, Question, bind=False)
    assert here.wait_connected(10)
    there.send({"number": "not a number"})
    with pytest.raises(msgspec.ValidationError):
        here.receive(10)
    here.close()
    there.close()
