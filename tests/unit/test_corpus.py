"""corpus: being written now by the helper that was given the unit tests; please leave it."""
