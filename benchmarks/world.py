"""What the benchmark of the engine trains on: pictures, rows and random models of real shapes, made in a folder.

Writes clip/ (a whole CLIP ViT-B/16, as its checkpoint comes), llm-NAME/ (weights and a tokenizer with a chat template in
MiniMind's manner), images/, two data sets in the project's record format, their token tables and the feature store:

    captions    one caption of 30-45 tokens a picture, asked for before the picture, as MiniMind-V does
    questions   ten on each picture, as data sets of visual questions have them: 6-12 words, answered by one to three;
                the picture stands before the question, so that they can share it

Everything follows from one seed. Random weights cost the same time as trained ones.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.core.files import write_json
from pipeline.core.quiet import quiet_libraries
from pipeline.features.distinct import distinct_images
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.extraction import extract
from pipeline.records.formats import RowPolicy, SourceSpec, open_source
from pipeline.records.images import ImageRoot
from pipeline.text.builder import PromptBuilder
from pipeline.text.token_table import write_tokens
from pipeline.text.tokenization import RowTokenizer, Summary, tokenize

IMAGE_TOKEN, QUESTIONS, SHORTEST, LONGEST = "@", 10, 30, 45  # MiniMind-V's placeholder is an ordinary character
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2 as in MiniMind: padding, begin, end
TEMPLATE = (  # ChatML with a system turn of its own
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PROMPTS = ("Describe this picture.", "What can be seen here?", "Say in a few words what the picture shows.")

LLAMAS: dict[str, dict[str, Any]] = {
    "minimind": {  # MiniMind2-Small
        "vocab_size": 6400, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 32768,
    },
    "smollm2": {  # SmolLM2-135M
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "rope_theta": 1e5, "max_position_embeddings": 8192,
    },
}  # fmt: skip
TINY_LLAMA = {
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
TINY_CLIP = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True, slots=True)
class World:
    """Where the parts lie in a folder that `build` filled; any process can open them."""

    folder: Path

    @property
    def clip(self) -> Path:
        return self.folder / "clip"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def features(self) -> Path:
        return self.folder / "features"

    def llm(self, model: str) -> Path:
        return self.folder / f"llm-{model}"

    def records(self, table: str) -> Path:
        return self.folder / f"{table}.jsonl"

    def tokens(self, table: str) -> Path:
        return self.folder / f"{table}.arrow"

    def facts(self) -> dict[str, float]:
        """What building it measured: `extract_images_per_second`, the stage's own, workers and writing included."""
        return json.loads((self.folder / "facts.json").read_text(encoding="utf-8"))


