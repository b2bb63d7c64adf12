"""The values that the benchmarks give to `rlhf use` fit the schema: nothing is trained."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path

from bench import pairs
from bench.faults import kills, serve, stored, sweeps, workspace
from bench.learning import ablations, algorithms, refusals, seeds, tuning, warm_start
from bench.rating import loop
from bench.real_model import seeds as real
from rlhf import config
from rlhf.sweep.space import Space
from rlhf.workspace import presets
from tests import test_end_to_end

ROOT = Path(__file__).resolve().parents[2]
# in a text of a program, * standing for what is put in
KEY = re.compile(r"(?<![^\s'\"])([a-z_]+(?:\.[a-z0-9_*]+)+|seed|algorithm)=")


class Asked:
    """In the place of a clone: the `rlhf use` that are run in it."""

    def __init__(self) -> None:
        self.uses: list[tuple[str, list[str]]] = []

    def run(self, *words: str) -> None:
        assert words[:2] == ("rlhf", "use")
        self.uses.append((words[2], list(words[3:])))


def of_kills() -> Iterator[tuple[str, list[str]]]:
    asked = Asked()
    for algorithm in kills.STAGES:
        kills.use(asked, algorithm, 2, [])  # type: ignore[arg-type]  # it only runs `rlhf use`
    yield from asked.uses


def of_real_models() -> Iterator[tuple[str, list[str]]]:
    chosen = real.Chosen(peers=True, peer_steps=3, again=True)
    plan = real.planned(Path("place"), [1], "", real.common_values(Path("model"), "cuda"), chosen)
    yield from {(stage.preset, stage.values): (stage.preset, list(stage.values)) for stage in plan}.values()


def of_space() -> Iterator[tuple[str, list[str]]]:
    space = Space.model_validate(config.text.parse(sweeps.SPACE, "space.yaml"))
    yield from (("sandbox", [*workspace.SMALL, *space.overrides(values)]) for values in space.corners())


def uses(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Preset and changes, as the benchmarks give them; data that they make go to the folder."""
    yield "sandbox", test_end_to_end.TINY
    for values in (loop.TINY, loop.WEAK):
        yield "sandbox", [*loop.sources(), *values]
    for way in stored.WAYS.values():
        yield "sandbox", [*workspace.SMALL, *stored.OWN, *way]
    yield "hh", [*serve.PAIRS, "data.sources.0.path=pairs.jsonl"]
    yield from of_kills()
    yield from of_real_models()
    yield from of_space()
    for preset, (values, _) in product(seeds.BOUNDS, seeds.ARITHMETICS.values()):
        yield preset, values
    for values in (*ablations.VARIANTS.values(), *refusals.WORSE.values()):
        yield "sandbox", values
    for start, chosen in product(tuning.STARTS, (False, True)):
        yield "sandbox", tuning.values_of(start, chosen=chosen)
    compared = f"data.sources.4={pairs.source(folder / 'compared.jsonl', [])}"
    for _, *changes in warm_start.VARIANTS.values():
        yield "sandbox", [warm_start.NEW_PROMPTS, compared, *warm_start.KEPT, *changes]
    for algorithm in algorithms.KNOWN:
        yield "sandbox", algorithms.chosen(algorithm)


def test_every_change_of_a_benchmark_is_taken_with_its_preset(tmp_path: Path) -> None:
    texts = {name: (ROOT / "presets" / f"{name}.yaml").read_text(encoding="utf-8") for name in presets.names(ROOT)}
    cases = {(preset, *values): (preset, values) for preset, values in uses(tmp_path)}
    for preset, values in cases.values():
        presets.with_values(texts[preset], values, preset)


def test_every_key_that_stands_in_a_benchmark_is_one_of_the_schema() -> None:
    known = {key for path in (ROOT / "presets").glob("*.yaml") for key in keys(config.read(path))}  # which hold the schema
    written = {key: path for path in (ROOT / "bench").rglob("*.py") for text in texts_in(path) for key in KEY.findall(text)}
    assert len(written) > 50
    unknown = [f"{path.relative_to(ROOT)}: {key}" for key, path in written.items() if not any(fnmatchcase(one, key) for one in known)]
    assert unknown == []


def keys(value: object, above: str = "") -> Iterator[str]:
    """Dotted keys of all that stands in a params.yaml."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield f"{above}{name}"
        yield from keys(inner, f"{above}{name}.")


def texts_in(path: Path) -> Iterator[str]:
    """The texts of a program, with * for what it puts in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    formatted = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    parts = {id(part) for node in formatted for part in node.values}
    for node in formatted:
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.values)
    for part in ast.walk(tree):
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and id(part) not in parts:
            yield part.value
