"""A checkpoint's chat template as transformers renders it, in a process under limits: a stranger wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen_onnx.errors import SourceError
from qwen_onnx.processes.limited import Limited, LimitReached, Limits, serve

MOST_WORDS = 500


class CheckpointTemplate:
    """Renders conversations; its process starts with the first.

    Args:
        tokenizer: of transformers, which has a chat template.
        limits: of each conversation.
    """

    def __init__(self, tokenizer: Any, limits: Limits | None = None) -> None:
        self._tokenizer, self._process = tokenizer, Limited(__name__, limits)

    def render(self, messages: Sequence[Mapping[str, Any]], *, prompt: bool = False) -> str:
        """The conversation as text; ``prompt`` adds the opening of an answer.

        Raises:
            SourceError: the template refuses it, or takes more time or memory than the limits give.
            EnvironmentFault: the process does not start.
        """
        where = str(self._tokenizer.name_or_path) or None
        try:
            source = self._tokenizer.get_chat_template()
        except ValueError as error:
            raise SourceError(f"the checkpoint has no chat template to use: {error}", where=where) from error
        variables = {
            name: list(map(str, token)) if isinstance(token, list | tuple) else str(token)
            for name, token in self._tokenizer.special_tokens_map.items()
        }
        question = {"source": source, "messages": list(messages), "prompt": prompt, "variables": variables}
        try:
            told = self._process.ask(question)
        except LimitReached as error:
            raise SourceError(
                f"the checkpoint's chat template was stopped: {error}",
                where=where,
                hint="use a checkpoint that you trust",
            ) from error
        if "refused" in told:
            raise SourceError(f"the checkpoint's chat template does not render: {told['refused']}", where=where)
        return str(told["text"])


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Render a conversation: ``text``, or ``refused`` with the reason."""
    from jinja2 import TemplateError as JinjaError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, _ = render_jinja_template(
            [question["messages"]],
            chat_template=question["source"],
            add_generation_prompt=question["prompt"],
            **question["variables"],
        )
    # what templates come to; anything else ends the process
    except (JinjaError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        return {"refused": str(error)[:MOST_WORDS]}
    return {"text": rendered[0]}


def main() -> None:
    """Answer in this process, which is a child; what it reads from files is read before they are forbidden."""
    for source in ("{{ strftime_now('%d %b %Y') }}{{ [1] | tojson }}", "{{ raise_exception('') }}"):
        answer({"source": source, "messages": [{"role": "user"}], "prompt": False, "variables": {}})
    serve(answer)
