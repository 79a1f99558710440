"""The check of a head for multi-token prediction, which no answer depends on: whether it is the checkpoint's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qwen_onnx.errors import VerificationError
from qwen_onnx.runtime.engines.batch.draft_head import DraftHead
from qwen_onnx.runtime.engines.batch.layout import Floats
from qwen_onnx.runtime.engines.batch.model import BatchModel
from qwen_onnx.runtime.engines.batch.steps import PREFILL_CHUNK
from qwen_onnx.verify.checks import TIMED, check
from qwen_onnx.verify.context import Context
from qwen_onnx.verify.records import CheckResult
from qwen_onnx.verify.results import certain
from qwen_onnx.verify.statistics import at_least

CHECK = "draft_head"
# of hidden states behind a head in 8 bits: .9999 with random weights, .992 in 4 bits; another's are far from parallel
COSINE = 0.98
# what transformers calls the weights of a head, and Qwen's checkpoints
NAMES = {
    "layers.0.enorm.": "mtp.pre_fc_norm_embedding.",
    "layers.0.hnorm.": "mtp.pre_fc_norm_hidden.",
    "layers.0.eh_proj.": "mtp.fc.",
    "layers.0.post_norm.": "mtp.norm.",
    "layers.0.mtp_block.": "mtp.layers.0.",
}
SHARED = ("embed_tokens.", "shared_head.")


def published_name(name: str) -> str:
    """What a Qwen checkpoint calls a weight of transformers' ``MtpModel``."""
    return next(own + name.removeprefix(theirs) for theirs, own in NAMES.items() if name.startswith(theirs))


class ReferenceHead:
    """transformers' own, in fp32.

    Raises:
        VerificationError: the checkpoint's weights do not fit.
    """

    def __init__(self, checkpoint: Path) -> None:
        import torch
        import transformers
        from transformers.modeling_layers import MtpModel

        # nothing of this package imports PyTorch before it is needed: the artifact's memory is measured without
        from qwen_onnx.export.weights import CheckpointWeights

        config = transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        text = config.get_text_config()
        # transformers 5.23 knows such heads, but not these keys of Qwen3.5
        text.num_mtp_layers, text.mtp_layer_types = 1, ["full_attention"]
        with torch.device("meta"):
            model = getattr(transformers, config.architectures[0])(config)
            self.module = MtpModel(model, 1).eval()
        # its frequencies are computed, which the meta device does not
        self.module.rotary_emb = type(self.module.rotary_emb)(text)
        own = {name: published_name(name) for name in self.module.state_dict() if not name.startswith(SHARED)}
        stored = CheckpointWeights(checkpoint).tensors(own.values())
        weights = {name: stored[told].float() for name, told in own.items()}
        try:
            self.module.load_state_dict(weights, strict=False, assign=True)
        except RuntimeError as error:
            raise VerificationError(f"the head's weights do not fit: {error}", where=str(checkpoint)) from error

    def states(self, embedded: Floats, hidden: Floats) -> Floats:
        """Hidden states [t, width] behind tokens with these embeddings, and these states before them."""
        import torch

        with torch.inference_mode():
            found: Any = self.module.forward_layer(
                0,
                torch.tensor(hidden)[None],
                torch.arange(len(hidden))[None],
                None,
                inputs_embeds=torch.tensor(embedded)[None],
            )
        states: Floats = found[0].numpy()
        return states


def read_through(model: BatchModel, ids: tuple[int, ...]) -> tuple[Floats, np.ndarray[Any, Any]]:
    """Hidden states [t, width] behind each of a text's tokens, and the likeliest token that follows each."""
    states, likeliest = [], []
    for begin in range(0, len(ids), PREFILL_CHUNK):
        logits = model.every_position(0, np.array(ids[begin : begin + PREFILL_CHUNK]), begin)
        likeliest.append(logits.argmax(axis=-1))
        states.append(model.hidden[0].copy())
    return np.concatenate(states), np.concatenate(likeliest)


def guesses(head: DraftHead, ids: tuple[int, ...], hidden: Floats) -> tuple[Floats, list[int]]:
    """What the head makes of a text: states behind each token but the first, and its guess of what follows each."""
    states = head.step(ids[1:], hidden[:-1], head.cache(len(ids)), 0)
    return states, [head.likeliest(state) for state in states]


@check(CHECK, TIMED)
def draft_head(context: Context) -> CheckResult:
    """The head gives the hidden states that transformers' gives in fp32 for the same ones of the artifact.

    Also told: how often its first guess is what the artifact itself says next, which decides on what it brings.
    """
    prompts = [pool[0].ids[: context.options.decode_tokens] for pool in context.pools.values() if pool]
    context.unload()
    reference = ReferenceHead(context.checkpoint)
    size = max(map(len, prompts))
    model = BatchModel(
        context.artifact, rows=1, capacity=size, chunk=PREFILL_CHUNK, threads=context.options.threads, drafts=True
    )
    if model.draft_head is None:
        raise VerificationError("the artifact has no head for multi-token prediction", where=str(context.artifact))
    cosines, right = [], []
    for ids in prompts:
        hidden, likeliest = read_through(model, ids)
        states, guessed = guesses(model.draft_head, ids, hidden)
        wanted = reference.states(model.draft_head.embed(ids[1:])[0], hidden[:-1])
        lengths = np.linalg.norm(states, axis=-1) * np.linalg.norm(wanted, axis=-1)
        cosines.append((states * wanted).sum(axis=-1) / lengths)
        right.append(likeliest[1:] == guessed)
    cosine, accepted = float(np.concatenate(cosines).mean()), np.concatenate(right)
    return CheckResult(
        name=CHECK,
        verdict=at_least(certain(cosine), COSINE),
        measured={"cosine": cosine, "guesses_right": float(accepted.mean()), "positions": len(accepted)},
        limit={"cosine": COSINE},
    )
