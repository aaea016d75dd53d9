"""DPO on pairs of the data and on pairs of the SFT model's own samples, from the command line."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from rlhf_cli.commands.launch import launch
from rlhf_cli.data.tokenise import encode_prompt
from rlhf_cli.models.loading import load_causal_lm
from rlhf_cli.train import sampled_pairs
from tests.e2e.fixtures_e2e import (
    LOADED,
    content,
    crash,
    fail_at,
    figures,
    files,
    ok,
    rows,
    run,
    timeless,
    weights,
)
from tests.e2e.killing import KILLED, Killing

SMALL = ["experiment=smoke", "algo=dpo", "device=cpu", "precision=fp32"]
SAMPLED = ["algo.pairs=on_policy", "algo.k=3", "algo.num_prompts=12", "algo.train.steps=6"]
STEPS = ["algo.train.steps=8", "algo.train.eval_every=3", "checkpoint.every=3"]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


@pytest.fixture
def train(stages: Path) -> Callable[..., int]:
    """Trains a policy in this process; the exit status."""

    def run(folder: Path, *extra: str) -> int:
        return launch("train-policy", [*SMALL, f"stages.cache_dir={stages}", f"run_dir={folder}", *extra])

    return run


def test_pairs_of_the_data_need_no_reward_model(train: Callable[..., int], tmp_path: Path):
    cache = tmp_path / "cache"
    assert train(tmp_path / "run", *STEPS, f"stages.cache_dir={cache}") == 0
    assert [folder.name[:4] for folder in cache.iterdir() if not folder.name.startswith(".")] == ["sft-"]
    record = content(tmp_path / "run" / "run.json")
    assert list(record["upstream"]) == ["sft"] and record["rows_digest"]
    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert (metrics[0]["dpo/accuracy"], metrics[0]["dpo/margin"]) == (0.5, 0.0)
    summary = content(tmp_path / "run" / "summary.json")
    assert (summary["samples_generated"], summary["pairs"], summary["samples"]) == (0, 32, 8 * 8 * 2)
    assert {"dpo/accuracy", "dpo/margin", "dpo/chosen_reward", "dpo/rejected_reward", "loss"} <= summary.keys()
    # its samples are measured as those of other methods are; nothing here gave them a reward
    assert summary["kl/full"] > 0 and summary["length/mean"] >= 1 and math.isfinite(summary["gold/mean"])
    assert not summary.keys() & {"reward/mean", "time/pairs_s"}
    assert "without a reward model" in (tmp_path / "run" / "model" / "README.md").read_text()
    given = f"sft.path={next(cache.glob('sft-*'))}"
    assert train(tmp_path / "given", given, "stages.auto=false") == 0, "nothing else has to be given"


@torch.no_grad()
def _least_likely(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> int:
    """How many tokens are more likely than the completion's least likely one, where it stands."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(completion)[:, None])
    return int((logits > chosen).sum(1).max())


