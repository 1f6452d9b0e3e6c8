"""A chat template from the internet is a program: bounded in time, memory, length and depth, and nothing is left to chance."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import CHATML, train_tokenizer

from pipeline.core.errors import ARTEFACT, PipelineError
from pipeline.records.record import Turn
from pipeline.text.builder import PromptBuilder
from pipeline.text.template import Template, _process

TALK = [([{"role": "user", "content": "a"}], False)]
SLOW = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a cycle": "{% set c = cycler(1) %}{% for i in range(99999) %}{% for j in range(9999) %}{{ c.next() }}{% endfor %}{% endfor %}",
    "sorting": "{% for i in range(99999) %}{% set x = range(99999) | list | sort %}{% endfor %}",
    "a power": "{% set n = 999999 %}{% set x = n ** n ** 2 %}",
}
LARGE = {
    "a folded product": "{{ 'a' * 4000000000 }}",
    "a product": "{% set n = 4000000000 %}{{ messages[0].content * n }}",
    "a list": "{{ ([0] * 10 ** 10) | length }}",
    "doubling": "{% set ns = namespace(s='aaaa') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "growing lists": "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "a width": "{{ '%999999999d' % 1 }}",
    "a width given": "{{ '%*d' % (999999999, 1) }}",
    "a format": "{{ '{:999999999}'.format(1) }}",
    "centred": "{{ 'a' | center(10 ** 9) }}",
    "justified": "{{ 'a'.ljust(10 ** 10) }}",
    "indented": "{{ 'a\nb' | indent(10 ** 9) }}",
    "replaced": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "JSON": "{{ [1, [2]] | tojson(indent=10 ** 9) }}",
    "batches": "{{ [1] | batch(10 ** 9, 0) | list | length }}",
    "bytes": "{{ (1).to_bytes(10 ** 10, 'big') | length }}",
    "written": "{% for i in range(99999) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}",
}
DEEP = {
    "a macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "conditions": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "brackets": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
}
FORBIDDEN = {
    "chance": "{{ [1, 2] | random }}",
    "filler": "{{ lipsum() }}",
    "a file": "{% include 'x' %}",
    "an import": "{% import 'x' as x %}",
    "classes": "{{ ''.__class__.__mro__ }}",
    "changes": "{{ messages.append(1) }}",
    "a range": "{{ range(10 ** 9) | list }}",
}


def refusal(source: str) -> PipelineError:
    with pytest.raises(PipelineError, match="its chat template") as caught:
        Template(source, {}, where="model").render(TALK, {})
    assert len(caught.value.line().splitlines()) == 1
    return caught.value


@pytest.mark.parametrize("name", [*LARGE, *DEEP])
def test_what_grows_or_nests_without_end_is_stopped(name: str) -> None:
    error = refusal((LARGE | DEEP)[name])
    assert error.code == ARTEFACT
    assert "was stopped" in error.what


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if place else []) for place, name in enumerate(SLOW)])
def test_what_runs_without_end_is_stopped(name: str) -> None:
    _process().end()  # its time counts once it has ended, and it has rendered for other tests
    began = os.times()
    assert "takes over 1 s of" in refusal(SLOW[name]).what
    after = os.times()
    assert after.children_user + after.children_system - began.children_user - began.children_system < 5


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_decides_by_chance_or_reaches_out_is_refused(name: str) -> None:
    assert "refuses turns user" in refusal(FORBIDDEN[name]).what


@pytest.mark.slow
def test_no_process_takes_much_memory() -> None:
    import resource

    for source in LARGE.values():
        refusal(source)
    _process().end()
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 700_000  # kilobytes


def test_a_template_that_was_stopped_is_not_tried_again() -> None:
    template = Template("{% if messages[0].content == 'b' %}{{ 'a' * 4000000000 }}{% endif %}ok", {}, where="model")
    assert template.render(TALK, {}) == ["ok"]
    for content in ("b", "a"):
        with pytest.raises(PipelineError, match="was stopped"):
            template.render([([{"role": "user", "content": content}], False)], {})
    assert Template("ok", {}, where="model").render(TALK, {}) == ["ok"], "others go on"


def test_a_process_that_was_killed_from_outside_is_said_and_started_again() -> None:
    template = Template("{{ messages[0].content }}", {}, where="model")
    process = _process()._started
    assert process is not None
    process.kill()
    process.wait()
    assert template.render(TALK * 100, {}) == ["a"] * 100


ENDS = """
from pipeline.text.template import Template, _process
Template("a", {}, where="model")
print(_process()._started.pid, flush=True)
input()
"""


@pytest.mark.slow
def test_the_process_ends_with_the_one_that_asks() -> None:
    with subprocess.Popen([sys.executable, "-c", ENDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        status = Path("/proc") / owner.stdout.readline().strip() / "status"
        assert status.exists()
        owner.kill()
    until = time.monotonic() + 30
    while status.exists() and "State:\tZ" not in status.read_text():  # a zombie waits for the container's first process
        assert time.monotonic() < until, "it is still there"
        time.sleep(0.05)


def builder_of(folder: Path, template: str, **options: str) -> PromptBuilder:
    tokenizer = train_tokenizer("embedded")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return PromptBuilder(str(folder), image_token="<image>", tokens=3, **options)


DATED = "{{ '<|im_start|>system\n' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML
TURNS = [Turn("user", ("What?",)), Turn("assistant", ("A cat.",))]


def test_the_date_is_the_parameters_and_part_of_what_decides_the_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, other = builder_of(tmp_path, DATED), builder_of(tmp_path, DATED, date="2025-02-03")
    assert "26 Jul 2024" in usual.tokenizer.decode(usual.build(TURNS).ids)
    assert "03 Feb 2025" in other.tokenizer.decode(other.build_question(TURNS[:1]).ids)
    assert (usual.spec()["date"], other.spec()["date"]) == ("2024-07-26", "2025-02-03")
    monkeypatch.setattr(time, "time", lambda: 2e9)
    assert builder_of(tmp_path, DATED).build(TURNS).ids.tolist() == usual.build(TURNS).ids.tolist()


def test_a_template_without_a_date_does_not_know_of_one(tmp_path: Path) -> None:
    one, other = builder_of(tmp_path, CHATML), builder_of(tmp_path, CHATML, date="2025-02-03")
    assert one.spec() == other.spec()
    assert "date" not in one.spec()
    assert one.dates == ""


def test_whoever_renders_an_export_gets_the_date_of_training(tmp_path: Path) -> None:
    builder = builder_of(tmp_path, DATED, date="2025-02-03")
    messages = [{"role": "user", "content": "What?"}]
    stock = builder.tokenizer.apply_chat_template(messages, chat_template=builder.dates + DATED, tokenize=False)
    assert stock.startswith("<|im_start|>system\n03 Feb 2025<|im_end|>")


def test_an_address_in_memory_is_no_prompt(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="address in memory"):
        builder_of(tmp_path, "{{ raise_exception }}" + CHATML)
