import json
import math
import random
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_cli.errors import RequestError
from rlhf_cli.train.run_folder import RunFolder, finite, plain_prompt, read_jsonl


@dataclass
class Turn:
    role: str
    content: str


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


def _start(folder: RunFolder, resumed_from: int | None = None, argv: tuple[str, ...] = ("seed=1",)):
    return folder.start(
        command="train-policy",
        name="rloo",
        argv=argv,
        seed=1,
        device="cpu",
        threads=2,
        upstream={"sft": {"path": "outputs/sft", "digest": "abc"}},
        resumed_from=resumed_from,
    )


def _sample(step: int = 1, **changes: object) -> dict[str, object]:
    sample = {"prompt": "p", "completion": "c", "reward": 0.5, "kl": 1.0, "length": 3, "step": step}
    return {**sample, **changes}


def test_create_makes_parents_and_accepts_what_hydra_left(tmp_path: Path):
    path = tmp_path / "a" / "b"
    (path / ".hydra").mkdir(parents=True)
    (path / "train_policy.log").touch()
    assert RunFolder.create(path).path == path
    assert RunFolder.create(tmp_path / "c" / "d").path.is_dir()
    RunFolder.create(str(path))  # nothing was run in it yet


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "model"])
def test_create_refuses_a_folder_that_holds_a_run(tmp_path: Path, name: str):
    if name == "model":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).touch()
    with pytest.raises(RequestError) as caught:
        RunFolder.create(tmp_path)
    assert str(caught.value) == f"run_dir={tmp_path}: already holds a run; choose another folder"


def test_create_refuses_a_file_in_one_line(tmp_path: Path):
    (tmp_path / "f").touch()
    for path in (tmp_path / "f", tmp_path / "f" / "below"):
        with pytest.raises(RequestError, match=r"^run_dir=.*: cannot be created \(.*\)$"):
            RunFolder.create(path)


def test_open_needs_a_run(tmp_path: Path):
    with pytest.raises(RequestError, match="holds no run"):
        RunFolder.open(tmp_path)
    _start(RunFolder(tmp_path))
    assert RunFolder.open(tmp_path).record().seed == 1


def test_metrics_have_a_stable_order_and_only_numbers_or_null(folder: RunFolder):
    folder.append_metrics(
        {
            "reward/mean": np.float64(0.1),
            "kl/k1": torch.tensor(2.5),
            "length/mean": np.int64(4),
            "time_s": 1.5,
            "entropy": math.nan,
            "ratio": torch.tensor(math.inf),
            "advantage": None,
            "step": torch.tensor(3),
        }
    )
    assert folder.metrics_path.read_text() == (
        '{"step": 3, "time_s": 1.5, "advantage": null, "entropy": null, "kl/k1": 2.5, "length/mean": 4, '
        '"ratio": null, "reward/mean": 0.1}\n'
    )


def test_every_row_is_on_disk_when_the_call_returns(folder: RunFolder):
    for step in range(1, 4):
        folder.append_metrics({"step": step})
        assert [row["step"] for row in folder.metrics().rows] == list(range(1, step + 1))


def test_floats_come_back_exactly(folder: RunFolder):
    rng = random.Random(0)
    values = {f"m{i}": rng.uniform(-1, 1) * 10.0 ** rng.randint(-300, 300) for i in range(500)}
    values |= {"tiny": 5e-324, "third": 1 / 3, "single": np.float32(0.1), "negative_zero": -0.0}
    folder.append_metrics({"step": 1, **values})
    (row,) = folder.metrics().rows
    assert {key: row[key] for key in values} == {key: float(value) for key, value in values.items()}
    assert math.copysign(1.0, row["negative_zero"]) == -1.0


@pytest.mark.parametrize("value", ["1.5", b"1", [1.0], object(), torch.ones(2)])
def test_what_is_no_number_is_refused(value: object):
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        finite(value)


def test_whole_numbers_stay_whole():
    for value in (2**60 + 1, np.int64(2**60 + 1), torch.tensor(2**60 + 1)):
        assert finite(value) == 2**60 + 1
        assert isinstance(finite(value), int)


def test_samples_are_utf8_one_object_a_line(folder: RunFolder):
    folder.append_samples(
        [
            _sample(prompt="Füm\u2028\n", completion="好 <b>"),
            _sample(prompt=({"role": "user", "content": "hi"},), gold=np.float32(0.5), reward=math.nan),
            _sample(prompt=[Turn("user", "hi")], completion="\ud800"),
        ]
    )
    raw = folder.samples_path.read_bytes()
    assert "Füm\u2028\\n".encode() in raw
    assert "好 <b>".encode() in raw
    first, second, third = read_jsonl(folder.samples_path).rows
    assert list(first) == ["prompt", "completion", "reward", "kl", "length", "step"]
    assert first["prompt"] == "Füm\u2028\n"
    assert list(second)[-1] == "gold"
    assert second["gold"] == 0.5
    assert second["reward"] is None
    assert second["prompt"] == third["prompt"] == [{"role": "user", "content": "hi"}]
    assert third["completion"] == "?"


def test_samples_need_their_keys(folder: RunFolder):
    with pytest.raises(KeyError):
        folder.append_samples([{"prompt": "p"}])
    with pytest.raises(AssertionError, match="extra"):
        folder.append_samples([_sample(extra=1)])
    assert not folder.samples_path.exists()


