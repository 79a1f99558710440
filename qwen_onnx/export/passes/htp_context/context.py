"""Our Olive pass ``HtpContext``: compiles QDQ graphs to HTP contexts in the environment of onnxruntime-qnn."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam

from qwen_onnx.artifact.htp.folder import CONTEXT, HtpFolder, graph_file
from qwen_onnx.errors import ExportError
from qwen_onnx.export.options import chosen, parameters
from qwen_onnx.export.passes.htp_context.options import HtpContextOptions
from qwen_onnx.processes.environments import Interpreter, announced_interpreter


class HtpContext(Pass):  # type: ignore[misc]
    """Compile the graphs of ``HtpQdqExport`` for a Qualcomm chip, which need not be in this machine."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return parameters(HtpContextOptions)

    def _run_for_config(
        self, model: ONNXModelHandler, config: BasePassConfig, output_model_path: str
    ) -> ONNXModelHandler:
        settings, output = chosen(HtpContextOptions, config), Path(output_model_path)
        shutil.copytree(Path(model.model_path).parent, output, dirs_exist_ok=True)
        compile_in(announced_interpreter(), output, settings)
        return ONNXModelHandler(str(output), onnx_file_name=graph_file(1, CONTEXT))


def compile_in(interpreter: Interpreter, folder: Path, config: HtpContextOptions) -> None:
    """Compile the graphs of ``folder`` in place, in the environment of onnxruntime-qnn.

    Raises:
        ExportError: the HTP refuses a graph or a node of it; carries the last lines that the compiler wrote.
    """
    command = [
        str(interpreter.python),
        "-m",
        "qwen_onnx.runtime.engines.runners.qnn",
        str(folder),
        json.dumps(config.model_dump()),
    ]
    lines: list[str] = []
    with subprocess.Popen(
        command,
        env=interpreter.variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as child:
        for line in child.stdout or ():
            print(line, end="", flush=True)
            lines.append(line.strip())
    described = HtpFolder.read(folder, ExportError)
    missing = any(not described.in_form(CONTEXT).graph(tokens).exists() for tokens in described.windows)
    if child.returncode or missing:
        said = " ".join(line for line in lines if line)[-600:]
        raise ExportError(
            f"onnxruntime-qnn compiled no context (exit {child.returncode}): {said or 'it said nothing'}",
            where=str(folder),
            hint="compare the graph with what the HTP supports: docs of the QNN execution provider",
        )
