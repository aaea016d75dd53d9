"""train-policy with an online algorithm."""

from __future__ import annotations

from transformers import PreTrainedModel

from rlhf_cli import build
from rlhf_cli.algos.base import OnlineAlgorithm
from rlhf_cli.models.causal import LanguageModel
from rlhf_cli.models.critic import SeparateCritic
from rlhf_cli.models.loading import load_causal_lm
from rlhf_cli.models.lora import Lora, plain_weights
from rlhf_cli.models.low_precision import hold_matrices_in
from rlhf_cli.models.recompute import enable_recomputation
from rlhf_cli.runs.common import explained_memory, micro_batch_keys, prepare, train, write_card_of
from rlhf_cli.runs.job import Artifact, Job
from rlhf_cli.runs.scoring import PolicyReward, load_reward
from rlhf_cli.train.anchor import EmaAnchor
from rlhf_cli.train.policy import PolicyTask
from rlhf_cli.train.recorder import RunRecorder, SilentRecorder, shared_run

# Shown while a policy learns from its samples, and plotted afterwards.
_SHOWN = ("reward/mean", "kl/k1", "gold/mean", "length/mean", "loss")
CURVES = ("reward/mean", "gold/mean", "kl/k1", "entropy", "length/mean", "grad_norm")
MEMORY_KEYS = (*micro_batch_keys("algo"), "rollout.max_rows", "rollout.max_tokens")


def shown_keys(job: Job) -> tuple[str, ...]:
    """Metrics for the person watching; a gold reward only where the data has one."""
    return tuple(key for key in _SHOWN if key != "gold/mean" or job.data.gold is not None)


def train_policy(job: Job, seed: int, sft: Artifact, rm: Artifact | None, judge: Artifact | None = None) -> None:
    """A policy into job.folder; `rm` and `judge` are None where no term of the reward asks for them."""
    algorithm: OnlineAlgorithm = job.config.algo
    num_steps = algorithm.train.steps
    assert num_steps is not None, "checked with the config"
    upstream = upstream_of(sft, rm, judge)
    with shared_run(job.request(job.config.name, seed, num_steps, shown_keys(job), upstream)) as recorder:
        say_problems(job, recorder)
        with explained_memory(MEMORY_KEYS):
            reward = load_reward(job, seed, sft, rm, judge)
        task = policy_task(job, recorder, algorithm, sft, reward, seed, reference=reward.judge)
        summary = train(task, algorithm.train, num_steps, job, recorder, seed, CURVES, MEMORY_KEYS)
        summary["samples_generated"] = summary["samples"]
        recorder.summary(summary)
        write_card_of(job, seed, sft.path, upstream, summary)


def upstream_of(sft: Artifact, rm: Artifact | None, judge: Artifact | None) -> dict[str, Artifact]:
    """The models behind a policy, by what they are to it."""
    every = {"sft": sft, "rm": rm, "coherence": judge}
    return {name: artifact for name, artifact in every.items() if artifact is not None}


def say_problems(job: Job, recorder: RunRecorder | SilentRecorder) -> None:
    """Warns once of settings that are allowed and known to be wrong."""
    if problem := job.config.algo.kl_problem(job.config.kl):
        recorder.message(f"warning: {problem}")


def policy_task(
    job: Job,
    recorder: RunRecorder | SilentRecorder,
    algorithm: OnlineAlgorithm,
    sft: Artifact,
    reward: PolicyReward,
    seed: int,
    *,
    reference: LanguageModel | None = None,
    start: str | None = None,
    mu: float | None = None,
    validation_seed: int | None = None,
) -> PolicyTask:
    """What an online algorithm learns.

    Args:
        job, recorder: of the run.
        algorithm: what it learns by.
        sft: the reference, and what training starts from.
        reward: what it is trained on.
        seed: of data order, sampling noise and adapter.
        reference: the SFT model, where it is loaded already.
        start: folder of other starting weights; then a `reference` has to be given.
        mu: of an anchor that follows the policy; None = the KL is to the reference.
        validation_seed: see `PolicyTask`.
    """
    config, data, device = job.config, job.data, job.precision.device
    assert start is None or reference is not None, "the policy with its adapter off is no reference then"
    begin = sft.path if start is None else start
    model, tokenizer = load_causal_lm("sft.path", begin, device)
    data.check_tokenizer("sft.path", tokenizer)
    build.check_context(config, "sft.path", model, data.max_completion_tokens)
    adapter = prepare(recorder, "peft", config.peft, algorithm.train, model, begin, seed)
    if reference is None:
        reference = load_causal_lm("sft.path", sft.path, device)[0] if adapter is None else adapter.off()
    if isinstance(reference, PreTrainedModel):
        hold_matrices_in(reference, job.precision.dtype)
    critic = build.critic(algorithm, model, sft.path, seed)
    if isinstance(critic, SeparateCritic) and algorithm.train.gradient_checkpointing:
        enable_recomputation("gradient_checkpointing", critic.backbone)
    anchor = None
    if mu is not None:
        assert adapter is None or isinstance(adapter, Lora), "checked with the config"
        twin, _ = load_causal_lm("sft.path", begin, device)
        anchor = EmaAnchor(twin, mu, lambda: plain_weights(model, adapter))
    return PolicyTask(
        model,
        reference,
        tokenizer,
        algorithm,
        reward.total,
        data.gold,
        data.prompts,
        data.prompts_validation[: algorithm.eval_prompts],
        data.max_prompt_tokens,
        job.sampling,
        job.precision,
        seed,
        job.world,
        adapter,
        kl=config.kl,
        critic=critic,
        anchor=anchor,
        noise=reward.noise(config.rm, seed),
        scaling=reward.scaling(),
        validation_seed=validation_seed,
    )
