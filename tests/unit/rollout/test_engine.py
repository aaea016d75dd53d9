import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from rlhf_cli.models.attention import ATTENTION
from rlhf_cli.rollout.engine import Sampling, generate, why_plain
from rlhf_cli.rollout.noise import uniform_noise
from rlhf_cli.types import PromptBatch

SEED, STEP, MAX_NEW = 5, 2, 12
PROMPTS = {11: (3,), 40: (4, 5, 6, 7, 8, 9), 2: (10, 11, 12), 7: (20, 21, 22, 23, 2, 3, 4, 5, 6, 7, 8), 8: (3, 3)}
SEVERAL_EOS = [1, 4, 13, 17]  # so many that rows end all over the place


def _prompt_batch(prompts=None):
    chosen = PROMPTS if prompts is None else prompts
    return PromptBatch(
        prompts=tuple(" ".join(f"t{i}" for i in ids) for ids in chosen.values()),
        ids=tuple(chosen.values()),
        index=tuple(chosen),
    )


def _generate(model, tokenizer, prompts=None, k=3, max_new=MAX_NEW, seed=SEED, step=STEP, **sampling):
    return generate(model, tokenizer, _prompt_batch(prompts), k, Sampling(max_new, **sampling), seed, step)


def _by_row(rollout):
    """Tokens of each (prompt, sample)."""
    keys = zip(rollout.prompt_index.tolist(), rollout.sample_index.tolist(), strict=True)
    return dict(zip(keys, rollout.completion_ids, strict=True))


@torch.no_grad()
def _decode_alone(model, prompt, stop_ids, uniform, temperature=1.0):
    """One row, without cache, batch or padding: tokens and their summed log-prob."""
    ids, total = list(prompt), 0.0
    for number in uniform.tolist():
        logits = model(torch.tensor([ids])).logits[0, -1].double().numpy() / temperature
        probability = np.exp(logits) / np.exp(logits).sum()
        token = int(np.argmax(np.cumsum(probability) > number))
        ids.append(token)
        total += float(np.log(probability[token]))
        if token in stop_ids:
            break
    return tuple(ids[len(prompt) :]), total


@pytest.fixture(params=["layout", "plain"])
def make_lm(make_model, request):
    """Decoded in either way."""

    def make(seed):
        model = make_model(seed=seed)
        model.set_attn_implementation(ATTENTION if request.param == "layout" else "sdpa")
        assert (why_plain(model) is None) is (request.param == "layout")
        return model

    return make


@pytest.fixture
def model(make_lm):
    model = make_lm(seed=1)
    model.generation_config.eos_token_id = SEVERAL_EOS
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_decoding_each_row_alone_without_a_cache(model, word_tokenizer, temperature):
    rollout = _generate(model, word_tokenizer, temperature=temperature)
    row = 0
    for index, prompt in PROMPTS.items():
        for sample in range(3):
            uniform = uniform_noise(SEED, STEP, [index], [sample], MAX_NEW)[0]
            tokens, logprob = _decode_alone(model, prompt, SEVERAL_EOS, uniform, temperature)
            assert rollout.completion_ids[row] == tokens
            assert rollout.sampled_logprob[row].item() == pytest.approx(logprob, abs=1e-4)
            assert bool(rollout.truncated[row]) is (tokens[-1] not in SEVERAL_EOS)
            row += 1
    assert len(rollout) == row == 15
    lengths = {len(tokens) for tokens in rollout.completion_ids}
    assert len(lengths) > 4 and 0 < int(rollout.truncated.sum()) < 15


