"""What `PolicyTask` gives algorithms that act on tokens or keep some of their samples; the KL as a loss."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fixtures_policy import STOPS, N, completions, constant_reward, policy_task, train
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_cli.algos.base import ActorCriticAlgorithm, Advantages, BaselineState, OnlineAlgorithm, ValueHead
from rlhf_cli.algos.ppo import Ppo
from rlhf_cli.algos.raft import Raft, RankBy
from rlhf_cli.algos.reinforce import Reinforce
from rlhf_cli.algos.rloo import Rloo
from rlhf_cli.algos.vanilla_pg import VanillaPg
from rlhf_cli.models.critic import ActorCritic, SeparateCritic, SharedCritic
from rlhf_cli.models.loading import parameter_counts
from rlhf_cli.models.recompute import enable_recomputation
from rlhf_cli.settings import KlEstimator, KlPlacement, KlSettings
from rlhf_cli.train.loop import task_tensors
from rlhf_cli.train.policy import PolicyTask
from rlhf_cli.types import Experience, PolicyBatch, Sequences

SHARED, SEPARATE = ValueHead.shared, ValueHead.separate
KL_LOSS = {"kl": KlSettings(KlPlacement.loss, KlEstimator.k2)}


def experience_of(task: PolicyTask, step: int) -> tuple[Experience, PolicyBatch]:
    """What the algorithm makes the advantages of a step's one micro-batch of."""
    seen: list[Experience] = []
    algorithm = task.algorithm
    advantages = algorithm.advantages

    def watched(experience: Experience, state: BaselineState) -> Advantages:
        seen.append(experience)
        return advantages(experience, state)

    algorithm.advantages = watched  # type: ignore[method-assign]
    (micro,) = task.batch(step).micro_batches
    return seen[-1], micro


def moved(model, tokenizer, folder: Path, algorithm: OnlineAlgorithm, **options) -> PolicyTask:
    """A task after two steps: the policy is no longer the reference."""
    task = policy_task(model, tokenizer, algorithm, head_std=0.5, **options)
    train(task, folder, 2)
    return task


@pytest.mark.parametrize("pad", ["<|pad|>", "<|eos|>"])
@pytest.mark.parametrize("algorithm", [VanillaPg(beta=0.3), Ppo(beta=0.3, num_epochs=1)])
def test_the_rewards_of_tokens_sum_to_the_shaped_reward(make_model, word_tokenizer, tmp_path, algorithm, pad):
    word_tokenizer.pad_token = pad
    task = moved(make_model(), word_tokenizer, tmp_path, algorithm)
    experience, micro = experience_of(task, 2)
    paid, mask = experience.token_reward, experience.mask
    assert torch.equal(mask, micro.sequences.completion_mask[:, 1:])
    assert (paid[~mask] == 0).all() and (~mask).any()
    kl = micro.old_logprob - micro.ref_logprob
    assert kl.abs().min() > 1e-4
    assert torch.allclose(experience.shaped_reward, experience.reward - 0.3 * kl, atol=1e-5)
    assert torch.allclose(paid.sum(1), experience.shaped_reward, atol=1e-5)
    # the reward itself is at the EOS, or at the last token of what was cut: never on padding
    log_ratio = _slow_logprobs(task.policy, micro) - _slow_logprobs(task.reference, micro)
    kinds = set()
    for row in range(N):
        (columns,) = mask[row].nonzero(as_tuple=True)
        without_kl = (paid + 0.3 * log_ratio)[row, columns]
        assert (without_kl[:-1].abs() < 1e-4).all()
        assert without_kl[-1].item() == pytest.approx(experience.reward[row].item(), abs=1e-4)
        kinds.add(int(micro.sequences.ids[row, columns[-1] + 1]) in STOPS)
    assert kinds == {True, False}, "finished ones and cut ones"


def _slow_logprobs(model, micro: PolicyBatch) -> Tensor:
    """Token log-probs on the grid of the batch, row by row without padding."""
    grid = torch.zeros(micro.sequences.completion_mask[:, 1:].shape)
    for row in range(len(micro)):
        (real,) = micro.sequences.attention_mask[row].nonzero(as_tuple=True)
        ids = micro.sequences.ids[row, real]
        with torch.no_grad():
            log_probability = torch.log_softmax(model(ids[None]).logits[0], -1)
        for t in range(1, len(ids)):
            if micro.sequences.completion_mask[row, real[t]]:
                grid[row, real[t] - 1] = log_probability[t - 1, ids[t]]
    return grid


