"""What the driver makes of a federation, and wrong calls: without one, with a made-up engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from images import seen_inside
from test_federated import openfl_sif  # noqa: F401

pytestmark = pytest.mark.image


@pytest.fixture(scope="module")
def found(
    openfl_sif: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """What tests/federated_driver_inside.py saw; one run for all."""
    seen: dict[str, Any] = seen_inside(
        openfl_sif, "federated_driver_inside.py", tmp_path_factory.mktemp("driver")
    )
    return seen


@pytest.fixture(scope="module")
def runs(found: dict[str, Any]) -> dict[str, Any]:
    seen: dict[str, Any] = found["runs"]
    return seen


# Runs


def test_code_that_exits_is_no_success(runs: dict[str, Any]) -> None:
    code, said = runs["exit"]
    assert code == 1
    assert said == "error: code that is not the toolkit's has called sys.exit(0)\n"
    # A signal that does not wait ends the program all the same.
    assert runs["signal"] == [["Interrupted", 143], ""]


def test_a_run_that_ended_before_the_last_measuring_goes_on(runs: dict[str, Any]) -> None:
    (code, said), saved = runs["late"]
    assert (code, saved) == (85, False), said
    assert said.endswith("ended by SIGTERM; the same call goes on after the last aggregate\n")
    (code, said), final, last = runs["late again"]
    assert code == 0, said
    assert final["accuracy"] == final["best_accuracy"] == last["accuracy"] > 0.1
    assert last["validation_samples"] == 20
    assert runs["late best"] == [True, True]


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("fewer", "is of 2 rounds already, and 1 are asked for"),
        ("rate", "rate 0.001, not 0.5"),
        ("other data", "other data;"),
        ("other code", "other code in /work/runs/data/own.py:Net"),
        ("hand, swapped", "other data at hospital-a, other data at hospital-b"),
    ],
)
def test_a_run_does_not_go_on_as_another(runs: dict[str, Any], case: str, named: str) -> None:
    code, said = runs[case]
    assert code == 2
    assert named in said
    assert "take another folder for results: RESULTS for the job, --results by hand" in said


def test_a_run_that_is_done_may_be_called_again(runs: dict[str, Any]) -> None:
    code, said = runs["the same"]
    assert code == 0, said


def test_an_aggregate_that_is_no_number_is_not_saved(runs: dict[str, Any]) -> None:
    (code, said), saved = runs["nan"]
    assert (code, saved) == (1, False)
    assert "error: weight is infinite or no number" in said
    # Nor is what was measured before lost.
    assert runs["nan kept"] == [1, 0.1]


def test_an_accuracy_on_some_of_the_images_is_not_the_best(runs: dict[str, Any]) -> None:
    (code, said), first, samples, final = runs["part"]
    assert code == 0, said
    assert "round 2: accuracy 0.9900 on 10 of 20 images to validate" in said
    assert [each["validation_samples"] for each in first] == [20, 10]
    assert samples == 20
    # The last one was measured here, on all of them.
    assert final["best_round"] in (1, 3)
    assert final["best_accuracy"] <= final["accuracy"] < 0.9


def test_shards_of_ones_own_are_all_the_data(runs: dict[str, Any]) -> None:
    (code, said), data, baselines = runs["own"]
    assert code == 0, said
    assert [data[part] for part in ("train", "validation", "test")] == [70, 40, 10]
    assert baselines["together"]["samples"] == 70
    assert [each["samples"] for each in baselines["alone"].values()] == [40, 30]
    assert "gives more than one envoy the same images to train on: 10 of 70" in said


def test_by_hand_those_are_compared_that_took_part(runs: dict[str, Any]) -> None:
    (code, said), alone, together, samples = runs["hand"]
    assert code == 0, said
    assert {name: each["samples"] for name, each in alone.items()} == samples
    assert set(samples) == {"hospital-a", "hospital-b"}
    assert together["samples"] == 60
    (code, said), baselines = runs["hand, other split"]
    assert code == 0, said
    assert baselines == {"alone": {}, "together": None}
    assert "warning: hospital-b has other images than --data, --split" in said


def test_by_hand_a_set_of_another_kind_is_found_before_the_rounds(runs: dict[str, Any]) -> None:
    (code, said), started = runs["hand, other kind"]
    assert (code, started) == (2, False)
    assert "--data is not of the kind of hospital-a's: classes 7, not 8" in said


def test_by_hand_it_is_told_who_is_there(runs: dict[str, Any]) -> None:
    code, said = runs["hand, few"]
    assert code == 1
    assert "2 of 3 envoys are there after 0 s; there: hospital-a, hospital-b" in said


def test_more_envoys_than_images_are_a_wrong_call(runs: dict[str, Any]) -> None:
    code, said = runs["many"]
    assert code == 2
    assert "images cannot be shared out among 61 envoys" in said


def test_the_file_says_what_the_set_is_called(runs: dict[str, Any]) -> None:
    (code, said), dataset = runs["named"]
    assert code == 0, said
    assert dataset == "dermamnist"


# The engine's weights


def test_weights_that_would_come_out_as_others_are_refused(found: dict[str, Any]) -> None:
    flat = found["flat"]
    assert [flat[name] for name in ("counter", "mask", "flags")] == [""] * 3
    assert "the network holds large of int64, which OpenFL cannot transport" in flat["large"]
    assert "the network holds complex of complex64" in flat["complex"]


# Calls


@pytest.mark.parametrize(
    ("case", "code", "named"),
    [
        ("sign", 0, "signed out.pem for one"),
        ("install", 0, "one in one, valid until"),
        ("bad name", 2, "the name 'a:b' may have"),
        ("a party signs", 1, "one has no authority"),
        ("expired", 1, "old/ca.pem has expired on"),
        ("host: letters", 2, "--host is 'münchen.example': it must be a host's name"),
        ("host: empty", 2, "--host is ''"),
        ("host: port", 2, "--host is 'fed.a.org:50051'"),
        ("days", 2, "days is 99999999: it must be from 1 to 36500"),
        ("authority's days", 2, "days is 99999999: it must be from 1 to 36500"),
        ("name: none", 1, "the name in odd.pem, ''"),
        ("name: control", 1, r"the name in odd.pem, 'evil\x1b[2K\rsigned for one'"),
        ("shard 3/2", 2, "--shard is '3/2': the parts of 2 are counted from 1"),
        ("shard 0/2", 2, "the parts of 2 are counted from 1"),
        ("shard ²/2", 2, "it must be such as 1/4"),
        ("patience", 2, "patience is nan: it must be from 3 to 3600"),
        ("wait", 2, "--wait is nan"),
        ("port 99999", 2, "the port is 99999: it must be from 1 to 65534"),
        ("port 65535", 2, "the port is 65535"),
        ("port 0", 2, "the port is 0"),
        ("job's port 65535", 2, "the port is 65535"),
        ("job's port -5", 2, "the port is -5"),
        ("restarts", 2, "--restarts is -1"),
        ("part of a name", 2, "unrecognized arguments: --envo 3"),
        ("code", 2, "--code is none: there is no such folder"),
    ],
)
def test_a_call_is_done_or_told_what_is_wrong(
    found: dict[str, Any], case: str, code: int, named: str
) -> None:
    status, said = found["calls"][case]
    assert status in (code, ["SystemExit", code])
    assert named in said
    assert "\x1b" not in said


def test_an_address_of_ipv6_is_in_brackets_before_a_port(found: dict[str, Any]) -> None:
    assert found["calls"]["places"] == ["[::1]", "fed.example.org"]


def test_what_is_refused_leaves_nothing(found: dict[str, Any]) -> None:
    assert found["calls"]["made"] == ["ca", "odd.pem", "old", "one", "out.pem"]
