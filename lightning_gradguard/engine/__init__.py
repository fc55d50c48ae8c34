"""Parts of `Guard`: tracking, sampling, evaluation, readback."""
