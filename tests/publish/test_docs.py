"""Every command of docs/publish.md works, in its order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.package.conftest import packaged
from tests.publish.conftest import files_of, run


@pytest.mark.slow
def test_the_commands_of_the_document(
    repository: Path,
    passing_artifact: Path,
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    registry: Any,
    huggingface: Any,
    modelscope: Any,
) -> None:
    text = (repository / "docs/publish.md").read_text(encoding="utf-8")
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 11
    package = packaged(passing_artifact, checkout / "artifacts/packages", "--name", "starter-int4")
    monkeypatch.chdir(checkout)
    for command in commands:
        words = shlex.split(command.replace("localhost:5000", f"127.0.0.1:{registry.port}"))
        assert words[0] == "qwen-onnx"
        code, out, err = run(*words[1:])
        assert code == 0, err
        assert out.strip()
    assert huggingface.private == modelscope.private == {"me/starter"}
    pulled = [path for path in (checkout / "pulled").iterdir() if path.is_dir()]
    assert len(pulled) == 4
    assert all(files_of(folder) == files_of(package) for folder in pulled)
