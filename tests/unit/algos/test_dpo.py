from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rlhf_cli.algos.dpo import Dpo, PairLoss
from rlhf_cli.algos.preference import Labels, Pairs
from rlhf_cli.errors import RequestError
from rlhf_cli.ops.logprobs import TokenLogprobs


def tokens(logprobs: list[list[float]]) -> TokenLogprobs:
    """Completions of these tokens' log-probs, padded; each token has an entropy of 2."""
    width = max(map(len, logprobs))
    mask = torch.tensor([[column < len(row) for column in range(width)] for row in logprobs])
    values = torch.tensor([row + [0.0] * (width - len(row)) for row in logprobs])
    return TokenLogprobs(values, 2.0 * mask, mask)


CHOSEN, REJECTED = tokens([[-1.0, -2.0], [-1.0]]), tokens([[-3.0], [-1.0, -1.0]])
REF_CHOSEN, REF_REJECTED = torch.tensor([-5.0, -1.0]), torch.tensor([-2.0, -4.0])
# log-ratios: chosen 2, 0; rejected -1, 2; hence h = 3, -2


def output(**options: Any) -> tuple[float, dict[str, float]]:
    result = Dpo(beta=0.5, **options).pair_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, 2.0)
    return result.loss.item(), {name: float(value) for name, value in result.metrics.items()}


def test_loss_and_figures_by_hand():
    loss, figures = output()
    assert loss == pytest.approx((math.log1p(math.exp(-1.5)) + math.log1p(math.exp(1.0))) / 2)
    assert figures == pytest.approx(
        {
            "dpo/accuracy": 0.5,
            "dpo/margin": 0.25,
            "dpo/chosen_reward": 0.5,
            "dpo/rejected_reward": 0.25,
            "logps/chosen": -2.0,
            "logps/rejected": -2.5,
            "entropy": 2.0,
        }
    )


def test_per_token_ratios_have_their_own_rewards():
    loss, figures = output(loss=PairLoss.ipo, length_normalised=True)
    # ratios: chosen 1, 0; rejected -1, 1; h = 2, -1; drawn to 1
    assert loss == pytest.approx((1.0 + 4.0) / 2)
    assert figures["dpo/margin"] == pytest.approx(0.25)
    assert figures["logps/chosen"] == pytest.approx(-2.0), "log-probs stay those of whole completions"


def test_smoothing_is_passed_on():
    assert output(label_smoothing=0.2)[0] != output()[0]


@pytest.mark.parametrize(
    ("pairs", "labels", "share_prompt", "learns", "needs_rm"),
    [
        (Pairs.auto, Labels.rm, True, True, False),
        (Pairs.auto, Labels.rm, False, False, True),
        (Pairs.auto, Labels.gold, False, False, False),
        (Pairs.data, Labels.rm, True, True, False),
        (Pairs.on_policy, Labels.rm, True, False, True),
        (Pairs.on_policy, Labels.gold, True, False, False),
    ],
)
def test_a_reward_model_is_for_samples_that_nothing_else_labels(
    pairs: Pairs, labels: Labels, share_prompt: bool, learns: bool, needs_rm: bool
):
    algo = Dpo(pairs=pairs, labels=labels)
    assert algo.learns_from_pairs(share_prompt) is learns
    assert algo.needs_reward_model(share_prompt) is needs_rm
    assert ("num_prompts" in algo.shared_counts(share_prompt)) is not learns


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"beta": 0.0}, "algo.beta=0.0"),
        ({"label_smoothing": 0.5}, "algo.label_smoothing=0.5"),
        ({"label_smoothing": 0.1, "loss": PairLoss.ipo}, "algo.loss=ipo"),
        ({"k": 1}, "algo.k=1"),
        ({"num_prompts": 0}, "algo.num_prompts=0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], key: str):
    with pytest.raises(RequestError, match=key):
        Dpo(**options).check()


def test_data_that_lacks_what_it_learns_from_is_refused():
    with pytest.raises(RequestError, match=r"algo\.pairs=data"):
        Dpo(pairs=Pairs.data).check_data("imdb", pairs_share_prompt=False, has_gold=False)
    with pytest.raises(RequestError, match=r"algo\.labels=gold.*imdb"):
        Dpo(labels=Labels.gold).check_data("imdb", pairs_share_prompt=False, has_gold=False)
    Dpo(labels=Labels.gold).check_data("jsonl", pairs_share_prompt=True, has_gold=False)  # has no use for labels
    Dpo(pairs=Pairs.on_policy, labels=Labels.gold).check_data("reviews", pairs_share_prompt=True, has_gold=True)
