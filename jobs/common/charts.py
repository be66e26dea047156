"""Pieces of a page of results: tables, and charts as SVG, with nothing from a network."""

import html
import math
from typing import AbstractSet, Any, List, Mapping, Sequence, Tuple

#: For lines and bars; distinct in grey and to the colour-blind (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60em; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; } td, th { padding: .2em .7em; text-align: right; }
th { font-weight: 600; border-bottom: 1px solid #999; } td:first-child, th:first-child
{ text-align: left; } figure { display: inline-block; margin: .4em; width: 116px;
vertical-align: top; font-size: 11px; line-height: 1.3; overflow-wrap: anywhere; }
figure img { width: 96px; height: 96px; image-rendering: pixelated; display: block; }
svg { max-width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: #333; }
"""

#: Entries of a legend in one row.
ACROSS = 3


def four(value: Any) -> str:
    """Return a figure with four digits, a dash where there is none."""
    return "-" if value is None else f"{value:.4f}"


def head(title: str, heading: str) -> str:
    """Return the beginning of a page."""
    return (
        f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{html.escape(heading)}</h1>"
    )


def facts(rows: Mapping[str, str]) -> str:
    """Return a table of names and texts."""
    cells = "".join(
        f"<tr><th>{html.escape(name)}</th><td style='text-align:left'>{html.escape(text)}</td></tr>"
        for name, text in rows.items()
    )
    return f"<table>{cells}</table>"


def table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table with a row of names above."""
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{cells}</tr>{body}</table>"


def ticks(low: float, high: float, *, whole: bool = False) -> List[float]:
    """Return about five round numbers that lie between two."""
    raw = (high - low) / 4
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * each for each in (1, 2, 5, 10) if power * each >= raw)
    if whole:
        step = max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    return [each * step for each in range(first, math.floor(high / step + 1e-9) + 1)]


def legend(entries: Sequence[Tuple[str, str]], *, top: int) -> Tuple[str, int]:
    """Return names beside their colours as SVG, and where below them there is room again."""
    parts = []
    for number, (name, colour) in enumerate(entries):
        x, y = 60 + 240 * (number % ACROSS), top + 20 * (number // ACROSS)
        parts.append(
            f"<rect x='{x}' y='{y}' width='14' height='4' fill='{colour}'/>"
            f"<text x='{x + 20}' y='{y + 6}'>{html.escape(name)}</text>"
        )
    return "".join(parts), top + 20 * math.ceil(len(entries) / ACROSS)


def lines(
    series: Sequence[Tuple[str, List[Tuple[float, float]]]],
    *,
    across: str,
    dashed: AbstractSet[str] = frozenset(),
    sharing: int = 1,
) -> str:
    """Return curves as SVG, points too where they are few.

    Parameters
    ----------
    series : sequence of (str, list of (float, float))
        Name and points of each curve.
    across : str
        What the horizontal axis is.
    dashed : set of str, optional
        Names of curves to be dashed.
    sharing : int, optional
        So many curves, one after the other, have one colour.
    """
    points = [point for _, each in series for point in each]
    if not points:
        return "<p>There are no figures.</p>"
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    left, right = (left, right) if right > left else (left - 1, right + 1)
    low, high = (low, high) if high - low > 1e-9 else (low - 0.5, high + 0.5)

    def place(x: float, y: float) -> Tuple[float, float]:
        return 60 + 700 * (x - left) / (right - left), 230 - 210 * (y - low) / (high - low)

    colours = [COLOURS[number // sharing % len(COLOURS)] for number in range(len(series))]
    names, bottom = legend(
        [(name, colour) for (name, _), colour in zip(series, colours)],  # noqa: B905
        top=275,
    )
    parts = [f"<svg viewBox='0 0 780 {bottom}' width='780' role='img'>"]
    for y in ticks(low, high):
        _, down = place(left, y)
        parts.append(
            f"<line x1='60' x2='760' y1='{down:.1f}' y2='{down:.1f}' stroke='#ddd'/>"
            f"<text x='54' y='{down + 4:.1f}' text-anchor='end'>{y:.4g}</text>"
        )
    for x in ticks(left, right, whole=True):
        over, _ = place(x, low)
        parts.append(f"<text x='{over:.1f}' y='250' text-anchor='middle'>{x:g}</text>")
    parts.append(f"<text x='760' y='268' text-anchor='end'>{html.escape(across)}</text>")
    for (name, each), colour in zip(series, colours):  # noqa: B905
        places = [place(x, y) for x, y in each]
        path = " ".join(f"{over:.1f},{down:.1f}" for over, down in places)
        dashes = " stroke-dasharray='5 4'" if name in dashed else ""
        parts.append(
            f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='1.5'{dashes}/>"
        )
        if len(each) <= 60:
            parts += [
                f"<circle cx='{over:.1f}' cy='{down:.1f}' r='3' fill='{colour}'/>"
                for over, down in places
            ]
    return "".join([*parts, names, "</svg>"])


def stacks(rows: Sequence[Tuple[str, Sequence[float]]], *, names: Sequence[str], unit: str) -> str:
    """Return bars of several parts each as SVG.

    Parameters
    ----------
    rows : sequence of (str, sequence of float)
        Name of each bar and the lengths of its parts.
    names : sequence of str
        Of the parts.
    unit : str
        Written behind the sum.
    """
    if not rows:
        return "<p>There are no figures.</p>"
    longest = max(*(sum(lengths) for _, lengths in rows), 1e-9)
    parts = []
    for number, (name, lengths) in enumerate(rows):
        y, x = 22 * number, 200.0
        parts.append(f"<text x='192' y='{y + 15}' text-anchor='end'>{html.escape(name)}</text>")
        for part, length in enumerate(lengths):
            width = 480 * length / longest
            parts.append(
                f"<rect x='{x:.1f}' y='{y + 3}' width='{width:.1f}' height='16'"
                f" fill='{COLOURS[part]}'><title>{html.escape(names[part])}: {length:.3f} {unit}"
                "</title></rect>"
            )
            x += width
        parts.append(f"<text x='{x + 8:.1f}' y='{y + 15}'>{sum(lengths):.2f} {unit}</text>")
    shown, bottom = legend(list(zip(names, COLOURS)), top=22 * len(rows) + 12)  # noqa: B905
    return (
        f"<svg viewBox='0 0 780 {bottom}' width='780' role='img'>" + "".join(parts) + shown
    ) + "</svg>"
