"""Our side: the classes that `rlhf train-policy` and `rlhf train-rm` train with, in the loop that drives them there.

Nothing of it is made again here: `steps` of `rlhf_cli.train.loop` takes the same optimizer steps as a run (batch, loss,
backward, clip, optimizer), without evaluations, checkpoints and files between them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import workload
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import PreTrainedModel
from workload import Sizes

from rlhf_cli.algos.dpo import Dpo
from rlhf_cli.algos.rloo import Rloo
from rlhf_cli.data.tokenise import prompt_batch
from rlhf_cli.models.low_precision import hold_matrices_in
from rlhf_cli.models.packing import enable_layouts
from rlhf_cli.rewards.format import RewardFormat
from rlhf_cli.rewards.model import RewardModel
from rlhf_cli.rollout.engine import Engine, Sampling
from rlhf_cli.runs.scoring import RewardOfRollout
from rlhf_cli.settings import Schedule, TrainSettings
from rlhf_cli.train.loop import Task, steps
from rlhf_cli.train.policy import PolicyTask
from rlhf_cli.train.precision import Precision
from rlhf_cli.train.preference import PreferenceTask, Reference, reference_logprobs
from rlhf_cli.train.reward import RewardLoss, RewardTask
from rlhf_cli.train.seeding import deterministic
from rlhf_cli.types import Rollout

BETA = 0.1
LR = 1e-6
_MANY = 1_000_000  # steps; as many as are asked for are taken
FP32_PRECISION = torch.backends.fp32_precision  # torch's own choice, as long as no peer has made another
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


def _policy(sizes: Sizes, precision: Precision) -> PreTrainedModel:
    """As `load_causal_lm` gives it."""
    model = workload.make_policy(sizes).to(precision.device)
    enable_layouts(model)
    return model


def _frozen_copy(model: PreTrainedModel, precision: Precision) -> PreTrainedModel:
    """A reference, as a run holds it."""
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    hold_matrices_in(reference, precision.dtype)
    return reference


def _reward_model(sizes: Sizes, classifier: PreTrainedModel) -> RewardModel:
    longest = max(sizes.new_tokens, sizes.completion_tokens[1])
    text_format = RewardFormat(max_prompt_tokens=4 * sizes.prompt_tokens[1], max_completion_tokens=longest)
    return RewardModel(classifier, workload.make_tokenizer(sizes.vocab_size), text_format)


def rloo_task(sizes: Sizes, precision: Precision) -> PolicyTask:
    """Policy, reference and reward model of one size; the KL is in the reward."""
    policy = _policy(sizes, precision)
    scorer = _reward_model(sizes, workload.make_reward_model(policy).requires_grad_(False))
    hold_matrices_in(scorer.model, precision.dtype)
    prompts = [workload.text_of(ids) for ids in workload.make_prompts(sizes)]
    return PolicyTask(
        policy,
        _frozen_copy(policy, precision),
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
    policy = _policy(sizes, precision)
    pairs = workload.make_pairs(sizes)
    if is_precomputed:
        known = reference_logprobs(policy, pairs, workload.PAD, TrainSettings(batch_size=len(pairs)), precision)
        reference = Reference(logprobs=(known, known))
    else:
        reference = Reference(model=_frozen_copy(policy, precision))
    algorithm = Dpo(beta=BETA, train=_settings(sizes.num_pairs, sizes.micro_batch))
    tokenizer = workload.make_tokenizer(sizes.vocab_size)
    return PreferenceTask(policy, reference, tokenizer, algorithm, pairs, pairs, precision, seed=0)


def rm_task(sizes: Sizes, precision: Precision) -> RewardTask:
    """A scalar reward model."""
    classifier = workload.make_reward_model(_policy(sizes, precision))
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
    with as_in_a_command():
        task = TASKS[case](sizes, precision)
    settings: TrainSettings = task.settings  # type: ignore[attr-defined]
    rows = steps(task, settings, _MANY, folder, _NoRecorder(), precision, seed=0)
    while True:
        with as_in_a_command():
            row = next(rows)
        yield row


@contextmanager
def as_in_a_command() -> Iterator[None]:
    """Kernels as every command of ours chooses them; what a peer runs with, TF32 for one, is put back afterwards."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.fp32_precision,
    )
    deterministic()
    torch.backends.fp32_precision = FP32_PRECISION
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        torch.backends.cuda.enable_cudnn_sdp(before[2])
        torch.backends.fp32_precision = before[3]


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
        self.policy = _policy(sizes, precision)
        self.tokenizer = workload.make_tokenizer(sizes.vocab_size)
        texts = [workload.text_of(ids) for ids in prompts]
        longest = max(len(ids) for ids in prompts)
        self.batch = prompt_batch(self.tokenizer, texts, range(len(texts)), longest)
        self.k = sizes.k
        self.sampling = Sampling(new_tokens)
        self.precision = precision
        self.engine = Engine(self.policy)
        self.number = 0

    def __call__(self) -> Rollout:
        """One rollout, with noise of its own."""
        self.number += 1
        with as_in_a_command(), self.precision.autocast():
            return self.engine.generate(self.tokenizer, self.batch, self.k, self.sampling, 0, self.number)


def wall_clock(device: torch.device) -> Callable[[], float]:
    """Seconds, when all that was asked of the device is done."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now
