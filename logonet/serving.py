"""The loader that registered models name (MLmodel's ``loader_module``): it stays at this address."""

from logonet.inference.serving import _load_pyfunc

__all__ = ["_load_pyfunc"]
