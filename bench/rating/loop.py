"""The whole loop with no hand on it: a champion is served and rated, ratings become data, the flow runs, the better version is served.

python -m bench.rating.loop                           300 ratings, of answers to what the first preferences say nothing of
python -m bench.rating.loop --tiny --ratings 60       a model that has learnt nothing, gates that let it through: whether it closes
python -m bench.rating.loop --noise 0.2 ppo.steps=40  raters that err more often, and other values of params.yaml

Raters are simulated: they know the sandbox's gold score, and err with some probability. They send what the script of `/rate` sends.
The first champion's preferences leave out some kinds of tasks. People mostly ask for those, and rate; so most prompts are of those kinds
that policies are trained on and that versions are held against each other on. The sandbox has so few prompts that many of those that are
rated stand in a source as well; those of the comparison at the end stand in none, and were not rated.
"""

from __future__ import annotations

import json
import random
import re
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer

from bench.clone import Clone
from rlhf import config, registry
from rlhf.config.data import SLICES
from rlhf.data.sandbox import gold_score, make_rows
from rlhf.data.sandbox_facts import TASKS
from rlhf.feedback.sample import answers

# kinds of tasks that the first preferences say nothing of: what people ask the first champion
NEW = ("opposite", "sound", "plural")
# gates between a first version and sft that let this one through; each pair for one rater: of so few ratings, more pairs teach more than
# the same ones twice
WEAK = shlex.split("""
promote.min_reward_accuracy=0 promote.min_gold_difference=-1 promote.min_win_rate=0 feedback.ratings=1 feedback.min_agreement=null
data.sources.2.rows=5000 data.sources.3.rows=4000 data.sources.3.split.ppo=0.925 data.sources.3.split.heldout=0.075
evaluate.prompts=1000
""")
TINY = shlex.split("""
data.sources.0.rows=300 data.sources.1.rows=200 data.sources.2.rows=200 data.sources.3.rows=200
base.vocab_size=400 base.hidden_size=64 base.intermediate_size=128 base.heads=4 base.kv_heads=2 base.batch_size=16
sft.epochs=1 reward.epochs=1
ppo.steps=3 ppo.rollout_batch_size=16 ppo.mini_batch_size=8 ppo.max_answer_tokens=12 ppo.mixture_batch_size=4 ppo.critic_warmup_steps=1
evaluate.prompts=20 evaluate.pairs=20 evaluate.texts=8 evaluate.bootstrap_samples=100 evaluate.shown=2
promote.min_gold_difference=-1 promote.min_win_rate=0 promote.min_reward_accuracy=0 promote.max_kl=1000
promote.max_perplexity_ratio=1000 promote.min_eos_rate=0 promote.max_answer_tokens=1000
promote.min_champion_win_rate=0 promote.min_kind_win_rate=0 serving.max_tokens=16 launch.accelerator=cpu
""")
RATED, COMPARED = 100_001, 100_002  # seeds of prompts
HELD, ASKED = "data/prepared/heldout_prompts.jsonl", "prompts.jsonl"
TEMPERATURE = 1.5  # of the answers that are rated: at 1 a trained policy's two answers are mostly alike
SECONDS = 7200  # they only bound a failure
Gold = dict[str, Any]


