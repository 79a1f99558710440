"""``FisherGptq``: what it solves, what it chooses, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from qwen_onnx.errors import ExportError
from qwen_onnx.export.allocation import Choice, Unreachable, allocate
from qwen_onnx.export.passes.fisher_gptq.options import FisherGptqOptions
from qwen_onnx.export.passes.fisher_gptq.quantize import quantize
from qwen_onnx.export.passes.fisher_gptq.solver import Grid, damage, damped, nearest, refine, solve, stored_bytes
from qwen_onnx.export.passes.fisher_gptq.statistics import Watch
from qwen_onnx.export.passes.gptq.solver import Quantized, gptq
from qwen_onnx.export.weights import CheckpointWeights, Scratch
from tests.conftest import run_cli

GRIDS = (Grid(4, 64), Grid(4, 32), Grid(6, 64))
SMALL = {"windows": 4, "window": 48, "seed": 1}


def options(**changes: object) -> FisherGptqOptions:
    return FisherGptqOptions.model_validate({"bits_per_weight": 6.5, **SMALL, **changes})


@pytest.fixture(scope="module")
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [48, 128] and the damped Hessian of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(48, 128, generator=generator)
    inputs = torch.randn(512, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    return weight, damped(inputs.T @ inputs, 0.01)


def loss(found: Quantized, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    error = found.dequantize() - weight
    return float((error @ hessian * error).sum())


def test_grids_that_are_solved_together_are_those_solved_alone(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    for grid, found in zip(GRIDS, solve(*problem, GRIDS), strict=True):
        [alone] = solve(*problem, [grid])
        assert torch.equal(found.codes, alone.codes)
        assert torch.equal(found.scales, alone.scales)
        assert found.codes.max() <= grid.top
        assert found.scales.shape == (48, 128 // grid.block)


def test_grids_that_are_refined_together_are_those_refined_alone(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    solved = solve(*problem, GRIDS)
    for one, together in zip(solved, refine(solved, *problem, 2), strict=True):
        [alone] = refine([one], *problem, 2)
        assert torch.equal(together.codes, alone.codes)
        assert torch.equal(together.scales, alone.scales)


def test_scales_are_numbers_of_half_precision(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, hessian = problem
    found = refine(solve(weight, hessian, GRIDS), weight, hessian, 2)
    for one in (
        *found,
        nearest(weight, hessian.diagonal(), Grid(8, 64)),
        nearest(weight * 1e-9, hessian.diagonal(), GRIDS[0]),
    ):
        assert torch.equal(one.scales, one.scales.half().float())
        assert bool((one.scales > 0).all())


def test_it_is_as_good_as_gptq_and_better_than_rounding(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, hessian = problem
    [found] = solve(weight, hessian, GRIDS[:1])
    assert loss(found, weight, hessian) == pytest.approx(
        loss(gptq(weight, hessian, 4, 64, 1e-9), weight, hessian), rel=0.1
    )
    assert loss(found, weight, hessian) < 0.6 * loss(nearest(weight, hessian.diagonal(), GRIDS[0]), weight, hessian)


def test_refinement_lowers_the_error(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, hessian = problem
    [found] = solve(weight, hessian, GRIDS[:1])
    errors = [loss(refine([found], weight, hessian, rounds)[0], weight, hessian) for rounds in range(3)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.99 * errors[0]


class Attention(torch.nn.Module):
    """A layer whose q and v share their input, which no block of rows divides."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.o_proj = (torch.nn.Linear(300, out) for out in (40, 24, 16))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q_proj(x), self.v_proj(x)], -1)


