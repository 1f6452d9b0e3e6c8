"""A run that has diverged is told and leaves no model; noisy, short, warming-up and overfitting runs are left alone."""

import math
import random
from collections.abc import Callable

import pytest

from pipeline.vlm.training.divergence import AT_THE_END, NOTICED, has_diverged, limit, stays_above

VOCABULARY = 1300
Curve = Callable[[float, random.Random], float]  # share of the run, noise -> loss

SOUND: dict[str, Curve] = {
    "falls": lambda share, noise: 6 * math.exp(-5 * share) + 0.1 + noise.gauss(0, 0.05),
    "stays where it is": lambda _, noise: 2.3 + noise.gauss(0, 0.3),
    "a step a row, so every loss is another": lambda share, noise: noise.expovariate(1 / (2.5 - 2 * share)),
    "rises while it warms up": lambda share, noise: 0.5 + 4 * max(0, 0.2 - share) * 5 * share * 5 + noise.gauss(0, 0.02),
    "jumps to three times its start, and comes back": lambda share, noise: (
        (6.0 if 0.2 < share < 0.35 else 2 - share) + noise.gauss(0, 0.05)
    ),
    "begins near its best and gets a little worse": lambda share, noise: 0.05 + 0.6 * share + noise.gauss(0, 0.02),
    "spikes now and then": lambda share, noise: 40.0 if noise.random() < 0.1 else 3 - 2 * share,
    "a random model that learns": lambda share, noise: 11.9 - 9 * share + noise.gauss(0, 0.2),
    "a steep start from the random side of a finished model": lambda share, noise: 0.2 + noise.expovariate(3) - 0.1 * share,
}
LOST: dict[str, Curve] = {
    "explodes at once": lambda share, noise: 6.0 if share < 0.01 else 37 + noise.gauss(0, 2),
    "explodes in the middle": lambda share, noise: (3 - 2 * share if share < 0.5 else 9.0) + noise.gauss(0, 0.1),
    "forgets its language": lambda share, noise: 1.2 + 6 * min(1, 10 * share) + noise.gauss(0, 0.1),
    "from a random model": lambda share, noise: 11.9 + 20 * share + noise.gauss(0, 0.3),
}


def curve(make: Curve, steps: int, seed: int) -> list[float]:
    noise = random.Random(seed)
    return [max(0.0, make(step / steps, noise)) for step in range(steps)]


def told(losses: list[float]) -> bool:
    """Whether a run with this curve is told on its way that it may be lost."""
    return any(stays_above(losses[:made], NOTICED) for made in range(1, len(losses) + 1))


@pytest.mark.parametrize("steps", [1, 2, 5, 30, 126, 400])
@pytest.mark.parametrize("name", SOUND)
def test_a_sound_run_is_not_called_lost(name: str, steps: int) -> None:
    for seed in range(20):
        losses = curve(SOUND[name], steps, seed)
        assert not has_diverged(losses, min(losses) + 0.5, VOCABULARY)
        if name not in ("jumps to three times its start, and comes back", "rises while it warms up"):
            assert not told(losses)


@pytest.mark.parametrize("steps", [126, 400])
@pytest.mark.parametrize("name", LOST)
def test_a_lost_run_is_told_on_its_way_and_judged_at_its_end(name: str, steps: int) -> None:
    for seed in range(20):
        losses = curve(LOST[name], steps, seed)
        assert has_diverged(losses, 1.0, VOCABULARY)
        assert told(losses)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_short_run_is_judged_by_what_its_model_knows(steps: int) -> None:
    losses = [2.0] * steps
    assert has_diverged(losses, 37.0, VOCABULARY)
    assert has_diverged(losses, float("nan"), VOCABULARY)
    assert has_diverged(losses, float("inf"), VOCABULARY)
    assert not has_diverged(losses, math.log(VOCABULARY) - 0.1, VOCABULARY)  # other rows may be harder than those trained on
    assert not has_diverged([11.0] * steps, 12.0, VOCABULARY)  # a model that knew nothing to begin with


def test_the_first_loss_sets_the_limit() -> None:
    assert limit(2.0) == 3.0
    assert limit(6.0) == 9.0
    assert limit(0.1) == pytest.approx(1.1)
    assert not stays_above([1.0] + [9.0] * (AT_THE_END - 1), AT_THE_END)
    assert stays_above([1.0] + [9.0] * AT_THE_END, AT_THE_END)
