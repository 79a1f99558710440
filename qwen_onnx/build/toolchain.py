"""What a plan is built and judged with: the packages beside ours, or the environment that its target names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qwen_onnx.build.estimate import layers_at_once
from qwen_onnx.catalog.plan import Plan
from qwen_onnx.catalog.schema import Verification
from qwen_onnx.processes.environments import Interpreter, interpreter_of
from qwen_onnx.processes.progress import progress

if TYPE_CHECKING:
    from qwen_onnx.runtime.engines.runners.client import Runner
    from qwen_onnx.verify.keeping import Keep
    from qwen_onnx.verify.records import VerifyOptions
    from qwen_onnx.verify.report import Report

THREADS = 2  # of a runner


@dataclass(frozen=True)
class Toolchain:
    """The processes that a plan needs on this machine.

    Attributes:
        cache: of downloads and finished steps.
        olive: the Python that Olive runs in; None for the one that runs this.
        companion: the Python of the target's environment, for passes that start processes in it while Olive runs in
            ours.
        runner: what runs a folder of the target where onnxruntime-genai cannot; None where it can.
        simulator: what runs a folder as the target's device would, much more slowly; None where the level promises no
            simulator.
    """

    plan: Plan
    cache: Path
    olive: Interpreter | None = None
    companion: Interpreter | None = None
    runner: Callable[[Path], Runner] | None = None
    simulator: Callable[[Path], Runner] | None = None

    @classmethod
    def of(cls, plan: Plan, cache: Path) -> Self:
        """What ``plan`` needs; the environment of its target is made in ``cache`` when it is not there.

        Raises:
            EnvironmentFault: the environment cannot be made.
        """
        if plan.environment is None:
            return cls(plan, cache)
        interpreter, name = interpreter_of(plan.environment, cache), plan.environment.name
        simulated = plan.verification is Verification.SIMULATOR
        return cls(
            plan,
            cache,
            olive=interpreter if plan.environment.olive else None,
            companion=None if plan.environment.olive else interpreter,
            # simulators are far too slow for thousands of positions: what was compiled is judged by the graph it came
            # from
            runner=_runner(f"{name}_cpu" if simulated else name, interpreter),
            simulator=_runner(name, interpreter) if simulated else None,
        )

    def run_olive(
        self, config: dict[str, Any], checkpoint: Path, work: Path, log: Path, kept: Path | None = None
    ) -> Path:
        """See ``export.olive.run_olive``."""
        from qwen_onnx.export.olive import run_olive

        return run_olive(config, checkpoint, work, log, kept, self.olive, self.companion)

    def export_reference(self, checkpoint: Path, staging: Path) -> Path:
        """An fp32 export of the same checkpoint by the same exporter, below ``staging``, for graph parity."""
        from qwen_onnx.export.olive import reference_config

        config = reference_config(self.plan.olive)
        return self.run_olive(config, checkpoint, staging / "reference", staging / "reference.log")

    def verify(
        self,
        artifact: Path,
        checkpoint: Path,
        reference: Path | None,
        options: VerifyOptions | None = None,
        keep: Keep | None = None,
    ) -> Report:
        """Measure ``artifact`` as far as the plan's verification level promises; see ``verify.verify_artifact``.

        In slices of as many layers as memory holds, where it does not hold all of them.
        """
        from qwen_onnx.verify import VerifyOptions, verify_artifact

        options = options or VerifyOptions()
        if options.layers_at_once is None:
            layers = layers_at_once(self.plan, checkpoint)
            if layers is not None:
                progress(f"memory does not hold the artifact: verifying {layers} of its layers at a time")
            options = options.model_copy(update={"layers_at_once": layers})
        return verify_artifact(
            artifact,
            checkpoint,
            reference,
            self.plan.limits,
            level=self.plan.verification,
            options=options,
            runner=self.runner,
            simulator=self.simulator,
            cache=self.cache,
            keep=keep,
        )


def _runner(backend: str, interpreter: Interpreter) -> Callable[[Path], Runner]:
    def started(folder: Path) -> Runner:
        # needs numpy, which a plan alone does not
        from qwen_onnx.runtime.engines.runners.client import Runner

        return Runner(folder, backend, interpreter, threads=THREADS)

    return started