@pytest.mark.parametrize("value_head", list(ValueHead))
def test_a_value_is_of_the_state_before_its_token(make_model, word_tokenizer, tmp_path, value_head):
    """Column t holds the token at t + 1: what is asked for its value has seen nothing of that token, nor padding."""
    task = moved(make_model(), word_tokenizer, tmp_path, VanillaPg(value_head=value_head))
    experience, micro = experience_of(task, 2)
    critic = task.critic
    backbone = task.policy.base_model if isinstance(critic, SharedCritic) else critic.backbone
    sizes = []
    for row, column in experience.mask.nonzero():
        real = micro.sequences.attention_mask[row, : column + 1]
        prefix = micro.sequences.ids[row, : column + 1][real]
        with torch.no_grad():
            hidden = backbone(input_ids=prefix[None]).last_hidden_state[0, -1]
            slow = critic.head.linear(hidden)[0]
        assert experience.value[row, column].item() == pytest.approx(slow.item(), abs=2e-5)
        sizes.append(abs(slow.item()))
    assert max(sizes) > 0.1


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("value_head", list(ValueHead))
@pytest.mark.parametrize("kind", [Ppo, VanillaPg])
def test_the_first_step_knows_nothing_and_has_a_ratio_of_one(
    make_model, word_tokenizer, tmp_path, kind, value_head, micro_batch_size
):
    algorithm = kind(value_head=value_head)
    task = policy_task(make_model(), word_tokenizer, algorithm, micro_batch_size=micro_batch_size, temperature=0.9)
    rewards = [(sum(tokens) % 11 - 5) / 3 for tokens in _all_completions(task)]
    lengths = [len(tokens) for tokens in _all_completions(task)]
    (row,) = train(task, tmp_path, 1)
    assert row["kl/k1"] == 0.0 and row["value/mean"] == 0.0 and row["value/explained_variance"] == 0.0
    # no KL yet, so every return-to-go (and, from values of 0, every lambda-return) ends in the reward
    lam = 1.0 if kind is VanillaPg else algorithm.lam
    returns = [
        lam**to_go * reward for reward, length in zip(rewards, lengths, strict=True) for to_go in range(length)
    ]
    assert row["value/loss"] == pytest.approx(sum(g * g for g in returns) / len(returns) / 2, rel=1e-5)
    if kind is Ppo:
        assert row["ratio/max"] == 1.0 and row["ratio/clip_frac"] == 0.0
        assert row["ratio/mean"] == pytest.approx(1.0, abs=1e-6)


def _all_completions(task: PolicyTask) -> list[list[int]]:
    return [tokens for micro in task.batch(0).micro_batches for tokens in completions(micro)]


@pytest.mark.parametrize("algorithm", [Ppo(num_epochs=3, clip=0.01, whiten=False), Ppo(rollout_batch_size=2 * N)])
def test_later_steps_of_a_rollout_have_ratios_and_old_values_of_its_first(
    make_llama, word_tokenizer, tmp_path, algorithm
):
    task = policy_task(make_llama(), word_tokenizer, algorithm, head_std=0.5)
    rows = train(task, tmp_path, 4)
    assert rows[0]["ratio/max"] == 1.0
    passes = 3 if algorithm.num_epochs == 3 else 4
    assert all(abs(row["ratio/max"] - 1.0) > 1e-4 for row in rows[1 : min(passes, 4)])
    if algorithm.num_epochs == 3:
        assert rows[1]["ratio/clip_frac"] > 0.1
        assert rows[3]["ratio/max"] == 1.0, "a new rollout"
    # what a rollout has is counted once, and its time is in the row of the step that waited for it
    assert [row["samples"] for row in rows] == ([N, N, N, 2 * N] if passes == 3 else [N, 2 * N, 2 * N, 2 * N])
    tokens = [row["tokens"] for row in rows]
    assert tokens[0] > 0 and [now > before for before, now in itertools.pairwise(tokens)] == (
        [False, False, True] if passes == 3 else [True, False, False]
    )
    for name in ("time/rollout_s", "time/score_s", "throughput/rollout_tokens_per_s"):
        assert [step for step, row in enumerate(rows) if name in row] == ([0, 3] if passes == 3 else [0])


