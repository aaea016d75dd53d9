import math

import pytest
import torch

from rlhf_cli.ops.policy_losses import clipped_fraction, ratio_loss, score_function_loss, sequence_ratio

LOGPROB = [-1.0, -2.5, -0.3, -4.0, -1.5]
ADVANTAGE = [1.0, -2.0, 0.5, 3.0, -1.0]


def _slow_ratio_loss(logprob, old, advantage, normaliser, clip):
    """Row by row, in plain numbers."""
    total = 0.0
    for new, before, weight in zip(logprob, old, advantage, strict=True):
        ratio = math.exp(new - before)
        gain = ratio * weight
        if clip is not None:
            gain = min(gain, min(max(ratio, 1 - clip), 1 + clip) * weight)
        total -= gain / normaliser
    return total


def test_score_function_loss_by_hand_and_its_gradient():
    logprob = torch.tensor(LOGPROB, requires_grad=True)
    loss = score_function_loss(logprob, torch.tensor(ADVANTAGE), 4.0)
    # -(-1 + 5 - 0.15 - 12 + 1.5) / 4
    assert loss.item() == pytest.approx(6.65 / 4)
    loss.backward()
    assert logprob.grad.tolist() == pytest.approx([-a / 4 for a in ADVANTAGE])


def test_no_gradient_reaches_advantage_or_old_logprob():
    logprob, advantage, old = (torch.tensor(LOGPROB, requires_grad=True) for _ in range(3))
    score_function_loss(logprob, advantage, 2.0).backward()
    ratio_loss(logprob, old, advantage, 2.0, clip=0.2).backward()
    assert advantage.grad is None and old.grad is None
    assert logprob.grad is not None


def test_no_advantage_gives_no_gradient():
    logprob = torch.tensor(LOGPROB, requires_grad=True)
    loss = score_function_loss(logprob, torch.zeros(5), 5.0) + ratio_loss(
        logprob, logprob, torch.zeros(5), 5.0, 0.2
    )
    loss.backward()
    assert loss.item() == 0.0
    assert logprob.grad.tolist() == [0.0] * 5


@pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 3), slice(3, 5)])
def test_one_row_or_some_rows_are_their_share_of_the_whole(rows):
    logprob, advantage = torch.tensor(LOGPROB), torch.tensor(ADVANTAGE)
    rest = [i for i in range(5) if i not in range(5)[rows]]
    parts = score_function_loss(logprob[rows], advantage[rows], 5.0) + score_function_loss(
        logprob[rest], advantage[rest], 5.0
    )
    assert parts.item() == pytest.approx(score_function_loss(logprob, advantage, 5.0).item())


def test_ratio_by_hand_and_exactly_one_for_equal_logprobs():
    ratio = sequence_ratio(torch.tensor([math.log(0.3), -50.0]), torch.tensor([math.log(0.2), -50.0]))
    assert ratio[0].item() == pytest.approx(1.5)
    assert ratio[1].item() == 1.0


@pytest.mark.parametrize("clip", [None, 0.2])
def test_at_ratio_one_the_gradient_is_that_of_the_score_function(clip):
    logprob = torch.tensor(LOGPROB, requires_grad=True)
    loss = ratio_loss(logprob, logprob.detach(), torch.tensor(ADVANTAGE), 5.0, clip)
    assert loss.item() == pytest.approx(-sum(ADVANTAGE) / 5)
    loss.backward()
    assert logprob.grad.tolist() == pytest.approx([-a / 5 for a in ADVANTAGE])


@pytest.mark.parametrize("clip", [None, 0.2])
def test_ratio_loss_and_its_gradient_equal_a_slow_implementation(clip):
    old = [-1.05, -2.0, -1.3, -4.6, -1.1]  # ratios 1.05, 0.61, 2.7, 1.8, 0.67: some clipped, of either sign
    logprob = torch.tensor(LOGPROB, dtype=torch.float64, requires_grad=True)
    loss = ratio_loss(
        logprob, torch.tensor(old, dtype=torch.float64), torch.tensor(ADVANTAGE, dtype=torch.float64), 3.0, clip
    )
    assert loss.item() == pytest.approx(_slow_ratio_loss(LOGPROB, old, ADVANTAGE, 3.0, clip))
    loss.backward()
    step, differences = 1e-6, []
    for i in range(5):
        up, down = list(LOGPROB), list(LOGPROB)
        up[i] += step
        down[i] -= step
        rise = _slow_ratio_loss(up, old, ADVANTAGE, 3.0, clip) - _slow_ratio_loss(down, old, ADVANTAGE, 3.0, clip)
        differences.append(rise / (2 * step))
    assert logprob.grad.tolist() == pytest.approx(differences, abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "cut"),
    [
        (1.5, 1.0, True),
        (1.5, -1.0, False),
        (0.5, 1.0, False),
        (0.5, -1.0, True),
        (1.1, 1.0, False),
        (0.9, -1.0, False),
    ],
)
def test_the_clip_cuts_only_gradients_that_would_go_further(ratio, advantage, cut):
    logprob = torch.tensor([math.log(ratio)], requires_grad=True)
    ratio_loss(logprob, torch.zeros(1), torch.tensor([advantage]), 1.0, clip=0.2).backward()
    assert (logprob.grad.item() == 0.0) is cut
    assert clipped_fraction(torch.tensor([ratio]), torch.tensor([advantage]), 0.2).item() == float(cut)


def test_clipped_fraction_is_a_share_and_zero_without_a_clip():
    ratio, advantage = torch.tensor([1.5, 0.5, 1.0, 1.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert clipped_fraction(ratio, advantage, 0.2).item() == 0.5
    assert clipped_fraction(ratio, advantage, None).item() == 0.0
    assert clipped_fraction(ratio, torch.zeros(4), 0.2).item() == 0.0
