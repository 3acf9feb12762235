"""Training: the loop, augmentation, objectives, and how several ranks share the work."""
