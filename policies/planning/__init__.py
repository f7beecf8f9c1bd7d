"""From confidences to plans within a budget."""
