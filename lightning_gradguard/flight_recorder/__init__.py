"""The flight recorder: bundles of halted runs, and their replay."""
