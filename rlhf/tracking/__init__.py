"""MLflow runs of flows and stages."""

from rlhf.tracking.runs import Tracker, of_flow, of_stage, run_of, run_of_flow, send_waiting, waiting
from rlhf.tracking.store import client, initialise, own_uri, page, tracking_uri
from rlhf.tracking.sweeps import SweepRuns

__all__ = [
    "SweepRuns",
    "Tracker",
    "client",
    "initialise",
    "of_flow",
    "of_stage",
    "own_uri",
    "page",
    "run_of",
    "run_of_flow",
    "send_waiting",
    "tracking_uri",
    "waiting",
]
