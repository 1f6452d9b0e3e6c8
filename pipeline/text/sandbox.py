"""Renders chat templates in a process of its own: a template from the internet is a program, and this is all that it can reach.

Run by `pipeline.text.template` as a script; imports nothing of the pipeline. A line of JSON on stdin asks, each answer is a line on
stdout. The environment is that of Transformers (sandboxed, values immutable, the same functions and tags) with two differences:
`strftime_now` knows one fixed date, and what is drawn by lot is refused. The operating system bounds memory and processor time, so
that no single operation of C (a power, a padded string, a constant folded while compiling) can escape the bound.
"""

import json
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Environment, Template, TemplateError, ext, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 1 << 29  # bytes of address space, Python's own 60 MB included
SECONDS = 1.0  # of processor time for one conversation
LETTERS = 1 << 20  # of text, and eight for each that goes in

# Calls and filters that look into a text. A text with one of their words in it is rendered, never put together.
STRIPPING = frozenset(("strip", "lstrip", "rstrip", "trim"))
LOOKING = STRIPPING | frozenset(("split", "rsplit", "partition", "rpartition", "replace", "removeprefix", "removesuffix"))
LOOKING |= frozenset(("startswith", "endswith", "find", "rfind", "index", "rindex", "count"))


class Generation(ext.Extension):
    """`{% generation %}`: marks an answer for those who look for it; its text is all that matters here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_plain"), [], [], body).set_lineno(line)

    def _plain(self, caller: Callable[[], str]) -> str:
        return caller()


def make_environment(date: str) -> Environment:
    """Transformers' environment on the date `date` (YYYY-MM-DD)."""
    fixed = datetime.fromisoformat(date)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.filters["random"] = environment.globals["lipsum"] = _drawn
    environment.globals |= {"raise_exception": _refuse, "dict": _Dict(), "strftime_now": lambda format: fixed.strftime(format)}
    return environment


class _Dict:
    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: object) -> str:
    raise TemplateError(str(message))


def _drawn(*_: object, **__: object) -> str:
    raise SecurityError("no two renderings would be the same, since it draws by lot")


@lru_cache(maxsize=16)
def _compiled(source: str, date: str) -> Template:
    return make_environment(date).from_string(source)


def look(source: str, date: str) -> dict[str, Any]:
    """What a template looks for in texts, which whole texts it knows, and whether it asks for the date."""
    tree = make_environment(date).parse(source)
    words: set[str] = set()
    whole: set[str] = set()
    call: Any
    for call in tree.find_all((nodes.Call, nodes.Filter)):
        name = call.name if isinstance(call, nodes.Filter) else getattr(call.node, "attr", "")
        if name not in LOOKING:
            continue
        given = [*call.args, *(pair.value for pair in call.kwargs)]
        found = [text for node in given for text in _texts(node)]
        if name in STRIPPING:  # letters each of which is taken off an edge; blank edges are always rendered
            words.update("".join("".join(found).split()))
        else:
            words.update(found)
        if not all(isinstance(node, nodes.Const) for node in given):  # the word may have a name
            words.update(text for node in tree.find_all((nodes.Assign, nodes.Keyword)) for text in _texts(node))
    for compare in tree.find_all(nodes.Compare):
        sides = (compare.expr, *(operand.expr for operand in compare.ops))
        inside = compare.ops[0].op in ("in", "notin") and isinstance(compare.expr, nodes.Const)
        if inside or any(_is_part(side) for side in sides):
            words.update(text for side in sides for text in _texts(side))
        whole.update(text for side in sides for text in _texts(side))
    for test in tree.find_all(nodes.Test):
        whole.update(text for node in test.args or () for text in _texts(node))
    dated = any(name.name == "strftime_now" for name in tree.find_all(nodes.Name))
    calls = [call for call in tree.find_all(nodes.Call) if isinstance(call.node, nodes.Name) and call.node.name == "strftime_now"]
    formats = sorted({text for call in calls for text in _texts(call)})
    written = {text: datetime.fromisoformat(date).strftime(text) for text in formats}
    return {"words": sorted(words), "whole": sorted(whole), "dated": dated, "dates": written}


def _is_part(node: nodes.Expr) -> bool:
    """Whether this may be a piece of a text, as in `content[:7]` or `content | first`."""
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Slice) or (isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, int))
    return isinstance(node, nodes.Call | nodes.Filter)


def _texts(node: nodes.Node) -> Iterator[str]:
    for const in (node, *node.find_all(nodes.Const)):
        if isinstance(const, nodes.Const) and isinstance(const.value, str) and const.value:
            yield const.value


def _answer(asked: dict[str, Any], job: dict[str, Any] | None) -> dict[str, Any]:
    """The text of one conversation, or why there is none: `over` when a limit ended it."""
    try:
        if job is None:
            return look(asked["template"], asked["date"])
        text = _compiled(asked["template"], asked["date"]).render(**asked["variables"], **job)
        limit = LETTERS + 8 * len(str(job["messages"]))
        return {"over": f"writes over {limit:,} letters"} if len(text) > limit else {"text": text}
    except MemoryError:
        return {"over": f"takes over {MEMORY >> 20:,} MB of memory"}
    except RecursionError:
        return {"over": "is nested too deeply"}
    except Exception as error:
        return {"error": _first_line(error)}


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error))[:300] or type(error).__name__


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    for line in sys.stdin:
        asked = json.loads(line)
        for job in asked["jobs"]:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process, whatever runs
            answer = _answer(asked, job)
            signal.setitimer(signal.ITIMER_PROF, 0)
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
