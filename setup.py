"""Puts recipes/ and pipelines/ into the wheel as qwen_onnx/data/; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithData(build_py):
    """An editable installation reads the checkout's own folders."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in ("recipes", "pipelines"):
            target = Path(self.build_lib) / "qwen_onnx/data" / name
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(name, target)


setup(cmdclass={"build_py": BuildWithData})
