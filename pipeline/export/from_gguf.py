"""`python -m pipeline.from_gguf FILE.gguf OUT`: a language model in llama.cpp's format -> a folder that llm.model can name.

Reads one GGUF file of the Llama, Qwen2 or Qwen3 family; writes config.json, model.safetensors, generation_config.json and
the tokenizer with its chat template. Quantised weights become plain numbers. Transformers reads the tensors; the tokenizer is
put together here, because Transformers forgets how the file says that text is cut into words (SmolLM2's digits, for one).
"""

from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.core import ARTEFACT, PipelineError, brief, exit_on_error


class Dtype(StrEnum):
    """Number formats of the written weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def from_gguf(
    file: Annotated[Path, typer.Argument(help="A language model as one GGUF file.")],
    out: Annotated[Path, typer.Argument(help="The Transformers folder to make.")],
    dtype: Annotated[Dtype, typer.Option(help="Number format of the weights.")] = Dtype.float32,
) -> None:
    """A language model in GGUF -> a folder that llm.model can name."""
    exit_on_error(lambda: print("\n".join(_convert(file, out, dtype.value))))


def _convert(file: Path, out: Path, dtype: str) -> list[str]:
    if not file.is_file():
        raise PipelineError("no such file", where=str(file), remedy="give a GGUF file")
    if find_spec("gguf") is None:
        raise PipelineError("the package gguf is not installed", where=str(file), remedy="pip install gguf")
    from pipeline.core import quiet_libraries

    quiet_libraries()
    return convert(file, out, dtype=dtype)


def convert(file: Path, out: Path, *, dtype: str = "float32") -> list[str]:
    """Write `out`, whole or not at all; returns the lines that say what was made and which tokens may stand for an image.

    Raises `PipelineError` for a damaged file, another family or tokenizer, a tensor that would be lost, and when `out` is
    there already.
    """
    from pipeline.core import publish_folder, set_mode, writing
    from pipeline.minimind.importing import refuse_existing

    fields, numbers = _read_metadata(file)
    tokenizer = _tokenizer(file, fields)
    refuse_existing(out)
    model = _model(file, numbers, dtype)
    with publish_folder(out) as temporary, writing(out):
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for path in temporary.glob("*.safetensors"):
            set_mode(path, 0o644)  # the writer makes them the owner's alone
    named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    spare = [t for t in map(str, tokenizer.added_tokens_decoder.values()) if t not in named and t not in tokenizer.chat_template]
    size = sum(parameter.numel() for parameter in model.parameters())
    return [
        f"{out}: {type(model).__name__}, {size:,} parameters, {dtype}, {len(tokenizer):,} tokens, of {file.name}",
        f"for params.yaml: llm.model: {out}, llm.image_token: a token that your texts do not need, such as one of "
        f"{' '.join(spare[:6]) or 'its rare words'}",
        f"for dvc.yaml: {out} under deps of tokenize, pretrain and sft",
    ]


def _read_metadata(file: Path) -> tuple[dict[str, Any], int]:
    """The file's metadata and how many numbers its tensors hold; raises `PipelineError` for what would not come back exactly."""
    import gguf

    from pipeline.export.gguf_bounds import check_counts
    from pipeline.export.llamacpp import ARCHITECTURES

    try:
        check_counts(file)
        reader = gguf.GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    except Exception as error:  # the reader knows no errors of its own: a damaged file ends in any
        raise PipelineError(f"not a GGUF file, or cut off: {brief(error, limit=80)}", where=str(file), code=ARTEFACT) from None
    family = fields.get("general.architecture")
    problem = ""
    if family not in ARCHITECTURES:
        problem = f"holds a {family} model, expected one of {', '.join(ARCHITECTURES)}"
    elif fields.get("split.count", 1) > 1:
        problem = f"is one of {fields['split.count']} parts"
    elif fields.get(f"{family}.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in tensors:
        problem = "scales its rotary positions, which is not read"
    elif fields.get(f"{family}.expert_count", 0):
        problem = "is a mixture of experts, which is not read"
    if problem:
        raise PipelineError(problem, where=str(file), remedy="take the model's Transformers folder", code=ARTEFACT)
    return fields, sum(tensors.values())


def _model(file: Path, numbers: int, dtype: str) -> Any:
    """The language model with its tensors as plain numbers in `dtype`; every tensor of the file is in it."""
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.core.devices import DTYPES

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except Exception as error:  # as above
        raise PipelineError(f"cannot be read: {brief(error)}", where=str(file), code=ARTEFACT) from None
    model, info = loaded
    used = sum(parameter.numel() for parameter in model.parameters())
    wrong = [f"{kind.replace('_', ' ')}: {min(map(str, names))}" for kind, names in info.items() if names]
    if numbers != used:
        wrong.append(f"{numbers:,} numbers in the file, {used:,} in the model")
    if wrong:
        raise PipelineError(f"does not fit {type(model).__name__}: {wrong[0]}", where=str(file), code=ARTEFACT)
    settings = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config" and key[0] != "_"}
    with torch.device("meta"):  # a model of its own: Transformers refuses to save one that it has read from GGUF
        plain = type(model)(type(model.config).from_dict({**settings, "dtype": dtype}))
    plain.load_state_dict({name: tensor.to(DTYPES[dtype]) for name, tensor in model.state_dict().items()}, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def _tokenizer(file: Path, fields: dict[str, Any]) -> Any:
    """The byte-level BPE that the metadata describe; control tokens become special ones."""
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    kind, cut = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    steps = _cuts().get(str(cut))
    if kind != "gpt2" or steps is None:
        known = ", ".join(_cuts())
        raise PipelineError(
            f"its tokenizer ({kind}, {cut}) is not rebuilt here, only gpt2 with one of {known}",
            where=str(file),
            remedy="take the model's Transformers folder",
            code=ARTEFACT,
        )
    if not fields.get("tokenizer.chat_template"):
        raise PipelineError("has no chat template", where=str(file), remedy="choose an instruct or chat model", code=ARTEFACT)
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    vocabulary = {token: i for i, (token, k) in enumerate(zip(tokens, kinds, strict=True)) if k != gguf.TokenType.UNUSED}
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut == "llama-bpe"))
    backend.normalizer = normalizers.NFC() if cut == "qwen2" else None
    backend.pre_tokenizer, backend.decoder = steps, decoders.ByteLevel()
    for token, k in zip(tokens, kinds, strict=True):
        if k == gguf.TokenType.CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif k == gguf.TokenType.USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])
    named = {
        f"{ours}_token": tokens[fields[key]]
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if (key := f"tokenizer.ggml.{theirs}_token_id") in fields
    }
    if fields.get("tokenizer.ggml.add_bos_token", cut == "llama-bpe") and "bos_token" in named:
        bos = named["bos_token"]
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields[f"{fields['general.architecture']}.context_length"],
        clean_up_tokenization_spaces=False,
        **named,
    )


def _cuts() -> dict[str, Any]:
    """How text is cut into words first, by llama.cpp's name for it: the other direction of `export.llamacpp.split_name`."""
    from tokenizers import Regex, pre_tokenizers

    from pipeline.export.llamacpp import SPLITS

    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    return {
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        **{
            name: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only])
            for pattern, name in SPLITS.items()
        },
    }
