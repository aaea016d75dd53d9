"""Every YAML and every combination of algorithm, reward model and data composes into the dataclasses."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from fixtures_config import (
    CONF,
    TREE,
    as_object,
    choices,
    command_for,
    commands,
    composed,
    groups,
    overrides,
    raw,
)
from omegaconf import OmegaConf

from rlhf_cli.commands.help import GROUPS as GROUPS_OF_HELP
from rlhf_cli.commands.sweep import COMMANDS

NAMES = {"reviews_small": "reviews", "hh-rlhf_single": "hh-rlhf"}  # the same source, fewer rows
COMBINATIONS = list(product(choices("algo"), choices("rm"), choices("data")))


@pytest.mark.parametrize("place", range(len(COMBINATIONS)), ids=["-".join(names) for names in COMBINATIONS])
def test_every_algorithm_reward_model_and_data_go_together(place: int):
    algo, rm, data = COMBINATIONS[place]
    command = commands()[place % len(commands())]  # commands differ in two keys, see below
    pairs = [f"algo={algo}", f"rm={rm}", f"data={data}"]
    for one in {command_for(command, *pairs), command_for("train-policy", *pairs)}:
        config = as_object(composed(one, overrides(*pairs)))
        config.check()
        assert (config.algo.name, config.rm.name, config.data.name) == (algo, rm, NAMES.get(data, data))


def _with_commands() -> list[tuple[str, str]]:
    """Every choice of every group with a command, experiments with each of them."""
    pairs = [f"{group}={choice}" for group in groups() if group != "experiment" for choice in choices(group)]
    found = [(commands()[place % len(commands())], pair) for place, pair in enumerate(pairs)]
    # an experiment whose SFT model is given has none to train
    given = {name for name in choices("experiment") if composed("train-rm", [f"experiment={name}"]).sft.path}
    return found + [
        (command, f"experiment={name}")
        for command in commands()
        for name in choices("experiment")
        if not (command == "train-sft" and name in given)
    ]


@pytest.mark.parametrize(("command", "choice"), _with_commands())
def test_every_choice_composes(command: str, choice: str):
    command = command_for(command, choice)
    config = as_object(composed(command, overrides(choice)))
    config.check()
    assert config.command == command


def test_groups_and_commands_are_those_of_the_command_line():
    assert set(commands()) == set(COMMANDS)
    assert set(groups()) == set(GROUPS_OF_HELP)


@pytest.mark.parametrize("command", commands())
def test_commands_differ_in_their_name_alone(command: str):
    """So whatever composes for one command composes for all."""
    primary = raw(CONF / f"{command.replace('-', '_')}.yaml")
    assert primary.pop("defaults") == [TREE, "_self_", {"experiment": None}]
    assert set(primary) == {"command", "name"}


@pytest.mark.parametrize(
    ("command", "arguments", "name"),
    [
        ("train-sft", [], "sft"),
        ("train-rm", ["rm=scalar"], "scalar"),
        ("train-policy", ["algo=rloo"], "rloo"),
        ("train-policy", ["algo=reinforce"], "reinforce"),
        ("train-policy", ["algo=reinforce", "experiment=smoke"], "reinforce"),
        ("eval", [], "eval"),
        ("eval", ["name=other"], "other"),
    ],
)
def test_the_name_is_the_choice_that_tells_runs_apart(command: str, arguments: list[str], name: str):
    config = composed(command, arguments)
    assert config.name == name
    assert f"outputs/{command}/{name}/" in config.run_dir


@pytest.mark.parametrize("command", commands())
def test_an_experiment_has_the_last_word_over_everything_but_the_command_line(command: str, tmp_path: Path):
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(
        "# @package _global_\n"
        "defaults:\n"
        "  - override /algo: reinforce\n"
        "  - override /model@rm.model: tiny\n"
        "  - override /data: jsonl\n"
        "name: mine\n"
        "seed: 5\n"
        "data: {path: pairs.jsonl}\n"
        "algo:\n"
        "  beta: 0.75\n"
        "  train: {batch_size: 6}\n"
        "rm:\n"
        "  model: {hidden_size: 64}\n"
    )
    config = as_object(composed(command, ["experiment=mine", "seed=6"], tmp_path))
    assert (config.name, config.seed, config.algo.name, config.algo.beta) == ("mine", 6, "reinforce", 0.75)
    assert (config.data.name, config.data.path) == ("jsonl", "pairs.jsonl")
    assert (config.algo.train.batch_size, config.rm.model.hidden_size, config.model.hidden_size) == (6, 64, 128)


@pytest.mark.parametrize("experiment", choices("experiment"))
@pytest.mark.parametrize("data", choices("data"))
def test_an_experiment_goes_with_all_data(experiment: str, data: str):
    pairs = [f"experiment={experiment}", f"data={data}"]
    config = as_object(composed(command_for("train-policy", *pairs), overrides(*pairs)))
    config.check()
    assert config.data.name == NAMES.get(data, data)


def test_two_experiments_one_after_the_other(tmp_path: Path):
    for name, text in (("first", "seed: 1\nname: first\n"), ("second", "seed: 2\n")):
        (tmp_path / "experiment").mkdir(exist_ok=True)
        (tmp_path / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\n{text}")
    config = composed("train-policy", ["experiment=[first,second]"], tmp_path)
    assert (config.name, config.seed) == ("first", 2)


def test_the_reward_model_has_the_policys_backbone_unless_set():
    same = as_object(composed("train-rm", ["model.hidden_size=64", "model.lr.rm=0.25"]))
    assert same.rm.model == same.model
    assert same.rm.train.lr == 0.25
    own = as_object(composed("train-rm", ["model@rm.model=tiny", "model.hidden_size=64", "rm.model.lr.rm=0.5"]))
    assert (own.rm.model.hidden_size, own.model.hidden_size, own.rm.train.lr) == (128, 64, 0.5)


def test_a_stages_learning_rate_follows_the_backbone():
    config = composed("train-policy", overrides("model=pretrained"))
    assert config.algo.train.lr == config.model.lr.policy == 1e-6
    assert config.sft.train.lr == config.model.lr.sft == 2e-5
    assert config.rm.train.lr == config.model.lr.rm == 1e-5


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda file: str(file.relative_to(CONF)))
def test_no_yaml_names_a_python_object(file: Path):
    """Logging's handler classes, which come from the standard library, are the exception."""
    text = file.read_text()
    assert "_target_" not in text
    if file.parent.name != "job_logging":
        assert "class:" not in text


