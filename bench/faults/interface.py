"""Requests made up from the OpenAPI document of the assistant's server, right and wrong ones, by schemathesis.

python bench/faults/interface.py                 a thousand requests of each kind, some minutes

No reply is a server's fault, each has a status, a content type and a form that the document names, and what it forbids is refused.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bench.served import Server, workspace_of

# what is right by the document may still be too long for the model, or name one that is not served
NOT_CHECKED = "positive_data_acceptance"


def main(
    examples: Annotated[int, typer.Option(help="Requests to each address, in each way of making them up.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of what is made up.")] = 1,
) -> None:
    """Print what schemathesis says. Exit code 1: something was not as the document says."""
    with tempfile.TemporaryDirectory(prefix="rlhf-interface-") as place:
        root = workspace_of(Path(place) / "work", None)
        with Server(root) as server:
            done = subprocess.run(words(f"http://127.0.0.1:{server.port}", examples, seed), cwd=place, check=False)
            wrong = done.returncode or server.process.poll() is not None or "Traceback" in (root / "server.log").read_text()
    raise typer.Exit(int(bool(wrong)))


def words(address: str, examples: int, seed: int) -> Sequence[str]:
    """The command; its folder keeps what hypothesis remembers."""
    program = str(Path(sys.executable).with_name("schemathesis"))
    options = ["--exclude-checks", NOT_CHECKED, "--max-examples", str(examples), "--seed", str(seed), "--continue-on-failure"]
    return [program, "run", f"{address}/openapi.json", *options, "--warnings", "off", "--phases", "coverage,fuzzing", "--no-color"]


if __name__ == "__main__":
    typer.run(main)
