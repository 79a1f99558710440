"""The checks, in the order in which they run. A new one is a function with ``@check("name")``."""

from __future__ import annotations

from collections.abc import Callable

from qwen_onnx.catalog.schema import Verification
from qwen_onnx.files import folder_bytes
from qwen_onnx.processes.progress import progress
from qwen_onnx.records import Verdict
from qwen_onnx.runtime.processing.template import has_template
from qwen_onnx.verify.context import Context
from qwen_onnx.verify.drift import Prepared, judge
from qwen_onnx.verify.golden import GOLDEN
from qwen_onnx.verify.keeping import golden_of
from qwen_onnx.verify.parity import (
    CONVERSATIONS,
    NASTY,
    decode_positions,
    mismatches,
)
from qwen_onnx.verify.records import CheckResult, VerifyOptions, worst
from qwen_onnx.verify.results import (
    DECODE_LIMIT,
    agreement,
    batch_result,
    carried_out,
    certain,
    drift_result,
    parity_result,
)
from qwen_onnx.verify.scoring import Positions, compare
from qwen_onnx.verify.statistics import at_least, at_most

Check = Callable[[Context], CheckResult]
CHECKS: dict[str, Check] = {}
# the levels that promise a check; nothing is computed of an artifact that is known by its structure alone
LEVELS: dict[str, frozenset[Verification]] = {}
# checks that are made only where the options ask for them
ASKED: dict[str, Callable[[VerifyOptions], bool]] = {}
ANY = frozenset(Verification)
COMPUTED = ANY - {Verification.STRUCTURE}
# by engines that load the whole artifact, whatever runs it
LOADED = COMPUTED - {Verification.IN_SLICES}
# of artifacts whose parts are graphs for the CPU here, whatever runs them in the end
GRAPH = frozenset({Verification.RUN, Verification.NUMERICS_ON_CPU})
TIMED = frozenset({Verification.RUN})
SIMULATED = frozenset({Verification.SIMULATOR})

# Rounding to 4 bits moves a row of weights by about a tenth of its length, GPTQ by more; another row's is 1.4 away
ROW_ERROR = 0.7
# What a device may add to the drift of the graph that it was compiled from: about a fifth of the drift allowed in int4.
# The HTP's fp16 and its own exponentials are that far from the CPU on the starter (docs/lab-log.md).
SIMULATOR_KLD = 4e-2
SIMULATOR_TOP1 = 0.9
# tokens of a greedy answer in slices: each is one more reading of all weights
SLICED_TOKENS = 4


def check(
    name: str, levels: frozenset[Verification] = COMPUTED, asked: Callable[[VerifyOptions], bool] | None = None
) -> Callable[[Check], Check]:
    """Register a check under ``name``, promised by ``levels``, or made where ``asked`` says that it is asked for."""

    def register(function: Check) -> Check:
        if name in CHECKS:
            raise ValueError(f"two checks are called {name}")
        CHECKS[name], LEVELS[name] = function, levels
        if asked:
            ASKED[name] = asked
        return function

    return register


def beyond(level: Verification) -> dict[str, str]:
    """The checks that ``level`` does not make, each with the reason."""
    return {name: f"not made: {level.text}" for name, levels in LEVELS.items() if level not in levels}


def run_check(name: str, context: Context) -> CheckResult:
    """Run one check; one that cannot be carried out has failed."""
    chosen = context.options.checks
    if chosen and name not in chosen:
        return CheckResult(name=name, verdict=Verdict.INCONCLUSIVE, detail="not run: left out by the options")
    if context.level not in LEVELS[name]:
        # asked for by its name
        return CheckResult(name=name, verdict=Verdict.INCONCLUSIVE, detail=f"not made: {context.level.text}")
    return carried_out(name, lambda: CHECKS[name](context))


@check("tokenizer", ANY)
def tokenizer_parity(context: Context) -> CheckResult:
    """The runtime encodes and decodes every text like the checkpoint's tokenizer."""
    truth, served = context.truth, context.tokenizer
    texts = [*NASTY, *(doc.text for docs in context.documents.values() for doc in docs[:2])]
    wrong = mismatches(texts, truth.encode_plain, lambda text: list(served.encode(text)))
    wrong += mismatches(
        texts,
        lambda text: truth.decode(truth.encode_plain(text)),
        lambda text: served.decode(truth.encode_plain(text)),
    )
    differs = len(mismatches(NASTY, truth.encode, truth.auto_encode))
    return parity_result("tokenizer", 2 * len(texts), wrong, {"AutoTokenizer_differs": differs})


