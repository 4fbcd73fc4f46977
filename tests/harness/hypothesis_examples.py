"""Number of examples per hypothesis test: few and deterministic by default, more in the slow suite."""

from hypothesis import HealthCheck, Phase, settings


def examples(count: int) -> settings:
    """Settings for `count` examples per 100 in the profile; the profile `many` of tests/conftest.py has 300."""
    return settings(
        max_examples=max(1, count * settings.default.max_examples // 100),
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes, and the examples are small already
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.function_scoped_fixture,
        ],
    )
