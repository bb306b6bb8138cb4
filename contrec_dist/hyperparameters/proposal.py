"""What to try next: the config's own settings first, then what a tree-structured Parzen estimator (Optuna's) expects most of.

Guarantees   a function of (space, what was tried, seed): a search that was stopped goes on as one that never was. No setting twice.
Source       Bergstra et al., Algorithms for Hyper-Parameter Optimization, 2011
"""

import warnings
from typing import Mapping, Sequence

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from contrec_dist.hyperparameters.space import SearchSpace

RANDOM_TRIALS = 8
"settings that are drawn before the estimator decides"
REPEATED_PROPOSALS = 20
"proposals of what was tried, after which a new setting is drawn"


def propose(space: SearchSpace, tried: Sequence[tuple[Mapping[str, object], float | None]], seed: int) -> dict[str, object] | None:
    """Settings that were not tried; None where all were. `tried`: (settings, figure to be raised or None for a failure), in order."""
    known = [_places(space, values) for values, _ in tried]
    if not tried:
        return dict(space.start)
    if len(known) >= space.size:
        return None
    random = np.random.default_rng([seed, len(tried)])
    study = _study(space, known, [figure for _, figure in tried], seed=int(random.integers(2**31)))
    for _ in range(REPEATED_PROPOSALS):
        trial = study.ask(_distributions(space))
        if trial.params not in known:
            return _values(space, trial.params)
        study.tell(trial, state=TrialState.FAIL)
    while True:
        drawn = {key: int(random.integers(len(values))) for key, values in space.choices.items()}
        if drawn not in known:
            return _values(space, drawn)


def _study(space: SearchSpace, known: Sequence[dict], figures: Sequence[float | None], seed: int) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=RANDOM_TRIALS, multivariate=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for params, figure in zip(known, figures):
        state = TrialState.FAIL if figure is None else TrialState.COMPLETE
        study.add_trial(create_trial(state=state, params=params, distributions=_distributions(space), value=figure))
    return study


def _distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """Places in the lists of values, ordered where those are."""
    return {
        key: IntDistribution(0, len(values) - 1) if space.is_ordered(key) else CategoricalDistribution(range(len(values)))
        for key, values in space.choices.items()
    }


def _places(space: SearchSpace, values: Mapping[str, object]) -> dict[str, int]:
    return {key: space.choices[key].index(values[key]) for key in space.choices}


def _values(space: SearchSpace, places: Mapping[str, int]) -> dict[str, object]:
    return {key: space.choices[key][places[key]] for key in space.choices}