def test_the_statistics_of_a_layer(tmp_path: Path) -> None:
    torch.manual_seed(2)
    layer = Attention()
    modules = {f"self_attn.{name}": module for name, module in layer.named_children()}
    watch = Watch(SimpleNamespace(linears=lambda index: modules, scratch=Scratch(tmp_path)), 0)  # type: ignore[arg-type]
    inputs, gradients = torch.randn(6, 9, 300), torch.randn(6, 9, 64)
    for windows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        torch.autograd.backward(layer(inputs[windows].requires_grad_(True)), gradients[windows])
    qv, o = watch.units()
    assert (qv.names, o.names) == (("self_attn.q_proj", "self_attn.v_proj"), ("self_attn.o_proj",))
    squares = gradients.reshape(-1, 64).double().square()
    counts = squares.sum(1).sqrt()
    tokens = inputs.detach().reshape(-1, 300).double()
    expected = (tokens * counts[:, None]).T @ tokens * (squares.sum() / counts.sum())
    torch.testing.assert_close(qv.hessian.double(), expected, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(qv.shares.double(), squares.sum(0) / squares.sum(), rtol=1e-4, atol=1e-6)
    # no token came this way
    assert not o.hessian.any()
    assert not o.shares.any()


def test_damage_weighs_outputs_by_their_share() -> None:
    weight = torch.ones(2, 32)
    found = Quantized(torch.zeros(2, 32), torch.ones(2, 1), torch.zeros(2, 1), 4)
    hessian = torch.eye(32)
    assert damage(found, weight, hessian, torch.tensor([1.0, 0.0]), 4) == pytest.approx(0.5 * 32 / 4)
    assert damage(found, weight, hessian, torch.tensor([0.25, 0.25]), 4) == pytest.approx(0.5 * 16 / 4)


CHOICES = {
    "a": [Choice(100, 1.0, "4"), Choice(150, 0.9, "5"), Choice(200, 0.0, "8")],
    "b": [Choice(10, 3.0, "4"), Choice(20, 1.0, "8")],
}


@pytest.mark.parametrize(
    ("bound", "options_", "bytes_", "damage_"),
    [
        ({"most_bytes": 110}, {"a": "4", "b": "4"}, 110, 4.0),
        ({"most_bytes": 120}, {"a": "4", "b": "8"}, 120, 2.0),
        # five bits lie above the line from four to eight
        ({"most_bytes": 219}, {"a": "4", "b": "8"}, 120, 2.0),
        ({"most_bytes": 220}, {"a": "8", "b": "8"}, 220, 1.0),
        ({"most_damage": 4.0}, {"a": "4", "b": "4"}, 110, 4.0),
        ({"most_damage": 1.9}, {"a": "8", "b": "8"}, 220, 1.0),
    ],
)
def test_the_allocation(bound: dict[str, float], options_: dict[str, str], bytes_: int, damage_: float) -> None:
    found = allocate(CHOICES, **bound)  # type: ignore[arg-type]
    assert (found.options, found.bytes, found.damage) == (options_, bytes_, pytest.approx(damage_))


def test_a_bound_that_cannot_be_reached_names_the_nearest() -> None:
    with pytest.raises(Unreachable) as refused:
        allocate(CHOICES, most_bytes=109)
    assert refused.value.least == 110
    with pytest.raises(Unreachable) as refused:
        allocate(CHOICES, most_damage=0.5)
    assert refused.value.least == pytest.approx(1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"bits_per_weight": None},
        {"max_bytes": 10},
        {"bits_per_weight": 3.9},
        {"head_bits": 4},
        {"kernel": "int4"},
        {"kernel": "symmetric"},
        {"head_bits": 16},
        {"kernel": "int8", "group_size": 32},
        {"kernel": "int8", "activation_bits": 16},
    ],
)
def test_options_that_contradict_each_other_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        options(**changes)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    weights = CheckpointWeights(folder)
    return {name: weights.tensor(name) for name in weights.names()}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["mixed", "int8"])
