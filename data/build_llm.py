"""Train the embedded world's language model: a small Llama that has read, and never seen.

Reads data/easyvqa/ (captions and questions of the training half, as text: no picture is
opened). Writes data/models/llm/ in the format of a hub model: tokenizer, ChatML template,
weights. Its schooling are dialogues whose first turn tells in words what a picture shows,
somewhere in a stretch of other words, and then asks. It exists so that the pipeline can teach
it to see in minutes, offline.
"""

import json
import math
import random
import shutil
import time
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DATA = Path(__file__).parent
SOURCE, OUT = DATA / "easyvqa", DATA / "models" / "llm"
SEED, THREADS = 0, 2  # the bytes written depend on both
STEPS, BATCH, LR, WEIGHT_DECAY, WARMUP = 680, 64, 2.5e-3, 0.1, 60
EASY, HARD = 0.25, 0.6  # texts are short and clear up to the first share of the training,
# then longer and fainter up to the second
VOCABULARY, CONTEXT = 640, 1024
PAD, START, END, IMAGE = SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DESCRIPTIONS = (
    "a {c} {s}",
    "{c} {s}",
    "The picture shows a {c} {s}.",
    "There is a {c} {s} in it.",
    "One can see a {s}. It is {c}.",
    "In the image there is a {s}, and the {s} is {c}.",
    "Its color is {c} and its shape is a {s}.",
    "shape: {s}, color: {c}",
    "I drew one {s} with a {c} pen.",
    "The only thing there is {c}, a {s}.",
)
FILLERS = (
    "The background is light.",
    "It was made by a computer.",
    "The picture is small.",
    "Nothing else can be seen.",
    "I found it on my desk this morning.",
    "It is not in the middle.",
    "A friend sent it to me.",
    "Look at it for a while.",
    "There is a lot of empty space around it.",
    "The lines are sharp.",
    "and so on,",
    "well,",
)
SMALL_TALK = (
    ("Hello.", "Hello! Show me a picture and ask about it."),
    ("Who are you?", "A small language model that knows shapes and colors."),
    ("What can you do?", "I can tell the color and the shape of what a picture shows."),
    ("Thank you.", "You are welcome."),
    ("Goodbye.", "Goodbye!"),
)
PLAIN = (
    "A triangle has three sides. A rectangle has four sides. A circle has none.",
    "Some {s}s are {c}, and some are not. Every {c} {s} is a {s}.",
    "If a shape is {c}, then it has a color. If a shape is a {s}, then it is not of another shape.",
    "Black, blue, brown, gray, green, red, teal and yellow are colors.",
    "Yesterday I saw a {c} {s}. Today the {c} {s} is still there.",
    "Question: what is a {s}? It is a shape. Question: what is {c}? It is a color.",
)


Scene = tuple[str, str]  # colour, shape
Lessons = dict[Scene, list[tuple[str, str]]]  # what may be asked of a scene, with the answers


class Row(NamedTuple):
    """One training text of T tokens.

    A token's embedding is a weighted sum of three, plus noise; plain text is weights (1, 0, 0).
    """

    ids: list[tuple[int, int, int]]
    weights: list[tuple[float, float, float]]
    noise: list[float]
    supervised: list[bool]


