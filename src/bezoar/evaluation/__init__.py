"""Evaluation: what an encoder does, what an attack achieves, and how sure each number is."""
