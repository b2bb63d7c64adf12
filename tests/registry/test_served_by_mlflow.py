"""MLflow's own way in: what a registered version answers to chat requests, by `mlflow models serve` as well, and what its page says."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import mlflow
import pandas as pd
import pytest
from huggingface_hub import ModelCard
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.types.responses import ResponsesAgentResponse
from transformers import PreTrainedTokenizerFast

from rlhf import registry
from rlhf.registry import card
from rlhf.registry.registration import EXAMPLE
from tests.registry.workspaces import load, small, workspace

URI = "models:/assistant@champion"
ASKED: list[Any] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]
SECONDS = 120  # they only bound a failing test


@pytest.fixture(scope="module")
def root(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow has set it to the workspace of another test
        return workspace(tmp_path_factory.mktemp("served") / "work", small(tokenizer), tokenizer)


@pytest.fixture
def served(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    registry.find(root, load(root), 1)  # which tells MLflow where
    return mlflow.pyfunc.load_model(URI)


def test_a_table_is_questions_and_nothing_else(served: Any) -> None:
    assert served.predict(pd.DataFrame({"inputs": ["hello", "hello"]})) == served.predict(["hello"]) * 2
    with pytest.raises(MlflowException, match="a table has one column, of questions"):
        served.predict(pd.DataFrame({"messages": [ASKED], "max_tokens": [5]}))


def test_a_chat_request_gets_a_chat_completion(served: Any) -> None:
    reply = served.predict({"messages": ASKED, "max_tokens": 5, "model": "assistant"})
    (choice,) = reply["choices"]
    assert (reply["object"], reply["model"], choice["index"], choice["message"]["role"]) == ("chat.completion", "assistant", 0, "assistant")
    assert reply["usage"]["completion_tokens"] <= 5
    assert reply["usage"]["total_tokens"] == reply["usage"]["prompt_tokens"] + reply["usage"]["completion_tokens"]
    assert choice["finish_reason"] == ("length" if reply["usage"]["completion_tokens"] == 5 else "stop")
    assert served.predict([ASKED])[0].startswith(choice["message"]["content"].strip())
    parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    assert served.predict(parts) == served.predict(["hello"])
    assert served.predict("hello") == served.predict(["hello"])
    texts = {served.predict({"messages": ASKED, "temperature": 1.0, "top_p": 0.9})["choices"][0]["message"]["content"] for _ in range(8)}
    assert len(texts) > 1


def test_a_request_of_responses_gets_a_response(served: Any) -> None:
    for given in ("hello", [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]}]):
        reply = served.predict({"input": given, "max_output_tokens": 5})
        told = ResponsesAgentResponse(**reply).model_dump()
        assert told["output"][0]["content"] == reply["output"][0]["content"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"messages": ASKED, "stream": True}, "stream: not known here"),
        ({"messages": ASKED, "seed": 1, "tools": [1]}, "seed, tools: not known here"),
        ({"messages": ASKED, "n": 2}, "n: one answer"),
        ({"messages": []}, "a dialogue is a text"),
        ({"messages": 5}, "a dialogue is a text"),
        ({"messages": [{"role": "user", "content": 5}]}, "content: a text"),
        ({"messages": ["hello"]}, "a message is"),
        ({"messages": ASKED, "max_tokens": "5"}, "a whole number"),
        ({"messages": ASKED, "temperature": float("nan")}, "temperature: 0"),
        ({"messages": [{"role": "user", "content": "hello " * 200}]}, "tokens, and the model takes 128"),
        ({"input": None}, "a dialogue is a text"),
    ],
)
def test_what_cannot_be_answered_is_refused(served: Any, body: dict[str, Any], said: str) -> None:
    with pytest.raises(MlflowException, match=said):
        served.predict(body)


def test_the_page_and_the_folder_say_what_the_version_is(root: Path, served: Any) -> None:
    params = load(root)
    folder = registry.model_folder(URI, root, params)
    found = ModelCard.load(folder / "README.md")
    assert found.data.library_name == "transformers"
    assert found.data.model_name == "assistant"
    assert {result.metric_type: result.metric_value for result in found.data.eval_results or []} == {card.SCORES["kl"]: 1.0}
    for said in (
        "| demonstrations | sandbox messages | made here, 7000 rows | sft 1.0 |",
        "| KL divergence from sft | 1 |",
        "mlflow models serve",
    ):
        assert said in found.text
    entry = mlflow.MlflowClient().get_model_version("assistant", "1")
    assert found.text.strip() in str(entry.description)
    tags = registry.find(root, params, 1).tags
    assert (folder / "README.md").read_text() == card.card(params, tags)  # the same again
    assert str(root) not in (folder / "README.md").read_text()
    described = Model.load(folder.parent)
    assert described.get_input_schema().input_names() == ["messages", "max_tokens", "temperature", "top_p"]
    assert described.load_input_example(str(folder.parent)) == EXAMPLE
    assert served.predict(EXAMPLE)["object"] == "chat.completion"


def test_a_long_page_keeps_what_the_gates_said() -> None:
    said = card.described("Gates passed\n\n- pass one", "Gates not checked yet\n\n# assistant\n\n" + "row\n" * 2000)
    assert said.startswith("Gates passed\n\n- pass one\n\n# assistant\n")
    assert len(said) <= card.MOST
    assert said.endswith("row\n…")


def test_mlflow_serves_it(root: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    programs = Path(sys.executable).parent  # MLflow calls uvicorn by its name
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlruns/mlflow.db", "PATH": path}
    words = [str(programs / "mlflow"), "models", "serve", "-m", URI, "--env-manager", "local", "--port", str(port)]
    with (root / "serve.log").open("w") as log:
        server = subprocess.Popen(words, cwd=root, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS) as client:
            deadline = time.monotonic() + SECONDS
            while not _is_well(client):
                assert server.poll() is None, (root / "serve.log").read_text()
                assert time.monotonic() < deadline, (root / "serve.log").read_text()
                time.sleep(0.1)
            reply = client.post("/invocations", json={"messages": ASKED, "max_tokens": 5})
            assert reply.status_code == 200, reply.text
            assert reply.json()["choices"][0]["message"]["role"] == "assistant"
            listed = client.post("/invocations", json={"inputs": ["hello", ASKED]})
            assert len(listed.json()["predictions"]) == 2
            refused = client.post("/invocations", json={"messages": ASKED, "logprobs": True})
            assert (refused.status_code, "logprobs: not known here" in json.dumps(refused.json())) == (400, True)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(SECONDS)


def _is_well(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False
