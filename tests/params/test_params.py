"""params.yaml: every shipped file parses, every wrong key or value is one line that names it, no stage reads undeclared keys."""

import copy
import math
import re
import sys
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from ruamel.yaml import YAML

from pipeline.core.errors import PipelineError
from pipeline.params import __main__ as params_module
from pipeline.params.reading import check, load, override, read_yaml
from pipeline.params.schema import Params, keys_of
from pipeline.params.stage_view import StageParams, load_for_stage

ROOT = Path(__file__).parents[2]
SHIPPED = [ROOT / "params.yaml", *sorted((ROOT / "docs" / "params").rglob("*.yaml"))]
CONTENT = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())


def value_of(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content[part] if isinstance(content, dict) else getattr(content, part)
    return content


def is_given(key: str) -> bool:
    try:
        value_of(CONTENT, key)
    except KeyError:
        return False
    return True


KEYS = [key for key in keys_of() if is_given(key)]  # the rest are for data that do not speak for themselves
SECTIONS = [key for key in KEYS if isinstance(value_of(CONTENT, key), dict)]
LEAVES = [key for key in KEYS if key not in SECTIONS]


def type_of(key: str) -> type:
    """int, float, bool, str or list: what the schema asks for."""
    section: Any = Params
    *sections, name = key.split(".")
    for part in sections:
        section = section.model_fields[part].annotation
    kind = section.model_fields[name].annotation
    if any(get_origin(each) is list for each in get_args(kind)):  # a value, or a list of one for each encoder
        kind = get_args(kind)[0]
    return list if get_origin(kind) is list else kind if kind in (int, float, bool) else str


WRONG: dict[type, list[Any]] = {
    int: [True, "1", "fast", 1.5, None, [1], {}, -7, math.nan],
    float: [True, "1", "1e-5", "fast", None, [1.0], {}, -0.5, math.nan, math.inf],
    str: [True, 1, 1.5, None, ["a"], {}],
    bool: [1, 0, "yes", "true", None, [True], {}],
    list: [True, 1, "a", None, [], [""], [1], {}],
}


def changed(key: str, value: Any) -> dict[str, Any]:
    content = copy.deepcopy(CONTENT)
    *sections, name = key.split(".")
    target = value_of(content, ".".join(sections)) if sections else content
    target[name] = value
    return content


def renamed(key: str, name: str) -> dict[str, Any]:
    """The same content with the last part of one key spelt otherwise."""
    content = copy.deepcopy(CONTENT)
    *sections, old = key.split(".")
    target = value_of(content, ".".join(sections)) if sections else content
    target[name] = target.pop(old)
    return content


def complaint(content: Any) -> str:
    with pytest.raises(PipelineError) as caught:
        check(content, where="params.yaml")
    line = caught.value.line()
    assert line.startswith("params.yaml: ")
    assert len(line.splitlines()) == 1
    assert len(line) < 300
    return line


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_file_parses_and_gives_every_key_its_value(path: Path) -> None:
    found, content = load(path), read_yaml(path)
    for key in LEAVES:
        assert value_of(found, key) == value_of(content, key)
        assert type(value_of(found, key)) in (type(value_of(content, key)), float)


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_named(key: str) -> None:
    content = renamed(key, "gone")
    section = key.rpartition(".")[0]
    del (value_of(content, section) if section else content)["gone"]
    assert f"key {key} is missing" in complaint(content)


@pytest.mark.parametrize("key", KEYS)
def test_a_misspelt_key_is_named_with_the_right_one(key: str) -> None:
    name = key.split(".")[-1]
    wrong = name[: len(name) // 2] + name[len(name) // 2 + 1 :] + "x"
    prefix = key[: -len(name)]
    line = complaint(renamed(key, wrong))
    assert f"unknown key {prefix}{wrong}" in line
    assert line.endswith(f"did you mean {key}?")


@pytest.mark.parametrize("section", ["", *SECTIONS])
def test_a_key_like_no_other_is_named(section: str) -> None:
    key = f"{section}.zzzzzz" if section else "zzzzzz"
    assert f"unknown key {key}" in complaint(changed(key, 1))


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in LEAVES for value in WRONG[type_of(key)]])
def test_a_value_of_the_wrong_type_or_range_is_named(key: str, value: Any) -> None:
    if key == "vision.layer" and value == -7:
        return  # layers count from the end
    if key.endswith(".share_images") and value is True:
        return  # true, false or auto
    if key in ("runtime.workers", "runtime.extract_batch") and value == 1 and value is not True:
        return  # a number or auto
    assert f": {key}" in complaint(changed(key, value))


