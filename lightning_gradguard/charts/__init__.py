"""Pictures drawn from plain arrays."""
