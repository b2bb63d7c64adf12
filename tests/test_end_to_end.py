"""The whole pipeline on the embedded data, made tiny, in clones of their own: flow, registry, rerun, `dvc repro` by itself."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.config import STAGES_OF

REPOSITORY = Path(__file__).resolve().parents[1]
STAGES = STAGES_OF["ppo"]
MODELS = ("base", "sft", "reward", "ppo")

# rows of the sources, sizes and steps that take seconds, and gates that let such a model through
TINY = shlex.split("""
data.sources.0.rows=300 data.sources.1.rows=200 data.sources.2.rows=200 data.sources.3.rows=200
base.vocab_size=400 base.hidden_size=64 base.intermediate_size=128 base.heads=4 base.kv_heads=2 base.batch_size=16
sft.epochs=1 reward.epochs=1
ppo.steps=3 ppo.rollout_batch_size=16 ppo.mini_batch_size=8 ppo.max_answer_tokens=12 ppo.mixture_batch_size=4 ppo.critic_warmup_steps=1
evaluate.prompts=20 evaluate.pairs=20 evaluate.texts=8 evaluate.bootstrap_samples=100 evaluate.shown=2
promote.min_gold_difference=-1 promote.min_win_rate=0 promote.min_reward_accuracy=0 promote.max_kl=1000
promote.max_perplexity_ratio=1000 promote.min_eos_rate=0 promote.max_answer_tokens=1000
launch.accelerator=cpu
""")

# what a user's program sees of the registry and of the tracked runs
ASK_MLFLOW = """
import json, mlflow
client = mlflow.MlflowClient()
found = mlflow.search_runs(search_all_experiments=True, output_format="list")
runs = [run for run in found if "stage" in run.data.tags]
base = next(run for run in runs if run.info.run_name == "base")
print(json.dumps({
    "versions": [version.tags for version in client.search_model_versions()],
    "scores": [{one.key: one.value for one in client.get_logged_model(version.source.rpartition("/")[2]).metrics}
               for version in client.search_model_versions()],
    "champion": client.get_model_version_by_alias("assistant", "champion").tags,
    "runs": {run.info.run_id: run.info.run_name for run in runs},
    "flows": {run.info.run_id: run.data.tags for run in found if "flow" in run.data.tags},
    "above": sorted({run.data.tags["mlflow.parentRunId"] for run in runs}),
    "data": {run.info.run_name: {entry.dataset.name: entry.dataset.digest for entry in run.inputs.dataset_inputs} for run in runs},
    "base_steps": [metric.step for metric in client.get_metric_history(base.info.run_id, "curves/loss")],
    "answers": mlflow.pyfunc.load_model("models:/assistant@champion").predict(QUESTIONS),
}))
"""
QUESTIONS = ["What is the opposite of hot?", [{"role": "user", "content": "What is the capital of France?"}]]

# the answers that the folder itself gives, with nothing of the project in between
ASK_FOLDER = """
import json, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained("models/ppo")
model = transformers.AutoModelForCausalLM.from_pretrained("models/ppo")
answers = []
for question in QUESTIONS:
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    length = prompt["input_ids"].shape[1]
    room = model.config.max_position_embeddings - length
    made = model.generate(**prompt, do_sample=False, max_new_tokens=min(256, room))[0, length:]
    answers.append(tokenizer.decode(made, skip_special_tokens=True).strip())
