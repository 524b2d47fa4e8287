"""This machine's clock beside a server's, by the ``Date`` of an HTTP answer."""

from email.utils import parsedate_to_datetime

from ckptfuse.checks.check import Check, failed, ok, warning

#: Requests to S3 are refused beyond a quarter of an hour.
REFUSED = 15 * 60.0
#: What is said to be in time, in seconds.
TOLERATED = 5.0
_MEND = "set both clocks by NTP (timedatectl status, chronyc tracking)"


def compare_clocks(name: str, date: str | None, *, asked: float, answered: float) -> Check:
    """``asked`` and ``answered``: our clock before and after the request (s since the epoch)."""
    if date is None:
        return warning(name, "the server tells no time in its answers", _MEND)
    # The header counts whole seconds.
    ahead = (asked + answered) / 2 - (parsedate_to_datetime(date).timestamp() + 0.5)
    doubt = 0.5 + (answered - asked) / 2
    if abs(ahead) <= TOLERATED + doubt:
        return ok(name, f"this clock and the server's agree within {abs(ahead) + doubt:.0f} s")
    way = "ahead of" if ahead > 0 else "behind"
    said = (
        f"this clock is {abs(ahead):.0f} s {way} the server's: checkpoints seem older or younger "
        "than they are to watch.settle_seconds"
    )
    if abs(ahead) < REFUSED:
        return warning(name, said, _MEND)
    return failed(name, f"{said}, and S3 refuses requests", _MEND)
