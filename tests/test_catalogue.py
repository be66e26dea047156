"""The catalogue: the entries that there are, and what is said of a wrong one."""

import json
import re

import pytest
import smoke

from toolkit import catalogue, paths
from toolkit.errors import UsageError


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "containers").mkdir()
    (tmp_path / "definitions").mkdir()
    monkeypatch.setenv("TOOLKIT_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", catalogue.names())
def test_every_entry_is_well_formed(name):
    image = catalogue.load(name)
    assert image.description
    assert catalogue.definition(image).is_file()
    assert image.base in ("", *catalogue.names())
    # It starts from exactly one thing.
    assert sum(map(bool, (image.base, image.root, image.vendor))) == 1
    assert image.holds.imports
    assert set(image.holds.checks) <= set(smoke.CHECKS)
    for pattern in [*image.holds.labels.values(), *(c.output for c in image.holds.commands)]:
        re.compile(pattern)
    assert image.holds.labels["toolkit.image"] == name


def test_the_images_that_there_are():
    assert {"monai", "openfl", "pytorch-cpu", "pytorch-rocm"} <= set(catalogue.names())


def test_facts_of_monai():
    image = catalogue.load("monai")
    assert image.base == "pytorch-cpu"
    assert "monai==1.4.0" in image.packages
    assert "monai.engines.SupervisedTrainer" in image.holds.imports
    assert image.holds.torch_unchanged
    assert not image.provides


def test_an_unknown_image_comes_with_the_nearest_names():
    with pytest.raises(UsageError, match="unknown image 'monia'") as caught:
        catalogue.load("monia")
    assert caught.value.hint == "did you mean monai?"


@pytest.mark.parametrize("name", ["../containers/monai", "", "monai.toml"])
def test_a_path_is_no_name(name):
    with pytest.raises(UsageError, match="unknown image"):
        catalogue.load(name)


def test_a_malformed_entry_is_named(home):
    path = home / "containers/own.toml"
    path.write_text('description = "x"\ndefinition = "own.def"\nversion_of = "x"\npakages = []\n')
    with pytest.raises(UsageError, match=r"own\.toml: unknown key 'pakages'") as caught:
        catalogue.load("own")
    assert caught.value.hint == "did you mean packages?"
    path.write_text('description = "x"\ndefinition = "own.def"\nversion_of = "x"\n')
    with pytest.raises(UsageError, match=r"own\.toml: no definition .*definitions/own\.def"):
        catalogue.load("own")
    (home / "definitions/own.def").touch()
    assert catalogue.load("own").holds == catalogue.Holds()
    assert catalogue.names() == ["own"]
    assert catalogue.path_of("own") == paths.containers() / "own.toml" == path


def test_what_must_hold_goes_through_json():
    holds = catalogue.load("monai").holds
    plain = json.loads(json.dumps(catalogue.as_json(holds)))
    assert plain["imports"] == list(holds.imports)
    assert plain["commands"][0]["run"] == list(holds.commands[0].run)
    # smoke.py finds a test for each.
    tests = smoke.plan(plain, device="cpu", base={}, folder="/none")
    assert len({name for name, _ in tests}) == len(tests) > len(holds.imports)
