"""The cases: what is measured for each, and what it comes to as ratios."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ceilings
import hf_side
import memory
import our_side
import peers
import torch
import trl_side
import workload
from turns import Clock, FunctionPeer, Peer, in_turns, median_of_rows, seconds, times
from workload import Sizes

from rlhf_cli.train.precision import Precision

STEPS = ("rloo_step", "dpo_step", "dpo_step_precomputed", "rm_step")
CASES = (*STEPS, "generate", "decode_long_prompt", "memory", "memory_large_vocabulary")
SETTINGS = ("equal", "best", "default", "fp32")
_MEMORY_CASES = ("rloo_step", "dpo_step", "rm_step")
_LARGE_CASES = ("dpo_step", "rloo_step")


@dataclass
class Bench:
    """What the cases share, and where their results go."""

    sizes: Sizes
    device: torch.device
    precisions: tuple[str, ...]  # that both sides are measured in; the first is that of "equal"
    threads: int
    warm_up: int
    pairs: int
    tries: int  # steps by which the fastest setting is found
    settings: tuple[str, ...]  # of TRL
    is_compiled: bool  # torch.compile is among the peer's candidates
    is_quick: bool  # few candidates
    with_trl: bool
    large_vocabulary: int
    chunk_tokens: int
    folder: Path  # of saved models
    say: Callable[[str], None]
    ceilings: dict[str, float]
    cases: dict[str, Any] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)

    @property
    def clock(self) -> Clock:
        """Of the device."""
        return our_side.wall_clock(self.device)

    def precision(self, name: str) -> Precision:
        """On the device."""
        return Precision(name, self.device)

    def ceiling(self, precision: str) -> Callable[[], float]:
        """Measures matrix products, now; GFLOP/s."""
        size = int(self.ceilings["matmul_largest_size"])
        dtype = self.precision(precision).dtype or torch.float32
        return lambda: ceilings.matmul_gflops(self.device, dtype, self.clock, size, 1)


def save_models(sizes: Sizes, folder: Path) -> int:
    """Writes what the peers load; returns the policy's parameters."""
    policy = workload.make_policy(sizes)
    reward_model = workload.make_reward_model(policy)
    workload.save(policy, folder / "policy")
    workload.save(reward_model, folder / "reward_model")
    return policy.num_parameters()


def run(bench: Bench, name: str) -> None:
    """One case, into `bench`."""
    if name in STEPS:
        _step_case(bench, name)
    else:
        _OTHERS[name](bench)


@contextmanager
def _our_steps(bench: Bench, case: str, precision: str) -> Iterator[Callable[[], dict[str, float]]]:
    with tempfile.TemporaryDirectory() as folder:
        steps = our_side.make_steps(case, bench.sizes, bench.precision(precision), Path(folder))
        yield lambda: next(steps)


def _alone(bench: Bench, case: str, precision: str) -> dict[str, Any]:
    """Our step without a peer: times, parts, the first loss, FLOP/s against the ceiling."""
    with _our_steps(bench, case, precision) as step:
        rows = [step() for _ in range(max(1, bench.warm_up))]
        found, share = _times_and_share(bench, case, precision, step)
        iterator = iter(step, None)
        parts = [our_side.parts_of_step(iterator, bench.clock) for _ in range(bench.pairs)]
    median = statistics.median(found)
    return {
        "step_s": found,
        "median_step_s": median,
        "parts": median_of_rows(parts),
        "first_loss": rows[0]["loss"],
        "tokens_per_step": int(rows[0]["tokens"]),
        "tokens_per_s": ceilings.tokens_of(case, bench.sizes) / median,
        "of_matmul_ceiling": share,
    }


def _times_and_share(
    bench: Bench, case: str, precision: str, step: Callable[[], object]
) -> tuple[list[float], float]:
    """Seconds of our steps, and their share of the ceiling, which is measured after each of them."""
    ceiling, found, rates = bench.ceiling(precision), list[float](), list[float]()
    for _ in range(bench.pairs):
        found.append(seconds(step, bench.clock))
        rates.append(ceiling())
    return found, _share(bench, case, found, rates)


def _share(bench: Bench, case: str, ours_s: Sequence[float], rates: Sequence[float]) -> float:
    """Of a ceiling (GFLOP/s), turn by turn; the median."""
    flops = ceilings.flops_of(case, bench.sizes)
    return statistics.median(flops / one / 1e9 / rate for one, rate in zip(ours_s, rates, strict=True))


def _faster(ours: dict[str, dict[str, Any]], key: str) -> str:
    return min(ours, key=lambda precision: ours[precision][key])


def _step_case(bench: Bench, case: str) -> None:
    ours = {precision: _alone(bench, case, precision) for precision in bench.precisions}
    result: dict[str, Any] = {
        "tokens_per_step": ceilings.tokens_of(case, bench.sizes),
        "model_flops_per_step": ceilings.flops_of(case, bench.sizes),
        "ours": ours,
    }
    bench.cases[case] = result
    for precision, figures in ours.items():
        bench.say(
            f"{case} ours {precision}: {figures['median_step_s']:.3f} s, "
            f"{figures['of_matmul_ceiling']:.0%} of the matrix product ceiling; "
            + ", ".join(f"{name} {value:.3f}" for name, value in figures["parts"].items())
        )
    if bench.with_trl:
        _beside_trl(bench, case, result)


