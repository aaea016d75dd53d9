"""The outer shell: help, Hydra's flags, `python -m`, and the wheel."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rlhf_cli.commands.help import group_choices
from tests.e2e.fixtures_e2e import ROOT, content, environment, ok, run

MODULE = (sys.executable, "-m", "rlhf_cli")


def test_help_takes_less_than_a_third_of_a_second(tmp_path: Path):
    """Best of five. Under 0.3 s."""
    times = [ok(["--help"], tmp_path).wall_s for _ in range(5)]
    print("rlhf --help:", ", ".join(f"{one:.2f}" for one in times), "s")
    assert min(times) < 0.3


def test_help_names_every_command(tmp_path: Path):
    said = ok(["--help"], tmp_path).out
    for command in ("train-sft", "train-rm", "train-policy", "eval", "sweep", "info"):
        assert f"\n  {command} " in said
    assert "--version" in said


def test_help_of_a_command(tmp_path: Path):
    said = ok(["train-policy", "--help"], tmp_path).out
    for line in ("Config groups:", "Keys most used:", "Examples:", "    rlhf train-policy algo=rloo"):
        assert line in said
    assert list(tmp_path.iterdir()) == []


def test_version(tmp_path: Path):
    from rlhf_cli import __version__

    assert ok(["--version"], tmp_path).out == f"rlhf {__version__}\n"


def test_the_module_is_the_command(tmp_path: Path):
    arguments = ["train-policy", "run_dir=x", "--cfg", "job"]
    shown = ok(arguments, tmp_path, program=MODULE).out
    assert shown == ok(arguments, tmp_path).out
    assert run(["train-policy", "algo=rlo"], tmp_path, program=MODULE).status == 2


def test_cfg_shows_the_config_of_the_job(tmp_path: Path):
    config = OmegaConf.create(ok(["train-policy", "algo.beta=0.5", "--cfg", "job"], tmp_path).out)
    assert config.algo.beta == 0.5 and "hydra" not in config
    assert OmegaConf.to_container(config, resolve=False)["algo"]["train"]["lr"] == "${model.lr.policy}"
    assert list(tmp_path.iterdir()) == []


def test_resolve_and_package(tmp_path: Path):
    said = ok(
        ["train-policy", "model.lr.policy=0.25", "--cfg", "job", "--resolve", "--package", "algo.train"], tmp_path
    )
    assert said.out.startswith("# @package algo.train\n") and "\nlr: 0.25\n" in said.out
    assert "beta:" not in said.out


def test_cfg_hydra_and_all(tmp_path: Path):
    hydra = ok(["eval", "--cfg", "hydra"], tmp_path).out
    both = ok(["eval", "-c", "all"], tmp_path).out
    assert hydra.startswith("hydra:") and "policies:" not in hydra
    assert "hydra:" in both and "policies:" in both


def test_info_defaults(tmp_path: Path):
    said = ok(["train-policy", "algo=reinforce", "experiment=smoke", "--info", "defaults"], tmp_path).out
    order = [line.split("|")[1].strip() for line in said.splitlines() if line.startswith("| ")]
    assert order.index("schema/algo/reinforce") < order.index("algo/reinforce") < order.index("experiment/smoke")


def test_hydra_help(tmp_path: Path):
    assert "--multirun" in ok(["train-policy", "--hydra-help"], tmp_path).out


def test_a_users_own_yaml(tmp_path: Path):
    own = tmp_path / "mine"
    (own / "algo").mkdir(parents=True)
    (own / "algo" / "gentle.yaml").write_text("defaults:\n  - rloo\n  - _self_\nbeta: 2.0\n")
    (own / "policy.yaml").write_text(
        "defaults:\n  - train_policy\n  - override algo: gentle\n  - _self_\nseed: 9\n"
    )
    shown = OmegaConf.create(
        ok(["train-policy", "--config-dir", "mine", "algo=gentle", "--cfg", "job"], tmp_path).out
    )
    assert (shown.algo.beta, shown.algo.k, shown.name) == (2.0, 4, "rloo")
    arguments = ["train-policy", "--config-dir", "mine", "--config-name", "policy", "--cfg", "job"]
    shown = OmegaConf.create(ok(arguments, tmp_path).out)
    assert (shown.algo.beta, shown.seed, shown.command) == (2.0, 9, "train-policy")
    wrong = run(["train-policy", "--config-dir", "mine", "algo=gentel"], tmp_path)
    known = ", ".join(sorted([*group_choices("algo"), "gentle"]))
    assert (wrong.status, wrong.err) == (
        2,
        f"rlhf: algo=gentel: not one of {known} (did you mean gentle?)\n",
    )


# ---- the wheel -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel in it; its dependencies are those of this environment, this checkout is not.

    A .pth file gives the path of the dependencies; .pth files behind it, such as an editable install's, are not read.
    Whoever opens a connection to another machine gets an error.
    """
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*install, str(wheel)], env=environment(), check=True, capture_output=True)
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (packages / "sitecustomize.py").write_text(
        "import socket\n"
        "def refuse(self, address):\n"
        "    raise OSError(f'no network: {address}')\n"
        "socket.socket.connect = socket.socket.connect_ex = refuse\n"
    )
    return folder


def test_the_wheel_has_the_configs_and_no_tests(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    configs = {f"rlhf_cli/conf/{file.relative_to(ROOT / 'conf')}" for file in (ROOT / "conf").rglob("*.yaml")}
    assert configs and configs == {name for name in names if name.endswith(".yaml")}
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "rlhf_cli").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}
    roots = {name.partition("/")[0] for name in names}
    assert roots == {"rlhf_cli", next(root for root in roots if root.endswith(".dist-info"))}
    assert not [name for name in names if "test" in name or name.endswith((".pyc", ".log", ".safetensors"))]


def test_the_wheel_works_from_anywhere(installed: Path, tmp_path: Path):
    python, program = installed / "bin" / "python", (str(installed / "bin" / "rlhf"),)
    where = "import rlhf_cli, transformers; print(rlhf_cli.__file__); print(transformers.__file__)"
    ours, theirs = ok(["-c", where], tmp_path, program=(str(python),)).out.splitlines()
    assert Path(ours).is_relative_to(installed) and not Path(theirs).is_relative_to(installed)
    assert "train-policy" in ok(["--help"], tmp_path, program=program).out
    assert (
        f"algo=            {'|'.join(group_choices('algo'))}"
        in ok(["train-policy", "--help"], tmp_path, program=program).out
    )
    conf = Path(ours).parent / "conf"
    assert str(conf) in ok(["info"], tmp_path, program=program, COLUMNS="400").out
    done = ok(["train-sft", "experiment=smoke", "run_dir=run"], tmp_path, program=program)
    assert "run/model" in done.out.splitlines()
    record = content(tmp_path / "run" / "run.json")
    assert record["status"] == "finished" and record["git_commit"] is None
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    connect = "import socket; socket.create_connection(('127.0.0.1', 9))"
    assert "no network" in run(["-c", connect], tmp_path, program=(str(python),)).err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
