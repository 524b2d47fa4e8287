"""The report: one page that shows the same truth as the records."""
