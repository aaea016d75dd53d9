from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from fixtures_models import CPU, FP32, byte_tokenizer, gpt2_lm, tiny_lm
from torch import nn
from transformers import PreTrainedModel

from rlhf_cli.algos.dpo import Dpo
from rlhf_cli.data.tokenise import encode_completion, encode_prompt
from rlhf_cli.models.causal import token_logprobs
from rlhf_cli.settings import TrainSettings
from rlhf_cli.train.distributed import World
from rlhf_cli.train.optim import build_optimizer
from rlhf_cli.train.preference import (
    EncodedPair,
    PreferenceTask,
    Reference,
    collate_both,
    reference_logprobs,
)

TEXTS = [
    ("the film ", "was good . ", "was bad and slow . "),
    ("a ", "warm , funny story !", "slow plot"),
    ("", "funny", "the plot is bad and slow . "),  # the first token is predicted from EOS
    ("the ", "", "story is slow ."),  # nothing but the EOS
    ("the plot is ", "a warm film", "good"),
]


def encoded(prompt: str, *completions: str) -> EncodedPair:
    ids = encode_prompt(byte_tokenizer(), prompt, 24)
    chosen, rejected = ((ids, encode_completion(byte_tokenizer(), text, 16, True)) for text in completions)
    return chosen, rejected


PAIRS = [encoded(*texts) for texts in TEXTS]
PAD = int(byte_tokenizer().pad_token_id)
MODELS = {"llama": tiny_lm, "gpt2": lambda: gpt2_lm(byte_tokenizer())}


def task_for(
    model: PreTrainedModel,
    reference: Reference | None = None,
    algo: Dpo | None = None,
    pairs: Sequence[EncodedPair] = PAIRS,
    world: World | None = None,
    **settings: Any,
) -> PreferenceTask:
    training = TrainSettings(**{"batch_size": 5, "lr": 1e-2, **settings})
    return PreferenceTask(
        model,
        Reference(model=twin(model)) if reference is None else reference,
        byte_tokenizer(),
        replace(algo or Dpo(), train=training),
        pairs,
        pairs,
        FP32,
        seed=7,
        world=world or World(),
    )


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with weights of its own."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


