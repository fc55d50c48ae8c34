"""Remedies tried: on copies of the same weights, with the same batch, so that the training is left as it was."""
