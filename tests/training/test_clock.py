"""Phases add up to the time that has passed, and exchanges are counted once."""

import pytest

from codiemb.training import clock
from codiemb.training.clock import PHASES, Clock, seconds_by_phase


@pytest.fixture
def at(monkeypatch):
    """A time to be set by hand, and the seconds spent on exchanges."""
    state = {"now": 0.0, "exchanged": 0.0}
    monkeypatch.setattr(clock, "_now", lambda: state["now"])
    monkeypatch.setattr(clock, "exchange_seconds", lambda: state["exchanged"])
    return state


def test_phases_worked_out_by_hand(at):
    """5 s of no phase; forward 2 and 3; loss 4, of which 1.5 an exchange; the next step begins where this one ends."""
    timed = Clock()
    at["now"] = 5.0
    timed.start()
    at["now"] = 7.0
    timed.mark("forward")
    at.update(now=11.0, exchanged=1.5)
    timed.mark("loss")
    at["now"] = 14.0
    timed.mark("forward")
    expected = dict.fromkeys(PHASES, 0.0) | {"forward": 5.0, "loss": 2.5, "communication": 1.5}
    assert seconds_by_phase(timed.take()) == expected
    at["now"] = 15.0
    timed.mark("data")
    assert seconds_by_phase(timed.take())["data"] == 1.0
