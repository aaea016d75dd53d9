import importlib.util
import json
import logging
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rlhf_cli.errors import RequestError
from rlhf_cli.train import tracking
from rlhf_cli.train.tracking import NullTracker, TensorBoardTracker, Tracker, WandbTracker

_SAMPLES = [
    {"prompt": "<p>", "completion": "c", "reward": 0.5, "kl": 1.0, "length": 3, "step": 2},
    {
        "prompt": [{"role": "user", "content": "hi"}],
        "completion": "12",
        "reward": float("nan"),
        "kl": 2.0,
        "length": 4,
        "step": 2,
    },
]


# ---- Weights & Biases ------------------------------------------------------------------------------------


@pytest.fixture
def wandb_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """W&B with nothing configured and its own folders under tmp_path."""
    import wandb

    for name in ("API_KEY", "MODE", "PROJECT", "ENTITY", "RUN_ID", "RESUME", "BASE_URL", "DIR"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    for name in ("DATA_DIR", "CACHE_DIR", "CONFIG_DIR", "ARTIFACT_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()
    yield tmp_path
    wandb.teardown()


def _wandb(run_dir: Path, **changes: Any) -> WandbTracker:
    run_dir.mkdir(exist_ok=True)
    arguments = {
        "run_id": "abc123",
        "config": {"seed": 3, "algo": {"k": 4}},
        "mode": "offline",
        "project": "demo",
        "group": "study",
        "name": "rloo",
        "tags": ["smoke"],
    }
    return WandbTracker(run_dir, **{**arguments, **changes})


def _files(run_dir: Path) -> list[Path]:
    """Transaction logs, in the order they were made."""
    import wandb

    wandb.teardown()  # its service may still be writing when finish() returns
    found = sorted(run_dir.glob("wandb/*run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [path for path in found if not path.parent.is_symlink()]


def _records(path: Path) -> list[Any]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB) after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, buffer, records = 7, b"", []
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        buffer += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, or the last part of several
            record = Record()
            record.ParseFromString(buffer)
            records.append(record)
            buffer = b""
    return records


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _history(path: Path) -> list[dict[str, Any]]:
    return [_items(record.history.item) for record in _records(path) if record.HasField("history")]


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "W&B" in r.msg]


def test_wandb_offline_run_holds_metrics_config_summary_and_samples(
    wandb_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(sys, "argv", ["rlhf", "logger.api_key=HUSH"])
    run_dir = wandb_home / "run"
    tracker = _wandb(run_dir)
    for step in (1, 2, 3):
        tracker.log(step, {"reward/mean": 0.5 * step, "kl/k1": None, "entropy": float("nan")})
        if step == 2:
            tracker.samples(step, _SAMPLES)
            tracker.samples(step, [])
    tracker.summary({"gold/mean": 0.25, "gold/std": None})
    tracker.finish("finished")
    tracker.finish("failed")  # an error handler may not know that the run is over
    assert _warnings(caplog) == []

    (path,) = _files(run_dir)
    records = _records(path)
    rows = _history(path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["reward/mean"] for row in rows] == [0.5, 1.0, 1.5]
    assert not any("kl/k1" in row or "entropy" in row for row in rows)

    (run,) = [record.run for record in records if record.HasField("run")]
    assert (run.run_id, run.project, run.run_group, run.display_name, run.tags) == (
        "abc123", "demo", "study", "rloo", ["smoke"],
    )  # fmt: skip
    config = _items(run.config.update)
    assert config["seed"] == 3
    assert config["algo"] == {"k": 4}

    metrics = [record.metric for record in records if record.HasField("metric")]
    assert ("*", "step") in [(metric.glob_name, metric.step_metric) for metric in metrics]

    summary: dict[str, Any] = {}
    for record in records:
        summary |= _items(record.summary.update)
    assert summary["gold/mean"] == 0.25
    assert "gold/std" not in summary
    assert summary["reward/mean"] == 1.5

    (exit_record,) = [record.exit for record in records if record.HasField("exit")]
    assert exit_record.exit_code == 0

    table = json.loads((path.parent / "files" / rows[1]["samples/path"]).read_text())
    assert table["columns"] == ["prompt", "completion", "reward", "kl", "length", "step"]
    assert table["data"] == [["<p>", "c", 0.5, 1, 3, 2], ["user: hi", "12", None, 2, 4, 2]]

    sent = [path.read_bytes() for path in path.parent.rglob("*") if path.is_file()]
    assert not any(b"HUSH" in data for data in sent), "the command line stays here"
    assert not any(record.HasField("output_raw") or record.HasField("output") for record in records)


def test_wandb_resume_goes_on_in_the_same_run_on_the_same_axis(wandb_home: Path):
    run_dir = wandb_home / "run"
    for steps, status in (((1, 2, 3), "interrupted"), ((3, 4), "finished")):
        tracker = _wandb(run_dir)
        for step in steps:
            tracker.log(step, {"loss": 1.0 / step})
        tracker.finish(status)
    first, second = _files(run_dir)
    runs = [record.run for path in (first, second) for record in _records(path) if record.HasField("run")]
    assert [(run.run_id, run.resume) for run in runs] == [("abc123", True)] * 2
    for path, steps in ((first, [1, 2, 3]), (second, [3, 4])):
        assert [(row["step"], row["_step"]) for row in _history(path)] == [(step, step) for step in steps]
    codes = [r.exit.exit_code for path in (first, second) for r in _records(path) if r.HasField("exit")]
    assert codes == [130, 0]


def test_a_run_left_open_does_not_swallow_the_next(wandb_home: Path):
    for name in ("a", "b"):
        _wandb(wandb_home / name, run_id=name).log(1, {"loss": 1.0})
    for name in ("a", "b"):
        (path,) = _files(wandb_home / name)
        assert path.name == f"run-{name}.wandb"
        assert len(_history(path)) == 1


@pytest.mark.parametrize(("mode", "files"), [("offline", 1), ("disabled", 0)])
def test_without_a_mode_the_environment_decides(
    wandb_home: Path, monkeypatch: pytest.MonkeyPatch, mode: str, files: int
):
    monkeypatch.setenv("WANDB_MODE", mode)
    tracker = _wandb(wandb_home / "run", mode=None)
    tracker.log(1, {"loss": 1.0})
    tracker.finish("finished")
    assert len(_files(wandb_home / "run")) == files


@pytest.mark.parametrize("api_key", [None, "a" * 40])
def test_without_account_or_network_the_run_is_recorded_offline(
    wandb_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    api_key: str | None,
):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: refuses
    monkeypatch.setattr(tracking, "_INIT_TIMEOUT_S", 1.0)
    if api_key:
        monkeypatch.setenv("WANDB_API_KEY", api_key)
    tracker = _wandb(wandb_home / "run", mode="online")
    for step in (1, 2):
        tracker.log(step, {"loss": 1.0})
    tracker.finish("finished")
    (warning,) = _warnings(caplog)
    assert "recording offline" in warning
    assert ("refused" if api_key else "API key") in warning
    assert [row["step"] for row in _history(_files(wandb_home / "run")[-1])] == [1, 2]


def test_a_tracker_that_cannot_start_warns_once_and_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import wandb raises ImportError
    tracker = _wandb(tmp_path)
    tracker.log(1, {"loss": 1.0})
    tracker.samples(1, _SAMPLES)
    tracker.summary({"loss": 1.0})
    tracker.finish("finished")
    (warning,) = _warnings(caplog)
    assert "training goes on" in warning


def test_an_error_in_mid_run_warns_once_and_later_rows_are_tried(
    wandb_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    tracker = _wandb(wandb_home / "run")
    with monkeypatch.context() as patch:
        patch.setattr(tracker._run, "_partial_history_callback", _broken)
        tracker.log(1, {"loss": 1.0})
        tracker.log(2, {"loss": 1.0})
    tracker.log(3, {"loss": 1.0})
    tracker.finish("failed")
    (warning,) = _warnings(caplog)
    assert warning.endswith(": the service is gone")
    (path,) = _files(wandb_home / "run")
    assert _history(path)[-1]["step"] == 3


def _broken(*arguments: object, **named: object) -> None:
    raise ConnectionResetError("the service\nis gone")


def test_settings_that_an_older_wandb_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch):
    import wandb

    assert tracking._settings().finish_timeout == tracking._FINISH_TIMEOUT_S

    class Older:
        model_fields: ClassVar = {"console": None}

        def __init__(self, **values: object) -> None:
            self.values = values

    monkeypatch.setattr(wandb, "Settings", Older)
    assert tracking._settings().values == {"console": "off"}


# ---- TensorBoard -----------------------------------------------------------------------------------------


def _events(run_dir: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run_dir / "tensorboard")).Reload()


def _text(events: Any, tag: str) -> str:
    (event,) = events.Tensors(f"{tag}/text_summary")
    return event.tensor_proto.string_val[0].decode()


def test_tensorboard_files_hold_metrics_summary_config_and_samples(tmp_path: Path):
    tracker = TensorBoardTracker(tmp_path, config={"seed": 3, "path": tmp_path})
    for step in (1, 2, 3):
        tracker.log(step, {"step": step, "reward/mean": 0.5 * step, "kl/k1": None, "entropy": float("inf")})
    tracker.samples(3, _SAMPLES)
    tracker.summary({"gold/mean": 0.25})
    tracker.finish("finished")
    events = _events(tmp_path)
    assert sorted(events.Tags()["scalars"]) == ["final/gold/mean", "reward/mean"]
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [
        (1, 0.5), (2, 1.0), (3, 1.5),
    ]  # fmt: skip
    assert [(event.step, event.value) for event in events.Scalars("final/gold/mean")] == [(3, 0.25)]
    assert "&quot;seed&quot;: 3" in _text(events, "config")
    assert "prompt: user: hi\ncompletion: 12\nreward: None" in _text(events, "samples")


def test_text_of_a_model_shows_as_text_in_tensorboard(tmp_path: Path):
    from tensorboard.plugin_util import markdown_to_safe_html

    hostile = '</pre><img src="http://x/y.png">\n\n# big [link](http://x)'
    tracker = TensorBoardTracker(tmp_path, config={})
    tracker.samples(1, [{**_SAMPLES[0], "completion": hostile}])
    tracker.finish("finished")
    page = markdown_to_safe_html(_text(_events(tmp_path), "samples"))
    assert not any(tag in page for tag in ("<img", "<a ", "<h1"))
    assert "# big [link](http://x)" in page


def test_tensorboard_resume_replaces_what_came_after_the_checkpoint(tmp_path: Path):
    for steps, resumed_from, value in (((1, 2, 3, 4, 5), None, 1.0), ((4, 5, 6), 3, 2.0)):
        tracker = TensorBoardTracker(tmp_path, config={}, resumed_from=resumed_from)
        for step in steps:
            tracker.log(step, {"loss": value})
        tracker.finish("finished")
    points = [(event.step, event.value) for event in _events(tmp_path).Scalars("loss")]
    assert points == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]


def test_a_missing_tensorboard_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else real(name, *rest)
    )
    with pytest.raises(RequestError, match=r"^logger=tensorboard: .*pip install 'rlhf-cli\[tensorboard\]'$"):
        TensorBoardTracker(tmp_path, config={})
    assert list(tmp_path.iterdir()) == []


# ---- all of them -----------------------------------------------------------------------------------------


def test_the_null_tracker_accepts_a_whole_run():
    tracker: Tracker = NullTracker()
    tracker.log(1, {"loss": 1.0})
    tracker.samples(1, _SAMPLES)
    tracker.summary({"loss": 1.0})
    tracker.finish("failed")


def test_every_tracker_has_the_protocols_methods():
    wanted = {name for name in vars(Tracker) if not name.startswith("_")}
    assert wanted == {"log", "samples", "summary", "finish"}
    for tracker in (NullTracker, WandbTracker, TensorBoardTracker):
        assert wanted <= set(vars(tracker))
