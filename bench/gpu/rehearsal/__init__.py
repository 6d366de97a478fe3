"""The GPU server on a machine without a GPU: see `__main__.py`."""
