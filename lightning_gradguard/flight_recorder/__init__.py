"""The flight recorder: the bundle that a halted run leaves, and the replay of its step."""
