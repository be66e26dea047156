"""The parts of the federated experiment: data, shards, networks, training, report."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from images import seen_inside

from toolkit import paths

SCHEMA = json.loads((paths.home() / "docs/federated.schema.json").read_text())


@pytest.fixture(scope="module")
def found(monai_sif: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/federated_parts_inside.py saw; one run for all, since torch is slow to import."""
    seen: dict[str, Any] = seen_inside(
        monai_sif, "federated_parts_inside.py", tmp_path_factory.mktemp("federated")
    )
    return seen


# Data


@pytest.mark.image
def test_each_of_the_twelve_sets_is_read_trained_and_measured(found: dict[str, Any]) -> None:
    wanted = {
        "pathmnist": ("multi-class", 9, 3),
        "chestmnist": ("multi-label", 14, 1),
        "dermamnist": ("multi-class", 7, 3),
        "octmnist": ("multi-class", 4, 1),
        "pneumoniamnist": ("multi-class", 2, 1),
        "retinamnist": ("ordinal", 5, 3),
        "breastmnist": ("multi-class", 2, 1),
        "bloodmnist": ("multi-class", 8, 3),
        "tissuemnist": ("multi-class", 8, 1),
        "organamnist": ("multi-class", 11, 1),
        "organcmnist": ("multi-class", 11, 1),
        "organsmnist": ("multi-class", 11, 1),
    }
    assert set(found["sets"]) == set(wanted)
    for name, seen in found["sets"].items():
        assert seen["data"] == [name, *wanted[name], 28]
        assert seen["counts"] == [40, 13, 12]
        assert seen["as held"]
        assert seen["labels"] == ["int64", [13, 14 if name == "chestmnist" else 1]]
        assert seen["trained"]["samples"] == 40
        assert seen["seen"]["samples"] == 13
        assert 0 <= seen["seen"]["accuracy"] <= 1
        # An accuracy of 13 images, each right or wrong, is a thirteenth.
        thirteenths = seen["seen"]["accuracy"] * 13 * (14 if name == "chestmnist" else 1)
        assert thirteenths == pytest.approx(round(thirteenths), abs=1e-4)
        assert math.isfinite(seen["trained"]["loss"])


@pytest.mark.image
@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("no val", ["val_images is missing"]),
        ("no labels", ["test_labels is missing"]),
        ("fewer labels", ["train: 20 images", "19"]),
        ("floats", ["train", "float32"]),
        ("float labels", ["val: labels of float64"]),
        ("negative", ["val: a label is -5"]),
        ("class 8", ["a label is 8", "7"]),
        ("two labels", ["2 labels an image", "bloodmnist"]),
        ("volume", ["(20, 28, 28, 28)"]),
        ("grey", ["1 channels", "has 3"]),
        ("other size", ["different shapes"]),
        ("oblong", ["28 x 64"]),
        ("empty", ["val: 0 images"]),
        ("objects", ["damaged"]),
        ("cut short", ["damaged"]),
        ("no zip", ["damaged"]),
        ("nothing in it", ["damaged"]),
        ("bytes changed", ["damaged"]),
        ("npy", ["damaged"]),
        ("missing", ["octmnist.npz cannot be read: No such file"]),
    ],
)
def test_a_file_that_is_no_set_is_told(found: dict[str, Any], case: str, named: list[str]) -> None:
    message = found["bad"][case]
    assert re.match(r"DataError: /work/bad/\w+\.npz", message)
    for words in named:
        assert words in message


@pytest.mark.image
def test_what_is_right_is_read(found: dict[str, Any]) -> None:
    for case in ("nothing", "flat labels", "unknown set"):
        assert found["bad"][case] == "no error"


# Shards


