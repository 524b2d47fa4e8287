"""Automations: what Prefect's server does by itself, of all trajectories that it serves.

Zombies: a worker that was killed leaves its run RUNNING for good. A run that sends no heartbeat any
more is called crashed, and whoever handed it over tries again. The open-source server does not do
that unless it is told to. One that was down for so long takes runs for dead that are at work: a
second attempt to score waits for what the first finds (flows/score.py).

News: one message for each thing that a person wants to hear of, through any service that Apprise
knows.
"""

from datetime import timedelta
from uuid import UUID

from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

from tasks.events import Name
from tasks.notify import resource_of

#: The tag of all our deployments, and so of their runs.
TAG = "ckptfuse"
#: Three heartbeats and some delay; how often they come is in infra/prefect.yaml.
ZOMBIE_AFTER = timedelta(seconds=240)
#: Event -> the subject of its message.
NEWS: dict[Name, str] = {
    "fusion.published": "a fusion was published",
    "fusion.declined-streak": "fusions are declined again and again",
    "checkpoint.spiked": "a checkpoint's loss left the trend",
    "checkpoint.quarantined": "a checkpoint is quarantined",
    "trajectory.stalled": "the trainer has fallen silent",
}


def zombies() -> AutomationCore:
    ended = {f"prefect.flow-run.{s}" for s in ("Completed", "Failed", "Cancelled", "Crashed")}
    return AutomationCore(
        name="ckptfuse: runs without heartbeat are crashed",
        description="So that work of a worker that was killed is handed to another.",
        trigger=EventTrigger(
            # Killed as soon as it ran, it has sent none yet.
            after={"prefect.flow-run.Running", "prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat"} | ended,
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={
                "prefect.resource.id": f"prefect.tag.{TAG}",
                "prefect.resource.role": "tag",
            },
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=ZOMBIE_AFTER,
        ),
        actions=[
            ChangeFlowRunState(
                name=None, state=StateType.CRASHED, message="No heartbeat any more", force=False
            )
        ],
    )


def news(event: Name, block: UUID) -> AutomationCore:
    """A message through the notification block for each such event of any trajectory."""
    subject = NEWS[event]
    return AutomationCore(
        name=f"ckptfuse: tell when {subject}",
        trigger=EventTrigger(
            expect={f"ckptfuse.{event}"},
            match={"prefect.resource.id": resource_of("*")},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[
            SendNotification(
                block_document_id=block,
                subject=f"{{{{ event.resource.name }}}}: {subject}",
                body="{{ event.payload.text }}",
            )
        ],
    )
