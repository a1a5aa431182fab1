"""The verbs of ``galatea``, one file each."""
