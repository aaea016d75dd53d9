"""train-sft."""

from __future__ import annotations

from rlhf_cli import build
from rlhf_cli.data.tokenise import encode_examples
from rlhf_cli.errors import bad_value
from rlhf_cli.models.loading import resolve_path
from rlhf_cli.runs.common import micro_batch_keys, prepare, say_cuts, train, write_card_of
from rlhf_cli.runs.job import Job
from rlhf_cli.train.recorder import shared_run
from rlhf_cli.train.sft import SftTask, Snapshots, snapshot_steps

# Folder beside model/ with the models that were kept on the way.
SNAPSHOTS = "snapshots"


def train_sft(job: Job, seed: int) -> None:
    """Supervised fine-tuning into job.folder."""
    config, data = job.config, job.data
    settings = config.sft.train
    num_steps = settings.num_steps(len(data.sft))
    if config.sft.snapshots >= num_steps:
        raise bad_value("sft.snapshots", config.sft.snapshots, f"fewer than the {num_steps} optimizer steps")
    with shared_run(job.request("sft", seed, num_steps, ("loss", "eval/loss"))) as recorder:
        model, tokenizer = build.backbone("model", config.model, seed, job.precision.device)
        data.check_tokenizer("model", tokenizer)
        build.check_context(config, "model", model, data.sft_completion_tokens)
        say_cuts(recorder, tokenizer, data.sft, data.max_prompt_tokens, data.sft_completion_tokens)
        base = None if config.model.path is None else resolve_path("model.path", config.model.path)
        adapter = prepare(recorder, "sft.peft", config.sft.peft, settings, model, base, seed)
        task = SftTask(
            model,
            tokenizer,
            encode_examples(tokenizer, data.sft, data.max_prompt_tokens, data.sft_completion_tokens),
            encode_examples(tokenizer, data.sft_validation, data.max_prompt_tokens, data.sft_completion_tokens),
            settings,
            job.precision,
            seed,
            job.world,
            adapter,
            snapshots=Snapshots(job.folder / SNAPSHOTS, snapshot_steps(num_steps, config.sft.snapshots)),
        )
        curves = ("loss", "eval/loss", "grad_norm", "lr")
        summary = train(task, settings, num_steps, job, recorder, seed, curves, micro_batch_keys("sft"))
        write_card_of(job, seed, base, {}, summary)