def test_a_resolved_config_has_no_interpolation_left():
    for command in commands():
        text = OmegaConf.to_yaml(composed(command), resolve=True)
        assert "${" not in text


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ([], 25),
        (["algo.train.steps=7"], 7),
        (["algo.T=9"], 9),
        (["algo.T=9", "algo.train.steps=7"], 9),
        (["experiment=warp_imdb", "algo.train.steps=7"], 100),
    ],
)
def test_warps_members_take_as_many_steps_as_t_says_or_else_the_steps(arguments: list[str], steps: int):
    algo = as_object(composed("train-policy", ["algo=warp", *arguments])).algo
    assert algo.T == algo.member().train.steps == steps
    assert algo.num_steps == 4 * steps


@pytest.mark.parametrize("inner", [["algo.inner=reinforce"], ["algo.inner=rloo", "algo.k=2"]])
def test_warps_members_share_rollouts_as_other_algorithms_do(inner: list[str]):
    line = ["algo=warp", *inner, "algo.rollout_batch_size=128", "algo.num_epochs=3", "algo.clip=0.2"]
    config = as_object(composed("train-policy", line))
    config.check()
    member = config.algo.member()
    assert (member.rollout_batch_size, member.num_epochs, member.clip) == (128, 3, 0.2)
    assert member.num_minibatches == 2 and not member.on_policy
