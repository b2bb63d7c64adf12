"""Several nodes by a hostfile: a real stage through DeepSpeed's launcher, pdsh and ssh, both nodes being this machine under two names."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stage_runs import REPOSITORY, free_port, make_workspace, run, set_params, table, tiny_params

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
NEEDED = SSHD and shutil.which("ssh") and shutil.which("pdsh")
pytestmark = pytest.mark.skipif(not NEEDED, reason="several nodes are not tested: sshd, ssh or pdsh is missing")


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Path]:
    """A folder with an `ssh` that reaches this machine as node-1 and node-2, by a server of its own on the loopback."""
    port, folder = free_port(), tmp_path / "programs"
    folder.mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    shutil.copy(tmp_path / "user.pub", tmp_path / "authorized")
    server = [f"-o{key}" for key in ("ListenAddress=127.0.0.1", "UsePAM=no", "StrictModes=no", "PidFile=none", "PasswordAuthentication=no")]
    server += [f"-oHostKey={tmp_path / 'host'}", f"-oAuthorizedKeysFile={tmp_path / 'authorized'}"]
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it where it runs as root
    client = [f"Port {port}", f"IdentityFile {tmp_path / 'user'}", "HostName 127.0.0.1", "StrictHostKeyChecking no"]
    client += ["UserKnownHostsFile /dev/null", "LogLevel ERROR", "BatchMode yes"]
    (tmp_path / "config").write_text("Host node-*\n" + "".join(f"  {line}\n" for line in client), encoding="utf-8")
    (folder / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {tmp_path / "config"} "$@"\n', encoding="utf-8")
    (folder / "ssh").chmod(0o755)
    listening = subprocess.Popen([str(SSHD), "-D", "-e", "-f", "/dev/null", "-p", str(port), *server])
    try:
        while listening.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield folder
    finally:
        listening.terminate()
        listening.wait()


def test_two_nodes_train_as_two_ranks_of_one(programs: Path, tmp_path: Path) -> None:
    root, one = tmp_path / "root", tmp_path / "one"
    raw = tiny_params()
    raw["launch"]["jobs"]["sft"] |= {"processes": 1, "threads": 1}
    make_workspace(root, raw, 120)
    run(root, "base")
    shutil.copytree(root, one)
    run(one, "sft", ranks=2)
    shutil.copy(REPOSITORY / "dvc.yaml", root)
    shutil.copytree(REPOSITORY / "rlhf", root / "rlhf", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "hosts").write_text("node-1 slots=1\nnode-2 slots=1\n", encoding="utf-8")
    raw["launch"]["hostfile"] = "hosts"
    set_params(root, raw)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}
    command = [str(Path(sys.executable).with_name("rlhf")), "launch", "sft"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert table(root / "plots/sft.csv") == table(one / "plots/sft.csv")
    assert (root / "models/sft/model.safetensors").read_bytes() == (one / "models/sft/model.safetensors").read_bytes()
