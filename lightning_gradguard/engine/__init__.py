"""What `Guard` is made of: tracking, sampling, evaluation, readback, fault tracking."""
