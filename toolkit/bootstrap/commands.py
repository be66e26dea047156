"""What ``make`` calls: one command per step of the set-up."""

from __future__ import annotations

import argparse
import sys

from toolkit import processes
from toolkit.bootstrap import host_packages, private_apptainer, venv
from toolkit.errors import Interrupted, ToolkitError


def main(arguments: list[str]) -> int:
    """Run one step of the set-up and return its exit code."""
    parser = argparse.ArgumentParser(prog="python3 -m toolkit.bootstrap", description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("venv", help="make .venv")
    step.add_argument("--dev", action="store_true", help="with what the tests need")
    step = steps.add_parser("apptainer", help="make a private Apptainer where the host has none")
    step.add_argument("--quiet", action="store_true", help="say nothing if there is one")
    steps.add_parser("test-packages", help="install what only root can install for the tests")
    options = parser.parse_args(arguments)
    try:
        with processes.interruptible():
            if options.step == "venv":
                venv.ensure(group="dev" if options.dev else "run", line=say)
            elif options.step == "apptainer":
                private_apptainer.ensure(quiet=options.quiet, line=say)
            else:
                host_packages.ensure(line=say)
    except Interrupted as error:
        say(f"error: {error}\n  Run the same command again; it goes on from here.")
        return error.code
    except ToolkitError as error:
        say(f"error: {error.message}" + (f"\n  {error.hint}" if error.hint else ""))
        return error.code
    except OSError as error:
        say(f"error: {error.filename or 'system'}: {error.strerror or error}")
        return 1
    return 0


def say(text: str) -> None:
    """Print a line of progress or trouble."""
    print(text, file=sys.stderr, flush=True)
