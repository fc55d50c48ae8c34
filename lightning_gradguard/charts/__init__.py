"""Pictures drawn from plain arrays, and their labels. Only this folder imports matplotlib."""
