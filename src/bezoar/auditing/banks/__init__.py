"""Banks: JSON files of audits' values of encoders known to be clean, and the methods that read them."""
