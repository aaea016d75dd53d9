"""Linear probing: the head learns, and nothing else moves."""

from __future__ import annotations

import copy

import pytest
import torch
from fixtures_models import FP32
from fixtures_rewards import GRADES, SEPARABLE, any_model

from rlhf_cli.rewards.model import RewardModel
from rlhf_cli.settings import TrainSettings
from rlhf_cli.train.probing import head_parameters, probe_head
from rlhf_cli.train.reward import RewardLoss, RewardTask, encode

KINDS = [(kind, labels) for kind in ("llama", "gpt2", "distilbert") for labels in (1, GRADES)]


def task_for(reward: RewardModel, micro: int | None = None, entropy_bonus: float = 0.0) -> RewardTask:
    rows = encode(reward, SEPARABLE)
    settings = TrainSettings(batch_size=12, micro_batch_size=micro)
    return RewardTask(reward, rows, rows, settings, FP32, 3, RewardLoss(entropy_bonus=entropy_bonus))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("kind", "labels"), KINDS)
def test_the_head_is_all_above_the_backbone(kind: str, labels: int) -> None:
    model = any_model(kind, labels).model
    heads = {
        "distilbert": {"pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias"}
    }
    found = {id(parameter) for parameter in head_parameters(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in found}
    assert names == heads.get(kind, {"score.weight"})


@pytest.mark.parametrize(("kind", "labels"), KINDS)
def test_the_head_alone_moves_and_learns(kind: str, labels: int) -> None:
    reward = any_model(kind, labels, seed=3)
    task = task_for(reward)
    before, figures = weights(reward.model), task.evaluate(0).metrics
    accuracy = probe_head(task, 60, 0.05)
    after = weights(reward.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    head = {id(parameter) for parameter in head_parameters(reward.model)}
    assert moved == {name for name, parameter in reward.model.named_parameters() if id(parameter) in head}
    assert accuracy == task.evaluate(0).metrics["rm/accuracy"]
    assert accuracy == 1.0 > figures["rm/accuracy"]
    assert task.evaluate(0).metrics["loss"] < figures["loss"]


@pytest.mark.parametrize("entropy_bonus", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["gpt2", "distilbert"])
def test_dropout_is_off(kind: str, entropy_bonus: float) -> None:
    """With its noise two of them would end with heads of their own."""
    found = []
    for seed in (1, 2):
        reward = any_model(kind, GRADES)
        torch.manual_seed(seed)
        probe_head(task_for(reward, entropy_bonus=entropy_bonus), 3, 0.05)
        found.append(weights(reward.model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_micro_batches_add_up() -> None:
    found = []
    for micro in (None, 5):
        reward = any_model("llama", GRADES)
        probe_head(task_for(reward, micro=micro), 3, 0.05)
        found.append(reward.model.score.weight.detach().clone())
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)


def test_everything_can_be_trained_afterwards_but_what_was_frozen() -> None:
    reward = any_model("llama", 1)
    frozen = reward.model.model.embed_tokens.weight
    frozen.requires_grad_(False)
    probe_head(task_for(reward), 2, 0.05)
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in reward.model.parameters() if p is not frozen)
    assert all(parameter.grad is None for parameter in reward.model.parameters()), "no gradient is left"


def test_a_step_by_hand() -> None:
    """The first step of Adam is lr in the direction of the gradient's sign."""
    reward = any_model("llama", 1)
    twin = copy.deepcopy(reward)
    task = task_for(twin)
    batch = task.batch(0)
    twin.model.eval()
    task.loss(batch.micro_batches[0], batch.normaliser).loss.backward()
    probe_head(task_for(reward), 1, 0.01)
    moved = reward.model.score.weight - twin.model.score.weight
    torch.testing.assert_close(moved.detach(), -0.01 * twin.model.score.weight.grad.sign(), atol=1e-5, rtol=0)


def test_the_learning_rate_falls_to_nothing() -> None:
    rates = []
    step = torch.optim.AdamW.step

    def record(self: torch.optim.AdamW, *arguments: object) -> object:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", record)
        probe_head(task_for(any_model("llama", 1)), 4, 0.08)
    assert rates == pytest.approx([0.08, 0.06, 0.04, 0.02])
