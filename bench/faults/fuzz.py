"""A fuzz of what people edit: params.yaml, presets with values of `rlhf use`, and dvc.yaml, changed at random.

python bench/faults/fuzz.py --mutations 20000

Each mutation is either refused by a UserError, or read as what stands there: as ruamel.yaml, which DVC uses, reads the same text. What was
refused has changed no file. What is found wrong is printed with the seed that makes it again: --mutations 1 --seed N.
"""

from __future__ import annotations

import io
import random
import re
import shutil
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from ruamel.yaml import YAML

from bench.clone import REPOSITORY
from rlhf import config
from rlhf.errors import UserError
from rlhf.workspace import dag, fingerprint, presets

LACKING = ("hh", "smollm2-135m-hh")  # their file
PRESETS = sorted(path.stem for path in (REPOSITORY / "presets").glob("*.yaml") if path.stem not in LACKING)
WORDS = r"""true false yes No null ~ '' "1" .nan -.inf .inf 0 -1 1 2 3.0 0.5 010 0o17 0x1F 0b11 1:30 1_000 2e-3 1e400 -0.0 2026-01-01 []
{} abc data/raw/x.jsonl ../x /etc/passwd http://u:p@h/ "\ud800" "\0" "\u202e" 日本 *b | >- ' " [ { %TAG ... @x `x` auto ppo dpo sandbox hh
build fp16"""
PHRASES = """[1, [2]]
{a: 1}
2026-01-01 10:00:00
'a b'
!!binary aGk=
!!python/object/apply:os.system [x]
!!set {a, b}
!!timestamp x
!!int x
!!float x
&a [*a]
--- a
? a
- a
<<: {seed: 2}
# gone"""
SCALARS = (*WORDS.split(), *PHRASES.splitlines(), "9" * 25, "9" * 5000)
CHARACTERS = "\t\0\r\n :-#&*!|>'\"%@`[]{},?~\\éÿ\ufeff\u2028\u0085😀"


# ----------------------------------------------------------------------------------------------------------------- texts


def mutate(text: str, chance: random.Random) -> bytes:
    """One to three changes of a YAML text."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        text = chance.choice(MUTATIONS)(text, chance)
    raw = text.encode("utf-8", "surrogatepass")
    if chance.random() < 0.02:
        at = chance.randrange(len(raw) + 1)
        raw = raw[:at] + bytes([chance.randrange(256)]) + raw[at + chance.randrange(2) :]
    return raw


def _value(text: str, chance: random.Random) -> str:
    lines = text.splitlines()
    places = [number for number, line in enumerate(lines) if ":" in line]
    if places:
        at = chance.choice(places)
        lines[at] = f"{lines[at].partition(':')[0]}: {chance.choice(SCALARS)}"
    return "\n".join(lines) + "\n"


def _number(text: str, chance: random.Random) -> str:
    """A number in another form, or another number."""
    found = list(re.finditer(r"(?<=: )-?[0-9]+(?=[.,}\n])", text))
    if not found:
        return text
    one = chance.choice(found)
    forms = ("{0}0", "{0}.0", "{0}e0", "{0}.5e1", "+{0}", "0{0}", "{0}_0", "1{0}", "{0} # so many", "'{0}'", "{0}:0")
    return text[: one.start()] + chance.choice(forms).format(one[0]) + text[one.end() :]


def _key(text: str, chance: random.Random) -> str:
    lines = text.splitlines()
    places = [number for number, line in enumerate(lines) if ":" in line]
    if places:
        at = chance.choice(places)
        before, _, after = lines[at].partition(":")
        indent = before[: len(before) - len(before.lstrip())]
        own = before.strip()
        name = chance.choice((f"{own}s", own.upper(), f'"{own}"', "seed", "1", "null", "[a]", "? x", "<<", ""))
        lines[at] = f"{indent}{name}:{after}"
    return "\n".join(lines) + "\n"


def _line(text: str, chance: random.Random) -> str:
    lines = text.splitlines() or [""]
    at, other = chance.randrange(len(lines)), chance.randrange(len(lines))
    match chance.randrange(5):
        case 0:
            del lines[at]
        case 1:
            lines.insert(other, lines[at])
        case 2:
            lines[at], lines[other] = lines[other], lines[at]
        case 3:
            lines[at] = chance.choice((" ", "  ", "\t", "- ", "# ")) + lines[at]
        case _:
            lines[at] = lines[at].removeprefix(" ")
    return "\n".join(lines) + "\n"


def _character(text: str, chance: random.Random) -> str:
    at = chance.randrange(len(text) + 1)
    return text[:at] + chance.choice(CHARACTERS) + text[at + chance.randrange(2) :]


def _cut(text: str, chance: random.Random) -> str:
    at = chance.randrange(len(text) + 1)
    return text[:at] if chance.random() < 0.5 else text[at:]


def _whole(text: str, chance: random.Random) -> str:
    deep = "[" * chance.choice((10, 3000)) + "1"
    others = ("", "\n", "- 1\n", "1\n", deep, f"seed: {deep}")
    forms = (text + text, text.replace("\n", "\r\n"), "\ufeff" + text, "--- \n" + text, text.replace("  ", "\t"))
    return chance.choice(others + forms)


OFTEN, SELDOM = (_value, _number, _line), (_key, _character, _cut, _whole)
MUTATIONS: tuple[Callable[[str, random.Random], str], ...] = (*OFTEN, *OFTEN, *OFTEN, *SELDOM)


# ---------------------------------------------------------------------------------------------------------------- oracle


def as_dvc(text: bytes) -> Any:
    """What ruamel.yaml reads, as YAML 1.2; None where it refuses the text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return YAML(typ="safe", pure=True).load(io.BytesIO(text))
    except Exception:  # it raises whatever it stumbles over
        return None


