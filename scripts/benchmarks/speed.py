"""Speed and memory of our training steps and rollouts, with TRL and Hugging Face beside them, in one command.

    python scripts/benchmarks/speed.py                                   # all cases, this machine's CPU
    python scripts/benchmarks/speed.py rloo_step generate                # some
    python scripts/benchmarks/speed.py --preset gpu --machine h200 --compile
    python scripts/benchmarks/speed.py --preset gpu --precisions bf16 --warm-up 1 --pairs 5 --tries 1     # the shortest
    python scripts/benchmarks/speed.py --quick --out /tmp/quick          # seconds: does it run at all?

Cases: rloo_step, dpo_step, dpo_step_precomputed, rm_step (an optimizer step), generate (a rollout), decode_long_prompt
(a rollout with one prompt four times longer), memory, memory_large_vocabulary (peaks, in fresh processes).

Writes scripts/benchmarks/<machine>.json with the raw times, and <machine>.md with the tables, which are printed too.
Ratios are medians over pairs of runs in turns, peer time / our time (above 1: ours is faster); those of memory our
peak / theirs (below 1: ours needs less). What is compared and how it is kept fair: peers.py. What is counted:
ceilings.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import cases
import torch
import trl_side
import workload
from ceilings import measure_ceilings
from our_side import wall_clock
from report import as_json, as_markdown, write_text

HERE = Path(__file__).parent


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Speed and memory, with TRL and Hugging Face beside.",
        epilog=f"cases: {', '.join(cases.CASES)}",
    )
    parser.add_argument("cases", nargs="*", metavar="case", help="default: all")
    parser.add_argument("--preset", choices=["cpu", "gpu"], help="sizes (default: gpu on --device cuda, else cpu)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda with --preset gpu, else cpu")
    parser.add_argument("--machine", help="name of the results (default: cpu-<threads>core, or the GPU's name)")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=["bf16", "fp32"],
        help="that are measured; the first is that of `equal` (default: bf16 fp32; fp32 on a CPU slow in bf16)",
    )
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--warm-up", type=int, default=2, help="pairs before the measured ones (default: 2)")
    parser.add_argument("--pairs", type=int, default=7, help="measured pairs (default: 7)")
    parser.add_argument("--tries", type=int, default=3, help="steps of each of the peer's candidates (default: 3)")
    parser.add_argument(
        "--settings", nargs="+", choices=cases.SETTINGS, default=cases.SETTINGS, help="of TRL (default: all)"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile among the peer's candidates")
    parser.add_argument("--no-trl", action="store_true", help="only our figures of the steps")
    parser.add_argument("--large-vocabulary", type=int, default=128_000, help="of memory_large_vocabulary")
    parser.add_argument("--chunk-tokens", type=int, default=256, help="positions of the one chunk of its limit")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one pair")
    for size in dataclasses.fields(workload.Sizes):
        option = f"--{size.name.replace('_', '-')}"
        if size.name in ("prompt_tokens", "completion_tokens"):
            parser.add_argument(option, type=int, nargs=2, metavar=("SHORTEST", "LONGEST"))
        elif size.name == "is_tied":
            parser.add_argument(option, action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(option, type=int)
    args = parser.parse_args(arguments)
    unknown = [name for name in args.cases if name not in cases.CASES]
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}; there are {', '.join(cases.CASES)}")
    if args.quick:
        args.warm_up, args.pairs, args.tries, args.large_vocabulary, args.threads = 1, 2, 1, 128, 1
    return args


def sizes_of(args: argparse.Namespace) -> workload.Sizes:
    """The preset's, changed by the options."""
    preset = "quick" if args.quick else args.preset or ("gpu" if args.device == "cuda" else "cpu")
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(workload.Sizes)}
    changes = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None}
    return dataclasses.replace(workload.PRESETS[preset], **changes)


def device_of(args: argparse.Namespace) -> torch.device:
    """Raises SystemExit where there is none."""
    name = args.device or ("cuda" if args.preset == "gpu" else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "--device cuda: this machine has no CUDA device (the gpu preset runs with --device cpu too)"
        )
    return torch.device(name)


def precisions_of(args: argparse.Namespace, found: dict[str, float]) -> tuple[str, ...]:
    """What was asked for, or what the ceilings say is of use."""
    if args.precisions:
        return tuple(dict.fromkeys(args.precisions))
    if args.quick or found["matmul_bf16_gflops"] > found["matmul_fp32_gflops"] / 3:
        return ("bf16", "fp32")
    print("bf16 products are emulated on this processor: fp32 on both sides (see peers.py)", flush=True)
    return ("fp32",)


def machine_of(args: argparse.Namespace, device: torch.device) -> str:
    """A name for the files."""
    if args.machine:
        return str(args.machine)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device).lower().replace(" ", "-")
    return f"cpu-{args.threads}core"


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All that goes into the JSON."""
    device, sizes = device_of(args), sizes_of(args)
    torch.set_num_threads(args.threads)
    problem = "--no-trl: only our figures of the steps" if args.no_trl else trl_side.trl_problem()
    if problem is not None:
        print(problem, flush=True)
    found = measure_ceilings(device, wall_clock(device), args.quick)
    print("ceilings: " + ", ".join(f"{name} {value:,.0f}" for name, value in found.items()), flush=True)
    cases.save_models(sizes, folder)
    gc.freeze()  # collections, which trainers ask for, then go through what is measured and not through all libraries
    bench = cases.Bench(
        sizes=sizes,
        device=device,
        precisions=precisions_of(args, found),
        threads=args.threads,
        warm_up=args.warm_up,
        pairs=args.pairs,
        tries=args.tries,
        settings=tuple(args.settings),
        is_compiled=args.compile,
        is_quick=args.quick,
        with_trl=problem is None,
        large_vocabulary=args.large_vocabulary,
        chunk_tokens=args.chunk_tokens,
        folder=folder,
        say=lambda text: print(text, flush=True),
        ceilings=found,
    )
    for name in args.cases or cases.CASES:
        cases.run(bench, name)
    return as_json(bench, machine_of(args, device), problem)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if arguments is None else arguments)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    text = as_markdown(result)
    write_text(args.out, result, text)
    print(f"\n{text}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
