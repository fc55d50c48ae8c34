"""Rules that find the causes of a fault, most likely first."""
