"""A version beside the champion, on the same held-out prompts and before the same judge: what the relative gates read.

What the champion answered when it was evaluated itself is used again where prompts, sampling and judge are the same (tags
`evaluate.heldout` and `evaluate.judge`); otherwise it answers anew, where its context has room for prompt and answer.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rlhf import config
from rlhf.errors import UserError
from rlhf.job import read_lines
from rlhf.launcher import command, processes
from rlhf.launcher.console import Console
from rlhf.locks import lock
from rlhf.registry.gates import LEAST_SHARE, Pair
from rlhf.registry.versions import Version, model_folder

STAGE = "evaluate"
PROMPTS = "data/prepared/heldout_prompts.jsonl"


def same_evaluation(one: Version, other: Version) -> bool:
    """Whether both were asked the same and judged by the same judge."""
    return all(one.tags.get(f"evaluate.{key}") == other.tags.get(f"evaluate.{key}") for key in ("heldout", "judge"))


def check_champion(champion: Version, root: Path, params: config.Params) -> None:
    """Check that what is trained now can be compared with the champion afterwards. Call it when stage prepare is done.

    Raises:
        UserError: its files were changed, are no model that can be opened, or it has no room for most held-out prompts and answers.
    """
    # both frameworks take seconds, which nothing else here needs
    from rlhf.models.dialogues import short_enough
    from rlhf.models.policy import context_of
    from rlhf.models.tokenizer import load_tokenizer

    who = f"version {champion.number} of {champion.model}, the champion,"
    remedy = "`rlhf use params.yaml promote.model=NAME` makes this a line of its own"
    folder = model_folder(champion.uri, root, params)
    try:
        tokenizer, context = load_tokenizer(folder), context_of(folder)
    except UserError as error:
        raise UserError(f"{who} cannot be compared with: {error.what}", remedy=remedy) from None
    longest, answer = params.answering.max_prompt_tokens, params.answering.max_answer_tokens
    rows = short_enough(tokenizer, read_lines(root / PROMPTS), longest)[: params.evaluate.prompts]
    fitting = short_enough(tokenizer, rows, context - answer)
    if len(fitting) < LEAST_SHARE * len(rows):
        what = f"{who} takes {context} tokens: room for {len(fitting)} of {len(rows)} held-out prompts with an answer"
        raise UserError(
            f"{what} ({params.answering_key}.max_answer_tokens: {answer}), too few to compare it with what would be trained",
            remedy=f"{remedy}; or lower {params.answering_key}.max_answer_tokens",
        )


def folder_of(version: Version, champion: Version, root: Path) -> Path:
    """Where the comparison of two versions lies, or will lie."""
    key = "/".join([version.tags["sha256"], version.tags["evaluation"], str(champion.number), champion.tags["sha256.files"]])
    return root / "runs" / "compare" / hashlib.sha256(key.encode()).hexdigest()[:16]


def pairs(version: Version, champion: Version, root: Path) -> list[Pair]:
    """What `compare` found."""
    return [_pair(row) for row in rows(version, champion, root)]


def rows(version: Version, champion: Version, root: Path) -> list[dict[str, Any]]:
    """The lines of the comparison: prompt, both answers, both scores."""
    return read_lines(folder_of(version, champion, root) / "out" / "comparison.jsonl")


def is_done(version: Version, champion: Version, root: Path) -> bool:
    return (folder_of(version, champion, root) / "FINISHED").exists()


def compare(version: Version, champion: Version, root: Path, params: config.Params) -> None:
    """Have the champion answer, be judged and be scored, in a job of its own; nothing where that was done before.

    Args:
        version: the one that the workspace's models and data/answers.jsonl belong to.
        champion: what it is compared with.
        root: the workspace.
        params: of the workspace.

    Raises:
        UserError: the champion's files were changed, or the job failed.
        Stopped: this process was told to stop.
    """
    with lock(root, "compare"):
        if is_done(version, champion, root):
            return
        folder = folder_of(version, champion, root)
        folder.mkdir(parents=True, exist_ok=True)
        job = {
            "folder": str(model_folder(champion.uri, root, params)),
            "algorithm": champion.tags["algorithm"],
            "same_evaluation": same_evaluation(version, champion),
        }
        (folder / "champion.json").write_text(json.dumps(job), encoding="utf-8")
        _run(root, params, folder)


def _run(root: Path, params: config.Params, folder: Path) -> None:
    gpus = command.find_gpus(params.launch.accelerator)
    wanted = getattr(params.launch.jobs, STAGE).processes
    held = command.hold_gpus(root, STAGE, gpus, wanted) if gpus and not params.launch.hostfile else nullcontext(gpus)
    with held as numbers, Console("compare", folder / "log.txt") as console:
        words = command.command(STAGE, "rlhf.stages.compare", params, numbers)
        environment = command.environment(STAGE, params, root, folder, "cuda" if gpus else "cpu")
        try:
            code = processes.run(words, root, environment, params.launch.timeout_minutes * 60, console.show)
        except subprocess.TimeoutExpired:
            what = f"the comparison was stopped after {params.launch.timeout_minutes:g} minutes (launch.timeout_minutes)"
            raise UserError(what, remedy="raise it and run again") from None
    if code or not (folder / "FINISHED").exists():
        console.explain(code)
        raise UserError(f"the comparison with the champion failed with exit code {code}", remedy=f"its log: {folder / 'log.txt'}")


def _pair(row: dict[str, Any]) -> Pair:
    scores = [row[of][which] for of in ("scores", "rewards") for which in ("new", "champion")]
    right = [statistics.fmean(row["right"][which]) for which in ("new", "champion")] if "right" in row else []
    return Pair(row["kind"], *scores, *right)
