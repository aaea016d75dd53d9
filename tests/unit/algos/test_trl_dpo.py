"""DPO and IPO against TRL's DPOTrainer: the same pairs, policy and reference give the same loss and gradient.

The trainer is built as a user builds it, reads text pairs, tokenises, pads and computes its loss; ours gets the same
texts.
Facts of TRL 1.16 (trl/trainer/dpo_trainer.py) that the table below relies on:

- The loss is the mean over the pairs of a batch, from log-probs summed over the completion, its EOS included.
- `sigmoid` is ours without label smoothing, `sigmoid_norm` the same on means over the completion's tokens.
- `ipo` is on means over tokens always: ours with `length_normalised`. There is no `ipo` on whole completions.
- No loss type is the conservative loss of label smoothing eps. `robust` is the unbiased estimate under swapped labels,
  [(1-eps) L(x) - eps L(-x)] / (1-2 eps) with L(x) = -log sigmoid(x), so ours, (1-eps) L(x) + eps L(-x), is
  2 (1-eps) sigmoid - (1-2 eps) robust.
- Rewards in its log are beta times the log-ratios of whole completions.
- `disable_dropout` switches GPT-2's dropout of 0.1 off; rows are padded on the right, so positions are ours.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from rlhf_cli.algos.dpo import Dpo, PairLoss
from rlhf_cli.data.tokenise import encode_completion, encode_prompt
from rlhf_cli.settings import TrainSettings
from rlhf_cli.train.precision import Precision
from rlhf_cli.train.preference import PreferenceTask, Reference

BETA, EPS = 0.3, 0.2
# Prompts and completions of several lengths, one completion of nothing but its EOS
PAIRS = [
    ("t5 t7 t9", " t2 t3", " t4 t4 t8 t9"),
    ("t4", " t20", " t2 t2"),
    ("t11 t3 t8 t2 t6", "", " t12 t13 t14"),
    ("t10 t12", " t9 t8 t7 t6 t5 t4", " t2"),
]
# our keys -> weights of TRL's loss types
TABLE: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "dpo": ({}, {"sigmoid": 1.0}),
    "smoothed": ({"label_smoothing": EPS}, {"sigmoid": 2 * (1 - EPS), "robust": -(1 - 2 * EPS)}),
    "per token": ({"length_normalised": True}, {"sigmoid_norm": 1.0}),
    "ipo": ({"loss": PairLoss.ipo, "length_normalised": True}, {"ipo": 1.0}),
}


class _Trainer(DPOTrainer):
    """TRL's trainer without a network."""

    def _send_telemetry(self) -> None:
        """A constructor reports its use."""


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trl_step(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    losses: dict[str, float],
    folder: Path,
) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """TRL's loss of all pairs, its gradient, and its rewards."""
    options = DPOConfig(
        output_dir=str(folder),
        beta=BETA,
        loss_type=list(losses),
        loss_weights=list(losses.values()),
        label_smoothing=EPS if "robust" in losses else 0.0,
        max_length=None,
        disable_dropout=True,
        bf16=False,
        per_device_train_batch_size=len(PAIRS),
        report_to=[],
        use_cpu=True,
    )
    columns = zip(("prompt", "chosen", "rejected"), zip(*PAIRS, strict=True), strict=True)
    with torch.random.fork_rng(devices=[]):
        trainer = _Trainer(
            model=policy,
            ref_model=reference,
            args=options,
            train_dataset=Dataset.from_dict({name: list(texts) for name, texts in columns}),
            processing_class=tokenizer,
        )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(PAIRS))])
    trainer.model.train()  # as its loop does; its figures are kept by mode
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    logged = {name: float(values[-1]) for name, values in trainer._metrics["train"].items()}
    return loss.item(), gradients(trainer.model), logged


def our_step(
    policy: PreTrainedModel, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, algo: Dpo
) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """Ours, in two micro-batches."""

    def ids(prompt: str, *texts: str) -> Sequence[tuple[list[int], list[int]]]:
        first = encode_prompt(tokenizer, prompt, 100)
        return [(first, encode_completion(tokenizer, text, 100, append_eos=True)) for text in texts]

    pairs = [(chosen, rejected) for chosen, rejected in (ids(*row) for row in PAIRS)]
    task = PreferenceTask(
        policy,
        Reference(model=reference),
        tokenizer,
        algo,
        pairs,
        pairs,
        Precision("fp32", torch.device("cpu")),
        seed=0,
    )
    batch, loss, figures = task.batch(0), 0.0, dict[str, float]()
    for part in batch.micro_batches:
        output = task.loss(part, batch.normaliser)
        output.loss.backward()
        loss += output.loss.item()
        for name, value in output.metrics.items():
            figures[name] = figures.get(name, 0.0) + float(value)
    return loss, gradients(policy), figures


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", TABLE)
def test_loss_gradient_and_figures_are_those_of_trl(
    name: str, architecture: str, request: pytest.FixtureRequest, word_tokenizer: Any, tmp_path: Path
):
    make_model = request.getfixturevalue(f"make_{architecture}")
    policy, reference = make_model(seed=0), make_model(seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weights in policy.parameters():  # some nats away from the reference
            weights += 0.05 * torch.randn(weights.shape, generator=generator)
    keys, losses = TABLE[name]
    algo = Dpo(beta=BETA, **keys, train=TrainSettings(batch_size=len(PAIRS), micro_batch_size=2))
    theirs = trl_step(copy.deepcopy(policy), copy.deepcopy(reference), word_tokenizer, losses, tmp_path)
    ours = our_step(policy, reference, word_tokenizer, algo)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    scale = max(float(value.abs().max()) for value in theirs[1].values())
    assert scale > 0.01
    for parameter, value in theirs[1].items():
        assert torch.allclose(ours[1][parameter], value, rtol=1e-5, atol=1e-5 * scale), parameter
    if not algo.length_normalised:
        assert ours[2]["dpo/chosen_reward"] == pytest.approx(theirs[2]["rewards/chosen"], rel=1e-5, abs=1e-6)
        assert ours[2]["dpo/rejected_reward"] == pytest.approx(theirs[2]["rewards/rejected"], rel=1e-5, abs=1e-6)
        assert ours[2]["dpo/margin"] == pytest.approx(theirs[2]["rewards/margins"], rel=1e-5, abs=1e-6)
        assert ours[2]["dpo/accuracy"] == theirs[2]["rewards/accuracies"]
        assert ours[2]["logps/chosen"] == pytest.approx(theirs[2]["logps/chosen"], rel=1e-5)
        assert abs(theirs[2]["rewards/margins"]) > 0.05
