"""A given model of the hub, which a server of this test stands for: it is looked at without its weights, and pinned as published."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.stage_runs import REPOSITORY

COMMIT = "a" * 40
LOOK = """
import json, sys
from pathlib import Path
from rlhf.config.training import PretrainedBase
from rlhf.models.given import check, pin
given = PretrainedBase(source="pretrained", model="me/model", revision="main", trust_remote_code=False, chat_template="keep")
found = [error.what for error in check(given)]
if len(sys.argv) > 1:
    pin(given, Path(sys.argv[1]))
print(json.dumps(found))
"""


class Hub(BaseHTTPRequestHandler):
    """What of the hub's protocol a download needs; `asked` are the files that were asked for, and which part."""

    folder: Path
    asked: list[tuple[str, str | None]]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        place = self.path.partition("?")[0].split("/")
        if place[1] == "api":
            files = [{"type": "file", "path": path.name, "size": path.stat().st_size, "oid": COMMIT} for path in self.folder.iterdir()]
            return self.reply(json.dumps(files if "tree" in place else {"id": "me/model", "sha": COMMIT}).encode())
        path = self.folder / place[-1]
        if not path.is_file():
            return self.reply(b"", 404, {"X-Error-Code": "EntryNotFound"})
        content, part = path.read_bytes(), self.headers.get("Range")
        if self.command == "GET":
            self.asked.append((path.name, part))
        if part:
            first, last = map(int, part.removeprefix("bytes=").split("-"))
            content = content[first : last + 1]
        return self.reply(content, 206 if part else 200, {"ETag": f'"{path.name}"', "X-Repo-Commit": COMMIT})

    def reply(self, content: bytes, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Iterator[Any]:
    """A hub with one model, in several files of weights."""
    llama.save_pretrained(tmp_path / "published", max_shard_size="50KB")
    tokenizer.save_pretrained(tmp_path / "published")
    served: Any = type("Served", (Hub,), {"folder": tmp_path / "published", "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), served)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    served.place = {**os.environ, **place, "HF_HUB_OFFLINE": "0"}
    yield served
    server.shutdown()


def look(hub: Any, *words: str) -> list[str]:
    """What is found wrong with the hub's model, in a process of its own: huggingface_hub reads its environment once."""
    ran = subprocess.run([sys.executable, "-c", LOOK, *words], env=hub.place, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_a_model_of_the_hub_is_looked_at_by_its_heads_and_pinned_as_published(hub: Any, tmp_path: Path, llama: LlamaForCausalLM) -> None:
    assert look(hub) == []
    assert {part is None for name, part in hub.asked if name.endswith(".safetensors")} == {False}
    assert look(hub, str(tmp_path / "to")) == []
    for path in hub.folder.glob("*safetensors*"):
        assert (tmp_path / "to" / path.name).read_bytes() == path.read_bytes()
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "to")
    assert kept.state_dict().keys() == llama.state_dict().keys()
