"""Every pass in Triton, for any GPU and for Triton's interpreter."""
