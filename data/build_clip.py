"""Train the embedded world's vision encoder: a small CLIP, on easy-VQA's training pictures.

Reads data/easyvqa/ (the training pictures and their captions; the held-out ones only for the
accuracy printed at the end). Writes data/models/clip/ in the format of a hub model, so that
`CLIPModel`, `CLIPVisionModel` and `AutoImageProcessor` load it by `from_pretrained`. It exists
so that the whole pipeline runs on a real pretrained encoder, offline and in minutes.
"""

import io
import json
import random
import shutil
import time
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

DATA = Path(__file__).parent
SOURCE, OUT = DATA / "easyvqa", DATA / "models" / "clip"
SEED, THREADS = 0, 2  # the bytes written depend on both
EPOCHS, BATCH, LR, WEIGHT_DECAY, WARMUP = 16, 100, 2e-3, 0.05, 0.08
IMAGE, PATCH, TEXT_LENGTH = 64, 8, 16
CAPTIONS = (
    "a {colour} {shape}",
    "a picture of a {colour} {shape}",
    "the {shape} is {colour}",
    "one {colour} {shape} on a light background",
    "this image shows a {shape} in {colour}",
    "there is a {colour} {shape} here",
)
PAD, UNKNOWN, START, END = SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")  # ids 0 to 3


def read_captions(path: Path) -> list[tuple[str, str, str]]:
    """(member of the archive, colour, shape) of every caption "A blue circle."."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        _, colour, shape = record["messages"][1]["content"].rstrip(".").split()
        rows.append((record["images"][0], colour, shape))
    return rows


def read_pixels(names: list[str], processor: CLIPImageProcessorPil) -> Tensor:
    """Pictures as the encoder's processor makes them: [N,3,IMAGE,IMAGE] float32."""
    pixels = []
    with zipfile.ZipFile(SOURCE / "images.zip") as archive:
        for name in tqdm(names, desc="reading pictures"):
            picture = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
            pixels.append(processor(picture, return_tensors="pt")["pixel_values"][0])
    return torch.stack(pixels)


def build_tokenizer(scenes: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """One id a word: the captions need nothing more."""
    texts = {form.format(colour=c, shape=s) for form in CAPTIONS for c, s in scenes}
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(token, SPECIAL.index(token)) for token in (START, END)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        model_max_length=TEXT_LENGTH,
    )


def build_model(vocabulary: int) -> CLIPModel:
    """A CLIP with random weights: 64 patches of width 128, and a text tower half as wide."""
    shared = {"num_attention_heads": 4, "hidden_act": "gelu"}
    vision = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "image_size": IMAGE,
        "patch_size": PATCH,
    }
    text = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "vocab_size": vocabulary,
        "max_position_embeddings": TEXT_LENGTH,
        "pad_token_id": SPECIAL.index(PAD),
        "bos_token_id": SPECIAL.index(START),
        "eos_token_id": SPECIAL.index(END),  # 3; CLIPTextModel takes a 2 for "the highest id"
    }
    config = CLIPConfig(vision_config=vision | shared, text_config=text | shared, projection_dim=64)
    return CLIPModel(config)


def move_shapes(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture mirrored or not, its shape moved anywhere it fits: [B,3,H,W] -> same.

    The backgrounds are of one colour, so a picture rolled by no more than its shape's margins
    is a picture that easy-VQA could have drawn.
    """
    size = pixels.shape[-1]
    background = pixels.flatten(2).mode(dim=2).values[..., None, None]  # [B,3,1,1]
    shape = (pixels != background).any(1)  # [B,H,W]
    index = []
    for axis in (2, 1):  # rows, then columns
        taken = shape.any(axis).int()  # [B,size]
        first, last = taken.argmax(1), size - 1 - taken.flip(1).argmax(1)
        chance = torch.rand(len(pixels), generator=generator)
        shift = -first + (chance * (size - last + first)).long()
        index.append((torch.arange(size)[None] - shift[:, None]) % size)  # [B,size]
    mirrored = torch.rand(len(pixels), generator=generator) < 0.5
    index[1] = torch.where(mirrored[:, None], index[1].flip(1), index[1])
    batch = torch.arange(len(pixels))[:, None, None]
    moved = pixels.permute(0, 2, 3, 1)[batch, index[0][:, :, None], index[1][:, None]]
    return moved.permute(0, 3, 1, 2)


def contrast(images: Tensor, texts: Tensor, same: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss, [B,D] and [B,D] -> scalar, where several pairs of a batch may mean the same.

    `same` [B,B] says which; the target is spread evenly over them.
    """
    logits = scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    target = same.float() / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def encode_views(model: CLIPModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The class token's and the mean patch's places in the shared space: two of [B,D].

    The second is for training only. Without it the patch tokens of the last layer, which are
    what the project caches, would learn nothing.
    """
    vision = model.vision_model(pixel_values=pixels)
    patches = model.vision_model.post_layernorm(vision.last_hidden_state[:, 1:].mean(1))
    return model.visual_projection(vision.pooler_output), model.visual_projection(patches)


def encode_texts(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Texts -> their places in the shared space, [B,D]."""
    ids = tokenizer(texts, padding=True, return_tensors="pt")
    text = model.text_model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])
    return model.text_projection(text.pooler_output)


