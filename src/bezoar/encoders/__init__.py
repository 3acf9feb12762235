"""Encoders: networks with their weights, and the published formats they are read from."""
