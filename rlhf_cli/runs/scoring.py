"""What a policy is scored by, and a saved policy's figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rlhf_cli.models.causal import LanguageModel
from rlhf_cli.models.loading import load_causal_lm
from rlhf_cli.rewards.model import Scorer
from rlhf_cli.rewards.settings import RmConfig
from rlhf_cli.runs.job import Job
from rlhf_cli.train.measuring import HeldOut, measure
from rlhf_cli.train.precision import Precision
from rlhf_cli.train.reward_noise import RewardNoise
from rlhf_cli.train.seeding import derive_seed
from rlhf_cli.types import Rollout, Scores


@dataclass(frozen=True)
class RewardOfRollout:
    """A reward model as the reward of a policy."""

    reward_model: Scorer
    precision: Precision
    max_rows: int = 128  # scored together

    def __call__(self, rollout: Rollout) -> Scores:
        """Scores; a completion that was cut has no EOS to score."""
        with self.precision.autocast():
            return self.reward_model.score_rollout(rollout, self.max_rows)


def reward_noise(rm: RmConfig, reward_model: Scorer, seed: int) -> RewardNoise | None:
    """`rm.noise` is on the reward model's own scale; what a policy is trained on is standardised."""
    return RewardNoise(rm.noise / reward_model.format.std, seed) if rm.noise else None


def measured(
    job: Job, seed: int, path: Path, reference: LanguageModel, reward: RewardOfRollout | None
) -> dict[str, Tensor]:
    """A saved policy's figures on the validation prompts, as it has them while it learns; see `measure`."""
    data, algorithm = job.data, job.config.algo
    model, tokenizer = load_causal_lm("model", str(path), job.precision.device)
    held_out = HeldOut(
        data.prompts_validation[: algorithm.eval_prompts],
        data.max_prompt_tokens,
        job.sampling,
        derive_seed(seed, "validation"),
    )
    size = algorithm.train.micro_batch_size or algorithm.train.batch_size
    return measure(model, reference, tokenizer, reward, data.gold, held_out, size, job.precision, job.world)
