"""The page for a browser: what it shows is what the model is asked, and nobody but this machine can open it."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HIDDEN, WIDTH, World

from pipeline.chat.assistant import Assistant, Conversation, Sampling
from pipeline.chat.web import HOST, build, replay
from pipeline.core.errors import PipelineError
from pipeline.vlm.model import checkpoint
from pipeline.vlm.model.checkpoint import Manifest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def assistant(world: World) -> Assistant:
    vision = {"model": world.clip.name, "revision": "", "layer": -1, "precision": "auto", "spec": world.clip.spec()}
    llm = {"model": str(world.llm), "revision": "", "image_token": "<image>"}
    manifest = Manifest(vision, llm, {"kind": "mlp", "width": WIDTH, "hidden": HIDDEN}, own_llm=True)
    checkpoint.save(world.folder / "of the page", world.model("all"), manifest, world.builder)
    return Assistant(world.folder / "of the page")


def said(role: str, *content: object) -> dict[str, Any]:
    return {"role": role, "content": list(content)}


def picture(world: World) -> str:
    return str(world.folder / "images" / "1.png")


def test_a_page_s_messages_become_the_conversation_that_chat_would_have(world: World, assistant: Assistant) -> None:
    path = picture(world)
    history = [
        said("user", {"type": "file", "file": {"path": path}}),  # Gradio shows an upload as a message of its own
        said("user", {"type": "text", "text": "What is it?"}),
        said("assistant", {"type": "text", "text": "A circle."}),
        {"role": "user", "content": "And which colour?"},
    ]
    page, plain = Conversation(), Conversation()
    replay(page, history, assistant, assistant.look)
    assistant.ask(plain, "What is it?", assistant.look(path))
    plain.turns.append(page.turns[1])
    assistant.ask(plain, "And which colour?")
    assert page.turns == plain.turns
    assert page.turns[1].role == "assistant"
    assert torch.equal(torch.stack(page.features), torch.stack(plain.features))


def test_a_path_that_a_person_types_stays_text(world: World, assistant: Assistant) -> None:
    talk = Conversation()
    replay(talk, [said("user", {"text": picture(world)})], assistant, assistant.look)
    assert talk.features == []


def test_two_pictures_in_one_turn_are_refused(world: World, assistant: Assistant) -> None:
    shown = {"path": picture(world)}
    with pytest.raises(PipelineError, match="2 pictures in one turn -> show them one by one"):
        replay(Conversation(), [said("user", shown, shown, {"text": "?"})], assistant, assistant.look)


def test_the_page_answers_as_chat_does(world: World, assistant: Assistant) -> None:
    gradio = pytest.importorskip("gradio")
    page, talk, sampling = build(gradio, assistant, Sampling(max_new_tokens=4), title="page"), Conversation(), Sampling(4)
    replies: Iterator[str] = page.fn({"text": "What is it?", "files": [picture(world)]}, [])
    assistant.ask(talk, "What is it?", assistant.look(picture(world)))
    assert list(replies)[-1] == "".join(assistant.answer(talk, sampling))
    with pytest.raises(gradio.Error, match=r"nowhere\.png"):
        list(page.fn({"text": "?", "files": ["nowhere.png"]}, []))


def test_it_is_served_to_this_machine_alone(assistant: Assistant) -> None:
    gradio = pytest.importorskip("gradio")
    page = build(gradio, assistant, Sampling(), title="page")
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    try:
        page.launch(server_name=HOST, server_port=port, share=False, quiet=True, prevent_thread_lock=True)
        with socket.create_connection((HOST, port), timeout=5):
            pass
        listening = Path("/proc/net/tcp").read_text().split("\n")
        assert [line.split()[1] for line in listening[1:] if f":{port:04X} " in line and " 0A " in line] == [f"0100007F:{port:04X}"]
    finally:
        page.close()


def test_without_a_model_it_says_which_command_makes_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.web", "--model", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.strip() == f"error: {tmp_path}: no trained model here -> dvc repro, or --model models/sft"
