"""The report as one HTML file that needs nothing else. Whatever comes from the data is text: no part of it can become markup,
and the page's policy runs no script but its own, by their hashes.
"""

import base64
import hashlib
import json
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.core import ARTEFACT, PipelineError, publish, writing
from pipeline.params import HeldOut, check
from pipeline.report.answers import Answers, Confusion
from pipeline.report.charts import Spec, interval_chart, read_curves, stage_charts
from pipeline.report.experiment import HERE, STAGES, TRAINED, Experiment, committed_params
from pipeline.report.figures import figures_of, groups_of, metric_of
from pipeline.report.gallery import Column, Gallery, build_gallery
from pipeline.report.samples import sample_cards

VEGA = Path(".dvc/plots/offline.html")
MOST = 8  # runs side by side: more than can be told apart
LIBRARIES = ("torch", "transformers", "accelerate", "dvc", "pyarrow")
LABELS = {"pretrain": "after pretrain", "sft": "after SFT"}
Row = dict[str, Any]


def write_report(path: Path, names: Sequence[str], *, look: bool = False) -> int:
    """Write the page of these experiments, or of the work tree where none is named; returns its size in bytes.

    `look`: with heat maps over the gallery's pictures, by the work tree's model.

    Raises `PipelineError` for a run that has no figures, and for one that is not there.
    """
    if len(set(names)) > MOST:
        raise PipelineError(f"{len(set(names))} experiments, at most {MOST} side by side", where="command line")
    runs = [Experiment(name) for name in dict.fromkeys(names)] or [Experiment()]
    for run in runs:
        if not any(run.metrics[stage] for stage in TRAINED):
            where = "metrics" if run.name == HERE else f"metrics of {run.name}"
            raise PipelineError("no figures yet", where=where, remedy="dvc repro", code=ARTEFACT)
    text = _render(runs, look=look)
    with publish(path) as temporary, writing(path):
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # a file's name may have half surrogates
    return path.stat().st_size


def _render(runs: list[Experiment], *, look: bool) -> str:
    charts: dict[str, Spec] = {}
    curves = [{"stage": stage, "panels": _add(charts, _curves(runs, stage))} for stage in TRAINED]
    series = _series(runs)
    kinds = {"types": "Question types", "turns": "Turns", "sources": "Sources"}
    groups = {title: {label: groups_of(scores, kind) for label, scores in series.items()} for kind, title in kinds.items()}
    answered = _answers(runs)
    last = _last(runs, answered)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    gallery = _gallery(runs, answered)
    heat_problem = _add_heat(gallery, runs[0]) if look and gallery else ""
    licence, vega = _vega()
    script = environment.get_template("page.js").render()
    scripts = [*vega, script]
    return environment.get_template("page.html").render(
        runs=[
            {"name": run.name, "commit": run.commit, "stages": [figures_of(run, stage, LABELS[stage]) for stage in TRAINED]}
            for run in runs
        ],
        several=len(runs) > 1,
        curves=[part for part in curves if part["panels"]],
        groups=[_groups(charts, title, found, metric_of(series)) for title, found in groups.items()],
        samples=_samples(runs),
        confusions=[{"label": label, "table": table} for label, table in _confusions(last)],
        gallery=gallery,
        looked=look,
        heat_problem=heat_problem,
        heat=_data([card["heat"] for card in gallery.cards if card["heat"]] if gallery else []),
        costs=_costs(runs),
        params=_params(runs),
        versions=_versions(),
        charts=_data(charts),
        licence=Markup(licence),
        scripts=[Markup(script) for script in scripts],
        policy=" ".join(f"'sha256-{_digest(script)}'" for script in scripts),
    )


def _data(content: Any) -> Markup:
    """As the text of a script that is read and not run."""
    return Markup(json.dumps(content, sort_keys=True).replace("<", "\\u003c"))


def _vega() -> tuple[str, list[str]]:
    """The licence and the scripts of the page that `dvc plots show` fills."""
    try:
        text = VEGA.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    found = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    licence = re.search(r"<!--.*?-->", text, re.DOTALL)
    if not found or licence is None:
        raise PipelineError("the drawing library is not there", where=str(VEGA), remedy=f"git checkout {VEGA}", code=ARTEFACT)
    return licence[0], found


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _add(charts: dict[str, Spec], specs: Sequence[Spec | None]) -> list[str]:
    """Ids of the places that the charts go to."""
    made = []
    for spec in specs:
        if spec is not None:
            made.append(f"chart{len(charts)}")
            charts[made[-1]] = spec
    return made


def _curves(runs: list[Experiment], stage: str) -> list[Spec]:
    history, heldout = (
        {run.name: read_curves(run.read(path), where=f"{path} of {run.name}") for run in runs}
        for path in (f"results/{stage}/history.csv", f"results/{stage}/heldout.csv")
    )
    return stage_charts(history, heldout, [run.name for run in runs])


def _samples(runs: list[Experiment]) -> list[Row]:
    """Of each stage of each run that was asked on the way."""
    found = [(run, stage, sample_cards(run, stage, _heldout(run)[0])) for run in runs for stage in TRAINED]
    return [{"label": stage if len(runs) == 1 else f"{run.name}: {stage}", "cards": cards} for run, stage, cards in found if cards]


def _series(runs: list[Experiment]) -> dict[str, dict[str, Any]]:
    """What is compared: of one run its stages, of several their last stages; each with its scores."""
    if len(runs) == 1:
        return {LABELS[stage]: scores for stage, scores in runs[0].scores.items() if scores}
    return {run.name: scores[-1] for run in runs if (scores := [run.scores[stage] for stage in TRAINED if run.scores[stage]])}


