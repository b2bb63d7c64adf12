"""A check of the whole plan before the first stage trains: all that is wrong with model, tokenizer, template, data and machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.config import SAMPLING, SCORING, Params, kind
from rlhf.config.training import BuiltBase
from rlhf.data import earlier
from rlhf.errors import UserError
from rlhf.launcher.given import check_base, check_base_is_apart
from rlhf.plan import adapters, launching, memory, rewards, rows
from rlhf.plan.findings import Findings
from rlhf.workspace.find import home

if TYPE_CHECKING:
    from rlhf.plan.model import Model

PINNED = "models/base"
PROMPTS = "data/prepared/heldout_prompts.jsonl"


def check(root: Path, params: Params, stages: Sequence[str]) -> Findings:
    """Look at all that the stages will need. Nothing is loaded but config, tokenizer, heads of weights and a sample of the rows.

    Args:
        root: the workspace.
        params: of the run.
        stages: that are to run; what the others have made is taken as it is.
    """
    findings = Findings()
    examples = rows.of_sources(root, params, findings) if "prepare" in stages else rows.of_prepared(root, params, findings)
    model = _model(root, params, stages, findings)
    if model and model.tokenizer:
        rows.render(examples, model.tokenizer, model.name, params, findings)
    if isinstance(params.base, BuiltBase):
        adapters.check(stages, params, "the model that base builds", adapters.of_built(params.base), findings)
    elif model and model.layers:
        adapters.check(stages, params, model.name, model.layers, findings)
    shape = memory.of_built(params.base) if isinstance(params.base, BuiltBase) else model.shape if model else None
    if any(kind(stage) in SCORING for stage in stages):
        rewards.check(root, params, findings)
    if "awac" in stages:
        with findings.collecting():
            earlier.usable(earlier.read(root / earlier.FOLDER))
    if "grpo" in stages and not params.grpo.holds_reference:
        findings.notes.append(
            "grpo.stop.kl holds nothing back: with grpo.kl.coefficient 0 no reference is loaded, and no KL measured until evaluate"
        )
    gpus, nodes = launching.check(root, stages, params, findings)
    if shape and gpus is not None:
        memory.check(stages, params, shape, gpus, nodes, findings)
    if shape:
        with findings.collecting():
            launching.check_disk(root, stages, params, shape.weights, findings)
    return findings


def _model(root: Path, params: Params, stages: Sequence[str], findings: Findings) -> Model | None:
    """The model to start from; None where the stages need none, or build a small one, of which there is nothing to look at."""
    base = params.base
    if isinstance(base, BuiltBase) or list(stages) == ["prepare"]:
        return None
    is_pinned = "base" not in stages
    with findings.collecting():
        check_base_is_apart(root, params)
    if not is_pinned and (gone := _gone(root, params)):
        if not (root / PINNED / "config.json").is_file():
            findings.problems.append(gone)
            return None
        findings.notes.append(f"{gone.what}: {PINNED} stands for it, as long as nothing that it was made of has changed")
        is_pinned = True
    from rlhf.plan import model  # both frameworks take seconds, which nothing else here needs

    found = model.look_at(root, params, findings, is_pinned=is_pinned)
    model.check_lengths(found, _lengths(params, stages), findings)
    return found


def _gone(root: Path, params: Params) -> UserError | None:
    """Why there is no folder of the given model, where there is none."""
    try:
        check_base(root, "base", params)
    except UserError as error:
        return error
    return None


def _lengths(params: Params, stages: Sequence[str]) -> dict[str, int]:
    """The longest sequences of the stages, by what in params.yaml sets them."""
    longest = {name: getattr(params, name).max_tokens for name in ("sft", "reward", "awac", "dpo")}
    lengths = {f"{stage}.max_tokens": tokens for stage, tokens in longest.items() if stage in stages}
    if params.policy in stages or any(kind(stage) in SAMPLING for stage in stages):
        key = params.answering_key
        lengths[f"{key}.max_prompt_tokens + {key}.max_answer_tokens + 1"] = params.answering.longest
    if "evaluate" in stages and params.trains_judge:
        lengths["evaluate.judge.max_tokens"] = params.evaluate.judge.max_tokens
    return lengths


def check_champion(root: Path, params: Params, findings: Findings) -> None:
    """Whether the version in service can be reached, and compared with what would be trained."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or params.tracking.uri
    if not uri and not (home(root) / "mlruns" / "mlflow.db").exists():
        return  # nor has there ever been a version
    from rlhf import registry
    from rlhf.registry import comparison

    try:
        number = registry.aliases(root, params).get("champion")
    except UserError as away:
        findings.notes.append(f"{away.what}: training goes on without it, registration waits for it")
        return
    if number is None:
        return
    findings.seen.append(("champion", f"version {number} of {params.promote.model}"))
    with findings.collecting():
        champion = registry.find(root, params, number)
        if (root / PROMPTS).is_file():
            comparison.check_champion(champion, root, params)
        else:
            registry.model_folder(champion.uri, root, params)
