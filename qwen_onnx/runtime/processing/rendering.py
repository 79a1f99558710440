"""Chat templates in jinja2's sandbox. What a stranger's template does runs in a process under limits: ``main``."""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Environment, Template, meta, nodes
from jinja2 import TemplateError as JinjaError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen_onnx.processes.limited import serve

# more than the longest contexts hold
MOST_CHARACTERS = 16 << 20
MOST_WORDS = 500
# what templates come to; anything else ends the process
FAULTS = (JinjaError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class Generation(Extension):
    """``{% generation %}`` of transformers, which marks what a model is trained on: here its content alone."""

    tags = {"generation"}  # noqa: RUF012 - an attribute of instances to jinja2's types

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the two tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def make_environment() -> Environment:
    """With the globals that transformers gives to templates."""

    def fail(message: str) -> NoReturn:
        raise JinjaError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


ENVIRONMENT = make_environment()


@lru_cache(maxsize=4)
def _compiled(source: str) -> Template:
    return ENVIRONMENT.from_string(source)


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Render a template, or tell what it reads.

    Args:
        question: ``source``; with ``variables``, which it is rendered with.

    Returns:
        ``text``; or ``reads``, the names of its variables; or ``broken`` or ``refused`` with the reason.
    """
    source = question["source"]
    try:
        template = _compiled(source)
        if "variables" not in question:
            return {"reads": sorted(meta.find_undeclared_variables(ENVIRONMENT.parse(source)))}
    except (JinjaError, RecursionError, SyntaxError) as error:
        return {"broken": _words(error)}
    try:
        text = template.render(question["variables"])
    except FAULTS as error:
        return {"refused": _words(error)}
    if len(text) > MOST_CHARACTERS:
        return {"refused": f"it makes {len(text)} characters of them, the most is {MOST_CHARACTERS}"}
    return {"text": text}


def _words(error: Exception) -> str:
    return str(error)[:MOST_WORDS]


def main() -> None:
    """Answer in this process, which is a child; what it reads from files is read before they are forbidden."""
    answer({"source": "{{ strftime_now('%d %b %Y') }}{{ [1] | tojson }}", "variables": {}})
    answer({"source": "{{ raise_exception('') }}", "variables": {}})
    serve(answer)
