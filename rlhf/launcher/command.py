"""The command line and environment of a stage: devices, port, threads, DeepSpeed's launcher."""

from __future__ import annotations

import base64
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

from rlhf import config
from rlhf.errors import UserError
from rlhf.locks import lock

DRIVER = Path("/dev/nvidiactl")

PRIVATE = {
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}


def find_gpus(accelerator: str) -> list[int]:
    """The GPUs to choose from, by their number on this machine; none means that stages run on the CPU.

    Raises:
        UserError: params.yaml asks for a GPU, and there is none; or CUDA_VISIBLE_DEVICES names some by other things than numbers.
    """
    # torch costs seconds to load, and cannot see a GPU where the driver's device is missing
    if accelerator == "cpu" or (accelerator == "auto" and not DRIVER.exists()):
        return []
    import torch

    count = torch.cuda.device_count()
    if count == 0 and accelerator == "cuda":
        raise UserError(
            "params.yaml: launch.accelerator is cuda, but torch sees no GPU", remedy="set it to cpu or auto, or install torch for CUDA"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not visible or not count:
        return list(range(count))
    try:
        return [int(number) for number in visible.split(",")][:count]
    except ValueError:
        what = f"CUDA_VISIBLE_DEVICES is {visible}, but DeepSpeed's launcher knows GPUs by their numbers alone"
        raise UserError(what, remedy="set it to the numbers that `nvidia-smi -L` shows") from None


@contextmanager
def hold_gpus(root: Path, stage: str, gpus: list[int], wanted: int) -> Iterator[list[int]]:
    """Hold `wanted` of the GPUs, waiting until so many are free.

    Raises:
        UserError: the machine has fewer.
    """
    if wanted > len(gpus):
        raise UserError(
            f"params.yaml: launch.jobs.{config.kind(stage)}.processes is {wanted}, but there are {len(gpus)} GPUs here",
            remedy=f"set it to at most {len(gpus)}",
        )
    said = False
    while True:
        with ExitStack() as locks:
            held = []
            for number in gpus:
                try:
                    locks.enter_context(lock(root, f"gpu-{number}", refuse="busy"))
                    held.append(number)
                except UserError:
                    continue
                if len(held) == wanted:
                    yield held
                    return
        # those held are let go meanwhile: two stages that each wait with half of the GPUs would wait for ever
        if not said:
            print(f"{stage}: waiting for {wanted} free GPUs", flush=True)
            said = True
        time.sleep(2)


def choose_port(port: int) -> int:
    """The rendezvous port; 0 stands for any free one.

    Raises:
        UserError: the port is taken.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            raise UserError(
                f"params.yaml: launch.port {port} cannot be used: {error.strerror}", remedy="free it, or set launch.port to 0"
            ) from None
        return listener.getsockname()[1]


def command(stage: str, module: str, params: config.Params, gpus: list[int]) -> list[str]:
    """What runs the stage: DeepSpeed's launcher; plain Python for prepare, which computes nothing on tensors.

    Raises:
        UserError: the port is taken, or the hostfile missing.
    """
    if stage == "prepare":
        return [sys.executable, "-u", "-m", module]
    settings = params.launch
    hostfile = settings.hostfile
    if hostfile and not Path(hostfile).is_file():
        raise UserError(f"params.yaml: launch.hostfile {hostfile}: no such file", remedy="write it, or set launch.hostfile to null")
    processes = getattr(settings.jobs, config.kind(stage)).processes
    port = choose_port(settings.port)
    if hostfile:
        start = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", hostfile, "--num_gpus", str(processes)]
    else:  # what `deepspeed` itself runs on each node: without it, a process less loads all of torch
        layout = base64.urlsafe_b64encode(json.dumps({"localhost": gpus or list(range(processes))}).encode()).decode()
        start = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--world_info", layout, "--master_addr", "127.0.0.1"]
    # the launcher's own lines are not needed: the exit code and the stage's lines say it all
    return [*start, "--master_port", str(port), "--log_level", "critical", "--no_local_rank", "--module", module]


# Threads wait a moment for the next operation before they sleep: small models have thousands of short ones. ACTIVE: also where a process
# has made more threads than there are cores, as the libraries each make their own. The count keeps the wait short: a thread that waits on a
# core that others need holds them up.
OPENMP = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "1000"}
WAITING = (*OPENMP, "KMP_BLOCKTIME")


def waiting(stage: str, jobs: int, given: Mapping[str, str]) -> dict[str, str]:
    """How the threads of a stage wait for each other: as the user's environment says, else as OPENMP does.

    Says so where he has them wait awake without end, and there are more of them than free cores: a step may take many times as long.

    Args:
        jobs: threads of all its processes on this machine.
        given: the user's environment.
    """
    named = {name: given[name] for name in WAITING if name in given}
    if not named:
        return OPENMP
    endless = named.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE" and "GOMP_SPINCOUNT" not in named
    endless |= any(named.get(name, "").lower() in ("infinite", "infinity") for name in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME"))
    free = max(0, len(os.sched_getaffinity(0)) - round(os.getloadavg()[0]))
    if endless and jobs > free:
        said = " ".join(f"{name}={value}" for name, value in named.items())
        print(f"{stage}: {said}: {jobs} threads wait awake on {free} free cores, each on one that others need; unset it", flush=True)
    return named


HIDDEN = "import gc, sys\n\nsys.modules.update(mlflow=None, sklearn=None, scipy=None, boto3=None, h2=None)\ngc.set_threshold(100_000)\n"


def environment(stage: str, params: config.Params, root: Path, folder: Path, device: str) -> dict[str, str]:
    """The environment of the stage's processes."""
    threads = "1" if stage == "prepare" else str(getattr(params.launch.jobs, config.kind(stage)).threads)
    processes = 1 if stage == "prepare" else getattr(params.launch.jobs, config.kind(stage)).processes
    own = {
        **PRIVATE,
        **waiting(stage, processes * int(threads), os.environ),
        "RLHF_STAGE": stage,
        "RLHF_JOB_DIR": str(folder),
        "RLHF_ROOT": str(root),
        "RLHF_DEVICE": device,
        "RLHF_PARAMS": str(folder / "params.yaml"),
        "DS_ACCELERATOR": device,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONIOENCODING": "utf-8",  # as the launcher reads it, whatever the terminal shows
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    if not params.launch.hostfile:
        own |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # ranks of one machine listen on its loopback alone
    # the workspace's params.yaml may be edited while the stage runs, and before its ranks have read it
    (folder / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    # DeepSpeed loads mlflow, transformers sklearn and scipy wherever they can, in each process, at a second or two apiece, and a tenth for
    # what else of the cloud's they find;
    # Python runs this file as it starts: what stands as None in sys.modules counts as not installed. Else a tenth of the time goes into
    # a search for garbage among what is loaded; rlhf.job.run puts that right again
    hidden = folder / "hidden"
    hidden.mkdir(exist_ok=True)
    (hidden / "sitecustomize.py").write_text(HIDDEN, encoding="utf-8")
    own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(hidden), str(root), os.environ.get("PYTHONPATH")]))
    # DeepSpeed passes these on to the other nodes of a hostfile
    exported = folder / "environment"
    exported.write_text("".join(f"{name}={value}\n" for name, value in own.items()))
    return os.environ | own | {"DS_ENV_FILE": str(exported)}
