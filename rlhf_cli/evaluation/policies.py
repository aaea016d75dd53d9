"""Measuring policies on the same prompts with the same noise, so that every difference is paired.

Metrics, per prompt (the mean over its samples), then averaged over prompts:

    reward/mean, reward/raw_mean   reward model, standardised and raw
    gold/mean                      true reward, where the data knows it
    kl/full, kl/k1                 KL to the reference, summed over the completion, nats
    length/mean, length/truncated_frac
    distinct/1, distinct/2         of the prompt's samples together
    perplexity/samples             of the policy's samples under the reference: exp(sum nll / sum tokens)
    perplexity/preferred           of the data's preferred completions under the policy
    reward/mean/<label>            over the prompts of one label, where the data has labels; gold/mean likewise
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.data.dataset import GoldReward
from rlhf_cli.data.tokenise import collate, encode_examples, prompt_batch
from rlhf_cli.evaluation.statistics import Bootstrap, Estimate
from rlhf_cli.evaluation.text_metrics import distinct_n_per_prompt
from rlhf_cli.models.causal import full_kls, sequence_logprobs
from rlhf_cli.ops.kl import k1
from rlhf_cli.rewards.model import Scorer
from rlhf_cli.rollout.engine import Sampling, generate
from rlhf_cli.train.precision import Precision
from rlhf_cli.types import Example, Opening, Preference, Prompt, Rollout

_BATCH_ROWS = 64  # rows per forward pass

# Also reported for the prompts of each label, where the data labels them.
_LABELLED = ("reward/mean", "gold/mean")

Column = NDArray[np.float64]


@dataclass(frozen=True)
class Policy:
    """A policy to measure."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Questions:
    """What every policy is asked, and how."""

    prompts: Sequence[Prompt]  # P
    preferred: Sequence[Preference]  # Q pairs; their chosen completions measure perplexity
    max_prompt_tokens: int
    max_completion_tokens: int
    sampling: Sampling
    samples_per_prompt: int
    seed: int  # of the sampling noise, the same for all policies


@dataclass(frozen=True)
class Measured:
    """One policy's figures before they are averaged."""

    name: str
    means: Mapping[str, Column]  # metric -> one number a prompt, [P]
    ratios: Mapping[str, tuple[Column, Column]]  # metric -> numerators and denominators; exp of their ratio
    rows: Sequence[Mapping[str, Any]]  # one a sample, as per_prompt.jsonl has them


def measure(
    policy: Policy,
    reference: Policy,
    reward_model: Scorer | None,
    gold: GoldReward | None,
    questions: Questions,
    precision: Precision,
) -> Measured:
    """Samples from a policy and measures the samples.

    Args:
        policy: what is measured.
        reference: what KL and sample perplexity are measured to. Where its vocabulary is another one, both are
            left out.
        reward_model: None leaves reward out.
        gold: None leaves gold reward out.
        questions: prompts, sampling, seed.
        precision: device and autocast.
    """
    k = questions.samples_per_prompt
    with precision.autocast():
        rollout = _sample(policy, questions)
    means: dict[str, Column] = {}
    columns: dict[str, Column] = {}
    if reward_model is not None:
        with precision.autocast():
            scores = reward_model.score_rollout(rollout)
        columns["reward/mean"] = _column(scores.reward)
        columns["reward/raw_mean"] = _column(scores.raw)
    if gold is not None:
        pairs = zip(rollout.prompts, rollout.completions, strict=True)
        columns["gold/mean"] = np.array([gold(prompt, text) for prompt, text in pairs])
    ratios: dict[str, tuple[Column, Column]] = {}
    lengths = np.array([len(ids) for ids in rollout.completion_ids], dtype=np.float64)
    if _same_vocabulary(policy.tokenizer, reference.tokenizer):
        temperature = questions.sampling.temperature
        with precision.autocast():
            columns["kl/full"] = _column(
                full_kls(policy.model, reference.model, rollout.sequences, temperature, _BATCH_ROWS)
            )
            own, _ = sequence_logprobs(policy.model, rollout.sequences, temperature, _BATCH_ROWS)
            theirs, _ = sequence_logprobs(reference.model, rollout.sequences, temperature, _BATCH_ROWS)
            plain, _ = sequence_logprobs(reference.model, rollout.sequences, 1.0, _BATCH_ROWS)
        columns["kl/k1"] = _column(k1(own, theirs))
        ratios["perplexity/samples"] = (_per_prompt(-_column(plain), k), _per_prompt(lengths, k))
    columns["length/mean"] = lengths
    columns["length/truncated_frac"] = _column(rollout.truncated)
    means |= {name: _per_prompt(column, k) for name, column in columns.items()}
    means |= _by_label(means, questions.prompts)
    for n in (1, 2):
        means[f"distinct/{n}"] = distinct_n_per_prompt(rollout.completions, k, n)
    if questions.preferred:
        ratios["perplexity/preferred"] = _preferred_nll(policy, questions, precision)
    return Measured(policy.name, means, ratios, _rows(policy.name, rollout, columns))


