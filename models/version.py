"""The version of the code, part of every step hash: raise it when results change."""

VERSION = "0.1.0"
