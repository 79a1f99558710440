"""Proof on the device that will run an artifact: against the golden file, without torch, checkpoint and network."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from qwen_onnx.artifact.manifest import open_runnable
from qwen_onnx.artifact.seal import runnable_digest
from qwen_onnx.catalog.schema import Limits
from qwen_onnx.errors import ArtifactError, EnvironmentFault, VerificationError
from qwen_onnx.files import sha256_of, write_whole
from qwen_onnx.processes.progress import progress
from qwen_onnx.records import MeasuredVerdict, Sha256, Verdict
from qwen_onnx.runtime.engines.devices import Device, device
from qwen_onnx.runtime.engines.genai import Engine, Shape
from qwen_onnx.runtime.processing.template import ChatTemplate, has_template
from qwen_onnx.runtime.processing.tokenizer import TextTokenizer
from qwen_onnx.sources.fetch import weights_digest
from qwen_onnx.verify.golden import GOLDEN, TOP, Golden, compare_coarse
from qwen_onnx.verify.keeping import CONTINUATION
from qwen_onnx.verify.latency import measure_alone
from qwen_onnx.verify.loaded import Loaded
from qwen_onnx.verify.parity import decode_positions, mismatches
from qwen_onnx.verify.records import CheckResult, EngineLatency, Frozen, VerifyOptions, worst
from qwen_onnx.verify.report import check_table, environment
from qwen_onnx.verify.results import DECODE_LIMIT, agreement, batch_result, carried_out, drift_result, parity_result
from qwen_onnx.verify.roofline import bytes_per_token
from qwen_onnx.verify.scoring import OnnxScorer, Positions, placed
from qwen_onnx.verify.statistics import bootstrap

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_OPTIONS = VerifyOptions()
# what must run on the device; shapes and positions may be computed beside it
HEAVY = {"MatMulNBits", "MatMul", "Gemm", "QMoE", "MoE", "GroupQueryAttention", "MultiHeadAttention", "Attention"}
# genai's names of the providers that artifacts are built for, by device
BUILT_FOR = {"cpu": "cpu", "cuda": "cuda", "dml": "dml", "webgpu": "webgpu", "NvTensorRtRtx": "cuda"}


class DeviceReport(Frozen):
    """What was found on one device, bound to the bytes that it was found of.

    Attributes:
        name: the plan's; ``digest`` pins every byte of the folder, see ``artifact.seal.runnable_digest``.
        golden: SHA-256 of the golden file.
        device: a key of ``runtime.engines.devices.PROVIDERS``; the next three describe it.
        claim: what the verdict proves.
        speed: of the artifact alone; None where it was built for another device.
        finished: when, in UTC.
    """

    schema_version: Literal[1] = 1
    name: str
    digest: Sha256
    golden: Sha256
    device: str
    provider: str
    hardware: str
    driver: str
    verdict: MeasuredVerdict
    claim: str
    checks: tuple[CheckResult, ...]
    limits: Limits
    speed: EngineLatency | None = None
    environment: dict[str, str | float] = Field(default_factory=dict)
    finished: str

    def save(self, path: Path) -> Path:
        """Write the record, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self.model_dump_json(indent=2) + "\n")
        return path

    def json_line(self) -> str:
        """One line of JSON: the verdict, what did not pass, and the main figures."""
        found = {item.name: item.measured for item in self.checks}
        line: dict[str, object] = {
            "verdict": self.verdict,
            "claim": self.claim,
            "not_passed": [item.name for item in self.checks if item.verdict is not Verdict.PASS],
            "kld_mean_lower_bound": found["drift"].get("kld_mean"),
        }
        if self.speed:
            line["decode_tok_s"] = self.speed.decode_tok_s.median
            line["prefill_tok_s"] = self.speed.prefill_tok_s.median
        return json.dumps(line)


