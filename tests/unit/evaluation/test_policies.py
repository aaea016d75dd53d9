from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from fixtures_models import FP32, bos_tokenizer, byte_tokenizer, gpt2_lm, reward_model, tiny_lm
from transformers import PreTrainedModel

from rlhf_cli.data.tokenise import collate, cut_opening, encode_examples, encode_prompt
from rlhf_cli.evaluation.policies import Measured, Policy, Questions, measure, summarise
from rlhf_cli.evaluation.text_metrics import distinct_n_per_prompt
from rlhf_cli.models.causal import full_kls, sequence_logprobs
from rlhf_cli.models.tokenizer import ensure_pad_token
from rlhf_cli.rollout.engine import Sampling, generate
from rlhf_cli.train.precision import Precision
from rlhf_cli.types import Example, Message, Opening, Preference, Prompt, PromptBatch, Rollout

PROMPTS: tuple[Prompt, ...] = ("the film ", "a ", (Message("user", "the plot ?"),), "the ", "", "a warm ")
PAIRS = [Preference("the film ", "was good .", "was bad ."), Preference("a ", "warm , funny story !", "x")]
K, LENGTH, TEMPERATURE = 3, 10, 0.9

QUESTIONS = Questions(
    prompts=PROMPTS,
    preferred=PAIRS,
    max_prompt_tokens=16,
    max_completion_tokens=12,
    sampling=Sampling(LENGTH, TEMPERATURE),
    samples_per_prompt=K,
    seed=7,
)


def policy(name: str, seed: int = 0, eos_bonus: float = 0.5) -> Policy:
    """A random policy; the bonus makes some of its completions end early."""
    model = tiny_lm(seed)
    with torch.no_grad():
        model.model.norm.weight.mul_(0.5)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # no longer tied
        model.lm_head.weight[1] *= 1 + eos_bonus
    return Policy(name, model, byte_tokenizer())


BASE, OTHER = policy("sft", 0), policy("rloo", 1)


def gold(prompt: Prompt, completion: str) -> float:
    return len(completion) + (10.0 if isinstance(prompt, tuple) else 0.0)


def measured(subject: Policy, reference: Policy = BASE, **changes: object) -> Measured:
    return measure(subject, reference, reward_model(mean=0.3, std=2.0), gold, replace(QUESTIONS, **changes), FP32)


def rollout_of(subject: Policy, seed: int = 7) -> Rollout:
    ids = tuple(tuple(encode_prompt(subject.tokenizer, prompt, 16)) for prompt in PROMPTS)
    batch = PromptBatch(PROMPTS, ids, tuple(range(len(PROMPTS))))
    return generate(subject.model, subject.tokenizer, batch, K, Sampling(LENGTH, TEMPERATURE), seed, 0)


def per_prompt(values: Sequence[float] | torch.Tensor | np.ndarray) -> np.ndarray:
    return np.asarray(values, dtype=np.float64).reshape(len(PROMPTS), K).mean(axis=1)


@pytest.fixture(scope="module")
def other() -> Measured:
    return measured(OTHER)


@pytest.fixture(scope="module")
def base() -> Measured:
    return measured(BASE)


