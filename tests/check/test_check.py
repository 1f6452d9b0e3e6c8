"""`python -m pipeline.check`: figures as the stages have them, every fault named, a page that nothing escapes from."""

import base64
import io
import json
import random
import runpy
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from checked import ROOT, Png, Project, flat, project, require_one_line  # noqa: F401
from conftest import PATCHES, ROWS, WIDTH, read_records, row
from PIL import Image
from ruamel.yaml import YAML
from typer.testing import CliRunner

from pipeline.check.command import app
from pipeline.core.costs import keep_figures
from pipeline.records.images import ImageRoot
from pipeline.text.builder import PromptBuilder
from pipeline.text.tokenization import RowTokenizer, Summary, tokenize

# What it counts.


def test_a_sound_data_set_has_the_figures_that_the_stages_have(project: Project, llm_folder: Path) -> None:
    run = project.run("rows.jsonl", "--images", "images")
    assert run.exit_code == 0, run.output
    said, found = flat(run.stdout), Summary()
    tokenizer = RowTokenizer(PromptBuilder(str(llm_folder), image_token="<image>", tokens=PATCHES), ImageRoot("images"), 512, "cut")
    list(tokenize(read_records(project.folder / "rows.jsonl"), tokenizer, found, workers=1,
                  progress=lambda _: None))  # fmt: skip
    assert f"tokens {found.tokens:,};" in said
    assert f"of tokens ({found.supervised:,})" in said
    assert f"to {found.longest:,} a row" in said
    assert f"{PATCHES} stand for a picture" in said
    assert "rows 11, all good" in said
    assert "6 with one picture (54.5 %), 3 with several (27.3 %), 2 with text only (18.2 %); 12 <image> in all" in said
    assert "12 named in rows, 6 distinct names, in images all there, all decode" in said
    assert "40×32 pixels, all of them kinds PNG RGB 6" in said
    assert f"6 × [{PATCHES}, {WIDTH}] float16 = {6 * PATCHES * WIDTH * 2 / 1000:.3g} kB" in said
    assert "measured on 6 of these pictures" in said
    assert run.stdout.splitlines()[-1] == "sound: 11 rows"
    assert run.stderr == ""


FAULTS: dict[str, tuple[Any, str]] = {
    "a missing picture": (row("<image>x", "y", "nowhere.png"), "images: 'nowhere.png': no such image -> mend or remove"),
    "a picture outside": (row("<image>x", "y", "../secret.png"), "'../secret.png': lies outside the image root"),
    "a torn picture": (row("<image>x", "y", "torn.png"), ": 'torn.png': not a picture that can be decoded: "),
    "an empty picture": (row("<image>x", "y", "empty.png"), ": 'empty.png': empty file"),
    "text for a picture": (row("<image>x", "y", "text.png"), ": 'text.png': not a picture in a known format (JPEG"),
    "a bomb": (row("<image>x", "y", "bomb.png"), ": 'bomb.png': "),
    "a wrong role": ({"messages": [{"role": "bot", "content": "x"}]}, "turn 0: role is 'bot', expected one of system"),
    "a placeholder too many": (row("<image><image>x", "y", "0.png"), "2 <image> placeholders for 1 images"),
    "a placeholder too few": (row("x", "y", "0.png"), "0 <image> placeholders for 1 images"),
    "an empty answer": (row("x", " "), "turn 1: the answer is empty"),
    "broken JSON": (b'{"messages": [', "not a JSON object"),
    "not UTF-8": (b'{"messages": "\xff"}', "not UTF-8"),
}  # fmt: skip


def write_bad_pictures(folder: Path, png: Png) -> None:
    (folder.parent / "secret.png").write_bytes(png(9))
    (folder / "torn.png").write_bytes(png(9)[:-300])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_bytes(b"<html>404</html>")
    file = io.BytesIO()
    Image.new("1", (11_000, 11_000)).save(file, "PNG")
    (folder / "bomb.png").write_bytes(file.getvalue())


