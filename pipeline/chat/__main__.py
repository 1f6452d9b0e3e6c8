"""Talk about pictures with a trained model: `python -m pipeline.chat [IMAGE] [QUESTION]`.

Reads models/sft (or --model). With a picture and a question it answers once and ends; otherwise it is a conversation.
Greedy and seeded unless told otherwise.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.chat.options import Device, MaxTokens, Model, Seed, Temperature, TopP, require_model
from pipeline.core import PipelineError, exit_on_error, run_command

if TYPE_CHECKING:  # heavy modules are imported once it is known that there is a model to load
    import torch

    from pipeline.chat.assistant import Assistant, Conversation, Sampling
HELP = """\
  /image PATH   show a picture with your next question
  /reset        forget the conversation
  /help         this list
  /exit         leave (or Ctrl-D)"""


def chat(
    image: Annotated[Path | None, typer.Argument(help="A picture to talk about.")] = None,
    question: Annotated[str | None, typer.Argument(help="Ask this, print the answer and end.")] = None,
    model: Model = Path("models/sft"),
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Talk about pictures with a trained model."""
    exit_on_error(lambda: _chat(image, question, model, (max_tokens, temperature, top_p, seed), device))


def _chat(image: Path | None, question: str | None, model: Path, drawn: tuple[int, float, float, int], device: str) -> None:
    require_model(model)
    if image is not None and not image.is_file():
        raise PipelineError("no such picture", where=str(image))
    from pipeline.chat.assistant import Assistant, Conversation, Sampling
    from pipeline.core import quiet_libraries

    quiet_libraries()
    assistant, sampling, talk = Assistant(model, device=device), Sampling(*drawn), Conversation()
    picture = assistant.look(image) if image is not None else None
    if question is not None:
        _say(assistant, talk, question, picture, sampling)
    else:
        _converse(assistant, talk, picture, sampling)


def _say(assistant: "Assistant", talk: "Conversation", text: str, picture: "torch.Tensor | None", sampling: "Sampling") -> None:
    assistant.ask(talk, text, picture)
    for piece in assistant.answer(talk, sampling):
        print("".join(c for c in piece if c.isprintable() or c in "\n\t"), end="", flush=True)
    print()


def _converse(assistant: "Assistant", talk: "Conversation", picture: "torch.Tensor | None", sampling: "Sampling") -> None:
    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history at the prompt)

        print("Ask about a picture. /help lists the commands.")
    while True:
        try:
            text = input("you> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, argument = text.partition(" ")
        try:
            if command in ("/exit", "/quit"):
                return
            if command == "/help":
                print(HELP)
            elif command == "/reset":
                talk.turns.clear()
                talk.features.clear()
                picture = None
                print("forgotten")
            elif command == "/image":
                picture = assistant.look(Path(argument.strip()).expanduser())
                print(f"looking at {argument.strip()}")
            elif command.startswith("/"):
                print(f"no command {command}\n{HELP}")
            elif text:
                asked = len(talk.turns), len(talk.features)
                try:
                    _say(assistant, talk, text, picture, sampling)
                    picture = None
                except (PipelineError, KeyboardInterrupt) as error:  # an unanswered question leaves no trace
                    del talk.turns[asked[0] :], talk.features[asked[1] :]
                    print(f"\n{error.line()}" if isinstance(error, PipelineError) else "\nstopped")
        except PipelineError as error:
            print(error.line())


if __name__ == "__main__":
    run_command(lambda: typer.run(chat))