@pytest.mark.image
def test_shards_are_disjoint_and_covering_and_the_same_everywhere(found: dict[str, Any]) -> None:
    assert len(found["shards"]["cases"]) == 16
    for case in found["shards"]["cases"]:
        assert case["covering"]
        assert case["rising"]
        assert case["parts"] == len(case["sizes"]) == case["count"]
        assert min(case["sizes"]) >= max(1, case["total"] // (10 * case["count"]))
        assert case["same"]
        if case["count"] > 1 and case["total"] > 3:
            assert case["other seed"]
        if case["how"] == "iid":
            assert max(case["sizes"]) - min(case["sizes"]) <= 1
    assert found["shards"]["stable"] == [[1, 4, 5, 6], [13, 14, 37, 50]]


@pytest.mark.image
def test_label_skew_gives_envoys_few_classes_by_choice(found: dict[str, Any]) -> None:
    strong, some, none, iid = found["shards"]["skew"]
    assert strong > 0.4 > some > 0.2 > iid
    assert none < 0.2


@pytest.mark.image
@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("too many", "2 images cannot be shared out among 3 envoys"),
        ("none", "among 0 envoys"),
        ("way", "only iid, label-skew"),
        ("alpha", "alpha must be above 0"),
        ("rank", "no envoy 2 of 2"),
    ],
)
def test_what_cannot_be_shared_out_is_told(found: dict[str, Any], case: str, named: str) -> None:
    assert named in found["shards"]["bad"][case]


@pytest.mark.image
def test_an_envoy_with_other_data_has_another_fingerprint(found: dict[str, Any]) -> None:
    envoys = found["shards"]["envoys"]
    assert envoys["as expected"]
    assert envoys["distinct"] == 4
    assert len({envoys["first"], envoys["pixel"], envoys["label"]}) == 3
    assert found["shards"]["digest"] == [True] * 3


@pytest.mark.image
def test_envoys_share_both_splits_and_none_trains_on_what_it_is_measured_with(
    found: dict[str, Any],
) -> None:
    envoys = found["shards"]["envoys"]
    assert sum(envoys["train"]) == envoys["images"] == 90
    assert envoys["val"] == [11, 10, 10]
    assert envoys["val images"]
    assert envoys["test"] == [20] * 3


@pytest.mark.image
def test_the_shards_of_all_envoys_in_one_place_are_the_set(found: dict[str, Any]) -> None:
    joined = found["shards"]["joined"]
    assert joined["train"] == 90
    # The split to test is the same for all of them, unless it is not.
    assert joined["counts"] == [90, 31, 20, 31]
    assert re.match("ShardError: envoy 1 has data of .* 8, .*, envoy 2 of .* 7,", joined["other"])
    assert joined["shared"] == [0, 30, 0]


# What users bring


@pytest.mark.image
def test_users_own_descriptor_and_network_are_taken_by_file_and_by_module(
    found: dict[str, Any],
) -> None:
    own = found["own"]
    for name in ("own_parts.py:describe", "package.parts:describe"):
        assert own[f"data {name}"] == ["ours", "multi-class", 3, 1, [6, 1], 12]
    assert own["net own_parts.py:Net"] == own["net package.parts:Net"] == "Net"
    assert own["kept"]
    assert own["net later.py:Net"] == own["net later:Net"] == ["Net", 64]


@pytest.mark.image
@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("no file", "there is no file /work/own/none.py"),
        ("no relative file", "there is no file /work/own/none.py or /"),
        ("no module", "ModuleNotFoundError"),
        ("no name", "has no callable descibe; it has Brief, Empty, Extra, Late"),
        ("no callable", "has no callable VALUE"),
        ("no colon", "neither package.module:callable nor file.py:callable"),
        ("syntax", "SyntaxError"),
        ("raises", "own_parts.py:broken raises RuntimeError: no scanner"),
        ("nothing", "returns NoneType"),
        ("lacking", "the split val is missing"),
        ("wrong net", "makes (2, 4) of two images, not (2, 3)"),
        ("leaves", "leaves.py cannot be imported: SystemExit: 0"),
        ("leaving", "own_parts.py:leaving raises SystemExit: 0"),
        ("numbers", "own_parts.py:numbers: the split train is no pair of images and labels"),
        ("exiting", "own_parts.py:exiting raises SystemExit: 0"),
        ("late", "own_parts.py:Late cannot take images of 1x28x28: SystemExit: 0"),
        ("brief", "own_parts.py:Brief has mean of torch.bfloat16"),
        ("extra", "own_parts.py:Extra has _extra_state in its state"),
        ("empty", "own_parts.py:Empty has no parameters"),
        ("root", "zero is infinite or no number after the training"),
        ("other net", "the weights are of another network: Error(s) in loading state_dict"),
        ("raising net", "raises KeyError: 'size'"),
        ("no net", "unexpected keyword argument"),
    ],
)
def test_what_is_wrong_with_users_own_is_told(found: dict[str, Any], case: str, named: str) -> None:
    assert re.match(r"(Custom|Shard|Data|Network|Training)Error: ", found["own"]["bad"][case])
    assert named in found["own"]["bad"][case]


