"""For developers of logonet; not in the wheel."""
