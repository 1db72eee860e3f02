"""Which cases of a wide sweep run each time; the others wait for `pytest -m exhaustive`."""

import pytest

exhaustive = pytest.mark.exhaustive


def sweep(cases, quick):
    """The cases as parameters of a test; those that are not among `quick` are exhaustive."""
    cases, quick = list(cases), list(quick)
    unknown = [case for case in quick if case not in cases]
    assert not unknown, f"no such cases: {unknown}"
    return [case if case in quick else pytest.param(case, marks=exhaustive) for case in cases]
