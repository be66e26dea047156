"""The image and the device tier: what a container's torch is, sees and computes."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.checks import hpu, parse, rocm
from toolkit.checks.common import Device
from toolkit.checks.explanations import SYMPTOMS
from toolkit.checks.findings import Finding, brief, count, finding

#: Where the probe is seen in a container.
INSIDE = "/mnt"
KINDS = {"rocm": "cuda", "cuda": "cuda", "hpu": "hpu", "cpu": "cpu"}
NAMES = {"rocm": "ROCm", "cuda": "CUDA", "hpu": "Gaudi", "cpu": "the CPU"}
#: Variables of the job that the container must see as they are.
PASSED = re.compile(
    "VISIBLE_(DEVICES|MODULES)$|^GPU_DEVICE_ORDINAL$"
    "|^(HSA|HIP|ROCR|MIOPEN|NCCL|RCCL|TRITON|CUDA|PYTORCH|TORCH|PT_HPU|HABANA|OMP|MKL|SLURM)_"
)
#: Libraries that make up ROCm: with the host's in their place torch runs on another release.
ESSENTIAL = re.compile(
    r"lib(hsa-runtime64|amdhip64|amd_comgr|MIOpen|rccl|rocblas|hipblas|hipblaslt|rocfft|hipfft"
    r"|rocrand|hiprand|rocsolver|rocsparse|hipsparse|hipsolver|roctx64|cudart|cudnn|nccl)\b"
)
TOLERANCE = {"float32": ("device.fp32", 1e-4), "bfloat16": ("device.bf16", 0.02)}


def probe(image: Path, backend: str, *, compute: bool, bench: float = 0) -> dict[str, Any]:
    """Start an image once and return what `toolkit/inside/probe.py` reports.

    Parameters
    ----------
    image : Path
        The image.
    backend : str
        ``rocm``, ``cuda``, ``hpu`` or ``cpu``.
    compute : bool
        Use the devices, too.
    bench : float
        Seconds to spend on measuring them; 0: don't.

    Returns
    -------
    dict
        The report; with a key ``error`` alone if there is none.
    """
    from toolkit import apptainer, paths

    program = apptainer.find()
    handed = {k: v for k, v in os.environ.items() if PASSED.search(k)}
    handed = apptainer.device_variables(backend) | handed
    environment = os.environ | apptainer.for_container(handed, program)
    arguments = ["--kind", KINDS[backend]]
    arguments += [] if compute else ["--no-compute"]
    arguments += ["--bench", str(bench)] if compute and bench else []
    answer: dict[str, Any] = {}
    for python in ("python3", "python"):
        done = apptainer.execute(
            image,
            [python, f"{INSIDE}/probe.py", *arguments],
            binds=[f"{paths.inside()}:{INSIDE}:ro"],
            options=apptainer.device_options(backend, program),
            environment=environment,
        )
        answer = read_answer(done.code, done.stdout, done.stderr)
        # Only a container that has no python3 is started again, for a python.
        if "python3" not in str(answer.get("error")) or "not found" not in answer["error"]:
            break
    return answer | {"apptainer": str(program)}


def read_answer(code: int, stdout: str, stderr: str) -> dict[str, Any]:
    """Return the report in a container's output, or its last words as ``error``."""
    for line in reversed(stdout.splitlines()):
        found = parse.decode(line) if line.startswith("{") else None
        if isinstance(found, dict):
            return found
    said = [line.strip() for line in f"{stdout}\n{stderr}".splitlines() if line.strip()]
    reason = next((line for line in said if "FATAL" in line), said[-1] if said else "")
    return {"error": f"exit code {code}: {reason or 'nothing was printed'}"}


def check(
    backend: str,
    report: Mapping[str, Any],
    *,
    devices: Sequence[Device],
    visible: Sequence[Device],
    driver: str,
) -> list[Finding]:
    """Return the findings of the image and the device tier.

    Parameters
    ----------
    backend : str
        ``rocm``, ``cuda``, ``hpu`` or ``cpu``.
    report : mapping
        From `probe`, or recorded; nothing is taken for granted in it.
    devices, visible : sequence of Device
        What the host has, and what of it this job should see.
    driver : str
        Version of the host's driver, empty if there is none.
    """
    torch = _table(report, "torch")
    trouble = str(report.get("error") or "")
    if not torch.get("version") and not torch.get("error") and trouble:
        what, remedy = symptom(_said(report, trouble))
        return [finding("image.start", "fail", f"{trouble}{what}", remedy=remedy)]
    python = f"Python {report.get('python', 'unknown')}"
    return [
        finding("image.start", "pass", f"the container starts; {python}"),
        *check_torch(backend, report),
        *check_targets(backend, report, devices),
        *check_release(backend, report, driver),
        *check_shadowed(report),
        *check_libraries(backend, report),
        *check_devices(backend, report, devices=devices, visible=visible),
    ]


