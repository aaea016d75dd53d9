"""The command line: Typer in front, Hydra behind. Imports no torch, so that help and completion are instant."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from rlhf_cli import __version__
from rlhf_cli.commands.help import command_help, sweep_help

_FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    name="rlhf",
    help="Compare ways of training language models from preferences: sft -> rm -> policy -> eval.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"rlhf {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _register(command: str, summary: str) -> None:
    """Adds a command whose arguments all go to Hydra."""

    def run(context: typer.Context) -> None:
        from rlhf_cli.commands.launch import launch

        raise typer.Exit(launch(command, context.args))

    app.command(
        command,
        help=command_help(command, summary),
        short_help=summary,
        context_settings=_FORWARD,
        options_metavar="[HYDRA FLAGS]",
        epilog=None,
    )(run)


_register("train-sft", "Supervised fine-tuning: the model that every later stage starts from.")
_register("train-rm", "Train a reward model on preference pairs.")
_register("train-policy", "Train a policy against a reward model or on pairs; builds the stages it needs.")
_register("eval", "Measure policies and reward models, with 95% intervals and differences to a reference.")


@app.command(
    "sweep",
    help=sweep_help(),
    short_help="Multirun of a command, then its table and plot.",
    context_settings=_FORWARD,
)
def _sweep(context: typer.Context) -> None:
    from rlhf_cli.commands.sweep import sweep

    raise typer.Exit(sweep(context.args))


@app.command("info")
def _info(
    path: Annotated[
        Path | None, typer.Argument(help="A run folder to describe; nothing = this installation.")
    ] = None,
) -> None:
    """Versions, devices, config groups and cached stages; or what a run folder holds."""
    from rlhf_cli.commands.info import info

    raise typer.Exit(info(path))


def main() -> None:
    """Entry point of the console script."""
    try:
        app(standalone_mode=True)
    except SystemExit as end:
        if "RANK" not in os.environ:
            raise
        _leave(end.code if isinstance(end.code, int) else int(end.code is not None))


def _leave(status: int) -> NoReturn:
    """Ends one of the processes that torchrun started, everything but the interpreter's own end done.

    A thread of the transport that asks for the interpreter's lock while it is taken down aborts the process, and
    torchrun would be told of the abort instead of the exit status.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # as the end does: other threads, atexit, the streams
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
