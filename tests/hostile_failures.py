"""What fails today of the promises in capture/test_hostile_models.py: the case, its promises, why. Delete what is mended.

A promise with a question mark fails on some runs.
"""

FAILS_TODAY: dict[str, tuple[str, str]] = {}
