from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fixtures_models import make_job, run_config

from rlhf_cli.rollout.engine import Sampling


def test_what_is_measured_is_drawn_from_all_tokens_whatever_pairs_are_drawn_from(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    config.rollout.temperature, config.rollout.max_rows = 0.7, 9
    job = make_job(config)
    plain = Sampling(16, 0.7, 9, max_tokens=config.rollout.max_tokens)
    assert job.sampling == job.sampling_of_pairs == plain
    config.rollout.top_k, config.rollout.top_p = 5, 0.9
    assert job.sampling == plain
    assert job.sampling_of_pairs == replace(plain, top_k=5, top_p=0.9)
