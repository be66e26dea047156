"""Entry of ``python3 -m toolkit.bootstrap``: turn an old Python away, then run."""

import os
import sys

OLDEST = (3, 10)


def newer(folders):
    # type: (list[str]) -> list[str]
    """Return the names of the newer Pythons in some folders."""
    names = [f"python3.{minor}" for minor in (13, 12, 11, 10)]
    return [n for n in names if any(os.access(os.path.join(d, n), os.X_OK) for d in folders)]


def refuse():
    # type: () -> None
    """Say that this Python is too old, and how to name or get a newer one."""
    there = newer(os.environ.get("PATH", os.defpath).split(os.pathsep))
    version = ".".join(str(part) for part in sys.version_info[:2])
    message = f"error: Python 3.10 or later is needed; {sys.executable} is Python {version}\n"
    if there:
        message += f"  There is a newer one on the PATH: make PYTHON={there[0]} ...\n"
    else:
        message += (
            "  Install one (sudo apt-get install python3.11, sudo dnf install python3.11,\n"
            "  or on a cluster: module avail python), then: make PYTHON=python3.11 ...\n"
        )
    sys.stderr.write(message)


if __name__ == "__main__":
    if sys.version_info < OLDEST:
        refuse()
        sys.exit(2)
    from toolkit.bootstrap import commands

    sys.exit(commands.main(sys.argv[1:]))
