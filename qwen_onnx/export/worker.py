"""The child process that runs Olive: ``python -m qwen_onnx.export.worker CONFIG RESULT``.

A process of its own, because Olive changes global state, needs much memory and logs to stdout. It writes
RESULT only when Olive itself says that there is an output model.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from qwen_onnx.catalog.registry import passes
from qwen_onnx.processes.children import die_with_parent


def package_config(folder: Path) -> Path:
    """Olive's own list of passes plus ours, as the file that ``olive.workflows.run`` takes."""
    import olive

    packaged = Path(olive.__file__).parent / "olive_config.json"
    config: dict[str, Any] = json.loads(packaged.read_text(encoding="utf-8"))
    for name, options in passes().items():
        config["passes"][name] = {
            "module_path": f"{options.module()}.{name}",
            "supported_providers": ["*"],
            "supported_accelerators": ["*"],
            "supported_precisions": ["*"],
            "supported_algorithms": [],
            "supported_quantization_encodings": [],
            "run_on_target": False,
        }
    path = folder / "package_config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def main(config_file: str, result_file: str) -> int:
    """Run the config; 0 only when there is an output model."""
    # a killed build would leave its child writing into a folder that is gone
    die_with_parent()
    os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    from olive.workflows import run

    config = json.loads(Path(config_file).read_text(encoding="utf-8"))
    output = run(config, package_config=str(package_config(Path.cwd())))
    if output is None or not output.has_output_model():
        print("Olive produced no output model", file=sys.stderr)
        return 1
    model = output.get_best_candidate()
    Path(result_file).write_text(json.dumps({"model_path": str(model.model_path)}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
