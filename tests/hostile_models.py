"""All models that play tricks, and the promises that fail today. To enrol a model, add a line to CASES of its kind."""

from hostile_failures import FAILS_TODAY
from hostile_gradients import CASES as GRADIENTS
from hostile_state import CASES as STATE
from hostile_structure import CASES as STRUCTURE

CASES = (*STATE, *GRADIENTS, *STRUCTURE)
by_name = {case.name: case for case in CASES}
assert len(by_name) == len(CASES)
assert set(FAILS_TODAY) <= set(by_name)
