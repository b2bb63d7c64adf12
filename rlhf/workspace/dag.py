"""dvc.yaml: the graph of the stages of a run, put together of the parts in graphs/."""

from __future__ import annotations

import json
import re
from pathlib import Path

from rlhf import config
from rlhf.errors import UserError

POLICY_READS = "deps: [models/sft, models/reward, data/prepared/ppo.jsonl,"  # as ppo and grpo have it
TUNED = "plots/ultho.csv: {cache: false, x: step, y: signal}"


def text(root: Path, params: config.Params) -> str:
    """The text of dvc.yaml for params: DVC has no branches, so each stage that makes the policy has a graph of its own.

    Where no reward is a model, there is no stage reward, and nothing reads what it makes. With a warm start there is stage awac, and the
    policy's own reads its model, too; where a bandit chooses values, its table is an output. The files of reward functions are inputs of
    the stages that call them.

    Raises:
        UserError: a part of it is missing.
    """
    parts = ["common", *(["reward"] if params.trains_reward else []), *(["awac"] if params.warm_starts else [])]
    parts += ["answers"] if params.policy in ("best_of_n", "rrhf") else []
    try:
        found = "".join((root / "graphs" / f"{part}.yaml").read_text(encoding="utf-8") for part in parts)
        if params.policy == "iterative":
            found += _rounds((root / "graphs" / "round.yaml").read_text(encoding="utf-8"), params.rounds)
        found += _of_rounds((root / "graphs" / f"{params.policy}.yaml").read_text(encoding="utf-8"), params.rounds)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file", remedy="restore it: git checkout graphs") from None
    if params.warm_starts:
        found = found.replace(POLICY_READS, POLICY_READS.replace("models/sft", "models/sft, models/awac"))
    if params.tunes:  # a table of its own
        found = re.sub(rf"^( +- )plots/{params.policy}\.csv: .*\n", rf"\g<0>\1{TUNED}\n", found, flags=re.MULTILINE)
    if not params.reads_pairs:
        found = re.sub(r"models/reward, |, reward\.max_tokens|^.*plots/reward\.csv.*\n", "", found, flags=re.MULTILINE)
    return found.replace("rlhf/rewards,", ", ".join(["rlhf/rewards", *map(json.dumps, params.reward_files)]) + ",")


def _rounds(text: str, rounds: int) -> str:
    """The stages of all rounds. Each reads what those before it made, and nothing that says how many there will be."""
    parts = []
    for number in range(1, rounds + 1):
        before = f"models/round-{number - 1}, metrics/answers-{number - 1}.json, " if number > 1 else ""
        last = f"models/round-{number - 1}, " if number > 1 else ""
        part = text.replace("<round>", str(number)).replace("<before>, ", before).replace("<last>, ", last)
        parts.append(_of_rounds(part, number - 1))
    return "".join(parts)


def _of_rounds(text: str, rounds: int) -> str:
    """A text in which `<each round's PATH>, ` stands for that path of each round, N being its number."""

    def listed(match: re.Match[str]) -> str:
        return "".join(f"{match[1].replace('N', str(number))}, " for number in range(1, rounds + 1))

    return re.sub(r"<each round's (\S+)>, ", listed, text)
