"""Chat templates in the formats that families of models document (templates/*.jinja), and three kinds of tokenizer for each."""

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

IMAGE = "<|spare_7|>"


@dataclass(frozen=True, slots=True)
class Family:
    """A template, the special tokens that it writes, others that are no special ones, and which of them strip blanks behind."""

    template: str
    special: tuple[str, ...]
    plain: tuple[str, ...] = ()
    rstrip: tuple[str, ...] = ()
    bos: str = ""
    eos: str = ""


IM = ("<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")
SENTENCE = ("<s>", "</s>")
LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")


def _family(name: str, special: tuple[str, ...], **more: Any) -> tuple[str, Family]:
    """As `templates/NAME.jinja` has it, the name in small letters with hyphens."""
    file = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return name, Family((Path(__file__).parent / "templates" / f"{file}.jinja").read_text(encoding="utf-8"), special, **more)


FAMILIES = dict(
    [
        _family("ChatML", IM, plain=THINK, eos="<|im_end|>"),
        _family("Qwen2", (*IM, "<|endoftext|>"), eos="<|im_end|>"),
        _family("Qwen3", (*IM, "<|endoftext|>"), plain=(*THINK, "<tool_call>", "</tool_call>"), eos="<|im_end|>"),
        _family("MiniMind", (*IM, "<|endoftext|>"), bos="<|im_start|>", eos="<|im_end|>"),
        _family("MiniMind2", (*IM, "<|endoftext|>"), plain=THINK, bos="<|im_start|>", eos="<|im_end|>"),
        _family("SmolLM2", IM, eos="<|im_end|>"),
        _family("SmolLM3", IM, plain=THINK, eos="<|im_end|>"),
        _family("Yi", IM, eos="<|im_end|>"),
        _family("InternLM2", (*SENTENCE, "<|im_start|>", "<|im_end|>"), bos="<s>", eos="</s>"),
        _family("Llama 2", SENTENCE, bos="<s>", eos="</s>"),
        _family("Llama 3", LLAMA3, bos="<|begin_of_text|>", eos="<|eot_id|>"),
        _family("Llama 3.1", LLAMA3, bos="<|begin_of_text|>", eos="<|eot_id|>"),
        _family("Llama 3.2", LLAMA3, bos="<|begin_of_text|>", eos="<|eot_id|>"),
        _family("Mistral v1", SENTENCE, bos="<s>", eos="</s>"),
        _family("Mistral v3", (*SENTENCE, "[INST]", "[/INST]"), bos="<s>", eos="</s>"),
        _family("Mistral Small 3", (*SENTENCE, "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), bos="<s>", eos="</s>"),
        _family("Zephyr", SENTENCE, bos="<s>", eos="</s>"),
        _family("TinyLlama", SENTENCE, bos="<s>", eos="</s>"),
        _family("Vicuna", SENTENCE, bos="<s>", eos="</s>"),
        _family("Alpaca", SENTENCE, bos="<s>", eos="</s>"),
        _family(
            "Phi-3",
            ("<|endoftext|>", "<|end|>", "<|assistant|>"),
            plain=("<|user|>", "<|system|>"),
            rstrip=("<|end|>", "<|assistant|>", "<|user|>", "<|system|>"),
            eos="<|endoftext|>",
        ),
        _family("Phi-4", (*IM, "<|im_sep|>"), eos="<|im_end|>"),
        _family("Phi-4-mini", ("<|endoftext|>", "<|end|>", "<|assistant|>", "<|user|>", "<|system|>"), eos="<|endoftext|>"),
        _family("Gemma 2", GEMMA, plain=("\n\n",), bos="<bos>", eos="<eos>"),
        _family("Gemma 3", GEMMA, plain=("\n\n",), bos="<bos>", eos="<eos>"),
        _family("OLMo 2", ("<|endoftext|>",), bos="<|endoftext|>", eos="<|endoftext|>"),
        _family("Tulu 3", ("<|end_of_text|>",), eos="<|end_of_text|>"),
        _family("Granite 3", ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"), eos="<|end_of_text|>"),
        _family(
            "DeepSeek V2",
            ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
            bos="<｜begin▁of▁sentence｜>",
            eos="<｜end▁of▁sentence｜>",
        ),
        _family("DeepSeek V3.1", DEEPSEEK, plain=THINK, bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>"),
        _family("DeepSeek R1 (distilled)", DEEPSEEK, plain=THINK, bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>"),
        _family("OLMo 3 Think", IM, plain=THINK, eos="<|im_end|>"),
        _family("Falcon", ("<|endoftext|>",), eos="<|endoftext|>"),
        _family("Falcon 3", ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>"), eos="<|endoftext|>"),
        _family("StableLM 2", ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>"), eos="<|endoftext|>"),
        _family(
            "Command R",
            (
                "<BOS_TOKEN>",
                "<|START_OF_TURN_TOKEN|>",
                "<|END_OF_TURN_TOKEN|>",
                "<|USER_TOKEN|>",
                "<|CHATBOT_TOKEN|>",
                "<|SYSTEM_TOKEN|>",
            ),
            bos="<BOS_TOKEN>",
            eos="<|END_OF_TURN_TOKEN|>",
        ),
        _family("GLM-4", ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"), eos="<|endoftext|>"),
        _family("gpt-oss", ("<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>"), eos="<|return|>"),
        _family("EXAONE 3.5", ("[|endofturn|]",), plain=("[|system|]", "[|user|]", "[|assistant|]"), eos="[|endofturn|]"),
        _family("OpenChat", (*SENTENCE, "<|end_of_turn|>"), bos="<s>", eos="<|end_of_turn|>"),
        _family("SOLAR", SENTENCE, bos="<s>", eos="</s>"),
        _family(
            "Hunyuan",
            ("<|startoftext|>", "<|extra_0|>", "<|extra_4|>", "<|eos|>"),
            plain=("<answer>", "</answer>"),
            bos="<|startoftext|>",
            eos="<|eos|>",
        ),
    ]
)

SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = [
    "What is this? It is a red circle. Which colour is the shape? Blue. Is there a square? Yes. No, there is none.\n\n\n",
    "user assistant system You are a helpful assistant. USER: ASSISTANT: ### Response:\n Describe the image.   A  triangle. \n \n",
]
KINDS = ("byte-level", "SentencePiece", "SentencePiece, legacy")


@lru_cache(maxsize=1)
def _merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.train_from_iterator(CORPUS * 4, trainers.BpeTrainer(vocab_size=330, special_tokens=["<unk>"], show_progress=False))
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [(first, second) for first, second in model["merges"]]


@lru_cache(maxsize=1)
def _bytes() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS * 4, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def _pieces(legacy: bool) -> Tokenizer:
    vocab, merges = _merges()
    vocab = vocab | {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:  # as the first conversions of Llama 2 have it
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def make_tokenizer(family: Family, kind: str) -> PreTrainedTokenizerFast:
    """A tiny tokenizer of a kind, with a family's tokens and template."""
    tokenizer = Tokenizer.from_str(_bytes().to_str()) if kind == "byte-level" else _pieces(kind.endswith("legacy"))
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False, rstrip=text in family.rstrip) for text in (*family.special, IMAGE)]
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False, rstrip=text in family.rstrip) for text in family.plain])
    names = {name: token for name, token in (("bos_token", family.bos), ("eos_token", family.eos)) if token}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=family.template, **names)