def main(
    values: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values of params.yaml.")] = None,
    ratings: Annotated[int, typer.Option(help="Ratings of complete pairs that set off the retraining.")] = 300,
    noise: Annotated[float, typer.Option(help="How often a rater errs.")] = 0.1,
    prompts: Annotated[int, typer.Option(help="New prompts that the versions are compared on.")] = 400,
    tiny: Annotated[bool, typer.Option(help="A model that takes seconds, and gates that let it through.")] = False,
) -> None:
    """Run the loop once."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        clone = Clone(Path(folder))
        own = [f"feedback.ingest_ratings={ratings}", "serving.refresh_seconds=1.0"]
        clone.run("rlhf", "use", "sandbox", *sources(), *(TINY if tiny else WEAK), *own, *(values or []))
        with timed("the first champion is trained"):
            clone.run("rlhf", "run")
        with serving(clone) as client:
            assert until(lambda: champion(client)) == "assistant/1"
            with timed("the champion answers prompts"):
                golds = sample(clone, ratings)
            with timed(f"{ratings} ratings"):
                rate(client, golds, ratings, noise, tiny=tiny)
            with timed("ratings become data"):
                until(lambda: (clone.root / "data/raw/ratings").exists() and waiting(client) == 0)
            with timed("the flow trains, registers and decides"):
                found = until(lambda: decided(clone.root))
            print(f"version {found.number}: gates {found.tags['gates']}")
            if "champion" in found.aliases:
                with timed("the server answers with it"):
                    until(lambda: champion(client) == f"assistant/{found.number}")
                print("the server's answer is of", ask(client))
        print(compare(clone.root, found.number, prompts))


def sources() -> list[str]:
    """Values by which the reward model learns from pairs of all kinds but NEW, held-out pairs are of all, and prompts mostly of NEW."""
    known = [kind for kind in TASKS if kind not in NEW]
    first = [f"data.sources.2.kinds={json.dumps(known)}", "data.sources.2.split.reward=1", "data.sources.2.split.heldout=0"]
    heldout = source("pairs-of-all", "pairs", None, 500, heldout=1)
    asked = source("asked", "prompts", NEW, 2400, ppo=0.7, heldout=0.3)
    return [*first, f"data.sources.4={heldout}", f"data.sources.5={asked}"]


def source(name: str, kind: str, kinds: Sequence[str] | None, rows: int, **split: float) -> str:
    """One of the sandbox's own."""
    found: dict[str, Any] = {"name": name, "format": "sandbox", "kind": kind, "kinds": kinds, "rows": rows, "label_noise": 0.05}
    return json.dumps(found | {"split": dict.fromkeys(SLICES, 0) | split, "weight": 1})