@pytest.mark.parametrize("key", ["runtime.workers", "runtime.extract_batch"])
@pytest.mark.parametrize("value", [-1, 1.5, True, None, "many"])
def test_what_may_be_auto_is_auto_or_a_number(key: str, value: Any) -> None:
    assert f"{key}: expected a number of at least {int(key.endswith('batch'))}, or auto" in complaint(changed(key, value))
    for right in ("auto", 1, 64):
        check(changed(key, right), where="params.yaml")


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("value", [None, 1, "x", []])
def test_a_section_that_is_no_section_is_named(section: str, value: Any) -> None:
    assert f": {section}" in complaint(changed(section, value))


CHOICES = {
    "vision.precision": ["float64", "Auto", ""], "tokenize.too_long": ["truncate"], "projector.kind": ["MLP", "resampler"],
    "pretrain.train": ["none", "llm"], "sft.train": ["projector+", "lora"], "pretrain.features": ["cached"],
    "sft.precision": ["fp16"], "runtime.device": ["gpu", "cuda:", "cuda:x", "cpu:0", ""], "vision.model": [""],
    "data.sft.images": [""], "llm.image_token": [""], "llm.date": ["tomorrow", 20240726],
    "pretrain.lr": [0.0, 1.5], "sft.warmup": [1.01], "sft.clip_norm": [0.0],
    "sft.epochs": [0], "runtime.eval_batch": [0], "vision.shard_rows": [0], "pretrain.seed": [-1], "data.limit": [-1],
    "sft.share_images": [1, 0, "yes", "true", "Auto"],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in CHOICES.items() for value in values])
def test_a_value_that_is_no_choice_or_out_of_range_is_named(key: str, value: Any) -> None:
    line = complaint(changed(key, value))
    assert f": {key}: expected" in line or f": {key}: String should" in line
    assert repr(value) in line


def test_float16_on_a_cpu_is_refused_before_any_stage() -> None:
    content = changed("vision.precision", "float16")
    content["runtime"]["device"] = "cpu"
    assert "float16 needs a GPU" in complaint(content)


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-05", "0.00001", "1e-05"])
def test_every_spelling_of_a_number_is_that_number(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(re.sub(r"(?m)^  lr: .*$", f"  lr: {text}", (ROOT / "params.yaml").read_text()))
    found = load(path).pretrain.lr
    assert (found, type(found)) == (1e-5, float)
    content = copy.deepcopy(CONTENT)
    override(content, [f"pretrain.lr={text}"])
    assert check(content, where="x").pretrain.lr == 1e-5


def test_a_whole_number_is_a_float_where_a_float_is_meant() -> None:
    assert check(changed("pretrain.lr", 1), where="x").pretrain.lr == 1.0


def test_params_cannot_be_changed() -> None:
    found = load(ROOT / "params.yaml")
    with pytest.raises(ValidationError):
        found.pretrain.lr = 1.0  # type: ignore[misc]


BROKEN = {
    "a key twice": ("a: 1\nb: 2\na: 3\n", ":3:1: "),
    "a key twice in a section": ("data:\n  limit: 0\n  limit: 1\n", ":3:3: "),
    "no YAML": ("a: [1,\n", ":2:1: "),
    "a tab": ("a:\n\tb: 1\n", ":2:1: "),
    "a list": ("- 1\n", ": expected sections"),
    "nothing": ("", ": expected sections"),
    "an impossible date": ("a: 2024-13-45\n", ""),
    "a program": ("a: !!python/object/apply:os.getcwd []\n", ""),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_one_line_with_line_and_column(tmp_path: Path, kind: str) -> None:
    text, spot = BROKEN[kind]
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(PipelineError) as caught:
        load(path)
    assert caught.value.line().startswith(f"{path}{spot}")
    assert len(caught.value.line().splitlines()) == 1


def test_a_missing_file_says_where_to_run(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="root folder"):
        load(tmp_path / "params.yaml")


yaml_like = st.text(st.sampled_from("ab1-.:e{}[],&*!|>%@`'\"#?\n\t 0") | st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=150, deadline=None)
@given(text=yaml_like, key=st.sampled_from(KEYS) | st.text(max_size=5))
def test_any_text_is_a_value_or_an_error(tmp_path_factory: pytest.TempPathFactory, text: str, key: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8")
    for work in (lambda: check(read_yaml(path), where="x"), lambda: override(copy.deepcopy(CONTENT), [f"{key}={text}"])):
        line = ""
        try:
            work()
        except PipelineError as error:
            line = error.line()
        assert len(line.splitlines()) <= 1


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("pretrian.lr=1", "unknown key pretrian.lr -> did you mean pretrain.lr?"),
        ("pretrain.lr=fast", "pretrain.lr: expected a valid number, got 'fast'"),
        ("sft.epochs=1.5", "sft.epochs: expected a valid integer"),
        ("sft.epochs", "expected key=value"),
        ("tokenize=1", "tokenize"),
    ],
)
def test_the_command_checks_a_change_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], assignment: str, said: str
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["params", assignment])
    with pytest.raises(SystemExit) as caught:
        params_module.run_command(params_module.app)
    shown = capsys.readouterr()
    assert caught.value.code == 2
    assert said in shown.err
    assert len(shown.err.splitlines()) == 1
    monkeypatch.setattr(sys, "argv", ["params", "pretrain.lr=1e-4"])
    with pytest.raises(SystemExit) as caught:
        params_module.run_command(params_module.app)
    assert caught.value.code == 0
    assert "all valid" in capsys.readouterr().out


