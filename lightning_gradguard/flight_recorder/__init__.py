"""Record halted runs and replay their steps."""
