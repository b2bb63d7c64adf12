"""One more token of each answer: a forward pass over the slots in use, and the draw. On a GPU both are a captured graph.

A decoding step is some hundreds of short operations, and a GPU would wait for Python to ask for each of them. Captured once, they are asked
for together. A graph computes with the same tensors at each replay: what differs from step to step is copied into them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.rollout.cache import SlotCache
from rlhf.rollout.gpu import attend_at_once, draw_at_once
from rlhf.rollout.sampling import Sampling, sample
from rlhf.tensors import shape

logger = logging.getLogger(__name__)

Drawn = tuple[list[int], list[float]]  # a token of each answer, and its log-probability
# A graph of 64 slots takes about as long where 20 are in use, as the weights must be read all the same. So there are few graphs, each for
# so many times as many slots as the one below: to capture one takes as long as some steps do.
APART = 4


class Decoder:
    """The decoding step as it stands, operation by operation."""

    def __init__(self, model: PreTrainedModel, cache: SlotCache, sampling: Sampling) -> None:
        self.model, self.cache, self.sampling = model, cache, sampling
        self.device = model.device

    def step(self, tokens: Sequence[int], lengths: Sequence[int], uniforms: Tensor) -> Drawn:
        """Draw the next token of the answer in each slot in use.

        Args:
            tokens: last one of each answer, whose keys and values no slot holds yet.
            lengths: tokens that each slot holds.
            uniforms: (B,) a number in [0, 1) for each, on the CPU.
        """
        inputs = self.cache.decode(lengths, self.model.dtype, self.device)
        ids = torch.tensor(tokens, device=self.device)[:, None]
        logits = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **inputs).logits[:, -1]
        drawn, log_probs = sample(logits, uniforms.to(self.device), self.sampling)
        return drawn.tolist(), log_probs.tolist()


class GraphDecoder(Decoder):
    """The decoding step on a GPU. Slots that are not in use are computed as well, up to the size of the graph, and nothing reads them."""

    def __init__(self, model: PreTrainedModel, cache: SlotCache, sampling: Sampling) -> None:
        super().__init__(model, cache, sampling)
        attend_at_once(), draw_at_once()  # which are tried out now: not while the step is captured
        slots = cache.slots
        # the same tensors at each step: on the CPU, in memory that a GPU reads by itself, and on the GPU
        self.given = torch.zeros(2, slots, dtype=torch.long, pin_memory=True)  # last tokens, lengths
        self.uniforms = torch.zeros(slots, pin_memory=True)
        self.given_there, self.uniforms_there = self.given.to(self.device), self.uniforms.to(self.device)
        self.drawn = torch.zeros(2, slots, dtype=torch.float64, device=self.device)  # tokens and log-probabilities: one copy brings both
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.captures = all(parameter.shape == shape(parameter) for parameter in model.parameters())  # else each pass gathers layers

    def step(self, tokens: Sequence[int], lengths: Sequence[int], uniforms: Tensor) -> Drawn:
        count = len(tokens)
        self.given[:, :count] = torch.tensor([tokens, lengths])
        self.given[:, count:] = 0
        self.uniforms[:count] = uniforms
        self.given_there.copy_(self.given, non_blocking=True)
        self.uniforms_there.copy_(self.uniforms, non_blocking=True)
        self._run(size_for(count, self.cache.slots) if self.captures else count)
        drawn, log_probs = self.drawn[:, :count].tolist()
        return list(map(int, drawn)), log_probs

    def _run(self, rows: int) -> None:
        if rows in self.graphs:
            self.graphs[rows].replay()
        elif self.captures:
            self._run_and_capture(rows)
        else:
            self._compute(rows)

    def _run_and_capture(self, rows: int) -> None:
        """Make the step operation by operation, and keep what it consists of for those that follow."""
        others = next(iter(self.graphs.values()), None)
        graph = torch.cuda.CUDAGraph()
        try:
            with _not_waited_for():
                self._compute(rows)
            # one pool for all: none needs what another has left there; the stream, as a capture that fails does not put it back
            pool = None if others is None else others.pool()
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._compute(rows)
        except RuntimeError as error:
            what = "a model of type %s decodes without a captured graph, which is slower: %s"
            logger.warning(what, self.model.config.model_type, str(error).splitlines()[0])
            self.captures = False
            self._compute(rows)
        else:
            self.graphs[rows] = graph

    def _compute(self, rows: int) -> None:
        ids, lengths = self.given_there[:, :rows]
        inputs = self.cache.decode_at_once(lengths)
        logits = self.model(input_ids=ids[:, None], past_key_values=self.cache, use_cache=True, **inputs).logits[:, -1]
        tokens, log_probs = sample(logits, self.uniforms_there[:rows], self.sampling)
        self.drawn[0, :rows] = tokens
        self.drawn[1, :rows] = log_probs


def size_for(count: int, slots: int) -> int:
    """Slots of the smallest graph that takes so many."""
    size = slots
    while (smaller := -(-size // APART)) >= count and smaller < size:
        size = smaller
    return size


@contextmanager
def _not_waited_for() -> Iterator[None]:
    """Most operations that wait for the GPU, which no graph can hold, raise RuntimeError inside the block."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def decoder(model: PreTrainedModel, cache: SlotCache, sampling: Sampling) -> Decoder:
    return (GraphDecoder if model.device.type == "cuda" else Decoder)(model, cache, sampling)
