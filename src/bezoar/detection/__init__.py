"""Detection: which records of a data set are poisoned, which inputs carry a trigger."""
