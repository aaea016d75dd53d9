"""Which ids are scored, in which batches, and in which precision."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from fixtures_models import CPU, bert_tokenizer, byte_tokenizer, reward_model, tiny_lm
from fixtures_rewards import COMPLETIONS, PROMPTS, ensemble_of
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from rlhf_cli.data.tokenise import collate, prompt_batch
from rlhf_cli.models.tokenizer import same_tokens
from rlhf_cli.rewards.format import RewardFormat
from rlhf_cli.rewards.model import RewardModel
from rlhf_cli.rewards.scoring import score_sequences, token_batches
from rlhf_cli.rollout.engine import Sampling, generate
from rlhf_cli.train.probing import KeptStates
from rlhf_cli.types import Rollout

FORMAT = RewardFormat(max_prompt_tokens=20, max_completion_tokens=16)


def samples() -> Rollout:
    """Of an untrained policy, whose tokens are seldom those that its text would be read as."""
    tokenizer = byte_tokenizer()
    batch = prompt_batch(tokenizer, PROMPTS, range(len(PROMPTS)), 20)
    return generate(tiny_lm(), tokenizer, batch, 2, Sampling(8, 1.0), 3, 0)


def one_sample(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str, is_cut: bool) -> Rollout:
    sequences = collate([(tokenizer("the ")["input_ids"], list(ids))], 0)
    return Rollout(
        sequences=sequences,
        prompts=("the ",),
        completions=(text,),
        completion_ids=(tuple(ids),),
        prompt_index=torch.zeros(1, dtype=torch.long),
        sample_index=torch.zeros(1, dtype=torch.long),
        truncated=torch.tensor([is_cut]),
        sampled_logprob=torch.zeros(1),
        samples_per_prompt=1,
        tokenizer=tokenizer,
    )


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 9), st.integers(1, 60))
def test_batches_hold_every_row_once_and_keep_the_budget(lengths: list[int], rows: int, tokens: int) -> None:
    batches = list(token_batches(lengths, rows, tokens))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[row] for row in batch)
        assert len(batch) <= rows and (len(batch) == 1 or longest * len(batch) <= tokens)
    ends = [lengths[row] for batch in batches for row in batch]
    assert ends == sorted(ends), "rows of one length go together"


class TestSampledIds:
    def test_they_are_scored_as_they_are_where_the_tokenizers_match(self) -> None:
        rollout, tokenizer = samples(), byte_tokenizer()
        found = FORMAT.encode_rollout(tokenizer, rollout)
        assert [tuple(ids) for _, ids in found] == list(rollout.completion_ids)
        finished = (~rollout.truncated).tolist()
        by_text = FORMAT.encode_all(tokenizer, rollout.prompts, rollout.completions, finished)
        assert [prompt for prompt, _ in found] == [prompt for prompt, _ in by_text]
        assert found != by_text, "else the samples show nothing"

    def test_their_text_is_scored_where_they_do_not(self) -> None:
        rollout, other = samples(), bert_tokenizer()
        finished = (~rollout.truncated).tolist()
        expected = FORMAT.encode_all(other, rollout.prompts, rollout.completions, finished)
        assert FORMAT.encode_rollout(other, rollout) == expected

    def test_ids_of_ordinary_samples_are_those_of_training(self) -> None:
        tokenizer = byte_tokenizer()
        text = "film was good ."
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        for is_cut in (False, True):
            sampled = ids[: len(ids) - is_cut]
            found = FORMAT.encode_rollout(tokenizer, one_sample(tokenizer, sampled, text, is_cut))
            assert found == [FORMAT.encode(tokenizer, "the ", text, finished=not is_cut)]

    @pytest.mark.parametrize("is_special", [True, False])
    def test_whatever_ended_it_is_no_text(self, is_special: bool) -> None:
        """A chat model's stop may be no named special token, or, in its generation config, an ordinary one."""
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens([AddedToken("<|stop|>", special=is_special)])
        text = "film was good ."
        ids = [*tokenizer(text)["input_ids"], tokenizer.convert_tokens_to_ids("<|stop|>")]
        found = FORMAT.encode_rollout(tokenizer, one_sample(tokenizer, ids, text, False))
        assert found == [FORMAT.encode(tokenizer, "the ", text)]

    def test_one_model_and_several_read_them_alike(self) -> None:
        rollout, alone = samples(), reward_model()
        assert torch.equal(ensemble_of([alone]).score_rollout(rollout).raw, alone.score_rollout(rollout).raw)


class TestSameTokens:
    def test_a_copy_has_them(self) -> None:
        assert same_tokens(byte_tokenizer(), byte_tokenizer())

    def test_another_kind_another_word_or_another_end_has_not(self) -> None:
        assert not same_tokens(byte_tokenizer(), bert_tokenizer())
        longer, ended = copy.deepcopy(byte_tokenizer()), copy.deepcopy(byte_tokenizer())
        longer.add_tokens(["film"])
        ended.eos_token = ended.pad_token
        assert not same_tokens(byte_tokenizer(), longer) and not same_tokens(byte_tokenizer(), ended)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "distilbert"])
def test_the_head_keeps_its_precision_under_autocast(kind: str) -> None:
    reward = reward_model(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        raw = reward.score(PROMPTS, COMPLETIONS).raw
    assert not torch.equal(raw, raw.bfloat16().float()), (
        "a score in bfloat16 has 8 bits, and ties with its neighbours"
    )


def test_kept_states_are_those_of_the_backbone() -> None:
    reward: RewardModel = reward_model()
    rows = [reward.encode(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    fresh, small = KeptStates(reward.model), KeptStates(reward.model, max_rows=2)
    for chosen in (rows, rows[::-1], rows[1:3]):
        batch = collate(chosen, 0).to(CPU)
        expected = KeptStates(reward.model)(batch)
        for states in (fresh, small):
            torch.testing.assert_close(states(batch), expected, atol=1e-5, rtol=0)
    assert len(fresh._kept) == len(rows) and len(small._kept) <= 2


@pytest.mark.parametrize("kind", ["llama", "distilbert"])
def test_less_than_a_tenth_of_what_is_computed_is_padding(kind: str) -> None:
    """Pairs of 8 to 48 tokens after prompts of 4 to 12."""
    reward = reward_model(kind)
    generator = torch.Generator().manual_seed(0)

    def row(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (1,), generator=generator))
        return torch.randint(3, 20, (length,), generator=generator).tolist()

    prompts = [row(4, 12) for _ in range(32)]
    rows = [(prompt, row(8, 48)) for prompt in prompts for _ in range(2)]
    batch = collate(rows, 0)
    shapes = []
    with torch.no_grad():
        wanted = torch.cat([score_sequences(reward.model, collate([one], 0)) for one in rows])
        embeddings = reward.model.get_input_embeddings()
        hook = embeddings.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].numel()))
        found = score_sequences(reward.model, batch)
        hook.remove()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    num_tokens = sum(len(prompt) + len(completion) for prompt, completion in rows)
    assert batch.ids.numel() > 1.4 * num_tokens, "padded to one rectangle, more than a third would be padding"
    assert sum(shapes) < 1.1 * num_tokens
