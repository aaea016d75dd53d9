from __future__ import annotations

from pathlib import Path

from fixtures_models import make_job, run_config

from rlhf_cli.rollout.engine import Sampling


def test_what_is_measured_is_drawn_from_all_tokens_whatever_pairs_are_drawn_from(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    config.rollout.temperature, config.rollout.max_rows = 0.7, 9
    job = make_job(config)
    assert job.sampling == job.sampling_of_pairs == Sampling(16, 0.7, 9)
    config.rollout.top_k, config.rollout.top_p = 5, 0.9
    assert job.sampling == Sampling(16, 0.7, 9)
    assert job.sampling_of_pairs == Sampling(16, 0.7, 9, top_k=5, top_p=0.9)
