"""The containers that flow through the pipeline.

text rows -> Preference / Example -> Sequences -> Rollout -> Scores -> advantages -> LossOutput -> step

Letters in shape comments: N sequences, L padded length of prompt and completion together, T padded length of
the completion, P prompts. One mask convention: bool, True = the token counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # settings are read before torch is needed
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str  # "system" | "user" | "assistant"
    content: str


@dataclass(frozen=True)
class Opening:
    """The beginning of a text, its length in tokens: what it says depends on the tokenizer that cuts it."""

    text: str  # the whole text
    num_tokens: int  # of the beginning, without a token that the tokenizer puts before every text
    label: str = ""  # what the data says of the whole text, for reporting


# What a completion continues: plain text, the turns of a chat that wait for the assistant's next one, or a text to cut.
Prompt = str | tuple[Message, ...] | Opening


@dataclass(frozen=True)
class Example:
    """A prompt with one completion: what supervised fine-tuning learns from."""

    prompt: Prompt
    completion: str


@dataclass(frozen=True)
class Preference:
    """A prompt with a preferred and a dispreferred completion."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float = 0.0  # how much better chosen is, in the data's own unit; 0 where the data does not say
    swapped: bool = False  # True where label noise exchanged the two completions
    # Part of the data that the row is from, for reporting; not in repr, hence in no digest: nothing is trained on it
    subset: str = field(default="", repr=False)


@dataclass(frozen=True)
class Sequences:
    """Tokenised prompt + completion rows: the only layout that a training forward pass sees."""

    ids: Tensor  # int64 [N, L]
    attention_mask: Tensor  # bool [N, L], True = real token
    completion_mask: Tensor  # bool [N, L], True = completion token, up to and including the first EOS

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> Sequences:
        return Sequences(self.ids[rows], self.attention_mask[rows], self.completion_mask[rows])

    def to(self, device: torch.device) -> Sequences:
        """The same rows on another device."""
        return Sequences(self.ids.to(device), self.attention_mask.to(device), self.completion_mask.to(device))


@dataclass(frozen=True)
class PreferenceBatch:
    """Tokenised pairs; row i of `chosen` and row i of `rejected` share a prompt."""

    chosen: Sequences  # N rows
    rejected: Sequences  # N rows
    margin: Tensor  # float32 [N]

    def __len__(self) -> int:
        return len(self.chosen)

    def to(self, device: torch.device) -> PreferenceBatch:
        """The same pairs on another device."""
        return PreferenceBatch(self.chosen.to(device), self.rejected.to(device), self.margin.to(device))


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one rollout, with the indices that the sampling noise is a function of."""

    prompts: tuple[Prompt, ...]  # P prompts
    ids: tuple[tuple[int, ...], ...]  # P token lists, no padding
    index: tuple[int, ...]  # P row numbers in the data's prompt list


@dataclass(frozen=True)
class Rollout:
    """Completions sampled from a policy, prompt-major: rows i*k .. i*k+k-1 continue the same prompt."""

    sequences: Sequences  # N = P * k rows, right-padded
    prompts: tuple[Prompt, ...]  # N
    completions: tuple[str, ...]  # N texts, without EOS
    completion_ids: tuple[tuple[int, ...], ...]  # N token lists, the EOS included where there is one
    prompt_index: Tensor  # int64 [N]
    sample_index: Tensor  # int64 [N], 0..k-1
    truncated: Tensor  # bool [N], True = the length limit came before an EOS
    sampled_logprob: Tensor  # float32 [N], sum over the completion, as captured while sampling
    samples_per_prompt: int  # k
    tokenizer: PreTrainedTokenizerBase | None = None  # what the ids are of

    def __len__(self) -> int:
        return len(self.sequences)


@dataclass(frozen=True)
class Scores:
    """Rewards of a rollout."""

    reward: Tensor  # float32 [N], standardised: what the policy is trained on
    raw: Tensor  # float32 [N], the reward model's own scale
    logits: Tensor | None = (
        None  # float32 [N, K], of the classifier, K = 1 of a scalar one; of several, of their mean
    )
    disagreement: Tensor | None = None  # float32 [N], std of the standardised rewards of an ensemble's members
    terms: Mapping[str, Tensor] = field(default_factory=dict)  # float32 [N] each, what `reward` was summed from
    clipped: Tensor | None = None  # float32 [N], 1 where a clip changed `reward`; None without one

    def every_second(self, start: int) -> Scores:
        """Those of rows start, start + 2, ..."""
        rows = slice(start, None, 2)
        return Scores(
            self.reward[rows],
            self.raw[rows],
            None if self.logits is None else self.logits[rows],
            None if self.disagreement is None else self.disagreement[rows],
            {name: values[rows] for name, values in self.terms.items()},
            None if self.clipped is None else self.clipped[rows],
        )


@dataclass(frozen=True)
class Experience:
    """What the samples of one optimizer batch came to: all that advantages are made of. Of all processes, on the CPU.

    Figures of tokens are there for the algorithms that act token by token; column t belongs to the token at column
    t + 1 of the ids, as in `ops.logprobs`.
    """

    reward: Tensor  # float32 [N], prompt-major, standardised, without the KL
    shaped_reward: Tensor  # float32 [N], reward - beta * KL; equal to `reward` where the KL is in the loss
    mask: Tensor | None = None  # bool [N, L-1], True = a completion token
    token_reward: Tensor | None = None  # float32 [N, L-1], sums to the shaped reward
    value: Tensor | None = None  # float32 [N, L-1], the critic's, of the state before the token

    def __len__(self) -> int:
        return self.reward.shape[0]


@dataclass(frozen=True)
class PolicyBatch:
    """What a policy-gradient loss needs for one optimizer step (or a micro-batch of it)."""

    sequences: Sequences  # N rows
    old_logprob: Tensor  # float32 [N], log-prob of the completion under the policy that sampled it
    ref_logprob: Tensor  # float32 [N], the same under what the KL is measured to: the reference, or an anchor
    advantage: Tensor  # float32 [N], or [N, L-1] where every token is an action; detached
    old_token_logprob: Tensor | None = None  # float32 [N, L-1]
    old_value: Tensor | None = None  # float32 [N, L-1]
    value_target: Tensor | None = None  # float32 [N, L-1]

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, rows: Tensor | slice) -> PolicyBatch:
        def of_rows(column: Tensor | None) -> Tensor | None:
            return None if column is None else column[rows]

        return PolicyBatch(
            self.sequences[rows],
            self.old_logprob[rows],
            self.ref_logprob[rows],
            self.advantage[rows],
            of_rows(self.old_token_logprob),
            of_rows(self.old_value),
            of_rows(self.value_target),
        )


@dataclass(frozen=True)
class LossOutput:
    """A loss that is already divided by the step's normaliser, so that micro-batches add up.

    `metrics` holds detached scalars that add up in the same way; `maxima` those that combine by maximum.
    """

    loss: Tensor  # scalar
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    maxima: Mapping[str, Tensor] = field(default_factory=dict)
