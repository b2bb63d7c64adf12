"""What a step cost: seconds of its phases, tokens per second, use of the processor's arithmetic, memory.

Nothing of it may enter a stage's outputs, which are the same in each run; it goes to metrics.jsonl alone.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import dataclass, field

import torch
from torch import nn

from rlhf.tensors import shape

MATRIX_WIDTH = {"cpu": 1024, "cuda": 8192}
ROUNDS = 5
SLOW_SECONDS = 0.2  # a product that takes longer is not warming up: this processor has no products of that precision


@dataclass
class Clock:
    """Seconds of the phases of a step, one after the other."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._last = self._now()

    def stop(self, phase: str) -> None:
        """What passed since the last call belongs to this phase."""
        now = self._now()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # what was asked for is done
        return time.perf_counter()

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def report(self, tokens: dict[str, float]) -> dict[str, float]:
        """Seconds and share of each phase; tokens per second of those phases whose tokens are given."""
        return {
            "seconds": self.total,
            **{f"{phase}_seconds": seconds for phase, seconds in self.seconds.items()},
            **{f"{phase}_share": seconds / self.total for phase, seconds in self.seconds.items()},
            **{f"{phase}_tokens_per_second": count / self.seconds[phase] for phase, count in tokens.items()},
        }


@dataclass(frozen=True)
class Products:
    """How many weights of a model take part in a matrix product for each token. Looking up an embedding is none.

    A product is an addition and a multiplication per weight and token, 2 floating-point operations. Training makes it again for the
    gradient of its input, and once more for that of its weight if that is trained: 6 operations altogether where all weights are. Neither
    attention between tokens nor activations that are computed a second time count. The last layer counts for all tokens, made or not
    (rlhf/models/last_layer.py).
    """

    body: int
    output: int  # of the output layer, which is computed at predicted tokens alone
    body_trained: int
    output_trained: int

    @classmethod
    def of(cls, model: nn.Module) -> Products:
        """Of a language model, or a reward model or critic, held whole or in parts; its head of one row does not count as an output."""
        looked_up = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
        get_output = getattr(model, "get_output_embeddings", lambda: None)
        output = [] if (layer := get_output()) is None else [layer.weight]
        body = [p for p in model.parameters() if len(shape(p)) > 1 and id(p) not in looked_up and all(p is not weight for weight in output)]
        sizes = [sum(math.prod(shape(p)) for p in part) for part in (body, output, filter(_trained, body), filter(_trained, output))]
        return cls(*sizes)

    def forward(self, tokens: float, predicted: float = 0) -> float:
        """Floating-point operations of a forward pass over so many tokens, so many of which are given logits."""
        return 2 * (self.body * tokens + self.output * predicted)

    def training(self, tokens: float, predicted: float = 0) -> float:
        """The same of a forward and a backward pass."""
        return 2 * self.forward(tokens, predicted) + 2 * (self.body_trained * tokens + self.output_trained * predicted)


def _trained(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of this rank in products of large square matrices, best of some: what a step is held against."""
    width = MATRIX_WIDTH[device.type]
    generator = torch.Generator(device).manual_seed(1)
    a, b = (torch.randn(width, width, generator=generator, device=device, dtype=dtype) for _ in range(2))
    clocks = list[Clock]()
    while len(clocks) < ROUNDS and not (clocks and clocks[-1].total > SLOW_SECONDS):
        clocks.append(Clock(device))
        torch.mm(a, b)
        clocks[-1].stop("product")
    return 2 * width**3 / min(clock.total for clock in clocks)


def peak_memory(device: torch.device) -> float:
    """GiB that this rank has held at most so far: of the GPU's allocator, else of the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
