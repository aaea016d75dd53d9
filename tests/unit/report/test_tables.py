"""Tables as the reader sees them: text at a width, and CSV read back."""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from rlhf_cli.report.tables import (
    PolicyRow,
    WideTable,
    figure_table,
    format_estimate,
    policy_table,
    sweep_table,
    write_csv,
)


@dataclass(frozen=True)
class Figure:
    value: float
    lo: float
    hi: float
    n: int = 100


NO_INTERVAL = (math.nan, math.nan)


def rendered(table: WideTable, width: int) -> list[str]:
    """The lines that a file or pipe of this width receives."""
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=False).print(table)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def policies(num_metrics: int = 6) -> list[PolicyRow]:
    metrics = [f"metric{i}/mean" for i in range(num_metrics)]
    return [
        PolicyRow("sft", {m: Figure(-0.5 + i, -0.7 + i, -0.3 + i) for i, m in enumerate(metrics)}),
        PolicyRow(
            "rloo",
            {m: Figure(10.25 + i, 10.0 + i, 10.5 + i) for i, m in enumerate(metrics)},
            {m: Figure(10.75, 10.5, 11.0) for m in metrics},
        ),
        PolicyRow(
            "warp-mu0.01-eta0.3-M2-I5-T9000-on-the-warm-reward-model",
            {m: Figure(0.0, -0.2, 0.2) for m in metrics},
            {m: Figure(0.5, -0.1, 1.1) for m in metrics},
        ),
    ]


# Numbers


def test_estimates_as_text() -> None:
    assert format_estimate(Figure(1.2345, 1.1, 1.375)) == "1.23 [1.10, 1.38]"
    assert format_estimate(Figure(1.2345, 1.1, 1.4), digits=3) == "1.234 [1.100, 1.400]"
    assert format_estimate(Figure(0.4, -0.1, 0.9), digits=1, sign=True) == "+0.4 [-0.1, 0.9]"
    assert format_estimate(Figure(0.4, *NO_INTERVAL)) == "0.40"
    assert format_estimate(Figure(math.nan, *NO_INTERVAL)) == "n/a"
    assert format_estimate(Figure(-0.001, -0.004, 0.004)) == "0.00 [0.00, 0.00]"  # no minus zero
    assert format_estimate(Figure(-0.001, *NO_INTERVAL), sign=True) == "+0.00"


# Policies


@pytest.mark.parametrize("width", [60, 80, 120, 300])
def test_policy_table_fits_and_loses_nothing(width: int) -> None:
    lines = rendered(policy_table(policies()), width)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    assert "…" not in text
    for i in range(6):
        assert text.count(f"metric{i}/mean") == 1
        assert re.search(rf"{10.25 + i:.2f} \[ *{10.0 + i:.2f}, +{10.5 + i:.2f}\]", text)
    assert len(re.findall(r"\+10\.75 \[10\.50, 11\.00\] \*", text)) == 6
    # The long name is folded, not cut: its pieces stand below each other at the left of the table.
    firsts = [line[1 : line.index("  ", 2)] if "  " in line[2:] else line[1:] for line in lines]
    name = policies()[2].name
    assert any("".join(firsts[i : i + 4]).startswith(name) for i in range(len(firsts)))


def test_wide_screens_hold_more_metrics_in_one_table() -> None:
    def num_tables(width: int) -> int:
        return sum("policy" in line for line in rendered(policy_table(policies()), width))

    assert [num_tables(width) for width in (60, 80, 120, 300)] == [6, 3, 2, 1]


def test_star_marks_differences_that_are_resolved() -> None:
    deltas = {
        "above": Figure(0.3, 0.1, 0.5),
        "below": Figure(-0.3, -0.5, -0.1),
        "across": Figure(0.3, -0.1, 0.7),
        "alone": Figure(0.3, *NO_INTERVAL),
    }
    for name, delta in deltas.items():
        rows = [PolicyRow(name, {"m": Figure(1, 0.9, 1.1)}, {"m": delta})]
        lines = rendered(policy_table(rows), 80)
        assert any(line.endswith("*") for line in lines[:-1]) == (name in ("above", "below")), name


def test_numbers_stand_below_each_other() -> None:
    lines = rendered(policy_table(policies(1)), 120)
    numbers = [line for line in lines if "]" in line and "95%" not in line]
    assert len(numbers) == 5  # the reference has no difference
    assert len({line.index("]") for line in numbers}) == 1
    assert len({line.index("[") for line in numbers}) == 1
    assert len({line.index(".", line.index("[")) for line in numbers}) == 1
    assert len({line.rindex(".", 0, line.index("[")) for line in numbers}) == 1


def test_caption_says_what_the_lines_are() -> None:
    with_deltas = " ".join(rendered(policy_table(policies(1)), 120)[-2:])
    assert "95% interval over 100 prompts" in with_deltas
    assert "second line: difference to the reference" in with_deltas
    alone = rendered(policy_table(policies(1)[:1]), 120)[-1]
    assert alone == "[lo, hi]: 95% interval over 100 prompts"
    mixed = [PolicyRow("a", {"m": Figure(1, 0, 2, 10), "k": Figure(1, 0, 2, 20)})]
    assert rendered(policy_table(mixed), 120)[-1] == "[lo, hi]: 95% interval"


def test_missing_metrics_are_dashes_and_markup_is_text() -> None:
    rows = [
        PolicyRow("[red]a[/red]", {"x": Figure(1, 0, 2)}),
        PolicyRow("b", {"y": Figure(1, 0, 2)}, {"y": Figure(1, 0.5, 1.5)}),
    ]
    lines = rendered(policy_table(rows), 100)
    assert any(re.fullmatch(r" \[red\]a\[/red\] +1\.00 \[0\.00, 2\.00\] +-", line) for line in lines)
    assert any(re.fullmatch(r" b +- +1\.00 \[0\.00, 2\.00\]", line) for line in lines)


