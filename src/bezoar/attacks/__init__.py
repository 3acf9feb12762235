"""Attacks: triggers, poisons of a data set, and edits of an encoder. A plan records what was poisoned."""
