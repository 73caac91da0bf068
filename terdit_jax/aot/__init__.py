"""Programs compiled for machines that are not here: what they need, what they send, how fast they could be."""
