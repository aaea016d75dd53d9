from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from fixtures_models import CPU, FP32, reward_model

from rlhf_cli.data.rows import Drawn
from rlhf_cli.rewards.model import RewardModel, load_reward_model
from rlhf_cli.rewards.scoring import score_sequences
from rlhf_cli.settings import TrainSettings
from rlhf_cli.train.optim import build_optimizer
from rlhf_cli.train.precision import Precision
from rlhf_cli.train.reward import EncodedPair, RewardLoss, RewardTask, encode
from rlhf_cli.train.seeding import batch_rows
from rlhf_cli.types import Preference

PAIRS = [
    Preference("the film ", "was good .", "was bad .", margin=0.5),
    Preference("a ", "warm , funny story !", "slow plot", margin=2.0),
    Preference("the plot is ", "funny", "bad and slow .", margin=0.0),
    Preference("the ", "story is warm .", "story is slow .", margin=1.0),
]
EQUAL = Preference("the ", "film", "film")  # a tie, whatever the weights


def task_for(
    reward: RewardModel,
    pairs: Sequence[Preference] = PAIRS,
    loss: RewardLoss = RewardLoss(),  # noqa: B008 - frozen
    precision: Precision = FP32,
    **settings: object,
) -> RewardTask:
    encoded = encode(reward, pairs)
    training = TrainSettings(**{"batch_size": len(pairs), **settings})
    return RewardTask(reward, encoded, encoded, training, precision, seed=3, loss=loss)


