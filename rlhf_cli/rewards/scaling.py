"""What happens to a reward before a policy learns from it: mean 0 and standard deviation 1, then a clip.

    R' = clip((R - mean) / std, -c, c)

Mean and std are frozen, or those of all rewards seen so far (Welford 1962; merged batch by batch as in Chan, Golub and
LeVeque 1983, eq. 2.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from rlhf_cli.types import Scores

# A spread below this share of the mean's size is what rounding leaves of equal rewards.
_NOTHING = 1e-6


@dataclass(frozen=True)
class Moments:
    """Count, mean and summed squared deviation of numbers, in float64."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Those of a batch [n].

        >>> Moments.of(Tensor([1.0, 3.0]))
        Moments(count=2, mean=2.0, m2=2.0)
        """
        if not len(values):
            return cls()
        exact = values.detach().cpu().double()
        mean = exact.mean()
        return cls(len(exact), float(mean), float((exact - mean).square().sum()))

    def merged(self, other: Moments) -> Moments:
        """Those of the numbers of both together.

        >>> Moments.of(Tensor([1.0])).merged(Moments.of(Tensor([3.0])))
        Moments(count=2, mean=2.0, m2=2.0)
        """
        count = self.count + other.count
        if not count:
            return self
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * other.count / count,
            self.m2 + other.m2 + delta * delta * self.count * other.count / count,
        )

    @property
    def std(self) -> float:
        """Standard deviation of the numbers themselves (not of a population they are drawn from); 0 of equal ones."""
        std = (self.m2 / self.count) ** 0.5 if self.count else 0.0
        return std if std > _NOTHING * max(1.0, abs(self.mean)) else 0.0


class RewardScaling:
    """Normalisation and clip of a policy's rewards; a running one moves with what it `see`s."""

    def __init__(self, moments: Moments | None, clip: float | None, is_running: bool = False) -> None:
        """`moments`: what is normalised by, or where a running one starts; None = not normalised."""
        self.moments = moments
        self.clip = clip
        self.is_running = is_running

    def see(self, reward: Tensor) -> None:
        """The rewards [n] of a batch to train on, of all processes, come to the running moments; else nothing."""
        if self.is_running:
            assert self.moments is not None
            self.moments = self.moments.merged(Moments.of(reward))

    def __call__(self, scores: Scores) -> Scores:
        """The same scores with the reward that is learned from, and what share of it was `clipped`.

        While all rewards so far are equal, only their mean is subtracted.
        """
        reward = scores.reward
        if self.moments is not None:
            reward = ((reward.double() - self.moments.mean) / (self.moments.std or 1.0)).float()
        if self.clip is None:
            return replace(scores, reward=reward)
        clipped = (reward.abs() > self.clip).float()
        return replace(scores, reward=reward.clamp(-self.clip, self.clip), clipped=clipped)

    def metrics(self) -> dict[str, float]:
        """What is subtracted and divided by."""
        if self.moments is None:
            return {}
        return {"reward/norm_mean": self.moments.mean, "reward/norm_std": self.moments.std}

    def state(self) -> dict[str, float]:
        """What a checkpoint has of it, as JSON; nothing where all follows from the config."""
        return asdict(self.moments) if self.is_running and self.moments is not None else {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Takes up a `state`."""
        if self.is_running:
            self.moments = Moments(int(state["count"]), float(state["mean"]), float(state["m2"]))
