"""A draw from rows of logits: they are read once, and what the draw needs of them is small.

As `drawn` of rlhf/rollout/sampling.py in two steps, the part of the row and the column in it. Left to torch, the logits of a large
vocabulary become a copy in fp32 that is read and written six times, which takes as long as a layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

PART, PARTS = 128, 32  # columns of a part; parts that a program adds up


def try_out() -> None:
    draw(torch.zeros(1, 2, device="cuda"), torch.zeros(1, device="cuda"), 1.0)


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token per row by inverse-CDF sampling, and its log-probability. Logits (B, V), uniforms (B,) → (B,), (B,).

    A row without probabilities, as one of its logits is NaN or ∞, gives any token and NaN.
    """
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, columns = logits.shape
    blocks = triton.cdiv(columns, PART * PARTS)
    largest = torch.empty(rows, blocks, dtype=torch.float32, device=logits.device)
    sums = torch.empty(rows, blocks * PARTS, dtype=torch.float32, device=logits.device)
    _sum_up[(rows, blocks)](logits, largest, sums, temperature, logits.stride(0), columns, PART, PARTS)
    most = largest.amax(-1, keepdim=True)
    scales = (largest - most).double().exp()
    upto = (sums.view(rows, blocks, PARTS) * scales[:, :, None]).view(rows, -1).cumsum(-1)
    wanted = uniforms.double()[:, None] * upto[:, -1:]
    part = torch.searchsorted(upto, wanted, right=True).clamp_(max=upto.shape[1] - 1)  # it is beyond in a row of NaN
    before = pad(upto, (1, 0)).gather(1, part)
    column = part * PART + torch.arange(PART, device=logits.device)
    scaled = logits.gather(1, column.clamp(max=columns - 1)).float() / temperature
    within = (scaled - most).double().exp().masked_fill(column >= columns, 0).cumsum(-1)
    # the part's own sum may be rounded otherwise: the column is among those that have weight
    last = within[:, -1:].nextafter(torch.zeros_like(wanted))
    place = torch.searchsorted(within, torch.minimum(wanted - before, last), right=True).clamp_(max=PART - 1)
    log_probs = scaled.gather(1, place) - most - upto[:, -1:].log().float()
    return (part * PART + place).clamp_(max=columns - 1).squeeze(1), log_probs.squeeze(1)


@triton.jit
def _sum_up(  # type: ignore[no-untyped-def]  # its types are Triton's
    logits,
    largest,
    sums,
    temperature,
    stride,
    columns,
    PART: tl.constexpr,  # noqa: N803
    PARTS: tl.constexpr,  # noqa: N803
):
    """Of some parts of a row: the largest logit of all, and each one's sum of exponentials beneath it."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part = block * PARTS + tl.arange(0, PARTS)
    at = part[:, None] * PART + tl.arange(0, PART)[None, :]
    x = tl.load(logits + row * stride + at, mask=at < columns, other=float("-inf")).to(tl.float32) / temperature
    most = tl.max(tl.max(x, 1), 0)
    tl.store(largest + row * tl.num_programs(1) + block, most)
    below = tl.where(most == float("-inf"), 0.0, most)  # where nothing can be drawn
    tl.store(sums + row * tl.num_programs(1) * PARTS + part, tl.sum(tl.exp(x - below), 1))
