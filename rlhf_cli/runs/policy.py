"""train-policy with an online algorithm."""

from __future__ import annotations

from rlhf_cli import build
from rlhf_cli.algos.base import OnlineAlgorithm
from rlhf_cli.models.causal import LanguageModel
from rlhf_cli.models.critic import SeparateCritic
from rlhf_cli.models.loading import load_causal_lm
from rlhf_cli.models.lora import Lora, plain_weights
from rlhf_cli.models.recompute import enable_recomputation
from rlhf_cli.rewards.ensemble import load_scorer
from rlhf_cli.rewards.model import Scorer
from rlhf_cli.runs.common import prepare, train, write_card_of
from rlhf_cli.runs.job import Artifact, Job
from rlhf_cli.runs.scoring import RewardOfRollout, reward_noise
from rlhf_cli.train.anchor import EmaAnchor
from rlhf_cli.train.policy import PolicyTask
from rlhf_cli.train.recorder import RunRecorder, SilentRecorder, shared_run

# Shown while a policy learns from its samples, and plotted afterwards.
_SHOWN = ("reward/mean", "kl/k1", "gold/mean", "length/mean", "loss")
CURVES = ("reward/mean", "gold/mean", "kl/k1", "entropy", "length/mean", "grad_norm")
MEMORY_KEYS = ("algo.train.micro_batch_size", "rollout.max_rows")


def shown_keys(job: Job) -> tuple[str, ...]:
    """Metrics for the person watching; a gold reward only where the data has one."""
    return tuple(key for key in _SHOWN if key != "gold/mean" or job.data.gold is not None)


def train_policy(job: Job, seed: int, sft: Artifact, rm: Artifact) -> None:
    """A policy into job.folder."""
    algorithm: OnlineAlgorithm = job.config.algo
    num_steps = algorithm.train.steps
    assert num_steps is not None, "checked with the config"
    upstream = {"sft": sft, "rm": rm}
    with shared_run(job.request(job.config.name, seed, num_steps, shown_keys(job), upstream)) as recorder:
        say_problems(job, recorder)
        reward_model = load_scorer("rm.path", rm.path, job.precision.device)
        task = policy_task(job, recorder, algorithm, sft, reward_model, seed)
        summary = train(task, algorithm.train, num_steps, job, recorder, seed, CURVES, MEMORY_KEYS)
        summary["samples_generated"] = summary["samples"]
        recorder.summary(summary)
        write_card_of(job, seed, sft.path, upstream, summary)


def say_problems(job: Job, recorder: RunRecorder | SilentRecorder) -> None:
    """Warns once of settings that are allowed and known to be wrong."""
    if problem := job.config.algo.kl_problem(job.config.kl):
        recorder.message(f"warning: {problem}")


def policy_task(
    job: Job,
    recorder: RunRecorder | SilentRecorder,
    algorithm: OnlineAlgorithm,
    sft: Artifact,
    reward_model: Scorer,
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
        reward_model: the reward.
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
        RewardOfRollout(reward_model, job.precision, config.rollout.max_rows),
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
        noise=reward_noise(config.rm, reward_model, seed),
        validation_seed=validation_seed,
    )
