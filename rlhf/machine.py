"""Load and memory of the machine while a stage runs, sampled by MLflow's own monitors into lines like those of its steps."""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

SECONDS_BETWEEN_SAMPLES = 5.0


class Sampler:
    """Appends a sample to a file every few seconds and one at the end, as a context; metrics are named as MLflow's pages expect.

    CPU and memory are the whole machine's; a stage that goes on after a stop goes on counting where it was.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ending.set()
        # bounded: the library may still be loading, and nobody waits for a sample
        self._thread.join(1)

    def _follow(self) -> None:
        # a second and a half to load: never on the way of a stage's start
        from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

        monitors: list[BaseMetricsMonitor] = [CPUMonitor()]
        with suppress(ImportError, RuntimeError):  # no NVIDIA GPU here
            monitors.append(GPUMonitor())
        psutil.cpu_percent()  # counts from call to call: the first one has nothing to count from
        step = len(self._path.read_bytes().splitlines()) if self._path.exists() else 0
        ending = False
        while not ending:
            ending = self._ending.wait(SECONDS_BETWEEN_SAMPLES)
            metrics: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                metrics |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
            step += 1
            # a full disk is the stage's to tell of
            with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "at": int(time.time() * 1000), "metrics": metrics}) + "\n")
