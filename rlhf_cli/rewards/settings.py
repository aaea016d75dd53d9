"""Group `rm`: the settings of each kind of reward model. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import ClassVar

from rlhf_cli.errors import bad_value
from rlhf_cli.models.settings import ModelSettings, PeftSettings
from rlhf_cli.settings import GradeLoss, ReadOut, TrainSettings


class RmInit(Enum):
    """What a reward model starts from."""

    auto = "auto"  # the SFT model where rm.model is the policy's backbone, else rm.model
    sft = "sft"
    backbone = "backbone"


class Standardize(Enum):
    """What a reward is scaled by."""

    sft_samples = "sft_samples"
    none = "none"


class MemberKind(Enum):
    """What each of several reward models is."""

    scalar = "scalar"
    distributional = "distributional"


class Selection(Enum):
    """Which members are merged; all are ranked on the validation pairs, the best first."""

    all = "all"
    greedy = "greedy"


@dataclass
class RmConfig:
    """What every reward model has."""

    has_members: ClassVar[bool] = False

    name: str = ""
    path: str | None = None
    seed: int = 0
    init: RmInit = RmInit.auto
    append_eos: bool = True
    label_swap_rate: float = 0.0
    label_swap_seed: int = 0
    probe_steps: int = 0
    probe_lr: float = 1e-2
    dropout: float | None = None
    calibrate: bool = True
    standardize: Standardize = Standardize.sft_samples
    standardize_samples: int = 256
    noise: float = 0.0
    model: ModelSettings = field(default_factory=ModelSettings)
    peft: PeftSettings = field(default_factory=PeftSettings)
    train: TrainSettings = field(default_factory=TrainSettings)

    @property
    def num_labels(self) -> int:
        """Outputs of the classifier."""
        return 1

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        for key in ("seed", "label_swap_seed"):
            if not 0 <= getattr(self, key) < 2**63:
                raise bad_value(f"rm.{key}", getattr(self, key), "a whole number >= 0, below 2^63")
        self.peft.check("rm.peft")
        if not 0.0 <= self.label_swap_rate < 1.0:
            raise bad_value("rm.label_swap_rate", self.label_swap_rate, "a number from 0 to below 1")
        if self.probe_steps < 0:
            raise bad_value("rm.probe_steps", self.probe_steps, "a whole number >= 0")
        if not (math.isfinite(self.probe_lr) and self.probe_lr > 0):
            raise bad_value("rm.probe_lr", self.probe_lr, "a number > 0")
        if self.dropout is not None and not 0.0 <= self.dropout < 1.0:
            raise bad_value("rm.dropout", self.dropout, "a number from 0 to below 1, or null")
        if self.standardize_samples < 2:
            raise bad_value("rm.standardize_samples", self.standardize_samples, "a whole number >= 2")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise bad_value("rm.noise", self.noise, "a number >= 0")
        self.model.check("rm.model")
        self.train.check("rm.train")


@dataclass
class Margins:
    """What a scalar reward model's loss has."""

    use_margin: bool = False


@dataclass
class Grades:
    """What a distribution over ordered grades has: K of them, how they are learnt, and how a reward is read out."""

    num_grades: int = 10
    loss: GradeLoss = GradeLoss.half_tie
    entropy_bonus: float = 0.0
    read_out: ReadOut = ReadOut.mean
    std_weight: float = 1.0
    cvar_alpha: float = 0.25

    def check_grades(self, standardize: Standardize) -> None:
        """Raises RequestError for impossible values."""
        if not 2 <= self.num_grades <= 1000:
            raise bad_value("rm.num_grades", self.num_grades, "a whole number from 2 to 1000")
        if not (math.isfinite(self.entropy_bonus) and self.entropy_bonus >= 0):
            raise bad_value("rm.entropy_bonus", self.entropy_bonus, "a number >= 0")
        if not math.isfinite(self.std_weight):
            raise bad_value("rm.std_weight", self.std_weight, "a number")
        if not 0.0 < self.cvar_alpha <= 1.0:
            raise bad_value("rm.cvar_alpha", self.cvar_alpha, "a number above 0, at most 1")
        if self.read_out is ReadOut.win_rate and standardize is Standardize.none:
            raise bad_value(
                "rm.read_out",
                "win_rate",
                "another read-out where rm.standardize=none: it needs SFT samples to win against",
            )


@dataclass
class ScalarRm(Margins, RmConfig):
    """rm=scalar."""

    name: str = "scalar"


