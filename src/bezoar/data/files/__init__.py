"""What others wrote, read within bounds: every handling of hostile input is in this folder."""