def test_rows_are_prompt_major_and_laid_out_as_documented(model, word_tokenizer):
    rollout = _generate(model, word_tokenizer, k=2)
    assert rollout.prompt_index.tolist() == [index for index in PROMPTS for _ in range(2)]
    assert rollout.sample_index.tolist() == [0, 1] * 5
    assert rollout.samples_per_prompt == 2
    sequences = rollout.sequences
    for row, tokens in enumerate(rollout.completion_ids):
        prompt = list(PROMPTS.values())[row // 2]
        assert rollout.prompts[row] == " ".join(f"t{i}" for i in prompt)
        used = len(prompt) + len(tokens)
        assert sequences.ids[row, :used].tolist() == [*prompt, *tokens]
        assert sequences.attention_mask[row].tolist() == [i < used for i in range(sequences.ids.shape[1])]
        completion = [len(prompt) <= i < used for i in range(sequences.ids.shape[1])]
        assert sequences.completion_mask[row].tolist() == completion
        words = tokens if rollout.truncated[row] else tokens[:-1]
        assert rollout.completions[row] == " ".join(f"t{i}" for i in words if i > 1)


@pytest.mark.parametrize("max_rows", [1, 3, 6, 7])
def test_how_many_rows_are_decoded_together_changes_no_token(model, word_tokenizer, max_rows):
    together = _generate(model, word_tokenizer)
    chunked = _generate(model, word_tokenizer, max_rows=max_rows)
    assert chunked.completion_ids == together.completion_ids
    assert torch.allclose(chunked.sampled_logprob, together.sampled_logprob, atol=1e-5)
    assert torch.equal(chunked.sequences.ids, together.sequences.ids)


def test_the_order_of_prompts_changes_no_token(model, word_tokenizer):
    together = _by_row(_generate(model, word_tokenizer))
    shuffled = _generate(model, word_tokenizer, prompts={i: PROMPTS[i] for i in (7, 2, 8, 40, 11)})
    assert _by_row(shuffled) == together


def test_a_long_prompt_in_the_batch_changes_no_token(model, word_tokenizer):
    together = _by_row(_generate(model, word_tokenizer))
    padded = _by_row(_generate(model, word_tokenizer, prompts={**PROMPTS, 99: tuple(range(2, 24)) + (3,) * 8}))
    assert {key: padded[key] for key in together} == together


def test_more_samples_or_room_keep_the_ones_there_were(model, word_tokenizer):
    few = _generate(model, word_tokenizer, k=2)
    many = _by_row(_generate(model, word_tokenizer, k=4))
    assert {key: many[key] for key in _by_row(few)} == _by_row(few)
    short = _generate(model, word_tokenizer, k=2, max_new=5)
    assert short.completion_ids == tuple(tokens[:5] for tokens in few.completion_ids)


def test_seed_and_step_change_the_tokens(model, word_tokenizer):
    first = _generate(model, word_tokenizer).completion_ids
    assert _generate(model, word_tokenizer).completion_ids == first
    assert _generate(model, word_tokenizer, seed=SEED + 1).completion_ids != first
    assert _generate(model, word_tokenizer, step=STEP + 1).completion_ids != first


def test_finished_rows_leave_the_batch(model, word_tokenizer):
    sizes = []
    handle = model.base_model.register_forward_pre_hook(
        lambda _module, args, kwargs: sizes.append((args[0] if args else kwargs["input_ids"]).numel()),
        with_kwargs=True,
    )
    rollout = _generate(model, word_tokenizer)
    handle.remove()
    alive = [sum(len(tokens) > t for tokens in rollout.completion_ids) for t in range(1, MAX_NEW)]
    lengths = [len(prompt) for prompt in PROMPTS.values()]  # one prefill for each prompt, not for each sample
    assert sizes[0] == (len(lengths) * max(lengths) if why_plain(model) else sum(lengths))
    assert len(sizes) == 1 + sum(count > 0 for count in alive)
    for size, count in zip(sizes[1:], alive, strict=False):
        assert count <= size < count / 0.8 + 1e-9  # below a fifth of the rows is finished
    assert sizes[-1] < sizes[1]


def test_the_text_is_what_the_tokens_say(make_model):
    words = [
        "<|pad|>",
        "<|eos|>",
        ".",
        "?",
        "!",
        ",",
        "n't",
        "'m",
        "'s",
        "'ve",
        "'re",
        *(f"w{i}" for i in range(13)),
    ]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = WhitespaceSplit()
    tidy = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|eos|>", clean_up_tokenization_spaces=True
    )
    assert tidy.decode([20, 2]) == "w9."  # what some tokenizers do on their own
    rollout = _generate(make_model(seed=1), tidy)
    for tokens, text in zip(rollout.completion_ids, rollout.completions, strict=True):
        assert text == " ".join(words[i] for i in tokens if i > 1)


