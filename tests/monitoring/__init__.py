"""Alerts and dashboard: what makes them from their sources, and what proves them.

`python -m tests.monitoring --help` says what it can do.
"""
