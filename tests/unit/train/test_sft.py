from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures_models import CPU, FP32, byte_tokenizer, gpt2_lm, tiny_lm
from transformers import PreTrainedModel

from rlhf_cli.data.rows import Drawn
from rlhf_cli.data.tokenise import TokenPair, collate, encode_examples
from rlhf_cli.models.loading import load_causal_lm
from rlhf_cli.settings import TrainSettings
from rlhf_cli.train.optim import build_optimizer
from rlhf_cli.train.precision import Precision
from rlhf_cli.train.seeding import batch_rows
from rlhf_cli.train.sft import SftTask
from rlhf_cli.types import Example, Sequences

EXAMPLES = [
    Example("the film ", "was good ."),
    Example("a ", "warm , funny story !"),
    Example("the plot is ", "bad"),
    Example("it ", "is slow and the plot is bad ."),
    Example("", "good"),
]
ROWS = encode_examples(byte_tokenizer(), EXAMPLES, 50, 50)


def sft(
    model: PreTrainedModel, rows: list[TokenPair] | None = None, precision: Precision = FP32, **settings: object
) -> SftTask:
    chosen = ROWS if rows is None else rows
    return SftTask(model, byte_tokenizer(), chosen, chosen, TrainSettings(**settings), precision, seed=3)


def transformers_loss(model: PreTrainedModel, rows: list[TokenPair]) -> torch.Tensor:
    """The library's own mean cross-entropy, prompts and padding labelled -100."""
    batch = collate(rows, 0)
    labels = torch.where(batch.completion_mask, batch.ids, -100)
    return model(input_ids=batch.ids, attention_mask=batch.attention_mask.long(), labels=labels).loss


@pytest.fixture(params=["llama", "gpt2"])
def make(request: pytest.FixtureRequest) -> Callable[[], PreTrainedModel]:
    return tiny_lm if request.param == "llama" else lambda: gpt2_lm(byte_tokenizer())


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_loss_and_gradient_are_those_of_transformers(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    task = sft(model, batch_size=5)
    batch = task.batch(0)
    model.eval()  # GPT-2 has dropout
    loss = task.loss(batch.micro_batches[0], batch.normaliser).loss
    loss.backward()
    ours = gradients(model)
    expected = transformers_loss(model, ROWS)
    expected.backward()
    theirs = gradients(model)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4)


def test_micro_batches_add_up_to_the_batch(make: Callable[[], PreTrainedModel]) -> None:
    results = []
    for size in (None, 1, 2, 3):
        model = make()
        task = sft(model, batch_size=5, micro_batch_size=size)
        batch = task.batch(0)
        model.eval()
        loss = entropy = 0.0
        for micro in batch.micro_batches:
            output = task.loss(micro, batch.normaliser)
            output.loss.backward()
            loss += output.loss.item()
            entropy += float(output.metrics["entropy"])
        results.append((len(batch.micro_batches), loss, entropy, gradients(model)))
    assert [result[0] for result in results] == [1, 5, 3, 2]
    for _, loss, entropy, gradient in results[1:]:
        assert loss == pytest.approx(results[0][1], abs=1e-5)
        assert entropy == pytest.approx(results[0][2], abs=1e-5)
        for name, value in gradient.items():
            torch.testing.assert_close(value, results[0][3][name], atol=1e-5, rtol=1e-4)


def test_what_a_batch_counts() -> None:
    batch = sft(tiny_lm(), batch_size=5, micro_batch_size=2).batch(0)
    assert batch.normaliser == sum(len(completion) for _, completion in ROWS)
    assert batch.num_samples == 5
    assert batch.num_tokens == sum(len(prompt) + len(completion) for prompt, completion in ROWS)


def test_the_rows_of_a_step() -> None:
    task = sft(tiny_lm(), batch_size=2)
    for step in (0, 3, 1):
        (micro,) = task.batch(step).micro_batches
        expected = collate([ROWS[i] for i in batch_rows(3, step, 2, len(ROWS))], 0)
        assert torch.equal(micro.ids, expected.ids) and torch.equal(
            micro.completion_mask, expected.completion_mask
        )


def test_entropy_is_a_mean_over_completion_tokens() -> None:
    model = tiny_lm()
    for parameter in model.parameters():
        parameter.data.zero_()  # uniform over the vocabulary
    task = sft(model, batch_size=5)
    batch = task.batch(0)
    output = task.loss(batch.micro_batches[0], batch.normaliser)
    log_size = math.log(len(byte_tokenizer()))
    assert float(output.metrics["entropy"]) == pytest.approx(log_size, abs=1e-5)
    assert output.loss.item() == pytest.approx(log_size, abs=1e-5)


def test_validation_loss_and_perplexity(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    expected = transformers_loss(model, ROWS).item()
    for size in (1, 2, 5):
        task = sft(model, batch_size=size)
        model.train()
        evaluation = task.evaluate(1)
        assert not model.training, "dropout is off"
        assert evaluation.metrics["loss"] == pytest.approx(expected, abs=1e-5)
        assert evaluation.metrics["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
        assert evaluation.score == -evaluation.metrics["loss"]
        task.batch(0)
        assert model.training, "and on again"


def test_validation_is_on_the_validation_rows() -> None:
    model = tiny_lm()
    task = SftTask(model, byte_tokenizer(), ROWS[:3], ROWS[3:], TrainSettings(), FP32, seed=0)
    expected = transformers_loss(model, ROWS[3:]).item()
    assert task.evaluate(1).metrics["loss"] == pytest.approx(expected, abs=1e-5)


def test_validation_runs_in_the_precision_of_the_run() -> None:
    model = tiny_lm()
    full = sft(model).evaluate(1).metrics["loss"]
    half = sft(model, precision=Precision("bf16", CPU)).evaluate(1).metrics["loss"]
    assert half != full
    assert half == pytest.approx(full, rel=0.02)


def test_prompt_tokens_are_not_learned() -> None:
    model = tiny_lm()
    task = sft(model)
    (prompt, completion), *_ = ROWS
    batch = collate([(prompt, completion)], 0)
    nothing = Sequences(batch.ids, batch.attention_mask, torch.zeros_like(batch.completion_mask))
    task.loss(nothing, 1.0).loss.backward()
    assert not any(gradient.any() for gradient in gradients(model).values())


def test_it_learns_the_rows(tmp_path: Path) -> None:
    model = tiny_lm()
    task = sft(model, batch_size=5, lr=2e-2, weight_decay=0.0)
    optimizer = build_optimizer(model, task.settings)
    before = task.evaluate(0).metrics["perplexity"]
    for step in range(40):
        batch = task.batch(step)
        for micro in batch.micro_batches:
            task.loss(micro, batch.normaliser).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = task.evaluate(40).metrics["perplexity"]
    assert before > 100 and after < 3
    task.save(tmp_path)
    saved, _ = load_causal_lm("sft.path", str(tmp_path), CPU)
    assert sft(saved).evaluate(0).metrics["perplexity"] == pytest.approx(after, rel=1e-4)


def test_rows_that_are_drawn_anew_are_those_of_the_steps_epoch():
    drawn = Drawn(3, lambda number: ([5], [6 + number]))
    task = sft(tiny_lm(), drawn, batch_size=2)
    seen = torch.cat([part.ids[:, 1] for step in range(3) for part in task.batch(step).micro_batches]).tolist()
    assert (sorted(seen[:3]), sorted(seen[3:])) == ([6, 7, 8], [9, 10, 11])
