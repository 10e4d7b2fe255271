"""The search finds faults: each of faults.py is sown into the package, and a case has to show it."""

import faults
import hypothesis
import pytest
from runner import cases, disagreement

pytestmark = pytest.mark.cached_norms

# more than the ordinary run has, since a fault may hide behind rare configurations
EXAMPLES = 400


@pytest.fixture(scope="module")
def drawn():
    """Cases as the search draws them, always the same."""
    found = []

    @hypothesis.seed(0)
    @hypothesis.settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases(without=("compiled", "traced")))
    def collect(case):
        found.append(case)

    collect()
    return found


@pytest.mark.parametrize(("hook", "fault"), faults.FAULTS, ids=[fault.__name__ for _, fault in faults.FAULTS])
def test_the_search_finds(hook, fault, drawn):
    """Some case disagrees with the fault, and without it does not."""
    places = faults.locate(hook)
    (owner, name), *_ = places
    faulty = fault(vars(owner).get(name, getattr(owner, name)))
    for number, case in enumerate(drawn, start=1):
        with pytest.MonkeyPatch.context() as patch:
            for place in places:
                patch.setattr(*place, faulty)
            shown = disagreement(case)
        if shown is not None and disagreement(case) is None:
            print(f"found by example {number}: {shown}")
            return
    pytest.fail(f"none of {len(drawn)} examples shows it")


def test_there_are_twelve():
    assert len(faults.FAULTS) >= 12
