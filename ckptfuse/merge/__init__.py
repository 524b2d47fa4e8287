"""The merge: one streaming pass over the inputs, weighted sums of many weight vectors out.

``inputs`` compares every header before a byte of data, ``arithmetic`` is the sum itself,
``passes`` carries it through files by ``stretches`` and ``requests``, ``folder`` and ``memory``
are what comes out.
"""
