"""Random changes of pictures."""
