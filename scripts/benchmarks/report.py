"""The results as JSON and as Markdown."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from workload import sizes_as_dict

if TYPE_CHECKING:
    from cases import Bench

_PACKAGES = ("torch", "transformers", "trl", "accelerate")
_STEP_NAMES = {
    "rloo_step": "RLOO step",
    "dpo_step": "DPO step",
    "dpo_step_precomputed": "DPO step, reference precomputed",
    "rm_step": "reward model step",
    "generate": "rollout",
}


def as_json(bench: Bench, machine: str, trl_problem: str | None) -> dict[str, Any]:
    """All results, and what they were measured with."""
    return {
        "machine": machine,
        "versions": _versions(),
        "hardware": _hardware(bench.device, bench.threads),
        "command": " ".join(["python", "scripts/benchmarks/speed.py", *sys.argv[1:]]),
        "commit": _commit(),
        "sizes": sizes_as_dict(bench.sizes),
        "precisions": list(bench.precisions),
        "trl": "measured" if trl_problem is None else trl_problem,
        "ceilings": bench.ceilings,
        "cases": bench.cases,
        "ratios": bench.ratios,
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _hardware(device: torch.device, threads: int) -> dict[str, Any]:
    found: dict[str, Any] = {"cpu_capability": torch.backends.cpu.get_cpu_capability(), "threads": threads}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _commit() -> str:
    """Of the code; "+" where files were changed since."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True)
        except OSError:
            return ""
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "HEAD") or "unknown") + ("+" if changed else "")


def write_text(folder: Path, result: dict[str, Any], markdown: str) -> None:
    """Writes <machine>.json and <machine>.md."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{result['machine']}.json"
    file.write_text(json.dumps(_rounded(result), indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(markdown, encoding="utf-8")


def _rounded(value: Any) -> Any:
    """Floats to six digits that count."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return value


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def as_markdown(result: dict[str, Any]) -> str:
    """The tables for people: speed, parts, memory."""
    ceilings = result["ceilings"]
    head = (
        f"`{result['command']}` on {result['machine']}, commit {result['commit'][:8]}, "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + f". Matrix product {ceilings['matmul_fp32_gflops']:,.0f} GFLOP/s in fp32, "
        + f"{ceilings['matmul_bf16_gflops']:,.0f} in bf16; copy {ceilings['copy_gb_per_s']:.1f} GB/s.\n"
    )
    tables = [_speed_table(result), _parts_table(result), _memory_table(result)]
    return "\n".join([head, *(one for one in tables if one)])


def _speed_table(result: dict[str, Any]) -> str:
    rows = []
    for case, name in _STEP_NAMES.items():
        for setting, pair in result["cases"].get(case, {}).get("pairs", {}).items():
            rows.append(
                [
                    name,
                    _setting(setting, pair["flags"]),
                    f"{pair['median_peer_s']:.3f} s",
                    f"{pair['median_ours_s']:.3f} s ({pair['ours_precision']})",
                    f"**{pair['ratio']:.2f}** ({min(pair['ratios']):.2f} to {max(pair['ratios']):.2f})",
                    f"{pair['of_matmul_ceiling']:.0%}",
                ]
            )
    head = ["", "beside", "its time", "ours", "times as fast", "ours of the matrix product ceiling"]
    return _table(head, rows) if rows else ""


def _setting(name: str, flags: dict[str, Any]) -> str:
    side, _, setting = name.partition("_")
    best = flags["name"] if setting == "best" else None
    shown = f"{ {'trl': 'TRL', 'hf': 'generate'}[side] }, {setting}"
    return shown if best is None else f"{shown} ({best})"


def _parts_table(result: dict[str, Any]) -> str:
    rows = []
    for case, name in _STEP_NAMES.items():
        for precision, ours in result["cases"].get(case, {}).get("ours", {}).items():
            if "parts" in ours:
                parts = [f"{key[:-2].replace('_', ' ')} {value:.3f}" for key, value in ours["parts"].items()]
                parts = parts[1:]  # the whole has its own column
                whole = statistics.median(ours["step_s"])
            else:
                parts, whole = [], ours["median_s"]
            rows.append([name, precision, f"{whole:.3f}", ", ".join(parts), f"{ours['tokens_per_s']:,.0f}"])
    return _table(["ours", "precision", "seconds", "of which", "tokens/s"], rows) if rows else ""


def _memory_table(result: dict[str, Any]) -> str:
    rows = []
    for case, name in _STEP_NAMES.items():
        for group in ("memory", "memory_large_vocabulary"):
            found = result["cases"].get(group, {}).get(case)
            if found is None:
                continue
            large = f", vocabulary {result['cases'][group]['vocab_size']:,}" if "limit_bytes" in found else ""
            cells = [
                _mib(found[side]["peak_bytes"]) if side in found else "" for side in ("ours", "equal", "default")
            ]
            if "peak_allocated_bytes" in found["ours"]:  # on a GPU the peaks are these
                cells[0] += f" ({_mib(found['ours']['peak_allocated_bytes'])} allocated)"
            rows.append([name + large, *cells, _mib(found["limit_bytes"]) if "limit_bytes" in found else ""])
    head = ["peak of a step, MiB", "ours", "TRL, equal", "TRL, default", "1.2 x resident + a chunk"]
    return _table(head, rows) if rows else ""


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.0f}"
