"""The embedded VLM ``tiny``."""
