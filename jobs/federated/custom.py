"""What users bring themselves: a function or class, named by module and name."""

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any, Callable, List

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "common"))

from ending import Interrupted

#: Folders of the user's own code: the one that the program was started in, as it leaves that later
#: for others; and what job.sh binds.
FOLDERS: List[Path] = [Path.cwd(), Path("/code")]


class CustomError(Exception):
    """What was named is not there, or cannot be loaded."""


def is_path(name: str) -> bool:
    """Return whether a name means something of the user's, and not one of those that are here."""
    return ":" in name


def load(name: str) -> Callable[..., Any]:
    """Return what ``package.module:callable`` or ``file.py:callable`` names.

    Parameters
    ----------
    name : str
        Modules and files are looked for in `FOLDERS`, modules on Python's path first; what lies
        beside a file can be imported by it.

    Raises
    ------
    CustomError
        If it is not there, its code raises an error, or it cannot be called.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise CustomError(f"{name!r} is neither package.module:callable nor file.py:callable")
    try:
        module = _file(Path(place)) if place.endswith(".py") else _module(place)
    except (CustomError, Interrupted):
        raise
    except (Exception, SystemExit) as error:
        raise CustomError(f"{place} cannot be imported: {type(error).__name__}: {error}") from error
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        there = sorted(n for n, v in vars(module).items() if callable(v) and n[0] != "_")
        raise CustomError(
            f"{place} has no callable {attribute}; it has {', '.join(there) or 'none'}"
        )
    return found  # type: ignore[no-any-return]


def digest(name: str) -> str:
    """Return the SHA-256 of the user's file that has what is named, or "" if it is none of his.

    Raises
    ------
    CustomError
        As `load`.
    """
    if not is_path(name):
        return ""
    load(name)
    place = name.rpartition(":")[0]
    file = _find(Path(place)) if place.endswith(".py") else sys.modules[place].__file__
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


def _module(name: str) -> Any:
    sys.path += [str(each) for each in FOLDERS if each.is_dir() and str(each) not in sys.path]
    return importlib.import_module(name)


def _find(path: Path) -> Path:
    tried = list(dict.fromkeys((each / path).resolve() for each in FOLDERS))
    for each in tried:
        if each.is_file():
            return each
    raise CustomError(f"there is no file {' or '.join(map(str, tried))}")


def _file(path: Path) -> Any:
    path = _find(path)
    name = f"custom_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, str(path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # classes of it can be pickled then
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
