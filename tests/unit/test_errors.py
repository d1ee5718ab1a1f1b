import inspect
import pickle

import pytest

from tailserve.deployments.http_answers import STATUS
from tailserve.engine import errors

ALL = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.TailserveError)]


@pytest.mark.parametrize("cls", ALL)
def test_every_exception_is_in_the_tree_and_has_a_status(cls: type[errors.TailserveError]) -> None:
    assert cls.__name__ in (errors.__doc__ or "")
    assert any(issubclass(cls, known) for known, _, _ in STATUS)


def test_errors_survive_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(errors.QueueFullError("full", retry_after_s=2.5, param="p")))
    assert (error.message, str(error), error.retry_after_s, error.param) == ("full", "full", 2.5, "p")
