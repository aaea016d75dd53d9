from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from fixtures_models import (
    CPU,
    FP32,
    byte_tokenizer,
    edit_json,
    make_job,
    reward_model,
    run_config,
    tiny_lm,
)

from rlhf_cli.config.schema import RunConfig
from rlhf_cli.data.tokenise import encode_prompt
from rlhf_cli.errors import RequestError
from rlhf_cli.models.loading import load_causal_lm, save_model
from rlhf_cli.rewards.model import load_reward_model
from rlhf_cli.rollout.engine import Sampling, generate
from rlhf_cli.runs.job import Artifact, Job
from rlhf_cli.runs.scoring import RewardOfRollout
from rlhf_cli.stages import resolve as stages
from rlhf_cli.stages.keys import file_digest, rm_key, sft_key
from rlhf_cli.stages.resolve import resolve_rm, resolve_sft
from rlhf_cli.train.seeding import derive_seed
from rlhf_cli.types import PromptBatch

PROCESSES = multiprocessing.get_context("fork")  # children inherit the patched training


def keys(config: RunConfig) -> tuple[str, str]:
    """Digests of the SFT model and of the reward model that is built on it."""
    job = make_job(config)
    sft = sft_key(job)
    return sft.digest, rm_key(job, Artifact("anywhere", sft.digest)).digest


