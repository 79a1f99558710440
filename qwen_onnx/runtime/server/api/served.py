"""The names that a server answers to: its model, and the model with one of its adapters, ``MODEL:ADAPTER``."""

from __future__ import annotations

import time
from typing import Any

from fastapi.responses import JSONResponse

from qwen_onnx.runtime.server.adapter_folder import AdapterFolder
from qwen_onnx.runtime.server.api.protocol import Model, ModelList, error_body
from qwen_onnx.runtime.service.text import TextService

SEPARATOR = ":"


class Served:
    """Models of a server by name.

    Args:
        service: whose adapters those are.
        folder: of others that can be loaded.
    """

    def __init__(self, service: TextService, model: str, folder: AdapterFolder | None = None) -> None:
        self.model, self._service, self._folder, self._since = model, service, folder, int(time.time())

    def name_of(self, adapter: str) -> str:
        """What requests ask for."""
        return f"{self.model}{SEPARATOR}{adapter}"

    def names(self) -> list[str]:
        """The model first."""
        return [self.model, *map(self.name_of, self._service.adapters)]

    def models(self) -> ModelList:
        """All of them."""
        return ModelList(data=[self.one(name) for name in self.names()])

    def one(self, name: str) -> Model:
        """One of ``names``."""
        return Model(id=name, created=self._since)

    def unknown(self, asked: str) -> JSONResponse | None:
        """The refusal of what is not one of ``names``."""
        names = self.names()
        if asked in names:
            return None
        text = f"the model {asked!r} does not exist; this server has {', '.join(map(repr, names))}"
        adapter = asked.removeprefix(self.name_of(""))
        if self._folder and adapter != asked and self._folder.path(adapter):
            text = f'the adapter {adapter} is not loaded; first: POST /v1/adapters {{"name": "{adapter}"}}'
        return JSONResponse(error_body(text, kind="invalid_request_error", param="model", code="model_not_found"), 404)

    def options(self, asked: str) -> dict[str, Any]:
        """What ``GenerationConfig`` is told for one of ``names``."""
        return {} if asked == self.model else {"adapter": asked.removeprefix(f"{self.model}{SEPARATOR}")}
