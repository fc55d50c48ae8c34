"""The flight recorder: what is kept of a run, the bundle it leaves behind, and its replay."""
