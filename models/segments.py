"""Parts of a head."""

SEGMENTS = (
    "background",
    "skin",
    "eye_white",
    "iris",
    "lips",
    "mouth",
    "brow",
    "beard",
    "hair",
    "cloth",
    "glasses",
)
"""Parts of a head, as the embedded world labels them."""
