"""Runs it somewhere. The only package that imports ray."""
