"""The model card: ``README.md`` as Hugging Face Hub reads it, and the plots that it shows.

Front matter: https://huggingface.co/docs/hub/model-cards#model-card-metadata.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qwen_onnx.artifact.manifest import Manifest
from qwen_onnx.catalog.plan import Plan
from qwen_onnx.catalog.schema import About
from qwen_onnx.catalog.sources import HubSource
from qwen_onnx.errors import PackageError
from qwen_onnx.package.devices_proven import device_records
from qwen_onnx.package.records import PackageRecord
from qwen_onnx.records import Verdict

if TYPE_CHECKING:
    from qwen_onnx.verify.device import DeviceReport
    from qwen_onnx.verify.records import Estimate
    from qwen_onnx.verify.report import Report

CARD = "README.md"
REFERENCE = "LicenseRef-"


def write_card(folder: Path, record: PackageRecord, manifest: Manifest) -> None:
    """Write ``README.md`` and its plots.

    Raises:
        PackageError: the report in ``folder`` has another verdict than the record.
    """
    from qwen_onnx.verify.report import load_report

    report = load_report(folder) if manifest.verdict is not Verdict.UNVERIFIED else None
    if report and report.verdict != record.verdict:
        raise PackageError(f"the report says {report.verdict}, the manifest {record.verdict}", where=str(folder))
    for name, text in (report.svgs() if report else {}).items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / CARD).write_text(card_text(record, manifest, report, device_records(folder)), encoding="utf-8")


def card_text(
    record: PackageRecord, manifest: Manifest, report: Report | None, devices: Sequence[DeviceReport] = ()
) -> str:
    """The card, from what is known of the artifact and nothing else."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from qwen_onnx.verify.report import TASK_COLUMNS, compared, shown, task_cells

    def bounds(item: Estimate) -> str:
        return f"{shown(item.value)} [{shown(item.lower)}, {shown(item.upper)}]"

    # Markdown, not HTML: nothing is to be escaped but what would end a table's cell
    environment = Environment(
        loader=PackageLoader("qwen_onnx", "package/templates"),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": shown, "bounds": bounds, "cell": lambda text: text.replace("|", "\\|")}
    return environment.get_template("card.md.j2").render(
        record=record,
        manifest=manifest,
        plan=manifest.plan,
        report=report,
        judged=(report.verification if report else manifest.plan.verification).text,
        devices=devices,
        compared=compared,
        task_cells=task_cells,
        columns=TASK_COLUMNS,
        matrices=weights_text(manifest.readback),
        origin=f"{manifest.source.origin} at revision `{manifest.source.revision}`",
        size=manifest.size_bytes,
        front_matter=yaml.safe_dump(front_matter(manifest.plan, manifest.about), sort_keys=False, allow_unicode=True),
    )


def front_matter(plan: Plan, about: About | None) -> dict[str, Any]:
    """What Hugging Face Hub reads of a card; what is not known is left out."""
    known: dict[str, Any] = licence_fields(plan.license)
    bases = [source.repo for source in plan.sources if isinstance(source, HubSource) and source.kind == "huggingface"]
    if bases:
        known |= {"base_model": bases, "base_model_relation": "quantized"}
    if about and isinstance(about.languages, tuple):
        known["language"] = list(about.languages)
    known |= {"library_name": "onnxruntime-genai", "pipeline_tag": "text-generation"}
    return known | {"tags": ["onnx", "onnxruntime-genai", "foundry-local", "qwen-onnx", plan.target, plan.precision]}


def licence_fields(licence: str | None) -> dict[str, str]:
    """The Hub's name of a licence; one that it does not know is ``other`` with a name and its file."""
    if licence is None or licence.startswith(REFERENCE):
        name = licence.removeprefix(REFERENCE).lower() if licence else "unknown"
        return {"license": "other", "license_name": name, "license_link": "LICENSE"}
    return {"license": licence.lower()}


def weights_text(readback: dict[str, Any]) -> str:
    """How the weights are stored, as it was found in the graph."""
    found: Counter[str] = Counter()
    for item in readback.get("matrices", []):
        block = f", blocks of {item['block_size']}" if item.get("block_size") else ""
        fewer = item.get("stored_bits") not in (None, item["bits"])
        stored = f", stored in {item['stored_bits']} bits" if fewer else ""
        shared = item.get("scale_block") not in (None, item.get("block_size"))
        scales = f", one scale for {item['scale_block']} weights" if shared else ""
        found[f"int{item['bits']}{block}{stored}{scales}"] += item["count"]
    return ", ".join(f"{count} matrices {kind}" for kind, count in found.items()) or "see manifest.json"
