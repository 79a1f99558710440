"""The command line, assembled: a verb is a function of a module beside this one.

Verbs import what they need when they run: ``--help`` loads no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import typer
from rich.console import Console
from rich.markup import escape

from qwen_onnx.cli.adapter import adapter_app
from qwen_onnx.cli.build import compare, fetch, optimize, verify
from qwen_onnx.cli.catalog import list_models, plan, plans, select_models, where
from qwen_onnx.cli.chat import chat, generate, transcribe
from qwen_onnx.cli.finetune import finetune
from qwen_onnx.cli.foundry import foundry_check
from qwen_onnx.cli.machine import doctor, environments
from qwen_onnx.cli.package import package
from qwen_onnx.cli.progress import show
from qwen_onnx.cli.publish import publish, pull
from qwen_onnx.cli.release import release
from qwen_onnx.cli.serve import keys_app, serve
from qwen_onnx.cli.trust import diff, verify_package
from qwen_onnx.errors import QwenOnnxError, printable
from qwen_onnx.processes.progress import listening

app = typer.Typer(
    name="qwen-onnx",
    help="Any Qwen model, any target: an ONNX artifact that is proven, packaged and served.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
# as --help lists them
VERBS: dict[str, Callable[..., None]] = {
    "list": list_models,
    "select": select_models,
    "plan": plan,
    "plans": plans,
    "where": where,
    "fetch": fetch,
    "finetune": finetune,
    "optimize": optimize,
    "verify": verify,
    "compare": compare,
    "generate": generate,
    "package": package,
    "verify-package": verify_package,
    "diff": diff,
    "foundry-check": foundry_check,
    "release": release,
    "publish": publish,
    "pull": pull,
    "chat": chat,
    "transcribe": transcribe,
    "serve": serve,
    "doctor": doctor,
    "environments": environments,
}
for name, verb in VERBS.items():
    app.command(name)(verb)
app.add_typer(adapter_app, name="adapter")
app.add_typer(keys_app, name="keys")
# what `diff` was called; goes after one release
app.command("same", hidden=True)(diff)


def main() -> None:
    """Entry point: deliberate errors become one message and their exit code."""
    try:
        with listening(show):
            app()
    except QwenOnnxError as error:
        told = escape(printable(str(error)))
        Console(stderr=True).print(f"[bold red]error:[/] {told}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # the reader went away, as `| head` does: not a fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
