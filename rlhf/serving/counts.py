"""What is counted for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rlhf.feedback.recorder import Recorder
from rlhf.serving.versions import Versions

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Counts:
    """Counters of one server."""

    def __init__(self, versions: Versions, recorder: Recorder, problems: Callable[[], Sized]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Now(versions, recorder, problems))
        self.requests = Counter("rlhf_requests", "Requests, by what became of them.", ["version", "finish"], registry=self.registry)
        self.refused = Counter("rlhf_refused", "Requests that were answered with an error.", ["status"], registry=self.registry)
        self.arms = Counter("rlhf_arm_requests", "Requests, by the alias that they came to.", ["arm"], registry=self.registry)
        self.shadows = Counter("rlhf_shadows", "Shadows of answers, by what became of them.", ["outcome"], registry=self.registry)
        self.prompts = Counter("rlhf_prompt_tokens", "Tokens of prompts.", ["version"], registry=self.registry)
        self.answers = Counter("rlhf_answer_tokens", "Tokens of answers.", ["version"], registry=self.registry)
        self.first = Histogram("rlhf_first_text_seconds", "From a request to its first text.", buckets=SECONDS, registry=self.registry)


class _Now(Collector):
    """What is as it is at the moment of asking."""

    def __init__(self, versions: Versions, recorder: Recorder, problems: Callable[[], Sized]) -> None:
        self._versions, self._recorder, self._problems = versions, recorder, problems

    def collect(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily("rlhf_waiting", "Requests that wait for a slot.", labels=["version"])
        writing = GaugeMetricFamily("rlhf_writing", "Answers that are being written, shadows aside.", labels=["version"])
        for name, version in self._versions.names.items():
            if name == version.name:
                count = version.engine.at_work
                waiting.add_metric([name], count.waiting)
                writing.add_metric([name], count.writing)
        yield from (waiting, writing)
        yield GaugeMetricFamily("rlhf_swaps", "Times that an alias came to mean another version.", value=self._versions.swaps)
        yield GaugeMetricFamily("rlhf_problems", "What /health tells of.", value=len(self._problems()))
        yield CounterMetricFamily("rlhf_recorded", "Answers that were recorded.", value=self._recorder.written)
        yield CounterMetricFamily("rlhf_unrecorded", "Answers that should have been recorded, and were not.", value=self._recorder.dropped)
        yield GaugeMetricFamily("rlhf_unwritten", "Answers that wait to be recorded.", value=self._recorder.waiting)
