from __future__ import annotations

import json
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_cli.evaluation.overoptimisation import fit_best_of_n, fit_rl


@pytest.fixture
def study() -> Any:
    return import_module("overoptimisation")


def test_both_rewards_of_best_of_n_begin_at_zero_in_units_of_the_samples(study: Any) -> None:
    """The proxy is the gold on another scale, so that both curves are one."""
    gold = np.random.default_rng(0).normal(2.0, 3.0, (5, 64))
    curve = study.best_of_n_curve([{"scalar": 10 * gold - 7, "gold": gold}] * 2, "scalar")
    assert curve.d.shape == curve.proxy.shape == curve.gold.shape == (2, 6)  # n = 1, 2, ..., 32
    np.testing.assert_allclose([curve.d[:, 0], curve.proxy[:, 0], curve.gold[:, 0]], 0, atol=1e-12)
    np.testing.assert_allclose(curve.proxy, curve.gold, atol=1e-12)
    # the mean of the larger of two standard normal draws
    assert curve.gold[0, 1] == pytest.approx(1 / math.sqrt(math.pi), abs=0.08)


def test_a_proxy_that_is_wrong_at_the_top_gains_while_gold_is_lost(study: Any) -> None:
    proxy = np.tile(np.linspace(-1, 1, 64), (3, 1))
    curve = study.best_of_n_curve([{"scalar": proxy, "gold": -np.abs(proxy)}], "scalar")
    assert (np.diff(curve.proxy[0]) > 0).all()
    assert curve.gold[0, -1] < curve.gold[0].max() - 0.5


def test_rl_points_are_on_the_scale_of_the_samples(study: Any) -> None:
    samples = {"scalar": np.array([[1.0, 3.0]]), "gold": np.array([[0.0, 20.0]])}
    row = {"eval/kl/full": 4.0, "eval/reward/mean": 5.0, "eval/gold/mean": 0.0}
    below = {"eval/kl/full": -1e-3, "eval/reward/mean": 2.0, "eval/gold/mean": 10.0}
    curve = study.rl_curve([[below, row]], [samples], "scalar")
    np.testing.assert_allclose(curve.d, [[0, 0, 2]])
    np.testing.assert_allclose(curve.proxy, [[0, 0, 3]])
    np.testing.assert_allclose(curve.gold, [[0, 0, -1]])


def test_the_rows_that_count_are_the_evaluations(study: Any, tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 0.5}, {"step": 10, "eval/kl/full": 1.0}, {"step": 11}]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["step"] for row in study.evaluations(file)] == [10]


@pytest.mark.parametrize(
    ("way", "fit", "of"),
    [
        ("best-of-n", fit_best_of_n, lambda d: d * (2 - 0.5 * d)),
        ("RL", fit_rl, lambda d: d * (2 - 0.9 * np.log(d))),
    ],
)
def test_the_fitted_maximum_is_where_the_curve_is_highest(study: Any, way: str, fit: Any, of: Any) -> None:
    d = np.linspace(0.01, 8, 8000)
    found = study.peak(way, fit(d[::500], of(d[::500])))
    assert found.d == pytest.approx(d[of(d).argmax()], abs=2e-3)
    assert found.reward == pytest.approx(of(d).max(), abs=1e-6)


def test_a_curve_that_only_rises_has_no_maximum(study: Any) -> None:
    d = np.array([0.5, 1.0, 2.0])
    assert study.peak("best-of-n", fit_best_of_n(d, d * (1 + 0.1 * d))) is None
    assert study.peak("RL", fit_rl(d, d * (1 + 0.1 * np.log(d)))) is None
    # it falls from the start on
    assert study.peak("best-of-n", fit_best_of_n(d, -d * (1 + 0.1 * d))) is None


@pytest.mark.parametrize("seeds", [1, 3])
def test_table_numbers_and_picture_have_every_curve(study: Any, tmp_path: Path, seeds: int) -> None:
    rng = np.random.default_rng(0)
    scored = [{name: rng.normal(size=(4, 16)) for name in study.REWARDS} for _ in range(seeds)]
    rows = [
        [{"eval/kl/full": kl, "eval/reward/mean": 1 + kl, "eval/gold/mean": 1 - kl} for kl in (0.5, 2.0, 9.0)]
    ] * seeds
    curves = {
        "best-of-n": {name: study.best_of_n_curve(scored, name) for name in study.REWARDS},
        "RL": {name: study.rl_curve(rows, scored, name) for name in study.REWARDS},
    }
    fits = {way: {name: study.fitted(way, curve) for name, curve in of.items()} for way, of in curves.items()}
    lines = study.as_markdown(curves, fits).splitlines()
    assert len(lines) == 2 + 2 * len(study.REWARDS) and len({line.count("|") for line in lines}) == 1
    assert lines[2].count("±") == (3 if seeds > 1 else 0)
    found = json.loads(json.dumps(study.numbers(curves, fits, range(seeds)), allow_nan=False))
    assert np.shape(found["RL/warm"]["gold"]) == (seeds, 4)
    study.draw(tmp_path / "picture.png", curves, fits)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
