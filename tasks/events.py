"""What the service tells Prefect's event bus, for automations to act on.

An event is news and no state: one that is lost, or comes twice, changes nothing.
"""

from typing import Literal

from prefect.events import emit_event

from ckptfuse.service import Service
from tasks.notify import resource_of

Name = Literal[
    "fusion.published",
    "fusion.declined",
    "fusion.declined-streak",
    "checkpoint.spiked",
    "checkpoint.quarantined",
    "trajectory.stalled",
]


def tell(service: Service, name: Name, step: int, text: str) -> None:
    """Emit ``ckptfuse.NAME`` of this trajectory; ``text`` is a sentence for people."""
    trajectory = service.params.trajectory
    emit_event(
        event=f"ckptfuse.{name}",
        resource={
            "prefect.resource.id": resource_of(trajectory),
            "prefect.resource.name": trajectory,
        },
        payload={"step": step, "text": text},
    )
