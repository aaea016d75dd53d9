"""Several reward models as one: the mean of their predictions, and how far they disagree.

What is saved is a folder of ordinary reward models with an index, ensemble.json, which has the settings of the whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.data.tokenise import TokenPair
from rlhf_cli.errors import RequestError
from rlhf_cli.files import write_json_atomic
from rlhf_cli.models.settings import INDEX_FILE
from rlhf_cli.rewards.format import CONFIG_KEY, RewardFormat, check_scale, read_format
from rlhf_cli.rewards.model import RewardModel, Scorer, load_reward_model
from rlhf_cli.rewards.scoring import logits_of_rows
from rlhf_cli.types import Scores


@dataclass
class EnsembleRewardModel(Scorer):
    """The prediction mean of M reward models that read text alike (ENS in Rame et al. 2024, arXiv:2401.12187).

    Scalars are averaged as they are, so that a member of wider scores counts for more; of distributions over grades
    the mean distribution is read out. The disagreement is the standard deviation of the members' rewards, each
    standardised on SFT samples by itself, for neither shift nor scale of a member says that it disagrees. Times
    `penalty` and the members' mean std it is subtracted from the raw score (Coste et al. 2024, arXiv:2310.02743, use
    the variance so).
    """

    members: Sequence[RewardModel]
    format: RewardFormat  # of the whole: scale, temperature, read-out
    centres: Sequence[float]  # M, mean raw score of each member on SFT samples
    stds: Sequence[float]  # M, their standard deviations
    penalty: float = 0.0

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:  # type: ignore[override]
        """Of all members."""
        return self.members[0].tokenizer

    def models(self) -> Sequence[PreTrainedModel]:
        """The members' classifiers."""
        return [one.model for one in self.members]

    def of_rows(self, rows: Sequence[TokenPair], batch_size: int) -> Scores:
        """Scores encoded rows, by M forward passes."""
        return self.of_logits([logits_of_rows(one.model, one.tokenizer, rows, batch_size) for one in self.members])

    def of_logits(self, logits: Sequence[Tensor]) -> Scores:
        """Scores from the members' logits, M of [N, K]."""
        each = torch.stack([self.format.raw(one) for one in logits])
        stacked = torch.stack(list(logits))
        if self.format.grade_loss is None:
            mean = stacked.mean(dim=0)
        else:
            mean = torch.logsumexp(stacked.log_softmax(dim=-1), dim=0)
        stds = torch.tensor(self.stds)
        standardised = (each - torch.tensor(self.centres)[:, None]) / stds[:, None]
        disagreement = standardised.std(dim=0, correction=0)
        raw = self.format.raw(mean) - self.penalty * stds.mean() * disagreement
        return Scores(self.format.standardise(raw), raw, mean, disagreement)


def save_ensemble(folder: Path, members: Sequence[Path], ensemble: EnsembleRewardModel) -> None:
    """Writes the members' folders and, last, the index.

    Args:
        folder: of the whole.
        members: M folders of saved reward models, which are copied.
        ensemble: its settings.
    """
    check_scale(ensemble.format.mean, ensemble.format.std)
    names = [f"member-{i}" for i in range(len(members))]
    for name, member in zip(names, members, strict=True):
        shutil.copytree(member, folder / name, dirs_exist_ok=True)
    index = {
        "members": names,
        "centres": list(ensemble.centres),
        "stds": list(ensemble.stds),
        "disagreement_penalty": ensemble.penalty,
        CONFIG_KEY: asdict(ensemble.format),
    }
    write_json_atomic(folder / INDEX_FILE, index)


def load_scorer(key: str, path: str, device: torch.device, elsewhere: RewardFormat | None = None) -> Scorer:
    """A reward model, or an ensemble of them as saved by this project; `elsewhere` as in `load_reward_model`.

    Raises:
        RequestError: the folder is neither, or its parts do not fit together.
    """
    file = Path(path) / INDEX_FILE
    if not file.is_file():
        return load_reward_model(key, path, device, elsewhere)
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        names = [str(name) for name in index["members"]]
        centres, stds = ([float(value) for value in index[key]] for key in ("centres", "stds"))
        penalty, stored = float(index["disagreement_penalty"]), dict(index[CONFIG_KEY])
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"{key}={path}: {INDEX_FILE} cannot be read ({type(error).__name__}: {error})"
        ) from None
    is_inside = all(name not in ("", "..") and Path(name).name == name for name in names)
    if not names or not len(names) == len(centres) == len(stds) or not is_inside:
        raise RequestError(
            f"{key}={path}: {INDEX_FILE} does not name its members, or not a centre and std for each"
        )
    members = [load_reward_model(key, str(Path(path) / name), device) for name in names]
    whole = read_format(key, path, stored)
    outputs = 1 if whole.grade_loss is None else len(whole.opponent) or max(2, _outputs(members[0]))
    for name, member in zip(names, members, strict=True):
        if _outputs(member) != outputs:
            raise RequestError(f"{key}={path}: {name} has {_outputs(member)} outputs, not {outputs}")
    return EnsembleRewardModel(members, whole, centres, stds, penalty)


def _outputs(member: RewardModel) -> int:
    return int(member.model.config.num_labels)
