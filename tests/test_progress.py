"""Progress where there is no terminal: lines in good time, and silence where it is asked for."""

from __future__ import annotations

import logging
import re
import time
from typing import Any

import pytest

from proxsparse.progress import Progress, duration, progress


def test_lines_say_where_a_loop_is(capfd: Any) -> None:
    with Progress("learning", 8, unit="step", done=2, leave=True, every=0.05) as bar:
        bar.update(2, loss="0.5", groups_at_2to4="90%")
        time.sleep(0.2)  # no update: a long step
        bar.update(4)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) >= 3
    form = r"learning: step 4/8, loss 0.5, groups at 2:4 90%, ETA \d+ s"
    assert all(re.fullmatch(form, line) for line in lines[:-1])
    assert re.fullmatch(r"learning: step 8/8, loss 0.5, groups at 2:4 90%, took \d+ s", lines[-1])


def test_a_short_loop_says_nothing(capfd: Any) -> None:
    assert list(progress(range(3), "blocks")) == [0, 1, 2]
    assert list(progress(iter("ab"), "letters")) == ["a", "b"]
    assert capfd.readouterr().err == ""


def test_an_error_ends_the_lines(capfd: Any) -> None:
    with pytest.raises(KeyError), Progress("x", 2, leave=True, every=0.01):
        raise KeyError
    before = capfd.readouterr().err
    time.sleep(0.05)
    assert "took" not in before and capfd.readouterr().err == ""


@pytest.mark.parametrize("how", ["hidden", "level", "environment"])
def test_it_can_be_silenced(monkeypatch: Any, capfd: Any, how: str) -> None:
    logger = logging.getLogger("proxsparse.progress")
    if how == "level":
        monkeypatch.setattr(logger, "level", logging.WARNING)
    if how == "environment":
        monkeypatch.setenv("TQDM_DISABLE", "1")
    with Progress("x", 2, leave=True, is_hidden=how == "hidden", every=0.01):
        time.sleep(0.05)
    assert capfd.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress("learning", 2, unit="step", leave=True) as bar:
        bar.update(2, loss="0.5")
    text = capfd.readouterr().err
    assert "2/2" in text and "loss=0.5" in text and "took" not in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
