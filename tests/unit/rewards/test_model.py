from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_models import CPU, byte_tokenizer, edit_json, reward_model, tiny_lm

from rlhf_cli.data.tokenise import collate, encode_completion, encode_prompt
from rlhf_cli.errors import RequestError
from rlhf_cli.models.loading import save_model
from rlhf_cli.rewards.format import RewardFormat, store_format
from rlhf_cli.rewards.model import RewardModel, load_reward_model
from rlhf_cli.rewards.scoring import score_sequences
from rlhf_cli.train.reward import encode
from rlhf_cli.types import Message, Preference

EOS = 1  # of byte_tokenizer
DECODERS = ["llama", "gpt2"]
KINDS = [*DECODERS, "distilbert"]

PROMPTS = ["the film ", "a ", "the plot is ", "the ", "funny "]
COMPLETIONS = ["was good .", "warm , funny story !", "bad and slow .", "x", "plot is bad , the film was good !"]


@pytest.fixture(scope="module", params=KINDS)
def reward(request: pytest.FixtureRequest) -> RewardModel:
    return reward_model(request.param)


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> RewardModel:
    return reward_model(request.param)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.std() > 0.01, "the scores tell the rows apart"
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


class TestScore:
    def test_batches_and_order_change_nothing(self, reward: RewardModel) -> None:
        expected = torch.cat([reward.score([p], [c]).raw for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
        for size in (1, 2, 3, 5, 128):
            close(reward.score(PROMPTS, COMPLETIONS, batch_size=size).raw, expected)
        order = [3, 0, 4, 2, 1]
        shuffled = reward.score([PROMPTS[i] for i in order], [COMPLETIONS[i] for i in order], batch_size=2).raw
        close(shuffled, expected[order])

    def test_padding_changes_nothing(self, decoder: RewardModel) -> None:
        rows = [decoder.encode(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        expected = torch.cat([score_sequences(decoder.model, collate([row], 0)) for row in rows])
        for side in ("right", "left"):
            for length in (None, 50):
                for pad_id in (0, EOS, rows[0][1][0]):  # EOS or a token of the text is as good a filling
                    batch = collate(rows, pad_id, side, length)
                    close(score_sequences(decoder.model, batch).detach(), expected.detach())

    def test_right_padding_changes_nothing_in_an_encoder(self) -> None:
        reward = reward_model("distilbert")
        rows = [reward.encode(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        expected = torch.cat([score_sequences(reward.model, collate([row], 0)) for row in rows])
        for pad_id in (0, 7):
            close(score_sequences(reward.model, collate(rows, pad_id, length=40)).detach(), expected.detach())

    def test_the_last_real_token_is_read(self, decoder: RewardModel) -> None:
        row = decoder.encode(PROMPTS[0], COMPLETIONS[0])
        ids = torch.tensor([[*row[0], *row[1]]])
        with torch.no_grad():
            hidden = decoder.model.base_model(ids).last_hidden_state
            expected = hidden[0, -1] @ decoder.model.score.weight[0]
            found = score_sequences(decoder.model, collate([row], 0, length=30))
        torch.testing.assert_close(found[0, 0], expected, atol=1e-5, rtol=0)

    def test_an_encoder_is_read_by_its_own_head(self) -> None:
        reward = reward_model("distilbert")
        row = reward.encode(PROMPTS[0], COMPLETIONS[0])
        with torch.no_grad():
            expected = reward.model(torch.tensor([[*row[0], *row[1]]])).logits[0, 0]
            found = score_sequences(reward.model, collate([row], 0, length=30))
        torch.testing.assert_close(found[0, 0], expected, atol=1e-5, rtol=0)

    def test_pad_that_is_a_text_token(self, decoder: RewardModel) -> None:
        expected = decoder.score(PROMPTS, COMPLETIONS).raw
        end = decoder.encode(PROMPTS[0], COMPLETIONS[0])[1][-2]
        model, before = decoder.model, decoder.model.config.pad_token_id
        try:
            model.config.pad_token_id = end
            close(decoder.score(PROMPTS, COMPLETIONS).raw, expected)
        finally:
            model.config.pad_token_id = before

    def test_gradients_reach_the_whole_model(self, reward: RewardModel) -> None:
        rows = [reward.encode(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        score_sequences(reward.model, collate(rows, 0)).sum().backward()
        without = [name for name, p in reward.model.named_parameters() if p.grad is None or not p.grad.any()]
        reward.model.zero_grad()
        assert [name for name in without if "k_lin.bias" not in name] == []  # softmax ignores a constant

    def test_nothing_to_score(self, reward: RewardModel) -> None:
        assert reward.score([], []).raw.shape == reward.score([], []).reward.shape == (0,)

    def test_unequal_numbers_are_refused(self, reward: RewardModel) -> None:
        with pytest.raises(ValueError, match=r"longer|shorter"):
            reward.score(PROMPTS, COMPLETIONS[:2])
        with pytest.raises(ValueError, match=r"longer|shorter"):
            reward.score(PROMPTS, COMPLETIONS, [True] * 6)


class TestFormat:
    def test_training_and_scoring_see_the_same_ids(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reward = reward_model("llama", max_prompt_tokens=6, max_completion_tokens=5)
        chat = (Message("user", "was the film good ?"),)
        pairs = [Preference(p, c, "x") for p, c in zip([*PROMPTS[:-1], chat], COMPLETIONS, strict=True)]
        trained = [chosen for chosen, _, _ in encode(reward, pairs)]
        scored: dict[int, list[int]] = {}

        def spy(_: object, sequences: object) -> torch.Tensor:
            for ids, real in zip(sequences.ids, sequences.attention_mask, strict=True):
                scored[len(scored)] = ids[real].tolist()
            return torch.zeros(len(sequences.ids), 1)

        monkeypatch.setattr("rlhf_cli.rewards.scoring.score_sequences", spy)
        reward.score([pair.prompt for pair in pairs], [pair.chosen for pair in pairs], batch_size=2)
        assert sorted(scored.values()) == sorted([*prompt, *completion] for prompt, completion in trained)
        tokenizer = reward.tokenizer
        assert trained == [
            (encode_prompt(tokenizer, p.prompt, 6), encode_completion(tokenizer, p.chosen, 5, append_eos=True))
            for p in pairs
        ]

    def test_a_cut_completion_has_no_eos(self) -> None:
        reward = reward_model()
        assert reward.encode("the ", "film", finished=True)[1][-1] == EOS
        assert (
            reward.encode("the ", "film", finished=True)[1][:-1]
            == reward.encode("the ", "film", finished=False)[1]
        )
        scores = reward.score(["the "] * 2, ["film"] * 2, finished=[True, False]).raw
        rows = [reward.encode("the ", "film", finished) for finished in (True, False)]
        expected = torch.cat([score_sequences(reward.model, collate([row], 0)) for row in rows])
        torch.testing.assert_close(scores, expected.detach()[:, 0], atol=1e-5, rtol=0)
        assert scores[0] != scores[1]

    def test_without_eos(self) -> None:
        reward = reward_model(append_eos=False)
        assert EOS not in reward.encode("the ", "film")[1]

    def test_standardised(self) -> None:
        scores = reward_model(mean=0.5, std=4.0).score(PROMPTS, COMPLETIONS)
        torch.testing.assert_close(scores.reward, (scores.raw - 0.5) / 4.0)
        raw = reward_model().score(PROMPTS, COMPLETIONS)
        assert torch.equal(raw.reward, raw.raw) and torch.equal(raw.raw, scores.raw)


class TestScale:
    def test_its_own_samples_have_mean_0_and_deviation_1(self, tmp_path: Path) -> None:
        reward_model().save(tmp_path)
        before = load_reward_model("rm.path", str(tmp_path), CPU).score(PROMPTS, COMPLETIONS)
        raw = before.raw.double()
        store_format(tmp_path, mean=float(raw.mean()), std=float(raw.std()))
        after = load_reward_model("rm.path", str(tmp_path), CPU).score(PROMPTS, COMPLETIONS)
        assert float(after.reward.mean()) == pytest.approx(0, abs=1e-6)
        assert float(after.reward.std()) == pytest.approx(1, abs=1e-6)
        assert torch.equal(after.raw, before.raw)

    def test_nothing_else_changes(self, tmp_path: Path) -> None:
        reward_model(append_eos=False).save(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        others = {file: file.read_bytes() for file in tmp_path.iterdir() if file.name != "config.json"}
        store_format(tmp_path, mean=1.5, std=0.25)
        config["rlhf_reward"] |= {"mean": 1.5, "std": 0.25}
        assert json.loads((tmp_path / "config.json").read_text()) == config
        assert {file: file.read_bytes() for file in tmp_path.iterdir() if file.name != "config.json"} == others

    @pytest.mark.parametrize(
        "scale", [(0.0, 0.0), (0.0, -1.0), (0.0, np.nan), (0.0, np.inf), (np.inf, 1.0), (np.nan, 1.0)]
    )
    def test_a_reward_that_does_not_vary(self, scale: tuple[float, float], tmp_path: Path) -> None:
        with pytest.raises(RequestError, match=r"^rm\.standardize: the reward model gives mean .* on SFT samples"):
            store_format(tmp_path, mean=scale[0], std=scale[1])


PLAIN = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
tokenizer.padding_side = "right"
batch = tokenizer([text + (tokenizer.eos_token or "") for text in texts], padding=True, return_tensors="pt")
inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
with torch.no_grad():
    logits = model(**inputs).logits
assert batch["attention_mask"].min() == 0, "rows of unequal length"
print(json.dumps({"logits": logits[:, 0].tolist(), "shape": list(logits.shape), "config": model.config.rlhf_reward}))
"""


class TestSaved:
    def test_format_and_scale_survive(self, reward: RewardModel, tmp_path: Path) -> None:
        text_format = RewardFormat(31, 17, append_eos=False, mean=-0.25, std=1.5)
        changed = RewardModel(reward.model, reward.tokenizer, text_format)
        changed.save(tmp_path)
        loaded = load_reward_model("rm.path", str(tmp_path), CPU)
        assert loaded.format == text_format
        one, other = loaded.score(PROMPTS, COMPLETIONS), changed.score(PROMPTS, COMPLETIONS)
        assert torch.equal(one.raw, other.raw) and torch.equal(one.reward, other.reward)

    def test_plain_transformers_gives_the_raw_logits_in_a_fresh_process(self, tmp_path: Path) -> None:
        reward = reward_model("llama", max_prompt_tokens=40, max_completion_tokens=40, mean=0.3, std=0.7)
        reward.save(tmp_path)
        # whole prompts, so that one text has the ids of prompt and completion encoded apart
        prompts, completions = ["the film", "a", "the plot"], [" was good .", " warm , funny story !", " is bad"]
        texts = [p + c for p, c in zip(prompts, completions, strict=True)]
        rows = [reward.encode(p, c) for p, c in zip(prompts, completions, strict=True)]
        assert [[*a, *b] for a, b in rows] == [[*reward.tokenizer(text)["input_ids"], EOS] for text in texts]
        result = subprocess.run(
            [sys.executable, "-c", PLAIN, str(tmp_path), json.dumps(texts)],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        found = json.loads(result.stdout.splitlines()[-1])
        assert found["shape"] == [3, 1]
        assert found["logits"] == pytest.approx(reward.score(prompts, completions).raw.tolist(), abs=1e-5)
        assert found["config"] == json.loads(json.dumps(asdict(reward.format)))

    def test_unknown_settings(self, tmp_path: Path) -> None:
        reward_model().save(tmp_path)
        stored = json.loads((tmp_path / "config.json").read_text())["rlhf_reward"]
        edit_json(tmp_path / "config.json", rlhf_reward={**stored, "template": "x", "alpha": 1})
        with pytest.raises(RequestError) as caught:
            load_reward_model("rm.path", str(tmp_path), CPU)
        assert str(caught.value) == f"rm.path={tmp_path}: unknown rlhf_reward settings alpha, template"

    def test_missing_settings(self, tmp_path: Path) -> None:
        reward_model().save(tmp_path)
        edit_json(tmp_path / "config.json", rlhf_reward={"append_eos": True})
        with pytest.raises(RequestError) as caught:
            load_reward_model("rm.path", str(tmp_path), CPU)
        assert str(caught.value) == (
            f"rm.path={tmp_path}: rlhf_reward has no max_completion_tokens, max_prompt_tokens"
        )

    def test_a_classifier_from_elsewhere(self, tmp_path: Path) -> None:
        reward = reward_model()
        save_model(reward.model, reward.tokenizer, tmp_path)
        with pytest.raises(
            RequestError, match=r"not a reward model of this project: no rlhf_reward in config\.json"
        ):
            load_reward_model("rm.path", str(tmp_path), CPU)

    def test_several_labels(self, tmp_path: Path) -> None:
        reward = reward_model()
        reward.model.score.weight = torch.nn.Parameter(reward.model.score.weight.detach().expand(2, 16).clone())
        reward.model.config.num_labels = 2
        reward.save(tmp_path)
        with pytest.raises(RequestError, match="has 2 labels; a scalar reward model has one"):
            load_reward_model("rm.path", str(tmp_path), CPU)

    def test_a_language_model(self, tmp_path: Path) -> None:
        save_model(tiny_lm(), byte_tokenizer(), tmp_path)
        with pytest.raises(RequestError, match=r"^rm\.path="):
            load_reward_model("rm.path", str(tmp_path), CPU)
