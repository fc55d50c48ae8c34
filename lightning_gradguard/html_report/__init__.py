"""`gradguard report`: event files as one HTML page."""
