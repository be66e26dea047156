"""The errors that a user sees: what failed, on what, and what to do next."""

from __future__ import annotations


class ToolkitError(Exception):
    """What was asked for does not hold or could not be done.

    Parameters
    ----------
    message : str
        What failed and on what, in one sentence.
    hint : str, optional
        What the user can do about it, in one or two lines.

    Attributes
    ----------
    code : int
        Exit code of the command line for this kind of error.
    """

    code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(ToolkitError):
    """The call was wrong: an unknown name, a bad option, a malformed file."""

    code = 2


class Interrupted(BaseException):
    """The work was ended by a signal.

    Not an `Exception`: whoever handles a failed step must not take it for one.

    Attributes
    ----------
    code : int
        Exit code of the command line: 128 plus the signal's number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.code = 128 + signum
