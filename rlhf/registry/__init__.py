"""Versions of the assistant in MLflow's model registry: what each was made of, which one is in service, who put it there and why.

A version's files never change, and it carries its lineage in tags. Three aliases point at versions: `champion` is in service, `previous`
was before it, `candidate` is the newest one that did not pass the gates. Every move of `champion` is entered in the model's history.
"""

from rlhf.registry.history import Move, moves
from rlhf.registry.promotion import Decision, Verdict, carry_out, check, promote, rollback
from rlhf.registry.registration import EVALUATED, register, weights_hash
from rlhf.registry.versions import DamagedError, Version, aliases, find, model_folder, resolve, tag, versions

__all__ = [
    "EVALUATED",
    "DamagedError",
    "Decision",
    "Move",
    "Verdict",
    "Version",
    "aliases",
    "carry_out",
    "check",
    "find",
    "model_folder",
    "moves",
    "promote",
    "register",
    "resolve",
    "rollback",
    "tag",
    "versions",
    "weights_hash",
]
