"""Where commands write: results to standard output, progress, notes and errors to the other."""

from rich.console import Console

stderr = Console(stderr=True, highlight=False, soft_wrap=True)
stdout = Console(highlight=False, soft_wrap=True)
