"""`gradguard report`: a run's event files as one HTML page."""
