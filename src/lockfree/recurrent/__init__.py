"""Recurrent training without waiting for the future."""
