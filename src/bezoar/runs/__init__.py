"""Runs: a directory that answers one question, and how questions become runs."""
