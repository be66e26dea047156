"""The command line: parse, call, print.

One file per group of commands; reusable options are in `toolkit.cli.options`,
what is printed goes through `toolkit.cli.console`.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from toolkit import __version__
from toolkit.cli import (
    build,
    check,
    console,
    data,
    doctor,
    federated,
    inspect,
    jobs,
    lazy,
    plan,
    publish,
    status,
    verify,
)
from toolkit.errors import Interrupted, ToolkitError

commands = typer.Typer()
for group in (plan, build, verify, inspect, publish, check, data, jobs, federated, status, doctor):
    group.register(commands)

app = typer.Typer(
    name="toolkit",
    cls=lazy.group_of(commands),
    help="Build, verify and use PyTorch containers for medical imaging on HPC clusters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    suggest_commands=False,  # click does it
    rich_markup_mode=None,  # its import takes as long as all the rest of the help
    context_settings={"help_option_names": ["-h", "--help"]},
)


#: What Typer raises for a call that does not fit; it has no public name for it.
USAGE_ERROR = cast("type[Exception]", typer.BadParameter.__mro__[1])


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Options before the command."""


def _told(error: OSError) -> tuple[str, str]:
    """Return what is said of an error of the system, and what to do."""
    place, hint = Path(os.fsdecode(error.filename or "system")), ""
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        hint = "Name another place, or one that you may write to."
        if place.name.startswith("."):  # the name of a half-made file tells nobody anything
            place = place.parent
    return f"{place}: {error.strerror or error}", hint


def main() -> None:
    """Run the command line; every error ends here, as one message and an exit code."""
    debug = "--debug" in sys.argv
    try:
        sys.exit(app(standalone_mode=False))
    except USAGE_ERROR as caught:
        wrong: Any = caught
        command = wrong.ctx.command_path if wrong.ctx else "toolkit"
        if wrong.format_message():  # none where Typer has printed the help instead
            console.trouble(wrong.format_message(), f"See `{command} --help`.")
        sys.exit(2)
    except Interrupted as error:
        console.trouble(str(error), "Nothing half-made was left; run the same command again.")
        sys.exit(error.code)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except ToolkitError as error:
        if debug:
            raise
        console.trouble(error.message, error.hint)
        sys.exit(error.code)
    except OSError as error:
        if debug:
            raise
        console.trouble(*_told(error))
        sys.exit(1)
