"""Read what a build printed: what of it people want to see, and why it failed."""

from __future__ import annotations

import re

#: Beginnings of the lines of a build that people want to see, beside Apptainer's own.
SHOWN = (
    "constraints of",
    "adding ",
    "refused:",
    "torch ",
    "FATAL",
    "ERROR",
    "Downloading ",
    "Successfully installed",
)
#: What pip says of a file that has another hash than is wanted: which, wanted and found.
HASHES = re.compile(
    r"DO NOT MATCH THE HASHES.*?\n\s*(\S+) from .*?\n\s*Expected sha256 (\w+)\s.*?\bGot\s+(\w+)",
    re.DOTALL,
)
#: What pip, apt and Apptainer say when the network is not there.
NO_NETWORK = (
    "Temporary failure in name resolution",
    "Temporary failure resolving",
    "Name or service not known",
    "Connection refused",
    "Connection timed out",
    "Network is unreachable",
    "Failed to establish a new connection",
    "no such host",
    "No route to host",
    "TLS handshake timeout",
    "i/o timeout",
    "Read timed out",
    "Could not connect to",
    "Could not resolve",
    "connection reset",
    "CERTIFICATE_VERIFY_FAILED",
)


def worth_showing(line: str) -> str:
    """Return what of a line of ``apptainer build`` a person wants to see, empty if nothing."""
    text = line.strip()
    if text.startswith("INFO:"):
        return text.partition(":")[2].strip()
    return text if text.startswith(SHOWN) else ""


def why_failed(output: str) -> str:
    """Return the reason for a failed build, from its whole output."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)  # Apptainer colours its errors, also in a file
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    for sign in ("No space left on device", "Disk quota exceeded"):
        for line in lines:
            if sign.lower() in line.lower():
                if ".partial-" in line:
                    return f"{sign}: make room for the image, or name another place (--output)"
                return f"{sign}: set TMPDIR or TOOLKIT_TMPDIR to a larger disk"
    refused = [line.partition(":")[2].strip() for line in lines if line.startswith("refused:")]
    if refused:
        return "; ".join(refused)
    if other := HASHES.search(plain):
        return f"{other[1]} is another file than the lock names: sha256 {other[3]}, not {other[2]}"
    # Apptainer's own FATAL only says that %post failed; what failed there says why.
    wrong = re.compile(r"(ERROR:|E: |[A-Za-z.]*(Error|Exception):? )")
    errors = [line for line in lines if wrong.match(line)]
    errors = errors or [line for line in lines if line.startswith("FATAL:")] or lines[-1:]
    chosen = re.sub(r"^(ERROR|FATAL):\s*", "", errors[-1]) if errors else "nothing was printed"
    if any(sign in chosen for sign in NO_NETWORK):
        return f"the network was not reached (is a proxy needed?): {chosen[-200:]}"
    return chosen
