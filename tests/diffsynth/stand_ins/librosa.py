"""Imported by a reader of sound files that the tests do not use."""
