"""Attacks: triggers, poisons of a data set, and edits of an encoder; a plan records poisonings."""