def _beside_trl(bench: Bench, case: str, result: dict[str, Any]) -> None:
    """Our step and TRL's in turns, under each of the settings; into `result`."""

    def peer_of(flags: peers.Flags) -> trl_side.TrlPeer:
        return trl_side.TrlPeer(case, bench.sizes, flags, bench.device, bench.folder, bench.clock)

    def more(best: peers.Flags) -> list[peers.Flags]:
        found = trl_side.extras(case, best, bench.device, bench.is_compiled)
        return found[:1] if bench.is_quick else found

    first, *others = bench.precisions
    settings: list[tuple[str, peers.Flags, str]] = []  # name, flags, precision of ours
    if "equal" in bench.settings:
        settings.append(("equal", trl_side.equal(first), first))
    if "best" in bench.settings:
        tried = peers.fastest(trl_side.trl_numerics(bench.precisions), more, peer_of, 1, bench.tries)
        assert tried.best is not None
        result["trl_candidates_s"] = tried.seconds
        bench.say(f"{case} trl candidates: {_shown(tried.seconds)}")
        settings.append(("best", tried.best, _faster(result["ours"], "median_step_s")))
    if "default" in bench.settings and "bf16" in bench.precisions:
        settings.append(("default", trl_side.DEFAULT, "bf16"))
    settings += [(one, trl_side.equal(one), one) for one in others if one in bench.settings]
    result["pairs"] = {}
    for setting, flags, precision in settings:
        peer = peer_of(flags)
        with _our_steps(bench, case, precision) as step:
            found = in_turns(peer, step, bench.clock, bench.warm_up, bench.pairs, bench.ceiling(precision))
        result["pairs"][f"trl_{setting}"] = {
            "flags": flags.as_dict(),
            "ours_precision": precision,
            "peer_tokens_per_step": peer.tokens_per_step,
            "peer_first_loss": sum(peer.losses[: flags.micro_share]),
            "of_matmul_ceiling": _share(bench, case, found.ours_s, found.ceiling),
            **found.as_dict(),
        }
        _ratio(bench, f"{case}/trl_{setting}", found.ratio)


def _ratio(bench: Bench, name: str, value: float) -> None:
    bench.ratios[name] = round(value, 3)
    bench.say(f"{name}: {value:.2f}")


def _shown(seconds: dict[str, float | str]) -> str:
    return "; ".join(
        f"{name} {value if isinstance(value, str) else f'{value:.3f} s'}" for name, value in seconds.items()
    )


def _generate(bench: Bench) -> None:
    sizes, clock = bench.sizes, bench.clock
    prompts = workload.make_prompts(sizes)
    makers = {
        precision: our_side.OurGenerate(sizes, bench.precision(precision), prompts, sizes.new_tokens)
        for precision in bench.precisions
    }
    ours: dict[str, Any] = {}
    for precision, roll_out in makers.items():
        times(roll_out, clock, bench.warm_up, 0)
        found, share = _times_and_share(bench, "generate", precision, roll_out)
        median = statistics.median(found)
        ours[precision] = {
            "rollout_s": found,
            "median_s": median,
            "tokens_per_s": ceilings.tokens_of("generate", sizes) / median,
            "of_matmul_ceiling": share,
        }
        rollout = roll_out()
        ours[precision]["new_tokens"] = sum(len(ids) for ids in rollout.completion_ids)
    best_ours = _faster(ours, "median_s")
    of_precision = bench.precision(best_ours)
    result: dict[str, Any] = {
        "new_tokens": ceilings.tokens_of("generate", sizes),
        "ours": ours,
        "decode_step": {
            "precision": best_ours,
            **ceilings.decode_step(
                sizes,
                lambda length: our_side.OurGenerate(sizes, of_precision, prompts, length),
                clock,
                bench.pairs,
                bench.ceilings["copy_gb_per_s"],
            ),
        },
    }
    bench.cases["generate"] = result
    bench.say(f"generate ours: { {name: round(one['tokens_per_s']) for name, one in ours.items()} } tokens/s")

    def peer_of(flags: peers.Flags) -> Peer:
        return FunctionPeer(hf_side.HfGenerate(sizes, flags, bench.device, bench.folder), clock)

    tried = peers.fastest(
        hf_side.hf_numerics(bench.precisions),
        lambda best: hf_side.hf_extras(best, bench.is_compiled),
        peer_of,
        1,
        bench.tries,
    )
    assert tried.best is not None
    result["hf_candidates_s"] = tried.seconds
    bench.say(f"generate hf candidates: {_shown(tried.seconds)}")
    result["pairs"] = {}
    for name, flags, precision in (
        ("hf_default", hf_side.hf_default(bench.precisions[0], bench.device), bench.precisions[0]),
        ("hf_best", tried.best, best_ours),
    ):
        function = hf_side.HfGenerate(sizes, flags, bench.device, bench.folder)
        found_pairs = in_turns(
            FunctionPeer(function, clock),
            makers[precision],
            clock,
            bench.warm_up,
            bench.pairs,
            bench.ceiling(precision),
        )
        result["pairs"][name] = {
            "flags": flags.as_dict(),
            "ours_precision": precision,
            "peer_new_tokens": function.new_tokens,
            "of_matmul_ceiling": _share(bench, "generate", found_pairs.ours_s, found_pairs.ceiling),
            **found_pairs.as_dict(),
        }
        _ratio(bench, f"generate/{name}", found_pairs.ratio)


