"""How a program of a job learns that it shall end, and says that it wants to go on."""

import signal
from typing import Any

#: Exit status of a run that has saved its state and shall be continued; the job scripts know it.
RESUME = 85


class Stopped(Exception):
    """The run was asked to end."""


class Interrupted(SystemExit):
    """A signal ends the program at once; a SystemExit of another kind is of somebody's own code."""


class Asked:
    """Remembers that a signal asked the run to end.

    Attributes
    ----------
    by : str
        The signal; "" if none came.
    at_once : bool
        Whether the next signal raises `Stopped` where the program is. It is for what can be
        left at any moment; else a program asks `check` where it can be left.
    """

    def __init__(self) -> None:
        self.by = ""
        self.at_once = False
        self._ends = 0

    def __bool__(self) -> bool:
        return bool(self.by)

    def listen(self) -> None:
        """Take the signals by which Slurm and people end jobs."""
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self.note)

    def note(self, number: int, _: Any) -> None:
        """Note a signal; a second request to end is not put off, a warning before it is none."""
        self.by = signal.Signals(number).name
        self._ends += number != signal.SIGUSR1
        if self._ends > 1:
            raise Interrupted(128 + number)
        if self.at_once:
            self.at_once = False
            raise Stopped

    def check(self) -> None:
        """Stop if so asked.

        Raises
        ------
        Stopped
            Then.
        """
        if self.by:
            raise Stopped