# Networks


@pytest.mark.image
def test_the_default_is_the_tutorials_network(found: dict[str, Any]) -> None:
    nets = found["nets"]
    assert nets["convolutions"] == [
        [3, 16, 3, 3, 0, 0],
        [16, 16, 3, 3, 0, 0],
        [16, 64, 3, 3, 0, 0],
        [64, 64, 3, 3, 0, 0],
        [64, 64, 3, 3, 1, 1],
    ]
    block = ["Conv2d", "BatchNorm2d", "ReLU"]
    pooled = [*block, "MaxPool2d"]
    assert nets["order"] == [
        *block, *pooled, *block, *block, *pooled, "Linear", "ReLU", "Linear", "ReLU", "Linear",
    ]  # fmt: skip
    assert nets["linear"] == [[1024, 128], [128, 128], [128, 8]]
    assert nets["larger"] == [2, 8]


@pytest.mark.image
def test_weights_follow_from_the_seed_alone(found: dict[str, Any]) -> None:
    nets = found["nets"]
    assert nets["same seed"]
    assert nets["other seed"]
    assert nets["untouched"]


@pytest.mark.image
def test_networks_of_monai_are_made_by_name(found: dict[str, Any]) -> None:
    nets = found["nets"]
    assert (nets["dense"], nets["resnet"]) == ("DenseNet121", "ResNet")
    assert "there is no network 'cnm'" in nets["bad"]["unknown"]
    assert "(2, 2, 32, 32) of two images" in nets["bad"]["segmenting"]
    assert "it takes spatial_dims, in_channels, out_channels, channels" in nets["bad"]["needs more"]
    assert "cannot take images of 1x10x10" in nets["bad"]["too small"]


# Training


@pytest.mark.image
def test_accuracy_is_that_of_each_image_with_its_own_label(found: dict[str, Any]) -> None:
    counting = found["counting"]
    assert set(counting["by batch"].values()) == {0.7}
    assert counting["right"] == counting["right flat"] == 7
    # All with all, which is what comparing (N) with (N, 1) does, is no accuracy.
    assert counting["defect"] == 2.5
    assert counting["loss"] == pytest.approx(counting["loss expected"])
    assert all("do not fit logits" in each for each in counting["refused"])
    assert counting["mode"]


@pytest.mark.image
def test_of_several_labels_the_mean_accuracy_is_taken(found: dict[str, Any]) -> None:
    # By hand: 2, 3, 2 and 3 of 3 labels are right.
    assert found["counting"]["labels"] == pytest.approx(10 / 12)
    # Two of twelve are wrong by a logit of 5.
    wrong, good = math.log1p(math.exp(5)), math.log1p(math.exp(-5))
    assert found["counting"]["labels loss"] == pytest.approx((2 * wrong + 10 * good) / 12)


@pytest.mark.image
def test_training_is_what_a_plain_loop_does_with_fresh_optimizers(found: dict[str, Any]) -> None:
    learning = found["learning"]
    assert learning["same"]
    assert learning["by hand"] < 1e-5
    assert learning["seen"]["samples"] == 400
    assert learning["accuracy"] == pytest.approx(learning["accuracy by hand"])


@pytest.mark.image
def test_an_envoy_alone_has_the_budget_of_the_federation(found: dict[str, Any]) -> None:
    alone, (accuracy, test) = found["learning"]["alone"], found["learning"]["alone by hand"]
    assert len(alone["accuracy"]) == 4
    assert alone["accuracy"][: alone["best_round"]] == pytest.approx(accuracy)
    assert max(alone["accuracy"]) == accuracy[-1] > 0.9
    assert alone["test_accuracy"] == pytest.approx(test)
    assert alone["samples"] == 400
    # Of the rounds that are equally good the first one, with its own weights.
    assert found["learning"]["best"] == [2, 2, 5]
    assert not found["learning"]["kept"]


@pytest.mark.image
def test_what_cannot_be_trained_on_is_told(found: dict[str, Any]) -> None:
    learning = found["learning"]
    assert learning["one left over"] == 5
    assert re.match("TrainingError: the loss is (nan|inf)", learning["diverged"])
    assert "there are 0 images and 0 labels to train on" in learning["nothing"]
    assert "400 images and 3 labels to validate on" in learning["unpaired"]


# The report


