"""RLOO against TRL's RLOOTrainer: the same completions, rewards and reference give the same step.

TRL is really run: it samples, scores, and makes two optimizer steps of two micro-batches from one rollout. What it
computed on the way is kept and computed again by our code. Facts of TRL 1.16 (trl/trainer/rloo_trainer.py) that the
options below rely on:

- `_generate_and_score_completions` returns prompt-major rows: prompts padded on the left, completions on the right,
  the mask of a completion reaching to its first EOS. Its reward is r - beta * (log pi - log ref), both summed over the
  completion, from forward passes over whole rows at the sampling temperature: the sequence-level k1 of `shaped_reward`.
- Advantages are the reward minus the mean of the prompt's other rewards; `normalize_advantages=False` leaves them so.
- The loss is the mean over the rows of a micro-batch of -min(rho A, clip(rho) A), where rho = pi/pi_old is the ratio
  of whole completions. There is no form without a ratio, so ours is the off-policy one with clip = `epsilon`; in the
  first step rho is 1 and the gradient also that of the score function.
- The micro-batch means are averaged over the optimizer step: with micro-batches of one size this is the sum divided by
  the number of sequences, our normaliser. So no factor is left between the two losses.
- No position ids are passed when log-probs are computed: padding on the left moves learned absolute positions (GPT-2),
  but not the distances that rotary ones (Llama) see. So only Llama's prompts differ in length here.
- `disable_dropout=True` switches GPT-2's dropout of 0.1 off; the trainer leaves the model in training mode otherwise.
- The reference is read from the folder that the policy's config names; a constructor reports its use over the network,
  which is switched off here.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from trl import RLOOConfig, RLOOTrainer

from rlhf_cli.algos.base import BaselineState
from rlhf_cli.algos.rloo import Rloo
from rlhf_cli.data.tokenise import collate
from rlhf_cli.models.causal import token_logprobs
from rlhf_cli.ops.kl import shaped_reward
from rlhf_cli.ops.policy_losses import clipped_fraction, sequence_ratio
from rlhf_cli.types import Experience, PolicyBatch, Sequences

PAD, EOS = 0, 1
# Seeds whose completions end at every possible length, the first token and the limit among them
SEEDS = {"llama": 0, "gpt2": 1}
# Of different lengths, so that rows are padded on both sides, where positions are relative; of one length where not
PROMPTS = {
    "llama": ["t5 t7 t9", "t4", "t11 t3 t8 t2 t6", "t10 t12"],
    "gpt2": ["t5 t7 t9", "t4 t13 t2", "t11 t3 t8", "t10 t12 t6"],
}
K, BETA, EPSILON, TEMPERATURE, MAX_NEW_TOKENS = 4, 0.2, 0.2, 0.7, 8
ROWS = 4 * K
MICRO_BATCH = ROWS // 2
RTOL = 2e-5  # float32 and sums in another order; the largest difference seen is 4e-6


def reward_of(completion: list[int]) -> float:
    """Any function of the tokens will do."""
    return sum(token % 5 for token in completion) / 4 - (completion[-1] == EOS)


@dataclass
class _Step:
    """One optimizer step of TRL."""

    weights: dict[str, Tensor]  # before the step
    gradient: dict[str, Tensor]  # that the step was made with
    micro_losses: list[float]


@dataclass
class _Record:
    """What TRL computed."""

    rollout: dict[str, Tensor] = field(default_factory=dict)
    reward: Tensor = field(default_factory=lambda: torch.empty(0))
    losses: list[float] = field(default_factory=list)
    steps: list[_Step] = field(default_factory=list)


class _RecordingTrainer(RLOOTrainer):
    """TRL's trainer, its results kept and nothing changed."""

    def __init__(self, record: _Record, **options: Any) -> None:
        self.record = record
        super().__init__(**options)

    def _send_telemetry(self) -> None:
        """No network in tests."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        rollout = super()._generate_and_score_completions(inputs)
        assert not self.record.rollout, "both steps are to use one rollout"
        self.record.rollout = {name: value.clone() for name, value in rollout.items()}
        return rollout

    def _calculate_rewards(self, *args: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args)
        self.record.reward = rewards[:, 0].clone()
        return rewards

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        self.record.losses.append(loss.item())
        return loss


class _StepRecorder(TrainerCallback):
    """Weights and gradients as the optimizer meets them."""

    def __init__(self, record: _Record) -> None:
        self.record = record

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = dict(kwargs["model"].named_parameters())
        self.record.steps.append(
            _Step(
                weights={name: value.detach().clone() for name, value in parameters.items()},
                gradient={name: value.grad.clone() for name, value in parameters.items()},
                micro_losses=self.record.losses[-2:],
            )
        )


@dataclass
class _Run:
    """TRL's run, with the two models it began from."""

    record: _Record
    policy: PreTrainedModel
    reference: PreTrainedModel


