"""What a policy can be rewarded by: a weighted sum of terms, each one number a completion.

    R(x, y) = sum_i w_i term_i(x, y)

Terms that are to be avoided are negative, so that a positive weight always asks for what its name says less of, or,
of the reward model, the gold reward, coherence and rules, more of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_cli.data.dataset import GoldReward
from rlhf_cli.data.tokenise import collate, encode_completion, encode_prompt
from rlhf_cli.models.causal import LanguageModel, frozen_logprobs
from rlhf_cli.ops.masks import masked_sum
from rlhf_cli.rewards.repetition import repetition_rate
from rlhf_cli.types import Rollout, Scores, Sequences

Term = Callable[[Rollout], Tensor]


@dataclass(frozen=True)
class RewardSum:
    """The weighted sum, and each of its terms without its weight."""

    weights: Mapping[str, float]  # of all terms
    terms: Mapping[str, Term]  # all but the reward model's, each float32 [N] on the CPU
    reward_model: Callable[[Rollout], Scores] | None = None  # the term "rm": its standardised reward

    def __call__(self, rollout: Rollout) -> Scores:
        """Scores of N completions, their `terms` by name; `raw` is the reward model's, or the sum without one."""
        scores = None if self.reward_model is None else self.reward_model(rollout)
        values = {} if scores is None else {"rm": scores.reward}
        values |= {name: term(rollout) for name, term in self.terms.items()}
        total = torch.zeros(len(rollout))
        for name, value in values.items():
            total = total + self.weights[name] * value
        if scores is None:
            scores = Scores(reward=total, raw=total)
        return replace(scores, reward=total, terms=values)


def gold_rewards(gold: GoldReward, rollout: Rollout) -> Tensor:
    """The true reward of each row, float32 [N]."""
    pairs = zip(rollout.prompts, rollout.completions, strict=True)
    return torch.tensor([gold(prompt, completion) for prompt, completion in pairs])


def length_penalty(rollout: Rollout, max_new_tokens: int) -> Tensor:
    """-(completion tokens / the most there can be), the EOS included, float32 [N] in [-1, 0)."""
    return -torch.tensor([len(ids) / max_new_tokens for ids in rollout.completion_ids])


def missing_eos_penalty(rollout: Rollout) -> Tensor:
    """-1 where the length limit cut the completion, else 0, float32 [N]."""
    return 0.0 - rollout.truncated.float().cpu()  # and not -0.0


def repetition_penalty(rollout: Rollout, n: int) -> Tensor:
    """-(share of the completion's n-grams of tokens that have already occurred in it), float32 [N] in (-1, 0]."""
    return 0.0 - torch.tensor([repetition_rate(ids, n) for ids in rollout.completion_ids])


def rule_matches(pattern: re.Pattern[str], rollout: Rollout, each: bool) -> Tensor:
    """Whether (1 or 0) or, for `each`, how often the pattern is in the completion's text, float32 [N]."""
    if each:
        counts = [sum(1 for _ in pattern.finditer(text)) for text in rollout.completions]
    else:
        counts = [int(pattern.search(text) is not None) for text in rollout.completions]
    return torch.tensor(counts, dtype=torch.float32)


@torch.no_grad()
def mean_logprobs(
    model: LanguageModel, sequences: Sequences, micro_batch_size: int, micro_batch_tokens: int | None = None
) -> Tensor:
    """Mean log-probability of each completion's tokens, its EOS included, under `model` at temperature 1.

    Args:
        model: in eval mode.
        sequences: N rows, on the model's device.
        micro_batch_size: rows per pass.
        micro_batch_tokens: tokens per pass.

    Returns:
        float32 [N] on the CPU, nats per token, never above 0.
    """
    tokens = frozen_logprobs(model, sequences, 1.0, micro_batch_size, micro_batch_tokens)
    return (masked_sum(tokens.logprob, tokens.mask) / tokens.mask.sum(-1).clamp(min=1)).float().cpu()


@dataclass(frozen=True)
class Judge:
    """A frozen language model that tells how coherent a completion is."""

    model: LanguageModel
    micro_batch_size: int
    tokenizer: PreTrainedTokenizerBase | None = (
        None  # None: that of the policy, whose tokens are taken as they are
    )
    max_prompt_tokens: int = 0  # read with another tokenizer alone
    max_completion_tokens: int = 0
    micro_batch_tokens: int | None = None

    def __call__(self, rollout: Rollout) -> Tensor:
        """`mean_logprobs` of a rollout's completions."""
        return mean_logprobs(self.model, self._sequences(rollout), self.micro_batch_size, self.micro_batch_tokens)

    def _sequences(self, rollout: Rollout) -> Sequences:
        if self.tokenizer is None:
            return rollout.sequences
        rows = []
        for prompt, text, cut in zip(
            rollout.prompts, rollout.completions, rollout.truncated.tolist(), strict=True
        ):
            before = encode_prompt(self.tokenizer, prompt, self.max_prompt_tokens)
            # a text of nothing has a token to be judged by, too
            ended = not cut or not text
            rows.append(
                (
                    before,
                    encode_completion(self.tokenizer, text, self.max_completion_tokens, append_eos=ended),
                )
            )
        return collate(rows, int(self.tokenizer.pad_token_id)).to(rollout.sequences.ids.device)
