"""Rendering of finished runs and sweeps: text, CSV, JSON, PNG and one self-contained page."""
