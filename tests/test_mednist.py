"""The job mednist, trained for real in the image on a few made-up images."""

from __future__ import annotations

import json
import os
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from images import seen_inside

from toolkit import paths

CLASSES = ["AbdomenCT", "BreastMRI", "CXR", "ChestCT", "Hand", "HeadCT"]
SCHEMA = json.loads((paths.home() / "docs/metrics.schema.json").read_text())

#: How a message ends that names all images of a class.
ALL_OF_HAND = " and 5 more"

pytestmark = pytest.mark.image


@pytest.fixture(scope="module")
def found(monai_sif: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/mednist_inside.py saw; one run for all tests, since torch is slow to import."""
    seen: dict[str, Any] = seen_inside(
        monai_sif, "mednist_inside.py", tmp_path_factory.mktemp("mednist")
    )
    return seen


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("stray folder", ["Feet", "no class"]),
        ("stray file", ["CXR/.DS_Store", "no JPEG"]),
        ("nested folder", ["CXR/more", "folder within a class"]),
        ("empty file", ["Hand/000003.jpeg", "no JPEG"]),
        ("cut short", ["Hand/000003.jpeg", "truncated"]),
        *((f"cut by {count}", [ALL_OF_HAND, "truncated"]) for count in (1, 2, 3, 20)),
        ("text", ["Hand/000003.jpeg", "no JPEG"]),
        ("png", ["Hand/000003.jpeg", "no JPEG"]),
        ("small", ["Hand/000003.jpeg", "64 x 32"]),
        ("colour", ["Hand/000003.jpeg", "RGB"]),
        ("dead link", ["CXR/dang.jpeg", "No such file"]),
        ("pipe", ["CXR/pipe.jpeg", "no file"]),
        ("no class", ["HeadCT", "no images"]),
        ("bytes changed", ["Hand/000003.jpeg", "sha256"]),
        ("file gone", ["Hand/000003.jpeg", "lacks"]),
        ("file more", ["CXR/x.jpeg", "manifest lacks"]),
        ("no data", ["no MedNIST in"]),
        ("archive cut short", ["MedNIST.tar.gz", "damaged"]),
        ("archive no gzip", ["MedNIST.tar.gz", "damaged"]),
        ("archive changed", ["MedNIST.tar.gz", "damaged"]),
        ("archive stray folder", ["Feet", "no class"]),
        ("archive outside", ["no class", ".."]),
        ("archive bad image", ["Hand/bad.jpeg", "no JPEG"]),
        ("archive long name", ["Hand/longlong", "no JPEG"]),
    ],
)
def test_bad_data_are_named_and_nothing_is_left_of_them(
    found: dict[str, Any], case: str, named: list[str]
) -> None:
    message = found["bad"][case]
    assert "LEFT" not in message
    for words in named:
        assert words in message


def test_data_that_are_right_are_taken(found: dict[str, Any]) -> None:
    for case in ("nothing", "readme", "manifest", "more behind"):
        assert found["bad"][case] == "loaded"


def test_the_same_data_from_anywhere_are_the_same(found: dict[str, Any]) -> None:
    same = found["same"]
    assert same["equal"] == [True] * 4
    assert same["sorted"]
    assert same["labels"] == [10, 9, 10, 10, 10, 10]
    assert same["members"]


def test_what_is_decoded_is_used_again(found: dict[str, Any]) -> None:
    assert found["same"]["reused"]
    assert found["same"]["meanwhile"] == [1]


def test_the_split_is_that_of_monai(found: dict[str, Any]) -> None:
    assert found["same"]["split"] == [47164, 5895, 5895]
    assert found["same"]["disjoint"] == 58954
    # The same on every node and at any time: these are NumPy's frozen generator's.
    assert found["same"]["stable"] == [31492, 32687, 1351]
    assert found["same"]["as monai"]


def test_batches_are_what_the_transforms_of_monai_make(found: dict[str, Any]) -> None:
    monai = found["monai"]
    assert monai["equal"]
    assert monai["equal kept"] == [True] * 4
    assert monai["flat"] == 0
    assert monai["turned"] < 1e-3


def test_augmentation_changes_images_and_is_the_same_however_it_is_shared(
    found: dict[str, Any],
) -> None:
    monai = found["monai"]
    assert 0 <= monai["range"][0] < monai["range"][1] <= 1
    # 7 of 8: each of three changes comes with probability 0.5.
    assert 0.6 < monai["augmented"] < 1
    assert monai["three processes"]
    assert monai["from step 2"]
    assert monai["other epoch"]
    assert monai["steps"] == [2, 2, 2, 3, 0]


def test_a_run_that_was_broken_twice_ends_with_the_same_weights(found: dict[str, Any]) -> None:
    training = found["training"]
    assert [training[name]["code"] for name in ("whole", "first", "second", "third")] == [
        0, 85, 85, 0,
    ]  # fmt: skip
    assert "SIGUSR1" in training["first"]["out"]
    assert "resumed at epoch 1, step 2" in training["second"]["out"]
    assert "SIGTERM" in training["second"]["out"]
    assert "resumed at epoch 2" in training["third"]["out"]
    assert training["weights"]
    assert training["optimizer"]
    whole, broken = training["metrics"]
    assert whole["losses"] == broken["losses"]
    assert whole["test"] == broken["test"]
    assert [each["runs"] for each in (whole, broken)] == [1, 3]


def test_a_run_that_is_ended_before_its_first_step_has_nothing_to_save(
    found: dict[str, Any],
) -> None:
    early = found["training"]["early"]
    assert early["code"] == 85
    assert "first step" not in early["out"]
    assert found["training"]["early files"] == []


def test_nothing_half_written_is_left(found: dict[str, Any]) -> None:
    assert set(found["training"]["files"]) <= {"checkpoint.pt", "tensorboard"}


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(found: dict[str, Any]) -> None:
    training = found["training"]
    assert training["other"]["code"] == training["damaged"]["code"] == 1
    assert "rate 0.002, not 0.1" in training["other"]["err"]
    assert "name another folder in RESULTS, or remove checkpoint.pt" in training["other"]["err"]
    assert "checkpoint.pt is damaged" in training["damaged"]["err"]
    assert "Traceback" not in training["other"]["err"] + training["damaged"]["err"]


def test_values_that_an_option_cannot_have_are_a_wrong_call(found: dict[str, Any]) -> None:
    calls = found["wrong calls"]
    assert set(calls) == {
        "--rate nan", "--rate -1", "--decay -1", "--workers -2", "--checkpoint-minutes inf",
        "--epochs 0",
    }  # fmt: skip
    for words, said in calls.items():
        option, _, value = words.partition(" ")
        assert said.startswith("2: ")
        assert re.search(rf"error: argument {option}: invalid \w+ value: '{value}'\n$", said)


def test_a_loss_that_is_no_number_ends_the_run(found: dict[str, Any]) -> None:
    diverged = found["training"]["diverged"]
    assert diverged["code"] == 1
    assert "--rate" in diverged["err"]


def test_predictions_are_printed_and_metrics_hold_the_whole_test_split(
    found: dict[str, Any],
) -> None:
    out, metrics = found["training"]["whole"]["out"], found["training"]["metrics"][0]
    assert broken_rules(metrics, SCHEMA) == []
    printed = re.findall(r"^Class prediction is (\w+)\. Ground-truth: (\w+)$", out, re.M)
    assert len(printed) == min(10, metrics["data"]["test"])
    assert {name for pair in printed for name in pair} <= set(CLASSES)
    test = metrics["test"]
    confusion = test["confusion"]
    assert sum(map(sum, confusion)) == test["images"] == metrics["data"]["test"] == 5
    right = sum(confusion[i][i] for i in range(6))
    assert test["accuracy"] == pytest.approx(right / 5)
    assert f"test accuracy {right / 5:.4f} of 5 images" in out
    assert len(metrics["misclassified"]) == 5 - right
    for index, each in enumerate(test["classes"]):
        called = sum(row[index] for row in confusion)
        support, hit = sum(confusion[index]), confusion[index][index]
        assert each["support"] == support
        assert each["precision"] == (pytest.approx(hit / called) if called else None)
        assert each["recall"] == (pytest.approx(hit / support) if support else None)
    assert len(metrics["losses"]) == 6
    assert [row["epoch"] for row in metrics["epochs"]] == [1, 2]
    phases = {name: spent for name, spent in metrics["seconds"].items() if name != "total"}
    assert sum(phases.values()) == pytest.approx(metrics["seconds"]["total"], rel=0.02)


class Page(HTMLParser):
    """Notes what a page has and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "data", "srcset")]


