"""Models of each architecture as our loading makes them, and the table that says what was shown for which."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures_architectures import ALL, DECODERS, Hub, Loaded
from fixtures_models import CPU

from rlhf_cli.models.loading import load_backbone_as_classifier, load_causal_lm
from rlhf_cli.rewards.format import RewardFormat
from rlhf_cli.rewards.model import RewardModel


@pytest.fixture(autouse=True)
def in_the_table(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    marker, call = request.node.get_closest_marker("matrix"), getattr(request.node, "callspec", None)
    if marker is not None and call is not None:
        record_property("architecture matrix", [call.params["name"], marker.args[0]])


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    """The published folder of an architecture; not to be changed."""
    written: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in written:
            place = tmp_path_factory.mktemp("hub") / "model"
            kind = ALL[name]
            written[name] = kind.write_lm(place) if name in DECODERS else kind.write_classifier(place)
        return written[name]

    return folder


@pytest.fixture
def policy(hub: Hub, name: str) -> Loaded:
    return load_causal_lm("model.path", str(hub(name)), CPU)


@pytest.fixture
def scorer(hub: Hub, name: str) -> RewardModel:
    """The architecture under a new head, in the text format of a short reward model."""
    model, tokenizer = load_backbone_as_classifier("rm.model.path", str(hub(name)), CPU, 3)
    head = model.score if hasattr(model, "score") else model.classifier
    for weight in head.parameters():
        weight.data.mul_(10)  # a new head starts near 0: scores would be alike whatever went wrong
    return RewardModel(model, tokenizer, RewardFormat(max_prompt_tokens=20, max_completion_tokens=14))
