"""``qwen-onnx verify-package`` and ``qwen-onnx diff``: what others can check of a package without us."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qwen_onnx.errors import PackageError, printable

out = Console()


def verify_package(
    folder: Annotated[Path, typer.Argument(help="package folder, e.g. artifacts/packages/starter-int4-generic-cpu-1")],
    expect: Annotated[
        str | None, typer.Option(help="SHA-256 of its SHA256SUMS, from a place that you trust, pins every byte")
    ] = None,
    allowed_signers: Annotated[
        Path | None, typer.Option(help="OpenSSH's file: every record of a device must be signed by somebody in it")
    ] = None,
) -> None:
    """Check every byte and every statement of a package, offline; exits 10 with all faults."""
    from qwen_onnx.artifact.checksums import package_digest
    from qwen_onnx.package.adapters import examine_any, read_any
    from qwen_onnx.package.verify import require_sound

    package = read_any(folder.resolve())
    checks = examine_any(package.path, expect)
    table = Table("check", "", "faults", title=escape(printable(package.record.id)))
    for check in checks:
        mark = "[red]fault[/]" if check.faults else "[green]ok[/]"
        table.add_row(check.name, mark, escape(printable("\n".join(check.faults))))
    out.print(table)
    require_sound(package.path, checks)
    out.print(f"verdict: {package.record.verdict}: {printable(package.record.claim)}", markup=False, soft_wrap=True)
    line: dict[str, object] = {
        "id": package.record.id,
        "verdict": package.record.verdict,
        "digest": package_digest(package.path),
    }
    if allowed_signers:
        from qwen_onnx.package.signatures import signers

        found = signers(package.path, allowed_signers.expanduser())
        for record, name in found.items():
            out.print(f"{record}: signed by {printable(name)}", markup=False, soft_wrap=True)
        line["signers"] = found
    print(json.dumps(line))


def diff(
    one: Annotated[Path, typer.Argument(help="artifact or package")],
    other: Annotated[Path, typer.Argument(help="another build of the same")],
) -> None:
    """Compare two builds file by file; exits 0 if everything but measurements is equal, else 10."""
    from qwen_onnx.package.compare import Relation, compare

    found = compare(one.resolve(), other.resolve())
    table = Table("file", "")
    for name, relation in found.items():
        table.add_row(escape(printable(name)), relation)
    out.print(table)
    count = Counter(found.values())
    line = {relation.name.lower(): count[relation] for relation in Relation}
    differing = [name for name, relation in found.items() if relation.proves_a_difference]
    print(json.dumps({"identical": not differing, **line}))
    if differing:
        listing = ", ".join(differing)
        raise PackageError(f"not the same build: {listing}", where=f"{one} and {other}", hint="see docs/trust.md")
