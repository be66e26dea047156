"""The host tier without a GPU: what a job really has of cores, memory and /dev/shm."""

from __future__ import annotations

import re
from collections.abc import Mapping

from toolkit.checks import parse
from toolkit.checks.common import GIB, Device
from toolkit.checks.findings import Finding, brief, count, finding
from toolkit.checks.tree import Tree, number

CGROUP = "/sys/fs/cgroup"
#: cgroup v1 writes a limit as large as this where there is none.
NO_LIMIT = 1 << 60
SHM_BYTES = GIB
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def allowed(tree: Tree) -> list[tuple[int, int]]:
    """Return the CPUs that this process may run on."""
    return parse.ranges(parse.fields(tree.text("/proc/self/status")).get("Cpus_allowed_list", ""))


def groups(tree: Tree) -> dict[str, str]:
    """Return the cgroup of this process by controller; version 2 has the name ``""``."""
    found = {}
    for line in tree.text("/proc/self/cgroup").splitlines()[:256]:
        parts = line.split(":", 2)
        if len(parts) == 3:
            for name in parts[1].split(","):
                found[name] = parts[2]
    return found


def levels(path: str) -> list[str]:
    """Return a cgroup and all above it, as each of them may set a limit.

    In a container the path is often that of the host and not shown: the root
    of what is mounted is always among them.
    """
    parts = [p for p in path.split("/") if p and p != ".."][:32]
    return ["/" + "/".join(parts[:n]) if n else "" for n in range(len(parts), -1, -1)]


def cpu_share(tree: Tree) -> float | None:
    """Return how many CPUs' time the cgroups grant, None without a limit."""
    mine, shares = groups(tree), []
    for level in levels(mine.get("", "")):
        words = tree.word(f"{CGROUP}{level}/cpu.max").split()
        if len(words) == 2:
            shares.append(_share(words[0], words[1]))
    path = mine.get("cpu", "")
    for level in levels(path):
        for folder in ("cpu", "cpu,cpuacct"):
            base = f"{CGROUP}/{folder}{level}"
            shares.append(
                _share(
                    tree.word(f"{base}/cpu.cfs_quota_us"), tree.word(f"{base}/cpu.cfs_period_us")
                )
            )
    return min((s for s in shares if s is not None), default=None)


def _share(quota: str, period: str) -> float | None:
    have, per = number(quota), number(period)
    return have / per if have and per and have > 0 and per > 0 else None


def memory_limit(tree: Tree) -> tuple[int | None, int | None]:
    """Return the lowest memory limit of the cgroups, and what is used of it."""
    mine, found = groups(tree), []
    for level in levels(mine.get("", "")):
        base = f"{CGROUP}{level}"
        found.append((tree.number(f"{base}/memory.max"), tree.number(f"{base}/memory.current")))
    for level in levels(mine.get("memory", "")):
        base = f"{CGROUP}/memory{level}"
        found.append(
            (
                tree.number(f"{base}/memory.limit_in_bytes"),
                tree.number(f"{base}/memory.usage_in_bytes"),
            )
        )
    limits = [(limit, used) for limit, used in found if limit is not None and 0 < limit < NO_LIMIT]
    return min(limits, key=lambda pair: pair[0]) if limits else (None, None)


def read(tree: Tree) -> list[Device]:
    """Return the processor as a device."""
    info = parse.fields(tree.text("/proc/cpuinfo"))
    total, _ = _meminfo(tree)
    name = info.get("model name") or info.get("CPU part") or "CPU"
    return [Device(index=0, name=name, units=parse.size(allowed(tree)), memory=total)]


def _meminfo(tree: Tree) -> tuple[int | None, int | None]:
    values = parse.fields(tree.text("/proc/meminfo"))
    total = number(values.get("MemTotal", "").removesuffix("kB"))
    free = number(values.get("MemAvailable", "").removesuffix("kB"))
    return (total * 1024 if total else None, free * 1024 if free is not None else None)


def present(tree: Tree) -> list[str]:
    """Return where the CPU shows itself: it is always there."""
    return ["/proc/cpuinfo"]


def check(tree: Tree, environment: Mapping[str, str], expect: int | None) -> list[Finding]:
    """Return the findings of the host tier."""
    return [
        *check_cores(tree, environment),
        *check_memory(tree),
        *check_shm(tree),
        *check_threads(tree, environment),
        *check_numa(tree),
    ]


def check_cores(tree: Tree, environment: Mapping[str, str]) -> list[Finding]:
    """Compare the CPUs that are seen with the share that is granted."""
    seen, share = parse.size(allowed(tree)), cpu_share(tree)
    if not seen:
        return [finding("cpu.cores", "skip", "no Cpus_allowed_list in /proc/self/status")]
    told = f"{count(seen, 'CPU')} may be used"
    given = number(environment.get("SLURM_CPUS_ON_NODE", ""))
    if given:
        told += f", Slurm gave {given}"
    if share is not None and share < seen - 0.5:
        text = f"{told}, but the cgroup grants the time of {share:.1f}"
        # An explicit thread number keeps programs from counting cores.
        fine = any(0 < (number(environment.get(n, "")) or 0) <= share + 0.5 for n in THREADS)
        return [finding("cpu.cores", "pass" if fine else "warn", text)]
    if given and 0 < given < seen:
        text = f"{told}: the job is not bound to its cores"
        remedy = "the site sets TaskPlugin=task/cgroup,task/affinity and ConstrainCores=yes"
        return [finding("cpu.cores", "warn", text, remedy=remedy)]
    return [finding("cpu.cores", "pass", told)]