def same(read: Any, written: Any) -> bool:
    """Whether a value was read as it was written: a whole number and a float may be the same one, and nothing else changes."""
    if isinstance(read, dict):
        return isinstance(written, dict) and read.keys() == written.keys() and all(same(read[key], written[key]) for key in read)
    if isinstance(read, list | tuple):
        return isinstance(written, list) and len(read) == len(written) and all(map(same, read, written))
    if isinstance(read, bool) or isinstance(written, bool):
        return read is written
    if isinstance(read, str):
        return read == (written if isinstance(written, str) else str(written))  # a date is a text here
    if isinstance(read, int | float):
        return isinstance(written, int | float) and (read == written or (isinstance(read, float) and read == float(written)))
    return read is None and written is None


# ----------------------------------------------------------------------------------------------------------------- cases


def of_params(root: Path, chance: random.Random) -> str:
    """Load a changed preset."""
    text = (REPOSITORY / "presets" / f"{chance.choice(PRESETS)}.yaml").read_text(encoding="utf-8")
    raw = mutate(text, chance)
    (root / "params.yaml").write_bytes(raw)
    try:
        params = config.load(root / "params.yaml")
    except UserError:
        return "refused"
    written = as_dvc(raw)
    assert same(params.model_dump(), written), "read otherwise than it stands there"
    again = config.validate(config.text.parse(yaml.safe_dump(params.model_dump(mode="json")), "again"), "again")
    assert again == params, "a stage would read otherwise"
    assert params.of_stage("ppo") == again.of_stage("ppo")
    return "loaded"


def of_use(root: Path, chance: random.Random) -> str:
    """`rlhf use` of a changed preset, or with a changed value."""
    before = (REPOSITORY / "presets/sandbox.yaml").read_bytes()
    (root / "params.yaml").write_bytes(before)
    dag = (root / "dvc.yaml").read_bytes()
    raw, values = before, []
    if chance.random() < 0.5:
        raw = mutate(before.decode(), chance)
    else:
        values = [_override(chance) for _ in range(chance.choice((1, 1, 2)))]
    (root / "mine.yaml").write_bytes(raw)
    try:
        presets.use(root, str(root / "mine.yaml"), values)
    except UserError:
        assert (root / "params.yaml").read_bytes() == before, "refused, and params.yaml was changed"
        assert (root / "dvc.yaml").read_bytes() == dag, "refused, and dvc.yaml was changed"
        return "refused"
    params = config.load(root / "params.yaml")
    assert same(params.model_dump(), as_dvc((root / "params.yaml").read_bytes())), "DVC reads otherwise what was written"
    if not values:
        assert params == config.load(root / "mine.yaml"), "params.yaml is not the preset"
    shutil.copy(REPOSITORY / "dvc.yaml", root)
    return "loaded"