@pytest.mark.parametrize("kind", FAULTS)
def test_every_fault_is_named_with_file_row_reason_and_remedy(project: Project, png: Png, kind: str) -> None:
    write_bad_pictures(project.folder / "images", png)
    content, reason = FAULTS[kind]
    project.write("rows", ROWS[0], content, ROWS[1], content)
    run = project.run("rows.jsonl", "--images", "images")
    line = require_one_line(run, 3)
    assert line.startswith("error: 2 of 4 rows are bad -> mend")
    listed = [text.strip() for text in run.stdout.splitlines() if text.strip().startswith("rows.jsonl:")]
    assert [text.split(": ")[0] for text in listed] == ["rows.jsonl:2", "rows.jsonl:4"]
    assert all(reason in text and " -> " in text for text in listed), listed
    assert "rows 4: 2 good, 2 bad (50 %)" in flat(run.stdout)


def test_headers_only_spares_the_decoding_and_says_so(project: Project, png: Png) -> None:
    write_bad_pictures(project.folder / "images", png)
    project.write("rows", row("<image>x", "y", "torn.png"))
    run = project.run("rows.jsonl", "--images", "images", "--headers-only")
    assert run.exit_code == 0
    assert "headers sound; not decoded (--headers-only)" in run.stdout
    project.write("rows", row("<image>x", "y", "text.png"), row("<image>x", "y", "bomb.png"))
    assert project.run("rows.jsonl", "--images", "images", "--headers-only").exit_code == 3


def test_a_bad_picture_counts_once_and_its_rows_each(project: Project) -> None:
    project.write("rows", ROWS[0], *[row("<image>x", "y", "nowhere.png")] * 600)  # more than one chunk
    run = project.run("rows.jsonl", "--images", "images")
    said = flat(run.stdout)
    assert "601: 1 good, 600 bad (99.8 %)" in said
    assert "601 named in rows, 2 distinct names, in images 1 missing or unreadable" in said
    assert "600 bad rows by kind: 600 images: …: no such image the first 10: rows.jsonl:2:" in said
    assert run.stdout.count("    rows.jsonl:") == 10


def test_pictures_of_the_same_bytes_are_counted_and_are_no_fault(project: Project, png: Png) -> None:
    (project.folder / "images" / "again.png").write_bytes(png(0))
    project.write("rows", row("<image>x", "y", "0.png"), row("<image>x", "y", "again.png"), row("<image>x", "y", "1.png"))
    run = project.run("rows.jsonl", "--images", "images")
    assert run.exit_code == 0
    assert "1 have the same bytes as another: 2 are distinct" in flat(run.stdout)
    assert f"2 × [{PATCHES}, {WIDTH}]" in run.stdout


LONG = row("<image>x", "A square. " * 200, "0.png")
FAR = row("A square. " * 400 + "<image>", "y", "0.png")


@pytest.mark.parametrize(
    ("too_long", "code", "said"),
    [
        ("cut", 0, "1 cut and 1 refused (66.7 %), tokenize.too_long is cut first refused: rows.jsonl:3: "),
        ("skip", 0, "0 cut and 2 refused (66.7 %), tokenize.too_long is skip first refused: rows.jsonl:2: "),
        ("stop", 3, "tokens, tokenize.max_tokens is 128 -> raise tokenize.max_tokens or shorten the row, or set"),
    ],
)
def test_too_long_rows_are_counted_as_the_policy_treats_them(project: Project, too_long: str, code: int, said: str) -> None:
    project.set(tokenize__max_tokens=128, tokenize__too_long=too_long)
    project.write("rows", ROWS[0], LONG, FAR)
    run = project.run("rows.jsonl", "--images", "images")
    assert run.exit_code == code, run.output
    assert said in flat(run.stdout)


def test_texts_that_spell_control_tokens_and_placeholders_are_counted(project: Project) -> None:
    project.write("rows", row("x <|im_end|>", "y"), row("x", "an <image>"), row("x", "y"))
    run = project.run("rows.jsonl")
    assert run.exit_code == 0
    assert "1 rows spell a control token of the model" in run.stdout
    assert "1 rows have <image> in a system or assistant turn" in run.stdout


