"""A finished, proven export on disk, and from there to the hub."""

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import httpx, validate_repo_id

from pipeline.core import RESOURCE, PipelineError, brief, publish_folder, writing
from pipeline.export import idefics3, llava, processor
from pipeline.export.card import write_card
from pipeline.export.marker import check_target, write_marker
from pipeline.export.proof import Proof, heldout_rows, prove
from pipeline.export.source import Source
from pipeline.params import load


def export_model(folder: Path, out: Path, *, gguf: bool, dtype: str, rows: int) -> str:
    """Export, prove, publish; returns what to tell. Nothing appears at `out` unless the proof holds.

    Raises `PipelineError` for a model that cannot be exported exactly, or an export that differs from its source.
    """
    check_target(out)
    if gguf and find_spec("gguf") is None:
        raise PipelineError("the package gguf is not installed", where="--gguf", remedy="pip install gguf")
    params = load()
    files: list[str] = []
    with publish_folder(out) as temporary, tempfile.TemporaryDirectory() as elsewhere:  # whether it can be written, before all else
        source = Source.open(folder, dtype=dtype)
        shown = heldout_rows(params.data.heldout, rows)
        if gguf:
            from pipeline.export.llamacpp import write_gguf

            with writing(out):
                files = write_gguf(source, temporary, dtype=dtype)
        stock = Path(elsewhere) if gguf else temporary
        with writing(stock if gguf else out):
            parameters = write_stock(source, stock, dtype)
        proof = prove(source, stock, shown, max_new_tokens=params.evaluate.max_new_tokens)
        with writing(out):
            write_card(source, temporary, proof, parameters=parameters, dtype=dtype, gguf=gguf)
            write_marker(temporary, source.manifest, dtype=dtype)
    return _report(out, proof, files, parameters=parameters, dtype=dtype)


def write_stock(source: Source, folder: Path, dtype: str) -> int:
    """A Transformers folder of the class that has a place for this model; returns the parameter count."""
    target = idefics3 if idefics3.takes(source) else llava
    parameters = target.write_model(source, folder, dtype)
    (idefics3 if target is idefics3 else processor).write_processor(source, folder)
    return parameters


def _report(out: Path, proof: Proof, files: list[str], *, parameters: int, dtype: str) -> str:
    lines = [
        f"{out}: {proof.model_class}, {parameters:,} parameters, {dtype}",
        f"logits on {proof.rows} held-out conversations: at most {proof.largest:.1e} of the largest logit away from the pipeline's",
        f"{proof.question!r} -> {proof.answer!r}, as the pipeline answers",
    ]
    if proof.other_ids:
        lines.append(f"note: stock code cuts the text of {proof.other_ids} of these conversations into other tokens")
    if files:
        lines[0] = f"{out}: {' and '.join(files)}, {parameters:,} parameters, {dtype}; every tensor read back equal"
        lines[1] = f"the same weights in Transformers: {lines[1]}"
    return "\n".join(lines)


def check_repository(name: str) -> None:
    """Raises `PipelineError` before the work starts when an upload cannot succeed: bad name, no network, no token."""
    _on_hub(name, lambda: validate_repo_id(name))
    if is_offline_mode():
        raise PipelineError("the hub is switched off", where=f"--push-to-hub {name}", remedy="HF_HUB_OFFLINE=0", code=RESOURCE)
    _on_hub(name, lambda: HfApi().whoami())


def upload(folder: Path, name: str) -> str:
    """The folder to a model repository on the hub, made private if it is new; returns what to tell."""

    def work() -> str:
        api = HfApi()
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of a Glance model")
        return f"uploaded to {url} (a new repository is private)"

    return str(_on_hub(name, work))


def _on_hub(name: str, work: Callable[[], object]) -> object:
    try:
        return work()
    except HFValidationError:
        what, remedy = "not a repository's name", "OWNER/NAME"
    except LocalTokenNotFoundError:
        what, remedy = "no token for the hub", "hf auth login"
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        what, remedy = f"the hub refuses: {brief(error)}", "check the name, your token and the network"
    raise PipelineError(what, where=f"--push-to-hub {name}", remedy=remedy, code=RESOURCE)
