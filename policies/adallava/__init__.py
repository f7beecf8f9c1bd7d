"""AdaLLaVA's scheduler, and its training."""
