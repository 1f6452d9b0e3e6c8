"""The figures of one stage as the page's first screen tells them, and what is to be said about them."""

from collections.abc import Iterator
from typing import Any

from pipeline.report.experiment import Experiment

FEW = 100  # questions below which a figure says little
NAMES = {
    "exact": "exact match", "vqa": "VQA match", "contains": "reference in the answer", "token_f1": "word F1", "anls": "ANLS",
    "rouge_l": "ROUGE-L", "cider": "CIDEr", "yes_no": "yes/no F1", "choice": "multiple choice",
}  # fmt: skip


def figures_of(run: Experiment, stage: str, label: str) -> dict[str, Any]:
    """Accuracy with its interval, blind beside it, other metrics and warnings; texts. `accuracy` is empty where there is none."""
    metrics, scores = run.metrics[stage], run.scores[stage]
    told = {name: value for name, value in (scores.get("metrics") or {}).items() if isinstance(value, dict)}
    spread = told.get("exact") or scores.get("exact") or {"low": metrics.get("accuracy_low"), "high": metrics.get("accuracy_high")}
    others = [
        f"{_name(name)} {_value(name, value.get('mean'))}{_beside(name, value)}"
        for name, value in sorted(told.items())
        if name != "exact" and value.get("mean") is not None
    ]
    others += [f"loss {metrics['loss']:.4f}"] if isinstance(metrics.get("loss"), float) else []
    others += [f"perplexity {scores['perplexity']:.3f}"] if isinstance(scores.get("perplexity"), float) else []
    questions = metrics.get("questions")
    return {
        "label": label,
        "accuracy": _share(metrics.get("accuracy")),
        "spread": _spread(spread),
        "blind": _share(metrics.get("accuracy_blind")),
        "questions": f"{questions:,}" if isinstance(questions, int) else "",
        "others": others,
        "warnings": list(_warnings(stage, metrics, scores)),
    }


def _name(metric: str) -> str:
    return NAMES.get(metric, metric)


def metric_of(scores: dict[str, dict[str, Any]]) -> str:
    """What groups are compared by, in words; several runs whose answers are compared by different ones have all of them."""
    return " / ".join(dict.fromkeys(_name(str(found.get("by", "exact"))) for found in scores.values()))


def _value(name: str, value: Any) -> str:
    return f"{value:.3f}" if name == "cider" and isinstance(value, int | float) else _share(value)


def _beside(name: str, value: dict[str, Any]) -> str:
    """The interval and blind."""
    low, high, blind = (_value(name, value.get(key)) for key in ("low", "high", "blind"))
    said = [f"{low} to {high}"] * bool(low and high) + [f"blind {blind}"] * bool(blind)
    said += [f"{value['yes_share']:.0%} yes of {value['yes_share_reference']:.0%}"] if "yes_share" in value else []
    return f" ({', '.join(said)})" if said else ""


def _share(value: Any) -> str:
    return f"{value:.2%}" if isinstance(value, int | float) else ""


def _spread(value: dict[str, Any]) -> str:
    low, high = value.get("low"), value.get("high")
    return f" ({low:.2%} to {high:.2%})" if isinstance(low, int | float) and isinstance(high, int | float) else ""


def _warnings(stage: str, metrics: dict[str, Any], scores: dict[str, Any]) -> Iterator[str]:
    """What the stage itself has said first; the same by its figures alone where it has kept no answers."""
    if not metrics:
        yield "no figures: the stage has not run"
        return
    if metrics.get("diverged"):
        yield f"the run has diverged and left no model: lower {stage}.lr"
    if "warnings" in scores:
        yield from map(str, scores["warnings"])
        return
    questions, accuracy, blind = (metrics.get(key) for key in ("questions", "accuracy", "accuracy_blind"))
    if isinstance(questions, int) and questions < FEW:
        yield f"only {questions} questions: differences of some points are chance"
    if isinstance(accuracy, int | float) and isinstance(blind, int | float) and accuracy <= blind:
        yield "not better than blind: by these questions the model makes no use of its pictures"
    yield "answers were not kept, so there is no interval and no gallery: run the stage again"


def groups_of(scores: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The metric that `by` names, by question type, turn or source: name, questions, mean, low, high, blind."""
    found = scores.get(kind) or {}
    order = sorted(found, key=lambda name: (name == "other", -found[name].get("questions", 0), name))
    if kind == "turns":
        order = sorted(found, key=int)
    return [
        {
            "name": f"turn {int(name) + 1}" if kind == "turns" else name or "(no words)",
            "questions": found[name].get("questions", 0),
            **{key: found[name].get(key, 0.0) for key in ("mean", "low", "high", "blind")},
        }
        for name in order
    ]
