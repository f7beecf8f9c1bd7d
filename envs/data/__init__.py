"""Queries: data sets, files, scenes, benchmarks, and how answers are scored."""