@check("chat_template", ANY)
def template_parity(context: Context) -> CheckResult:
    """The runtime renders every conversation like transformers; without a template, neither has one."""
    if not context.truth.chats:
        invented = has_template(context.artifact)
        return CheckResult(
            name="chat_template",
            verdict=Verdict.FAIL if invented else Verdict.PASS,
            detail="the checkpoint has no chat template" + (", the artifact has one" if invented else ""),
        )
    wrong = mismatches(
        CONVERSATIONS,
        lambda messages: context.truth.render(messages, prompt=True),
        lambda messages: context.template.render([dict(message) for message in messages]),
    )
    return parity_result("chat_template", len(CONVERSATIONS), wrong, {})


@check("graph_parity")
def graph_parity(context: Context) -> CheckResult:
    """The graph computes what PyTorch computes with the same matrices, and these are the checkpoint's, rounded.

    Both compute in fp32. Everything but the quantised matrices is the checkpoint's on PyTorch's side. An artifact of
    another engine is judged by an fp32 export of the same checkpoint.
    """
    limits = context.limits
    bounds: dict[str, float | str] = {"max_diff": limits.fp32_max_diff, "kld_mean": limits.fp32_kld}
    if context.reference is None and context.graph is None:
        return CheckResult(
            name="graph_parity", verdict=Verdict.INCONCLUSIVE, limit=bounds, detail="no fp32 export was given"
        )
    if context.reference is None and context.graph is not None:
        found, errors = context.graph_positions(context.graph)
    else:
        found, errors = Positions.join(context.study.reference_parts), {}
    diff, kld = float(found.diff.max()), float(found.kld.mean())
    verdicts = [at_most(certain(diff), limits.fp32_max_diff), at_most(certain(kld), limits.fp32_kld)]
    measured: dict[str, float | str] = {"max_diff": diff, "kld_mean": kld, "positions": len(found.kld)}
    if errors:
        worst_matrix = max(errors, key=lambda name: errors[name])
        verdicts.append(at_most(certain(errors[worst_matrix]), ROW_ERROR))
        bounds["row_error"] = ROW_ERROR
        measured |= {"row_error": errors[worst_matrix], "matrices": len(errors), "worst_matrix": worst_matrix}
    return CheckResult(name="graph_parity", verdict=worst(verdicts), measured=measured, limit=bounds)


@check("drift")
def teacher_forced_drift(context: Context) -> CheckResult:
    """The quantised model predicts what PyTorch predicts, in every domain."""
    study, limits = context.study, context.limits
    if study.finite and Verdict.INCONCLUSIVE in judge(study.estimates(), limits).values():
        study.double()
    if not study.finite:
        return drift_result(None, limits)
    found = study.estimates()
    context.drift = study.summary(found, context.documents)
    if context.keep:
        context.golden = golden_of(context, context.keep)
    return drift_result(found, limits, {"positions": context.drift.positions})


@check("kv_decode")
def decode_parity(context: Context) -> CheckResult:
    """Token by token through the KV cache gives the logits of one run over all tokens.

    With fp32 activations it shows that graph and cache are right, as served that the kernels stay near each other.
    """
    prompts = _decoded_prompts(context)
    found = decode_positions(context.decoded, lambda: context.scorer, prompts, context.options.threads)
    verdicts, measured = agreement(found)
    limit = dict(DECODE_LIMIT)
    exact = context.exact_decode(prompts)
    if exact is None:
        verdicts.append(Verdict.INCONCLUSIVE)
    else:
        verdicts.append(at_most(certain(exact), context.limits.fp32_kld))
        measured["fp32_kld"], limit["fp32_kld"] = exact, context.limits.fp32_kld
    return CheckResult(name="kv_decode", verdict=worst(verdicts), measured=measured, limit=limit)


def _decoded_prompts(context: Context) -> dict[str, tuple[int, ...]]:
    """The beginning of one text of each kind."""
    return {name: pool[0].ids[: context.options.decode_tokens] for name, pool in context.pools.items() if pool}


@check("batched", TIMED)
def batch_parity(context: Context) -> CheckResult:
    """Texts that share the steps of a batch, each joining later than the one before, get the logits of a lone run."""
    prompts = _decoded_prompts(context)
    context.unload()
    return batch_result(context.artifact, prompts, lambda: context.scorer, context.options.threads)


