"""The check of the whole plan: on a tiny model and files of pairs, with one thing wrong or many."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf import config, plan
from rlhf.cli import plan as cli_plan
from rlhf.errors import UserError
from rlhf.job import write_lines
from rlhf.plan import launching, memory, pinned
from rlhf.plan.findings import Findings
from rlhf.workspace import fingerprint
from tests.stage_runs import tiny_params

PROJECT = Path(__file__).parents[2]
STAGES = config.STAGES_OF["ppo"]
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
SYSTEM = {"role": "system", "content": "Be brief."}
ENVIRONMENT = os.environ | {"PYTHONPATH": str(PROJECT)}
SECONDS = 20  # of processor time; on a machine of its own it takes 3


def pair(number: int, *before: dict[str, str]) -> dict[str, Any]:
    prompt = [*before, {"role": "user", "content": f"What is {number}?"}]
    return {"prompt": prompt, "chosen": f"It is {number}.", "rejected": "I do not know."}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with 300 pairs and a given model, in which nothing has run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write(tmp_path / "data/raw/pairs.jsonl", [pair(number) for number in range(300)])
    llama.save_pretrained(tmp_path / "given")
    tokenizer.save_pretrained(tmp_path / "given")
    shutil.copy(PROJECT / "dvc.yaml", tmp_path)
    shutil.copytree(PROJECT / "graphs", tmp_path / "graphs")
    raw = tiny_params()
    raw["base"] = {"source": "pretrained", "model": "given", "revision": None, "trust_remote_code": False, "chat_template": "keep"}
    for limits in (raw["sft"], raw["reward"], raw["evaluate"]["judge"]):
        limits["max_tokens"] = 96
    raw["ppo"] |= {"max_prompt_tokens": 64}
    raw["launch"]["accelerator"] = "cpu"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    return tmp_path


def change(root: Path, **values: Any) -> config.Params:
    """Params with other values, by keys with __ for each dot."""
    raw = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    for key, value in values.items():
        *path, last = key.split("__")
        holder = raw
        for part in path:
            holder = holder[int(part)] if part.isdecimal() else holder[part]
        holder[last] = value
    (root / "params.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    return config.load(root / "params.yaml")


def said(findings: Findings) -> list[str]:
    return [problem.what for problem in findings.problems]


def test_where_nothing_is_wrong_it_tells_what_is_there(root: Path) -> None:
    found = plan.check(root, change(root), STAGES)
    assert (said(found), found.notes) == ([], [])
    seen = dict(found.seen)
    assert seen["source mine"] == "300 rows"
    assert seen["model"].startswith("given: ")
    assert seen["model"].endswith(" weights in 2 layers, takes 128 tokens")
    assert seen["longer than sft.max_tokens"].startswith("0 of 200 rows looked at (0.0%); the longest has ")
    assert [row[0] for row in found.memory] == ["base", "sft", "reward", "ppo", "evaluate"]


def test_all_that_is_wrong_is_told_at_once_with_remedies(root: Path) -> None:
    rows = [pair(number, *([SYSTEM] if number in (7, 250) else [])) for number in range(300)]
    write(root / "data/raw/pairs.jsonl", rows)
    template = (root / "given/chat_template.jinja").read_text(encoding="utf-8")
    (root / "given/chat_template.jinja").write_text(NO_SYSTEM + template, encoding="utf-8")
    params = change(root, sft__max_tokens=500, launch__hostfile="hosts", reward__batch_size=7, launch__jobs__reward__processes=2)
    raw = params.model_dump(mode="json")
    second = raw["data"]["sources"][0] | {"name": "second", "path": "data/raw/gone.jsonl"}
    params = change(root, data__sources=[*raw["data"]["sources"], second])

    found = plan.check(root, params, STAGES)
    wrong = {
        "data.sources.1.path: no such file": "dvc pull",
        "data/raw/pairs.jsonl:8 (source 'mine')": "base.chat_template: turns",
        "sft.max_tokens: 500 tokens are more than the 128 that base.model 'given' takes": "lower it to 128",
        "launch.hostfile": "write it",
        "reward.batch_size: a batch of 7 rows cannot be dealt evenly to 2": "multiple of 2",
    }
    assert len(found.problems) == len(wrong), said(found)
    for start, remedy in wrong.items():
        (one,) = [problem for problem in found.problems if start in problem.what]
        assert remedy in one.remedy
    (refused,) = [what for what in said(found) if "pairs.jsonl:8" in what]
    assert "System role not supported" in refused
    with pytest.raises(UserError, match=r"^5 things are wrong: 1\. .*; 5\. "):
        found.refuse()


def test_the_command_tells_all_and_its_exit_code_says_whether_something_is_wrong(root: Path) -> None:
    change(root, sft__max_tokens=500, launch__hostfile="hosts")
    words = [sys.executable, "-m", "rlhf.cli", "check"]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 1, done.stderr
    assert "error: sft.max_tokens: 500 tokens are more than" in done.stderr
    assert "error: params.yaml: launch.hostfile" in done.stderr
    assert done.stderr.count("  remedy: ") == 2
    assert "300 rows" in done.stdout
    assert not (root / "models").exists()
    change(root, sft__max_tokens=96, launch__hostfile=None)
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("nothing is wrong: `rlhf run` trains\n")


def test_a_small_model_that_is_built_needs_no_torch(root: Path) -> None:
    change(root, base=tiny_params()["base"])
    call = "import sys; from pathlib import Path; from rlhf.cli.plan import check; found = check(Path.cwd())"
    code = f"{call}; print('torch' in sys.modules, found.problems)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert done.stdout == "False []\n"


def test_a_bound_that_nothing_is_measured_for_is_told(root: Path) -> None:
    for coefficient, count in ((0.04, 0), (0.0, 1)):
        params = change(root, algorithm="grpo", grpo__kl__coefficient=coefficient)
        assert sum("grpo.stop.kl holds nothing back" in note for note in plan.check(root, params, ["grpo"]).notes) == count


def test_a_warm_start_without_answers_is_told_before_anything_trains(root: Path) -> None:
    params = change(root, awac__versions=1)
    assert f"{root}/data/raw/earlier: no answers of earlier versions" in said(plan.check(root, params, ["awac"]))
    write_lines(root / "data/raw/earlier/v1.jsonl", [{"prompt": [{"role": "user", "content": "Hot?"}], "answer": "Cold."}])
    assert any("of 1 answers no two are to one prompt" in what for what in said(plan.check(root, params, ["awac"])))


def test_a_graph_that_dvc_refuses_is_told(root: Path) -> None:
    subprocess.run(["git", "init", "--quiet"], check=True)
    subprocess.run([Path(sys.executable).with_name("dvc"), "init", "--quiet"], check=True)
    change(root)
    written = (root / "dvc.yaml").read_text(encoding="utf-8")
    (root / "dvc.yaml").write_text(written.replace("meta: {", "&eta: {", 1), encoding="utf-8")
    (problem,) = cli_plan.check(root).problems
    assert "dvc.yaml' validation failed: extra keys not allowed @ data['stages']['prepare']" in problem.what


def test_what_stage_prepare_would_refuse_is_told(root: Path) -> None:
    write(
        root / "data/raw/pairs.jsonl",
        [pair(number) if number % 5 else {"prompt": "x", "chosen": 1, "rejected": "y"} for number in range(300)],
    )
    (what,) = said(plan.check(root, change(root), STAGES))
    assert what.startswith("source 'mine' has 60 bad rows of 300 (20.0%): malformed (60); the first: data/raw/pairs.jsonl:1, ")


def test_rows_that_are_too_long_are_counted(root: Path) -> None:
    long = {"prompt": "word " * 60, "chosen": "a", "rejected": "b"}
    write(root / "data/raw/pairs.jsonl", [{**long, "chosen": f"a{number}"} if number < 60 else pair(number) for number in range(200)])
    found = plan.check(root, change(root), STAGES)
    assert said(found) == []
    assert "ppo.max_prompt_tokens: 30% of the rows looked at have more tokens, and would be left out" in found.notes
    (what,) = [what for what in said(plan.check(root, change(root, sft__max_tokens=3), STAGES)) if "sft" in what]
    assert what == "sft.max_tokens: none of 200 rows looked at fits in 3 tokens"


def test_stages_that_are_up_to_date_are_not_looked_at_again(root: Path) -> None:
    """What they have made is taken instead of what they were made from."""
    from rlhf.models.given import pin

    params = change(root, base__model="./given")  # a name alone could be one of the hub
    assert params.base.source == "pretrained"
    model_folder = root / "models/base"
    pin(params.base, model_folder)
    shutil.rmtree(root / "given")
    shutil.rmtree(root / "data/raw")
    write(root / "data/prepared/sft.jsonl", [{"messages": [*pair(1)["prompt"], {"role": "assistant", "content": "It is 1."}]}])
    found = plan.check(root, params, ("sft", "ppo"))
    assert said(found) == []
    assert dict(found.seen)["longer than sft.max_tokens"].startswith("0 of 1 rows")
    assert any("data.sources.0.path" in what for what in said(plan.check(root, params, ("prepare", "sft"))))
    found = plan.check(root, params, ("base",))  # which DVC may have in its cache
    assert said(found) == []
    assert "base.model ./given: no such folder: models/base stands for it" in found.notes[0]
    shutil.rmtree(model_folder)
    assert said(plan.check(root, params, ("base",))) == ["params.yaml: base.model ./given: no such folder"]


def test_a_given_folder_that_changed_since_it_was_pinned_is_told(root: Path) -> None:
    from safetensors.torch import load_file, save_file

    from rlhf.models.given import pin

    params = change(root)
    assert params.base.source == "pretrained"
    pin(params.base, root / pinned.PINNED)
    lineage = {"params": params.of_stage("base"), "inputs": fingerprint.hash_inputs(root, ["given"])}
    (root / pinned.PINNED / fingerprint.LINEAGE).write_text(json.dumps(lineage))
    (root / "given/README.md").write_text("a note")
    pinned.check(root, params)
    path = root / "given/model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.self_attn.q_proj.weight"] *= 2
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"base.model 'given': model.safetensors changed since stage base pinned it") as error:
        pinned.check(root, params)
    assert "dvc repro --force --single-item base" in error.value.remedy
    pinned.check(root, change(root, base__chat_template="turns"))  # with which the stage runs anew
    params = change(root, base__chat_template="keep")
    shutil.copy(root / pinned.PINNED / "model.safetensors", path)
    (root / "given/chat_template.jinja").write_text("another")
    with pytest.raises(UserError, match=r"base.model 'given': chat_template.jinja changed"):
        pinned.check(root, params)
    shutil.rmtree(root / "given")
    pinned.check(root, params)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("node1 slots=2\n# node2\n", None),
        ("node1\n", "line 1: 'node1' is not of the form NAME slots=NUMBER"),
        ("node1 slots=2\nnode1 slots=2\n", "line 2: node1 stands there twice"),
        ("\n# nobody\n", "names no node"),
        ("node1 slots=1\n", "node1 has fewer slots than the 2 processes"),
    ],
)
def test_a_hostfile_is_read(tmp_path: Path, text: str, wrong: str | None) -> None:
    (tmp_path / "hosts").write_text(text)
    if wrong is None:
        assert launching.hosts(tmp_path / "hosts", 2) == {"node1": 2}
        return
    with pytest.raises(UserError) as refused:
        launching.hosts(tmp_path / "hosts", 2)
    assert wrong in refused.value.what


def test_a_port_that_cannot_be_used_or_shared_is_told(root: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        what = said(plan.check(root, change(root, launch__port=port), ("base", "sft")))
        assert [one.partition(":")[2] for one in what] == [f" launch.port {port} cannot be used: Address already in use"]
    (what_shared,) = said(plan.check(root, change(root, launch__port=port), STAGES))
    assert what_shared.startswith(f"launch.port is {port}, but sft and reward run side by side")


def test_a_model_that_no_memory_holds_and_no_disk_is_told(root: Path) -> None:
    large = tiny_params()["base"] | {"hidden_size": 65536, "intermediate_size": 262144, "heads": 64, "kv_heads": 64, "layers": 200}
    held, written = said(plan.check(root, change(root, base=large), STAGES))
    assert held.startswith("weights, gradients and optimiser alone take more memory than there is: base ")
    assert "the disk of" in written
    (note,) = plan.check(root, change(root, base=tiny_params()["base"], launch__jobs__sft__micro_batch_tokens=10**9), ("sft",)).notes
    assert note.startswith("by the estimate there may be too little memory: sft ")


def test_a_gpu_that_is_not_there_is_told_once(root: Path) -> None:
    params = change(root, launch__accelerator="cuda", launch__precision="fp16")
    if not torch.cuda.is_available():
        assert said(plan.check(root, params, STAGES)) == ["params.yaml: launch.accelerator is cuda, but torch sees no GPU"]


def test_the_account_of_memory_adds_up() -> None:
    params = config.validate(yaml.safe_load((PROJECT / "presets/llama-3.2-1b.yaml").read_text(encoding="utf-8")) | {}, "preset")
    shape = memory.Shape(10**9, width=2048, feed_forward=8192, layers=16, vocabulary=128256, key_values=1024, linear=10**6)
    launch = params.launch.model_copy(update={"precision": "bf16"})
    full = params.sft.model_copy(update={"lora": None})
    need = memory.need("sft", params.model_copy(update={"launch": launch, "sft": full}), shape)
    assert (need.weights, need.gradients, need.optimiser) == (2e9, 2e9, 12e9)
    jobs = launch.jobs.model_copy(update={"sft": launch.jobs.sft.model_copy(update={"processes": 4})})
    policy = launch.engines.policy.model_copy(update={"zero_stage": 3, "offload_optimizer": True})
    engines = launch.engines.model_copy(update={"policy": policy})
    shared = params.model_copy(update={"launch": launch.model_copy(update={"jobs": jobs, "engines": engines}), "sft": full})
    need = memory.need("sft", shared, shape)
    assert (need.weights, need.gradients, need.optimiser, need.offloaded) == (5e8, 5e8, 0, 3e9)


def test_a_server_that_is_away_is_a_note(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Findings()
    plan.check_champion(root, change(root), found)
    assert (found.seen, found.notes) == ([], [])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    plan.check_champion(root, change(root), found)
    assert not found.problems
    assert "training goes on without it" in found.notes[0]


def large_model(folder: Path) -> None:
    """A model of the shape of Llama 2 7B: config and heads, the weights being holes in their files."""
    from transformers import LlamaConfig

    sizes: dict[str, Any] = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    }
    sizes |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "architectures": ["LlamaForCausalLM"]}
    settings = LlamaConfig(**sizes, max_position_embeddings=4096, tie_word_embeddings=False)
    settings.save_pretrained(folder)
    with torch.device("meta"):
        names = [(name, list(weight.shape)) for name, weight in LlamaForCausalLM(settings).named_parameters()]
    index = {}
    for part in range(2):
        file, at = f"model-0000{part + 1}-of-00002.safetensors", 0
        heads: dict[str, Any] = {}
        for name, shape in names[part::2]:
            end = at + 2 * torch.Size(shape).numel()
            heads[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
            at, index[name] = end, file
        head = json.dumps(heads).encode()
        head += b" " * (-len(head) % 8)
        with (folder / file).open("wb") as weights:
            weights.write(len(head).to_bytes(8, "little") + head)
            weights.truncate(8 + len(head) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_a_large_model_and_a_thousand_rows_take_seconds(root: Path) -> None:
    (root / "given/model.safetensors").unlink()
    large_model(root / "given")
    write(root / "data/raw/pairs.jsonl", [pair(number) for number in range(1000)])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, "-m", "rlhf.cli", "check"]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "6,738,415,616 weights" in done.stdout.replace("\n", " "), done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS


# ---------------------------------------------------------------------------------------------------------------- rewards

LIMITS = {"weight": 1.0, "sources": None, "right_from": None, "seconds": 5.0, "failure_score": 0.0, "max_failed_share": 0.1}


def reward(name: str, function: str, **options: Any) -> dict[str, Any]:
    return {"name": name, "kind": "function", "function": function, "options": options, **LIMITS}


def test_reward_functions_are_tried_before_anything_trains(root: Path) -> None:
    (root / "my.py").write_text("def fine(answer):\n    return len(answer)\n\ndef bad(answer):\n    return answer.size\n", encoding="utf-8")
    model = {"name": "model", "kind": "model", "weight": 1.0}
    params = change(root, rewards=[model, reward("fine", "my.py:fine")])
    assert ("reward fine", "14 for 'I do not know.'") in plan.check(root, params, STAGES).seen
    entries = [reward("bad", "my.py:bad"), reward("gone", "my.py:gone"), reward("long", "length"), reward("sum", "math")]
    found = said(plan.check(root, change(root, rewards=[model, *entries]), STAGES))
    assert "reward 'bad' fails on the answer 'I do not know.' to the first row of a source: AttributeError: 'str' object has" in found[0]
    assert "my.py has no function gone" in found[1]
    assert "missing a required argument: 'most'" in found[2]
    assert "the row's reference is None" in found[3]


def test_pairs_that_are_answered_are_looked_at_before_anything_trains(root: Path) -> None:
    (root / "my.py").write_text("def numbered(prompt, answer):\n    return int(prompt[-1]['content'][8:-1])\n", encoding="utf-8")
    rows = [pair(number) | {"prompt": [{"role": "user", "content": f"Who is {number}?"}]} for number in range(40)]
    write(root / "data/raw/more.jsonl", rows)
    (only,) = tiny_params()["data"]["sources"]
    more = {"name": "more", "path": "data/raw/more.jsonl", "split": dict.fromkeys(only["split"], 0) | {"reward": 1}}
    sources = [only | {"split": only["split"] | {"reward": 0}}, only | more]
    rewards = [{"name": "model", "kind": "model", "weight": 1.0}, reward("numbered", "my.py:numbered")]
    params = change(root, algorithm="rrhf", answers__pairs=0, answers__max_prompt_tokens=64, data__sources=sources, rewards=rewards)
    assert said(plan.check(root, params, config.STAGES_OF["rrhf"])) == []
    found = "; ".join(said(plan.check(root, change(root, answers__pairs=41), config.STAGES_OF["rrhf"])))
    assert "reward.jsonl has 40 different prompts that are not in ppo.jsonl, but answers.pairs 41 in each of 1 rounds asks for 41" in found
    assert "reward 'numbered' fails on the answer 'I do not know.' to the first row of a source: ValueError" in found
