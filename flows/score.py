"""What a worker does for a watch elsewhere: score what was handed over, leave the answer."""

from prefect import flow

from flows.opening import open_flow
from tasks.log import log
from tasks.score import score_for_others
from tasks.workers import Handed, names_of


@flow(name="score", persist_result=False)
def score(params_file: str, request: str) -> None:
    """Score the models of a request in ``cache/handed``; again, it finds what is done.

    The run has the name that whoever handed it over gave it.
    """
    service = open_flow(params_file)
    handed = Handed(service.workspace.folder("cache"))
    asked = handed.asked(request)
    with handed.alone(request):  # before a GPU is taken
        if handed.answer(request) is not None:
            log.info("answered by another run; nothing done")
            return
        answer = score_for_others(asked, service.params.scoring.gpus_per_job, names_of(asked))
        handed.give(request, answer)
