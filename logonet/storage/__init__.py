"""Objects in S3 and on disk, artifacts, tables and tensors at rest."""
