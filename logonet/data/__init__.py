"""Scans: reading, checking, listing, preparing, cutting."""
