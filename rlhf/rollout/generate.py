"""Generation on the training weights: prompts as token ids in, a batch of rollouts out.

Continuous batching: each rank writes so many answers at a time, and one that ends makes room for the next prompt. Prompts are read packed,
each one once however many answers it gets; the longest come first, so that what is written side by side is of similar length. An answer
depends on its seed and not on its neighbours.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.errors import UserError
from rlhf.models.packed import begin_alike, pack
from rlhf.models.policy import check_length, context_tokens
from rlhf.rollout.cache import SPAN, Layer, SlotCache, attending, parts_of
from rlhf.rollout.decoding import Asked, Drawn, decoder
from rlhf.rollout.products import laid_out
from rlhf.rollout.sampling import Sampling, sample, uniforms

Finish = Literal["eos", "length", "stop"]
# Asked after each new token with the number of the prompt and its answer so far: whether the answer stops here.
Stop = Callable[[int, list[int]], bool]
# Tokens of prompts that are read in one forward pass, but for a longer prompt. On a CPU what a layer makes of them stays in its cache.
READ = {"cpu": 2**11, "cuda": 2**14}
REMEDY = "look whether its training diverged; in fp16 numbers beyond 65504 are infinite: set launch.precision to bf16 or fp32"
# Told whether this rank goes on: whether any rank does. Ranks that must run forward passes together are given one.
Together = Callable[[bool], bool]


@dataclass(frozen=True)
class Rollouts:
    """Answers sampled by one version of a policy."""

    prompts: list[list[int]]
    answers: list[list[int]]  # end token included where the answer ended by it
    log_probs: list[list[float]]  # of each answer token, under the sampling temperature
    finish: list[Finish]  # how each answer ended: by its end token, at the most tokens, by `stop`
    policy_version: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each answer."""
        return [len(answer) for answer in self.answers]

    @property
    def ended(self) -> list[bool]:
        """Whether each answer ended by itself."""
        return [finish != "length" for finish in self.finish]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    eos_id: int,
    pad_id: int,
    slots: int,
    policy_version: int = 0,
    stop: Stop | None = None,
    together: Together = bool,
) -> Rollouts:
    """Answer each prompt until its end token, `stop`, `max_new_tokens` or the end of what the model takes.

    Args:
        prompts: token ids, of different lengths; none empty.
        seeds: one per prompt; they alone decide the randomness of its answer.
        slots: answers written at a time; their keys and values are what takes memory.

    Raises:
        UserError: the longest prompt leaves no room for an answer; the model gives no probabilities.
    """
    longest = max(map(len, prompts), default=0)
    check_length(model, longest + 1, "prompt and answer")
    capacity = min(longest + sampling.max_new_tokens, context_tokens(model))
    cache = SlotCache(min(slots, len(prompts)), capacity)
    batch = _Batch(model, prompts, seeds, sampling, eos_id, pad_id, cache, stop)
    with ExitStack() as afterwards:
        afterwards.enter_context(_evaluating(model))
        afterwards.enter_context(attending(model))
        if cache.slots > 1:  # one row is multiplied with weights in any order
            afterwards.enter_context(laid_out(model))
        while together(not batch.done):
            batch.step()
    return Rollouts([list(prompt) for prompt in prompts], batch.answers, batch.log_probs, batch.finish, policy_version)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@dataclass
class _Prompt:
    """One that was read: what its answers start from."""

    layers: list[Layer]
    logits: Tensor  # (V,) of the first answer token


