"""The target text: from the files of each domain to the documents of each split.

documents  a document: the digest of all its text, and a beginning that is long enough
files      which files a domain's path means: one, or a folder's
texts      their documents, one after another: JSON lines, plain text, Parquet; any of S3's too
draw       the documents that the budgets can use, split and ordered by hashes of their content
kept       what was drawn, kept on disk until the files change
survey     what is in the splits, with the documents that are nearly alike across them
"""

from ckptfuse.corpus.documents import Document, jsonl
from ckptfuse.corpus.draw import (
    SPLITS,
    Corpus,
    Progress,
    Source,
    Split,
    documents_of,
    documents_to_score,
    read_corpus,
    split_of,
)
from ckptfuse.corpus.kept import KeptCorpus

__all__ = [
    "SPLITS",
    "Corpus",
    "Document",
    "KeptCorpus",
    "Progress",
    "Source",
    "Split",
    "documents_of",
    "documents_to_score",
    "jsonl",
    "read_corpus",
    "split_of",
]
