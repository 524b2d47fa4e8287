"""Passwords and tokens in addresses: for messages, which end up in logs, records and pages."""

import re

_BEFORE_HOST = re.compile(r"://[^/\s]*@")


def without_passwords(text: str) -> str:
    """With what stands between ``://`` and the host left out, in each URL of the text."""
    return _BEFORE_HOST.sub("://...@", text)
