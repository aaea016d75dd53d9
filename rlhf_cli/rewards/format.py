"""How a reward model reads text and how its logits become a reward: what its config.json has under `rlhf_reward`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_cli.data.tokenise import TokenPair, encode_completion, encode_completions, encode_prompt, ended
from rlhf_cli.errors import RequestError
from rlhf_cli.files import write_json_atomic
from rlhf_cli.models.settings import INDEX_FILE
from rlhf_cli.models.tokenizer import same_tokens, special_ids
from rlhf_cli.ops.grades import pair_log_odds, read_out
from rlhf_cli.settings import GradeLoss, ReadOut
from rlhf_cli.types import Prompt, Rollout, Scores

CONFIG_KEY = "rlhf_reward"


@dataclass(frozen=True)
class RewardFormat:
    """How text becomes the ids that are scored, and how logits become a reward."""

    max_prompt_tokens: int
    max_completion_tokens: int
    append_eos: bool = True
    is_one_text: bool = False  # prompt and completion are one text, which no token separates
    grade_loss: str | None = None  # what a distribution over grades was trained with; None = a scalar
    read_out: str = "mean"  # of a distribution over grades
    std_weight: float = 1.0  # c of read_out=mean_std
    cvar_alpha: float = 0.25  # of read_out=cvar
    opponent: Sequence[float] = ()  # the SFT model's mean distribution over grades, of read_out=win_rate
    temperature: float = 1.0  # the log-odds of a pair are divided by it; fitted on validation pairs
    mean: float = 0.0  # of the raw score on samples of the SFT model
    std: float = 1.0

    def raw(self, logits: Tensor) -> Tensor:
        """The raw score, float32 [N], of logits [N, K]: the one logit of a scalar, else what is read out of the grades.

        A win rate needs an opponent: as long as there is none the mean grade is the score.
        """
        if self.grade_loss is None:
            return logits.float()[:, 0]
        how = ReadOut(self.read_out)
        if how is ReadOut.win_rate and not self.opponent:
            how = ReadOut.mean
        opponent = torch.tensor(self.opponent, device=logits.device) if self.opponent else None
        return read_out(logits.float(), how, self.std_weight, self.cvar_alpha, opponent)

    def standardise(self, raw: Tensor) -> Tensor:
        """(raw - mean) / std: in standard deviations of the SFT model's samples."""
        return (raw - self.mean) / self.std

    def log_odds(self, chosen: Scores, rejected: Scores) -> Tensor:
        """log P(chosen is preferred) / P(rejected is), float32 [N], before the temperature."""
        assert chosen.logits is not None and rejected.logits is not None
        if self.grade_loss is None:
            return chosen.logits[:, 0] - rejected.logits[:, 0]
        return pair_log_odds(chosen.logits, rejected.logits, GradeLoss(self.grade_loss))

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str, finished: bool = True
    ) -> TokenPair:
        """Ids of a row, exactly as in training; EOS is appended to finished completions only."""
        return (
            self.encode_prompt(tokenizer, prompt),
            encode_completion(
                tokenizer, completion, self.max_completion_tokens, append_eos=self.append_eos and finished
            ),
        )

    def encode_prompt(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
        """Ids of the prompt of a row."""
        return encode_prompt(
            tokenizer, prompt, self.max_prompt_tokens, is_predicted=False, is_begun=self.is_one_text
        )

    def encode_all(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        finished: Sequence[bool] | None = None,
    ) -> list[TokenPair]:
        """Ids of N rows, as `encode` has them one by one; a prompt of several rows is encoded once.

        Raises:
            ValueError: prompts, completions and `finished` are not as many.
        """
        done = [True] * len(prompts) if finished is None else finished
        of_prompt = {prompt: self.encode_prompt(tokenizer, prompt) for prompt in dict.fromkeys(prompts)}
        append_eos = [self.append_eos and one for one in done]
        encoded = encode_completions(tokenizer, completions, self.max_completion_tokens, append_eos)
        return [(of_prompt[prompt], ids) for prompt, ids in zip(prompts, encoded, strict=True)]

    def encode_rollout(self, tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> list[TokenPair]:
        """Ids of N samples; those that were sampled, where the policy's tokenizer is this one.

        They are not encoded again then: it takes no time, and ids whose text would be read as others stay what they
        are (a sampled "fun" "ny", or a first word without its space).
        """
        finished = [not cut for cut in rollout.truncated.tolist()]
        if rollout.tokenizer is None or not same_tokens(rollout.tokenizer, tokenizer):
            return self.encode_all(tokenizer, rollout.prompts, rollout.completions, finished)
        of_prompt = {prompt: self.encode_prompt(tokenizer, prompt) for prompt in dict.fromkeys(rollout.prompts)}
        special = special_ids(tokenizer)
        rows = []
        for prompt, sampled, done in zip(rollout.prompts, rollout.completion_ids, finished, strict=True):
            # Whatever ended it, one of a chat model's stops or EOS, is not of the text.
            text_ids = [i for i in (sampled[:-1] if done else sampled) if i not in special]
            append_eos = self.append_eos and done
            rows.append(
                (
                    of_prompt[prompt],
                    ended(tokenizer.eos_token_id, text_ids, self.max_completion_tokens, append_eos),
                )
            )
        return rows


def store_format(folder: Path, **changes: Any) -> None:
    """Writes what was found out after training (scale, temperature, opponent) into a saved reward model's config.

    Raises:
        RequestError: mean and std cannot scale anything, because all scores are equal or one is not finite.
    """
    check_scale(changes.get("mean", 0.0), changes.get("std", 1.0))
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config[CONFIG_KEY] |= changes
    write_json_atomic(file, config)


def check_scale(mean: float, std: float) -> None:
    """Raises RequestError where mean and standard deviation cannot scale anything."""
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise RequestError(
            f"rm.standardize: the reward model gives mean {mean} and std {std} on SFT samples; "
            "it has learned nothing it could be scaled by"
        )


def has_format(path: str) -> bool:
    """Whether the folder, of a reward model or an ensemble, says how it is read out; it is not parsed here."""
    files = (Path(path) / name for name in ("config.json", INDEX_FILE))
    return any(f'"{CONFIG_KEY}"'.encode() in file.read_bytes() for file in files if file.is_file())


def read_format(key: str, path: str, stored: Mapping[str, Any]) -> RewardFormat:
    """The format as it was saved.

    Raises:
        RequestError: a setting that is unknown, absent or impossible.
    """
    known = {field.name for field in fields(RewardFormat)}
    unknown = sorted(set(stored) - known)
    if unknown:
        raise RequestError(f"{key}={path}: unknown {CONFIG_KEY} settings {', '.join(unknown)}")
    absent = sorted({field.name for field in fields(RewardFormat) if field.default is MISSING} - set(stored))
    if absent:
        raise RequestError(f"{key}={path}: {CONFIG_KEY} has no {', '.join(absent)}")
    found = RewardFormat(**{**stored, "opponent": tuple(stored.get("opponent") or ())})
    for name, number, is_positive in (
        ("mean", found.mean, False),
        ("std", found.std, True),
        ("temperature", found.temperature, True),
    ):
        if not isinstance(number, float | int) or not math.isfinite(number) or (is_positive and number <= 0):
            raise RequestError(f"{key}={path}: {CONFIG_KEY} has {name} {number}")
    for name, value, allowed in (
        ("grade_loss", found.grade_loss, [None, *(one.value for one in GradeLoss)]),
        ("read_out", found.read_out, [one.value for one in ReadOut]),
    ):
        if value not in allowed:
            raise RequestError(f"{key}={path}: {CONFIG_KEY} has {name} {value}, which is none of {allowed}")
    return found
