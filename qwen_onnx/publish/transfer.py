"""Publish and pull, whatever the address."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from qwen_onnx.errors import PublishError
from qwen_onnx.package.adapters import AdapterPackage
from qwen_onnx.publish.addresses import FolderAddress, HubAddress, LayoutAddress, RegistryAddress, parse_address
from qwen_onnx.publish.bundle import open_bundle
from qwen_onnx.publish.folder import FolderSource
from qwen_onnx.publish.receipt import Receipt
from qwen_onnx.publish.receive import PackageSource, Received, receive
from qwen_onnx.sources.transfer import Progress


def publish_package(
    folder: Path, destination: str, progress: Progress, *, private: bool = False, plain_http: bool = False
) -> Receipt:
    """Verify a package and publish exactly the bytes that were verified.

    Args:
        private: make a repository of a hub private, when it is made now.
        plain_http: allow http to a registry beyond this machine.

    Raises:
        PackageError: it is not a package, or was altered.
        PublishError: its verdict is not PASS, or the destination fails; what was there before stays.
    """
    address = parse_address(destination)
    bundle = open_bundle(folder)
    progress(f"verified {bundle.package.record.id}: {len(bundle.items)} files, {bundle.size / 1e6:,.1f} MB")
    if isinstance(address, HubAddress) and isinstance(bundle.package, AdapterPackage):
        hint = "a folder, oci:PATH:TAG or oci://HOST/REPOSITORY:TAG"
        raise PublishError("packages of adapters do not go to hubs", where=destination, hint=hint)
    if isinstance(address, FolderAddress):
        target = address.path.resolve()
        received = receive(FolderSource(folder), str(folder), target.parent, target, bundle.digest, progress)
        return Receipt(bundle.digest, str(target), received.moved, received.present)
    if isinstance(address, LayoutAddress):
        from qwen_onnx.publish.layout import send_to_layout

        return send_to_layout(bundle, address, progress)
    if isinstance(address, RegistryAddress):
        from qwen_onnx.publish.registry import send_to_registry

        return send_to_registry(bundle, address, progress, plain_http=plain_http)
    if address.kind == "hf":
        from qwen_onnx.publish.huggingface import send_to_huggingface

        return send_to_huggingface(bundle, address, progress, private=private)
    from qwen_onnx.publish.modelscope import send_to_modelscope

    return send_to_modelscope(bundle, address, progress, private=private)


def pull_package(
    source: str,
    parent: Path,
    progress: Progress,
    *,
    target: Path | None = None,
    expect: str | None = None,
    plain_http: bool = False,
) -> Received:
    """Take a package in; nothing is in place before all of it was verified.

    Args:
        parent: folder in which the package is put, under its own name, unless ``target`` is given.
        expect: its digest, as ``publish`` printed it.

    Raises:
        PackageError, PublishError: it cannot be had or cannot be trusted; what was there before stays.
    """
    address = parse_address(source)
    with ExitStack() as open_connections:
        found = _source(address, open_connections, plain_http=plain_http)
        return receive(found, str(address), parent, target, expect, progress)


def _source(
    address: FolderAddress | LayoutAddress | RegistryAddress | HubAddress, stack: ExitStack, *, plain_http: bool
) -> PackageSource:
    if isinstance(address, FolderAddress):
        return FolderSource(address.path)
    if isinstance(address, LayoutAddress):
        from qwen_onnx.publish.layout import LayoutSource

        return LayoutSource(address)
    if isinstance(address, RegistryAddress):
        from qwen_onnx.publish.registry import Registry, RegistrySource

        registry = stack.enter_context(Registry(address, plain_http=plain_http, write=False))
        return RegistrySource(registry, address.reference)
    if address.kind == "hf":
        from qwen_onnx.publish.huggingface import HuggingFaceSource

        return stack.enter_context(HuggingFaceSource(address))
    from qwen_onnx.publish.modelscope import ModelScopeSource

    return stack.enter_context(ModelScopeSource(address))
