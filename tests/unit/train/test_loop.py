import itertools
import json
import math
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlhf_cli.data.tokenise import encode_examples
from rlhf_cli.settings import Schedule, Select, TrainSettings
from rlhf_cli.train.loop import Evaluation, StepBatch, Task, TrainingDivergedError, fit, steps
from rlhf_cli.train.precision import Precision
from rlhf_cli.train.sft import SftTask
from rlhf_cli.types import Example, LossOutput

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU)
CLOCK = ("time", "throughput")


class Recording:
    """Keeps what a run records."""

    def __init__(self):
        self.rows, self.sample_rows, self.messages = [], {}, []

    def metrics(self, step, row):
        self.rows.append({"step": step, **row})

    def samples(self, step, rows):
        self.sample_rows[step] = list(rows)

    def message(self, text):
        self.messages.append(text)


class Toy(Task):
    """loss = sum(w * x) / n with w of two numbers: the gradient is the sum of the x, over n."""

    def __init__(self, micro_batches=((1.0, 1.0),), normaliser=1.0, scores=None, half=False):
        self.model = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.model.weight.copy_(torch.tensor([[1.0, 2.0]]))
        self.micro_batches = [torch.tensor(x) for x in micro_batches]
        self.normaliser = normaliser
        self.scores = scores or {}
        self.half = half
        self.evaluated, self.seen = [], []

    def batch(self, step):
        self.seen.append((step, self.weight()))
        return StepBatch(
            self.micro_batches,
            self.normaliser,
            num_samples=3,
            num_tokens=10,
            metrics={"from_batch": float(step)},
            samples=[{"step": step + 1}],
        )

    def loss(self, micro_batch, normaliser):
        weight = self.model.weight[0]
        if self.half:
            weight, micro_batch = weight.half(), micro_batch.half()
        loss = (weight * micro_batch).sum().float() / normaliser
        share = torch.tensor(1.0) / len(self.micro_batches)
        return LossOutput(loss, {"share": share}, {"largest": micro_batch.max()})

    def evaluate(self, step):
        self.evaluated.append(step)
        score = self.scores.get(step, float(step))
        return Evaluation({"score": score}, score)

    def save(self, folder):
        folder.mkdir()
        save_file({"w": self.model.weight.detach()}, folder / "w.safetensors")

    def weight(self):
        return self.model.weight[0].tolist()


def _settings(**changes):
    # eps = 1 makes Adam's first step lr * g / (|g| + 1): the size of a gradient shows
    defaults = {"lr": 0.1, "schedule": Schedule.constant, "warmup_ratio": 0.0, "eps": 1.0, "max_grad_norm": None}
    return TrainSettings(**{**defaults, **changes})


def _fit(task, folder, num_steps=1, precision=FP32, seed=0, **changes):
    recording = Recording()
    result = fit(task, _settings(**changes), num_steps, folder, recording, precision, seed)
    return result, recording


def _saved(folder):
    return load_file(folder / "w.safetensors")["w"][0].tolist()


def test_one_step_by_hand(tmp_path):
    task = Toy([(3.0, -4.0)], normaliser=2.0)
    _, recording = _fit(task, tmp_path)
    row = recording.rows[0]
    assert row["loss"] == pytest.approx((1 * 3 - 2 * 4) / 2)
    assert row["grad_norm"] == pytest.approx(2.5)
    assert task.weight() == pytest.approx([1 - 0.1 * 1.5 / 2.5, 2 + 0.1 * 2 / 3])


def test_steps_are_those_of_a_run(tmp_path):
    run, alone = Toy([(3.0, -4.0)]), Toy([(3.0, -4.0)])
    _, recording = _fit(run, tmp_path, num_steps=3)
    rows = list(steps(alone, _settings(), 3, tmp_path, Recording(), FP32, 0))
    assert alone.weight() == run.weight() and alone.evaluated == []
    for row, recorded in zip(rows, recording.rows, strict=True):
        assert row["loss"] == recorded["loss"] and row["grad_norm"] == recorded["grad_norm"]


