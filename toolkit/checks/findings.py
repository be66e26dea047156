"""What a check finds, and what all findings together amount to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from toolkit.checks.explanations import EXPLANATIONS

#: Worst first, the order in which people read them.
STATUSES = ("fail", "warn", "skip", "pass")
TIERS = ("host", "image", "device")
LONGEST = 400


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    id : str
        Stable name, such as ``rocm.kfd``; `toolkit.checks.explanations` has its long form.
    tier : str
        ``host``, ``image`` or ``device``.
    status : str
        ``pass``, ``warn``, ``fail``, or ``skip`` if it could not be looked at.
    seen : str
        What was seen.
    subject : str
        Which of several it is about, such as ``renderD128``; may be empty.
    expected, remedy : str
        What should have been, and the command or setting that mends it; empty if all is well.
    source : str
        Where that is written.
    """

    id: str
    tier: str
    status: str
    seen: str
    subject: str = ""
    expected: str = ""
    remedy: str = ""
    source: str = ""


def finding(
    id: str,
    status: str,
    seen: str,
    *,
    subject: str = "",
    expected: str = "",
    remedy: str = "",
) -> Finding:
    """Return a finding, completed from its explanation if something is wrong.

    Parameters
    ----------
    id : str
        One of `EXPLANATIONS`.
    status : str
        One of `STATUSES`.
    seen : str
        What was seen; may hold bytes of files that nobody vouches for.
    subject : str
        Which of several it is about.
    expected, remedy : str
        Where they say more than the explanation's.
    """
    known = EXPLANATIONS[id]
    trouble = status in ("warn", "fail")
    return Finding(
        id=id,
        tier=known.tier,
        status=status,
        seen=printable(seen),
        subject=printable(subject),
        expected=printable((expected or known.expected) if trouble else expected),
        remedy=printable((remedy or known.remedy) if trouble else remedy),
        source=known.source,
    )


def printable(text: str) -> str:
    """Return text as one line without control characters, cut to a readable length."""
    if len(text) > LONGEST:
        text = text[: LONGEST - 3] + "..."
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text).strip()


def worst(findings: Iterable[Finding]) -> str:
    """Return the worst status; ``skip`` only if nothing at all could be looked at."""
    seen = {f.status for f in findings}
    return next((s for s in ("fail", "warn", "pass") if s in seen), "skip")


def ranked(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings with the worst first, else in the order in which they were made."""
    return sorted(findings, key=lambda f: STATUSES.index(f.status))


def count(number: int, what: str) -> str:
    """Return a number with its noun, such as ``1 GPU`` or ``8 GPUs``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def brief(words: Sequence[str], *, most: int = 8) -> str:
    """Return a list for people, cut where it gets long."""
    more = len(words) - most
    return ", ".join(words[:most]) + (f" and {more} more" if more > 0 else "")
