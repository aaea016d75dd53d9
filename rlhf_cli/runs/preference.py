"""train-policy with an algorithm that learns from pairs: the data's, or pairs of the SFT model's own samples."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli import build
from rlhf_cli.algos.preference import Labels, PreferenceAlgorithm
from rlhf_cli.algos.preference import Reference as When
from rlhf_cli.data.dataset import rows_digest
from rlhf_cli.data.rows import mapped
from rlhf_cli.data.tokenise import encode_completion, encode_prompt, prompt_batch
from rlhf_cli.errors import RequestError
from rlhf_cli.files import write_bytes_atomic, write_json_atomic
from rlhf_cli.models.causal import LanguageModel
from rlhf_cli.models.loading import load_causal_lm
from rlhf_cli.models.low_precision import hold_matrices_in
from rlhf_cli.rollout.engine import generate
from rlhf_cli.runs.common import (
    COUNTED_ROWS,
    explained_memory,
    micro_batch_keys,
    prepare,
    say_cuts,
    train,
    write_card_of,
)
from rlhf_cli.runs.job import Artifact, Job
from rlhf_cli.runs.policy import upstream_of
from rlhf_cli.runs.scoring import PolicyReward, SftModel, load_reward, measured
from rlhf_cli.train.measuring import means
from rlhf_cli.train.preference import EncodedPair, PreferenceTask, Reference, reference_logprobs
from rlhf_cli.train.recorder import RunRecorder, SilentRecorder, shared_run
from rlhf_cli.train.sampled_pairs import (
    PAIRS_FILE,
    SampledPair,
    as_json,
    ranked_pairs,
    read_pairs,
    write_pairs,
)
from rlhf_cli.train.seeding import derive_seed
from rlhf_cli.types import Example, Preference, Prompt, Rollout

# Beside the pairs: how long they took, for a run that is resumed.
_TIMES_FILE = "pairs_time.json"

# Raised when a change of code changes the reference's log-probs of the same pairs.
_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class _Pairs:
    """What is trained on, as ids."""

    train: Sequence[EncodedPair]
    validation: Sequence[EncodedPair]
    digest: Callable[[], str]  # of the pairs behind the ids
    figures: dict[str, float]  # how they were made, for the summary


def train_on_pairs(job: Job, seed: int, sft: Artifact, rm: Artifact | None, judge: Artifact | None = None) -> None:
    """A policy into job.folder; `rm` and `judge` rank on-policy samples, and are None where nothing asks for them."""
    config, data = job.config, job.data
    algo: PreferenceAlgorithm = config.algo
    settings = algo.train
    upstream = upstream_of(sft, rm, judge)
    keys = ("loss", "dpo/accuracy", "dpo/margin", "eval/loss", "eval/dpo/accuracy")
    num_steps = settings.num_steps(len(data.pairs))  # of on-policy pairs it is known once they are there
    with shared_run(job.request(config.name, seed, num_steps, keys, upstream)) as recorder:
        model, tokenizer = load_causal_lm("sft.path", sft.path, job.precision.device)
        model.eval()
        data.check_tokenizer("sft.path", tokenizer)
        build.check_context(config, "sft.path", model, data.max_completion_tokens)
        if config.learns_from_pairs():
            pairs = _pairs_of_data(job, recorder, tokenizer)
        else:
            loaded = SftModel(model, tokenizer)

            def make_reward() -> PolicyReward | None:
                return load_reward(job, seed, sft, rm, judge, loaded) if config.asks_reward() else None

            pairs = _pairs_on_policy(job, recorder, seed, loaded, make_reward)
            num_steps = settings.num_steps(len(pairs.train))
            recorder.expect(num_steps)
        adapter = prepare(recorder, "peft", config.peft, settings, model, sft.path, seed)
        off = None if adapter is None else adapter.off()
        task = PreferenceTask(
            model,
            _reference(job, recorder, sft, pairs, tokenizer, model, off),
            tokenizer,
            algo,
            pairs.train,
            pairs.validation,
            job.precision,
            seed,
            job.world,
            adapter,
        )
        curves = ("loss", "eval/loss", "dpo/accuracy", "dpo/margin", "logps/chosen", "grad_norm")
        memory_keys = micro_batch_keys("algo")
        summary = train(task, settings, num_steps, job, recorder, seed, curves, memory_keys)
        del task, model, adapter, off  # the samples are of what was saved: two models at a time are enough
        summary |= pairs.figures | _figures_of_samples(job, seed, sft, rm, judge)
        recorder.summary(summary)
        write_card_of(job, seed, sft.path, upstream, summary)


def _figures_of_samples(
    job: Job, seed: int, sft: Artifact, rm: Artifact | None, judge: Artifact | None
) -> dict[str, float]:
    """What other ways of training measure as they go: KL, length, gold reward and, where one was used, reward."""
    loaded = SftModel(*load_causal_lm("sft.path", sft.path, job.precision.device))
    with explained_memory(("rollout.max_rows", "rollout.max_tokens", *micro_batch_keys("algo"))):
        reward = load_reward(job, seed, sft, rm, judge, loaded) if job.config.asks_reward() else None
        return means(measured(job, seed, job.folder / "model", loaded.model, reward))


def _pairs_of_data(job: Job, recorder: RunRecorder | SilentRecorder, tokenizer: PreTrainedTokenizerBase) -> _Pairs:
    data = job.data
    max_prompt, max_completion = data.max_prompt_tokens, data.max_completion_tokens

    def encode(pair: Preference) -> EncodedPair:
        prompt = encode_prompt(tokenizer, pair.prompt, max_prompt)
        chosen, rejected = (
            encode_completion(tokenizer, text, max_completion, append_eos=True)
            for text in (pair.chosen, pair.rejected)
        )
        return (prompt, chosen), (prompt, rejected)

    looked_at = data.pairs[: COUNTED_ROWS // 2]
    sides = [Example(pair.prompt, text) for pair in looked_at for text in (pair.chosen, pair.rejected)]
    say_cuts(recorder, tokenizer, sides, max_prompt, max_completion)
    return _Pairs(
        mapped(data.pairs, encode),
        mapped(data.pairs_validation, encode),
        lambda: rows_digest(data.pairs, data.pairs_validation),
        {"pairs": len(data.pairs), "samples_generated": 0},
    )


def _pairs_on_policy(
    job: Job,
    recorder: RunRecorder | SilentRecorder,
    seed: int,
    sft: SftModel,
    make_reward: Callable[[], PolicyReward | None],
) -> _Pairs:
    """Samples of the SFT model; a run that is resumed reads those it began with."""
    algo: PreferenceAlgorithm = job.config.algo
    prompts = {
        "train": job.data.prompts[: algo.num_prompts],
        "validation": job.data.prompts_validation[: algo.eval_prompts],
    }
    file = job.folder / PAIRS_FILE
    if not job.world.from_main(file.is_file):
        started = time.perf_counter()
        with explained_memory(("rollout.max_rows",)):
            reward = make_reward()
            rows = [
                row
                for split, several in prompts.items()
                for row in job.world.gather_json(_sampled(job, split, several, seed, sft, reward))
            ]
        seconds = time.perf_counter() - started
        job.world.from_main(lambda: _keep_pairs(file, rows, seconds))
    pairs = read_pairs(file)
    num_samples = algo.k * sum(map(len, prompts.values()))
    num_ties = num_samples * (algo.k - 1) // 2 - len(pairs)
    by_split = {split: [pair for pair in pairs if pair.split == split] for split in prompts}
    counts = ", ".join(f"{split} {len(several):,}" for split, several in by_split.items())
    recorder.message(f"{num_samples:,} samples -> {len(pairs):,} pairs ({counts}); dropped: {num_ties:,} ties")
    job.world.from_main(lambda: _check_sides(algo, by_split))

    def encode(pair: SampledPair) -> EncodedPair:
        prompt = encode_prompt(sft.tokenizer, pair.prompt, job.data.max_prompt_tokens)
        return (prompt, pair.chosen_ids), (prompt, pair.rejected_ids)

    return _Pairs(
        mapped(by_split["train"], encode),
        mapped(by_split["validation"], encode),
        lambda: hashlib.sha256(file.read_bytes()).hexdigest(),
        {
            "pairs": len(by_split["train"]),
            "pairs/ties": num_ties,
            "samples_generated": num_samples,
            **json.loads((job.folder / _TIMES_FILE).read_text(encoding="utf-8")),
        },
    )


def _check_sides(algo: PreferenceAlgorithm, by_split: Mapping[str, Sequence[SampledPair]]) -> None:
    """Raises RequestError where a split has no pair."""
    for split, several in by_split.items():
        if not several:
            raise RequestError(
                f"algo.k={algo.k}: all samples of the {split} prompts are ties; raise it, algo.num_prompts or "
                "algo.eval_prompts"
            )


def _keep_pairs(file: Path, rows: Sequence[dict[str, object]], seconds: float) -> None:
    """The pairs last: where they are, their time is."""
    write_json_atomic(file.with_name(_TIMES_FILE), {"time/pairs_s": seconds})
    write_pairs(file, rows)


def _sampled(
    job: Job,
    split: str,
    prompts: Sequence[Prompt],
    seed: int,
    sft: SftModel,
    reward: PolicyReward | None,
) -> list[dict[str, object]]:
    """This process' part of the pairs of a split."""
    algo = job.config.algo
    mine = job.world.share(len(prompts))
    batch = prompt_batch(sft.tokenizer, prompts[mine], range(len(prompts))[mine], job.data.max_prompt_tokens)
    noise = derive_seed(seed, "pairs", split)
    with job.precision.autocast():
        rollout = generate(sft.model, sft.tokenizer, batch, algo.k, job.sampling_of_pairs, noise, 0)
    rewards = _rewards(job, rollout, reward, None if split == "validation" else seed)
    return [as_json(pair) for pair in ranked_pairs(split, rollout, rewards)]


