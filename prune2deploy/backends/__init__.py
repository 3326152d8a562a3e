"""Runtimes behind one interface; ``registry`` finds them by name."""
