"""Benchmarks as their authors publish them: the same questions and pictures as from the hub's copies; mistakes in one line."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_benchmarks import rows_of

from pipeline.core import PipelineError
from pipeline.score.benchmark import Benchmark
from pipeline.score.published import PUBLISHED
from pipeline.score.tasks import TASKS

COUNT = 50
Rows = list[dict[str, Any]]


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def vqav2(folder: Path, rows: Rows) -> list[str]:
    """As visualqa.org has it; the files need not have the same order."""
    shown = [{"image_id": row["picture"], "question": row["question"], "question_id": row["question_id"]} for row in rows]
    head = {"info": {"version": "2.0", "year": 2017}, "data_type": "mscoco", "data_subtype": "val2014", "license": {"name": "CC"}}
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", head | {"questions": shown[::-1]})
    known = [{key: row[key] for key in ("answers", "multiple_choice_answer", "answer_type", "question_id")} for row in rows]
    write(folder / "v2_mscoco_val2014_annotations.json", head | {"annotations": known})
    write(folder / "v2_OpenEnded_mscoco_train2014_questions.json", head | {"questions": []})
    return [f"val2014/COCO_val2014_{row['picture']:012}.jpg" for row in rows]


def gqa(folder: Path, rows: Rows) -> list[str]:
    named = {row["id"]: {key: row[key] for key in ("imageId", "question", "answer")} | {"isBalanced": True} for row in rows}
    write(folder / "questions/testdev_balanced_questions.json", named)
    return [f"images/{row['imageId']}.jpg" for row in rows]


def textvqa(folder: Path, rows: Rows) -> list[str]:
    own = [{"question": row["question"], "image_id": f"i{row['picture']}", "answers": row["answers"]} for row in rows]
    write(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "dataset_name": "textvqa", "data": own})
    return [f"train_images/i{row['picture']}.jpg" for row in rows]


def pope(folder: Path, rows: Rows) -> list[str]:
    rows.sort(key=lambda row: row["category"])
    names = [f"COCO_val2014_{row['picture']:012}.jpg" for row in rows]
    for kind in {row["category"] for row in rows}:
        lines = [
            json.dumps({"question_id": number, "image": name, "text": row["question"], "label": row["answer"]})
            for number, (row, name) in enumerate(zip(rows, names, strict=True))
            if row["category"] == kind
        ]
        write(folder / f"output/coco/coco_pope_{kind}.json", "\n".join(lines))
    return [f"val2014/{name}" for name in names]


def mme(folder: Path, rows: Rows) -> list[str]:
    rows.sort(key=lambda row: (row["category"], str(row["question_id"])))
    shown = []
    for row in rows:
        within = row["category"] in ("existence", "color")  # half of the categories come in two folders
        base = folder / "MME_Benchmark" / row["category"]
        text = (base / "questions_answers_YN" if within else base) / f"{row['question_id']}.txt"
        old = text.read_text() if text.exists() else ""
        write(text, f"{old}{row['question']}\t{row['answer']}\n")
        shown.append(str(((base / "images" if within else base) / f"{row['question_id']}.png").relative_to(folder)))
    write(folder / "README.txt", "MME")
    return shown


def chartqa(folder: Path, rows: Rows) -> list[str]:
    rows.sort(key=lambda row: row["type"])
    for kind in ("human", "augmented"):
        own = [row for row in rows if row["type"] == f"{kind}_test"]
        listed = [{"imgname": f"{row['picture']}.png", "query": row["question"], "label": row["answer"]} for row in own]
        write(folder / f"test/test_{kind}.json", listed)
    return [f"test/png/{row['picture']}.png" for row in rows]


WRITERS: dict[str, Callable[[Path, Rows], list[str]]] = {
    "vqav2": vqav2,
    "gqa": gqa,
    "textvqa": textvqa,
    "pope": pope,
    "mme": mme,
    "chartqa": chartqa,
}


def write_published(folder: Path, name: str, png: Callable[[int], bytes]) -> Rows:
    """Files and pictures as the authors lay them out; the rows in the order in which they are asked."""
    rows = rows_of(name, COUNT)
    for row, shown in zip(rows, WRITERS[name](folder, rows), strict=True):
        (folder / shown).parent.mkdir(parents=True, exist_ok=True)
        (folder / shown).write_bytes(png(row["picture"]))
    return rows


def test_every_layout_has_rows_here() -> None:
    assert WRITERS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_questions_and_pictures_are_those_of_the_hubs_copy(
    tmp_path: Path, png: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rows = write_published(tmp_path / "copy", name, png)
    monkeypatch.chdir(tmp_path)
    benchmark = Benchmark(name, "copy")
    asked = list(benchmark.questions())
    assert [each.question for each in asked] == [TASKS[name].question({**row, "image": {"bytes": b"1"}}) for row in rows]
    if name != "mme":  # made rows give the pair of a picture two of them
        assert [benchmark.images.read(each.picture[0]) for each in asked] == [png(row["picture"]) for row in rows]
    assert all(benchmark.images.read(each.picture[0]) for each in asked)
    assert len({each.where for each in asked}) == len(asked)


@pytest.mark.parametrize(
    ("name", "file", "edit", "said"),
    [
        ("vqav2", "v2_mscoco_val2014_annotations.json", None, "no file of its annotations"),
        ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", None, "no file of its questions"),
        ("vqav2", "v2_mscoco_val2014_annotations.json", lambda text: text[:-60], "JSON"),
        ("vqav2", "v2_mscoco_val2014_annotations.json", '{"annotations": []}', "50 questions have no answer"),
        ("vqav2", "v2_mscoco_val2014_annotations.json", '{"info": 1}', "expected a JSON array under 'annotations'"),
        ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", lambda text: text.replace("image_id", "x"), "'image_id'"),
        ("vqav2", "old/OpenEnded_mscoco_val2014_questions.json", "{}", "are here, which are the same part of vqav2"),
        ("textvqa", "TextVQA_0.5_val.json", "{}", "both TextVQA_0.5.1_val.json and TextVQA_0.5_val.json are here"),
        ("gqa", "questions/testdev_balanced_questions.json", lambda text: text[:-9], "not a row of gqa as published"),
        ("gqa", "questions/testdev_balanced_questions.json", "[]", "not a row of gqa as published"),
        ("textvqa", "TextVQA_0.5.1_val.json", lambda text: text.replace('"answers"', '"x"'), "not a row of textvqa"),
        ("pope", "output/coco/coco_pope_random.json", lambda text: text.replace("label", "x"), "'label'"),
        ("pope", "output/coco/coco_pope_random.json", lambda text: re.sub('"image": "[^"]*"', '"image": ["a"]', text), "is ['a']"),
        ("pope", "output/coco/coco_pope_random.json", lambda text: re.sub('"image": "[^"]*"', '"image": ""', text), "is ''"),
        ("chartqa", "test/test_human.json", lambda text: text.replace("imgname", "x"), "'imgname'"),
        ("mme", "MME_Benchmark/OCR/note.txt", "no question\n", "not a row of mme as published"),
    ],
)
def test_what_is_damaged_or_missing_is_one_line(
    tmp_path: Path, png: Callable[[int], bytes], name: str, file: str, edit: Callable[[str], str] | str | None, said: str
) -> None:
    write_published(tmp_path, name, png)
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    if edit is None:
        path.unlink()
    else:
        path.write_text(edit if isinstance(edit, str) else edit(path.read_text()))
    with pytest.raises(PipelineError) as error:
        list(Benchmark(name, tmp_path).questions())
    assert said in error.value.line()
    assert "\n" not in error.value.line()
