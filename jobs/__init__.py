"""Scripts that ``ray job submit`` runs, one per stage, and the named configs they take."""
