"""Our side: the classes that `rlhf train-policy` and `rlhf train-rm` train with, in the loop that drives them there.

Nothing of it is made again here: `steps` of `rlhf_cli.train.loop` takes the same optimizer steps as a run (batch, loss,
backward, clip, optimizer), without evaluations, checkpoints and files between them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import workload
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import PreTrainedModel
from workload import Sizes

from rlhf_cli.algos.dpo import Dpo
from rlhf_cli.algos.rloo import Rloo
from rlhf_cli.data.tokenise import prompt_batch
from rlhf_cli.rewards.format import RewardFormat
from rlhf_cli.rewards.model import RewardModel
from rlhf_cli.rollout.engine import Sampling, generate
from rlhf_cli.runs.scoring import RewardOfRollout
from rlhf_cli.settings import Schedule, TrainSettings
from rlhf_cli.train.loop import Task, steps
from rlhf_cli.train.policy import PolicyTask
from rlhf_cli.train.precision import Precision
from rlhf_cli.train.preference import PreferenceTask, Reference, reference_logprobs
from rlhf_cli.train.reward import RewardLoss, RewardTask
from rlhf_cli.types import Rollout

BETA = 0.1
LR = 1e-6
_MANY = 1_000_000  # steps; as many as are asked for are taken
Row = dict[str, float]


class _NoRecorder:
    """Takes everything and keeps nothing."""

    def metrics(self, step: int, row: Mapping[str, float]) -> None:
        """A row of metrics."""

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of samples."""

    def message(self, text: str) -> None:
        """A line."""

    def sync(self) -> None:
        """To the disk."""


def _settings(batch_size: int, micro_batch: int | None) -> TrainSettings:
    return TrainSettings(
        steps=_MANY,
        batch_size=batch_size,
        micro_batch_size=micro_batch,
        lr=LR,
        schedule=Schedule.constant,
        warmup_ratio=0.0,
        max_grad_norm=1.0,
    )


def _frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model).eval().requires_grad_(False)


def _reward_model(sizes: Sizes, classifier: PreTrainedModel) -> RewardModel:
    longest = max(sizes.new_tokens, sizes.completion_tokens[1])
    text_format = RewardFormat(max_prompt_tokens=4 * sizes.prompt_tokens[1], max_completion_tokens=longest)
    return RewardModel(classifier, workload.make_tokenizer(sizes.vocab_size), text_format)


def rloo_task(sizes: Sizes, precision: Precision) -> PolicyTask:
    """Policy, reference and reward model of one size; the KL is in the reward."""
    policy = workload.make_policy(sizes).to(precision.device)
    scorer = _reward_model(sizes, workload.make_reward_model(policy).requires_grad_(False))
    prompts = [workload.text_of(ids) for ids in workload.make_prompts(sizes)]
    return PolicyTask(
        policy,
        _frozen_copy(policy),
        scorer.tokenizer,
        Rloo(k=sizes.k, beta=BETA, train=_settings(sizes.num_prompts * sizes.k, sizes.micro_batch)),
        RewardOfRollout(scorer, precision),
        None,
        prompts,
        prompts[:1],
        sizes.prompt_tokens[1],
        Sampling(sizes.new_tokens),
        precision,
        seed=0,
    )


def dpo_task(sizes: Sizes, precision: Precision, is_precomputed: bool = False) -> PreferenceTask:
    """Policy and reference, which is asked with each batch or was asked before the first step."""
    policy = workload.make_policy(sizes).to(precision.device)
    pairs = workload.make_pairs(sizes)
    if is_precomputed:
        known = reference_logprobs(policy, pairs, workload.PAD, len(pairs), precision)
        reference = Reference(logprobs=(known, known))
    else:
        reference = Reference(model=_frozen_copy(policy))
    algorithm = Dpo(beta=BETA, train=_settings(sizes.num_pairs, sizes.micro_batch))
    tokenizer = workload.make_tokenizer(sizes.vocab_size)
    return PreferenceTask(policy, reference, tokenizer, algorithm, pairs, pairs, precision, seed=0)


def rm_task(sizes: Sizes, precision: Precision) -> RewardTask:
    """A scalar reward model."""
    classifier = workload.make_reward_model(workload.make_policy(sizes)).to(precision.device)
    pairs = [(chosen, rejected, 0.0) for chosen, rejected in workload.make_pairs(sizes)]
    settings = _settings(sizes.num_pairs, sizes.micro_batch)
    return RewardTask(
        _reward_model(sizes, classifier), pairs, pairs, settings, precision, seed=0, loss=RewardLoss()
    )


TASKS: dict[str, Callable[[Sizes, Precision], Task]] = {
    "rloo_step": rloo_task,
    "dpo_step": dpo_task,
    "dpo_step_precomputed": lambda sizes, precision: dpo_task(sizes, precision, is_precomputed=True),
    "rm_step": rm_task,
}


def make_steps(case: str, sizes: Sizes, precision: Precision, folder: Path) -> Iterator[Row]:
    """Optimizer steps of a case without end; each gives its row of metrics."""
    task = TASKS[case](sizes, precision)
    settings: TrainSettings = task.settings  # type: ignore[attr-defined]
    return steps(task, settings, _MANY, folder, _NoRecorder(), precision, seed=0)


class OptimizerClock:
    """Seconds inside the optimizer's `step`, while the context is open."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds = 0.0
        self._started = 0.0

    def __enter__(self) -> OptimizerClock:
        def before(*_: Any) -> None:
            self._started = self.clock()

        def after(*_: Any) -> None:
            self.seconds += self.clock() - self._started

        self._hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def parts_of_step(iterator: Iterator[Row], clock: Callable[[], float]) -> Row:
    """One more step, with the seconds of its parts; they add up to `step_s`."""
    with OptimizerClock(clock) as optimizer:
        started = clock()
        row = next(iterator)
        total = clock() - started
    parts = {"step_s": total, "optimizer_s": optimizer.seconds}
    parts["forward_backward_s"] = row["time/train_s"] - optimizer.seconds
    before = total - row["time/train_s"]
    if "time/rollout_s" in row:
        parts |= {"rollout_s": row["time/rollout_s"], "score_s": row["time/score_s"]}
        before -= parts["rollout_s"] + parts["score_s"]
        parts["logprobs_s"] = before  # of policy and reference, advantages, collation
    else:
        parts["batch_s"] = before
    return parts


class OurGenerate:
    """Rollouts of one set of prompts, as the policy task makes them."""

    def __init__(self, sizes: Sizes, precision: Precision, prompts: list[list[int]], new_tokens: int) -> None:
        self.policy: nn.Module = workload.make_policy(sizes).to(precision.device)
        self.tokenizer = workload.make_tokenizer(sizes.vocab_size)
        texts = [workload.text_of(ids) for ids in prompts]
        longest = max(len(ids) for ids in prompts)
        self.batch = prompt_batch(self.tokenizer, texts, range(len(texts)), longest)
        self.k = sizes.k
        self.sampling = Sampling(new_tokens)
        self.precision = precision
        self.number = 0

    def __call__(self) -> Rollout:
        """One rollout, with noise of its own."""
        self.number += 1
        with self.precision.autocast():
            return generate(self.policy, self.tokenizer, self.batch, self.k, self.sampling, 0, self.number)


def wall_clock(device: torch.device) -> Callable[[], float]:
    """Seconds, when all that was asked of the device is done."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now
