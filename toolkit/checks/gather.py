"""Put the reports of several nodes together and name the odd one out.

As a program: ``python -m toolkit.checks.gather FOLDER NODE...`` reads ``FOLDER/NODE.json``, what
``toolkit check --json`` printed on each node, prints one report, and writes it to
``FOLDER/report.json``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit import files
from toolkit.checks.findings import STATUSES, brief, count, printable

SCHEMA_VERSION = 1
RESULT = "report.json"
#: What a report must have to count as one.
FIELDS = {"status": str, "verdict": str, "findings": list, "devices": list}
#: What differs between healthy nodes from minute to minute.
VOLATILE = re.compile(r"[\d.]+ (?:of [\d.]+ )?[KMGT]iB (?:of it )?(?:free|used)\b(?: \(\d+%\))?")

Report = Mapping[str, Any]
Key = tuple[str, str]


def read(folder: Path, node: str) -> Report | str:
    """Return the report of a node, or why there is none.

    Parameters
    ----------
    folder : Path
        Where ``NODE.json`` is, or else ``NODE.log``, whose last line says what went wrong.
    node : str
        The node's name.
    """
    path = folder / f"{node}.json"
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as error:
        return printable(f"{path.name} is no report: {error}")
    try:
        lines = (folder / f"{node}.log").read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return "the check did not start there, or the node was lost"
    said = [line.removeprefix("error: ").strip() for line in lines if line.strip()]
    return printable("; ".join(said[-3:])) or "the check was lost before its end"


def parse(text: str) -> Report:
    """Return a report from its JSON.

    Raises
    ------
    ValueError
        If it is none.
    """
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    for name, kind in FIELDS.items():
        if not isinstance(value.get(name), kind):
            raise ValueError(f"no {name}")
    if value["status"] not in STATUSES:
        raise ValueError(f"status {value['status']!r}")
    for item in value["findings"]:
        if not isinstance(item, dict) or not all(
            isinstance(item.get(name), str) for name in ("id", "status", "seen", "subject")
        ):
            raise ValueError("a finding lacks its id, status, seen or subject")
        if item["status"] not in STATUSES:
            raise ValueError(f"status {item['status']!r}")
    return value


def merge(reports: Mapping[str, Report | str]) -> dict[str, Any]:
    """Return one report of all nodes.

    A node is odd in a finding if more than half of the nodes agree on it and this one does
    not: in its status, or in what was seen, but for amounts of memory free or used.

    Parameters
    ----------
    reports : mapping
        By node: what the check printed there, or why there is nothing.
    """
    told = {node: report for node, report in reports.items() if not isinstance(report, str)}
    table = {node: {_key(f): f for f in report["findings"]} for node, report in told.items()}
    keys = list(dict.fromkeys(key for found in table.values() for key in found))
    findings = [_compare(key, {node: found.get(key) for node, found in table.items()})
                for key in keys]  # fmt: skip
    findings.sort(key=lambda f: (STATUSES.index(f["status"]), not f["odd"]))
    most = _majority({node: str(len(report["devices"])) for node, report in told.items()})
    nodes = []
    for node, report in reports.items():
        if isinstance(report, str):
            nodes.append({"node": node, "status": "fail", "verdict": f"no report: {report}",
                          "reported": False, "devices": None, "odd": []})  # fmt: skip
            continue
        devices = len(report["devices"])
        fewer = most is not None and devices < int(most)
        odd = [_name(f) for f in findings if any(o["node"] == node for o in f["odd"])]
        verdict = printable(report["verdict"])
        if fewer:
            verdict = f"{count(devices, 'device')} where most nodes have {most}; {verdict}"
        if most is not None and devices != int(most):
            odd.insert(0, "devices")
        nodes.append({"node": node, "status": "fail" if fewer else report["status"],
                      "verdict": verdict, "reported": True, "devices": devices,
                      "odd": odd})  # fmt: skip
    statuses = {node["status"] for node in nodes}
    return {
        "schema": SCHEMA_VERSION,
        "status": next((s for s in ("fail", "warn", "pass") if s in statuses), "skip"),
        "verdict": verdict_of(nodes),
        "nodes": nodes,
        "findings": findings,
    }


def _key(found: Report) -> Key:
    return found["id"], found["subject"]


def _name(row: Report) -> str:
    return f"{row['id']} {row['subject']}".strip()


def _majority(values: Mapping[str, str]) -> str | None:
    """Return what more than half agree on, if there are enough of them to be a majority."""
    for value, times in Counter(values.values()).most_common(1):
        if 2 * times > len(values):
            return value
    return None


def _compare(key: Key, seen: Mapping[str, Report | None]) -> dict[str, Any]:
    """Return a finding as the nodes have it."""
    status = {node: f["status"] if f else "none" for node, f in seen.items()}
    text = {node: printable(f["seen"]) if f else "" for node, f in seen.items()}
    steady = {node: f"{status[node]} {VOLATILE.sub('', text[node])}" for node in seen}
    common, usual = _majority(status), _majority(steady)
    odd = [
        node
        for node in seen
        if (common is not None and status[node] != common)
        or (usual is not None and steady[node] != usual)
    ]
    alike = [node for node in seen if node not in odd]
    return {
        "id": key[0],
        "subject": key[1],
        "status": min((f["status"] for f in seen.values() if f), key=STATUSES.index),
        # Without a majority there is none to be odd against.
        "agreed": usual is not None,
        "most": text[alike[0]] if usual is not None and alike else None,
        "odd": [{"node": n, "status": status[n], "seen": text[n]} for n in odd],
        "nodes": {node: status[node] for node in seen},
        "remedy": next((printable(str(f.get("remedy") or "")) for f in seen.values()
                        if f and f["status"] in ("fail", "warn")), ""),
        "seen": text,
    }  # fmt: skip


def verdict_of(nodes: Sequence[Report]) -> str:
    """Return the result as one line."""
    lost = [n["node"] for n in nodes if not n["reported"]]
    failed = [n["node"] for n in nodes if n["reported"] and n["status"] == "fail"]
    odd = [n["node"] for n in nodes if n["odd"] and n["node"] not in failed]
    warned = [n["node"] for n in nodes if n["status"] == "warn"]
    parts = [
        f"{len(names)} {what} ({brief(names)})"
        for names, what in (
            (failed, "failed"),
            (lost, "did not report"),
            (odd, "unlike the others"),
            (warned, "with something to mend"),
        )
        if names
    ]
    if not parts:
        unseen = bool(nodes) and all(n["status"] == "skip" for n in nodes)
        parts = ["nothing could be looked at" if unseen else "all is well, and alike"]
    return f"{count(len(nodes), 'node')}: {', '.join(parts)}"


def text(merged: Report) -> str:
    """Return the report for people: a table of nodes by findings, what it means, a verdict."""
    names = [node["node"] for node in merged["nodes"] if node["reported"]]
    # Columns only for what is not well and alike everywhere: the rest would hide it.
    shown = [f for f in merged["findings"]
             if f["odd"] or not f["agreed"] or f["status"] in ("fail", "warn")]  # fmt: skip
    ids = list(dict.fromkeys(f["id"] for f in shown))
    rows = [["node", "status", "devices", *ids]]
    for node in merged["nodes"]:
        mark = "*" if "devices" in node["odd"] else ""
        cells = [node["node"], node["status"] if node["reported"] else "LOST"]
        cells.append(f"{node['devices']}{mark}" if node["reported"] else "-")
        cells += [_cell(node["node"], [f for f in shown if f["id"] == id]) for id in ids]
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
             for row in rows]  # fmt: skip
    quiet = len({f["id"] for f in merged["findings"]} - set(ids))
    if names and quiet:
        lines.append(f"Well, or not looked at, and alike on all: {count(quiet, 'finding')}.")
    if any("*" in cell for row in rows[1:] for cell in row):
        lines.append("* unlike most nodes")
    lines.append("")
    for node in merged["nodes"]:
        if not node["reported"] or "devices" in node["odd"]:
            lines.append(f"{node['node']}: {node['verdict']}")
    for row in shown:
        lines += _told(row)
    return "\n".join([*lines, merged["verdict"]])


def _cell(node: str, rows: Sequence[Report]) -> str:
    statuses = {str(row["nodes"].get(node, "-")) for row in rows}  # "-": it did not report
    mark = "*" if any(o["node"] == node for row in rows for o in row["odd"]) else ""
    return min(statuses, key=lambda s: (*STATUSES, "none", "-").index(s)) + mark


def _told(row: Report) -> list[str]:
    """Return what is to be said of a finding: who saw what, and what to do."""
    groups: dict[tuple[str, str], list[str]] = {}
    strange = {o["node"] for o in row["odd"]}
    for node, status in row["nodes"].items():
        groups.setdefault((status, row["seen"][node]), []).append(node)
    if row["agreed"]:
        wrong = {g: n for g, n in groups.items() if g[0] in ("fail", "warn") or strange & {*n}}
        usual = [g for g in groups if g not in wrong and row["most"] == g[1]]
        groups = wrong | {g: ["most"] for g in usual[:1]}
    lines = [f"{_name(row)}"]
    lines += [f"  {brief(nodes)}: {status} {seen}".rstrip()
              for (status, seen), nodes in groups.items()]  # fmt: skip
    return [*lines, f"  do: {row['remedy']}"] if row["remedy"] else lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Gather the reports of a folder; return 0 if no node failed, else 1."""
    parser = argparse.ArgumentParser(prog="python -m toolkit.checks.gather")
    parser.add_argument("folder", type=Path, help="where NODE.json of each node is")
    parser.add_argument("nodes", nargs="+", metavar="NODE", help="the nodes that should be there")
    asked = parser.parse_args(arguments)
    merged = merge({node: read(asked.folder, node) for node in asked.nodes})
    print(text(merged))
    try:
        files.write_text(asked.folder / RESULT, json.dumps(merged, indent=2) + "\n")
    except OSError as error:
        print(f"error: {asked.folder / RESULT}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"report {asked.folder / RESULT}", file=sys.stderr)
    return int(merged["status"] in ("fail", "skip"))


if __name__ == "__main__":
    sys.exit(main())
