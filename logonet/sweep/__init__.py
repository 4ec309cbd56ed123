"""Sweeps: which settings to try, the records of what was tried, and what the records say."""