def _rewards(job: Job, rollout: Rollout, reward: PolicyReward | None, noise_seed: int | None) -> list[float]:
    """What the samples are ranked by, with `rm.noise` where there is a seed for it."""
    if job.config.algo.labels is Labels.gold:
        assert job.data.gold is not None, "checked with the config"
        texts = zip(rollout.prompts, rollout.completions, strict=True)
        return [job.data.gold(prompt, completion) for prompt, completion in texts]
    assert reward is not None
    scores, scaling = reward.total(rollout), reward.scaling()
    noise = None if noise_seed is None else reward.noise(job.config.rm, noise_seed)
    if noise is not None:
        scores = replace(scores, reward=scores.reward + noise(rollout, 0))
    return (scores if scaling is None else scaling(scores)).reward.tolist()


def _reference(
    job: Job,
    recorder: RunRecorder | SilentRecorder,
    sft: Artifact,
    pairs: _Pairs,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    off: LanguageModel | None,
) -> Reference:
    """Where the reference's log-probs come from.

    Args:
        job, recorder, sft, pairs, tokenizer: of the run.
        model: the policy before its first step.
        off: the same without its adapter; None where it has none: then `model` itself still is the reference.
    """
    if job.config.algo.reference is When.on_the_fly:
        if off is None:
            off, _ = load_causal_lm("sft.path", sft.path, job.precision.device)
            hold_matrices_in(off, job.precision.dtype)
        return Reference(model=off)
    settings = job.config.algo.train
    key = {
        "schema": _SCHEMA_VERSION,
        "sft": sft.digest,
        "pairs": job.world.from_main(pairs.digest),
        "max_prompt_tokens": job.data.max_prompt_tokens,
        "max_completion_tokens": job.data.max_completion_tokens,
        "precision": job.precision.name,
        "num_pairs": settings.rows_of_pass,
        "num_tokens": settings.micro_batch_tokens,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    file = Path(job.config.stages.cache_dir) / f"reference-{digest[:12]}.safetensors"
    if job.world.from_main(file.is_file):
        recorder.message(f"reference: reusing {file} (same SFT model, pairs and precision)")
    else:
        recorder.message(f"reference: log-probs of {len(pairs.train) + len(pairs.validation):,} pairs into {file}")
        pad_id = int(tokenizer.pad_token_id)
        with explained_memory(micro_batch_keys("algo")):
            tables = {
                split: reference_logprobs(
                    model if off is None else off, rows, pad_id, settings, job.precision, job.world
                )
                for split, rows in (("train", pairs.train), ("validation", pairs.validation))
            }
        job.world.from_main(lambda: _keep(file, tables))
    found = load_file(file)
    return Reference(logprobs=(found["train"], found["validation"]))


def _keep(file: Path, tables: dict[str, Tensor]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomic(file, to_bytes({name: table.contiguous() for name, table in tables.items()}))
    except PermissionError as error:
        raise RequestError(f"stages.cache_dir={file.parent}: cannot be written to ({error.strerror})") from None
