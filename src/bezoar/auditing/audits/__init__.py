"""Audits: is this encoder backdoored? Each is called with (encoder, clean images) and gives a Verdict."""
