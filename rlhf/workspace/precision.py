"""`rlhf use PRESET launch.precision=auto`: what this machine is quick at.

It is written into params.yaml as one of the precisions, so that results stay a function of params. Whoever asks for one that it is slow at
is told.
"""

from __future__ import annotations

import re
from pathlib import Path

from rlhf.config.operations import Launch

AUTO = "auto"
PROCESSOR = Path("/proc/cpuinfo")
DEVICES = Path("/dev")
HALF = {"amx_bf16", "avx512_bf16"}  # what a processor has that multiplies bfloat16
SLOW = "in which this processor is many times slower than in fp32; `rlhf use params.yaml launch.precision=auto` sets what it is quick at"


def best(*, built: bool) -> tuple[str, str]:
    """The precision, and why.

    Args:
        built: the model is the small one that base builds. Its products are too small for AVX512-BF16 to gain on what half precision
            costs besides (LOG.md).
    """
    if _has_gpu():
        return "bf16", "there is a GPU"
    flags = _flags()
    if "amx_bf16" in flags:
        return "bf16", "this processor has AMX"
    if "avx512_bf16" in flags:
        return ("fp32", "the model is a small one, and this processor has no AMX") if built else ("bf16", "this processor has AVX512-BF16")
    return "fp32", "this processor has no products of bfloat16"


def doubt(launch: Launch) -> str | None:
    """Why the precision that section launch asks for will be slow here, if it will: a stage would seem to stand still."""
    elsewhere = launch.hostfile or launch.accelerator == "cuda" or (launch.accelerator == "auto" and _has_gpu())
    flags = _flags()
    if launch.precision != "bf16" or elsewhere or not flags or flags & HALF:
        return None
    return f"launch.precision is bf16, {SLOW}"


def _has_gpu() -> bool:
    return any(re.fullmatch(r"nvidia\d+", device.name) for device in DEVICES.glob("nvidia*"))


def _flags() -> set[str]:
    """What the processor can do, as Linux names it; nothing elsewhere."""
    text = PROCESSOR.read_text(encoding="utf-8", errors="replace") if PROCESSOR.is_file() else ""
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()
