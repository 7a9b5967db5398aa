"""This attention inside other libraries, one module a library; each imports its library itself."""
