"""Measurements: every claim of speed in this project comes from a command in here."""
