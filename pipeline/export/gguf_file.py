"""Tensors and metadata -> one GGUF file, read back and compared before it counts as written.

GGUF is llama.cpp's format; the `gguf` package writes and reads it, and knows the tensor names.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch

from pipeline.core import ARTEFACT, PipelineError

TYPES = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}


def write_file(
    path: Path,
    architecture: str,
    tensors: Mapping[str, torch.Tensor],
    describe: Callable[[gguf.GGUFWriter], None],
    *,
    dtype: str,
    keep: frozenset[str] = frozenset(),
) -> None:
    """Write `tensors` (float32) with matrices in `dtype`; vectors and the tensors in `keep` stay float32.

    `describe` adds the metadata. Raises `PipelineError` when the file does not read back as what was to be written.
    """
    kind, file_type = TYPES[dtype]
    writer = gguf.GGUFWriter(path, architecture)
    describe(writer)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    stored: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        plain = name in keep or tensor.ndim < 2
        used = gguf.GGMLQuantizationType.F32 if plain else kind
        stored[name] = gguf.quants.quantize(tensor.detach().float().contiguous().numpy(), used)
        writer.add_tensor(name, stored[name], raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _check(path, tensors, stored)


def _check(path: Path, tensors: Mapping[str, torch.Tensor], stored: Mapping[str, np.ndarray]) -> None:
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    if found.keys() != tensors.keys():
        raise PipelineError(f"lacks {min(found.keys() ^ tensors.keys())}", where=str(path), code=ARTEFACT)
    for name, tensor in found.items():
        shape = tuple(reversed(tensor.shape.tolist()))  # GGUF counts dimensions from the innermost one
        if shape != tuple(tensors[name].shape) or tensor.data.tobytes() != stored[name].tobytes():
            raise PipelineError(f"{name} does not read back as it was written", where=str(path), code=ARTEFACT)
