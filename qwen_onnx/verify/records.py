"""What a verification is given and what it hands back, except the report itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from qwen_onnx.records import MeasuredVerdict, Verdict


class Frozen(BaseModel):
    """Frozen and strict about keys; NaN and infinity survive a trip through JSON as strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """FAIL before INCONCLUSIVE before PASS; nothing at all proves nothing."""
    found = set(verdicts)
    if Verdict.FAIL in found:
        return Verdict.FAIL
    return Verdict.PASS if found == {Verdict.PASS} else Verdict.INCONCLUSIVE


Depth = Literal["quick", "release"]
# (tokens of a window, windows of each domain): 6 thousand tokens, and up to 32 thousand as far as the texts go
DEPTHS: dict[Depth, tuple[int, int]] = {"quick": (384, 2), "release": (512, 8)}

RECOVERY = 0.95  # what the field takes for kept


class TaskOptions(Frozen):
    """Benchmarks that both sides answer; what the artifact keeps of PyTorch's accuracy is its recovery."""

    names: tuple[str, ...] = Field(min_length=1)
    recovery: float = Field(
        default=RECOVERY, gt=0, le=1, description="least share of PyTorch's accuracy, by its lower bound"
    )
    items: int | None = Field(default=None, ge=1, description="of each benchmark, from its beginning; None: all")
    hub: bool = Field(default=False, description="items from the hub, also where a package has some")


class VerifyOptions(Frozen):
    """How much is measured; the defaults take about two minutes for 135 M parameters on two cores.

    ``checks`` names the checks to run, empty for all; a check left out is INCONCLUSIVE.
    Lengths are tokens. ``seed`` fixes the bootstrap, so that the same data gives the same verdict.
    """

    depth: Depth = "quick"
    checks: tuple[str, ...] = ()
    threads: int = Field(default=2, ge=1)
    seed: int = 20261123
    window: int = Field(default=DEPTHS["quick"][0], ge=16)
    windows_per_domain: int = Field(default=DEPTHS["quick"][1], ge=1)
    layers_at_once: int | None = Field(default=None, ge=1, description="of the artifact; by default all, if they fit")
    block: int = Field(default=64, ge=1)
    resamples: int = Field(default=2000, ge=100)
    decode_tokens: int = Field(default=96, ge=8)
    greedy_tokens: int = Field(default=32, ge=1)
    simulator_domains: int = Field(default=2, ge=1, description="texts that a vendor's simulator reads")
    simulator_tokens: int = Field(default=64, ge=2, description="tokens of each")
    simulator_steps: int = Field(default=2, ge=1, description="tokens that it decodes through the KV cache")
    prompt_tokens: int = Field(default=512, ge=1)
    new_tokens: int = Field(default=128, ge=2)
    segment: int = Field(default=16, ge=1, description="tokens decoded by one engine before the other takes over")
    rounds: int = Field(default=3, ge=1)
    prefill_pairs: int = Field(default=4, ge=0, description="prefills measured beyond those of the rounds")
    pytorch: Literal["fitting", "whole", "layerwise"] = Field(
        default="fitting",
        description="how PyTorch is run: whole where memory holds it, else layer by layer",
    )
    tasks: TaskOptions | None = None

    @classmethod
    def of(cls, depth: Depth) -> VerifyOptions:
        """The options of a depth: how many tokens of each domain the drift is measured on."""
        window, count = DEPTHS[depth]
        return cls(depth=depth, window=window, windows_per_domain=count)


class Estimate(Frozen):
    """A measured value with its one-sided 95 % bounds on either side."""

    value: float
    lower: float
    upper: float


class CheckResult(Frozen):
    """What one check found. ``measured`` and ``limit`` share their keys where a limit applies."""

    name: str
    verdict: MeasuredVerdict
    measured: dict[str, float | str] = Field(default_factory=dict)
    limit: dict[str, float | str] = Field(default_factory=dict)
    detail: str = ""
    seconds: float = 0.0


class DomainDrift(Frozen):
    """Drift within one kind of text. KLD in nats per token, ``top1`` a fraction."""

    name: str
    tokens: int
    kld_mean: Estimate
    kld_p99: float
    top1: float
    ppl_ratio: float


class Drift(Frozen):
    """Teacher-forced drift of the artifact from PyTorch fp32 on identical token ids.

    ``quantiles`` holds (fraction of positions, KLD in nats) for the plot;
    ``sources`` maps each text to the SHA-256 of what was used of it.
    """

    positions: int
    windows: int
    doubled: bool
    kld_mean: Estimate
    kld_p99: Estimate
    top1: Estimate
    ppl_ratio: Estimate
    baseline_ppl: float
    domains: tuple[DomainDrift, ...]
    quantiles: tuple[tuple[float, float], ...]
    sources: dict[str, str]


class TaskResult(Frozen):
    """One benchmark, answered by both sides.

    Args:
        metric: lm-eval's name, and its filter of answers where it has several.
        source: where the items come from, with its version.
        artifact, baseline: shares of items answered rightly; recovery: the first divided by the second, None where
            PyTorch answers too few rightly to divide by.
        lost, won: items that PyTorch alone, and that the artifact alone, answers rightly.
        p: of McNemar's exact test, two-sided: how often chance would make the flips so one-sided.
    """

    name: str
    metric: str
    source: str
    items: int
    artifact: float
    baseline: float
    recovery: Estimate | None
    lost: int
    won: int
    p: float
    verdict: MeasuredVerdict


class Spread(Frozen):
    """Median and quartiles of repeated measurements."""

    median: float
    q1: float
    q3: float
    count: int


class EngineLatency(Frozen):
    """One engine in a process of its own: seconds, tokens per second, bytes.

    ``computed`` says how, where the engine did not fit and its figures were not measured as they stand.
    """

    name: str
    computed: str = ""
    load_s: float
    peak_rss: int
    ttft_s: Spread
    tpot_s: Spread
    prefill_tok_s: Spread
    decode_tok_s: Spread


class Latency(Frozen):
    """Paired speeds; a speed-up above 1 means that the artifact is faster.

    ``control`` compares the artifact with itself and should be 1; ``pairs`` holds
    (artifact, PyTorch) decode tokens per second, measured next to each other. ``bandwidth`` is bytes a second that
    as many threads read from memory; ``bytes_per_token`` those of the weights that a decoded token reads.
    """

    prompt_tokens: int
    new_tokens: int
    threads: int
    artifact: EngineLatency
    baseline: EngineLatency
    decode_speedup: Estimate
    prefill_speedup: Estimate
    control: Estimate
    pairs: tuple[tuple[float, float], ...]
    bandwidth: float | None = None
    bytes_per_token: int | None = None

    @property
    def share_of_limit(self) -> float | None:
        """Decode speed over the most that memory allows, a fraction; None when that was not measured."""
        if self.bandwidth is None or self.bytes_per_token is None:
            return None
        return self.artifact.decode_tok_s.median * self.bytes_per_token / self.bandwidth
