import copy
import itertools
import math

import pytest
import torch
from fixtures_policy import MAX_NEW, PROMPTS, STOPS, N, completions, constant_reward, policy_task, train

from rlhf_cli.algos.reinforce import Reinforce
from rlhf_cli.algos.rloo import Rloo
from rlhf_cli.models.causal import sequence_logprobs, token_logprobs
from rlhf_cli.rollout.engine import Sampling
from rlhf_cli.settings import KlEstimator, KlPlacement, KlSettings


@pytest.mark.parametrize("micro_batch_size", [None, 4, 3, 1])
@pytest.mark.parametrize("algorithm", [Rloo(k=2), Rloo(k=4, num_epochs=2, clip=0.2), Reinforce()])
def test_step_0_has_no_kl_and_a_ratio_of_one_exactly(
    make_model, word_tokenizer, tmp_path, algorithm, micro_batch_size
):
    task = policy_task(make_model(), word_tokenizer, algorithm, micro_batch_size=micro_batch_size, temperature=0.9)
    (row,) = train(task, tmp_path, 1)
    assert row["kl/k1"] == 0.0
    assert row["ratio/mean"] == 1.0
    assert row["ratio/max"] == 1.0
    assert row["ratio/clip_frac"] == 0.0
    assert row["reward/shaped_mean"] == row["reward/mean"]
    assert row["rollout/logprob_mismatch"] < 1e-4


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_policy_and_reference_are_scored_in_the_shapes_of_training(make_llama, word_tokenizer, micro_batch_size):
    # another shape may choose another kernel, which rounds in another way
    task = policy_task(make_llama(), word_tokenizer, micro_batch_size=micro_batch_size)
    shapes = {}
    for name, model in (("policy", task.model), ("reference", task.reference)):
        seen = shapes[name] = []
        model.register_forward_pre_hook(
            lambda _module, _args, kwargs, seen=seen: seen.append(kwargs["input_ids"].shape), with_kwargs=True
        )
    batch = task.batch(0)
    trained = [micro.sequences.ids.shape for micro in batch.micro_batches]
    assert shapes["reference"] == trained
    assert shapes["policy"][-len(trained) :] == trained


def test_each_rollout_has_noise_of_its_own(make_llama, word_tokenizer):
    task = policy_task(make_llama(), word_tokenizer, batch_size=2 * len(PROMPTS))  # every prompt in every step
    drawn = []
    for step in (0, 1):
        (micro,) = task.batch(step).micro_batches
        is_prompt = micro.sequences.attention_mask & ~micro.sequences.completion_mask
        prompts = [tuple(ids[mask].tolist()) for ids, mask in zip(micro.sequences.ids, is_prompt, strict=True)]
        drawn.append(dict(zip(prompts, completions(micro), strict=True)))
    assert drawn[0].keys() == drawn[1].keys() and len(drawn[0]) == len(PROMPTS)
    assert sum(drawn[0][prompt] != drawn[1][prompt] for prompt in drawn[0]) > 7


def test_the_reference_stays_and_the_kl_grows(make_llama, word_tokenizer, tmp_path):
    task = policy_task(make_llama(), word_tokenizer)
    before = {name: p.clone() for name, p in task.reference.named_parameters()}
    rows = train(task, tmp_path, 3)
    assert all(torch.equal(p, before[name]) for name, p in task.reference.named_parameters())
    assert not any(p.requires_grad or p.grad is not None for p in task.reference.parameters())
    assert rows[0]["kl/k1"] == 0.0 and abs(rows[2]["kl/k1"]) > 1e-3
    # the KL is in the reward, and the ratio of fresh samples is still exactly 1
    assert rows[2]["reward/shaped_mean"] == pytest.approx(
        rows[2]["reward/mean"] - 0.1 * rows[2]["kl/k1"], abs=1e-6
    )
    assert rows[2]["ratio/max"] == rows[2]["ratio/mean"] == 1.0


