"""Training a policy on its own samples: prompts -> rollout -> rewards -> advantages -> optimizer batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.algos.base import BaselineState, OnlineAlgorithm
from rlhf_cli.data.dataset import GoldReward
from rlhf_cli.data.tokenise import prompt_batch
from rlhf_cli.models.adapters import Adapter, save_trained
from rlhf_cli.models.causal import LanguageModel, frozen_logprobs, parts_of
from rlhf_cli.models.critic import ActorCritic, Critic, policy_outputs
from rlhf_cli.models.recompute import recomputing
from rlhf_cli.ops.gae import token_rewards
from rlhf_cli.ops.kl import k1, kl_loss, shaped_reward
from rlhf_cli.ops.logprobs import TokenLogprobs, joined
from rlhf_cli.ops.policy_losses import sequence_ratio
from rlhf_cli.rewards.scaling import RewardScaling
from rlhf_cli.rewards.terms import gold_rewards
from rlhf_cli.rollout.engine import Engine, Sampling
from rlhf_cli.settings import KlPlacement, KlSettings
from rlhf_cli.train.anchor import EmaAnchor
from rlhf_cli.train.distributed import ALONE, World
from rlhf_cli.train.loop import Evaluation, StepBatch, Task
from rlhf_cli.train.measuring import HeldOut, length_metrics, lengths, means, measure, of_all, parts_of_reward
from rlhf_cli.train.precision import Precision
from rlhf_cli.train.reward_noise import RewardNoise
from rlhf_cli.train.run_folder import plain_prompt
from rlhf_cli.train.seeding import batch_rows, derive_seed
from rlhf_cli.types import Experience, LossOutput, PolicyBatch, Prompt, PromptBatch, Rollout, Scores, Sequences

# Samples of a step that go to samples.jsonl.
_SAMPLES_KEPT = 8

# In the row of the step that waited for it.
_ROLLOUT_TIMES = ("time/rollout_s", "time/score_s", "throughput/rollout_tokens_per_s")
_PASSES_TIME = "time/logprob_s"

_KL_IN_REWARD = KlSettings()

RewardFunction = Callable[[Rollout], Scores]
_Outputs = tuple[TokenLogprobs, Tensor | None]  # log-probs, and a critic's values


@dataclass(frozen=True)
class _Prepared:
    """One optimizer batch of the current rollout: this process' share, and figures of the whole."""

    batch: PolicyBatch
    normaliser: float  # of this share: its sequences, or the tokens of its completions
    num_samples: int
    num_tokens: int
    metrics: Mapping[str, float]
    samples: Sequence[Mapping[str, Any]]
    outputs: _Outputs | None  # of the policy, with their gradient, where the loss can go on from these


