"""Trials of fixes: each is made to a copy of the training and run on the same batch."""