def read_lessons() -> Lessons:
    """The training questions, each tied to the caption of the picture it was asked about."""
    scene_of: dict[str, Scene] = {}
    lessons: dict[Scene, dict[str, str]] = defaultdict(dict)
    for name in ("captions", "questions"):
        for line in (SOURCE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            request, reply = (message["content"] for message in record["messages"])
            picture = record["images"][0]
            if name == "captions":
                _, colour, shape = reply.rstrip(".").split()
                scene_of[picture] = (colour, shape)
            lessons[scene_of[picture]][request.removeprefix(f"{IMAGE}\n")] = reply
    return {scene: sorted(lessons[scene].items()) for scene in sorted(lessons)}


def describe(scene: Scene, words: random.Random, level: float) -> str:
    """A scene in words, one to three times, among sentences that say nothing of it."""
    parts = [words.choice(DESCRIPTIONS).format(c=scene[0], s=scene[1]) for _ in range(words.choice((1, 1, 1, 2, 3)))]
    for _ in range(round(level * words.choice((0, 0, 1, 2, 3, 4, 6)))):
        parts.insert(words.randint(0, len(parts)), words.choice(FILLERS))
    return " ".join(parts)


def build_tokenizer(lessons: Lessons) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from the training text."""
    words = random.Random(SEED)
    corpus = [text for pair in SMALL_TALK for text in pair]
    for scene in [*lessons] * 8:
        corpus += [describe(scene, words, 1.0), words.choice(PLAIN).format(c=scene[0], s=scene[1])]
        corpus += [f"user\n{text}assistant\n" for pair in lessons[scene] for text in pair]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START, IMAGE],
        chat_template=TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


class Writer:
    """Writes training texts as rows of token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, lessons: Lessons) -> None:
        self.lessons, self.words = lessons, random.Random(SEED)
        self.encode = cache(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
        telling = {self.encode(f" {word}")[0] for scene in lessons for word in scene}
        self.level = 0.0  # how hard the texts are, 0 to 1
        self.ordinary = [i for i in range(len(SPECIAL), len(tokenizer)) if i not in telling]

    def add(self, row: Row, text: str, *, supervised: bool = False) -> None:
        """Append plain text to a row."""
        for token in self.encode(text):
            row.ids.append((token, 0, 0))
            row.weights.append((1.0, 0.0, 0.0))
            row.noise.append(0.0)
            row.supervised.append(supervised)

    def smear(self, row: Row, scene: Scene) -> None:
        """Append a scene as a stretch of words laid over each other, blurred, in no order.

        Text that lost its spelling: the model must find a meaning wherever it is, however
        faint or mixed with others, as it will have to in what a projector hands it.
        """
        words = self.words
        colour, shape = (self.encode(f" {word}")[0] for word in scene)
        longest = 8 + round(64 * self.level)
        length = words.choice((max(2, longest - 8), words.randint(2, longest)))
        density, faintest = words.choice((0.1, 0.4, 1.0, 1.0)), 1.0 - 0.8 * self.level
        loudness = math.exp(self.level * words.uniform(-0.7, 3.0))  # projectors are rarely in scale
        noise = loudness * self.level * words.choice((0.0, words.uniform(0.0, 1.0)))
        common = words.choice(self.ordinary)
        carriers = set(words.sample(range(length), max(2, round(length * density))))
        first, last = min(carriers), max(carriers)
        together = words.random() < 0.6
        for place in range(length):
            other = common if words.random() < 0.5 else words.choice(self.ordinary)
            c, s = words.uniform(faintest, 2.0), words.uniform(faintest, 2.0)
            if place not in carriers:
                c = s = 0.0
            elif not together:  # one word a place, each at least once
                colours = place == first or (place != last and words.random() < 0.5)
                c, s = (c, 0.0) if colours else (0.0, s)
            row.ids.append((colour, shape, other))
            other_weight = words.uniform(0.0, 1.0)
            row.weights.append((loudness * c, loudness * s, loudness * other_weight))
            row.noise.append(noise)
            row.supervised.append(False)

    def write_dialogue(self) -> Row:
        """A description of one kind or another, then one to five questions about it."""
        row, words = Row([], [], [], []), self.words
        scene = words.choice([*self.lessons])
        lessons = words.choices(self.lessons[scene], k=words.choice((1, 2, 3, 4, 5)))
        if words.random() < 0.5 - 0.4 * self.level:
            lessons[0] = ("Describe the image.", f"A {scene[0]} {scene[1]}.")
        self.add(row, f"{START}user\n")
        kind = words.random()
        if kind < 0.6:
            self.smear(row, scene)
        elif kind < 0.97:
            self.add(row, describe(scene, words, self.level))
        for turn, (question, answer) in enumerate(lessons):
            if words.random() < 0.2:
                question = question[0].upper() + question[1:]
            lead = "\n" if turn == 0 else f"{START}user\n"
            self.add(row, f"{lead}{question}{END}\n{START}assistant\n")
            self.add(row, f"{answer}{END}", supervised=True)
            self.add(row, "\n")
        return row

    def write_row(self) -> Row:
        """Mostly dialogues about a picture; some small talk and some plain text."""
        row, kind = Row([], [], [], []), self.words.random()
        if kind < 0.02:
            question, answer = self.words.choice(SMALL_TALK)
            self.add(row, f"{START}user\n{question}{END}\n{START}assistant\n")
            self.add(row, f"{answer}{END}", supervised=True)
        elif kind < 0.05:
            colour, shape = self.words.choice([*self.lessons])
            text = self.words.choice(PLAIN).format(c=colour, s=shape)
            self.add(row, f"{text}{PAD}", supervised=True)
        else:
            row = self.write_dialogue()
        return row


def build_model(vocabulary: int) -> LlamaForCausalLM:
    """A Llama with random weights."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.08,  # about 1/sqrt(width): attention wakes early in a narrow model
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL.index(PAD),
        bos_token_id=None,
        eos_token_id=SPECIAL.index(END),
    )
    return LlamaForCausalLM(config)


def measure_loss(model: LlamaForCausalLM, rows: list[Row], generator: torch.Generator) -> Tensor:
    """Mean loss over the supervised tokens of a batch.

    Rows are padded on the right and attention is causal, so no mask is needed.
    """
    length = max(len(row.ids) for row in rows)
    ids = torch.tensor([r.ids + [(0, 0, 0)] * (length - len(r.ids)) for r in rows])  # [B,T,3]
    weights = torch.tensor([r.weights + [(0.0,) * 3] * (length - len(r.ids)) for r in rows])
    noise = torch.tensor([r.noise + [0.0] * (length - len(r.ids)) for r in rows])  # [B,T]
    supervised = torch.tensor([r.supervised + [False] * (length - len(r.ids)) for r in rows])
    table = model.get_input_embeddings().weight  # [V,D]
    embedded = sum(weights[..., i, None] * F.embedding(ids[..., i], table) for i in range(3))
    blur = torch.randn(embedded.shape, generator=generator) * noise[..., None]
    hidden = model.model(inputs_embeds=embedded + blur * table.detach().std()).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][supervised[:, 1:]])  # [N,V]
    return F.cross_entropy(logits, ids[:, 1:, 0][supervised[:, 1:]])


def train(model: LlamaForCausalLM, writer: Writer) -> None:
    """Train in place; rows of like length share a batch."""
    generator = torch.Generator().manual_seed(SEED)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": rest}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, step / WARMUP) * (0.55 + 0.45 * math.cos(math.pi * step / STEPS)),
    )
    batches: list[list[Row]] = []
    progress = tqdm(range(STEPS), desc="training the language model")
    for step in progress:
        if not batches:
            writer.level = min(1.0, max(0.0, (step / STEPS - EASY) / (HARD - EASY)))
            rows = sorted((writer.write_row() for _ in range(BATCH * 20)), key=lambda r: len(r.ids))
            batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
            writer.words.shuffle(batches)
        loss = measure_loss(model, batches.pop(), generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def main() -> None:
    """Build the tokenizer, train, save."""
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    lessons = read_lessons()
    tokenizer = build_tokenizer(lessons)
    model = build_model(len(tokenizer))
    print(f"{len(tokenizer)} token ids, {model.num_parameters():,} parameters")
    started = time.perf_counter()
    train(model, Writer(tokenizer, lessons))
    print(f"trained in {time.perf_counter() - started:.0f} s")
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    shutil.rmtree(OUT, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(OUT)
    tokenizer.save_pretrained(OUT)


if __name__ == "__main__":
    main()
