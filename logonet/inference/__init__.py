"""Running a trained network on scans, and judging what it finds."""
