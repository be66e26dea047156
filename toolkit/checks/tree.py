"""Read /sys, /proc, /dev and the output of tools from this host or from a recorded tree."""

# Thousands of small reads below links: Path would double their time.
# ruff: noqa: PTH115, PTH116, PTH118, PTH120

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from toolkit.errors import UsageError

#: Most bytes that are read of a file: every file that is looked at is far smaller.
LIMIT = 1 << 20
MAX_ENTRIES = 4096
MAX_LINKS = 40
NUMBER = re.compile(r"-?[0-9]{1,20}|0[xX]([0-9a-fA-F]{1,16})")
TOOL_TIMEOUT_S = 20.0
#: Where a recorded tree keeps the output of tools, and of a container's probe.
TOOLS = "tools"


@dataclass(frozen=True)
class Tree:
    """The root folder that everything is read below.

    Attributes
    ----------
    root : Path
        ``/`` for this host, else a recorded tree. Links in a recorded tree are
        followed as if its root were ``/``: none leads out of it. A file is read
        once, so that all findings are of one moment.
    """

    root: Path = Path("/")
    _seen: dict[str, tuple[str, str]] = field(default_factory=dict, compare=False, repr=False)
    _said: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def live(self) -> bool:
        """Say whether this host itself is read."""
        return self.root == Path("/")

    def text(self, path: str) -> str:
        """Return a file's text, empty if it cannot be read.

        Never blocks: only regular files are read, at most `LIMIT` bytes of each.
        """
        return self._read(path)[0]

    def problem(self, path: str) -> str:
        """Return why a file cannot be read, empty if it can."""
        return self._read(path)[1]

    def word(self, path: str) -> str:
        """Return the first line of a file without space around it, at most 200 characters."""
        return self.text(path).strip().partition("\n")[0].strip()[:200]

    def number(self, path: str) -> int | None:
        """Return the number in a file, None if there is none."""
        return number(self.word(path))

    def names(self, path: str) -> list[str]:
        """Return the names in a folder in natural order, at most `MAX_ENTRIES`."""
        real = self._resolve(path)
        if real is None:
            return []
        try:
            with os.scandir(real) as entries:
                found = [entry.name for entry in islice(entries, MAX_ENTRIES)]
        except (OSError, ValueError):
            return []
        return sorted(found, key=natural)

    def exists(self, path: str) -> bool:
        """Say whether there is anything of that name."""
        real = self._resolve(path)
        return real is not None and os.path.lexists(real)

    def target(self, path: str) -> str:
        """Return the path within the tree that links lead to, empty if to nowhere."""
        real = self._resolve(path)
        if real is None or not os.path.lexists(real):
            return ""
        return real if self.live else real[len(str(self.root)) :] or "/"

    def device(self, path: str) -> str:
        """Return what keeps a device file from being opened to read and write.

        On this host it is opened for real, as groups and modes mislead inside
        user namespaces. In a recorded tree nothing is opened; ``tools/open.txt``
        tells what was seen (lines such as ``/dev/kfd EACCES``), else the mode of
        the file's owner decides.

        Returns
        -------
        str
            Empty if it can be opened; else the name of the error, such as
            ``EACCES``, or ``not a device``.
        """
        if not self.live:
            return self._recorded_device(path)
        try:
            if not stat.S_ISCHR(os.stat(path).st_mode):
                return "not a device"
            os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY))
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error))
        return ""

    def access(self, path: str) -> str:
        """Return what `device` returns, without opening the file.

        For devices that opening disturbs: a Gaudi takes one user at a time and is
        reset when that one leaves.
        """
        if not self.live:
            return self._recorded_device(path)
        if not os.path.lexists(path):
            return "ENOENT"
        return "" if os.access(path, os.R_OK | os.W_OK) else "EACCES"

    def owner(self, path: str) -> str:
        """Return owner, group and mode of a file for people, such as ``root:render 0660``."""
        real = self._resolve(path)
        try:
            status = os.stat(real or "", follow_symlinks=False)
        except (OSError, ValueError):
            return ""
        mode = f"{stat.S_IMODE(status.st_mode):04o}"
        if not self.live:
            return f"mode {mode}"
        return f"{_account(status.st_uid, 'pwd')}:{_account(status.st_gid, 'grp')} mode {mode}"

    def output(self, program: str, arguments: Sequence[str]) -> str:
        """Return what a tool prints: run on this host, or recorded in ``tools/``.

        Returns
        -------
        str
            Empty if there is no such tool, it fails, or nothing was recorded.
        """
        if program not in self._said:
            self._said[program] = self._run(program, arguments)
        return self._said[program]

    def environment(self) -> Mapping[str, str]:
        """Return the variables: recorded in ``proc/self/environ``, else those of this process."""
        recorded = "" if self.live else self.text("/proc/self/environ")
        if not recorded:
            return os.environ
        pairs = recorded.split("\0" if "\0" in recorded else "\n")
        return {name: value for name, mark, value in (p.partition("=") for p in pairs) if mark}

    def _run(self, program: str, arguments: Sequence[str]) -> str:
        if not self.live:
            # Named after the program, with any ending: rocm-smi.json, hl-smi.csv.
            for folder in (TOOLS, "."):
                for name in self.names(folder):
                    if name.startswith(program) and (text := self.text(f"{folder}/{name}")):
                        return text
            return ""
        import shutil

        from toolkit import processes

        found = shutil.which(program)
        if not found:
            return ""
        try:
            done = processes.run([found, *arguments], timeout=TOOL_TIMEOUT_S)
        except OSError:
            return ""
        # What went wrong is told on either stream.
        return done.stdout[:LIMIT] if done.stdout.strip() else done.stderr[:LIMIT]

    def _recorded_device(self, path: str) -> str:
        for line in self.text(f"{TOOLS}/open.txt").splitlines():
            name, _, said = line.strip().partition(" ")
            if name == path:
                return "" if said.strip().lower() in ("", "ok") else said.strip()[:80]
        real = self._resolve(path)
        try:
            mode = os.stat(real or "", follow_symlinks=False).st_mode
        except (OSError, ValueError):
            return "ENOENT"
        if not (stat.S_ISCHR(mode) or stat.S_ISREG(mode)):
            return "not a device"
        return "" if mode & 0o600 == 0o600 else "EACCES"

    def _read(self, path: str) -> tuple[str, str]:
        if path not in self._seen:
            self._seen[path] = self._read_file(path)
        return self._seen[path]

    def _read_file(self, path: str) -> tuple[str, str]:
        real = self._resolve(path)
        if real is None:
            return "", "ENOENT"
        # A FIFO would block without O_NONBLOCK, a link must not lead out of the tree.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | os.O_NOFOLLOW
        try:
            status = os.stat(real, follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                return "", "not a file"
            # A root who replays a tree may read what the recorded user could not.
            if not self.live and not status.st_mode & 0o444:
                return "", "EACCES"
            descriptor = os.open(real, flags)
        except (OSError, ValueError) as error:
            return "", errno.errorcode.get(getattr(error, "errno", 0) or 0, str(error))
        try:
            return _drain(descriptor).decode("utf-8", "replace"), ""
        except OSError as error:
            # The kernel answers so for the nodes of GPUs that the cgroup of a job hides.
            return "", errno.errorcode.get(error.errno or 0, str(error))
        finally:
            os.close(descriptor)

    def _resolve(self, path: str) -> str | None:
        """Return the real path below the root with every link followed; None for a link loop."""
        if self.live:
            try:
                return os.path.realpath(os.path.join("/", path))
            except (OSError, ValueError):
                return None
        return _walk(str(self.root), path)


def open_tree(root: Path = Path("/")) -> Tree:
    """Return the tree below a folder, which must exist.

    Raises
    ------
    UsageError
        If there is no such folder.
    """
    if not root.is_dir():
        raise UsageError(f"--root {root} is not a folder", hint="Name a recorded tree.")
    _folder.cache_clear()
    return Tree(root=root.resolve())


def _drain(descriptor: int) -> bytes:
    chunks, left = [], LIMIT
    while left > 0:
        with contextlib.suppress(InterruptedError):
            chunk = os.read(descriptor, min(left, 1 << 16))
            if not chunk:
                break
            chunks.append(chunk)
            left -= len(chunk)
    return b"".join(chunks)


def _walk(root: str, path: str) -> str | None:
    """Follow a path below a root as the kernel would after chroot; None for a link loop."""
    folder, _, name = path.rpartition("/")
    current = _folder(root, folder) if folder.strip("/") else root
    if current is None:
        return None
    real = f"{current}/{name}"
    if name not in ("", ".", "..") and _link(real) is None:
        return real
    return _follow(root, path)


@functools.lru_cache(maxsize=4096)
def _folder(root: str, folder: str) -> str | None:
    """Resolve a folder, once: most files that are read share theirs with many others."""
    return _follow(root, folder)


def _follow(root: str, path: str) -> str | None:
    current, links = root, 0
    pending = path.split("/")[::-1]
    while pending:
        name = pending.pop()
        if name in ("", "."):
            continue
        if name == "..":
            current = current if current == root else os.path.dirname(current)
            continue
        target = _link(f"{current}/{name}")
        if target is None:
            current = f"{current}/{name}"
            continue
        links += 1
        if links > MAX_LINKS:
            return None
        if target.startswith("/"):
            current = root
        pending += target.split("/")[::-1]
    return current


def _link(real: str) -> str | None:
    try:
        return os.readlink(real)
    except (OSError, ValueError):
        return None


def number(text: str) -> int | None:
    """Return a number in decimal or ``0x`` notation, None for anything else or beyond 64 bits."""
    # The length is bounded: Python refuses, or is slow at, thousands of digits.
    match = NUMBER.fullmatch(text.strip())
    if not match:
        return None
    value = int(match.group(1), 16) if match.group(1) else int(match.group())
    return value if value < 1 << 64 else None


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a key that sorts ``card10`` after ``card2``."""
    parts = re.findall(r"[0-9]{1,18}|[^0-9]+", name)
    return tuple((0, int(p), "") if "0" <= p[0] <= "9" else (1, 0, p) for p in parts)


def _account(number: int, database: str) -> str:
    import grp
    import pwd

    with contextlib.suppress(KeyError, OverflowError):
        return pwd.getpwuid(number).pw_name if database == "pwd" else grp.getgrgid(number).gr_name
    return str(number)
