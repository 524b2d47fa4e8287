"""Veto: bring the answers that a promotion waits for, in a process and a time of their own."""

from filelock import FileLock, Timeout

from ckptfuse.errors import CkptfuseError
from ckptfuse.promotion import champion, waiting
from ckptfuse.records import VetoRecord
from ckptfuse.service import Service
from ckptfuse.veto import ask, to_arrays, veto_key


def hear_veto(service: Service) -> list[VetoRecord]:
    """Ask the items of the newest waiting fusion, and of the champion, where that was not done.

    Under a lock of its own: watching goes on meanwhile. What is asked is recorded at once, so a
    run that was killed goes on where it was. Raises CkptfuseError while another one is at work.
    """
    if not unheard(service):
        return []
    lock = FileLock(service.workspace.folder("locks") / "veto.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise CkptfuseError("another `ckptfuse veto` is at work on this workspace") from error
    try:
        return [_answers(service, model) for model in unheard(service)]
    finally:
        lock.release()


def unheard(service: Service) -> list[str]:
    """Fusions whose answers lack: of the newest that waits, and of the champion."""
    command = service.params.promotion.veto.command
    left, present = waiting(service), champion(service)
    if not (command and left and present):
        return []
    models = (present.fusion, left[-1].fusion)
    return [m for m in models if not service.records.has(VetoRecord, veto_key(m, command))]


def _answers(service: Service, model: str) -> VetoRecord:
    """Asks for the model's answers, and records them."""
    command = service.params.promotion.veto.command
    key = veto_key(model, command)
    merged = service.weights_of(model)
    if merged is None:
        place = service.workspace.model(model)
        raise CkptfuseError(
            f"the weights of fusion {model[:12]} are in neither workspace, ledger nor registry, so "
            f"the veto cannot be heard; put its model, byte for byte, to {place}"
        )
    answers = ask(command, merged)
    record = VetoRecord(
        model=model,
        command=list(command),
        items=len(answers),
        correct=sum(answers.values()),
    )
    service.records.put(key, record, to_arrays(answers))
    return record
