"""A request on its way through the engine."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from qwen_onnx.runtime.engines.batch.sampling import Sampler
from qwen_onnx.runtime.engines.batch.sight import Looked
from qwen_onnx.runtime.engines.batch.speculation import Speculator
from qwen_onnx.runtime.engines.interface import Listener, TokenRequest


@dataclass(eq=False)
class Stream:
    """A request on its way: ``filled`` of its prompt's tokens are in its row; ``token`` waits to go in.

    ``rest`` is how many steps of others it owes for wider ones of its own; ``scope`` whose prefixes it may find;
    ``shared`` how much of its prompt stood in some row when it came.
    """

    request: TokenRequest
    listener: Listener
    sampler: Sampler
    looked: Looked
    speculator: Speculator | None = None
    scope: str = ""
    rest: float = 0
    row: int = -1
    filled: int = 0
    cached: int = 0
    shared: int = 0
    token: int | None = None
    drawn: int = 0
    served: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """See ``requests.Handle``."""
        self.cancelled.set()

    @property
    def seeded(self) -> bool:
        """A seed is a promise: rounding depends on who else is in the batch, so such a stream runs alone."""
        return self.request.sampling.seed is not None

    @property
    def fresh(self) -> bool:
        """Whether its whole prompt is computed: cached keys and values do not tell how likely their tokens were."""
        return self.seeded or self.request.scored
