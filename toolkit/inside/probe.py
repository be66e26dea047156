"""Report what a container's torch is, sees and computes, as one JSON object on standard output.

Run in a container by ``toolkit check``. Whatever goes wrong is reported as data:
torch is imported and the devices are used in a child process, which may hang,
crash or be killed without taking down what was found before.
"""

from __future__ import annotations

import argparse
import errno
import glob
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import select
import signal
import stat
import subprocess
import sys
import time
import traceback
from functools import partial
from typing import Any, Callable, Dict, List, Optional

HOST_LIBRARIES = "/.singularity.d/libs"
VARIABLES = re.compile(
    "VISIBLE_(DEVICES|MODULES)$|^GPU_DEVICE_ORDINAL$|^(HSA|HIP|ROCM|ROCR|MIOPEN|NCCL|RCCL|TRITON"
    "|CUDA|PYTORCH|TORCH|PT_HPU|HABANA|OMP|MKL|SLURM)_|^(GC_KERNEL_PATH|LD_LIBRARY_PATH"
    "|LD_PRELOAD|PATH)$"
)
PROPERTIES = (
    "name",
    "total_memory",
    "multi_processor_count",
    "major",
    "minor",
    "gcnArchName",
    "uuid",
    "pci_bus_id",
    "L2_cache_size",
    "warp_size",
)
SIZE = 512
TIMEOUT_S = 240.0


def variables() -> Dict[str, str]:
    """Return the variables that decide what torch sees."""
    return {k: v for k, v in sorted(os.environ.items()) if VARIABLES.search(k)}


def device_files() -> Dict[str, str]:
    """Open the device files to read and write; return the name of each error, empty if none.

    Gaudis are only asked for: opening one and closing it resets it.
    """
    opened = ["/dev/kfd", *glob.glob("/dev/dri/renderD*"), "/dev/nvidiactl", "/dev/nvidia-uvm"]
    opened += glob.glob("/dev/nvidia[0-9]*")
    found = {}
    for path in sorted(opened):
        if not os.path.exists(path):
            continue
        try:
            if not stat.S_ISCHR(os.stat(path).st_mode):
                found[path] = "not a device"
                continue
            os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
            found[path] = ""
        except OSError as error:
            found[path] = errno.errorcode.get(error.errno or 0, str(error))
    for path in sorted(glob.glob("/dev/accel/accel*") + glob.glob("/dev/hl*")):
        found[path] = "" if os.access(path, os.R_OK | os.W_OK) else "EACCES"
    return found


def rocm_release() -> str:
    """Return the release of ROCm in the image, empty if there is none."""
    for path in ["/opt/rocm/.info/version", *sorted(glob.glob("/opt/rocm-*/.info/version"))]:
        try:
            with open(path, encoding="utf-8", errors="replace") as stream:
                return stream.readline().strip()[:100]
        except OSError:
            continue
    return ""


def host_libraries() -> List[Dict[str, str]]:
    """Return the libraries that Apptainer brought in from the host, each with the image's own."""
    folder = torch_folder()
    try:
        names = sorted(os.listdir(HOST_LIBRARIES))
    except OSError:
        return []
    return [{"library": name, "own": own_copy(name, folder)} for name in names]


def mapped(text: str) -> List[str]:
    """Return the shared objects in the text of ``/proc/self/maps``.

    Apptainer binds each library on its own, so a mapping may carry the path
    inside the container.
    """
    paths = set()
    for line in text.splitlines():
        path = line[line.find("/") :] if "/" in line else ""
        if ".so" in path:
            paths.add(path.replace(" (deleted)", ""))
    return sorted(paths)


def own_copy(name: str, folder: str) -> str:
    """Return the image's own file of a library's name, empty if it has none.

    Parameters
    ----------
    name : str
        File name, such as ``librocblas.so.4``.
    folder : str
        Where torch is, which may bring libraries of its own.
    """
    folders = [os.path.join(folder, "lib")] if folder else []
    folders += sorted(glob.glob("/opt/rocm*/lib*")) + sorted(glob.glob("/usr/local/cuda*/lib64"))
    folders += [*sorted(glob.glob("/usr/lib/*-linux-gnu")), "/usr/lib64", "/usr/lib"]
    folders += [*sorted(glob.glob("/lib/*-linux-gnu")), "/lib64", "/lib"]
    # Only the same name is the same library to the loader; another release has another number.
    return next((p for p in (os.path.join(f, name) for f in folders) if os.path.exists(p)), "")


def torch_folder() -> str:
    """Return where torch is, without importing it; empty if it is not there."""
    spec = importlib.util.find_spec("torch")
    return (list(spec.submodule_search_locations or []) if spec else [""])[0]


