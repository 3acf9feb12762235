"""Repairs: encoder in, encoder out, by clean data alone. Each is called with (encoder, clean records, seed)."""
