"""The flight recorder: the bundle a halted run leaves behind, and its replay."""
