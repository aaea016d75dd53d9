"""One step of N rows has the same gradient and metrics however it is cut, and a slow sum over rows agrees."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace

import pytest
import torch
from fixtures_policy import make_critic

from rlhf_cli.algos.base import ValueHead
from rlhf_cli.algos.ppo import Ppo
from rlhf_cli.algos.raft import Raft
from rlhf_cli.algos.reinforce import Reinforce
from rlhf_cli.algos.rloo import Rloo
from rlhf_cli.algos.vanilla_pg import VanillaPg
from rlhf_cli.data.tokenise import encode_examples
from rlhf_cli.models.loading import classifier_from_lm
from rlhf_cli.rewards.format import RewardFormat
from rlhf_cli.rewards.model import RewardModel
from rlhf_cli.rollout.engine import Sampling
from rlhf_cli.settings import KlEstimator, KlPlacement, KlSettings, TrainSettings
from rlhf_cli.train.policy import PolicyTask
from rlhf_cli.train.precision import Precision
from rlhf_cli.train.reward import RewardLoss, RewardTask, encode
from rlhf_cli.train.sft import SftTask
from rlhf_cli.types import Example, Preference, Scores

REWARD_K1 = KlSettings()
FP32 = Precision("fp32", torch.device("cpu"))
N = 8


@pytest.fixture(params=["llama", "gpt2"])
def make_model(request):
    """Each architecture in turn, without dropout: its masks do depend on how a step is cut."""
    build = request.getfixturevalue(f"make_{request.param}")
    return build if request.param == "llama" else functools.partial(build, dropout=0.0)


def _text(start, count):
    return " ".join(f"t{(start + 3 * i) % 21 + 2}" for i in range(count))


def _step(task):
    """Gradient, summed metrics and normaliser of the first step."""
    task.model.zero_grad()
    batch = task.batch(0)
    loss, metrics = 0.0, {}
    for micro_batch in batch.micro_batches:
        output = task.loss(micro_batch, batch.normaliser)
        output.loss.backward()
        loss += output.loss.item()
        for name, value in output.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + float(value)
    gradient = {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}
    return gradient, {"loss": loss, **metrics}, batch


def _assert_close(found, expected):
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 0.01
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=0, atol=1e-5 * scale), name


def _assert_same_in_parts(build, num_parts):
    """build(micro_batch_size) -> task; num_parts: how many micro-batches each size gives."""
    whole, whole_metrics, _ = _step(build(None))
    for size, parts in num_parts.items():
        gradient, metrics, batch = _step(build(size))
        assert len(batch.micro_batches) == parts
        _assert_close(gradient, whole)
        assert metrics == pytest.approx(whole_metrics, abs=1e-5)


def _policy_task(model, tokenizer, algorithm, micro_batch_size, kl=REWARD_K1):
    model.generation_config.eos_token_id = [1, 4, 13]

    def reward(rollout):
        values = torch.tensor([float(sum(ids) % 7) for ids in rollout.completion_ids])
        return Scores(values, values)

    prompts = [_text(i, 1 + i % 5) for i in range(12)]
    settings = TrainSettings(batch_size=N, micro_batch_size=micro_batch_size)
    reference = copy.deepcopy(model)
    sampling = Sampling(6)
    return PolicyTask(
        model,
        reference,
        tokenizer,
        replace(algorithm, train=settings),
        reward,
        None,
        prompts,
        prompts,
        16,
        sampling,
        FP32,
        0,
        kl=kl,
        critic=make_critic(algorithm, model, head_std=0.5),
    )


@pytest.mark.parametrize("algorithm", [Reinforce(), Rloo(k=2), Rloo(k=4, num_epochs=2, clip=0.2)])
def test_policy(make_model, word_tokenizer, algorithm):
    def build(size):
        return _policy_task(make_model(), word_tokenizer, algorithm, size)

    _assert_same_in_parts(build, {1: 8, 2: 4, 3: 3, N: 1})
    _, metrics, batch = _step(build(1))
    assert batch.normaliser == N  # sequences
    assert metrics["ratio/mean"] == 1.0


@pytest.mark.parametrize("kl", [REWARD_K1, KlSettings(KlPlacement.loss, KlEstimator.k2)], ids=["reward", "loss"])
@pytest.mark.parametrize(
    "algorithm",
    [VanillaPg(), VanillaPg(value_head=ValueHead.separate, whiten=True), Ppo(), Ppo(k=2, lam=0.5), Raft(k=2)],
    ids=["vanilla_pg", "separate", "ppo", "ppo of two", "raft"],
)
def test_policies_that_are_normalised_by_tokens(make_model, word_tokenizer, algorithm, kl):
    def build(size):
        task = _policy_task(make_model(), word_tokenizer, algorithm, size, kl)
        with torch.no_grad():  # away from the reference, so that the KL has a gradient
            for parameter in task.reference.parameters():
                parameter.mul_(0.8)
        return task

    rows = N // 2 if algorithm.name == "raft" else N
    _assert_same_in_parts(build, {1: rows, 2: rows // 2, 3: -(-rows // 3), N: 1})
    _, metrics, batch = _step(build(1))
    assert batch.normaliser == sum(int(micro.sequences.completion_mask.sum()) for micro in batch.micro_batches)
    assert ("kl/loss" in metrics) == (kl.placement is KlPlacement.loss)


EXAMPLES = [Example(_text(i, 1 + i % 3), _text(2 * i + 1, 1 + (5 * i) % 7)) for i in range(N)]


def _sft_task(model, tokenizer, micro_batch_size):
    rows = encode_examples(tokenizer, EXAMPLES, 8, 16)
    settings = TrainSettings(batch_size=N, micro_batch_size=micro_batch_size)
    return SftTask(model, tokenizer, rows, rows, settings, FP32, 0)


def test_sft(make_model, word_tokenizer):
    _assert_same_in_parts(lambda size: _sft_task(make_model(), word_tokenizer, size), {1: 8, 2: 4, 3: 3, N: 1})


def test_sft_equals_a_slow_mean_over_tokens(make_model, word_tokenizer):
    gradient, metrics, batch = _step(_sft_task(make_model(), word_tokenizer, 3))
    rows = encode_examples(word_tokenizer, EXAMPLES, 8, 16)
    num_tokens = sum(len(completion) for _, completion in rows)
    assert batch.normaliser == num_tokens
    model, total = make_model(), 0.0
    for prompt, completion in rows:
        log_probability = torch.log_softmax(model(torch.tensor([prompt + completion])).logits[0], -1)
        for t, token in enumerate(completion):
            total = total - log_probability[len(prompt) - 1 + t, token] / num_tokens
    total.backward()
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-5)
    _assert_close(gradient, {name: p.grad for name, p in model.named_parameters()})


PAIRS = [
    Preference(_text(i, 2), _text(2 * i, 1 + i % 4), _text(3 * i + 1, 1 + (i + 2) % 5), margin=i / 4)
    for i in range(N)
]


def _reward_task(model, tokenizer, micro_batch_size, use_margin=False):
    reward_model = RewardModel(classifier_from_lm(model, seed=1), tokenizer, RewardFormat(8, 16))
    pairs = encode(reward_model, PAIRS)
    settings = TrainSettings(batch_size=N, micro_batch_size=micro_batch_size)
    return RewardTask(reward_model, pairs, pairs, settings, FP32, 0, RewardLoss(use_margin))


@pytest.mark.parametrize("use_margin", [False, True])
def test_reward_model(make_model, word_tokenizer, use_margin):
    _assert_same_in_parts(
        lambda size: _reward_task(make_model(), word_tokenizer, size, use_margin),
        {1: 8, 2: 4, 3: 3, N: 1},
    )


@pytest.mark.parametrize("use_margin", [False, True])
def test_reward_model_equals_a_slow_mean_over_pairs(make_model, word_tokenizer, use_margin):
    task = _reward_task(make_model(), word_tokenizer, 3, use_margin)
    gradient, metrics, batch = _step(task)
    assert batch.normaliser == N  # pairs
    model = copy.deepcopy(task.model).eval()
    model.zero_grad()
    total, wins = 0.0, 0
    for chosen, rejected, margin in task.pairs:
        scores = []
        for prompt, completion in (chosen, rejected):
            hidden = model.base_model(torch.tensor([prompt + completion])).last_hidden_state
            scores.append(model.score(hidden[0, -1])[0])
        difference = scores[0] - scores[1]
        wins += difference.item() > 0
        total = total - torch.log(1 / (1 + torch.exp(-(difference - margin * use_margin)))) / N
    total.backward()
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert metrics["rm/accuracy"] == pytest.approx(wins / N)
    _assert_close(gradient, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert math.isfinite(metrics["rm/margin"])
