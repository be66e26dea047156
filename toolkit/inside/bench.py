"""Measure what a container's torch gets out of the devices, as one JSON object on standard output.

Run in a container by ``toolkit check --bench``. One process per device, driven
over pipes: it may run out of memory, crash or hang without taking the others
with it. Figures come from random data (constant operands toggle fewer bits,
draw less power and run at higher clocks than work does), buffers of several
times the caches, calls timed in batches after a warm-up; each is a median with
its quartiles.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import os
import platform
import re
import selectors
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

MIB, GIB = 1 << 20, 1 << 30
#: The largest cache of a GPU in the table: the Infinity Cache of MI300X.
GPU_CACHE = 256 * MIB
#: How often a buffer must hold the caches.
ABOVE_CACHES = 4
#: Long against the launch of a call, short against the time for one figure.
BATCH_S = 0.04
FEWEST, MOST = 3, 40
#: Longest for one figure, and for one way of getting it while the best is looked for.
FIGURE_S, TRIAL_S = 4.0, 0.12
#: Importing torch from a cold shared file system takes its time.
START_S = 240.0
#: What a phase may take beyond its time: kernels are compiled, collectives set up.
GRACE_S = 60.0
FLOATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "tf32": "float32",
          "fp64": "float64"}  # fmt: skip
Call = Callable[[], object]
Timed = Callable[[Call, int], float]
Emit = Callable[[Dict[str, Any]], None]


class Way(NamedTuple):
    """A way to do some work: what it is, how much it does, and what makes the call that does it."""

    what: Dict[str, Any]
    work: float
    make: Callable[[], Call]


def describe(error: BaseException) -> str:
    """Return an error as one line."""
    return "%s: %s" % (type(error).__name__, " ".join(str(error).split())[:400])


def exhausted(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        words in text for words in ("out of memory", "can't allocate memory", "alloc_failed")
    )


def summary(rates: List[float]) -> Dict[str, float]:
    """Return the median of some rates, their quartiles and the best.

    Examples
    --------
    >>> summary([4.0, 1.0, 2.0, 3.0, 5.0])
    {'value': 3.0, 'low': 2.0, 'high': 4.0, 'best': 5.0, 'repetitions': 5}
    """
    middle = statistics.median(rates)
    low = high = middle
    if len(rates) > 1:
        low, _, high = statistics.quantiles(rates, n=4, method="inclusive")
    return {
        "value": middle,
        "low": low,
        "high": high,
        "best": max(rates),
        "repetitions": len(rates),
    }


def bus_bandwidth(size: float, seconds: float, ranks: int) -> float:
    """Return the bus bandwidth of an all-reduce, in bytes per second.

    Each of n ranks sends and receives 2(n-1)/n of the buffer, whatever the
    algorithm; see doc/PERFORMANCE.md of NVIDIA's nccl-tests.

    Examples
    --------
    >>> bus_bandwidth(8e9, 1.0, 8)
    14000000000.0
    """
    return size / seconds * 2 * (ranks - 1) / ranks


def read(path: str) -> str:
    """Return the text of a file, empty if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read(1 << 16)
    except OSError:
        return ""


def last_level_cache(root: str = "/sys/devices/system/cpu") -> int:
    """Return the bytes of the last-level caches of the CPUs that this process may run on."""
    sizes: Dict[int, Dict[str, int]] = {}
    for cpu in os.sched_getaffinity(0):
        for folder in glob.glob("%s/cpu%d/cache/index[0-9]*" % (root, cpu)):
            match = re.match(r"([0-9]{1,12})([KMG]?)", read(folder + "/size"))
            level = read(folder + "/level").strip()
            if match and level.isdigit():
                size = int(match.group(1)) << {"": 0, "K": 10, "M": 20, "G": 30}[match.group(2)]
                sizes.setdefault(int(level), {})[read(folder + "/shared_cpu_list")] = size
    return sum(sizes[max(sizes)].values()) if sizes else 0


