"""lmms-eval's own prompts, scores and figures for the made rows -> lmms_eval_figures.json, which the tests compare with.

Run where lmms-eval 0.7.3 is installed: python tests/score/lmms_eval_figures.py
"""

import copy
import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import yaml
from made_benchmarks import answers_to, rows_of

FILE = Path(__file__).with_suffix(".json")
# of each task: folder, and what begins the names of its functions
THEIRS = {
    **{name: (name, name) for name in ("gqa", "pope", "mme", "mmstar", "ai2d", "chartqa")},
    "vqav2": ("vqav2", "vqav2_val"),
    "textvqa": ("textvqa", "textvqa_val"),
    "seed": ("seedbench", "seedbench"),
    "scienceqa": ("scienceqa", "scienceqa_img"),
    "mmbench": ("mmbench", "mmbench_en_dev"),
}
PREFIX = {"scienceqa": "sqa", "seed": "seed"}


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def settings(folder: Path, name: str) -> dict[str, Any]:
    """A task's YAML file, with what it includes."""
    path = next(path for path in (folder / name, folder / f"{name}.yaml") if path.exists())
    content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    return {**(settings(folder, content["include"]) if "include" in content else {}), **content}


def figures(name: str) -> dict[str, Any]:
    folder, task = THEIRS[name]
    module = importlib.import_module(f"lmms_eval.tasks.{folder}.{'en_utils' if name == 'mmbench' else 'utils'}")
    package = Path(module.__file__).parent
    prefix = PREFIX.get(name, name)
    rows = rows_of(name)
    said = answers_to(name, rows)
    told = (settings(package, task).get("lmms_eval_specific_kwargs") or {}).get("default")
    text = getattr(module, f"{prefix}_doc_to_text")
    prompts = [text({**row, "image": 1}, told) if told else text({**row, "image": 1}) for row in rows]
    found = {"prompts": hashlib.sha256("\0".join(prompts).encode()).hexdigest()}
    process = getattr(module, f"{prefix}_process_results", None) or getattr(module, f"{prefix}_process_result", None)
    results = [process(copy.deepcopy(row), [answer]) for row, answer in zip(rows, said, strict=True)] if process else []
    if name in ("gqa", "ai2d"):
        from lmms_eval.api.metrics import exact_match_hf_evaluate

        wanted = [row["answer"] for row in rows]
        if name == "ai2d":
            wanted = [module.ai2d_doc_to_target(row, "mcq") for row in rows]
            said = module.MultiChoiceRegexFilter().apply([[answer] for answer in said], rows)
        found["scores"] = [
            float(exact_match_hf_evaluate([answer], [reference], ignore_case=True, ignore_punctuation=True)["exact_match"])
            for answer, reference in zip(said, wanted, strict=True)
        ]
    elif name in ("vqav2", "textvqa", "scienceqa"):
        found["scores"] = [round(result["exact_match"], 9) for result in results]
    elif name == "chartqa":
        found["scores"] = [result["relaxed_overall"] for result in results]
    elif name == "pope":
        parts = [result["pope_accuracy"] for result in results]
        found["scores"] = [part["score"] for part in parts]
        for figure, theirs in {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "f1_score"}.items():
            found[figure] = getattr(module, f"pope_aggregate_{theirs}")(parts)
    elif name == "mme":
        for figure in ("perception", "cognition"):
            parts = [result[f"mme_{figure}_score"] for result in results if f"mme_{figure}_score" in result]
            found[figure] = module.mme_aggregate_results(parts)
        found["scores"] = [next(iter(result.values()))["score"] for result in results]
    elif name == "mmstar":
        found["scores"] = [result["average"]["score"] for result in results]
        found["average"] = module.mmstar_aggregate_results([result["average"] for result in results])
    elif name == "mmbench":
        parts = [result["gpt_eval_score"] for result in results]
        overall, groups, _ = module.mmbench_evaluator.eval_result(parts, eval_method="static")
        found |= {"accuracy": float(overall), "groups": groups}
    else:
        found["scores"] = [float(module.seed_aggregation_result([result["seed_all"]])) for result in results]
        found["accuracy"] = module.seed_aggregation_result([result["seed_all"] for result in results])
    return found


if __name__ == "__main__":
    lines = [f'"{name}": {json.dumps(figures(name), sort_keys=True)}' for name in sorted(THEIRS)]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{FILE}: {len(lines)} tasks")
