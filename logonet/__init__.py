"""logonet: self-supervised pretraining of 3D medical image networks, from a bucket of scans, on Ray."""

__version__ = "0.1.0"
