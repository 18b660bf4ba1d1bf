"""Settings from the environment and a ``.env`` file, each declared once: name, rule, default and meaning.

A group is a class, a setting is a field: ``AmqpSettings.queue_type`` is ``AMQP_QUEUE_TYPE``. A field ``x_file`` beside
a field ``x`` is the path of a mounted file that holds ``x``. The declarations are in `groups`; `reference` makes the
README's table. No library does this work: the rules and their words would be ours with one as well, and the import of
one costs a short command such as ``publish`` as much CPU time as everything else that it does.
"""

from worker.settings.group import Secret, SettingsError, SettingsGroup, read_secret_file
from worker.settings.groups import (
    GROUPS,
    AmqpSettings,
    BreakerSettings,
    DefaultMerchant,
    GatewaySettings,
    LogSettings,
    MetricsSettings,
    RetrySettings,
    Settings,
    WorkerSettings,
    reference,
)
from worker.settings.loading import load

__all__ = [
    "GROUPS",
    "AmqpSettings",
    "BreakerSettings",
    "DefaultMerchant",
    "GatewaySettings",
    "LogSettings",
    "MetricsSettings",
    "RetrySettings",
    "Secret",
    "Settings",
    "SettingsError",
    "SettingsGroup",
    "WorkerSettings",
    "load",
    "read_secret_file",
    "reference",
]
