"""Power laws and what a prediction by them must beat; studies.py and notebook 05 use them.

    law = fit_power_law(parameters, losses, with_constant=True)
    print(law.alpha, law(1e9))
"""
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sample import check                                                                # noqa: E402

RESAMPLES = 300


class PowerLaw(NamedTuple):
    """y = factor * x ** alpha + constant, or (beta * x) ** alpha + constant, beta = factor ** (1 / alpha);
    correlation is between log x and log(y - constant)."""
    alpha: float
    factor: float
    constant: float
    correlation: float

    def __call__(self, x):
        return self.factor * np.asarray(x, float) ** self.alpha + self.constant


def fit_power_law(x, y, with_constant: bool = False) -> PowerLaw:
    """Least-squares fit of the logs. The constant, between 0 and almost min(y), is that with the strongest
    correlation. Raises UserError if y doesn't fall as x rises."""
    x, y = np.log(np.asarray(x, float)), np.asarray(y, float)
    check(len(x) > 1 and np.polyfit(x, y, 1)[0] < -1e-12, 'no power law: the measured value does not fall')
    constants = y.min() * (1 - np.geomspace(1, 1e-4, 400)) if with_constant else np.zeros(1)
    logs, centred = np.log(y - constants[:, None]), x - x.mean()        # one row of logs per constant
    deviations = logs - logs.mean(1, keepdims=True)
    correlations = deviations @ centred / np.sqrt(np.square(deviations).sum(1) * np.square(centred).sum())
    best = correlations.argmin()
    alpha = deviations[best] @ centred / np.square(centred).sum()
    factor = math.exp(logs[best].mean() - alpha * x.mean())
    return PowerLaw(float(alpha), factor, float(constants[best]), float(correlations[best]))


def resampled_laws(x, values: list[list], with_constant: bool, spread: float) -> list[PowerLaw]:
    """First the law of the means (values: of the seeds, for each x), then RESAMPLES laws of these means plus
    noise: normal, with a standard deviation of spread / sqrt(number of seeds)."""
    means = np.array([np.mean(seeds) for seeds in values])
    noise = np.random.default_rng(0).standard_normal((RESAMPLES, len(means)))
    noise *= spread / np.sqrt([len(seeds) for seeds in values])
    return [fit_power_law(x, y, with_constant) for y in [means, *(means + noise)]]


def range_of(values: list[float]) -> tuple[float, float, float]:
    """The first, and the 5th and 95th percentile of the others."""
    return values[0], *np.percentile(values[1:], (5, 95)).tolist()


def pareto_frontier(costs, losses) -> list[int]:
    """Indices of the points that no other point beats at equal or lower cost, by increasing cost."""
    order, found = np.lexsort((losses, costs)), []
    for i in order:
        if not found or losses[i] < losses[found[-1]]:
            found.append(int(i))
    return found


def grouped(rows: list[dict], measure: str, *names: str, **fixed) -> dict[tuple, list[float]]:
    """The values of a measure over the seeds, by what the rows have under `names`, in rising order. `fixed`:
    what the rows must have."""
    found = {}
    for row in sorted(rows, key=lambda row: [row[name] for name in names]):
        if fixed.items() <= row.items():
            found.setdefault(tuple(row[name] for name in names), []).append(row[measure])
    return found


def spread_of(rows: list[dict], measure: str) -> float:
    """Standard deviation over the seeds, pooled over all runs with several."""
    groups = grouped(rows, measure, 'depth', 'blocks', 'steps').values()
    return math.sqrt(np.mean([np.var(values, ddof=1) for values in groups if len(values) > 1]))


def guesses(x: list, values: list[list], asked: float) -> dict:
    """Without a law: as good as the largest x, or as much better per doubling as the last two x say."""
    before, last = (np.mean(seeds) for seeds in values[-2:])
    slope = (last - before) / math.log(x[-1] / x[-2])
    return dict(as_good=last, as_much_better=last + slope * math.log(asked / x[-1]))
