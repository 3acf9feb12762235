"""Evaluation: what an attack's success is, heads on features, statistics."""
