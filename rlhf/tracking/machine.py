"""Load and memory of the machine while a stage runs, sampled by MLflow's own monitors into lines like those of its steps."""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

SECONDS_BETWEEN_SAMPLES = 5.0


class Sampler:
    """Appends a sample to a file every few seconds and one at the end, as a context; metrics are named as MLflow's pages expect.

    CPU and memory are the whole machine's; a stage that goes on after a stop goes on counting where it was.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._monitors: list[BaseMetricsMonitor] = []

    def __enter__(self) -> Sampler:
        # a second and a half to load, and never by two threads at once: MLflow's modules import each other in circles
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

        self._monitors.append(CPUMonitor())
        with suppress(Exception):  # no NVIDIA GPU, or none that can be asked
            self._monitors.append(GPUMonitor())
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ending.set()
        self._thread.join()

    def _follow(self) -> None:
        psutil.cpu_percent()  # counts from call to call: the first one has nothing to count from
        step = len(self._path.read_bytes().splitlines()) if self._path.exists() else 0
        ending = False
        while not ending:
            ending = self._ending.wait(SECONDS_BETWEEN_SAMPLES)
            metrics: dict[str, float] = {}
            for monitor in self._monitors:
                monitor.collect_metrics()
                metrics |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
            step += 1
            line = json.dumps({"step": step, "at": int(time.time() * 1000), "metrics": metrics}) + "\n"
            # a full disk is the stage's to tell of
            with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
                file.write(line)
