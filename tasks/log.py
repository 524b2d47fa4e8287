"""The service's log: what was decided, and why. Prefect stores it with the run."""

import logging

log = logging.getLogger("ckptfuse")