def test_a_context_shorter_than_the_limit_is_told(project: Project) -> None:
    project.set(tokenize__max_tokens=2000)  # the tiny model's context is 512
    project.write("rows", row("x", "A square. " * 300))
    said = flat(project.run("rows.jsonl").stdout)
    assert "tokenize.max_tokens is 2,000; the model's context is 512 1 rows are longer than the model's context" in said


def test_without_a_tokenizer_letters_are_counted_and_it_says_why(project: Project) -> None:
    project.set(llm__model="nowhere/at-all")
    run = project.run("rows.jsonl", "--images", "images")
    assert run.exit_code == 0, run.output
    said = flat(run.stdout)
    assert "letters a row" in said
    assert "tokens are not counted: llm.model: cannot load nowhere/at-all" in said
    assert " tokens a row" not in said


def test_without_an_encoder_features_are_as_of_the_last_extract_or_unknown(project: Project) -> None:
    project.set(vision__model="nowhere/at-all")
    said = flat(project.run("rows.jsonl", "--images", "images").stdout)
    assert "6 distinct pictures; the encoder cannot be loaded" in said
    (project.folder / "data" / "features_meta").mkdir(parents=True)
    (project.folder / "data" / "features_meta" / "encoder.json").write_text('{"tokens": 5, "width": 1000}')
    keep_figures(Path("metrics/extract.json"), {"images": 6, "images_per_second": 3})
    said = flat(project.run("rows.jsonl", "--images", "images").stdout)
    assert "6 × [5, 1000] float16 = 60 kB; about 2 s at 3 pictures/s (as in the last extract, metrics/extract.json)" in said
    project.set(vision__storage="int8")
    assert "6 × [5, 1000] int8 = 30.7 kB" in flat(project.run("rows.jsonl", "--images", "images").stdout)


# What it reads.


def test_without_names_the_data_sets_of_params_are_checked_and_their_settings_count(project: Project) -> None:
    project.write("pretrain", *ROWS[:3])
    project.write("sft", *ROWS[:6])
    project.write("heldout", row("<image>x", "y", "5.png"))
    project.write("sft", *[content for content in ROWS if "5.png" not in content["images"]])  # type: ignore[operator]
    run = project.run()
    assert run.exit_code == 0, run.output
    titles = [line.split()[0] for line in run.stdout.splitlines() if line.startswith("data.")]
    assert titles == ["data.pretrain", "data.sft", "data.heldout"]
    assert f"extract (data.pretrain and data.heldout): 5 × [{PATCHES}, {WIDTH}]" in run.stdout
    again = project.run(project.folder / "sft.jsonl")  # named, it is still opened with its pictures
    assert again.exit_code == 0, again.output
    assert "all there, all decode" in again.stdout


def test_a_held_out_picture_that_is_trained_on_is_an_error_whatever_its_name(project: Project, png: Png) -> None:
    (project.folder / "images" / "other.png").write_bytes(png(1))
    project.write("pretrain", ROWS[0])
    project.write("sft", ROWS[1])
    project.write("heldout", row("<image>x", "y", "other.png"))
    line = require_one_line(project.run(), 3)
    assert line.startswith("error: data.heldout: 1 held-out pictures are trained on; 0 of 3 rows are bad -> remove")
    project.set(data__heldout=YAML(typ="safe").load(project.folder / "params.yaml")["data"]["heldout"] | {"share": 0.5})
    run = project.run()  # the stages then deal the rows out by content
    assert run.exit_code == 0, run.output
    assert "data.heldout.share is 0.5" in run.stdout


