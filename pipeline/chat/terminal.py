"""A talk in a terminal: lines in, answers out. Answers go to stdout, all else to stderr."""

import glob
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from pipeline.chat.assistant import Assistant, Conversation, Pace, Sampling
from pipeline.chat.interrupts import Interrupts
from pipeline.chat.options import Settings
from pipeline.chat.paths import find_pictures, names_pictures, read_picture, require_text, show
from pipeline.chat.thumbnail import thumbnail
from pipeline.chat.transcript import Transcript
from pipeline.core import PipelineError, quiet_libraries

HELP = """\
  /image PATH   talk about this picture: a new topic
  /also PATH    show one more picture with your next question
  /reset        forget the talk
  /help         this list
  /exit         leave (or Ctrl-D)
Ctrl-C stops an answer. A picture dragged into the terminal is a new topic; Tab completes paths."""
LEAVING = "Ctrl-C again, Ctrl-D or /exit leaves"
NO_PICTURE = "(no picture is shown: the answer is about none; /image PATH shows one)"


@dataclass(slots=True)
class Talk:
    """A conversation with what a person sees of it. `say` raises `PipelineError` for what the model cannot take."""

    assistant: Assistant
    sampling: Sampling
    settings: Settings
    transcript: Transcript | None = None
    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False, soft_wrap=True, markup=False))
    conversation: Conversation = field(default_factory=Conversation)
    _waiting: list[tuple[str, torch.Tensor]] = field(default_factory=list)  # pictures that go with the next question
    _fresh: bool = True  # nothing was asked in this topic
    _missing: str = NO_PICTURE  # said once before an answer that has no picture, or not the one that was asked for

    def new_topic(self) -> None:
        """Forget what was said and shown."""
        self.conversation, self._waiting, self._fresh, self._missing = Conversation(), [], True, NO_PICTURE

    def show(self, typed: str, *, keep: bool = False, quiet: bool = False) -> None:
        """Pictures for the next question; `keep` the talk, or begin anew. Raises `PipelineError`, having shown none."""
        if not keep:
            self.new_topic()
        pictures = find_pictures(typed)
        if not pictures:
            raise PipelineError("no path given", remedy=f"{'/also' if keep else '/image'} PATH")
        found = []
        try:
            for path in pictures:
                data = read_picture(path)
                found.append((path, data, self.assistant.look_at(data, show(path))))
        except PipelineError as error:
            self._missing = f"(no picture from {error.where} is shown)"
            raise
        for path, data, features in found:
            self._waiting.append((show(path), features))
            if not quiet:
                self._draw(path, data)
                self.console.print(f"looking at {show(path)}", style="dim")
        self._missing = ""

    def _draw(self, path: Path, data: bytes) -> None:
        colours = self.console.is_terminal and sys.stdout.isatty() and self.console.color_system not in (None, "standard")
        if self.settings.thumbnails and colours:
            self.console.print(thumbnail(data, where=show(path)))

    def say(self, text: str, interrupts: Interrupts | None = None) -> None:
        """Ask, and print the answer as it comes. Stopped before its first word, the question is as if it had not been asked."""
        require_text(text, "the question")
        talk, pace = self.conversation, Pace()
        before = len(talk.turns), len(talk.features)
        if self._missing:
            self.console.print(self._missing, style="yellow")
        self.assistant.ask(talk, text, [features for _, features in self._waiting])
        stop, pieces = interrupts.stop if interrupts else None, []
        try:
            for piece in self.assistant.answer(talk, self.sampling, stop=stop, pace=pace):
                pieces.append(_printable(piece))
                print(pieces[-1], end="", flush=True)
        except PipelineError:
            del talk.turns[before[0] :], talk.features[before[1] :]
            raise
        print(flush=True)
        answer, stopped = "".join(pieces).strip(), stop is not None and stop.is_set()
        if stopped and stop:
            stop.clear()
            self.console.print("stopped", style="dim")
        if stopped and not answer:
            del talk.turns[before[0] :], talk.features[before[1] :]
            return
        if self.settings.stats:
            self.console.print(pace.line(), style="dim")
        if self.transcript:
            names = [name for name, _ in self._waiting]
            self.transcript.add(names, text, answer, new_topic=self._fresh, **({"stopped": True} if stopped else {}))
        self._waiting, self._fresh, self._missing = [], False, ""

    def obey(self, line: str) -> bool:
        """Do what a line that is no question says; False to leave."""
        command, _, argument = line.partition(" ")
        if names_pictures(line):
            self.show(line)
        elif command in ("/image", "/also"):
            self.show(argument, keep=command == "/also")
        elif command == "/reset":
            self.new_topic()
            self.console.print("forgotten", style="dim")
        elif command == "/help":
            self.console.print(HELP)
        elif command in ("/exit", "/quit"):
            return False
        else:
            self.console.print(f"no command {show(command)}\n{HELP}")
        return True


def open_talk(settings: Settings) -> Talk:
    """The model loaded, and the transcript open; raises `PipelineError` for either."""
    transcript = Transcript(settings.save) if settings.save else None
    quiet_libraries()
    return Talk(Assistant(settings.model, device=settings.device), Sampling(*settings.drawn), settings, transcript)


def converse(talk: Talk, interrupts: Interrupts | None) -> None:
    """Lines until the end of input: those of the person at the terminal, or without `interrupts` those of a pipe."""
    if interrupts:
        _edit_lines()
        talk.console.print("Ask about a picture. /help lists the commands.")
    for line in _typed(talk, interrupts) if interrupts else (text.rstrip("\n") for text in sys.stdin):
        text = line.strip()
        try:
            if text.startswith("/") or names_pictures(text):
                if not talk.obey(text):
                    return
            elif text:
                talk.say(text, interrupts)
        except PipelineError as error:
            talk.console.print(show(error.line()), style="red")


def _typed(talk: Talk, interrupts: Interrupts) -> Iterator[str]:
    pressed = False
    while True:
        try:
            line = interrupts.ask("you> ")
        except EOFError:
            break
        except KeyboardInterrupt:
            if pressed:
                break
            pressed = True
            talk.console.print(f"\n{LEAVING}", style="dim")
            continue
        pressed = False
        yield line
    talk.console.print()


def _edit_lines() -> None:
    """Arrow keys and history at the prompt, and paths under Tab, where Python has readline."""
    try:
        import readline
    except ImportError:
        return

    def complete(text: str, number: int) -> str | None:
        found = sorted(glob.glob(glob.escape(os.path.expanduser(text)) + "*"))
        return found[number] + ("/" if os.path.isdir(found[number]) else "") if number < len(found) else None

    readline.set_completer_delims(" \t\n")
    readline.set_completer(complete)
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")


def _printable(text: str) -> str:
    """A model's words cannot steer the terminal."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")
