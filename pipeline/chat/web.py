"""Talk about pictures in a browser: `python -m pipeline.web`, a page that only this machine can open.

Reads models/sft (or --model), as `pipeline.chat` does. The page is Gradio's (the extra `web`). Nothing is kept here: a
conversation is what the page shows, so retrying, undoing and clearing need no code of ours.
"""

import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.chat.options import Device, MaxTokens, Model, Seed, Temperature, TopP, require_model
from pipeline.core import PipelineError, exit_on_error, in_project

if TYPE_CHECKING:
    import torch

    from pipeline.chat.assistant import Assistant, Conversation, Sampling

HOST = "127.0.0.1"  # whoever can open the page can read pictures from this machine


def serve(
    model: Model = Path("models/sft"),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of this machine's loopback address.")] = 7860,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Talk about pictures in a browser."""
    exit_on_error(lambda: _serve(model, port, (max_tokens, temperature, top_p, seed), device))


def _serve(model: Path, port: int, drawn: tuple[int, float, float, int], device: str) -> None:
    model = in_project(model)
    require_model(model)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise PipelineError("the page needs Gradio", remedy="pip install -e '.[web]'") from None
    from pipeline.chat.assistant import Assistant, Sampling
    from pipeline.core import quiet_libraries

    quiet_libraries()
    page = build(gradio, Assistant(model, device=device), Sampling(*drawn), title=f"Glance: {model}")
    try:
        page.launch(server_name=HOST, server_port=port, share=False, quiet=True, prevent_thread_lock=True)
    except OSError:
        raise PipelineError(f"port {port} is taken", remedy="give another --port") from None
    print(f"http://{HOST}:{port}   (Ctrl-C ends it)", flush=True)
    page.block_thread()


def build(gradio: Any, assistant: "Assistant", sampling: "Sampling", *, title: str) -> Any:
    """The page, not yet served."""
    from pipeline.chat.assistant import Conversation

    look = lru_cache(maxsize=64)(assistant.look)  # Gradio names a copy of an upload by its content

    def reply(message: dict[str, Any], history: list[dict[str, Any]]) -> Iterator[str]:
        talk, said = Conversation(), ""
        try:
            content = [*({"path": path} for path in message["files"]), {"text": message["text"]}]
            replay(talk, [*history, {"role": "user", "content": content}], assistant, look)
            for piece in assistant.answer(talk, sampling):
                said += piece
                yield said
        except PipelineError as error:
            raise gradio.Error(error.line()) from None

    box = gradio.MultimodalTextbox(file_types=["image"], file_count="single", placeholder="Show a picture and ask about it")
    return gradio.ChatInterface(reply, multimodal=True, textbox=box, title=title)


def replay(
    talk: "Conversation", history: list[dict[str, Any]], assistant: "Assistant", look: Callable[[str], "torch.Tensor"]
) -> None:
    """Bring a page's messages into a conversation: pictures stand before the words of the turn that shows them."""
    from pipeline.records import Turn

    shown: list[str] = []
    for entry in history:
        pictures, text = _parts(entry["content"])
        shown += pictures
        if entry["role"] == "assistant":
            talk.turns.append(Turn("assistant", (text.strip() or " ",)))
        elif text or entry is history[-1]:
            if len(shown) > 1:
                raise PipelineError(f"{len(shown)} pictures in one turn", remedy="show them one by one")
            assistant.ask(talk, text, look(shown[0]) if shown else None)
            shown = []


def _parts(content: Any) -> tuple[list[str], str]:
    """Paths of pictures and the words of a message, in any of the shapes that Gradio gives it."""
    pictures, words = [], []
    for part in content if isinstance(content, list | tuple) else [content]:
        if isinstance(part, str):
            words.append(part)
        elif "text" in part:
            words.append(part["text"] or "")
        else:
            pictures.append((part.get("file") or part)["path"])
    return pictures, "\n".join(word for word in words if word)
