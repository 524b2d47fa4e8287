"""What Prometheus is told of a trajectory: from the workspace alone, whichever server is down.

``seen``    what is read: the records, the meter of scoring, what the last look left (looks.py)
``told``    which numbers are made of that, under which names
``export``  those in Prometheus's form
"""

from ckptfuse.metrics.export import prometheus_registry

__all__ = ["prometheus_registry"]
