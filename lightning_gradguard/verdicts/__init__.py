"""Host code: what is wrong, how grave it is, and what is done about it, in plain numbers."""