@check("greedy")
def greedy_generation(context: Context) -> CheckResult:
    """Greedy answers have the length asked for, stay in the vocabulary, and their logits are finite."""
    count, wrong, tokens = context.options.greedy_tokens, [], 0
    prompts = context.greedy_prompts()
    if context.slice_layers is None:
        answers = [list(context.engine.generate(prompt, max_new_tokens=count, stop_on_eos=False)) for prompt in prompts]
    else:
        count = min(count, SLICED_TOKENS)
        answers = _answered_in_slices(context, prompts, count)
    scorer = context.scorer
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = scorer.logits([*prompt, *answer])
        tokens += len(answer)
        if len(answer) != count or not all(0 <= token < logits.shape[-1] for token in answer):
            wrong.append(f"{len(answer)} tokens of {count}, or one outside the vocabulary")
        if not bool((abs(logits) < float("inf")).all()):
            wrong.append("a logit is NaN or infinite")
    return CheckResult(
        name="greedy",
        verdict=Verdict.FAIL if wrong else Verdict.PASS,
        measured={"tokens": tokens, "faults": len(wrong)},
        limit={"faults": 0},
        detail="; ".join(wrong),
    )


def _answered_in_slices(context: Context, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy answers of ``count`` tokens: all texts get one with each reading of the weights."""
    texts = prompts
    for _ in range(count):
        scorer = context.scorer
        if isinstance(scorer, Prepared):
            scorer.prepare(texts)
        texts = [[*text, int(scorer.logits(text)[-1].argmax())] for text in texts]
    return [text[len(prompt) :] for prompt, text in zip(prompts, texts, strict=True)]


@check("simulator", SIMULATED)
def simulated_parity(context: Context) -> CheckResult:
    """What was compiled for the device computes what its graph computes on the CPU, which the drift is measured of.

    A sample: simulators take seconds for a token. Prefill by windows, then some tokens through the KV cache.
    """
    options = context.options
    bounds: dict[str, float | str] = {"kld_mean": SIMULATOR_KLD, "top1": SIMULATOR_TOP1}
    if context.simulator is None:
        return CheckResult(
            name="simulator", verdict=Verdict.INCONCLUSIVE, limit=bounds, detail="no simulator was given"
        )
    simulator = context.simulator(context.artifact)
    chosen = [pool[0].ids[: options.simulator_tokens] for pool in context.pools.values() if pool]
    parts = []
    for number, ids in enumerate(chosen[: options.simulator_domains], 1):
        progress(f"simulator: text {number} of {min(len(chosen), options.simulator_domains)}")
        expected = context.scorer.logits(ids)
        parts.append(compare(expected, simulator.logits(ids), ids))
    progress(f"simulator: {options.simulator_steps} tokens through the KV cache")
    begin = len(ids) - options.simulator_steps
    decoded = simulator.forced_logits(ids[:begin], ids[begin:])
    parts.append(compare(expected[begin - 1 :], decoded, ids[begin - 1 :]))
    found = Positions.join(parts)
    kld, top1 = float(found.kld.mean()), float(found.agree.mean())
    return CheckResult(
        name="simulator",
        verdict=worst([at_most(certain(kld), SIMULATOR_KLD), at_least(certain(top1), SIMULATOR_TOP1)]),
        measured={
            "kld_mean": kld,
            "top1": top1,
            "positions": len(found.kld),
            "decoded": options.simulator_steps,
            "decoded_kld_mean": float(parts[-1].kld.mean()),
        },
        limit=bounds,
    )


@check("size", ANY)
def size_on_disk(context: Context) -> CheckResult:
    """The artifact keeps to the limit in bytes; the teacher's answers do not count, since no engine reads them."""
    golden = context.artifact / GOLDEN
    kept = golden.stat().st_size if golden.is_file() else 0
    total, allowed = folder_bytes(context.artifact) - kept, context.limits.max_bytes
    if allowed is None:
        return CheckResult(name="size", verdict=Verdict.PASS, measured={"bytes": total}, detail="no limit set")
    verdict = Verdict.PASS if total <= allowed else Verdict.FAIL
    return CheckResult(name="size", verdict=verdict, measured={"bytes": total}, limit={"bytes": allowed})