def test_the_report_needs_nothing_else(found: dict[str, Any]) -> None:
    page, metrics = Page(), found["training"]["metrics"][0]
    text = found["training"]["page"]
    page.feed(text)
    wrong = metrics["misclassified"]
    assert page.tags.count("img") == len(page.loads) == len(wrong) > 0
    assert all(each.startswith("data:image/png;base64,iVBOR") for each in page.loads)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?:", text)
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == page.tags.count("svg") == 4
    for each in drawings:
        ElementTree.fromstring(each)
    for words in ("Loss", "Accuracy", "Confusion matrix", "Misclassified", "Where the time went"):
        assert f"<h2>{words}" in text
    for each in wrong:
        assert each["file"] in text


def test_events_of_tensorboard_are_written(found: dict[str, Any]) -> None:
    assert len(found["training"]["events"]) == 1


def test_the_job_says_where_data_are_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(paths.jobs() / "mednist/job.sh")],
        env={k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TOOLKIT"))}
        | {"MEDNIST_DATA": str(tmp_path / "none"), "TOOLKIT_HOME": str(paths.home())},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"no data at {tmp_path}/none" in done.stderr
    assert "toolkit data fetch mednist" in done.stderr
    assert not list(tmp_path.iterdir())


def broken_rules(value: Any, schema: dict[str, Any], where: str = "$") -> list[str]:
    """Return how a value breaks a schema; knows the keywords that ours uses."""
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    known = {"type", "required", "properties", "additionalProperties", "items", "enum", "const"}
    known |= {"$schema", "$defs", "title", "description", "minimum", "maximum"}
    assert set(schema) <= known
    kinds = schema.get("type", [])
    names = {"object": dict, "array": list, "string": str, "integer": int, "null": type(None)}
    names |= {"number": (int, float), "boolean": bool}  # type: ignore[dict-item]
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(isinstance(value, names[kind]) for kind in kinds):
        return [f"{where}: {value!r} is no {kinds}"]
    found = []
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        found.append(f"{where}: {value!r}")
    if isinstance(value, (int, float)) and not (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
    ):
        found.append(f"{where}: {value!r} is out of range")
    if isinstance(value, dict):
        rules = schema.get("properties", {})
        found += [f"{where}.{name} is missing" for name in schema.get("required", ())]
        found = [
            each for each in found if not any(each == f"{where}.{n} is missing" for n in value)
        ]
        for name, inner in value.items():
            rule = rules.get(name, schema.get("additionalProperties", {}))
            found += (
                [f"{where}.{name} is unknown"]
                if rule is False
                else broken_rules(inner, rule or {}, f"{where}.{name}")
            )
    if isinstance(value, list):
        for index, inner in enumerate(value):
            found += broken_rules(inner, schema.get("items", {}), f"{where}[{index}]")
    return found
