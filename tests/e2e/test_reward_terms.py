"""The reward as the command line declares it: its terms, their scale, and no reward model where none has a weight."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_cli.commands.launch import launch
from tests.e2e.fixtures_e2e import content, crash, fail_at, figures, ok, rows, timeless, weights

# An SFT model that ends some of its texts: of cut ones all have the lowest gold reward.
SMALL = [
    "experiment=smoke",
    "device=cpu",
    "precision=fp32",
    "threads=1",
    "sft.train.steps=60",
    "sft.train.lr=1e-2",
    "data.max_completion_tokens=24",
    "rollout.max_new_tokens=24",
    "reward.normalize_samples=32",
    "algo.train.eval_every=2",
    "algo.train.samples_every=1",
]
RULES = [
    "{name: film, weight: 0.25, words: [film, movie]}",
    "{name: an, weight: -0.5, pattern: 'a.', count: each}",
]
TERMS = [
    "reward.rm=0.5",
    "reward.gold=0.5",
    "reward.length=0.3",
    "reward.missing_eos=2",
    "reward.coherence.weight=0.1",
    "reward.repetition.weight=3",
    "reward.repetition.ngram=1",
    f"reward.rules=[{','.join(RULES)}]",
]
WEIGHTS = {
    "rm": 0.5,
    "gold": 0.5,
    "length": 0.3,
    "missing_eos": 2,
    "coherence": 0.1,
    "repetition": 3,
    "film": 0.25,
    "an": -0.5,
}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


@pytest.fixture
def train(stages: Path) -> Callable[..., int]:
    """Trains a policy in this process; the exit status."""

    def run(folder: Path, *extra: str) -> int:
        return launch("train-policy", [*SMALL, f"stages.cache_dir={stages}", f"run_dir={folder}", *extra])

    return run


def test_every_term_is_in_the_reward_and_logged_apart(train: Callable[..., int], tmp_path: Path):
    assert train(tmp_path, *TERMS) == 0
    metrics = rows(tmp_path / "metrics.jsonl")
    for prefix in ("", "eval/"):
        row = metrics[-1]
        parts = {name: row[f"{prefix}reward/{name}"] for name in WEIGHTS}
        total = sum(WEIGHTS[name] * value for name, value in parts.items())
        assert row[f"{prefix}reward/mean"] == pytest.approx(total, abs=1e-4)
        assert parts["gold"] == pytest.approx(row[f"{prefix}gold/mean"])
        assert parts["length"] == pytest.approx(-row[f"{prefix}length/mean"] / 24)
        assert parts["missing_eos"] == -row[f"{prefix}length/truncated_frac"]
        assert -8 < parts["coherence"] < -0.1 and -1 < parts["repetition"] < 0 and parts["an"] > 0
    assert "reward/clipped" not in metrics[0] and "reward/norm_mean" not in metrics[0]
    for row in rows(tmp_path / "samples.jsonl"):
        assert row["reward"] == pytest.approx(
            sum(WEIGHTS[name] * row["terms"][name] for name in WEIGHTS), abs=1e-4
        )
        assert row["terms"]["film"] == bool(re.search(r"\b(film|movie)\b", row["completion"]))
        assert row["terms"]["an"] == len(re.findall("a.", row["completion"]))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| `reward.missing_eos` | `2.0` |" in card and "`reward.rules`" in card
    assert {f"reward/{name}" for name in WEIGHTS} <= content(tmp_path / "summary.json").keys()


@pytest.mark.parametrize("algo", ["rloo", "warp"])
def test_a_reward_model_without_weight_is_not_built(algo: str, stages: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    line = [*SMALL, f"algo={algo}", "reward.rm=0", "reward.gold=1", f"stages.cache_dir={cache}"]
    line += ["algo.T=2"] if algo == "warp" else []
    assert launch("train-policy", [*line, f"run_dir={tmp_path / 'run'}"]) == 0
    assert [folder.name[:4] for folder in cache.iterdir() if not folder.name.startswith(".")] == ["sft-"]
    assert list(content(tmp_path / "run" / "run.json")["upstream"]) == ["sft"]
    for row in rows(tmp_path / "run" / "metrics.jsonl"):
        assert row["reward/mean"] == pytest.approx(row["gold/mean"], abs=1e-6) == row["reward/gold"]
        assert "reward/rm" not in row
    assert content(tmp_path / "run" / "summary.json")["reward/gold"]
    assert "without a reward model" in (tmp_path / "run" / "model" / "README.md").read_text()
    given = f"sft.path={next(cache.glob('sft-*'))}"
    again = [*line, given, "stages.auto=false", f"run_dir={tmp_path / 'given'}"]
    assert launch("train-policy", again) == 0, "nothing else has to be given"


@pytest.mark.parametrize(
    "extra",
    [
        ["reward.gold=1", "reward.normalize=running", "reward.clip=1"],
        ["reward.coherence.weight=1", "reward.normalize=sft_samples", "peft=lora"],
        ["algo=warp", "algo.T=4", "algo.M=1", "reward.gold=1", "reward.normalize=running"],
    ],
    ids=["running", "frozen", "members"],
)
def test_a_crashed_run_goes_on_to_the_bit(
    extra: list[str], train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    extra = [*extra, "algo.train.steps=8", "checkpoint.every=3"]
    assert train(tmp_path / "undisturbed", *extra) == 0
    for step in (2, 5):
        with monkeypatch.context() as patch:
            fail_at(patch, tmp_path, step, crash)
            assert train(tmp_path / "crashed", *extra, "resume=auto") == 1
    assert train(tmp_path / "crashed", *extra, "resume=auto") == 0
    assert content(tmp_path / "crashed" / "run.json")["resumed_from"][-1] > 0
    assert figures(tmp_path / "crashed") == figures(tmp_path / "undisturbed")
    assert weights(tmp_path / "crashed") == weights(tmp_path / "undisturbed")
    scale = [(row["reward/norm_mean"], row["reward/norm_std"]) for row in figures(tmp_path / "crashed")]
    if "reward.normalize=sft_samples" in extra:
        assert len(set(scale)) == 1
    else:
        assert len(set(scale)) == 8
    if "algo=warp" in extra:  # the second iteration's member begins with a scale of its own
        means = [row["reward/mean"] for row in figures(tmp_path / "crashed")]
        assert [abs(mean) < 1e-6 for mean in means] == [True, *[False] * 3] * 2


def test_a_frozen_scale_is_of_the_sft_models_samples(train: Callable[..., int], tmp_path: Path):
    extra = ["reward.rm=0", "reward.length=1", "reward.normalize=sft_samples", "algo.train.lr=1e-9"]
    assert train(tmp_path, *extra, "reward.normalize_samples=96", "algo.train.batch_size=64") == 0
    row = rows(tmp_path / "metrics.jsonl")[0]
    assert row["reward/norm_mean"] == pytest.approx(row["reward/length"], abs=0.1), (
        "the policy still is the SFT model"
    )
    scaled = (row["reward/length"] - row["reward/norm_mean"]) / row["reward/norm_std"]
    assert row["reward/mean"] == pytest.approx(scaled, abs=1e-5)
    assert 0.5 < row["reward/std"] < 2


def test_a_reward_that_is_always_the_same_has_no_scale(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    nothing = "reward.rules=[{name: never, weight: 1, words: [zyzzyva]}]"
    assert train(tmp_path, "reward.rm=0", nothing, "reward.normalize=sft_samples") == 2
    assert "reward.normalize=sft_samples: the reward is 0 for all 32 samples" in capsys.readouterr().err


def test_a_judge_of_ones_own(train: Callable[..., int], tmp_path: Path):
    judged = ["reward.rm=0", "reward.coherence.weight=1"]
    assert train(tmp_path / "sft", *judged) == 0
    sft = content(tmp_path / "sft" / "run.json")["upstream"]["sft"]["path"]
    assert train(tmp_path / "same", *judged, f"reward.coherence.path={sft}") == 0
    assert list(content(tmp_path / "same" / "run.json")["upstream"]) == ["sft", "coherence"]
    one, same = (rows(tmp_path / name / "metrics.jsonl")[0] for name in ("sft", "same"))
    # read from the text again, a completion of bytes that are no text has other tokens
    assert same["reward/coherence"] == pytest.approx(one["reward/coherence"], abs=0.5)
    policy = tmp_path / "sft" / "model"
    assert train(tmp_path / "other", *judged, f"reward.coherence.path={policy}", "resume=auto") == 0
    assert content(tmp_path / "other" / "run.json")["upstream"]["coherence"]["path"] == str(policy)


def test_pairs_are_ranked_by_the_sum(train: Callable[..., int], tmp_path: Path):
    extra = ["algo=dpo", "algo.pairs=on_policy", "algo.k=3", "algo.num_prompts=12"]
    shorter = ["reward.rm=0", "reward.length=24", "reward.clip=23.5", "reward.normalize=none"]
    assert train(tmp_path, *extra, *shorter) == 0
    pairs = rows(tmp_path / "pairs.jsonl")
    for pair in pairs:
        for side in ("chosen", "rejected"):
            assert pair[f"{side}_reward"] == pytest.approx(max(-len(pair[f"{side}_ids"]), -23.5))
        assert len(pair["chosen_ids"]) < len(pair["rejected_ids"])
    summary = content(tmp_path / "summary.json")
    assert summary["reward/length"] == pytest.approx(-summary["length/mean"] / 24)
    assert 0 < summary["reward/clipped"] < 1 and list(content(tmp_path / "run.json")["upstream"]) == ["sft"]


def test_two_processes_have_one_scale(stages: Path, train: Callable[..., int], tmp_path: Path):
    extra = [
        "reward.rm=0",
        "reward.gold=1",
        "reward.coherence.weight=0.5",
        "reward.normalize=running",
        "reward.clip=1",
    ]
    assert train(tmp_path / "one", *extra) == 0
    sft = content(tmp_path / "one" / "run.json")["upstream"]["sft"]["path"]
    together = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "rlhf_cli",
    )
    line = ["train-policy", *SMALL, *extra, f"sft.path={sft}", "run_dir=two"]
    ok(line, tmp_path, program=together)
    for one, two in zip(*(rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two")), strict=True):
        assert timeless(one).keys() == timeless(two).keys()
        for key, value in timeless(one).items():
            assert two[key] == pytest.approx(value, rel=1e-4, abs=1e-4), (one["step"], key)
