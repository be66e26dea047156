"""Read TOML tables into dataclasses, refusing what the dataclass does not know."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import sys
import types
import typing
from pathlib import Path
from typing import Any, TypeVar, cast

from toolkit.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """Return "did you mean ..." for a misspelt name, or the list of known names.

    Parameters
    ----------
    name : str
        What was given.
    known : iterable of str
        What would have been right.
    """
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(choices) or 'none'}"


def load(path: Path, cls: type[T]) -> T:
    """Read a TOML file into a dataclass.

    Parameters
    ----------
    path : Path
        The file.
    cls : type
        A dataclass; a field without a default is required, a field whose type
        is a dataclass is a table, ``dict[str, D]`` is a table of tables.

    Raises
    ------
    UsageError
        If the file cannot be read, is no TOML, or does not fit the dataclass;
        the message names the file and the key.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    return cast(T, convert(table, cls, where=str(path)))


def convert(value: Any, expected: Any, *, where: str) -> Any:
    """Check a decoded TOML value against a type and return it as that type.

    Parameters
    ----------
    value : object
        What the TOML file holds.
    expected : type
        A dataclass, a plain type, ``tuple[T, ...]``, ``dict[str, T]``, or a union of these.
    where : str
        Place to name in an error: the file and the key.

    Raises
    ------
    UsageError
        If the value does not fit.
    """
    if expected is Any:
        return value
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if dataclasses.is_dataclass(expected) and isinstance(expected, type):
        return _convert_table(value, expected, where=where)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return convert(value, option, where=where)
            except UsageError:
                continue
    elif origin is tuple and isinstance(value, list):
        return tuple(convert(v, arguments[0], where=f"{where}[{i}]") for i, v in enumerate(value))
    elif origin is dict and isinstance(value, dict):
        return {k: convert(v, arguments[1], where=f"{where}: {k}") for k, v in value.items()}
    elif expected is float and type(value) is int:
        return float(value)
    elif isinstance(expected, type) and type(value) is expected:
        return value
    wanted = getattr(expected, "__name__", str(expected)) if origin is None else str(expected)
    raise UsageError(f"{where}: {value!r} is not a {wanted}")


#: A site has many partitions, of one class.
_hints = functools.cache(typing.get_type_hints)


def _convert_table(value: Any, cls: type[T], *, where: str) -> T:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: {value!r} is not a table")
    hints = _hints(cast(Any, cls))
    fields = {f.name: f for f in dataclasses.fields(cast(Any, cls))}
    for key in value:
        if key not in fields:
            raise UsageError(f"{where}: unknown key {key!r}", hint=nearest(key, fields))
    missing = [
        name
        for name, field in fields.items()
        if name not in value
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UsageError(f"{where}: missing key {', '.join(map(repr, missing))}")
    return cls(**{k: convert(v, hints[k], where=f"{where}: {k}") for k, v in value.items()})
