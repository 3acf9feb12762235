"""Repair: removes a backdoor from an encoder with clean data alone."""