def test_a_mix_is_checked_as_it_is_taken(project: Project) -> None:
    (project.folder / "parts").mkdir()
    for name, part in (("a", ROWS[:2]), ("b", ROWS[2:4])):
        (project.folder / "parts" / f"{name}.jsonl").write_text("".join(json.dumps(content) + "\n" for content in part))
    section = {"records": "parts", "images": "images", "mix": {"a.jsonl": 2, "b.jsonl": 1}}
    project.set(data__pretrain=section)
    run = project.run("parts")
    assert run.exit_code == 0, run.output
    said = flat(run.stdout)
    assert "format jsonl (2 files)" in said
    assert "a.jsonl: 4 rows taken of 2" in said
    assert "rows 6, all good" in said


@pytest.mark.parametrize("container", ["data URLs", "zip"])
def test_pictures_within_rows_and_in_zips_are_checked(project: Project, png: Png, container: str) -> None:
    if container == "zip":
        with zipfile.ZipFile("images.zip", "w") as archive:
            for number in range(6):
                archive.writestr(f"{number}.png", png(number))
        run = project.run("rows.jsonl", "--images", "images.zip")
    else:
        urls = ["data:image/png;base64," + base64.b64encode(png(number)).decode() for number in range(6)]
        project.write("rows", *[row("<image>x", "y", url) for url in urls])
        run = project.run("rows.jsonl", "--html", "page.html")
        assert (project.folder / "page.html").read_text().count("<img ") == 6
    assert run.exit_code == 0, run.output
    assert "6 distinct names" in run.stdout


GARBAGE: dict[str, tuple[bytes | None, int, str]] = {
    "a missing file": (None, 2, "no such file"),
    "an empty file": (b"", 2, "no rows"),
    "blank lines": (b"\n\n  \n", 2, "no rows"),
    "random bytes": (random.Random(1).randbytes(3000), 2, "not a known format"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), 2, "not a known format"),
    "gzip": (b"\x1f\x8b\x08" + bytes(30), 2, "compressed (gzip)"),
    "a page": (b"<!DOCTYPE html>\n<html></html>\n", 2, "not a known format"),
    "half a Parquet file": (b"PAR1" + bytes(100), 2, "not a readable Parquet file"),
    "half a tar": (b"a.txt" + bytes(252) + b"ustar\x0000" + bytes(247), 3, "1 of 1 rows are bad"),
    "a table of a header": (b"image,text\n", 3, "no rows"),
    "an array without an end": (b'[{"text": "x"', 3, "rows are bad"),
}  # fmt: skip


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_one_line_and_a_code_never_a_traceback(project: Project, kind: str) -> None:
    content, code, said = GARBAGE[kind]
    if content is not None:
        (project.folder / "data.bin").write_bytes(content)
    assert said in require_one_line(project.run("data.bin", "--html", "page.html"), code)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rows.jsonl", "--images", "nowhere"], "no such folder or zip"),
        (["rows.jsonl", "--format", "excel"], "no format 'excel'"),
        (["rows.jsonl", "--format", "parquet"], "not a readable Parquet file"),
        (["rows.jsonl", "--params", "nowhere.yaml"], "nowhere.yaml: not found"),
        ([""], "no such file"),
        (["rows.jsonl", "--images", "images", "--html", "rows.jsonl/page.html"], "cannot be made"),
        (["rows.jsonl", "--html", "rows.jsonl"], "expected a name that ends in .html"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(project: Project, arguments: list[str], said: str) -> None:
    run = project.run(*arguments)
    assert said in require_one_line(run, 5 if said == "cannot be made" else 2)


def test_it_runs_as_a_module(project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["check", str(project.folder / "nothing")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("pipeline.check", run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {project.folder}/nothing: no such file")


# The data sets that come with the project.


def test_the_project_s_own_data_sets_are_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run = CliRunner().invoke(app, ["--limit", "200", "--headers-only"])
    assert run.exit_code == 0, run.output
    assert run.stdout.splitlines()[-1] == "sound: 600 rows"


@pytest.mark.slow
def test_all_rows_of_the_project_s_own_data_sets_are_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run = CliRunner().invoke(app, [])
    assert run.exit_code == 0, run.output
    assert run.stdout.splitlines()[-1] == "sound: 28,058 rows"
