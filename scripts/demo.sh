#!/usr/bin/env bash
# The main job: SFT and reward model once, then REINFORCE and RLOO side by side, measured against the true reward.
# SEED=1 scripts/demo.sh repeats it with another seed in every stage.
set -euo pipefail
cd "$(dirname "$0")/.."
seed="${SEED:-0}"
out="outputs/demo/seed-$seed"
if [ -e "$out" ]; then
  mv "$out" "$out.$(date +%Y-%m-%d_%H-%M-%S)"
fi
stages="sft.seed=$seed rm.seed=$seed seed=$seed"
for algo in reinforce rloo; do
  rlhf train-policy "algo=$algo" $stages "run_dir=$out/$algo"
done
rlhf eval "policies=[$out/reinforce,$out/rloo]" "seed=$seed" "run_dir=$out/eval"
