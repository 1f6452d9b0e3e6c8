"""The Python and YAML that pages show: Python runs on a tiny project that has trained, YAML is held to the schema."""

import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROWS, World
from PIL import Image
from projects import Project
from ruamel.yaml import YAML
from test_docs import PAGES, ROOT

from pipeline.export.publish import export_model
from pipeline.params.reading import check, read_yaml

NOT_INSTALLED = ("xllamacpp",)  # llama.cpp, which the project does without


def blocks(language: str) -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for number, block in enumerate(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)):
            yield f"{page.relative_to(ROOT)}-{number}", block


YAMLS = dict(blocks("yaml"))


@pytest.mark.slow
def test_python_of_the_pages_runs(
    world: World, png: Callable[[int], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    project = Project(world, tmp_path)
    project.write_pictures(png, ROWS[:3])
    project.run("extract", "tokenize", "pretrain", "sft")
    YAML().dump(project.content, Path("params.yaml"))
    export_model(Path("models/sft"), Path("out"), gguf=False, dtype="float32", rows=2)
    Image.open(project.pictures / "0.png").save("photo.jpg")
    shard = next(Path("data/features").glob("*.h5"))
    ran = 0
    for name, code in blocks("python"):
        if any(module in code and importlib.util.find_spec(module) is None for module in NOT_INSTALLED):
            continue
        exec(compile(code.replace("....h5", shard.name), name, "exec"), {})
        ran += 1
    assert ran >= 3
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_of_the_pages_is_params(name: str) -> None:
    """Sections of params.yaml, or of its `data` where a block is indented."""
    content, shown = read_yaml(ROOT / "params.yaml"), YAML(typ="safe").load(YAMLS[name])
    for section, values in shown.items():
        place = content["data"] if section in content["data"] else content
        assert set(values) <= {*place[section], "mix", "prompt", "format"}, section
        place[section] |= values
    check(content, where=name)