def shadows(folder: str) -> List[Dict[str, Any]]:
    """Return the host libraries that this process loaded, each with the image's own."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as stream:
        loaded = mapped(stream.read())
    found = []
    for path in loaded:
        if os.path.dirname(path) == HOST_LIBRARIES:
            name = os.path.basename(path)
            found.append({"library": name, "own": own_copy(name, folder)})
    return found


def version_of(*names: str) -> str:
    """Return the version of the first of some distributions that is installed."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def guarded(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or its error as text."""
    try:
        return call()
    except Exception as error:
        return {"error": describe(error)}


def describe(error: BaseException) -> str:
    """Return an error as one line."""
    text = " ".join(str(error).split())
    return "%s: %s" % (type(error).__name__, text[:600])


def torch_facts(torch: Any) -> Dict[str, Any]:
    """Return what torch was built for; needs no device."""
    version = torch.version
    facts: Dict[str, Any] = {
        "version": str(torch.__version__),
        "hip": getattr(version, "hip", None),
        "cuda": getattr(version, "cuda", None),
        "git_version": getattr(version, "git_version", None),
        "folder": os.path.dirname(os.path.abspath(torch.__file__)),
        "threads": torch.get_num_threads(),
        "arch_list": guarded(lambda: list(torch.cuda.get_arch_list())),
    }
    if not facts["arch_list"]:
        # get_arch_list() is empty while no device is seen; the flags are compiled in.
        flags = getattr(torch._C, "_cuda_getArchFlags", lambda: None)
        facts["arch_list"] = guarded(lambda: (flags() or "").split())
    return facts


def library_facts(torch: Any) -> Dict[str, Any]:
    """Return versions of MIOpen and RCCL, or cuDNN and NCCL."""
    return {
        "dnn": guarded(lambda: torch.backends.cudnn.version()),
        "collectives": guarded(lambda: collectives(torch)),
    }


def collectives(torch: Any) -> Optional[str]:
    """Return the version of NCCL or RCCL, None in a torch without."""
    if not getattr(torch.distributed, "is_available", lambda: False)():
        return None
    if not torch.distributed.is_nccl_available():
        return None
    version = torch.cuda.nccl.version()
    if isinstance(version, int):  # before torch 1.11
        return str(version)
    return ".".join(map(str, version))


def product(torch: Any, device: Any, kind: str) -> Dict[str, Any]:
    """Multiply two random matrices on a device and compare with the CPU's result."""
    dtype = getattr(torch, kind)
    generator = torch.Generator().manual_seed(20)
    left = torch.randn(SIZE, SIZE, generator=generator).to(dtype)
    right = torch.randn(SIZE, SIZE, generator=generator).to(dtype)
    wanted = left.double() @ right.double()
    start = time.perf_counter()
    seen = (left.to(device) @ right.to(device)).to("cpu").double()
    seconds = time.perf_counter() - start
    error = float((seen - wanted).abs().max() / wanted.abs().max())
    # NaN is no JSON: a result that is no number is an infinite error told as text.
    finite = error == error and error != float("inf")
    return {"error": error if finite else "not a number", "seconds": round(seconds, 6)}


def properties(torch: Any, kind: str, index: int) -> Dict[str, Any]:
    """Return the properties of a device, and the line that pytorch_check.py prints of them."""
    if kind == "cpu":
        return {"name": platform.processor() or platform.machine(), "line": "cpu"}
    if kind == "hpu":
        name = torch.hpu.get_device_name(index)
        found: Dict[str, Any] = {"name": name, "line": name}
        line = guarded(lambda: str(torch.hpu.get_device_properties(index)))
        return dict(found, line=line) if isinstance(line, str) else found
    values = torch.cuda.get_device_properties(index)
    found = {"line": str(values)}
    for name in PROPERTIES:
        value = getattr(values, name, None)
        if value is not None:
            found[name] = value if isinstance(value, int) else str(value)
    free = guarded(lambda: torch.cuda.mem_get_info(index)[0])
    if isinstance(free, int):
        found["free_memory"] = free
    return found


