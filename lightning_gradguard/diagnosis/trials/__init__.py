"""Trials of fixes on copies of the same weights, with the same batch."""