def test_a_pad_that_is_the_eos_changes_nothing(model, word_tokenizer):
    rollout = _generate(model, word_tokenizer)
    word_tokenizer.pad_token = word_tokenizer.eos_token
    assert word_tokenizer.pad_token_id == word_tokenizer.eos_token_id == 1
    same = _generate(model, word_tokenizer)
    assert same.completion_ids == rollout.completion_ids
    assert torch.allclose(same.sampled_logprob, rollout.sampled_logprob, atol=1e-5)
    assert torch.equal(same.truncated, rollout.truncated)
    assert torch.equal(same.sequences.attention_mask, rollout.sequences.attention_mask)
    assert torch.equal(same.sequences.completion_mask, rollout.sequences.completion_mask)
    assert same.sequences.completion_mask.sum(-1).tolist() == [len(ids) for ids in rollout.completion_ids]


def test_without_any_eos_every_completion_has_the_full_length(make_lm, word_tokenizer):
    model = make_lm(seed=1)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    word_tokenizer.eos_token = None
    rollout = _generate(model, word_tokenizer)
    assert {len(tokens) for tokens in rollout.completion_ids} == {MAX_NEW}
    assert rollout.truncated.all()
    assert any(1 in tokens for tokens in rollout.completion_ids)  # what was the EOS is a token like any other
    for row, tokens in enumerate(rollout.completion_ids):
        prompt = rollout.prompt_index.tolist()[row]
        uniform = uniform_noise(SEED, STEP, [prompt], [row % 3], MAX_NEW)[0]
        assert tokens == _decode_alone(model, PROMPTS[prompt], (), uniform)[0]


def test_eos_as_the_first_token_is_a_completion_of_one_token(make_lm, word_tokenizer):
    model = make_lm(seed=1)
    model.generation_config.eos_token_id = list(range(24))
    rollout = _generate(model, word_tokenizer)
    assert [len(tokens) for tokens in rollout.completion_ids] == [1] * 15
    assert not rollout.truncated.any()
    assert rollout.completions == ("",) * 15
    assert rollout.sequences.completion_mask.sum(-1).tolist() == [1] * 15
    assert (rollout.sampled_logprob < 0).all()


def test_one_token_is_all_there_is_room_for(model, word_tokenizer):
    full = _generate(model, word_tokenizer)
    ends = [1, full.completion_ids[0][0]]
    model.generation_config.eos_token_id = ends
    rollout = _generate(model, word_tokenizer, max_new=1)
    assert rollout.completion_ids == tuple(tokens[:1] for tokens in full.completion_ids)
    ended = [tokens[0] in ends for tokens in rollout.completion_ids]
    assert rollout.truncated.tolist() == [not end for end in ended]
    assert any(ended) and not all(ended)


def test_an_eos_in_the_last_place_is_not_cut(model, word_tokenizer):
    full = _generate(model, word_tokenizer)
    row = next(i for i, tokens in enumerate(full.completion_ids) if 3 <= len(tokens) < MAX_NEW)
    tight = _generate(model, word_tokenizer, max_new=len(full.completion_ids[row]))
    assert tight.completion_ids[row] == full.completion_ids[row]
    assert not tight.truncated[row]


@pytest.mark.parametrize("temperature", [0.0, 1e-4])
def test_towards_temperature_zero_it_is_the_greedy_decoding_of_transformers(model, word_tokenizer, temperature):
    rollout = _generate(model, word_tokenizer, k=1, temperature=temperature)
    for prompt, tokens in zip(PROMPTS.values(), rollout.completion_ids, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_NEW)
        assert tokens == tuple(theirs[0, len(prompt) :].tolist())
    assert len(set(rollout.completion_ids)) > 1
