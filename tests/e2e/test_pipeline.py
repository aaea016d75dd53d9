"""Every command end to end on a tiny setting, and what it leaves in its folder."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from rlhf_cli.commands.help import group_choices
from tests.e2e.fixtures_e2e import LOADED, ROOT, Done, content, ok, pace, rows, run, timeless

RUN_KEYS = {
    "id",
    "status",
    "command",
    "name",
    "argv",
    "versions",
    "threads",
    "device",
    "git_commit",
    "seed",
    "upstream",
    "start",
    "end",
    "resumed_from",
}
SAMPLE_KEYS = {"prompt", "completion", "reward", "kl", "length", "step"}


@pytest.fixture(scope="module")
def rloo(place: Path) -> Done:
    """The first command: nothing is cached yet."""
    return ok(["train-policy", "experiment=smoke", "stages.cache_dir=cache", "run_dir=rloo"], place)


@pytest.fixture(scope="module")
def reinforce(place: Path, rloo: Done) -> Done:
    """The second command, with the cache of the first, which is named by another path."""
    cache = f"stages.cache_dir={place / 'cache'}"
    return ok(
        ["train-policy", "experiment=smoke", "algo=reinforce", cache, "run_dir=reinforce"], place, program=LOADED
    )


@pytest.fixture(scope="module")
def policies(place: Path, rloo: Done, reinforce: Done) -> Path:
    """Two policies of one SFT and one reward model."""
    return place


@pytest.fixture(scope="module")
def stages(place: Path, rloo: Done) -> Path:
    """The other training commands, which give their model rather than keep it in the cache."""
    ok(["train-sft", "experiment=smoke", "run_dir=sft"], place, program=LOADED)
    ok(["train-rm", "experiment=smoke", "sft.path=sft", "run_dir=rm"], place, program=LOADED)
    return place


@pytest.fixture(scope="module")
def evaluation(policies: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """From another working folder than the policies were trained in."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    both = f"policies=[{policies / 'rloo'},{policies / 'reinforce'}]"
    done = ok(["eval", "experiment=smoke", both, "eval.split=ood", "run_dir=out"], elsewhere, program=LOADED)
    return elsewhere / "out", done


def test_the_smoke_experiment_takes_less_than_twenty_seconds(rloo: Done):
    """All three stages. The limit is on the time of the process, which other processes do not stretch."""
    print(f"experiment=smoke: {rloo.wall_s:.1f} s, {rloo.cpu_s:.1f} s of CPU time, pace {pace():.2f}")
    assert rloo.cpu_s < 20 * pace()


def test_a_policy_is_trained_with_what_it_needs(place: Path, rloo: Done):
    assert {name.name.partition("-")[0] for name in (place / "cache").glob("[!.]*")} == {"sft", "rm"}
    assert "rloo/model" in rloo.out.splitlines() and "gold/mean" in rloo.out
    assert "sft: training once into cache/sft-" in rloo.err and "rm: training once into cache/rm-" in rloo.err
    upstream = content(place / "rloo" / "run.json")["upstream"]
    assert set(upstream) == {"sft", "rm"}
    assert all(re.fullmatch(r"[0-9a-f]{64}", artifact["digest"]) for artifact in upstream.values())


def test_another_algorithm_reuses_the_stages(policies: Path, reinforce: Done):
    assert "sft: reusing " in reinforce.err and "rm: reusing " in reinforce.err
    assert "training once" not in reinforce.err
    first, second = (content(policies / name / "run.json") for name in ("rloo", "reinforce"))
    digests = [{stage: made["digest"] for stage, made in one["upstream"].items()} for one in (first, second)]
    assert digests[0] == digests[1]
    assert (first["name"], second["name"]) == ("rloo", "reinforce")
    assert len(list((policies / "cache").glob("[!.]*"))) == 2