def verify_on(
    folder: Path, name: str, options: VerifyOptions = DEFAULT_OPTIONS, golden: Path | None = None
) -> DeviceReport:
    """Prove an artifact or a package on a device of this machine.

    Args:
        folder: of the artifact or package; every byte is compared with its checksums first.
        name: of the device, a key of ``runtime.engines.devices.PROVIDERS``.
        golden: file of the teacher's answers; None: the folder's own.

    Raises:
        ArtifactError: the folder or the golden file is damaged, or they are of different models.
        EnvironmentFault: this machine has no such device, or the artifact was built for another.
        VerificationError: the artifact is in a form that only the target's own runner reads.
    """
    opened, place = open_runnable(folder), device(name)
    built_for = _require_built_for(folder, place)
    file = golden or folder / GOLDEN
    answers = Golden.read(file)
    if answers.about.weights != weights_digest(opened.manifest.source.files):
        raise ArtifactError(
            f"the golden file is of {answers.about.model}, with other weights than the artifact's",
            where=str(file),
            hint="use the golden file that was made with the artifact",
        )
    plan = opened.manifest.plan
    run = _Run(folder, place, answers, options, plan.limits, on_cpu=built_for != name)
    checks = tuple(carried_out(each.__name__, partial(each, run)) for each in CHECKS)
    verdict = worst(item.verdict for item in checks)
    told = f"run on this device: {place.hardware} ({place.provider}, driver {place.driver})"
    return DeviceReport(
        name=plan.name,
        digest=runnable_digest(folder),
        golden=sha256_of(file),
        device=name,
        provider=place.provider,
        hardware=place.hardware,
        driver=place.driver,
        verdict=verdict,
        claim=f"proven: {told}" if verdict is Verdict.PASS else f"not proven ({verdict}); {told}",
        checks=checks,
        limits=plan.limits,
        speed=run.speed,
        environment=environment(),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def print_device_report(report: DeviceReport, console: Console) -> None:
    """A table for people, then one line of JSON for programs."""
    console.print(check_table(report.checks, report.verdict, report.claim))
    console.print(report.json_line(), markup=False, highlight=False, soft_wrap=True)


def _require_built_for(folder: Path, place: Device) -> str:
    """The device that the artifact was built for; on a CPU, graphs for GPUs run too.

    Raises:
        EnvironmentFault: another device than the one asked for.
    """
    provider = Shape.read(folder).provider
    found = BUILT_FOR.get(provider)
    if found is None:
        raise VerificationError(
            f"an artifact for {provider} runs in its vendor's own engine, which no golden file is read with yet",
            where=str(folder),
            hint=f"qwen-onnx verify {folder} measures it against the checkpoint",
        )
    if place.name not in {found, "cpu"}:
        raise EnvironmentFault(
            f"the artifact was built for {found}, not for {place.name}",
            where=str(folder),
            hint=f"qwen-onnx optimize ... --target {place.name}, or verify --device {found}",
        )
    return found


class _Run:
    """One verification on a device."""

    def __init__(
        self, folder: Path, place: Device, golden: Golden, options: VerifyOptions, limits: Limits, *, on_cpu: bool
    ) -> None:
        self.folder, self.place, self.golden, self.options, self.limits = folder, place, golden, options, limits
        self.on_cpu, self.loaded = on_cpu, Loaded()
        self.speed: EngineLatency | None = None
        self.texts = [pair for pair in golden if pair[0].domain != CONTINUATION]
        # the beginning of one text of each kind
        self.prompts = {
            stretch.domain: part.ids[: options.decode_tokens].tolist() for stretch, part in self.texts[::-1]
        }

    @property
    def scorer(self) -> OnnxScorer:
        """The artifact on the device, all positions at once; drops ``engine``."""
        threads, provider = self.options.threads, self.place.provider
        return self.loaded.get("scorer", lambda: OnnxScorer(self.folder, threads, provider=provider))

    @property
    def engine(self) -> Engine:
        """The engine that serves it; drops ``scorer``."""
        return self.loaded.get("engine", lambda: Engine(self.folder, threads=self.options.threads, on_cpu=self.on_cpu))


Check = Callable[[_Run], CheckResult]


def tokenizer(run: _Run) -> CheckResult:
    """The runtime encodes every text as the checkpoint's tokenizer did."""
    served = TextTokenizer(run.folder)
    known = {item.text: list(item.ids) for item in run.golden.about.texts}
    wrong = mismatches(list(known), known.__getitem__, lambda text: list(served.encode(text)))
    return parity_result("tokenizer", len(known), wrong, {})


def chat_template(run: _Run) -> CheckResult:
    """The runtime renders every conversation as transformers did; without a template, neither has one."""
    known = run.golden.about.conversations
    if not known or not has_template(run.folder):
        same = bool(known) == has_template(run.folder)
        detail = "neither has a chat template" if same else "only one of artifact and checkpoint has a chat template"
        return CheckResult(name="chat_template", verdict=Verdict.PASS if same else Verdict.FAIL, detail=detail)
    template = ChatTemplate(run.folder)
    wrong = mismatches(known, lambda item: item.text, lambda item: template.render([dict(m) for m in item.messages]))
    return parity_result("chat_template", len(known), wrong, {})


def placement(run: _Run) -> CheckResult:
    """Every heavy operator ran on the device: ONNX Runtime falls back to the CPU in silence."""
    ids = run.texts[0][1].ids.tolist()
    places = placed(run.folder, run.options.threads, run.place.provider, ids)
    heavy = {key: count for key, count in places.items() if key[0] in HEAVY}
    away = sum(count for (_, provider), count in heavy.items() if provider != run.place.provider)
    return CheckResult(
        name="placement",
        verdict=Verdict.PASS if heavy and not away else Verdict.FAIL,
        measured={"heavy_operators": sum(heavy.values()), "elsewhere": away, "all": sum(places.values())},
        limit={"elsewhere": 0},
        detail="" if heavy else "no operator that multiplies matrices was found",
    )


def drift(run: _Run) -> CheckResult:
    """The artifact predicts what PyTorch predicted, on the outcomes that the golden file keeps."""
    parts: dict[str, list[Positions]] = {}
    for number, (stretch, teacher) in enumerate(run.texts, 1):
        progress(f"drift: text {number} of {len(run.texts)}")
        found = compare_coarse(teacher, run.scorer.logits(teacher.ids.tolist()), run.options.threads)
        if not found.finite:
            return CheckResult(name="drift", verdict=Verdict.FAIL, detail="a logit is NaN or infinite")
        parts.setdefault(stretch.domain, []).append(found)
    options, limits = run.options, run.limits
    estimates = bootstrap(parts, block=options.block, resamples=options.resamples, seed=options.seed)
    return drift_result(estimates, limits, {"positions": sum(map(_count, parts.values()))}, _nearness(run.golden))


def _count(parts: list[Positions]) -> int:
    return sum(len(part.kld) for part in parts)


def _nearness(golden: Golden) -> str:
    about = golden.about
    told = f"KL divergence on the teacher's {TOP} likeliest tokens and all others as one: a lower bound"
    if not about.coarse or not about.full:
        return told
    return f"{told}; at the build it was {about.coarse / about.full:.1%} of the full one"


def kv_decode(run: _Run) -> CheckResult:
    """Token by token through the KV cache gives the logits of one run over all tokens."""
    found = decode_positions(
        lambda texts: [run.engine.forced_logits(ids[:1], ids[1:]) for ids in texts],
        lambda: run.scorer,
        run.prompts,
        run.options.threads,
    )
    verdicts, measured = agreement(found)
    return CheckResult(name="kv_decode", verdict=worst(verdicts), measured=measured, limit=dict(DECODE_LIMIT))


def batched(run: _Run) -> CheckResult:
    """Texts that share the steps of a batch get the logits of a lone run."""
    if run.place.name != "cpu":
        return CheckResult(name="batched", verdict=Verdict.PASS, detail="served one request at a time")
    run.loaded.drop()
    return batch_result(run.folder, run.prompts, lambda: run.scorer, run.options.threads)


def greedy(run: _Run) -> CheckResult:
    """The artifact takes the teacher's next token along the teacher's own greedy answers; a figure, without a limit."""
    agreed = [
        compare_coarse(part, run.scorer.logits(part.ids.tolist())).agree[stretch.prompt - 1 :]
        for stretch, part in run.golden
        if stretch.domain == CONTINUATION
    ]
    count = sum(map(len, agreed))
    measured: dict[str, float | str] = {"tokens": count}
    if count:
        measured["teacher_token"] = sum(float(part.sum()) for part in agreed) / count
    return CheckResult(name="greedy", verdict=Verdict.PASS, measured=measured, detail="no limit set")


def speed(run: _Run) -> CheckResult:
    """Decode and prefill speed of the artifact alone: PyTorch is not here."""
    if run.on_cpu:
        detail = "not measured: the artifact was built for another device"
        return CheckResult(name="speed", verdict=Verdict.PASS, detail=detail)
    run.loaded.drop()
    options = run.options
    ids = [token for _, part in run.texts for token in part.ids.tolist()][: options.prompt_tokens]
    run.speed, bandwidth = measure_alone(run.folder, ids, options)
    share = run.speed.decode_tok_s.median * bytes_per_token(run.folder) / bandwidth
    measured: dict[str, float | str] = {
        "decode_tok_s": run.speed.decode_tok_s.median,
        "prefill_tok_s": run.speed.prefill_tok_s.median,
        "peak_bytes": run.speed.peak_rss,
    }
    if run.place.name == "cpu":
        measured["share_of_limit"] = share
    return CheckResult(name="speed", verdict=Verdict.PASS, measured=measured, detail="no limit set")


CHECKS: tuple[Check, ...] = (tokenizer, chat_template, placement, drift, kv_decode, batched, greedy, speed)
