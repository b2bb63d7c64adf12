"""What a version is, for people: a model card in its folder, with the front matter that the hub reads, and the same on MLflow's page.

The same version of the same data has the same card: no time, path or run id stands in it. Those are tags of the version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from rlhf.config import Params
from rlhf.config.data import SandboxSource
from rlhf.config.training import PretrainedBase

MOST = 5000  # characters of a description, in MLflow's database
# tag → what it is called; what has no tag is left out
SCORES = {
    "gold.{policy}": "gold score",
    "gold.difference": "gold score, difference to sft",
    "win_rate.value": "win rate against sft",
    "win_rate.length_controlled.value": "win rate against sft, answers as long as its own",
    "accuracy.{policy}.value": "accuracy",
    "accuracy.difference": "accuracy, difference to sft",
    "reward_model.accuracy": "accuracy of the reward model on held-out pairs",
    "reward_model.calibration.error": "calibration error of the reward model",
    "kl": "KL divergence from sft",
    "perplexity.ratio": "perplexity on held-out texts, ratio to before",
    "eos_rate.{policy}": "answers that end by themselves",
    "answer_tokens.{policy}": "tokens of an answer",
    "refusals.{policy}": "answers that refuse",
    "repetitions.{policy}": "answers that repeat themselves",
}


def scores(tags: Mapping[str, str]) -> dict[str, float]:
    """Numbers of a version's evaluation, by the names of SCORES; those that it has."""
    named = {name: tags.get(f"evaluate.{name.format(policy=tags['algorithm'])}") for name in SCORES}
    return {name: float(value) for name, value in named.items() if value is not None}


def card(params: Params, tags: Mapping[str, str]) -> str:
    """The whole card, as README.md."""
    found = [EvalResult("text-generation", "held-out", "held-out prompts", SCORES[name], value) for name, value in scores(tags).items()]
    base = params.base if isinstance(params.base, PretrainedBase) else None
    data = ModelCardData(
        base_model=base.model if base and base.revision else None,
        datasets=[hub for source in params.data.sources if (hub := getattr(source, "hub", None))] or None,
        eval_results=found or None,
        library_name="transformers",
        model_name=params.promote.model,
        pipeline_tag="text-generation",
        tags=["conversational", "rlhf", params.algorithm],
    )
    return f"---\n{data.to_yaml()}\n---\n\n{page(params, tags)}"


def page(params: Params, tags: Mapping[str, str]) -> str:
    """The card without its front matter."""
    parts = [f"# {params.promote.model}", _made(params, tags), "## Trained on", _sources(params), "## Scores", _scores(tags)]
    return "\n\n".join([*parts, "## Use", _use(params.promote.model)]) + "\n"


def described(gates: str, before: str | None) -> str:
    """What MLflow's page says: what the gates said, and what it said of the version before."""
    _, found, own = f"\n{before or ''}".partition("\n# ")
    text = f"{gates}\n\n# {own}" if found else gates
    return text if len(text) <= MOST else text[: MOST - 2].rpartition("\n")[0] + "\n…"


def _made(params: Params, tags: Mapping[str, str]) -> str:
    base = params.base
    origin = "a model built from scratch"
    if isinstance(base, PretrainedBase):
        origin = f"{base.model} at {base.revision}" if base.revision else Path(base.model).name
    weights = f"SHA-256 of the weights: `{tags['sha256']}`." if "sha256" in tags else ""
    ways = f"stage {params.policy}, algorithm {params.algorithm}, seed {params.seed}"
    return f"A language model that answers, made from {origin} ({ways}). {weights}".rstrip()


def _sources(params: Params) -> str:
    rows = [("source", "format", "where from", "rows go to")]
    for source in params.data.sources:
        if isinstance(source, SandboxSource):
            form, origin = f"{source.format} {source.kind}", f"made here, {source.rows} rows"
        else:
            form, origin = source.format, f"{source.hub} at {source.revision}" if source.hub else str(source.path)
        shares = source.split.model_dump(by_alias=True)
        split = ", ".join(f"{name} {json.dumps(share)}" for name, share in shares.items() if share)
        rows.append((source.name, form, origin, split))
    return _table(rows)


def _scores(tags: Mapping[str, str]) -> str:
    found = scores(tags)
    rows = [("on held-out rows", ""), *((SCORES[name], f"{value:.4g}") for name, value in found.items())]
    return _table(rows) if found else "There are none."


def _use(model: str) -> str:
    return f"""Ask it in OpenAI's form, served by MLflow:

    mlflow models serve -m models:/{model}@champion --env-manager local --port 5001
    curl http://127.0.0.1:5001/invocations -H 'Content-Type: application/json' -d '{{"messages": [{{"role": "user", "content": "Hello"}}]}}'

From Python, or this folder alone by transformers:

    mlflow.pyfunc.load_model("models:/{model}@champion").predict(["Hello"])

    AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)

`@champion` is the version in service; a number, as in `models:/{model}/3`, is a certain one. In a workspace: `rlhf chat --model 3`."""


def _table(rows: list[tuple[Any, ...]]) -> str:
    lines = [f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])
