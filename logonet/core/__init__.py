"""What everything stands on: errors, redaction, configs, randomness."""