def step(task: PreferenceTask, number: int = 0) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Loss and metrics of a batch, and its gradient."""
    task.model.zero_grad()
    batch = task.batch(number)
    sums: dict[str, float] = {}
    for part in batch.micro_batches:
        output = task.loss(part, batch.normaliser)
        output.loss.backward()
        for name, value in {"loss": output.loss.detach(), **output.metrics}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums, {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}


def train(task: PreferenceTask, num_steps: int) -> list[dict[str, float]]:
    """The metrics of each step."""
    optimizer, rows = build_optimizer(task.model, task.settings), []
    for number in range(num_steps):
        rows.append(step(task, number)[0])
        optimizer.step()
    return rows


def slow_loss(
    model: PreTrainedModel, reference: PreTrainedModel, pairs: Sequence[EncodedPair], beta: float
) -> float:
    """One completion at a time, one token at a time."""

    def logprob(of: nn.Module, prompt: list[int], completion: list[int]) -> float:
        with torch.no_grad():
            logits = of(torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
        return sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(completion))

    total = 0.0
    for chosen, rejected in pairs:
        h = [logprob(model, *side) - logprob(reference, *side) for side in (chosen, rejected)]
        total += math.log1p(math.exp(-beta * (h[0] - h[1])))
    return total / len(pairs)


@pytest.mark.parametrize("kind", MODELS)
def test_the_first_step_costs_exactly_ln_2_though_the_architecture_has_dropout(kind: str) -> None:
    task = task_for(MODELS[kind]().train())
    for size in (None, 2):
        task.micro_batch_size = size or 5
        sums, gradient = step(task)
        # sums of float32: n/n is 1, a fifth five times is not
        assert sums["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert (sums["dpo/margin"], sums["dpo/chosen_reward"], sums["dpo/rejected_reward"]) == (0.0, 0.0, 0.0)
        assert sums["dpo/accuracy"] == pytest.approx(0.5, abs=1e-7)
        assert max(float(grad.abs().max()) for grad in gradient.values()) > 1e-3
    assert not task.model.training and not task.reference.model.training  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", MODELS)
def test_after_a_step_the_loss_is_that_of_a_slow_implementation(kind: str) -> None:
    task = task_for(MODELS[kind](), algo=Dpo(beta=0.3))
    start = twin(task.model).eval()
    train(task, 3)
    # one epoch is one batch: every pair is in it
    found = step(task)[0]["loss"]
    assert found == pytest.approx(slow_loss(task.model, start, PAIRS, 0.3), abs=1e-5)
    assert found < 0.6, "three steps on five pairs"
    metrics = task.evaluate(3).metrics
    assert metrics["loss"] == pytest.approx(found, abs=1e-6)
    assert task.evaluate(3).score == -metrics["loss"]


@pytest.mark.parametrize("kind", MODELS)
def test_micro_batches_add_up_to_the_whole_step(kind: str) -> None:
    model = MODELS[kind]()
    reference = Reference(model=MODELS[kind]())
    with torch.no_grad():  # off the reference, so that no figure is 0
        for parameter in model.parameters():
            parameter.mul_(1.05)
    whole, gradient = step(task_for(model, reference))
    judged = task_for(model, reference).evaluate(0).metrics
    assert judged == pytest.approx(whole, abs=1e-4), "the validation pairs are the same ones"
    for size, parts in ((1, 5), (2, 3), (3, 2)):
        task = task_for(model, reference, micro_batch_size=size)
        assert len(task.batch(0).micro_batches) == parts
        sums, cut = step(task)
        assert sums == pytest.approx(whole, abs=1e-4)
        assert task.evaluate(0).metrics == pytest.approx(judged, abs=1e-4)
        for name, value in gradient.items():
            assert torch.allclose(cut[name], value, atol=2e-5), name


def test_the_shares_of_several_processes_add_up_to_the_whole_step() -> None:
    model = tiny_lm()
    whole, gradient = step(task_for(model))
    sums: dict[str, float] = {}
    summed = {name: torch.zeros_like(value) for name, value in gradient.items()}
    for rank in range(3):
        task = task_for(model, world=World(rank, 3))
        part = task.batch(0)
        assert part.normaliser in (1.0, 2.0) and part.num_samples == 2 * part.normaliser
        task.model.zero_grad()
        output = task.loss(part.micro_batches[0], 5.0)
        output.loss.backward()
        sums["loss"] = sums.get("loss", 0.0) + output.loss.item()
        for name, parameter in task.model.named_parameters():
            summed[name] += parameter.grad
    assert sums["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    assert all(torch.allclose(summed[name], value, atol=1e-6) for name, value in gradient.items())


def test_the_swapped_pairs_have_the_opposite_figures() -> None:
    model, other = tiny_lm(0), Reference(model=tiny_lm(1))
    ahead = step(task_for(model, other))[0]
    behind = step(task_for(model, other, pairs=[(rejected, chosen) for chosen, rejected in PAIRS]))[0]
    assert ahead["dpo/margin"] == pytest.approx(-behind["dpo/margin"], abs=1e-4)
    assert ahead["dpo/accuracy"] + behind["dpo/accuracy"] == pytest.approx(1.0)
    assert ahead["dpo/chosen_reward"] == pytest.approx(behind["dpo/rejected_reward"], abs=1e-4)
    assert ahead["loss"] - behind["loss"] == pytest.approx(-ahead["dpo/margin"], abs=1e-4)  # log s(-x)/s(x) = -x


def passes(num_pairs: int) -> TrainSettings:
    return TrainSettings(micro_batch_size=num_pairs)


def test_a_precomputed_reference_changes_neither_figures_nor_order() -> None:
    start, order = tiny_lm(), []
    table = reference_logprobs(start, PAIRS, PAD, passes(2), FP32)
    assert table.shape == (5, 2)
    tasks = [
        task_for(tiny_lm(), micro_batch_size=2, batch_size=3),
        task_for(tiny_lm(), Reference(logprobs=(table, table)), micro_batch_size=2, batch_size=3),
    ]
    for task in tasks:
        torch.manual_seed(0)
        metrics = train(task, 8)
        order.append([part.sequences.ids.tolist() for n in range(8) for part in task.batch(n).micro_batches])
        state = torch.random.get_rng_state()
        order.append([metrics, task.evaluate(8).metrics, state])
    assert order[0] == order[2], "the same rows in the same order"
    assert torch.equal(order[1][2], order[3][2]), "no random number more"
    for one, other in zip([*order[1][0], order[1][1]], [*order[3][0], order[3][1]], strict=True):
        # at the first step all margins are 0 but for rounding, and on which side of it is no figure
        skipped = {"dpo/accuracy"} if abs(one["dpo/margin"]) < 1e-6 else set()
        for name in one.keys() - skipped:
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=2e-5), name
    assert order[1][0][-1]["loss"] < 0.5


def test_reference_logprobs_are_in_the_order_of_the_pairs_whoever_takes_them() -> None:
    model = tiny_lm()
    whole = reference_logprobs(model, PAIRS, PAD, passes(5), FP32)
    both = token_logprobs(model, collate_both(PAIRS, PAD)).sequence_logprob()
    assert torch.allclose(whole[:, 0], both[:5], atol=1e-5) and torch.allclose(whole[:, 1], both[5:], atol=1e-5)
    assert torch.allclose(reference_logprobs(model, PAIRS, PAD, passes(1), FP32), whole, atol=1e-5)
    assert not whole.requires_grad

    class Pretended(World):
        def gather(self, rows: torch.Tensor) -> torch.Tensor:
            return rows

    parts = [reference_logprobs(model, PAIRS, PAD, passes(2), FP32, Pretended(rank, 3)) for rank in range(3)]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-5)
    assert reference_logprobs(model, [], PAD, passes(2), FP32).shape == (0, 2)


def test_the_prompt_has_no_part_in_the_loss() -> None:
    """The log-ratio is of the completion alone: the same completions after a longer prompt have as many terms."""
    task = task_for(tiny_lm())
    (part,) = task.batch(0).micro_batches
    sequences = part.sequences
    for row, (prompt, completion) in enumerate(
        side for column in (0, 1) for side in (pair[column] for pair in [PAIRS[i] for i in order_of(task)])
    ):
        assert sequences.completion_mask[row].sum() == len(completion)
        assert not sequences.completion_mask[row, : len(prompt)].any()
        assert sequences.attention_mask[row].sum() == len(prompt) + len(completion)


def order_of(task: PreferenceTask) -> list[int]:
    from rlhf_cli.train.seeding import batch_rows

    return [int(i) for i in batch_rows(task.seed, 0, task.settings.batch_size, len(task.pairs))]


def test_gradient_checkpointing_changes_nothing() -> None:
    from rlhf_cli.models.recompute import enable_recomputation

    plain = step(task_for(gpt2_lm(byte_tokenizer())))
    model = gpt2_lm(byte_tokenizer())
    enable_recomputation("gradient_checkpointing", model)
    again = step(task_for(model, Reference(model=gpt2_lm(byte_tokenizer()))))
    assert plain[0] == again[0]
    assert all(torch.equal(again[1][name], value) for name, value in plain[1].items())


def test_everything_lies_on_the_device_it_says() -> None:
    (part,) = task_for(tiny_lm()).batch(0).micro_batches
    assert part.sequences.ids.device == CPU and len(part) == 5
