"""`rlhf env`: what a bug report should say of versions, machine and workspace. Nothing in it may stop the report."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import psutil

from rlhf import config, tracking
from rlhf.errors import UserError
from rlhf.redact import redact
from rlhf.workspace import snapshot
from rlhf.workspace.find import workspace

GIB = 2**30
# what a processor can do that decides how matrices are multiplied: on Intel and AMD, on ARM
INSTRUCTIONS = re.compile(r"^(avx2|fma|f16c|avx512\w*|avx_vnni|amx_\w+|asimd\w*|sve\w*|bf16|i8mm)$")
VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "CUDA_VISIBLE_DEVICES",
)


def version() -> str:
    """The version of the project that is installed."""
    return metadata.version("rlhf")


def report() -> Iterator[tuple[str, str]]:
    """Name and value, a pair for each line; secrets are left out."""
    for name, ask in REPORT.items():
        try:
            value = ask()
        except Exception as error:  # whatever is broken: that is what the report is for
            value = getattr(error, "what", f"{type(error).__name__}: {error}")
        yield name, redact(" ".join(value.split()))


def _packages() -> str:
    names = (re.split(r"[^\w.-]", needed, maxsplit=1)[0] for needed in metadata.requires("rlhf") or () if "extra ==" not in needed)
    return ", ".join(f"{name} {metadata.version(name)}" for name in names)


def _torch() -> str:
    import torch

    accelerator = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"
    build = re.findall(r"(?:Math Kernel Library Version|MKL-DNN) \S+", torch.__config__.show())
    return f"{torch.__version__} for {accelerator}; computes with {torch.backends.cpu.get_cpu_capability()}; {', '.join(build)}"


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    text = facts.read_text(encoding="utf-8") if facts.is_file() else ""
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", text, re.MULTILINE)
    able = [flag for flag in flags[1].split() if INSTRUCTIONS.match(flag)] if flags else []
    return f"{name[1] if name else platform.processor() or platform.machine()}; {' '.join(able) or 'instruction sets unknown'}"


def _cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{psutil.cpu_count(logical=False)} with {os.cpu_count()} threads, {usable} usable here"


def _memory() -> str:
    memory = psutil.virtual_memory()
    return f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB available"


def _gpus() -> str:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"none ({error})"
    found = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    names = [f"{pynvml.nvmlDeviceGetName(one)} with {pynvml.nvmlDeviceGetMemoryInfo(one).total / GIB:.0f} GiB" for one in found]
    return f"{', '.join(names) or 'none'}; driver {pynvml.nvmlSystemGetDriverVersion()}"


def _workspace() -> str:
    try:
        root = workspace()
    except UserError:
        return f"none at {Path.cwd()} or above"
    changed = ", with changes" if snapshot.changed(root, ".") else ""
    return f"{root}, git revision {snapshot.head(root) or 'unknown'}{changed}"


def _mlflow() -> str:
    root = workspace()
    return tracking.tracking_uri(root, config.load(root / "params.yaml"))


def _prefect() -> str:
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME

    return f"{PREFECT_API_URL.value() or 'a server for each run'}, home {PREFECT_HOME.value()}"


def _disk() -> str:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    return f"{free:.1f} GiB free at {Path.cwd()}"


REPORT: dict[str, Callable[[], str]] = {
    "rlhf": version,
    "python": lambda: f"{platform.python_version()}, {platform.platform()}",
    "packages": _packages,
    "torch": _torch,
    "processor": _processor,
    "cores": _cores,
    "memory": _memory,
    "GPUs": _gpus,
    "variables": lambda: ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ) or "none",
    "workspace": _workspace,
    "MLflow": _mlflow,
    "Prefect": _prefect,
    "disk": _disk,
}
