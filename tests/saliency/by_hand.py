"""A vision-language model whose attention is set by hand, in its weights: a token of text looks at the patches it was told to,
a patch at itself, in the language model as in the encoder. It is loaded and run like any other.

Image tokens have a number of their own in dimensions 0 to 15 (told by the encoder's position embeddings), a token of text has
those that it looks for in dimensions 16 to 31, and what is seen of the pixels travels in dimensions 32 to 63.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from conftest import CPU, DIALECTS, train_tokenizer
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from pipeline.features.encoder.encoder import Encoder
from pipeline.records import ImageSlot, Turn
from pipeline.saliency import Seen, look_back
from pipeline.saliency.words import split_words
from pipeline.text.builder import PromptBuilder
from pipeline.vlm.model.language_model import load_language_model
from pipeline.vlm.model.projector import build_projector
from pipeline.vlm.model.vlm import VisionLanguageModel

WIDE, SIDE, HEAD = 64, 4, 64  # D, patches on a side, width of a head
SHARP = 100.0  # so large that the softmax of what is not meant is 0 in float32
SLOW = 8  # from this dimension of a head on its rotation by position is nothing


@dataclass(frozen=True, slots=True)
class ByHand:
    model: VisionLanguageModel
    encoder: Encoder
    builder: PromptBuilder

    def turns(self, answer: str, pictures: int = 1) -> list[Turn]:
        shown = [part for number in range(pictures) for part in (ImageSlot(number), "\n")]
        return [Turn("user", (*shown, "What is this?")), Turn("assistant", (answer,))]

    def tell(self, answer: str, told: list[list[int]], pictures: int = 1) -> None:
        """Let each word of the answer be decided by these image tokens."""
        prompt = self.builder.build(self.turns(answer, pictures))
        first, end = np.asarray(prompt.spans).reshape(-1, 2)[-1].tolist()
        words = split_words(np.asarray(prompt.ids[first:end]), self.builder.decode)
        table = self.model.language_model.get_input_embeddings().weight
        with torch.no_grad():
            for (_, tokens), patches in zip(words, told, strict=True):
                for token in tokens:
                    table[prompt.ids[first + token - 1], 16:32] = 0
                    table[prompt.ids[first + token - 1], [16 + patch for patch in patches]] = 1

    def look(self, answer: str, pixels: torch.Tensor, methods: list[str]) -> Seen:
        turns = self.turns(answer, len(pixels))
        return look_back(self.model, self.encoder, self.builder, turns, pixels, methods, tower=self.encoder.exact_tower())


def build(folder: Path, *, merge: str = "none", factor: int = 1, pool: int = 1) -> ByHand:
    """Of 16 patches, or as many blocks of them as are merged."""
    encoder = Encoder(str(_tower(folder / "clip")), precision="float32", device=CPU, batch=1, pool=pool)
    side = SIDE // pool // factor
    projector = build_projector("linear", 32, WIDE, merge, factor)
    layer = projector[-1]
    with torch.no_grad():
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
        for patch in range(SIDE**2):
            row, column = divmod(patch, SIDE)
            token = row // (pool * factor) * side + column // (pool * factor)
            inside = row // pool % factor * factor + column // pool % factor  # where in its block, once pooled
            start = 32 * inside if merge == "shuffle" else 0
            layer.weight[token, start + patch] = 1
            layer.weight[32:48, start + 16 : start + 32] = torch.eye(16)
    builder = PromptBuilder(str(_llm(folder / "llm")), image_token=DIALECTS["embedded"].image_token, tokens=side**2)
    return ByHand(VisionLanguageModel(projector, load_language_model(str(folder / "llm"))).eval(), encoder, builder)


def _tower(folder: Path) -> Path:
    torch.manual_seed(0)
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=32, patch_size=8,
            projection_dim=16,
        )
    )  # fmt: skip
    with torch.no_grad():
        state = tower.state_dict()
        for name, weight in state.items():
            if "layers" in name and "norm" not in name:
                weight.zero_()
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight[:16, :16] = SHARP * torch.eye(16)
            if name.endswith(("v_proj.weight", "out_proj.weight")):
                weight[16:, 16:] = 0.3 * torch.eye(16)
            if name.endswith("position_embedding.weight"):
                weight.zero_()
                weight[1:, :16] = 10 * torch.eye(16)
            if name.endswith("patch_embedding.weight"):
                weight[:16] = 0
                weight[16:] *= 0.1
    tower.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def _llm(folder: Path) -> Path:
    tokenizer = train_tokenizer("embedded")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=WIDE, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=HEAD, max_position_embeddings=512, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e30}, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.get_input_embeddings().weight[:, :48] = 0
        for layer in model.model.layers:
            for weight in layer.mlp.parameters():
                weight.zero_()
            attention = layer.self_attn
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(attention, name).weight.zero_()
            for head in range(2):
                looks = attention.q_proj.weight[head * HEAD + SLOW :]
                looks[:16, :16] = looks[:16, 16:32] = SHARP * torch.eye(16)
                attention.o_proj.weight[32:48, head * HEAD : head * HEAD + 16] = 0.1 * torch.eye(16)
            attention.k_proj.weight[SLOW : SLOW + 16, :16] = SHARP * torch.eye(16)
            attention.v_proj.weight[:16, 32:48] = torch.eye(16)
    model.save_pretrained(folder)
    return folder
