"""Signals: asked once a loop may finish its step, asked twice it stops at once."""

from __future__ import annotations

import os
import signal

import pytest

from rlhf_cli.train.stopping import StopRequested, StopSignal

NUMBERS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.parametrize(("number", "status"), NUMBERS)
def test_outside_a_loop_a_signal_stops_at_once(number: signal.Signals, status: int):
    with StopSignal().installed(), pytest.raises(StopRequested) as stopped:
        os.kill(os.getpid(), number)
    assert stopped.value.exit_status == status


@pytest.mark.parametrize(("number", "status"), NUMBERS)
def test_inside_a_loop_the_first_signal_is_left_to_the_loop(number: signal.Signals, status: int):
    stop = StopSignal()
    with stop.installed(), stop.listening():
        os.kill(os.getpid(), number)
        assert stop.requested == number
        with pytest.raises(StopRequested):
            os.kill(os.getpid(), number)


def test_the_handlers_from_before_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal().installed():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stop_is_a_kind_of_keyboard_interrupt_so_that_nothing_swallows_it():
    assert issubclass(StopRequested, KeyboardInterrupt)
    assert not issubclass(StopRequested, Exception)
