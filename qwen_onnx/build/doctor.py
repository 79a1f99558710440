"""What this machine lacks for a recipe, each with the command that fixes it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from qwen_onnx.build.estimate import estimate
from qwen_onnx.catalog.load import find_root, load_catalog
from qwen_onnx.catalog.plan import Plan
from qwen_onnx.errors import ConfigError
from qwen_onnx.processes.environments import is_ready
from qwen_onnx.processes.memory import free_memory
from qwen_onnx.sources.fetch import cache_root, checkpoint_at_hand

EXTRAS = ("serve", "export", "package", "publish", "dev")
SDK, GENAI, ORT = "foundry-local-sdk", "onnxruntime-genai", "onnxruntime"
NEWER_SDK = "raise foundry-local-sdk and its pins in pipelines/environments/foundry.yaml"


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``fix`` is empty when ``ok``."""

    name: str
    ok: bool
    found: str
    fix: str = ""


def examine(plan: Plan, root: Path, source: Path | None = None) -> list[Finding]:
    """Check Python, the extras' packages, memory and disk for ``plan``, whose checkpoint may be in ``source``."""
    findings = [_python(), *(_extra(extra) for extra in EXTRAS)]
    memory = free_memory()
    needs = estimate(plan, checkpoint_at_hand(plan, cache_root(root), source))
    findings.append(
        _amount(f"memory for {plan.model}", memory, needs.least, "close programs, or build on another machine")
    )
    disk = shutil.disk_usage(root).free
    wanted = needs.disk + needs.download
    if plan.environment:
        ready, size = is_ready(plan.environment, cache_root(root)), plan.environment.bytes
        made = "there" if ready else f"made when it is first needed: {size / 1e9:.1f} GB from the package index"
        findings.append(Finding(f"environment {plan.environment.name}", True, made))
        wanted += 0 if ready else size
    findings.append(_amount(f"disk for {plan.model}", disk, wanted, "free space, or --output on another disk"))
    pins = load_catalog(find_root()).environment("foundry").requirements
    return [*findings, *_devices(), *foundry_skew(pins, _installed()), *foundry_beside(_installed(), _required(SDK))]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    ok = sys.version_info >= (3, 11)
    return Finding("Python", ok, version, "" if ok else "install Python 3.11 or newer")


def _devices() -> list[Finding]:
    """What ``verify --device`` can prove an artifact on here."""
    # without it, the extra `serve` is a finding already
    if ORT not in _installed():
        return []
    from qwen_onnx.runtime.engines.devices import devices

    return [
        Finding(f"device {each.name}", True, f"{each.hardware}; {each.provider}; driver {each.driver}")
        for each in devices()
    ]


def _amount(name: str, available: int, needed: int, fix: str) -> Finding:
    ok = available >= needed
    found = f"{available / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed"
    return Finding(name, ok, found, "" if ok else fix)


def _extra(extra: str) -> Finding:
    """Are the packages of an extra there, in versions that its requirements accept?"""
    from packaging.requirements import Requirement

    faults = []
    for line in metadata.requires("qwen-onnx") or []:
        requirement = Requirement(line)
        if not requirement.marker or not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.name == "qwen-onnx":
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            faults.append(f"{requirement.name} missing")
            continue
        if not requirement.specifier.contains(version.split("+")[0], prereleases=True):
            faults.append(f"{requirement.name} {version}, needs {requirement.specifier}")
    fix = f"pip install -c constraints.txt 'qwen-onnx[{extra}]'" if faults else ""
    return Finding(f"extra {extra}", not faults, "; ".join(faults) or "complete", fix)


def _installed() -> dict[str, str]:
    """Versions of what Foundry Local and we both run models by, as far as it is installed."""
    found = {}
    for name in (SDK, GENAI, ORT):
        try:
            found[name] = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return found


def _required(name: str) -> list[str]:
    """What an installed package requires; nothing when it is not installed."""
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


def foundry_skew(pins: tuple[str, ...], ours: Mapping[str, str], needs: list[str] | None = None) -> list[Finding]:
    """Versions that Foundry Local runs models by against those that build them here.

    Args:
        pins: requirements of the environment in which packages are checked, with Foundry's own pins.
        ours: installed versions; what is missing here is a finding of its extra.
        needs: what our onnxruntime-genai requires; default: as installed.

    Raises:
        ConfigError: a pin is missing.
    """
    from packaging.requirements import Requirement
    from packaging.version import Version

    theirs = {
        each.name.removesuffix("-core"): specifier.version
        for each in map(Requirement, pins)
        for specifier in each.specifier
        if specifier.operator == "=="
    }
    if missing := [name for name in (GENAI, ORT) if name not in theirs]:
        raise ConfigError([f"pipelines/environments/foundry.yaml: requirements: no pin of {name}" for name in missing])
    findings = []
    if GENAI in ours:
        told = f"theirs {theirs[GENAI]}, ours {ours[GENAI]}"
        older = Version(theirs[GENAI]).release[:2] < Version(ours[GENAI]).release[:2]
        means = ": it refuses a genai_config.json with keys that it does not know" if older else ""
        fix = f"{NEWER_SDK}; for Foundry Local before 2.1: package --profile cli1" if older else ""
        findings.append(Finding(f"Foundry Local: {GENAI}", not older, told + means, fix))
    if ORT in ours:
        wanted = [each for each in map(Requirement, _required(GENAI) if needs is None else needs) if each.name == ORT]
        least = ", ".join(str(each.specifier) for each in wanted) or "any"
        fits = all(each.specifier.contains(theirs[ORT], prereleases=True) for each in wanted)
        told = f"theirs {theirs[ORT]}, ours {ours[ORT]}; models of our {GENAI} need {least}"
        means = "" if fits else ": it lacks operators that a model may hold, which then does not load"
        findings.append(Finding(f"Foundry Local: {ORT}", fits, told + means, "" if fits else NEWER_SDK))
    return findings


def foundry_beside(installed: Mapping[str, str], needs: list[str]) -> list[Finding]:
    """Foundry's SDK in this very environment, where its pins and ours contend; no finding when it is elsewhere."""
    from packaging.requirements import Requirement

    if SDK not in installed:
        return []
    clashes = [
        f"{each.name} {installed[each.name]} where it needs {each.specifier}"
        for each in map(Requirement, needs)
        if each.name in installed
        and (each.marker is None or each.marker.evaluate({"extra": ""}))
        and not each.specifier.contains(installed[each.name], prereleases=True)
    ]
    fix = f"pip uninstall {SDK}: it belongs into an environment of its own, as foundry-check makes one"
    found = f"{installed[SDK]} with {'; '.join(clashes)}" if clashes else f"{installed[SDK]}, its pins are kept"
    return [Finding(f"{SDK} beside ours", not clashes, found, fix if clashes else "")]
