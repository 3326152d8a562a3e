"""A finished step is never done twice; a killed process damages nothing."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune2deploy.errors import ConfigError
from prune2deploy.journal import Journal, decode, encode


@dataclass(frozen=True)
class Inner:
    path: Path
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Outer:
    name: str
    low: float
    inner: Inner | None
    table: Mapping[str, tuple[int, ...]]
    pair: tuple[float, float]
    many: tuple[Inner, ...] = ()


VALUE = Outer(
    "x", 0.1, Inner(Path("a/b"), (1, 2)), {"p": (3, 4)}, (0.5, 1.5), (Inner(Path("c"), ()),)
)


def test_a_value_comes_back_equal_from_the_file(tmp_path):
    journal = Journal(tmp_path / "j")
    first = journal.once("step", Outer, lambda: VALUE)
    again = Journal(tmp_path / "j").once("step", Outer, lambda: pytest.fail("done twice"))
    assert first == again == VALUE


@given(
    st.text(),
    st.floats(allow_nan=False),
    st.lists(st.integers()),
    st.dictionaries(st.text(), st.lists(st.integers()).map(tuple)),
)
def test_any_value_survives_json(name, number, sizes, table):
    value = Outer(name, number, Inner(Path("x"), tuple(sizes)), table, (number, number))
    assert decode(Outer, json.loads(json.dumps(encode(value)))) == value


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_without_its_end_is_dropped_and_the_rest_kept(tmp_path, cut):
    path = tmp_path / "j"
    journal = Journal(path)
    journal.write("first", 1)
    journal.write("second", list(range(50)))
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(path)
    assert again.keys == ("first",)
    again.write("third", 3)
    assert Journal(path).keys == ("first", "third")


@pytest.mark.parametrize("damage", [b"{broken", b"\xff\xfe", b"\0\0\0\0", b"[1]"])
def test_a_damaged_middle_line_is_named(tmp_path, damage):
    path = tmp_path / "j"
    Journal(path).write("a", 1)
    path.write_bytes(damage + b"\n" + path.read_bytes())
    with pytest.raises(ConfigError, match=r"j:1: found a damaged line"):
        Journal(path)


def test_a_clock_that_is_set_meanwhile_changes_no_duration(tmp_path, monkeypatch):
    """Boards without a battery begin in 1970 until the network tells them the time."""
    journal = Journal(tmp_path / "j")
    journal.open_session()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 1e9)
    journal.write("a", 1)
    assert 0 <= journal.seconds() < 1e6
    monkeypatch.setattr(time, "time", lambda: real() - 1e9)
    journal.write("b", 1)
    assert 0 <= journal.seconds() < 1e6


def test_another_schema_is_refused(tmp_path):
    path = tmp_path / "j"
    path.write_text(json.dumps({"schema": 99, "key": "a", "time": 0, "value": 1}) + "\n")
    with pytest.raises(ConfigError, match="schema 99"):
        Journal(path)


def test_work_that_fails_leaves_no_record(tmp_path):
    journal = Journal(tmp_path / "j")
    with pytest.raises(ZeroDivisionError):
        journal.once("step", int, lambda: 1 // 0)
    assert "step" not in Journal(tmp_path / "j")


def test_only_plain_values_are_accepted():
    with pytest.raises(TypeError, match="a journal cannot hold object"):
        encode(object())


def test_time_between_sessions_is_not_counted(tmp_path):
    path = tmp_path / "j"
    records = [("session/0", 100), ("a", 110), ("b", 130), ("session/1", 9000), ("c", 9005)]
    path.write_text(
        "".join(
            json.dumps({"schema": 1, "key": k, "time": t, "value": 0}) + "\n" for k, t in records
        )
    )
    since_last = time.time() - 9005
    assert Journal(path).seconds() == pytest.approx(10 + 20 + 5 + since_last, abs=1)


def test_a_record_of_another_version_is_told(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.write("step", {"path": "a", "sizes": [1], "colour": "red"})
    with pytest.raises(ConfigError, match=r"'step' does not hold a Inner of this version"):
        journal.read("step", Inner)