class TestOpenings:
    """Prompts that are cut by the policy's tokenizer, with the label of the text they were cut from."""

    PROMPTS = (
        Opening("the film was good", 2, "positive"),
        Opening("the plot is bad and slow", 2, "negative"),
        Opening("a warm , funny story !", 3, "positive"),
    )

    def test_the_reward_model_reads_what_the_policy_was_asked(self) -> None:
        prompts = tuple(cut_opening(byte_tokenizer(), prompt) for prompt in self.PROMPTS)
        cut, plain = measured(OTHER, prompts=self.PROMPTS), measured(OTHER, prompts=prompts)
        assert [row["prompt"] for row in cut.rows] == [prompt for prompt in prompts for _ in range(K)]
        assert list(cut.rows) == list(plain.rows)

    def test_rewards_by_label(self) -> None:
        cut = measured(OTHER, prompts=self.PROMPTS)
        for metric in ("reward/mean", "gold/mean"):
            np.testing.assert_array_equal(cut.means[f"{metric}/positive"], cut.means[metric][[0, 2]])
            np.testing.assert_array_equal(cut.means[f"{metric}/negative"], cut.means[metric][[1]])
        base = measured(BASE, prompts=self.PROMPTS)
        value, delta = summarise([base, cut], "sft", 100, 0)["rloo"]["reward/mean/positive"]
        assert value.n == 2 and delta is not None
        difference = cut.means["reward/mean"][[0, 2]] - base.means["reward/mean"][[0, 2]]
        assert delta.value == pytest.approx(difference.mean())

    def test_no_labels_no_figures(self, other: Measured) -> None:
        assert not [name for name in other.means if name.count("/") > 1]


