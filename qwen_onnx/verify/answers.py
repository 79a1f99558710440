"""Logits of the teacher: all texts go through a layer before the next is read.

Their hidden states are in a file, and the head is applied when a text is compared, so that logits are never on disk.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from qwen_onnx.export.progress import Steps
from qwen_onnx.export.skeleton import call
from qwen_onnx.export.weights import mapped, reopened
from qwen_onnx.export.workfolder import WorkFolder
from qwen_onnx.processes.progress import progress
from qwen_onnx.records import digest_of
from qwen_onnx.verify.matrices import linear
from qwen_onnx.verify.softmax import Logits
from qwen_onnx.verify.teacher import Teacher

BATCH = 1024  # tokens that go through a layer together
KEEP_EVERY = 15.0  # seconds between the states that a killed verification goes on with
SAY_EVERY = 5.0
STATES = "states"


class Answers:
    """The teacher's logits of texts that were prepared; a ``Scorer``.

    Args:
        teacher: the model.
        folder: scratch, 8 bytes per token and hidden dimension and as much again while states are kept. What a killed
            verification left there is gone on with.
        keep_every: seconds between states that are kept.
    """

    def __init__(self, teacher: Teacher, folder: Path, keep_every: float = KEEP_EVERY) -> None:
        self.teacher, self.folder, self.keep_every = teacher, folder, keep_every
        self._states: dict[tuple[int, ...], torch.Tensor] = {}
        self._folders: list[Path] = []

    @torch.inference_mode()
    def prepare(self, texts: Sequence[Sequence[int]]) -> None:
        """Run texts of token ids through all layers; those that were prepared already cost nothing."""
        new = sorted({tuple(text) for text in texts} - set(self._states), key=lambda text: (len(text), text))
        if new:
            self._states |= self._run(new)

    def forget(self) -> None:
        """Drop the prepared texts and their files."""
        self._states.clear()
        while self._folders:
            shutil.rmtree(self._folders.pop())

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Logits:
        """Logits of shape [tokens, vocabulary] for one text."""
        if tuple(ids) not in self._states:
            self.prepare([ids])
        found: Logits = linear(self._states[tuple(ids)], self.teacher.head()).numpy()
        return found

    def _run(self, texts: list[tuple[int, ...]]) -> dict[tuple[int, ...], torch.Tensor]:
        teacher, size = self.teacher, self.teacher.config.hidden_size
        identity = digest_of([teacher.fingerprint(), texts])
        work = WorkFolder(self.folder / identity[:16], identity)
        shape = (sum(map(len, texts)), size)
        self._folders.append(work.path)
        states = mapped(work.path / STATES, shape)
        batches = list(_batches(texts))
        done = next((index for index in range(teacher.count, 0, -1) if _is_kept(work, index)), 0)
        if done:
            progress(f"teacher: going on behind layer {done} of {teacher.count}")
            states.copy_(reopened(work.path / _step(done), shape))
        else:
            for rows, ids in batches:
                states[rows] = teacher.embed(ids).flatten(0, 1)
        self._pass_layers(work, states, batches, done)
        found, begin = {}, 0
        with teacher.norm() as norm:
            for text in texts:
                found[text] = states[begin : begin + len(text)]
                # with all layers done nothing reads the states before the norm again
                found[text].copy_(norm(found[text]))
                begin += len(text)
        return found

    def _pass_layers(
        self, work: WorkFolder, states: torch.Tensor, batches: list[tuple[slice, torch.Tensor]], done: int
    ) -> None:
        teacher, said, kept, last = self.teacher, _Seldom(SAY_EVERY), time.monotonic(), done
        steps = Steps("teacher: layer", teacher.count, said)
        arguments = {
            tuple(ids.shape): teacher.arguments(states[rows].view(*ids.shape, -1)) for rows, ids in reversed(batches)
        }
        for index in range(done, teacher.count):
            with teacher.layer(index) as layer:
                for rows, ids in batches:
                    given = arguments[tuple(ids.shape)][index]
                    states[rows] = call(layer, states[rows].view(*ids.shape, -1), given).flatten(0, 1)
            steps.step(index + 1)
            if time.monotonic() - kept >= self.keep_every:
                mapped(work.temporary(_step(index + 1)), tuple(states.shape)).copy_(states)
                work.commit(_step(index + 1), [_step(index + 1)])
                if last:
                    work.release(_step(last), _step(last))
                kept, last = time.monotonic(), index + 1


def _step(index: int) -> str:
    return f"layer-{index:04d}"


def _is_kept(work: WorkFolder, index: int) -> bool:
    """Whether the states behind so many layers are there, whole."""
    return work.finished(_step(index)) is not None and (work.path / _step(index)).exists()


def _batches(texts: Sequence[Sequence[int]]) -> Iterator[tuple[slice, torch.Tensor]]:
    """Neighbouring texts of one length: their rows among all tokens, and their ids [texts, tokens]."""
    begin = start = 0
    while start < len(texts):
        length, stop = len(texts[start]), start + 1
        while stop < len(texts) and len(texts[stop]) == length and (stop - start + 1) * length <= BATCH:
            stop += 1
        end = begin + (stop - start) * length
        yield slice(begin, end), torch.tensor([list(text) for text in texts[start:stop]])
        begin, start = end, stop


class _Seldom:
    """Says a line of progress when some seconds have passed since the last."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.last = seconds, time.monotonic()

    def __call__(self, line: str) -> None:
        if time.monotonic() - self.last >= self.seconds:
            self.last = time.monotonic()
            progress(line)
