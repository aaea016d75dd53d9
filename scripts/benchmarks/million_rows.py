"""Memory and time of a million rows: reading, pairing, digest and reading back, in a process of its own.

    python scripts/benchmarks/million_rows.py                       # rated responses, as HelpSteer2 has them
    python scripts/benchmarks/million_rows.py --form pairs --rows 100000 --max-gib 1

Writes synthetic rows to a temporary folder, loads them as `data=helpsteer2` or `data=jsonl` does, and prints one JSON
object: seconds of each step and the peak resident memory of the whole process in GiB (the memory-mapped rows that were
touched count as resident, although the system can take them back at any time). Exit status 1 above `--max-gib`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf_cli.data.dataset import Dataset, rows_digest
from rlhf_cli.data.helpsteer2 import load_helpsteer2
from rlhf_cli.data.jsonl import load_jsonl
from rlhf_cli.data.settings import HelpSteer2Settings, JsonlSettings

_WORDS = [f"word{i}" for i in range(2000)]


def _text(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(_WORDS, k=num_words))


def rated_rows(num_rows: int) -> Iterator[dict[str, Any]]:
    """Two responses a prompt, about 500 characters a row."""
    rng = random.Random(0)
    for number in range(num_rows):
        if number % 2 == 0:
            prompt = f"{number} {_text(rng, 20)}"
        ratings = {name: rng.randrange(5) for name in ("helpfulness", "correctness", "coherence")}
        yield {"prompt": prompt, "response": _text(rng, 50), **ratings, "complexity": 2, "verbosity": 2}


def pair_rows(num_rows: int) -> Iterator[dict[str, Any]]:
    """One pair a prompt, about 700 characters a row."""
    rng = random.Random(0)
    for number in range(num_rows):
        yield {"prompt": f"{number} {_text(rng, 20)}", "chosen": _text(rng, 35), "rejected": _text(rng, 35)}


def load(form: str, path: Path, cache: Path) -> Dataset:
    """The rows as the command line loads them."""
    if form == "rated":
        return load_helpsteer2(HelpSteer2Settings(path=str(path), cache_dir=str(cache)))
    return load_jsonl(JsonlSettings(path=str(path), cache_dir=str(cache)))


def peak_gib() -> float:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux' ru_maxrss begins with what the process that started this one held at that moment.
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(encoding="ascii"), re.MULTILINE)
        assert found is not None
        return int(found[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def timed(times: dict[str, float], name: str, step: Callable[[], Any]) -> Any:
    """The step's result; its seconds go into `times`."""
    start = time.perf_counter()
    result = step()
    times[name] = round(time.perf_counter() - start, 2)
    return result


def measure(form: str, num_rows: int, folder: Path) -> dict[str, Any]:
    """Everything a training command does with its rows before it trains."""
    path, cache = folder / "rows.jsonl", folder / "cache"
    rows = rated_rows if form == "rated" else pair_rows
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows(num_rows))
    before, times = peak_gib(), dict[str, float]()
    data: Dataset = timed(times, "load_s", lambda: load(form, path, cache))
    loaded = peak_gib()
    digest = timed(times, "digest_s", lambda: rows_digest(data.sft, data.pairs))
    order = random.Random(1).choices(range(len(data.pairs)), k=10_000)
    timed(times, "random_10k_s", lambda: [data.pairs[i] for i in order])
    timed(times, "load_again_s", lambda: load(form, path, cache))
    return {
        "form": form,
        "rows": num_rows,
        "file_gib": round(path.stat().st_size / 2**30, 3),
        "pairs": len(data.pairs),
        "digest": digest[:12],
        **times,
        "start_gib": round(before, 3),
        "loaded_gib": round(loaded, 3),
        "peak_gib": round(peak_gib(), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Memory and time of loading many rows.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--form", choices=["rated", "pairs"], default="rated")
    parser.add_argument("--max-gib", type=float, default=2.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args.form, args.rows, Path(folder))
    print(json.dumps(result, indent=2))
    return 1 if result["peak_gib"] > args.max_gib else 0


if __name__ == "__main__":
    sys.exit(main())
