"""Settings for all tests."""

from hypothesis import settings

# Same examples in every run, and no deadline: on a busy machine a single one may take a second.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50, database=None)
settings.load_profile("repeatable")
