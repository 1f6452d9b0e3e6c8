"""The stages and chat on the device, as a person runs them: all four end to end on embedded data, and devices by name."""

from pathlib import Path

import pytest
import torch
from conftest import World
from gpu_device import DEVICE, NEEDS_GPU, ON_GPU, fresh_accelerate, fresh_kernels, needs_gpu  # noqa: F401
from projects import ROOT, Project
from test_chat import run as chat
from test_chat import trained  # noqa: F401

from pipeline.chat.assistant import Assistant, Conversation, Sampling
from pipeline.core.devices import pick_device
from pipeline.core.errors import PipelineError
from pipeline.features.store.store import FeatureStore
from pipeline.params.reading import read_yaml

STAGES = ("extract", "tokenize", "pretrain", "sft")
SMALL = [
    "data.limit=24", "pretrain.epochs=1", "pretrain.batch_size=8", "sft.batch_size=8", "evaluate.limit=4",
    "evaluate.max_new_tokens=3", "runtime.workers=0", "tokenize.max_tokens=128",
]  # fmt: skip


class Embedded(Project):
    """The project's own models and data, params as they are shipped, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "data").mkdir()
        for name in ("easyvqa", "models"):
            (folder / "data" / name).symlink_to(ROOT / "data" / name)
        self.content = read_yaml(ROOT / "params.yaml")


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Embedded:
    monkeypatch.chdir(tmp_path)
    return Embedded(tmp_path)


def stages(project: Project, *names: str) -> dict[str, dict[str, object]]:
    """The figures of each stage; each chooses its device as if in a process of its own."""
    figures = {}
    for name in names:
        with fresh_accelerate():
            figures[name] = project.run(name)
    return figures


@pytest.mark.parametrize("device", ["auto", pytest.param("cuda:0", marks=NEEDS_GPU)])
def test_all_four_stages_run_end_to_end(embedded: Embedded, device: str) -> None:
    """On a few rows; `auto` is the GPU where there is one, and a device may be asked for by its name."""
    embedded.set(*SMALL, f"runtime.device={device}")
    figures = stages(embedded, *STAGES)
    assert figures["extract"]["images"] == len(FeatureStore("data/features"))
    assert figures["tokenize"]["pretrain"]["rows"] == 24
    for name in ("pretrain", "sft"):
        assert figures[name]["steps"] == 3
        assert 0 < figures[name]["loss"] < 20
    assert (Path("models/sft") / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_stage_on_live_features_ends_as_one_on_stored_features(embedded: Embedded, stage: str) -> None:
    """Every byte of the model and of the history."""
    embedded.set(*SMALL, f"runtime.device={DEVICE}")
    stages(embedded, *STAGES[: STAGES.index(stage)])
    found = []
    for which in ("stored", "live"):
        embedded.set(f"{stage}.features={which}")
        stages(embedded, stage)
        files = [*Path(f"models/{stage}").glob("*.safetensors"), *Path(f"results/{stage}").glob("*")]
        found.append({path.name: path.read_bytes() for path in files})
    assert found[0] == found[1]
    assert len(found[0]) >= 2


@needs_gpu
@pytest.mark.slow
def test_the_whole_run_answers_99_percent_of_what_it_never_saw(embedded: Embedded) -> None:
    """Params as shipped, 256 pictures a call of the encoder; without the pictures most answers are wrong."""
    embedded.set("runtime.extract_batch=256", "runtime.workers=8")
    figures = stages(embedded, *STAGES)
    assert figures["sft"]["accuracy"] >= 0.99
    assert figures["pretrain"]["accuracy"] >= 0.85
    assert figures["sft"]["accuracy_blind"] < 0.9
    assert "cuda" in str(pick_device("auto"))


@pytest.mark.parametrize("stage", ["extract", "pretrain", "sft"])
def test_a_device_that_is_not_there_is_refused_in_one_line_by_every_stage(embedded: Embedded, stage: str) -> None:
    embedded.set(*SMALL, "runtime.device=cuda:99")
    with pytest.raises(PipelineError, match=r"runtime\.device is cuda:99, which this machine lacks") as caught:
        stages(embedded, stage)
    assert len(caught.value.line().splitlines()) == 1
    assert sorted(path.name for path in embedded.folder.iterdir() if path.name not in ("data", ".dvc")) == []


@needs_gpu
def test_cards_are_accepted_by_number() -> None:
    for number in range(torch.cuda.device_count()):
        assert pick_device(f"cuda:{number}") == torch.device("cuda", number)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_second_card_trains_where_it_is_asked_for(embedded: Embedded, capsys: pytest.CaptureFixture[str]) -> None:
    embedded.set(*SMALL, "runtime.device=cuda:1")
    stages(embedded, "extract", "tokenize", "pretrain")
    assert "on cuda:1" in capsys.readouterr().out


def test_chat_answers_on_the_device_as_on_a_cpu(trained: Path, world: World) -> None:
    """The greedy answer, word for word, where both compute in float32; drawn ones repeat by their seed."""
    picture, found = world.folder / "images/0.png", []
    for device in ("cpu", str(DEVICE)):
        assistant, talk = Assistant(trained, device=device), Conversation()
        assistant.precision = "float32"
        assistant.ask(talk, "What is this?", assistant.look(picture))
        found.append("".join(assistant.answer(talk, Sampling(max_new_tokens=6))))
    assert found[0] == found[1]
    drawn = []
    for seed in (1, 1, 2, 3):
        talk = Conversation()
        assistant.ask(talk, "What is this?", assistant.look(picture))
        drawn.append("".join(assistant.answer(talk, Sampling(8, temperature=2.0, seed=seed))))
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


@pytest.mark.parametrize("device", ["auto", pytest.param("cuda", marks=NEEDS_GPU), pytest.param("cuda:0", marks=NEEDS_GPU)])
def test_chat_takes_the_device_it_is_given(trained: Path, world: World, device: str) -> None:
    picture = str(world.folder / "images/0.png")
    result = chat(picture, "What is this?", "--model", str(trained), "--max-tokens", "4", "--device", device)
    assert result.exit_code == 0, result.output
    assert (Assistant(trained).device.type == "cuda") == ON_GPU


def test_chat_refuses_a_missing_device_in_one_line(trained: Path, world: World) -> None:
    picture = str(world.folder / "images/0.png")
    result = chat(picture, "What is this?", "--model", str(trained), "--device", "cuda:99")
    assert result.exit_code == 2
    assert "cuda:99, which this machine lacks" in result.stderr
    assert len(result.stderr.splitlines()) == 1
