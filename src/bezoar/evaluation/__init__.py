"""Evaluation: measures encoders and attacks, with an interval for each number."""
