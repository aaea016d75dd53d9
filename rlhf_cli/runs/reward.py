"""train-rm."""

from __future__ import annotations

from rlhf_cli import build
from rlhf_cli.config.schema import Standardize
from rlhf_cli.data.tokenise import prompt_batch
from rlhf_cli.models.loading import load_causal_lm
from rlhf_cli.rewards.model import load_reward_model, store_scale
from rlhf_cli.rollout.engine import generate
from rlhf_cli.runs.common import COUNTED_ROWS, prepare, say_cuts, train, write_card_of
from rlhf_cli.runs.job import Artifact, Job
from rlhf_cli.runs.scoring import RewardOfRollout
from rlhf_cli.train.recorder import shared_run
from rlhf_cli.train.reward import RewardTask, encode
from rlhf_cli.train.seeding import derive_seed
from rlhf_cli.types import Example


def train_rm(job: Job, seed: int, sft: Artifact) -> None:
    """A reward model into job.folder, standardised on samples of the SFT model."""
    config, data = job.config, job.data
    settings = config.rm.train
    num_steps = settings.num_steps(len(data.pairs))
    keys = ("loss", "rm/accuracy", "eval/loss", "eval/rm/accuracy")
    with shared_run(job.request(f"rm {config.rm.name}", seed, num_steps, keys, {"sft": sft})) as recorder:
        reward_model = build.new_reward_model(config, sft.path, job.precision.device)
        data.check_tokenizer("rm.model", reward_model.tokenizer)
        build.check_context(config, "rm.model", reward_model.model, data.max_completion_tokens)
        chosen = [Example(pair.prompt, pair.chosen) for pair in data.pairs[:COUNTED_ROWS]]
        say_cuts(recorder, reward_model.tokenizer, chosen, data.max_prompt_tokens, data.max_completion_tokens)
        base = build.rm_base(config, sft.path)
        adapter = prepare(recorder, "rm.peft", config.rm.peft, settings, reward_model.model, base, seed)
        task = RewardTask(
            reward_model,
            encode(reward_model, data.pairs),
            encode(reward_model, data.pairs_validation),
            settings,
            job.precision,
            seed,
            use_margin=config.rm.use_margin,
            world=job.world,
            adapter=adapter,
        )
        curves = (*keys, "rm/margin", "grad_norm")
        extra = train(task, settings, num_steps, job, recorder, seed, curves, ("rm.train.micro_batch_size",))
        if config.rm.standardize is Standardize.sft_samples:
            extra |= _standardise(job, seed, sft)
            recorder.summary(extra)
        write_card_of(job, seed, base, {"sft": sft}, extra)


def _standardise(job: Job, seed: int, sft: Artifact) -> dict[str, float]:
    """Stores mean and std of the raw reward over samples of the SFT model with the reward model."""
    config, data, device = job.config, job.data, job.precision.device
    reward_model = load_reward_model("rm.path", str(job.folder / "model"), device)
    policy, tokenizer = load_causal_lm("sft.path", sft.path, device)
    prompts = data.prompts[: config.rm.standardize_samples]
    mine = job.world.share(len(prompts))
    batch = prompt_batch(tokenizer, prompts[mine], range(len(prompts))[mine], data.max_prompt_tokens)
    with job.precision.autocast():
        rollout = generate(policy, tokenizer, batch, 1, job.sampling, derive_seed(seed, "standardise"), 0)
    reward = RewardOfRollout(reward_model, job.precision, config.rollout.max_rows)
    raw = job.world.gather(reward(rollout).raw).double()
    mean, std = float(raw.mean()), float(raw.std())
    for name in ("model", "model_best", "model_last"):
        if job.world.is_main and (job.folder / name).is_dir():
            store_scale(job.folder / name, mean, std)
    return {"rm/sft_mean": mean, "rm/sft_std": std}
