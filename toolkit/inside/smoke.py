"""Test that an image holds what its catalogue entry says.

Runs inside the image: as its ``%test`` with the catalogue entry that the image
carries (``smoke.py /opt/toolkit/monai.toml``), and from ``toolkit verify`` with
the entry as JSON (``smoke.py --expect JSON --json``).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Tuple

import guard  # beside this file: first on sys.path, as this is run as a script

LABELS = "/.singularity.d/labels.json"

#: A test's outcome: status (pass, fail, skip), what was seen, what was expected.
Outcome = Tuple[str, str, str]

#: A test: its name and what runs it.
Test = Tuple[str, Callable[[], Outcome]]


def check_import(name: str) -> Outcome:
    """Import a module, or a name out of one."""
    module, _, attribute = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not module or not name.startswith(error.name or " "):
            return "fail", f"{error.name} is not installed in this image", f"import {name}"
        if error.name != name:
            return "fail", f"{error.name} is not installed in this image", f"import {name}"
        try:
            getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as missing:
            return "fail", str(missing), f"from {module} import {attribute}"
    return "pass", "imported", ""


def check_version(name: str, specifier: str) -> Outcome:
    """Compare an installed version with a specifier."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "fail", f"{name} is not installed in this image", f"{name}{specifier}"
    status = "pass" if guard.satisfies(version, name + specifier) else "fail"
    return status, version, specifier


