"""Why gradients are sick, and what helps."""