def _decode_long_prompt(bench: Bench) -> None:
    """Rollouts with one prompt four times longer, in turns with rollouts without."""
    sizes = bench.sizes
    best = min(bench.precisions, key=lambda one: _median_rollout_s(bench, one))
    with_long, without = (
        our_side.OurGenerate(
            sizes, bench.precision(best), workload.make_prompts(sizes, long_one), sizes.new_tokens
        )
        for long_one in (True, False)
    )
    found = in_turns(FunctionPeer(without, bench.clock), with_long, bench.clock, bench.warm_up, bench.pairs)
    bench.cases["decode_long_prompt"] = {
        "precision": best,
        "without_s": found.peer_s,
        "with_s": found.ours_s,
        "ratios": found.ratios,
        "ratio": found.ratio,
    }
    _ratio(bench, "decode_long_prompt/throughput", found.ratio)


def _median_rollout_s(bench: Bench, precision: str) -> float:
    roll_out = our_side.OurGenerate(
        bench.sizes, bench.precision(precision), workload.make_prompts(bench.sizes), bench.sizes.new_tokens
    )
    return statistics.median(times(roll_out, bench.clock, 1, bench.tries))


def _question(bench: Bench, case: str, side: str, sizes: Sizes, folder: Path) -> memory.Question:
    as_dict = workload.sizes_as_dict(sizes)
    return memory.Question(case, side, bench.precisions[0], bench.device.type, bench.threads, as_dict, str(folder))


def _memory(bench: Bench) -> None:
    if bench.device.type == "cpu" and not memory.has_proc():
        bench.say("memory: this system does not tell (no /proc/self/clear_refs)")
        return
    result: dict[str, Any] = {"precision": bench.precisions[0]}
    bench.cases["memory"] = result
    has_default = bench.with_trl and "bf16" in bench.precisions
    sides = ["ours", *(["equal"] if bench.with_trl else []), *(["default"] if has_default else [])]
    for case in _MEMORY_CASES:
        found = {side: memory.ask(_question(bench, case, side, bench.sizes, bench.folder)) for side in sides}
        result[case] = found
        peaks = {side: one["peak_bytes"] for side, one in found.items()}
        bench.say(f"memory {case}: " + ", ".join(f"{side} {peak / 2**20:.0f} MiB" for side, peak in peaks.items()))
        if bench.with_trl:
            _ratio(bench, f"memory/{case}", peaks["ours"] / peaks["equal"])
        if has_default:
            _ratio(bench, f"memory/{case}/trl_default", peaks["ours"] / peaks["default"])


def _memory_large_vocabulary(bench: Bench) -> None:
    if bench.device.type == "cpu" and not memory.has_proc():
        return
    sizes = replace(bench.sizes, vocab_size=bench.large_vocabulary)
    result: dict[str, Any] = {"vocab_size": sizes.vocab_size, "precision": bench.precisions[0]}
    bench.cases["memory_large_vocabulary"] = result
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_trained = save_models(sizes, folder)
        sides = ["ours", *(["equal"] if bench.with_trl else [])]
        for case in _LARGE_CASES:
            found = {side: memory.ask(_question(bench, case, side, sizes, folder)) for side in sides}
            live = found["ours"]["live_tensor_bytes"]
            limit = memory.limit_of(live, num_trained, sizes.vocab_size, bench.chunk_tokens)
            peak = found["ours"]["peak_bytes"]
            allocated = found["ours"].get("peak_allocated_bytes", peak)
            result[case] = {**found, **limit}
            bench.say(
                f"memory {case}, vocabulary {sizes.vocab_size}: peak {peak / 2**20:.0f} MiB, "
                f"allocated {allocated / 2**20:.0f} MiB; at most "
                f"{limit['limit_bytes'] / 2**20:.0f} MiB = 1.2 x {limit['resident_bytes'] / 2**20:.0f} resident "
                f"+ chunk {limit['chunk_bytes'] / 2**20:.0f}"
            )
            _ratio(bench, f"memory_large_vocabulary/{case}/of_limit", peak / limit["limit_bytes"])
            _ratio(bench, f"memory_large_vocabulary/{case}/allocated_of_limit", allocated / limit["limit_bytes"])
            if bench.with_trl:
                ratio = peak / found["equal"]["peak_bytes"]
                _ratio(bench, f"memory_large_vocabulary/{case}", ratio)


_OTHERS: dict[str, Callable[[Bench], None]] = {
    "generate": _generate,
    "decode_long_prompt": _decode_long_prompt,
    "memory": _memory,
    "memory_large_vocabulary": _memory_large_vocabulary,
}
