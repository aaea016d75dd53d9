"""The reward model: a plain sequence classifier plus how its text is made and how its outputs become a reward.

What is saved is an ordinary Hugging Face folder; all but the weights lives in its config.json under `rlhf_reward`, so
that transformers loads it without any code from here and gives the raw logits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.data.tokenise import TokenPair, collate, encode_completion, encode_completions, encode_prompt, ended
from rlhf_cli.errors import RequestError
from rlhf_cli.files import write_json_atomic
from rlhf_cli.models.adapters import Adapter
from rlhf_cli.models.loading import load_classifier, save_model
from rlhf_cli.models.positions import check_length, first_position, max_positions, takes_positions, token_positions
from rlhf_cli.models.tokenizer import same_tokens, special_ids
from rlhf_cli.ops.grades import pair_log_odds, read_out
from rlhf_cli.ops.masks import last_true
from rlhf_cli.settings import GradeLoss, ReadOut
from rlhf_cli.types import Prompt, Rollout, Scores, Sequences

CONFIG_KEY = "rlhf_reward"

# Of one forward pass of scoring: no row is followed by a gradient, so that many fit.
MAX_ROWS = 512
MAX_TOKENS = 16_384


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


class Scorer(Protocol):
    """What gives rewards: one reward model, or several."""

    format: RewardFormat

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the model, or of all of them."""
        ...

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        finished: Sequence[bool] | None = None,
        batch_size: int = MAX_ROWS,
    ) -> Scores:
        """Scores completions from their text; see `RewardModel.score`."""
        ...

    def score_rollout(self, rollout: Rollout, batch_size: int = MAX_ROWS) -> Scores:
        """Scores samples; see `RewardModel.score_rollout`."""
        ...

    def log_odds(self, chosen: Scores, rejected: Scores) -> Tensor:
        """log P(chosen is preferred) / P(rejected is), float32 [N], before the temperature."""
        ...


@dataclass
class RewardModel:
    """A reward r(x, y) from one classifier, scalar or over grades."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    format: RewardFormat

    def encode(self, prompt: Prompt, completion: str, finished: bool = True) -> TokenPair:
        """Ids of a row, exactly as in training; EOS is appended to finished completions only."""
        return self.format.encode(self.tokenizer, prompt, completion, finished)

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
        return self._of_rows(self.format.encode_all(self.tokenizer, prompts, completions, finished), batch_size)

    def score_rollout(self, rollout: Rollout, batch_size: int = MAX_ROWS) -> Scores:
        """Scores samples, from the sampled ids where the tokenizers match; a cut one has no EOS to score."""
        return self._of_rows(self.format.encode_rollout(self.tokenizer, rollout), batch_size)

    def _of_rows(self, rows: Sequence[TokenPair], batch_size: int) -> Scores:
        logits = logits_of_rows(self.model, self.tokenizer, rows, batch_size)
        raw = self.format.raw(logits)
        return Scores(reward=self.format.standardise(raw), raw=raw, logits=logits)

    def log_odds(self, chosen: Scores, rejected: Scores) -> Tensor:
        """log P(chosen is preferred) / P(rejected is), float32 [N], before the temperature."""
        return self.format.log_odds(chosen, rejected)

    def save(self, folder: Path, adapter: Adapter | None = None) -> None:
        """Writes a Hugging Face folder; an adapter is merged into it."""
        setattr(self.model.config, CONFIG_KEY, asdict(self.format))
        save_model(self.model if adapter is None else adapter.merged(), self.tokenizer, folder)


@torch.no_grad()
def logits_of_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenPair],
    batch_size: int = MAX_ROWS,
) -> Tensor:
    """The classifier's outputs for encoded rows, float32 [N, K] on the CPU, in the order given.

    Rows are sorted by length, so that few columns are padding, and cut into forward passes of at most `batch_size` rows
    and MAX_TOKENS tokens, padding included: short rows go through many at a time, long ones few.
    """
    logits = torch.empty(len(rows), int(model.config.num_labels or 1))
    for chosen in token_batches([len(prompt) + len(completion) for prompt, completion in rows], batch_size):
        batch = collate([rows[i] for i in chosen], int(tokenizer.pad_token_id))
        logits[chosen] = score_sequences(model, batch.to(model.device)).float().cpu()
    return logits


def token_batches(lengths: Sequence[int], max_rows: int, max_tokens: int = MAX_TOKENS) -> Iterator[list[int]]:
    """Row numbers of each forward pass, the shortest rows first.

    Args:
        lengths: N, in tokens.
        max_rows: of a pass.
        max_tokens: of a pass, every row padded to its longest; a single row may be longer.

    >>> list(token_batches([9, 2, 3, 2], max_rows=3, max_tokens=9))
    [[1, 3, 2], [0]]
    """
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == max_rows or (len(batch) + 1) * lengths[row] > max_tokens):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def score_sequences(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """Logits of N rows, read at the last real token by the attention mask, never by the id of pad.

    Decoder classifiers of transformers have a `score` head over the backbone; encoder classifiers (DistilBERT,
    RoBERTa) pool their first column themselves, so their rows are moved to the left.

    Returns:
        float [N, K], K = 1 of a scalar reward model; gradients flow where they are enabled.

    Raises:
        RequestError: a row has more tokens than the model has positions.
    """
    if not has_linear_head(model):
        check_length(model, sequences)
        return _score_by_first_token(model, sequences)
    return head_of_pooled(model, pooled_states(model, sequences))


def has_linear_head(model: PreTrainedModel) -> bool:
    """Whether the head is one matrix over one position's state: of decoder classifiers, not of encoder classifiers."""
    return getattr(model, "score", None) is not None