def stage_params(*declared: str) -> StageParams:
    return StageParams(check(CONTENT, where="x"), frozenset(declared), "extract")


@pytest.mark.parametrize("key", LEAVES)
def test_a_stage_reads_what_is_declared_for_it_and_nothing_else(key: str) -> None:
    parts = key.split(".")
    for depth in range(1, len(parts) + 1):
        assert value_of(stage_params(".".join(parts[:depth])), key) == value_of(CONTENT, key)
    others = [other for other in LEAVES if other != key]
    with pytest.raises(PipelineError, match="which is not listed for it") as caught:
        value_of(stage_params(*others), key)
    assert "stages.extract.params" in caught.value.line()
    assert any(f"reads {'.'.join(parts[:depth])}," in caught.value.line() for depth in range(1, len(parts) + 1))


def test_a_section_is_no_way_around_its_declaration() -> None:
    with pytest.raises(PipelineError, match=r"reads data\.sft, which is not listed"):
        _ = stage_params("data.pretrain").data.sft
    with pytest.raises(PipelineError):
        stage_params("data.pretrain").model_dump()
    with pytest.raises(AttributeError):
        _ = stage_params("data").data.nothing


@pytest.mark.parametrize("stage", ["extract", "tokenize", "pretrain", "sft"])
def test_every_stage_of_dvc_yaml_gets_its_params_and_runtime(stage: str) -> None:
    found = load_for_stage(stage, ROOT)
    assert found.runtime.workers == CONTENT["runtime"]["workers"]
    for key in YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"][stage]["params"]:
        assert value_of(found, key) == value_of(Params.model_validate(CONTENT), key)


@pytest.mark.parametrize(
    ("stage", "params", "said"),
    [("extrct", "vision", "no stage extrct.*extract"), ("extract", "vison", "unknown param vison.*did you mean vision")],
)
def test_an_unknown_stage_or_param_in_dvc_yaml_is_an_error(tmp_path: Path, stage: str, params: str, said: str) -> None:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "dvc.yaml").write_text(f"stages:\n  extract:\n    cmd: x\n    params: [{params}]\n")
    with pytest.raises(PipelineError, match=said):
        load_for_stage(stage, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": ["a"]}, "vision.model is a list of 1"),
        ({"model": []}, "vision.model is a list of 0"),
        ({"layer": [-1, -2]}, "vision.layer is a list of 2, but vision.model names one encoder, not a list"),
        ({"model": ["a", "b"], "pool": [1, 2, 1]}, "vision.pool is a list of 3, but vision.model names 2 encoders"),
        ({"model": ["a", "b"], "pool": [1, 5]}, "vision.pool: expected a number from 1 to 4"),
        ({"model": ["a", "a"], "pool": [1, 2]}, "vision.model names a twice with the same layer"),
    ],
)
def test_encoders_that_are_joined_have_a_value_each(changes: dict[str, Any], words: str) -> None:
    content = copy.deepcopy(CONTENT)
    content["vision"] |= changes
    assert words in complaint(content)


def test_each_encoder_has_its_values_and_those_of_all() -> None:
    content = copy.deepcopy(CONTENT)
    content["vision"] |= {"model": ["a", "b"], "layer": [-1, -2], "storage": "int8"}
    members = check(content, where="params.yaml").vision.members
    assert [(each.model, each.layer, each.pool, each.storage) for each in members] == [("a", -1, 1, "int8"), ("b", -2, 1, "int8")]
