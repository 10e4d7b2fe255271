"""The correlation of dD and dM, and its interval, against known relations."""

import math

import pytest
import torch
from analysis_fixtures import records

from dora_peft.analysis.correlation import correlate, correlate_by_step


@pytest.mark.parametrize("sign", [1, -1])
def test_the_correlation_of_a_known_relation(sign):
    x = torch.rand(30, 3, dtype=torch.float64)
    y = 5 + sign * x + 0.2 * torch.randn_like(x)
    found = correlate(records(1e-12 * x, 1e-3 * y))
    expected = torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].item()
    assert found.r == pytest.approx(expected, rel=1e-9)
    assert sign * found.r > 0.7
    assert found.low < found.r < found.high
    assert found.low * found.high > 0
    assert found.count == 90
    assert correlate(records(1e-12 * x, 1e-3 * y)) == found
    assert correlate(records(1e-12 * x, 1e-3 * y), seed=1) != found
    narrow = correlate(records(1e-12 * x, 1e-3 * y), level=0.5)
    assert found.low < narrow.low < narrow.high < found.high


def test_repeated_points_of_a_module_do_not_narrow_the_interval():
    x = torch.rand(20, 1, dtype=torch.float64)
    y = x + torch.randn_like(x)
    once, repeated = correlate(records(x, y)), records(x.expand(20, 9), y.expand(20, 9))
    # whatever the order
    repeated.sort(key=lambda entry: entry["magnitude"])
    clustered = correlate(repeated)
    assert clustered.r == pytest.approx(once.r, rel=1e-9)
    # modules in another order
    assert clustered.high - clustered.low == pytest.approx(once.high - once.low, rel=0.2)
    naive = correlate([entry | {"module": str(i)} for i, entry in enumerate(repeated)])
    assert naive.r == pytest.approx(clustered.r)
    assert clustered.high - clustered.low > 2 * (naive.high - naive.low)


def test_correlations_that_do_not_exist():
    x = torch.rand(5, 2)
    for history in (records(x, torch.full((5, 2), 0.1)), records(torch.zeros(5, 2), x), []):
        found = correlate(history)
        assert all(math.isnan(value) for value in found[:3])
        assert found.count == len(history)
    one = correlate(records(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0, 4.0, 7.0]])))
    assert one.r > 0.9
    assert math.isnan(one.low)
    assert math.isnan(correlate(records(x, torch.full((5, 2), math.nan))).r)
    with pytest.raises(ValueError, match="level between 0 and 1"):
        correlate([], level=95)


def test_growth_over_the_steps_does_not_count_at_one_step():
    """Both changes grow with the step, and within each step they oppose one another."""
    history = [
        {"step": step, "module": f"layers.{i}", "direction": step + 0.1 * i, "magnitude": step - 0.1 * i}
        for step in (10, 20, 30)
        for i in range(5)
    ]
    assert correlate(history).r > 0.9
    found = correlate_by_step(history)
    assert list(found) == [10, 20, 30]
    assert all(c.r == pytest.approx(-1) and c.count == 5 for c in found.values())