print(json.dumps(answers))
"""


def git(*words: str) -> list[str]:
    return ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", *words]


class Clone:
    """A workspace of its own, and the commands that are run in it with its own code."""

    def __init__(self, root: Path) -> None:
        self.root = root / "clone"
        self.root.mkdir()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "DVC_", "RLHF_"))}
        self.environment = kept | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.root),
            "PREFECT_HOME": str(root / "prefect"),
            "DVC_SITE_CACHE_DIR": str(root / "site"),
            "DO_NOT_TRACK": "true",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }

    def copy_working_tree(self) -> None:
        """Take the project as it stands, changes that are not committed included, but nothing that the user's own runs left."""
        listed = subprocess.run(
            git("ls-files", "-z", "--cached", "--others", "--exclude-standard"), cwd=REPOSITORY, capture_output=True, check=True
        )
        for name in listed.stdout.decode().split("\0")[:-1]:
            runs_left = name.startswith(("dvc.lock", "metrics/", "plots/", "data/raw/")) and name != "data/raw/README.md"
            if (REPOSITORY / name).is_file() and not runs_left:
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(REPOSITORY / name, self.root / name)
        for words in (("init", "--quiet"), ("add", "--all"), ("commit", "--quiet", "--message", "as it stands")):
            subprocess.run(git(*words), cwd=self.root, check=True)

    def call(self, *words: str, **environment: str) -> str:
        """Run a command to its end; what it printed."""
        done = subprocess.run(
            words, cwd=self.root, env=self.environment | environment, capture_output=True, encoding="utf-8", errors="replace", check=False
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def ask(self, program: str) -> Any:
        """Run a program that prints JSON on its last line."""
        database = f"sqlite:///{self.root}/mlruns/mlflow.db"
        said = self.call(sys.executable, "-c", f"QUESTIONS = {QUESTIONS!r}\n{program}", MLFLOW_TRACKING_URI=database)
        return json.loads(said.splitlines()[-1])

    def weights(self) -> dict[str, str]:
        files = {name: self.root / "models" / name / "model.safetensors" for name in MODELS}
        return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}

    def locked(self) -> dict[str, Any]:
        """The hashes of dvc.lock; its stages stand in the order in which they ended, which is chance where two run side by side."""
        return yaml.safe_load((self.root / "dvc.lock").read_text(encoding="utf-8"))

    def published(self) -> dict[str, int]:
        """When each stage last put outputs into their places: a moment per run of its own."""
        return {stage: max(path.stat().st_mtime_ns for path in self.root.glob(f"runs/{stage}/*/PUBLISHED")) for stage in STAGES}

    def read(self, path: str) -> Any:
        return json.loads((self.root / path).read_text(encoding="utf-8"))

    def plot(self, path: str) -> list[dict[str, str]]:
        with (self.root / path).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def clones(tmp_path_factory: pytest.TempPathFactory) -> tuple[Clone, Clone]:
    """Two clones of one commit with the same params, made side by side: in one the flow has run, in the other `dvc repro`."""
    flow, dvc = Clone(tmp_path_factory.mktemp("flow")), Clone(tmp_path_factory.mktemp("dvc"))
    flow.copy_working_tree()
    subprocess.run(git("clone", "--quiet", str(flow.root), str(dvc.root)), check=True)
    for clone in (flow, dvc):
        clone.call("rlhf", "use", "sandbox", *TINY)
    with ThreadPoolExecutor() as side_by_side:
        runs = [side_by_side.submit(flow.call, "rlhf", "run"), side_by_side.submit(dvc.call, "dvc", "repro")]
    said = runs[0].result().splitlines()
    assert "version 1 is champion, the one before is none" in said
    assert "to commit: `git add params.yaml dvc.lock metrics plots`" in said
    assert re.findall(r"Running stage '(\w+)'", runs[1].result()) == list(STAGES)
    return flow, dvc


@pytest.fixture(scope="module")
def flow_clone(clones: tuple[Clone, Clone]) -> Clone:
    """The clone in which the flow has run once."""
    return clones[0]


@pytest.fixture(scope="module")
def dvc_clone(clones: tuple[Clone, Clone]) -> Clone:
    """The clone in which `dvc repro` has run without the flow."""
    return clones[1]


