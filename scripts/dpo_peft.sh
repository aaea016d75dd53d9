#!/usr/bin/env bash
# DPO on hh-rlhf with all weights, with LoRA and with bottleneck adapters: what is trained, and what comes of it.
# scripts/dpo_peft.sh MODEL DATA [OVERRIDES...]: a model folder, and a folder with hh-rlhf's files.
set -euo pipefail
model="$(realpath "$1")" data="$(realpath "$2")"
shift 2
cd "$(dirname "$0")/.."
out="outputs/dpo-peft"
for choice in none:1e-4 lora:3e-4 adapter:1e-3; do
  peft="${choice%:*}"
  rlhf train-policy algo=dpo data=hh-rlhf "data.path=$data" model=pretrained "model.path=$model" model.lr.sft=1e-3 \
    data.max_prompt_tokens=128 data.max_completion_tokens=64 sft.train.epochs=1 sft.train.eval_every=100 \
    "peft=$peft" peft@sft.peft=none "model.lr.dpo=${choice#*:}" \
    algo.train.batch_size=16 algo.train.steps=100 algo.train.eval_every=20 "run_dir=$out/$peft" "name=$peft" "$@"
done
python - "$out" <<'PYTHON'
import json, sys
from pathlib import Path

print("| peft | trained | of | validation loss | accuracy | KL, nats |\n|---|---|---|---|---|---|")
for name in ("none", "lora", "adapter"):
    run = json.loads((Path(sys.argv[1]) / name / "summary.json").read_text())
    counts = [f"{run[f'parameters/{key}']:,}" for key in ("trainable", "total")]
    print(f"| {name} | {' | '.join(counts)} | {run['loss']:.4f} | {run['dpo/accuracy']:.3f} | {run['kl/full']:.2f} |")
PYTHON