def raw(reward: RewardModel, pairs: Sequence[Preference] = PAIRS) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the chosen and of the rejected, one text at a time."""
    prompts = [pair.prompt for pair in pairs]
    chosen = reward.score(prompts, [pair.chosen for pair in pairs], batch_size=1).raw
    return chosen, reward.score(prompts, [pair.rejected for pair in pairs], batch_size=1).raw


def test_encoding_is_that_of_the_reward_model() -> None:
    reward = reward_model(max_prompt_tokens=3, max_completion_tokens=4)
    expected: list[EncodedPair] = [
        (reward.encode(p.prompt, p.chosen), reward.encode(p.prompt, p.rejected), p.margin) for p in PAIRS
    ]
    assert encode(reward, PAIRS) == expected
    assert max(len(prompt) for (prompt, _), _, _ in expected) == 3
    assert max(len(completion) for (_, completion), _, _ in expected) == 4


@pytest.mark.parametrize("kind", ["llama", "gpt2", "distilbert"])
@pytest.mark.parametrize("use_margin", [False, True])
def test_loss_by_hand(kind: str, use_margin: bool) -> None:
    reward = reward_model(kind)
    task = task_for(reward, loss=RewardLoss(use_margin))
    batch = task.batch(0)
    reward.model.eval()
    output = task.loss(batch.micro_batches[0], batch.normaliser)
    chosen, rejected = raw(reward)
    difference = (chosen - rejected).double()
    shift = torch.tensor([pair.margin for pair in PAIRS]) if use_margin else 0.0
    expected = float(torch.log1p(torch.exp(-(difference - shift))).mean())
    assert output.loss.item() == pytest.approx(expected, abs=1e-5)
    # what is reported is of the scores themselves, without the margin
    assert float(output.metrics["rm/accuracy"]) == float((difference > 0).double().mean())
    assert float(output.metrics["rm/margin"]) == pytest.approx(float(difference.mean()), abs=1e-5)


def test_micro_batches_add_up_to_the_batch() -> None:
    results = []
    for size in (None, 1, 3):
        reward = reward_model("gpt2")
        task = task_for(reward, loss=RewardLoss(use_margin=True), micro_batch_size=size)
        batch = task.batch(0)
        reward.model.eval()
        outputs = [task.loss(micro, batch.normaliser) for micro in batch.micro_batches]
        sum(output.loss for output in outputs).backward()
        figures = [sum(float(output.metrics[name]) for output in outputs) for name in ("rm/accuracy", "rm/margin")]
        gradient = torch.cat([p.grad.flatten() for p in reward.model.parameters() if p.grad is not None])
        results.append((len(outputs), sum(output.loss.item() for output in outputs), figures, gradient))
    assert [result[0] for result in results] == [1, 4, 2]
    for _, loss, figures, gradient in results[1:]:
        assert loss == pytest.approx(results[0][1], abs=1e-5)
        assert figures == pytest.approx(results[0][2], abs=1e-5)
        torch.testing.assert_close(gradient, results[0][3], atol=1e-5, rtol=1e-4)


def test_what_a_batch_counts() -> None:
    batch = task_for(reward_model(), micro_batch_size=3).batch(0)
    assert batch.normaliser == 4 and batch.num_samples == 8
    tokens = [len(prompt) + len(done) for pair in encode(reward_model(), PAIRS) for prompt, done in pair[:2]]
    assert batch.num_tokens == sum(tokens)


def test_the_rows_of_a_step() -> None:
    task = task_for(reward_model(), batch_size=2)
    for step in (0, 3, 1):
        (micro,) = task.batch(step).micro_batches
        expected = [PAIRS[i].margin for i in batch_rows(3, step, 2, len(PAIRS))]
        assert micro.margin.tolist() == expected


def test_a_tie_counts_one_half() -> None:
    reward = reward_model()
    one_right = next(pair for pair, c, r in zip(PAIRS, *raw(reward), strict=True) if c > r)
    task = task_for(reward, [EQUAL, one_right, EQUAL, EQUAL])
    batch = task.batch(0)
    output = task.loss(batch.micro_batches[0], batch.normaliser)
    assert float(output.metrics["rm/accuracy"]) == (1 + 3 / 2) / 4
    assert task.evaluate(0).metrics["rm/accuracy"] == (1 + 3 / 2) / 4


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_validation_figures(size: int) -> None:
    reward = reward_model("gpt2")
    task = task_for(reward, loss=RewardLoss(use_margin=True), batch_size=size)
    reward.model.train()
    evaluation = task.evaluate(1)
    assert not reward.model.training, "dropout is off"
    chosen, rejected = raw(reward)
    difference = (chosen - rejected).double()
    loss = float(torch.log1p(torch.exp(-difference)).mean())  # without margins: comparable over data
    assert evaluation.metrics["loss"] == pytest.approx(loss, abs=1e-5)
    assert evaluation.metrics["rm/accuracy"] == pytest.approx(float((difference > 0).double().mean()))
    assert evaluation.metrics["rm/margin"] == pytest.approx(float(difference.mean()), abs=1e-5)
    assert evaluation.score == -evaluation.metrics["loss"]
    task.batch(0)
    assert reward.model.training, "and on again"


def test_validation_is_on_the_validation_pairs() -> None:
    reward = reward_model()
    encoded = encode(reward, PAIRS)
    task = RewardTask(reward, encoded[:3], encoded[3:], TrainSettings(), FP32, seed=0, loss=RewardLoss())
    chosen, rejected = raw(reward, PAIRS[3:])
    assert task.evaluate(0).metrics["rm/margin"] == pytest.approx(float(chosen - rejected), abs=1e-5)


def test_validation_runs_in_the_precision_of_the_run() -> None:
    reward = reward_model()
    full = task_for(reward).evaluate(0).metrics["rm/margin"]
    half = task_for(reward, precision=Precision("bf16", CPU)).evaluate(0).metrics["rm/margin"]
    assert half != full
    assert half == pytest.approx(full, abs=0.1)


def test_the_reward_of_an_untrained_pair_costs_ln_2() -> None:
    reward = reward_model()
    reward.model.score.weight.data.zero_()
    assert task_for(reward).evaluate(0).metrics == pytest.approx(
        {"loss": math.log(2), "rm/accuracy": 0.5, "rm/margin": 0.0}
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2", "distilbert"])
def test_training_separates_the_pairs(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)  # dropout of gpt2 and distilbert
    reward = reward_model(kind)
    # half of the pairs say the opposite of the other half's words, so that one word does not decide
    pairs = [*PAIRS, Preference("it is not ", "bad .", "good ."), Preference("it is not ", "slow .", "warm .")]
    task = task_for(reward, pairs, lr=1e-2)
    optimizer = build_optimizer(reward.model, task.settings)
    before = task.evaluate(0)
    for step in range(40):
        batch = task.batch(step)
        for micro in batch.micro_batches:
            task.loss(micro, batch.normaliser).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = task.evaluate(40)
    assert before.metrics["rm/accuracy"] < 1
    assert after.metrics["rm/accuracy"] == 1
    assert after.metrics["loss"] < 0.2 and after.score > before.score
    task.save(tmp_path)
    saved = load_reward_model("rm.path", str(tmp_path), CPU)
    chosen, rejected = raw(saved, pairs)
    assert bool((chosen > rejected).all())
    assert float((chosen - rejected).mean()) == pytest.approx(after.metrics["rm/margin"], abs=1e-4)


def test_chosen_and_rejected_are_not_exchanged() -> None:
    reward = reward_model()
    (micro,) = task_for(reward).batch(0).micro_batches
    reward.model.eval()
    chosen, rejected = raw(reward)
    order = batch_rows(3, 0, 4, 4)
    torch.testing.assert_close(score_sequences(reward.model, micro.chosen).detach()[:, 0], chosen[order])
    torch.testing.assert_close(score_sequences(reward.model, micro.rejected).detach()[:, 0], rejected[order])


def test_pairs_that_are_drawn_anew_are_those_of_the_steps_epoch():
    reward = reward_model()
    drawn = Drawn(2, lambda number: Preference("the ", " ".join(["good"] * (number + 1)), "bad"))
    task = RewardTask(
        reward, encode(reward, drawn), encode(reward, PAIRS), TrainSettings(batch_size=2), FP32, 3, RewardLoss()
    )
    lengths = [
        sorted(part.chosen.completion_mask.sum(-1).tolist())
        for step in range(2)
        for part in task.batch(step).micro_batches
    ]
    words = [len(reward.encode("the ", " ".join(["good"] * n))[1]) for n in (1, 2, 3, 4)]
    assert lengths == [words[:2], words[2:]]