@pytest.mark.parametrize("name", ["rloo", "reinforce", "sft", "rm", "cache/sft-*", "cache/rm-*"])
def test_a_training_run_leaves_its_folder_as_promised(name: str, policies: Path, stages: Path):
    (folder,) = policies.glob(name)
    record = content(folder / "run.json")
    assert record.keys() >= RUN_KEYS
    assert (record["status"], record["error"], record["resumed_from"]) == ("finished", None, [])
    assert record["start"] <= record["end"]
    assert record["argv"][0] == "rlhf" and record["device"] == "cpu" and record["threads"] == 1
    assert {"python", "torch", "transformers", "rlhf_cli"} <= record["versions"].keys()
    metrics = rows(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(isinstance(value, int | float) for row in metrics for value in row.values())
    assert {"loss", "lr", "grad_norm", "samples", "tokens", "time_s", "throughput/tokens_per_s"} <= metrics[
        0
    ].keys()
    summary = content(folder / "summary.json")
    assert summary["step"] == 2
    assert all(isinstance(value, int | float | None) for value in summary.values())
    assert {path.name for path in (folder / "model").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (folder / "plots" / "training.png").read_bytes().startswith(b"\x89PNG")
    if not name.startswith("cache"):  # a stage's folder is no job of Hydra
        assert {path.name for path in (folder / ".hydra").iterdir()} == {
            "config.yaml",
            "overrides.yaml",
            "hydra.yaml",
        }
        assert (folder / "rlhf.log").is_file()
    assert not list(folder.rglob("*.bin")) + list(folder.rglob("*.pickle")) + list(folder.rglob("*.pt"))


@pytest.mark.parametrize("name", ["rloo", "reinforce"])
def test_samples_of_a_policy(name: str, policies: Path):
    samples = rows(policies / name / "samples.jsonl")
    assert {sample["step"] for sample in samples} == {1, 2}
    assert all(sample.keys() == SAMPLE_KEYS | {"gold"} for sample in samples)
    assert all(1 <= sample["length"] <= 12 and sample["completion"] for sample in samples)


def test_evaluation_measures_both_against_the_sft_model(evaluation: tuple[Path, Done]):
    folder, done = evaluation
    summary = content(folder / "summary.json")
    for policy in ("sft", "rloo", "reinforce"):
        for metric in ("reward/mean", "gold/mean", "kl/full", "length/mean", "perplexity/preferred"):
            value, lo, hi = (summary[f"{policy}/{metric}{end}"] for end in ("", "_lo", "_hi"))
            assert lo <= value <= hi
            assert (f"{policy}/{metric}_delta_lo" in summary) == (policy != "sft")
    assert summary["sft/kl/full"] == 0.0 and summary["rloo/kl/full"] > 0
    assert {"rm/accuracy", "rm/ece", "rm/accuracy_lo", "rm/accuracy_hi"} <= summary.keys()
    written = rows(folder / "per_prompt.jsonl")
    assert [row["policy"] for row in written] == ["sft"] * 8 + ["rloo"] * 8 + ["reinforce"] * 8
    assert len({row["prompt"] for row in written}) == 8
    assert {path.name for path in (folder / "plots").glob("*.png")} == {
        "reward.png",
        "reward_kl.png",
        "rm_margin.png",
        "rm_reliability.png",
    }
    record = content(folder / "run.json")
    assert (
        record.keys() >= RUN_KEYS
        and record["status"] == "finished"
        and set(record["upstream"]) == {"rm", "reference"}
    )
    assert "rloo" in done.out and "reinforce" in done.out and "out/summary.json" in done.out.splitlines()


def test_evaluation_is_of_the_split_that_was_named(evaluation: tuple[Path, Done], policies: Path):
    """Films of the ood split are in no other."""
    training = " ".join(sample["prompt"] for sample in rows(policies / "rloo" / "samples.jsonl"))
    asked = rows(evaluation[0] / "per_prompt.jsonl")
    kinds = {re.search(r"(\w+) (?:film|movie)", row["prompt"]) for row in asked}
    assert kinds != {None}
    assert not {kind.group(1) for kind in kinds if kind} & set(training.split())


def test_evaluation_of_the_reward_model_alone(policies: Path):
    arguments = ["eval", "experiment=smoke", f"stages.cache_dir={policies / 'cache'}", "run_dir=rm-alone"]
    done = ok([*arguments, "eval.best_of_n=3", "eval.best_of_samples=5"], policies, program=LOADED)
    assert "rm: reusing" in done.err and done.err.count("sft: reusing") == 1
    folder = policies / "rm-alone"
    summary = content(folder / "summary.json")
    assert {"rm/accuracy", "rm/margin", "rm/nll", "rm/ece", "rm/ood/accuracy"} <= summary.keys()
    assert all(name.startswith("rm/") for name in summary)
    assert not (folder / "per_prompt.jsonl").exists()
    # every figure with its interval, but for those that are no means
    for name in (name for name in summary if not name.endswith(("_lo", "_hi"))):
        value, lo, hi = (summary[f"{name}{end}"] for end in ("", "_lo", "_hi"))
        if name.endswith(("/temperature", "/consistency", "/kl")):
            assert lo is None and hi is None
        else:
            assert lo <= value <= hi, name
    for part in ("", "ood/"):
        assert {f"rm/{part}{name}" for name in ("brier", "calibrated/ece", "gold/spearman")} <= summary.keys()
    assert 0 <= summary["rm/consistency"] < 1e-4
    # the best of more is better by the proxy, on the same samples
    proxies = [summary[f"rm/best_of/{n}/proxy"] for n in (1, 2, 3)]
    assert proxies == sorted(proxies) and proxies[0] < proxies[2] and "rm/best_of/3/gold" in summary
    pairs = rows(folder / "rm_pairs.jsonl")
    assert len(pairs) == sum(sum(bins["margin_counts"]) for bins in content(folder / "rm_bins.json").values())
    test = [pair for pair in pairs if pair["split"] == "test"]
    assert {pair["split"] for pair in pairs} == {"test", "ood"}
    right = [pair["chosen_raw"] > pair["rejected_raw"] for pair in test]
    assert summary["rm/accuracy"] == sum(right) / len(right)
    plots = {"rm_margin.png", "rm_reliability.png", "rm_best_of_n.png"}
    assert {path.name for path in (folder / "plots").iterdir()} == plots
    said = done.out.splitlines()
    assert all(f"rm-alone/plots/{name}" in said for name in plots) and "rm-alone/rm_pairs.jsonl" in said
    assert re.search(r"^ figure +test +n +ood +n *$", done.out, re.M) and "Best of n, over 8 prompts" in said
    assert content(folder / "run.json")["upstream"].keys() == {"rm", "reference"}


def test_stages_given_as_run_folders_are_used(stages: Path):
    arguments = ["train-policy", "experiment=smoke", "sft.path=sft", "rm.path=rm", "run_dir=given"]
    done = ok([*arguments, "stages.auto=false", "stages.cache_dir=unused"], stages, program=LOADED)
    assert "sft: using sft/model (sft.path is set)" in done.err and "rm: using rm/model" in done.err
    assert not (stages / "unused").exists()
    assert content(stages / "given" / "run.json")["upstream"]["rm"]["path"] == "rm/model"


def test_given_stages_are_the_cached_ones(policies: Path, stages: Path):
    """The same settings and seed make the same model, built on the way or by its own command."""
    for own, cached in (("sft", "sft-*"), ("rm", "rm-*")):
        (folder,) = (policies / "cache").glob(cached)
        weights = [(place / "model" / "model.safetensors").read_bytes() for place in (stages / own, folder)]
        assert weights[0] == weights[1]


def test_info_of_a_run(policies: Path):
    said = [line.split() for line in ok(["info", "rloo"], policies, program=LOADED).out.splitlines()]
    assert ["status", "finished"] in said and ["command", "train-policy"] in said
    assert ["rloo/plots/training.png"] in said
    wrong = run(["info", "cache"], policies, program=LOADED)
    assert (wrong.status, wrong.err) == (2, "rlhf: info cache: holds no run (no run.json)\n")


def test_info_of_the_installation(place: Path):
    said = ok(["info"], place, COLUMNS="400", program=LOADED).out
    assert re.search(rf"^algo= +{', '.join(group_choices('algo'))}", said, re.M) and str(ROOT / "conf") in said


def test_every_metric_is_defined_in_the_readme(
    policies: Path, stages: Path, evaluation: tuple[Path, Done], tmp_path: Path
):
    """In the table of the section Metrics, by the name that the files have."""
    section = (ROOT / "README.md").read_text().partition("\n## Metrics\n")[2].partition("\n## ")[0]
    firsts = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    defined = {name for cell in firsts for name in re.findall(r"`([^`]+)`", cell)}
    assert len(defined) > 30
    written: set[str] = set()
    for name in ("rloo", "reinforce", "sft", "rm"):
        for row in [*rows(policies / name / "metrics.jsonl"), content(policies / name / "summary.json")]:
            written |= {key.removeprefix("eval/") for key in row}
    for key in content(evaluation[0] / "summary.json"):
        metric = re.sub(r"^(sft|rloo|reinforce)/", "", key)
        metric = re.sub(r"^rm/(test|ood)/", "rm/", metric)
        written.add(re.sub(r"(_delta)?(_lo|_hi)?$", "", metric))
    assert not written - defined


def test_the_same_command_gives_the_same_numbers_to_the_bit(place: Path, rloo: Done):
    """With a cache of its own, so that every stage is made again."""
    ok(["train-policy", "experiment=smoke", "stages.cache_dir=again-cache", "run_dir=again"], place)
    first, second = place / "rloo", place / "again"
    metrics = [[timeless(row) for row in rows(folder / "metrics.jsonl")] for folder in (first, second)]
    assert metrics[0] == metrics[1]
    for file in ("model/model.safetensors", "samples.jsonl"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    assert timeless(content(first / "summary.json")) == timeless(content(second / "summary.json"))


def test_a_multirun_of_seeds_and_a_users_own_yaml(place: Path, rloo: Done):
    """A job of a multirun is the run it would be alone; another seed is another run."""
    (place / "mine" / "experiment").mkdir(parents=True)
    (place / "mine" / "experiment" / "own.yaml").write_text(
        "# @package _global_\ndefaults:\n  - smoke\nstages: {cache_dir: cache}\nname: own\n"
    )
    done = ok(
        ["train-policy", "--config-dir", "mine", "experiment=own", "-m", "seed=0,1", "run_dir=multi"],
        place,
        program=LOADED,
    )
    jobs = [place / "multi" / number for number in "01"]
    assert [content(job / "run.json")["name"] for job in jobs] == ["own", "own"]
    assert "job 1: experiment=own seed=1" in done.err
    metrics = [[timeless(row) for row in rows(folder / "metrics.jsonl")] for folder in (place / "rloo", *jobs)]
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (place / "rloo", *jobs)]
    assert metrics[0] == metrics[1] and weights[0] == weights[1]
    assert metrics[0] != metrics[2] and weights[0] != weights[2]
    assert metrics[0][0]["reward/mean"] != metrics[2][0]["reward/mean"]
    # multirun is Hydra's; the table is what `sweep` adds
    assert not list((place / "multi").glob("*.csv"))


def test_a_sweep_of_two_by_two(place: Path, rloo: Done):
    arguments = ["sweep", "train-policy", "experiment=smoke", "stages.cache_dir=cache-of-sweep", "run_dir=sweep"]
    done = ok([*arguments, "algo.train.micro_batch_size=2,4", "seed=0,1"], place, program=LOADED)
    folder = place / "sweep"
    table = list(csv.DictReader((folder / "sweep.csv").open()))
    assert [(row["job"], row["algo.train.micro_batch_size"], row["seed"], row["status"]) for row in table] == [
        ("0", "2", "0", "finished"),
        ("1", "2", "1", "finished"),
        ("2", "4", "0", "finished"),
        ("3", "4", "1", "finished"),
    ]
    for row in table:
        summary = content(folder / row["job"] / "summary.json")
        assert float(row["gold/mean"]) == summary["gold/mean"] and float(row["kl/full"]) == summary["kl/full"]
    groups = list(csv.DictReader((folder / "summary.csv").open()))
    assert [(row["algo.train.micro_batch_size"], row["seeds"]) for row in groups] == [("2", "2"), ("4", "2")]
    for group, pair in zip(groups, (table[:2], table[2:]), strict=True):
        mean = sum(float(row["kl/full"]) for row in pair) / 2
        assert float(group["kl/full"]) == pytest.approx(mean, rel=1e-12)
        assert float(group["kl/full_lo"]) < mean < float(group["kl/full_hi"])
    assert (folder / "plots" / "reward_kl.png").read_bytes().startswith(b"\x89PNG")
    assert "Jobs" in done.out and "Mean over seeds" in done.out
    assert done.out.splitlines()[-3:] == ["sweep/sweep.csv", "sweep/summary.csv", "sweep/plots/reward_kl.png"]
    # one SFT model and one reward model for all four
    assert done.err.count("training once") == 2
    assert len(list((place / "cache-of-sweep").glob("[!.]*"))) == 2
    # micro-batches change no sample
    first, other_seed, second, _ = (
        [row["completion"] for row in rows(folder / number / "samples.jsonl") if row["step"] == 1]
        for number in "0123"
    )
    assert first == second != other_seed
