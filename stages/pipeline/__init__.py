"""Pipelines: steps in order, here or on a cluster."""
