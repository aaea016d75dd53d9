"""What a policy is scored by, and a saved policy's figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli import build
from rlhf_cli.data.tokenise import prompt_batch
from rlhf_cli.errors import RequestError
from rlhf_cli.models.causal import LanguageModel
from rlhf_cli.models.loading import load_causal_lm
from rlhf_cli.models.low_precision import hold_matrices_in
from rlhf_cli.rewards.ensemble import load_scorer
from rlhf_cli.rewards.model import Scorer
from rlhf_cli.rewards.scaling import Moments, RewardScaling
from rlhf_cli.rewards.settings import RmConfig
from rlhf_cli.rewards.term_settings import Count, Normalize, RewardSettings
from rlhf_cli.rewards.terms import (
    Judge,
    RewardSum,
    Term,
    gold_rewards,
    length_penalty,
    missing_eos_penalty,
    repetition_penalty,
    rule_matches,
)
from rlhf_cli.rollout.engine import Engine, generate
from rlhf_cli.runs.job import Artifact, Job
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


@dataclass(frozen=True)
class SftModel:
    """The SFT model where it is loaded."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class PolicyReward:
    """What a policy is rewarded by, as the node `reward` declares it."""

    settings: RewardSettings
    total: Callable[[Rollout], Scores]  # the weighted sum of the terms
    reward_model: Scorer | None
    frozen: Moments | None  # of the sum on samples of the SFT model; None where that is not what it is scaled by
    judge: PreTrainedModel | None = None  # the SFT model, where it is a term: a reference need not be loaded again

    def noise(self, rm: RmConfig, seed: int) -> RewardNoise | None:
        """`rm.noise` is on the reward model's own scale; what comes to the sum is standardised and weighted."""
        if not rm.noise:
            return None
        assert self.reward_model is not None, "checked with the config"
        return RewardNoise(abs(self.settings.rm) * rm.noise / self.reward_model.format.std, seed)

    def scaling(self) -> RewardScaling | None:
        """Normalisation and clip for one policy, from their beginning; None where there are neither."""
        is_running = self.settings.normalize is Normalize.running
        moments = Moments() if is_running else self.frozen
        if moments is None and self.settings.clip is None:
            return None
        return RewardScaling(moments, self.settings.clip, is_running)

    def __call__(self, rollout: Rollout) -> Scores:
        """Of a policy that is not being trained. A running scale is of the policy that moved it: then the plain sum."""
        scores = self.total(rollout)
        scaling = None if self.settings.normalize is Normalize.running else self.scaling()
        return scores if scaling is None else scaling(scores)


def load_reward(
    job: Job, seed: int, sft: Artifact, rm: Artifact | None, judge: Artifact | None, loaded: SftModel | None = None
) -> PolicyReward:
    """Loads what the reward's terms ask for and takes the scale, where it is one of the SFT model's samples.

    Args:
        job: of the run.
        seed: of the run, and of the samples that a frozen scale is taken from.
        sft: the SFT model.
        rm: the reward model; None where no term asks for it.
        judge: the language model of the coherence; None = the SFT model.
        loaded: the SFT model, where it is loaded already.

    Raises:
        RequestError: the sum is the same for all samples that it is to be scaled by.
    """
    settings, device = job.config.reward, job.precision.device
    reward_model = None if rm is None else load_scorer("rm.path", rm.path, device, build.scalar_format(job.config))
    for one in () if reward_model is None else reward_model.models():
        hold_matrices_in(one, job.precision.dtype)
    of_model = (
        None if reward_model is None else RewardOfRollout(reward_model, job.precision, job.config.rollout.max_rows)
    )
    if settings.is_plain:
        assert of_model is not None
        return PolicyReward(settings, of_model, reward_model, None)
    weights = settings.weights()
    judges = judge is None and "coherence" in weights
    if loaded is None and (judges or settings.normalize is Normalize.sft_samples):
        loaded = SftModel(*load_causal_lm("sft.path", sft.path, device))
    total = RewardSum(weights, _terms(job, weights, judge, loaded), of_model)
    frozen = None
    if settings.normalize is Normalize.sft_samples:
        assert loaded is not None
        frozen = _moments(job, seed, loaded, total)
    return PolicyReward(
        settings, total, reward_model, frozen, loaded.model if judges and loaded is not None else None
    )


def _terms(
    job: Job, weights: dict[str, float], judge: Artifact | None, loaded: SftModel | None
) -> dict[str, Term]:
    """All terms with a weight but the reward model's, by name."""
    settings, gold = job.config.reward, job.data.gold
    terms: dict[str, Term] = {
        "length": partial(length_penalty, max_new_tokens=job.config.rollout.max_new_tokens),
        "missing_eos": missing_eos_penalty,
        "repetition": partial(repetition_penalty, n=settings.repetition.ngram),
    }
    if "gold" in weights:
        assert gold is not None, "checked with the config"
        terms["gold"] = partial(gold_rewards, gold)
    if "coherence" in weights:
        terms["coherence"] = _coherence(job, judge, loaded)
    for rule in settings.rules:
        terms[rule.name] = partial(rule_matches, rule.compiled(), each=rule.count is Count.each)
    return {name: terms[name] for name in weights if name != "rm"}


def _coherence(job: Job, judge: Artifact | None, loaded: SftModel | None) -> Term:
    """Under the SFT model, or under another model, which reads the texts with its own tokenizer."""
    train, data = job.config.algo.train, job.data
    rows, tokens = train.rows_of_pass, train.micro_batch_tokens
    if judge is None:
        assert loaded is not None
        one = Judge(loaded.model, rows, micro_batch_tokens=tokens)
    else:
        key = "reward.coherence.path"
        model, tokenizer = load_causal_lm(key, judge.path, job.precision.device)
        data.check_tokenizer(key, tokenizer)
        build.check_context(job.config, key, model)
        one = Judge(model, rows, tokenizer, data.max_prompt_tokens, data.max_completion_tokens, tokens)

    def judged(rollout: Rollout) -> Tensor:
        with job.precision.autocast():
            return one(rollout)

    return judged


def _moments(job: Job, seed: int, sft: SftModel, total: Callable[[Rollout], Scores]) -> Moments:
    """Of the sum over samples of the SFT model, of all processes; a run that is resumed gets the same ones."""
    prompts = job.data.prompts[: job.config.reward.normalize_samples]
    mine = job.world.share(len(prompts))
    batch = prompt_batch(sft.tokenizer, prompts[mine], range(len(prompts))[mine], job.data.max_prompt_tokens)
    with job.precision.autocast():
        noise = derive_seed(seed, "normalise reward")
        rollout = generate(sft.model, sft.tokenizer, batch, 1, job.sampling, noise, 0)
    moments = Moments.of(job.world.gather(total(rollout).reward))

    def check() -> None:
        if not moments.std:
            raise RequestError(
                f"reward.normalize=sft_samples: the reward is {moments.mean:g} for all {moments.count} samples of the "
                "SFT model; there is nothing to scale it by"
            )

    job.world.from_main(check)
    return moments


def measured(
    job: Job,
    seed: int,
    path: Path,
    reference: LanguageModel,
    reward: Callable[[Rollout], Scores] | None,
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
    return measure(
        Engine(model), reference, tokenizer, reward, data.gold, held_out, algorithm.train, job.precision, job.world
    )
