"""Answers of the trained model through llama.cpp itself, as docs/export.md shows it, where the package xllamacpp is installed."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.chat.assistant import Assistant, Conversation, Sampling
from pipeline.export.llamacpp import write_gguf
from pipeline.export.proof import heldout_rows
from pipeline.export.source import Source
from pipeline.params.schema import Dataset

ROOT = Path(__file__).parents[2]
TRAINED = ROOT / "models/sft"


def server(folder: Path) -> Any:
    """llama.cpp's own server in this process, in float32 on one thread."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = str(folder / "model.gguf"), str(folder / "mmproj.gguf")
    params.n_ctx, params.n_parallel, params.warmup, params.mmproj_use_gpu, params.verbosity = 512, 1, False, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(params)


def answer(llama: Any, picture: bytes, question: str) -> str:
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": f"\n{question}"}]
    done = llama.handle_chat_completions({"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 16})
    content = done if isinstance(done, dict) else json.loads(done)
    return str(content["choices"][0]["message"]["content"]).strip()


@pytest.mark.slow
@pytest.mark.skipif(not (TRAINED / "glance.json").is_file(), reason="no trained model here: dvc repro")
def test_llama_cpp_answers_200_heldout_questions_as_chat_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    write_gguf(Source.open(TRAINED), tmp_path, dtype="float32")
    llama, assistant = server(tmp_path), Assistant(TRAINED, device="cpu")
    rows = heldout_rows(Dataset(records="data/easyvqa/questions_heldout.jsonl", images="data/easyvqa/images.zip"), 200)
    assert len(rows) == 200
    different = []
    for row in rows:
        (tmp_path / "picture.png").write_bytes(row.pictures[0])
        talk = Conversation()
        assistant.ask(talk, row.question, assistant.look(tmp_path / "picture.png"))
        own = "".join(assistant.answer(talk, Sampling(max_new_tokens=16))).strip()
        if (said := answer(llama, row.pictures[0], row.question)) != own:
            different.append((row.question, said, own))
    assert not different
