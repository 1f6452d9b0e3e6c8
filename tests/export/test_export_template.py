"""The proof of an export renders a chat template with stock code: a template that does not end, or fills memory, ends the proof."""

import os
import signal
from typing import Any

import pytest

from pipeline.core.processes import fork_process
from pipeline.export import check

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


class Stock:
    """What a processor does with its template."""

    def __init__(self, template: str) -> None:
        self.template = template

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: bool) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        return str(render_jinja_template([messages], chat_template=self.template)[0][0])


def test_a_template_that_writes_gigabytes_is_refused_by_name() -> None:
    with pytest.raises(SystemExit, match="its chat template takes over 1,024 MB of memory"):
        check.render(Stock("{{ 'a' * (4000000000 + messages | length) }}"), [])
    assert signal.getitimer(signal.ITIMER_PROF)[0] == 0


@pytest.mark.parametrize("template", [LOOPS, "{{ 7 ** (9 ** (9 + messages | length)) }}"])
def test_a_template_without_an_end_ends_the_process_even_in_the_midst_of_c(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "SECONDS", 0.2)
    process = fork_process(lambda: print(check.render(Stock(template), [])))
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGPROF


def test_an_ordinary_template_is_rendered() -> None:
    assert check.render(Stock("{{ messages[0].content }}"), [{"role": "user", "content": "hello"}]) == "hello"