# Figures


FIGURES = {
    "test": {
        "rm/accuracy": Figure(0.7481, 0.7, 0.8, 500),
        "rm/margin": Figure(-1.5, -2, -1, 500),
        "rm/consistency": Figure(2.4e-7, *NO_INTERVAL, 64),
        "rm/temperature": Figure(1.25, *NO_INTERVAL, 500),
    },
    "ood": {"rm/accuracy": Figure(0.5, 0.4, 0.6, 20), "rm/length/accuracy_shorter": Figure(0, 0, 0, 7)},
}


def test_a_figure_stands_with_its_interval_and_what_it_is_over() -> None:
    lines = rendered(figure_table(FIGURES, title="Reward model"), 120)
    assert lines[0] == "Reward model" and lines[-1] == "[lo, hi]: 95% interval"
    assert lines[1].split() == ["figure", "test", "n", "ood", "n"]
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[3:-1]}
    assert rows["rm/accuracy"] == "0.748 [ 0.700, 0.800] 500 0.500 [0.400, 0.600] 20"
    assert rows["rm/margin"] == "-1.500 [-2.000, -1.000] 500 - -"
    assert rows["rm/length/accuracy_shorter"] == "- - 0.000 [0.000, 0.000] 7"
    assert rows["rm/temperature"] == "1.250 500 - -"
    assert rows["rm/consistency"] == "2.4e-07 64 - -", "not 0.000"
    ends = [[i for i, character in enumerate(line) if character == "]"] for line in lines[3:-1] if "]" in line]
    assert len({end[0] for end in ends[:2]}) == 1


@pytest.mark.parametrize("width", [64, 80, 200])
def test_a_figure_table_keeps_names_and_counts_together(width: int) -> None:
    lines = rendered(figure_table(FIGURES), width)
    assert max(map(len, lines)) <= width
    assert sum("figure" in line for line in lines) == (1 if width == 200 else 2)
    assert all(line.split()[-1] == "n" for line in lines if "figure" in line)
    text = "\n".join(lines)
    assert "rm/length/accuracy_shorter" in text and text.count("0.748") == 1


# Sweeps


SWEEP = [
    {
        "algo": "rloo",
        "beta": 0.03,
        "seed": 0,
        "reward/mean": Figure(1.5, 1.2, 1.8, 3),
        "kl": 10.256,
        "steps": 90,
    },
    {"algo": "warp", "beta": None, "seed": 11, "reward/mean": None, "kl": None, "steps": 1000},
    {
        "algo": "dpo",
        "beta": 0.5,
        "seed": 2,
        "reward/mean": Figure(-11.5, *NO_INTERVAL),
        "kl": 3.0,
        "steps": 8,
    },
]


def test_sweep_table_aligns_and_splits() -> None:
    lines = rendered(sweep_table(SWEEP, ["algo", "beta", "seed"]), 120)
    assert lines[1] == " algo   beta   seed           reward/mean      kl   steps"
    assert lines[3] == " rloo   0.03      0     1.50 [1.20, 1.80]   10.26      90"
    assert lines[4] == " warp      -     11        -                    -    1000"
    assert lines[5] == " dpo     0.5      2   -11.50                 3.00       8"
    narrow = rendered(sweep_table(SWEEP, ["algo", "beta", "seed"]), 50)
    assert max(map(len, narrow)) <= 50
    assert sum(line.startswith(" algo   beta   seed") for line in narrow) == 2


def test_table_of_exactly_the_width_is_not_split() -> None:
    lines = rendered(sweep_table(SWEEP, ["algo", "beta", "seed"]), 120)
    width = max(len(line) for line in lines)
    assert rendered(sweep_table(SWEEP, ["algo", "beta", "seed"]), width) == lines
    assert len(rendered(sweep_table(SWEEP, ["algo", "beta", "seed"]), width - 1)) > len(lines)


# CSV


def test_csv_reads_back_in_a_stable_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "sweep.csv"
    rows = [
        {"name": 'a, "b"\nc é', "reward/mean": Figure(0.1, -1 / 3, math.nan), "ok": True},
        {"kl": 1e-17, "name": None, "ok": math.nan},
    ]
    write_csv(path, rows, columns=["seed", "name"])
    with path.open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    header = ["seed", "name", "reward/mean", "reward/mean_lo", "reward/mean_hi", "ok", "kl"]
    assert list(table[0]) == header
    assert table[0] == dict(zip(header, ["", 'a, "b"\nc é', "0.1", repr(-1 / 3), "", "True", ""], strict=True))
    assert table[1] == dict(zip(header, ["", "", "", "", "", "", "1e-17"], strict=True))
    write_csv(tmp_path / "again.csv", rows, columns=["seed", "name"])
    assert (tmp_path / "again.csv").read_bytes() == path.read_bytes()


def test_csv_without_rows_is_its_header(tmp_path: Path) -> None:
    write_csv(tmp_path / "empty.csv", [], columns=["a", "b"])
    assert (tmp_path / "empty.csv").read_text() == "a,b\n"


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.csv"
    write_csv(path, [{"a": 1}])
    assert [p.name for p in tmp_path.iterdir()] == ["x.csv"]

    def fail(self: Path, target: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_csv(path, [{"a": 2}])
    assert path.read_bytes() == b"a\n1\n"
    assert [p.name for p in tmp_path.iterdir()] == ["x.csv"]
