"""The CUDA C++ kernels of csrc as a shared library: found, built when asked to, loaded.

The kernels have a plain C ABI, so nothing here knows torch, and one library serves every torch version. Imports of
this package run without torch too: `setup.py` builds through them.
"""
