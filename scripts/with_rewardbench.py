"""The `rewardbench` command on a reward model of ours: its accuracy, and ours on the same pairs.

    python -m venv rb && rb/bin/pip install torch rewardbench==0.1.4 transformers==4.51.0 trl==0.17.0 "setuptools<81"
    python scripts/with_rewardbench.py outputs/my-rm --python rb/bin/python

rewardbench pins transformers 4.51 and so has an environment of its own; it loads what we saved with that. It reads
conversations through a chat template: here one that puts prompt and completion behind each other and ends with the
EOS, which is how a reward model on the embedded data reads them. The command moves its batches to a GPU by name;
without one that name is read as the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from study import quiet, reviews_of

from rlhf_cli.evaluation.reward_models import score_pairs
from rlhf_cli.models.loading import resolve_path
from rlhf_cli.rewards.model import load_reward_model
from rlhf_cli.train.precision import Precision
from rlhf_cli.types import Preference

TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if messages[-1].role == 'assistant' %}{{ eos_token }}{% endif %}"
)
THEIRS = """
import sys
import torch
from transformers import BatchEncoding
if not torch.cuda.is_available():
    to = BatchEncoding.to
    BatchEncoding.to = lambda self, device, **options: to(self, "cpu" if device == "cuda" else device, **options)
from rewardbench.rewardbench import main
sys.argv = ["rewardbench", *sys.argv[1:]]
main()
"""


def main() -> int:
    """Prints both accuracies; status 1 where they differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="of rlhf train-rm on the embedded data")
    parser.add_argument("--python", type=Path, required=True, help="of the environment with rewardbench")
    parser.add_argument("--pairs", type=int, default=200)
    options = parser.parse_args()
    quiet()
    path = resolve_path("run", str(options.run))
    cpu = torch.device("cpu")
    pairs = reviews_of(options.run).pairs_test["test"][: options.pairs]
    ours = score_pairs(load_reward_model("run", path, cpu), pairs, Precision("fp32", cpu)).accuracy
    theirs = by_rewardbench(Path(path), pairs, options.python)
    print(f"{len(pairs)} pairs: rlhf {ours:.4f}, rewardbench {theirs:.4f}")
    return int(abs(ours - theirs) > 1e-9)


def by_rewardbench(model: Path, pairs: list[Preference], python: Path) -> float:
    """Accuracy as the command prints it.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(model, folder / "model")
        (folder / "model" / "chat_template.jinja").unlink(missing_ok=True)
        file = folder / "model" / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": TEMPLATE}))
        lines = [json.dumps(conversation(pair)) + "\n" for pair in pairs]
        (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
        line = [str(python.absolute()), "-c", THEIRS, f"--model={folder / 'model'}", "--load_json"]
        line += [f"--dataset={folder / 'pairs.jsonl'}", "--not_quantized", f"--output_dir={folder / 'out'}"]
        own = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "HF_DATASETS_CACHE": str(folder / "cache")}
        done = subprocess.run(line, capture_output=True, text=True, cwd=folder, env={**os.environ, **own})
    found = re.search(r"Results: ([0-9.]+), on", done.stdout + done.stderr)
    if done.returncode or found is None:
        raise SystemExit(
            f"rewardbench ended with status {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}"
        )
    return float(found[1])


def conversation(pair: Preference) -> dict[str, list[dict[str, object]]]:
    """As rewardbench reads a pair: whole conversations."""
    question = {"role": "user", "content": pair.prompt}
    return {
        side: [question, {"role": "assistant", "content": text}]
        for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected))
    }


if __name__ == "__main__":
    raise SystemExit(main())
