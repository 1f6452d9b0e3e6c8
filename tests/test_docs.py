"""What the pages name is there: files, folders, links, modules to run and parameters to set."""

import importlib.util
import re
from pathlib import Path

import pytest

from pipeline.params.schema import keys_of

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("data/*.md")])
OURS = ("pipeline/", "stages/", "tests/", "benchmarks/", "docs/", ".dvc/plots/")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


@pages
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`([\w./-]+?)(?::\w+)?`", page.read_text(encoding="utf-8"))
    paths = {name for name in named if name.startswith(OURS)} | {
        path
        for path in re.findall(r"[\w./-]+/[\w./-]+\.(?:py|svg|json)\b", page.read_text(encoding="utf-8"))
        if path.startswith(OURS)
    }
    placeholders = {path for path in paths if "NAME" in path or "models/" in path}
    assert [path for path in sorted(paths - placeholders) if not (ROOT / path).exists()] == []


@pages
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pages
def test_modules_that_a_page_runs_can_be_run(page: Path) -> None:
    for module in set(re.findall(r"python -m ((?:pipeline|stages|benchmarks)[\w.]*)", page.read_text(encoding="utf-8"))):
        found = importlib.util.find_spec(module)
        assert found is not None, module
        if found.submodule_search_locations is not None:
            assert importlib.util.find_spec(f"{module}.__main__") is not None, module


@pages
def test_parameters_that_a_page_sets_exist(page: Path) -> None:
    known = set(keys_of())
    set_by = re.findall(r"-S '?([a-z_]+\.[\w.]+)=", page.read_text(encoding="utf-8"))
    named = re.findall(
        r"`(?:vision|llm|tokenize|projector|pretrain|sft|evaluate|runtime)\.[a-z_]+", page.read_text(encoding="utf-8")
    )
    wrong = {key for key in (*set_by, *(name.strip("`") for name in named)) if key not in known}
    assert not {key for key in wrong if not key.endswith(("_", ".py", ".safetensors"))}  # stems of names, and files