def devices(torch: Any, kind: str, emit: Callable[[Dict[str, Any]], None]) -> None:
    """Look at each device and compute on it.

    Parameters
    ----------
    torch : module
        torch.
    kind : str
        ``cuda`` (which is ROCm's name, too), ``hpu`` or ``cpu``.
    emit : callable
        Called with what was found, as soon as it was.
    """
    if kind == "cpu":
        count = 1
    else:
        module = torch.hpu if kind == "hpu" else torch.cuda
        emit({"available": guarded(module.is_available)})
        counted = guarded(module.device_count)
        if not isinstance(counted, int):
            emit({"devices_error": counted["error"]})
            return
        count = counted
        if not count:
            # device_count() is silent; to initialise tells the reason.
            why = guarded(lambda: module.init() if hasattr(module, "init") else None)
            if isinstance(why, dict):
                emit({"devices_error": why["error"]})
    emit({"device_count": count})
    if kind == "cuda":
        guarded(lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", False))
    for index in range(count):
        device = kind if kind == "cpu" else "%s:%d" % (kind, index)
        emit({"working_on": device})
        entry = {"index": index, "device": device}
        entry["properties"] = guarded(partial(properties, torch, kind, index))
        for dtype in ("float32", "bfloat16"):
            entry[dtype] = guarded(partial(product, torch, device, dtype))
        emit({"device": entry})
    emit({"working_on": ""})


def child(kind: str, compute: bool) -> None:
    """Import torch, look and compute; write what is found as lines of JSON."""
    # Libraries print what they like: to standard error with it.
    channel = os.dup(1)
    os.dup2(2, 1)

    def emit(facts: Dict[str, Any]) -> None:
        os.write(channel, (json.dumps(facts) + "\n").encode())

    emit({"working_on": "import torch"})
    folder = torch_folder()
    try:
        if kind == "hpu":
            emit({"hpu_plugin": guarded(lambda: __import__("habana_frameworks.torch") and "there")})
        import torch
    except BaseException as error:
        emit({"torch": {"error": describe(error)}, "shadows": guarded(lambda: shadows(folder))})
        return
    facts = guarded(lambda: torch_facts(torch))
    emit({"torch": facts, "libraries": guarded(lambda: library_facts(torch))})
    emit({"shadows": guarded(lambda: shadows(folder)), "working_on": ""})
    if compute:
        problem = guarded(lambda: devices(torch, kind, emit))
        if isinstance(problem, dict):
            emit({"devices_error": problem["error"]})
        emit({"shadows": guarded(lambda: shadows(folder))})
    emit({"finished": True})


def gather(command: List[str], timeout: float) -> Dict[str, Any]:
    """Run the child and merge its lines, up to where it ended or time ran out."""
    found: Dict[str, Any] = {"devices": []}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    streams = {process.stdout.fileno(): b"", process.stderr.fileno(): b""}
    out = process.stdout.fileno()
    open_streams = list(streams)
    deadline = time.monotonic() + timeout
    while open_streams:
        ready, _, _ = select.select(open_streams, [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            process.kill()
            found["error"] = "no answer within %d s" % timeout
            break
        for stream in ready:
            chunk = os.read(stream, 1 << 16)
            if not chunk:
                open_streams.remove(stream)
            streams[stream] += chunk
            if stream != out:
                streams[stream] = streams[stream][-20000:]
    code = process.wait()
    process.stdout.close()
    process.stderr.close()
    for line in streams[out].decode("utf-8", "replace").splitlines():
        try:
            facts = json.loads(line)
        except ValueError:
            continue
        if "device" in facts:
            found["devices"].append(facts.pop("device"))
        found.update(facts)
    said = next(text for k, text in streams.items() if k != out).decode("utf-8", "replace")
    found["said"] = [line[:400] for line in said.splitlines() if line.strip()][-8:]
    if code < 0 and "error" not in found:
        found["error"] = "ended by %s" % signal.Signals(-code).name
    elif code and "error" not in found:
        found["error"] = "exit code %d" % code
    return found


def facts(kind: str, compute: bool, timeout: float) -> Dict[str, Any]:
    """Return everything that this script reports."""
    found: Dict[str, Any] = {
        "probe": 1,
        "python": platform.python_version(),
        "executable": sys.executable,
        "machine": platform.machine(),
        "kind": kind,
        "variables": variables(),
        "device_files": device_files(),
        "rocm": rocm_release(),
        "host_libraries": guarded(host_libraries),
        "torch": {"error": "not looked at"},
        "cpus": len(os.sched_getaffinity(0)),
    }
    if kind == "hpu":
        found["habana"] = version_of("habana-torch-plugin", "habana_torch_plugin")
    command = [sys.executable, os.path.abspath(__file__), "--child", "--kind", kind]
    if not compute:
        command.append("--no-compute")
    found.update(gather(command, timeout))
    return found


def bench(kind: str, seconds: float) -> Any:
    """Return the figures of bench.py, which lies beside this script."""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bench.py")
    done = subprocess.run(
        [sys.executable, script, "--kind", kind, "--seconds", str(seconds)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=False,
    )
    return json.loads(done.stdout.decode())


def main() -> int:
    """Print the facts as one line of JSON; errors are data, too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=("cuda", "hpu", "cpu"), default="cuda")
    parser.add_argument("--no-compute", action="store_true")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S)
    parser.add_argument("--bench", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.kind, not options.no_compute)
        return 0
    try:
        found = facts(options.kind, not options.no_compute, options.timeout)
        if options.bench:
            found["bench"] = guarded(lambda: bench(options.kind, options.bench))
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        found = {"probe": 1, "error": "%s (line %s)" % (describe(error), last.lineno)}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
