"""`python -m pipeline.export.check EXPORT WORK`: what stock Transformers makes of an export, in a process of its own.

Knows nothing of this pipeline's models: only the Auto classes read EXPORT. Reads WORK/rows.json and its pictures; writes
WORK/logits.safetensors and WORK/result.json, which `pipeline.export.proof` compares with the pipeline's own numbers.
"""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from pipeline.core import bounded_memory

SECONDS, MEMORY = 10.0, 1 << 30  # that a chat template, which is a program, may take of the processor and of memory


def load(export: str | Path, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, list[str]]:
    """Model, processor and the names of tensors that were missing, left over or misshapen.

    The Pillow backend, as in training: torchvision's resizing gives pixels that are off by one in 255.
    """
    loaded: Any = AutoModelForImageTextToText.from_pretrained(export, dtype=dtype, output_loading_info=True)
    model, info = loaded
    wrong = [f"{kind}: {name}" for kind, names in info.items() for name in names]
    return model.eval(), AutoProcessor.from_pretrained(export, backend="pil"), wrong


@torch.inference_mode()
def logits_of(model: Any, pixels: torch.Tensor, ids: list[int], keep: list[int]) -> torch.Tensor:
    """Logits float32 [K, V] at positions `keep` of one conversation that shows the pictures `pixels` [S, 3, H, W]."""
    output = model(
        input_ids=torch.tensor([ids]), pixel_values=pixels.to(model.dtype), logits_to_keep=torch.tensor(keep), use_cache=False
    )
    return output.logits[0].float()


def render(processor: Any, messages: list[dict[str, Any]], **options: bool) -> str:
    """A conversation's text, or this process ends: by a signal where time is up, as no single operation of C can escape."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with bounded_memory(MEMORY):
            return str(processor.apply_chat_template(messages, tokenize=False, **options))
    except MemoryError:
        sys.exit(f"its chat template takes over {MEMORY >> 20:,} MB of memory")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@torch.inference_mode()
def answer(model: Any, processor: Any, messages: list[dict[str, Any]], *, max_new_tokens: int) -> str:
    """The way Transformers' documentation puts a question: chat template with parts, then generate."""
    render(processor, messages, add_generation_prompt=True)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    produced = model.generate(**inputs, max_new_tokens=max_new_tokens)
    return str(processor.decode(produced[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def main(export: str, work: Path) -> None:
    content = json.loads((work / "rows.json").read_text(encoding="utf-8"))
    model, processor, wrong = load(export)
    logits, same_ids = {}, []
    for number, row in enumerate(content["rows"]):
        images = [Image.open(work / name) for name in row["images"]]
        text = render(processor, row["messages"])
        inputs = processor(text=text, images=images, return_tensors="pt")
        same_ids.append(inputs["input_ids"][0].tolist() == row["ids"])
        logits[str(number)] = logits_of(model, inputs["pixel_values"], row["ids"], row["keep"]).contiguous()
    save_file(logits, work / "logits.safetensors")
    asked = content["asked"]
    parts = [{"type": "image", "path": str(work / asked["image"])}, {"type": "text", "text": asked["question"]}]
    said = answer(model, processor, [{"role": "user", "content": parts}], max_new_tokens=asked["max_new_tokens"])
    result = {"class": type(model).__name__, "wrong": wrong, "same_ids": same_ids, "answer": said}
    (work / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
