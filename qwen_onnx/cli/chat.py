"""``qwen-onnx generate``, ``chat`` and ``transcribe``: an artifact answers in the terminal."""

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


def transcribe(
    artifact: ArtifactPath,
    file: Annotated[Path, typer.Argument(help="a sound: WAV, FLAC or MP3")],
    language: Annotated[
        str | None, typer.Option(help="what is spoken, e.g. en or English; default: the model finds out")
    ] = None,
    prompt: Annotated[str, typer.Option(help="words that may come, or what it is about")] = "",
    temperature: Temperature = 0.0,
    threads: Threads = None,
) -> None:
    """Write down what is said in FILE; prints the text alone, once it is whole."""
    from qwen_onnx import bounded
    from qwen_onnx.artifact.manifest import open_runnable
    from qwen_onnx.errors import RequestError
    from qwen_onnx.runtime.processing.data_uri import MOST_BYTES
    from qwen_onnx.runtime.service.generation import Attached, GenerationConfig
    from qwen_onnx.runtime.service.qwen import QwenService
    from qwen_onnx.runtime.service.transcription import transcribing

    content = bounded.read_bytes(file, most_bytes=MOST_BYTES, error=RequestError)
    opened = open_runnable(artifact.resolve())
    with QwenService(opened.path, threads=threads, streams=1) as service:
        work = transcribing(
            service,
            Attached(content, str(file)),
            language=language,
            prompt=prompt,
            called=opened.manifest.plan.model,
        )
        for delta in service.stream(work.prompt, GenerationConfig(temperature=temperature, **work.options)):
            work.push(delta)
    sys.stdout.write(f"{work.transcript.text}\n")
