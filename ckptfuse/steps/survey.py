"""Survey: what the corpus holds, once for each corpus."""

from ckptfuse.corpus.survey import survey
from ckptfuse.records import CorpusRecord
from ckptfuse.service import Service


def survey_corpus(service: Service) -> CorpusRecord:
    """What the corpus's splits hold; looks through all of it where no record says."""
    known = known_survey(service)
    if known is not None:
        return known
    record = survey(service.scorer.corpus(), service.params.corpus)
    service.records.put(record.corpus, record)
    return record


def known_survey(service: Service) -> CorpusRecord | None:
    return service.records.get(CorpusRecord, service.scorer.corpus_digest())
