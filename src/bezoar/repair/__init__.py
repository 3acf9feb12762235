"""Repair: an encoder without its backdoor, by clean data alone."""
