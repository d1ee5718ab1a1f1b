"""In CI a test that is skipped is a failure, unless it is on this list, with what it lacks."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

MAY_BE_SKIPPED = {
    "tests/unit/test_eagle.py": "a CPU with AVX512-VNNI",
    "tests/unit/test_int8.py": "a CPU with AVX512-VNNI",
}

_skipped: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        _skipped.append(report.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    unexpected = [name for name in _skipped if name.split("::")[0] not in MAY_BE_SKIPPED]
    if os.environ.get("CI") and unexpected:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\nskipped, and not on the list of tests/conftest.py: {', '.join(unexpected)}")
    return (yield)