def _slow_gradient(task: PolicyTask, micro: PolicyBatch) -> dict[str, Tensor]:
    """Vanilla PG's and PPO's first gradient over rows without padding, with the advantages and targets given."""
    model = ActorCritic(task.policy, task.critic)
    model.zero_grad()
    critic, algorithm = task.critic, task.algorithm
    num_tokens = int(micro.sequences.completion_mask.sum())
    for row in range(len(micro)):
        (real,) = micro.sequences.attention_mask[row].nonzero(as_tuple=True)
        ids = micro.sequences.ids[row, real][None]
        answer = task.policy(ids, output_hidden_states=True)
        hidden = answer.hidden_states[-1]
        if isinstance(critic, SeparateCritic):
            hidden = critic.backbone(input_ids=ids).last_hidden_state
        log_probability = torch.log_softmax(answer.logits[0], -1)
        total = torch.zeros(())
        for t in range(1, len(real)):
            if micro.sequences.completion_mask[row, real[t]]:
                column = real[t] - 1
                error = critic.head.linear(hidden[0, t - 1])[0] - micro.value_target[row, column]
                gain = micro.advantage[row, column] * log_probability[t - 1, ids[0, t]]
                total = total - gain + algorithm.value_coef * error.square() / 2
        (total / num_tokens).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("value_head", list(ValueHead))
@pytest.mark.parametrize("algorithm", [VanillaPg(value_coef=0.7), Ppo(value_coef=0.7, whiten=False, lam=0.8)])
def test_the_gradient_equals_a_slow_implementation(make_model, word_tokenizer, algorithm, value_head):
    algorithm = replace(algorithm, value_head=value_head)
    task = policy_task(make_model(), word_tokenizer, algorithm, head_std=0.5)
    batch = task.batch(0)
    (micro,) = batch.micro_batches
    assert batch.normaliser == int(micro.sequences.completion_mask.sum())
    slow = _slow_gradient(task, micro)
    task.model.zero_grad()
    task.loss(micro, batch.normaliser).loss.backward()
    found = {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}
    assert found.keys() == slow.keys()
    for name, gradient in slow.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=2e-5), name


def _value_gradient(task: PolicyTask) -> tuple[float, float]:
    """Largest gradient of the critic's loss alone: in the policy, and in what the critic has of its own."""
    batch = task.batch(0)
    task.model.zero_grad()
    for micro in batch.micro_batches:
        still = replace(micro, advantage=torch.zeros_like(micro.advantage))
        task.loss(still, batch.normaliser).loss.backward()
    policy, critic = (
        [float(p.grad.abs().max()) for p in module.parameters() if p.grad is not None]
        for module in (task.policy, task.critic)
    )
    return max(policy, default=0.0), max(critic, default=0.0)


def test_a_shared_critic_trains_the_policys_backbone_and_a_separate_one_its_own(make_model, word_tokenizer):
    shared = policy_task(make_model(), word_tokenizer, VanillaPg(value_coef=1.0), head_std=0.5)
    assert all(size > 0.01 for size in _value_gradient(shared))
    own = policy_task(make_model(), word_tokenizer, VanillaPg(value_coef=1.0, value_head=SEPARATE), head_std=0.5)
    policy, critic = _value_gradient(own)
    assert policy == 0.0 and critic > 0.01


@pytest.mark.parametrize("value_head", list(ValueHead))
def test_the_critic_learns_the_returns(make_llama, word_tokenizer, tmp_path, value_head):
    algorithm = VanillaPg(value_head=value_head, value_coef=1.0, beta=0.0)
    task = policy_task(make_llama(), word_tokenizer, algorithm, constant_reward, lr=3e-2)
    rows = train(task, tmp_path, 25)
    assert rows[0]["value/mean"] == 0.0
    assert rows[-1]["value/mean"] == pytest.approx(0.1, abs=0.05)
    assert rows[-1]["value/loss"] < rows[0]["value/loss"] / 4


@pytest.mark.parametrize("value_head", list(ValueHead))
def test_a_checkpoint_has_the_critic_and_the_saved_model_has_not(make_llama, word_tokenizer, tmp_path, value_head):
    plain = policy_task(make_llama(), word_tokenizer, Reinforce())
    task = moved(make_llama(), word_tokenizer, tmp_path, VanillaPg(value_head=value_head))
    names = {name for name in task_tensors(task) if name.startswith("model/critic.")}
    assert {"model/critic.head.linear.weight", "model/critic.head.linear.bias"} <= names
    assert (len(names) > 2) == (value_head is SEPARATE)
    counted = {name.replace("model/policy.", "model/") for name in task_tensors(task)} - names
    assert counted == set(task_tensors(plain)), "the policy is in it once"
    more = parameter_counts(task.model)["parameters/total"] - parameter_counts(plain.model)["parameters/total"]
    assert more == sum(p.numel() for p in task.critic.parameters()) > 0
    task.save(tmp_path / "saved")
    plain.save(tmp_path / "plain")
    assert {f.name for f in (tmp_path / "saved").iterdir()} == {f.name for f in (tmp_path / "plain").iterdir()}
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    own = dict(task.policy.named_parameters())
    assert all(torch.equal(p, own[name]) for name, p in loaded.named_parameters())