def build(folder: Path, *, models: list[str], rows: int, pictures: int, tiny: bool, side: int = 224) -> World:
    """Make a world: captions as `rows` over `pictures` pictures in turn, and ten questions on each; `side` is the encoder's."""
    quiet_libraries()
    world, rng = World(folder), random.Random(0)
    words = make_words(rng)
    tokenizer = train_tokenizer(words, rng)
    torch.manual_seed(0)
    for name in models:
        shape = LLAMAS[name] | (TINY_LLAMA if tiny else {})
        config = LlamaConfig(**shape, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        LlamaForCausalLM(config).save_pretrained(world.llm(name))
        tokenizer.save_pretrained(world.llm(name))
    vision = {"patch_size": 16, "image_size": side} | (TINY_CLIP if tiny else {})
    text = TINY_CLIP if tiny else {}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text)).save_pretrained(world.clip)
    square = {"height": side, "width": side}
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square).save_pretrained(world.clip)  # else as CLIP's
    _write_pictures(world.images, pictures)
    sentences = make_sentences(tokenizer, words, rng)
    shown = [i % pictures for i in range(rows)], [i // QUESTIONS for i in range(QUESTIONS * pictures)]
    captions = [(f"{rng.choice(PROMPTS)}\n<image>", sentences[i % len(sentences)]) for i in range(len(shown[0]))]
    asked = [(_sentence(words, rng.randint(6, 12), rng), _sentence(words, rng.randint(1, 3), rng)) for _ in shown[1]]
    write_rows(world.records("captions"), shown[0], captions)
    write_rows(world.records("questions"), shown[1], [(f"<image>\n{question}", answer) for question, answer in asked])
    encoder = Encoder(str(world.clip), device=torch.device("cpu"), batch=16)
    for table in ("captions", "questions"):
        tokenise_rows(world, table, world.llm(models[0]), encoder.tokens)
    files, hashes = distinct_images([(ImageRoot(world.images), [f"{i}.jpg" for i in range(pictures)])])
    done = extract(files, hashes, encoder, stores=[folder / "store"], out=world.features, shard_rows=4096, workers=2)
    write_json(folder / "facts.json", {"extract_images_per_second": round(done.encoded / done.seconds, 3)})
    return world


def make_words(rng: random.Random) -> list[str]:
    """Three thousand words that nobody has used, the frequent ones short."""
    syllables = [start + vowel + end for start in "bdfgklmnprstvz" for vowel in "aeiou" for end in ("", "n", "r", "s", "l")]
    words = {"".join(rng.choices(syllables, k=1 + number // 600)) for number in range(3000)}
    return sorted(words, key=lambda word: (len(word), word))


def _sentence(words: list[str], count: int, rng: random.Random) -> str:
    """A sentence of `count` words, word n about 1/n as frequent as the first (Zipf 1949)."""
    picked = [words[min(int(len(words) ** rng.random()), len(words)) - 1] for _ in range(count)]
    return f"{' '.join(picked).capitalize()}."


def train_tokenizer(words: list[str], rng: random.Random) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 6,400 tokens, trained on sentences of these words; no picture token among its merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=6400, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False)
    text = [_sentence(words, 30, rng) for _ in range(4000)] + [*PROMPTS, "system user assistant You are a helpful assistant"] * 50
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=TEMPLATE, bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[0]
    )


def make_sentences(tokenizer: PreTrainedTokenizerFast, words: list[str], rng: random.Random) -> list[str]:
    """Captions whose length in tokens is spread evenly from the shortest to the longest."""
    found: list[str] = []
    for number in range(512):
        wanted = SHORTEST + number % (LONGEST - SHORTEST + 1)
        sentence = _sentence(words, wanted - 5, rng)
        while len(tokenizer.encode(sentence, add_special_tokens=False)) != wanted:
            sentence = _sentence(words, rng.randint(wanted // 2, wanted), rng)
        found.append(sentence)
    rng.shuffle(found)
    return found


def _write_pictures(folder: Path, count: int) -> None:
    """JPEG files of 224-480 pixels a side: soft colours with grain, so that they are as hard to decode as photographs."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        width, height = (int(side) for side in rng.integers(224, 481, 2))
        colours = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        soft = np.asarray(colours.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        grain = rng.normal(0, 8, (height, width, 1)).astype(np.float32)
        Image.fromarray(np.clip(soft + grain, 0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)


def write_rows(path: Path, pictures: list[int], spoken: list[tuple[str, str]]) -> None:
    """A conversation of one question and its answer to each picture, in the project's record format."""
    with path.open("w", encoding="utf-8") as file:
        for picture, (question, answer) in zip(pictures, spoken, strict=True):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"conversations": turns, "image": f"{picture}.jpg"}) + "\n")


def tokenise_rows(world: World, table: str, llm: Path, tokens: int, *, images: ImageRoot | None = None, name: str = "") -> None:
    """The token table `name` of a file of records, for a tokenizer and so many placeholders a picture."""
    builder = PromptBuilder(str(llm), image_token=IMAGE_TOKEN, tokens=tokens)
    tokenizer = RowTokenizer(builder, images or ImageRoot(world.images), 1536, "stop")
    records = RowPolicy("stop", 0).keep(open_source(SourceSpec(str(world.records(table)))).records())
    batches = tokenize(records, tokenizer, Summary(), workers=1, progress=lambda _: None)
    write_tokens(world.tokens(name or table), batches, builder.spec())
