"""How a weight takes its change, for compiled kernels: ``<write>.h`` for C++, ``<write>.py`` for Triton."""
