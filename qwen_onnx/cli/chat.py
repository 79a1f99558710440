"""``qwen-onnx generate`` and ``qwen-onnx chat``: an artifact answers in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qwen_onnx.cli.options import ArtifactPath, MaxTokens, SlotOption, Temperature, Threads


def _given(adapter: Path | None) -> dict[str, Path]:
    """The one adapter that answers are made with, under the one name that they ask for."""
    return {"adapter": adapter} if adapter else {}


def generate(
    artifact: ArtifactPath,
    prompt: Annotated[str, typer.Argument(help="text to continue; - reads standard input")],
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="stop string; repeatable")] = None,
    threads: Threads = None,
    adapter: SlotOption = None,
) -> None:
    """Continue PROMPT as plain text, streaming; prints prompt and continuation."""
    from qwen_onnx.artifact.manifest import open_runnable
    from qwen_onnx.runtime.service.generation import GenerationConfig
    from qwen_onnx.runtime.service.qwen import QwenService

    text = sys.stdin.read() if prompt == "-" else prompt
    given = _given(adapter)
    config = GenerationConfig(
        max_new_tokens=max_tokens, temperature=temperature, stop=tuple(stop or ()), adapter=next(iter(given), None)
    )
    service = QwenService(open_runnable(artifact.resolve()).path, threads=threads, streams=1, adapters=given)
    sys.stdout.write(text)
    for delta in service.stream(text, config):
        sys.stdout.write(delta.text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def chat(
    artifact: ArtifactPath,
    system: str | None = typer.Option(None, help="system message"),
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    threads: Threads = None,
    adapter: SlotOption = None,
) -> None:
    """Chat in the terminal: /help lists its commands, Ctrl-C stops an answer, Ctrl-D ends.

    Without a terminal each line of standard input is a question, and an empty line ends.
    """
    from qwen_onnx.artifact.manifest import open_runnable
    from qwen_onnx.runtime.chat.conversation import Conversation
    from qwen_onnx.runtime.chat.terminal import Terminal
    from qwen_onnx.runtime.service.generation import GenerationConfig
    from qwen_onnx.runtime.service.qwen import QwenService

    opened = open_runnable(artifact.resolve())
    given = _given(adapter)
    config = GenerationConfig(max_new_tokens=max_tokens, temperature=temperature, adapter=next(iter(given), None))
    with QwenService(opened.path, threads=threads, streams=1, adapters=given) as service:
        Terminal(Conversation(service, config, model=opened.manifest.plan.model, system=system)).run()