def test_a_second_pass_over_a_rollout_is_off_policy(make_model, word_tokenizer, tmp_path):
    task = policy_task(make_model(), word_tokenizer, Rloo(k=2, num_epochs=2), micro_batch_size=4)
    first, second, third = train(task, tmp_path, 3)
    assert first["ratio/mean"] == first["ratio/max"] == 1.0
    assert second["ratio/max"] != 1.0 and abs(second["ratio/mean"] - 1) > 1e-4
    assert third["ratio/mean"] == third["ratio/max"] == 1.0
    # the same samples again: no new ones are counted
    assert [row["samples"] for row in (first, second, third)] == [N, N, 2 * N]
    assert second["reward/mean"] == first["reward/mean"] != third["reward/mean"]


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_the_kl_in_the_loss_of_a_second_pass_counts_by_the_ratio(
    make_llama, word_tokenizer, tmp_path, micro_batch_size
):
    held = KlSettings(KlPlacement.loss, KlEstimator.k2)
    task = policy_task(
        make_llama(),
        word_tokenizer,
        Rloo(k=2, beta=0.4, num_epochs=2),
        more={"kl": held},
        micro_batch_size=micro_batch_size,
        lr=3e-2,
    )
    train(task, tmp_path, 1)
    batch = task.batch(1)
    outputs = [task.loss(micro, batch.normaliser) for micro in batch.micro_batches]
    sum(output.loss for output in outputs).backward()
    found = {name: p.grad.clone() for name, p in task.model.named_parameters()}
    task.model.zero_grad()
    total, without = 0.0, 0.0
    for micro in batch.micro_batches:
        logprob = token_logprobs(task.model, micro.sequences, 1.0).sequence_logprob()
        ratio, distance = torch.exp(logprob - micro.old_logprob), logprob - micro.ref_logprob
        total = total - (ratio * micro.advantage).sum() / N + 0.4 * (ratio.detach() * distance**2 / 2).sum() / N
        without = without + 0.4 * float((distance.detach() ** 2 / 2).sum()) / N
    held_at = sum(float(output.metrics["kl/loss"]) for output in outputs)
    assert float(sum(output.loss for output in outputs)) == pytest.approx(float(total), rel=1e-5)
    assert held_at > 1e-3 and abs(held_at - without) > 0.05 * held_at
    total.backward()
    for name, parameter in task.model.named_parameters():
        assert torch.allclose(parameter.grad, found[name], rtol=1e-4, atol=1e-6), name


def test_minibatches_cut_one_rollout(make_llama, word_tokenizer):
    whole = policy_task(make_llama(), word_tokenizer, batch_size=2 * N).batch(0)
    task = policy_task(make_llama(), word_tokenizer, Rloo(k=2, rollout_batch_size=2 * N, num_epochs=2))
    parts = [task.batch(step) for step in range(4)]
    # nothing was learned in between, so both rollouts are the same
    (everything,) = whole.micro_batches
    for step, part in enumerate(parts):
        (rows,) = part.micro_batches
        half = slice(step % 2 * N, step % 2 * N + N)
        assert torch.equal(rows.sequences.ids, everything.sequences.ids[half])
        assert torch.equal(rows.advantage, everything.advantage[half])
        assert part.normaliser == N
    assert [part.num_samples for part in parts] == [N, N, 0, 0]
    assert not torch.equal(task.batch(4).micro_batches[0].sequences.ids, parts[0].micro_batches[0].sequences.ids)


@pytest.mark.parametrize("micro_batch_size", [8, 1])
def test_the_baseline_is_updated_once_per_optimizer_batch(make_llama, word_tokenizer, micro_batch_size):
    algorithm = Reinforce(alpha=0.75, rollout_batch_size=2 * N, num_epochs=2)
    task = policy_task(make_llama(), word_tokenizer, algorithm, micro_batch_size=micro_batch_size)
    batches = [task.batch(step) for step in range(8)]
    assert task.baseline.num_updates == 4  # two rollouts of two batches; the second pass is not counted again
    first, second = (batches[step].metrics for step in (0, 1))
    assert first["baseline"] == 0.0
    assert second["baseline"] == pytest.approx(0.25 * first["reward/shaped_mean"])
    later = 0.75 * second["baseline"] + 0.25 * second["reward/shaped_mean"]
    assert batches[4].metrics["baseline"] == pytest.approx(later)


def _slow_gradient(task, batch):
    """REINFORCE's gradient over rows without padding, with the advantages given."""
    model = copy.deepcopy(task.model)
    model.zero_grad()
    for micro in batch.micro_batches:
        for row in range(len(micro)):
            real = micro.sequences.attention_mask[row]
            ids = micro.sequences.ids[row][real]
            counts = micro.sequences.completion_mask[row][real]
            log_probability = torch.log_softmax(model(ids[None]).logits[0] / task.sampling.temperature, -1)
            logprob = sum(log_probability[t - 1, ids[t]] for t in range(len(ids)) if counts[t])
            (-micro.advantage[row] * logprob / N).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_equals_a_slow_implementation(make_model, word_tokenizer, temperature):
    task = policy_task(make_model(), word_tokenizer, temperature=temperature)
    batch = task.batch(0)
    (micro,) = batch.micro_batches
    lengths = micro.sequences.completion_mask.sum(-1)
    assert lengths.min() < lengths.max() <= MAX_NEW
    task.loss(micro, batch.normaliser).loss.backward()
    slow = _slow_gradient(task, batch)
    assert max(float(g.abs().max()) for g in slow.values()) > 0.1
    for name, parameter in task.model.named_parameters():
        assert torch.allclose(parameter.grad, slow[name], rtol=1e-4, atol=1e-5), name


