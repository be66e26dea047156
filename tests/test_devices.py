"""Where the jobs compute. No Gaudi was at hand: tests/stand_in says what stands in for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from images import seen_inside

from toolkit import paths


@pytest.fixture(scope="module")
def found(monai_sif: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/devices_inside.py saw; one run for all, since torch is slow to import."""
    seen: dict[str, Any] = seen_inside(
        monai_sif, "devices_inside.py", tmp_path_factory.mktemp("devices")
    )
    return seen


# Choosing


@pytest.mark.image
def test_the_device_is_chosen_by_what_is_there(found: dict[str, Any]) -> None:
    choosing = found["choosing"]
    assert choosing["auto"] == ["hpu", "hpu", "GAUDI-STAND-IN", False]
    assert choosing["auto lazy"] == choosing["hpu"] == ["hpu", "hpu", "GAUDI-STAND-IN", True]
    for case in ("cpu", "auto without a plug-in", "auto without a Gaudi"):
        assert choosing[case][:2] == ["cpu", "cpu"]


@pytest.mark.image
@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("cuda", "sees no cuda device"),
        ("no such", "no device 'tpu', only auto, cuda, rocm, hpu, cpu"),
        ("hpu without a plug-in", "no habana_frameworks in this image"),
        ("hpu without a Gaudi", "sees no hpu device"),
        ("hpu of another", "Gaudi cannot be used: synStatus=20"),
        # To compute on the CPU then would only be slow, and nobody would know why.
        ("auto of another", "Gaudi cannot be used: synStatus=20"),
        ("no mode", "PT_HPU_LAZY_MODE is '2'"),
    ],
)
def test_a_device_that_does_not_serve_is_told(found: dict[str, Any], case: str, named: str) -> None:
    assert found["choosing"][case]["error"].startswith("DeviceError: ")
    assert named in found["choosing"][case]["error"]


@pytest.mark.image
def test_a_plug_in_that_does_not_load_is_told(found: dict[str, Any]) -> None:
    auto, complaint, error = found["choosing"]["broken plug-in"]
    assert auto[0] == "cpu"
    assert "libSynapse.so has no such symbol" in complaint
    assert error == "DeviceError: Gaudi's library does not load: libSynapse.so has no such symbol"


#: As much of torch as devices.py takes when it is imported.
TORCH = """\
import os
import types

seen = os.environ.get("PT_HPU_LAZY_MODE")
device = type("device", (), {})
nn = types.SimpleNamespace(Module=object)
Tensor = object
"""


