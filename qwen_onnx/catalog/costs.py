"""What a model's weights take, for the passes that say what they cost: counts of weights in, bytes out."""

from __future__ import annotations

from dataclasses import dataclass, replace

# more logits than this are made piece by piece; those of 512 tokens and 65,536 words stay in one piece
LOGITS_PIECE = 1 << 25


@dataclass(frozen=True)
class Dimensions:
    """Numbers of weights that a build's size follows from.

    Attributes:
        layer: weights of all matrices of one layer, ``largest`` of its largest, ``fused`` of q, k and v.
        widest: most inputs of a matrix.
        tables: weights of the embedding; of the head as well.
        stored: bytes of a weight in the checkpoint.
        context: tokens that the artifact accepts.
        experts: weights of one layer's experts, ``expert`` of one; ``router`` of what chooses among them.
        chosen: experts that a token goes to.
        exact: whether the matrices are known, not only the number of all weights.
    """

    layers: int
    hidden: int
    layer: int
    largest: int
    fused: int
    widest: int
    vocabulary: int
    tied: bool
    head_dim: int
    stored: int
    tokenizer: int
    context: int
    experts: int
    expert: int
    router: int
    chosen: int
    exact: bool

    @property
    def tables(self) -> int:
        """Weights of the embedding."""
        return self.vocabulary * self.hidden

    @property
    def body(self) -> int:
        """Weights of all layers."""
        return self.layers * self.layer

    @property
    def weights(self) -> int:
        """All weights, norms and biases apart."""
        return self.body + self.tables * (1 if self.tied else 2)

    @property
    def unshared(self) -> int:
        """All weights once the head has its own."""
        return self.body + 2 * self.tables


@dataclass(frozen=True)
class Stored:
    """Bytes of a model between two steps of a pipeline.

    Attributes:
        head: 0 where the head reads the embedding.
        rest: of what is neither body, head nor embedding.
        scales: number of float32 scales within body and head; 0 when nothing is quantised.
        planes: bytes of body and head once their codes are stored in planes of bits; 0: they stay as they are.
    """

    body: int
    head: int
    embedding: int
    rest: int = 0
    scales: int = 0
    planes: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.body + self.head + self.embedding + self.rest

    def times(self, copies: int, rest: int = 0) -> Stored:
        """Body and head in several copies, and more of the rest."""
        return replace(self, body=self.body * copies, head=self.head * copies, rest=self.rest + rest)


def as_floats(model: Dimensions, number: int, *, tied: bool | None = None) -> Stored:
    """The model in floats of ``number`` bytes; ``tied`` instead of the checkpoint's own."""
    shared = model.tied if tied is None else tied
    return Stored(number * model.body, 0 if shared else number * model.tables, number * model.tables)


def packed(weights: int, bits: int, block: int, *, symmetric: bool, scale: int) -> int:
    """Bytes of quantised weights with their scales of ``scale`` bytes and zero points."""
    return int(weights * bits / 8 + weights / block * (scale + (0 if symmetric else bits / 8)))
