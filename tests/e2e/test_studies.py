"""The studies of reward models on a few rows: do they run, and is what they write of the runs that they name?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tests.e2e.fixtures_e2e import LOADED, ROOT, content, run


def script(name: str, cwd: Path, *arguments: str, program: Sequence[str] = (sys.executable,)) -> str:
    """Runs a script to its good end; what it printed."""
    done = run([str(ROOT / "scripts" / name), *arguments], cwd, program=program)
    assert done.status == 0, done.out + done.err
    return done.out


def test_reward_models_are_compared_once_and_two_members_are_joined_by_a_line(smoke: list[str], tmp_path: Path):
    models = ["scalar", "ensemble", "warm"]
    line = [
        "--seeds",
        "3",
        "--rates",
        "0.25",
        "--models",
        *models,
        "--out",
        "study",
        "--",
        *smoke,
        "rm.probe_steps=2",
    ]
    first = script("compare_reward_models.py", tmp_path, *line)
    folder = tmp_path / "study" / "seed-3" / "swapped-0.25"
    measured = {name: content(folder / name / "measured.json") for name in models}
    # two ways to the same figures: by the command, and by the study
    for part in ("train_clean", "train_corrupted"):
        assert (
            measured["scalar"][f"accuracy/{part}"]
            == content(folder / "scalar" / "summary.json")[f"rm/{part}/accuracy"]
        )
    assert content(tmp_path / "study" / "table.json")["seeds"]["0.25"] == [measured]
    assert (tmp_path / "study" / "table.md").read_text() in first
    written = {name: (folder / name / "model").stat().st_mtime_ns for name in models}
    again = script("compare_reward_models.py", tmp_path, "--jobs", "1", *line, program=LOADED)
    assert (tmp_path / "study" / "table.md").read_text() in again
    assert written == {name: (folder / name / "model").stat().st_mtime_ns for name in models}

    ends = [folder / "ensemble" / "model" / f"member-{i}" for i in (0, 1)]
    script("linear_connectivity.py", tmp_path, *map(str, ends), "--points", "3", "--out", "line", program=LOADED)
    found = content(tmp_path / "line" / "connectivity.json")
    assert found["points"] == [0.0, 0.5, 1.0] and set(found["curves"]) == {"test", "ood"}
    for lines in found["curves"].values():
        for point in (0, 2):  # at an end all three are that member
            assert lines["weights"][point] == lines["predictions"][point] == lines["diagonal"][point]
    assert (tmp_path / "line" / "connectivity.png").stat().st_size > 10_000
