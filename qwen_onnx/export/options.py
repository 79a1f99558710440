"""What our Olive passes share: how their options reach Olive and come back."""

from __future__ import annotations

from typing import Any, TypeVar

from olive.passes.pass_config import BasePassConfig, PassConfigParam

from qwen_onnx.records import Record

R = TypeVar("R", bound=Record)


def parameters(record: type[Record]) -> dict[str, PassConfigParam]:
    """The fields of ``record`` as Olive wants a pass to declare them."""
    return {
        name: PassConfigParam(type_=Any, default_value=field.get_default(), description=field.description or name)
        for name, field in record.model_fields.items()
    }


def chosen(record: type[R], config: BasePassConfig) -> R:
    """What Olive hands to a pass, checked again."""
    return record.model_validate({name: getattr(config, name) for name in record.model_fields})
