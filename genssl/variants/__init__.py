"""Variants: pure functions of (source, generator, parameters, index); their keys, plans, sources and ledger."""