def pooled_states(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """What a linear head reads: the backbone's state at the last real token, float32 [N, H]."""
    check_length(model, sequences)
    hidden = model.base_model(
        input_ids=sequences.ids,
        attention_mask=sequences.attention_mask.long(),
        position_ids=token_positions(sequences.attention_mask),
        use_cache=False,
    ).last_hidden_state
    rows = torch.arange(len(sequences), device=hidden.device)
    return hidden[rows, last_true(sequences.attention_mask)].float()


def head_of_pooled(model: PreTrainedModel, pooled: Tensor) -> Tensor:
    """Logits [N, K] of states [N, H], without autocast: in bfloat16 hundreds of texts would share one score."""
    with torch.autocast(pooled.device.type, enabled=False):
        return model.score(pooled)


def _score_by_first_token(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    # A stable sort by "is padding" keeps the tokens in order and puts them in front.
    order = sequences.attention_mask.logical_not().sort(dim=-1, stable=True).indices
    ids, attention = sequences.ids.gather(-1, order), sequences.attention_mask.gather(-1, order)
    # RoBERTa would find its positions by the id of pad, which is for the mask alone to say.
    positions = {}
    if takes_positions(model):
        positions["position_ids"] = token_positions(attention, first_position(model))
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]  # of the head
    hook = last.register_forward_hook(_again_in_float32)
    try:
        return model(input_ids=ids, attention_mask=attention.long(), **positions).logits
    finally:
        hook.remove()


def _again_in_float32(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    """A forward hook: what autocast has computed in half precision, computed again; None leaves the output."""
    if output.dtype is torch.float32 or not isinstance(layer, nn.Linear):
        return None
    with torch.autocast(output.device.type, enabled=False):
        return functional.linear(inputs[0].float(), layer.weight, layer.bias)


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


def load_reward_model(key: str, path: str, device: torch.device) -> RewardModel:
    """A reward model saved by this project: one classifier.

    Raises:
        RequestError: the folder is no reward model of this project, or its outputs are not what its settings say.
    """
    model, tokenizer = load_classifier(key, path, device)
    stored: dict[str, Any] | None = getattr(model.config, CONFIG_KEY, None)
    if stored is None:
        raise RequestError(f"{key}={path}: not a reward model of this project (config.json has no {CONFIG_KEY})")
    text_format = read_format(key, path, stored)
    labels = model.config.num_labels
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
            f"{key}={path}: {CONFIG_KEY} has rows of up to {longest} tokens, more than the model's {limit} positions"
        )
    return RewardModel(model, tokenizer, text_format)


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