def test_a_checkpoint_keeps_to_the_size(kernel: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    sizes = []
    for number, bits in enumerate((5.6, 7.5)):
        quantize(tiny_checkpoint, tmp_path / str(number), options(kernel=kernel, bits_per_weight=bits))
        config = json.loads((tmp_path / str(number) / "config.json").read_text())["quantization_config"]
        found = tensors(tmp_path / str(number))
        total = 0
        for name in (name for name in found if name.endswith(".qweight")):
            matrix = name.removesuffix(".qweight")
            own = {"bits": config["bits"], "group_size": config["group_size"]} | config["overrides"].get(matrix, {})
            codes = (
                found[name] if own["bits"] == 8 else torch.stack([found[name] & 15, found[name] >> 4], -1).flatten(1)
            )
            needed = max(int(codes.max()), int(found[f"{matrix}.qzeros"].max()) if own["bits"] == 8 else 0).bit_length()
            if kernel == "int8" or matrix == "lm_head":
                assert own["bits"] == 8
            block = own["group_size"]
            if own["bits"] == 8:
                # several blocks share what one grid has
                assert block == {"mixed": 32, "int8": 16}[kernel]
                times, block = 64 // block, 64
                for part in ("scales", "qzeros"):
                    shared = found[f"{matrix}.{part}"].unflatten(1, (-1, times))
                    assert torch.equal(shared, shared[..., :1].expand_as(shared))
            grid = Grid(next(bits for bits in (4, 5, 6, 7, 8) if bits >= needed), block)
            total += stored_bytes(codes, grid)
        sizes.append(total * 8 / sum(t.numel() for n, t in tensors(tiny_checkpoint).items() if t.dim() == 2))
    assert sizes[0] <= 5.6
    assert sizes[0] < sizes[1] <= 7.5


@pytest.mark.slow
def test_int6_is_built_read_back_and_not_larger_than_asked(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """From the command line to the published graph: most of a tiny model's bytes are sines and cosines."""
    folder = tmp_path / "int6"
    arguments = ("--precision", "int6", "--max-size", "1.19MB", "--no-verify", "--output", folder)
    done = run_cli("optimize", "starter", "--source", tiny_checkpoint, *arguments)
    assert done.returncode == 0, done.stderr
    read = json.loads((folder / "manifest.json").read_text())["readback"]
    files = sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert files <= read["predicted"]["bytes"] <= 1_190_000
    facts = {name: {kind[name] for kind in read["matrices"]} for name in read["matrices"][0]}
    assert (facts["bits"], facts["block_size"], facts["scale_block"], facts["scale_bits"]) == ({8}, {16}, {64}, {16})
    assert facts["stored_bits"] <= {4, 5, 6, 7, 8}
    assert min(facts["stored_bits"]) < 8


@pytest.mark.slow
def test_a_size_that_int8_keeps_to_is_refused_with_the_next_command(tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("--target", "cuda", "--max-size", "9MB", "--no-verify", "--output", tmp_path / "out")
    done = run_cli("optimize", "starter", "--source", tiny_checkpoint, *arguments)
    assert done.returncode == 5
    assert "Olive failed (exit 1): the bound leaves no matrix that needs as few as 4 bits" in done.stderr
    assert "next:  give a smaller --max-size" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.release
def test_a_killed_build_goes_on_to_the_same_bytes(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_onnx.export import gradients

    quantize(tiny_checkpoint, tmp_path / "whole", options())
    backward, calls = gradients.Gradients.backward, []

    def stopping(self: gradients.Gradients, index: int, *rest: object) -> object:
        calls.append(index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return backward(self, index, *rest)  # type: ignore[arg-type]

    kept = tmp_path / "kept"
    with monkeypatch.context() as patch:
        patch.setattr(gradients.Gradients, "backward", stopping)
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny_checkpoint, tmp_path / "again", options(), kept)
    assert not (tmp_path / "again").exists()
    monkeypatch.setattr(
        gradients.Gradients, "backward", lambda self, index, *rest: calls.append(index) or backward(self, index, *rest)
    )
    calls.clear()
    quantize(tiny_checkpoint, tmp_path / "again", options(), kept)
    assert calls == [0]
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "again")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    # another size is chosen among what is there
    calls.clear()
    quantize(tiny_checkpoint, tmp_path / "larger", options(bits_per_weight=8.0), kept)
    assert not calls


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bound", "told"),
    [
        ({"max_bytes": 1000}, r"least: \d\.\d MB of files"),
        ({"max_kld": 1e-9}, r"least: a predicted KLD of \d"),
        ({"max_bytes": 100_000_000}, "no matrix that needs as few as 4 bits"),
    ],
)
def test_a_size_that_no_allocation_has(
    bound: dict[str, float], told: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=told):
        quantize(tiny_checkpoint, tmp_path / "out", options(bits_per_weight=None, **bound))
    assert not (tmp_path / "out").exists()


def test_rows_that_no_block_divides_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    unfit = options().model_copy(update={"group_size": 48})
    with pytest.raises(ExportError, match=r"q_proj has 64 inputs, which is not a multiple of the block size 48"):
        quantize(tiny_checkpoint, tmp_path / "out", unfit)


@pytest.mark.slow
def test_embedding_and_norms_stay_as_they_are(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantize(tiny_checkpoint, tmp_path / "out", options())
    found, given = tensors(tmp_path / "out"), tensors(tiny_checkpoint)
    for name in given:
        if given[name].dim() == 1 or name == "model.embed_tokens.weight":
            assert torch.equal(found[name], given[name].float())
    assert "lm_head.qweight" in found
