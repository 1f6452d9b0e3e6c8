"""Talk about pictures in a browser: `python -m pipeline.web`, a page that only this machine can open.

Reads models/sft (or --model), as `pipeline.chat` does, and offers the models beside it. The page is Gradio's (the extra `web`).
What people bring lies in a folder of its own until they close their page, and is gone when this ends.
"""

import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.chat.guard import MAX_UPLOAD, Guard
from pipeline.chat.options import Device, MaxTokens, Model, Seed, Temperature, TopP, require_model
from pipeline.core import PipelineError, exit_on_error, in_project

if TYPE_CHECKING:
    from pipeline.chat.visitors import Visitors

HOST = "127.0.0.1"  # whoever can open the page can use this machine's model
EXPERIMENTS = Path(".dvc/tmp/exps")


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
    door = _door(port)
    with tempfile.TemporaryDirectory(prefix="glance-page-") as folder:
        gradio = load_gradio(Path(folder))
        import uvicorn

        from pipeline.chat.assistant import Assistant, Sampling
        from pipeline.chat.visitors import Models, Visitors
        from pipeline.core import quiet_libraries

        quiet_libraries()
        models = Models(find_models(model), lambda chosen: Assistant(chosen, device=device))
        models.get(str(model))
        app = build_app(gradio, Visitors(models, Path(folder)), Sampling(*drawn))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        print(f"http://{HOST}:{door.getsockname()[1]}   (Ctrl-C ends it)", flush=True)
        try:
            server.run(sockets=[door])
        except KeyboardInterrupt:  # as it was asked to end
            print(file=sys.stderr)


def load_gradio(folder: Path) -> Any:
    """Gradio, with its files in `folder`; raises `PipelineError` without the extra."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder)}
    try:
        import gradio
    except ImportError:
        raise PipelineError("the page needs Gradio", remedy="pip install -c constraints.txt -e '.[web]'") from None
    return gradio


def build_app(gradio: Any, visitors: "Visitors", sampling: Any) -> Any:
    """The application, guarded."""
    from fastapi import FastAPI

    from pipeline.chat.page import CSS, build

    page = build(gradio, visitors, sampling)
    visitors.keep_files()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard)
    return gradio.mount_gradio_app(
        app,
        page,
        path="",
        server_name=HOST,
        footer_links=[],
        show_error=False,
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,
        css=CSS,
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )


def find_models(chosen: Path) -> list[Path]:
    """The model that was asked for, those beside it, and those of experiments that run in folders of their own."""
    beside = [path.parent for path in chosen.parent.glob("*/glance.json")]
    experiments = [path.parent for path in EXPERIMENTS.glob("*/models/*/glance.json")] if EXPERIMENTS.is_dir() else []
    return list(dict.fromkeys([chosen, *sorted(beside), *sorted(experiments)]))


def _door(port: int) -> socket.socket:
    """The port, taken before a model is loaded."""
    door = socket.socket()
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((HOST, port))
    except OSError:
        raise PipelineError(f"port {port} is taken", remedy="give another --port") from None
    return door