def test_advantages_come_from_the_rewards_of_the_same_prompt(make_llama, word_tokenizer):
    task = policy_task(make_llama(), word_tokenizer)
    (micro,) = task.batch(0).micro_batches
    rewards = [(sum(tokens) % 11 - 5) / 3 for tokens in completions(micro)]
    expected = [rewards[i] - rewards[i ^ 1] for i in range(N)]  # row i and its neighbour share a prompt
    assert micro.advantage.tolist() == pytest.approx(expected, abs=1e-6)
    is_prompt = micro.sequences.attention_mask & ~micro.sequences.completion_mask
    prompts = [row[mask].tolist() for row, mask in zip(micro.sequences.ids, is_prompt, strict=True)]
    assert prompts[0::2] == prompts[1::2]
    assert len({tuple(prompt) for prompt in prompts}) == N // 2


def test_captured_logprobs_equal_a_fresh_forward_pass(make_model, word_tokenizer):
    task = policy_task(make_model(), word_tokenizer, temperature=0.8)
    batch = task.batch(0)
    (micro,) = batch.micro_batches
    fresh, _ = sequence_logprobs(task.model, micro.sequences, 0.8, 3)
    assert torch.allclose(micro.old_logprob, fresh, atol=1e-5)
    assert batch.metrics["rollout/logprob_mismatch"] < 1e-4
    assert micro.old_logprob.std() > 0.5


def test_dropout_is_off_while_sampling_scoring_and_training(make_gpt2, word_tokenizer, tmp_path):
    dropping = make_gpt2(dropout=0.5).train()
    assert not torch.equal(*(dropping(torch.tensor([[3, 4]])).logits for _ in range(2)))
    task, plain = policy_task(dropping, word_tokenizer), policy_task(make_gpt2(dropout=0.0), word_tokenizer)
    batches = [each.batch(0) for each in (task, plain, task)]
    first, second, again = (batch.micro_batches[0] for batch in batches)
    for other in (second, again):
        assert torch.equal(first.sequences.ids, other.sequences.ids)
        assert torch.equal(first.old_logprob, other.old_logprob)
        assert torch.equal(first.ref_logprob, other.ref_logprob)
    losses = [each.loss(first, N).loss for each in (task, task, plain)]
    assert losses[0] == losses[1] == losses[2]
    assert task.evaluate(0) == task.evaluate(0) == plain.evaluate(0)
    rows = train(task, tmp_path, 2)
    assert all(row["ratio/max"] == 1.0 for row in rows)
    assert not task.model.training and not task.reference.training


def test_equal_rewards_leave_every_weight_where_it_is(make_model, word_tokenizer, tmp_path):
    task = policy_task(make_model(), word_tokenizer, Rloo(k=4, beta=0.5), reward=constant_reward)
    before = {name: p.clone() for name, p in task.model.named_parameters()}
    rows = train(task, tmp_path, 2)
    assert [row["loss"] for row in rows] == [0.0, 0.0]
    assert [row["grad_norm"] for row in rows] == [0.0, 0.0]
    assert all(torch.equal(p, before[name]) for name, p in task.model.named_parameters())


@pytest.mark.parametrize("edge", ["pad is eos", "no eos", "eos first", "one token"])
def test_odd_completions_train_like_any_other(make_model, word_tokenizer, tmp_path, edge):
    model = make_model()
    task = policy_task(model, word_tokenizer)
    if edge == "pad is eos":
        word_tokenizer.pad_token = word_tokenizer.eos_token
    elif edge == "no eos":
        word_tokenizer.eos_token = None
        model.generation_config.eos_token_id = model.config.eos_token_id = None
    elif edge == "eos first":
        model.generation_config.eos_token_id = list(range(24))
    else:
        task.sampling = Sampling(1)
    lengths = {"no eos": {MAX_NEW}, "eos first": {1}, "one token": {1}}
    (micro,) = task.batch(0).micro_batches
    found = micro.sequences.completion_mask.sum(-1).tolist()
    assert set(found) == lengths.get(edge, set(found))
    rows = train(task, tmp_path, 2)
    assert rows[0]["kl/k1"] == 0.0 and rows[0]["ratio/mean"] == 1.0
    assert rows[0]["grad_norm"] > 0.01
    assert rows[1]["rollout/logprob_mismatch"] < 1e-4
    truncated = {"no eos": 1.0, "eos first": 0.0}
    assert rows[0]["length/truncated_frac"] == truncated.get(edge, rows[0]["length/truncated_frac"])
    assert rows[0]["length/mean"] == sum(found) / N
    sampled = rows[0]["throughput/rollout_tokens_per_s"] * rows[0]["time/rollout_s"]
    assert sampled == pytest.approx(sum(found))


