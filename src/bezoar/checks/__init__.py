"""Checks at test time: does this input carry a trigger? Each is called with (encoder, images) and gives Scores."""