def test_recomputed_activations_give_the_same_gradient_of_both_losses(make_llama, word_tokenizer):
    gradients = []
    for recompute in (False, True):
        task = policy_task(make_llama(), word_tokenizer, VanillaPg(value_coef=1.0), head_std=0.5)
        if recompute:
            enable_recomputation("key", task.policy)
        batch = task.batch(0)
        task.loss(batch.micro_batches[0], batch.normaliser).loss.backward()
        gradients.append([p.grad for p in task.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("rank_by", list(RankBy))
def test_raft_keeps_one_row_a_prompt_and_divides_by_its_tokens(make_model, word_tokenizer, tmp_path, rank_by):
    task = moved(make_model(), word_tokenizer, tmp_path, Raft(k=4, beta=2.0, rank_by=rank_by))
    everything = policy_task(make_model(), word_tokenizer, Rloo(k=4, beta=2.0))
    everything.policy.load_state_dict(task.policy.state_dict())
    batch, whole = task.batch(2), everything.batch(2)
    (kept,), (rows,) = batch.micro_batches, whole.micro_batches
    rewards = torch.tensor([(sum(tokens) % 11 - 5) / 3 for tokens in completions(rows)])
    shaped = rewards - 2.0 * (rows.old_logprob - rows.ref_logprob)
    by = shaped if rank_by is RankBy.shaped else rewards
    best = [4 * prompt + int(by.view(-1, 4)[prompt].argmax()) for prompt in range(N // 4)]
    assert completions(kept) == [completions(rows)[row] for row in best]
    assert kept.advantage.tolist() == [1.0] * (N // 4)
    num_tokens = sum(len(tokens) for tokens in completions(kept))
    assert batch.normaliser == num_tokens
    assert batch.num_samples == N and batch.num_tokens == whole.num_tokens, "all that was sampled is counted"
    assert batch.metrics["reward/best_mean"] == pytest.approx(float(rewards[best].mean()))
    assert batch.metrics["reward/mean"] == pytest.approx(float(rewards.mean()))
    cross_entropy = -sum(_slow_logprobs(task.policy, kept).flatten()) / num_tokens
    assert task.loss(kept, batch.normaliser).loss.item() == pytest.approx(float(cross_entropy), rel=1e-4)


@pytest.mark.parametrize("estimator", list(KlEstimator))
@pytest.mark.parametrize(
    "algorithm", [Rloo(k=2, beta=0.7), Reinforce(beta=0.7), VanillaPg(beta=0.7), Ppo(beta=0.7)]
)
def test_the_kl_as_a_loss_is_in_the_loss_alone(make_llama, word_tokenizer, tmp_path, algorithm, estimator):
    algorithm = replace(algorithm, num_epochs=1)
    more = {"kl": KlSettings(KlPlacement.loss, estimator)}
    task = moved(make_llama(), word_tokenizer, tmp_path, algorithm, more=more)
    experience, micro = experience_of(task, 2)
    assert torch.equal(experience.shaped_reward, experience.reward)
    if experience.token_reward is not None:
        assert torch.allclose(experience.token_reward.sum(1), experience.reward)
        assert (experience.token_reward != 0).sum() <= N, "nothing but the reward is paid"
    log_ratio = micro.old_logprob - micro.ref_logprob
    per_row = {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": torch.exp(-log_ratio) - 1 + log_ratio}
    held = 0.7 * float(per_row[estimator.value].sum()) / 16
    output = task.loss(micro, 16.0)
    assert abs(held) > 1e-3
    assert output.metrics["kl/loss"].item() == pytest.approx(held, rel=1e-3, abs=1e-5)
    assert not output.metrics["kl/loss"].requires_grad
    task.kl = KlSettings()
    without = task.loss(micro, 16.0)
    assert "kl/loss" not in without.metrics
    assert output.loss.item() - without.loss.item() == pytest.approx(held, rel=1e-3, abs=1e-5)


def _padded(micro: PolicyBatch, left: int, right: int, pad_id: int) -> PolicyBatch:
    """The same rows with more padding around them; what stands there is not to be looked at."""

    def more(grid: Tensor | None, fill: float) -> Tensor | None:
        return None if grid is None else torch.nn.functional.pad(grid, (left, right), value=fill)

    rows = micro.sequences
    sequences = Sequences(
        more(rows.ids, pad_id), more(rows.attention_mask, False), more(rows.completion_mask, False)
    )
    by_token = {
        name: more(getattr(micro, name), math.nan) for name in ("old_token_logprob", "old_value", "value_target")
    }
    advantage = more(micro.advantage, math.nan) if micro.advantage.dim() == 2 else micro.advantage
    return replace(micro, sequences=sequences, advantage=advantage, **by_token)


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4), (2, 1)])
@pytest.mark.parametrize(
    "algorithm", [VanillaPg(), Ppo(), Ppo(value_head=SEPARATE), Raft(k=4), Rloo(k=2)], ids=lambda a: a.name
)
def test_padding_changes_nothing(make_model, word_tokenizer, tmp_path, algorithm, left, right):
    task = moved(make_model(), word_tokenizer, tmp_path, algorithm, more=KL_LOSS)
    batch = task.batch(2)
    (micro,) = batch.micro_batches
    results = []
    for rows in (micro, _padded(micro, left, right, pad_id=0)):
        task.model.zero_grad()
        output = task.loss(rows, batch.normaliser)
        output.loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in task.model.parameters() if p.grad is not None])
        results.append((output, gradient))
    (first, gradient), (second, padded_gradient) = results
    assert second.loss.item() == pytest.approx(first.loss.item(), rel=1e-5, abs=1e-5)
    assert {k: v.item() for k, v in second.metrics.items()} == pytest.approx(
        {k: v.item() for k, v in first.metrics.items()}, rel=1e-4, abs=1e-6
    )
    assert {k: v.item() for k, v in second.maxima.items()} == pytest.approx(
        {k: v.item() for k, v in first.maxima.items()}, rel=1e-4
    )
    scale = float(gradient.abs().max())
    assert scale > 0.01 and torch.allclose(padded_gradient, gradient, rtol=0, atol=1e-5 * scale)


def test_whitening_is_over_the_tokens_of_the_whole_batch(make_llama, word_tokenizer):
    task = policy_task(make_llama(), word_tokenizer, Ppo(num_epochs=1), head_std=0.5, micro_batch_size=3)
    batch = task.batch(0)
    advantages = torch.cat(
        [micro.advantage[micro.sequences.completion_mask[:, 1:]] for micro in batch.micro_batches]
    )
    assert advantages.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert advantages.std(unbiased=False).item() == pytest.approx(1.0, abs=1e-4)
    assert batch.metrics["advantage/std"] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("edge", ["no eos", "eos first", "one token"])
@pytest.mark.parametrize("algorithm", [VanillaPg(), Ppo(), Raft(k=2)], ids=lambda a: a.name)
def test_odd_completions_train_like_any_other(make_model, word_tokenizer, tmp_path, algorithm, edge):
    model = make_model()
    task = policy_task(model, word_tokenizer, algorithm)
    if edge == "no eos":
        word_tokenizer.eos_token = None
        model.generation_config.eos_token_id = model.config.eos_token_id = None
    elif edge == "eos first":
        model.generation_config.eos_token_id = list(range(24))
    else:
        task.sampling = replace(task.sampling, max_new_tokens=1)
    rows = train(task, tmp_path, 2)
    assert rows[0]["kl/k1"] == 0.0 and rows[0]["grad_norm"] > 0.01
    assert rows[0]["length/mean"] == (6 if edge == "no eos" else 1)


@pytest.mark.parametrize("algorithm", [VanillaPg(), Ppo()], ids=lambda a: a.name)
def test_dropout_is_off_in_policy_and_critic(make_gpt2, word_tokenizer, algorithm: ActorCriticAlgorithm):
    for value_head in ValueHead:
        task = policy_task(
            make_gpt2(dropout=0.5).train(), word_tokenizer, replace(algorithm, value_head=value_head), head_std=0.5
        )
        first, second = (task.batch(0).micro_batches[0] for _ in range(2))
        assert torch.equal(first.old_value, second.old_value)
        assert task.loss(first, 16.0).loss == task.loss(first, 16.0).loss


def test_noise_is_on_the_reward_that_is_learned_from_and_on_nothing_else(make_llama, word_tokenizer):
    def shift(rollout, number):
        return 10.0 + torch.arange(float(len(rollout)))

    clean = policy_task(make_llama(), word_tokenizer, VanillaPg())
    noisy = policy_task(make_llama(), word_tokenizer, VanillaPg(), more={"noise": shift})
    first, second = experience_of(clean, 0)[0], experience_of(noisy, 0)[0]
    assert torch.allclose(second.reward - first.reward, 10.0 + torch.arange(float(N)))
    assert torch.allclose(second.token_reward.sum(1), second.reward)
    assert clean.evaluate(0) == noisy.evaluate(0)