class TestMeasure:
    def test_every_metric_is_there(self, other: Measured) -> None:
        assert set(other.means) == {
            "reward/mean",
            "reward/raw_mean",
            "gold/mean",
            "kl/full",
            "kl/k1",
            "length/mean",
            "length/truncated_frac",
            "distinct/1",
            "distinct/2",
        }
        assert set(other.ratios) == {"perplexity/samples", "perplexity/preferred"}
        for column in other.means.values():
            assert column.shape == (len(PROMPTS),) and np.isfinite(column).all()

    def test_means_by_hand(self, other: Measured) -> None:
        rollout = rollout_of(OTHER)
        assert 0 < rollout.truncated.float().mean() < 1, "some completions end, some are cut"
        scores = reward_model(mean=0.3, std=2.0).score_rollout(rollout)
        lengths = [len(ids) for ids in rollout.completion_ids]
        expected = {
            "reward/mean": per_prompt(scores.reward),
            "reward/raw_mean": per_prompt(scores.raw),
            "gold/mean": per_prompt(list(map(gold, rollout.prompts, rollout.completions))),
            "length/mean": per_prompt(lengths),
            "length/truncated_frac": per_prompt(rollout.truncated),
            "distinct/1": distinct_n_per_prompt(rollout.completions, K, 1),
            "distinct/2": distinct_n_per_prompt(rollout.completions, K, 2),
            "kl/full": per_prompt(full_kls(OTHER.model, BASE.model, rollout.sequences, TEMPERATURE, 64)),
        }
        own, _ = sequence_logprobs(OTHER.model, rollout.sequences, TEMPERATURE, 64)
        theirs, _ = sequence_logprobs(BASE.model, rollout.sequences, TEMPERATURE, 64)
        expected["kl/k1"] = per_prompt(own.double() - theirs.double())
        for name, column in expected.items():
            np.testing.assert_allclose(other.means[name], column, atol=2e-5, err_msg=name)
        assert other.means["kl/full"].min() > 0.01

    def test_perplexities_by_hand(self, other: Measured) -> None:
        rollout = rollout_of(OTHER)
        nll, tokens = other.ratios["perplexity/samples"]
        plain, _ = sequence_logprobs(BASE.model, rollout.sequences, 1.0, 64)  # of the reference, at temperature 1
        np.testing.assert_allclose(nll, per_prompt(-plain), atol=2e-5)
        np.testing.assert_allclose(tokens, per_prompt([len(ids) for ids in rollout.completion_ids]))

        nll, tokens = other.ratios["perplexity/preferred"]
        rows = encode_examples(byte_tokenizer(), [Example(p.prompt, p.chosen) for p in PAIRS], 16, 12)
        plain, _ = sequence_logprobs(OTHER.model, collate(rows, 0), 1.0, 64)  # of the policy itself
        np.testing.assert_allclose(nll, -plain.numpy(), atol=2e-5)
        assert tokens.tolist() == [len(completion) for _, completion in rows]

    def test_rows_are_complete(self, other: Measured) -> None:
        rollout = rollout_of(OTHER)
        assert len(other.rows) == len(PROMPTS) * K
        assert [(row["prompt_index"], row["sample"]) for row in other.rows] == [
            (p, s) for p in range(len(PROMPTS)) for s in range(K)
        ]
        assert [row["completion"] for row in other.rows] == list(rollout.completions)
        assert {row["policy"] for row in other.rows} == {"rloo"}
        assert other.rows[0]["prompt"] == "the film "
        assert other.rows[2 * K]["prompt"] == [{"role": "user", "content": "the plot ?"}]
        for name in ("reward/mean", "reward/raw_mean", "gold/mean", "kl/full", "kl/k1", "length/mean"):
            np.testing.assert_allclose(per_prompt([row[name] for row in other.rows]), other.means[name], atol=1e-9)
        assert json.loads(json.dumps(list(other.rows), allow_nan=False)) == list(other.rows)

    def test_policies_see_the_same_noise(self) -> None:
        again = policy("copy", 1)
        assert [row["completion"] for row in measured(again).rows] == [
            row["completion"] for row in measured(OTHER).rows
        ]
        other_seed = measured(again, seed=8)
        assert [row["completion"] for row in other_seed.rows] != [
            row["completion"] for row in measured(OTHER).rows
        ]

    def test_asking_fewer_changes_no_sample(self, other: Measured) -> None:
        fewer = measured(OTHER, prompts=PROMPTS[:4], samples_per_prompt=2)
        expected = [row["completion"] for row in other.rows if row["prompt_index"] < 4 and row["sample"] < 2]
        assert [row["completion"] for row in fewer.rows] == expected

    def test_another_vocabulary_leaves_kl_out(self) -> None:
        tokenizer = bos_tokenizer()
        ensure_pad_token(tokenizer)
        stranger = Policy("stranger", gpt2_lm(tokenizer), tokenizer)
        result = measured(stranger)
        assert not {"kl/full", "kl/k1"} & set(result.means) and "perplexity/samples" not in result.ratios
        assert {"reward/mean", "gold/mean", "length/mean", "distinct/1"} <= set(result.means)
        nll, tokens = result.ratios["perplexity/preferred"]  # in its own tokens
        rows = encode_examples(tokenizer, [Example(p.prompt, p.chosen) for p in PAIRS], 16, 12)
        plain, _ = sequence_logprobs(stranger.model, collate(rows, tokenizer.pad_token_id), 1.0, 64)
        np.testing.assert_allclose(nll, -plain.numpy(), atol=2e-5)
        assert tokens.tolist() == [len(completion) for _, completion in rows]
        table = summarise([measured(BASE), result], "sft", 50, 0)["stranger"]
        assert "kl/full" not in table and table["reward/mean"][1] is not None

    def test_an_equal_vocabulary_of_another_object(self) -> None:
        reloaded = Policy(
            "copy", OTHER.model, byte_tokenizer().__class__(tokenizer_object=byte_tokenizer()._tokenizer)
        )
        reloaded.tokenizer.pad_token, reloaded.tokenizer.eos_token = "<|pad|>", "<|eos|>"
        assert "kl/full" in measured(reloaded).means

    def test_parts_that_are_not_known_are_left_out(self) -> None:
        result = measure(OTHER, BASE, None, None, replace(QUESTIONS, preferred=[]), FP32)
        assert not {"reward/mean", "reward/raw_mean", "gold/mean"} & set(result.means)
        assert set(result.ratios) == {"perplexity/samples"}
        assert "reward/mean" not in result.rows[0]

    def test_the_precision_of_the_run(self) -> None:
        half = measure(OTHER, BASE, None, None, QUESTIONS, Precision("bf16", FP32.device))
        nll, tokens = half.ratios["perplexity/preferred"]
        full, _ = measured(OTHER).ratios["perplexity/preferred"]
        assert (nll != full).any()
        np.testing.assert_allclose(nll / tokens, full / tokens, atol=0.1)