def symptom(text: str) -> tuple[str, str]:
    """Return what a known message means (with a leading dash) and its remedy, else nothing."""
    for pattern, meaning, remedy in SYMPTOMS:
        if re.search(pattern, text[:20000]):
            return f" - {meaning}", remedy
    return "", ""


def built_for(report: Mapping[str, Any]) -> str:
    """Return the backend that the image's torch was built for."""
    torch = _table(report, "torch")
    if report.get("habana") and _text(report, "hpu_plugin") == "there":
        return "hpu"
    return "rocm" if torch.get("hip") else "cuda" if torch.get("cuda") else "cpu"


def check_torch(backend: str, report: Mapping[str, Any]) -> list[Finding]:
    """Tell which torch the image has."""
    torch = _table(report, "torch")
    trouble = str(report.get("error") or "")
    if torch.get("error") or not torch.get("version"):
        error = _text(torch, "error") or trouble or "no answer"
        what, remedy = symptom(_said(report, error))
        if trouble and trouble != error:
            error = f"{error} ({trouble})"
        return [finding("image.torch", "fail", f"torch cannot be imported: {error}{what}",
                        remedy=remedy)]  # fmt: skip
    kind = built_for(report)
    told = f"torch {_text(torch, 'version')}"
    for name, label in (("hip", "HIP"), ("cuda", "CUDA")):
        told += f", {label} {_text(torch, name)}" if torch.get(name) else ""
    git = _text(torch, "git_version")
    told += f", git {git[:10]}" if git else ""
    if backend in ("cpu", kind):
        return [finding("image.torch", "pass", told)]
    text = f"{told}: built for {NAMES[kind]}, not for {NAMES[backend]}"
    return [finding("image.torch", "fail", text)]


def check_targets(
    backend: str, report: Mapping[str, Any], devices: Sequence[Device]
) -> list[Finding]:
    """Compare what torch holds code for with the host's devices."""
    torch = _table(report, "torch")
    listed = torch.get("arch_list")
    if backend not in ("rocm", "cuda") or not torch.get("version"):
        return []
    if built_for(report) != backend:
        return [finding("image.targets", "skip", f"torch was built for {built_for(report)}")]
    if not isinstance(listed, list) or not listed:
        return [finding("image.targets", "skip", "torch does not tell its targets")]
    targets = [str(target).split(":")[0] for target in listed[:256]]
    wanted = sorted({d.target for d in devices if d.target})
    told = f"torch holds code for {brief(targets, most=16)}"
    if not wanted:
        return [finding("image.targets", "skip", f"{told}; no device here to compare with")]
    holds = _holds_gfx if backend == "rocm" else _holds_sm
    lacking = [target for target in wanted if not holds(target, targets)]
    if lacking:
        return [finding("image.targets", "fail", f"{told}, not for {brief(lacking)}")]
    return [finding("image.targets", "pass", f"{told}; this host has {brief(wanted)}")]


def _holds_gfx(target: str, listed: Sequence[str]) -> bool:
    generic = "gfx9-4-generic" if target in ("gfx942", "gfx950") else ""
    return target in listed or generic in listed


def _holds_sm(target: str, listed: Sequence[str]) -> bool:
    """Say whether CUDA code runs: of the same major version, or as PTX of an older one."""
    want = _compute_capability(target)
    for entry in listed:
        kind, _, digits = entry.partition("_")
        have = _compute_capability(f"sm_{digits}")
        if have is None or want is None or (entry.endswith(("a", "f")) and have != want):
            continue
        if ((kind == "sm" and have[0] == want[0]) or kind == "compute") and have <= want:
            return True
    return False


def _compute_capability(target: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"sm_([0-9]{1,3})([0-9])[af]?", target)
    return (int(match.group(1)), int(match.group(2))) if match else None


def check_release(backend: str, report: Mapping[str, Any], driver: str) -> list[Finding]:
    """Compare the image's user space with the host's driver."""
    torch = _table(report, "torch")
    if not torch.get("version") or backend == "cpu" or built_for(report) != backend:
        return []
    if backend == "rocm":
        ours = _text(report, "rocm") or _text(torch, "hip")
        release = rocm.driver_release(driver)
        told = f"ROCm {ours or 'unknown'} in the image, driver {driver or 'unknown'}"
        far = rocm.release_distance(release, ours) if release else None
        if far is None:
            return [finding("image.release", "skip", f"{told}: cannot be compared")]
        told += f" of ROCm {release}"
        if far[0] > far[1]:
            text = f"{told}: {count(far[0], 'release')} apart, {far[1]} are supported"
            return [finding("image.release", "warn", text)]
        return [finding("image.release", "pass", told)]
    if backend == "hpu":
        ours = _text(report, "habana")
        told = f"habana-torch-plugin {ours or 'unknown'} in the image, driver {driver or 'unknown'}"
        pair = parse.version(ours), parse.version(driver)
        if not all(pair):
            return [finding("image.driver", "skip", f"{told}: cannot be compared")]
        status = "pass" if hpu.same_release(*pair) else "fail"
        return [finding("image.driver", status, told)]
    return check_cuda_driver(_text(torch, "cuda"), driver)


