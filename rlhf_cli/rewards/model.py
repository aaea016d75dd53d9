"""The reward model: a plain sequence classifier plus how its text is made and how its outputs become a reward.

What is saved is an ordinary Hugging Face folder; all but the weights lives in its config.json under `rlhf_reward`, so
that transformers loads it without any code from here and gives the raw logits.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.data.tokenise import TokenPair
from rlhf_cli.errors import RequestError
from rlhf_cli.models.adapters import Adapter
from rlhf_cli.models.loading import load_classifier, save_model
from rlhf_cli.models.positions import max_positions
from rlhf_cli.rewards.format import CONFIG_KEY, RewardFormat, read_format
from rlhf_cli.rewards.scoring import MAX_ROWS, logits_of_rows
from rlhf_cli.types import Preference, Prompt, Rollout, Scores

_log = logging.getLogger(__name__)


class Scorer(ABC):
    """What gives rewards: one reward model, or several that read text alike."""

    tokenizer: PreTrainedTokenizerBase
    format: RewardFormat

    @abstractmethod
    def models(self) -> Sequence[PreTrainedModel]:
        """The classifiers that are asked."""

    @abstractmethod
    def of_rows(self, rows: Sequence[TokenPair], batch_size: int) -> Scores:
        """Scores encoded rows; on the CPU, in the order given."""

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        finished: Sequence[bool] | None = None,
        batch_size: int = MAX_ROWS,
    ) -> Scores:
        """Scores completions from their text.

        Args:
            prompts: N.
            completions: N texts.
            finished: N; False where a completion was cut before its EOS. None = all finished.
            batch_size: most rows of a forward pass.

        Returns:
            Scores on the CPU, in the order given.
        """
        return self.of_rows(self.format.encode_all(self.tokenizer, prompts, completions, finished), batch_size)

    def score_sides(self, pairs: Sequence[Preference], batch_size: int = MAX_ROWS) -> tuple[Scores, Scores]:
        """Scores both completions of each pair, side by side, so that they share a pass over their prompt.

        Args:
            pairs: Q; their completions are finished.
            batch_size: most rows of a forward pass, two a pair.

        Returns:
            Scores of the chosen [Q] and of the rejected [Q] completions, on the CPU.
        """
        prompts = [pair.prompt for pair in pairs for _ in range(2)]
        texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
        scores = self.score(prompts, texts, batch_size=batch_size)
        return scores.every_second(0), scores.every_second(1)

    def score_rollout(self, rollout: Rollout, batch_size: int = MAX_ROWS) -> Scores:
        """Scores samples, from the sampled ids where the tokenizers match; a cut one has no EOS to score."""
        return self.of_rows(self.format.encode_rollout(self.tokenizer, rollout), batch_size)

    def log_odds(self, chosen: Scores, rejected: Scores) -> Tensor:
        """log P(chosen is preferred) / P(rejected is), float32 [N], before the temperature."""
        return self.format.log_odds(chosen, rejected)


@dataclass
class RewardModel(Scorer):
    """A reward r(x, y) from one classifier, scalar or over grades."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    format: RewardFormat

    def encode(self, prompt: Prompt, completion: str, finished: bool = True) -> TokenPair:
        """Ids of a row, exactly as in training; EOS is appended to finished completions only."""
        return self.format.encode(self.tokenizer, prompt, completion, finished)

    def models(self) -> Sequence[PreTrainedModel]:
        """The one classifier."""
        return [self.model]

    def of_rows(self, rows: Sequence[TokenPair], batch_size: int) -> Scores:
        """Scores encoded rows."""
        logits = logits_of_rows(self.model, self.tokenizer, rows, batch_size)
        raw = self.format.raw(logits)
        return Scores(reward=self.format.standardise(raw), raw=raw, logits=logits)

    def save(self, folder: Path, adapter: Adapter | None = None) -> None:
        """Writes a Hugging Face folder; an adapter is merged into it."""
        setattr(self.model.config, CONFIG_KEY, asdict(self.format))
        save_model(self.model if adapter is None else adapter.merged(), self.tokenizer, folder)


def load_reward_model(
    key: str, path: str, device: torch.device, elsewhere: RewardFormat | None = None
) -> RewardModel:
    """A reward model: one classifier.

    Args:
        key: of the config, for messages.
        path: a folder, or a hub id.
        device: where it goes.
        elsewhere: how a classifier with one label that this project has not saved reads text; None = not at all.

    Raises:
        RequestError: the folder is no such reward model, or its outputs are not what its settings say.
    """
    model, tokenizer = load_classifier(key, path, device)
    stored: dict[str, Any] | None = getattr(model.config, CONFIG_KEY, None)
    labels = model.config.num_labels
    if stored is not None:
        text_format = read_format(key, path, stored)
    elif elsewhere is None or labels != 1:
        what = f"has {labels} labels and" if elsewhere is not None else "not a reward model of this project:"
        raise RequestError(f"{key}={path}: {what} no {CONFIG_KEY} in config.json")
    else:
        text_format = elsewhere
        _log.warning(
            "%s=%s: from elsewhere (no %s in config.json): prompt and completion are read as this project's reward "
            "models read them, and rewards are on its own scale; reward.normalize=sft_samples puts those of a policy "
            "on one with others",
            key,
            path,
            CONFIG_KEY,
        )
    if text_format.grade_loss is None and labels != 1:
        raise RequestError(f"{key}={path}: has {labels} labels; a scalar reward model has one")
    if text_format.grade_loss is not None and labels < 2:
        raise RequestError(
            f"{key}={path}: has {labels} label; a distributional reward model has one for each grade"
        )
    if text_format.opponent and len(text_format.opponent) != labels:
        raise RequestError(
            f"{key}={path}: {CONFIG_KEY} has {len(text_format.opponent)} grades of the SFT model, not {labels}"
        )
    limit = max_positions(model)
    longest = text_format.max_prompt_tokens + text_format.max_completion_tokens
    if limit is not None and longest > limit:
        raise RequestError(
            f"{key}={path}: {CONFIG_KEY if stored else 'data'} has rows of up to {longest} tokens, more than the "
            f"model's {limit} positions"
        )
    return RewardModel(model, tokenizer, text_format)