def test_plain_prompt_keeps_only_role_and_content():
    assert plain_prompt("x") == "x"
    turns = [{"role": "user", "content": "a", "id": 3}, Turn("assistant", "b")]
    assert plain_prompt(turns) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]


def test_summary_is_flat_sorted_and_finite(folder: RunFolder):
    folder.write_summary({"reward/mean": torch.tensor(0.5), "gold/mean": math.nan, "steps": 3})
    text = folder.summary_path.read_text()
    assert text == '{\n  "gold/mean": null,\n  "reward/mean": 0.5,\n  "steps": 3\n}\n'
    with pytest.raises(TypeError):
        folder.write_summary({"nested": {"a": 1}})
    assert folder.summary_path.read_text() == text


def test_a_torn_last_line_is_dropped_and_reported(folder: RunFolder):
    assert folder.metrics() == ([], False)
    folder.append_metrics({"step": 1})
    assert folder.metrics() == ([{"step": 1}], False)
    with folder.metrics_path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert folder.metrics() == ([{"step": 1}], True)


@pytest.mark.parametrize("bad", ["{", "", "[1]", '{"a": 1}{"b": 2}'])
def test_any_other_damage_raises_with_the_line(tmp_path: Path, bad: str):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:2: "):
        read_jsonl(path)


def test_rewind_keeps_the_rows_up_to_a_step_byte_for_byte(folder: RunFolder):
    folder.rewind(0)  # nothing there yet
    for step in range(1, 6):
        folder.append_metrics({"step": step, "x": 1 / step})
        folder.append_samples([_sample(step), _sample(step)])
    before = folder.metrics_path.read_bytes()
    with folder.metrics_path.open("ab") as file:
        file.write(b'{"step": 6')
    folder.rewind(3)
    assert folder.metrics_path.read_bytes() == b"".join(before.splitlines(keepends=True)[:3])
    assert [row["step"] for row in read_jsonl(folder.samples_path).rows] == [1, 1, 2, 2, 3, 3]
    for step in (4, 5):
        folder.append_metrics({"step": step, "x": 1 / step})
    assert folder.metrics_path.read_bytes() == before


def test_rewind_only_drops_a_torn_line_where_no_step_is_later(folder: RunFolder):
    folder.append_metrics({"step": 1})
    with folder.metrics_path.open("ab") as file:
        file.write(b'{"step": 2}')  # complete but for its newline: the next row would be glued to it
    folder.rewind(2)
    assert folder.metrics() == ([{"step": 1}], False)


def test_record_of_a_run_that_finishes(folder: RunFolder):
    started = _start(folder, argv=("algo=rloo", "logger.api_key=HUSH"))
    raw = json.loads(folder.record_path.read_text())
    assert raw["status"] == "running"
    assert raw["end"] is None
    assert raw["argv"] == ["algo=rloo", "logger.api_key=***"]
    assert raw["command"] == "train-policy"
    assert raw["device"] == "cpu"
    assert raw["threads"] == 2
    assert raw["upstream"] == {"sft": {"path": "outputs/sft", "digest": "abc"}}
    assert raw["versions"]["numpy"] == np.__version__
    assert raw["resumed_from"] == []
    record = folder.finish("finished")
    assert record == folder.record()
    assert record.status == "finished"
    assert record.error is None
    begin, end = datetime.fromisoformat(record.start), datetime.fromisoformat(record.end or "")
    assert begin.utcoffset() == timedelta(0)
    assert timedelta(0) <= end - begin < timedelta(minutes=1)
    assert record.id == started.id


def test_a_failure_is_recorded_on_one_line(folder: RunFolder):
    _start(folder)
    record = folder.finish("failed", error="RuntimeError: loss is nan\n  at step 3\n")
    assert (record.status, record.error) == ("failed", "RuntimeError: loss is nan at step 3")
    assert json.loads(folder.record_path.read_text())["error"] == record.error


def test_a_resume_keeps_the_id_and_the_first_start(folder: RunFolder):
    first = _start(folder)
    folder.finish("interrupted", error="SIGINT")
    _start(folder, resumed_from=40)
    again = _start(folder, resumed_from=60, argv=("seed=1", "resume=auto"))
    assert (again.id, again.start, again.resumed_from) == (first.id, first.start, [40, 60])
    assert (again.status, again.end, again.error) == ("running", None, None)
    assert again.argv == ["seed=1", "resume=auto"]
    assert _start(folder).id != first.id


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": "running"}'])
def test_a_damaged_record_is_named(folder: RunFolder, text: str):
    folder.record_path.write_text(text)
    with pytest.raises(RequestError, match=r"run\.json"):
        folder.record()


def test_an_unknown_key_of_a_later_version_is_ignored(folder: RunFolder):
    record = _start(folder)
    raw = json.loads(folder.record_path.read_text())
    folder.record_path.write_text(json.dumps({**raw, "later": 1}))
    assert folder.record() == record


def test_paths(folder: RunFolder):
    paths = [folder.model, folder.checkpoints, folder.plots, folder.report, folder.summary_path]
    names = ["model", "checkpoints", "plots", "report.html", "summary.json"]
    assert paths == [folder.path / name for name in names]
    assert not any(path.exists() for path in paths)


def test_reading_runs_needs_no_torch():
    code = "import sys; import rlhf_cli.train.run_folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
