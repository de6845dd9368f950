"""Inputs as people have them: each module turns one layout of files and lists into a `Collection`."""
