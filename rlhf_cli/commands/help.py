"""The text of `--help`: config groups with their choices, the keys most used, examples. Reads file names only."""

from __future__ import annotations

from pathlib import Path

# Of `--help` and `info`; group@place has a place of its own.
GROUPS = (
    "algo",
    "rm",
    "data",
    "model",
    "model@rm.model",
    "peft",
    "peft@sft.peft",
    "peft@rm.peft",
    "precision",
    "logger",
    "experiment",
)

_KEYS = {
    "train-sft": (
        ("sft.train.epochs, sft.train.lr", "how long, how fast"),
        ("model.path", "start from a local folder or hub id"),
        ("data.path", "your own rows, with data=jsonl"),
    ),
    "train-rm": (
        ("rm.train.epochs, rm.train.lr", "how long, how fast"),
        ("rm.loss, rm.read_out", "rm=distributional: probability of a pair, reward of a distribution"),
        ("rm.members, rm.kind, rm.selection", "rm=warm|ensemble: how many, scalar or distributional, which count"),
        ("rm.member", "this member alone, for a sweep that trains them side by side"),
        ("rm.label_swap_rate", "label noise; data.swap_rate is data=reviews' own"),
        ("sft.path", "start from this SFT model instead of building one"),
    ),
    "train-policy": (
        ("algo.k, algo.beta", "samples per prompt, weight of the KL"),
        ("algo.train.steps, algo.train.lr", "how long, how fast"),
        ("reward.rm, reward.gold, reward.length", "weights of the reward's terms; there are more"),
        ("kl.placement, kl.estimator", "the KL in the reward (k1) or in the loss (k2)"),
        ("sft.path, rm.path", "use these models instead of building them"),
    ),
    "eval": (
        ("policies=[A,B]", "run folders, model folders or hub ids; none = measure the reward model"),
        ("rm.path, reference.path", "default: those behind the first policy"),
        ("eval.num_prompts, eval.samples_per_prompt", "how many prompts, samples for each"),
    ),
}

_EXAMPLES = {
    "train-sft": (
        "rlhf train-sft",
        "rlhf train-sft sft.train.epochs=1 run_dir=outputs/my-sft",
        "rlhf train-sft model=pretrained model.path=path/to/model data=jsonl data.path=pairs.jsonl",
    ),
    "train-rm": (
        "rlhf train-rm",
        "rlhf train-rm rm=distributional rm.loss=half_tie rm.read_out=cvar",
        "rlhf train-rm rm=warm rm.members=6 rm.label_swap_rate=0.25",
        "rlhf train-rm -m seed=0,1,2",
    ),
    "train-policy": (
        "rlhf train-policy algo=rloo",
        "rlhf train-policy algo=warp algo.T=50 logger=wandb",
        "rlhf train-policy algo=dpo data=jsonl data.path=pairs.jsonl",
        "rlhf train-policy -m algo=reinforce,rloo seed=0,1",
    ),
    "eval": (
        "rlhf eval policies=[outputs/train-policy/rloo/2026-01-01_12-00-00]",
        "rlhf eval policies=[outputs/a,outputs/b] eval.num_prompts=500",
        "rlhf eval rm.path=outputs/my-rm",
    ),
}

_COMMON_KEYS = (
    ("run_dir, name, seed", "where, under which name, with which seed"),
    ("device, precision", "auto|cpu|cuda|mps, auto|fp32|bf16|fp16"),
)


def conf_path() -> Path:
    """conf/ inside an installed wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "train_policy.yaml").is_file():
            return candidate
    raise FileNotFoundError(f"no conf/ in or beside {package}: the installation is incomplete")


def group_choices(group: str) -> list[str]:
    """The YAML files of a group, by name."""
    folder = conf_path() / group.partition("@")[0]
    return sorted(file.stem for file in folder.glob("*.yaml"))


def is_group(key: str) -> bool:
    """Whether a key names a config group."""
    return (conf_path() / key).is_dir()


def command_help(command: str, summary: str) -> str:
    """Help of a command whose arguments go to Hydra."""
    return "\n\n".join(
        [
            summary,
            "Arguments are Hydra overrides (key=value, group=choice) and Hydra flags (-m, --cfg job, ...).",
            _block("Config groups:", [(f"{g}=", "|".join(usable_choices(g))) for g in GROUPS]),
            _block("Keys most used:", [*_KEYS[command], *_COMMON_KEYS]),
            "All keys with their values: " + f"rlhf {command} --cfg job",
            _block("Examples:", [(example, "") for example in _EXAMPLES[command]]),
        ]
    )


def sweep_help() -> str:
    """Help of `rlhf sweep`."""
    examples = (
        "rlhf sweep train-policy algo=rloo algo.k=2,4 algo.beta=0.05,0.2 seed=0,1",
        "rlhf sweep train-policy algo=reinforce,rloo seed=0,1,2",
        "rlhf sweep train-rm rm=scalar,distributional rm.label_swap_rate=0,0.25 seed=0,1",
        "rlhf sweep train-rm rm=warm rm.members=4 rm.member=0,1,2,3 hydra/launcher=joblib",
    )
    return "\n\n".join(
        [
            "Run a command once for every combination of comma-separated values, then collect a table.",
            "rlhf sweep COMMAND [OVERRIDES...] with COMMAND one of train-sft, train-rm, train-policy, eval.",
            "Writes sweep.csv (a row per job), summary.csv (mean and interval over seeds) and plots/ into run_dir.",
            _block("Examples:", [(example, "") for example in examples]),
        ]
    )


def usable_choices(group: str) -> list[str]:
    """Those that make sense at the group's own place."""
    hidden = {"model": {"as_policy", "distilbert"}, "peft": {"as_policy"}}.get(group, set())
    return [choice for choice in group_choices(group) if choice not in hidden]


def _block(title: str, rows: list[tuple[str, str]]) -> str:
    """Lines that the help formatter leaves as they are."""
    width = max(len(left) for left, _ in rows)
    lines = [f"  {left.ljust(width)}  {right}".rstrip() for left, right in rows]
    return "\n".join(["\b", title, *lines])
