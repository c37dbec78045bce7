"""Second moments for compiled kernels: ``<formula>.h`` for C++, ``<formula>.py`` for Triton."""
