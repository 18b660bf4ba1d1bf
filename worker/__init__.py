"""Expires QRIS bill numbers at a SNAP payment gateway, driven by RabbitMQ.

One command's way: delivery → command → attempt (sign, send, judge) → … → outcome → publish, confirm → settle.

Layers, imports point down only: ``cli`` → ``processes``, ``service`` → ``sandbox`` → ``shells`` (one outside
library each) → ``app`` (the use cases) → ``core`` (values and rules: no I/O, no clock, no randomness).
Start reading at ``app/expire.py``.
"""

__version__ = "0.1.0"