class PolicyTask(Task):
    """Any online algorithm over shared prompts, rollouts and rewards.

    The reference is a frozen copy of the starting policy, or the policy with its adapter off. Dropout stays off:
    log-probs of sampling, scoring and training have to be those of one and the same distribution.

    Where several processes train together, each rolls out its share of the prompts of every optimizer batch, with all
    their samples. Rewards and log-probs of the whole batch then come together, so that advantages, baselines and
    metrics are what one process would compute.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reference: LanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        algorithm: OnlineAlgorithm,
        reward: RewardFunction,
        gold: GoldReward | None,
        prompts: Sequence[Prompt],
        validation_prompts: Sequence[Prompt],
        max_prompt_tokens: int,
        sampling: Sampling,
        precision: Precision,
        seed: int,
        world: World = ALONE,
        adapter: Adapter | None = None,
        *,
        kl: KlSettings = _KL_IN_REWARD,
        critic: Critic | None = None,
        anchor: EmaAnchor | None = None,
        noise: RewardNoise | None = None,
        scaling: RewardScaling | None = None,
        validation_seed: int | None = None,
    ) -> None:
        """Where an argument does not say it.

        Args:
            anchor: what the KL acts towards, where that is not the reference, which figures are still measured to.
            noise: on the rewards of training samples, before `scaling`.
            scaling: of every reward; its own, because a running one has a state.
            validation_seed: of the evaluations' noise, where several runs are compared; None = from `seed`.
        """
        self.policy = model.eval()
        self.model = model if critic is None else ActorCritic(model, critic).eval()
        self.reference = reference
        if isinstance(reference, nn.Module):
            reference.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.algorithm = algorithm
        self.reward = reward
        self.gold = gold
        self.prompts = prompts
        self.max_prompt_tokens = max_prompt_tokens
        self.sampling = sampling
        self.engine = Engine(self.policy)
        self.settings = algorithm.train
        self.precision = precision
        self.seed = seed
        self.world = world
        self.adapter = adapter
        self.kl = kl
        self.critic = critic
        self.anchor = anchor
        self.noise = noise
        self.scaling = scaling
        seed_of_noise = derive_seed(seed, "validation") if validation_seed is None else validation_seed
        self.held_out = HeldOut(validation_prompts, max_prompt_tokens, sampling, seed_of_noise)
        self.baseline = BaselineState()
        self._prepared: list[_Prepared] = []
        self._steps_left = 0  # of the current rollout
        self._pending: _Outputs | None = None  # of the only micro-batch of the step to come

    def batch(self, step: int) -> StepBatch:
        """The optimizer batch of a step; a new rollout where the last one is used up."""
        num_batches = self.algorithm.num_minibatches
        number, update = divmod(step, num_batches * self.algorithm.num_epochs)
        if update == 0:
            self._prepared = self._prepare(number)
        self._steps_left = num_batches * self.algorithm.num_epochs - update - 1
        prepared, is_new = self._prepared[update % num_batches], update < num_batches
        self._pending = prepared.outputs
        return StepBatch(
            micro_batches=[prepared.batch[part] for part in self._parts(prepared.batch.sequences)],
            normaliser=prepared.normaliser,
            num_samples=prepared.num_samples if is_new else 0,
            num_tokens=prepared.num_tokens if is_new else 0,
            metrics={
                name: value
                for name, value in prepared.metrics.items()
                if is_new or name not in (*_ROLLOUT_TIMES, _PASSES_TIME)
            },
            samples=[{**row, "step": step + 1} for row in prepared.samples],
        )

    def loss(self, micro_batch: PolicyBatch, normaliser: float) -> LossOutput:
        """The algorithm's loss over this micro-batch, and the KL's where that is in the loss."""
        if self._pending is not None:
            (tokens, value), self._pending = self._pending, None
        else:
            with recomputing(self.model):
                tokens, value = self._outputs(micro_batch.sequences)
        output = self.algorithm.loss(tokens, value, micro_batch, normaliser)
        if self.kl.placement is KlPlacement.reward:
            return output
        logprob, ref, beta = tokens.sequence_logprob(), micro_batch.ref_logprob, self.algorithm.beta
        ratio = None if self.algorithm.on_policy else sequence_ratio(logprob.detach(), micro_batch.old_logprob)
        held = kl_loss(self.kl.estimator.value, logprob, ref, beta, normaliser, ratio)
        return replace(output, loss=output.loss + held, metrics={**output.metrics, "kl/loss": held.detach()})

    def after_step(self) -> None:
        """The anchor follows."""
        if self.anchor is not None:
            self.anchor.update()

    def tensors(self) -> Mapping[str, Tensor]:
        """The anchor's weights."""
        return {} if self.anchor is None else self.anchor.weights()

    def evaluate(self, step: int) -> Evaluation:
        """Means of `measure` over the validation prompts; the score is the objective, reward - beta * KL."""
        columns = measure(
            self.engine,
            self.reference,
            self.tokenizer,
            self._held_out_reward,
            self.gold,
            self.held_out,
            self.settings,
            self.precision,
            self.world,
        )
        metrics = means(columns)
        return Evaluation(metrics, score=metrics["reward/mean"] - self.algorithm.beta * metrics["kl/full"])

    def save(self, folder: Path) -> None:
        """Writes a Hugging Face folder."""
        save_trained(self.policy, self.tokenizer, folder, self.adapter)

    def state(self) -> Mapping[str, Any] | None:
        """The baseline and a running scale; None while a rollout still has steps to serve."""
        if self._steps_left:
            return None
        state: dict[str, Any] = {"baseline": asdict(self.baseline)}
        if self.scaling is not None and (scale := self.scaling.state()):
            state["reward_scale"] = scale
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up a `state`."""
        self.baseline = BaselineState(**state["baseline"])
        if self.scaling is not None and "reward_scale" in state:
            self.scaling.restore(state["reward_scale"])

    def _held_out_reward(self, rollout: Rollout) -> Scores:
        """On the scale that training has come to, which this does not move."""
        scores = self.reward(rollout)
        return scores if self.scaling is None else self.scaling(scores)

    def _prepare(self, number: int) -> list[_Prepared]:
        """Samples rollout `number`, scores it and cuts it into optimizer batches with their advantages."""
        k = self.algorithm.k
        num_prompts = self.settings.batch_size // k  # of an optimizer batch
        num_batches = self.algorithm.num_minibatches
        all_prompts = batch_rows(self.seed, number, num_prompts * num_batches, len(self.prompts))
        mine = all_prompts.reshape(num_batches, num_prompts)[:, self.world.share(num_prompts)]
        chosen = [int(i) for i in mine.reshape(-1)]
        started = time.perf_counter()
        with self.precision.autocast():
            rollout = self.engine.generate(
                self.tokenizer,
                self._prompt_batch([self.prompts[i] for i in chosen], chosen),
                k,
                self.sampling,
                self.seed,
                number,
            )
        sampled = time.perf_counter()
        scores = self.reward(rollout)
        if self.noise is not None:
            scores = replace(scores, reward=scores.reward + self.noise(rollout, number))
        if self.scaling is not None:
            self.scaling.see(self.world.gather(scores.reward))
            scores = self.scaling(scores)
        gold = None if self.gold is None else gold_rewards(self.gold, rollout)
        scored = time.perf_counter()
        speed = sum(map(len, rollout.completion_ids)) / (sampled - started)
        timing = dict(zip(_ROLLOUT_TIMES, (sampled - started, scored - sampled, speed), strict=True))
        size = mine.shape[1] * k
        return [
            self._prepare_batch(rollout, scores, gold, slice(i * size, (i + 1) * size), timing if i == 0 else {})
            for i in range(num_batches)
        ]

    def _prepare_batch(
        self, rollout: Rollout, scores: Scores, gold: Tensor | None, rows: slice, timing: Mapping[str, float]
    ) -> _Prepared:
        """The rows of a rollout as an optimizer batch, with advantages that all processes' rows have a part in."""
        sequences = rollout.sequences[rows]
        started = time.perf_counter()
        ref, anchor = self._frozen_logprobs(sequences)
        outputs = self._policy_outputs(sequences)
        passes_s = time.perf_counter() - started
        policy = outputs[0].detached()
        value = None if outputs[1] is None else outputs[1].detach()
        old, ref_logprob, anchor_logprob = (one.sequence_logprob() for one in (policy, ref, anchor))
        reward = scores.reward[rows].to(old.device)
        in_reward = self.kl.placement is KlPlacement.reward
        beta = self.algorithm.beta if in_reward else 0.0
        kl = k1(old, ref_logprob)
        columns = {
            "reward": reward,
            "shaped": shaped_reward(reward, old, anchor_logprob, beta, self.kl.estimator.value),
            "kl": kl,
            "entropy": policy.mean_entropy(),
            "mismatch": (rollout.sampled_logprob[rows] - old.cpu()).abs(),
            **lengths(rollout, rows),
            **parts_of_reward(scores, rows),
        }
        if self.anchor is not None:
            columns["kl_anchor"] = k1(old, anchor_logprob)
        if gold is not None:
            columns["gold"] = gold[rows]
        columns = of_all(columns, self.world)
        experience = Experience(columns["reward"], columns["shaped"])
        if self.algorithm.acts_on_tokens:
            log_ratio = k1(policy.logprob, anchor.logprob)
            grid = {"token_reward": token_rewards(reward, log_ratio, policy.mask, beta), "mask": policy.mask}
            if value is not None:
                grid["value"] = value
            grid = self._tokens_of_all(grid)
            experience = replace(
                experience,
                mask=grid["mask"].bool(),
                token_reward=grid["token_reward"],
                value=grid.get("value"),
            )
        result = self.algorithm.advantages(experience, self.baseline)
        self.baseline = result.state
        metrics = {
            "reward/mean": float(columns["reward"].mean()),
            "reward/std": float(columns["reward"].std(unbiased=False)),
            "reward/shaped_mean": float(columns["shaped"].mean()),
            "advantage/std": float(_actions(result.advantage, experience).std(unbiased=False)),
            "kl/k1": float(columns["kl"].mean()),
            "entropy": float(columns["entropy"].mean()),
            "rollout/logprob_mismatch": float(columns["mismatch"].mean()),
            **length_metrics(columns),
            **{name: float(columns[name].mean()) for name in parts_of_reward(scores, rows)},
            **({} if self.scaling is None else self.scaling.metrics()),
            **result.metrics,
            **timing,
            _PASSES_TIME: passes_s,
        }
        if "gold" in columns:
            metrics["gold/mean"] = float(columns["gold"].mean())
        if "kl_anchor" in columns:
            metrics["kl/anchor"] = float(columns["kl_anchor"].mean())
        samples = self.world.gather_json(_sample_rows(rollout, scores, kl.cpu(), gold, rows))
        batch = PolicyBatch(
            sequences,
            old,
            anchor_logprob,
            self._mine(result.advantage, sequences),
            old_token_logprob=policy.logprob if self.algorithm.acts_on_tokens else None,
            old_value=value,
            value_target=None if result.value_target is None else self._mine(result.value_target, sequences),
        )
        if result.keep is not None:
            batch = batch[self._mine(result.keep, sequences)]
        by_tokens = self.algorithm.normalised_by == "tokens"
        return _Prepared(
            batch=batch,
            normaliser=float(batch.sequences.completion_mask.sum() if by_tokens else len(batch)),
            num_samples=len(sequences),
            num_tokens=int(sequences.attention_mask.sum()),
            metrics=metrics,
            samples=samples[:_SAMPLES_KEPT],
            outputs=outputs if outputs[0].logprob.requires_grad else None,
        )

    def _outputs(self, sequences: Sequences) -> _Outputs:
        return policy_outputs(self.policy, self.critic, sequences, self.sampling.temperature)

    def _policy_outputs(self, sequences: Sequences) -> _Outputs:
        """Of a batch's rows, as the training pass has them, so that the first step's ratio is 1 to the bit.

        Where this rollout serves one step, whose rows all go through the model together, this is the training pass.
        """
        parts = self._parts(sequences)
        once = self.algorithm.on_policy and self.algorithm.learns_from_all and len(parts) == 1
        with torch.set_grad_enabled(once), recomputing(self.model), self.precision.autocast():
            outputs = [self._outputs(sequences[part]) for part in parts]
        if once:
            return outputs[0]
        values = [value for _, value in outputs if value is not None]
        return joined([tokens for tokens, _ in outputs]), torch.cat(values) if values else None

    @torch.no_grad()
    def _frozen_logprobs(self, sequences: Sequences) -> tuple[TokenLogprobs, TokenLogprobs]:
        """Of a batch's rows: the reference's log-probs, and the anchor's; without one the reference is it."""
        with self.precision.autocast():
            ref = self._logprobs_under(self.reference, sequences)
            return ref, ref if self.anchor is None else self._logprobs_under(self.anchor.model, sequences)

    def _logprobs_under(self, model: LanguageModel, sequences: Sequences) -> TokenLogprobs:
        """In the same parts as the policy's: where both are one model, they agree to the bit."""
        limits = self.settings.rows_of_pass, self.settings.micro_batch_tokens
        return frozen_logprobs(model, sequences, self.sampling.temperature, *limits)

    def _parts(self, sequences: Sequences) -> list[slice]:
        """The micro-batches of an optimizer batch."""
        return parts_of(sequences, self.settings.rows_of_pass, self.settings.micro_batch_tokens)

    def _tokens_of_all(self, grids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Figures of tokens, float32 [n, L-1] of this process' rows, to those of all; the longest row says how wide."""
        width = next(iter(grids.values())).shape[1]
        widest = int(self.world.max([width])[0])
        return {
            name: self.world.gather(pad(grid.float().cpu(), (0, widest - width))) for name, grid in grids.items()
        }

    def _mine(self, column: Tensor, sequences: Sequences) -> Tensor:
        """The rows of this process, `sequences`, of a whole batch's figures; a prompt's samples stay together."""
        k, width = self.algorithm.k, sequences.ids.shape[1] - 1
        groups = column.reshape(-1, k, *column.shape[1:])[self.world.share(len(column) // k)]
        rows = groups.reshape(-1, *column.shape[1:]).to(sequences.ids.device)
        return rows[:, :width] if rows.dim() == 2 else rows

    def _prompt_batch(self, prompts: Sequence[Prompt], index: Sequence[int]) -> PromptBatch:
        return prompt_batch(self.tokenizer, prompts, index, self.max_prompt_tokens)


def _actions(advantage: Tensor, experience: Experience) -> Tensor:
    """The advantages of what was done: of completions, or of their tokens without the padding."""
    return advantage if experience.mask is None else advantage[experience.mask]


def _sample_rows(
    rollout: Rollout, scores: Scores, kl: Tensor, gold: Tensor | None, rows: slice
) -> list[dict[str, Any]]:
    """The first samples of a batch as rows of samples.jsonl; `kl` belongs to the rows."""
    numbers = range(len(rollout))[rows]
    result = []
    for place, i in enumerate(numbers[:_SAMPLES_KEPT]):
        row: dict[str, Any] = {
            "prompt": plain_prompt(rollout.prompts[i]),
            "completion": rollout.completions[i],
            "reward": float(scores.reward[i]),
            "kl": float(kl[place]),
            "length": len(rollout.completion_ids[i]),
        }
        if gold is not None:
            row["gold"] = float(gold[i])
        if scores.terms:
            row["terms"] = {name: float(term[i]) for name, term in scores.terms.items()}
        result.append(row)
    return result
