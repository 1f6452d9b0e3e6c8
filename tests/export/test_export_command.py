"""The export command on the embedded world: it proves what it wrote, and mistakes are one line."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import World, read_records
from test_export import ROOT, save, write

from pipeline.chat.assistant import Assistant, Conversation, Sampling
from pipeline.core.errors import PipelineError
from pipeline.export import check
from pipeline.export.card import commit, lineage
from pipeline.export.marker import check_target
from pipeline.export.proof import HeldOut, heldout_rows
from pipeline.export.publish import check_repository
from pipeline.export.source import Source
from pipeline.features.encoder.encoder import Encoder
from pipeline.params.schema import Dataset
from pipeline.text.builder import PromptBuilder
from pipeline.vlm.model import checkpoint
from pipeline.vlm.model.language_model import hidden_size, load_language_model
from pipeline.vlm.model.projector import build_projector
from pipeline.vlm.model.vlm import VisionLanguageModel


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.export", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded encoder and language model with a projector that has learnt nothing: a model without training."""
    clip, llm = ROOT / "data/models/clip", ROOT / "data/models/llm"
    encoder = Encoder(str(clip), precision="float32", device=torch.device("cpu"), batch=1)
    builder = PromptBuilder(str(llm), image_token="<image>", tokens=encoder.tokens)
    language_model = load_language_model(str(llm))
    torch.manual_seed(5)
    projector = build_projector("mlp", encoder.width, hidden_size(language_model))
    folder = tmp_path_factory.mktemp("embedded") / "model"
    return save(folder, encoder, VisionLanguageModel(projector, language_model), builder, kind="mlp", llm=str(llm))


def same_answers(folder: Path, export: Path, count: int, tmp_path: Path, *, precision: str = "") -> int:
    """How many of `count` held-out questions of the embedded world stock Transformers answers as `pipeline.chat`.

    A model that has learnt nothing is asked in float32: in bfloat16 rounding decides between words that are as likely.
    """
    from pipeline.records.images import ImageRoot

    assistant, root = Assistant(folder, device="cpu"), ImageRoot(ROOT / "data/easyvqa/images.zip")
    assistant.precision = precision or assistant.precision
    model, processor, _ = check.load(export)
    same = 0
    for record in read_records(ROOT / "data/easyvqa/questions_heldout.jsonl", limit=count):
        picture = tmp_path / "picture.png"
        picture.write_bytes(root.read(record.images[0]))
        question, talk = HeldOut(record, []).question, Conversation()
        assistant.ask(talk, question, assistant.look(picture))
        own = "".join(assistant.answer(talk, Sampling(max_new_tokens=16)))
        parts = [{"type": "image", "path": str(picture)}, {"type": "text", "text": question}]
        found = check.answer(model, processor, [{"role": "user", "content": parts}], max_new_tokens=16)
        same += found.strip() == own.strip()
    return same


@pytest.mark.slow
def test_the_command_exports_proves_and_replaces_only_its_own(embedded: Path, tmp_path: Path) -> None:
    done = run(str(embedded), str(tmp_path / "out"), "--rows", "2")
    assert done.returncode == 0, done.stderr
    assert "LlavaForConditionalGeneration" in done.stdout
    card = (tmp_path / "out/README.md").read_text()
    assert commit(ROOT) in card
    assert "pipeline_tag: image-text-to-text" in card
    assert not list(tmp_path.glob(".*"))
    check_target(tmp_path / "out")  # an earlier export may be replaced
    assert same_answers(embedded, tmp_path / "out", 20, tmp_path) == 20


@pytest.mark.slow
def test_stock_transformers_answers_500_heldout_questions_as_chat_does(embedded: Path, tmp_path: Path) -> None:
    trained = ROOT / "models/sft"
    is_trained = (trained / checkpoint.MANIFEST).is_file()
    folder, precision = (trained, "") if is_trained else (embedded, "float32")
    assert same_answers(folder, write(Source.open(folder), tmp_path / "out"), 500, tmp_path, precision=precision) == 500


@pytest.mark.parametrize(
    ("prepare", "arguments", "words"),
    [
        (lambda _: None, ["elsewhere"], "elsewhere: no trained model here"),
        (lambda folder: (folder / "out").write_text("x"), ["models/sft"], "out: is a file -> name a new folder"),
        (lambda folder: (folder / "out/mine").mkdir(parents=True), ["models/sft"], "is not empty and not an earlier export"),
    ],
)
def test_a_wrong_folder_is_one_line(prepare: Callable[[Path], object], arguments: list[str], words: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    done = run(*arguments, str(tmp_path / "out"))
    assert done.returncode in (2, 4)
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("name", "words"), [("me/model", "HF_HUB_OFFLINE=0"), ("a/b/c", "OWNER/NAME")])
def test_an_upload_that_cannot_succeed_is_told_before_the_work(name: str, words: str) -> None:
    with pytest.raises(PipelineError, match=words):
        check_repository(name)


def test_rows_without_pictures_prove_nothing(world: World, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "Yes."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": talk, "images": []}))
    with pytest.raises(PipelineError, match="no row with a picture"):
        heldout_rows(Dataset(records=str(tmp_path / "rows.jsonl"), images=str(world.images.path)), 4)


def test_the_card_follows_a_folder_to_the_stages_that_made_it(tmp_path: Path) -> None:
    stages = {
        "other": {"outs": [{"path": "other"}]},
        "pretrain": {"outs": [{"path": "models/pretrain"}], "params": {"params.yaml": {"pretrain": {"lr": 1}}}},
        "sft": {"deps": [{"path": "models/pretrain"}], "outs": [{"path": "models/sft"}]},
    }
    (tmp_path / "dvc.lock").write_text(json.dumps({"stages": stages}))
    assert list(lineage(tmp_path / "models/sft", tmp_path)) == ["pretrain", "sft"]
    assert lineage(tmp_path / "models/mine", tmp_path) == {}
    assert lineage(tmp_path / "models/sft", tmp_path / "nowhere") == {}