def write_run(folder: Path, content: str = "whole") -> None:
    """What a training leaves, as far as stages look at it; it takes up what it finds there."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / "step-1").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps({"content": content}))
    (folder / "summary.json").write_text(json.dumps({"time_s": 12.4}))


class Watcher:
    """Stands in for training and for the person watching."""

    def __init__(self, folder: Path) -> None:
        self.config = run_config(folder)
        self.cache = folder / "cache"
        self.trained: list[tuple[Any, ...]] = []
        self.said: list[str] = []

    def sft(self, job: Job, seed: int) -> None:
        assert job.resume and not job.tracked
        self.trained.append(("sft", seed, job.command))
        write_run(job.folder)

    def rm(self, job: Job, seed: int, upstream: Artifact) -> None:
        assert job.resume and not job.tracked
        self.trained.append(("rm", seed, job.command, upstream))
        write_run(job.folder)

    def resolve(self) -> tuple[Artifact, Artifact]:
        job = make_job(self.config)
        sft = resolve_sft(job, self.said.append)
        return sft, resolve_rm(job, lambda: sft, self.said.append)


@pytest.fixture
def watcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watcher]:
    result = Watcher(tmp_path)
    monkeypatch.setattr(stages, "train_sft", result.sft)
    monkeypatch.setattr(stages, "train_rm", result.rm)
    yield result
    assert not list(tmp_path.glob("cache/.building-*")), "nothing half-made is left"


class TestCache:
    def test_each_stage_is_trained_once(self, watcher: Watcher) -> None:
        sft, rm = watcher.resolve()
        assert watcher.trained == [("sft", 0, "train-sft"), ("rm", 0, "train-rm", sft)]
        assert watcher.resolve() == (sft, rm)
        assert len(watcher.trained) == 2
        assert keys(watcher.config) == (sft.digest, rm.digest)
        for stage, artifact in (("sft", sft), ("rm", rm)):
            folder = watcher.cache / f"{stage}-{artifact.digest[:12]}"
            assert artifact.path == str(folder / "model")
            assert sorted(file.name for file in folder.iterdir()) == ["model", "stage.json", "summary.json"]

    def test_it_says_what_it_trains_and_reuses(self, watcher: Watcher) -> None:
        sft, rm = (
            f"{stage}-{digest[:12]}" for stage, digest in zip(("sft", "rm"), keys(watcher.config), strict=True)
        )
        watcher.resolve()
        assert watcher.said == [
            f"{stage}: training once into {watcher.cache / folder} (nothing cached yet)"
            for stage, folder in (("sft", sft), ("rm", rm))
        ]
        watcher.said.clear()
        watcher.resolve()
        assert len(watcher.said) == 2
        for line, stage, folder in zip(watcher.said, ("sft", "rm"), (sft, rm), strict=True):
            start = f"{stage}: reusing {watcher.cache / folder} (same settings, rows, seed and precision; trained "
            assert re.fullmatch(re.escape(start) + r"\d{4}-\d\d-\d\d \d\d:\d\d in 12 s\)", line), line

    def test_it_says_what_differs_from_the_nearest(self, watcher: Watcher) -> None:
        watcher.resolve()
        first = f"rm-{keys(watcher.config)[1][:12]}"
        watcher.config.rm.seed = 4
        watcher.config.rm.train.lr = 0.5
        watcher.said.clear()
        watcher.resolve()
        assert watcher.said[1].endswith(
            f"(nearest cached: {first}, differs in rm.train.lr 0.001 -> 0.5, seed 0 -> 4)"
        )
        # now two are cached: the nearer one is named, and rows without their digest
        watcher.config.data.swap_rate = 0.5
        second = max(watcher.cache.glob("rm-*"), key=lambda folder: folder.name != first).name
        watcher.said.clear()
        watcher.resolve()
        assert watcher.said[1].endswith(f"(nearest cached: {second}, differs in data.rows)")

    def test_it_names_no_more_than_three_differences(self, watcher: Watcher) -> None:
        watcher.resolve()
        train = watcher.config.rm.train
        train.lr, train.steps, train.beta1, train.beta2, train.eps = 0.5, 7, 0.1, 0.2, 0.3
        watcher.said.clear()
        watcher.resolve()
        assert watcher.said[1].endswith(
            "differs in rm.train.beta1 0.9 -> 0.1, rm.train.beta2 0.999 -> 0.2, rm.train.eps 1e-08 -> 0.3 and 2 more)"
        )

    def test_another_seed_of_the_policy_shares_both(self, watcher: Watcher) -> None:
        watcher.resolve()
        watcher.config.seed = 9
        watcher.resolve()
        assert [entry[0] for entry in watcher.trained] == ["sft", "rm"]

    def test_another_reward_model_shares_the_sft_model(self, watcher: Watcher) -> None:
        watcher.resolve()
        watcher.config.rm.seed = 3
        watcher.resolve()
        assert [entry[:2] for entry in watcher.trained] == [("sft", 0), ("rm", 0), ("rm", 3)]

    def test_a_failed_training_leaves_nothing_that_is_whole(self, watcher: Watcher, monkeypatch: Any) -> None:
        def fail(job: Job, seed: int) -> None:
            write_run(job.folder, "half")
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(stages, "train_sft", fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                watcher.resolve()
        assert not list(watcher.cache.glob("sft-*"))
        sft, _ = watcher.resolve()
        assert json.loads(Path(sft.path, "config.json").read_text()) == {"content": "whole"}

    def test_a_half_made_folder_is_continued_and_never_taken_for_whole(self, watcher: Watcher) -> None:
        name = f"sft-{keys(watcher.config)[0][:12]}"
        half = watcher.cache / f".building-{name}"
        write_run(half, "half")
        (half / "metrics.jsonl").write_text("rows so far")
        (half / "stage.json").write_text("{}")  # killed in its last moment
        other = watcher.cache / ".building-sft-0123456789ab"  # another artifact's: perhaps being made
        write_run(other)
        sft, _ = watcher.resolve()
        assert [entry[0] for entry in watcher.trained] == ["sft", "rm"]
        assert json.loads(Path(sft.path, "config.json").read_text()) == {"content": "whole"}
        assert (watcher.cache / name / "metrics.jsonl").read_text() == "rows so far"
        assert json.loads((watcher.cache / name / "stage.json").read_text())["seed"] == 0
        assert other.is_dir()
        shutil.rmtree(other)

    def test_a_folder_of_that_name_without_a_key_is_replaced(self, watcher: Watcher) -> None:
        name = f"sft-{keys(watcher.config)[0][:12]}"
        write_run(watcher.cache / name, "half")
        (watcher.cache / name / "leftover").touch()
        sft, _ = watcher.resolve()
        assert [entry[0] for entry in watcher.trained] == ["sft", "rm"]
        assert json.loads(Path(sft.path, "config.json").read_text()) == {"content": "whole"}
        assert not (watcher.cache / name / "leftover").exists()


class TestGiven:
    def test_given_paths_are_used(self, watcher: Watcher, tmp_path: Path) -> None:
        save_model(tiny_lm(), byte_tokenizer(), tmp_path / "run" / "model")
        reward_model().save(tmp_path / "rm")
        watcher.config.sft.path = str(tmp_path / "run")
        watcher.config.rm.path = str(tmp_path / "rm")
        sft, rm = watcher.resolve()
        model = str(tmp_path / "run" / "model")
        assert sft == Artifact(model, file_digest(model))
        assert rm == Artifact(str(tmp_path / "rm"), file_digest(str(tmp_path / "rm")))
        assert watcher.said == [
            f"sft: using {model} (sft.path is set)",
            f"rm: using {tmp_path / 'rm'} (rm.path is set; read out as stored with it)",
        ]
        assert not watcher.trained and not watcher.cache.exists()

    def test_a_given_reward_model_needs_no_sft_model(self, watcher: Watcher, tmp_path: Path) -> None:
        reward_model().save(tmp_path / "rm")
        watcher.config.rm.path = str(tmp_path / "rm")

        def never() -> Artifact:
            raise AssertionError("asked for")

        assert resolve_rm(make_job(watcher.config), never, watcher.said.append).path == str(tmp_path / "rm")

    def test_a_changed_file_of_a_given_sft_model_parts_reward_models(
        self, watcher: Watcher, tmp_path: Path
    ) -> None:
        folder = tmp_path / "sft"
        save_model(tiny_lm(), byte_tokenizer(), folder)
        watcher.config.sft.path = str(folder)
        _, first = watcher.resolve()
        edit_json(folder / "generation_config.json", eos_token_id=[1, 5])
        _, second = watcher.resolve()
        assert first.digest != second.digest
        assert [entry[0] for entry in watcher.trained] == ["rm", "rm"]

    @pytest.mark.parametrize("stage", ["sft", "rm"])
    def test_paths_without_a_model(self, watcher: Watcher, stage: str) -> None:
        getattr(watcher.config, stage).path = "/no/such"
        with pytest.raises(RequestError, match=rf"^{stage}\.path=/no/such: no such folder$"):
            watcher.resolve()

    def test_nothing_is_built_with_auto_off(self, watcher: Watcher) -> None:
        watcher.config.stages.auto = False
        with pytest.raises(RequestError) as caught:
            watcher.resolve()
        assert str(caught.value) == (
            "sft.path=null: expected a path, because stages.auto=false builds no missing stage"
        )
        watcher.config.stages.auto = True
        made = watcher.resolve()
        watcher.config.stages.auto = False
        assert watcher.resolve() == made  # what is there already may be used

    def test_a_cache_that_cannot_be_made(self, watcher: Watcher, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        watcher.config.stages.cache_dir = str(tmp_path / "file")
        with pytest.raises(RequestError, match=r"^stages\.cache_dir=.*/file: cannot be created \(File exists\)$"):
            watcher.resolve()


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited for 10 seconds")


def resolve_in_child(config: RunConfig, train: Callable[[Job, int], None], log: Path) -> None:
    """Resolves the SFT model in a child process; what it says goes to a file."""
    stages.train_sft = train
    with log.open("a") as file:
        artifact = resolve_sft(make_job(config), lambda line: print(line, file=file, flush=True))
        print(artifact.path, file=file)


@contextmanager
def resolving(
    config: RunConfig, train: Callable[[Job, int], None], logs: Sequence[Path]
) -> Iterator[list[ForkProcess]]:
    """A child process for each log; none of them outlives the test."""
    children = [PROCESSES.Process(target=resolve_in_child, args=(config, train, log), daemon=True) for log in logs]
    for child in children:
        child.start()
    try:
        yield children
    finally:
        for child in children:
            child.kill()
            child.join(timeout=30)


class TestProcesses:
    def test_two_at_once_train_once(self, tmp_path: Path) -> None:
        config = run_config(tmp_path)

        def slowly(job: Job, seed: int) -> None:
            with (tmp_path / "trained").open("a") as file:
                print(os.getpid(), file=file)
            write_run(job.folder)
            wait_for(lambda: any("waiting" in log.read_text() for log in logs))

        logs = [tmp_path / "0.log", tmp_path / "1.log"]
        for log in logs:
            log.touch()
        with resolving(config, slowly, logs) as children:
            for child in children:
                child.join(timeout=30)
            assert [child.exitcode for child in children] == [0, 0]
        assert len((tmp_path / "trained").read_text().split()) == 1
        (trained, path), (waited, reused, same_path) = sorted(
            (log.read_text().splitlines() for log in logs), key=len
        )
        assert trained.startswith("sft: training once into ")
        assert waited == "sft: another process is training it, waiting"
        assert reused.startswith("sft: reusing ")
        assert path == same_path and Path(path).is_dir()
        assert not list(tmp_path.glob("cache/.building-*"))

    def test_a_killed_one_leaves_the_lock_and_nothing_whole(self, watcher: Watcher, tmp_path: Path) -> None:
        def forever(job: Job, seed: int) -> None:
            write_run(job.folder, "half")
            (tmp_path / "started").touch()
            time.sleep(60)

        with resolving(watcher.config, forever, [tmp_path / "log"]) as (child,):
            wait_for((tmp_path / "started").exists)
        assert child.exitcode == -signal.SIGKILL
        assert len(list(watcher.cache.glob(".building-sft-*"))) == 1  # what it left
        assert not list(watcher.cache.glob("sft-*"))
        (lock,) = watcher.cache.glob(".sft-*.lock")
        with FileLock(lock, timeout=10):
            pass  # it died with its process
        sft, _ = watcher.resolve()
        assert watcher.said[0].startswith("sft: training once into ")
        assert json.loads(Path(sft.path, "config.json").read_text()) == {"content": "whole"}


def test_what_is_built_is_a_reward_model_in_units_of_the_sft_samples(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    config.rm.seed = 5
    job = make_job(config)
    said: list[str] = []
    sft = resolve_sft(job, said.append)
    rm = resolve_rm(job, lambda: sft, said.append)
    record = json.loads(Path(rm.path).parent.joinpath("run.json").read_text())
    assert (record["status"], record["command"], record["seed"]) == ("finished", "train-rm", 5)
    assert record["upstream"] == {"sft": {"path": sft.path, "digest": sft.digest}}
    model, tokenizer = load_causal_lm("sft.path", sft.path, CPU)
    prompts = tuple(job.data.prompts[:8])
    ids = tuple(tuple(encode_prompt(tokenizer, prompt, job.data.max_prompt_tokens)) for prompt in prompts)
    sampling = Sampling(config.rollout.max_new_tokens, config.rollout.temperature)
    batch = PromptBatch(prompts, ids, tuple(range(8)))
    rollout = generate(model, tokenizer, batch, 1, sampling, derive_seed(5, "standardise"), 0)
    scores = RewardOfRollout(load_reward_model("rm.path", rm.path, CPU), FP32)(rollout)
    assert float(scores.reward.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.reward.std()) == pytest.approx(1, abs=1e-4)
    summary = json.loads(Path(rm.path).parent.joinpath("summary.json").read_text())
    assert summary["rm/sft_mean"] == pytest.approx(float(scores.raw.mean()), abs=1e-5)
    assert summary["rm/sft_std"] == pytest.approx(float(scores.raw.std()), abs=1e-5)
