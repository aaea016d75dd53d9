"""The speed benchmark at tiny sizes: it runs, its results have their form, its ratios come from pairs in turns."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[3] / "scripts" / "benchmarks"


def speed(out: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The command's JSON, and what it prints."""
    line = [
        sys.executable,
        str(FOLDER / "speed.py"),
        "--quick",
        "--machine",
        "test",
        "--out",
        str(out),
        *arguments,
    ]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((out / "test.json").read_text(encoding="utf-8")), done.stdout


def test_results_have_their_form_and_ratios_are_of_pairs(tmp_path: Path) -> None:
    # one precision is enough here, and its candidates are few
    steps = ["rloo_step", "dpo_step", "dpo_step_precomputed", "rm_step"]
    cases = [*steps, "generate", "decode_long_prompt", "memory", "memory_large_vocabulary"]
    result, said = speed(tmp_path, *cases, "--precisions", "fp32")
    assert {"machine", "versions", "command", "commit", "ceilings", "cases", "ratios"} <= result.keys()
    assert result["ceilings"]["matmul_fp32_gflops"] > 0 and result["ceilings"]["copy_gb_per_s"] > 0
    names = {f"{case}/trl_{setting}" for case in steps for setting in ("equal", "best")}
    assert names | {"generate/hf_default", "generate/hf_best"} <= result["ratios"].keys()
    for case in (*steps, "generate"):
        for name, pair in result["cases"][case]["pairs"].items():
            quotients = [peer / ours for peer, ours in zip(pair["peer_s"], pair["ours_s"], strict=True)]
            assert len(quotients) == len(pair["ceiling"]) == 2 and pair["of_matmul_ceiling"] > 0
            assert abs(result["ratios"][f"{case}/{name}"] - statistics.median(quotients)) < 2e-3
    for case in steps:
        found = result["cases"][case]
        parts = found["ours"]["fp32"]["parts"]
        for pair in found["pairs"].values():  # the same work on both sides
            assert (
                pair["peer_tokens_per_step"]
                == found["tokens_per_step"]
                == found["ours"]["fp32"]["tokens_per_step"]
            )
        assert parts.keys() >= {"step_s", "optimizer_s", "forward_backward_s"}
    for case in ("dpo_step", "dpo_step_precomputed", "rm_step"):
        ours, theirs = result["cases"][case]["ours"]["fp32"], result["cases"][case]["pairs"]["trl_equal"]
        assert abs(ours["first_loss"] - theirs["peer_first_loss"]) < 1e-4
    rollout = result["cases"]["generate"]
    assert (
        rollout["ours"]["fp32"]["new_tokens"]
        == rollout["new_tokens"]
        == rollout["pairs"]["hf_best"]["peer_new_tokens"]
    )
    for case in ("rloo_step", "dpo_step", "rm_step"):
        peaks = result["cases"]["memory"][case]
        assert result["ratios"][f"memory/{case}"] == pytest.approx(
            peaks["ours"]["peak_bytes"] / peaks["equal"]["peak_bytes"], abs=1e-3
        )
    for case in ("rloo_step", "dpo_step"):
        found = result["cases"]["memory_large_vocabulary"][case]
        assert found["resident_bytes"] == found["ours"]["live_tensor_bytes"] + found["gradient_bytes"]
        assert found["limit_bytes"] == round(1.2 * found["resident_bytes"]) + found["chunk_bytes"]
        assert found["ours"]["live_tensor_bytes"] > found["gradient_bytes"]  # the weights alone are as many
    assert "| RLOO step | TRL, best" in said and said.rstrip().endswith(
        (tmp_path / "test.md").read_text().rstrip()
    )
