"""The page that `pipeline.chat.web` serves, in Gradio's parts: a talk, its pictures beside it, examples and settings."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.chat.assistant import Sampling
from pipeline.chat.paths import SUFFIXES
from pipeline.chat.visitors import Exchange, Visitor, Visitors
from pipeline.core import as_line
from pipeline.saliency import GRADIENT, METHODS

QUEUE = 32  # people who may wait for an answer; one more is told so
SAMPLES = Path("data/samples")
EXAMPLES = (
    ("test-7.png", "what color is the shape?"),
    ("test-11.png", "what shape is in the image?"),
    ("test-6.png", "is there a circle?"),
    ("test-87.png", "what color is the shape?"),
)
CSS = """
.gradio-container {max-width: 1200px !important; margin: auto}
footer {display: none !important}
#head h1 {margin-bottom: 0}
#examples button {padding: 2px 8px}
#examples img {height: 44px !important; width: 44px !important}
[class*="message-buttons"] {display: none !important}
#shown {min-height: 220px}
#shown img {object-fit: contain}
@media (max-width: 640px) {#talk {height: 46vh !important} #shown {min-height: 120px; max-height: 34vh}}
"""


def build(gradio: Any, visitors: Visitors, sampling: Sampling) -> Any:
    """The page, not yet served; `sampling` is what its settings begin with."""
    names = visitors.models.names
    with gradio.Blocks(title="Glance", analytics_enabled=False) as page:
        gradio.Markdown("# Glance\nShow a picture and ask about it. Everything stays on this machine.", elem_id="head")
        with gradio.Row():
            with gradio.Column(scale=3, min_width=320):
                talk = gradio.Chatbot(
                    show_label=False,
                    label="Talk",
                    height="52vh",
                    render_markdown=False,
                    buttons=[],
                    feedback_options=None,
                    placeholder="Add a picture with the paper clip, ask, and press Enter",
                    elem_id="talk",
                )
                box = gradio.MultimodalTextbox(
                    show_label=False,
                    label="Question",
                    placeholder="Ask about a picture",
                    file_types=list(SUFFIXES),
                    file_count="multiple",
                    sources=["upload"],
                    autofocus=True,
                    elem_id="box",
                )
                with gradio.Row():
                    stop = gradio.Button("Stop", interactive=False, size="sm", min_width=80, elem_id="stop")
                    retry = gradio.Button("Retry", interactive=False, size="sm", min_width=80, elem_id="retry")
                    new = gradio.Button("New topic", size="sm", min_width=80, elem_id="new")
            with gradio.Column(scale=2, min_width=280):
                shown = gradio.Gallery(
                    label="Pictures", columns=1, object_fit="contain", height=320, buttons=["fullscreen"], elem_id="shown",
                    interactive=False, preview=True,
                )  # fmt: skip
                rows = [[{"text": asked, "files": [str(SAMPLES / name)]}] for name, asked in EXAMPLES if (SAMPLES / name).is_file()]
                if rows:
                    gradio.Examples(rows, [box], label="Examples fill the box", elem_id="examples", api_visibility="private")
                with gradio.Accordion("Where did it look?", open=False, elem_id="looked"):
                    by = gradio.Radio(list(METHODS), value=GRADIENT, show_label=False, label="By")
                    draw = gradio.Button("Draw for the last answer", size="sm", elem_id="draw")
                    said = gradio.Markdown(elem_id="said")
                    sheet = gradio.Image(
                        type="filepath", show_label=False, label="Looked at", interactive=False, visible=False,
                        buttons=["fullscreen", "download"], elem_id="sheet",
                    )  # fmt: skip
                with gradio.Accordion("Settings", open=False, elem_id="settings"):
                    model = gradio.Dropdown(names, value=names[0], label="Model (another one begins a new topic)", filterable=False)
                    longest = gradio.Slider(
                        1, 512, value=min(512, sampling.max_new_tokens), step=1, label="Longest answer, in tokens"
                    )
                    heat = gradio.Slider(
                        0, 2, value=min(2.0, sampling.temperature), step=0.05, label="Temperature (0: the likeliest words)"
                    )
                    share = gradio.Slider(
                        0.05, 1, value=max(0.05, sampling.top_p), step=0.05, label="Draw from the likeliest words up to this share"
                    )
                    seed = gradio.Number(sampling.seed, precision=0, minimum=0, label="Seed")

        parts, settings = [talk, shown, stop, retry], [model, longest, heat, share, seed]

        def view(visitor: Visitor, *, busy: bool) -> list[Any]:
            pictures = [path for exchange in visitor.exchanges if not exchange.failed for path in exchange.pictures]
            return [
                visitor.messages(),
                gradio.update(value=pictures, selected_index=len(pictures) - 1 if pictures else None),
                gradio.update(interactive=busy),
                gradio.update(interactive=not busy and bool(visitor.exchanges)),
            ]

        def answer(page_name: str, exchange: Exchange, chosen: tuple[Any, ...]) -> Iterator[list[Any]]:
            name, longest, heat, share, seed = chosen
            drawn = Sampling(int(longest), float(heat), float(share), int(seed or 0))
            visitor = visitors.get(page_name)
            for _ in visitors.ask(visitor, exchange, name, drawn):
                yield view(visitor, busy=True)
            yield view(visitor, busy=False)

        def ask(asked: dict[str, Any], request: gradio.Request, *chosen: Any) -> Iterator[list[Any]]:
            files, text = asked["files"] or [], (asked["text"] or "").strip()
            if not files and not text:
                yield [gradio.skip(), *view(visitors.get(request.session_hash), busy=False)]
                return
            for parts in answer(request.session_hash, Exchange(list(files), text), chosen):
                yield [None, *parts]

        def again(request: gradio.Request, *chosen: Any) -> Iterator[list[Any]]:
            visitor = visitors.get(request.session_hash)
            if visitor.exchanges:
                last = visitor.exchanges.pop()
                yield from answer(request.session_hash, Exchange(last.pictures, last.question), chosen)

        def forget(request: gradio.Request) -> list[Any]:
            visitor = visitors.get(request.session_hash)
            visitor.stop.set()
            visitor.forget()
            return view(visitor, busy=False)

        def look_back(method: str, request: gradio.Request) -> list[Any]:
            try:
                made = visitors.look_back(visitors.get(request.session_hash), method)
            except Exception as error:
                return [f"⚠ {as_line(error).line()}", gradio.update(visible=False)]
            return [METHODS[method].capitalize(), gradio.update(value=str(made), visible=True)]

        def halt(request: gradio.Request) -> None:
            visitors.get(request.session_hash).stop.set()

        def leave(request: gradio.Request) -> None:
            visitors.leave(request.session_hash)

        hidden = {"show_progress": "hidden", "api_visibility": "private"}
        turns = {"concurrency_id": "answers", "concurrency_limit": 1, **hidden}
        box.submit(ask, [box, *settings], [box, *parts], **turns)
        retry.click(again, settings, parts, **turns)
        draw.click(look_back, [by], [said, sheet], **turns | {"show_progress": "full"})
        stop.click(halt, queue=False, **hidden)
        gradio.on([new.click, talk.clear], forget, None, parts, queue=False, **hidden)
        page.unload(leave)
    page.queue(max_size=QUEUE, api_open=False)
    return page
