"""What details contribute, for compiled kernels: ``<detail>.h`` for C++, ``<detail>.py`` for Triton."""
