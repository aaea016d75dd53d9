"""`--help` names what there is: every group, every choice, keys and examples that work."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from rlhf_cli.commands import help as help_module
from rlhf_cli.commands.help import command_help, conf_path, group_choices, is_group, sweep_help
from rlhf_cli.commands.sweep import COMMANDS
from rlhf_cli.config.store import register

TEXTS = {command: command_help(command, "Summary.") for command in COMMANDS}


def composed(command: str, overrides: list[str]) -> DictConfig:
    register()
    with initialize_config_dir(str(conf_path()), version_base="1.3"):
        return compose(command.replace("-", "_"), overrides)


@pytest.mark.parametrize("command", COMMANDS)
def test_groups_and_their_choices(command: str):
    for group in ("algo", "rm", "data", "precision", "logger", "experiment"):
        assert re.search(rf"^  {group}= +{re.escape('|'.join(group_choices(group)))}$", TEXTS[command], re.M)
    models = group_choices("model")
    assert re.search(rf"^  model@rm\.model= +{re.escape('|'.join(models))}$", TEXTS[command], re.M)
    models.remove("as_policy")  # these are for rm.model alone
    models.remove("distilbert")
    assert re.search(rf"^  model= +{re.escape('|'.join(models))}$", TEXTS[command], re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_keys_named_exist(command: str):
    block = TEXTS[command].partition("Keys most used:")[2].partition("\n\n")[0]
    named = [key for line in block.strip().splitlines() for key in re.split(r"  +", line.strip())[0].split(", ")]
    assert len(named) >= 5
    trees = [composed(command, []), composed(command, ["data=jsonl"])]
    trees += [composed(command, [f"rm={kind}"]) for kind in ("distributional", "warm")]
    for key in named:
        key = key.partition("=")[0]
        assert any(OmegaConf.select(tree, key, default="absent") != "absent" for tree in trees), key


@pytest.mark.parametrize("command", [*COMMANDS, "sweep"])
def test_the_examples_compose(command: str):
    text = sweep_help() if command == "sweep" else TEXTS[command]
    examples = text.partition("Examples:")[2].strip().splitlines()
    assert len(examples) >= 3
    for example in examples:
        program, *words = shlex.split(example.strip())
        assert program == "rlhf"
        if command == "sweep":
            assert words.pop(0) == "sweep" and words[0] in COMMANDS
        else:
            assert words[0] == command
        overrides = [word for word in words[1:] if word != "-m"]
        one = [word if "[" in word else re.sub(r",.*", "", word) for word in overrides]  # the first job
        assert composed(words[0], one).command == words[0]
        swept = [word for word in overrides if "," in word and "[" not in word]
        assert bool(swept) == ("-m" in words or command == "sweep"), example


def test_groups_are_folders_of_yaml_files():
    assert is_group("algo") and is_group("model")
    assert not is_group("algo.k") and not is_group("seed") and not is_group("nope")


def test_conf_is_found_in_a_wheel_before_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = tmp_path / "package" / "commands" / "help.py"
    monkeypatch.setattr(help_module, "__file__", str(module))
    with pytest.raises(FileNotFoundError, match="installation is incomplete"):
        conf_path()
    for place in (tmp_path / "conf", tmp_path / "package" / "conf"):
        place.mkdir(parents=True)
        (place / "train_policy.yaml").touch()
        assert conf_path() == place
