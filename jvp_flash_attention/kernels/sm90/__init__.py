"""Warp-specialised passes for Hopper, in Gluon."""
