"""A plan whose graph has slots for adapters."""

from __future__ import annotations

import copy

from qwen_onnx.catalog.faults import step_faults
from qwen_onnx.catalog.plan import Plan
from qwen_onnx.catalog.registry import options_of
from qwen_onnx.errors import ConfigError

STEP = "slots"


def slotted(plan: Plan, rank: int) -> Plan:
    """The plan with a last step that leaves slots for adapters of at most ``rank``.

    Raises:
        ConfigError: the rank is out of range; the architecture or the target takes no slots.
    """
    step = {"type": "LoraSlots", "rank": rank}
    place = f"--adapter-rank for {plan.name}"
    faults = step_faults(place, step)
    if not faults:
        options = options_of(step)
        providers = plan.olive["systems"]["target"]["accelerators"][0]["execution_providers"]
        faults += [f"{place}: {fault}" for provider in providers for fault in options.faults(provider)]
        if options.architectures is not None and plan.architecture not in options.architectures:
            faults.append(f"{place}: a {plan.architecture} takes no slots, its experts or states are no plain matrices")
    if faults:
        raise ConfigError(faults, hint=f"merge the adapter: qwen-onnx optimize {plan.model} --adapter FOLDER")
    olive = copy.deepcopy(plan.olive)
    olive["passes"][STEP] = step
    return plan.model_copy(update={"olive": olive})
