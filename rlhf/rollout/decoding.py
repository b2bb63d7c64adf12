"""One more token of each answer: a forward pass over the slots in use, and the draw. On a GPU both are a captured graph.

A decoding step is some hundreds of short operations, and a GPU would wait for Python to ask for each of them. Captured once, they are asked
for together. A graph computes with the same tensors at each replay: what differs from step to step is copied into them. And a step can be
asked for before the tokens of the one before it are known here: so the GPU has no pause while Python looks at them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.kernels import kernels
from rlhf.rollout.cache import SlotCache
from rlhf.rollout.sampling import Sampling, sample
from rlhf.tensors import shape

logger = logging.getLogger(__name__)

Drawn = tuple[list[int], list[float]]  # a token of each answer, and its log-probability
Asked = Callable[[], Drawn]  # waits for a step that was asked for
# A graph of 64 slots takes about as long where 20 are in use, as the weights must be read all the same. So there are few graphs, each for
# so many times as many slots as the one below: to capture one takes as long as PATIENCE steps spare by it.
APART = 4
PATIENCE = 100


class Decoder:
    """The decoding step as it stands, operation by operation."""

    foresees = False  # whether a step can be asked for before the one before it is known

    def __init__(self, model: PreTrainedModel, cache: SlotCache, sampling: Sampling) -> None:
        self.model, self.cache, self.sampling = model, cache, sampling
        self.device = model.device

    def ask(self, tokens: Sequence[int] | None, lengths: Sequence[int], uniforms: Tensor) -> Asked:
        """Draw the next token of the answer in each slot in use.

        Args:
            tokens: last one of each answer, whose keys and values no slot holds yet; None: those of the last step, if it `foresees`.
            lengths: tokens that each slot holds.
            uniforms: (B,) a number in [0, 1) for each, on the CPU.
        """
        inputs = self.cache.decode(lengths, self.model.dtype, self.device)
        ids = torch.tensor(tokens, device=self.device)[:, None]
        logits = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **inputs).logits[:, -1]
        drawn, log_probs = sample(logits, uniforms.to(self.device), self.sampling)
        return lambda: (drawn.tolist(), log_probs.tolist())


class _Buffers:
    """What goes to the GPU for a step and comes back from it, in memory that a GPU reads by itself."""

    def __init__(self, slots: int) -> None:
        self.given = torch.zeros(2, slots, dtype=torch.long, pin_memory=True)  # last tokens, lengths
        self.uniforms = torch.zeros(slots, pin_memory=True)
        self.drawn = torch.zeros(2, slots, dtype=torch.float64, pin_memory=True)  # tokens and log-probabilities: one copy brings both
        self.done = torch.cuda.Event()

    def wait(self, count: int) -> Drawn:
        self.done.synchronize()
        tokens, log_probs = self.drawn[:, :count].tolist()
        return list(map(int, tokens)), log_probs


class GraphDecoder(Decoder):
    """The decoding step on a GPU. Slots that are not in use are computed as well, up to the size of the graph, and nothing reads them."""

    def __init__(self, model: PreTrainedModel, cache: SlotCache, sampling: Sampling) -> None:
        super().__init__(model, cache, sampling)
        for name in ("attention", "drawing", "layers"):
            kernels(name)  # which are tried out now: not while the step is captured
        slots = cache.slots
        self.buffers = [_Buffers(slots), _Buffers(slots)]  # in turn: a step is asked for while the one before it is waited for
        # the same tensors at each step
        self.given, self.uniforms = self.buffers[0].given.to(self.device), self.buffers[0].uniforms.to(self.device)
        self.drawn = self.buffers[0].drawn.to(self.device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.spared: Counter[int] = Counter()  # steps in which a smaller graph, of so many slots, would have done
        self.captures = all(parameter.shape == shape(parameter) for parameter in model.parameters())  # else each pass gathers layers

    @property
    def foresees(self) -> bool:  # type: ignore[override]  # of the base class it is the same at all times
        return bool(self.graphs) and self.captures

    def ask(self, tokens: Sequence[int] | None, lengths: Sequence[int], uniforms: Tensor) -> Asked:
        """As above; nothing is waited for before the result is asked for, at most one step later."""
        self.buffers.reverse()
        buffers, count = self.buffers[0], len(lengths)
        buffers.given.zero_()
        buffers.given[1, :count] = torch.tensor(lengths)
        if tokens is None:
            self.given[0].copy_(self.drawn[0])
        else:
            buffers.given[0, :count] = torch.tensor(tokens)
            self.given[0].copy_(buffers.given[0], non_blocking=True)
        buffers.uniforms[:count] = uniforms
        self.given[1].copy_(buffers.given[1], non_blocking=True)
        self.uniforms.copy_(buffers.uniforms, non_blocking=True)
        self._run(self._size(count) if self.captures else count)
        buffers.drawn.copy_(self.drawn, non_blocking=True)
        buffers.done.record()
        return partial(buffers.wait, count)

    def _size(self, count: int) -> int:
        """Slots of the graph to take for so many: a new one once it is worth its while."""
        size = size_for(count, self.cache.slots)
        known = [slots for slots in self.graphs if slots >= count]
        if size in known or not known:
            return size
        self.spared[size] += 1
        return size if self.spared[size] > PATIENCE else min(known)

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
        ids, lengths = self.given[:, :rows]
        inputs = self.cache.decode_at_once(lengths)
        logits = self.model(input_ids=ids[:, None], past_key_values=self.cache, use_cache=True, **inputs).logits[:, -1]
        tokens, log_probs = sample(logits, self.uniforms[:rows], self.sampling)
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
