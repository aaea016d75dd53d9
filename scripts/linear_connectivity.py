"""Are two reward models linearly connected? Accuracy on the way from one to the other (arXiv:2401.12187).

    python scripts/linear_connectivity.py RUN/model/member-0 RUN/model/member-1 --out outputs/connectivity

For each l from 0 to 1, on the test pairs and the out-of-distribution pairs of the embedded data:

    weights      the reward model with the weights (1 - l) A + l B
    predictions  (1 - l) the prediction of A + l that of B; of distributions over grades, the mixture
    diagonal     (1 - l) the accuracy of A + l that of B

Where the weights stay above the diagonal the two lie in one basin (linear mode connectivity). A and B are run folders
of reward models, or model folders such as the members of an ensemble; the rows are those of the run that A is in, or
of `--rows-of` (a member in the cache of stages does not know them). Written are a plot and every figure with a
bootstrap interval, those of the differences too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from study import quiet, reviews_of
from torch import Tensor

from rlhf_cli.errors import RequestError
from rlhf_cli.evaluation.statistics import Bootstrap, Estimate
from rlhf_cli.models.loading import resolve_path
from rlhf_cli.ops.merging import lerp
from rlhf_cli.report.figures import colour, marker, new_figure
from rlhf_cli.rewards.format import RewardFormat
from rlhf_cli.rewards.model import RewardModel, load_reward_model
from rlhf_cli.rewards.scoring import logits_of_rows
from rlhf_cli.types import Preference

LINES = ("weights", "predictions", "diagonal")
DIFFERENCES = (("weights", "diagonal"), ("weights", "predictions"))

Vector = NDArray[np.float64]


def main() -> int:
    """Measures, writes numbers and plot, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--points", type=int, default=11, help="values of l, both ends among them")
    parser.add_argument(
        "--rows-of", type=Path, help="run folder whose rows are used; default: the one FIRST is in"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/connectivity"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.points < 2:
        parser.error(f"--points {options.points}: expected at least 2")
    torch.set_num_threads(options.threads)
    quiet()
    try:
        first, second = (
            load_reward_model("reward model", resolve_path("reward model", str(path)), torch.device("cpu"))
            for path in (options.first, options.second)
        )
    except RequestError as error:
        raise SystemExit(str(error)) from None
    splits = reviews_of((options.rows_of or options.first).resolve()).pairs_test
    points = [float(point) for point in np.linspace(0.0, 1.0, options.points)]
    curves = {split: measured(right_of(first, second, pairs, points)) for split, pairs in splits.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    values = {
        "first": str(options.first),
        "second": str(options.second),
        "points": points,
        "curves": plain(curves),
    }
    (options.out / "connectivity.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
    draw(options.out / "connectivity.png", points, curves)
    for split, lines in curves.items():
        print(f"{split}\n     l  " + "  ".join(f"{name:>22}" for name in lines))
        for i, point in enumerate(points):
            print(f"{point:6.2f}  " + "  ".join(shown(estimates[i]) for estimates in lines.values()))
    print(f"{options.out}/connectivity.json, {options.out}/connectivity.png")
    return 0


def right_of(
    first: RewardModel, second: RewardModel, pairs: Sequence[Preference], points: Sequence[float]
) -> dict[str, list[Vector]]:
    """For each line of LINES and each point, which pairs [Q] are right: 1, or 1/2 for a tie; shares on the diagonal."""
    ends = [logits_of(model, pairs) for model in (first, second)]
    at_ends = [right(first.format.raw(logits)) for logits in ends]
    weights = [model.model.state_dict() for model in (first, second)]
    between = RewardModel(
        type(first.model)(first.model.config).to(first.model.device).eval(), first.tokenizer, first.format
    )
    found: dict[str, list[Vector]] = {name: [] for name in LINES}
    for point in points:
        between.model.load_state_dict(lerp(weights[0], weights[1], point))
        found["weights"].append(right(first.format.raw(logits_of(between, pairs))))
        found["predictions"].append(right(first.format.raw(mixed(first.format, ends, point))))
        found["diagonal"].append((1 - point) * at_ends[0] + point * at_ends[1])
    return found


def logits_of(model: RewardModel, pairs: Sequence[Preference]) -> Tensor:
    """float32 [2Q, K]: the preferred completions of all pairs, then the others."""
    texts = [*((pair.prompt, pair.chosen) for pair in pairs), *((pair.prompt, pair.rejected) for pair in pairs)]
    return logits_of_rows(model.model, model.tokenizer, [model.encode(*text) for text in texts], batch_size=128)


def mixed(text_format: RewardFormat, logits: Sequence[Tensor], point: float) -> Tensor:
    """The mean prediction of two models with weights 1 - l and l, as logits [N, K].

    >>> scalar = RewardFormat(1, 1)
    >>> mixed(scalar, [torch.tensor([[1.0]]), torch.tensor([[3.0]])], 0.25).tolist()
    [[1.5]]
    """
    if text_format.grade_loss is None:
        return torch.lerp(logits[0], logits[1], point)
    return torch.lerp(logits[0].softmax(dim=-1), logits[1].softmax(dim=-1), point).log()


def right(raw: Tensor) -> Vector:
    """[Q] of the scores of preferred and other completions, [2Q]: 1 where the preferred one has more, 1/2 for a tie."""
    chosen, rejected = raw.double().chunk(2)
    return ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).numpy()


def measured(found: Mapping[str, Sequence[Vector]]) -> dict[str, list[Estimate]]:
    """Accuracy along each line, and along DIFFERENCES, paired: with the same resamples of the pairs for all."""
    bootstrap = Bootstrap(len(found[LINES[0]][0]))
    lines = {name: [bootstrap.mean(one) for one in vectors] for name, vectors in found.items()}
    for a, b in DIFFERENCES:
        lines[f"{a} - {b}"] = [bootstrap.mean_delta(x, y) for x, y in zip(found[a], found[b], strict=True)]
    return lines


def plain(curves: Mapping[str, Mapping[str, Sequence[Estimate]]]) -> dict[str, dict[str, list[list[float]]]]:
    """For JSON: value, lower and upper end at each point."""
    return {
        split: {name: [[one.value, one.lo, one.hi] for one in line] for name, line in lines.items()}
        for split, lines in curves.items()
    }


def shown(one: Estimate) -> str:
    """Value and interval, in a column."""
    return f"{one.value:6.3f} [{one.lo:.3f}, {one.hi:.3f}]".rjust(22)


def draw(path: Path, points: Sequence[float], curves: Mapping[str, Mapping[str, Sequence[Estimate]]]) -> None:
    """Accuracy against l, a panel for each split; the band is the interval of the averaged weights."""
    with new_figure(path, (1.2 + 4.0 * len(curves), 3.8), "Accuracy between two reward models") as figure:
        panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
        for axes, (split, lines) in zip(panels, curves.items(), strict=True):
            band = lines["weights"]
            axes.fill_between(
                points,
                [one.lo for one in band],
                [one.hi for one in band],
                color=colour(0),
                alpha=0.12,
                linewidth=0,
            )
            for index, name in enumerate(LINES):
                style = {"linestyle": "--"} if name == "diagonal" else {"marker": marker(index), "markersize": 4}
                axes.plot(points, [one.value for one in lines[name]], color=colour(index), label=name, **style)
            axes.set_title(split)
            axes.set_xlabel("share of the second model")
        panels[0].set_ylabel("accuracy")
        panels[0].legend(loc="best")


if __name__ == "__main__":
    raise SystemExit(main())
