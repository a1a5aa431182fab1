"""Encoders: images to a generator's style codes."""
