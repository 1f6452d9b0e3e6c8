"""Curves and intervals as Vega-Lite: what is drawn is said here, and Vega, which `dvc plots show` uses too, draws it."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.core import ARTEFACT, PipelineError

POINTS = 400  # of a curve; a longer one is drawn by the means of as many equal parts
WINDOW = 40  # parts of a curve: the smoothed one is the mean of two of them around each point
Spec = dict[str, Any]
WIDE: Spec = {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
LEGEND: Spec = {"orient": "bottom", "title": None, "columns": 2, "labelLimit": 300, "symbolOpacity": 1, "symbolStrokeWidth": 2}
Curves = Mapping[str, np.ndarray]


def read_curves(data: bytes | None, *, where: str) -> dict[str, np.ndarray]:
    """The columns of a CSV of numbers, float64 [steps]; empty without data. Raises `PipelineError` for anything else."""
    if data is None:
        return {}
    try:
        head, _, rest = data.partition(b"\n")
        names = head.decode("utf-8").rstrip("\r").split(",")
        values = np.empty((0, len(names)))
        if rest.strip():
            values = np.loadtxt(io.BytesIO(rest), delimiter=",", comments=None, ndmin=2)
        if "step" not in names or values.shape[1] != len(names):
            raise ValueError
    except ValueError:
        raise PipelineError("not a table of numbers", where=where, remedy="dvc checkout, else dvc repro", code=ARTEFACT) from None
    return dict(zip(names, values.T, strict=True))


def stage_charts(history: Mapping[str, Curves], heldout: Mapping[str, Curves], names: Sequence[str]) -> list[Spec]:
    """A panel each for training loss, held-out loss, lr, gradient norm and router loss, a colour a run, where there are values.

    Args:
        history, heldout: the curves of each run, by the run's name.
        names: of all runs of the page, so that each has its colour everywhere.
    """
    panels = (
        ("Training loss", history, "loss", True),
        ("Held-out loss", heldout, "loss", False),
        ("Learning rate", history, "lr", False),
        ("Gradient norm", history, "grad_norm", True),
        ("Router loss", history, "router_loss", True),
    )
    made = (_curve(title, curves, column, names, smooth) for title, curves, column, smooth in panels)
    return [spec for spec in made if spec]


def _curve(title: str, runs: Mapping[str, Curves], column: str, names: Sequence[str], smooth: bool) -> Spec | None:
    values = [point for name in names for point in _points(runs.get(name, {}), column, name)]
    if not values:
        return None
    heights = [point["y"] for point in values if point["y"] is not None]
    broad = bool(heights) and min(heights) > 0 and max(heights) > 20 * min(heights) and column != "lr"
    y: Spec = {"field": "y", "type": "quantitative", "title": None, "scale": {"type": "log"} if broad else {"zero": False}}
    y["axis"] = {"tickCount": 5, "format": ".6~g", "labelOverlap": True}
    if broad:
        decades = range(math.floor(math.log10(min(heights))), math.ceil(math.log10(max(heights))) + 1)
        y["axis"]["values"] = [float(f"1e{decade}") for decade in decades]
    tips = [{"field": key, "type": "quantitative", "title": text} for key, text in (("step", "step"), ("y", title.lower()))]
    x = {"field": "step", "type": "quantitative", "title": "step", "axis": {"tickCount": 6, "grid": False}}
    raw: Spec = {"mark": {"type": "line", "opacity": 0.3 if smooth else 1, "tooltip": True}, "encoding": {"y": y, "tooltip": tips}}
    if column == "loss" and not smooth:  # measured now and then
        raw["mark"]["point"] = True
    layer = [raw]
    if smooth:
        side = max(1, min(POINTS, len(values) // len(names)) // WINDOW)
        window = {"window": [{"op": "mean", "field": "y", "as": "mean"}], "frame": [-side, side], "groupby": ["run"]}
        layer.append(
            {
                "transform": [window | {"sort": [{"field": "step"}]}],
                "mark": {"type": "line", "strokeWidth": 2},
                "encoding": {"y": {**y, "field": "mean"}},
            }
        )
    spec: Spec = {
        "title": title + (" (log scale)" if broad else ""),
        **WIDE,
        "height": 170,
        "data": {"values": values},
    }
    return spec | {"encoding": {"x": x, "color": _colour(names)}, "layer": layer}


def _points(curves: Curves, column: str, run: str) -> list[Spec]:
    """At most `POINTS`, each the mean of as many steps; what is not finite is a gap."""
    if column not in curves:
        return []
    steps, heights = curves["step"], curves[column]
    edges = np.unique(np.linspace(0, len(steps), min(POINTS, len(steps)) + 1).astype(np.int64))
    found: list[Spec] = []
    for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        mean = float(heights[first:last].mean())
        height = float(f"{mean:.5g}") if math.isfinite(mean) else None
        found.append({"step": float(f"{steps[first:last].mean():.7g}"), "y": height, "run": run})
    return found


def _colour(names: Sequence[str]) -> Spec:
    legend = None if len(names) < 2 else LEGEND
    return {"field": "run", "type": "nominal", "scale": {"domain": list(names)}, "legend": legend}


def interval_chart(title: str, groups: Sequence[Spec], names: Sequence[str], metric: str = "exact match") -> Spec | None:
    """A metric of groups of questions with its 95 % interval and a tick for blind; `groups`: name, run, mean, low, high, blind."""
    if not groups:
        return None
    order = list(dict.fromkeys(group["name"] for group in groups))
    x = {"type": "quantitative", "scale": {"domain": [0, 1]}, "axis": {"format": "%", "tickCount": 5}, "title": metric}
    spread = {"x": {**x, "field": "low"}, "x2": {"field": "high"}}
    grey = {"value": "#8b95a1"}
    return {
        "title": title,
        **WIDE,
        "height": max(60, len(order) * (14 * len(names) + 8)),
        "data": {"values": list(groups)},
        "encoding": {
            "y": {"field": "name", "type": "nominal", "sort": order, "title": None, "axis": {"labelLimit": 110}},
            "yOffset": {"field": "run", "type": "nominal", "sort": list(names)},
            "color": {**_colour(names), "legend": LEGEND},
        },
        "layer": [
            {"mark": {"type": "rule", "strokeWidth": 2}, "encoding": spread},
            {"mark": {"type": "point", "filled": True, "size": 55, "opacity": 1, "tooltip": {"content": "data"}},
             "encoding": {"x": {**x, "field": "mean"}}},
            {"mark": {"type": "tick", "thickness": 2, "size": 11}, "encoding": {"x": {**x, "field": "blind"}, "color": grey}},
        ],
    }  # fmt: skip
