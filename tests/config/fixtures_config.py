"""The config tree as the tests see it: discovered from conf/, so that a new YAML is tested from its first day."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from rlhf_cli.commands.help import conf_path
from rlhf_cli.config.schema import RunConfig
from rlhf_cli.config.store import register

CONF = conf_path()
TREE = "run"  # the tree that every command's file extends

# What a choice cannot do without. The paths need not exist to compose and check the config.
REQUIRED = {
    "data=jsonl": ["data.path=pairs.jsonl"],
    # texts longer than the embedded model has positions for
    "data=helpsteer2": ["model.max_positions=1024"],
    "data=hh-rlhf": ["model.max_positions=1024"],
    "data=hh-rlhf_single": ["model.max_positions=1024"],
    "data=tldr": ["model.max_positions=1024"],
    "data=rewardbench": ["model.max_positions=1024", "rm.path=org/model"],
    "model=pretrained": ["model.path=org/model"],
    "model@rm.model=pretrained": ["rm.model.path=org/model"],
}

# What has no rows to train on.
EVALUATION_ONLY = {"data=rewardbench"}

# What starts from a model that is fine-tuned already.
SFT_GIVEN = {"experiment=rm_imdb", "experiment=reinforce_imdb"}

# Choices for one place of the tree alone: as_policy takes its values from another, and an encoder is no policy.
ELSEWHERE_ONLY = {"model=as_policy", "model=distilbert", "peft=as_policy"}


def commands() -> list[str]:
    """One per primary YAML."""
    return sorted(file.stem.replace("_", "-") for file in CONF.glob("*.yaml") if file.stem != TREE)


@cache
def groups() -> tuple[str, ...]:
    """The config groups a user can choose in, with their package where they have one: model@rm.model."""
    found: dict[str, None] = {}
    for file in (f"{TREE}.yaml", "train_policy.yaml"):
        for entry in raw(CONF / file)["defaults"]:
            if isinstance(entry, dict):
                found |= {str(key): None for key in entry if " " not in str(key)}
    return tuple(found)


def choices(group: str) -> list[str]:
    """The YAML files of a group."""
    names = sorted(file.stem for file in (CONF / group.partition("@")[0]).glob("*.yaml"))
    return [name for name in names if f"{group}={name}" not in ELSEWHERE_ONLY]


def overrides(*pairs: str) -> list[str]:
    """The choices, and what they cannot do without."""
    return [*pairs, *(required for pair in pairs for required in REQUIRED.get(pair, []))]


def command_for(command: str, *pairs: str) -> str:
    """The command, or one that the choices go with."""
    if EVALUATION_ONLY & set(pairs):
        return "eval"
    return "train-rm" if command == "train-sft" and SFT_GIVEN & set(pairs) else command


def composed(command: str, arguments: Sequence[str] = (), config_dir: Path | None = None) -> DictConfig:
    """The config of a command, without Hydra's own node; not to be changed, the next test may get it too."""
    return _composed(command, tuple(arguments), config_dir)


def composed_now(command: str, arguments: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """As `composed`, from the schemas that are registered at this moment."""
    search = [] if config_dir is None else [f"hydra.searchpath=[file://{config_dir}]"]
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="rlhf"):
        return compose(command.replace("-", "_"), [*arguments, *search])


@cache
def _composed(command: str, arguments: tuple[str, ...], config_dir: Path | None) -> DictConfig:
    register()
    return composed_now(command, arguments, config_dir)


def hydra_node(command: str) -> DictConfig:
    """Hydra's own node of a command."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="rlhf"):
        return compose(command.replace("-", "_"), return_hydra_config=True).hydra


def as_object(config: DictConfig) -> RunConfig:
    """The dataclasses behind a config."""
    result = OmegaConf.to_object(config)
    assert isinstance(result, RunConfig)
    return result


def raw(file: Path) -> dict[str, Any]:
    """A YAML file as it is written."""
    return OmegaConf.to_container(OmegaConf.load(file), resolve=False)  # type: ignore[return-value]


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; lists are leaves."""
    if not isinstance(node, dict):
        return {prefix: node}
    flat: dict[str, Any] = {}
    for name, value in node.items():
        flat |= leaves(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


@dataclass(frozen=True)
class Answer:
    """What a command line came to."""

    status: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line on stderr."""
        assert self.err.count("\n") == 1 and self.err.startswith("rlhf: "), self.err
        return self.err.removeprefix("rlhf: ").rstrip("\n")


Ask = Callable[..., Answer]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and every folder (as no bytes at all)."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")
    }