def summarise(
    measured: Sequence[Measured], reference: str, num_resamples: int, seed: int
) -> dict[str, dict[str, tuple[Estimate, Estimate | None]]]:
    """Estimates and paired differences to the reference: policy -> metric -> (value, difference).

    Args:
        measured: policies, the reference among them, all over the same prompts.
        reference: its name; it has no differences.
        num_resamples: of the paired bootstrap.
        seed: of the resampling.
    """
    base = next(one for one in measured if one.name == reference)
    bootstraps: dict[int, Bootstrap] = {}

    def bootstrap(n: int) -> Bootstrap:
        return bootstraps.setdefault(n, Bootstrap(n, num_resamples, seed))

    table: dict[str, dict[str, tuple[Estimate, Estimate | None]]] = {}
    for one in measured:
        cells: dict[str, tuple[Estimate, Estimate | None]] = {}
        for metric, column in one.means.items():
            draws = bootstrap(len(column))
            delta = None
            if one is not base and metric in base.means:
                delta = draws.mean_delta(column, base.means[metric])
            cells[metric] = (draws.mean(column), delta)
        for metric, (num, den) in one.ratios.items():
            draws = bootstrap(len(num))
            delta = None
            if one is not base and metric in base.ratios:
                delta = draws.ratio_delta(num, den, *base.ratios[metric], transform=np.exp)
            cells[metric] = (draws.ratio(num, den, transform=np.exp), delta)
        table[one.name] = cells
    return table


def _sample(policy: Policy, questions: Questions) -> Rollout:
    batch = prompt_batch(
        policy.tokenizer, questions.prompts, range(len(questions.prompts)), questions.max_prompt_tokens
    )
    return generate(
        policy.model,
        policy.tokenizer,
        batch,
        questions.samples_per_prompt,
        questions.sampling,
        questions.seed,
        0,
    )


def _preferred_nll(policy: Policy, questions: Questions, precision: Precision) -> tuple[Column, Column]:
    """Negative log-likelihood and token count of each preferred completion."""
    rows = encode_examples(
        policy.tokenizer,
        [Example(pair.prompt, pair.chosen) for pair in questions.preferred],
        questions.max_prompt_tokens,
        questions.max_completion_tokens,
    )
    sequences = collate(rows, int(policy.tokenizer.pad_token_id)).to(precision.device)
    with precision.autocast():
        logprob, _ = sequence_logprobs(policy.model, sequences, 1.0, _BATCH_ROWS)
    return -_column(logprob), np.array([len(completion) for _, completion in rows], dtype=np.float64)


def _rows(name: str, rollout: Rollout, columns: Mapping[str, Column]) -> list[dict[str, Any]]:
    return [
        {
            "policy": name,
            "prompt_index": int(rollout.prompt_index[i]),
            "sample": int(rollout.sample_index[i]),
            "prompt": _plain(rollout.prompts[i]),
            "completion": rollout.completions[i],
            **{metric: float(column[i]) for metric, column in columns.items()},
        }
        for i in range(len(rollout))
    ]


def _by_label(means: Mapping[str, Column], prompts: Sequence[Prompt]) -> dict[str, Column]:
    """Rewards of the prompts of each label: how much of a gain comes from prompts that begin badly."""
    labels = [prompt.label if isinstance(prompt, Opening) else "" for prompt in prompts]
    return {
        f"{metric}/{label}": means[metric][np.array([one == label for one in labels])]
        for metric in _LABELLED
        if metric in means
        for label in dict.fromkeys(labels)
        if label
    }


def _plain(prompt: Prompt) -> Any:
    assert not isinstance(prompt, Opening), "rollouts have the text of what was cut"
    return prompt if isinstance(prompt, str) else [{"role": t.role, "content": t.content} for t in prompt]


def _same_vocabulary(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    return one is other or one.get_vocab() == other.get_vocab()


def _per_prompt(column: Column, k: int) -> Column:
    return column.reshape(-1, k).mean(axis=1)


def _column(values: Tensor) -> Column:
    return values.detach().to("cpu", torch.float64).numpy()