@pytest.fixture(params=["llama", "gpt2"])
def run(request, tmp_path, word_tokenizer) -> _Run:
    make_model = request.getfixturevalue(f"make_{request.param}")
    policy, reference = (make_model(seed=SEEDS[request.param]) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weights in reference.parameters():  # a KL of some nats, not of hundreds
            weights += 0.05 * torch.randn(weights.shape, generator=generator)
    reference.save_pretrained(tmp_path / "reference")
    policy.config._name_or_path = str(tmp_path / "reference")
    trained, record = copy.deepcopy(policy), _Record()
    with torch.random.fork_rng(devices=[]):
        _RecordingTrainer(
            record,
            model=trained,
            args=_options(tmp_path),
            reward_funcs=_reward_function,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS[request.param]}),
            processing_class=word_tokenizer,
            callbacks=[_StepRecorder(record)],
        ).train()
    return _Run(record, policy, reference)


def _reward_function(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [reward_of(ids) for ids in completion_ids]


def _options(folder: Path) -> RLOOConfig:
    return RLOOConfig(
        output_dir=str(folder / "trl"),
        # the algorithm
        num_generations=K,
        beta=BETA,
        epsilon=EPSILON,
        epsilon_high=None,
        num_iterations=2,  # optimizer steps per rollout: one at ratio 1 and one off-policy
        normalize_advantages=False,
        reward_clip_range=None,
        mask_truncated_completions=False,
        sync_ref_model=False,
        disable_dropout=True,
        # sampling: the whole vocabulary, so that log-probs need no renormalisation
        temperature=TEMPERATURE,
        top_p=1.0,
        top_k=0,
        min_p=None,
        repetition_penalty=1.0,
        max_completion_length=MAX_NEW_TOKENS,
        # the optimizer step: two micro-batches, gradients not clipped
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=2,
        max_steps=2,
        learning_rate=0.0005,
        lr_scheduler_type="constant",
        optim="sgd",
        weight_decay=0.0,
        max_grad_norm=0.0,
        # float32 on the CPU, nothing written and nothing sent
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=0,
    )


# our side


def _our_sequences(rollout: dict[str, Tensor]) -> Sequences:
    """TRL's prompts and completions, padded as our rollouts are."""
    rows = []
    for part in ("prompt", "completion"):
        ids, mask = rollout[f"{part}_ids"], rollout[f"{part}_mask"].bool()
        rows.append([row[kept].tolist() for row, kept in zip(ids, mask, strict=True)])
    return collate(list(zip(*rows, strict=True)), pad_id=PAD)


def _logprob(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    return token_logprobs(model, sequences, TEMPERATURE).sequence_logprob()


@torch.no_grad()
def _our_batch(run: _Run, sequences: Sequences) -> PolicyBatch:
    """The batch of an optimizer step, with the advantages of our algorithm."""
    old, ref = _logprob(run.policy, sequences), _logprob(run.reference, sequences)
    shaped = shaped_reward(run.record.reward, old, ref, BETA)
    experience = Experience(run.record.reward, shaped)
    return PolicyBatch(sequences, old, ref, Rloo(k=K).advantages(experience, BaselineState()).advantage)


def _our_loss(algorithm: Rloo, model: PreTrainedModel, batch: PolicyBatch) -> Tensor:
    return algorithm.loss(token_logprobs(model, batch.sequences, TEMPERATURE), None, batch, float(ROWS)).loss


def _our_step(algorithm: Rloo, run: _Run, batch: PolicyBatch, step: _Step) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient at the weights of one of TRL's steps."""
    model = _at(run.policy, step)
    loss = _our_loss(algorithm, model, batch)
    loss.backward()
    return loss.item(), {name: value.grad for name, value in model.named_parameters()}


def _at(policy: PreTrainedModel, step: _Step) -> PreTrainedModel:
    model = copy.deepcopy(policy)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(step.weights[name])
    return model


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any parameter's gradients, relative to the largest entry of that parameter's."""
    assert found.keys() == expected.keys() and len(expected) > 10
    scales = {name: value.abs().max() for name, value in expected.items()}
    assert min(scales.values()) > 1e-4, "a gradient of nothing but rounding would compare nothing"
    return max(((found[name] - expected[name]).abs().max() / scales[name]).item() for name in expected)


# the comparison


def test_every_kind_of_row_and_term_is_in_the_comparison(run):
    record, sequences = run.record, _our_sequences(run.record.rollout)
    batch = _our_batch(run, sequences)
    lengths = sequences.completion_mask.sum(1)
    ended = (sequences.ids.eq(EOS) & sequences.completion_mask).any(1)
    assert len(record.steps) == 2 and len(sequences) == ROWS
    assert (lengths == 1).any() and (~ended & (lengths == MAX_NEW_TOKENS)).any()
    assert (ended & (lengths > 1)).any()
    assert (batch.old_logprob - batch.ref_logprob).abs().max() > 1  # the KL term is seen through a beta of 0.2
    assert record.reward.unique().numel() > 4
    # in the second step the policy has moved, and the clip cuts some rows' gradients
    logprob = _logprob(_at(run.policy, record.steps[1]), sequences)
    cut = clipped_fraction(sequence_ratio(logprob, batch.old_logprob), batch.advantage, EPSILON).item()
    assert 0 < cut < 0.8


def test_the_same_log_probs_and_advantages(run):
    rollout = run.record.rollout
    batch = _our_batch(run, _our_sequences(rollout))
    assert torch.allclose(batch.old_logprob, rollout["old_logps"], rtol=RTOL, atol=RTOL)
    scale = rollout["advantages"].abs().max()
    assert (batch.advantage - rollout["advantages"]).abs().max() < RTOL * scale


@pytest.mark.parametrize("number", [0, 1], ids=["at ratio 1", "off-policy"])
def test_the_same_loss_and_gradient_on_every_parameter(run, number):
    batch = _our_batch(run, _our_sequences(run.record.rollout))
    step = run.record.steps[number]
    loss, gradient = _our_step(Rloo(k=K, num_epochs=2, clip=EPSILON), run, batch, step)
    # at ratio 1 the loss is minus the mean advantage, which is 0: the measure is the size of what cancels
    scale = batch.advantage.abs().mean().item()
    assert loss == pytest.approx(sum(step.micro_losses) / 2, rel=0, abs=RTOL * scale)
    assert max(map(abs, step.micro_losses)) > 100 * RTOL * scale
    assert _distance(gradient, step.gradient) < RTOL


def test_the_first_step_is_that_of_the_score_function_as_well(run):
    batch = _our_batch(run, _our_sequences(run.record.rollout))
    _, gradient = _our_step(Rloo(k=K), run, batch, run.record.steps[0])
    assert _distance(gradient, run.record.steps[0].gradient) < RTOL
