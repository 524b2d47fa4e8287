"""Survey: what the corpus holds, once for each corpus."""

from ckptfuse.corpus.survey import survey
from ckptfuse.records import CorpusRecord
from ckptfuse.service import Service


def survey_corpus(service: Service) -> tuple[CorpusRecord, bool]:
    """What the corpus's splits hold, and whether this was found only now."""
    known = known_survey(service)
    if known is not None:
        return known, False
    record = survey(service.scorer.corpus(), service.params.corpus)
    service.records.put(record.corpus, record)
    return record, True


def known_survey(service: Service) -> CorpusRecord | None:
    return service.records.get(CorpusRecord, service.scorer.corpus_digest())
