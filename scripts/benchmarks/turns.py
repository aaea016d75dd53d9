"""Two sides in turns: A B A B in one process, a ratio for each pair, the median of the ratios."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

Clock = Callable[[], float]


class Peer(Protocol):
    """What is measured beside us."""

    def run(self, num_steps: int, between: Callable[[float], None]) -> None:
        """Makes the steps; after each, `between` is called with its seconds, in no step's time."""
        ...


@dataclass
class Pairs:
    """Seconds of both sides, pair by pair; the warm-up's are not here."""

    peer_s: list[float] = field(default_factory=list)
    ours_s: list[float] = field(default_factory=list)
    ceiling: list[float] = field(default_factory=list)  # GFLOP/s of matrix products, right after

    @property
    def ratios(self) -> list[float]:
        """Peer / ours of each pair: above 1 where ours is faster."""
        return [peer / ours for peer, ours in zip(self.peer_s, self.ours_s, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of the ratios.

        >>> Pairs([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]).ratio
        3.0
        """
        return statistics.median(self.ratios)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **{name: value for name, value in asdict(self).items() if value},
            "ratios": self.ratios,
            "median_peer_s": statistics.median(self.peer_s),
            "median_ours_s": statistics.median(self.ours_s),
            "ratio": self.ratio,
        }


class FunctionPeer:
    """A peer that is a function."""

    def __init__(self, function: Callable[[], object], clock: Clock) -> None:
        self.function = function
        self.clock = clock

    def run(self, num_steps: int, between: Callable[[float], None]) -> None:
        """Calls it `num_steps` times."""
        for _ in range(num_steps):
            between(seconds(self.function, self.clock))


def seconds(function: Callable[[], object], clock: Clock) -> float:
    """Of one call."""
    started = clock()
    function()
    return clock() - started


def times(function: Callable[[], object], clock: Clock, warm_up: int, runs: int) -> list[float]:
    """Seconds of each of `runs` calls after `warm_up` calls."""
    for _ in range(warm_up):
        function()
    return [seconds(function, clock) for _ in range(runs)]


def peer_times(peer: Peer, warm_up: int, runs: int) -> list[float]:
    """Seconds of a peer's steps alone."""
    found: list[float] = []
    peer.run(warm_up + runs, found.append)
    return found[warm_up:]


def in_turns(
    peer: Peer,
    ours: Callable[[], object],
    clock: Clock,
    warm_up: int,
    pairs: int,
    ceiling: Callable[[], float] | None = None,
) -> Pairs:
    """The peer's step, ours, the peer's, ours ...; the first `warm_up` pairs are made and forgotten.

    What the machine can do is measured in every turn, because it is not the same from one minute to the next.
    """
    result, count = Pairs(), 0

    def between(peer_s: float) -> None:
        nonlocal count
        ours_s = seconds(ours, clock)
        count += 1
        if count > warm_up:
            result.peer_s.append(peer_s)
            result.ours_s.append(ours_s)
            if ceiling is not None:
                result.ceiling.append(ceiling())

    peer.run(warm_up + pairs, between)
    assert len(result.peer_s) == pairs, (len(result.peer_s), pairs)
    return result


def median_of_rows(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of every figure.

    >>> median_of_rows([{"a": 1.0}, {"a": 5.0}, {"a": 2.0}])
    {'a': 2.0}
    """
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}