@pytest.fixture(scope="module")
def report() -> Any:
    """The module itself: it needs nothing but the standard library."""
    path = paths.jobs() / "federated/report.py"
    spec = importlib.util.spec_from_file_location("federated_report", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = [*sys.path]
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def recorded(rounds: int = 3, envoys: int = 4, **more: Any) -> dict[str, Any]:
    """A record as the driver makes it."""

    def envoy(number: int, rank: int) -> dict[str, Any]:
        return {
            "train_loss": 2.0 / number,
            "local_accuracy": 0.1 * number,
            "aggregated_accuracy": 0.1 * number + 0.1 * rank,
            "samples": 100,
            "validation_samples": 10 + 10 * rank,
            "device": "cpu: CPU, 1 threads",
            "compute_s": 1.0 + rank,
            "transfer_s": 0.25,
            "wait_s": 0.5,
        }

    solo = {
        "accuracy": [0.1 * n for n in range(1, rounds + 1)],
        "best_round": rounds,
        "test_accuracy": 0.3,
        "samples": 100,
        "seconds": 9.0,
    }
    return {
        "settings": {"dataset": "bloodmnist", "rounds": rounds, "envoys": envoys, "model": "cnn"},
        "engine": {"name": "openfl", "openfl": "1.7.1", "torch": "2.3.0"},
        "data": {"name": "bloodmnist", "task": "multi-class", "classes": 8, "channels": 3,
                 "train": 400, "validation": 100, "test": 50, "sha256": "0" * 64},
        "rounds": [
            {
                "round": number,
                "seconds": 2.5 + envoys,
                "validation_samples": 100,
                "envoys": {f"envoy-{rank + 1}": envoy(number, rank) for rank in range(envoys)},
            }
            for number in range(1, rounds + 1)
        ],
        "final": {"accuracy": 0.5, "test_accuracy": 0.45, "best_round": 2, "best_accuracy": 0.6,
                  "best_test_accuracy": 0.55},
        "baselines": {"alone": {f"envoy-{rank + 1}": solo for rank in range(envoys)},
                      "together": {**solo, "test_accuracy": 0.9}},
        "seconds": {"start": 3.0, "rounds": 30.0},
        **more,
    }  # fmt: skip


class Page(HTMLParser):
    """Notes what a page has and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "data", "srcset")]


def drawings(text: str) -> list[Any]:
    """The charts of a page that needs nothing else."""
    page = Page()
    page.feed(text)
    assert not page.loads
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?:", text)
    return [ElementTree.fromstring(each) for each in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def test_metrics_and_page_are_written(report: Any, tmp_path: Path) -> None:
    metrics_path, page_path = report.write(tmp_path, recorded())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "report.html"]
    metrics = json.loads(metrics_path.read_text())
    assert broken_rules(metrics, SCHEMA) == []
    assert metrics == {"schema": 1, "job": "federated", **recorded()}
    text = page_path.read_text()
    accuracy, each, loss, times = drawings(text)
    texts = ["".join(svg.itertext()) for svg in (accuracy, each, loss, times)]
    for words in ("aggregated", "all data at once", "envoy-1 alone", "envoy-4 alone"):
        assert words in texts[0]
    assert "envoy-4, own" in texts[1]
    for words in ("compute", "transfer", "wait", "round 3, envoy-4"):
        assert words in texts[3]
    # All that is drawn lies within its drawing.
    for svg in (accuracy, each, loss, times):
        width, height = (float(word) for word in svg.attrib["viewBox"].split()[2:])
        for piece in svg.iter("rect"):
            assert 0 <= float(piece.attrib["x"]) <= width
            assert 0 <= float(piece.attrib["y"]) <= height - 4
    assert "<td>6.50</td><td>4.00</td><td>2.50</td><td>4</td>" in text
    for figure in ("0.4500", "0.5500", "0.9000"):
        assert figure in text


def test_the_accuracy_of_a_round_is_that_of_all_images(report: Any) -> None:
    first = recorded(rounds=1)["rounds"][0]
    # 10, 20, 30 and 40 images with accuracies of 0.1, 0.2, 0.3 and 0.4.
    assert report.aggregated(first) == pytest.approx(0.3)
    assert report.aggregated({**first, "accuracy": 0.7}) == 0.7
    for envoy in first["envoys"].values():
        del envoy["validation_samples"]
    assert report.aggregated(first) == pytest.approx(0.25)
    first["envoys"]["envoy-4"]["aggregated_accuracy"] = None
    assert report.aggregated(first) == pytest.approx(0.2)
    assert report.aggregated({"round": 1, "envoys": {}}) is None


def test_what_is_missing_or_no_number_is_left_out(report: Any, tmp_path: Path) -> None:
    record = recorded(baselines=None)
    del record["rounds"][1]["envoys"]["envoy-2"]
    envoy = record["rounds"][0]["envoys"]["envoy-1"]
    envoy.update(train_loss=math.nan, transfer_s=None, wait_s=math.inf)
    record["rounds"][2]["seconds"] = None
    record["final"].update(best_round=None, test_accuracy=None)
    record["settings"]["data"] = tmp_path
    report.write(tmp_path, record)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert broken_rules(metrics, SCHEMA) == []
    assert metrics["rounds"][0]["envoys"]["envoy-1"]["train_loss"] is None
    assert metrics["settings"]["data"] == str(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "nan" not in text.lower().replace("finance", "")
    assert "alone" not in "".join(drawings(text)[0].itertext())
    # Not a single round was aggregated.
    report.write(tmp_path, recorded(rounds=0, baselines={}))
    assert len(drawings((tmp_path / "report.html").read_text())) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert broken_rules(metrics, SCHEMA) == []


def test_many_rounds_and_envoys_stay_readable(report: Any, tmp_path: Path) -> None:
    report.write(tmp_path, recorded(rounds=50, envoys=16))
    times = drawings((tmp_path / "report.html").read_text())[3]
    assert len(list(times.iter("title"))) == 16 * 3
    assert "envoy-10, all rounds" in "".join(times.itertext())


def test_names_are_no_markup(report: Any, tmp_path: Path) -> None:
    record = recorded()
    record["settings"]["dataset"] = "<script>alert(1)</script>"
    for each in record["rounds"]:
        each["envoys"]["<b>&'"] = each["envoys"].pop("envoy-1")
    record["baselines"]["alone"]["<b>&'"] = record["baselines"]["alone"].pop("envoy-1")
    report.write(tmp_path, record)
    text = (tmp_path / "report.html").read_text()
    assert "<script>" not in text and "<b>" not in text
    assert len(drawings(text)) == 4


def test_a_report_that_cannot_be_written_leaves_the_old_one(
    report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report.write(tmp_path, recorded())
    before = (tmp_path / "metrics.json").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        report.write(tmp_path, recorded(rounds=1))
    assert (tmp_path / "metrics.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_the_schema_refuses_what_is_wrong() -> None:
    wrong: list[dict[str, Any]] = [
        {"rounds": [{"round": 0, "envoys": {}, "seconds": 1}]},
        {"rounds": [{"round": 1, "envoys": {"a": {"train_loss": 1}}, "seconds": 1}]},
        {"final": {"accuracy": 1.5, "best_round": 1}},
        {"final": {"accuracy": 0.5}},
        {"other": 1},
        {"baselines": {"together": {"accuracy": []}}},
    ]
    for each in wrong:
        assert broken_rules({"schema": 1, "job": "federated", **recorded(), **each}, SCHEMA)


def broken_rules(value: Any, schema: dict[str, Any], where: str = "$") -> list[str]:
    """Return how a value breaks a schema; knows the keywords that ours uses."""
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    known = {"type", "required", "properties", "additionalProperties", "items", "enum", "const"}
    known |= {"$schema", "$defs", "title", "description", "minimum", "maximum", "anyOf"}
    assert set(schema) <= known
    if "anyOf" in schema:
        tried = [broken_rules(value, each, where) for each in schema["anyOf"]]
        return min(tried, key=len)
    names: dict[str, Any] = {"object": dict, "array": list, "string": str, "integer": int}
    names |= {"null": type(None), "number": (int, float)}
    kinds = schema.get("type", [])
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
        rules, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        found += [f"{where}.{n} is missing" for n in schema.get("required", ()) if n not in value]
        for name, inner in value.items():
            rule = rules.get(name, others)
            found += (
                [f"{where}.{name} is unknown"]
                if rule is False
                else broken_rules(inner, rule or {}, f"{where}.{name}")
            )
    if isinstance(value, list):
        for index, inner in enumerate(value):
            found += broken_rules(inner, schema.get("items", {}), f"{where}[{index}]")
    return found
