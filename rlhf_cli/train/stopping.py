"""Signals: the first one asks a training run to stop after its step, the second one stops at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequested(KeyboardInterrupt):
    """A signal ended the run; a kind of Ctrl-C, so that no handler of errors swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_status(self) -> int:
        """As shells report it: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


class StopSignal:
    """Turns SIGINT and SIGTERM into a request while a training loop listens, into `StopRequested` otherwise."""

    def __init__(self) -> None:
        self.requested: int | None = None
        self._listening = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if not self._listening or self.requested is not None:
            raise StopRequested(number)
        self.requested = number

    @contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Inside, the first signal is left in `requested` for the loop to act on."""
        before = self._listening
        self._listening = True
        try:
            yield self
        finally:
            self._listening = before

    @contextmanager
    def installed(self) -> Iterator[StopSignal]:
        """Handles the signals inside; the handlers from before are put back."""
        before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.requested = None


# One per process, as signals are.
STOP = StopSignal()
