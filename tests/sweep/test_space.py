"""A sweep's file, and the points that it makes: what is refused before anything trains, and what points share."""

from __future__ import annotations

import inspect
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf import config
from rlhf.errors import UserError
from rlhf.stages import shown
from rlhf.sweep import proposals
from rlhf.sweep.points import Maker
from rlhf.sweep.space import NUMBERS, Space, load

REPOSITORY = Path(__file__).parents[2]
GRID: dict[str, Any] = {"name": "one", "method": "grid", "points": 8, "values": {"ppo.kl.coefficient": [0.05, 0.1], "seed": [1, 2]}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(REPOSITORY / "graphs", tmp_path / "graphs")
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / "data/raw").mkdir(parents=True)
    (tmp_path / "rlhf").symlink_to(REPOSITORY / "rlhf")
    return tmp_path


def maker(root: Path, **changes: Any) -> Maker:
    return Maker(root, root, Space.model_validate(GRID | changes), Path("sweep.yaml"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pointz": 3}, "sweep.yaml: unknown key 'pointz'"),
        ({"points": 3}, "sweep.yaml: points is 3, but the grid has 4: raise it, or take values out"),
        ({"method": "all"}, "sweep.yaml: method: Input should be 'grid', 'random' or 'tpe'"),
        ({"values": {"seed": {"low": 1, "high": 4}}}, "values.seed is a range, and a grid needs a list of values"),
        ({"values": {"seed": [1, 1]}}, "values.seed holds a value twice"),
        ({"values": {"seed": []}}, "sweep.yaml: values.seed: List should have at least 1 item"),
        ({"method": "random", "values": {"seed": {"low": 4, "high": 1}}}, "sweep.yaml: values.seed: low 4 is not below high 1"),
        ({"method": "tpe", "values": {"seed": {"low": 1}}}, "sweep.yaml: key 'values.seed.high' is missing"),
        ({"values": {"seed": 3}}, "sweep.yaml: values.seed: a list of values is wanted, or a range with low and high"),
        ({"values": {"seed": [b"hi"]}}, "sweep.yaml: values.seed: b'hi' is no value of params.yaml: numbers, texts, lists and maps are"),
        ({"fixed": {"ppo.steps": {1, 2}}}, "sweep.yaml: fixed.ppo.steps: {1, 2} is no value of params.yaml"),
        ({"values": ["seed"]}, "sweep.yaml: values: keys with their values are wanted"),
        (
            {"method": "random", "values": {"ppo.epochs": {"low": 1, "high": 3, "step": 7}}},
            "sweep.yaml: values.ppo.epochs: steps of 7 from low 1 do not come to high 3",
        ),
        ({"fixed": {"seed": 1}}, "fixed.seed stands under values, too"),
        ({"objectives": {"golden": "maximize"}}, "objectives.golden is no number of metrics/summary.json: one of accuracy, "),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_name_and_key(tmp_path: Path, changes: Any, said: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(GRID | changes))
    with pytest.raises(UserError) as refused:
        load(path)
    assert said in refused.value.what
    assert str(path) in refused.value.what


def test_the_remedies_are_of_a_sweeps_file(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    for text, said in ((None, "no such file"), ("name: a\nname: b\n", "not valid YAML"), ("- a\n", "keys with their values are wanted")):
        if text is not None:
            path.write_text(text)
        with pytest.raises(UserError, match=said) as refused:
            load(path)
        assert "docs/sweeps.md" in refused.value.remedy
        assert "rlhf use" not in refused.value.remedy  # which would write params.yaml anew


@pytest.mark.parametrize("name", sorted(path.stem for path in (REPOSITORY / "spaces").glob("*.yaml")))
def test_the_examples_hold(root: Path, name: str) -> None:
    space = load(REPOSITORY / "spaces" / f"{name}.yaml")
    Maker(root, root, space, Path(name)).make(space.corners()[-1])
    assert space.wanted(config.load(root / "params.yaml")) == {"gold": "maximize", "kl": "minimize"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"ppo.stepz": [1]}, "sweep.yaml: unknown key 'ppo.stepz': did you mean 'steps'?"),
        ({"data.sources.9.rows": [1]}, "sweep.yaml: unknown key 'data.sources.9.rows': data.sources has 4 entries"),
        ({"ppo.steps": [5, 0]}, "sweep.yaml: ppo.steps: Input should be greater than 0, got 0"),
        ({"ppo.temperature": ["warm"]}, "sweep.yaml: ppo.temperature: "),
        ({"promote.max_kl": [1.0, 2.0]}, "values.promote.max_kl: no stage of these points depends on it"),
        ({"dpo.beta": [0.1, 0.2]}, "values.dpo.beta: no stage of these points depends on it"),
    ],
)
def test_a_value_that_is_wrong_is_refused_before_anything_trains(root: Path, values: Any, said: str) -> None:
    with pytest.raises(UserError) as refused:
        maker(root, values=values).grid()
    assert said in refused.value.what