def test_a_pad_that_is_the_eos_gives_the_same_gradient(make_model, word_tokenizer):
    gradients = []
    for pad_token in ("<|pad|>", "<|eos|>"):
        word_tokenizer.pad_token = pad_token
        task = policy_task(make_model(), word_tokenizer)
        batch = task.batch(0)
        task.loss(batch.micro_batches[0], batch.normaliser).loss.backward()
        gradients.append([p.grad for p in task.model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_metrics_by_hand(make_llama, word_tokenizer):
    task = policy_task(make_llama(), word_tokenizer, gold=lambda prompt, completion: len(completion.split()) / 2)
    batch = task.batch(0)
    (micro,) = batch.micro_batches
    found = completions(micro)
    rewards = torch.tensor([(sum(tokens) % 11 - 5) / 3 for tokens in found])
    metrics = batch.metrics
    assert metrics["reward/mean"] == pytest.approx(float(rewards.mean()))
    assert metrics["reward/std"] == pytest.approx(float(rewards.std(unbiased=False)), rel=1e-5)
    assert metrics["advantage/std"] == pytest.approx(float(micro.advantage.std(unbiased=False)))
    assert metrics["length/mean"] == sum(len(tokens) for tokens in found) / N
    finished = [tokens[-1] in STOPS for tokens in found]
    assert any(finished)
    assert metrics["length/truncated_frac"] == 1 - sum(finished) / N
    texts = [tokens[:-1] if done else tokens for tokens, done in zip(found, finished, strict=True)]
    words = [sum(token > 1 for token in text) for text in texts]
    assert metrics["gold/mean"] == pytest.approx(sum(words) / 2 / N)
    assert 0 < metrics["entropy"] < math.log(24)
    assert batch.num_tokens == int(micro.sequences.attention_mask.sum())
    for row, sample in enumerate(batch.samples):
        assert sample["step"] == 1 and sample["kl"] == 0.0
        assert sample["length"] == len(found[row])
        assert sample["reward"] == pytest.approx(float(rewards[row]))
        assert sample["completion"] == " ".join(f"t{token}" for token in texts[row] if token > 1)
        assert sample["gold"] == words[row] / 2


def test_samples_belong_to_their_minibatch(make_llama, word_tokenizer, tmp_path):
    task = policy_task(make_llama(), word_tokenizer, Rloo(k=2, rollout_batch_size=2 * N))
    train(task, tmp_path, 2)
    for step in (2, 3):
        batch = task.batch(step)
        (micro,) = batch.micro_batches
        kl = (micro.old_logprob - micro.ref_logprob).tolist()
        assert [sample["kl"] for sample in batch.samples] == pytest.approx(kl)
        assert [sample["length"] for sample in batch.samples] == [len(tokens) for tokens in completions(micro)]
        assert batch.metrics["kl/k1"] == pytest.approx(sum(kl) / N, abs=1e-6)


def test_evaluation_repeats_and_scores_the_objective(make_model, word_tokenizer, tmp_path):
    task = policy_task(make_model(), word_tokenizer, Rloo(k=2, beta=0.25))
    at_start = task.evaluate(0)
    assert at_start.metrics["kl/full"] == 0.0
    train(task, tmp_path, 2)
    after = task.evaluate(2)
    assert task.evaluate(7) == after
    assert after.metrics["kl/full"] > 1e-3
    assert after.score == pytest.approx(after.metrics["reward/mean"] - 0.25 * after.metrics["kl/full"])


def test_two_identical_runs_are_equal_to_the_bit(make_llama, word_tokenizer, tmp_path):
    runs = []
    for name in ("a", "b"):
        task = policy_task(make_llama(), word_tokenizer)
        rows = train(task, tmp_path / name, 3)
        torch.rand(13)  # other draws in between do not matter
        clocks = ("time", "throughput")
        kept = [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in rows]
        runs.append((kept, [p.detach() for p in task.model.parameters()]))
    (rows_a, weights_a), (rows_b, weights_b) = runs
    assert rows_a == rows_b
    assert all(torch.equal(a, b) for a, b in zip(weights_a, weights_b, strict=True))
    assert all(a["reward/mean"] != b["reward/mean"] for a, b in itertools.pairwise(rows_a))