@dataclass
class DistributionalRm(Grades, RmConfig):
    """rm=distributional."""

    name: str = "distributional"

    @property
    def num_labels(self) -> int:
        """One logit for each grade."""
        return self.num_grades

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        super().check()
        self.check_grades(self.standardize)


@dataclass
class MembersRm(Margins, Grades, RmConfig):
    """Several reward models from one start: the same backbone and the same probed head."""

    has_members: ClassVar[bool] = True

    members: int = 6
    member: int | None = None
    kind: MemberKind = MemberKind.scalar
    lr_factors: list[float] = field(default_factory=lambda: [1.0])
    dropouts: list[float] = field(default_factory=list)
    selection: Selection = Selection.all

    @property
    def num_labels(self) -> int:
        """Outputs of each member."""
        return 1 if self.kind is MemberKind.scalar else self.num_grades

    def of_member(self, number: int, seed: int, num_starts: int = 1) -> ScalarRm | DistributionalRm:
        """The settings that member `number`, from 0, is trained with.

        Args:
            number: decides its learning rate and dropout, which go round.
            seed: of its data order and dropout noise.
            num_starts: checkpoints that members start from in turn; rates and dropouts do not keep step with them.
        """
        kind = ScalarRm if self.kind is MemberKind.scalar else DistributionalRm
        shared = {one.name: getattr(self, one.name) for one in fields(kind) if one.name != "name"}
        rates, dropouts = self.lr_factors, self.dropouts or [self.dropout]
        rate = _turn(number, len(rates), (num_starts,))
        changed = {
            "path": None,
            "seed": seed,
            "standardize": Standardize.none,  # the whole is scaled, once it is there
            "read_out": ReadOut.mean,
            "calibrate": False,
            "noise": 0.0,
            "dropout": dropouts[_turn(number, len(dropouts), (num_starts, len(rates)))],
            "train": replace(self.train, lr=self.train.lr * rates[rate]),
        }
        return kind(**{name: value for name, value in {**shared, **changed}.items() if name in shared})

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        super().check()
        self.check_grades(self.standardize)
        self._check_unread()
        if self.members < 1:
            raise bad_value("rm.members", self.members, "a whole number >= 1")
        if self.member is not None and not 0 <= self.member < self.members:
            raise bad_value(
                "rm.member", self.member, f"a whole number from 0 to below rm.members={self.members}, or null"
            )
        if not self.lr_factors or not all(math.isfinite(factor) and factor > 0 for factor in self.lr_factors):
            raise bad_value("rm.lr_factors", self.lr_factors, "numbers > 0, e.g. [0.25,1,2.5]")
        if not all(0.0 <= dropout < 1.0 for dropout in self.dropouts):
            raise bad_value("rm.dropouts", self.dropouts, "numbers from 0 to below 1, e.g. [0.05,0.1], or []")

    def _check_unread(self) -> None:
        """What the members' kind has no use for stays as it is."""
        other = Grades if self.kind is MemberKind.scalar else Margins
        for one in fields(other):
            if getattr(self, one.name) != one.default:
                expected = f"{_shown(one.default)}, because rm.kind={self.kind.value} does not read it"
                raise bad_value(f"rm.{one.name}", _shown(getattr(self, one.name)), expected)
        if self.dropouts and self.dropout is not None:
            raise bad_value("rm.dropout", self.dropout, "null, or rm.dropouts=[] so that it is read")


def _shown(value: object) -> object:
    return value.value if isinstance(value, Enum) else value


def _turn(number: int, length: int, others: Sequence[int]) -> int:
    """Which of `length` values a member gets: they go round, one further each time they would repeat another's round.

    >>> [_turn(number, 2, (2,)) for number in range(4)]  # beside 0, 1, 0, 1: every pair once
    [0, 1, 1, 0]
    """
    shift = next((number // math.lcm(length, other) for other in others if math.gcd(length, other) > 1), 0)
    return (number + shift) % length


@dataclass
class WarmRm(MembersRm):
    """rm=warm: one model, the mean of the members' weights."""

    name: str = "warm"


@dataclass
class EnsembleRm(MembersRm):
    """rm=ensemble: all members, the mean of their predictions."""

    name: str = "ensemble"
    disagreement_penalty: float = 0.0

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        super().check()
        if not (math.isfinite(self.disagreement_penalty) and self.disagreement_penalty >= 0):
            raise bad_value("rm.disagreement_penalty", self.disagreement_penalty, "a number >= 0")
        if self.disagreement_penalty and self.standardize is Standardize.none:
            expected = "0 where rm.standardize=none: members are compared on SFT samples"
            raise bad_value("rm.disagreement_penalty", self.disagreement_penalty, expected)