#: Oldest Linux driver for a major release of CUDA, minor releases included (CUDA release notes).
CUDA_DRIVERS = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}


def check_cuda_driver(cuda: str, driver: str) -> list[Finding]:
    """Tell whether a driver is new enough for a release of CUDA."""
    told = f"torch for CUDA {cuda or 'unknown'}, driver {driver or 'unknown'}"
    release, have = parse.version(cuda), parse.version(driver)
    oldest = CUDA_DRIVERS.get(release[0]) if release else None
    if not oldest or not have:
        return [finding("image.driver", "skip", f"{told}: cannot be compared")]
    if have < oldest:
        text = f"{told}: at least {'.'.join(map(str, oldest))} is needed"
        return [finding("image.driver", "fail", text)]
    return [finding("image.driver", "pass", told)]


def check_shadowed(report: Mapping[str, Any]) -> list[Finding]:
    """Tell which libraries of the host took the place of the image's own."""
    brought = _libraries(report.get("host_libraries"))
    loaded = _libraries(report.get("shadows"))
    own = [name for name, path in loaded.items() if path]
    # What torch has not asked for yet comes from the host, too, once it does.
    waiting = [
        name for name, path in brought.items()
        if path and name not in loaded and ESSENTIAL.match(name)
    ]  # fmt: skip
    found = []
    for name in own[:32]:
        status = "fail" if ESSENTIAL.match(name) else "warn"
        text = f"loaded from the host instead of the image's {loaded[name]}"
        found.append(finding("image.shadowed", status, text, subject=name))
    if waiting:
        text = f"the host's {brief(waiting)} would be loaded instead of the image's own"
        found.append(finding("image.shadowed", "warn", text))
    if not found:
        told = f"{count(len(brought), 'library').replace('librarys', 'libraries')} of the host"
        told += f" brought in, {len(loaded)} loaded, none in place of the image's own"
        told = told if brought or loaded else "no library of the host brought in"
        before = [name for name, path in brought.items() if path]
        if before:
            told += f" (but {brief(before)} would come before it)"
        starter = _text(report, "apptainer")
        told += f", by {starter}" if starter else ""
        found.append(finding("image.shadowed", "pass", told))
    return found


def _libraries(value: object) -> dict[str, str]:
    items = value[:512] if isinstance(value, list) else []
    return {
        str(item.get("library")): str(item.get("own") or "")
        for item in items
        if isinstance(item, Mapping) and item.get("library")
    }


def trimmed(value: object, depth: int = 8) -> Any:
    """Return decoded JSON without what nobody writes: depths, lengths, numbers that are none."""
    if isinstance(value, dict):
        if not depth:
            return None
        return {str(k)[:200]: trimmed(v, depth - 1) for k, v in list(value.items())[:512]}
    if isinstance(value, list):
        return [trimmed(v, depth - 1) for v in value[:512]] if depth else None
    if isinstance(value, str):
        return value[:4000].encode("utf-8", "replace").decode()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def check_libraries(backend: str, report: Mapping[str, Any]) -> list[Finding]:
    """Tell the versions of the libraries for convolutions and collectives."""
    if backend not in ("rocm", "cuda") or built_for(report) != backend:
        return []
    libraries = _table(report, "libraries")
    dnn, collectives = libraries.get("dnn"), libraries.get("collectives")
    names = ("MIOpen", "RCCL") if backend == "rocm" else ("cuDNN", "NCCL")
    lacking = [
        f"{name} ({_text(value, 'error')})" if isinstance(value, Mapping) else name
        for name, value in zip(names, (dnn, collectives), strict=True)
        if not value or isinstance(value, Mapping)
    ]
    if lacking:
        return [finding("image.libraries", "warn", f"torch has no {brief(lacking)}")]
    text = f"{names[0]} {dnn_version(backend, dnn)}, {names[1]} {collectives}"
    return [finding("image.libraries", "pass", text)]


def dnn_version(backend: str, value: object) -> str:
    """Return the version of MIOpen or cuDNN as people write it."""
    if not isinstance(value, int) or value < 0:
        return str(value)
    major, minor = (1_000_000, 1000) if backend == "rocm" else (10_000, 100)
    if backend == "cuda" and value < 10_000:  # before cuDNN 9
        major = 1000
    return f"{value // major}.{value % major // minor}.{value % minor}"