def check_memory(tree: Tree) -> list[Finding]:
    """Tell how much memory is left."""
    total, free = _meminfo(tree)
    limit, used = memory_limit(tree)
    told = []
    if total:
        told.append(f"{total / GIB:.1f} GiB in the machine")
    if limit is not None:
        told.append(f"limit of the cgroup {limit / GIB:.1f} GiB")
        told += [f"{used / GIB:.1f} GiB of it used"] if used is not None else []
    if not told:
        return [finding("cpu.memory", "skip", "neither /proc/meminfo nor a limit to read")]
    rooms = [free] if free is not None else []
    # What is used includes the page cache, which the kernel gives back: only a
    # process that is really near its limit is warned.
    bound = min(x for x in (limit, total) if x is not None)
    if limit is not None and used is not None:
        rooms.append(limit - used)
    room = min(rooms, default=bound)
    text = ", ".join(told) + f"; {max(room, 0) / GIB:.1f} GiB free"
    low = room < min(2 * GIB, bound / 10) or bound < 2 * GIB
    return [finding("cpu.memory", "warn" if low else "pass", text)]


def check_shm(tree: Tree) -> list[Finding]:
    """Tell the size of /dev/shm."""
    size, kind = shm(tree)
    if not kind:
        known = bool(tree.text("/proc/self/mountinfo"))
        text = "/dev/shm is not mounted" if known else "no /proc/self/mountinfo to read"
        return [finding("cpu.shm", "warn" if known else "skip", text)]
    if kind != "tmpfs":
        return [finding("cpu.shm", "warn", f"/dev/shm is a {kind}")]
    if size is None:
        return [finding("cpu.shm", "pass", "a tmpfs of the default size, half of the memory")]
    status = "pass" if size >= SHM_BYTES else "warn"
    return [finding("cpu.shm", status, f"a tmpfs of {size / GIB:.2f} GiB")]


def shm(tree: Tree) -> tuple[int | None, str]:
    """Return size and file system of /dev/shm, from the mount options."""
    total, _ = _meminfo(tree)
    size, kind = None, ""
    for line in tree.text("/proc/self/mountinfo").splitlines():
        before, mark, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if not mark or len(left) < 6 or left[4] != "/dev/shm" or len(right) < 3:
            continue
        kind, size = right[0], None
        match = re.search(r"(?:^|,)size=([0-9]{1,18})([kKmMgG%]?)(?:,|$)", right[2])
        if match:
            value, unit = int(match.group(1)), match.group(2).lower()
            factor = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": GIB}
            size = (total or 0) * value // 100 if unit == "%" else value * factor[unit]
    return size, kind


def check_threads(tree: Tree, environment: Mapping[str, str]) -> list[Finding]:
    """Compare the numbers of threads with the CPUs."""
    seen, share = parse.size(allowed(tree)), cpu_share(tree)
    have = min(x for x in (seen or None, share) if x is not None) if seen or share else None
    if not have:
        return [finding("cpu.threads", "skip", "it is not known how many CPUs there are")]
    ranks = parse.ranges(environment.get("SLURM_TASKS_PER_NODE", "").partition("(")[0])
    many = ranks[0][0] if ranks and environment.get("SLURM_PROCID") else 1
    # A rank that Slurm bound sees its own cores alone.
    per_task = number(environment.get("SLURM_CPUS_PER_TASK", ""))
    many = 1 if per_task and seen <= per_task else max(many, 1)
    set_to = [(n, environment[n]) for n in THREADS if n in environment]
    if not set_to:
        text = f"OMP_NUM_THREADS is not set: {count(seen or 0, 'thread')} a process"
        if many > 1:
            return [finding("cpu.threads", "warn", f"{text}, {many} ranks on {have:g} CPUs")]
        return [finding("cpu.threads", "pass", text)]
    found = []
    for name, value in set_to:
        # OpenMP takes a list, of which the first counts for the outermost level.
        threads = number(value.split(",")[0])
        if threads is None or threads < 1:
            text = f"{name}={value} is no number of threads"
            found.append(finding("cpu.threads", "warn", text))
        elif threads * many > have + 0.5:
            text = f"{name}={value}" + (f" times {many} ranks" if many > 1 else "")
            found.append(finding("cpu.threads", "warn", f"{text} on {have:g} CPUs"))
    told = " ".join(f"{name}={value}" for name, value in set_to)
    return found or [finding("cpu.threads", "pass", f"{told} on {have:g} CPUs")]


def check_numa(tree: Tree) -> list[Finding]:
    """Compare the NUMA nodes of the allowed CPUs and of the allowed memory."""
    status = parse.fields(tree.text("/proc/self/status"))
    cpus, memory = allowed(tree), parse.ranges(status.get("Mems_allowed_list", ""))
    nodes = []
    for name in tree.names("/sys/devices/system/node"):
        if re.fullmatch(r"node[0-9]{1,5}", name):
            span = parse.ranges(tree.word(f"/sys/devices/system/node/{name}/cpulist"))
            nodes.append((int(name[4:]), span))
    if not nodes or not cpus:
        return [finding("cpu.numa", "skip", "no NUMA node is shown")]
    mine = [node for node, span in nodes if parse.common(cpus, span)]
    text = f"{count(len(nodes), 'node')}, CPUs of {brief([str(n) for n in mine])}"
    far = [n for n in mine if memory and not any(a <= n <= b for a, b in memory)]
    if far:
        text += f"; their memory may not be used: {brief([str(n) for n in far])}"
        return [finding("cpu.numa", "warn", text)]
    return [finding("cpu.numa", "pass", text)]