def test_own_samples_can_be_of_the_most_likely_tokens(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert train(tmp_path / "all", *SAMPLED) == train(tmp_path / "few", *SAMPLED, "rollout.top_k=4") == 0
    upstream = [content(tmp_path / name / "run.json")["upstream"] for name in ("all", "few")]
    assert upstream[0] == upstream[1], "the reward's scale is that of the whole distribution"
    assert "rollout.temperature" in (card := (Path(upstream[0]["rm"]["path"]) / "README.md").read_text())
    assert "rollout.top" not in card
    model, tokenizer = load_causal_lm("sft.path", upstream[0]["sft"]["path"], torch.device("cpu"))
    rank = {}
    for name in ("all", "few"):
        pairs = rows(tmp_path / name / "pairs.jsonl")
        rank[name] = max(
            _least_likely(model, encode_prompt(tokenizer, p["prompt"], 999), p["chosen_ids"]) for p in pairs
        )
    assert rank["few"] == 3 < rank["all"]
    capsys.readouterr()
    assert train(tmp_path / "one", *SAMPLED, "rollout.top_k=1") == 2
    assert "all samples of the train prompts are ties" in capsys.readouterr().err


@pytest.mark.parametrize(
    "extra",
    [
        STEPS,
        [*STEPS, "algo.reference=precomputed", "algo.train.micro_batch_size=4", "algo.loss=ipo"],
        [*STEPS, *SAMPLED, "algo.train.steps=8", "algo.labels=gold", "data.max_completion_tokens=24", "peft=lora"],
    ],
    ids=["data", "precomputed", "on_policy"],
)
def test_a_crashed_run_goes_on_to_the_bit(
    extra: list[str], train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sampled: list[object] = []
    seconds: dict[str, float] = {}
    write = sampled_pairs.write_bytes_atomic
    monkeypatch.setattr(sampled_pairs, "write_bytes_atomic", lambda *given: (sampled.append(given), write(*given)))
    rewarded = "algo.labels=gold" in extra
    if rewarded:  # an SFT model that ends its texts: cut ones all have the lowest gold reward
        extra = [*extra, "sft.train.steps=60", "sft.train.lr=1e-2", "rollout.max_new_tokens=24"]
    assert train(tmp_path / "undisturbed", *extra) == 0
    for step in (2, 5):
        with monkeypatch.context() as patch:
            fail_at(patch, tmp_path, step, crash)
            assert train(tmp_path / "crashed", *extra, "resume=auto") == 1
        if rewarded:
            seconds = seconds or content(tmp_path / "crashed" / "pairs_time.json")
    assert train(tmp_path / "crashed", *extra, "resume=auto") == 0
    assert figures(tmp_path / "crashed") == figures(tmp_path / "undisturbed")
    assert weights(tmp_path / "crashed") == weights(tmp_path / "undisturbed")
    assert content(tmp_path / "crashed" / "run.json")["resumed_from"] == [0, 3]
    assert len(sampled) == (2 if rewarded else 0), "each run samples once"
    summaries = [content(tmp_path / name / "summary.json") for name in ("crashed", "undisturbed")]
    assert timeless(summaries[0]) == timeless(summaries[1])
    assert summaries[0].get("time/pairs_s") == seconds.get("time/pairs_s"), "of the sampling, not of a resume"
    assert ("time/pairs_s" in summaries[0]) == rewarded and {"kl/full", "gold/mean"} <= summaries[0].keys()
    assert "reward/mean" not in summaries[0], "no reward model labelled"
    texts = [folder / "pairs.jsonl" for folder in (tmp_path / "crashed", tmp_path / "undisturbed")]
    assert not rewarded or texts[0].read_bytes() == texts[1].read_bytes()


def test_pairs_of_samples(train: Callable[..., int], tmp_path: Path):
    assert train(tmp_path / "run", *SAMPLED) == 0
    found = rows(tmp_path / "run" / "pairs.jsonl")
    assert all(row["chosen_reward"] > row["rejected_reward"] for row in found)
    assert {row["split"] for row in found} == {"train", "validation"}
    summary = content(tmp_path / "run" / "summary.json")
    assert summary["samples_generated"] == 3 * (12 + 8)
    assert summary["pairs"] == sum(row["split"] == "train" for row in found)
    assert summary["pairs/ties"] == 3 * (12 + 8) - len(found)
    assert summary["time/pairs_s"] > 0 and summary["kl/full"] > 0
    assert {"reward/mean", "gold/mean", "length/mean", "length/truncated_frac"} <= summary.keys()
    assert len({row["prompt"] for row in found if row["split"] == "validation"}) <= 8
    assert set(content(tmp_path / "run" / "run.json")["upstream"]) == {"sft", "rm"}
    # another seed samples other texts
    assert train(tmp_path / "other", *SAMPLED, "seed=1") == 0
    assert {row["chosen"] for row in found} != {row["chosen"] for row in rows(tmp_path / "other" / "pairs.jsonl")}


def test_noise_is_in_the_labels_of_training_pairs_alone(train: Callable[..., int], tmp_path: Path):
    found = {}
    for name, noise in (("plain", "0"), ("noisy", "3")):
        assert train(tmp_path / name, *SAMPLED, "algo.train.steps=2", f"rm.noise={noise}") == 0
        for row in rows(tmp_path / name / "pairs.jsonl"):
            sides = [(row["prompt"], row[side], row[f"{side}_reward"]) for side in ("chosen", "rejected")]
            found.setdefault((name, row["split"]), []).extend(sides)
    assert found["plain", "validation"] == found["noisy", "validation"]
    plain, noisy = set(found["plain", "train"]), set(found["noisy", "train"])
    texts = [{(prompt, text) for prompt, text, _ in one} for one in (plain, noisy)]
    assert texts[0] <= texts[1], "the same samples; noise breaks ties"
    assert not plain & noisy and max(abs(reward) for *_, reward in noisy) > 1.0


def test_killed_while_it_samples_or_writes_the_pairs(stages: Path, train: Callable[..., int], tmp_path: Path):
    from tests.e2e.fixtures_e2e import environment

    assert train(tmp_path / "undisturbed", *SAMPLED) == 0
    kill = Killing(environment(), tmp_path / "log")
    try:
        line = [*SMALL, *SAMPLED, f"stages.cache_dir={stages}", f"run_dir={tmp_path / 'run'}", "resume=auto"]
        generated = "rlhf_cli.runs.preference:generate"
        assert kill("train-policy", line, rf"call {generated}", rf"call {generated}", call=generated) == KILLED
        assert not list((tmp_path / "run").glob("*pairs.jsonl*"))
        assert kill("train-policy", line, r"os.rename \S+ \S+/pairs.jsonl$") == KILLED
        assert not (tmp_path / "run" / "pairs.jsonl").exists()
        assert list((tmp_path / "run").glob(".pairs.jsonl*")), "the pairs were there, under another name"
        assert kill("train-policy", line) == 0, kill.said()
    finally:
        kill.end()
    assert figures(tmp_path / "run") == figures(tmp_path / "undisturbed")
    assert not list((tmp_path / "run").glob(".pairs.jsonl*"))


def test_precomputed_reference_is_kept_and_is_the_same(train: Callable[..., int], stages: Path, tmp_path: Path):
    assert train(tmp_path / "fly", *STEPS) == 0
    line = [*STEPS, "algo.reference=precomputed"]
    assert train(tmp_path / "pre", *line) == 0
    kept = {file.name: file.read_bytes() for file in stages.glob("reference-*")}
    assert train(tmp_path / "again", *line) == 0
    assert {file.name: file.read_bytes() for file in stages.glob("reference-*")} == kept
    assert figures(tmp_path / "pre") == figures(tmp_path / "again")
    for one, other in zip(figures(tmp_path / "fly"), figures(tmp_path / "pre"), strict=True):
        skipped = {"dpo/accuracy"} if one["step"] == 1 else set()  # all margins are 0 there, but for rounding
        for key in one.keys() - skipped:
            assert other[key] == pytest.approx(one[key], rel=1e-5, abs=1e-5), key
    # other pairs have another file
    assert train(tmp_path / "other", *line, "data.swap_rate=0.5") == 0
    assert len(list(stages.glob("reference-*"))) == len(kept) + 1


def test_an_evaluation_of_a_dpo_policy_finds_a_reward_model(
    train: Callable[..., int], stages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert train(tmp_path / "dpo", "algo.train.steps=2") == 0
    assert train(tmp_path / "rloo", "algo=rloo", "algo.train.steps=2") == 0
    assert content(tmp_path / "rloo" / "summary.json")["samples_generated"] == 2 * 8
    built = set(stages.glob("rm-*"))
    line = ["experiment=smoke", "device=cpu", "precision=fp32", f"stages.cache_dir={stages}"]
    for number, policies in enumerate((["dpo"], ["dpo", "rloo"])):
        listed = ",".join(str(tmp_path / name) for name in policies)
        assert launch("eval", [*line, f"policies=[{listed}]", f"run_dir={tmp_path / f'eval{number}'}"]) == 0
        summary = content(tmp_path / f"eval{number}" / "summary.json")
        assert {f"{name}/reward/mean" for name in policies} <= summary.keys()
    assert set(stages.glob("rm-*")) == built, "the one that was there is the one of the composed stage"
    assert "(behind rloo)" in capsys.readouterr().err
    nowhere = [
        *line,
        "stages.auto=false",
        f"stages.cache_dir={tmp_path / 'empty'}",
        f"run_dir={tmp_path / 'none'}",
    ]
    assert launch("eval", [*nowhere, f"policies=[{tmp_path / 'dpo'}]"]) == 2
    assert "rm.path=null" in capsys.readouterr().err


def imdb(folder: Path) -> Path:
    """A few reviews."""
    words = ["good", "warm", "bad", "slow", "film", "plot", "cast", "story"]
    file = folder / "imdb.jsonl"
    with file.open("w") as stream:
        for number in range(160):
            text = " ".join(words[(number * step) % 8] for step in range(1, 30))
            stream.write(json.dumps({"text": f"review {number} : {text} .", "label": number % 2}) + "\n")
    return file


IMDB = ["data.num_validation_pairs=8", "data.num_test_pairs=8", "rm.train.steps=2", "rm.standardize_samples=8"]
IMDB += ["data.max_sft_tokens=60", "sft.train.steps=2", "rollout.max_new_tokens=8", "algo.eval_prompts=6"]


def test_data_whose_pairs_share_no_prompt_is_sampled_from(train: Callable[..., int], tmp_path: Path):
    data = [f"data.path={imdb(tmp_path)}", f"data.cache_dir={tmp_path / 'rows'}", "data=imdb", *IMDB]
    assert train(tmp_path / "run", *data, *SAMPLED[1:]) == 0
    found = rows(tmp_path / "run" / "pairs.jsonl")
    assert found and all(isinstance(row["prompt"], str) and row["prompt"] for row in found)
    assert content(tmp_path / "run" / "summary.json")["samples_generated"] == 3 * (12 + 6)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["data=imdb", "algo.pairs=data"], "algo.pairs=data"),
        (["data=imdb", "algo.labels=gold"], "algo.labels=gold"),
        (["algo.label_smoothing=0.5"], "algo.label_smoothing=0.5"),
        (["algo.loss=hinge"], "algo.loss=hinge"),
        (["algo.beta=0"], "algo.beta=0"),
        (["algo.pairs=on_policy", "stages.auto=false"], "sft.path=null"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(
    extra: list[str], said: str, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert train(tmp_path / "run", *extra) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()


def test_ties_in_two_processes_are_one_line(stages: Path, tmp_path: Path):
    """An untrained model hardly ever ends its texts, and cut ones all have the lowest gold reward."""
    together = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rlhf_cli")
    line = ["train-policy", *SMALL, *SAMPLED, "algo.labels=gold", "threads=1", f"stages.cache_dir={stages}"]
    done = run([*line, "run_dir=two"], tmp_path, program=(sys.executable, *together))
    assert done.status != 0
    said = [row for row in done.err.splitlines() if row.startswith("rlhf: ")]
    assert len(said) == 1 and said[0].startswith("rlhf: algo.k=3: all samples of the "), done.err
    assert "are ties" in said[0]
    assert not any("rlhf_cli" in row for row in done.err.splitlines() if row.startswith('  File "'))


def test_two_processes_give_the_figures_of_one(stages: Path, tmp_path: Path):
    together = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    line = ["train-policy", *SMALL, *STEPS, *SAMPLED, "algo.reference=precomputed", "threads=1"]
    ok([*line, f"stages.cache_dir={stages}", "run_dir=one"], tmp_path, program=LOADED)
    upstream = content(tmp_path / "one" / "run.json")["upstream"]
    given = [f"{stage}.path={artifact['path']}" for stage, artifact in upstream.items()]
    ok([*line, *given, "run_dir=two", "stages.cache_dir=cache"], tmp_path, program=(*together, "-m", "rlhf_cli"))
    sampled = [
        [(row["split"], row["chosen_ids"], row["rejected_ids"]) for row in rows(tmp_path / name / "pairs.jsonl")]
        for name in ("one", "two")
    ]
    assert sampled[0] == sampled[1]
    one, two = (rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for first, second in zip(map(timeless, one), map(timeless, two), strict=True):
        skipped = {"dpo/accuracy"} if first["step"] == 1 else set()  # all margins are 0 there, but for rounding
        for key in first.keys() - skipped:
            assert second[key] == pytest.approx(first[key], rel=1e-4, abs=1e-4), (first["step"], key)
    names = [set(files(tmp_path / run)) for run in ("one", "two")]
    assert names[0] == names[1]
