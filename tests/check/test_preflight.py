"""The pre-flight: every kind of fault named in one line before anything runs, all of them at once, and a sound project has none."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checked import ROOT, Project, project, require_one_line  # noqa: F401
from conftest import ROWS, row, train_tokenizer
from families import write_family
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig

from pipeline.check.preflight import Finding, machine, preflight
from pipeline.core.errors import PipelineError
from pipeline.params import load
from stages.preflight import run_preflight

pytestmark = pytest.mark.usefixtures("whole")


@pytest.fixture
def whole(project: Project) -> Project:
    """A project with its three data sets and enough steps, whose language model may be changed."""
    for name in ("pretrain", "sft"):
        project.write(name, *ROWS)
    project.write("heldout", row("Is there a square?", "No."))
    project.set(tokenize__max_tokens=400, pretrain__batch_size=1, pretrain__epochs=2, sft__batch_size=1, sft__epochs=2)
    folder = load().llm.model
    shutil.copytree(folder, "llm")
    project.set(llm__model="llm")
    (project.folder / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    return project


def lines(*, note: bool) -> list[str]:
    return [finding.line() for finding in preflight(load()) if finding.note == note]


def one(part: str, *, note: bool = False) -> str:
    """The one line of its kind, which says `part` and has a remedy."""
    found = lines(note=note)
    assert len(found) == 1, found
    assert part in found[0]
    assert " -> " in found[0]
    return found[0]


def put(project: Project, family: str) -> None:
    shutil.rmtree("llm")
    write_family(family, project.folder / "llm", train_tokenizer("embedded"))


def set_config(**values: Any) -> None:
    path = Path("llm/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values), encoding="utf-8")


def test_a_sound_project_has_no_finding() -> None:
    assert preflight(load()) == []
    run_preflight()


QUANTISED: dict[str, Any] = {
    "4 bits": BitsAndBytesConfig(load_in_4bit=True).to_dict(),
    "8 bits": BitsAndBytesConfig(load_in_8bit=True).to_dict(),
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "mxfp4": {"quant_method": "mxfp4"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
}  # fmt: skip


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_model_is_refused_by_name(kind: str) -> None:
    set_config(quantization_config=QUANTISED[kind])
    line = one("llm is quantised (")
    assert kind in line
    assert "dequantise" in line


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("t5", "llm is a t5: an encoder and a decoder"),
        ("bart", "llm is a bart: an encoder and a decoder"),
        ("bert", "a bert lets tokens see later ones"),
        ("electra", "a electra lets tokens see later ones"),
        ("xlnet", "a xlnet lets tokens see later ones"),
    ],
)
def test_what_is_no_causal_language_model_is_refused_by_name(whole: Project, family: str, reason: str) -> None:
    put(whole, family)
    one(reason)


def test_a_family_that_transformers_does_not_know_is_refused() -> None:
    set_config(model_type="nobody_knows")
    assert "cannot load llm" in lines(note=False)[0]


def damage_cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def damage_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def damage_none(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def damage_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_cut, "model.safetensors is cut short"),
        (damage_pointer, "model.safetensors is cut short or no safetensors file"),
        (damage_none, "llm has no weights"),
        (damage_shard, "model-00002-of-00002.safetensors is missing"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(damage: Callable[[Path], None], reason: str) -> None:
    damage(Path("llm"))
    assert any(reason in line for line in lines(note=False))


@pytest.mark.parametrize("section", ["llm", "vision"])
def test_a_folder_that_is_not_there_is_named(whole: Project, section: str) -> None:
    whole.set(**{f"{section}__model": "models/of/mine"})
    assert lines(note=False)[0].startswith(f"{section}.model: there is no folder models/of/mine")


def test_a_folder_that_a_stage_makes_later_is_waited_for(whole: Project) -> None:
    """The stages of another dvc.yaml build the embedded models: changing one must not stop what does not need it."""
    Path("data").mkdir()
    shutil.copy(ROOT / "data/dvc.yaml", "data/dvc.yaml")
    whole.set(llm__model="data/models/llm")
    assert lines(note=False) == []


def test_a_tokenizer_larger_than_the_embedding_is_refused() -> None:
    tokenizer = AutoTokenizer.from_pretrained("llm")
    tokenizer.add_tokens([f"<extra{number}>" for number in range(30)])
    tokenizer.save_pretrained("llm")
    rows = AutoConfig.from_pretrained("llm").vocab_size
    one(f"the tokenizer has 30 tokens without an embedding, first '<extra0>', id {rows} of {rows} rows")


@pytest.mark.parametrize(
    ("token", "task"),
    [("<|im_end|>", "ends turns"), ("<|im_start|>", "is written by the chat template"), ("nowhere", "not a token")],
)
def test_an_image_token_with_another_task_is_refused(whole: Project, token: str, task: str) -> None:
    whole.set(llm__image_token=token)
    one(task)


@pytest.mark.parametrize(
    ("family", "fault"), [("gpt2", True), ("codegen", True), ("opt", True), ("llama", False), ("bloom", False)]
)
def test_rows_longer_than_the_positions(whole: Project, family: str, fault: bool) -> None:
    """A table of positions ends; rotations and ALiBi only get worse."""
    put(whole, family)
    whole.set(tokenize__max_tokens=600)
    about = [finding for finding in preflight(load()) if finding.where == "tokenize.max_tokens"]
    assert [not finding.note for finding in about] == [fault]


def test_an_image_longer_than_a_row_is_refused(whole: Project) -> None:
    whole.set(tokenize__max_tokens=16)
    one("an image takes 16 tokens, a row at most 16")


def test_sharing_that_layers_do_not_allow_is_refused_where_it_is_asked_for(whole: Project) -> None:
    put(whole, "lfm2")
    assert lines(note=False) == []
    whole.set(sft__share_images=True)
    assert one("lfm2 has layers that pass on what a mask hides").startswith("sft.share_images")


@pytest.mark.parametrize(
    ("family", "kind", "reason"), [("gemma2", "mlp", "caps its logits"), ("phi", "mlp", "bias"), ("llama", "mlp3x", "mlp3x")]
)
def test_what_cannot_be_exported_is_said_before_and_stops_nothing(whole: Project, family: str, kind: str, reason: str) -> None:
    put(whole, family)
    whole.set(projector__kind=kind)
    assert lines(note=False) == []
    assert reason in one("no export", note=True)


def test_few_rows_and_few_steps_are_noted(whole: Project) -> None:
    whole.set(pretrain__batch_size=64, sft__batch_size=11, sft__epochs=1)
    found = lines(note=True)
    assert any("pretrain.batch_size: is 64, the data have 11 rows" in line for line in found)
    assert any(line.startswith("pretrain: 2 steps in all") for line in found)
    assert any(line.startswith("sft: 1 step in all") for line in found)
    assert not any("sft.batch_size: is" in line for line in found)


def test_memory_and_disk_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(machine, "memory", lambda _: 1000)
        assert {finding.where for finding in preflight(load()) if finding.note} == {"pretrain", "sft"}
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert all("are free" in line for line in lines(note=False))
    assert lines(note=False)


def git(*arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True, capture_output=True)


def test_inputs_that_nothing_tracks_are_named_with_the_command(whole: Project) -> None:
    git("init", "-q")
    Path(".dvc").mkdir()
    Path("mine").mkdir()
    for name in ("a", "b"):
        shutil.copytree("images", f"mine/{name}")
        shutil.copy("rows.jsonl", f"mine/{name}.jsonl")
    path = Path("params.yaml")
    text = path.read_text()
    for name, here in (("pretrain", "a"), ("sft", "b"), ("heldout", "b")):
        text = text.replace(str(whole.folder / f"{name}.jsonl"), f"mine/{here}.jsonl")
    path.write_text(text)
    Path("mine/b.jsonl.dvc").write_text("outs: []")
    git("add", "llm")
    git("commit", "-qm", "x")
    assert "-> dvc add mine/a.jsonl && git commit" in one("mine/a.jsonl: is tracked by neither git nor DVC", note=True)


def test_rows_within_their_pictures_folder_are_tracked_with_it_and_taken_from_git_first(whole: Project) -> None:
    git("init", "-q")
    Path(".dvc").mkdir()
    shutil.copytree("images", "my photos")
    shutil.copy("rows.jsonl", "my photos/rows.jsonl")
    git("add", "llm", "my photos/rows.jsonl")
    git("commit", "-qm", "x")
    path = Path("params.yaml")
    text = path.read_text().replace(str(whole.folder / "images"), "my photos")
    for name in ("pretrain", "sft", "heldout"):
        text = text.replace(str(whole.folder / f"{name}.jsonl"), "my photos/rows.jsonl")
    path.write_text(text)
    found = [line for line in lines(note=True) if "neither git nor DVC" in line]
    assert len(found) == 1, found
    assert "-> git rm -rq --cached 'my photos' && dvc add 'my photos' && git commit -m 'Track my photos'" in found[0]


def test_a_stage_and_the_check_tell_all_faults_at_once(whole: Project, capsys: pytest.CaptureFixture[str]) -> None:
    set_config(quantization_config=QUANTISED["gptq"])
    whole.set(llm__image_token="<|im_end|>", tokenize__max_tokens=16)
    with pytest.raises(PipelineError) as stopped:
        run_preflight()
    said = [*capsys.readouterr().err.splitlines(), f"error: {stopped.value.line()}"]
    assert [line.removeprefix("error: ") for line in said] == lines(note=False)
    assert len(said) == 3
    run = whole.run()
    require_one_line(run, 2)
    assert all(f"fault: {line}" in run.stdout for line in lines(note=False))


def test_what_has_passed_is_looked_at_again_when_something_changes(
    whole: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_preflight()
    monkeypatch.setattr("pipeline.check.preflight.preflight", lambda _: [Finding("looked", note=True)])
    run_preflight()
    assert capsys.readouterr().out == ""
    whole.set(sft__epochs=3)
    run_preflight()
    assert capsys.readouterr().out == "note: looked\n"
