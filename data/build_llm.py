"""Train the embedded world's language model: a small Llama that has read, and never seen.

Reads data/easyvqa/ (captions and questions of the training half, as text: no picture is
opened). Writes data/models/llm/ in the format of a hub model: tokenizer, ChatML template,
weights. It exists so that the pipeline can teach it to see in minutes, offline. What it reads is
`schooling.py`'s: first dialogues about one picture, then mostly talks about several.
"""

import math
import random
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from schooling import END, IMAGE, PAD, PLAIN, SEED, SMALL_TALK, SPECIAL, START, Lessons, Row, Writer, describe, read_lessons
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUT = Path(__file__).parent / "models" / "llm"
THREADS, WEIGHT_DECAY = 2, 0.1


class Course(NamedTuple):
    """One training: `talks` is the share of its rows about several pictures.

    Texts are short and clear up to the share `easy` of the steps, then longer and fainter up to `hard`.
    """

    steps: int
    batch: int  # rows of an optimiser step
    piece: int  # rows of a forward pass
    written: int  # batches written at a time, equally hard; rows of like length share one
    lr: float
    warmup: int
    easy: float
    hard: float
    talks: float


COURSES = (
    Course(steps=680, batch=64, piece=64, written=20, lr=2.5e-3, warmup=60, easy=0.25, hard=0.6, talks=0.0),
    Course(steps=1200, batch=32, piece=12, written=10, lr=2e-3, warmup=50, easy=0.0, hard=0.8, talks=0.85),
)
VOCABULARY, CONTEXT = 640, 1024
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


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


def train(model: LlamaForCausalLM, writer: Writer, course: Course) -> None:
    """Train in place."""
    generator = torch.Generator().manual_seed(SEED)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": rest}]
    optimizer = torch.optim.AdamW(groups, lr=course.lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, step / course.warmup) * (0.55 + 0.45 * math.cos(math.pi * step / course.steps)),
    )
    batches: list[list[Row]] = []
    for step in tqdm(range(course.steps), desc="training the language model"):
        if not batches:
            writer.level = min(1.0, max(0.0, (step / course.steps - course.easy) / (course.hard - course.easy)))
            rows = sorted((writer.write_row() for _ in range(course.batch * course.written)), key=lambda r: len(r.ids))
            batches = [rows[i : i + course.batch] for i in range(0, len(rows), course.batch)]
            writer.words.shuffle(batches)
        batch = batches.pop()
        supervised = sum(sum(row.supervised) for row in batch)
        optimizer.zero_grad()
        for first in range(0, len(batch), course.piece):
            piece = batch[first : first + course.piece]
            share = sum(sum(row.supervised) for row in piece) / supervised
            (measure_loss(model, piece, generator) * share).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def round_weights(model: LlamaForCausalLM) -> None:
    """Round the weights to bfloat16 in place, as the files hold them: a course can be given again from the last one's file."""
    for weight in model.parameters():
        weight.copy_(weight.bfloat16())


def main() -> None:
    """Build the tokenizer, train, save."""
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    lessons = read_lessons()
    tokenizer = build_tokenizer(lessons)
    model = build_model(len(tokenizer))
    print(f"{len(tokenizer)} token ids, {model.num_parameters():,} parameters")
    started = time.perf_counter()
    for course in COURSES:
        train(model, Writer(tokenizer, lessons, course.talks), course)
        round_weights(model)
    print(f"trained in {time.perf_counter() - started:.0f} s")
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    shutil.rmtree(OUT, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(OUT)
    tokenizer.save_pretrained(OUT)


if __name__ == "__main__":
    main()
