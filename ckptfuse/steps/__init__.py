"""The steps of the pipeline, each from records to records.

Every step asks first whether its record is there; so it can be repeated, and killed anywhere.
"""