class TestSummary:
    def test_the_reference_against_itself(self, base: Measured) -> None:
        copy = replace(measured(replace(BASE, name="copy")), name="copy")
        assert not copy.means["kl/full"].any() and not copy.means["kl/k1"].any()
        table = summarise([base, copy], "sft", 200, 0)
        assert all(delta is None for _, delta in table["sft"].values())
        for metric, (estimate, delta) in table["copy"].items():
            assert delta is not None
            assert (delta.value, delta.lo, delta.hi) == (0.0, 0.0, 0.0), metric
            assert estimate == table["sft"][metric][0]
        for metric in ("kl/full", "kl/k1"):
            estimate, _ = table["sft"][metric]
            assert (estimate.value, estimate.lo, estimate.hi) == (0.0, 0.0, 0.0)

    def test_values_are_plain_means(self, base: Measured, other: Measured) -> None:
        table = summarise([base, other], "sft", 200, 0)
        assert set(table) == {"sft", "rloo"}
        for metric, column in other.means.items():
            estimate, delta = table["rloo"][metric]
            assert estimate.value == pytest.approx(column.mean(), abs=1e-12)
            assert estimate.lo <= estimate.value <= estimate.hi and estimate.n == len(PROMPTS)
            assert delta is not None
            assert delta.value == pytest.approx((column - base.means[metric]).mean(), abs=1e-12)
            assert delta.lo <= delta.value <= delta.hi
        for metric, (numerator, denominator) in other.ratios.items():
            estimate, delta = table["rloo"][metric]
            mine = math.exp(numerator.sum() / denominator.sum())
            theirs = math.exp(base.ratios[metric][0].sum() / base.ratios[metric][1].sum())
            assert estimate.value == pytest.approx(mine)
            assert delta is not None and delta.value == pytest.approx(mine - theirs)
        assert table["rloo"]["perplexity/preferred"][0].n == len(PAIRS)

    def test_differences_are_paired(self, base: Measured) -> None:
        # a constant lead has no spread, however much the prompts differ
        ahead = replace(base, name="ahead", means={name: column + 0.25 for name, column in base.means.items()})
        estimate, delta = summarise([base, ahead], "sft", 200, 0)["ahead"]["gold/mean"]
        assert delta is not None
        assert (delta.value, delta.lo, delta.hi) == pytest.approx((0.25, 0.25, 0.25), abs=1e-9)
        assert estimate.hi - estimate.lo > 0.5

    def test_what_the_reference_does_not_have_has_no_difference(self, base: Measured, other: Measured) -> None:
        more = replace(
            other,
            means={**other.means, "extra": np.ones(len(PROMPTS))},
            ratios={**other.ratios, "extra/ratio": (np.ones(3), np.ones(3))},
        )
        table = summarise([base, more], "sft", 50, 0)["rloo"]
        assert (table["extra"][0].value, table["extra"][1]) == (1.0, None)
        assert (table["extra/ratio"][0].value, table["extra/ratio"][1]) == (pytest.approx(math.e), None)

    def test_the_seed_decides_the_intervals(self, base: Measured, other: Measured) -> None:
        one, same, another = (summarise([base, other], "sft", 100, seed)["rloo"] for seed in (1, 1, 2))
        assert one == same
        found = [table["gold/mean"][0] for table in (one, another)]
        assert found[0].value == found[1].value and found[0].lo != found[1].lo

    def test_order_does_not_matter(self, base: Measured, other: Measured) -> None:
        assert summarise([base, other], "sft", 100, 3) == summarise([other, base], "sft", 100, 3)


def test_models_are_only_read() -> None:
    model: PreTrainedModel = OTHER.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    measured(OTHER)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
