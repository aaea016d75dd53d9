"""Rollouts that are drawn from the most likely tokens alone, and the log-probs that are captured with them."""

import pytest
import torch
from fixtures_models import byte_tokenizer, tiny_lm

from rlhf_cli.models.causal import sequence_logits
from rlhf_cli.ops.sampling import truncated_logits
from rlhf_cli.rollout.engine import Sampling, generate
from rlhf_cli.types import PromptBatch

TEMPERATURE = 0.8
PROMPTS = PromptBatch(prompts=("ab", "c", "hello"), ids=((70, 71), (72,), (77, 74, 81, 81, 84)), index=(3, 0, 8))


def rollout_of(**cut):
    return generate(tiny_lm(), byte_tokenizer(), PROMPTS, 4, Sampling(10, TEMPERATURE, **cut), 7, 0)


@torch.no_grad()
def logprobs(rollout, top_k=None, top_p=None):
    """Of each completion's tokens in a fresh pass, renormalised over what the cut leaves; summed."""
    sequences = rollout.sequences
    logits = sequence_logits(tiny_lm(), sequences)[:, :-1].float() / TEMPERATURE
    logprob = torch.log_softmax(truncated_logits(logits, top_k, top_p), -1)
    chosen = logprob.gather(-1, sequences.ids[:, 1:, None])[..., 0]
    return torch.where(sequences.completion_mask[:, 1:], chosen, 0.0).sum(-1)


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.3}, {"top_k": 40, "top_p": 0.5}])
def test_captured_log_probs_are_of_the_tokens_that_were_drawn_from(cut):
    rollout = rollout_of(**cut)
    fresh = logprobs(rollout, **cut)
    assert fresh.isfinite().all(), "every token is one of those"
    assert torch.allclose(rollout.sampled_logprob, fresh, atol=1e-4)
    assert (rollout.sampled_logprob > logprobs(rollout) + 1).all()
    assert rollout.completion_ids != rollout_of().completion_ids


def test_one_token_is_greedy_decoding():
    assert (
        rollout_of(top_k=1).completion_ids
        == generate(tiny_lm(), byte_tokenizer(), PROMPTS, 4, Sampling(10, 0.0), 7, 0).completion_ids
    )


def test_a_cut_of_nothing_changes_no_bit():
    plain, cut = rollout_of(), rollout_of(top_k=10_000, top_p=1.0)
    assert cut.completion_ids == plain.completion_ids
    assert torch.equal(cut.sampled_logprob, plain.sampled_logprob)
