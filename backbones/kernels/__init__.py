"""Faster forms of RoIAlign and convolutions, equal to torch's to rounding."""
