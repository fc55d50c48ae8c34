"""`gradguard report`: what a run's event files hold, as one HTML page."""
