"""What is wrong with a request is found before anything is written, and said in one line: key, value, choices."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
import torch
from fixtures_config import Ask, choices, commands, contents

from rlhf_cli.commands import job
from rlhf_cli.commands.launch import OK, WRONG_REQUEST

P = "train-policy"

# (command, arguments, what the line has to say)
WRONG: dict[str, tuple[str, list[str], list[str]]] = {
    # groups
    "unknown choice": (P, ["algo=rlo"], ["algo=rlo", *choices("algo"), "did you mean rloo?"]),
    "unknown choice elsewhere": (P, ["model@rm.model=huge"], ["model=huge", "tiny", "pretrained"]),
    "unknown choice of precision": (P, ["precision=fp8"], ["precision=fp8", *choices("precision")]),
    "unknown experiment": (P, ["experiment=nope"], ["experiment=nope", *choices("experiment")]),
    "no choice": (P, ["algo=null"], ["algo=null", *choices("algo")]),
    "empty choice": (P, ["algo="], ["algo=", *choices("algo")]),
    "a number as choice": (P, ["rm=3"], ["rm=3", *choices("rm")]),
    "unknown group": (P, ["algos=rloo"], ["algos=rloo", "unknown key", "did you mean algo?", "rollout"]),
    "unknown package": (P, ["model@algo.model=tiny"], ["model@algo.model", "model@rm.model"]),
    "added group": (P, ["+optimizer=adam"], ["optimizer=adam", "unknown key", "algo"]),
    "a choice that refers to itself": (P, ["model=as_policy"], ["algo.train.lr", "Recursive interpolation"]),
    "group removed": (P, ["~algo"], ["algo: has to be given"]),
    "unknown launcher": (P, ["hydra/launcher=slurm"], ["hydra/launcher=slurm", "basic"]),
    # keys
    "unknown key": (P, ["algo.bta=1"], ["algo.bta=1", "unknown key", "did you mean algo.beta?", "clip"]),
    "unknown top-level key": (P, ["sed=1"], ["sed=1", "unknown key", "did you mean seed?", "threads"]),
    "key added with +": (P, ["+algo.bta=1"], ["algo.bta=1", "unknown key", "did you mean algo.beta?"]),
    "key forced with ++": (P, ["++sed=1"], ["sed=1", "unknown key", "did you mean seed?"]),
    "key added inside a value": (
        P,
        ["algo.train={stepz: 3}"],
        ["algo.train.stepz", "did you mean algo.train.steps?"],
    ),
    "key removed": (P, ["~algo.beta"], ["algo.beta", "cannot be removed"]),
    "key of another choice": (P, ["algo=rloo", "algo.alpha=0.5"], ["algo.alpha=0.5", "unknown key"]),
    "unknown key of Hydra": (P, ["hydra.run.foo=1"], ["hydra.run.foo=1", "unknown key", "dir"]),
    "another command": (P, ["command=eval"], ["command=eval", "train-policy"]),
    # types
    "text for a whole number": (P, ["algo.k=two"], ["algo.k=two: expected a whole number"]),
    "fraction for a whole number": (P, ["seed=1.5"], ["seed=1.5: expected a whole number"]),
    "text for a number": (P, ["algo.beta=x"], ["algo.beta=x: expected a number"]),
    "nothing for a number": (P, ["algo.beta="], ["algo.beta=: expected a number"]),
    "null for a number": (P, ["algo.beta=null"], ["algo.beta=null", "not null"]),
    "text for a truth value": (P, ["stages.auto=maybe"], ["stages.auto=maybe: expected true or false"]),
    "text for a list": ("eval", ["policies=a"], ["policies=a: expected a list"]),
    "enum": (P, ["device=tpu"], ["device=tpu: not one of auto, cpu, cuda, mps (did you mean cpu?)"]),
    "enum of a choice": (P, ["algo=reinforce", "algo.baseline=median"], ["algo.baseline=median", "ema, mean"]),
    "enum deep down": (P, ["rm.train.schedule=step"], ["rm.train.schedule=step", "constant", "cosine", "linear"]),
    "interpolation of nothing": (P, ["algo.beta=${nope}"], ["algo.beta=${nope}", "nope"]),
    # values
    "rloo with one sample": (P, ["algo=rloo", "algo.k=1"], ["algo.k=1", "at least 2"]),
    "negative beta": (P, ["algo.beta=-1"], ["algo.beta=-1", ">= 0"]),
    "beta not a number": (P, ["algo.beta=nan"], ["algo.beta=nan", ">= 0"]),
    "batch not a multiple of k": (P, ["algo.train.batch_size=63"], ["algo.train.batch_size=63", "algo.k=4"]),
    "negative seed": (P, ["seed=-1"], ["seed=-1", ">= 0"]),
    "negative seed of a stage": (P, ["rm.seed=-1"], ["rm.seed=-1", ">= 0"]),
    "seed of more than 63 bits": (P, ["sft.seed=9223372036854775808"], ["sft.seed=9223372036854775808", "2^63"]),
    "no name": (P, ["name="], ["name=", "expected"]),
    "a name with a slash": (P, ["name=a/b"], ["name=a/b", "without a slash"]),
    "no steps": (P, ["algo.train.steps=0"], ["algo.train.steps=0", ">= 1"]),
    "no learning rate": ("train-sft", ["sft.train.lr=0"], ["sft.train.lr=0", "> 0"]),
    "decay out of range": (P, ["algo=reinforce", "algo.alpha=1"], ["algo.alpha=1", "below 1"]),
    "a clip without effect": (P, ["algo.clip=0.2"], ["algo.clip=0.2", "null"]),
    "a clip of nothing": (P, ["algo=ppo", "algo.clip=0"], ["algo.clip=0", "above 0 and below 1"]),
    "a clip of all": (P, ["algo.num_epochs=2", "algo.clip=1"], ["algo.clip=1", "above 0 and below 1"]),
    "a clip of a cross-entropy": (P, ["algo=raft", "algo.clip=0.2"], ["algo.clip=0.2", "null", "cross-entropy"]),
    "a clip without a ratio": (P, ["algo=vanilla_pg", "algo.clip=0.2"], ["algo.clip=0.2", "null", "no ratio"]),
    "several passes without a ratio": (
        P,
        ["algo=vanilla_pg", "algo.num_epochs=2"],
        ["algo.num_epochs=2", "one step per rollout", "algo=ppo"],
    ),
    "several steps without a ratio": (
        P,
        ["algo=vanilla_pg", "algo.rollout_batch_size=128"],
        ["algo.rollout_batch_size=128", "one step per rollout", "algo=ppo"],
    ),
    "raft with one sample": (P, ["algo=raft", "algo.k=1"], ["algo.k=1", "at least 2", "best"]),
    "no sample at all": (P, ["algo=reinforce", "algo.k=0"], ["algo.k=0", ">= 1"]),
    "a rollout that is no whole number of steps": (
        P,
        ["algo.rollout_batch_size=96"],
        ["algo.rollout_batch_size=96", "multiple of algo.train.batch_size=64"],
    ),
    "a rollout smaller than a step": (
        P,
        ["algo.rollout_batch_size=32"],
        ["algo.rollout_batch_size=32", "multiple of algo.train.batch_size=64"],
    ),
    "an empty rollout": (P, ["algo.rollout_batch_size=0"], ["algo.rollout_batch_size=0", "multiple of"]),
    "no pass over a rollout": (P, ["algo.num_epochs=0"], ["algo.num_epochs=0", ">= 1"]),
    "lambda above one": (P, ["algo=ppo", "algo.lam=1.5"], ["algo.lam=1.5", "from 0 to 1"]),
    "gamma not a number": (P, ["algo=ppo", "algo.gamma=nan"], ["algo.gamma=nan", "from 0 to 1"]),
    "a negative weight of the critic": (P, ["algo=ppo", "algo.value_coef=-1"], ["algo.value_coef=-1", ">= 0"]),
    "a value clip of nothing": (P, ["algo=ppo", "algo.value_clip=0"], ["algo.value_clip=0", "> 0, or null"]),
    "a ranking that is none": (P, ["algo=raft", "algo.rank_by=length"], ["algo.rank_by=length", "reward, shaped"]),
    "a value head that is none": (
        P,
        ["algo=vanilla_pg", "algo.value_head=none"],
        ["algo.value_head=none", "separate, shared"],
    ),
    "a critic's key where there is none": (P, ["algo.value_coef=0.5"], ["algo.value_coef=0.5", "unknown key"]),
    "a key that was another one": (P, ["algo.num_minibatches=2"], ["algo.num_minibatches=2", "unknown key"]),
    "a place of the KL that is none": (P, ["kl.placement=both"], ["kl.placement=both", "loss, reward"]),
    "a KL over RAFT's best samples": (P, ["algo=raft", "kl.placement=loss"], ["kl.placement=loss", "RAFT"]),
    "WARP of adapters": (P, ["algo=warp", "peft=adapter"], ["peft=adapter", "algo=warp", "lora"]),
    "an estimator that is none": (P, ["kl.estimator=k4"], ["kl.estimator=k4", "k1, k2, k3"]),
    "an estimator that tokens have no use for": (
        P,
        ["algo=ppo", "kl.estimator=k3"],
        ["kl.estimator=k3", "k1", "algo=ppo", "tokens"],
    ),
    "negative noise": (P, ["rm.noise=-1"], ["rm.noise=-1", ">= 0"]),
    "endless noise": (P, ["rm.noise=inf"], ["rm.noise=inf", ">= 0"]),
    "patience without evaluations": (
        "train-sft",
        ["sft.train={patience: 2, eval_every: null}"],
        ["sft.train.patience=2"],
    ),
    "more tokens than positions": (P, ["data.max_prompt_tokens=999"], ["model.max_positions=256", "1047"]),
    "completions longer than trained on": (P, ["rollout.max_new_tokens=49"], ["rollout.max_new_tokens=49", "48"]),
    "heads that do not divide": (P, ["model.hidden_size=100"], ["model.hidden_size=100", "num_heads=4"]),
    "a share above one": (P, ["data.swap_rate=1.5"], ["data.swap_rate=1.5"]),
    "fp16 on a CPU": (P, ["precision=fp16", "device=cpu"], ["precision=fp16", "fp32", "bf16"]),
    "a negative best of n": ("eval", ["eval.best_of_n=-1"], ["eval.best_of_n=-1", "0 for none"]),
    "as many samples as the best is of": (
        "eval",
        ["eval.best_of_n=64"],
        ["eval.best_of_samples=64", "more than eval.best_of_n=64"],
    ),
    "no samples for the best of n": ("eval", ["eval.best_of_samples=0"], ["eval.best_of_samples=0", ">= 1"]),
    "best of n of a model that has no rows": (
        "eval",
        ["data=rewardbench", "model.max_positions=1024", "rm.path=org/model", "eval.best_of_n=4"],
        ["eval.best_of_n=4", "sft.path or reference.path", "data=rewardbench"],
    ),
    "best of n of a model that is too short": (
        "eval",
        ["rm.path=org/model", "eval.best_of_n=4", "model.max_positions=64"],
        ["model.max_positions=64", "at least"],
    ),
    "best of n without a model to sample from": (
        "eval",
        ["stages.auto=false", "rm.path=org/model", "eval.best_of_n=4"],
        ["sft.path=null", "stages.auto=false"],
    ),
    "temperature zero": ("eval", ["eval.temperature=0"], ["eval.temperature=0", "> 0"]),
    "no threads": (P, ["threads=0"], ["threads=0", ">= 1"]),
    "another adapter": (P, ["peft.name=prefix"], ["peft.name=prefix", "none, lora, adapter or last_layer"]),
    "no rank": (P, ["peft=lora", "peft.r=0"], ["peft.r=0", ">= 1"]),
    "an adapter's variant": (
        P,
        ["peft=adapter", "peft.variant=replaced"],
        ["peft.variant=replaced", "mean replace?"],
    ),
    "an adapter without width": (
        P,
        ["peft@rm.peft=adapter", "rm.peft.bottleneck=0"],
        ["rm.peft.bottleneck=0", ">= 1"],
    ),
    "an experiment of another algorithm": (
        P,
        ["algo=rloo", "experiment=warp_imdb"],
        ["experiment=warp_imdb", "algo.I", "algo=rloo", "cannot be combined"],
    ),
    "noise on a reward model that nothing asks": (P, ["algo=dpo", "rm.noise=1"], ["rm.noise=1", "0", "algo=dpo"]),
    "noise on a reward model that does not label": (
        P,
        ["algo=dpo", "algo.pairs=on_policy", "algo.labels=gold", "rm.noise=1"],
        ["rm.noise=1", "0", "algo=dpo"],
    ),
    "another place of a KL in log-ratios": (
        P,
        ["algo=dpo", "kl.placement=loss"],
        ["kl.placement=loss", "reward", "algo=dpo"],
    ),
    "another estimate of a KL in log-ratios": (
        P,
        ["algo=dpo", "kl.estimator=k3"],
        ["kl.estimator=k3", "k1", "algo=dpo"],
    ),
    "a clip of members without effect": (P, ["algo=warp", "algo.clip=0.2"], ["algo.clip=0.2", "null"]),
    "a rollout of members that is no whole number of steps": (
        P,
        ["algo=warp", "algo.rollout_batch_size=96"],
        ["algo.rollout_batch_size=96", "multiple of algo.train.batch_size=64"],
    ),
    # paths
    "a model without path": (P, ["model=pretrained"], ["model.path=null", "local folder or hub id"]),
    "a reward model's without path": (P, ["model@rm.model=pretrained"], ["rm.model.path=null"]),
    "no model there": (P, ["model=pretrained", "model.path=./nope"], ["model.path=./nope", "no such folder"]),
    "no SFT model there": (P, ["sft.path=./nope"], ["sft.path=./nope", "no such folder"]),
    "no reward model there": (P, ["rm.path=./nope"], ["rm.path=./nope", "no such folder"]),
    "a folder without model": (P, ["rm.path=empty"], ["rm.path=empty", "config.json"]),
    "a file for a model": (P, ["sft.path=pairs.jsonl"], ["sft.path=pairs.jsonl", "folder"]),
    "no policy there": ("eval", ["policies=[./nope]"], ["policies=./nope", "no such folder"]),
    "no reference there": ("eval", ["reference.path=./nope"], ["reference.path=./nope", "no such folder"]),
    "data without path": (P, ["data=jsonl"], ["data.path=null", ".jsonl"]),
    "no data there": (P, ["data=jsonl", "data.path=nope.jsonl"], ["data.path=nope.jsonl", "no such file"]),
    "a folder for data": (P, ["data=jsonl", "data.path=empty"], ["data.path=empty", "is a folder"]),
    "no test data there": (
        P,
        ["data=jsonl", "data.path=pairs.jsonl", "data.test_path=nope.jsonl"],
        ["data.test_path=nope.jsonl", "no such file"],
    ),
    "training on an evaluation set": (
        "train-rm",
        ["data=rewardbench", "data.path=pairs.jsonl", "model.max_positions=1024"],
        ["data=rewardbench", "train-rm"],
    ),
    "an evaluation set without a model to measure": (
        "eval",
        ["data=rewardbench", "model.max_positions=1024"],
        ["rm.path=null", "data=rewardbench"],
    ),
    "an attribute that is none": (
        P,
        ["data=helpsteer2", "data.attribute=wit"],
        ["data.attribute=wit", "helpfulness"],
    ),
    "a chat format that is none": (
        P,
        ["data=hh-rlhf", "data.chat=chatml"],
        ["data.chat=chatml", "auto, plain, template"],
    ),
    "no rows at all": (P, ["data=imdb", "data.limit=0"], ["data.limit=0", ">= 1"]),
    "prompts longer than their cap": (
        P,
        ["data=imdb", "data.max_drawn_tokens=30"],
        ["data.max_drawn_tokens=30", "24"],
    ),
    "reviews longer than the model": (
        P,
        ["data=imdb", "data.max_sft_tokens=256"],
        ["data.max_sft_tokens + 1 = 257"],
    ),
    "a test file without rows to train on": (
        P,
        ["data=imdb", "data.test_path=pairs.jsonl"],
        ["data.test_path", "data.path"],
    ),
    "a subset outside the folder": (P, ["data=hh-rlhf", "data.subsets=[../x]"], ["data.subsets", "sub-folders"]),
    "an unknown key of a weighting": (
        P,
        ["data=helpsteer2", "data.weights.wit=1"],
        ["data.weights.wit=1", "unknown key"],
    ),
    "policy without stages": (P, ["stages.auto=false"], ["sft.path=null", "stages.auto=false"]),
    "policy without reward model": (P, ["stages.auto=false", "sft.path=org/model"], ["rm.path=null"]),
    "reward model without SFT": ("train-rm", ["stages.auto=false"], ["sft.path=null", "stages.auto=false"]),
    "eval without anything": ("eval", ["stages.auto=false"], ["rm.path=null", "stages.auto=false"]),
    "run_dir is a file": (P, ["run_dir=pairs.jsonl"], ["run_dir=pairs.jsonl", "cannot be created"]),
    "run_dir below a file": (P, ["run_dir=pairs.jsonl/run"], ["run_dir=pairs.jsonl/run", "cannot be created"]),
    "run_dir null": (P, ["run_dir=null"], ["run_dir=null"]),
    "run_dir in use": (P, ["run_dir=used"], ["run_dir=used", "already holds a run"]),
    "run_dir with a sweep": (P, ["run_dir=swept"], ["run_dir=swept", "already holds a sweep"]),
    "run_dir with other files": (P, ["run_dir=notes"], ["run_dir=notes", "not empty", "todo.txt"]),
    "a sweep into a run": (P, ["-m", "seed=0,1", "run_dir=used"], ["run_dir=used", "already holds a run"]),
    # grammar and flags
    "unreadable": (P, ["algo.beta=[1"], ["algo.beta=[1", "key=value"]),
    "no equals sign": (P, ["algo.beta"], ["algo.beta", "key=value"]),
    "no key": (P, ["=3"], ["=3", "no key"]),
    "no added key": (P, ["+=3"], ["+=3", "no key"]),
    "unknown flag": (P, ["--fast"], ["--fast"]),
    "flag without value": (P, ["--config-name"], ["--config-name"]),
    "unknown --cfg": (P, ["--cfg", "everything"], ["--cfg", "everything", "job", "hydra", "all"]),
    "no such --config-dir": (P, ["--config-dir", "nope"], ["--config-dir nope", "no such folder"]),
    "no such --config-name": (P, ["--config-name", "nope"], ["nope"]),
    "-m and --cfg": (P, ["-m", "--cfg", "job", "seed=0,1"], ["--multirun", "--cfg"]),
    "rerun of a pickle": (P, ["--experimental-rerun", "job.pickle"], ["--experimental-rerun", "pickle"]),
    "object to import": (P, ["+algo._target_=os.system"], ["_target_", "Python object"]),
    "object inside a value": (P, ["algo={_target_: os.system}"], ["_target_", "Python object"]),
    "--cfg of a wrong request": (P, ["algo=rlo", "--cfg", "job"], ["algo=rlo", "rloo"]),
    # sweeps
    "several values without -m": (P, ["algo.k=2,4"], ["algo.k=2,4", "--multirun"]),
    "several choices without -m": (P, ["algo=rloo,reinforce"], ["algo=rloo,reinforce", "--multirun"]),
    "a range without -m": (P, ["algo.k=range(2,4)"], ["algo.k=range(2,4)", "--multirun"]),
    "an impossible job": (P, ["-m", "algo.k=2,1"], ["algo.k=1", "at least 2"]),
    "a job of another type": (P, ["-m", "algo.k=2,x"], ["algo.k=x: expected a whole number"]),
    "a job with an unknown choice": (P, ["-m", "algo=rloo,foo"], ["algo=foo", *choices("algo")]),
    "an encoder as a policy": (
        P,
        ["model=distilbert"],
        ["model=distilbert", "encoder", "model@rm.model=distilbert"],
    ),
    "an encoder to fine-tune": ("train-sft", ["model=distilbert"], ["model=distilbert", "causal language model"]),
    "an encoder as everything": ("train-rm", ["model=distilbert"], ["model=distilbert", "model@rm.model="]),
    "an encoder by a key": (
        P,
        ["model=pretrained", "model.path=org/bert", "model.encoder=true"],
        ["model=pretrained", "encoder"],
    ),
    "an encoder built here": (
        P,
        ["model@rm.model=tiny", "rm.model.encoder=true"],
        ["rm.model.encoder=True", "false"],
    ),
    "a job with a missing path": (P, ["-m", "sft.path=null,./nope"], ["sft.path=./nope", "no such folder"]),
    "an impossible pair of values": (P, ["-m", "algo.k=3,4", "algo.train.batch_size=8,6"], ["multiple of algo.k"]),
    "several folders": (P, ["-m", "run_dir=a,b"], ["run_dir=a,b", "one folder"]),
    "mode without -m": (P, ["hydra.mode=MULTIRUN", "algo.k=2,1"], ["algo.k=1", "at least 2"]),
    "sweep without a command": ("sweep", [], ["COMMAND", *commands()]),
    "sweep of nothing known": ("sweep", ["train"], ["train", *commands()]),
    "sweep of values alone": ("sweep", ["algo.k=2,4"], ["algo.k=2,4", *commands()]),
    "sweep with an impossible job": ("sweep", [P, "algo.k=2,1"], ["algo.k=1", "at least 2"]),
}


@pytest.fixture
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that gets as far as its job fails the test at once."""

    def begin(cfg: object) -> None:
        raise AssertionError("the job began")

    monkeypatch.setattr(job, "run", begin)


