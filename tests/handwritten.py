"""Compare bench.py with loops that anybody would write, in one call in one container.

Run by tests/bench.py; prints a line of JSON. On the CPU products are in fp32,
elsewhere in bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "../toolkit/inside"))
sys.dont_write_bytecode = True


def best(torch, kind, calls):
    """Return the highest median rate of some calls; (work, function) each."""
    rates = []
    for work, call in calls:
        for _ in range(3):
            call()
        times = []
        for _ in range(7):
            if kind == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(10):
                    call()
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end) / 1e4)
            else:
                begin = time.perf_counter()
                call()
                times.append(time.perf_counter() - begin)
        rates.append(work / statistics.median(times))
    return max(rates)


def product(torch, kind):
    rates = []
    for size in (1024, 2048) if kind == "cpu" else (4096, 6144, 8192, 12288, 16384):
        dtype = torch.float32 if kind == "cpu" else torch.bfloat16
        a, b = (torch.randn(size, size, device=kind, dtype=dtype) for _ in range(2))
        out = torch.empty(size, size, device=kind, dtype=dtype)
        for right in (b, b.t()):
            call = lambda a=a, right=right, out=out: torch.mm(a, right, out=out)  # noqa: E731
            rates.append(best(torch, kind, [(2 * size**3, call)]))
    return max(rates)


def copy(torch, kind):
    rates = []
    for size in (1 << 28,) if kind == "cpu" else (1 << 30, 1 << 32):
        source = torch.randn(size // 4, device=kind)
        target = torch.empty_like(source)
        call = lambda source=source, target=target: target.copy_(source)  # noqa: E731
        rates.append(best(torch, kind, [(2 * size, call)]))
    return max(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    kind = options.kind
    import bench
    import torch

    name = "fp32" if kind == "cpu" else "bf16"
    device = torch.device(kind, 0) if kind == "cuda" else kind
    pairs: dict[str, list[tuple[float, float]]] = {"product": [], "copy": []}
    for _ in range(options.pairs):
        hand = product(torch, kind)
        seen = bench.products(torch, device, kind, name, bench.FIGURE_S)["value"]
        pairs["product"].append((seen, hand))
        hand = copy(torch, kind)
        seen = bench.copy(torch, device, kind, bench.buffer_size(kind), bench.FIGURE_S)["value"]
        pairs["copy"].append((seen, hand))
    print(json.dumps({"torch": torch.__version__, "format": name, "pairs": pairs}))


if __name__ == "__main__":
    main()
