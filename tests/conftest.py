"""For all tests: how long a machine takes for an example says nothing about what it found."""

from hypothesis import HealthCheck, settings

# On top of what is the default here; with CI set that is a profile of hypothesis's own.
settings.register_profile(
    "house",
    settings(),
    deadline=None,
    suppress_health_check=[*settings().suppress_health_check, HealthCheck.too_slow],
)
settings.load_profile("house")
