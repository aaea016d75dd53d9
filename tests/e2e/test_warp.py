"""WARP as it is run: members, anchors, merging and front on the disk are what algorithm 1 says they are."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from rlhf_cli import build
from rlhf_cli.commands.help import conf_path
from rlhf_cli.commands.launch import launch
from rlhf_cli.config.schema import RunConfig
from rlhf_cli.config.store import register
from rlhf_cli.models.loading import load_causal_lm
from rlhf_cli.ops.merging import angles, slerp_many
from rlhf_cli.rewards.model import load_reward_model
from rlhf_cli.rollout.engine import Sampling
from rlhf_cli.runs import warp
from rlhf_cli.runs.scoring import RewardOfRollout
from rlhf_cli.train.anchor import EmaAnchor
from rlhf_cli.train.loop import fit
from rlhf_cli.train.policy import PolicyTask
from rlhf_cli.train.precision import Precision
from tests.e2e.fixtures_e2e import content, crash, fail_at, figures, files, rows, timeless, weights

T = 4
SMALL = [
    "experiment=smoke",
    "device=cpu",
    "precision=fp32",
    "checkpoint.every=2",
    "algo.train.lr=1e-2",
    f"algo.train.steps={T}",
]
Start = Callable[..., Path]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(cache: Path, tmp_path: Path) -> Start:
    """Trains a policy; its folder."""

    def run(name: str, *extra: str, status: int = 0) -> Path:
        folder = tmp_path / name
        line = [*SMALL, f"stages.cache_dir={cache}", f"run_dir={folder}", *extra]
        assert launch("train-policy", line) == status
        return folder

    return run


def model(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def sft(cache: Path) -> dict[str, Tensor]:
    (folder,) = cache.glob("sft-*")
    return model(folder / "model")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.allclose(one[name], other[name], rtol=0, atol=1e-6) for name in one)


def learned(row: dict[str, float]) -> dict[str, float]:
    """What a row says of the training, without what only one kind of run has."""
    return {name: value for name, value in row.items() if not name.startswith(("warp/", "kl/anchor"))}


def test_an_anchor_that_stays_is_the_sft_model(start: Start):
    stays = start("stays", "algo=warp", "algo.I=1", "algo.mu=0")
    fixed = start("fixed", "algo=warp", "algo.I=1", "algo.anchor=sft")
    assert [learned(row) for row in figures(stays)] == [learned(row) for row in figures(fixed)]
    for name in ("members/i1-m1/model", "members/i1-m2/model", "iterations/1/merged", "model"):
        assert equal(model(stays / name), model(fixed / name))


def test_the_first_member_with_a_fixed_anchor_is_reinforce(start: Start):
    warp = start("warp", "algo=warp", "algo.I=1", "algo.mu=0")
    reinforce = start("reinforce", "algo=reinforce")
    # the last row has an evaluation, whose noise is the same too
    assert [learned(row) for row in figures(warp)][:T] == figures(reinforce)
    assert equal(model(warp / "members/i1-m1/model"), model(reinforce / "model"))
    assert not equal(model(warp / "members/i1-m2/model"), model(reinforce / "model"))


def test_an_anchor_that_is_the_policy_holds_nothing(start: Start):
    free = start("free", "algo=warp", "algo.mu=1")
    assert all(row["kl/anchor"] == 0.0 for row in figures(free))
    assert all(row["reward/shaped_mean"] == row["reward/mean"] for row in figures(free))
    some = figures(start("some", "algo=warp", "algo.mu=0.3"))
    # at a member's first step anchor and policy are one; later the anchor follows, and is behind
    assert [row["kl/anchor"] == 0.0 for row in some] == [row["step"] % T == 1 for row in some]


def test_one_member_all_the_way_is_one_run(start: Start, cache: Path):
    folder = start("one", "algo=warp", "algo.I=1", "algo.M=1", "algo.eta=1", "algo.mu=0.3")
    member = model(folder / "members/i1-m1/model")
    for name in ("iterations/1/merged", "iterations/1/start", "front/eta-1", "model"):
        assert equal(model(folder / name), member)
    assert not equal(member, sft(cache))


class Rows(list[dict[str, Any]]):
    """Keeps the rows of metrics.jsonl."""

    def metrics(self, step: int, row: Any) -> None:
        self.append({"step": step, **timeless(row)})

    def samples(self, step: int, rows: Sequence[Any]) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def sync(self) -> None:
        pass


def config_of(*arguments: str) -> RunConfig:
    register()
    with initialize_config_dir(str(conf_path()), version_base="1.3"):
        config = OmegaConf.to_object(compose("train_policy", [*SMALL, *arguments]))
    assert isinstance(config, RunConfig)
    return config


def test_one_member_is_reinforce_with_an_anchor_driven_by_hand(start: Start, tmp_path: Path):
    """Nothing of the procedure is in the other run: one policy, one anchor, one fit."""
    folder = start("one", "algo=warp", "algo.I=1", "algo.M=1", "algo.eta=1", "algo.mu=0.3")
    paths = {stage: found["path"] for stage, found in content(folder / "run.json")["upstream"].items()}
    config, fp32 = config_of("algo=reinforce"), Precision("fp32", torch.device("cpu"))
    data = build.dataset(config.data, config.algo.eval_prompts)
    loaded = [load_causal_lm("sft.path", paths["sft"], fp32.device) for _ in range(3)]
    policy, twin, reference = (one for one, _ in loaded)
    task = PolicyTask(
        policy,
        reference,
        loaded[0][1],
        config.algo,
        RewardOfRollout(load_reward_model("rm.path", paths["rm"], fp32.device), fp32),
        data.gold,
        data.prompts,
        data.prompts_validation[: config.algo.eval_prompts],
        data.max_prompt_tokens,
        Sampling(config.rollout.max_new_tokens, config.rollout.temperature, config.rollout.max_rows),
        fp32,
        config.seed,
        anchor=EmaAnchor(twin, 0.3, lambda: dict(policy.named_parameters())),
    )
    (tmp_path / "hand").mkdir()
    by_hand = Rows()
    fit(task, config.algo.train, T, tmp_path / "hand", by_hand, fp32, config.seed)
    found = [
        {name: value for name, value in row.items() if not name.startswith("warp/")} for row in figures(folder)
    ]
    assert found == list(by_hand) and len(found) == T
    assert all(row["kl/anchor"] != row["kl/k1"] for row in found[2:])
    assert equal(model(folder / "model"), model(tmp_path / "hand" / "model"))


@pytest.mark.parametrize("merge", ["slerp", "lerp"])
def test_merging_and_interpolation_are_between_the_right_ends(merge: str, start: Start, cache: Path):
    folder = start("run", "algo=warp", "algo.M=3", "algo.eta=0.25", f"algo.merge={merge}", "algo.output_eta=0.6")
    init = sft(cache)
    for iteration in ("1", "2"):
        members = [model(folder / f"members/i{iteration}-m{m}/model") for m in (1, 2, 3)]
        place = folder / "iterations" / iteration
        merged, following = model(place / "merged"), model(place / "start")
        if merge == "slerp":
            expected = slerp_many(init, members)
        else:
            expected = {name: sum(one[name] for one in members) / 3 for name in init}
        assert close(merged, expected)
        assert close(following, {name: 0.75 * init[name] + 0.25 * merged[name] for name in init})
        pairs = [angles(init, members[a], members[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
        found = json.loads((place / "merge.json").read_text())
        for layer in pairs[0]:
            assert math.isclose(found[f"angle/{layer}"], sum(pair[layer] for pair in pairs) / 3, rel_tol=1e-6)
        init = following
    for eta in (0.0, 0.25, 0.5, 0.6, 0.75, 1.0):  # from the SFT model, not from the last start
        point = {name: (1 - eta) * first + eta * merged[name] for name, first in sft(cache).items()}
        assert close(model(folder / f"front/eta-{eta:g}"), point)
    assert equal(model(folder / "front/eta-0"), sft(cache)) and equal(model(folder / "front/eta-1"), merged)
    assert equal(model(folder / "model"), model(folder / "front/eta-0.6"))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["front/eta-0/kl/full"] == 0.0 < summary["front/eta-1/kl/full"]
    assert summary["reward/mean"] == summary["front/eta-0.6/reward/mean"]
    assert summary["samples"] == summary["samples_generated"] == 2 * 3 * T * 8 and summary["step"] == 2 * 3 * T


def test_without_merging_the_best_member_stays(start: Start):
    folder = start("run", "algo=warp", "algo.I=1", "algo.M=3", "algo.merge=none", "algo.output_eta=1")
    ends = [row["eval/reward/mean"] - 0.1 * row["eval/kl/full"] for row in figures(folder) if row["step"] % T == 0]
    best = ends.index(max(ends)) + 1
    assert equal(model(folder / "model"), model(folder / f"members/i1-m{best}/model"))


def test_members_differ_in_what_they_see(start: Start):
    folder = start("run", "algo=warp")
    first = {}
    for row in rows(folder / "samples.jsonl"):
        first.setdefault(row["step"], []).append((row["prompt"], row["completion"]))
    assert [step for step in first if step % T == 1] == [1, 1 + T, 1 + 2 * T, 1 + 3 * T]
    assert len({tuple(first[1 + number * T]) for number in range(4)}) == 4


def test_members_sample_and_do_not_take_the_likeliest(start: Start):
    folder = start("run", "algo=warp", "algo.inner=rloo", "algo.k=4", "algo.I=1", "algo.M=1")
    first = [row for row in rows(folder / "samples.jsonl") if row["step"] == 1]
    prompts = {row["prompt"] for row in first}
    assert len(prompts) == 2 and len({row["completion"] for row in first}) == len(first) == 8


def test_a_members_rollout_may_serve_several_steps(start: Start):
    line = ["algo=warp", "algo.I=1", "algo.M=1", "algo.mu=0.3", "algo.num_epochs=2", "algo.clip=0.2"]
    found = figures(start("run", *line))
    assert [row["ratio/max"] == 1.0 for row in found] == [True, False, True, False]
    assert [row["samples"] for row in found] == [8, 8, 16, 16]


@pytest.mark.parametrize(
    "extra",
    [["algo=warp", "algo.mu=0.3"], ["algo=warp", "algo.inner=rloo", "algo.k=2"], ["algo=warp", "peft=lora"]],
)
def test_a_crashed_run_goes_on_inside_its_member(extra: list[str], start: Start, tmp_path, monkeypatch):
    whole = start("whole", *extra)
    # in the first member; after the last step of one; in the second iteration
    for step in (3, 4, 2 * T + 3, 4 * T):
        with monkeypatch.context() as patch:
            fail_at(patch, tmp_path, step, crash)
            crashed = start("crashed", *extra, "resume=auto", status=1)
        kept = files(crashed / "members" / "i1-m1" / "model") if step > T else None
        before = (crashed / "metrics.jsonl").read_bytes().split(b"\n")[:2]
    crashed = start("crashed", *extra, "resume=auto")
    assert figures(crashed) == figures(whole)
    assert (crashed / "metrics.jsonl").read_bytes().split(b"\n")[:2] == before
    assert weights(crashed) == weights(whole)
    assert files(crashed / "members" / "i1-m1" / "model") == kept
    assert json.loads((crashed / "run.json").read_text())["resumed_from"] == [2, 2, 2 * T + 2, 4 * T - 2]


def test_lora_members_are_merged_as_weight_updates(start: Start, cache: Path, tmp_path: Path):
    folder = start("run", "algo=warp", "peft=lora", "algo.mu=0.3", f"sft.path={start('base', 'algo=reinforce')}")
    members = [model(folder / f"members/i1-m{m}/model") for m in (1, 2)]
    base = model(tmp_path / "base" / "model")
    merged = model(folder / "iterations/1/merged")
    assert merged.keys() == base.keys()  # a plain model: no A and B
    assert close(merged, slerp_many(base, members))
    update = merged["model.layers.0.self_attn.q_proj.weight"] - base["model.layers.0.self_attn.q_proj.weight"]
    one = members[0]["model.layers.0.self_attn.q_proj.weight"] - base["model.layers.0.self_attn.q_proj.weight"]
    assert torch.linalg.matrix_rank(one, tol=1e-6) <= 16 and update.abs().max() > 0
    # the anchor follows the adapter: it leaves its start, which the plain KL is still measured to
    first = figures(folder)[:3]
    assert first[0]["kl/anchor"] == first[0]["kl/k1"] == 0.0
    assert abs(first[2]["kl/anchor"] - first[2]["kl/k1"]) > 1e-4
    # the second iteration's KL is still measured to the SFT model, from which its members start away
    second = next(row for row in figures(folder) if row["step"] == 2 * T + 1)
    assert second["kl/anchor"] == 0.0 and second["kl/k1"] != 0.0


SHORT = ["algo=warp", "algo.T=3", "algo.mu=0.3"]  # 2 iterations of 2 members, a checkpoint in each


@pytest.fixture(scope="module")
def undisturbed(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the stopped ones below have to end as."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert launch("train-policy", [*SMALL, f"stages.cache_dir={cache}", f"run_dir={folder}", *SHORT]) == 0
    return folder


def assert_same(found: Path, expected: Path) -> None:
    """To the bit, and nothing more is left."""
    assert figures(found) == figures(expected)
    assert rows(found / "samples.jsonl") == rows(expected / "samples.jsonl")
    assert timeless(content(found / "summary.json")) == timeless(content(expected / "summary.json"))
    for name in ("front", "iterations", "model"):
        assert files(found / name) == files(expected / name), name
    for name in ("i1-m1", "i1-m2", "i2-m1", "i2-m2"):
        assert files(found / "members" / name / "model") == files(expected / "members" / name / "model")
    assert not list(found.glob("members/*/checkpoints")) and not list(expected.glob("members/*/checkpoints"))
    assert content(found / "run.json")["status"] == "finished"


def at_call(patch: pytest.MonkeyPatch, name: str, number: int, action: Callable[[], None]) -> None:
    """Lets something happen when a function of the procedure is called for the number-th time."""
    real, calls = getattr(warp, name), []

    def called(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == number:
            action()
        return real(*given)

    patch.setattr(warp, name, called)


def times(folder: Path) -> dict[Path, int]:
    """When each file below a folder was written."""
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("where", "number", "done", "not_begun"),
    [
        ("_merge", 1, "iterations/1/merge.json", "members/i2-m1"),
        ("_merge", 2, "iterations/2/merge.json", "front"),
        ("_write_front", 1, "front/eta-1", "front/front.json"),
        ("_measured", 1, "front/eta-1", "front/front.json"),
    ],
)
def test_a_signal_between_two_fits_ends_the_run(
    where: str,
    number: int,
    done: str,
    not_begun: str,
    start: Start,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    with monkeypatch.context() as patch:
        at_call(patch, where, number, terminate)
        stopped = start("stopped", *SHORT, status=143)
    assert content(stopped / "run.json")["status"] == "interrupted"
    assert (stopped / done).exists() and not (stopped / not_begun).exists()
    before = times(stopped / "iterations")
    start("stopped", *SHORT, "resume=auto")
    assert_same(stopped, undisturbed)
    assert before.items() <= times(stopped / "iterations").items(), "what was merged is not merged again"


def test_checkpoints_of_a_finished_member_go_when_the_run_goes_on(
    start: Start, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        at_call(patch, "_drop_checkpoints", 2, crash)
        crashed = start("crashed", *SHORT, status=1)
    left = crashed / "members" / "i1-m2"
    assert (left / "finished.json").is_file() and (left / "checkpoints" / "step-2").is_dir()
    start("crashed", *SHORT, "resume=auto")
    assert content(crashed / "run.json")["resumed_from"] == [6]
    assert_same(crashed, undisturbed)


def test_a_crash_while_an_iteration_is_merged(start: Start, undisturbed: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        at_call(patch, "write_json_atomic", 2, crash)  # merge.json of the second iteration
        crashed = start("crashed", *SHORT, status=1)
    first, second = crashed / "iterations" / "1", crashed / "iterations" / "2"
    assert (second / "merged").is_dir() and (second / "start").is_dir() and not (second / "merge.json").exists()
    before = times(first)
    start("crashed", *SHORT, "resume=auto")
    assert times(first) == before, "what was merged is not merged again"
    assert_same(crashed, undisturbed)


@pytest.mark.parametrize(("where", "number"), [("_measured", 3), ("write_json_atomic", 3), ("_summary", 1)])
def test_a_crash_while_the_front_is_measured(
    where: str, number: int, start: Start, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        at_call(patch, where, number, crash)
        crashed = start("crashed", *SHORT, status=1)
    assert (crashed / "front" / "eta-1").is_dir() and not (crashed / "summary.json").exists()
    before = times(crashed / "iterations") | times(crashed / "members")
    start("crashed", *SHORT, "resume=auto")
    assert times(crashed / "iterations") | times(crashed / "members") == before
    assert_same(crashed, undisturbed)