@dataclass
class _Batch:
    """Answers in the making. Each step is one forward pass: over new prompts where there is room, else over the last tokens."""

    model: PreTrainedModel
    prompts: Sequence[list[int]]
    seeds: Sequence[int]
    sampling: Sampling
    eos_id: int
    pad_id: int
    cache: SlotCache
    stop: Stop | None
    writing: list[int] = field(default_factory=list)  # number of the prompt whose answer is in slot 0, 1, 2, …
    read: dict[tuple[int, ...], _Prompt] = field(default_factory=dict)  # prompts of which answers are still waiting
    coming: tuple[list[int], Asked] | None = None  # a step that was asked for: numbers of its prompts, and what waits for it

    def __post_init__(self) -> None:
        count = len(self.prompts)
        self.answers: list[list[int]] = [[] for _ in range(count)]
        self.log_probs: list[list[float]] = [[] for _ in range(count)]
        self.finish: list[Finish] = ["length"] * count
        self.device = self.model.device
        self.decoder = decoder(self.model, self.cache, self.sampling)
        # slots side by side that are kept of similar length
        self.span = SPAN if self.device.type == "cpu" else self.cache.slots
        self.context = context_tokens(self.model)
        self.uniforms = uniforms(self.seeds, self.sampling.max_new_tokens)
        # the shortest last, to be taken from the end; equal ones side by side
        self.waiting = sorted(range(count), key=lambda i: (len(self.prompts[i]), self.prompts[i], -i))
        self.waiting_of = Counter(map(tuple, self.prompts))

    @property
    def done(self) -> bool:
        return not (self.waiting or self.writing)

    def step(self) -> None:
        """One forward pass, and the tokens that it gives. With nothing left to do it is made all the same: other ranks wait for it."""
        room = self.cache.slots - len(self.writing)
        if self.waiting and room and self._begin(self._next(room)):
            return
        if self.writing:
            self._continue()
        else:
            self.model(input_ids=torch.full((1, 1), self.pad_id, device=self.device), use_cache=False)

    def _next(self, room: int) -> list[int]:
        """Take prompts that are waiting, as many as there is room for and one forward pass reads."""
        numbers: list[int] = []
        new: dict[tuple[int, ...], int] = {}  # prompts to be read, and their tokens, but for those that the first one begins with as well
        while self.waiting and len(numbers) < room:
            key = tuple(self.prompts[self.waiting[-1]])
            if key not in self.read and key not in new:
                own = len(key) - (begin_alike([next(iter(new)), key]) if new else 0)
                if new and sum(new.values()) + own > READ[self.device.type]:
                    break
                new[key] = own
            numbers.append(self.waiting.pop())
        return numbers

    def _begin(self, numbers: list[int]) -> bool:
        """Read prompts and draw the first token of each answer; whether that took a forward pass: all may have been read before."""
        keys = [tuple(self.prompts[i]) for i in numbers]
        if new := [key for key in dict.fromkeys(keys) if key not in self.read]:
            self._read(new)
        first = len(self.writing)
        for slot, (number, key) in enumerate(zip(numbers, keys, strict=True), first):
            self.cache.place(slot, self.read[key].layers)
            self.writing.append(number)
        logits = torch.stack([self.read[key].logits for key in keys])
        self.waiting_of.subtract(keys)
        self.read = {key: prompt for key, prompt in self.read.items() if self.waiting_of[key]}
        tokens, log_probs = sample(logits, self.uniforms[numbers, 0].to(self.device), self.sampling)
        self._write((tokens.tolist(), log_probs.tolist()), numbers)
        return bool(new)

    def _read(self, prompts: list[tuple[int, ...]]) -> None:
        packed = pack(prompts, self.device)
        with self.cache.reading() as layers:
            read = self.model(**packed.read_at(packed.last), past_key_values=self.cache, use_cache=True, logits_to_keep=packed.last)
        logits = read.logits[0]
        for number, prompt in enumerate(prompts):
            self.read[prompt] = _Prompt(parts_of(packed, layers, number), logits[number])

    def _continue(self) -> None:
        """One more token of each answer. Where it can be, the step after it is asked for before this one's tokens are looked at."""
        numbers, asked = self.coming or self._ask([self.answers[i][-1] for i in self.writing], 0)
        self.coming = self._ask(None, 1) if self.decoder.foresees and numbers == self.writing else None
        self._write(asked(), numbers)

    def _ask(self, tokens: list[int] | None, unknown: int) -> tuple[list[int], Asked]:
        """Ask for a step of all slots in use; of each answer so many tokens are still unknown."""
        lengths = [self._length(slot) + unknown for slot in range(len(self.writing))]
        most = self.sampling.max_new_tokens - 1  # what an answer that is over already is given is not read
        steps = [min(len(self.answers[i]) + unknown, most) for i in self.writing]
        return list(self.writing), self.decoder.ask(tokens, lengths, self.uniforms[self.writing, steps])

    def _write(self, drawn: Drawn, numbers: Sequence[int]) -> None:
        """Add a token to the answer to each of some prompts, but for those that were over before it came."""
        over, live = [], set(self.writing)
        for i, token, log_prob in zip(numbers, *drawn, strict=True):
            if i in live:
                if math.isnan(log_prob):
                    raise UserError(self._without_probabilities(i), remedy=REMEDY)
                self.answers[i].append(token)
                self.log_probs[i].append(log_prob)
                if self._is_over(i, token):
                    over.append(self.writing.index(i))
        for slot in sorted(over, reverse=True):
            self._vacate(slot)

    def _without_probabilities(self, number: int) -> str:
        where = f"token {len(self.answers[number]) + 1} of an answer to a prompt of {len(self.prompts[number])} tokens"
        return f"the model gives no probabilities for {where}: a logit is NaN or infinite"

    def _is_over(self, number: int, token: int) -> bool:
        stopped = self.stop is not None and self.stop(number, self.answers[number])
        if token == self.eos_id or stopped:
            self.finish[number] = "eos" if token == self.eos_id else "stop"
            return True
        length = len(self.answers[number])
        return length == self.sampling.max_new_tokens or len(self.prompts[number]) + length == self.context

    def _vacate(self, slot: int) -> None:
        """Fill the slot of an answer that is over. The longest of each following span moves up into the one before, so that what attends in
        one call stays of similar length; the last slot falls free."""
        last = len(self.writing) - 1
        while slot < last:
            begin = (slot // self.span + 1) * self.span
            source = max(range(begin, min(begin + self.span, last + 1)), key=self._length, default=last)
            self.cache.move(source, slot, self._length(source) + (self.coming is not None))
            self.writing[slot] = self.writing[source]
            slot = source
        self.writing.pop()

    def _length(self, slot: int) -> int:
        """Tokens whose keys and values a slot holds; the last token drawn is not among them yet."""
        number = self.writing[slot]
        return len(self.prompts[number]) + len(self.answers[number]) - 1
