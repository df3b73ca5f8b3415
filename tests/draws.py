"""The number of examples for a property test: as stated in CI, many more when exploring."""

from hypothesis import settings

_TIMES = settings().max_examples // settings.get_profile("ci").max_examples


def examples(count: int) -> settings:
    """The decorator for a test with ``count`` examples in CI."""
    return settings(max_examples=count * _TIMES)
