import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from rlhf_cli.train.provenance import git_state, mask_secrets, versions


@pytest.mark.parametrize(
    "argument",
    [
        "logger.api_key=HUSH",
        "+logger.api_key=HUSH",
        "++logger.apiKey='HUSH'",
        "--api-key=HUSH",
        "cloud.accessKey=HUSH",
        "hub.access_token=HUSH",
        "WANDB_API_KEY=HUSH",
        "key=HUSH",
        "db.password=a=HUSH",
        "my.client-secret=HUSH",
        "logger={project: demo, api_key: HUSH, name: x}",
        "logger={project:demo,'token':HUSH}",
        "url=https://host/?token=HUSH",
    ],
)
def test_secrets_are_masked(argument: str):
    (masked,) = mask_secrets([argument])
    assert "HUSH" not in masked
    assert "***" in masked
    assert masked.split("=")[0] == argument.split("=")[0]


def test_the_value_after_a_flag_is_masked():
    argv = ["train-policy", "--api-key", "HUSH", "seed=1", "--token", "-HUSH", "--multirun", "x=2"]
    assert mask_secrets(argv) == [
        "train-policy", "--api-key", "***", "seed=1", "--token", "***", "--multirun", "x=2",
    ]  # fmt: skip
    assert mask_secrets(["--api-key", "--token", "x"]) == ["--api-key", "***", "x"]


@pytest.mark.parametrize(
    "argument",
    [
        "seed=0,1,2",
        "data.max_prompt_tokens=448",
        "tokenizer=gpt2",
        "keyboard=3",
        "monkey=3",
        "eval.key_metric=gold/mean",
        "optim={lr: 1e-5, betas: [0.9, 0.95]}",
        "--resolve",
        "-m",
        "",
        "experiment=smoke",
        "data.filter='a==b'",
    ],
)
def test_everything_else_stays_as_typed(argument: str):
    assert mask_secrets([argument]) == [argument]


def test_inner_pairs_keep_their_neighbours():
    argument = "logger={project: demo, api_key: HUSH, name: x}"
    assert mask_secrets([argument]) == ["logger={project: demo, api_key: ***, name: x}"]


def test_versions_come_from_the_installed_packages(monkeypatch: pytest.MonkeyPatch):
    found = versions()
    assert set(found) == {
        "python", "rlhf_cli", "torch", "transformers", "datasets", "peft", "hydra", "numpy",
    }  # fmt: skip
    assert found["numpy"] == metadata.version("numpy")
    assert found["hydra"] == metadata.version("hydra-core")

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert versions()["torch"] is None


def _git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_git_state_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) == (None, None)
    _git(tmp_path, "init", "-q")
    assert git_state(tmp_path) == (None, None)  # no commit yet
    (tmp_path / "f").write_text("1")
    _git(tmp_path, "add", "f")
    _git(tmp_path, "commit", "-qm", "first")
    commit = _git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == (commit, False)
    (tmp_path / "untracked").touch()
    assert git_state(tmp_path) == (commit, False)
    (tmp_path / "f").write_text("2")
    assert git_state(tmp_path) == (commit, True)


def test_no_git_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) == (None, None)