def test_the_flow_makes_everything_that_the_graph_names(flow_clone: Clone) -> None:
    stages = yaml.safe_load((flow_clone.root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    written = [path for stage in stages.values() for key in ("outs", "metrics", "plots") for path in stage.get(key, [])]
    paths = [path if isinstance(path, str) else next(iter(path)) for path in written]
    assert [path for path in paths if not (flow_clone.root / path).exists()] == []
    losses = [float(row["loss"]) for row in flow_clone.plot("plots/base.csv")]
    assert losses[-1] < 0.9 * losses[0]
    steps = flow_clone.plot("plots/ppo.csv")
    assert [row["step"] for row in steps] == ["1", "2", "3"]
    # the ratio of the first update starts at 1: sampling and training agree on every log-probability
    assert all(float(row["ratio_error"]) < 1e-4 for row in steps)


def test_the_evaluation_holds_what_gates_and_people_read(flow_clone: Clone) -> None:
    found = flow_clone.read("metrics/evaluate.json")
    gold, wins = found["gold"], found["win_rate"]
    assert gold["difference"] == pytest.approx(gold["ppo"] - gold["sft"])
    assert list(flow_clone.read("metrics/summary.json").values())[:3] == [gold["ppo"], gold["difference"], gold["ci95"][0]]
    assert gold["ci95"][0] <= gold["difference"] <= gold["ci95"][1]
    assert wins["ci95"][0] <= wins["value"] <= wins["ci95"][1]
    assert wins["judge"] == "gold score"
    assert (found["prompts"], found["reward_model"]["n"]) == (20, 20)
    numbers = [found["kl"], *found["perplexity"].values(), *found["eos_rate"].values(), *found["answer_tokens"].values()]
    assert all(map(math.isfinite, numbers))
    assert found["perplexity"]["ratio"] == pytest.approx(found["perplexity"]["ppo"] / found["perplexity"]["sft"])


def test_scratch_is_cleaned_and_nothing_lies_about(flow_clone: Clone) -> None:
    for stage in STAGES:
        (folder,) = (flow_clone.root / "runs" / stage).iterdir()
        assert not {"out", "checkpoints"} & {path.name for path in folder.iterdir()}
        if stage in MODELS:
            assert flow_clone.read(f"models/{stage}/lineage.json")["fingerprint"] == folder.name
    changed = flow_clone.call("git", "status", "--porcelain").splitlines()
    assert {line[3:].partition("/")[0] for line in changed} == {"params.yaml", "dvc.lock", "metrics", "plots"}


def test_a_second_run_trains_nothing_and_registers_nothing(flow_clone: Clone) -> None:
    before, lock, weights = flow_clone.published(), flow_clone.locked(), flow_clone.weights()
    assert "version 1 is champion already" in flow_clone.call("rlhf", "run").splitlines()
    assert (flow_clone.published(), flow_clone.locked(), flow_clone.weights()) == (before, lock, weights)

    seen = flow_clone.ask(ASK_MLFLOW)
    assert Counter(seen["runs"].values()) == dict.fromkeys(STAGES, 1)
    assert seen["base_steps"] == [int(row["step"]) for row in flow_clone.plot("plots/base.csv")]
    (tags,) = seen["versions"]
    assert seen["champion"] == tags
    # MLflow's page of models sorts by these
    (scores,) = seen["scores"]
    assert scores["win_rate.value"] == flow_clone.read("metrics/evaluate.json")["win_rate"]["value"]
    assert {"gold.difference", "gold.policy", "reward_model.accuracy", "kl"} <= scores.keys()
    assert tags["sha256"] == weights["ppo"]
    assert json.loads(tags["md5"])["models/ppo"] in json.dumps(lock["stages"]["ppo"]["outs"])
    assert {seen["runs"][tags[f"run.{stage}"]] for stage in STAGES} == set(STAGES)
    assert flow_clone.call("git", "rev-parse", "HEAD").strip() in tags.values()
    # the stages are below the flow that trained them, which the version points at; the one that trained nothing names their runs
    trained, idle = sorted(seen["flows"], key=lambda run: seen["flows"][run]["decision"], reverse=True)
    assert seen["above"] == [trained]
    assert tags["report"] == f"runs:/{trained}/report.html"
    assert seen["flows"][idle]["decision"] == "champion already"
    assert {seen["flows"][idle][f"run.{stage}"] for stage in STAGES} == set(seen["runs"])
    # their data has the hashes that DVC knows
    read = {entry["path"]: entry["md5"] for stage in lock["stages"].values() for entry in stage["deps"]}
    for stage in STAGES[1:]:
        assert seen["data"][stage]
        assert seen["data"][stage].items() <= read.items()
    # what is served are the weights of ppo
    assert seen["answers"] == flow_clone.ask(ASK_FOLDER)
    assert len(seen["answers"]) == len(QUESTIONS)


def test_dvc_alone_in_another_clone_gives_the_same_bytes(flow_clone: Clone, dvc_clone: Clone) -> None:
    assert dvc_clone.weights() == flow_clone.weights()
    assert dvc_clone.locked() == flow_clone.locked()


def test_sigterm_to_a_stage_leaves_a_checkpoint_of_the_step_under_way(dvc_clone: Clone) -> None:
    dvc_clone.call("rlhf", "use", "sandbox", *TINY, "sft.epochs=500", "sft.checkpoint_every=1000000")
    stage = subprocess.Popen(
        ["rlhf", "launch", "sft"],
        cwd=dvc_clone.root,
        env=dvc_clone.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert stage.stdout
    said = [next(line for line in stage.stdout if line.startswith("sft 1/"))]
    stage.terminate()
    said += stage.communicate()[0].splitlines()
    assert stage.returncode == 128 + signal.SIGTERM
    (step,) = [match[1] for line in said if (match := re.fullmatch(r"sft: stopped after step (\d+)", line))]
    assert len(list(dvc_clone.root.glob(f"runs/sft/*/checkpoints/step-{step}/COMPLETE-0"))) == 1
    dvc_clone.call("rlhf", "use", "sandbox", *TINY)


def test_a_changed_value_reruns_its_stage_and_what_follows(flow_clone: Clone, dvc_clone: Clone) -> None:
    before, weights, lock = dvc_clone.published(), dvc_clone.weights(), dvc_clone.locked()
    dvc_clone.call("rlhf", "use", "sandbox", *TINY, "ppo.actor.learning_rate=0.002")
    assert re.findall(r"Running stage '(\w+)'", dvc_clone.call("dvc", "repro")) == ["ppo", "evaluate"]
    after, other = dvc_clone.published(), dvc_clone.weights()
    assert {stage for stage in STAGES if after[stage] != before[stage]} == {"ppo", "evaluate"}
    assert {name for name in MODELS if other[name] != weights[name]} == {"ppo"}

    # set back again, the old outputs come out of the cache
    dvc_clone.call("rlhf", "use", "sandbox", *TINY)
    assert "Running stage" not in dvc_clone.call("dvc", "repro")
    assert (dvc_clone.published(), dvc_clone.weights(), dvc_clone.locked()) == (after, weights, lock)
