"""The function that Hydra calls once per job: config -> objects -> run. Also in the processes of a launcher."""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from rlhf_cli.commands.context import Context
from rlhf_cli.config.schema import RunConfig
from rlhf_cli.config.store import register
from rlhf_cli.errors import RequestError

register()  # a launcher's worker process imports this module and composes nothing before

_log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """How the last single run ended. Hydra would print errors on its own terms if they were raised."""

    error: Exception | None = None
    folder: Path | None = None

    def clear(self) -> None:
        """Forgets the last run."""
        self.error, self.folder = None, None


outcome = Outcome()


def run(cfg: DictConfig) -> None:
    """Runs one job. In a sweep errors are raised, so that the sweep knows; else they are left in `outcome`."""
    prepare_environment()
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    in_sweep = hydra_config.mode == RunMode.MULTIRUN
    outcome.folder = folder
    try:
        config = OmegaConf.to_object(cfg)
        assert isinstance(config, RunConfig), type(config)
        config.check()
        context = Context(
            folder=folder,
            argv=("rlhf", config.command, *hydra_config.overrides.task),
            sweep=Path(hydra_config.sweep.dir).name if in_sweep else None,
            flat=_flat(OmegaConf.to_container(cfg, resolve=True)),
        )
        _quiet_libraries()
        if in_sweep:
            chosen = [line for line in hydra_config.overrides.task if not line.startswith("run_dir=")]
            print(f"job {hydra_config.job.num}: {' '.join(chosen)}", file=sys.stderr, flush=True)
        _dispatch(config, context)
    except Exception as error:
        if not isinstance(error, RequestError):
            _log.info("the run failed", exc_info=True)
        if in_sweep:
            _mark_failed(folder, error)
            raise
        outcome.error = error


def _dispatch(config: RunConfig, context: Context) -> None:
    match config.command:
        case "eval":
            from rlhf_cli.commands.eval import run_eval

            run_eval(config, context)
        case "train-sft" | "train-rm" | "train-policy":
            from rlhf_cli.commands.train import run_train

            run_train(config, context)
        case _:
            raise AssertionError(config.command)


def prepare_environment() -> None:
    """What libraries read from the environment when they are loaded; values the user set are kept."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # By default a thread that waits for the others spins; where processes share cores (the jobs of a sweep, CI) a
    # step then takes 20 to 40 times as long. A short spin costs nothing when the cores are free.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _quiet_libraries() -> None:
    """Progress bars and load reports of the libraries would run through ours."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _mark_failed(folder: Path, error: Exception) -> None:
    """Leaves the reason in the job's folder where the run did not get as far as run.json."""
    record = folder / "run.json"
    if not record.exists():
        line = " ".join(f"{type(error).__name__}: {error}".split())
        record.write_text(json.dumps({"status": "failed", "error": line}), encoding="utf-8")


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node.value if hasattr(node, "value") else node}
    flat: dict[str, Any] = {}
    for name, value in node.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return flat
