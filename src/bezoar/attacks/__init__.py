"""Attacks: poisons of data, triggers, and edits of encoders; the plan records what was poisoned."""