def test_ends_of_ranges_are_held_against_the_schema(root: Path) -> None:
    with pytest.raises(UserError, match=r"sweep.yaml: ppo.temperature: Input should be greater than or equal to 0.001, got -1"):
        maker(root, method="random", values={"ppo.temperature": {"low": -1.0, "high": 1.0}}).corners()


def test_an_input_that_nothing_makes_is_refused(root: Path) -> None:
    (root / "data/raw").rmdir()
    with pytest.raises(UserError, match=r"sweep.yaml: data/raw: input of stage prepare of a point, and no such file"):
        maker(root).grid()


def test_points_share_the_stages_whose_inputs_are_equal(root: Path) -> None:
    points, same = maker(root).grid()
    assert (len(points), same) == (4, 0)
    first, other, seed = points[0], points[2], points[1]
    assert [point.values["seed"] for point in (first, other, seed)] == [1, 1, 2]
    shared = {stage for stage, key in first.stages.items() if other.stages[stage] == key}
    assert shared == {"prepare", "base", "sft", "reward"}
    assert not set(first.stages.values()) & set(seed.stages.values())
    assert "coefficient: 0.05" in first.text
    assert first.after["ppo"] == ("prepare", "sft", "reward")


def test_another_algorithm_brings_its_graph_and_points_that_are_the_same_are_one(root: Path) -> None:
    points, same = maker(root, values={"algorithm": ["ppo", "dpo", "grpo"], "dpo.beta": [0.1, 0.2]}).grid()
    assert [point.values for point in points] == [
        {"algorithm": "ppo", "dpo.beta": 0.1},
        {"algorithm": "dpo", "dpo.beta": 0.1},
        {"algorithm": "dpo", "dpo.beta": 0.2},
        {"algorithm": "grpo", "dpo.beta": 0.1},
    ]
    assert same == 2
    assert [list(point.stages)[-2] for point in points] == ["ppo", "dpo", "dpo", "grpo"]
    assert {point.stages["sft"] for point in points} == {points[0].stages["sft"]}


def test_an_objective_that_the_data_cannot_give_is_refused(root: Path) -> None:
    params = config.load(root / "params.yaml")
    with pytest.raises(ValueError, match=r"objectives\.accuracy: these data and rewards have no right answers"):
        Space.model_validate(GRID | {"objectives": {"accuracy": "maximize"}}).wanted(params)
    assert list(config.load(REPOSITORY / "presets/sandbox-function.yaml").rewards) != []


def test_objectives_are_what_evaluate_writes() -> None:
    source = inspect.getsource(shown.summary)
    assert set(re.findall(r'"(\w+)": (?:accuracy|gold|reward|metrics)\[', source)) == NUMBERS.keys()


def test_proposals_depend_on_seed_and_results_alone() -> None:
    pytest.importorskip("optuna", reason="optuna is not installed")
    values = {
        "ppo.actor.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
        "ppo.epochs": {"low": 1, "high": 4},
        "ppo.policy_clip": [[0.1, 0.1], [0.2, 0.3]],
    }
    space = Space.model_validate(GRID | {"method": "tpe", "points": 40, "values": values})
    with warnings.catch_warnings(action="error"):  # the sweep keeps what it was asked
        assert Space.model_validate(space.model_dump(mode="json")) == space
    wanted = {"gold": "maximize", "kl": "minimize"}

    def more(results: list[proposals.Result], count: int = 3) -> list[proposals.Values]:
        return proposals.propose(space, wanted, results, count, lambda _: False)  # type: ignore[arg-type]

    first = more([], 12)
    assert more([], 4) == first[:4]  # more points go on with those that were there
    assert all(isinstance(point["ppo.epochs"], int) and 1e-5 <= point["ppo.actor.learning_rate"] <= 1e-3 for point in first)
    told: list[proposals.Result] = [(point, {"gold": -abs(point["ppo.epochs"] - 3), "kl": 1.0, "other": 0.0}) for point in first]
    told[5] = (told[5][0], None)  # it failed
    assert more(told) == more(told)
    assert more(told) != more([*told[:-1], (told[-1][0], {"gold": 5.0, "kl": 0.0})])
    assert proposals.propose(space, wanted, [], 3, lambda point: point["ppo.epochs"] != 2)[0]["ppo.epochs"] == 2  # type: ignore[arg-type]
