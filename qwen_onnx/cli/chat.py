"""``qwen-onnx chat``: talk to an artifact in the terminal."""

from __future__ import annotations

import typer

from qwen_onnx.cli.options import ArtifactPath, MaxTokens, Temperature, Threads


def chat(
    artifact: ArtifactPath,
    system: str | None = typer.Option(None, help="system message"),
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    threads: Threads = None,
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
    config = GenerationConfig(max_new_tokens=max_tokens, temperature=temperature)
    with QwenService(opened.path, threads=threads, streams=1) as service:
        Terminal(Conversation(service, config, model=opened.manifest.plan.model, system=system)).run()
