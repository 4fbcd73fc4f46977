"""How many examples a test with hypothesis draws: few, which are always the same, and more in the slow suite."""

from hypothesis import HealthCheck, Phase, settings


def examples(count: int) -> settings:
    """So many of 100 that the profile asks for; the profile `many` of tests/conftest.py asks for 300."""
    return settings(
        max_examples=max(1, count * settings.default.max_examples // 100),
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],  # a smaller example costs minutes to find, and these are small
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.function_scoped_fixture,
        ],
    )