@contextmanager
def timed(what: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    print(f"{time.monotonic() - begun:7.1f} s  {what}", flush=True)


def until(found: Callable[[], Any]) -> Any:
    """Wait until something is there; what it is."""
    deadline = time.monotonic() + SECONDS
    while not (value := found()):
        assert time.monotonic() < deadline, "nothing came of it"
        time.sleep(0.5)
    return value


@contextmanager
def serving(clone: Clone) -> Iterator[httpx.Client]:
    """`rlhf serve`, all of it; a client of the assistant's server."""
    log = clone.root.parent / "serve.txt"
    with timed("`rlhf serve` starts"):
        process = subprocess.Popen(
            ["rlhf", "serve", "--port", "0"], cwd=clone.root, env=clone.environment, stdout=log.open("w"), stderr=subprocess.STDOUT
        )
        said = until(lambda: re.search(r"assistant (http://\S+)/v1", log.read_text()) or process.poll())
        assert isinstance(said, re.Match), log.read_text()
    try:
        with httpx.Client(base_url=said[1], timeout=120) as client:
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def champion(client: httpx.Client) -> str | None:
    """The version that the server answers with; None while there is none."""
    try:
        return client.get("/health").json().get("versions", {}).get("champion")
    except (httpx.TransportError, ValueError):
        return None


def ask(client: httpx.Client) -> str:
    body = {"model": "assistant", "messages": [{"role": "user", "content": "What is the opposite of hot?"}]}
    return client.post("/v1/chat/completions", json=body).headers["x-model-version"]


def waiting(client: httpx.Client) -> int:
    return client.post("/figures/numbers").json()["waiting"]


def new_prompts(count: int, seed: int, kinds: Sequence[str] = tuple(TASKS)) -> list[dict[str, Any]]:
    """Prompts of these kinds."""
    rows = make_rows("prompts", count * len(TASKS) // len(kinds), seed, 0.0)
    return [{"prompt": row["prompt"], "gold": row["gold"]} for row in rows if row["gold"]["kind"] in kinds]


def sample(clone: Clone, ratings: int) -> dict[str, Gold]:
    """Have the champion answer prompts twice each; what the gold score needs, by prompt."""
    held = {json.loads(line)["prompt"][-1]["content"] for line in (clone.root / HELD).read_text(encoding="utf-8").splitlines()}
    rows = new_prompts(6 * ratings, RATED, NEW)  # many more than are needed: answers may be alike
    rows = [row for row in rows if row["prompt"][-1]["content"] not in held]  # they would be dropped as they come in
    file = clone.root.parent / ASKED
    file.write_text("".join(json.dumps({"prompt": row["prompt"]}, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    clone.run("rlhf", "feedback", "sample", str(file), "--temperature", str(TEMPERATURE))
    return {json.dumps(row["prompt"]): row["gold"] for row in rows}


def rate(client: httpx.Client, golds: dict[str, Gold], count: int, noise: float, *, tiny: bool) -> None:
    """Have two raters rate in turn, as the page's script does, until so many ratings of complete pairs are there.

    Args:
        tiny: the answers are hardly words, and of the same score: the shorter one is taken for the better one.
    """
    draw, ties = random.Random(1), 0
    shown = {rater: client.post("/rate/next", json={"rater": rater}).json()["pair"] for rater in ("Ada", "Bob")}
    given = 0
    while any(shown.values()):
        for rater, pair in shown.items():
            if pair:
                gold = golds[json.dumps(pair["prompt"])]
                scores = [gold_score(gold, pair[side]) - 1e-4 * tiny * len(pair[side]) for side in "ab"]
                choice = "tie" if scores[0] == scores[1] else "ab"[(scores[1] > scores[0]) != (draw.random() < noise)]
                ties += choice == "tie"
                body = {"rater": rater, "token": pair["token"], "pair": pair["id"], "choice": choice, "seconds": 1.0}
                reply = client.post("/rate/vote", json=body)
                reply.raise_for_status()
                shown[rater] = reply.json()["pair"]
                given += 1
        if given >= count and not 0 < waiting(client) < count:
            print(f"{given} ratings, {ties} of them ties")
            return
    raise AssertionError("there are too few pairs: most answers are alike")


def decided(root: Path) -> registry.Version | None:
    """The second version, once its gates were looked at and its alias stands."""
    found = [one for one in registry.versions(root, config.load(root / "params.yaml")) if one.number > 1 and "gates" in one.tags]
    return found[0] if found and found[0].aliases else None


def compare(root: Path, number: int, count: int) -> str:
    """How often the new version's answer to a new prompt has the higher gold score, of all kinds and of NEW; a tie is half a win."""
    params = config.load(root / "params.yaml")
    files = [*sorted((root / "data/prepared").glob("*.jsonl")), root.parent / ASKED]
    known = "".join(path.read_text(encoding="utf-8") for path in files)
    drawn = {json.dumps(row["prompt"]): row for row in new_prompts(20 * count, COMPARED)}  # most are known
    rows = [row for row in drawn.values() if json.dumps(row["prompt"][-1]["content"], ensure_ascii=False) not in known][:count]
    scores = []
    for version in (number, 1):
        folder = registry.model_folder(registry.find(root, params, version).uri, root, params)
        written = answers(folder, f"assistant/{version}", [row["prompt"] for row in rows], params, 1.0, 1)
        scores.append([gold_score(row["gold"], said[0].text) for row, said in zip(rows, written, strict=True)])
    new, old = map(np.array, scores)
    rated = np.array([row["gold"]["kind"] in NEW for row in rows])
    lines = [f"new prompts, version {number} against version 1:"]
    for name, own in (("all kinds", rated | ~rated), ("the kinds that were rated", rated)):
        wins = ((new > old) + 0.5 * (new == old))[own]
        drawn = np.random.default_rng(1).choice(wins, (2000, len(wins))).mean(axis=1)
        low, high = np.percentile(drawn, [2.5, 97.5])
        said = f"{name}, {len(wins)} prompts: wins {wins.mean():.3f} ({low:.3f} to {high:.3f})"
        lines.append(f"{said}, mean gold score {new[own].mean():.3f}, before {old[own].mean():.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
