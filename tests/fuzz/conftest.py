"""The profiles of the fuzzers.

pytest tests/fuzz  # the suite's: some hundred inputs, the same each time
pytest tests/fuzz --hypothesis-profile=thorough -n 2 --dist load  # 3,000 of each kind, others

With `--junitxml=FILE`, the time that each kind took, and how its calls ended.
"""

from hypothesis import HealthCheck, settings

suite = settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,  # `ends` has a limit of its own, for the call alone
    suppress_health_check=[HealthCheck.too_slow],  # some examples are whole runs
)
settings.register_profile("suite", suite)
settings.register_profile("thorough", suite, max_examples=3000, derandomize=False)
settings.load_profile("suite")  # an option of the command line is read later
