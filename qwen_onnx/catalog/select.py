"""The catalog for people: a table of it, and the models that fit a machine and a task, ranked with reasons."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_onnx.catalog.load import Catalog
from qwen_onnx.catalog.plan import Plan, make_plan
from qwen_onnx.catalog.schema import Family, Row, Verification
from qwen_onnx.catalog.sizes import dimensions, graph_bytes, steps_of
from qwen_onnx.catalog.sources import FolderSource
from qwen_onnx.errors import ConfigError

# licences whose text allows commercial use without asking, up to their own limits of users
COMMERCIAL = frozenset({"Apache-2.0", "LicenseRef-Tongyi-Qianwen", "LicenseRef-Qwen"})
# process, graph and activations of a piece of the prompt: the starter's peak of 362 MB less weights and cache
RUNTIME_BYTES = 225_000_000
# tasks that only some models can do at all, by what a row's modality calls the sense
SENSES = {"vision": "sees pictures", "audio": "hears sounds"}


def count(value: int | None) -> str:
    """A number of weights for people; nothing for an unknown one."""
    if value is None:
        return ""
    if value >= 1e12:
        return f"{value / 1e12:.3g}T"
    return f"{value / 1e9:.3g}B" if value >= 1e9 else f"{value / 1e6:.0f}M"


def tokens(value: int) -> str:
    """A number of tokens for people: 32k is 32,768."""
    return f"{value / 1024:.0f}k" if value >= 1024 else str(value)


def context_of(row: Row) -> str:
    """Native context, and the extended one."""
    return (tokens(row.context) if row.context else "") + (
        f" ({tokens(row.extended_context.tokens)})" if row.extended_context else ""
    )


def marked(row: Row, recipe: str | None) -> str:
    """The id of a row for people; one of ``recipe``, the user's own, is told apart."""
    return f"{row.id} (own)" if recipe else row.id


def columns(row: Row, catalog: Catalog) -> tuple[str, ...]:
    """A row as the table shows it: id, kind, weights, context, licence, targets."""
    weights = count(row.parameters) + (f" ({count(row.active_parameters)})" if row.active_parameters else "")
    where = "planned" if row.planned else _targets(row, catalog)
    return (
        marked(row, catalog.own_file_of(row.id)),
        row.kind or "",
        weights,
        context_of(row),
        (row.license or "").removeprefix("LicenseRef-"),
        where,
    )


def _targets(row: Row, catalog: Catalog) -> str:
    """Names, or those that are missing where these are fewer."""
    offered = catalog.targets_of(row)
    missing = [name for name, pipeline in catalog.pipelines.items() if pipeline.precisions and name not in offered]
    if len(missing) >= len(offered):
        return ", ".join(offered)
    return f"all but {', '.join(missing)}" if missing else "all"


def listing(rows: Iterable[Row], catalog: Catalog) -> dict[str, Any]:
    """What ``list`` shows, for programs: ``models`` with facts of ``rows``, and every one of ``targets``."""
    facts = {"id", "title", "kind", "parameters", "active_parameters", "license", "context", "languages", "tasks"}
    models = [
        {
            **row.model_dump(mode="json", include=facts),
            "extended_context": row.extended_context and row.extended_context.tokens,
            "planned": row.planned,
            "catalogued": catalog.is_catalogued(row.id),
            "recipe": catalog.own_file_of(row.id),
            "targets": {} if row.planned else {t: catalog.precisions_of(row, t) for t in catalog.targets_of(row)},
        }
        for row in rows
    ]
    about = {"device", "precisions", "default", "verification", "unavailable"}
    targets = {name: pipeline.model_dump(mode="json", include=about) for name, pipeline in catalog.pipelines.items()}
    for told in targets.values():
        told["precisions"] = list(told["precisions"])
    return {"models": models, "targets": targets}


HEADERS = ("model", "kind", "weights (active)", "context (long)", "license", "targets")


def reasons(rows: Iterable[Row]) -> list[str]:
    """Why rows are only planned: each reason once, with the number of rows."""
    found = Counter(row.planned for row in rows if row.planned)
    return [f"planned ({number}): {reason}" for reason, number in found.most_common()]


def target_lines(catalog: Catalog) -> list[str]:
    """Each target: its precisions and how it is proven; below it why others are unavailable or rows excluded."""
    lines = []
    for name, pipeline in catalog.pipelines.items():
        built = ", ".join(pipeline.precisions) or "nothing yet"
        lines.append(f"{name}: {built}; {pipeline.verification.text}" if pipeline.precisions else f"{name}: {built}")
        for reason in dict.fromkeys(pipeline.unavailable.values()):
            which = [precision for precision, why in pipeline.unavailable.items() if why == reason]
            lines.append(f"  not {', '.join(which)}: {reason}")
        lines += [f"  not {_some(models)}: {reason}" for reason, models in _lacking(catalog, name).items()]
    return lines


