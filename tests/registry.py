"""All networks on which every promise about features is tested."""

from cases import CASES as SMALL
from integration_cases import CASES as INTEGRATIONS
from real_cases import CASES as REAL
from rearranged_cases import CASES as REARRANGED

CASES = (*SMALL, *REAL, *REARRANGED, *INTEGRATIONS)
by_name = {case.name: case for case in CASES}
assert len(by_name) == len(CASES)
