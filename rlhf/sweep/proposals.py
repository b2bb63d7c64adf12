"""Values that optuna proposes: a function of the space's seed and of what came of the points before, whatever runs side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf.sweep.space import Direction, Range, Space, Values

MOST_TRIES = 200  # for values that were not there before

Result = tuple[Values, Mapping[str, float] | None]  # a point, with its numbers; None where it failed


def propose(
    space: Space, wanted: Mapping[str, Direction], results: Sequence[Result], count: int, known: Callable[[Values], bool]
) -> list[Values]:
    """The values of the next points; fewer, where nothing new is found.

    Args:
        space: of the sweep.
        wanted: the objectives.
        results: of all earlier points, in their order.
        count: how many.
        known: whether the same was proposed before.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = space.seed + 7919 * len(results)  # each batch has a generator of its own: no earlier one need be repeated
    sampler = (
        optuna.samplers.TPESampler(seed=seed, constant_liar=True) if space.method == "tpe" else optuna.samplers.RandomSampler(seed=seed)
    )
    study = optuna.create_study(directions=list(wanted.values()), sampler=sampler)
    distributions = {key: _distribution(optuna, space, key) for key in space.values}
    for values, numbers in results:
        state = optuna.trial.TrialState.COMPLETE if numbers is not None else optuna.trial.TrialState.FAIL
        told = [numbers[name] for name in wanted] if numbers is not None else None
        study.add_trial(optuna.trial.create_trial(params=_encoded(space, values), distributions=distributions, values=told, state=state))
    found: list[Values] = []
    for _ in range(MOST_TRIES):
        if len(found) == count:
            break
        asked = study.ask(distributions)
        values = _decoded(space, asked.params)
        if known(values) or values in found:
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
        else:
            found.append(values)
    return found


def _distribution(optuna: Any, space: Space, key: str) -> Any:
    found = space.values[key]
    if not isinstance(found, Range):
        return optuna.distributions.CategoricalDistribution(list(range(len(found))))
    if found.whole:
        return optuna.distributions.IntDistribution(found.low, found.high, log=found.log, step=found.step or 1)
    return optuna.distributions.FloatDistribution(found.low, found.high, log=found.log, step=found.step)


def _encoded(space: Space, values: Values) -> dict[str, Any]:
    # of a list, places stand for its values, which optuna would want to be plain
    return {key: value if isinstance(found := space.values[key], Range) else found.index(value) for key, value in values.items()}


def _decoded(space: Space, params: Mapping[str, Any]) -> Values:
    return {key: params[key] if isinstance(found, Range) else found[params[key]] for key, found in space.values.items()}