def _lacking(catalog: Catalog, target: str) -> dict[str, list[str]]:
    """Models that have no build for ``target``, or none in some precision, by the reason."""
    found: dict[str, list[str]] = {}
    for _, row in catalog.rows.values():
        override = row.targets.get(target)
        if row.planned or override is None:
            continue
        if override.excluded:
            found.setdefault(override.excluded, []).append(row.id)
        for precision, reason in override.without.items():
            found.setdefault(reason, []).append(f"{row.id} in {precision}")
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def matrix(catalog: Catalog) -> str:
    """The comparison matrix of docs/models.md in Markdown: one line per family."""
    lines = ["| family | sizes | weights | context | license | export |", "|---|---|---|---|---|---|"]
    for family in sorted(catalog.families.values(), key=lambda family: family.family):
        known = sorted(row.parameters for row in family.sizes if row.parameters)
        sizes = " – ".join(dict.fromkeys([count(known[0]), count(known[-1])])) if known else ""
        longest = max((row.context for row in family.sizes if row.context), default=None)
        licenses = sorted({row.license for row in family.sizes if row.license})
        export = _export_of(family, catalog)
        context = tokens(longest) if longest else ""
        lines.append(
            f"| {family.family} | {len(family.sizes)} | {sizes} | {context} | {', '.join(licenses)} | {export} |"
        )
    return "\n".join(lines) + "\n"


def _export_of(family: Family, catalog: Catalog) -> str:
    rows = [catalog.row(row.id)[1] for row in family.sizes]
    planned = [row for row in rows if row.planned]
    if len(planned) == len(rows):
        return "planned"
    common = [set(catalog.targets_of(row)) for row in rows if not row.planned]
    targets = ", ".join(name for name in catalog.pipelines if all(name in found for found in common))
    return targets if not planned else f"{targets}; {len(planned)} planned"


@dataclass(frozen=True)
class Wish:
    """What a user needs.

    Attributes:
        ram: bytes that the served model may take.
        task: ``general``, ``coding`` or ``math``, for which a model may be made; ``vision`` or ``audio``, for which it
            must be.
        context: tokens of prompt and answer together.
        language: ISO 639-1 code, or None.
        commercial: whether the licence has to allow commercial use.
    """

    ram: int
    task: str = "general"
    context: int = 4096
    language: str | None = None
    commercial: bool = False


@dataclass(frozen=True)
class Choice:
    """A row that fits on ``target``, with what speaks for it.

    Attributes:
        bytes_needed: weights, cache and runtime together.
        recipe: the user's own recipe that the row is of; None: the catalogue's.
    """

    row: Row
    target: str
    bytes_needed: int
    reasons: tuple[str, ...]
    recipe: str | None = None

    def told(self) -> dict[str, Any]:
        """The choice for programs."""
        facts = {"model": self.row.id, "target": self.target, "parameters": self.row.parameters}
        facts |= {"catalogued": self.recipe is None, "recipe": self.recipe}
        return {**facts, "bytes_needed": self.bytes_needed, "reasons": list(self.reasons)}

    @property
    def command(self) -> str:
        """What builds it."""
        if self.recipe is None:
            return f"make optimize MODEL={self.row.id} TARGET={self.target}"
        source = self.row.sources[0]
        folder = f" --source {shlex.quote(f'path/to/{source.name}')}" if isinstance(source, FolderSource) else ""
        return f"qwen-onnx optimize {self.row.id} --target {self.target} --recipe {shlex.quote(self.recipe)}{folder}"


def bytes_needed(plan: Plan, context: int) -> int | None:
    """Memory to serve the artifact of ``plan`` at ``context`` tokens; None when its shape is not known.

    Weights as ``sizes`` counts them, the KV cache of ``2 · layers · kv_heads · head_dim`` numbers per token (Ainslie et
    al. 2023, arXiv:2305.13245), and what the runtime itself takes.
    """
    shape = plan.shape
    if not (shape.layers and shape.kv_heads and shape.heads and shape.hidden_size and shape.vocab_size):
        return None
    head_dim = shape.head_dim or shape.hidden_size // shape.heads
    # OpenVINO's cache is fp16 on an NPU, whatever the model's inputs and outputs are
    number = 2 if plan.readback.provider == "OpenVINO" else plan.readback.io_bits // 8
    cache = 2 * shape.layers * shape.kv_heads * head_dim * number * context
    found = dimensions(plan)
    widened = sum(step.widened(found) for step in steps_of(plan))
    return graph_bytes(found, plan) + widened + cache + RUNTIME_BYTES