def test_micro_batches_add_up_to_one_step(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole").mkdir()
    parts, whole = Toy([(1.0, 0.0), (2.0, -3.0), (0.0, -1.0)], 2.0), Toy([(3.0, -4.0)], 2.0)
    _, from_parts = _fit(parts, tmp_path / "parts", num_steps=3)
    _, from_whole = _fit(whole, tmp_path / "whole", num_steps=3)
    assert parts.weight() == pytest.approx(whole.weight(), abs=1e-6)
    for a, b in zip(from_parts.rows, from_whole.rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"])
    # sums add up, maxima do not
    assert from_parts.rows[0]["share"] == pytest.approx(1.0)
    assert from_parts.rows[0]["largest"] == 2.0


def test_gradients_do_not_leak_into_the_next_step(tmp_path):
    _, recording = _fit(Toy([(3.0, -4.0)]), tmp_path, num_steps=3)
    assert [row["grad_norm"] for row in recording.rows] == pytest.approx([5.0] * 3)


@pytest.mark.parametrize(("max_norm", "gradient"), [(1.0, (0.6, 0.8)), (4.0, (2.4, 3.2)), (6.0, (3.0, 4.0))])
def test_the_global_norm_is_clipped_and_reported_unclipped(tmp_path, max_norm, gradient):
    task = Toy([(3.0, 4.0)])
    _, recording = _fit(task, tmp_path, max_grad_norm=max_norm)
    assert recording.rows[0]["grad_norm"] == pytest.approx(5.0)
    expected = [w - 0.1 * g / (g + 1) for w, g in zip((1.0, 2.0), gradient, strict=True)]
    assert task.weight() == pytest.approx(expected, abs=1e-6)


def test_the_schedule_sets_the_rate_of_each_step(tmp_path):
    task = Toy()
    _, recording = _fit(task, tmp_path, num_steps=4, schedule=Schedule.linear, warmup_ratio=0.5)
    assert [row["lr"] for row in recording.rows] == pytest.approx([0.05, 0.1, 0.1, 0.05])
    before = [weight[0] for _, weight in task.seen] + [task.weight()[0]]
    # a constant gradient of 1: every Adam step is lr * 1 / (1 + 1)
    steps = [a - b for a, b in itertools.pairwise(before)]
    assert steps == pytest.approx([0.025, 0.05, 0.05, 0.025], abs=1e-6)


def test_counts_add_up_and_batch_metrics_are_kept(tmp_path):
    task = Toy()
    _, recording = _fit(task, tmp_path, num_steps=3)
    assert [step for step, _ in task.seen] == [0, 1, 2]
    assert [row["step"] for row in recording.rows] == [1, 2, 3]
    assert [row["samples"] for row in recording.rows] == [3, 6, 9]
    assert [row["tokens"] for row in recording.rows] == [10, 20, 30]
    assert [row["from_batch"] for row in recording.rows] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("eval_every", "evaluated"), [(None, [5]), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (9, [5])]
)
def test_it_evaluates_on_time_and_always_at_the_end(tmp_path, eval_every, evaluated):
    task = Toy()
    _, recording = _fit(task, tmp_path, num_steps=5, eval_every=eval_every)
    assert task.evaluated == evaluated
    assert [row["step"] for row in recording.rows if "eval/score" in row] == evaluated


@pytest.mark.parametrize(
    ("samples_every", "eval_every", "kept"),
    [(None, None, [1, 5]), (2, None, [1, 2, 4, 5]), (None, 3, [1, 3, 5]), (4, 3, [1, 4, 5])],
)
def test_samples_of_the_first_the_last_and_every_nth_step_are_kept(tmp_path, samples_every, eval_every, kept):
    _, recording = _fit(Toy(), tmp_path, num_steps=5, samples_every=samples_every, eval_every=eval_every)
    assert list(recording.sample_rows) == kept
    assert all(rows == [{"step": step}] for step, rows in recording.sample_rows.items())


def _weights_after(num_steps, folder):
    folder.mkdir()
    task = Toy()
    _fit(task, folder, num_steps=num_steps)
    return task.weight()


@pytest.mark.parametrize("select", list(Select))
def test_best_and_last_weights_are_both_kept(tmp_path, select):
    run = tmp_path / "run"
    run.mkdir()
    task = Toy(scores={1: 1.0, 2: 3.0, 3: 2.0})
    result, _ = _fit(task, run, num_steps=3, eval_every=1, select=select)
    best, last = (_weights_after(n, tmp_path / str(n)) for n in (2, 3))
    assert best != last
    chosen, other = (best, last) if select is Select.best else (last, best)
    beside = "model_last" if select is Select.best else "model_best"
    assert _saved(run / "model") == chosen
    assert _saved(run / beside) == other
    assert sorted(p.name for p in run.iterdir()) == sorted(["model", beside])
    assert (result.last_step, result.best_step, result.best_score, result.stopped_early) == (3, 2, 3.0, False)
    assert result.final.score == (3.0 if select is Select.best else 2.0)


@pytest.mark.parametrize("select", list(Select))
def test_where_the_last_is_the_best_there_is_one_folder(tmp_path, select):
    task = Toy()
    result, _ = _fit(task, tmp_path, num_steps=3, eval_every=1, select=select)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert _saved(tmp_path / "model") == task.weight()
    assert result.best_step == 3 and result.final.score == 3.0


def test_an_equal_score_is_not_better(tmp_path):
    result, _ = _fit(Toy(scores={1: 1.0, 2: 1.0}), tmp_path, num_steps=2, eval_every=1)
    assert result.best_step == 1


def test_it_stops_after_patience_evaluations_without_a_better_one(tmp_path):
    scores = {2: 1.0, 4: 0.5, 6: 2.0, 8: 1.9, 10: 2.0, 12: 9.0}
    task = Toy(scores=scores)
    result, recording = _fit(task, tmp_path, num_steps=20, eval_every=2, patience=2, select=Select.best)
    assert (result.last_step, result.best_step, result.stopped_early) == (10, 6, True)
    assert recording.rows[-1]["step"] == 10
    assert task.evaluated == [2, 4, 6, 8, 10]
    assert (
        len(recording.messages) == 1 and "step 10" in recording.messages[0] and "step 6" in recording.messages[0]
    )
    assert _saved(tmp_path / "model") == task.seen[6][1]  # what step 7 started from
    assert _saved(tmp_path / "model_last") == task.weight()


def test_patience_that_ends_with_the_run_is_no_early_stop(tmp_path):
    result, recording = _fit(Toy(scores={1: 2.0, 2: 1.0}), tmp_path, num_steps=2, eval_every=1, patience=1)
    assert not result.stopped_early and result.last_step == 2
    assert recording.messages == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_move(tmp_path, bad):
    task = Toy([(1.0, bad)])
    with pytest.raises(TrainingDivergedError, match="step 1: loss is"):
        _fit(task, tmp_path, num_steps=3)
    assert task.weight() == [1.0, 2.0]
    assert [path.name for path in tmp_path.iterdir()] == ["nonfinite-step-1.safetensors"]


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    task = Toy()

    def loss(micro_batch, normaliser):
        return LossOutput((task.model.weight[0] - torch.tensor([1.0, 0.0])).abs().sqrt().sum())  # sqrt'(0) = inf

    task.loss = loss
    with pytest.raises(TrainingDivergedError, match="step 1: grad_norm is"):
        _fit(task, tmp_path, max_grad_norm=1.0)
    assert task.weight() == [1.0, 2.0]


def test_an_evaluation_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(TrainingDivergedError, match="step 2: the evaluation's score is nan"):
        _fit(Toy(scores={2: math.nan}), tmp_path, num_steps=3, eval_every=1)


def test_fp16_skips_overflowing_steps_and_counts_them(tmp_path):
    # gradient 4 in fp16 (largest 65504): overflows at scales 65536, 32768 and 16384
    task = Toy([(4.0, 4.0)], half=True)
    _, recording = _fit(task, tmp_path, num_steps=5, precision=Precision("fp16", CPU))
    assert [row["fp16/skipped_steps"] for row in recording.rows] == [1, 2, 3, 3, 3]
    starts = [weight for _, weight in task.seen]
    assert starts[:4] == [[1.0, 2.0]] * 4
    # unscaled: Adam's first step is 0.1 * 4 / (4 + 1)
    assert starts[4] == pytest.approx([0.92, 1.92], abs=1e-6)
    assert recording.rows[3]["grad_norm"] == pytest.approx(32**0.5)


def test_fp16_overflow_without_end_stops_the_run(tmp_path):
    task = Toy([(math.inf, 1.0)], half=True)
    with pytest.raises(TrainingDivergedError, match="step 21: 21 steps in a row overflowed"):
        _fit(task, tmp_path, num_steps=50, precision=Precision("fp16", CPU))
    assert task.weight() == [1.0, 2.0]


def _timeless(recording):
    return [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in recording.rows]


def _sft_run(model, tokenizer, folder, seed):
    folder.mkdir()
    examples = [Example(f"t{i} t{i + 1}", f"t{i + 2} t{(3 * i) % 20 + 2}") for i in range(2, 12)]
    rows = encode_examples(tokenizer, examples, 8, 8)
    settings = TrainSettings(batch_size=4, micro_batch_size=2, lr=1e-2, eval_every=2)
    recording = Recording()
    fit(SftTask(model, tokenizer, rows, rows[:3], settings, FP32, 0), settings, 5, folder, recording, FP32, seed)
    rows = _timeless(recording)
    return json.dumps(rows), load_file(folder / "model" / "model.safetensors")


def test_two_identical_runs_are_equal_to_the_bit_dropout_included(tmp_path, make_gpt2, word_tokenizer):
    torch.manual_seed(123)
    first_rows, first = _sft_run(make_gpt2(), word_tokenizer, tmp_path / "a", seed=4)
    torch.rand(77)  # whatever else drew numbers before does not matter
    second_rows, second = _sft_run(make_gpt2(), word_tokenizer, tmp_path / "b", seed=4)
    other_rows, other = _sft_run(make_gpt2(), word_tokenizer, tmp_path / "c", seed=5)
    assert first_rows == second_rows
    assert all(torch.equal(first[name], second[name]) for name in first)
    # another seed is other dropout: it was on
    assert first_rows != other_rows
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_clock_that_is_set_back_and_forth_changes_nothing(tmp_path, monkeypatch):
    (tmp_path / "steady").mkdir()
    (tmp_path / "jumps").mkdir()
    steady, jumps = Toy(), Toy()
    _, expected = _fit(steady, tmp_path / "steady", num_steps=12, eval_every=3)
    day, true_time = 86400.0, time.time
    offsets = itertools.cycle([0.0, -day, 0.0, day, 0.0, day, -day])
    for name, scale in (("time", 1), ("time_ns", 10**9)):
        monkeypatch.setattr(time, name, lambda scale=scale: scale * (true_time() + next(offsets)))
    _, recording = _fit(jumps, tmp_path / "jumps", num_steps=12, eval_every=3)
    monkeypatch.undo()
    times = [row["time_s"] for row in recording.rows]
    assert times[0] > 0 and times == sorted(times) and times[-1] < 3600
    for row in recording.rows:
        clock = [value for key, value in row.items() if key.startswith(CLOCK)]
        assert len(clock) == 4 and all(math.isfinite(value) and value >= 0 for value in clock)
        assert row["time/train_s"] < 3600
    assert _timeless(recording) == _timeless(expected)
    assert jumps.weight() == steady.weight()
    assert _saved(tmp_path / "jumps" / "model") == _saved(tmp_path / "steady" / "model")
