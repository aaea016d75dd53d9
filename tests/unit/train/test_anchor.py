"""The anchor that follows the policy: where it is after every step, what it does, and that a checkpoint has it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_policy import FP32, N, policy_task
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.algos.reinforce import Reinforce
from rlhf_cli.models.causal import sequence_logprobs
from rlhf_cli.train.anchor import EmaAnchor
from rlhf_cli.train.checkpoint import Checkpoints
from rlhf_cli.train.loop import Durable, fit
from rlhf_cli.train.policy import PolicyTask
from rlhf_cli.train.stopping import StopSignal

Weights = dict[str, Tensor]
STEPS = 4


class Recording:
    """What policy and anchor weigh after each step, and the rows of metrics."""

    def __init__(self, task: PolicyTask, anchor: EmaAnchor) -> None:
        self.task, self.anchor = task, anchor
        self.policy: list[Weights] = []
        self.anchors: list[Weights] = []
        self.rows: list[dict[str, Any]] = []

    def metrics(self, step: int, row: Any) -> None:
        self.policy.append(copied(dict(self.task.policy.named_parameters())))
        self.anchors.append(copied(self.anchor.weights()))
        self.rows.append(row)

    def samples(self, step: int, rows: Any) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def sync(self) -> None:
        pass


def copied(weights: Weights) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def anchored(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mu: float
) -> tuple[PolicyTask, EmaAnchor]:
    anchor = EmaAnchor(copy.deepcopy(model), mu, lambda: dict(model.named_parameters()))
    task = policy_task(model, tokenizer, Reinforce(beta=0.5), more={"anchor": anchor})
    return task, anchor


def train(task: PolicyTask, anchor: EmaAnchor, folder: Path, durable: Durable | None = None) -> Recording:
    folder.mkdir(exist_ok=True)
    seen = Recording(task, anchor)
    fit(task, task.settings, STEPS, folder, seen, FP32, 3, durable)
    return seen


def test_it_is_the_moving_average_by_hand(
    make_model: Callable[..., PreTrainedModel], word_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    task, anchor = anchored(make_model(), word_tokenizer, 0.3)
    expected = {name: tensor.double() for name, tensor in copied(anchor.weights()).items()}
    start = dict(expected)
    seen = train(task, anchor, tmp_path)
    assert len(seen.policy) == STEPS
    for policy, found in zip(seen.policy, seen.anchors, strict=True):
        assert found.keys() == policy.keys()
        expected = {name: 0.7 * old + 0.3 * policy[name].double() for name, old in expected.items()}
        for name, tensor in expected.items():
            assert torch.allclose(found[name].double(), tensor, rtol=0, atol=1e-6), name
    # far enough from both ends to be told from them
    assert max(float((expected[name] - start[name]).abs().max()) for name in start) > 1e-2
    assert max(float((expected[name] - seen.policy[-1][name]).abs().max()) for name in start) > 1e-2


@pytest.mark.parametrize("mu", [0.0, 1.0])
def test_at_its_ends_it_is_the_start_or_the_policy_to_the_bit(
    make_llama: Callable[..., PreTrainedModel], word_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, mu: float
):
    task, anchor = anchored(make_llama(), word_tokenizer, mu)
    start = copied(anchor.weights())
    seen = train(task, anchor, tmp_path)
    for policy, found in zip(seen.policy, seen.anchors, strict=True):
        expected = policy if mu else start
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not all(torch.equal(seen.policy[-1][name], start[name]) for name in start)


def test_the_kl_acts_towards_it_and_is_reported_to_the_reference(
    make_llama: Callable[..., PreTrainedModel], word_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    task, anchor = anchored(make_llama(), word_tokenizer, 0.3)
    seen = train(task, anchor, tmp_path)
    assert seen.rows[0]["kl/k1"] == seen.rows[0]["kl/anchor"] == 0.0
    batch = task.batch(STEPS)
    (micro,) = batch.micro_batches
    policy, anchored_to, reference = (
        sequence_logprobs(model, micro.sequences, 1.0, N)[0].double()
        for model in (task.policy, anchor.model, task.reference)
    )
    assert torch.allclose(micro.ref_logprob.double(), anchored_to, atol=1e-5)
    to_anchor, to_reference = float((policy - anchored_to).mean()), float((policy - reference).mean())
    assert abs(to_anchor - to_reference) > 1e-2
    assert batch.metrics["kl/k1"] == pytest.approx(to_reference, abs=1e-5)
    assert batch.metrics["kl/anchor"] == pytest.approx(to_anchor, abs=1e-5)
    shaped = batch.metrics["reward/mean"] - 0.5 * to_anchor
    assert batch.metrics["reward/shaped_mean"] == pytest.approx(shaped, abs=1e-5)
    # each advantage is a shaped reward less the one baseline
    rewards = torch.tensor([sample["reward"] for sample in batch.samples], dtype=torch.float64)
    by_hand = rewards - 0.5 * (policy - anchored_to) - batch.metrics["baseline"]
    assert torch.allclose(micro.advantage.double(), by_hand, atol=1e-5)
    # an evaluation measures to the reference too
    assert task.evaluate(STEPS).metrics["kl/full"] > 1e-2


def test_a_checkpoint_has_it_and_gives_it_back(
    make_llama: Callable[..., PreTrainedModel], word_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1, lambda line: None)
    whole = train(*anchored(make_llama(), word_tokenizer, 0.3), tmp_path, Durable(checkpoints, 2, StopSignal()))
    checkpoint = checkpoints.latest()
    assert checkpoint is not None and checkpoint.step == 2
    kept = {name: checkpoint.tensors[f"task/{name}"] for name in whole.anchors[1]}
    assert all(torch.equal(kept[name], tensor) for name, tensor in whole.anchors[1].items())
    # another start: whatever is not taken from the checkpoint would show
    task, anchor = anchored(make_llama(seed=1), word_tokenizer, 0.3)
    task.reference = policy_task(make_llama(), word_tokenizer).reference
    rest = train(task, anchor, tmp_path, Durable(checkpoints, 9, StopSignal(), checkpoint))
    assert len(rest.anchors) == STEPS - 2
    for found, expected in zip((rest.policy, rest.anchors), (whole.policy, whole.anchors), strict=True):
        for one, other in zip(found, expected[2:], strict=True):
            assert all(torch.equal(one[name], other[name]) for name in other)
    assert [row["kl/anchor"] for row in rest.rows] == [row["kl/anchor"] for row in whole.rows[2:]]