def targets_on(catalog: Catalog, device: str) -> list[str]:
    """The targets that ``device`` means: one by its name, or all of a kind (cpu, gpu, npu), the best proven first.

    Raises:
        ConfigError: there is no such target or kind, or nothing can be built for it.
    """
    pipelines = catalog.pipelines
    if device in pipelines:
        catalog.precision(device)
        return [device]
    levels = list(Verification)
    found = [name for name, pipeline in pipelines.items() if pipeline.device == device and pipeline.precisions]
    if not found:
        kinds = ", ".join(sorted({pipeline.device for pipeline in pipelines.values()}))
        known = f"no target {device!r}; known: {', '.join(sorted(pipelines))}; and the kinds {kinds}"
        raise ConfigError([f"--device: {known}"], hint="qwen-onnx list")
    return sorted(found, key=lambda name: levels.index(pipelines[name].verification))


def select(catalog: Catalog, wish: Wish, device: str) -> list[Choice]:
    """Rows that fit ``wish``, best first: those made for the task, then the largest that fits, then the newest.

    A row comes once, on the best proven of the device's targets that it fits.

    Raises:
        ConfigError: see ``targets_on``.
    """
    found: dict[str, Choice] = {}
    for target in targets_on(catalog, device):
        default = catalog.pipeline(target).default
        for _, row in catalog.rows.values():
            built = target in catalog.targets_of(row) and default in catalog.precisions_of(row, target)
            offered = built and not row.planned and row.id not in found
            choice = _judged(row, wish, catalog, target) if offered else None
            if choice:
                found[row.id] = choice
    return sorted(found.values(), key=lambda choice: _rank(choice.row, wish), reverse=True)


def uncounted(catalog: Catalog) -> list[str]:
    """The user's own models that ``select`` has to leave out, with the reason."""
    own = [row for _, row in catalog.rows.values() if catalog.own_file_of(row.id) and not row.planned]
    return [
        f"{row.id} of {catalog.own_file_of(row.id)} is left out: without the sizes in `shape` nobody knows its memory"
        for row in own
        if any(bytes_needed(make_plan(catalog, row.id, target), 1) is None for target in catalog.targets_of(row)[:1])
    ]


def _rank(row: Row, wish: Wish) -> tuple[object, ...]:
    made_for = wish.task in row.tasks
    answers = row.kind in ("chat", "hybrid", "thinking")
    return (made_for, answers, row.parameters or 0, row.released or "")


def _judged(row: Row, wish: Wish, catalog: Catalog, target: str) -> Choice | None:
    if wish.task in SENSES and wish.task not in row.modality.split("+"):
        return None
    plan, pipeline = make_plan(catalog, row.id, target), catalog.pipeline(target)
    # fixed shapes hold the whole context, used or not
    held = plan.context if pipeline.context else wish.context
    needed = bytes_needed(plan, held)
    fits = needed is not None and needed <= wish.ram and plan.context >= wish.context
    allowed = not wish.commercial or row.license in COMMERCIAL
    if not fits or not allowed or not _speaks(row, wish.language) or needed is None:
        return None
    reasons = [f"{needed / 1e9:.1f} of {wish.ram / 1e9:.1f} GB at {held:,} tokens"]
    if wish.task in SENSES:
        reasons.append(SENSES[wish.task])
    elif wish.task in row.tasks:
        reasons.append(f"made for {wish.task}" if wish.task != "general" else "general purpose")
    else:
        reasons.append(f"not made for {wish.task}")
    if row.kind:
        reasons.append({"base": "base model: continues text, answers no chat"}.get(row.kind, f"{row.kind} model"))
    if wish.language:
        reasons.append(
            f"{row.languages} languages, not listed one by one" if isinstance(row.languages, int) else wish.language
        )
    if wish.commercial:
        reasons.append(f"{row.license}")
    if pipeline.verification is not Verification.RUN:
        reasons.append(f"on {target}: {pipeline.verification.text}")
    return Choice(row, target, needed, tuple(reasons), catalog.own_file_of(row.id))


def _speaks(row: Row, language: str | None) -> bool:
    """A published list decides; a published number above one is a maybe, and nothing published is a no."""
    if language is None:
        return True
    if isinstance(row.languages, int):
        return row.languages > 1
    return row.languages is not None and language in row.languages


def parse_amount(text: str, units: Sequence[tuple[str, int]], option: str) -> int:
    """``8GB`` or ``32k`` as a number; ConfigError for what is none."""
    lowered = text.strip().lower()
    for unit, factor in units:
        number = lowered.removesuffix(unit)
        if number != lowered or not unit:
            try:
                value = float(number) * factor
            except ValueError:
                break
            if 0 < value < float("inf"):
                return int(value)
            break
    raise ConfigError(
        [f"{option}: {text!r} is not an amount such as {units[0][0]}"], hint=f"give e.g. {option} 8{units[0][0]}"
    )


BYTE_UNITS = (("gb", 10**9), ("gib", 2**30), ("mib", 2**20), ("mb", 10**6), ("g", 10**9), ("", 1))
TOKEN_UNITS = (("k", 1024), ("m", 2**20), ("", 1))
