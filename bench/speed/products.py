"""The rate of products with weights on this processor, in GFLOP/s: as torch makes them, and as the stages do (rlhf/models/linear.py).

python bench/speed/products.py                 one thread
python bench/speed/products.py --threads 2
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear

from bench.speed.report import console
from rlhf.models.linear import multiply
from rlhf.models.policy import DTYPES

SHAPES = ((384, 384), (1536, 384), (384, 1536), (4096, 384), (576, 1536))  # of weights: out, in
ROWS = (64, 512, 2048)
SECONDS = 0.2  # of each


def main(threads: Annotated[int, typer.Option(help="Threads.")] = 1) -> None:
    """Print the rate of a forward pass, and of it with both gradients."""
    torch.set_num_threads(threads)
    drawn = Table(title=f"GFLOP/s, threads: {threads}", title_justify="left")
    for heading in ("weight", "rows", "fp32, torch", "fp32, oneDNN", "bf16", "of three products: fp32, torch", "fp32, oneDNN", "bf16"):
        drawn.add_column(heading, justify="right")
    for out, width in SHAPES:
        for count in ROWS:
            made = {
                name: [torch.randn(*shape, dtype=dtype) for shape in ((count, width), (out, width), (count, out))]
                for name, dtype in DTYPES.items()
            }
            operations = 2 * count * width * out / 1e9
            forward = [operations / seconds(product, *made[name][:2]) for product, name in WAYS]
            every = [3 * operations / seconds(three, product, *made[name]) for product, name in WAYS]
            drawn.add_row(f"{out} × {width}", str(count), *(f"{rate:.0f}" for rate in forward + every))
    console().print(drawn)


WAYS: tuple[tuple[Callable[..., Tensor], str], ...] = ((linear, "fp32"), (multiply, "fp32"), (linear, "bf16"))


def three(product: Callable[..., Tensor], rows: Tensor, weight: Tensor, slope: Tensor) -> None:
    """That of a forward pass and those of the gradients of rows and weight."""
    product(rows, weight)
    product(slope, weight.t())
    product(slope.t(), rows.t())


def seconds(run: Callable[..., object], *arguments: Any) -> float:
    """Of processor time of all threads together, divided by them; the best of some."""
    run(*arguments)
    found, begin = list[float](), time.perf_counter()
    while time.perf_counter() - begin < SECONDS or len(found) < 3:
        before = time.process_time()
        run(*arguments)
        found.append(time.process_time() - before)
    return min(found) / torch.get_num_threads()


if __name__ == "__main__":
    typer.run(main)
