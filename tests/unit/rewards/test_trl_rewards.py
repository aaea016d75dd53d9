"""A saved scalar reward model is what TRL's RLOOTrainer takes as `reward_funcs`, by its path or loaded.

Facts of TRL 1.16 (trl/trainer/rloo_trainer.py, `_calculate_rewards`) that the comparison relies on:

- A path is loaded by AutoModelForSequenceClassification with `num_labels=1`, its tokenizer by AutoTokenizer from the
  same folder; of a loaded model the folder is `config._name_or_path`.
- What is scored is the text prompt + completion, encoded as one, padded on the right, without any special token. The
  completion is decoded with `skip_special_tokens=True`, so the EOS that the policy has written is gone and none is put
  back: TRL's rewards are those of completions that our code calls unfinished (`finished=False`), and equal to ours of
  finished ones only where the reward model was trained with `rm.append_eos=false`.
- Prompt and completion have the ids here that they have apart, as a completion begins with a space and the tokenizer
  cuts words there; with other texts TRL's may be cut elsewhere, and rewards differ by that.
- The reward is the raw logit: TRL knows nothing of our scale, temperature or caps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from fixtures_models import CPU, byte_tokenizer, tiny_lm
from fixtures_rewards import any_model, with_lora
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from trl import RLOOConfig, RLOOTrainer

from rlhf_cli.rewards.format import RewardFormat, store_format
from rlhf_cli.rewards.model import RewardModel, load_reward_model
from rlhf_cli.runs.merged_reward import averaged

PROMPTS = ["the film was", "a warm", "the plot", "funny"]


class _RecordingTrainer(RLOOTrainer):
    """TRL's trainer; what it scores and what comes out is kept, and nothing changed."""

    def __init__(self, **options: Any) -> None:
        self.seen: list[tuple[list[str], list[str], Tensor]] = []
        super().__init__(**options)

    def _send_telemetry(self) -> None:
        """No network in tests."""

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, ids: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, ids)
        self.seen.append((list(prompts), list(completions), rewards[:, 0].clone()))
        return rewards


def scored_by_trl(reward: str | PreTrainedModel, folder: Path) -> tuple[list[str], list[str], Tensor]:
    """Prompts, completions and rewards of one step of TRL."""
    options = RLOOConfig(
        output_dir=str(folder / "trl"),
        num_generations=2,
        max_completion_length=8,
        per_device_train_batch_size=8,
        max_steps=1,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        beta=0.0,
        seed=3,
    )
    with torch.random.fork_rng(devices=[]):
        trainer = _RecordingTrainer(
            model=tiny_lm(),
            args=options,
            reward_funcs=reward,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=byte_tokenizer(),
        )
        trainer.train()
    (seen,) = trainer.seen
    return seen


def scalar(folder: Path) -> RewardModel:
    """A scaled one, whose raw score is another number than its reward."""
    any_model("llama", 1, 3).save(folder)
    return _scaled(folder)


def with_adapter(folder: Path) -> RewardModel:
    """One that was trained by LoRA."""
    reward = any_model("llama", 1, 4)
    reward.save(folder, with_lora(reward))
    return _scaled(folder)


def warm(folder: Path) -> RewardModel:
    """A mean of weights."""
    averaged([any_model("llama", 1, seed) for seed in range(3)]).save(folder)
    return _scaled(folder)


def _scaled(folder: Path) -> RewardModel:
    store_format(folder, mean=0.3, std=0.1, temperature=2.0)
    return load_reward_model("rm.path", str(folder), CPU)


@pytest.mark.parametrize("form", [scalar, with_adapter, warm], ids=lambda form: form.__name__)
@pytest.mark.parametrize("given", ["path", "model"])
def test_trl_takes_it_and_computes_our_raw_scores(form: Any, given: str, tmp_path: Path):
    folder = tmp_path / "rm"
    ours = form(folder)
    plain = str(folder) if given == "path" else AutoModelForSequenceClassification.from_pretrained(folder)
    prompts, completions, rewards = scored_by_trl(plain, tmp_path)
    assert len(rewards) == 8 and rewards.std() > 0.01
    texts = [p + c for p, c in zip(prompts, completions, strict=True)]
    # one text as a prompt: the ids that TRL scores, whatever the policy has written
    whole = RewardFormat(100, 0, append_eos=False)
    expected = (
        RewardModel(ours.model, ours.tokenizer, whole).score(texts, [""] * len(texts), [False] * len(texts)).raw
    )
    torch.testing.assert_close(rewards, expected, atol=1e-4, rtol=0)
    apart = ours.score(prompts, completions, [False] * len(texts)).raw
    as_apart = [
        [*one, *other] == list(ours.tokenizer(text, add_special_tokens=False)["input_ids"])
        for text, (one, other) in zip(
            texts, (ours.encode(p, c, False) for p, c in zip(prompts, completions, strict=True)), strict=True
        )
    ]
    assert sum(as_apart) >= 4
    torch.testing.assert_close(rewards[as_apart], apart[as_apart], atol=1e-4, rtol=0)
    finished = ours.score(prompts, completions).raw
    assert float((rewards - finished).abs().max()) > 1e-2, "TRL appends no EOS"
