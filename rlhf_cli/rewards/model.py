"""The reward model: a plain sequence classifier plus the text format and scale it was trained with.

What is saved is an ordinary Hugging Face folder; format and scale live in its config.json under `rlhf_reward`, so
that transformers loads it without any code from here and gives the raw logits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.data.tokenise import TokenPair, collate, encode_completion, encode_prompt
from rlhf_cli.errors import RequestError
from rlhf_cli.files import write_json_atomic
from rlhf_cli.models.adapters import Adapter
from rlhf_cli.models.loading import load_classifier, save_model
from rlhf_cli.models.positions import check_length, first_position, max_positions, takes_positions, token_positions
from rlhf_cli.ops.masks import last_true
from rlhf_cli.types import Prompt, Scores, Sequences

_CONFIG_KEY = "rlhf_reward"


@dataclass(frozen=True)
class RewardFormat:
    """How text becomes the ids that are scored, and how a raw score becomes a reward."""

    max_prompt_tokens: int
    max_completion_tokens: int
    append_eos: bool = True
    is_one_text: bool = False  # prompt and completion are one text, which no token separates
    mean: float = 0.0  # of the raw score on samples of the SFT model
    std: float = 1.0

    def standardise(self, raw: Tensor) -> Tensor:
        """(raw - mean) / std: in standard deviations of the SFT model's samples."""
        return (raw - self.mean) / self.std


@dataclass
class RewardModel:
    """A scalar reward r(x, y)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    format: RewardFormat

    def encode(self, prompt: Prompt, completion: str, finished: bool = True) -> TokenPair:
        """Ids of a row, exactly as in training; EOS is appended to finished completions only."""
        return (
            encode_prompt(
                self.tokenizer,
                prompt,
                self.format.max_prompt_tokens,
                is_predicted=False,
                is_begun=self.format.is_one_text,
            ),
            encode_completion(
                self.tokenizer,
                completion,
                self.format.max_completion_tokens,
                append_eos=self.format.append_eos and finished,
            ),
        )

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        finished: Sequence[bool] | None = None,
        batch_size: int = 128,
    ) -> Scores:
        """Scores completions from their text.

        Args:
            prompts: N.
            completions: N texts.
            finished: N; False where a completion was cut before its EOS. None = all finished.
            batch_size: rows per forward pass; rows of similar length go together.

        Returns:
            Scores on the CPU, in the order given.
        """
        done = [True] * len(prompts) if finished is None else finished
        rows = [self.encode(p, c, f) for p, c, f in zip(prompts, completions, done, strict=True)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
        raw = torch.empty(len(rows))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([rows[i] for i in chosen], int(self.tokenizer.pad_token_id))
            raw[chosen] = score_sequences(self.model, batch.to(self.model.device)).float().cpu()
        return Scores(reward=self.format.standardise(raw), raw=raw)

    def save(self, folder: Path, adapter: Adapter | None = None) -> None:
        """Writes a Hugging Face folder; an adapter is merged into it."""
        setattr(self.model.config, _CONFIG_KEY, asdict(self.format))
        save_model(self.model if adapter is None else adapter.merged(), self.tokenizer, folder)


def score_sequences(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """Raw scores of N rows, read at the last real token by the attention mask, never by the id of pad.

    Decoder classifiers of transformers have a `score` head over the backbone; encoder classifiers (DistilBERT,
    RoBERTa) pool their first column themselves, so their rows are moved to the left.

    Returns:
        float [N]; gradients flow where they are enabled.

    Raises:
        RequestError: a row has more tokens than the model has positions.
    """
    check_length(model, sequences)
    head = getattr(model, "score", None)
    if head is None:
        return _score_by_first_token(model, sequences)
    hidden = model.base_model(
        input_ids=sequences.ids,
        attention_mask=sequences.attention_mask.long(),
        position_ids=token_positions(sequences.attention_mask),
        use_cache=False,
    ).last_hidden_state
    rows = torch.arange(len(sequences), device=hidden.device)
    pooled = hidden[rows, last_true(sequences.attention_mask)]
    return head(pooled)[:, 0]


def _score_by_first_token(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    # A stable sort by "is padding" keeps the tokens in order and puts them in front.
    order = sequences.attention_mask.logical_not().sort(dim=-1, stable=True).indices
    ids, attention = sequences.ids.gather(-1, order), sequences.attention_mask.gather(-1, order)
    # RoBERTa would find its positions by the id of pad, which is for the mask alone to say.
    positions = {}
    if takes_positions(model):
        positions["position_ids"] = token_positions(attention, first_position(model))
    return model(input_ids=ids, attention_mask=attention.long(), **positions).logits[:, 0]


def store_scale(folder: Path, mean: float, std: float) -> None:
    """Writes mean and standard deviation of the raw score into a saved reward model's config.

    Raises:
        RequestError: they cannot scale anything, because all scores are equal or one is not finite.
    """
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise RequestError(
            f"rm.standardize: the reward model gives mean {mean} and std {std} on SFT samples; "
            "it has learned nothing it could be scaled by"
        )
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config[_CONFIG_KEY] |= {"mean": mean, "std": std}
    write_json_atomic(file, config)


def load_reward_model(key: str, path: str, device: torch.device) -> RewardModel:
    """A reward model saved by this project.

    Raises:
        RequestError: the folder is no reward model of this project, or has more than one label.
    """
    model, tokenizer = load_classifier(key, path, device)
    stored: dict[str, Any] | None = getattr(model.config, _CONFIG_KEY, None)
    if stored is None:
        raise RequestError(f"{key}={path}: not a reward model of this project (config.json has no {_CONFIG_KEY})")
    known = {field.name for field in fields(RewardFormat)}
    unknown = sorted(set(stored) - known)
    if unknown:
        raise RequestError(f"{key}={path}: unknown {_CONFIG_KEY} settings {', '.join(unknown)}")
    absent = sorted({field.name for field in fields(RewardFormat) if field.default is MISSING} - set(stored))
    if absent:
        raise RequestError(f"{key}={path}: {_CONFIG_KEY} has no {', '.join(absent)}")
    if model.config.num_labels != 1:
        raise RequestError(f"{key}={path}: has {model.config.num_labels} labels; a scalar reward model has one")
    text_format, limit = RewardFormat(**stored), max_positions(model)
    longest = text_format.max_prompt_tokens + text_format.max_completion_tokens
    if limit is not None and longest > limit:
        raise RequestError(
            f"{key}={path}: {_CONFIG_KEY} has rows of up to {longest} tokens, more than the model's {limit} positions"
        )
    return RewardModel(model, tokenizer, text_format)