def _override(chance: random.Random) -> str:
    keys = [path for path, _ in _leaves("", yaml.safe_load((REPOSITORY / "presets/sandbox.yaml").read_text(encoding="utf-8")))]
    key = chance.choice(keys)
    match chance.randrange(6):
        case 0:
            key = key.rpartition(".")[0] or key
        case 1:
            others = ("", "data.sources.9.rows", "data.sources.-1.rows")
            key = chance.choice((f"{key}.x", f"{key}s", f".{key}", key.replace(".", ".."), *others))
    value = chance.choice((*SCALARS, "{rank: 2, alpha: 4, targets: all-linear, learning_rate: 1e-4}", str(chance.randrange(1000))))
    return chance.choice((f"{key}={value}", f"{key}={value}", f"{key}={value}", f"{key}={value}\n", f"{key} {value}", f"{key}== {value}"))


def _leaves(prefix: str, value: Any) -> list[tuple[str, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        return [(prefix, value)]
    return [leaf for key, inner in pairs for leaf in _leaves(f"{prefix}.{key}" if prefix else str(key), inner)]


def of_graph(root: Path, chance: random.Random) -> str:
    """Read a changed dvc.yaml."""
    text = dag.text(REPOSITORY, chance.choice(_params()))
    raw = mutate(text, chance)
    (root / "dvc.yaml").write_bytes(raw)
    try:
        nodes = fingerprint.read_graph(root)
    except UserError:
        return "refused"
    finally:
        shutil.copy(REPOSITORY / "dvc.yaml", root)
    if (read := as_dvc(raw)) is None:
        return "left to DVC, which refuses it (tasks.graph.check)"
    written = read["stages"]
    assert nodes.keys() == written.keys(), "other stages than stand there"
    for name, node in nodes.items():
        listed = [path for key in ("outs", "metrics", "plots") for path in _paths(written[name].get(key, []))]
        assert sorted(node.written) == sorted(set(listed)), f"other outputs of {name}"
        assert set(node.inputs) == set(_paths(written[name].get("deps", []))), f"other inputs of {name}"
    return "loaded"


@cache
def _params() -> list[config.Params]:
    """The sandbox's, with each algorithm that has a graph of its own."""
    raw = config.read(REPOSITORY / "presets/sandbox.yaml")
    return [config.validate(raw | {"algorithm": algorithm}, "params.yaml") for algorithm in config.ONE_OF_EACH]


def _paths(entries: list[Any]) -> list[str]:
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


CASES = {"params": of_params, "use": of_use, "graph": of_graph}
SHARES = (6, 1, 3)


def fuzz(mutations: int, seed: int) -> tuple[Counter[str], list[str]]:
    """How many mutations of each kind were loaded and refused; and what was found wrong."""
    counts, wrong = Counter[str](), []
    with tempfile.TemporaryDirectory(prefix="rlhf-fuzz-") as folder:
        root = Path(folder)
        for name in ("presets", "graphs"):
            shutil.copytree(REPOSITORY / name, root / name)
        shutil.copy(REPOSITORY / "dvc.yaml", root)
        for number in range(seed, seed + mutations):
            chance = random.Random(number)
            kind = chance.choices(list(CASES), SHARES)[0]
            try:
                counts[f"{kind} {CASES[kind](root, chance)}"] += 1
            except Exception as error:  # what it looks for
                counts[f"{kind} wrong"] += 1
                wrong.append(f"seed {number}, {kind}: {error!r}\n{''.join(traceback.format_tb(error.__traceback__)[-2:])}")
                shutil.copy(REPOSITORY / "dvc.yaml", root)
    return counts, wrong


def main(
    mutations: Annotated[int, typer.Option(help="How many.")] = 20_000, seed: Annotated[int, typer.Option(help="Of the first one.")] = 0
) -> None:
    """Try them and print what came of them. Exit code 1: something was found wrong."""
    began = time.monotonic()
    counts, wrong = fuzz(mutations, seed)
    for each in wrong[:20]:
        print(each)
    print(", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())), f"in {time.monotonic() - began:.0f} s")
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
