"""Figures of a finished run, and one page that shows them without anything from a network."""

import base64
import html
import io
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence

# The job distributed sees this folder alone as /code, and all of jobs/ where every job does.
sys.path.extend([str(Path(__file__).resolve().parent.parent / "common"), "/toolkit/jobs/common"])

import charts
import numpy as np
from PIL import Image

#: How many misclassified images the page shows; metrics.json lists all of them.
SHOWN = 48

#: Phases in the order in which they are shown, and what each is.
PHASES = {
    "import": "importing torch and MONAI (the images are decoded meanwhile)",
    "read": "reading and listing the data",
    "decode": "decoding the images, as far as the imports did not hide it",
    "transfer": "copying all images to the device",
    "input": "gathering, scaling and augmenting batches on the device",
    "train": "forward, backward and optimizer",
    "validation": "evaluating the validation split after each epoch",
    "test": "evaluating the test split",
    "checkpoint": "writing checkpoints",
    "other": "everything else",
}

# Figures


def loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean cross-entropy in nats of probabilities, (n, classes)."""
    right = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(np.maximum(right, 1e-12)).mean())


def figures(
    probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> Dict[str, Any]:
    """Return accuracy, loss, figures of each class and the confusion matrix.

    Parameters
    ----------
    probabilities : numpy.ndarray
        (n, classes).
    labels : numpy.ndarray
        (n,), what is right.
    classes : sequence of str
        Names, by label.

    Returns
    -------
    dict
        ``confusion`` has a row for each true class and a column for each predicted one. A figure
        that is not defined, such as the precision of a class that was never predicted, is None.
    """
    count = len(classes)
    predicted = probabilities.argmax(1)
    confusion = np.bincount(labels * count + predicted, minlength=count**2).reshape(count, count)
    rows = []
    for index, name in enumerate(classes):
        hit = int(confusion[index, index])
        support, called = int(confusion[index].sum()), int(confusion[:, index].sum())
        rows.append(
            {
                "class": name,
                "support": support,
                "precision": hit / called if called else None,
                "recall": hit / support if support else None,
                "f1": 2 * hit / (support + called) if support + called else None,
            }
        )
    return {
        "images": len(labels),
        "accuracy": float((predicted == labels).mean()),
        "loss": loss(probabilities, labels),
        "classes": rows,
        "confusion": confusion.tolist(),
    }


def misclassified(
    probabilities: np.ndarray, labels: np.ndarray, names: Sequence[str], classes: Sequence[str]
) -> List[Dict[str, Any]]:
    """Return the images that are taken for another class, the surest mistake first."""
    predicted = probabilities.argmax(1)
    wrong = np.flatnonzero(predicted != labels)
    sure = probabilities[wrong, predicted[wrong]]
    return [
        {
            "file": names[index],
            "class": classes[labels[index]],
            "predicted": classes[predicted[index]],
            "probability": float(probabilities[index, predicted[index]]),
        }
        for index in wrong[np.argsort(-sure, kind="stable")]
    ]


def spent(seconds: Dict[str, float], total: float) -> Dict[str, float]:
    """Return seconds by phase with what is left as "other", and the total.

    Decoding runs beside the imports, so "read", "import" and the rest add up.
    """
    known = {name: round(seconds.get(name, 0.0), 4) for name in PHASES if name != "other"}
    other = max(total - sum(known.values()), 0.0)
    return {**known, "other": round(other, 4), "total": round(total, 4)}


# The page


def page(metrics: Dict[str, Any], pixels: Dict[str, np.ndarray]) -> str:
    """Return the report as one HTML document with everything in it.

    Parameters
    ----------
    metrics : dict
        What metrics.json holds.
    pixels : dict
        uint8 images, (height, width), by file, of the first misclassified.
    """
    test, split = metrics["test"], metrics["data"]
    settings, losses = metrics["settings"], metrics["losses"]
    epochs = metrics["epochs"]
    per_epoch = len(losses) / max(len(epochs), 1)
    facts = {
        "test accuracy": f"{test['accuracy']:.4f} of {test['images']} images",
        "network": f"{metrics['network']}, {settings['epochs']} epochs of batches of"
        f" {settings['batch']}, {settings['optimizer']}, learning rate {settings['rate']:g}"
        f" ({settings['schedule']}), {'with' if settings['augment'] else 'without'} augmentation,"
        f" {settings['precision']}, seed {settings['seed']}",
        "device": f"{metrics['device']['name']} ({metrics['processes']} processes)",
        "data": f"{split['images']} images: {split['train']} for training, {split['validation']}"
        f" for validation, {split['test']} for test; listing {split['listing'][:16]}",
        "versions": ", ".join(f"{name} {what}" for name, what in metrics["versions"].items()),
        "time": f"{metrics['seconds']['total']:.1f} s in {metrics['runs']} run(s), first step after"
        f" {metrics['first_step_seconds']:.1f} s",
    }
    parts = [
        charts.head("MedNIST", f"MedNIST: test accuracy {test['accuracy']:.4f}"),
        charts.facts(facts),
        "<h2>Loss</h2>",
        charts.lines(
            [
                ("training, each step", list(enumerate(losses, 1))),
                (
                    "validation",
                    [(row["epoch"] * per_epoch, row["validation_loss"]) for row in epochs],
                ),
            ],
            across="step",
        ),
        "<h2>Accuracy</h2>",
        charts.lines(
            [
                ("training", [(row["epoch"], row["train_accuracy"]) for row in epochs]),
                ("validation", [(row["epoch"], row["validation_accuracy"]) for row in epochs]),
            ],
            across="epoch",
        ),
        "<h2>Classes of the test split</h2>",
        charts.table(
            ["class", "images", "precision", "recall", "F1"],
            [
                [
                    row["class"],
                    row["support"],
                    *map(charts.four, (row["precision"], row["recall"], row["f1"])),
                ]
                for row in test["classes"]
            ],
        ),
        "<h2>Confusion matrix</h2>",
        matrix(test["confusion"], split["classes"]),
        f"<h2>Misclassified: {len(metrics['misclassified'])} of {test['images']}</h2>",
        gallery(metrics["misclassified"][:SHOWN], pixels),
        "<h2>Where the time went</h2>",
        times(metrics["seconds"]),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def matrix(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """Return the confusion matrix as SVG, shaded by the share of each true class."""
    cell, side = 84, 110
    size = cell * len(classes)
    parts = [
        f"<svg viewBox='0 0 {size + side} {size + 50}' width='{size + side}' role='img'>"
        f"<text x='{side + size / 2}' y='14' text-anchor='middle'>predicted</text>"
    ]
    for index, name in enumerate(classes):
        centre = side + cell * (index + 0.5)
        parts.append(
            f"<text x='{centre}' y='36' text-anchor='middle'>{html.escape(name)}</text>"
            f"<text x='{side - 8}' y='{44 + cell * (index + 0.5) + 4}' text-anchor='end'>"
            f"{html.escape(name)}</text>"
        )
    for down, row in enumerate(confusion):
        for over, count in enumerate(row):
            share = count / max(sum(row), 1)
            ink = "#fff" if share > 0.5 else "#222"
            x, y = side + cell * over, 44 + cell * down
            parts.append(
                f"<rect x='{x}' y='{y}' width='{cell}' height='{cell}' fill='{charts.COLOURS[0]}'"
                f" fill-opacity='{share:.3f}' stroke='#ccc'/>"
                f"<text x='{x + cell / 2}' y='{y + cell / 2 + 4}' text-anchor='middle'"
                f" style='fill:{ink}'>{count}</text>"
            )
    return "".join([*parts, "</svg>"])


def gallery(wrong: Sequence[Dict[str, Any]], pixels: Dict[str, np.ndarray]) -> str:
    """Return misclassified images, each with what it is and what it was taken for."""
    if not wrong:
        return "<p>None.</p>"
    parts = []
    for each in wrong:
        stream = io.BytesIO()
        Image.fromarray(pixels[each["file"]]).save(stream, "PNG", optimize=True)
        source = base64.b64encode(stream.getvalue()).decode()
        text = f"{each['class']}, taken for {each['predicted']} ({each['probability']:.2f})"
        parts.append(
            f"<figure><img alt='' src='data:image/png;base64,{source}'><figcaption>"
            f"{html.escape(text)}<br>{html.escape(each['file'])}</figcaption></figure>"
        )
    return "".join(parts)


def times(seconds: Dict[str, float]) -> str:
    """Return the phases as bars in SVG."""
    longest = max(*(seconds[name] for name in PHASES), 1e-9)
    parts = [f"<svg viewBox='0 0 860 {26 * len(PHASES)}' width='860' role='img'>"]
    for number, (name, what) in enumerate(PHASES.items()):
        y, width = 26 * number, 200 * seconds[name] / longest
        share = 100 * seconds[name] / max(seconds["total"], 1e-9)
        parts.append(
            f"<text x='74' y='{y + 16}' text-anchor='end'>{name}</text>"
            f"<rect x='80' y='{y + 4}' width='{max(width, 0.5):.1f}' height='16'"
            f" fill='{charts.COLOURS[0]}'><title>{html.escape(what)}</title></rect>"
            f"<text x='{86 + width:.1f}' y='{y + 16}'>{seconds[name]:.2f} s, {share:.1f} %:"
            f" {html.escape(what)}</text>"
        )
    return "".join([*parts, "</svg>"])
