"""A talk in a real terminal: Ctrl-C at every moment, Ctrl-D, bad paths, odd keys, resizing. Never a traceback or an abort."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import World
from projects import with_path
from terminals import CTRL_C, CTRL_D, ROOT, Session
from test_chat import trained  # noqa: F401

LONG = ["--temperature", "9", "--max-tokens", "200"]  # answers that hardly end by themselves
BAD = ("Traceback", "Aborted", "core dumped", "terminate called", "Fatal Python", "Exception ignored", "KeyboardInterrupt", "row")


def clean(session: Session, *codes: int) -> None:
    """The session ends by itself, with one of these codes, and its screen shows nothing that a person should not see."""
    code = session.end()
    assert code in codes, (code, session.screen)
    assert not [word for word in BAD if word in session.screen], session.screen


@pytest.fixture
def pictures(world: World, tmp_path: Path) -> Path:
    """A folder of pictures with names as people have them, and files that are none."""
    folder = tmp_path / "my pictures"
    folder.mkdir()
    for name in ("a.png", "a b.png", "it's, one.png", "日本.png", "100%.png"):
        shutil.copy(world.folder / "images/0.png", folder / name)
    (folder / "none.png").write_text("not a picture")
    (folder / "empty.jpg").write_bytes(b"")
    return folder


def strike_in_an_answer(talk: Session) -> None:
    """Ask, and press Ctrl-C once the answer has begun; again where it was over before."""
    for _ in range(5):
        talk.until("you> ")
        talk.type("What is this?\n")
        talk.until("What is this?\r\n")
        talk.wait_for_more()
        talk.type(CTRL_C)
        talk.until("you> ")
        if "stopped" in talk.screen:
            return
        talk.type("/reset\n")
    raise AssertionError(f"no answer was stopped:\n{talk.screen}")


def test_one_talk_with_everything_in_it(trained: Path, pictures: Path) -> None:
    """The fast one: each of these has slow sessions of its own below."""
    with Session(["--model", str(trained), "--temperature", "9", "--max-tokens", "400", "--stats"]) as talk:
        talk.until("you> ")
        talk.press(CTRL_C, "Ctrl-C again, Ctrl-D or /exit leaves")
        for path, said in (("nowhere.png", "nowhere.png: no such"), (f"'{pictures}/none.png'", "not a picture")):
            talk.until("you> ")
            talk.type(f"/image {path}\n")
            talk.until(said)
        talk.until("you> ")
        talk.type(f"/image '{pictures}/日本.png'\n")
        talk.until("looking at")
        strike_in_an_answer(talk)
        talk.resize(10, 40)
        talk.type("/reset\n这是什么? 🦔\n")
        talk.until("no picture is shown")
        talk.until("tokens")
        talk.until("you> ")
        talk.press(CTRL_C, "Ctrl-C again")
        talk.until("you> ")  # a key between two prompts is the terminal's, which drops an end of file
        talk.type(CTRL_D)
        clean(talk, 0)


Script = Callable[[Session, Path], None]


def keys(*typed: str) -> Script:
    """Each line typed at a prompt of its own, as late as a person can at the earliest: see `Session.press`."""

    def play(talk: Session, pictures: Path) -> None:
        for text in typed:
            talk.until("you> ")
            time.sleep(0.1)
            talk.type(text.replace("PICTURES", str(pictures)))

    return play


def striking(after: float, *, times: int = 1, first: str = "What is this?\n") -> Script:
    """Ctrl-C so many seconds after a question, then leave."""

    def play(talk: Session, pictures: Path) -> None:
        keys(f"/image '{pictures}/a.png'\n", first)(talk, pictures)
        time.sleep(after)
        for _ in range(times):
            talk.type(CTRL_C)
        for _ in range(9):  # readline may sleep through one that comes just before it does; a person presses again
            talk.read(3.0)
            if "stopped" in talk.screen or "leaves" in talk.screen:  # the latter where the answer had ended by itself
                break
            talk.type(CTRL_C)
        talk.until("you> ")
        talk.type("/exit\n")

    return play


def pasted(talk: Session, pictures: Path) -> None:
    talk.until("you> ")
    talk.type(f"/image {str(pictures).replace(' ', chr(92) + ' ')}/a.png\nWhat is this?\n/reset\nWhat is it?\n/exit\n")


def resized(talk: Session, pictures: Path) -> None:
    keys(f"/image '{pictures}/a.png'\n")(talk, pictures)
    for rows, columns in ((5, 20), (60, 200), (1, 1), (24, 80)):
        talk.resize(rows, columns)
    talk.until("you> ")
    talk.type("What is this?\n")
    for rows, columns in ((5, 20), (24, 80)):
        talk.resize(rows, columns)
    keys("/exit\n")(talk, pictures)


SHORT = ["--max-tokens", "5"]
SESSIONS: dict[str, tuple[list[str], Script]] = {
    "Ctrl-D at once": (SHORT, keys(CTRL_D)),
    "Ctrl-C twice at once": (SHORT, keys(CTRL_C, CTRL_C)),
    "Ctrl-C, a question, Ctrl-C, Ctrl-D": (SHORT, keys(CTRL_C, "What is this?\n", CTRL_C, CTRL_D)),
    "Ctrl-C with half a line typed": (SHORT, keys("half a ques" + CTRL_C, "/exit\n")),
    "Ctrl-C as the answer begins": (LONG, striking(0.0)),
    "Ctrl-C a little later": (LONG, striking(0.05)),
    "Ctrl-C in the middle": (LONG, striking(0.4)),
    "Ctrl-C twice in an answer": (LONG, striking(0.3, times=2)),
    "Ctrl-C once the answer is there": (SHORT, striking(3.0)),
    "Ctrl-D while an answer is made": (LONG, keys("What is this?\n" + CTRL_D)),
    "paths that are none": (
        SHORT,
        keys(
            "/image\n", "/image nowhere.png\n", "/image PICTURES\n", "/image /dev/zero\n", "/also /etc/passwd\n", "What?\n", CTRL_D
        ),
    ),
    "files that are no pictures": (
        SHORT,
        keys("/image 'PICTURES/none.png'\n", "What?\n", "/also PICTURES/empty.jpg\n", "/image ~nobody/\n", "/exit\n"),
    ),
    "quotes and dragged paths": (
        SHORT,
        keys("'PICTURES/a b.png'\n", "What?\n", '/also "PICTURES/it\'s, one.png"\n', "What?\n", "/image 'open\n", "/exit\n"),
    ),
    "words in many letters": (SHORT, keys("/image 'PICTURES/日本.png'\n", "这是什么? 🦔 ناقة ‮\n", "\u0000\u001b[31m\n", "/exit\n")),
    "bytes that are no text": (SHORT, keys("/image \udcff\udcfe.png\n", "what \udcff?\n", "/\udcff\n", "/exit\n")),
    "a window that changes": (SHORT, resized),
    "all pasted at once": (SHORT, pasted),
    "a line of 20,000 letters": (SHORT, keys("x" * 4000 + "\n", "what is this? " * 290 + "\n", "/exit\n")),
    "commands that are none": (SHORT, keys("/\n", "//\n", "/dance\n", "\n", "   \n", "/help\n", "/quit\n")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SESSIONS)
def test_sessions_end_cleanly(trained: Path, pictures: Path, name: str) -> None:
    options, play = SESSIONS[name]
    with Session(["--model", str(trained), *options]) as talk:
        play(talk, pictures)
        clean(talk, 0)


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.5, 0.8, 1.2, 2.0, 3.0, 5.0])
def test_ctrl_c_while_it_loads_ends_it(trained: Path, after: float) -> None:
    with Session(["--model", str(trained), *SHORT]) as talk:
        time.sleep(after)
        talk.type(CTRL_C + CTRL_D)
        code = talk.end()
        assert code in (0, 130, -signal.SIGINT), talk.screen
        assert not [word for word in BAD if word in talk.screen], talk.screen


@pytest.mark.slow
def test_three_ctrl_c_leave_whatever_goes_on(trained: Path) -> None:
    with Session(["--model", str(trained), *LONG]) as talk:
        keys("What is this?\n")(talk, Path())
        talk.process.send_signal(signal.SIGSTOP)  # all three before the answer can end
        for _ in range(3):
            talk.process.send_signal(signal.SIGINT)
            talk.process.send_signal(signal.SIGCONT)
            time.sleep(0.002)
        talk.type(CTRL_D)
        clean(talk, 0, 130)


@pytest.mark.slow
def test_a_reader_that_goes_ends_it_quietly(trained: Path, pictures: Path) -> None:
    talk = f"{sys.executable} -m pipeline.chat '{pictures}' 'What is this?' --model {trained} --max-tokens 9"
    command = f"{talk} | head -n 1; exit ${{PIPESTATUS[0]}}"
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": with_path(ROOT)}
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode in (0, 141), done.stderr  # 0: all was written before the reader went
    assert len(done.stdout.splitlines()) == 1
    assert not [word for word in BAD if word in done.stderr], done.stderr
