"""How stage prepare grows: seconds, processor time and memory on many preference pairs, with one core and with all of them.

python bench/speed/prepare.py --rows 640000                    rows of 1.3 KB on average, made by the bench itself
python bench/speed/prepare.py --rows 640000 --against FOLDER   and the code of another checkout, in turn
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from bench.clone import memory

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS_BETWEEN_SAMPLES = 0.3
SPLIT = {"text": 0.1, "sft": 0.2, "reward": 0.3, "ppo": 0.2, "judge": 0.1, "heldout": 0.1}


@dataclass(frozen=True)
class Cost:
    """What a run took, all its processes together."""

    seconds: float
    processor: float
    memory: int  # bytes, at most
    digest: str  # of all that it wrote


def main(
    rows: Annotated[int, typer.Option(help="Preference pairs.")] = 40_000,
    against: Annotated[Path | None, typer.Option(help="A checkout of other code, run in turn on the same rows.")] = None,
    rounds: Annotated[int, typer.Option(help="Runs of each kind, in turn.")] = 1,
    folder: Annotated[Path | None, typer.Option(help="Where to write rows and outputs: four times their size.")] = None,
) -> None:
    """Print seconds, processor seconds, rows a second and peak memory of each run."""
    cores = sorted(os.sched_getaffinity(0))
    places = {"one core": (REPOSITORY, cores[:1]), f"{len(cores)} cores": (REPOSITORY, cores)}
    if against:
        places |= {f"{against}, {name}": (against.resolve(), used) for name, (_, used) in places.items()}
    with tempfile.TemporaryDirectory(prefix="rlhf-prepare-", dir=folder) as root:
        write_rows(Path(root), rows)
        digests: dict[Path, set[str]] = {}
        for _ in range(rounds):
            for name, (code, used) in places.items():
                cost = run(Path(root), code, used)
                digests.setdefault(code, set()).add(cost.digest)
                print(
                    f"{rows} rows, {name}: {cost.seconds:.1f} s, {cost.processor:.1f} s of processor time, "
                    f"{rows / cost.seconds:.0f} rows/s, {cost.memory / 2**30:.2f} GiB at most",
                    flush=True,
                )
    for code, written in digests.items():
        print(f"{code}: " + ("the same bytes each time" if len(written) == 1 else f"{len(written)} different contents"))
    raise typer.Exit(any(len(written) != 1 for written in digests.values()))


def write_rows(root: Path, rows: int) -> None:
    with (root / "pairs.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in pairs(rows))


def write_params(root: Path, code: Path) -> None:
    """Params with the keys that this code knows: those of its own preset."""
    raw = yaml.safe_load((code / "presets/hh.yaml").read_text(encoding="utf-8"))
    source = raw["data"]["sources"][0]
    source |= {"format": "pairs", "path": "pairs.jsonl", "split": SPLIT, "columns": source["columns"] | {"prompt": "prompt"}}
    raw["prepare"] |= {"max_characters": 3000}
    (root / "params.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")


def pairs(rows: int) -> Iterator[dict[str, Any]]:
    """Pairs with texts as long as those of real preferences; every 50th is one of the last hundred over again, as it was or swapped."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(5000)]
    # in a tenth of the rows there is something that is not ASCII
    text = " ".join("naïve 日本" if draw.random() < 0.0005 else word for word in draw.choices(words, k=200_000))
    last: list[dict[str, Any]] = []
    for number in range(rows):
        if number % 50 == 49:
            row = draw.choice(last)
            yield row if number % 100 == 49 else {"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]}
            continue
        asked = draw.choice(last)["prompt"] if number % 10 == 9 else f"{number}: {piece(draw, text, 300)}"
        row = {"prompt": asked, "chosen": piece(draw, text, 900), "rejected": piece(draw, text, 900)}
        last = [*last[-99:], row]
        yield row


def piece(draw: random.Random, text: str, longest: int) -> str:
    start = draw.randrange(len(text) - longest)
    return text[start : start + draw.randint(longest // 10, longest)]


def run(root: Path, code: Path, cores: list[int]) -> Cost:
    """Stage prepare of some code on some cores.

    Raises:
        typer.Exit: it failed; what it said is shown.
    """
    job = root / "job"
    environment = os.environ | {"RLHF_ROOT": str(root), "RLHF_JOB_DIR": str(job), "RLHF_PARAMS": str(root / "params.yaml")}
    environment |= {"RLHF_DEVICE": "cpu", "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    write_params(root, code)
    job.mkdir()
    before, started, peak = os.times(), time.perf_counter(), 0
    command = ["taskset", "--cpu-list", ",".join(map(str, cores)), sys.executable, "-m", "rlhf.stages.prepare"]
    with subprocess.Popen(command, cwd=code, env=environment) as process:
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(SECONDS_BETWEEN_SAMPLES)
    if process.returncode:
        raise typer.Exit(process.returncode)
    seconds, after = time.perf_counter() - started, os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    digest = hashlib.sha256()
    for path in sorted(path for path in (job / "out").rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(job)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    subprocess.run(["rm", "-r", job], check=True)
    return Cost(seconds, processor, peak, digest.hexdigest())


if __name__ == "__main__":
    typer.run(main)
