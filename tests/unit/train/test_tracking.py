import importlib.util
import itertools
import json
import logging
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rlhf_cli.errors import RequestError
from rlhf_cli.train import tracking
from rlhf_cli.train.run_folder import RunFolder
from rlhf_cli.train.tracking import NullTracker, TensorBoardTracker, Tracker, WandbTracker
from tests.wandb_files import history, log_files, page, records, without_account

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
    """W&B without an account, on a machine of its own."""
    import wandb

    without_account(monkeypatch, tmp_path / "home")
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


def _sample(tracker: Tracker, run_dir: Path, step: int) -> None:
    """Two samples, written and sent as a run does it."""
    rows = [{**row, "step": step} for row in _SAMPLES]
    RunFolder(run_dir).append_samples(rows)
    tracker.samples(step, rows)


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "W&B" in r.msg]


def test_wandb_offline_run_holds_metrics_config_summary_and_samples(
    wandb_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(sys, "argv", ["rlhf", "logger.api_key=HUSH"])
    run_dir = wandb_home / "run"
    tracker = _wandb(run_dir)
    for step in (1, 2, 3):
        if step == 2:
            _sample(tracker, run_dir, step)
            tracker.samples(step, [])
        tracker.log(step, {"reward/mean": 0.5 * step, "samples": 8 * step, "kl/k1": None, "entropy": float("nan")})
    tracker.summary({"gold/mean": 0.25, "gold/std": None, "reward/mean": 0.75})
    tracker.finish("finished")
    tracker.finish("failed")  # an error handler may not know that the run is over
    assert _warnings(caplog) == []

    (path,) = log_files(run_dir)
    shown = page([path])
    assert [row["step"] for row in shown.rows] == [1, 2, 3]
    assert [row["reward/mean"] for row in shown.rows] == [0.5, 1.0, 1.5]
    assert [row["samples"] for row in shown.rows] == [8, 16, 24]
    assert not any("kl/k1" in row or "entropy" in row for row in shown.rows)

    (run,) = shown.runs
    assert (run.run_id, run.project, run.run_group, run.display_name, run.tags) == (
        "abc123", "demo", "study", "rloo", ["smoke"],
    )  # fmt: skip
    assert shown.config["seed"] == 3
    assert shown.config["algo"] == {"k": 4}
    assert shown.step_metrics["*"] == "step"

    assert shown.summary["gold/mean"] == 0.25
    assert "gold/std" not in shown.summary
    assert shown.summary["reward/mean"] == 0.75, "the final figure, not the last step's"
    assert shown.exit_codes == [0]

    table = json.loads((path.parent / "files" / shown.rows[1]["samples_table"]["path"]).read_text())
    assert table["columns"] == ["prompt", "completion", "reward", "kl", "length", "step"]
    assert table["data"] == [["<p>", "c", 0.5, 1, 3, 2], ["user: hi", "12", None, 2, 4, 2]]

    sent = [path.read_bytes() for path in path.parent.rglob("*") if path.is_file()]
    assert not any(b"HUSH" in data for data in sent), "the command line stays here"
    assert not any(record.HasField("output_raw") or record.HasField("output") for record in records(path))


def test_wandb_resume_goes_on_in_the_same_run_on_the_same_axis(wandb_home: Path, caplog: pytest.LogCaptureFixture):
    run_dir = wandb_home / "run"
    run_dir.mkdir()
    (run_dir / "samples.jsonl").touch()  # as a resume before the first samples leaves it
    for steps, status in (((1, 2, 3), "interrupted"), ((3, 4), "finished")):
        tracker = _wandb(run_dir)
        for step in steps:
            tracker.log(step, {"loss": 1.0 / step})
        tracker.finish(status)
    assert _warnings(caplog) == []
    first, second = log_files(run_dir)
    runs = [record.run for path in (first, second) for record in records(path) if record.HasField("run")]
    assert [(run.run_id, run.resume) for run in runs] == [("abc123", True)] * 2
    for path, steps in ((first, [1, 2, 3]), (second, [3, 4])):
        assert [(row["step"], row["_step"]) for row in history(path)] == [(step, step) for step in steps]
    codes = [r.exit.exit_code for path in (first, second) for r in records(path) if r.HasField("exit")]
    assert codes == [130, 0]


def test_wandb_table_has_the_samples_from_before_a_kill_and_those_made_again_once(wandb_home: Path):
    run_dir = wandb_home / "run"
    tracker = _wandb(run_dir)
    for step in (1, 2, 3):
        _sample(tracker, run_dir, step)
        tracker.log(step, {"loss": 1.0})
    first = log_files(run_dir)  # cut off here: no finish()
    RunFolder(run_dir).rewind(2)
    tracker = _wandb(run_dir)
    _sample(tracker, run_dir, 3)
    tracker.log(3, {"loss": 1.0})
    tracker.finish("interrupted")
    shown = page([*first, *log_files(run_dir)[1:]])
    assert [row["step"] for row in shown.table("samples_table")] == [1, 1, 2, 2, 3, 3]


def test_wandb_uploads_of_a_long_run_stay_a_few_times_its_samples(
    wandb_home: Path, monkeypatch: pytest.MonkeyPatch
):
    run_dir, sent = wandb_home / "run", list[int]()
    tracker = _wandb(run_dir)

    def log(row: dict[str, Any], **_: object) -> None:
        if "samples_table" in row:
            sent.append(len(row["samples_table"].data))

    monkeypatch.setattr(tracker._run, "log", log)
    for step in range(1, 201):
        _sample(tracker, run_dir, step)
        tracker.log(step, {"loss": 1.0})
    assert sent[0] == 2
    assert all(later <= 1.25 * earlier + 2 for earlier, later in itertools.pairwise(sent))
    assert len(sent) < 25
    assert sum(sent) < 5 * 400


@pytest.mark.parametrize(
    ("limit", "steps"), [(20, [*range(10)]), (19, [0, 2, 4, 6, 8, 9]), (8, [0, 4, 8, 9]), (3, [9, 9])]
)
def test_a_long_table_is_thinned_over_the_whole_run(limit: int, steps: list[int]):
    rows = [{"step": step, "place": place} for step in range(10) for place in (0, 1)]
    kept = tracking._thinned(rows, limit)
    assert len(kept) <= limit
    if limit > 3:
        assert kept == [row for row in rows if row["step"] in steps]


def test_a_run_left_open_does_not_swallow_the_next(wandb_home: Path):
    for name in ("a", "b"):
        _wandb(wandb_home / name, run_id=name).log(1, {"loss": 1.0})
    for name in ("a", "b"):
        (path,) = log_files(wandb_home / name)
        assert path.name == f"run-{name}.wandb"
        assert len(history(path)) == 1


@pytest.mark.parametrize(("mode", "files"), [("offline", 1), ("disabled", 0)])
def test_without_a_mode_the_environment_decides(
    wandb_home: Path, monkeypatch: pytest.MonkeyPatch, mode: str, files: int
):
    monkeypatch.setenv("WANDB_MODE", mode)
    tracker = _wandb(wandb_home / "run", mode=None)
    tracker.log(1, {"loss": 1.0})
    tracker.finish("finished")
    assert len(log_files(wandb_home / "run")) == files


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
    assert [row["step"] for row in history(log_files(wandb_home / "run")[-1])] == [1, 2]


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
    (path,) = log_files(wandb_home / "run")
    assert history(path)[-1]["step"] == 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_service_that_is_gone_or_hangs_holds_nothing_up(
    wandb_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: signal.Signals
):
    import wandb

    monkeypatch.setattr(tracking, "_CALL_TIMEOUT_S", 1.0)
    monkeypatch.setattr(tracking, "_TEARDOWN_TIMEOUT_S", 0.5)
    tracker = _wandb(wandb_home / "run")
    process = wandb.setup()._connection._proc._process
    process.send_signal(number)
    started = time.perf_counter()
    for step in (1, 2, 3):  # more than the socket takes
        tracker.log(step, {f"metric/{i}": 1.0 for i in range(20_000)})
    tracker.summary({"loss": 1.0})
    tracker.finish("finished")
    assert time.perf_counter() - started < 10
    assert len(_warnings(caplog)) == 1
    assert process.wait(timeout=10) == -signal.SIGKILL
    later = _wandb(wandb_home / "later")
    later.log(1, {"loss": 1.0})
    later.finish("finished")
    (path,) = log_files(wandb_home / "later")
    assert len(history(path)) == 1
    assert len(_warnings(caplog)) == 1


def _broken(*arguments: object, **named: object) -> None:
    raise ConnectionResetError("the service\nis gone")


def test_settings_that_an_older_wandb_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch):
    import wandb

    assert tracking._settings().finish_timeout == tracking._FINISH_TIMEOUT_S
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_FINISH_TIMEOUT", "7")
        assert "finish_timeout" not in tracking._settings().model_fields_set

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


def test_the_terms_of_a_samples_reward_show_as_text(tmp_path: Path):
    tracker = TensorBoardTracker(tmp_path, config={})
    tracker.samples(1, [{**_SAMPLES[0], "terms": {"rm": 0.123456, "length": -1.0, "coherence": float("nan")}}])
    tracker.finish("finished")
    assert "terms: rm 0.1235, length -1, coherence null" in _text(_events(tmp_path), "samples")


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
