"""`glance use MODEL`: another encoder or language model in params.yaml and dvc.yaml; the data section stays."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.core import PipelineError, enter_project, exit_on_error, quiet_libraries, run_command
from pipeline.project.files import Files, in_params, propose, tell_untracked
from pipeline.project.models import list_model_folders

READY = Path(__file__).resolve().parents[2] / "docs" / "params"
SECTIONS = ("vision", "llm", "tokenize", "projector", "pretrain", "sft")

app = typer.Typer(add_completion=False)


@app.command()
def use(
    model: Annotated[
        str, typer.Argument(help="A ready file of docs/params (smollm2-135m, nanovlm ...), a hub id, or a folder with a model.")
    ],
    image_token: Annotated[
        str | None, typer.Option(help="Stands where a picture goes; a token of the vocabulary that your texts do not need.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Write without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written.")] = False,
) -> None:
    """Take other models: a ready file sets encoder, language model, projector and training; a hub id or folder sets one model.

    Model folders become dependencies in dvc.yaml, and those that are no longer used are taken out of it.
    """

    def work() -> None:
        from pipeline.check import open_console

        quiet_libraries()
        named = enter_project(reads=[Path(model)] if Path(model).exists() else [])
        console, files = open_console(), Files()
        console.print(take(files, str(named[0]) if named else model, image_token), soft_wrap=True)
        if propose(files, console, yes=yes, dry_run=dry_run):
            console.print("\n  glance check  what stands in the way, what it takes in disk and time")
            console.print(
                "  dvc repro     extract, tokenize, pretrain, sft; with HF_HUB_OFFLINE=0 before it, a hub model is downloaded"
            )
            tell_untracked(console)

    exit_on_error(work)


def take(files: Files, model: str, image_token: str | None = None) -> str:
    """Change `files` so that they name `model`; returns what was decided. Raises `PipelineError` for what is none."""
    before = {section: files.params[section]["model"] for section in ("vision", "llm")}
    ready = READY / f"{model}.yaml"
    said = _take_ready(files, ready) if ready.is_file() else _take_one(files, model, image_token)
    list_model_folders(files.params, files.dvc, before)
    return said


def _take_ready(files: Files, ready: Path) -> str:
    """Everything but data, evaluation and runtime."""
    content = Files.load(ready)
    for section in SECTIONS:
        files.change(section, content[section])
    vision, llm = content["vision"]["model"], content["llm"]["model"]
    return f"{ready.stem}: {vision} with {llm}, trained as docs/params/{ready.name} says; data, evaluate and runtime stay"


def _take_one(files: Files, model: str, image_token: str | None) -> str:
    from transformers import AutoConfig

    from pipeline.core.loading import unloadable
    from pipeline.features import TOWERS

    model = in_params(Path(model)) if Path(model).is_dir() else model
    try:
        kind = AutoConfig.from_pretrained(model, trust_remote_code=False).model_type
    except (OSError, ValueError, KeyError) as error:
        if "/" not in model and not Path(model).exists():
            known = ", ".join(sorted(path.stem for path in READY.glob("*.yaml")))
            raise PipelineError("no ready file, folder or hub id", where=model, remedy=f"ready are {known}") from None
        raise unloadable(model, error, where="glance use") from None
    if kind in TOWERS:
        pool = {"pool": 1} if isinstance(files.params["vision"]["pool"], list) else {}
        files.change("vision", {"model": model, "revision": "", "layer": -1, **pool})
        return f"{model} is a {kind} encoder: vision.model"
    token = image_token or _image_token(model)
    files.change("llm", {"model": model, "revision": "", "image_token": token})
    return f"{model} is a {kind} language model: llm.model, with {token} where a picture goes"


def _image_token(model: str) -> str:
    """A token that is there and that nobody's text needs: one made for images, else a reserved or unused one."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    taken = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special and str(token) not in taken]
    template = str(getattr(tokenizer, "chat_template", "") or "")
    for sign in ("image", "vision", "file_sep", "reserved", "unused", "extra", "fim_pad"):
        for token in added:
            if sign in token.lower() and token not in template:
                return token
    remedy = "name a token of its vocabulary with --image-token"
    raise PipelineError("no token of the tokenizer is free to stand for a picture", where=model, remedy=remedy)


if __name__ == "__main__":
    run_command(app)
