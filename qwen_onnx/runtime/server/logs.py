"""Structured logs on stderr, one JSON object a line, without a word of what people wrote or were answered."""

from __future__ import annotations

import logging
import sys
import traceback
from types import TracebackType
from typing import TextIO

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from qwen_onnx.runtime.service.told import RequestRecord

log = logging.getLogger("qwen_onnx.request")
SysExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class Formatter(JsonFormatter):
    """JSON lines. Of an exception it tells the class and where it came from: messages may quote what users sent."""

    def __init__(self) -> None:
        super().__init__(
            "%(levelname)s %(name)s %(message)s",
            # uvicorn's message once more, in colours
            reserved_attrs=(*RESERVED_ATTRS, "color_message"),
            rename_fields={"levelname": "level", "name": "logger"},
            timestamp="time",
            json_ensure_ascii=False,
        )

    def formatException(self, ei: SysExcInfo) -> str:
        """Class and frames."""
        kind = ei[0].__name__ if ei[0] else "none"
        frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(ei[2])]
        return "\n".join([*frames, kind])


def configure(stream: TextIO | None = None) -> None:
    """Send what this process logs, from INFO on, to ``stream`` (stderr) as JSON lines."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(Formatter())
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    # one line for each request is ours; httpx and the like tell addresses at INFO
    for name in ("uvicorn.access", "httpx", "opentelemetry"):
        logging.getLogger(name).setLevel(logging.WARNING)


def write(record: RequestRecord, seconds: float) -> None:
    """The line of one request."""
    level = logging.ERROR if record.status >= 500 and record.status not in (503, 504) else logging.INFO
    log.log(level, "request", extra={**record.summary(), "duration": round(seconds, 6)})