def available_memory(proc: str = "/proc", cgroups: str = "/sys/fs/cgroup") -> int:
    """Return the bytes that this process may still take: of the host, and of its cgroup."""
    match = re.search(r"^MemAvailable:\s+([0-9]{1,15}) kB", read(proc + "/meminfo"), re.M)
    left = [int(match.group(1)) << 10] if match else [GIB]
    for line in read(proc + "/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        base = cgroups + "/memory" if controllers else cgroups
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit_name, usage_name = names if controllers else ("memory.max", "memory.current")
        folder = path.rstrip("/")
        while True:
            limit = read("%s%s/%s" % (base, folder, limit_name)).strip()
            usage = read("%s%s/%s" % (base, folder, usage_name)).strip()
            if limit.isdigit():
                left.append(int(limit) - (int(usage) if usage.isdigit() else 0))
            if not folder:
                break
            folder = folder.rpartition("/")[0]
    return max(0, min(left))


def timer(torch: Any, kind: str) -> Timed:
    """Return a function that calls another several times and returns the seconds for one."""
    if kind == "cuda":

        def by_events(call: Call, count: int) -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(count):
                call()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3 / count

        return by_events
    wait = torch.hpu.synchronize if kind == "hpu" else lambda: None

    def by_clock(call: Call, count: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(count):
            call()
        wait()
        return (time.perf_counter() - start) / count

    return by_clock


def sample(timed: Timed, call: Call, seconds: float) -> List[float]:
    """Return the seconds of one call, from each of several batches, for about some seconds."""
    deadline = time.monotonic() + seconds
    once = timed(call, 1)  # the first call chooses and loads kernels
    if once > 4 * seconds:
        return [once]
    once = min(once, timed(call, 1))
    count = max(1, min(1000, int(BATCH_S / max(once, 1e-6))))
    times: List[float] = []
    while len(times) < MOST:
        left = deadline - time.monotonic()
        if times and left <= 0 and (len(times) >= FEWEST or times[0] * count > seconds):
            break
        times.append(max(timed(call, count), 1e-9))
    return times


def best_way(timed: Timed, ways: List[Way], seconds: float) -> Dict[str, Any]:
    """Try some ways to do the same, and measure the one with the highest rate.

    Parameters
    ----------
    timed : callable
        From `timer`.
    ways : list of Way
        From the smallest amount of work up, so that none takes longer than there is time.
    seconds : float
        Time for all of it.
    """
    deadline = time.monotonic() + seconds
    trial = min(TRIAL_S, seconds / 10)
    chosen: Optional[Way] = None
    fastest = latest = 0.0
    trouble: Optional[Exception] = None
    for way in ways:
        if chosen and (
            way.work / latest > trial * 4 or time.monotonic() > deadline - seconds * 0.45
        ):
            continue
        try:
            rate = way.work / statistics.median(sample(timed, way.make(), trial))
        except Exception as error:
            trouble = trouble or error
            if exhausted(error):
                break
            continue
        latest = rate
        # The smallest warms up and fits into caches: it only counts where larger ones crawl.
        larger = chosen is not None and way.work > chosen.work == ways[0].work
        if rate > fastest or (larger and rate > fastest / 3):
            chosen, fastest = way, rate
    if chosen is None:
        raise trouble or RuntimeError("no time was left")
    times = sample(timed, chosen.make(), max(seconds / 5, min(1.5, deadline - time.monotonic())))
    return dict(chosen.what, **summary([chosen.work / t for t in times]))


def random_values(torch: Any, device: Any, shape: Tuple[int, ...], dtype: Any) -> Any:
    """Return normally distributed values."""
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.randn(shape, device=device, dtype=kind).to(dtype)


def halving(size: int, measure: Callable[[int], Dict[str, Any]]) -> Dict[str, Any]:
    """Measure with a buffer of a size, or the largest half, quarter and so on that fits."""
    wanted = size
    while True:
        try:
            found = measure(size)
            break
        except Exception as error:
            if not exhausted(error) or size <= MIB:
                raise
            size //= 2
    found["bytes"] = size
    if size < wanted:
        found["note"] = "memory was short: %d MiB, not %d" % (size // MIB, wanted // MIB)
    return found


def copy(torch: Any, device: Any, kind: str, size: int, seconds: float) -> Dict[str, Any]:
    """Measure copying a buffer on a device; a copy counts as read and written."""

    def call(name: str, bytes_: int) -> Call:
        source = random_values(torch, device, (bytes_ // 4,), torch.float32)
        target = torch.empty_like(source)
        # A kernel of elements can be faster than the runtime's own copy.
        if name == "abs":
            return lambda: torch.abs(source, out=target)
        return lambda: target.copy_(source)

    def measure(bytes_: int) -> Dict[str, Any]:
        ways = [
            Way({"how": name}, 2.0 * bytes_, lambda name=name: call(name, bytes_))  # type: ignore
            for name in ("copy_", "abs")
        ]
        return best_way(timer(torch, kind), ways, seconds)

    return halving(size, measure)


def product(torch: Any, device: Any, name: str, size: int, turned: bool, library: str) -> Call:
    """Return the call that multiplies two square matrices into a third."""
    if library:
        torch.backends.cuda.preferred_blas_library(library)
    if name in FLOATS:
        dtype = getattr(torch, FLOATS[name])
        left, right = (random_values(torch, device, (size, size), dtype) for _ in range(2))
        right = right.t() if turned else right
        result = torch.empty(size, size, device=device, dtype=dtype)
        return lambda: torch.mm(left, right, out=result)
    if name == "int8":
        left, right = (
            torch.randint(-128, 128, (size, size), device=device, dtype=torch.int8)
            for _ in range(2)
        )
        right = right.t()
        result = torch.empty(size, size, device=device, dtype=torch.int32)
        return lambda: torch._int_mm(left, right, out=result)
    # MI300 has a format of its own; MI350 and NVIDIA have that of the OCP.
    arch = str(getattr(torch.cuda.get_device_properties(device), "gcnArchName", ""))
    kind = torch.float8_e4m3fnuz if arch.startswith("gfx94") else torch.float8_e4m3fn
    left, right = (random_values(torch, device, (size, size), kind) for _ in range(2))
    right = right.t()
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(
        left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def products(torch: Any, device: Any, kind: str, name: str, seconds: float) -> Dict[str, Any]:
    """Measure the product of matrices of a data type."""
    chosen = [""]
    if kind == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        if hasattr(torch.backends.cuda, "preferred_blas_library") and name in FLOATS:
            chosen = ["cublas", "cublaslt"]  # ROCm's go by the same names
    ways: List[Way] = []
    # The smallest is for warming up, and tells how long larger ones will take.
    for size in (512, 1024, 2048, 4096) if kind == "cpu" else (1024, 4096, 8192, 16384):
        for turned in (False, True) if ways and name in FLOATS else (name not in FLOATS,):
            for library in chosen:
                what = {"size": size, "how": "A B^T" if turned else "A B"}
                if library:
                    what["library"] = library

                def make(size: int = size, turned: bool = turned, library: str = library) -> Call:
                    return product(torch, device, name, size, turned, library)

                ways.append(Way(what, 2.0 * size**3, make))
    return best_way(timer(torch, kind), ways, seconds)


def formats(torch: Any, kind: str) -> List[str]:
    """Return the data types to multiply on a kind of device."""
    if kind == "hpu":
        return ["bf16", "fp16", "fp32"]
    if kind == "cpu":
        return ["bf16", "fp16", "fp32", "fp64"]
    names = ["bf16", "fp16", "fp32", "fp64", "int8", "fp8"]
    # torch does not use the xf32 of AMD's MI300 for this.
    if not torch.version.hip and torch.cuda.get_device_capability()[0] >= 8:
        names.insert(3, "tf32")
    return names


def transfer(
    torch: Any, device: Any, kind: str, size: int, seconds: float, back: bool
) -> Dict[str, Any]:
    """Measure copying between pinned memory of the host and a device."""

    def measure(bytes_: int) -> Dict[str, Any]:
        host = torch.randint(0, 256, (bytes_,), dtype=torch.uint8)
        what = {"how": "pinned"}
        try:
            host = host.pin_memory("hpu") if kind == "hpu" else host.pin_memory()
        except Exception as error:
            what = {"how": "not pinned", "note": describe(error)[:120]}
        there = torch.empty(bytes_, dtype=torch.uint8, device=device)
        source, target = (there, host) if back else (host, there)
        if back:
            there.copy_(host)
        call = Way(what, float(bytes_), lambda: lambda: target.copy_(source, non_blocking=True))
        return best_way(timer(torch, kind), [call], seconds)

    return halving(size, measure)


def all_reduce(torch: Any, device: Any, kind: str, task: Dict[str, Any]) -> Dict[str, Any]:
    """Measure the sum of a buffer over all ranks; returns the same on each.

    Parameters
    ----------
    torch, device, kind
        As everywhere.
    task : dict
        Its ``rank``, ``ranks``, ``store``, ``bytes`` and ``seconds``.
    """
    import datetime

    distributed = torch.distributed
    backend = {"cuda": "nccl", "hpu": "hccl", "cpu": "gloo"}[kind]
    distributed.init_process_group(
        backend,
        init_method="file://" + task["store"],
        rank=task["rank"],
        world_size=task["ranks"],
        timeout=datetime.timedelta(seconds=task["seconds"] + GRACE_S),
    )
    wait = {"cuda": torch.cuda.synchronize, "cpu": lambda: None}.get(kind) or torch.hpu.synchronize

    def agreed(values: List[float]) -> List[float]:
        # Gaudi has no fp64: fp32 is enough for times.
        shared = torch.tensor(values, dtype=torch.float32, device=device)
        distributed.all_reduce(shared, op=distributed.ReduceOp.MAX)
        return [float(v) for v in shared.cpu()]

    ones = torch.full((1024,), float(task["rank"] + 1), device=device)
    distributed.all_reduce(ones)
    wanted = task["ranks"] * (task["ranks"] + 1) / 2
    if not bool((ones == wanted).all()):
        raise ArithmeticError("the sum over the ranks is wrong")
    values = random_values(torch, device, (task["bytes"] // 4,), torch.float32)
    buffer = torch.empty_like(values)

    def timed(count: int) -> float:
        # Each sum makes the values larger: start anew before they overflow.
        buffer.copy_(values)
        wait()
        distributed.barrier()
        start = time.perf_counter()
        for _ in range(count):
            distributed.all_reduce(buffer)
        wait()
        return (time.perf_counter() - start) / count

    timed(2)
    once = agreed([timed(1)])[0]
    count = int(max(1, min(10, BATCH_S / once)))
    batches = int(max(FEWEST, min(MOST, task["seconds"] / (once * count))))
    times = agreed([timed(count) for _ in range(batches)])
    distributed.destroy_process_group()
    rates = [bus_bandwidth(task["bytes"], max(t, 1e-9), task["ranks"]) for t in times]
    return dict({"how": backend, "ranks": task["ranks"], "bytes": task["bytes"]}, **summary(rates))


def work(torch: Any, kind: str, device: Any, task: Dict[str, Any], emit: Emit) -> None:
    """Do one task that the parent asked for and emit its figures."""

    def figure(name: str, measure: Callable[[], Dict[str, Any]]) -> None:
        emit({"working_on": name})
        try:
            found = measure()
        except Exception as error:
            found = {"error": describe(error)}
        emit({"figure": name, "result": found})
        if kind == "cuda":
            torch.cuda.empty_cache()

    deadline = time.monotonic() + task["seconds"]
    if task["do"] == "compute":
        names = ["copy", *formats(torch, kind)]
        for index, name in enumerate(names):
            share = min(FIGURE_S, (deadline - time.monotonic()) / (len(names) - index))
            share = max(share, 0.1)
            if name == "copy":
                figure(name, lambda: copy(torch, device, kind, buffer_size(kind), share))  # noqa: B023
            else:
                figure(
                    "matmul." + name,
                    lambda: products(torch, device, kind, name, share),  # noqa: B023
                )
    elif task["do"] == "transfer":
        size = min(GIB, available_memory() // 8)
        for name in ("h2d", "d2h"):
            share = min(1.0, task["seconds"] / 2)
            figure(
                name,
                lambda: transfer(torch, device, kind, size, share, name == "d2h"),  # noqa: B023
            )
    else:
        figure("allreduce", lambda: all_reduce(torch, device, kind, task))


def buffer_size(kind: str) -> int:
    """Return the bytes of a buffer that no cache holds, and that memory has room for."""
    if kind != "cpu":
        return 2 * ABOVE_CACHES * GPU_CACHE
    wanted = max(ABOVE_CACHES * last_level_cache(), 256 * MIB)
    # Two buffers, and room for the rest of the process.
    return min(wanted, available_memory() // 4) // 4096 * 4096


def child(kind: str, index: int, ranks: int) -> None:
    """Import torch, then do what is asked for on standard input, a line of JSON each."""
    # Libraries print what they like: to standard error with it.
    channel = os.dup(1)
    os.dup2(2, 1)

    def emit(facts: Dict[str, Any]) -> None:
        os.write(channel, (json.dumps(facts) + "\n").encode())

    emit({"working_on": "import torch"})
    try:
        if kind == "hpu":
            # The plugin reads both when it is imported, and takes the module of that rank.
            os.environ.update(
                RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE=str(ranks),
                LOCAL_WORLD_SIZE=str(ranks),
            )  # fmt: skip
            hccl = __import__("habana_frameworks.torch.distributed.hccl", fromlist=["hccl"])
            if ranks > 1:
                hccl.initialize_distributed_hpu()
        import torch

        emit(dict(device_facts(torch, kind, index), working_on="", done=True))
        device = torch.device(kind, index if kind == "cuda" else 0) if kind != "cpu" else "cpu"
        for line in sys.stdin:
            work(torch, kind, device, json.loads(line), emit)
            emit({"working_on": "", "done": True})
    except Exception as error:
        emit({"error": describe(error), "done": True})


def device_facts(torch: Any, kind: str, index: int) -> Dict[str, Any]:
    """Return the number of devices, and what the one with an index is."""
    facts: Dict[str, Any] = {"torch": str(torch.__version__), "count": 1}
    if kind == "cpu":
        return dict(facts, name=cpu_name(), units=torch.get_num_threads())
    if kind == "hpu":
        return dict(facts, count=torch.hpu.device_count(), name=torch.hpu.get_device_name())
    facts["count"] = torch.cuda.device_count()
    torch.cuda.set_device(index)
    values = torch.cuda.get_device_properties(index)
    return dict(
        facts,
        name=str(values.name),
        arch=str(getattr(values, "gcnArchName", "")).split(":")[0],
        units=int(values.multi_processor_count),
        memory=int(values.total_memory),
    )


def cpu_name() -> str:
    """Return the model of the CPU."""
    match = re.search(r"^model name\s*:\s*(.+)$", read("/proc/cpuinfo"), re.M)
    return match.group(1) if match else platform.processor() or platform.machine()


class Worker:
    """The process of a device, seen from the parent."""

    def __init__(self, kind: str, index: int, ranks: int, said: Any) -> None:
        self.index = index
        self.facts: Dict[str, Any] = {"device": "cpu" if kind == "cpu" else "%s:%d" % (kind, index)}
        self.figures: Dict[str, Any] = {}
        self.stopped = ""
        self.said = said
        self.busy = True
        self.rest = b""
        command = [sys.executable, os.path.abspath(__file__), "--child", str(index)]
        command += ["--kind", kind, "--ranks", str(ranks)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said
        )

    def ask(self, task: Dict[str, Any]) -> None:
        """Hand over a task."""
        assert self.process.stdin is not None
        self.busy = True
        with contextlib.suppress(OSError):  # it has ended, which `hear` will tell
            self.process.stdin.write((json.dumps(task) + "\n").encode())
            self.process.stdin.flush()

    def hear(self) -> None:
        """Take what it has written."""
        assert self.process.stdout is not None
        chunk = os.read(self.process.stdout.fileno(), 1 << 16)
        if not chunk:
            code = self.process.wait()
            how = "ended by %s" % signal.Signals(-code).name if code < 0 else "exit code %d" % code
            self.end(how)
            return
        *lines, self.rest = (self.rest + chunk).split(b"\n")
        for line in lines:
            facts = json.loads(line.decode())
            if facts.pop("done", False):
                self.busy = False
            if "figure" in facts:
                self.figures[facts["figure"]] = facts["result"]
            else:
                self.facts.update(facts)
            if "error" in facts:
                self.end(facts["error"])

    def end(self, why: str) -> None:
        """End it, and note why if it was not meant to end."""
        self.busy = False
        if why and not self.stopped:
            self.stopped = why
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver
            self.process.wait(5)

    def report(self) -> Dict[str, Any]:
        """Return what is known of the device."""
        facts = {k: v for k, v in self.facts.items() if v != "" and k != "error"}
        if self.stopped:
            self.said.seek(0)
            lines = self.said.read()[-20000:].decode("utf-8", "replace").splitlines()
            facts["stopped"] = self.stopped
            facts["said"] = [line[:400] for line in lines if line.strip()][-8:]
        return dict(facts, figures=self.figures)


def wait_for(workers: List[Worker], seconds: float) -> None:
    """Wait until all workers have done their task, and end those that have not by then."""
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            if worker.busy:
                assert worker.process.stdout is not None
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                break
            for key, _ in selector.select(left):
                key.data.hear()
                if not key.data.busy:
                    selector.unregister(key.fileobj)
    for worker in workers:
        if worker.busy:
            worker.end("no answer within %d s" % seconds)


def bench(kind: str, seconds: float) -> Dict[str, Any]:
    """Measure all devices and return the figures."""
    started = time.monotonic()
    tuning = tune(kind)
    ranks = gaudis() if kind == "hpu" else 1
    workers: List[Worker] = []

    def start(index: int) -> None:
        workers.append(Worker(kind, index, ranks, tempfile.TemporaryFile()))  # noqa: SIM115

    try:
        start(0)
        if kind == "cpu":
            ranks = 2
        elif kind == "cuda":
            wait_for(workers, START_S)
            ranks = int(workers[0].facts.get("count", 1))
        for index in range(1, ranks):
            start(index)
        wait_for(workers, START_S)
        measuring = time.monotonic()
        devices = workers[:1] if kind == "cpu" else workers
        # The devices compute at the same time, as in a job: they share the node's power.
        for worker in (live := running(devices)):
            worker.ask({"do": "compute", "seconds": seconds * 0.6})
        wait_for(live, seconds * 0.6 + GRACE_S)
        if kind != "cpu":
            # They share the host's memory: one at a time.
            for worker in running(devices):
                share = seconds * 0.2 / len(devices)
                worker.ask({"do": "transfer", "seconds": share})
                wait_for([worker], share + GRACE_S)
        collective(kind, running(workers), ranks, seconds * 0.1)
        spent = time.monotonic() - measuring
        return {
            "bench": 1,
            "kind": kind,
            "tuning": tuning,
            "devices": [worker.report() for worker in devices],
            # Each rank tells the same.
            "allreduce": workers[0].figures.pop("allreduce", {}),
            "lost": [w.stopped for w in workers if w.stopped and w not in devices],
            "seconds": round(spent, 1),
            "starting": round(measuring - started, 1),
        }
    finally:
        for worker in workers:
            worker.end("")


def running(workers: List[Worker]) -> List[Worker]:
    """Return the workers that can be asked."""
    return [worker for worker in workers if not worker.stopped]


def collective(kind: str, live: List[Worker], ranks: int, seconds: float) -> None:
    """Let all ranks sum a buffer; without all of them there is nothing to measure."""
    if ranks < 2 or len(live) < ranks:
        return
    size = 64 * MIB if kind == "cpu" else GIB
    if kind == "cpu":
        size = max(MIB, min(size, available_memory() // 16))
    with tempfile.TemporaryDirectory() as folder:
        task = {"do": "reduce", "ranks": ranks, "bytes": size, "seconds": seconds}
        for rank, worker in enumerate(live):
            worker.ask(dict(task, rank=rank, store=os.path.join(folder, "store")))
        wait_for(live, seconds + GRACE_S)


def gaudis() -> int:
    """Return the number of Gaudis that a job may use."""
    masked = os.environ.get("HABANA_VISIBLE_MODULES", "")
    if masked and masked != "all":
        return len([m for m in masked.split(",") if m.strip()])
    found = glob.glob("/dev/accel/accel[0-9]*") or glob.glob("/dev/hl[0-9]*")
    return max(1, len(found))


def tune(kind: str) -> Dict[str, str]:
    """Set what is not the default and makes a difference; return what was set."""
    wanted = {}
    if kind == "cuda" and os.path.exists("/opt/rocm"):
        # The default of later releases on Instinct; torch 2.3 must be told.
        wanted["TORCH_BLAS_PREFER_HIPBLASLT"] = "1"
    if kind == "hpu":
        wanted["PT_HPU_LAZY_MODE"] = "0"  # a lazy graph may leave out calls that repeat others
    if kind == "cpu":
        wanted["GLOO_SOCKET_IFNAME"] = "lo"  # the host's name need not resolve in a container
    wanted = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(wanted)
    return wanted


def main() -> int:
    """Print the figures as one line of JSON; errors are data, too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=("cuda", "hpu", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.kind, options.child, options.ranks)
        return 0
    try:
        found = bench(options.kind, options.seconds)
    except Exception as error:
        found = {"bench": 1, "error": describe(error)}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
