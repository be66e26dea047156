"""Write docs/checks.md from the explanations: ``python -m toolkit.checks.docs``."""

from __future__ import annotations

from toolkit import files, paths
from toolkit.checks.explanations import EXPLANATIONS, SYMPTOMS
from toolkit.checks.findings import TIERS

GROUPS = {
    "rocm": "AMD GPUs (`--rocm`)",
    "cuda": "NVIDIA GPUs (`--cuda`)",
    "hpu": "Intel Gaudi (`--hpu`)",
    "cpu": "CPU (`--cpu`)",
    "slurm": "Slurm",
    "image": "Image",
    "device": "Device",
    "bench": "Speed (`--bench`)",
}

INTRODUCTION = """\
# Device checks

This page is generated from `toolkit/checks/explanations.py` (`python -m toolkit.checks.docs`);
`toolkit check --explain ID` prints the same.

`toolkit check` looks at three tiers and tells them apart:

- **host**: the kernel's files and the variables of the environment. Works on a login node, needs
  no container and no GPU software. On NVIDIA and Gaudi nodes it also runs nvidia-smi or hl-smi.
- **image** (`--image SIF`): what the container's torch was built for and which libraries it
  loads. Needs no device.
- **device** (`--image SIF`, in a job): the container sees the devices that the host has, and
  computes the right numbers on each. A tier that lacks its hardware says so.

The container is started once for both.

```
toolkit check                                what this host has, else the CPU
toolkit check --rocm --image build/monai.sif all three tiers
toolkit check --rocm --expect 8              fails if the node has fewer than 8 GPUs
toolkit check --rocm --json                  see docs/check.schema.json
toolkit check --rocm --monitoring            one line for Nagios and its like
toolkit check --rocm --image SIF --bench     measures the devices, too; see docs/benchmarks.md
toolkit check --explain rocm.masks           the long form of a finding
toolkit check --rocm --root DIR              a recorded tree instead of this host
```

## Exit codes

| | all is well | only warnings | something failed | nothing could be looked at | wrong call |
|---|---|---|---|---|---|
| plain | 0 | 0 | 1 | 0 | 2 |
| `--monitoring` | 0 | 1 | 2 | 3 | 3 |

## Recorded trees

With `--root DIR` nothing of the host is read; links in the tree are followed as if DIR were `/`.

| below DIR | what it is |
|---|---|
| `sys/`, `proc/`, `dev/` | copies of the host's files; a device may be an empty file |
| `proc/self/environ` | the variables of the job; without it those of the call |
| `proc/sys/kernel/hostname` | the host's name |
| `tools/open.txt` | what opening a device said, a line each: `/dev/kfd EACCES`, `/dev/kfd ok` |
| `tools/rocm-smi.json` | `rocm-smi --showproductname --showmeminfo vram --json` |
| `tools/amd-smi.json` | `amd-smi static --json` |
| `tools/nvidia-smi.csv` | `nvidia-smi --query-gpu=index,name,uuid,... --format=csv`, or `-L` |
| `tools/hl-smi.csv` | `hl-smi -Q index,name,bus_id,... -f csv` |
| `tools/probe.json` | `python3 toolkit/inside/probe.py`, run in the container |

A file of `tools/` may have another ending, and may lie in DIR itself. A device that
`tools/open.txt` does not name can be opened if its file's owner may read and write it; `EPERM`
there means that the cgroup of a job hides the device. Files are read up to 1 MiB; what is no
regular file is not read.

To record a tree on a node:

```
mkdir -p DIR/proc/self DIR/tools
cp --parents -r /sys/class/kfd/kfd/topology /proc/cmdline /proc/meminfo /proc/self/status \\
    /proc/self/mountinfo /proc/self/environ DIR
rocm-smi --showproductname --showmeminfo vram --json > DIR/tools/rocm-smi.json
```

Variables may hold secrets: look through `environ` before a tree is given away.
"""


def page() -> str:
    """Return the text of docs/checks.md."""
    parts = [INTRODUCTION, "## Messages that people meet\n"]
    parts.append("| message (a regular expression) | what it means | remedy |\n|---|---|---|")
    for pattern, meaning, remedy in SYMPTOMS:
        shown = pattern.replace("|", "\\|")
        parts.append(f"| `{shown}` | {meaning} | {remedy} |")
    parts.append("\n## Findings\n")
    parts.append("| id | tier | what is looked at |\n|---|---|---|")
    for id, known in EXPLANATIONS.items():
        parts.append(f"| [{id}](#{id.replace('.', '')}) | {known.tier} | {known.title} |")
    for group, heading in GROUPS.items():
        parts.append(f"\n## {heading}")
        for id, known in EXPLANATIONS.items():
            if id.partition(".")[0] == group:
                parts.append(
                    f"\n### {id}\n\n**{known.title}** ({known.tier} tier). {known.about}\n"
                )
                parts.append(f"- Expected: {known.expected}")
                parts.append(f"- Remedy: {known.remedy}")
                parts.append(f"- Source: {known.source}")
    return "\n".join(parts) + "\n"


def main() -> None:
    """Write the page."""
    assert {known.tier for known in EXPLANATIONS.values()} <= set(TIERS)
    files.write_text(paths.home() / "docs" / "checks.md", page())


if __name__ == "__main__":
    main()
