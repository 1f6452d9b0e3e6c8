"""Turn the public easy-VQA benchmark into this project's own data format.

Reads the PyPI package `easy_vqa` (64 x 64 pictures of one coloured shape, and
questions about them). Writes data/easyvqa/ (one archive of pictures, captions and
questions as JSON lines, each with its held-out half) and data/samples/ (six held-out
pictures as files). easy-VQA has no captions: they follow from a picture's questions, and
where those leave a choice, from its pixels. Held-out pictures are told by content hash.
"""

import hashlib
import io
import json
import random
import shutil
import zipfile
from pathlib import Path
from typing import NamedTuple

import easy_vqa
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from talks import count_pictures, plan_talk, write_talk
from tqdm import tqdm

SOURCE = Path(easy_vqa.__file__).parent / "data"
DATA = Path(__file__).parent
OUT, SAMPLES = DATA / "easyvqa", DATA / "samples"
SPLITS = {"train": "", "test": "_heldout"}  # easy-VQA's split -> our file name suffix
COLOURS = {  # the fills easy-VQA draws with
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
SHAPES = ("circle", "rectangle", "triangle")
CAPTION_REQUEST = "Describe the image."
SAMPLE_SCENES = (  # one held-out picture each, so that the samples differ
    ("blue", "circle"),
    ("red", "triangle"),
    ("yellow", "rectangle"),
    ("teal", "triangle"),
    ("black", "rectangle"),
    ("green", "circle"),
)
ALONE = 0.3  # share of the pictures whose questions are rows of their own in the fine-tuning data
TALKS, TALKS_SEED = 3000, 0  # and conversations about several pictures
ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # a fixed time stamp: same pictures, same bytes


class Scene(NamedTuple):
    """What a picture shows."""

    colour: str
    shape: str


class Question(NamedTuple):
    """One easy-VQA question: its text, its one-word answer, the picture's number."""

    text: str
    answer: str
    picture: int


ALL_SCENES = tuple(Scene(colour, shape) for colour in COLOURS for shape in SHAPES)


def expected_answer(text: str, scene: Scene) -> str | None:
    """easy-VQA's answer to `text` for `scene`; None where the question cannot be asked of it."""
    words = text.rstrip("?").split()
    named = {word for word in words if word in {*COLOURS, *SHAPES}}
    if words[0] != "what":
        negated = "no" in words or "not" in words
        return "yes" if bool(named & set(scene)) != negated else "no"
    if not named <= set(scene):
        return None
    return scene.colour if "color" in words else scene.shape


def see_scene(png: bytes) -> Scene:
    """The scene as the pixels show it: the fill that is there, and the outline's proportions."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    masks = {colour: (pixels == fill).all(-1) for colour, fill in COLOURS.items()}
    colour = max(masks, key=lambda name: masks[name].sum())
    rows, columns = np.nonzero(masks[colour])
    box = masks[colour][rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    half = len(box) // 2
    if box.all():
        shape = "rectangle"
    else:  # a triangle stands on its base, a circle is as heavy above as below
        shape = "triangle" if box[:half].sum() < 0.6 * box[-half:].sum() else "circle"
    return Scene(colour, shape)


def find_scenes(pictures: dict[int, bytes], questions: list[Question]) -> dict[int, Scene]:
    """What each picture shows: the scene that agrees with all its questions.

    Where several do (a tenth of the pictures), the pixels decide. They are read for every
    picture, so that the reading is proven on the others. Raises ValueError where it differs.
    """
    allowed = {picture: set(ALL_SCENES) for picture in pictures}
    for text, answer, picture in questions:
        scenes = allowed[picture]
        allowed[picture] = {s for s in scenes if expected_answer(text, s) == answer}
    seen = {p: see_scene(png) for p, png in tqdm(pictures.items(), desc="checking captions")}
    wrong = [p for p, scenes in allowed.items() if seen[p] not in scenes]
    if wrong:
        raise ValueError(
            f"{len(wrong)} pictures contradict their questions; picture {wrong[0]} looks like "
            f"{seen[wrong[0]]}, its questions allow {sorted(allowed[wrong[0]])}"
        )
    certain = sum(len(scenes) == 1 for scenes in allowed.values())
    print(f"captions: {certain} from questions alone, {len(seen) - certain} with the pixels' help")
    return seen


def phrase_answer(answer: str) -> str:
    """A one-word answer as a short natural one: "Yes.", "Blue.", "A rectangle."."""
    return f"A {answer}." if answer in SHAPES else f"{answer.capitalize()}."


def make_record(split: str, picture: int, request: str, reply: str) -> str:
    """One line of a data file: a picture and one exchange about it."""
    record = {
        "images": [f"{split}/{picture}.png"],
        "messages": [
            {"role": "user", "content": f"<image>\n{request}"},
            {"role": "assistant", "content": reply},
        ],
    }
    return json.dumps(record, separators=(",", ":")) + "\n"


def read_split(split: str) -> tuple[dict[int, bytes], list[Question]]:
    """A split's pictures (number -> PNG bytes, in order) and its questions."""
    paths = sorted((SOURCE / split / "images").glob("*.png"), key=lambda path: int(path.stem))
    pictures = {int(p.stem): p.read_bytes() for p in tqdm(paths, desc=f"reading {split} pictures")}
    questions = json.loads((SOURCE / split / "questions.json").read_text(encoding="utf-8"))
    return pictures, [Question(*question) for question in questions]


def drop_leaked(train: dict[int, bytes], test: dict[int, bytes]) -> int:
    """Remove from `train` every picture that is also in `test`, byte for byte; returns how many."""
    held_out = {hashlib.sha256(png).digest() for png in test.values()}
    leaked = [p for p, png in train.items() if hashlib.sha256(png).digest() in held_out]
    for picture in leaked:
        del train[picture]
    return len(leaked)


def write_archive(path: Path, members: dict[str, bytes]) -> None:
    """An uncompressed zip whose bytes depend on its members alone."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in tqdm(sorted(members), desc=f"writing {path.name}"):
            info = zipfile.ZipInfo(name, ZIP_TIME)
            info.create_system = 3  # the same on every operating system
            info.external_attr = 0o644 << 16
            archive.writestr(info, members[name])


def write_lines(path: Path, lines: list[str]) -> None:
    """Write a data file and say how many records it holds."""
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
    print(f"{path.name}: {len(lines)} records")


def write_split(split: str, scenes: dict[int, Scene], questions: list[Question]) -> None:
    """The captions and questions of one split."""
    captions = [
        make_record(split, picture, CAPTION_REQUEST, f"A {scene.colour} {scene.shape}.") for picture, scene in scenes.items()
    ]
    answers = [make_record(split, q.picture, q.text, phrase_answer(q.answer)) for q in questions]
    write_lines(OUT / f"captions{SPLITS[split]}.jsonl", captions)
    write_lines(OUT / f"questions{SPLITS[split]}.jsonl", answers)


def write_conversations(split: str, scenes: dict[int, Scene], questions: list[Question]) -> None:
    """The fine-tuning data: every question of some pictures, and conversations about several of all.

    In these a picture may be asked what was asked of another that shows the same.
    """
    draw, lessons = random.Random(TALKS_SEED), dict[Scene, dict[str, str]]()
    for question in questions:
        lessons.setdefault(scenes[question.picture], {})[question.text] = phrase_answer(question.answer)
    alone = set(draw.sample(sorted(scenes), round(ALONE * len(scenes))))
    rows = [json.loads(make_record(split, q.picture, q.text, phrase_answer(q.answer))) for q in questions if q.picture in alone]
    for _ in range(TALKS):
        steps = plan_talk(draw)
        pictures = draw.sample(sorted(scenes), count_pictures(steps))
        messages = []
        for turn in write_talk([lessons[scenes[picture]] for picture in pictures], steps, draw):
            messages.append({"role": "user", "content": "<image>\n" * len(turn.shown) + turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        rows.append({"images": [f"{split}/{picture}.png" for picture in pictures], "messages": messages})
    pq.write_table(pa.Table.from_pylist(rows), OUT / "conversations.parquet", compression="zstd")
    print(f"conversations.parquet: {len(rows)} records, {TALKS} of them about several pictures")


def write_samples(pictures: dict[int, bytes], scenes: dict[int, Scene]) -> None:
    """Six held-out pictures as files, named by number so that the name gives nothing away."""
    for wanted in SAMPLE_SCENES:
        picture = next(number for number, scene in scenes.items() if scene == wanted)
        (SAMPLES / f"test-{picture}.png").write_bytes(pictures[picture])


def main() -> None:
    """Build data/easyvqa and data/samples anew."""
    for folder in (OUT, SAMPLES):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    splits = {split: read_split(split) for split in SPLITS}
    leaked = drop_leaked(splits["train"][0], splits["test"][0])
    print(f"train pictures dropped because they are also test pictures: {leaked}")
    members: dict[str, bytes] = {}
    for split, (pictures, questions) in splits.items():
        kept = [question for question in questions if question.picture in pictures]
        scenes = find_scenes(pictures, kept)
        write_split(split, scenes, kept)
        members |= {f"{split}/{number}.png": png for number, png in pictures.items()}
        if split == "train":
            write_conversations(split, scenes, kept)
        else:
            write_samples(pictures, scenes)
    write_archive(OUT / "images.zip", members)


if __name__ == "__main__":
    main()