def train(
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerFast,
    pixels: Tensor,
    scenes: list[tuple[str, str]],
) -> None:
    """Contrastive training, in place."""
    generator, words = torch.Generator().manual_seed(SEED), random.Random(SEED)
    meaning = torch.tensor([sorted(set(scenes)).index(scene) for scene in scenes])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * (len(pixels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=WARMUP, cycle_momentum=False)
    model.train()
    progress = tqdm(total=steps, desc="training CLIP")
    for _ in range(EPOCHS):
        order = torch.randperm(len(pixels), generator=generator)
        for rows in order.split(BATCH):
            if len(rows) < BATCH:
                break
            captions = [words.choice(CAPTIONS).format(colour=scenes[row][0], shape=scenes[row][1]) for row in rows.tolist()]
            texts = encode_texts(model, tokenizer, captions)
            same = meaning[rows][:, None] == meaning[rows][None]
            loss = sum(
                contrast(view, texts, same, model.logit_scale) / 2
                for view in encode_views(model, move_shapes(pixels[rows], generator))
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            progress.update()
    progress.close()


@torch.no_grad()
def measure(
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerFast,
    pixels: Tensor,
    scenes: list[tuple[str, str]],
) -> dict[str, float]:
    """Zero-shot accuracy: of all captions "a {colour} {shape}", is the right one nearest?"""
    model.eval()
    classes = sorted(set(scenes))
    captions = [CAPTIONS[0].format(colour=c, shape=s) for c, s in classes]
    texts = F.normalize(encode_texts(model, tokenizer, captions), dim=-1)
    truth = torch.tensor([classes.index(scene) for scene in scenes])
    views = [encode_views(model, part) for part in pixels.split(250)]
    names = ("zero_shot_accuracy", "zero_shot_accuracy_mean_patch")
    return {
        name: ((torch.cat(view) @ texts.T).argmax(1) == truth).float().mean().item()
        for name, view in zip(names, zip(*views, strict=True), strict=True)
    }


def main() -> None:
    """Train, measure, save."""
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE},
        crop_size={"height": IMAGE, "width": IMAGE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    rows = {half: read_captions(SOURCE / f"captions{half}.jsonl") for half in ("", "_heldout")}
    pixels = {half: read_pixels([r[0] for r in rows[half]], processor) for half in rows}
    scenes = {half: [(colour, shape) for _, colour, shape in rows[half]] for half in rows}
    tokenizer = build_tokenizer(scenes[""])
    model = build_model(len(tokenizer))
    vision = sum(p.numel() for p in model.vision_model.parameters())
    print(f"{model.num_parameters():,} parameters, {vision:,} in the vision tower")
    started = time.perf_counter()
    train(model, tokenizer, pixels[""], scenes[""])
    print(f"trained in {time.perf_counter() - started:.0f} s")
    metrics = measure(model, tokenizer, pixels["_heldout"], scenes["_heldout"])
    print(" ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    shutil.rmtree(OUT, ignore_errors=True)
    model.save_pretrained(OUT)
    processor.save_pretrained(OUT)
    tokenizer.save_pretrained(OUT)
    metrics = {name: round(value, 4) for name, value in metrics.items()}
    (OUT / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
