"""Sequences in order of their keys."""

from __future__ import annotations

from bisect import bisect_left, insort

from tailserve.engine.sequence import Key, Sequence


def place_in_line(seq: Sequence) -> Key:
    """What a line is sorted by."""
    return seq.key


def enter(line: list[Sequence], seq: Sequence) -> None:
    insort(line, seq, key=place_in_line)


def leave(line: list[Sequence], seq: Sequence) -> None:
    """`seq` is in it, by the key that it has now."""
    del line[bisect_left(line, seq.key, key=place_in_line)]


def begin_of_level(line: list[Sequence], level: int) -> int:
    """Index of the first sequence that is of `level` or behind it."""
    return bisect_left(line, Key(level, late=False, tag=float("-inf"), number=-1), key=place_in_line)


def begin_of_late(line: list[Sequence], level: int) -> int:
    """Index of the first sequence of `level` that is late, or of what is behind it."""
    return bisect_left(line, Key(level, late=True, tag=float("-inf"), number=-1), key=place_in_line)


def is_in(line: list[Sequence], seq: Sequence) -> bool:
    index = bisect_left(line, seq.key, key=place_in_line)
    return index < len(line) and line[index] is seq


def of_level(line: list[Sequence], level: int) -> list[Sequence]:
    return line[begin_of_level(line, level) : begin_of_level(line, level + 1)]


def levels(*lines: list[Sequence]) -> list[int]:
    """Those of all lines, most urgent first."""
    found = set()
    for line in lines:
        index = 0
        while index < len(line):
            found.add(level := line[index].key.level)
            index = begin_of_level(line, level + 1)
    return sorted(found)
