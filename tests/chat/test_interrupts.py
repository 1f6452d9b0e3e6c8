"""Ctrl-C at the prompt counts at whichever moment it comes, also just before the prompt waits for a key."""

import os
import select
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from terminals import CTRL_C, Session

from pipeline.chat.interrupts import SIGNALS, Interrupts

TRIES = 300
ASKING = f"""
import readline
from pipeline.chat.interrupts import Interrupts
with Interrupts() as interrupts:
    for number in range({TRIES}):
        try:
            interrupts.ask("you> ")
        except KeyboardInterrupt:
            print("struck", flush=True)
print("over", flush=True)
"""


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_a_signal_that_wakes_nobody_at_the_prompt_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    awake, keys = threading.Event(), list[str]()

    def strike_elsewhere() -> None:
        time.sleep(0.1)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)  # noted, and the main thread sleeps on
        if not awake.wait(20):
            keys.append("x")
            os.write(writing, b"x")

    def wait_for_a_key(*_: str) -> str:
        striking.start()
        select.select([reading], [], [])
        return "x"

    striking = threading.Thread(target=strike_elsewhere)
    monkeypatch.setattr("builtins.input", wait_for_a_key)
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        interrupts.ask("you> ")
    awake.set()
    striking.join()
    assert not keys, "it took a key to be noticed"
    os.close(reading)
    os.close(writing)


@pytest.mark.usefixtures("handlers")
def test_other_signals_are_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = list[int]()
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))

    def wait_for_a_key(*_: str) -> str:
        signal.raise_signal(signal.SIGUSR1)
        time.sleep(0.2)
        return "a line"

    monkeypatch.setattr("builtins.input", wait_for_a_key)
    with Interrupts() as interrupts:
        assert interrupts.ask("you> ") == "a line"
        assert not interrupts.stop.is_set()
    signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]


def test_hundreds_of_presses_right_behind_the_prompt_all_count() -> None:
    with Session(["-c", ASKING], command=[]) as session:
        for number in range(TRIES):
            session.until("you> ")
            until = time.perf_counter() + number % 10 * 3e-6
            while time.perf_counter() < until:
                pass
            session.type(CTRL_C)
            session.until("struck")
        session.until("over")
        assert session.process.wait(timeout=60) == 0
