"""Reads what a process serves at `/metrics`."""

from prometheus_client.parser import text_string_to_metric_families


def values(text: str) -> dict[str, float]:
    """Every sample by its name and labels, as `name,label=value`."""
    return {
        sample.name + "".join(f",{name}={value}" for name, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
