"""The dataclasses behind the YAML files and the files themselves say the same, and neither imports torch."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import reduce
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from fixtures_config import CONF, choices, commands, composed, composed_now, groups, leaves, overrides, raw
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from rlhf_cli.algos.registry import algorithms
from rlhf_cli.config.store import _SCHEMAS, register
from rlhf_cli.models.settings import ModelSettings
from rlhf_cli.settings import TrainSettings

README = CONF.parent / "README.md"
CHOICES = [f"{group}={choice}" for group in groups() for choice in choices(group)]

# A model that is loaded has sizes of its own; what a schema says of them is not read.
SIZES = {field.name for field in fields(ModelSettings)} - {"name", "path", "encoder", "lr"}

# Keys whose name, with the file they are in, says all there is.
SELF_EVIDENT = {"command", "name", "num_layers", "num_heads"}

TRAINING = {field.name for field in fields(TrainSettings)}


@contextmanager
def empty_schemas() -> Iterator[None]:
    """The same tree without its dataclasses: what is composed is what the YAML files say."""
    register()
    store = ConfigStore.instance()
    before = store.repo
    store.repo = copy.deepcopy(before)
    for group, nodes in _SCHEMAS.items():
        folder = store.repo
        for part in group.split("/"):
            folder = folder[part]
        for name in nodes:
            folder[f"{name}.yaml"].node = OmegaConf.create({})
    try:
        yield
    finally:
        store.repo = before


def keys(config: DictConfig) -> set[str]:
    return set(leaves(OmegaConf.to_container(config, resolve=False)))


@pytest.mark.parametrize("choice", CHOICES)
def test_no_default_is_hidden_in_a_schema(choice: str):
    """Every field of every schema is set in a YAML file, and nothing else is.

    A training stage gets the keys it does not set itself from `/train/base@train` in its defaults.
    """
    config = composed("train-policy", overrides(choice))
    loaded = config.model.path is not None or config.rm.model.path is not None
    unread = {f"{place}.{size}" for place in ("model", "rm.model") for size in SIZES} if loaded else set()
    typed = keys(config)
    with empty_schemas():
        in_yaml = keys(composed_now("train-policy", overrides(choice)))
    assert typed - in_yaml - unread == set(), "fields that no YAML file sets"
    assert in_yaml - typed == set(), "keys that no schema has"


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if not choice.startswith("experiment=")])
def test_a_choice_is_checked_against_a_schema(choice: str):
    package = choice.partition("=")[0].rpartition("@")[2]
    node = OmegaConf.select(composed("train-policy", overrides(choice)), package)
    used = {kind for nodes in _SCHEMAS.values() for kind in nodes.values()}
    assert OmegaConf.get_type(node) in used


def test_every_schema_is_behind_a_yaml():
    named = {
        str(entry).lstrip("/").partition("@")[0]
        for file in CONF.rglob("*.yaml")
        for entry in raw(file).get("defaults", [])
        if "schema/" in str(entry)
    }
    assert named == {f"{group}/{name}" for group, nodes in _SCHEMAS.items() for name in nodes}


def test_algorithms_are_the_same_in_yaml_in_code_and_in_the_readme():
    """A new one is a file of each; what only one of the three knows is half an algorithm."""
    assert set(choices("algo")) == set(algorithms())
    (row,) = re.findall(r"^\| `algo=` \|(.*)\|$", README.read_text(), flags=re.MULTILINE)
    assert re.findall(r"`([^`]+)`", row) == choices("algo")
    for name, kind in algorithms().items():
        assert name == kind().name == kind.__module__.rpartition(".")[2]


@pytest.mark.parametrize("name", choices("algo"))
def test_an_algorithms_defaults_in_code_are_those_of_its_yaml(name: str):
    """Code that makes one itself, without its `train`, has what a user sees."""
    file, code = raw(CONF / "algo" / f"{name}.yaml"), algorithms()[name]()
    for key in {field.name for field in fields(code)} - {"train"}:
        expected = file[key]
        if refers := re.fullmatch(r"\$\{algo\.([\w.]+)\}", str(expected)):
            expected = reduce(dict.__getitem__, refers.group(1).split("."), file)
        assert _plain(getattr(code, key)) == expected, key


def test_the_training_defaults_in_code_are_those_of_the_yaml():
    """Code that makes TrainSettings itself trains with what a user sees."""
    file, code = raw(CONF / "train" / "base.yaml"), TrainSettings()
    assert {field.name for field in fields(TrainSettings)} - set(file) == {"lr"}  # each stage has its own
    for key, value in file.items():
        assert _plain(getattr(code, key)) == value, key


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _field_types() -> set[type]:
    """Of every field of every schema, those of nested ones included."""
    found: set[type] = set()
    waiting: list[Any] = [kind for nodes in _SCHEMAS.values() for kind in nodes.values()]
    while waiting:
        kind = waiting.pop()
        if get_args(kind):  # list[str], float | None
            waiting += get_args(kind)
        elif isinstance(kind, type) and kind not in found:
            found.add(kind)
            waiting += get_type_hints(kind).values() if is_dataclass(kind) else []
    return found


def test_enum_members_are_named_as_they_are_written():
    """OmegaConf matches names and the code passes values on."""
    enums = {kind for kind in _field_types() if issubclass(kind, Enum)}
    assert len(enums) > 12
    for kind in enums:
        assert [member.name for member in kind] == [member.value for member in kind], kind


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda file: str(file.relative_to(CONF)))
def test_every_key_is_explained_where_it_is_set(file: Path):
    """By a comment on its line or on the line above.

    Not a second time: a stage's `train` (train/base.yaml), what an experiment or a file that extends another one sets,
    a value that is another place's of the same name. Hydra's own keys are Hydra's to explain.
    """
    lines = file.read_text().splitlines()
    assert next(line for line in lines if "@package" not in line).startswith("# "), "what the file is for"
    if file.parent.name in ("experiment", "job_logging"):
        return
    elsewhere = set(SELF_EVIDENT)
    for entry in raw(file)["defaults"] if file.stem != "base" else []:
        sibling = file.parent / f"{entry}.yaml"
        elsewhere |= set(raw(sibling)) if sibling.is_file() else set()
    unexplained, block = [], ""
    for above, line in zip(["", *lines], lines, strict=False):
        key = re.match(r"( *)(\w+):\s*([^#]*)", line)
        if key is None:
            continue
        indent, name, value = key.groups()
        block = block if indent else name
        inherited = block in ("defaults", "hydra", "lr") or (indent and name in TRAINING)
        is_head = not value.strip()
        refers = value.strip().endswith(f".{name}}}")
        if not (
            inherited or is_head or refers or name in elsewhere or "#" in line or above.strip().startswith("#")
        ):
            unexplained.append(line)
    assert not unexplained


@pytest.mark.parametrize(
    "module",
    [
        "rlhf_cli.cli",
        "rlhf_cli.config.schema",
        "rlhf_cli.config.store",
        "rlhf_cli.config.explain",
        "rlhf_cli.commands.request",
        "rlhf_cli.commands.launch",
    ],
)
def test_a_module_that_answers_before_anything_runs_imports_no_torch(module: str):
    heavy = ["torch", "transformers", "datasets", "numpy", "matplotlib", "wandb"]
    if module == "rlhf_cli.cli":
        heavy += ["hydra", "omegaconf"]
    code = f"import sys, {module}; print(sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_commands_are_what_is_tested():
    assert len(commands()) >= 4 and len(CHOICES) >= 14