@pytest.mark.parametrize(("given", "mode"), [(None, "0"), ("1", "1"), ("0", "0")])
def test_the_mode_is_set_before_torch_is_imported(
    tmp_path: Path, given: str | None, mode: str
) -> None:
    (tmp_path / "torch.py").write_text(TORCH)
    environment = {k: v for k, v in os.environ.items() if k != "PT_HPU_LAZY_MODE"}
    environment |= {"PYTHONPATH": f"{tmp_path}:{paths.jobs() / 'common'}"}
    environment |= {"PT_HPU_LAZY_MODE": given} if given else {}
    done = subprocess.run(
        [sys.executable, "-B", "-c", "import devices, torch; print(torch.seen)"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == mode, done.stderr


@pytest.mark.parametrize("job", ["mednist/engine.py", "federated/training.py"])
def test_the_jobs_import_devices_before_torch(job: str) -> None:
    lines = (paths.jobs() / job).read_text().splitlines()
    imports = [line.split()[1] for line in lines if line.startswith(("import ", "from "))]
    behind = {"torch", "monai", "monai.networks.nets", "torch.nn", "pipeline", "batchnorm"}
    assert imports.index("devices") < min(imports.index(n) for n in behind if n in imports)


# The order of things on Gaudi

STEP = ["forward", "backward", "step"]
LAZY_STEP = ["forward", "backward", "mark", "step", "mark"]


@pytest.mark.image
def test_federated_training_keeps_the_order_in_both_modes(found: dict[str, Any]) -> None:
    cpu, eager, lazy = (found["federated"][name] for name in ("cpu", "eager", "lazy"))
    # 40 images by 16, and 20 by 8.
    assert eager["events"] == [
        "move", "optimizer", *STEP * 3, "synchronize", *["evaluate"] * 3, "synchronize",
    ]  # fmt: skip
    assert lazy["events"] == [
        "move", "optimizer", *LAZY_STEP * 3, "mark", "synchronize",
        *["evaluate", "mark"] * 3, "mark", "synchronize",
    ]  # fmt: skip
    assert cpu["events"] == []
    assert (cpu["device"], eager["device"], lazy["device"]) == ("cpu", "hpu", "hpu")
    assert [eager["lazy"], lazy["lazy"]] == [False, True]


@pytest.mark.image
def test_envoys_on_different_devices_give_weights_that_can_be_averaged(
    found: dict[str, Any],
) -> None:
    envoys = found["federated"].values()
    # Plain tensors on the CPU, which a driver without any device can read.
    assert [each["types"] for each in envoys] == [["Tensor"]] * 3
    assert len({each["accuracy"] for each in envoys}) == 1
    assert found["mean"] < 1e-6


@pytest.mark.image
@pytest.mark.parametrize("mode", ["lazy", "eager"])
def test_mednist_keeps_the_order(found: dict[str, Any], mode: str) -> None:
    mednist = found["mednist"][mode]
    assert mednist.get("code") == 0, mednist
    assert mednist["device"] == {"kind": "hpu", "name": "GAUDI-STAND-IN"}
    assert mednist["settings"]["precision"] == "bf16"
    done = [each for each in mednist["events"] if each != "synchronize"]
    assert done[:2] == ["move", "optimizer"]
    assert done.count("optimizer") == done.count("move") == 1
    # Before the first step the images are copied, and waited for.
    work = " ".join(done[done.index("forward") :])
    if mode == "eager":
        assert "mark" not in work
        assert work.startswith(" ".join(STEP * 2))
    else:
        assert work.startswith(" ".join(LAZY_STEP * 2))
        assert work.count("evaluate") == work.count("evaluate mark") >= 2
    assert "model" in mednist["saved"]


@pytest.mark.image
def test_pytorch_check_prints_gaudis(found: dict[str, Any]) -> None:
    check = found["pytorch_check"]
    assert check["gaudi"][1:] == [
        "Devices: 1",
        "Device 0 : (name='GAUDI-STAND-IN', total_memory=1GB)",
    ]
    assert check["absent"][1:] == check["none"][1:] == ["Devices: 0"]


# The stand-in can fail


@pytest.mark.image
@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("optimizer before the move", "OrderError: the optimizer was made before the model"),
        ("backward", "OrderError: no mark_step between backward and the optimizer's step"),
        ("step", "OrderError: no mark_step after step"),
        ("evaluation", "OrderError: no mark_step after a batch of an evaluation"),
        ("inference", "OrderError: Gaudi has no inference mode"),
        ("mode changed", "OrderError: PT_HPU_LAZY_MODE was changed after the import"),
        ("array", "TypeError"),
        ("two devices", "RuntimeError: Expected all tensors to be on the same device"),
    ],
)
def test_the_stand_in_refuses_what_is_wrong(found: dict[str, Any], case: str, named: str) -> None:
    assert found["wrong"][case]["error"].startswith(named)


@pytest.mark.image
def test_the_stand_in_takes_what_is_right(found: dict[str, Any]) -> None:
    assert found["right"] == "not refused"
    # In eager mode there is nothing to mark.
    assert set(found["eager"].values()) == {"not refused"}


@pytest.mark.image
@pytest.mark.parametrize("case", ["after backward", "after step", "in evaluation", "late move"])
def test_the_training_less_one_of_its_calls_is_refused(found: dict[str, Any], case: str) -> None:
    assert found["spoilt"][case]["error"].startswith("OrderError: ")