def check_command(command: Dict[str, Any]) -> Outcome:
    """Run a program and match its output and exit code."""
    wanted, code = command.get("output", ""), command.get("exit", 0)
    try:
        done = subprocess.run(
            command["run"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            errors="replace",
            timeout=command.get("timeout", 300),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "fail", str(error), f"exit code {code}"
    tail = (done.stdout.strip().splitlines() or ["nothing printed"])[-1]
    if done.returncode != code:
        return "fail", f"exit code {done.returncode}: {tail}", f"exit code {code}"
    found = re.search(wanted, done.stdout)
    if not found:
        return "fail", tail, f"output that matches {wanted!r}"
    return "pass", found.group(0).strip() or f"exit code {code}", ""


def check_file(path: str) -> Outcome:
    """Look for a file."""
    return ("pass" if os.path.exists(path) else "fail"), path, f"{path} exists"


def check_environment(name: str, value: str) -> Outcome:
    """Compare a variable of the environment; an empty value means that it is not set."""
    seen = os.environ.get(name, "")
    return ("pass" if seen == value else "fail"), seen or "not set", value or "not set"


def check_label(name: str, pattern: str) -> Outcome:
    """Match a label of the image."""
    try:
        seen = str(guard.read_json(LABELS).get(name, ""))
    except (OSError, ValueError):
        seen = ""
    return ("pass" if re.fullmatch(pattern, seen) else "fail"), seen or "no such label", pattern


def torch_now(noted: Dict[str, Any], *, proved: bool) -> Dict[str, Any]:
    """Return what `guard.facts` does of torch and its like; files are hashed where it matters.

    Parameters
    ----------
    noted : dict
        What the base had; where it has no hash of a package's files, none is made.
    proved : bool
        Whether the files are known to be the base's, so that none is hashed.
    """
    packages = {}
    for name in guard.PROTECTED:
        hashes = not proved and "files" in noted.get("packages", {}).get(name, {})
        packages[name] = guard.package_facts(name, hashes=hashes)
    found = {name: package for name, package in packages.items() if package}
    return {"torch": guard.torch_facts(), "packages": found, "pip_check": {}}


def check_torch_unchanged(noted: Dict[str, Any], folder: str, proved: bool = False) -> Outcome:
    """Compare torch and its like, file by file, with what the base had.

    Where the caller has proved that the files are the base's, the versions, the RECORDs
    and what torch says of itself are compared.
    """
    expected = "torch, its files and its companions as in the base"
    if not noted:
        try:
            noted = guard.read_json(os.path.join(folder, "torch.json"))
        except (OSError, ValueError):
            return "skip", "the image does not record the torch of its base", expected
    now = torch_now(noted, proved=proved)
    found = guard.differences(dict(noted, pip_check={}), now)
    if found:
        return "fail", "; ".join(found), expected
    seen = f"torch {noted['torch'].get('version')}, as in the base"
    if proved:
        seen += ": versions and RECORDs; the files by the sha256 of the base's partition"
    elif not all("files" in package for package in now["packages"].values()):
        seen += ": versions and RECORDs; no hashes of the files were noted"
    return "pass", seen, expected


def check_home(device: str) -> Outcome:
    """Check that Python in the image takes nothing from the user's home."""
    import site

    expected = "no package comes from the home"
    home = os.path.join(os.path.realpath(os.path.expanduser("~")), "")
    local = os.path.join(home, ".local", "")
    user = [p for p in sys.path if p and os.path.join(os.path.realpath(p), "").startswith(local)]
    if site.ENABLE_USER_SITE or user:
        return "fail", f"Python reads {site.getusersitepackages()}", expected
    if home != "/" and os.environ.get("PYTHONPATH", "").startswith(home):
        return "fail", f"PYTHONPATH is {os.environ['PYTHONPATH']}", expected
    return "pass", "the home is not on Python's path", expected


def torch_device(device: str) -> Any:
    """Return the torch device of a backend; ROCm's is called ``cuda``, too."""
    import torch

    if device == "hpu":
        import habana_frameworks.torch.core  # noqa: F401  registers the device
    name = {"rocm": "cuda"}.get(device, device)
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    return torch.device(name)


def check_from_numpy(device: str) -> Outcome:
    """Carry an array from NumPy to torch and back."""
    import numpy
    import torch

    array = numpy.arange(12, dtype=numpy.float32).reshape(3, 4)
    back = torch.from_numpy(array).to(torch_device(device)).mul(2).cpu().numpy()
    good = bool((back == array * 2).all())
    return ("pass" if good else "fail"), f"numpy {numpy.__version__}", "the same numbers"


def train_step(model: Any, shape: Tuple[int, ...], device: str) -> Outcome:
    """Make one step of gradient descent and look at the gradients.

    Without an optimizer of torch's: the first one imports torch's compiler, which takes as
    long as all the rest of the step.
    """
    import torch

    place = torch_device(device)
    if device == "cpu":
        torch.set_num_threads(1)  # two small images: more threads wait for each other
    torch.manual_seed(0)
    model = model.to(place)
    loss = torch.nn.functional.cross_entropy(
        model(torch.rand(shape, device=place)), torch.tensor([0, 1], device=place)
    )
    loss.backward()
    finite = True
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-3 * p.grad
            finite = finite and bool(torch.isfinite(p).all())
    seen = f"loss {float(loss.detach()):.3f} on {place}"
    return ("pass" if finite else "fail"), seen, "finite gradients"


def check_linear_step(device: str) -> Outcome:
    """Make one training step of a linear model."""
    import torch

    return train_step(torch.nn.Linear(8, 2), (2, 8), device)


def check_densenet_step(device: str) -> Outcome:
    """Make one training step of MONAI's DenseNet121 on two 64x64 images."""
    from monai.networks.nets import DenseNet121

    model = DenseNet121(spatial_dims=2, in_channels=1, out_channels=2)
    return train_step(model, (2, 1, 64, 64), device)


def check_deviceconfig(device: str) -> Outcome:
    """Print what ``python -m monai.config.deviceconfig`` prints, without another Python for it."""
    from monai.config import deviceconfig

    text = io.StringIO()
    with contextlib.redirect_stdout(text):  # where some of its lines go whatever it is given
        deviceconfig.print_debug_info(text)
    expected = "the versions of MONAI and of PyTorch"
    found = re.search(r"MONAI version: (\S+)", text.getvalue())
    good = found and re.search(r"Pytorch version: \d", text.getvalue())
    return ("pass" if good else "fail"), found.group(0) if found else text.getvalue(), expected


#: Tests that an entry names in ``holds.checks``; each takes the device.
CHECKS: Dict[str, Callable[[str], Outcome]] = {
    "home": check_home,
    "deviceconfig": check_deviceconfig,
    "from_numpy": check_from_numpy,
    "linear_step": check_linear_step,
    "densenet_step": check_densenet_step,
}


def plan(
    holds: Dict[str, Any],
    *,
    device: str,
    base: Dict[str, Any],
    folder: str,
    proved: bool = False,
) -> List[Test]:
    """Return the tests that an entry's ``holds`` table asks for, by name."""
    tests: List[Test] = []
    if holds.get("torch_unchanged", True):
        tests.append(("torch unchanged", partial(check_torch_unchanged, base, folder, proved)))
    for name, specifier in holds.get("versions", {}).items():
        tests.append((f"version {name}", partial(check_version, name, specifier)))
    for name in holds.get("imports", []):
        tests.append((f"import {name}", partial(check_import, name)))
    for name in holds.get("checks", []):
        tests.append((name.replace("_", " "), partial(CHECKS[name], device)))
    for command in holds.get("commands", []):
        title = "command " + " ".join(command["run"])
        tests.append((title, partial(check_command, command)))
    for path in holds.get("files", []):
        tests.append((f"file {path}", partial(check_file, path)))
    for name, value in holds.get("environment", {}).items():
        tests.append((f"environment {name}", partial(check_environment, name, value)))
    for name, pattern in holds.get("labels", {}).items():
        tests.append((f"label {name}", partial(check_label, name, pattern)))
    return tests


def run_one(name: str, test: Callable[[], Outcome]) -> Dict[str, Any]:
    """Run a test; one that raises has failed."""
    start = time.monotonic()
    try:
        status, seen, expected = test()
    except (Exception, SystemExit) as error:
        status, seen, expected = "fail", f"{type(error).__name__}: {error}", "no error"
    return {
        "id": name,
        "status": status,
        "seen": " ".join(seen.split())[:500],
        "expected": expected,
        "seconds": round(time.monotonic() - start, 3),
    }


def run(tests: List[Test], *, device: str = "cpu") -> List[Dict[str, Any]]:
    """Run the tests; one that raises has failed, and the others still run.

    Commands, and the comparison of torch, run beside the imports, two at a time. A
    device may let in one process at a time: where one is tested, commands run one by
    one, and the tests that use it wait for them.

    Returns
    -------
    list of dict
        ``id``, ``status``, ``seen``, ``expected``, ``seconds``, in the order of the
        tests.
    """
    results: Dict[int, Dict[str, Any]] = {}
    with ThreadPoolExecutor(max_workers=2 if device == "cpu" else 1) as pool:
        beside = {
            at: pool.submit(run_one, *test)
            for at, test in enumerate(tests)
            if test[0].startswith(("command ", "torch unchanged"))
        }
        names = [name.replace("_", " ") for name in CHECKS]
        late = [at for at, test in enumerate(tests) if device != "cpu" and test[0] in names]
        for at, test in enumerate(tests):
            if at not in beside and at not in late:
                results[at] = run_one(*test)
        results.update((at, future.result()) for at, future in beside.items())
    results.update((at, run_one(*tests[at])) for at in late)
    return [results[at] for at in sorted(results)]


def main(arguments: Optional[List[str]] = None) -> int:
    """Run the tests of an image; the exit code is 1 if one failed."""
    parser = argparse.ArgumentParser(description="Test that an image holds what it should.")
    parser.add_argument("catalogue", nargs="?", help="the image's TOML file")
    parser.add_argument("--expect", help="the entry's holds table, as JSON, instead")
    parser.add_argument("--base", default="{}", help="the base's torch (guard.py facts), as JSON")
    parser.add_argument(
        "--base-proved",
        action="store_true",
        help="torch's files are known to be the base's: do not hash them",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "rocm", "hpu"))
    parser.add_argument("--folder", default=guard.FOLDER, help="where the image keeps its notes")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    if given.expect:
        holds = json.loads(given.expect)
    else:
        holds = guard.load_toml(given.catalogue).get("holds", {})
    base = json.loads(given.base)
    tests = plan(
        holds,
        device=given.device,
        base=base,
        folder=given.folder,
        proved=given.base_proved,
    )
    results = run(tests, device=given.device)
    failed = [r for r in results if r["status"] == "fail"]
    if given.json:
        print(json.dumps({"python": sys.version.split()[0], "results": results}))
    else:
        for r in results:
            wanted = f" (expected: {r['expected']})" if r["status"] == "fail" else ""
            print(f"{r['status']:4}  {r['id']}: {r['seen']}{wanted}")
        print(f"{len(results) - len(failed)} of {len(results)} hold")
    return 1 if failed else 0


if __name__ == "__main__":
    # What an import makes stays: to look through it for garbage takes a tenth of the time; and to
    # take it all apart at the end takes a second.
    gc.disable()
    exit_code = main()
    sys.stdout.flush()
    os._exit(exit_code)
