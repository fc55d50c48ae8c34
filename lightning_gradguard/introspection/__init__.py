"""What a model does: its autograd graph, its layer calls, and a sandbox that leaves no trace."""
