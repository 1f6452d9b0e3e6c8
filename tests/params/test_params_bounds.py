"""params.yaml from anywhere: too long, too deep, laughing, in another encoding: one line, quickly."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core.errors import PipelineError
from pipeline.params.reading import MAX_BYTES, check, override, read_yaml

ROOT = Path(__file__).parents[2]


def laughs(depth: int, wide: int, opened: str, closed: str) -> str:
    lines = [f"a0: &a0 {opened}1{closed}"] if opened == "[" else ["a0: &a0 {x: 1}"]
    for i in range(1, depth):
        names = [f"*a{i - 1}" for _ in range(wide)]
        inner = ", ".join(names) if opened == "[" else ", ".join(f"k{n}: {name}" for n, name in enumerate(names))
        lines.append(f"a{i}: &a{i} {opened}{inner}{closed}")
    return "\n".join(lines)


MERGES = "a0: &a0 {x: 1}\n" + "\n".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 12))
BAD: dict[str, tuple[str | bytes, str]] = {
    "laughs in lists": (laughs(12, 10, "[", "]"), "aliases written out"),
    "laughs in maps": (laughs(12, 10, "{", "}"), "aliases written out"),
    "laughs in merges": (MERGES, "aliases written out"),
    "two long lists": ("a: &a [" + "1," * 300 + "]\nb: [" + "*a," * 300 + "]", "aliases written out"),
    "a list within itself": ("a: &a [*a]", "alias|anchor"),
    "a map within itself": ("a: &a {b: *a}", "alias|anchor"),
    "no such anchor": ("a: *b", "undefined alias"),
    "deep lists": ("a: " + "[" * 50_000, "."),
    "deep maps": ("a: " + "{b: " * 10_000, "."),
    "deep lines": ("\n".join(" " * i + "a:" for i in range(300)), "expected|recursion|unknown"),
    "long": ("a: " + "x" * (MAX_BYTES + 1), "more than 65,536 bytes"),
    "cp1252": ("a: é".encode("cp1252"), "not UTF-8 at byte 3"),
    "UTF-16": ("a: 1".encode("utf-16"), "not UTF-8 at byte 0"),
    "half a surrogate": ('data: "\\ud800"', "."),
    "NUL": ('data: {pretrain: {records: "a\\0b"}}', r"data\.pretrain\.records: .* is no text"),
    "a control character": (b"a: \x01", "."),
    "a long number": ("a: " + "9" * 5000, "."),
    "a tag": ("a: !!python/object/apply:os.system ['true']", "."),
    "empty": ("", "expected sections"),
    "a list": ("[1, 2]", "expected sections"),
    "two documents": ("a: 1\n---\nb: 2", "."),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_strange_file_is_one_line(name: str, tmp_path: Path) -> None:
    content, said = BAD[name]
    path = tmp_path / "params.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PipelineError, match=said) as caught:
        check(read_yaml(path), where=str(path))
    assert caught.value.where.startswith(str(path))
    assert len(caught.value.line()) < 600


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to(path)])
def test_what_is_no_file_is_one_line(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "params.yaml")
    with pytest.raises(PipelineError, match=r"params\.yaml: cannot be read"):
        read_yaml(tmp_path / "params.yaml")


def test_a_file_of_another_editor_is_read(tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text()
    for variant in (b"\xef\xbb\xbf" + text.encode(), text.replace("\n", "\r\n").encode()):
        (tmp_path / "params.yaml").write_bytes(variant)
        assert read_yaml(tmp_path / "params.yaml") == read_yaml(ROOT / "params.yaml")


def test_an_honest_alias_is_fine(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("a: &a {x: 1, y: [1, 2]}\nb: *a\nc: {<<: *a, y: 3}\n")
    assert read_yaml(tmp_path / "params.yaml")["c"] == {"x": 1, "y": 3}


ARGUMENTS = ["llm.model=\udcff", "llm.model='\udce9'", "vision.layer=" + "9" * 5000, "data.limit=" + "[" * 9000,
             'llm.model="a\\0b"', "\udcff=1", "llm.model=*x"]  # fmt: skip


@pytest.mark.parametrize("text", ARGUMENTS)
def test_a_strange_argument_is_one_line(text: str) -> None:
    with pytest.raises(PipelineError):
        override({"llm": {}, "vision": {}, "data": {}}, [text])
