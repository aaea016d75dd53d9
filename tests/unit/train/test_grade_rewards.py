"""Training over grades: the loss by hand, and an entropy bonus that knows nothing of how a step is cut."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures_models import FP32
from fixtures_rewards import GRADES, SEPARABLE, graded_model, marginal_entropy

from rlhf_cli.models.dropout import set_dropout
from rlhf_cli.rewards.model import RewardModel
from rlhf_cli.settings import GradeLoss, TrainSettings
from rlhf_cli.train.optim import build_optimizer
from rlhf_cli.train.reward import RewardLoss, RewardTask, encode
from rlhf_cli.types import Preference

PAIRS = [
    *SEPARABLE[:5],
    Preference("the film ", "was good .", "was bad ."),
    Preference("a ", "warm , funny story !", "slow plot"),
]
BONUS = 0.7
N = len(PAIRS)


def task_for(
    reward: RewardModel, entropy_bonus: float = 0.0, micro: int | None = None, dropout: float = 0.0
) -> RewardTask:
    set_dropout("rm.dropout", reward.model, dropout)
    rows = encode(reward, PAIRS)
    settings = TrainSettings(batch_size=N, micro_batch_size=micro, lr=5e-3)
    return RewardTask(reward, rows, rows, settings, FP32, 3, RewardLoss(entropy_bonus=entropy_bonus))


def step(task: RewardTask) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradient and summed figures of the first step."""
    task.model.zero_grad()
    batch = task.batch(0)
    figures: dict[str, float] = {"loss": 0.0}
    for micro_batch in batch.micro_batches:
        output = task.loss(micro_batch, batch.normaliser)
        output.loss.backward()
        figures["loss"] += output.loss.item()
        for name, value in output.metrics.items():
            figures[name] = figures.get(name, 0.0) + float(value)
    return {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}, figures


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert scale > 0.01
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * scale, rtol=0)


def probabilities(reward: RewardModel) -> tuple[torch.Tensor, torch.Tensor]:
    """p [N, K] of the chosen and of the rejected, with gradient, one text at a time."""
    found = []
    for side in ("chosen", "rejected"):
        rows = [reward.encode(pair.prompt, getattr(pair, side)) for pair in PAIRS]
        found.append(torch.cat([reward.model(torch.tensor([[*a, *b]])).logits.softmax(-1) for a, b in rows]))
    return found[0], found[1]


@pytest.mark.parametrize("kind", ["llama", "distilbert"])
@pytest.mark.parametrize("loss", list(GradeLoss))
def test_loss_and_figures_by_hand(loss: GradeLoss, kind: str) -> None:
    reward = graded_model(kind, 3, grade_loss=loss.value)
    task = task_for(reward)
    _, figures = step(task)
    evaluation = task.evaluate(0).metrics
    with torch.no_grad():
        chosen, rejected = (p.double() for p in probabilities(reward))
    wins = torch.stack([torch.outer(p, q).tril(-1).sum() for p, q in zip(chosen, rejected, strict=True)])
    loses = torch.stack([torch.outer(p, q).triu(1).sum() for p, q in zip(chosen, rejected, strict=True)])
    ties = (chosen * rejected).sum(-1)
    probability = {
        GradeLoss.strict: wins,
        GradeLoss.half_tie: wins + ties / 2,
        GradeLoss.renorm: wins / (wins + loses),
    }[loss]
    grades = torch.arange(1.0, GRADES + 1).double()
    margin = chosen @ grades - rejected @ grades
    entropy = -(torch.cat([chosen, rejected]) * torch.cat([chosen, rejected]).log()).sum(-1)
    expected = {
        "loss": float(-probability.log().mean()),
        "rm/accuracy": float((margin > 0).double().mean()),
        "rm/margin": float(margin.mean()),
    }
    assert figures == pytest.approx(expected, abs=1e-5)
    assert evaluation == pytest.approx({**expected, "rm/entropy": float(entropy.mean())}, abs=1e-5)
    assert 0 < expected["rm/accuracy"] < 1 and task.evaluate(0).score == -evaluation["loss"]


def test_the_bonus_is_the_entropy_of_the_whole_steps_mean_distribution() -> None:
    """By autograd through the mean itself, which no micro-batch sees."""
    reward = graded_model()
    plain, _ = step(task_for(reward))
    gradient, figures = step(task_for(reward, BONUS))
    reward.model.zero_grad()
    chosen, rejected = probabilities(reward)
    entropy = marginal_entropy(torch.cat([chosen, rejected]).mean(0))
    entropy.backward()
    expected = {
        name: plain[name] - BONUS * parameter.grad
        for name, parameter in reward.model.named_parameters()
        if parameter.grad is not None
    }
    assert_close(gradient, expected)
    assert figures["rm/marginal_entropy"] == pytest.approx(entropy.item(), abs=1e-5)
    assert max(float((gradient[name] - plain[name]).abs().max()) for name in plain) > 1e-2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_how_a_step_is_cut_changes_nothing(kind: str) -> None:
    whole, figures = step(task_for(graded_model(kind), BONUS))
    for micro, parts in ((1, N), (2, 4), (3, 3), (N, 1)):
        task = task_for(graded_model(kind), BONUS, micro)
        gradient, found = step(task)
        assert len(task.batch(0).micro_batches) == parts
        assert_close(gradient, whole)
        assert found == pytest.approx(figures, abs=1e-5)


@pytest.mark.parametrize("micro", [None, 3])
def test_with_dropout_the_mean_is_of_what_the_loss_sees(micro: int | None) -> None:
    """-(1/n) sum p log m is H(m) where m is the mean of these very p, under the same noise."""
    torch.manual_seed(5)
    task = task_for(graded_model("gpt2"), BONUS, micro, dropout=0.5)
    _, figures = step(task)
    assert task._marginal is not None
    assert figures["rm/marginal_entropy"] == pytest.approx(float(marginal_entropy(task._marginal)), abs=1e-5)
    still = task_for(graded_model("gpt2"), BONUS, micro)
    assert abs(step(still)[1]["rm/marginal_entropy"] - figures["rm/marginal_entropy"]) > 1e-3


def test_without_a_bonus_no_mean_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_for(graded_model())
    monkeypatch.setattr(task, "_find_marginal", lambda _: pytest.fail("asked for"))
    assert "rm/marginal_entropy" not in step(task)[1]


@pytest.mark.parametrize("loss", list(GradeLoss))
def test_training_separates_the_pairs_and_uses_more_grades_with_a_bonus(loss: GradeLoss) -> None:
    found = []
    for bonus in (0.0, 1.0):
        task = task_for(graded_model(grade_loss=loss.value), bonus)
        optimizer = build_optimizer(task.model, task.settings)
        for number in range(40):
            batch = task.batch(number)
            task.loss(batch.micro_batches[0], batch.normaliser).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert task.evaluate(0).metrics["rm/accuracy"] == 1.0
        with torch.no_grad():
            p = torch.cat(probabilities(task.reward_model))
        found.append(float(marginal_entropy(p.mean(0))))
    assert found[0] < found[1] <= math.log(GRADES)


def test_two_processes_find_the_gradient_of_one() -> None:
    script = Path(__file__).with_name("entropy_checks.py")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "one gradient\n"