def check_devices(
    backend: str,
    report: Mapping[str, Any],
    *,
    devices: Sequence[Device],
    visible: Sequence[Device],
) -> list[Finding]:
    """Return the findings of the device tier."""
    if not _table(report, "torch").get("version"):
        return [finding("device.hardware", "skip", "without torch nothing can be computed")]
    listed = report.get("devices")
    listed = report.get("devices")
    entries = [e for e in listed if isinstance(e, Mapping)] if isinstance(listed, list) else []
    if backend != "cpu" and not devices and not entries:
        text = f"no device for {NAMES[backend]} on this host"
        return [finding("device.hardware", "skip", text)]
    if backend != "cpu" and built_for(report) != backend:
        return [finding("device.hardware", "skip", f"torch was not built for {NAMES[backend]}")]
    found = [] if backend == "cpu" else check_count(report, entries, visible)
    paired = list(visible) if len(visible) == len(entries) else []
    for index, entry in enumerate(entries[:128]):
        found += check_device(backend, entry, paired[index] if paired else None)
    stopped = str(report.get("working_on") or "")
    if stopped and report.get("error"):
        trouble = f"the probe stopped at {stopped}: {report['error']}"
        what, remedy = symptom(_said(report, trouble))
        last = _said(report, "").splitlines()
        text = trouble + what + (f" ({last[-1]})" if last else "")
        found.append(finding("device.fp32", "fail", text, subject=stopped, remedy=remedy))
    return found or [finding("device.hardware", "skip", "the probe reports no device")]


def check_count(
    report: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], visible: Sequence[Device]
) -> list[Finding]:
    """Compare the number of devices in the container and on the host."""
    seen = report.get("device_count")
    seen = seen if isinstance(seen, int) else len(entries)
    told = f"{count(seen, 'device')} in the container, {len(visible)} usable on the host"
    error = _text(report, "devices_error")
    if error:
        told += f": {error}"
    refused = [
        f"{path} {why}"
        for path, why in _table(report, "device_files").items()
        if why and why != "EPERM"
    ]
    if refused and seen < len(visible):
        told += f"; {brief([str(r) for r in refused], most=2)}"
    if seen == len(visible) and not error:
        return [finding("device.count", "pass", told)]
    what, remedy = symptom(_said(report, error))
    status = "warn" if seen > len(visible) and not error else "fail"
    return [finding("device.count", status, told + what, remedy=remedy)]


def check_device(backend: str, entry: Mapping[str, Any], device: Device | None) -> list[Finding]:
    """Tell the properties of a device and whether it computes."""
    subject = str(entry.get("device") or entry.get("index") or "device")
    values = _table(entry, "properties")
    found = []
    if backend != "cpu":
        odd = differences(values, device) if device and backend == "rocm" else []
        line = _text(values, "line") or _text(values, "name") or _text(values, "error")
        status = "fail" if values.get("error") else "warn" if odd else "pass"
        text = f"{line}; {'; '.join(odd)}" if odd else line or "no properties"
        found.append(finding("device.properties", status, text, subject=subject))
    for kind, (id, tolerance) in TOLERANCE.items():
        result = _table(entry, kind)
        error = result.get("error")
        if isinstance(error, (int, float)) and 0 <= error <= tolerance:
            text = f"relative error {error:.1e}"
            found.append(finding(id, "pass", text, subject=subject))
        elif isinstance(error, (int, float)):
            text = f"relative error {error:.1e}: the product is wrong"
            found.append(finding(id, "fail", text, subject=subject))
        elif error:
            what, remedy = symptom(str(error))
            found.append(finding(id, "fail", f"{error}{what}", subject=subject, remedy=remedy))
        else:
            found.append(finding(id, "skip", "not computed", subject=subject))
    return found


def differences(values: Mapping[str, Any], device: Device) -> list[str]:
    """Return how torch's properties differ from the host's topology."""
    found = []
    target = _text(values, "gcnArchName").split(":")[0]
    if target and device.target and target != device.target:
        found.append(f"the host has {device.target}")
    units = values.get("multi_processor_count")
    if isinstance(units, int) and device.units and units != device.units:
        found.append(f"the host has {device.units} CUs")
    return found


def _table(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = values.get(name)
    return value if isinstance(value, Mapping) else {}


def _text(values: object, name: str) -> str:
    value = values.get(name) if isinstance(values, Mapping) else None
    return str(value) if isinstance(value, (str, int, float)) else ""


def _said(report: Mapping[str, Any], error: str) -> str:
    said = report.get("said")
    lines = [str(line) for line in said[-16:]] if isinstance(said, list) else []
    return "\n".join([error, *lines]) if error else "\n".join(lines)
