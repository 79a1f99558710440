"""Files that are generated from recipes and pipelines and committed: `make plans` writes them, a test compares."""

from __future__ import annotations

import json

from qwen_onnx.catalog.load import Catalog
from qwen_onnx.catalog.plan import make_all_plans, make_plan
from qwen_onnx.catalog.schema import json_schemas
from qwen_onnx.catalog.select import matrix
from qwen_onnx.catalog.training import Training
from qwen_onnx.errors import ConfigError

LOCK_FILE = "recipes/plans.lock"
MODELS_FILE = "docs/models.md"
GOLDEN_MODEL = "starter"
MATRIX_BEGIN, MATRIX_END = "<!-- matrix: make plans -->", "<!-- end of matrix -->"


def lock_text(catalog: Catalog) -> str:
    """Content of ``recipes/plans.lock``: model, target, precision and digest, sorted.

    Where there is no plan, a hyphen and the reason stand for it; ``*`` is every model.
    """
    lines = [f"{plan.model} {plan.target} {plan.precision} {plan.digest}\n" for plan in make_all_plans(catalog)]
    lines += [f"{row.id} - {row.planned}\n" for _, row in catalog.rows.values() if row.planned]
    for name, pipeline in catalog.pipelines.items():
        lines += [f"* {name} {precision} - {reason}\n" for precision, reason in pipeline.unavailable.items()]
    for _, row in catalog.rows.values():
        for name, override in row.targets.items() if not row.planned else ():
            lines += [f"{row.id} {name} - {override.excluded}\n"] if override.excluded else []
            lines += [f"{row.id} {name} {precision} - {reason}\n" for precision, reason in override.without.items()]
    return "".join(sorted(lines))


def committed_files(catalog: Catalog) -> dict[str, str]:
    """Text of every file generated from recipes and pipelines, by path: lock, golden plans, schemas, models."""
    files = {LOCK_FILE: lock_text(catalog)}
    model = GOLDEN_MODEL if GOLDEN_MODEL in catalog.rows else min(catalog.rows)
    for target in catalog.targets_of(catalog.row(model)[1]):
        plan = make_plan(catalog, model, target).model_dump(mode="json")
        files[f"tests/golden/{model}-{target}.json"] = json.dumps(plan, indent=2) + "\n"
    schemas = json_schemas() | {"training.schema.json": Training.model_json_schema()}
    files |= {f"recipes/{name}": json.dumps(schema, indent=2) + "\n" for name, schema in schemas.items()}
    models = catalog.root / MODELS_FILE
    if models.exists():
        files[MODELS_FILE] = with_matrix(models.read_text(encoding="utf-8"), catalog)
    return files


def with_matrix(text: str, catalog: Catalog) -> str:
    """The page of models with the comparison matrix between its two markers.

    Raises:
        ConfigError: the markers are gone.
    """
    before, begin, rest = text.partition(MATRIX_BEGIN)
    _, end, after = rest.partition(MATRIX_END)
    if not begin or not end:
        raise ConfigError([f"{MODELS_FILE}: the markers {MATRIX_BEGIN} and {MATRIX_END} are missing"])
    return f"{before}{begin}\n{matrix(catalog)}{end}{after}"
