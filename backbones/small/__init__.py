"""The embedded VLM ``small``, on a published language model."""