def _groups(charts: dict[str, Spec], title: str, found: dict[str, list[Row]], metric: str) -> Row:
    rows = [row | {"run": label} for label, groups in found.items() for row in groups]
    panels = _add(charts, [interval_chart("", rows, list(found), metric)])
    return {"title": title, "rows": rows, "metric": metric, "panels": panels}


def _answers(runs: list[Experiment]) -> dict[tuple[str, str], Answers]:
    """Of each run and stage that has kept its answers."""
    found = {}
    for run in runs:
        for stage in TRAINED:
            path = f"results/{stage}/predictions.parquet"
            file = run.open(path)
            if file is not None:
                kinds = list(run.scores[stage].get("types") or {})
                found[run.name, stage] = Answers(file, kinds, where=f"{path} of {run.name}")
    return found


def _last(runs: list[Experiment], answered: dict[tuple[str, str], Answers]) -> dict[str, Answers]:
    """Of each run the answers of its last stage, by what the page calls it."""
    found = {}
    for run in runs:
        stages = [stage for stage in TRAINED if (run.name, stage) in answered]
        if stages:
            found[LABELS[stages[-1]] if len(runs) == 1 else run.name] = answered[run.name, stages[-1]]
    return found


def _confusions(last: dict[str, Answers]) -> list[tuple[str, Confusion]]:
    return [(label, answers.confusion()) for label, answers in last.items() if len(answers)]


def _gallery(runs: list[Experiment], answered: dict[tuple[str, str], Answers]) -> Gallery | None:
    """Of the first run's last stage: beside it its own stage before, or the other runs."""
    last = _last(runs, answered)
    if not last:
        return None
    if len(runs) == 1:
        others = {LABELS[stage]: answers for (_, stage), answers in answered.items() if LABELS[stage] not in last}
    else:
        others = dict(list(last.items())[1:])
    label, first = next(iter(last.items()))
    columns = [Column(label, first, np.arange(len(first)))]
    columns += [Column(name, answers, first.matched(answers)) for name, answers in others.items()]
    run = next(run for run in runs if len(runs) == 1 or run.name == label)
    dataset, problem = _heldout(run)
    gallery = build_gallery(columns, dataset, limit=0)
    return gallery if gallery.problem or not problem else Gallery(gallery.cards, gallery.kinds, gallery.flips, problem)


def _add_heat(gallery: Gallery, run: Experiment) -> str:
    """Heat maps into the gallery's cards; returns why some are missing."""
    from pipeline.report.looking import add_heat  # loads a model

    dataset, problem = _heldout(run)
    stage = [stage for stage in TRAINED if Path(f"models/{stage}/glance.json").is_file() and run.scores[stage]]
    if dataset is None or not stage:
        return problem or "no trained model here"
    return add_heat(gallery.cards, dataset, Path(f"models/{stage[-1]}"))


def _heldout(run: Experiment) -> tuple[HeldOut | None, str]:
    """Where the run's held-out pictures are, or why they cannot be shown."""
    try:
        return check(run.sections, where=f"params.yaml of {run.name}").data.heldout, ""
    except PipelineError as error:
        return None, error.line()


def _costs(runs: list[Experiment]) -> list[Row]:
    """Lines of figures, a value a run: what was read, what it cost."""
    rows: list[Row] = []

    def add(name: str, values: list[str]) -> None:
        if any(values):
            rows.append({"name": name, "values": values})

    def figure(stage: str, key: str, form: str) -> list[str]:
        found = [run.metrics[stage].get(key) for run in runs]
        return [form.format(value) if isinstance(value, int | float) else "" for value in found]

    add("commit", [run.commit for run in runs])
    for part in ("pretrain", "sft", "heldout"):
        keys = (f"data.{part}.records", f"data.{part}.images")
        add(f"data.{part}", [" · ".join(str(run.params.get(key, "")) for key in keys) for run in runs])
        found = [run.metrics["tokenize"].get(part) or {} for run in runs]
        add(
            f"rows of {part}",
            [f"{one['rows']:,} ({one['tokens']:,} tokens)" if {"rows", "tokens"} <= set(one) else "" for one in found],
        )
    add("pictures encoded once", figure("extract", "images", "{:,}"))
    add("feature cache", figure("extract", "cache_mb", "{:,.1f} MB"))
    for stage in STAGES:
        add(f"{stage}: time", figure(stage, "seconds", "{:,.1f} s"))
        add(f"{stage}: peak memory", figure(stage, "peak_memory_gb", "{:.2f} GB"))
    for stage in TRAINED:
        add(f"{stage}: steps", figure(stage, "steps", "{:,}"))
        add(f"{stage}: training loss at the end", figure(stage, "train_loss", "{:.4f}"))
    return rows


def _params(runs: list[Experiment]) -> list[Row]:
    """Every key, its value in each run, and whether it is another one than git's last commit has, or than another run's."""
    committed = committed_params()
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run.params):
        values = [run.params.get(key, "") for run in runs]
        changed = [bool(committed) and (key not in committed or value != committed[key]) for value in values]
        before = str(committed[key]) if key in committed else ""
        marked = any(changed) or any(value != values[0] for value in values)
        rows.append({"key": key, "values": list(map(str, values)), "changed": changed, "before": before, "marked": marked})
    return rows


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in ("glance-vlm", *LIBRARIES):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return " · ".join(found)