@pytest.fixture
def furnished(workplace: Path, no_job: None) -> Path:
    """A working folder with a file, an empty folder, a run, a sweep and someone's notes."""
    (workplace / "pairs.jsonl").write_text('{"prompt": "a", "chosen": " b", "rejected": " c"}\n')
    for folder in ("empty", "used/.hydra", "swept", "notes"):
        (workplace / folder).mkdir(parents=True)
    (workplace / "used/run.json").write_text("{}")
    (workplace / "used/.hydra/config.yaml").write_text("seed: 7\n")
    (workplace / "swept/multirun.yaml").write_text("seed: 7\n")
    (workplace / "notes/todo.txt").write_text("write\n")
    return workplace


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_one_line_and_leaves_nothing(case: str, ask: Ask, furnished: Path):
    command, arguments, words = WRONG[case]
    before = contents(furnished)
    answer = ask(command, *arguments)
    assert answer.status == WRONG_REQUEST
    assert [word for word in words if word not in answer.line] == [], answer.line
    assert "Traceback" not in answer.err and answer.out == ""
    assert contents(furnished) == before


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("eval", ["eval.split=dev"], ["eval.split=dev", "ood, test"]),
        (P, ["data=jsonl", "data.path=broken.jsonl"], ["broken.jsonl, line 2", "no column rejected"]),
        (P, ["stages.cache_dir=broken.jsonl/cache"], ["stages.cache_dir=broken.jsonl/cache", "cannot be created"]),
    ],
)
def test_what_only_the_rows_show_is_found_before_a_run_begins(
    command: str,
    arguments: list[str],
    words: list[str],
    ask: Ask,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    (workplace / "broken.jsonl").write_text(
        '{"prompt": "a", "chosen": " b", "rejected": " c"}\n{"prompt": "a", "chosen": " b"}\n'
    )
    answer = ask(command, *arguments, "run_dir=run", "experiment=smoke")
    assert answer.status == WRONG_REQUEST
    assert [word for word in words if word not in answer.line] == [], answer.line
    assert {name.partition("/")[0] for name in contents(workplace / "run")} <= {
        ".hydra",
        ".lock",
        "rlhf.log",
        "run_config.json",
    }
    assert {path.name for path in workplace.iterdir()} == {"broken.jsonl", "run"}
    # and the folder can be used once the request is right
    monkeypatch.setattr(job, "run", lambda cfg: None)
    assert ask(command, "run_dir=run").status == OK


@pytest.mark.usefixtures("no_job")
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(device: str, ask: Ask, workplace: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    answer = ask(P, f"device={device}")
    assert answer.status == WRONG_REQUEST
    assert answer.line == f"device={device}: expected a device that this machine has: auto, cpu"
    assert contents(workplace) == {}


@pytest.mark.usefixtures("no_job")
def test_a_folder_that_cannot_be_written_to(ask: Ask, workplace: Path, monkeypatch: pytest.MonkeyPatch):
    """As root every folder can be written to, so the system's answer is replaced."""
    (workplace / "locked").mkdir()

    def locked(dir: Path) -> None:
        assert dir == Path("locked")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", locked)
    answer = ask(P, "run_dir=locked")
    assert answer.status == WRONG_REQUEST
    assert answer.line == "run_dir=locked: cannot be written to (No space left on device)"


def test_the_hydra_folder_of_a_run_in_use_stays_as_it_is(ask: Ask, furnished: Path):
    before = contents(furnished / "used")
    for arguments in (["run_dir=used"], ["run_dir=used", "-m", "seed=0,1"], ["run_dir=used", "experiment=smoke"]):
        assert ask("train-sft", *arguments).status == WRONG_REQUEST
        assert contents(furnished / "used") == before


@pytest.mark.usefixtures("no_job")
def test_a_full_traceback_is_shown_where_it_is_asked_for(ask: Ask, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    for arguments in (["algo=rlo"], ["algo.k=1"], ["algo.k=x"], ["data=jsonl", "data.path=nope"]):
        answer = ask(P, *arguments)
        assert answer.status == WRONG_REQUEST
        assert "Traceback (most recent call last)" in answer.err
        assert answer.err.splitlines()[-1].startswith(f"rlhf: {arguments[-1].partition('=')[0]}=")
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_a_full_traceback_of_an_error_found_inside_the_run(ask: Ask, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    answer = ask("eval", "eval.split=dev", "experiment=smoke")
    assert answer.status == WRONG_REQUEST
    assert "Traceback (most recent call last)" in answer.err and "_check_split" in answer.err
    assert answer.err.splitlines()[-1].startswith("rlhf: eval.split=dev: not one of ")
