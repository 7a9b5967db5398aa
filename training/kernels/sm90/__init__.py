"""Kernels of the trainer for Hopper, in Gluon."""
