"""TOML into dataclasses: what fits is read, what does not is named."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from toolkit import schema
from toolkit.errors import UsageError


@dataclass(frozen=True)
class Inner:
    run: tuple[str, ...]
    limit: float = 1.0


@dataclass(frozen=True)
class Outer:
    name: str
    count: int = 1
    flag: bool = False
    one: Inner | None = None
    several: tuple[Inner, ...] = ()
    words: dict[str, str] = field(default_factory=dict)
    tables: dict[str, Inner] = field(default_factory=dict)
    either: int | str = 0
    anything: Any = None


def load(tmp_path, text):
    path = tmp_path / "entry.toml"
    path.write_text(text)
    return schema.load(path, Outer)


def test_a_whole_table_is_read(tmp_path):
    assert load(
        tmp_path,
        """
        name = "x"
        count = 2
        flag = true
        either = "three"
        anything = [1, "a"]
        words = { a = "b" }
        [one]
        run = ["true"]
        limit = 3
        [[several]]
        run = []
        [tables.first]
        run = ["a", "b"]
        """,
    ) == Outer(
        name="x",
        count=2,
        flag=True,
        one=Inner(("true",), 3.0),
        several=(Inner(()),),
        words={"a": "b"},
        tables={"first": Inner(("a", "b"))},
        either="three",
        anything=[1, "a"],
    )


def test_defaults_hold(tmp_path):
    assert load(tmp_path, 'name = "x"') == Outer("x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "missing key 'name'"),
        ("name = 3", "entry.toml: name: 3 is not a str"),
        ('name = "x"\ncount = "2"', "entry.toml: count: '2' is not a int"),
        ('name = "x"\ncount = true', "entry.toml: count: True is not a int"),
        ('name = "x"\ncount = 1.5', "entry.toml: count: 1.5 is not a int"),
        ('name = "x"\nwords = { a = 1 }', "entry.toml: words: a: 1 is not a str"),
        ('name = "x"\nwords = "a"', "entry.toml: words: 'a' is not a dict"),
        ('name = "x"\nseveral = [{ run = [1] }]', "entry.toml: several[0]: run[0]: 1 is not a str"),
        ('name = "x"\nseveral = [{}]', "entry.toml: several[0]: missing key 'run'"),
        ('name = "x"\ntables = { a = 1 }', "entry.toml: tables: a: 1 is not a table"),
        ('name = "x"\neither = 1.5', "entry.toml: either: 1.5 is not a "),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(tmp_path, text, said):
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text)
    assert said in caught.value.message


def test_an_unknown_key_comes_with_the_nearest_one(tmp_path):
    with pytest.raises(UsageError) as caught:
        load(tmp_path, 'name = "x"\nflga = 3')
    assert "unknown key 'flga'" in caught.value.message
    assert caught.value.hint == "did you mean flag?"


def test_no_file_no_toml_no_text(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*none\.toml: No such file"):
        schema.load(tmp_path / "none.toml", Outer)
    with pytest.raises(UsageError, match=r"entry\.toml is not valid TOML"):
        load(tmp_path, "name = ")
    (tmp_path / "binary.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(UsageError, match=r"binary\.toml is not valid TOML"):
        schema.load(tmp_path / "binary.toml", Outer)


def test_nearest():
    assert schema.nearest("monay", ["monai", "openfl"]) == "did you mean monai?"
    assert schema.nearest("pytorch", ["pytorch-cpu", "pytorch-rocm", "x"]) in (
        "did you mean pytorch-cpu or pytorch-rocm?",
        "did you mean pytorch-rocm or pytorch-cpu?",
    )
    assert schema.nearest("zzz", ["b", "a"]) == "known: a, b"
    assert schema.nearest("zzz", []) == "known: none"
