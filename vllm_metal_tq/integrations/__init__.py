"""Hosts that can run on the compressed cache. They import the core, never the other way round."""
